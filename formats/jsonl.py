"""JSON lines, the way in for one's own data: one image a line with its camera and its objects; read, checked and written here.

    {"image": "a/0001.jpg", "K": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], "objects": [{"class": "Car", "center": [x, y, z],
     "size": [l, h, w], "yaw": r, "box": [x1, y1, x2, y2]}]}

Units and frames are those of geometry.py: metres in that image's camera frame, radians, pixels of the stored image. Image paths are
relative to the folder of the file. Optional for a frame: `id` (default: the path without its suffix) and `ignore` (a list of 2D regions
in which nothing is learned or counted). Optional for an object: `box` (default: the projected 3D box, clipped to the image), `truncation`
in [0, 1], `occlusion` 0-3, `ignore` (true: only its box is kept, as a region), `velocity` [x, y, z] m/s in the camera frame,
`attribute` (text), and what predictions add: `score` and `depth_sigma` (metres).

    python -m formats.jsonl FILE.jsonl [--no-images]      every bad line by number, a summary per class, and likely mistakes
"""

import argparse
import codecs
import contextlib
import difflib
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from textwrap import shorten

import numpy as np

from formats.diagnosis import diagnose, doubt_angles, image_sizes
from frames import LARGEST, PLAUSIBLE, Frame, join, make_labels, opened, upright
from geometry import box_iou, camera_problem, clip_boxes, project_boxes, wrap_angle

FRAME_KEYS = {"image": True, "K": True, "objects": True, "id": False, "ignore": False}  # key: required
OBJECT_KEYS = {"class": True, "center": True, "size": True, "yaw": True, "box": False, "truncation": False, "occlusion": False,
               "ignore": False, "velocity": False, "attribute": False, "score": False, "depth_sigma": False}  # fmt: skip
NUMBERS = {  # key of an object: shape, what is expected, and what else holds for a number that is
    "center": ((3,), "3 numbers x, y, z in metres", None),
    "size": ((3,), "3 numbers l, h, w in metres", None),
    "yaw": ((), "radians", None),
    "truncation": ((), "a number from 0 to 1", lambda v: 0 <= v <= 1),
    "occlusion": ((), "0, 1, 2 or 3", lambda v: v in (0, 1, 2, 3)),
    "score": ((), "a finite number", None),
    "velocity": ((3,), "3 finite numbers x, y, z in m/s", None),
    "depth_sigma": ((), "metres > 0", lambda v: v > 0),
}
ABSENT = {"truncation": -1.0, "occlusion": -1.0, "score": 1.0, "velocity": np.full(3, np.nan), "attribute": "", "sigma": np.nan}
REGION = {"name": "DontCare", "center": np.full(3, -1000.0), "size": np.full(3, -1.0), "yaw": -10.0, **ABSENT}  # KITTI's fill values
IMAGE_SIDES = 16, 32768  # pixels, smallest and largest believable side
LONGEST_NAME = 200  # bytes of a part of an id: file systems take 255


def read_frames(path: str | Path, problems: list[str] | None = None, images: bool = True) -> list[Frame]:
    """Every frame of a JSON-lines file: its objects, then its ignore regions as DontCare rows, in the image's own camera and pixels.

    Raises FileNotFoundError, or ValueError naming file, line, key, value and what was expected, for the first bad line; with a list
    `problems`, every bad line adds a sentence to it, and is left out. With images, each image's header is opened too.
    """
    path, frames, seen, count = Path(path), [], {}, 0  # seen: id -> number of its line
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such JSON-lines file")

    def report(sentences):
        if problems is None:
            raise ValueError(f"{sentences[0]} (python -m formats.jsonl {path} lists every bad line)")
        problems.extend(sentences)

    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            count += 1
            frame, wrong = _parse_line(raw.removeprefix(codecs.BOM_UTF8), path.parent, images)
            if frame is not None and frame.id in seen:
                wrong = [f"id is {frame.id!r}, as on line {seen[frame.id]}, expected each id once"]
            if wrong:
                report([f"{path}:{number}: {problem}" for problem in wrong])
            else:
                seen[frame.id] = number
                frames.append(frame)
    if not count:
        report([f"{path}: the file holds no frames, expected one JSON object a line"])
    return frames


def write_jsonl(path: str | Path, frames: Iterable[Frame]) -> None:
    """Write frames, one a line; image paths become relative to the folder of the file."""
    folder = Path(path).parent
    lines = [json.dumps(to_json(frame, folder), allow_nan=False) + "\n" for frame in frames]
    Path(path).write_text("".join(lines), encoding="utf-8")


