"""Checkpoints that are complete or absent: Accelerate writes and reads them; this commits, verifies, chooses, and goes on from them.

A checkpoint folder step_00001234 holds what `accelerator.save_state` writes (model.safetensors with the weights that predict,
model_1.safetensors with those that learn where an average is kept, optimizer.bin, with fp16 scaler.pt), config.json, metrics.json once
it was evaluated, and meta.json: progress, and the SHA-256 of every file, its own content included. It is written aside, synced and
renamed. Nothing in it can carry code: optimizer.bin and scaler.pt are read by torch's weights_only unpickler.
"""

import collections
import contextlib
import dataclasses
import difflib
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import textwrap
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import build, changed_keys, override, read_config, to_dict
from data import UserError
from model import Detector, ModelConfig

MODEL, RAW, OPTIMIZER = "model.safetensors", "model_1.safetensors", "optimizer.bin"  # as Accelerate names them
CONFIG, METRICS = "config.json", "metrics.json"
META = "meta.json"  # of a folder of weights: what is told of it, and the SHA-256 of its files and of itself
PRIORS = ("size_prior", "depth_mean", "depth_std")  # keys of the model that are measured where they are empty
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
FOREIGN = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)
log = logging.getLogger("deep3d")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run got, and what it was: the entries of meta.json beside the digests."""

    step: int = 0  # optimizer steps done
    processes: int = 1
    global_batch: int = 1
    asked_batch: int = 1  # train.batch_size as it was asked for
    frames: int = 0  # of data.train
    train_digest: str = ""  # of its labels, cameras and order, `Detection3D.digest`
    val_digest: str = ""
    best_metric: str = ""  # name that `best` belongs to; empty: none yet
    best: float = 0.0
    evaluated: bool = False  # after this step

    def __post_init__(self):
        if min(self.processes, self.global_batch, self.asked_batch) < 1 or min(self.step, self.frames) < 0:
            raise ValueError(
                f"step {self.step}, {self.processes} processes, global batch {self.global_batch}: not a run's progress"
            )


# ---- writing


def share_state(accelerator, net, average):
    """Have `save_state` and `load_state` handle the published weights first, then the raw ones where they differ.

    net: the bare `Detector`, whose names do not depend on the number of processes; average: the module of averaged weights, or None.
    """
    modules = [net] if average is None else [average, net]

    def save(_, weights, __):
        weights[:] = [module.state_dict() for module in modules]

    def load(models, _):
        models[:] = modules

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


@contextlib.contextmanager
def writing(aside, sentence):
    """A disk that does not take it leaves nothing behind but a `UserError` of that sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's full disk is a RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(sentence.format(textwrap.shorten(str(error), 300))) from error


def save_checkpoint(accelerator, root, config, progress, keep):
    """Write root/step_<step> from all processes, and remove all but the newest `keep`. config: a dict.

    Raises UserError, leaving the older checkpoints as they were, when the disk does not take it.
    """
    root = Path(root)
    aside = root / f".tmp_step_{progress.step:08d}"
    sentence = f"{root}: cannot write the checkpoint of step {progress.step}: {{}}; the older ones are whole"
    if accelerator.is_main_process:
        with writing(aside, sentence):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with writing(aside, sentence):
        accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()  # save_state does not wait for the other processes
    if not accelerator.is_main_process:
        return
    with writing(aside, sentence):
        for path in aside.glob("random_states_*.pkl"):
            path.unlink()  # every seed is a function of the step: nobody would read them
        (aside / CONFIG).write_text(json.dumps(config, indent=1))
        write_meta(aside, dataclasses.asdict(progress), [path.name for path in aside.iterdir()])
        _publish(aside, root / f"step_{progress.step:08d}")
    for old in sorted(root.glob("step_*"))[:-keep]:
        doomed = old.with_name(".del_" + old.name)
        os.rename(old, doomed)  # a half-deleted folder must not look like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)  # a network file system keeps files that somebody reads


