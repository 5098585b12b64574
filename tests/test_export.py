"""Export: the file and the runtime beside it give what `Detector.predict` gives, without torch; errors in words."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scenes import MODEL

import engine.runtime
import evaluate
import export
import predict
from config import Config, read_config, to_dict
from engine.checkpoint import save_weights
from engine.mirror import Mirrored
from engine.runtime import FileDetector
from engine.weights import load_run
from formats.kitti import read_calib, split_projection
from model import Detector
from scene.frames import UserError, place_image, whole_view
from tools import deploy, quantize

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


def file_of(module):
    """The model.onnx beside a runtime module."""
    return Path(module.__file__).with_name("model.onnx")


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
        str(file_of(module)),
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
    path = str(file_of(module))
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


def test_another_canvas_has_its_own_locations_and_agrees_with_predict(tmp_path):
    run = write_run(tmp_path / "run", make_detector())
    _, runtime = written(run, tmp_path / "small", "model.size=64,160")
    _, detector = load_run(run / "best", ["model.size=64,160"])
    assert len(detector.location_pixel) == 8 * 20 + 2 * 5
    assert read_config(tmp_path / "small/config.json").model.size == (64, 160)
    for image, K in zip(*pictures(), strict=True):
        check(runtime.predict(image, K), detector.predict(image, K))


def test_suppression_does_not_depend_on_the_place_in_the_batch():
    """150 pairs of boxes that overlap by almost the threshold, 32 times: rounded by 1/64 px some would change sides."""
    rng, images, classes = np.random.default_rng(0), 32, tuple(f"c{number}" for number in range(26))
    sizes = {"size_prior": ((4.0, 1.5, 1.8),) * 26, "sigma_scale": (), "attributes": {}}
    config = dataclasses.replace(TINY, classes=classes, fuse_duplicates=False, max_detections=300, **sizes)
    overlap = config.nms_iou + rng.choice([-1, 1], 150) * rng.uniform(3e-4, 1e-3, 150)
    width, corner = rng.uniform(20, 80, 150), rng.uniform(0, (200, 60), (150, 2))
    shift = width * (1 - overlap) / (1 + overlap)
    first = np.column_stack([corner, corner[:, 0] + width, corner[:, 1] + 30])
    box = np.concatenate([first, first + np.outer(shift, [1, 0, 1, 0])])
    numbers = rng.uniform(0.1, 1, (300, 8))
    numbers[:, 0] = 0.9 - 0.001 * np.arange(300)  # scores
    parts = {"score": numbers[:, 0], "box": box, "pixel": numbers[:, 1:3], "depth": numbers[:, 3]}
    parts |= {"size": numbers[:, 4:7], "alpha": numbers[:, 7], "sigma": numbers[:, 3]}
    boxes = {
        name: torch.tensor(value, dtype=torch.float32).expand(images, *value.shape) for name, value in parts.items()
    }
    boxes["label"] = torch.tensor(np.tile(rng.integers(0, 26, 150), 2)).expand(images, 300)
    K = torch.tensor([[300.0, 0, 160], [0, 300, 48], [0, 0, 1]]).expand(images, 3, 3)
    detections = Detector.suppress(SimpleNamespace(config=config), boxes, K)
    assert 150 < len(detections[0]["score"]) < 290
    for one in detections:
        assert all(torch.equal(value, detections[0][name]) for name, value in one.items())
    rows = export.select_rows(boxes, K, config)
    assert (rows["score"] > 0).sum(1).tolist() == [len(detections[0]["score"])] * images
    assert all(torch.equal(value, value[:1].expand_as(value)) for value in rows.values())


def columns(labels):
    """`Labels` as the dict that `check` compares with others."""
    return {key: getattr(labels, key) for key in ("name", "score", "box", "center", "size", "yaw", "sigma")}


@pytest.mark.parametrize(("runtime", "precision"), [("onnx", None), ("openvino", "fp32")])
def test_a_file_stands_for_the_detector(exported, runtime, precision):
    detector, module, _ = exported
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime), reason=f"--runtime {runtime} needs it")
    file = FileDetector(file_of(module), runtime, precision)
    assert file.config == detector.config
    images, cameras = pictures(2)
    for found, expected in zip(file.predict(images, cameras), detector.predict(images, cameras), strict=True):
        check(columns(found), expected)


def test_a_command_line_takes_a_file_in_place_of_a_run(exported, tmp_path, capsys):
    """predict.py writes the same of both; evaluate.py finds its config beside the file, and its own folder for it."""
    detector, module, _ = exported
    images, _ = pictures(1)
    images[0].save(tmp_path / "image.png")
    camera = ("--intrinsics", "190", "190", "160", "48", "--no-pictures")
    run, path = file_of(module).parents[1] / "run", file_of(module)
    for name, words in (("run", [run, "--device", "cpu"]), ("file", [path, "--runtime", "onnx"])):
        words = [*words, tmp_path / "image.png", *camera, "--out", tmp_path / name]
        assert predict.main([str(word) for word in words]) == 0
    ours, theirs = ((tmp_path / name / "results/image.txt").read_text().split("\n") for name in ("file", "run"))
    assert len(ours) > 10
    for one, other in zip(ours, theirs, strict=True):
        assert one.split()[:1] == other.split()[:1]
        assert np.allclose([*map(float, one.split()[1:])], [*map(float, other.split()[1:])], rtol=1e-3, atol=1e-2)
    frame = {"image": str(tmp_path / "image.png"), "K": [[190, 0, 160], [0, 190, 48], [0, 0, 1]], "objects": []}
    (tmp_path / "val.jsonl").write_text(json.dumps(frame))
    val = json.dumps([{"kind": "jsonl", "root": str(tmp_path / "val.jsonl")}])
    words = [str(path), "--runtime", "onnx", f"data.val={val}", "data.index=none", "data.workers=0"]
    assert evaluate.main(words) == 0, capsys.readouterr().err
    predictions = (Path(f"{path}.evaluation") / "predictions.jsonl").read_text()
    assert len(json.loads(predictions)["objects"]) == len(detector.predict(images[0], frame["K"]))
    assert evaluate.main([*words, "model.max_detections=3"]) == 0
    assert len(json.loads((Path(f"{path}.evaluation") / "predictions.jsonl").read_text())["objects"]) == 3
    capsys.readouterr()
    assert evaluate.main([*words, "model.size=64,320"]) == 2
    assert f"model.size is part of {path}, expected of model score_threshold, nms_iou" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict.main([str(path), str(tmp_path / "image.png"), "--runtime", "onnx", "--device", "cpu", "--hfov", "80"])
    assert "--device cpu is torch's, and --runtime onnx computes on the CPU" in capsys.readouterr().err


def test_what_a_runtime_cannot_do_is_one_sentence(exported, tmp_path, monkeypatch):
    _, module, _ = exported
    path = file_of(module)
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:1000])
    for file, precision, sentence in (
        (path.with_name("modle.onnx"), None, "expected a file .onnx that export.py has written"),
        (path.parent, None, "expected a file .onnx"),
        (path, "bf16", "ONNX Runtime computes as its file says"),
        (tmp_path / "cut.onnx", None, "cut.onnx: "),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            FileDetector(file, "onnx", precision)
    with pytest.raises(UserError, match="--flip needs a run"):
        Mirrored(FileDetector(path, "onnx"))
    monkeypatch.setattr(engine.runtime, "native_bf16", lambda: False)
    with pytest.raises(UserError, match="--precision bf16: this processor has no bf16 instructions"):
        engine.runtime.refuse_emulation("bf16", torch.device("cpu"))
    monkeypatch.setattr(engine.runtime, "PACKAGES", {"onnx": "onnx_of_nobody"})
    with pytest.raises(UserError, match="--runtime onnx needs onnx_of_nobody: pip install onnx_of_nobody"):
        FileDetector(path, "onnx")


def quantised_operations(reads, kinds, inside):
    """Names, of operations {name: those it reads} and their kinds, that are in 8 bits and not between image and heads.

    Found from the other end than tools.quantize finds them: behind a predictor, at its weights, or where K is and the
    image is not; the viewing rays alone may be in 8 bits, where they join the features that a tower reads.
    """
    convolutions = {name: sources for name, sources in reads.items() if kinds[name] in ("Conv", "Convolution")}
    weights = {name: source for name, sources in convolutions.items() for source in sources[1:2]}
    predictors = [name for name, source in weights.items() if source.startswith(tuple(quantize.PREDICTORS))]
    assert len(predictors) == 2 * len(TINY.strides)
    read_by = {}
    for name, sources in reads.items():
        for source in sources:
            read_by.setdefault(source, []).append(name)
    behind = quantize.reach(predictors, read_by)
    beside = quantize.reach(["K"], read_by) - quantize.reach(["image"], read_by)
    rays = {name for name in beside if {kinds[reader] for reader in read_by.get(name, ())} <= {*inside, "Concat"}}
    wrong = behind | {weights[name] for name in predictors} | beside - rays
    return sorted(name for name in wrong & {*reads} if kinds[name] in inside)


def onnx_operations(path):
    """reads and kinds of `quantised_operations`."""
    graph = importlib.import_module("onnx").load(path).graph
    makers = {output: node.name for node in graph.node for output in node.output}
    reads = {node.name: [makers.get(source, source) for source in node.input] for node in graph.node}
    return reads, {node.name: node.op_type for node in graph.node}


def calibration():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 1, *TINY.size, 3), np.uint8)
    return [{"image": image, "K": np.array([[[200, 0, 160], [0, 200, 48], [0, 0, 1]]], np.float32)} for image in images]


def test_int8_is_the_network_alone(exported, tmp_path, monkeypatch):
    """And the same look at a file in which decoding slipped in finds it."""
    detector, module, _ = exported
    path = Path(shutil.copy(file_of(module), tmp_path))
    pairs = ("QuantizeLinear", "DequantizeLinear")
    file = quantize.write_onnx(path, calibration())
    assert quantised_operations(*onnx_operations(file), pairs) == []
    kinds = [*onnx_operations(file)[1].values()]
    assert kinds.count("QuantizeLinear") > 10
    initial = {i.name: i.data_type for i in importlib.import_module("onnx").load(file).graph.initializer}
    assert [initial[name] for name in sorted(quantize.PREDICTORS)] == [1, 1]  # float32
    images, cameras = pictures(2)
    int8 = FileDetector(file, "onnx").predict(images, cameras)
    for found, expected in zip(int8, detector.predict(images, cameras), strict=True):
        assert 0.3 < len(found) / len(expected) < 3
    everything = [name for name, kind in onnx_operations(path)[1].items() if kind in quantize.KINDS]
    monkeypatch.setattr(quantize, "find_nodes", lambda graph: everything)
    assert len(quantised_operations(*onnx_operations(quantize.write_onnx(path, calibration())), pairs)) > 5


def test_int8_keeps_no_range_that_an_activation_cuts_off(tmp_path):
    """Of a network with ReLU6: its convolutions' outputs are not rounded before it."""
    for package in export.NEEDED:
        pytest.importorskip(package, reason=f"export needs {package}")
    detector = Detector(dataclasses.replace(TINY, backbone="tf_efficientnet_lite0")).eval()
    reads, kinds = onnx_operations(quantize.write_onnx(export.export(detector, tmp_path), calibration()))

    def sources(name):
        return [source for source in reads.get(name, ()) if source in kinds]

    cut = [name for name, kind in kinds.items() if kind in ("Clip", "Relu")]
    before = {name: [kinds[first] for source in sources(name) for first in sources(source)] for name in cut}
    assert not [name for name, found in before.items() if "QuantizeLinear" in found]
    assert [*kinds.values()].count("QuantizeLinear") > 50


