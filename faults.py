"""What stops or mends a run: signals, steps whose gradient is not finite, a second run in the same folder.

Nothing here waits for the device in a step that goes well, except before an optimizer that cannot leave a step out by itself (all but
timm's adam and adamw).
"""

import collections
import fcntl
import json
import logging
import math
import os
import signal
import socket
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

log = logging.getLogger("deep3d")
REPLAY, REPLAY_WEIGHTS = "nonfinite.json", "nonfinite.safetensors"
TWICE = 1.0  # s: a launcher forwards Ctrl-C to processes that had it from the terminal already; later ones are meant


class Signals:
    """While this context lasts, SIGTERM, SIGUSR1 and SIGINT ask for a stop after the step; a second SIGINT stops at once.

    `received` is the name of the first signal, or empty. Only the main thread can be asked.
    """

    def __init__(self):
        self.received, self.interrupted, self.before = "", 0.0, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if number == signal.SIGINT:
            if self.interrupted and time.monotonic() - self.interrupted > TWICE:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or time.monotonic()
        self.received = self.received or signal.Signals(number).name


class Agreement:
    """A few numbers per step, equal on all processes, that reach the host LAG steps later on a GPU, so that nobody waits for it.

    All processes read the same numbers at the same step: what they decide from them, they decide alike.
    """

    LAG = 2

    def __init__(self, device):
        self.lag, self.pending = self.LAG if device.type == "cuda" else 0, collections.deque()

    def exchange(self, numbers):
        """Give the numbers (n,) of this step, get those of LAG steps ago as a list, or None in the first steps."""
        event = torch.cuda.Event() if self.lag else None
        self.pending.append((numbers.to("cpu", non_blocking=True), event))  # into pinned memory
        if event:
            event.record()
        if len(self.pending) <= self.lag:
            return None
        numbers, event = self.pending.popleft()
        if event:
            event.synchronize()
        return numbers.tolist()


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


def watch_gradient(*outputs):
    """A list that backward fills with 0, or NaN, for each output of the head whose gradient is finite, or not, on this process."""
    seen = []
    for output in outputs:
        output.register_hook(lambda gradient: seen.append(torch.where(torch.isfinite(gradient).all(), 0.0, math.nan)))
    return seen


def poison(loss):
    """A factor for the loss: 1, or NaN where the loss is not finite, so that every gradient on every process shows it."""
    return torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def step_unless(broken, optimizer):
    """Step a torch optimizer unless `broken` (device bool); moments and step count stay too. Does not wait with fused optimizers."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # what GradScaler relies on
        optimizer.found_inf = broken.float()
        optimizer.step()
        del optimizer.found_inf
    elif not broken:
        optimizer.step()


def weights_finite(*modules):
    """Whether all parameters and buffers are finite. Waits for the device."""
    tensors = [t for m in modules for t in m.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())


def write_replay(out, config, model, entry):
    """out/nonfinite.json and the weights beside it: all that `replay.py` needs to run a broken batch again.

    entry: step, process, losses {name: value}, frames, batches [[[epoch, index], ...], ...]. Returns the JSON's path; raises OSError.
    """
    out = Path(out)
    try:
        save_file({name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}, out / REPLAY_WEIGHTS)
    except SafetensorError as error:
        raise OSError(f"{out / REPLAY_WEIGHTS}: cannot write the weights of a broken step: {error}") from None
    entry = {**entry, "losses": {name: repr(value) for name, value in entry["losses"].items()}}  # JSON has no NaN
    record = {"replay": f"python replay.py {out / REPLAY}", **entry, "weights": REPLAY_WEIGHTS, "config": config}
    (out / REPLAY).write_text(json.dumps(record, indent=1))
    return out / REPLAY


def lock_folder(out):
    """Take out/.lock for the life of this process, which even SIGKILL ends. Returns the open file: keep it.

    A POSIX lock: forked workers do not inherit it. Raises ValueError naming the process that has it.
    """
    file = open(Path(out) / ".lock", "a+")  # noqa: SIM115  closing it would release the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f"{out} is being written by {file.read().strip() or 'another process'}; stop it or choose another out=") from None
    except OSError as error:
        log.warning(f"{out}: this file system has no locks ({error}): nothing will keep a second run out")
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
    file.flush()
    return file
