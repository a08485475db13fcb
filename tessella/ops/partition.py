"""A fixed random split of a data set, as a pure function of (images, parts, seed)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tessella.ops.philox import shuffled, stream_key

_AT_ONCE = 2**20  # rows, so that a hundred million take a hundred megabytes to cut, beside the result


def partition(images: int, parts: int, seed: int) -> NDArray[np.int32]:
    """Cut the rows of a data set into disjoint random parts whose sizes differ by at most one.

    Args:
        images: number of rows N, 0 or more.
        parts: C, at least 1.
        seed: of the split, 0 <= seed < 2**64.

    Returns:
        (N,) the part of each row, in [0, C). The first N % C parts have one row more than the others.
    """
    part = np.empty(images, dtype=np.int32)
    for start in range(0, images, _AT_ONCE):
        places = np.arange(start, min(start + _AT_ONCE, images))
        part[_row_at(places, images, seed)] = places % parts
    return part


def rows_of_part(part: NDArray[np.int64], numbers: NDArray[np.int64], images: int, parts: int, seed: int) -> NDArray:
    """Rows of the data set, (n,) int64, by part (n,) and number within it (n,), without computing the whole split.

    `images`, `parts` and `seed` are as for `partition`.
    """
    return _row_at(part + parts * numbers, images, seed)


def _row_at(places: NDArray[np.int64], images: int, seed: int) -> NDArray[np.int64]:
    """One random order of all rows; part k is every C-th row of it, from the k-th on.

    Not runs of consecutive rows, which would follow the classes of a folder that is sorted by class.
    """
    return shuffled(stream_key(seed, "part"), places, images, 0)
