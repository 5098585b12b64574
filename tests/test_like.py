"""The second world: what rendered frames take from those of another source, and that they are made once and alike."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from config import Config, override, read_config, to_dict
from data import DataConfig, Source, build_dataset
from formats.kitti import split_projection
from formats.synthetic import frames
from scene.frames import Frame, UserError, make_labels
from scene.geometry import box_iou, clip_boxes, project_boxes
from tools.check_data import check
from world.like import USUAL, Model, Trait, draw_camera, draw_street, find_models, find_traits, render_frame
from world.street import build_world, draw_objects, ground_depth

PLAIN = {name: Trait(1.0, (1.0, 1.0, 1.0)) for name in USUAL}
MODEL = Model((370.0, 360.0, 170.0, 40.0), (340, 100), 1.4, np.nan)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A KITTI folder of six frames."""
    return build_world(tmp_path_factory.mktemp("real"), "train", 6, size=(320, 96))


def config_of(real, tmp_path, like="data.train", **more):
    beside = {"kind": "synthetic", "root": str(tmp_path), "like": like, "world_frames": 5, "share": 0.5, **more}
    names = ",".join(["Car", "Pedestrian"])
    train = f"data.train={json.dumps([{'root': str(real)}, beside])}"
    return override(Config(), [train, f"data.val={json.dumps([{'root': str(real)}])}", f"model.classes={names}"])


def folder_of(dataset):
    return dataset.frames.parts[1].frames[0].image.parents[2]


def test_frames_have_the_cameras_and_sizes_of_the_source_and_are_made_once(real, tmp_path):
    config = config_of(real, tmp_path)
    dataset = build_dataset(config, training=True)
    assert len(dataset) == 11
    rendered, own = dataset.frames.parts[1].frames, dataset.frames.parts[0].frames
    cameras = {tuple(np.round(frame.K[[0, 1, 0, 1], [0, 1, 2, 2]], 3)) for frame in own}
    for frame in rendered:
        assert tuple(np.round(frame.K[[0, 1, 0, 1], [0, 1, 2, 2]], 3)) in cameras
        assert Image.open(frame.image).size == (320, 96)
        boxes = frame.labels[frame.labels.is_3d]
        full, _ = project_boxes(boxes.center, boxes.size, boxes.yaw, frame.K)
        assert (box_iou(clip_boxes(full, 320, 96), boxes.box) > 0.98).all()
    folder = folder_of(dataset)
    assert folder.parent == tmp_path
    assert folder.name.startswith("world2-seed0-like")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert len(before) == 5
    again = build_dataset(config_of(real, tmp_path, like=str(real) + "/"), training=True)
    assert {path: path.stat().st_mtime_ns for path in folder_of(again).rglob("*.jpg")} == before
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(tmp_path / "config.json") == config


def test_a_frame_is_a_pure_function_and_another_seed_another_frame():
    def digest(seed, index):
        image, P2, labels, quality = render_frame(seed, index, MODEL, PLAIN)
        columns = [column.tolist() for column in vars(labels).values() if column is not None]
        return hashlib.sha256(image.tobytes() + P2.tobytes() + repr((columns, quality)).encode()).hexdigest()

    assert digest(0, 3) == digest(0, 3)
    assert len({digest(0, 3), digest(1, 3), digest(0, 4)}) == 3
    image, P2, *_ = render_frame(0, 3, MODEL, PLAIN)
    assert image.shape == (100, 340, 3)
    np.testing.assert_allclose(split_projection(P2)[0], [[370, 0, 170], [0, 360, 40], [0, 0, 1]])


def test_classes_have_the_shares_and_sizes_of_the_labels():
    """Twenty cars of 4, 1.6, 1.7 m and five buses, which the rendered ones would call trucks; nobody else."""
    size = np.array([[4.0, 1.6, 1.7]] * 20 + [[11.0, 3.2, 2.6]] * 5)
    labels = make_labels(["car"] * 20 + ["bus"] * 5, np.ones((25, 4)), size, np.ones((25, 3)), np.zeros(25))
    traits = find_traits(labels, {"Car": "car", "Truck": "bus"})
    assert traits["Car"].weight == 1
    assert traits["Truck"].weight == 1  # asked for more often than it is listed
    assert [traits[name].weight for name in ("Van", "Pedestrian", "Cyclist")] == [0, 0, 0]
    assert traits["Truck"].factors == (1, 1, 1)  # five say little
    usual = np.array([4.180, 1.532, 1.738])
    np.testing.assert_allclose(usual * traits["Car"].factors, [4.0, 1.6, 1.7], atol=0.01)
    with pytest.raises(UserError, match=r"like: none of its classes is rendered, .*; it has bus, car$"):
        find_traits(labels, {})


