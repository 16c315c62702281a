"""Several processes that train one model: who this one is, and what they sum, share and agree on (torchrun starts them).

    torchrun --nproc-per-node 4 -m accelerated.train demo

Each process takes its share of every batch. A loss is divided by what the whole batch holds (images, labelled pixels), so the
processes together take the step that one process would take, up to rounding. The first process alone writes files. One process
started without torchrun is a world of its own, in which nothing here communicates.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class World:
    """The processes of this run. A context manager, which ends their connection."""

    def __init__(self, device: torch.device) -> None:
        """Join the processes that torchrun's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name: gloo on CPUs, NCCL on GPUs."""
        self.device = device
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files and speaks to the person who started it."""
        return self.rank == 0

    def share(self, items: Tensor) -> Tensor:
        """This process's part of `items`, which every process holds: every `size`-th, from its rank on."""
        return items[self.rank :: self.size]

    def joined(self, share: Tensor, count: int) -> Tensor:
        """The inverse of `share`: all `count` items, on the CPU, of which this process holds its part."""
        if self.size == 1:
            return share
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, share)
        whole = share.new_empty(count, *share.shape[1:])
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def sum(self, value: Tensor) -> Tensor:
        """The sum of everybody's `value`, which is replaced by it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def total(self, value: Tensor) -> Tensor:
        """The sum of everybody's `value`, with the gradient of a loss that each computes from it."""
        return all_reduce(value) if self.size > 1 else value

    def largest(self, value: int) -> int:
        """The largest of everybody's `value`."""
        if self.size == 1:
            return value
        each = torch.tensor(value, device=self.device)
        dist.all_reduce(each, dist.ReduceOp.MAX)
        return int(each)

    def from_first(self, value: T) -> T:
        """What the first process holds; the others' `value` is ignored."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, device=self.device)
        return held[0]

    def replicated(self, model: nn.Module) -> nn.Module:
        """`model` as it is to be called in training: its gradients are then the mean of everybody's, its weights the first's."""
        if self.size == 1:
            return model
        # A 1x1 convolution's weight is channels last and first at once, and its gradient may be the other: it is copied.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        return DistributedDataParallel(model)
