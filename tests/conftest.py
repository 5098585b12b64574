"""What several test files share: the real labels, a tiny built-in world, and one tiny trained run."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from formats.kitti import read_calib, read_labels, split_projection

ROOT = Path(__file__).parents[1]
os.environ.pop("OMP_NUM_THREADS", None)  # runs in this process and in others must round alike
SHARED = ROOT.parent / "shared/data"

# Facts of the four KITTI calibrations: P2 by rows (fx, cx, p4x, fy, cy, p4y, p4z) and the image size (width, height).
KITTI_CAMERAS = {
    (721.5377, 609.5593, 44.85728, 721.5377, 172.8540, 0.2163791, 0.002745884): (1242, 375),
    (707.0493, 604.0814, 45.75831, 707.0493, 180.5066, -0.3454157, 0.004981016): (1224, 370),
    (718.3351, 600.3891, 44.50382, 718.3351, 181.5122, -0.5951107, 0.002616315): (1238, 374),
    (718.8560, 607.1928, 45.38225, 718.8560, 185.2157, -0.1130887, 0.003779761): (1241, 376),
}
KITTI_SIZES = {camera[0]: size for camera, size in KITTI_CAMERAS.items()}  # by focal length


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and a forked process would wait for ever for threads that it has not."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def kitti_folder(tmp_path_factory):
    """training/{label_2,calib} of all 7481 KITTI frames."""
    archive = SHARED / "kitti_eval/val/label_2_calib_splits.tar.gz"
    if not archive.is_file():
        pytest.skip(f"the real KITTI labels are not here: {archive}")
    folder = tmp_path_factory.mktemp("kitti")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / "training"


@pytest.fixture(scope="session")
def kitti_frames(kitti_folder):
    """(id, labels in rectified camera 0, K, offset) of all 7481 frames."""
    frames = []
    for path in sorted((kitti_folder / "label_2").iterdir()):
        K, offset = split_projection(read_calib(kitti_folder / "calib" / path.name))
        frames.append((path.stem, read_labels(path), K, offset))
    return frames


@pytest.fixture(scope="session")
def invented(tmp_path_factory):
    """Folder with v1.0-mini, result files and what the official devkit says; it holds no pictures."""
    folder = tmp_path_factory.mktemp("invented")
    with tarfile.open(Path(__file__).parent / "data/nuscenes_invented.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


WORLD = {"train": 8, "val": 4}  # frames of the tiny world


def tiny(world, out, *more, kitti=False):
    """Overrides of a run of seconds on the tiny world, or a KITTI folder: with augmentation, average and warm-up."""
    sources = []
    for split, count in () if kitti else WORLD.items():
        source = {"kind": "synthetic", "split": [split], "world_frames": count}
        sources.append(f"data.{split}={json.dumps([source])}")
    return [
        f"data.root={world}", f"out={out}", *sources, "data.workers=0", "data.scale=0.9,1.2", "data.colour=0.2",
        "model.backbone=test_resnet", "model.size=96,320", "model.channels=32", "train.batch_size=2", "train.steps=6",
        "train.warmup=3", "train.ema=0.9", "train.save_every=2", "train.keep=3",
        "train.log_every=1", "train.eval_every=0", "train.all_cells=1", *more,
    ]  # fmt: skip


def command_line(*arguments, processes=1, script="train.py"):
    """(command, environment) of `accelerate launch train.py` as a user would; on the CPU whatever the machine has."""
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1", "--cpu"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, *plain, script, *map(str, arguments)]
    return command, {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def launch(*arguments, processes=1, script="train.py", timeout=240):
    """Run it to its end."""
    command, environment = command_line(*arguments, processes=processes, script=script)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(world, run folder, finished process) of one tiny training, uninterrupted."""
    folder = tmp_path_factory.mktemp("tiny")
    world, out = folder / "world", folder / "whole"
    finished = launch(*tiny(world, out))
    assert finished.returncode == 0, finished.stderr
    return world, out, finished


@pytest.fixture
def one_thread_of_commands(monkeypatch):
    """A main() that is called here keeps to it; several threads wait for each other where other tests use the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
