"""A fixed random split of a data set, as a pure function of (images, parts, seed)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tessella.ops.philox import permutation, stream_key


def partition(images: int, parts: int, seed: int) -> NDArray[np.int32]:
    """Cut the rows of a data set into disjoint random parts whose sizes differ by at most one.

    Part k is every `parts`-th row of one permutation, from the k-th on. The file order has no say: a split into runs of
    consecutive rows would follow the classes of a folder that is sorted by class.

    Args:
        images: number of rows N, 0 or more.
        parts: C, at least 1.
        seed: of the split, 0 <= seed < 2**64.

    Returns:
        (N,) the part of each row, in [0, C). The first N % C parts have one row more than the others.
    """
    part = np.empty(images, dtype=np.int32)
    part[permutation(stream_key(seed, "part"), np.arange(images), 0)] = np.arange(images) % parts
    return part
