"""The most likely mistake in a source of labels, told from how its 3D boxes project onto the 2D boxes that were given with them.

Each usual mistake (an order of the sizes, a bottom centre, another angle, a K of another resolution) is undone on the clear objects:
unoccluded, untruncated, away from the image's border. One that makes the projections fit much better than the labels as they are is
named. 2D boxes that are projections themselves always fit; then typical sizes, the ground below the camera and the principal point remain.
"""

import contextlib
import dataclasses
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scene.frames import Frame, Labels, image_size, join
from scene.geometry import box_iou, clip_boxes, project_boxes, ray_angle

LEAST = 8  # objects that a judgement needs; of a class with fewer, those of all such classes together
MOST = 500  # objects of a class that hypotheses are tried on, evenly taken
FITS, MISSES = 0.7, 0.3  # IoU: of a source in the median; of every object of a frame, below which its K is doubted
GAIN, LARGE_GAIN = 0.05, 0.2  # by how much a hypothesis must raise the median IoU, to NEAR_PERFECT and to less
NEAR_PERFECT, IMPROVED = 0.9, 0.85  # IoU; share of the objects whose IoU it must raise
CROPPED = 1.25  # factor from the middle of an image within which a principal point is taken for that of the image
BORDER = 10  # px by which 2D boxes may leave their image unnoticed
EXACT = 0.01  # px: as near as a derived 2D box is to the projected 3D box; labels in files are rounded more
SHOWN = 10  # frames named in a sentence
CENTRES = ("geometric centre", "bottom centre")
YAWS = {  # mistake: the yaw that is meant; a turn by 180 degrees changes no projection, so the front is never judged
    "": lambda yaw, center: yaw,
    "yaw looks 90 degrees off": lambda yaw, center: yaw + np.pi / 2,
    "yaw looks like its negative, a turn about -y": lambda yaw, center: -yaw,
    "yaw looks like a turn about another axis (it fits as 90 degrees minus it)": lambda yaw, center: np.pi / 2 - yaw,
    "yaw looks like alpha, the angle to the viewing ray": lambda yaw, center: yaw + ray_angle(center),
}
TYPICAL = {  # l, h, w in metres of classes by their usual names, lower case
    "car": (4.2, 1.55, 1.75), "van": (5.0, 2.1, 1.9), "truck": (8.0, 3.2, 2.5), "bus": (11.0, 3.4, 2.8), "tram": (16.0, 3.5, 2.5),
    "pedestrian": (0.8, 1.75, 0.65), "person": (0.8, 1.75, 0.65), "cyclist": (1.8, 1.7, 0.65), "bicycle": (1.7, 1.3, 0.6),
    "motorcycle": (2.1, 1.5, 0.8),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a format writes what `Labels` hold: the order of its sizes, and whether its centres are those of the bottom face."""

    order: str = "lhw"
    bottom: bool = False


JSONL, KITTI = Reading(), Reading("hwl", True)


@dataclasses.dataclass(frozen=True)
class Objects:
    """n labelled objects over all frames of a source: K (n, 3, 3), number of the frame (n,), image (width, height) (n, 2), NaN unknown."""

    labels: Labels
    K: np.ndarray
    frame: np.ndarray
    size: np.ndarray

    def __getitem__(self, rows):
        return Objects(self.labels[rows], self.K[rows], self.frame[rows], self.size[rows])

    def __len__(self):
        return len(self.frame)

    def project(self, center=None, size=None, yaw=None, K=None):
        """The extents (n, 4) of the projected 3D boxes, with other values than the labels' where given."""
        own = self.labels
        values = [a if b is None else b for a, b in ((own.center, center), (own.size, size), (own.yaw, yaw))]
        return project_boxes(*values, self.K if K is None else K)[0]

    def fit(self, boxes):
        """IoU (n,) of boxes with the given 2D boxes, 0 for those behind the camera."""
        return np.nan_to_num(box_iou(boxes, self.labels.box))


def gather(frames: Sequence[Frame], sizes: np.ndarray) -> Objects:
    """All rows with a 3D box; sizes (frames, 2): (width, height) of the images, px, NaN unknown."""
    count = [len(frame.labels) for frame in frames]
    K = np.stack([frame.K for frame in frames]) if count else np.zeros((0, 3, 3))
    number = np.repeat(np.arange(len(count)), np.array(count, int))
    labels = join([frame.labels for frame in frames])
    return Objects(labels, K[number], number, np.asarray(sizes, float).reshape(-1, 2)[number])[labels.is_3d]


def image_sizes(frames: Sequence[Frame]) -> np.ndarray:
    """(width, height) of the upright images of frames, from their headers, (frames, 2) px; NaN for those that cannot be read."""
    sizes = np.full((len(frames), 2), np.nan)
    for number, frame in enumerate(frames):
        with contextlib.suppress(OSError):
            sizes[number] = image_size(frame.image)
    return sizes


def diagnose(
    frames: Sequence[Frame], sizes: np.ndarray, reading: Reading = JSONL, source: Path | None = None
) -> tuple[list, list]:
    """What is most likely wrong with a source's labels: (sentences for mistakes, notes on what was compared).

    sizes: those of `image_sizes`. source: the JSON-lines file itself, whose 2D boxes the reader has clipped.
    """
    objects = gather(frames, sizes)
    clear = _clear(objects)
    derived, notes = _derived_classes(objects[clear]), []
    checked = objects[clear & ~np.isin(objects.labels.name.astype(str), derived)]
    problems = _doubt_boxes(frames, sizes, source) + _doubt_behind(objects, frames)
    found = _explain(checked, reading)
    problems += found or _doubt_frames(checked, frames) + _doubt_principal_point(objects)
    if derived:
        named = ", ".join(derived)
        notes.append(
            f"{named}: the 2D boxes are the projected 3D boxes, so they confirm neither K nor sizes nor angles; typical sizes, the ground "
            "below the camera and the principal point were looked at instead"
        )
    if len(checked):
        overlap = np.median(checked.fit(checked.project()))
        notes.append(
            f"projected and given 2D boxes overlap by {_short(overlap)} in the median of {len(checked)} clear objects"
        )
    weak = objects[np.isin(objects.labels.name.astype(str), derived)]
    problems += _doubt_sizes(objects if not found else weak, reading) + _doubt_ground(weak, reading)
    return problems, notes


def doubt_angles(sentences: Sequence[str]) -> list[str]:
    """A sentence where what a reader said of lines that it left out shows that their angles are degrees."""
    found = [re.search(r"(?:yaw|rotation_y) is (-?[0-9.e+]+), expected", sentence) for sentence in sentences]
    angles = np.array([float(match[1]) for match in found if match])
    if len(set(angles)) < 2 or np.abs(angles).max() > 360.5:
        return []
    return [
        f"yaw looks like degrees where radians are expected: {len(angles)} lie beyond 2 pi, from {angles.min():g} to {angles.max():g}"
    ]


def _clear(objects):
    """(n,) bool: given a 2D box, not known to be occluded or truncated, and not at the border of an image whose size is known."""
    own, (width, height) = objects.labels, objects.size.T
    whole = (own.box[:, :2] > 1).all(1) & ~(own.box[:, 2] >= width - 2) & ~(own.box[:, 3] >= height - 2)
    return (own.box[:, 2:] > own.box[:, :2]).all(1) & (own.truncation <= 0) & (own.occlusion <= 0) & whole


def _derived_classes(objects):
    """Classes of which nearly every 2D box is the projected 3D box."""
    same = np.abs(objects.project() - objects.labels.box).max(1, initial=0) < EXACT
    names = objects.labels.name.astype(str)
    return [name for name in sorted(set(names)) if same[names == name].mean() >= 0.95]


# ---- what the given 2D boxes say


def _explain(objects, reading):
    """Sentences for the mistakes of a whole source, by class, or for its K; [] where its projections fit or nothing explains them."""
    if len(objects) < LEAST:
        return []
    now = objects.fit(objects.project())
    camera, fitted = _fit_camera(objects)
    mistakes, by_labels, by_camera = (
        defaultdict(list),
        [],
        [],
    )  # IoU of the objects tried, each class with its mistake undone; with K
    for name, rows in _groups(objects).items():
        tried = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST)).astype(int)]
        mistake, after, moved = _best_hypothesis(objects[tried], reading)
        if mistake:
            mistakes[mistake].append((name, now[tried][moved], after[moved]))
        by_labels.append(after)
        by_camera.append(fitted[tried])
    if camera and np.concatenate(by_camera).mean() > np.concatenate(by_labels).mean() + 0.03:
        return [f"{camera}: {_compare(now, fitted)}"]
    if mistakes:
        return [_tell_mistake(mistake, *zip(*found, strict=True)) for mistake, found in mistakes.items()]
    if np.median(now) < FITS:
        return [f"the projected 3D boxes miss the given 2D boxes, by no mistake that is known here: median IoU {_short(np.median(now))} of "
                f"{len(now)}; are K, the unit and the boxes those of these images?"]  # fmt: skip
    return []


