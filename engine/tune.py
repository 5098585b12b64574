"""Starting from the weights of another model: an extra, which train.py finds by its name when load_from asks for it."""

import collections
import dataclasses
import json
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from config import build
from engine.checkpoint import CONFIG, MODEL, PRIORS, list_checkpoints
from engine.weights import find_weights
from model import ModelConfig
from scene.frames import UserError

ARCHITECTURE = ("backbone", "strides", "level_sizes", "channels", "tower_convs", "size", "virtual_focal",
                "projected_center", "norm", "predict_yaw")  # fmt: skip
logger = logging.getLogger("deep3d")


def take_architecture(config):
    """Config with load_from's architecture, for load_model; a run that has begun takes it from its own.

    Raises UserError where no config.json tells it.
    """
    begun = config.resume != "none" and list_checkpoints(Path(config.out) / "checkpoints")
    theirs = read_source(Path(config.out) / MODEL if begun else find_weights(config.load_from))
    if theirs is None:
        raise UserError(
            f"{config.load_from}: load_model=true expects a {CONFIG} with a section 'model' beside the weights"
        )
    taken = {key: getattr(theirs, key) for key in ARCHITECTURE if getattr(theirs, key) != getattr(config.model, key)}
    words = ", ".join(f"model.{key}={value}" for key, value in taken.items()) or "the same architecture"
    logger.info(f"load_model: {words}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **taken))


def inherit_priors(config, measured):
    """The measured `ModelConfig` with the priors of load_from's weights, where the config leaves them empty.

    Sizes are taken class by class; depths only where the levels of the pyramid mean the same.
    """
    theirs = read_source(find_weights(config.load_from))
    if theirs is None or measured == config.model:
        return measured
    taken = {}
    if not config.model.size_prior:
        sizes = dict(zip(theirs.classes, theirs.size_prior, strict=False))  # empty where they were never measured
        mixed = zip(measured.classes, measured.size_prior, strict=True)
        taken["size_prior"] = tuple(sizes.get(name, prior) for name, prior in mixed)
    if all(getattr(theirs, name) == getattr(measured, name) for name in ("strides", "level_sizes", "virtual_focal")):
        names = [name for name in PRIORS[1:] if getattr(theirs, name) and not getattr(config.model, name)]
        taken |= {name: getattr(theirs, name) for name in names}
    return dataclasses.replace(measured, **taken)


def read_source(file):
    """`ModelConfig` of the config.json beside weights, None where there is none with a section `model`."""
    path = Path(file).parent / CONFIG
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    section = content.get("model") if isinstance(content, dict) else None
    return build(section, ModelConfig, f"{path}: model") if isinstance(section, dict) else None


def load_weights(detector, path):
    """Weights of `path` into a `Detector`, as far as they fit. Returns the lines that the log gets.

    Rows of the class predictor are matched by class, those of the box predictor by field, where config.json beside the
    weights names them; everything else by name and shape. Raises UserError when nothing fits.
    """
    file = find_weights(path)
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    ours, theirs = detector.state_dict(), read_source(file)
    fitting = {name: value for name, value in weights.items() if name in ours and ours[name].shape == value.shape}
    notes = [] if theirs else ["; class outputs in the order they lie in: no config.json names them"]
    for module, title, name_rows in PREDICTORS if theirs else ():
        here, there = name_rows(detector.config), name_rows(theirs)
        merged, kept = match_rows(module, ours, weights, here, there)
        fitting = {name: value for name, value in fitting.items() if name.rpartition(".")[0] != module} | merged
        if title == "classes" or here != there:
            notes.append(f"; {title} {describe_rows(kept, here, there)}")
    if not fitting:
        raise UserError(f"{file}: none of its {len(weights)} tensors fits this architecture")
    detector.load_state_dict(fitting, strict=False)
    lines = [f"load_from {file}: {len(fitting)} of {len(ours)} tensors{''.join(notes)}"]
    lines += describe_modules(ours, weights, fitting)
    for line in lines:
        logger.info(line)
    return lines


def name_classes(model):
    """(name, 0) of every output of the class predictor of a `ModelConfig`."""
    return [(name, 0) for name in model.classes]


def name_outputs(model):
    """(name, channel) of every output of the box predictor; attributes are the same only where all of them are."""
    names = {field: field for field in model.fields} | {"attribute": f"attribute ({', '.join(model.attribute_names)})"}
    return [(names[field], channel) for field, channels in model.fields.items() for channel in range(channels)]


PREDICTORS = (("class_predictor", "classes", name_classes), ("box_predictor", "outputs", name_outputs))


def match_rows(module, ours, theirs, here, there):
    """Weight and bias of a predictor, `ours` with the rows of `theirs` of equal names; and those names.

    ours, theirs: {name: tensor}; here, there: names of the rows. Both results are empty where the shapes of a row
    differ.
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


def describe_rows(kept, here, there):
    """'kept Car; new Van; dropped Tram' of the names of rows, each once."""
    lists = {"kept": kept, "new": [r for r in here if r not in kept], "dropped": [r for r in there if r not in here]}
    return "; ".join(
        f"{word} {', '.join(dict.fromkeys(name for name, _ in rows))}" for word, rows in lists.items() if rows
    )


def describe_modules(ours, theirs, loaded):
    """A line for each module that was not wholly loaded, and one for what was left; all are dicts of tensors."""
    lines = []
    for module in dict.fromkeys(name.partition(".")[0] for name in ours):
        names = [name for name in ours if name.partition(".")[0] == module]
        fresh = [name for name in names if name not in loaded]
        missing = sum(name not in theirs for name in fresh)
        counts = {"missing there": missing, "of other shapes or names": len(fresh) - missing}
        if fresh:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
            lines.append(f"  {module}: {len(names) - len(fresh)} of {len(names)} tensors ({reasons})")
    if unused := collections.Counter(name.partition(".")[0] for name in theirs if name not in ours):
        lines.append(f"  not used: {', '.join(f'{count} of {module}' for module, count in unused.items())}")
    return lines
