"""nuScenes, and what else has its tables -> frames and ground truth. No devkit is needed.

What differs between nuScenes (Caesar et al., CVPR 2020) and its relatives is a `Dialect`; rules are those of
nuscenes-devkit and truckscenes-devkit 1.2.0 and t4-devkit 0.8.0, which the tests compare with.

A frame is one camera's key frame, its id scene/channel/time stamp. A class is the official detection class; an object
of none keeps its category ('animal', 'static_object.bicycle_rack'), and is background unless data.neighbours names it.
"""

import contextlib
import dataclasses
import json
import logging
import typing
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import compress
from pathlib import Path

import numpy as np

from formats.tables import (
    Boxes,
    Dialect,
    find_version,
    read_annotations,
    read_key_frames,
    read_references,
    read_samples,
)
from scene.frames import Frame, UserError, image_size, make_labels
from scene.geometry import CORNER_SIGNS, NEAR, clip_polygons, project_boxes

METRICS = "nuscenes"  # that frames are judged by
FACES = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]])  # of box_corners
FIELDS = ("split", "version", "cameras", "dialect", "pose")  # of data.Source, beside those that every format reads
log = logging.getLogger("deep3d")

VEHICLE = ("vehicle.moving", "vehicle.parked", "vehicle.stopped")
CYCLE = ("cycle.with_rider", "cycle.without_rider")
PERSON = ("pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing")
ATTRIBUTES = {  # the ten detection classes in the official order: the attributes that an object of the class may have
    "car": VEHICLE, "truck": VEHICLE, "bus": VEHICLE, "trailer": VEHICLE, "construction_vehicle": VEHICLE,
    "pedestrian": PERSON, "motorcycle": CYCLE, "bicycle": CYCLE, "traffic_cone": (), "barrier": (),
}  # fmt: skip
CLASS_OF = {  # category: detection class; the others have none
    "movable_object.barrier": "barrier", "movable_object.trafficcone": "traffic_cone", "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus", "vehicle.bus.rigid": "bus", "vehicle.car": "car", "vehicle.motorcycle": "motorcycle",
    "vehicle.construction": "construction_vehicle", "vehicle.trailer": "trailer", "vehicle.truck": "truck",
    "human.pedestrian.adult": "pedestrian", "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian", "human.pedestrian.police_officer": "pedestrian",
}  # fmt: skip
RACK = "static_object.bicycle_rack"
OCCLUSION = {"v80-100": 0, "v60-80": 1, "v40-60": 2, "v0-40": 3}  # percent seen by all cameras together: KITTI's level
USUAL = {  # attribute of a class that is not told: the most frequent one among the 5441 boxes of mini_val, as in FCOS3D
    "car": "vehicle.parked", "truck": "vehicle.parked", "bus": "vehicle.moving", "trailer": "vehicle.parked",
    "construction_vehicle": "vehicle.parked", "pedestrian": "pedestrian.moving", "motorcycle": "cycle.without_rider",
    "bicycle": "cycle.without_rider", "traffic_cone": "", "barrier": "",
}  # fmt: skip

SPLITS = {  # name: the version's ending, and the numbers of its scenes (nuscenes/utils/splits.py)
    "mini_train": ("mini", "61 553 655 757 796 1077 1094 1100"),
    "mini_val": ("mini", "103 916"),
    "train": ("trainval", "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 "
        "199-200 202-204 206-214 218-220 222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 "
        "461-465 467-469 471-472 474-480 499-502 504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 "
        "681 683-689 695-698 700-701 703-719 726-728 730-731 733-741 744 746-747 749-752 757-765 767-769 786-787 "
        "789-792 803-806 808-813 815-817 819-822 847-856 858 860-866 868-873 875-878 880 882-903 945 947 949 952-953 "
        "955-961 975-984 988-992 994-1025 1044-1058 1074-1102 1104-1110"),
    "val": ("trainval", "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 "
        "632-638 770-771 775 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"),
    "test": ("test", "77-91 111-119 140 142-148 265-266 279-282 307-314 333-343 481-498 547-551 601-604 606-624 "
        "827-831 833-842 844-846 932-933 935-943 1026-1043"),
}  # fmt: skip


