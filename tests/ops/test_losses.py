"""Losses against naive double loops, closed forms and the specification's worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessella.ops.assignment import sinkhorn
from tessella.ops.losses import (
    crop_prediction,
    label_cross_entropy,
    supervised_contrastive,
    swapped_prediction,
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


def naive_crop_prediction(
    scores: Tensor, labels: Tensor, weights: Tensor, temperature: float, label_weight: float, large_weight: float
) -> Tensor:
    heads, views, batch, _ = scores.shape
    log_p = torch.log_softmax(scores / temperature, dim=-1)
    p = log_p[0, :2].detach().exp()
    losses = torch.zeros(heads, views)
    for h in range(heads):
        for v in range(views):
            for i in range(batch):
                to_label = -sum(weights[i, s] * log_p[h, v, i, labels[i, s]] for s in range(labels.shape[1]))
                target = p[1 - v, i] if v < 2 else (p[0, i] + p[1, i]) / 2
                to_views = -(target * log_p[h, v, i]).sum()
                losses[h, v] += (label_weight * to_label + (1 - label_weight) * to_views) / batch
    large, small = losses[:, :2].mean(), losses[:, 2:].mean()
    return large if views == 2 else large_weight * large + (1 - large_weight) * small


@pytest.mark.parametrize("views", [2, 5])
def test_crops_predict_the_label_and_the_other_large_crops_as_in_a_loop_and_so_does_the_gradient(views: int):
    scores = F.normalize(torch.randn(2, views, 4, 6), dim=-1).requires_grad_()
    labels = torch.tensor([[0, 5], [1, 1], [2, 0], [3, 4]])
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.1, 0.9]])
    settings = labels, weights, 0.05, 0.2, 0.7
    fast, slow = crop_prediction(scores, *settings), naive_crop_prediction(scores, *settings)
    torch.testing.assert_close(fast, slow)
    (of_fast,), (of_slow,) = torch.autograd.grad(3 * fast, scores), torch.autograd.grad(3 * slow, scores)
    torch.testing.assert_close(of_fast, of_slow)


def test_large_scores_do_not_overflow():
    scores = 1000 * torch.randn(2, 3, 4, 6)
    labels, weights = torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)
    codes = torch.softmax(torch.randn(2, 4, 6), dim=-1)
    assert crop_prediction(scores, labels, weights, 0.05, 0.2, 0.5).isfinite()
    assert swapped_prediction(scores[0], codes, [0, 1], 0.1).isfinite()


def test_one_tensor_of_the_scores_size_is_kept_for_the_backward_pass():
    scores = torch.randn(2, 8, 16, 300, requires_grad=True)
    labels, weights = torch.zeros(16, 1, dtype=torch.long), torch.ones(16, 1)
    codes = torch.softmax(torch.randn(2, 16, 300), dim=-1)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        crop_prediction(scores, labels, weights, 0.05, 0.2, 0.5)
        swapped_prediction(scores[0], codes, [0, 1], 0.1)
    assert sum(kept) < 1.01 * (scores.numel() + scores[0].numel())


def test_a_second_backward_pass_is_refused_instead_of_wrong():
    scores, codes = torch.randn(3, 4, 6, requires_grad=True), torch.softmax(torch.randn(2, 4, 6), dim=-1)
    loss = swapped_prediction(scores, codes, [0, 1], 0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
