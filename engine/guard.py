"""What keeps a run from going on broken: launched processes that join, one run a folder, signals, and steps that are
not finite.

Nothing here waits for the device in a step that goes well, but every eighth on a GPU, and before an optimizer that
cannot leave a step out by itself (all but muon and timm's adam and adamw).
"""

import contextlib
import datetime
import logging
import math
import os
import signal
import socket
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from scene.frames import UserError, usable_cores

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("deep3d")
LOOK = {"cuda": 8}  # by device, else 1: steps between two looks at its numbers, as nobody waits for it in between
OVERFLOWS = 40  # of fp16 in a row that are too many: its scale of 2^16 is then far below 1
SPLITTING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # ACCELERATE_USE_... of the launcher
OVERRIDDEN = dict(mixed_precision="MIXED_PRECISION", compile="DYNAMO_BACKEND", accumulate="GRADIENT_ACCUMULATION_STEPS")
TWICE = 1.0  # s: a launcher forwards Ctrl-C to processes that had it from the terminal already; later ones are meant


def start_accelerator(options):
    """`Accelerator` of as many processes as were launched, for a `TrainConfig`'s precision, accumulation and timeout.

    Without a GPU the processes here share all cores, where accelerate launch would leave one thread to each;
    OMP_NUM_THREADS is kept where a user set it. Raises UserError when the processes did not join: each would train
    alone, and write over the others.
    """
    precision = options.mixed_precision
    heed_launcher(options)
    accelerator = Accelerator(
        mixed_precision=precision,
        dynamo_backend="no",  # train.compile compiles more
        # as a number it would yield to the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(options.accumulate, sync_with_dataloader=False),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=options.timeout))],
    )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        advice = "without GPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        raise UserError(f"launched {asked} processes, but Accelerate joins only {accelerator.num_processes} ({advice})")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("train.mixed_precision=fp16 needs a GPU: Accelerate would compute in fp32; bf16 works on a CPU")
    threads = os.environ.get("OMP_NUM_THREADS")
    if accelerator.device.type == "cpu" and (threads is None or (launched() and threads == "1")):
        torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return accelerator


def heed_launcher(options):
    """Say which settings of `accelerate launch` yield to a `TrainConfig`. Raises UserError for what cannot be done."""
    for name in SPLITTING:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            advice = "launch with --multi_gpu, or run accelerate config anew"
            raise UserError(f"accelerate launch asks for {name}, but each process holds the whole model here; {advice}")
    for key, name in OVERRIDDEN.items():
        wish, value = os.environ.get(f"ACCELERATE_{name}", "no"), getattr(options, key)
        if wish.lower() not in ("no", "1", str(value)) and os.environ.get("RANK", "0") == "0":
            logger.warning(f"accelerate launch asks for {name}={wish}; train.{key}={value} is what counts")


def launched():
    """Whether `accelerate launch` or torchrun started this process: both leave their marks in the environment."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ


@contextlib.contextmanager
def lock_folder(out, main=True):
    """Hold out/.lock on the main process until it ends, however it ends. Raises UserError naming who has it.

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
            logger.warning(f"{out}: this file system has no locks ({error}): nothing will keep a second run out")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        file.flush()
        yield


class Stopped(BaseException):  # as KeyboardInterrupt is: nobody who catches errors is to keep it
    """A signal ended the run; all that was done is saved."""


