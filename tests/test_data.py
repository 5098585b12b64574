"""From frames to batches: exact views, augmentation as a pure function, sources, errors, and the order of training."""

import dataclasses
import io
import multiprocessing
import re

import numpy as np
import pytest
import torch
from conftest import KITTI_CAMERAS, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from config import Config, override
from data import (
    DataConfig,
    Detection3D,
    Source,
    StepBatches,
    UserError,
    build_dataset,
    change_colours,
    collate,
    loading,
    sample_colour,
)
from formats import cache, files
from formats.kitti import write_calib, write_labels
from model import ModelConfig
from scene.frames import (
    PAD_COLOUR,
    Frame,
    Labels,
    View,
    decode,
    image_size,
    load_image,
    make_labels,
    opened,
    place_image,
    place_labels,
    reduction_of,
    whole_view,
)
from scene.geometry import box_corners, project, project_boxes, yaw_to_alpha
from scene.records import to_json, write_jsonl

CLASSES = ("Car", "Pedestrian", "Cyclist")
MODEL = ModelConfig(size=(96, 320), classes=CLASSES[:2])  # the folder has no Cyclist, which training refuses
CAMERAS = [(np.array([[c[0], 0, c[1]], [0, c[3], c[4]], [0, 0, 1]]), size) for c, size in KITTI_CAMERAS.items()]


def views(size):
    """Any flip, scale and crop of an image of that size on a canvas of 384x1280."""
    return st.builds(
        lambda wide, high, left, top, flip: View(size, (384, 1280), wide, high, left, top, flip),
        st.integers(300, 2600), st.integers(100, 800), st.integers(-900, 300), st.integers(-300, 150), st.booleans(),
    )  # fmt: skip


def scene(K, size, seed, count=5):
    """Labels of random boxes in front of the camera, their 2D boxes clipped to the image."""
    rng = np.random.default_rng(seed)
    center = rng.uniform([-15, -1, 8], [15, 2, 70], (count, 3))
    extent, yaw = rng.uniform(0.5, 5, (count, 3)), rng.uniform(-np.pi, np.pi, count)
    full, _ = project_boxes(center, extent, yaw, K)
    return make_labels(["Car"] * count, np.clip(full, 0, np.tile(size, 2) - 1.0), extent, center, yaw)


@pytest.mark.parametrize(("K", "size"), CAMERAS, ids=[f"{c[0]:g}" for c in KITTI_CAMERAS])
@given(options=st.data())
@settings(max_examples=40, deadline=None)
def test_projected_boxes_move_with_the_pixels(K, size, options):
    view, labels = options.draw(views(size)), scene(K, size, options.draw(st.integers(0, 99)))
    placed, camera = place_labels(labels, view), view.camera(K)
    for before, after in (
        (labels.center, placed.center),
        (box_corners(labels.center, labels.size, labels.yaw), box_corners(placed.center, placed.size, placed.yaw)),
    ):
        pixels = project(before, K)
        moved = (view.matrix @ np.concatenate([pixels, np.ones_like(pixels[..., :1])], -1)[..., None])[..., :2, 0]
        ours = project(after, camera)
        if before.ndim == 3:  # a mirror image swaps the corners of a box, so compare them as sets
            ours, moved = (
                np.take_along_axis(x, np.argsort(x[..., :1] * 1e3 + x[..., 1:], 1), 1) for x in (ours, moved)
            )
        assert np.abs(ours - moved).max() < 1e-3
    np.testing.assert_allclose(placed.alpha, yaw_to_alpha(placed.yaw, placed.center), atol=1e-12)
    assert camera[0, 0] > 0
    assert camera[0, 1] == camera[1, 0] == 0


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("wide", "high", "left", "top"), [(320, 96, 0, 0), (400, 120, -50, -17), (240, 72, 31, 9), (213, 140, -20, -40)]
)
def test_pictures_move_with_the_camera(flip, wide, high, left, top):
    """A blob painted where a 3D point projects is found where the placed point projects through the placed camera."""
    size, K = (640, 192), np.array([[400.0, 0, 322.3], [0, 400, 90.8], [0, 0, 1]])
    view = View(size, (96, 320), wide, high, left, top, flip)
    for point in ([-1.1, 0.3, 12.0], [2.35, -0.2, 11.0], [0.1, 0.5, 9.3]):
        u, v = project(np.array(point), K)
        down, across = np.mgrid[: size[1], : size[0]]
        blob = 255 * np.exp(-((across - u) ** 2 + (down - v) ** 2) / (2 * 5.0**2))
        pixels = np.repeat(blob[..., None], 3, 2).round().astype(np.uint8)
        canvas = place_image(pixels, view).astype(float)[..., 0]
        x1, y1, x2, y2 = view.covered
        weight = np.zeros_like(canvas)
        weight[y1:y2, x1:x2] = canvas[y1:y2, x1:x2]
        found = np.array([(weight * np.arange(320)).sum(), (weight * np.arange(96)[:, None]).sum()]) / weight.sum()
        placed = np.array(point) * [-1 if flip else 1, 1, 1]
        assert np.abs(found - project(placed, view.camera(K))).max() < 0.1


