"""Argoverse 2's detection metrics: AP, three errors of true positives, CDS; equal to those of av2 0.3.6, without it.

    python -m metrics.argoverse ROOT RESULTS.feather [--split val] [--sweeps FILE.json] [--no-region] [--json OUT]

Wilson et al., Argoverse 2, NeurIPS Datasets 2021. A detection takes its nearest annotation; of those that take the same
one the best scored is true where it is near enough, the others are false, with no second choice. A class without ground
truth counts as AP 0, ATE 2, ASE 1, AOE pi. Where av2 is wrong by accident we are not: docs/formats.md lists it.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw

from formats.argoverse import (
    CITY,
    CLASSES,
    TIME,
    Boxes,
    find_logs,
    join_boxes,
    merge_cameras,
    read_boxes,
    read_poses,
    read_truth,
    write_results,
)
from formats.tables import refuse_parted, rotations
from scene.frames import Labels, UserError, check_writable, sentence_of
from scene.geometry import CORNER_SIGNS

RANGE = 150.0  # m in space from the vehicle: nearer boxes count
DISTANCES = (0.5, 1.0, 2.0, 4.0)  # m in space between centres: a match is nearer
ERROR_DISTANCE = 2.0  # m, of the matches whose errors count
MOST_BOXES = 100  # of a class and sweep, within the range
WORST = {"ATE": 2.0, "ASE": 1.0, "AOE": np.pi}  # errors of a class without a match; m, 1 - IoU, radians
RECALL = np.linspace(0, 1, 101)
MAP = "map/log_map_archive_*.json"  # of a log
CELLS, GROWTH = 10, 50  # cells a metre of the map of drivable areas, and how many it grows by, 5 m
DETECTIONS_AT_ONCE = 20_000  # whose distances stand in memory together


def evaluate(dataset, predictions: dict[str, Labels], config, folder=None, overlap="") -> dict:
    """The metrics of predictions (id -> Labels in the camera's frame) for a `Detection3D` of Argoverse 2's frames.

    The cameras of a sweep are merged; ground truth is every annotation of the source's logs, or with a limit those of
    the sweeps that it shows. With a folder, detections are written to its results_argoverse.feather.
    """
    if overlap:
        raise UserError(f"overlap is {overlap!r}, which means nothing to Argoverse's metrics")
    [source] = dataset.sources
    sweeps = {}
    for frame in dataset.frames if source.limit else ():
        log, time = frame.group.split("/")
        sweeps.setdefault(log, []).append(int(time))
    truth, _ = read_truth(source.root or config.data.root, source.split, sweeps or None)
    results = merge_cameras(dataset.frames, predictions)
    if folder is not None:
        write_results(folder / "results_argoverse.feather", results)
    return argoverse_metrics(truth, results, find_maps(source, config))


def find_maps(source, config) -> dict[str, Path] | None:
    """{log: its folder} of a source's logs, None where they have no maps. Raises UserError where only some have one."""
    logs = {log.name: log for log in find_logs(source.root or config.data.root, source.split)}
    without = [log for log in logs.values() if not any(log.glob(MAP))]
    if without and len(without) < len(logs):
        raise UserError(f"{without[0]}: expected {MAP}, as other logs have one, for the region in which boxes count")
    return None if without else logs


def blank(dataset, config) -> dict:
    """The metrics of a data set without objects and detections: every name that there will be.

    Raises UserError for what these metrics would ignore, or count wrongly.
    """
    if len(dataset.sources) > 1:
        raise UserError("data.val lists several Argoverse sources, expected one with several splits")
    if unknown := [name for name in dataset.classes if name not in CLASSES]:
        raise UserError(f"model.classes names {unknown[0]!r}, and Argoverse's metrics know only {', '.join(CLASSES)}")
    if config.data.overlap or config.train.eval_repeat > 1:
        raise UserError("data.overlap and train.eval_repeat belong to KITTI's metrics, and data.val is Argoverse's")
    refuse_parted(dataset.sources[0], config.data, dataset.frames)
    find_maps(dataset.sources[0], config)
    return argoverse_metrics(join_boxes([]), join_boxes([]))


def argoverse_metrics(truth: Boxes, results: Boxes, folders: Mapping[str, Path] | None = None) -> dict:
    """CDS, AP, ATE, ASE, AOE: means over all 26 classes; classes: class -> the same, and AP by distance, AP_0.5 ...

    folders: {log: its folder} for the region filter; without them boxes count wherever they are.
    """
    key, real_key = _keys(results, truth)
    results, key = _counted(results, key, MOST_BOXES)
    truth, real_key = _counted(truth, real_key, np.inf)
    if folders is not None:
        inside, real_inside = np.split(_in_region(join_boxes([results, truth]), folders), [len(results)])
        results, key, truth, real_key = results[inside], key[inside], truth[real_inside], real_key[real_inside]
    row, distance = _nearest(results, key, truth, real_key)
    best = np.zeros(len(results), bool)  # of those that take one annotation; of each class and sweep by falling score
    taken = np.flatnonzero(row >= 0)
    best[taken[np.unique(row[taken], return_index=True)[1]]] = True
    classes = {}
    for number, name in enumerate(CLASSES):
        own = np.flatnonzero(key % len(CLASSES) == number)
        own = own[np.argsort(-results.score[own], kind="stable")]  # of equal scores by log, time and place in the file
        count = (real_key % len(CLASSES) == number).sum()
        hits = {limit: best[own] & (distance[own] < limit) for limit in DISTANCES}
        aps = {f"AP_{limit:g}": _average(hit, count) for limit, hit in hits.items()}
        matched = own[hits[ERROR_DISTANCE]]
        errors = _errors(truth[row[matched]], results[matched], distance[matched]) if len(matched) else WORST
        ap = float(np.mean(list(aps.values())))
        goodness = float(np.mean([1 - errors[error] / worst for error, worst in WORST.items()]))
        classes[name] = {"AP": ap, **errors, "CDS": ap * goodness, **aps}
    means = {name: float(np.mean([one[name] for one in classes.values()])) for name in ("CDS", "AP", *WORST)}
    return {**means, "mean": means, "classes": classes, "cfg": {"region": folders is not None}}


def _keys(results, truth):
    """For each box of both a number that grows with log, time and class; negative for a class that does not count."""
    logs = {log: i for i, log in enumerate(sorted({*results.log, *truth.log}))}
    numbers, times = {name: i for i, name in enumerate(CLASSES)}, np.union1d(results.time, truth.time)
    keys = []
    for boxes in (results, truth):
        log = np.array([logs[one] for one in boxes.log], int)
        number = np.array([numbers.get(one, -1) for one in boxes.name], int)
        sweep = log * len(times) + np.searchsorted(times, boxes.time)
        keys.append(np.where(number < 0, -1, sweep * len(CLASSES) + number))
    return keys


def _counted(boxes, key, most):
    """The boxes that are near and not without points, at most so many of a class and sweep, and their keys.

    By key and falling score, of equal ones by place in the file. Those outside the region take places, too.
    """
    near = (np.linalg.norm(boxes.center, axis=1) < RANGE) & (boxes.points > 0) & (key >= 0)
    order = np.lexsort((-boxes.score, key))  # stable, as av2's is not
    order = order[near[order]]
    place = np.arange(len(order)) - np.searchsorted(key[order], key[order])
    order = order[place < most]
    return boxes[order], key[order]


def _in_region(boxes, folders):
    """(n,) bool: whether a corner of each box lies where one drives, or at most 5 m beside it."""
    inside, runs = np.zeros(len(boxes), bool), {}
    for rows in np.split(np.arange(len(boxes)), np.flatnonzero(boxes.log[1:] != boxes.log[:-1]) + 1):
        for log in boxes.log[rows[:1]]:  # none of no boxes
            runs.setdefault(log, []).append(rows)
    for log, parts in runs.items():
        rows = np.concatenate(parts)
        own = boxes[rows]
        if log not in folders:
            sentence = "it has detections and no annotation; --no-region counts them as false"
            raise UserError(f"log {log}, sweep {own.time[0]}: {sentence}")
        poses = read_poses(folders[log] / CITY, TIME)
        if lost := {*own.time.tolist()} - poses.keys():
            raise UserError(f"{folders[log] / CITY}: there is no pose at {min(lost)}, and boxes of that sweep")
        shape = np.tile(np.eye(4), (len(own), 1, 1))  # box -> vehicle -> city
        shape[:, :3, :3], shape[:, :3, 3] = rotations(own.rotation), own.center
        shape = np.array([poses[time] for time in own.time.tolist()]) @ shape
        corners = CORNER_SIGNS * own.size[:, None, [0, 2, 1]] @ shape[:, :3, :3].transpose(0, 2, 1)
        points = (corners + shape[:, None, :3, 3])[..., :2].reshape(-1, 2)
        inside[rows] = _drivable(points, *read_region(folders[log])).reshape(-1, 8).any(1)
    return inside


def _drivable(points, reach, low):
    """(n,) bool: whether a cell that is drivable lies within 5 m of the cells of points (n, 2) m; map as `read_region`.

    Cells are cut towards zero, as av2 does it, so those at the left and the upper edge are two wide.
    """
    x, y = ((points - low) * CELLS).astype(int).T
    aside = np.arange(-GROWTH, GROWTH + 1)
    known = np.flatnonzero((x >= 0) & (y >= 0) & (x <= reach.shape[1] - len(aside)) & (y < len(reach)))
    rows = sliding_window_view(reach, len(aside), axis=1)[y[known], x[known]]  # (m, 101)
    drivable = np.zeros(len(x), bool)
    drivable[known] = (rows <= np.sqrt(GROWTH**2 - aside**2)).any(1)
    return drivable


def read_region(log: Path) -> tuple[np.ndarray, np.ndarray]:
    """The map of a log in cells (h, GROWTH + w + GROWTH) uint8, and the corner (x, y) m of it without the margins.

    A cell holds the rows to the nearest drivable one of its column, GROWTH + 1 where they are more. Raises UserError.
    """
    files = sorted(log.glob(MAP))
    if len(files) != 1:
        raise UserError(f"{log}: expected one {MAP}, found {len(files)}; --no-region needs none")
    try:
        areas = json.loads(files[0].read_bytes())["drivable_areas"].values()
        polygons = {area["id"]: [(point["x"], point["y"]) for point in area["area_boundary"]] for area in areas}
        points = np.concatenate([*polygons.values()])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{files[0]}: expected a map with drivable_areas: {error}") from None
    low, high = np.floor(points.min(0)), np.ceil(points.max(0))
    picture = Image.new("L", tuple(((high - low + 1) * CELLS).astype(int).tolist()), GROWTH + 1)
    for polygon in polygons.values():
        corners = np.round((np.array([*polygon, polygon[0]]) - low) * CELLS).astype(int)
        ImageDraw.Draw(picture).polygon(corners.ravel().tolist(), outline=0, fill=0)
    reach = np.pad(np.asarray(picture), ((0, 0), (GROWTH, GROWTH)), constant_values=GROWTH + 1)
    for lines in (reach, reach[::-1]):
        for before, line in itertools.pairwise(lines):
            np.minimum(line, before + 1, out=line)
    return reach, low


def _nearest(results, key, truth, real_key):
    """Of each detection the row of the annotation of its class and sweep that it takes, or -1, and how far it is, m."""
    first, last = (np.searchsorted(real_key, key, side) for side in ("left", "right"))
    row, distance = np.full(len(key), -1), np.full(len(key), np.inf)
    for start in range(0, len(key), DETECTIONS_AT_ONCE):
        some = np.flatnonzero((last > first)[start : start + DETECTIONS_AT_ONCE]) + start
        count = last[some] - first[some]
        begin = np.cumsum(count) - count
        pair = np.arange(count.sum()) - np.repeat(begin - first[some], count)
        x, y, z = (results.center[np.repeat(some, count)] - truth.center[pair]).T
        apart = np.sqrt(x * x + y * y + z * z)
        if len(some):
            distance[some] = np.minimum.reduceat(apart, begin)
            equal = apart == np.repeat(distance[some], count)
            row[some] = np.minimum.reduceat(np.where(equal, pair, len(truth)), begin)  # the first in the table
    return row, distance


def _average(hit, count):
    """AP of detections by falling score, (n,) bool: mean of 101 interpolated precisions, none too low to count."""
    if not len(hit) or not count:
        return 0.0
    hits = np.cumsum(hit)
    precision = hits / (hits + np.cumsum(~hit) + np.finfo(float).eps)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.interp(RECALL, hits / count, envelope, right=0).mean())


