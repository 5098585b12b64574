"""KITTI files: what is read and written, every error by file and line, and all 7481 real frames."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import KITTI_CAMERAS, KITTI_SIZES

from data import Source
from formats.kitti import frames, read_calib, read_labels, read_split, split_projection, write_calib, write_labels
from scene.frames import UserError, make_labels
from scene.geometry import box_iou, clip_boxes, project_boxes, ray_angle

CAR = "Car 0.10 1 1.50 100.00 120.00 180.00 160.00 1.50 1.80 4.20 -3.00 1.70 20.00 1.35"
DONTCARE = "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10"


def write(tmp_path, *lines):
    path = tmp_path / "000001.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_fields_of_a_label(tmp_path):
    labels = read_labels(write(tmp_path, CAR, "", DONTCARE))
    assert labels.name.tolist() == ["Car", "DontCare"]
    assert labels.size[0].tolist() == [4.2, 1.5, 1.8]  # l, h, w from the file's h, w, l
    np.testing.assert_allclose(labels.center[0], [-3, 1.7 - 0.75, 20])  # the file has the bottom
    assert labels.box[0].tolist() == [100, 120, 180, 160]
    assert (labels.yaw[0], labels.alpha[0], labels.truncation[0], labels.occlusion[0]) == (1.35, 1.5, 0.1, 1)
    assert labels.is_3d.tolist() == [True, False]
    assert labels.center[1].tolist() == [-1000] * 3
    assert labels.score.tolist() == [1, 1]


def test_moving_leaves_dontcare_where_it_is(tmp_path):
    moved = read_labels(write(tmp_path, CAR, DONTCARE)).moved([0.06, 0.1, 0.2])
    np.testing.assert_allclose(moved.center, [[-2.94, 1.05, 20.2], [-1000, -1000, -1000]])


def test_written_lines_are_the_lines_read(tmp_path):
    labels = read_labels(write(tmp_path, CAR, DONTCARE))
    write_labels(tmp_path / "out.txt", labels)
    first, second = (tmp_path / "out.txt").read_text().splitlines()
    assert first == CAR
    assert second.split()[0] == "DontCare"
    assert [float(x) for x in second.split()[1:]] == [float(x) for x in DONTCARE.split()[1:]]


def test_results_carry_scores(tmp_path):
    labels = make_labels(["Car"], [[1, 2, 30, 40]], [[4, 1.5, 1.8]], [[1, 1, 10]], [0.3], score=[0.1234567])
    write_labels(tmp_path / "r.txt", labels, scores=True)
    again = read_labels(tmp_path / "r.txt", scores=True)
    assert again.score[0] == 0.123457
    assert again.truncation[0] == again.occlusion[0] == -1
    assert again.alpha[0] == pytest.approx(0.3 - np.arctan2(1, 10), abs=0.006)
    with pytest.raises(UserError, match=r"expected 16 fields \(a result has a score\), got 15"):
        read_labels(write(tmp_path, CAR), scores=True)


def test_an_empty_file_is_a_frame_without_objects(tmp_path):
    labels = read_labels(write(tmp_path, ""))
    assert len(labels) == 0
    assert labels.box.shape == (0, 4)
    write_labels(tmp_path / "out.txt", labels)
    assert (tmp_path / "out.txt").read_text() == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (" ".join(CAR.split()[:14]), "expected 15 or 16 fields, got 14"),
        (CAR + " 0.5 7", "expected 15 or 16 fields, got 17"),
        (CAR.replace("1.80", "nan"), "field 10 is nan, expected a finite number"),
        (CAR.replace(" 20.00", " inf"), "field 14 is inf, expected a finite number"),
        (
            CAR.replace("-3.00", "left"),
            "expected numbers after the class name: could not convert string to float: 'left'",
        ),
        (CAR.replace("1.80", "0.00"), "h, w, l are 1.5, 0, 4.2, expected numbers from 0.01 to 100"),
        (CAR.replace("1.80", "1e-320"), "h, w, l are 1.5, 9.99989e-321, 4.2, expected numbers from 0.01 to 100"),
        (CAR.replace("4.20", "420.0"), "h, w, l are 1.5, 1.8, 420, expected numbers from 0.01 to 100"),
        (CAR.replace("-3.00", "1e8"), "x, y, z are 1e+08, 1.7, 20, expected numbers from -10000 to 10000"),
        (CAR.replace("1.35", "90"), "rotation_y is 90, expected numbers from -6.3 to 6.3"),
        (CAR.replace("180.00", "2e6"), "2D box is 100, 120, 2e+06, 160, expected numbers from -1e+06 to 1e+06"),
        (DONTCARE.replace("590.61", "2e6"), "2D box is 503.89, 169.71, 2e+06, 190.13, expected numbers from -1e+06"),
        (CAR.replace("180.00", "90.00"), "2D box 100 120 90 160 is inside out"),
        (DONTCARE.replace("190.13", "100"), "is inside out, expected x1 <= x2, y1 <= y2"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = write(tmp_path, CAR, line, CAR)
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(words)):
        read_labels(path)


def test_results_may_hold_what_the_official_evaluator_takes(tmp_path):
    """No 3D box in two ways, an empty 2D box, and numbers beyond any label's."""
    lines = [
        "Car -1 -1 -10 1 2 30 40 -1 -1 -1 -1000 -1000 -1000 -10 0.9",
        "Car -1 -1 1.2 9 9 5 5 0 0 0 -1 -1 -1 -1 -30",
    ]
    lines.append("Car -1 -1 1.2 0 0 2e6 9 900 1 1e-9 2e4 2 3 90 2e6")
    labels = read_labels(write(tmp_path, *lines), scores=True)
    assert labels.score.tolist() == [0.9, -30, 2e6]
    assert labels.is_3d.tolist() == [False, False, True]


