"""Cameras and images that are not what their tables say are told or refused by every reader, and by the runtime."""

import json
import struct
import tarfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from data import DataConfig, Detection3D, Source, open_source
from formats import jsonl
from formats.kitti import frames, read_calib, write_calib
from formats.odd import distortion_problem
from lab.measure_house import write_frames
from predict import read_cameras
from scene.frames import Frame, UserError, make_labels
from scene.geometry import camera_problem
from tools.check_data import main as check_data

K = np.array([[700.0, 0, 320], [0, 700, 96], [0, 0, 1]])


@pytest.fixture
def kitti(tmp_path):
    """Two frames of 160x64."""
    write_frames(tmp_path / "kitti")
    return tmp_path / "kitti"


def model(**changes):
    fields = {"classes": ("Car", "Pedestrian", "Cyclist"), "size": (96, 320), "velocity": False, "attribute_names": ()}
    return SimpleNamespace(**fields | changes)


# ---- cameras


@pytest.mark.parametrize(
    ("key", "value", "distorted"),
    [
        ("D", "-0.3 0.1 0 0 0", True), ("D2", "0 0 0 0 0", False), ("D_02", "1e-3 0 0 0 0", True), ("P2", "7 0", False),
        ("distortion_coefficients", [0.1], True), ("camera_distortion", [], False), ("k1", -0.2, True), ("k", 1, False),
        ("dist_coeffs", "0.0 0.0", False), ("R0_rect", "1 0 0", False), ("K_02", "700 0", False), ("xi", 1.2, True),
        ("Tr_velo_to_cam", "1 2", False), ("distance", 5, False), ("distortion_model", "plumb_bob", False),
        ("undistorted", 1, False), ("dist", 12.5, False), ("dist", [0.1, -0.2], True), ("no_distortion", 1, False),
    ],
)  # fmt: skip
def test_keys_of_distortion(key, value, distorted):
    assert bool(distortion_problem(key, value)) == distorted


