"""The built-in world from six cameras around a car, in the layout of nuScenes: written once.

A scene is a function of (seed, scene name). Its frame is the road's: x to the right of the road's middle, y down from
the ground, z along the road, metres. Cameras are level; everything moves straight ahead at a constant speed, and is
drawn where it stands at the sample's time, while each camera has the pose of its own, slightly different time.
"""

import hashlib
import json
import math
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from formats.nuscenes import ATTRIBUTES, scenes_of
from scene.frames import UserError
from scene.geometry import wrap_angle
from world.shapes import SIZES, draw_colours, draw_sizes
from world.street import (
    Objects,
    View,
    build_folder,
    choose_apart,
    develop,
    draw_picture,
    draw_view,
    footprint,
    overlaps,
    render_all,
    write_png,
)

VERSION = 1  # part of the folder's name: raise it whenever a picture or a table changes
SPLITS = ("mini_train", "mini_val")
SIZE = (400, 224)  # width, height: a quarter of nuScenes' 1600 x 900, without its last row
PERIOD = 0.5  # s between key frames
MOST_SAMPLES = 40  # of a scene
REACH = 60.0  # m from the car, within which objects are annotated
# Name: degrees to the left, position in the car (m: ahead, left, up), focal length (px), ms after the lidar.
CAMERAS = {
    "CAM_FRONT": (0, (1.70, 0.02, 1.51), 316.5, -12),
    "CAM_FRONT_RIGHT": (-55, (1.55, -0.49, 1.50), 315.2, -20),
    "CAM_BACK_RIGHT": (-110, (1.02, -0.48, 1.56), 314.7, -28),
    "CAM_BACK": (180, (0.03, 0.0, 1.57), 202.3, 10),
    "CAM_BACK_LEFT": (110, (1.04, 0.48, 1.59), 314.2, 2),
    "CAM_FRONT_LEFT": (55, (1.52, 0.49, 1.51), 318.1, -5),
}
CATEGORIES = {  # of the kinds of SIZES that are annotated
    "sedan": "vehicle.car", "hatchback": "vehicle.car", "suv": "vehicle.car", "van": "vehicle.car",
    "truck": "vehicle.truck", "bus": "vehicle.bus.rigid", "trailer": "vehicle.trailer",
    "pedestrian": "human.pedestrian.adult", "cyclist": "vehicle.bicycle", "bicycle": "vehicle.bicycle",
    "motorcyclist": "vehicle.motorcycle", "cone": "movable_object.trafficcone", "barrier": "movable_object.barrier",
}  # fmt: skip
LEVELS = {"1": "v0-40", "2": "v40-60", "3": "v60-80", "4": "v80-100"}  # per cent that all cameras together see


class Scene(NamedTuple):
    """A street and all that moves on it."""

    seed: tuple[int, ...]
    view: View  # of a camera that looks along the road, where the car is at the time 0
    speed: float  # of the car, m/s
    heading: float  # of the car, radians right of the road's
    origin: np.ndarray  # (3,) of the road's frame in the global one, m
    turn: float  # of the road in the global frame, radians to the left of its x axis
    time: int  # of the first sample, microseconds
    kind: np.ndarray  # (n,) keys of SIZES
    size: np.ndarray  # (n, 3) l, h, w, m
    start: np.ndarray  # (n, 2) x, z at the time 0, m
    direction: np.ndarray  # (n,) radians right of the road's
    pace: np.ndarray  # (n,) m/s
    attribute: np.ndarray  # (n,) name or ""
    colour: np.ndarray  # (n, 14, 3)

    def car(self, seconds):
        """(x, z) of the car at a time."""
        way = self.speed * seconds
        return np.array([self.view.offset + way * math.sin(self.heading), way * math.cos(self.heading)])

    def places(self, seconds):
        """(n, 3) centres of the objects at a time."""
        ahead = np.stack([np.sin(self.direction), np.cos(self.direction)], 1)
        x, z = (self.start + seconds * self.pace[:, None] * ahead).T
        return np.stack([x, -self.size[:, 1] / 2, z], 1)

    def to_global(self, point):
        """Points (..., 3) of the road's frame in the global frame, z up."""
        x, y, z = np.moveaxis(np.asarray(point), -1, 0)
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return np.stack([z * cos + x * sin, z * sin - x * cos, -y], -1) + self.origin