def save_weights(folder, model, config, metrics, meta, table=""):
    """A folder for `Detector.from_pretrained`: config.json, model.safetensors, metrics.json and their digests; replaced as a whole.

    Beside them lies README.md, the model card with that table of the metrics, which its owner may edit: it has no digest.
    """
    folder = Path(folder)
    aside = folder.with_name(f".tmp_{folder.name}")
    with writing(aside, f"{folder}: cannot write the weights: {{}}"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, aside / MODEL)
        (aside / CONFIG).write_text(json.dumps(config, indent=1))
        (aside / METRICS).write_text(json.dumps(metrics, indent=1))
        results = _measured(config["data"]["val"], meta, table) if table else ""
        model.generate_model_card(results).save(aside / "README.md")
        write_meta(aside, meta, [MODEL, CONFIG, METRICS])
        _publish(aside, folder)


def _measured(sources, meta, table):
    """A table of metrics as Markdown, with the data (`Source`s as dicts) and the step that it was measured on."""
    names = []
    for source in sources:
        split = [] if source["kind"] == "jsonl" else [f"({', '.join(source['split'])})"]
        names.append(" ".join([source["kind"], *Path(source["root"]).parts[-1:], *split]))
    return f"On {' and '.join(names)}, after {meta['step']} steps:\n\n```\n{table}\n```"


def amend_checkpoint(folder, metrics, **changes):
    """Note an evaluation in a checkpoint: its metrics.json, which is not digested, then entries of its meta, at once or not at all."""
    folder = Path(folder)
    meta = {**read_meta(folder), **changes}
    names = [*meta.pop("sha256")]
    (folder / METRICS).write_text(json.dumps(metrics, indent=1))
    _sync(folder / METRICS)
    write_meta(folder, meta, names, ".tmp_meta")
    _sync(folder / ".tmp_meta")
    os.replace(folder / ".tmp_meta", folder / META)
    _sync(folder)


def _sync(path):
    if os.name == "nt":
        return  # Windows opens no folders, and needs a writable handle
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(aside, final):
    """Sync a folder's files and rename it into place; what stood there before is removed only then."""
    for path in [*aside.iterdir(), aside]:
        _sync(path)
    if final.exists():
        old = final.with_name(f".old_{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(aside, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(aside, final)
    _sync(final.parent)


# ---- reading


def read_meta(folder):
    """meta.json of a folder as a dict with "sha256", {file: digest}. Raises FileNotFoundError, or ValueError when it is damaged."""
    path = Path(folder) / META
    try:
        if path.stat().st_size > 1_000_000 or not path.is_file():  # a pipe would hang, a device fill the memory
            raise ValueError
        meta = json.loads(path.read_bytes())
        recorded = meta.pop("meta_sha256", None)
        if recorded != _meta_digest(meta) or any(Path(name).name != name for name in {**meta["sha256"]}):
            raise ValueError
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path} is damaged") from None
    return meta


def write_meta(folder, meta, names, file=META):
    """Write what is told of a folder, and the digests of its files of those names."""
    meta = {**meta, "sha256": {name: _digest(Path(folder) / name) for name in names}}
    (Path(folder) / file).write_text(json.dumps({**meta, "meta_sha256": _meta_digest(meta)}, indent=1))


def verify_files(folder):
    """meta.json of a folder of weights whose files all have the content that was written.

    Raises FileNotFoundError or ValueError naming the file that is missing or damaged.
    """
    meta = read_meta(folder)
    for name, digest in meta["sha256"].items():
        path = Path(folder) / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing")
        if not path.is_file() or _digest(path) != digest:
            raise ValueError(f"{path} is damaged")
    return meta


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _meta_digest(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def list_checkpoints(root):
    """Checkpoint folders under root, damaged ones too, newest first."""
    return sorted(Path(root).glob("step_*"), reverse=True)


def verify_checkpoint(folder):
    """`Progress` and config (a dict) of a checkpoint folder whose files all have the content that was written.

    Raises ValueError naming the folder and the file that is missing or damaged.
    """
    folder = Path(folder)
    try:
        meta = verify_files(folder)
        listed = meta.pop("sha256").keys()
        for name in {MODEL, OPTIMIZER, *(path.name for path in folder.iterdir())} - {
            *listed,
            META,
            METRICS,
            ".tmp_meta",
        }:
            raise ValueError(f"{name} is not among the files of {META}")
        return build(meta, Progress, META), to_dict(read_config(folder / CONFIG))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: cannot resume from this checkpoint: {str(error).removeprefix(f'{folder}{os.sep}')}"
        ) from None


