"""An evaluation to look at: one HTML file with tables, curves, and frames to filter by what is wrong in them.

`evaluate.py ... --report` writes it. It needs no network, server or package; the page is tools/report.html, and what it
shows is collected here. Right and wrong are as the metric's own evaluator matches, told on the page in words.
"""

import base64
import dataclasses
import functools
import importlib
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont
from tqdm import tqdm

from formats.kitti import IMAGE_SUFFIXES, read_calib, split_projection
from metrics.kitti import BANDS, DIFFICULTIES, MATCH_OVERLAP, Pairs, band_errors
from scene.draw import HEIGHT, SHEET_WIDTH, balanced_score, best_score
from scene.frames import Frame, Labels, UserError, join, load_image, make_labels, usable_cores
from scene.geometry import box3d_iou, project_boxes, wrap_angle

PAGE = Path(__file__).with_suffix(".html")
KNOWN = ("kitti", "nuscenes")  # metrics
FRAMES = 150  # in a file, unless asked otherwise
PICTURES_BYTES = 5_100_000  # of all JPEGs in a file, so that 150 frames stay below 8 MB
PICTURE_BYTES = 34_000, 110_000  # of one, at least and at most: the fewer there are, the better they are
QUALITIES = (92, 86, 80, 74, 68, 62, 56, 50, 40)  # of JPEG, the first that is small enough
LEFT_OUT, MATCHED, DUPLICATE, FALSE = range(4)  # roles of detections
WRONG_DEPTH = 0.1  # of the true depth, from where on it counts as an error; the page can change it
HEADING_BINS = 12  # of 15 degrees
KITTI_RULE = (
    "An object counts as at KITTI's level 'hard': more than 25 pixels high, at most largely hidden and half cut off. "
    "In the order of its labels each object takes, of the detections of its class whose 2D boxes overlap its own by "
    f"more than {MATCH_OVERLAP:g}, the one with the highest score. Missed is an object that takes none. A duplicate "
    "is a further detection of an object that has taken a better one. False is one that meets no object. Left out is "
    "one that meets only an object that does not count, or one of a neighbour class, lies in a DontCare region, or "
    "is lower than 25 pixels. Too near and too far are wrong in depth by more than the share in the filter; turned is "
    "a heading that is off by more than 90 degrees."
)
NUSCENES_RULE = (
    "As in nuScenes' errors: class by class, from the highest score on, each detection takes the nearest free object "
    "whose centre is less than 2 m away, seen from above. Missed is an object that none has taken. A duplicate is a "
    "detection within 2 m of an object that a better one has taken; false is any other that took none. Objects and "
    "detections beyond the range of their class, objects without lidar and radar points, and what stands in bicycle "
    "racks are left out. A depth that is wrong by more than 2 m thus makes the object missed and the detection false; "
    "too near and too far are those wrong by less, but by more than the share in the filter. Turned is a heading that "
    "is off by more than 90 degrees."
)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Objects and detections of all frames as an evaluator has matched them: rows by frame, in the frames' order."""

    frames: list[Frame]  # of which K may be None: then they are seen from above alone
    classes: tuple[str, ...]
    truth: Labels  # G rows, regions among them, in their frames' sources
    truth_frame: np.ndarray  # (G,) number of the frame
    counted: np.ndarray  # (G,) bool: may be missed
    detections: Labels  # D rows
    detection_frame: np.ndarray  # (D,)
    role: np.ndarray  # (D,) MATCHED, DUPLICATE, FALSE or LEFT_OUT
    partner: np.ndarray  # (D,) row of the truth of what is matched, -1

    @functools.cached_property
    def truth_class(self):
        """(G,) place of each name among the classes, whatever its case; -1 for another."""
        return _find(self.truth.name, self.classes)

    @functools.cached_property
    def detection_class(self):
        """(D,) the same of the detections."""
        return _find(self.detections.name, self.classes)

    @property
    def matched(self):
        """Rows of the truth and of the detections that belong together, (m,) each."""
        rows = np.flatnonzero(self.role == MATCHED)
        return self.partner[rows], rows


def _find(names, classes):
    place = {name.lower(): number for number, name in enumerate(classes)}
    return np.array([place.get(str(name).lower(), -1) for name in names], int)


# ---- what the evaluators say


