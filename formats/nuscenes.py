"""nuScenes: tables -> frames and ground truth; detections of six cameras <-> result files. Needs v1.0-*'s tables, not the devkit.

The only place that knows the global frame's quaternions and (w, l, h). Format: https://www.nuscenes.org/nuscenes#data-format (Caesar et
al., CVPR 2020); rules are those of nuscenes-devkit 1.2.0, which the tests compare with.

A frame is one camera's key frame, its id scene/channel/time stamp. A class is the official detection class; an object of no such class
keeps its category ('animal', 'static_object.bicycle_rack'), and is background unless data.neighbours names it.
"""

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from formats.index import Part, Reading, chunk_of, find_columns
from scene.frames import LARGEST, Frame, Labels, image_size, make_labels
from scene.geometry import CORNER_SIGNS, camera_problem, project_boxes, visible_boxes

VEHICLE = ("vehicle.moving", "vehicle.parked", "vehicle.stopped")
CYCLE = ("cycle.with_rider", "cycle.without_rider")
PERSON = ("pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing")
ATTRIBUTES = {  # the ten detection classes in the official order: the attributes that an object of the class may have
    "car": VEHICLE, "truck": VEHICLE, "bus": VEHICLE, "trailer": VEHICLE, "construction_vehicle": VEHICLE,
    "pedestrian": PERSON, "motorcycle": CYCLE, "bicycle": CYCLE, "traffic_cone": (), "barrier": (),
}  # fmt: skip
STATES = (*PERSON, *CYCLE, *VEHICLE)  # every attribute, in the official order
CLASS_OF = {  # category: detection class; the others have none
    "movable_object.barrier": "barrier",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}
RACK = "static_object.bicycle_rack"
OCCLUSION = {
    "v80-100": 0,
    "v60-80": 1,
    "v40-60": 2,
    "v0-40": 3,
}  # share seen by all cameras together, in percent: KITTI's level
LONGEST_GAP = 1.5  # s between the two annotations that a velocity is taken from, and twice that around one between them

USUAL = {  # attribute of a class that is not told: its most frequent one among the 5441 boxes of mini_val, as in FCOS3D
    "car": "vehicle.parked", "truck": "vehicle.parked", "bus": "vehicle.moving", "trailer": "vehicle.parked",
    "construction_vehicle": "vehicle.parked", "pedestrian": "pedestrian.moving", "motorcycle": "cycle.without_rider",
    "bicycle": "cycle.without_rider", "traffic_cone": "", "barrier": "",
}  # fmt: skip
SAME_DISTANCE = 1.0  # m: nearer detections of one class by two cameras are one object; more mAP than any overlap from above, as is 2 m
MOST_BOXES = 500  # of a sample, all cameras together

