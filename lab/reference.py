"""Hashes that a rebuilding must give again: the final weights of six short runs, and the metrics of three evaluations.

python -m lab.reference [--folder DIR] [--against lab/reference.json] [--write lab/reference.json]

Everything is run by the commands that users type, on one thread, in a new folder. The runs: the built-in world; KITTI
frames with workers, accumulation, drop-path and colour; two processes; the nuScenes world; JSON lines from a tar; one
that is interrupted and goes on (its weights are those of the first one's). With another torch, C library or processor
all of them may differ.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

from formats.kitti import read_calib, read_labels, split_projection

ROOT = Path(__file__).parents[1]
KITTI = ROOT.parent / "shared/data/kitti_mini"
SMALL = [
    *("model.backbone=test_resnet", "model.size=96,320", "model.channels=32", "data.scale=0.8,1.2", "data.colour=0.2"),
    *("train.batch_size=2", "train.steps=12", "train.warmup=3", "train.all_cells=4", "train.eval_every=0"),
    *("train.save_every=4", "train.log_every=2"),
]
WORLD = [
    'data.train=[{"kind":"synthetic","split":["train"],"world_frames":24}]',
    'data.val=[{"kind":"synthetic","split":["val"],"world_frames":8}]',
]
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--num_machines", "1", "--main_process_port", "0"),
]


def environment(threads=1):
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "ACCELERATE_USE_CPU": "true",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def run(*arguments, processes=1):
    """Train with the command of a user, one thread a process."""
    command = [sys.executable, *(LAUNCH if processes > 1 else ()), "train.py", *map(str, arguments)]
    quiet = {"capture_output": True, "text": True, "timeout": 900}
    done = subprocess.run(command, cwd=ROOT, env=environment(processes), **quiet)
    if done.returncode:
        words = " ".join(map(str, arguments))
        raise RuntimeError(f"{words}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def weights_of(out):
    """SHA-256 over names and bytes of all tensors of a run's last checkpoint, averaged weights first."""
    folder = sorted((out / "checkpoints").glob("step_*"))[-1]
    digest = hashlib.sha256()
    for file in ("model.safetensors", "model_1.safetensors"):
        for name, value in sorted(load_file(folder / file).items()):
            digest.update(name.encode() + value.tobytes())
    return digest.hexdigest()


def metrics_of(path):
    """SHA-256 of the numbers of a metrics file, in any order of keys, without what tells of time and machine."""
    left_out = ("eval_time", "meta", "settings", "cfg", "files")
    metrics = {key: value for key, value in json.loads(path.read_text()).items() if key not in left_out}
    return hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()


def write_tar(folder, source):
    """A JSON-lines file of the built-in world's frames, pictures in a tar; two of three objects have a 2D box."""
    world = next(path for path in sorted(source.rglob("training")) if path.is_dir())
    lines = []
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for image in sorted((world / "image_2").iterdir())[:16]:
            archive.add(image, f"a/{image.name}")
            K, offset = split_projection(read_calib(world / "calib" / f"{image.stem}.txt"))
            labels = read_labels(world / "label_2" / f"{image.stem}.txt").moved(offset)
            objects, ignore = [], []
            for i in range(len(labels)):
                if not labels.is_3d[i]:
                    ignore.append(labels.box[i].tolist())
                    continue
                entry = {"class": labels.name[i], "center": labels.center[i].tolist()}
                entry |= {"size": labels.size[i].tolist(), "yaw": labels.yaw[i]}
                if i % 3:
                    entry |= {"box": labels.box[i].tolist(), "truncation": max(0.0, labels.truncation[i])}
                    entry["occlusion"] = max(0, int(labels.occlusion[i]))
                objects.append(entry)
            line = {"image": f"shard.tar/a/{image.name}", "K": K.tolist(), "objects": objects, "ignore": ignore}
            lines.append(json.dumps(line))
    (folder / "mine.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "mine.jsonl"


def source(name, kind, **fields):
    """The override that makes data.<name> one source."""
    return f"data.{name}={json.dumps([{'kind': kind, **fields}])}"


def measure(folder):
    """All hashes, {name: hex digits}; runs whose data are not here are left out."""
    hashes, world = {}, folder / "world"
    first = [f"data.root={world}", *SMALL, *WORLD, "train.ema=0.9", "data.workers=0", "train.eval_every=0.5"]
    run(*first, f"out={folder / 'world_run'}")
    hashes["world"] = weights_of(folder / "world_run")
    if KITTI.is_dir():
        words = ["configs/kitti.py", f"data.root={KITTI}", f"out={folder / 'kitti'}", *SMALL, "data.workers=2"]
        words += ["train.accumulate=2", "model.pretrained=false", "model.backbone=resnet18", "model.drop_path=0.2"]
        run(*words, source("val", "kitti", split=["val"], limit=10))
        hashes["kitti"] = weights_of(folder / "kitti")
        hashes["kitti metrics"] = metrics_of(folder / "kitti/best/metrics.json")
    words = [f"data.root={world}", f"out={folder / 'two'}", *SMALL, *WORLD, "train.ema=0.9", "data.workers=1"]
    run(*words, "train.optimizer=adamw", "train.lr=1e-3", processes=2)
    hashes["two processes"] = weights_of(folder / "two")
    small = [text for text in SMALL if not text.startswith("model.size")]
    words = ["configs/nuscenes_mini_world.py", f"data.root={folder / 'cameras'}", f"out={folder / 'nuscenes'}", *small]
    words += ["model.size=112,192", "data.workers=0", "model.strides=8,16"]
    words.append(source("train", "synthetic", split=["mini_train"], world_frames=48))
    run(*words, source("val", "synthetic", split=["mini_val"], world_frames=24))
    hashes["nuscenes world"] = weights_of(folder / "nuscenes")
    hashes["nuscenes metrics"] = metrics_of(folder / "nuscenes/best/metrics.json")
    lines = str(write_tar(folder, world))
    words = ["configs/kitti.py", f"out={folder / 'lines'}", *SMALL, "data.workers=1", "model.pretrained=false"]
    run(*words, source("train", "jsonl", root=lines), source("val", "jsonl", root=lines, limit=6))
    hashes["json lines"] = weights_of(folder / "lines")
    hashes["json lines metrics"] = metrics_of(folder / "lines/best/metrics.json")
    interrupt(folder / "stopped", first)
    hashes["interrupted"] = weights_of(folder / "stopped")
    return hashes


def interrupt(out, words):
    """The first run once more, told to stop after its fifth step, and started again until it is done."""
    words = [*words, f"out={out}", "train.log_every=1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, env=environment(), **quiet)
    log = out / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count('"train"') >= 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    if (out / "DONE").exists():
        raise RuntimeError("the run to interrupt ended before it was interrupted")
    run(*words)


def main():
    """Print the hashes; exit code 1 where they differ from those of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    hashes = measure(folder)
    before = json.loads(options.against.read_text()) if options.against else {}
    for name, value in hashes.items():
        old = before.get(name, "")
        print(f"{name:20} {value[:16]}", "equal" if old == value else f"was {old[:16]}" if old else "")
    if options.write:
        options.write.write_text(json.dumps(hashes, indent=1) + "\n")
    return int(any(before.get(name, value) != value for name, value in hashes.items()))


if __name__ == "__main__":
    sys.exit(main())
