"""The optimizer of a run, and its learning rate as a function of the step."""

import difflib
import math

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay

from engine.muon import Muon
from scene.frames import UserError


def make_optimizer(model, options):
    """Ours, 'muon', or timm's optimizer of that name, fused where there is such; no weight decay on norms and biases.

    Raises UserError if unknown.
    """
    info = find_optimizer(options.optimizer)
    if options.optimizer == "muon":
        return Muon(make_groups(model, options), lr=options.lr, betas=(0.9, options.beta2))
    chosen = {"betas": (0.9, options.beta2)} if info.num_betas == 2 else {}
    if issubclass(info.opt_class, torch.optim.Adam):
        # leaves out a step without asking the host; SGD's would keep garbage from a first step left out
        chosen["fused"] = True
    learning = model  # timm groups a model as we do, and knows its names
    if options.backbone_lr != 1:
        learning = make_groups(model, options)
    decay = options.weight_decay
    return create_optimizer_v2(learning, opt=options.optimizer, lr=options.lr, weight_decay=decay, **chosen)


def find_optimizer(name):
    """timm's description of an optimizer. Raises UserError for an unknown one, or one that cannot be used here."""
    names = list_optimizers()
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3))
        raise UserError(f"train.optimizer {name!r} is unknown to timm{f'; near it: {near}' if near else ''}")
    info = get_optimizer_info(name)
    if isinstance(info.opt_class, str):
        raise UserError(f"train.optimizer {name!r} needs {info.opt_class.rpartition('.')[0]}, which is not installed")
    if info.second_order:
        raise UserError(f"train.optimizer {name!r} needs second derivatives, which the training does not compute")
    return info


def make_groups(model, options):
    """Parameters that learn, without and with weight decay, the backbone's apart where its rate has a factor."""
    groups = param_groups_weight_decay(model, options.weight_decay)
    if options.backbone_lr == 1:
        return groups
    backbone = {p for name, p in model.named_parameters() if name.startswith("backbone.")}
    parts = []
    for group in groups:
        for scale, inside in ((1.0, False), (options.backbone_lr, True)):
            params = [p for p in group["params"] if (p in backbone) == inside]
            parts += [{**group, "params": params, "lr_scale": scale}] if params else []
    return parts


def lr_at(step, total, config):
    """Learning rate of a step in [0, total): linear warm-up, then the schedule. Pure: a resumed run needs no state."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    done = step / max(1, total)
    if config.schedule == "cosine":
        return config.lr * warm * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        return config.lr * warm * 0.1 ** ((done >= 2 / 3) + (done >= 11 / 12))
    return config.lr * warm


def set_lr(optimizer, lr):
    """Give a learning rate to all groups, times the lr_scale that some have. Returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
