"""Optimisation: from gradients to a step (paper section 4: Adam and the min-norm point; section 5.2: SGD, polynomial decay).

    rates = group_rates(params, backbone=1e-5, decoder=1e-4)            # one learning rate per trainable key
    state = adam_state(params)
    combined, weights = mgda([grads_of_one_dataset, grads_of_another])  # or the gradients of a single loss
    params, state = adam(params, combined, state, scaled(rates, polynomial_factor(state.step, steps)))

`params` and gradients are flat dicts of arrays, float32 or float64, which every step keeps. A step changes none of its arguments:
it returns a new dict, in which the batch statistics are the arrays that were passed in. Each trainable key needs a gradient and a
rate: ValueError names the one that has none, as it names a gradient of another shape or dtype, or of no trainable parameter.
The formulas are those of torch.optim, which the accelerated form runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .parameters import Grads, Params, is_trainable

Rates = Mapping[str, float]
"""Learning rate by key: those of the trainable parameters."""


class SGDState(NamedTuple):
    """Steps made, and per trainable key the momentum's running sum of gradients."""

    step: int
    momentum: Grads


class AdamState(NamedTuple):
    """Steps made, and per trainable key the running means of the gradient and of its square."""

    step: int
    mean: Grads
    square: Grads


def _zeros(params: Params) -> Grads:
    return {key: np.zeros_like(value) for key, value in params.items() if is_trainable(key)}


def sgd_state(params: Params) -> SGDState:
    """Return the state before the first step: zeros, which makes the first sum the gradient itself."""
    return SGDState(0, _zeros(params))


def adam_state(params: Params) -> AdamState:
    """Return the state before the first step: zeros, whose pull on the means the bias correction undoes."""
    return AdamState(0, _zeros(params), _zeros(params))


# ---- learning rates ------------------------------------------------------------------------------------------------------------


def group_rates(params: Params, backbone: float, decoder: float) -> dict[str, float]:
    """Return the rate of every trainable key: `backbone` for keys that begin with "backbone.", `decoder` for all others.

    The paper takes 1e-5 and 1e-4 for depth (section 4), one rate of 2e-3 for segmentation (section 5.2).
    """
    for name, rate in (("backbone", backbone), ("decoder", decoder)):
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"group_rates: the rate {name} is {rate!r}: expected a finite number >= 0")
    return {key: backbone if key.startswith("backbone.") else decoder for key in params if is_trainable(key)}


def scaled(rates: Rates, factor: float) -> dict[str, float]:
    """Return all rates times `factor`, the value of a schedule."""
    return {key: rate * factor for key, rate in rates.items()}


def constant_factor(step: int, steps: int) -> float:
    """The schedule of depth training (section 4): the same rate at every step from 0 to `steps`."""
    _check_step("constant_factor", step, steps)
    return 1.0


def polynomial_factor(step: int, steps: int, power: float = 0.9) -> float:
    """The schedule of segmentation (section 5.2): (1 - step / steps)^power, 1 at step 0 and 0 once all `steps` are made."""
    _check_step("polynomial_factor", step, steps)
    return (1 - step / steps) ** power


def _check_step(schedule: str, step: int, steps: int) -> None:
    if not (steps >= 1 and 0 <= step <= steps):
        raise ValueError(f"{schedule}: step is {step} of {steps} steps: expected 0 <= step <= steps, and at least one")


# ---- steps ---------------------------------------------------------------------------------------------------------------------


def sgd(
    params: Params, grads: Params, state: SGDState, rates: Rates, momentum: float = 0.9, weight_decay: float = 0.0
) -> tuple[Grads, SGDState]:
    """One step of gradient descent with momentum m and weight decay c, in torch.optim.SGD's convention:

    g = gradient + c p;  v <- m v + g;  p <- p - rate v. (The rate is outside the sum: a schedule acts on past gradients too.)
    """
    updated, sums = dict(params), {}
    for key, p, g in _trainable("sgd", params, grads, rates):
        g = g + weight_decay * p
        sums[key] = momentum * state.momentum[key] + g
        updated[key] = p - rates[key] * sums[key]
    return updated, SGDState(state.step + 1, sums)


def adam(
    params: Params,
    grads: Params,
    state: AdamState,
    rates: Rates,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Grads, AdamState]:
    """One step of Adam (Kingma and Ba 2015, algorithm 1). Weight decay c adds c p to the gradient, as an L2 penalty would.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  p <- p - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), where t
    counts steps from 1.
    """
    step, (beta1, beta2) = state.step + 1, betas
    updated, means, squares = dict(params), {}, {}
    for key, p, g in _trainable("adam", params, grads, rates):
        g = g + weight_decay * p
        means[key] = beta1 * state.mean[key] + (1 - beta1) * g
        squares[key] = beta2 * state.square[key] + (1 - beta2) * g * g
        deviation = np.sqrt(squares[key]) / math.sqrt(1 - beta2**step) + eps
        updated[key] = p - rates[key] / (1 - beta1**step) * means[key] / deviation
    return updated, AdamState(step, means, squares)


def adamw(
    params: Params,
    grads: Params,
    state: AdamState,
    rates: Rates,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Grads, AdamState]:
    """One step of AdamW (Loshchilov and Hutter 2019): Adam's, after p <- p - rate c p, which the running means do not see."""
    decayed = dict(params)
    for key, p, _ in _trainable("adamw", params, grads, rates):
        decayed[key] = p * (1 - rates[key] * weight_decay)
    return adam(decayed, grads, state, rates, betas, eps)


