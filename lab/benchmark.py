"""What the project itself is measured by: ratios to the bare backbone, operator calls, memory by module, reading.

python -m lab.benchmark CONFIG.py [key=value ...] [--batch N] [--rounds N] [--json OUT]
python -m lab.benchmark CONFIG.py [key=value ...] --memory [--batch N]     what a step holds, in MiB by module
python -m lab.benchmark --data N      reading N invented frames of 8 objects: index, start, memory of two processes

Steps are those of tools/benchmark.py. Ratios are taken in the same run, interleaved: on a machine that does other work
(load_average_before), trust them, not the times. OMP_NUM_THREADS=1 before it measures one thread of the CPU.
"""

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import re
import sys
import tarfile
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from config import Config, load_config
from data import DataConfig, Source, StepBatches, build_dataset, loading
from engine.guard import start_accelerator
from engine.optimizer import make_optimizer
from formats.cache import FrameCache
from losses import compute_losses, weighted_sum
from metrics.kitti import kitti_ap
from model import ModelConfig
from scene.frames import UserError, load_image
from targets import assign, measure_priors
from tools.benchmark import OBJECTS, Step, interleave, make_batch, make_net, scene, show

COUNTS = (8, 30, 100)  # objects per image
GIVE_BACK = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")  # bytes; glibc reads them once
MODULES = {  # of a Detector, in rows of a table; the rest is "other"
    "backbone": "backbone",
    "fpn": "fpn",
    "class_tower": "towers",
    "box_tower": "towers",
    "class_predictor": "predictors",
    "box_predictor": "predictors",
}
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "unique",
    "is_nonzero",
}  # the host waits for them


class Count(TorchDispatchMode):
    """Operators that are called, by name; for how many the host `waits` on a GPU. on_host: tensors not on that GPU."""

    def __init__(self, on_host=()):
        super().__init__()
        self.calls, self.waits, self.on_host = collections.Counter(), 0, {id(tensor) for tensor in on_host}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        boolean = name in ("index", "index_put_") and any(getattr(i, "dtype", None) == torch.bool for i in args[1])
        self.calls[name] += 1
        self.waits += (name in WAITING or boolean) and id(args[0]) not in self.on_host
        return func(*args, **(kwargs or {}))


def backbone_pass(net, batch, accelerator):
    """The images as the backbone takes them, and a function that runs forward and backward of the backbone alone."""
    x = (batch["image"].permute(0, 3, 1, 2).float() - 114) / 58

    def run():
        net.backbone.zero_grad()
        with accelerator.autocast():
            loss = sum(feature.float().sum() for feature in net.backbone(x))
        loss.backward()

    return x, run


def measure_ratios(step, rounds):
    """Training, without its data, and prediction against the bare backbone; a train_step ends with its backward."""
    net, batch, device = step.net, step.batch, step.accelerator.device
    x, backbone = backbone_pass(net, batch, step.accelerator)
    parts = {part.__name__: part for part in step.parts}
    seconds = interleave({**parts, "whole_step": step, "backbone": backbone}, rounds, device)
    net.eval()
    with torch.no_grad(), step.accelerator.autocast():
        tasks = {"predict": lambda: net.detect(batch["image"], batch["K"]), "bare": lambda: net.backbone(x)}
        seconds |= interleave(tasks, rounds, device)
    net.train()
    learned = seconds["forward"] + seconds["targets_losses"] + seconds["backward"]
    ratios = {
        "train_step_over_backbone": learned / seconds["backbone"],
        "whole_step_over_backbone": seconds["whole_step"] / seconds["backbone"],
        "predict_over_backbone_forward": seconds["predict"] / seconds.pop("bare"),
    }
    numbers = {f"{name}_s": float(np.median(values)) for name, values in seconds.items()}
    for name, values in ratios.items():
        numbers[name] = float(np.median(values))
        numbers[f"{name}_spread"] = np.quantile(values, (0, 1)).round(3).tolist()
    return numbers


def count_operators(step):
    """Operator calls of optimizer and average, and for how many calls of a whole step the host would wait on a GPU."""
    step()  # moments exist from here on
    on_host = [state["step"] for state in step.optimizer.state.values() if "step" in state]
    waits = 0
    for part in step.parts:
        with Count(on_host) as count:
            part()
        waits += count.waits
    numbers = {"host_syncs_per_step": waits, "optimizer_and_average_operator_calls": count.calls.total()}
    if step.accelerator.device.type == "cuda":
        numbers["first_host_sync"] = find_sync(step, 10)
    return numbers


