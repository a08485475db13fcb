"""Ranks and collectives; every function also works in a single process without a process group.

The convention of the whole package: every rank computes a loss, DDP averages gradients over ranks, so the
objective is the mean of the ranks' losses. The collectives with a gradient (`gather_with_grad`,
`all_reduce_sum_with_grad`) sum gradients over ranks in their backward pass, which together with DDP's mean gives
exactly the gradient of one process that holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor


def is_launched() -> bool:
    """Whether a process group exists."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def world_size() -> int:
    """Number of ranks; 1 when unlaunched."""
    return torch_dist.get_world_size() if is_launched() else 1


def rank() -> int:
    """This process's rank in [0, world_size)."""
    return torch_dist.get_rank() if is_launched() else 0


def barrier() -> None:
    """Wait for every rank."""
    if is_launched():
        torch_dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank. For small Python objects at start-up, never per step."""
    if world_size() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order. For small Python objects at start-up, never per step."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


@contextmanager
def shared_errors() -> Iterator[None]:
    """Raise an error of one rank on every rank, so that none waits for another in a collective.

    Every rank must enter the block, which must contain no collective.
    """
    local = None
    try:
        yield
    except Exception as error:
        local = error
    for failure in [local, *gather_objects(local)]:
        if failure is not None:
            raise failure


@torch.no_grad()
def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, no gradient. The input is not changed."""
    return _all_reduce(x, torch_dist.ReduceOp.SUM)


@torch.no_grad()
def all_reduce_max(x: Tensor) -> Tensor:
    """Maximum of `x` over all ranks, no gradient. The input is not changed."""
    return _all_reduce(x, torch_dist.ReduceOp.MAX)


def _all_reduce(x: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return x
    x = x.clone()
    torch_dist.all_reduce(x, operation)
    return x


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Rows (n * world_size, ...) of all ranks in rank order, no gradient; x (n, ...) has the same shape on each."""
    if world_size() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    torch_dist.all_gather(parts, x)
    return torch.cat(parts)


@torch.no_grad()
def all_to_all(x: Tensor, to: list[int], of: list[int]) -> Tensor:
    """Send rows to the ranks that need them; no gradient.

    Args:
        x: (n, ...) rows for all ranks, those for rank 0 first; `to[r]` rows go to rank r.
        to: number of rows for each rank.
        of: number of rows from each rank.

    Returns:
        (sum of `of`, ...), those from rank 0 first.
    """
    if world_size() == 1:
        return x
    result = x.new_empty(sum(of), *x.shape[1:])
    torch_dist.all_to_all_single(result, x.contiguous(), of, to)
    return result


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; the backward pass sums the ranks' gradients and keeps this rank's rows."""
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_sum_with_grad(x: Tensor) -> Tensor:
    """Sum over all ranks; the backward pass sums the ranks' gradients."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        start = rank() * ctx.rows
        return all_reduce_sum(grad.contiguous())[start : start + ctx.rows]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)
