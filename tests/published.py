"""The authors' own answers: what their code returned for weights that a formula fixes, so that nobody needs the files.

`tests/fixtures/NAME.npz` holds, for one published model, the key layout of its weight file and samples of the output of the
authors' code when every weight comes from `weight(key, shape)`:

    layout         UTF-8 JSON as bytes, {key: {"shape", "dtype", "formula"}} in the order of the file
    output_HxW     for an input of that size: depth y[::s, ::s], logits y[::10, ::s, ::s], with s = max(1, output width // 32)
    stats_HxW      mean, standard deviation, 2-norm, min, max and share of zeros of the whole output, in float64

An equal computation in float32 agrees with them to a relative 2-norm of 1e-5 or better.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"

# The name of each fixture, and of a file that holds its weights.
MODELS = {
    "dpt-base-depth": "base.pt",
    "dpt-large-depth": "dpt_large-midas-2f21e586.pt",
    "dpt-hybrid-depth": "dpt_hybrid-midas-501f0c75.pt",
    "dpt-hybrid-ade20k": "dpt_hybrid-ade20k-53898607.pt",
    "midas-v21": "midas_v21-f6b98070.pt",
    "midas-v21_small": "midas_v21_small-70d6b9c8.pt",
}


def sizes(name: str) -> list[tuple[int, int]]:
    """The (height, width) of the inputs to which fixture `name` has answers."""
    with np.load(FIXTURES / f"{name}.npz") as fixture:
        found = [key.removeprefix("output_").split("x") for key in fixture.files if key.startswith("output_")]
    return [(int(height), int(width)) for height, width in found]


def layout(name: str) -> dict[str, list[int]]:
    """The keys and shapes of the published file, in its order."""
    with np.load(FIXTURES / f"{name}.npz") as fixture:
        entries = json.loads(bytes(fixture["layout"]))
    return {key: entry["shape"] for key, entry in entries.items()}


def weight(key: str, shape: list[int]) -> np.ndarray:
    """The tensor of `key`: float32, int64 for a count of batches."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    u = np.random.default_rng(zlib.crc32(key.encode())).random(shape) * 2 - 1
    if key.endswith("output_conv.4.weight"):
        w = np.abs(u)  # so that the last ReLU kills nothing
    elif key.endswith("running_mean"):
        w = 0.1 * u
    elif key.endswith("running_var"):
        w = 1 + 0.5 * u
    elif "pos_embed" in key or "token" in key:
        w = 0.5 * u
    elif len(shape) <= 1:
        w = 0.1 * u + key.endswith("weight")
    else:
        w = np.sqrt(3 * shape[0] / np.prod(shape)) * u
    return w.astype(np.float32)


def published_state(name: str) -> dict[str, np.ndarray]:
    """The whole weight file of fixture `name`, in the authors' keys."""
    return {key: weight(key, shape) for key, shape in layout(name).items()}


def published_input(height: int, width: int) -> np.ndarray:
    """The image (1, 3, H, W), float32, already normalised."""
    return (np.random.default_rng(height * 10000 + width).random((1, 3, height, width)) * 2 - 1).astype(np.float32)


def compare(
    name: str,
    function: Callable[[np.ndarray], np.ndarray],
    tolerance: float,
    inputs: list[tuple[int, int]] | None = None,
) -> None:
    """Assert that `function` answers as the authors' code did: image (1, 3, H, W) to depth (1, H, W) or logits (1, K, H, W).

    The samples agree to `tolerance` in relative 2-norm, and the statistics of the whole output to `tolerance` of its scale.
    `inputs` are the sizes compared, by default all.
    """
    for height, width in sizes(name) if inputs is None else inputs:
        with np.load(FIXTURES / f"{name}.npz") as fixture:
            samples, statistics = fixture[f"output_{height}x{width}"], fixture[f"stats_{height}x{width}"]
        output = np.asarray(function(published_input(height, width)))
        assert output.shape[0] == 1, f"{name}: an output of shape {output.shape} for one image"
        assert output.shape[-2:] == (height, width), f"{name}: an output of shape {output.shape} for {height} x {width}"
        step = max(1, width // 32)
        sampled = output[0, ..., ::step, ::step]
        sampled = sampled[::10] if sampled.ndim == 3 else sampled
        assert sampled.shape == samples.shape, f"{name}: samples of shape {sampled.shape}, the authors' {samples.shape}"
        error = float(np.linalg.norm(sampled - samples) / np.linalg.norm(samples))
        assert error <= tolerance, f"{name} at {height} x {width}: relative error {error:.3g}, allowed is {tolerance:.3g}"
        _compare_statistics(f"{name} at {height} x {width}", output.astype(np.float64), statistics, tolerance)


def _compare_statistics(what: str, output: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    mean, deviation, norm, low, high, zeros = expected
    size = np.sqrt(output.size)
    # Where outputs differ by e in relative 2-norm, mean and deviation differ by at most e * norm / sqrt(n), the norm by e * norm.
    assert abs(output.mean() - mean) <= tolerance * norm / size, f"{what}: mean {output.mean()}, the authors' {mean}"
    assert abs(output.std() - deviation) <= tolerance * norm / size, f"{what}: deviation {output.std()}, the authors' {deviation}"
    assert abs(np.linalg.norm(output) - norm) <= tolerance * norm, f"{what}: norm {np.linalg.norm(output)}, the authors' {norm}"
    # An extreme is a single value, whose error is not bounded by the mean one: allow ten times as much, of the whole range.
    room = 10 * tolerance * max(abs(low), abs(high))
    assert abs(output.min() - low) <= room, f"{what}: minimum {output.min()}, the authors' {low}"
    assert abs(output.max() - high) <= room, f"{what}: maximum {output.max()}, the authors' {high}"
    assert abs(float((output == 0).mean()) - zeros) <= 1e-4, f"{what}: {float((output == 0).mean())} zeros, the authors' {zeros}"
