"""Export: the file and the runtime beside it give what `Detector.predict` gives, without torch; errors in words."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scenes import MODEL

import export
from config import Config, to_dict
from engine.checkpoint import save_weights
from formats.kitti import read_calib, split_projection
from model import Detector
from scene.frames import place_image, whole_view

KITTI = ROOT.parent / "shared/data/kitti_mini/training"
TWO_LEVELS = {"strides": (8, 32), "level_sizes": (64.0,), "depth_mean": (90.0, 40.0), "depth_std": (40.0, 20.0)}
TINY = dataclasses.replace(MODEL, **TWO_LEVELS, tower_convs=1, sigma_scale=(1.5, 0.5, 2.0))
SIZES = ((320, 96), (640, 200), (123, 77), (400, 90))  # width, height


def make_detector(seed=0):
    """An untrained detector whose outputs spread as a trained one's do."""
    torch.manual_seed(seed)
    detector = Detector(TINY).eval()
    with torch.no_grad():
        detector.class_predictor.weight.normal_(0, 0.5)
        detector.class_predictor.bias.fill_(-1)
        detector.box_predictor.weight.normal_(0, 0.1)
    return detector


def write_run(folder, detector):
    """A run folder of it."""
    save_weights(folder / "best", detector, Config(model=detector.config), {}, {})
    return folder


def written(run, folder, *flags):
    """The runtime as it lies in the folder that export.py wrote, holding the model beside it."""
    for package in export.NEEDED:
        pytest.importorskip(package, reason=f"export needs {package}")
    assert export.main([str(run), "--out", str(folder), *flags]) == 0
    spec = importlib.util.spec_from_file_location(f"runtime_{folder.name}", folder / "onnx_detector.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.OnnxDetector(folder / "model.onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A detector, its runtime module, and that with its model loaded."""
    folder, detector = tmp_path_factory.mktemp("export"), make_detector()
    return detector, *written(write_run(folder / "run", detector), folder / "plain")


def pictures(count=4):
    """Random pictures of different sizes with shapes of many scales, and their cameras."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (12, 40, 3), np.uint8)).resize(size) for size in SIZES[:count]]
    cameras = []
    for n, image in enumerate(images):
        fx, fy, (cx, cy) = 0.6 * image.width * (1 + 0.1 * n), 0.6 * image.width, np.array(image.size) / 2
        cameras.append(np.array([[fx, 0, cx + 3 * n], [0, fy, cy], [0, 0, 1]]))
    return images, cameras


def check(found, expected):
    """The runtime's dict and `Labels` agree to 1e-4, row by row after matching by class and place; a tie may differ."""
    assert len(expected) > 10
    left, matched = [*range(len(expected))], 0
    for i, name in enumerate(found["name"]):
        near = [
            j
            for j in left
            if expected.name[j] == name and np.allclose(expected.box[j], found["box"][i], rtol=1e-4, atol=1e-2)
        ]
        near = sorted(near, key=lambda j: abs(expected.score[j] - found["score"][i]))
        if not near:
            continue
        left.remove(near[0])
        matched += 1
        for key in ("score", "box", "center", "size", "sigma"):
            ours, theirs = found[key][i], getattr(expected, key)[near[0]]
            assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), (key, ours, theirs)
        turn = (found["yaw"][i] - expected.yaw[near[0]] + np.pi) % (2 * np.pi) - np.pi
        assert abs(turn) < 1e-4 or abs(abs(turn) - np.pi) < 1e-4  # the latter where the heading bins are a tie
    assert len(expected) - matched <= 1
    assert abs(len(found["name"]) - len(expected)) <= 1


def test_images_of_any_size_one_by_one_and_as_a_batch_agree_with_predict(exported):
    detector, _, runtime = exported
    images, cameras = pictures()
    expected = [detector.predict(image, K) for image, K in zip(images, cameras, strict=True)]
    assert len({name for labels in expected for name in labels.name}) > 1
    for labels, one, of_batch in zip(
        expected, map(runtime.predict, images, cameras), runtime.predict_batch(images, cameras), strict=True
    ):
        check(one, labels)
        check(of_batch, labels)
    assert (np.diff(one["score"]) <= 0).all()
    assert len(runtime.predict(images[0], cameras[0], min_score=expected[0].score[5] - 1e-5)["score"]) == 6


def test_real_frames_agree_with_predict(exported):
    if not KITTI.is_dir():
        pytest.skip("kitti_mini is not there")
    detector, _, runtime = exported
    for path in sorted((KITTI / "image_2").iterdir())[:20:5]:
        K = split_projection(read_calib(KITTI / "calib" / f"{path.stem}.txt"))[0]
        check(runtime.predict(path, K), detector.predict(path, K))


def test_suppression_in_the_graph_agrees_too_and_zero_vectors_have_an_angle(tmp_path):
    detector = make_detector(1)
    start = sum([*detector.fields.values()][: [*detector.fields].index("alpha")])
    with torch.no_grad():
        detector.box_predictor.weight[start : start + 2] = (
            0  # sine and cosine of 2 alpha: (0, 0), as nothing but luck prevents
        )
        detector.box_predictor.bias[start : start + 2] = 0
    _, runtime = written(write_run(tmp_path / "run", detector), tmp_path / "nms", "--nms")
    images, cameras = pictures()
    for image, K, found in zip(images, cameras, runtime.predict_batch(images, cameras), strict=True):
        assert np.isfinite(found["yaw"]).all()
        check(found, detector.predict(image, K))


