"""JSON lines, the way in for one's own data: one image a line with its camera and its objects; read and checked here.

    {"image": "a/0001.jpg", "K": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]],
     "objects": [{"class": "Car", "center": [x, y, z], "size": [l, h, w], "yaw": r, "box": [x1, y1, x2, y2]}]}

Units and frames are those of scene/geometry.py: metres in that image's camera frame, radians, pixels of the picture as
viewers show it, turned where its EXIF says so. Image paths are relative to the folder of the file. Optional for a
frame: `id` (default: the path without its suffix), `ignore` (a list of 2D regions in which nothing is learned or
counted), and `width` and `height`, which the picture must have then. Optional for an object: `box` (default: the
projected 3D box, clipped to the image), `truncation` in [0, 1], `occlusion` 0-3, `ignore` (true: only its box is kept,
as a region), `velocity` [x, y, z] m/s in the camera frame, `attribute` (text), and what predictions add: `score` and
`depth_sigma` (metres). An image may be a member of an uncompressed tar, `shards/0001.tar/000123.jpg`. Objects and
regions that cannot be seen are left out and counted: those outside the image, and objects centred behind the camera
without a `box` that meets the image. Pictures must be undistorted.

    python -m formats.jsonl FILE.jsonl [--no-images] [--dropped]      every bad line by number, and a summary per class
"""

import argparse
import difflib
import json
import mimetypes
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from operator import itemgetter
from pathlib import Path, PureWindowsPath
from textwrap import shorten

import numpy as np

from formats.columns import read_numbers
from formats.odd import distortion_problem
from scene.frames import LARGEST, PLAUSIBLE, Frame, Labels, UserError, image_size, join, make_labels
from scene.geometry import camera_problem, project_boxes, wrap_angle

METRICS = "kitti"  # that frames are judged by
FIELDS = ()  # of data.Source that are read, beside those that every format reads

FRAME_KEYS = {"image": True, "K": True, "objects": True}  # key: required
FRAME_KEYS |= {"id": False, "ignore": False, "width": False, "height": False}
RULES = {  # key of a line or an object: shape of its numbers, what is expected, what else holds, its value if absent
    "K": ((3, 3), "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels", None, None),
    "class": (None, "a name", lambda v: _is_text(v) and v not in ("", "DontCare") and v == v.strip(), "DontCare"),
    "center": ((3,), "3 numbers x, y, z in metres", None, -1000.0),
    "size": ((3,), "3 numbers l, h, w in metres", None, -1.0),
    "yaw": ((), "radians", None, -10.0),
    "box": ((4,), "4 numbers x1, y1, x2, y2 in pixels", None, np.nan),
    "truncation": ((), "a number from 0 to 1", lambda v: (v >= 0) & (v <= 1), -1.0),
    "occlusion": ((), "0, 1, 2 or 3", lambda v: np.isin(v, (0, 1, 2, 3)), -1.0),
    "ignore": (None, "true or false", lambda v: type(v) is bool, False),
    "velocity": ((3,), "3 finite numbers x, y, z in m/s", None, np.nan),
    "attribute": (None, "text", lambda v: _is_text(v), ""),
    "score": ((), "a finite number", None, 1.0),
    "depth_sigma": ((), "metres > 0", lambda v: v > 0, np.nan),
}
PLAIN = {"class": "-", "center": [0, 0, 1], "size": [1, 1, 1], "yaw": 0}  # read in place of an object that is none
OBJECT_KEYS = {key: key in PLAIN for key in RULES if key != "K"}  # key: required
LONGEST_NAME = 200  # bytes of a part of an id: file systems take 255
AT_ONCE = 1 << 20  # bytes of a file that are read together


def frames(source, config, problems: list[str] | None = None) -> Sequence[Frame]:
    """The frames of a `data.Source`; all of them come from an index where that is wanted. Raises as `read_frames`."""
    path = Path(source.root or config.root)
    if problems is not None or source.limit or config.index == "none" or not find_spec("formats.index"):
        return read_frames(path, problems, limit=source.limit)
    index = import_module("formats.index")
    plan = index.Plan(
        source=path,
        choice="jsonl",
        folder=path.parent,
        made_from=lambda: "{0.st_size} {0.st_mtime_ns}".format(os.stat(path)),
        jobs=_starts(path),
        read=partial(read_block, path),
        repeated=partial(read_frames, path, images=False),
        unit="MB",
    )
    return index.frames(plan, config.index)


