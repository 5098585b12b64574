"""nuScenes' samples through the detector and back: what the head says of six cameras, merged, written and evaluated."""

import dataclasses
import json
import re

import forked
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from scenes import encode

import evaluate
import metrics.nuscenes
import train
from config import Config
from data import DataConfig, Detection3D, Source, collate
from formats import nuscenes
from metrics import nuscenes_files
from metrics.nuscenes import nuscenes_metrics
from model import Detector, ModelConfig, to_labels
from scene.frames import UserError, whole_view
from targets import assign
from world import cameras as nuscenes_world

CLASSES = tuple(nuscenes.ATTRIBUTES)
MODEL = ModelConfig(
    backbone="test_resnet",
    size=(576, 1024),
    channels=32,
    classes=CLASSES,
    velocity=True,
    attributes=nuscenes.ATTRIBUTES,
    size_prior=(*((6.0, 2.5, 2.5),) * 5, *((1.5, 1.5, 1.0),) * 3, *((0.6, 1.0, 1.0),) * 2),
    depth_mean=(30.0, 20.0, 10.0),
    depth_std=(15.0, 10.0, 8.0),
    nms_iou=1.0,  # objects that hide each other stay
    max_detections=300,
)


@pytest.fixture(scope="module")
def frames(invented):
    """Those of the first 10 of 40 samples."""
    return nuscenes.read_frames(invented, ("mini_val",), images=False)[: 10 * 6]


@pytest.fixture(scope="module")
def truth(invented, frames):
    return nuscenes.read_truth(invented, ("mini_val",)).of({frame.group for frame in frames})


def detect_truth(frames, options=MODEL):
    """Labels of each frame as `Detector.select` finds them in the outputs that `encode` makes of its objects, one
    location each; none of an object that nearer ones leave no location.
    """
    torch.manual_seed(0)
    model = Detector(options).eval()
    dataset = Detection3D(frames, options, DataConfig())
    found = {}
    for frame in frames:
        view = whole_view(*frame.size, options.size)
        sample = dataset.sample_from(frame, view)
        batch = collate([{**sample, **dict.fromkeys(("image", "index", "skipped"), torch.tensor(0))}])
        targets = assign(batch, options)
        encoded = encode(targets, model, batch["K"])
        logits = torch.full((1, len(model.location_stride), len(options.classes)), -20.0)
        raw = torch.zeros(1, len(model.location_stride), sum(model.fields.values()))
        for number in range(len(sample["label"])):
            (slots,) = torch.where(targets.positive[0] & (targets.object[0] == number))
            if not len(slots):
                continue
            slot = slots[targets.centerness[0, slots].argmax()]
            logits[0, targets.location[0, slot], targets.label[0, slot]] = 20.0
            raw[0, targets.location[0, slot]] = encoded[0, slot]
        found[frame.id] = to_labels(
            model.select(logits, raw, batch["K"])[0], view, options.classes, attributes=options.attribute_names
        )
    return found


@pytest.fixture(scope="module")
def found(frames):
    return detect_truth(frames)


def plain(boxes, truth):
    """Boxes that a rounding to single precision leaves in range or out of it, and that stand before the cameras."""
    distance = np.linalg.norm(boxes.center[:, :2] - truth.vehicle[boxes.sample, :2, 3], axis=1)
    return boxes[(distance > 2) & (np.abs(distance - [nuscenes.NUSCENES.ranges[name] for name in boxes.name]) > 1e-3)]