def load_checkpoint(accelerator, folder, optimizer, averaged):
    """Restore weights and moments from a verified checkpoint folder; the optimizer's settings stay those of the config.

    averaged: whether this run keeps an average. Raises ValueError naming the folder when it belongs to another architecture.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    before = (Path(folder) / RAW).exists()
    try:
        if before != averaged:
            raise ValueError(
                f"it was written {'with' if before else 'without'} averaged weights, and train.ema now says otherwise"
            )
        accelerator.load_state(str(folder))
        accelerator.step = 0  # a random_states file of a stranger could set it
        fused = getattr(optimizer.optimizer, "_step_supports_amp_scaling", False)
        for p, state in (
            optimizer.state.items() if fused else ()
        ):  # such kernels would write beyond moments of another shape
            if wrong := [
                name for name, value in state.items() if torch.is_tensor(value) and value.shape not in (p.shape, ())
            ]:
                raise ValueError(f"{OPTIMIZER}: {wrong[0]} has another shape than its weights")
            if any(
                name in state and state[name].shape != p.shape
                for name in ("exp_avg", "exp_avg_sq", "momentum", "momentum_buffer")
            ):
                raise ValueError(f"{OPTIMIZER}: its moments have another shape than their weights")
    except FOREIGN as error:
        raise ValueError(
            f"{folder}: cannot resume from this checkpoint: {textwrap.shorten(str(error), 400)}"
        ) from error
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def near(path, pattern="*"):
    """'; near it are ...' with the names beside a path that resemble it, or nothing."""
    names = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob(pattern)], 3, 0.4)
    return f"; near it are {', '.join(names)}" if names else ""


def fetch(path):
    """A path as it is; of a hub id (owner/name) the folder that its files were fetched to, unless there is a folder of that owner here.

    A snapshot of all files at once, because without a network huggingface_hub then gives up after one try, for a single file after five.
    Raises FileNotFoundError when the hub does not give them.
    """
    if not HUB_ID.fullmatch(str(path)) or Path(path).parent.exists():  # with such a folder it is a mistyped path
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=[MODEL, CONFIG, META, METRICS]))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are among them
        first = textwrap.shorten(str(error), 300)
        raise FileNotFoundError(f"{path}: no such folder here, and not loaded from the hub either: {first}") from None


def find_weights(path):
    """model.safetensors of a run folder (its best/, else its newest checkpoint), a checkpoint folder, a hub id, or the file itself.

    Raises FileNotFoundError saying what was looked for, ValueError when a file is not what was written there.
    """
    path = fetch(path)
    newest = [folder / MODEL for folder in list_checkpoints(path / "checkpoints")]
    for candidate in (path, path / MODEL, path / "best" / MODEL, *newest):
        if candidate.is_file():
            if (candidate.parent / META).exists():
                verify_files(candidate.parent)
            return candidate
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run, checkpoint or file{near(path)}")
    raise FileNotFoundError(
        f"{path}: no weights there: looked for {MODEL}, best/{MODEL} and checkpoints/step_*/{MODEL}"
    )


def find_checkpoint(run):
    """Folder with config.json and model.safetensors: a checkpoint folder itself, or of a run the best, else the newest; verified.

    Raises FileNotFoundError saying what was looked for, ValueError when a file is not what was written there.
    """
    if not Path(run).is_dir():
        raise FileNotFoundError(f"{run}: no such folder, expected a run or a checkpoint{near(Path(run), '*/')}")
    folder = find_weights(run).parent
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG}: missing beside the weights, expected a folder written by train.py")
    return folder


def load_run(folder, overrides=()):
    """Config, with overrides, and detector of a checkpoint folder. Raises ValueError naming the file that does not fit."""
    folder = Path(folder)
    config = override(read_config(folder / CONFIG), overrides)
    model = Detector(dataclasses.replace(config.model, pretrained=False))  # the weights come from the checkpoint
    try:
        model.load_state_dict(load_file(folder / MODEL))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder / MODEL}: damaged, or of another architecture than {CONFIG}: {str(error).splitlines()[0]}"
        ) from None
    return config, model


def load_weights(model, path):
    """Weights of `path` into a `Detector`, as far as they fit. Returns lines that tell what was loaded, and of which modules what was not.

    Rows of the class predictor are matched by class, those of the box predictor by field, where config.json beside the weights names
    them; everything else by name and shape. Raises ValueError when nothing fits, FileNotFoundError when there is nothing.
    """
    file = find_weights(path)
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from None
    ours, theirs = model.state_dict(), read_source(file)
    fitting = {name: value for name, value in weights.items() if name in ours and ours[name].shape == value.shape}
    told = ["; class outputs in the order they lie in: no config.json names them"] if theirs is None else []
    if theirs:
        for module, title, name_rows in (
            ("class_predictor", "classes", name_classes),
            ("box_predictor", "outputs", name_outputs),
        ):
            here, there = name_rows(model.config), name_rows(theirs)
            merged, kept = match_rows(module, ours, weights, here, there)
            fitting = {name: value for name, value in fitting.items() if name.rpartition(".")[0] != module} | merged
            told += [f"; {title} {tell_rows(kept, here, there)}"] if title == "classes" or here != there else []
    if not fitting:
        raise ValueError(f"{file}: none of its {len(weights)} tensors fits this architecture")
    model.load_state_dict(fitting, strict=False)
    return [
        f"load_from {file}: {len(fitting)} of {len(ours)} tensors{''.join(told)}",
        *tell_modules(ours, weights, fitting),
    ]


def read_source(file):
    """`ModelConfig` of the config.json beside weights, None where there is none with a section `model`. Raises ValueError if damaged."""
    path = Path(file).parent / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    section = found.get("model") if isinstance(found, dict) else None
    return build(section, ModelConfig, f"{path}: model") if isinstance(section, dict) else None


def name_classes(config):
    """(name, 0) of every output of the class predictor of a `ModelConfig`."""
    return [(name, 0) for name in config.classes]


def name_outputs(config):
    """(name, channel) of every output of the box predictor. Those of attributes are the same only where all attributes are."""
    names = {field: field for field in config.fields} | {
        "attribute": f"attribute ({', '.join(config.attribute_names)})"
    }
    return [(names[field], channel) for field, channels in config.fields.items() for channel in range(channels)]


def match_rows(module, ours, theirs, here, there):
    """Weight and bias of a predictor, `ours` with the rows of `theirs` that have the same name; and the names of those rows.

    ours, theirs: {name: tensor}; here, there: names of the rows. Both results are empty where the shapes of a row differ.
    """
    names = [f"{module}.weight", f"{module}.bias"]
    kept = [row for row in here if row in there]
    fine = all(name in theirs and theirs[name].shape == (len(there), *ours[name].shape[1:]) for name in names)
    if not fine or not kept:
        return {}, []
    merged = {name: ours[name].clone() for name in names}
    for name in names:
        for row in kept:
            merged[name][here.index(row)] = theirs[name][there.index(row)]
    return merged, kept


def tell_rows(kept, here, there):
    """'kept Car; new Van; dropped Tram' of the names of rows, each told once."""
    lists = {
        "kept": kept,
        "new": [row for row in here if row not in kept],
        "dropped": [row for row in there if row not in here],
    }
    return "; ".join(
        f"{word} {', '.join(dict.fromkeys(name for name, _ in rows))}" for word, rows in lists.items() if rows
    )


def tell_modules(ours, theirs, loaded):
    """A line for each module that was not wholly loaded, and one for what was left. All are dicts by the names of tensors."""
    lines = []
    for module in dict.fromkeys(name.partition(".")[0] for name in ours):
        own = [name for name in ours if name.partition(".")[0] == module]
        left = [name for name in own if name not in loaded]
        missing = sum(name not in theirs for name in left)
        counts = {"missing there": missing, "of other shapes or names": len(left) - missing}
        if left:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
            lines.append(f"  {module}: {len(own) - len(left)} of {len(own)} tensors ({reasons})")
    unknown = collections.Counter(name.partition(".")[0] for name in theirs if name not in ours)
    return lines + [f"  not used: {', '.join(f'{count} of {module}' for module, count in unknown.items())}"] * bool(
        unknown
    )


ARCHITECTURE = ("backbone", "strides", "level_sizes", "channels", "tower_convs", "size", "virtual_focal", "projected_center", "norm",
                "predict_yaw")  # fmt: skip


def take_architecture(config):
    """Config with load_from's architecture where load_model asks for it; a run that has begun takes it from its own config.json.

    Raises ValueError where no config.json tells it.
    """
    if not config.load_model:
        return config
    begun = config.resume != "none" and list_checkpoints(Path(config.out) / "checkpoints")
    theirs = read_source(Path(config.out) / MODEL if begun else find_weights(config.load_from))
    if theirs is None:
        raise ValueError(
            f"{config.load_from}: load_model=true expects a {CONFIG} with a section 'model' beside the weights"
        )
    taken = {
        name: getattr(theirs, name) for name in ARCHITECTURE if getattr(theirs, name) != getattr(config.model, name)
    }
    log.info(
        f"load_model: {', '.join(f'model.{name}={value}' for name, value in taken.items()) or 'the same architecture'}"
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **taken))


def inherit_priors(asked, measured, theirs):
    """The measured `ModelConfig` with the priors that loaded weights were trained with, except where the one asked for sets them itself.

    theirs: the `ModelConfig` of those weights, if any. Sizes are taken class by class; depths only where the levels of the pyramid mean
    the same.
    """
    if theirs is None:
        return measured
    taken = {}
    if not asked.size_prior:
        known = dict(zip(theirs.classes, theirs.size_prior, strict=False))  # empty where they were never measured
        taken["size_prior"] = tuple(
            known.get(name, prior) for name, prior in zip(measured.classes, measured.size_prior, strict=True)
        )
    if all(getattr(theirs, name) == getattr(measured, name) for name in ("strides", "level_sizes", "virtual_focal")):
        names = [name for name in ("depth_mean", "depth_std") if getattr(theirs, name) and not getattr(asked, name)]
        taken |= {name: getattr(theirs, name) for name in names}
    return dataclasses.replace(measured, **taken)


# ---- going on


def find_start(config, accelerator, now):
    """Where config.resume says to go on: (checkpoint folder or None, its `Progress`, the config fitted to it and to the processes).

    now: the `Progress` of a run that starts here. The main process chooses, and tells the others. Raises ValueError when it must not go on.
    """
    [chosen] = broadcast_object_list([choose_checkpoint(config, now) if accelerator.is_main_process else None])
    folder, then, batch_size, measured = chosen
    kept = {name: getattr(then, name) for name in ("step", "global_batch", "best_metric", "best", "evaluated")}
    progress = dataclasses.replace(now, **kept)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))
    return folder, progress, with_priors(config, measured)


def choose_checkpoint(config, now):
    """(folder, its `Progress`, images per process, its measured priors) of the newest checkpoint that is whole; a start has no folder.

    Damaged ones are passed over, newer ones set aside. Raises ValueError where all are damaged, or the run must not go on from it.
    """
    root = Path(config.out) / "checkpoints"
    remove_leftovers(root)
    remove_leftovers(config.out, "best")
    folders = list_checkpoints(root)
    if config.resume == "none" and folders:
        raise ValueError(f"{config.out} holds checkpoints and resume=none; choose another out=, or delete it")
    if (
        config.resume not in ("auto", "none") and not folders
    ):  # a start from elsewhere; once begun, the run goes on from its own
        folders = [find_named(config.resume)]
    for folder in folders:
        try:
            then, before = verify_checkpoint(folder)
        except ValueError as error:
            if folder == folders[-1]:
                raise ValueError(
                    f"{error}; nothing older is left{f' (delete {root} to start anew)' * root.exists()}"
                ) from None
            log.warning(f"{error}; passing it over")
            continue
        refuse_changes(config, before, then, now, folder)
        batch_size = fit_batch(config.train, then, now.processes, folder)
        change = f" with {then.processes} -> {now.processes} processes of {batch_size} images, the same global batch"
        log.info(f"resumed from {folder}{change * (then.processes != now.processes)}")
        if folder.parent == root:
            for path in set_newer_aside(folder):
                log.warning(f"kept as {path}")
            then = with_best(then, before, config, now)
        else:  # its best weights are not in this run's folder
            then = dataclasses.replace(then, best_metric="", best=0.0, evaluated=False)
        return folder, then, batch_size, {k: v for k, v in before["model"].items() if k in PRIORS}
    return None, now, config.train.batch_size, {}


def find_named(resume):
    """The checkpoint folder that config.resume names. Raises ValueError where there is none, or a run's folder."""
    path = Path(resume)
    if not path.is_dir():
        raise ValueError(f"resume={resume}: no such folder{near(path)}")
    if own := list_checkpoints(path / "checkpoints"):
        raise ValueError(f"resume={resume} is a run, expected one of its checkpoints, of which {own[0]} is the newest")
    return path