def judge_kitti(frames, results, classes, truth=None):
    """The `Judgement` of results (id -> Labels in the frame's source) at "hard", matched as in `object_errors`.

    truth: the same of the frames' labels, where they are at hand.
    """
    truth = truth or {frame.id: frame.labels.moved(-frame.offset) for frame in frames}
    data = Pairs(truth, results, classes, MATCH_OVERLAP)
    role, partner = np.full(len(data.det), LEFT_OUT), np.full(len(data.det), -1)
    counted = np.zeros(len(data.gt), bool)
    gt, det, _ = data.pairs[0]
    for name in classes:
        own = data.det_code == data.codes.get(name.lower(), -1)
        gt_role, det_role = data.roles(name, len(DIFFICULTIES) - 1)
        objects, rows, takers = data.matches(name)
        beside = np.isin(np.arange(len(own)), det[objects[gt]])
        excused = np.isin(np.arange(len(own)), det[gt_role[gt] == 0])
        excused |= (det_role == 0) | (data.cover[:, 0] > MATCH_OVERLAP)
        role[own] = np.where(excused, LEFT_OUT, np.where(beside, DUPLICATE, FALSE))[own]
        role[takers] = MATCHED
        partner[takers] = rows
        counted |= objects
    return Judgement(
        list(frames), tuple(classes), data.gt, data.gt_frame, counted, data.det, data.det_frame, role, partner
    )


def judge_nuscenes(frames, truth, results):
    """The `Judgement` of cameras' frames, of a `formats.nuscenes.Truth` and `Boxes` of a result file.

    Each box is judged in one camera, the one in whose image its centre lies most central; a detection in that of the
    object that it takes. Others that show it draw it, too, and leave it out.
    """
    metric = importlib.import_module("metrics.nuscenes")
    role, partner = np.full(len(results), LEFT_OUT), np.full(len(results), -1)
    detected, annotated = metric.counted_rows(results, truth), metric.counted_rows(truth.boxes, truth)
    names = {*truth.boxes.name[annotated].tolist(), *results.name[detected].tolist()}
    for name in truth.dialect.ranges:
        own, real = detected[results.name[detected] == name], annotated[truth.boxes.name[annotated] == name]
        own = own[np.argsort(results.score[own], kind="stable")[::-1]]
        match = metric.match_class(truth, results, own, real)[metric.ERROR_DISTANCE]
        rank, _, distance = metric.near_pairs(truth, results, own, real)
        beside = np.isin(np.arange(len(own)), rank[distance < metric.ERROR_DISTANCE])
        role[own] = np.where(match >= 0, MATCHED, np.where(beside, DUPLICATE, FALSE))
        partner[own] = match
    counted = np.isin(np.arange(len(truth.boxes)), annotated)
    sample = {token: number for number, token in enumerate(truth.tokens)}
    frames = [frame for frame in frames if frame.group in sample]
    home, taker = _homes(frames, truth.boxes, sample), _homes(frames, results, sample)
    rows = np.flatnonzero(partner >= 0)
    taker[rows] = home[partner[rows]]
    views = _seen_by_cameras(frames, sample, (truth.boxes, counted, home), (results, role, partner, taker))
    return Judgement(frames, tuple(name for name in truth.dialect.ranges if name in names), *views)


def _homes(frames, boxes, sample):
    """(n,) number of the frame in which each box is judged; -1 for what no image shows."""
    home, best = np.full(len(boxes), -1), np.full(len(boxes), np.inf)
    for number, frame in enumerate(frames):
        rows = np.flatnonzero(boxes.sample == sample[frame.group])
        x, y, z = ((boxes.center[rows] - frame.pose[:3, 3]) @ frame.pose[:3, :3] @ frame.K.T).T
        pixels = np.stack([x, y], -1) / np.where(z > 0, z, np.nan)[:, None]
        offset = np.abs((pixels + 0.5) / frame.size - 0.5).max(1)
        nearer = (offset < 0.5) & (offset < best[rows])
        home[rows[nearer]] = number
        best[rows[nearer]] = offset[nearer]
    return home


