"""Compare runs on their held-out frames: AP at two overlaps, errors of depth, and what AP would be if one thing were known.

python yardstick.py RUN [RUN ...] [key=value ...] [--oracles] [--cues] [--json OUT]

Runs whose configs differ only in the seed become one row, mean and spread (standard deviation over seeds). A difference between rows is
worth a word only beyond twice that spread. RESULTS.md is made of these tables.
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
from data_kitti import Labels
from evaluate import find_checkpoint, load_run, predict_dataset
from geometry import project, unproject, yaw_to_alpha
from launch import start_accelerator
from metrics import MATCH_OVERLAP, kitti_ap, object_errors

COLUMNS = ("2D", "AOS", "BEV loose", "3D loose", "BEV strict", "3D strict", "depth error m", "depth error %", "in 1 sigma %")
MEAN = "mean of classes"
KNOWN = ("nothing", "heading", "size", "projected centre", "depth", "location", "all")


def match(found, truth):
    """For each detection the row of the truth of its class with the best 2D overlap, or -1 below `MATCH_OVERLAP`.

    Both `Labels` in the same pixels. Returns (n,) int.
    """
    if not len(found) or not len(truth):
        return np.full(len(found), -1)
    overlap = box_iou(torch.from_numpy(found.box), torch.from_numpy(truth.box)).numpy()
    overlap[(found.name[:, None] != truth.name[None]) | ~truth.is_3d[None]] = 0
    best = overlap.argmax(1)
    return np.where(overlap.max(1) >= MATCH_OVERLAP, best, -1)


def tell(found, truth, K, known):
    """Detections in which one thing is replaced by the truth's, where `match` finds one: an oracle, as in MonoDLE's figure 1.

    found, truth: Labels in the camera frame of K (3, 3); known: one of KNOWN. The depth moves along the detection's own ray, the
    projected centre moves at its own depth. Returns Labels with alpha following.
    """
    rows = match(found, truth)
    told, true = rows >= 0, truth[np.maximum(rows, 0)] if len(truth) else found
    center, size, yaw = found.center.copy(), found.size.copy(), found.yaw.copy()
    told &= (center[:, 2] > 0.1) & (true.center[:, 2] > 0.1) if len(truth) else False
    if known in ("depth", "projected centre") and told.any():
        pixel, depth = (found, true) if known == "depth" else (true, found)
        center[told] = unproject(project(pixel.center[told], K), depth.center[told, 2], K)
    if known in ("location", "all"):
        center[told] = true.center[told]
    if known in ("size", "all"):
        size[told] = true.size[told]
    if known in ("heading", "all"):
        yaw[told] = true.yaw[told]
    return dataclasses.replace(found, center=center, size=size, yaw=yaw, alpha=yaw_to_alpha(yaw, center))


def build(config, sources):
    """`Detection3D` of the sources as the run's network sees them, without augmentation."""
    return build_dataset(config.data, sources, config.model.classes, config.model.size, training=False)


def predict_run(run, overrides=()):
    """A run's `Config`, its `Detection3D` of held-out frames, and what its best checkpoint finds there (`predict_dataset`)."""
    config, model = load_run(find_checkpoint(run), overrides)
    dataset = build(config, config.data.val)
    accelerator = start_accelerator(config.train.mixed_precision)
    model.to(accelerator.device)
    return config, dataset, predict_dataset(model, dataset, accelerator, config.train.batch_size, config.data.workers)


