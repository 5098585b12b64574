"""JSON lines, the way in for one's own data: one image a line with its camera and its objects; read, checked and written here.

    {"image": "a/0001.jpg", "K": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], "objects": [{"class": "Car", "center": [x, y, z],
     "size": [l, h, w], "yaw": r, "box": [x1, y1, x2, y2]}]}

Units and frames are those of geometry.py: metres in that image's camera frame, radians, pixels of the stored image. Image paths are
relative to the folder of the file. Optional for a frame: `id` (default: the path without its suffix) and `ignore` (a list of 2D regions
in which nothing is learned or counted). Optional for an object: `box` (default: the projected 3D box, clipped to the image), `truncation`
in [0, 1], `occlusion` 0-3, `ignore` (true: only its box is kept, as a region), `velocity` [x, y, z] m/s in the camera frame,
`attribute` (text), and what predictions add: `score` and `depth_sigma` (metres).

    python -m formats.jsonl FILE.jsonl [--no-images]      every bad line by number, and a summary per class
"""

import argparse
import codecs
import difflib
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from textwrap import shorten

import numpy as np

from frames import LARGEST, PLAUSIBLE, Frame, make_labels, opened, upright
from geometry import box_iou, camera_problem, clip_boxes, project_boxes, wrap_angle

FRAME_KEYS = {"image": True, "K": True, "objects": True, "id": False, "ignore": False}  # key: required
OBJECT_KEYS = {"class": True, "center": True, "size": True, "yaw": True, "box": False, "truncation": False, "occlusion": False,
               "ignore": False, "velocity": False, "attribute": False, "score": False, "depth_sigma": False}  # fmt: skip
COLUMNS = ("name", "box", "size", "center", "yaw", "truncation", "occlusion", "score", "sigma", "velocity", "attribute")
IMAGE_SIDES = 16, 32768  # pixels, smallest and largest believable side
LONGEST_NAME = 200  # bytes of a part of an id: file systems take 255


def read_frames(path: str | Path, problems: list[str] | None = None, images: bool = True) -> list[Frame]:
    """Every frame of a JSON-lines file: its objects, then its ignore regions as DontCare rows, in the image's own camera and pixels.

    Raises FileNotFoundError, or ValueError naming file, line, key, value and what was expected, for the first bad line; with a list
    `problems`, every bad line adds a sentence to it, and is left out. With images, each image's header is opened too.
    """
    frames = []
    for frame, wrong in _scan(path, images):
        if wrong and problems is None:
            raise ValueError(f"{wrong[0]} (python -m formats.jsonl {path} lists every bad line)")
        if wrong:
            problems += wrong
        else:
            frames.append(frame)
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
        entry = {"class": str(labels.name[i]), "center": _rounded(labels.center[i]), "size": _rounded(labels.size[i])}
        entry["yaw"] = _rounded(labels.yaw[i])
        if (labels.box[i, 2:] > labels.box[i, :2]).all():
            entry["box"] = _rounded(labels.box[i])
        if labels.truncation[i] >= 0:
            entry["truncation"] = _rounded(labels.truncation[i])
        if labels.occlusion[i] >= 0:
            entry["occlusion"] = int(labels.occlusion[i])
        if labels.velocity is not None and np.isfinite(labels.velocity[i]).all():
            entry["velocity"] = _rounded(labels.velocity[i])
        if labels.attribute is not None and labels.attribute[i]:
            entry["attribute"] = str(labels.attribute[i])
        sigma = labels.sigma is not None and np.isfinite(labels.sigma[i])
        if sigma or labels.score[i] != 1:
            entry["score"] = _rounded(labels.score[i])
        if sigma:
            entry["depth_sigma"] = _rounded(labels.sigma[i])
        line["objects"].append(entry)
    return line


def summarise(frames: Iterable[Frame]) -> list[str]:
    """One line per class, most frequent first: count, mean size, depth range, and how well `box` fits the projected 3D box.

    The fit is a median IoU over whole boxes; far below 0.9 it tells of a wrong K, size order, angle or height of the centre.
    """
    labels, fits = {}, {}
    for frame in frames:
        own = frame.labels
        full_box, crosses = project_boxes(own.center, np.maximum(own.size, 1e-3), own.yaw, frame.K)
        inside = (own.truncation <= 0) & (own.occlusion <= 0) & own.is_3d & ~crosses
        fit = np.where(inside, box_iou(own.box, full_box), np.nan)
        for i, name in enumerate(own.name):
            labels.setdefault(name, []).append(own[i])
            fits.setdefault(name, []).append(fit[i])
    lines = []
    for name, rows in sorted(labels.items(), key=lambda item: -len(item[1])):
        line = f"{name}: {len(rows)}"
        if rows[0].is_3d[0]:
            size = np.mean([row.size[0] for row in rows], 0)
            depth = [row.center[0, 2] for row in rows]
            line += f", mean l h w {size[0]:.2f} {size[1]:.2f} {size[2]:.2f} m, depth {min(depth):.1f} to {max(depth):.1f} m"
        if np.isfinite(fits[name]).any():
            line += f", 2D box fits 3D box at median IoU {np.nanmedian(fits[name]):.2f}"
        lines.append(line)
    return lines


