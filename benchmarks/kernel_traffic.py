"""The least that each operation of `kernels` must do: bytes through the memory of a GPU, and operations of its products.

Bytes count every input read once and every output written once, and a small array beside them not at all. What a pass keeps for
its gradient counts only where the gradient cannot do without. Operations are counted for attention alone, two for every product
of a pair: the other operations do so little arithmetic per byte that memory limits them.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """Bytes and operations of a forward and of a backward pass; 0 where there is none."""

    forward_bytes: int
    backward_bytes: int = 0
    forward_operations: int = 0
    backward_operations: int = 0

    def of(self, part: str) -> tuple[int, int]:
        """Bytes and operations of "forward", "backward" or "both"."""
        passes = (
            (self.forward_bytes, self.forward_operations),
            (self.backward_bytes, self.backward_operations),
        )
        if part == "both":
            return sum(b for b, _ in passes), sum(o for _, o in passes)
        return passes[0] if part == "forward" else passes[1]


def depth_loss(pixels: int, element: int) -> Work:
    """N pixels in all, `element` bytes each: (e + 5) N forward, (2e + 5) N backward; 9 N and 13 N in float32, 7 N and 9 N below.

    Forward reads prediction (e), float32 target (4) and mask (1). Backward reads the three again and writes the gradient (e). A
    forward pass that also writes the residuals (4) spares the backward pass all reads but theirs: 4 N more, (e + 1) N less.
    """
    return Work((element + 5) * pixels, (2 * element + 5) * pixels)


def cross_entropy(logits: int, labels: int, element: int, label: int) -> Work:
    """`logits` elements of `element` bytes, `labels` of `label` bytes: s BKhw + (l + 4) P forward, 2 s BKhw + (l + 4) P backward.

    Forward reads logits and labels and writes a float32 log sum exp for each label's pixel; backward reads all three and writes
    the gradient.
    """
    pixels = (label + 4) * labels
    return Work(element * logits + pixels, 2 * element * logits + pixels)


def upsample_add(x: int, out: int, element: int) -> Work:
    """x of `x` elements, skip and result of `out`: e (x + 2 out) forward, e (out + x) backward, from dout to dx.

    The gradient in skip is dout itself.
    """
    return Work(element * (x + 2 * out), element * (out + x))


def attention(heads: int, queries: int, keys: int, depth: int, element: int) -> Work:
    """`heads` heads in all images. Operations 4 H N M d forward and 10 H N M d backward; bytes as listed here.

    Forward reads q, k and v and writes the result and a float32 log sum exp for each query: H (2 N d + 2 M d) s + 4 H N. Backward
    reads q, k, v, the result, its gradient and log sum exp, and writes dq, dk, dv: H (4 N d + 4 M d) s + 4 H N. Backward needs
    five products of N x M x d; the kernels make seven, 14 H N M d, because their two launches each compute the weights and
    their gradient again.
    """
    product = 2 * heads * queries * keys * depth
    tokens = heads * (queries + keys) * depth * element
    sums = 4 * heads * queries
    return Work(2 * tokens + sums, 4 * tokens + sums, 2 * product, 5 * product)


def read_project(tokens: int, element: int) -> Work:
    """Tokens of B N D = `tokens` elements: 2 e BND forward, 3 e BND backward (dout and tokens to dtokens).

    Readout and bias, and the gradients in them, are left out: of N tokens each they are as much as one or less.
    """
    return Work(2 * element * tokens, 3 * element * tokens)


def least_squares(pixels: int, element: int) -> Work:
    """(2 e + 1) BHW: prediction, target and mask. There is no backward kernel."""
    return Work((2 * element + 1) * pixels)


def confusion(pixels: int, label: int, classes: int) -> Work:
    """2 l P + 8 K^2: two maps of `label` bytes a pixel, and the matrix of int64."""
    return Work(2 * label * pixels + 8 * classes**2)
