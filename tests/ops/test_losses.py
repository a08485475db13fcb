"""Losses against naive double loops, closed forms and the specification's worked numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tessella.ops.assignment import sinkhorn
from tessella.ops.losses import (
    label_cross_entropy,
    supervised_contrastive,
    swapped_prediction,
    view_cross_entropy,
)


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


def test_label_cross_entropy_equals_a_loop_over_slots_and_adds_up_repeated_clusters():
    log_p = torch.log_softmax(torch.randn(2, 3, 4, 6), dim=-1)
    labels = torch.tensor([[0, 5], [1, 1], [2, 0], [3, 4]])
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.1, 0.9]])
    expected = torch.zeros(2, 3)
    for i in range(4):
        for s in range(2):
            expected -= weights[i, s] * log_p[:, :, i, labels[i, s]] / 4
    torch.testing.assert_close(label_cross_entropy(log_p, labels, weights), expected)


def test_view_cross_entropy_swaps_the_first_two_views_and_gives_the_others_their_mean():
    log_p, p = torch.log_softmax(torch.randn(2, 4, 5, 6), dim=-1), torch.softmax(torch.randn(2, 5, 6), dim=-1)
    losses = view_cross_entropy(log_p, p)
    for branch in range(2):
        for view, target in enumerate((p[1], p[0], (p[0] + p[1]) / 2, (p[0] + p[1]) / 2)):
            expected = -(target * log_p[branch, view]).sum(dim=1).mean()
            torch.testing.assert_close(losses[branch, view], expected)
    assert view_cross_entropy(log_p[:, :2], p).shape == (2, 2)
