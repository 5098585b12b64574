"""Which locations answer for which objects: cost follows the number of objects, not the area of the image.

Each object proposes the 3x3 cells around its projected centre on the level of its size (FCOS3D's radius of 1.5 strides,
arXiv:2104.10956 sec. 3.3); where objects meet, the nearest centre has the cell. Shapes depend only on the padded number
of objects, so nothing waits for the device. Later an object learns at its best cells alone (`losses.keep_best`).
"""

import dataclasses
import math

import torch
from torch import Tensor

from scene.frames import UserError
from scene.geometry import MIN_DEPTH, project, yaw_to_alpha

RADIUS = 1.5  # strides
CELLS = 9  # proposals per object and level: 3x3


@dataclasses.dataclass(frozen=True)
class Targets:
    """Slots of proposed cells, S = 9 M per image; a slot that lost its cell or belongs to padding is not positive."""

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
    attribute: Tensor | None = None  # (B, S) index into the model's attribute_names, -1 unknown; with the output


def target_points(batch, height, width, projected=True):
    """Projected centres (B, M, 2), the points that cells lie around (B, M, 2), and which centres are usable (B, M).

    The points are the projected centres, or with projected=False the visible boxes'. Where a centre leaves the image:
    the border point on the line to it from the visible box's (MonoFlex, arXiv:2104.02323, sec. 3.2).
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
    room = torch.where(step > 0, edge - middle, middle)
    share = room / step.abs().clamp(min=1e-6)  # of the way until each border
    return pixel, middle + step * share.amin(-1, keepdim=True).clamp(max=1), usable


def level_of(box, level_sizes):
    """Pyramid level (...) of visible boxes (..., 4): by the longer side, px."""
    side = (box[..., 2:] - box[..., :2]).amax(-1)
    return sum(((side > border).long() for border in level_sizes), torch.zeros_like(side, dtype=torch.long))


def per_level(level, values):
    """The value (...) of each level (...), float: values[level] without a table that would be sent to the device."""
    chosen = torch.full_like(level, values[0], dtype=torch.float32)
    for number, value in enumerate(values[1:], 1):
        chosen = torch.where(level == number, float(value), chosen)
    return chosen


def propose(point, level, pyramid):
    """The 3x3 cells of a `Pyramid` around points (B, M, 2) on their levels (B, M).

    Returns location (B, M, 9) over all levels, inside (B, M, 9) and distance (B, M, 9) from cell to point in strides.
    """
    height, width = pyramid.size
    stride, start = (per_level(level, values)[..., None] for values in (pyramid.strides, pyramid.starts))
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
    location = start + row * columns + column
    return torch.where(inside, location, 0).long(), inside, distance


def assign(batch, model):
    """Batch of `data.collate` -> `Targets` for a `ModelConfig`. Nothing here waits for the device."""
    with torch.no_grad(), torch.autocast(batch["center"].device.type, enabled=False):  # in bf16 pixels would be off
        pyramid = model.pyramid
        pixel, point, usable = target_points(batch, *pyramid.size, model.projected_center)
        location, inside, distance = propose(point, level_of(batch["box"], model.level_sizes), pyramid)
        proposed = inside & batch["valid"][..., None]
        location, positive = share_out(location, proposed, distance, batch["center"][..., 2], sum(pyramid.counts))

        images, objects = batch["valid"].shape
        owner = torch.arange(objects, device=location.device).repeat_interleave(CELLS).expand(images, -1)  # (B, S)
        centerness = torch.exp(-2.5 * distance.flatten(1) / (math.sqrt(2) * RADIUS))
        ignored = inside_regions(batch["ignore"], pyramid)

        alpha = yaw_to_alpha(batch["yaw"], batch["center"])
        columns = [batch[name] for name in ("center", "size", "box", "full_box")]
        columns = torch.cat([*columns, pixel, batch["yaw"][..., None], alpha[..., None]], -1)
        columns = columns.repeat_interleave(CELLS, 1)  # at once: each operator costs more than what it moves
        columns = columns.split([3, 3, 4, 4, 2, 1, 1], -1)
        slots = dict(zip(("center", "size", "box", "full_box", "pixel", "yaw", "alpha"), columns, strict=True))
        slots |= {name: slots[name].squeeze(-1) for name in ("yaw", "alpha")}

        others = {"label": batch["label"], "full_ok": ~batch["crosses"], "center_ok": usable}
        if model.velocity:
            others["velocity"] = batch["velocity"][..., ::2]
        if model.attributes:
            others["attribute"] = batch["attribute"]
        slots |= {name: values.repeat_interleave(CELLS, 1) for name, values in others.items()}
        if model.velocity:
            slots["velocity_ok"] = slots["velocity"].isfinite().all(-1)
            slots["velocity"] = slots["velocity"].nan_to_num()
        return Targets(location, positive, owner, centerness=centerness, ignored=ignored, **slots)


def share_out(location, proposed, distance, depth, count):
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


def inside_regions(regions, pyramid):
    """Locations (B, N) bool inside any of the regions (B, R, 4), level by level as rows times columns."""
    masks = []
    for stride, shape in zip(pyramid.strides, pyramid.shapes, strict=True):
        row, column = (torch.arange(side, device=regions.device) for side in shape)
        left, top, right, bottom = ((regions + 0.5) / stride - 0.5).split(1, -1)  # in cells
        across = (column >= left) & (column <= right)  # (B, R, W)
        down = (row >= top) & (row <= bottom)  # (B, R, H)
        masks.append((down[..., :, None] & across[..., None, :]).any(1).flatten(1))
    return torch.cat(masks, 1)


def measure_priors(dataset, model):
    """ModelConfig with the priors that it leaves empty, measured on the labels of `Frames.spread` of whole images.

    A class or level without objects gets the values of all objects. Raises UserError without any, and for an image that
    cannot be read unless data.skip_bad passes it over.
    """
    if model.size_prior and model.depth_mean and model.depth_std:
        return model
    samples = []
    for index in dataset.frames.spread():
        try:
            view = dataset.view_of(index)
        except OSError as error:
            if not dataset.config.skip_bad:
                raise UserError(str(error)) from error
            continue
        sample = dataset.sample_from(dataset.frames[index], view)
        sample["focal"] = sample["K"][1, 1].expand(len(sample["label"]))
        samples.append(sample)
    if not any(len(sample["label"]) for sample in samples):
        raise UserError(f"none of the {len(dataset)} training frames holds an object of {', '.join(model.classes)}")
    names = ("label", "size", "box", "center", "focal")
    label, size, box, center, focal = (torch.cat([sample[name] for sample in samples]) for name in names)
    ahead = center[:, 2] > MIN_DEPTH
    label, size = label[ahead], size[ahead]
    level, depth = level_of(box, model.level_sizes)[ahead], (center[:, 2] * model.virtual_focal / focal)[ahead]
    sizes = [_rows_or_all(size, label == number, 1).mean(0).tolist() for number in range(len(model.classes))]
    depths = [_rows_or_all(depth, level == number, 4) for number in range(len(model.strides))]
    measured = {
        "size_prior": tuple(tuple(round(v, 4) for v in prior) for prior in sizes),
        "depth_mean": tuple(round(d.mean().item(), 3) for d in depths),
        "depth_std": tuple(round(max(d.std(correction=0).item(), 0.5), 3) for d in depths),
    }
    return dataclasses.replace(model, **{name: value for name, value in measured.items() if not getattr(model, name)})


def _rows_or_all(values, mask, few):
    """The rows of a mask; all where those are fewer than so many."""
    return values[mask] if mask.sum() >= few else values
