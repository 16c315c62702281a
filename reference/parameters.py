"""Parameters: one flat dictionary from key to array. The keys are those of the PyTorch model's `state_dict()`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import numpy as np

Params = Mapping[str, np.ndarray]
Grads = dict[str, np.ndarray]
Observe = Callable[[str, np.ndarray], None]
"""Called with a name ("tap.0", "attention.3", ...) and the array of that name. It watches; it must not change the array."""

BUFFERS = ("running_mean", "running_var")
"""Last part of the keys that hold batch statistics: carried with the parameters, but without a gradient."""


def take(params: Params, key: str) -> np.ndarray:
    """Return `params[key]`; KeyError naming the key and the nearest ones if it is absent."""
    try:
        return params[key]
    except KeyError:
        near = difflib.get_close_matches(key, params, n=3)
        hint = f"; the nearest keys are {', '.join(near)}" if near else ""
        raise KeyError(f"the parameters have no {key!r} (they have {len(params)} keys{hint})") from None


def merge(*parts: Grads) -> Grads:
    """Join gradient dictionaries of different parameters. A key in two of them is a mistake: it raises ValueError."""
    merged: Grads = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise ValueError(f"two gradients for the same parameters: {', '.join(sorted(twice))}")
        merged.update(part)
    return merged


def is_trainable(key: str) -> bool:
    """Whether the parameter of this key has a gradient (batch statistics have none)."""
    return key.rpartition(".")[2] not in BUFFERS
