"""nuScenes' detection metrics: mAP, five errors of true positives, NDS; equal to nuscenes-devkit 1.2.0, without it.

Of TruckScenes' tables they are equal to truckscenes-devkit 1.2.0.

    python -m metrics.nuscenes ROOT RESULTS.json --split NAME [--version NAME] [--dialect NAME] [--json OUT]
                               [--report FILE.html [--report-frames N]]

ROOT holds the tables where the dialect looks for them, nuScenes' in v1.0-*; boxes are compared in the global frame.
Settings are those of detection_cvpr_2019.

Caesar et al., nuScenes, CVPR 2020, section 3.1. Details that change numbers are marked where they are decided: of equal
scores the later box in the file comes first; of equal distances the first annotation in the table; a class without
ground truth counts as AP 0, errors 1.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from formats.nuscenes import Truth, find_dialect, read_truth
from formats.tables import Boxes, refuse_parted
from metrics.nuscenes_files import MOST_BOXES, merge_cameras, parse_results, read_results, write_results
from scene.frames import Labels, UserError, check_writable, sentence_of

DISTANCES = (0.5, 1.0, 2.0, 4.0)  # m, between centres seen from above: a match is nearer
ERROR_DISTANCE = 2.0  # m, of the matches whose errors count
ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
IN_RACKS = ("motorcycle", "bicycle")  # left out where they stand in a bicycle rack
LOW_SHARE = 0.05  # of boxes near any object, below which their frame is in doubt
DETECTIONS_AT_ONCE = 100_000  # whose distances stand in memory together
RECALL = np.linspace(0, 1, 101)  # not arange(101) / 100: some differ in the last bit, and with them what is reached
FIRST = 11  # index of the lowest recall that counts, above 0.1
LOWEST_PRECISION = 0.1
AP_WEIGHT = 5  # of mAP in NDS, beside the five errors
SETTINGS = {  # as metrics_summary.json holds them, after the ranges of classes
    "dist_fcn": "center_distance", "dist_ths": list(DISTANCES), "dist_th_tp": ERROR_DISTANCE, "min_recall": 0.1,
    "min_precision": LOWEST_PRECISION, "max_boxes_per_sample": MOST_BOXES, "mean_ap_weight": AP_WEIGHT,
}  # fmt: skip


def evaluate(dataset, predictions: dict[str, Labels], config, folder=None, overlap="") -> dict:
    """The metrics of predictions (id -> Labels in the camera's frame) for a `Detection3D` of nuScenes' frames.

    NDS and mAP first, then what metrics_summary.json holds; None where undefined. The cameras of a sample are merged;
    ground truth comes from the tables, what no camera sees included, and only samples of the data set count. With a
    folder, the predictions are written to its results_nusc.json in the official format.
    """
    if overlap:
        raise UserError(f"overlap is {overlap!r}, which means nothing to nuScenes' metrics")
    truth = _truth_of(dataset, config)
    merged = merge_cameras(dataset.frames, predictions, truth.dialect)
    truth = truth.of(merged.keys())
    if folder is not None:
        write_results(folder / "results_nusc.json", merged)
    return name_metrics(nuscenes_metrics(truth, parse_results(merged, truth.tokens, truth.dialect)))


def _truth_of(dataset, config):
    """The `Truth` of the one source of a data set."""
    [source] = dataset.sources
    root = Path(source.root or config.data.root)
    if source.kind != "nuscenes":  # the built-in world: it has been rendered into a folder below that
        root = Path(str(dataset.frames[0].image)).parents[2]  # samples/CAM_FRONT/...
    return _read_once(root, source.split, source.version, source.dialect)


@functools.lru_cache(maxsize=1)  # the tables of nuScenes take a minute to read: not at each evaluation
def _read_once(root, splits, version, dialect):
    return read_truth(root, splits, version, find_dialect(dialect))


def blank(dataset, config) -> dict:
    """The metrics of a data set without objects and detections: every name that there will be.

    Raises UserError for what nuScenes' metrics would ignore, or count wrongly, and for tables that lack something.
    """
    sources = dataset.sources
    if len(sources) > 1 or (sources[0].kind == "synthetic" and len(sources[0].split) > 1):
        raise UserError("data.val lists several nuScenes sources or worlds, expected one: it is evaluated as a whole")
    dialect = find_dialect(sources[0].dialect)
    if unknown := [name for name in dataset.classes if name not in dialect.ranges]:
        known = ", ".join(dialect.ranges)
        raise UserError(f"model.classes names {unknown[0]!r}, and the metrics of data.val know only {known}")
    refuse_parted(sources[0], config.data, dataset.frames)
    if config.data.overlap or config.train.eval_repeat > 1:
        raise UserError("data.overlap and train.eval_repeat belong to KITTI's metrics, and data.val is nuScenes'")
    if os.environ.get("RANK", "0") == "0":  # the main process alone, which evaluates: the tables fill gigabytes
        _truth_of(dataset, config)  # what is missing is told before training
    boxes, poses = parse_results({}, []), np.zeros((0, 4, 4))
    nothing = Truth([], boxes, poses, poses, np.zeros((0, 4, 3)), np.zeros(0, int), dialect)
    return name_metrics(nuscenes_metrics(nothing, boxes))


def name_metrics(metrics: dict) -> dict:
    """The dict of `nuscenes_metrics` with its means under the names that people know, and None in place of NaN."""
    errors = zip(("mATE", "mASE", "mAOE", "mAVE", "mAAE"), metrics["tp_errors"].values(), strict=True)
    return _without_nan({"NDS": metrics["nd_score"], "mAP": metrics["mean_ap"], **dict(errors), **metrics})


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if value != value else value


def nuscenes_metrics(truth: Truth, results: Boxes) -> dict:
    """Every number of the official metrics_summary.json, under its keys.

    truth and results as formats.nuscenes reads them; results in the order of their file. Returns label_aps (class ->
    "0.5", "1.0", "2.0", "4.0" -> AP), mean_dist_aps (class -> AP), mean_ap, label_tp_errors (class -> trans_err m,
    scale_err 1 - IoU, orient_err radians, vel_err m/s, attr_err 1 - accuracy; NaN where undefined), tp_errors and
    tp_scores (error -> mean, 1 - mean), nd_score, and the settings as cfg. Raises UserError for scores below 0 where
    recall stays below 1, which the official evaluator refuses too.
    """
    detected, annotated = counted_rows(results, truth), counted_rows(truth.boxes, truth)
    dialect, aps, errors = truth.dialect, {}, {}
    for name in dialect.ranges:
        own, real = detected[results.name[detected] == name], annotated[truth.boxes.name[annotated] == name]
        own = own[np.argsort(results.score[own], kind="stable")[::-1]]  # of equal scores the later one comes first
        matches = match_class(truth, results, own, real)
        curves = {distance: _curves(results.score[own], match, len(real), name) for distance, match in matches.items()}
        aps[name] = {str(distance): _average(precision) for distance, (precision, _) in curves.items()}
        match, (_, confidence) = matches[ERROR_DISTANCE], curves[ERROR_DISTANCE]
        rows = own[match >= 0]
        period = np.pi if name in dialect.half_turns else 2 * np.pi
        parts = _errors(truth.boxes[match[match >= 0]], results[rows], period)
        errors[name] = {error: _mean_error(parts[error], results.score[rows], confidence) for error in ERRORS}
        errors[name] |= dict.fromkeys(dialect.undefined.get(name, ()), np.nan)
    return _summary(aps, errors) | {"cfg": {"class_range": dict(dialect.ranges), **SETTINGS}}


def _summary(aps, errors):
    """The official dict of a class -> distance -> AP and a class -> error -> mean."""
    mean_aps = {name: float(np.mean(list(of_class.values()))) for name, of_class in aps.items()}
    mean_ap = float(np.mean(list(mean_aps.values())))
    tp_errors = {error: float(np.nanmean([of_class[error] for of_class in errors.values()])) for error in ERRORS}
    tp_scores = {error: max(0.0, 1.0 - mean) for error, mean in tp_errors.items()}
    return {
        "label_aps": aps,
        "mean_dist_aps": mean_aps,
        "mean_ap": mean_ap,
        "label_tp_errors": errors,
        "tp_errors": tp_errors,
        "tp_scores": tp_scores,
        "nd_score": float(AP_WEIGHT * mean_ap + np.sum(list(tp_scores.values()))) / (AP_WEIGHT + len(tp_scores)),
    }


def counted_rows(boxes, truth):
    """Rows of the boxes that count: in their class's range, not without points, not in a rack of their sample."""
    offset = boxes.center[:, :2] - truth.vehicle[boxes.listed, :2, 3]
    reach = np.array([truth.dialect.ranges[name] for name in boxes.name], float)
    counted = (np.sqrt((offset**2).sum(1)) < reach) & (boxes.points != 0)
    parkable = counted & np.isin(boxes.name.astype(str), IN_RACKS) & np.isin(boxes.listed, truth.rack_sample)
    for row in np.flatnonzero(parkable):
        racks = truth.racks[truth.rack_sample == boxes.listed[row]]
        counted[row] = not any(_inside(boxes.center[row], rack) for rack in racks)
    return np.flatnonzero(counted)


def _inside(point, rack):
    """Whether a point (3,) is in a rack (4, 3): a corner and the ends of its three edges; on a face counts."""
    offset = (point - rack[0]).reshape(3, 1)  # products of the devkit's shapes: one bit decides on a face
    along = [(edge @ offset, edge @ edge) for edge in rack[1:] - rack[0]]
    return all(0 <= part <= whole for part, whole in along)


def _norm(vectors):
    """Lengths (n,) of vectors (n, 2), by the product of numpy's norm of a single one: last bits decide at borders."""
    return np.sqrt((vectors[:, None, :] @ vectors[:, :, None])[:, 0, 0])


def match_class(truth, results, own, real):
    """Distance -> the row of truth.boxes, or -1, that each detection in `own` takes: its nearest that is free.

    own, by falling score, and real: rows of one class. Raises UserError for a matched box without volume.
    """
    rank, row, distance = near_pairs(truth, results, own, real)
    flat = (results.size[own] <= 0).any(1)
    matches = {}
    for limit in DISTANCES:
        match, taken = np.full(len(own), -1), set()
        near = distance < limit
        for i, j in zip(rank[near].tolist(), row[near].tolist(), strict=True):
            if match[i] < 0 and j not in taken:
                match[i] = j
                taken.add(j)
        for i in np.flatnonzero(flat & (match >= 0)):
            place = f"sample {truth.tokens[results.listed[own[i]]]}, a {results.name[own[i]]}"
            raise UserError(f"{place}: its l, h, w are {results.size[own[i]].tolist()} m, expected all > 0")
        matches[limit] = match
    return matches


def near_pairs(truth, results, own, real):
    """Every pair of one sample that is near enough for any match: rank in `own`, row of truth.boxes, distance.

    By rank, then distance, then row: of equally near objects the first in the table is taken.
    """
    sample = truth.boxes.sample[real]  # rising, as truth.boxes are ordered by it
    first, last = (np.searchsorted(sample, results.sample[own], side) for side in ("left", "right"))
    parts = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for start in range(0, len(own), DETECTIONS_AT_ONCE):
        count = (last - first)[start : start + DETECTIONS_AT_ONCE]
        rank = np.repeat(np.arange(start, start + len(count)), count)
        row = real[np.arange(len(rank)) - np.repeat(np.cumsum(count) - count, count) + first[rank]]
        offset = results.center[own[rank], :2] - truth.boxes.center[row, :2]
        near = (np.abs(offset) <= DISTANCES[-1]).all(1)
        rank, row, distance = rank[near], row[near], _norm(offset[near])
        order = np.lexsort((row, distance, rank))
        parts.append((rank[order], row[order], distance[order]))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _curves(score, match, objects, name):
    """Precision (101,) and confidence (101,) at `RECALL`, of detections by falling score; 0 beyond what is reached."""
    if not objects or not (match >= 0).any():
        return np.zeros(len(RECALL)), np.zeros(len(RECALL))
    hits, misses = np.cumsum(match >= 0).astype(float), np.cumsum(match < 0).astype(float)
    recall = hits / objects
    precision = np.interp(RECALL, recall, hits / (misses + hits), right=0)
    confidence = np.interp(RECALL, recall, score, right=0)
    if not (confidence[1:] <= confidence[:-1]).all():
        reach = f"from {score.min():g} to {score.max():g}"
        raise UserError(f"the scores of {name} reach {reach}, expected finite ones not below 0")
    return precision, confidence


def _average(precision):
    """AP: mean precision above the lowest one that counts, over the recalls that count, scaled to 1."""
    return float(np.mean(np.maximum(precision[FIRST:] - LOWEST_PRECISION, 0))) / (1.0 - LOWEST_PRECISION)


def _errors(real, detected, period):
    """Error -> (n,) of n matches, by falling score; NaN where it is unknown."""
    l, h, w = (np.minimum(real.size[:, axis], detected.size[:, axis]) for axis in range(3))
    both = l * h * w
    true_yaw, yaw = (np.arctan2(boxes.rotation[:, 1, 0], boxes.rotation[:, 0, 0]) for boxes in (real, detected))
    turn = (true_yaw - yaw + period / 2) % period - period / 2
    return {
        "trans_err": _norm(detected.center[:, :2] - real.center[:, :2]),
        "scale_err": 1 - both / (real.size.prod(1) + detected.size.prod(1) - both),
        "orient_err": np.abs(turn),
        "vel_err": _norm(detected.velocity[:, :2] - real.velocity[:, :2]),
        "attr_err": np.where(real.attribute == "", np.nan, real.attribute != detected.attribute),
    }


def _mean_error(error, score, confidence):
    """Mean of an error's running mean, read off at the confidences of the recalls that count; 1 if none is reached.

    The running mean leaves NaN out and is 0 until the first number; where all are NaN, the error is 1.
    """
    reached = np.flatnonzero(confidence)
    if not len(reached) or reached[-1] < FIRST:
        return 1.0
    known = ~np.isnan(error)
    count = np.cumsum(known)
    running = np.nancumsum(error) / np.maximum(count, 1) if known.any() else np.ones(len(error))
    at_recall = np.interp(confidence[::-1], score[::-1], running[::-1])[::-1]
    return float(np.mean(at_recall[FIRST : reached[-1] + 1]))


def doubt(truth: Truth, results: Boxes) -> str:
    """What is likely wrong with results that meet nothing, in one sentence; "" where enough of them lie near objects.

    Boxes in the frame of the vehicle or of the lidar, as detectors give them, would count as mAP 0 without a word.
    """

    def share(poses):
        center = (poses[results.listed] @ np.pad(results.center, ((0, 0), (0, 1)), constant_values=1)[..., None])[
            ..., 0
        ]
        moved = dataclasses.replace(results, center=center[:, :3])
        return len(np.unique(near_pairs(truth, moved, *rows)[0])) / len(results)

    rows = np.arange(len(results)), np.arange(len(truth.boxes))
    near = share(np.broadcast_to(np.eye(4), truth.vehicle.shape)) if len(results) and len(truth.boxes) else 1.0
    if near >= LOW_SHARE:
        return ""
    sensor = " or ".join(truth.dialect.reference)
    shares = {"the vehicle's": share(truth.vehicle), f"{sensor}'s": share(truth.sensor)}
    frame, most = max(shares.items(), key=lambda pair: pair[1])
    reach = f"{near:.0%} of the boxes lie within {DISTANCES[-1]:g} m of an object"
    if most > 4 * LOW_SHARE:
        return f"{reach}, {most:.0%} would in {frame} frame: results must be in the global frame"
    places = (boxes.center[:, :2].mean(0).round().tolist() for boxes in (results, truth.boxes))
    return "{}: they lie about {}, objects about {} in the global frame, in m".format(reach, *places)


def table(metrics: Mapping) -> str:
    """The metrics as text: a row per class with AP, AP by distance and errors, which may be None; their means; NDS."""
    titles = ("AP", *(f"@{distance:g} m" for distance in DISTANCES), "ATE m", "ASE", "AOE rad", "AVE m/s", "AAE")
    aps, errors = metrics["label_aps"], metrics["label_tp_errors"]
    rows = {name: [metrics["mean_dist_aps"][name], *aps[name].values(), *errors[name].values()] for name in aps}
    means = [np.mean([aps[name][str(distance)] for name in aps]) for distance in DISTANCES]
    rows["mean"] = [metrics["mean_ap"], *means, *metrics["tp_errors"].values()]
    lines = ["".join([f"{'class':20}", *(f"{title:>9}" for title in titles)])]
    for title, numbers in rows.items():
        texts = ["-" if number is None or np.isnan(number) else f"{number:.4f}" for number in numbers]
        lines.append("".join([f"{title:20}", *(f"{text:>9}" for text in texts)]))
    return "\n".join([*lines, f"mAP {metrics['mean_ap']:.4f}   NDS {metrics['nd_score']:.4f}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a result file. Returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser("metrics.nuscenes", description="nuScenes' detection score of a result file.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help shows all)\n")
    parser.add_argument("root", metavar="ROOT", help="nuScenes folder, whose tables are in ROOT/v1.0-*")
    parser.add_argument("results", metavar="RESULTS.json", help="detections in the official format")
    parser.add_argument("--split", required=True, help="such as val or mini_val")
    parser.add_argument("--version", default="", help="of the tables, such as v1.0-mini; default: the only one")
    parser.add_argument("--dialect", default="", help="of the tables, such as truckscenes or t4, or its JSON file")
    parser.add_argument("--json", metavar="OUT", help="write what the official metrics_summary.json holds here")
    parser.add_argument(
        "--report", metavar="OUT.html", help="write a page that shows what is wrong in which frames here"
    )
    parser.add_argument("--report-frames", type=int, metavar="N", help="show so many frames in it; default: 150")
    options = parser.parse_args(arguments)
    if options.report_frames is not None and (options.report is None or options.report_frames < 1):
        parser.error("--report-frames takes 1 or more, and --report OUT.html beside it")
    try:
        check_writable(options.json, options.report)
        dialect = find_dialect(options.dialect)
        truth = read_truth(options.root, (options.split,), options.version, dialect)
        if not len(truth.boxes):
            raise UserError(f"{options.root}: split {options.split} holds no annotation to evaluate against")
        results, meta = read_results(options.results, truth.tokens, dialect)
        start = time.perf_counter()
        metrics = nuscenes_metrics(truth, results)
        print(table(metrics))
        mixed = np.flatnonzero(results.sample != results.listed)
        if len(mixed):
            count = f"{len(mixed)} boxes name another sample than the one they are listed under"
            print(f"{count}, and count there; the first is under {truth.tokens[results.listed[mixed[0]]]}")
        if sentence := doubt(truth, results):
            print(sentence)
        if options.json:
            metrics |= {"meta": meta, "eval_time": time.perf_counter() - start}
            Path(options.json).write_text(json.dumps(metrics, indent=1))
        if options.report:
            write = importlib.import_module("tools.report").write_nuscenes_files
            place, shown = (options.root, (options.split,), options.version), (table(metrics), options.report_frames)
            write(options.report, place, truth, results, *shown)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {sentence_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