def to_json(frame: Frame, folder: str | Path | None = None) -> dict:
    """The JSON object of a frame: image, K, objects, id and, where there are any, ignore.

    Lengths, angles and pixels are rounded to 6 decimals. A score is written where it is not 1 and for every row that has a depth sigma.
    With `folder` the image path is made relative to it. DontCare rows become ignore regions; a 2D box without area is left out.
    """
    labels = frame.labels
    image = frame.image if folder is None else os.path.relpath(frame.image, folder)
    line = {"image": Path(image).as_posix(), "K": np.asarray(frame.K, float).tolist(), "objects": [], "id": frame.id}
    for i in range(len(labels)):
        if not labels.is_3d[i]:
            line.setdefault("ignore", []).append(_rounded(labels.box[i]))
            continue
        entry = {"class": str(labels.name[i])} | {key: _rounded(getattr(labels, key)[i]) for key in ("center", "size", "yaw")}
        columns = ((labels.velocity, np.nan), (labels.attribute, ""), (labels.sigma, np.nan))
        velocity, attribute, sigma = (blank if column is None else column[i] for column, blank in columns)
        optional = (  # key, value, whether it is written
            ("box", _rounded(labels.box[i]), (labels.box[i, 2:] > labels.box[i, :2]).all()),
            ("truncation", _rounded(labels.truncation[i]), labels.truncation[i] >= 0),
            ("occlusion", int(labels.occlusion[i]), labels.occlusion[i] >= 0),
            ("velocity", _rounded(velocity), np.isfinite(velocity).all()),
            ("attribute", str(attribute), attribute),
            ("score", _rounded(labels.score[i]), labels.score[i] != 1 or np.isfinite(sigma)),
            ("depth_sigma", _rounded(sigma), np.isfinite(sigma)),
        )
        entry |= {key: value for key, value, written in optional if written}
        line["objects"].append(entry)
    return line


def summarise(frames: Iterable[Frame]) -> list[str]:
    """One line per class, most frequent first: count, mean size, depth range, and how well `box` fits the projected 3D box.

    The fit is a median IoU over whole boxes; far below 0.9 it tells of a wrong K, size order, angle or height of the centre.
    """
    frames, fits, lines = list(frames), [np.zeros(0)], []
    for frame in frames:
        own = frame.labels
        full_box, crosses = project_boxes(own.center, np.maximum(own.size, 1e-3), own.yaw, frame.K)
        inside = (own.truncation <= 0) & (own.occlusion <= 0) & own.is_3d & ~crosses
        fits.append(np.where(inside, box_iou(own.box, full_box), np.nan))
    labels, fits = join([frame.labels for frame in frames]), np.concatenate(fits)
    for name, count in Counter(labels.name).most_common():
        rows = labels.name == name
        own, fit, line = labels[rows], fits[rows], f"{name}: {count}"
        if own.is_3d[0]:
            l, h, w = own.size.mean(0)
            depth = own.center[:, 2]
            line += f", mean l h w {l:.2f} {h:.2f} {w:.2f} m, depth {depth.min():.1f} to {depth.max():.1f} m"
        if np.isfinite(fit).any():
            line += f", 2D box fits 3D box at median IoU {np.nanmedian(fit):.2f}"
        lines.append(line)
    return lines


def _parse_line(raw: bytes, folder: Path, images: bool) -> tuple[Frame | None, list[str]]:
    """A frame, or None and all that is wrong with the line. Without images, boxes that are left out stay empty."""
    try:
        frame = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # of which JSON and Unicode errors are kinds
        return None, [f"not a line of JSON: {error}"]
    if not isinstance(frame, dict):
        return None, [f"the line holds {_short(frame)}, expected an object with {', '.join(FRAME_KEYS)}"]
    problems = []

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except ValueError as error:
            problems.append(str(error))
            return None

    attempt(_check_keys, frame, FRAME_KEYS, "the line")
    if not {"image", "K", "objects"} <= frame.keys():
        return None, problems
    image, size = attempt(_parse_image, frame["image"], folder, images) or (None, None)
    id = attempt(_parse_id, frame)
    K = attempt(_parse_camera, frame["K"], size)
    for key in ("objects", "ignore"):
        if not isinstance(frame.get(key, []), list):
            problems.append(f"{key} is {_short(frame[key])}, expected a list")
            frame[key] = []
    rows = [attempt(_parse_object, entry, f"objects[{i}]", K, size) for i, entry in enumerate(frame["objects"])]
    boxes = [attempt(_parse_box, box, f"ignore[{i}]", size) for i, box in enumerate(frame.get("ignore", []))]
    if problems:
        return None, problems
    return Frame(id, image, K, _make_labels(rows + [{**REGION, "box": box} for box in boxes])), []


