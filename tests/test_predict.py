"""The prediction command: what it writes agrees with `Detector.predict`, and a mistake of the user's is one sentence
and an exit code.
"""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import data
import predict
from config import Config
from engine import weights
from engine.checkpoint import save_weights
from engine.mirror import Mirrored
from formats import jsonl, video
from formats.jsonl import read_frames
from formats.kitti import read_calib, read_labels, split_projection, write_calib
from model import Detector, ModelConfig
from predict import find_inputs, load_detector, main
from scene.frames import load_image
from scene.geometry import yaw_to_alpha

P2 = np.array([[140.0, 0, 160, 9], [0, 140, 48, 1], [0, 0, 1, 0.01]])
MODEL = ModelConfig(
    backbone="test_resnet",
    channels=32,
    size=(96, 320),
    size_prior=((4, 1.5, 1.7), (0.8, 1.7, 0.6), (1.7, 1.7, 0.6)),
    depth_mean=(30.0, 20.0, 10.0),
    depth_std=(10.0, 8.0, 5.0),
    score_threshold=0.07,
    max_detections=30,
)
K = np.array([[140.0, 0, 160], [0, 140, 48], [0, 0, 1]])
CAMERA = ("--intrinsics", "140", "140", "160", "48")
DRAWN = (*CAMERA, "--min-score", "0.07", "--nms-across-classes", "0")  # all that `Detector.predict` says
ALL = (*DRAWN, "--no-pictures")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an untrained detector: it finds something in any image, with low scores."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    torch.manual_seed(2)
    detector = Detector(MODEL)
    torch.nn.init.normal_(detector.class_predictor.weight, std=0.1)  # so that scores and classes vary
    save_weights(folder / "best", detector, Config(model=MODEL), {}, {})
    return folder


def make_pixels(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (96, 320, 3), np.uint8)


def make_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_pixels(seed)).save(path)
    return path


@pytest.fixture
def image(tmp_path):
    return make_image(tmp_path / "frame.png")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The default output folder lies in the working directory."""
    monkeypatch.chdir(tmp_path)


def call(*arguments):
    return main([str(argument) for argument in arguments])


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
    assert (
        call(
            run, image, "--calib", tmp_path / "calib.txt", "--out", out, "--min-score", 0.07, "--nms-across-classes", 0
        )
        == 0
    )
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
    assert results.alpha == pytest.approx(
        yaw_to_alpha(results.yaw, results.center), abs=2e-4
    )  # of that file's own x and z
    assert Image.open(out / "pictures/frame.jpg").width > 1440


def test_intrinsics_and_the_equal_field_of_view_give_equal_boxes(run, image, tmp_path):
    """A camera of 2 * atan(160 / 140) degrees with its axis in the middle of 320x96 pixels."""
    call(run, image, "--intrinsics", 140, 140, 159.5, 47.5, "--out", tmp_path / "a", *ALL[5:])
    call(run, image, "--hfov", np.degrees(2 * np.arctan(160 / 140)), "--out", tmp_path / "b", *ALL[5:])
    one, two = (json.loads((tmp_path / name / "predictions.jsonl").read_text()) for name in "ab")
    assert one["K"][0][0] == pytest.approx(two["K"][0][0])
    assert [o["center"] for o in one["objects"]] == [pytest.approx(o["center"], abs=1e-4) for o in two["objects"]]
    results = read_labels(tmp_path / "a/results/frame.txt", scores=True)
    assert results.center[0] == pytest.approx(one["objects"][0]["center"], abs=1e-3)


def test_min_score_is_what_is_written(run, image, tmp_path):
    found = load_detector(str(run)).predict(image, K)
    level = float(found.score[len(found) // 2])
    call(run, image, *CAMERA, "--nms-across-classes", 0, "--min-score", level, "--no-pictures", "--out", tmp_path / "o")
    labels = read_frames(tmp_path / "o/predictions.jsonl")[0].labels
    assert len(labels) == (found.score >= level).sum()
    assert labels.score.min() >= level - 1e-6
    call(
        run, image, *CAMERA, "--min-score", 0, "--out", tmp_path / "all", "--no-pictures"
    )  # below the detector's own threshold
    assert 0 < read_frames(tmp_path / "all/predictions.jsonl")[0].labels.score.min() < MODEL.score_threshold


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
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (256, 20))
    if kind not in ("1", "P", "jpg"):
        assert np.array_equal(np.asarray(image), np.stack([ramp] * 3, -1))


def test_a_turned_photograph_is_seen_upright(run, tmp_path):
    """By predict.py, and by Detector.predict from a path or an image: K is that of the picture as viewers show it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    pixels = make_pixels()
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "phone.png")), pixels)
    detector = load_detector(str(run))
    expected = detector.predict(pixels, K)
    for image in (tmp_path / "phone.png", Image.open(tmp_path / "phone.png")):
        np.testing.assert_array_equal(detector.predict(image, K).box, expected.box)
    assert call(run, tmp_path / "phone.png", make_image(tmp_path / "plain.png"), *ALL, "--out", tmp_path / "o") == 0
    np.testing.assert_allclose(read_frames(tmp_path / "o/predictions.jsonl")[0].labels.box, expected.box, atol=1e-4)


