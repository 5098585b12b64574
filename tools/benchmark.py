"""Measure a config's speed and memory on this machine: one table, ratios taken in the same run.

python -m tools.benchmark CONFIG.py [key=value ...] [--batch N] [--rounds N] [--json OUT]
python -m tools.benchmark CONFIG.py [key=value ...] --memory    what a step holds, in MiB by module
python -m tools.benchmark CONFIG.py [key=value ...] --gpu [--peak-tflops N] [--json OUT]    eager, compiled, fp32, bf16: all a GPU can tell
python -m tools.benchmark --data N      reading N invented frames of 8 objects: the index, the start, the memory of two processes

Steps are train.py's, with the config's own optimizer, precision, averaging and checkpointing; only --gpu compiles. On a machine that does
other work (load_average_before), trust the ratios, not the times.
OMP_NUM_THREADS=1 before it measures one thread of the CPU.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import multiprocessing
import os
import platform
import re
import sys
import tarfile
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from data import (
    DataConfig,
    Detection3D,
    FrameCache,
    Source,
    StepBatches,
    UserError,
    build_dataset,
    change_colours,
    check_writable,
    collate,
    loading,
    make_loader,
    usable_cores,
    user_errors,
)
from engine.guard import Guard, Signals, Window, start_accelerator
from engine.optimizer import Average, find_optimizer, make_optimizer, set_lr
from evaluate import compute_metrics
from formats import jsonl
from formats.index import Frames
from losses import compute_losses, count_positives, weighted_sum
from model import Detector, ModelConfig, checkpoint_backbone
from scene.frames import Frame, load_image, make_labels, whole_view
from scene.geometry import clip_boxes, project_boxes
from targets import assign, measure_priors

OBJECTS = (8, 30, 100)  # per image
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}  # bytes; read by glibc when a process starts
MODULES = {
    "backbone": "backbone",
    "fpn": "fpn",
    "class_tower": "towers",
    "box_tower": "towers",
    "class_predictor": "predictors",
    "box_predictor": "predictors",
}  # of a Detector, in rows of a table; the rest is "other"
CAR = (3.9, 1.53, 1.63)  # mean l, h, w of KITTI's, m
VARIANTS = tuple(
    itertools.product(("no", "bf16"), (False, True), (False, True))
)  # precision, compiled, weights in channels_last
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "unique",
    "is_nonzero",
)  # the host waits for their results on a GPU


def scene(rng, objects, width, height, classes):
    """K (3, 3) of a KITTI-like camera, and `Labels` of so many objects spread over the ground before it, all in view."""
    K = np.array([[0.58 * width, 0, width / 2], [0, 0.58 * width, 0.46 * height], [0, 0, 1]])
    depth = rng.uniform(6, 60, objects)
    center = np.stack([rng.uniform(-0.64, 0.64, objects) * depth, rng.uniform(0.5, 1.2, objects), depth], 1)
    size, yaw = rng.uniform(0.9, 1.1, (objects, 3)) * CAR, rng.uniform(-np.pi, np.pi, objects)
    box = clip_boxes(project_boxes(center, size, yaw, K)[0], width, height)
    return K, make_labels(rng.choice(classes, objects), box, size, center, yaw, np.zeros(objects), np.zeros(objects))


def make_batch(config, images, objects, device):
    """A batch of random pictures with so many objects each."""
    rng, (height, width) = np.random.default_rng(0), config.model.size
    more = {"velocity": config.model.velocity, "attributes": config.model.attribute_names}
    data, samples = Detection3D([], config.model.classes, (height, width), config.data, training=False, **more), []
    for _ in range(images):
        frame = Frame("", Path(), *scene(rng, objects, width, height, config.model.classes))
        sample = data.sample_from(frame, whole_view(width, height, (height, width)))
        pixels, zero = torch.from_numpy(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)), torch.tensor(0)
        colour = (
            {"colour": torch.eye(3, 4), "covered": torch.tensor([0, 0, width, height])} if config.data.colour else {}
        )
        samples.append({**sample, "image": pixels, "index": zero, "skipped": zero, **colour})
    return send_to_device(collate(samples), device)


def make_net(config, device):
    """The config's `Detector` in training mode, with priors of these scenes, so that no data set is needed."""
    classes, levels = len(config.model.classes), len(config.model.strides)
    priors = {"size_prior": (CAR,) * classes, "depth_mean": (30.0,) * levels, "depth_std": (15.0,) * levels}
    return Detector(dataclasses.replace(config.model, pretrained=False, **priors)).to(device)