def _seen_by_cameras(frames, sample, truth, results):
    """The columns of a `Judgement` of every camera's view of boxes, of which one alone judges."""
    (objects, counted, home), (boxes, role, partner, taker) = truth, results
    parts = []
    for number, frame in enumerate(frames):
        gt, gt_labels = _shown(objects, frame, sample[frame.group], home == number)
        det, labels = _shown(boxes, frame, sample[frame.group], taker == number)
        place = {row: at for at, row in enumerate(gt.tolist())}
        mine = taker[det] == number
        took = np.array([place.get(row, -1) for row in np.where(mine, partner[det], -1).tolist()], int)
        parts.append((gt_labels, counted[gt] & (home[gt] == number), labels, np.where(mine, role[det], LEFT_OUT), took))
    truth, counted, detections, role, partner = zip(*parts, strict=True) if parts else [()] * 5
    first = np.cumsum([0, *map(len, truth)])[:-1]
    partner = [np.where(rows >= 0, rows + start, -1) for rows, start in zip(partner, first, strict=True)]
    numbers = [np.repeat(np.arange(len(frames)), [len(labels) for labels in part]) for part in (truth, detections)]
    flat = [np.concatenate(part) if part else np.zeros(0, int) for part in (counted, role, partner)]
    return join(truth), numbers[0], flat[0].astype(bool), join(detections), numbers[1], *flat[1:]


def _shown(boxes, frame, sample, always):
    """Rows of `Boxes` that a camera shows, at least `always`, and their Labels in its frame."""
    turn, origin = frame.pose[:3, :3], frame.pose[:3, 3]
    rows = np.flatnonzero(boxes.sample == sample)
    center = (boxes.center[rows] - origin) @ turn
    forward = boxes.rotation[rows, :, 0] @ turn
    yaw = np.arctan2(-forward[:, 2], forward[:, 0])
    full_box, crosses = project_boxes(center, boxes.size[rows], yaw, frame.K)
    box = np.clip(np.nan_to_num(full_box), 0, np.tile(frame.size, 2) - 1)
    shown = (((box[:, 2:] - box[:, :2]) >= 1).all(1) & ~crosses) | always[rows]
    labels = make_labels(boxes.name[rows], box, boxes.size[rows], center, yaw, score=boxes.score[rows])
    return rows[shown], labels[shown]


# ---- numbers of all frames


def describe(title, judgement, metrics, table):
    """What the page shows of all frames of a run, whatever the score: table, curves, errors by distance, headings."""
    gt, det = judgement.matched
    truth, detections = judgement.truth[gt], judgement.detections[det]
    degrees = np.degrees(np.abs(wrap_angle(detections.yaw - truth.yaw)))
    bands, headings = {}, {}
    for number, name in enumerate(judgement.classes):
        objects = judgement.truth[judgement.counted & (judgement.truth_class == number)]
        own = judgement.truth_class[gt] == number
        bands[name] = _errors_by_band(objects, truth[own], detections[own])
        headings[name] = np.histogram(degrees[own], HEADING_BINS, (0, 180))[0].tolist()
    curves = _kitti_curves(metrics) if "curves" in metrics else {"centre within 2 m": {"": _curves(judgement)}}
    if "curves" in metrics:
        level = best_score(metrics)
    else:
        level = balanced_score(int(judgement.counted.sum()), judgement.detections.score[judgement.role != LEFT_OUT])
    level = math.floor(1e4 * level) / 1e4  # not above the score of a detection, which the page knows rounded
    numbers = {"level": level, "curves": curves, "bands": bands, "headings": headings}
    return {"title": title, "table": table, **numbers}


def _errors_by_band(objects, truth, detections):
    """Entries of `band_errors`, one for each distance of BANDS."""
    place, matched = (
        np.searchsorted(BANDS, np.maximum(part.center[:, 2], 0), "right") - 1 for part in (objects, truth)
    )
    entries = []
    for number in range(len(BANDS)):
        rows = matched == number
        entry = band_errors(int((place == number).sum()), truth[rows], detections[rows])
        keys = ("objects", "matched", "depth_error", "depth_bias", "within_1_sigma")
        entries.append({key: _short(entry[key]) for key in keys})
    return entries


def _short(value):
    return None if value is None or np.isnan(value) else round(float(value), 3)


