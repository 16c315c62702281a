"""The primitives of `reference.nn` with their parameters taken from the flat dictionary.

Each is `y, vjp = layer(params, prefix, x, ...)` with `vjp(dy) -> (dx, grads)`: grads has the gradients of the parameters
used, under their full keys. Shapes are those of the primitive; a missing parameter raises KeyError.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import nn
from .nn.checks import Padding
from .parameters import Grads, Params, take

Result = tuple[np.ndarray, Callable[[np.ndarray], tuple[np.ndarray, Grads]]]


def _named(result: tuple[np.ndarray, Callable], *keys: str) -> Result:
    """Put the parameter gradients that a primitive's vjp returns after dx under `keys`."""
    y, primitive_vjp = result

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dx, *dparams = primitive_vjp(dy)
        return dx, dict(zip(keys, dparams, strict=False))  # a convolution without bias returns None for it: no key, no gradient

    return y, vjp


def _weight_and_bias(params: Params, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    return take(params, f"{prefix}.weight"), take(params, f"{prefix}.bias")


def linear(params: Params, prefix: str, x: np.ndarray) -> Result:
    """`nn.linear` with `{prefix}.{weight,bias}`: (..., I) to (..., O)."""
    return _named(nn.linear(x, *_weight_and_bias(params, prefix)), f"{prefix}.weight", f"{prefix}.bias")


def layer_norm(params: Params, prefix: str, x: np.ndarray, eps: float) -> Result:
    """`nn.layer_norm` with `{prefix}.{weight,bias}`."""
    return _named(nn.layer_norm(x, *_weight_and_bias(params, prefix), eps), f"{prefix}.weight", f"{prefix}.bias")


def group_norm(params: Params, prefix: str, x: np.ndarray, groups: int) -> Result:
    """`nn.group_norm` with `{prefix}.{weight,bias}`."""
    return _named(nn.group_norm(x, groups, *_weight_and_bias(params, prefix)), f"{prefix}.weight", f"{prefix}.bias")


def conv2d(params: Params, prefix: str, x: np.ndarray, stride: int = 1, padding: Padding = 0) -> Result:
    """`nn.conv2d` with `{prefix}.{weight,bias}`."""
    weight, bias = _weight_and_bias(params, prefix)
    return _named(nn.conv2d(x, weight, bias, stride=stride, padding=padding), f"{prefix}.weight", f"{prefix}.bias")


def conv2d_without_bias(params: Params, prefix: str, x: np.ndarray, padding: Padding) -> Result:
    """`nn.conv2d` with `{prefix}.weight` alone."""
    return _named(nn.conv2d(x, take(params, f"{prefix}.weight"), None, padding=padding), f"{prefix}.weight")


def conv_transpose2d(params: Params, prefix: str, x: np.ndarray, stride: int) -> Result:
    """`nn.conv_transpose2d` with `{prefix}.{weight,bias}`."""
    weight, bias = _weight_and_bias(params, prefix)
    return _named(nn.conv_transpose2d(x, weight, bias, stride=stride), f"{prefix}.weight", f"{prefix}.bias")
