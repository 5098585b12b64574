"""KITTI average precision as the official evaluator computes it, for a run's data set or any detector's result files.

    python -m metrics.kitti LABELS RESULTS [--split FILE] [...]     result files: metrics/kitti_files.py

The rules are those of evaluate_object.cpp in KITTI's object development kit (Geiger, Lenz, Urtasun, CVPR 2012), with
the 40 recall positions KITTI uses since 2019 (Simonelli et al., ICCV 2019) beside the older 11:

* A ground truth counts when its class matches and its height, occlusion and truncation are within the difficulty's
  limits. Those outside the limits and those of a neighbour class (Van for Car) are ignored: they may take a detection,
  and are never missed.
* A detection shorter than the limit is ignored whatever its class; it may still take a ground truth. Names ignore case.
* Overlap must be strictly greater than the threshold. Ground truths choose in file order, each among the detections
  still free: first by score over all detections, which yields the score thresholds, then, at each threshold, by
  overlap.
* DontCare regions remove false positives by intersection over the detection's own area.
* AOS compares `alpha`; a false positive counts 0. It is left out where a detection has alpha -10, unknown; and here of
  a class that counts a label of -10, too: KITTI has none, and the official program would take it for an angle.
* Precision is made non-increasing; positions beyond the last threshold stay 0, so n <= 40 counted objects give at most
  n thresholds.
"""

import importlib
import itertools
import logging
import sys

import numpy as np

from scene.frames import Labels, join
from scene.geometry import bev_and_box3d_iou, box_iou, wrap_angle

CLASSES = ("Car", "Pedestrian", "Cyclist")  # KITTI's evaluated ones
DIFFICULTIES = ("easy", "moderate", "hard")
MIN_HEIGHT = (40, 25, 25)  # pixels
MAX_OCCLUSION = (0, 1, 2)
MAX_TRUNCATION = (0.15, 0.3, 0.5)
METRICS = ("bbox", "bev", "3d")  # AOS comes with bbox
NEIGHBOURS = {"car": "van", "pedestrian": "person_sitting"}
MIN_OVERLAP = {  # of bbox, bev, 3d; "": any class not named
    "strict": {"car": (0.7, 0.7, 0.7), "": (0.5, 0.5, 0.5)},
    "loose": {"car": (0.7, 0.5, 0.5), "": (0.5, 0.25, 0.25)},
}
POSITIONS = 41  # recall 0, 1/40, ... 1
LOWEST_SCORE = -1e7  # the official "no detection": a score must be above it to set a threshold
NO_ALPHA = -10.0  # "unknown": a single detection with this alpha makes the official evaluator leave AOS out
MATCH_OVERLAP = 0.5  # 2D overlap above which `object_errors` compares a detection with a ground truth, any class
PAIRS_AT_ONCE = 100_000  # looked at together: about 50 MB
WITHIN_SIGMA = 1 - np.exp(-np.sqrt(2))  # share of a Laplace law within one standard deviation, .757
BANDS = (0, 10, 20, 30, 40, 50)  # metres of depth; the last band is open


def evaluate(dataset, predictions: dict[str, Labels], config, folder=None, overlap="") -> dict:
    """What `compute_metrics` says of predictions for a `Detection3D`: id -> Labels in the frame's own source, pixels.

    With a folder, the predictions become the KITTI files in its results/, and curves.png is drawn.
    """
    truth = {frame.id: frame.labels.moved(-frame.offset) for frame in dataset.frames}
    own, repeat = config.data.overlap, config.train.eval_repeat
    metrics = compute_metrics(truth, predictions, dataset.classes, overlap or "strict", repeat, own)
    if folder is not None:
        importlib.import_module("metrics.kitti_files").write_results(folder, truth, predictions, metrics)
    return metrics


def blank(dataset, config) -> dict:
    """The metrics of a data set without detections: every name that there will be. What labels prevent is logged."""
    if config.data.overlap:
        importlib.import_module("metrics.kitti_notes").refuse_overlaps(config.data.overlap, dataset.classes)
    metrics = compute_metrics({i: dataset.frames[i].labels for i in dataset.frames.spread()}, {}, dataset.classes)
    for note in metrics.get("notes", ()):
        logging.getLogger("deep3d").warning(note)
    return metrics