def test_byte_order_marks_are_no_part_of_a_file(tmp_path):
    mark = "\ufeff"
    assert read_labels(write(tmp_path, mark + CAR)).name.tolist() == ["Car"]
    assert read_labels(write(tmp_path, f"{mark}{CAR} 0.5"), scores=True).name.tolist() == ["Car"]
    P2 = "P2: 700 0 600 45 0 700 180 0 0 0 1 0"
    assert read_calib(write(tmp_path, mark + P2))[0, 0] == 700
    (tmp_path / "ImageSets").mkdir()
    write(tmp_path, mark + "000003").rename(tmp_path / "ImageSets/train.txt")
    assert read_split(tmp_path, "train") == ["000003"]


def test_names_of_several_words_are_written_as_one(tmp_path):
    names = ["traffic cone", "地\u3000铁 车", "Ümläut"]
    labels = make_labels(
        names, np.tile([1, 2, 30, 40], (3, 1)), np.ones((3, 3)), np.tile([1, 1, 10], (3, 1)), np.zeros(3)
    )
    write_labels(tmp_path / "a.txt", labels)
    assert read_labels(tmp_path / "a.txt").name.tolist() == ["traffic_cone", "地_铁_车", "Ümläut"]


def test_other_files_are_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"binary\.txt: not a text file"):
        read_labels(tmp_path / "binary.txt")
    with pytest.raises(UserError, match=r"binary\.txt: not a text file"):
        read_calib(tmp_path / "binary.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_labels(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("P0: 1 2 3\nP3: 4\n", r"calib\.txt: no line 'P2: \.\.\.'"),
        ("P0: 1\nP2: 1 2 3\n", r"calib\.txt:2: P2 has 3 values, expected 12"),
        ("P2: 700 0 600 0 0 700 180 0 0 0 1 nan\n", r"calib\.txt:1: field 13 is nan, expected a finite number"),
        ("P2: 700 0 600 0 0 700 180 0 0 0 1 x\n", r"calib\.txt:1: expected numbers after P2: .*'x'"),
        ("P2: 1 0 600 9e7 0 700 180 0 0 0 1 0\n", r"calib\.txt:1: P2 is not a pinhole camera near camera 0"),
        ("P2: 0 0 600 0 0 700 180 0 0 0 1 0\n", r"calib\.txt:1: P2 is not a pinhole camera near camera 0"),
    ],
)
def test_bad_calibrations_are_named(tmp_path, text, words):
    (tmp_path / "calib.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        read_calib(tmp_path / "calib.txt")


@pytest.mark.parametrize("camera", KITTI_CAMERAS)
def test_projection_splits_into_camera_and_offset(tmp_path, camera):
    fx, cx, px, fy, cy, py, pz = camera
    P2 = np.array([[fx, 0, cx, px], [0, fy, cy, py], [0, 0, 1, pz]])
    write_calib(tmp_path / "calib.txt", P2)
    np.testing.assert_allclose(read_calib(tmp_path / "calib.txt"), P2, rtol=1e-12)
    K, offset = split_projection(P2)
    point = np.array([3.0, 1.5, 12])
    expected = P2 @ [*point, 1]
    moved = K @ (point + offset)
    np.testing.assert_allclose(moved, expected, rtol=1e-12)
    assert 0.055 < offset[0] < 0.062  # the colour camera stands 6 cm to the right of camera 0's left


def test_splits(tmp_path):
    (tmp_path / "ImageSets").mkdir()
    with pytest.raises(UserError, match=r"ImageSets/val\.txt: no such split file; there are none"):
        read_split(tmp_path, "val")
    (tmp_path / "ImageSets/train.txt").write_text("000003\n000001\n\n")
    (tmp_path / "ImageSets/none.txt").write_text("\n")
    assert read_split(tmp_path, "train") == ["000003", "000001"]
    with pytest.raises(UserError, match=r"val\.txt: no such split file; there are none, train"):
        read_split(tmp_path, "val")
    with pytest.raises(UserError, match=r"none\.txt: the split is empty, expected one frame id a line"):
        read_split(tmp_path, "none")
    (tmp_path / "training/image_2").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "notes.txt"):
        (tmp_path / "training/image_2" / name).write_text("")
    assert read_split(tmp_path, "all") == ["a", "b"]
    (tmp_path / "mine.txt").write_text("b\n")
    assert read_split(tmp_path, str(tmp_path / "mine.txt")) == ["b"]
    with pytest.raises(UserError, match=r"yours\.txt: no such split file; there are mine"):
        read_split(tmp_path, str(tmp_path / "yours.txt"))


