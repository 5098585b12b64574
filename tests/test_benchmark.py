"""The benchmarks run, count what they say they count, and measure the config's own optimizer."""

import contextlib
import io
import json
import threading
import warnings

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, tiny

from config import load_config
from lab import benchmark as lab
from tools.benchmark import Step, main, make_batch, measure_variant, measure_variants, show
from world.street import build_world

pytestmark = pytest.mark.usefixtures("one_thread_of_commands")
FP16 = "train.mixed_precision=fp16 needs a GPU: Accelerate would compute in fp32; bf16 works on a CPU"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Overrides of a tiny run on a folder of 8 rendered frames."""
    folder = tmp_path_factory.mktemp("world")
    root = build_world(folder, "train", 8, size=(160, 64))
    words = tiny(root, folder / "out", 'data.train=[{"split":["train"]}]', kitti=True)
    return [str(ROOT / "configs/kitti.py"), *words, "model.size=64,160"]


@pytest.fixture
def step(world):
    """A step of two images, with AdamW and an average."""
    return make_step(world, 2)


def make_step(world, images, *words):
    config = load_config(world[0], [*world[1:], "train.optimizer=adamw", *words])
    accelerator = Accelerator(cpu=True)
    return Step(config, accelerator, make_batch(config, images, 8, accelerator.device))


def test_the_table_of_a_config(world, tmp_path, capsys):
    assert main([*world, "--rounds", "2", "--json", str(tmp_path / "b.json")]) == 0
    numbers, out = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    assert all(name in out for name in numbers)
    parts = sum(numbers[f"{name}_s"] for name in ("forward", "targets_losses", "backward"))
    assert numbers["optimizer_and_average_s"] > 0
    assert numbers["whole_step_s"] > parts / 2
    assert numbers["train_images_per_s"] == pytest.approx(2 / numbers["whole_step_s"])
    assert 0 <= numbers["data_wait_share"] < 1
    assert min(numbers["predict_s"], numbers["loader_images_per_s_per_worker"]) > 0


def test_missing_data_is_said_and_the_rest_is_measured(world, tmp_path, capsys):
    assert main([*world, f"data.root={tmp_path}", "--rounds", "1"]) == 0
    shown = capsys.readouterr()
    assert f"the loader is not measured: {tmp_path}: expected a KITTI folder" in shown.err
    assert "whole_step_s" in shown.out
    assert "data_wait_share" not in shown.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["configs/none.py"], "configs/none.py: no such config file"),
        (["configs/kitti.py", "train.lrr=1"], "did you mean train.lr"),
        (["configs/synthetic.py", "train.optimizer=admw"], "'admw' is unknown to timm; near it: adamw"),
        (["configs/kitti.py", "--rounds", "0"], "--rounds 0: expected at least 1"),
        (["configs/kitti.py", "--gpu"], "torch sees no CUDA GPU here"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("optimizer", "kind", "waits"), [("adamw", torch.optim.AdamW, 0), ("sgd", torch.optim.SGD, 1)])
def test_the_config_s_own_optimizer_and_checkpointing_are_measured(world, optimizer, kind, waits):
    on = optimizer == "sgd"
    words = [f"train.optimizer={optimizer}", f"train.checkpoint_backbone={str(on).lower()}", "model.norm=frozen"]
    step = make_step(world, 2, *words, "model.backbone=resnet10t")
    assert isinstance(step.optimizer.optimizer, kind)
    assert any(getattr(module, "grad_checkpointing", False) for module in step.net.backbone.modules()) == on
    before = [p.clone() for p in step.net.parameters()]
    numbers = lab.count_operators(step)
    assert any(not torch.equal(a, b) for a, b in zip(before, step.net.parameters(), strict=True))
    assert numbers["host_syncs_per_step"] == waits
    assert numbers["optimizer_and_average_operator_calls"] > 0


def test_variants_run_and_one_that_fails_is_told(world, capsys):
    """Each in a process of its own; that a variant runs is seen here."""
    config = load_config(world[0], world[1:])
    table = measure_variants(config, 2, 2, variants=[("fp16", False)])
    assert table == {"fp16 eager": {"error": "UserError: " + FP16}}
    row = measure_variant(config, 2, 2, "no", False)
    show({"table": {**table, "fp32 eager": row}})
    assert f"fp16 eager                UserError: {FP16}\n" in capsys.readouterr().out
    assert row["images_per_s"] == pytest.approx(2e3 / row["step_ms"])
    assert row["gflop_per_image"] > 0.01
    assert row["tflop_per_s"] == pytest.approx(row["gflop_per_image"] * row["images_per_s"] / 1e3)
    assert row["peak_memory_mib"] is None  # CUDA's


def test_a_step_compiles_as_the_loop_does(step, monkeypatch):
    names = []
    monkeypatch.setattr("torch.compile", lambda function, fullgraph: names.append(function.__name__) or function)
    monkeypatch.setattr("torch.nn.Module.compile", lambda module, fullgraph: names.append(type(module).__name__))
    step.compile()
    step()
    assert names == ["Detector", "assign", "compute_losses"]


def test_memory_by_module_adds_up(world, step):
    numbers = lab.measure_modules(step)
    table, own = numbers["table"], sum(p.nbytes for p in step.net.parameters()) / 2**20
    buffers, count = sum(b.nbytes for b in step.net.buffers()) / 2**20, len([*step.net.parameters()])
    rows = ("backbone", "fpn", "towers", "predictors", "other", "losses")
    for kind, size in table["all"].items():
        assert size == pytest.approx(sum(table[row][kind] for row in rows)), kind
    assert table["all"]["parameters"] == table["all"]["gradients"] == own
    assert table["all"]["optimizer_state"] == 2 * own + 4 * count / 2**20  # and the number of steps of each
    assert table["all"]["buffers"] == buffers
    assert table["all"]["average"] == own + buffers
    assert table["backbone"]["parameters"] == sum(p.nbytes for p in step.net.backbone.parameters()) / 2**20
    assert numbers["after_backward_mib"] == pytest.approx(5 * own + 2 * buffers + 4 * count / 2**20)
    more = lab.measure_modules(make_step(world, 4))["table"]
    assert table["predictors"]["activations"] == 0  # they keep what the towers keep, too
    for row in ("backbone", "fpn", "towers", "losses"):
        assert 0 < table[row]["activations"] < more[row]["activations"], row
    assert 1.9 < more["backbone"]["activations"] / table["backbone"]["activations"] < 2.1


def test_checkpointing_shows_in_the_memory(world, step):
    table = lab.measure_modules(step)["table"]
    words = ("train.checkpoint_backbone=true", "model.norm=frozen")
    fewer = lab.measure_modules(make_step(world, 2, *words))["table"]
    assert 0 < fewer["backbone"]["activations"] < 0.8 * table["backbone"]["activations"]
    assert fewer["towers"] == table["towers"]


def test_a_storage_counts_once_and_parameters_do_not():
    class Cell:
        def __init__(self):
            self.net, self.batch = torch.nn.Module(), {"image": torch.ones(5)}
            self.net.backbone = torch.nn.Linear(5, 7)  # keeps its input, a part of the batch, and its weight

        def forward(self):
            self.x = self.net.backbone(self.batch["image"])

        def targets_losses(self):
            self.loss = (self.x.exp() * self.x[:3].sum()).sum()

    sizes = lab.kept_for_backward(Cell())
    assert sizes == {"losses": 4 * (7 + 1)}  # exp keeps its output, and so does the product: once; and the sum


def test_waits_are_counted():
    x, on_host = torch.arange(3.0), torch.tensor(1.0)
    with lab.Count([on_host]) as count:
        x + 1
        x[x > 1]
        x.sum().item()
        x.nonzero()
        on_host.item()
    assert count.waits == 3
    assert count.calls["add"] == 1


def test_the_work_of_the_head_does_not_depend_on_the_number_of_objects(world):
    numbers = lab.measure_head(load_config(world[0], world[1:]), torch.device("cpu"), 2, 1)
    assert set(numbers["targets_losses_ms"]) == set(numbers["operator_calls"]) == {"8", "30", "100"}
    assert len({*numbers["operator_calls"].values()}) == 1
    assert numbers["operator_calls_of_own_losses"]["8"] < numbers["operator_calls"]["8"]
    assert set(numbers["decode_nms_ms"]) == {"threshold", "900_candidates"}


def test_the_long_benchmark(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lab, "measure_head", lambda *_: {"decode_nms_ms": {"threshold": 1.0}})
    monkeypatch.setattr(lab, "measure_evaluation", lambda: {})
    monkeypatch.setattr(
        lab, "measure_peaks", lambda config, images: {"peak_memory_over_backbone": 1.0}
    )  # two processes
    assert lab.main([*world, "--rounds", "2", "--json", str(tmp_path / "b.json")]) == 0
    numbers = json.loads((tmp_path / "b.json").read_text())
    assert "decode_nms_ms threshold" in capsys.readouterr().out
    ratios = ("train_step_over_backbone", "predict_over_backbone_forward", "peak_memory_over_backbone")
    for name in (*ratios, "loader_over_bare_decode", "cached_loader_over_loader"):
        assert numbers[name] > 0, name
    assert numbers["whole_step_over_backbone"] > numbers["train_step_over_backbone"] / 2  # two rounds, a busy machine
    assert numbers["host_syncs_per_step"] == 0
    assert lab.main([*world, "--memory"]) == 0
    assert "before_backward_mib" in capsys.readouterr().out
    assert lab.main(["--data", "0"]) == lab.main([]) == lab.main([*world, "--data", "40"]) == 2
    assert capsys.readouterr().err.count("expected a config or --data N, and not both") == 2


@pytest.mark.parametrize("what", ["backbone", "step"])
def test_peaks_of_memory_are_measured(world, what):
    assert lab.measure_peak(load_config(world[0], world[1:]), 2, what) >= 0  # other tests may have needed more


def test_evaluation_is_measured():
    assert lab.measure_evaluation(frames=20)["evaluation_20_frames_s"] > 0


def test_reading_is_measured_on_invented_frames(tmp_path):
    lab.invent(tmp_path / "a.jsonl", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        numbers = lab.start_reading(tmp_path / "a.jsonl", threading.Barrier(1), steps=2, batch=2)
    for name in ("open_s", "priors_s", "start_to_first_batch_s", "samples_per_s"):
        assert numbers[name] > 0, name
    assert numbers["start_to_first_batch_s"] > numbers["priors_s"]


def test_the_table_of_growth_is_what_its_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/growth.md").read_text()
    code = page.split("```bash\npython - <<'EOF'\n")[1].split("EOF\n")[0]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    assert out.getvalue() in page
    assert out.getvalue().count("\n") == 6
