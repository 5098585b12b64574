"""What keeps a run from going on broken: launched processes that join, signals, steps that are not finite, a second run in a folder.

And what a run says: console, train.log, log.jsonl in mmdetection's keys, trackers, and which steps were skipped.

Nothing here waits for the device in a step that goes well, except before an optimizer that cannot leave a step out by itself (all but
muon and timm's adam and adamw).
"""

import collections
import contextlib
import datetime
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file

from config import dataclasses_to_json, describe
from data import UserError, usable_cores

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger("deep3d")
REPLAY, REPLAY_WEIGHTS = "nonfinite.json", "nonfinite.safetensors"
OVERFLOWS = 40  # of fp16 in a row that are too many: its scale of 2^16 is then far below 1
TWICE = 1.0  # s: a launcher forwards Ctrl-C to processes that had it from the terminal already; later ones are meant


def start_accelerator(precision="no", accumulate=1, timeout=10.0, **options):
    """`Accelerator` of as many processes as were launched, which give up after `timeout` minutes of waiting for one another.

    Without a GPU the processes here share all cores, where accelerate launch would leave one thread to each; OMP_NUM_THREADS is kept
    where a user set it. Raises ValueError when the processes did not join: each would train alone, and write over the others.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", precision) and os.environ.get("RANK", "0") == "0":
        log.warning(
            f"accelerate launch asks for mixed precision {told}; train.mixed_precision={precision} is what counts"
        )
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            accumulate, sync_with_dataloader=False
        ),  # a number yields to environment
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=timeout))],
        **options,
    )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise ValueError(
            f"launched {asked} processes, but Accelerate joins only {accelerator.num_processes} (without GPUs: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N)"
        )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "train.mixed_precision=fp16 needs a GPU: Accelerate would silently compute in fp32; bf16 works on a CPU"
        )
    if accelerator.device.type == "cpu" and (
        "OMP_NUM_THREADS" not in os.environ or (launched() and os.environ["OMP_NUM_THREADS"] == "1")
    ):
        torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return accelerator


def launched():
    """Whether `accelerate launch` or torchrun started this process: both leave their marks in the environment."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ


class Stopped(Exception):
    """All processes were asked to stop, and what was done, if anything, is saved."""


class Signals:
    """While this context lasts, SIGTERM, SIGUSR1 and SIGINT ask for a stop after the step; a second SIGINT stops at once.

    Until `saving` is set there is nothing to save, and the first signal raises `Stopped` at once. `received` is what asked first, or
    empty; the end of the launcher asks too, else its processes would train on unseen. A `Stopped` that leaves the block has ended the
    run in order: the folder then holds STOPPED, since launchers hide exit codes.
    """

    NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __init__(self, out, main):
        self.out, self.main, self.saving, self.interrupted, self.before, self._received = (
            Path(out),
            main,
            False,
            0.0,
            {},
            "",
        )
        self.launcher = os.getppid() if launched() else None

    @property
    def received(self):
        if self.launcher not in (None, os.getppid()):
            self._received = self._received or "the end of the launcher"
        return self._received

    def __enter__(self):
        for name in self.NAMES:
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is not Stopped:
            return False
        log.info(
            f"stopped by {self.received or 'a signal to another process'}{', saved' * self.saving}; the same command goes on"
        )
        if self.main:
            (self.out / "STOPPED").write_text("")
        return True

    def handle(self, number, frame):
        if number == signal.SIGINT:
            if self.interrupted and time.monotonic() - self.interrupted > TWICE:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or time.monotonic()
        first, self._received = not self._received, self._received or signal.Signals(number).name
        if first and not self.saving:
            raise Stopped