def compute_metrics(truth, results, classes=CLASSES, overlap="strict", repeat=1, own_overlap=None) -> dict:
    """The dict of `kitti_ap`, which takes the same, with `object_errors` and, on classes without numbers, "notes"."""
    metrics = kitti_ap(truth, results, classes, overlap, repeat, own_overlap)
    aos = [metrics[name]["aos"]["hard"]["AP_R40"] for name in classes]
    whole = None not in aos and all(any(counts.values()) for counts in metrics["counted"].values())
    notes = [] if whole else importlib.import_module("metrics.kitti_notes").describe_classes(truth, results, metrics)
    return metrics | {"errors": object_errors(truth, results, classes), "notes": notes}


def kitti_ap(truth, results, classes=CLASSES, overlap="strict", repeat=1, own_overlap=None) -> dict:
    """Average precision in per cent.

    truth, results: frame id -> Labels in one common frame and one common pixel grid; frames without results count as
    empty. overlap: a key of `MIN_OVERLAP`; own_overlap: class -> thresholds in 2D, BEV, 3D that replace those. repeat
    counts every frame so many times. Unknown occlusion and truncation (-1) are within every limit.

    Returns class -> bbox|aos|bev|3d -> easy|moderate|hard -> {AP_R40, AP_R11}, and beside the classes
    counted: class -> difficulty -> number of ground truths that count, before repeat;
    curves: class -> metric -> difficulty -> {score, recall, precision}, lists over the at most 41 thresholds;
    settings: classes, overlap, min_overlap, min_height, repeat, frames, detections.
    AOS is None when any detection but a DontCare has alpha -10, unknown, or a label that counts has. Raises ValueError
    for results without truth.
    """
    if extra := [frame for frame in results if frame not in truth]:
        raise ValueError(f"{len(extra)} result frames have no ground truth, the first is {extra[0]!r}")
    usual = MIN_OVERLAP[overlap]
    thresholds = {name: list((own_overlap or {}).get(name, usual.get(name.lower(), usual[""]))) for name in classes}
    data = Pairs(truth, results, classes, min(map(min, thresholds.values())))
    metrics, counted, curves = {}, {name: {} for name in classes}, {}
    for name in classes:
        metrics[name], curves[name] = ({metric: {} for metric in ("bbox", "aos", "bev", "3d")} for _ in range(2))
        for level, difficulty in enumerate(DIFFICULTIES):
            roles = data.roles(name, level)
            counts = roles[0] == 1
            counted[name][difficulty] = int(counts.sum())
            has_alpha = data.has_alpha and not (data.gt.alpha[counts] == NO_ALPHA).any()
            for column, metric in enumerate(METRICS):
                score, recall, precision, similarity = _curve(data, *roles, column, thresholds[name][column], repeat)
                shown = {metric: precision}
                if metric == "bbox":
                    shown["aos"] = similarity if has_alpha else None
                for key, values in shown.items():
                    line = {"score": score.tolist(), "recall": recall.tolist()}
                    curves[name][key][difficulty] = line | {"precision": [] if values is None else values.tolist()}
                    metrics[name][key][difficulty] = _average(values)
    settings = {"classes": list(classes), "overlap": overlap, "min_overlap": thresholds, "min_height": list(MIN_HEIGHT)}
    settings |= {"repeat": repeat, "frames": len(truth), "detections": len(data.det)}
    return {**metrics, "counted": counted, "curves": curves, "settings": settings}


