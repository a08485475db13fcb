"""Nearest neighbours by cosine: every pair is compared up to 200,000 images, beyond that those of nearby clusters.

    exact:       queries (b, d) x all rows, block by block -> the k best so far
    by clusters: rows in k-means lists; a query is compared with the rows of the lists whose centres are nearest

How many true neighbours the second way finds is measured on a sample, and recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella.atlas.shards import SHARD, Vectors
from tessella.ops.kmeans import kmeans
from tessella.ops.nearest import largest

EXACT_UP_TO = 200_000  # rows
_COLUMNS = 16_384  # rows that a block of queries meets at a time
_PROBES = 24  # lists that a query looks through
_LIST = 1000  # rows of a list, about
_SAMPLE = 60_000  # rows that the lists' centres are made of
_CHECKED = 500  # queries that say how many true neighbours were found

Found = tuple[NDArray[np.int32], NDArray[np.float32]]


def exact_neighbours(
    vectors: Vectors,
    k: int,
    queries: NDArray[np.int64] | None = None,
    *,
    of: Vectors | None = None,
    done: Callable[[int], None] = lambda rows: None,
) -> Found:
    """The k nearest other rows of each query.

    Args:
        vectors: the rows.
        k: neighbours; fewer rows than that give -1 and cosine 0.
        queries: rows to ask for; default: all.
        of: where the queries' own vectors are, if they are others; a row is still no neighbour of its own.
        done: called with numbers of queries that are ready.

    Returns:
        (q, k) rows, nearest first, of equal ones the first, and (q, k) cosines.
    """
    queries = np.arange(len(vectors)) if queries is None else queries
    rows = np.full((len(queries), k), -1, np.int32)
    cosines = np.zeros((len(queries), k), np.float32)
    step = max(1, min(SHARD, len(queries)))
    for start in range(0, len(queries), step):
        asked = queries[start : start + step]
        x = (of or vectors).rows(asked)
        best = x.new_full((len(asked), 0), 0.0)
        index = torch.empty(len(asked), 0, dtype=torch.int64)
        for first, part in vectors.blocks(_COLUMNS):
            product = x @ part.T
            inside = (asked >= first) & (asked < first + len(part))
            product[np.flatnonzero(inside), asked[inside] - first] = -torch.inf
            best, index = _merge(best, index, product, torch.arange(first, first + len(part)).expand(product.shape), k)
        width = min(k, len(vectors) - 1)
        rows[start : start + step, :width] = index[:, :width].numpy()
        cosines[start : start + step, :width] = best[:, :width].clamp(-1, 1).numpy()
        done(len(asked))
    return rows, cosines


def neighbours(
    vectors: Vectors, k: int, seed: int, done: Callable[[int], None] = lambda rows: None
) -> tuple[Found, float]:
    """The k nearest other rows of every row, and the share of true neighbours among them (1 where all are compared)."""
    if len(vectors) <= EXACT_UP_TO:
        return exact_neighbours(vectors, k, done=done), 1.0
    found = _by_clusters(vectors, k, seed, done)
    checked = np.random.default_rng(seed).choice(len(vectors), _CHECKED, replace=False)
    true, _ = exact_neighbours(vectors, k, np.sort(checked))
    mine = found[0][np.sort(checked)]
    recall = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(mine, true, strict=True)]))
    return found, recall


def _by_clusters(vectors: Vectors, k: int, seed: int, done: Callable[[int], None]) -> Found:
    n = len(vectors)
    random = np.random.default_rng(seed)
    sample = vectors.rows(np.sort(random.choice(n, min(n, _SAMPLE), replace=False)))
    lists = min(len(sample) // 4, max(2 * _PROBES, n // _LIST))
    centres = kmeans(sample, lists, restarts=1, iterations=8, spherical=True, seed=seed).centres
    nearest = np.empty(n, np.int32)
    for start, part in vectors.blocks():
        nearest[start : start + len(part)] = (part @ centres.T).argmax(dim=1).numpy()
    order = np.argsort(nearest, kind="stable")  # rows, list by list
    begins = np.searchsorted(nearest[order], np.arange(lists + 1))
    probes = (centres @ centres.T).topk(min(_PROBES, lists), dim=1).indices.numpy()
    rows = np.full((n, k), -1, np.int32)
    cosines = np.zeros((n, k), np.float32)
    for number in range(lists):
        mine = order[begins[number] : begins[number + 1]]
        nearby = np.sort(np.concatenate([order[begins[probe] : begins[probe + 1]] for probe in probes[number]]))
        candidates, wide = vectors.rows(nearby), torch.from_numpy(nearby)
        for start in range(0, len(mine), SHARD):
            asked = mine[start : start + SHARD]
            x = vectors.rows(asked)
            product = x @ candidates.T
            product.masked_fill_(wide == torch.from_numpy(asked)[:, None], -torch.inf)
            best, columns = largest(product, min(k, product.shape[1]))
            index = wide[columns]
            there = torch.isfinite(best)
            width = best.shape[1]
            rows[asked, :width] = torch.where(there, index, -1).numpy()
            cosines[asked, :width] = torch.where(there, best.clamp(-1, 1), 0.0).numpy()
            done(len(asked))
    return rows, cosines


def _merge(best: Tensor, index: Tensor, product: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of those so far and of a block, sorted downwards."""
    values, columns = largest(product, min(k, product.shape[1]))
    best, index = torch.cat([best, values], dim=1), torch.cat([index, rows.gather(1, columns)], dim=1)
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best[:, :k], index.gather(1, order)[:, :k]
