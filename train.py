"""Train a monocular 3D detector: one plain loop on 1 CPU or many GPUs.

accelerate launch train.py [CONFIG.py] [key=value ...]     (--help lists every key)
"""

import argparse
import dataclasses
import difflib
import json
import logging
import math
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast, send_to_device, set_seed
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, muon
from timm.utils import ModelEmaV3
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from checkpoint import amend_checkpoint, load_checkpoint, load_weights, save_checkpoint, save_weights
from config import help_text, load_config, to_dict
from data import StepBatches, build_dataset, change_colours, loading, make_loader, seed_of
from evaluate import Stopped, draw_frames, evaluate
from faults import REPLAY, Agreement, Signals, Statistics, lock_folder, poison, step_unless, watch_gradient, weights_finite, write_replay
from launch import follow_launcher, start_accelerator, use_cores
from logbook import Window, log_window, report_broken, report_unreadable, start_log, write_log
from losses import compute_losses, count_positives, weighted_sum
from metrics import format_table, main_metric
from model import Detector, checkpoint_backbone
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


class Run:
    """One training run: its data, its model, how far it got, and one step of it. What outlives a step is in the checkpoint."""

    def __init__(self, config, accelerator):
        self.accelerator, self.out, self.main = accelerator, Path(config.out), accelerator.is_main_process
        self.world, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        with accelerator.main_process_first():  # the main process renders the built-in world, the others find it there
            self.train_set = build_dataset(config.data, config.data.train, config.model.classes, config.model.size, True, config.seed)
            self.val_set = build_dataset(config.data, config.data.val, config.model.classes, config.model.size, False)
        frames, self.asked_batch = len(self.train_set), config.train.batch_size
        folder, progress, config = find_start(config, accelerator, frames)
        self.config = config = dataclasses.replace(config, model=measure_priors(self.train_set, config.model))
        self.options = options = config.train
        log.info(f"train: {self.train_set.summary()}")
        log.info(f"val: {self.val_set.summary()}")

        set_seed(config.seed)
        pretrained = config.model.pretrained and not folder  # a checkpoint replaces every weight, and its node may not reach the hub
        self.net = net = Detector(dataclasses.replace(config.model, pretrained=pretrained))
        for line in load_weights(net, config.load_from) if config.load_from and not folder else ():
            log.info(line)
        optimizer = make_optimizer(net, options, self.device)
        self.scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self.model, self.optimizer = accelerator.prepare(net, optimizer)
        self.average = ModelEmaV3(net, decay=options.ema, use_warmup=True) if options.ema else None
        self.published = self.average.module if self.average else net  # the weights that are evaluated and saved for prediction
        self.assign, self.compute_losses = assign, compute_losses
        if options.compile:  # in place, so that names of weights stay; the average, a copy made before, is not compiled
            net.compile(fullgraph=True)
            self.assign, self.compute_losses = (torch.compile(f, fullgraph=True) for f in (assign, compute_losses))
        if options.checkpoint_backbone:
            checkpoint_backbone(net)
        if folder:
            load_checkpoint(folder, progress, *self.state())
            if accelerator.scaler and progress["scaler"]:
                accelerator.scaler.load_state_dict(progress["scaler"])
        self.statistics, self.bad_steps = Statistics(net), torch.zeros((), device=self.device)  # in a row

        micro_batch = options.batch_size * self.world
        self.global_batch = micro_batch * options.accumulate
        self.per_epoch = math.ceil(frames / self.global_batch)
        self.total = options.steps or math.ceil(options.epochs * frames / self.global_batch)
        self.eval_steps = max(1, round(options.eval_every * self.per_epoch)) if options.eval_every else self.total
        self.start, self.best, evaluated = progress.get("step", 0), progress.get("best"), progress.get("evaluated", False)
        self.due_at_start = bool(folder) and not evaluated and (self.start % self.eval_steps == 0 or self.start == self.total)
        self.finished_before = self.start == self.total and evaluated
        part = (self.start * options.accumulate, self.total * options.accumulate)
        self.order = StepBatches(frames, micro_batch, self.rank, self.world, config.seed, *part)
        self.unreadable = []
        log.info(
            f"{config.model.backbone}, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters; {self.world} process(es) on "
            f"{self.device}, mixed precision: {options.mixed_precision}; {self.total} steps of {self.global_batch} images, "
            f"{self.per_epoch} an epoch"
        )

    def state(self):
        """What a checkpoint holds: the network, its average or None, and the torch optimizer."""
        return self.net, self.average.module if self.average else None, self.optimizer.optimizer

    def open_folder(self):
        """Write the config, and take back what an earlier end of this run has said."""
        if self.main:
            (self.out / "config.json").write_text(json.dumps(to_dict(self.config), indent=1))
            (self.out / "STOPPED").unlink(missing_ok=True)
            if self.start < self.total:
                (self.out / "DONE").unlink(missing_ok=True)
        if self.config.log_with:
            self.accelerator.init_trackers("deep3d", config={})

    def learn(self, step, batches, window, stop):
        """One optimizer step of `accumulate` micro-steps; losses, gradient norm and the time spent waiting go into the window.

        Nothing waits for the device. A step whose gradient is not finite on any process is left out on all of them. Returns a device
        tensor (2,): the share of processes that want to stop, and how many steps in a row had no finite gradient.
        """
        accelerator, parts = self.accelerator, []
        self.lr = lr_at(step, self.total, self.options)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = self.lr * scale
        torch.manual_seed(seed_of(self.config.seed, step, self.rank))  # dropout and drop-path: a function of the step, nothing to save
        for _ in range(self.options.accumulate):
            batch = send_to_device(self.next_batch(batches, window), self.device, non_blocking=True)
            with accelerator.accumulate(self.model):
                targets = self.assign(batch, self.config.model)
                asked = torch.full((), float(stop), device=self.device)
                positives, asked = accelerator.reduce(torch.stack([count_positives(targets), asked]), "mean").unbind()
                batch["positives"] = positives.clamp(min=1)
                logits, raw = self.model(change_colours(batch), batch["K"])
                losses = self.compute_losses(self.net, logits, raw, targets, batch, self.config.loss)
                loss = weighted_sum(losses, self.config.loss)
                seen = watch_gradient(logits, raw)
                accelerator.backward(loss * poison(loss))
                parts.append({**{name: value.detach() for name, value in losses.items()}, "loss": loss.detach(), "gradient": sum(seen)})
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)  # after DDP's average: equal everywhere
                    broken = ~torch.isfinite(norm)
                    if accelerator.scaler:  # fp16's scaler leaves such a step out itself, and must see it to lower its scale
                        self.optimizer.step()
                    else:
                        step_unless(broken, self.optimizer.optimizer)
                self.optimizer.zero_grad()
        self.statistics.settle(~broken)
        self.bad_steps = torch.where(broken, self.bad_steps + 1, 0)
        if self.average:
            self.average.update(self.net, step=step)
        window.add(step, parts, norm)
        return torch.stack([asked, self.bad_steps])

    def next_batch(self, batches, window):
        """The next batch of the loader, on the host."""
        waiting = time.perf_counter()
        batch = next(batches)
        window.data_time += time.perf_counter() - waiting
        counts = zip(batch["index"].tolist(), batch["skipped"].tolist(), strict=True)
        self.unreadable += [self.train_set.ids[index - skipped] for index, skipped in counts if skipped]
        return batch

    def save(self, done):
        """Write the checkpoint of a step. Raises FloatingPointError rather than save weights that are not finite."""
        if not self.main:
            return
        if not weights_finite(self.net, self.published):
            raise FloatingPointError(f"the weights are not finite after step {done}; they are not saved (lower train.lr?)")
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        meta = {"processes": self.world, "global_batch": self.global_batch, "asked_batch": self.asked_batch, "frames": len(self.train_set)}
        meta.update(best=self.best, evaluated=False, scaler=scaler)
        save_checkpoint(self.out / "checkpoints", done, *self.state(), to_dict(self.config), meta, self.options.keep)

    def evaluate(self, done, stop):
        """Metrics and predictions; the best value so far is noted in the checkpoint of this step, which is there already."""
        for buffer in self.published.buffers():
            broadcast(buffer)  # the main process's BatchNorm statistics: those are the ones that are saved
        options, workers = self.options, self.config.data.workers
        metrics, predictions = evaluate(
            self.published, self.val_set, self.accelerator, options.batch_size, workers, options.eval_repeat, stop=stop
        )
        epoch = math.ceil(done / self.per_epoch)
        self.best = after_evaluation(self.config, self.accelerator, metrics, self.published, done, epoch, self.best)
        own = self.out / "checkpoints" / f"step_{done:08d}"
        if self.main and own.is_dir():  # resume= may name one of another run
            amend_checkpoint(own, best=self.best, evaluated=True)
        return metrics, predictions


