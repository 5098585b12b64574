"""KITTI's files: labels, results, calibration, splits. The only place that knows (h, w, l) and bottom centres.

Format: the devkit's readme of the object benchmark, http://www.cvlibs.net/datasets/kitti (Geiger et al., CVPR 2012).
"""

import logging
import os
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from textwrap import shorten

import numpy as np

from scene.frames import LARGEST, PLAUSIBLE, Frame, Labels, UserError, make_labels
from scene.geometry import wrap_angle

FIELDS = ("split",)  # of data.Source, that this format reads
METRICS = "kitti"  # the module of metrics that judges its frames
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
COLUMNS = {"box": (3, 7), "size": (7, 10), "center": (10, 13), "yaw": (13, 14)}  # of a label's row, in `PLAUSIBLE`
FILLS = (0, -1, -1000)  # of converters, for a side or a place that is not known
log = logging.getLogger("deep3d")


def read_labels(path, scores=False, odd=None):
    """Read a label file (15 fields a line) or, with scores, a result file (16). Returns Labels in rectified camera 0.

    odd: a list of what is told of labels, as `formats.odd.accept` takes it. Raises FileNotFoundError, or UserError
    naming file and line.
    """
    names, rows = [], []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if fields := line.split():
            names.append(fields[0])
            try:
                row = _parse_row(fields, scores)
                if not scores and not _is_usual(row, fields[0]):
                    row = import_module("formats.odd").accept(row, fields[0], f"{path}:{number}", odd)
                rows.append(row)
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    values = np.array(rows, dtype=np.float64).reshape(-1, 15)
    size, center = values[:, [9, 7, 8]], values[:, 10:13].copy()  # file: h, w, l and bottom centre
    real = size[:, 0] > 0
    center[real, 1] -= size[real, 1] / 2
    truncation, occlusion, alpha, yaw, score = values[:, [0, 1, 2, 13, 14]].T
    names, occlusion = np.array(names, dtype=object), occlusion.astype(int)
    return Labels(names, values[:, 3:7], size, center, yaw, alpha, truncation, occlusion, score)


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # a byte order mark would become part of the first class
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file: {error}") from None


def _parse_row(fields, scores):
    """15 finite numbers of a line, the last its score, 1 where a label has none. Raises ValueError."""
    if len(fields) != 16 and (scores or len(fields) != 15):
        expected = "16 fields (a result has a score)" if scores else "15 or 16 fields"
        raise ValueError(f"expected {expected}, got {len(fields)}{' (blanks part them)' if ',' in fields[0] else ''}")
    row = _parse_numbers(fields[1:], "the class name")
    return row if len(row) == 15 else [*row, 1.0]


def _is_usual(row, name):
    """Whether a label's row is as KITTI's; formats/odd.py knows what else is taken. Of a DontCare the 2D box counts."""
    parts = [(PLAUSIBLE[key], row[start:stop]) for key, (start, stop) in COLUMNS.items()]
    inside = [low <= min(values) <= max(values) <= high for (low, high), values in parts]
    upright = inside[0] and row[3] <= row[5] and row[4] <= row[6]
    known = (row[0] == -1 or 0 <= row[0] <= 1) and row[1] in (-1, 0, 1, 2, 3) and row[12] not in FILLS
    return upright and (name == "DontCare" or (known and all(inside)))


def _parse_numbers(fields, first):
    """Finite numbers of texts that stand after `first`. Raises ValueError."""
    try:
        numbers = [float(field) for field in fields]
    except ValueError as error:
        raise ValueError(f"expected numbers after {first}: {shorten(str(error), 200)}") from None
    for number, value in enumerate(numbers, 2):
        if not -LARGEST <= value <= LARGEST:  # nor NaN
            raise ValueError(f"field {number} is {value:g}, expected a finite number of at most {LARGEST:g}")
    return numbers


