"""Which locations answer for which objects, from objects to locations: cost follows the number of objects, not the image's area.

Each object proposes the 3x3 cells around its projected centre on the level of its size (FCOS3D's radius of 1.5 strides,
arXiv:2104.10956 sec. 3.3); where objects meet, a scatter-minimum gives the cell to the nearest centre. Shapes depend only on the
padded number of objects, so nothing waits for the device and the step compiles. After the first steps an object learns at
the best of its cells (`losses.keep_best`).
"""

import dataclasses
import math

import torch
from torch import Tensor

from scene.geometry import LIMITS, MIN_DEPTH, SPEED, heading_bin, project, yaw_to_alpha

RADIUS = 1.5  # strides
CELLS = 9  # proposals per object and level: 3x3


@dataclasses.dataclass(frozen=True)
class Targets:
    """Slots of proposed cells, S = 9 M per image; a slot that lost its cell or belongs to padding is not positive.

    Everything that describes an object is gathered per slot, so that losses see flat, equal shapes.
    """

    location: Tensor  # (B, S) index of the cell over all levels; 0 where not positive
    positive: Tensor  # (B, S) bool
    object: Tensor  # (B, S) index of the object in its image
    label: Tensor  # (B, S)
    center: Tensor  # (B, S, 3) m
    size: Tensor  # (B, S, 3) m
    yaw: Tensor  # (B, S)
    alpha: Tensor  # (B, S)
    box: Tensor  # (B, S, 4) px
    full_box: Tensor  # (B, S, 4) px
    full_ok: Tensor  # (B, S) bool: the 3D box lies wholly before the camera plane
    center_ok: Tensor  # (B, S) bool: the 3D centre can be projected
    pixel: Tensor  # (B, S, 2) px: projected 3D centre, wherever it lies
    centerness: Tensor  # (B, S) in (0, 1]
    ignored: Tensor  # (B, N) bool: negatives inside ignore regions
    velocity: Tensor | None = None  # (B, S, 2) along x and z of the camera, m/s; where the model has the output
    velocity_ok: Tensor | None = None  # (B, S) bool: the velocity is known
    attribute: Tensor | None = (
        None  # (B, S) index into the model's attribute_names, -1 unknown; where the model has the output
    )


def target_points(batch, height, width, projected=True):
    """Projected centres (B, M, 2), the points that cells are chosen around (B, M, 2), and which centres are usable (B, M).

    The points are the projected centres, or with projected=False the visible boxes' centres. A centre that leaves the image is replaced
    by the border point on the line to it from the 2D box's centre (MonoFlex, arXiv:2104.02323, sec. 3.2), one that cannot be projected
    by the 2D box's centre.
    """
    center, box = batch["center"], batch["box"]
    usable = center[..., 2] > MIN_DEPTH
    ahead = torch.where(usable[..., None], center, 10.0)  # any point that can be projected
    pixel = project(ahead, batch["K"][:, None])
    middle = (box[..., :2] + box[..., 2:]) / 2
    pixel = torch.where(usable[..., None], pixel, middle)
    edge = torch.stack([torch.full_like(pixel[..., 0], width - 1.0), torch.full_like(pixel[..., 1], height - 1.0)], -1)
    middle = torch.minimum(middle.clamp(min=0), edge)
    if not projected:
        return pixel, middle, usable
    step = pixel - middle
    room = torch.where(step > 0, edge - middle, middle) / step.abs().clamp(
        min=1e-6
    )  # share of the way until each border
    return pixel, middle + step * room.amin(-1, keepdim=True).clamp(max=1), usable


def level_of(box, level_sizes):
    """Pyramid level (...) of visible boxes (..., 4): by the longer side, px."""
    side = (box[..., 2:] - box[..., :2]).amax(-1)
    return sum(((side > border).long() for border in level_sizes), torch.zeros_like(side, dtype=torch.long))


def per_level(level, values):
    """The value (...) of each level (...), float: values[level] without a table that the device would have to be sent."""
    chosen = torch.full_like(level, values[0], dtype=torch.float32)
    for number, value in enumerate(values[1:], 1):
        chosen = torch.where(level == number, float(value), chosen)
    return chosen


