"""Hand-made scenes for the tests of targets, losses and model: objects in, batches out through the real data path."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from data import DataConfig, Detection3D, collate
from losses import LossConfig, compute_losses, count_positives
from model import ModelConfig
from scene.frames import Frame, join, make_labels, whole_view
from scene.geometry import clip_boxes, project_boxes
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
    named, center, extent, yaw = (np.array([o[i] for o in objects], dtype=d).reshape(-1, *s)
                                  for i, d, s in ((0, object, ()), (1, float, (3,)), (2, float, (3,)), (3, float, ())))  # fmt: skip
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
    data = Detection3D([frame], CLASSES, size, DataConfig(), False, velocity=True, attributes=MODEL.attribute_names)
    sample = data.sample_from(frame, dataclasses.replace(whole_view(size[1], size[0], size), flip=flip))
    return {
        **sample,
        "image": torch.zeros(*size, 3, dtype=torch.uint8),
        "index": torch.tensor(0),
        "skipped": torch.tensor(0),
    }


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


def all_losses(model, batch, logits, raw, weights=None, best=False):
    """Losses of a batch, every one unless weights say otherwise, and its targets."""
    targets = assign(batch, model.config)
    every = LossConfig(**{name: 1.0 for name in LossConfig.__dataclass_fields__})
    return compute_losses(
        model, logits, raw, targets, batch, weights or every, count_positives(targets).clamp(min=1), best
    ), targets