class Step:
    """One training step on one batch, as in train.py and with its pieces; its parts can be called one by one, in order."""

    def __init__(self, config, accelerator, batch, layout=torch.preserve_format):
        options, self.config, self.accelerator, self.batch = config.train, config, accelerator, batch
        self.net = make_net(config, accelerator.device).to(memory_format=layout)
        self.find_targets, self.find_losses = assign, compute_losses
        self.model, self.optimizer = accelerator.prepare(self.net, make_optimizer(self.net, options))
        self.average = Average(self.net, decay=options.ema, use_warmup=True) if options.ema else None
        if options.checkpoint_backbone:
            checkpoint_backbone(self.net)
        self.parts = (self.forward, self.targets_losses, self.backward, self.optimizer_and_average)
        self.guard = Guard(accelerator, self.net, self.optimizer, Window(), Signals("", False), options.max_bad_steps)

    def compile(self):
        self.net.compile(fullgraph=True)
        self.find_targets, self.find_losses = (
            torch.compile(function, fullgraph=True) for function in (assign, compute_losses)
        )

    def forward(self):
        set_lr(self.optimizer, 1e-6)  # the pictures are noise
        self.logits, self.raw = self.model(change_colours(self.batch), self.batch["K"])

    def targets_losses(self):
        targets = self.find_targets(self.batch, self.config.model)
        positives = self.guard.mean(count_positives(targets))
        losses = self.find_losses(
            self.net, self.logits, self.raw, targets, self.batch, self.config.loss, positives, best=True
        )
        self.loss = self.guard.watch(losses, weighted_sum(losses, self.config.loss), self.logits, self.raw)

    def backward(self):
        self.accelerator.backward(self.loss)

    def optimizer_and_average(self):
        self.guard.step(0, self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.clip))
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.net, step=1)
        self.guard.verdict()

    def __call__(self):
        for part in self.parts:
            part()


def backbone_pass(net, batch, accelerator):
    """The images as the backbone takes them, and a function that runs forward and backward of the backbone alone on them."""
    x = (batch["image"].permute(0, 3, 1, 2).float() - 114) / 58

    def run():
        net.backbone.zero_grad()
        with accelerator.autocast():
            loss = sum(feature.float().sum() for feature in net.backbone(x))
        loss.backward()

    return x, run


def interleave(tasks, rounds, device):
    """Seconds of each task {name: (rounds,)}, run in turn so that a busy machine slows all alike; the first round is dropped."""
    seconds = {name: np.zeros(rounds + 1) for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name][turn] = time.perf_counter() - began
    return {name: values[1:] for name, values in seconds.items()}


class Count(TorchDispatchMode):
    """Operators that are called, by name; for how many of them the host `waits` on a GPU. on_host: tensors that are not on that GPU."""

    def __init__(self, on_host=()):
        super().__init__()
        self.calls, self.waits, self.on_host = collections.Counter(), 0, {id(tensor) for tensor in on_host}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        boolean = name in ("index", "index_put_") and any(getattr(i, "dtype", None) == torch.bool for i in args[1])
        self.calls[name] += 1
        self.waits += (name in WAITING or boolean) and id(args[0]) not in self.on_host
        return func(*args, **(kwargs or {}))


def measure_steps(step, rounds):
    """Training, without its data, and prediction against the bare backbone; a train_step ends with its backward, a whole_step does not."""
    net, batch, device = step.net, step.batch, step.accelerator.device
    x, backbone = backbone_pass(net, batch, step.accelerator)
    step()  # moments exist from here on
    on_host = [state["step"] for state in step.optimizer.state.values() if "step" in state]
    parts, counts = {part.__name__: part for part in step.parts}, {}
    for name, part in parts.items():
        with Count(on_host) as counts[name]:
            part()
    seconds = interleave({**parts, "whole_step": step, "backbone": backbone}, rounds, device)
    net.eval()
    with torch.no_grad(), step.accelerator.autocast():
        predict = interleave(
            {"predict": lambda: net.detect(batch["image"], batch["K"]), "bare": lambda: net.backbone(x)}, rounds, device
        )
    net.train()
    learned = seconds["forward"] + seconds["targets_losses"] + seconds["backward"]
    ratios = {"train_step": learned / seconds["backbone"], "whole_step": seconds["whole_step"] / seconds["backbone"]}
    found = {"train_images_per_s": len(x) / float(np.median(seconds["whole_step"]))}
    found |= {f"{name}_s": float(np.median(values)) for name, values in seconds.items()}
    for name, values in ratios.items():
        found[f"{name}_over_backbone"] = float(np.median(values))
        found[f"{name}_over_backbone_spread"] = np.quantile(values, (0, 1)).round(3).tolist()
    found["predict_over_backbone_forward"] = float(np.median(predict["predict"] / predict["bare"]))
    found["host_syncs_per_step"] = sum(count.waits for count in counts.values())
    return found | {"optimizer_and_average_operator_calls": counts["optimizer_and_average"].calls.total()}


