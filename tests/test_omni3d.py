"""The converter of Omni3D: an invented file, with every kind of object, becomes JSON lines that pass their check."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from formats import jsonl
from formats.omni3d import main, upright_yaw

K = [[500.0, 0, 320], [0, 500, 120], [0, 0, 1]]


def turn(x=0.0, y=0.0, z=0.0):
    """Rotation about x, then z, then y, degrees."""
    (a, b, c), (s, t, u) = np.cos(np.radians([x, y, z])), np.sin(np.radians([x, y, z]))
    about_x = np.array([[1, 0, 0], [0, a, -s], [0, s, a]])
    about_y = np.array([[b, 0, t], [0, 1, 0], [-t, 0, b]])
    return about_y @ np.array([[c, -u, 0], [u, c, 0], [0, 0, 1]]) @ about_x


def omni3d_corners(center, dimensions, R):
    """The eight corners in the order of Cube R-CNN's get_cuboid_verts_faces: length along x, height y, width z."""
    w, h, l = dimensions
    x = np.array([-l, l, l, -l, -l, l, l, -l]) / 2
    y = np.array([-h, -h, h, h, -h, -h, h, h]) / 2
    z = np.array([-w, -w, -w, -w, w, w, w, w]) / 2
    return (R @ np.array([x, y, z])).T + center


def make_object(id, image_id=0, name="car", center=(1.0, 1.0, 20.0), dimensions=(1.7, 1.5, 4.2), R=None, **changes):
    R = turn(y=-75) if R is None else R
    blank = [-1, -1, -1, -1]
    entry = {
        "id": id, "image_id": image_id, "category_id": 3, "category_name": name, "valid3D": True, "bbox2D_tight": blank,
        "bbox2D_proj": blank, "bbox2D_trunc": blank, "bbox3D_cam": omni3d_corners(center, dimensions, R).tolist(),
        "center_cam": list(center), "dimensions": list(dimensions), "R_cam": R.tolist(), "behind_camera": False,
        "visibility": -1,
        "truncation": -1, "segmentation_pts": -1, "lidar_pts": -1, "depth_error": -1,
    }  # fmt: skip
    return {**entry, **changes}


OBJECTS = [
    make_object(1, bbox2D_tight=[300, 100, 390, 170], truncation=0.0, visibility=0.9),
    make_object(2, name="night stand", center=(-2, 0.5, 8), dimensions=(0.5, 0.6, 0.4), R=turn(y=20), visibility=0.3),
    make_object(
        3, center=(4, 1, 15), R=turn(y=130) @ turn(x=180), bbox2D_trunc=[400, 100, 500, 180], truncation=0.4
    ),  # upside down
    make_object(4, center=(0, 1, 30), R=turn(y=40, x=12), visibility=0.5),
    make_object(5, center=(3, 1, 30), R=turn(y=-160, x=-4, z=3)),
    make_object(6, image_id=7, valid3D=False, dimensions=(-1, -1, -1), bbox2D_tight=[10, 10, 60, 50]),
    make_object(7, image_id=7, valid3D=False, bbox2D_proj=[-50, 20, 100, 90]),
    make_object(8, image_id=7, valid3D=False),
    make_object(9, image_id=7, behind_camera=True, bbox2D_trunc=[0, 0, 90, 239]),
    make_object(10, image_id=7, lidar_pts=0, bbox2D_proj=[20, 20, 40, 40]),
    make_object(11, image_id=7, center=(60, 1, 20)),  # right of the image
    make_object(12, image_id=7, center=(5, 1, 40), behind_camera=-1, segmentation_pts=9, depth_error=0.2, ignore=False),
]


@pytest.fixture
def omni3d(tmp_path):
    """The invented file in Omni3D's layout: annotations in Omni3D/, images beside it."""
    (tmp_path / "Omni3D").mkdir()
    (tmp_path / "SUN/kv1").mkdir(parents=True)
    images = []
    for id, name in ((0, "a.jpg"), (7, "b c.jpg")):
        Image.new("RGB", (640, 240)).save(tmp_path / "SUN/kv1" / name)
        images.append({"id": id, "dataset_id": 1, "width": 640, "height": 240, "file_path": f"SUN/kv1/{name}", "K": K})
    names = sorted({entry["category_name"] for entry in OBJECTS})
    source = {
        "info": {"name": "invented", "split": "train"},
        "images": images,
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(names)],
        "annotations": OBJECTS,
    }
    write(tmp_path, source)
    return tmp_path, source


