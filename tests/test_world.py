"""The built-in world: labels agree with the picture, frames are reproducible, the folder is complete or absent."""

import contextlib
import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats import files
from formats.kitti import read_calib, read_labels, read_split, split_projection
from scene.frames import UserError
from scene.geometry import box_iou, clip_boxes, project_boxes
from world import street as world
from world.street import (
    FIRST_INDEX,
    Objects,
    View,
    build_world,
    footprint,
    label_objects,
    overlaps,
    render_frame,
    render_objects,
)

SIZE = (640, 192)


def make_view():
    up = np.float32([0.5, -0.7, 0.5])
    grey = np.full((3, 1, 1), 0.7, np.float32)
    K = np.array([[370.0, 0, 319.5], [0, 370, 90], [0, 0, 1]])
    return View(K, SIZE, np.array([0.0, 1, 0]), 1.65, 0.0, 1.7, 4.0, 3.4, 6.0, 9.0, 1e6, 0.5, 200.0, up, grey, grey)


def make_objects(*rows):
    """rows: (kind, x, z, yaw), standing on the ground of make_view."""
    kind, x, z, yaw = (np.array(column) for column in zip(*rows, strict=True))
    size = np.array([world.SIZES[k] for k in kind])
    center = np.stack([x, 1.65 - size[:, 1] / 2, z], 1).astype(float)
    return Objects(kind, size, center, yaw.astype(float), world.draw_colours(np.random.default_rng(0), len(kind)))


def label(*rows):
    view, objects = make_view(), make_objects(*rows)
    return label_objects(view, objects, *render_objects(view, objects)[3:])


@pytest.fixture(scope="module")
def frames():
    return [render_frame(0, FIRST_INDEX["val"] + i, SIZE) for i in range(30)]


def digest(index):
    image, P2, labels = render_frame(3, index, (320, 96))
    columns = [column.tolist() for column in vars(labels).values() if column is not None]
    return hashlib.sha256(image.tobytes() + P2.tobytes() + repr(columns).encode()).hexdigest()


def test_frame_is_a_pure_function():
    first = [digest(i) for i in (5, 6)]
    assert first == [digest(i) for i in (5, 6)]
    assert first[0] != first[1]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(digest, (5, 6)) == first


def test_labels_project_onto_their_boxes(frames):
    for image, P2, labels in frames:
        assert image.shape == (192, 640, 3)
        assert image.dtype == np.uint8
        K, offset = split_projection(P2)
        assert 0.03 < offset[0] < 0.1
        real = labels[labels.is_3d].moved(offset)
        full, _ = project_boxes(real.center, real.size, real.yaw, K)
        assert (box_iou(clip_boxes(full, *SIZE), real.box) > 0.999).all()
        assert (box_iou(full, real.box)[real.truncation == 0] > 0.999).all()
        assert (real.box[:, 3] - real.box[:, 1] >= world.MIN_HEIGHT).all()
        fill = labels[~labels.is_3d]
        assert (fill.name == "DontCare").all()
        assert (fill.center == -1000).all()
        assert (fill.truncation == -1).all()


@pytest.mark.parametrize("kind", list(world.SIZES))
def test_shapes_fill_their_box_and_face_outward(kind):
    rings, material, layer = world.shape(kind)
    assert rings.shape == (3, 10, len(material))
    assert len(material) == len(layer)
    np.testing.assert_allclose(rings.min((1, 2)), -0.5, atol=0.02)
    np.testing.assert_allclose(rings.max((1, 2)), 0.5, atol=0.02)


@pytest.mark.parametrize("kind", ["sedan", "van", "truck", "pedestrian", "cyclist"])
@pytest.mark.parametrize("yaw", [-np.pi / 2, 0.0, 0.4])
def test_picture_fills_the_labelled_box(kind, yaw):
    """A wrong axis, size order or half height in the renderer shows as a silhouette that is not where the label is."""
    view, objects = make_view(), make_objects((kind, 0.0, 14, yaw))
    _, owner, *_, share, pixels = render_objects(view, objects)
    rows, columns = np.nonzero(owner.reshape(192, 640) >= 0)
    drawn = np.array([columns.min(), rows.min(), columns.max(), rows.max()], float)
    labels = label_objects(view, objects, share, pixels)
    assert box_iou(drawn, labels.box[0]) > 0.7
    assert (drawn[:2] > labels.box[0, :2] - 1).all()
    assert (drawn[2:] < labels.box[0, 2:] + 1).all()
    height = labels.box[0, 3] - labels.box[0, 1]
    assert 0.88 * height < drawn[3] - drawn[1] < height + 1


