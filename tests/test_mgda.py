"""The min-norm point against SciPy, and MGDA's step in both forms, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

import accelerated.mgda as fast
import reference.optim as plain
from tests.equality import assert_same, assert_same_dict
from tests.optim import SHAPES, TRAINABLE, draw_params, torchs

# ---- the min-norm point --------------------------------------------------------------------------------------------------------


def shortest(points: np.ndarray) -> np.ndarray:
    """The shortest vector in the hull of `points` (n, D), by SciPy's non-negative least squares.

    min |P'u|^2 + (1'u - 1)^2 over u >= 0: for any sum t of u, the first term is least at t times the hull's shortest point.
    """
    size = np.abs(points).max() or 1.0
    u, _ = nnls(np.vstack([points.T / size, np.ones(len(points))]), np.append(np.zeros(points.shape[1]), 1.0))
    return u @ points / u.sum()


@st.composite
def hulls(draw: Any) -> np.ndarray:
    """1 to 5 gradients (n, D): random, of several lengths, on a grid (dependent, opposite, zero), with copies and multiples."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    n, size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["normal", "lengths", "grid", "one side", "repeated"]))
    if kind == "grid":
        return rng.integers(-2, 3, (n, size)).astype(float)
    points = rng.standard_normal((n, size))
    if kind == "lengths":
        points *= 10.0 ** rng.integers(-3, 4, (n, 1))
    if kind == "one side":
        points += 3 * rng.standard_normal(size)
    if kind == "repeated":
        points = points[rng.integers(0, n, n)] * rng.choice([1, 1, 1, 2, -1, 0], (n, 1))
    return points


def both_min_norm_points(points: np.ndarray) -> list[np.ndarray]:
    gram = points @ points.T
    return [plain.min_norm_point(gram), fast.min_norm_point(torch.tensor(gram)).numpy()]


@settings(max_examples=80)
@given(points=hulls())
def test_the_min_norm_point_is_scipys(points: np.ndarray) -> None:
    for weights in both_min_norm_points(points):
        assert weights.shape == (len(points),)
        assert weights.dtype == np.float64
        assert (weights >= 0).all()
        assert abs(weights.sum() - 1) <= 1e-12
        assert_same(weights @ points, shortest(points), scale=float(np.abs(points).max()))


@given(seed=st.integers(0, 9999), n=st.integers(1, 5))
def test_both_forms_give_the_weights_where_these_are_unique(seed: int, n: int) -> None:
    points = np.random.default_rng(seed).standard_normal((n, 8)) + np.random.default_rng([seed, 1]).standard_normal(8)
    first, second = both_min_norm_points(points)
    assert_same(second, first)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[3.0, 4.0]], [1.0]),
        ([[2.0, 0.0], [0.0, 1.0]], [0.2, 0.8]),  # the foot of the perpendicular
        ([[1.0, 0.0], [2.0, 0.5]], [1.0, 0.0]),  # its foot lies outside: the shorter one
        ([[2.0, 0.5], [1.0, 0.0]], [0.0, 1.0]),
        ([[1.0, 0.0], [-3.0, 0.0]], [0.75, 0.25]),  # opposite: 0
        ([[1.0, 1.0], [0.0, 0.0]], [0.0, 1.0]),  # a zero gradient is the shortest of all
        ([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], [1 / 3, 1 / 3, 1 / 3]),
        ([[1e6, 1.0], [-1e-6, 1.0]], [1e-12, 1 - 1e-12]),  # lengths that differ by a million
    ],
)
def test_the_min_norm_point_by_hand(points: list[list[float]], expected: list[float]) -> None:
    for weights in both_min_norm_points(np.array(points)):
        np.testing.assert_allclose(weights, expected, rtol=1e-10, atol=1e-15)


