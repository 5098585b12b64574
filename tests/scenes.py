"""Hand-made scenes for the tests of targets, losses and model: objects in, batches out through the real data path."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from data import DataConfig, Detection3D, collate
from losses import LossConfig, compute_losses
from model import ModelConfig
from scene.frames import Frame, join, make_labels, whole_view
from scene.geometry import LIMITS, MIN_DEPTH, SPEED, clip_boxes, heading_bin, project_boxes
from targets import assign

CLASSES = ("Car", "Pedestrian", "Cyclist")
SIZE = (96, 320)
K = np.array([[185.0, 0, 159.5], [0, 185, 47.5], [0, 0, 1]])
MODEL = ModelConfig(
    backbone="test_resnet",
    size=SIZE,
    channels=32,
    size_prior=((3.9, 1.5, 1.6), (0.8, 1.75, 0.6), (1.8, 1.75, 0.6)),
    depth_mean=(90.0, 60.0, 30.0),
    depth_std=(40.0, 30.0, 20.0),
    level_sizes=(24.0, 64.0),
    predict_yaw=True,
    velocity=True,
    attributes={
        "Car": ("vehicle.moving", "vehicle.parked"),
        "Pedestrian": ("pedestrian.moving", "pedestrian.sitting", "pedestrian.standing"),
    },
)
CAR = ("Car", (-2, 1, 16), (4, 1.5, 1.8), 0.4, None, (2, 0, -9), "vehicle.moving")
PERSON = ("Pedestrian", (3, 0.9, 12), (0.7, 1.8, 0.6), -2.0, None, (0, 0, 0), "pedestrian.standing")
FAR = ("Car", (4, 1, 40), (4.4, 1.6, 1.9), 1.5)
TRUNCATED = ("Car", (8.7, 1, 9), (4.2, 1.5, 1.8), 1.2)  # its centre lies right of the image
CROSSING = ("Car", (1.6, 1, 1.2), (4, 1.5, 1.8), 1.5)  # reaches behind the camera plane
BEHIND = (
    "Car",
    (1.2, 1, -0.4),
    (4, 1.5, 1.8),
    1.5,
    (200, 60, 319, 95),
)  # its centre lies behind the camera, its front in sight


def make_sample(*objects, ignore=(), K=K, size=SIZE, flip=False):
    """The sample of an image as large as the canvas, or of its mirror image.

    objects: (name, center, size l h w, yaw[, visible box or None[, velocity, attribute]]); ignore: boxes.
    """
    named = np.array([item[0] for item in objects], dtype=object)
    center, extent = (np.array([item[i] for item in objects], dtype=float).reshape(-1, 3) for i in (1, 2))
    yaw = np.array([item[3] for item in objects], dtype=float)
    full, _ = project_boxes(center, extent, yaw, K)
    box = clip_boxes(np.nan_to_num(full), size[1], size[0])
    for i, item in enumerate(objects):
        box[i] = item[4] if len(item) > 4 and item[4] else box[i]
    motion = [item[5:] or ((np.nan,) * 3, "") for item in objects]
    velocity, attribute = (
        np.array([m[i] for m in motion], dtype=d).reshape(-1, *s) for i, d, s in ((0, float, (3,)), (1, object, ()))
    )
    labels = make_labels(named, box, extent, center, yaw, velocity=velocity, attribute=attribute)
    if len(ignore):
        n = len(ignore)
        regions = make_labels(
            ["DontCare"] * n, ignore, np.full((n, 3), -1.0), np.full((n, 3), -1000.0), np.full(n, -10.0)
        )
        labels = join([labels, regions])
    frame = Frame("frame", Path("frame.png"), K, labels)
    data = Detection3D([frame], dataclasses.replace(MODEL, size=size), DataConfig())
    sample = data.sample_from(frame, dataclasses.replace(whole_view(size[1], size[0], size), flip=flip))
    return {**sample, "image": torch.zeros(*size, 3, dtype=torch.uint8), "index": torch.tensor(0)}


def make_batch(*scenes, ignore=(), **options):
    """One image per scene (a list of objects)."""
    return collate([make_sample(*scene, ignore=ignore, **options) for scene in scenes])


def random_outputs(model, images, seed=0, scale=1.0):
    """Class logits (B, N, C) and raw outputs (B, N, F), leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    count, config = len(model.location_stride), model.config
    logits = torch.randn(images, count, len(config.classes), generator=generator) * scale
    raw = torch.randn(images, count, sum(model.fields.values()), generator=generator) * scale
    return logits.requires_grad_(), raw.requires_grad_()


def count_positives(targets):
    """Number of positive slots of a batch, a float scalar."""
    return targets.positive.sum().float()


def all_losses(model, batch, logits, raw, weights=None, best=False):
    """Losses of a batch, every one unless weights say otherwise, and its targets."""
    targets = assign(batch, model.config)
    every = LossConfig(**{name: 1.0 for name in LossConfig.__dataclass_fields__})
    return compute_losses(
        model, logits, raw, targets, batch, weights or every, count_positives(targets).clamp(min=1), best
    ), targets


def encode(targets, model, K):
    """Raw outputs (B, S, F) that `model.decode` turns back into the objects; both depths are right. K (B, 3, 3)."""
    stride = model.location_stride[targets.location][..., None]
    pixel = model.location_pixel[targets.location]
    level = model.location_level[targets.location]
    focal = K.float()[:, None, 1, 1]

    def unbound(value, name):  # inverse of the bound that the head's outputs are kept in
        return LIMITS[name][0] * torch.atanh((value / LIMITS[name][0]).clamp(-1 + 1e-6, 1 - 1e-6))

    reach = torch.cat([pixel - targets.box[..., :2], targets.box[..., 2:] - pixel], -1) / stride
    full = torch.cat([pixel - targets.full_box[..., :2], targets.full_box[..., 2:] - pixel], -1) / (4 * stride)
    excess = (targets.center[..., 2] * model.config.virtual_focal / focal - MIN_DEPTH).clamp(min=1e-3)
    depth = unbound(
        ((excess + torch.log(-torch.expm1(-excess)) + MIN_DEPTH) - model.depth_mean[level]) / model.depth_std[level],
        "depth",
    )
    height = unbound(
        torch.log(focal * targets.size[..., 1] / targets.center[..., 2].clamp(min=0.1) / (4 * stride[..., 0])), "height"
    )
    confident = torch.full_like(depth, -20.0)
    bins = heading_bin(targets.alpha).float()
    fields = {
        "centerness": torch.logit(targets.centerness.clamp(1e-4, 1 - 1e-4))[..., None],
        "box": unbound(torch.log(reach.clamp(min=1e-2)), "box"),
        "full_box": full,
        "offset": (targets.pixel - pixel) / stride,
        "depth": torch.stack([depth, confident], -1),
        "height": torch.stack([height, confident], -1),
        "size": unbound(torch.log(targets.size / model.size_prior[targets.label]), "size"),
        "alpha": torch.stack([torch.sin(2 * targets.alpha), torch.cos(2 * targets.alpha)], -1),
        "direction": torch.stack([10 - 20 * bins, 20 * bins - 10], -1),
        "yaw": torch.stack([torch.sin(targets.yaw), torch.cos(targets.yaw)], -1),
    }
    if targets.velocity is not None:
        fields["velocity"] = targets.velocity / SPEED
    if targets.attribute is not None:
        every = torch.arange(model.fields["attribute"], device=pixel.device)
        fields["attribute"] = 20 * (targets.attribute[..., None] == every).float() - 10
    return torch.cat([fields[name] for name in model.fields], -1)
