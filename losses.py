"""The twelve losses, and two of outputs that only some models have: pure functions of outputs and targets, in fp32.

Each returns the sum over the slots (B, S) that are positive; inputs of the others are replaced where they might not be
finite, as a masked NaN is still NaN. `compute_losses` divides by the number of positives over all processes. The last
six of the twelve are our reading of names.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from scene.frames import UserError
from scene.geometry import box_iou, generalized_iou, heading_bin, ray_angle


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weight of each loss. 0: not computed and not logged."""

    loss_cls: float = 1.0  # class of every location, focal
    loss_bbox: float = 1.0  # visible 2D box, 1 - GIoU
    loss_full_bbox: float = 0.5  # box of the whole object, 1 - GIoU
    loss_centerness: float = 1.0  # closeness to the projected centre
    loss_size: float = 1.0  # l, h, w
    loss_location: float = 1.0  # projected centre and depth
    loss_y: float = 0.0  # ground contact
    loss_regress: float = 0.0  # 8 corners
    loss_direction: float = 0.5  # front or back
    loss_cos: float = 1.0  # local angle
    loss_alpha_constrain: float = 0.0  # alpha + ray = yaw; needs model.predict_yaw
    loss_relative: float = 0.0  # depth differences between objects of one image
    loss_velocity: float = 0.05  # speed along x and z, of a model with model.velocity
    loss_attribute: float = 1.0  # moving or parked, and the like, of a model with model.attributes

    def __post_init__(self):
        for field in dataclasses.fields(self):
            weight = getattr(self, field.name)
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"loss.{field.name} is {weight}, expected a finite weight >= 0")


def choose(mask, value, other):
    """value (B, S, ...) where mask (B, S), else other."""
    return torch.where(mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim())), value, other)


def loss_cls(logits, targets):
    """Sigmoid focal loss (arXiv:1708.02002) of logits (B, N, C) at all locations but negatives in ignore regions."""
    images, count, classes = logits.shape
    flat = targets.location * classes + targets.label
    flat = torch.where(targets.positive, flat, count * classes)  # losers go to a spare cell
    truth = logits.new_zeros(images, count * classes + 1).scatter(1, flat, 1.0)[:, :-1].view(images, count, classes)
    counted = ~targets.ignored | truth.bool().any(-1)
    return (sigmoid_focal_loss(logits, truth, alpha=0.25, gamma=2.0) * counted[..., None]).sum()


def loss_boxes(decoded, targets, names):
    """1 - GIoU of the visible box, `loss_bbox`, and of the whole object before the camera, `loss_full_bbox`.

    names: which of them. Returns their sums (len(names),); at once, because each operator calls several backward.
    """
    parts = {
        "loss_bbox": (decoded.box, targets.box, targets.positive),
        "loss_full_bbox": (decoded.full_box, targets.full_box, targets.positive & targets.full_ok),
    }
    boxes, truth, mask = (torch.stack(part) for part in zip(*(parts[name] for name in names), strict=True))
    return ((1 - generalized_iou(choose(mask, boxes, truth), truth)) * mask).sum((1, 2))


def loss_centerness(decoded, targets):
    """Cross-entropy of the centerness logit to exp(-2.5 d / (1.414 r)), FCOS3D."""
    terms = F.binary_cross_entropy_with_logits(decoded.centerness, targets.centerness, reduction="none")
    return (terms * targets.positive).sum()


def loss_size(decoded, targets):
    """|size - size*| / size*, mean of l, h, w (dimension-aware: MonoDLE, arXiv:2103.16237, eq. 4)."""
    error = (decoded.size - targets.size).abs() / targets.size
    return (error.mean(-1) * targets.positive).sum()


def laplace_nll(value, log_sigma, truth):
    """Negative log-likelihood of a Laplace law of standard deviation sigma, m: sqrt2 |error| / sigma + log sigma."""
    return math.sqrt(2) * (value - truth).abs() * torch.exp(-log_sigma) + log_sigma


