"""A tree of clusters of three levels, how many there should be, and how far they can be trusted.

    unit features -> spherical k-means: fine clusters -> their centres joined by Ward's method -> middle, coarse

The number of middle clusters is suggested by stability: images are clustered twice, from two halves of them, and the
number is the largest at which both clusterings agree about as well as they do at best (Ben-Hur, Elisseeff and Guyon, "A
stability based method for discovering structure in clustered data", 2002; agreement is the adjusted mutual information
of Vinh, Epps and Bailey, 2010).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from tessella.atlas.shards import Vectors
from tessella.ops.kmeans import kmeans

VERSION = 1
_SAMPLE = 50_000  # rows that k-means sees; all rows pass it twice afterwards
_STABILITY_SAMPLE = 6_000  # rows of the search for a number
_CANDIDATES = (4, 6, 8, 10, 12, 16, 20, 25, 32, 40, 50, 64, 80, 100)
_AS_GOOD = 0.95  # of the best agreement: from here on more clusters are worth more than agreement
_IMAGES_PER_FINE = 25
_MOST_FINE = 800


class Tree(NamedTuple):
    """The clustering of all rows."""

    fine: NDArray[np.int32]  # (n,) fine cluster of each row, in [0, k), in the order of `paths`
    centres: NDArray[np.float32]  # (k, d) unit rows, mean directions of their images
    paths: list[str]  # of the fine clusters, "2.1.3", in ascending order of their numbers
    suggested: int  # middle clusters
    reason: str  # for that number
    agreement: float  # of two clusterings from two halves, at that number, in [0, 1]


def cluster(vectors: Vectors, *, seed: int, number: int | None = None, start: NDArray[np.int64] | None = None) -> Tree:
    """Make the tree.

    Args:
        vectors: unit rows, n > 0.
        seed: of all random choices.
        number: of middle clusters; default: the suggested one.
        start: (n,) clusters of the method's own, -1 for rows without one: they are the fine clusters' start in the
            place of k-means'.
    """
    n = len(vectors)
    random = np.random.default_rng(seed)
    sample = vectors.rows(np.sort(random.permutation(n)[:_SAMPLE]))
    suggested, agreement, reason = suggest(sample, seed)
    if number is not None:
        suggested, reason = min(number, n), "as asked for"
    fine_count = min(n, max(suggested, min(_MOST_FINE, max(2 * suggested, n // _IMAGES_PER_FINE))))
    if start is not None:
        centres = _means(vectors, torch.from_numpy(start), int(start.max()) + 1)
    else:
        centres = kmeans(sample, fine_count, restarts=3, iterations=60, spherical=True, seed=seed).centres
    for _ in range(2):  # over all rows: the sample's centres become exact means
        centres = _means(vectors, _nearest(vectors, centres), len(centres))
    nearest = _nearest(vectors, centres)
    used = nearest.unique()
    centres = centres[used]
    nearest = torch.searchsorted(used, nearest)
    sizes = torch.bincount(nearest, minlength=len(centres)).numpy()
    levels = _levels(centres.numpy(), sizes, suggested)
    order, paths = _paths(levels, sizes)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    return Tree(place[nearest.numpy()], centres.numpy()[order], paths, suggested, reason, agreement)


def suggest(sample: Tensor, seed: int) -> tuple[int, float, str]:
    """A number of clusters: how many, how well two clusterings agree there, and why in words.

    Args:
        sample: (m, d) unit rows.
        seed: of the halves.
    """
    random = np.random.default_rng(seed)
    rows = sample[torch.from_numpy(random.permutation(len(sample))[:_STABILITY_SAMPLE])]
    candidates = [k for k in _CANDIDATES if k <= len(rows) // 10] or [max(1, len(rows) // 5)]
    half = max(1, len(rows) // 2)
    agreements = []
    for k in candidates:
        k = min(k, half)
        centres = [
            kmeans(part, k, restarts=2, iterations=30, spherical=True, seed=seed).centres
            for part in (rows[:half], rows[half:] if len(rows) > 1 else rows)
        ]
        labels = [(rows @ centre.T).argmax(dim=1).numpy() for centre in centres]
        agreements.append(float(adjusted_mutual_info_score(*labels)))
    best = max(agreements)
    chosen = max(i for i, value in enumerate(agreements) if value >= _AS_GOOD * best)
    reason = (
        f"two clusterings from two halves of the images agree by {agreements[chosen]:.2f} at {candidates[chosen]}; at "
        "more they agree less" + ("" if chosen == int(np.argmax(agreements)) else f" (best: {best:.2f})")
    )
    return candidates[chosen], max(0.0, agreements[chosen]), reason


def _nearest(vectors: Vectors, centres: Tensor) -> Tensor:
    """(n,) int64 the centre with the largest cosine."""
    return torch.cat([(part @ centres.T).argmax(dim=1) for _, part in vectors.blocks()])


def _means(vectors: Vectors, assignments: Tensor, k: int) -> Tensor:
    """(k, d) mean directions; a cluster without rows is left out of the result's use by having no direction."""
    sums = torch.zeros(k, vectors.dim)
    for start, part in vectors.blocks():
        mine = assignments[start : start + len(part)]
        inside = mine >= 0
        sums.index_add_(0, mine[inside], part[inside])
    return F.normalize(sums, dim=1)


def _levels(centres: NDArray[np.float32], sizes: NDArray[np.int64], middle: int) -> NDArray[np.int64]:
    """(k, 2) coarse and middle cluster of each fine one, joined by Ward's method on the centres."""
    if len(centres) < 2:
        return np.zeros((len(centres), 2), np.int64)
    joins = linkage(centres, "ward")
    coarse = max(2, min(12, round(middle**0.5) + 1)) if middle > 3 else 1
    return np.stack([fcluster(joins, count, "maxclust") - 1 for count in (coarse, max(middle, coarse))], axis=1)


def _paths(levels: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
    """The fine clusters in tree order, larger siblings first, and their paths."""
    coarse, middle = levels[:, 0], levels[:, 1]
    of_coarse = np.bincount(coarse, sizes, minlength=coarse.max() + 1)
    of_middle = np.bincount(middle, sizes, minlength=middle.max() + 1)
    order = np.lexsort((np.arange(len(sizes)), -sizes, middle, -of_middle[middle], coarse, -of_coarse[coarse]))
    paths, numbers, before = [], [0, 0, 0], (-1, -1)
    for row in order:
        if coarse[row] != before[0]:
            numbers = [numbers[0] + 1, 1, 1]
        elif middle[row] != before[1]:
            numbers = [numbers[0], numbers[1] + 1, 1]
        else:
            numbers = [*numbers[:2], numbers[2] + 1]
        before = (coarse[row], middle[row])
        paths.append(".".join(map(str, numbers)))
    return order, paths
