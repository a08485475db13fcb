"""Philox4x32-10: random numbers as a pure function of a key and a counter, vectorised in NumPy.

Every random decision of a run (sample order, crops, colours, JigClu's permutation) is drawn here from counters such
as (seed, epoch, image id, view), so neither workers nor ranks nor a restart can change it, and no generator state
has to be saved. NumPy's own Philox is a sequential stream per generator; what is needed here is one draw at each of
many counters, without a Python loop.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 16  # of `shuffled`; with 8 the orders of five things are not equally likely, with 12 those of six


def philox(key: tuple[int, int], counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]) -> NDArray[np.uint64]:
    """Four independent 32-bit words at each counter: (4, *shape) uint64. The counter is four arrays that broadcast."""
    words = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    a, b, c, d = words
    key_0, key_1 = key
    for _ in range(10):
        product_0, product_1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (product_1 >> _SHIFT) ^ b ^ np.uint64(key_0)
        c = (product_0 >> _SHIFT) ^ d ^ np.uint64(key_1)
        b, d = product_1 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (key_1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack((a, b, c, d))


def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """Key of a named stream, so that two uses of one seed never share numbers.

    The seed lies in [0, 2**64); the name has at most four ASCII letters.
    """
    name = int.from_bytes(stream.encode("ascii").ljust(4)[:4], "little")
    return seed & 0xFFFFFFFF, ((seed >> 32) ^ name) & 0xFFFFFFFF


def uniforms(key: tuple[int, int], ids: ArrayLike, epoch: int, lanes: ArrayLike, count: int) -> NDArray[np.float64]:
    """`count` numbers in the open interval (0, 1) for each (id, lane).

    Args:
        key: from `stream_key`.
        ids: (n,) non-negative 64-bit ids.
        epoch: 0 <= epoch < 2**32.
        lanes: (m,) ints in [0, 2**24), for example view numbers.
        count: numbers per (id, lane), at most 1024.

    Returns:
        (n, m, count) float64.
    """
    ids64 = np.asarray(ids).astype(np.uint64)[:, None, None]
    lanes64 = np.asarray(lanes).astype(np.uint64)[None, :, None]
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    words = philox(key, (ids64 & _LOW, ids64 >> _SHIFT, np.uint64(epoch), (lanes64 << np.uint64(8)) | blocks))
    words = np.moveaxis(words, 0, -1).reshape(*words.shape[1:3], -1)[..., :count]
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def permutation(key: tuple[int, int], ids: ArrayLike, epoch: int) -> NDArray[np.int64]:
    """A random order of (n,) distinct non-negative 64-bit ids: positions by each id's own random number, (n,) int64.

    Two ids keep their relative order when others come or go. No library's shuffle algorithm is involved, so the order
    does not change with versions. The key is from `stream_key`; 0 <= epoch < 2**32.
    """
    ids64 = np.asarray(ids).astype(np.uint64)
    high, low, _, _ = philox(key, (ids64 & _LOW, ids64 >> _SHIFT, np.uint64(epoch), np.uint64(0)))
    return np.argsort((high << _SHIFT) | low, kind="stable").astype(np.int64)


def shuffled(
    key: tuple[int, int], positions: ArrayLike, count: ArrayLike, epoch: int, lanes: ArrayLike = 0
) -> NDArray[np.int64]:
    """Which of `count` things comes at each position of a random order, without drawing the whole order.

    A keyed permutation of range(count): time and memory depend on the number of positions, not on `count`.
    It is a Feistel network on a grid of about sqrt(count) rows and columns; a number that lands in a cell beyond
    `count` goes through it again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The round keys
    are Philox's, the round function is the finaliser of SplitMix64.

    Args:
        key: from `stream_key`.
        positions: ints in [0, count).
        count: number of things, in [1, 2**52); one for all positions, or one for each.
        epoch: 0 <= epoch < 2**32; another epoch is another order.
        lanes: ints in [0, 2**32), one for all positions or one for each; another lane is another order.

    Returns:
        int64 numbers in [0, count), in the shape of `positions`; distinct positions of one lane have distinct ones.
    """
    shape = np.shape(positions)
    result = np.array(positions, dtype=np.uint64).ravel()
    counts = np.broadcast_to(np.asarray(count, dtype=np.uint64), shape).ravel()
    high, low, _, _ = philox(key, (np.arange(_ROUNDS)[:, None], np.ravel(lanes), epoch, 0))
    keys = np.broadcast_to((high << _SHIFT) | low, (_ROUNDS, len(result)))
    columns = np.ceil(np.sqrt(counts.astype(np.float64))).astype(np.uint64)
    rows = (counts + columns - np.uint64(1)) // columns
    waiting = np.arange(len(result))
    while len(waiting):
        height, width = rows[waiting], columns[waiting]
        row, column = result[waiting] // width, result[waiting] % width
        for number in range(0, _ROUNDS, 2):
            row = (row + _mixed(column + keys[number, waiting])) % height
            column = (column + _mixed(row + keys[number + 1, waiting])) % width
        result[waiting] = row * width + column
        waiting = waiting[result[waiting] >= counts[waiting]]
    return result.astype(np.int64).reshape(shape)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each word's bits spread over all 64. Steele, Lea, Flood, "Fast splittable pseudorandom generators", 2014."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
