"""Omni3D's annotation files, converted into JSON lines (Brazil et al., CVPR 2023; DATA.md of facebookresearch/omni3d).

    python -m formats.omni3d IN.json OUT.jsonl [--images DIR]

Its camera frame is ours. `dimensions` are (w, h, l), along z, y and x of a box that `R_cam` turns about any axis; here
a box is turned about y alone, so the upright box nearest to it is taken, and the summary says by how much they differ.
The visible 2D box is `bbox2D_tight`, else `bbox2D_trunc`, else left for the reader to derive. What Cube R-CNN ignores
in training becomes an ignore region.
"""

import argparse
import itertools
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from formats.columns import read_numbers
from formats.odd import distortion_problem
from scene.frames import LARGEST, PLAUSIBLE, Frame, UserError, image_size, make_labels
from scene.geometry import camera_problem, clip_boxes, project_boxes
from scene.records import write_jsonl

IMAGE_KEYS = {"id": None, "file_path": str, "width": int, "height": int, "K": None}  # key: type, where it matters
OBJECT_KEYS = {"id": None, "image_id": None, "category_name": str, "valid3D": None}
TYPES = {str: "text", int: "a whole number"}
VISIBLE = (0.8, 0.4)  # visibility below which an object counts as occluded to KITTI's level 1, and to level 2
UPRIGHT = 0.1  # degrees up to which a rotation is one about y
REGION = {"name": "DontCare", "size": np.full(3, -1.0), "center": np.full(3, -1000.0), "yaw": -10.0, "truncation": -1,
          "occlusion": -1}  # fmt: skip


def convert(source: dict, folder: Path) -> tuple[list[Frame], dict]:
    """Frames of a loaded file whose image paths are relative to a folder, and what `summarise` tells of them.

    Raises UserError naming the image or object that is not as the format says.
    """
    objects = defaultdict(list)
    for entry in source["annotations"]:
        _check(entry, OBJECT_KEYS, "annotation")
        objects[str(entry["image_id"])].append(entry)
    [(id, count)] = Counter(str(image["id"]) for image in source["images"]).most_common(1)
    if count > 1:
        raise UserError(f"image {id} is listed {count} times, expected each id once")
    counts = {"kept": Counter(), "ignored": Counter(), "left out": Counter(), "absent": [], "tilt": []}
    frames = []
    for image in source["images"]:
        own, path = objects.pop(str(image["id"]), []), folder / image["file_path"]
        if path.is_file():
            frames.append(_convert_image(image, path, own, counts))
        else:
            counts["absent"].append(path)
    if objects:
        image, (entry, *_) = next(iter(objects.items()))
        expected = f"the id of one of {len(source['images'])} images"
        raise UserError(f"annotation {entry['id']}: image_id is {image}, expected {expected}")
    return frames, counts


def _convert_image(image, path, objects, counts):
    """One Frame; adds to counts what became of its objects."""
    place, size = f"image {image['id']}", (image["width"], image["height"])
    if (found := image_size(path)) != size:
        sizes = "width and height are {} and {}, and {} is {}x{}".format(*size, path, *found)
        raise UserError(f"{place}: {sizes}: expected the image that its K and boxes are for")
    if problem := next(filter(None, itertools.starmap(distortion_problem, image.items())), None):
        raise UserError(f"{place}: {problem}")
    K = _numbers(image, "K", (3, 3), place)
    if problem := camera_problem(K, *size):
        raise UserError(f"{place}: K: {problem}")
    rows = []
    for entry in objects:
        reason = _reason_to_ignore(entry)
        keys = ("bbox2D_tight", "bbox2D_trunc", "bbox2D_proj") if reason else ("bbox2D_tight", "bbox2D_trunc")
        box = _visible_box(entry, size, keys)
        row, tilt = (REGION, None) if reason else _convert_object(entry)
        if box is None and reason:
            counts["left out"]["ignored ones without a 2D box in the image"] += 1
        elif box is None and not _is_visible(row, K, size):
            counts["left out"]["outside the image"] += 1
        else:
            counts["ignored" if reason else "kept"][reason or row["name"]] += 1
            counts["tilt"] += [] if reason else [tilt]
            rows.append({**row, "box": np.zeros(4) if box is None else box})  # the reader derives what is empty
    columns = {key: [row[key] for row in rows] for key in ("box", *REGION)}
    id = "/".join(part for part in Path(image["file_path"]).with_suffix("").parts if part not in ("..", "/"))
    return Frame(id, path, K, make_labels(**columns))


