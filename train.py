"""Train a monocular 3D detector: one plain loop on 1 CPU or many GPUs.

accelerate launch train.py [CONFIG.py] [key=value ...]     (--help lists every key)
"""

import argparse
import dataclasses
import datetime
import difflib
import json
import logging
import math
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list, send_to_device, set_seed
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from checkpoint import complete_checkpoints, load_checkpoint, load_weights, save_checkpoint, save_weights
from config import help_text, load_config, to_dict
from data import StepBatches, build_dataset, collate
from evaluate import draw_frames, evaluate
from losses import compute_losses, count_positives
from metrics import format_table, main_metric
from model import Detector
from targets import assign, measure_priors

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "synthetic.py"
log = logging.getLogger("deep3d")


def lr_at(step, total, config):
    """Learning rate of a step in [0, total): linear warm-up, then the configured schedule. Pure, so a resumed run needs no state."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    done = step / max(1, total)
    if config.schedule == "cosine":
        return config.lr * warm * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        return config.lr * warm * 0.1 ** ((done >= 2 / 3) + (done >= 11 / 12))
    return config.lr * warm


def seed_of(*numbers):
    """A 63-bit seed, a pure function of some integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def start_accelerator(config):
    """`Accelerator` with as many processes as were asked for. Raises ValueError when the launch gave another number."""
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.accumulate,
        log_with=config.log_with or None,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=10))],
    )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise ValueError(
            f"launched {asked} processes, but Accelerate joins only {accelerator.num_processes} (without GPUs: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N train.py)"
        )
    return accelerator


def use_cores(accelerator):
    """Without a GPU: all cores, shared among the processes here. accelerate launch would leave one thread to each.

    OMP_NUM_THREADS above 1 is taken as a wish and kept.
    """
    if accelerator.device.type == "cpu" and int(os.environ.get("OMP_NUM_THREADS", 1)) == 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def start_log(out, main):
    """Log lines to the console and out/train.log on the main process, nothing elsewhere."""
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(out / "train.log")] if main else [logging.NullHandler()]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
    log.handlers, log.propagate = handlers, False
    log.setLevel(logging.INFO)


def one_thread(_):
    """Loader workers: one thread each, so that they do not fight the training process."""
    torch.set_num_threads(1)


def memory_mb(device):
    """Peak memory of this process so far: on the GPU, or resident on the CPU, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Window:
    """What the next log line shows; stays on the device until `read`, the one sync of a window."""

    def __init__(self):
        self.rows, self.time, self.data_time = [], 0.0, 0.0

    def add(self, losses, loss, norm):
        """One step: its losses, their weighted sum and the gradient norm, device scalars."""
        self.rows.append({**{name: value.detach() for name, value in losses.items()}, "loss": loss.detach(), "grad_norm": norm})

    def read(self, accelerator):
        """Means over steps and processes, as {'data_time', 'time', each loss, 'loss', 'grad_norm'}; then starts anew."""
        names = list(self.rows[0])
        means = torch.stack([torch.stack([row[name] for row in self.rows]).mean() for name in names])
        times = torch.tensor([self.data_time / len(self.rows), self.time / len(self.rows)], device=means.device)
        values = accelerator.reduce(torch.cat([times, means.float()]), "mean").tolist()
        self.__init__()
        return dict(zip(["data_time", "time", *names], values, strict=True))


def write_log(accelerator, out, record, line):
    """One console line, one line of log.jsonl, and the trackers."""
    log.info(line)
    if accelerator.is_main_process:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    accelerator.log({key: value for key, value in record.items() if isinstance(value, int | float)}, step=record["step"])


def log_window(accelerator, out, window, step, total, per_epoch, lr):
    """Read a window and write its line, in mmdetection's form and keys."""
    values = window.read(accelerator)
    epoch, place = divmod(step - 1, per_epoch)
    memory = memory_mb(accelerator.device)
    record = {"mode": "train", "epoch": epoch + 1, "iter": place + 1, "step": step, "lr": lr, "memory": memory, **values}
    eta = datetime.timedelta(seconds=int(values["time"] * (total - step)))
    losses = ", ".join(f"{name}: {value:.4f}" for name, value in values.items() if name.startswith("loss"))
    line = f"Epoch [{epoch + 1}][{place + 1}/{per_epoch}]  lr: {lr:.5f}, eta: {eta}, time: {values['time']:.3f}, "
    write_log(accelerator, out, record, f"{line}data_time: {values['data_time']:.3f}, memory: {memory}, {losses}")


