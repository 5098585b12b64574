"""Tables in nuScenes' layout, of nuScenes and its relatives: samples, annotations and key frames as columns.

The only place that knows the global frame's quaternions and (w, l, h). Format: nuscenes.org/nuscenes#data-format; what
a data set has otherwise is its `Dialect`. Global coordinates stay float64, as UTM loses half a metre in float32.
"""

import dataclasses
import json
from collections.abc import Mapping
from importlib import import_module
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.columns import read_numbers
from scene.frames import LARGEST, UserError
from scene.geometry import camera_problem

TINY = np.finfo(float).tiny
LONGEST_GAP = 1.5  # s between the two annotations that a velocity is taken from, twice that around one between them
SHORTEST_GAP = 1000  # microseconds between two samples, in the median: less is another unit
POSES = ("image", "sample")  # the ego pose that an image names, or that nearest in time to its sample


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What data sets in nuScenes' layout have otherwise than each other; a JSON file of one's own has the same keys."""

    tables: tuple[str, ...]  # patterns of the folder with the tables, below the root; of numbered ones the newest
    splits: Mapping[str, tuple[str, ...]]  # official split: names of its scenes
    versions: Mapping[str, str]  # official split: how the name of the version that holds it ends
    classes: Mapping[str, str]  # category: detection class; any other is its own name
    ranges: Mapping[str, float]  # detection class, in the official order: m from the vehicle up to which it counts
    attributes: Mapping[str, tuple[str, ...]]  # class: those that an object of it may have
    usual: Mapping[str, str]  # class: attribute in a result file where the detector tells none
    reference: tuple[str, ...]  # channels, the first that is there: the vehicle stands where it does at its key frame
    undefined: Mapping[str, tuple[str, ...]]  # class: errors of true positives that it has not
    half_turns: tuple[str, ...]  # classes that look the same from behind
    occlusion: Mapping[str, int]  # level of visibility: KITTI's level of occlusion, 0-3
    velocities: bool = False  # an annotation's own velocity counts, where it has one
    several: bool = False  # an annotation may have several attributes: the first that its class may have is taken
    rectified: bool = False  # the pictures are, whatever camera_distortion says

    @property
    def states(self) -> list[str]:
        """Every attribute, sorted."""
        return sorted({state for states in self.attributes.values() for state in states})


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
    points: np.ndarray  # (n,) of lidar and radar together, below 0 unknown

    def __len__(self):
        return len(self.name)

    def __getitem__(self, rows):
        """Rows by index array, mask or slice."""
        return Boxes(*(column[rows] for column in vars(self).values()))


class Sample(NamedTuple):
    """A key moment of a scene."""

    scene: str  # name
    time: int  # microseconds
    token: str


class KeyFrame(NamedTuple):
    """What a sensor recorded of a sample; without a file where the tables have none."""

    sample: int  # index
    channel: str
    file: str = ""  # relative to the folder that the tables' folder lies in
    time: int = 0  # microseconds
    size: tuple[int, int] = (0, 0)  # width, height, px
    K: np.ndarray | None = None  # (3, 3) px, None where the table has no such matrix
    pose: np.ndarray | None = None  # (4, 4) sensor -> global, m
    vehicle: np.ndarray | None = None  # (4, 4) vehicle -> global, m, at that time
    distortion: tuple[float, ...] = ()  # of the lens, as OpenCV has it
    valid: bool = True  # not marked as one without a usable picture

    @property
    def problem(self):
        """Why a camera's key frame cannot be used, or None."""
        if not self.file:
            return "sample_data.json holds no key frame of it"
        width, height = self.size
        if not all(type(side) in (int, float) and side > 0 for side in self.size):
            return f"its width and height are {width} and {height}, expected those of the picture in px"
        if type(self.time) not in (int, float):
            return f"its timestamp is {self.time!r}, expected microseconds"
        if self.K is None:
            return "its camera_intrinsic is not 3x3 numbers"
        if any(self.distortion):
            advice = "undistort the pictures as docs/formats.md shows"
            return f"its camera_distortion is {list(self.distortion)}, expected pictures without: {advice}"
        problem = camera_problem(self.K, width, height)
        return f"its camera_intrinsic: {problem}" if problem else None


