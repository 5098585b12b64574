"""Argoverse 2: its logs -> frames of the ring cameras and ground truth; detections of all cameras -> a result file.

Format: argoverse.github.io/user-guide (Wilson et al., NeurIPS Datasets 2021); rules are those of av2 0.3.6, which the
tests compare with. Tables are feather files, which pyarrow reads. A log is the folder ROOT/sensor/<split>/<log>.

Boxes are annotated in the vehicle's frame at the time of a lidar sweep. A frame is the image of a camera nearest to a
sweep, its boxes moved by what the vehicle drove in between: ego(sweep) -> city -> ego(image) -> camera. `Frame.pose`
leads back to the vehicle at the time of the sweep; `Frame.group` is log/time of the sweep.
"""

import bisect
import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

import numpy as np

from formats import tables
from formats.nuscenes import labels_in
from formats.tables import KeyFrame, rotations
from scene.frames import Frame, Labels, UserError, join
from scene.geometry import camera_problem

METRICS = "argoverse"  # that frames are judged by
FIELDS = ("split", "cameras")  # of data.Source that are read, beside those that every format reads
CLASSES = (  # that are evaluated; other categories are background unless data.neighbours names them
    "ARTICULATED_BUS", "BICYCLE", "BICYCLIST", "BOLLARD", "BOX_TRUCK", "BUS", "CONSTRUCTION_BARREL",
    "CONSTRUCTION_CONE", "DOG", "LARGE_VEHICLE", "MESSAGE_BOARD_TRAILER", "MOBILE_PEDESTRIAN_CROSSING_SIGN",
    "MOTORCYCLE", "MOTORCYCLIST", "PEDESTRIAN", "REGULAR_VEHICLE", "SCHOOL_BUS", "SIGN", "STOP_SIGN", "STROLLER",
    "TRUCK", "TRUCK_CAB", "VEHICULAR_TRAILER", "WHEELCHAIR", "WHEELED_DEVICE", "WHEELED_RIDER",
)  # fmt: skip
RING = tuple(f"ring_{place}" for place in ("front_center", "front_left", "front_right", "rear_left", "rear_right",
             "side_left", "side_right"))  # fmt: skip
SAME_DISTANCE = 1.0  # m: nearer detections of one class by two cameras are one, as in metrics/nuscenes_files.py
FARTHEST = 25_000_000  # ns between a sweep and its image: half of what lies between two images
ANNOTATIONS, CITY = "annotations.feather", "city_SE3_egovehicle.feather"  # tables of a log
MOUNTED, LENSES = "calibration/egovehicle_SE3_sensor.feather", "calibration/intrinsics.feather"
TEXTS, TIME = ("log_id", "category", "sensor_name"), "timestamp_ns"  # columns; all others that are read are numbers
CENTER, SIZE, ROTATION = ("tx_m", "ty_m", "tz_m"), ("length_m", "height_m", "width_m"), ("qw", "qx", "qy", "qz")


@dataclasses.dataclass(frozen=True)
class Boxes:
    """n boxes in the vehicle's frame (x forward, y left, z up, metres) at sweeps, annotated or detected, as columns."""

    log: np.ndarray  # (n,) str
    time: np.ndarray  # (n,) int64 ns of the sweep: floats are 64 ns apart there, and poses 1 ns apart exist
    name: np.ndarray  # (n,) str
    center: np.ndarray  # (n, 3) geometric centre, m
    size: np.ndarray  # (n, 3) l, h, w, m
    rotation: np.ndarray  # (n, 4) quaternion w, x, y, z, of any length
    score: np.ndarray  # (n,) 1 for annotations
    points: np.ndarray  # (n,) of lidar, 1 for detections

    def __len__(self):
        return len(self.time)

    def __getitem__(self, rows):
        """Rows by index array, mask or slice."""
        return Boxes(*(column[rows] for column in vars(self).values()))


def join_boxes(parts: Iterable[Boxes]) -> Boxes:
    """All rows of several Boxes."""
    text, numbers = np.zeros(0, object), np.zeros((0, 4))
    place, one = numbers[:, :3], numbers[:, 0]
    nothing = Boxes(text, np.zeros(0, np.int64), text, place, place, numbers, one, one)
    return Boxes(*map(np.concatenate, zip(*(vars(part).values() for part in (nothing, *parts)), strict=True)))


