"""The training command: what a run leaves behind, exact resume, processes, accumulation, and mistakes in one
sentence."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, tiny
from safetensors.torch import load_file
from timm.optim import muon

import train
from config import Config, TrainConfig, read_config
from data import DataConfig, Detection3D, Source, StepBatches, build_dataset, seed_of
from engine import log
from engine.checkpoint import Progress, read_best
from engine.log import Log, crosses, place_in_epoch
from engine.muon import Muon, count_blocks, is_matrix, orthogonalise
from engine.optimizer import lr_at, make_optimizer
from formats.kitti import read_split
from losses import LossConfig
from model import Detector, ModelConfig
from scene.frames import Frame, UserError, make_labels

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - INFO - Epoch \[(\d+)\]\[(\d+)/(\d+)\]  lr: \d\.\d{5}, eta: \d+:\d\d:\d\d, "
    r"time: \d+\.\d{3}, data_time: \d+\.\d{3}, memory: \d+, (loss_\w+: -?\d+\.\d{4}, )+loss: -?\d+\.\d{4}$"
)


def records(out, mode="train"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["mode"] == mode]


def losses_of(out):
    return [{k: v for k, v in r.items() if k.startswith("loss") or k == "grad_norm"} for r in records(out)]


def hashes(folder):
    """Of all weights and moments: their content, since a pickle of equal numbers may have other bytes."""
    found = {}
    for name in ("model.safetensors", "model_1.safetensors"):
        if (folder / name).exists():
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    values = [
        (i, name, value.tolist() if torch.is_tensor(value) else value)
        for i in state
        for name, value in sorted(state[i].items())
    ]
    return {**found, "optimizer": hashlib.sha256(repr(values).encode()).hexdigest()}


@pytest.fixture
def here(capfd):
    """Runs train.py's command line in this process. Returns (exit code, stdout, stderr)."""

    def run(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        code, threads = 0, torch.get_num_threads()
        try:
            train.main([str(a) for a in arguments])
        except SystemExit as error:
            code = error.code
        torch.set_num_threads(threads)
        out, err = capfd.readouterr()
        return code, out, err

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_run_leaves_what_it_should(tiny_run):
    _, out, finished = tiny_run
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "DONE",
        "best",
        "checkpoints",
        "config.json",
        "log.jsonl",
        "predictions.png",
        "train.log",
        "training.png",
    ]
    best = ["README.md", "config.json", "meta.json", "metrics.json", "model.safetensors"]
    assert sorted(p.name for p in (out / "best").iterdir()) == best
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [f"step_0000000{i}" for i in (2, 4, 6)]
    for folder in (out / "checkpoints").iterdir():
        found = sorted(p.name for p in folder.iterdir() if p.name != "metrics.json")
        assert found == ["config.json", "meta.json", "model.safetensors", "model_1.safetensors", "optimizer.bin"]
    assert json.loads((out / "checkpoints/step_00000006/metrics.json").read_text())["counted"]["Car"]["hard"] > 0
    text = finished.stdout
    assert "1 process(es) on cpu" in text
    assert "6 steps of 2 images, 4 an epoch" in text
    for words in (
        "Car",
        "Pedestrian",
        "Cyclist",
        "easy",
        "moderate",
        "hard",
        str(out / "predictions.png"),
        f"evaluate.py {out}",
    ):
        assert words in text
    assert "Traceback" not in finished.stderr


def test_log_lines_have_the_agreed_form(tiny_run):
    _, out, finished = tiny_run
    lines = [line for line in (out / "train.log").read_text().splitlines() if "Epoch [" in line]
    assert len(lines) == 6
    matches = [LINE.match(line) for line in lines]
    assert all(matches), lines
    assert [m.groups()[:3] for m in matches] == [("1", str(i), "4") for i in (1, 2, 3, 4)] + [
        ("2", "1", "4"),
        ("2", "2", "4"),
    ]
    assert all(line in finished.stdout for line in lines)


