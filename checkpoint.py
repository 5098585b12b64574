"""Checkpoints that are complete or absent: written aside, synced, renamed. Weights and moments as safetensors, progress as JSON.

A checkpoint folder step_00001234 holds config.json, model.safetensors (the weights that predict), train.safetensors (raw weights when
an average is kept, and the optimizer's moments) and meta.json, written last. Nothing in it can carry code.
"""

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
    aside.mkdir(parents=True)
    save_file(_tensors(model), aside / MODEL)
    (aside / CONFIG).write_text(json.dumps(config, indent=1))
    (aside / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _publish(aside, folder)


def save_checkpoint(root, step, model, average, optimizer, config, meta, keep):
    """Write root/step_<step> and remove all but the newest `keep`. average: the module of averaged weights, or None."""
    root = Path(root)
    aside = root / f".tmp_step_{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    moments, numbers = _flat_optimizer(optimizer)
    save_file(_tensors(average or model), aside / MODEL)
    save_file({**(_tensors(model, "model.") if average else {}), **moments}, aside / TRAIN)
    (aside / CONFIG).write_text(json.dumps(config, indent=1))
    (aside / META).write_text(json.dumps({"step": step, "optimizer": numbers, **meta}, indent=1))
    _publish(aside, root / f"step_{step:08d}")
    for old in sorted(root.glob("step_*"))[:-keep]:
        doomed = old.with_name(".del_" + old.name)
        os.rename(old, doomed)  # a half-deleted folder must not look like a checkpoint
        shutil.rmtree(doomed)


def _publish(aside, final):
    """Sync a folder's files and rename it into place; what stood there before is removed only then."""
    for path in [*aside.iterdir(), aside]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if final.exists():
        doomed = final.with_name(f".del_{final.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(final, doomed)
        os.rename(aside, final)
        shutil.rmtree(doomed)
    else:
        os.rename(aside, final)
    handle = os.open(final.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def complete_checkpoints(root):
    """Checkpoint folders under root that were finished, newest first."""
    return sorted((p for p in Path(root).glob("step_*") if (p / META).is_file()), reverse=True)


def load_checkpoint(folder, model, average, optimizer):
    """Restore everything from a checkpoint folder. Returns its meta (step, processes, global_batch, best).

    Raises ValueError naming the folder when it is damaged or belongs to another architecture.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text())
        weights, rest = load_file(folder / MODEL), load_file(folder / TRAIN)
        raw = {k.removeprefix("model."): v for k, v in rest.items() if k.startswith("model.")}
        if bool(raw) != (average is not None):
            raise ValueError(f"it was written {'with' if raw else 'without'} averaged weights, and train.ema now says otherwise")
        if average is not None:
            average.load_state_dict(weights)
        model.load_state_dict(raw or weights)
        _load_optimizer(optimizer, {k: v for k, v in rest.items() if k.startswith("optimizer.")}, meta.pop("optimizer"))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot resume from this checkpoint: {textwrap.shorten(str(error), 400)}") from None
    return meta


def find_weights(path):
    """model.safetensors of a run folder (its best/, else its newest checkpoint), a checkpoint folder, or the file itself.

    Raises FileNotFoundError saying what was looked for.
    """
    path = Path(path)
    newest = [folder / MODEL for folder in complete_checkpoints(path / "checkpoints")]
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
