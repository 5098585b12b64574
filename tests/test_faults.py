"""A run that cannot go on broken: kills, damaged checkpoints, non-finite steps, signals, ranks that fail, locks,
changed configs.

The real train.py runs here, mostly as a process of its own; tests/faulty.py puts the faults in.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, tiny
from safetensors.torch import load_file
from test_train import hashes, here, losses_of, records  # noqa: F401  `here` is a fixture
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from config import Config, changed_keys, override, read_config, to_dict
from engine import guard
from engine.checkpoint import (
    find_start,
    handle_state,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    remove_leftovers,
    weights_finite,
)
from engine.guard import Guard, Signals, Statistics, Stopped, lock_folder, start_accelerator
from engine.muon import Muon
from engine.optimizer import make_optimizer
from engine.tune import load_weights
from engine.weights import find_weights
from model import Detector, ModelConfig
from scene.frames import UserError

KILLS = int(os.environ.get("DEEP3D_KILLS", 1))  # of the torture test; 20 on request
slow = pytest.mark.skipif(
    not os.environ.get("DEEP3D_SLOW"), reason="much alike runs with it; DEEP3D_SLOW=1 runs this one too"
)
HARD = (
    "data.workers=2",
    "model.backbone=resnet10t",
    "model.drop_path=0.3",
    "train.accumulate=2",
    "train.batch_size=1",
    "train.save_every=1",
    "model.size=64,224",
)


def start(*arguments, processes=1, script="train.py"):
    """A training in the background, in a process group of its own; its output goes to OUT.out."""
    command, environment = command_line(*arguments, processes=processes, script=script)
    if processes == 1:
        command = [sys.executable, script, *map(str, arguments)]
    log = open(next(a for a in arguments if str(a).startswith("out=")).removeprefix("out=") + ".out", "w+")  # noqa: SIM115
    environment.update(DEEP3D_TEST=log.name, PET_SHUTDOWN_TIMEOUT="3")
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    process.log = log
    return process


def finish(process, timeout=60):
    """Its exit code and output, once it and everything it started have ended."""
    try:
        code = process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.log.seek(0)
    return code, process.log.read()


def wait_for_step(out, step, process, timeout=120):
    """Until the log of a run says that a step is done."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if (out / "log.jsonl").is_file() and any(r["step"] >= step for r in records(out)):
            return
        time.sleep(0.05)
    process.log.seek(0)
    raise AssertionError(f"step {step} was not reached: {process.log.read()}")


def ranks_of(process):
    """Process ids of the trainings that a launcher started, by rank, whoever their parent is by now."""
    found = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = dict(v.split(b"=", 1) for v in file.read().split(b"\0") if b"=" in v)
            if variables.get(b"DEEP3D_TEST") == process.log.name.encode() and b"RANK" in variables:
                found.setdefault(int(variables[b"RANK"]), pid)  # loader workers have higher ids
    return found


def training_state(out):
    newest = list_checkpoints(out / "checkpoints")[0]
    return newest.name, hashes(newest)


# ---- exact resume


@pytest.fixture(scope="module")
def hard_run(tiny_run, tmp_path_factory):
    """Two processes, accumulation, drop-path, augmentation, averages, warm-up: 6 steps without a stop."""
    out = tmp_path_factory.mktemp("hard") / "whole"
    both = forked.run(ROOT, "train.py", *tiny(tiny_run[0], out, *HARD, "data.workers=0"), processes=2)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr
    return out