def loss_location(decoded, targets, stride):
    """Smooth L1 of the projected centre in strides (B, S) px plus Laplace NLL of the fused depth and each estimate, m.

    Of positives whose centre can be projected.
    """
    mask = targets.positive & targets.center_ok
    zero = torch.zeros_like(decoded.pixel)
    error = choose(mask, (decoded.pixel - targets.pixel) / stride[..., None], zero)
    offset = F.smooth_l1_loss(error, zero, reduction="none", beta=1 / 9).sum(-1)
    depth = laplace_nll(decoded.depth, decoded.log_sigma, targets.center[..., 2:]).mean(-1)
    return ((offset + depth) * mask).sum()


def loss_y(decoded, targets):
    """L1 of the bottom centre's height, m: ground contact."""
    mask = targets.positive & targets.center_ok
    bottom = decoded.center[..., 1] + decoded.size[..., 1] / 2
    truth = targets.center[..., 1] + targets.size[..., 1] / 2
    error = (choose(mask, bottom, truth) - truth).abs()
    return (error * mask).sum()


def half_angle(double, reference):
    """Unit vector (sin a, cos a) of the half of a doubled angle (sin 2a, cos 2a) that lies nearer to a reference angle.

    double (..., 2) unit vectors; reference (...) radians. The value comes from atan2 without gradient; the gradient
    from a = (a0 + exp(2ia) conj(a0)) / 2, exact at a0 and without the singular square roots of the half-angle formulas.
    """
    with torch.no_grad():
        angle = torch.atan2(double[..., 0], double[..., 1]) / 2
        angle = angle + math.pi * (torch.cos(angle - reference) < 0)
        sine, cosine = torch.sin(angle), torch.cos(angle)
    double_sine, double_cosine = double.unbind(-1)
    turned_sine = double_sine * cosine - double_cosine * sine
    turned_cosine = double_cosine * cosine + double_sine * sine
    return (sine + turned_sine) / 2, (cosine + turned_cosine) / 2


def turn(sine, cosine, angle):
    """Sine and cosine (...) of an angle given by its sine and cosine, plus another angle (...)."""
    s, c = torch.sin(angle), torch.cos(angle)
    return sine * c + cosine * s, cosine * c - sine * s


def corner_reach(length, width, sine, cosine):
    """Mean over the corners of a box of |x| + |z| from its centre; lengths (...) m along axes (sine, cosine) (...).

    Corners lie at x = +-a +-b, and the mean of |a + b| and |a - b| is max(|a|, |b|).
    """
    length, width, sine, cosine = length.abs(), width.abs(), sine.abs(), cosine.abs()
    return (torch.maximum(cosine * length, sine * width) + torch.maximum(sine * length, cosine * width)) / 2


def loss_regress(decoded, targets, K):
    """Disentangled L1 over the 8 corners, metres (MonoDIS, arXiv:1905.12365): one group of outputs at a time.

    Groups: projected centre, depth, size, heading (of the yaw output where there is one, else of the half of the angle
    that lies nearer). K (B, 3, 3). The mean over groups, corners and axes.
    """
    mask = targets.positive & targets.center_ok
    truth, depth = targets.center, targets.center[..., 2:]
    focal = torch.stack([K[:, None, 0, 0], K[:, None, 1, 1]], -1)
    metres = depth.clamp(min=0.1) / focal  # per px at the true depth (B, S, 2)
    ray = truth / depth.clamp(min=0.1)
    if decoded.yaw_vector is None:
        sine, cosine = turn(*half_angle(decoded.double_alpha, targets.alpha), ray_angle(truth))
    else:
        sine, cosine = decoded.yaw_vector.unbind(-1)
    length, _, width = targets.size.unbind(-1)
    more_length, more_height, more_width = (decoded.size - targets.size).unbind(-1)
    true_sine, true_cosine = torch.sin(targets.yaw), torch.cos(targets.yaw)
    groups = (
        ((decoded.pixel - targets.pixel) * metres).abs().sum(-1),  # every corner moves alike
        ((decoded.depth[..., :1] - depth) * ray).abs().sum(-1),
        corner_reach(more_length, more_width, true_sine, true_cosine) + more_height.abs() / 2,
        corner_reach(length, width, sine - true_sine, cosine - true_cosine),
    )
    return (choose(mask, sum(groups) / (3 * len(groups)), torch.zeros_like(length)) * mask).sum()


