"""Alignment by least squares (Section 4; MiDaS, TPAMI 2020, Section 5): the scale and shift of every image of a batch at once.

Maps are (B, H, W), NumPy arrays (computed on the host) or CuPy arrays (on their GPU, on CuPy's current stream), C-contiguous, of
dtype float32, float16, bfloat16 (`ml_dtypes.bfloat16`) or, on the host, float64. All sums are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kernels.ladder import VECTOR, accumulator, check_rung, ints, vector_bytes
from kernels.launch import Array, address, check, check_array, check_written, launch, launch_each, new
from kernels.source import Source

SOURCE = Source(
    "alignment.cu",
    ("least_squares_naive<{}>", "least_squares_parts<{}, 16>", "least_squares_parts<{}, 1>", "least_squares_solve<{}>"),
)
RUNGS = 2
THREADS = 256  # of a block of rung 2
PIXELS = 8  # of a thread, at least, where there are that many
BLOCKS = 1024  # that fill a GPU
MOMENTS = 9  # float64 numbers that a block leaves for the second launch


class LeastSquares(NamedTuple):
    """Per image: scale (B,), shift (B,), and whether the normal equations were singular (B,) bool."""

    scale: Array
    shift: Array
    singular: Array


def least_squares(
    prediction: Array, target: Array, mask: Array, out: LeastSquares | None = None, *, rung: int = RUNGS
) -> LeastSquares:
    """Per image, the scale s and shift t that minimise sum (s * prediction + t - target)^2 over the valid pixels.

    prediction, target (B, H, W) of one dtype; mask (B, H, W), bool or uint8, not 0 where a pixel is valid: what the maps hold
    elsewhere changes nothing. The equations are singular where the valid predictions are constant (one pixel, or none, is), to
    within 8 eps of the largest: then s = 0 and t = mean target, which is a minimiser, or 0 without a valid pixel.

    Returns `out`, by default new arrays: scale and shift float32 (float64 for float64 maps), singular bool. Sums have one fixed
    order for given sizes, alignment in memory and rung, 1 naive or 2: results are the same every time. A valid pixel that is not
    finite makes its image's results what the formulas give, for the most part NaN. TypeError or ValueError names the argument
    whose type, dtype, shape, layout, size, place or value is wrong, or that `out` overlaps.
    """
    maps = {"prediction": prediction, "target": target}
    check(maps)
    check_array("mask", mask, ("bool", "uint8"), maps)
    check_rung(rung, RUNGS)
    if prediction.ndim != 3:
        raise ValueError(f"prediction has shape {prediction.shape}, expected (B, H, W)")
    for name, array in (("target", target), ("mask", mask)):
        if array.shape != prediction.shape:
            raise ValueError(f"{name} has shape {array.shape} and prediction {prediction.shape}, expected the same")
    images, pixels = prediction.shape[0], prediction.shape[1] * prediction.shape[2]
    if out is None:
        out = LeastSquares(*(new((images,), dtype, prediction) for dtype in (accumulator(prediction),) * 2 + (np.bool_,)))
    inputs = {**maps, "mask": mask}
    for name, array in zip(LeastSquares._fields, out, strict=True):
        check_array(name, array, ("bool",) if name == "singular" else (accumulator(prediction).name,), maps)
        check_written(name, array, (images,), inputs)
        inputs[name] = array  # the next must not overlap it either
    if rung == 1:
        launch_each(SOURCE, "least_squares_naive<{}>", images, (prediction, target, mask, *out, *ints(images, pixels)), 32)
    else:
        parts = max(1, min(-(-pixels // (THREADS * PIXELS)), -(-BLOCKS // images)))
        sums = new((images * parts, MOMENTS), np.float64, prediction)
        template = f"least_squares_parts<{{}}, {_piece(prediction, target, mask)}>"
        arrays = (prediction, target, mask, sums)
        launch(SOURCE, template, (images * parts, 1, 1), (THREADS, 1, 1), (*arrays, *ints(parts, pixels)))
        launch(SOURCE, "least_squares_solve<{}>", (images, 1, 1), (32, 1, 1), (*out, sums, *ints(parts)))
    return LeastSquares(*out)


def _piece(prediction: Array, target: Array, mask: Array) -> int:
    """Whether images are read 16 bytes at a time, and the mask's bytes of as many pixels together."""
    piece = vector_bytes(prediction.shape[1] * prediction.shape[2], prediction, target)
    return 1 if address(mask) % VECTOR else piece