def test_errors_about_the_camera(run, image, tmp_path, capsys):
    expected = "one of the arguments --calib --intrinsics --hfov --cameras is required"
    assert expected in fails(capsys, run, image)
    both = fails(capsys, run, image, "--hfov", 80, "--intrinsics", 1, 2, 3, 4)
    assert "argument --intrinsics: not allowed with argument --hfov" in both
    for angle in (0, 180, -5, "nan"):
        assert "expected degrees between 0 and 180" in fails(capsys, run, image, "--hfov", angle)
    wrong = fails(capsys, run, image, "--intrinsics", 0, 140, 160, 48)
    assert "--intrinsics is [0.0, 140.0, 160.0, 48.0], expected" in wrong
    assert "frame.png: the camera given does not suit it" in fails(
        capsys, run, image, "--intrinsics", 140, 140, 5000, 48
    )
    (tmp_path / "calib.txt").write_text("P0: 1 2 3\n")
    assert "calib.txt: no line 'P2: ...'" in fails(capsys, run, image, "--calib", tmp_path / "calib.txt")
    assert "none.txt" in fails(capsys, run, image, "--calib", tmp_path / "none.txt")
    assert not Path("predictions").exists()


def test_errors_about_paths_come_before_anything_is_written(run, image, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no picture")
    assert "fram.png: no such image, video or folder; near it are frame.png" in fails(
        capsys, run, image, tmp_path / "fram.png", "--hfov", 80
    )
    for path in (tmp_path / "empty", tmp_path / "empty/*.txt", tmp_path / "*.gif"):
        assert f"{path}: no image or video there, looked for .png, .jpg" in fails(
            capsys, run, image, path, "--hfov", 80
        )
    assert "--batch is 0, expected at least 1" in fails(capsys, run, image, "--hfov", 80, "--batch", 0)
    assert "--min-score is 1.5, expected a number from 0 to 1" in fails(
        capsys, run, image, "--hfov", 80, "--min-score", 1.5
    )
    assert "--device gpu: " in fails(capsys, run, image, "--hfov", 80, "--device", "gpu")
    expected = "--classes names 'Tram', this detector knows Car, Pedestrian, Cyclist"
    assert expected in fails(capsys, run, image, "--hfov", 80, "--classes", "Car", "Tram")
    assert not Path("predictions").exists()


def test_outputs_that_cannot_be_are_told_before_the_work(run, image, tmp_path, capsys):
    """Or would be written over an input, which stays."""
    own = make_image(tmp_path / "out/pictures/mine.png")
    (tmp_path / "out/predictions.jsonl").write_text("")
    assert f"{own} lies in a folder of {tmp_path / 'out'} that is made anew" in fails(
        capsys, run, own, *ALL, "--out", tmp_path / "out"
    )
    assert own.exists()
    (tmp_path / "taken/predictions.jsonl").mkdir(parents=True)
    (tmp_path / "taken/results").mkdir()
    (tmp_path / "taken/results/mine.txt").write_text("mine")
    (tmp_path / "file").mkdir()
    (tmp_path / "file/results").write_text("mine")
    for name, words in (
        ("taken", "predictions.jsonl: there is a folder of that name"),
        ("file", "results: no folder can be made there: File exists"),
    ):
        assert words in fails(capsys, run, image, *ALL, "--out", tmp_path / name)
    assert (tmp_path / "taken/results/mine.txt").exists()
    (tmp_path / "out/pictures/link.png").symlink_to(image)
    assert "is made anew" in fails(capsys, run, tmp_path / "out/pictures/link.png", *ALL, "--out", tmp_path / "out")


def test_a_full_disk_is_one_sentence(run, image, tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/predictions.jsonl").symlink_to("/dev/full")
    assert call(run, image, *ALL, "--out", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err


def test_links_are_followed(run, tmp_path, capsys):
    """To folders, once each; and predictions in a linked folder name images that are found from there."""
    make_image(tmp_path / "elsewhere/deep/1.png")
    Image.fromarray(make_pixels().repeat(2, 0).repeat(2, 1)).save(tmp_path / "elsewhere/2.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/deep/loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "far/away/runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far/away/runs")
    lines = tmp_path / "runs/out/predictions.jsonl"
    assert call(run, tmp_path / "in", *ALL, "--out", lines.parent) == 0
    assert "pictures of 2 sizes, such as 320x96 and 640x192, have one camera" in capsys.readouterr().out
    assert [frame.id for frame in read_frames(lines)] == ["2", "deep/1"]
    assert call(run, tmp_path / "in", "--cameras", lines, "--out", tmp_path / "again", "--no-pictures") == 0
    assert "sizes" not in capsys.readouterr().out
    for name, focal in (("a", 140), ("b", 150)):  # two frames of one picture
        (tmp_path / f"{name}.png").symlink_to(tmp_path / "elsewhere/deep/1.png")
        line = {"image": f"{name}.png", "K": [[focal, 0, 160], [0, focal, 48], [0, 0, 1]]}
        with open(tmp_path / "two.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    assert (
        call(
            run,
            tmp_path / "a.png",
            tmp_path / "b.png",
            "--cameras",
            tmp_path / "two.jsonl",
            "--out",
            tmp_path / "two",
            "--no-pictures",
        )
        == 0
    )
    assert [frame.K[0, 0] for frame in read_frames(tmp_path / "two/predictions.jsonl")] == [140, 150]
    assert '"image": "../a.png"' in (tmp_path / "two/predictions.jsonl").read_text()


@pytest.mark.parametrize("batch", [1, 8])
def test_what_cannot_be_read_is_passed_over(run, image, tmp_path, capsys, batch):
    """A text, half an image, one that the camera does not suit, and floating-point numbers, among good ones."""
    folder = tmp_path / "in"
    for seed, name in enumerate(("a.png", "m.png", "z.png")):
        make_image(folder / name, seed)
    (folder / "b.png").write_text("not an image")
    (folder / "c.png").write_bytes(image.read_bytes()[:5000])
    Image.fromarray(np.zeros((960, 3200, 3), np.uint8)).save(folder / "n.jpg")
    Image.fromarray(np.zeros((96, 320), np.float32)).save(folder / "o.tif")
    assert call(run, folder, *ALL, "--batch", batch) == 1
    told = capsys.readouterr()
    for name in ("b.png", "c.png", "o.tif"):
        assert f"{name}: cannot read the image" in told.err
    assert "n.jpg: the camera given does not suit it: focal lengths" in told.err
    assert "4 were passed over, the first: " in told.err
    assert "in 3 pictures" in told.out
    assert [frame.id for frame in read_frames("predictions/predictions.jsonl")] == ["a", "m", "z"]
    assert tree(Path("predictions/results")) == ["a.txt", "m.txt", "z.txt"]


def test_folders_patterns_and_names(tmp_path):
    """A name is the place below the folder that holds all; nothing is taken twice, hidden, or from the outputs."""
    for name in (
        "in/a/1.png",
        "in/b/1.png",
        "in/b/deep/2.JPG",
        "in/.trash/3.png",
        "in/b/._1.png",
        "in/out/4.png",
        "other/1.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "in/b/clip.mp4").write_bytes(b"")
    (tmp_path / "in/b/readme.txt").write_bytes(b"")

    def names(*given):
        return list(find_inputs([str(tmp_path / path) for path in given], tmp_path / "in/out").values())

    assert names("in") == ["a/1", "b/1", "b/clip", "b/deep/2"]
    assert names("in/*/1.png") == ["a/1", "b/1"]
    assert names("in/b", "in/b/1.png") == ["1", "clip", "deep/2"]
    assert names("in/a/1.png", "in/b/1.png") == ["a/1", "b/1"]
    assert names("in/a", "other/1.png") == ["in/a/1", "other/1"]
    assert names("in/**/2.JPG") == ["2"]
    assert names("in/out/4.png") == ["4"]  # asked for by name
    (tmp_path / "in/a/1.jpg").write_bytes(b"")
    assert names("in/a") == ["1.jpg", "1.png"]
    (tmp_path / "in/[x].png").write_bytes(b"")
    assert names("in/[x].png") == ["[x]"]


def test_outputs_lie_as_the_inputs_do(run, tmp_path):
    for seed, name in enumerate(("a/0001.png", "b/0001.png", "b/c/0002.png")):
        make_image(tmp_path / "in" / name, seed)
    assert call(run, tmp_path / "in", *DRAWN, "--out", tmp_path / "in/out", "--batch", 2) == 0
    first = tree(tmp_path / "in/out")
    places = ["a/0001", "b/0001", "b/c/0002"]
    assert first == [*(f"pictures/{p}.jpg" for p in places), "predictions.jsonl", *(f"results/{p}.txt" for p in places)]
    frames = read_frames(tmp_path / "in/out/predictions.jsonl")
    assert [frame.id for frame in frames] == places
    detector = load_detector(str(run))
    for frame in frames:
        np.testing.assert_allclose(frame.labels.center, detector.predict(frame.image, K).center, atol=1e-4)
    assert call(run, tmp_path / "in", *DRAWN, "--out", tmp_path / "in/out") == 0  # its own pictures are not inputs
    assert tree(tmp_path / "in/out") == first
    shutil.rmtree(tmp_path / "in/out")
    assert call(run, tmp_path / "in", *ALL, "--out", tmp_path / "bare") == 0
    assert not (tmp_path / "bare/pictures").exists()
    bare = read_frames(tmp_path / "bare/predictions.jsonl")
    for drawn, plain in zip(frames, bare, strict=True):
        np.testing.assert_allclose(
            drawn.labels.score, plain.labels.score, atol=2e-6
        )  # rounded, of batches of 2 and of 3


def test_a_large_jpeg_is_drawn_whole(run, tmp_path, monkeypatch):
    """The network sees it decoded at a reduced size; the same numbers with pictures and without."""
    Image.fromarray(make_pixels().repeat(10, 0).repeat(10, 1)).save(tmp_path / "large.jpg")
    drawn = []
    draw = predict.draw_frame
    monkeypatch.setattr(predict, "draw_frame", lambda image, K, *rest, **more: drawn.append(K) or draw(image, K, *rest))
    camera = ("--intrinsics", 1404.5, 1404.5, 1604.5, 484.5, "--min-score", 0.07)
    assert call(run, tmp_path / "large.jpg", *camera, "--out", tmp_path / "a") == 0
    assert call(run, tmp_path / "large.jpg", *camera, "--out", tmp_path / "b", "--no-pictures") == 0
    np.testing.assert_allclose(drawn, [[[1404.5, 0, 1604.5], [0, 1404.5, 484.5], [0, 0, 1]]])
    assert (tmp_path / "a/predictions.jsonl").read_text() == (tmp_path / "b/predictions.jsonl").read_text()


def test_cameras_from_json_lines(run, tmp_path, capsys):
    one, two = make_image(tmp_path / "in/1.png"), make_image(tmp_path / "in/2.png")
    lines = [
        {"image": "in/1.png", "K": K.tolist()},
        {"image": "in/2.png", "K": (K * [[1.5, 1, 1], [1, 1.5, 1], [1, 1, 1]]).tolist(), "objects": 1},
    ]
    cameras = tmp_path / "cameras.jsonl"
    cameras.write_text("\n".join(map(json.dumps, lines)))
    assert call(run, tmp_path / "in", "--cameras", cameras, *ALL[5:]) == 0
    detector = load_detector(str(run))
    for frame, line in zip(read_frames("predictions/predictions.jsonl"), lines, strict=True):
        assert frame.K.tolist() == line["K"]
        np.testing.assert_allclose(frame.labels.center, detector.predict(one, np.array(line["K"])).center, atol=1e-4)
    assert (
        call(run, one, two, "--cameras", "predictions/predictions.jsonl", "--out", "again", "--no-pictures") == 0
    )  # which name the same images
    shutil.rmtree("predictions")
    make_image(tmp_path / "in/3.png")
    expected = f"--cameras {cameras}: none of its 2 lines is of {tmp_path / 'in/3.png'}"
    assert expected in fails(capsys, run, tmp_path / "in", "--cameras", cameras)
    for bad, words in (
        ("[1]", "cameras.jsonl:1: expected a JSON object with an image and its K, got [1]"),
        ('{"image": "in/1.png"}', "cameras.jsonl:1: expected a JSON object with an image and its K"),
        (
            '{"image": "in/1.png", "K": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]}',
            "K: expected 3x3 numbers, got shape (3, 4); formats.kitti.split",
        ),
        (
            "\n".join(
                f'{{"image": "in/1.png", "K": [[{f}, 0, 99], [0, {f}, 50], [0, 0, 1]]}}' for f in (300, 300, 301)
            ),
            "cameras.jsonl:3: another K for in/1.png than before, expected one for an image",
        ),
        (
            '{"image": "in/1.png", "K": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]}',
            "cameras.jsonl:1: K: focal lengths -1, 1 px are not both > 0",
        ),
    ):
        cameras.write_text(bad)
        assert words in fails(capsys, run, one, "--cameras", cameras)
    expected = "No such file or directory: 'none.jsonl'"
    assert expected in fails(capsys, run, one, "--cameras", "none.jsonl")
    assert not Path("predictions").exists()


def test_classes_flip_and_one_thing_once(run, image, tmp_path):
    detector = load_detector(str(run))
    read = lambda name: read_frames(tmp_path / name / "predictions.jsonl")[0].labels  # noqa: E731
    call(run, image, *ALL, "--classes", "Pedestrian", "Car", "--out", tmp_path / "some")
    expected = detector.predict(image, K)
    assert {*expected.name} == {"Pedestrian", "Cyclist", "Car"}
    assert read("some").name.tolist() == expected.name[expected.name != "Cyclist"].tolist()
    call(run, image, *ALL, "--flip", "--out", tmp_path / "flipped")
    np.testing.assert_allclose(read("flipped").center, Mirrored(detector).predict(image, K).center, atol=1e-4)
    call(run, image, *CAMERA, "--min-score", "0.07", "--out", tmp_path / "once")
    detector.config = dataclasses.replace(detector.config, nms_across_classes=0.5)
    single = detector.predict(image, K)
    assert len(single) < len(expected)
    assert read("once").name.tolist() == single.name.tolist()


def test_a_mistake_in_code_keeps_its_traceback(run, image, monkeypatch):
    """It is not taken for an image that cannot be read, nor for the user's."""

    def broken(*_, **__):
        raise ValueError("shapes do not match")

    for owner, name in (
        (Detector, "detect"),
        (predict, "draw_frame"),
        (data, "place_image"),
        (predict, "write_labels"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(ValueError, match="shapes do not match"):
                call(run, image, *DRAWN)
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "_initialise", lambda self: self.nothing)
        with pytest.raises(AttributeError, match="nothing"):
            call(run, image, *ALL)


def test_errors_about_the_run(run, image, tmp_path, capsys, monkeypatch):
    assert "no such folder, expected a run or a checkpoint; near it are a" in fails(
        capsys, run.parent / "aa", image, "--hfov", 80
    )
    assert "no weights there: looked for model.safetensors, best/model.safetensors" in fails(
        capsys, tmp_path, image, "--hfov", 80
    )
    assert "no such folder" in fails(capsys, image, image, "--hfov", 80)
    broken = tmp_path / "broken"
    save_weights(broken, Detector(MODEL), Config(model=MODEL), {}, {})
    (broken / "model.safetensors").write_bytes(b"xx")
    assert "model.safetensors is damaged" in fails(capsys, broken, image, "--hfov", 80)

    def refuse(*_, **__):
        raise OSError("offline\nsecond line")

    monkeypatch.setattr(weights, "snapshot_download", refuse)
    text = fails(capsys, "owner/name", image, "--hfov", 80)
    assert "owner/name: no such folder here, and not loaded from the hub either: offline" in text


def test_a_hub_id_is_fetched_and_one_that_cannot_be_is_told_soon(run, image, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(weights, "snapshot_download", lambda name, allow_patterns: {"me/mine": str(run / "best")}[name])
        assert call("me/mine", image, *ALL) == 0
    address = "http://127.0.0.1:9"  # where nothing listens
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    assert "runs/typo: no such folder here, and not loaded from the hub either: " in fails(
        capsys, "runs/typo", image, "--hfov", 80
    )


def test_as_a_command(run, image, tmp_path):
    command = [sys.executable, predict.__file__, run, image, "--hfov", "97.6", "--out", tmp_path / "o"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "with a score from 0.25 in 1 pictures" in done.stdout


def write_clip(path, count, rate=Fraction(30000, 1001)):
    with video.written_video(path, rate) as add:
        for seed in range(count):
            add(Image.fromarray(make_pixels(seed) // 4 * (seed % 4 + 1)))


def test_a_video_comes_back_with_its_boxes(run, image, tmp_path, capsys):
    pytest.importorskip("av", reason="videos need PyAV")
    (tmp_path / "in").mkdir()
    write_clip(tmp_path / "in/clip.mov", 11)
    assert call(run, tmp_path / "in", image, *DRAWN, "--out", tmp_path / "out", "--batch", 4) == 0
    assert tree(tmp_path / "out") == [
        "pictures/frame.jpg",
        "pictures/in/clip.mp4",
        "predictions.jsonl",
        "results/frame.txt",
    ]
    ids = [json.loads(line)["id"] for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert ids == ["frame", *(f"in/clip.mov/{number:06d}" for number in range(11))]
    detector = load_detector(str(run))
    frames = read_frames(tmp_path / "out/predictions.jsonl", images=False)[1:]
    with video.opened_video(tmp_path / "in/clip.mov") as (pictures, _, _):
        for picture, frame in zip(pictures, frames, strict=True):
            np.testing.assert_allclose(frame.labels.center, detector.predict(picture, K).center, rtol=1e-3, atol=1e-3)
    jsonl.main([str(tmp_path / "out/predictions.jsonl"), "--no-images"])
    assert "12 good frames, 0 bad lines" in capsys.readouterr().out
    with video.opened_video(tmp_path / "out/pictures/in/clip.mp4") as (drawn, rate, count):
        assert (rate, count) == (Fraction(30000, 1001), 11)
        assert all(one.shape[1] > 1440 for one in drawn)
    content = bytearray((tmp_path / "in/clip.mov").read_bytes())
    content[len(content) // 2 : 3 * len(content) // 4] = b"?" * (3 * len(content) // 4 - len(content) // 2)
    (tmp_path / "in/broken.mp4").write_text("no video")
    (tmp_path / "in/clip.mov").write_bytes(content)
    assert call(run, tmp_path / "in", *ALL, "--out", tmp_path / "less") == 1
    told = capsys.readouterr().err
    assert "broken.mp4: cannot read the video: " in told
    assert "clip.mov: cannot read the video after " in told, told
    assert tree(tmp_path / "less") == ["predictions.jsonl"]


def test_the_check_of_json_lines_says_that_a_video_is_no_image(tmp_path, capsys):
    """predict.py's lines of a video name the file that its frames are in."""
    (tmp_path / "clip.MP4").write_bytes(bytes(99))
    line = {"image": "clip.MP4", "K": K.tolist(), "objects": [], "id": "clip.MP4/000000"}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line))
    assert jsonl.main(["lines.jsonl"]) == 1
    expected = "lines.jsonl:1: image is 'clip.MP4', a video, expected an image file; --no-images checks all else\n"
    assert capsys.readouterr().out.startswith(expected)


def test_a_turned_video_is_seen_upright(tmp_path):
    """As telephones store it: on its side, with a matrix in the track header that turns it clockwise."""
    pytest.importorskip("av", reason="videos need PyAV")
    upright = np.zeros((96, 320, 3), np.uint8)
    upright[:40, :120] = 255
    with video.written_video(tmp_path / "side.mp4", Fraction(10)) as add:
        add(Image.fromarray(np.rot90(upright)))
    content = bytearray((tmp_path / "side.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # ISO 14496-12, track header box of version 0
    assert struct.unpack(">9i", content[matrix : matrix + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "side.mp4").write_bytes(content)
    with video.opened_video(tmp_path / "side.mp4") as (frames, rate, _):
        assert rate == 10
        [seen] = frames
    assert seen.shape == upright.shape
    assert np.abs(seen.astype(int) - upright).mean() < 5


def test_a_video_without_its_package_is_told_before_anything_is_loaded(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    assert "videos are read by PyAV, which is not installed: pip install av" in fails(
        capsys, run, tmp_path / "clip.mp4", "--hfov", 80
    )