def _errors(real, detected, distance):
    """Mean errors of n > 0 matches, as `WORST` names them."""
    overlap = np.minimum(real.size, detected.size).prod(1) / np.maximum(real.size, detected.size).prod(1)
    turn = np.abs(_yaw(real) - _yaw(detected))
    turn = np.minimum(turn, 2 * np.pi - turn)
    return {"ATE": float(distance.mean()), "ASE": float((1 - overlap).mean()), "AOE": float(turn.mean())}


def _yaw(boxes):
    """Headings (n,) in the vehicle's frame; 0 of a box that stands on end, as scipy says."""
    ahead = rotations(boxes.rotation)[:, :2, 0]
    return np.where(np.hypot(*ahead.T) <= 1e-7, 0.0, np.arctan2(ahead[:, 1], ahead[:, 0]))


def table(metrics: Mapping) -> str:
    """The metrics as text: a row per class with AP, AP by distance and errors; their means."""
    titles = {"AP": "AP", **{f"AP_{limit:g}": f"@{limit:g} m" for limit in DISTANCES}}
    titles |= {"ATE": "ATE m", "ASE": "ASE", "AOE": "AOE rad", "CDS": "CDS"}
    lines = ["".join([f"{'class':32}", *(f"{title:>9}" for title in titles.values())])]
    for name, numbers in {**metrics["classes"], "mean": metrics["mean"]}.items():
        texts = (f"{numbers[key]:.4f}" if key in numbers else "-" for key in titles)
        lines.append("".join([f"{name:32}", *(f"{text:>9}" for text in texts)]))
    place = "at most 5 m beside drivable areas" if metrics["cfg"]["region"] else "wherever they are"
    return "\n".join([*lines, f"CDS {metrics['CDS']:.4f}   AP {metrics['AP']:.4f}   boxes count {place}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a result file. Returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser("metrics.argoverse", description="Argoverse 2's detection score of a result file.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help shows all)\n")
    add = parser.add_argument
    add("root", metavar="ROOT", help="Argoverse 2 folder, whose logs are in ROOT/sensor/<split>")
    add("results", metavar="RESULTS.feather", help="detections in the official format")
    add("--split", default="val", help="default: val")
    add("--sweeps", metavar="FILE.json", help="{log: [timestamp_ns, ...]}: only their annotations are ground truth")
    add("--no-region", action="store_true", help="boxes count wherever they are, not only beside drivable areas")
    add("--json", metavar="OUT", help="write every number here, not rounded")
    options = parser.parse_args(arguments)
    try:
        check_writable(options.json)
        sweeps = read_sweeps(options.sweeps) if options.sweeps else None
        truth, folders = read_truth(options.root, (options.split,), sweeps)
        if not len(truth):
            raise UserError(f"{options.root}: split {options.split} holds no annotation to evaluate against")
        folders = None if options.no_region else {log: folders[log] for log in {*truth.log}}
        metrics = argoverse_metrics(truth, read_boxes(Path(options.results)), folders)
        print(table(metrics))
        if options.json:
            Path(options.json).write_text(json.dumps(metrics, indent=1))
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {sentence_of(error)}", file=sys.stderr)
        return 2
    return 0


def read_sweeps(path: str) -> dict[str, list[int]]:
    """{log: times ns} of a JSON file. Raises UserError."""
    try:
        sweeps = json.loads(Path(path).read_bytes())
        good = all(isinstance(time, int) for times in sweeps.values() for time in times)
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise UserError(f"{path}: expected JSON, {{log: [timestamp_ns, ...]}} with whole numbers")
    return sweeps


if __name__ == "__main__":
    sys.exit(main())
