"""What a run says: console and train.log, log.jsonl in mmdetection's keys, trackers, and which steps were left out."""

import contextlib
import datetime
import importlib
import json
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from config import to_dict
from engine.checkpoint import METRICS
from scene.frames import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

logger = logging.getLogger("deep3d")
PICTURE = Path(__file__).parents[1] / "tools/training.py"  # an extra, which draws training.png where it is there
PATIENCE = 0.02  # share of the time that may be spent waiting for data before the log says so


def start_log(out, main):
    """Log lines to the console and out/train.log on the main process, nothing elsewhere."""
    handlers = [logging.NullHandler()]
    if main:
        handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(Path(out) / "train.log")]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
    logger.handlers = handlers
    logger.propagate = False
    logger.setLevel(logging.INFO)


class Log:
    """The log of one run, in all its places; only the main process writes.

    order: the `StepBatches` of the run, which says where it begins and ends. Raises UserError where the end lies
    behind.
    """

    def __init__(self, accelerator, config, order):
        self.accelerator = accelerator
        self.config = config
        self.out = Path(config.out)
        self.order = order
        parts = config.train.accumulate
        self.steps_per_epoch = order.count / (order.global_batch * parts)
        self.start = order.start // parts
        self.total = order.stop // parts
        self.waited = 0.0  # s for data since the last line
        self.waits = []  # (waiting, whole) seconds a step of each line so far
        self.before = time.perf_counter()
        self.first = None  # (step, time) of the first line: what came before it started everything
        if self.start > self.total:
            raise UserError(f"{self.out}: it has {self.start} steps, and this run would end after {self.total}")
        if accelerator.is_main_process:
            (self.out / "config.json").write_text(json.dumps(to_dict(config), indent=1))
            if self.start < self.total:
                (self.out / "DONE").unlink(missing_ok=True)
        for tracker in accelerator.trackers:
            tracker.describe(config)

    def describe(self, net, train_set, val_set):
        """The first lines: what is trained, on what, for how long."""
        self.frames = train_set.frames  # whose ids are told where a step breaks
        logger.info(f"train: {train_set.summary()}")
        logger.info(f"val: {val_set.summary()}")
        options, parameters = self.config.train, list(net.parameters())
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        batch = self.order.global_batch * options.accumulate
        logger.info(
            f"{self.config.model.backbone}, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, "
            f"{frozen / 1e6:.1f} M of them frozen; {self.accelerator.num_processes} process(es) on "
            f"{self.accelerator.device}, mixed precision: {options.mixed_precision}; "
            f"{self.total} steps of {batch} images, {self.steps_per_epoch:g} an epoch"
        )
        if options.warmup > self.total / 2:
            share = f"train.warmup={options.warmup} is more than half of the {self.total} steps"
            logger.warning(f"{share}: the learning rate hardly reaches train.lr")
        if self.start == self.total:
            logger.info(f"it was finished before: out=runs/NAME starts another one, deleting {self.out} this one anew")

    # ---- the clock

    def timed(self, batches):
        """The same batches; the seconds that each was waited for become data_time."""
        while True:
            began = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - began
            yield batch

    @contextlib.contextmanager
    def apart(self):
        """What happens inside is no part of a step: a save, an evaluation."""
        began = time.perf_counter()
        yield
        self.before += time.perf_counter() - began

    def due(self, done):
        """Whether an evaluation follows step `done`."""
        return crosses(done, self.config.train.eval_every * self.steps_per_epoch) or done == self.total

    def owes(self, folder):
        """Whether a run that goes on from a checkpoint folder, if any, has to evaluate it first."""
        return bool(folder) and self.due(self.start) and (self.start == self.total or not (folder / METRICS).exists())

    # ---- lines

    def write(self, done, lr, window):
        """The line of the steps since the last one, `Guard.read`, and one for each of them that was left out."""
        names, table = window
        now = time.perf_counter()
        count = table.shape[1]
        times = torch.tensor([self.waited / count, (now - self.before) / count], device=self.accelerator.device)
        waiting, seconds = self.accelerator.reduce(times, "mean").tolist()
        self.waited = 0.0
        self.before = now
        good = np.isfinite(table[0, :, -1])  # the norm is equal on all processes
        for place in np.flatnonzero(~good):
            self.report(done - count + 1 + int(place), names, table[:, place])
        if good.any():
            means = {name: table[:, good, n].mean().item() for n, name in enumerate(names) if name != "gradient"}
            self.write_window(done, lr, {"data_time": waiting, "time": seconds, **means}, now)
        self.warn_of_waiting(waiting, seconds)

    def write_window(self, done, lr, values, now):
        """The line of a window's values {name: mean}, in mmdetection's form and keys."""
        epoch, place, count = place_in_epoch(done, self.steps_per_epoch)
        each = values["time"]
        if self.first:
            each = (now - self.first[1]) / (done - self.first[0])  # evaluations and saves among them
        self.first = self.first or (done, now)
        eta = datetime.timedelta(seconds=int(each * (self.total - done)))
        memory = memory_mb(self.accelerator.device)
        record = {"mode": "train", "epoch": epoch, "iter": place, "step": done, "lr": lr, "memory": memory, **values}
        losses = ", ".join(f"{name}: {value:.4f}" for name, value in values.items() if name.startswith("loss"))
        times = f"time: {values['time']:.3f}, data_time: {values['data_time']:.3f}"
        start = f"Epoch [{epoch}][{place}/{count}]  lr: {lr:.5f}, eta: {eta}"
        self.record(record, f"{start}, {times}, memory: {memory}, {losses}")

    def write_evaluation(self, step, value, best, numbers):
        """The line of an evaluation: value of the metric `best`, and its best one; {name: number} for the trackers."""
        epoch = math.ceil(step / self.steps_per_epoch - 1e-9)
        name = self.config.best
        line = f"Epoch(val) [{epoch}] step {step}  {name}: {value:.4f}, best: {best:.4f}"
        key = name if "/" in name else f"val/{name}"  # first, or mmdetection's analyze_logs takes the rest for training
        self.record({key: value, "mode": "val", "epoch": epoch, "step": step}, line, numbers)
        if PICTURE.is_file():
            importlib.import_module("tools.training").draw_log(self.out)

    def record(self, record, line, numbers=()):
        """One console line, one line of log.jsonl, and the trackers, which get further {name: number} too."""
        logger.info(line)
        if self.accelerator.is_main_process:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        values = {key: value for key, value in {**dict(numbers), **record}.items() if isinstance(value, int | float)}
        self.accelerator.log(values, step=record["step"])

    def report(self, done, names, table):
        """Name who broke a step, and its frames; table (processes, names)."""
        own = [name not in ("loss", "grad_norm") for name in names]  # the sum says nothing new, the norm is everybody's
        wrong = own & ~np.isfinite(table)
        processes = np.flatnonzero(wrong.any(1)).tolist()
        parts = self.config.train.accumulate
        for process in processes or [None]:  # a gradient can break behind the head, where nobody looks
            ranks = range(len(table)) if process is None else [process]
            samples = [self.order.at((done - 1) * parts + part, rank) for rank in ranks for part in range(parts)]
            frames = " ".join(self.frames[index].id for batch in samples for _, index in batch)
            what = "all losses finite"
            if process is not None:
                what = ", ".join(f"{names[n]} {table[process, n].item()}" for n in np.flatnonzero(wrong[process]))
            who = "process unknown" if process is None else f"process {process}"
            logger.warning(f"step {done} skipped, its gradient is not finite; {who}: {what}; frames {frames}")

    def warn_of_waiting(self, waiting, seconds):
        """Say once that the workers cannot keep up, and how many could: after three lines, the first apart.

        Workers that are always busy give `workers` batches in the time that one of them needs for a batch; without
        workers the waiting is that time.
        """
        self.waits.append((waiting, seconds))
        if len(self.waits) != 3:
            return
        waited, whole = np.sum(self.waits[1:], 0)
        workers = self.config.data.workers
        if waited > PATIENCE * whole:
            busy = workers * whole if workers else waited
            enough = max(math.ceil(1.1 * busy / (whole - waited)), workers + 1)
            logger.warning(
                f"{waited / whole:.0%} of the time is spent waiting for data: data.workers={enough} a process would be "
                f"enough (now {workers}), if there are as many cores; data.cache=FOLDER makes each faster"
            )


def memory_mb(device):
    """Peak memory of this process so far: on the GPU, or resident on the CPU, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak // (2**20 if sys.platform == "darwin" else 1024)


def crosses(done, period):
    """Whether step `done`, counted from 1, is the first to reach a multiple of a period of any length; never for 0."""
    return period > 0 and int((done + 1e-6) / period) > int((done - 1 + 1e-6) / period)


def place_in_epoch(step, steps_per_epoch):
    """Epoch in which a step's first image lies, its place in it, and how many steps begin in it, counted from 1."""
    epoch = int((step - 1 + 1e-6) / steps_per_epoch)
    first, following = (math.ceil(number * steps_per_epoch - 1e-6) for number in (epoch, epoch + 1))
    return epoch + 1, step - first, following - first