@pytest.mark.parametrize(("K", "size"), CAMERAS, ids=[f"{c[0]:g}" for c in KITTI_CAMERAS])
@given(options=st.data())
@settings(max_examples=20, deadline=None)
def test_boxes_come_back_to_the_image(K, size, options):
    view, labels = options.draw(views(size)), scene(K, size, options.draw(st.integers(0, 99)))
    np.testing.assert_allclose(view.boxes_to_image(view.boxes_to_canvas(labels.box)), labels.box, atol=1e-9)


def test_placed_boxes_end_where_the_image_ends():
    K, size = CAMERAS[0]
    labels = scene(K, size, 0, 40)
    for flip in (False, True):
        view = View(size, (96, 320), 400, 121, -50, -10, flip)
        box = place_labels(labels, view).box
        limits = np.array(view.covered) - [0, 0, 1, 1]
        assert (box[:, :2] >= limits[:2]).all()
        assert (box[:, 2:] <= limits[2:]).all()
        assert (box[:, 2:] >= box[:, :2]).all()


def test_flip_twice_is_nothing():
    K, size = CAMERAS[1]
    labels, view = scene(K, size, 3), View(size, (size[1], size[0]), *size, flip=True)
    labels = dataclasses.replace(labels, velocity=np.random.default_rng(0).normal(size=(len(labels), 3)))
    twice = place_labels(place_labels(labels, view), view)
    for field in ("center", "box", "velocity"):
        np.testing.assert_allclose(getattr(twice, field), getattr(labels, field), atol=1e-9)
    np.testing.assert_allclose(np.cos(twice.yaw - labels.yaw), 1)
    np.testing.assert_allclose(view.camera(view.camera(K)), K)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((1242, 375), (1272, 384)), ((1224, 370), (1270, 384)), ((640, 192), (1280, 384)), ((100, 900), (43, 384))],
)
def test_the_whole_image_is_shown_as_large_as_fits(size, shown):
    view = whole_view(*size, (384, 1280))
    assert (view.width, view.height) == shown
    assert (view.left, view.top, view.flip) == (0, 0, False)
    canvas = place_image(np.array(Image.new("RGB", size, (255, 0, 0))), view)
    assert canvas.shape == (384, 1280, 3)
    assert canvas.dtype == np.uint8
    assert (canvas[: view.height, : view.width] == [255, 0, 0]).all()
    assert (canvas[:, view.width :] == PAD_COLOUR).all()


@pytest.fixture
def folder(tmp_path):
    """A KITTI folder of six frames with two cameras, a Van, a Tram and a DontCare."""
    names = ["Car", "Pedestrian", "Van", "Tram", "DontCare"]
    for sub in ("image_2", "label_2", "calib"):
        (tmp_path / "training" / sub).mkdir(parents=True)
    (tmp_path / "ImageSets").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        width = 320 if i % 2 else 300
        Image.fromarray(rng.integers(0, 255, (96, width, 3), np.uint8)).save(tmp_path / f"training/image_2/{i:06d}.png")
        K = np.array([[200.0 + 10 * (i % 2), 0, width / 2], [0, 200, 48], [0, 0, 1]])
        write_calib(tmp_path / f"training/calib/{i:06d}.txt", np.column_stack([K, K @ [0.06, 0, 0.003]]))
        count = min(i + 1, 5)
        center = np.column_stack([np.linspace(-3, 3, 5), np.full(5, 1.0), np.full(5, 15.0)])
        box, _ = project_boxes(center, np.full((5, 3), 1.6), np.zeros(5), K)
        labels = make_labels(names, box, np.full((5, 3), 1.6), center, np.zeros(5), np.zeros(5), np.zeros(5))
        labels.size[4], labels.center[4], labels.yaw[4] = -1, -1000, -10
        write_labels(tmp_path / f"training/label_2/{i:06d}.txt", labels[:count])
    (tmp_path / "ImageSets/train.txt").write_text("000000\n000001\n000002\n000003\n")
    (tmp_path / "ImageSets/val.txt").write_text("000004\n000005\n")
    return tmp_path


def build(folder, *sources, training=False, **changes):
    sources = sources or (Source(),)
    config = DataConfig(**{"root": str(folder), "train": sources, "val": sources, "workers": 0, **changes})
    model = MODEL if training else dataclasses.replace(MODEL, classes=CLASSES)
    return build_dataset(Config(data=config, model=model, seed=5), training)


