"""The operators where they belong, on a GPU: a whole model, streams, graphs, torch.compile, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import accelerated
from accelerated import kernel_paths, losses
from accelerated.dpt import DPT
from tests.models import small
from tests.test_operators import DPT_OPERATORS, examples

pytestmark = pytest.mark.gpu

DIFFERENTIABLE = ("attention", "read_project", "upsample_add", "depth_loss", "cross_entropy", "least_squares")
RESULTS = {"least_squares": 2}  # that have a gradient; of the others one


def on_gpu(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach().cuda().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments)


def run(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What an operator gives, and the gradients of the sum of that in what asks for one."""
    found = getattr(DPT_OPERATORS, name)(*arguments)
    results = list(found[: RESULTS.get(name, 1)]) if isinstance(found, tuple | list) else [found]
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    gradients = torch.autograd.grad(sum(r.sum() for r in results), leaves) if leaves else ()
    return [r.detach() for r in results] + list(gradients)


def assert_near(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    """A few roundings of each dtype apart, of the largest value: the GPU fuses multiplications with additions."""
    epsilon = 64 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.cpu().double(), b.cpu().double()
        assert (a - b).abs().max() <= epsilon * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(examples(torch.float32)))
def test_operator_on_the_gpu_is_the_emulated_one(name, dtype):
    arguments = examples(dtype)[name]
    assert_near(run(name, on_gpu(arguments)), run(name, arguments), dtype)


@pytest.mark.parametrize("name", sorted(examples(torch.float32)))
def test_operator_passes_opcheck_on_the_gpu(name):
    torch.library.opcheck(getattr(DPT_OPERATORS, name).default, on_gpu(examples(torch.float32)[name]))


def train_step(model: DPT, task: str, image: Tensor, seed: int = 0) -> list[Tensor]:
    """Loss and gradients of a model on its device."""
    rng, shape = np.random.default_rng(seed), (image.shape[0], *image.shape[2:])
    if task == "depth":
        target, mask = torch.tensor(rng.uniform(0.1, 1, shape)), torch.tensor(rng.random(shape) > 0.2)
        loss = losses.depth_loss(model(image), target.to(image), mask.to(image.device))
    else:
        labels = torch.tensor(rng.integers(0, 5, shape))
        loss = losses.segmentation_loss(*model(image), labels.to(image.device))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("task", ["depth", "segmentation"])
@pytest.mark.parametrize("name", ["dpt_base", "dpt_hybrid"])
def test_a_model_through_its_kernels_is_as_near_the_truth_as_torch_is(monkeypatch, name, task):
    """Both in float32 on the GPU, the truth in float64 on the CPU."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = small(name, task) | {"dropout": 0.0}
    image = torch.tensor(np.random.default_rng(1).standard_normal((2, 3, 64, 96)))
    model = DPT(config).double().train()
    truth = train_step(model, task, image)
    model = model.float().cuda()
    image = image.float().cuda()
    with accelerated.use_kernels("none"):
        composed = train_step(model, task, image)
    with accelerated.use_kernels("cuda"):
        found = train_step(model, task, image)
    for ours, theirs, true in zip(found, composed, truth, strict=True):
        error, allowed = (ours.cpu() - true).abs().max(), (theirs.cpu() - true).abs().max()
        assert error <= 4 * allowed + 1e-5 * true.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("name", sorted(examples(torch.float32)))
def test_operator_waits_for_what_its_stream_still_computes(name):
    """The inputs are zeros until the stream, busy for a while, has copied them."""
    arguments = on_gpu(examples(torch.float32)[name])
    expected = run(name, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = tuple(torch.zeros_like(a).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments)
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for a, b in zip(late, arguments, strict=True):
                if isinstance(a, Tensor):
                    a.copy_(b)
        found = run(name, late)
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `function`, which has run before, and what it fills when replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_graph_captures_operators_and_replays_them_on_new_values(name):
    arguments = on_gpu(examples(torch.float32)[name])
    graph, results = captured(lambda: run(name, arguments))
    junk = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(4)]  # where their memory might lie, were it given back
    with torch.no_grad():
        for a in arguments:
            if isinstance(a, Tensor) and a.requires_grad:
                a.mul_(-0.7).add_(0.3)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(name, arguments)
    del junk
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_a_graph_captures_a_whole_training_step(task):
    model = DPT(small("dpt_base", task) | {"dropout": 0.0}).cuda().train()
    image = torch.randn(2, 3, 64, 96, device="cuda")
    rng = np.random.default_rng(0)
    target = torch.tensor(rng.uniform(0.1, 1, (2, 64, 96)), dtype=torch.float32, device="cuda")
    mask = torch.tensor(rng.random((2, 64, 96)) > 0.2, device="cuda")
    labels = torch.tensor(rng.integers(0, 5, (2, 64, 96)), device="cuda")

    def step() -> list[Tensor]:
        output = model(image)
        loss = losses.depth_loss(output, target, mask) if task == "depth" else losses.segmentation_loss(*output, labels)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    with accelerated.use_kernels("cuda"):
        graph, results = captured(step)
        image.normal_()
        graph.replay()
        torch.cuda.synchronize()
        expected = step()
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-7)


def test_a_kernel_that_is_not_loaded_is_refused_within_a_capture():
    from kernels import launch

    arguments = on_gpu(examples(torch.float32)["upsample_add"])
    run("upsample_add", arguments)
    launch._device_kernel.cache_clear()
    words = "is not loaded yet, and this stream is captured: run it once before the capture"
    with pytest.raises(RuntimeError, match=words), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run("upsample_add", arguments)
    torch.cuda.synchronize()
    run("upsample_add", arguments)


@pytest.mark.parametrize("place", ["cuda", "auto"])
def test_a_model_and_its_loss_compile_into_one_graph_on_the_gpu(monkeypatch, place):
    monkeypatch.setattr(kernel_paths, "FASTER", dict.fromkeys(kernel_paths.OPERATIONS, "for this test"))
    model = DPT(small("dpt_base")).cuda().train()
    image = torch.randn(2, 3, 64, 96, device="cuda")
    target, mask = torch.rand(2, 64, 96, device="cuda"), torch.rand(2, 64, 96, device="cuda") > 0.2

    def loss(image: Tensor) -> Tensor:
        return losses.depth_loss(model(image), target, mask)

    torch._dynamo.reset()
    with accelerated.use_kernels(place):
        eager, compiled = loss(image), torch.compile(loss, fullgraph=True)(image)
        ours, theirs = (torch.autograd.grad(value, list(model.parameters())) for value in (compiled, eager))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", sorted(examples(torch.float32)))
def test_all_memory_is_torchs(name):
    import cupy

    pool = cupy.get_default_memory_pool()
    before = pool.total_bytes()
    run(name, on_gpu(examples(torch.float32)[name]))
    assert pool.total_bytes() == before


def test_half_of_a_gpu_and_half_of_a_cpu_is_refused():
    q = torch.zeros(1, 2, 9, 8)
    with pytest.raises((ValueError, RuntimeError), match="k is on the host and q on GPU 0|same device"):
        DPT_OPERATORS.attention(q.cuda(), q, q)
