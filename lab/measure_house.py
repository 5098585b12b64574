"""How large this checkout is, beside what it should be: one table of the measures that every change is held against.

python -m lab.measure_house [--json OUT]      exit code 1 where an aim is missed

What is imported is measured on a run of train.py with configs/kitti.py: two steps and an evaluation, on frames written
here.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from formats.kitti import write_calib, write_labels
from scene.frames import make_labels

ROOT = Path(__file__).parents[1]
# what else lies there is an extra
CORE = {"formats": ("kitti", "odd"), "metrics": ("kitti", "kitti_files", "kitti_notes")}
EXTRA_FOLDERS = ("world", "tools", "lab")
PICTURE = "tools/training.py"  # the one extra that every run finds by its name; without it there is no training.png
AIMS = {  # the most that each may be; for the last one, what it has to be
    "product bytes": 480_000,
    "product lines": 9_300,
    "closure files": 17,
    "closure lines": 4_800,
    "train() lines": 75,
    "train() own names": 26,
    "train() locals": 42,
    "files at the root": 9,
    "longest core file": 560,
    "README words": 1_100,
    "RESULTS.md bytes": 20_000,
    "optimizer.step() in train()": True,
}
SMALL = [
    "model.backbone=test_resnet",
    "model.pretrained=false",
    "model.size=64,160",
    "model.channels=32",
    "data.workers=0",
    "train.batch_size=1",
    "train.steps=2",
    "train.eval_every=0",
]
CHILD = """
import atexit, json, runpy, sys

def tell(path=sys.argv.pop(1)):
    files = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
    with open(path, "w") as file:
        json.dump(files, file)

atexit.register(tell)
sys.argv[0] = "train.py"
sys.path.insert(0, ".")
runpy.run_path("train.py", run_name="__main__")
"""


def write_frames(folder):
    """Two frames in KITTI's layout, one to train on and one to evaluate; each holds an object of every class."""
    rng, K = np.random.default_rng(0), np.array([[90.0, 0, 80], [0, 90, 32], [0, 0, 1]])
    names = ["Car", "Pedestrian", "Cyclist"]
    box = np.array([[20.0, 20, 50, 50], [60, 20, 80, 50], [90, 20, 120, 50]])
    center = np.array([[-5.0, 1, 10], [-1, 1, 10], [3, 1, 10]])
    labels = make_labels(names, box, np.full((3, 3), 1.7), center, np.zeros(3), np.zeros(3), np.zeros(3))
    for name in ("image_2", "calib", "label_2"):
        (folder / "training" / name).mkdir(parents=True)
    (folder / "ImageSets").mkdir()
    for id, split in (("000000", "train"), ("000001", "val")):
        pixels = rng.integers(0, 255, (64, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"training/image_2/{id}.png")
        write_calib(folder / f"training/calib/{id}.txt", np.column_stack([K, np.zeros(3)]))
        write_labels(folder / f"training/label_2/{id}.txt", labels)
        (folder / f"ImageSets/{split}.txt").write_text(f"{id}\n")


def closure():
    """Paths, relative to the root, of the repository's files that a short KITTI run imports, train.py among them.

    Without PICTURE, which may be deleted, and __init__.py, which do nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_frames(folder / "kitti")
        words = ["configs/kitti.py", f"data.root={folder / 'kitti'}", f"out={folder / 'run'}", *SMALL]
        command = [sys.executable, "-c", CHILD, str(folder / "files.json"), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"train.py ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        files = {Path(file).resolve() for file in json.loads((folder / "files.json").read_text())}
    tracked = set(list_files("*.py"))
    ours = {str(file.relative_to(ROOT)) for file in files if file.is_relative_to(ROOT)}
    return sorted(path for path in (ours & tracked) - {PICTURE} | {"train.py"} if not path.endswith("__init__.py"))


def list_files(pattern):
    """Paths, relative to the root, of the files that git knows or that are new."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in dict.fromkeys(listed) if (ROOT / path).is_file()]


def count_lines(path):
    return (ROOT / path).read_bytes().count(b"\n")


def product_files():
    """All that is not tests and not this bench."""
    return [path for path in list_files("*.py") if not path.startswith(("tests/", "lab/"))]


def is_extra(path):
    """Whether a file may be deleted while what is left still trains on KITTI."""
    folder, _, name = path.removesuffix(".py").rpartition("/")
    return folder in EXTRA_FOLDERS or (folder in CORE and name not in CORE[folder])


def core_files():
    """What train.py, evaluate.py, predict.py and export.py stand on, for one format and one metric."""
    return [path for path in product_files() if not is_extra(path) and not path.startswith(("configs/", "examples/"))]


def measure_loop():
    """train() of train.py: its lines, names of ours that it uses, locals, and whether optimizer.step() stands in it."""
    tree = ast.parse((ROOT / "train.py").read_text())
    [loop] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    modules = {path.removesuffix(".py").replace("/", ".") for path in list_files("*.py")}
    ours = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            ours |= {alias.asname or alias.name for alias in node.names}
    names = [node for node in ast.walk(loop) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {arg.arg for arg in loop.args.args}
    calls = {ast.unparse(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)}
    return {
        "train() lines": loop.end_lineno - loop.lineno + 1,
        "train() own names": len({node.id for node in names} & ours),
        "train() locals": len(stored),
        "optimizer.step() in train()": "optimizer.step" in calls,
    }


def measure():
    """Every measure of AIMS, in their order."""
    product, files = product_files(), closure()
    measures = {
        "product bytes": sum((ROOT / path).stat().st_size for path in product),
        "product lines": sum(map(count_lines, product)),
        "closure files": len(files),
        "closure lines": sum(map(count_lines, files)),
        "files at the root": len([path for path in product if "/" not in path]),
        "longest core file": max(map(count_lines, core_files())),
        "README words": len((ROOT / "README.md").read_text().split()),
        "RESULTS.md bytes": (ROOT / "RESULTS.md").stat().st_size,
        **measure_loop(),
    }
    return {name: measures[name] for name in AIMS}, files


def reached(value, aim):
    return value == aim if isinstance(aim, bool) else value <= aim


def main(arguments=None):
    """Command line entry: exit code 0 where every aim is reached, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers there")
    options = parser.parse_args(arguments)
    measures, files = measure()
    print(f"{'':<30}{'now':>10}{'aim':>10}")
    for name, value in measures.items():
        missed = "" if reached(value, AIMS[name]) else "  missed"
        print(f"{name:<30}{value!s:>10}{AIMS[name]!s:>10}{missed}")
    longest = sorted(core_files(), key=count_lines)[-3:]
    print(f"\nimported by a KITTI run: {', '.join(f'{path} {count_lines(path)}' for path in files)}")
    print(f"longest core files: {', '.join(f'{path} {count_lines(path)}' for path in reversed(longest))}")
    if options.json:
        options.json.write_text(json.dumps({"measures": measures, "aims": AIMS, "closure": files}, indent=1) + "\n")
    return int(not all(reached(value, AIMS[name]) for name, value in measures.items()))


if __name__ == "__main__":
    sys.exit(main())
