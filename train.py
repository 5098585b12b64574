"""Train a monocular 3D detector: one plain loop on 1 CPU or many GPUs.

python train.py [CONFIG.py] [key=value ...]          one process     (--help lists every key)
accelerate launch --num_processes 8 train.py ...     many
"""

import argparse
import dataclasses
import json
import logging
import math
import re
import shlex
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast, send_to_device, set_seed
from torch.distributed.elastic.multiprocessing.errors import record

from config import help_text, load_config, to_dict
from data import (
    StepBatches,
    UserError,
    build_dataset,
    change_colours,
    disk_is_full,
    loading,
    make_loader,
    seed_of,
    unread,
    user_errors,
)
from engine.checkpoint import (
    Progress,
    amend_checkpoint,
    find_start,
    find_weights,
    inherit_priors,
    load_checkpoint,
    load_weights,
    read_source,
    save_checkpoint,
    save_weights,
    share_state,
    take_architecture,
)
from engine.guard import (
    Guard,
    Signals,
    Stopped,
    Window,
    crosses,
    fail,
    find_tracker,
    lock_folder,
    log_window,
    report_broken,
    report_unreadable,
    show_picture,
    start_accelerator,
    start_log,
    start_trackers,
    weights_finite,
    write_log,
)
from engine.optimizer import Average, find_optimizer, lr_at, make_optimizer, set_lr
from evaluate import blank_metrics, calibrate, evaluate, flat_metrics, format_metrics, read_metric
from losses import compute_losses, count_positives, weighted_sum
from model import Detector, checkpoint_backbone
from scene.draw import draw_frames
from targets import assign, measure_priors

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "synthetic.py"
LOST = re.compile("gloo|connection (closed|reset|refused)|watchdog", re.IGNORECASE)  # another process is gone
log = logging.getLogger("deep3d")


