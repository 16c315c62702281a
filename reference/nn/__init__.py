"""The primitives that the paper's operations are made of, each `y, vjp = op(...)` in float32 and float64.

Every function is pure, keeps the dtype of its input, and refuses others, empty arrays and wrong shapes with an error that names
the argument. The NumPy forms are the specification; most have a compiled twin beside them.
"""

from .attention import attention_weights, scaled_dot_product_attention
from .batch_norm import BatchNorm, batch_norm
from .conv2d import conv2d
from .conv_transpose2d import conv_transpose2d
from .differentiable import without_vjps
from .dropout import dropout
from .gelu import gelu
from .group_norm import group_norm
from .grouped_conv2d import grouped_conv2d
from .layer_norm import layer_norm
from .linear import linear
from .matmul import matmul
from .pooling import max_pool2d, same_padding
from .relu import relu
from .relu6 import relu6
from .resize import resize_bilinear
from .softmax import softmax
from .standardize import standardize_weight_deviation, standardize_weight_variance

__all__ = [
    "BatchNorm",
    "attention_weights",
    "batch_norm",
    "conv2d",
    "conv_transpose2d",
    "dropout",
    "gelu",
    "group_norm",
    "grouped_conv2d",
    "layer_norm",
    "linear",
    "matmul",
    "max_pool2d",
    "relu",
    "relu6",
    "resize_bilinear",
    "same_padding",
    "scaled_dot_product_attention",
    "softmax",
    "standardize_weight_deviation",
    "standardize_weight_variance",
    "without_vjps",
]