def test_int8_of_openvino_is_the_network_alone(exported, tmp_path):
    """OpenVINO names a convolution with bias otherwise than the file does: names taken from that would not hold."""
    for package in ("openvino", "nncf"):
        pytest.importorskip(package, reason=f"--openvino --int8 needs {package}")
    path = Path(shutil.copy(file_of(exported[1]), tmp_path))
    file = quantize.write_openvino(path, calibration())
    model = importlib.import_module("openvino").Core().read_model(file)
    operations = model.get_ordered_ops()
    reads = {one.friendly_name: [v.get_node().friendly_name for v in one.input_values()] for one in operations}
    kinds = {one.friendly_name: one.get_type_name() for one in operations}
    assert quantised_operations(reads, kinds, ("FakeQuantize",)) == []
    assert [*kinds.values()].count("FakeQuantize") > 10
    assert FileDetector(file, "openvino").config == exported[0].config


def test_one_table_of_accuracy_and_speed(exported, tmp_path, monkeypatch, capsys):
    """Of the files that are there; the others are left out by name. What is lost is told against torch in fp32."""
    path = file_of(exported[1])
    images, cameras = pictures(1)
    images[0].save(tmp_path / "image.png")
    car = {"class": "Car", "center": [0, 1, 10], "size": [4, 1.5, 1.7], "yaw": 0.0}
    frame = {"image": str(tmp_path / "image.png"), "K": cameras[0].tolist(), "objects": [car]}
    (tmp_path / "val.jsonl").write_text(json.dumps(frame))
    monkeypatch.setattr(deploy, "begin", lambda folder, config: None)
    monkeypatch.setattr(deploy, "export", lambda detector, folder, half=False: path)  # as it is: they are tested above
    monkeypatch.setattr(deploy, "calibration_inputs", lambda config, options: [])
    monkeypatch.setattr(deploy, "write", lambda *_: [])
    monkeypatch.setattr(engine.runtime, "native_bf16", lambda: False)
    monkeypatch.setattr(deploy, "native_bf16", lambda: False)
    monkeypatch.setattr(deploy, "CALLS", 2)
    val = json.dumps([{"kind": "jsonl", "root": str(tmp_path / "val.jsonl")}])
    words = [path.parents[1] / "run", "--turns", 1, "--out", path.parent, "--json", tmp_path / "table.json"]
    words = [*map(str, words), f"data.val={val}", "data.index=none", "data.workers=0"]
    assert deploy.main(words) == 0, capsys.readouterr().err
    table, printed = json.loads((tmp_path / "table.json").read_text()), capsys.readouterr().out
    rows = {(row["runtime"], row["precision"]): row for row in table["rows"]}
    assert {("torch", "fp32"), ("onnxruntime", "fp32")} <= {*rows}
    for row in rows.values():
        assert row["speed_ratio"] > 0
        assert row["ms_4_p90"] >= row["ms_4"] > row["ms_after"] > 0
        assert abs(row["ap_2d_lost"]) + abs(row["ap_3d_lost"]) < 0.01
        assert {*row["classes"]} == {*TINY.classes}
    assert rows["torch", "fp32"]["speed_ratio"] == 1
    assert "onnxruntime int8" in " ".join(table["left_out"])
    assert "left out: torch bf16" in printed
    assert printed.count("\n| ") == len(rows) + 2


