"""Compare runs on their held-out frames: AP at two overlaps, errors of depth, and AP if one thing were known.

python -m lab.yardstick RUN [RUN ...] [key=value ...] [--oracles] [--json OUT]

Runs whose configs differ only in the seed become one row, mean and spread (standard deviation over seeds). A difference
between rows is worth a word only beyond twice that spread. RESULTS.md is made of these tables.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

from config import to_dict
from data import build_dataset
from engine.guard import start_accelerator
from engine.weights import find_checkpoint, load_run, stay_at_home
from evaluate import predict_dataset
from metrics.kitti import MATCH_OVERLAP, compute_metrics, kitti_ap
from scene.frames import UserError, check_writable
from scene.geometry import box3d_iou, project, unproject, yaw_to_alpha

COLUMNS = (  # the last one: Spearman's rank correlation of score and 3D overlap of what meets an object
    *("2D", "AOS", "BEV loose", "3D loose", "BEV strict", "3D strict", "depth error m", "depth error %"),
    *("depth bias m", "turned %", "in 1 sigma %", "score rank"),
)
MEAN = "mean of classes"
KNOWN = ("nothing", "heading", "size", "projected centre", "depth", "location", "all", "score", "sigma is true")


def match(detections, truth):
    """For each detection the row of the truth of its class with the best 2D overlap, or -1 below `MATCH_OVERLAP`.

    Both `Labels` in the same pixels. Returns (n,) int.
    """
    if not len(detections) or not len(truth):
        return np.full(len(detections), -1)
    overlap = box_iou(torch.from_numpy(detections.box), torch.from_numpy(truth.box)).numpy()
    overlap[(detections.name[:, None] != truth.name[None]) | ~truth.is_3d[None]] = 0
    return np.where(overlap.max(1) >= MATCH_OVERLAP, overlap.argmax(1), -1)


def tell(detections, truth, K, known):
    """Detections with one thing replaced by the truth's, where `match` finds one: an oracle, as in MonoDLE's figure 1.

    Both Labels in the camera frame of K (3, 3); known: one of KNOWN. The depth moves along the detection's own ray, the
    projected centre moves at its own depth; the score becomes the 3D overlap that is there. Where "sigma is true", the
    depth's error is drawn anew from its Laplace distribution: how good a ranking by sigma can be at all. Returns Labels
    with alpha following.
    """
    if known == "score":
        return dataclasses.replace(detections, score=overlap_3d(detections, truth))
    rows = match(detections, truth)
    true = truth[np.maximum(rows, 0)] if len(truth) else detections
    center, size, yaw = detections.center.copy(), detections.size.copy(), detections.yaw.copy()
    told = (rows >= 0) & (center[:, 2] > 0.1) & (true.center[:, 2] > 0.1)
    if known in ("depth", "projected centre"):
        pixel, depth = (detections, true) if known == "depth" else (true, detections)
        center[told] = unproject(project(pixel.center[told], K), depth.center[told, 2], K)
    if known == "sigma is true":
        count = len(detections)
        error = np.random.default_rng(count).laplace(size=count) * detections.sigma / np.sqrt(2)
        center[told] = unproject(project(center[told], K), np.maximum(true.center[:, 2] + error, 1.0)[told], K)
    if known in ("location", "all"):
        center[told] = true.center[told]
    if known in ("size", "all"):
        size[told] = true.size[told]
    if known in ("heading", "all"):
        yaw[told] = true.yaw[told]
    return dataclasses.replace(detections, center=center, size=size, yaw=yaw, alpha=yaw_to_alpha(yaw, center))


def overlap_3d(detections, truth):
    """3D IoU (n,) of each detection with the truth that it matches, 0 where there is none."""
    a, b = (np.concatenate([labels.center, labels.size, labels.yaw[:, None]], 1) for labels in (detections, truth))
    rows = match(detections, truth)
    overlap = np.zeros(len(detections))
    overlap[rows >= 0] = box3d_iou(a[rows >= 0], b[rows[rows >= 0]])
    return overlap


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks of two columns (n,), ties in their order; None below three rows."""
    if len(a) < 3:
        return None
    return float(np.corrcoef(*(np.argsort(np.argsort(column, kind="stable")) for column in (a, b)))[0, 1])


def predict_run(run, overrides=()):
    """A run's `Config`, its `Detection3D` of held-out frames, and the detections of its best checkpoint there."""
    as_learned = "model.sigma_scale="  # its factors are fitted to these frames
    config, model = load_run(find_checkpoint(run), [as_learned, *overrides])
    config = stay_at_home(config, overrides)
    dataset = build_dataset(config, training=False)
    accelerator = start_accelerator(config.train)
    model = model.to(accelerator.device)
    return config, dataset, predict_dataset(model, dataset, accelerator, config.train.batch_size, config.data.workers)