def find_version(root: str | Path, version: str, dialect: Dialect) -> Path:
    """The folder with the tables: any that is named, or the only one of root that the dialect looks for.

    Raises UserError naming what is there.
    """
    root = Path(root)
    matches = [sorted(path for path in root.glob(pattern) if path.is_dir()) for pattern in dialect.tables]
    folders = next(filter(None, matches), [])
    names = [path.relative_to(root).as_posix() for path in folders]
    if version:
        below = [root / version / pattern for pattern in dialect.tables if "*" not in pattern]
        if named := [path for path in (*below, root / version) if path.is_dir()]:
            return named[0]
        raise UserError(f"{root}: there is no version {version!r}, only {', '.join(names) or 'none that is known'}")
    if not folders:
        expected = f"a folder with nuScenes' tables in {' or '.join(dialect.tables)}; version= names any other"
        raise UserError(f"{root.absolute()}: expected {expected}")
    numbers = [int(name.split("/")[0]) if name.split("/")[0].isdigit() else -1 for name in names]
    if len(folders) > 1 and max(numbers) < 0:
        raise UserError(f"{root}: there are {', '.join(names)}, expected version to name one of them")
    return folders[int(np.argmax(numbers))]


def read_table(folder, name, keys, wanted=None, optional=()):
    """Columns of a table, in the order of `keys`, as lists; only of rows (tuples of those values) that are `wanted`.

    optional: more keys, None in a row that lacks one. Raises UserError naming the file and the key that a row lacks.
    """
    path, take = folder / f"{name}.json", itemgetter(*keys)

    def row_of(entry):  # while it is parsed: a table of millions must not stand in memory as dicts
        try:
            row = take(entry)
        except KeyError:
            return entry  # an object inside of a row; a row itself must not stay one
        if wanted is not None and not wanted(row):
            return None
        return (*row, *map(entry.get, optional)) if optional else row

    try:
        rows = [row for row in json.loads(path.read_bytes(), object_hook=row_of) if row is not None]
        for row in rows:
            if isinstance(row, dict):
                lacking = next(key for key in keys if key not in row)
                raise UserError(f"{path}: a row lacks {lacking!r}, expected {', '.join(keys)}")
        return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in (*keys, *optional)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such table") from None
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON list of rows: {error}") from None


def refuse_parted(source, config, frames):
    """Raises UserError where the limit of a source of data.val parts the cameras of a sample or sweep.

    frames: those that it leaves.
    """
    if not source.limit or len(frames) < source.limit:
        return
    more = import_module(f"formats.{source.kind}").frames(dataclasses.replace(source, limit=source.limit + 1), config)
    if more[-1].group == frames[-1].group and len(more) > len(frames):
        limit = f"data.val: limit={source.limit}"
        raise UserError(f"{limit} parts the cameras of a sample or sweep, which are evaluated together")


def read_names(folder, name, key="name"):
    """Token -> a value of each row of a table."""
    return dict(zip(*read_table(folder, name, ("token", key)), strict=True))


def read_samples(folder, splits, dialect):
    """The samples of some splits, by scene and time. Raises UserError naming the split."""
    names = read_names(folder, "scene")
    chosen = set().union(*(find_scenes(folder, split, set(names.values()), dialect) for split in splits))
    scene, time, token = read_table(folder, "sample", ("scene_token", "timestamp", "token"))
    read_column(time, (), "timestamp", token, folder / "sample.json", 0, np.inf)
    rows = zip(scene, time, token, strict=True)
    samples = sorted(Sample(names[scene], time, token) for scene, time, token in rows if names.get(scene) in chosen)
    gaps = [two.time - one.time for one, two in pairwise(samples) if one.scene == two.scene]
    if gaps and np.median(gaps) < SHORTEST_GAP:
        apart = f"samples of a scene are {np.median(gaps):g} apart in the median"
        raise UserError(f"{folder / 'sample.json'}: timestamp: {apart}, expected microseconds, not seconds")
    return samples


def find_scenes(folder, split, scenes, dialect):
    """Those of a set of scenes that a split names: an official one, one of splits.json, 'all', or a scene.

    splits.json lies beside the tables, as nuscenes-devkit wants it: {split: [scene, ...]}. Raises UserError.
    """
    ending = folder.name.rpartition("-")[2]
    of_version = {name for name, version in dialect.versions.items() if version == ending}
    official = {name: own for name, own in dialect.splits.items() if name in of_version or not of_version}
    listed = _read_splits(folder / "splits.json")
    choices = official | listed | {name: official[name] for name in of_version if name in official}
    if split in choices:
        chosen = scenes.intersection(choices[split])
    else:
        chosen = scenes if split == "all" else scenes & {split}
        if not chosen:
            expected = ", ".join([*choices, "all"])
            raise UserError(f"{folder}: there is no split {split!r}, expected {expected}, or the name of a scene")
    if not chosen:
        some = ", ".join(sorted(scenes)[:10])
        raise UserError(f"{folder}/scene.json: it holds no scene of split {split!r}; its scenes are {some}")
    return chosen


