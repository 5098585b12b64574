"""JSON lines: what is read, what is derived, the round trip, and every error by line, key, value and expectation."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from formats.jsonl import OBJECT_KEYS, main, read_frames, summarise
from formats.kitti import read_calib, read_labels, split_projection
from scene.frames import Frame, UserError
from scene.geometry import clip_boxes, project_boxes
from scene.records import to_json, write_jsonl

KITTI = Path(__file__).parents[2] / "shared/data/kitti_mini/training"
K = [[700.0, 0, 320], [0, 710.0, 96], [0, 0, 1]]
CAR = {"class": "Car", "center": [1, 0.6, 14], "size": [4, 1.5, 1.8], "yaw": 0.6}
FRAME = {"image": "a/0001.png", "K": K, "objects": [CAR]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("0001", "0002"):
        Image.new("RGB", (640, 192)).save(tmp_path / "a" / f"{name}.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def problems_of(path, **options):
    problems = []
    read_frames(path, problems, **options)
    return problems


def changed(key, value, base=FRAME):
    """FRAME with one value replaced: 'K', 'objects.0.size' and so on; a value of ... removes the key."""
    frame = copy.deepcopy(base)
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    target = frame
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return frame


def test_a_minimal_line(folder):
    [frame] = read_frames(write(folder, FRAME))
    assert frame.id == "a/0001"
    assert frame.image == folder / "a/0001.png"
    assert frame.K.tolist() == K
    labels = frame.labels
    assert labels.name.tolist() == ["Car"]
    assert labels.center.tolist() == [[1, 0.6, 14]]
    assert labels.size.tolist() == [[4, 1.5, 1.8]]  # l, h, w
    assert labels.yaw.tolist() == [0.6]
    assert labels.alpha[0] == pytest.approx(0.6 - math.atan2(1, 14))
    assert (labels.truncation[0], labels.occlusion[0], labels.score[0]) == (-1, -1, 1)
    assert frame.labels.velocity is frame.labels.attribute is frame.labels.sigma is None


def test_a_box_left_out_is_the_projection_clipped_to_the_image(folder):
    edge = {**CAR, "center": [-6.5, 0.6, 14]}
    [frame] = read_frames(write(folder, {**FRAME, "objects": [CAR, edge]}))
    full_box, _ = project_boxes(frame.labels.center, frame.labels.size, frame.labels.yaw, frame.K)
    assert full_box[1, 0] < 0
    assert frame.labels.box == pytest.approx(clip_boxes(full_box, 640, 192))
    [given_box] = read_frames(write(folder, changed("objects.0", {**CAR, "box": [-5, 10, 50, 60]})))
    assert given_box.labels.box.tolist() == [[0, 10, 50, 60]]


def test_classes_may_hold_spaces_and_any_script(folder):
    names = ["traffic cone", "自行车", "ग़ाड़ी", "می\u200cخواهم"]  # the last with a joiner that its spelling needs
    path = write(folder, {**FRAME, "objects": [{**CAR, "class": name} for name in names]})
    frames = read_frames(path)
    assert frames[0].labels.name.tolist() == names
    write_jsonl(path, frames)
    assert read_frames(path)[0].labels.name.tolist() == names


@pytest.mark.parametrize("id", ["a/./b", "a//b", "a\\b"])
def test_ids_that_name_one_file_are_one(folder, id):
    [frame] = read_frames(write(folder, changed("id", id)))
    assert frame.id == "a/b"
    with pytest.raises(ValueError, match=r"data\.jsonl:2: .*a/b"):
        read_frames(write(folder, changed("id", "a/b"), changed("id", id)))


def test_an_id_left_out_is_the_path_within_any_folder(folder):
    frames = [
        {**FRAME, "image": image, "objects": []}
        for image in ("../x/0001.png", "./a//1.v.png", "/data/b.png", "c:\\a\\b.png")
    ]
    assert [frame.id for frame in read_frames(write(folder, *frames), images=False)] == [
        "x/0001",
        "a/1.v",
        "data/b",
        "a/b",
    ]


def test_ignored_objects_and_regions_become_dontcare_rows(folder):
    ignored = {**CAR, "ignore": True, "box": [10, 10, 20, 20], "velocity": [1, 2, 3]}
    [frame] = read_frames(write(folder, {**FRAME, "objects": [ignored, CAR], "ignore": [[30, 30, 50, 60]]}))
    assert frame.labels.name.tolist() == ["Car", "DontCare", "DontCare"]
    assert frame.labels.box[1:].tolist() == [[10, 10, 20, 20], [30, 30, 50, 60]]
    assert frame.labels.is_3d.tolist() == [True, False, False]
    assert frame.labels.velocity is None


def test_optional_fields_keep_their_rows(folder):
    first = {**CAR, "velocity": [1, 0, -2], "attribute": "moving", "truncation": 0.25, "occlusion": 2}
    second = {**CAR, "class": "Van", "score": 0.5, "depth_sigma": 1.5}
    [frame] = read_frames(write(folder, {**FRAME, "id": "x", "objects": [first, second], "ignore": [[1, 1, 9, 9]]}))
    assert frame.id == "x"
    assert frame.labels.velocity[0].tolist() == [1, 0, -2]
    assert np.isnan(frame.labels.velocity[1:]).all()
    assert frame.labels.attribute.tolist() == ["moving", "", ""]
    assert frame.labels.sigma[1] == 1.5
    assert np.isnan(frame.labels.sigma[[0, 2]]).all()
    assert frame.labels.score.tolist() == [1, 0.5, 1]
    assert (frame.labels.truncation[0], frame.labels.occlusion[0]) == (0.25, 2)


def test_round_trip_from_another_folder(folder):
    first = {**CAR, "velocity": [1, 0, -2], "attribute": "moving", "truncation": 0.25, "occlusion": 2, "yaw": -3.0}
    second = {**CAR, "class": "Van", "score": 0.5, "depth_sigma": 1.5}
    lines = [
        {**FRAME, "objects": [first, second], "ignore": [[1, 1, 9, 9]]},
        {"image": "a/0002.png", "K": K, "objects": []},
    ]
    frames = read_frames(write(folder, *lines))
    (folder / "b").mkdir()
    write_jsonl(folder / "b/copy.jsonl", frames)
    assert json.loads((folder / "b/copy.jsonl").read_text().splitlines()[0])["image"] == "../a/0001.png"
    again = read_frames(folder / "b/copy.jsonl")
    for one, two in zip(frames, again, strict=True):
        assert one.id == two.id
        assert one.image.samefile(two.image)
        assert np.array_equal(one.K, two.K)
        assert one.labels.name.tolist() == two.labels.name.tolist()
        for name in ("truncation", "occlusion", "alpha", "box", "size", "center", "yaw", "score"):
            assert getattr(one.labels, name) == pytest.approx(getattr(two.labels, name), abs=1e-5), name
        for name in ("velocity", "sigma"):
            first, second = getattr(one.labels, name), getattr(two.labels, name)
            assert (first is None) == (second is None)
            assert first is None or np.array_equal(first, second, equal_nan=True)
        assert np.array_equal(one.labels.attribute, two.labels.attribute)
    assert [to_json(r, folder) for r in again] == [to_json(r, folder) for r in frames]


UNSEEN = [
    {"center": [0, 0, -5]},
    {"center": [1.2, 0.6, -0.4]},  # its front is in sight
    {"center": [500, 0, 5]},
    {"box": [700, 10, 750, 60]},
    {"center": [0, 0, -5], "ignore": True},
]


@pytest.mark.parametrize("change", UNSEEN)
def test_what_cannot_be_seen_is_left_out_and_counted(folder, change, capsys):
    line = {**FRAME, "objects": [CAR, {**CAR, **change}], "ignore": [[-9, -9, -1, -1], [1, 1, 9, 9]]}
    path = write(folder, line)
    [frame] = read_frames(path)
    assert frame.labels.name.tolist() == ["Car", "DontCare"]
    assert frame.dropped == 2
    assert main([str(path)]) == 0
    assert "1 good frames, 0 bad lines, 2 objects that cannot be seen left out\nCar: 1" in capsys.readouterr().out
    assert main([str(path), "--dropped"]) == 0
    assert capsys.readouterr().out.startswith("a/0001: left out 2 that cannot be seen\n")


def test_an_object_behind_the_camera_stays_when_its_box_is_seen(folder):
    [frame] = read_frames(
        write(folder, {**FRAME, "objects": [{**CAR, "center": [1.2, 0.6, -0.4], "box": [400, 20, 639, 191]}]})
    )
    assert frame.labels.center.tolist() == [[1.2, 0.6, -0.4]]


BAD = [
    ("image", ..., "the line lacks 'image'; it has K, objects"),
    ("image", "a/9.png", "image is 'a/9.png', expected a file"),
    ("image", 3, "image is 3, expected a path"),
    ("image", "data.jsonl", "image is 'data.jsonl', expected an image file"),
    ("K", ..., "lacks 'K'"),
    ("K", [[700, 0, 320], [0, 700, 96]], "K is [[700, 0, 320], [0, 700, 96]], expected [[fx, 0, cx]"),
    ("K", [[700, 0], [0, 700, 96], [0, 0, 1]], "expected [[fx, 0, cx]"),
    ("K", [[700, 2, 320], [0, 700, 96], [0, 0, 1]], "expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"),
    ("K", [[700, 0, 320], [0, 700, 96], [0, 0, 2]], "expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"),
    ("K.0.0", -700, "K: focal lengths -700, 710 px are not both > 0"),
    ("K.1.1", 0.7, "K: focal lengths 700, 0.7 px are implausible for an image of 640x192"),
    ("K.0.2", 1300, "K: principal point (1300, 96) px is far outside an image of 640x192"),
    ("K.0.2", "320", "K is"),
    ("objects", ..., "lacks 'objects'"),
    ("objects", {}, "objects is {}, expected a list"),
    ("objects.0", 7, "objects[0] is 7, expected an object with class"),
    ("objects.0.class", ..., "objects[0] lacks 'class'; it has center, size, yaw"),
    ("objects.0.class", " Car", 'objects[0].class is " Car", expected a name'),
    ("objects.0.class", "Car\n", 'objects[0].class is "Car\\n", expected a name'),
    ("objects.0.class", "\ud800", 'objects[0].class is "\\ud800", expected a name'),
    (
        "objects.0.class",
        "DontCare",
        'objects[0].class is "DontCare", expected a name; regions belong into the line\'s "ignore": ',
    ),
    ("objects.0.center", [1, 2], "objects[0].center is [1, 2], expected 3 numbers"),
    ("objects.0.center", [1, 2, "3"], 'objects[0].center is [1, 2, "3"], expected 3 numbers'),
    (
        "objects.0.center",
        [0, 0, 1e8],
        "objects[0].center is [0, 0, 100000000.0], expected 3 numbers x, y, z in metres from -10000 to 10000",
    ),
    (
        "objects.0.size",
        [4, 0, 1.8],
        "objects[0].size is [4, 0, 1.8], expected 3 numbers l, h, w in metres from 0.01 to 100",
    ),
    ("objects.0.size", [4, 1, True], "objects[0].size is [4, 1, true], expected 3 numbers l, h, w"),
    ("objects.0.size", [4, 1e-320, 2], "expected 3 numbers l, h, w in metres from 0.01 to 100"),
    ("objects.0.size", [400, 150, 180], "expected 3 numbers l, h, w in metres from 0.01 to 100"),
    ("objects.0.yaw", 90, "objects[0].yaw is 90, expected radians from -6.3 to 6.3"),
    ("objects.0.yaw", None, "objects[0].yaw is null, expected radians"),
    ("objects.0.box", [50, 10, 20, 60], "objects[0].box is [50, 10, 20, 60], expected x1 < x2 and y1 < y2"),
    ("objects.0.box", [50, 10, 50, 60], "expected x1 < x2"),
    ("objects.0.box", [50, 10, 2e6, 60], "expected 4 numbers x1, y1, x2, y2 in pixels from -1e+06 to 1e+06"),
    ("objects.0.bbox", [1, 2, 3, 4], "objects[0] has an unknown key 'bbox'; did you mean 'box'?"),
    ("objects.0.Yaw", 0, "objects[0] has an unknown key 'Yaw'; did you mean 'yaw'?"),
    ("objects.0.zzzzzz", 0, "unknown key 'zzzzzz'; expected class, center"),
    ("objects.0.truncation", 1.5, "objects[0].truncation is 1.5, expected a number from 0 to 1"),
    ("objects.0.occlusion", 4, "objects[0].occlusion is 4, expected 0, 1, 2 or 3"),
    ("objects.0.ignore", 1, "objects[0].ignore is 1, expected true or false"),
    ("objects.0.velocity", [1, 2], "objects[0].velocity is [1, 2], expected 3 finite numbers x, y, z in m/s"),
    ("objects.0.attribute", 3, "objects[0].attribute is 3, expected text"),
    ("objects.0.depth_sigma", 0, "objects[0].depth_sigma is 0, expected metres > 0"),
    ("object", [], "the line has an unknown key 'object'; did you mean 'objects'?"),
    ("ignore", [[1, 2, 3]], "ignore[0] is [1, 2, 3], expected 4 numbers"),
    ("ignore", True, "ignore is true, expected a list"),
    *(
        ("id", id, "expected text that can name a file, such as 'a/0001'")
        for id in (
            "../x",
            "a/../x",
            "a\\..\\x",
            "/x",
            "\\x",
            "c:\\x",
            "c:x",
            "",
            ".",
            "a\0b",
            "a\nb",
            "\udfff",
            "a/" + "x" * 300,
            7,
        )
    ),
    ("image", "a/\0.png", 'image is "a/\\u0000.png", expected a path'),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_errors_name_file_line_key_value_and_expectation(folder, key, value, message):
    path = write(folder, changed("image", "a/0002.png"), changed(key, value))
    [problem] = problems_of(path)
    assert problem.startswith(f"{path}:2: ")
    assert message in problem
    with pytest.raises(ValueError, match="lists every bad line") as error:
        read_frames(path)
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize(("line", "message"), [
    (json.dumps(FRAME).replace("14]", "NaN]"), "it holds NaN, expected finite numbers"),
    (json.dumps(FRAME).replace("14]", "-Infinity]"), "it holds -Infinity"),
    (json.dumps(FRAME).replace("14]", "1e999]"), "objects[0].center is [1, 0.6, Infinity], expected 3 numbers"),
    (json.dumps(FRAME)[:-1], "not a line of JSON"),
    ("[1]", "the line holds [1], expected an object with image, K, objects"),
    ("[" * 100_000, "not a line of JSON"),
])  # fmt: skip
def test_lines_that_are_not_frames(folder, line, message):
    [problem] = problems_of(write(folder, line))
    assert message in problem


def test_every_bad_line_is_reported_with_all_that_is_wrong(folder):
    worse = changed("objects", [{**CAR, "yaw": "x"}, CAR, {**CAR, "size": [1]}])
    path = write(
        folder, changed("K.0.0", 0), "", "oops", worse, changed("image", "a/0002.png"), changed("image", "a/0002.png")
    )
    places = [problem.split(": ")[0].rpartition(":")[2] for problem in problems_of(path)]
    assert places == ["1", "3", "4", "4", "6"]
    assert "id is 'a/0002', as on line 5" in problems_of(path)[-1]


def test_files_that_hold_nothing(folder):
    assert "no frames" in problems_of(write(folder, ""))[0]
    with pytest.raises(UserError, match=r"none\.jsonl"):
        read_frames(folder / "none.jsonl")
    path = folder / "data.jsonl"
    path.write_bytes(b"\xff\xfe{}\n")
    assert "not a line of JSON" in problems_of(path)[0]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FRAME).encode())
    assert problems_of(path) == []


def test_without_images_nothing_is_opened(folder):
    path = write(folder, changed("image", "nowhere/1.png"), changed("K.0.0", -1))
    problems = problems_of(path, images=False)
    assert len(problems) == 1
    assert ":2: K: focal lengths" in problems[0]


def test_tiny_images_are_refused(folder):
    Image.new("RGB", (4, 4)).save(folder / "a/0001.png")
    assert "are implausible for an image of 4x4" in problems_of(write(folder, FRAME))[0]


def test_a_summary_of_each_class(folder):
    expected = "Car: 1, mean l h w 4.00 1.50 1.80 m, depth 14.0 to 14.0 m"
    assert summarise(read_frames(write(folder, FRAME))) == [expected]


def test_command_line(folder, capsys):
    path = write(folder, FRAME, changed("objects.0.size", [0, 1, 1], changed("image", "a/0002.png")))
    run = subprocess.run([sys.executable, "-m", "formats.jsonl", path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"{path}:2: objects[0].size" in run.stdout
    assert f"{path}: 1 good frames, 1 bad lines\nCar: 1" in run.stdout
    assert main([str(write(folder, FRAME))]) == 0
    assert main([str(write(folder, changed("image", "b.png"))), "--no-images"]) == 0
    assert main([str(folder / "none")]) == 2
    assert "none: no such" in capsys.readouterr().err


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(width=32) | st.text(max_size=3)
JSON = st.recursive(LEAVES, lambda values: st.lists(values, max_size=4), max_leaves=10)
KEYS = ["image", "K", "objects", "id", "ignore", "K.0", "objects.0", *(f"objects.0.{key}" for key in OBJECT_KEYS)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=JSON)
def test_any_value_is_read_or_reported_never_a_crash(folder, key, value):
    path = write(folder, changed(key, value))
    problems = problems_of(path)
    if not problems:
        read_frames(path)
    assert all(problem.startswith(f"{path}:1: ") for problem in problems)


@pytest.mark.skipif(not KITTI.is_dir(), reason="the KITTI sample frames are not there")
def test_kitti_frames_survive_the_round_trip(tmp_path):
    frames = []
    for file in sorted((KITTI / "label_2").glob("*.txt"))[:20]:
        matrix, offset = split_projection(read_calib(KITTI / "calib" / file.name))
        frames.append(Frame(file.stem, KITTI / "image_2" / f"{file.stem}.png", matrix, read_labels(file).moved(offset)))
    write_jsonl(tmp_path / "kitti.jsonl", frames)
    assert problems_of(tmp_path / "kitti.jsonl") == []
    for one, two in zip(frames, read_frames(tmp_path / "kitti.jsonl"), strict=True):
        assert one.labels.name.tolist() == two.labels.name.tolist()
        for name in ("size", "center", "yaw", "score", "occlusion"):
            assert getattr(one.labels, name) == pytest.approx(getattr(two.labels, name), abs=1e-5), name