def measure_head(config, device, images, rounds):
    """Targets, all twelve losses and their backward to the head's outputs, and decoding, on one thread.

    Operator calls also of the losses that the config itself has.
    """
    own, weights = config.loss, {name: value or 1.0 for name, value in vars(config.loss).items()}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, predict_yaw=True))
    loss, threads, net = dataclasses.replace(config.loss, **weights), torch.get_num_threads(), make_net(config, device)
    found = {"targets_losses_ms": {}, "operator_calls": {}, "operator_calls_of_own_losses": {}, "decode_nms_ms": {}}
    torch.set_num_threads(1)
    for objects in OBJECTS:
        batch = make_batch(config, images, objects, device)
        with torch.no_grad():
            logits, raw = (x.requires_grad_() for x in net(batch["image"], batch["K"]))

        def run(weights=loss, batch=batch, logits=logits, raw=raw):
            targets = assign(batch, net.config)
            losses = compute_losses(
                net, logits, raw, targets, batch, weights, count_positives(targets).clamp(min=1), best=True
            )
            torch.autograd.grad(weighted_sum(losses, weights), (logits, raw))

        found["targets_losses_ms"][str(objects)] = 1e3 * interleave({"run": run}, 3 * rounds, device)["run"].min()
        for name, weights in (("operator_calls", loss), ("operator_calls_of_own_losses", own)):
            with Count() as count:
                run(weights)
            found[name][str(objects)] = count.calls.total()
    scores = torch.randn(logits[:1].shape, device=device) - 4  # some hundred pairs above the threshold
    for name in ("threshold", "900_candidates"):
        run = {"run": lambda scores=scores: net.select(scores, raw[:1], batch["K"][:1])}
        found["decode_nms_ms"][name] = 1e3 * interleave(run, 3 * rounds, device)["run"].min()
        scores, net.config = (
            torch.zeros_like(scores),
            dataclasses.replace(net.config, candidates=900, score_threshold=0.0),
        )
    torch.set_num_threads(threads)
    return found


def measure_memory(config, images):
    """Peak memory of training steps over those of the bare backbone, the optimizer's moments included; each in a process of its own.

    There glibc gives freed memory back at once: what it would keep for later is not what a step needs, and differs from run to run.
    """
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, GIVE_BACK), ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        backbone, step = pool.map(peak, [config] * 2, [images] * 2, ("backbone", "step"))
    return {
        "peak_memory_mib": {"backbone": backbone, "step": step},
        "peak_memory_over_backbone": step and step / backbone,
    }


def peak(config, images, what):
    """MiB that some steps need beyond what the process held before them, None where the system does not say."""
    accelerator = start_accelerator(config.train.mixed_precision)
    step = Step(config, accelerator, make_batch(config, images, OBJECTS[0], accelerator.device))
    _, learn = backbone_pass(step.net, step.batch, accelerator)
    optimizer = make_optimizer(step.net.backbone, config.train)

    def now():
        if accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status")  # getrusage's peak would be the parent's, inherited through fork
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024 if status.exists() else None

    before = now()
    for _ in range(3):
        step() if what == "step" else (learn(), optimizer.step())
    return before and now() - before


def row_of(name):
    """The row of a table in which a parameter or buffer of a `Detector` is counted."""
    return MODULES.get(name.partition(".")[0], "other")