def test_killed_at_any_moment_equals_never_stopped(tiny_run, hard_run, tmp_path):
    """SIGKILL to a whole job of two processes with workers, again and again, at random or in the middle of a save."""
    out, rng = tmp_path / "out", random.Random(time.time_ns())
    for number in range(KILLS):
        in_save, step = rng.random() < 0.5, 1 + number * 5 // max(1, KILLS - 1)
        fault = json.dumps(
            [{"what": "slow", "steps": []}, *[{"what": "kill in save", "steps": [step], "rank": 0}] * in_save]
        )
        process = start(fault, *tiny(tiny_run[0], out, *HARD), processes=2, script="tests/faulty.py")
        if not in_save:
            time.sleep(rng.uniform(4, 12))
            for pid in [process.pid, *ranks_of(process).values()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        finish(process)
    both = forked.run(ROOT, "train.py", *tiny(tiny_run[0], out, *HARD), processes=2)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr
    print(f"{KILLS} kills, {both[0].stdout.count('resumed from')} resumed, final state {training_state(out)}")
    assert training_state(out) == training_state(hard_run)
    assert not [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]
    steps = {r["step"]: {k: v for k, v in r.items() if k.startswith("loss")} for r in records(out)}
    assert [steps[i] for i in range(1, 7)] == [
        {k: v for k, v in r.items() if k.startswith("loss")} for r in records(hard_run)
    ]


def test_one_process_killed_in_a_save_equals_never_stopped(tiny_run, tmp_path, here):  # noqa: F811
    """Without workers; the third save leaves a half-written file behind."""
    out = tmp_path / "out"
    fault = json.dumps({"what": "kill in save", "steps": [6]})
    code, text = finish(start(fault, *tiny(tiny_run[0], out), script="tests/faulty.py"))
    assert code == -signal.SIGKILL, text
    assert [p.name for p in (out / "checkpoints").glob(".tmp_*")] == [".tmp_step_00000006"]
    code, text, err = here(*tiny(tiny_run[0], out))
    assert code == 0, err
    assert f"resumed from {out}/checkpoints/step_00000004" in text
    assert training_state(out) == training_state(tiny_run[1])


def test_another_number_of_processes_goes_on_with_the_same_order(tiny_run, hard_run, tmp_path, here, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(hard_run / "checkpoints/step_00000004", out / "checkpoints/step_00000004")
    seen = []
    normal = train.send_to_device
    monkeypatch.setattr(
        train, "send_to_device", lambda batch, *a, **k: seen.append(batch["index"].tolist()) or normal(batch, *a, **k)
    )
    code, text, err = here(*tiny(tiny_run[0], out, *HARD, "data.workers=0"))
    assert code == 0, err
    more = "images per process at once: 1 -> 2 (train.accumulate= parts them)"
    assert f"changed since the checkpoint: processes: 2 -> 1; {more}\n" in text
    assert "6 steps of 4 images" in text
    config = to_dict(override(Config(), ()))
    assert [r["lr"] for r in records(out)] == [r["lr"] for r in records(hard_run)[4:]]
    order = [data.StepBatches(8, 2, rank, 2, config["seed"], 0, 12) for rank in (0, 1)]
    assert [sorted(i) for i in seen] == [sorted(i for o in order for _, i in o.at(micro)) for micro in range(8, 12)]
    shutil.rmtree(out / "checkpoints/step_00000006")
    code, text, err = here(*tiny(tiny_run[0], out, *HARD, "data.workers=0"))  # now from a checkpoint of one process
    assert code == 0, err
    assert f"resumed from {out}/checkpoints/step_00000005\n" in text
    assert "changed since" not in text
    assert "6 steps of 4 images" in text
    shutil.rmtree(out)
    shutil.copytree(hard_run / "checkpoints/step_00000004", out / "checkpoints/step_00000004")
    code, text, err = here(*tiny(tiny_run[0], out, *HARD, "data.workers=0", "train.accumulate=3"))
    assert code == 0, err
    changes = "train.accumulate: 2 -> 3; processes: 2 -> 1; images a step: 4 -> 3"  # of one image at once, as asked for
    assert changes in text
    assert "at once" not in text


def test_processes_that_do_not_divide_the_batch_are_refused(hard_run):
    config, accelerator = read_config(hard_run / "config.json"), SimpleNamespace(num_processes=3, is_main_process=True)
    with pytest.raises(UserError, match=r"global batch of 4 does not divide over 3 processes with train\.accumulate=2"):
        find_start(config, SimpleNamespace(digest=str), accelerator)


def test_other_weights_to_learn_are_one_sentence(hard_run, tiny_run, tmp_path, here):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(hard_run / "checkpoints/step_00000004", out / "checkpoints/step_00000004")
    code, _, err = here(*tiny(tiny_run[0], out, *HARD, "data.workers=0", "train.freeze=backbone"))
    assert code == 2
    assert re.search(r"cannot resume .*; train.freeze, backbone_lr and .*: load_from= takes weights alone", err)


# ---- checkpoints


class Payload:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.system, (f"touch '{self.trace}'",))


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit flipped": flip,
    "last bit flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "deleted": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model_1.safetensors", "optimizer.bin", "config.json", "meta.json"]
)
def test_a_damaged_file_is_noticed_and_named(tiny_run, tmp_path, name, damage):
    """Of meta.json, which holds the digests, it may be that of a file that no longer fits."""
    folder = tmp_path / "step_00000002"
    shutil.copytree(tiny_run[1] / "checkpoints/step_00000002", folder)
    read_checkpoint(folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if DAMAGE[damage]:
        (folder / name).write_bytes(DAMAGE[damage](content))
    named = r"\S+" if (name, damage) == ("meta.json", "one bit flipped") else re.escape(name)
    with pytest.raises(
        ValueError, match=rf"step_00000002: cannot resume from this checkpoint: {named} is (damaged|missing)"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model_1.safetensors", "optimizer.bin", "scaler.pt", "meta.json", "random_states_0.pkl"],
)
def test_a_strangers_pickle_is_never_run(tiny_run, tmp_path, name):
    """Even with digests that fit, in every file that there is, or that Accelerate would look for."""
    folder, trace = tmp_path / "step_00000002", tmp_path / "was_here"
    shutil.copytree(tiny_run[1] / "checkpoints/step_00000002", folder)
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()  # the trap works
    trace.unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(trace)))
    if name == "meta.json":
        with pytest.raises(ValueError, match=r"meta\.json is damaged"):
            read_checkpoint(folder)
        return
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    read_checkpoint(folder)
    accelerator = start_accelerator(Config().train)
    config = json.loads((folder / "config.json").read_text())
    net, average = Detector(ModelConfig(**config["model"])), Detector(ModelConfig(**config["model"]))
    _, optimizer = accelerator.prepare(net, make_optimizer(net, override(Config(), ["train.optimizer=muon"]).train))
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as with fp16: Accelerate then reads scaler.pt too
    handle_state(accelerator, (average, net))
    if name == "random_states_0.pkl":
        torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
        load_checkpoint(accelerator, folder, optimizer)  # is not needed, and not taken
    else:
        with pytest.raises(ValueError, match="step_00000002: cannot resume from this checkpoint"):
            load_checkpoint(accelerator, folder, optimizer)
    if name.startswith("model"):
        with pytest.raises(ValueError, match=r"not a readable safetensors file|none of its"):
            load_weights(net, folder / name)
    assert not trace.exists()


