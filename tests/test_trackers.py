"""Trackers: what they are told, and that none of them costs a run its end."""

import importlib
import json
import logging
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
from conftest import tiny
from test_train import here  # noqa: F401  a fixture

from config import Config
from engine import trackers
from engine.guard import Stopped


class FakeTracker:
    """One of Accelerate's, of which one method fails; what it was told is in `calls`."""

    calls: ClassVar = []
    fails = ""

    def __init__(self, *_, **__):
        self.tracker = SimpleNamespace(id="7")

    def call(self, name, *arguments):
        FakeTracker.calls.append((name, *arguments))
        if name == FakeTracker.fails:
            raise ConnectionError(f"no way to {name}")

    def start(self):
        self.call("start")

    def store_init_configuration(self, values):
        self.call("describe", values)

    def log(self, values, step):
        self.call("log", values, step)

    def log_images(self, values, step, **_):
        self.call("show", values, step)

    def finish(self):
        self.call("finish")


@pytest.fixture
def fake_tracker(monkeypatch):
    """Has log_with=wandb find `FakeTracker`, whose method of this name is to fail."""

    def use(fails=""):
        monkeypatch.setattr(FakeTracker, "fails", fails)
        monkeypatch.setattr(FakeTracker, "calls", [])

    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    use()
    return use


@pytest.mark.parametrize("fails", ["describe", "log", "show", "finish"])
def test_a_tracker_that_fails_costs_no_run_its_end(tmp_path, caplog, fake_tracker, fails):
    """It is left out from then on."""
    fake_tracker(fails)
    accelerator = SimpleNamespace(is_main_process=True, trackers=[])
    config = Config(log_with="wandb", out=str(tmp_path))
    logging.getLogger("deep3d").propagate = True
    with trackers.tracking(accelerator, config):
        [tracker] = accelerator.trackers
        tracker.describe(config)
        tracker.log({"loss": 1.0}, step=1)
        tracker.log({"loss": 2.0}, step=2)
        tracker.show("picture", 2)
        tracker.finish()  # as Accelerator.end_training has it do
    names = [name for name, *_ in FakeTracker.calls]
    whole = ["start", "describe", "log", "log", "show", "finish"]
    assert names == whole[: whole.index(fails) + 1]
    [line] = {id(record): record.getMessage() for record in caplog.records}.values()  # two handlers may show one
    assert line == f"log_with=wandb failed, and the run goes on without it: ConnectionError: no way to {fails}"


def test_a_signal_is_no_failure_of_a_tracker(tmp_path, fake_tracker):
    accelerator = SimpleNamespace(is_main_process=True, trackers=[])
    config = Config(log_with="wandb", out=str(tmp_path))
    with pytest.raises(Stopped), trackers.tracking(accelerator, config), accelerator.trackers[0].surviving():
        raise Stopped
    assert FakeTracker.calls[-1] == ("finish",)


@pytest.mark.parametrize(("error", "told"), [(FloatingPointError, 1), (KeyboardInterrupt, 1), (SystemExit, None)])
def test_a_tracker_is_told_that_a_run_failed(tmp_path, fake_tracker, monkeypatch, error, told):
    """SystemExit ends a process whose run goes on later."""
    accelerator, codes = SimpleNamespace(is_main_process=True, trackers=[]), []
    theirs = SimpleNamespace(id="7", finish=lambda exit_code: codes.append(exit_code))
    monkeypatch.setattr(FakeTracker, "__init__", lambda self, *_, **__: setattr(self, "tracker", theirs))
    with pytest.raises(error), trackers.tracking(accelerator, Config(log_with="wandb", out=str(tmp_path))):
        raise error
    assert codes == [told] * bool(told)
    assert ("finish",) not in FakeTracker.calls if told else FakeTracker.calls[-1] == ("finish",)