def make_optimizer(model, options):
    """timm's optimizer of that name; no weight decay on norms and biases. Raises ValueError for an unknown name."""
    names = list_optimizers()
    if options.optimizer not in names:
        near = difflib.get_close_matches(options.optimizer, names, n=3)
        raise ValueError(f"train.optimizer {options.optimizer!r} is unknown to timm{'; near it: ' + ', '.join(near) if near else ''}")
    betas = {"betas": (0.9, options.beta2)} if get_optimizer_info(options.optimizer).num_betas == 2 else {}
    return create_optimizer_v2(model, opt=options.optimizer, lr=options.lr, weight_decay=options.weight_decay, **betas)


def make_loader(dataset, order, workers, device):
    """Batches of a `StepBatches` order: workers live as long as the run; pinned for a GPU."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=one_thread,
        generator=torch.Generator().manual_seed(0),  # else making the iterator draws from the global generator
    )


def train(config, accelerator):
    """The whole run described by a config: data, model, loop, evaluation, checkpoints. Returns the metrics of the last evaluation."""
    out, options, main, device = Path(config.out), config.train, accelerator.is_main_process, accelerator.device
    world, rank = accelerator.num_processes, accelerator.process_index
    out.mkdir(parents=True, exist_ok=True)
    start_log(out, main)

    with accelerator.main_process_first():  # the main process renders the built-in world, the others find it there
        train_set = build_dataset(config.data, config.data.train, config.model.classes, config.model.size, True, config.seed)
        val_set = build_dataset(config.data, config.data.val, config.model.classes, config.model.size, False)
    config = dataclasses.replace(config, model=measure_priors(train_set, config.model))
    log.info(f"train: {train_set.summary()}")
    log.info(f"val: {val_set.summary()}")

    set_seed(config.seed)
    net = Detector(config.model)
    for line in load_weights(net, config.load_from) if config.load_from else ():
        log.info(line)
    optimizer = make_optimizer(net, options)
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    model, optimizer = accelerator.prepare(net, optimizer)
    average = ModelEmaV3(net, decay=options.ema, use_warmup=True) if options.ema else None
    published = average.module if average else net  # the weights that are evaluated and saved for prediction

    micro_batch = options.batch_size * world
    global_batch = micro_batch * options.accumulate
    per_epoch = math.ceil(len(train_set) / global_batch)
    total = options.steps or math.ceil(options.epochs * len(train_set) / global_batch)
    eval_steps = max(1, round(options.eval_every * per_epoch)) if options.eval_every else total
    progress = resume(config, net, published if average else None, optimizer.optimizer, accelerator, global_batch)
    start, best = progress.get("step", 0), progress.get("best")
    if main:
        (out / "config.json").write_text(json.dumps(to_dict(config), indent=1))
    if config.log_with:
        accelerator.init_trackers("deep3d", config={})
    log.info(
        f"{config.model.backbone}, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters; {world} process(es) on {device}, "
        f"mixed precision: {options.mixed_precision}; {total} steps of {global_batch} images, {per_epoch} an epoch"
    )

    order = StepBatches(len(train_set), micro_batch, rank, world, config.seed, start * options.accumulate, total * options.accumulate)
    batches = iter(make_loader(train_set, order, config.data.workers, device))
    weights, window = dataclasses.asdict(config.loss), Window()
    bad_steps, skipped, metrics = 0, 0, None
    model.train()
    for step in range(start, total):
        began, lr = time.perf_counter(), lr_at(step, total, options)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = lr * scale
        torch.manual_seed(seed_of(config.seed, step, rank))  # dropout and drop-path: a function of the step, so nothing to save
        for _ in range(options.accumulate):
            waiting = time.perf_counter()
            batch = next(batches)
            window.data_time += time.perf_counter() - waiting
            skipped += int((batch["skipped"] > 0).sum())
            batch = send_to_device(batch, device, non_blocking=True)
            with accelerator.accumulate(model):
                targets = assign(batch, config.model)
                batch["positives"] = accelerator.reduce(count_positives(targets), "mean").clamp(min=1)
                logits, raw = model(batch["image"], batch["K"])
                losses = compute_losses(net, logits, raw, targets, batch, config.loss)
                loss = sum(weights[name] * value for name, value in losses.items())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), options.clip)
                    bad_steps = 0 if torch.isfinite(norm) else bad_steps + 1  # equal on all processes after DDP's average
                    if not bad_steps or accelerator.scaler:  # fp16's scaler skips such a step itself, and must see it to lower its scale
                        optimizer.step()
                optimizer.zero_grad()
        if bad_steps:
            ids = [train_set.ids[i] for i in batch["index"].tolist()]
            report_bad_step(rank, losses, ids, step, bad_steps, options.max_bad_steps)
        else:
            window.add(losses, loss, norm)
            if average:
                average.update(net, step=step)
        window.time += time.perf_counter() - began

        done = step + 1
        if done % options.log_every == 0 and window.rows:
            log_window(accelerator, out, window, done, total, per_epoch, lr)
        if done % per_epoch == 0 and skipped:
            log.warning(f"{skipped} unreadable images were replaced in this epoch (data.skip_bad)")
            skipped = 0
        if done % eval_steps == 0 or done == total:
            metrics, predictions = evaluate_now(config, accelerator, published, val_set)
            best = after_evaluation(config, accelerator, metrics, published, done, step // per_epoch + 1, best)
            model.train()
        if (done % options.save_every == 0 or done == total) and main:
            meta = {"processes": world, "global_batch": global_batch, "best": best}
            state = (net, published if average else None, optimizer.optimizer)
            save_checkpoint(out / "checkpoints", done, *state, to_dict(config), meta, options.keep)
    if metrics is None:  # started again after the last step
        metrics, predictions = evaluate_now(config, accelerator, published, val_set)
    if main:
        draw_frames(val_set, metrics, predictions).save(out / "predictions.png")
        finish(config, metrics, start == total)
    accelerator.end_training()
    return metrics


def resume(config, net, average, optimizer, accelerator, global_batch):
    """Load the checkpoint that config.resume asks for. Returns its meta, empty for a new run. Raises ValueError when it must not go on."""
    checkpoints = Path(config.out) / "checkpoints"
    if config.resume == "none" and complete_checkpoints(checkpoints):
        raise ValueError(f"{config.out} holds checkpoints and resume=none; choose another out=, or delete it")
    named = config.resume not in ("auto", "none")
    found = [config.resume] if named else broadcast_object_list([[str(p) for p in complete_checkpoints(checkpoints)]])[0]
    for folder in found:
        try:
            meta = load_checkpoint(folder, net, average, optimizer)
        except ValueError as error:
            if named or folder == found[-1]:
                raise ValueError(f"{error}; nothing older is left (delete {checkpoints} to start anew)") from None
            log.warning(f"{error}; passing it over")
            continue
        if meta["global_batch"] != global_batch:
            raise ValueError(f"{folder}: its global batch was {meta['global_batch']} and is now {global_batch}: not the same run")
        change = f", {meta['processes']} -> {accelerator.num_processes} processes" * (meta["processes"] != accelerator.num_processes)
        log.info(f"resumed from {folder}{change}")
        return meta
    return {}


def report_bad_step(rank, losses, ids, step, bad_steps, most):
    """Name a step whose gradient was not finite, and stop after too many in a row."""
    broken = [name for name, value in losses.items() if not math.isfinite(value.item())]
    names = ", ".join(broken) or "all losses finite here"
    print(f"step {step} skipped: gradient not finite; process {rank}: {names}; frames {' '.join(ids)}", file=sys.stderr, flush=True)
    if bad_steps >= most:
        raise FloatingPointError(f"{bad_steps} steps in a row had no finite gradient (train.max_bad_steps), the last one at step {step}")


def evaluate_now(config, accelerator, model, dataset):
    """`evaluate` with the run's settings, on the main process's BatchNorm statistics: those are the ones that are saved."""
    for buffer in model.buffers():
        broadcast(buffer)
    return evaluate(model, dataset, accelerator, config.train.batch_size, config.data.workers, config.train.eval_repeat)


def after_evaluation(config, accelerator, metrics, model, step, epoch, best):
    """Log an evaluation and keep the weights when they are the best so far. Returns the best value of the main metric."""
    out, name, value = Path(config.out), config.best, main_metric(metrics, config.best)
    improved = best is None or value >= best
    best = value if improved else best
    record = {"mode": "val", "epoch": epoch, "step": step, name: value}
    write_log(accelerator, out, record, f"Epoch(val) [{epoch}] step {step}  {name}: {value:.2f}, best: {best:.2f}")
    if accelerator.is_main_process and improved:
        save_weights(out / "best", model, to_dict(config), {"step": step, "metric": name, "value": value, "metrics": metrics})
    return best


def finish(config, metrics, nothing_to_do):
    """The last words of a run: the table, the picture, and what to do next."""
    out = Path(config.out)
    example = next((p for p in sorted(Path(config.data.root).rglob("image_2/*")) if p.is_file()), "IMAGE.png")
    camera = f"--calib {str(example).replace('image_2', 'calib').rsplit('.', 1)[0]}.txt" if isinstance(example, Path) else "--hfov 80"
    print(
        f"\n{format_table(metrics)}\n\nground truth beside predictions: {out / 'predictions.png'}\n\nnext:\n"
        f"  accelerate launch evaluate.py {out}\n"
        f"  python predict.py {out} {example} {camera}\n"
        f"  accelerate launch train.py configs/kitti.py data.root=/data/kitti"
    )
    if nothing_to_do:
        print(f"(this run was finished before: out=runs/NAME starts another one, deleting {out} this one anew)")
    (out / "DONE").write_text("")


def parse_arguments(arguments):
    """Command line -> (config path, overrides, whether tracebacks are wanted); prints every key for --help."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="train.py [CONFIG.py] [key=value ...]", add_help=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    known = parser.parse_args(arguments)
    paths = [word for word in known.words if "=" not in word]
    if len(paths) > 1:
        raise ValueError(f"expected one config file, got {', '.join(paths)} (overrides are key=value)")
    path = Path(paths[0]) if paths else DEFAULT_CONFIG
    if known.help:
        print(f"{__doc__}\nkeys, with the values of {path.name}:\n{help_text(load_config(path))}\n\n--traceback  show where an error arose")
        sys.exit(0)
    return path, [word for word in known.words if "=" in word], known.traceback


def main(arguments=None):
    """Command line entry. User errors end with one sentence and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        path, overrides, _ = parse_arguments(arguments)
        config = load_config(path, overrides)
        accelerator = start_accelerator(config)
        use_cores(accelerator)
        train(config, accelerator)
    except (ValueError, KeyError, FloatingPointError, OSError) as error:
        if "--traceback" in arguments:
            raise
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        lines = text.strip().splitlines()  # a loader worker's error arrives with its traceback; the last line is the sentence
        print(f"error: {lines[-1] if lines else repr(error)}", file=sys.stderr, flush=True)
        sys.exit(3 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