@pytest.mark.parametrize(
    "what", ["a pipe", "a list", "nested", "a number as text", "no processes", "an unlisted file", "huge"]
)
def test_what_no_run_has_written_is_refused_in_one_sentence(tiny_run, tmp_path, what):
    folder = tmp_path / "step_00000002"
    shutil.copytree(tiny_run[1] / "checkpoints/step_00000002", folder)
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    if what == "a pipe":
        (folder / "model.safetensors").unlink()
        os.mkfifo(folder / "model.safetensors")
        with pytest.raises(ValueError, match="no weights there"):
            find_weights(folder)
    elif what == "an unlisted file":
        os.mkfifo(folder / "scaler.pt")
    else:
        texts = {"a list": "[]", "nested": "[" * 100_000, "huge": " " * 2_000_000 + path.read_text()}
        texts |= {
            "a number as text": json.dumps({**meta, "step": "2"}),
            "no processes": json.dumps({**meta, "processes": 0}),
        }
        path.write_text(texts[what])
    with pytest.raises(ValueError, match="step_00000002: cannot resume from this checkpoint: ") as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_start_from_elsewhere_goes_on_from_its_own_checkpoints(tiny_run, tmp_path, here):  # noqa: F811
    out, elsewhere = tmp_path / "out", tiny_run[1] / "checkpoints/step_00000002"
    code, text, err = here(*tiny(tiny_run[0], out), f"resume={elsewhere}")
    assert code == 0, err
    assert f"resumed from {elsewhere}" in text
    assert training_state(out) == training_state(tiny_run[1])
    code, text, err = here(*tiny(tiny_run[0], out), f"resume={elsewhere}")
    assert code == 0, err
    assert f"resumed from {out}/checkpoints/step_00000006" in text


