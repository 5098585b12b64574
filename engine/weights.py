"""Weights that lie somewhere, for what is no training: in a run, a checkpoint, a file, or on the hub."""

import dataclasses
import os
import re
import textwrap
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import override, read_config, refuse_idle_root
from engine.checkpoint import CONFIG, META, METRICS, MODEL, list_checkpoints, near, verify
from model import Detector
from scene.frames import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name


def fetch(path):
    """A path as it is; of a hub id (owner/name), unless there is such a folder, where its files were fetched to.

    A snapshot of all files at once, because without a network huggingface_hub then gives up after one try. Raises
    UserError when the hub does not give them.
    """
    if not HUB_ID.fullmatch(str(path)) or Path(path).parent.exists():  # with such a folder it is a mistyped path
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=[MODEL, CONFIG, META, METRICS]))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are among them
        first = textwrap.shorten(str(error), 300)
        raise UserError(f"{path}: no such folder here, and not loaded from the hub either: {first}") from None


def find_weights(path):
    """model.safetensors of a run (its best/, else its newest checkpoint), a checkpoint, a hub id, or the file itself.

    Raises UserError saying what was looked for, or which file is not what was written there.
    """
    path = fetch(path)
    newest = [folder / MODEL for folder in list_checkpoints(path / "checkpoints")]
    for candidate in (path, path / MODEL, path / "best" / MODEL, *newest):
        if candidate.is_file():
            if (candidate.parent / META).exists():
                verify(candidate.parent)
            return candidate
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint or file{near(path)}")
    raise UserError(f"{path}: no weights there: looked for {MODEL}, best/{MODEL} and checkpoints/step_*/{MODEL}")


def find_checkpoint(run):
    """Folder with config.json and model.safetensors, verified: a checkpoint, or of a run the best, else the newest.

    Raises UserError saying what was looked for, or which file is not what was written there.
    """
    if not Path(run).is_dir():
        raise UserError(f"{run}: no such folder, expected a run or a checkpoint{near(Path(run), '*/')}")
    folder = find_weights(run).parent
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: missing beside the weights, expected a folder written by train.py")
    return folder


def load_run(folder, overrides=()):
    """Config, with overrides, and detector of a checkpoint folder. Raises UserError naming what does not fit."""
    folder = Path(folder)
    config = override(read_config(folder / CONFIG), overrides)
    detector = Detector(dataclasses.replace(config.model, pretrained=False))  # the weights come from the checkpoint
    try:
        detector.load_state_dict(load_file(folder / MODEL))
    except (RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{folder / MODEL}: damaged, or of another architecture than {CONFIG}: {first}") from None
    return config, detector


def stay_at_home(config, overrides):
    """The config of a run, maybe a stranger's, without data.cache and with the user's own data.index unless asked for.

    data.cache is left out unless asked for, and an index is written into the user's cache folder. Raises UserError for
    a built-in world in a folder elsewhere that holds none yet, and for a data.root that no source of data.val reads.
    """
    refuse_idle_root(overrides, *config.data.val)
    asked = {text.partition("=")[0].strip() for text in overrides}
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deep3d_index"
    places = {"cache": "", "index": "none" if config.data.index == "none" else str(home)}
    places = {name: place for name, place in places.items() if f"data.{name}" not in asked}
    for source in config.data.val if "data.val" not in asked else ():
        root = Path(source.root or ("." if source.like else config.data.root))  # like renders below here
        ours = root.resolve().is_relative_to(Path.cwd()) or any(root.glob("world*-seed*"))
        if source.kind == "synthetic" and not ours and not (not source.root and "data.root" in asked):
            raise UserError(f"the run's config would render its world into {root}; data.root={root} allows that")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **places))