def find_sync(step, steps):
    """'', or the file and line of ours where the host first waits for the GPU in so many steps."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        root = Path(__file__).parents[1]
        calls = [call for call in traceback.extract_tb(error.__traceback__) if Path(call.filename).is_relative_to(root)]
        return f"{Path(calls[-1].filename).name}:{calls[-1].lineno}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def measure_head(config, device, images, rounds):
    """Targets, all twelve losses and their backward to the head's outputs, and decoding, on one thread.

    Operator calls also of the losses that the config itself has.
    """
    own, weights = config.loss, {name: value or 1.0 for name, value in vars(config.loss).items()}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, predict_yaw=True))
    loss, threads, net = dataclasses.replace(config.loss, **weights), torch.get_num_threads(), make_net(config, device)
    numbers = {"targets_losses_ms": {}, "operator_calls": {}, "operator_calls_of_own_losses": {}, "decode_nms_ms": {}}
    torch.set_num_threads(1)
    for objects in COUNTS:
        batch = make_batch(config, images, objects, device)
        with torch.no_grad():
            logits, raw = (x.requires_grad_() for x in net(batch["image"], batch["K"]))

        def run(weights=loss, batch=batch, logits=logits, raw=raw):
            targets = assign(batch, net.config)
            positives = targets.positive.sum().float().clamp(min=1)
            losses = compute_losses(net, logits, raw, targets, batch, weights, positives, best=True)
            torch.autograd.grad(weighted_sum(losses, weights), (logits, raw))

        numbers["targets_losses_ms"][str(objects)] = fastest(run, rounds, device)
        for name, weights in (("operator_calls", loss), ("operator_calls_of_own_losses", own)):
            with Count() as count:
                run(weights)
            numbers[name][str(objects)] = count.calls.total()
    scores = torch.randn(logits[:1].shape, device=device) - 4  # some hundred pairs above the threshold
    numbers["decode_nms_ms"]["threshold"] = fastest(lambda: net.select(scores, raw[:1], batch["K"][:1]), rounds, device)
    net.config = dataclasses.replace(net.config, candidates=900, score_threshold=0.0)
    equal = torch.zeros_like(scores)
    numbers["decode_nms_ms"]["900_candidates"] = fastest(
        lambda: net.select(equal, raw[:1], batch["K"][:1]), rounds, device
    )
    torch.set_num_threads(threads)
    return numbers


def fastest(task, rounds, device):
    """Milliseconds of the fastest of many calls."""
    return 1e3 * float(interleave({"task": task}, 3 * rounds, device)["task"].min())


def measure_peaks(config, images):
    """Peak memory of training steps over those of the bare backbone, moments included; each in a process of its own.

    There glibc gives freed memory back at once: what it would keep for later is not what a step needs, and differs from
    run to run.
    """
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, GIVE_BACK), ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        backbone, step = pool.map(measure_peak, [config] * 2, [images] * 2, ("backbone", "step"))
    ratio = step and step / backbone
    return {"peak_memory_mib": {"backbone": backbone, "step": step}, "peak_memory_over_backbone": ratio}


def measure_peak(config, images, what):
    """MiB that some steps need beyond what the process held before them, None where the system does not say."""
    accelerator = start_accelerator(config.train)
    step = Step(config, accelerator, make_batch(config, images, OBJECTS, accelerator.device))
    _, learn = backbone_pass(step.net, step.batch, accelerator)
    optimizer = make_optimizer(step.net.backbone, config.train)
    before = peak_memory(accelerator.device)
    for _ in range(3):
        if what == "step":
            step()
        else:
            learn()
            optimizer.step()
    return before and peak_memory(accelerator.device) - before


def peak_memory(device):
    """MiB at most so far; of the process's own, as getrusage's would be the parent's, inherited through fork."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024 if status.exists() else None


def row_of(name):
    """The row of a table in which a parameter or buffer of a `Detector` is counted."""
    return MODULES.get(name.partition(".")[0], "other")