def test_a_damaged_checkpoint_is_passed_over_and_the_last_one_refused(tiny_run, tmp_path, here):  # noqa: F811
    world, whole, _ = tiny_run
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoints", out / "checkpoints")
    for step in (4, 6):
        path = out / f"checkpoints/step_0000000{step}/model.safetensors"
        path.write_bytes(flip(path.read_bytes()))
    code, text, err = here(*tiny(world, out))
    assert code == 0, err
    for step in (4, 6):
        assert (
            f"step_0000000{step}: cannot resume from this checkpoint: model.safetensors is damaged; passing it over"
            in text
        )
    assert f"resumed from {out}/checkpoints/step_00000002" in text
    assert training_state(out) == training_state(whole)
    assert {path.name for path in (out / "checkpoints").glob("damaged_*")} == {
        "damaged_step_00000004",
        "damaged_step_00000006",
    }  # else train.keep would count them
    for folder in list_checkpoints(out / "checkpoints"):
        (folder / "meta.json").unlink()
    code, _, err = here(*tiny(world, out))
    assert code == 2
    assert re.search(r"meta\.json is missing; nothing older is left \(delete .*checkpoints to start anew\)", err)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tiny_run, tmp_path):
    """On a file system of 3 MB, in a mount namespace of its own."""
    out = tmp_path / "small"
    out.mkdir()
    arguments = tiny(tiny_run[0], out / "run", "train.save_every=1", "train.keep=9")
    inside = (
        f"mount -t tmpfs -o size=3m tmpfs {out} && {sys.executable} train.py {shlex.join(arguments)}; code=$?; "
        + (f"cp -r {out}/run/checkpoints {tmp_path}/seen; exit $code")
    )
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", out], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")
    finished = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 2, finished.stdout + finished.stderr
    sentences = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert re.search(
        r"cannot write the checkpoint of step \d: .*No space left.*; the older ones are whole", sentences[0]
    )
    left = list_checkpoints(tmp_path / "seen")
    assert len(left) >= 1
    for folder in left:
        read_checkpoint(folder)


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path):
    """A kill between the two renames that put new weights in the place of old ones."""
    for name in (".old_best", ".tmp_best", ".old_step_00000002", "step_00000002", ".del_step_00000001", ".tmp_mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    remove_leftovers(tmp_path, "step_*")
    remove_leftovers(tmp_path, "best")
    left = {p.name: (p / "which").read_text() for p in tmp_path.iterdir()}
    assert left == {"best": ".old_best", "step_00000002": "step_00000002", ".tmp_mine": ".tmp_mine"}


def test_moments_of_another_shape_are_refused(tiny_run, tmp_path):
    """Fused kernels would read and write beyond them."""
    folder = tmp_path / "step_00000002"
    shutil.copytree(tiny_run[1] / "checkpoints/step_00000002", folder)
    content = torch.load(folder / "optimizer.bin", weights_only=True)
    state = next(s for s in content["state"].values() if "exp_avg" in s)
    state["exp_avg"] = torch.zeros(())
    torch.save(content, folder / "optimizer.bin")
    config = json.loads((folder / "config.json").read_text())
    accelerator = start_accelerator(Config().train)
    net, average = Detector(ModelConfig(**config["model"])), Detector(ModelConfig(**config["model"]))
    _, optimizer = accelerator.prepare(net, make_optimizer(net, override(Config(), ["train.optimizer=muon"]).train))
    handle_state(accelerator, (average, net))
    with pytest.raises(ValueError, match="another shape"):
        load_checkpoint(accelerator, folder, optimizer)


def test_weights_that_are_not_finite_are_not_saved(tiny_run, tmp_path, here):  # noqa: F811
    code, _, err = here(
        *tiny(tiny_run[0], tmp_path / "out", "train.optimizer=adamw", "train.lr=1e38", "train.warmup=0")
    )
    assert code == 2, err
    assert re.search(r"error: .*(weights not finite after step|had no finite gradient)", err)
    assert all(weights_are_finite(folder) for folder in list_checkpoints(tmp_path / "out/checkpoints"))


def weights_are_finite(folder):
    tensors = [*load_file(folder / "model.safetensors").values(), *load_file(folder / "model_1.safetensors").values()]
    return all(torch.isfinite(t).all() for t in tensors if t.is_floating_point())


# ---- steps that are not finite


def test_a_nan_loss_on_one_process_is_skipped_and_at_last_ends_both(tiny_run, tmp_path):
    fault = json.dumps([{"what": "gradient", "steps": [2], "rank": 1}, {"what": "loss", "steps": [4, 5], "rank": 1}])
    out = tmp_path / "out"
    process = start(fault, *tiny(tiny_run[0], out, "train.max_bad_steps=2"), processes=2, script="tests/faulty.py")
    wait_for_step(out, 3, process)
    began = time.monotonic()
    code, text = finish(process)
    assert code != 0
    assert time.monotonic() - began < 20
    ids = {p.stem for p in tiny_run[0].glob("*/training/label_2/*.txt")}
    for step in (2, 4, 5):
        [line] = [line for line in text.splitlines() if f"step {step} skipped" in line]
        what = "gradient nan" if step == 2 else "loss_size nan, gradient nan"
        named = re.search(rf"its gradient is not finite; process 1: {what}; frames (\S+) (\S+)$", line)
        assert named, line
        assert {*named.groups()} <= ids
    sentence = "2 steps in a row had no finite gradient, up to step 5"
    assert text.count(f"error: {sentence}") == 2  # both processes
    assert sentence in text[text.rindex("Root Cause") :]
    assert [r["step"] for r in records(out)] == [1, 3]
    assert all(weights_are_finite(folder) for folder in list_checkpoints(out / "checkpoints"))


def test_a_save_on_which_one_process_has_other_statistics_ends_all(tiny_run, tmp_path):
    """Those of its own BatchNorms are not finite, which the mean of the gradients does not show."""
    fault = json.dumps({"what": "statistics", "steps": [2], "rank": 1})
    out = tmp_path / "out"
    process = start(fault, *tiny(tiny_run[0], out), processes=2, script="tests/faulty.py")
    wait_for_step(out, 1, process)
    began = time.monotonic()
    code, text = finish(process)
    assert code != 0
    assert time.monotonic() - began < 20
    assert text.count("error: weights not finite after step 2 are not saved") == 2
    assert not list_checkpoints(out / "checkpoints")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        pytest.param("gradient", "gradient nan", marks=slow),
        ("camera", "loss_"),
        pytest.param("label", "loss_", marks=slow),
        ("loss", "loss_size nan, gradient nan"),
    ],
)
def test_too_many_bad_steps_end_the_run(tiny_run, tmp_path, what, words):
    out = tmp_path / "out"
    fault = json.dumps({"what": what, "steps": [3, 4, 5, 6]})
    arguments = tiny(tiny_run[0], out, "train.max_bad_steps=3", "train.log_every=50")
    command = [sys.executable, "tests/faulty.py", fault, *arguments]
    finished = subprocess.run(command, cwd=ROOT, env=command_line()[1], capture_output=True, text=True, timeout=100)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("error: 3 steps in a row had no finite gradient, up to step 5")
    skipped = [
        line for line in finished.stdout.splitlines() if "skipped, its gradient is not finite; process 0: " in line
    ]
    assert [re.search(r"step (\d+)", line)[1] for line in skipped] == ["3", "4", "5"]
    assert all(words in line and len(line.partition("frames ")[2].split()) == 2 for line in skipped)
    assert all(weights_are_finite(folder) for folder in list_checkpoints(out / "checkpoints"))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adamax(p, lr=0.1),
        lambda p: Muon(p, lr=0.1),
    ],
    ids=["fused AdamW", "SGD", "Adamax", "Muon"],
)
def test_a_broken_step_leaves_weights_moments_and_count(make):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)
    before = model.weight.detach().clone()
    optimizer = make(model.parameters())
    watch = make_guard(model, optimizer)
    states = []
    for broken in (True, False, True, True, False):
        watch.watch({}, model(torch.ones(1, 5) * (math.nan if broken else 1.0)).sum()).backward()
        watch.judge(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        moments = [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        states.append([p.detach().clone() for p in model.parameters()] + moments)
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[3], strict=True))
    assert len({tuple(states[i][0].flatten().tolist()) for i in (0, 1, 4)}) == 3
    assert torch.equal(states[0][0], before)
    assert all(torch.isfinite(t).all() for t in states[4])