def _kitti_curves(metrics):
    """Title -> difficulty -> class -> [scores, recalls, precisions] of the official curves."""
    titles = {"3d": "3D", "bev": "BEV", "bbox": "2D", "aos": "AOS"}
    curves = {}
    for key, title in titles.items():
        curves[title] = {}
        for difficulty in ("moderate", "easy", "hard"):
            lines = {name: metrics["curves"][name][key][difficulty] for name in metrics["settings"]["classes"]}
            lines = {name: [line["score"], line["recall"], line["precision"]] for name, line in lines.items()}
            curves[title][difficulty] = {name: np.round(part, 4).tolist() for name, part in lines.items() if part[2]}
    return curves


def _curves(judgement):
    """Class -> [scores, recalls, precisions] by the matches alone, at no more than 100 places."""
    lines = {}
    for number, name in enumerate(judgement.classes):
        rows = np.flatnonzero((judgement.role != LEFT_OUT) & (judgement.detection_class == number))
        objects = (judgement.counted & (judgement.truth_class == number)).sum()
        rows = rows[np.argsort(-judgement.detections.score[rows], kind="stable")]
        if len(rows) and objects:
            hits = np.cumsum(judgement.role[rows] == MATCHED)
            places = np.unique(np.linspace(0, len(rows) - 1, 100).astype(int))
            columns = judgement.detections.score[rows], hits / objects, hits / np.arange(1, len(rows) + 1)
            lines[name] = [np.round(column[places], 4).tolist() for column in columns]
    return lines


# ---- the frames of a file