def test_ground_truth_through_the_whole_path_has_no_error(truth, frames, found, tmp_path):
    """Encode, decode, merge, write, read, evaluate: AP 1 of every class that is there, and no error, velocity and
    attribute included.
    """
    nuscenes_files.write_results(tmp_path / "results.json", nuscenes_files.merge_cameras(frames, found))
    results, _ = nuscenes_files.read_results(tmp_path / "results.json", truth.tokens)
    truth = dataclasses.replace(
        truth, boxes=plain(truth.boxes, truth), racks=truth.racks[:0], rack_sample=truth.rack_sample[:0]
    )
    metrics = nuscenes_metrics(truth, plain(results, truth))
    for name in CLASSES:
        if name == "construction_vehicle":  # of which there is none
            continue
        assert metrics["mean_dist_aps"][name] == pytest.approx(1, abs=1e-9), name
        assert max(e for e in metrics["label_tp_errors"][name].values() if np.isfinite(e)) < 2e-3, name
    assert metrics["label_tp_errors"]["bus"]["vel_err"] < 2e-3
    assert metrics["label_tp_errors"]["bicycle"]["attr_err"] == 0


def of_samples(frames, model, *sources):
    """A data set of nuScenes' frames, as if it were built from these sources."""
    dataset = Detection3D(frames, model, DataConfig(), metrics="nuscenes")
    dataset.sources = sources
    return dataset


