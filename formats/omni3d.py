"""Omni3D's annotation files, converted into JSON lines (Brazil et al., Omni3D, CVPR 2023; the format: DATA.md of facebookresearch/omni3d).

    python -m formats.omni3d IN.json OUT.jsonl [--images DIR]

Its camera frame is ours. `dimensions` are (w, h, l), along z, y and x of a box that `R_cam` turns about any axis; here a box is turned
about y alone, so the upright box nearest to it is taken, and the summary says by how much they differ. The visible 2D box is
`bbox2D_tight`, else `bbox2D_trunc`, else left for the reader to derive. What Cube R-CNN ignores in training becomes an ignore region.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from formats import jsonl
from scene.frames import PLAUSIBLE, Frame, make_labels
from scene.geometry import CORNER_SIGNS, box_corners, camera_problem, clip_boxes, project_boxes

IMAGE_KEYS, OBJECT_KEYS = ("id", "file_path", "width", "height", "K"), ("id", "image_id", "category_name", "valid3D")
TYPES = {str: "text", int: "a whole number"}
BOX_KEYS = {
    "center_cam": (3,),
    "dimensions": (3,),
    "R_cam": (3, 3),
    "bbox3D_cam": (8, 3),
}  # of an object whose 3D box is valid
SEEN = (
    0.8,
    0.4,
)  # visibility from which an object counts as occluded to KITTI's level 0, and to level 1; below it is 2
UPRIGHT = 0.1  # degrees up to which a rotation is one about y
AGREE = 1e-3  # metres: how far corners may lie from the file's own


def convert(source: dict, folder: Path) -> tuple[list[Frame], dict]:
    """Frames of a loaded file whose image paths are relative to a folder, and what `summarise` tells of them.

    Raises ValueError naming the image or object that is not as the format says.
    """
    objects = defaultdict(list)
    for entry in source["annotations"]:
        _check(entry, OBJECT_KEYS, "annotation")
        objects[str(entry["image_id"])].append(entry)
    count = Counter(str(image["id"]) for image in source["images"])
    if (twice := count.most_common(1)[0])[1] > 1:
        raise ValueError(f"image {twice[0]} is listed {twice[1]} times, expected each id once")
    counts = {
        "kept": Counter(),
        "ignored": Counter(),
        "left out": Counter(),
        "absent": [],
        "tilt": [],
        "moved": [],
        "odd": [],
    }
    frames = []
    for image in source["images"]:
        own, path = objects.pop(str(image["id"]), []), folder / image["file_path"]
        if path.is_file():
            frames.append(_convert_image(image, path, own, counts))
        else:
            counts["absent"].append(path)
    if objects:
        image, own = next(iter(objects.items()))
        raise ValueError(
            f"annotation {own[0]['id']}: image_id is {image}, expected the id of one of {len(source['images'])} images"
        )
    return frames, counts


def _convert_image(image, path, objects, counts):
    """One Frame; adds to counts what became of its objects."""
    place, size = f"image {image['id']}", (image["width"], image["height"])
    K = _numbers(image["K"], (3, 3), f"{place}: K")
    if problem := camera_problem(K, *size):
        raise ValueError(f"{place}: K: {problem}")
    rows = []
    for entry in objects:
        reason = _reason_to_ignore(entry)
        box = _visible_box(entry, size, ("bbox2D_tight", "bbox2D_trunc", *(["bbox2D_proj"] if reason else [])))
        row = {**jsonl.REGION, "box": box} if reason else _convert_object(entry, box)
        if reason and box is None:
            counts["left out"]["ignored ones without a 2D box in the image"] += 1
        elif box is None and not _is_seen(row, K, size):
            counts["left out"]["outside the image"] += 1
        else:
            counts["ignored" if reason else "kept"][reason or row["name"]] += 1
            rows.append({**row, "box": np.zeros(4) if box is None else box})  # the reader derives what is empty
            if not reason:
                _measure_loss(entry, row, counts)
    columns = {
        key: [row[key] for row in rows] for key in ("name", "box", "size", "center", "yaw", "truncation", "occlusion")
    }
    id = "/".join(part for part in Path(image["file_path"]).with_suffix("").parts if part not in ("..", "/"))
    return Frame(id, path, K, make_labels(**columns))


def _reason_to_ignore(entry):
    """Why an object becomes an ignore region, '' for one that does not: the rules of Cube R-CNN's training, and what we cannot read."""
    if entry.get("ignore") == 1:
        return "marked as ignored"
    if not entry["valid3D"]:
        return "without a reliable 3D box"
    low, high = PLAUSIBLE["size"]
    if not low <= min(_field(entry, "dimensions")) <= max(_field(entry, "dimensions")) <= high:
        return f"with a side outside {low:g} to {high:g} m"
    if entry.get("behind_camera") == 1 or _field(entry, "center_cam")[2] <= 0:
        return "reaching behind the camera"
    if (
        _known(entry, "lidar_pts") == 0
        or _known(entry, "segmentation_pts") == 0
        or 0 <= _known(entry, "visibility") <= 0.01
    ):
        return "not seen (no points, or visibility up to .01)"
    if _known(entry, "depth_error") > 0.5:
        return "with a depth error above .5 m"
    return "truncated by .99 or more" if _known(entry, "truncation") >= 0.99 else ""


