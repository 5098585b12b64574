"""Checkpoints that are complete or absent: Accelerate writes and reads them; this commits, verifies, chooses, and goes
on from them.

A checkpoint folder step_00001234 holds what `accelerator.save_state` writes (model.safetensors with the averaged
weights, which predict, model_1.safetensors with those that learn, optimizer.bin, with fp16 scaler.pt), config.json,
metrics.json once it was evaluated, and, written last, meta.json: progress, and the SHA-256 of every file. It is written
aside, synced and renamed. Nothing in it can carry code: optimizer.bin and scaler.pt are read by torch's weights_only
unpickler.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import pickle
import shutil
import textwrap
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import save_file

from config import build, changed_keys, read_config, to_dict
from scene.frames import UserError

MODEL, OPTIMIZER = "model.safetensors", "optimizer.bin"  # as Accelerate names them
CONFIG, METRICS, META = "config.json", "metrics.json", "meta.json"
PRIORS = ("size_prior", "depth_mean", "depth_std")  # keys of the model that are measured where they are empty
FOREIGN = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
           SafetensorError)  # fmt: skip  # of files that others wrote
logger = logging.getLogger("deep3d")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run got, and what it was: meta.json without the digests."""

    step: int = 0  # optimizer steps done
    processes: int = 1
    global_batch: int = 1  # images a step
    data: str = ""  # digest of data.train, `Detection3D.digest`


# ---- writing


def handle_state(accelerator, modules):
    """Have `save_state` and `load_state` handle these bare modules, named alike for any number of processes."""

    def save(_, weights, __):
        weights[:] = [module.state_dict() for module in modules]

    def load(models, _):
        models[:] = modules

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator, config, progress, modules):
    """Write out/checkpoints/step_<step> from all processes, and remove all but the newest train.keep.

    modules: of `handle_state`. Raises FloatingPointError on all processes when one of them has weights or statistics
    that are not finite; UserError, leaving the older checkpoints as they were, when the disk does not take it.
    """
    broken = torch.tensor(float(not weights_finite(modules)), device=accelerator.device)
    if accelerator.reduce(broken) > 0:  # agreed on before one of them waits for the others in vain
        raise FloatingPointError(f"weights not finite after step {progress.step} are not saved (lower train.lr?)")
    root = Path(config.out) / "checkpoints"
    aside = root / f".tmp_step_{progress.step:08d}"
    sentence = f"{root}: cannot write the checkpoint of step {progress.step}: {{}}; the older ones are whole"
    if accelerator.is_main_process:
        with writing(aside, sentence):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with writing(aside, sentence):
        accelerator.save_state(str(aside))  # every seed is a function of the step: nobody would read a process's own
        (aside / f"random_states_{accelerator.process_index}.pkl").unlink(missing_ok=True)
    accelerator.wait_for_everyone()  # save_state does not wait for the other processes
    if accelerator.is_main_process:
        with writing(aside, sentence):
            publish(aside, root / f"step_{progress.step:08d}", config, dataclasses.asdict(progress))
        for old in sorted(root.glob("step_*"))[: -config.train.keep]:
            doomed = old.with_name(".del_" + old.name)
            os.rename(old, doomed)  # a half-deleted folder must not look like a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)  # a network file system keeps files that somebody reads
    accelerator.wait_for_everyone()  # a node whose processes have ended may end the job of one that still saves


