"""The twelve losses, and two of outputs that only some models have: pure functions of what the head says and should say, always in fp32.

Each takes positives as flat slots (B, S) with a mask, multiplies its terms by that mask after replacing the inputs of the others (a
masked NaN is still NaN), and returns a sum; `compute_losses` divides by the number of positives over all processes. The meanings of the
last six of the twelve are our reading of the names of the system that this one succeeds.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

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
                raise ValueError(f"loss.{field.name} is {weight}, expected a finite weight >= 0")


def masked_sum(terms, mask):
    """Sum over slots of terms (B, S) where mask (B, S). The terms must already be finite everywhere."""
    return (terms * mask).sum()


def choose(mask, value, other):
    """value where mask (B, S), else other: how an input is kept out of a formula. Shapes (B, S, ...)."""
    return torch.where(mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim())), value, other)


def loss_cls(logits, targets):
    """Sigmoid focal loss (alpha .25, gamma 2; arXiv:1708.02002) over all locations but negatives in ignore regions.

    logits (B, N, C). Returns a sum.
    """
    images, count, classes = logits.shape
    flat = torch.where(
        targets.positive, targets.location * classes + targets.label, count * classes
    )  # losers go to a spare cell
    truth = logits.new_zeros(images, count * classes + 1).scatter(1, flat, 1.0)[:, :-1].view(images, count, classes)
    counted = ~targets.ignored | truth.bool().any(-1)
    return (sigmoid_focal_loss(logits, truth, alpha=0.25, gamma=2.0) * counted[..., None]).sum()


def loss_boxes(decoded, targets, names):
    """1 - GIoU of boxes (B, S, 4) px: `loss_bbox` of the visible one, `loss_full_bbox` of the whole object, if before the camera.

    names: which of them. Returns their sums over positives (len(names),); at once, because each operator calls several backward.
    """
    parts = {
        "loss_bbox": (decoded.box, targets.box, targets.positive),
        "loss_full_bbox": (decoded.full_box, targets.full_box, targets.positive & targets.full_ok),
    }
    boxes, truth, mask = (torch.stack(part) for part in zip(*(parts[name] for name in names), strict=True))
    return ((1 - generalized_iou(choose(mask, boxes, truth), truth)) * mask).sum((1, 2))


def loss_centerness(decoded, targets):
    """Binary cross-entropy of the centerness logit (B, S) to exp(-2.5 d / (1.414 r)), FCOS3D. Returns a sum over positives."""
    terms = F.binary_cross_entropy_with_logits(decoded.centerness, targets.centerness, reduction="none")
    return masked_sum(terms, targets.positive)


def loss_size(decoded, targets):
    """|size - size*| / size*, mean of l, h, w (dimension-aware, MonoDLE, arXiv:2103.16237, eq. 4, relative form). Returns a sum."""
    return masked_sum(((decoded.size - targets.size).abs() / targets.size).mean(-1), targets.positive)


def laplace_nll(value, log_sigma, truth):
    """Negative log-likelihood of a Laplace law of standard deviation sigma, metres, up to a constant: sqrt2 |error| / sigma + log sigma."""
    return math.sqrt(2) * (value - truth).abs() * torch.exp(-log_sigma) + log_sigma


def loss_location(decoded, targets, stride):
    """Where the object is: smooth L1 of the projected centre in strides plus Laplace NLL of the fused depth and of each estimate, metres.

    stride (B, S) px. Returns a sum over positives whose centre can be projected.
    """
    mask = targets.positive & targets.center_ok
    zero = torch.zeros_like(decoded.pixel)
    error = choose(mask, (decoded.pixel - targets.pixel) / stride[..., None], zero)
    offset = F.smooth_l1_loss(error, zero, reduction="none", beta=1 / 9).sum(-1)
    depth = laplace_nll(decoded.depth, decoded.log_sigma, targets.center[..., 2:]).mean(-1)
    return masked_sum(offset + depth, mask)


def loss_y(decoded, targets):
    """L1 of the bottom centre's height in the camera frame, metres: ground contact. Returns a sum over positives with a 3D centre."""
    mask = targets.positive & targets.center_ok
    bottom = decoded.center[..., 1] + decoded.size[..., 1] / 2
    truth = targets.center[..., 1] + targets.size[..., 1] / 2
    return masked_sum((choose(mask, bottom, truth) - truth).abs(), mask)


