"""Measure a config's speed and memory on this machine: one table.

python -m tools.benchmark CONFIG.py [key=value ...] [--batch N] [--rounds N] [--json OUT]
python -m tools.benchmark CONFIG.py [key=value ...] --gpu [--json OUT]      fp32 and bf16, eager and compiled, on a GPU

Steps are made of what train.py's loop calls, with the config's own optimizer, precision, averaging and checkpointing;
only --gpu compiles. OMP_NUM_THREADS=1 before it measures one thread of the CPU.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import platform
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from data import Detection3D, StepBatches, build_dataset, change_colours, collate, loading
from engine.guard import Guard, start_accelerator
from engine.optimizer import make_optimizer, set_lr
from losses import compute_losses, weighted_sum
from model import Detector, checkpoint_backbone
from scene.frames import Frame, UserError, check_writable, make_labels, whole_view
from scene.geometry import clip_boxes, project_boxes
from targets import assign

CAR = (3.9, 1.53, 1.63)  # mean l, h, w of KITTI's, m
OBJECTS = 8  # per image
VARIANTS = tuple(itertools.product(("no", "bf16"), (False, True)))  # precision, compiled


def scene(rng, objects, width, height, classes):
    """K (3, 3) of a KITTI-like camera, and `Labels` of so many objects on the ground before it, all in view."""
    K = np.array([[0.58 * width, 0, width / 2], [0, 0.58 * width, 0.46 * height], [0, 0, 1]])
    depth = rng.uniform(6, 60, objects)
    center = np.stack([rng.uniform(-0.64, 0.64, objects) * depth, rng.uniform(0.5, 1.2, objects), depth], 1)
    size, yaw = rng.uniform(0.9, 1.1, (objects, 3)) * CAR, rng.uniform(-np.pi, np.pi, objects)
    box = clip_boxes(project_boxes(center, size, yaw, K)[0], width, height)
    return K, make_labels(rng.choice(classes, objects), box, size, center, yaw, np.zeros(objects), np.zeros(objects))


def make_batch(config, images, objects, device):
    """A batch of random pictures with so many objects each."""
    rng, (height, width) = np.random.default_rng(0), config.model.size
    data, samples = Detection3D([], config.model, config.data), []
    for _ in range(images):
        frame = Frame("", Path(), *scene(rng, objects, width, height, config.model.classes))
        sample = data.sample_from(frame, whole_view(width, height, (height, width)))
        sample["image"] = torch.from_numpy(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        sample["index"] = torch.tensor(0)
        if config.data.colour:
            sample |= {"colour": torch.eye(3, 4), "covered": torch.tensor([0, 0, width, height])}
        samples.append(sample)
    return send_to_device(collate(samples), device)


def make_net(config, device):
    """The config's `Detector` in training mode, with priors of these scenes, so that no data set is needed."""
    classes, levels = len(config.model.classes), len(config.model.strides)
    priors = {"size_prior": (CAR,) * classes, "depth_mean": (30.0,) * levels, "depth_std": (15.0,) * levels}
    return Detector(dataclasses.replace(config.model, pretrained=False, **priors)).to(device)


class Step:
    """One training step on one batch, with the pieces of train.py; its parts can be called one by one, in order."""

    def __init__(self, config, accelerator, batch):
        options, self.config, self.accelerator, self.batch = config.train, config, accelerator, batch
        self.net = make_net(config, accelerator.device)
        self.assign, self.compute_losses = assign, compute_losses
        self.model, self.optimizer = accelerator.prepare(self.net, make_optimizer(self.net, options))
        self.average = ModelEmaV3(self.net, decay=options.ema, use_warmup=True)
        if options.checkpoint_backbone:
            checkpoint_backbone(self.net)
        self.parts = (self.forward, self.targets_losses, self.backward, self.optimizer_and_average)
        self.guard = Guard(accelerator, self.net, self.optimizer, options)
        self.guard.look = 8  # as on a GPU, of which this is a step between two looks

    def compile(self):
        self.net.compile(fullgraph=True)
        self.assign = torch.compile(assign, fullgraph=True)
        self.compute_losses = torch.compile(compute_losses, fullgraph=True)

    def forward(self):
        set_lr(self.optimizer, 1e-6)  # the pictures are noise
        self.logits, self.raw = self.model(change_colours(self.batch), self.batch["K"])

    def targets_losses(self):
        targets, weights = self.assign(self.batch, self.config.model), self.config.loss
        positives = self.accelerator.reduce(targets.positive.sum().float(), "mean").clamp(min=1)
        outputs = (self.net, self.logits, self.raw)
        losses = self.compute_losses(*outputs, targets, self.batch, weights, positives, best=True)
        self.loss = self.guard.watch(losses, weighted_sum(losses, weights), self.logits, self.raw)

    def backward(self):
        self.accelerator.backward(self.loss)

    def optimizer_and_average(self):
        self.guard.judge(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.net, step=1)
        self.guard.verdict(1, "")
        self.guard.rows.clear()  # what the log would read

    def __call__(self):
        for part in self.parts:
            part()


