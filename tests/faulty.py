"""train.py with faults put in: `accelerate launch tests/faulty.py FAULT [train.py's arguments]`, FAULT a JSON object or
a list of them.

{"what": "loss" | "gradient" | "camera" | "label" | "statistics" | "raise" | "kill" | "hang" | "signal" | "empty" |
"kill in save" | "signal in save" | "signal in evaluation" | "hang in evaluation" | "slow", "steps": [...], "rank": R}:
steps are counted from 1, as in the log; no rank means every rank.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
import train
from engine import checkpoint

faults = json.loads(sys.argv.pop(1))
rank, step = int(os.environ.get("RANK", 0)), 0
faults = [f for f in (faults if isinstance(faults, list) else [faults]) if f.get("rank") in (None, rank)]
normal_losses, normal_send, normal_lr = train.compute_losses, train.send_to_device, train.lr_at
normal_publish, normal_save = checkpoint.publish, train.save_checkpoint
normal_source = evaluate.to_source


def struck(what):
    return any(fault["what"] == what and step in fault["steps"] for fault in faults)


def lr_at(done, *rest):
    global step
    step = done + 1
    if any(fault["what"] == "slow" for fault in faults):
        time.sleep(0.3)
    if struck("raise"):
        raise ValueError("a label that nobody expected")
    if struck("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if struck("hang"):
        if "RANK" in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else the launcher kills it only after half a minute
        time.sleep(600)
    if struck("signal"):
        os.kill(os.getpid(), signal.SIGTERM)
    return normal_lr(done, *rest)


def send_to_device(batch, *rest, **options):
    batch = normal_send(batch, *rest, **options)
    if struck("camera"):
        batch["K"][0, 1, 1] = math.inf
    if struck("label"):
        batch["center"][batch["valid"]] = math.inf
    if struck("empty"):
        batch["valid"][:] = False
    return batch


def compute_losses(model, logits, raw, *rest):
    if struck("gradient"):
        raw.register_hook(lambda gradient: gradient * math.nan)
    losses = normal_losses(model, logits, raw, *rest)
    if struck("loss"):
        losses["loss_size"] = losses["loss_size"] * math.nan
    return losses


def publish(aside, final, *rest):
    if struck("kill in save"):
        (aside / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    if struck("signal in save"):
        os.kill(os.getpid(), signal.SIGTERM)
    normal_publish(aside, final, *rest)


def to_source(*arguments):
    if struck("signal in evaluation"):
        os.kill(os.getpid(), signal.SIGTERM)
    if struck("hang in evaluation"):
        time.sleep(600)
    return normal_source(*arguments)


def save_checkpoint(accelerator, config, progress, modules):
    if struck("statistics"):
        next(b for name, b in modules[1].named_buffers() if name.endswith("running_mean")).fill_(math.nan)
    normal_save(accelerator, config, progress, modules)


train.lr_at, train.send_to_device, train.compute_losses = lr_at, send_to_device, compute_losses
checkpoint.publish, evaluate.to_source, train.save_checkpoint = publish, to_source, save_checkpoint
if __name__ == "__main__":
    train.main()
