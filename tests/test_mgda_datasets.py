"""Several datasets in one step: their gradients one by one, combined, and the same on ranks, replicated or sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from accelerated.dpt import DPT
from accelerated.losses import depth_loss
from accelerated.mgda import DatasetGradients, mgda_backward
from tests.equality import MODEL, assert_same
from tests.models import model_parameters, small
from tests.processes import ended, in_child

DATASETS, IMAGES = 3, 4  # of each dataset, over all ranks


def linear() -> tuple[nn.Linear, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(5, 3).double(), [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]


def losses_of(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return [module(x).pow(k + 1).mean() for k, x in enumerate(inputs)]


@pytest.mark.parametrize("way", ["mgda", "mean"])
def test_gradients_one_by_one_combine_as_those_of_one_graph(way: str) -> None:
    module, inputs = linear()
    if way == "mgda":
        expected_weights = mgda_backward(losses_of(module, inputs), module.parameters())
    else:
        (sum(losses_of(module, inputs)) / 3).backward()
        expected_weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    gradients = DatasetGradients(module.parameters())
    for loss in losses_of(module, inputs):
        loss.backward()
        gradients.take()
        assert all(p.grad is None for p in module.parameters())
    assert len(gradients) == 3
    weights = gradients.combine(way)
    assert len(gradients) == 0
    assert_same(weights.numpy(), expected_weights.numpy())
    for p, g in zip(module.parameters(), expected, strict=True):
        assert_same(p.grad.numpy(), g.numpy())


def test_the_combined_step_makes_no_dataset_worse() -> None:
    module, inputs = linear()
    gradients = DatasetGradients(module.parameters())
    each = []
    for loss in losses_of(module, inputs):
        loss.backward()
        each.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        gradients.take()
    weights = gradients.combine()
    combined = torch.cat([p.grad.flatten() for p in module.parameters()])
    assert_same(combined.numpy(), (weights @ torch.stack(each)).numpy())
    assert all(g @ combined >= combined @ combined * (1 - 1e-9) for g in each)


def test_a_parameter_that_some_datasets_do_not_reach_gets_the_others() -> None:
    shared, own = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    gradients = DatasetGradients([shared, own, frozen])
    (shared * torch.tensor([1.0, 0])).sum().backward()
    gradients.take()
    ((shared * torch.tensor([0, 1.0])).sum() + 3 * own.sum()).backward()
    gradients.take()
    assert_same(gradients.gram().numpy(), torch.tensor([[1.0, 0], [0, 19]], dtype=torch.float64).numpy())
    weights = gradients.combine("mean")
    assert weights.tolist() == [0.5, 0.5]
    assert shared.grad.tolist() == [0.5, 0.5] and own.grad.tolist() == [1.5, 1.5] and frozen.grad is None


def test_what_cannot_be_combined_is_named() -> None:
    module, inputs = linear()
    gradients = DatasetGradients(module.parameters())
    with pytest.raises(ValueError, match="no gradient was taken: expected one dataset at least"):
        gradients.combine()
    with pytest.raises(ValueError, match="dataset 0 has left no gradient in any parameter"):
        gradients.take()
    for k, loss in enumerate(losses_of(module, inputs)):
        (loss * (float("nan") if k == 1 else 1)).backward()
        gradients.take()
    with pytest.raises(ValueError, match="way is 'sum': expected one of mgda, mean"):
        gradients.combine("sum")
    for way in ("mgda", "mean"):
        with pytest.raises(ValueError, match="the gradient of dataset 1 is not finite"):
            gradients.combine(way)
    assert all(p.grad is None for p in module.parameters())
    unused = DatasetGradients([*module.parameters(), nn.Parameter(torch.ones(7))])
    losses_of(module, inputs)[0].backward()
    unused.take()
    with pytest.raises(ValueError, match=r"no dataset's loss depends on parameter 2, of shape \(7,\)"):
        unused.combine()


# ---- ranks ---------------------------------------------------------------------------------------------------------------------


def step(model: nn.Module, ranks: int, rank: int, way: str) -> Tensor:
    """Two steps of a model on this rank's share of every dataset's images; the weights of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    kept = []
    for turn in range(2):
        gradients = DatasetGradients(model.parameters())
        for dataset in range(DATASETS):
            source = torch.Generator().manual_seed(10 * turn + dataset)
            image = torch.randn(IMAGES, 3, 32, 48, dtype=torch.float64, generator=source) * (dataset + 1)
            target = torch.rand(IMAGES, 32, 48, dtype=torch.float64, generator=source) + 0.1
            mask = torch.rand(IMAGES, 32, 48, generator=source) > 0.2
            own = slice(rank, None, ranks)
            depth_loss(model(image[own]), target[own], mask[own]).backward()
            gradients.take()
        kept.append(gradients.combine(way))
        optimizer.step()
    return torch.stack(kept)


def new_model() -> DPT:
    config = small("dpt_base")
    model = DPT(config).double()
    model.load_state_dict({key: torch.tensor(value) for key, value in model_parameters(config, 3).items()})
    return model


def on_ranks(ranks: int, folder: Path, work: Callable[[int], None]) -> None:
    """Run `work(rank)` in as many processes, in one gloo group."""

    def run(rank: int) -> int:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        work(rank)
        dist.destroy_process_group()
        return 0

    children = [in_child(functools.partial(run, rank)) for rank in range(ranks)]
    assert [ended(child) for child in children] == [0] * ranks


def replicated(rank: int, ranks: int, way: str, folder: Path) -> None:
    model = new_model()
    weights = step(nn.parallel.DistributedDataParallel(model), ranks, rank, way)
    torch.save((model.state_dict(), weights), folder / f"{rank}.pt")


def sharded(rank: int, ranks: int, way: str, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = new_model(), init_device_mesh("cpu", (ranks,))
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    weights = step(model, ranks, rank, way)
    torch.save(({key: value.full_tensor() for key, value in model.state_dict().items()}, weights), folder / f"{rank}.pt")


@pytest.mark.parametrize("way", ["mgda", "mean"])
@pytest.mark.parametrize(("ranks", "wrapped"), [(2, replicated), (4, replicated), (2, sharded)])
def test_ranks_take_the_step_of_one_process(ranks: int, wrapped: Callable, way: str, tmp_path: Path) -> None:
    on_ranks(ranks, tmp_path, lambda rank: wrapped(rank, ranks, way, tmp_path))
    model = new_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = step(model, 1, 0, way)
    for rank in range(ranks):
        found, its_weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # Weights answer rounding in the gradients by the condition of their Gram matrix, which is mild here.
        assert_same(its_weights.numpy(), weights.numpy(), MODEL)
        assert found.keys() == before.keys()
        for key, value in model.state_dict().items():
            # Adding a step to a parameter rounds by the parameter's size, which is all that moves one whose gradient is zero.
            moved, size = (value - before[key]).abs().max(), value.abs().max()
            scale = float(10 * moved + 1e-5 * size)
            assert_same((found[key] - before[key]).numpy(), (value - before[key]).numpy(), scale=scale, what=key)
    if way == "mgda":
        assert (weights > 0.01).sum() > 2, "one dataset alone decides: nothing is combined"