class Pairs:
    """All frames as flat arrays, and the ground truth x detection pairs of one frame that overlap by more than `least`.

    Pairs whose classes never meet are left out: a low detection is ignored whatever its class, and may meet any.
    gt, det: Labels of all frames in order; gt_frame (G,), det_frame (D,) frame numbers; gt_code, det_code: numbers of
    their names in lower case, as in `codes`; -1 stands for a name that no row has. pairs[m] = (gt row, det row,
    overlap) for the three METRICS, rows ascending. cover (D, 3): largest share of a detection inside one DontCare
    region.
    """

    def __init__(self, truth, results, classes, least):
        frames = list(truth)
        self.gt, self.gt_frame = _flatten(truth, frames)
        self.det, self.det_frame = _flatten(results, frames)
        self.height = np.abs(self.det.box[:, 1] - self.det.box[:, 3])
        names = [name.lower() for name in (*self.gt.name, *self.det.name)]
        self.codes = codes = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.gt_code, self.det_code = np.split(np.array([codes[name] for name in names], int), [len(self.gt)])
        self.has_alpha = not ((self.det.alpha == NO_ALPHA) & (self.det_code != codes.get("dontcare", -1))).any()
        wanted = {name.lower() for name in classes}
        served = {neighbour: name for name, neighbour in NEIGHBOURS.items() if name in wanted}
        serves = np.array([codes.get(served.get(name), -1) for name in names[: len(self.gt)]], int)
        relevant = np.flatnonzero(np.isin(self.gt_code, [codes.get(name, -1) for name in (*wanted, *served)]))
        low = self.height < max(MIN_HEIGHT)
        gt_box, det_box = _boxes(self.gt), _boxes(self.det)
        overlaps = (
            (_flat(self.gt), _flat(self.det), lambda g, d: (box_iou(self.gt.box[g], self.det.box[d]),)),
            (_ground(gt_box), _ground(det_box), lambda g, d: bev_and_box3d_iou(gt_box[g], det_box[d])),
        )
        self.pairs = []
        for gt_extent, det_extent, measure in overlaps:  # 3D is never more than BEV: one search serves both
            chunks = []
            for g, d in self._meeting(relevant, gt_extent, det_extent, least):
                fits = low[d] | (self.gt_code[g] == self.det_code[d]) | (serves[g] == self.det_code[d])
                g, d = g[fits], d[fits]
                above = [(iou, np.flatnonzero(iou > least)) for iou in measure(g, d)]
                chunks.append([(g[rows], d[rows], iou[rows]) for iou, rows in above])
            for parts in zip(*chunks, strict=True):
                gt, det, overlap = (np.concatenate(columns) for columns in zip(*parts, strict=True))
                order = np.lexsort((det, gt))
                self.pairs.append((gt[order], det[order], overlap[order]))
        self.cover = self._cover(np.flatnonzero(self.gt_code == codes.get("dontcare", -1)))

    def _meeting(self, rows, gt, det, least):
        """Yield (rows of gt, of det), in slices and any order, of pairs in a frame whose overlap may exceed `least`.

        rows: of gt, those wanted; gt (5, G), det (5, D): extents x1, y1, x2, y2 and the box's own area. What two boxes
        have in common is at most what their extents have. Always at least one slice.
        """
        first, last = (np.searchsorted(self.det_frame, self.gt_frame[rows], side) for side in ("left", "right"))
        end = np.cumsum(last - first)
        slices = np.searchsorted(end, np.arange(PAIRS_AT_ONCE, end[-1] if len(end) else 0, PAIRS_AT_ONCE))
        for part in np.split(np.arange(len(rows)), slices):
            number = last[part] - first[part]
            offset = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
            g, d = np.repeat(rows[part], number), np.repeat(first[part], number) + offset
            a, b = gt[:, g], det[:, d]
            width, height = np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2])
            needed = least / (1 + least) * (a[4] + b[4]) * (1 - 1e-6)  # rounding may not lose a pair
            meet = (width > 0) & (height > 0) & (width * height >= needed)
            yield g[meet], d[meet]

    def _cover(self, regions):
        """(D, 3): how much of each detection's own area lies in the DontCare region that covers it most.

        In space a DontCare has only KITTI's fill values. The official evaluator drops a detection of the same values,
        without a 3D box, from the false positives of BEV and, as its volume is negative, not of 3D.
        """
        cover = np.zeros((len(self.det), 3))
        unplaced = ~self.det.is_3d & (self.det.center[:, 0] == -1000) & (self.det.center[:, 2] == -1000)
        cover[unplaced & np.isin(self.det_frame, self.gt_frame[regions]), 1] = 1.0
        for g, d in self._meeting(regions, _flat(self.gt), _flat(self.det), 0.0):
            a, b = self.gt.box[g], self.det.box[d]
            both = np.prod(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 1)
            np.maximum.at(cover[:, 0], d, both / np.prod(b[:, 2:] - b[:, :2], 1))
        return cover

    def roles(self, name, level):
        """What rows are for a class and a level: gt (G,), det (D,), each 1 counted, 0 ignored or -1 not looked at."""
        code, neighbour = (self.codes.get(key, -1) for key in (name.lower(), NEIGHBOURS.get(name.lower())))
        height = self.gt.box[:, 3] - self.gt.box[:, 1]
        outside = (self.gt.occlusion > MAX_OCCLUSION[level]) | (self.gt.truncation > MAX_TRUNCATION[level])
        outside |= height <= MIN_HEIGHT[level]
        counts = (self.gt_code == code) & ~outside
        gt = np.where(counts, 1, np.where((self.gt_code == code) | (self.gt_code == neighbour), 0, -1))
        return gt, np.where(self.height < MIN_HEIGHT[level], 0, np.where(self.det_code == code, 1, -1))

    def matches(self, name):
        """What `object_errors` compares: objects (G,) bool, and rows of gt and det (m,) that belong together."""
        objects = (self.roles(name, len(DIFFICULTIES) - 1)[0] == 1) & self.gt.is_3d
        gt, det, _ = self.pairs[0]
        rows = objects[gt] & (self.det_code[det] == self.codes.get(name.lower(), -1)) & self.det.is_3d[det]
        gt, det = gt[rows], det[rows]
        taken = _match(gt, det, self.gt_frame[gt], (-self.det.score[det], det), np.ones((1, len(gt)), dtype=bool))[0]
        return objects, gt[taken], det[taken]