def _reason_to_ignore(entry):
    """Why an object becomes an ignore region, or '': the rules of Cube R-CNN's training, and what we cannot read."""
    if entry.get("ignore") == 1:
        return "marked as ignored"
    if not entry["valid3D"]:
        return "without a reliable 3D box"
    low, high = PLAUSIBLE["size"]
    sides = _numbers(entry, "dimensions", (3,))
    if not low <= min(sides) <= max(sides) <= high:
        return f"with a side outside {low:g} to {high:g} m"
    if entry.get("behind_camera") == 1 or _numbers(entry, "center_cam", (3,))[2] <= 0:
        return "reaching behind the camera"
    points = _optional(entry, "lidar_pts"), _optional(entry, "segmentation_pts")
    if 0 in points or 0 <= _optional(entry, "visibility") <= 0.01:
        return "not seen (no points, or visibility up to .01)"
    if _optional(entry, "depth_error") > 0.5:
        return "with a depth error above .5 m"
    return "truncated by .99 or more" if _optional(entry, "truncation") >= 0.99 else ""


def _convert_object(entry):
    """A row of Labels, without its 2D box, for an object with a 3D box, and by how many degrees that is tilted."""
    R = _numbers(entry, "R_cam", (3, 3))
    truncation, visibility = _optional(entry, "truncation"), _optional(entry, "visibility")
    if np.abs(R @ R.T - np.eye(3)).max() > 1e-3 or np.linalg.det(R) < 0:
        raise UserError(f"annotation {entry['id']}: R_cam is {R.tolist()}, expected a rotation")
    yaw, tilt = upright_yaw(R)
    row = {
        "name": entry["category_name"],
        "size": _numbers(entry, "dimensions", (3,))[::-1],
        "center": _numbers(entry, "center_cam", (3,)),
        "yaw": yaw,
        "truncation": truncation if 0 <= truncation <= 1 else -1,
        "occlusion": sum(visibility < level for level in VISIBLE) if 0 <= visibility <= 1 else -1,
    }
    return row, tilt


def upright_yaw(R: np.ndarray) -> tuple[float, float]:
    """Yaw (radians) of the rotation about y nearest to R (3, 3), and the angle between both (degrees).

    A box whose y axis points up is the same box turned by 180 degrees about its x axis, which keeps its heading.
    """
    R = R * [1, np.sign(R[1, 1]) or 1, np.sign(R[1, 1]) or 1]
    yaw = np.arctan2(R[0, 2] - R[2, 0], R[0, 0] + R[2, 2])  # maximises the trace of Ry(yaw)^T R
    trace = np.cos(yaw) * (R[0, 0] + R[2, 2]) + np.sin(yaw) * (R[0, 2] - R[2, 0]) + R[1, 1]
    return float(yaw), float(np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1))))


def _visible_box(entry, size, keys):
    """The first 2D box (4,) under one of the keys that meets the image of (width, height), clipped to it, or None."""
    boxes = [_numbers(entry, key, (4,)) for key in keys if entry.get(key, [-1] * 4) != [-1] * 4]
    clipped = [clip_boxes(box, *size) for box in boxes]
    return next((box for box in clipped if (box[2:] > box[:2]).all()), None)


def _is_visible(row, K, size):
    """Whether the projected 3D box of a row meets the image of (width, height)."""
    full_box, _ = project_boxes(row["center"][None], row["size"][None], np.array([row["yaw"]]), K)
    clipped = clip_boxes(full_box[0], *size)
    return bool((clipped[2:] > clipped[:2]).all())


def _optional(entry, key):
    """An optional number of an object, -1 where it is unknown."""
    return entry[key] if type(entry.get(key)) in (int, float) else -1