def with_best(then, before, config, now):
    """The `Progress` of a checkpoint, its best value left out where this run would measure another: other frames, metric or counting."""
    counting = lambda told: (told["data"]["overlap"], told["train"]["eval_repeat"])  # noqa: E731
    same = then.val_digest == now.val_digest and counting(before) == counting(to_dict(config))
    if then.best_metric and (then.best_metric != config.best or not same):
        log.warning(
            f"best was {then.best_metric} of another metric, on other frames or counted otherwise: the next evaluation begins anew"
        )
        return dataclasses.replace(then, best_metric="", best=0.0)
    return then


def with_priors(config, measured):
    """Config with the priors that it leaves empty taken from a checkpoint, so that a data set that lost an image resumes too."""
    empty = {name: value for name, value in measured.items() if not getattr(config.model, name)}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **empty))


def fit_batch(train, then, world, folder):
    """Images per process that keep the checkpoint's global batch with this number of processes. Raises ValueError if there is none."""
    batch, now, share = then.global_batch, train.batch_size * world * train.accumulate, world * train.accumulate
    if now != batch and train.batch_size != then.asked_batch:
        raise ValueError(f"{folder}: its global batch was {batch} and is now {now}: not the same run")
    if batch % share:
        raise ValueError(
            f"{folder}: its global batch of {batch} does not divide over {world} processes with train.accumulate={train.accumulate}"
        )
    return batch // share


