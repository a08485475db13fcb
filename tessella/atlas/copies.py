"""Exact and near copies within a set: a perceptual hash proposes pairs, the signature and the features decide.

    same bytes (sha256)                                               -> exact copies
    8 nearest by what mirroring and quarter turns leave unchanged,    -> pairs -> near copies, if alike in pixels, or
    whole images and parts of them; and the nearest by features          fairly alike in pixels and in features

Both thresholds follow from the set, from how far apart the nearest of different images usually are
(`ops.near_copies.threshold_for`); with features at most half as far apart as is usual, pixels may differ more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tessella.atlas.neighbours import EXACT_UP_TO, exact_neighbours, neighbours
from tessella.atlas.shards import Vectors
from tessella.ops.near_copies import CUTS, ORIENTATIONS, invariants, pair_similarity, threshold_for

VERSION = 1
_PROPOSED = 8  # partners of an image, of each kind
_PAIRS = 1 << 15  # compared at a time
# How far apart signatures of copies may be, in units of what `threshold_for` allows among all pairs: here only
# proposed pairs are compared.
_PIXELS_ALONE, _PIXELS_AND_FEATURES = 1.3, 2.5
_CERTAIN = 0.97  # pixels so alike need no features

PAIR = np.dtype([("first", "i4"), ("second", "i4"), ("pixels", "f4"), ("features", "f4"), ("turned", "i1")])


class Copies(NamedTuple):
    """Which images are copies of which."""

    pairs: NDArray[np.void]  # (p,) of type `PAIR`, first < second; `features` NaN where there are none
    group: NDArray[np.int32]  # (n,) number of the group of copies; -1 for an image that has none
    exact: NDArray[np.int32]  # (n,) number of the group of equal files; -1

    def why(self, first: int, second: int) -> str:
        """What a pair's images have in common, in words."""
        if self.exact[first] >= 0 and self.exact[first] == self.exact[second]:
            return "the same file"
        pair = self.pairs[(self.pairs["first"] == min(first, second)) & (self.pairs["second"] == max(first, second))]
        if not len(pair):
            return "a copy of a copy"
        turned = ORIENTATIONS[int(pair["turned"][0])]
        return f"{turned or 'near copy'}, {100 * float(pair['pixels'][0]):.0f} % alike"

    def groups(self, sizes: NDArray[np.int32], sharpness: NDArray[np.float32]) -> list[NDArray[np.int64]]:
        """Rows of each group, the one to keep first: of most pixels, and of these the sharpest.

        Args:
            sizes: (n, 2) width and height.
            sharpness: (n,) of `look`; NaN counts as least.
        """
        area = sizes.astype(np.int64).prod(axis=1)
        rows = np.flatnonzero(self.group >= 0)
        rows = rows[np.lexsort((rows, -np.nan_to_num(sharpness[rows]), -area[rows], self.group[rows]))]
        return [part for part in np.split(rows, np.flatnonzero(np.diff(self.group[rows])) + 1) if len(part)]