def loss_direction(decoded, targets):
    """Cross-entropy of the heading bin."""
    terms = F.cross_entropy(decoded.direction.transpose(1, 2), heading_bin(targets.alpha), reduction="none")
    return (terms * targets.positive).sum()


def loss_cos(decoded, targets):
    """1 - cos(2 (alpha - alpha*)) of unit vectors; the half is left to `loss_direction`."""
    truth = torch.stack([torch.sin(2 * targets.alpha), torch.cos(2 * targets.alpha)], -1)
    cosine = (decoded.double_alpha * truth).sum(-1)
    return ((1 - cosine) * targets.positive).sum()


def loss_alpha_constrain(decoded, targets):
    """1 - cos(yaw - alpha - ray) of the head's angles, alpha in the true half, the ray of its own centre detached."""
    mask = targets.positive & targets.center_ok
    sine, cosine = turn(*half_angle(decoded.double_alpha, targets.alpha), ray_angle(decoded.center).detach())
    return ((1 - decoded.yaw_vector[..., 0] * sine - decoded.yaw_vector[..., 1] * cosine) * mask).sum()


def loss_relative(decoded, targets, objects):
    """Huber loss on differences of log depth between objects of an image; near pairs weigh more, exp(-distance / 10 m).

    An object's depth is the mean log depth of its positive slots. objects M. The weighted mean over the pairs of an
    image counts once for each of its objects.
    """
    mask = (targets.positive & targets.center_ok).float()
    log_depth = torch.log(decoded.depth[..., 0].clamp(min=0.1))
    images = len(mask)
    count = mask.new_zeros(images, objects).scatter_add(1, targets.object, mask)
    mean = mask.new_zeros(images, objects).scatter_add(1, targets.object, log_depth * mask) / count.clamp(min=1)
    center = targets.center.view(images, objects, -1, 3)[:, :, 0]
    truth = torch.log(center[..., 2].clamp(min=0.1))
    error = (mean[:, :, None] - mean[:, None]) - (truth[:, :, None] - truth[:, None])
    distance = (center[:, :, None] - center[:, None]).abs().sum(-1)
    learned = (count > 0).float()
    weight = torch.exp(-distance / 10) * learned[:, :, None] * learned[:, None]
    weight = weight * (1 - torch.eye(objects, device=mask.device))
    pairs = (F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=0.1) / 0.1 * weight).sum((1, 2))
    return (pairs / weight.sum((1, 2)).clamp(min=1e-6) * learned.sum(1)).sum()


def loss_velocity(decoded, targets):
    """Smooth L1 of the velocity along x and z, m/s, beta 1/9 as in FCOS3D, where it is known."""
    mask = targets.positive & targets.velocity_ok
    velocity = choose(mask, decoded.velocity, targets.velocity)
    return (F.smooth_l1_loss(velocity, targets.velocity, reduction="none", beta=1 / 9).sum(-1) * mask).sum()


def loss_attribute(decoded, targets, possible):
    """Cross-entropy of the attribute, where it is known and possible (C, A) for the class."""
    truth = targets.attribute.clamp(min=0)
    allowed = possible[targets.label].gather(-1, truth[..., None]).squeeze(-1) > 0
    mask = targets.positive & (targets.attribute >= 0) & allowed
    logits = choose(mask, decoded.attribute, torch.zeros_like(decoded.attribute))
    return (F.cross_entropy(logits.transpose(1, 2), truth, reduction="none") * mask).sum()