def measure(dataset, predictions):
    """{class: {column: value}} of one run, moderate objects; depth errors over all detected ones."""
    truth = {id: dataset.truth(index) for index, id in enumerate(dataset.ids)}
    results = {id: labels for id, (labels, _) in predictions.items()}
    strict, loose = (kitti_ap(truth, results, dataset.classes, overlap) for overlap in ("strict", "loose"))
    errors = object_errors(truth, results, dataset.classes, {id: sigma for id, (_, sigma) in predictions.items()})
    found = {}
    for name in dataset.classes:
        values = [strict[name][key]["moderate"]["AP_R40"] for key in ("bbox", "aos")]
        values += [result[name][key]["moderate"]["AP_R40"] for result in (loose, strict) for key in ("bev", "3d")]
        whole = errors[name]["all"]
        values += [whole["depth_error"], whole["depth_percent"], whole["within_1_sigma"] and 100 * whole["within_1_sigma"]]
        found[name] = dict(zip(COLUMNS, values, strict=True))
        found[name]["depth error m by band"] = {band: e["depth_error"] for band, e in errors[name].items() if band != "all"}
    columns = {column: [found[name][column] for name in dataset.classes] for column in COLUMNS}
    return found | {MEAN: {column: None if None in values else float(np.mean(values)) for column, values in columns.items()}}


def collect_cues(cameras, labels, classes, boxes=None):
    """{class: (cues (n, 2), depth (n,) m, row (n,))} of the objects that count at KITTI's hard level.

    cameras, labels: K (3, 3) and `Labels` of each frame; row counts their objects through. The cues are the bottom row of the visible
    2D box below the principal point, and its height, both over fy; of other `boxes` (m, 4) per frame where given.
    """
    K = np.stack(cameras).repeat([len(of) for of in labels], 0)
    joined = {name: np.concatenate([getattr(of, name) for of in labels]) for name in ("name", "box", "center", "occlusion", "truncation")}
    true, box = joined["box"], joined["box"] if boxes is None else np.concatenate(boxes)
    cues = np.stack([(box[:, 3] - K[:, 1, 2]) / K[:, 1, 1], (box[:, 3] - box[:, 1]) / K[:, 1, 1]], -1)
    counted = (true[:, 3] - true[:, 1] >= 25) & (joined["occlusion"] <= 2) & (joined["truncation"] <= 0.5)
    rows = {name: np.flatnonzero(counted & (joined["name"] == name)) for name in classes}
    return {name: (cues[of], joined["center"][of, 2], of) for name, of in rows.items()}


def pair_up(dataset, predictions):
    """Per frame, the objects that were found and the best-scored detection of each, row for row: [(Labels, Labels)], camera frame."""
    pairs = []
    for id, frame in zip(dataset.ids, dataset.frames, strict=True):
        found = predictions[id][0].moved(frame.offset)  # best score first
        objects, best = np.unique(match(found, frame.labels), return_index=True)
        pairs.append((frame.labels[objects[objects >= 0]], found[best[objects >= 0]]))
    return pairs


def look_up_depth(known, depth, asked, neighbours=25):
    """Median depth of the objects nearest in their cues: known (n, c), depth (n,), asked (m, c) -> (m,). Of all objects without cues."""
    if not known.shape[1]:
        return np.full(len(asked), np.median(depth))
    spread = np.maximum(known.std(0), 1e-9)
    distance = np.abs(asked[:, None] / spread - known[None] / spread).sum(-1)
    return np.median(depth[np.argsort(distance, 1)[:, :neighbours]], 1)


def measure_cues(train, held_out, predictions):
    """{class: {cue: depth error of held-out objects, per cent, or None}} of a regressor that is given 2D boxes and nothing else.

    The median depth of the nearest training objects in the cue: no function of that cue does much better. First for all objects and
    their true boxes, then for the objects that were found, from true and from found boxes, beside the network's own. Both `Detection3D`.
    """
    classes, columns = held_out.classes, {"class alone": [], "bottom row": [0], "height": [1], "both": [0, 1]}
    cameras, pairs = [frame.K for frame in held_out.frames], pair_up(held_out, predictions)
    true, own = [labels for labels, _ in pairs], [detections for _, detections in pairs]
    known = collect_cues([frame.K for frame in train.frames], [frame.labels for frame in train.frames], classes)
    every = collect_cues(cameras, [frame.labels for frame in held_out.frames], classes)
    met = collect_cues(cameras, true, classes)
    seen = collect_cues(cameras, true, classes, [detections.box for detections in own])
    answers = np.concatenate([detections.center[:, 2] for detections in own])

    def error(answer, depth):
        return float(np.mean(np.abs(answer - depth) / depth) * 100)

    found = {}
    for name in classes:
        cues, depth, _ = known[name]
        asked = {title: (every[name], columns[title]) for title in columns}
        asked |= {f"{title}, found objects": (met[name], columns[title]) for title in ("height", "both")}
        asked |= {f"{title} of the found box": (seen[name], columns[title]) for title in ("height", "both")}
        found[name] = {
            title: error(look_up_depth(cues[:, of], depth, query[:, of]), truth) if len(depth) and len(truth) else None
            for title, ((query, truth, _), of) in asked.items()
        }
        rows = met[name][2]
        found[name]["the network, found objects"] = error(answers[rows], met[name][1]) if len(rows) else None
    return found