def _convert_object(entry, box):
    """A row of Labels for an object with a 3D box; box (4,) or None."""
    R, truncation, visibility = _field(entry, "R_cam"), _known(entry, "truncation"), _known(entry, "visibility")
    if np.abs(R @ R.T - np.eye(3)).max() > 1e-3 or np.linalg.det(R) < 0:
        raise ValueError(f"annotation {entry['id']}: R_cam is {R.tolist()}, expected a rotation")
    return {
        "name": entry["category_name"],
        "box": box,
        "size": _field(entry, "dimensions")[::-1],
        "center": _field(entry, "center_cam"),
        "yaw": upright_yaw(R)[0],
        "truncation": truncation if 0 <= truncation <= 1 else -1,
        "occlusion": sum(visibility < level for level in SEEN) if 0 <= visibility <= 1 else -1,
    }


def _measure_loss(entry, row, counts):
    """Add to counts how far the upright box of a row is turned and moved from the file's, and how far that is from its own corners."""
    R = _field(entry, "R_cam")
    tilted = row["center"] + (CORNER_SIGNS * row["size"]) @ R.T
    if (error := _distance(_field(entry, "bbox3D_cam"), tilted)) > AGREE:
        counts["odd"].append((error, entry["id"]))
    counts["tilt"].append(upright_yaw(R)[1])
    counts["moved"].append(_distance(tilted, box_corners(row["center"], row["size"], np.array(row["yaw"]))))


def upright_yaw(R: np.ndarray) -> tuple[float, float]:
    """Yaw (radians) of the rotation about y nearest to R (3, 3), and the angle between both (degrees).

    A box whose y axis points up is the same box turned by 180 degrees about its x axis, which keeps its heading.
    """
    R = R * [1, np.sign(R[1, 1]) or 1, np.sign(R[1, 1]) or 1]
    yaw = np.arctan2(R[0, 2] - R[2, 0], R[0, 0] + R[2, 2])  # maximises the trace of Ry(yaw)^T R
    trace = np.cos(yaw) * (R[0, 0] + R[2, 2]) + np.sin(yaw) * (R[0, 2] - R[2, 0]) + R[1, 1]
    return float(yaw), float(np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1))))


def _distance(a, b):
    """The farthest that any of eight corners (8, 3) lies from the nearest of eight others, metres."""
    return float(np.linalg.norm(a[:, None] - b[None], axis=-1).min(1).max())


def _visible_box(entry, size, keys):
    """The first 2D box (4,) under one of the keys that meets the image of (width, height), clipped to it, or None."""
    for key in keys:
        box = _numbers(entry.get(key, [-1] * 4), (4,), f"annotation {entry['id']}: {key}")
        if not (box == -1).all() and ((clipped := clip_boxes(box, *size))[2:] > clipped[:2]).all():
            return clipped
    return None


def _is_seen(row, K, size):
    """Whether the projected 3D box of a row meets the image of (width, height)."""
    full_box = project_boxes(row["center"][None], row["size"][None], np.array([row["yaw"]]), K)[0][0]
    clipped = clip_boxes(full_box, *size)
    return bool((clipped[2:] > clipped[:2]).all())


def _known(entry, key):
    """An optional number of an object, -1 where it is unknown."""
    return entry[key] if type(entry.get(key)) in (int, float) else -1


def _field(entry, key):
    """One of BOX_KEYS of an object, as an array. Raises ValueError naming object and key."""
    return _numbers(entry.get(key), BOX_KEYS[key], f"annotation {entry['id']}: {key}")


def _numbers(value, shape, place):
    """JSON value -> float array of that shape. Raises ValueError naming the place."""
    try:
        array = np.array(value, dtype=float)
    except (ValueError, TypeError):
        array = np.zeros(0)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{place} is {json.dumps(value)[:80]}, expected {'x'.join(map(str, shape))} finite numbers")
    return array