def ids_of(dataset):
    return [frame.id for frame in dataset.frames]


def test_a_sample_holds_what_the_frame_holds(folder):
    sample = build(folder, Source(split=("val",)))[1]
    assert sample["image"].shape == (96, 320, 3)
    assert sample["image"].dtype == torch.uint8
    assert sample["label"].tolist() == [0, 1]  # the Van and the Tram are not objects
    np.testing.assert_allclose(
        sample["center"], [[-2.94, 1, 15.003], [-1.44, 1, 15.003]], atol=1e-5
    )  # moved from camera 0
    np.testing.assert_allclose(
        project(sample["center"].numpy(), sample["K"].numpy())[0],
        [[160 - 2.94 / 15.003 * 210, 48 + 200 / 15.003]][0],
        atol=1e-3,
    )
    assert len(sample["ignore"]) == 2  # Van and DontCare; the Tram is background
    assert not sample["crosses"].any()
    for key in ("K", "center", "size", "yaw", "box", "full_box", "ignore"):
        assert sample[key].dtype == torch.float32


def test_neighbours_can_be_changed(folder):
    assert len(build(folder, Source(split=("val",)), neighbours=())[1]["ignore"]) == 1
    assert len(build(folder, Source(split=("val",)), neighbours=("Van", "Tram"))[1]["ignore"]) == 3
    with pytest.raises(ValueError, match=r"data\.neighbours names \['Car'\], which model\.classes trains"):
        build(folder, neighbours=("Car",))


@pytest.mark.parametrize(
    ("hard", "easy"), [({"min_height": 1000.0}, {"min_height": 5.0}), ({"max_occlusion": -1}, {"max_occlusion": 0})]
)
def test_hard_objects_are_ignored_in_training_only(folder, hard, easy):
    """Every object of the frame is lower than 1000 px, higher than 5, and of occlusion 0."""
    for options, training, objects in ((hard, True, 0), (easy, True, 2), (hard, False, 2)):
        sample = build(folder, Source(split=("val",)), training=training, flip=0.0, **options)[1]
        assert len(sample["label"]) == objects
        assert len(sample["ignore"]) == 4 - objects  # with the Van and the DontCare


def test_trained_names_come_from_renaming(folder):
    dataset = build(folder, Source(split=("val",), rename={"Tram": "Car", "Car": "Cyclist"}))
    assert dataset[1]["label"].tolist() == [2, 1, 0]
    assert "Cyclist 2" in dataset.summary()
    assert "ignored: DontCare 2, Van 2" in dataset.summary()


def test_the_summary_counts_what_training_ignores(folder):
    """Six frames: a Car in each, a Pedestrian in five; images of 300 px width may grow to 320, others stay."""
    sources = Source(split=("train", "val"))
    plain = "6 frames; trained: Car 6, Pedestrian 5; ignored: DontCare 2, Van 4; background: Tram 3"
    assert build(folder, sources, training=True).summary() == plain
    hidden = build(folder, sources, training=True, max_occlusion=-1).summary()
    assert (
        hidden
        == "6 frames; trained: Car 0, Pedestrian 0; ignored: Car 6, DontCare 2, Pedestrian 5, Van 4; background: Tram 3"
    )
    Image.new("RGB", (640, 192)).save(folder / "training/image_2/000002.png")  # shown at half its size
    height = 0.75 * np.diff(build(folder, sources).frames[2].labels.box[0, 1::2]).item()
    some = build(folder, sources, training=True, min_height=height)
    trained = sum(len(some[(0, i)]["label"]) for i in range(6))
    assert (
        "trained: Car 5, Pedestrian 4; ignored: Car 1, DontCare 2, Pedestrian 1, Van 4; background: Tram 3"
        in some.summary()
    )
    assert trained == 9
    assert (
        build(folder, sources, max_occlusion=-1)
        .summary()
        .startswith("6 frames; trained: Car 6, Pedestrian 5, Cyclist 0;")
    )
    (folder / "training/image_2/000001.png").write_bytes(b"no picture")
    assert some.summary()
    label = folder / "training/label_2/000002.txt"
    lines = [line.split() for line in label.read_text().splitlines()]
    flat = [
        [*row[:4], "0", "0", "0", "0", *row[8:]] if row[0] == "Car" else row for row in lines
    ]  # as converters write what is not seen
    label.write_text("\n".join(map(" ".join, flat)))
    again = build(folder, sources, training=True)
    assert again.summary() == plain.replace("Car 6", "Car 5").replace("ignored: ", "ignored: Car 1, ")
    assert 0 not in again[(0, 2)]["label"]


