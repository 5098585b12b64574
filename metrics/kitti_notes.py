"""What KITTI's numbers do not tell: why a class has none, and the likeliest mistakes in label and result files.

Nothing here changes a number. truth and results are id -> Labels in one common frame, as in metrics/kitti.py.
"""

import itertools
import re
from collections import Counter

import numpy as np

from metrics.kitti import CLASSES, MATCH_OVERLAP, MAX_OCCLUSION, MAX_TRUNCATION, MIN_HEIGHT, NO_ALPHA
from scene.frames import UserError, join
from scene.geometry import box_iou, ray_angle, wrap_angle

NAMES = {*map(str.lower, CLASSES), "van", "truck", "person_sitting", "tram", "misc", "dontcare"}  # KITTI's, lower case
LEAST = 5  # matched pairs that a judgement needs
SEVERAL = 0.1  # share of the results from which on what they have in common is no accident
MOST_NAMES = 5  # that are listed
BOXES = {  # what four numbers look like: x1, y1, x2, y2 of them
    "x, y, width, height": lambda box: np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], 1),
    "the middle, width and height": lambda box: np.concatenate(
        [box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1
    ),
    "y1, x1, y2, x2": lambda box: box[:, [1, 0, 3, 2]],
    "those of an image half as large": lambda box: box * 2,
    "those of an image twice as large": lambda box: box / 2,
}
AXES = {  # what x, y, z look like: those of a geometric centre that are meant
    "those of a lidar or vehicle, x forward, y left, z up": lambda center: center[:, [1, 2, 0]] * [-1, -1, 1],
    "x, z, y": lambda center: center[:, [0, 2, 1]],
}
TURNS = {  # what rotation_y looks like: the one that is meant
    "turned by 180 degrees": lambda yaw: yaw + np.pi,
    "90 degrees too small": lambda yaw: yaw + np.pi / 2,
    "90 degrees too large": lambda yaw: yaw - np.pi / 2,
    "negative, as a turn about -y": lambda yaw: -yaw,
    "90 degrees minus itself, as a turn about another axis": lambda yaw: np.pi / 2 - yaw,
    "-90 degrees minus itself, as a turn about a lidar's z": lambda yaw: -np.pi / 2 - yaw,
}


def refuse_overlaps(overlaps, classes):
    """Raises UserError for data.overlap of a class that is not evaluated, or that no overlap can exceed."""
    for name, least in overlaps.items():
        if name not in classes or not 0 <= min(least) <= max(least) < 1:
            expected = f"thresholds from 0 to below 1 of one of {', '.join(classes)}"
            raise UserError(f"data.overlap has {name!r}: {[*least]}, expected {expected}")


def describe_classes(truth, results, metrics):
    """Sentences on classes none of whose labels count, and on those that have no AOS; metrics: of `kitti_ap`.

    Reasons are those at the hardest level; a label may have several.
    """
    labels, detections = join(list(truth.values())), _in_order(truth, results)
    names, sentences = _lower(labels), []
    for name, counts in metrics["counted"].items():
        own = labels[names == name.lower()]
        unknown = int((own.alpha == NO_ALPHA).sum())
        if any(counts.values()) and unknown:
            about = "unknown, so AOS is left out; it is rotation_y - atan2(x, z)"
            sentences.append(f"{name}: alpha is {NO_ALPHA:g} in {unknown} of {len(own)} labels, {about}")
        elif len(own) and not any(counts.values()):
            reasons = {
                f"truncation above {MAX_TRUNCATION[-1]:g}": own.truncation > MAX_TRUNCATION[-1],
                f"occlusion above {MAX_OCCLUSION[-1]}": own.occlusion > MAX_OCCLUSION[-1],
                f"a 2D box at most {MIN_HEIGHT[-1]} px high": own.box[:, 3] - own.box[:, 1] <= MIN_HEIGHT[-1],
            }
            why = ", ".join(f"{int(rows.sum())} for {reason}" for reason, rows in reasons.items() if rows.any())
            flags = np.isin(own.truncation, (0, 1)).all() and (own.truncation == 1).any()
            hint = "; truncation is only 0 or 1: is it a flag of another tool?" if flags else ""
            sentences.append(
                f"{name}: none of its {len(own)} labels counts in KITTI's metric, left out are {why}{hint}"
            )
    if len(others := labels[names != "dontcare"]) and not {*map(str.lower, metrics["counted"])} & {*names}:
        sentences.append(f"no label is called {', '.join(metrics['counted'])}; they are called {_listed(others.name)}")
    if unknown := int(((detections.alpha == NO_ALPHA) & (_lower(detections) != "dontcare")).sum()):
        sentences.append(f"alpha is {NO_ALPHA:g} in {unknown} results, unknown: officially AOS is left out then")
    return sentences


