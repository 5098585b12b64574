"""The built-in world as a source: splits are rendered on first use, then read as KITTI folders or nuScenes tables.

'train' and 'val' are seen by one camera in front of a car, 'mini_train' and 'mini_val' by six all around one. With
like= the frames have cameras, image sizes, classes and heights of another source's, as world/like.py says.
"""

import dataclasses
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from scene.frames import UserError, join, usable_cores

FIELDS = ("split", "cameras", "world_frames", "world_seed", "like")  # of data.Source, that this format reads
ALL_AROUND = ("mini_train", "mini_val")
CACHE = "data/synthetic"  # folder of frames like others, whose own folder is no place for them


def kind_of(split):
    """The format that a split is rendered in: formats.<kind>."""
    return "nuscenes" if split in ALL_AROUND else "kitti"


def metrics_of(source):
    """The module of metrics that judges a source's frames. Raises UserError where there are two."""
    names = {import_module(f"formats.{kind_of(split)}").METRICS for split in source.split}
    if len(names) > 1:
        splits = ", ".join(source.split)
        raise UserError(f"the splits {splits} of the built-in world have different metrics, list one kind")
    return names.pop()


def frames(source, config, problems=None):
    """The frames of a source's splits, rendered if they are not there. Raises UserError; problems as formats.kitti."""
    root = source.root or (CACHE if source.like else config.root)
    if len({*source.split}) < len(source.split):
        splits = ", ".join(source.split)
        raise UserError(f"data source {root}: split lists {splits}, expected each once; use repeat= to repeat")
    parts = []
    for split in source.split:
        folder = render(root, split, source, config)
        part = dataclasses.replace(source, kind=kind_of(split), root=str(folder), split=(split,))
        parts.append(import_module(f"formats.{part.kind}").frames(part, config, problems))
    return parts[0] if len(parts) == 1 else [frame for part in parts for frame in part][: source.limit or None]


def render(root, split, source, config):
    """Folder with the first `world_frames` frames of a split, rendered by all cores if it is not there yet."""
    if source.like and split in ALL_AROUND:
        raise UserError(f"data source {root}: like means nothing to the six cameras of {split}, expected train or val")
    if source.cameras and split not in ALL_AROUND:
        raise UserError(f"data source {root}: cameras means nothing to the one camera of {split}")
    try:
        if source.like:
            world = import_module("world.like")
            frames = frames_like(source, config)
            traits = world.find_traits(join([frame.labels for frame in frames]), source.rename)
            build = partial(world.build_like, world.find_models(frames), traits)
        elif split in ALL_AROUND:
            build = import_module("world.cameras").build_nuscenes_world
        else:
            build = import_module("world.street").build_world
        return build(Path(root), split, source.world_frames, source.world_seed, workers=usable_cores())
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def frames_like(source, config):
    """Frames that a source is to be like, at most 1000 of each of data.train. Raises UserError where there are none."""
    real = [other for other in config.train if other.kind != "synthetic"]
    if source.like != "data.train":
        real = [other for other in real if Path(other.root or config.root) == Path(source.like)]
        kind = "jsonl" if source.like.endswith(".jsonl") else "kitti"
        real = real or [type(source)(kind=kind, root=source.like)]
    frames = []
    for other in real:
        if not find_spec(f"formats.{other.kind}"):
            raise UserError(f"like: data source kind is {other.kind!r}, which is none")
        whole = import_module(f"formats.{other.kind}").frames(other, config)
        chosen = [whole[i] for i in range(0, len(whole), max(1, -(-len(whole) // 1000)))]
        for frame in chosen:
            names = np.array([other.rename.get(name, name) for name in frame.labels.name], dtype=object)
            frames.append(dataclasses.replace(frame, labels=dataclasses.replace(frame.labels, name=names)))
    if not frames:
        raise UserError(f"like={source.like}: there are no frames to be like, expected some that are not rendered")
    return frames
