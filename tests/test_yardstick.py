"""The yardstick: oracles replace what they say and nothing else, seeds are grouped, and a run is measured end to end."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

import yardstick
from config import Config, TrainConfig
from data_kitti import make_labels
from geometry import project, project_boxes
from yardstick import KNOWN, MEAN, cell, group, match, measure_cues, tell

K = np.array([[700.0, 0, 600], [0, 700, 180], [0, 0, 1]])


@pytest.fixture
def scene():
    """Three true objects and three detections: a Car a little off, a Pedestrian, and a Car where there is none."""
    center, size, yaw = np.array([[1.0, 1, 20], [-6, 1, 30], [4, 1, 15]]), np.full((3, 3), 1.8), np.array([0.3, -1.0, 2.0])
    names = ["Car", "Pedestrian", "Cyclist"]
    truth = make_labels(names, project_boxes(center, size, yaw, K)[0], size, center, yaw)
    away = np.array([[1.1, 1.05, 22], [-6, 1, 30], [9, 1, 15]])
    found = make_labels(["Car", "Pedestrian", "Car"], project_boxes(away, size, yaw, K)[0], size * 1.1, away, yaw + 0.4, score=np.ones(3))
    return found, truth


def test_detections_meet_objects_of_their_class(scene):
    found, truth = scene
    assert match(found, truth).tolist() == [0, 1, -1]
    assert match(found, truth[:0]).tolist() == [-1, -1, -1]
    assert match(found[:0], truth).tolist() == []
    assert len(tell(found, truth[:0], K, "all")) == 3


def test_an_oracle_tells_one_thing(scene):
    found, truth = scene
    told = {known: tell(found, truth, K, known) for known in KNOWN}
    for known, labels in told.items():
        np.testing.assert_array_equal(labels.center[2], found.center[2])  # nobody to learn from
        same = {
            "center": known in ("nothing", "size", "heading"),
            "size": known not in ("size", "all"),
            "yaw": known not in ("heading", "all"),
        }
        for field, expected in same.items():
            assert (np.abs(getattr(labels, field)[0] - getattr(found, field)[0]).max() < 1e-12) == expected, (known, field)
    np.testing.assert_allclose(told["all"].center[0], truth.center[0])
    np.testing.assert_allclose(told["depth"].center[0, 2], 20)
    np.testing.assert_allclose(project(told["depth"].center[0], K), project(found.center[0], K))
    np.testing.assert_allclose(told["projected centre"].center[0, 2], 22)
    np.testing.assert_allclose(project(told["projected centre"].center[0], K), project(truth.center[0], K))


def test_seeds_are_one_row_with_mean_and_spread():
    config = Config(out="runs/a")
    other = dataclasses.replace(config, train=TrainConfig(lr=0.5))
    runs = [("a", config, 1.0), ("b", dataclasses.replace(config, seed=1, out="runs/b"), 3.0), ("c", other, 5.0)]
    assert group(runs) == [("a", [1.0, 3.0]), ("c", [5.0])]
    assert cell([1.0, 3.0]) == "2.0 +- 1.4"
    assert cell([5.0]) == "5.0"


def test_a_cue_is_worth_what_it_tells():
    """Objects of one size at any height above the ground: the 2D box's height tells the depth, its bottom row does not."""
    random = np.random.default_rng(0)
    center = np.stack([random.uniform(-0.6, 0.6, 800), random.uniform(-1.5, 1.5, 800), random.uniform(8, 40, 800)], -1)
    center[:, 0] *= center[:, 2]  # side by side
    center[405] = [0, 0, 130]  # 11 px high: not counted
    size, yaw = np.full((800, 3), 2.0), np.zeros(800)
    box, names = project_boxes(center, size, yaw, K)[0], np.array(["Car", "Pedestrian", "Cyclist", "Van"])[np.arange(800) % 4]
    labels = make_labels(names, box, size, center, yaw)
    offset = np.array([0.3, 0, 2.0])
    frames = [SimpleNamespace(K=K, labels=labels[start : start + 100], offset=offset) for start in range(0, 800, 100)]
    classes = ("Car", "Pedestrian")
    train = SimpleNamespace(classes=classes, frames=[frame for frame in frames[:4] for _ in range(2)])
    held_out = SimpleNamespace(classes=classes, ids=["a", "b"], frames=frames[4:6])
    found = {}
    for id, frame in zip(held_out.ids, held_out.frames, strict=True):  # every second is found, its box a tenth too high
        seen = frame.labels[np.flatnonzero(np.arange(100) % 8 < 4)]
        higher = seen.box - [[0, 0.1, 0, 0]] * (seen.box[:, 3:] - seen.box[:, 1:2])
        factor = np.where(seen.name == "Car", 1.1, 1.2) + 2 * (seen.center[:, 2] > 100)  # as far off as the network is
        told = seen.center * factor[:, None]
        told[:, :2] = seen.center[:, :2]
        best = make_labels(seen.name, higher, seen.size, told - offset, seen.yaw, score=np.full(len(seen), 0.9))
        double = make_labels(seen.name, higher, seen.size, 2 * told - offset, seen.yaw, score=np.full(len(seen), 0.5))
        parts = {field.name: np.concatenate([getattr(best, field.name), getattr(double, field.name)]) for field in dataclasses.fields(best)}
        found[id] = (dataclasses.replace(best, **parts), None)
    errors = measure_cues(train, held_out, found)
    assert errors["Car"]["the network, found objects"] == pytest.approx(10, abs=0.5)
    assert errors["Pedestrian"]["the network, found objects"] == pytest.approx(20, abs=0.5)
    for cues in errors.values():
        assert cues["height"] < 5
        assert cues["height, found objects"] < 6
        assert 5 < cues["height of the found box"] < 14
        assert min(cues["class alone"], cues["bottom row"]) > 5 * cues["height"]
    held_out.classes = train.classes = ("Tram",)  # nobody has seen one
    assert set(measure_cues(train, held_out, found)["Tram"].values()) == {None}


@pytest.mark.filterwarnings("error")
def test_one_known_object_answers_for_all():
    assert yardstick.look_up_depth(np.array([[0.1, 0.2]]), np.array([7.0]), np.array([[0.3, 0.4], [0.1, 0.2]])).tolist() == [7, 7]


def test_a_run_is_measured(tiny_run, capsys, tmp_path):
    assert yardstick.main([str(tiny_run[1]), "--oracles", "--cues", "--json", str(tmp_path / "y.json")]) == 0
    out = capsys.readouterr().out
    assert "| 3D strict |" in out
    assert f"| {tiny_run[1].name} | 1 |" in out
    assert "| projected centre |" in out
    assert "| bottom row |" in out
    values = json.loads((tmp_path / "y.json").read_text())["runs"][0][1]
    each = [values[name]["2D"] for name in values if name != MEAN]
    assert len(each) == 3
    assert values[MEAN]["2D"] == pytest.approx(sum(each) / 3)
    assert (tmp_path / "y.json").stat().st_size > 500
    assert yardstick.main([str(tmp_path / "none")]) == 2
    assert "no such run" in capsys.readouterr().err