def refuse_changes(config, before, then, now, folder):
    """Show what differs from a checkpoint's config (a dict) and data; raise ValueError unless config.allow_changes, or it cannot go on."""
    measured = {k: [] if not getattr(config.model, k) else v for k, v in before["model"].items() if k in PRIORS}
    changes = changed_keys({**before, "model": {**before["model"], **measured}}, to_dict(config))
    if now.frames != then.frames:
        changes.append(f"frames of data.train: {then.frames} -> {now.frames}")
    elif now.train_digest != then.train_digest:
        changes.append("labels, cameras or the order of the frames of data.train")
    for line in changes:
        log.warning(f"changed since the checkpoint: {line}")
    if changes and not config.allow_changes:
        raise ValueError(
            f"{folder}: this is not the run's config ({'; '.join(changes)}); allow_changes=true goes on all the same"
        )
    if before["train"]["optimizer"] != config.train.optimizer:
        raise ValueError(
            f"{folder}: moments of {before['train']['optimizer']} do not fit {config.train.optimizer}; load_from= takes weights alone"
        )


def remove_leftovers(root, names="step_*"):
    """Undo what a killed process left half done to the folders of these names under root."""
    for path in Path(root).glob(f".old_{names}"):  # it was about to be replaced
        final = path.with_name(path.name.removeprefix(".old_"))
        if not final.exists():
            os.rename(path, final)
    for prefix in (".tmp_", ".del_", ".old_"):
        for path in Path(root).glob(prefix + names):
            shutil.rmtree(path, ignore_errors=True)


def set_newer_aside(folder):
    """Rename the checkpoints beside `folder` that are newer: a run that goes on from it has not reached them. Returns the new paths."""
    folder, moved = Path(folder), []
    for path in list_checkpoints(folder.parent):
        if path.name > folder.name:
            name = f"aside_{path.name}"
            while path.with_name(name).exists():
                name += "_again"
            moved.append(path.with_name(name))
            os.rename(path, moved[-1])
    return moved
