"""Hashes that a rebuilding must give again: the final weights of six short runs, and the metrics of three evaluations.

python -m lab.reference [--folder DIR] [--against lab/reference.json] [--write lab/reference.json]

Everything is run by the commands that users type, on one thread, in a new folder. The runs: the built-in world; KITTI frames with
workers, accumulation, drop-path and colour; two processes; the nuScenes world; JSON lines from a tar; one that is interrupted and goes on
(its weights are those of the first one's). With another torch, C library or processor all of them may differ.
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

ROOT = Path(__file__).parents[1]
KITTI = ROOT.parent / "shared/data/kitti_mini"
SMALL = ["model.backbone=test_resnet", "model.size=96,320", "model.channels=32", "data.scale=0.8,1.2", "data.colour=0.2",
         "train.batch_size=2", "train.steps=12", "train.warmup=3", "train.all_cells=4", "train.eval_every=0", "train.save_every=4",
         "train.log_every=2"]  # fmt: skip
WORLD = ['data.train=[{"kind":"synthetic","split":["train"],"world_frames":24}]',
         'data.val=[{"kind":"synthetic","split":["val"],"world_frames":8}]']  # fmt: skip


def run(*arguments, script="train.py", processes=1, check=True):
    """Finish a command of the project on one thread; returns its CompletedProcess."""
    start = [sys.executable, script]
    if processes > 1:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
                 "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1", "--main_process_port", "0", script]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2" if processes > 1 else "1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [*start, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    if check and done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    return done


def weights_of(out):
    """SHA-256 over names and bytes of all tensors of a run's last checkpoint, averaged weights first."""
    folder = sorted((out / "checkpoints").glob("step_*"))[-1]
    found = hashlib.sha256()
    for file in ("model.safetensors", "model_1.safetensors"):
        for name, value in sorted(load_file(folder / file).items()):
            found.update(name.encode() + value.tobytes())
    return found.hexdigest()


def metrics_of(path):
    """SHA-256 of the numbers of a metrics file, whatever the order of its keys; what tells of time and machine is left out."""
    metrics = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("eval_time", "meta", "settings", "cfg", "files")
    }
    return hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()


def write_tar(folder, source):
    """A JSON-lines file of the built-in world's frames whose pictures lie in a tar; two thirds of a line's objects have a box."""
    sys.path.insert(0, str(ROOT))
    from importlib import import_module

    read = import_module("formats.kitti").read_labels
    calib = import_module("formats.kitti").read_calib
    split = import_module("formats.kitti").split_projection
    world = next(path for path in sorted(source.rglob("training")) if path.is_dir())
    lines = []
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for image in sorted((world / "image_2").iterdir())[:16]:
            archive.add(image, f"a/{image.name}")
            K, offset = split(calib(world / "calib" / f"{image.stem}.txt"))
            labels = read(world / "label_2" / f"{image.stem}.txt").moved(offset)
            objects, ignore = [], []
            for i in range(len(labels)):
                if not labels.is_3d[i]:
                    ignore.append(labels.box[i].tolist())
                    continue
                entry = {
                    "class": labels.name[i],
                    "center": labels.center[i].tolist(),
                    "size": labels.size[i].tolist(),
                    "yaw": labels.yaw[i],
                }
                entry |= (
                    {
                        "box": labels.box[i].tolist(),
                        "truncation": max(0.0, labels.truncation[i]),
                        "occlusion": max(0, int(labels.occlusion[i])),
                    }
                    if i % 3
                    else {}
                )
                objects.append(entry)
            lines.append(
                json.dumps(
                    {"image": f"shard.tar/a/{image.name}", "K": K.tolist(), "objects": objects, "ignore": ignore}
                )
            )
    (folder / "mine.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "mine.jsonl"


def measure(folder):
    """All hashes, {name: hex digits}; runs whose data are not here are left out."""
    found, world = {}, folder / "world"
    run(
        f"data.root={world}",
        f"out={folder / 'world_run'}",
        *SMALL,
        *WORLD,
        "train.ema=0.9",
        "data.workers=0",
        "train.eval_every=0.5",
    )
    found["world"] = weights_of(folder / "world_run")
    if KITTI.is_dir():
        run("configs/kitti.py", f"data.root={KITTI}", f"out={folder / 'kitti'}", *SMALL, "data.workers=2", "train.accumulate=2", "model.pretrained=false",
            "model.backbone=resnet18", "model.drop_path=0.2", 'data.val=[{"kind":"kitti","split":["val"],"limit":10}]')  # fmt: skip
        found["kitti"] = weights_of(folder / "kitti")
        found["kitti metrics"] = metrics_of(folder / "kitti/best/metrics.json")
    run(
        f"data.root={world}",
        f"out={folder / 'two'}",
        *SMALL,
        *WORLD,
        "train.ema=0.9",
        "data.workers=1",
        "train.optimizer=adamw",
        "train.lr=1e-3",
        processes=2,
    )
    found["two processes"] = weights_of(folder / "two")
    small = [text for text in SMALL if not text.startswith("model.size")]
    run("configs/nuscenes_mini_world.py", f"data.root={folder / 'cameras'}", f"out={folder / 'nuscenes'}", *small, "model.size=112,192", "data.workers=0", "model.strides=8,16",
        'data.train=[{"kind":"synthetic","split":["mini_train"],"world_frames":48}]', 'data.val=[{"kind":"synthetic","split":["mini_val"],"world_frames":24}]')  # fmt: skip
    found["nuscenes world"] = weights_of(folder / "nuscenes")
    found["nuscenes metrics"] = metrics_of(folder / "nuscenes/best/metrics.json")
    lines = write_tar(folder, world)
    run("configs/kitti.py", f"out={folder / 'lines'}", *SMALL, "data.workers=1", "model.pretrained=false",
        f'data.train=[{{"kind":"jsonl","root":"{lines}"}}]', f'data.val=[{{"kind":"jsonl","root":"{lines}","limit":6}}]')  # fmt: skip
    found["json lines"] = weights_of(folder / "lines")
    found["json lines metrics"] = metrics_of(folder / "lines/best/metrics.json")
    interrupt(folder, world)
    found["interrupted"] = weights_of(folder / "stopped")
    return found


def interrupt(folder, world):
    """The first run once more, told to stop after its fifth step, and started again until it is done."""
    command = [
        f"data.root={world}",
        f"out={folder / 'stopped'}",
        *SMALL,
        *WORLD,
        "train.ema=0.9",
        "data.workers=0",
        "train.eval_every=0.5",
        "train.log_every=1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, "train.py", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = folder / "stopped/log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count('"train"') >= 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    if (folder / "stopped/DONE").exists():
        raise RuntimeError("the run to interrupt ended before it was interrupted")
    run(*command)


def main():
    """Print the hashes; exit code 1 where they differ from those of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    found = measure(folder)
    before = json.loads(options.against.read_text()) if options.against else {}
    for name, value in found.items():
        print(
            f"{name:20} {value[:16]}",
            "" if name not in before else "equal" if before[name] == value else f"was {before[name][:16]}",
        )
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(before.get(name, value) != value for name, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
