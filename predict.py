"""Predict 3D boxes for single images.

python predict.py RUN IMAGE ... --calib calib.txt | --intrinsics FX FY CX CY | --hfov DEG   [--out DIR] [--min-score S] [--device D]

RUN is a run folder, a folder with config.json and model.safetensors, or a Hugging Face hub id. Written to DIR: predictions.jsonl (the
JSON lines of formats/jsonl.py, in each image's camera frame), results/NAME.txt (KITTI result format; in rectified camera 0 with --calib)
and pictures/NAME.png.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint import find_checkpoint
from draw import draw_frame
from formats.jsonl import write_jsonl
from formats.kitti import read_calib, split_projection, write_labels
from frames import Frame, decode, opened, upright
from geometry import camera_problem
from model import Detector

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name


def load_detector(run: str, device: str = "cpu") -> Detector:
    """The detector of a run folder (its best, else its newest), a checkpoint folder, or a hub id (owner/name), ready to predict.

    Raises FileNotFoundError saying what was looked for, ValueError naming the folder when what is there does not load.
    """
    local = Path(run).exists() or Path(run).parent.is_dir() or not HUB_ID.fullmatch(run)
    if local and not Path(run).is_dir():
        near = difflib.get_close_matches(Path(run).name, [p.name for p in Path(run).parent.glob("*/")], 3, 0.4)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise FileNotFoundError(f"{run}: no such folder, expected a run or a checkpoint{hint}")
    folder = str(find_checkpoint(run)) if local else run
    try:
        return Detector.from_pretrained(folder, map_location=device).to(device).eval()
    except Exception as error:  # damaged files, another architecture, no network: each library has errors of its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not local:
            raise FileNotFoundError(f"{run}: no such folder here, and not loaded from the hub either: {first}") from error
        raise ValueError(f"{folder}: cannot load the detector: {first}") from error


def open_image(path: str | Path) -> Image.Image:
    """RGB image, upright where EXIF says that viewers turn it, from 8 or 16 bits, grey, palette or with alpha (dropped).

    Raises FileNotFoundError, OSError when it cannot be decoded, or ValueError when its pixels have no known range.
    """
    with opened(path) as file:
        mode, image = file.mode, decode(upright(file)).copy()
    if mode == "F":
        raise ValueError(f"{path}: pixels are floating-point numbers of unknown range, expected 8 or 16 bits")
    return image


def camera_of(options: argparse.Namespace, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """K (3, 3) for an image of that (width, height), and offset (3,) metres with camera = rectified camera 0 + offset (else zeros).

    With --hfov: square pixels, the principal point in the middle of the image, and its width seen under that angle.
    Raises FileNotFoundError or ValueError for a calibration file that lacks P2.
    """
    if options.calib:
        return split_projection(read_calib(options.calib))
    width, height = size
    if options.intrinsics:
        fx, fy, cx, cy = options.intrinsics
    else:
        fx = fy = width / 2 / math.tan(math.radians(options.hfov) / 2)
        cx, cy = (width - 1) / 2, (height - 1) / 2
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), np.zeros(3)


def checked_camera(path: Path, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """K and offset of an image, of which only the header is read. Raises ValueError when the camera does not suit it."""
    with opened(path) as file:
        size = upright(file).size
    K, offset = camera_of(options, size)
    if problem := camera_problem(K, *size):
        raise ValueError(f"{path}: the camera given does not suit it: {problem}")
    return K, offset


def predict_file(detector: Detector, path: Path, name: str, options: argparse.Namespace) -> Frame:
    """Predict one image; writes its result file and picture as `name` and returns its JSON line."""
    image, (K, offset) = open_image(path), checked_camera(path, options)
    found = detector.predict(image, K, min_score=options.min_score or 0.0)
    write_labels(options.out / "results" / f"{name}.txt", found.moved(-offset), scores=True, digits=4)
    draw_frame(image, K, found, None, min_score=options.draw_score).save(options.out / "pictures" / f"{name}.png")
    best = "" if not len(found) else f", best {found.name[0]} {found.score[0]:.2f} at {found.center[0, 2]:.1f} m"
    print(f"{path}: {len(found)} objects{best}")
    return Frame(name, path.absolute(), K, found)


def unique_names(paths: list[Path]) -> list[str]:
    """A name for each image's outputs: its file name without suffix, with its folders where that is not unique.

    Raises ValueError when two images would still be written under one name.
    """
    count = Counter(path.stem for path in paths)
    whole = ["_".join(part for part in path.with_suffix("").parts if part not in ("/", "..")) for path in paths]
    names = [path.stem if count[path.stem] == 1 else long for path, long in zip(paths, whole, strict=True)]
    for name, number in Counter(names).items():
        if number > 1:
            raise ValueError(f"{number} images would be written as {name}: predict them one by one, each with its own --out")
    return names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    parser.add_argument("--calib", metavar="FILE", help="KITTI calibration file (P2); results are then in rectified camera 0")
    parser.add_argument("--intrinsics", metavar=("FX", "FY", "CX", "CY"), nargs=4, type=float, help="pixels of the image as stored")
    parser.add_argument("--hfov", metavar="DEG", type=float, help="horizontal field of view, degrees")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("predictions"), help="default: predictions")
    parser.add_argument("--min-score", metavar="S", type=float, help="least score that is written (default: all) and drawn (default: 0.3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    options = parser.parse_args(arguments)
    given = [name for name in ("calib", "intrinsics", "hfov") if getattr(options, name) is not None]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        parser.error(f"expected one of --calib FILE, --intrinsics FX FY CX CY and --hfov DEG, got {got}: depth needs to know the camera")
    if options.hfov is not None and not 0 < options.hfov < 180:
        parser.error(f"--hfov is {options.hfov:g}, expected degrees between 0 and 180")
    if options.intrinsics and (min(options.intrinsics[:2]) <= 0 or not np.isfinite(options.intrinsics).all()):
        parser.error(f"--intrinsics is {' '.join(f'{v:g}' for v in options.intrinsics)}, expected finite pixels with FX and FY > 0")
    try:
        torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device is {options.device!r}, expected cpu, cuda, cuda:1 and so on")
    options.draw_score = 0.3 if options.min_score is None else options.min_score
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr for an error of the user's."""
    options = parse_arguments(arguments)
    try:
        names = unique_names(options.images)
        if options.calib and not Path(options.calib).is_file():
            raise FileNotFoundError(f"--calib {options.calib}: no such file")
        for path in options.images:
            checked_camera(path, options)  # a wrong image or camera is told before anything is loaded or written
        detector = load_detector(options.run, options.device)
        for folder in ("results", "pictures"):
            (options.out / folder).mkdir(parents=True, exist_ok=True)
        frames = [predict_file(detector, path, name, options) for path, name in zip(options.images, names, strict=True)]
        write_jsonl(options.out / "predictions.jsonl", frames)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {options.out}{os.sep}: predictions.jsonl, results and pictures of {len(frames)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
