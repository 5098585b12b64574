"""JSON lines, the way in for one's own data: one image a line with its camera and its objects; read, checked and written here.

    {"image": "a/0001.jpg", "K": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], "objects": [{"class": "Car", "center": [x, y, z],
     "size": [l, h, w], "yaw": r, "box": [x1, y1, x2, y2]}]}

Units and frames are those of geometry.py: metres in that image's camera frame, radians, pixels of the picture as viewers show it, turned
where its EXIF says so. Image paths are relative to the folder of the file. Optional for a frame: `id` (default: the path without its
suffix) and `ignore` (a list of 2D regions in which nothing is learned or counted). Optional for an object: `box` (default: the projected
3D box, clipped to the image), `truncation` in [0, 1], `occlusion` 0-3, `ignore` (true: only its box is kept, as a region), `velocity` [x,
y, z] m/s in the camera frame, `attribute` (text), and what predictions add: `score` and `depth_sigma` (metres). An image may be a member
of an uncompressed tar, `shards/0001.tar/000123.jpg`. Objects and regions that cannot be seen are left out and counted: those outside the
image, behind the camera, or centred there without a box that meets the image.

    python -m formats.jsonl FILE.jsonl [--no-images] [--dropped]      every bad line by number, a summary per class, and likely mistakes
"""

import argparse
import codecs
import contextlib
import dataclasses
import difflib
import gc
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PureWindowsPath
from textwrap import shorten

import numpy as np

from formats.diagnosis import diagnose, doubt_angles, image_sizes
from formats.index import Chunk, Part, Reading, chunk_of, find_columns
from formats.video import SUFFIXES
from scene.frames import LARGEST, PLAUSIBLE, Frame, find_member, image_size, in_tar, join, make_labels
from scene.geometry import box_iou, camera_problem, clip_boxes, project_boxes, wrap_angle

FRAME_KEYS = {"image": True, "K": True, "objects": True, "id": False, "ignore": False}  # key: required
OBJECT_KEYS = {"class": True, "center": True, "size": True, "yaw": True, "box": False, "truncation": False, "occlusion": False,
               "ignore": False, "velocity": False, "attribute": False, "score": False, "depth_sigma": False}  # fmt: skip
NUMBERS = {  # key of an object: shape, what is expected, and what else holds for numbers that are
    "center": ((3,), "3 numbers x, y, z in metres", None),
    "size": ((3,), "3 numbers l, h, w in metres", None),
    "yaw": ((), "radians", None),
    "truncation": ((), "a number from 0 to 1", lambda v: (v >= 0) & (v <= 1)),
    "occlusion": ((), "0, 1, 2 or 3", lambda v: np.isin(v, (0, 1, 2, 3))),
    "score": ((), "a finite number", None),
    "velocity": ((3,), "3 finite numbers x, y, z in m/s", None),
    "depth_sigma": ((), "metres > 0", lambda v: v > 0),
}
ABSENT = {
    "truncation": -1.0,
    "occlusion": -1.0,
    "score": 1.0,
    "velocity": np.full(3, np.nan),
    "attribute": "",
    "sigma": np.nan,
}
REGION = {
    "name": "DontCare",
    "center": np.full(3, -1000.0),
    "size": np.full(3, -1.0),
    "yaw": -10.0,
    **ABSENT,
}  # KITTI's fill values
IMAGE_SIDES = 16, 32768  # pixels, smallest and largest believable side
LONGEST_NAME = 200  # bytes of a part of an id: file systems take 255
PLAIN_ID = re.compile(
    r"(?!\.\.?(/|$))[\w. +=@-]{1,50}((?<!\.txt)/(?!\.\.?(/|$))[\w. +=@-]{1,50})*"
)  # paths that are ids as they are
AT_ONCE = 1 << 20  # bytes of a file that a process reads together


class Unseen(ValueError):
    """An object or a region that cannot be seen in its image: no mistake, but nothing to learn from."""