def write(folder, source):
    (folder / "Omni3D/in.json").write_text(json.dumps(source))


def convert(folder, *more):
    return main([str(folder / "Omni3D/in.json"), str(folder / "out.jsonl"), *more])


def test_every_object_keeps_its_corners_and_the_result_passes_the_check(omni3d, capsys):
    folder, _ = omni3d
    assert convert(folder) == 0
    text = capsys.readouterr().out
    assert jsonl.main([str(folder / "out.jsonl")]) == 0, capsys.readouterr().out
    frames = jsonl.read_frames(folder / "out.jsonl")
    assert [frame.id for frame in frames] == ["SUN/kv1/a", "SUN/kv1/b c"]
    np.testing.assert_array_equal(frames[0].K, K)
    found = frames[0].labels
    assert found.name.tolist() == ["car", "night stand", "car", "car", "car"]
    for i, entry in enumerate(OBJECTS[:3]):  # those turned about y alone, up to the order of the corners
        distance = np.linalg.norm(found.corners()[i][:, None] - np.array(entry["bbox3D_cam"])[None], axis=-1)
        assert distance.min(1).max() < 1e-3
        assert sorted(distance.argmin(1)) == list(range(8))
    np.testing.assert_allclose(np.degrees(found.yaw[:3]), [-75, 20, 130], atol=1e-3)
    np.testing.assert_allclose(found.size[0], [4.2, 1.5, 1.7])
    np.testing.assert_allclose(found.box[0], [300, 100, 390, 170])  # tight
    np.testing.assert_allclose(found.box[2], [400, 100, 500, 180])  # truncated projection
    assert found.truncation.tolist() == [0, -1, 0.4, -1, -1]  # -1 is unknown
    assert found.occlusion.tolist() == [0, 2, -1, 1, -1]
    assert "2 frames with 6 objects: 5 car; 1 night stand" in text
    assert "2 of 6 boxes are not turned about y alone: the detector knows yaw alone" in text


def test_what_is_ignored_and_what_is_left_out(omni3d, capsys):
    folder, _ = omni3d
    assert convert(folder) == 0
    text = capsys.readouterr().out
    labels = jsonl.read_frames(folder / "out.jsonl")[1].labels
    assert labels.name.tolist() == ["car", *["DontCare"] * 4]
    np.testing.assert_allclose(labels.box[1:], [[10, 10, 60, 50], [0, 20, 100, 90], [0, 0, 90, 239], [20, 20, 40, 40]])
    assert "4 ignore regions: 2 without a reliable 3D box; 1 reaching behind the camera; 1 not seen" in text
    assert "2 left out: 1 ignored ones without a 2D box in the image; 1 outside the image" in text
    assert text.rstrip().endswith(f"python -m formats.jsonl {folder / 'out.jsonl'} checks it")


def test_rotations_about_other_axes_are_measured(omni3d, capsys):
    folder, source = omni3d
    tilts = {4: 12.0, 5: 5.0}  # the second is -4 about x and 3 about z
    for entry in OBJECTS:
        assert upright_yaw(np.array(entry["R_cam"]))[1] == pytest.approx(tilts.get(entry["id"], 0), abs=0.01)
    yaw, tilt = upright_yaw(turn(x=12, y=40))
    assert math.degrees(yaw) == pytest.approx(40)
    assert tilt == pytest.approx(12)
    assert upright_yaw(turn(z=90))[1] == pytest.approx(90)
    convert(folder)
    text = capsys.readouterr().out
    assert "differ by degrees: 8.5 in the mean, 12.0 at most\n" in text
    write(folder, {**source, "annotations": OBJECTS[:3]})
    convert(folder)
    assert "0 of 3 boxes are not turned about y alone\n" in capsys.readouterr().out