def _make_labels(rows):
    """Labels of rows as `_parse_object` returns them: objects first, then regions, each in the order given."""
    rows = sorted(rows, key=lambda row: row["name"] == "DontCare")
    columns = {key: [row[key] for row in rows] for key in ("box", *REGION)}
    sigma, velocity = np.array(columns["sigma"], float), np.array(columns["velocity"], float).reshape(-1, 3)
    columns["sigma"] = sigma if np.isfinite(sigma).any() else None
    columns["velocity"] = velocity if np.isfinite(velocity).any() else None
    columns["attribute"] = np.array(columns["attribute"], dtype=object) if any(columns["attribute"]) else None
    labels = make_labels(**columns)
    labels.alpha[~labels.is_3d] = -10
    return labels


def _parse_object(entry, place, K, size):
    """One object as a dict of the columns of Labels; a region if it is to be ignored. K and size may be None: then no box is derived."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {_short(entry)}, expected an object with {', '.join(OBJECT_KEYS)}")
    _check_keys(entry, OBJECT_KEYS, place)
    name = entry["class"]
    if not _is_text(name) or not name or name != name.strip():
        raise ValueError(f"{place}.class is {_short(name)}, expected a name")
    if name == "DontCare":
        raise ValueError(f"{place}.class is 'DontCare', expected a class; regions belong into the line's \"ignore\": [[x1, y1, x2, y2]]")
    number = lambda key: _numbers(entry[key], f"{place}.{key}", *NUMBERS[key], PLAUSIBLE.get(key))  # noqa: E731
    center, extent, yaw = number("center"), number("size"), number("yaw")
    box = np.zeros(4)
    if "box" in entry:
        box = _parse_box(entry["box"], f"{place}.box", size)
    elif K is not None and size is not None:
        box = _derive_box(center, extent, yaw, K, size, place)
    ignore = entry.get("ignore", False)
    if not isinstance(ignore, bool):
        raise ValueError(f"{place}.ignore is {_short(ignore)}, expected true or false")
    if ignore:
        return {**REGION, "box": box}
    if not _is_text(entry.get("attribute", "")):
        raise ValueError(f"{place}.attribute is {_short(entry['attribute'])}, expected text")
    given = {"name": name, "box": box, "center": center, "size": extent, "yaw": yaw if -np.pi <= yaw < np.pi else wrap_angle(yaw)}
    optional = {"sigma" if key == "depth_sigma" else key: number(key) for key in NUMBERS if key in entry}
    return ABSENT | {"attribute": entry.get("attribute", "")} | optional | given


def _parse_box(value, place, size):
    """A 2D box (4,), clipped to the image when its (width, height) is known."""
    box = _numbers(value, place, (4,), "4 numbers x1, y1, x2, y2 in pixels", limits=PLAUSIBLE["box"])
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"{place} is {_short(value)}, expected x1 < x2 and y1 < y2")
    if size is None:
        return box
    clipped = clip_boxes(box, *size)
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise ValueError(f"{place} is {_short(value)}, expected a box that meets the image of {size[0]}x{size[1]}")
    return clipped


def _derive_box(center, extent, yaw, K, size, place):
    """The projected 3D box clipped to the image, (4,)."""
    full_box = project_boxes(center[None], extent[None], yaw[None], K)[0][0]
    box = clip_boxes(full_box, *size)
    if not (box[0] < box[2] and box[1] < box[3]):
        seen = "behind the camera" if np.isnan(full_box).any() else f"at pixels {', '.join(f'{v:.0f}' for v in full_box)}"
        raise ValueError(f"{place} lies {seen}, outside the image of {size[0]}x{size[1]}: leave the object out, or give its box")
    return box


def _parse_camera(value, size):
    """K (3, 3), plausible for an image of that (width, height); size None: not compared with an image."""
    K = _numbers(value, "K", (3, 3), "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels")
    if problem := camera_problem(K, *(size or (None, None))):
        raise ValueError(f"K: {problem}")
    return K


def _parse_image(value, folder, images):
    """Path of an image and, with images, for which it must be there, (width, height) from its header; else None."""
    if not _is_text(value) or not value:
        raise ValueError(f"image is {_short(value)}, expected a path relative to {folder}")
    path, size = folder / value, None
    try:
        there = path.is_file()
    except OSError as error:  # a name that no file system takes
        raise ValueError(f"image is {value[:80]!r}, expected a file: {error.strerror}") from None
    if images and not there:
        raise ValueError(f"image is {value[:80]!r}, expected a file: there is none of that name in {folder}")
    if images:
        try:
            with opened(path) as image:
                size = upright(image).size
        except OSError as error:
            raise ValueError(f"image is {value[:80]!r}, expected an image file: {shorten(str(error), 200)}") from None
        if min(size) < IMAGE_SIDES[0] or max(size) > IMAGE_SIDES[1]:
            raise ValueError(f"image {value!r} is {size[0]}x{size[1]}, expected sides from {IMAGE_SIDES[0]} to {IMAGE_SIDES[1]} pixels")
    return path, size


def _parse_id(frame):
    """The id given, or the image's path without suffix. It names result files, so it may not leave their folder."""
    if "id" not in frame:
        if not isinstance(frame["image"], str):
            return None  # reported with the image
        path = PureWindowsPath(os.path.splitext(frame["image"])[0])
        return "/".join(part for part in path.parts if part not in (path.anchor, ".."))
    id = frame["id"]
    path = PureWindowsPath(id if _is_text(id) else "")  # which knows both separators and drives
    if not path.parts or path.anchor or ".." in path.parts or max(len(part.encode()) for part in path.parts) > LONGEST_NAME:
        raise ValueError(f"id is {_short(id)}, expected text that can name a file, such as 'a/0001'")
    return id