def test_running_statistics_of_a_broken_step_are_undone():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    statistics = Statistics(model)
    model(torch.randn(2, 3, 4, 4))
    statistics.update(torch.tensor(True))
    kept = {name: b.clone() for name, b in model.named_buffers()}
    model(torch.full((2, 3, 4, 4), math.nan))
    assert not weights_finite([model])
    statistics.update(torch.tensor(False))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            assert torch.equal(buffer, kept[name])
    assert weights_finite([model])
    assert Statistics(torch.nn.Linear(2, 2)).update(torch.tensor(False)) is None


class Held:
    """As much of an accelerator as `Guard` needs; its processes are this one."""

    scaler, is_main_process, num_processes = None, True, 1

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.trigger = False

    def reduce(self, value, _):
        return value

    def set_trigger(self):
        self.trigger = True

    def check_trigger(self):
        return self.trigger


def make_guard(net, optimizer, max_bad_steps=3, accelerator=None):
    optimizer.optimizer = optimizer  # as Accelerate wraps it
    return Guard(
        accelerator or Held(), net, optimizer, override(Config(), [f"train.max_bad_steps={max_bad_steps}"]).train
    )


def guarded_step(watch, net, done, spoil=1.0, received=""):
    loss = net(torch.ones(1, 2)).sum() * spoil
    watch.watch({"loss_a": loss}, loss).backward()
    watch.judge(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0))
    watch.optimizer.step()
    net.zero_grad()
    return watch.verdict(done, received)


