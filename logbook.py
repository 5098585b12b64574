"""What a run says while it trains: console, train.log, log.jsonl in mmdetection's keys, trackers, and which steps were skipped."""

import datetime
import json
import logging
import math
import sys
import time

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object

from config import dataclasses_to_json, describe

try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger("deep3d")


def start_log(out, main):
    """Log lines to the console and out/train.log on the main process, nothing elsewhere."""
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(out / "train.log")] if main else [logging.NullHandler()]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
    log.handlers, log.propagate = handlers, False
    log.setLevel(logging.INFO)


def memory_mb(device):
    """Peak memory of this process so far: on the GPU, or resident on the CPU, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak // (2**20 if sys.platform == "darwin" else 1024)


PATIENCE = 0.02  # share of the time that may be spent waiting for data before the log says so


class Window:
    """What the next log line shows; stays on the device until `read`, the one sync of a window.

    `tick` is called once a step, so that its time holds every wait; `rest` after what is no step, an evaluation or a save.
    """

    def __init__(self):
        self.rows, self.steps, self.time, self.data_time = [], [], 0.0, 0.0
        self.waits = []  # (waited, whole) seconds a step of each window read so far
        self.count, self.began, self.before = 0, None, time.perf_counter()

    def tick(self):
        """A step has ended."""
        now = time.perf_counter()
        self.time, self.before = self.time + now - self.before, now
        self.began, self.count = (now, 0) if self.began is None else (self.began, self.count + 1)  # the first step starts everything

    def rest(self):
        """What happened since the last tick was no step."""
        self.before = time.perf_counter()

    def seconds_left(self, steps):
        """Seconds that so many steps will take, evaluations and saves among them, as all of this process have but the first."""
        return (time.perf_counter() - self.began) / self.count * steps if self.count else self.time * steps

    def add(self, step, parts, norm):
        """One step: {name: device scalar} of its micro-steps, the weighted sum under 'loss', and the gradient norm."""
        means = parts[0] if len(parts) == 1 else {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        self.rows.append({**means, "grad_norm": norm})
        self.steps.append(step)

    def read(self, accelerator):
        """What happened since the last reading, over all processes, and starts anew.

        Returns means {'data_time', 'time', each loss, 'loss', 'grad_norm'} over the steps that counted, empty without one, and
        [(step, process or None if unknown, {name: value of what is not finite})] of the others.
        """
        if not self.rows:
            return {}, []
        names, steps = list(self.rows[0]), self.steps
        table = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.rows])  # (steps, names)
        times = torch.tensor([self.data_time / len(steps), self.time / len(steps)], device=table.device)
        times = accelerator.reduce(times, "mean").tolist()
        table = accelerator.gather(table[None]).tolist()  # (processes, steps, names)
        self.rows, self.steps, self.time, self.data_time = [], [], 0.0, 0.0
        self.waits.append(tuple(times))
        good = [i for i in range(len(steps)) if math.isfinite(table[0][i][-1])]  # the norm is equal on all processes
        logged = [(n, name) for n, name in enumerate(names) if name != "gradient"] if good else []
        means = {name: np.mean([[rows[i][n] for i in good] for rows in table]).item() for n, name in logged}
        broken = []
        for i in sorted({*range(len(steps))} - {*good}):
            own = [name for name in names if name not in ("loss", "grad_norm")]  # the sum says nothing new, the norm is everybody's
            values = [{n: v for n, v in zip(names, rows[i], strict=True) if n in own and not math.isfinite(v)} for rows in table]
            guilty = [(steps[i], process, found) for process, found in enumerate(values) if found]
            broken += guilty or [(steps[i], None, {})]
        return means and {"data_time": times[0], "time": times[1], **means}, broken

    def warn_of_waiting(self, workers):
        """Say once that the workers cannot keep up, and how many could: after three windows, of which the first, a start, does not count.

        Workers that are always busy give `workers` batches in the time that one of them needs for a batch; without workers the waiting
        is that time.
        """
        if len(self.waits) != 3:
            return
        waited, whole = np.sum(self.waits[1:], 0)
        if waited > PATIENCE * whole:
            busy = workers * whole if workers else waited
            enough = math.ceil(1.1 * busy / (whole - waited))
            log.warning(
                f"{waited / whole:.0%} of the time is spent waiting for data: data.workers={max(enough, workers + 1)} a process would be "
                f"enough (now {workers}), if there are as many cores; data.cache=FOLDER makes each faster"
            )


def start_trackers(accelerator, out, config):
    """Tell the trackers of `log_with` the run's name, which is its folder's, and its config."""
    plain = {key: dataclasses_to_json(value) for key, (value, _) in describe(config).items()}
    flat = {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in plain.items()}
    accelerator.init_trackers(out.resolve().name, config=flat)


def find_tracker(name):
    """The `log_with` of an Accelerator. Raises ValueError when that package is not installed."""
    if name and name not in [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]:
        raise ValueError(f"log_with={name}: not installed; pip install {name}, or leave log_with empty (log.jsonl is written anyway)")
    return name or None


def show_picture(accelerator, picture, step):
    """Give a PIL image to the trackers that take one."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"predictions": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"predictions": [picture]}, step=step)