def test_a_folder_holds_the_files_of_one_detector(tmp_path):
    kept = ["model_car_v1.onnx", "modeling.bin", "notes.txt"]
    for name in ("model.onnx", "model.int8.onnx", "model.int8.xml", "model.int8.bin", *kept):
        (tmp_path / name).write_text("of another")
    export.begin(tmp_path, Config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", *kept]
    assert read_config(tmp_path / "config.json") == Config()


def test_bf16_is_native_where_the_processor_says_so(monkeypatch):
    for flags, native in (
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"bf16": False}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert engine.runtime.native_bf16() == (native and torch.backends.mkldnn.is_available())


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
    text = fails(capsys, run, "model.size=100,320")
    assert "model.size is (100, 320), expected (height, width) in multiples of the largest stride, 32" in text
    assert "no such folder, expected a run or a checkpoint" in fails(capsys, tmp_path / "ran")
    assert "two precisions" in fails(capsys, run, "--half", "--int8")
    assert "--frames is 0, expected at least 1" in fails(capsys, run, "--int8", "--frames", 0)
    assert "--frames is 40, expected at least 1, and --int8" in fails(capsys, run, "--frames", 40)
    assert "or its weights, expected a folder of its own" in fails(capsys, run, "--out", run / "best")
    (tmp_path / "exported").mkdir()
    good = tmp_path / "exported/model.onnx"
    good.write_text("the last one")
    words = (run, "--out", good.parent, "--int8", f"data.root={tmp_path / 'nowhere'}")
    assert "nowhere: expected a KITTI folder" in fails(capsys, *words)
    assert good.read_text() == "the last one"  # and what cannot be measured leaves it alone
    monkeypatch.setattr(export, "NEEDED", ("json", "onnx_of_nobody", "onnxruntime_of_nobody"))
    text = fails(capsys, tmp_path / "ran")
    assert "onnx_of_nobody and onnxruntime_of_nobody: not installed; pip install json onnx_of_nobody" in text
