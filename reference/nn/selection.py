"""Selections of the losses (paper section 5; MiDaS, section 5): the lower median, and the U_m smallest residuals.

Each acts on the rows of values (B, N), float32 or float64, one row an image; only the values where valid (B, N) is True count.
What is returned are positions, and values as they stand, so that the two implementations agree exactly.
"""

from __future__ import annotations

import numpy as np

from reference.implementation import twinned

from .checks import Array


@twinned
def lower_median(values: Array, valid: Array) -> tuple[Array, Array]:
    """Return, per row, the lower median (B,) of the valid values and the first position (B,) that has it.

    Of an even number of values it is the smaller of the two in the middle. A row without a valid value has 0, at position 0.
    """
    median, first = np.zeros(len(values), values.dtype), np.zeros(len(values), np.intp)
    for b, row in enumerate(values):
        candidates = row[valid[b]]
        if len(candidates):
            middle = (len(candidates) - 1) // 2
            median[b] = np.partition(candidates, middle)[middle]
            first[b] = np.argmax(valid[b] & (row == median[b]))
    return median, first


@twinned
def smallest(values: Array, valid: Array, count: Array) -> Array:
    """Return which are the count[b] smallest of each row's valid values: (B, N) bool. Of equal ones, the first are taken.

    count (B,), whole numbers, at most the number of valid values.
    """
    chosen = np.zeros(values.shape, bool)
    for b, row in enumerate(values):
        places = np.flatnonzero(valid[b])
        chosen[b, places[np.argsort(row[places], kind="stable")[: count[b]]]] = True
    return chosen