def _tell_mistake(mistake, names, before, after):
    """A sentence for a mistake that several classes share, with the IoU of their objects before and after it is undone."""
    return f"{', '.join(names)}: {mistake}: {_compare(np.concatenate(before), np.concatenate(after))}"


def _groups(objects):
    """Class -> its rows, in order of their number; classes with too few objects together under all their names."""
    names = objects.labels.name.astype(str)
    groups = {
        name: np.flatnonzero(names == name)
        for name in sorted(set(names), key=lambda name: (-(names == name).sum(), name))
    }
    few = [name for name, rows in groups.items() if len(rows) < LEAST]
    together = np.concatenate([groups.pop(name) for name in few]) if few else np.zeros(0, int)
    return groups | ({", ".join(few): together} if len(together) >= LEAST else {})


def _best_hypothesis(objects, reading):
    """(mistake, IoU with it undone, which objects it changes) of the simplest one that explains objects best; '' where none does."""
    base, best = objects.project(), []
    now = objects.fit(base)
    for mistake, changes, size, center, yaw in _hypotheses(objects.labels, reading):
        boxes = objects.project(center, size, yaw)
        after, moved = objects.fit(boxes), np.nan_to_num(box_iou(base, boxes)) < 0.9
        if moved.sum() >= LEAST and _explains(now[moved], after[moved]):
            longer = (
                np.median(size[:, 0] / size[:, 2]) > 0.95
            )  # of two that project alike, the one whose boxes are longer than wide
            best.append((round(after.mean(), 2) - 0.02 * changes + 0.001 * longer, mistake, after, moved))
    return max(best, key=lambda row: row[0])[1:] if best else ("", now, np.zeros(len(now), bool))


