"""ReLU6 against torch, its two corners included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from reference import nn
from tests.equality import check_vjp
from tests.primitives import assert_same_as_torch, lay_out, layouts, results, seeds

CORNERS = np.array([[-1.0, -0.0, 0.0, 3.0], [6.0, np.nextafter(6.0, 7.0), 7.0, np.nextafter(6.0, 5.0)]])


@given(seeds, layouts)
def test_it_is_torchs(seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    assert_same_as_torch(nn.relu6, F.relu6, [lay_out(rng.uniform(-4, 10, (2, 3, 4)), layout)], rng, scales=[6, 6])


def test_the_corners_are_torchs_and_pass_no_gradient() -> None:
    (y, dx), _ = results(nn.relu6, [CORNERS], np.ones_like(CORNERS), np.random.default_rng(0))
    np.testing.assert_array_equal(y, F.relu6(torch.tensor(CORNERS)).numpy())
    np.testing.assert_array_equal(dx, [[0, 0, 0, 1], [0, 0, 0, 1]])


@given(seeds)
def test_the_gradient_is_the_derivative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(low, low + 3, (3, 5)) for low in (-4, 1.5, 8)])  # far from the corners
    check_vjp(nn.relu6, [x], rng)


def test_float32_stays_exact_and_wrong_arguments_are_named() -> None:
    y, vjp = nn.relu6(CORNERS.astype(np.float32))
    assert y.dtype == vjp(y).dtype == np.float32
    np.testing.assert_array_equal(y, np.minimum(np.maximum(CORNERS.astype(np.float32), 0), 6))
    with pytest.raises(TypeError, match="relu6: x has dtype int64"):
        nn.relu6(np.ones(3, np.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="relu6: dy is float64"):
        vjp(CORNERS)