def test_faces_behind_the_camera_are_drawn_only_in_front():
    """Faces that cross the camera plane: their pixels lie on the plane, in front."""
    view = make_view()
    (rings, _, _), owner, depth, *_ = render_objects(view, make_objects(("truck", 2.5, 2.5, -np.pi / 2)))
    assert rings[2].min() < 0
    seen = owner >= 0
    assert seen.sum() > 5000
    rows, columns = np.nonzero(seen.reshape(192, 640))
    points = np.stack([(columns - 319.5) / 370, (rows - 90) / 370, np.ones(len(rows))]) / depth[seen]
    assert (points[2] > 0).all()
    assert points[0].min() > 2.5 - 1.26
    assert points[0].max() < 2.5 + 1.26
    assert points[1].max() < 1.66


def test_occlusion_follows_the_depth_buffer():
    alone = label(("sedan", 0, 20, 0.0))
    assert alone.occlusion.tolist() == [0]
    behind = label(("van", 0, 10, 0.0), ("sedan", 0, 20, 0.0))
    assert behind.name.tolist() == ["Van"]  # of a car wholly behind it no pixel is left to label
    before = label(("van", 0, 20, 0.0), ("hatchback", 0, 10, 0.0))
    assert before.name.tolist() == ["Van", "Car"]
    assert before.occlusion[1] == 0
    assert before.occlusion[0] >= 1
    levels = [label(("van", 0, 10, -np.pi / 2), ("sedan", x, 16, 0.0)).occlusion[-1] for x in np.arange(0, 6, 0.25)]
    assert levels == sorted(levels, reverse=True)
    assert {0, 1, 2} <= set(levels)


def test_far_and_hidden_objects_become_dont_care():
    labels = label(("sedan", 0, 75, 0.0), ("truck", 30, 61, 0.0), ("sedan", 5, 30, 0.0))
    assert labels.name.tolist() == ["Car", "DontCare", "DontCare"]
    assert (labels.box[:, 2:] > labels.box[:, :2]).all()
    assert labels.size[1].tolist() == [-1, -1, -1]


def test_truncation_is_the_share_of_the_box_outside():
    x = 319.5 / 370 * (12 - 1.76 / 2)  # the near face's centre stands on the border
    labels = label(("sedan", x, 12, 0.0), ("sedan", 0, 12, 0.0))
    assert 0.4 < labels.truncation[0] < 0.6
    assert labels.truncation[1] == 0
    assert labels.box[0, 2] == 639


def test_front_and_back_look_different():
    view = make_view()

    def look(yaw):
        objects = make_objects(("sedan", 0, 8, yaw))
        faces, owner, depth, *_ = render_objects(view, objects)
        image = np.zeros((3, 192 * 640), np.float32)
        world.paint_objects(view, objects, faces, owner, depth, image)
        return image

    back, front = look(-np.pi / 2), look(np.pi / 2)
    redder = [(image[0] - image[1:].max(0) > 0.15).sum() for image in (back, front)]
    assert redder[0] > 50
    assert redder[1] == 0
    assert (np.abs(back - front).max(0) > 0.1).sum() > 500


def test_objects_do_not_overlap(frames):
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2]], float)
    turned = np.array([[3, 1.5], [4.5, 3], [3, 4.5], [1.5, 3]])  # its bounding box meets the square's, it does not
    assert not overlaps(np.stack([square, turned]))[0, 1]
    assert overlaps(np.stack([square, turned - 0.8]))[0, 1]
    for _, _, labels in frames:
        real = labels[labels.is_3d]
        assert overlaps(footprint(real.center, real.size, real.yaw)).sum() == len(real)


def test_population(frames):
    """Per 150 held-out frames over 250 Cars, 100 Pedestrians and 100 Cyclists counted as moderate; some are cut."""
    counted = dict.fromkeys(("Car", "Pedestrian", "Cyclist"), 0)
    cut = 0
    for _, _, labels in frames:
        moderate = (labels.box[:, 3] - labels.box[:, 1] > 25) & (labels.occlusion <= 1) & (labels.truncation <= 0.3)
        cut += ((labels.truncation > 0.3) & (labels.name == "Car")).sum()
        for name in counted:
            counted[name] += (moderate & (labels.name == name)).sum()
    share = len(frames) / 150
    assert counted["Car"] > 250 * share
    assert counted["Pedestrian"] > 100 * share
    assert counted["Cyclist"] > 100 * share
    assert cut > 20 * share


def worlds(folder):
    """Worlds in a folder, whole and unfinished ones; lock files stay."""
    return sorted(path for path in folder.iterdir() if "world" in path.name and path.suffix != ".lock")


