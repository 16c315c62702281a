"""The confusion matrix of segmentation (Section 5.2): pixels counted by true and predicted class.

Label maps are NumPy arrays (counted on the host) or CuPy arrays (on their GPU, on CuPy's current stream), of uint8, int32 or
int64, the two not necessarily of the same.
"""

from __future__ import annotations

import numpy as np

from kernels.ladder import ID_DTYPES, on_host, whole
from kernels.launch import Array, check_array, check_written, launch, new
from kernels.source import Source

SOURCE = Source("confusion.cu", ("confusion_naive", "confusion_matching", "confusion_shared"))

RUNGS = 3
ELEMENT = "float32"  # the kernels have no element type: any names them
THREADS = 256
SHARED_BYTES = 48 * 1024  # what every GPU gives a block
MOST_SHARED_CLASSES = 156  # two counters in 4 bytes: 156 * 156 * 2 bytes fit
BLOCK_PIXELS = 4096  # of one block of the shared rung, or more where there would be more than BLOCKS blocks
BLOCKS = 512
MOST_BLOCK_PIXELS = 65280  # a counter has 16 bits; a multiple of THREADS


def confusion(
    prediction: Array,
    label: Array,
    num_classes: int,
    ignore_index: int = 255,
    *,
    rung: int | None = None,
    out: Array | None = None,
) -> Array:
    """Count pixels by true and predicted class: (num_classes, num_classes) int64, truth along the rows.

    prediction and label are class ids (B, H, W), or of any one shape; a pixel labelled `ignore_index` does not count, whatever
    its prediction. Matrices of batches are added. Returns `out`, by default a new array in the place of the maps. rung 1 is the
    naive kernel, 2 lets a warp add once per counter, 3, for at most 156 classes, counts in shared memory first; the default is 3
    where it can be and 2 elsewhere.

    Waits for the GPU, where the ids are checked: ValueError names the first label, or else the first prediction, that is no
    class, and `out` is then untouched. TypeError or ValueError names an argument whose type, dtype, shape, layout, size or place
    is wrong, or the array that `out` overlaps.
    """
    num_classes = whole("num_classes", num_classes, 1, 46340)  # whose square an int holds
    rung = _choose_rung(rung, num_classes)
    ignore_index = whole("ignore_index", ignore_index, 1 - 2**31, 2**31 - 1)
    check_array("label", label, ID_DTYPES, {})
    check_array("prediction", prediction, ID_DTYPES, {"label": label})
    if prediction.shape != label.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, expected {label.shape}, that of the label")
    shape = (num_classes, num_classes)
    if out is not None:
        check_array("out", out, ("int64",), {"label": label})
        check_written("out", out, shape, {"prediction": prediction, "label": label})
    counts = _count(prediction, label, num_classes, ignore_index, rung)
    if out is None:
        return counts
    out[...] = counts
    return out


def _choose_rung(rung: int | None, num_classes: int) -> int:
    if rung is None:
        return RUNGS if num_classes <= MOST_SHARED_CLASSES else RUNGS - 1
    whole("rung", rung, 1, RUNGS)
    if rung == RUNGS and num_classes > MOST_SHARED_CLASSES:
        raise ValueError(f"num_classes is {num_classes}, expected at most {MOST_SHARED_CLASSES} for rung {RUNGS}")
    return rung


def _count(prediction: Array, label: Array, num_classes: int, ignore_index: int, rung: int) -> Array:
    pixels = label.size
    counts = new((num_classes, num_classes), "int64", label, 0)
    wrong = new((2,), "int32", label, pixels)
    numbers = (label.itemsize, prediction.itemsize, pixels, num_classes, ignore_index)
    arguments = (counts, label, prediction, wrong, *map(np.int32, numbers))
    if rung < 3:
        blocks = -(-pixels // THREADS)
        launch(SOURCE, SOURCE.templates[rung - 1], (blocks, 1, 1), (THREADS, 1, 1), arguments, 0, ELEMENT)
    else:
        block_pixels = _block_pixels(pixels)
        shared = 4 * (-(-(num_classes**2) // 2))
        extent = (-(-pixels // block_pixels), 1, 1)
        launch(SOURCE, "confusion_shared", extent, (THREADS, 1, 1), (*arguments, np.int32(block_pixels)), shared, ELEMENT)
    for name, array, first in zip(("label", "prediction"), (label, prediction), on_host(wrong).tolist(), strict=True):
        if first < pixels:
            raise ValueError(f"the {name} holds {int(array.reshape(-1)[first])}: expected a class from 0 to {num_classes - 1}")
    return counts


def _block_pixels(pixels: int) -> int:
    """How many pixels a block of the shared rung counts: enough that emptying its table costs little, and of 16 bits at most."""
    return min(max(BLOCK_PIXELS, -(-pixels // (BLOCKS * THREADS)) * THREADS), MOST_BLOCK_PIXELS)
