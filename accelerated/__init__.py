"""DPT in PyTorch: what one runs. The same concepts and the same parameter keys as `reference`, which says what they mean.

    model = accelerated.create_model("dpt_hybrid", task="segmentation", num_classes=150)
    model = accelerated.load_checkpoint("dpt_large-midas-2f21e586.pt")
    depth = accelerated.Predictor(model)(image)
    params = accelerated.to_numpy(model)

Names are imported when first used, so that a process that only renders scenes or reads configurations never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerated.attention import attention_map, attention_maps
    from accelerated.checkpoints import load_checkpoint, published_file
    from accelerated.checkpoints.huggingface_export import save_huggingface
    from accelerated.configs import CONFIGS, MIDAS, configuration
    from accelerated.dpt import DPT, create_model
    from accelerated.heads import Segmentation
    from accelerated.inference import segment
    from accelerated.kernel_paths import kernel_report, use_kernels
    from accelerated.predictor import Predictor
    from accelerated.weights import load, save, to_numpy

_HOME = {
    "CONFIGS": "configs",
    "MIDAS": "configs",
    "configuration": "configs",
    "DPT": "dpt",
    "create_model": "dpt",
    "Segmentation": "heads",
    "load_checkpoint": "checkpoints",
    "published_file": "checkpoints",
    "save_huggingface": "checkpoints.huggingface_export",
    "Predictor": "predictor",
    "kernel_report": "kernel_paths",
    "use_kernels": "kernel_paths",
    "load": "weights",
    "save": "weights",
    "to_numpy": "weights",
    "segment": "inference",
    "attention_map": "attention",
    "attention_maps": "attention",
}

__all__ = [
    "CONFIGS",
    "DPT",
    "MIDAS",
    "Predictor",
    "Segmentation",
    "attention_map",
    "attention_maps",
    "configuration",
    "create_model",
    "kernel_report",
    "load",
    "load_checkpoint",
    "published_file",
    "save",
    "save_huggingface",
    "segment",
    "to_numpy",
    "use_kernels",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` (PEP 562). Raises ImportError where PyTorch or timm is not installed."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("torch", "timm"):
            raise
        raise ImportError(
            f"accelerated.{name} needs PyTorch and timm, and {missing} is not installed: "
            "install the project with its extra, as in pip install '.[accelerated]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
