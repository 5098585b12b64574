"""The optimizer of a run, its learning rate as a function of the step, and Muon, which timm has in bf16 only."""

import difflib
import math

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay
from torch.optim.adamw import adamw


def make_optimizer(model, options):
    """Ours, 'muon', or timm's optimizer of that name, fused where there is such; no weight decay on norms and biases.

    Raises ValueError if unknown.
    """
    if options.optimizer == "muon":
        return Muon(param_groups_weight_decay(model, options.weight_decay), lr=options.lr, betas=(0.9, options.beta2))
    names = list_optimizers()
    if options.optimizer not in names:
        near = difflib.get_close_matches(options.optimizer, names, n=3)
        raise ValueError(f"train.optimizer {options.optimizer!r} is unknown to timm{'; near it: ' + ', '.join(near) if near else ''}")
    info = get_optimizer_info(options.optimizer)
    chosen = {"betas": (0.9, options.beta2)} if info.num_betas == 2 else {}
    if isinstance(info.opt_class, str):
        raise ValueError(f"train.optimizer {options.optimizer!r} needs {info.opt_class.rpartition('.')[0]}, which is not installed")
    if issubclass(info.opt_class, torch.optim.Adam):
        chosen["fused"] = True  # can leave out a step without asking the host; SGD's would keep garbage from a first step left out
    return create_optimizer_v2(model, opt=options.optimizer, lr=options.lr, weight_decay=options.weight_decay, **chosen)


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
    """Give a learning rate to all groups, times the lr_scale that timm sets for some. Returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for kernels and matrices (Jordan et al., kellerjordan.github.io/posts/muon), fused AdamW for the rest.

    Kernels count as (out, in x height x width); those of one shape are stacked and iterated together. The update is
    scaled to AdamW's size, .2 sqrt(longer side) (Moonlight, arXiv:2502.16982, eq. 4). Leaves a step out by itself, as fused Adam does.
    """

    ITERATIONS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                  (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip  # leloykun.github.io/ponder/muon-opt-coeffs
    _step_supports_amp_scaling = True  # found_inf is looked at, by this name of torch's own optimizers

    def __init__(self, params, lr, betas=(0.9, 0.999), momentum=0.9, eps=1e-7, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "momentum": momentum, "eps": eps, "weight_decay": weight_decay, "fused": True})

    @torch.no_grad()
    def step(self, closure=None):
        """One step, or none where `found_inf` (a device scalar) is not 0."""
        for group in self.param_groups:
            by_shape, rest = {}, []
            for p in group["params"]:
                if p.grad is None:
                    continue
                sides = (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (1, 1)
                matrix = min(sides) >= 4 and max(sides) <= 128 * min(sides) and p.shape[1] > 1  # a depthwise kernel is none
                by_shape.setdefault(p.shape, []).append(p) if matrix else rest.append(p)
                if not self.state[p]:
                    self.state[p].update({name: torch.zeros_like(p) for name in (("momentum",) if matrix else ("exp_avg", "exp_avg_sq"))})
                    if not matrix:
                        self.state[p]["step"] = torch.zeros((), device=p.device)
            for params in by_shape.values():
                self.step_matrices(group, params)
            averages, squares, steps = ([self.state[p][name] for p in rest] for name in ("exp_avg", "exp_avg_sq", "step"))
            (beta1, beta2), options = group["betas"], {name: group[name] for name in ("lr", "eps", "weight_decay")}
            adamw([*rest], [p.grad for p in rest], averages, squares, [], steps, fused=True, found_inf=getattr(self, "found_inf", None),
                  amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **options)  # fmt: skip

    def step_matrices(self, group, params):
        """One step for parameters of one shape."""
        buffers = [self.state[p]["momentum"] for p in params]
        momentum, gradient = torch.stack(buffers), torch.stack([p.grad for p in params])
        size = group["lr"] * 0.2 * max(momentum[0].flatten(1).shape) ** 0.5
        decay = group["lr"] * group["weight_decay"]
        if (found := getattr(self, "found_inf", None)) is not None:
            gradient = torch.where(found > 0, momentum, gradient)  # then nothing moves
            size, decay = size * (found == 0), decay * (found == 0)
        momentum.lerp_(gradient, 1 - group["momentum"])
        torch._foreach_copy_(buffers, momentum.unbind())
        update = orthogonalise(momentum.flatten(2), self.ITERATIONS, group["eps"]).view_as(momentum) * size
        torch._foreach_mul_(params, 1 - decay)
        torch._foreach_sub_(params, [u.to(p.dtype) for u, p in zip(update.unbind(), params, strict=True)])


def orthogonalise(matrices, iterations, eps):
    """Nearest orthogonal matrices, about, of matrices X (n, rows, columns): Newton-Schulz iterations X <- (a + b A + c A A) X, A = X X^T.

    The polynomials are multiplied on A alone, whose side is X's shorter one, and meet X once: a third of the products, and as exact in
    fp32. Always fp32: squaring in bf16 would lose small singular values.
    """
    with torch.autocast(matrices.device.type, enabled=False):
        x = matrices.float()
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
        square, product = torch.bmm(x, x.mT), torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
        for a, b, c in iterations:
            factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            square, product = torch.bmm(torch.bmm(factor, square), factor), torch.bmm(factor, product)
        x = torch.bmm(product, x)
        return x.mT if tall else x