def scenes_of(split: str) -> list[str]:
    """Names of the scenes of an official split, sorted."""
    numbers = []
    for part in SPLITS[split][1].split():
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [f"scene-{number:04d}" for number in numbers]


NUSCENES = Dialect(
    tables=("v1.0-*",),
    splits={split: tuple(scenes_of(split)) for split in SPLITS},
    versions={split: ending for split, (ending, _) in SPLITS.items()},
    classes=CLASS_OF,
    ranges={
        "car": 50, "truck": 50, "bus": 50, "trailer": 50, "construction_vehicle": 50, "pedestrian": 40,
        "motorcycle": 40, "bicycle": 40, "traffic_cone": 30, "barrier": 30,
    },
    attributes=ATTRIBUTES,
    usual=USUAL,
    reference=("LIDAR_TOP",),
    undefined={"traffic_cone": ("orient_err", "vel_err", "attr_err"), "barrier": ("vel_err", "attr_err")},
    half_turns=("barrier",),
    occlusion=OCCLUSION,
)  # fmt: skip


def find_dialect(name: str) -> Dialect:
    """nuScenes itself ("" or 'nuscenes'), that of formats.<name>, or of a JSON file. Raises UserError."""
    if name in ("", "nuscenes"):
        return NUSCENES
    if name.endswith(".json"):
        return _read_dialect(Path(name))
    paths = sorted(Path(__file__).parent.glob("*.py"))
    names = [path.stem for path in paths if "\nDIALECT = " in path.read_text("utf-8")]
    if name not in names:
        raise UserError(f"dialect is {name!r}, expected {', '.join(map(repr, ['nuscenes', *names]))} or a .json file")
    return import_module(f"formats.{name}").DIALECT


def _read_dialect(path, above=()):
    """That of a JSON object with keys of `Dialect`; the others are those of its "base", nuScenes' without one.

    A base that is a file lies beside it. above: the files that are based on this one.
    """
    try:
        content = json.loads(path.read_bytes())
        base, kinds = str(content.pop("base", "")), typing.get_type_hints(Dialect)
    except FileNotFoundError:
        raise UserError(f"{path}: no such dialect") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON object with keys of a dialect: {error}") from None
    if path in above:
        raise UserError(f"{path}: it is a base of itself")
    beside = base.endswith(".json")
    based = _read_dialect(path.parent / base, (*above, path)) if beside else find_dialect(base)
    try:
        return dataclasses.replace(based, **{key: _build(value, kinds[key], key) for key, value in content.items()})
    except KeyError as error:
        raise UserError(f"{path}: unknown key {error}, expected some of base, {', '.join(kinds)}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON object with keys of a dialect: {error}") from None


def _build(value, kind, key):
    """A JSON value as a field of `Dialect` of that type. Raises ValueError."""
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if outer is tuple and isinstance(value, list):
        return tuple(_build(one, inner[0], key) for one in value)
    if outer is Mapping and isinstance(value, dict):
        return {name: _build(one, inner[1], f"{key}.{name}") for name, one in value.items()}
    if outer is None and type(value) in ((int, float) if kind is float else (kind,)):
        return value
    expected = {tuple: "a list", Mapping: "an object"}.get(outer, f"a {kind.__name__}")
    raise ValueError(f"{key} is {str(value)[:80]!r}, expected {expected}")