def _scan(path: str | Path, images: bool) -> Iterator[tuple[Frame | None, list[str]]]:
    """(frame, problems) of each line, frame None when there are problems; blank lines are passed over."""
    path, seen, count = Path(path), {}, 0
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such JSON-lines file")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            count += 1
            frame, problems = _parse_line(raw.removeprefix(codecs.BOM_UTF8), path.parent, images)
            if frame is not None and frame.id in seen:
                problems = [f"id is {frame.id!r}, as on line {seen[frame.id]}, expected each id once"]
            elif frame is not None:
                seen[frame.id] = number
            yield (None if problems else frame), [f"{path}:{number}: {problem}" for problem in problems]
    if not count:
        yield None, [f"{path}: the file holds no frames, expected one JSON object a line"]


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
    image = attempt(_parse_image, frame["image"], folder, images)
    id = attempt(_parse_id, frame)
    size = attempt(_image_size, image, frame["image"]) if image is not None and images else None
    K = attempt(_parse_camera, frame["K"], size)
    for key in ("objects", "ignore"):
        if not isinstance(frame.get(key, []), list):
            problems.append(f"{key} is {_short(frame[key])}, expected a list")
            frame[key] = []
    rows = [attempt(_parse_object, entry, f"objects[{i}]", K, size) for i, entry in enumerate(frame["objects"])]
    rows += [
        attempt(lambda box, place: _region(_parse_box(box, place, size)), box, f"ignore[{i}]")
        for i, box in enumerate(frame.get("ignore", []))
    ]
    return (None, problems) if problems else (Frame(id, image, K, _make_labels(rows)), [])


def _make_labels(rows):
    """Rows as `_parse_object` and `_region` return them, objects first, then regions (stable). Returns Labels."""
    rows = sorted(rows, key=lambda row: row["name"] == "DontCare")
    columns = {key: [row[key] for row in rows] for key in COLUMNS}
    sigma, velocity = np.array(columns["sigma"], float), np.array(columns["velocity"], float).reshape(-1, 3)
    columns["sigma"] = sigma if np.isfinite(sigma).any() else None
    columns["velocity"] = velocity if np.isfinite(velocity).any() else None
    columns["attribute"] = np.array(columns["attribute"], dtype=object) if any(columns["attribute"]) else None
    labels = make_labels(**columns)
    labels.alpha[~labels.is_3d] = -10
    return labels


def _parse_object(entry, place, K, size):
    """One object as a dict of COLUMNS; a region if it is to be ignored. K and size may be None: then no box is derived."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {_short(entry)}, expected an object with {', '.join(OBJECT_KEYS)}")
    _check_keys(entry, OBJECT_KEYS, place)
    name = entry["class"]
    if not _is_text(name) or not name or name != name.strip():
        raise ValueError(f"{place}.class is {_short(name)}, expected a name")
    if name == "DontCare":
        raise ValueError(f"{place}.class is 'DontCare', expected a class; regions belong into the line's \"ignore\": [[x1, y1, x2, y2]]")
    get = lambda key, shape, expected: _numbers(entry[key], shape, f"{place}.{key}", expected, PLAUSIBLE.get(key))  # noqa: E731
    center = get("center", (3,), "3 numbers x, y, z in metres")
    extent = get("size", (3,), "3 numbers l, h, w in metres")
    yaw = get("yaw", (), "radians")
    box = np.zeros(4)
    if "box" in entry:
        box = _parse_box(entry["box"], f"{place}.box", size)
    elif K is not None and size is not None:
        box = _derive_box(center, extent, yaw, K, size, place)
    ignore = entry.get("ignore", False)
    if not isinstance(ignore, bool):
        raise ValueError(f"{place}.ignore is {_short(ignore)}, expected true or false")
    if ignore:
        return _region(box)
    return {
        "name": name,
        "box": box,
        "center": center,
        "size": extent,
        "yaw": float(yaw if -np.pi <= yaw < np.pi else wrap_angle(yaw)),
        "truncation": _optional(entry, "truncation", place, "a number from 0 to 1", -1.0, lambda v: 0 <= v <= 1),
        "occlusion": _optional(entry, "occlusion", place, "0, 1, 2 or 3", -1.0, lambda v: v in (0, 1, 2, 3)),
        "score": _optional(entry, "score", place, "a finite number", 1.0),
        "velocity": get("velocity", (3,), "3 finite numbers x, y, z in m/s") if "velocity" in entry else np.full(3, np.nan),
        "attribute": _optional_text(entry, "attribute", place),
        "sigma": _optional(entry, "depth_sigma", place, "metres > 0", np.nan, lambda v: v > 0),
    }


def _region(box):
    """The columns of a DontCare row, with KITTI's fill values."""
    absent = {"truncation": -1.0, "occlusion": -1.0, "score": 1.0, "velocity": np.full(3, np.nan), "attribute": "", "sigma": np.nan}
    return {"name": "DontCare", "box": box, "center": np.full(3, -1000.0), "size": np.full(3, -1.0), "yaw": -10.0, **absent}


