"""The second world: frames like those of another source, in KITTI format, rendered once.

Each frame is modelled on one of that source's: its camera, image size, height and pitch above the road.
The streets are those of KITTI: rows of parked cars that hide each other and leave the image, hard light, rolling roads.
A frame is a function of (seed, index, models, traits).
"""

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from formats.kitti import write_calib, write_labels
from scene.frames import Frame, UserError, image_size
from world.shapes import GLASS, PAINT, SIZES, TAIL
from world.street import (
    CAMERA_SHIFT,
    CLASSES,
    CROSSING_WIDTH,
    FIRST_INDEX,
    MAX_DEPTH,
    build_folder,
    develop,
    draw_objects,
    draw_picture,
    draw_view,
    label_objects,
    make_split,
    render_all,
)

VERSION = 2  # part of the folder's name: raise it whenever a picture or a label changes
MODELS = 256  # frames of a source at most that are modelled on, evenly spaced
HEIGHT, PITCH = 1.65, 0.8  # m above the road where no label tells; degrees, deviation, where a frame's own do not
# Shares of the classes among the objects that `draw_street` would give: of 300 frames.
USUAL = {"Car": 0.59, "Van": 0.06, "Truck": 0.01, "Pedestrian": 0.18, "Cyclist": 0.16}
PAINTS = np.array([[0.03, 0.03, 0.035], [0.1, 0.1, 0.11], [0.28, 0.29, 0.3], [0.5, 0.51, 0.52], [0.8, 0.8, 0.78],
                   [0.04, 0.06, 0.14], [0.35, 0.04, 0.04]])  # fmt: skip
PARKED = {"sedan": 33, "hatchback": 32, "suv": 22, "van": 9}  # kinds, and how frequent they are
TRAFFIC = PARKED | {"truck": 4}


class Model(NamedTuple):
    """What a rendered frame takes from a real one."""

    camera: tuple[float, float, float, float]  # fx, fy, cx, cy, px
    size: tuple[int, int]  # width, height, px
    height: float  # m above the road
    pitch: float  # radians, NaN: its labels do not tell


class Trait(NamedTuple):
    """What rendered objects of a class take from the real ones."""

    weight: float  # chance that one which `draw_street` lists stays
    factors: tuple[float, float, float]  # on the usual length, height, width