def choose_frames(judgements, levels, count):
    """Numbers of the frames that go into a file, rising, and why: all, or of each class the worst and the best.

    A half is evenly spaced over all; of the rest two thirds are those with the most errors above the level of a run, or
    where two runs differ most in that.
    """
    first = judgements[0]
    frames, classes = len(first.frames), first.classes
    if frames <= count:
        return dict.fromkeys(range(frames), "")
    chosen = {int(number): "sample" for number in np.linspace(0, frames - 1, count // 2).astype(int)}
    pairs = zip(judgements, levels, strict=True)
    errors = [count_errors(judgement, level) for judgement, level in pairs]
    first_word, errors = ("worst", errors[0]) if len(errors) == 1 else ("different", np.ptp(errors, 0))
    objects = _per_frame(first, first.truth_frame, first.truth_class, first.counted)
    worst, best = np.argsort(-errors, 0, kind="stable"), np.argsort(errors - 1e-3 * objects, 0, kind="stable")
    many = len(chosen) + (count - len(chosen)) * 2 // 3
    for word, order, fits, enough in ((first_word, worst, errors > 0, many), ("best", best, objects > 0, count)):
        for row, column in np.ndindex(order.shape):
            number = int(order[row, column])
            if len(chosen) < enough and fits[number, column]:
                chosen.setdefault(number, f"{word} {classes[column]}")
    return dict(sorted(chosen.items()))


def count_errors(judgement, level):
    """(frames, classes) errors at a score: missed, false and duplicate, wrong in depth, turned."""
    gt, det = judgement.matched
    seen = judgement.detections.score[det] >= level
    gt, det = gt[seen], det[seen]
    depth = judgement.truth.center[gt, 2]
    wrong = np.abs(judgement.detections.center[det, 2] - depth) > WRONG_DEPTH * np.abs(depth)
    wrong |= np.abs(wrap_angle(judgement.detections.yaw[det] - judgement.truth.yaw[gt])) > np.pi / 2
    faulty = judgement.counted.copy()
    faulty[gt[~wrong]] = False
    extra = (judgement.role > MATCHED) & (judgement.detections.score >= level)
    count = _per_frame(judgement, judgement.truth_frame, judgement.truth_class, faulty)
    return count + _per_frame(judgement, judgement.detection_frame, judgement.detection_class, extra)


def _per_frame(judgement, frame, number, rows):
    """(frames, classes) how many of some rows (n,) bool, by their frame (n,) and class (n,)."""
    shape = len(judgement.frames), len(judgement.classes)
    rows = rows & (number >= 0)
    return np.bincount(frame[rows] * shape[1] + number[rows], minlength=shape[0] * shape[1]).reshape(shape)


def overlaps(judgement, numbers):
    """(D,) 3D overlap of each matched detection with its object, in the frames of these numbers; -1 for the others."""
    gt, det = judgement.matched
    wanted = np.isin(judgement.detection_frame[det], numbers)
    gt, det = gt[wanted], det[wanted]
    shares = np.full(len(judgement.detections), -1.0)
    pairs = judgement.truth[gt], judgement.detections[det]
    boxes = [np.concatenate([labels.center, labels.size, labels.yaw[:, None]], 1) for labels in pairs]
    shares[det] = box3d_iou(*boxes)
    return shares


def describe_frame(number, why, judgements, shares, names):
    """A frame as the page takes it, in its image's own camera frame, metres.

    shares: `overlaps` of each judgement; names: text -> index, which grows by names that are no classes.
    """
    frame, first = judgements[0].frames[number], judgements[0]
    start, end = np.searchsorted(first.truth_frame, [number, number + 1])
    objects = first.truth[start:end].moved(frame.offset)
    truth = []
    for box, place, counts in zip(objects, first.truth_class[start:end], first.counted[start:end], strict=True):
        region = [] if box.is_3d else np.round(box.box, 1).tolist()
        truth.append([*_row(box, int(place), names), int(counts), *region])
    detections = []
    for judgement, share in zip(judgements, shares, strict=True):
        rows = np.arange(*np.searchsorted(judgement.detection_frame, [number, number + 1]))
        rows = rows[judgement.detections.is_3d[rows]]
        labels = judgement.detections[rows].moved(frame.offset)
        columns = (judgement.detection_class, judgement.role, np.maximum(judgement.partner - start, -1), share)
        columns = [column[rows].tolist() for column in columns]
        boxes = []
        for box, place, role, partner, shared in zip(labels, *columns, strict=True):
            score = round(float(box.score), 4), _short(box.sigma)
            boxes.append([*_row(box, place, names), *score, role, partner, round(shared, 2)])
        detections.append(boxes)
    return {"id": frame.id, "why": why, "truth": truth, "detections": detections}


def _row(box, place, names):
    """name, x, y, z, l, h, w, yaw of a row of Labels of a class, or of none where place is -1."""
    name = place if place >= 0 else names.setdefault(str(box.name), len(names))
    numbers = (*box.center.tolist(), *box.size.tolist(), float(box.yaw))
    return [name, *(round(number, 3) for number in numbers)]  # a centimetre would be half a pixel at 10 m


def picture_of(frame, most):
    """What the page needs of an image of `most` bytes, at the size of `draw_frame`; without one, or K, nothing."""
    if frame.K is None:
        return {}
    try:
        picture = load_image(frame.image)
    except OSError:
        return {}
    scale = min(SHEET_WIDTH / picture.width, HEIGHT / picture.height)
    width, height = (max(round(scale * side), 1) for side in picture.size)
    shown = picture.resize((width, height), Image.Resampling.BICUBIC)
    x, y = width / picture.width, height / picture.height
    K = [frame.K[0, 0] * x, frame.K[1, 1] * y, (frame.K[0, 2] + 0.5) * x - 0.5, (frame.K[1, 2] + 0.5) * y - 0.5]
    for quality in QUALITIES:
        shown.save(file := io.BytesIO(), "JPEG", quality=quality)
        if file.tell() <= most:
            break
    return {"size": [width, height], "scale": [x, y], "K": K, "image": base64.b64encode(file.getvalue()).decode()}


# ---- the file


def write(path, judgements, runs, rule, count=None, **more):
    """Write the file of one run, or of several on the same frames; runs: what `describe` says of each."""
    first = judgements[0]
    names = {name: number for number, name in enumerate(first.classes)}
    chosen = choose_frames(judgements, [run["level"] for run in runs], count or FRAMES)
    shares = [overlaps(judgement, list(chosen)) for judgement in judgements]
    frames = [describe_frame(number, why, judgements, shares, names) for number, why in chosen.items()]
    if len(judgements) == 2:
        errors = [count_errors(one, run["level"]).sum(1) for one, run in zip(judgements, runs, strict=True)]
        for frame, number in zip(frames, chosen, strict=True):
            frame["difference"] = int(abs(errors[1][number] - errors[0][number]))
    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow leaves Python's lock alone
        most = float(np.clip(PICTURES_BYTES / max(len(chosen), 1), *PICTURE_BYTES))
        pictures = pool.map(picture_of, [first.frames[number] for number in chosen], [most] * len(chosen))
        for frame, picture in zip(frames, tqdm(pictures, "report", len(frames), disable=None), strict=True):
            frame.update(picture)
    settings = {"classes": list(first.classes), "names": list(names), "bands": list(BANDS), "rule": rule, **more}
    font = base64.b64encode(ImageFont.load_default(11).path.getvalue()).decode()  # Pillow's own (Aileron, CC0)
    settings |= {"font": font, "total": len(first.frames), "wrong_depth": WRONG_DEPTH, "runs": runs, "frames": frames}
    text = json.dumps(settings, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":  # what would end the script, whatever a class or an id is called
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    Path(path).write_text(PAGE.read_text(encoding="utf-8").replace("DATA_OF_THE_REPORT", text), encoding="utf-8")


def write_run(path, dataset, metrics, predictions, config, count=None):
    """Write the file of a run's evaluation, as `evaluate` gives it: predictions id -> Labels in the frame's source."""
    table, judgement, rule = judge_run(dataset, metrics, predictions, config)
    run = describe(Path(config.out).name, judgement, metrics, table)
    write(path, [judgement], [run], rule, count)


def refuse_unknown(dataset):
    """Raises UserError for frames whose metrics no report knows."""
    if dataset.metrics not in KNOWN:
        raise UserError(f"a report knows the metrics of {' and '.join(KNOWN)}, and the frames are {dataset.metrics}'s")


def judge_run(dataset, metrics, predictions, config):
    """(table, `Judgement`, rule) of a run's predictions by its data set's metric. Raises UserError for another one."""
    table = importlib.import_module(f"metrics.{dataset.metrics}").table(metrics)
    if dataset.metrics == "kitti":
        return table, judge_kitti(dataset.frames, predictions, dataset.classes), KITTI_RULE
    refuse_unknown(dataset)
    metric = importlib.import_module("metrics.nuscenes")
    truth = metric._truth_of(dataset, config)
    merged = metric.merge_cameras(dataset.frames, predictions, truth.dialect)
    truth = truth.of(merged.keys())
    boxes = metric.parse_results(merged, truth.tokens, truth.dialect)
    return table, judge_nuscenes(list(dataset.frames), truth, boxes), NUSCENES_RULE


def write_kitti_files(path, truth, results, metrics, images=None, count=None):
    """Write the file of any detector's KITTI files: truth and results id -> Labels, in rectified camera 0.

    images: the folder image_2, beside which calib lies; without it frames are seen from above. Raises UserError.
    """
    frames = [Frame(id, "", None, labels) for id, labels in truth.items()]
    if images is not None:
        frames = [_with_picture(frame, Path(images)) for frame in frames]
    classes = metrics["settings"]["classes"]
    judgement = judge_kitti(frames, results, classes, truth)
    table = importlib.import_module("metrics.kitti").table(metrics)
    run = describe(Path(path).stem, judgement, metrics, table)
    write(path, [judgement], [run], KITTI_RULE, count)


def _with_picture(frame, folder):
    """A KITTI frame with its image and camera. Raises UserError naming the file that is missing."""
    files = [folder / f"{frame.id}{ending}" for ending in IMAGE_SUFFIXES]
    image = next((file for file in files if file.is_file()), None)
    if image is None:
        raise UserError(f"--images {folder}: no image of frame {frame.id}, expected {files[0].name} or {files[1].name}")
    calib = folder.parent / "calib" / f"{frame.id}.txt"
    if not calib.is_file():
        raise UserError(f"{calib}: no such file; boxes are drawn by the cameras in calib beside --images {folder}")
    K, offset = split_projection(read_calib(calib))
    return dataclasses.replace(frame, image=image, K=K, offset=offset, labels=frame.labels.moved(offset))


def write_nuscenes_files(path, place, truth, results, table, count=None):
    """Write the file of a nuScenes result file, with the pictures of its cameras that are there.

    place: root, splits and version of the tables.
    """
    frames = importlib.import_module("formats.nuscenes").read_frames(*place, images=False, dialect=truth.dialect)
    judgement = judge_nuscenes(frames, truth, results)
    run = describe(Path(path).stem, judgement, {}, table)
    write(path, [judgement], [run], NUSCENES_RULE, count)