def _explains(before, after):
    """Whether objects of that IoU (n,) fit so much better after a mistake is undone that it was made.

    A little better must be near perfect: pedestrians move their limbs, and their boxes of .75 fit some wrong yaws by chance.
    """
    worse, better = np.median(before), np.median(after)
    enough = better - worse >= (GAIN if better >= NEAR_PERFECT else LARGE_GAIN) and better >= FITS
    return enough and (after > before).mean() >= IMPROVED


def _hypotheses(labels, reading):
    """Every combination of usual mistakes: (in words, how many, size, center, yaw as they would be meant)."""
    order = list(reading.order)
    written = labels.size[:, ["lhw".index(letter) for letter in order]]  # as in the file
    height = labels.center[:, 1] + (labels.size[:, 1] / 2 if reading.bottom else 0)
    for other, bottom, (turned, meant) in itertools.product(itertools.permutations(order), (False, True), YAWS.items()):
        size = written[:, [other.index(letter) for letter in "lhw"]]
        center = np.stack([labels.center[:, 0], height - (size[:, 1] / 2 if bottom else 0), labels.center[:, 2]], 1)
        words = [
            f"size looks like ({', '.join(other)}) where ({', '.join(order)}) is expected" * (list(other) != order),
            f"center looks like the {CENTRES[bottom]} where the {CENTRES[reading.bottom]} is expected"
            * (bottom != reading.bottom),
            turned,
        ]
        said = [word for word in words if word]
        if said:
            yield " and ".join(said), len(said), size, center, meant(labels.yaw, center)


def _fit_camera(objects):
    """(what K looks like, IoU with the K that fits best), ('', IoU as it is) where that is no other or fits no better.

    Edges of boxes are a line in those of the projections, u = a fx x / z + b cx, whatever the cameras: fitted by least absolute deviation.
    """
    boxes, K = objects.project(), objects.K.copy()
    now, factor = objects.fit(boxes), {}
    good = np.isfinite(boxes).all(1)
    if good.sum() < LEAST:
        return "", now
    for axis, name in enumerate("xy"):
        centre = np.repeat(K[good, axis, 2], 2)
        edges = boxes[good][:, axis::2].ravel() - centre
        slope = _least_deviation(np.stack([edges, centre], 1), objects.labels.box[good][:, axis::2].ravel())
        factor["f" + name], factor["c" + name] = slope
        K[:, axis, axis], K[:, axis, 2] = slope[0] * K[:, axis, axis], slope[1] * K[:, axis, 2]
    fitted = objects.fit(objects.project(K=K)) if min(factor.values()) > 0.05 else now
    return (_name_camera(factor, objects), fitted) if _explains(now, fitted) else ("", now)