def draw_tracks(rng, view, speed, duration):
    """[(kind, x, z, direction, pace, attribute)] of what may stand or move along the street while the car drives by."""
    tracks, begin, end = [], -55.0, 55.0 + speed * duration
    lanes, crowd = int(view.half_road // view.lane), rng.uniform(0.6, 1.5)

    def line(kinds, share, x, spread, gap, direction, pace=0.0, attribute="", turn=0.03):
        back = pace * duration * math.cos(direction)  # begin so far away that the row still passes at the end
        z = begin - max(back, 0) + rng.uniform(0, gap)
        while z < end - min(back, 0):
            kind = rng.choice(kinds, p=share)
            length = max(SIZES[kind][0], SIZES[kind][2])
            place = x + rng.normal(0, spread), z + length / 2
            tracks.append((kind, *place, direction + rng.normal(0, turn), pace, attribute))
            z += length + 0.8 + rng.exponential(gap / crowd)

    vehicles = ["sedan", "hatchback", "suv", "van", "truck", "bus", "trailer", "motorcyclist"]
    shares = [0.28, 0.2, 0.17, 0.08, 0.09, 0.07, 0.04, 0.07]
    for side, ahead in ((-1, np.pi), (1, 0.0)):
        for i in range(lanes):
            pace = float(rng.choice([0.0, speed, rng.uniform(3, 11)], p=[0.25, 0.25, 0.5]))
            state = "moving" if pace else "stopped"
            line(vehicles, shares, side * (i + 0.5) * view.lane, 0.2, 14, ahead, pace, state, 0.0)
        if view.half_road - lanes * view.lane > 2:
            line(vehicles[:4], [0.35, 0.32, 0.23, 0.1], side * (view.half_road - 1.1), 0.1, 9, ahead, 0.0, "parked")
        line(["cyclist"], [1.0], side * (lanes * view.lane - 0.4), 0.2, 35, ahead, float(rng.uniform(2.5, 6)), "", 0.0)
        walk, width = side * (view.half_road + view.pavement) / 2, (view.pavement - view.half_road) / 2
        for way in (0.0, np.pi):
            line(["pedestrian"], [1.0], walk, 0.3 * width, 18, way, float(rng.uniform(0.8, 1.8)), "moving", 0.02)
        line(["pedestrian", "bicycle"], [0.6, 0.4], walk + 0.5 * side * width, 0.1, 22, ahead, 0.0, "standing", 1.0)
        line(["pole", "tree"], [0.7, 0.3], side * (view.wall - 0.3), 0.1, 16, 0)
        across = ahead + np.pi / 2 * (rng.random() < 0.7)
        line(["cone", "barrier"], [0.5, 0.5], side * (view.half_road + 0.45), 0.1, 16, across, turn=0.1)
    return tracks


def attribute_of(kind, state):
    """The official attribute of a kind of object in a state, "" where the kind has none."""
    family = CATEGORIES.get(kind, "")
    if family in ("vehicle.bicycle", "vehicle.motorcycle"):
        return "cycle.without_rider" if kind == "bicycle" else "cycle.with_rider"
    if family.startswith("human"):
        return f"pedestrian.{state}"
    return f"vehicle.{state}" if family.startswith("vehicle") else ""


@cache
def draw_scene(seed, name):
    """The `Scene` of a name."""
    seeds = (VERSION, seed, int(name.removeprefix("scene-")))
    rng = np.random.default_rng(seeds)
    view = draw_view(rng, SIZE)._replace(normal=np.array([0.0, 1.0, 0.0]), heading=0.0, crossing=1e6)
    speed, duration = float(rng.uniform(3, 9)), PERIOD * MOST_SAMPLES
    tracks = draw_tracks(rng, view, speed, duration)
    tracks = [tracks[i] for i in rng.permutation(len(tracks))]
    kind, x, z, direction, pace, state = (np.array(column) for column in zip(*tracks, strict=True))
    size = draw_sizes(rng, kind, 0.03)
    scene = Scene(  # in this order: each drawn value depends on those before
        seed=seeds,
        view=view,
        speed=speed,
        heading=float(rng.normal(0, 0.004)),
        origin=np.append(rng.uniform(300, 1500, 2), 0.0),
        turn=float(rng.uniform(-np.pi, np.pi)),
        time=int(1.6e15 + 1e9 * rng.integers(1_000_000)),
        kind=kind,
        size=size,
        start=np.stack([x, z], 1),
        direction=direction,
        pace=pace,
        attribute=np.array([attribute_of(*pair) for pair in zip(kind, state, strict=True)]),
        colour=draw_colours(rng, len(kind)),
    )
    clash = np.zeros((len(kind) + 1, len(kind) + 1), bool)  # the first is the car
    for seconds in PERIOD * np.arange(MOST_SAMPLES):
        center = scene.places(seconds)
        corners = footprint(center, size + 0.25, direction - np.pi / 2)
        x, z = scene.car(seconds)
        car = footprint(np.array([[x, 0, z]]), np.array([[5.4, 1.7, 2.3]]), np.array([scene.heading - np.pi / 2]))
        near = np.flatnonzero(np.abs(center[:, 2] - z) < REACH + 20)
        both = np.append(0, near + 1)
        clash[np.ix_(both, both)] |= overlaps(np.concatenate([car, corners[near]]))
    rows = np.array(choose_apart(clash, range(1, len(clash)), [0])[1:], int) - 1
    columns = ("kind", "size", "start", "direction", "pace", "attribute", "colour")
    return scene._replace(**{column: getattr(scene, column)[rows] for column in columns})


def camera_matrix(focal):
    return [[focal, 0.0, 204.0], [0.0, focal, 122.8], [0.0, 0.0, 1.0]]


def camera_view(scene, channel, seconds):
    """(View, its x and z (2,), its direction) of a camera; the car is where it is at the camera's own time."""
    degrees, (ahead, left, up), focal, delay = CAMERAS[channel]
    look = scene.heading - math.radians(degrees)
    sin, cos = math.sin(scene.heading), math.cos(scene.heading)
    x, z = scene.car(seconds + 1e-3 * delay) + np.array([ahead * sin - left * cos, ahead * cos + left * sin])
    K = np.array(camera_matrix(focal))
    a, b, c = scene.view.sun.tolist()  # of a camera that looks along the road
    sun = np.float32([a * math.cos(look) - c * math.sin(look), b, a * math.sin(look) + c * math.cos(look)])
    view = scene.view._replace(K=K, height=up, heading=-look, offset=float(x), start=float(z), sun=sun)
    return view, np.array([x, z]), look


def render_camera(scene, channel, number):
    """One camera's key frame of sample `number`: image (H, W, 3) uint8, rows of the m objects near its field of view.

    Then how many pixels of each are visible and how many would be if nothing stood before it (m,), and which of the m
    each pixel shows (H, W), or -1.
    """
    seconds = PERIOD * number
    view, place, look = camera_view(scene, channel, seconds)
    center = scene.places(seconds)
    across, along = center[:, 0] - place[0], center[:, 2] - place[1]
    x, z = across * math.cos(look) - along * math.sin(look), across * math.sin(look) + along * math.cos(look)
    radius = 0.5 * np.hypot(scene.size[:, 0], scene.size[:, 2])
    half = 0.53 * SIZE[0] / view.K[0, 0]
    seen = (z + radius > 0.3) & (np.abs(x) - 1.5 * radius < half * np.maximum(z + radius, 0))
    rows = np.flatnonzero(seen & (np.hypot(x, z) < REACH + 12))
    center = np.stack([x, center[:, 1] + view.height, z], 1)[rows]
    yaw = wrap_angle(scene.direction[rows] - look - np.pi / 2)
    objects = Objects(scene.kind[rows], scene.size[rows], center, yaw, scene.colour[rows])
    street = np.random.default_rng(scene.seed)  # the same in every picture
    image, shown, share, pixels = draw_picture(street, view, objects)
    image = develop(np.random.default_rng((*scene.seed, number, list(CAMERAS).index(channel))), image)
    whole = np.where(pixels > 0, pixels / np.maximum(share, 1e-9), 0)
    return image, rows, pixels, whole, shown


def write_sample(job):
    """Write the pictures of a job: folder, seed, scene, sample. Returns visible and whole pixels of objects (2, n)."""
    folder, seed, name, number = job
    scene = draw_scene(seed, name)
    count = np.zeros((2, len(scene.kind)))
    for channel in CAMERAS:
        image, rows, pixels, whole, _ = render_camera(scene, channel, number)
        count[:, rows] += pixels, whole
        write_png(folder / file_name(scene, name, channel, number), image)
    return count


def stamp(scene, channel, number):
    """Microseconds of a sensor's key frame."""
    delay = CAMERAS[channel][3] if channel in CAMERAS else 0
    return scene.time + round(1e6 * PERIOD * number) + 1000 * delay


def file_name(scene, name, channel, number):
    ending = "png" if channel in CAMERAS else "pcd.bin"
    return f"samples/{channel}/{name}__{channel}__{stamp(scene, channel, number)}.{ending}"


def token_of(*parts):
    """The same 32 hex digits for the same parts."""
    return hashlib.md5(repr(parts).encode(), usedforsecurity=False).hexdigest()


def turned(angle):
    """Quaternion (w, x, y, z) of a turn to the left about the vertical axis."""
    return [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)]