def train(config, accelerator):
    """The whole run described by a config: data, model, loop, evaluation, checkpoints.

    Returns the metrics of the last evaluation, or None when a signal stopped the run before its end.
    """
    out, main = Path(config.out), accelerator.is_main_process
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out) if main else None  # noqa: F841  held until this process ends
    start_log(out, main)
    run = Run(config, accelerator)
    run.open_folder()
    loader = make_loader(run.train_set, run.order, config.data.workers, run.device)
    with Signals() as signals, loading(loader) as batches:
        try:
            metrics, predictions = loop(run, batches, signals)
        except Stopped:
            log.info(f"stopped by {signals.received or 'a signal to another process'}, saved; the same command goes on")
            if main:
                (out / "STOPPED").write_text("")  # launchers hide exit codes
            accelerator.end_training()
            return None
    if main:
        draw_frames(run.val_set, metrics, predictions).save(out / "predictions.png")
        finish(run.config, metrics, run.finished_before)
    accelerator.end_training()
    return metrics


def loop(run, batches, signals):
    """All steps from where the run stands to its end. Returns metrics and predictions of the last evaluation; raises `Stopped`."""
    accelerator, options, total = run.accelerator, run.options, run.total
    window, agreement, reports, evaluation = Window(), Agreement(run.device), [], None

    def stop():
        return bool(signals.received)

    if run.due_at_start:
        evaluation = run.evaluate(run.start, stop)  # the run was stopped while it evaluated
    run.model.train()
    for step in range(run.start, total):
        began = time.perf_counter()
        state = run.learn(step, batches, window, stop())
        window.time += time.perf_counter() - began

        done = step + 1
        asked, bad_in_a_row = agreement.exchange(state) or (0, 0)
        stopped, failed = asked > 0, bad_in_a_row >= options.max_bad_steps
        last = stopped or failed or done == total
        if done % options.log_every == 0 or last:
            values, broken = window.read(accelerator)
            reports += report_broken(broken, run.order, run.train_set.ids, options.accumulate, run.world)
            reports = [r for r in reports if r["step"] >= done - agreement.lag - bad_in_a_row]  # of the bad steps in a row
            if values:
                log_window(accelerator, run.out, values, done, total, run.per_epoch, run.lr)
                window.warn_of_waiting(run.config.data.workers)
        if failed:
            fail(run.config, accelerator, run.net, reports, done - agreement.lag)
        if run.config.data.skip_bad and (done % run.per_epoch == 0 or last):
            run.unreadable = report_unreadable(run.unreadable)
        due = done % run.eval_steps == 0 or done == total
        if due or stopped or done % options.save_every == 0:
            run.save(done)
        if stopped:
            accelerator.wait_for_everyone()  # a node whose processes have ended may end the job of one that still saves
            raise Stopped
        if due:
            evaluation = run.evaluate(done, stop)
            run.model.train()
    return evaluation or run.evaluate(total, stop)  # started again after the last step


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