def test_classes_without_labels_are_not_rendered_and_sizes_are_those_asked_for():
    traits = {name: Trait(float(name == "Car"), (0.8, 1.0, 1.1)) for name in USUAL}
    kinds, sizes = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        view = draw_camera(rng, MODEL)
        factors = dict.fromkeys(("sedan", "hatchback", "suv"), (0.8, 1.0, 1.1))
        objects = draw_objects(rng, view, lambda rng, view: draw_street(rng, view, traits), factors)
        kinds += objects.kind.tolist()
        sizes += objects.size[objects.kind == "sedan"].tolist()
    assert not {"van", "truck", "pedestrian", "cyclist"} & {*kinds}
    np.testing.assert_allclose(np.mean(sizes, 0), [0.8 * 4.45, 1.45, 1.1 * 1.76], rtol=0.05)


def test_height_and_pitch_are_those_of_the_labels():
    """The road falls away by 2 cm a metre, 1.3 m below the camera; a frame of one object tells no pitch."""
    frames = []
    for count in (40, 40, 40, 1):
        z = np.linspace(6, 40, count)
        y = 1.3 + 0.02 * z - 0.75
        labels = make_labels(
            ["Car"] * count, np.ones((count, 4)), np.tile([4, 1.5, 1.7], (count, 1)), np.stack([0 * z, y, z], 1), 0 * z
        )
        frames.append(Frame("", None, np.diag([500.0, 500, 1]), labels, size=(640, 200)))
    models = find_models(frames)
    for model in models[:3]:
        np.testing.assert_allclose((model.height, np.tan(-model.pitch)), (1.3, 0.02), atol=1e-9)
    assert np.isnan(models[3].pitch)
    assert {model.size for model in models} == {(640, 200)}
    alone = find_models([dataclasses.replace(frames[3], size=(64, 20))])[0]
    assert (alone.height, alone.size) == (1.65, (64, 20))


@pytest.mark.parametrize("curve", [-3e-4, 0.0, 3e-4])
def test_rays_meet_the_rolling_ground_and_objects_stand_on_it(curve):
    rng = np.random.default_rng(5)
    view = draw_camera(rng, MODEL)._replace(curve=curve)
    down = np.float32([0.5, 0.1, 0.06])
    z = ground_depth(view, down)
    np.testing.assert_allclose(down * z, view.height + curve * z * z, rtol=1e-4)
    objects = draw_objects(rng, view, lambda rng, view: draw_street(rng, view, PLAIN))
    feet = objects.center + [0, 0.5, 0] * objects.size
    np.testing.assert_allclose(feet @ view.normal, view.height + curve * feet[:, 2] ** 2, atol=1e-9)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"split": ["mini_train"]}, r"like means nothing to the six cameras of mini_train, expected train or val"),
        ({"cameras": ["CAM_FRONT"]}, r"cameras means nothing to the one camera of train"),
        ({"like": "/nowhere"}, r"/nowhere: expected a KITTI folder"),
        ({"like": "/nowhere.jsonl"}, r"/nowhere\.jsonl: no such JSON-lines file"),
        ({"world_frames": 0}, r"like: there are train and val, of at least one frame, got 'train' of 0"),
        ({"kind": "kitti", "world_frames": 600}, r"like means nothing to kind=kitti"),
    ],
)
def test_what_cannot_be_is_one_sentence(real, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        build_dataset(config_of(real, tmp_path, **more), training=True)


def test_frames_like_nothing_are_refused(tmp_path):
    source = Source(kind="synthetic", root=str(tmp_path), like="data.train")
    with pytest.raises(UserError, match="there are no frames to be like, expected some that are not rendered"):
        build_dataset(Config(data=DataConfig(train=(source,))), training=True)


def test_a_source_without_frames_is_one_sentence(real, tmp_path):
    shutil.copytree(real, tmp_path / "real")
    for image in (tmp_path / "real/training/image_2").iterdir():
        image.unlink()
    data = DataConfig(root=str(tmp_path / "real"), train=(Source(),), skip_bad=True)
    with pytest.raises(UserError, match=r"like=data\.train: there are no frames to be like"):
        frames(Source(kind="synthetic", root=str(tmp_path), like="data.train"), data)


def test_check_data_draws_both_kinds_side_by_side(real, tmp_path):
    _, lines = check(config_of(real, tmp_path), draw=1, out=tmp_path)
    assert f"    all sources side by side: {tmp_path / 'train.png'}" in lines
    assert Image.open(tmp_path / "train.png").width == 2 * 1200
    assert not (tmp_path / "val.png").exists()
