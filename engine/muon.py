"""Muon: orthogonalised momentum for kernels and matrices, fused AdamW for the rest; timm has it in bf16 only."""

import torch
from torch.optim.adamw import adamw


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., kellerjordan.github.io/posts/muon) for kernels and matrices, fused AdamW for the rest.

    Kernels count as (out, in x height x width); those of one shape are stacked, those of one shorter side iterated
    together. A shorter side beyond 2 `BLOCK` is cut, where a divisor allows, into blocks orthogonalised by themselves,
    as MuonBP does between its full steps (arXiv:2510.16981), which are left out here: rows keep their length, and the
    spectral norm may reach the root of the number of blocks. The update is scaled to AdamW's size, .2 sqrt(longer side)
    (Moonlight, arXiv:2502.16982, eq. 4). Leaves a step out by itself, as fused Adam does.
    """

    BLOCK = 128  # rows: the products of a 512 x 4608 kernel are a sixth then

    # leloykun.github.io/ponder/muon-opt-coeffs
    ITERATIONS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                  (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip
    _step_supports_amp_scaling = True  # found_inf is looked at, by this name of torch's own optimizers

    def __init__(self, params, lr, betas=(0.9, 0.999), momentum=0.9, eps=1e-7, weight_decay=0.0):
        settings = {"lr": lr, "betas": betas, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "fused": True})

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
            states = [self.state[p] for p in rest]
            averages, squares, steps = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            beta1, beta2 = group["betas"]
            adamw([*rest], [p.grad for p in rest], averages, squares, [], steps, fused=True,
                  found_inf=getattr(self, "found_inf", None), amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
                  lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])  # fmt: skip

    def step_matrices(self, group, alike):
        """One step for lists of parameters, of one shape each."""
        found_inf = getattr(self, "found_inf", None)
        broken = None if found_inf is None else found_inf != 0
        momenta = []
        for params in alike:
            momentum = torch.stack([self.state[p]["momentum"] for p in params])
            gradient = torch.stack([p.grad for p in params])
            if broken is not None:
                gradient = torch.where(broken, momentum, gradient)  # then nothing moves
            momenta.append(momentum.lerp_(gradient, 1 - group["momentum"]))
        stacks = [momentum.flatten(2) for momentum in momenta]
        updates = orthogonalise(stacks, self.ITERATIONS, group["eps"], self.BLOCK)
        updates = [update.view_as(momentum) for update, momentum in zip(updates, momenta, strict=True)]
        sizes = [group["lr"] * 0.2 * max(params[0].flatten(1).shape) ** 0.5 for params in alike for _ in params]

        params, momenta, updates = ([row for stack in stacks for row in stack] for stacks in (alike, momenta, updates))
        torch._foreach_copy_([self.state[p]["momentum"] for p in params], momenta)
        updates = torch._foreach_mul(updates, sizes)
        decay = group["lr"] * group["weight_decay"]
        if broken is not None:
            torch._foreach_mul_(updates, (~broken).float())
            decay = decay * ~broken
        torch._foreach_mul_(params, 1 - decay)
        torch._foreach_sub_(params, [u.to(p.dtype) for u, p in zip(updates, params, strict=True)])


def is_matrix(p):
    """Whether a weight is orthogonalised: a matrix or kernel, none that is depthwise, of at least 4 rows and columns.

    Neither may be more than 128 times the other: the class output of 128 channels, a row of 1152 a class, is Muon's
    from 9 classes on.
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


def orthogonalise(stacks, iterations, eps, block):
    """Nearest orthogonal matrices, about, of stacks X (n, rows, columns), by Newton-Schulz iterations.

    X <- (a + b A + c A A) X with A = X X^T. The polynomials are multiplied on A alone, whose side is X's shorter one,
    and meet X once: a third of the products, and as exact in fp32; the A of one side, whatever the X, are iterated
    together. Always fp32: squaring in bf16 would lose small singular values. A shorter side far beyond `block` is cut
    as `count_blocks` says, and each block becomes orthogonal by itself.
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
    """Into how many equal blocks of half a `block` to a whole one a side beyond 2 `block` is cut; 1 where none fit."""
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