def test_distorted_images_are_refused_by_every_reader(tmp_path):
    path = tmp_path / "calib.txt"
    write_calib(path, np.column_stack([K, np.zeros(3)]))
    assert read_calib(path)[0, 0] == 700
    projection = path.read_text()
    path.write_text("D_02: -0.37 0.2 0 0 -0.07\nP_rect_02: 7 0\n")  # raw KITTI's file, whose images are rectified
    with pytest.raises(UserError, match=r"calib\.txt: no line 'P2: "):
        read_calib(path)
    path.write_text(projection + "D2: -0.37 0.2 0 0 -0.07\n")
    with pytest.raises(UserError, match=r"calib\.txt:7: D2 is -0\.37 .*expected undistorted ones.*cv2\.undistort"):
        read_calib(path)
    Image.new("RGB", (640, 192)).save(tmp_path / "a.png")
    line = {"image": "a.png", "K": K.tolist(), "objects": []}
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(line | {"distortion": [0.1, 0, 0, 0]}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the line has an unknown key 'distortion'.*undistorted"):
        jsonl.read_frames(lines)
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*undistorted"):
        read_cameras(lines)
    lines.write_text(json.dumps(line | {"dist": [0, 0]}) + "\n")
    assert len(read_cameras(lines)) == 1


def skewed(skew):
    camera = K.copy()
    camera[0, 1] = skew
    return camera


@pytest.mark.parametrize(("skew", "taken"), [(0.001, True), (-0.5, True), (0.51, False), (-3, False)])
def test_skew(tmp_path, kitti, caplog, skew, taken):
    camera = skewed(skew)
    problem = camera_problem(camera, 640, 192)
    assert (problem is None) == taken
    if not taken:
        assert "skew" in problem
        assert "rectify" in problem
    for path in (kitti / "training/calib").iterdir():
        P2 = read_calib(path)
        P2[0, 1] = skew
        write_calib(path, P2)
    part = open_source(Source(root=str(kitti)), DataConfig())
    dataset = Detection3D(part.frames, model(), DataConfig())
    if taken:
        assert f"K has a skew of {abs(skew):.2g} px in its first row" in caplog.text
        assert dataset[0]["image"].shape == (96, 320, 3)
    else:
        with pytest.raises(UserError, match=r"skew .*rectify"):
            dataset[0]


def test_the_exported_runtime_has_the_same_limits(tmp_path):
    pytest.importorskip("onnxruntime", reason="the exported runtime needs it")
    from examples.onnx_detector import OnnxDetector, place

    image = Image.new("RGB", (640, 192))
    for skew in (0.001, 0.5, 0.51, -3):
        camera = skewed(skew)
        assert _places(place, image, camera) == (camera_problem(camera, 640, 192) is None)
    for at, value in (((0, 0), 5), ((1, 1), -700), ((0, 2), 5000), ((1, 2), -400), ((0, 0), np.nan), ((2, 2), 2)):
        camera = K.copy()
        camera[at] = value
        assert not _places(place, image, camera)
        assert camera_problem(camera, 640, 192)
    assert OnnxDetector.predict_batch(SimpleNamespace(config={"size": (96, 320)}, names=[]), [], []) == []


def _places(place, image, camera):
    try:
        place(image, camera, (96, 320))
    except ValueError as error:
        return "K is [[" not in str(error)
    return True


# ---- images


def test_an_image_of_another_size_than_its_line_says(tmp_path):
    Image.new("RGB", (320, 96)).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    path = tmp_path / "a.jsonl"
    for image in ("a.png", "b.tar/a.png"):
        line = {"image": image, "K": K.tolist(), "objects": [], "width": 320, "height": 96}
        path.write_text(json.dumps(line) + "\n")
        assert [frame.size for frame in jsonl.read_frames(path)] == [(320, 96)]
        for wrong in ({"width": 640, "height": 192}, {"width": None}, {"height": "96"}):
            path.write_text(json.dumps(line | wrong) + "\n")
            with pytest.raises(UserError, match=r"a\.jsonl:1: width and height are .*, and the image is 320x96"):
                jsonl.read_frames(path)
            with pytest.raises(UserError, match="width and height are"):
                jsonl.frames(Source(kind="jsonl", root=str(path)), DataConfig(index=str(tmp_path / "index")))


def test_images_of_another_size_than_their_cameras(kitti, caplog, capsys):
    """KITTI's tables know no size, and its 2D boxes would be cut: told by the principal point."""
    paths = sorted((kitti / "training/image_2").iterdir())
    source = Source(root=str(kitti), split=("train", "val"))
    dataset = Detection3D(frames(source, DataConfig()), model(), DataConfig())
    dataset[0]
    assert not caplog.records
    for path in paths:
        Image.open(path).resize((80, 32)).save(path)
    dataset[0]
    dataset[1]
    [record] = caplog.records
    assert record.message == f"{dataset.frames[0].image}: 80x32 px, and K looks like that of another size"
    assert check_data([str(ROOT / "configs/kitti.py"), f"data.root={kitti}", "model.size=96,320"]) == 1
    assert "K looks like that of an image about 2.0 times as large as the files" in capsys.readouterr().out


def write_deep(path, values):
    """A PNG of 16 bits a value, grey (h, w) or RGB (h, w, 3), which Pillow cannot write."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 2 * (values.ndim - 2), 0, 0, 0)}
    chunks |= {b"IDAT": zlib.compress(rows), b"IEND": b""}
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks.items()]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("shape", [(192, 640), (192, 640, 3)])
@pytest.mark.parametrize(("bits", "told"), [(10, True), (12, True), (14, True), (16, False)])
def test_few_bits_in_16_are_told_once(tmp_path, caplog, shape, bits, told):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path in paths:
        write_deep(path, np.random.default_rng(0).integers(0, 2**bits, shape))
    dataset = Detection3D([Frame(path.name, path, K, make_labels(*[[]] * 5)) for path in paths], model(), DataConfig())
    assert dataset[0]["image"].float().mean() + dataset[1]["image"].float().mean() < 64 or not told
    assert len(caplog.records) == told
    assert not told or f"{paths[0]}: its 16-bit values reach about" in caplog.text


def test_a_dark_image_of_8_bits_is_not_told(tmp_path, caplog):
    Image.new("RGB", (640, 192), (3, 2, 1)).save(tmp_path / "a.png")
    Detection3D([Frame("a", tmp_path / "a.png", K, make_labels(*[[]] * 5))], model(), DataConfig())[0]
    assert not caplog.records


# ---- a file that is no JSON lines


def test_one_json_value_instead_of_lines_is_one_sentence(tmp_path, capsys):
    lines = [{"image": f"{number}.png", "K": K.tolist(), "objects": []} for number in range(50)]
    path = tmp_path / "a.json"
    for text, words in (
        (json.dumps(lines), "one JSON array, expected an object a line"),
        (json.dumps(lines, indent=2), "one JSON array"),
        ("\n [\n" + ",\n".join(map(json.dumps, lines)) + "]", "one JSON array"),
        ("\n".join(json.dumps(line, indent=1) for line in lines), "ends within an object"),
        (json.dumps({"info": {}, "images": [], "annotations": []}), "python -m formats.omni3d"),
    ):
        path.write_text(text)
        assert jsonl.main([str(path)]) == 1
        out = capsys.readouterr().out
        assert words in out
        assert out.count(f"{path}:1: ") == 1
        with pytest.raises(UserError, match=r"a\.json:1: "):
            jsonl.frames(Source(kind="jsonl", root=str(path)), DataConfig(index=str(tmp_path / "index")))