def measure_oracles(dataset, predictions):
    """{class: {what is known: [3D loose, 3D strict]}}, moderate AP R40."""
    truth = {id: dataset.truth(index) for index, id in enumerate(dataset.ids)}
    found = {name: {} for name in dataset.classes}
    for known in KNOWN:
        results = {}
        for index, id in enumerate(dataset.ids):
            frame = dataset.frames[index]
            seen: Labels = tell(predictions[id][0].moved(frame.offset), frame.labels, frame.K, known)
            results[id] = seen.moved(-frame.offset)
        for overlap in ("loose", "strict"):
            metrics = kitti_ap(truth, results, dataset.classes, overlap)
            for name in dataset.classes:
                found[name].setdefault(known, []).append(metrics[name]["3d"]["moderate"]["AP_R40"])
    return found


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


def table(groups, classes):
    """A Markdown table of each class, and of their mean: a row per group of seeds."""
    lines = []
    for name in classes:
        lines += [f"\n{name}\n", f"| run | seeds | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
        for title, seeds in groups:
            cells = [cell([values[name][column] for values in seeds], 2 if column == "depth error m" else 1) for column in COLUMNS]
            lines.append(f"| {title} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def small_table(corner, columns, rows):
    """A Markdown table of {row: cells}."""
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()])


def main(arguments=None):
    """Command line entry. Returns 0, or 2 after one sentence for an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RUN", help="run folders, then overrides such as data.root=...")
    parser.add_argument("--oracles", action="store_true", help="also AP with one thing known")
    parser.add_argument("--cues", action="store_true", help="also what a regressor makes of 2D boxes alone, beside the first run")
    parser.add_argument("--json", help="also write the numbers there")
    options = parser.parse_args(arguments)
    runs, oracles, cues = [], [], {}
    try:
        for run in [word for word in options.words if "=" not in word]:
            config, dataset, predictions = predict_run(run, [word for word in options.words if "=" in word])
            runs.append((Path(run).name, config, measure(dataset, predictions)))
            if options.oracles:
                oracles.append((Path(run).name, config, measure_oracles(dataset, predictions)))
            if options.cues and not cues:
                cues = measure_cues(build(config, config.data.train), dataset, predictions)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not runs:
        parser.error("expected at least one run folder")
    print(table(group(runs), runs[0][2]))
    for title, seeds in group(oracles):
        rows = {known: [" / ".join(cell([s[name][known][i] for s in seeds]) for i in (0, 1)) for name in seeds[0]] for known in KNOWN}
        print(f"\n3D AP of {title} if this were known (loose / strict)\n\n{small_table('known', list(seeds[0]), rows)}")
    if cues:
        rows = {cue: [cell([of[cue]]) for of in cues.values()] for cue in next(iter(cues.values()))}
        title = f"Depth error, %, of a regressor given only this of the 2D boxes, and of {runs[0][0]}"
        print(f"\n{title}\n\n{small_table('cue', list(cues), rows)}")
    if options.json:
        values = {"runs": [(n, v) for n, _, v in runs], "oracles": [(n, v) for n, _, v in oracles], "cues_depth_error_percent": cues}
        Path(options.json).write_text(json.dumps(values, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
