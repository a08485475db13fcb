"""k-means and spherical k-means by chunked matrix products, on the device of the data.

Random choices are made on the CPU, so a result depends on the data and the seed only. With several ranks, gather all
rows first; every rank computes the same result.

Sources: Lloyd, 1982; Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007; Dhillon
    and Modha, "Concept decompositions for large sparse text data using clustering", 2001 (spherical).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessella.errors import UserError
from tessella.ops.grouping import group_sums
from tessella.ops.layout import widest_float

_BLOCK = 4_000_000  # numbers held at a time
_TOLERANCE = 1e-4


class KMeans(NamedTuple):
    """The best of all restarts."""

    assignments: Tensor  # (n,) int64 in [0, k)
    centres: Tensor  # (k, d) float32; unit rows when spherical
    inertia: float  # sum of squared distances of the (when spherical, unit) rows to their centres


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    *,
    restarts: int = 10,
    iterations: int = 300,
    spherical: bool = False,
    seed: int,
) -> KMeans:
    """Clusters of rows that minimise the squared distance to their centres.

    Args:
        x: (n, d) finite rows, on any device; computed in float32.
        k: number of clusters, 1 <= k <= n.
        restarts: runs from different k-means++ centres, of which the best counts.
        iterations: of Lloyd's algorithm, at most, per restart, which ends when the centres' squared shift is at most
            1e-4 of the mean variance of a column, or when no row changes its cluster.
        spherical: rows and centres are kept at unit length, so that the cosine decides.
        seed: of the k-means++ choices.

    Returns:
        Assignments, centres and inertia on the device of `x`.

    Raises:
        UserError: if k is not in [1, n].
    """
    n = x.shape[0]
    if not 1 <= k <= n:
        raise UserError(f"{k} clusters of {n} images: set 1 to {n} clusters or give more images")
    # Distances do not depend on the origin, but their float32 rounding does.
    x = F.normalize(x.float(), dim=1) if spherical else x.float()
    origin = torch.zeros_like(x[0]) if spherical else x.mean(dim=0)
    x = x - origin
    threshold = _TOLERANCE * float(x.var(dim=0, correction=0).mean())
    random = np.random.default_rng(seed)
    best: KMeans | None = None
    for _ in range(restarts):
        result = _lloyd(x, _plus_plus(x, k, random), iterations, threshold, spherical)
        if best is None or result.inertia < best.inertia:
            best = result
    assert best is not None, "restarts must be at least 1"
    return best._replace(centres=best.centres + origin)


def nearest_centre(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """For each row (n, d) the nearest of (k, d) centres, (n,) int64, and the squared distance, (n,) float32 >= 0."""
    rows = max(1, _BLOCK // max(centres.shape))
    half_norms = centres.square().sum(dim=1) / 2
    nearest, distance = [], []
    for part in x.split(rows):
        # argmin |x - c|² = argmin |c|²/2 - x·c: |x|² needs no pass over the block
        value, index = torch.addmm(half_norms, part, centres.T, alpha=-1).min(dim=1)
        nearest.append(index)
        distance.append((part.square().sum(dim=1) + 2 * value).clamp(min=0))
    return torch.cat(nearest), torch.cat(distance)


@torch.no_grad()
def online_means(means: Tensor, seen: Tensor, x: Tensor, assignments: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean row of each cluster after one more batch. CoKe, update of the centres.

    Args:
        means: (k, d) so far; anything where nothing was seen.
        seen: (k,) float, rows behind each mean.
        x: (n, d) rows of the batch of all ranks.
        assignments: (n,) int64 in [0, k).

    Returns:
        (k, d) means, unchanged where the batch has no row, and (k,) rows of the batch, both like `means`.
    """
    sums, counts = group_sums(x, assignments, len(means))
    counts = counts.to(seen.dtype)
    moved = (means * seen[:, None] + sums.to(means.dtype)) / (seen + counts).clamp_min(1)[:, None]
    return torch.where(counts[:, None] > 0, moved, means), counts


def _lloyd(x: Tensor, centres: Tensor, iterations: int, threshold: float, spherical: bool) -> KMeans:
    assignments, distance = nearest_centre(x, centres)
    for _ in range(iterations):
        moved = _means(x, assignments, distance, centres, spherical)
        shift = float((moved - centres).square().sum())
        centres, before = moved, assignments
        assignments, distance = nearest_centre(x, centres)
        if shift <= threshold or torch.equal(assignments, before):
            break
    return KMeans(assignments, centres, float(distance.cpu().double().sum()))


def _means(x: Tensor, assignments: Tensor, distance: Tensor, centres: Tensor, spherical: bool) -> Tensor:
    """Mean row of each cluster; an empty cluster takes one of the rows farthest from their centres."""
    # A GPU adds in no fixed order; in double precision the order does not reach the float32 result.
    wide = torch.float64 if x.is_cuda else torch.float32
    sums = torch.zeros(centres.shape, dtype=wide, device=x.device)
    rows = max(1, _BLOCK // x.shape[1])
    for part, clusters in zip(x.split(rows), assignments.split(rows), strict=True):
        sums.index_add_(0, clusters, part.to(wide))
    counts = torch.bincount(assignments, minlength=centres.shape[0])
    means = (sums / counts.clamp(min=1)[:, None]).float()
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = x[distance.topk(len(empty)).indices]
    return F.normalize(means, dim=1) if spherical else means


def _plus_plus(x: Tensor, k: int, random: np.random.Generator) -> Tensor:
    """Rows to start from, each drawn with chance proportional to its squared distance from those before it.

    Of a few draws the one that lowers the sum of distances most is taken (the greedy variant of the 2007 paper).
    """
    n, draws, wide = x.shape[0], 2 + int(math.log(k)), widest_float(x.device)
    chosen = torch.empty(k, dtype=torch.int64, device=x.device)
    chosen[0] = int(random.integers(n))
    lengths = torch.cat([part.square().sum(dim=1) for part in x.split(max(1, _BLOCK // x.shape[1]))])
    distance = _squared_distances(x, lengths, chosen[:1])[0]
    for i in range(1, k):
        cumulated = distance.to(wide).cumsum(dim=0)
        points = torch.from_numpy(random.random(draws)).to(wide).to(x.device) * cumulated[-1]
        candidates = torch.searchsorted(cumulated, points, right=True).clamp(max=n - 1)
        lowered = torch.minimum(_squared_distances(x, lengths, candidates), distance)
        best = lowered.sum(dim=1, dtype=wide).argmin()
        chosen[i], distance = candidates[best], lowered[best]
    return x[chosen]


def _squared_distances(x: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    """(m, n) squared distances of m rows, given by index, to all n; `lengths` (n,) are squared."""
    product = torch.addmm(lengths[rows][:, None], x[rows], x.T, alpha=-2)
    return (product + lengths).clamp(min=0)
