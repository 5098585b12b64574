"""nuScenes' result files, read and written: detections in the global frame; those of six cameras merged into one list.

Format: nuscenes.org/object-detection#results-format; the rules are nuscenes-devkit 1.2.0's.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from formats.columns import read_numbers
from formats.nuscenes import NUSCENES
from formats.tables import Boxes, Dialect, rotations
from scene.frames import Frame, Labels, UserError, join

SAME_DISTANCE = 1.0  # m: nearer detections of one class by two cameras are one; more mAP than any overlap from above
MOST_BOXES = 500  # of a sample, all cameras together


def read_results(path: str | Path, tokens: Sequence[str], dialect: Dialect = NUSCENES) -> tuple[Boxes, dict]:
    """The detections of a result file in the official format, in its order, for samples named by `tokens`; its meta.

    Raises UserError naming the file and, where there is one, the sample and the box: whatever the official evaluator
    refuses, and a box whose sample_token is none of the samples.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such result file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file: {error}") from None
    for key in ("results", "meta"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            shape = '{"meta": {...}, "results": {sample token: [box, ...]}}'
            raise UserError(f"{path}: expected an object {shape}, found no {key!r}")
    if not any(content["results"].values()):
        raise UserError(f"{path}: it holds no box at all, which the official evaluator refuses")
    try:
        return parse_results(content["results"], tokens, dialect), content["meta"]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_results(results: dict[str, list[dict]], tokens: Sequence[str], dialect: Dialect = NUSCENES) -> Boxes:
    """Sample token -> official boxes, as `Boxes` in that order. Raises UserError naming the sample and the box."""
    index, states = {token: i for i, token in enumerate(tokens)}, dialect.states
    if missing := index.keys() - results.keys():
        count = f"{len(missing)} of {len(tokens)} samples are missing"
        raise UserError(f"{count}, the first is {min(missing)}; without detections: []")
    if extra := results.keys() - index.keys():
        raise UserError(f"{len(extra)} samples are none of the split's, the first is {min(extra)}")
    for token, boxes in results.items():
        if not isinstance(boxes, list) or not all(isinstance(box, dict) for box in boxes):
            raise UserError(f"sample {token} holds {str(boxes)[:80]}, expected a list of boxes")
        if len(boxes) > MOST_BOXES:
            raise UserError(f"sample {token} holds {len(boxes)} boxes, expected at most {MOST_BOXES}")
    entries = [(token, box) for token, boxes in results.items() for box in boxes]

    def refuse(row, key, expected):
        token, box = entries[row]
        place = next(i for i, one in enumerate(results[token]) if one is box)
        value = str(box.get(key, "missing"))[:80]
        raise UserError(f"sample {token}, box {place}: {key} is {value!r}, expected {expected}")

    def numbers(key, shape, expected, default=None, **bounds):
        array, bad = read_numbers([box.get(key, default) for _, box in entries], shape, **bounds)
        return refuse(bad[0], key, expected) if bad else array

    def words(key, choices, expected):
        values = [box.get(key) for _, box in entries]
        bad = [row for row, value in enumerate(values) if not isinstance(value, str) or value not in choices]
        return refuse(bad[0], key, expected) if bad else np.array(values, object)

    for key, kind in (("detection_score", float), ("num_pts", int)):  # officially they may be text
        for _, box in entries:
            if isinstance(box.get(key), str):
                with contextlib.suppress(ValueError):
                    box[key] = kind(box[key])
    return Boxes(
        sample=np.array([index[token] for token in words("sample_token", index, "one of the samples")], int),
        listed=np.array([index[token] for token, _ in entries], int),
        name=words("detection_name", dialect.ranges, f"one of {', '.join(dialect.ranges)}"),
        center=numbers("translation", (3,), "3 numbers"),
        size=numbers("size", (3,), "3 numbers")[:, [1, 2, 0]],  # file: w, l, h
        rotation=rotations(numbers("rotation", (4,), "4 numbers")),
        velocity=np.pad(numbers("velocity", (2,), "2 numbers", nan=True), ((0, 0), (0, 1))),
        attribute=words("attribute_name", ("", *states), f"one of {', '.join(states)} or ''"),
        score=numbers("detection_score", (), "a number", -1.0),
        points=numbers("num_pts", (), "a number", -1),
    )


def merge_cameras(
    frames: Iterable[Frame], predictions: Mapping[str, Labels], dialect: Dialect = NUSCENES, distance=SAME_DISTANCE
) -> dict:
    """Sample token -> at most 500 boxes of all its cameras, in the official format, the best score first.

    frames: with group and pose, in any order; predictions: frame id -> Labels in that frame's camera. Of two detections
    of one class by different cameras, nearer than `distance` m seen from above, the one with the lower score is left
    out, of equal scores the one with the larger depth sigma. An unknown velocity becomes 0, an attribute that the class
    cannot have its most frequent one; classes that the dialect does not detect are left out.
    """
    groups = {}
    for frame in sorted(frames, key=lambda frame: frame.id):  # else their order would count among equal scores
        if not frame.group or frame.pose is None:
            raise UserError(f"frame {frame.id} has no group or no pose, expected frames of a nuScenes source")
        labels = predictions[frame.id]
        labels = labels[np.isin(labels.name.astype(str), list(dialect.ranges))]
        groups.setdefault(frame.group, []).append((labels, _official_boxes(frame, labels, dialect)))
    merged = {}
    for token, parts in groups.items():
        labels, boxes = join([labels for labels, _ in parts]), [box for _, boxes in parts for box in boxes]
        camera = np.repeat(np.arange(len(parts)), [len(labels) for labels, _ in parts])
        ground = np.array([box["translation"][:2] for box in boxes]).reshape(-1, 2)
        sigma = np.zeros(len(labels)) if labels.sigma is None else np.nan_to_num(labels.sigma, nan=np.inf)
        order = np.lexsort((sigma, -labels.score))
        best = order[_first_of_each(labels.name[order], ground[order], camera[order], distance)]
        merged[token] = [boxes[row] for row in best[:MOST_BOXES]]
    return merged


def _official_boxes(frame, labels, dialect):
    """Boxes of a result file, of the detections in one camera."""
    turn, n = frame.pose[:3, :3], len(labels)
    center = labels.center @ turn.T + frame.pose[:3, 3]
    ahead = _on_ground(np.stack([np.cos(labels.yaw), -np.sin(labels.yaw)], -1), turn)
    half = np.arctan2(ahead[:, 1], ahead[:, 0]) / 2
    velocity = np.zeros((n, 2)) if labels.velocity is None else _on_ground(labels.velocity[:, [0, 2]], turn)
    velocity = np.nan_to_num(velocity)
    attribute = [""] * n if labels.attribute is None else labels.attribute.tolist()
    for row, name in enumerate(labels.name):
        if attribute[row] not in dialect.attributes.get(name, ()):
            attribute[row] = dialect.usual.get(name, "")
    return [
        {
            "sample_token": frame.group,
            "translation": center[row].tolist(),
            "size": labels.size[row, [2, 0, 1]].tolist(),  # w, l, h
            "rotation": [float(np.cos(half[row])), 0.0, 0.0, float(np.sin(half[row]))],
            "velocity": velocity[row].tolist(),
            "detection_name": name,
            "detection_score": float(labels.score[row]),
            "attribute_name": attribute[row],
        }
        for row, name in enumerate(labels.name)
    ]


def _on_ground(vectors, turn):
    """The level vectors (n, 2) of the global frame whose parts along a camera's x and z are `vectors` (n, 2).

    turn: (3, 3) camera -> global. Exact also for a camera that looks up or down.
    """
    inside = vectors @ turn[:, [0, 2]].T
    return (inside - inside[:, 2:] / turn[2, 1] * turn[:, 1])[:, :2]


def _first_of_each(name, ground, camera, distance):
    """(n,) bool: of n detections, best first, those that no other camera sees better. ground (n, 2) m."""
    first, second = np.triu_indices(len(name), 1)
    same = (name[first] == name[second]) & (camera[first] != camera[second])
    same &= np.hypot(*(ground[first] - ground[second]).T) < distance
    stays = np.ones(len(name), bool)
    for i, j in zip(first[same].tolist(), second[same].tolist(), strict=True):
        stays[j] &= not stays[i]
    return stays


def write_results(path: str | Path, samples: dict[str, list[dict]]) -> None:
    """Sample token -> boxes, as `merge_cameras` gives them, as an official result file of a camera-only method."""
    used = {f"use_{sensor}": sensor == "camera" for sensor in ("camera", "lidar", "radar", "map", "external")}
    Path(path).write_text(json.dumps({"meta": used, "results": samples}, allow_nan=False), encoding="utf-8")