def _numbers(value, place, shape, expected, allowed=None, limits=None):
    """JSON value -> float array of that shape; ValueError unless it is nested lists of numbers within limits (true is no number).

    limits: lowest and highest, told in the sentence; allowed: a further condition, which `expected` states.
    """
    low, high = limits or (-LARGEST, LARGEST)
    with contextlib.suppress(ValueError, OverflowError):  # ragged lists, integers beyond floats
        array = np.asarray(value, dtype=object)
        if array.shape == shape and all(type(v) in (int, float) for v in array.flat):
            array = array.astype(float)
            if ((low <= array) & (array <= high)).all() and (allowed is None or allowed(array)):  # nor are infinity and NaN
                return array
    raise ValueError(f"{place} is {_short(value)}, expected {expected}{f' from {low:g} to {high:g}' if limits else ''}")


def _is_text(value):
    """Whether a JSON value is text of any script that files and consoles take: no control characters, no halves of characters."""
    return isinstance(value, str) and not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _check_keys(entry, keys, place):
    """ValueError for keys that are missing or unknown, with the nearest valid one."""
    for key in (key for key in entry if key not in keys):
        lower = {known.lower(): known for known in keys}
        near = difflib.get_close_matches(key.lower(), lower, 1)
        hint = f"did you mean {lower[near[0]]!r}?" if near else f"expected {', '.join(keys)}"
        raise ValueError(f"{place} has an unknown key {key[:80]!r}; {hint}")
    missing = [key for key, required in keys.items() if required and key not in entry]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(repr(key) for key in missing)}; it has {', '.join(entry)[:200] or 'no keys'}")


def _refuse_constant(name):
    raise ValueError(f"it holds {name}, expected finite numbers")


def _rounded(values):
    """Floats to 6 decimals, as JSON holds them."""
    return np.round(np.asarray(values, float), 6).tolist()


def _short(value):
    """A JSON value as text of at most 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def main(arguments: list[str] | None = None) -> int:
    """Check one file from the command line. Returns the exit code: 0 good, 1 bad lines or a likely mistake, 2 no such file."""
    parser = argparse.ArgumentParser(description="Check a JSON-lines data file: every bad line by number, and a summary per class.")
    parser.add_argument("file", metavar="FILE.jsonl")
    parser.add_argument("--no-images", action="store_true", help="do not look at the image files; boxes that are left out are not derived")
    options = parser.parse_args(arguments)
    problems = []
    try:
        frames = read_frames(options.file, problems, images=not options.no_images)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    print(*problems, sep="\n", end="\n" if problems else "")
    bad = len({problem.partition(": ")[0] for problem in problems})
    print(f"{options.file}: {len(frames)} good frames, {bad} bad lines", *summarise(frames), sep="\n")
    sizes = np.full((len(frames), 2), np.nan) if options.no_images else image_sizes(frames)
    doubts, notes = diagnose(frames, sizes, source=Path(options.file))
    doubts = doubt_angles(problems) + doubts
    print(*(f"{options.file}: {sentence}" for sentence in notes + doubts), sep="\n", end="\n" if notes + doubts else "")
    return 1 if problems + doubts else 0


if __name__ == "__main__":
    sys.exit(main())