def test_build_world(tmp_path):
    root = build_world(tmp_path, "val", 2, seed=1, size=(160, 48), workers=2)
    assert root.name == f"world{world.WORLD_VERSION}-seed1-160x48-val2"
    ids = read_split(root, "val")
    assert ids == [f"{FIRST_INDEX['val'] + i:06d}" for i in range(2)]
    image, P2, labels = render_frame(1, FIRST_INDEX["val"] + 1, (160, 48))
    np.testing.assert_array_equal(np.asarray(Image.open(root / f"training/image_2/{ids[1]}.png")), image)
    np.testing.assert_allclose(read_calib(root / f"training/calib/{ids[1]}.txt"), P2)
    read = read_labels(root / f"training/label_2/{ids[1]}.txt")
    assert read.name.tolist() == labels.name.tolist()
    np.testing.assert_allclose(read.center, labels.center, atol=0.0101)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert build_world(tmp_path, "val", 2, seed=1, size=(160, 48)) == root
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert worlds(tmp_path) == [root]
    assert read_split(build_world(tmp_path, "train", 1, seed=1, size=(160, 48)), "train") == ["000000"]
    with pytest.raises(UserError, match="has train and val, of at least one frame, got 'test' of 3"):
        build_world(tmp_path, "test", 3)


def test_build_world_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(jobs, workers, title):
        raise OSError("No space left on device")

    monkeypatch.setattr(world, "render_all", fail)
    with pytest.raises(OSError, match="No space left"):
        build_world(tmp_path, "train", 1, size=(160, 48))
    assert worlds(tmp_path) == []


def render_slowly(folder):
    """The body of a process that renders with two workers; each leaves a file with its number, errors go to a file."""
    os.setsid()
    gc.disable()  # an exception of a signal is lost if a callback of the collector runs: hypothesis leaves one
    sys.stderr = open(folder / "errors", "w", buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real = world.render_frame

    def slow(*arguments):
        (folder / f"worker{os.getpid()}").touch()
        time.sleep(0.2)
        return real(*arguments)

    world.render_frame = slow
    build_world(folder, "train", 400, size=(160, 48), workers=2)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{condition.__name__} has not come true in {seconds} s"
        time.sleep(0.05)
    return found


def alive(path):
    """Whether the process that a worker's file names runs; one that waits for its parent, which is gone, does not."""
    try:
        return Path(f"/proc/{path.name.removeprefix('worker')}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def renderer(tmp_path):
    """A process that runs `render_slowly`, and the files of its workers."""
    if sys.platform != "linux":
        pytest.skip("looks for processes in /proc")
    process = multiprocessing.get_context("fork").Process(target=render_slowly, args=(tmp_path,))
    process.start()
    yield process, until(lambda: len(found := list(tmp_path.glob("worker*"))) == 2 and found)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and workers that outlived it, else a failing test leaves them behind
    process.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_renderer_leaves_no_process_and_the_next_one_no_folder(tmp_path, renderer, number):
    process, workers = renderer
    assert all(map(alive, workers))
    [unfinished] = tmp_path.glob(".world*.partial")
    assert (unfinished / "ImageSets/train.txt").is_file()
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == -number
    until(lambda: not any(map(alive, workers)))
    assert unfinished.is_dir()
    unfinished.rename(unfinished.with_name(unfinished.name.replace("train400", "train1")))
    root = build_world(tmp_path, "train", 1, size=(160, 48))
    assert worlds(tmp_path) == [root]


def test_a_signal_to_the_whole_group_is_the_parents(tmp_path, renderer):
    """Workers inherit its handlers: one traceback says what happened, not four."""
    process, workers = renderer
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 1
    errors = (tmp_path / "errors").read_text()
    assert errors.count("Traceback") == 1, errors
    assert errors.endswith("KeyboardInterrupt\n")
    assert not any(map(alive, workers))
    assert not worlds(tmp_path)


def test_an_exception_while_rendering_need_not_wait_for_the_other_frames(tmp_path, monkeypatch):
    """As a signal's handler raises it, at any place: here in the progress bar. All 60 frames would take 6 s."""
    real = world.render_frame
    monkeypatch.setattr(
        world, "render_frame", lambda *arguments: time.sleep(0.2) or real(*arguments)
    )  # the processes are forked

    def stopped(frames, *_, **__):
        next(frames)
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "tqdm", stopped)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_world(tmp_path, "train", 60, size=(160, 48), workers=2)
    assert time.monotonic() - start < 4.5
    assert worlds(tmp_path) == []


def test_a_folder_that_another_process_has_put_there_meanwhile_stays(tmp_path):
    for there, left in ((False, "theirs"), (True, "ours")):  # one that was there before is replaced
        path = tmp_path / f"{there}"
        if there:
            path.mkdir()
            (path / "file").write_text("old")
        with files.replacing(path) as aside:
            aside.mkdir()
            (aside / "file").write_text("ours")
            if not there:  # as where nothing can be locked
                path.mkdir()
                (path / "file").write_text("theirs")
        assert (path / "file").read_text() == left
        assert [*tmp_path.glob(".*")] == []


def test_a_world_is_rendered_where_files_cannot_be_locked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    other = tmp_path / ".world1-seed0-160x48-train1.1.partial"
    other.mkdir()
    root = build_world(tmp_path, "train", 1, size=(160, 48))
    assert worlds(tmp_path) == [other, root]  # which may be alive