def save_weights(folder, detector, config, metrics, meta, table=""):
    """A folder for `Detector.from_pretrained`: weights, config.json, metrics.json, README.md; replaced as a whole.

    meta: what meta.json says of it, its step among others; table: of the metrics, for the model card. That is
    README.md, which its owner may edit: it has no digest.
    """
    folder = Path(folder)
    aside = folder.with_name(f".tmp_{folder.name}")
    with writing(aside, f"{folder}: cannot write the weights: {{}}"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        weights = {name: value.detach().contiguous() for name, value in detector.state_dict().items()}
        save_file(weights, aside / MODEL)
        (aside / METRICS).write_text(json.dumps(metrics, indent=1))
        sources = " and ".join(describe_source(source, config.data.root) for source in config.data.val)
        results = f"On {sources}, after {meta['step']} steps:\n\n```\n{table}\n```" if table else ""
        detector.generate_model_card(results).save(aside / "README.md")
        publish(aside, folder, config, meta)


def describe_source(source, root):
    """'kitti kitti (val)': kind, name and, of what is no single file, split of a `data.Source`."""
    place = Path(source.root or root)
    return f"{source.kind} {place.name}" + ("" if place.suffix == ".jsonl" else f" ({', '.join(source.split)})")


def note_metrics(folder, metrics):
    """Write metrics.json into a checkpoint: it was evaluated. It has no digest."""
    aside = Path(folder) / f".tmp_{METRICS}"
    aside.write_text(json.dumps(metrics, indent=1))
    sync(aside)
    os.replace(aside, Path(folder) / METRICS)


def weights_finite(modules):
    """Whether all floating-point weights and buffers are finite. Waits for the device once."""
    tensors = [t for module in modules for t in module.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())


@contextlib.contextmanager
def writing(aside, sentence):
    """A disk that does not take it leaves nothing behind but a `UserError` of that sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's full disk is a RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(sentence.format(textwrap.shorten(str(error), 300))) from error


def publish(aside, final, config, meta):
    """Add config.json and meta.json to a folder, sync it and rename it into place; then what stood there goes."""
    (aside / CONFIG).write_text(json.dumps(to_dict(config), indent=1))
    digests = {path.name: digest_of(path) for path in sorted(aside.iterdir()) if path.name != "README.md"}
    (aside / META).write_text(json.dumps({**meta, "sha256": digests}, indent=1))
    for path in [*aside.iterdir(), aside]:
        sync(path)
    old = final.with_name(f".old_{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(aside, final)
    shutil.rmtree(old, ignore_errors=True)
    sync(final.parent)


def sync(path):
    """Have a file or folder on the disk before going on."""
    if os.name == "nt":
        return  # Windows opens no folders, and needs a writable handle
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(path):
    """SHA-256 of a file, hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(root, names):
    """Undo what a killed process left half done to the folders of these names under root."""
    for path in Path(root).glob(f".old_{names}"):  # it was about to be replaced
        final = path.with_name(path.name.removeprefix(".old_"))
        if not final.exists():
            os.rename(path, final)
    for prefix in (".tmp_", ".del_", ".old_"):
        for path in Path(root).glob(prefix + names):
            shutil.rmtree(path, ignore_errors=True)


# ---- reading


def list_checkpoints(root):
    """Checkpoint folders under root, damaged ones too, newest first."""
    return sorted(Path(root).glob("step_*"), reverse=True)


def verify(folder, alone=False):
    """meta.json of a folder of weights whose files all have the content that was written, a dict without the digests.

    alone: no other files may lie there, which Accelerate might read. Raises UserError naming the folder and the file
    that is missing, damaged, or not of those that were written.
    """
    folder, name = Path(folder), META
    try:
        if (folder / META).is_file() and (folder / META).stat().st_size < 1_000_000:  # a pipe would hang
            meta = json.loads((folder / META).read_bytes())
            digests = meta.pop("sha256")
            others = {path.name for path in folder.glob("[!.]*") if not path.is_dir()} if alone else set()
            for name in sorted({*digests, *(others - {META, METRICS, "README.md"})}):
                if name not in digests:
                    raise UserError(f"{folder}: {name} is not among the files of {META}")
                if not (folder / name).exists():
                    raise UserError(f"{folder}: {name} is missing")
                beside = Path(name).name == name and (folder / name).is_file()
                if not beside or digest_of(folder / name) != digests[name]:
                    raise UserError(f"{folder}: {name} is damaged")
            return meta
    except UserError:
        raise
    except (*FOREIGN, RecursionError):
        pass
    state = "damaged" if (folder / META).exists() else "missing"
    raise UserError(f"{folder}: {META} is {state}")


def read_best(folder):
    """meta.json of a run's best/, {} where there is none that is whole."""
    try:
        return verify(folder)
    except UserError:
        return {}


def read_checkpoint(folder):
    """`Progress` and config (a dict) of a checkpoint folder that is whole. Raises UserError."""
    try:
        progress = build(verify(folder, alone=True), Progress, META)
        if min(progress.processes, progress.global_batch) < 1 or progress.step < 0:
            raise ValueError(f"{META}: {progress} is no run's progress")
        return progress, to_dict(read_config(Path(folder) / CONFIG))
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}{os.sep}")
        raise UserError(f"{folder}: cannot resume from this checkpoint: {reason}") from None