def find_copies(
    hashes: NDArray[np.uint8],
    signatures: NDArray[np.float16],
    vectors: Vectors | None = None,
    nearest: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None,
    *,
    seed: int = 0,
    done: Callable[[int], None] = lambda rows: None,
) -> Copies:
    """Find all copies.

    Args:
        hashes: (n, 32) of the files.
        signatures: (n, 3, 80) of `ops.near_copies`.
        vectors: features of the images; without them the pixels decide alone.
        nearest: neighbours by features, rows (n, k) and cosines (n, k).
        seed: of the sample that the search by clusters needs for large sets.
        done: called with numbers of rows that are searched; 3 n in all, n for more than `EXACT_UP_TO` rows.
    """
    n = len(hashes)
    exact = _groups_of_equal(hashes)
    first, second = _proposals(signatures, None if nearest is None else nearest[0], seed, done)
    apart = 1 - threshold_for(torch.from_numpy(_sampled(signatures)).float())
    at_least = 1 - _PIXELS_ALONE * apart
    near_features = np.inf
    if nearest is not None and n > 1:
        near_features = 1 - (1 - float(np.quantile(nearest[1][:, 0], 0.25))) / 2
    with_features = 1 - _PIXELS_AND_FEATURES * apart
    parts = [np.empty(0, PAIR)]
    for start in range(0, len(first), _PAIRS):
        a, b = first[start : start + _PAIRS], second[start : start + _PAIRS]
        alike, turned = pair_similarity(torch.from_numpy(signatures[a]), torch.from_numpy(signatures[b]))
        pixels = alike.numpy()
        chosen = pixels >= min(at_least, with_features)
        a, b, pixels, turns = a[chosen], b[chosen], pixels[chosen], turned.numpy()[chosen]
        cosines = np.full(len(a), np.nan, np.float32)
        if vectors is not None and len(a):
            cosines = (vectors.rows(a.astype(np.int64)) * vectors.rows(b.astype(np.int64))).sum(dim=1).numpy()
        accepted = (pixels >= at_least) | ((pixels >= with_features) & (cosines >= near_features))
        if nearest is not None:  # pixels alone must be certain where features see two different things
            usual = 2 * near_features - 1
            accepted &= (pixels >= _CERTAIN) | (cosines >= usual)
        part = np.empty(int(accepted.sum()), PAIR)
        columns: tuple[NDArray[Any], ...] = (a, b, pixels, cosines, turns)
        for name, column in zip(PAIR.names or (), columns, strict=True):
            part[name] = column[accepted]
        parts.append(part)
    pairs = np.concatenate(parts)
    return Copies(pairs, _groups(pairs, exact), exact)


def _sampled(signatures: NDArray[np.float16]) -> NDArray[np.float16]:
    """Enough of them to say how alike different images are."""
    rows = np.linspace(0, len(signatures) - 1, min(len(signatures), 20_000)).round().astype(np.int64)
    return np.ascontiguousarray(signatures[rows])


def _proposals(
    signatures: NDArray[np.float16], by_features: NDArray[np.int32] | None, seed: int, done: Callable[[int], None]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (first < second) that may be copies, each once."""
    n = len(signatures)
    found = []
    parts = [
        Vectors.of_array(
            np.concatenate([invariants(torch.from_numpy(block[:, cut])).numpy() for block in _blocks(signatures)])
        )
        for cut in range(len(CUTS) if n <= EXACT_UP_TO else 1)
    ]
    if n <= EXACT_UP_TO:
        found += [exact_neighbours(part, _PROPOSED, of=parts[0], done=done)[0] for part in parts]
    else:
        found.append(neighbours(parts[0], _PROPOSED, seed, done)[0][0])
    if by_features is not None:
        found.append(by_features[:, :_PROPOSED])
    codes = [np.empty(0, np.int64)]
    for rows in found:
        there = rows >= 0
        one = np.broadcast_to(np.arange(n)[:, None], rows.shape)[there]
        other = rows[there].astype(np.int64)
        codes.append(np.minimum(one, other) * n + np.maximum(one, other))
    pairs = np.unique(np.concatenate(codes))
    return pairs // n, pairs % n


def _blocks(signatures: NDArray[np.float16], rows: int = 16_384) -> list[NDArray[np.float16]]:
    return [np.asarray(signatures[start : start + rows]) for start in range(0, len(signatures), rows)]


def _groups_of_equal(hashes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(n,) number of each group of equal hashes; -1 for a hash that occurs once."""
    whole = np.ascontiguousarray(hashes).view("V32").ravel()
    _, inverse, counts = np.unique(whole, return_inverse=True, return_counts=True)
    return _numbered(inverse, counts)


def _groups(pairs: NDArray[np.void], exact: NDArray[np.int32]) -> NDArray[np.int32]:
    """Images joined by pairs or by equal files."""
    n = len(exact)
    same = np.flatnonzero(exact >= 0)
    _, position = np.unique(exact[same], return_index=True)
    leader = same[position][exact[same]] if len(same) else same
    rows, columns = np.concatenate([pairs["first"], same]), np.concatenate([pairs["second"], leader])
    _, part = connected_components(coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(n, n)), False)
    return _numbered(part, np.bincount(part))


def _numbered(part: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.int32]:
    """Numbers 0, 1, ... of the parts with several members."""
    number = np.full(len(counts), -1, np.int32)
    number[counts > 1] = np.arange(int((counts > 1).sum()))
    return number[part]
