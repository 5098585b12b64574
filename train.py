"""Train a monocular 3D detector: one plain loop on 1 CPU or many GPUs.

python train.py [CONFIG.py] [key=value ...]          one process     (--help lists every key)
accelerate launch --num_processes 8 train.py ...     many
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import math
import shlex
import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast, send_to_device, set_seed
from timm.utils import ModelEmaV3
from torch.distributed.elastic.multiprocessing.errors import record

from config import help_text, load_config
from data import StepBatches, build_dataset, change_colours, loading, seed_of
from engine.checkpoint import (
    find_start,
    handle_state,
    load_checkpoint,
    note_metrics,
    read_best,
    save_checkpoint,
    save_weights,
)
from engine.guard import Guard, Signals, Stopped, lock_folder, start_accelerator
from engine.log import Log, start_log
from engine.optimizer import find_optimizer, lr_at, make_optimizer, set_lr
from evaluate import calibrate, compute_metrics, evaluate, flat_metrics, format_metrics, read_metric
from losses import compute_losses, weighted_sum
from model import Detector, checkpoint_backbone
from scene.draw import draw_frames
from scene.frames import UserError, sentence_of
from targets import assign, measure_priors

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "synthetic.py"
logger = logging.getLogger("deep3d")


def train(config, accelerator, signals):
    """The whole run. Returns (metrics, predictions) of its last evaluation; None when a signal ended it, saved."""
    options, device, rank = config.train, accelerator.device, accelerator.process_index
    train_set, val_set = build_dataset(config, training=True), build_dataset(config, training=False)
    read_metric(compute_metrics(val_set, {}, config), config.best)  # a typo is told now
    folder, progress, config = find_start(config, train_set, accelerator)  # None, step 0; or the newest checkpoint's
    tune = importlib.import_module("engine.tune") if config.load_from and not folder else None  # other weights
    measured = measure_priors(train_set, config.model)  # the ModelConfig with mean sizes and depths of these labels
    config = dataclasses.replace(config, model=tune.inherit_priors(config, measured) if tune else measured)

    set_seed(config.seed)
    pretrained = config.model.pretrained and not folder  # a checkpoint replaces every weight
    net = Detector(dataclasses.replace(config.model, pretrained=pretrained))
    if tune:
        tune.load_weights(net, config.load_from)
    net.freeze(options.freeze)  # their BatchNorms' statistics, too
    if options.checkpoint_backbone:
        checkpoint_backbone(net)
    # Accelerate gets neither loader nor scheduler: its own start an epoch anew and step once a process. Here order,
    # learning rate and seeds are functions of (seed, step, process), so that a run goes on exactly where it was.
    model, optimizer = accelerator.prepare(net, make_optimizer(net, options))  # model is net, wrapped for its processes
    average = ModelEmaV3(net, decay=options.ema, use_warmup=True)  # the weights that predict; of decay 0 they are net's
    modules = average.module, net  # what save_state and load_state handle, whatever the number of processes
    handle_state(accelerator, modules)
    if folder:
        load_checkpoint(accelerator, folder, optimizer)
    find_targets, find_losses = assign, compute_losses
    if options.compile:
        net.compile(fullgraph=True)  # in place: names of weights stay
        find_targets, find_losses = torch.compile(assign, fullgraph=True), torch.compile(compute_losses, fullgraph=True)
    order = find_order(config, progress, train_set, rank)
    log, guard, result = Log(accelerator, config, order), Guard(accelerator, net, optimizer, options), None
    log.describe(net, train_set, val_set)
    with loading(train_set, order, config.data.workers, device, options.timeout) as loaded:
        if log.owes(folder):  # it was stopped while it evaluated, or is started after its end
            result = validate(config, accelerator, average.module, val_set, log, log.start)
        batches = log.timed(loaded)
        signals.defer()  # until the step is done, as a stop costs nothing before the first
        for step in range(log.start, log.total):
            lr = set_lr(optimizer, lr_at(step, log.total, options))
            torch.manual_seed(seed_of(config.seed, step, rank))  # dropout, drop path: nothing to save
            parts = [send_to_device(next(batches), device, non_blocking=True) for _ in range(options.accumulate)]
            targets = [find_targets(batch, config.model) for batch in parts]
            count = sum(target.positive.sum() for target in targets).float()  # losses are sums, divided by the mean
            positives = accelerator.reduce(count, "mean").clamp(min=1) / options.accumulate  # as DDP means gradients
            best_cells = step >= options.all_cells  # alone: an object learns where it is seen best
            for batch, target in zip(parts, targets, strict=True):
                with accelerator.accumulate(model):  # divides each part's loss by their number
                    logits, raw = model(change_colours(batch), batch["K"])  # colours that the loader has drawn
                    losses = find_losses(net, logits, raw, target, batch, config.loss, positives, best_cells)
                    loss = guard.watch(losses, weighted_sum(losses, config.loss), logits, raw)  # inf becomes NaN,
                    accelerator.backward(loss)  # which the mean over processes shows to all of them
            guard.judge(accelerator.clip_grad_norm_(model.parameters(), options.clip))  # where it is not finite
            optimizer.step()  # does nothing on any process, and BatchNorm's statistics are those of before
            optimizer.zero_grad()
            average.update(net, step=step)

            done = step + 1
            verdict = guard.verdict(done, signals.received)  # "", "stop" or "broken": the same on all
            if verdict or done % options.log_every == 0 or done == log.total:
                log.write(done, lr, guard.read())  # names the steps that did nothing: process, loss, frames
            if verdict == "broken":
                raise FloatingPointError(f"{guard.patience} steps in a row had no finite gradient, up to step {done}")
            with log.apart():
                if verdict or log.due(done) or done % options.save_every == 0:
                    save_checkpoint(accelerator, config, dataclasses.replace(progress, step=done), modules)
                if verdict:
                    return None
                if log.due(done):
                    signals.deliver()  # at once while it evaluates: all is saved
                    result = validate(config, accelerator, average.module, val_set, log, done)
                    signals.defer()
    finish(config, accelerator, val_set, log, *result)
    return result


def find_order(config, progress, train_set, rank):
    """The `StepBatches` of a process from where the run goes on to its end, after train.steps or train.epochs."""
    options, batch, frames, find = config.train, progress.global_batch, len(train_set), train_set.find
    total = options.steps or math.ceil(options.epochs * frames / batch - 1e-9)
    start, stop = progress.step * options.accumulate, total * options.accumulate  # parts of steps
    return StepBatches(frames, batch // options.accumulate, rank, progress.processes, config.seed, start, stop, find)


def validate(config, accelerator, detector, val_set, log, step):
    """Evaluate a `Detector` after a step, log it, and put it into best/ when it is the best so far.

    The checkpoint of that step, which is there already, gets the metrics. Returns (metrics, predictions).
    """
    for buffer in detector.buffers():
        broadcast(buffer)  # the main process's BatchNorm statistics: those are the ones that are saved
    metrics, predictions = evaluate(detector, val_set, accelerator, config)
    if not accelerator.is_main_process:
        return metrics, predictions
    out = Path(config.out)
    value = read_metric(metrics, config.best)
    counting = json.dumps([config.data.overlap, config.train.eval_repeat])
    about = {"metric": config.best, "data": val_set.digest(), "counting": counting}
    before = read_best(out / "best")
    sign = -1 if config.best.startswith("-") else 1
    same = all(before.get(key) == entry for key, entry in about.items())
    improved = not same or sign * value >= sign * before["value"]
    log.write_evaluation(step, value, value if improved else before["value"], flat_metrics(metrics))
    if improved:
        model = config.model if config.model.sigma_scale else calibrate(config.model, metrics)
        if model.sigma_scale:
            factors = ", ".join(map("{} {}".format, model.classes, model.sigma_scale))
            logger.info(f"factors of sigma in {out / 'best'}: {factors}")
        meta, table = {"step": step, "value": value, **about}, format_metrics(val_set, metrics)
        save_weights(out / "best", detector, dataclasses.replace(config, model=model), metrics, meta, table)
    checkpoint = out / "checkpoints" / f"step_{step:08d}"
    if checkpoint.is_dir():  # resume= may name one of another run
        note_metrics(checkpoint, metrics)
    return metrics, predictions


def finish(config, accelerator, val_set, log, metrics, predictions):
    """The last words of a run: the picture, the table, and what to do next."""
    out = Path(config.out)
    if accelerator.is_main_process:
        picture = draw_frames(val_set.frames, predictions, metrics, val_set.classes)
        picture.save(out / "predictions.png")
        for tracker in accelerator.trackers:
            tracker.show(picture, log.total)
        frame = val_set.frames[0]
        camera = " ".join(f"{frame.K[i]:.6g}" for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
        run, image = shlex.quote(str(out)), shlex.quote(str(frame.image)) if isinstance(frame.image, Path) else "PATH"
        print(f"\n{format_metrics(val_set, metrics)}\n\nground truth beside predictions: {out / 'predictions.png'}")
        print(f"\nnext:\n  python evaluate.py {run}\n  python predict.py {run} {image} --intrinsics {camera}")
        (out / "DONE").write_text("")
    accelerator.end_training()


def parse_arguments(arguments):
    """Command line -> (config path, overrides); prints every key for --help. Raises UserError for what is none."""
    usage = "train.py [CONFIG.py] [key=value ...]"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage, add_help=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    paths = [word for word in options.words if "=" not in word]
    if len(paths) > 1:
        raise UserError(f"expected one config file, got {', '.join(paths)} (overrides are key=value)")
    path = Path(paths[0]) if paths else DEFAULT_CONFIG
    if options.help:
        print(f"{__doc__}\nkeys, with the values of {path.name}:\n{help_text(load_config(path))}")
        print("\n--traceback  show where an error arose")
        sys.exit(0)
    return path, [word for word in options.words if "=" in word]


@record  # a launcher of several processes ends with the error that passes here first
def run(arguments):
    """One run in its folder, where STOPPED tells launch scripts that a signal ended it."""
    config = load_config(*parse_arguments(arguments))
    find_optimizer(config.train.optimizer)  # a typo is told before anything is read
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out}: no folder can be made there: {error.strerror}") from error
    accelerator = start_accelerator(config.train)
    if config.model.norm == "sync" and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise UserError("model.norm=sync needs GPUs: torch synchronises no statistics between processes on CPUs")
    tracking = contextlib.nullcontext()
    if config.log_with:
        tracking = importlib.import_module("engine.trackers").tracking(accelerator, config)
    with lock_folder(out, accelerator.is_main_process), tracking, Signals() as signals:
        if accelerator.is_main_process:
            (out / "STOPPED").unlink(missing_ok=True)  # now, as launch scripts start a run again that has it
        start_log(out, accelerator.is_main_process)
        try:
            if config.load_model:
                config = importlib.import_module("engine.tune").take_architecture(config)
            result = train(config, accelerator, signals)
        except Stopped:
            result = None
        if result is None:
            logger.info(f"stopped by {signals.received or 'a signal to another process'}; the same command goes on")
            (out / "STOPPED").touch()
            if accelerator.num_processes > 1 and not signals.waiting:
                sys.exit(1)  # the others may be at work, and wait for this one: upon this the launcher ends them


def main(arguments=None):
    """Command line entry. Exit code 2 after one sentence for a user's error or a broken training, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        run(arguments)
    except (UserError, FloatingPointError, OSError) as error:
        if "--traceback" in arguments:
            raise
        words = str(error) if isinstance(error, FloatingPointError) else sentence_of(error)
        print(f"error: {words} (--traceback shows where)", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
