"""Wrong arguments of every primitive: the error names the argument and its shape or value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reference import nn

X = np.ones((1, 4, 6, 5))
W = np.ones((2, 4, 3, 3))
FOUR = np.ones(4)
W_TRANSPOSED = np.ones((4, 2, 3, 3))
Q, K, V = np.ones((2, 6, 4)), np.ones((2, 5, 4)), np.ones((2, 5, 7))


def conv2d(x: Any = X, weight: Any = W, bias: Any = None, stride: Any = 1, padding: Any = 0) -> Any:
    return nn.conv2d(x, weight, bias, stride, padding)


def transpose(x: Any = X, weight: Any = W_TRANSPOSED, bias: Any = None, stride: Any = 1) -> Any:
    return nn.conv_transpose2d(x, weight, bias, stride)


def batch_norm(x: Any = X, weight: Any = FOUR, bias: Any = FOUR, mean: Any = FOUR, var: Any = FOUR, **options: Any) -> Any:
    return nn.batch_norm(x, weight, bias, mean, var, **options)


def attention(q: Any = Q, k: Any = K, v: Any = V) -> Any:
    return nn.scaled_dot_product_attention(q, k, v)


SHAPES = {
    "linear x": (lambda: nn.linear(np.ones((2, 3)), np.ones((4, 5))), r"x has shape \(2, 3\): expected \(\.\.\., 5\)"),
    "linear weight": (lambda: nn.linear(np.ones((2, 3)), np.ones(3)), r"weight has shape \(3,\): expected \(O, I\)"),
    "linear bias": (lambda: nn.linear(np.ones((2, 3)), np.ones((4, 3)), np.ones(3)), r"bias has shape \(3,\): expected \(4,\)"),
    "linear scalar": (lambda: nn.linear(np.ones(()), np.ones((4, 3))), r"x has shape \(\)"),
    "layer_norm weight": (lambda: nn.layer_norm(X, FOUR, FOUR, 1e-6), r"weight has shape \(4,\): expected \(5,\)"),
    "layer_norm bias": (lambda: nn.layer_norm(X, np.ones(5), FOUR, 1e-6), r"bias has shape \(4,\): expected \(5,\)"),
    "matmul": (lambda: nn.matmul(X, W), r"a has shape \(1, 4, 6, 5\) and b \(2, 4, 3, 3\)"),
    "attention depth": (
        lambda: attention(k=np.ones((2, 5, 3))),
        r"q has shape \(2, 6, 4\), k \(2, 5, 3\), v \(2, 5, 7\): expected \(\.\.\., N, d\)",
    ),
    "attention keys": (lambda: attention(v=np.ones((2, 6, 7))), r"k \(2, 5, 4\), v \(2, 6, 7\)"),
    "attention stack": (lambda: attention(q=np.ones((3, 6, 4))), r"q has shape \(3, 6, 4\), k \(2, 5, 4\)"),
    "attention stack of values": (lambda: attention(v=np.ones((5, 7))), r"k \(2, 5, 4\), v \(5, 7\)"),
    "attention rank": (lambda: attention(FOUR, FOUR, FOUR), r"scaled_dot_product_attention: q has shape \(4,\)"),
    "attention empty": (lambda: attention(k=np.ones((2, 0, 4))), r"scaled_dot_product_attention: k has shape \(2, 0, 4\)"),
    "weights depth": (
        lambda: nn.attention_weights(np.ones((6, 4)), np.ones((6, 5))),
        r"attention_weights: q has shape \(6, 4\), k \(6, 5\)",
    ),
    "weights stack": (lambda: nn.attention_weights(np.ones((2, 6, 4)), np.ones((6, 4))), r"q has shape \(2, 6, 4\), k \(6, 4\)"),
    "softmax axis": (lambda: nn.softmax(X, 4), r"axis is 4 but x has shape \(1, 4, 6, 5\)"),
    "conv2d rank": (lambda: conv2d(x=X[0]), r"x has shape \(4, 6, 5\): expected \(B, C, H, W\)"),
    "conv2d channels": (
        lambda: conv2d(weight=np.ones((2, 3, 3, 3))),
        r"weight has shape \(2, 3, 3, 3\): expected \(O, 4, kh, kw\)",
    ),
    "conv2d bias": (lambda: conv2d(bias=FOUR), r"bias has shape \(4,\): expected \(2,\)"),
    "conv2d stride": (lambda: conv2d(stride=0), r"stride is 0"),
    "conv2d fractional stride": (lambda: conv2d(stride=1.5), r"stride is 1\.5"),
    "conv2d padding": (lambda: conv2d(padding=-1), r"padding is -?\(?.*-1"),
    "conv2d flat padding": (lambda: conv2d(padding=(1, 1)), r"padding is \(1, 1\)"),
    "conv2d kernel": (
        lambda: conv2d(weight=np.ones((2, 4, 3, 8)), padding=1),
        r"x has shape \(1, 4, 6, 5\), padded 8 x 7.*3 x 8",
    ),
    "conv2d empty": (lambda: conv2d(x=X[:0]), r"x has shape \(0, 4, 6, 5\)"),
    "transposed rank": (lambda: transpose(x=X[0]), r"x has shape \(4, 6, 5\)"),
    "transposed channels": (lambda: transpose(weight=W), r"weight has shape \(2, 4, 3, 3\): expected \(4, O, kh, kw\)"),
    "transposed bias": (lambda: transpose(bias=FOUR), r"bias has shape \(4,\): expected \(2,\)"),
    "transposed stride": (lambda: transpose(stride=-2), r"stride is -2"),
    "resize rank": (lambda: nn.resize_bilinear(X[0], (2, 2), True), r"x has shape \(4, 6, 5\)"),
    "resize size": (lambda: nn.resize_bilinear(X, (0, 2), True), r"height is 0"),
    "resize fraction": (lambda: nn.resize_bilinear(X, (3, 2.5), True), r"width is 2\.5"),  # type: ignore[arg-type]
    "batch_norm rank": (lambda: batch_norm(x=X[0]), r"x has shape \(4, 6, 5\)"),
    "batch_norm weight": (lambda: batch_norm(weight=np.ones(3)), r"weight has shape \(3,\): expected \(4,\)"),
    "batch_norm mean": (lambda: batch_norm(mean=np.ones(3)), r"running_mean has shape \(3,\): expected \(4,\)"),
    "batch_norm var": (lambda: batch_norm(var=np.ones(3)), r"running_var has shape \(3,\): expected \(4,\)"),
    "batch_norm one value": (lambda: batch_norm(x=X[:, :, :1, :1], training=True), r"x has shape \(1, 4, 1, 1\)"),
    "group_norm rank": (lambda: nn.group_norm(X[0], 2, FOUR, FOUR), r"x has shape \(4, 6, 5\)"),
    "group_norm groups": (lambda: nn.group_norm(X, 3, FOUR, FOUR), r"x has shape \(1, 4, 6, 5\): expected a multiple of 3"),
    "group_norm no groups": (lambda: nn.group_norm(X, 0, FOUR, FOUR), r"groups is 0"),
    "group_norm weight": (lambda: nn.group_norm(X, 2, np.ones(2), FOUR), r"weight has shape \(2,\): expected \(4,\)"),
    "standardize rank": (lambda: nn.standardize_weight_variance(FOUR), r"w has shape \(4,\)"),
    "max_pool2d rank": (lambda: nn.max_pool2d(X[0], 2, 2), r"x has shape \(4, 6, 5\)"),
    "max_pool2d padding": (lambda: nn.max_pool2d(X, 2, 2, 2), r"padding is 2: expected less than the kernel, 2"),
    "max_pool2d kernel": (lambda: nn.max_pool2d(X, 6, 2), r"x has shape \(1, 4, 6, 5\)"),
    "same_padding": (lambda: nn.same_padding((3, 0), 2, 2), r"width is 0"),
    "dropout mask": (lambda: nn.dropout(X, np.ones(5, bool), 0.5), r"mask has shape \(5,\): expected \(1, 4, 6, 5\)"),
    "dropout p": (lambda: nn.dropout(X, X > 0, 1.0), r"p is 1\.0"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_shapes_and_numbers_are_named(name: str) -> None:
    call, message = SHAPES[name]
    with pytest.raises(ValueError, match=message):
        call()


def whole(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int64)


DTYPES = {
    "linear": (lambda: nn.linear(whole(2, 3), np.ones((4, 3))), r"linear: x has dtype int64 and shape \(2, 3\)"),
    "layer_norm": (lambda: nn.layer_norm(X, np.ones(5), whole(5), 1e-6), r"layer_norm: bias has dtype int64"),
    "matmul": (lambda: nn.matmul(X, whole(1, 4, 5, 2)), r"matmul: b has dtype int64"),
    "attention": (lambda: attention(v=whole(2, 5, 7)), r"scaled_dot_product_attention: v has dtype int64 and shape \(2, 5, 7\)"),
    "attention mixed": (lambda: attention(k=K.astype(np.float32)), r"k \(shape \(2, 5, 4\)\) is float32 but q is float64"),
    "attention swapped": (lambda: attention(q=Q.astype(">f8")), r"scaled_dot_product_attention: q has dtype >f8"),
    "weights": (lambda: nn.attention_weights(X, X.astype(np.float16)), r"attention_weights: k has dtype float16"),
    "gelu": (lambda: nn.gelu(X.astype(np.float16)), r"gelu: x has dtype float16"),
    "softmax": (lambda: nn.softmax(X.astype(">f8")), r"softmax: x has dtype >f8"),
    "relu": (lambda: nn.relu([1.0, 2.0]), r"relu: x has list"),  # type: ignore[arg-type]
    "conv2d": (lambda: conv2d(weight=W.astype(np.float32)), r"weight \(shape \(2, 4, 3, 3\)\) is float32 but x is float64"),
    "conv2d bias": (lambda: conv2d(bias=whole(2)), r"conv2d: bias has dtype int64"),
    "transposed": (lambda: transpose(x=X > 0), r"conv_transpose2d: x has dtype bool"),
    "resize": (lambda: nn.resize_bilinear(X.astype(complex), (2, 2), True), r"resize_bilinear: x has dtype complex128"),
    "batch_norm": (lambda: batch_norm(var=whole(4)), r"batch_norm: running_var has dtype int64"),
    "group_norm": (lambda: nn.group_norm(X, 2, whole(4), FOUR), r"group_norm: weight has dtype int64"),
    "variance": (lambda: nn.standardize_weight_variance(whole(2, 3)), r"standardize_weight_variance: w has dtype int64"),
    "deviation": (lambda: nn.standardize_weight_deviation(whole(2, 3)), r"standardize_weight_deviation: w has dtype int64"),
    "max_pool2d": (lambda: nn.max_pool2d(whole(1, 1, 4, 4), 2, 2), r"max_pool2d: x has dtype int64"),
    "dropout": (lambda: nn.dropout(X, whole(1, 4, 6, 5), 0.5), r"dropout: mask has dtype int64"),
}


@pytest.mark.parametrize("name", DTYPES)
def test_wrong_dtypes_are_named(name: str) -> None:
    call, message = DTYPES[name]
    with pytest.raises(TypeError, match=message):
        call()


VJPS = {
    "linear": lambda: nn.linear(X, np.ones((2, 5))),
    "layer_norm": lambda: nn.layer_norm(X, np.ones(5), np.ones(5), 1e-6),
    "gelu": lambda: nn.gelu(X),
    "softmax": lambda: nn.softmax(X),
    "relu": lambda: nn.relu(X),
    "matmul": lambda: nn.matmul(X, X.swapaxes(-1, -2)),
    "scaled_dot_product_attention": attention,
    "conv2d": conv2d,
    "conv_transpose2d": transpose,
    "resize_bilinear": lambda: nn.resize_bilinear(X, (3, 3), False),
    "group_norm": lambda: nn.group_norm(X, 2, FOUR, FOUR),
    "standardize_weight_variance": lambda: nn.standardize_weight_variance(W),
    "standardize_weight_deviation": lambda: nn.standardize_weight_deviation(W),
    "max_pool2d": lambda: nn.max_pool2d(X, 2, 2),
    "dropout": lambda: nn.dropout(X, X > 0, 0.5),
}


@pytest.mark.parametrize("name", VJPS)
def test_a_gradient_of_another_shape_or_dtype_is_refused(name: str) -> None:
    y, vjp = VJPS[name]()
    for dy in (y[..., :1], y[None], y.astype(np.float32)):
        with pytest.raises(ValueError, match=f"{name}: dy is"):
            vjp(dy)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_gradient_of_another_shape_is_refused(training: bool) -> None:
    result, vjp = batch_norm(training=training)
    with pytest.raises(ValueError, match="batch_norm: dy is"):
        vjp(nn.BatchNorm(result.y[:, :1], None, None))
