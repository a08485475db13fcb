"""Parts of the labelled train images: held out, balanced, a share, or listed in a file."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella import files
from tessella.data.sources import ImageSet
from tessella.errors import UserError
from tessella.files import FileError
from tessella.ops.philox import permutation, stream_key

_LIST_BYTES = 256 << 20  # of a list file; ImageNet's 10 % are 3 MB


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out: `share` in (0, 1) of each class, at least one image, never its only one.

    `labels` are (n,) int64; the result is two sorted int64 tensors, disjoint, together range(n).
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for rows in shuffled_classes(labels, seed, 0):
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[torch.from_numpy(rows[:count])] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def balanced_rows(labels: Tensor, per_class: int, seed: int, draw: int) -> Tensor:
    """Rows of `per_class` > 0 random images of every class of (n,) int64 labels, sorted.

    Draws are numbered from 0; within one draw, fewer images are a part of more.

    Raises:
        UserError: a class has fewer images.
    """
    shuffled = shuffled_classes(labels, seed, draw)
    least = min(len(rows) for rows in shuffled)
    if least < per_class:
        raise UserError(
            f"{per_class} labels per class were asked for, but a class of the train images has only {least}: "
            f"ask for {least} or fewer, or leave this protocol out"
        )
    return torch.from_numpy(np.sort(np.concatenate([rows[:per_class] for rows in shuffled])))


def share_rows(labels: Tensor, share: float, seed: int) -> Tensor:
    """Rows of a random share in (0, 1] of the images, of each class as many as of the others, or all that it has.

    The counts of two classes that have enough images differ by one at most, as in the lists of SimCLR. A smaller share
    is a part of a larger one. `labels` are (n,) int64; the rows are sorted, at least one of each class.
    """
    shuffled = shuffled_classes(labels, seed, 0)
    total = max(round(share * len(labels)), len(shuffled))
    # Round after round, each class gives one image, the classes in an order that the seed decides.
    turn = np.argsort(permutation(stream_key(seed, "turn"), np.arange(len(shuffled)), 0))
    rounds = np.concatenate([np.arange(len(rows)) for rows in shuffled])
    turns = np.repeat(turn, [len(rows) for rows in shuffled])
    chosen = np.lexsort((turns, rounds))[:total]
    return torch.from_numpy(np.sort(np.concatenate(shuffled)[chosen]))


def listed_rows(images: ImageSet, path: Path) -> Tensor:
    """Rows that a list names, as the semi-supervised lists of SimCLR do: one file name per line.

    A line is an image's whole key, its path behind the class's folder, or its name alone. The text before the first
    `_` of a name is its class, as in n01440764_10026.JPEG, which decides between images of one name.

    Raises:
        UserError: the list cannot be read, is empty, or names an image that is not there or not the only one.
    """
    try:
        lines = files.read_text(path, _LIST_BYTES, errors="surrogateescape").splitlines()
    except FileError as error:
        raise UserError(f"the list {path} cannot be read: {error.strerror}; it holds one file name per line") from None
    names = [line.strip().removeprefix("./") for line in lines if line.strip()]
    if not names:
        raise UserError(f"the list {path} is empty: it should hold one file name per line")
    by_key: dict[str, int] = {}
    by_name: dict[str, list[int]] = {}
    for row in range(len(images)):
        key = images.key(row)
        by_key[key] = row
        by_name.setdefault(PurePosixPath(key).name, []).append(row)

    def row_of(line: str) -> int | None:
        name = PurePosixPath(line).name
        for key in (line, f"{name.partition('_')[0]}/{line}"):
            if key in by_key:
                return by_key[key]
        same = by_name.get(name, [])
        return same[0] if len(same) == 1 else None

    rows = [row_of(name) for name in names]
    missing = [name for name, row in zip(names, rows, strict=True) if row is None]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} names in {path} are not, or not clearly, an image of {images.name}, "
            f"for example {missing[0]!r} (an image here is {images.key(0)!r}): give the list that belongs to them"
        )
    return torch.tensor(sorted({row for row in rows if row is not None}))


def shuffled_classes(labels: Tensor, seed: int, draw: int) -> list[NDArray[np.int64]]:
    """Rows of each class that occurs, in a random order that only (seed, draw) decides."""
    order = permutation(stream_key(seed, "pick"), np.arange(len(labels)), draw)
    shuffled = labels.numpy()[order]
    by_class = np.argsort(shuffled, kind="stable")
    return np.split(order[by_class], np.flatnonzero(np.diff(shuffled[by_class])) + 1)