def _check(entry, keys, kind):
    """ValueError for an entry of the file that lacks one of its keys."""
    if missing := [key for key in keys if not isinstance(entry, dict) or key not in entry]:
        raise ValueError(f"{kind} {json.dumps(entry)[:80]} lacks {', '.join(missing)}")
    for key, kinds in (("file_path", str), ("category_name", str), ("width", int), ("height", int)):
        if key in keys and type(entry[key]) is not kinds:
            raise ValueError(f"{kind} {entry['id']}: {key} is {json.dumps(entry[key])[:80]}, expected {TYPES[kinds]}")


def summarise(frames: list[Frame], counts: dict) -> list[str]:
    """What became of a file, in a few lines: objects per class, regions and why, what is left out, and what upright boxes lose."""
    several = lambda counter: "; ".join(f"{count} {reason}" for reason, count in counter.most_common()) or "none"  # noqa: E731
    lines = [
        f"{len(frames)} frames with {sum(counts['kept'].values())} objects: {several(counts['kept'])}",
        f"{sum(counts['ignored'].values())} ignore regions: {several(counts['ignored'])}",
        f"{sum(counts['left out'].values())} left out: {several(counts['left out'])}",
    ]
    tilt, moved = np.array(counts["tilt"]), np.array(counts["moved"])
    lost = tilt > UPRIGHT
    lines.append(f"{lost.sum()} of {len(tilt)} boxes are not turned about y alone")
    if lost.any():
        spread = lambda v, unit: (
            f"{v.mean():.{unit}} in the mean, {np.quantile(v, 0.9):.{unit}} at 90 %, {v.max():.{unit}} at most"
        )  # noqa: E731
        lines[-1] += ": the detector knows yaw alone, and their upright boxes differ"
        lines += [
            f"    by degrees: {spread(tilt[lost], '1f')}",
            f"    by metres at the worst corner: {spread(moved[lost], '2f')}",
        ]
    if counts["odd"]:
        error, id = max(counts["odd"])
        lines.append(f"{len(counts['odd'])} objects have a bbox3D_cam that is not center_cam, dimensions and R_cam, which were taken: "
                     f"annotation {id} is off by {error:.3f} m")  # fmt: skip
    if counts["absent"]:
        lines.append(
            f"{len(counts['absent'])} images are not there, and their frames are left out: the first is {counts['absent'][0]}"
        )
    return lines


def read_json(path: str | Path) -> dict:
    """The file, loaded. Raises FileNotFoundError, or ValueError when it is not one of Omni3D."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        source = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(source, dict) or not all(isinstance(source.get(key), list) for key in ("images", "annotations")):
        raise ValueError(f"{path}: expected an Omni3D file, an object with the lists 'images' and 'annotations'")
    if not source["images"]:
        raise ValueError(f"{path}: it lists no images")
    for image in source["images"]:
        _check(image, IMAGE_KEYS, "image")
    return source


def find_folder(path: Path, source: dict) -> Path:
    """The folder that holds the first image that is there: that of the file, one above it as in Omni3D's layout, or the current one."""
    places = [path.parent, path.absolute().parent.parent, Path()]
    for image in source["images"]:
        for place in places:
            if (place / image["file_path"]).is_file():
                return place
    first = source["images"][0]["file_path"]
    raise FileNotFoundError(
        f"{first}: no such image in {', '.join(str(p.absolute()) for p in places)}; --images DIR says where they are"
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description="Convert an Omni3D annotation file into JSON lines.")
    parser.add_argument("source", metavar="IN.json", type=Path)
    parser.add_argument("target", metavar="OUT.jsonl", type=Path)
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="folder that file_path is relative to; default: found near IN.json"
    )
    options = parser.parse_args(arguments)
    try:
        source = read_json(options.source)
        if not options.target.absolute().parent.is_dir() or options.target.resolve() == options.source.resolve():
            raise ValueError(f"cannot write to {options.target}: expected another file, in a folder that is there")
        frames, counts = convert(source, options.images or find_folder(options.source, source))
        if not frames:
            raise FileNotFoundError(
                f"{counts['absent'][0]}: no such image, nor any of the other {len(counts['absent']) - 1}"
            )
        jsonl.write_jsonl(options.target, frames)
    except (OSError, ValueError) as error:
        sentence = str(error) if str(options.source) in str(error) else f"{options.source}: {error}"
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    print(
        *summarise(frames, counts),
        f"written to {options.target}; python -m formats.jsonl {options.target} checks it",
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