def frames(source, config, problems: list[str] | None = None) -> Sequence[Frame]:
    """The frames of a `data.Source`, from their index where that is wanted. Raises what `read_frames` raises."""
    root, limit, dialect = Path(source.root or config.root), source.limit or None, find_dialect(source.dialect)
    tables = find_version(root, source.version, dialect)
    name, cameras, pose, skip = str(tables.relative_to(root)), source.cameras, source.pose, config.skip_bad
    read = partial(read_frames, root, version=name, cameras=cameras, dialect=dialect, pose=pose, skip=skip)
    if problems is not None or config.index == "none" or not find_spec("formats.index"):
        return read(source.split, problems=problems)[:limit]
    index, notes = import_module("formats.index"), []

    def made_from():
        files = sorted(tables.glob("*.json"))
        if skip:  # pictures may come later
            files += sorted(path for path in tables.parent.glob("*/*") if path.is_dir() and ".index" not in path.name)
        stats = [(file.name, file.stat()) for file in files]
        return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)

    plan = index.Plan(
        source=root,
        choice=f"nuscenes {name} {' '.join(source.split)} of {' '.join(cameras)} {pose} {skip} {dialect}",
        folder=tables.parent,
        made_from=made_from,
        jobs=[source.split],  # all at once, as the tables are
        read=partial(read, tell=notes.append),
        notes=notes,
    )
    frames = index.frames(plan, config.index)
    return frames[:limit] if limit else frames


def read_frames(
    root: str | Path, splits, version="", cameras=(), problems=None, images=True, dialect=NUSCENES, pose="image",
    skip=False, tell=log.warning,
) -> list[Frame]:  # fmt: skip
    """Every camera's key frames of some splits, by scene, time and camera: labels in its frame, by its own ego pose.

    version: default the only one of root; cameras: default all; pose: as `read_key_frames`. An object is labelled in
    each image that shows a pixel of it: velocity in the camera frame (NaN where the official rule has none), truncation
    as the share of its projection outside the image, the x axis projected onto the camera's xz plane as yaw. What has
    no lidar or radar point, or a centre behind the camera, is an ignore region. Raises UserError naming the table,
    split, sample or file; with a list `problems`, sentences on single frames go there, and the frames are left out.
    With images, each image file must be there; with skip, frames without one are left out. That, and what is odd in all
    of them, is told in a sentence to `tell`, or to `problems`.
    """
    tables = find_version(root, version, dialect)
    samples = read_samples(tables, splits, dialect)
    boxes, occlusion = read_annotations(tables, samples, dialect)
    rows_of = np.split(np.arange(len(boxes)), np.searchsorted(boxes.sample, np.arange(1, len(samples))))
    key_frames = [one for one in read_key_frames(tables, samples, cameras, dialect, pose) if one.valid]
    paths = [tables.parent / one.file for one in key_frames]
    folders = {path.parent for one, path in zip(key_frames, paths, strict=True) if one.file}
    files = {path for folder in folders if folder.is_dir() for path in folder.iterdir()} if images else {*paths}
    tell = tell if problems is None else problems.append
    for doubt in _doubts(boxes):
        tell(f"{tables}/sample_annotation.json: {doubt}")
    frames, absent = [], []
    measured = set() if images else {one.channel for one in key_frames}
    for one, path in zip(key_frames, paths, strict=True):
        sample, rows = samples[one.sample], rows_of[one.sample]
        missing = not one.file or path not in files
        problem = one.problem or _picture_problem(one, path, missing, measured)
        sentence = f"{tables}: {one.channel} of sample {sample.token}: {problem}"
        if not problem:
            id, labels = f"{sample.scene}/{one.channel}/{one.time}", labels_in(boxes[rows], occlusion[rows], one)
            frames.append(Frame(id, path, one.K, labels, group=sample.token, pose=one.pose, size=one.size))
        elif problems is not None:
            problems.append(sentence)
        elif missing and skip:
            absent.append(sentence)
        else:
            raise UserError(f"{sentence}; data.skip_bad=true leaves such frames out" if missing else sentence)
    if absent:
        tell(f"{len(absent)} of {len(key_frames)} frames are left out, as data.skip_bad allows: {absent[0]}")
    return frames