def _name_camera(factor, objects):
    """What is wrong with K, or with the boxes, in words; factor: of each entry of K, to that which fits."""
    scale = float(np.median(list(factor.values())))
    if max(abs(value / scale - 1) for value in factor.values()) < 0.05:
        off = np.abs(np.log(_off_centre(objects))).mean()
        if off < abs(np.log(scale)) / 2 and abs(np.log(scale)) > np.log(CROPPED):
            return f"2D boxes look like pixels of an image {scale:.2f} times as large as that of K"
        return f"K looks like that of an image {1 / scale:.2f} times as large as that of the 2D boxes"
    wrong = [f"{name} {1 / value:.2f} times" for name, value in factor.items() if abs(value - 1) > 0.05]
    return f"K looks wrong ({', '.join(wrong)} that of the 2D boxes)"


def _least_deviation(A, b):
    """The x (k,) with the least sum of |A x - b|, A (n, k), by reweighted least squares; errors below a pixel weigh alike."""
    weight = np.ones(len(b))
    for _ in range(50):
        x = np.linalg.lstsq(A * weight[:, None], b * weight, rcond=None)[0]
        weight = 1 / np.sqrt(np.maximum(np.abs(A @ x - b), 1.0))
    return x


def _doubt_behind(objects, frames):
    """A sentence for labels with a 2D box of which no part lies before the camera."""
    own = objects.labels
    behind = np.flatnonzero(own.center[:, 2] + own.size[:, [0, 2]].sum(1) / 2 < 0)
    if not len(behind):
        return []
    name, z, id = own.name[behind[0]], own.center[behind[0], 2], frames[objects.frame[behind[0]]].id
    return [
        f"objects behind the camera, which cannot be in the image: {len(behind)}, the first a {name} at z = {z:g} m in frame {id}"
    ]


def _doubt_frames(objects, frames):
    """A sentence naming the frames whose every 3D box misses its 2D box, where those of the others fit."""
    objects = objects[objects.labels.center[:, 2] > 0]
    now, best = objects.fit(objects.project()), np.full(len(frames), -1.0)
    np.maximum.at(best, objects.frame, now)
    bad, seen = np.flatnonzero((best >= 0) & (best < MISSES)), (best >= 0).sum()
    if not len(bad) or len(bad) > seen / 2:
        return []
    named = ", ".join(_name_frame(objects[objects.frame == number], frames[number].id) for number in bad[:SHOWN])
    rest = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return [f"K looks wrong in {len(bad)} of {seen} frames, whose 3D boxes miss their 2D boxes while the others fit by "
            f"{_short(np.median(now))} in the median: {named}{rest}"]  # fmt: skip


def _name_frame(objects, id):
    """The id of a frame and by which factor its K is wrong, where one factor makes its boxes fit."""
    boxes = objects.project()
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = float(np.nanmedian(objects.labels.box / boxes))
    scaled = objects.K * np.array([scale, scale, 1])[:, None]
    fitting = scale > 0 and np.median(objects.fit(objects.project(K=scaled))) >= FITS
    wrong = f"{1 / scale:.2f} times too large" if scale < 1 else f"{scale:.2f} times too small"
    return f"{id} ({wrong})" if fitting else id


# ---- what else there is to see


def _doubt_boxes(frames, sizes, source):
    """A sentence for 2D boxes of which less than half lies in their image: the rest is clipped away in silence."""
    given = _written_boxes(source) if source else {}
    area = lambda boxes: np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), 1)  # noqa: E731
    found = []
    for frame, size in zip(frames, sizes, strict=True):
        boxes = given.get(frame.image, frame.labels.box)
        if np.isfinite(size).all():
            clipped = clip_boxes(boxes, *size)
            outside = (area(clipped) < area(boxes) / 2) & (np.abs(clipped - boxes).max(1, initial=0) > BORDER)
            outside &= (area(clipped) > 0) | (
                source is None
            )  # the reader of JSON lines drops and counts what is wholly outside
            found += [(frame.id, box, size) for box in boxes[outside]]
    if not found:
        return []
    id, box, (width, height) = found[0]
    return [f"2D boxes: {len(found)} lie mostly outside their image and are clipped to it: in frame {id} "
            f"{', '.join(f'{value:g}' for value in box)} of {width:g}x{height:g}"]  # fmt: skip


def _written_boxes(path):
    """Path of an image -> the 2D boxes (n, 4) of its objects as a JSON-lines file holds them, of the lines that can be read."""
    boxes = {}
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(
                ValueError, KeyError, TypeError, OverflowError, RecursionError
            ):  # told by the reader
                entry = json.loads(line)
                given = [thing["box"] for thing in entry["objects"] if "box" in thing]
                boxes[path.parent / entry["image"]] = np.array(given, float).reshape(-1, 4)
    return boxes


