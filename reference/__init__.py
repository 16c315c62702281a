"""DPT in NumPy: every operation a pure function that returns its result and its vector-Jacobian product.

    depth, vjp = reference.apply(params, image, config)      # params: one flat dict of arrays
    dimage, grads = vjp(ddepth)
    depth = reference.forward(params, image, config)         # the same, where no vjp is wanted

Read it in the order of the paper: `embed`, `attention`, `transformer`, `resnet`, `reassemble`, `fusion`, `heads`, `dpt`,
`losses`. The primitives they are made of lie in `reference.nn`.
"""

from .attention import attention_map
from .configs import CONFIGS, MIDAS, Config, configuration
from .dpt import Segmentation, apply, forward
from .implementation import implementation, use
from .inference import segment
from .initialize import initialize, parameter_shapes
from .weights import load, save

__version__ = "0.1.0"

__all__ = [
    "CONFIGS",
    "MIDAS",
    "Config",
    "Segmentation",
    "apply",
    "attention_map",
    "configuration",
    "forward",
    "implementation",
    "initialize",
    "load",
    "parameter_shapes",
    "save",
    "segment",
    "use",
]