def read_frames(
    path: str | Path, problems: list[str] | None = None, images: bool = True, dropped: list[str] | None = None
) -> list[Frame]:
    """Every frame of a JSON-lines file: its objects, then its ignore regions as DontCare rows, in the image's own camera and pixels.

    Raises FileNotFoundError, or ValueError naming file, line, key, value and what was expected, for the first bad line; with a list
    `problems`, every bad line adds a sentence to it, and is left out. With images, each image's header is opened too. A list `dropped`
    gets a sentence for each object that cannot be seen.
    """
    path, frames, seen, count = Path(path), [], {}, 0  # seen: id -> number of its line
    _find_file(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            count += 1
            unseen = []
            frame, wrong = _parse_line(raw.removeprefix(codecs.BOM_UTF8), path.parent, images, unseen)
            if frame is not None and frame.id in seen:
                wrong = [f"id is {frame.id!r}, as on line {seen[frame.id]}, expected each id once"]
            if wrong:
                _report(path, [f"{path}:{number}: {problem}" for problem in wrong], problems)
            else:
                seen[frame.id] = number
                frames.append(frame)
                if dropped is not None:
                    dropped += [f"{path}:{number}: {sentence}" for sentence in unseen]
    if not count:
        _report(path, [f"{path}: the file holds no frames, expected one JSON object a line"], problems)
    return frames


def _find_file(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()}: no such JSON-lines file")


def _report(path, sentences, problems=None):
    """Add sentences to a list of problems, or raise the first of them where there is no list."""
    if problems is None:
        raise ValueError(f"{sentences[0]} (python -m formats.jsonl {path} lists every bad line)")
    problems.extend(sentences)


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
    image = frame.image
    if (
        folder is not None
    ):  # links resolved, as '..' leads elsewhere from one; but not the image's own, whose name is what counts
        image = os.path.relpath(os.path.join(os.path.realpath(image.parent), image.name), os.path.realpath(folder))
    line = {"image": Path(image).as_posix(), "K": np.asarray(frame.K, float).tolist(), "objects": [], "id": frame.id}
    for i in range(len(labels)):
        if not labels.is_3d[i]:
            line.setdefault("ignore", []).append(_rounded(labels.box[i]))
            continue
        entry = {"class": str(labels.name[i])} | {
            key: _rounded(getattr(labels, key)[i]) for key in ("center", "size", "yaw")
        }
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


def _parse_line(raw: bytes, folder: Path, images: bool, unseen: list[str]) -> tuple[Frame | None, list[str]]:
    """A frame, or None and all that is wrong with the line; `unseen` gets a sentence for each object and region that is left out.

    Without images, boxes that are left out stay empty.
    """
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
        except Unseen as found:
            unseen.append(str(found))
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
    rows += [None if box is None else {**REGION, "box": box} for box in boxes]
    return Frame(id, image, K, _make_labels([row for row in rows if row is not None])), []


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
        raise ValueError(
            f"{place}.class is 'DontCare', expected a class; regions belong into the line's \"ignore\": [[x1, y1, x2, y2]]"
        )
    number = lambda key: _numbers(entry[key], f"{place}.{key}", *NUMBERS[key], PLAUSIBLE.get(key))  # noqa: E731
    center, extent, yaw = number("center"), number("size"), number("yaw")
    ignore = entry.get("ignore", False)
    if not isinstance(ignore, bool):
        raise ValueError(f"{place}.ignore is {_short(ignore)}, expected true or false")
    if not _is_text(entry.get("attribute", "")):
        raise ValueError(f"{place}.attribute is {_short(entry['attribute'])}, expected text")
    optional = {"sigma" if key == "depth_sigma" else key: number(key) for key in NUMBERS if key in entry}
    box = np.zeros(4)
    if "box" in entry:
        box = _parse_box(entry["box"], f"{place}.box", size)
    elif K is not None and size is not None:
        box = _derive_box(center, extent, yaw, K, size, place)
    if ignore:
        return {**REGION, "box": box}
    given = {
        "name": name,
        "box": box,
        "center": center,
        "size": extent,
        "yaw": yaw if -np.pi <= yaw < np.pi else wrap_angle(yaw),
    }
    return ABSENT | {"attribute": entry.get("attribute", "")} | optional | given


def _parse_box(value, place, size):
    """A 2D box (4,), clipped to the image when its (width, height) is known. Raises `Unseen` where nothing is left."""
    box = _numbers(value, place, (4,), "4 numbers x1, y1, x2, y2 in pixels", limits=PLAUSIBLE["box"])
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"{place} is {_short(value)}, expected x1 < x2 and y1 < y2")
    if size is None:
        return box
    clipped = clip_boxes(box, *size)
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise Unseen(f"{place} is {_short(value)}, which does not meet the image of {size[0]}x{size[1]}")
    return clipped


