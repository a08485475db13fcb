import itertools

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from tessella.ops import metrics


def random_partitions(n=500, k=7, c=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(c, (n,), generator=generator)
    noise = torch.randint(k, (n,), generator=generator)
    keep = torch.rand(n, generator=generator) < 0.6
    return torch.where(keep, labels, noise), labels


def test_topk_counts_the_right_class_among_the_k_highest():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.0, 0.1], [0.2, 0.3, 0.5]])
    labels = torch.tensor([2, 0, 0])
    assert metrics.topk_correct(scores, labels, 1).tolist() == [False, True, False]
    assert metrics.topk_correct(scores, labels, 2).tolist() == [True, True, False]
    assert metrics.topk_correct(scores, labels, 3).all()


def test_a_row_with_a_nan_is_never_right():
    scores = torch.tensor([[float("nan"), 0.0], [0.0, float("nan")]])
    assert not metrics.topk_correct(scores, torch.tensor([0, 1]), 2).any()


def test_per_class_accuracy_is_a_share_of_each_class_and_nan_for_an_absent_one():
    labels, correct = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([True, False, True, True, False])
    found = metrics.per_class_accuracy(correct, labels, 3)
    assert found[[0, 2]].tolist() == pytest.approx([0.5, 2 / 3])
    assert found[1].isnan()


def test_wilson_interval_equals_the_roots_of_its_quadratic():
    # The bounds p are where |accuracy - p| = z sqrt(p (1 - p) / n).
    for accuracy, n in ((0.0, 10), (0.3, 50), (1.0, 7), (0.5, 10_000)):
        for p in metrics.wilson_interval(accuracy, n):
            assert abs(accuracy - p) == pytest.approx(1.96 * np.sqrt(p * (1 - p) / n), abs=1e-9)


def test_contingency_counts_every_pair():
    assignments, labels = random_partitions()
    table = metrics.contingency(assignments, labels, 9, 4)
    assert table.shape == (9, 4)
    for cluster, label in itertools.product(range(9), range(4)):
        assert table[cluster, label] == int(((assignments == cluster) & (labels == label)).sum())


@pytest.mark.parametrize("seed", range(3))
def test_agreement_equals_scikit_learn(seed):
    assignments, labels = random_partitions(seed=seed)
    table = metrics.contingency(assignments, labels, 7, 4)
    a, y = assignments.numpy(), labels.numpy()
    assert metrics.normalised_mutual_information(table) == pytest.approx(sk.normalized_mutual_info_score(y, a))
    assert metrics.adjusted_rand_index(table) == pytest.approx(sk.adjusted_rand_score(y, a))


def test_clustering_accuracy_is_the_best_of_all_one_to_one_maps():
    assignments, labels = random_partitions(k=4, c=4)
    table = metrics.contingency(assignments, labels, 4, 4)
    best = max(
        float((torch.tensor(names)[assignments] == labels).float().mean()) for names in itertools.permutations(range(4))
    )
    assert metrics.clustering_accuracy(table) == pytest.approx(best)


def test_clustering_accuracy_needs_as_many_clusters_as_classes():
    with pytest.raises(AssertionError, match="K == C"):
        metrics.clustering_accuracy(np.ones((3, 2), dtype=np.int64))


def test_purity_names_each_cluster_after_its_most_frequent_class():
    table = np.array([[5, 1], [2, 2], [0, 10]])
    assert metrics.purity(table) == pytest.approx((5 + 2 + 10) / 20)


def test_a_perfect_clustering_scores_one_under_any_naming():
    labels = torch.arange(60) % 3
    table = metrics.contingency((labels + 1) % 3, labels, 3, 3)
    for score in (
        metrics.clustering_accuracy,
        metrics.purity,
        metrics.normalised_mutual_information,
        metrics.adjusted_rand_index,
    ):
        assert score(table) == pytest.approx(1.0)


def test_one_cluster_for_everything_tells_nothing():
    table = np.array([[30, 30]])
    assert metrics.normalised_mutual_information(table) == 0.0
    assert metrics.adjusted_rand_index(table) == 0.0
    assert metrics.purity(table) == 0.5


def test_two_partitions_of_one_part_agree_as_in_scikit_learn():
    table = np.array([[5]])
    assert metrics.normalised_mutual_information(table) == 1.0
    assert metrics.adjusted_rand_index(table) == 1.0


def test_perplexity_counts_equally_full_bins():
    assert metrics.perplexity(np.array([5, 5, 5, 0])) == pytest.approx(3.0)
    assert metrics.perplexity(np.array([9, 0])) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(400, 8), (6, 40)])
def test_effective_rank_equals_the_entropy_of_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, shape[1]) + 3
    singular = np.linalg.svd((x - x.mean(dim=0)).double().numpy(), compute_uv=False)
    shares = singular[singular > 1e-6] / singular.sum()
    assert metrics.effective_rank(x) == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-4)


def test_effective_rank_counts_directions():
    orthogonal = torch.cat([torch.eye(5), -torch.eye(5)])
    assert metrics.effective_rank(orthogonal) == pytest.approx(5.0)
    line = torch.linspace(-1, 1, 50)[:, None] * torch.ones(1, 10)
    assert metrics.effective_rank(line) == pytest.approx(1.0, abs=1e-3)


def test_equal_rows_have_rank_zero_not_the_rank_of_their_rounding():
    assert metrics.effective_rank(torch.full((100, 16), 0.1)) == 0.0
    assert metrics.effective_rank(torch.full((100, 16), 0.1) + 1e-9 * torch.randn(100, 16)) == 0.0
