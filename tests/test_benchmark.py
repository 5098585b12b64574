"""The benchmark runs, counts what it says it counts, and measures the config's own optimizer."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, tiny

from config import load_config
from tools.benchmark import (
    Count,
    Step,
    invent,
    kept_for_backward,
    main,
    make_batch,
    measure_parts,
    measure_variant,
    measure_variants,
    print_table,
    start_reading,
)

FP16 = "train.mixed_precision=fp16 needs a GPU: Accelerate would silently compute in fp32; bf16 works on a CPU"


def test_every_number_is_there(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [word for word in tiny(tiny_run[0], tmp_path / "out") if not word.startswith("data.workers")]
    arguments = [str(ROOT / "configs/synthetic.py"), *words, "--rounds", "2", "--json", str(tmp_path / "b.json")]
    assert main(arguments) == 0
    found, out = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    ratios = (
        "train_step_over_backbone",
        "predict_over_backbone_forward",
        "peak_memory_over_backbone",
        "loader_over_bare_decode",
    )
    for name in (
        *ratios,
        "cached_loader_over_loader",
        "evaluation_3769_frames_s",
        "optimizer_and_average_operator_calls",
    ):
        assert found[name] > 0, name
        assert name in out
    parts = sum(found[f"{name}_s"] for name in ("forward", "targets_losses", "backward"))
    assert found["optimizer_and_average_s"] > 0
    assert found["whole_step_s"] > parts / 2
    assert found["whole_step_over_backbone"] > found["train_step_over_backbone"] / 2  # two rounds on a busy machine
    assert 0 <= found["data_wait_share"] < 1
    assert found["host_syncs_per_step"] == 0
    assert set(found["targets_losses_ms"]) == set(found["operator_calls"]) == {"8", "30", "100"}
    assert len({*found["operator_calls"].values()}) == 1  # the work does not depend on the number of objects
    assert found["operator_calls_of_own_losses"]["8"] < found["operator_calls"]["8"]
    assert set(found["decode_nms_ms"]) == {"threshold", "900_candidates"}


def test_missing_data_is_said_and_the_rest_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.benchmark.measure_memory", lambda *_: {})
    monkeypatch.setattr("tools.benchmark.measure_head", lambda *_: {})
    words = [word for word in tiny(tmp_path, tmp_path / "out") if not word.startswith(("data.train", "data.val"))]
    assert main([str(ROOT / "configs/kitti.py"), *words, "--rounds", "1"]) == 0
    shown = capsys.readouterr()
    assert f"the loader is not measured: {tmp_path}: expected a KITTI folder" in shown.err
    assert "whole_step_over_backbone" in shown.out
    assert "data_wait_share" not in shown.out


@pytest.mark.parametrize(("words", "sentence"), [
    (["configs/none.py"], "configs/none.py: no such config file"), (["configs/kitti.py", "train.lrr=1"], "did you mean train.lr"),
    (["configs/synthetic.py", "train.optimizer=admw"], "'admw' is unknown to timm; near it: adamw"),
    (["configs/kitti.py", "--rounds", "0"], "--rounds 0: expected at least 1"),
    (["--data", "9", "--batch", "2"], "--batch does nothing with --data"),
    (["configs/kitti.py", "--peak-tflops", "9"], "--peak-tflops does nothing with a config alone"),
    (["configs/kitti.py", "--gpu"], "torch sees no CUDA GPU here"),
    (["configs/kitti.py", "--gpu", "--peak-tflops", "0"], "--peak-tflops 0.0: expected numbers above 0"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("optimizer", "kind", "waits"), [("adamw", torch.optim.AdamW, 0), ("sgd", torch.optim.SGD, 1)])
def test_the_config_s_own_optimizer_and_checkpointing_are_measured(tmp_path, optimizer, kind, waits):
    on = optimizer == "sgd"
    words = tiny(
        tmp_path,
        tmp_path / "out",
        f"train.optimizer={optimizer}",
        f"train.checkpoint_backbone={str(on).lower()}",
        "train.ema=0",
    )
    config, accelerator = (
        load_config(ROOT / "configs/kitti.py", [*words, "model.backbone=resnet10t"]),
        Accelerator(cpu=True),
    )
    step = Step(config, accelerator, make_batch(config, 2, 8, accelerator.device))
    assert isinstance(step.optimizer.optimizer, kind)
    assert step.average is None
    assert any(getattr(module, "grad_checkpointing", False) for module in step.net.backbone.modules()) == on
    before = [p.clone() for p in step.net.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.net.parameters(), strict=True))
    with Count() as count:
        step()
    assert count.waits == waits


def parts_of(tmp_path, images, *words):
    """A step of a tiny model with AdamW and an average, after its memory was measured, and what was found."""
    words = tiny(tmp_path, tmp_path / "out", "train.optimizer=adamw", *words)
    config, accelerator = load_config(ROOT / "configs/kitti.py", words), Accelerator(cpu=True)
    step = Step(config, accelerator, make_batch(config, images, 8, accelerator.device))
    return step, measure_parts(step)


def test_memory_by_module_adds_up(tmp_path, capsys):
    step, found = parts_of(tmp_path, 2)
    table, own = found["table"], sum(p.nbytes for p in step.net.parameters()) / 2**20
    buffers, count = sum(b.nbytes for b in step.net.buffers()) / 2**20, len([*step.net.parameters()])
    rows = ("backbone", "fpn", "towers", "predictors", "other", "losses")
    for kind, size in table["all"].items():
        assert size == pytest.approx(sum(table[row][kind] for row in rows)), kind
    assert table["all"]["parameters"] == table["all"]["gradients"] == own
    assert table["all"]["optimizer_state"] == 2 * own + 4 * count / 2**20  # and the number of steps of each
    assert table["all"]["buffers"] == buffers
    assert table["all"]["average"] == own + buffers
    assert table["backbone"]["parameters"] == sum(p.nbytes for p in step.net.backbone.parameters()) / 2**20
    assert found["after_backward_mib"] == pytest.approx(5 * own + 2 * buffers + 4 * count / 2**20)
    more = parts_of(tmp_path, 4)[1]["table"]
    assert table["predictors"]["activations"] == 0  # they keep what the towers keep, too
    for row in ("backbone", "fpn", "towers", "losses"):
        assert 0 < table[row]["activations"] < more[row]["activations"], row
    assert 1.9 < more["backbone"]["activations"] / table["backbone"]["activations"] < 2.1
    words = [
        str(ROOT / "configs/kitti.py"),
        *tiny(tmp_path, tmp_path / "out"),
        "--memory",
        "--json",
        str(tmp_path / "m.json"),
    ]
    assert main(words) == 0
    assert "before_backward_mib" in capsys.readouterr().out
    assert json.loads((tmp_path / "m.json").read_text())["table"]["all"]["activations"] == pytest.approx(
        table["all"]["activations"]
    )


def test_checkpointing_shows_in_the_memory(tmp_path):
    table = parts_of(tmp_path, 2)[1]["table"]
    fewer = parts_of(tmp_path, 2, "train.checkpoint_backbone=true", "train.ema=0")[1]["table"]
    assert 0 < fewer["backbone"]["activations"] < 0.8 * table["backbone"]["activations"]
    assert fewer["towers"] == {**table["towers"], "average": 0}
    assert fewer["all"]["average"] == 0


def test_a_storage_counts_once_and_parameters_do_not():
    class Cell:
        def __init__(self):
            self.net, self.batch = torch.nn.Module(), {"image": torch.ones(5)}
            self.net.backbone = torch.nn.Linear(5, 7)  # keeps its input, a part of the batch, and its weight

        def forward(self):
            self.x = self.net.backbone(self.batch["image"])

        def targets_losses(self):
            self.loss = (self.x.exp() * self.x[:3].sum()).sum()

    kept = kept_for_backward(Cell())
    assert kept == {"losses": 4 * (7 + 1)}  # exp keeps its output, and so does the product: once; and the sum


def test_variants_run_and_one_that_fails_is_told(tmp_path, capsys):
    config = load_config(ROOT / "configs/kitti.py", tiny(tmp_path, tmp_path / "out", "train.optimizer=adamw"))
    variants = [("fp16", False, False), ("bf16", False, True)]  # fp32 runs in the next test
    table = measure_variants(config, 2, 2, "cpu", peak_tflops=2.0, variants=variants)
    assert list(table) == ["fp16 eager", "bf16 eager channels_last"]
    assert table["fp16 eager"] == {"error": "ValueError: " + FP16}
    print_table(table)
    assert f"fp16 eager                ValueError: {FP16}\n" in capsys.readouterr().out
    row = table["bf16 eager channels_last"]
    assert row["images_per_s"] == pytest.approx(2e3 / row["step_ms"])
    assert row["gflop_per_image"] > 0.1
    assert row["tflop_per_s"] == pytest.approx(row["gflop_per_image"] * row["images_per_s"] / 1e3)
    assert row["mfu"] == row["tflop_per_s"] / 2
    assert [row[key] for key in ("peak_memory_mib", "host_syncs", "kernels")] == [None] * 3  # CUDA's


def test_a_step_compiles_as_the_loop_does(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function, fullgraph: called.append(function.__name__) or function)
    monkeypatch.setattr("torch.nn.Module.compile", lambda module, fullgraph: called.append(type(module).__name__))
    config, called = load_config(ROOT / "configs/kitti.py", tiny(tmp_path, tmp_path / "out")), []
    row = measure_variant(config, 1, 1, "cpu", None, "no", True, False)
    assert called == ["Detector", "assign", "compute_losses"]
    assert row["mfu"] is None
    assert (
        row["gflop_per_image"] == measure_variant(config, 2, 1, "cpu", None, "no", False, False)["gflop_per_image"] > 0
    )


def test_channels_last_reaches_weights_moments_and_average(tmp_path):
    config, accelerator = (
        load_config(ROOT / "configs/kitti.py", tiny(tmp_path, tmp_path / "out")),
        Accelerator(cpu=True),
    )
    step = Step(config, accelerator, make_batch(config, 1, 8, accelerator.device), torch.channels_last)
    step()
    for p, q in zip(step.net.parameters(), step.average.module.parameters(), strict=True):
        kernels = [x for x in (p, q, *step.optimizer.optimizer.state[p].values()) if x.ndim == 4]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_the_table_of_growth_is_what_its_command_prints():
    page = (ROOT / "docs/growth.md").read_text()
    code = page.split("```bash\npython - <<'EOF'\n")[1].split("EOF\n")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout in page
    assert done.stdout.count("\n") == 6


def test_waits_are_counted():
    x, on_host = torch.arange(3.0), torch.tensor(1.0)
    with Count([on_host]) as count:
        x + 1
        x[x > 1]
        x.sum().item()
        x.nonzero()
        on_host.item()
    assert count.waits == 3
    assert count.calls["add"] == 1


def test_reading_is_measured_on_invented_frames(tmp_path, capsys):
    invent(tmp_path / "a.jsonl", 40)
    found = start_reading(tmp_path / "a.jsonl", threading.Barrier(1), steps=2, batch=2)
    for name in ("open_s", "priors_s", "start_to_first_batch_s", "samples_per_s"):
        assert found[name] > 0, name
    assert found["start_to_first_batch_s"] > found["priors_s"]
    assert main(["--data", "0"]) == main([]) == main(["configs/kitti.py", "--data", "40"]) == 2
    assert "--data 0: expected at least 1" in (error := capsys.readouterr().err)
    assert error.count("expected a config or --data N, and not both") == 2