def measure(dataset, predictions, repeat=1):
    """{class: {column: value}} of one run, moderate objects, each frame counted `repeat` times.

    Errors and ranks are over all detected objects.
    """
    truth, numbers = {frame.id: dataset.truth(index) for index, frame in enumerate(dataset.frames)}, {}
    overlap = {id: overlap_3d(labels, truth[id]) for id, labels in predictions.items()}
    met = {id: match(labels, truth[id]) >= 0 for id, labels in predictions.items()}
    strict = compute_metrics(truth, predictions, dataset.classes, "strict", repeat)
    loose = kitti_ap(truth, predictions, dataset.classes, "loose", repeat)
    for name in dataset.classes:
        values = [strict[name][key]["moderate"]["AP_R40"] for key in ("bbox", "aos")]
        values += [result[name][key]["moderate"]["AP_R40"] for result in (loose, strict) for key in ("bev", "3d")]
        errors, whole = strict["errors"][name], strict["errors"][name]["all"]
        values += [whole[key] for key in ("depth_error", "depth_percent", "depth_bias")]
        values += [whole[key] and 100 * whole[key] for key in ("heading_flipped", "within_1_sigma")]
        rows = {id: met[id] & (labels.name == name) for id, labels in predictions.items()}
        scores = np.concatenate([labels.score[rows[id]] for id, labels in predictions.items()])
        values.append(rank_correlation(scores, np.concatenate([overlap[id][rows[id]] for id in predictions])))
        numbers[name] = dict(zip(COLUMNS, values, strict=True))
        numbers[name]["depth error m by band"] = {band: e["depth_error"] for band, e in errors.items() if band != "all"}
    columns = {column: [numbers[name][column] for name in dataset.classes] for column in COLUMNS}
    means = {column: None if None in values else float(np.mean(values)) for column, values in columns.items()}
    return numbers | {MEAN: means}


def measure_oracles(dataset, predictions, repeat=1):
    """{class: {what is known: [3D loose, 3D strict]}}, moderate AP R40, each frame counted `repeat` times."""
    truth = {frame.id: dataset.truth(index) for index, frame in enumerate(dataset.frames)}
    numbers = {name: {known: [] for known in KNOWN} for name in dataset.classes}
    for known in KNOWN:
        told = {}
        for frame in dataset.frames:
            detections = tell(predictions[frame.id].moved(frame.offset), frame.labels, frame.K, known)
            told[frame.id] = detections.moved(-frame.offset)
        for overlap in ("loose", "strict"):
            metrics = kitti_ap(truth, told, dataset.classes, overlap, repeat)
            for name in dataset.classes:
                numbers[name][known].append(metrics[name]["3d"]["moderate"]["AP_R40"])
    return numbers


def group(runs):
    """[(name, config, values)] -> [(name, [values of each seed])], in the order of their first run."""
    groups = {}
    for name, config, values in runs:
        key = json.dumps({k: v for k, v in to_dict(config).items() if k not in ("seed", "out")}, sort_keys=True)
        groups.setdefault(key, (name, []))[1].append(values)
    return list(groups.values())


def cell(values, digits=1):
    """Mean, and the spread over seeds where there are several; '-' where a run has no such value."""
    if None in values:
        return "-"
    values = np.array(values, float)
    spread = f" +- {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def table(corner, columns, rows):
    """A Markdown table of [(title, cells)]."""
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows])


def show(runs, oracles):
    """Print a table of each class, and of their mean, a row per group of seeds; then one of oracles per group."""
    digits = dict.fromkeys(COLUMNS, 1) | dict.fromkeys(("depth error m", "depth bias m", "score rank"), 2)
    for name in runs[0][2]:
        rows = []
        for title, seeds in group(runs):
            cells = [cell([values[name][column] for values in seeds], digits[column]) for column in COLUMNS]
            rows.append((title, [str(len(seeds)), *cells]))
        print(f"\n{name}\n\n{table('run', ['seeds', *COLUMNS], rows)}")
    for title, seeds in group(oracles):
        rows = []
        for known in KNOWN:
            both = [[cell([values[name][known][i] for values in seeds]) for i in (0, 1)] for name in seeds[0]]
            rows.append((known, [" / ".join(pair) for pair in both]))
        print(f"\n3D AP of {title} if this were known (loose / strict)\n\n{table('known', seeds[0], rows)}")


def main(arguments=None):
    """Command line entry. Returns 0, or 2 after one sentence for an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RUN", help="run folders, then overrides such as data.root=...")
    parser.add_argument("--oracles", action="store_true", help="also AP with one thing known")
    parser.add_argument("--json", help="also write the numbers there")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word and not Path(word).is_dir()]
    folders, runs, oracles = [word for word in options.words if word not in overrides], [], []
    if not folders:
        parser.error("expected at least one run folder")
    try:
        check_writable(options.json)
        for run in folders:
            config, dataset, predictions = predict_run(run, overrides)
            repeat = config.train.eval_repeat
            runs.append((Path(run).name, config, measure(dataset, predictions, repeat)))
            if options.oracles:
                oracles.append((Path(run).name, config, measure_oracles(dataset, predictions, repeat)))
    except UserError as error:
        print(f"error: {error.sentence}", file=sys.stderr)
        return 2
    show(runs, oracles)
    if options.json:
        titled = {"runs": runs, "oracles": oracles}
        values = {title: [(name, value) for name, _, value in rows] for title, rows in titled.items()}
        Path(options.json).write_text(json.dumps(values, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
