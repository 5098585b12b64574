"""The most likely mistake in labels, told from how their 3D boxes project onto the 2D boxes that were given with them.

Each usual mistake (an order of the sizes, a bottom centre, another angle, a K of another resolution) is undone on the
clear objects: unoccluded, untruncated, away from the image's border. One that makes the projections fit much better is
named. 2D boxes that are projections always fit; then typical sizes, the ground and the principal point remain.
"""

import dataclasses
import itertools
import re
from collections import Counter

import numpy as np

from metrics.kitti_notes import repeated
from scene.frames import Labels, join
from scene.geometry import NEAR, box_corners, box_iou, project, project_boxes, ray_angle, wrap_angle

LEAST, MOST = 8, 5000  # objects of a class that a judgement needs; of a source that it is made of, evenly taken
FITS = 0.7  # IoU of a source in the median
GAIN, LARGE_GAIN = 0.05, 0.2  # by how much a hypothesis must raise the median IoU, to NEAR_PERFECT and to less
NEAR_PERFECT, IMPROVED = 0.9, 0.85  # IoU; share of the objects whose IoU it must raise
CROPPED = 1.25  # factor from the middle of an image within which a principal point is taken for that of the image
EXACT = 0.01  # px: as near as a derived 2D box is to the projected 3D box; labels in files are rounded more
ANGLES = np.arange(-30, 31)  # degrees by which a camera is tried to be tilted
TILT, TILT_GAIN = 4, 0.6  # degrees that are told, where boxes tilted so miss the 2D boxes by less than this share
TILTS = {0: ("pitched", ("up", "down")), 2: ("rolled", ("to its left", "to its right"))}  # about x, about z
CENTRES = ("geometric centre", "bottom centre")
TYPICAL = {  # l, h, w in metres of classes by their usual names, lower case
    "car": (4.2, 1.55, 1.75), "van": (5.0, 2.1, 1.9), "truck": (8.0, 3.2, 2.5), "bus": (11.0, 3.4, 2.8),
    "pedestrian": (0.8, 1.75, 0.65), "person": (0.8, 1.75, 0.65), "cyclist": (1.8, 1.7, 0.65),
    "bicycle": (1.7, 1.3, 0.6), "motorcycle": (2.1, 1.5, 0.8), "tram": (16.0, 3.5, 2.5),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Boxes:
    """n 3D boxes of a source, each with what belongs to its frame."""

    labels: Labels
    K: np.ndarray  # (n, 3, 3) px
    frame: np.ndarray  # (n,) number of the frame
    image: np.ndarray  # (n, 2) width and height, px, NaN unknown

    def __getitem__(self, rows):
        return Boxes(self.labels[rows], self.K[rows], self.frame[rows], self.image[rows])

    def __len__(self):
        return len(self.frame)


def collect(frames, sizes):
    """`Boxes` of all rows with a 3D box; sizes (frames, 2): width and height of the images."""
    K = np.array([frame.K for frame in frames]).reshape(-1, 3, 3)
    number = np.repeat(np.arange(len(frames)), np.array([len(frame.labels) for frame in frames], int))
    labels = join([frame.labels for frame in frames])
    labels = dataclasses.replace(labels, name=labels.name.astype(str))
    return Boxes(labels, K[number], number, np.asarray(sizes, float).reshape(-1, 2)[number])[labels.is_3d]


def extents(labels, K):
    """The 2D boxes (n, 4) of the projected 3D boxes, px, NaN behind the camera."""
    return project_boxes(labels.center, labels.size, labels.yaw, K)[0]


def fit(boxes):
    """IoU (n,) of the projected with the given 2D boxes, 0 for what is behind the camera."""
    return np.nan_to_num(box_iou(extents(boxes.labels, boxes.K), boxes.labels.box))


def diagnose(frames, sizes, kitti=False):
    """What is most likely wrong with a source's labels: (sentences for mistakes, notes on what was compared).

    sizes (frames, 2): (width, height) of the upright images, px, NaN for those that cannot be read. kitti: sentences
    speak of sizes as h, w, l and of bottom centres, as in KITTI's files, instead of l, h, w and centres.
    """
    boxes = collect(frames, sizes)
    rows = np.flatnonzero(is_clear(boxes))
    clear = boxes[rows[:: len(rows) // MOST + 1]]
    same = np.abs(extents(clear.labels, clear.K) - clear.labels.box).max(1, initial=0) < EXACT
    classes = sorted({*clear.labels.name})
    derived = [name for name in classes if same[clear.labels.name == name].mean() >= 0.95]
    checked, weak = clear[~np.isin(clear.labels.name, derived)], boxes[np.isin(boxes.labels.name, derived)]
    explained, notes = explain(checked, kitti), []
    if derived:
        notes.append(
            f"{', '.join(derived)}: the 2D boxes are the projected 3D boxes, so they confirm neither K nor sizes nor "
            "angles; typical sizes, the ground below the camera and the principal point were looked at instead"
        )
    if len(checked):
        median = np.median(fit(checked))
        notes.append(
            f"projected and given 2D boxes overlap by {median:.2f} in the median of {len(checked)} clear objects"
        )
    problems = doubt_behind(boxes, frames)
    problems += explained or doubt_principal_point(boxes) + doubt_tilt(checked, boxes)
    problems += doubt_sizes(weak if explained else boxes, "hwl" if kitti else "lhw") + doubt_ground(weak, kitti)
    return problems, notes


def doubt_angles(sentences):
    """A sentence where what a reader said of lines that it left out shows that their angles are degrees."""
    matches = [re.search(r"(?:yaw|rotation_y) is (-?[0-9.e+]+), expected", sentence) for sentence in sentences]
    angles = np.array([float(match[1]) for match in matches if match])
    if len({*angles}) < 2 or np.abs(angles).max() > 360.5:
        return []
    spread = f"{len(angles)} lie beyond 2 pi, from {angles.min():g} to {angles.max():g}"
    return [f"yaw looks like degrees where radians are expected: {spread}"]


def is_clear(boxes):
    """(n,) bool: given a 2D box, not known to be occluded or truncated, and not at the border of its image."""
    labels, (width, height) = boxes.labels, boxes.image.T
    whole = (labels.box[:, :2] > 1).all(1) & ~(labels.box[:, 2] >= width - 2) & ~(labels.box[:, 3] >= height - 2)
    return (labels.box[:, 2:] > labels.box[:, :2]).all(1) & (labels.truncation <= 0) & (labels.occlusion <= 0) & whole


def explain(boxes, kitti):
    """Sentences for the mistakes of a whole source, by class, or for its K; [] where all fits or there are too few."""
    names = [name for name, count in Counter(boxes.labels.name.tolist()).most_common() if count >= LEAST]
    if not names:
        return []
    now, (camera, with_camera) = fit(boxes), fit_camera(boxes)
    undone, mistakes = now.copy(), {}
    for name in names:
        rows = np.flatnonzero(boxes.labels.name == name)
        mistake, undone[rows], changed = best_hypothesis(boxes[rows], kitti)
        if mistake:
            mistakes.setdefault(mistake, []).append((name, rows[changed]))
    if camera and with_camera.mean() > undone.mean() + 0.03:
        return [f"{camera}: {compare(now, with_camera)}"]
    sentences = []
    for mistake, classes in mistakes.items():
        wrong, rows = zip(*classes, strict=True)
        rows = np.concatenate(rows)
        sentences.append(f"{', '.join(wrong)}: {mistake}: {compare(now[rows], undone[rows])}")
    if not sentences and np.median(now) < FITS:
        sentences.append(
            "the projected 3D boxes miss the given 2D boxes, by no mistake that is known here: median IoU "
            f"{np.median(now):.2f} of {len(now)}; are K, the unit and the boxes those of these images?"
        )
    return sentences


def best_hypothesis(boxes, kitti):
    """(mistake, IoU with it undone, which boxes it changes) of the simplest one that explains boxes; '' for none."""
    projected, now = extents(boxes.labels, boxes.K), fit(boxes)
    best, result = -np.inf, ("", now, np.zeros(len(now), bool))
    for words, labels in hypotheses(boxes.labels, kitti):
        meant = extents(labels, boxes.K)
        after, changed = np.nan_to_num(box_iou(meant, labels.box)), np.nan_to_num(box_iou(meant, projected)) < 0.9
        longer = np.median(labels.size[:, 0] / labels.size[:, 2]) > 0.95  # of two that project alike, the likelier
        score = round(after.mean(), 2) - 0.02 * len(words) + 0.001 * longer
        if score > best and changed.sum() >= LEAST and explains(now[changed], after[changed]):
            best, result = score, (" and ".join(words), after, changed)
    return result


def explains(before, after):
    """Whether objects of that IoU (n,) fit so much better after a mistake is undone that it was made.

    A little better must be near perfect: pedestrians move their limbs, and their boxes of .75 fit some wrong yaws.
    """
    worse, better = np.median(before), np.median(after)
    enough = better - worse >= (GAIN if better >= NEAR_PERFECT else LARGE_GAIN) and better >= FITS
    return enough and (after > before).mean() >= IMPROVED


def hypotheses(labels, kitti):
    """Every combination of usual mistakes: (in words, a list; labels as they would be meant)."""
    order = "hwl" if kitti else "lhw"
    given = labels.center[:, 1] + (labels.size[:, 1] / 2 if kitti else 0)  # y as in the file
    for other, bottom in itertools.product(itertools.permutations(order), (False, True)):
        size, center, words = reread(labels.size, order, other), labels.center.copy(), []
        center[:, 1] = given - (size[:, 1] / 2 if bottom else 0)
        if "".join(other) != order:
            words.append(f"size looks like ({', '.join(other)}) where ({', '.join(order)}) is expected")
        if bottom != kitti:
            words.append(f"center looks like the {CENTRES[bottom]} where the {CENTRES[kitti]} is expected")
        yaws = {  # mistake: the yaw that is meant; a turn by 180 degrees changes no projection: fronts are not judged
            "": labels.yaw,
            "yaw looks 90 degrees off": labels.yaw + np.pi / 2,
            "yaw looks like its negative, a turn about -y": -labels.yaw,
            "yaw looks like a turn about another axis (it fits as 90 degrees minus it)": np.pi / 2 - labels.yaw,
            "yaw looks like alpha, the angle to the viewing ray": labels.yaw + ray_angle(center),
        }
        for turned, yaw in yaws.items():
            mistakes = [*words, turned] if turned else words
            if mistakes:
                yield mistakes, dataclasses.replace(labels, size=size, center=center, yaw=yaw)


def reread(size, order, other):
    """Sizes (..., 3) l, h, w that were read as `order`, as if the columns of their file were in the order `other`."""
    return size[..., ["lhw".index(order[other.index(letter)]) for letter in "lhw"]]


def fit_camera(boxes):
    """(what K looks like, IoU with the K that fits best); ('', IoU as it is) where that is no other or no better.

    Edges of boxes are a line in those of the projections, u = a fx x / z + b cx, whatever the cameras: fitted by least
    absolute deviation.
    """
    projected, now, K = extents(boxes.labels, boxes.K), fit(boxes), boxes.K.copy()
    factor, good = {}, np.isfinite(projected).all(1)
    if good.sum() < LEAST:
        return "", now
    for axis, name in enumerate("xy"):
        centre = np.repeat(K[good, axis, 2], 2)
        edges = projected[good][:, axis::2].ravel() - centre
        slope = least_deviation(np.stack([edges, centre], 1), boxes.labels.box[good][:, axis::2].ravel())
        factor |= {"f" + name: slope[0], "c" + name: slope[1]}
        K[:, axis, axis] *= slope[0]
        K[:, axis, 2] *= slope[1]
    after = fit(dataclasses.replace(boxes, K=K))
    if min(factor.values()) < 0.05 or not explains(now, after):
        return "", now
    scale = float(np.median(list(factor.values())))
    if max(abs(value / scale - 1) for value in factor.values()) < 0.05:
        return f"K looks like that of an image {1 / scale:.2f} times as large as that of the 2D boxes", after
    wrong = [f"{name} {1 / value:.2f} times" for name, value in factor.items() if abs(value - 1) > 0.05]
    return f"K looks wrong ({', '.join(wrong)} that of the 2D boxes)", after


def least_deviation(A, b):
    """The x (k,) with the least sum of |A x - b|, A (n, k), by reweighted least squares; below 1 px all weigh alike."""
    weight = np.ones(len(b))
    for _ in range(50):
        x = np.linalg.lstsq(A * weight[:, None], b * weight, rcond=None)[0]
        weight = 1 / np.sqrt(np.maximum(np.abs(A @ x - b), 1.0))
    return x


def doubt_behind(boxes, frames):
    """A sentence for labels with a 2D box of which no part lies before the camera."""
    labels = boxes.labels
    behind = np.flatnonzero(labels.center[:, 2] + labels.size[:, [0, 2]].sum(1) / 2 < 0)
    if not len(behind):
        return []
    name, z, id = labels.name[behind[0]], labels.center[behind[0], 2], frames[boxes.frame[behind[0]]].id
    first = f"the first a {name} at z = {z:g} m in frame {id}"
    return [f"objects behind the camera, which cannot be in the image: {len(behind)}, {first}"]


def doubt_alpha(frames):
    """A sentence where the alpha of most labels, -10 apart, is not what follows from yaw and place."""
    labels = join([frame.labels for frame in frames])
    labels = labels[labels.is_3d & (labels.alpha != -10)]
    off = np.abs(wrap_angle(labels.alpha - labels.yaw + ray_angle(labels.center)))
    if len(labels) < LEAST or np.median(off) < 0.15:
        return []
    about = f"it is {np.median(off):.2f} rad off in the median of {len(labels)}, and AOS compares it"
    return [f"alpha of labels is not rotation_y - atan2(x, z): {about}"]


def doubt_repeats(frames):
    """Sentences on objects, and images, that a source holds more than once."""
    labels = join([frame.labels for frame in frames])
    number = np.repeat(np.arange(len(frames)), np.array([len(frame.labels) for frame in frames], int))
    sentences, rows = [], np.flatnonzero(repeated(labels, number))
    if len(rows):
        first = f"the first is a {labels.name[rows[0]]} of frame {frames[number[rows[0]]].id}"
        sentences.append(f"objects that stand in their frame more than once, with equal boxes: {len(rows)}, {first}")
    images = Counter(str(frame.image) for frame in frames)
    if twice := [image for image, count in images.items() if count > 1]:
        sentences.append(f"images of more than one frame: {len(twice)}, the first is {twice[0]}")
    return sentences


def doubt_tilt(checked, boxes):
    """A sentence where a tilted camera sees the objects: 3D boxes meet the 2D boxes if all lean, or the ground slopes.

    checked: of the boxes those whose 2D box tells. Labels for such cameras turn about the normal of the ground (Rope3D,
    at the roadside), here boxes turn about y.
    """
    advice = "a box here turns about the camera's y alone: rectify images and labels to a level camera"
    checked = checked[:: len(checked) // 500 + 1]
    for axis, (name, sides) in TILTS.items() if len(checked) >= LEAST else ():
        misses = np.array([lean(checked, axis, np.radians(angle)) for angle in ANGLES])
        level, best = misses[len(ANGLES) // 2], np.median(misses, 1).argmin()
        before, after, angle = np.median(level), np.median(misses[best]), ANGLES[best]
        if abs(angle) >= TILT and after < TILT_GAIN * before and (misses[best] < level).mean() >= IMPROVED:
            edges = (
                f"edges of the 2D boxes are {before:.3f} of their height off the 3D boxes, {after:.3f} if all lean so"
            )
            return [f"the camera looks {name} {sides[int(angle > 0)]} by about {abs(angle)} degrees: {edges}; {advice}"]
    angle = np.degrees(np.arctan(ground_slope(boxes)))
    if abs(angle) < TILT:
        return []
    camera = f"the camera looks pitched {TILTS[0][1][int(angle < 0)]} by about {abs(angle):.0f} degrees"
    return [f"{camera}: with distance the bottoms of boxes {'rise' if angle < 0 else 'fall'} so; {advice}"]


def ground_slope(boxes):
    """How far the bottoms of boxes fall per metre of depth, 0 where they stand on no one plane or are few.

    KITTI's labels are within .006 for any 60 frames, within .03 for any 8.
    """
    near = boxes[(boxes.labels.center[:, 2] > 0) & (boxes.labels.center[:, 2] < 100)]
    if len(near) < 5 * LEAST:
        return 0.0
    depth = from_mean(near.labels.center[:, 2], near.frame)
    bottom = from_mean(near.labels.center[:, 1] + near.labels.size[:, 1] / 2, near.frame)
    slope = depth @ bottom / max(depth @ depth, 1e-9)
    on_plane = np.square(bottom - slope * depth).sum() < np.square(bottom).sum() / 4
    return float(slope) if on_plane else 0.0


def lean(boxes, axis, angle):
    """How far, in heights of the 2D box, their edges (n,) are missed in the mean if all 3D boxes lean about an axis."""
    first, second = [(1, 2), (2, 0), (0, 1)][axis]
    turn = np.eye(3)
    turn[[first, second], [first, second]] = np.cos(angle)
    turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
    labels = boxes.labels
    corners = box_corners(np.zeros_like(labels.center), labels.size, labels.yaw) @ turn.T + labels.center[:, None]
    pixels = project(np.maximum(corners, [-np.inf, -np.inf, NEAR]), boxes.K[:, None])
    edges = np.concatenate([pixels.min(1), pixels.max(1)], 1)
    return np.abs(edges - labels.box).mean(1) / (labels.box[:, 3] - labels.box[:, 1])


def doubt_principal_point(boxes):
    """A sentence where K's principal point is that of a much larger or smaller image."""
    boxes = boxes[np.isfinite(boxes.image).all(1) & (boxes.K[:, :2, 2] > 0).all(1)]
    if not len(boxes):
        return []
    factor = np.log(np.median(boxes.K[:, :2, 2] / ((boxes.image - 1) / 2), 0))
    if not (abs(factor).min() > np.log(CROPPED) and abs(factor[0] - factor[1]) < np.log(CROPPED)):
        return []
    larger = f"about {np.exp(factor.mean()):.1f} times as large as the files"
    return [f"K looks like that of an image {larger}: its principal point is not near their middle"]


def doubt_sizes(boxes, order):
    """Sentences for classes with usual names whose sizes are unusual: in another order, or another unit."""
    sentences = []
    for name, count in sorted(Counter(boxes.labels.name.tolist()).items()):
        if name.lower() not in TYPICAL or count < LEAST:
            continue
        median, typical = np.median(boxes.labels.size[boxes.labels.name == name], 0), TYPICAL[name.lower()]
        orders = ["".join(other) for other in itertools.permutations(order)]  # the first is as the file should be
        off = np.log([reread(median, order, other) / typical for other in orders])
        farthest, mean = np.abs(off).max(1), off[0].mean()
        values = ", ".join(f"{median['lhw'.index(letter)]:.1f}" for letter in order) + " m in the median"
        if farthest.min() < min(0.4, farthest[0] - 0.4):
            columns = f"({', '.join(orders[farthest.argmin()])}) where ({', '.join(order)}) is expected"
            sentences.append(f"{name}: size looks like {columns}: {values}")
        elif farthest[0] > np.log(2) and np.abs(off[0] - mean).max() < 0.3:
            larger = f"size looks {np.exp(mean):.2f} times too large"
            sentences.append(f"{name}: {larger}: {values}; are sizes and centres in metres?")
    return sentences


def doubt_ground(boxes, kitti):
    """A sentence where boxes of usual classes stand on one ground, below the camera, only if centres are others.

    A bottom centre read as a centre (or the reverse) makes the bottoms of a frame fall (rise) by half a metre for every
    metre of height; y that points up by a whole one. On KITTI's labels they rise by .07 +- .07 m (60 frames at a time).
    """
    usual = np.isin([name.lower() for name in boxes.labels.name], list(TYPICAL))
    near = boxes[usual & (boxes.labels.center[:, 2] < 40)]
    near = near[np.bincount(near.frame)[near.frame] > 1] if len(near) else near
    height = near.labels.size[:, 1]
    bottom = near.labels.center[:, 1] + height / 2
    if len(near) < 5 * LEAST or (above := from_mean(height, near.frame)).std() < 0.15:
        return []
    slope = float(above @ from_mean(bottom, near.frame) / (above @ above))
    if np.median(bottom) < 0 or (slope > 0.75 and not kitti):
        return ["center looks like its y points up: only so do boxes stand on one ground below the camera"]
    if abs(slope - (-0.5 if kitti else 0.5)) > abs(slope) - 0.05:
        return []
    centres = f"the {CENTRES[not kitti]} where the {CENTRES[kitti]} is expected"
    return [f"center looks like {centres}: only so do boxes of all heights stand on one ground"]


def from_mean(values, frame):
    """Values (n,) less their mean over each frame."""
    return values - (np.bincount(frame, values) / np.maximum(np.bincount(frame), 1))[frame]


def compare(before, after):
    """The evidence of a hypothesis: IoU of the objects that it changes, as they are and with it."""
    medians = f"median IoU {np.median(after):.2f} of projected and given 2D boxes instead of {np.median(before):.2f}"
    return f"{medians}, over the {len(after)} clear objects that tell"
