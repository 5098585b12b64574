"""Trackers such as tensorboard: an extra, which a run finds by its name when log_with asks for one."""

import json
from pathlib import Path

import numpy as np
from accelerate.tracking import get_available_trackers

from config import describe, plain
from scene.frames import UserError


def find_tracker(name):
    """The `log_with` of an Accelerator. Raises UserError when that package is not installed."""
    if name not in [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]:
        advice = f"pip install {name}, or leave log_with empty (log.jsonl is written anyway)"
        raise UserError(f"log_with={name}: not installed; {advice}")
    return name


def start(accelerator, config):
    """Tell the trackers the run's name, which is its folder's, and every key of its config."""
    values = {key: plain(value) for key, (value, _) in describe(config).items()}
    flat = {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in values.items()}
    accelerator.init_trackers(Path(config.out).resolve().name, config=flat)


def show(accelerator, picture, step):
    """Give a PIL image to the trackers that take one."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"predictions": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"predictions": [picture]}, step=step)
