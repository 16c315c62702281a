"""Reassemble (paper section 3.2, equations 1 to 6): tapped tokens become a map again, at the stage's own resolution.

In: tokens (B, P + N, D), N = h * w patches in row-major order after P prefix tokens. Out: (B, D^, h', w'), D^ the fusion width
and (h', w') = (4h, 4w), (2h, 2w), (h, w), (ceil(h/2), ceil(w/2)) for stages 0 to 3. The Hybrid's ResNet taps are maps already:
they only pass through the last convolution, which brings them to the fusion width (authors' code).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from accelerated import operators
from accelerated.configs import Config
from accelerated.kernel_paths import by_kernel


class ReadIgnore(nn.Module):
    """Drop the readout token (equation 3). Tokens (B, P + N, D) to a map (B, D, h, w)."""

    def __init__(self, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return concatenate(tokens[:, self.prefix_tokens :], grid)


class ReadAdd(nn.Module):
    """Add the readout token to every patch token (equation 4); of two prefix tokens, their mean (authors' code)."""

    def __init__(self, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        return concatenate(patches + prefix.mean(dim=1, keepdim=True), grid)


class ReadProject(nn.Linear):
    """GELU(W [t; t0] + b) for every patch token t, t0 the readout token (equation 5). A distillation token is ignored."""

    def __init__(self, prefix_tokens: int, dim: int) -> None:
        super().__init__(2 * dim, dim)
        self.prefix_tokens = prefix_tokens

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        # W [t; t0] = W_left t + W_right t0, and the second product is the same for every patch: once per image is enough.
        left, right = self.weight.split(self.out_features, dim=1)
        patches = F.linear(tokens[:, self.prefix_tokens :], left)
        if by_kernel("read_project", tokens.device.type):
            return operators.read_project(patches, F.linear(tokens[:, 0], right), self.bias, *grid)
        return concatenate(F.gelu(patches + F.linear(tokens[:, :1], right, self.bias)), grid)


class ReassembleTokens(nn.Module):
    """Read, Concatenate and Resample (equations 1 to 6) for a tap of the transformer."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        dim, width = config["embed_dim"], config["reassemble_widths"][stage]
        self.readout = _read(config)
        self.project = nn.Conv2d(dim, width, 1)
        self.resample = _resample(stage, width)
        self.out = nn.Conv2d(width, config["fusion_width"], 3, padding=1, bias=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.out(self.resample(self.project(self.readout(tokens, grid))))


class ReassembleMap(nn.Module):
    """A tap of the ResNet, (B, C, h', w') at the stage's resolution, brought to the fusion width."""

    def __init__(self, config: Config, stage: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(config["resnet_widths"][stage], config["fusion_width"], 3, padding=1, bias=False)

    def forward(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.out(maps)


def reassemble_stages(config: Config) -> nn.ModuleList:
    """One module per tap, finest stage first."""
    stages = enumerate(config["taps"])
    return nn.ModuleList(
        ReassembleMap(config, stage) if isinstance(tap, str) else ReassembleTokens(config, stage) for stage, tap in stages
    )


def concatenate(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens (B, h w, D) as a map (B, D, h, w) (equation 6)."""
    return patches.transpose(1, 2).reshape(patches.shape[0], patches.shape[2], *grid)


def _read(config: Config) -> nn.Module:
    prefix_tokens = config["prefix_tokens"]
    if config["readout"] == "ignore":
        return ReadIgnore(prefix_tokens)
    if config["readout"] == "add":
        return ReadAdd(prefix_tokens)
    return ReadProject(prefix_tokens, config["embed_dim"])


def _resample(stage: int, width: int) -> nn.Module:
    """From the patch grid, stride 16, to stride 4, 8, 16, 32 (Resample_s, equation 6; kernels from the authors' code)."""
    if stage == 0:
        return nn.ConvTranspose2d(width, width, 4, stride=4)
    if stage == 1:
        return nn.ConvTranspose2d(width, width, 2, stride=2)
    if stage == 2:
        return nn.Identity()
    return nn.Conv2d(width, width, 3, stride=2, padding=1)
