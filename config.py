"""One run described by frozen dataclasses: a Python run file, then `key=value` overrides; saved as config.json.

Each section lives beside the code that reads it. Nothing but the project's own run files is ever executed; a checkpoint holds JSON.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import textwrap
import traceback
import typing
from pathlib import Path

from data import DataConfig
from losses import LossConfig
from model import ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, and how often something is written."""

    batch_size: int = 8  # images per process and micro-step
    accumulate: int = 1  # micro-steps per optimizer step
    epochs: float = (
        12  # passes over data.train; steps = epochs * frames / (batch_size * processes * accumulate), rounded up
    )
    steps: int = 0  # optimizer steps; above 0 replaces epochs
    optimizer: str = "adamw"  # 'muon', or any timm optimizer
    freeze: tuple[
        str, ...
    ] = ()  # modules or parameters that stay as they are, such as backbone.layer1: statistics of their norms too
    backbone_lr: float = 1.0  # factor of the learning rate for the backbone
    beta2: float = 0.999  # decay of the second moment, of optimizers that have one; short runs like 0.99
    lr: float = 1e-3  # peak learning rate, for the global batch as it is (not rescaled)
    weight_decay: float = 0.01  # not on norms and biases
    schedule: str = "cosine"  # 'cosine' to 0, 'step' by 0.1 at 2/3 and 11/12 of the steps, 'constant'
    warmup: int = 100  # steps of linear warm-up
    all_cells: int = (
        100  # first steps, in which an object is learned at all the cells around it; later at its best ones
    )
    clip: float = 35.0  # largest gradient norm
    mixed_precision: str = "no"  # 'no', 'bf16', 'fp16'
    compile: bool = False  # torch.compile of model, targets and losses, each as one graph
    checkpoint_backbone: bool = (
        False  # compute the backbone's activations again in backward instead of keeping them: less memory, slower
    )
    ema: float = 0.998  # decay of the averaged weights that are evaluated and published; 0: none
    eval_every: float = 1.0  # epochs between evaluations; 0: only at the end
    eval_repeat: int = 1  # count every val frame so many times: lifts the official cap on R40 of few frames
    save_every: int = 500  # steps between checkpoints; one is always written at the end
    keep: int = 2  # newest checkpoints that stay
    log_every: int = 50  # steps
    max_bad_steps: int = 10  # steps in a row without a finite gradient that stop the run (fp16: 40 at least); fewer are skipped and named
    timeout: float = 10.0  # minutes that a process waits for the others before it gives up


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. `data`, `model`, `loss` and `train` are its sections."""

    out: str = "runs/default"  # run folder
    seed: int = 0  # of weights, order and augmentation
    resume: str = "auto"  # 'auto': go on from the newest checkpoint in out, 'none': start anew in an empty out, or a checkpoint folder
    allow_changes: bool = False  # resume although keys that shape the training differ from the run's
    load_from: str = (
        ""  # start from weights: a run, checkpoint, .safetensors file or hub id; classes are matched by name
    )
    load_model: bool = False  # take the architecture of load_from along, such as backbone, size and channels; classes stay the config's
    log_with: str = ""  # 'tensorboard', 'trackio' or 'wandb', beside log.jsonl
    best: str = "mean/3d/moderate/AP_R40"  # number of metrics.json that chooses best/; a '-' before it: lower is better
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self):
        train = self.train
        positive = {
            "batch_size": 1,
            "accumulate": 1,
            "keep": 1,
            "log_every": 1,
            "save_every": 1,
            "max_bad_steps": 1,
            "eval_repeat": 1,
        }
        for name, least in positive.items():
            if getattr(train, name) < least:
                raise ValueError(f"train.{name} is {getattr(train, name)}, expected at least {least}")
        if min(train.steps, train.all_cells, self.data.workers) < 0 or not 0 <= self.seed < 2**32:
            raise ValueError("expected train.steps >= 0, train.all_cells >= 0, data.workers >= 0 and 0 <= seed < 2^32")
        choices = {"schedule": ("cosine", "step", "constant"), "mixed_precision": ("no", "bf16", "fp16")}
        for name, allowed in choices.items():
            if getattr(train, name) not in allowed:
                raise ValueError(f"train.{name} is {getattr(train, name)!r}, expected one of {', '.join(allowed)}")
        averages = 0 <= train.beta2 < 1 and 0 <= train.ema < 1
        if not (
            0 < train.lr <= 1e38
            and averages
            and train.clip > 0
            and train.warmup >= 0
            and train.epochs > 0
            and train.timeout > 0
        ):
            raise ValueError(
                "train: expected 0 < lr <= 1e38, 0 <= beta2, ema < 1, clip > 0, warmup >= 0, epochs > 0 and timeout > 0"
            )
        if train.backbone_lr <= 0:
            raise ValueError(
                f"train.backbone_lr is {train.backbone_lr}, expected > 0; train.freeze=backbone keeps the backbone as it is"
            )
        if train.backbone_lr != 1 and "backbone" in train.freeze:
            raise ValueError(
                "train.freeze=backbone keeps the backbone as it is, and train.backbone_lr says how fast it learns: leave one out"
            )
        if self.load_model and not self.load_from:
            raise ValueError("load_model=true takes the architecture of load_from along, and load_from is empty")
        if self.loss.loss_alpha_constrain and not self.model.predict_yaw:
            raise ValueError("loss.loss_alpha_constrain compares two angle outputs: it needs model.predict_yaw=true")
        if not self.loss.loss_cls:
            raise ValueError("loss.loss_cls is 0, expected > 0: without it nothing is ever detected")
        there = {"loss_velocity": self.model.velocity, "loss_attribute": bool(self.model.attributes)}
        if not any(
            weight and there.get(name, True)
            for name, weight in dataclasses.asdict(self.loss).items()
            if name != "loss_cls"
        ):
            raise ValueError(
                "loss: every weight but loss_cls's is 0, expected another one > 0: no box would ever be learned"
            )
        low, high = self.data.scale
        if not 0.1 <= low <= high <= 10 or not 0 <= self.data.flip <= 1 or not 0 <= self.data.colour < 1:
            raise ValueError("data: expected 0.1 <= scale low <= high <= 10, 0 <= flip <= 1 and 0 <= colour < 1")


def load_config(path, overrides=()):
    """Config of a run file (its `config`), with `section.key=value` overrides. Raises ValueError or FileNotFoundError in one sentence."""
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in (Path(__file__).parent / "configs").glob("*.py")))
        raise FileNotFoundError(f"{path}: no such config file; there are {near}")
    if path.suffix != ".py":
        raise ValueError(f"{path}: expected a Python run file that defines `config`")
    spec = importlib.util.spec_from_file_location(f"run_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: not Python: {error.msg}") from None
    except Exception as error:  # whatever a user's file does: one sentence with the line, as for every other mistake
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path}:{lines[-1] if lines else 1}: {kind}{textwrap.shorten(str(error), 600)}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"{path}: expected a variable `config` holding a config.Config, got {type(config).__name__}")
    config = override(
        build(dataclasses.asdict(config), Config, str(path)), overrides
    )  # a dataclass takes values of any type
    refuse_idle_root(overrides, *config.data.train, *config.data.val)
    return config


def refuse_idle_root(overrides, *sources):
    """ValueError where the overrides give a data.root that none of the sources reads, as each names its own."""
    for text in overrides:
        if text.partition("=")[0].strip() == "data.root" and sources and all(source.root for source in sources):
            raise ValueError(f"{text}: no source reads it, as each names a root of its own, such as {sources[0].root}")


def override(config, overrides):
    """Config with `key=value` strings applied; values are parsed by the type of the field."""
    sections = {"": config} | {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if dataclasses.is_dataclass(f.type)
    }
    changed = {section: {} for section in sections}
    for text in overrides:
        key, equals, value = text.partition("=")
        section, _, name = (key := key.strip()).rpartition(".")
        kinds = typing.get_type_hints(type(sections[section])) if section in sections else {}
        if not equals:
            raise ValueError(f"{text!r}: expected key=value, such as train.lr=1e-4")
        if key in sections:
            raise ValueError(
                f"{key!r} is a section, expected one of its keys, such as {key}.{dataclasses.fields(sections[key])[0].name}"
            )
        if name not in kinds:
            near = difflib.get_close_matches(key, list(describe(config)), n=3, cutoff=0.4)
            raise ValueError(
                f"unknown key {key!r}{'; did you mean ' + ' or '.join(near) + '?' if near else ''} (python train.py --help lists all)"
            )
        changed[section][name] = parse(value, kinds[name], key)
    top = changed.pop("")
    changed = {
        section: dataclasses.replace(sections[section], **values) for section, values in changed.items() if values
    }
    return dataclasses.replace(config, **changed, **top)


def parse(text, kind, key):
    """Text of a command line -> a value of the type. Sequences and mappings are JSON, or comma separated where they hold plain values."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{key}={text}: expected true or false")
        return text.lower() in ("true", "1")
    if kind is str:
        return text
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{key}={text}: expected {'a whole number' if kind is int else 'a number'}") from None
        if not math.isfinite(value):
            raise ValueError(f"{key}={text}: expected a finite number")
        return value
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = [_word(part.strip()) for part in text.split(",") if part.strip()]
    return build(value if isinstance(value, list | dict) else [value], kind, key)


