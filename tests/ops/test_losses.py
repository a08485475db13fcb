"""Losses against naive double loops, closed forms and the specification's worked numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tessella.ops.assignment import sinkhorn
from tessella.ops.losses import supervised_contrastive, swapped_prediction


def naive_swapped_prediction(scores: Tensor, codes: Tensor, code_views: list[int], temperature: float) -> Tensor:
    views, batch, _ = scores.shape
    total = torch.zeros((), dtype=scores.dtype)
    for code, i in zip(codes, code_views, strict=True):
        for v in range(views):
            if v != i:
                p = torch.softmax(scores[v] / temperature, dim=1)
                total = total - (code * p.log()).sum() / batch / (views - 1) / len(code_views)
    return total


def naive_supervised_contrastive(z: Tensor, groups: Tensor, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        denominator = torch.stack([z[i] @ z[k] / temperature for k in others]).logsumexp(0)
        positives = [k for k in others if groups[k] == groups[i]]
        total = total + sum(denominator - z[i] @ z[j] / temperature for j in positives) / len(positives)
    return total / len(z)


def test_swav_gives_the_worked_number():
    t = torch.tensor([[0.10, 0.0], [0.05, 0.0]])
    s = torch.tensor([[0.08, 0.02], [0.0, 0.06]])
    codes = torch.stack([sinkhorn(t, 0.05, 3), sinkhorn(s, 0.05, 3)])
    scores = torch.stack([t, s])
    torch.testing.assert_close(
        swapped_prediction(scores, codes, [0, 1], 0.1), torch.tensor(0.683954), atol=2e-6, rtol=0
    )


def test_swav_equals_the_double_loop_over_codes_and_views():
    scores = torch.randn(5, 6, 7)
    codes = torch.softmax(torch.randn(2, 6, 7), dim=-1)
    torch.testing.assert_close(
        swapped_prediction(scores, codes, [0, 1], 0.1), naive_swapped_prediction(scores, codes, [0, 1], 0.1)
    )


def test_swav_of_equal_scores_is_ln_k():
    scores = torch.full((2, 4, 3000), 0.3)
    codes = torch.stack([sinkhorn(view, 0.05, 3) for view in scores])
    torch.testing.assert_close(swapped_prediction(scores, codes, [0, 1], 0.1), torch.tensor(8.006368))


def test_swav_gradient_is_softmax_minus_code():
    scores = torch.randn(4, 3, 5, requires_grad=True)
    codes = torch.softmax(torch.randn(2, 3, 5), dim=-1)
    (gradient,) = torch.autograd.grad(swapped_prediction(scores, codes, [0, 1], 0.1), scores)
    p = torch.softmax(scores.detach() / 0.1, dim=-1)
    for v in range(4):
        expected = sum(p[v] - codes[i] for i in (0, 1) if i != v) / (0.1 * 3 * 3 * 2)
        torch.testing.assert_close(gradient[v], expected)


def test_contrastive_equals_the_double_loop():
    z, groups = F.normalize(torch.randn(12, 8), dim=1), torch.arange(12) % 3
    torch.testing.assert_close(supervised_contrastive(z, groups, 0.3), naive_supervised_contrastive(z, groups, 0.3))


def test_contrastive_does_not_depend_on_the_order_of_rows():
    z, groups, order = F.normalize(torch.randn(16, 8), dim=1), torch.arange(16) % 4, torch.randperm(16)
    torch.testing.assert_close(
        supervised_contrastive(z[order], groups[order], 0.3), supervised_contrastive(z, groups, 0.3)
    )


def test_contrastive_of_perfect_clusters_has_its_closed_form():
    n, m, temperature = 5, 4, 0.3
    z, groups = torch.eye(n).repeat(m, 1), torch.arange(n).repeat(m)
    expected = math.log((m - 1) + (n * m - m) * math.exp(-1 / temperature))
    torch.testing.assert_close(supervised_contrastive(z, groups, temperature), torch.tensor(expected))


def test_contrastive_of_equal_embeddings_is_the_logarithm_of_the_others():
    z = F.normalize(torch.ones(16, 8), dim=1)
    torch.testing.assert_close(supervised_contrastive(z, torch.arange(16) % 4, 0.3), torch.tensor(math.log(15)))