def test_the_runtime_resamples_to_the_bit(exported):
    _, runtime, _ = exported
    rng = np.random.default_rng(0)
    for (width, height), canvas in (
        ((620, 188), (192, 640)),
        ((640, 192), (128, 416)),
        ((31, 77), (96, 320)),
        ((999, 201), (32, 64)),
    ):
        pixels, view = rng.integers(0, 256, (height, width, 3), np.uint8), whole_view(width, height, canvas)
        ours, K, _, _ = runtime.place(Image.fromarray(pixels), np.diag([700.0, 700.0, 1.0]), canvas)
        assert np.array_equal(ours, place_image(pixels, view))
        assert pytest.approx(view.camera(np.diag([700.0, 700.0, 1.0]))) == K


ALONE = """
import runpy, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{name} is out of reach")
sys.meta_path.insert(0, Wall())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_runtime_runs_as_a_script_without_torch_and_this_project(exported, tmp_path):
    _, module, runtime = exported
    images, _ = pictures(1)
    images[0].save(tmp_path / "image.png")
    blocked = {
        "torch",
        "torchvision",
        "timm",
        *(path.stem for path in ROOT.glob("*.py")),
        "formats",
        "metrics",
        "tools",
    }
    command = [sys.executable, "-I", "-c", ALONE.replace("{blocked}", repr(blocked)), module.__file__]
    command += [
        module.__file__.replace("onnx_detector.py", "model.onnx"),
        "image.png",
        "--intrinsics",
        "190",
        "190",
        "160",
        "48",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = runtime.predict(images[0], [[190, 0, 160], [0, 190, 48], [0, 0, 1]], min_score=0.25)
    assert len(done.stdout.splitlines()) == len(found["name"]) > 0
    assert done.stdout.startswith(f"{found['name'][0]} score {found['score'][0]:.2f}".rstrip("0"))
    (tmp_path / "model.onnx").write_bytes(b"no model")
    (tmp_path / "cut.png").write_bytes(
        (tmp_path / "image.png").read_bytes()[:-2000]
    )  # Pillow's own sentence names no file
    cases = ((command[5], "cut.png", 190), ("none.onnx", "image.png", 190), ("model.onnx", "image.png", 190),
             (command[5], "none.png", 190), (command[5], "model.onnx", 190), (command[5], "image.png", 0))  # fmt: skip
    for model, image, focal in cases:
        wrong = [*command[:5], model, image, "--intrinsics", str(focal), "190", "160", "48"]
        done = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert re.fullmatch(f"error: .*{model} on {image}: .+\n", done.stderr)
    assert len((ROOT / "examples/onnx_detector.py").read_text().splitlines()) <= 150


def test_the_file_says_what_it_is_and_nothing_of_this_machine(exported):
    import onnx

    detector, module, runtime = exported
    path = module.__file__.replace("onnx_detector.py", "model.onnx")
    assert str(ROOT).encode() not in Path(path).read_bytes()
    model = onnx.load(path)
    about = json.loads({entry.key: entry.value for entry in model.metadata_props}["deep3d"])
    assert about == {"version": 1, "nms": False, "half": False, "model": to_dict(detector.config)}
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [export.OPSET]
    assert {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input} == {
        "image": ["batch", 96, 320, 3],
        "K": ["batch", 3, 3],
    }
    with pytest.raises(ValueError, match=r"K is \[\[0\.0, 0\.0, 0\.0\].*expected \[\[fx, 0, cx\]"):
        runtime.predict(np.zeros((9, 9, 3), np.uint8), np.zeros((3, 3)))


def test_another_canvas_keeps_the_weights_and_has_its_own_locations():
    detector = make_detector()
    other = export.resize(detector, (64, 160))
    assert len(other.location_pixel) == 8 * 20 + 2 * 5
    assert torch.equal(other.box_predictor.weight, detector.box_predictor.weight)


def fails(capsys, *arguments):
    """The sentence with which a command line is refused."""
    try:
        code = export.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    text = capsys.readouterr().err.strip()
    assert (code, text[:7], text.count("\n")) == (2, "error: ", 0)
    return text


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "NEEDED", ())
    run = write_run(tmp_path / "run", make_detector())
    text = fails(capsys, run, "--size", 100, 320)
    assert "model.size is (100, 320), expected (height, width) in multiples of the largest stride, 32" in text
    assert "no such folder, expected a run or a checkpoint" in fails(capsys, tmp_path / "ran")
    monkeypatch.setattr(export, "NEEDED", ("json", "onnx_of_nobody", "onnxruntime_of_nobody"))
    text = fails(capsys, tmp_path / "ran")
    assert "onnx_of_nobody and onnxruntime_of_nobody: not installed; pip install json onnx_of_nobody" in text