def kept_for_backward(step):
    """Bytes that forward, targets and losses keep for backward, {row: bytes}, "losses" a row; parameters, buffers and batch apart.

    A storage counts once, where it was kept first: a tower's output is the tower's, though the predictor needs it, too. Of a checkpointed
    block only the inputs count: the rest is computed again.
    """
    running, kept, hooks = ["losses"], {}, []
    apart = [*step.net.parameters(), *step.net.buffers(), *step.batch.values()]
    apart = {tensor.untyped_storage().data_ptr() for tensor in apart}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept.setdefault(
                storage.data_ptr(), (running[-1], storage)
            )  # held, so that its address is not given to another
        return tensor.detach()  # not the tensor itself, which its own graph would then hold for ever

    def enter(row):
        return lambda module, inputs: running.append(row)

    def leave(module, inputs, output):
        running.pop()

    for name, module in [("", step.net), *step.net.named_children()]:
        hooks += [module.register_forward_pre_hook(enter(row_of(name))), module.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.forward()
        step.targets_losses()
    for hook in hooks:
        hook.remove()
    found = collections.Counter()
    for row, storage in kept.values():
        found[row] += storage.nbytes()
    return found


def measure_parts(step):
    """Where the peak of a step lies: {row: {kind: MiB}} as "table", and what is held at both ends of backward, its likely peak.

    Gradients come while activations go. Not counted: what an operator or the optimizer needs while it runs.
    """
    step()  # moments exist from here on
    kept = kept_for_backward(step)
    step.backward()
    table, state = collections.defaultdict(collections.Counter), step.optimizer.optimizer.state
    for name, p in step.net.named_parameters():
        own = [value for value in state.get(p, {}).values() if isinstance(value, torch.Tensor)]
        held = {"parameters": [p], "gradients": [] if p.grad is None else [p.grad], "optimizer_state": own}
        table[row_of(name)] += {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in held.items()}
    for name, buffer in step.net.named_buffers():
        table[row_of(name)]["buffers"] += buffer.nbytes
    for name, tensor in (
        [*step.average.module.named_parameters(), *step.average.module.named_buffers()] if step.average else ()
    ):
        table[row_of(name)]["average"] += tensor.nbytes
    for row, size in kept.items():
        table[row]["activations"] += size
    step.optimizer_and_average()
    table["all"] = sum(table.values(), collections.Counter())
    kinds = ("parameters", "buffers", "optimizer_state", "average", "activations", "gradients")
    rows = [row for row in (*dict.fromkeys(MODULES.values()), "other", "losses", "all") if row in table]
    table = {row: {kind: table[row][kind] / 2**20 for kind in kinds} for row in rows}
    always = sum(table["all"][kind] for kind in kinds[:4])
    held = {
        "before_backward_mib": always + table["all"]["activations"],
        "after_backward_mib": always + table["all"]["gradients"],
    }
    if step.accelerator.device.type == "cuda":
        held["allocator_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return {"table": table, **held}


def measure_variants(config, images, steps, device, peak_tflops=None, variants=VARIANTS):
    """The table of `measure_variant`, {variant: its numbers}, each in a process of its own: compiled code, memory and faults are its own.

    One that fails has the first line of its "error", and the others go on.
    """
    table = {}
    for precision, compiled, channels_last in variants:
        name = f"{'fp32' if precision == 'no' else precision} {'compiled' if compiled else 'eager'}{' channels_last' * channels_last}"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            arguments = (config, images, steps, device, peak_tflops, precision, compiled, channels_last)
            try:
                table[name] = pool.submit(try_variant, *arguments).result()
            except BrokenProcessPool:
                table[name] = {"error": "its process died"}
    return table


def try_variant(*arguments):
    """`measure_variant`, or its error: told in the process where it arose, as not all errors of torch can be sent to another."""
    try:
        return measure_variant(*arguments)
    except Exception as error:  # whatever it is, it is what is to be told of this variant
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def measure_variant(config, images, steps, device, peak_tflops, precision, compiled, channels_last):
    """Numbers of a whole step on a device, "cuda" or "cpu"; None for what only CUDA tells, and for mfu without a peak.

    FLOPs are those of forward and backward, counted before compilation, with what checkpointing computes again; mfu is their share of the
    peak. fp32 is as torch has it: convolutions may use TF32. kernels: of one step, copies apart.
    """
    accelerator = start_accelerator(precision, cpu=device == "cpu")
    cuda = accelerator.device.type == "cuda"
    layout = torch.channels_last if channels_last else torch.preserve_format
    step = Step(config, accelerator, make_batch(config, images, OBJECTS[0], accelerator.device), layout)
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
    began = time.perf_counter()
    for _ in range(steps):  # the host runs ahead, as in training
        step()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    tflops = flops.get_total_flops() / seconds / 1e12
    return {
        "images_per_s": images / seconds,
        "step_ms": 1e3 * seconds,
        "gflop_per_image": flops.get_total_flops() / images / 1e9,
        "tflop_per_s": tflops,
        "mfu": tflops / peak_tflops if peak_tflops else None,
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "kernels": count_kernels(step) if cuda else None,
        "host_syncs": find_sync(step, steps) if cuda else None,  # last, as it may leave a step undone
    }


def count_kernels(step):
    """Kernels that a GPU runs in one step, copies and fills by its memory engine apart."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    ran = [event for event in profile.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in ran)


def find_sync(step, steps):
    """0, or the file and line of ours where the host first waits for the GPU in so many steps."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        root = Path(__file__).parents[1]
        ours = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).parent in (root, root / "tools")
        ]
        return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def measure_gpu(path, overrides, images, peak_tflops):
    """All that a GPU can tell of a config, with its own batch size unless told otherwise. Raises UserError, without a GPU too."""
    with user_errors():
        config = load_config(path, overrides)
        images = config.train.batch_size if images is None else images
        if images < 1 or (peak_tflops is not None and peak_tflops <= 0):
            raise ValueError(f"--batch {images} --peak-tflops {peak_tflops}: expected numbers above 0")
        find_optimizer(config.train.optimizer)
        if not torch.cuda.is_available():
            raise ValueError("--gpu: torch sees no CUDA GPU here")
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "images": images,
        "optimizer": config.train.optimizer,
    }
    return found | {"table": measure_variants(config, images, 50, "cuda", peak_tflops)}


