"""CoKe's online assignment: its inequalities at every step, its distance from the exact optimum, averaged labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import eye as identity
from scipy.sparse import kron, vstack
from torch import Tensor

from tessella.ops.assignment import average_labels, averaged_targets, dual_assignment, dual_step


def uneven_scores(n: int, k: int, dim: int = 16, seed: int = 0) -> Tensor:
    """Cosines of n unit vectors to k unit centres that own very different shares of them."""
    g = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(k, dim, generator=g, dtype=torch.float64), dim=1)
    shares = torch.arange(1, k + 1, dtype=torch.float64) ** 2
    owner = torch.multinomial(shares, n, replacement=True, generator=g)
    x = centres[owner] + 0.3 * torch.randn(n, dim, generator=g, dtype=torch.float64)
    return F.normalize(x, dim=1) @ centres.T


def passes(scores: Tensor, batch: int, ratio: float, lr: float, count: int, duals: Tensor | None = None):
    """Online passes in random order; labels of the last pass and the duals."""
    n, k = scores.shape
    duals = torch.zeros(k, dtype=scores.dtype) if duals is None else duals
    labels = torch.empty(n, dtype=torch.long)
    for _ in range(count):
        for rows in torch.randperm(n).split(batch):
            labels[rows] = dual_assignment(scores[rows], duals)
            duals = dual_step(duals, labels[rows].bincount(minlength=k).to(scores.dtype), ratio, lr)
    return labels, duals


def optimum_by_linear_programme(scores: Tensor, least: float) -> float:
    """max sum mu * scores, rows of mu in the simplex, columns at least `least`."""
    n, k = scores.shape
    one_per_sample = kron(identity(n), np.ones((1, k)))
    per_cluster = kron(np.ones((1, n)), identity(k))
    result = linprog(
        -scores.numpy().ravel(), A_eq=one_per_sample, b_eq=np.ones(n),
        A_ub=vstack([-per_cluster]), b_ub=np.full(k, -least), bounds=(0, None), method="highs",
    )  # fmt: skip
    assert result.success
    return -float(result.fun)


def optimum_by_assignment(scores: Tensor, least: int) -> float:
    """The same for whole numbers: `least` seats per cluster, all other seats free to take the best cluster."""
    n, k = scores.shape
    seats = np.repeat(scores.numpy(), least, axis=1)
    free = np.repeat(scores.numpy().max(axis=1, keepdims=True), n - least * k, axis=1)
    value = np.concatenate([seats, free], axis=1)
    return float(value[linear_sum_assignment(value, maximize=True)].sum())


def value(scores: Tensor, labels: Tensor) -> float:
    return float(scores.gather(1, labels[:, None]).sum())


@pytest.mark.parametrize("lr", [0.1, 3.0, 20.0])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.9])
def test_both_inequalities_of_the_theory_hold_after_every_batch(lr: float, ratio: float):
    k, batch = 7, 16
    start = torch.rand(k, dtype=torch.float64)
    duals, lacking, weighted, squares = start, torch.zeros(k, dtype=torch.float64), 0.0, 0.0
    for _ in range(100):
        labels = dual_assignment(torch.randn(batch, k, dtype=torch.float64), duals)
        counts = labels.bincount(minlength=k).double()
        excess = counts / batch - ratio / k
        lacking -= excess
        weighted += float(duals @ excess)
        squares += float(excess @ excess)
        duals = dual_step(duals, counts, ratio, lr)
        assert (lacking <= (duals - start) / lr + 1e-9).all()
        assert weighted <= float(start @ start) / (2 * lr) + lr / 2 * squares + 1e-9
        assert float(excess @ excess) <= 1 + 1e-12 and (duals >= 0).all()


def test_a_dual_step_gives_the_hand_computed_numbers():
    duals = torch.tensor([1.0, 0.1, 0.0, 0.5])
    moved = dual_step(duals, torch.tensor([4.0, 3.0, 1.0, 0.0]), ratio=0.4, lr=2.0)
    # rho - 2 n / 8 + 2 * 0.4 / 4, clamped
    torch.testing.assert_close(moved, torch.tensor([0.2, 0.0, 0.0, 0.7]))


def test_the_sum_of_the_duals_falls_by_lr_times_one_minus_ratio_where_nothing_is_clamped():
    duals = 100 + torch.rand(9, dtype=torch.float64)
    for ratio in (0.0, 0.4, 1.0):
        moved = dual_step(duals, torch.randint(0, 5, (9,)).double(), ratio, lr=3.0)
        assert float((moved - duals).sum()) == pytest.approx(-3.0 * (1 - ratio), abs=1e-9)


def test_at_ratio_0_the_assignment_is_the_nearest_centre_and_at_1_duals_may_be_negative():
    scores = uneven_scores(400, 8)
    labels, duals = passes(scores, 32, ratio=0.0, lr=0.5, count=2)
    assert torch.equal(labels, scores.argmax(dim=1)) and not duals.any()
    plain = labels.bincount(minlength=8)
    labels, duals = passes(scores, 32, ratio=1.0, lr=0.16, count=10)
    even = labels.bincount(minlength=8)
    assert duals.min() < 0 and even.max() - even.min() < (plain.max() - plain.min()) / 3


def test_the_linear_programme_and_the_assignment_problem_agree_on_the_optimum():
    scores = uneven_scores(120, 6)
    for least in (4, 15):
        assert optimum_by_assignment(scores, least) == pytest.approx(
            optimum_by_linear_programme(scores, least), abs=1e-6
        )


@pytest.mark.parametrize(("n", "k", "batch", "ratio"), [(1500, 10, 64, 0.4), (1500, 10, 64, 0.9), (1600, 40, 64, 0.8)])
def test_ten_passes_come_within_a_hundredth_of_the_exact_optimum(n: int, k: int, batch: int, ratio: float):
    torch.manual_seed(0)
    scores, least = uneven_scores(n, k), ratio * n / k
    best = optimum_by_linear_programme(scores, least)
    free = float(scores.max(dim=1).values.sum())
    labels, _ = passes(scores, batch, ratio, lr=0.02 * min(batch, k), count=10)
    shortfall = least - labels.bincount(minlength=k).min()
    assert free - best > 0.01 * n or ratio < 0.8  # the bound costs something: plain k-means would not pass
    assert abs(best - value(scores, labels)) / n <= 0.01
    assert shortfall <= 0.3 * least
    assert least - scores.argmax(dim=1).bincount(minlength=k).min() > 0.3 * least


def test_the_official_rate_destroys_the_assignment_of_few_clusters():
    """Why "auto" exists: 20 is meant for thousands of clusters."""
    scores = uneven_scores(1500, 10)
    best = optimum_by_linear_programme(scores, 60)
    wild, _ = passes(scores, 64, ratio=0.4, lr=20.0, count=10)
    calm, _ = passes(scores, 64, ratio=0.4, lr=0.2, count=10)
    assert (best - value(scores, wild)) / 1500 > 0.1 > 0.01 > abs(best - value(scores, calm)) / 1500


def test_the_shortfall_of_one_pass_grows_with_the_square_root_of_the_number_of_images():
    def shortfall(n: int) -> float:
        scores, lacking = uneven_scores(n, 10), []
        for _ in range(5):
            labels, _ = passes(scores, 32, 0.4, lr=4 / math.sqrt(n / 32), count=1)
            lacking.append(0.04 * n - float(labels.bincount(minlength=10).min()))
        return sum(lacking) / len(lacking)

    small, large = shortfall(1000), shortfall(16000)
    assert 0 < small < math.sqrt(1000) and 0 < large < math.sqrt(16000)
    assert 2 < large / small < 8  # 4 for sixteen times as many; 16 if it grew in proportion


def test_nearly_equal_images_do_not_fall_into_one_cluster():
    scores = 0.9 + 1e-4 * torch.randn(3200, 20, dtype=torch.float64)
    labels, _ = passes(scores, 32, ratio=0.4, lr=5.0, count=3)
    assert labels.bincount(minlength=20).min() >= 0.4 * 3200 / 20


# Labels averaged over epochs


def slow_average(slots: list[list[float]], new: int, share: float) -> None:
    """The rule of the specification, in place; slots of (label, weight)."""
    if not any(weight for _, weight in slots):
        slots[0] = [new, 1.0]
        return
    for slot in slots:
        if slot[0] == new and slot[1] > 0:
            for other in slots:
                other[1] *= 1 - share
            slot[1] += share
            return
    smallest = min(range(len(slots)), key=lambda i: slots[i][1])
    evicted = slots[smallest][1]
    for other in slots:
        other[1] *= (1 - share) / (1 - evicted)
    slots[smallest] = [new, share]


def test_averaged_labels_equal_the_rule_written_as_a_loop():
    generator = torch.Generator().manual_seed(0)
    slots = [[[-1, 0.0] for _ in range(3)] for _ in range(50)]
    labels, weights = torch.full((50, 3), -1), torch.zeros(50, 3, dtype=torch.float64)
    for epoch in range(12):
        new = torch.randint(0, 6, (50,), generator=generator)
        labels, weights = average_labels(labels, weights, new, 1 / (epoch + 1))
        for i in range(50):
            slow_average(slots[i], int(new[i]), 1 / (epoch + 1))
        expected = torch.tensor(slots, dtype=torch.float64)
        torch.testing.assert_close(weights, expected[..., 1])
        assert torch.equal(labels[weights > 0], expected[..., 0].long()[weights > 0])
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(50, dtype=torch.float64))
        used = [row[w > 0].tolist() for row, w in zip(labels, weights, strict=True)]
        assert all(len(set(row)) == len(row) for row in used)


def test_an_image_that_was_not_averaged_yet_starts_with_weight_1_whatever_the_epoch():
    labels, weights = average_labels(torch.tensor([[2, -1, -1]]), torch.zeros(1, 3), torch.tensor([7]), share=0.25)
    assert labels.tolist() == [[7, -1, -1]] and weights.tolist() == [[1.0, 0.0, 0.0]]


def test_a_label_grows_where_it_has_weight_not_in_an_empty_slot_that_names_it_too():
    labels, weights = average_labels(torch.tensor([[4, 4]]), torch.tensor([[0.0, 1.0]]), torch.tensor([4]), share=0.5)
    assert labels.tolist() == [[4, 4]] and weights.tolist() == [[0.0, 1.0]]


def test_averaged_targets_are_a_softmax_over_the_slots_in_use():
    targets = averaged_targets(torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), 0.5)
    share = 1 / (1 + math.exp(-1))  # exp(1.5) against exp(0.5)
    torch.testing.assert_close(targets, torch.tensor([[share, 1 - share, 0], [1.0, 0, 0], [1.0, 0, 0]]))
    assert targets[0, 2] == 0
