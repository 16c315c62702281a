"""What `benchmarks.kernels` runs: each operation with random data, by its kernels and in PyTorch.

A case is one operation at one size, dtype and layout; its problem is the same with data, which are random: zeros run faster on
some hardware. `plain` of a problem is the operation in PyTorch, a peer of the kernels and, in float64, what they must agree with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import accelerated.alignment
import accelerated.losses
import accelerated.metrics
from accelerated import operators
from accelerated.operators import as_array
from benchmarks.kernel_clocks import Passes
from kernels import alignment, attention, confusion, cross_entropy, fusion, losses, reassemble

IGNORED = 255
SCALE = 1024.0  # of the losses' gradients, as a loss scaler's: float16 would lose them
Make = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Case(NamedTuple):
    """One operation at one size. `rungs`: how many its ladder has for this dtype."""

    operation: str
    size: dict[str, int]
    dtype: str
    rungs: int
    layout: str = ""

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.size.items())
        return " ".join(part for part in (f"{self.operation} ({sizes})", self.dtype, self.layout) if part)

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return getattr(torch, self.dtype).itemsize


@dataclass
class Problem:
    """A case with data. `inputs` are those of `plain`; `dout`, the results' gradients, is empty where no gradient is computed."""

    inputs: tuple[Tensor, ...]
    plain: Callable[..., Any]
    kernel: Callable[[int, Make], Passes]
    dout: tuple[Tensor, ...] = ()
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: float | None = None  # of results and gradients, relative to their norm; None: that of the dtype

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs that get a gradient."""
        return [tensor for tensor in self.inputs if tensor.requires_grad]

    def in_torch(self, function: Callable[..., Any]) -> Passes:
        """The passes of a function of the inputs, its gradients by autograd."""

        def backward(state: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(_as_tuple(state)[: len(self.dout)], self.leaves, self.dout)

        return Passes(lambda: function(*self.inputs), backward if self.dout else None, _as_tuple)

    def exact(self) -> Problem:
        """The same values in float64."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().double() if tensor.is_floating_point() else tensor

        inputs = tuple(wide(tensor).requires_grad_(tensor.requires_grad) for tensor in self.inputs)
        return Problem(inputs, self.plain, self.kernel, tuple(map(wide, self.dout)))


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return tuple(results) if isinstance(results, tuple) else (results,)


