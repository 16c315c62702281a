"""Small models for the tests: configurations drawn by hypothesis, parameters without a zero, and both forms of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import accelerated
import reference
from reference.parameters import BUFFERS
from tests.equality import MODEL, assert_same, assert_same_dict

SMALL = {
    "image_size": 32,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "mlp_dim": 24,
    "fusion_width": 8,
}
SMALL_RESNET = {"resnet_stem_width": 8, "resnet_layers": [1, 1, 2], "resnet_widths": [32, 64, 96], "resnet_groups": 4}


def small(name: str, task: str = "depth", readout: str = "project", grid: int = 2, **overrides: Any) -> dict[str, Any]:
    """The configuration `name` at reduced depth and width."""
    config = reference.configuration(name, task, readout=readout, num_classes=5 if task == "segmentation" else None)
    hybrid = config["embedding"] == "resnet"
    config |= SMALL | {"image_size": 16 * grid}
    config |= SMALL_RESNET if hybrid else {}
    config["taps"] = ["R0", "R1", 1, 3] if hybrid else [0, 1, 2, 3]
    config["reassemble_widths"] = [32, 64, 12, 10] if hybrid else [6, 8, 12, 10]
    if task == "depth":
        config["head_widths"] = [6, 4]
    return config | overrides


@st.composite
def configs(draw: st.DrawFn, task: str = "depth") -> dict[str, Any]:
    """Every embedding, readout, number of prefix tokens, set of taps and weight standardisation, at small sizes."""
    name = draw(st.sampled_from(sorted(reference.CONFIGS)))
    config = small(name, task, draw(st.sampled_from(["ignore", "add", "project"])), grid=draw(st.integers(1, 3)))
    config["num_heads"] = draw(st.sampled_from([1, 2, 4]))
    config["layer_norm_eps"] = draw(st.sampled_from([1e-6, 1e-12, 1e-3]))
    if config["embedding"] == "resnet":
        config["weight_standardization"] = draw(st.sampled_from(["variance", "deviation"]))
        config["taps"] = draw(st.sampled_from([["R0", "R1", 1, 3], ["R0", "R1", 0, 2], [0, 1, 2, 3]]))
    else:
        config["taps"] = draw(st.sampled_from([[0, 1, 2, 3], [0, 1, 2, 4]]))
        config["depth"] = 5
    return config


def grids(least: int = 1, most: int = 3) -> st.SearchStrategy[tuple[int, int]]:
    """Patch grids (h, w), square and not, odd and even."""
    return st.tuples(st.integers(least, most), st.integers(least, most))


def random_parameters(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Float64 parameters of which none is zero or one, so that no test passes because a term vanished."""
    params = {}
    for key, shape in shapes.items():
        noise = rng.uniform(-1, 1, shape)
        if key.endswith("running_var"):
            params[key] = 1 + 0.5 * noise
        elif len(shape) == 1:
            is_norm = key.endswith(".weight")
            params[key] = 0.3 * noise + (1 if is_norm else 0)
        elif key.endswith(("pos_embed", "token")):
            params[key] = 0.5 * noise
        else:
            params[key] = noise * math.sqrt(3 / math.prod(shape[1:]))
    if "head.conv3.weight" in params:  # keep the final ReLU open
        params["head.conv3.weight"] = np.abs(params["head.conv3.weight"])
        params["head.conv3.bias"] = np.full(1, 0.2)
    return params


def model_parameters(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    return random_parameters(reference.parameter_shapes(config), np.random.default_rng(seed))


def part(params: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The parameters below `prefix`, keyed as the torch module of that name keys its own."""
    return {key.removeprefix(f"{prefix}."): value for key, value in params.items() if key.startswith(f"{prefix}.")}


def torch_vjp(
    module: torch.nn.Module, params: dict[str, np.ndarray], inputs: list[np.ndarray], call: Callable | None = None
) -> tuple[Any, Callable]:
    """Run a torch module on NumPy arrays: its outputs (a list of arrays), and `vjp(doutputs) -> (dinputs, grads)`."""
    tensors = {key: torch.tensor(value, requires_grad=key.rpartition(".")[2] not in BUFFERS) for key, value in params.items()}
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    module = module.to(leaves[0].dtype)
    if call is None:
        outputs = torch.func.functional_call(module, tensors, tuple(leaves), strict=True)
    else:
        outputs = call(lambda *args: torch.func.functional_call(module, tensors, args, strict=True), *leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y is not None]

    def vjp(doutputs: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        wanted = [*leaves, *(t for t in tensors.values() if t.requires_grad)]
        grads = torch.autograd.grad(outputs, wanted, [torch.tensor(dy) for dy in doutputs], allow_unused=True)
        arrays = [(torch.zeros_like(w) if g is None else g).numpy() for w, g in zip(wanted, grads, strict=True)]
        keys = [key for key, t in tensors.items() if t.requires_grad]
        return arrays[: len(leaves)], dict(zip(keys, arrays[len(leaves) :], strict=True))

    return [y.detach().numpy() for y in outputs], vjp


def assert_same_operation(
    operation: tuple[Any, Callable],
    module: torch.nn.Module,
    params: dict[str, np.ndarray],
    prefix: str,
    inputs: list[np.ndarray],
    rng: np.random.Generator,
    call: Callable | None = None,
    rtol: float = MODEL,
) -> None:
    """Compare `y, vjp = operation` of the reference with a torch module: outputs, input gradients, parameter gradients.

    `vjp(dy)` returns the input gradients and then the dict. `prefix` is what the reference's keys have before the module's.
    """
    y, vjp = operation
    ys = list(y) if isinstance(y, list | tuple) else [y]
    expected, expected_vjp = torch_vjp(module, part(params, prefix) if prefix else params, inputs, call)
    assert len(ys) == len(expected), f"{len(ys)} outputs, expected {len(expected)}"
    for i, (a, b) in enumerate(zip(ys, expected, strict=True)):
        assert_same(a, b, rtol, what=f"output {i}")
    dys = [rng.standard_normal(a.shape) for a in ys]
    *dxs, grads = vjp(dys if isinstance(y, list | tuple) else dys[0])
    expected_dxs, expected_grads = expected_vjp(dys)
    for i, (a, b) in enumerate(zip(dxs, expected_dxs, strict=True)):
        assert_same(a, b, rtol, what=f"gradient of input {i}")
    dotted = f"{prefix}." if prefix else ""
    assert_same_dict(grads, {dotted + key: g for key, g in expected_grads.items()}, rtol)


def run_accelerated(model: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """The model as a function of an image (B, 3, H, W): depth or logits."""

    def function(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            output = model(torch.from_numpy(image))
        return (output if isinstance(output, torch.Tensor) else output.logits).numpy()

    return function


def run_reference(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The same function, computed by the reference with the model's parameters."""
    params = accelerated.to_numpy(model)

    def function(image: np.ndarray) -> np.ndarray:
        output = reference.apply(params, image, model.config)[0]
        return output if isinstance(output, np.ndarray) else output.logits

    return function
