"""KITTI's result files: average precision of those of any detector, the command of metrics/kitti.py, and curves.

LABELS and RESULTS are folders of KITTI files, one per frame, read in rectified camera 0 and compared as they are.
"""

import argparse
import importlib
import itertools
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from formats import odd
from formats.kitti import read_labels, read_split, write_labels
from metrics.kitti import CLASSES, MIN_OVERLAP, compute_metrics, table
from metrics.kitti_notes import describe_files, describe_labels
from scene.draw import write
from scene.frames import Labels, UserError, check_writable, sentence_of

LEVELS = {"easy": (86, 180, 233), "moderate": (0, 70, 140), "hard": (213, 94, 0)}  # colours of the curves
PANEL, PANEL_STEP = (300, 220), (368, 310)  # pixels: plotting area, and from one to the next
PANELS = {"bbox": ("2D precision", 0), "aos": ("AOS", 0), "bev": ("BEV precision", 1), "3d": ("3D precision", 2)}
FOLDERS = {"LABELS": ("label_2", "training/label_2"), "RESULTS": ("data", "results")}  # that usually hold the files
ERROR_COLUMNS = {  # title, digits
    "objects": ("objects", 0), "recall": ("recall", 2), "depth_error": ("depth m", 2), "depth_percent": ("depth %", 1),
    "depth_bias": ("bias m", 2), "heading_error": ("heading", 1), "heading_flipped": ("flipped", 2),
    "length_error": ("l m", 2), "height_error": ("h m", 2), "width_error": ("w m", 2),
    "within_1_sigma": ("1 sigma", 2), "within_2_sigma": ("2 sigma", 2), "sigma_ratio": ("ratio", 2),
}  # fmt: skip


def read_folder(labels, results, split=None):
    """Label and result files of the frames of a split file, or of all label files.

    Returns truth and results (id -> Labels in rectified camera 0), the ids without a result file, the ids of result
    files that belong to no frame, and the `odd` of `read_labels`. Raises UserError naming the file, and the line where
    there is one.
    """
    labels, results = find_folder(labels, "LABELS"), find_folder(results, "RESULTS")
    if split is not None and not split.endswith(".txt"):
        raise UserError(f"--split {split}: expected a .txt file that lists a frame a line")
    ids = sorted(path.stem for path in labels.glob("*.txt")) if split is None else read_split(".", split)
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{split}: frame {twice[0]} is listed twice; --repeat counts every frame several times")
    answered = {path.stem for path in results.glob("*.txt")}
    truth, detections, rows = {}, {}, []
    for id in tqdm(ids, "reading", unit=" frames", disable=None):
        if not (labels / f"{id}.txt").is_file():
            raise UserError(f"{labels / id}.txt: no label file for frame {id} of {split}")
        truth[id] = read_labels(labels / f"{id}.txt", odd=rows)
        if id in answered:
            detections[id] = read_labels(results / f"{id}.txt", scores=True)
    return truth, detections, [id for id in ids if id not in answered], sorted(answered - set(ids)), rows


def find_folder(path: str, title: str) -> Path:
    """The folder given as LABELS or RESULTS, of which the latter may be empty. Raises UserError, with advice."""
    folder = Path(path)
    if not path or not folder.is_dir():
        raise UserError(f"{title} {folder}: no such folder" if path else f"{title} is empty, expected a folder")
    if not any(folder.glob("*.txt")):
        inside = [folder / name for name in FOLDERS[title] if any((folder / name).glob("*.txt"))]
        if inside or title == "LABELS":
            hint = f"did you mean {inside[0]}?" if inside else "expected one file per frame, such as 000000.txt"
            raise UserError(f"{title} {folder}: no .txt files here; {hint}")
    return folder


def error_lines(errors):
    """The result of `object_errors` as lines: a row for each class and distance band that holds objects."""
    wide = max(10, *(len(name) for name in errors))
    lines = [
        "",
        "Matched objects (2D overlap > .5, best score) by depth in metres: mean absolute errors, heading in degrees,",
        "shares, and the ratio at which sigma would hold .757 of the errors",
        f"{'class':{wide}} {'band':>8}" + "".join(f"{title:>9}" for title, _ in ERROR_COLUMNS.values()),
    ]
    for name, bands in errors.items():
        for band, values in bands.items():
            if values["objects"]:
                row = [(values[key], digits) for key, (_, digits) in ERROR_COLUMNS.items()]
                cells = ["-" if value is None else f"{value:.{digits}f}" for value, digits in row]
                lines.append(f"{name:{wide}} {band:>8}" + "".join(f"{cell:>9}" for cell in cells))
    return lines


def write_results(folder: Path, truth: dict[str, Labels], predictions: dict[str, Labels], metrics: dict) -> None:
    """The files of an evaluation of a run: results/*.txt as the official evaluator takes them, and curves.png.

    Adds to the notes of the metrics what is odd in labels.
    """
    metrics.setdefault("notes", []).extend(describe_labels(truth, metrics["settings"]["classes"]))
    shutil.rmtree(folder / "results", ignore_errors=True)
    for id, labels in predictions.items():
        path = folder / "results" / f"{id}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_labels(path, labels, scores=True, digits=4)
    draw_curves(metrics).save(folder / "curves.png")


