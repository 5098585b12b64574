"""KITTI's object detection format: labels, results, calibration, splits. The only place that knows (h, w, l) and bottom centres.

Format: the devkit's readme of the object benchmark, http://www.cvlibs.net/datasets/kitti (Geiger, Lenz, Urtasun, CVPR 2012).
"""

from pathlib import Path
from textwrap import shorten

import numpy as np

from frames import LARGEST, PLAUSIBLE, Frame, Labels, make_labels
from geometry import wrap_angle

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
READS = {  # half of a KITTI folder: what is read of it
    "training": "training/image_2, training/label_2, training/calib and ImageSets",
    "testing": "testing/image_2 and testing/calib",
}
FIELDS = {"box": ("2D box is", 3, 7), "size": ("h, w, l are", 7, 10), "center": ("x, y, z are", 10, 13), "yaw": ("rotation_y is", 13, 14)}


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
        if (fields[0] != "DontCare" or key == "box") and not low <= min(row[start:stop]) <= max(row[start:stop]) <= high:
            values = ", ".join(f"{value:g}" for value in row[start:stop])
            raise ValueError(f"{place}: {title} {values}, expected numbers from {low:g} to {high:g}")
    if row[5] < row[3] or row[6] < row[4]:
        raise ValueError(f"{place}: 2D box {row[3]:g} {row[4]:g} {row[5]:g} {row[6]:g} is inside out, expected x1 <= x2, y1 <= y2")
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
        lines.append(f"{'_'.join(labels.name[i].split())} {labels.truncation[i]:.2f} {labels.occlusion[i]:d} {text}{score}\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_calib(path):
    """P2 (3, 4) of a calibration file: pixels of the left colour camera from rectified camera 0.

    Raises FileNotFoundError, or ValueError naming the file when P2 is missing, is not twelve finite numbers or has no focal length.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None
    for number, line in enumerate(lines, 1):
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
        if P2[0, 0] <= 0 or P2[1, 1] <= 0 or abs(P2[2, 2] - 1) > 1e-6 or abs(P2).max() > LARGEST or np.linalg.cond(P2[:, :3]) > 1e12:
            raise ValueError(f"{path}:{number}: P2 is not a pinhole camera: focal lengths {P2[0, 0]:g}, {P2[1, 1]:g}, last row {P2[2]}")
        if abs(offset := split_projection(P2)[1]).max() > PLAUSIBLE["center"][1]:
            raise ValueError(f"{path}:{number}: P2 puts the camera {abs(offset).max():g} m from camera 0")
        return P2
    raise ValueError(f"{path}: no line 'P2: ...' with the projection of the left colour camera")


def write_calib(path, P2):
    """A calibration file with this P2 (3, 4) for all four cameras and identity rectification and lidar pose."""
    P2 = np.asarray(P2, float).reshape(3, 4)
    row = lambda values: " ".join(f"{v:.12e}" for v in np.ravel(values))  # noqa: E731
    lines = [f"P{i}: {row(P2)}" for i in range(4)] + [f"R0_rect: {row(np.eye(3))}", f"Tr_velo_to_cam: {row(np.eye(3, 4))}"]
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


def find_images(root, split):
    """Frame id -> path of every image in the half of a KITTI folder that holds a split. Raises FileNotFoundError for no such folder."""
    folder = Path(root) / part_of(split) / "image_2"
    if not folder.is_dir():
        raise FileNotFoundError(f"{root}: expected a KITTI folder with {READS[part_of(split)]}")
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}


def read_split(root, split):
    """Frame ids of ImageSets/<split>.txt; of all images for 'all', and for 'testing' where there is no ImageSets/test.txt.

    Raises FileNotFoundError, ValueError with advice.
    """
    folder = Path(root) / "ImageSets"
    if split == "all" or (split == "testing" and not (folder / "test.txt").is_file()):
        return sorted(find_images(root, split))
    path = folder / f"{'test' if split == 'testing' else split}.txt"
    if not path.is_file():
        there = sorted(p.stem for p in folder.glob("*.txt"))
        raise FileNotFoundError(f"{path}: no such split file; {'there are ' + ', '.join(there) if there else 'ImageSets holds none'}")
    try:
        ids = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None
    if not ids:
        raise ValueError(f"{path}: the split is empty, expected one frame id a line")
    return ids


def read_frames(root, splits, problems=None):
    """Frames of some splits of a KITTI folder. Raises FileNotFoundError or ValueError naming the folder, split, file or line.

    With a list `problems`, what is wrong with single frames is added to it as a sentence, and the frame left out, instead.
    """
    root, frames = Path(root), []
    for split in splits:
        images = find_images(root, split)
        for id in read_split(root, split):
            try:
                frames.append(_read_frame(root, split, id, images))
            except (ValueError, OSError) as error:
                if problems is None:
                    raise
                problems.append(str(error))
    return frames


def _read_frame(root, split, id, images):
    """One `Frame` of a KITTI folder; images: paths by id. Raises FileNotFoundError or ValueError naming the file or line."""
    part = part_of(split)
    if id not in images:
        listed = f"ImageSets/{'test' if part == 'testing' else split}.txt"
        raise FileNotFoundError(f"{root}/{part}/image_2/{id[:80]}.png: no such image, named by {listed}")
    for folder in ("calib", "label_2") if part == "training" else ("calib",):
        if not (root / part / folder / f"{id}.txt").is_file():
            raise FileNotFoundError(f"{root}/{part}/{folder}/{id}.txt: frame {id} of split {split} has no {folder} file")
    K, offset = split_projection(read_calib(root / part / "calib" / f"{id}.txt"))
    if part == "testing":
        return Frame(id, images[id], K, make_labels([], [], [], [], []), offset)
    labels = read_labels(root / part / "label_2" / f"{id}.txt").moved(offset)
    return Frame(id, images[id], K, labels, offset)