def read_frames(path: str | Path, problems=None, images=True, limit=0) -> list[Frame]:
    """The first `limit` frames of a file (0: all), objects before ignore regions (DontCare), in pixels of the image.

    Raises UserError naming file, line, key, value and what was expected, for the first bad line; with a list
    `problems`, every bad line adds its sentences to it, and is left out. With images, each image's header is opened;
    without, boxes that are left out stay empty.
    """
    path = Path(path)
    frames, line_of, number = [], {}, 1  # line_of: id -> line
    starts = _starts(path)
    if problem := _whole_problem(path):
        _report(path, [(1, problem)], problems)
        return []
    for start in starts:
        lines = _lines(path, start)
        block, sentences = _read_lines(lines, path.parent, number, images)
        for line, frame in block:
            first = line_of.setdefault(frame.id, line)
            if first == line:
                frames.append(frame)
            else:
                sentences.append((line, f"id is {frame.id!r}, as on line {first}, expected each id once"))
        _report(path, sentences, problems)
        number += len(lines)
        if limit and len(frames) >= limit:
            return frames[:limit]
    if not frames and not problems:
        _report(path, [(1, "the file holds no frames, expected one JSON object a line")], problems)
    return frames


def read_block(path: Path, start: int) -> list[Frame]:
    """The frames of those lines that begin within AT_ONCE bytes. Raises as `read_frames` does."""
    block, sentences = _read_lines(_lines(path, start), path.parent)
    if sentences:
        read_frames(path)  # knows the number of the first bad line; or an image has come since
        raise UserError(f"{path}: {sentences[0][1]}; it no longer does, start again")
    return [frame for _, frame in block]


def _starts(path):
    if not path.is_file():
        raise UserError(f"{path.absolute()}: no such JSON-lines file")
    return range(0, max(1, os.stat(path).st_size), AT_ONCE)


def _whole_problem(path):
    """What is wrong with a file that is one JSON value instead of one a line, told from its first line, or None."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"").decode("utf-8-sig", "replace").strip()
    if re.match(r"\[\s*(\{|$)", first):
        return "the file is one JSON array, expected an object a line: jq -c '.[]' FILE writes it so"
    try:
        entry = json.loads(first)
    except (ValueError, RecursionError):
        if first[:1] == "{" and first[-1] in "{[,":
            return "the line ends within an object, expected a whole one on each line: jq -c . FILE writes them so"
    else:
        if isinstance(entry, dict) and {"images", "annotations"} <= entry.keys():
            return (
                "the file is one of Omni3D's or COCO's form; python -m formats.omni3d FILE OUT.jsonl converts Omni3D's"
            )
    return None


def _lines(path, start):
    """The lines of a file that begin within AT_ONCE bytes from a byte on, without their ends."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that is another block's
        lines = file.read(max(0, start + AT_ONCE - file.tell())).split(b"\n")
        if lines[-1]:
            lines[-1] += file.readline().rstrip(b"\n")
    return lines if lines[-1] else lines[:-1]


def _report(path, sentences, problems):
    """Add (line, sentence)s to a list of problems, or raise the first of them where there is no list."""
    texts = [f"{path}:{line}: {text}" for line, text in sorted(sentences, key=itemgetter(0))]
    if problems is not None:
        problems += texts
    elif texts:
        raise UserError(f"{texts[0]} (python -m formats.jsonl {path} lists every bad line)")


# ---- lines -> frames


def _refuse_constant(name):
    raise ValueError(f"it holds {name}, expected finite numbers")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_lines(lines, folder, number=1, images=True):
    """[(line, Frame)] of the good lines, and [(line, sentence)] for the others.

    number: of the first line. A rule looks at one key of all lines, and notes a sentence for each that breaks it.
    """
    numbers, entries, sentences = _parse_lines(lines, number)

    def note(frame, text):
        sentences.append((numbers[frame], text))

    ids, pictures, sizes, K = _read_heads(entries, folder, images, note)
    labels, unseen = _read_objects(entries, sizes, K, note)
    bad = {line for line, _ in sentences}
    good = []
    for row, line in enumerate(numbers):
        if line not in bad:
            frame = Frame(ids[row], pictures[row], K[row], labels[row], size=sizes[row], dropped=unseen[row])
            good.append((line, frame))
    return good, sentences