def write_labels(path, labels, scores=False, digits=2):
    """Write Labels (rectified camera 0) as a KITTI label file or, with scores, a result file.

    Fields are separated by spaces, so white space in a name becomes _.
    """
    lines = []
    for label in labels:
        l, h, w = label.size
        x, y, z = label.center
        bottom, angle = (y + h / 2, wrap_angle(label.yaw)) if label.is_3d else (y, label.yaw)
        numbers = [label.alpha, *label.box, h, w, l, x, bottom, z, angle]
        fields = ["_".join(label.name.split()), f"{label.truncation:.2f}", f"{label.occlusion:d}"]
        fields += [f"{number:.{digits}f}" for number in numbers] + [f"{label.score:.6f}"] * scores
        lines.append(" ".join(fields) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_calib(path):
    """P2 (3, 4) of a calibration file: pixels of the left colour camera from rectified camera 0.

    Raises FileNotFoundError, or UserError naming the file.
    """
    lines = _read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        key, _, rest = line.partition(":")
        if key.strip() == "P2":
            if any(line.lstrip()[:1] in ("D", "d", "k") for line in lines):
                import_module("formats.odd").refuse_distortion(path, lines)
            try:
                return _parse_projection(rest).copy()
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    raise UserError(f"{path}: no line 'P2: ...' with the projection of the left colour camera")


@lru_cache(maxsize=64)  # thousands of frames share a camera
def _parse_projection(text):
    """P2 (3, 4) from the text of its numbers. Raises ValueError."""
    numbers = _parse_numbers(text.split(), "P2")
    if len(numbers) != 12:
        raise ValueError(f"P2 has {len(numbers)} values, expected 12")
    P2 = np.array(numbers).reshape(3, 4)
    pinhole = P2[0, 0] > 0 and P2[1, 1] > 0 and abs(P2[2, 2] - 1) <= 1e-6 and np.linalg.cond(P2[:, :3]) <= 1e12
    if not pinhole or abs(split_projection(P2)[1]).max() > PLAUSIBLE["center"][1]:
        raise ValueError(f"P2 is not a pinhole camera near camera 0: {P2.tolist()}")
    return P2


def write_calib(path, P2):
    """A calibration file with this P2 (3, 4) for all four cameras and identity rectification and lidar pose."""
    rows = dict.fromkeys(("P0", "P1", "P2", "P3"), np.asarray(P2, float).reshape(3, 4))
    rows |= {"R0_rect": np.eye(3), "Tr_velo_to_cam": np.eye(3, 4)}
    lines = [f"{key}: {' '.join(f'{value:.12e}' for value in values.flat)}\n" for key, values in rows.items()]
    Path(path).write_text("".join(lines))


def split_projection(P2):
    """P2 (3, 4) -> K (3, 3) and offset (3,) metres with x_camera2 = x_rectified0 + offset, as K [I | offset] = P2."""
    K = P2[:, :3].copy()
    return K, np.linalg.solve(K, P2[:, 3])


def part_of(split):
    """The half of KITTI that holds a split: 'testing', which has no labels, for itself, 'training' for all others."""
    return "testing" if split == "testing" else "training"


def split_file(root, split):
    """The list of a split's ids: ImageSets/<split>.txt, or the file itself that a split ending in .txt names."""
    name = "test" if split == "testing" else split
    return Path(split) if split.endswith(".txt") else Path(root) / "ImageSets" / f"{name}.txt"


def read_split(root, split):
    """Frame ids of a split file; of all images for 'all', and for 'testing' without its file. Raises UserError."""
    path = split_file(root, split)
    if split == "all" or (split == "testing" and not path.is_file()):
        return sorted(list_images(root, split))
    if not path.is_file():
        splits = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt")))
        raise UserError(f"{path}: no such split file; there are {splits or 'none'}")
    if ids := _read_text(path).split():
        return ids
    raise UserError(f"{path}: the split is empty, expected one frame id a line")


def list_images(root, split):
    """Every image in the half of a KITTI folder that holds a split: frame id -> file name. Raises UserError."""
    half = part_of(split)
    folder = Path(root) / half / "image_2"
    if not folder.is_dir():
        raise UserError(f"{Path(root).absolute()}: expected a KITTI folder with {half}/image_2 and {half}/calib")
    parts = (os.path.splitext(name) for name in sorted(os.listdir(folder)))
    return {stem: stem + suffix for stem, suffix in parts if suffix.lower() in IMAGE_SUFFIXES}


def frames(source, config, problems=None):
    """The frames of a source's splits, a list. Raises UserError naming the folder, split, file or line.

    With a list `problems`, what is wrong with a frame is added to it as a sentence, and the frame left out, instead.
    What is odd in labels that are taken is logged, or added as well.
    """
    root = Path(source.root or config.root)
    frames, absent, odd = {}, [], []
    tell = log.warning if problems is None else problems.append
    for split in source.split:
        images = list_images(root, split)
        for id in read_split(root, split):
            if source.limit and len(frames) == source.limit:
                break
            if id not in images and config and config.skip_bad:
                absent.append(id)
                continue
            try:
                if id in frames:
                    raise UserError(f"{root}: split {split} lists frame {id} a second time; use repeat= to repeat")
                frames[id] = _read_frame(root, split, id, images.get(id), odd)
            except (UserError, OSError) as error:
                if problems is None:
                    raise
                problems.append(str(error))
    if absent:
        tell(f"{root}: {len(absent)} frames have no image and are left out, the first is {absent[0]}")
    for sentence in import_module("formats.odd").describe_labels(odd) if odd else ():
        tell(f"{root}: {sentence}")
    return list(frames.values())


def _read_frame(root, split, id, image, odd):
    """One `Frame` of a KITTI folder; image: the name of its file, or None. Raises UserError."""
    half = root / part_of(split)
    if image is None:
        advice = "KITTI's testing half is the split 'testing'; " if split == "test" else ""
        advice += "data.skip_bad=true leaves out frames without one"
        named = f"named by {split_file('', split).as_posix()}; {advice}"
        raise UserError(f"{half}/image_2/{id[:80]}.png: no such image, {named}")
    try:
        K, offset = split_projection(read_calib(half / "calib" / f"{id}.txt"))
        file = half / "label_2" / f"{id}.txt"
        labels = make_labels([], [], [], [], []) if half.name == "testing" else read_labels(file, odd=odd).moved(offset)
    except FileNotFoundError as error:
        folder = Path(error.filename).parent.name
        raise UserError(f"{error.filename}: frame {id} of split {split} has no {folder} file") from None
    return Frame(id, half / "image_2" / image, K, labels, offset)
