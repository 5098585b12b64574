"""One run described by frozen dataclasses: a Python run file, then `key=value` overrides; saved as config.json.

Each section lives beside the code that reads it. Nothing but the project's own run files is ever executed; a checkpoint
holds JSON.
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
from scene.frames import UserError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, and how often something is written."""

    batch_size: int = 8  # images per process and micro-step
    accumulate: int = 1  # micro-steps per optimizer step
    # passes over data.train; steps = epochs * frames / (batch_size * processes * accumulate), rounded up
    epochs: float = 12
    steps: int = 0  # optimizer steps; above 0 replaces epochs
    optimizer: str = "adamw"  # 'muon', or any timm optimizer
    # modules or parameters that stay as they are, such as backbone.layer1: statistics of their norms too
    freeze: tuple[str, ...] = ()
    backbone_lr: float = 1.0  # factor of the learning rate for the backbone
    beta2: float = 0.999  # decay of the second moment, of optimizers that have one; short runs like 0.99
    lr: float = 1e-3  # peak learning rate, for the global batch as it is (not rescaled)
    weight_decay: float = 0.01  # not on norms and biases
    schedule: str = "cosine"  # 'cosine' to 0, 'step' by 0.1 at 2/3 and 11/12 of the steps, 'constant'
    warmup: int = 100  # steps of linear warm-up
    # first steps, in which an object is learned at all the cells around it; later at its best ones
    all_cells: int = 100
    clip: float = 35.0  # largest gradient norm
    mixed_precision: str = "no"  # 'no', 'bf16', 'fp16'
    compile: bool = False  # torch.compile of model, targets and losses, each as one graph
    # compute the backbone's activations again in backward instead of keeping them: less memory, slower
    checkpoint_backbone: bool = False
    # largest decay of the averaged weights, which are evaluated; it rises as 1 - (step + 1)^(-2/3); 0: no average
    ema: float = 0.998
    eval_every: float = 1.0  # epochs between evaluations; 0: only at the end
    eval_repeat: int = 1  # count every val frame so many times: lifts the official cap on R40 of few frames
    save_every: int = 500  # steps between checkpoints; one is always written at the end
    keep: int = 2  # newest checkpoints that stay
    log_every: int = 50  # steps
    # steps in a row without a finite gradient that stop the run (fp16: 40 at least); fewer are skipped and named
    max_bad_steps: int = 10
    timeout: float = 10.0  # minutes that a process waits for the others before it gives up


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. `data`, `model`, `loss` and `train` are its sections."""

    out: str = "runs/default"  # run folder
    seed: int = 0  # of weights, order and augmentation
    # 'auto': go on from the newest checkpoint in out, 'none': start anew in an empty out, or a checkpoint folder
    resume: str = "auto"
    # start from weights: a run, checkpoint, .safetensors file or hub id; classes are matched by name
    load_from: str = ""
    # take the architecture of load_from along, such as backbone, size and channels; classes stay the config's
    load_model: bool = False
    log_with: str = ""  # 'tensorboard', 'trackio', 'mlflow', 'wandb' or another of Accelerate's, beside log.jsonl
    # number of metrics.json that chooses best/; a '-' before it: lower is better
    best: str = "mean/3d/moderate/AP_R40"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self):
        train, loss, data = self.train, self.loss, self.data
        for name in ("batch_size", "accumulate", "keep", "log_every", "save_every", "max_bad_steps", "eval_repeat"):
            if getattr(train, name) < 1:
                raise UserError(f"train.{name} is {getattr(train, name)}, expected at least 1")
        least = min(train.steps, train.all_cells, train.eval_every, train.weight_decay, data.workers)
        if least < 0 or not 0 <= self.seed < 2**32:
            keys = "train.steps, train.all_cells, train.eval_every, train.weight_decay and data.workers"
            raise UserError(f"expected {keys} to be at least 0, and 0 <= seed < 2^32")
        choices = {"schedule": ("cosine", "step", "constant"), "mixed_precision": ("no", "bf16", "fp16")}
        for name, allowed in choices.items():
            if getattr(train, name) not in allowed:
                raise UserError(f"train.{name} is {getattr(train, name)!r}, expected one of {', '.join(allowed)}")
        averages = 0 <= train.beta2 < 1 and 0 <= train.ema < 1
        times = train.clip > 0 and train.warmup >= 0 and train.epochs > 0 and train.timeout > 0
        if not (0 < train.lr <= 1e38 and averages and times):
            wanted = "0 < lr <= 1e38, 0 <= beta2, ema < 1, clip > 0, warmup >= 0, epochs > 0 and timeout > 0"
            raise UserError(f"train: expected {wanted}")
        keeps = "train.freeze=backbone keeps the backbone as it is"
        if train.backbone_lr <= 0:
            raise UserError(f"train.backbone_lr is {train.backbone_lr}, expected > 0; {keeps}")
        if train.backbone_lr != 1 and "backbone" in train.freeze:
            raise UserError(f"{keeps}, and train.backbone_lr says how fast it learns: leave one out")
        if self.load_model and not self.load_from:
            raise UserError("load_model=true takes the architecture of load_from along, and load_from is empty")
        if loss.loss_alpha_constrain and not self.model.predict_yaw:
            raise UserError("loss.loss_alpha_constrain compares two angle outputs: it needs model.predict_yaw=true")
        if not loss.loss_cls:
            raise UserError("loss.loss_cls is 0, expected > 0: without it nothing is ever detected")
        outputs = {
            "loss_cls": False,
            "loss_velocity": self.model.velocity,
            "loss_attribute": bool(self.model.attributes),
        }
        if not any(weight and outputs.get(name, True) for name, weight in dataclasses.asdict(loss).items()):
            zeros = "every weight but loss_cls's is 0, expected another one > 0"
            raise UserError(f"loss: {zeros}: no box would ever be learned")
        low, high = data.scale
        if not 0.1 <= low <= high <= 10 or not 0 <= data.flip <= 1 or not 0 <= data.colour < 1:
            raise UserError("data: expected 0.1 <= scale low <= high <= 10, 0 <= flip <= 1 and 0 <= colour < 1")


def load_config(path, overrides=()):
    """Config of a run file (its `config`), with `section.key=value` overrides. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        folder = Path(__file__).parent / "configs"
        names = ", ".join(sorted(path.name for path in folder.glob("*.py")))
        raise UserError(f"{path}: no such config file; in {folder} are {names}")
    if path.suffix != ".py":
        raise UserError(f"{path}: expected a Python run file that defines `config`")
    spec = importlib.util.spec_from_file_location(f"run_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not Python: {error.msg}") from None
    except Exception as error:  # whatever a user's file does: one sentence with the line, as for every other mistake
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        kind = "" if type(error) in (ValueError, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{path}:{lines[-1] if lines else 1}: {kind}{textwrap.shorten(str(error), 600)}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"{path}: expected a variable `config` holding a config.Config, got {type(config).__name__}")
    config = build(dataclasses.asdict(config), Config, str(path))  # a dataclass takes values of any type
    config = override(config, overrides)
    refuse_idle_root(overrides, *config.data.train, *config.data.val)
    return config