def linked(rows):
    """Write the tokens of the rows before and after, "" at the ends, into a list of rows."""
    tokens = ["", *(row["token"] for row in rows), ""]
    for row, before, after in zip(rows, tokens, tokens[2:], strict=False):
        row |= {"prev": before, "next": after}
    return rows


def mount(channel):
    """The row of calibrated_sensor of a sensor."""
    turn, place, K = turned(0.0), (0.94, 0.0, 1.84), []
    if channel in CAMERAS:
        degrees, place, focal, _ = CAMERAS[channel]
        cos, sin = math.cos(math.radians(degrees) / 2), math.sin(math.radians(degrees) / 2)
        turn = [0.5 * (cos + sin), -0.5 * (cos + sin), 0.5 * (cos - sin), -0.5 * (cos - sin)]
        K = camera_matrix(focal)
    tokens = {"token": token_of("mount", channel), "sensor_token": token_of("sensor", channel)}
    return {**tokens, "translation": place, "rotation": turn, "camera_intrinsic": K}


def fixed_tables():
    """The tables that are the same for every scene, and the others, empty."""
    about = {"description": "the built-in world"}
    sensors = {**dict.fromkeys(CAMERAS, "camera"), "LIDAR_TOP": "lidar"}
    states = sorted({state for several in ATTRIBUTES.values() for state in several})
    street = {"logfile": "world", "vehicle": "world", "date_captured": "2020-01-01", "location": "world"}
    area = {"category": "semantic_prior", "token": token_of("map"), "filename": "maps/world.png"}
    tables = {
        "attribute": [{"token": token_of(state), "name": state, **about} for state in states],
        "category": [{"token": token_of(name), "name": name, **about} for name in sorted(set(CATEGORIES.values()))],
        "visibility": [{"token": token, "level": level, **about} for token, level in LEVELS.items()],
        "sensor": [{"token": token_of("sensor", n), "channel": n, "modality": kind} for n, kind in sensors.items()],
        "calibrated_sensor": [mount(channel) for channel in sensors],
        "log": [{"token": token_of("log"), **street}],
        "map": [{**area, "log_tokens": [token_of("log")]}],
    }
    others = ("scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation")
    return tables | {name: [] for name in others}