def _derive_box(center, extent, yaw, K, size, place):
    """The projected 3D box clipped to the image, (4,). Raises `Unseen`."""
    full_box = project_boxes(center[None], extent[None], yaw[None], K)[0][0]
    box = clip_boxes(full_box, *size)
    if center[2] <= 0:
        raise Unseen(f"{place} is centred behind the camera, at z = {center[2]:g} m, and has no box")
    if not (box[0] < box[2] and box[1] < box[3]):
        raise Unseen(
            f"{place} lies at pixels {', '.join(f'{v:.0f}' for v in full_box)}, outside the image of {size[0]}x{size[1]}"
        )
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
        there = path.is_file() or in_tar(path)
    except OSError as error:  # a name that no file system takes
        raise ValueError(f"image is {value[:80]!r}, expected a file: {error.strerror}") from None
    if images and not there:
        raise ValueError(f"image is {value[:80]!r}, expected a file: there is none of that name in {folder}")
    if images:
        try:
            size = image_size(path)
        except OSError as error:
            if path.suffix.lower() in SUFFIXES:  # as predict.py writes of the frames of one
                raise ValueError(
                    f"image is {value[:80]!r}, a video, expected an image file; --no-images checks all else"
                ) from None
            raise ValueError(f"image is {value[:80]!r}, expected an image file: {shorten(str(error), 200)}") from None
        if min(size) < IMAGE_SIDES[0] or max(size) > IMAGE_SIDES[1]:
            raise ValueError(
                f"image {value!r} is {size[0]}x{size[1]}, expected sides from {IMAGE_SIDES[0]} to {IMAGE_SIDES[1]} pixels"
            )
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
    if (
        not path.parts
        or path.anchor
        or ".." in path.parts
        or max(len(part.encode()) for part in path.parts) > LONGEST_NAME
    ):
        raise ValueError(f"id is {_short(id)}, expected text that can name a file, such as 'a/0001'")
    if any(part.endswith(".txt") for part in path.parts[:-1]):
        raise ValueError(f"id is {_short(id)}, expected no folder whose name ends in .txt")
    return "/".join(path.parts)  # a/./b and a//b are a/b


def _numbers(value, place, shape, expected, allowed=None, limits=None):
    """JSON value -> float array of that shape; ValueError unless it is nested lists of numbers within limits (true is no number).

    limits: lowest and highest, told in the sentence; allowed: a further condition, which `expected` states.
    """
    low, high = limits or (-LARGEST, LARGEST)
    with contextlib.suppress(ValueError, OverflowError):  # ragged lists, integers beyond floats
        array = np.asarray(value, dtype=object)
        if array.shape == shape and all(type(v) in (int, float) for v in array.flat):
            array = array.astype(float)
            if ((low <= array) & (array <= high)).all() and (
                allowed is None or np.all(allowed(array))
            ):  # nor are infinity and NaN
                return array
    raise ValueError(f"{place} is {_short(value)}, expected {expected}{f' from {low:g} to {high:g}' if limits else ''}")


def _is_text(value):
    """Whether a JSON value is text of any script that files and consoles take: no control characters, no halves of characters."""
    if not isinstance(value, str):
        return False
    return value.isprintable() or not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _check_keys(entry, keys, place):
    """ValueError for keys that are missing or unknown, with the nearest valid one."""
    for key in (key for key in entry if key not in keys):
        lower = {known.lower(): known for known in keys}
        near = difflib.get_close_matches(key.lower(), lower, 1)
        hint = f"did you mean {lower[near[0]]!r}?" if near else f"expected {', '.join(keys)}"
        raise ValueError(f"{place} has an unknown key {key[:80]!r}; {hint}")
    missing = [key for key, required in keys.items() if required and key not in entry]
    if missing:
        raise ValueError(
            f"{place} lacks {', '.join(repr(key) for key in missing)}; it has {', '.join(entry)[:200] or 'no keys'}"
        )


def _refuse_constant(name):
    raise ValueError(f"it holds {name}, expected finite numbers")


def _rounded(values):
    """Floats to 6 decimals, as JSON holds them."""
    return np.round(np.asarray(values, float), 6).tolist()


