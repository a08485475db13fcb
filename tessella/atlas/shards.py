"""Arrays of a million rows in files of some thousand: what a killed stage has written stays, memory stays flat.

A shard is one .npy file, written whole or not at all; nothing in it is executed when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from tessella import files
from tessella.errors import UserError

SHARD = 2048  # rows


class Shards:
    """Rows 0 .. n - 1 of one array, in the files 00000.npy, 00001.npy, ... of a folder.

    Args:
        folder: of the shards, within `atlas`.
        atlas: the folder above, of which nothing on the way may be a link.
        rows: n.
    """

    def __init__(self, folder: Path, atlas: Path, rows: int) -> None:
        self.folder, self.atlas, self.rows = folder, atlas, rows

    def __len__(self) -> int:
        return -(-self.rows // SHARD)

    def span(self, number: int) -> range:
        """Rows of a shard."""
        return range(number * SHARD, min((number + 1) * SHARD, self.rows))

    def missing(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        return [number for number in range(len(self)) if not self.path(number).is_file()]

    def path(self, number: int, ending: str = ".npy") -> Path:
        """The file of a shard."""
        return self.folder / f"{number:05d}{ending}"

    def write(self, number: int, array: NDArray[Any]) -> None:
        """Write one shard, its rows in order."""
        write_array(self.path(number), array, self.atlas)

    def read(self, number: int, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """One shard, as a map of its file.

        Raises:
            UserError: it is missing, damaged, or of another type or length.
        """
        return read_array(self.path(number), len(self.span(number)), dtype)

    def column(self, name: str, dtype: DTypeLike) -> NDArray[Any]:
        """One field of all rows in memory."""
        parts = [np.asarray(self.read(number, dtype)[name]) for number in range(len(self))]
        return np.concatenate(parts) if parts else np.empty(0)


class Vectors:
    """Feature vectors, on disk or in memory, given out as unit rows.

    Args:
        parts: (`SHARD`, d) float32 each, the last with fewer rows.
    """

    def __init__(self, parts: Sequence[NDArray[np.float32]]) -> None:
        self._maps = list(parts)
        self.dim = self._maps[0].shape[1]
        self._length = sum(map(len, self._maps))

    @classmethod
    def of_shards(cls, shards: Shards) -> Vectors:
        """What a stage has written."""
        parts = [shards.read(number, np.float32) for number in range(len(shards))]
        if len({part.shape[1:] for part in parts}) != 1 or parts[0].ndim != 2:
            raise UserError(f"{shards.folder} does not hold features of one length: remove it, and explore again")
        return cls(parts)

    @classmethod
    def of_array(cls, x: NDArray[np.float32]) -> Vectors:
        """(n, d), n > 0, in memory."""
        return cls([x[start : start + SHARD] for start in range(0, len(x), SHARD)])

    def __len__(self) -> int:
        return self._length

    def blocks(self, size: int = SHARD) -> Iterator[tuple[int, Tensor]]:
        """First row and (at most size, d) unit rows, in order; `size` is a multiple or a part of a shard."""
        for start in range(0, len(self), size):
            yield start, self.rows(range(start, min(start + size, len(self))))

    def rows(self, rows: range | NDArray[np.int64]) -> Tensor:
        """(m, d) unit rows; a row of zeros stays one."""
        if isinstance(rows, range):
            first, last = rows.start // SHARD, max(rows.stop - 1, 0) // SHARD
            parts = [
                self._maps[i][max(rows.start - i * SHARD, 0) : rows.stop - i * SHARD] for i in range(first, last + 1)
            ]
            found = np.concatenate(parts)
        else:
            found = np.empty((len(rows), self.dim), np.float32)
            order = np.argsort(rows, kind="stable")
            cuts = np.searchsorted(rows[order], np.arange(len(self._maps) + 1) * SHARD)
            for i in np.flatnonzero(np.diff(cuts)):
                places = order[cuts[i] : cuts[i + 1]]
                found[places] = self._maps[i][rows[places] - i * SHARD]
        return F.normalize(torch.from_numpy(found), dim=1)


def write_array(path: Path, array: NDArray[Any], atlas: Path) -> None:
    """Write a .npy file within an atlas, whole or not at all."""
    with files.writing(path, inside=atlas, needed=array.nbytes, lasting=False) as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path, rows: int | None = None, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """A .npy file as a map.

    Raises:
        UserError: missing, damaged, or of another type or length.
    """
    try:
        with files.open_regular(path) as file:  # refuses pipes, devices and files of holes
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError("format")
            shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
            if kind.hasobject or fortran or (dtype is not None and kind != np.dtype(dtype)):
                raise ValueError(f"type {kind}")
            if not shape or (rows is not None and shape[0] != rows):
                raise ValueError(f"shape {shape}")
            if int(np.prod(shape)) == 0:
                return np.empty(shape, kind)
            return np.memmap(file, kind, "r", file.tell(), shape)  # type: ignore[call-overload,no-any-return]
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be used ({error}): remove it, and run `tessella explore` again") from None