def draw_curves(metrics: dict) -> Image.Image:
    """Precision over recall of the KITTI metrics: a row per class, a panel per metric, a line per difficulty.

    Drawn over the 41 recall positions that AP averages, so the area under a line is its AP. Returns an RGB image.
    """
    classes, faint, dark = metrics["settings"]["classes"], (228, 228, 228), (90, 90, 90)
    canvas = Image.new("RGB", (PANEL_STEP[0] * len(PANELS), PANEL_STEP[1] * len(classes)), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for (row, name), (column, metric) in itertools.product(enumerate(classes), enumerate(PANELS)):
        title, threshold = PANELS[metric]  # and the place of its overlap
        left, top = 52 + column * PANEL_STEP[0], 48 + row * PANEL_STEP[1]
        right, bottom = left + PANEL[0], top + PANEL[1]
        overlap = metrics["settings"]["min_overlap"][name][threshold]
        write(draw, (left, top - 28), f"{name} {title} over recall, overlap > {overlap:g}", 11, dark, "ls")
        for tick in (0, 0.25, 0.5, 0.75, 1):
            x, y = left + tick * PANEL[0], bottom - tick * PANEL[1]
            draw.line([(x, top), (x, bottom)], fill=faint)
            draw.line([(left, y), (right, y)], fill=faint)
            write(draw, (x, bottom + 4), f"{tick:g}", 11, dark, "ma")
            write(draw, (left - 5, y), f"{tick:g}", 11, dark, "rm")
        for number, (difficulty, colour) in enumerate(LEVELS.items()):
            values = metrics["curves"][name][metric][difficulty]["precision"]
            values = np.pad(values, (0, 41 - len(values)))
            points = np.stack([left + np.arange(41) / 40 * PANEL[0], bottom - values * PANEL[1]], 1)
            draw.line(points.ravel().tolist(), fill=colour, width=2)
            average = metrics[name][metric][difficulty]["AP_R40"]
            text = f"{difficulty} AP {'-' if average is None else f'{average:.1f}'}"
            write(draw, (left + number * PANEL[0] / 2.8, top - 14), text, 11, colour, "lm")
    return canvas


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser("metrics.kitti", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help shows all)\n")
    add = parser.add_argument
    add("labels", metavar="LABELS", help="folder of KITTI label files, one per frame")
    add("results", metavar="RESULTS", help="folder of KITTI result files (16 fields a line)")
    add("--split", metavar="FILE", help="frame ids to evaluate, one a line; default: every label file")
    add("--classes", nargs="+", default=CLASSES, help=f"class names of the files; default: {' '.join(CLASSES)}")
    add("--metric", choices=("R40", "R11"), default="R40", help="recall positions of the table")
    add("--overlap", choices=tuple(MIN_OVERLAP), default="strict", help="overlap thresholds")
    add("--repeat", type=int, default=1, metavar="N", help="count frames N times, if objects are few")
    add("--errors", action="store_true", help="also print depth, heading and size errors by distance")
    add("--json", metavar="OUT", help="write every number here")
    add("--curves", metavar="OUT.png", help="draw the precision-recall curves here")
    add("--report", metavar="OUT.html", help="write a page to look at frames by what is wrong in them here")
    add("--images", metavar="DIR", help="their images, beside which calib/ lies, for --report; default: no pictures")
    add("--report-frames", type=int, metavar="N", help="show so many frames in it; default: 150")
    options = parser.parse_args(arguments)
    for name in ("repeat", "report_frames"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
    if options.report is None and (options.images or options.report_frames):
        parser.error("--images and --report-frames are for --report OUT.html, which is not there")
    return options


def evaluate_files(options: argparse.Namespace) -> None:
    """Print the table, and what is missing or extra; write what was asked for. Raises UserError."""
    check_writable(options.json, options.curves, options.report)
    truth, results, missing, extra, rows = read_folder(options.labels, options.results, options.split)
    names = {*CLASSES}.union(*(labels.name for labels in (*truth.values(), *results.values())))
    if unknown := [name for name in options.classes if name.lower() not in {*map(str.lower, names)}]:
        raise UserError(f"--classes names {unknown[0]!r}, which no file does; there are {', '.join(sorted(names))}")
    metrics = compute_metrics(truth, results, options.classes, options.overlap, options.repeat)
    metrics["files"] = {"missing_results": len(missing), "extra_results": len(extra)}
    print(table(metrics, options.metric, options.errors))
    if missing:
        count = f"{len(missing)} of {len(truth)} frames"
        print(f"{count} have no result file and count as empty, the first is {missing[0]}.txt")
    if extra:
        print(f"{len(extra)} result files belong to no evaluated frame and are left out, the first is {extra[0]}.txt")
    for sentence in [*odd.describe_labels(rows), *describe_files(truth, results, options.classes)]:
        print(sentence)
    if options.json:
        Path(options.json).write_text(json.dumps(metrics, indent=1))
    if options.curves:
        draw_curves(metrics).save(options.curves, "PNG")
    if options.report:
        report, pictures = importlib.import_module("tools.report"), (options.images, options.report_frames)
        report.write_kitti_files(options.report, truth, results, metrics, *pictures)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr for what the user got wrong, or a full disk."""
    options = parse_arguments(arguments)
    try:
        evaluate_files(options)
    except (UserError, OSError) as error:
        print(f"metrics.kitti: {sentence_of(error)}", file=sys.stderr)
        return 2
    return 0
