"""Trackers such as tensorboard, through Accelerate: an extra, which a run finds by its name when log_with asks for one.

One that does not start ends the run before it reads data; one that fails later is left out from then on.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import re
import tempfile
import textwrap
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from config import describe
from scene.frames import UserError

PROJECT = "deep3d"  # that the runs belong to, in trackers which have projects
NOTE = "tracker.json"  # in the run folder: {tracker: what it calls the run}, for a run that goes on
OFFLINE = {
    "wandb": "WANDB_MODE=offline",
    "swanlab": "SWANLAB_MODE=offline",
    "comet_ml": "COMET_START_ONLINE=false",
    "clearml": "CLEARML_OFFLINE_MODE=1",
}  # variables that spare the account
RENAMED = {"step": None, "time": "step_time"}  # keys of log.jsonl that trackers keep for themselves; None: given apart
WITHOUT = "leave log_with empty (log.jsonl is written anyway)"
logger = logging.getLogger("deep3d")


@contextlib.contextmanager
def tracking(accelerator, config):
    """While this lasts, the accelerator's `log` reaches the tracker that log_with names. Raises UserError without it.

    To be entered before handlers of signals are set, as some trackers set their own.
    """
    if accelerator.is_main_process:
        accelerator.trackers = [Tracker(config.log_with, Path(config.out).resolve())]
    failed = False
    try:
        yield
    except (Exception, KeyboardInterrupt):  # a SystemExit is that of a run which goes on later
        failed = True
        raise
    finally:
        for tracker in accelerator.trackers:
            tracker.finish(failed)


class Tracker:
    """One of Accelerate's trackers for the run in a folder, under the folder's name, as an `Accelerator` uses it."""

    def __init__(self, name, out):
        self.name = name
        self.note = out / NOTE
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"log_with={name}: Accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}; {WITHOUT}")
        if name not in [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]:
            raise UserError(f"log_with={name}: not installed; pip install {name}, or {WITHOUT}")
        notes = json.loads(self.note.read_text()) if self.note.is_file() else {}
        self.begun = notes.get(name)  # what it calls the run; None: it has none yet
        try:
            self.tracker = open_tracker(name, out, self.begun)
            self.tracker.start()
        except Exception as error:  # whatever theirs may be: no account, no network, a locked database
            offline = f"{OFFLINE[name]} needs no account; " if name in OFFLINE else ""
            raise UserError(f"log_with={name} does not start: {reason_of(error)}; {offline}{WITHOUT}") from error

    @contextlib.contextmanager
    def surviving(self):
        """What fails inside is told once, and the run goes on without the tracker."""
        try:
            yield
        except Exception as error:  # a tracker may raise anything, and no run is to end of that
            self.tracker = None
            logger.warning(f"log_with={self.name} failed, and the run goes on without it: {reason_of(error)}")

    def describe(self, config):
        """Tell it every key of the config, once in the life of a run."""
        flat = {
            key: value if isinstance(value, int | float | str) else json.dumps(value, default=dataclasses.asdict)
            for key, (value, _) in describe(config).items()
        }
        if self.tracker and self.begun is None:
            with self.surviving():
                self.tracker.store_init_configuration(flat)
                aside = self.note.with_name(f".tmp_{NOTE}")
                aside.write_text(json.dumps({self.name: id_of(self.name, self.tracker.tracker)}))
                aside.replace(self.note)  # whole or absent, whenever the run is killed

    def log(self, values, step):
        """Tell it numbers {name: value} of a step."""
        names = {key: re.sub(r"[^\w./ -]", "_", RENAMED.get(key, key) or "") for key in values}
        if self.tracker:
            with self.surviving():
                self.tracker.log({names[key]: value for key, value in values.items() if names[key]}, step=step)

    def show(self, picture, step):
        """Tell it a PIL image."""
        if self.tracker:
            with self.surviving():
                show_picture(self.name, self.tracker, picture, step)

    def finish(self, failed=False):
        """The end, which wandb and mlflow can be told was no good one; a second one does nothing."""
        if self.tracker:
            with self.surviving():
                if failed and self.name == "wandb":
                    self.tracker.tracker.finish(exit_code=1)
                elif failed and self.name == "mlflow":
                    importlib.import_module("mlflow").end_run("FAILED")
                else:
                    self.tracker.finish()
        self.tracker = None


def reason_of(error):
    """The first words of what a tracker raised."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def open_tracker(name, out, begun):
    """Accelerate's tracker for the run in a folder; begun: what it calls the run that goes on, None for a new one."""
    kind, resume = LOGGER_TYPE_TO_CLASS[name], "never" if begun is None else "allow"
    match name:
        case "tensorboard":
            return kind(out.name, out)
        case "aim":
            return kind(out.name, out.parent, experiment=PROJECT, run_hash=begun)
        case "mlflow":
            return kind(PROJECT, run_name=out.name, run_id=begun)
        case "clearml":  # it would take every file of weights and every argument parser for its own
            options = {"auto_connect_frameworks": False, "auto_connect_arg_parser": False}
            return kind(PROJECT, task_name=out.name, reuse_last_task_id=False, continue_last_task=begun, **options)
        case "dvclive":
            folder = out / "dvclive"
            options = {"save_dvc_exp": False, "dvcyaml": str(folder / "dvc.yaml")}  # else it commits the user's files
            with contextlib.chdir(tempfile.gettempdir()):  # and sets up DVC in the Git repository that it is called in
                live = importlib.import_module("dvclive").Live(str(folder), resume=begun is not None, **options)
            return kind(live=live)
        case "comet_ml":
            named = importlib.import_module("comet_ml").ExperimentConfig(name=out.name)
            return kind(PROJECT, experiment_key=begun, experiment_config=named)
        case "trackio":
            return kind(PROJECT, name=out.name, resume=resume)
    return kind(PROJECT, name=out.name, id=begun, resume=resume)  # wandb and swanlab


def id_of(name, run):
    """What a tracker calls a run of its own, to find it again."""
    match name:
        case "aim":
            return run.hash
        case "mlflow":
            return run.info.run_id
        case "tensorboard" | "dvclive":
            return ""
    return run.id


def show_picture(name, tracker, picture, step):
    """Give a PIL image to one of Accelerate's trackers, each in the way that it takes one."""
    match name:
        case "tensorboard":
            tracker.log_images({"predictions": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        case "aim" | "clearml":
            tracker.log_images({"predictions": picture}, step=step)
        case "wandb" | "swanlab":
            tracker.log_images({"predictions": [picture]}, step=step)
        case "mlflow":
            importlib.import_module("mlflow").log_image(picture, "predictions.png")
        case "dvclive":
            tracker.tracker.log_image("predictions.png", picture)
        case "comet_ml":
            tracker.tracker.log_image(picture, "predictions", step=step)
        case "trackio":
            tracker.log({"predictions": importlib.import_module("trackio").Image(picture)}, step=step)