def refuse_idle_root(overrides, *sources):
    """UserError where the overrides give a data.root that none of the sources reads, as each names its own."""
    for text in overrides:
        if text.partition("=")[0].strip() == "data.root" and sources and all(source.root for source in sources):
            raise UserError(f"{text}: no source reads it, as each names a root of its own, such as {sources[0].root}")


def override(config, overrides):
    """Config with `key=value` strings applied; values are parsed by the type of the field."""
    names = [field.name for field in dataclasses.fields(config) if dataclasses.is_dataclass(field.type)]
    sections = {"": config} | {name: getattr(config, name) for name in names}
    changed = {section: {} for section in sections}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        section, _, name = key.rpartition(".")
        kinds = typing.get_type_hints(type(sections[section])) if section in sections else {}
        if not equals:
            raise UserError(f"{text!r}: expected key=value, such as train.lr=1e-4")
        if key in sections:
            first = dataclasses.fields(sections[key])[0].name
            raise UserError(f"{key!r} is a section, expected one of its keys, such as {key}.{first}")
        if name not in kinds:
            near = " or ".join(difflib.get_close_matches(key, list(describe(config)), n=3, cutoff=0.4))
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"unknown key {key!r}{hint} (python train.py --help lists all)")
        changed[section][name] = parse(value, kinds[name], key)
    top = changed.pop("")
    replaced = {key: dataclasses.replace(sections[key], **values) for key, values in changed.items() if values}
    return dataclasses.replace(config, **replaced, **top)