def _flatten(labels, frames):
    """All rows of labels (id -> Labels) in the order of frames, and the number of the frame of each row."""
    parts = [(i, labels[frame]) for i, frame in enumerate(frames) if len(labels.get(frame, ()))]
    numbers = np.array([i for i, _ in parts], int)
    return join([part for _, part in parts]), np.repeat(numbers, [len(part) for _, part in parts])


def _boxes(labels):
    """(n, 7) x, y, z, l, h, w, yaw; a row with a size that is not positive becomes a point, which overlaps nothing."""
    size = np.where((labels.size > 0).all(1, keepdims=True), labels.size, 0.0)
    return np.concatenate([labels.center, size, labels.yaw[:, None]], 1)


def _flat(labels):
    """2D boxes as rows x1, y1, x2, y2, area (5, n)."""
    return np.stack([*labels.box.T, np.prod(labels.box[:, 2:] - labels.box[:, :2], 1)])


def _ground(boxes):
    """Boxes (n, 7) from above as rows x1, z1, x2, z2, area (5, n)."""
    x, _, z, length, _, width, yaw = boxes.T
    cosine, sine = np.abs(np.cos(yaw)) / 2, np.abs(np.sin(yaw)) / 2
    along, across = sine * length + cosine * width, cosine * length + sine * width
    return np.stack([x - across, z - along, x + across, z + along, length * width])


def _match(gt, det, frame, preference, usable):
    """Ground truths take, in row order, the detection they prefer among those still free; frames do not interact.

    gt, det, frame: (p,) row numbers of the pairs, gt ascending. preference: keys (p,), the most important first, small
    preferred. usable: (T, p) bool, one row for each of T independent matchings. Returns taken (T, p) bool.

    Works on the first ground truth of every frame at once, then on every second, and so on.
    """
    taken = np.zeros(usable.shape, dtype=bool)
    if not len(gt):
        return taken
    new_gt = np.r_[True, gt[1:] != gt[:-1]]
    new_frame = np.r_[True, frame[1:] != frame[:-1]]
    number = np.cumsum(new_gt)
    turn = number - np.maximum.accumulate(np.where(new_frame, number, 0))  # 0 for the first ground truth of a frame
    order = np.lexsort((*reversed(preference), gt, turn))
    bounds = np.searchsorted(turn[order], np.arange(turn.max() + 2))
    _, compact = np.unique(det, return_inverse=True)
    used = np.zeros((len(usable), compact.max() + 1), dtype=bool)
    for start, end in itertools.pairwise(bounds):
        rows = order[start:end]
        free = usable[:, rows] & ~used[:, compact[rows]]
        position = np.where(free, np.arange(len(rows)), len(rows))
        groups = np.flatnonzero(np.r_[True, gt[rows[1:]] != gt[rows[:-1]]])
        best = np.minimum.reduceat(position, groups, axis=1)  # (T, ground truths of this turn)
        threshold, group = np.nonzero(best < len(rows))
        chosen = rows[best[threshold, group]]
        taken[threshold, chosen] = True
        used[threshold, compact[chosen]] = True
    return taken