def find_models(frames):
    """At most MODELS `Model`s of frames, evenly spaced. Raises UserError for an image that cannot be read."""
    chosen = [frames[i] for i in range(0, len(frames), -(-len(frames) // MODELS))]
    cameras = [(frame.K[0, 0], frame.K[1, 1], frame.K[0, 2], frame.K[1, 2]) for frame in chosen]
    feet = [feet_of(frame) for frame in chosen]
    models = []
    for frame, camera, (y, z) in zip(chosen, cameras, feet, strict=True):
        same = [own for own, other in zip(feet, cameras, strict=True) if other == camera]
        ys, zs = (np.concatenate(column) for column in zip(*same, strict=True))
        height = np.polyfit(zs, ys, 1)[1] if len(zs) >= 100 else HEIGHT  # fewer lie on few roads
        pitch = math.nan
        if len(z) >= 3 and np.ptp(z) > 8:  # tan of the least squares of y = height - z tan(pitch)
            pitch = -math.atan(np.clip((z * (y - height)).sum() / (z * z).sum(), -0.04, 0.04))
        try:
            size = frame.size or image_size(frame.image)
        except OSError as error:
            raise UserError(str(error)) from error
        models.append(Model(tuple(map(float, camera)), tuple(size), float(height), float(pitch)))
    return models


def feet_of(frame: Frame):
    """y and z (n,), m, of the bottom centres of a frame's objects, where the ground is."""
    labels = frame.labels[frame.labels.is_3d & (frame.labels.center[:, 2] < MAX_DEPTH)]
    return labels.center[:, 1] + labels.size[:, 1] / 2, labels.center[:, 2]


def find_traits(labels, names):
    """{class of the world: `Trait`} with which rendered classes have the shares and mean sizes of labels.

    names: {class of the world: its name there}. Raises UserError where no label is of such a class.
    """
    own = {name: labels.size[(labels.name == names.get(name, name)) & labels.is_3d] for name in USUAL}
    most = max(own, key=lambda name: len(own[name]))
    if not len(own[most]):
        there = ", ".join(sorted({*labels.name})) or "none"
        sentence = f"none of its classes is rendered, which are {', '.join(USUAL)}; rename= may call them otherwise"
        raise UserError(f"like: {sentence}; it has {there}")
    traits = {}
    for name, size in own.items():
        weight = min(1.0, len(size) / len(own[most]) * USUAL[most] / USUAL[name])
        kinds = [kind for kind, title in CLASSES.items() if title == name]
        usual = np.average([SIZES[kind] for kind in kinds], 0, [TRAFFIC.get(kind, 1) for kind in kinds])
        factors = np.clip(size.mean(0) / usual, 0.7, 1.4) if len(size) >= 10 else np.ones(3)
        traits[name] = Trait(round(weight, 4), tuple(factors.round(3).tolist()))
    return traits


def draw_camera(rng, model):
    """The `View` of a frame: the model's camera on a street with hard light, two of three with rows of parked cars."""
    view = draw_view(rng, model.size)
    fx, fy, cx, cy = model.camera
    pitch = np.radians(rng.normal(0, PITCH if math.isnan(model.pitch) else 0.2))
    pitch += 0 if math.isnan(model.pitch) else model.pitch
    roll = np.radians(rng.normal(0, 0.4))
    parked, lane = rng.random() < 0.65, float(rng.uniform(2.5, 3.5))
    half_road = lane * (1 if parked else int(rng.integers(1, 3))) + 2.2 * parked
    pavement = half_road + float(rng.uniform(1.2, 3.5))
    bright = rng.random() < 0.9
    tint = rng.uniform((0.85, 0.93, 1.0), (1.0, 1.0, 1.1)).astype(np.float32)[:, None, None]  # of the sky
    return view._replace(
        K=np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]),
        normal=np.array([np.sin(roll) * np.cos(pitch), np.cos(roll) * np.cos(pitch), np.sin(pitch)]),
        height=model.height * float(rng.normal(1, 0.02)),
        half_road=half_road,
        lane=lane,
        offset=lane / 2 + float(rng.normal(0, 0.35)),
        pavement=pavement,
        wall=pavement + float(rng.uniform(0.3, 8)),
        sunlight=float(rng.uniform(0.6, 1.2)) * bright,
        ambient=np.float32(rng.uniform(0.25, 0.45) + 0.3 * (not bright)) * tint,
        haze=np.float32(rng.uniform(0.8, 1.1)) * tint,
        haze_range=float(rng.uniform(150, 600)),
        curve=float(np.clip(rng.normal(0, 1.2e-4), -3e-4, 3e-4)),
        hedge=float(rng.uniform(5, 11)),
        gloss=float(rng.uniform(0.15, 0.8)),
        detail=float(rng.uniform(1, 3)),
    )


def draw_street(rng, view, traits):
    """Candidates as of `draw_candidates`: rows of parked cars, some traffic, few people; each stays by its trait."""
    found, lanes = [], int(view.half_road // view.lane)

    def row(mix, t, gap, direction, spread=0.15, turn=0.03, across=False):
        kinds, shares = list(mix), np.array(list(mix.values())) / sum(mix.values())
        s = rng.uniform(-6, gap - 2)
        while s < 75:
            kind = rng.choice(kinds, p=shares)
            length = SIZES[kind][2 if across else 0]
            found.append((kind, s + length / 2, t + rng.normal(0, spread), direction + rng.normal(0, turn)))
            s += length + 0.6 + rng.exponential(gap)

    for side, ahead in ((-1, np.pi), (1, 0.0)):
        for i in range(lanes):
            row(TRAFFIC, side * (i + 0.5) * view.lane, rng.uniform(15, 60), ahead, spread=0.25)
        if view.half_road - lanes * view.lane > 2 and rng.random() < 0.85:
            across, way = rng.random() < 0.2, ahead + np.pi * (rng.random() < 0.15)
            kerb = side * (view.half_road - 1.0 + 1.3 * across)
            row(PARKED, kerb, rng.choice([0.4, 1.5, 5]), way + np.pi / 2 * across, across=across)
        if view.wall - view.pavement > 5 and rng.random() < 0.5:  # in yards and on open ground
            yard = side * (view.pavement + 2.5)
            row(PARKED, yard, rng.uniform(2, 12), rng.uniform(0, 2 * np.pi), spread=0.6, turn=0.1, across=True)
        walk = side * (view.half_road + view.pavement) / 2
        row({"pedestrian": 3, "cyclist": 1}, walk, 15, rng.choice([0, np.pi]), spread=0.5, turn=0.5)
        row({"cyclist": 1}, side * (lanes * view.lane - 0.5), 45, ahead, spread=0.3, turn=0.1)
        row({"pole": 10, "tree": 9, "bin": 1}, side * (view.pavement + 0.2), rng.uniform(5, 15), 0, spread=0.2)
    for side in rng.choice([-1, 1], rng.poisson(2) if view.crossing < 50 else 0):
        s, t = view.crossing + 0.5 * CROSSING_WIDTH + 1.7 * side, rng.uniform(-20, 20)
        found.append((rng.choice(list(PARKED)), s, t, -side * np.pi / 2 + rng.normal(0, 0.06)))
    crowd = rng.uniform(0.1, 0.8)
    weights = {kind: crowd * traits[name].weight for kind, name in CLASSES.items()}
    return [one for one in found if rng.random() < weights.get(one[0], 1)]


def dress(rng, objects):
    """The same objects with paints as cars have them, dark windows, and brake lights on some."""
    colour, n = objects.colour.copy(), len(objects.kind)
    vehicle = np.isin(objects.kind, list(TRAFFIC))
    paint = PAINTS[rng.choice(len(PAINTS), n, p=(0.25, 0.14, 0.12, 0.18, 0.14, 0.12, 0.05))]
    own = rng.random(n) < 0.2  # keep the colour that they have
    colour[vehicle & ~own, PAINT] = (paint * rng.uniform(0.7, 1.3, (n, 1)))[vehicle & ~own]
    colour[vehicle, GLASS] *= rng.uniform(0.2, 1, (n, 1))[vehicle]
    colour[vehicle & (rng.random(n) < 0.25), TAIL] = (2.2, 0.25, 0.15)
    return objects._replace(colour=colour)


def render_frame(seed, index, model, traits):
    """One frame: (image (H, W, 3) uint8, P2 (3, 4), `Labels`, quality of its JPEG), the same bytes each time."""
    rng = np.random.default_rng((VERSION, seed, index))
    view = draw_camera(rng, model)
    factors = {kind: traits[name].factors for kind, name in CLASSES.items()}
    objects = dress(rng, draw_objects(rng, view, partial(draw_street, traits=traits), factors))
    image, _, share, pixels = draw_picture(rng, view, objects)
    P2 = np.column_stack([view.K, view.K @ CAMERA_SHIFT])
    quality = int(rng.integers(82, 97))
    return develop(rng, image), P2, label_objects(view, objects, share, pixels), quality


def write_frame(job):
    """Render one frame into a folder; job: the folder, then the arguments of `render_frame`."""
    folder, seed, index, *given = job
    image, P2, labels, quality = render_frame(seed, index, *given)
    Image.fromarray(image).save(folder / f"training/image_2/{index:06d}.jpg", quality=quality, subsampling=0)
    write_calib(folder / f"training/calib/{index:06d}.txt", P2)
    write_labels(folder / f"training/label_2/{index:06d}.txt", labels)


def build_like(models, traits, root, split, frames, seed=0, workers=1):
    """Folder with the first frames of a split in KITTI format, rendered only if it is not there yet. Returns its Path.

    models, traits: of `find_models`, `find_traits`; root: cache folder; split: 'train' or 'val'. Raises UserError.
    """
    if split not in FIRST_INDEX or frames < 1:
        splits = " and ".join(FIRST_INDEX)
        raise UserError(f"like: there are {splits}, of at least one frame, got {split!r} of {frames}")
    numbers = [np.round((*model.camera, *model.size, model.height, model.pitch), 4).tolist() for model in models]
    plain = [(name, *trait) for name, trait in traits.items()]
    digest = hashlib.sha256(repr((numbers, plain)).encode()).hexdigest()[:8]

    def fill(folder):
        indices = make_split(folder, split, frames)
        chosen = [np.random.default_rng((VERSION, seed, index, 1)).integers(len(models)) for index in indices]
        jobs = [(folder, seed, index, models[i], traits) for index, i in zip(indices, chosen, strict=True)]
        render_all(jobs, workers, f"rendering {split}", write_frame)

    return build_folder(Path(root) / f"world{VERSION}-seed{seed}-like{digest}-{split}{frames}", fill)
