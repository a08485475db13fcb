"""The map: two coordinates per image, so that neighbours lie together.

UMAP (McInnes, Healy and Melville, 2018) by its authors' library, from neighbours that are known already and from
principal components as a start. Of a large set it places a sample; every other image goes among its nearest sampled
neighbours.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella.atlas.neighbours import exact_neighbours
from tessella.atlas.shards import SHARD, Vectors

VERSION = 1
SAMPLE = 50_000  # images that UMAP places
NEIGHBOURS = 15  # what UMAP looks at
_LEAST = 12  # images; of fewer the components are the map
_COMPONENTS = 8  # kept per image
_AMONG = 5  # sampled neighbours that place another image


def components(vectors: Vectors, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and (at most 8, d) leading principal directions of the rows, from a sample."""
    random = np.random.default_rng(seed)
    x = vectors.rows(np.sort(random.permutation(len(vectors))[:SAMPLE]))
    mean = x.mean(dim=0)
    width = min(_COMPONENTS, *x.shape)
    # Exact, from the smaller of both Gram matrices; the sign of a direction is fixed by its largest entry.
    _, _, directions = torch.linalg.svd((x - mean)[: 4 * max(x.shape[1], 500)], full_matrices=False)
    directions = directions[:width]
    largest = directions.abs().argmax(dim=1, keepdim=True)
    return mean, directions * directions.gather(1, largest).sign()


def place(
    vectors: Vectors, nearest: tuple[NDArray[np.int32], NDArray[np.float32]], projected: NDArray[np.float32], seed: int
) -> NDArray[np.float32]:
    """(n, 2) coordinates in [0, 1].

    Args:
        vectors: unit rows, n > 0.
        nearest: neighbours (n, k) and their cosines.
        projected: (n, p) principal components of the rows.
        seed: of the layout, which is the same for each seed on one machine.
    """
    n = len(vectors)
    if n < _LEAST or projected.shape[1] < 2:
        return _fitted(np.pad(projected[:, :2], ((0, 0), (0, max(0, 2 - projected.shape[1])))))
    if n <= SAMPLE:
        return _fitted(_umap(*nearest, projected[:, :2], seed))
    chosen = np.sort(np.random.default_rng(seed).choice(n, SAMPLE, replace=False))
    sample = Vectors.of_array(vectors.rows(chosen).numpy())
    found = _fitted(_umap(*exact_neighbours(sample, NEIGHBOURS), projected[chosen, :2], seed))
    places = np.empty((n, 2), np.float32)
    places[chosen] = found
    held = sample.rows(range(len(sample)))
    for start in range(0, n, SHARD):
        rows = np.setdiff1d(np.arange(start, min(start + SHARD, n)), chosen, assume_unique=True)
        cosine, index = (vectors.rows(rows) @ held.T).topk(_AMONG, dim=1)
        # Among the nearest that lie together: a mean of distant places would be in no-man's-land.
        around = torch.from_numpy(found)[index]
        near = (around - around[:, :1]).norm(dim=2) < 0.05
        weight = (cosine.clamp_min(0) * near)[..., None] + 1e-9
        places[rows] = ((around * weight).sum(dim=1) / weight.sum(dim=1)).numpy()
    return places


def _umap(
    rows: NDArray[np.int32], cosines: NDArray[np.float32], start: NDArray[np.float32], seed: int
) -> NDArray[np.float32]:
    """UMAP's layout of neighbours; the first neighbour that it expects is the row itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numba and of a seed's single thread
        from umap.umap_ import fuzzy_simplicial_set, simplicial_set_embedding

        n, k = len(rows), min(NEIGHBOURS, rows.shape[1], len(rows) - 1)
        index = np.concatenate([np.arange(n)[:, None], rows[:, : k - 1]], axis=1)
        distance = np.concatenate([np.zeros((n, 1)), 1 - cosines[:, : k - 1]], axis=1).astype(np.float32)
        random = np.random.RandomState(seed)
        graph, _, _ = fuzzy_simplicial_set(
            np.empty((n, 1), np.float32), k, random, "cosine", knn_indices=index, knn_dists=distance
        )
        spread = start / max(float(np.abs(start).max()), 1e-9) * 10
        layout, _ = simplicial_set_embedding(
            data=None,
            graph=graph,
            n_components=2,
            initial_alpha=1.0,
            a=1.5769434603113077,  # of umap's default min_dist 0.1 and spread 1
            b=0.8950608781227859,
            gamma=1.0,
            negative_sample_rate=5,
            n_epochs=500 if n <= 10_000 else 200,
            init=(spread + random.normal(scale=1e-4, size=spread.shape)).astype(np.float32),
            random_state=random,
            metric="euclidean",
            metric_kwds={},
            densmap=False,
            densmap_kwds={},
            output_dens=False,
            parallel=False,
        )
    return layout


def _fitted(xy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Into the unit square by one scale for both directions; a few far-off places are drawn to its border."""
    low, high = np.quantile(xy, 0.001, axis=0), np.quantile(xy, 0.999, axis=0)
    size = max(float((high - low).max()), 1e-9)
    middle = (low + high) / 2
    return np.clip((xy - middle) / size * 0.98 + 0.5, 0, 1).astype(np.float32)