def read_testing(root, problems=None):
    return frames(Source(root=str(root), split=("testing",)), None, problems)


def test_the_testing_half_has_cameras_and_no_labels(tmp_path):
    """KITTI's own: all images there, or those of ImageSets/test.txt where that is."""
    with pytest.raises(UserError, match="expected a KITTI folder with testing/image_2 and testing/calib"):
        read_testing(tmp_path)
    (tmp_path / "testing/image_2").mkdir(parents=True)
    (tmp_path / "testing/calib").mkdir()
    for id in ("000002", "000000"):
        (tmp_path / f"testing/image_2/{id}.png").write_text("")
        write_calib(tmp_path / f"testing/calib/{id}.txt", np.array([[700, 0, 600, 45], [0, 700, 180, 0], [0, 0, 1, 0]]))
    first, second = read_testing(tmp_path)
    assert (first.id, second.id) == ("000000", "000002")
    assert len(first.labels) == len(second.labels) == 0
    assert first.image == tmp_path / "testing/image_2/000000.png"
    assert first.K[0, 0] == 700
    assert first.offset[0] == pytest.approx(45 / 700)
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets/test.txt").write_text("000002\n000007\n")
    with pytest.raises(UserError, match=r"testing/image_2/000007\.png: no such image, named by ImageSets/test\.txt"):
        read_testing(tmp_path)
    problems = []
    assert [frame.id for frame in read_testing(tmp_path, problems)] == ["000002"]
    assert len(problems) == 1
    (tmp_path / "testing/calib/000002.txt").unlink()
    with pytest.raises(UserError, match=r"testing/calib/000002\.txt: frame 000002 of split testing has no calib file"):
        read_testing(tmp_path)


def test_all_real_files_parse(kitti_frames):
    """Counts as data's publishers give them."""
    assert len(kitti_frames) == 7481
    names, counts = np.unique(
        np.concatenate([labels.name for _, labels, _, _ in kitti_frames]).astype(str), return_counts=True
    )
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {
        "Car": 28742, "Cyclist": 1627, "DontCare": 11295, "Misc": 973, "Pedestrian": 4487, "Person_sitting": 222,
        "Tram": 511, "Truck": 1094, "Van": 2914,
    }  # fmt: skip
    assert {round(K[0, 0], 4) for _, _, K, _ in kitti_frames} == set(KITTI_SIZES)


def test_all_real_labels_survive_the_round_trip_through_the_camera(kitti_frames, kitti_folder, tmp_path):
    """Into the colour camera's frame, back to camera 0, to a file and in again: equal to the files' two decimals."""
    for id, labels, _, offset in kitti_frames:
        path = tmp_path / f"{id}.txt"  # anew: to open a file that holds something for writing takes ten times as long
        write_labels(path, labels.moved(offset).moved(-offset))
        for line, original in zip(
            path.read_text().splitlines(), (kitti_folder / f"label_2/{id}.txt").read_text().splitlines(), strict=True
        ):
            ours, theirs = line.split(), original.split()
            assert ours[0] == theirs[0]
            a, b = np.array(ours[1:], float), np.array(theirs[1:], float)
            turn = np.abs(a[-1] - b[-1])
            a[-1] = b[-1] if abs(turn - 2 * np.pi) < 0.011 else a[-1]  # 3.14 is -3.14, but only for the heading
            assert np.abs(a - b).max() < 0.0051, f"{id}: {line} from {original}"


def test_all_real_boxes_project_onto_their_labels(kitti_frames):
    ious, angles, sides = [], [], []
    for _, raw, K, offset in kitti_frames:
        labels = raw.moved(offset)
        clear = labels[(labels.name == "Car") & (raw.truncation == 0) & (raw.occlusion == 0)]
        full, _ = project_boxes(clear.center, clear.size, clear.yaw, K)
        shown = clip_boxes(full, *KITTI_SIZES[round(K[0, 0], 4)])
        ious.append(box_iou(shown, clear.box))
        sides.append(np.abs(shown - clear.box))
        difference = clear.alpha - (clear.yaw - ray_angle(clear.center - offset))
        angles.append(np.abs((difference + np.pi) % (2 * np.pi) - np.pi))
    assert np.median(np.concatenate(ious)) >= 0.97
    assert np.median(np.concatenate(sides), axis=0).max() < 0.7
    assert np.concatenate(angles).max() < 0.03


def test_rows_can_be_chosen(tmp_path):
    labels = read_labels(write(tmp_path, CAR, DONTCARE, CAR.replace("Car", "Van")))
    chosen = labels[np.array([2, 0])]
    assert chosen.name.tolist() == ["Van", "Car"]
    columns = [getattr(chosen, field.name) for field in dataclasses.fields(chosen)]
    assert {len(column) for column in columns if column is not None} == {2}
    assert chosen.sigma is None