def describe_files(truth, results, classes):
    """Sentences on what is most likely wrong in label and result files that can be evaluated."""
    labels, detections = join(list(truth.values())), _in_order(truth, results)
    sentences = describe_labels(truth, classes) + _tell_repeated(results, "results")
    if not len(detections):
        return sentences + ["there is no result in any file"] * bool(len(labels))
    sentences += _tell_names(labels, detections, classes)
    degrees = _tell_degrees(detections)
    gt, det = match(truth, results)
    placed = gt.is_3d & det.is_3d
    sentences += degrees + _tell_boxes(truth, results, detections, len(gt))
    if placed.sum() >= LEAST:
        gt, det = gt[placed], det[placed]
        places = _tell_places(gt, det)
        sentences += _tell_sizes(gt, det) + places + ([] if degrees or places else _tell_turns(gt, det))
    elif not detections.is_3d.any():
        sentences.append("no result has a 3D box: BEV and 3D have none to find")
    return sentences


def describe_labels(truth, classes):
    """Sentences on labels of evaluated classes that have only a 2D box, and on labels that repeat others."""
    labels = join(list(truth.values()))
    own = labels[np.isin(_lower(labels), [name.lower() for name in classes]) & ~labels.is_3d]
    about = f"labels without a 3D box: {_listed(own.name)}; officially they count in 2D, and are missed in BEV and 3D"
    return ([about] if len(own) else []) + _tell_repeated(truth, "labels")


def repeated(labels, frame):
    """(n,) bool: rows but DontCare that an earlier row of the same frame (n,) equals in class and boxes."""
    _, code = np.unique(labels.name.astype(str), return_inverse=True)
    keys = np.column_stack([frame, code, labels.box, labels.size, labels.center, labels.yaw])
    order = np.lexsort(keys.T)  # stable
    again = np.zeros(len(keys), bool)
    again[order[1:]] = (keys[order[1:]] == keys[order[:-1]]).all(1)
    return again & (labels.name != "DontCare")


def match(truth, results, box=lambda box: box):
    """(labels, results) row by row: each label with the result of its class that overlaps it most in 2D, above .5.

    box: what is taken for the 2D boxes (n, 4) of results.
    """
    pairs = [(truth[id][:0], truth[id][:0]) for id in itertools.islice(truth, 1)]
    for id, labels in truth.items():
        if len(detections := results.get(id, ())) and len(labels):
            overlap = box_iou(labels.box[:, None], box(detections.box)) * (
                _lower(labels)[:, None] == _lower(detections)
            )
            best = overlap.argmax(1)
            rows = overlap[np.arange(len(labels)), best] > MATCH_OVERLAP
            pairs.append((labels[rows], detections[best[rows]]))
    return tuple(join(list(part)) for part in zip(*pairs, strict=True)) if pairs else (join([]), join([]))


def _in_order(truth, results):
    return join([results[id] for id in truth if id in results])


def _lower(labels):
    return np.array([name.lower() for name in labels.name], dtype=object)


def _listed(names):
    """'a' (12), 'b' (3), the most frequent first."""
    counts = Counter(names.tolist()).most_common()
    more = f" and {len(counts) - MOST_NAMES} more names" if len(counts) > MOST_NAMES else ""
    return ", ".join(f"{name!r} ({count})" for name, count in counts[:MOST_NAMES]) + more


def _tell_repeated(parts, title):
    """On rows of id -> Labels that stand in their file more than once."""
    ids = list(parts)
    frame = np.repeat(np.arange(len(ids)), [len(parts[id]) for id in ids])
    rows = np.flatnonzero(repeated(join([parts[id] for id in ids]), frame))
    first = f"the first in {ids[frame[rows[0]]]}.txt" if len(rows) else ""
    return [f"{len(rows)} {title} repeat one of their file, with its class and boxes, {first}"] if len(rows) else []


def _tell_names(labels, detections, classes):
    """On classes that labels have and no result is called by, though results have names of their own."""
    there, known = {*_lower(detections)}, NAMES.union(_lower(labels), map(str.lower, classes))
    missing = [name for name in classes if name.lower() in {*_lower(labels)} and name.lower() not in there]
    if not there & {*map(str.lower, classes)}:
        known = {"dontcare"}
    strange = detections.name[[name not in known for name in _lower(detections)]]
    if not missing or not len(strange):
        return []
    hint = "a result is called as the labels are, and --classes names what is evaluated"
    if all(re.fullmatch(r"[-+]?\d+(\.\d*)?", name) for name in strange):
        hint = "numbers of classes, where their names are expected"
    elif any(name.strip("\"',;:") != name for name in strange):
        hint = "fields are separated by blanks alone, without commas or quotes"
    elif any("." in name for name in strange):
        hint = "names of another data set, where those of the labels are expected"
    return [f"no result is called {', '.join(missing)}; others are called {_listed(strange)}: {hint}"]


def _tell_degrees(detections):
    """On angles beyond 2 pi."""
    sentences = []
    for title, angles in {"rotation_y": detections.yaw[detections.is_3d], "alpha": detections.alpha}.items():
        angles = angles[angles != NO_ALPHA]
        beyond = np.abs(angles) > 2 * np.pi + 0.05
        if len(angles) and beyond.mean() >= SEVERAL and np.abs(angles).max() < 361:
            spread = (
                f"{100 * beyond.mean():.0f} % of the results lie beyond 2 pi, from {angles.min():g} to {angles.max():g}"
            )
            sentences.append(f"{title} looks like degrees, where radians are expected: {spread}")
    return sentences


