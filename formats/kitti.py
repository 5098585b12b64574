"""KITTI's object detection format: labels, results, calibration, splits. The only place that knows (h, w, l) and bottom centres.

Format: the devkit's readme of the object benchmark, http://www.cvlibs.net/datasets/kitti (Geiger, Lenz, Urtasun, CVPR 2012).
"""

import dataclasses
import hashlib
import itertools
import os
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np

from formats.index import Chunk, Part, Reading, chunk_of, find_columns
from scene.frames import LARGEST, PLAUSIBLE, Frame, Labels, image_size, make_labels
from scene.geometry import wrap_angle

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
READS = {  # half of a KITTI folder: what is read of it
    "training": "training/image_2, training/label_2, training/calib and ImageSets",
    "testing": "testing/image_2 and testing/calib",
}
AT_ONCE = 500  # frames that a process reads together
FIELDS = {
    "box": ("2D box is", 3, 7),
    "size": ("h, w, l are", 7, 10),
    "center": ("x, y, z are", 10, 13),
    "yaw": ("rotation_y is", 13, 14),
}


def read_labels(path, scores=False):
    """Read a label file (15 fields a line) or, with scores, a result file (16). Returns Labels in rectified camera 0.

    Raises FileNotFoundError, or ValueError naming file and line for a wrong field count, a non-number, a non-finite number and, in
    labels, a number that is not plausible or a 2D box that is inside out.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # a byte order mark would become part of the first class
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None
    names, rows = [], []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        names.append(fields[0])
        rows.append(_parse_row(fields, 16 if scores else 15, f"{path}:{number}"))
    return _make_labels(names, rows)


def _make_labels(names, rows):
    """Labels of class names and rows of 15 numbers: a line's fields without the name, and a score."""
    values = np.array(rows, dtype=np.float64).reshape(len(rows), 15)
    size = values[:, [9, 7, 8]]  # file: h, w, l
    center = values[:, 10:13].copy()
    real = size[:, 0] > 0
    center[real, 1] -= size[real, 1] / 2  # file: bottom centre
    return Labels(
        name=np.array(names, dtype=object),
        truncation=values[:, 0],
        occlusion=values[:, 1].astype(int),
        alpha=values[:, 2],
        box=values[:, 3:7],
        size=size,
        center=center,
        yaw=values[:, 13],
        score=values[:, 14],
    )


def _parse_row(fields, count, place):
    """Numbers of one line: 14 of them and a score, 1 for labels. Result files of detectors may leave the score out of 15 fields."""
    if len(fields) not in ((16,) if count == 16 else (15, 16)):
        expected = "16 fields (a result has a score)" if count == 16 else "15 or 16 fields"
        raise ValueError(f"{place}: expected {expected}, got {len(fields)}")
    try:
        row = [float(field) for field in fields[1:]]
    except ValueError as error:
        raise ValueError(f"{place}: expected numbers after the class name: {shorten(str(error), 200)}") from None
    if not np.isfinite(row).all():
        bad = int(np.flatnonzero(~np.isfinite(row))[0])
        raise ValueError(f"{place}: field {bad + 2} is {row[bad]}, expected a finite number")
    if max(map(abs, row)) > LARGEST:
        raise ValueError(f"{place}: a field is {max(row, key=abs):g}, expected at most {LARGEST:g} of any unit")
    if count == 16:
        return row  # detectors write empty 2D boxes, and -1 -1 -1 -1000 -1000 -1000 for "no 3D box": the evaluator has rules for both
    for key, (title, start, stop) in FIELDS.items():
        low, high = PLAUSIBLE[key]
        if (fields[0] != "DontCare" or key == "box") and not low <= min(row[start:stop]) <= max(
            row[start:stop]
        ) <= high:
            values = ", ".join(f"{value:g}" for value in row[start:stop])
            raise ValueError(f"{place}: {title} {values}, expected numbers from {low:g} to {high:g}")
    if row[5] < row[3] or row[6] < row[4]:
        raise ValueError(
            f"{place}: 2D box {row[3]:g} {row[4]:g} {row[5]:g} {row[6]:g} is inside out, expected x1 <= x2, y1 <= y2"
        )
    return row if len(row) == 15 else [*row, 1.0]


