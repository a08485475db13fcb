"""Momentum grouping and its k-means: worked numbers and invariances."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tessella.ops.grouping as module
from tessella import dist
from tessella.ops.grouping import group_loss, group_sums, moved_groups, nearest_group, spherical_kmeans
from tests.ranks import on_ranks

SQUARE = torch.eye(2)
ROWS = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.6, 0.8]])
PREDICTIONS = F.normalize(torch.tensor([[1.0, 0.2], [0.9, 0.1], [0.1, 1.0]]), dim=1)


def units(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def move(groups: Tensor, rows: Tensor, momentum: float) -> Tensor:
    sums, counts = group_sums(rows, nearest_group(rows, groups), len(groups))
    sums, counts = dist.all_reduce_sum_with_grad(sums), dist.all_reduce_sum(counts)
    return moved_groups(groups, sums, counts, momentum)


def move_in_a_loop(groups: Tensor, rows: Tensor, momentum: float) -> Tensor:
    moved = []
    for k, group in enumerate(groups):
        mine = [row for row in rows if int((groups @ row).argmax()) == k]
        if mine:
            group = momentum * group + (1 - momentum) * sum(mine) / len(mine)
        moved.append(group / group.norm())
    return torch.stack(moved)


def test_worked_numbers_of_an_update():
    assert nearest_group(ROWS, SQUARE).tolist() == [0, 0, 1]
    expected = torch.tensor([[0.999541, 0.030289], [0.061110, 0.998131]])
    torch.testing.assert_close(move(SQUARE, ROWS, 0.9), expected, atol=1e-6, rtol=0)


def test_worked_numbers_of_the_loss_and_its_gradient_through_the_update():
    rows = ROWS.double().requires_grad_()
    groups = move(SQUARE.double(), rows, 0.9)
    labels = torch.tensor([[0, 0, 1]])
    loss = group_loss(F.normalize(PREDICTIONS.double(), dim=1)[None], groups, labels, 0.1)
    assert loss.item() == pytest.approx(3.662935e-4, rel=1e-5)
    loss.backward()
    expected = torch.tensor([[-1.6859e-7, 5.5636e-6], [-1.6859e-7, 5.5636e-6], [3.0460e-4, -1.8649e-5]])
    torch.testing.assert_close(rows.grad.float(), expected, atol=0, rtol=1e-3)


def test_gradient_through_the_update_equals_its_closed_form():
    rows, groups, beta = units(20, 8, dtype=torch.float64), units(5, 8, seed=1, dtype=torch.float64), 0.7
    predictions, labels = units(2, 20, 8, seed=2, dtype=torch.float64), torch.arange(20)[None] % 5
    rows.requires_grad_()
    moved = move(groups, rows, beta)
    moved.retain_grad()
    group_loss(predictions, moved, labels, 0.1).backward()
    own = nearest_group(rows, groups)
    for n, u in enumerate(own.tolist()):
        mean = rows.detach()[own == u].mean(dim=0)
        length = (beta * groups[u] + (1 - beta) * mean).norm()
        project = torch.eye(8, dtype=torch.float64) - torch.outer(moved[u], moved[u]).detach()
        expected = (1 - beta) / ((own == u).sum() * length) * project @ moved.grad[u]
        torch.testing.assert_close(rows.grad[n], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
def test_update_equals_a_loop_over_groups(momentum: float):
    groups, rows = units(9, 6), units(40, 6, seed=1)
    torch.testing.assert_close(move(groups, rows, momentum), move_in_a_loop(groups, rows, momentum))


def test_momentum_1_leaves_the_groups_and_momentum_0_gives_the_normalised_means():
    groups, rows = units(5, 6), units(60, 6, seed=1)
    torch.testing.assert_close(move(groups, rows, 1.0), groups)
    own = nearest_group(rows, groups)
    means = torch.stack([F.normalize(rows[own == k].mean(dim=0), dim=0) for k in range(5)])
    torch.testing.assert_close(move(groups, rows, 0.0), means)


def test_a_group_without_rows_stays_bit_for_bit_and_all_groups_stay_unit():
    groups = units(50, 6)
    rows = units(10, 6, seed=1)
    moved = move(groups, rows, 0.5)
    empty = torch.ones(50, dtype=torch.bool)
    empty[nearest_group(rows, groups)] = False
    assert empty.any() and torch.equal(moved[empty], groups[empty])
    assert (moved[~empty] != groups[~empty]).any(dim=1).all()
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(50))


def test_does_not_depend_on_the_order_of_the_batch():
    groups, rows, order = units(5, 6), units(30, 6, seed=1), torch.randperm(30)
    torch.testing.assert_close(move(groups, rows[order], 0.5), move(groups, rows, 0.5))


def test_permuted_groups_give_permuted_results():
    groups, rows, order = units(5, 6), units(30, 6, seed=1), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(move(groups[order], rows, 0.5), move(groups, rows, 0.5)[order])
    assert torch.equal(order[nearest_group(rows, groups[order])], nearest_group(rows, groups))


def test_loss_equals_a_loop_over_views_labels_and_images():
    p, groups = units(3, 4, 6), units(5, 6, seed=1)
    labels = torch.randint(5, (2, 4))
    terms = [
        -math.log(float(torch.softmax(p[v, n] @ groups.T / 0.1, dim=0)[labels[a, n]]))
        for v in range(3) for a in range(2) for n in range(4)
    ]  # fmt: skip
    assert float(group_loss(p, groups, labels, 0.1)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize(("views", "labels"), [(1, 1), (6, 2), (2, 3)])
def test_equal_scores_give_ln_k_whatever_the_views_and_labels(views: int, labels: int):
    loss = group_loss(units(views, 4, 6), units(1, 6).expand(11, -1), torch.zeros(labels, 4, dtype=torch.long), 0.1)
    assert float(loss) == pytest.approx(math.log(11), rel=1e-6)


def test_kmeans_recovers_separated_clusters():
    truth = F.normalize(torch.eye(8)[:5] + 0.05, dim=1)
    labels = torch.arange(100) % 5
    rows = F.normalize(truth[labels] + 0.05 * units(100, 8), dim=1)
    centres = spherical_kmeans(rows, rows[:5], iterations=10)
    assert float((centres * truth).sum(dim=1).min()) > 0.99


def test_kmeans_never_lowers_its_objective_and_equals_momentum_0_updates():
    rows, centres = units(300, 8), units(20, 8, seed=1)
    score = -1.0
    for iterations in range(1, 8):
        centres_now = spherical_kmeans(rows, units(20, 8, seed=1), iterations)
        centres = move_in_a_loop(centres, rows, 0.0)
        torch.testing.assert_close(centres_now, centres)
        now = float((rows @ centres.T).amax(dim=1).mean())
        assert now >= score - 1e-6
        score = now


def test_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    rows, centres = units(100, 8), units(7, 8, seed=1)
    whole = spherical_kmeans(rows, centres, 5), nearest_group(rows, centres)
    monkeypatch.setattr(module, "_BLOCK", 60)
    torch.testing.assert_close(spherical_kmeans(rows, centres, 5), whole[0])
    assert torch.equal(nearest_group(rows, centres), whole[1])


def kmeans_and_update_on_a_share() -> dict[str, Tensor]:
    rows, centres = units(61, 8), units(7, 8, seed=1)
    share = rows[dist.rank() :: dist.world_size()]  # unequal shares on two ranks
    return {"kmeans": spherical_kmeans(share, centres, 6), "update": move(centres, share, 0.5)}


def test_two_ranks_equal_one():
    one = kmeans_and_update_on_a_share()
    for rank in on_ranks(2, kmeans_and_update_on_a_share):
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, atol=1e-6, rtol=0)