def _tell_boxes(truth, results, detections, matched):
    """On 2D boxes that match no label, or are too low to count."""
    low = np.abs(detections.box[:, 3] - detections.box[:, 1]) < MIN_HEIGHT[-1]
    if matched < LEAST and low.all():
        about = "no result counts, in BEV and 3D neither: detectors without 2D boxes write those of their 3D boxes"
        relative = (
            " (0 to 1 of the image, where pixels are expected?)" if 0 < np.abs(detections.box).max() <= 1.5 else ""
        )
        return [f"all 2D boxes of results are lower than {MIN_HEIGHT[-1]} px{relative}, so that {about}"]
    if matched < SEVERAL * len(detections):
        for words, box in BOXES.items():
            if (other := len(match(truth, results, box)[0])) >= max(LEAST, 5 * matched):
                better = f"{other} of the labels are met so, {matched} as they are"
                return [f"2D boxes of results look like {words}, where x1, y1, x2, y2 are expected: {better}"]
    return []


def _tell_sizes(gt, det):
    """On sizes of classes in another order or unit; gt, det: matched rows, as in the others."""
    orders = ["".join(order) for order in itertools.permutations("hwl")]  # the first is the file's
    columns = [["lhw".index("hwl"[order.index(letter)]) for letter in "lhw"] for order in orders]
    classes = {}  # what is said of some
    for name, count in sorted(Counter(gt.name.tolist()).items()):
        own, size = gt[gt.name == name], np.maximum(det.size[gt.name == name], 1e-9)
        off = np.array([np.median(np.log(size[:, order] / own.size), 0) for order in columns])
        farthest = np.abs(off).max(1)
        if count >= LEAST and farthest.min() < min(0.3, farthest[0] - 0.3):
            order = ", ".join(orders[farthest.argmin()])
            classes.setdefault(f"look like ({order}), where (h, w, l) is expected", []).append(name)
        elif count >= LEAST and farthest[0] > np.log(2) and np.ptp(off[0]) < 0.3:
            classes.setdefault(f"look {np.exp(off[0].mean()):.2f} times those of labels: are they metres?", []).append(
                name
            )
    return [f"sizes of results ({', '.join(names)}) {words}" for words, names in classes.items()]


def _tell_places(gt, det):
    """On geometric centres, other axes and units; of the bottoms' centres, as they stand in the files."""
    truth, place = (labels.center + labels.size * [0, 0.5, 0] for labels in (gt, det))
    away = np.median(np.linalg.norm(place - truth, axis=1))
    for words, meant in AXES.items():
        if away > 4 and np.median(np.linalg.norm(meant(place) - truth, axis=1)) < away / 4:
            return [f"x, y, z of results look like {words}, where x is right, y down and z forward"]
    low = place[:, 1] - truth[:, 1]
    if abs(np.median(low / gt.size[:, 1]) + 0.5) < 0.15:
        return ["y of results looks like that of the geometric centre, where that of the bottom is expected"]
    if np.median(np.abs(low)) > 1 and np.median(np.abs(place[:, 1] + truth[:, 1])) < np.median(np.abs(low)) / 4:
        return ["y of results looks as if it pointed up, where it points down"]
    ratio = np.median(np.linalg.norm(place, axis=1) / np.maximum(np.linalg.norm(truth, axis=1), 1e-9))
    if not 0.5 < ratio < 2:
        return [f"x, y, z of results look {ratio:.2g} times those of labels: are they metres of this camera?"]
    return []


def _tell_turns(gt, det):
    """On rotation_y and alpha. Means decide, as most cars are parallel to the road and look alike in several ways."""
    off, ray = wrap_angle(det.yaw - gt.yaw), ray_angle(det.center)
    near = np.abs(off) < 1
    slope = off[near] @ ray[near] / max(ray[near] @ ray[near], 1e-9)
    misses = {words: np.abs(wrap_angle(meant(det.yaw) - gt.yaw)).mean() for words, meant in TURNS.items()}
    best, miss = min(misses, key=misses.get), np.abs(off).mean()
    sentences = []
    if miss > 0.4 and misses[best] < min(0.5, miss / 3):
        sentences.append(f"rotation_y of results is {best}: so it is nearest to the labels'")
    elif near.sum() >= 3 * LEAST and slope < -0.7:
        sentences.append("rotation_y of results looks like alpha, the angle to the viewing ray")
    elif (det.alpha != NO_ALPHA).all():
        wrong = np.median(np.abs(wrap_angle(det.alpha - wrap_angle(det.yaw - ray))))
        same = np.median(np.abs(wrap_angle(det.alpha - det.yaw))) < 0.01 and np.median(np.abs(ray)) > 0.05
        if wrong > 0.3 or same:
            what = "equals rotation_y" if same else f"is {wrong:.1f} rad off in the median"
            sentences.append(f"alpha of results is not rotation_y - atan2(x, z), but {what}; AOS compares alpha")
    return sentences