def write_labels(path, labels, scores=False, digits=2):
    """Write Labels (rectified camera 0) as a KITTI label file or, with scores, a result file.

    Fields are separated by spaces, so white space in a name becomes _.
    """
    lines = []
    for i in range(len(labels)):
        l, h, w = labels.size[i]
        x, y, z = labels.center[i]
        bottom = y + h / 2 if l > 0 else y
        angle = wrap_angle(labels.yaw[i]) if l > 0 else labels.yaw[i]
        numbers = [labels.alpha[i], *labels.box[i], h, w, l, x, bottom, z, angle]
        text = " ".join(f"{v:.{digits}f}" for v in numbers)
        score = f" {labels.score[i]:.6f}" if scores else ""
        lines.append(
            f"{'_'.join(labels.name[i].split())} {labels.truncation[i]:.2f} {labels.occlusion[i]:d} {text}{score}\n"
        )
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_calib(path):
    """P2 (3, 4) of a calibration file: pixels of the left colour camera from rectified camera 0.

    Raises FileNotFoundError, or ValueError naming the file when P2 is missing, is not twelve finite numbers or has no focal length.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None
    return _parse_calib(text, path)


def _parse_calib(text, path):
    """P2 (3, 4) from the text of a calibration file."""
    for number, line in enumerate(text.splitlines(), 1):
        key, _, rest = line.partition(":")
        if key.strip() != "P2":
            continue
        try:
            values = np.array([float(field) for field in rest.split()])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected numbers after P2: {shorten(str(error), 200)}") from None
        if values.size != 12 or not np.isfinite(values).all():
            raise ValueError(f"{path}:{number}: P2 has {values.size} values, expected 12 finite numbers")
        P2 = values.reshape(3, 4)
        if (
            P2[0, 0] <= 0
            or P2[1, 1] <= 0
            or abs(P2[2, 2] - 1) > 1e-6
            or abs(P2).max() > LARGEST
            or np.linalg.cond(P2[:, :3]) > 1e12
        ):
            raise ValueError(
                f"{path}:{number}: P2 is not a pinhole camera: focal lengths {P2[0, 0]:g}, {P2[1, 1]:g}, last row {P2[2]}"
            )
        if abs(offset := split_projection(P2)[1]).max() > PLAUSIBLE["center"][1]:
            raise ValueError(f"{path}:{number}: P2 puts the camera {abs(offset).max():g} m from camera 0")
        return P2
    raise ValueError(f"{path}: no line 'P2: ...' with the projection of the left colour camera")


def write_calib(path, P2):
    """A calibration file with this P2 (3, 4) for all four cameras and identity rectification and lidar pose."""
    P2 = np.asarray(P2, float).reshape(3, 4)
    row = lambda values: " ".join(f"{v:.12e}" for v in np.ravel(values))  # noqa: E731
    lines = [f"P{i}: {row(P2)}" for i in range(4)] + [
        f"R0_rect: {row(np.eye(3))}",
        f"Tr_velo_to_cam: {row(np.eye(3, 4))}",
    ]
    Path(path).write_text("\n".join(lines) + "\n")


def split_projection(P2):
    """P2 (3, 4) -> K (3, 3) and offset (3,) metres with x_camera2 = x_rectified0 + offset, as K [I | offset] = P2.

    Exact for a P2 = [K | p4]: offset = K^-1 p4, about 6 cm to the right on KITTI.
    """
    K = P2[:, :3].copy()
    return K, np.linalg.solve(K, P2[:, 3])


def part_of(split):
    """The half of KITTI that holds a split: 'testing', which has no labels, for itself, 'training' for all others."""
    return "testing" if split == "testing" else "training"


def split_file(root, split):
    """Where the frame ids of a split are listed: ImageSets/<split>.txt, or the file itself that a split ending in .txt names."""
    if split.endswith(".txt"):
        return Path(split)
    return Path(root) / "ImageSets" / f"{'test' if split == 'testing' else split}.txt"


def read_split(root, split):
    """Frame ids of the split file; of all images for 'all', and for 'testing' where there is no ImageSets/test.txt.

    Raises FileNotFoundError, ValueError with advice.
    """
    path = split_file(root, split)
    if split == "all" or (split == "testing" and not path.is_file()):
        return sorted(list_images(root, split))
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt")))
        raise FileNotFoundError(
            f"{path}: no such split file; {f'there are {there}' if there else f'{path.parent.name} holds none'}"
        )
    try:
        ids = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None
    if not ids:
        raise ValueError(f"{path}: the split is empty, expected one frame id a line")
    return ids


def list_images(root, split):
    """Every image in the half of a KITTI folder that holds a split: frame id -> path relative to root.

    Raises FileNotFoundError for no such folder.
    """
    half = part_of(split)
    folder = Path(root) / half / "image_2"
    if not folder.is_dir():
        raise FileNotFoundError(f"{Path(root).absolute()}: expected a KITTI folder with {READS[half]}")
    parts = (os.path.splitext(name) for name in sorted(os.listdir(folder)))
    return {stem: f"{half}/image_2/{stem}{suffix}" for stem, suffix in parts if suffix.lower() in IMAGE_SUFFIXES}


def read_frames(root, splits, problems=None):
    """Frames of some splits of a KITTI folder. Raises FileNotFoundError or ValueError naming the folder, split, file or line.

    With a list `problems`, what is wrong with single frames is added to it as a sentence, and the frame left out, instead.
    """
    root, frames = Path(root), []
    for split in splits:
        images = list_images(root, split)
        for id in read_split(root, split):
            try:
                frames.append(_read_frame(root, split, id, images))
            except (ValueError, OSError) as error:
                if problems is None:
                    raise
                problems.append(str(error))
    return frames


def _read_frame(root, split, id, images):
    """One `Frame` of a KITTI folder; images: of `list_images`. Raises FileNotFoundError or ValueError naming the file or line."""
    part = part_of(split)
    if id not in images:
        listed = split_file("", split).as_posix()
        raise FileNotFoundError(f"{root}/{part}/image_2/{id[:80]}.png: no such image, named by {listed}")
    for folder in ("calib", "label_2") if part == "training" else ("calib",):
        if not (root / part / folder / f"{id}.txt").is_file():
            raise FileNotFoundError(
                f"{root}/{part}/{folder}/{id}.txt: frame {id} of split {split} has no {folder} file"
            )
    K, offset = split_projection(read_calib(root / part / "calib" / f"{id}.txt"))
    if part == "testing":
        return Frame(id, root / images[id], K, make_labels([], [], [], [], []), offset)
    labels = read_labels(root / part / "label_2" / f"{id}.txt").moved(offset)
    return Frame(id, root / images[id], K, labels, offset)


# ---- many frames at once


def open_frames(root, splits, folder="", workers=1):
    """`Part` with the frames of some splits, from their index in `folder` (`find_columns`). Raises what `read_frames` raises."""
    how = reading(root, splits)
    columns = find_columns(how, folder, workers=workers)
    return Part(columns, how.folder, len(columns))


def reading(root, splits):
    """How an index reads the frames of some splits. Raises what `read_split` raises."""
    root, listed = Path(root), []
    for split in splits:
        images = list_images(root, split)
        listed += [(split, id, images.get(id, "")) for id in read_split(root, split)]
    jobs = [listed[start : start + AT_ONCE] for start in range(0, len(listed), AT_ONCE)]
    return Reading(
        source=root,
        choice=f"kitti {' '.join(splits)}",
        folder=root,
        made_from=partial(_made_from, root, listed),
        jobs=jobs,
        read=partial(read_chunk, root),
        sizes=[len(job) for job in jobs],
    )


def text_files(split, id):
    """Calibration and, but of the testing half, label file of a frame, relative to the root."""
    half = part_of(split)
    return [f"{half}/{folder}/{id}.txt" for folder in (("calib",) if half == "testing" else ("calib", "label_2"))]


def _made_from(root, listed):
    """Digest of the names, sizes and times of all files of some frames, and of their order, which is what split files say."""
    found = hashlib.sha256()
    root = os.path.join(root, "")
    for split, id, image in listed:
        states = [id]
        for name in (image, *text_files(split, id)):
            try:
                stat = os.stat(root + name)
                states += [name, str(stat.st_size), str(stat.st_mtime_ns)]
            except (OSError, ValueError):  # the reader says what is wrong with it
                states.append("missing")
        found.update("\0".join([*states, "\n"]).encode(errors="surrogateescape"))
    return found.hexdigest()


def read_chunk(root, listed):
    """`Chunk` of frames given as (split, id, image name). Raises what `read_frames` raises, for the first frame that is wrong."""
    sizes = [_size(os.path.join(root, image)) if image else (0, 0) for _, _, image in listed]
    try:
        chunk = _read_together(os.path.join(root, ""), listed)
    except (ValueError, OSError):  # something is wrong: one by one, which tells what
        frames = [_read_frame(root, split, id, {id: image} if image else {}) for split, id, image in listed]
        chunk = dataclasses.replace(chunk_of(frames), image=[image for _, _, image in listed])
    return dataclasses.replace(chunk, image_size=np.array(sizes).reshape(-1, 2))


def _size(path):
    """(width, height) of an image, 0 for one that cannot be read: the loader names it, or passes it over."""
    try:
        return image_size(path)
    except OSError:
        return 0, 0


def _read_together(root, listed):
    """The chunk of frames of which nothing is wrong, without the sizes of their images; else a ValueError or OSError."""
    names, numbers, counts, cameras, known = [], [], [], [], {}
    for split, id, image in listed:
        calib, labels = [*(_read_text(root + name) for name in text_files(split, id)), ""][:2]
        if calib not in known:
            known[calib] = split_projection(_parse_calib(calib, id))
        cameras.append(known[calib])
        lines = [fields for line in labels.splitlines() if (fields := line.split())]
        names += [fields[0] for fields in lines]
        numbers += [fields[1:] for fields in lines]
        counts.append(len(lines))
        if not image:
            raise ValueError(f"{id}: no image")
    if not {14, 15}.issuperset(map(len, numbers)):
        raise ValueError("a line has too few fields or too many")
    rows = [fields if len(fields) == 15 else [*fields, 1.0] for fields in numbers]
    values = np.fromiter(map(float, itertools.chain.from_iterable(rows)), float).reshape(-1, 15)
    _check_rows(np.array(names, dtype=object), values)
    offsets, counts = np.array([offset for _, offset in cameras]), np.array(counts)
    labels = _make_labels(names, values)
    center = labels.center + np.repeat(offsets, counts, 0)
    return Chunk(
        id=[id for _, id, _ in listed],
        image=[image for _, _, image in listed],
        K=np.array([K for K, _ in cameras]),
        image_size=np.zeros((len(listed), 2)),
        count=counts,
        labels=dataclasses.replace(labels, center=np.where(labels.is_3d[:, None], center, labels.center)),
        offset=offsets,
    )


def _read_text(path):
    """The text of a small file, read at once."""
    with open(path, "rb", buffering=0) as file:
        return file.readall().decode("utf-8-sig")


def _check_rows(names, values):
    """ValueError unless `_parse_row` would take all rows of a label file: names (m,), numbers (m, 15)."""
    boxes = names == "DontCare"  # of which only the 2D box is checked
    fine = (np.abs(values) <= LARGEST).all(1)  # NaN is not
    for key, (_, start, stop) in FIELDS.items():
        low, high = PLAUSIBLE[key]
        inside = ((low <= values[:, start:stop]) & (values[:, start:stop] <= high)).all(1)
        fine &= inside if key == "box" else inside | boxes
    fine &= (values[:, 3] <= values[:, 5]) & (values[:, 4] <= values[:, 6])
    if not fine.all():
        raise ValueError("a number is not plausible")