def _doubts(boxes):
    """What is likely wrong with all annotations, as sentences."""
    unknown = int((boxes.points < 0).sum())
    if unknown:
        yield f"{unknown} of {len(boxes)} annotations have less than 0 points, which counts as seen, as officially"
    if len(boxes) and not boxes.points.any():
        yield f"none of {len(boxes)} annotations has a lidar or radar point, so that none counts; -1 says unknown"


def _picture_problem(key_frame, path, missing, measured):
    """Why a key frame's picture cannot be used, or None. Of a channel that is not in `measured` its size is checked."""
    if missing:
        return f"no such image {path}"
    if key_frame.channel not in measured:
        measured.add(key_frame.channel)
        with contextlib.suppress(OSError):  # which the loader tells, or passes over; so it does with the other sizes
            size = image_size(path)
            if size != key_frame.size:
                sizes = "{}x{}, and sample_data.json says {}x{}".format(*size, *key_frame.size)
                return f"{path} is {sizes}: write its size there, and K of that size into camera_intrinsic"
    return None


@dataclasses.dataclass(frozen=True)
class Truth:
    """What detections of some samples are evaluated against."""

    tokens: list[str]  # of the s samples
    boxes: Boxes  # of the dialect's classes, by sample, in the order of the table
    vehicle: np.ndarray  # (s, 4, 4) vehicle -> global, m, at the time of the key frame that ranges are measured from
    sensor: np.ndarray  # (s, 4, 4) that key frame's sensor -> global, m
    racks: np.ndarray  # (m, 4, 3) m, bicycle racks: a corner, and the other ends of the three edges from it
    rack_sample: np.ndarray  # (m,) index of the sample
    dialect: Dialect = NUSCENES

    def of(self, tokens: Collection[str]) -> "Truth":
        """That of some samples alone."""
        chosen = np.array([token in tokens for token in self.tokens], bool)
        place = np.cumsum(chosen) - 1
        boxes, racks = self.boxes[chosen[self.boxes.sample]], chosen[self.rack_sample]
        at = place[boxes.sample]
        return Truth(
            tokens=list(compress(self.tokens, chosen)),
            boxes=dataclasses.replace(boxes, sample=at, listed=at),
            vehicle=self.vehicle[chosen],
            sensor=self.sensor[chosen],
            racks=self.racks[racks],
            rack_sample=place[self.rack_sample[racks]],
            dialect=self.dialect,
        )


def read_truth(root: str | Path, splits: Sequence[str], version: str = "", dialect: Dialect = NUSCENES) -> Truth:
    """The ground truth of some splits. Raises as `read_frames` does, and where a sample has no reference key frame."""
    folder = find_version(root, version, dialect)
    samples = read_samples(folder, splits, dialect)
    boxes, _ = read_annotations(folder, samples, dialect)
    if dialect.several:  # names are free: what no detection of the class can have is unknown
        pairs = zip(boxes.attribute, boxes.name, strict=True)
        known = [state if state in dialect.attributes.get(name, ()) else "" for state, name in pairs]
        boxes = dataclasses.replace(boxes, attribute=np.array(known, dtype=object))
    racks = boxes[boxes.name == RACK]
    references = read_references(folder, samples, dialect)
    return Truth(
        tokens=[sample.token for sample in samples],
        boxes=boxes[np.isin(boxes.name.astype(str), list(dialect.ranges))],
        vehicle=np.array([one.vehicle for one in references]).reshape(-1, 4, 4),
        sensor=np.array([one.pose for one in references]).reshape(-1, 4, 4),
        racks=_edges(racks),
        rack_sample=racks.sample,
        dialect=dialect,
    )


