"""The kernels as torch operators: a whole DPT through all of them, opcheck, gradients, torch.compile, autocast, the switch."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import accelerated
import kernels.alignment
import kernels.attention
import kernels.confusion
import kernels.cross_entropy
import kernels.fusion
import kernels.losses
import kernels.reassemble
import reference
import reference.losses as plain_losses
from accelerated import alignment, kernel_paths, losses, metrics
from accelerated.dpt import DPT
from accelerated.operators import arrays
from tests.equality import MODEL, assert_same, assert_same_dict
from tests.models import model_parameters, small, torch_vjp

DPT_OPERATORS = torch.ops.dpt
KERNELS = {
    kernels.attention: ("attend", "attend_backward"),
    kernels.reassemble: ("read_project", "read_project_backward"),
    kernels.fusion: ("upsample_add", "upsample_backward"),
    kernels.losses: ("depth_loss", "depth_loss_backward"),
    kernels.cross_entropy: ("cross_entropy", "cross_entropy_backward"),
    kernels.alignment: ("least_squares",),
    kernels.confusion: ("confusion",),
}
FORWARD = {"attend", "read_project", "upsample_add"}
NETWORK = FORWARD | {"attend_backward", "read_project_backward", "upsample_backward"}


@contextlib.contextmanager
def watched() -> Iterator[set[str]]:
    """The names of the kernels' functions that are called within the block."""
    called: set[str] = set()

    def watch(module: Any, name: str) -> Callable:
        function = getattr(module, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            called.add(name)
            return function(*arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, watch(module, name))
        yield called


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


def marks(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.3


# ---- a whole model -------------------------------------------------------------------------------------------------------------


def train_step(config: dict[str, Any], params: dict, image: np.ndarray, loss: Callable) -> tuple[float, np.ndarray, dict]:
    """The loss, its gradient in the image, and in every parameter, in torch."""
    model = DPT(config).double().train(config["task"] == "segmentation")
    (value,), vjp = torch_vjp(model, params, [image], lambda call, x: loss(call(x)))
    (dimage,), grads = vjp([np.ones(())])
    return float(value), dimage, grads


@pytest.mark.parametrize("alignment_by", ["median", "least_squares"])
@pytest.mark.parametrize("size", [(32, 48), (48, 80)], ids=str)
def test_dpt_and_depth_loss_through_every_kernel_equal_the_reference(size, alignment_by):
    config, rng = reference.configuration("dpt_tiny"), np.random.default_rng(0)
    params = model_parameters(config, 0)
    image, target = rng.standard_normal((2, 3, *size)), rng.uniform(0.1, 1, (2, *size))
    mask = rng.random((2, *size)) > 0.2
    with accelerated.use_kernels("host"), watched() as called:
        value, dimage, grads = train_step(
            config, params, image, lambda y: losses.depth_loss(y, torch.tensor(target), torch.tensor(mask), alignment_by)
        )
    of_loss = {"depth_loss", "depth_loss_backward"} if alignment_by == "median" else {"least_squares"}
    assert called == NETWORK | of_loss

    depth, vjp = reference.apply(params, image, config)
    expected, loss_vjp = plain_losses.depth_loss(depth, target, mask, alignment=alignment_by)
    ddepth = loss_vjp(1.0)
    dimage_expected, expected_grads = vjp(ddepth)
    assert_same(np.float64(value), np.float64(expected), MODEL, what="loss")
    assert_same(dimage, dimage_expected, MODEL, what="gradient of the image")
    # A shift changes nothing: the last bias has gradient zero, but for the rounding of what cancels.
    key = "head.conv3.bias"
    assert_same(grads.pop(key), expected_grads.pop(key), MODEL, scale=float(np.abs(ddepth).sum()), what=key)
    assert_same_dict(grads, expected_grads, MODEL)


@pytest.mark.parametrize("training", [True, False])
def test_dpt_and_segmentation_loss_through_every_kernel_equal_the_reference(training):
    config, rng = reference.configuration("dpt_tiny", "segmentation", num_classes=7) | {"dropout": 0.0}, np.random.default_rng(1)
    params = model_parameters(config, 1)
    image, labels = rng.standard_normal((2, 3, 48, 32)), rng.integers(0, 7, (2, 48, 32))
    labels[0, :9], labels[1, 20:, 3] = 255, 255
    model = DPT(config).double().train(training)
    with accelerated.use_kernels("host"), watched() as called:
        (value,), torch_pull = torch_vjp(
            model, params, [image], lambda call, x: losses.segmentation_loss(*call(x), torch.tensor(labels))
        )
        (dimage,), grads = torch_pull([np.ones(())])
    assert called == NETWORK | {"cross_entropy", "cross_entropy_backward"}

    output, vjp = reference.apply(params, image, config, training=training)
    expected, loss_vjp = plain_losses.segmentation_loss(*output, labels)
    dimage_expected, expected_grads = vjp(reference.Segmentation(*loss_vjp(1.0)))
    assert_same(np.float64(value), np.float64(expected), MODEL, what="loss")
    assert_same(dimage, dimage_expected, MODEL, what="gradient of the image")
    assert_same_dict(grads, expected_grads, MODEL)


def test_metrics_and_alignment_through_kernels_are_torchs():
    prediction, target, mask = drawn(0, 2, 9, 11), drawn(1, 2, 9, 11), marks(2, 2, 9, 11)
    guess, truth = torch.randint(0, 5, (2, 9, 11), dtype=torch.int16), torch.randint(0, 5, (2, 9, 11), dtype=torch.int8)
    composed = *alignment.least_squares(prediction, target, mask), metrics.confusion(guess, truth, 5)
    with accelerated.use_kernels("host"), watched() as called:
        found = *alignment.least_squares(prediction, target, mask), metrics.confusion(guess, truth, 5)
        with pytest.raises(ValueError, match="^the label holds 9: expected a class from 0 to 4$"):
            metrics.confusion(guess, truth.clone().fill_(9), 5)
    assert called == {"least_squares", "confusion"}
    for ours, theirs in zip(found, composed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_singular_alignment_has_no_gradient():
    """One image is constant, one has no valid pixel, one is neither."""
    prediction, target, mask = drawn(0, 3, 5, 6), drawn(1, 3, 5, 6), marks(2, 3, 5, 6)
    prediction[0], mask[1] = 2.5, False
    gradients = []
    for place in ("none", "host"):
        leaf = prediction.clone().requires_grad_()
        with accelerated.use_kernels(place):
            scale, shift, _ = alignment.least_squares(leaf, target, mask)
        gradients += torch.autograd.grad((2 * scale - shift).sum(), leaf)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)
    assert not gradients[1][:2].any() and gradients[1][2].any()


@pytest.mark.parametrize("readout", ["ignore", "add", "project"])
@pytest.mark.parametrize("name", ["dpt_base", "dpt_hybrid"])
def test_every_kind_of_dpt_runs_through_its_kernels(name, readout):
    config = small(name, readout=readout)
    model = DPT(config).double().eval()
    image = drawn(0, 1, 3, 32, 48)
    expected = model(image)
    with accelerated.use_kernels("host"), watched() as called:
        torch.testing.assert_close(model(image), expected, rtol=1e-9, atol=1e-12)
    assert called == FORWARD - ({"read_project"} if readout != "project" else set())


def test_a_mask_is_left_to_torch():
    """No DPT has one, and the kernel has none."""
    attention = DPT(small("dpt_base")).double().eval().backbone.blocks[0].attn
    tokens, mask = drawn(0, 1, 5, 16), torch.eye(5, dtype=torch.bool)
    expected = attention(tokens, attn_mask=mask)
    assert not torch.allclose(expected, attention(tokens))
    with accelerated.use_kernels("host"), watched() as called:
        assert torch.equal(attention(tokens, attn_mask=mask), expected)
    assert not called


# ---- each operator -------------------------------------------------------------------------------------------------------------


def examples(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator; what takes a gradient asks for one."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.randint(0, 3, (2, 9, 11), generator=torch.Generator().manual_seed(5))
    labels[0, 0, :4] = 255
    maps = drawn(0, 2, 9, 11, dtype=dtype, grad=True)
    return {
        "attention": tuple(drawn(k, 1, 2, 9, 8, dtype=dtype, grad=True) for k in range(3)),
        "read_project": (
            drawn(0, 2, 20, 8, dtype=dtype, grad=True),
            drawn(1, 2, 8, dtype=dtype, grad=True),
            drawn(2, 8, dtype=dtype, grad=True),
            4,
            5,
        ),
        "upsample_add": (drawn(0, 2, 3, 4, 5, dtype=dtype, grad=True), drawn(1, 2, 3, 7, 9, dtype=dtype, grad=True)),
        # All pixels valid: the residual of others is NaN, which opcheck takes for a difference.
        "depth_loss": (maps, drawn(1, 2, 9, 11, dtype=wide), torch.ones(2, 9, 11, dtype=torch.bool), 0.8, 4, 0.5),
        "cross_entropy": (drawn(0, 2, 3, 4, 5, dtype=dtype, grad=True), labels, 255),
        "least_squares": (maps, drawn(1, 2, 9, 11, dtype=dtype), marks(2, 2, 9, 11)),
        "confusion": (labels, labels.to(torch.uint8), 3, 255),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(examples(torch.float64)))
def test_operator_passes_opcheck(name, dtype, torch_threads):
    torch.library.opcheck(getattr(DPT_OPERATORS, name).default, examples(dtype)[name])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_upsample_add_keeps_the_memory_format_of_the_skip(layout, torch_threads):
    x, skip = drawn(0, 2, 8, 4, 5, grad=True), drawn(1, 2, 8, 7, 9).to(memory_format=layout)
    torch.library.opcheck(DPT_OPERATORS.upsample_add.default, (x, skip))
    out = DPT_OPERATORS.upsample_add(x, skip)
    assert out.is_contiguous(memory_format=layout)
    expected = torch.nn.functional.interpolate(x, size=(7, 9), mode="bilinear", align_corners=True) + skip
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    dout = drawn(2, 2, 8, 7, 9).to(memory_format=layout)
    for ours, theirs in zip(torch.autograd.grad(out, x, dout), torch.autograd.grad(expected, x, dout), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


SMALL = {
    "attention": tuple(drawn(k, 1, 1, 4, 3, grad=True) for k in range(3)),
    "depth_loss": (drawn(0, 1, 4, 5, grad=True), drawn(1, 1, 4, 5), marks(2, 1, 4, 5), 0.8, 2, 0.7),
    "least_squares": (drawn(0, 2, 3, 4, grad=True), drawn(1, 2, 3, 4), marks(2, 2, 3, 4)),
}


@pytest.mark.parametrize("name", ["attention", "read_project", "upsample_add", "depth_loss", "cross_entropy", "least_squares"])
def test_operator_has_the_gradient_of_finite_differences(name):
    arguments = SMALL.get(name) or examples(torch.float64)[name]
    operator = getattr(DPT_OPERATORS, name)
    results = {"least_squares": 2}.get(name, 1)

    def differentiable(*given: Any) -> Any:
        found = operator(*given)
        return found[:results] if isinstance(found, tuple | list) else found

    assert torch.autograd.gradcheck(differentiable, arguments, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "depth_loss", "cross_entropy", "least_squares"])
def test_what_an_operator_keeps_for_its_gradient_has_none(name):
    results = getattr(DPT_OPERATORS, name)(*examples(torch.float64)[name])
    differentiable = {"least_squares": 2}.get(name, 1)
    assert [result.requires_grad for result in results] == [k < differentiable for k in range(len(results))]


def test_least_squares_takes_a_mask_of_bytes():
    prediction, target, mask = drawn(0, 2, 3, 4, grad=True), drawn(1, 2, 3, 4), marks(2, 2, 3, 4)
    gradients = []
    for given in (mask, mask.to(torch.uint8) * 7):
        scale, shift, _ = DPT_OPERATORS.least_squares(prediction, target, given)
        gradients += torch.autograd.grad((scale + shift).sum(), prediction)
    assert torch.equal(*gradients)


def test_operators_take_tensors_that_are_not_contiguous():
    q = drawn(0, 2, 9, 3, 8).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(DPT_OPERATORS.attention(q, q, q)[0], expected, rtol=1e-10, atol=1e-12)


def test_operators_refuse_in_the_kernels_words():
    with pytest.raises(ValueError, match=r"v has shape \(1, 2, 8, 8\) and k \(1, 2, 9, 8\), expected the same"):
        DPT_OPERATORS.attention(drawn(0, 1, 2, 9, 8), drawn(0, 1, 2, 9, 8), drawn(0, 1, 2, 8, 8))
    with pytest.raises(ValueError, match="q has shape .* which is empty"):
        DPT_OPERATORS.attention(*(drawn(0, 1, 2, 0, 8) for _ in range(3)))
    with pytest.raises(TypeError, match="the tensor has dtype torch.complex64, expected one of torch.float64"):
        DPT_OPERATORS.attention(*(torch.zeros(1, 2, 9, 8, dtype=torch.complex64) for _ in range(3)))
    with pytest.raises(ValueError, match=r"the tensor has strides \(1, 4\) for shape \(4, 3\), expected a contiguous one"):
        arrays.as_array(torch.zeros(3, 4).t())
    with pytest.raises(ValueError, match="the tensor is on meta, expected the CPU or a CUDA device"):
        arrays.as_array(torch.zeros(3, device="meta"))


@pytest.mark.parametrize("dtype", list(arrays._NUMPY), ids=str)
def test_an_array_shares_the_tensors_memory(dtype):
    tensor = torch.zeros(2, 3, dtype=dtype)
    array = arrays.as_array(tensor)
    array[1, 2] = 1
    assert array.dtype == arrays._NUMPY[dtype] and array.shape == (2, 3)
    assert tensor[1, 2] == 1 and tensor.count_nonzero() == 1


def test_a_label_that_is_no_class_makes_the_operators_loss_nan_and_ours_names_it():
    logits, labels = drawn(0, 1, 3, 4, 4, grad=True), torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, 3, 3] = 7
    loss = DPT_OPERATORS.cross_entropy(logits, labels, 255)[0]
    assert loss.isnan() and torch.autograd.grad(loss, logits)[0].isnan().all()
    with accelerated.use_kernels("host"), pytest.raises(ValueError, match="labels hold 7: expected a class from 0 to 2"):
        losses.segmentation_loss(logits, None, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_type_have_the_same_loss(dtype):
    logits, labels = drawn(0, 2, 3, 4, 4), torch.randint(-1, 3, (2, 7, 9), generator=torch.Generator().manual_seed(0))
    ignored = 127
    labels = torch.where(labels < 0, ignored, labels).to(dtype)
    composed = losses.segmentation_loss(logits, None, labels, ignore_index=ignored)
    with accelerated.use_kernels("host"), watched() as called:
        found = losses.segmentation_loss(logits, None, labels, ignore_index=ignored)
    assert called == {"cross_entropy"}
    torch.testing.assert_close(found, composed, rtol=1e-10, atol=0)


@pytest.mark.parametrize("place", ["none", "host"])
@pytest.mark.parametrize("scales", [-1, 28])
def test_both_ways_refuse_scales_that_no_image_has(place, scales):
    maps = drawn(0, 1, 4, 4), drawn(1, 1, 4, 4), marks(2, 1, 4, 4)
    with (
        accelerated.use_kernels(place),
        pytest.raises(ValueError, match=f"scales={scales}: expected a whole number from 0 to 27"),
    ):
        losses.depth_loss(*maps, scales=scales)


# ---- autocast ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_operators_under_autocast_have_the_dtypes_of_what_they_replace(narrow):
    given = examples(torch.float32)
    with torch.autocast("cpu", dtype=narrow):
        assert DPT_OPERATORS.attention(*given["attention"])[0].dtype == narrow
        assert DPT_OPERATORS.read_project(*given["read_project"]).dtype == narrow
        x, skip = given["upsample_add"]
        assert DPT_OPERATORS.upsample_add(x.to(narrow), skip).dtype == torch.float32
        assert DPT_OPERATORS.upsample_add(x.to(narrow), skip.to(narrow)).dtype == narrow
        for name in ("depth_loss", "cross_entropy", "least_squares"):
            assert getattr(DPT_OPERATORS, name)(*given[name])[0].dtype == torch.float32
        q = drawn(0, 1, 2, 9, 8)
        assert DPT_OPERATORS.attention(q, q, q)[0].dtype == torch.float64


def test_a_model_under_autocast_is_near_the_same_without_kernels():
    """Both round to bfloat16 on the way, 2^-9 each time: what they return differs by no more than either from float32."""
    model = DPT(small("dpt_base")).eval()
    image = drawn(0, 1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            composed = model(image)
            with accelerated.use_kernels("host"):
                found = model(image)
    assert (found - composed).abs().max() <= 2 * max((found - exact).abs().max(), (composed - exact).abs().max())
    assert (found - exact).abs().max() <= 0.05 * exact.abs().max()


# ---- compiled ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_model_and_loss_compile_into_one_graph(task):
    """`fullgraph` refuses any break; the backend traces forward and backward through the operators' fakes."""
    config = small("dpt_base", task)
    config["dropout"] = 0.0
    model = DPT(config).double().train()
    image = drawn(0, 2, 3, 32, 48)
    target, mask = drawn(1, 2, 32, 48).abs(), marks(2, 2, 32, 48)
    labels = torch.randint(0, 5, (2, 32, 48))

    def loss(image: Tensor) -> Tensor:
        output = model(image)
        return losses.depth_loss(output, target, mask) if task == "depth" else losses.segmentation_loss(*output, labels)

    def gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        value = function(image)
        return [value, *torch.autograd.grad(value, list(model.parameters()))]

    torch._dynamo.reset()
    with accelerated.use_kernels("host"):
        eager = gradients(loss)
        with watched() as called:
            compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    assert len(called) == 8
    for ours, theirs in zip(compiled, eager, strict=True):
        assert_same(ours.detach().numpy(), theirs.detach().numpy(), scale=float(theirs.detach().abs().max()) + 1e-3)


def test_a_compiled_model_follows_the_switch():
    model = DPT(small("dpt_base")).double().eval()
    compiled, image = torch.compile(model, fullgraph=True, backend="aot_eager"), drawn(0, 1, 3, 32, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        for place, expected in (("auto", set()), ("host", FORWARD), ("none", set())):
            with accelerated.use_kernels(place), watched() as called:
                compiled(image)
            assert called == expected


# ---- the switch ----------------------------------------------------------------------------------------------------------------


def test_the_switch_ends_with_its_block_also_by_an_error():
    def taken() -> bool:
        return kernel_paths.by_kernel("attention", "cpu")

    assert not taken()
    with accelerated.use_kernels("host"):
        assert taken() and not kernel_paths.by_kernel("attention", "cuda")
        with accelerated.use_kernels("none"):
            assert not taken()
        assert taken()
    with pytest.raises(KeyError), accelerated.use_kernels("host"):
        raise KeyError
    assert not taken()


def test_the_switch_names_what_it_does_not_know():
    with (
        pytest.raises(ValueError, match="^place is 'gpu': expected one of auto, host, cuda, none$"),
        accelerated.use_kernels("gpu"),
    ):
        pytest.fail("entered")


def test_without_cupy_or_a_gpu_all_is_left_to_torch_and_asking_for_kernels_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel_paths, "HAS_CUPY", True)
    with pytest.raises(RuntimeError, match="kernels on a GPU need a CUDA device, and torch"), accelerated.use_kernels("cuda"):
        pytest.fail("entered")
    monkeypatch.setattr(kernel_paths, "FASTER", {"attention": "1.5 times torch"})
    assert kernel_paths.by_kernel("attention", "cuda") and not kernel_paths.by_kernel("attention", "cpu")
    monkeypatch.setattr(kernel_paths, "HAS_CUPY", False)
    assert not kernel_paths.by_kernel("attention", "cuda")
    assert "CuPy is not installed" in str(accelerated.kernel_report())
    with pytest.raises(ImportError, match="kernels on a GPU need CuPy, which is not installed"), accelerated.use_kernels("cuda"):
        pytest.fail("entered")


def test_the_report_says_what_is_taken_and_why(monkeypatch):
    monkeypatch.setattr(kernel_paths, "HAS_CUPY", True)
    report = accelerated.kernel_report()
    assert [path.operation for path in report if path.device == "cpu"] == list(kernel_paths.OPERATIONS)
    assert {path.by for path in report if path.device == "cpu"} == {"torch"}
    monkeypatch.setattr(kernel_paths, "FASTER", {"depth_loss": "6.1 times torch on a card"})
    faster = [path for path in accelerated.kernel_report() if path.by == "kernel"]
    assert faster == [("depth_loss", "cuda", "kernel", "6.1 times torch on a card")]
    with accelerated.use_kernels("host"):
        report = accelerated.kernel_report()
    assert {path.by for path in report if path.device == "cpu"} == {"kernel"}
    assert str(report).splitlines()[0].split() == ["operation", "device", "by", "because"]
    assert len(str(report).splitlines()) == 1 + 2 * len(kernel_paths.OPERATIONS)


def test_every_operation_of_the_report_is_one_that_the_switch_reaches():
    """A name in the table that nothing asks about, or asked about and missing there, would be a report of nothing."""
    asked = set()
    for path in Path(accelerated.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "by_kernel":
                asked.update(a.value for a in node.args if isinstance(a, ast.Constant))
    assert asked == set(kernel_paths.OPERATIONS)