class Guard:
    """What a training step needs so that a NaN, or a signal to one process, has the same effect on all.

    The loop calls, in this order: `mean` for the number of positives, `watch` for each loss, `step` for the optimizer, `verdict`.
    """

    LAG = 2  # steps after which a GPU's numbers are read, so that nobody waits for them

    def __init__(self, accelerator, net, optimizer, window, signals, max_bad_steps):
        self.accelerator, self.net, self.optimizer, self.window, self.signals = (
            accelerator,
            net,
            optimizer,
            window,
            signals,
        )
        self.max_bad_steps, self.lag = max_bad_steps, self.LAG if accelerator.device.type == "cuda" else 0
        self.statistics, self.bad_steps = Statistics(net), torch.zeros((), device=accelerator.device)  # in a row
        self.parts, self.pending = [], collections.deque()

    def mean(self, count):
        """Mean of a scalar over the processes, at least 1; a wish to stop travels along. Device tensor."""
        asked = torch.full_like(count, float(bool(self.signals.received)))
        count, self.asked = self.accelerator.reduce(torch.stack([count, asked]), "mean").unbind()
        return count.clamp(min=1)

    def watch(self, losses, loss, *outputs):
        """The loss to differentiate, NaN where it is not finite, so that every gradient on every process shows it.

        losses {name: scalar} and their weighted sum go into the log, and so does whether the gradient of an output was finite.
        """
        seen = []
        for output in (
            output for output in outputs if output.requires_grad
        ):  # all that a half of the head says may be frozen
            output.register_hook(
                lambda gradient: seen.append(torch.where(torch.isfinite(gradient).all(), 0.0, math.nan))
            )
        self.parts.append(({**{name: value.detach() for name, value in losses.items()}, "loss": loss.detach()}, seen))
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    def step(self, step, norm):
        """Step the optimizer, unless the gradient's norm (equal on all processes) is not finite; BatchNorm's statistics stay then too."""
        broken = ~torch.isfinite(norm)
        rows = [{**values, "gradient": sum(seen)} for values, seen in self.parts]
        if (
            self.accelerator.scaler
        ):  # fp16's scaler leaves such a step out itself, and must see it to lower its scale, at first often
            self.optimizer.step()
        else:
            step_unless(broken, self.optimizer.optimizer)
        self.statistics.settle(~broken)
        self.bad_steps = torch.where(broken, self.bad_steps + 1, 0)
        self.window.add(step, rows, norm)
        self.parts = []

    def verdict(self):
        """(whether a process was asked to stop, whether too many steps in a row were bad), LAG steps ago: the same on all processes."""
        numbers, event = torch.stack([self.asked, self.bad_steps]), torch.cuda.Event() if self.lag else None
        self.pending.append((numbers.to("cpu", non_blocking=True), event))  # into pinned memory
        if event:
            event.record()
        if len(self.pending) <= self.lag:
            return False, False
        numbers, event = self.pending.popleft()
        if event:
            event.synchronize()
        asked, bad_steps = numbers.tolist()
        return asked > 0, bad_steps >= (
            max(self.max_bad_steps, OVERFLOWS) if self.accelerator.scaler else self.max_bad_steps
        )


class Statistics:
    """The model's running statistics before a step, to undo those of a step that was not finite."""

    def __init__(self, model):
        kept = model.state_dict(keep_vars=True)
        self.tensors = [b for name, b in model.named_buffers() if name in kept and b.is_floating_point()]
        self.sizes = [b.numel() for b in self.tensors]
        self.before = self.flat()

    def flat(self):
        return torch.cat([b.flatten() for b in self.tensors]) if self.tensors else None

    def settle(self, fine):
        """Keep the statistics if `fine` (device bool), else put back those before the step."""
        if self.tensors:
            self.before = torch.where(fine, self.flat(), self.before)
            parts = self.before.split(self.sizes)
            torch._foreach_copy_(self.tensors, [p.view_as(b) for p, b in zip(parts, self.tensors, strict=True)])