def load_checkpoint(accelerator, folder, optimizer):
    """Restore weights and moments from a verified checkpoint folder; the optimizer's settings stay those of the config.

    Raises UserError naming the folder when it belongs to another architecture.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        accelerator.load_state(str(folder))
        accelerator.step = 0  # a random_states file of a stranger could set it
        fused = getattr(optimizer.optimizer, "_step_supports_amp_scaling", False)
        for p, state in optimizer.state.items() if fused else ():  # such kernels would write beyond other shapes
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape != p.shape and (value.dim() or name != "step"):
                    raise ValueError(f"{OPTIMIZER}: {name} has another shape than its weights")
    except FOREIGN as error:
        advice = "; train.freeze, backbone_lr and a weight_decay of 0 make them: load_from= takes weights alone"
        reason = textwrap.shorten(str(error), 400) + advice * ("parameter group" in str(error))
        raise UserError(f"{folder}: cannot resume from this checkpoint: {reason}") from error
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def near(path, pattern="*"):
    """'; near it are ...' with the names beside a path that resemble it, or nothing."""
    beside = [p.name for p in path.parent.glob(pattern) if p.name[0] != "."]
    names = difflib.get_close_matches(path.name, beside, 3, 0.4)
    return f"; near it are {', '.join(names)}" if names else ""


# ---- going on


def find_start(config, train_set, accelerator):
    """Where config.resume says to go on: (checkpoint folder or None, `Progress`, the config with priors from there).

    The main process chooses, and tells the others. Raises UserError where the run cannot go on.
    """
    now = Progress(
        processes=accelerator.num_processes,
        global_batch=config.train.batch_size * accelerator.num_processes * config.train.accumulate,
        data=train_set.digest(),
    )
    chosen = choose_checkpoint(config) if accelerator.is_main_process else None
    folder, then, before = broadcast_object_list([chosen])[0]
    if folder is None:
        return None, now, config
    if before["train"]["optimizer"] != config.train.optimizer:
        moments = f"moments of {before['train']['optimizer']} do not fit {config.train.optimizer}"
        raise UserError(f"{folder}: {moments}; load_from= takes weights alone")
    new = to_dict(config)
    alike = all(before["model"][key] == new["model"][key] for key in ("classes", "strides"))  # as many priors
    old = {name: tuple(before["model"][name]) for name in PRIORS if alike and not getattr(config.model, name)}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **old))
    kept = all(before["train"][key] == getattr(config.train, key) for key in ("batch_size", "accumulate"))
    now = dataclasses.replace(now, step=then.step, global_batch=then.global_batch if kept else now.global_batch)
    if now.global_batch % (now.processes * config.train.accumulate):
        shares = f"{now.processes} processes with train.accumulate={config.train.accumulate}"
        raise UserError(f"{folder}: its global batch of {now.global_batch} does not divide over {shares}")
    changes = changed_keys(before, to_dict(config))
    for name, words in (("processes", "processes"), ("global_batch", "images a step")):
        if getattr(then, name) != getattr(now, name):
            changes.append(f"{words}: {getattr(then, name)} -> {getattr(now, name)}")
    batch, at_once = config.train.batch_size, now.global_batch // (now.processes * config.train.accumulate)
    if at_once != batch and then.processes != now.processes:
        changes.append(f"images per process at once: {batch} -> {at_once} (train.accumulate= parts them)")
    if then.data != now.data:
        changes.append("frames of data.train: their number, order, labels or cameras")
    if changes:
        logger.warning(f"changed since the checkpoint: {'; '.join(changes)}")
    logger.info(f"resumed from {folder}")
    return folder, now, config


def choose_checkpoint(config):
    """(folder, its `Progress`, its config as a dict) of the newest whole checkpoint; three times None at a start.

    Damaged ones are named, passed over and set aside, or they would count as newer than those to come. Raises UserError
    where all are damaged.
    """
    root = Path(config.out) / "checkpoints"
    remove_leftovers(root, "step_*")
    remove_leftovers(config.out, "best")
    folders = list_checkpoints(root)
    if config.resume == "none" and folders:
        raise UserError(f"{config.out} holds checkpoints and resume=none; choose another out=, or delete it")
    if config.resume not in ("auto", "none") and not folders:  # once begun, the run goes on from its own
        folders = [find_named(config.resume)]
    for folder in folders:
        try:
            chosen = folder, *read_checkpoint(folder)
            for newer in folders[: folders.index(folder)]:
                aside = newer.with_name(f"damaged_{newer.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(newer, aside)
            return chosen
        except UserError as error:
            if folder == folders[-1]:
                advice = f" (delete {root} to start anew)" if root.exists() else ""
                raise UserError(f"{error}; nothing older is left{advice}") from None
            logger.warning(f"{error}; passing it over")
    return None, None, None


def find_named(resume):
    """The checkpoint folder that config.resume names. Raises UserError where there is none, or a run's folder."""
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"resume={resume}: no such folder{near(path)}")
    if newest := list_checkpoints(path / "checkpoints"):
        raise UserError(f"resume={resume} is a run, expected one of its checkpoints; the newest is {newest[0]}")
    return path