class Draw:
    """Random tensors of one device, from one seed."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: str = "float32") -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(getattr(torch, dtype))

    def mask(self, *shape: int) -> Tensor:
        """True at nine tenths of the pixels."""
        return torch.rand(*shape, generator=self.generator, device=self.device) < 0.9

    def ids(self, classes: int, batch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """A map of class ids in squares of 16 x 16 pixels: neighbours mostly are of one class, as in photographs."""
        rows, columns = -(-height // 16), -(-width // 16)
        coarse = torch.randint(0, classes, (batch, rows, columns), generator=self.generator, device=self.device)
        fine = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width]
        return fine.to(dtype).contiguous()

    def labels(self, classes: int, batch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """The same, a tenth of the pixels ignored."""
        ids = self.ids(classes, batch, height, width, dtype)
        return torch.where(self.mask(batch, height, width), ids, torch.tensor(IGNORED, dtype=dtype, device=self.device))


# ---- losses --------------------------------------------------------------------------------------------------------------------


def depth_loss(case: Case, draw: Draw) -> Problem:
    """`kernels.losses` beside `accelerated.losses.depth_loss`."""
    shape = case.size["images"], case.size["side"], case.size["side"]
    target = draw.normal(*shape).abs() + 0.1
    prediction = (2 * target + 0.3 * draw.normal(*shape)).to(getattr(torch, case.dtype)).requires_grad_()
    mask, dloss = draw.mask(*shape), torch.full((), SCALE, device=draw.device)
    arrays, dloss_array = [as_array(tensor) for tensor in (prediction, target, mask)], as_array(dloss.view(1))

    def kernel(rung: int, make: Make) -> Passes:
        def forward() -> Any:
            shapes = losses.saved_shapes(shape)
            tensors = [make(size, torch.int32 if name == "counts" else torch.float32) for name, size in shapes.items()]
            _, saved = losses.depth_loss(*arrays, rung=rung, out=tuple(map(as_array, tensors)))
            return tensors[0].view(()), tensors, saved

        def backward(state: Any) -> tuple[Tensor, ...]:
            gradient = make(shape, prediction.dtype)
            losses.depth_loss_backward(dloss_array, arrays[0], state[2], out=as_array(gradient))
            return (gradient,)

        return Passes(forward, backward, lambda state: state[:1])

    peers = {"operator": lambda *maps: operators.depth_loss(*maps, 0.8, 4, 0.5)[0]}
    # The gradient has signs of differences, and a place where trimming ends: both may fall otherwise at a few pixels in float32.
    return Problem((prediction, target, mask), accelerated.losses.depth_loss, kernel, (dloss,), peers, tolerance=2e-2)


def upsampled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits resized to the labels, in at least float32, as one would write it in PyTorch."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    resized = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(resized, labels.long(), ignore_index=IGNORED)


def cross_entropy_loss(case: Case, draw: Draw) -> Problem:
    """`kernels.cross_entropy`, which does not wait for the GPU here, beside `upsampled_cross_entropy`."""
    batch, classes, side, labelled = (case.size[name] for name in ("images", "classes", "side", "labels"))
    logits = draw.normal(batch, classes, side, side, dtype=case.dtype).requires_grad_()
    labels = draw.labels(classes, batch, labelled, labelled, torch.uint8)
    dloss = torch.full((), SCALE, device=draw.device)
    arrays, dloss_array = (as_array(logits), as_array(labels)), as_array(dloss.view(1))

    def kernel(rung: int, make: Make) -> Passes:
        def forward() -> Any:
            tensors = make((1,), torch.float32), make(tuple(labels.shape), torch.float32), make((3,), torch.float64)
            out = cross_entropy.CrossEntropy(*map(as_array, tensors))
            return tensors[0].view(()), tensors, cross_entropy.cross_entropy(*arrays, rung=rung, out=out, wait=False)

        def backward(state: Any) -> tuple[Tensor, ...]:
            gradient = make(tuple(logits.shape), logits.dtype)
            cross_entropy.cross_entropy_backward(dloss_array, *arrays, state[2], rung=rung, out=as_array(gradient))
            return (gradient,)

        return Passes(forward, backward, lambda state: state[:1])

    peers = {"operator": lambda *inputs: operators.upsampled_cross_entropy(*inputs, IGNORED)[0]}
    return Problem((logits, labels), upsampled_cross_entropy, kernel, (dloss,), peers)


# ---- the network ---------------------------------------------------------------------------------------------------------------


def plain_upsample_add(x: Tensor, skip: Tensor) -> Tensor:
    """x resized to skip, plus skip."""
    return F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True) + skip


def upsample_add(case: Case, draw: Draw) -> Problem:
    """`kernels.fusion` beside `plain_upsample_add`; channels last, PyTorch's maps are (B, C, H, W) in that memory format."""
    last = case.layout == "channels_last"
    batch, channels, side, out_side = (case.size[name] for name in ("images", "channels", "side", "out"))

    def shape(length: int) -> tuple[int, ...]:
        return (batch, length, length, channels) if last else (batch, channels, length, length)

    def seen(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 3, 1, 2) if last else tensor

    maps = [draw.normal(*shape(length), dtype=case.dtype) for length in (side, out_side, out_side)]
    x, skip, dout = map(as_array, maps)

    def kernel(rung: int, make: Make) -> Passes:
        def forward() -> Any:
            out = make(shape(out_side), maps[0].dtype)
            fusion.upsample_add(x, skip, as_array(out), layout=case.layout, rung=rung)
            return (seen(out),)

        def backward(_: Any) -> tuple[Tensor, ...]:
            dx = make(shape(side), maps[0].dtype)
            fusion.upsample_backward(dout, (side, side), as_array(dx), layout=case.layout, rung=rung)
            return (seen(dx),)

        return Passes(forward, backward, _as_tuple)

    inputs = seen(maps[0]).detach().requires_grad_(), seen(maps[1])
    return Problem(inputs, plain_upsample_add, kernel, (seen(maps[2]),), {"operator": operators.upsample_add})


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written out, its weights in memory."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def attention_heads(case: Case, draw: Draw) -> Problem:
    """`kernels.attention` beside attention written out and PyTorch's fused one."""
    size = case.size
    shape = size["images"], size["heads"], size["tokens"], size["depth"]
    q, k, v, dout = (draw.normal(*shape, dtype=case.dtype) for _ in range(4))
    arrays, dout_array = [as_array(tensor) for tensor in (q, k, v)], as_array(dout)

    def kernel(rung: int, make: Make) -> Passes:
        def forward() -> Any:
            out, lse = make(shape, q.dtype), make(shape[:-1], torch.float32)
            attention.attend(*arrays, as_array(out), as_array(lse), rung=rung)
            return out, lse

        def backward(state: Any) -> tuple[Tensor, ...]:
            gradients = tuple(make(shape, q.dtype) for _ in range(3))
            dq, dk, dv = map(as_array, gradients)
            attention.attend_backward(*arrays, *map(as_array, state), dout_array, (dq, dk, dv), rung=rung)
            return gradients

        return Passes(forward, backward, lambda state: state[:1])

    inputs = tuple(tensor.detach().requires_grad_() for tensor in (q, k, v))
    peers = {"operator": lambda *qkv: operators.attention(*qkv)[0], "SDPA": F.scaled_dot_product_attention}
    return Problem(inputs, plain_attention, kernel, (dout,), peers)