def keep_best(targets, decoded, logits, objects):
    """Targets of which each object keeps its best cells by the outputs there: dynamic top-k (SimOTA, arXiv:2107.08430).

    decoded: `Detector.decode` at the slots; logits (B, N, C); objects M. A cell is worth the square root of its class
    probability times the IoU of the visible boxes; an object keeps as many of its positive cells as their IoUs sum up
    to, at least one. The others become background. Depth has no say, or sigma would learn from chosen errors.
    """
    with torch.no_grad():
        logit = logits.flatten(1).gather(1, targets.location * logits.shape[-1] + targets.label)
        overlap = torch.where(targets.positive, box_iou(decoded.box, targets.box), 0.0)
        worth = overlap * logit.sigmoid().sqrt() + targets.positive  # one that competes is worth more than others
        worth = worth.nan_to_num(3.0).unflatten(1, (objects, -1))  # NaN must show
        overlap = overlap.nan_to_num(1.0).unflatten(1, (objects, -1))
        rank = torch.argsort(worth, dim=-1, descending=True, stable=True).argsort(-1)
        best = rank < overlap.sum(-1, keepdim=True).round().clamp(min=1)
        return dataclasses.replace(targets, positive=targets.positive & best.flatten(1))


def compute_losses(model, logits, raw, targets, batch, weights, positives, best=False):
    """All losses of non-zero weight whose outputs the model has, {name: scalar}, unweighted, divided by the positives.

    logits (B, N, C) and raw (B, N, F) of `model`; `targets` of the batch; weights `LossConfig`. positives: their number
    in the whole step, at least 1, over processes and train.accumulate: DDP averages gradients and Accelerate the parts
    of a step, so a local count would weigh them unequally. With best, and boxes that are learned at all, each object
    learns at its best cells alone (`keep_best`); positives still is the number of all.
    """
    with torch.autocast(raw.device.type, enabled=False):
        logits, raw, K = logits.float(), raw.float(), batch["K"].float()
        gathered = raw.gather(1, targets.location[..., None].expand(-1, -1, raw.shape[-1]))
        gathered = choose(targets.positive, gathered, torch.zeros_like(gathered))
        decoded = model.decode(gathered, targets.location, targets.label, K)
        objects = batch["valid"].shape[1]
        if best and weights.loss_bbox:
            targets = keep_best(targets, decoded, logits, objects)
        named = [name for name in ("loss_bbox", "loss_full_bbox") if getattr(weights, name)]
        boxes = dict(zip(named, loss_boxes(decoded, targets, named).unbind(), strict=True)) if named else {}
        terms = {
            "loss_cls": lambda: loss_cls(logits, targets),
            "loss_bbox": lambda: boxes["loss_bbox"],
            "loss_full_bbox": lambda: boxes["loss_full_bbox"],
            "loss_centerness": lambda: loss_centerness(decoded, targets),
            "loss_size": lambda: loss_size(decoded, targets),
            "loss_location": lambda: loss_location(decoded, targets, model.location_stride[targets.location]),
            "loss_y": lambda: loss_y(decoded, targets),
            "loss_regress": lambda: loss_regress(decoded, targets, K),
            "loss_direction": lambda: loss_direction(decoded, targets),
            "loss_cos": lambda: loss_cos(decoded, targets),
            "loss_alpha_constrain": lambda: loss_alpha_constrain(decoded, targets),
            "loss_relative": lambda: loss_relative(decoded, targets, objects),
        }
        if decoded.velocity is not None:
            terms["loss_velocity"] = lambda: loss_velocity(decoded, targets)
        if decoded.attribute is not None:
            terms["loss_attribute"] = lambda: loss_attribute(decoded, targets, model.attribute_possible)
        chosen = [name for name in terms if getattr(weights, name)]
        values = torch.stack([terms[name]() for name in chosen]) / positives
        return dict(zip(chosen, values.unbind(), strict=True))


def weighted_sum(losses, weights):
    """The scalar that is learned: {name: scalar} times its weight in `LossConfig`, 1 for other names, summed."""
    return sum(getattr(weights, name, 1.0) * value for name, value in losses.items())