def interleave(tasks, rounds, device):
    """Seconds of each task {name: (rounds,)}, in turn, so that a busy machine slows all alike, after one to warm up."""
    seconds = {name: np.zeros(rounds + 1) for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            seconds[name][turn] = time_of(task, device)
    return {name: values[1:] for name, values in seconds.items()}


def time_of(task, device):
    """Seconds that a task takes, with what it leaves to a GPU."""
    began = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_steps(step, rounds):
    """Training steps, without their data, and prediction of the same images."""
    net, batch, device = step.net, step.batch, step.accelerator.device
    tasks = {part.__name__: part for part in step.parts}
    seconds = interleave({**tasks, "whole_step": step}, rounds, device)
    net.eval()
    with torch.no_grad(), step.accelerator.autocast():
        seconds |= interleave({"predict": lambda: net.detect(batch["image"], batch["K"])}, rounds, device)
    net.train()
    numbers = {f"{name}_s": float(np.median(values)) for name, values in seconds.items()}
    numbers["train_images_per_s"] = len(batch["image"]) / numbers["whole_step_s"]
    numbers["predict_images_per_s"] = len(batch["image"]) / numbers["predict_s"]
    if device.type == "cuda":
        numbers["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return numbers


def measure_data(step, data, rounds):
    """Share of the time that steps wait for the loader's workers, and what one worker reads a second."""
    device, workers = step.accelerator.device, step.config.data.workers
    order = StepBatches(len(data), len(step.batch["image"]), 0, 1, 0, 0, rounds + 2)
    waits = np.zeros(rounds + 2)
    with loading(data, order, workers, device) as batches:
        for number in range(rounds + 2):
            waiting = time.perf_counter()
            if number == 2:  # the workers have started, and the step is warm
                began = waiting
            step.batch = send_to_device(next(batches), device, non_blocking=True)
            waits[number] = time.perf_counter() - waiting
            step()
        share = waits[2:].sum() / (time.perf_counter() - began)
    count = min(40, len(data))
    read = min(time_of(lambda: [data[(0, i)] for i in range(count)], device) for _ in range(rounds + 1))
    return {"data_wait_share": float(share), "loader_images_per_s_per_worker": count / read}


def measure(config, images, rounds):
    """Everything as a dict; where the config's data is missing, stderr says so and the dict has none of it."""
    accelerator = start_accelerator(config.train)
    step = Step(config, accelerator, make_batch(config, images, OBJECTS, accelerator.device))
    cuda = accelerator.device.type == "cuda"
    numbers = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "input": f"{images}x3x{config.model.size[0]}x{config.model.size[1]}",
        "job": f"{config.model.backbone}, {config.train.optimizer}, mixed precision: {config.train.mixed_precision}",
    }
    numbers |= measure_steps(step, rounds)
    try:
        data = build_dataset(config, training=True)
    except UserError as error:
        print(f"the loader is not measured: {error}", file=sys.stderr)
        return numbers
    return numbers | measure_data(step, data, rounds)


def measure_variants(config, images, steps, variants=VARIANTS):
    """{variant: its numbers}, or its "error"; each in a process of its own, as compiled code and memory are."""
    table = {}
    for precision, compiled in variants:
        name = f"{'fp32' if precision == 'no' else precision} {'compiled' if compiled else 'eager'}"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            job = pool.submit(measure_variant, config, images, steps, precision, compiled)
        if error := job.exception():
            traceback.print_exception(error)
            table[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        else:
            table[name] = job.result()
    return table


def measure_variant(config, images, steps, precision, compiled):
    """Numbers of a whole step; None for what only CUDA tells.

    FLOPs are those of forward and backward, counted before compilation, with what checkpointing computes again. fp32 is
    as torch has it: convolutions may use TF32.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, mixed_precision=precision))
    accelerator = start_accelerator(config.train)
    cuda = accelerator.device.type == "cuda"
    step = Step(config, accelerator, make_batch(config, images, OBJECTS, accelerator.device))
    with FlopCounterMode(display=False) as flops:
        for part in step.parts[:3]:
            part()
    step.optimizer_and_average()
    if compiled:
        step.compile()
    for _ in range(3):  # compiles, and chooses algorithms
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = time_of(lambda: [step() for _ in range(steps)], accelerator.device) / steps  # the host runs ahead
    return {
        "images_per_s": images / seconds,
        "step_ms": 1e3 * seconds,
        "gflop_per_image": flops.get_total_flops() / images / 1e9,
        "tflop_per_s": flops.get_total_flops() / seconds / 1e12,
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }


def show(numbers, path=None):
    """Print {name: value}, first a "table" {row: {column: number}} where there is one, and write all to a JSON file."""
    rows = numbers.get("table", {})
    columns = list(dict.fromkeys(column for row in rows.values() for column in row if column != "error"))
    if rows:
        print(" " * 26 + "".join(f"{column:>17}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<26}" + (row.get("error") or "".join(f"{text_of(row[column]):>17}" for column in columns)))
    for name, value in numbers.items():
        if name != "table":
            print(f"{name:<44}{text_of(value)}")
    if path:
        Path(path).write_text(json.dumps(numbers, indent=1))


def text_of(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments=None):
    """Command line entry. Returns 0, or 2 after one sentence for an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a Python run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", action="store_true", help="compare precisions and compilation on a GPU")
    parser.add_argument("--batch", type=int, help="images (default: 2, with --gpu the config's)")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions after one that warms up, without --gpu")
    parser.add_argument("--json", help="also write the numbers there")
    options = parser.parse_intermixed_args(arguments)
    try:
        check_writable(options.json)
        config = load_config(options.config, options.overrides)
        default = config.train.batch_size if options.gpu else 2
        images = default if options.batch is None else options.batch
        if min(images, options.rounds) < 1:
            raise UserError(f"--batch {images} --rounds {options.rounds}: expected at least 1")
        if options.gpu and not torch.cuda.is_available():
            raise UserError("--gpu: torch sees no CUDA GPU here")
        if options.gpu:
            numbers = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "images": images}
            numbers["table"] = measure_variants(config, images, 50)
        else:
            numbers = measure(config, images, options.rounds)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(numbers, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