def _short(value):
    """A JSON value as text of at most 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- many lines at once


def open_frames(path: str | Path, folder: str = "", limit: int = 0, workers: int = 1) -> Part:
    """The frames of a file, of at least its first `limit` lines, from their index (`find_columns`). Raises what `read_frames` raises."""
    how = reading(path)
    columns = find_columns(how, folder, limit, workers)
    part = Part(columns, how.folder, len(columns))
    _check_whole(path, part.count, part.columns.repeated(part.count))
    return part


def reading(path: str | Path) -> Reading:
    """How an index reads a file. Raises FileNotFoundError."""
    path = Path(path)
    _find_file(path)
    length = path.stat().st_size
    starts = range(0, max(length, 1), AT_ONCE)
    return Reading(
        source=path,
        choice="jsonl",
        folder=path.parent,
        made_from=partial(_made_from, path),
        jobs=[(start, min(start + AT_ONCE, length)) for start in starts],
        read=partial(read_chunk, path),
        unit="B",
        sizes=[min(AT_ONCE, length - start) for start in starts],
    )


def _made_from(path):
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def read_chunk(path: Path, bounds: tuple[int, int]) -> Chunk:
    """`Chunk` of the lines that begin at a byte from start to before stop. Raises what `read_frames` raises, for the first bad line."""
    start, stop = bounds
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            start += len(file.readline()) - 1  # the rest of a line that is another job's
        lines = file.read(max(0, stop - start)).split(b"\n")
        if lines[-1]:
            lines[-1] += file.readline().rstrip(b"\n")
    if bounds[0] == 0:
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
    collecting = gc.isenabled()
    gc.disable()  # it would look through all that was read, again and again, for a third of the time
    try:
        return _read_together([line for line in lines if line.strip()], path.parent)
    except (
        ValueError,
        KeyError,
        TypeError,
        OSError,
        RecursionError,
        OverflowError,
    ):  # something is wrong or unusual: line by line
        return _read_singly(path, start, lines)
    finally:
        if collecting:
            gc.enable()


def _read_singly(path, start, lines):
    """The chunk of lines that begin at a byte of a file, by `_parse_line`, which says what is wrong with one."""
    frames, sizes, places, dropped, values, tars = [], [], [], [], [], set()
    for number, raw in enumerate(lines):
        if not raw.strip():
            continue
        raw += b"\n" * (number + 1 < len(lines))  # which counts where an error says how far it came
        frame, wrong = _parse_line(raw.removeprefix(codecs.BOM_UTF8), path.parent, True, unseen := [])
        if wrong:
            with open(path, "rb") as file:
                before = sum(file.read(min(1 << 20, start - at)).count(b"\n") for at in range(0, start, 1 << 20))
            _report(path, [f"{path}:{before + number + 1}: {problem}" for problem in wrong])
        frames.append(frame)
        values.append(json.loads(raw.removeprefix(codecs.BOM_UTF8))["image"])
        tar, place = find_member(frame.image) if in_tar(frame.image) else (None, (0, 0))
        tars |= {str(tar)} if tar else set()
        places.append(place)
        sizes.append(image_size(frame.image))
        dropped.append(len(unseen))
    numbers = {"image_size": sizes, "place": places, "dropped": dropped}
    numbers = {
        name: np.array(rows, np.int64).reshape(len(frames), *np.shape(rows)[1:]) for name, rows in numbers.items()
    }
    return dataclasses.replace(chunk_of(frames), image=values, tars=frozenset(tars), **numbers)


def _read_together(lines, folder):
    """The chunk of lines of which all is usual, checked in columns; else one of many errors, and `_read_singly` says what is wrong.

    Takes nothing that `_parse_line` refuses: a new rule goes there first, then in here.
    """
    decode = json.JSONDecoder(parse_constant=_refuse_constant).decode
    frames = [decode(line.decode("utf-8")) for line in lines]
    _expect({dict}.issuperset(map(type, frames)) and all(_known(keys, FRAME_KEYS) for keys in set(map(tuple, frames))))
    images, objects = [frame["image"] for frame in frames], [frame["objects"] for frame in frames]
    regions = [frame.get("ignore", []) for frame in frames]
    _expect(all({list}.issuperset(map(type, column)) for column in (objects, regions)))
    found = [_find_image(folder, value) for value in images]
    sizes, places = (
        np.array([own[0] for own in found]).reshape(-1, 2),
        np.array([own[1] for own in found]).reshape(-1, 2),
    )
    rows = _columns(list(itertools.chain.from_iterable(frame["K"] for frame in frames)), (3,))
    _expect(len(rows) == 3 * len(frames) and all(len(frame["K"]) == 3 and type(frame["K"]) is list for frame in frames))
    K = rows.reshape(-1, 3, 3)
    cameras = {(camera.tobytes(), size): camera for camera, size in zip(K, map(tuple, sizes.tolist()), strict=True)}
    _expect(not any(camera_problem(camera, *size) for (_, size), camera in cameras.items()))

    counts, region_counts = np.array([len(own) for own in objects], int), np.array([len(own) for own in regions], int)
    owner, region_owner = np.repeat(np.arange(len(frames)), counts), np.repeat(np.arange(len(frames)), region_counts)
    columns, ignored, given = _object_columns(list(itertools.chain.from_iterable(objects)))
    region_boxes = _columns(list(itertools.chain.from_iterable(regions)), (4,), PLAUSIBLE["box"])
    boxes = columns.pop("box")
    derived, _ = project_boxes(
        columns["center"][~given], columns["size"][~given], columns["yaw"][~given], K[owner[~given]]
    )
    boxes[~given] = derived
    yaw = columns["yaw"]
    columns["yaw"] = np.where((-np.pi <= yaw) & (yaw < np.pi), yaw, wrap_angle(yaw))
    told = np.concatenate([given, np.ones(len(region_boxes), bool)])
    boxes, owner = np.concatenate([boxes, region_boxes]), np.concatenate([owner, region_owner])
    _expect((boxes[told, :2] < boxes[told, 2:]).all())
    boxes = np.clip(boxes, 0, np.tile(sizes[owner] - 1, 2))
    seen = (boxes[:, :2] < boxes[:, 2:]).all(1)
    seen[: len(given)] &= given | (columns["center"][:, 2] > 0)

    area = np.concatenate([ignored, np.ones(len(region_boxes), bool)])
    order = np.lexsort((area, owner))
    order = order[seen[order]]
    for name, blank in REGION.items():
        values = np.full((len(area), *np.shape(blank)), blank, dtype=object if isinstance(blank, str) else float)
        values[: len(given)][~ignored] = columns[name][~ignored]
        columns[name] = values[order]
    columns["attribute"] = columns["attribute"] if any(columns["attribute"]) else None
    labels = make_labels(box=boxes[order], **columns)
    labels.alpha[~labels.is_3d] = -10
    return Chunk(
        id=[_find_id(frame) for frame in frames],
        image=images,
        K=K,
        image_size=sizes,
        count=np.bincount(owner[seen], minlength=len(frames)),
        labels=labels,
        dropped=np.bincount(owner[~seen], minlength=len(frames)),
        place=places,
        tars=frozenset(own[2] for own in found if own[2]),
    )


def _object_columns(entries):
    """Columns of objects (m,) as `_parse_object` has them, box NaN where none is given; which are to be ignored, which have a box."""
    _expect({dict}.issuperset(map(type, entries)))
    kinds = set(map(tuple, entries))
    _expect(all(_known(keys, OBJECT_KEYS) for keys in kinds))
    names, there = [entry["class"] for entry in entries], set(itertools.chain.from_iterable(kinds))
    _expect(all(_is_text(name) and name and name == name.strip() and name != "DontCare" for name in set(names)))
    columns = {"name": np.array(names, dtype=object)}
    for key in (*NUMBERS, "box"):
        shape, _, allowed = NUMBERS.get(key, ((4,), "", None))
        column = "sigma" if key == "depth_sigma" else key
        rows = (
            [entry[key] for entry in entries if key in entry]
            if key in there or key in ("center", "size", "yaw")
            else []
        )
        values = _columns(rows, shape, PLAUSIBLE.get(key))
        _expect(allowed is None or bool(np.all(allowed(values))))
        if len(rows) < len(entries):
            mine = np.array([key in entry for entry in entries], bool) if rows else np.zeros(len(entries), bool)
            columns[column] = np.full((len(entries), *shape), np.nan if key == "box" else ABSENT[column])
            columns[column][mine] = values
        else:
            columns[column] = values
    attributes = [entry.get("attribute", "") for entry in entries] if "attribute" in there else [""] * len(entries)
    _expect(all(map(_is_text, set(attributes))))
    columns["attribute"] = np.array(attributes, dtype=object)
    ignored = [entry.get("ignore", False) for entry in entries] if "ignore" in there else [False] * len(entries)
    _expect({bool}.issuperset(map(type, ignored)))
    return columns, np.array(ignored, bool), ~np.isnan(columns["box"][:, 0])


def _columns(rows, shape, limits=None):
    """JSON values (m,) as floats (m, *shape): numbers, or lists of so many numbers, within limits. Raises ValueError or TypeError."""
    if shape:
        _expect({list}.issuperset(map(type, rows)) and {shape[0]}.issuperset(map(len, rows)))
        rows = list(itertools.chain.from_iterable(rows))
    _expect({int, float}.issuperset(map(type, rows)))
    values = np.array(rows, float).reshape(-1, *shape)
    low, high = limits or (-LARGEST, LARGEST)
    _expect(((low <= values) & (values <= high)).all())
    return values


def _expect(condition):
    if not condition:
        raise ValueError


def _known(found, keys):
    """Whether all keys that were found are known, and none that must be there is missing."""
    return keys.keys() >= set(found) >= {key for key, required in keys.items() if required}


def _find_id(frame):
    """`_parse_id`, at once for the ids and paths that most files have."""
    id = frame["id"] if "id" in frame else os.path.splitext(frame["image"])[0]
    return id if isinstance(id, str) and PLAIN_ID.fullmatch(id) else _parse_id(frame)


def _find_image(folder, value):
    """Size of an image (width, height), its place in a tar, or zeros, and that tar, or ''. Raises OSError or ValueError."""
    _expect(_is_text(value) and value)
    path, place, tar = os.path.join(folder, value), None, ""
    if in_tar(path):
        tar, place = find_member(path)
    size = image_size(path, place)
    _expect(min(size) >= IMAGE_SIDES[0] and max(size) <= IMAGE_SIDES[1])
    return size, place or (0, 0), str(tar)


def _check_whole(path, count, twice):
    """Raise what `read_frames` raises for a file that holds no frames, or an id twice: (the id, how often)."""
    if not count:
        _report(path, [f"{path}: the file holds no frames, expected one JSON object a line"])
    if twice is None:
        return
    lines = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip() and _find_id(json.loads(raw.decode("utf-8-sig"))) == twice[0]:
                lines.append(number)
                if len(lines) == 2:
                    break
    _report(path, [f"{path}:{lines[-1]}: id is {twice[0]!r}, as on line {lines[0]}, expected each id once"])


def main(arguments: list[str] | None = None) -> int:
    """Check one file from the command line. Returns the exit code: 0 good, 1 bad lines or a likely mistake, 2 no such file."""
    parser = argparse.ArgumentParser(
        description="Check a JSON-lines data file: every bad line by number, and a summary per class."
    )
    parser.add_argument("file", metavar="FILE.jsonl")
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="do not look at the image files; boxes that are left out are not derived",
    )
    parser.add_argument(
        "--dropped", action="store_true", help="name every object that is left out because it cannot be seen"
    )
    options = parser.parse_args(arguments)
    problems, dropped = [], []
    try:
        frames = read_frames(options.file, problems, not options.no_images, dropped)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    told = problems + dropped if options.dropped else problems
    print(*told, sep="\n", end="\n" if told else "")
    bad = len({problem.partition(": ")[0] for problem in problems})
    unseen = f", {len(dropped)} objects that cannot be seen left out" if dropped else ""
    print(f"{options.file}: {len(frames)} good frames, {bad} bad lines{unseen}", *summarise(frames), sep="\n")
    sizes = np.full((len(frames), 2), np.nan) if options.no_images else image_sizes(frames)
    doubts, notes = diagnose(frames, sizes, source=Path(options.file))
    doubts = doubt_angles(problems) + doubts
    print(*(f"{options.file}: {sentence}" for sentence in notes + doubts), sep="\n", end="\n" if notes + doubts else "")
    return 1 if problems + doubts else 0


if __name__ == "__main__":
    sys.exit(main())
