"""Sinkhorn codes: the worked numbers and invariants of SwAV's specification."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessella.errors import UserError
from tessella.ops.assignment import harden, sinkhorn
from tests.ranks import on_ranks


def unit_scores(n: int = 16, k: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    z, w = F.normalize(torch.randn(n, 32, dtype=dtype), dim=1), F.normalize(torch.randn(k, 32, dtype=dtype), dim=1)
    return z @ w.T


def official_order_by_hand(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The matrix of section 3 of the specification, entry by entry: prototypes first, samples last."""
    n, k = scores.shape
    x = [[float(torch.exp(scores[i, j] / epsilon)) for i in range(n)] for j in range(k)]
    total = sum(map(sum, x))
    x = [[v / total for v in row] for row in x]
    for _ in range(iterations):
        x = [[v / sum(row) / k for v in row] for row in x]
        columns = [sum(x[j][i] for j in range(k)) for i in range(n)]
        x = [[x[j][i] / columns[i] / n for i in range(n)] for j in range(k)]
    return torch.tensor(x, dtype=torch.float64).T * n


def test_gives_the_worked_numbers():
    t = torch.tensor([[0.10, 0.0], [0.05, 0.0]], dtype=torch.float64)
    s = torch.tensor([[0.08, 0.02], [0.0, 0.06]], dtype=torch.float64)
    expected = [
        (t, 1, [[0.593845, 0.406155], [0.349755, 0.650245]]),
        (t, 3, [[0.622358, 0.377642], [0.377439, 0.622561]]),
        (s, 3, [[0.765373, 0.234627], [0.228353, 0.771647]]),
        (t, 500, [[0.622459, 0.377541], [0.377541, 0.622459]]),
    ]
    for scores, iterations, codes in expected:
        torch.testing.assert_close(
            sinkhorn(scores, 0.05, iterations), torch.tensor(codes, dtype=torch.float64), atol=1e-6, rtol=0
        )


def test_equals_the_loops_of_the_specification():
    scores = unit_scores()
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), official_order_by_hand(scores, 0.05, 3))


def test_rows_sum_to_one_and_columns_only_at_convergence():
    scores = unit_scores()
    few, many = sinkhorn(scores, 0.05, 3), sinkhorn(scores, 0.05, 100)
    torch.testing.assert_close(few.sum(dim=1), torch.ones(16, dtype=torch.float64))
    torch.testing.assert_close(many.sum(dim=0), torch.full((8,), 2.0, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (few.sum(dim=0) - 2).abs().max() > 1e-3


def test_permuting_samples_or_prototypes_permutes_the_codes():
    scores = unit_scores()
    rows, columns = torch.randperm(16), torch.randperm(8)
    codes = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(sinkhorn(scores[rows], 0.05, 3), codes[rows])
    torch.testing.assert_close(sinkhorn(scores[:, columns], 0.05, 3), codes[:, columns])


def test_a_constant_or_a_shift_per_prototype_changes_nothing_but_a_shift_per_sample_does():
    scores = unit_scores()
    codes = sinkhorn(scores, 0.05, 3)
    shift_k, shift_n = (0.2 * torch.randn(size, dtype=torch.float64) for size in ((1, 8), (16, 1)))
    torch.testing.assert_close(sinkhorn(scores + 3.7, 0.05, 3), codes, atol=1e-12, rtol=0)
    torch.testing.assert_close(sinkhorn(scores + shift_k, 0.05, 3), codes, atol=1e-12, rtol=0)
    # Guards the order: were samples normalised first, this shift would cancel too.
    assert (sinkhorn(scores + shift_n, 0.05, 3) - codes).abs().max() > 1e-2
    converged, shifted = sinkhorn(scores, 0.2, 500), sinkhorn(scores + shift_n, 0.2, 500)
    torch.testing.assert_close(shifted, converged, atol=1e-6, rtol=0)


def test_past_samples_share_the_prototypes_and_get_no_code():
    scores, past = unit_scores(6), unit_scores(10)
    together = sinkhorn(torch.cat([past, scores]), 0.05, 3)
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3, past.clone()), together[10:])
    assert (together[10:] - sinkhorn(scores, 0.05, 3)).abs().max() > 1e-3


def test_views_are_balanced_each_by_itself_and_their_scores_stay_as_they_are():
    scores, past = unit_scores(12).view(2, 6, 8), unit_scores(20).view(2, 10, 8)
    before = scores.clone()
    for codes, expected in (
        (sinkhorn(scores, 0.05, 3), [sinkhorn(view, 0.05, 3) for view in scores]),
        (sinkhorn(scores, 0.05, 3, past.clone()), [sinkhorn(*both) for both in _arguments(scores, past)]),
    ):
        torch.testing.assert_close(codes, torch.stack(expected))
    assert torch.equal(scores, before)


def _arguments(scores: Tensor, past: Tensor) -> list[tuple[Tensor, float, int, Tensor]]:
    return [(s, 0.05, 3, p.clone()) for s, p in zip(scores, past, strict=True)]


def test_equal_scores_give_uniform_codes():
    torch.testing.assert_close(sinkhorn(torch.full((4, 3000), 0.3), 0.05, 3), torch.full((4, 3000), 1 / 3000))


def test_copies_of_the_batch_change_nothing():
    scores = unit_scores()
    torch.testing.assert_close(sinkhorn(scores.repeat(4, 1), 0.05, 3)[-16:], sinkhorn(scores, 0.05, 3))


@pytest.mark.parametrize("epsilon", [0.05, 0.02, 0.005])
def test_float32_scores_of_any_cosine_stay_finite_and_right(epsilon: float):
    scores = unit_scores().float().clamp(-1, 1)
    scores[0, 0], scores[1, 1] = 1.0, -1.0
    codes = sinkhorn(scores, epsilon, 3)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.double(), official_order_by_hand(scores.double(), epsilon, 3), atol=2e-5, rtol=0)


def test_half_precision_scores_are_handled_in_float32():
    scores = unit_scores().bfloat16()
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), sinkhorn(scores.float(), 0.05, 3))


def test_no_gradient_flows_into_codes():
    assert not sinkhorn(unit_scores().requires_grad_(), 0.05, 3).requires_grad


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.0, 3), (-1.0, 3), (0.05, 0)])
def test_settings_out_of_range_are_refused(epsilon: float, iterations: int):
    with pytest.raises(UserError, match="epsilon must be above 0"):
        sinkhorn(unit_scores(), epsilon, iterations)


def codes_of_this_rank(scores: Tensor, *past: Tensor) -> Tensor:
    from tessella import dist

    # Copies: spawned ranks share the memory of what they are given.
    mine, *more = (x.chunk(dist.world_size())[dist.rank()].clone() for x in (scores, *past))
    return sinkhorn(mine, 0.05, 3, *more)


def test_two_ranks_equal_one():
    scores, past = unit_scores(32, 10, torch.float32), unit_scores(8, 10, torch.float32)
    for more in ([], [past]):
        codes = torch.cat(on_ranks(2, codes_of_this_rank, scores, *more))
        torch.testing.assert_close(codes, sinkhorn(scores, 0.05, 3, *(x.clone() for x in more)), atol=1e-6, rtol=0)


def test_hard_codes_put_everything_on_the_largest_entry_and_the_first_of_equal_ones():
    codes = torch.tensor([[[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]], requires_grad=True)
    hard = harden(codes)
    assert torch.equal(hard, torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])) and not hard.requires_grad