def _score_thresholds(scores, count):
    """Scores of matched detections (m,) and the number of ground truths -> the at most 41 nearest to even recall steps.

    `getThresholds` of the official evaluator: a score is skipped while the next one's recall is closer to the wanted
    recall; the last is always kept.
    """
    kept, recall = [], 0.0
    for rank, score in enumerate(np.sort(scores)[::-1].tolist(), 1):
        nearer = (rank + 1) / count - recall < recall - rank / count
        if rank == len(scores) or not nearer:
            kept.append(score)
            recall += 1.0 / (POSITIONS - 1)
    return np.array(kept)


def _curve(data, gt_role, det_role, metric, least, repeat):
    """Precision and orientation similarity over score thresholds, of one metric and the roles of `Pairs.roles`.

    Returns score (T,), recall (T,), precision (T,), similarity (T,), T <= 41; the last two made non-increasing.
    """
    gt, det, overlap = data.pairs[metric]
    rows = np.flatnonzero((overlap > least) & (gt_role[gt] >= 0) & (det_role[det] >= 0))
    gt, det, overlap = gt[rows], det[rows], overlap[rows]
    frame, score, counts = data.gt_frame[gt], data.det.score[det], gt_role[gt] == 1
    full, count = counts & (det_role[det] == 1), (gt_role == 1).sum()
    by_score = _match(gt, det, frame, (-score, det), (score > LOWEST_SCORE)[None])[0]
    thresholds = _score_thresholds(np.repeat(score[by_score & full], repeat), int(count) * repeat)

    ignored = det_role[det] == 0
    taken = _match(gt, det, frame, (ignored, np.where(ignored, 0.0, -overlap), det), score >= thresholds[:, None])
    similarity = (1.0 + np.cos(data.gt.alpha[gt] - data.det.alpha[det])) / 2.0
    true = (taken & full).sum(1)
    missed = count - (taken & counts).sum(1)
    open_ground = data.cover[:, metric] <= least  # detections that no DontCare region excuses
    alone = np.sort(data.det.score[(det_role == 1) & open_ground])
    false = len(alone) - np.searchsorted(alone, thresholds, "left") - (taken & ~ignored & open_ground[det]).sum(1)
    falling = [_share(part, true + false)[::-1] for part in (true, (taken & full) @ similarity)]
    return thresholds, _share(true, true + missed), *(np.maximum.accumulate(values)[::-1] for values in falling)