def test_metrics_of_samples_have_their_own_names(invented, truth, frames, found, tmp_path, monkeypatch):
    """NDS and mAP, whatever the order in which frames come back, and what an evaluation leaves behind."""
    source = Source(kind="nuscenes", split=("mini_val",), version="v1.0-mini")
    run = Config(data=DataConfig(root=str(invented), val=(source,)), model=MODEL)
    dataset = of_samples(frames, MODEL, source)
    (tmp_path / "run").mkdir()
    metrics = evaluate.compute_metrics(dataset, found, run, tmp_path / "run")
    assert 0.8 < metrics["mAP"] == metrics["mean_ap"] < 0.9
    assert evaluate.read_metric(metrics, "NDS") == metrics["nd_score"]
    assert evaluate.read_metric(metrics, "-mATE") == metrics["tp_errors"]["trans_err"]
    assert evaluate.read_metric(metrics, "-label_tp_errors/traffic_cone/vel_err") == evaluate.WORST  # NaN
    numbers = evaluate.flat_metrics(metrics)
    assert {"NDS", "mAP", "mAVE", "label_aps/car/0.5"} <= numbers.keys()
    assert not any(name.startswith("cfg") for name in numbers)
    assert np.isfinite(list(numbers.values())).all()
    assert evaluate.compute_metrics(dataset, {}, run).keys() == metrics.keys()
    with pytest.raises(ValueError, match="best=NSD: there is no 'NSD' among the metrics, only NDS, mAP, mATE"):
        evaluate.read_metric(evaluate.compute_metrics(dataset, {}, run), "NSD")
    json.dumps(metrics, allow_nan=False)
    monkeypatch.setattr("formats.nuscenes.frames", lambda source, _: frames[: source.limit])  # there are no images
    cars, seven = ModelConfig(classes=("Car",)), dataclasses.replace(source, limit=7)
    three = dataclasses.replace(source, limit=3)
    own_overlap = dataclasses.replace(run, data=dataclasses.replace(run.data, overlap={"car": (0.5,) * 3}))
    refusals = {
        "expected one: it is evaluated as a whole": (of_samples(frames, MODEL, source, source), run),
        "model.classes names 'Car', and the metrics of data.val know only": (of_samples(frames, cars, source), run),
        "limit=7 parts the cameras of a sample": (of_samples(frames[:7], MODEL, seven), run),
        "limit=3 parts the cameras of a sample": (of_samples(frames[:3], MODEL, three), run),
        "data.overlap and train.eval_repeat belong to KITTI's metrics": (dataset, own_overlap),
    }
    for sentence, (data, config) in refusals.items():
        with pytest.raises(UserError, match=re.escape(sentence)):
            evaluate.compute_metrics(data, {}, config)
    order = np.random.default_rng(0).permutation(len(frames))
    shuffled = evaluate.compute_metrics(dataset, {frames[i].id: found[frames[i].id] for i in order}, run)
    assert {**shuffled, "label_tp_errors": 0} == {**metrics, "label_tp_errors": 0}  # NaN is never equal
    part = evaluate.compute_metrics(of_samples(frames[:6], MODEL, source), found, run)
    assert part["label_aps"] != metrics["label_aps"]
    evaluate.write_evaluation(tmp_path / "run", dataset, metrics, found)
    written = {"results_nusc.json", "predictions.jsonl", "metrics.json", "worst.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == written
    again = nuscenes_metrics(truth, nuscenes_files.read_results(tmp_path / "run/results_nusc.json", truth.tokens)[0])
    assert again["nd_score"] == pytest.approx(metrics["NDS"], abs=1e-6)
    assert evaluate.format_metrics(dataset, metrics).endswith(f"NDS {metrics['NDS']:.4f}")


def test_cameras_are_merged_and_tables_read_once_an_evaluation(invented, frames, found, tmp_path, monkeypatch):
    source, calls = Source(kind="nuscenes", root=str(invented), split=("mini_val",), version="v1.0-mini"), []
    for name in ("merge_cameras", "read_truth"):
        own = getattr(metrics.nuscenes, name)
        count = lambda *given, name=name, own=own: calls.append(name) or own(*given)  # noqa: E731
        monkeypatch.setattr(metrics.nuscenes, name, count)
    metrics.nuscenes._read_once.cache_clear()
    dataset = of_samples(frames, MODEL, source)
    numbers = evaluate.compute_metrics(dataset, found, Config(model=MODEL), tmp_path)
    evaluate.write_evaluation(tmp_path, dataset, numbers, found)
    assert sorted(calls) == ["merge_cameras", "read_truth"]


def test_a_run_follows_nds(tmp_path, monkeypatch, capsys):
    """Two steps on four samples of the six-camera world, then the score, the files and the words of nuScenes."""
    world = json.dumps([{"kind": "synthetic", "split": ["mini_val"], "world_frames": 24}])
    nuscenes_world.build_nuscenes_world(tmp_path, "mini_val", 24)  # starting workers takes longer than to draw so few
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([
        str(ROOT / "configs/nuscenes_mini_world.py"), f"data.root={tmp_path}", f"out={tmp_path / 'run'}",
        f"data.train={world}", f"data.val={world}", "data.workers=0", "model.backbone=test_resnet",
        "model.size=96,160", "model.channels=32", 'model.classes=["car", "pedestrian"]',
        'model.attributes={"car":["vehicle.moving", "vehicle.parked"]}', "train.batch_size=4", "train.steps=2",
        "train.warmup=0", "train.log_every=1",
    ])  # fmt: skip
    metrics = json.loads((tmp_path / "run/best/metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["val/NDS"] == metrics["NDS"] >= 0
    assert all(line[name] > 0 for line in lines[:-1] for name in ("loss_velocity", "loss_attribute"))
    said = capsys.readouterr().out
    assert f"mAP {metrics['mAP']:.4f}   NDS {metrics['NDS']:.4f}" in said
    assert f"NDS: {metrics['NDS']:.4f}, best: {metrics['NDS']:.4f}" in said
    assert (tmp_path / "run/predictions.png").stat().st_size > 1000
    AcceleratorState._reset_state(reset_partial_state=True)
    root = f"data.root={tmp_path}"  # two processes: cameras of a sample apart
    both = forked.run(ROOT, "evaluate.py", tmp_path / "run", root, "--out", tmp_path / "two", processes=2)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr
    said = f"mAP {metrics['mAP']:.4f}   NDS {metrics['NDS']:.4f}"
    assert [said in done.stdout for done in both] == [True, False]
    assert evaluate.main([str(tmp_path / "run"), f"data.root={tmp_path}", "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "results_nusc.json").read_text())["results"] for name in ("one", "two"))
    assert {token: len(boxes) for token, boxes in one.items()} == {token: len(boxes) for token, boxes in two.items()}
    assert sum(map(len, one.values())) > 0
    for token, boxes in one.items():  # batches differ, and with them the last bits
        scores = [sorted(box["detection_score"] for box in found) for found in (boxes, two[token])]
        np.testing.assert_allclose(*scores, atol=1e-4)
    AcceleratorState._reset_state(reset_partial_state=True)
