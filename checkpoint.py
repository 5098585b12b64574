"""Checkpoints that are complete or absent: written aside, synced, renamed. Weights and moments as safetensors, progress as JSON.

A checkpoint folder step_00001234 holds config.json, model.safetensors (the weights that predict), train.safetensors (raw weights when
an average is kept, and the optimizer's moments) and meta.json: progress, and the SHA-256 of every file, its own content included, so that
a flipped bit is noticed. Nothing in it can carry code.
"""

import hashlib
import json
import os
import shutil
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

MODEL, TRAIN, META, CONFIG = "model.safetensors", "train.safetensors", "meta.json", "config.json"


def _flat_optimizer(optimizer):
    """Optimizer moments as {'optimizer.3.exp_avg': tensor}, and its other numbers as {'3.step': number}."""
    tensors, numbers = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def _load_optimizer(optimizer, tensors, numbers):
    state = {}
    for key, value in [*((k.removeprefix("optimizer."), v) for k, v in tensors.items()), *numbers.items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _tensors(module, prefix=""):
    return {prefix + name: value.detach().contiguous() for name, value in module.state_dict().items()}


def save_weights(folder, model, config, metrics):
    """A folder for `Detector.from_pretrained`: config.json, model.safetensors, metrics.json; replaced as a whole."""
    folder = Path(folder)
    aside = folder.with_name(f".tmp_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(_tensors(model), aside / MODEL)
        (aside / CONFIG).write_text(json.dumps(config, indent=1))
        (aside / "metrics.json").write_text(json.dumps(metrics, indent=1))
        _publish(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{folder}: cannot write the weights: {error}") from None


def save_checkpoint(root, step, model, average, optimizer, config, meta, keep):
    """Write root/step_<step> and remove all but the newest `keep`. average: the module of averaged weights, or None.

    Raises OSError, leaving the older checkpoints as they were, when the disk does not take it.
    """
    root = Path(root)
    aside = root / f".tmp_step_{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        moments, numbers = _flat_optimizer(optimizer)
        save_file(_tensors(average or model), aside / MODEL)
        save_file({**(_tensors(model, "model.") if average else {}), **moments}, aside / TRAIN)
        (aside / CONFIG).write_text(json.dumps(config, indent=1))
        digests = {name: _digest(aside / name) for name in (MODEL, TRAIN, CONFIG)}
        _write_meta(aside / META, {"step": step, "optimizer": numbers, **meta, "sha256": digests})
        _publish(aside, root / f"step_{step:08d}")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{root}: cannot write the checkpoint of step {step}: {error}; the older ones are whole") from None
    for old in sorted(root.glob("step_*"))[:-keep]:
        doomed = old.with_name(".del_" + old.name)
        os.rename(old, doomed)  # a half-deleted folder must not look like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)  # a network file system keeps files that somebody reads


def amend_checkpoint(folder, **changes):
    """Replace entries of a checkpoint's meta, at once or not at all."""
    folder = Path(folder)
    meta = {**_read_meta(folder), **changes}
    aside = folder / ".tmp_meta"
    _write_meta(aside, meta)
    _sync(aside)
    os.replace(aside, folder / META)
    _sync(folder)


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


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _meta_digest(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _write_meta(path, meta):
    path.write_text(json.dumps({**meta, "meta_sha256": _meta_digest(meta)}, indent=1))


def _read_meta(folder):
    """meta.json, checked against its own digest. Raises OSError or ValueError."""
    try:
        meta = json.loads((folder / META).read_text())
        recorded = meta.pop("meta_sha256", None)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        meta = recorded = None
    if meta is None or recorded != _meta_digest(meta):
        raise ValueError(f"{META} is damaged")
    return meta


def _sync(path):
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


def list_checkpoints(root):
    """Checkpoint folders under root, damaged ones too, newest first."""
    return sorted(Path(root).glob("step_*"), reverse=True)


def verify_checkpoint(folder):
    """Meta and config of a checkpoint folder whose files all have the content that was written.

    Raises ValueError naming the folder and the file that is missing or damaged.
    """
    folder = Path(folder)
    try:
        meta = _read_meta(folder)
        for name, digest in meta.pop("sha256").items():
            if _digest(folder / name) != digest:
                raise ValueError(f"{name} is damaged")
        return meta, json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: cannot resume from this checkpoint: {Path(error.filename).name} is missing") from None
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder}: cannot resume from this checkpoint: {error}") from None


def load_checkpoint(folder, meta, model, average, optimizer):
    """Restore weights and moments from a verified checkpoint folder with its meta.

    Raises ValueError naming the folder when it belongs to another architecture or optimizer.
    """
    folder = Path(folder)
    try:
        weights, rest = load_file(folder / MODEL), load_file(folder / TRAIN)
        raw = {k.removeprefix("model."): v for k, v in rest.items() if k.startswith("model.")}
        if bool(raw) != (average is not None):
            raise ValueError(f"it was written {'with' if raw else 'without'} averaged weights, and train.ema now says otherwise")
        if average is not None:
            average.load_state_dict(weights)
        model.load_state_dict(raw or weights)
        _load_optimizer(optimizer, {k: v for k, v in rest.items() if k.startswith("optimizer.")}, meta["optimizer"])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot resume from this checkpoint: {textwrap.shorten(str(error), 400)}") from None


def find_weights(path):
    """model.safetensors of a run folder (its best/, else its newest checkpoint), a checkpoint folder, or the file itself.

    Raises FileNotFoundError saying what was looked for.
    """
    path = Path(path)
    newest = [folder / MODEL for folder in list_checkpoints(path / "checkpoints")]
    for candidate in (path, path / MODEL, path / "best" / MODEL, *newest):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{path}: no weights there: looked for {MODEL}, best/{MODEL} and checkpoints/step_*/{MODEL}")


def load_weights(model, path):
    """Weights of `path` into a model, as far as names and shapes agree. Returns lines that list what did not.

    Raises ValueError when nothing fits, FileNotFoundError when there is nothing.
    """
    file = find_weights(path)
    try:
        theirs = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from None
    ours = model.state_dict()
    shapes = [k for k in ours if k in theirs and ours[k].shape != theirs[k].shape]
    fitting = {k: v for k, v in theirs.items() if k in ours and k not in shapes}
    if not fitting:
        raise ValueError(f"{file}: none of its {len(theirs)} tensors fits this architecture")
    model.load_state_dict(fitting, strict=False)
    lists = {
        "missing there": [k for k in ours if k not in theirs],
        "unknown here": [k for k in theirs if k not in ours],
        "of another shape": [f"{k} {tuple(theirs[k].shape)} there, {tuple(ours[k].shape)} here" for k in shapes],
    }
    return [f"load_from {file}: {len(fitting)} of {len(ours)} tensors loaded"] + [
        f"  {title}: {', '.join(names)}" for title, names in lists.items() if names
    ]