def _parse_lines(lines, number):
    """Numbers and JSON objects of the lines that hold all that a frame needs, and (line, sentence)s."""
    numbers, entries, sentences = [], [], []
    for line, raw in enumerate(lines, number):
        if not raw.strip():
            continue
        try:
            entry = DECODER.decode(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # of which JSON and Unicode errors are kinds
            sentences.append((line, f"not a line of JSON: {error}"))
            continue
        if type(entry) is dict:
            numbers.append(line)
            entries.append(entry)
        else:
            text = f"the line holds {_short(entry)}, expected an object with {', '.join(FRAME_KEYS)}"
            sentences.append((line, text))
    sentences += [(numbers[row], f"the line{text}") for row, text in _wrong_keys(entries, FRAME_KEYS)]
    rows = [row for row, entry in enumerate(entries) if {"image", "K", "objects"} <= entry.keys()]
    return [numbers[row] for row in rows], [entries[row] for row in rows], sentences


def _read_heads(entries, folder, images, note):
    """Ids, images, sizes (width, height) and cameras (n, 3, 3) of n frames, harmless ones for what is noted."""
    ids, pictures, sizes = ([None] * len(entries) for _ in range(3))
    K, wrong = _check("K", [entry["K"] for entry in entries])
    for row, entry in enumerate(entries):
        try:
            pictures[row], sizes[row] = _find_image(folder, entry["image"], images)
        except ValueError as error:
            note(row, f"image is {error}")
        if sizes[row] and (problem := _size_problem(entry, sizes[row])):
            note(row, problem)
        try:
            ids[row] = _parse_id(entry)
        except ValueError as error:
            note(row, f"id is {error}")
        if row not in wrong and (problem := camera_problem(K[row], *(sizes[row] or (None, None)))):
            wrong[row] = f": {problem}"
        if row in wrong:
            note(row, f"K{wrong[row]}")
            K[row] = np.eye(3)
    return ids, pictures, sizes, K


def _find_image(folder, value, images):
    """The image that a line names, a Path or a tar's Member, and with `images` its (width, height)."""
    if not _is_text(value) or not value:
        raise ValueError(f"{_short(value)}, expected a path relative to {folder}")
    image = folder / value
    if not images:
        return image, None
    shown = repr(value[:80])
    try:
        if not os.path.isfile(image):
            image = import_module("formats.tar").find_member(image) if ".tar" in value else None
        if image is not None:
            return image, image_size(image)
    except (OSError, ValueError, ImportError) as error:
        if (mimetypes.guess_type(value)[0] or "").startswith("video"):  # as predict.py writes of the frames of one
            raise ValueError(f"{shown}, a video, expected an image file; --no-images checks all else") from None
        raise ValueError(f"{shown}, expected an image file: {shorten(str(error), 200)}") from None
    raise ValueError(f"{shown}, expected a file: there is none of that name in {folder}")


def _size_problem(entry, size):
    """What is wrong with the width and height that a line may give of its image, which is of that size, or None."""
    width, height = (entry.get(key, side) for key, side in zip(("width", "height"), size, strict=True))
    if (width, height) == size:
        return None
    sizes = f"width and height are {_short(width)} and {_short(height)}, and the image is {size[0]}x{size[1]}"
    return f"{sizes}: expected the image that K and boxes are for"


def _parse_id(entry):
    """The id given, or the image's path without suffix. It names result files, so it may not leave their folder."""
    id = entry["id"] if "id" in entry else os.path.splitext(str(entry["image"]))[0]
    path = PureWindowsPath(id if _is_text(id) else "")  # which knows both separators and drives
    if "id" not in entry:
        return "/".join(part for part in path.parts if part not in (path.anchor, ".."))
    longest = max((len(part.encode()) for part in path.parts), default=0)
    if not path.parts or path.anchor or ".." in path.parts or longest > LONGEST_NAME:
        raise ValueError(f"{_short(id)}, expected text that can name a file, such as 'a/0001'")
    return "/".join(path.parts)  # a/./b and a//b are a/b


# ---- objects


def _read_objects(entries, sizes, K, note):
    """Of n frames their `Labels`, and how many of their objects and regions cannot be seen."""
    objects, places = _flatten(entries, "objects", note)
    regions, region_places = _flatten(entries, "ignore", note)
    columns = _object_columns(objects, places, note)
    region_boxes, wrong = _check("box", regions)
    for row, text in wrong.items():
        frame, name = region_places[row]
        note(frame, name + text)
    m, n = len(objects), len(entries)
    owner = np.array([frame for frame, _ in places + region_places], int)
    boxes, shown = _clip(columns, np.concatenate([columns.pop("box"), region_boxes]), owner, sizes, K)
    area = np.concatenate([columns.pop("ignore").astype(bool), np.ones(len(regions), bool)])
    order = np.lexsort((area, owner))
    order = order[shown[order]]
    for key in columns:
        values = np.full((len(area), *columns[key].shape[1:]), RULES[key][-1], columns[key].dtype)
        values[:m][~area[:m]] = columns[key][~area[:m]]
        columns[key] = values[order]
    labels = make_labels(columns.pop("class"), boxes[order], sigma=columns.pop("depth_sigma"), **columns)
    labels.alpha[~labels.is_3d] = -10
    return _split(labels, owner[order], n), np.bincount(owner[~shown], minlength=n).tolist()


def _flatten(entries, key, note):
    """The items of a list of each frame, one after another, and of each its frame and its name."""
    items, places = [], []
    for frame, entry in enumerate(entries):
        values = entry.get(key, [])
        if type(values) is list:
            items += values
            places += [(frame, f"{key}[{item}]") for item in range(len(values))]
        else:
            note(frame, f"{key} is {_short(values)}, expected a list")
    return items, places


def _object_columns(objects, places, note):
    """Columns of m objects by key. PLAIN takes the place, in the list, of what is no object; a box not given is NaN."""
    keys = ", ".join(OBJECT_KEYS)
    wrong = [
        (i, f" is {_short(v)}, expected an object with {keys}") for i, v in enumerate(objects) if type(v) is not dict
    ]
    entries = [entry if type(entry) is dict else PLAIN for entry in objects]
    for row, text in wrong + _wrong_keys(entries, OBJECT_KEYS):
        frame, name = places[row]
        note(frame, name + text)
        objects[row] = PLAIN
    columns = {}
    for key in OBJECT_KEYS:
        shape, *_, blank = RULES[key]
        rows = [row for row, entry in enumerate(objects) if key in entry]
        columns[key] = np.full((len(objects), *(shape or ())), blank, object if shape is None else float)
        values, wrong = _check(key, [objects[row][key] for row in rows])
        columns[key][rows] = values
        for i, text in wrong.items():
            frame, name = places[rows[i]]
            note(frame, f"{name}.{key}{text}")
    return columns


def _clip(columns, boxes, owner, sizes, K):
    """Boxes (m, 4) within the images, projected where none is given, and what can be seen (m,).

    Wraps columns["yaw"]. Without sizes of images nothing is clipped, and boxes that are not given are 0.
    """
    derived, yaw = np.flatnonzero(np.isnan(boxes[:, 0])), columns["yaw"]
    columns["yaw"] = np.where((-np.pi <= yaw) & (yaw < np.pi), yaw, wrap_angle(yaw))
    if not any(sizes):
        return np.nan_to_num(boxes), np.ones(len(boxes), bool)
    center, size = columns["center"][derived], columns["size"][derived]
    boxes[derived] = project_boxes(center, size, yaw[derived], K[owner[derived]])[0]
    limits = np.array([size or (1, 1) for size in sizes]) - 1
    clipped = np.clip(boxes, 0, np.tile(limits[owner], 2))
    shown = (clipped[:, :2] < clipped[:, 2:]).all(1)
    shown[derived] &= center[:, 2] > 0
    return clipped, shown


def _split(labels, owner, n):
    """The `Labels` of each of n frames, of rows in the order of their owners; a column that no row has is None."""
    velocity = np.isfinite(labels.velocity).any(1)
    rows_of = {"sigma": np.isfinite(labels.sigma), "velocity": velocity, "attribute": labels.attribute != ""}
    counts = {name: np.bincount(owner[rows], minlength=n).tolist() for name, rows in rows_of.items()}
    ends = [0, *np.cumsum(np.bincount(owner, minlength=n)).tolist()]
    parts = []
    for frame, (start, stop) in enumerate(pairwise(ends)):
        columns = {name: column[start:stop] for name, column in vars(labels).items()}
        parts.append(Labels(**columns | {name: None for name, count in counts.items() if not count[frame]}))
    return parts


# ---- one key of many lines: its column and {row: what is wrong with it}, a text that begins after the key's name


def _wrong_keys(entries, keys):
    """(row, text) for entries that lack a key or have an unknown one, with the nearest that is known."""
    texts = {}
    for kind in set(map(tuple, entries)):
        missing = [key for key, required in keys.items() if required and key not in kind]
        if unknown := next((key for key in kind if key not in keys), None):
            near = difflib.get_close_matches(unknown.lower(), keys, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(keys)}"
            hint = distortion_problem(unknown) or hint
            texts[kind] = f" has an unknown key {unknown[:80]!r}; {hint}"
        elif missing:
            texts[kind] = f" lacks {', '.join(map(repr, missing))}; it has {', '.join(kind)[:200] or 'no keys'}"
    return [(row, texts[kind]) for row, kind in enumerate(map(tuple, entries)) if kind in texts] if texts else []


def _check(key, values):
    """The column of a key, of m values; 0 or "" for what is wrong."""
    shape, expected, fits, _ = RULES[key]
    if shape is None:  # text or truth values, of which each different one is looked at once
        fitting = {value for value in {value for value in values if type(value) in (str, bool)} if fits(value)}
        bad = [row for row, value in enumerate(values) if type(value) not in (str, bool) or value not in fitting]
        column = [value if type(value) in (str, bool) and value in fitting else "" for value in values]
    else:
        low, high = PLAUSIBLE.get(key, (-LARGEST, LARGEST))
        column, bad = read_numbers(values, shape, low, high)
        expected += f" from {low:g} to {high:g}" if key in PLAUSIBLE else ""
        bad += [] if fits is None else np.flatnonzero(~fits(column)).tolist()
    wrong = {row: f" is {_short(values[row])}, expected {expected}" for row in bad}
    if key == "box":
        for row in np.flatnonzero((column[:, :2] >= column[:, 2:]).any(1)).tolist():
            wrong.setdefault(row, f" is {_short(values[row])}, expected x1 < x2 and y1 < y2")
    for row in (row for row in bad if key == "class" and values[row] == "DontCare"):
        wrong[row] += '; regions belong into the line\'s "ignore": [[x1, y1, x2, y2]]'
    return column, wrong


def _is_text(value):
    """Whether a value is text of any script that files and consoles take: no control characters, no half ones."""
    if not isinstance(value, str):
        return False
    return value.isprintable() or not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _short(value):
    """A JSON value as text of at most 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- the command


def summarise(frames: Iterable[Frame]) -> list[str]:
    """One line per class, most frequent first: count, mean size, and depths."""
    labels, lines = join([frame.labels for frame in frames]), []
    for name, count in Counter(labels.name).most_common():
        own, line = labels[labels.name == name], f"{name}: {count}"
        if own.is_3d[0]:
            l, h, w = own.size.mean(0)
            depth = own.center[:, 2]
            line += f", mean l h w {l:.2f} {h:.2f} {w:.2f} m, depth {depth.min():.1f} to {depth.max():.1f} m"
        lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Check one file from the command line. Returns the exit code: 0 good, 1 bad lines, 2 no such file."""
    parser = argparse.ArgumentParser(description="Check a JSON-lines file: every bad line, and a summary per class.")
    parser.add_argument("file", metavar="FILE.jsonl")
    parser.add_argument("--no-images", action="store_true", help="look at no image; boxes left out are not derived")
    parser.add_argument("--dropped", action="store_true", help="name every frame with objects that are left out")
    options = parser.parse_args(arguments)
    problems = []
    try:
        frames = read_frames(options.file, problems, not options.no_images)
    except (OSError, UserError) as error:
        print(error, file=sys.stderr)
        return 2
    bad = len({problem.partition(": ")[0] for problem in problems})
    count = sum(frame.dropped for frame in frames)
    unseen = f", {count} objects that cannot be seen left out" if count else ""
    dropped = [f"{frame.id}: left out {frame.dropped} that cannot be seen" for frame in frames if frame.dropped]
    sentences = problems + dropped if options.dropped else problems
    print(*sentences, f"{options.file}: {len(frames)} good frames, {bad} bad lines{unseen}", sep="\n")
    print(*summarise(frames), "likely mistakes, such as another order of sizes: python -m tools.check_data", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
