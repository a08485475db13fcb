"""`tessella duplicates`: exact and near copies of a folder, without an atlas."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessella import files
from tessella.atlas.copies import Copies, find_copies
from tessella.atlas.look import LOOK, look
from tessella.atlas.shards import Shards
from tessella.console import Display
from tessella.data.sources import ImageSet
from tessella.engine.launch import cores_at_hand
from tessella.errors import UserError
from tessella.text import cell, printable


class Group(NamedTuple):
    """Copies of one image; the largest comes first, and is the one to keep."""

    keys: list[str]
    why: list[str]  # what each has in common with the first; "" for the first


class Duplicates(NamedTuple):
    """What `duplicates` has found."""

    images: int
    groups: list[Group]
    unreadable: dict[str, str]

    def lines(self, most: int | None = 20) -> list[str]:
        """For people.

        Args:
            most: groups that are shown; default: all.
        """
        copies = sum(len(group.keys) - 1 for group in self.groups)
        lines = [f"images      {self.images:,}", f"copies      {copies:,} in {len(self.groups):,} groups"]
        lines += [f"unreadable  {len(self.unreadable):,}"] if self.unreadable else []
        for group in self.groups[:most]:
            lines.append(f"  {printable(group.keys[0])}")
            lines += [f"    {printable(key)}  ({why})" for key, why in zip(group.keys[1:], group.why[1:], strict=True)]
        left = len(self.groups) - len(self.groups[:most])
        return lines + ([f"  and {left:,} more groups: give --out FILE.csv"] if left else [])


def duplicates(images: ImageSet, out: Path | None, *, workers: int | None = None) -> Duplicates:
    """Find all copies within a set, by the files and the pixels alone.

    Args:
        images: the set.
        out: a .csv that is written: group, path, keep, why.
        workers: decoding threads.

    Raises:
        UserError: a file is in the way.
    """
    if out is not None and out.exists():
        raise UserError(f"{out} exists already: choose another --out or remove it")
    with tempfile.TemporaryDirectory(prefix="tessella-") as folder:
        shards = Shards(Path(folder) / "look", Path(folder), len(images))
        look(images, shards, workers or cores_at_hand())
        readable = shards.column("readable", LOOK)
        rows = np.flatnonzero(readable)
        hashes, signatures, sharpness = (
            shards.column(name, LOOK)[rows] for name in ("sha256", "signature", "sharpness")
        )
        reasons = shards.column("reason", LOOK)
    with Display("copies", 3 * len(rows)) as display:
        found = find_copies(hashes, signatures, done=display.advance)
    broken = {images.key(int(row)): reasons[row].decode("utf-8", "replace") for row in np.flatnonzero(~readable)}
    result = Duplicates(len(rows), _groups(found, images, rows, sharpness), dict(images.unreadable) | broken)
    if out is not None:
        _write(out, result)
    return result


def _groups(found: Copies, images: ImageSet, rows: NDArray[np.int64], sharpness: NDArray[np.float32]) -> list[Group]:
    groups = []
    for part in found.groups(np.asarray(images.sizes)[rows], sharpness):
        keys = [images.key(int(rows[i])) for i in part]
        groups.append(Group(keys, ["", *(found.why(int(part[0]), int(i)) for i in part[1:])]))
    return groups


def _write(out: Path, result: Duplicates) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "path", "keep", "why"])
    for number, group in enumerate(result.groups, start=1):
        for key, why in zip(group.keys, group.why, strict=True):
            writer.writerow([number, cell(key), "" if why else "keep", why])
    files.make_folder(out.parent.resolve())
    files.write_text(out, text.getvalue())
