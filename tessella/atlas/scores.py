"""What each image is like: how typical of its cluster, how near to another one, how far from everything."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tessella.atlas.clusters import Tree
from tessella.atlas.shards import Vectors

_NEAREST = 10  # neighbours whose distance makes an outlier
_OUTLIER_SHARE, _OUTLIER_SPREADS = 0.01, 3.0  # at most this share of the images, and so far above what is usual


class Scores(NamedTuple):
    """One value per image."""

    distance: NDArray[np.float32]  # (n,) 1 - cosine to the own fine cluster's centre
    runner_up: NDArray[np.int32]  # (n,) the second nearest fine cluster; -1 where there is one cluster
    margin: NDArray[np.float32]  # (n,) cosine to the own centre minus that to the runner-up, at least 0
    typicality: NDArray[np.float32]  # (n,) share of the cluster's images that are farther from its centre, in [0, 1]
    isolation: NDArray[np.float32]  # (n,) mean 1 - cosine to the 10 nearest images that are no copies
    outlier: NDArray[np.float32]  # (n,) share of all images that are less isolated, in [0, 1]
    is_outlier: NDArray[np.bool_]  # (n,) far more isolated than is usual here


def scores(
    vectors: Vectors, tree: Tree, nearest: tuple[NDArray[np.int32], NDArray[np.float32]], group: NDArray[np.int32]
) -> Scores:
    """Compute them.

    Args:
        vectors: unit rows, n > 0.
        tree: of them.
        nearest: neighbours (n, k) and their cosines.
        group: (n,) number of the group of copies, -1 for none.
    """
    n = len(vectors)
    centres = torch.from_numpy(tree.centres)
    own, second = np.empty(n, np.float32), np.zeros(n, np.float32)
    runner_up = np.full(n, -1, np.int32)
    for start, part in vectors.blocks():
        rows = slice(start, start + len(part))
        cosine = part @ centres.T
        mine = torch.from_numpy(tree.fine[rows].astype(np.int64))[:, None]
        own[rows] = cosine.gather(1, mine)[:, 0].numpy()
        if len(centres) > 1:
            value, index = cosine.scatter(1, mine, -torch.inf).max(dim=1)
            second[rows], runner_up[rows] = value.numpy(), index.numpy()
    isolation = _isolation(*nearest, group)
    usual = np.median(isolation)
    spread = 1.4826 * np.median(np.abs(isolation - usual))
    outlier = _share_below(isolation)
    return Scores(
        distance=1 - own,
        runner_up=runner_up,
        margin=np.maximum(own - second, 0) if len(centres) > 1 else np.zeros(n, np.float32),
        typicality=_typicality(own, tree.fine),
        isolation=isolation,
        outlier=outlier,
        is_outlier=(isolation > usual + _OUTLIER_SPREADS * spread) & (outlier >= 1 - max(_OUTLIER_SHARE, 5 / n)),
    )


def _isolation(rows: NDArray[np.int32], cosines: NDArray[np.float32], group: NDArray[np.int32]) -> NDArray[np.float32]:
    """Mean distance to the nearest images, copies left out; an image with copies alone around it is not isolated."""
    counts = rows >= 0
    counts &= ~((group[:, None] >= 0) & (group[rows] == group[:, None]))
    counts &= counts.cumsum(axis=1) <= _NEAREST
    total = np.maximum(counts.sum(axis=1), 1)
    return (np.where(counts, 1 - cosines, 0).sum(axis=1) / total).astype(np.float32)


def _share_below(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) share of the other values that are smaller."""
    return (np.searchsorted(np.sort(values), values) / max(len(values) - 1, 1)).astype(np.float32)


def _typicality(cosine: NDArray[np.float32], fine: NDArray[np.int32]) -> NDArray[np.float32]:
    order = np.lexsort((cosine, fine))
    begins = np.searchsorted(fine[order], np.arange(fine.max() + 2))
    typicality = np.empty(len(fine), np.float32)
    rank = np.arange(len(fine)) - begins[fine[order]]
    others = np.maximum(np.diff(begins)[fine[order]] - 1, 1)
    typicality[order] = np.where(np.diff(begins)[fine[order]] == 1, 1.0, rank / others)
    return typicality