def kept_for_backward(step):
    """Bytes that forward, targets and losses keep for backward, {row: bytes}, "losses" a row.

    Without parameters, buffers and the batch. A storage counts once, where it was kept first: a tower's output is the
    tower's, though the predictor needs it, too. Of a checkpointed block only the inputs count.
    """
    running, storages, hooks = ["losses"], {}, []
    apart = [*step.net.parameters(), *step.net.buffers(), *step.batch.values()]
    apart = {tensor.untyped_storage().data_ptr() for tensor in apart}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:  # held, so that its address is not given to another
            storages.setdefault(storage.data_ptr(), (running[-1], storage))
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
    sizes = collections.Counter()
    for row, storage in storages.values():
        sizes[row] += storage.nbytes()
    return sizes


def measure_modules(step):
    """Where the peak of a step lies: {row: {kind: MiB}} as "table", and what is held at both ends of backward.

    Gradients come while activations go. Not counted: what an operator or the optimizer needs while it runs.
    """
    step()  # moments exist from here on
    activations = kept_for_backward(step)
    step.backward()
    table, state = collections.defaultdict(collections.Counter), step.optimizer.optimizer.state
    for name, p in step.net.named_parameters():
        moments = [value for value in state.get(p, {}).values() if isinstance(value, torch.Tensor)]
        kinds = {"parameters": [p], "gradients": [] if p.grad is None else [p.grad], "optimizer_state": moments}
        table[row_of(name)] += {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in kinds.items()}
    for name, buffer in step.net.named_buffers():
        table[row_of(name)]["buffers"] += buffer.nbytes
    average = step.average.module
    for name, tensor in (*average.named_parameters(), *average.named_buffers()):
        table[row_of(name)]["average"] += tensor.nbytes
    for row, size in activations.items():
        table[row]["activations"] += size
    step.optimizer_and_average()
    table["all"] = sum(table.values(), collections.Counter())
    kinds = ("parameters", "buffers", "optimizer_state", "average", "activations", "gradients")
    rows = [row for row in (*dict.fromkeys(MODULES.values()), "other", "losses", "all") if row in table]
    table = {row: {kind: table[row][kind] / 2**20 for kind in kinds} for row in rows}
    always = sum(table["all"][kind] for kind in kinds[:4])
    numbers = {"table": table, "before_backward_mib": always + table["all"]["activations"]}
    numbers["after_backward_mib"] = always + table["all"]["gradients"]
    if step.accelerator.device.type == "cuda":
        numbers["allocator_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return numbers


def measure_loader(data, rounds):
    """Samples a second of one loader process against bare decoding and resizing, and against the cache."""
    chosen, size, cpu = range(min(40, len(data))), data.size[::-1], torch.device("cpu")

    def decode():
        for index in chosen:
            load_image(data.frames[index].image).resize(size, Image.Resampling.BILINEAR)

    def load():
        for index in chosen:
            data[(0, index)]

    seconds = interleave({"bare": decode, "loader": load}, min(rounds, 5), cpu)
    with tempfile.TemporaryDirectory() as folder:
        data.cache = FrameCache(folder)
        seconds |= interleave({"cached": load}, min(rounds, 5), cpu)  # the first round fills it
        mib = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20 / len(chosen)
    bare, loader, cached = (len(chosen) / float(values.min()) for values in seconds.values())
    return {
        "loader_images_per_s_per_worker": loader,
        "bare_decode_resize_images_per_s": bare,
        "loader_over_bare_decode": loader / bare,
        "cached_loader_over_loader": cached / loader,
        "cache_mib_per_frame": mib,
    }


def measure_evaluation(frames=3769):
    """Seconds of the KITTI metrics over as many frames as the val split has, of four Cars and eight detections each."""
    rng, truth, results = np.random.default_rng(0), {}, {}
    for i in range(frames):
        _, truth[i] = scene(rng, 4, 1242, 375, ("Car",))
        twice = truth[i][np.arange(4).repeat(2)]
        center = twice.center * rng.normal(1, 0.03, (8, 1))
        results[i] = dataclasses.replace(twice, center=center, score=rng.uniform(size=8))
    began = time.perf_counter()
    kitti_ap(truth, results, ("Car",))
    return {f"evaluation_{frames}_frames_s": time.perf_counter() - began}


def measure(config, images, rounds):
    """Everything as a dict; where the config's data is missing, stderr says so and the dict has none of it."""
    accelerator = start_accelerator(config.train)
    step = Step(config, accelerator, make_batch(config, images, OBJECTS, accelerator.device))
    numbers = {
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    numbers |= count_operators(step) | measure_ratios(step, rounds)
    numbers |= measure_head(config, accelerator.device, images, rounds)
    numbers |= measure_peaks(config, images) | measure_evaluation()
    try:
        data = build_dataset(config, training=True)
    except UserError as error:
        print(f"the loader is not measured: {error}", file=sys.stderr)
        return numbers
    return numbers | measure_loader(data, rounds)


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
    """What a training process does with its data: seconds of its start, then samples a second and memory of workers.

    ready: a barrier that all processes reach together. Returns a dict of numbers, memory in MiB where the system tells.
    """
    torch.set_num_threads(1)
    before, _ = own_memory()
    began = time.perf_counter()
    data = build_dataset(reading_config(path), training=True)
    data.digest()
    opened = time.perf_counter()
    measure_priors(data, data.model)
    measured = time.perf_counter()
    data.summary()
    order = StepBatches(len(data), batch, 0, 1, 0, 0, steps + 1)
    with loading(data, order, workers, torch.device("cpu")) as batches:
        next(batches)
        first = time.perf_counter()
        ready.wait()  # so that both processes load together
        loading_from = time.perf_counter()
        for _ in range(steps):
            next(batches)
        rate = batch * steps / (time.perf_counter() - loading_from)
        ready.wait()
        private, shared = own_memory()
        workers_memory = [own_memory(worker.pid) for worker in batches._workers]
        ready.wait()
    numbers = {"open_s": opened - began, "priors_s": measured - opened}
    numbers |= {"start_to_first_batch_s": first - began, "samples_per_s": rate}
    if before is not None:
        numbers |= {"process_private_mib": private, "process_private_before_mib": before, "process_pss_mib": shared}
        numbers["worker_private_mib"] = max(own for own, _ in workers_memory)
        numbers["workers_pss_mib"] = sum(share for _, share in workers_memory)
    return numbers


def reading_config(path):
    """A `Config` that trains on a JSON-lines file."""
    source = Source(kind="jsonl", root=str(path))
    return Config(data=DataConfig(train=(source,), val=(source,)), model=ModelConfig(size=(192, 640)))


def start_as_usual():
    """In a spawned process, whose own workers would be spawned, too: let them start as they do in train.py."""
    multiprocessing.set_start_method(None, force=True)


def measure_data(frames):
    """Reading so many invented frames, alone; then two processes of two workers each that start together."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.Manager() as manager:
        path = Path(folder) / "invented.jsonl"
        invent(path, frames)
        spent, began = sum(os.times()[:4]), time.perf_counter()
        data = build_dataset(reading_config(path), training=False)
        seconds, spent = time.perf_counter() - began, sum(os.times()[:4]) - spent
        numbers = {"frames": len(data), "build_s": seconds, "build_lines_per_s_per_core": frames / spent}
        rows = np.random.default_rng(0).integers(frames, size=2000).tolist()
        began = time.perf_counter()
        for row in rows:
            data.frames[row]
        numbers["frame_us"] = 1e6 * (time.perf_counter() - began) / len(rows)
        ready = manager.Barrier(2)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), start_as_usual) as pool:
            for number, job in enumerate([pool.submit(start_reading, path, ready) for _ in range(2)]):
                numbers[f"process_{number}"] = job.result()
    return numbers


def flatten(numbers, prefix=""):
    """{name: value} of every measurement, those within others under both names; a table stays."""
    flat = {}
    for name, value in numbers.items():
        nested = isinstance(value, dict) and name != "table"
        flat |= flatten(value, f"{prefix}{name} ") if nested else {prefix + name: value}
    return flat


def main(arguments=None):
    """Command line entry. Returns 0, or 2 after one sentence for an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a Python run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--data", type=int, metavar="N", help="measure the reading of N invented frames instead")
    parser.add_argument("--memory", action="store_true", help="tell only what a step holds, by module")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions after one that warms up")
    parser.add_argument("--json", help="also write the numbers there")
    options = parser.parse_intermixed_args(arguments)
    try:
        if (options.data is None) == (options.config is None):
            raise UserError("expected a config or --data N, and not both")
        if min(options.batch, options.rounds, 1 if options.data is None else options.data) < 1:
            raise UserError("expected --batch, --rounds and --data of at least 1")
        config = load_config(options.config, options.overrides) if options.config else None
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.data:
        numbers = measure_data(options.data)
    elif options.memory:
        accelerator = start_accelerator(config.train)
        numbers = measure_modules(
            Step(config, accelerator, make_batch(config, options.batch, OBJECTS, accelerator.device))
        )
    else:
        numbers = measure(config, options.batch, options.rounds)
    show(flatten(numbers), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