def _parse_box(value, place, size):
    """A 2D box (4,), clipped to the image when its (width, height) is known."""
    box = _numbers(value, (4,), place, "4 numbers x1, y1, x2, y2 in pixels", PLAUSIBLE["box"])
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
    K = _numbers(value, (3, 3), "K", "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels")
    if problem := camera_problem(K, *(size or (None, None))):
        raise ValueError(f"K: {problem}")
    return K


def _parse_image(value, folder, images):
    """Path of an image that is there (with images)."""
    if not _is_text(value) or not value:
        raise ValueError(f"image is {_short(value)}, expected a path relative to {folder}")
    path = folder / value
    try:
        there = path.is_file()
    except OSError as error:  # a name that no file system takes
        raise ValueError(f"image is {value[:80]!r}, expected a file: {error.strerror}") from None
    if images and not there:
        raise ValueError(f"image is {value[:80]!r}, expected a file: there is none of that name in {folder}")
    return path


def _image_size(path, name):
    """(width, height) from the image's header."""
    try:
        with opened(path) as image:
            size = upright(image).size
    except OSError as error:
        raise ValueError(f"image is {name[:80]!r}, expected an image file: {shorten(str(error), 200)}") from None
    if min(size) < IMAGE_SIDES[0] or max(size) > IMAGE_SIDES[1]:
        raise ValueError(f"image {name!r} is {size[0]}x{size[1]}, expected sides from {IMAGE_SIDES[0]} to {IMAGE_SIDES[1]} pixels")
    return size


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


def _numbers(value, shape, place, expected, limits=None):
    """JSON value -> float array of that shape; ValueError unless it is nested lists of numbers within limits (true is no number)."""
    low, high = limits or (-LARGEST, LARGEST)
    try:
        array = np.asarray(value, dtype=object)
        if array.shape == shape and all(type(v) in (int, float) for v in array.flat):
            array = array.astype(float)
            if ((low <= array) & (array <= high)).all():  # nor are infinity and NaN
                return array
    except (ValueError, OverflowError):  # ragged lists, integers beyond floats
        pass
    raise ValueError(f"{place} is {_short(value)}, expected {expected}{f' from {low:g} to {high:g}' if limits else ''}")


def _optional(entry, key, place, expected, default, allowed=lambda value: True):
    """A number that may be left out; ValueError unless `allowed` holds for it."""
    if key not in entry:
        return default
    value = float(_numbers(entry[key], (), f"{place}.{key}", expected))
    if not allowed(value):
        raise ValueError(f"{place}.{key} is {_short(entry[key])}, expected {expected}")
    return value


def _optional_text(entry, key, place):
    value = entry.get(key, "")
    if not _is_text(value):
        raise ValueError(f"{place}.{key} is {_short(value)}, expected text")
    return value


def _is_text(value):
    """Whether a JSON value is text of any script that files and consoles take: no control characters, no halves of characters."""
    return isinstance(value, str) and not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _check_keys(entry, keys, place):
    """ValueError for keys that are missing or unknown, with the nearest valid one."""
    for key in entry:
        if key not in keys:
            near = difflib.get_close_matches(key.lower(), [k.lower() for k in keys], 1, 0.6)
            hint = f"did you mean {next(k for k in keys if k.lower() == near[0])!r}?" if near else f"expected {', '.join(keys)}"
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
    """Check one file from the command line. Returns the exit code: 0 good, 1 bad lines, 2 no such file."""
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
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