def _off_centre(objects):
    """How far the principal point is from the middle of the image, as factors (2,) in x and y: 1 in the middle; NaN where unknown."""
    known = objects[np.isfinite(objects.size).all(1) & (objects.K[:, :2, 2] > 0).all(1)]
    return np.median(known.K[:, :2, 2] / ((known.size - 1) / 2), 0) if len(known) else np.full(2, np.nan)


def _doubt_principal_point(objects):
    """A sentence where K's principal point is that of a much larger or smaller image."""
    factor = np.log(_off_centre(objects))
    if not (abs(factor).min() > np.log(CROPPED) and abs(factor[0] - factor[1]) < np.log(CROPPED)):
        return []
    size = np.exp(factor.mean())
    return [
        f"K looks like that of an image about {size:.1f} times as large as the files: its principal point is not near their middle"
    ]


def _doubt_sizes(objects, reading):
    """Sentences for classes with usual names whose sizes are unusual: in another order, or another unit."""
    sentences = []
    names = objects.labels.name.astype(str)
    for name in sorted(set(names)):
        if name.lower() not in TYPICAL or (names == name).sum() < LEAST:
            continue
        ratio = np.log(np.median(objects.labels.size[names == name], 0))
        typical = np.log(TYPICAL[name.lower()])
        written = {letter: ratio["lhw".index(letter)] for letter in "lhw"}
        off = {}
        for other in itertools.permutations(reading.order):
            meant = dict(zip(other, (written[letter] for letter in reading.order), strict=True))
            off["".join(other)] = np.abs([meant[letter] - typical["lhw".index(letter)] for letter in "lhw"]).max()
        best, factor = min(off, key=off.get), np.exp(np.mean(ratio - typical))
        values = ", ".join(f"{written_:.1f}" for written_ in np.exp([written[letter] for letter in reading.order]))
        if off[best] < 0.4 and off[best] < off[reading.order] - 0.4:
            orders = f"({', '.join(best)}) where ({', '.join(reading.order)}) is expected"
            sentences.append(f"{name}: size looks like {orders}: {values} m in the median")
        elif off[reading.order] > np.log(2) and np.abs(ratio - typical - np.log(factor)).max() < 0.3:
            sentences.append(
                f"{name}: size looks {factor:.2f} times too large: {values} m in the median; are sizes and centres in metres?"
            )
    return sentences


def _doubt_ground(objects, reading):
    """A sentence where boxes of usual classes stand on one ground, below the camera, only if their centres are meant otherwise.

    The bottom of a box whose given centre is its bottom centre is taken for too low by half its height, so the bottoms of a frame fall
    by half a metre for every metre of height; by a whole one where y points up. On KITTI's labels they rise by .07 +- .07 m (60 frames
    at a time).
    """
    usual = np.isin([name.lower() for name in objects.labels.name.astype(str)], list(TYPICAL))
    near = objects[usual & (objects.labels.center[:, 2] < 40)]
    near = near[np.bincount(near.frame)[near.frame] > 1] if len(near) else near
    height = near.labels.size[:, 1]
    bottom = near.labels.center[:, 1] + height / 2
    if len(near) < 5 * LEAST or (above := _from_mean(height, near.frame)).std() < 0.15:
        return []
    slope = float(above @ _from_mean(bottom, near.frame) / (above @ above))
    if np.median(bottom) < 0 or (slope > 0.75 and not reading.bottom):
        return ["center looks like its y points up: only so do boxes stand on one ground below the camera"]
    other = -0.5 if reading.bottom else 0.5
    if abs(slope - other) > abs(slope) - 0.05:
        return []
    meant, expected = CENTRES[not reading.bottom], CENTRES[reading.bottom]
    return [
        f"center looks like the {meant} where the {expected} is expected: only so do boxes of all heights stand on one ground"
    ]


def _from_mean(values, frame):
    """Values (n,) less their mean over each frame."""
    return values - (np.bincount(frame, values) / np.maximum(np.bincount(frame), 1))[frame]


def _compare(before, after):
    """The evidence of a hypothesis: IoU of the objects that it changes, as they are and with it."""
    better, worse = _short(np.median(after)), _short(np.median(before))
    return f"median IoU {better} of projected and given 2D boxes instead of {worse}, over the {len(after)} clear objects that tell"


def _short(value):
    """.93: a share with two digits."""
    return f"{value:.2f}".removeprefix("0")