def step_unless(broken, optimizer):
    """Step a torch optimizer unless `broken` (device bool); moments and step count stay too. Does not wait with fused optimizers."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # what GradScaler relies on
        optimizer.found_inf = broken.float()
        optimizer.step()
        del optimizer.found_inf
    elif not broken:
        optimizer.step()


def weights_finite(*modules):
    """Whether all floating-point weights and buffers are finite. Waits for the device once."""
    tensors = [t for module in modules for t in module.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())


def fail(out, config, accelerator, net, reports, done):
    """Leave what replays the first of the broken steps in a row, and end every process with the same FloatingPointError.

    config: a dict; reports: of `report_broken`; done: the last step.
    """
    by_step = {report["step"]: report for report in reversed(reports)}
    first = done - 1
    while first - 1 in by_step:
        first -= 1
    report = by_step[first]
    if accelerator.is_main_process:
        write_replay(out, config, net, report)
    accelerator.wait_for_everyone()
    who = "an unknown process" if report["process"] is None else f"process {report['process']}"
    raise FloatingPointError(
        f"{done - first} steps in a row had no finite gradient, the last one is step {done}; "
        f"the first is step {report['step'] + 1}: {', '.join(report['losses']) or 'gradient'} on {who}, "
        f"frames {' '.join(report['frames'])}; to replay it: python -m tools.replay {Path(out) / REPLAY}"
    )


def write_replay(out, config, model, entry):
    """Write nonfinite.json and the weights beside it: all that tools/replay.py needs to run a broken batch again.

    entry: step, process, losses {name: value}, frames, batches [[[epoch, index], ...], ...]. Returns the JSON's path; raises UserError.
    """
    out = Path(out)
    try:
        save_file(
            {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()},
            out / REPLAY_WEIGHTS,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out / REPLAY_WEIGHTS}: cannot write the weights of a broken step: {error}") from error
    entry = {**entry, "losses": {name: repr(value) for name, value in entry["losses"].items()}}  # JSON has no NaN
    record = {"replay": f"python -m tools.replay {out / REPLAY}", **entry, "weights": REPLAY_WEIGHTS, "config": config}
    (out / REPLAY).write_text(json.dumps(record, indent=1))
    return out / REPLAY


@contextlib.contextmanager
def lock_folder(out, main=True):
    """Hold out/.lock on the main process, which is free again however this process ends. Raises UserError naming the process that has it.

    A POSIX lock: forked workers do not inherit it.
    """
    if not main:
        yield
        return
    with open(Path(out) / ".lock", "a+") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{out} is being written by {holder}; stop it or choose another out=") from None
        except OSError as error:
            log.warning(f"{out}: this file system has no locks ({error}): nothing will keep a second run out")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        file.flush()
        yield


# ---- what a run says


def start_log(out, main):
    """Log lines to the console and out/train.log on the main process, nothing elsewhere."""
    handlers = (
        [logging.StreamHandler(sys.stdout), logging.FileHandler(out / "train.log")] if main else [logging.NullHandler()]
    )
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
        self.began, self.count = (
            (now, 0) if self.began is None else (self.began, self.count + 1)
        )  # the first step starts everything

    def rest(self):
        """What happened since the last tick was no step."""
        self.before = time.perf_counter()

    def seconds_left(self, steps):
        """Seconds that so many steps will take, evaluations and saves among them, as all of this process have but the first."""
        return (time.perf_counter() - self.began) / self.count * steps if self.count else self.time * steps

    def add(self, step, parts, norm):
        """One step: {name: device scalar} of its micro-steps, the weighted sum under 'loss', and the gradient norm."""
        means = (
            parts[0]
            if len(parts) == 1
            else {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        )
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
        table = accelerator.gather(table[None]).cpu().numpy().astype(float)  # (processes, steps, names)
        self.rows, self.steps, self.time, self.data_time = [], [], 0.0, 0.0
        self.waits.append(tuple(times))
        good = np.isfinite(table[0, :, -1])  # the norm is equal on all processes
        broken = [row for i in np.flatnonzero(~good) for row in name_broken(steps[i], names, table[:, i])]
        if not good.any():
            return {}, broken
        means = {name: table[:, good, n].mean().item() for n, name in enumerate(names) if name != "gradient"}
        return {"data_time": times[0], "time": times[1], **means}, broken

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


def name_broken(step, names, table):
    """Who made a step's gradient not finite: [(step, process, {name: value})], process None where no value (processes, names) tells."""
    own = [name not in ("loss", "grad_norm") for name in names]  # the sum says nothing new, the norm is everybody's
    found = []
    for process, row in enumerate(table):
        wrong = own & ~np.isfinite(row)
        found += [(step, process, {names[n]: row[n].item() for n in np.flatnonzero(wrong)})] if wrong.any() else []
    return found or [(step, None, {})]


def start_trackers(accelerator, out, config):
    """Tell the trackers of `log_with` the run's name, which is its folder's, and its config."""
    plain = {key: dataclasses_to_json(value) for key, (value, _) in describe(config).items()}
    flat = {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in plain.items()}
    accelerator.init_trackers(out.resolve().name, config=flat)


def find_tracker(name):
    """The `log_with` of an Accelerator. Raises ValueError when that package is not installed."""
    if name and name not in [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]:
        raise ValueError(
            f"log_with={name}: not installed; pip install {name}, or leave log_with empty (log.jsonl is written anyway)"
        )
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
    accelerator.log(
        {key: value for key, value in values.items() if isinstance(value, int | float)}, step=record["step"]
    )


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
        ranks = (
            range(world) if process is None else [process]
        )  # a gradient can break behind the head, where nobody looks
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
