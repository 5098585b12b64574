"""Every usual mistake in labels, made in good ones of the built-in world, is named; the good ones are let alone."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import KITTI_SIZES, SHARED

from data import DataConfig, Source
from formats import kitti as kitti_format
from formats.kitti import split_projection
from scene.frames import Frame, make_labels
from scene.geometry import clip_boxes, project_boxes
from tools.diagnosis import diagnose, doubt_angles
from world.street import render_frame

SIZE = (320, 96)


@pytest.fixture(scope="module")
def good():
    """Frames of the world as their files hold them, to two decimals; and the sizes of their images."""
    frames = []
    for index in range(30):
        _, P2, labels = render_frame(0, index, SIZE)
        K, offset = split_projection(P2)
        columns = {key: np.round(getattr(labels, key), 2) for key in ("box", "size", "center", "yaw", "alpha")}
        frames.append(
            Frame(f"{index:06d}", Path(f"{index:06d}.png"), K, dataclasses.replace(labels, **columns).moved(offset))
        )
    return frames, np.array([SIZE] * 30, float)


def change(frames, edit):
    """Frames whose 3D rows are changed by edit, a function of Labels and K that returns columns, K among them."""
    changed = []
    for frame in frames:
        columns = edit(frame.labels, frame.K.copy())
        K, real = columns.pop("K", frame.K), frame.labels.is_3d
        kept = {
            key: np.where(real.reshape(-1, *[1] * (v.ndim - 1)), v, getattr(frame.labels, key))
            for key, v in columns.items()
        }
        changed.append(dataclasses.replace(frame, K=K, labels=dataclasses.replace(frame.labels, **kept)))
    return changed


def lowered(labels, share):
    """Centres moved down by a share of the heights."""
    return labels.center + np.array([0, 1, 0]) * labels.size[:, 1:2] * share


def scaled(K, fx=1.0, fy=1.0, cx=1.0, cy=1.0):
    return K * np.array([[fx, 1, cx], [1, fy, cy], [1, 1, 1]])


def kitti_order(labels, order):
    """What the KITTI reader, whose columns are h, w, l and bottom centres, makes of sizes in another order."""
    size = labels.size[:, ["lhw".index(letter) for letter in order]][:, [2, 0, 1]]
    return {"size": size, "center": lowered(labels, 0.5) - np.array([0, 0.5, 0]) * size[:, 1:2]}


IN_JSON = {  # sentence: the columns of labels with that mistake
    "size looks like (w, l, h) where (l, h, w) is expected": lambda l, K: {"size": l.size[:, [2, 0, 1]]},
    "size looks like (h, w, l) where (l, h, w) is expected": lambda l, K: {"size": l.size[:, [1, 2, 0]]},
    "size looks like (w, h, l) where (l, h, w) is expected": lambda l, K: {"size": l.size[:, [2, 1, 0]]},
    "center looks like the bottom centre where the geometric centre is expected": lambda l, K: {
        "center": lowered(l, 0.5)
    },
    "size looks like (h, w, l) where (l, h, w) is expected and center looks like the bottom centre where the geometric "
    "centre is expected": lambda l, K: {"size": l.size[:, [1, 2, 0]], "center": lowered(l, 0.5)},
    "yaw looks 90 degrees off": lambda l, K: {"yaw": l.yaw - np.pi / 2},
    "yaw looks like its negative, a turn about -y": lambda l, K: {"yaw": -l.yaw},
    "yaw looks like a turn about another axis (it fits as 90 degrees minus it)": lambda l, K: {
        "yaw": np.pi / 2 - l.yaw
    },
    "yaw looks like alpha, the angle to the viewing ray": lambda l, K: {"yaw": l.alpha},
    "K looks like that of an image 2.00 times as large as that of the 2D boxes": lambda l, K: {
        "K": scaled(K, 2, 2, 2, 2)
    },
    "K looks like that of an image 0.75 times as large as that of the 2D boxes": lambda l, K: {
        "K": scaled(K, 0.75, 0.75, 0.75, 0.75)
    },
    "K looks wrong (fx 1.30 times, fy 1.30 times that of the 2D boxes)": lambda l, K: {"K": scaled(K, 1.3, 1.3)},
}
IN_KITTI = {
    "size looks like (l, h, w) where (h, w, l) is expected": lambda l, K: kitti_order(l, "lhw"),
    "size looks like (w, l, h) where (h, w, l) is expected": lambda l, K: kitti_order(l, "wlh"),
    "center looks like the geometric centre where the bottom centre is expected": lambda l, K: {
        "center": lowered(l, -0.5)
    },
}


@pytest.mark.parametrize("kitti", [False, True])
def test_good_labels_are_let_alone(good, kitti):
    problems, [note] = diagnose(*good, kitti)
    assert problems == []
    assert re.fullmatch(
        r"projected and given 2D boxes overlap by (0\.9\d|1\.00) in the median of \d+ clear objects", note
    )
    assert diagnose([], np.zeros((0, 2)), kitti) == ([], [])


@pytest.mark.parametrize(("kitti", "sentence"), [*((False, s) for s in IN_JSON), *((True, s) for s in IN_KITTI)])
def test_a_mistake_in_all_labels_is_named(good, kitti, sentence):
    frames, sizes = good
    [found], _ = diagnose(change(frames, (IN_JSON | IN_KITTI)[sentence]), sizes, kitti)
    told = r"of projected and given 2D boxes instead of 0\.\d+, over the \d+ clear objects that tell"
    evidence = re.fullmatch(rf"(.*): median IoU (0\.9\d|1\.00) {told}", found)
    assert evidence, found
    said = evidence[1] if sentence.startswith("K ") else evidence[1].partition(": ")[2]
    assert said == sentence
    assert "Car" in found or sentence.startswith("K ")


def test_a_mistake_of_one_class_is_told_of_that_class(good):
    frames, sizes = good
    swapped = change(frames, lambda l, K: {"size": np.where((l.name == "Car")[:, None], l.size[:, [2, 0, 1]], l.size)})
    [found], _ = diagnose(swapped, sizes)
    assert found.startswith("Car: size looks like (w, l, h) where (l, h, w) is expected: ")


def test_bottom_centres_at_one_distance():
    """There another K explains them, too; it is not preferred."""
    generator, K = np.random.default_rng(0), np.array([[180.0, 0, 160], [0, 180, 48], [0, 0, 1]])
    center = np.stack([generator.uniform(-12, 12, 90), np.full(90, 0.6), generator.uniform(19.9, 20.1, 90)], 1)
    size, yaw = np.tile([0.8, 1.8, 0.6], (90, 1)), generator.uniform(-3, 3, 90)
    boxes = np.round(project_boxes(center, size, yaw, K)[0], 1)
    labels = make_labels(["Pedestrian"] * 90, boxes, size, center + np.array([0, 0.9, 0]), yaw)
    frames = [Frame(str(i), Path("a"), K, labels[i::9]) for i in range(9)]
    [found], _ = diagnose(frames, np.array([SIZE] * 9))
    assert found.startswith(
        "Pedestrian: center looks like the bottom centre where the geometric centre is expected: median IoU 0.9"
    )


@pytest.mark.filterwarnings("error")
def test_no_labels_that_can_be_read_break_it():
    """Random boxes, at, behind and far from the camera, as the readers take them; images of any size, or unknown."""
    generator = np.random.default_rng(0)
    for count in (0, 1, 9, 200):
        columns = {
            "name": generator.choice(["Car", "bus", "x"], count).tolist(),
            "box": np.sort(generator.normal(0, 500, (count, 2, 2)), 1).reshape(count, 4),
            "size": 10 ** generator.uniform(-2, 2, (count, 3)),
            "center": generator.normal(0, 1, (count, 3)) * 10 ** generator.uniform(-2, 4, (count, 1)),
            "yaw": generator.uniform(-6.3, 6.3, count),
        }
        for K in (
            np.array([[500.0, 0, 300], [0, 500, 200], [0, 0, 1]]),
            np.array([[9.0, 0, 0], [0, 9, -40], [0, 0, 1]]),
        ):
            for size in ((600, 400), (np.nan, np.nan)):
                frames = [Frame(str(i), Path("a"), K, make_labels(**columns)) for i in range(3)]
                for kitti in (False, True):
                    told = diagnose(frames, np.array([size] * 3), kitti)
                    assert len(told) == 2
                    assert all(
                        isinstance(sentence, str) and "nan" not in sentence
                        for sentences in told
                        for sentence in sentences
                    )


def test_labels_that_nothing_explains_are_told(good):
    frames, sizes = good
    generator = np.random.default_rng(0)
    [found], _ = diagnose(
        change(frames, lambda l, K: {"center": l.center * generator.uniform(0.5, 2, (len(l), 3))}), sizes
    )
    assert re.match(
        r"the projected 3D boxes miss the given 2D boxes, by no mistake that is known here: median IoU 0\.\d+ of \d+",
        found,
    )


def test_images_of_another_resolution_than_camera_and_boxes(good):
    frames, sizes = good
    [found], _ = diagnose(frames, sizes * 2)
    larger = "about 0.5 times as large as the files"
    assert found == f"K looks like that of an image {larger}: its principal point is not near their middle"


def derive(frames, edit):
    """Frames changed by edit, with the projected boxes as 2D boxes, as the reader of JSON lines derives them."""
    derived = []
    for frame in change(frames, edit):
        own = frame.labels[frame.labels.is_3d]
        boxes, crosses = project_boxes(own.center, own.size, own.yaw, frame.K)
        own = dataclasses.replace(own, box=clip_boxes(np.nan_to_num(boxes), *SIZE))
        derived.append(dataclasses.replace(frame, labels=own[~crosses]))
    return derived


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda l, K: {}, []),
        (
            lambda l, K: {"size": l.size[:, [1, 2, 0]]},
            [r"Car: size looks like \(h, w, l\) where \(l, h, w\) is expected: \d.*m in the median"],
        ),
        (
            lambda l, K: {"center": lowered(l, 0.5)},
            ["center looks like the bottom centre where the geometric centre is expected: only so "],
        ),
        (
            lambda l, K: {"K": scaled(K, 0.5, 0.5, 0.5, 0.5)},
            ["K looks like that of an image about 0.5 times as large as the files"],
        ),
        (lambda l, K: {"center": l.center * [1, -1, 1]}, ["center looks like its y points up: "]),
        (lambda l, K: {"size": l.size * 3.28, "center": l.center * 3.28}, ["Car: size looks 3.2"]),
    ],
)
def test_derived_boxes_are_told_and_judged_by_what_else_there_is(good, edit, words):
    frames, sizes = good
    problems, [note] = diagnose(derive(frames, edit), sizes)
    assert "Car" in note
    assert "the 2D boxes are the projected 3D boxes, so they confirm neither K nor sizes nor angles" in note
    for word in words:
        assert any(re.match(word, sentence) for sentence in problems), problems
    assert bool(problems) == bool(words)


def test_angles_in_degrees():
    lines = [
        f"my.jsonl:{i}: objects[0].yaw is {yaw}, expected radians from -6.3 to 6.3"
        for i, yaw in enumerate((90.0, -170, 12))
    ]
    assert doubt_angles(lines) == [
        "yaw looks like degrees where radians are expected: 3 lie beyond 2 pi, from -170 to 90"
    ]
    assert (
        doubt_angles(["a.txt:1: rotation_y is 90, expected numbers from -6.3 to 6.3", "b", "c"]) == []
    )  # a single one may be damage
    assert doubt_angles([]) == []


def test_too_few_objects_are_not_judged():
    labels = make_labels(["Car"] * 3, [[10, 10, 50, 50]] * 3, [[4, 1.5, 1.8]] * 3, [[0, 1, 20]] * 3, [0] * 3)
    assert (
        diagnose(
            [Frame("a", Path("a"), np.array([[180.0, 0, 160], [0, 180, 48], [0, 0, 1]]), labels)], np.array([SIZE])
        )[0]
        == []
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="KITTI's labels are not part of this project")
@pytest.mark.parametrize("folder", ["kitti_mini", "kitti_real"])
def test_real_labels_are_let_alone(folder):
    frames = kitti_format.frames(Source(root=str(SHARED / folder), split=("trainval",)), DataConfig())
    sizes = np.array([KITTI_SIZES[round(frame.K[0, 0], 4)] for frame in frames])
    assert diagnose(frames, sizes, kitti=True)[0] == []


def test_what_lies_behind_the_camera_is_named_and_makes_no_camera_wrong(good):
    frames, sizes = good
    labels, count = frames[0].labels, frames[0].labels.is_3d.sum()
    behind = np.where(labels.is_3d[:, None], labels.center * [1, 1, -1], labels.center)
    wrong = [dataclasses.replace(frames[0], labels=dataclasses.replace(labels, center=behind)), *frames[1:]]
    [sentence] = diagnose(wrong, sizes)[0]
    assert re.match(rf"objects behind the camera, .*: {count}, the first a .* in frame 000000$", sentence)