def _share(part, whole):
    """part / whole; of nothing 0, where the official evaluator gets NaN and stops making sense."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _average(values):
    """AP in per cent from values at the first len(values) of 41 recall positions, 0 at the others; None of None."""
    if values is None:
        return {"AP_R40": None, "AP_R11": None}
    full = np.zeros(POSITIONS)
    full[: len(values)] = values
    return {"AP_R40": float(full[1:].mean() * 100), "AP_R11": float(full[::4].mean() * 100)}


def object_errors(truth, results, classes=CLASSES) -> dict:
    """How far off matched objects are, by distance: depth, heading, size, recall, calibration of the depth sigma.

    truth, results: as for `kitti_ap`. Objects are the ground truths with a 3D box that count at "hard"; each takes, of
    the detections of its class with 2D overlap above .5, the one with the highest score.

    Returns class -> band ("0-10" ... "50_and_more", metres of its depth, and "all") -> {objects, matched, recall
    (share), depth_error (mean absolute, m), depth_bias (mean of predicted - true, m), depth_percent (mean absolute, of
    the true depth), heading_error (mean absolute, degrees), heading_flipped (share above 90 degrees), length_error,
    height_error, width_error (mean absolute, m), within_1_sigma, within_2_sigma (share), sigma_ratio (the factor of
    sigma within which the share of errors would be `WITHIN_SIGMA`)}; None where nothing can be averaged.
    """
    data = Pairs(truth, results, classes, MATCH_OVERLAP)
    names = [f"{near}-{far}" for near, far in itertools.pairwise(BANDS)] + [f"{BANDS[-1]}_and_more"]
    band = np.clip(np.searchsorted(BANDS, data.gt.center[:, 2], "right") - 1, 0, None)
    errors = {}
    for name in classes:
        objects, gt, det = data.matches(name)
        inside = {label: objects & (band == number) for number, label in enumerate(names)} | {"all": objects}
        errors[name] = {
            label: band_errors(int(rows.sum()), data.gt[gt[rows[gt]]], data.det[det[rows[gt]]])
            for label, rows in inside.items()
        }
    return errors


def band_errors(objects, truth, detections):
    """One entry of `object_errors`: truth and detections are Labels of the matched pairs, row by row."""
    matched, sigma = len(truth), detections.sigma
    depth = detections.center[:, 2] - truth.center[:, 2]
    sigmas = np.zeros(0) if sigma is None else (np.abs(depth) / sigma)[sigma > 0]  # it may be unknown, NaN
    heading = np.degrees(np.abs(wrap_angle(detections.yaw - truth.yaw)))
    length, height, width = np.abs(detections.size - truth.size).T
    means = {
        "depth_error": np.abs(depth),
        "depth_bias": depth,
        "depth_percent": np.abs(depth) / np.maximum(np.abs(truth.center[:, 2]), 1e-6) * 100,
        "heading_error": heading,
        "heading_flipped": heading > 90,
        "length_error": length,
        "height_error": height,
        "width_error": width,
        "within_1_sigma": sigmas <= 1,
        "within_2_sigma": sigmas <= 2,
    }
    counts = {"objects": objects, "matched": matched, "recall": matched / objects if objects else None}
    errors = {key: float(np.mean(values)) if len(values) else None for key, values in means.items()}
    ratio = float(np.quantile(sigmas, WITHIN_SIGMA)) if len(sigmas) else None
    return counts | errors | {"sigma_ratio": ratio}


def table(metrics: dict, metric: str = "", errors: bool = False) -> str:
    """The result of `compute_metrics` as text, with its errors on request. metric: 'R40', the default, or 'R11'."""
    key, settings = f"AP_{metric or 'R40'}", metrics["settings"]
    classes, repeat = settings["classes"], settings["repeat"]
    wide = max(10, *(len(name) for name in classes))
    times = f", each frame counted {repeat} times" if repeat > 1 else ""
    lines = [
        f"{key}, per cent: {settings['frames']} frames{times}, {settings['detections']} detections",
        " " * wide + "".join(f"{title:^26}" for title in ("2D", "AOS", "BEV", "3D")) + "  counted objects n",
        f"{'class':{wide}}" + "    easy    mod.    hard  " * 4 + "   easy   mod.   hard",
    ]
    few = [n for name in classes for n in metrics["counted"][name].values() if 0 < n * repeat < POSITIONS]
    for name in classes:
        row, counts = f"{name:{wide}}", metrics["counted"][name]
        for cells in metrics[name].values():  # 2D, AOS, BEV, 3D
            for difficulty, averages in cells.items():
                value, count = averages[key], counts[difficulty]
                row += f"{'-' if value is None or not count else f'{value:.2f}':>7}{'*' if count in few else ' '}"
            row += "  "
        lines.append(row + "".join(f"{count:7d}" for count in counts.values()))
    overlaps = [f"{name} {' '.join(f'{v:g}' for v in least)}" for name, least in settings["min_overlap"].items()]
    lines.append(f"Overlap must exceed, in 2D, BEV, 3D ({settings['overlap']}): {'; '.join(overlaps)}")
    if few:
        enough = -(-POSITIONS // min(few))
        sentence = "The official sampling takes n scores: below 100 for n <= 40, however good"
        lines.append(f"* {sentence}; --repeat {enough} mends it")
    if errors:
        lines += importlib.import_module("metrics.kitti_files").error_lines(metrics["errors"])
    return "\n".join([*lines, *metrics.get("notes", ())])


def main(arguments: list[str] | None = None) -> int:
    """The command for files, which training does not read: metrics/kitti_files.py."""
    return importlib.import_module("metrics.kitti_files").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