def write_log(accelerator, out, record, line, numbers=()):
    """One console line, one line of log.jsonl, and the trackers, which get further {name: number} too."""
    log.info(line)
    if accelerator.is_main_process:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    values = {**dict(numbers), **record}
    accelerator.log({key: value for key, value in values.items() if isinstance(value, int | float)}, step=record["step"])


def crosses(done, period):
    """Whether step `done`, counted from 1, is the first to reach a multiple of a period of any length; never for a period of 0."""
    return period > 0 and int((done + 1e-6) / period) > int((done - 1 + 1e-6) / period)


def place_in_epoch(step, steps_per_epoch):
    """Epoch in which a step's first image lies, the step's place in it, and how many steps begin in it, counted from 1."""
    epoch = int((step - 1 + 1e-6) / steps_per_epoch)
    first, following = (math.ceil(number * steps_per_epoch - 1e-6) for number in (epoch, epoch + 1))
    return epoch + 1, step - first, following - first


def log_window(accelerator, out, values, step, steps_per_epoch, lr, seconds_left):
    """The line of a window's values, in mmdetection's form and keys."""
    epoch, place, count = place_in_epoch(step, steps_per_epoch)
    memory = memory_mb(accelerator.device)
    record = {"mode": "train", "epoch": epoch, "iter": place, "step": step, "lr": lr, "memory": memory, **values}
    eta = datetime.timedelta(seconds=int(seconds_left))
    losses = ", ".join(f"{name}: {value:.4f}" for name, value in values.items() if name.startswith("loss"))
    line = f"Epoch [{epoch}][{place}/{count}]  lr: {lr:.5f}, eta: {eta}, time: {values['time']:.3f}, "
    write_log(accelerator, out, record, f"{line}data_time: {values['data_time']:.3f}, memory: {memory}, {losses}")


def report_broken(broken, order, ids, accumulate, world):
    """Name the steps that were skipped. Returns the reports as `guard.fail` wants them."""
    reports = []
    for step, process, values in broken:
        ranks = range(world) if process is None else [process]  # a gradient can break behind the head, where nobody looks
        batches = [order.at(step * accumulate + part, rank) for rank in ranks for part in range(accumulate)]
        frames = [ids[index] for samples in batches for _, index in samples]
        reports.append({"step": step, "process": process, "losses": values, "frames": frames, "batches": batches})
        what = ", ".join(f"{name} {value}" for name, value in values.items()) or "all losses finite"
        who = "process unknown" if process is None else f"process {process}"
        log.warning(f"step {step + 1} skipped, its gradient is not finite; {who}: {what}; frames {' '.join(frames)}")
    return reports


def report_unreadable(own):
    """Name the unreadable images that all processes have replaced. Returns a new list, empty."""
    ids = gather_object(own)
    if ids:
        log.warning(f"{len(ids)} unreadable images were replaced (data.skip_bad): {', '.join(sorted({*ids})[:20])}")
    return []
