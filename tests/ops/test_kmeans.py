import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

import tessella.ops.kmeans as module
from tessella.errors import UserError
from tessella.ops.kmeans import kmeans, nearest_centre, online_means


def blobs(n=600, d=8, k=6, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(k, d, generator=generator)
    labels = torch.arange(n) % k
    return centres[labels] + spread * torch.randn(n, d, generator=generator), labels


@pytest.mark.parametrize(("spread", "k"), [(1.0, 6), (4.0, 6), (4.0, 25)])
def test_is_as_good_as_scikit_learn(spread, k):
    x, _ = blobs(spread=spread)
    ours = kmeans(x, k, seed=0).inertia
    theirs = SklearnKMeans(k, n_init=10, random_state=0, tol=1e-4).fit(x.numpy()).inertia_
    assert ours <= 1.01 * theirs


def test_finds_planted_clusters():
    x, labels = blobs(spread=0.1)
    found = kmeans(x, 6, seed=0).assignments
    assert len({(int(a), int(b)) for a, b in zip(found, labels, strict=True)}) == 6


def test_result_is_consistent():
    x, _ = blobs(spread=3.0)
    result = kmeans(x + 100, 6, seed=1)
    distances = torch.cdist(x.double() + 100, result.centres.double()).square()
    assert torch.equal(result.assignments, distances.argmin(dim=1))
    assert result.inertia == pytest.approx(float(distances.min(dim=1).values.sum()), rel=1e-4)
    means = torch.stack([x[result.assignments == c].mean(dim=0) + 100 for c in range(6)])
    torch.testing.assert_close(result.centres, means, atol=0.05, rtol=0)


def test_the_seed_decides_and_nothing_else():
    x, _ = blobs(spread=4.0)
    first = kmeans(x, 12, restarts=2, seed=3)
    torch.manual_seed(99), np.random.default_rng(99)
    again = kmeans(x, 12, restarts=2, seed=3)
    other = kmeans(x, 12, restarts=2, seed=4)
    assert torch.equal(first.assignments, again.assignments) and torch.equal(first.centres, again.centres)
    assert not torch.equal(first.assignments, other.assignments)


def test_more_restarts_are_never_worse():
    x, _ = blobs(spread=4.0)
    inertia = [kmeans(x, 25, restarts=r, seed=0).inertia for r in (1, 3, 10)]
    assert inertia[0] >= inertia[1] >= inertia[2]


def test_block_size_does_not_matter(monkeypatch):
    x, _ = blobs()
    whole = kmeans(x, 6, restarts=2, seed=0)
    monkeypatch.setattr(module, "_BLOCK", 64)
    parts = kmeans(x, 6, restarts=2, seed=0)
    assert torch.equal(whole.assignments, parts.assignments)
    torch.testing.assert_close(whole.centres, parts.centres)


def test_spherical_keeps_unit_rows_and_ignores_their_length():
    x, _ = blobs(d=4)
    stretched = x * torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)).add(0.1)
    result, other = kmeans(x, 6, spherical=True, seed=0), kmeans(stretched, 6, spherical=True, seed=0)
    torch.testing.assert_close(result.centres.norm(dim=1), torch.ones(6))
    assert torch.equal(result.assignments, other.assignments)
    unit = torch.nn.functional.normalize(x, dim=1)
    assert torch.equal(result.assignments, (unit @ result.centres.T).argmax(dim=1))
    assert result.inertia == pytest.approx(float((2 - 2 * (unit @ result.centres.T).amax(dim=1)).sum()), rel=1e-4)


def test_an_empty_cluster_takes_the_farthest_row():
    x = torch.tensor([[0.0], [0.1], [0.2], [10.0]])
    centres = torch.tensor([[0.0], [-50.0]])  # nobody is nearest to the second
    assignments, distance = nearest_centre(x, centres)
    moved = module._means(x, assignments, distance, centres, spherical=False)
    assert moved[1].item() == 10.0


def test_no_cluster_is_empty_when_there_are_enough_distinct_rows():
    x = torch.cat([torch.zeros(200, 2), torch.randn(30, 2, generator=torch.Generator().manual_seed(0))])
    for seed in range(5):
        assert torch.bincount(kmeans(x, 20, restarts=1, seed=seed).assignments, minlength=20).min() > 0


def test_equal_rows_do_not_hang_or_fail():
    result = kmeans(torch.ones(10, 3), 4, seed=0)
    assert result.inertia == 0.0
    torch.testing.assert_close(result.centres, torch.ones(4, 3))


@pytest.mark.parametrize("k", [0, 6])
def test_refuses_more_clusters_than_rows(k):
    with pytest.raises(UserError, match=f"{k} clusters of 5 images"):
        kmeans(torch.ones(5, 2), k, seed=0)


def test_online_means_after_any_batches_are_the_means_of_all_rows():
    x, labels = torch.randn(60, 3), torch.randint(0, 4, (60,))
    means, seen = torch.full((5, 3), 9.0), torch.zeros(5)
    for part, own in zip(x.split(17), labels.split(17), strict=True):
        means, counts = online_means(means, seen, part, own)
        seen = seen + counts
    for j in range(4):
        torch.testing.assert_close(means[j], x[labels == j].mean(dim=0))
    assert torch.equal(means[4], torch.full((3,), 9.0)) and seen.tolist() == labels.bincount(minlength=5).tolist()
