"""Optimisation: torch.optim with the paper's two rates, its schedule, and the min-norm point (paper, sections 4 and 5.2).

optimizer = adam(model)                                                      # depth: 1e-5 for the backbone, 1e-4 elsewhere
optimizer = sgd(model); scheduler = polynomial_decay(optimizer, steps)       # segmentation; scheduler.step() after each step
weights = mgda_backward([loss_of_one_dataset, loss_of_another], model.parameters())    # instead of loss.backward()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from accelerated.dpt import DPT

_EPS = torch.finfo(torch.float64).eps


def parameter_groups(model: DPT, backbone_rate: float, decoder_rate: float) -> list[dict[str, Any]]:
    """Return the groups that torch.optim takes, the backbone's parameters first, each with its learning rate."""
    return [
        {"params": list(model.backbone_parameters()), "lr": backbone_rate},
        {"params": list(model.decoder_parameters()), "lr": decoder_rate},
    ]


def adam(model: DPT, backbone_rate: float = 1e-5, decoder_rate: float = 1e-4, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam at the rates of depth training (section 4). The decay is added to the gradient, as an L2 penalty."""
    return torch.optim.Adam(parameter_groups(model, backbone_rate, decoder_rate), weight_decay=weight_decay)


def adamw(model: DPT, backbone_rate: float = 1e-5, decoder_rate: float = 1e-4, weight_decay: float = 1e-2) -> torch.optim.AdamW:
    """AdamW at the rates of depth training: the decay acts on the parameters, past Adam's means."""
    return torch.optim.AdamW(parameter_groups(model, backbone_rate, decoder_rate), weight_decay=weight_decay)


def sgd(
    model: DPT, backbone_rate: float = 2e-3, decoder_rate: float = 2e-3, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.SGD:
    """Gradient descent with momentum at the rate of segmentation training (section 5.2)."""
    groups = parameter_groups(model, backbone_rate, decoder_rate)
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)


def polynomial_factor(step: int, steps: int, power: float = 0.9) -> float:
    """(1 - step / steps)^power: 1 at step 0 and 0 once all `steps` are made. Raises ValueError for a step beyond."""
    if not (steps >= 1 and 0 <= step <= steps):
        raise ValueError(f"polynomial_factor: step is {step} of {steps} steps: expected 0 <= step <= steps, and at least one")
    return (1 - step / steps) ** power


def polynomial_decay(optimizer: torch.optim.Optimizer, steps: int, power: float = 0.9) -> LambdaLR:
    """Return the scheduler that multiplies every group's rate by `polynomial_factor` (section 5.2)."""
    return LambdaLR(optimizer, lambda step: polynomial_factor(step, steps, power))


def min_norm_point(gram: Tensor) -> Tensor:
    """Return the weights w (n,) >= 0 of sum 1 for which sum w_i g_i, in the convex hull of n gradients g_i, is shortest.

    `gram` (n, n) holds the inner products g_i g_j; the weights are float64, on the CPU, where so small a problem belongs. This is
    the min-norm problem of Sener and Koltun 2018, by Wolfe's algorithm ("Finding the nearest point in a polytope", 1976): keep a
    face of the hull whose plane's shortest point p lies inside it, add the gradient with the smallest product with p, walk
    towards the new plane's shortest point, drop the gradients whose weights reach 0 on the way. |p| falls at each turn, so no
    face returns, and the last is exact up to rounding.

    Raises ValueError unless `gram` is (n, n), n >= 1, finite, symmetric and positive semi-definite, up to rounding.
    """
    n = len(gram)
    gram = gram.detach().to("cpu", torch.float64)
    if gram.shape != (n, n) or n == 0 or not gram.isfinite().all() or (gram - gram.T).max() > 1e-6 * gram.abs().max():
        raise ValueError(f"min_norm_point: gram has shape {tuple(gram.shape)}: expected (n, n), n >= 1, finite and symmetric")
    eigenvalues = torch.linalg.eigvalsh(gram)  # ascending
    if eigenvalues[0] < -1e-6 * eigenvalues[-1]:
        least = float(eigenvalues[0])
        raise ValueError(f"min_norm_point: gram has the eigenvalue {least:.3g}: expected inner products, which have none below 0")
    gram = gram / gram.diagonal().max().clamp(min=torch.finfo(torch.float64).tiny)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[gram.diagonal().argmin()] = 1
    while True:
        products = gram @ weights
        noise = 4 * n * _EPS * (gram.abs() @ weights)  # how far rounding may move each product
        entering = int(products.argmin())
        face = [i for i in range(n) if weights[i] > 0]
        if entering in face or products[entering] >= weights @ products - noise[entering] - weights @ noise:
            return weights
        moved = _walk(gram, weights, [*face, entering])
        if not moved @ gram @ moved < weights @ products:  # only rounding is left to gain
            return weights
        weights = moved


def _walk(gram: Tensor, weights: Tensor, face: list[int]) -> Tensor:
    """Walk from `weights` (n,) to the shortest point of the plane of `face`, dropping each gradient whose weight reaches 0."""
    while True:
        target = torch.zeros_like(weights)
        target[face] = _shortest_on_plane(gram[face][:, face])
        falling = [i for i in face if target[i] <= 0]
        if not falling:
            return target
        reaches = {i: float(weights[i] / (weights[i] - target[i])) for i in falling if weights[i] > target[i]}
        first = min(reaches, key=reaches.__getitem__, default=falling[0])
        weights = (weights + reaches.get(first, 0.0) * (target - weights)).clamp(min=0)
        weights[first] = 0
        face = [i for i in face if i != first]


def _shortest_on_plane(gram: Tensor) -> Tensor:
    """Weights (m,) of sum 1, of any sign, whose combination of m vectors is shortest: it has equal products with all of them.

    Each vector is measured by its own length, so that very long ones beside very short ones cost no digits. None is 0, which
    would be the shortest point of the hull, where the walk begins.
    """
    m, lengths = len(gram), gram.diagonal().sqrt()
    system = gram.new_zeros(m + 1, m + 1)
    system[:m, :m] = gram / lengths.outer(lengths)
    system[m, :m] = system[:m, m] = lengths.min() / lengths
    equal_products = torch.eye(m + 1, dtype=gram.dtype)[m]
    weights = torch.linalg.lstsq(system, equal_products, driver="gelsd").solution[:m] / lengths
    return weights / weights.sum()


def mgda_backward(losses: Sequence[Tensor], parameters: Iterable[nn.Parameter]) -> Tensor:
    """Set each parameter's .grad to the shortest vector in the convex hull of the losses' gradients; return its weights (n,).

    The losses are scalars, one per task: for DPT, one per dataset (section 4). A step against the combined gradient makes no loss
    worse, to first order. It replaces what .grad held: the shortest vector of several batches is not the sum of theirs. A loss
    that does not depend on a parameter has gradient 0 there. Memory: n gradients at once. Raises ValueError where there is no
    loss, where no loss depends on a parameter, and for gradients that are not finite.
    """
    parameters, losses = list(parameters), list(losses)
    if not losses:
        raise ValueError("mgda_backward: there are no losses: expected at least one")
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=i < len(losses) - 1, allow_unused=True)
        for i, loss in enumerate(losses)
    ]
    gram = torch.zeros(len(losses), len(losses), dtype=torch.float64)
    stacks = []
    for i, parameter in enumerate(parameters):
        each = [grads[i] for grads in gradients]
        if all(g is None for g in each):
            raise ValueError(f"mgda_backward: no loss depends on parameter {i}, of shape {tuple(parameter.shape)}")
        stacks.append([torch.zeros_like(parameter) if g is None else g for g in each])
        rows = torch.stack([g.flatten() for g in stacks[-1]]).double()
        gram += (rows @ rows.T).cpu()
    if not gram.isfinite().all():
        task = int((~gram.diagonal().isfinite()).nonzero()[0])
        raise ValueError(f"mgda_backward: the gradient of loss {task} is not finite")
    weights = min_norm_point(gram)
    for parameter, each in zip(parameters, stacks, strict=True):
        parameter.grad = sum((float(w) * g for w, g in zip(weights, each, strict=True)), torch.zeros_like(parameter))
    return weights
