"""What a launched process does first: join the others, share the cores, and follow its launcher."""

import ctypes
import datetime
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


def start_accelerator(precision="no", accumulate=1, timeout=10.0, **options):
    """`Accelerator` of as many processes as were launched, which give up after `timeout` minutes of waiting for one another.

    Raises ValueError when they did not join: each would train alone, and write over the others.
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
    return accelerator


def use_cores(accelerator):
    """Without a GPU: all cores, shared among the processes here. accelerate launch would leave one thread to each.

    OMP_NUM_THREADS above 1 is taken as a wish and kept.
    """
    if accelerator.device.type == "cpu" and int(os.environ.get("OMP_NUM_THREADS", 1)) == 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def follow_launcher():
    """Have Linux send SIGTERM when the launcher dies; else a signal to it can leave its processes training on, or waiting, orphaned.

    Does nothing under other parents: a shell may end before its jobs.
    """
    try:
        launcher = os.getppid()
        command = Path(f"/proc/{launcher}/cmdline").read_bytes()
        if any(name in command for name in (b"accelerate", b"torchrun", b"torch.distributed")):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        gone = os.getppid() != launcher or (launcher == 1 and "TORCHELASTIC_RUN_ID" in os.environ and b"python" not in command)
    except (OSError, AttributeError):  # not Linux
        return
    if gone:  # while this process was importing
        sys.exit("the launcher is gone")