@settings(max_examples=60)
@given(seed=st.integers(0, 9999), n=st.integers(6, 9), size=st.integers(2, 8))
def test_the_min_norm_point_of_many(seed: int, n: int, size: int) -> None:
    """Beside the origin, so that several gradients leave the face in one walk."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, size)) * rng.uniform(0.1, 3, size) + rng.standard_normal(size)
    for weights in both_min_norm_points(points):
        assert_same(weights @ points, shortest(points), scale=float(np.abs(points).max()))


def test_a_gram_matrix_may_be_rounded() -> None:
    """What should be 0 may be 0 on one side of the diagonal and noise on the other."""
    gram = np.array([[1.0, 1e-17], [0.0, 1.0]])
    for weights in (plain.min_norm_point(gram), fast.min_norm_point(torch.tensor(gram)).numpy()):
        np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-12)


@pytest.mark.parametrize(
    "gram", [np.zeros((0, 0)), np.ones((2, 3)), np.array([[1.0, np.nan], [np.nan, 1.0]]), np.array([[1.0, 0.5], [0.2, 1.0]])]
)
def test_a_gram_matrix_must_be_one(gram: np.ndarray) -> None:
    for form in (plain.min_norm_point, lambda g: fast.min_norm_point(torch.tensor(g))):
        with pytest.raises(ValueError, match=r"min_norm_point: gram has shape \(\d, \d\): expected \(n, n\), n >= 1, finite"):
            form(gram)


def test_a_gram_matrix_has_no_negative_eigenvalue() -> None:
    gram = np.array([[1.0, 3.0], [3.0, 1.0]])
    for form in (plain.min_norm_point, lambda g: fast.min_norm_point(torch.tensor(g))):
        with pytest.raises(ValueError, match="gram has the eigenvalue -2: expected inner products, which have none below 0"):
            form(gram)


# ---- mgda ----------------------------------------------------------------------------------------------------------------------


def losses_of(parameters: dict[str, torch.Tensor], n: int, seed: int) -> list[torch.Tensor]:
    """n scalars, curved in every parameter."""
    rng = np.random.default_rng([seed, 2])
    centres = [{k: torch.tensor(rng.standard_normal(SHAPES[k])) for k in TRAINABLE} for _ in range(n)]
    return [sum((((p - centre[k]) ** 2).sum() for k, p in parameters.items()), torch.zeros(())) for centre in centres]


@given(seed=st.integers(0, 999), n=st.integers(1, 4))
def test_mgda_in_both_forms(seed: int, n: int) -> None:
    """The same combined gradient and weights; it is the shortest, and each loss falls along its opposite."""
    params = draw_params(seed)
    parameters = torchs(params)
    losses = losses_of(parameters, n, seed)
    gradients = [
        dict(
            zip(
                parameters,
                (g.numpy() for g in torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)),
                strict=True,
            )
        )
        for loss in losses
    ]
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)  # replaced, not added to
    weights = fast.mgda_backward(losses, parameters.values())
    combined, plain_weights = plain.mgda(gradients)
    assert_same(weights.numpy(), plain_weights)
    assert_same_dict({key: p.grad.numpy() for key, p in parameters.items()}, combined)
    points = np.array([np.concatenate([g.ravel() for g in grads.values()]) for grads in gradients])
    flat = np.concatenate([g.ravel() for g in combined.values()])
    assert_same(flat, shortest(points))
    assert (points @ flat >= (1 - 1e-10) * flat @ flat).all()


def test_mgda_keeps_float32_and_survives_what_float32_cannot_square() -> None:
    """Inner products are summed in float64: those of gradients of 1e-25 underflow in float32."""
    gradients = [{"w": np.array([2e-25, 0], np.float32)}, {"w": np.array([0, 1e-25], np.float32)}]
    combined, weights = plain.mgda(gradients)
    np.testing.assert_allclose(weights, [0.2, 0.8], rtol=1e-6)
    assert combined["w"].dtype == np.float32
    w = torch.nn.Parameter(torch.zeros(2))
    other = fast.mgda_backward([(w * torch.tensor(g["w"])).sum() for g in gradients], [w])
    np.testing.assert_allclose(other.numpy(), weights, rtol=1e-12)
    np.testing.assert_allclose(w.grad.numpy(), combined["w"], rtol=1e-6)


def test_a_loss_that_does_not_see_a_parameter_has_gradient_zero_there() -> None:
    a, b = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    weights = fast.mgda_backward([2 * a.sum(), b.sum()], [a, b])
    np.testing.assert_allclose(weights.numpy(), [0.2, 0.8], rtol=1e-12)
    np.testing.assert_allclose([a.grad.item(), b.grad.item()], [0.4, 0.8], rtol=1e-12)


def test_losses_may_share_their_graph() -> None:
    """As datasets of one batch do: the second backward pass still finds what the first one used."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    shared = w.exp() * w
    weights = fast.mgda_backward([shared[0], 3 * shared[0], shared[1]], [w])
    gradients = [{"w": np.array(g)} for g in ([2 * math.e, 0], [6 * math.e, 0], [0, 3 * math.e**2])]
    combined, expected = plain.mgda(gradients)
    assert_same(weights.numpy(), expected)
    assert_same(w.grad.numpy(), combined["w"])


def test_mgda_names_what_it_cannot_combine() -> None:
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match=r"no dataset's loss depends on parameter 1, of shape \(3,\)"):
        fast.mgda_backward([a.sum(), a.prod()], [a, b])
    with pytest.raises(ValueError, match="the gradient of dataset 1 is not finite"):
        fast.mgda_backward([a.sum(), a.sum() * torch.inf], [a])
    with pytest.raises(ValueError, match="no gradient was taken: expected one dataset at least"):
        fast.mgda_backward([], [a])
    one = np.ones(2)
    with pytest.raises(ValueError, match="only one of the tasks 0 and 1 has a gradient of 'b'"):
        plain.mgda([{"a": one, "b": one}, {"a": one}])
    with pytest.raises(ValueError, match="there are no gradients"):
        plain.mgda([])
