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
import re
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast, gather_object, send_to_device, set_seed
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, muon
from timm.utils import ModelEmaV3
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.utils.data import DataLoader

from checkpoint import amend_checkpoint, load_checkpoint, load_weights, save_checkpoint, save_weights
from config import help_text, load_config, to_dict
from data import StepBatches, build_dataset, collate, loading, seed_of, start_worker
from evaluate import Stopped, draw_frames, evaluate
from faults import REPLAY, Agreement, Signals, Statistics, lock_folder, poison, step_unless, watch_gradient, weights_finite, write_replay
from launch import follow_launcher, start_accelerator, use_cores
from losses import compute_losses, count_positives
from metrics import format_table, main_metric
from model import Detector
from resume import find_start
from targets import assign, measure_priors

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "synthetic.py"
LOST = re.compile("gloo|connection (closed|reset|refused)|watchdog", re.IGNORECASE)  # another process is gone
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


def start_log(out, main):
    """Log lines to the console and out/train.log on the main process, nothing elsewhere."""
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(out / "train.log")] if main else [logging.NullHandler()]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
    log.handlers, log.propagate = handlers, False
    log.setLevel(logging.INFO)


def memory_mb(device):
    """Peak memory of this process so far: on the GPU, or resident on the CPU, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Window:
    """What the next log line shows; stays on the device until `read`, the one sync of a window."""

    def __init__(self):
        self.rows, self.steps, self.time, self.data_time = [], [], 0.0, 0.0

    def add(self, step, parts, norm):
        """One step: {name: device scalar} of its micro-steps, the weighted sum under 'loss', and the gradient norm."""
        means = parts[0] if len(parts) == 1 else {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        self.rows.append({**means, "grad_norm": norm})
        self.steps.append(step)

    def read(self, accelerator):
        """What happened since the last reading, over all processes, and starts anew.

        Returns means {'data_time', 'time', each loss, 'loss', 'grad_norm'} over the steps that counted, empty without one, and
        [(step, process or None if unknown, {name: value of what is not finite})] of the others.
        """
        if not self.rows:
            return {}, []
        names, steps = list(self.rows[0]), self.steps
        table = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.rows])  # (steps, names)
        times = torch.tensor([self.data_time / len(steps), self.time / len(steps)], device=table.device)
        times = accelerator.reduce(times, "mean").tolist()
        table = accelerator.gather(table[None]).tolist()  # (processes, steps, names)
        self.__init__()
        good = [i for i in range(len(steps)) if math.isfinite(table[0][i][-1])]  # the norm is equal on all processes
        logged = [(n, name) for n, name in enumerate(names) if name != "gradient"] if good else []
        means = {name: np.mean([[rows[i][n] for i in good] for rows in table]).item() for n, name in logged}
        broken = []
        for i in sorted({*range(len(steps))} - {*good}):
            own = [name for name in names if name not in ("loss", "grad_norm")]  # the sum says nothing new, the norm is everybody's
            values = [{n: v for n, v in zip(names, rows[i], strict=True) if n in own and not math.isfinite(v)} for rows in table]
            guilty = [(steps[i], process, found) for process, found in enumerate(values) if found]
            broken += guilty or [(steps[i], None, {})]
        return means and {"data_time": times[0], "time": times[1], **means}, broken


def write_log(accelerator, out, record, line):
    """One console line, one line of log.jsonl, and the trackers."""
    log.info(line)
    if accelerator.is_main_process:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    accelerator.log({key: value for key, value in record.items() if isinstance(value, int | float)}, step=record["step"])


def log_window(accelerator, out, values, step, total, per_epoch, lr):
    """The line of a window's values, in mmdetection's form and keys."""
    epoch, place = divmod(step - 1, per_epoch)
    memory = memory_mb(accelerator.device)
    record = {"mode": "train", "epoch": epoch + 1, "iter": place + 1, "step": step, "lr": lr, "memory": memory, **values}
    eta = datetime.timedelta(seconds=int(values["time"] * (total - step)))
    losses = ", ".join(f"{name}: {value:.4f}" for name, value in values.items() if name.startswith("loss"))
    line = f"Epoch [{epoch + 1}][{place + 1}/{per_epoch}]  lr: {lr:.5f}, eta: {eta}, time: {values['time']:.3f}, "
    write_log(accelerator, out, record, f"{line}data_time: {values['data_time']:.3f}, memory: {memory}, {losses}")


def report_broken(broken, order, ids, accumulate, world):
    """Name the steps that were skipped. Returns the reports as `faults.write_replay` wants them."""
    reports = []
    for step, process, values in broken:
        ranks = range(world) if process is None else [process]  # a gradient can break behind the head, where nobody looks
        batches = [order.at(step * accumulate + part, rank) for rank in ranks for part in range(accumulate)]
        frames = [ids[index] for samples in batches for _, index in samples]
        reports.append({"step": step, "process": process, "losses": values, "frames": frames, "batches": batches})
        what = ", ".join(f"{name} {value}" for name, value in values.items()) or "all losses finite"
        who = "process unknown" if process is None else f"process {process}"
        log.warning(f"step {step + 1} skipped, its gradient is not finite; {who}: {what}; frames {' '.join(frames)}")
    return reports


def make_optimizer(model, options, device):
    """timm's optimizer of that name, fused where there is such; no weight decay on norms and biases. Raises ValueError if unknown."""
    names = list_optimizers()
    if options.optimizer not in names:
        near = difflib.get_close_matches(options.optimizer, names, n=3)
        raise ValueError(f"train.optimizer {options.optimizer!r} is unknown to timm{'; near it: ' + ', '.join(near) if near else ''}")
    info = get_optimizer_info(options.optimizer)
    chosen = {"betas": (0.9, options.beta2)} if info.num_betas == 2 else {}
    if issubclass(info.opt_class, torch.optim.Adam):
        chosen["fused"] = True  # can leave out a step without asking the host; SGD's would keep garbage from a first step left out
    if "muon" in options.optimizer and device.type == "cpu":  # timm iterates in bf16, which took this step ten times as long on a CPU
        muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    return create_optimizer_v2(model, opt=options.optimizer, lr=options.lr, weight_decay=options.weight_decay, **chosen)