def read_project(case: Case, draw: Draw) -> Problem:
    """`kernels.reassemble` beside the same in PyTorch: a contiguous map, or channels last, a view of the tokens."""
    last = case.layout == "channels_last"
    images, side, width = (case.size[name] for name in ("images", "grid", "width"))
    shape = (images, side, side, width) if last else (images, width, side, side)
    tokens, readout = draw.normal(images, side * side, width, dtype=case.dtype), draw.normal(images, width, dtype=case.dtype)
    bias, dout = draw.normal(width, dtype=case.dtype), draw.normal(*shape, dtype=case.dtype)
    arrays, dout_array = [as_array(tensor) for tensor in (tokens, readout, bias)], as_array(dout)

    def seen(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 3, 1, 2) if last else tensor

    def plain(tokens: Tensor, readout: Tensor, bias: Tensor) -> Tensor:
        read = F.gelu(tokens + (readout + bias)[:, None])
        maps = read.transpose(1, 2).unflatten(2, (side, side))
        return maps if last else maps.contiguous()

    def kernel(rung: int, make: Make) -> Passes:
        def forward() -> Any:
            out = make(shape, tokens.dtype)
            reassemble.read_project(*arrays, (side, side), as_array(out), layout=case.layout, rung=rung)
            return (seen(out),)

        def backward(_: Any) -> tuple[Tensor, ...]:
            gradients = tuple(make(tuple(tensor.shape), tokens.dtype) for tensor in (tokens, readout, bias))
            out = reassemble.ReadGradients(*map(as_array, gradients))
            reassemble.read_project_backward(dout_array, *arrays, out, layout=case.layout, rung=rung)
            return gradients

        return Passes(forward, backward, _as_tuple)

    inputs = tuple(tensor.detach().requires_grad_() for tensor in (tokens, readout, bias))
    peers = {} if last else {"operator": lambda *inputs: operators.read_project(*inputs, side, side)}
    return Problem(inputs, plain, kernel, (seen(dout),), peers)


# ---- alignment and metrics -----------------------------------------------------------------------------------------------------


def least_squares(case: Case, draw: Draw) -> Problem:
    """`kernels.alignment` beside `accelerated.alignment.least_squares`."""
    shape = case.size["images"], case.size["side"], case.size["side"]
    dtype = getattr(torch, case.dtype)
    target = (draw.normal(*shape).abs() + 0.1).to(dtype)
    prediction = (2 * target.float() + 0.3 * draw.normal(*shape)).to(dtype)
    inputs = prediction, target, draw.mask(*shape)
    arrays = [as_array(tensor) for tensor in inputs]

    def kernel(rung: int, make: Make) -> Passes:
        def forward() -> Any:
            results = tuple(make(shape[:1], kind) for kind in (torch.float32, torch.float32, torch.bool))
            alignment.least_squares(*arrays, alignment.LeastSquares(*map(as_array, results)), rung=rung)
            return results

        return Passes(forward, None, _as_tuple)

    peers = {"operator": operators.least_squares}
    return Problem(inputs, accelerated.alignment.least_squares, kernel, (), peers, tolerance=1e-4)


def confusion_matrix(case: Case, draw: Draw) -> Problem:
    """`kernels.confusion` beside `accelerated.metrics.confusion`: four fifths of the pixels are predicted right. Both wait."""
    images, side, classes = (case.size[name] for name in ("images", "side", "classes"))
    dtype = getattr(torch, case.dtype)
    label = draw.labels(classes, images, side, side, dtype)
    other = draw.ids(classes, images, side, side, dtype)
    right = (torch.rand(label.shape, generator=draw.generator, device=draw.device) < 0.8) & (label != IGNORED)
    prediction = torch.where(right, label, other)
    arrays = as_array(prediction), as_array(label)

    def kernel(rung: int, make: Make) -> Passes:
        def forward() -> Any:
            counts = make((classes, classes), torch.int64)
            confusion.confusion(*arrays, classes, IGNORED, rung=rung, out=as_array(counts))
            return counts

        return Passes(forward, None, _as_tuple)

    def plain(prediction: Tensor, label: Tensor) -> Tensor:
        return accelerated.metrics.confusion(prediction, label, classes, IGNORED)

    peers = {"operator": lambda *maps: operators.confusion(*maps, classes, IGNORED)}
    return Problem((prediction, label), plain, kernel, (), peers, tolerance=0.0)