def test_images_that_are_not_there(omni3d, capsys):
    folder, _ = omni3d
    (folder / "SUN/kv1/a.jpg").unlink()
    assert convert(folder) == 0
    assert (
        f"1 images are not there, and their frames are left out: the first is {folder / 'SUN/kv1/a.jpg'}"
        in capsys.readouterr().out
    )
    assert len(jsonl.read_frames(folder / "out.jsonl")) == 1
    (folder / "SUN/kv1/b c.jpg").unlink()
    assert convert(folder) == 2
    assert "SUN/kv1/a.jpg: no such image in" in capsys.readouterr().err
    assert convert(folder, "--images", str(folder)) == 2
    assert "a.jpg: no such image, nor any of the other 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("annotations", {}, "expected an Omni3D file, an object with the lists 'images' and 'annotations'"),
        ("images", [], "it lists no images"),
        ("images", [{"id": 3}], 'image {"id": 3} lacks file_path, width, height, K'),
        (
            "images",
            [{"id": 0, "width": 640, "height": 240, "file_path": "SUN/kv1/a.jpg", "K": [1, 2]}],
            "image 0: K is [1, 2], expected 3x3",
        ),
        (
            "images",
            [{"id": 0, "width": "w", "height": 240, "file_path": "a", "K": K}],
            'image 0: width is "w", expected a whole number',
        ),
        ("annotations", [3], "annotation 3 lacks id, image_id, category_name, valid3D"),
        (
            "annotations",
            [make_object(5, image_id=[9])],
            "annotation 5: image_id is [9], expected the id of one of 2 images",
        ),
        ("annotations", [make_object(5, R_cam=None)], "annotation 5: R_cam is null, expected 3x3 finite numbers"),
        (
            "annotations",
            [make_object(5, center_cam=[1, 2, "x"])],
            'annotation 5: center_cam is [1, 2, "x"], expected 3 finite numbers',
        ),
        ("annotations", [make_object(5, R_cam=np.diag([1, 1, -1]).tolist())], "expected a rotation"),
    ],
)
def test_wrong_files_end_in_one_sentence(omni3d, capsys, key, value, words):
    folder, source = omni3d
    changed = {**source, key: value}
    write(folder, changed if key != "images" else {**changed, "annotations": []})
    assert convert(folder) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {folder / 'Omni3D/in.json'}: ")
    assert words in message
    assert message.count("\n") == 1
    assert not (folder / "out.jsonl").exists()


def test_wrong_command_lines_end_in_one_sentence(omni3d, capsys):
    folder, _ = omni3d
    assert main([str(folder / "none.json"), str(folder / "out.jsonl")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
    for target in (folder / "none/out.jsonl", folder / "Omni3D/in.json"):
        assert main([str(folder / "Omni3D/in.json"), str(target)]) == 2
        assert f"cannot write to {target}: expected another file, in a folder that is there" in capsys.readouterr().err
    (folder / "Omni3D/in.json").write_text("{")
    assert convert(folder) == 2
    assert "in.json: not JSON" in capsys.readouterr().err


def test_an_image_of_another_size_than_the_file_says(omni3d, capsys):
    """Boxes and K are for the size that is written: training would go on with a wrong K."""
    folder, source = omni3d
    path = folder / "SUN/kv1/a.jpg"
    Image.new("RGB", (320, 120)).save(path)
    assert convert(folder) == 2
    assert f"image 0: width and height are 640 and 240, and {path} is 320x120" in capsys.readouterr().err
    for width in (None, "640", 0):
        source["images"][0]["width"] = width
        write(folder, source)
        assert convert(folder) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_distortion_and_what_may_be_absent(omni3d, capsys):
    folder, source = omni3d
    for entry in source["annotations"]:
        del entry["bbox3D_cam"]
    source["images"][1]["distortion"] = [0, 0, 0, 0]
    write(folder, source)
    assert convert(folder) == 0
    source["images"][1]["distortion"] = [0.1, 0, 0, 0]
    write(folder, source)
    assert convert(folder) == 2
    assert "image 7: distortion is [0.1, 0, 0, 0]: it tells of distorted images" in capsys.readouterr().err