def half_angle(double, reference):
    """Unit vector (sin a, cos a) of the half of a doubled angle (sin 2a, cos 2a) that lies nearer to a reference angle.

    double (..., 2) unit vectors; reference (...) radians. The value comes from atan2 without gradient; the gradient from
    a = (a0 + exp(2ia) conj(a0)) / 2, exact at a0 and without the singular square roots of the half-angle formulas.
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
    """Add an angle (...) to an angle given by its sine and cosine (...). Returns sine, cosine."""
    s, c = torch.sin(angle), torch.cos(angle)
    return sine * c + cosine * s, cosine * c - sine * s


def corner_reach(length, width, sine, cosine):
    """Mean over the corners of a box of |x| + |z| from its centre; lengths (...) m along axes of any (sine, cosine) (...).

    Corners lie at x = +-a +-b, and the mean of |a + b| and |a - b| is max(|a|, |b|): the eight corners need not be built.
    """
    length, width, sine, cosine = length.abs(), width.abs(), sine.abs(), cosine.abs()
    return (torch.maximum(cosine * length, sine * width) + torch.maximum(sine * length, cosine * width)) / 2


def loss_regress(decoded, targets, K):
    """Disentangled L1 over the 8 corners, metres (MonoDIS, arXiv:1905.12365): one group of outputs at a time, the others true.

    Groups: projected centre, depth, size, heading (the half of the angle that lies nearer; loss_direction decides the half; the yaw
    output where there is one). K (B, 3, 3). Returns the sum over positives of the mean over groups, corners and axes.
    """
    mask = targets.positive & targets.center_ok
    truth, depth = targets.center, targets.center[..., 2:]
    metres = depth.clamp(min=0.1) / torch.stack(
        [K[:, None, 0, 0], K[:, None, 1, 1]], -1
    )  # per px at the true depth (B, S, 2)
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
    return masked_sum(choose(mask, sum(groups) / (3 * len(groups)), torch.zeros_like(length)), mask)


def loss_direction(decoded, targets):
    """Cross-entropy of the heading bin, logits (B, S, 2). Returns a sum over positives."""
    terms = F.cross_entropy(decoded.direction.transpose(1, 2), heading_bin(targets.alpha), reduction="none")
    return masked_sum(terms, targets.positive)


def loss_cos(decoded, targets):
    """1 - cos(2 (alpha - alpha*)) from unit vectors; the half is left to loss_direction. Returns a sum over positives."""
    truth = torch.stack([torch.sin(2 * targets.alpha), torch.cos(2 * targets.alpha)], -1)
    return masked_sum(1 - (decoded.double_alpha * truth).sum(-1), targets.positive)


def loss_alpha_constrain(decoded, targets):
    """1 - cos(yaw - alpha - ray) between the head's own two angles, the ray of its own centre detached. Returns a sum.

    The half of alpha is the one that the true angle lies in.
    """
    mask = targets.positive & targets.center_ok
    sine, cosine = turn(*half_angle(decoded.double_alpha, targets.alpha), ray_angle(decoded.center).detach())
    return masked_sum(1 - decoded.yaw_vector[..., 0] * sine - decoded.yaw_vector[..., 1] * cosine, mask)


def loss_relative(decoded, targets, objects):
    """Huber loss on differences of log depth between the objects of one image; near pairs weigh more, exp(-distance / 10 m).

    An object's depth is the mean log depth of its positive slots. objects M. Returns the sum over images of the weighted mean
    over pairs, times the number of objects that have a pair, so that it scales as a sum over objects.
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
    seen = (count > 0).float()
    weight = torch.exp(-distance / 10) * seen[:, :, None] * seen[:, None] * (1 - torch.eye(objects, device=mask.device))
    pairs = (F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=0.1) / 0.1 * weight).sum((1, 2))
    return (pairs / weight.sum((1, 2)).clamp(min=1e-6) * seen.sum(1)).sum()


def loss_velocity(decoded, targets):
    """Smooth L1 of the velocity along x and z of the camera, m/s, beta 1/9 as in FCOS3D. Returns a sum over positives of known velocity."""
    mask = targets.positive & targets.velocity_ok
    velocity = choose(mask, decoded.velocity, targets.velocity)
    return masked_sum(F.smooth_l1_loss(velocity, targets.velocity, reduction="none", beta=1 / 9).sum(-1), mask)


def loss_attribute(decoded, targets, possible):
    """Cross-entropy of the attribute among those that the class may have. Returns a sum over positives of known attribute.

    possible (C, A) bool: which class may have which attribute; a label that is impossible for its class counts as unknown.
    """
    truth = targets.attribute.clamp(min=0)
    mask = (
        targets.positive & (targets.attribute >= 0) & possible[targets.label].gather(-1, truth[..., None]).squeeze(-1)
    )
    logits = choose(mask, decoded.attribute, torch.zeros_like(decoded.attribute))
    return masked_sum(F.cross_entropy(logits.transpose(1, 2), truth, reduction="none"), mask)