def import_arrow():
    """pyarrow and its module of feather files. Raises UserError with the pip line when it is not installed."""
    try:
        import pyarrow
        from pyarrow import feather
    except ImportError:
        raise UserError("Argoverse 2 is read by pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow, feather


def read_table(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns (n,) of a feather file: texts, int64 times, floats. Raises UserError naming the file and the row."""
    arrow, feather = import_arrow()
    types = {key: arrow.string() if key in TEXTS else arrow.int64() if key == TIME else arrow.float64() for key in keys}
    try:
        table = feather.read_table(str(path), use_threads=False).select(keys)  # no threads: processes are forked
        if TIME in keys and not arrow.types.is_integer(table.schema.field(TIME).type):
            raise UserError(f"{path}: {TIME} is no integer, and other numbers are 64 ns apart there")
        table = table.cast(arrow.schema(types))  # of a pandas category its text
    except FileNotFoundError:
        raise UserError(f"{path}: no such table") from None
    except (OSError, KeyError, arrow.ArrowException) as error:
        raise UserError(f"{path}: expected a feather file with columns {', '.join(keys)}: {error}") from None
    columns = {key: table[key].to_numpy() for key in keys}
    for key, values in columns.items():
        bad = ~np.isfinite(values) if values.dtype == float else np.equal(values, None)
        if bad.any():
            raise UserError(f"{path}: {key} of row {bad.argmax()} is {values[bad.argmax()]}, expected a value")
    return columns


def stack(table, keys):
    """Columns of a table side by side, (n, k)."""
    return np.stack([table[key] for key in keys], -1)


def read_boxes(path: Path, log: str = "") -> Boxes:
    """The annotations of a log, or without one the detections of a result file, in its order. Raises UserError."""
    own = ("num_interior_pts",) if log else ("score", "log_id")
    table = read_table(path, (*own, TIME, "category", *CENTER, *SIZE, *ROTATION))
    size, rotation, ones = stack(table, SIZE), stack(table, ROTATION), np.ones(len(table[TIME]))
    bad = (size < 0).any(1) | ~rotation.any(1)
    if bad.any():
        raise UserError(f"{path}: row {bad.argmax()} has a size below 0 or a quaternion of zeros")
    logs = table.get("log_id", np.full(len(ones), log, object))
    score, points = table.get("score", ones), table.get("num_interior_pts", ones)
    return Boxes(logs, table[TIME], table["category"], stack(table, CENTER), size, rotation, score, points)


def read_annotations(log: Path) -> Boxes:
    """The annotations of a log; none of the test split's, which have no table of them."""
    path = log / ANNOTATIONS
    return join_boxes([] if log.parent.name == "test" and not path.exists() else [read_boxes(path, log.name)])


def read_poses(path: Path, key: str) -> dict:
    """{value of the column `key`: pose (4, 4)}, of sensors on the vehicle, or of the vehicle in its city at times."""
    table = read_table(path, (key, *CENTER, *ROTATION))
    poses = np.tile(np.eye(4), (len(table[key]), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations(stack(table, ROTATION)), stack(table, CENTER)
    return dict(zip(table[key].tolist(), poses, strict=True))


def find_logs(root: str | Path, splits: Sequence[str]) -> list[Path]:
    """The folders of the logs of some splits, by name. Raises UserError naming the splits that are there."""
    sensor, logs = Path(root) / "sensor", []
    for split in splits:
        folders = sorted(path for path in (sensor / split).glob("*") if path.is_dir())
        if not folders:
            there = ", ".join(sorted(path.name for path in sensor.glob("*"))) or "none"
            raise UserError(f"{sensor.absolute()}: expected logs in {split}/LOG/; the splits there are: {there}")
        logs += folders
    return logs


def frames(source, config, problems: list[str] | None = None) -> Sequence[Frame]:
    """The frames of a `data.Source`, from their index where that is wanted. Raises what `read_log` raises."""
    root, limit, cameras = Path(source.root or config.root), source.limit or None, source.cameras or RING
    logs, read = find_logs(root, source.split), partial(read_log, cameras=cameras)
    if problems is not None or config.index == "none" or not find_spec("formats.index"):
        return list(islice(chain.from_iterable(read(log, problems=problems) for log in logs), limit))
    index = import_module("formats.index")
    names = (ANNOTATIONS, CITY, MOUNTED, LENSES, "sensors/lidar", *(f"sensors/cameras/{camera}" for camera in cameras))

    def made_from():
        states = []
        for path in (log / name for log in logs for name in names):
            with contextlib.suppress(OSError):  # the reader names what is missing
                states.append(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}")
        return "\n".join(states)

    choice = f"argoverse {' '.join(source.split)} of {' '.join(cameras)}"
    frames = index.frames(index.Plan(root, choice, root, made_from, logs, read, unit="logs"), config.index)
    return frames[:limit] if limit else frames


def read_log(log: Path, cameras: Sequence[str] = RING, problems: list[str] | None = None) -> list[Frame]:
    """The frames of a log, by sweep and camera; labels as `formats.nuscenes.labels_in` makes them.

    A sweep whose image is lost has no frame of that camera. Raises UserError naming the file; with a list `problems`,
    sentences on images go there, and they are left out.
    """

    def tell(sentence):
        if problems is None:
            raise UserError(sentence)
        problems.append(sentence)

    boxes, city, lenses, frames = read_annotations(log), read_poses(log / CITY, TIME), read_cameras(log, cameras), []
    images = {camera: times_of(log / "sensors/cameras" / camera, "jpg") for camera in cameras}
    for camera in (camera for camera, times in images.items() if not times):
        tell(f"{log}/sensors/cameras/{camera}: it holds no image, expected NANOSECONDS.jpg")
    for sweep in sorted({*boxes.time.tolist(), *times_of(log / "sensors/lidar", "feather")}):
        own = boxes[boxes.time == sweep]
        for camera, (mounted, K, size) in lenses.items():
            image = nearest(images[camera], sweep)
            if lost := {sweep, image} - {None} - city.keys():
                tell(f"{log / CITY}: there is no pose at {min(lost)}, of a sweep or its image of {camera}")
            elif image is not None:
                pose = np.linalg.inv(city[sweep]) @ city[image] @ mounted
                path, id = log / f"sensors/cameras/{camera}/{image}.jpg", f"{log.name}/{camera}/{sweep}"
                labels, group = labels_of(own, K, size, pose), f"{log.name}/{sweep}"
                frames.append(Frame(id, path, K, labels, group=group, pose=pose, size=size))
    return frames


def times_of(folder: Path, suffix: str) -> list[int]:
    """Times in the names of the files of a folder, ns, sorted; none where there is no folder."""
    return sorted(int(path.stem) for path in folder.glob(f"*.{suffix}") if path.stem.isdecimal())


def nearest(times: Sequence[int], time: int) -> int | None:
    """The nearest of sorted times, the earlier of two equally near; None where it is farther than `FARTHEST`."""
    place = bisect.bisect_left(times, time)
    best = min(times[max(0, place - 1) : place + 1], key=lambda one: abs(one - time), default=None)
    return None if best is None or abs(best - time) > FARTHEST else best


def read_cameras(log: Path, cameras: Sequence[str]) -> dict:
    """{camera: (pose (4, 4) on the vehicle, K (3, 3), (width, height) px)}; raises UserError naming those there are.

    The pictures are rectified: k1, k2 and k3 are of what was recorded, and not read.
    """
    path, mounted, lenses = log / LENSES, read_poses(log / MOUNTED, "sensor_name"), {}
    table = read_table(path, ("sensor_name", "fx_px", "fy_px", "cx_px", "cy_px", "width_px", "height_px"))
    for camera, fx, fy, cx, cy, *size in zip(*table.values(), strict=True):
        lenses[camera] = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), tuple(map(int, size))
    for camera in cameras:
        K, size = lenses.get(camera, (np.zeros(0), ()))
        if problem := camera_problem(K, *size) if camera in lenses.keys() & mounted else "it is not there":
            raise UserError(f"{path}: camera {camera}: {problem}; there are {', '.join(sorted(lenses))}")
    return {camera: (mounted[camera], *lenses[camera]) for camera in cameras}


def labels_of(boxes: Boxes, K, size, pose) -> Labels:
    """Labels of the boxes that a camera shows; ignore regions of those without lidar points. pose (4, 4): Frame's."""
    columns = {name: getattr(boxes, name) for name in ("name", "center", "size", "score", "points")}
    n, turn = len(boxes), rotations(boxes.rotation)
    columns |= {"velocity": np.zeros((n, 3)), "attribute": np.full(n, "", object), "rotation": turn}
    seen = tables.Boxes(sample=np.zeros(n), listed=np.zeros(n), **columns)
    labels = labels_in(seen, np.full(n, -1), KeyFrame(0, "", K=K, size=size, pose=pose))
    return dataclasses.replace(labels, velocity=None, attribute=None)


def read_truth(root: str | Path, splits: Sequence[str], sweeps: Mapping[str, Sequence[int]] | None = None):
    """(`Boxes` of the annotations of some splits, {log: its folder}); with sweeps, log -> times ns, of those alone."""
    folders = {log.name: log for log in find_logs(root, splits)}
    if unknown := [log for log in sweeps or () if log not in folders]:
        raise UserError(f"{root}/sensor: there is no log {unknown[0]!r} in {', '.join(splits)}")
    parts = {log: read_annotations(folders[log]) for log in (folders if sweeps is None else sorted(sweeps))}
    if sweeps is not None:
        parts = {log: boxes[np.isin(boxes.time, np.array(sweeps[log], np.int64))] for log, boxes in parts.items()}
    return join_boxes(parts.values()), folders


def merge_cameras(frames: Iterable[Frame], predictions: Mapping[str, Labels], distance: float = SAME_DISTANCE) -> Boxes:
    """The detections of all cameras in the vehicle's frame, upright there, by log and sweep, the best score first.

    frames: with group and pose, in any order; predictions: frame id -> Labels in that frame's camera. Of two detections
    of one class by different cameras, nearer than `distance` m seen from above, the one with the lower score is left
    out, of equal scores the one with the larger depth sigma.
    """
    groups = {}
    for frame in sorted(frames, key=lambda frame: frame.id):  # else their order would count among equal scores
        groups.setdefault(frame.group, []).append((frame.pose, predictions[frame.id]))
    return join_boxes(_merge(group, views, distance) for group, views in sorted(groups.items()))


def _merge(group, views, distance):
    """`Boxes` of one sweep; views: pose (4, 4) and Labels of each camera."""
    labels, (log, time), n = join([own for _, own in views]), group.split("/"), sum(len(own) for _, own in views)
    camera = np.repeat(np.arange(len(views)), [len(own) for _, own in views])
    pose = np.array([pose for pose, _ in views])[camera].reshape(n, 4, 4)
    center = (pose[:, :3, :3] @ labels.center[..., None])[..., 0] + pose[:, :3, 3]
    flat = np.zeros(n)
    ahead = (pose[:, :3, :3] @ np.stack([np.cos(labels.yaw), flat, -np.sin(labels.yaw)], -1)[..., None])[..., 0]
    ahead -= (ahead[:, 2] / pose[:, 2, 1])[:, None] * pose[:, :3, 1]  # level, and in the camera from above as it was
    half = np.arctan2(ahead[:, 1], ahead[:, 0]) / 2
    rotation = np.stack([np.cos(half), flat, flat, np.sin(half)], -1)
    logs, times = np.full(n, log, object), np.full(n, int(time))
    boxes = Boxes(logs, times, labels.name, center, labels.size, rotation, labels.score, flat + 1)
    order = np.lexsort((flat if labels.sigma is None else np.nan_to_num(labels.sigma, nan=np.inf), -labels.score))
    boxes, camera, stays = boxes[order], camera[order], np.ones(n, bool)
    near = np.hypot(*(boxes.center[:, None, :2] - boxes.center[:, :2]).T) < distance
    near &= (boxes.name[:, None] == boxes.name) & (camera[:, None] != camera)
    for row in range(n):
        stays[row + 1 :] &= ~(stays[row] & near[row, row + 1 :])
    return boxes[stays]


def write_results(path: str | Path, boxes: Boxes) -> None:
    """Write detections as an official result file."""
    arrow, feather = import_arrow()
    columns = {"log_id": arrow.array(boxes.log, arrow.string()), TIME: boxes.time}
    columns["category"] = arrow.array(boxes.name, arrow.string())
    for keys, values in ((CENTER, boxes.center), (SIZE, boxes.size), (ROTATION, boxes.rotation)):
        columns |= dict(zip(keys, values.T.copy(), strict=True))
    feather.write_feather(arrow.table(columns | {"score": boxes.score}), str(path))
