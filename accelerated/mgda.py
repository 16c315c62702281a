"""Training on several datasets at once (paper, section 4): one gradient for each, combined into one step.

    gradients = DatasetGradients(model.parameters())
    for batch in batches_of_the_datasets:                # one forward and one backward pass a dataset
        loss(model(batch.image), batch.target).backward()
        gradients.take()
    weights = gradients.combine("mgda")                  # sets .grad; optimizer.step() is next

"mgda" is the shortest vector in the convex hull of the gradients (Sener and Koltun 2018; `min_norm_point`): a step against it
makes no dataset's loss worse, to first order. "mean" is their mean. Works the same where the model is wrapped by
DistributedDataParallel (but not with gradient_as_bucket_view, which writes the next gradient over the last), whose backward pass
has averaged each gradient over the ranks, and by FSDP2, where each rank holds a shard of each. Memory: n gradients at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

WAYS = ("mgda", "mean")
_EPS = torch.finfo(torch.float64).eps


class DatasetGradients:
    """The gradients of several datasets in the same parameters, until they are combined."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._taken: list[list[Tensor | None]] = []

    def __len__(self) -> int:
        return len(self._taken)

    def take(self) -> None:
        """Take what backward passes have left in .grad as the gradient of the next dataset; .grad is then None.

        Raises ValueError where nothing is there.
        """
        found = [parameter.grad for parameter in self.parameters]
        if all(gradient is None for gradient in found):
            raise ValueError(f"dataset {len(self)} has left no gradient in any parameter: expected a backward pass before take()")
        self.add(found)
        for parameter in self.parameters:
            parameter.grad = None

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradient of the next dataset, one tensor a parameter; None where its loss does not depend on it."""
        self._taken.append(list(gradients))

    def gram(self) -> Tensor:
        """The inner products (n, n) of the gradients taken, float64 on the CPU, over all parameters and all their shards.

        A parameter without a gradient counts as 0. Ranks that hold shards must all call it.
        """
        n = len(self)
        sums: dict[tuple[DeviceMesh, int] | None, Tensor] = {}  # by where the shards are that have yet to be added
        for k, parameter in enumerate(self.parameters):
            each = [gradients[k] for gradients in self._taken]
            rows = torch.stack([_local(_or_zero(gradient, parameter)).flatten() for gradient in each]).double()
            where = _shards(parameter)
            products = rows @ rows.T
            sums[where] = sums[where] + products if where in sums else products
        total = torch.zeros(n, n, dtype=torch.float64)
        for where, products in sums.items():
            if where is not None:
                dist.all_reduce(products, group=where[0].get_group(where[1]))
            total += products.cpu()
        return total

    def combine(self, way: str = "mgda") -> Tensor:
        """Set every .grad to the weighted sum of the gradients taken, which are dropped; return the weights (n,), float64.

        Raises ValueError for an unknown way, where nothing was taken, where no dataset's loss depends on a parameter, and where a
        gradient is not finite (before anything is set).
        """
        if way not in WAYS:
            raise ValueError(f"way is {way!r}: expected one of {', '.join(WAYS)}")
        if not self._taken:
            raise ValueError("no gradient was taken: expected one dataset at least")
        for k, parameter in enumerate(self.parameters):
            if all(gradients[k] is None for gradients in self._taken):
                raise ValueError(f"no dataset's loss depends on parameter {k}, of shape {tuple(parameter.shape)}")
        gram = self.gram()
        if not gram.isfinite().all():
            raise ValueError(f"the gradient of dataset {int((~gram.diagonal().isfinite()).nonzero()[0])} is not finite")
        weights = min_norm_point(gram) if way == "mgda" else torch.full((len(self),), 1 / len(self), dtype=torch.float64)
        for k, parameter in enumerate(self.parameters):
            parameter.grad = _weighted([gradients[k] for gradients in self._taken], weights.tolist())
            for gradients in self._taken:
                gradients[k] = None  # its memory serves the next sum
        self._taken = []
        return weights


def _local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shards(parameter: Tensor) -> tuple[DeviceMesh, int] | None:
    """The mesh and its dimension along which a parameter is cut; None where each rank holds all of it.

    Raises ValueError where it is cut along several.
    """
    if not isinstance(parameter, DTensor):
        return None
    cut = [dimension for dimension, placement in enumerate(parameter.placements) if placement.is_shard()]
    if len(cut) > 1:
        raise ValueError(f"a parameter is sharded along {len(cut)} dimensions of its mesh: expected one, as by FSDP2")
    return (parameter.device_mesh, cut[0]) if cut else None


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _weighted(gradients: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    """The weighted sum of those that are there."""
    total = None
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient is None:
            continue
        total = gradient * weight if total is None else total.add_(gradient, alpha=weight)
    assert total is not None
    return total


def mgda_backward(losses: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> Tensor:
    """Set each parameter's .grad to the shortest vector in the hull of the losses' gradients; return its weights (n,).

    The losses are scalars, one a dataset, and may share a graph. It replaces what .grad held: the shortest vector of several
    batches is not the sum of theirs. Errors as in `DatasetGradients.combine`.
    """
    gradients, losses = DatasetGradients(parameters), list(losses)
    for k, loss in enumerate(losses):
        more = k < len(losses) - 1
        gradients.add(torch.autograd.grad(loss, gradients.parameters, retain_graph=more, allow_unused=True))
    return gradients.combine()


def min_norm_point(gram: Tensor) -> Tensor:
    """Return the weights w (n,) >= 0 of sum 1 for which sum w_i g_i, in the convex hull of n gradients g_i, is shortest.

    `gram` (n, n) holds the inner products g_i g_j; the weights are float64, on the CPU, where so small a problem belongs. This is
    the min-norm problem of Sener and Koltun 2018, by Wolfe's algorithm ("Finding the nearest point in a polytope", 1976): keep a
    face of the hull whose plane's shortest point p lies inside it, add the gradient with the smallest product with p, walk
    towards the new plane's shortest point, drop the gradients whose weights reach 0 on the way. |p| falls at each turn, so no
    face returns, and the last is exact up to rounding.

    Raises ValueError unless `gram` is (n, n), n >= 1, finite, symmetric and positive semi-definite, up to rounding.
    """
    n = len(gram)
    gram = gram.detach().to("cpu", torch.float64)
    if gram.shape != (n, n) or n == 0 or not gram.isfinite().all() or (gram - gram.T).max() > 1e-6 * gram.abs().max():
        raise ValueError(f"min_norm_point: gram has shape {tuple(gram.shape)}: expected (n, n), n >= 1, finite and symmetric")
    eigenvalues = torch.linalg.eigvalsh(gram)  # ascending
    if eigenvalues[0] < -1e-6 * eigenvalues[-1]:
        least = float(eigenvalues[0])
        raise ValueError(f"min_norm_point: gram has the eigenvalue {least:.3g}: expected inner products, which have none below 0")
    gram = gram / gram.diagonal().max().clamp(min=torch.finfo(torch.float64).tiny)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[gram.diagonal().argmin()] = 1
    while True:
        products = gram @ weights
        noise = 4 * n * _EPS * (gram.abs() @ weights)  # how far rounding may move each product
        entering = int(products.argmin())
        face = [i for i in range(n) if weights[i] > 0]
        if entering in face or products[entering] >= weights @ products - noise[entering] - weights @ noise:
            return weights
        moved = _walk(gram, weights, [*face, entering])
        if not moved @ gram @ moved < weights @ products:  # only rounding is left to gain
            return weights
        weights = moved


def _walk(gram: Tensor, weights: Tensor, face: list[int]) -> Tensor:
    """Walk from `weights` (n,) to the shortest point of the plane of `face`, dropping each gradient whose weight reaches 0."""
    while True:
        target = torch.zeros_like(weights)
        target[face] = _shortest_on_plane(gram[face][:, face])
        falling = [i for i in face if target[i] <= 0]
        if not falling:
            return target
        reaches = {i: float(weights[i] / (weights[i] - target[i])) for i in falling if weights[i] > target[i]}
        first = min(reaches, key=reaches.__getitem__, default=falling[0])
        weights = (weights + reaches.get(first, 0.0) * (target - weights)).clamp(min=0)
        weights[first] = 0
        face = [i for i in face if i != first]


def _shortest_on_plane(gram: Tensor) -> Tensor:
    """Weights (m,) of sum 1, of any sign, whose combination of m vectors is shortest: it has equal products with all of them.

    Each vector is measured by its own length, so that very long ones beside very short ones cost no digits. None is 0, which
    would be the shortest point of the hull, where the walk begins.
    """
    m, lengths = len(gram), gram.diagonal().sqrt()
    system = gram.new_zeros(m + 1, m + 1)
    system[:m, :m] = gram / lengths.outer(lengths)
    system[m, :m] = system[:m, m] = lengths.min() / lengths
    equal_products = torch.eye(m + 1, dtype=gram.dtype)[m]
    weights = torch.linalg.lstsq(system, equal_products, driver="gelsd").solution[:m] / lengths
    return weights / weights.sum()
