"""The rule of the house: core imports no extra. Copied alone it trains, goes on and evaluates; without any one extra
the rest works."""

import json
import shutil
import subprocess
import sys

import forked
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from formats.kitti import write_calib, write_labels
from scene.frames import make_labels
from scene.geometry import project_boxes

CORE = (
    "train",
    "model",
    "data",
    "losses",
    "targets",
    "config",
    "evaluate",
    "predict",
    "export",
    "engine",
    "scene",
    "formats/kitti",
    "formats/odd",
    "metrics/kitti",
    "metrics/kitti_files",
    "metrics/kitti_notes",
    "configs/kitti",
)
EXTRAS = (
    "formats/jsonl",
    "formats/nuscenes",
    "formats/tables",
    "formats/truckscenes",
    "formats/t4",
    "formats/argoverse",
    "formats/omni3d",
    "formats/index",
    "formats/tar",
    "formats/cache",
    "formats/video",
    "formats/synthetic",
    "formats/mixture",
    "formats/files",
    "formats/columns",
    "metrics/nuscenes",
    "metrics/nuscenes_files",
    "metrics/argoverse",
    "world",
    "tools",
    "lab",
    "examples",
)
SMALL = (
    "model.pretrained=false",
    "model.backbone=test_resnet",
    "model.size=96,320",
    "model.channels=32",
    "train.batch_size=1",
    "train.warmup=0",
    "data.workers=0",
    "train.save_every=1",
    "train.log_every=1",
    "train.eval_every=0",
    "model.classes=Car",
)


def copy(names, folder):
    """Files and folders of the project, by their names without suffix."""
    for name in names:
        source = ROOT / name
        if source.is_dir() and not source.with_suffix(".py").is_file():  # data/ may lie beside data.py
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.with_suffix(".py"), (folder / name).with_suffix(".py"))


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    """A KITTI folder of two frames of noise, a car in each."""
    root = tmp_path_factory.mktemp("kitti")
    rng = np.random.default_rng(0)
    K = np.array([[400.0, 0, 320], [0, 400, 96], [0, 0, 1]])
    for name in ("image_2", "label_2", "calib"):
        (root / "training" / name).mkdir(parents=True)
    (root / "ImageSets").mkdir()
    for split in ("train", "val"):
        (root / f"ImageSets/{split}.txt").write_text("000000\n000001\n")
    for i in range(2):
        place = np.array([[2.0 - 4 * i, 1.0, 14.0 + 4 * i]]), np.array([[4.0, 1.5, 1.7]]), np.array([0.3 + i])
        box = np.clip(project_boxes(*place, K)[0], 0, [639, 191, 639, 191])
        center, size, yaw = place
        labels = make_labels(["Car"], box, size, center, yaw, truncation=[0.0], occlusion=[0])
        write_labels(root / f"training/label_2/{i:06d}.txt", labels)
        write_calib(root / f"training/calib/{i:06d}.txt", np.column_stack([K, np.zeros(3)]))
        pixels = rng.integers(0, 255, (192, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"training/image_2/{i:06d}.png")
    return root


def run(folder, *command):
    """Finish a script in a folder; returns what it printed."""
    [done] = forked.run(folder, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_core_alone_trains_goes_on_and_evaluates(kitti, tmp_path):
    copy(CORE, tmp_path)
    arguments = ("configs/kitti.py", f"data.root={kitti}", "out=run", *SMALL)
    said = run(tmp_path, "train.py", *arguments, "train.steps=2")
    assert "Epoch [1][2/2]" in said
    assert not (tmp_path / "run/training.png").exists()  # an extra
    metrics = json.loads((tmp_path / "run/best/metrics.json").read_text())
    assert metrics["counted"]["Car"]["hard"] == 2
    again = run(tmp_path, "train.py", *arguments, "train.steps=3", "train.schedule=constant")
    assert "resumed from run/checkpoints/step_00000002" in again
    assert "Car" in run(tmp_path, "evaluate.py", "run")
    assert (tmp_path / "run/evaluation/results/000001.txt").is_file()
    table = run(tmp_path, "evaluate.py", "--labels", kitti / "training/label_2", "--results", "run/evaluation/results")
    assert "AP_R40" in table
    picture = kitti / "training/image_2/000000.png"
    run(tmp_path, "predict.py", "run", picture, "--hfov", "80", "--min-score", "0", "--device", "cpu")
    assert (tmp_path / "predictions/predictions.jsonl").is_file()


CHECK = """
import importlib, json, os, sys, traceback

import accelerate, huggingface_hub, timm, torch, torchvision

for folder, names in json.load(sys.stdin).items():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    os.chdir(folder)  # which the first entry of sys.path, an empty one, stands for
    try:
        for name in names:
            importlib.import_module(name)
    except BaseException:
        print(folder)
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(0)
"""


def modules_without(extra, folder):
    """Copies the project but for an extra; returns the modules that do not name it, nor what does."""
    others = [name for name in EXTRAS if name != extra]
    copy([*CORE, *(name for name in others if (ROOT / name).is_dir() | (ROOT / f"{name}.py").is_file())], folder)
    dialects = {"formats.truckscenes", "formats.t4"}
    argoverse = {"formats.argoverse", "metrics.argoverse"}
    tables = {"formats.nuscenes", *dialects, *argoverse, "metrics.nuscenes", "metrics.nuscenes_files", "world.cameras"}
    goes_along = {
        "formats/nuscenes": tables,
        "formats/tables": tables,
        "formats/argoverse": argoverse,
        "metrics/nuscenes_files": {"metrics.nuscenes"},
        "world": {"formats.synthetic"},
        "formats/files": {"formats.index", "formats.cache", "world.street", "world.cameras", "world.like"},
        "formats/jsonl": {"formats.omni3d"},
        "formats/columns": {"formats.jsonl", "formats.omni3d", "formats.tables", *tables},
    }.get(extra, set())
    paths = [path for room in ("formats", "metrics", "world") for path in (folder / room).glob("*.py")]
    modules = [".".join(path.relative_to(folder).with_suffix("").parts) for path in [*folder.glob("*.py"), *paths]]
    return [name for name in modules if name not in goes_along]


def test_deleting_an_extra_breaks_nothing_else(tmp_path):
    """Every other module that does not name it is imported: each deletion in a process of its own, forked from one that
    has imported what takes seconds."""
    folders = {extra: tmp_path / extra.replace("/", "_") for extra in EXTRAS}
    modules = {str(folder): modules_without(extra, folder) for extra, folder in folders.items()}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, input=json.dumps(modules), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-3000:]