def parse(text, kind, key):
    """Text of a command line -> a value of the type; sequences and mappings are JSON, or words between commas."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"{key}={text}: expected true or false")
        return text.lower() in ("true", "1")
    if kind is str:
        return text
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise UserError(f"{key}={text}: expected {'a whole number' if kind is int else 'a number'}") from None
        if not math.isfinite(value):
            raise UserError(f"{key}={text}: expected a finite number")
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
    """JSON value -> a value of the type, dataclasses and tuples included. Raises UserError naming the key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict):
            raise UserError(f"{key}: expected an object with keys {', '.join(hints)}, got {value!r}")
        for name in value:
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1) or [f"one of {', '.join(hints)}"]
                raise UserError(f"{key}: unknown key {name!r}, expected {near[0]}")
        return kind(**{name: build(v, hints[name], f"{key}.{name}") for name, v in value.items()})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}: expected a list, got {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(build(v, arguments[0], key) for v in value)
        if len(value) != len(arguments):
            raise UserError(f"{key}: expected {len(arguments)} values, got {len(value)}: {value!r}")
        return tuple(build(v, a, key) for v, a in zip(value, arguments, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}: expected a JSON object, got {value!r}")
        return {k: build(v, arguments[1], f"{key}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{key}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
    return value


def to_dict(config):
    """Config -> plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def changed_keys(old, new, prefix=""):
    """['train.lr: 0.001 -> 0.002', ...]: where two dicts of `to_dict` differ, but for where the run lies and began."""
    changes = []
    for name in sorted({*old, *new} - {"out", "resume"}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_keys(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(f"{prefix}{name}: {json.dumps(before)} -> {json.dumps(after)}")
    return changes


def read_config(path):
    """Config from a config.json. Raises FileNotFoundError, or UserError naming the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return build(content, Config, str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    except ValueError as error:
        text = textwrap.shorten(str(error), 600)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def describe(config):
    """Every key of a config -> (value, comment): what --help prints. A comment stands beside its field, or above it."""
    described = {}
    sections = [("", config)] + [(f"{f.name}.", getattr(config, f.name)) for f in dataclasses.fields(config)]
    for prefix, owner in sections:
        if not dataclasses.is_dataclass(owner):
            continue
        lines = [line.strip() for line in inspect.getsource(type(owner)).splitlines()]
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            if dataclasses.is_dataclass(value):
                continue
            place = next(n for n, line in enumerate(lines) if line.startswith(f"{field.name}:"))
            comment = lines[place].partition("  # ")[2] or lines[place - 1].removeprefix("# ")
            described[prefix + field.name] = (value, comment)
    return described


def help_text(config):
    """All keys with value, unit and meaning, a line each."""
    rows = []
    for key, (value, comment) in describe(config).items():
        text = json.dumps(value, default=dataclasses.asdict)
        rows.append(f"  {key}={text if len(text) <= 60 else text[:57] + '...'}\n      {comment}")
    return "\n".join(rows)