def test_a_resumed_run_goes_on_under_its_tracker_run(tiny_run, tmp_path, here, monkeypatch, fake_tracker):  # noqa: F811
    """Under the folder's name; the config is told once, and names that trackers refuse or keep are not used."""
    opened = []
    monkeypatch.setattr(FakeTracker, "__init__", lambda self, *words, **options: opened.append((words, options)))
    monkeypatch.setattr(FakeTracker, "tracker", SimpleNamespace(id="7"), raising=False)
    arguments = tiny(tiny_run[0], tmp_path / "my run")
    for steps in (4, 6):
        code, _, err = here(*arguments, "log_with=wandb", f"train.steps={steps}", "train.schedule=constant")
        assert code == 0, err
    options = {"name": "my run", "id": None, "resume": "never"}
    assert opened == [(("deep3d",), options), (("deep3d",), options | {"id": "7", "resume": "allow"})]
    [(_, values)] = [call for call in FakeTracker.calls if call[0] == "describe"]
    assert values["train.batch_size"] == 2
    assert json.loads(values["data.train"])[0]["world_frames"] == 8
    assert values["model.classes"] == '["Car", "Pedestrian", "Cyclist"]'
    logs = [call[1:] for call in FakeTracker.calls if call[0] == "log"]
    assert [step for _, step in logs] == [1, 2, 3, 4, 4, 5, 6, 6]
    numbers = logs[-1][0]
    assert {"Pedestrian/aos/hard/AP_R11", "errors/Cyclist/all/objects", "counted/Car/easy"} <= numbers.keys()
    assert {"errors/Car/50_and_more/objects", "mean/3d/moderate/AP_R40"} <= numbers.keys()
    assert {"step_time", "data_time", "loss"} <= logs[0][0].keys()
    for name in numbers.keys() | logs[0][0].keys():
        assert re.fullmatch(r"[\w./ -]+", name), name  # what mlflow takes
        assert name not in ("project", "run", "timestamp", "step", "time", "metrics")  # what trackio keeps
    assert [call[0] for call in FakeTracker.calls].count("show") == 2


def test_class_names_of_any_script_are_told_to_trackers(tmp_path, fake_tracker):
    tracker = trackers.Tracker("wandb", tmp_path)
    tracker.log({"Lkw (groß) 50+/3d": 1.0, "mode": 2, "step": 3}, step=3)
    assert FakeTracker.calls[-1] == ("log", {"Lkw _groß_ 50_/3d": 1.0, "mode": 2}, 3)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "aim", "mlflow"])
def test_trackers_that_need_no_account(tiny_run, tmp_path, here, monkeypatch, name):  # noqa: F811
    """Each where it is installed; tests/requirements.txt names none."""
    pytest.importorskip(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs/my run"
    for steps in (4, 6):
        code, text, err = here(*tiny(tiny_run[0], out), f"log_with={name}", f"train.steps={steps}")
        assert code == 0, err
        assert "goes on without it" not in text + err
    if name == "tensorboard":
        events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        accumulator = events.EventAccumulator(str(out / "my run"))
        accumulator.Reload()
        assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
        assert accumulator.Tags()["images"] == ["predictions"]
    elif name == "trackio":
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        rows = storage.get_logs("deep3d", "my run")
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
        assert sum("predictions" in row for row in rows) == 2
    elif name == "mlflow":
        [run] = importlib.import_module("mlflow").search_runs(search_all_experiments=True, output_format="list")
        assert (run.info.run_name, run.info.status) == ("my run", "FINISHED")
        assert run.data.params["train.batch_size"] == "2"
        assert "errors/Car/50_and_more/objects" in run.data.metrics
    else:
        assert (tmp_path / "runs/.aim").is_dir()


def test_a_tracker_that_is_not_there_or_does_not_start_is_said_before_anything_is_read(
    tmp_path,
    here,  # noqa: F811
    monkeypatch,
    fake_tracker,
):
    arguments = tiny(tmp_path / "world", tmp_path / "out")
    fake_tracker("start")
    code, _, err = here(*arguments, "log_with=wandb")
    assert code == 2
    assert "error: log_with=wandb does not start: ConnectionError: no way to start; WANDB_MODE=offline needs no" in err
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    code, _, err = here(*arguments, "log_with=wandb")
    assert (code, "log_with=wandb: not installed; pip install wandb" in err) == (2, True)
    code, _, err = here(*arguments, "log_with=tensorbord")
    assert (code, "log_with=tensorbord: Accelerate knows " in err) == (2, True)
    assert not (tmp_path / "world").exists()
