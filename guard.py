"""What keeps a run from going on broken: launched processes that join, signals, steps that are not finite, a second run in a folder.

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
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError
from safetensors.torch import save_file

from data import UserError, usable_cores

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger("deep3d")
REPLAY, REPLAY_WEIGHTS = "nonfinite.json", "nonfinite.safetensors"
OVERFLOWS = 40  # of fp16 in a row that are too many: its scale of 2^16 is then far below 1
TWICE = 1.0  # s: a launcher forwards Ctrl-C to processes that had it from the terminal already; later ones are meant


def start_accelerator(precision="no", accumulate=1, timeout=10.0, **options):
    """`Accelerator` of as many processes as were launched, which give up after `timeout` minutes of waiting for one another.

    Without a GPU the processes here share all cores, where accelerate launch would leave one thread to each; OMP_NUM_THREADS is kept
    where a user set it. Raises ValueError when the processes did not join: each would train alone, and write over the others.
    """
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
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
        raise ValueError("train.mixed_precision=fp16 needs a GPU: Accelerate would silently compute in fp32; bf16 works on a CPU")
    if accelerator.device.type == "cpu" and ("OMP_NUM_THREADS" not in os.environ or (launched() and os.environ["OMP_NUM_THREADS"] == "1")):
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
        self.out, self.main, self.saving, self.interrupted, self.before, self._received = Path(out), main, False, 0.0, {}, ""
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
        log.info(f"stopped by {self.received or 'a signal to another process'}{', saved' * self.saving}; the same command goes on")
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
        self.accelerator, self.net, self.optimizer, self.window, self.signals = accelerator, net, optimizer, window, signals
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
        for output in outputs:
            output.register_hook(lambda gradient: seen.append(torch.where(torch.isfinite(gradient).all(), 0.0, math.nan)))
        self.parts.append(({**{name: value.detach() for name, value in losses.items()}, "loss": loss.detach()}, seen))
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    def step(self, step, norm):
        """Step the optimizer, unless the gradient's norm (equal on all processes) is not finite; BatchNorm's statistics stay then too."""
        broken = ~torch.isfinite(norm)
        rows = [{**values, "gradient": sum(seen)} for values, seen in self.parts]
        if self.accelerator.scaler:  # fp16's scaler leaves such a step out itself, and must see it to lower its scale, at first often
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
        return asked > 0, bad_steps >= (max(self.max_bad_steps, OVERFLOWS) if self.accelerator.scaler else self.max_bad_steps)


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

    config: a dict; reports: of `logbook.report_broken`; done: the last step.
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
        f"{config['train']['max_bad_steps']} steps in a row had no finite gradient, the last one is step {done}; "
        f"the first is step {report['step'] + 1}: {', '.join(report['losses']) or 'gradient'} on {who}, "
        f"frames {' '.join(report['frames'])}; to replay it: python -m tools.replay {Path(out) / REPLAY}"
    )


def write_replay(out, config, model, entry):
    """Write nonfinite.json and the weights beside it: all that tools/replay.py needs to run a broken batch again.

    entry: step, process, losses {name: value}, frames, batches [[[epoch, index], ...], ...]. Returns the JSON's path; raises UserError.
    """
    out = Path(out)
    try:
        save_file({name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}, out / REPLAY_WEIGHTS)
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
