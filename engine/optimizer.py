"""The optimizer of a run, its learning rate as a function of the step, Muon, which timm has in bf16 only, and the average of weights."""

import difflib
import math

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch.optim.adamw import adamw


def make_optimizer(model, options):
    """Ours, 'muon', or timm's optimizer of that name, fused where there is such; no weight decay on norms and biases.

    Raises ValueError if unknown.
    """
    info = find_optimizer(options.optimizer)
    if options.optimizer == "muon":
        return Muon(make_groups(model, options), lr=options.lr, betas=(0.9, options.beta2))
    chosen = {"betas": (0.9, options.beta2)} if info.num_betas == 2 else {}
    if issubclass(info.opt_class, torch.optim.Adam):
        chosen["fused"] = (
            True  # can leave out a step without asking the host; SGD's would keep garbage from a first step left out
        )
    learning = (
        model if options.backbone_lr == 1 else make_groups(model, options)
    )  # timm groups a model as we do, and knows its names
    return create_optimizer_v2(
        learning, opt=options.optimizer, lr=options.lr, weight_decay=options.weight_decay, **chosen
    )


def find_optimizer(name):
    """timm's description of an optimizer. Raises ValueError where there is none, its package is missing, or it is of second order."""
    names = list_optimizers()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        raise ValueError(
            f"train.optimizer {name!r} is unknown to timm{'; near it: ' + ', '.join(near) if near else ''}"
        )
    info = get_optimizer_info(name)
    if isinstance(info.opt_class, str):
        raise ValueError(f"train.optimizer {name!r} needs {info.opt_class.rpartition('.')[0]}, which is not installed")
    if info.second_order:
        raise ValueError(f"train.optimizer {name!r} needs second derivatives, which the training does not compute")
    return info