def _trainable(op: str, params: Params, grads: Params, rates: Rates) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield key, parameter and gradient of every trainable parameter, after checking them all."""
    keys = [key for key in params if is_trainable(key)]
    for name, given in (("gradient", grads), ("learning rate", rates)):
        missing = [key for key in keys if key not in given]
        if missing:
            raise ValueError(f"{op}: the parameter {missing[0]!r} has no {name}: expected one for every trainable parameter")
        unknown = sorted(given.keys() - set(keys))
        if unknown:
            raise ValueError(f"{op}: {unknown[0]!r} has a {name} but is no trainable parameter")
    for key in keys:
        p, g = params[key], grads[key]
        if (g.shape, g.dtype) != (p.shape, p.dtype):
            raise ValueError(f"{op}: the gradient of {key!r} is {g.dtype} of shape {g.shape}: expected {p.dtype} of {p.shape}")
    return ((key, params[key], grads[key]) for key in keys)


# ---- several objectives --------------------------------------------------------------------------------------------------------


def gram_matrix(gradients: Sequence[Params]) -> np.ndarray:
    """Return the inner products (n, n), float64, of the gradients of n tasks, each one vector over all its keys.

    Raises ValueError where there is no task, or where two have gradients of different parameters.
    """
    if not gradients:
        raise ValueError("gram_matrix: there are no gradients: expected those of at least one task")
    for i, grads in enumerate(gradients):
        for key in sorted(grads.keys() ^ gradients[0].keys()):
            raise ValueError(f"gram_matrix: only one of the tasks 0 and {i} has a gradient of {key!r}: expected the same keys")
    gram = np.zeros((len(gradients), len(gradients)))
    for key in gradients[0]:
        rows = np.stack([grads[key].ravel() for grads in gradients]).astype(np.float64)
        gram += rows @ rows.T
    return gram


def min_norm_point(gram: np.ndarray) -> np.ndarray:
    """Return the weights w (n,) >= 0 of sum 1 for which sum w_i g_i, in the convex hull of n gradients g_i, is shortest.

    `gram` (n, n) float64 holds the inner products g_i g_j. This is the min-norm problem of Sener and Koltun 2018 ("Multi-Task
    Learning as Multi-Objective Optimization"), whose algorithm 2 has a formula for two gradients and, for more, Frank and
    Wolfe's iteration, which converges like 1 / iterations. But n, a number of datasets, is small, so that each face of the hull
    can be tried: the minimiser lies inside exactly one, where it is the shortest point of the face's plane too: a linear system.
    The right face is the one whose point p has p g_i >= p p for all i: the condition of optimality, which suffices as the
    problem is convex. There are 2^n - 1 faces, 1023 for ten datasets. Where vertices are affinely dependent (equal gradients),
    a system is singular and not needed: by Caratheodory's theorem, a smaller face holds the point as well. The point is unique
    even then, its weights are not. Inner products have lost what distinguishes two gradients that differ by 1e-8 of their
    length: so has the point.

    Raises ValueError unless `gram` is (n, n), n >= 1, finite, symmetric and positive semi-definite, up to rounding.
    """
    n = len(gram)
    if gram.shape != (n, n) or n == 0 or not np.isfinite(gram).all() or (gram - gram.T).max() > 1e-6 * np.abs(gram).max():
        raise ValueError(f"min_norm_point: gram has shape {gram.shape}: expected (n, n), n >= 1, finite and symmetric")
    eigenvalues = np.linalg.eigvalsh(gram)  # ascending
    if eigenvalues[0] < -1e-6 * eigenvalues[-1]:
        raise ValueError(
            f"min_norm_point: gram has the eigenvalue {eigenvalues[0]:.3g}: expected inner products, which have none below 0"
        )
    gram = gram / max(float(gram.diagonal().max()), np.finfo(np.float64).tiny)
    best, smallest = np.full(n, 1 / n), math.inf
    for size in range(1, n + 1):
        for face in map(list, itertools.combinations(range(n), size)):
            weights = np.zeros(n)
            weights[face] = _shortest_on_plane(gram[np.ix_(face, face)])
            if not (weights[face] > 0).all():  # outside this face, on a smaller one, or NaN
                continue
            products = gram @ weights
            violation = float(weights @ products - np.min(products))
            if violation < smallest:
                best, smallest = weights, violation
    return best


def _shortest_on_plane(gram: np.ndarray) -> np.ndarray:
    """Weights (m,) of sum 1, of any sign, whose combination of m vectors is shortest; NaN where they are affinely dependent.

    By Lagrange: its products with all the vectors are equal, and the weights sum to 1. Each vector is measured by its own length,
    so that very long ones beside very short ones cost no digits.
    """
    m, lengths = len(gram), np.sqrt(gram.diagonal())
    lengths = np.where(lengths > 0, lengths, 1)
    system = np.zeros((m + 1, m + 1))
    system[:m, :m] = gram / np.outer(lengths, lengths)
    system[m, :m] = system[:m, m] = lengths.min() / lengths
    try:
        weights = np.linalg.solve(system, np.eye(m + 1)[m])[:m] / lengths
    except np.linalg.LinAlgError:
        return np.full(m, np.nan)
    return weights / weights.sum()


def mgda(gradients: Sequence[Params]) -> tuple[Grads, np.ndarray]:
    """Combine the gradients of n tasks into the shortest vector of their convex hull: returns it and its weights (n,).

    A step against it makes no task worse, to first order; where it is 0, no direction improves one task without harming another.
    """
    weights = min_norm_point(gram_matrix(gradients))
    combined = {
        key: sum((float(w) * grads[key] for w, grads in zip(weights, gradients, strict=True)), np.zeros_like(gradients[0][key]))
        for key in gradients[0]
    }
    return combined, weights