def test_a_class_without_objects_is_named_before_training(folder):
    config = Config(data=DataConfig(root=str(folder)), model=dataclasses.replace(MODEL, classes=CLASSES))
    words = (
        r"no frame of data\.train holds an object of class 'Cyclist' of model\.classes; .* are: Car, Pedestrian, Tram"
    )
    with pytest.raises(ValueError, match=words):
        build_dataset(config, training=True)
    assert len(build_dataset(config, training=False)) == 2


def test_of_many_frames_some_are_counted_and_all_are_searched(folder, monkeypatch):
    """The first frame holds a Car alone, and the fourth, which is not surveyed, a Tram."""
    monkeypatch.setattr(data, "SURVEYED", 2)
    dataset = build(folder, Source(split=("train",)), training=True)
    assert dataset.frames.spread() == [0, 2]
    assert dataset.summary() == "4 frames, 2 of them counted; trained: Car 2, Pedestrian 1; ignored: Van 1"
    config = Config(data=dataset.config, model=dataclasses.replace(MODEL, classes=("Car", "Tram")))
    assert len(build_dataset(config, training=True)) == 4
    twice = build(folder, Source(split=("train",), repeat=2), training=True)
    assert twice.frames.spread() == [0, 2]
    assert twice.digest() != dataset.digest() == build(folder, training=True).digest()
    label = folder / "training/label_2/000002.txt"
    label.write_text(label.read_text().replace("Car", "Van"))
    assert build(folder, training=True).digest() != dataset.digest()


def test_sources_are_concatenated_repeated_and_limited(folder):
    ids = ids_of(build(folder, Source(split=("train", "val"), limit=5)))
    assert ids == [f"{i:06d}" for i in range(5)]
    assert ids_of(build(folder, Source(split=("val",), repeat=3), training=True)) == ["000004", "000005"] * 3
    with pytest.raises(ValueError, match=r"data\.val has a repeat or a share, expected neither"):
        build(folder, Source(split=("val",), repeat=3))
    assert ids_of(build(folder, Source(split=("all",)))) == [f"{i:06d}" for i in range(6)]
    several = build(folder, Source(limit=1), Source(root=str(folder), split=("train",), limit=2))
    assert ids_of(several) == ["0_000000", "1_000000", "1_000001"]
    assert len(build(folder, Source(split=("train",)), Source(split=("val",)))) == 6


def test_json_lines_train_beside_kitti(folder):
    labels = make_labels(["Car"], [[10, 20, 60, 70]], [[4, 1.5, 1.8]], [[1, 1, 12]], [0.2])
    path = folder / "training/image_2/000000.png"
    write_jsonl(
        folder / "own.jsonl", [Frame("one", path, np.array([[200.0, 0, 150], [0, 200, 48], [0, 0, 1]]), labels)]
    )
    dataset = build(folder, Source(limit=1), Source(kind="jsonl", root=str(folder / "own.jsonl")))
    assert ids_of(dataset) == ["0_000000", "1_one"]
    batch = collate([dataset[0], dataset[1]])
    assert batch["valid"].sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ((Source(root="/nowhere"),), r"/nowhere: expected a KITTI folder with training/image_2"),
        ((Source(split=("test",)),), r"ImageSets/test\.txt: no such split file; there are train, val"),
        ((Source(kind="coco"),), r"data source kind is 'coco', expected 'argoverse', 'jsonl', 'kitti', 'nuscenes'"),
        ((Source(kind="index"),), r"data source kind is 'index', expected 'argoverse'"),
        ((Source(kind="jsonl", root="a.jsonl", split=("val",)),), r"a\.jsonl: split means nothing to kind=jsonl"),
        ((Source(world_seed=1),), r": world_seed means nothing to kind=kitti"),
        ((Source(), Source(kind="nuscenes")), r"data\.val lists sources with different metrics, kitti and nuscenes"),
        ((Source(kind="synthetic", split=("val", "mini_val")),), r"splits val, mini_val .* different metrics"),
        ((Source(kind="synthetic", split=("val", "val")),), r"split lists val, val, expected each once"),
        ((Source(repeat=0),), r"repeat 0, limit 0 and share 0, expected >= 1, >= 0 and 0 to 1"),
        ((Source(split=("train", "train")),), r"split train lists frame 000000 a second time; use repeat="),
        ((Source(kind="jsonl", root="/nowhere.jsonl"),), r"/nowhere\.jsonl"),
    ],
)
def test_wrong_sources_are_named(folder, sources, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        build(folder, *sources)


def test_no_source_at_all(folder):
    with pytest.raises(ValueError, match=r"data\.train lists no source"):
        build_dataset(Config(data=DataConfig(root=str(folder), train=()), model=MODEL), training=True)


@pytest.mark.parametrize("missing", ["calib", "label_2", "image_2"])
def test_missing_files_are_named(folder, missing):
    next((folder / "training" / missing).glob("000001.*")).unlink()
    with pytest.raises(UserError, match=rf"training/{missing}/000001\.\w+: .*"):
        build(folder)


def test_an_unreadable_image_is_named_or_replaced(folder, caplog):
    bad = folder / "training/image_2/000001.png"
    bad.write_bytes(bad.read_bytes()[:3000])
    with pytest.raises(UserError, match=re.escape(f"{bad}: cannot read the image")):
        build(folder)[1]
    dataset = build(folder, skip_bad=True)
    sample = dataset[1]
    assert sample["index"].item() == dataset[1]["index"].item() == 2
    assert torch.equal(sample["image"], dataset[2]["image"])
    [warning] = caplog.messages  # once a file
    assert warning.startswith(f"{bad}: cannot read the image: ")
    for i in range(4):
        (folder / f"training/image_2/{i:06d}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 4 images of the data set can be read"):
        dataset[0]


def test_an_image_of_another_size_than_its_source_says_is_named(folder):
    frame = dataclasses.replace(build(folder).frames[0], size=(640, 96))
    dataset = Detection3D([frame], MODEL, DataConfig())
    assert dataset.view_of(0).image_size == (640, 96)
    words = r"000000\.png: the image is 300x96, and 640x96 by its source; if it was replaced, touch the source"
    with pytest.raises(UserError, match=words):
        dataset[0]


def test_an_implausible_camera_is_named(folder):
    write_calib(folder / "training/calib/000000.txt", np.array([[5.0, 0, 150, 0], [0, 5, 48, 0], [0, 0, 1, 0]]))
    with pytest.raises(UserError, match=r"000000\.png: its camera matrix: focal lengths 5, 5 px are implausible"):
        build(folder)[0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_picture_becomes_rgb(tmp_path, mode):
    picture = (
        Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64))
        if mode == "I;16"
        else Image.new(mode, (64, 64))
    )
    picture.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").mode == "RGB"
    if mode == "I;16":
        assert np.abs(np.asarray(load_image(tmp_path / "a.png"))[..., 0].mean() - 127) < 2


