"""Cross-entropy of segmentation (Section 5.2) with the logits' upsampling to the labels fused in, and its gradient.

    forward = cross_entropy(logits, labels)                                     # forward.loss
    dlogits = cross_entropy_backward(dloss, logits, labels, forward)

The logits at the resolution of the labels never exist in memory. Logits are (B, K, h, w), labels (B, H, W); all are NumPy arrays
(computed on the host) or CuPy arrays (on their GPU, on CuPy's current stream). Logits are float32, float16, bfloat16
(`ml_dtypes.bfloat16`) or, on the host, float64; everything is computed in float32, for float64 in float64. Every sum has one
fixed order, so the results are the same every time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kernels.ladder import ID_DTYPES, accumulator, ints, on_host, whole
from kernels.launch import Array, check, check_apart, check_array, check_output, check_written, empty, launch, launch_each, new
from kernels.source import Source

SOURCE = Source(
    "cross_entropy.cu",
    (
        "cross_entropy_naive<{}>",
        "cross_entropy_tiled<{}>",
        "cross_entropy_total<{}>",
    ),
)
BACKWARD = Source("cross_entropy_backward.cu", ("cross_entropy_backward_naive<{}>", "cross_entropy_backward_walking<{}>"))

RUNGS = 2
# As in cross_entropy.cu and cross_entropy_backward.cu.
LANES = 32
TILE_ROWS, TILE_WARPS = 4, 8
WALK_ROWS, WALK_WARPS, WALK_CLASSES = 8, 4, 4


class CrossEntropy(NamedTuple):
    """The mean loss (1,), and for the backward pass log sum exp (B, H, W): of the logits' accumulator's dtype.

    log_sum_exp is 0 at the pixels that do not count. totals (3,), float64: the sum of the losses, how many pixels count, and the
    place in memory of the first label that is no class, 2^31 - 1 if all are.
    """

    loss: Array
    log_sum_exp: Array
    totals: Array


def cross_entropy(
    logits: Array,
    labels: Array,
    ignore_index: int = 255,
    *,
    rung: int = RUNGS,
    out: CrossEntropy | None = None,
    wait: bool = True,
) -> CrossEntropy:
    """Mean of log sum exp z - z[label] over the pixels that count, z being the logits resized to the labels' size.

    logits (B, K, h, w), resized bilinearly, align_corners=True; labels (B, H, W) uint8, int32 or int64, each a class or
    `ignore_index`, whose pixels do not count; if none does, the loss is 0. Returns `out`, by default new arrays. rung 1 is the
    naive kernel, 2 the tiled one.

    TypeError or ValueError names the argument whose type, dtype, shape, layout, size or place is wrong, or what `out` overlaps.
    A label that is no class is found by the launch itself: with `wait`, which reads one number back from a GPU, ValueError names
    it; without, the loss and the gradient are NaN.
    """
    ignore_index = _check(logits, labels, ignore_index, rung)
    sums = accumulator(logits)
    if out is None:
        out = CrossEntropy(new((1,), sums, logits), new(labels.shape, sums, logits), new((3,), "float64", logits))
    inputs = {"logits": logits, "labels": labels}
    _check_saved(out, logits, labels)
    for name, array in zip(CrossEntropy._fields, out, strict=True):
        check_written(name, array, array.shape, inputs)
        inputs[name] = array  # the next must not overlap it either
    (batch, classes, *_), (_, height, width) = logits.shape, labels.shape
    if rung == 1:
        blocks = -(-labels.size // 256)
        template, sizes = "cross_entropy_naive<{}>", ints(batch, *_sizes(logits, labels))
    else:
        blocks = batch * -(-height // TILE_ROWS) * -(-width // LANES)
        template, sizes = "cross_entropy_tiled<{}>", ints(*_sizes(logits, labels))
    losses = new((blocks,), sums, logits)
    counts = new((blocks, 2), "int32", logits)
    arguments = (logits, labels, out.log_sum_exp, losses, counts, *ints(labels.itemsize, ignore_index), *sizes)
    launch(SOURCE, template, (blocks, 1, 1), (256, 1, 1), arguments)
    totals = (out.loss, losses, counts, out.totals, np.int32(blocks))
    launch(SOURCE, "cross_entropy_total<{}>", (1, 1, 1), (256, 1, 1), totals)
    if wait:
        wrong = int(on_host(out.totals)[2])
        if wrong < labels.size:
            label = int(labels.reshape(-1)[wrong])
            expected = f"expected a class from 0 to {classes - 1}, or {ignore_index} to ignore a pixel"
            raise ValueError(f"labels hold {label}: {expected}")
    return CrossEntropy(*out)


def cross_entropy_backward(
    dloss: Array,
    logits: Array,
    labels: Array,
    forward: CrossEntropy,
    ignore_index: int = 255,
    *,
    rung: int = RUNGS,
    out: Array | None = None,
) -> Array:
    """The gradient in the logits, (B, K, h, w), of `cross_entropy`, given that in the loss, dloss (1,), of the loss's dtype.

    forward: what `cross_entropy` returned for these logits and labels. Returns `out`, by default a new array, of the logits'
    dtype: where that is float16, a `dloss` as large as a loss scaler's keeps small gradients from vanishing. rung 1 is the naive
    kernel, 2 the walking one. Errors as in `cross_entropy`; NaN where a label is no class.
    """
    ignore_index = _check(logits, labels, ignore_index, rung)
    _check_saved(forward, logits, labels)
    check_array("dloss", dloss, (accumulator(logits).name,), {"logits": logits})
    if dloss.shape != (1,):
        raise ValueError(f"dloss has shape {dloss.shape}, expected (1,)")
    if out is None:
        out = empty(logits.shape, logits)
    check_output("out", out, logits.shape, {"logits": logits})
    check_apart("out", out, {"dloss": dloss, "labels": labels, **forward._asdict()})
    arguments = (logits, labels, forward.log_sum_exp, out, dloss, forward.totals, *ints(labels.itemsize, ignore_index))
    batch, classes, height, width = logits.shape
    if rung == 1:
        sizes = ints(batch, *_sizes(logits, labels))
        launch_each(BACKWARD, "cross_entropy_backward_naive<{}>", out.size, (*arguments, *sizes))
        return out
    tile_width = _tile_width(width, labels.shape[2])
    groups = -(-classes // (WALK_CLASSES * WALK_WARPS))
    blocks = batch * groups * -(-height // WALK_ROWS) * -(-width // tile_width)
    sizes = ints(tile_width, *_sizes(logits, labels))
    launch(BACKWARD, "cross_entropy_backward_walking<{}>", (blocks, 1, 1), (WALK_WARPS * LANES, 1, 1), (*arguments, *sizes))
    return out


def _check_saved(saved: CrossEntropy, logits: Array, labels: Array) -> None:
    """Check the dtypes, shapes and places of what `cross_entropy` returns."""
    sums = accumulator(logits).name
    for (name, array), dtype, shape in zip(
        saved._asdict().items(), (sums, sums, "float64"), ((1,), labels.shape, (3,)), strict=True
    ):
        check_array(name, array, (dtype,), {"logits": logits})
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


def _tile_width(width: int, out_width: int) -> int:
    """How many neighbouring cells have all their readers within 32 columns, at least 1.

    Those of n cells lie strictly within n + 1 spacings of cells, each (out_width - 1) / (width - 1) columns.
    """
    return min(max(LANES * (width - 1) // max(out_width - 1, 1) - 1, 1), LANES)


def _check(logits: Array, labels: Array, ignore_index: int, rung: int) -> int:
    check({"logits": logits})
    if logits.ndim != 4:
        raise ValueError(f"logits has shape {logits.shape}, expected (B, K, h, w)")
    check_array("labels", labels, ID_DTYPES, {"logits": logits})
    if labels.ndim != 3 or len(labels) != len(logits):
        raise ValueError(f"labels has shape {labels.shape}, expected ({len(logits)}, H, W), as many as the logits")
    whole("rung", rung, 1, RUNGS)
    return whole("ignore_index", ignore_index, 1 - 2**31, 2**31 - 1)


def _sizes(logits: Array, labels: Array) -> tuple[int, ...]:
    """What all kernels take last: classes, and the height and width of logits and of labels."""
    return (*logits.shape[1:], *labels.shape[1:])