def measure_loader(data, rounds):
    """Samples a second of one loader process against bare decoding and resizing of the same images."""
    chosen, size, rounds, cpu = range(min(40, len(data))), data.size[::-1], min(rounds, 5), torch.device("cpu")
    tasks = {
        "bare": lambda: [
            load_image(data.frames[index].image).resize(size, Image.Resampling.BILINEAR) for index in chosen
        ],
        "loader": lambda: [data[(0, index)] for index in chosen],
    }
    bare, loader = (len(chosen) / values.min() for values in interleave(tasks, rounds, cpu).values())
    with tempfile.TemporaryDirectory() as folder:
        data.cache = FrameCache(folder)
        cached = (
            len(chosen) / interleave({"cached": tasks["loader"]}, rounds, cpu)["cached"].min()
        )  # the first round fills it
        mib = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20 / len(chosen)
    found = {
        "loader_images_per_s_per_worker": loader,
        "bare_decode_resize_images_per_s": bare,
        "loader_over_bare_decode": loader / bare,
    }
    return found | {"cached_loader_over_loader": cached / loader, "cache_mib_per_frame": mib}


def measure_waiting(step, data, rounds):
    """Share of the time that steps on the config's own data wait for its workers."""
    device, waited = step.accelerator.device, 0.0
    order = StepBatches(len(data), len(step.batch["image"]), 0, 1, 0, 0, rounds + 2)
    with loading(make_loader(data, order, step.config.data.workers, device)) as batches:
        for number in range(rounds + 2):
            waiting = time.perf_counter()
            if number == 2:  # the workers have started, and the step is warm
                waited, began = 0.0, waiting
            step.batch = send_to_device(next(batches), device, non_blocking=True)
            waited += time.perf_counter() - waiting
            step()
        return {"data_wait_share": waited / (time.perf_counter() - began)}


def measure_evaluation(frames=3769):
    """Seconds of `compute_metrics` over as many frames as KITTI's val split has, four Cars and two detections of each; no files."""
    rng, truth, results = np.random.default_rng(0), {}, {}
    for i in range(frames):
        _, truth[i] = scene(rng, 4, 1242, 375, ("Car",))
        seen = truth[i][np.arange(4).repeat(2)]
        results[i] = dataclasses.replace(
            seen, center=seen.center * rng.normal(1, 0.03, (8, 1)), score=rng.uniform(size=8)
        )
    began = time.perf_counter()
    compute_metrics(truth, results)
    return {f"evaluation_{frames}_frames_s": time.perf_counter() - began}


