"""Absolute differences between neighbouring pixels: what gradient matching sums (paper section 5; MiDaS, section 5, L_reg)."""

from __future__ import annotations

import numpy as np

from reference.implementation import twinned

from .checks import Array


@twinned
def absolute_differences(maps: Array, valid: Array) -> Array:
    """Return, per map, the sum of |dR/dx| + |dR/dy| (B,) of maps R (B, H, W), float32 or float64, valid (B, H, W) bool.

    A difference counts where both of its pixels are valid; what stands at the others is not read.
    """
    across, down = _differences(maps, valid)
    return np.abs(across).sum(axis=(1, 2)) + np.abs(down).sum(axis=(1, 2))


@twinned
def absolute_differences_adjoint(dsum: Array, maps: Array, valid: Array) -> Array:
    """Return dmaps (B, H, W) of dsum (B,). The derivative of |x| is 0 at 0."""
    across, down = _differences(maps, valid)
    dacross, ddown = dsum[:, None, None] * np.sign(across), dsum[:, None, None] * np.sign(down)
    dmaps = np.zeros(maps.shape, maps.dtype)
    dmaps[:, :, 1:] += dacross
    dmaps[:, :, :-1] -= dacross
    dmaps[:, 1:] += ddown
    dmaps[:, :-1] -= ddown
    return dmaps


def _differences(maps: Array, valid: Array) -> tuple[Array, Array]:
    maps = np.where(valid, maps, maps.dtype.type(0))
    across = np.where(valid[:, :, 1:] & valid[:, :, :-1], maps[:, :, 1:] - maps[:, :, :-1], maps.dtype.type(0))
    down = np.where(valid[:, 1:] & valid[:, :-1], maps[:, 1:] - maps[:, :-1], maps.dtype.type(0))
    return across, down