def make_loader(dataset, order, workers, device):
    """Batches of a `StepBatches` order: workers live as long as the run; pinned for a GPU."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),  # else making the iterator draws from the global generator
    )


def train(config, accelerator):
    """The whole run described by a config: data, model, loop, evaluation, checkpoints.

    Returns the metrics of the last evaluation, or None when a signal stopped the run before its end.
    """
    out, main, device = Path(config.out), accelerator.is_main_process, accelerator.device
    world, rank = accelerator.num_processes, accelerator.process_index
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out) if main else None  # noqa: F841  held until this process ends
    start_log(out, main)

    with accelerator.main_process_first():  # the main process renders the built-in world, the others find it there
        train_set = build_dataset(config.data, config.data.train, config.model.classes, config.model.size, True, config.seed)
        val_set = build_dataset(config.data, config.data.val, config.model.classes, config.model.size, False)
    asked_batch = config.train.batch_size
    folder, progress, config = find_start(config, accelerator, len(train_set))
    config = dataclasses.replace(config, model=measure_priors(train_set, config.model))
    options = config.train
    log.info(f"train: {train_set.summary()}")
    log.info(f"val: {val_set.summary()}")

    set_seed(config.seed)
    net = Detector(config.model)
    for line in load_weights(net, config.load_from) if config.load_from and not folder else ():
        log.info(line)
    optimizer = make_optimizer(net, options, device)
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    model, optimizer = accelerator.prepare(net, optimizer)
    average = ModelEmaV3(net, decay=options.ema, use_warmup=True) if options.ema else None
    published = average.module if average else net  # the weights that are evaluated and saved for prediction
    if folder:
        load_checkpoint(folder, progress, net, published if average else None, optimizer.optimizer)
        if accelerator.scaler and progress["scaler"]:
            accelerator.scaler.load_state_dict(progress["scaler"])

    micro_batch = options.batch_size * world
    global_batch = micro_batch * options.accumulate
    per_epoch = math.ceil(len(train_set) / global_batch)
    total = options.steps or math.ceil(options.epochs * len(train_set) / global_batch)
    eval_steps = max(1, round(options.eval_every * per_epoch)) if options.eval_every else total
    start, best, evaluated = progress.get("step", 0), progress.get("best"), progress.get("evaluated", False)
    if main:
        (out / "config.json").write_text(json.dumps(to_dict(config), indent=1))
        (out / "STOPPED").unlink(missing_ok=True)
        if start < total:
            (out / "DONE").unlink(missing_ok=True)
    if config.log_with:
        accelerator.init_trackers("deep3d", config={})
    log.info(
        f"{config.model.backbone}, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters; {world} process(es) on {device}, "
        f"mixed precision: {options.mixed_precision}; {total} steps of {global_batch} images, {per_epoch} an epoch"
    )

    def save(done):
        if not main:
            return
        if not weights_finite(net, published):
            raise FloatingPointError(f"the weights are not finite after step {done}; they are not saved (lower train.lr?)")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        meta = {"processes": world, "global_batch": global_batch, "asked_batch": asked_batch, "frames": len(train_set)}
        meta.update(best=best, evaluated=False, scaler=scaler)
        state = (net, published if average else None, optimizer.optimizer)
        save_checkpoint(out / "checkpoints", done, *state, to_dict(config), meta, options.keep)

    def evaluate_now(done):
        """Metrics and predictions; the best value so far is noted in the checkpoint of this step, which is there already."""
        nonlocal best
        for buffer in published.buffers():
            broadcast(buffer)  # the main process's BatchNorm statistics: those are the ones that are saved
        workers, repeat = config.data.workers, options.eval_repeat
        metrics, predictions = evaluate(
            published, val_set, accelerator, options.batch_size, workers, repeat, stop=lambda: bool(signals.received)
        )
        best = after_evaluation(config, accelerator, metrics, published, done, math.ceil(done / per_epoch), best)
        own = out / "checkpoints" / f"step_{done:08d}"
        if main and own.is_dir():  # resume= may name one of another run
            amend_checkpoint(own, best=best, evaluated=True)
        return metrics, predictions

    order = StepBatches(len(train_set), micro_batch, rank, world, config.seed, start * options.accumulate, total * options.accumulate)
    loader = make_loader(train_set, order, config.data.workers, device)
    weights, window, agreement, statistics = dataclasses.asdict(config.loss), Window(), Agreement(device), Statistics(net)
    bad_steps = torch.zeros((), device=device)  # in a row
    metrics, stopped, reports, unreadable = None, False, [], []
    with Signals() as signals, loading(loader) as batches:
        try:
            if folder and not evaluated and (start % eval_steps == 0 or start == total):
                metrics, predictions = evaluate_now(start)  # the run was stopped while it evaluated
            model.train()
            for step in range(start, total):
                began, lr = time.perf_counter(), lr_at(step, total, options)
                for group, scale in zip(optimizer.param_groups, scales, strict=True):
                    group["lr"] = lr * scale
                torch.manual_seed(seed_of(config.seed, step, rank))  # dropout and drop-path: a function of the step, so nothing to save
                parts = []
                for _ in range(options.accumulate):
                    waiting = time.perf_counter()
                    batch = next(batches)
                    window.data_time += time.perf_counter() - waiting
                    unreadable += [
                        train_set.ids[i - k] for i, k in zip(batch["index"].tolist(), batch["skipped"].tolist(), strict=True) if k
                    ]
                    batch = send_to_device(batch, device, non_blocking=True)
                    with accelerator.accumulate(model):
                        targets = assign(batch, config.model)
                        asked = torch.full((), float(bool(signals.received)), device=device)
                        positives, asked = accelerator.reduce(torch.stack([count_positives(targets), asked]), "mean").unbind()
                        batch["positives"] = positives.clamp(min=1)
                        logits, raw = model(batch["image"], batch["K"])
                        losses = compute_losses(net, logits, raw, targets, batch, config.loss)
                        loss = sum(weights[name] * value for name, value in losses.items())
                        seen = watch_gradient(logits, raw)
                        accelerator.backward(loss * poison(loss))
                        shown = {name: value.detach() for name, value in losses.items()}
                        parts.append({**shown, "loss": loss.detach(), "gradient": sum(seen)})
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(model.parameters(), options.clip)  # after DDP's average: equal everywhere
                            broken = ~torch.isfinite(norm)
                            if accelerator.scaler:  # fp16's scaler leaves such a step out itself, and must see it to lower its scale
                                optimizer.step()
                            else:
                                step_unless(broken, optimizer.optimizer)
                        optimizer.zero_grad()
                statistics.settle(~broken)
                bad_steps = torch.where(broken, bad_steps + 1, 0)
                if average:
                    average.update(net, step=step)
                window.add(step, parts, norm)
                window.time += time.perf_counter() - began

                done = step + 1
                asked, bad_in_a_row = agreement.exchange(torch.stack([asked, bad_steps])) or (0, 0)
                stopped, failed = asked > 0, bad_in_a_row >= options.max_bad_steps
                last = stopped or failed or done == total
                if done % options.log_every == 0 or last:
                    values, broken_steps = window.read(accelerator)
                    reports += report_broken(broken_steps, order, train_set.ids, options.accumulate, world)
                    reports = [r for r in reports if r["step"] >= done - agreement.lag - bad_in_a_row]  # of the bad steps in a row
                    if values:
                        log_window(accelerator, out, values, done, total, per_epoch, lr)
                if failed:
                    fail(config, accelerator, net, reports, done - agreement.lag)
                if config.data.skip_bad and (done % per_epoch == 0 or last):
                    unreadable = report_unreadable(unreadable)
                due = done % eval_steps == 0 or done == total
                if due or stopped or done % options.save_every == 0:
                    save(done)
                if stopped:
                    accelerator.wait_for_everyone()  # a node whose processes have ended may end the job of one that still saves
                    raise Stopped
                if due:
                    metrics, predictions = evaluate_now(done)
                    model.train()
            if metrics is None:  # started again after the last step
                metrics, predictions = evaluate_now(total)
        except Stopped:
            log.info(f"stopped by {signals.received or 'a signal to another process'}, saved; the same command goes on")
            if main:
                (out / "STOPPED").write_text("")  # launchers hide exit codes
            accelerator.end_training()
            return None
    if main:
        draw_frames(val_set, metrics, predictions).save(out / "predictions.png")
        finish(config, metrics, start == total and evaluated)
    accelerator.end_training()
    return metrics


def report_unreadable(own):
    """Name the unreadable images that all processes have replaced. Returns a new list, empty."""
    ids = gather_object(own)
    if ids:
        log.warning(f"{len(ids)} unreadable images were replaced (data.skip_bad): {', '.join(sorted({*ids})[:20])}")
    return []


def fail(config, accelerator, net, reports, done):
    """Leave what replays the first of the broken steps in a row, and end every process with the same FloatingPointError."""
    first = reports[0]
    if accelerator.is_main_process:
        write_replay(config.out, to_dict(config), net, first)
    accelerator.wait_for_everyone()
    who = "an unknown process" if first["process"] is None else f"process {first['process']}"
    raise FloatingPointError(
        f"{config.train.max_bad_steps} steps in a row had no finite gradient, the last one is step {done}; "
        f"the first is step {first['step'] + 1}: {', '.join(first['losses']) or 'gradient'} on {who}, "
        f"frames {' '.join(first['frames'])}; to replay it: python replay.py {Path(config.out) / REPLAY}"
    )


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
    """Command line entry. User errors end with one sentence and exit code 2, a training that broke with 3."""
    arguments = sys.argv[1:] if arguments is None else arguments
    follow_launcher()
    try:
        path, overrides, _ = parse_arguments(arguments)
        config = load_config(path, overrides)
        options = config.train
        accelerator = start_accelerator(
            options.mixed_precision, options.accumulate, options.timeout, log_with=config.log_with or None, project_dir=config.out
        )
        use_cores(accelerator)
        train(config, accelerator)
    except (ValueError, KeyError, FloatingPointError, OSError) as error:
        if "--traceback" in arguments:
            raise
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        lines = text.strip().splitlines()  # a loader worker's error arrives with its traceback; the last line is the sentence
        explain(lines[-1] if lines else repr(error))
        sys.exit(3 if isinstance(error, FloatingPointError) else 2)
    except RuntimeError as error:  # collectives of gloo and NCCL have no class of their own
        if "--traceback" in arguments or not LOST.search(str(error)):
            tell_launcher(error)
            raise
        print(
            f"process {os.environ.get('RANK')} waited in vain for another process: {str(error).splitlines()[0]}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(4)
    except Exception as error:
        tell_launcher(error)
        raise
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)


def explain(sentence):
    """Print an error, and tell the launcher."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    tell_launcher(RuntimeError(sentence))


def tell_launcher(error):
    """Give an error to a launcher of several processes, whose own last lines then name it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


if __name__ == "__main__":
    main()