def train(config, accelerator):
    """The whole run described by a config: data, model, loop, evaluation, checkpoints.

    Returns the metrics of the last evaluation, or None when a signal stopped the run before its end.
    """
    out, device, rank = Path(config.out), accelerator.device, accelerator.process_index
    with user_errors():
        out.mkdir(parents=True, exist_ok=True)
    with Signals(out, accelerator.is_main_process) as signals, lock_folder(out, accelerator.is_main_process):
        if accelerator.is_main_process:
            (out / "STOPPED").unlink(missing_ok=True)  # now, as launch scripts start a run again that has it
        start_log(out, accelerator.is_main_process)

        with user_errors():
            find_optimizer(config.train.optimizer)  # a typo is told now
            config = take_architecture(config)
            with (
                accelerator.main_process_first()
            ):  # the main process renders the built-in world, the others find it there
                shape, extra = (
                    (config.model.classes, config.model.size),
                    (config.model.velocity, config.model.attribute_names),
                )
                train_set = build_dataset(config.data, config.data.train, *shape, True, config.seed, *extra)
                val_set = build_dataset(config.data, config.data.val, *shape, False)
            read_metric(blank_metrics(val_set, config), config.best)  # a typo is told now
            now = Progress(
                processes=accelerator.num_processes,
                global_batch=config.train.batch_size * accelerator.num_processes * config.train.accumulate,
                asked_batch=config.train.batch_size,
                frames=len(train_set),
                train_digest=train_set.digest(),
                val_digest=val_set.digest(),
            )
            if config.model.norm == "sync" and now.processes > 1 and device.type == "cpu":
                raise ValueError(
                    "model.norm=sync needs GPUs: torch synchronises no statistics between processes on CPUs"
                )
            folder, progress, config = find_start(config, accelerator, now)
            source = find_weights(config.load_from) if config.load_from and not folder else None
            measured = measure_priors(train_set, config.model)
            config = dataclasses.replace(
                config, model=inherit_priors(config.model, measured, read_source(source) if source else None)
            )
            options = config.train
            log.info(f"train: {train_set.summary()}")
            log.info(f"val: {val_set.summary()}")

        set_seed(config.seed)
        pretrained = (
            config.model.pretrained and not folder
        )  # a checkpoint replaces every weight, and its node may not reach the hub
        with user_errors("model."):
            net = Detector(dataclasses.replace(config.model, pretrained=pretrained))
        with user_errors():
            for line in load_weights(net, source) if source else ():
                log.info(line)
            net.freeze(options.freeze)
            optimizer = make_optimizer(net, options)
            model, optimizer = accelerator.prepare(net, optimizer)
            average = Average(net, decay=options.ema, use_warmup=True) if options.ema else None
            published = average.module if average else net  # the weights that are evaluated and saved for prediction
            share_state(accelerator, net, average and average.module)
            if options.checkpoint_backbone:
                checkpoint_backbone(net, compiled=options.compile)
            if folder:
                load_checkpoint(accelerator, folder, optimizer, averaged=bool(average))

        find_targets, find_losses = assign, compute_losses
        if options.compile:  # in place, so that names of weights stay; the average, a copy made before, is not compiled
            net.compile(fullgraph=True)
            find_targets, find_losses = (
                torch.compile(function, fullgraph=True) for function in (assign, compute_losses)
            )

        start, global_batch, frames, evaluated = (
            progress.step,
            progress.global_batch,
            len(train_set),
            progress.evaluated,
        )
        steps_per_epoch = frames / global_batch
        total = options.steps or math.ceil(options.epochs * steps_per_epoch)
        if start > total:
            raise UserError(f"{folder}: it has {start} steps, and this run would end after {total}")
        if options.warmup > total / 2:
            log.warning(
                f"train.warmup={options.warmup} is more than half of the {total} steps: the learning rate hardly reaches train.lr"
            )
        period, evaluation, reports, unreadable = options.eval_every * steps_per_epoch, None, [], []
        log.info(
            f"{config.model.backbone}, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, "
            f"{sum(p.numel() for p in net.parameters() if not p.requires_grad) / 1e6:.1f} M of them frozen; {now.processes} process(es) on "
            f"{device}, mixed precision: {options.mixed_precision}; {total} steps of {global_batch} images, {steps_per_epoch:g} an epoch"
        )
        open_folder(accelerator, config, unfinished=start < total)

        # Not Accelerate's: loader and order, learning rate and seeds are functions of (seed, step, process), so that a run goes on exactly.
        ahead = (start * options.accumulate, total * options.accumulate)
        order = StepBatches(frames, global_batch // options.accumulate, rank, now.processes, config.seed, *ahead)
        window = Window()
        guard = Guard(accelerator, net, optimizer, window, signals, options.max_bad_steps)
        stop = lambda: bool(signals.received)  # noqa: E731
        with loading(make_loader(train_set, order, config.data.workers, device, options.timeout)) as batches:
            accelerator.wait_for_everyone()  # a signal stops all at once until here, and all behind a step from here on
            signals.saving = True
            if (
                folder and not progress.evaluated and (crosses(start, period) or start == total)
            ):  # it was stopped while it evaluated
                evaluation, progress = validate(config, accelerator, published, val_set, progress, stop)
            model.train()
            window.rest()
            for step in range(start, total):
                lr = set_lr(optimizer, lr_at(step, total, options))
                torch.manual_seed(
                    seed_of(config.seed, step, rank)
                )  # dropout and drop-path: a function of the step, nothing to save
                waiting = time.perf_counter()
                loaded = [next(batches) for _ in range(options.accumulate)]
                window.data_time += time.perf_counter() - waiting
                unreadable += [train_set.ids[index] for batch in loaded for index in unread(batch)]
                parts = [send_to_device(batch, device, non_blocking=True) for batch in loaded]
                targets = [find_targets(batch, config.model) for batch in parts]
                positives = (
                    guard.mean(sum(map(count_positives, targets))) / options.accumulate
                )  # Accelerate divides by that, too
                for batch, target in zip(parts, targets, strict=True):
                    with accelerator.accumulate(model):
                        logits, raw = model(change_colours(batch), batch["K"])
                        losses = find_losses(
                            net, logits, raw, target, batch, config.loss, positives, step >= options.all_cells
                        )
                        loss = guard.watch(losses, weighted_sum(losses, config.loss), logits, raw)
                        accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(
                    model.parameters(), options.clip
                )  # after DDP's average: equal on all processes
                guard.step(step, norm)
                optimizer.zero_grad()
                if average:
                    average.update(net, step=step)
                stopped, failed = guard.verdict()
                window.tick()

                done = step + 1
                last = stopped or failed or done == total
                if done % options.log_every == 0 or last:
                    values, broken = window.read(accelerator)
                    reports += report_broken(broken, order, train_set.ids, options.accumulate, now.processes)
                    if values:
                        left = window.seconds_left(total - done)
                        log_window(accelerator, out, values, done, steps_per_epoch, lr, left)
                        window.warn_of_waiting(config.data.workers)
                if failed:
                    fail(out, to_dict(config), accelerator, net, reports, done - guard.lag)
                if config.data.skip_bad and (crosses(done, steps_per_epoch) or last):
                    unreadable = report_unreadable(unreadable)
                due = crosses(done, period) or done == total
                saving = due or stopped or done % options.save_every == 0
                if saving:
                    progress = dataclasses.replace(progress, step=done, evaluated=False)
                    save(config, accelerator, progress, net, published)
                if stopped:
                    accelerator.wait_for_everyone()  # a node whose processes have ended may end the job of one that still saves
                    raise Stopped
                if due:
                    evaluation, progress = validate(config, accelerator, published, val_set, progress, stop)
                    model.train()
                if saving:
                    window.rest()
            if evaluation is None:  # started again after the last step
                evaluation, progress = validate(config, accelerator, published, val_set, progress, stop)
        finish(config, accelerator, val_set, progress, *evaluation, nothing_to_do=evaluated and start == total)
        return evaluation[0]


def open_folder(accelerator, config, unfinished):
    """Write the config, take back what an earlier end of this run has said, and tell the trackers."""
    out = Path(config.out)
    if accelerator.is_main_process:
        (out / "config.json").write_text(json.dumps(to_dict(config), indent=1))
        if unfinished:
            (out / "DONE").unlink(missing_ok=True)
    if config.log_with:
        start_trackers(accelerator, out, config)


def save(config, accelerator, progress, net, published):
    """Write the checkpoint of a step. Raises FloatingPointError rather than save weights that are not finite."""
    if not weights_finite(net, published):
        raise FloatingPointError(
            f"the weights are not finite after step {progress.step}; they are not saved (lower train.lr?)"
        )
    save_checkpoint(accelerator, Path(config.out) / "checkpoints", to_dict(config), progress, config.train.keep)


def validate(config, accelerator, model, val_set, progress, stop):
    """Evaluate, log, keep the weights when they are the best so far, and note it in the checkpoint of this step, which is there already.

    Returns (metrics, predictions) and the new `Progress`.
    """
    out, name, step = Path(config.out), config.best, progress.step
    for buffer in model.buffers():
        broadcast(buffer)  # the main process's BatchNorm statistics: those are the ones that are saved
    metrics, predictions = evaluate(model, val_set, accelerator, config, stop=stop)
    value, lower = read_metric(metrics, name), name.startswith("-")
    improved = not progress.best_metric or (value <= progress.best if lower else value >= progress.best)
    progress = dataclasses.replace(
        progress, best_metric=name, best=value if improved else progress.best, evaluated=True
    )
    epoch = math.ceil(step * progress.global_batch / progress.frames - 1e-9)
    line = f"Epoch(val) [{epoch}] step {step}  {name}: {value:.4f}, best: {progress.best:.4f}"
    write_log(accelerator, out, {"mode": "val", "epoch": epoch, "step": step, name: value}, line, flat_metrics(metrics))
    if accelerator.is_main_process:
        if improved:
            about = {"step": step, "metric": name, "value": value}
            told = (
                config
                if config.model.sigma_scale
                else dataclasses.replace(config, model=calibrate(config.model, metrics))
            )
            if factors := told.model.sigma_scale:
                log.info(
                    f"factors of sigma in {out / 'best'}: {', '.join(map('{} {}'.format, told.model.classes, factors))}"
                )
            save_weights(out / "best", model, to_dict(told), metrics, about, format_metrics(metrics))
        own = out / "checkpoints" / f"step_{step:08d}"
        if own.is_dir():  # resume= may name one of another run
            amend_checkpoint(own, metrics, best_metric=name, best=progress.best, evaluated=True)
    return (metrics, predictions), progress


def finish(config, accelerator, val_set, progress, metrics, predictions, nothing_to_do):
    """The last words of a run: the picture, the table, and what to do next."""
    out = Path(config.out)
    if accelerator.is_main_process:
        picture = draw_frames(val_set.frames, predictions, metrics, val_set.classes)
        picture.save(out / "predictions.png")
        show_picture(accelerator, picture, progress.step)
        frame = val_set.frames[0]
        own, camera = shlex.quote(str(out)), " ".join(f"{frame.K[i]:.6g}" for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
        print(
            f"\n{format_metrics(metrics)}\n\nground truth beside predictions: {out / 'predictions.png'}\n\nnext:\n"
            f"  python evaluate.py {own}\n  python predict.py {own} {shlex.quote(str(frame.image))} --intrinsics {camera}"
        )
        if nothing_to_do:
            print(f"(this run was finished before: out=runs/NAME starts another one, deleting {out} this one anew)")
        (out / "DONE").write_text("")
    accelerator.end_training()


def parse_arguments(arguments):
    """Command line -> (config path, overrides); prints every key for --help. Raises ValueError for what is no such command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="train.py [CONFIG.py] [key=value ...]", add_help=False
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    known = parser.parse_args(arguments)
    paths = [word for word in known.words if "=" not in word]
    if len(paths) > 1:
        raise ValueError(f"expected one config file, got {', '.join(paths)} (overrides are key=value)")
    path = Path(paths[0]) if paths else DEFAULT_CONFIG
    if known.help:
        print(
            f"{__doc__}\nkeys, with the values of {path.name}:\n{help_text(load_config(path))}\n\n--traceback  show where an error arose"
        )
        sys.exit(0)
    return path, [word for word in known.words if "=" in word]


class LostProcess(RuntimeError):
    """Another process hangs or is gone: the error to look for is not this one's."""


@record  # a launcher of several processes ends with the error that passes here first
def run(arguments):
    """The command line, up to its errors. Raises LostProcess where a collective of gloo or NCCL gives up: those errors have no class."""
    with user_errors():
        config = load_config(*parse_arguments(arguments))
        options = config.train
        accelerator = start_accelerator(
            options.mixed_precision,
            options.accumulate,
            options.timeout,
            log_with=find_tracker(config.log_with),
            project_dir=config.out,
        )
    try:
        train(config, accelerator)
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise UserError(f"{config.out}: {error}; with room there the same command goes on") from error
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise LostProcess(
            f"process {accelerator.process_index} of {accelerator.num_processes} is well, and waited in vain for another, which hangs or "
            f"has ended: its last words, above, tell why ({str(error).splitlines()[0]})"
        ) from error


def main(arguments=None):
    """Command line entry. Exit code 2 after one sentence for a user's error, 3 for a training that broke, 4 when a process was lost."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        run(arguments)
    except (UserError, FloatingPointError) as error:
        if "--traceback" in arguments:
            raise
        told = f"{error.sentence} (--traceback shows where)" if isinstance(error, UserError) else error
        print(f"error: {told}", file=sys.stderr, flush=True)
        sys.exit(3 if isinstance(error, FloatingPointError) else 2)
    except LostProcess as error:
        if "--traceback" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(4)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