def _numbers(entry, key, shape, place=None):
    """What an object, or an image at a place, has under a key, as floats of that shape. Raises UserError naming it."""
    array, bad = read_numbers([entry.get(key)], shape, -LARGEST, LARGEST)
    if bad:
        value, expected = json.dumps(entry.get(key))[:80], f"{'x'.join(map(str, shape))} finite numbers"
        raise UserError(f"{place or 'annotation ' + str(entry['id'])}: {key} is {value}, expected {expected}")
    return array[0]


def _check(entry, keys, kind):
    """UserError for an entry of the file that lacks one of its keys, or holds another type under it."""
    if missing := [key for key in keys if not isinstance(entry, dict) or key not in entry]:
        raise UserError(f"{kind} {json.dumps(entry)[:80]} lacks {', '.join(missing)}")
    for key, wanted in keys.items():
        if wanted and type(entry[key]) is not wanted:
            value = json.dumps(entry[key])[:80]
            raise UserError(f"{kind} {entry['id']}: {key} is {value}, expected {TYPES[wanted]}")


def summarise(frames: list[Frame], counts: dict) -> list[str]:
    """What became of a file: objects per class, regions and why, what is left out, and what upright boxes lose."""
    lines = []
    titles = {
        "kept": f"{len(frames)} frames with {{}} objects",
        "ignored": "{} ignore regions",
        "left out": "{} left out",
    }
    for kind, title in titles.items():
        reasons = "; ".join(f"{count} {reason}" for reason, count in counts[kind].most_common())
        lines.append(f"{title.format(counts[kind].total())}: {reasons or 'none'}")
    tilt = np.array(counts["tilt"])
    tilted = tilt[tilt > UPRIGHT]
    lines.append(f"{len(tilted)} of {len(tilt)} boxes are not turned about y alone")
    if len(tilted):
        numbers = f"{tilted.mean():.1f} in the mean, {tilted.max():.1f} at most"
        lines[-1] += f": the detector knows yaw alone, and their upright boxes differ by degrees: {numbers}"
    if absent := counts["absent"]:
        lines.append(f"{len(absent)} images are not there, and their frames are left out: the first is {absent[0]}")
    return lines


def read_json(path: Path) -> dict:
    """The file, loaded. Raises UserError when it is not one of Omni3D."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        source = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(source, dict) or not all(isinstance(source.get(key), list) for key in ("images", "annotations")):
        raise UserError(f"{path}: expected an Omni3D file, an object with the lists 'images' and 'annotations'")
    if not source["images"]:
        raise UserError(f"{path}: it lists no images")
    for image in source["images"]:
        _check(image, IMAGE_KEYS, "image")
    return source


def find_folder(path: Path, source: dict) -> Path:
    """The folder that holds the first image that is there: the file's, the one above it, or the current one."""
    places = [path.parent, path.absolute().parent.parent, Path()]
    files = ((place, place / image["file_path"]) for image in source["images"] for place in places)
    if folder := next((place for place, file in files if file.is_file()), None):
        return folder
    first, tried = source["images"][0]["file_path"], ", ".join(str(place.absolute()) for place in places)
    raise UserError(f"{first}: no such image in {tried}; --images DIR says where they are")


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description="Convert an Omni3D annotation file into JSON lines.")
    parser.add_argument("source", metavar="IN.json", type=Path)
    parser.add_argument("target", metavar="OUT.jsonl", type=Path)
    parser.add_argument("--images", metavar="DIR", type=Path, help="where file_path begins; default: near IN.json")
    options = parser.parse_args(arguments)
    path, target = options.source, options.target
    try:
        source = read_json(path)
        if not target.absolute().parent.is_dir() or target.resolve() == path.resolve():
            raise UserError(f"cannot write to {target}: expected another file, in a folder that is there")
        frames, counts = convert(source, options.images or find_folder(path, source))
        if not frames:
            absent = counts["absent"]
            raise UserError(f"{absent[0]}: no such image, nor any of the other {len(absent) - 1}")
        write_jsonl(target, frames)
    except (OSError, UserError) as error:
        print("error:", str(error) if str(path) in str(error) else f"{path}: {error}", file=sys.stderr)
        return 2
    print(*summarise(frames, counts), f"written to {target}; python -m formats.jsonl {target} checks it", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