def invent(path, frames, images=16):
    """A JSON-lines file of so many frames of 8 objects, their pictures a few members of one tar."""
    rng, canvas = np.random.default_rng(0), (640, 192)
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for number in range(images):
            picture = path.with_name(f"{number:03d}.jpg")
            Image.fromarray(rng.integers(0, 255, (*canvas[::-1], 3), dtype=np.uint8)).save(picture)
            archive.add(picture, picture.name)
    with path.open("w") as file:
        for start in range(0, frames, 1000):
            count = min(1000, frames - start)
            K, labels = scene(rng, 8 * count, *canvas, ("Car", "Pedestrian", "Cyclist"))
            columns = [getattr(labels, name).round(3).tolist() for name in ("center", "size", "yaw", "box")]
            rows = zip(labels.name, *columns, strict=True)
            objects = [dict(zip(("class", "center", "size", "yaw", "box"), row, strict=True)) for row in rows]
            for i in range(count):
                line = {"image": f"{path.stem}.tar/{i % images:03d}.jpg", "id": f"{start + i:08d}", "K": K.tolist()}
                file.write(json.dumps({**line, "objects": objects[8 * i : 8 * i + 8]}) + "\n")


def own_memory(process="self"):
    """MiB that a process alone holds, and its share of all that it uses (PSS); None where the system does not say."""
    rollup = Path(f"/proc/{process}/smaps_rollup")
    if not rollup.exists():
        return None, None
    sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", rollup.read_text()))
    return int(sizes["Private_Dirty"]) / 1024, int(sizes["Pss"]) / 1024


def start_reading(path, ready, steps=100, batch=8, workers=2):
    """What a training process does with its data: seconds of its start by part, then samples a second and memory with its workers.

    ready: a barrier that all processes reach together. Returns a dict of numbers, memory in MiB where the system tells.
    """
    torch.set_num_threads(1)
    before, _ = own_memory()
    began = time.perf_counter()
    config, model = DataConfig(train=(Source(kind="jsonl", root=str(path)),)), ModelConfig(size=(192, 640))
    data = build_dataset(config, config.train, model.classes, model.size, True)
    data.digest()
    opened = time.perf_counter()
    measure_priors(data, model)
    measured = time.perf_counter()
    data.summary()
    with loading(
        make_loader(data, StepBatches(len(data), batch, 0, 1, 0, 0, steps + 1), workers, torch.device("cpu"))
    ) as batches:
        next(batches)
        first = time.perf_counter()
        ready.wait()  # so that both processes load together
        loading_from = time.perf_counter()
        for _ in range(steps):
            next(batches)
        rate = batch * steps / (time.perf_counter() - loading_from)
        ready.wait()
        memory = [own_memory(), *(own_memory(worker.pid) for worker in batches._workers)]
        ready.wait()
    found = {
        "open_s": opened - began,
        "priors_s": measured - opened,
        "start_to_first_batch_s": first - began,
        "samples_per_s": rate,
    }
    if before is not None:
        found |= {
            "process_private_mib": memory[0][0],
            "process_private_before_mib": before,
            "process_pss_mib": memory[0][1],
        }
        found |= {
            "worker_private_mib": max(own for own, _ in memory[1:]),
            "workers_pss_mib": sum(share for _, share in memory[1:]),
        }
    return found


def start_as_usual():
    """In a spawned process, whose own workers would be spawned, too: let them start as they do in train.py."""
    multiprocessing.set_start_method(None, force=True)


def measure_data(frames):
    """Reading so many invented frames, alone; then two processes of two workers each that start together on the index."""
    if frames < 1:
        raise UserError(f"--data {frames}: expected at least 1")
    with tempfile.TemporaryDirectory() as folder, multiprocessing.Manager() as manager:
        path = Path(folder) / "invented.jsonl"
        invent(path, frames)
        spent, began = sum(os.times()[:4]), time.perf_counter()
        part = jsonl.open_frames(path, workers=usable_cores())
        seconds, spent = time.perf_counter() - began, sum(os.times()[:4]) - spent
        found = {"frames": part.count, "build_s": seconds, "build_lines_per_s_per_core": frames / spent}
        found |= {"index_bytes_per_frame": part.columns.path.stat().st_size / frames}
        rows = np.random.default_rng(0).integers(frames, size=2000).tolist()
        began, several = time.perf_counter(), Frames([part])
        for row in rows:
            several[row]
        found["frame_us"] = 1e6 * (time.perf_counter() - began) / len(rows)
        ready = manager.Barrier(2)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), start_as_usual) as pool:
            for number, one in enumerate([pool.submit(start_reading, path, ready) for _ in range(2)]):
                found[f"process_{number}"] = one.result()
    return found


