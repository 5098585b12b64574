"""Frames as lines of JSON, which formats/jsonl.py reads: what evaluation and prediction write."""

import json
import os
from pathlib import Path

import numpy as np


def to_json(frame, folder=None):
    """The line of JSON lines (formats/jsonl.py) of a frame: image, K, objects, id and, where there are any, ignore.

    Numbers but K are rounded to 6 decimals. With `folder` the image path is made relative to it. DontCare rows become
    ignore regions.
    """
    image = Path(str(frame.image))
    if folder is not None:  # links resolved, as '..' leads elsewhere from one; but not the image's own: its name counts
        image = os.path.relpath(os.path.join(os.path.realpath(image.parent), image.name), os.path.realpath(folder))
    line = {"image": Path(image).as_posix(), "K": np.asarray(frame.K, float).tolist(), "objects": [], "id": frame.id}
    for label in frame.labels:
        if label.is_3d:
            line["objects"].append(_object_to_json(label))
        else:
            line.setdefault("ignore", []).append(np.round(label.box, 6).tolist())
    return line


def _object_to_json(label):
    """The JSON object of one row of Labels, of which it has what is known."""
    has_box = (label.box[2:] > label.box[:2]).all()
    has_sigma = label.sigma is not None and np.isfinite(label.sigma)
    has_velocity = label.velocity is not None and np.isfinite(label.velocity).all()
    names = {"class": str(label.name)} | ({"attribute": str(label.attribute)} if label.attribute else {})
    numbers = {
        **{key: getattr(label, key) for key in ("center", "size", "yaw")},
        "box": label.box if has_box else None,
        "truncation": label.truncation if label.truncation >= 0 else None,
        "occlusion": label.occlusion if label.occlusion >= 0 else None,
        "velocity": label.velocity if has_velocity else None,
        "score": label.score if label.score != 1 or has_sigma else None,
        "depth_sigma": label.sigma if has_sigma else None,
    }
    return names | {key: np.round(value, 6).tolist() for key, value in numbers.items() if value is not None}


def write_jsonl(path, frames):
    """Write frames as JSON lines; image paths become relative to the folder of the file."""
    lines = [json.dumps(to_json(frame, Path(path).parent), allow_nan=False) + "\n" for frame in frames]
    Path(path).write_text("".join(lines), encoding="utf-8")
