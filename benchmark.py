"""Measure a config's speed and memory on this machine: one table, ratios taken in the same run.

python benchmark.py [CONFIG.py] [key=value ...] [--batch N] [--rounds N] [--json OUT]     the table
python benchmark.py ... --growth       instead: step time over image area, batch, objects, classes and processes
python benchmark.py ... --variants     with bf16, channels_last and torch.compile, as always on a GPU
"""

import argparse
import collections
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from config import load_config
from data import FrameCache, StepBatches, build_dataset, change_colours, collate, load_image, loading, make_loader
from data_kitti import make_labels
from faults import Statistics, poison, step_unless
from geometry import clip_boxes, project_boxes
from launch import start_accelerator
from losses import compute_losses, count_positives, weighted_sum
from metrics import kitti_ap
from model import Detector, checkpoint_backbone
from targets import assign

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "kitti.py"
OBJECTS = (8, 30, 100)  # per image
WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_nonzero")  # the host waits for their results on a GPU
BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense peak a second, NVIDIA's data sheets
PRIORS = {"size_prior": ((3.9, 1.53, 1.63), (0.84, 1.76, 0.66), (1.76, 1.74, 0.6)), "spread": 12.0}


def prepare_model(config, device):
    """The config's `Detector` in training mode with KITTI's priors, so that no data set is needed; checkpointed if the config says so."""
    model, levels = config.model, len(config.model.strides)
    sizes = tuple(PRIORS["size_prior"][i % 3] for i in range(len(model.classes)))
    depths = tuple(float(v) for v in np.linspace(40, 12, levels))
    filled = dataclasses.replace(model, pretrained=False, size_prior=sizes, depth_mean=depths, depth_std=(PRIORS["spread"],) * levels)
    net = Detector(filled).to(device)
    if config.train.checkpoint_backbone:
        checkpoint_backbone(net)
    return net


def make_batch(config, images, objects, device):
    """A batch of random pictures with so many objects each, spread over the ground in front of a KITTI-like camera."""
    model, rng = config.model, np.random.default_rng(0)
    height, width = model.size
    K = np.array([[0.58 * width, 0, width / 2], [0, 0.58 * width, 0.46 * height], [0, 0, 1]])
    samples = []
    for _ in range(images):
        depth = rng.uniform(6, 60, objects)
        center = np.stack([(rng.uniform(-0.8, 0.8, objects)) * depth * 0.8, rng.uniform(0.5, 1.2, objects), depth], 1)
        size = rng.uniform(0.9, 1.1, (objects, 3)) * [3.9, 1.53, 1.63]
        yaw = rng.uniform(-np.pi, np.pi, objects)
        full, crosses = project_boxes(center, size, yaw, K)
        arrays = {"K": K, "center": center, "size": size, "yaw": yaw, "box": clip_boxes(full, width, height), "full_box": full}
        sample = {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in arrays.items()}
        sample.update(
            image=torch.from_numpy(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)),
            label=torch.from_numpy(rng.integers(0, len(model.classes), objects)),
            crosses=torch.from_numpy(crosses),
            ignore=torch.zeros(0, 4),
            index=torch.tensor(0),
            skipped=torch.tensor(0),
        )
        if config.data.colour:
            sample.update(colour=torch.eye(3, 4), covered=torch.tensor([0, 0, width, height]))
        samples.append(sample)
    return {name: value.to(device) for name, value in collate(samples).items()}


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleave(tasks, rounds, device):
    """Seconds of each task {name: [rounds]}, run in turn so that a busy machine slows all alike; the first round is dropped."""
    seconds = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            wait(device)
            began = time.perf_counter()
            task()
            wait(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


class Step:
    """One training step as train.py does it, without Accelerate: phases can be timed one by one.

    model: `net` itself, or what wraps it for several processes. precision: the autocast dtype of the network, None for fp32.
    """

    def __init__(self, config, net, batch, model=None, precision=None):
        self.config, self.net, self.batch, self.seconds = config, net, batch, collections.defaultdict(list)
        self.model, self.precision = model or net, precision
        self.device = batch["image"].device
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
        self.average, self.statistics = ModelEmaV3(net), Statistics(net)
        self.assign, self.compute_losses = assign, compute_losses

    def forward(self):
        self.optimizer.zero_grad()
        image = change_colours(self.batch)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            self.logits, self.raw = self.model(image, self.batch["K"])

    def losses(self):
        targets = self.assign(self.batch, self.net.config)
        self.batch["positives"] = count_positives(targets).clamp(min=1)
        losses = self.compute_losses(self.net, self.logits, self.raw, targets, self.batch, self.config.loss)
        loss = weighted_sum(losses, self.config.loss)
        self.loss = loss * poison(loss)

    def backward(self):
        self.loss.backward()

    def update(self):
        broken = ~torch.isfinite(torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.train.clip))
        step_unless(broken, self.optimizer)
        self.statistics.settle(~broken)
        self.average.update(self.net)

    def __call__(self):
        for phase in (self.forward, self.losses, self.backward, self.update):
            began = time.perf_counter()
            phase()
            wait(self.device)
            self.seconds[phase.__name__].append(time.perf_counter() - began)