def _edges(boxes):
    """Of n boxes (n, 4, 3): a corner, then its neighbours along the box's length, width and height.

    Multiplied as the devkit multiplies all eight at once, to agree on points that lie on a face to the last bit.
    """
    x, y, z = np.array([[1, 1, 1, 1, -1, -1, -1, -1], [1, -1, -1, 1, 1, -1, -1, 1], [1, 1, -1, -1, 1, 1, -1, -1]])
    l, h, w = (boxes.size[:, axis, None] / 2 for axis in range(3))
    corners = boxes.rotation @ np.stack([l * x, w * y, h * z], 1) + boxes.center[:, :, None]
    return corners[:, :, [0, 4, 1, 3]].transpose(0, 2, 1)


def labels_in(boxes, occlusion, key_frame):
    """Labels of the boxes of a sample that a camera shows, objects before ignore regions."""
    turn, origin = key_frame.pose[:3, :3], key_frame.pose[:3, 3]
    center = (boxes.center - origin) @ turn  # R^T (x - o), row by row
    forward, left, up = (boxes.rotation[:, :, axis] @ turn for axis in range(3))
    yaw = np.arctan2(-forward[:, 2], forward[:, 0])
    corners = center[:, None] + CORNER_SIGNS * boxes.size[:, None] @ np.stack([forward, -up, left], 1)
    box = visible_boxes(corners, key_frame.K, *key_frame.size)
    shown = ((box[:, 2:] - box[:, :2]) >= 1).all(1)
    real = (boxes.points != 0) & (center[:, 2] > 0)
    rows = np.concatenate([np.flatnonzero(shown & real), np.flatnonzero(shown & ~real)])
    boxes, box, center, yaw, real = boxes[rows], box[rows], center[rows], yaw[rows], real[rows]
    full_box, _ = project_boxes(center, boxes.size, yaw, key_frame.K)
    visible, whole = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (box, full_box))

    def fill(column, blank):
        return np.where(real[:, None] if column.ndim > 1 else real, column, blank)

    labels = make_labels(
        fill(boxes.name, "DontCare"), box, fill(boxes.size, -1.0), fill(center, -1000.0), fill(yaw, -10.0),
        truncation=fill(np.clip(1 - visible / whole, 0, 1), -1.0),
        occlusion=fill(occlusion[rows], -1),
        velocity=fill(boxes.velocity @ turn, np.nan),
        attribute=fill(boxes.attribute, ""),
    )  # fmt: skip
    labels.alpha[~real] = -10
    return labels


def visible_boxes(corners, K, width, height):
    """Extent of what an image of that size shows of boxes: the `box` of those that nothing hides.

    corners (n, 8, 3) m in the order of `box_corners`; K (3, 3). Returns (n, 4) px within the image, NaN where nothing
    shows. Tighter than a clipped `full_box`: each face is cut at the border, in homogeneous pixels.
    """
    sides = np.array([[1, 0, 0], [-1, 0, width - 1], [0, 1, 0], [0, -1, height - 1]], float)
    homogeneous = corners @ np.asarray(K, float).T
    beyond = np.concatenate([homogeneous @ sides.T < 0, homogeneous[..., 2:] < NEAR], -1)
    rows = np.flatnonzero(~beyond.all(1).any(-1))  # those not wholly beyond one border
    box = np.full((len(corners), 4), np.nan)
    if not len(rows):
        return box
    polygon = homogeneous[rows][:, FACES].reshape(-1, 4, 3)
    polygon = clip_polygons(polygon, polygon[..., 2] - NEAR)
    for side in sides:
        polygon = clip_polygons(polygon, polygon @ side)
    shown = polygon[..., 2:] > 0  # what is cut away wholly is all zero
    pixels = polygon[..., :2] / np.where(shown, polygon[..., 2:], 1.0)
    low, high = (np.where(shown, pixels, blank).reshape(len(rows), -1, 2) for blank in (np.inf, -np.inf))
    extent = np.concatenate([low.min(1, initial=np.inf), high.max(1, initial=-np.inf)], -1)
    box[rows] = np.where(np.isfinite(extent), np.clip(extent, 0, [width - 1, height - 1] * 2), np.nan)
    return box
