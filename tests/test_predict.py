"""The prediction command: what it writes agrees with `Detector.predict`, and every mistake ends in one sentence and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from checkpoint import save_weights
from config import Config, to_dict
from formats.jsonl import read_frames
from formats.kitti import read_calib, read_labels, split_projection, write_calib
from model import Detector, ModelConfig
from predict import load_detector, main, open_image, unique_names

P2 = np.array([[140.0, 0, 160, 9], [0, 140, 48, 1], [0, 0, 1, 0.01]])
MODEL = ModelConfig(
    size=(96, 320),
    size_prior=((4, 1.5, 1.7), (0.8, 1.7, 0.6), (1.7, 1.7, 0.6)),
    depth_mean=(30.0, 20.0, 10.0),
    depth_std=(10.0, 8.0, 5.0),
    score_threshold=0.01,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an untrained detector: it finds something in any image, with low scores."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    torch.manual_seed(0)
    save_weights(folder / "best", Detector(MODEL), to_dict(Config(model=MODEL)), {}, {})
    return folder


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "frame.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 320, 3), np.uint8)).save(path)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The default output folder lies in the working directory."""
    monkeypatch.chdir(tmp_path)


def fails(capsys, *arguments):
    """The sentence with which a command line is refused."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ")
    assert "\n" not in text
    return text


def test_outputs_agree_with_predict_and_kitti_files_lie_in_camera_0(run, image, tmp_path):
    write_calib(tmp_path / "calib.txt", P2)
    out = tmp_path / "out"
    assert main([str(run), str(image), "--calib", str(tmp_path / "calib.txt"), "--out", str(out)]) == 0
    K, offset = split_projection(read_calib(tmp_path / "calib.txt"))
    found = load_detector(str(run)).predict(image, K)
    assert len(found)
    [record] = read_frames(out / "predictions.jsonl")
    assert record.image.samefile(image)
    assert np.allclose(record.K, K)
    assert record.labels.center == pytest.approx(found.center, abs=1e-5)
    assert record.labels.yaw == pytest.approx(found.yaw, abs=1e-5)
    assert record.labels.score == pytest.approx(found.score, abs=1e-5)
    assert record.labels.sigma == pytest.approx(found.sigma, abs=1e-5)
    results = read_labels(out / "results/frame.txt", scores=True)
    assert results.center == pytest.approx(found.center - offset, abs=2e-4)
    assert results.size == pytest.approx(found.size, abs=1e-4)
    assert np.abs(offset).min() > 1e-3
    assert Image.open(out / "pictures/frame.png").width > 1440


def test_intrinsics_and_the_equal_field_of_view_give_equal_boxes(run, image, tmp_path):
    """A camera of 2 * atan(160 / 140) degrees with its axis in the middle of 320x96 pixels."""
    main([str(run), str(image), "--intrinsics", "140", "140", "159.5", "47.5", "--out", str(tmp_path / "a")])
    main([str(run), str(image), "--hfov", str(np.degrees(2 * np.arctan(160 / 140))), "--out", str(tmp_path / "b")])
    one, two = (json.loads((tmp_path / name / "predictions.jsonl").read_text()) for name in "ab")
    assert one["K"][0][0] == pytest.approx(two["K"][0][0])
    assert [o["center"] for o in one["objects"]] == [pytest.approx(o["center"], abs=1e-4) for o in two["objects"]]
    results = read_labels(tmp_path / "a/results/frame.txt", scores=True)
    assert results.center[0] == pytest.approx(one["objects"][0]["center"], abs=1e-3)


def test_min_score_is_what_is_written(run, image, tmp_path):
    found = load_detector(str(run)).predict(image, np.array([[140.0, 0, 160], [0, 140, 48], [0, 0, 1]]))
    level = float(found.score[len(found) // 2])
    main([str(run), str(image), "--intrinsics", "140", "140", "160", "48", "--min-score", str(level), "--out", str(tmp_path / "o")])
    labels = read_frames(tmp_path / "o/predictions.jsonl")[0].labels
    assert len(labels) == (found.score >= level).sum()
    assert labels.score.min() >= level - 1e-6


def test_a_checkpoint_folder_is_a_run_too(run):
    one, two = load_detector(str(run)).state_dict(), load_detector(str(run / "best")).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "jpg", "16"])
def test_any_image_becomes_rgb(tmp_path, kind):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (20, 1))
    path = tmp_path / ("x.jpg" if kind == "jpg" else "x.tif" if kind == "CMYK" else "x.png")
    if kind == "16":
        Image.fromarray(ramp.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(np.stack([ramp] * 3, -1)).convert("RGB" if kind == "jpg" else kind).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (256, 20))
    if kind not in ("1", "P", "jpg"):
        assert np.array_equal(np.asarray(image), np.stack([ramp] * 3, -1))


def test_a_turned_photograph_is_seen_upright(run, tmp_path):
    """By predict.py, and by Detector.predict from a path or an image: K is that of the picture as viewers show it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    pixels = np.random.default_rng(0).integers(0, 255, (96, 320, 3), np.uint8)
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "phone.png")), pixels)
    K = np.array([[140.0, 0, 160], [0, 140, 48], [0, 0, 1]])
    detector = load_detector(str(run))
    expected = detector.predict(pixels, K)
    for image in (tmp_path / "phone.png", Image.open(tmp_path / "phone.png")):
        np.testing.assert_array_equal(detector.predict(image, K).box, expected.box)
    assert main([str(run), str(tmp_path / "phone.png"), "--intrinsics", "140", "140", "160", "48", "--out", str(tmp_path / "o")]) == 0
    np.testing.assert_allclose(read_frames(tmp_path / "o/predictions.jsonl")[0].labels.box, expected.box, atol=1e-4)