class Signals:
    """While this context lasts, what SIGTERM, SIGUSR1 and SIGINT do.

    Between `defer` and `deliver` they are only `received`, for the loop to save after its step; a second SIGINT
    interrupts. Else nothing new is to be saved, and they end the process at once: `Stopped`, or for SIGINT
    KeyboardInterrupt. The end of the launcher counts as a signal, too: its processes would train on unseen.
    """

    NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __init__(self):
        self.name = ""  # of the first signal
        self.waiting = False  # for the end of a step
        self.interrupted = 0.0
        self.handlers = {}  # as they were before
        self.launcher = os.getppid() if launched() else None

    @property
    def received(self):
        """What asked first, or empty."""
        if self.launcher not in (None, os.getppid()):
            self.name = self.name or "the end of the launcher"
        return self.name

    def defer(self):
        """From here on signals wait for the loop."""
        self.waiting = True

    def deliver(self):
        """From here on they do not; one that has waited ends the run now."""
        self.waiting = False
        if self.received:
            raise Stopped

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows no other one to set handlers
            for number in (getattr(signal, name, None) for name in self.NAMES):
                if number:  # Windows has no SIGUSR1
                    self.handlers[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        """The handler of all of them."""
        if number == signal.SIGINT:
            if not self.waiting or (self.interrupted and time.monotonic() - self.interrupted > TWICE):
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or time.monotonic()
        self.name = self.name or signal.Signals(number).name
        if not self.waiting:
            raise Stopped


class Guard:
    """Gives a NaN the same effect on all processes, and keeps what each step was until it is read.

    The loop calls `watch` for each part of a step, `judge` before the optimizer, `verdict` behind it, and `read` for a
    log line.
    """

    def __init__(self, accelerator, net, optimizer, options):
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.statistics = Statistics(net)
        self.patience = max(options.max_bad_steps, OVERFLOWS if accelerator.scaler else 0)  # bad steps in a row
        self.look = LOOK.get(accelerator.device.type, 1)
        self.bad_steps = torch.zeros((), device=accelerator.device)  # in a row, up to now
        self.most_bad_steps = torch.zeros((), device=accelerator.device)  # in a row, ever
        self.parts = []  # of this step: (losses, flags of the gradients)
        self.rows = []  # of the steps since the last reading: {name: device scalar}

    def watch(self, losses, loss, *outputs):
        """The loss to differentiate, NaN where it is not finite, so that every gradient on every process shows it.

        losses {name: scalar} and their weighted sum go into the log, and so does whether the gradient of each output
        was finite.
        """
        flags = []
        for output in outputs:
            if output.requires_grad:  # all that a half of the head says may be frozen
                output.register_hook(
                    lambda gradient: flags.append(torch.where(torch.isfinite(gradient).all(), 0.0, math.nan))
                )
        values = {name: value.detach() for name, value in losses.items()}
        self.parts.append(({**values, "loss": loss.detach()}, flags))
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    def judge(self, norm):
        """Have the optimizer's next step do nothing where the gradient's norm, equal on all processes, is not finite.

        BatchNorm's statistics are those of before that step, too.
        """
        broken = ~torch.isfinite(norm)
        self.statistics.update(~broken)
        self.bad_steps = torch.where(broken, self.bad_steps + 1, 0)
        self.most_bad_steps = torch.maximum(self.most_bad_steps, self.bad_steps)
        rows = [{**values, "gradient": sum(flags)} for values, flags in self.parts]
        means = rows[0] if len(rows) == 1 else {k: torch.stack([row[k] for row in rows]).mean() for k in rows[0]}
        self.rows.append({**means, "grad_norm": norm})
        self.parts = []
        optimizer = self.optimizer.optimizer  # torch's own, which Accelerate wraps
        if self.accelerator.scaler:
            return  # fp16's leaves such a step out itself, and must see it to lower its scale, at first often
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = broken.float()  # as GradScaler tells it: moments and step count stay as well
        elif broken:
            self.optimizer.zero_grad()  # what has no gradient is not stepped

    def verdict(self, done, received):
        """'stop' once a process was signalled, 'broken' after too many bad steps in a row, else ''; the same on all."""
        if done % self.look:
            return ""
        if received:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            return "stop"
        return "broken" if self.most_bad_steps >= self.patience else ""

    def read(self):
        """The steps since the last reading: names, grad_norm last, and a table (processes, steps, names), float64."""
        names = list(self.rows[0])
        table = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.rows])
        self.rows = []
        return names, self.accelerator.gather(table[None]).cpu().numpy().astype(float)


class Statistics:
    """The model's running statistics before a step, to undo those of a step that was not finite."""

    def __init__(self, model):
        saved = model.state_dict(keep_vars=True)
        self.tensors = [b for name, b in model.named_buffers() if name in saved and b.is_floating_point()]
        self.sizes = [b.numel() for b in self.tensors]
        self.before = self.flat()

    def flat(self):
        """All of them in one tensor, None without any."""
        return torch.cat([b.flatten() for b in self.tensors]) if self.tensors else None

    def update(self, fine):
        """Keep the statistics if `fine` (device bool), else put back those before the step."""
        if self.tensors:
            self.before = torch.where(fine, self.flat(), self.before)
            parts = self.before.split(self.sizes)
            torch._foreach_copy_(self.tensors, [p.view_as(b) for p, b in zip(parts, self.tensors, strict=True)])