def test_a_loss_that_is_not_finite_spoils_every_gradient():
    net = torch.nn.Linear(2, 2)
    watch = make_guard(net, torch.optim.AdamW(net.parameters(), fused=True))
    for value in (math.inf, math.nan):
        loss = net(torch.ones(1, 2)).sum() + value
        watch.watch({}, loss).backward()
        assert all(torch.isnan(p.grad).any() for p in net.parameters())
        net.zero_grad()
    loss = net(torch.ones(1, 2)).sum()
    assert watch.watch({}, loss) == loss


@pytest.mark.parametrize("look", [1, 8])
def test_the_verdict_comes_at_the_next_look(look, monkeypatch):
    """On a GPU every eighth step; three bad steps in a row count then, whatever came behind them."""
    monkeypatch.setattr(guard, "LOOK", {"cpu": look})
    net = torch.nn.Linear(2, 2)
    watch = make_guard(net, torch.optim.AdamW(net.parameters(), fused=True))
    verdicts = [guarded_step(watch, net, done, math.nan if 3 <= done <= 5 else 1.0) for done in range(1, 9)]
    assert verdicts == [""] * 4 + ["broken"] * 4 if look == 1 else [""] * 7 + ["broken"]
    watch = make_guard(net, torch.optim.AdamW(net.parameters(), fused=True))
    verdicts = [guarded_step(watch, net, done, received="SIGTERM" if done >= 2 else "") for done in range(1, 9)]
    assert verdicts == [""] + ["stop"] * 7 if look == 1 else [""] * 7 + ["stop"]


def test_overflows_of_fp16_at_the_start_are_no_bad_steps():
    net, held = torch.nn.Linear(2, 2), Held()
    held.scaler = object()
    watch = make_guard(net, torch.optim.AdamW(net.parameters(), fused=True), accelerator=held)
    verdicts = []
    for done in range(1, 46):
        watch.watch({}, net(torch.ones(1, 2)).sum())
        watch.judge(torch.tensor(math.inf))
        verdicts.append(watch.verdict(done, ""))
    assert verdicts == [""] * 39 + ["broken"] * 6