def _read_splits(path):
    if not path.is_file():
        return {}
    try:
        splits = json.loads(path.read_bytes())
        if all(type(name) is str for names in splits.values() for name in names):
            return splits
    except (ValueError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: expected an object {{split: [name of a scene, ...]}}")


def read_annotations(folder, samples, dialect):
    """All annotations of some samples as `Boxes` and their occlusion levels (n,), by sample, in the order of the table.

    A name is the detection class or, where there is none, the category.
    """
    index = {sample.token: i for i, sample in enumerate(samples)}
    keys = ("token", "sample_token", "instance_token", "visibility_token", "attribute_tokens", "translation", "size",
            "rotation", "prev", "next", "num_lidar_pts", "num_radar_pts")  # fmt: skip
    optional = ("velocity",) if dialect.velocities else ()
    columns = read_table(folder, "sample_annotation", keys, lambda row: row[1] in index, optional)
    token, sample, instance, visibility, attributes, center, size, rotation, before, after, lidar, radar = columns[:12]
    category, instances = read_names(folder, "category"), read_names(folder, "instance", "category_token")
    attribute, level = read_names(folder, "attribute"), read_names(folder, "visibility", "level")
    place = f"{folder}/sample_annotation.json"
    row_of = {key: row for row, key in enumerate(token)}
    try:
        names = [category[instances[key]] for key in instance]
        names = [dialect.classes.get(name, name) for name in names]
        states = [attribute[several[0]] if several else "" for several in attributes]
        for row, several in enumerate(attributes):
            if len(several) > 1:
                states[row] = _state([attribute[key] for key in several], names[row], token[row], dialect, place)
        first = np.array([row_of[key or own] for key, own in zip(before, token, strict=True)], int)
        last = np.array([row_of[key or own] for key, own in zip(after, token, strict=True)], int)
    except KeyError as error:
        raise UserError(f"{place}: an annotation refers to {error}, which no table of {folder} holds") from None
    at = np.array([index[key] for key in sample], int)
    seconds = np.array([1e-6 * samples[row].time for row in at])  # rounded before they are subtracted, as officially
    center = read_column(center, (3,), "translation", token, place)
    velocity = _velocities(center, seconds, first, last)
    if optional:
        own = [[np.nan] * 3 if value is None else value for value in columns[12]]
        own = read_column(own, (3,), "velocity", token, place, nan=True)
        velocity = np.where(np.isnan(own), velocity, own)
    lidar, radar = (read_column(column, (), "points", token, place) for column in (lidar, radar))
    boxes = Boxes(
        sample=at,
        listed=at,
        name=np.array(names, dtype=object),
        center=center,
        size=read_column(size, (3,), "size", token, place, TINY)[:, [1, 2, 0]],  # file: w, l, h
        rotation=rotations(read_column(rotation, (4,), "rotation", token, place)),
        velocity=velocity,
        attribute=np.array(states, dtype=object),
        score=np.full(len(token), -1.0),
        points=(lidar + radar).astype(int),
    )
    order = np.argsort(boxes.sample, kind="stable")
    return boxes[order], np.array([dialect.occlusion.get(level.get(key), -1) for key in visibility], int)[order]


def _state(states, name, token, dialect, place):
    """Which of several attributes an object of a class gets: the first that the class may have, else the first."""
    if not dialect.several and name in dialect.ranges:  # officially others may have them
        raise UserError(f"{place}: annotation {token} has {len(states)} attributes, expected at most one")
    return next((state for state in states if state in dialect.attributes.get(name, ())), states[0])


def _velocities(center, seconds, first, last):
    """Velocities (n, 3) m/s from the annotation before to that after, or itself: the official `box_velocity`."""
    duration, rows = seconds[last] - seconds[first], np.arange(len(center))
    longest = np.where((first != rows) & (last != rows), 2 * LONGEST_GAP, LONGEST_GAP)
    known = (first != last) & (duration <= longest)
    return np.where(known[:, None], (center[last] - center[first]) / np.where(known, duration, 1.0)[:, None], np.nan)


def read_references(folder, samples, dialect):
    """The `KeyFrame` of each sample that ranges are measured from. Raises UserError where one is missing."""
    channels = read_table(folder, "sensor", ("token", "channel"))[1]
    channel = next((name for name in dialect.reference if name in channels), "")
    if not channel:
        expected = f"{' or '.join(dialect.reference)}, which ranges are measured from"
        raise UserError(f"{folder}/sensor.json: there are {', '.join(sorted(channels))}, expected {expected}")
    key_frames = read_key_frames(folder, samples, (channel,), dialect)
    for one in key_frames:
        if not one.file:
            raise UserError(f"{folder}: {channel} of sample {samples[one.sample].token}: {one.problem}")
    return key_frames


def read_key_frames(folder, samples, channels, dialect, pose="image"):
    """`KeyFrame`s of some sensors of all samples, by sample, then in the order of `channels`; () is every camera.

    pose: 'image', or 'sample' for the ego pose that truckscenes-devkit takes. Raises UserError.
    """
    if pose not in POSES:
        raise UserError(f"pose is {pose!r}, expected {' or '.join(map(repr, POSES))}")
    sensor, channel, modality = read_table(folder, "sensor", ("token", "channel", "modality"))
    cameras = sorted(name for name, kind in zip(channel, modality, strict=True) if kind == "camera")
    if unknown := [name for name in channels if name not in channel]:
        raise UserError(f"{folder}/sensor.json: there is no camera {unknown[0]!r}, only {', '.join(cameras)}")
    channels, name_of = channels or cameras, dict(zip(sensor, channel, strict=True))
    keys, lens = ("token", "sensor_token", "camera_intrinsic"), ("camera_distortion",)
    mounts = _read_poses(folder, "calibrated_sensor", keys, lambda row: name_of.get(row[1]) in channels, lens)
    mounted, sensor, K, distortion = mounts
    (matrix, bad), row_of = read_numbers(K, (3, 3)), {token: row for row, token in enumerate(mounted)}
    index = {sample.token: i for i, sample in enumerate(samples)}
    keys = ("is_key_frame", "sample_token", "calibrated_sensor_token", "ego_pose_token", "timestamp", "filename",
            "width", "height")  # fmt: skip
    columns = read_table(
        folder, "sample_data", keys, lambda row: row[0] and row[1] in index and row[2] in row_of, ("is_valid",)
    )
    _, token, mounts, egos, *columns = columns
    if pose == "sample":
        nearest = _nearest_poses(folder, samples)
        egos = [nearest[index[key]] for key in token]
    needed = set(egos)
    [driven] = _read_poses(folder, "ego_pose", ("token",), lambda row: row[0] in needed)
    if missing := needed - driven.keys():
        raise UserError(f"{folder}/ego_pose.json: there is no pose {min(missing)!r}, which sample_data.json refers to")
    key_frames, bad = {}, {*bad}
    for key, mount, ego, time, file, width, height, valid in zip(token, mounts, egos, *columns, strict=True):
        row = row_of[mount]
        place = (index[key], name_of[sensor[row]])
        key_frames[place] = KeyFrame(
            *place, file, time, (width, height),
            K=None if row in bad else matrix[row],
            pose=driven[ego] @ mounted[mount],
            vehicle=driven[ego],
            distortion=() if dialect.rectified else tuple(distortion[row] or ()),
            valid=valid is not False,
        )  # fmt: skip
    places = [(i, name) for i in range(len(samples)) for name in channels]
    return [key_frames.get(place, KeyFrame(*place)) for place in places]


def _nearest_poses(folder, samples):
    """Token of the ego pose nearest in time to each sample, the earlier of two: truckscenes-devkit's `getclosest`."""
    time, token = read_table(folder, "ego_pose", ("timestamp", "token"))
    latest = dict(sorted(zip(time, token, strict=True), key=itemgetter(0)))  # of one time the last in the table
    times, moments = np.array(list(latest)), np.array([sample.time for sample in samples])
    after = np.searchsorted(times, moments).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    nearest = np.where(np.abs(times[after] - moments) < np.abs(moments - times[before]), after, before)
    return [latest[time] for time in times[nearest].tolist()]


def _read_poses(folder, name, keys, wanted, optional=()):
    """Of a table token -> pose (4, 4) in what it is mounted on or drives in, and the columns of the other keys."""
    columns = read_table(folder, name, (*keys, "translation", "rotation"), wanted, optional)
    translation, rotation = columns.pop(len(keys)), columns.pop(len(keys))
    token, *columns = columns
    poses = np.tile(np.eye(4), (len(token), 1, 1))
    poses[:, :3, :3] = rotations(read_column(rotation, (4,), "rotation", token, folder / f"{name}.json"))
    poses[:, :3, 3] = read_column(translation, (3,), "translation", token, folder / f"{name}.json")
    return [dict(zip(token, poses, strict=True)), *columns]


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


def read_column(values, shape, key, token, place, low=-LARGEST, high=LARGEST, nan=False):
    """A column of a table -> (n, *shape) floats. Raises UserError naming the table and the first bad row."""
    array, bad = read_numbers(values, shape, low, high, nan)
    if key == "rotation":
        bad += np.flatnonzero(~array.any(1)).tolist()
    if bad:
        expected = f"{shape[0]} {'positive' if low == TINY else 'finite'} numbers" if shape else "a number"
        raise UserError(f"{place}: {key} of {token[bad[0]]} is {str(values[bad[0]])[:80]}, expected {expected}")
    return array
