"""The depth loss (Section 4.1; MiDaS, TPAMI 2020, Section 5), trimmed and blind to scale and shift, and its gradient.

Maps are (B, H, W), NumPy arrays (computed on the host) or CuPy arrays (on their GPU, on CuPy's current stream). A prediction
is float32, float16, bfloat16 (`ml_dtypes.bfloat16`) or, on the host, float64. Its accumulator, which is the dtype of the target,
of the loss and of all sums, is float32, for float64 float64. Medians and trimming select on values as they stand. Results are
the same every time: for maps of one shape, nothing is summed in an order that may change.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kernels.ladder import accumulator, check_rung
from kernels.launch import Array, address, check, check_apart, check_array, check_output, check_written, launch, new, place
from kernels.source import Source

FORWARD = ("loss_naive", "median", "deviation", "residual", "threshold", "terms", "mean")
SOURCE = Source("losses.cu", tuple(f"depth_{name}<{{}}>" for name in FORWARD))
BACKWARD = Source("losses_backward.cu", ("depth_loss_backward_naive<{}>", "depth_loss_backward<{}>"))

THREADS = 512  # of a block: a power of two
LARGE_CHUNK, SMALL_CHUNK = 8192, 2048  # pixels of a block: multiples of 4
BLOCKS = 128  # about as many as a GPU has multiprocessors
DIGIT, NUMBERS, COUNTS = 11, 6, 32  # as in the source
MAX_SCALES = 27
COUNT = np.dtype(np.int32)


class DepthSaved(NamedTuple):
    """What `depth_loss` keeps for its gradient: R (B, H, W), numbers (B, 6), counts (B, 32), and its arguments."""

    residual: Array
    numbers: Array
    counts: Array
    scales: int
    gradient_weight: float
    rung: int


def depth_loss(
    prediction: Array,
    target: Array,
    mask: Array,
    kept: float = 0.8,
    scales: int = 4,
    gradient_weight: float = 0.5,
    rung: int = 2,
    out: tuple[Array, Array, Array, Array] | None = None,
) -> tuple[Array, DepthSaved]:
    """The trimmed scale-and-shift-invariant loss with gradient matching (MiDaS, Section 5: L_ssitrim and L_reg).

    prediction (B, H, W); target (B, H, W), of the accumulator's dtype; mask (B, H, W), bool or uint8, not 0 where valid. Both
    maps are aligned, image by image, by their lower median and mean absolute deviation over the valid pixels; what they hold
    elsewhere changes nothing. Of M valid pixels the floor(kept M) smallest residuals count; gradients are matched at `scales`
    scales, 0 to 27. rung: 1, naive, or 2.

    Returns the loss (1,), of the accumulator's dtype: the mean over all images, of which those without a valid pixel contribute
    0; and what `depth_loss_backward` takes. `out`: arrays for the loss and for the first three of that. No value is looked at
    before the launch: where a valid pixel is not finite, or the sum of an image's |d - t| is not, the loss is NaN. TypeError or
    ValueError names the argument whose type, dtype, shape, layout, size, place or value is wrong, or that `out` overlaps.
    """
    _check_maps(prediction, target, mask)
    scales, kept, gradient_weight = _check_options(kept, scales, gradient_weight, rung)
    images, height, width = prediction.shape
    if out is None:
        shapes = saved_shapes(prediction.shape)
        out = tuple(new(shape, COUNT if name == "counts" else target.dtype, prediction) for name, shape in shapes.items())
    loss, residual, numbers, counts = out
    inputs = {"prediction": prediction, "target": target, "mask": mask}
    for (name, shape), array in zip(saved_shapes(prediction.shape).items(), out, strict=True):
        check_array(name, array, ((COUNT if name == "counts" else target.dtype).name,), {"target": target})
        check_written(name, array, shape, inputs)
        inputs[name] = array  # the next must not overlap it either
    counts.fill(0)
    chunks = 1 if rung == 1 else -(-height * width // chunk_of(images, height * width))
    parts = new((images * chunks, 2), target.dtype, prediction)
    options = np.float64(kept), np.int32(scales), np.float64(gradient_weight)
    if rung == 1:
        maps = prediction, target, mask, residual, numbers, counts, parts
        sides = np.int32(height), np.int32(width)
        launch(SOURCE, "depth_loss_naive<{}>", (images, 1, 1), (THREADS, 1, 1), (*maps, *sides, *options))
    else:
        _select_and_sum(prediction, target, mask, residual, numbers, counts, parts, options)
    sums = parts, numbers, loss, np.int32(images), np.int32(chunks)
    launch(SOURCE, "depth_mean<{}>", (1, 1, 1), (THREADS, 1, 1), sums)
    return loss, DepthSaved(residual, numbers, counts, scales, gradient_weight, rung)


def saved_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of what `depth_loss` writes for a prediction of this shape; all have the accumulator's dtype, counts int32."""
    return {"loss": (1,), "residual": shape, "numbers": (shape[0], NUMBERS), "counts": (shape[0], COUNTS)}