def add_scene(tables, scene, name, counts):
    """Add the rows of a scene to tables; counts: what `write_sample` gave for each sample."""
    scene_token, numbers = token_of(name), range(len(counts))
    samples = [{"token": token_of(name, n), "timestamp": stamp(scene, "LIDAR_TOP", n)} for n in numbers]
    tables["sample"] += linked([{**sample, "scene_token": scene_token} for sample in samples])
    row = {"token": scene_token, "log_token": token_of("log"), "nbr_samples": len(samples), "name": name}
    ends = {"first_sample_token": samples[0]["token"], "last_sample_token": samples[-1]["token"]}
    tables["scene"].append({**row, **ends, "description": "the built-in world"})
    for channel in (*CAMERAS, "LIDAR_TOP"):
        width, height, ending = (*SIZE, "png") if channel in CAMERAS else (0, 0, "pcd")
        kind = {"is_key_frame": True, "height": height, "width": width, "fileformat": ending}
        rows = []
        for number in numbers:
            key, time = token_of(name, number, channel), stamp(scene, channel, number)
            x, z = scene.car(1e-6 * (time - scene.time))
            pose = {"token": key, "timestamp": time, "rotation": turned(scene.turn - scene.heading)}
            tables["ego_pose"].append({**pose, "translation": scene.to_global([x, 0.0, z]).tolist()})
            tokens = {"token": key, "sample_token": token_of(name, number), "ego_pose_token": key, "timestamp": time}
            tokens["calibrated_sensor_token"] = token_of("mount", channel)
            rows.append({**tokens, **kind, "filename": file_name(scene, name, channel, number)})
        tables["sample_data"] += linked(rows)
    places = np.stack([scene.places(PERIOD * number) for number in numbers])  # (samples, n, 3)
    cars = np.stack([scene.car(PERIOD * number) for number in numbers])
    near = np.hypot(places[..., 0] - cars[:, None, 0], places[..., 2] - cars[:, None, 1]) < REACH
    near &= [kind in CATEGORIES for kind in scene.kind]
    for i in np.flatnonzero(near.any(0)):
        rows = [annotation(scene, name, i, n, places[n, i], counts[n][:, i]) for n in np.flatnonzero(near[:, i])]
        tables["sample_annotation"] += linked(rows)
        tokens = {"token": token_of(name, "object", int(i)), "category_token": token_of(CATEGORIES[scene.kind[i]])}
        ends = {"first_annotation_token": rows[0]["token"], "last_annotation_token": rows[-1]["token"]}
        tables["instance"].append({**tokens, "nbr_annotations": len(rows), **ends})