def propose(point, level, strides, height, width):
    """The 3x3 cells around points (B, M, 2) on their levels (B, M).

    Returns location (B, M, 9) over all levels, inside (B, M, 9) and distance (B, M, 9) from cell to point in strides.
    """
    before = [
        sum((height // s) * (width // s) for s in strides[:i]) for i in range(len(strides))
    ]  # cells of the levels before each
    stride, before = (per_level(level, values)[..., None] for values in (strides, before))
    columns, rows = width / stride, height / stride
    edge = torch.cat([columns, rows], -1) - 1
    at = (point + 0.5) / stride  # cells (B, M, 2)
    cell = torch.minimum(at.floor().clamp(min=0), edge)
    near = torch.arange(-1, 2, device=point.device)
    around = torch.cartesian_prod(near, near).flip(-1)
    cells = cell[..., None, :] + around  # (B, M, 9, 2)
    inside = ((cells >= 0) & (cells <= edge[..., None, :])).all(-1)
    distance = (cells + 0.5 - at[..., None, :]).norm(dim=-1)
    column, row = cells.unbind(-1)
    location = before + row * columns + column
    return torch.where(inside, location, 0).long(), inside, distance


def assign(batch, config):
    """Batch of `data.collate` -> `Targets`, for the model config's size, strides and level sizes. Nothing here waits for the device."""
    with (
        torch.no_grad(),
        torch.autocast(batch["center"].device.type, enabled=False),
    ):  # a projection in bf16 is off by pixels
        height, width = config.size
        pixel, point, usable = target_points(batch, height, width, config.projected_center)
        location, inside, distance = propose(
            point, level_of(batch["box"], config.level_sizes), config.strides, height, width
        )
        count = sum((height // s) * (width // s) for s in config.strides)
        location, positive = settle(
            location, inside & batch["valid"][..., None], distance, batch["center"][..., 2], count
        )

        images, objects = batch["valid"].shape
        owner = torch.arange(objects, device=location.device).repeat_interleave(CELLS).expand(images, -1)  # (B, S)
        alpha = yaw_to_alpha(batch["yaw"], batch["center"])
        told = [
            batch["center"],
            batch["size"],
            batch["box"],
            batch["full_box"],
            pixel,
            batch["yaw"][..., None],
            alpha[..., None],
        ]
        told = torch.cat(told, -1).repeat_interleave(CELLS, 1)  # at once: each operator counts more than what it moves
        center, size, box, full_box, pixel, yaw, alpha = told.split([3, 3, 4, 4, 2, 1, 1], -1)
        motion = {}
        if config.velocity:
            velocity = batch["velocity"][..., ::2].repeat_interleave(CELLS, 1)
            motion.update(velocity=velocity.nan_to_num(), velocity_ok=velocity.isfinite().all(-1))
        if config.attributes:
            motion["attribute"] = batch["attribute"].repeat_interleave(CELLS, 1)
        return Targets(
            location=location,
            positive=positive,
            object=owner,
            label=batch["label"].repeat_interleave(CELLS, 1),
            center=center,
            size=size,
            yaw=yaw.squeeze(-1),
            alpha=alpha.squeeze(-1),
            box=box,
            full_box=full_box,
            full_ok=~batch["crosses"].repeat_interleave(CELLS, 1),
            center_ok=usable.repeat_interleave(CELLS, 1),
            pixel=pixel,
            centerness=torch.exp(-2.5 * distance.flatten(1) / (math.sqrt(2) * RADIUS)),
            ignored=inside_regions(batch["ignore"], config),
            **motion,
        )


def settle(location, proposed, distance, depth, count):
    """Give each cell to one object: the nearest centre in strides, then the nearer object, then the first.

    location, proposed, distance (B, M, 9); depth (B, M); count N of cells. Returns location (B, S) and positive (B, S).
    """
    images = len(location)
    far = torch.finfo(distance.dtype).max
    cost = torch.where(proposed, distance + 1e-4 * depth.clamp(0, 200)[..., None], far).flatten(1)  # (B, S)
    location = location.flatten(1)
    least = cost.new_full((images, count), far).scatter_reduce(1, location, cost, "amin")
    best = (cost <= least.gather(1, location)) & proposed.flatten(1)
    slot = torch.arange(cost.shape[1], device=cost.device).expand(images, -1)
    claim = torch.where(best, slot, slot.shape[1])
    first = torch.full((images, count), slot.shape[1], device=cost.device).scatter_reduce(1, location, claim, "amin")
    positive = best & (first.gather(1, location) == slot)
    return torch.where(positive, location, 0), positive


def inside_regions(regions, config):
    """Locations (B, N) bool inside any of the regions (B, R, 4), level by level as rows times columns."""
    masks = []
    for stride in config.strides:
        row, column = (torch.arange(side // stride, device=regions.device) for side in config.size)
        left, top, right, bottom = ((regions + 0.5) / stride - 0.5).split(1, -1)  # in cells
        across = (column >= left) & (column <= right)  # (B, R, W)
        down = (row >= top) & (row <= bottom)  # (B, R, H)
        masks.append((down[..., :, None] & across[..., None, :]).any(1).flatten(1))
    return torch.cat(masks, 1)


def measure_priors(dataset, config):
    """Config with the priors that were left empty measured on the training labels, seen without augmentation.

    size_prior: mean (l, h, w) of each class; depth_mean and depth_std: of the virtual depth of the objects on each pyramid level.
    A class or level without objects gets the values of all objects. Returns the completed `ModelConfig`.
    """
    if config.size_prior and config.depth_mean and config.depth_std:
        return config
    found = []  # labels, sizes, levels and depths of some thousand frames
    for label, size, box, depth, focal in dataset.whole_objects():
        columns = (
            label.to(torch.int16),
            size,
            level_of(box, config.level_sizes).to(torch.int8),
            depth * config.virtual_focal / focal,
        )
        found.append([column[depth > MIN_DEPTH] for column in columns])
    if not any(len(label) for label, *_ in found):
        raise ValueError(f"none of the {len(dataset)} training frames holds an object of {', '.join(config.classes)}")
    labels, sizes, levels, depths = (torch.cat(column) for column in zip(*found, strict=True))
    rows = lambda mask, few: mask if mask.sum() >= few else torch.ones_like(mask)  # noqa: E731
    size_prior = [sizes[rows(labels == c, 1)].mean(0).tolist() for c in range(len(config.classes))]
    by_level = [depths[rows(levels == level, 4)] for level in range(len(config.strides))]
    measured = {
        "size_prior": tuple(tuple(round(v, 4) for v in prior) for prior in size_prior),
        "depth_mean": tuple(round(d.mean().item(), 3) for d in by_level),
        "depth_std": tuple(round(max(d.std(correction=0).item(), 0.5), 3) for d in by_level),
    }
    return dataclasses.replace(config, **{name: value for name, value in measured.items() if not getattr(config, name)})


def encode(targets, model, K):
    """Raw outputs (B, S, F) that `model.decode` turns back into the objects of the targets; both depth estimates say the true depth.

    Used to check decode, and to evaluate the ground truth itself through the whole path. K (B, 3, 3).
    """
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