SPLITS = {  # name: the version's ending, and the numbers of its scenes (nuscenes/utils/splits.py)
    "mini_train": ("mini", "61 553 655 757 796 1077 1094 1100"),
    "mini_val": ("mini", "103 916"),
    "train": ("trainval", "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204 206-214 "
              "218-220 222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 467-469 471-472 474-480 499-502 "
              "504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 683-689 695-698 700-701 703-719 726-728 730-731 "
              "733-741 744 746-747 749-752 757-765 767-769 786-787 789-792 803-806 808-813 815-817 819-822 847-856 858 860-866 868-873 "
              "875-878 880 882-903 945 947 949 952-953 955-961 975-984 988-992 994-1025 1044-1058 1074-1102 1104-1110"),
    "val": ("trainval", "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775 "
            "777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"),
    "test": ("test", "77-91 111-119 140 142-148 265-266 279-282 307-314 333-343 481-498 547-551 601-604 606-624 827-831 833-842 844-846 "
             "932-933 935-943 1026-1043"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Boxes:
    """n boxes in the global frame (metres, z up), annotated or detected, as columns; each is one of a list of samples."""

    sample: np.ndarray  # (n,) index of the sample that the box names
    listed: (
        np.ndarray
    )  # (n,) index of the sample that it is listed under: another one only in a file that mixes them up
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


def read_frames(
    root: str | Path,
    splits: Sequence[str],
    version: str = "",
    cameras: Sequence[str] = (),
    problems: list[str] | None = None,
    images: bool = True,
) -> list[Frame]:
    """Every camera's key frames of some splits, by scene, time and camera: labels in that camera's frame, through its own ego pose.

    version: default the only v1.0-* folder of root; cameras: default all. Frame.group is the sample's token and Frame.pose the camera in
    the global frame. An object is labelled in each image that shows a pixel of it: velocity in the camera frame (NaN where the official
    rule has none), occlusion from its visibility, truncation as the share of its projection outside the image. What has no lidar or radar
    point, or a centre behind the camera, is an ignore region. Boxes keep their yaw alone: the x axis projected onto the camera's xz plane.
    Raises FileNotFoundError or ValueError naming the table, split, sample or file. With a list `problems`, what is wrong with single
    frames is added to it as a sentence, and the frame left out, instead. With images, each image file must be there.
    """
    folder = find_version(root, version)
    samples = read_samples(folder, splits)
    boxes, occlusion = read_annotations(folder, samples)
    rows_of = np.split(np.arange(len(boxes)), np.searchsorted(boxes.sample, np.arange(1, len(samples))))
    views = _read_views(folder, samples, cameras)
    there = {
        path
        for parent in {(Path(root) / view.file).parent for view in views}
        if parent.is_dir()
        for path in parent.iterdir()
    }
    frames = []
    for view in views:
        sample, rows = samples[view.sample], rows_of[view.sample]
        try:
            _check_view(
                view,
                Path(root) / view.file,
                there if images else None,
                f"{folder}: {view.channel} of sample {sample.token}",
            )
        except (ValueError, OSError) as error:
            if problems is None:
                raise
            problems.append(str(error))
            continue
        labels = _labels_in(boxes[rows], occlusion[rows], view)
        id = f"{sample.scene}/{view.channel}/{view.time}"
        frames.append(Frame(id, Path(root) / view.file, view.K, labels, group=sample.token, pose=view.pose))
    return frames


def open_frames(
    root: str | Path, splits: Sequence[str], version: str = "", cameras: Sequence[str] = (), folder: str = ""
) -> Part:
    """`Part` with what `read_frames` gives, from its index in `folder` (`find_columns`). Raises what `read_frames` raises."""
    root, tables = Path(root), find_version(root, version)
    files = sorted(tables.glob("*.json"))
    how = Reading(
        source=root,
        choice=f"nuscenes {tables.name} {' '.join(splits)} of {' '.join(cameras)}",
        folder=root,
        made_from=lambda: " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files),
        jobs=[splits],  # at once: the tables are
        read=partial(_read_chunk, root, tables.name, cameras),
    )
    columns = find_columns(how, folder)
    return Part(columns, root, len(columns))


def _read_chunk(root, version, cameras, splits):
    """The frames of some splits as a `Chunk`, with the sizes of their images."""
    frames, sizes = read_frames(root, splits, version, cameras), []
    for frame in frames:
        try:
            sizes.append(image_size(frame.image))
        except OSError:
            sizes.append((0, 0))  # the loader names it, or passes it over
    images = [frame.image.relative_to(root).as_posix() for frame in frames]
    return dataclasses.replace(chunk_of(frames), image=images, image_size=np.array(sizes).reshape(-1, 2))


def _check_view(view, path, there, place):
    """ValueError or FileNotFoundError where a camera's key frame, its image (among the paths `there`, or None) or its K is not usable."""
    if not view.file:
        raise ValueError(f"{place}: sample_data.json holds no key frame of it")
    if there is not None and path not in there:
        raise FileNotFoundError(f"{place}: no such image {path}")
    if view.K.size and (problem := camera_problem(view.K, *view.size)):
        raise ValueError(f"{place}: its camera_intrinsic: {problem}")


@dataclasses.dataclass(frozen=True)
class Truth:
    """What detections of some samples are evaluated against."""

    tokens: list[str]  # of the s samples
    boxes: Boxes  # of the ten classes, by sample, in the order of the table
    vehicle: np.ndarray  # (s, 2) m, where the vehicle stands at the time of LIDAR_TOP's key frame
    racks: np.ndarray  # (m, 4, 3) m, bicycle racks: a corner, and the other ends of the three edges from it
    rack_sample: np.ndarray  # (m,) index of the sample

    def only(self, tokens: Collection[str]) -> "Truth":
        """The truth of those samples that `tokens` names, such as the groups of a few frames."""
        chosen = np.array([token in tokens for token in self.tokens], bool)
        number, own, racks = np.cumsum(chosen) - 1, chosen[self.boxes.sample], chosen[self.rack_sample]
        boxes, sample = self.boxes[own], number[self.boxes.sample[own]]
        return Truth(
            tokens=[token for token in self.tokens if token in tokens],
            boxes=dataclasses.replace(boxes, sample=sample, listed=sample),
            vehicle=self.vehicle[chosen],
            racks=self.racks[racks],
            rack_sample=number[self.rack_sample[racks]],
        )


def read_truth(root: str | Path, splits: Sequence[str], version: str = "") -> Truth:
    """The ground truth of some splits. Raises as `read_frames` does."""
    folder = find_version(root, version)
    samples = read_samples(folder, splits)
    boxes, _ = read_annotations(folder, samples)
    racks = boxes[boxes.name == RACK]
    views = _read_views(folder, samples, ("LIDAR_TOP",))
    for view in views:
        _check_view(view, None, None, f"{folder}: LIDAR_TOP of sample {samples[view.sample].token}")
    return Truth(
        tokens=[sample.token for sample in samples],
        boxes=boxes[np.isin(boxes.name.astype(str), list(ATTRIBUTES))],
        vehicle=np.array([view.vehicle[:2] for view in views]).reshape(-1, 2),
        racks=_edges(racks),
        rack_sample=racks.sample,
    )


def _edges(boxes):
    """Of n boxes (n, 4, 3): a corner, then its neighbours along the box's length, width and height.

    Multiplied as the devkit multiplies them, all eight at once, to agree on points that lie on a face to the last bit.
    """
    l, h, w = (boxes.size[:, axis, None] / 2 for axis in range(3))
    signs = np.array([[1, 1, 1, 1, -1, -1, -1, -1], [1, -1, -1, 1, 1, -1, -1, 1], [1, 1, -1, -1, 1, 1, -1, -1]])
    corners = boxes.rotation @ np.stack([l * signs[0], w * signs[1], h * signs[2]], 1) + boxes.center[:, :, None]
    return corners[:, :, [0, 4, 1, 3]].transpose(0, 2, 1)


def read_results(path: str | Path, tokens: Sequence[str]) -> tuple[Boxes, dict]:
    """The detections of a result file in the official format, for samples named by `tokens`, in the file's order, and its meta.

    Raises FileNotFoundError or ValueError naming the file and, where there is one, the sample and the box: whatever the official
    evaluator refuses, and a box whose sample_token is none of the samples.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such result file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    for key in ("results", "meta"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise ValueError(
                f'{path}: expected an object {{"meta": {{...}}, "results": {{sample token: [box, ...]}}}}, found no {key!r}'
            )
    if not any(content["results"].values()):
        raise ValueError(f"{path}: it holds no box at all, which the official evaluator refuses")
    try:
        return parse_results(content["results"], tokens), content["meta"]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_results(results: dict[str, list[dict]], tokens: Sequence[str]) -> Boxes:
    """Sample token -> boxes in the official format, as `Boxes` in that order. Raises ValueError naming the sample and the box."""
    index = {token: i for i, token in enumerate(tokens)}
    if missing := index.keys() - results.keys():
        raise ValueError(
            f"{len(missing)} of {len(tokens)} samples are missing, the first is {min(missing)}; without detections: []"
        )
    if extra := results.keys() - index.keys():
        raise ValueError(f"{len(extra)} samples are none of the split's, the first is {min(extra)}")
    for token, boxes in results.items():
        if not isinstance(boxes, list):
            raise ValueError(f"sample {token} holds {str(boxes)[:80]}, expected a list of boxes")
        if len(boxes) > MOST_BOXES:
            raise ValueError(f"sample {token} holds {len(boxes)} boxes, expected at most {MOST_BOXES}")
    keys, counts = list(results), [len(boxes) for boxes in results.values()]
    starts = np.cumsum([0, *counts])

    def place(row):
        place = np.searchsorted(starts, row, "right") - 1
        return f"sample {keys[place]}, box {row - starts[place]}"

    entries = [box for boxes in results.values() for box in boxes]
    size, velocity = _vectors(entries, "size", 3, place), _vectors(entries, "velocity", 2, place, finite=False)
    return Boxes(
        sample=np.array(_column(entries, "sample_token", "one of the samples", index.__getitem__, place), int),
        listed=np.repeat(np.array([index[key] for key in keys], int), counts),
        name=np.array(
            _column(entries, "detection_name", f"one of {', '.join(ATTRIBUTES)}", _one_of(ATTRIBUTES), place),
            dtype=object,
        ),
        center=_vectors(entries, "translation", 3, place),
        size=size[:, [1, 2, 0]],  # file: w, l, h
        rotation=rotations(_vectors(entries, "rotation", 4, place)),
        velocity=np.concatenate([velocity, np.zeros((len(entries), 1))], 1),
        attribute=np.array(
            _column(entries, "attribute_name", f"one of {', '.join(STATES)} or ''", _one_of(("", *STATES)), place),
            dtype=object,
        ),
        score=np.array(_column(entries, "detection_score", "a number", _score, place, -1.0), float),
        points=np.array(_column(entries, "num_pts", "an integer", int, place, -1), int),
    )


def _column(entries, key, expected, convert, place, *default):
    """The converted values of one key of boxes; place: index -> words for where the box stands."""
    found = []
    for row, entry in enumerate(entries):
        try:
            found.append(convert(entry.get(key, *default) if default else entry[key]))
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            value = f"{key} is {str(entry.get(key, 'missing'))[:80]!r}" if isinstance(entry, dict) else str(entry)[:80]
            raise ValueError(f"{place(row)}: {value}, expected {expected}") from None
    return found


def _vectors(entries, key, length, place, finite=True):
    """The values of one key of boxes, lists of that many numbers: (n, length). With `finite`, none may be NaN, as officially."""

    def numbers(value):
        if len(value) != length or not all(type(v) in (int, float) and not (finite and v != v) for v in value):
            raise ValueError
        return value

    array = _column(entries, key, f"{length} numbers", numbers, place)
    return np.array(array, float).reshape(len(entries), length)


def _one_of(names):
    """What returns a value that is one of some names, and raises ValueError for another."""

    def check(value):
        if value not in names:
            raise ValueError
        return value

    return check


def _score(value):
    """A number, also from text as officially, but not NaN."""
    number = float(value)
    if np.isnan(number):
        raise ValueError
    return number


def merge_cameras(
    frames: Iterable[Frame], predictions: Mapping[str, Labels], distance: float = SAME_DISTANCE
) -> dict[str, list[dict]]:
    """Detections of the cameras of each sample as one list: sample token -> at most 500 boxes in the official format, best score first.

    frames: with group and pose, in any order; predictions: frame id -> Labels in that frame's camera. Of two detections of one class by
    different cameras, whose centres seen from above are nearer than `distance` m, the one with the lower score is left out, and of equal
    scores the one with the larger depth sigma. An unknown velocity becomes 0, an attribute of another family than the class's its most
    frequent one; classes that nuScenes does not detect are left out.
    """
    groups = {}
    for frame in sorted(
        frames, key=lambda frame: frame.id
    ):  # so that the order of frames changes nothing, not even among equal scores
        if not frame.group or frame.pose is None:
            raise ValueError(f"frame {frame.id} has no group or no pose, expected frames of a nuScenes source")
        groups.setdefault(frame.group, []).append(_in_global(predictions[frame.id], frame.pose))
    merged = {}
    for token, parts in groups.items():
        camera = np.repeat(np.arange(len(parts)), [len(part["score"]) for part in parts])
        boxes = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        order = np.lexsort((boxes["sigma"], -boxes["score"]))
        kept = _first_of_each(boxes["name"][order], boxes["center"][order, :2], camera[order], distance)
        merged[token] = [_official(token, boxes, row) for row in order[kept][:MOST_BOXES]]
    return merged


def _in_global(labels, pose):
    """Columns of the detections of one camera, posed (4, 4), in the global frame."""
    labels = labels[np.isin(labels.name.astype(str), list(ATTRIBUTES))]
    turn, n = pose[:3, :3], len(labels)
    center = labels.center @ turn.T + pose[:3, 3]
    ahead = _on_ground(np.stack([np.cos(labels.yaw), -np.sin(labels.yaw)], -1), turn)
    yaw = np.arctan2(ahead[:, 1], ahead[:, 0])
    velocity = np.zeros((n, 2)) if labels.velocity is None else _on_ground(labels.velocity[:, [0, 2]], turn)
    given = np.full(n, "", object) if labels.attribute is None else labels.attribute
    fits = [state in ATTRIBUTES[name] for name, state in zip(labels.name, given, strict=True)]
    return {
        "name": labels.name,
        "center": center,
        "size": labels.size,
        "yaw": yaw,
        "velocity": np.nan_to_num(velocity),
        "attribute": np.array(
            [g if fit else USUAL[name] for g, fit, name in zip(given, fits, labels.name, strict=True)], dtype=object
        ),
        "score": labels.score,
        "sigma": np.full(n, np.inf) if labels.sigma is None else np.nan_to_num(labels.sigma, nan=np.inf),
    }


def _on_ground(vectors, turn):
    """The level vectors (n, 2) of the global frame whose parts along a camera's x and z are `vectors` (n, 2); turn: camera -> global.

    The exact inverse of a yaw or velocity read off in the camera's xz plane, also for a camera that looks up or down.
    """
    seen = vectors @ turn[:, [0, 2]].T
    return (seen - seen[:, 2:] / turn[2, 1] * turn[:, 1])[:, :2]


def _first_of_each(name, ground, camera, distance):
    """(n,) bool: of n detections, best first, those that are no other camera's view of one that is kept. ground (n, 2) m."""
    first, second = np.triu_indices(len(name), 1)
    same = (name[first] == name[second]) & (camera[first] != camera[second])
    same &= np.hypot(*(ground[first] - ground[second]).T) < distance
    kept = np.ones(len(name), bool)
    for i, j in zip(first[same].tolist(), second[same].tolist(), strict=True):
        kept[j] &= not kept[i]
    return kept


def _official(token, boxes, row):
    """One box of a result file."""
    l, h, w = boxes["size"][row].tolist()
    half = boxes["yaw"][row] / 2
    return {
        "sample_token": token,
        "translation": boxes["center"][row].tolist(),
        "size": [w, l, h],
        "rotation": [float(np.cos(half)), 0.0, 0.0, float(np.sin(half))],
        "velocity": boxes["velocity"][row].tolist(),
        "detection_name": boxes["name"][row],
        "detection_score": float(boxes["score"][row]),
        "attribute_name": boxes["attribute"][row],
    }


def write_results(path: str | Path, samples: dict[str, list[dict]]) -> None:
    """Sample token -> boxes, as `merge_cameras` gives them, as a result file of a camera-only method in the official format."""
    used = {f"use_{sensor}": sensor == "camera" for sensor in ("camera", "lidar", "radar", "map", "external")}
    Path(path).write_text(json.dumps({"meta": used, "results": samples}, allow_nan=False), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A key moment of a scene."""

    token: str
    scene: str  # name
    time: int  # microseconds


@dataclasses.dataclass(frozen=True)
class View:
    """One sensor's key frame of a sample; without a file where the tables have none."""

    sample: int  # index
    channel: str
    file: str = ""  # relative to the root
    time: int = 0  # microseconds
    size: tuple[int, int] = (0, 0)  # width, height, px
    K: np.ndarray | None = None  # (3, 3) px
    pose: np.ndarray | None = None  # (4, 4) sensor -> global, m
    vehicle: np.ndarray | None = None  # (3,) m, where it stands in the global frame at that time


def find_version(root: str | Path, version: str = "") -> Path:
    """The folder with the tables: root/version, or the only v1.0-* of root. Raises FileNotFoundError naming what is there."""
    root = Path(root)
    there = sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())
    if not there:
        raise FileNotFoundError(
            f"{root.absolute()}: expected a nuScenes folder with its tables in v1.0-mini, v1.0-trainval or v1.0-test"
        )
    if not version and len(there) > 1:
        raise ValueError(f"{root}: there are {', '.join(there)}, expected version to name one of them")
    if version and version not in there:
        raise FileNotFoundError(f"{root}: there is no version {version!r}, only {', '.join(there)}")
    return root / (version or there[0])


def read_table(folder, name, keys, wanted=None):
    """Columns of a table, in the order of `keys`, as lists; only of rows (tuples of those values) that are `wanted`.

    Raises FileNotFoundError, or ValueError naming the file and the key that a row lacks.
    """
    path, take = folder / f"{name}.json", itemgetter(*keys)

    def row_of(
        entry,
    ):  # rows become tuples, or nothing, while they are parsed: a table of millions must not stand in memory as dicts
        row = take(entry)
        return row if wanted is None or wanted(row) else None

    try:
        rows = [row for row in json.loads(path.read_bytes(), object_hook=row_of) if row is not None]
        return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in keys]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such table") from None
    except KeyError as error:
        raise ValueError(f"{path}: a row lacks {error}, expected {', '.join(keys)}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a JSON list of rows: {error}") from None


def read_samples(folder, splits):
    """The samples of some official splits, by scene and time. Raises ValueError naming the split."""
    scene_token, name = read_table(folder, "scene", ("token", "name"))
    found = dict.fromkeys(name)
    chosen = set()
    for split in splits:
        fitting = [s for s, (ending, _) in SPLITS.items() if folder.name.endswith(f"-{ending}")]
        if split not in SPLITS or (fitting and split not in fitting):
            raise ValueError(f"{folder}: there is no split {split!r}, expected {', '.join(fitting or SPLITS)}")
        scenes = set(scenes_of(split)) & found.keys()
        if not scenes:
            raise ValueError(
                f"{folder}/scene.json: it holds no scene of split {split!r}; its scenes are {', '.join(sorted(found)[:10])}"
            )
        chosen |= scenes
    name_of = dict(zip(scene_token, name, strict=True))
    tokens, times, scene_of = read_table(folder, "sample", ("token", "timestamp", "scene_token"))
    samples = [
        Sample(t, name_of[s], time)
        for t, time, s in zip(tokens, times, scene_of, strict=True)
        if name_of.get(s) in chosen
    ]
    return sorted(samples, key=lambda sample: (sample.scene, sample.time))


def read_annotations(folder, samples):
    """All annotations of some samples as `Boxes` and their occlusion levels (n,), by sample, in the order of the table.

    A name is the detection class or, where there is none, the category.
    """
    index = {sample.token: i for i, sample in enumerate(samples)}
    keys = ("token", "sample_token", "instance_token", "visibility_token", "attribute_tokens", "translation", "size", "rotation",
            "prev", "next", "num_lidar_pts", "num_radar_pts")  # fmt: skip
    columns = read_table(folder, "sample_annotation", keys, lambda row: row[1] in index)
    token, sample, instance, visibility, attributes, center, size, rotation, before, after, lidar, radar = columns
    category = dict(zip(*read_table(folder, "category", ("token", "name")), strict=True))
    instances = dict(zip(*read_table(folder, "instance", ("token", "category_token")), strict=True))
    attribute = dict(zip(*read_table(folder, "attribute", ("token", "name")), strict=True))
    level = dict(zip(*read_table(folder, "visibility", ("token", "level")), strict=True))
    place = f"{folder}/sample_annotation.json"
    for row, several in enumerate(attributes):
        if len(several) > 1:
            raise ValueError(f"{place}: annotation {token[row]} has {len(several)} attributes, expected at most one")
    try:
        names = [category[instances[key]] for key in instance]
        states = [attribute[several[0]] if several else "" for several in attributes]
        row_of = {key: row for row, key in enumerate(token)}
        first = [row_of[key] if key else row for row, key in enumerate(before)]
        last = [row_of[key] if key else row for row, key in enumerate(after)]
    except KeyError as error:
        raise ValueError(f"{place}: an annotation refers to {error}, which no table of {folder} holds") from None
    center = _numbers(center, (3,), "translation", token, place)
    size = _numbers(size, (3,), "size", token, place)
    if (size <= 0).any():
        row = int(np.flatnonzero((size <= 0).any(1))[0])
        raise ValueError(f"{place}: annotation {token[row]} has size {size[row].tolist()}, expected metres > 0")
    at = np.array([index[key] for key in sample], int)
    seconds = np.array(
        [1e-6 * samples[index[key]].time for key in sample]
    )  # rounded to floats before they are subtracted, as officially
    boxes = Boxes(
        sample=at,
        listed=at,
        name=np.array([CLASS_OF.get(name, name) for name in names], dtype=object),
        center=center,
        size=size[:, [1, 2, 0]],  # file: w, l, h
        rotation=rotations(_numbers(rotation, (4,), "rotation", token, place)),
        velocity=_velocities(center, seconds, np.array(first, int), np.array(last, int)),
        attribute=np.array(states, dtype=object),
        score=np.full(len(token), -1.0),
        points=np.array(lidar, int) + np.array(radar, int),
    )
    order = np.argsort(boxes.sample, kind="stable")
    return boxes[order], np.array([OCCLUSION.get(level.get(key), -1) for key in visibility], int)[order]


def _velocities(center, seconds, first, last):
    """Velocities (n, 3) m/s between the annotations before and after, or itself where there is none: the official `box_velocity`."""
    duration = seconds[last] - seconds[first]
    rows = np.arange(len(center))
    longest = np.where((first != rows) & (last != rows), 2 * LONGEST_GAP, LONGEST_GAP)
    known = (first != last) & (duration <= longest)
    return np.where(known[:, None], (center[last] - center[first]) / np.where(known, duration, 1.0)[:, None], np.nan)


def _read_views(folder, samples, cameras):
    """Key frames of some sensors of all samples, by sample, then in the order of `cameras`; () stands for every camera."""
    sensor, channel, modality = read_table(folder, "sensor", ("token", "channel", "modality"))
    there = sorted(name for name, kind in zip(channel, modality, strict=True) if kind == "camera")
    unknown = [name for name in cameras if name not in channel]
    if unknown:
        raise ValueError(f"{folder}/sensor.json: there is no camera {unknown[0]!r}, only {', '.join(there)}")
    cameras, name_of = cameras or there, dict(zip(sensor, channel, strict=True))
    mount, sensor, offset, turn, K = read_table(
        folder, "calibrated_sensor", ("token", "sensor_token", "translation", "rotation", "camera_intrinsic")
    )
    row_of = {token: row for row, token in enumerate(mount) if name_of.get(sensor[row]) in cameras}
    mounted = _poses(offset, turn, mount, folder / "calibrated_sensor.json")
    index = {sample.token: i for i, sample in enumerate(samples)}
    keys = (
        "is_key_frame",
        "sample_token",
        "calibrated_sensor_token",
        "ego_pose_token",
        "timestamp",
        "filename",
        "width",
        "height",
    )
    _, sample, mount, ego, *rest = read_table(
        folder, "sample_data", keys, lambda row: row[0] and row[1] in index and row[2] in row_of
    )
    needed = set(ego)
    ego_token, offset, turn = read_table(
        folder, "ego_pose", ("token", "translation", "rotation"), lambda row: row[0] in needed
    )
    if missing := needed - set(ego_token):
        raise ValueError(f"{folder}/ego_pose.json: there is no pose {min(missing)!r}, which sample_data.json refers to")
    driven = dict(zip(ego_token, _poses(offset, turn, ego_token, folder / "ego_pose.json"), strict=True))
    found = {}
    for token, key, pose, time, file, width, height in zip(sample, mount, ego, *rest, strict=True):
        row = row_of[key]
        name = name_of[sensor[row]]
        found[index[token], name] = View(
            index[token],
            name,
            file,
            time,
            (width, height),
            np.array(K[row], float),
            driven[pose] @ mounted[row],
            driven[pose][:3, 3],
        )
    return [found.get((i, name), View(i, name)) for i in range(len(samples)) for name in cameras]


def _labels_in(boxes, occlusion, view):
    """Labels of the boxes of a sample that a camera shows, objects before ignore regions."""
    turn, origin = view.pose[:3, :3], view.pose[:3, 3]
    center = (boxes.center - origin) @ turn  # R^T (x - o), row by row
    forward, left, up = (boxes.rotation[:, :, axis] @ turn for axis in range(3))
    yaw = np.arctan2(-forward[:, 2], forward[:, 0])
    corners = center[:, None] + CORNER_SIGNS * boxes.size[:, None] @ np.stack([forward, -up, left], 1)
    box = visible_boxes(corners, view.K, *view.size)
    shown = ((box[:, 2:] - box[:, :2]) >= 1).all(1)
    real = (boxes.points > 0) & (center[:, 2] > 0)
    rows = np.concatenate([np.flatnonzero(shown & real), np.flatnonzero(shown & ~real)])
    boxes, box, center, yaw, real = boxes[rows], box[rows], center[rows], yaw[rows], real[rows]
    full_box, _ = project_boxes(center, boxes.size, yaw, view.K)
    seen, whole = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (box, full_box))
    fill = lambda column, blank: np.where(real[:, None] if column.ndim > 1 else real, column, blank)  # noqa: E731
    labels = make_labels(
        name=fill(boxes.name, "DontCare"),
        box=box,
        size=fill(boxes.size, -1.0),
        center=fill(center, -1000.0),
        yaw=fill(yaw, -10.0),
        truncation=fill(np.clip(1 - seen / whole, 0, 1), -1.0),
        occlusion=fill(occlusion[rows], -1),
        velocity=fill(boxes.velocity @ turn, np.nan),
        attribute=fill(boxes.attribute, ""),
    )
    labels.alpha[~real] = -10
    return labels