def chunk_of(images: int, pixels: int) -> int:
    """How many pixels a block takes: many, to spread what each block does once, unless too few blocks would be at work."""
    return LARGE_CHUNK if images * pixels >= BLOCKS * LARGE_CHUNK else SMALL_CHUNK


def _select_and_sum(
    prediction: Array,
    target: Array,
    mask: Array,
    residual: Array,
    numbers: Array,
    counts: Array,
    parts: Array,
    options: tuple[np.float64, np.int32, np.float64],
) -> None:
    """The launches of rung 2, up to the sums of each chunk."""
    images, height, width = prediction.shape
    pixels = height * width
    chunk = chunk_of(images, pixels)
    chunks = -(-pixels // chunk)
    kept, scales, weight = options
    bits = 8 * target.dtype.itemsize
    median_digits = -(-bits // DIGIT)
    size_digits = -(-(bits - 1) // DIGIT)
    trimming_digits = size_digits + max(-(-(pixels - 1).bit_length() // DIGIT), 1)  # of |R|, and of a pixel's place
    medians = _selections(2 * median_digits, prediction)
    trimming = _selections(trimming_digits, prediction)
    maps, cut = (prediction, target, mask), (np.int32(chunk), np.int32(chunks))
    aligned = all(address(array) % min(4 * array.dtype.itemsize, 16) == 0 for array in (*maps, residual))
    whole = np.int32(aligned and pixels % 4 == 0)

    def run(name: str, *arguments: object) -> None:
        launch(SOURCE, f"depth_{name}<{{}}>", (images * chunks, 1, 1), (THREADS, 1, 1), arguments)

    size, digits = np.int32(pixels), np.int32(trimming_digits)
    for digit in range(median_digits):
        run("median", *maps, *medians, counts, size, *cut, whole, np.int32(digit))
    run("deviation", *maps, *medians, parts, numbers, counts, size, np.int32(width), *cut, whole, scales)
    run("residual", *maps, parts, numbers, counts, residual, trimming[0], size, *cut, digits, whole)
    for digit in range(1, trimming_digits):
        run("threshold", residual, *trimming, counts, size, *cut, digits, whole, np.int32(digit), kept)
    shape = np.int32(height), np.int32(width)
    run("terms", prediction, residual, *trimming, parts, numbers, counts, *shape, *cut, digits, kept, scales, weight)


def depth_loss_backward(dloss: Array, prediction: Array, saved: DepthSaved, out: Array | None = None) -> Array:
    """The gradient in the prediction of `depth_loss`, given that in the loss, dloss (1,) of the accumulator's dtype.

    prediction and saved: those of the forward pass, on whose rung this is computed. Returns `out`, by default a new array, of
    the prediction's shape and dtype: 0 where the mask is; NaN at the valid pixels of an image that made the loss NaN. Errors as
    in `depth_loss`.
    """
    check({"prediction": prediction})
    check({"saved.residual": saved.residual, "dloss": dloss})
    if dloss.shape != (1,):
        raise ValueError(f"dloss has shape {dloss.shape}, expected (1,)")
    wanted = (prediction.shape, accumulator(prediction), place(prediction))
    if (saved.residual.shape, saved.residual.dtype, place(saved.residual)) != wanted:
        raise ValueError(
            f"saved is of a prediction {saved.residual.shape} whose accumulator is {saved.residual.dtype.name}, on "
            f"{place(saved.residual)}, expected one {wanted[0]} with {wanted[1].name}, on {wanted[2]}"
        )
    residual, numbers, counts, scales, gradient_weight, rung = saved
    for name, array, dtype in (("numbers", numbers, residual.dtype), ("counts", counts, COUNT)):
        check_array(f"saved.{name}", array, (dtype.name,), {"prediction": prediction})
        expected = saved_shapes(prediction.shape)[name]
        if array.shape != expected:
            raise ValueError(f"saved.{name} has shape {array.shape}, expected {expected}")
    _check_options(1.0, scales, gradient_weight, rung)
    if out is None:
        out = new(prediction.shape, prediction.dtype, prediction)
    check_output("out", out, prediction.shape, {"prediction": prediction})
    check_apart("out", out, {"dloss": dloss, "residual": residual, "numbers": numbers, "counts": counts})
    images, height, width = prediction.shape
    chunk = chunk_of(images, height * width)
    chunks = -(-height * width // chunk)
    cut = () if rung == 1 else (np.int32(chunk), np.int32(chunks))
    shape = np.int32(images), np.int32(height), np.int32(width)
    arguments = (prediction, residual, numbers, counts, dloss, out, *shape, *cut, np.int32(scales), np.float64(gradient_weight))
    name, blocks = ("depth_loss_backward_naive<{}>", images) if rung == 1 else ("depth_loss_backward<{}>", images * chunks)
    launch(BACKWARD, name, (blocks, 1, 1), (THREADS, 1, 1), arguments)
    return out


def _check_maps(prediction: Array, target: Array, mask: Array) -> None:
    check({"prediction": prediction})
    if prediction.ndim != 3:
        raise ValueError(f"prediction has shape {prediction.shape}, expected (B, H, W)")
    check({"target": target})
    check_array("mask", mask, ("bool", "uint8"), {})
    if target.dtype != accumulator(prediction):
        expected = f"expected {accumulator(prediction).name} for a prediction of {prediction.dtype.name}"
        raise TypeError(f"target has dtype {target.dtype.name}, {expected}")
    for name, array in (("target", target), ("mask", mask)):
        if place(array) != place(prediction):
            raise ValueError(f"{name} is on {place(array)} and prediction on {place(prediction)}, expected one place")
        if array.shape != prediction.shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {prediction.shape}, the shape of the prediction")


def _check_options(kept: float, scales: int, gradient_weight: float, rung: int) -> tuple[int, float, float]:
    """scales, kept, gradient_weight as numbers. TypeError or ValueError names the one that is none, or out of range."""
    if not 0 <= kept <= 1:
        raise ValueError(f"kept is {kept!r}, expected a fraction of the valid pixels, between 0 and 1")
    if not isinstance(scales, int | np.integer) or not 0 <= scales <= MAX_SCALES:
        raise ValueError(f"scales is {scales!r}, expected a whole number from 0 to {MAX_SCALES}")
    if not math.isfinite(gradient_weight):
        raise ValueError(f"gradient_weight is {gradient_weight!r}, expected a finite number")
    check_rung(rung, 2)
    return int(scales), float(kept), float(gradient_weight)


def _selections(digits: int, like: Array) -> tuple[Array, Array]:
    """For each image of `like` and digit of its selections: a histogram, all zero, and room for a choice (16 bytes)."""
    images = len(like)
    histograms = new((images, digits, 2**DIGIT), np.dtype(np.uint32), like, 0)
    return histograms, new((images, digits, 2), np.dtype(np.uint64), like)
