"""Optimisation: torch.optim with the paper's two rates and its schedule (paper, sections 4 and 5.2); `mgda` has the rest.

optimizer = adam(model)                                                      # depth: 1e-5 for the backbone, 1e-4 elsewhere
optimizer = sgd(model); scheduler = polynomial_decay(optimizer, steps)       # segmentation; scheduler.step() after each step
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from accelerated.dpt import DPT


def parameter_groups(model: DPT, backbone_rate: float, decoder_rate: float) -> list[dict[str, Any]]:
    """Return the groups that torch.optim takes, the backbone's parameters first, each with its learning rate."""
    return [
        {"params": list(model.backbone_parameters()), "lr": backbone_rate},
        {"params": list(model.decoder_parameters()), "lr": decoder_rate},
    ]


def adam(model: DPT, backbone_rate: float = 1e-5, decoder_rate: float = 1e-4, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam at the rates of depth training (section 4). The decay is added to the gradient, as an L2 penalty."""
    return torch.optim.Adam(parameter_groups(model, backbone_rate, decoder_rate), weight_decay=weight_decay)


def adamw(model: DPT, backbone_rate: float = 1e-5, decoder_rate: float = 1e-4, weight_decay: float = 1e-2) -> torch.optim.AdamW:
    """AdamW at the rates of depth training: the decay acts on the parameters, past Adam's means."""
    return torch.optim.AdamW(parameter_groups(model, backbone_rate, decoder_rate), weight_decay=weight_decay)


def sgd(
    model: DPT, backbone_rate: float = 2e-3, decoder_rate: float = 2e-3, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.SGD:
    """Gradient descent with momentum at the rate of segmentation training (section 5.2)."""
    groups = parameter_groups(model, backbone_rate, decoder_rate)
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)


def polynomial_factor(step: int, steps: int, power: float = 0.9) -> float:
    """(1 - step / steps)^power: 1 at step 0 and 0 once all `steps` are made. Raises ValueError for a step beyond."""
    if not (steps >= 1 and 0 <= step <= steps):
        raise ValueError(f"polynomial_factor: step is {step} of {steps} steps: expected 0 <= step <= steps, and at least one")
    return (1 - step / steps) ** power


def polynomial_decay(optimizer: torch.optim.Optimizer, steps: int, power: float = 0.9) -> LambdaLR:
    """Return the scheduler that multiplies every group's rate by `polynomial_factor` (section 5.2)."""
    return LambdaLR(optimizer, lambda step: polynomial_factor(step, steps, power))