def test_log_records_have_the_agreed_keys(tiny_run):
    _, out, _ = tiny_run
    config = read_config(out / "config.json")
    on = {name for name, weight in dataclasses.asdict(config.loss).items() if weight} - {
        "loss_velocity",
        "loss_attribute",
    }  # no such outputs
    rows = records(out)
    assert len(rows) == 6
    for i, row in enumerate(rows):
        assert (
            set(row) == {"mode", "epoch", "iter", "step", "lr", "memory", "data_time", "time", "loss", "grad_norm"} | on
        )
        assert (row["epoch"], row["iter"], row["step"]) == (i // 4 + 1, i % 4 + 1, i + 1)
        assert row["lr"] == pytest.approx(lr_at(i, 6, config.train))
        assert 0 <= row["data_time"] <= row["time"]
        assert row["memory"] > 100
        assert row["loss"] == pytest.approx(sum(getattr(config.loss, name) * row[name] for name in on), rel=1e-4)
    [val] = records(out, "val")
    assert math.isfinite(val[config.best])


@pytest.mark.parametrize("best", ["mean/3d/moderate/AP_R40", "NDS", "-mATE"])
def test_mmdetection_reads_the_log(tiny_run, best):
    """Its analyze_logs.py, 3.3.0, leaves out what stands behind the first key with a "/", and draws a column of an
    epoch over the column `step`: both have to be as long."""
    writer, lines = object.__new__(Log), records(tiny_run[1])
    writer.config, writer.out, writer.steps_per_epoch = Config(best=best), tiny_run[1], 4
    writer.record = lambda record, *_: lines.append(record)
    writer.write_evaluation(8, 0.5, 0.5, {})
    columns, epoch = {}, 1
    for line in lines:
        behind = False
        for key, value in json.loads(json.dumps(line)).items():
            behind |= "/" in key
            if "/" in key or not behind:
                columns.setdefault(epoch, {}).setdefault(key.split("/")[-1], []).append(value)
        epoch = line["epoch"]
    assert columns[2].pop(best.split("/")[-1]) == [0.5]
    assert {len(values) for values in columns[2].values()} == {1}
    assert {len(values) for values in columns[1].values()} == {5}  # it counts an epoch's first line to the one before


def test_best_loads_and_priors_are_filled_in(tiny_run):
    _, out, _ = tiny_run
    detector = Detector.from_pretrained(out / "best")
    assert len(detector.config.size_prior) == 3
    assert "AP_R40, per cent" in detector.card
    assert len(detector.config.depth_mean) == len(detector.config.strides)
    last = load_file(out / "checkpoints/step_00000006/model.safetensors")
    assert all(
        torch.equal(value, last[name]) for name, value in detector.state_dict().items()
    )  # one evaluation, at the end
    raw = load_file(out / "checkpoints/step_00000006/model_1.safetensors")
    assert not torch.equal(raw["box_predictor.weight"], last["box_predictor.weight"])  # the published ones are averages


def test_resumed_equals_uninterrupted_bit_for_bit(tiny_run, tmp_path, here):
    """From the middle of an epoch and of the warm-up's end, with augmentation and averaged weights."""
    world, whole, _ = tiny_run
    out = tmp_path / "again"
    shutil.copytree(whole / "checkpoints/step_00000002", out / "checkpoints/step_00000002")
    half = out / "checkpoints/step_00000003"  # a checkpoint that was never finished
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    code, log, err = here(*tiny(world, out))
    assert code == 0, err
    assert f"resumed from {out / 'checkpoints/step_00000002'}" in log
    assert [r["step"] for r in records(out)] == [3, 4, 5, 6]
    assert losses_of(out) == losses_of(whole)[2:]
    assert hashes(out / "checkpoints/step_00000006") == hashes(whole / "checkpoints/step_00000006")
    assert hashes(out / "checkpoints/step_00000004") != hashes(out / "checkpoints/step_00000006")


def test_a_run_of_sources_with_shares_goes_on_bit_for_bit(tiny_run, tmp_path, here):
    world, (out, again) = tiny_run[0], (tmp_path / "whole", tmp_path / "again")
    part = {"kind": "synthetic", "world_frames": 8}
    mixed = f"data.train={json.dumps([{**part, 'share': 0.25}, part])}"
    code, _, err = here(*tiny(world, out, mixed, "train.save_every=3"))
    assert code == 0, err
    assert read_config(out / "config.json").data.train[0].share == 0.25
    shutil.copytree(out / "checkpoints/step_00000003", again / "checkpoints/step_00000003")
    code, log, err = here(*tiny(world, again, mixed))
    assert code == 0, err
    assert "6 steps of 2 images, 8 an epoch" in log
    assert losses_of(again) == losses_of(out)[3:]
    assert hashes(again / "checkpoints/step_00000006") == hashes(out / "checkpoints/step_00000006")


def test_a_resumed_run_asks_the_hub_for_nothing(tiny_run, tmp_path, here, monkeypatch):
    create, asked = timm.create_model, []

    def hub(*arguments, pretrained=False, **options):
        asked.append(pretrained)
        return create(*arguments, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", hub)
    for fetched in (True, False):
        asked.clear()
        code, _, err = here(
            *tiny(tiny_run[0], tmp_path / "out", "train.steps=2", "model.backbone=resnet10t", "model.pretrained=true")
        )
        assert code == 0, err
        assert any(asked) == fetched
    assert read_config(tmp_path / "out/config.json").model.pretrained


def test_two_processes_train_like_one(tiny_run, tmp_path, here):
    """The same global batch with frozen norms gives the same losses to rounding, and the log says that there were
    two."""
    world = tiny_run[0]
    common = ("model.norm=frozen", "train.steps=4", "train.save_every=100")
    both = forked.run(ROOT, "train.py", *tiny(world, tmp_path / "two", *common), processes=2)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr
    assert "2 process(es) on cpu" in both[0].stdout
    assert [done.stdout.count("Epoch [1][1/2]") for done in both] == [1, 0]  # logged once
    code, _, err = here(*tiny(world, tmp_path / "one", *common, "train.batch_size=4"))
    assert code == 0, err
    ours, theirs = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    first, second = (
        load_file(tmp_path / name / "checkpoints/step_00000004/model_1.safetensors") for name in ("one", "two")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-2, atol=1e-4)


def test_accumulation_sees_the_same_images_in_fewer_steps(tiny_run, tmp_path, here):
    """A run that goes on with another batch is told so."""
    arguments = tiny(tiny_run[0], tmp_path / "a", "train.steps=3", "model.norm=frozen", "train.warmup=0")
    code, out, err = here(*arguments, "train.accumulate=2")
    assert code == 0, err
    assert "3 steps of 4 images, 2 an epoch" in out
    assert [r["step"] for r in records(tmp_path / "a")] == [1, 2, 3]
    code, out, err = here(*arguments, "train.batch_size=1", "train.steps=4")
    assert code == 0, err
    assert re.search(r"changed since the checkpoint: .*train\.batch_size: 2 -> 1; .*images a step: 4 -> 1", out)


def test_accumulated_parts_are_one_batch(tiny_run, tmp_path, here):
    """Losses and gradient of four images at once, in four parts of which two hold no object, and in two parts on each
    of two processes."""
    root, _ = copy_as_kitti(tiny_run[0], tmp_path / "kitti")
    for id in read_split(root, "train")[::3]:
        (root / f"training/label_2/{id}.txt").write_text("")
    found = {}
    for name, batch, parts, processes in (("one", 4, 1, 1), ("parts", 1, 4, 1), ("both", 1, 2, 2)):
        more = (
            "model.norm=frozen",
            "train.steps=2",
            "model.pretrained=false",
            f"train.batch_size={batch}",
            f"train.accumulate={parts}",
        )
        arguments = (ROOT / "configs/kitti.py", *tiny(root, tmp_path / name, *more, kitti=True))
        if processes == 1:
            code, _, err = here(*arguments)
            assert code == 0, err
        else:
            both = forked.run(ROOT, "train.py", *arguments, processes=processes)
            assert [done.returncode for done in both] == [0, 0], both[0].stderr
        found[name] = losses_of(tmp_path / name)
    order = [StepBatches(8, 1, 0, 1, 0, 0, 8).at(micro)[0][1] for micro in range(8)]
    assert {len(np.intersect1d(order[i : i + 4], range(0, 8, 3))) for i in (0, 4)} <= {
        1,
        2,
        3,
    }  # some parts are empty, some are not
    for name in ("parts", "both"):
        for ours, theirs in zip(found["one"], found[name], strict=True):
            assert theirs == pytest.approx(ours, rel=2e-4), name


def test_every_key_is_read(tiny_run, tmp_path, here, monkeypatch):
    """By code that is neither config.py nor a check of values, in two runs: attributes are watched, since names alone
    prove nothing."""
    sections, read = (Config, TrainConfig, DataConfig, ModelConfig, LossConfig, Source), set()
    fields = {(kind, field.name) for kind in sections for field in dataclasses.fields(kind)}
    normal = object.__getattribute__

    def watch(self, name):
        caller = sys._getframe(1).f_code
        if (
            Path(caller.co_filename).name not in ("config.py", "dataclasses.py", "copy.py")
            and caller.co_name != "__post_init__"
        ):
            read.add((type(self), name))
        return normal(self, name)

    for kind in sections:
        monkeypatch.setattr(kind, "__getattribute__", watch, raising=False)
    arguments = [a for a in tiny(tiny_run[0], tmp_path / "a") if not a.startswith("train.steps")]
    arguments += [
        "train.steps=0",
        "train.epochs=0.5",
        "model.velocity=true",
        'model.attributes={"Car": ["vehicle.moving", "vehicle.parked"]}',
    ]
    assert here(*arguments)[0] == 0
    (tmp_path / "v1.0-mini").mkdir()
    nuscenes = Config(data=DataConfig(index="none", train=(Source(kind="nuscenes", root=str(tmp_path)),)))
    with pytest.raises(UserError, match=r"scene\.json: no such table"):
        build_dataset(nuscenes, training=True)
    nowhere = Frame("a", tmp_path / "none.png", np.eye(3), make_labels([], [], [], [], []))
    with pytest.raises(UserError, match="no such image"):
        Detection3D([nowhere], Config().model, DataConfig())[0]
    unread = fields - read
    assert not unread, sorted((kind.__name__, name) for kind, name in unread)


def test_weights_can_be_loaded_from_another_run(tiny_run, tmp_path, here):
    world, whole, _ = tiny_run
    quick = ("train.steps=1", "train.warmup=0", "train.ema=0")
    code, out, err = here(*tiny(world, tmp_path / "a", *quick, f"load_from={whole}", "model.predict_yaw=true"))
    assert code == 0, err
    found = re.search(
        r"load_from .*\.safetensors: (\d+) of \1 tensors; classes kept (.*); outputs kept centerness, .*; new yaw\n",
        out,
    )
    assert found[2] == "Car, Pedestrian, Cyclist"
    code, _, err = here(*tiny(world, tmp_path / "b", *quick, f"load_from={tmp_path / 'nowhere'}"))
    assert (code, err.count("\n")) == (2, 1)
    assert "no such run, checkpoint or file" in err


def copy_as_kitti(world, folder):
    """The tiny world as a KITTI folder of its own, to be broken."""
    for source in world.glob("*/training"):
        shutil.copytree(source.parent, folder, dirs_exist_ok=True)
    return folder, read_split(folder, "train")[1]


def break_label(change):
    def spoil(root, id):
        path = root / f"training/label_2/{id}.txt"
        lines = path.read_text().splitlines() or [
            "Car 0.10 1 1.50 100 120 180 160 1.50 1.80 4.20 -3.00 1.70 20.00 1.35"
        ]
        fields = lines[0].split()
        lines[0] = " ".join(change(fields))
        path.write_text("\n".join(lines) + "\n")

    return spoil


def cut_images(root, id):
    for path in root.glob("training/image_2/*"):
        path.write_bytes(path.read_bytes()[:2000])


NO_BOX_LOSS = [
    f"loss.{name}=0" for name in dataclasses.asdict(LossConfig()) if name not in ("loss_cls", "loss_velocity")
]
MISTAKES = {  # name: (what is broken, overrides, the sentence)
    "no root": (None, ["data.root=/nowhere"], r"error: /nowhere: expected a KITTI folder with training/image_2"),
    "no split": (
        lambda root, id: (root / "ImageSets/train.txt").unlink(),
        [],
        r"ImageSets/train\.txt: no such split file; there are val",
    ),
    "no calib": (
        lambda root, id: (root / f"training/calib/{id}.txt").unlink(),
        [],
        r"calib/\d+\.txt: frame \d+ of split train has no",
    ),
    "14 fields": (break_label(lambda f: f[:14]), [], r"label_2/\d+\.txt:1: expected 15 or 16 fields, got 14"),
    "NaN size": (
        break_label(lambda f: [*f[:8], "nan", *f[9:]]),
        [],
        r"label_2/\d+\.txt:1: field 9 is nan, expected a finite number",
    ),
    "bad image": (cut_images, [], r"image_2/\d+\.png: cannot read the image"),
    "bad image in a worker": (cut_images, ["data.workers=1"], r"image_2/\d+\.png: cannot read the image"),
    "unknown key": (None, ["train.learning_rate=1"], r"unknown key 'train\.learning_rate'"),
    "near key": (None, ["model.backbon=resnet18"], r"unknown key 'model\.backbon'; did you mean model\.backbone"),
    "wrong type": (None, ["train.batch_size=many"], r"train\.batch_size=many: expected a whole number"),
    "unknown backbone": (
        None,
        ["model.backbone=resnet81"],
        r"model\.backbone 'resnet81' is not a timm model; near it: .*resnet",
    ),
    "no such strides": (
        None,
        ["model.strides=8,12", "model.level_sizes=64", "model.size=96,384"],
        r"model\.backbone .* none at \[12\] of model\.strides",
    ),
    "no box loss": (None, NO_BOX_LOSS, r"every weight but loss_cls's is 0"),
    "second order": (None, ["train.optimizer=adahessian"], r"train\.optimizer 'adahessian' needs second derivatives"),
    "unknown optimizer": (
        None,
        ["train.optimizer=adamwww"],
        r"train\.optimizer 'adamwww' is unknown to timm; near it: .*adamw",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(tiny_run, tmp_path, here, mistake):
    spoil, overrides, words = MISTAKES[mistake]
    root, id = copy_as_kitti(tiny_run[0], tmp_path / "kitti")
    if spoil:
        spoil(root, id)
    arguments = [*tiny(root, tmp_path / "run", kitti=True), *overrides]
    code, _, err = here(ROOT / "configs/kitti.py", "model.pretrained=false", *arguments)
    sentences = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(sentences) == 1, err
    assert re.search(words, sentences[0]), sentences[0]
    assert "Traceback" not in err


def test_a_mistake_in_a_real_process(tmp_path):
    command = [sys.executable, "train.py", "configs/kitti.py", f"data.root={tmp_path}", f"out={tmp_path / 'run'}"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert re.fullmatch(
        rf"error: {re.escape(str(tmp_path))}: expected a KITTI folder with .* \(--traceback shows where\)\n",
        finished.stderr,
    )


def test_what_changes_when_a_run_goes_on_is_told(tiny_run, tmp_path, here):
    """In one warning; a metric that is another or counts otherwise begins anew. Neither other shapes nor moments go
    on."""
    world, whole, _ = tiny_run
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoints/step_00000004", out / "checkpoints/step_00000004")
    refused = {
        "model.classes=Car,Cyclist": r"step_00000004: cannot resume from this checkpoint: .*size mismatch",
        "train.optimizer=sgd": r"moments of muon do not fit sgd",
        "train.steps=3": r"it has 4 steps, and this run would end after 3",
    }
    for override, words in refused.items():
        (out / "STOPPED").write_text("")  # of an earlier end: a launch script would start this again and again
        code, _, err = here(*tiny(world, out), override)
        assert code == 2
        assert not (out / "STOPPED").exists()
        assert re.search(words, err), err
    name = "-errors/Car/all/depth_bias"
    code, text, err = here(*tiny(world, out), "model.score_threshold=0.2", "train.lr=0.5", f"best={name}")
    assert code == 0, err
    changes = (
        f'best: "mean/3d/moderate/AP_R40" -> "{name}"',
        "model.score_threshold: 0.05 -> 0.2",
        "train.lr: 0.008 -> 0.5",
    )
    [line] = [line for line in text.splitlines() if "changed since the checkpoint: " in line]
    assert all(change in line for change in changes), line
    [val] = records(out, "val")
    meta = read_best(out / "best")
    assert (meta["metric"], meta["value"], meta["step"]) == (name, val[name], 6)
    assert here(*tiny(world, out), f"best={name}", "train.eval_repeat=2", "train.steps=7")[0] == 0
    assert read_best(out / "best")["step"] == 7


def test_the_best_weights_stay_until_better_ones_come(tiny_run, tmp_path, here):
    world, whole, _ = tiny_run
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    meta = json.loads((out / "best/meta.json").read_text())
    (out / "best/meta.json").write_text(json.dumps({**meta, "value": 1e6}))
    code, text, err = here(*tiny(world, out), "train.steps=7", "train.schedule=constant")
    assert code == 0, err
    assert "best: 1000000" in text
    assert read_best(out / "best")["step"] == 6
    code, text, _ = here(*tiny(world, out), "train.steps=7", "train.schedule=constant")
    assert (code, "it was finished before" in text) == (0, True)


def test_a_checkpoint_of_another_run_brings_no_best_value_along(tiny_run, tmp_path, here):
    """The run that starts from it has best weights of its own from its first evaluation on."""
    last, out = tmp_path / "other/checkpoints/step_00000006", tmp_path / "out"
    shutil.copytree(tiny_run[1] / "checkpoints/step_00000006", last)
    code, text, err = here(*tiny(tiny_run[0], out), f"resume={last}")
    assert code == 0, err
    assert (out / "best/model.safetensors").exists()
    assert f"resumed from {last}" in text


def test_labels_that_changed_are_told_when_a_run_goes_on(tiny_run, tmp_path, here):
    root, id = copy_as_kitti(tiny_run[0], tmp_path / "kitti")
    arguments = (ROOT / "configs/kitti.py", "model.pretrained=false", *tiny(root, tmp_path / "run", kitti=True))
    assert here(*arguments, "train.steps=1", "train.schedule=constant")[0] == 0
    split = root / "ImageSets/train.txt"
    label, calib = root / f"training/label_2/{id}.txt", root / f"training/calib/{id}.txt"
    changes = {
        split: "\n".join(split.read_text().split()[::-1]),
        label: re.sub(r"(\d)\n", r"\g<1>1\n", label.read_text(), count=1),
        calib: re.sub(r"P2: (\S+)", lambda m: f"P2: {float(m[1]) + 1}", calib.read_text()),
    }
    for number, (path, text) in enumerate(changes.items(), 2):
        assert text != path.read_text()
        path.write_text(text)
        code, out, err = here(*arguments, f"train.steps={number}", "train.schedule=constant")
        assert (code, "frames of data.train: their number, order, labels or cameras" in out) == (0, True), err
    code, out, err = here(*arguments, "train.steps=5", "train.schedule=constant")
    assert (code, "frames of data.train" in out) == (0, False), err


@pytest.mark.parametrize(("more", "close"), [("train.mixed_precision=bf16", 0.02), ("model.norm=sync", 1e-6)])
def test_other_ways_to_train(tiny_run, tmp_path, here, more, close):
    """bf16 trains alike up to its precision, synchronised norms in one process exactly alike."""
    code, _, err = here(*tiny(tiny_run[0], tmp_path / "out"), more)
    assert code == 0, err
    ours, theirs = losses_of(tmp_path / "out"), losses_of(tiny_run[1])
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=close)
    assert (ours[0]["loss"] != theirs[0]["loss"]) == (close > 1e-3)


def test_a_launcher_changes_neither_accumulation_nor_precision_and_compiles_nothing(
    tiny_run, tmp_path, here, monkeypatch
):
    """What it asks for is told."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setattr(torch, "compile", None)
    code, out, err = here(*tiny(tiny_run[0], tmp_path / "out"), "train.steps=2", "train.schedule=constant")
    assert code == 0, err
    for wish, counts in (
        ("MIXED_PRECISION=bf16", "mixed_precision=no"),
        ("GRADIENT_ACCUMULATION_STEPS=2", "accumulate=1"),
        ("DYNAMO_BACKEND=INDUCTOR", "compile=False"),
    ):
        assert f"accelerate launch asks for {wish}; train.{counts} is what counts" in out + err
    assert losses_of(tmp_path / "out")[0] == losses_of(tiny_run[1])[0]


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launcher_that_would_split_the_model_is_refused(tmp_path, here, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    code, _, err = here(*tiny(tmp_path / "world", tmp_path / "out"))
    assert code == 2
    assert f"error: accelerate launch asks for {name}, but each process holds the whole model here; launch with" in err
    assert not (tmp_path / "world").exists()


def test_fp16_without_a_gpu_is_refused(tiny_run, tmp_path, here):
    code, _, err = here(*tiny(tiny_run[0], tmp_path / "out"), "train.mixed_precision=fp16")
    assert (code, "train.mixed_precision=fp16 needs a GPU" in err) == (2, True)


def test_foreign_checkpoints_and_used_folders_are_refused(tiny_run, tmp_path, here):
    world, whole, _ = tiny_run
    before = hashes(whole / "checkpoints/step_00000006")
    (tmp_path / "step_00000002").mkdir()
    new = f"out={tmp_path / 'new'}"
    for overrides, words in (
        (["model.channels=64"], r"step_0000000\d: cannot resume from this checkpoint: .*size mismatch"),
        (["resume=none"], r"holds checkpoints and resume=none; choose another out=, or delete it"),
        ([f"resume={tmp_path / 'step_00000001'}", new], r"step_00000001: no such folder; near it are step_00000002"),
        ([f"resume={tmp_path / 'step_00000002'}", new], r"step_00000002: cannot resume .*: meta\.json is missing"),
        (
            [f"resume={whole}", new],
            r"is a run, expected one of its checkpoints; the newest is .*step_00000006",
        ),
    ):
        code, _, err = here(*tiny(world, whole), *overrides)
        assert code == 2, err
        sentences = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1
        assert re.search(words, sentences[0]), sentences[0]
    assert hashes(whole / "checkpoints/step_00000006") == before


def test_a_run_goes_on_with_another_average_or_none(tiny_run, tmp_path, here):
    out = tmp_path / "out"
    shutil.copytree(tiny_run[1] / "checkpoints/step_00000004", out / "checkpoints/step_00000004")
    code, text, err = here(*tiny(tiny_run[0], out), "train.ema=0")
    assert code == 0, err
    assert "train.ema: 0.9 -> 0.0" in text
    first, second = (load_file(out / f"checkpoints/step_00000006/{name}.safetensors") for name in ("model", "model_1"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_replaced_images_are_named(tiny_run, tmp_path, here):
    root, id = copy_as_kitti(tiny_run[0], tmp_path / "kitti")
    (root / f"training/image_2/{id}.png").write_bytes(b"no picture")
    arguments = [*tiny(root, tmp_path / "run", kitti=True), "data.skip_bad=true", "train.steps=4"]
    code, out, err = here(ROOT / "configs/kitti.py", "model.pretrained=false", *arguments)
    assert (code, f"{id}.png" in out + err) == (0, True), err


def test_a_full_disk_ends_in_one_sentence(tiny_run, tmp_path, here):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    code, _, err = here(*tiny(tiny_run[0], tmp_path))
    assert code == 2
    assert re.search(r"\nerror: .*No space left on device", "\n" + err)


def test_a_mistake_in_code_keeps_its_traceback(tiny_run, tmp_path, here, monkeypatch):
    """Of somebody who changes the model, say; one in a config is a sentence, whose origin --traceback shows."""

    def changed(*_):
        raise ValueError("depth")

    monkeypatch.setattr(train.Detector, "_initialise", changed)
    with pytest.raises(ValueError, match=r"^depth$"):
        here(*tiny(tiny_run[0], tmp_path / "out"))
    (tmp_path / "mine.py").write_text("config = {}['depth']\n")
    with pytest.raises(UserError) as caught:
        here(tmp_path / "mine.py", "--traceback")
    assert isinstance(caught.value.__cause__, KeyError)


def test_traceback_on_request(here, tmp_path):
    with pytest.raises(UserError, match="expected a KITTI folder"):
        here(ROOT / "configs/kitti.py", f"data.root={tmp_path}", "--traceback", f"out={tmp_path / 'run'}")


def test_help_lists_every_key(here):
    code, out, _ = here("--help")
    assert code == 0
    for key in ("train.lr=0.008", "data.root=", "model.backbone=", "loss.loss_cls=", "resume="):
        assert f"  {key}" in out


def test_two_config_files_are_too_many(here):
    code, _, err = here("a.py", "b.py")
    assert (code, err) == (
        2,
        "error: expected one config file, got a.py, b.py (overrides are key=value) (--traceback shows where)\n",
    )
    code, _, err = here("configs/none.py")
    assert code == 2
    assert re.search(r"configs/none\.py: no such config file; in .* are .*synthetic\.py", err)


def test_lr_is_a_pure_function_of_the_step():
    cosine = TrainConfig(lr=1.0, warmup=4, schedule="cosine")
    assert [lr_at(s, 100, cosine) for s in range(5)] == pytest.approx(
        [(s + 1) / 5 * (1 + math.cos(math.pi * s / 100)) / 2 for s in range(5)]
    )
    assert lr_at(50, 100, cosine) == pytest.approx(0.5)
    assert lr_at(99, 100, cosine) == pytest.approx((1 + math.cos(0.99 * math.pi)) / 2)
    steps = TrainConfig(lr=1.0, warmup=0, schedule="step")
    assert [lr_at(s, 12, steps) for s in (0, 7, 8, 10, 11)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    constant = TrainConfig(lr=2.0, warmup=1, schedule="constant")
    assert [lr_at(s, 9, constant) for s in (0, 1, 8)] == [1.0, 2.0, 2.0]


class Mixed(torch.nn.Module):
    """Kernels and matrices of several shapes, tall and wide, a depthwise kernel, a norm and biases."""

    def __init__(self):
        super().__init__()
        shapes = ((8, 4, 3), (8, 4, 3), (64, 4, 1), (6, 12, 3))
        self.kernels = torch.nn.ModuleList(torch.nn.Conv2d(i, o, k) for o, i, k in shapes)
        self.rest = torch.nn.ModuleList(
            [torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.BatchNorm2d(8), torch.nn.Linear(5, 7)]
        )


def learn_noise(optimizer, model, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_muon_is_timms_in_single_precision(monkeypatch):
    """timm iterates in bf16, one matrix after the other, unless it is patched as here."""
    monkeypatch.setattr(
        muon, "zeropower_via_newtonschulz", functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    )
    torch.manual_seed(0)
    model = Mixed()
    other = copy.deepcopy(model)
    options = TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.1)
    learn_noise(make_optimizer(model, options), model, 3)
    learn_noise(
        timm.optim.create_optimizer_v2(other, opt="muon", lr=0.01, weight_decay=0.1, betas=(0.9, 0.999)), other, 3
    )
    for (name, ours), theirs in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs[1], rtol=0, atol=1e-6, msg=name)


def test_who_gets_muon():
    shapes = {
        (4, 8): True,
        (3, 8): False,
        (64,): False,
        (4, 512): True,
        (4, 516): False,
        (32, 1, 3, 3): False,
        (8, 128, 3, 3): False,
        (9, 128, 3, 3): True,
    }
    assert {shape: is_matrix(torch.zeros(shape)) for shape in shapes} == shapes


def test_muon_steps_behind_fp16s_scaler():
    Accelerator(cpu=True)
    model = Mixed()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(make_optimizer(model, TrainConfig(optimizer="muon", lr=0.01)), scaler=scaler)
    for overflow in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(sum((p * p).sum() for p in model.parameters()) * (math.inf if overflow else 1.0)).backward()
        scaler.unscale_(optimizer.optimizer)
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == overflow
        optimizer.zero_grad()


def test_moments_of_shapes_of_their_own_go_on(tiny_run, tmp_path, here):
    """A factored optimizer's are no reason to refuse a checkpoint: its kernels are not fused."""
    for steps in (1, 2):
        code, _, err = here(*tiny(tiny_run[0], tmp_path, "train.optimizer=adafactor", f"train.steps={steps}"))
        assert code == 0, err
    assert "resumed from" in (tmp_path / "train.log").read_text()


def test_best_weights_carry_the_fitted_sigma(tiny_run, tmp_path, here, monkeypatch):
    """Unless the config says one; the run's own config.json says none, so that the next evaluation is of the learned
    sigma again."""
    monkeypatch.setattr(
        train,
        "calibrate",
        lambda model, metrics: dataclasses.replace(
            model, sigma_scale=(2.0, metrics["errors"]["Car"]["all"]["objects"], 1.0)
        ),
    )
    assert "factors of sigma" not in (tiny_run[1] / "train.log").read_text()  # too few objects to fit one
    objects = json.loads((tiny_run[1] / "best/metrics.json").read_text())["errors"]["Car"]["all"]["objects"]
    for name, asked, kept, learned in (
        ("a", [], (2.0, objects, 1.0), ()),
        ("b", ["model.sigma_scale=1,1.5,1"], (1.0, 1.5, 1.0), (1.0, 1.5, 1.0)),
    ):
        out = tmp_path / name
        assert here(*tiny(tiny_run[0], out), "train.steps=1", *asked)[0] == 0
        assert Detector.from_pretrained(out / "best").config.sigma_scale == kept
        assert read_config(out / "config.json").model.sigma_scale == learned
        assert f"Car {kept[0]}, Pedestrian {kept[1]}" in (out / "train.log").read_text()


def test_a_metric_that_has_no_value_yet_does_not_end_a_run(tiny_run, tmp_path, here):
    arguments = [*tiny(tiny_run[0], tmp_path / "out"), "best=-errors/Car/all/depth_error", "model.score_threshold=0.99"]
    assert here(*arguments)[0] == 0
    code, _, err = here(*arguments)
    assert code == 0, err


def test_muon_updates_are_orthogonal_and_its_state_survives_saving():
    torch.manual_seed(0)
    for rows, columns in ((16, 80), (80, 16), (32, 32)):
        matrices = torch.randn(3, rows, columns) * torch.logspace(0, -3, columns)
        other, update = orthogonalise(
            [torch.randn(2, rows, 2 * rows), matrices], Muon.ITERATIONS, 1e-7, 128
        )  # of one side, or of two
        torch.testing.assert_close(update, orthogonalise([matrices], Muon.ITERATIONS, 1e-7, 128)[0])
        assert other.shape == (2, rows, 2 * rows)
        assert torch.linalg.svdvals(update).clamp(min=0.1).max() < 1.3
        assert torch.linalg.svdvals(update).quantile(0.25) > 0.6
    assert torch.equal(orthogonalise([torch.zeros(1, 4, 8)], Muon.ITERATIONS, 1e-7, 128)[0], torch.zeros(1, 4, 8))
    model = Mixed()
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"))
    learn_noise(optimizer, model, 2)
    again = copy.deepcopy(model)
    restored = make_optimizer(again, TrainConfig(optimizer="muon"))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    learn_noise(optimizer, model, 2, seed=1)
    learn_noise(restored, again, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_muon_cuts_a_long_shorter_side_into_blocks():
    assert [count_blocks(side, 128) for side in (64, 128, 192, 256, 257, 320, 512, 768)] == [1, 1, 1, 1, 1, 4, 4, 6]
    assert [count_blocks(side, 8) for side in (1, 9, 16, 18, 19, 22, 24)] == [1, 1, 1, 3, 1, 1, 3]
    torch.manual_seed(0)
    for rows, columns in ((24, 80), (80, 24), (24, 24)):
        matrices = torch.randn(3, rows, columns)
        small, update = orthogonalise([torch.randn(2, 8, 9), matrices], Muon.ITERATIONS, 1e-7, 8)
        wide = (lambda x: x) if rows <= columns else (lambda x: x.mT)
        for part, whole in zip(wide(update).split(8, 1), wide(matrices).split(8, 1), strict=True):
            torch.testing.assert_close(part, orthogonalise([whole], Muon.ITERATIONS, 1e-7, 8)[0])
        assert (small.shape, update.shape) == ((2, 8, 9), matrices.shape)
    pair = [torch.nn.Parameter(torch.zeros(rows, 600)) for rows in (Muon.BLOCK, 4 * Muon.BLOCK)]
    pair[0].grad, pair[1].grad = (torch.randn(p.shape) for p in pair)
    pair[1].grad[-Muon.BLOCK :] = pair[0].grad
    Muon(pair, lr=0.1).step()
    torch.testing.assert_close(pair[1][-Muon.BLOCK :], pair[0])


def test_epochs_are_images_seen_over_frames():
    """100 frames in batches of 64: 94 steps are 60 epochs, and each is entered once, in order."""
    places = [place_in_epoch(step, 100 / 64) for step in range(1, 95)]
    assert places[0] == (1, 1, 2)
    assert places[-1][0] == 60
    for (epoch, place, count), (after, following, _) in itertools.pairwise(places):
        assert (after, following) == ((epoch, place + 1) if place < count else (epoch + 1, 1))
    assert [step for step in range(1, 95) if crosses(step, 100 / 64 * 20)] == [32, 63, 94]
    assert [step for step in range(1, 10) if crosses(step, 0.1 * 30)] == [3, 6, 9]
    assert not any(crosses(step, 0) for step in range(9))


def test_steps_of_a_part_of_an_epoch_are_not_rounded_by_floats():
    """1.1 epochs of 30 steps are 33, though 1.1 * 3000 / 100 is a little more."""
    frames = type("Frames", (), {"find": None, "__len__": lambda self: 3000})()
    config = Config(train=TrainConfig(epochs=1.1))
    assert len(train.find_order(config, Progress(global_batch=100), frames, 0)) == 33


def make_log(tmp_path, steps=6, **changes):
    """A `Log` of a run of batches of two of eight frames."""
    config = Config(out=str(tmp_path), train=TrainConfig(batch_size=2, steps=steps), data=DataConfig(**changes))
    return Log(Accelerator(cpu=True), config, StepBatches(8, 2, 0, 1, 0, 0, steps))


def test_the_clock_includes_every_wait(monkeypatch, tmp_path):
    """Of a step, but not an evaluation; the end is foreseen from all steps but the first ones, evaluations among
    them."""
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    run, lines = make_log(tmp_path, steps=20), []
    run.record = lambda record, line, numbers=(): lines.append((record, line))
    window = (["loss", "grad_norm"], np.ones((1, 2, 2)))

    def slow():
        while True:
            now[0] += 0.25
            yield "batch"

    batches = run.timed(slow())
    for done in (2, 4):
        for _ in range(2):
            next(batches)
            now[0] += 1.75
        run.write(done, 0.1, window)
        with run.apart():
            now[0] += 7
    assert [(record["time"], record["data_time"]) for record, _ in lines] == [(2.0, 0.25)] * 2
    assert "eta: 0:00:36" in lines[0][1]  # 18 steps of 2 s
    assert "eta: 0:01:28" in lines[1][1]  # 16 steps, of which two took 11 s


def test_a_warm_up_of_most_of_the_run_is_said(tiny_run, tmp_path, here):
    code, out, _ = here(*tiny(tiny_run[0], tmp_path / "out"), "train.warmup=4", "train.steps=2")
    assert code == 0
    assert "train.warmup=4 is more than half of the 2 steps" in out


def test_seeds_are_a_function_of_all_numbers():
    seeds = {seed_of(a, b, c) for a in range(3) for b in range(3) for c in range(3)}
    assert len(seeds) == 27
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)


def test_a_compiled_run_equals_an_eager_one(tiny_run, tmp_path, here, monkeypatch):
    """Each of model, targets and losses as one graph; traced and differentiated only, since inductor takes minutes
    (DEEP3D_SLOW=1)."""
    if not os.environ.get("DEEP3D_SLOW"):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    arguments = [*tiny(tiny_run[0], tmp_path / "a"), "train.steps=2", "train.log_every=1"]
    assert here(*arguments)[0] == 0
    compiled = [*tiny(tiny_run[0], tmp_path / "b"), "train.steps=2", "train.log_every=1", "train.compile=true"]
    code, _, err = here(*compiled)
    assert code == 0, err
    for eager, other in zip(losses_of(tmp_path / "a"), losses_of(tmp_path / "b"), strict=True):
        assert other == pytest.approx(eager, rel=1e-3, abs=1e-4)
    names = [load_file(tmp_path / run / "checkpoints/step_00000002/model.safetensors").keys() for run in "ab"]
    assert names[0] == names[1]


@pytest.mark.parametrize(("workers", "waited", "enough"), [(2, 0.5, 5), (0, 0.75, 4), (1, 0.001, None)])
def test_waiting_for_data_is_said_once_with_the_workers_that_would_do(tmp_path, workers, waited, enough, caplog):
    run = make_log(tmp_path, workers=workers)
    with caplog.at_level("WARNING", "deep3d"):
        logger = logging.getLogger("deep3d")
        logger.addHandler(caplog.handler)
        for _ in range(6):
            run.warn_of_waiting(waited, 1.0)
        logger.removeHandler(caplog.handler)
    if enough is None:
        assert not caplog.messages
    else:
        assert len(caplog.messages) == 1
        assert f"data.workers={enough} a process would be enough (now {workers})" in caplog.messages[0]