def keep_best(targets, decoded, logits, objects):
    """Targets of which each object keeps its best cells alone, by what the head says there: dynamic top-k (SimOTA, arXiv:2107.08430).

    decoded: `Detector.decode` at the slots; logits (B, N, C); objects M. A cell is worth the square root of its class probability times
    the IoU of the visible boxes; an object keeps as many of its positive cells as their IoUs sum up to, at least one. The others become
    background: the class score learns which cells know the object. Depth has no say, or sigma would learn from chosen errors. Shapes
    stay, nothing waits for the device.
    """
    with torch.no_grad():
        own = logits.flatten(1).gather(1, targets.location * logits.shape[-1] + targets.label)
        overlap = torch.where(targets.positive, box_iou(decoded.box, targets.box), 0.0)
        worth = (
            overlap * own.sigmoid().sqrt() + targets.positive
        )  # one that competes is worth more than one that does not
        worth, overlap = (
            value.unflatten(1, (objects, -1)) for value in (worth.nan_to_num(3.0), overlap.nan_to_num(1.0))
        )  # NaN must show
        rank = torch.argsort(worth, dim=-1, descending=True, stable=True).argsort(-1)
        best = rank < overlap.sum(-1, keepdim=True).round().clamp(min=1)
        return dataclasses.replace(targets, positive=targets.positive & best.flatten(1))


def compute_losses(model, logits, raw, targets, batch, weights, positives, best=False):
    """All losses of non-zero weight whose outputs the model has, unweighted, as {name: scalar}, each divided by the positives.

    logits (B, N, C) and raw (B, N, F) of `model`; `targets` of the batch; weights `LossConfig`. positives: their number in the whole step,
    the mean over processes, at least 1: DDP averages gradients, so a local count would weigh processes unequally. With best, and boxes
    that are learned at all, each object learns at its best cells alone (`keep_best`); positives still is the number of all. Both heads take
    part in the sum (`Config` sees to a loss for each), so every parameter has a gradient on every process.
    """
    with torch.autocast(raw.device.type, enabled=False):
        logits, raw, K = logits.float(), raw.float(), batch["K"].float()
        gathered = raw.gather(1, targets.location[..., None].expand(-1, -1, raw.shape[-1]))
        gathered = choose(targets.positive, gathered, torch.zeros_like(gathered))
        decoded = model.decode(gathered, targets.location, targets.label, K)
        stride = model.location_stride[targets.location]
        targets = (
            keep_best(targets, decoded, logits, batch["valid"].shape[1]) if best and weights.loss_bbox else targets
        )
        named = [name for name in ("loss_bbox", "loss_full_bbox") if getattr(weights, name)]
        boxes = dict(zip(named, loss_boxes(decoded, targets, named).unbind(), strict=True)) if named else {}
        terms = {
            "loss_cls": lambda: loss_cls(logits, targets),
            "loss_bbox": lambda: boxes["loss_bbox"],
            "loss_full_bbox": lambda: boxes["loss_full_bbox"],
            "loss_centerness": lambda: loss_centerness(decoded, targets),
            "loss_size": lambda: loss_size(decoded, targets),
            "loss_location": lambda: loss_location(decoded, targets, stride),
            "loss_y": lambda: loss_y(decoded, targets),
            "loss_regress": lambda: loss_regress(decoded, targets, K),
            "loss_direction": lambda: loss_direction(decoded, targets),
            "loss_cos": lambda: loss_cos(decoded, targets),
            "loss_alpha_constrain": lambda: loss_alpha_constrain(decoded, targets),
            "loss_relative": lambda: loss_relative(decoded, targets, batch["valid"].shape[1]),
        }
        if decoded.velocity is not None:
            terms["loss_velocity"] = lambda: loss_velocity(decoded, targets)
        if decoded.attribute is not None:
            terms["loss_attribute"] = lambda: loss_attribute(decoded, targets, model.attribute_possible)
        chosen = [name for name in terms if getattr(weights, name)]
        values = torch.stack([terms[name]() for name in chosen]) / positives
        return dict(zip(chosen, values.unbind(), strict=True))


def weighted_sum(losses, weights):
    """The scalar that is learned: the sum of {name: scalar}, each times its weight in `LossConfig`, 1 for a name it does not know."""
    return sum(getattr(weights, name, 1.0) * value for name, value in losses.items())


def count_positives(targets):
    """Number of positive slots of this process's batch, a float scalar on its device, not yet averaged over processes."""
    return targets.positive.sum().float()
