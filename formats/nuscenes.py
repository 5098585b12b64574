"""nuScenes: its tables -> frames and ground truth; detections of six cameras <-> result files. No devkit is needed.

The only place that knows the global frame's quaternions and (w, l, h). Format: nuscenes.org/nuscenes#data-format
(Caesar et al., CVPR 2020); rules are those of nuscenes-devkit 1.2.0, which the tests compare with.

A frame is one camera's key frame, its id scene/channel/time stamp. A class is the official detection class; an object
of none keeps its category ('animal', 'static_object.bicycle_rack'), and is background unless data.neighbours names it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import compress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.columns import read_numbers
from scene.frames import LARGEST, Frame, Labels, UserError, join, make_labels
from scene.geometry import CORNER_SIGNS, NEAR, camera_problem, clip_polygons, project_boxes

METRICS = "nuscenes"  # that frames are judged by
FACES = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]])  # of box_corners
FIELDS = ("split", "version", "cameras")  # of data.Source that are read, beside those that every format reads

VEHICLE = ("vehicle.moving", "vehicle.parked", "vehicle.stopped")
CYCLE = ("cycle.with_rider", "cycle.without_rider")
PERSON = ("pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing")
ATTRIBUTES = {  # the ten detection classes in the official order: the attributes that an object of the class may have
    "car": VEHICLE, "truck": VEHICLE, "bus": VEHICLE, "trailer": VEHICLE, "construction_vehicle": VEHICLE,
    "pedestrian": PERSON, "motorcycle": CYCLE, "bicycle": CYCLE, "traffic_cone": (), "barrier": (),
}  # fmt: skip
STATES = (*PERSON, *CYCLE, *VEHICLE)  # every attribute, in the official order
CLASS_OF = {  # category: detection class; the others have none
    "movable_object.barrier": "barrier", "movable_object.trafficcone": "traffic_cone", "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus", "vehicle.bus.rigid": "bus", "vehicle.car": "car", "vehicle.motorcycle": "motorcycle",
    "vehicle.construction": "construction_vehicle", "vehicle.trailer": "trailer", "vehicle.truck": "truck",
    "human.pedestrian.adult": "pedestrian", "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian", "human.pedestrian.police_officer": "pedestrian",
}  # fmt: skip
RACK = "static_object.bicycle_rack"
OCCLUSION = {"v80-100": 0, "v60-80": 1, "v40-60": 2, "v0-40": 3}  # percent seen by all cameras together: KITTI's level
LONGEST_GAP = 1.5  # s between the two annotations that a velocity is taken from, twice that around one between them

USUAL = {  # attribute of a class that is not told: the most frequent one among the 5441 boxes of mini_val, as in FCOS3D
    "car": "vehicle.parked", "truck": "vehicle.parked", "bus": "vehicle.moving", "trailer": "vehicle.parked",
    "construction_vehicle": "vehicle.parked", "pedestrian": "pedestrian.moving", "motorcycle": "cycle.without_rider",
    "bicycle": "cycle.without_rider", "traffic_cone": "", "barrier": "",
}  # fmt: skip
SAME_DISTANCE = 1.0  # m: nearer detections of one class by two cameras are one; more mAP than any overlap from above
TINY = np.finfo(float).tiny
MOST_BOXES = 500  # of a sample, all cameras together

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


@dataclasses.dataclass(frozen=True)
class Boxes:
    """n boxes in the global frame (metres, z up), annotated or detected, as columns; each is of one of some samples."""

    sample: np.ndarray  # (n,) index of the sample that the box names
    listed: np.ndarray  # (n,) of the one that it is listed under: another only in a file that mixes them up
    name: np.ndarray  # (n,) str
    center: np.ndarray  # (n, 3) geometric centre, m
    size: np.ndarray  # (n, 3) l, h, w, m
    rotation: np.ndarray  # (n, 3, 3) its columns are the box's own axes: forward, to the left, up
    velocity: np.ndarray  # (n, 3) m/s, NaN unknown; a detection's has no vertical part
    attribute: np.ndarray  # (n,) str, "" unknown
    score: np.ndarray  # (n,) -1 for annotations
    points: np.ndarray  # (n,) of lidar and radar together, -1 for detections

    def __len__(self):
        return len(self.name)

    def __getitem__(self, rows):
        """Rows by index array, mask or slice."""
        return Boxes(*(column[rows] for column in vars(self).values()))


def scenes_of(split: str) -> list[str]:
    """Names of the scenes of an official split, sorted."""
    numbers = []
    for part in SPLITS[split][1].split():
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [f"scene-{number:04d}" for number in numbers]


def frames(source, config, problems: list[str] | None = None) -> Sequence[Frame]:
    """The frames of a `data.Source`, from their index where that is wanted. Raises what `read_frames` raises."""
    root, limit = Path(source.root or config.root), source.limit or None
    if problems is not None or config.index == "none" or not find_spec("formats.index"):
        return read_frames(root, source.split, source.version, source.cameras, problems)[:limit]
    index, tables = import_module("formats.index"), find_version(root, source.version)

    def made_from():
        files = [(file.name, file.stat()) for file in sorted(tables.glob("*.json"))]
        return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)

    plan = index.Plan(
        source=root,
        choice=f"nuscenes {tables.name} {' '.join(source.split)} of {' '.join(source.cameras)}",
        folder=root,
        made_from=made_from,
        jobs=[source.split],  # all at once, as the tables are
        read=partial(read_frames, root, version=tables.name, cameras=source.cameras),
    )
    frames = index.frames(plan, config.index)
    return frames[:limit] if limit else frames


def read_frames(root: str | Path, splits, version="", cameras=(), problems=None, images=True) -> list[Frame]:
    """Every camera's key frames of some splits, by scene, time and camera: labels in its frame, by its own ego pose.

    version: default the only v1.0-* folder of root; cameras: default all. An object is labelled in each image that
    shows a pixel of it: velocity in the camera frame (NaN where the official rule has none), truncation as the share of
    its projection outside the image, the x axis projected onto the camera's xz plane as yaw. What has no lidar or radar
    point, or a centre behind the camera, is an ignore region. Raises UserError naming the table, split, sample or file;
    with a list `problems`, sentences on single frames go there, and the frames are left out. With images, each image
    file must be there.
    """
    root, tables = Path(root), find_version(root, version)
    samples = read_samples(tables, splits)
    boxes, occlusion = read_annotations(tables, samples)
    rows_of = np.split(np.arange(len(boxes)), np.searchsorted(boxes.sample, np.arange(1, len(samples))))
    key_frames = _read_key_frames(tables, samples, cameras)
    folders = {(root / one.file).parent for one in key_frames}
    files = {path for folder in folders if folder.is_dir() for path in folder.iterdir()} if images else None
    frames = []
    for one in key_frames:
        sample, rows, path = samples[one.sample], rows_of[one.sample], root / one.file
        if problem := _problem(one, path, files):
            sentence = f"{tables}: {one.channel} of sample {sample.token}: {problem}"
            if problems is None:
                raise UserError(sentence)
            problems.append(sentence)
        else:
            id, labels = f"{sample.scene}/{one.channel}/{one.time}", _labels_in(boxes[rows], occlusion[rows], one)
            frames.append(Frame(id, path, one.K, labels, group=sample.token, pose=one.pose, size=one.size))
    return frames


def _problem(key_frame, path, files):
    """Why a key frame, its image (to be among `files`, if that is not None) or its K cannot be used, or None."""
    if not key_frame.file:
        return "sample_data.json holds no key frame of it"
    if files is not None and path not in files:
        return f"no such image {path}"
    problem = camera_problem(key_frame.K, *key_frame.size) if key_frame.K.size else None
    return f"its camera_intrinsic: {problem}" if problem else None


@dataclasses.dataclass(frozen=True)
class Truth:
    """What detections of some samples are evaluated against."""

    tokens: list[str]  # of the s samples
    boxes: Boxes  # of the ten classes, by sample, in the order of the table
    vehicle: np.ndarray  # (s, 2) m, where the vehicle stands at the time of LIDAR_TOP's key frame
    racks: np.ndarray  # (m, 4, 3) m, bicycle racks: a corner, and the other ends of the three edges from it
    rack_sample: np.ndarray  # (m,) index of the sample


def read_truth(root: str | Path, splits: Sequence[str], version: str = "", tokens: Collection[str] = ()) -> Truth:
    """The ground truth of some splits; with `tokens`, of these samples alone. Raises as `read_frames` does."""
    folder = find_version(root, version)
    samples = read_samples(folder, splits)
    boxes, _ = read_annotations(folder, samples)
    chosen = np.array([not tokens or sample.token in tokens for sample in samples], bool)
    boxes = boxes[chosen[boxes.sample]]
    place = (np.cumsum(chosen) - 1)[boxes.sample]
    boxes = dataclasses.replace(boxes, sample=place, listed=place)
    samples = list(compress(samples, chosen))
    racks = boxes[boxes.name == RACK]
    key_frames = _read_key_frames(folder, samples, ("LIDAR_TOP",))
    for one in key_frames:
        if problem := _problem(one, None, None):
            raise UserError(f"{folder}: LIDAR_TOP of sample {samples[one.sample].token}: {problem}")
    return Truth(
        tokens=[sample.token for sample in samples],
        boxes=boxes[np.isin(boxes.name.astype(str), list(ATTRIBUTES))],
        vehicle=np.array([one.vehicle[:2] for one in key_frames]).reshape(-1, 2),
        racks=_edges(racks),
        rack_sample=racks.sample,
    )


def _edges(boxes):
    """Of n boxes (n, 4, 3): a corner, then its neighbours along the box's length, width and height.

    Multiplied as the devkit multiplies all eight at once, to agree on points that lie on a face to the last bit.
    """
    x, y, z = np.array([[1, 1, 1, 1, -1, -1, -1, -1], [1, -1, -1, 1, 1, -1, -1, 1], [1, 1, -1, -1, 1, 1, -1, -1]])
    l, h, w = (boxes.size[:, axis, None] / 2 for axis in range(3))
    corners = boxes.rotation @ np.stack([l * x, w * y, h * z], 1) + boxes.center[:, :, None]
    return corners[:, :, [0, 4, 1, 3]].transpose(0, 2, 1)


def read_results(path: str | Path, tokens: Sequence[str]) -> tuple[Boxes, dict]:
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
        return parse_results(content["results"], tokens), content["meta"]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_results(results: dict[str, list[dict]], tokens: Sequence[str]) -> Boxes:
    """Sample token -> official boxes, as `Boxes` in that order. Raises UserError naming the sample and the box."""
    index = {token: i for i, token in enumerate(tokens)}
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
        name=words("detection_name", ATTRIBUTES, f"one of {', '.join(ATTRIBUTES)}"),
        center=numbers("translation", (3,), "3 numbers"),
        size=numbers("size", (3,), "3 numbers")[:, [1, 2, 0]],  # file: w, l, h
        rotation=rotations(numbers("rotation", (4,), "4 numbers")),
        velocity=np.pad(numbers("velocity", (2,), "2 numbers", nan=True), ((0, 0), (0, 1))),
        attribute=words("attribute_name", ("", *STATES), f"one of {', '.join(STATES)} or ''"),
        score=numbers("detection_score", (), "a number", -1.0),
        points=numbers("num_pts", (), "a number", -1),
    )


def merge_cameras(frames: Iterable[Frame], predictions: Mapping[str, Labels], distance: float = SAME_DISTANCE) -> dict:
    """Sample token -> at most 500 boxes of all its cameras, in the official format, the best score first.

    frames: with group and pose, in any order; predictions: frame id -> Labels in that frame's camera. Of two detections
    of one class by different cameras, nearer than `distance` m seen from above, the one with the lower score is left
    out, of equal scores the one with the larger depth sigma. An unknown velocity becomes 0, an attribute that the class
    cannot have its most frequent one; classes that nuScenes does not detect are left out.
    """
    groups = {}
    for frame in sorted(frames, key=lambda frame: frame.id):  # else their order would count among equal scores
        if not frame.group or frame.pose is None:
            raise UserError(f"frame {frame.id} has no group or no pose, expected frames of a nuScenes source")
        labels = predictions[frame.id]
        labels = labels[np.isin(labels.name.astype(str), list(ATTRIBUTES))]
        groups.setdefault(frame.group, []).append((labels, _official_boxes(frame, labels)))
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


def _official_boxes(frame, labels):
    """Boxes of a result file, of the detections in one camera."""
    turn, n = frame.pose[:3, :3], len(labels)
    center = labels.center @ turn.T + frame.pose[:3, 3]
    ahead = _on_ground(np.stack([np.cos(labels.yaw), -np.sin(labels.yaw)], -1), turn)
    half = np.arctan2(ahead[:, 1], ahead[:, 0]) / 2
    velocity = np.zeros((n, 2)) if labels.velocity is None else _on_ground(labels.velocity[:, [0, 2]], turn)
    velocity = np.nan_to_num(velocity)
    attribute = [""] * n if labels.attribute is None else labels.attribute
    return [
        {
            "sample_token": frame.group,
            "translation": center[row].tolist(),
            "size": labels.size[row, [2, 0, 1]].tolist(),  # w, l, h
            "rotation": [float(np.cos(half[row])), 0.0, 0.0, float(np.sin(half[row]))],
            "velocity": velocity[row].tolist(),
            "detection_name": name,
            "detection_score": float(labels.score[row]),
            "attribute_name": attribute[row] if attribute[row] in ATTRIBUTES[name] else USUAL[name],
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


class Sample(NamedTuple):
    """A key moment of a scene."""

    scene: str  # name
    time: int  # microseconds
    token: str


class KeyFrame(NamedTuple):
    """What a sensor recorded of a sample; without a file where the tables have none."""

    sample: int  # index
    channel: str
    file: str = ""  # relative to the root
    time: int = 0  # microseconds
    size: tuple[int, int] = (0, 0)  # width, height, px
    K: np.ndarray | None = None  # (3, 3) px
    pose: np.ndarray | None = None  # (4, 4) sensor -> global, m
    vehicle: np.ndarray | None = None  # (3,) m, where it stands in the global frame at that time


def find_version(root: str | Path, version: str = "") -> Path:
    """The folder with the tables: root/version, or the only v1.0-* of root. Raises UserError naming what is there."""
    root = Path(root)
    versions = sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())
    if not versions:
        expected = "a nuScenes folder with its tables in v1.0-mini, v1.0-trainval or v1.0-test"
        raise UserError(f"{root.absolute()}: expected {expected}")
    if version and version not in versions:
        raise UserError(f"{root}: there is no version {version!r}, only {', '.join(versions)}")
    if not version and len(versions) > 1:
        raise UserError(f"{root}: there are {', '.join(versions)}, expected version to name one of them")
    return root / (version or versions[0])


def read_table(folder, name, keys, wanted=None):
    """Columns of a table, in the order of `keys`, as lists; only of rows (tuples of those values) that are `wanted`.

    Raises UserError naming the file and the key that a row lacks.
    """
    path, take = folder / f"{name}.json", itemgetter(*keys)

    def row_of(entry):  # while it is parsed: a table of millions must not stand in memory as dicts
        row = take(entry)
        return row if wanted is None or wanted(row) else None

    try:
        rows = [row for row in json.loads(path.read_bytes(), object_hook=row_of) if row is not None]
        return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in keys]
    except FileNotFoundError:
        raise UserError(f"{path}: no such table") from None
    except KeyError as error:
        raise UserError(f"{path}: a row lacks {error}, expected {', '.join(keys)}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON list of rows: {error}") from None


def read_names(folder, name, key="name"):
    """Token -> a value of each row of a table."""
    return dict(zip(*read_table(folder, name, ("token", key)), strict=True))


def read_samples(folder, splits):
    """The samples of some official splits, by scene and time. Raises UserError naming the split."""
    names = read_names(folder, "scene")
    fitting = [split for split, (ending, _) in SPLITS.items() if folder.name.endswith(f"-{ending}")] or [*SPLITS]
    chosen = set()
    for split in splits:
        if split not in fitting:
            raise UserError(f"{folder}: there is no split {split!r}, expected {', '.join(fitting)}")
        scenes = set(scenes_of(split)) & set(names.values())
        if not scenes:
            some = ", ".join(sorted(set(names.values()))[:10])
            raise UserError(f"{folder}/scene.json: it holds no scene of split {split!r}; its scenes are {some}")
        chosen |= scenes
    rows = zip(*read_table(folder, "sample", ("scene_token", "timestamp", "token")), strict=True)
    return sorted(Sample(names[scene], time, token) for scene, time, token in rows if names.get(scene) in chosen)


def read_annotations(folder, samples):
    """All annotations of some samples as `Boxes` and their occlusion levels (n,), by sample, in the order of the table.

    A name is the detection class or, where there is none, the category.
    """
    index = {sample.token: i for i, sample in enumerate(samples)}
    keys = ("token", "sample_token", "instance_token", "visibility_token", "attribute_tokens", "translation", "size",
            "rotation", "prev", "next", "num_lidar_pts", "num_radar_pts")  # fmt: skip
    columns = read_table(folder, "sample_annotation", keys, lambda row: row[1] in index)
    token, sample, instance, visibility, attributes, center, size, rotation, before, after, lidar, radar = columns
    category, instances = read_names(folder, "category"), read_names(folder, "instance", "category_token")
    attribute, level = read_names(folder, "attribute"), read_names(folder, "visibility", "level")
    place = f"{folder}/sample_annotation.json"
    for row, several in enumerate(attributes):
        if len(several) > 1:
            raise UserError(f"{place}: annotation {token[row]} has {len(several)} attributes, expected at most one")
    row_of = {key: row for row, key in enumerate(token)}
    try:
        names = [category[instances[key]] for key in instance]
        states = [attribute[several[0]] if several else "" for several in attributes]
        first = np.array([row_of[key or own] for key, own in zip(before, token, strict=True)], int)
        last = np.array([row_of[key or own] for key, own in zip(after, token, strict=True)], int)
    except KeyError as error:
        raise UserError(f"{place}: an annotation refers to {error}, which no table of {folder} holds") from None
    at = np.array([index[key] for key in sample], int)
    seconds = np.array([1e-6 * samples[row].time for row in at])  # rounded before they are subtracted, as officially
    center = _numbers(center, 3, "translation", token, place)
    boxes = Boxes(
        sample=at,
        listed=at,
        name=np.array([CLASS_OF.get(name, name) for name in names], dtype=object),
        center=center,
        size=_numbers(size, 3, "size", token, place, TINY)[:, [1, 2, 0]],  # file: w, l, h
        rotation=rotations(_numbers(rotation, 4, "rotation", token, place)),
        velocity=_velocities(center, seconds, first, last),
        attribute=np.array(states, dtype=object),
        score=np.full(len(token), -1.0),
        points=np.array(lidar, int) + np.array(radar, int),
    )
    order = np.argsort(boxes.sample, kind="stable")
    return boxes[order], np.array([OCCLUSION.get(level.get(key), -1) for key in visibility], int)[order]


def _velocities(center, seconds, first, last):
    """Velocities (n, 3) m/s from the annotation before to that after, or itself: the official `box_velocity`."""
    duration, rows = seconds[last] - seconds[first], np.arange(len(center))
    longest = np.where((first != rows) & (last != rows), 2 * LONGEST_GAP, LONGEST_GAP)
    known = (first != last) & (duration <= longest)
    return np.where(known[:, None], (center[last] - center[first]) / np.where(known, duration, 1.0)[:, None], np.nan)


def _read_key_frames(folder, samples, channels):
    """`KeyFrame`s of some sensors of all samples, by sample, then in the order of `channels`; () is every camera."""
    sensor, channel, modality = read_table(folder, "sensor", ("token", "channel", "modality"))
    cameras = sorted(name for name, kind in zip(channel, modality, strict=True) if kind == "camera")
    if unknown := [name for name in channels if name not in channel]:
        raise UserError(f"{folder}/sensor.json: there is no camera {unknown[0]!r}, only {', '.join(cameras)}")
    channels, name_of = channels or cameras, dict(zip(sensor, channel, strict=True))
    keys = ("token", "sensor_token", "camera_intrinsic")
    mounted, sensor, K = _read_poses(folder, "calibrated_sensor", keys, lambda row: name_of.get(row[1]) in channels)
    row_of = {token: row for row, token in enumerate(mounted)}
    index = {sample.token: i for i, sample in enumerate(samples)}
    keys = ("is_key_frame", "sample_token", "calibrated_sensor_token", "ego_pose_token", "timestamp", "filename",
            "width", "height")  # fmt: skip
    columns = read_table(folder, "sample_data", keys, lambda row: row[0] and row[1] in index and row[2] in row_of)
    needed = set(columns[3])
    [driven] = _read_poses(folder, "ego_pose", ("token",), lambda row: row[0] in needed)
    if missing := needed - driven.keys():
        raise UserError(f"{folder}/ego_pose.json: there is no pose {min(missing)!r}, which sample_data.json refers to")
    key_frames = {}
    for _, token, mount, ego, time, file, width, height in zip(*columns, strict=True):
        row, pose = row_of[mount], driven[ego]
        place, camera = (index[token], name_of[sensor[row]]), np.array(K[row], float)
        key_frames[place] = KeyFrame(*place, file, time, (width, height), camera, pose @ mounted[mount], pose[:3, 3])
    places = [(i, name) for i in range(len(samples)) for name in channels]
    return [key_frames.get(place, KeyFrame(*place)) for place in places]


def _read_poses(folder, name, keys, wanted):
    """Of a table token -> pose (4, 4) in what it is mounted on or drives in, and the columns of the other `keys`."""
    token, *columns, translation, rotation = read_table(folder, name, (*keys, "translation", "rotation"), wanted)
    poses = np.tile(np.eye(4), (len(token), 1, 1))
    poses[:, :3, :3] = rotations(_numbers(rotation, 4, "rotation", token, folder / f"{name}.json"))
    poses[:, :3, 3] = _numbers(translation, 3, "translation", token, folder / f"{name}.json")
    return [dict(zip(token, poses, strict=True)), *columns]


def _labels_in(boxes, occlusion, key_frame):
    """Labels of the boxes of a sample that a camera shows, objects before ignore regions."""
    turn, origin = key_frame.pose[:3, :3], key_frame.pose[:3, 3]
    center = (boxes.center - origin) @ turn  # R^T (x - o), row by row
    forward, left, up = (boxes.rotation[:, :, axis] @ turn for axis in range(3))
    yaw = np.arctan2(-forward[:, 2], forward[:, 0])
    corners = center[:, None] + CORNER_SIGNS * boxes.size[:, None] @ np.stack([forward, -up, left], 1)
    box = visible_boxes(corners, key_frame.K, *key_frame.size)
    shown = ((box[:, 2:] - box[:, :2]) >= 1).all(1)
    real = (boxes.points > 0) & (center[:, 2] > 0)
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


def rotations(quaternions):
    """Quaternions (n, 4) as w, x, y, z, of any length > 0 -> rotation matrices (n, 3, 3).

    The product of the two quaternion matrices, as pyquaternion forms it: the last bit decides on the face of a rack.
    """
    q = np.asarray(quaternions, float).reshape(-1, 4)
    squared = (q[:, None, :] @ q[:, :, None])[:, 0]  # (n, 1)
    length = np.where((np.abs(1 - squared) < 1e-14) | (squared == 0), 1.0, np.sqrt(squared))
    w, x, y, z = (q / length).T
    left = np.stack([w, -x, -y, -z, x, w, -z, y, y, z, w, -x, z, -y, x, w], -1).reshape(-1, 4, 4)
    right = np.stack([w, -x, -y, -z, x, w, z, -y, y, -z, w, x, z, y, -x, w], -1).reshape(-1, 4, 4)
    return (left @ right.transpose(0, 2, 1))[:, 1:, 1:]


def _numbers(values, length, key, token, place, low=-LARGEST):
    """A column of a table -> (n, length) floats. Raises UserError naming the table and the first bad row."""
    array, bad = read_numbers(values, (length,), low, LARGEST)
    if key == "rotation":
        bad += np.flatnonzero(~array.any(1)).tolist()
    if bad:
        expected = f"{length} {'finite' if low < 0 else 'positive'} numbers"
        raise UserError(f"{place}: {key} of {token[bad[0]]} is {str(values[bad[0]])[:80]}, expected {expected}")
    return array
