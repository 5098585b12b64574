"""The built-in world from six cameras: its tables against what was drawn."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from config import Config
from data import DataConfig, Source
from formats import nuscenes, synthetic
from formats.tables import read_annotations, read_samples
from model import ModelConfig
from tools.check_data import check
from world import cameras as nuscenes_world
from world.cameras import (
    CAMERAS,
    CATEGORIES,
    LEVELS,
    PERIOD,
    SIZE,
    build_nuscenes_world,
    draw_scene,
    render_camera,
    token_of,
)

SCENE = "scene-0103"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_nuscenes_world(tmp_path_factory.mktemp("world"), "mini_val", 24, seed=5)


@pytest.fixture(scope="module")
def tables(root):
    return {path.stem: json.loads(path.read_text()) for path in (root / "v1.0-mini").iterdir()}


def frames_of(root):
    return nuscenes.frames(Source(kind="nuscenes", root=str(root), split=("mini_val",)), DataConfig(index="none"))


def contents(root):
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_token_resolves_and_rows_are_linked_in_time(root, tables):
    rows = {name: {row["token"]: row for row in table} for name, table in tables.items()}
    assert len(rows) == 13
    assert all(len(rows[name]) == len(tables[name]) for name in tables)
    owners = {"first_sample": "sample", "last_sample": "sample", "first_annotation": "sample_annotation",
              "last_annotation": "sample_annotation"}  # fmt: skip
    for name, table in tables.items():
        for row in table:
            for key, value in row.items():
                if key.endswith("_token"):
                    table_of = key.removesuffix("_token")
                    assert value in rows[owners.get(table_of, table_of)], (name, key)
                elif key in ("attribute_tokens", "log_tokens"):
                    assert all(token in rows[key.removesuffix("_tokens")] for token in value)
                elif key == "next" and value:
                    assert rows[name][value]["prev"] == row["token"]
    for instance in tables["instance"]:
        row, count = rows["sample_annotation"][instance["first_annotation_token"]], 1
        assert row["prev"] == ""
        while row["next"]:
            before, row, count = row, rows["sample_annotation"][row["next"]], count + 1
            times = [rows["sample"][r["sample_token"]]["timestamp"] for r in (before, row)]
            assert times[0] < times[1]
        assert (row["token"], count) == (instance["last_annotation_token"], instance["nbr_annotations"])
    for row in tables["sample_data"]:
        if row["fileformat"] == "png":
            assert Image.open(root / row["filename"]).size == (row["width"], row["height"]) == SIZE
    assert {row["visibility_token"] for row in tables["sample_annotation"]} == set(LEVELS)
    poses = {tuple(rows["ego_pose"][row["ego_pose_token"]]["translation"]) for row in tables["sample_data"]}
    assert len(poses) == len(tables["sample_data"])  # each at its own time


def test_boxes_cover_what_is_drawn(root):
    """Through the tables, an object that nothing hides has the box of its pixels; people do not fill theirs."""
    scene, overlaps = draw_scene(5, SCENE), {}
    for frame in frames_of(root):
        name, channel, time = frame.id.split("/")
        if name != SCENE:
            continue
        number = round((int(time) - scene.time) / (1e6 * PERIOD))
        _, rows, pixels, whole, shown = render_camera(scene, channel, number)
        world = scene.to_global(scene.places(PERIOD * number)[rows])
        places = (world - frame.pose[:3, 3]) @ frame.pose[:3, :3]
        for label in np.flatnonzero(frame.labels.is_3d):
            row = int(np.argmin(np.linalg.norm(places - frame.labels.center[label], axis=1)))
            assert np.linalg.norm(places[row] - frame.labels.center[label]) < 1e-6
            v, u = np.nonzero(shown == row)
            if pixels[row] < 150 or pixels[row] < whole[row]:
                continue
            drawn, box = np.array([u.min(), v.min(), u.max(), v.max()]), frame.labels.box[label]
            inner = np.prod(np.clip(np.minimum(drawn, box)[2:] - np.maximum(drawn, box)[:2], 0, None))
            both = np.prod(drawn[2:] - drawn[:2]) + np.prod(box[2:] - box[:2]) - inner
            if frame.labels.truncation[label] < 0.01 and frame.labels.name[label] in ("car", "truck", "bus", "trailer"):
                overlaps[frame.id, label] = inner / both
            assert (drawn[:2] >= box[:2] - 1).all()
            assert (drawn[2:] <= box[2:] + 1).all()
    assert len(overlaps) >= 8
    assert min(overlaps.values()) > 0.8


def test_the_official_velocity_and_attribute_are_the_simulated_ones(root):
    samples = read_samples(root / "v1.0-mini", ("mini_val",), nuscenes.NUSCENES)
    boxes, _ = read_annotations(root / "v1.0-mini", samples, nuscenes.NUSCENES)
    scenes, moving = {}, 0
    for row in np.flatnonzero(np.isfinite(boxes.velocity[:, 0])):
        sample = samples[boxes.sample[row]]
        scene = scenes.setdefault(sample.scene, draw_scene(5, sample.scene))
        places = scene.to_global(scene.places(1e-6 * (sample.time - scene.time)))
        i = int(np.argmin(np.linalg.norm(places - boxes.center[row], axis=1)))
        angle = scene.turn - scene.direction[i]
        expected = scene.pace[i] * np.array([np.cos(angle), np.sin(angle), 0])
        np.testing.assert_allclose(boxes.velocity[row], expected, atol=1e-5)
        np.testing.assert_allclose(boxes.rotation[row][:, 0], [np.cos(angle), np.sin(angle), 0], atol=1e-9)
        state = boxes.attribute[row]
        assert state == scene.attribute[i]
        if state and not state.startswith("cycle"):
            assert state.endswith("moving") == (scene.pace[i] > 0)
        moving += scene.pace[i] > 0
    assert moving > 20


def test_hidden_objects_have_no_points(root, tables):
    scene = draw_scene(5, SCENE)
    count = np.zeros(len(scene.kind))
    for channel in CAMERAS:
        _, rows, pixels, _, _ = render_camera(scene, channel, 0)
        count[rows] += pixels
    points = {row["token"]: row["num_lidar_pts"] for row in tables["sample_annotation"]}
    found = [
        (points[token], count[i]) for i in range(len(count)) if (token := token_of(SCENE, "object", i, 0)) in points
    ]
    assert [n for n, _ in found] == [pixels // 10 for _, pixels in found]
    assert 0 < sum(n == 0 for n, _ in found) < len(found)


def test_an_object_on_the_border_is_annotated_once_and_seen_by_two_cameras(root):
    frames = frames_of(root)
    samples = read_samples(root / "v1.0-mini", ("mini_val",), nuscenes.NUSCENES)
    boxes, _ = read_annotations(root / "v1.0-mini", samples, nuscenes.NUSCENES)
    tokens = [sample.token for sample in samples]
    centers = {}
    for frame in frames:
        for center in (frame.labels.center @ frame.pose[:3, :3].T + frame.pose[:3, 3])[frame.labels.is_3d]:
            centers.setdefault((frame.group, *np.round(center, 3)), set()).add(frame.id.split("/")[1])
    twice = [(key, cameras) for key, cameras in centers.items() if len(cameras) > 1]
    assert twice
    for (token, *center), _ in twice:
        rows = boxes[boxes.sample == tokens.index(token)]
        assert (np.linalg.norm(rows.center - center, axis=1) < 0.01).sum() == 1


def test_a_world_is_the_same_in_every_build(root, tmp_path):
    source = Source(kind="synthetic", root=str(tmp_path), split=("mini_val",), world_frames=24, world_seed=5)
    frames = synthetic.frames(source, DataConfig(index="none"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == [root.name]
    assert contents(tmp_path / root.name) == contents(root)
    assert len(frames) == 24


def test_a_wrong_split_or_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the built-in world has six cameras in mini_train and mini_val, got 'val'"):
        build_nuscenes_world(tmp_path, "val", 6)
    with pytest.raises(ValueError, match="the built-in world has 1 to 480 pictures of mini_val, world_frames is 481"):
        build_nuscenes_world(tmp_path, "mini_val", 481)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("split", "frames", "samples"),
    [("mini_val", 24, 2), ("mini_val", 25, 3), ("mini_val", 1, 2), ("mini_train", 600, 13)],
)
def test_pictures_are_rounded_up_to_samples(tmp_path, monkeypatch, split, frames, samples):
    monkeypatch.setattr(nuscenes_world, "build_folder", lambda folder, fill: folder)
    assert build_nuscenes_world(tmp_path, split, frames).name.endswith(f"{split}{samples}")


def test_nine_of_the_ten_classes_are_there():
    drawn = {nuscenes.CLASS_OF[name] for name in CATEGORIES.values()}
    assert drawn == set(nuscenes.ATTRIBUTES) - {"construction_vehicle"}
    scenes = [draw_scene(0, name) for name in nuscenes.scenes_of("mini_val")]
    assert {kind for scene in scenes for kind in scene.kind} >= set(CATEGORIES)


def test_its_labels_are_good_data(root):
    """Velocities that are not known, of objects seen once, are no mistake."""
    source = Source(kind="nuscenes", root=str(root), split=("mini_val",))
    model = ModelConfig(classes=("car", "pedestrian"), velocity=True)
    data = DataConfig(train=(source,), val=(source,), index="none")
    problems, lines = check(Config(data=data, model=model))
    assert problems == []
    assert any("the 2D boxes are the projected 3D boxes" in line for line in lines)