def make_groups(model, options):
    """Parameters that learn, in groups without and with weight decay, the backbone's apart where its learning rate has a factor."""
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
    """Learning rate of a step in [0, total): linear warm-up, then the configured schedule. Pure, so a resumed run needs no state."""
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


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for kernels and matrices (Jordan et al., kellerjordan.github.io/posts/muon), fused AdamW for the rest.

    Kernels count as (out, in x height x width); those of one shape are stacked, those of one shorter side iterated together. A shorter side
    beyond 2 `BLOCK` is cut, where a divisor allows, into blocks orthogonalised by themselves, as MuonBP does between its full steps
    (arXiv:2510.16981), which are left out here: rows keep their length, and the spectral norm may reach the root of the number of blocks.
    The update is scaled to AdamW's size, .2 sqrt(longer side) (Moonlight, arXiv:2502.16982, eq. 4). Leaves a step out by itself, as fused
    Adam does.
    """

    BLOCK = 128  # rows: the products of a 512 x 4608 kernel are a sixth then

    ITERATIONS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                  (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip  # leloykun.github.io/ponder/muon-opt-coeffs
    _step_supports_amp_scaling = True  # found_inf is looked at, by this name of torch's own optimizers

    def __init__(self, params, lr, betas=(0.9, 0.999), momentum=0.9, eps=1e-7, weight_decay=0.0):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "momentum": momentum, "eps": eps, "weight_decay": weight_decay, "fused": True},
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One step, or none where `found_inf` (a device scalar) is not 0."""
        for group in self.param_groups:
            matrices, rest = {}, []  # matrices: by shape
            for p in group["params"]:
                if p.grad is None:
                    continue
                if is_matrix(p):
                    matrices.setdefault(p.shape, []).append(p)
                else:
                    rest.append(p)
                if not self.state[p]:
                    self.state[p].update(begin(p))
            if matrices:
                self.step_matrices(group, list(matrices.values()))
            averages, squares, steps = (
                [self.state[p][name] for p in rest] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            (beta1, beta2), options = group["betas"], {name: group[name] for name in ("lr", "eps", "weight_decay")}
            adamw([*rest], [p.grad for p in rest], averages, squares, [], steps, fused=True, found_inf=getattr(self, "found_inf", None),
                  amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **options)  # fmt: skip

    def step_matrices(self, group, alike):
        """One step for lists of parameters, of one shape each."""
        found, momenta = getattr(self, "found_inf", None), []
        broken = None if found is None else found != 0
        for params in alike:
            momentum, gradient = (
                torch.stack([self.state[p]["momentum"] for p in params]),
                torch.stack([p.grad for p in params]),
            )
            if found is not None:
                gradient = torch.where(broken, momentum, gradient)  # then nothing moves
            momenta.append(momentum.lerp_(gradient, 1 - group["momentum"]))
        updates = orthogonalise(
            [momentum.flatten(2) for momentum in momenta], self.ITERATIONS, group["eps"], self.BLOCK
        )
        updates = [update.view_as(momentum) for update, momentum in zip(updates, momenta, strict=True)]
        sizes = [group["lr"] * 0.2 * max(params[0].flatten(1).shape) ** 0.5 for params in alike for _ in params]

        params, momenta, updates = _rows(alike), _rows(momenta), _rows(updates)
        torch._foreach_copy_([self.state[p]["momentum"] for p in params], momenta)
        updates, decay = torch._foreach_mul(updates, sizes), group["lr"] * group["weight_decay"]
        if found is not None:
            torch._foreach_mul_(updates, (~broken).float())
            decay = decay * ~broken
        torch._foreach_mul_(params, 1 - decay)
        torch._foreach_sub_(params, [u.to(p.dtype) for u, p in zip(updates, params, strict=True)])


def is_matrix(p):
    """Whether a weight is orthogonalised: a matrix or kernel, none that is depthwise, of at least 4 rows and columns.

    Neither may be more than 128 times the other: the class output of 128 channels, a row of 1152 a class, is Muon's from 9 classes on.
    """
    if p.ndim < 2 or p.shape[1] == 1:
        return False
    rows, columns = p.shape[0], p.numel() // p.shape[0]
    return min(rows, columns) >= 4 and max(rows, columns) <= 128 * min(rows, columns)


def begin(p):
    """The state of a weight before its first step."""
    if is_matrix(p):
        return {"momentum": torch.zeros_like(p)}
    return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": torch.zeros((), device=p.device)}


def _rows(stacks):
    return [row for stack in stacks for row in stack]


def orthogonalise(stacks, iterations, eps, block):
    """Nearest orthogonal matrices, about, of stacks X (n, rows, columns): Newton-Schulz iterations X <- (a + b A + c A A) X, A = X X^T.

    The polynomials are multiplied on A alone, whose side is X's shorter one, and meet X once: a third of the products, and as exact in
    fp32; the A of one side, whatever the X, are iterated together. Always fp32: squaring in bf16 would lose small singular values.
    A shorter side far beyond `block` is cut as `count_blocks` says, and each block becomes orthogonal by itself.
    """
    with torch.autocast(stacks[0].device.type, enabled=False):
        whole = [x.float() if x.shape[1] <= x.shape[2] else x.float().mT for x in stacks]
        wide = [x.unflatten(1, (count_blocks(x.shape[1], block), -1)).flatten(0, 1) for x in whole]
        turned, by_side = [None] * len(wide), {}
        for i, x in enumerate(wide):
            by_side.setdefault(x.shape[1], []).append(i)
        for own in by_side.values():
            square = torch.cat([torch.bmm(wide[i], wide[i].mT) for i in own])
            scale = square.diagonal(dim1=1, dim2=2).sum(1).clamp(min=eps**2)[:, None, None]  # square of X's norm
            product = _polynomials(square / scale, iterations) * scale.rsqrt()
            for i, part in zip(own, product.split([len(wide[i]) for i in own]), strict=True):
                turned[i] = torch.bmm(part, wide[i])
        turned = [x.view_as(own) for x, own in zip(turned, whole, strict=True)]
        return [x if x.shape == stack.shape else x.mT for x, stack in zip(turned, stacks, strict=True)]


def count_blocks(side, block):
    """Into how many equal blocks of at most `block`, and at least half of it, a side beyond 2 `block` is cut; 1 where none fit."""
    fit = range(-(-side // block), 2 * side // block + 1) if side > 2 * block else ()
    return next((count for count in fit if side % count == 0), 1)


def _polynomials(square, iterations):
    """Product of the iterations' a + b A + c A A, A (n, side, side) being `square` at first."""
    product = None
    for number, (a, b, c) in enumerate(iterations, 1):
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if number < len(iterations):
            square = torch.bmm(torch.bmm(factor, square), factor)
    return product


class Average(ModelEmaV3):
    """timm's moving average of a model, whose own update takes both state dicts apart by 300 operator calls a step."""

    def apply_update_(self, model, decay):
        pairs = zip(*(module.state_dict(keep_vars=True).values() for module in (self.module, model)), strict=True)
        weighed, counted = [], []
        for pair in pairs:
            (weighed if pair[0].is_floating_point() else counted).append(pair)
        torch._foreach_lerp_(*map(list, zip(*weighed, strict=True)), weight=1 - decay)
        if counted:
            torch._foreach_copy_(*map(list, zip(*counted, strict=True)))