def _word(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def build(value, kind, key):
    """JSON value -> a value of the type, dataclasses and tuples included. Raises ValueError naming the key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict):
            raise ValueError(f"{key}: expected an object with keys {', '.join(hints)}, got {value!r}")
        for name in value:
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                raise ValueError(
                    f"{key}: unknown key {name!r}, expected {near[0] if near else 'one of ' + ', '.join(hints)}"
                )
        return kind(**{name: build(v, hints[name], f"{key}.{name}") for name, v in value.items()})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key}: expected a list, got {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(build(v, arguments[0], key) for v in value)
        if len(value) != len(arguments):
            raise ValueError(f"{key}: expected {len(arguments)} values, got {len(value)}: {value!r}")
        return tuple(build(v, a, key) for v, a in zip(value, arguments, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{key}: expected a JSON object, got {value!r}")
        return {k: build(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{key}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
    return value


def to_dict(config):
    """Config -> plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


FREE_KEYS = {  # may change when a run goes on: they do not shape the training, or, like the global batch, are compared by themselves
    *("out", "resume", "allow_changes", "load_from", "load_model", "log_with", "best"),
    *("data." + name for name in ("root", "val", "workers", "index", "cache", "skip_bad", "overlap")),
    *(
        "model." + name
        for name in ("pretrained", "score_threshold", "nms_iou", "candidates", "max_detections", "fuse_duplicates")
    ),
    *("model." + name for name in ("nms_across_classes", "centerness_share", "depth_tolerance", "sigma_scale")),
    *(
        "train." + name
        for name in ("batch_size", "accumulate", "eval_every", "eval_repeat", "save_every", "keep", "log_every")
    ),
    *("train." + name for name in ("max_bad_steps", "timeout", "compile", "checkpoint_backbone")),
}


def changed_keys(old, new, prefix=""):
    """['train.lr: 0.001 -> 0.002', ...]: where two dicts of `to_dict` differ in what shapes the training."""
    changes = []
    for name in sorted({*old, *new}):
        key, before, after = prefix + name, old.get(name), new.get(name)
        if key in FREE_KEYS:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_keys(before, after, key + ".")
            continue
        if key == "data.train":  # its roots may move
            before, after = (
                [{k: v for k, v in source.items() if k != "root"} for source in sources or ()]
                for sources in (before, after)
            )
        if before != after:
            changes.append(f"{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return changes


def read_config(path):
    """Config from a config.json. Raises FileNotFoundError or ValueError naming the file."""
    try:
        return build(json.loads(Path(path).read_text(encoding="utf-8")), Config, str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except ValueError as error:
        text = textwrap.shorten(str(error), 600)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def describe(config):
    """Every key of a config -> (value, comment): what --help prints. Comments are those in the source, beside each field."""
    described = {}
    for owner, prefix in ((config, ""), *((getattr(config, f.name), f.name + ".") for f in dataclasses.fields(config))):
        if not dataclasses.is_dataclass(owner):
            continue
        lines = inspect.getsource(type(owner)).splitlines()
        for field in dataclasses.fields(owner):
            if dataclasses.is_dataclass(getattr(owner, field.name)):
                continue
            line = next(text for text in lines if text.strip().startswith(field.name + ":"))
            described[prefix + field.name] = (getattr(owner, field.name), line.partition("  # ")[2])
    return described


def help_text(config):
    """All keys with value, unit and meaning, a line each."""
    rows = [
        (key, json.dumps(dataclasses_to_json(value)), comment) for key, (value, comment) in describe(config).items()
    ]
    return "\n".join(
        f"  {key}={value if len(value) <= 60 else value[:57] + '...'}\n      {comment}" for key, value, comment in rows
    )


def dataclasses_to_json(value):
    """Value of a field -> JSON types: dataclasses inside tuples become objects."""
    if isinstance(value, tuple):
        return [dataclasses_to_json(v) for v in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