def flatten(found, prefix=""):
    """(name, value) of every measurement."""
    for name, value in found.items():
        yield from flatten(value, f"{prefix}{name} ") if isinstance(value, dict) else [(prefix + name, value)]


def print_table(rows):
    """Print {row: {column: number}}; a row that has only an "error" is that."""
    width, columns = (
        max(map(len, rows)) + 2,
        list(dict.fromkeys(column for row in rows.values() for column in row if column != "error")),
    )
    print(" " * width + "".join(f"{column:>17}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<{width}}" + (row.get("error") or "".join(f"{show(row[column]):>17}" for column in columns)))


def show(value):
    """A measured value as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(path, overrides, images, rounds, memory=False):
    """Everything, or the memory by module, as a dict. Raises UserError.

    Where the config's data is missing, stderr says so and the dict has none of it.
    """
    with user_errors():
        if min(images, rounds) < 1:
            raise ValueError(f"--batch {images} --rounds {rounds}: expected at least 1")
        config = load_config(path, overrides)
        accelerator = start_accelerator(config.train.mixed_precision)
        device = accelerator.device
        step = Step(config, accelerator, make_batch(config, images, OBJECTS[0], device))
    if memory:
        return measure_parts(step)
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "input": f"{images}x3x{config.model.size[0]}x{config.model.size[1]}",
        "job": f"{config.model.backbone}, {config.train.optimizer}, mixed precision: {config.train.mixed_precision}",
    }
    found |= measure_steps(step, rounds) | measure_head(config, device, images, rounds)
    found |= measure_memory(config, images) | measure_evaluation()
    try:
        more = {"velocity": config.model.velocity, "attributes": config.model.attribute_names}
        data = build_dataset(config.data, config.data.train, config.model.classes, config.model.size, True, **more)
    except (ValueError, OSError) as error:
        print(f"the loader is not measured: {error}", file=sys.stderr)
        return found
    return found | measure_waiting(step, data, rounds) | measure_loader(data, rounds)


IN_VAIN = {
    "gpu": ("rounds",),
    "memory": ("rounds", "peak_tflops"),
    "data": ("batch", "rounds", "peak_tflops"),
    "config": ("peak_tflops",),
}


def main(arguments=None):
    """Command line entry. Returns 0, or 2 after one sentence for an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a Python run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--data", type=int, metavar="N", help="measure the reading of N invented frames instead of a config"
    )
    only.add_argument("--memory", action="store_true", help="tell only what a step holds, by module")
    only.add_argument("--gpu", action="store_true", help="compare precisions, compilation and channels_last on a GPU")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="with --gpu: what the GPU could do, for mfu")
    parser.add_argument("--batch", type=int, help="images (default: 2, with --gpu the config's)")
    parser.add_argument("--rounds", type=int, help="repetitions after one that warms up (default: 7)")
    parser.add_argument("--json", help="also write the numbers there")
    options = parser.parse_intermixed_args(arguments)
    try:
        if (options.data is None) == (options.config is None):
            raise UserError("expected a config or --data N, and not both")
        mode = next(
            (name for name in ("gpu", "memory") if getattr(options, name)),
            "data" if options.config is None else "config",
        )
        if given := [name for name in IN_VAIN[mode] if getattr(options, name) is not None]:
            raise UserError(
                f"--{given[0].replace('_', '-')} does nothing with {'a config alone' if mode == 'config' else '--' + mode}"
            )
        check_writable(options.json)
        if options.gpu and options.config:
            found = measure_gpu(options.config, options.overrides, options.batch, options.peak_tflops)
        elif options.config:
            images = 2 if options.batch is None else options.batch
            found = measure(
                options.config,
                options.overrides,
                images,
                7 if options.rounds is None else options.rounds,
                options.memory,
            )
        else:
            found = measure_data(options.data)
    except UserError as error:
        print(f"error: {error.sentence}", file=sys.stderr)
        return 2
    if "table" in found:
        print_table(found["table"])
    for name, value in flatten({name: value for name, value in found.items() if name != "table"}):
        print(f"{name:<44}{show(value)}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