def annotation(scene, name, i, number, place, count):
    """The annotation of object i in a sample; it has one lidar point for ten of its visible pixels."""
    visible, whole = count
    length, height, width = scene.size[i].tolist()
    level = 1 + int(np.searchsorted((0.4, 0.6, 0.8), visible / max(whole, 1), "right"))
    return {
        "token": token_of(name, "object", int(i), int(number)),
        "sample_token": token_of(name, int(number)),
        "instance_token": token_of(name, "object", int(i)),
        "visibility_token": str(level),
        "attribute_tokens": [token_of(str(scene.attribute[i]))] if scene.attribute[i] else [],
        "translation": scene.to_global(place).tolist(),
        "size": [width, length, height],
        "rotation": turned(float(scene.turn - scene.direction[i])),
        "num_lidar_pts": int(visible // 10),
        "num_radar_pts": 0,
    }


def fill_folder(seed, split, samples, workers, folder):
    """Write pictures and tables of a split, `samples` key frames of each scene, into an empty folder."""
    for name in ("v1.0-mini", "maps", *(f"samples/{channel}" for channel in CAMERAS)):
        (folder / name).mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "maps" / "world.png")  # the official reader opens a map
    scenes = {name: draw_scene(seed, name) for name in scenes_of(split)}  # once, for forked processes too
    jobs = [(folder, seed, name, number) for name in scenes for number in range(samples)]
    counts = iter(render_all(jobs, workers, f"rendering {split}", write_sample))
    tables = fixed_tables()
    for name, scene in scenes.items():
        add_scene(tables, scene, name, [next(counts) for _ in range(samples)])
    for name, rows in tables.items():
        (folder / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))


def build_nuscenes_world(root, split, frames, seed=0, workers=1):
    """Folder with a split in nuScenes' layout, rendered only if it is not there yet. Returns its Path.

    frames: pictures wanted, rounded up to samples of six, as many for each scene and at least two. Raises UserError.
    """
    if split not in SPLITS:
        raise UserError(f"the built-in world has six cameras in {' and '.join(SPLITS)}, got {split!r}")
    pictures = len(CAMERAS) * len(scenes_of(split))  # of a sample of each scene
    if not 1 <= frames <= pictures * MOST_SAMPLES:
        most = pictures * MOST_SAMPLES
        raise UserError(f"the built-in world has 1 to {most} pictures of {split}, world_frames is {frames}")
    samples = max(2, math.ceil(frames / pictures))
    folder = Path(root) / f"world-nuscenes{VERSION}-seed{seed}-{SIZE[0]}x{SIZE[1]}-{split}{samples}"
    return build_folder(folder, partial(fill_folder, seed, split, samples, workers))
