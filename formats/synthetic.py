"""The built-in world as a source: splits are rendered on first use, then read as KITTI folders or nuScenes tables.

'train' and 'val' are seen by one camera in front of a car, 'mini_train' and 'mini_val' by six all around one.
"""

import dataclasses
from importlib import import_module
from pathlib import Path

from scene.frames import UserError, usable_cores

FIELDS = ("split", "cameras", "world_frames", "world_seed")  # of data.Source, that this format reads
ALL_AROUND = ("mini_train", "mini_val")


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
    root = source.root or config.root
    if len({*source.split}) < len(source.split):
        splits = ", ".join(source.split)
        raise UserError(f"data source {root}: split lists {splits}, expected each once; use repeat= to repeat")
    parts = []
    for split in source.split:
        folder = render(root, split, source.world_frames, source.world_seed)
        part = dataclasses.replace(source, kind=kind_of(split), root=str(folder), split=(split,))
        parts.append(import_module(f"formats.{part.kind}").frames(part, config, problems))
    return parts[0] if len(parts) == 1 else [frame for part in parts for frame in part][: source.limit or None]


def render(root, split, count, seed):
    """Folder with the first `count` frames of a split, rendered by all cores if it is not there yet."""
    world = import_module("world.cameras" if split in ALL_AROUND else "world.street")
    build = world.build_nuscenes_world if split in ALL_AROUND else world.build_world
    try:
        return build(Path(root), split, count, seed, workers=usable_cores())
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