def test_whatever_opens_is_an_image(tmp_path):
    """A member of a tar is none of a folder's files, and scene code knows nothing of it."""

    class Member:
        def __init__(self, content):
            self.content = content

        def __str__(self):
            return f"{tmp_path}/shard.tar/a.png"

        def open(self, mode):
            return io.BytesIO(self.content)

    Image.new("RGB", (48, 32), (7, 8, 9)).save(tmp_path / "a.png")
    member = Member((tmp_path / "a.png").read_bytes())
    for image in (member, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert image_size(image) == (48, 32)
        assert load_image(image).getpixel((0, 0)) == (7, 8, 9)
    with pytest.raises(OSError, match=r"shard\.tar/a\.png: cannot read the image"):
        load_image(Member(b"no picture"))
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such image"):
        image_size(tmp_path / "none.png")
    labels = make_labels(["Car"], [[1, 2, 3, 4]], [[4, 1.5, 1.8]], [[1, 1, 9]], [0.5])
    line = to_json(Frame("a", member, np.eye(3), labels), tmp_path / "runs")
    assert line["image"] == "../shard.tar/a.png"


def test_augmentation_is_a_pure_function_of_seed_epoch_and_index(folder):
    options = {"training": True, "scale": (0.7, 1.4), "colour": 0.3}
    one, two = build(folder, **options), build(folder, **options)
    two[(0, 3)], two[(5, 1)]  # what was read before must not matter
    np.random.seed(1)
    torch.manual_seed(1)
    for key in ((0, 1), (1, 1), (1, 2)):
        for name, value in one[key].items():
            assert torch.equal(value, two[key][name]), name
    assert not torch.equal(one[(0, 1)]["K"], one[(1, 1)]["K"])
    assert not torch.equal(one[(1, 1)]["image"], one[(1, 2)]["image"])
    other = Detection3D(one.frames, one.model, one.config, True, seed=6)
    assert not torch.equal(one[(0, 1)]["K"], other[(0, 1)]["K"])


def test_augmentation_varies_as_asked_and_only_in_training(folder):
    dataset = build(folder, training=True, scale=(0.7, 1.4), flip=0.5)
    cameras = [dataset[(epoch, 0)]["K"].numpy() for epoch in range(60)]
    zoom = np.array([c[0, 0] for c in cameras]) / 200
    assert zoom.min() < 0.8 * 320 / 300 < 1.3 * 320 / 300 < zoom.max() * 1.1
    flips = [dataset[(epoch, 2)]["center"][0, 0].item() > 0 for epoch in range(60)]
    assert 15 < sum(flips) < 45
    still = build(folder, training=True, scale=(1.0, 1.0), flip=0.0)
    same = build(folder)
    for epoch in range(4):  # no augmentation means the view of evaluation, position included
        assert torch.equal(still[(epoch, 0)]["image"], same[0]["image"])
        assert torch.equal(still[(epoch, 0)]["K"], same[0]["K"])
    plain = build(folder, scale=(0.7, 1.4))
    assert torch.equal(plain[0]["image"], plain[(7, 0)]["image"])
    still = build(folder, training=True, flip=0.0)
    assert torch.equal(
        still[(0, 1)]["image"], still[(7, 1)]["image"]
    )  # fills the canvas, so that no place is left to draw


def test_what_the_crop_leaves_out_is_no_object(folder):
    dataset = build(folder, training=True, scale=(3.0, 3.0), flip=0.0)
    counts = {len(dataset[(epoch, 3)]["label"]) for epoch in range(30)}
    assert min(counts) == 0
    assert max(counts) == 2
    for epoch in range(30):
        box = dataset[(epoch, 3)]["box"]
        assert (box[:, 2:] - box[:, :2] >= 1).all()


def test_collate_pads_without_harm(folder):
    dataset = build(folder, Source(split=("train", "val")))
    samples = [dataset[i] for i in range(6)]
    batch = collate(samples)
    assert batch["image"].shape == (6, 96, 320, 3)
    assert batch["center"].shape == (6, 16, 3)
    assert batch["valid"].sum(1).tolist() == [len(s["label"]) for s in samples]
    assert len({tuple(k.flatten().tolist()) for k in batch["K"]}) == 2  # two cameras in one batch
    for i, sample in enumerate(samples):
        n = len(sample["label"])
        for name in ("label", "center", "size", "yaw", "box", "full_box", "crosses"):
            assert torch.equal(batch[name][i, :n], sample[name])
        assert (batch["center"][i, n:, 2] > 1).all()
        assert (batch["size"][i, n:] > 0).all()
        assert (batch["box"][i, n:, 2:] > batch["box"][i, n:, :2]).all()
        assert torch.equal(batch["ignore"][i, : len(sample["ignore"])], sample["ignore"])
        rest = batch["ignore"][i, len(sample["ignore"]) :]
        assert (rest[:, 2:] < rest[:, :2]).all()
    assert collate([samples[0]] * 2, multiple=3)["label"].shape == (2, 3)
    many = {
        **samples[0],
        **{
            k: samples[0][k].repeat_interleave(17, 0)
            for k in ("label", "center", "size", "yaw", "box", "full_box", "crosses")
        },
    }
    assert collate([many])["label"].shape == (1, 32)


def test_velocities_and_attributes_are_sampled_where_they_are_trained(folder):
    """A flip mirrors a velocity, a scale leaves it alone; what a source does not know, and padding, is NaN and -1."""
    frame, names = build(folder).frames[0], ("a.moving", "a.parked")
    labels = make_labels(["Car"] * 2, [[100, 40, 200, 95]] * 2, [[4, 1.5, 1.8]] * 2, [[1.6, 1, 12]] * 2, [1.5] * 2)
    unknown = dataclasses.replace(frame, labels=labels)
    moving = dataclasses.replace(
        labels, velocity=np.array([[3.0, 0.5, -8], [np.nan] * 3]), attribute=np.array(["a.parked", ""], object)
    )
    frame = dataclasses.replace(frame, labels=moving)
    model = dataclasses.replace(MODEL, velocity=True, attributes={"Car": names})
    dataset = Detection3D([frame, unknown], model, DataConfig(), True)
    view = View((640, 192), (96, 320), 640, 192, -100, -50, flip=True)
    blank = dict.fromkeys(("image", "index"), torch.tensor(0))
    batch = collate([{**dataset.sample_from(f, view), **blank} for f in dataset.frames])
    assert batch["velocity"][0, 0].tolist() == [-3.0, 0.5, -8.0]
    assert batch["velocity"][0, 1:].isnan().all()
    assert batch["velocity"][1].isnan().all()
    assert batch["attribute"][:, :2].tolist() == [[1, -1], [-1, -1]]
    assert (batch["attribute"][:, 2:] == -1).all()
    plain = Detection3D([frame], MODEL, DataConfig(), True).sample_from(frame, view)
    assert not {"velocity", "attribute"} & {*plain}


def test_objects_across_the_camera_plane_have_no_full_box(folder):
    dataset = build(folder)
    labels = make_labels(["Car"], [[200, 40, 319, 95]], [[4, 1.5, 1.8]], [[1.6, 1, 1.2]], [1.5])
    sample = dataset.sample_from(dataclasses.replace(dataset.frames[0], labels=labels), whole_view(320, 96, (96, 320)))
    assert sample["crosses"].tolist() == [True]
    assert sample["full_box"].tolist() == [[0, 0, 0, 0]]


def test_truth_is_what_the_file_says(folder):
    dataset = build(folder, Source(split=("val",)))
    truth = dataset.truth(1)
    assert isinstance(truth, Labels)
    np.testing.assert_allclose(truth.center[0], [-3, 1, 15], atol=1e-12)
    assert truth.name.tolist() == ["Car", "Pedestrian", "Van", "Tram", "DontCare"]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_a_batch(folder, workers):
    dataset = build(folder, training=True, scale=(0.7, 1.4), colour=0.2)
    order = StepBatches(len(dataset), 2, 0, 1, seed=3, start=0, stop=3)
    with loading(dataset, order, workers, torch.device("cpu")) as batches:
        for batch, keys in zip(batches, order, strict=True):
            expected = collate([dataset[key] for key in keys])
            for name, value in batch.items():
                assert torch.equal(value, expected[name]), name


@given(
    count=st.integers(1, 40),
    share=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    start=st.integers(0, 30),
)
@settings(max_examples=40, deadline=None)
def test_order_is_independent_of_processes_and_of_where_it_starts(count, share, world, seed, start):
    global_batch, stop = share * world, start + 6
    alone = list(StepBatches(count, global_batch, 0, 1, seed, start, stop))
    ranks = [list(StepBatches(count, global_batch, rank, world, seed, start, stop)) for rank in range(world)]
    for step, batch in enumerate(alone):
        assert [key for rank in ranks for key in rank[step]] == batch
    from_zero = list(StepBatches(count, global_batch, 0, 1, seed, 0, stop))
    assert alone == from_zero[start:]
    stream = [key for batch in from_zero for key in batch]
    for epoch in range(len(stream) // count):
        whole = stream[epoch * count : (epoch + 1) * count]
        assert [e for e, _ in whole] == [epoch] * count
        assert sorted(index for _, index in whole) == list(range(count))


def test_order_changes_with_epoch_and_seed():
    stream = [key for batch in StepBatches(20, 5, 0, 1, 0, 0, 8) for key in batch]
    first, second = [i for e, i in stream if e == 0], [i for e, i in stream if e == 1]
    assert first != second
    assert first != [i for batch in StepBatches(20, 5, 0, 1, 1, 0, 4) for _, i in batch]
    assert len(StepBatches(20, 5, 0, 1, 0, 3, 8)) == 5
    with pytest.raises(ValueError, match="a global batch of 5 does not divide over 2 processes"):
        StepBatches(20, 5, 0, 2, 0, 0, 8)


def test_the_built_in_world_is_a_source(tmp_path):
    from conftest import ROOT

    from config import load_config

    config = override(load_config(ROOT / "configs/synthetic.py"), tiny(tmp_path, tmp_path))
    assert isinstance(config, Config)
    sets = [build_dataset(config, training) for training in (True, False)]
    assert [len(s) for s in sets] == [8, 4]
    assert not {*ids_of(sets[0])} & {*ids_of(sets[1])}
    assert sets[1].metrics == "kitti"


def jpeg(path, size, point, spread):
    """A JPEG of a bright blob; written without loss of position."""
    down, across = np.mgrid[: size[1], : size[0]]
    blob = 255 * np.exp(-((across - point[0]) ** 2 + (down - point[1]) ** 2) / (2 * spread**2))
    Image.fromarray(np.repeat(blob[..., None], 3, 2).round().astype(np.uint8)).save(path, quality=98)


@pytest.mark.parametrize(
    ("size", "canvas", "reduction"),
    [
        ((1600, 896), (96, 320), 8),
        ((1600, 896), (120, 400), 4),
        ((1600, 896), (256, 640), 2),
        ((1600, 896), (512, 1280), 1),
        ((1599, 896), (96, 320), 1),
    ],
)
def test_reduced_jpegs_keep_pixels_where_the_camera_says(tmp_path, size, canvas, reduction):
    point = (903.4, 411.7)
    jpeg(tmp_path / "a.jpg", size, point, 20.0)
    with opened(tmp_path / "a.jpg") as image:
        assert reduction_of(image, canvas) == reduction
        picture = decode(image, reduction)
    assert picture.size == (size[0] // reduction, size[1] // reduction)
    view = whole_view(*size, canvas)
    shown = place_image(np.array(picture), view).astype(float)[: view.height, : view.width, 0]
    found = (
        np.array([(shown.sum(0) * np.arange(view.width)).sum(), (shown.sum(1) * np.arange(view.height)).sum()])
        / shown.sum()
    )
    expected = (view.matrix @ [*point, 1])[:2]
    assert np.abs(found - expected).max() < 0.05
    with opened(tmp_path / "a.jpg") as image:  # a crop shows more of it, so it must not be reduced as far
        assert reduction_of(image, canvas, 4.0) == max(1, reduction // 4)


def test_colours_change_as_their_definitions_say():
    pixels = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    other = np.random.default_rng(4).integers(60, 160, (24, 32, 3), dtype=np.uint8)
    maps, expected = [], []
    for seed, image in ((7, pixels), (8, other)):
        brightness, contrast, saturation = np.random.default_rng(seed).uniform(0.6, 1.4, 3)
        x = image * brightness
        grey = (x[::8, ::8] @ [0.299, 0.587, 0.114]).mean()
        x = grey + contrast * (x - grey)
        own = (x @ [0.299, 0.587, 0.114])[..., None]
        expected.append(np.clip(own + saturation * (x - own), 0, 255))
        maps.append(torch.from_numpy(sample_colour(np.random.default_rng(seed), image, 0.4)).float())
    images = torch.from_numpy(np.stack([pixels, other]))
    batch = {"image": images, "colour": torch.stack(maps), "covered": torch.tensor([[0, 0, 32, 24], [5, 2, 31, 20]])}
    expected = np.stack(expected)
    kept = np.ones((24, 32), bool)
    kept[2:20, 5:31] = False
    expected[1][kept] = other[kept]  # padding
    with torch.autocast("cpu", torch.bfloat16):
        found = change_colours(batch)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy() - expected).max() <= 0.501
    assert change_colours({"image": images}) is images


def test_a_training_sample_brings_its_colours_and_others_none(folder):
    dataset = build(folder, training=True, colour=0.3)
    samples = [dataset[(0, i)] for i in range(2)]
    assert collate(samples)["colour"].shape == (2, 3, 4)
    assert not torch.equal(dataset[(1, 0)]["colour"], samples[0]["colour"])
    assert torch.equal(samples[0]["image"], build(folder, training=True)[(0, 0)]["image"])
    assert "colour" not in build(folder, colour=0.3)[0]
    assert "colour" not in build(folder, training=True)[0]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_padding_keeps_its_colour(folder, flip):
    options = {"training": True, "scale": (0.5, 0.6), "flip": flip}
    plain, varied = build(folder, **options), build(folder, **options, colour=0.3)
    for epoch in range(4):
        before, image = plain[(epoch, 0)]["image"].numpy(), change_colours(collate([varied[(epoch, 0)]]))[0].numpy()
        outside = (before == PAD_COLOUR).all(-1)
        assert 0.3 < outside.mean() < 0.9
        np.testing.assert_array_equal(image[outside], before[outside])
        assert (image != before).any(-1).mean() > 0.05


def test_the_cache_gives_the_same_pixels_and_follows_the_images(folder, tmp_path):
    plain, cached = (
        build(folder, training=True, scale=(0.7, 1.4), colour=0.3, cache=c) for c in ("", str(tmp_path / "cache"))
    )
    for _ in range(2):
        for key in ((0, 0), (3, 1)):
            for name, value in plain[key].items():
                assert torch.equal(value, cached[key][name]), name
    entries = sorted((tmp_path / "cache").iterdir())
    assert [e.suffix for e in entries] == [".rgb", ".rgb"]
    entries[0].write_bytes(entries[0].read_bytes()[:1000])  # damaged: made again
    path = cached.frames[1].image
    size = Image.open(path).size
    Image.new("RGB", size, (200, 10, 10)).save(path)  # another image under the same name: made again
    for key in ((0, 0), (3, 1)):
        assert torch.equal(plain[key]["image"], cached[key]["image"])
    assert sorted((tmp_path / "cache").iterdir()) == entries
    path.unlink()
    with pytest.raises(UserError, match="no such image"):
        cached[(0, 1)]


def test_the_cache_is_read_and_not_the_image(folder, tmp_path, monkeypatch):
    cached = build(folder, cache=str(tmp_path / "cache"))
    before = cached[0]["image"]
    monkeypatch.setattr(cache, "decode", None)
    assert torch.equal(cached[0]["image"], before)


def test_many_processes_may_fill_a_cache_together(folder, tmp_path):
    cached = build(folder, cache=str(tmp_path / "cache"))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(cached.__getitem__, [i % len(cached) for i in range(24)], chunksize=1)
    plain = build(folder)
    assert all(torch.equal(sample["image"], plain[i % len(plain)]["image"]) for i, sample in enumerate(found))
    assert len(list((tmp_path / "cache").iterdir())) == len(cached)


def test_a_cache_that_cannot_be_written_stops_the_run_in_a_sentence(folder, tmp_path, monkeypatch):
    cached = build(folder, cache=str(tmp_path / "cache"), skip_bad=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"data\.cache .*cache: cannot be written: No space left on device"):
        cached[0]
    assert not list((tmp_path / "cache").iterdir())