class Count(TorchDispatchMode):
    """Operators that are called, by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        boolean = name in ("index", "index_put_") and any(getattr(i, "dtype", None) == torch.bool for i in args[1])
        self.calls["boolean index" if boolean else name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        return sum(count for name, count in self.calls.items() if name in WAITING or name == "boolean index")


def backbone_step(net, batch):
    """Forward and backward of the backbone alone, on the same images."""
    x = ((batch["image"].permute(0, 3, 1, 2).float()) - 114) / 58

    def run():
        net.backbone.zero_grad()
        sum(feature.sum() for feature in net.backbone(x)).backward()

    return run


def measure_steps(config, device, images, rounds):
    """Training and prediction against the bare backbone."""
    net = prepare_model(config, device)
    batch = make_batch(config, images, OBJECTS[0], device)
    step = Step(config, net, batch)
    with FlopCounterMode(display=False) as flops:
        step.forward()
        step.losses()
        step.backward()
    x = ((batch["image"].permute(0, 3, 1, 2).float()) - 114) / 58
    bare = backbone_step(net, batch)
    seconds = interleave({"step": step, "backbone": bare}, rounds, device)
    phases = {name: statistics.median(values[1:]) for name, values in step.seconds.items()}
    learning = [sum(parts) for parts in zip(*(step.seconds[n][1:] for n in ("forward", "losses", "backward")), strict=True)]
    with Count() as count:
        step()
    net.eval()
    with torch.no_grad():
        predict = interleave(
            {"predict": lambda: net.detect(batch["image"], batch["K"]), "forward": lambda: net.backbone(x)}, rounds, device
        )
    ratios = [a / b for a, b in zip(learning, seconds["backbone"], strict=True)]
    return {
        "train_images_per_s": images / statistics.median(seconds["step"]),
        "train_step_s": statistics.median(seconds["step"]),
        "train_step_spread_s": [min(seconds["step"]), max(seconds["step"])],
        "forward_s": phases["forward"],
        "targets_losses_s": phases["losses"],
        "backward_s": phases["backward"],
        "optimizer_and_average_s": phases["update"],
        "backbone_forward_backward_s": statistics.median(seconds["backbone"]),
        "train_step_over_backbone": statistics.median(ratios),
        "train_step_over_backbone_spread": [min(ratios), max(ratios)],
        "predict_over_backbone_forward": statistics.median(a / b for a, b in zip(predict["predict"], predict["forward"], strict=True)),
        "host_syncs_per_step": count.waits,
        "step_gflop": flops.get_total_flops() / 1e9,
        "gflop_per_s": flops.get_total_flops() / 1e9 / statistics.median(seconds["step"]),
        "parameters_millions": sum(p.numel() for p in net.parameters()) / 1e6,
    }


def measure_head(config, device, images, rounds):
    """Targets, all twelve losses and their backward to the head's outputs, and decoding, on one thread."""
    every = {field.name: getattr(config.loss, field.name) or 1.0 for field in dataclasses.fields(config.loss)}
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, predict_yaw=True), loss=dataclasses.replace(config.loss, **every)
    )
    net = prepare_model(config, device)
    found = {"targets_losses_ms": {}, "operator_calls": {}, "decode_nms_ms": {}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for objects in OBJECTS:
        batch = make_batch(config, images, objects, device)
        with torch.no_grad():
            outputs = net(batch["image"], batch["K"])
        logits, raw = (x.detach().requires_grad_() for x in outputs)

        def run(batch=batch, logits=logits, raw=raw):
            targets = assign(batch, net.config)
            batch["positives"] = count_positives(targets).clamp(min=1)
            losses = compute_losses(net, logits, raw, targets, batch, config.loss)
            torch.autograd.grad(weighted_sum(losses, config.loss), (logits, raw))

        found["targets_losses_ms"][str(objects)] = 1e3 * min(interleave({"run": run}, 3 * rounds, device)["run"])
        with Count() as count:
            run()
        found["operator_calls"][str(objects)] = sum(count.calls.values())
    net.eval()
    logits = torch.randn(outputs[0].shape, device=device) - 4  # some hundred pairs above the threshold
    for name, options in (("threshold", {}), ("900_candidates", {"candidates": 900, "score_threshold": 0.0})):
        net.config = dataclasses.replace(net.config, **options)
        many = logits[:1] if name == "threshold" else torch.zeros_like(logits[:1])
        run = {"run": lambda many=many: net.select(many, outputs[1][:1], batch["K"][:1])}
        found["decode_nms_ms"][name] = 1e3 * min(interleave(run, 3 * rounds, device)["run"])
    torch.set_num_threads(threads)
    return found


def measure_memory(arguments):
    """Peak memory of a training step over one of the bare backbone, moments of AdamW included: each in a process of its own. A dict."""
    peaks = {}
    for what in ("backbone", "step"):
        command = [sys.executable, __file__, *arguments, "--peak", what]
        peaks[what] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    return {"peak_memory_mib": peaks, "peak_memory_over_backbone": peaks["step"] / peaks["backbone"]}


def peak(config, device, images, what):
    """MiB that some steps needed beyond what the process held before them."""
    net = prepare_model(config, device)
    batch = make_batch(config, images, OBJECTS[0], device)
    if what == "step":
        run = Step(config, net, batch)
    else:
        learn, optimizer = backbone_step(net, batch), torch.optim.AdamW(net.backbone.parameters(), fused=True)

        def run():
            learn()
            optimizer.step()

    def now():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()  # getrusage's peak would be the parent's, inherited through fork
        return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024

    before = now()
    for _ in range(3):
        run()
    return now() - before


def measure_loader(config, rounds):
    """Samples a second of one loader process against bare decoding and resizing of the same images; None without the data."""
    try:
        data = build_dataset(config.data, config.data.train, config.model.classes, config.model.size, True)
    except (ValueError, OSError):
        return {"loader_over_bare_decode": None}
    chosen = list(range(min(40, len(data))))
    size = config.model.size[::-1]

    def bare():
        for index in chosen:
            load_image(data.frames[index].image).resize(size, Image.Resampling.BILINEAR)

    def loader():
        for index in chosen:
            data[(0, index)]

    seconds = interleave({"bare": bare, "loader": loader}, min(rounds, 5), torch.device("cpu"))
    each = {name: len(chosen) / min(values) for name, values in seconds.items()}
    with tempfile.TemporaryDirectory() as folder:
        data.cache = FrameCache(folder)
        loader()  # fills it
        cached = len(chosen) / min(interleave({"cached": loader}, min(rounds, 5), torch.device("cpu"))["cached"])
        mib = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20 / len(chosen)
    return {
        "loader_images_per_s_per_worker": each["loader"],
        "bare_decode_resize_images_per_s": each["bare"],
        "loader_over_bare_decode": each["loader"] / each["bare"],
        "cached_loader_over_loader": cached / each["loader"],
        "cache_mib_per_frame": mib,
    }


def measure_waiting(config, device, images, rounds):
    """Share of the time that steps on the config's own data wait for its workers; None without the data."""
    try:
        data = build_dataset(config.data, config.data.train, config.model.classes, config.model.size, True)
    except (ValueError, OSError):
        return {"data_wait_share": None}
    net = prepare_model(config, device)
    order = StepBatches(len(data), images, 0, 1, 0, 0, rounds + 2)
    waited = []
    with loading(make_loader(data, order, config.data.workers, device)) as batches:
        step, began = None, time.perf_counter()
        for _ in range(rounds + 2):
            waiting = time.perf_counter()
            batch = send_to_device(next(batches), device, non_blocking=True)
            waited.append(time.perf_counter() - waiting)
            step = step or Step(config, net, batch)
            step.batch = batch
            step()
            if len(waited) == 2:  # the workers have started, and the step is warm
                began = time.perf_counter()
    return {"data_wait_share": sum(waited[2:]) / (time.perf_counter() - began)}


def measure_variants(config, device, images, rounds):
    """Seconds of a step in fp32, bf16, bf16 with channels_last weights, and these compiled, and the share of the GPU's peak."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak_flops = next((flops for name, flops in BF16_FLOPS.items() if name in gpu), None)
    variants = {
        "fp32": (),
        "bf16": ("bf16",),
        "bf16 channels_last": ("bf16", "last"),
        "bf16 channels_last compile": ("bf16", "last", "compile"),
    }
    found = {}
    for name, options in variants.items():
        net = prepare_model(config, device)
        if "last" in options:
            net.to(memory_format=torch.channels_last)
        step = Step(config, net, make_batch(config, images, OBJECTS[0], device), precision=torch.bfloat16 if "bf16" in options else None)
        with FlopCounterMode(display=False) as flops:
            step()
        if "compile" in options:
            net.compile(fullgraph=True)
            step.assign, step.compute_losses = (torch.compile(f, fullgraph=True) for f in (assign, compute_losses))
        seconds = statistics.median(interleave({"step": step}, rounds, device)["step"])
        found[name] = {"step_s": seconds, "images_per_s": images / seconds}
        if peak_flops:
            found[name]["mfu"] = flops.get_total_flops() / seconds / peak_flops
    return {"variants": found}


def measure_growth(config, device, images, rounds, arguments):
    """Seconds of a training step, without its data, when one thing grows: {what: {value: seconds}}."""
    height, width = config.model.size

    def seconds(options=config, batch=images, objects=OBJECTS[0]):
        net = prepare_model(options, device)
        step = Step(options, net, make_batch(options, batch, objects, device))
        return statistics.median(interleave({"step": step}, rounds, device)["step"])

    def changed(**changes):
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))

    def launched(processes):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--multi_gpu"] if processes > 1 else []
        environment = {**os.environ, "ACCELERATE_USE_CPU": str(device.type == "cpu").lower(), "OMP_NUM_THREADS": "1"}
        command += [__file__, *[a for a in arguments if a != "--growth"], "--threads", "1", "--peak", "launched"]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()[-1])

    area = {f"{h}x{w}": seconds(changed(size=(h, w))) for h, w in ((height, width), (height, 2 * width), (2 * height, 2 * width))}
    names = (*config.model.classes, *(f"class {i}" for i in range(len(config.model.classes), 10)))
    return {
        "step_s_over_area": area,
        "step_s_over_batch": {str(n): seconds(batch=n) for n in (1, 2, 4)},
        "step_s_over_objects": {str(n): seconds(objects=n) for n in (8, 100)},
        "step_s_over_classes": {str(n): seconds(changed(classes=names[:n], size_prior=())) for n in (len(config.model.classes), 10)},
        "step_s_over_processes_of_one_thread": {str(n): launched(n) for n in (1, 2)},
    }


def launched(config, images, rounds):
    """Seconds of a step of this process when it averages gradients with the others that were launched."""
    accelerator = start_accelerator()
    net = prepare_model(config, accelerator.device)
    model = accelerator.prepare(net)
    step = Step(config, net, make_batch(config, images, OBJECTS[0], accelerator.device), model=model)
    seconds = statistics.median(interleave({"step": step}, rounds, accelerator.device)["step"])
    if accelerator.is_main_process:
        print(seconds)
    accelerator.end_training()


def measure_evaluation(frames=3769):
    """Seconds of KITTI's average precision over as many frames as its val split has, four Cars and eight detections in each; no files."""
    rng = np.random.default_rng(0)

    def labels(center, size, yaw, score=None):
        K = np.array([[720.0, 0, 620], [0, 720, 187], [0, 0, 1]])
        boxes, _ = project_boxes(center, size, yaw, K)
        seen = {"truncation": np.zeros(len(center)), "occlusion": np.zeros(len(center), int)}
        return make_labels(["Car"] * len(center), clip_boxes(boxes, 1242, 375), size, center, yaw, **seen, score=score)

    truth, results = {}, {}
    for i in range(frames):
        depth = rng.uniform(8, 60, 4)
        center = np.stack([rng.uniform(-0.6, 0.6, 4) * depth, rng.uniform(0.5, 1.2, 4), depth], 1)
        size, yaw = rng.uniform(0.9, 1.1, (4, 3)) * [3.9, 1.53, 1.63], rng.uniform(-np.pi, np.pi, 4)
        truth[str(i)] = labels(center, size, yaw)
        guess = np.repeat(center, 2, 0) * (1 + rng.normal(0, 0.03, (8, 1)))  # two detections of each, 3 % off
        results[str(i)] = labels(guess, np.repeat(size, 2, 0), np.repeat(yaw, 2), rng.uniform(size=8))
    began = time.perf_counter()
    kitti_ap(truth, results, ("Car", "Pedestrian", "Cyclist"))
    return {"evaluation_3769_frames_s": time.perf_counter() - began}


def table(found):
    """Rows of the measurements, nested ones flattened."""
    found = dict(found)
    while any(isinstance(value, dict) for value in found.values()):
        nested = [(n, v) for n, v in found.items()]
        found = {}
        for name, value in nested:
            found.update({f"{name} {key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    rows = list(found.items())
    shown = [(n, ", ".join(f"{x:.4g}" for x in v) if isinstance(v, list) else f"{v:.4g}" if isinstance(v, float) else v) for n, v in rows]
    return "\n".join(f"{name:<44}{value}" for name, value in shown)


def measure_table(config, device, images, rounds, arguments, variants):
    """Everything but growth."""
    return {
        **measure_steps(config, device, images, rounds),
        **measure_waiting(config, device, images, rounds),
        **measure_head(config, device, images, rounds),
        **measure_memory(arguments),
        **measure_loader(config, rounds),
        **measure_evaluation(),
        **(measure_variants(config, device, images, rounds) if variants else {}),
    }


def main(arguments=None):
    """Command line entry."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="benchmark.py [CONFIG.py] [key=value ...] [options]")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions after one that warms up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the CPU")
    parser.add_argument("--json", help="also write the numbers there")
    parser.add_argument("--growth", action="store_true", help="only the table of growth")
    parser.add_argument("--variants", action="store_true", help="precision, memory format and torch.compile on the CPU too: minutes")
    parser.add_argument("--peak", choices=["backbone", "step", "launched"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    paths = [word for word in options.words if "=" not in word]
    try:
        config = load_config(paths[0] if paths else DEFAULT_CONFIG, [word for word in options.words if "=" in word])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.peak == "launched":
        launched(config, options.batch, options.rounds)
        return 0
    if options.peak:
        print(peak(config, device, options.batch, options.peak))
        return 0
    load = os.getloadavg()[0]
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": options.threads,
        "load_average_before": load,
        "torch": torch.__version__,
        "input": f"{options.batch}x3x{config.model.size[0]}x{config.model.size[1]}",
        "backbone": config.model.backbone,
    }
    measured = (config, device, options.batch, options.rounds)
    if options.growth:
        found = {**about, **measure_growth(*measured, arguments)}
    else:
        found = {**about, **measure_table(*measured, arguments, options.variants or device.type == "cuda")}
    print(table(found))
    if load > options.threads / 2:
        print(f"the machine was busy (load {load:.1f}): trust the ratios, not the times", file=sys.stderr)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
