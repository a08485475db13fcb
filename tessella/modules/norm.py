"""Batch norm over the batch of all ranks, and activation checkpointing that counts every batch once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from tessella import dist


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace every batch norm by one over all ranks; parameters and keys stay.

    On a CPU by `GlobalBatchNorm`, because torch's SyncBatchNorm refuses CPU tensors.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, GlobalBatchNorm.like(child))
        else:
            synchronise_batch_norm(child, device)
    return module


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of (n, c) or (n, c, h, w) with mean and variance over all ranks, on any device.

    Equals nn.BatchNorm on the concatenated batch of all ranks, gradients included. n may differ between ranks, as the
    number of a detector's regions does.
    """

    @classmethod
    def like(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> GlobalBatchNorm:
        """The same layer with the same (shared) parameters and buffers."""
        new = cls(norm.num_features, norm.eps, norm.momentum, affine=norm.affine)
        new.weight, new.bias = norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked = norm.num_batches_tracked
        new.train(norm.training)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in training mode over the batch of all ranks."""
        assert x.dim() in (2, 4), tuple(x.shape)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        dims = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        pixels = x.new_full((1,), x.numel() // x.shape[1])  # of this rank
        total = dist.all_reduce_sum_with_grad(torch.cat([x.sum(dim=dims), pixels]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean.view(shape)
        variance = dist.all_reduce_sum_with_grad((centred * centred).sum(dim=dims)) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1).clamp_min(1)), self.momentum)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        return normalised * self.weight.view(shape) + self.bias.view(shape) if self.affine else normalised


def checkpointed(function: Callable[..., Any], module: nn.Module, *args: Any) -> Any:
    """`function(*args)`, which runs `module`; its activations are computed again in the backward pass, not kept.

    The second computation is in training mode too and would count every batch twice in the running statistics, so
    they are restored after it.
    """
    contexts: Any = lambda: (contextlib.nullcontext(), _restored_statistics(module))  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _restored_statistics(module: nn.Module) -> Iterator[None]:
    buffers = [b for m in module.modules() if isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