class CountSyncs(TorchDispatchMode):
    """Counts operators whose result the host must wait for on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found, self.marks = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        boolean_index = name in ("index", "index_put_") and any(
            getattr(i, "dtype", None) == torch.bool for i in args[1]
        )
        if name in self.WAITING or boolean_index:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_good_step_never_waits_for_the_device(tiny_run, tmp_path, here, monkeypatch):  # noqa: F811
    """Between two log lines no operator of the step makes the host wait; the counter itself is shown to see one that
    does."""
    counter = CountSyncs()
    normal = Guard.verdict

    def mark(watch, *rest):
        counter.marks.append(list(counter.found))
        return normal(watch, *rest)

    monkeypatch.setattr(Guard, "verdict", mark)
    monkeypatch.setattr(guard, "LOOK", {"cpu": 100})  # as on a GPU, where it looks at every eighth step
    every = [f"loss.{f.name}=0.5" for f in dataclasses.fields(train.compute_losses.__globals__["LossConfig"])]
    with counter:
        quiet = ("model.predict_yaw=true", "train.log_every=100", "train.save_every=100")
        code, _, err = here(*tiny(tiny_run[0], tmp_path / "out", *every, *quiet))
        torch.ones(2).sum().item()
    assert code == 0, err
    assert len(counter.marks) == 6
    assert counter.found[-1] == "_local_scalar_dense"
    waits = [b[len(a) :] for a, b in zip(counter.marks[1:], counter.marks[2:], strict=False)]
    assert waits == [[]] * 4


# ---- signals


def goes_on_to_the_same_end(tiny_run, out):
    """Run the same command again and compare with the run that was never stopped."""
    finished = subprocess.run(
        [sys.executable, "train.py", *tiny(tiny_run[0], out)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert finished.returncode == 0, finished.stderr
    assert (out / "DONE").exists()
    assert training_state(out) == training_state(tiny_run[1])


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=slow), "SIGINT"])
def test_a_signal_saves_after_the_step_and_the_same_command_goes_on(tiny_run, tmp_path, here, name):  # noqa: F811
    """The whole process group is signalled, workers included, as Slurm and a terminal do."""
    out = tmp_path / "out"
    process = start(
        json.dumps({"what": "slow", "steps": []}), *tiny(tiny_run[0], out, "data.workers=2"), script="tests/faulty.py"
    )
    wait_for_step(out, 1, process)
    os.killpg(process.pid, getattr(signal, name))
    code, text = finish(process)
    assert code == 0, text
    assert f"stopped by {name}; the same command goes on" in text
    assert not (out / "DONE").exists()
    assert (out / "STOPPED").exists()
    newest = list_checkpoints(out / "checkpoints")[0]
    assert read_checkpoint(newest)[0].step == max(r["step"] for r in records(out))
    code, text, err = here(*tiny(tiny_run[0], out))
    assert code == 0, err
    assert f"resumed from {newest}" in text
    assert training_state(out) == training_state(tiny_run[1])


def test_ctrl_c_twice_stops_at_once(tiny_run, tmp_path):
    out = tmp_path / "out"
    process = start(json.dumps({"what": "hang", "steps": [3]}), *tiny(tiny_run[0], out), script="tests/faulty.py")
    wait_for_step(out, 2, process)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None  # it waits for the step
    os.kill(process.pid, signal.SIGINT)
    code, text = finish(process, timeout=30)
    assert code == 130
    assert text.splitlines()[-1] == "interrupted; the same command goes on from the newest checkpoint"


@pytest.mark.parametrize("what", [pytest.param("signal in save", marks=slow), "signal in evaluation"])
def test_a_signal_while_saving_or_evaluating(tiny_run, tmp_path, here, what):  # noqa: F811
    out = tmp_path / "out"
    arguments = tiny(tiny_run[0], out, "train.batch_size=2", "train.eval_every=0.5")  # after steps 2, 4 and 6
    process = start(json.dumps({"what": what, "steps": [4]}), *arguments, script="tests/faulty.py")
    code, text = finish(process)
    assert code == 0, text
    assert "stopped by SIGTERM; the same command goes on" in text
    newest = list_checkpoints(out / "checkpoints")[0]
    assert newest.name == "step_00000004"
    assert not (newest / "metrics.json").exists()
    assert [r["step"] for r in records(out, "val")] == [2]
    code, _, err = here(*arguments)
    assert code == 0, err
    assert [r["step"] for r in records(out, "val")] == [2, 4, 6]
    assert (list_checkpoints(out / "checkpoints")[0] / "metrics.json").exists()
    assert training_state(out) == training_state(tiny_run[1])


def test_a_signal_to_one_process_that_evaluates_ends_all(tiny_run, tmp_path, here):  # noqa: F811
    """Also one that is busy for long, and would only then wait for it."""
    out = tmp_path / "out"
    faults = [{"what": "signal in evaluation", "steps": [4], "rank": 1}]
    faults.append({"what": "hang in evaluation", "steps": [4], "rank": 0})
    arguments = tiny(tiny_run[0], out, "train.eval_every=0.5", "data.workers=0")
    process = start(json.dumps(faults), *arguments, processes=2, script="tests/faulty.py")
    wait_for_step(out, 4, process)
    began = time.monotonic()
    finish(process, timeout=30)
    assert time.monotonic() - began < 10
    assert (out / "STOPPED").exists()
    assert list_checkpoints(out / "checkpoints")[0].name == "step_00000004"
    assert not (out / "DONE").exists()


@pytest.mark.parametrize(
    ("whom", "name"),
    [
        ("rank 1", "SIGUSR1"),
        pytest.param("launcher", "SIGTERM", marks=slow),
        ("launcher", "SIGUSR1"),
    ],
)
def test_two_processes_stop_at_the_same_step(tiny_run, tmp_path, whom, name):
    """Also SIGUSR1 to a launcher, which dies of it and would leave its processes orphaned."""
    out = tmp_path / "out"
    process = start(
        json.dumps({"what": "slow", "steps": []}), *tiny(tiny_run[0], out), processes=2, script="tests/faulty.py"
    )
    wait_for_step(out, 1, process)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1] if whom == "rank 1" else process.pid, getattr(signal, name))
    code = process.wait(60)
    end = time.monotonic() + 30
    while ranks_of(process) and time.monotonic() < end:
        time.sleep(0.1)
    assert not ranks_of(process)  # nobody is left behind
    _, text = finish(process)
    assert code == 0 or whom == "launcher", text  # launchers hide the exit codes of their processes: look at DONE
    assert re.search(
        r"stopped by (SIG\w+|a signal to another process|the end of the launcher); the same command goes on",
        text,
    ), text
    assert not (out / "DONE").exists()
    newest = list_checkpoints(out / "checkpoints")[0]
    assert read_checkpoint(newest)[0].step == max(r["step"] for r in records(out))


def test_signals_wait_for_a_step_and_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.defer()
        assert signals.received == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGUSR1"
        with pytest.raises(Stopped):
            signals.deliver()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("name", "error"), [("SIGTERM", Stopped), ("SIGUSR1", Stopped), ("SIGINT", KeyboardInterrupt)])
def test_a_signal_outside_of_steps_ends_at_once(name, error):
    with Signals(), pytest.raises(error):
        os.kill(os.getpid(), getattr(signal, name))


def test_another_thread_trains_without_signals():
    """Python lets the main thread alone set handlers."""
    errors = []

    def use():
        try:
            with Signals() as signals:
                signals.defer()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not errors


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_while_the_world_is_rendered(tmp_path, name, code):
    """Before there is anything to save; Ctrl-C is no orderly end."""
    out = tmp_path / "out"
    process = start(*tiny(tmp_path / "world", out, 'data.train=[{"kind": "synthetic", "world_frames": 4000}]'))
    end = time.monotonic() + 60
    while not (tmp_path / "world").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    began = time.monotonic()
    os.killpg(process.pid, getattr(signal, name))
    assert finish(process)[0] == code
    assert time.monotonic() - began < 10
    assert (out / "STOPPED").exists() == (name == "SIGTERM")


# ---- processes


@pytest.mark.parametrize("what", ["raise", pytest.param("kill", marks=slow)])
def test_one_process_that_fails_ends_the_job(tiny_run, tmp_path, what):
    """Until then it has no object in any of its batches, which holds nobody up."""
    out = tmp_path / "out"
    fault = json.dumps([{"what": what, "steps": [3], "rank": 1}, {"what": "empty", "steps": [1, 2], "rank": 1}])
    process = start(fault, *tiny(tiny_run[0], out), processes=2, script="tests/faulty.py")
    wait_for_step(out, 2, process)
    began = time.monotonic()
    code, text = finish(process, timeout=30)
    assert code != 0
    assert time.monotonic() - began < 15
    last = text[text.rindex("Root Cause") :]
    assert "rank      : 1" in last
    if what == "raise":
        assert "ValueError: a label that nobody expected" in last  # a mistake in code: with file and line
        assert "in lr_at" in text
    else:
        assert "SIGKILL" in last
    assert list_checkpoints(out / "checkpoints")[0].name == "step_00000002"


@slow
def test_a_process_that_hangs_ends_the_job_after_the_timeout(tiny_run, tmp_path):
    fault = json.dumps({"what": "hang", "steps": [2], "rank": 1})
    out = tmp_path / "out"
    process = start(fault, *tiny(tiny_run[0], out, "train.timeout=0.1"), processes=2, script="tests/faulty.py")
    wait_for_step(out, 1, process)
    code, text = finish(process, timeout=50)
    assert code != 0
    assert "rank      : " in text[text.rindex("Root Cause") :]


@slow
def test_a_process_without_objects_holds_nobody_up(tiny_run, tmp_path):
    fault = json.dumps({"what": "empty", "steps": [1, 2, 3, 4, 5], "rank": 1})
    out = tmp_path / "out"
    both = forked.run(ROOT, "tests/faulty.py", fault, *tiny(tiny_run[0], out), processes=2)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr
    assert [r["step"] for r in records(out)] == [1, 2, 3, 4, 5, 6]


# ---- repeated use


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tiny_run, tmp_path, here):  # noqa: F811
    out = tmp_path / "out"
    process = start(
        json.dumps({"what": "hang", "steps": [2]}), *tiny(tiny_run[0], out, "data.workers=2"), script="tests/faulty.py"
    )
    wait_for_step(out, 1, process)
    code, _, err = here(*tiny(tiny_run[0], out))
    assert code == 2
    assert re.match(
        rf"error: {out} is being written by process {process.pid} on \S+ since .*; stop it or choose another out= ", err
    )
    os.kill(process.pid, signal.SIGKILL)  # its workers are still there for a moment
    process.wait()
    with lock_folder(out):
        pass
    finish(process)


def test_changed_keys_are_all_but_where_a_run_lies():
    config = Config()
    old = to_dict(config)
    assert changed_keys(old, old) == []
    new = to_dict(override(config, ["train.lr=2", "out=x", "resume=none", "data.workers=9"]))
    assert changed_keys(old, new) == ["data.workers: 2 -> 9", "train.lr: 0.001 -> 2.0"]
    assert changed_keys({k: v for k, v in old.items() if k != "seed"}, old) == ["seed: null -> 0"]


def test_losses_of_resumed_runs_are_compared_at_all(tiny_run):
    assert len(losses_of(tiny_run[1])) == 6
    assert np.isfinite([row["loss"] for row in losses_of(tiny_run[1])]).all()