def rotations(quaternions):
    """Quaternions (n, 4) as w, x, y, z, of any length > 0 -> rotation matrices (n, 3, 3).

    The product of the two quaternion matrices, as pyquaternion forms it: a bicycle on the face of a rack is decided by the last bit.
    """
    q = np.asarray(quaternions, float).reshape(-1, 4)
    squared = (q[:, None, :] @ q[:, :, None])[:, 0]  # (n, 1)
    length = np.where((np.abs(1 - squared) < 1e-14) | (squared == 0), 1.0, np.sqrt(squared))
    w, x, y, z = (q / length).T
    left = np.stack([w, -x, -y, -z, x, w, -z, y, y, z, w, -x, z, -y, x, w], -1).reshape(-1, 4, 4)
    right = np.stack([w, -x, -y, -z, x, w, z, -y, y, -z, w, x, z, y, -x, w], -1).reshape(-1, 4, 4)
    return (left @ right.transpose(0, 2, 1))[:, 1:, 1:]


def _poses(translation, rotation, token, place):
    """Columns of a table -> (n, 4, 4) matrices from the sensor or vehicle to what it is mounted on or drives in."""
    poses = np.tile(np.eye(4), (len(token), 1, 1))
    poses[:, :3, :3] = rotations(_numbers(rotation, (4,), "rotation", token, place))
    poses[:, :3, 3] = _numbers(translation, (3,), "translation", token, place)
    return poses


def _numbers(rows, shape, key, token, place):
    """A column of lists of numbers -> (n, *shape) floats. Raises ValueError naming the table and the first bad row's token."""
    try:
        array = np.array(rows, float).reshape(len(rows), *shape)
    except (ValueError, TypeError):
        array = np.full((len(rows), *shape), np.nan)
        for row, values in enumerate(rows):
            if (
                isinstance(values, list)
                and len(values) == shape[0]
                and all(isinstance(value, int | float) for value in values)
            ):
                array[row] = values
    good = (np.abs(array) <= LARGEST).all(1)
    if key == "rotation":
        good &= (array != 0).any(1)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(f"{place}: {key} of {token[row]} is {str(rows[row])[:80]}, expected {shape[0]} finite numbers")
    return array
