"""Batch norm over all ranks equals one process that holds the whole batch, gradients included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella import dist
from tessella.modules.norm import GlobalBatchNorm
from tests.ranks import on_ranks


def outcome(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    (norm(x) * weights).sum().backward()
    return {"x": x.grad, "weight": norm.weight.grad, "mean": norm.running_mean, "var": norm.running_var}


def global_outcome(x: Tensor, weights: Tensor, first: int) -> dict[str, Tensor]:
    mine = slice(first) if dist.rank() == 0 else slice(first, None)
    norm = GlobalBatchNorm.like(nn.BatchNorm2d(x.shape[1]).train())
    result = outcome(norm, x[mine], weights[mine])
    result["weight"] = dist.all_reduce_sum(result["weight"])
    return result


def outcomes(x: Tensor, weights: Tensor) -> dict[str, dict[str, Tensor]]:
    """Equal parts; unequal ones, as of a detector's regions; a rank that has none."""
    return {f"{first} of 8": global_outcome(x, weights, first) for first in (4, 3, 8)}


def test_two_ranks_equal_one_however_the_batch_is_shared():
    x, weights = torch.randn(8, 3, 5, 5), torch.randn(8, 3, 5, 5)
    one = outcome(nn.BatchNorm2d(3).train(), x, weights)
    ranks = on_ranks(2, outcomes, x, weights)
    for shared in ranks[0]:
        found = [rank[shared] for rank in ranks]
        torch.testing.assert_close(torch.cat([r["x"] for r in found]), one["x"], atol=1e-5, rtol=1e-5)
        for key in ("weight", "mean", "var"):
            for rank in found:
                torch.testing.assert_close(rank[key], one[key], atol=1e-5, rtol=1e-5)


def test_evaluation_uses_the_running_statistics_like_torch():
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(8, 3, 4, 4))
    ours, x = GlobalBatchNorm.like(norm).eval(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ours(x), norm.eval()(x))


def test_a_norm_without_weights_stays_without():
    norm, x = nn.BatchNorm1d(3, affine=False).train(), torch.randn(8, 3)
    ours = GlobalBatchNorm.like(norm)
    assert not list(ours.parameters())
    torch.testing.assert_close(ours(x), nn.BatchNorm1d(3, affine=False).train()(x), atol=1e-6, rtol=1e-5)