def test_errors_about_the_camera(run, image, tmp_path, capsys):
    assert "expected one of --calib FILE, --intrinsics FX FY CX CY and --hfov DEG, got none" in fails(capsys, run, image)
    assert "got --intrinsics and --hfov" in fails(capsys, run, image, "--hfov", 80, "--intrinsics", 1, 2, 3, 4)
    for angle in (0, 180, -5, "nan"):
        assert "expected degrees between 0 and 180" in fails(capsys, run, image, "--hfov", angle)
    assert "--intrinsics is 0 140 160 48, expected" in fails(capsys, run, image, "--intrinsics", 0, 140, 160, 48)
    assert "frame.png: the camera given does not suit it" in fails(capsys, run, image, "--intrinsics", 140, 140, 5000, 48)
    (tmp_path / "calib.txt").write_text("P0: 1 2 3\n")
    assert "calib.txt: no line 'P2: ...'" in fails(capsys, run, image, "--calib", tmp_path / "calib.txt")
    assert "none.txt: no such file" in fails(capsys, run, image, "--calib", tmp_path / "none.txt")
    assert not Path("predictions").exists()


def test_errors_about_images_come_before_anything_is_written(run, image, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "short.png").write_bytes(image.read_bytes()[:5000])
    assert "none.png: no such image" in fails(capsys, run, image, tmp_path / "none.png", "--hfov", 80, "--out", out)
    assert "text.png: cannot read the image" in fails(capsys, run, image, tmp_path / "text.png", "--hfov", 80, "--out", out)
    assert "2 images would be written as" in fails(capsys, run, image, image, "--hfov", 80, "--out", out)
    assert not out.exists()
    assert "short.png: cannot read the image" in fails(capsys, run, tmp_path / "short.png", "--hfov", 80, "--out", out)


def test_errors_about_the_run(run, image, tmp_path, capsys, monkeypatch):
    assert "no such folder, expected a run or a checkpoint; near it are a" in fails(capsys, run.parent / "aa", image, "--hfov", 80)
    assert "no weights there: looked for model.safetensors, best/model.safetensors" in fails(capsys, tmp_path, image, "--hfov", 80)
    assert "no such folder" in fails(capsys, image, image, "--hfov", 80)
    broken = tmp_path / "broken"
    save_weights(broken, Detector(MODEL), to_dict(Config(model=MODEL)), {}, {})
    (broken / "model.safetensors").write_bytes(b"xx")
    assert "model.safetensors is damaged" in fails(capsys, broken, image, "--hfov", 80)

    def refuse(*_, **__):
        raise RuntimeError("offline\nsecond line")

    monkeypatch.setattr(predict.Detector, "from_pretrained", refuse)
    text = fails(capsys, "owner/name", image, "--hfov", 80)
    assert "owner/name: no such folder here, and not loaded from the hub either: offline" in text


def test_outputs_of_equal_file_names_do_not_meet():
    assert unique_names([Path("../a/1.png"), Path("/b/1.png"), Path("c/2.jpg")]) == ["a_1", "b_1", "2"]
    with pytest.raises(ValueError, match="2 images would be written as a_1:"):
        unique_names([Path("a/1.png"), Path("a/1.jpg")])


def test_as_a_command(run, image, tmp_path):
    command = [sys.executable, predict.__file__, run, image, "--hfov", "97.6", "--out", tmp_path / "o"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "predictions.jsonl, results and pictures of 1 images" in done.stdout
