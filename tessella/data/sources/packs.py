"""A pack: images encoded anew, smaller, once; `tessella pack` writes it (`data.pack`), this reads it.

    PACK/pack.json         settings, source, classes, size and sha256 of every shard; written last: no pack without it
    PACK/index/*.npy       columns of the index, memory-mapped as they are
    PACK/shard-00000.tar   JPEGs named by the row that they had in the source

Keys are the source's, so that ids, and with them every random decision about an image, stay what they were.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tessella.data.index import Index, columns_of
from tessella.data.sources.archives import TarImages
from tessella.data.sources.messages import part_not_found, shown
from tessella.data.sources.tars import Archives
from tessella.errors import UserError
from tessella.files import open_regular, read_json

FORMAT = 1
DESCRIPTION, PACKING, COLUMNS = "pack.json", "packing.json", "index"  # PACKING: one that is being written

_NEEDED = {"ids", "sizes", "labels", "byte_sizes", "key_bytes", "key_offsets", "source_archive", "source_offset"}
_DESCRIPTION_BYTES = 1 << 30  # which names every unreadable image
_LEVELS_LISTED = 100_000  # keys that are looked at for parts to propose


def is_pack(path: str) -> bool:
    """Whether a folder is a pack, or one that is being written."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (DESCRIPTION, PACKING))


def open_pack(data: str, path: str, part: str | None, labels: bool) -> TarImages:
    """Open a pack as a set of images.

    Args:
        data: the source as given, for reports.
        path: of the pack.
        part: a folder of the images that were packed, or None.
        labels: show the classes.

    Raises:
        UserError: the pack is unfinished, damaged or of another format, or has no such part.
    """
    folder = Path(path)
    description = read_description(folder)
    shards = [folder / shard["file"] for shard in description["shards"]]
    for file, shard in zip(shards, description["shards"], strict=True):
        found = file.stat().st_size if file.is_file() else None
        if found != shard["bytes"]:
            state = "is missing" if found is None else f"has {found:,} bytes instead of {shard['bytes']:,}"
            raise UserError(f"{shown(str(file))} {state}: copy the pack again, or pack the images anew")
    index = Index(_columns(folder, description), description)
    if part:
        index = _part(data, index, part)
    return TarImages(data, index, labels, Archives([str(file) for file in shards]))


def read_description(folder: Path) -> dict[str, Any]:
    """The content of `pack.json`.

    Raises:
        UserError: it is missing, not readable, or of another format.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise UserError(f"{shown(str(folder))} is a pack that is not finished: give the same `tessella pack` once more")
    try:
        content = read_json(path, _DESCRIPTION_BYTES)
        number = content["format"]
        names = [shard["file"] for shard in content["shards"] if isinstance(shard["bytes"], int)]
        whole = len(names) == len(content["shards"]) and all(Path(name).name == name for name in names)
        whole &= isinstance(content["classes"], list) and isinstance(content["fingerprint"], str)
        whole &= all(len(entry) == 2 for entry in content["unreadable"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        number, whole = FORMAT, False
    if not whole:
        raise UserError(f"{shown(str(path))} is damaged: copy the pack again, or pack the images anew")
    if number != FORMAT:
        raise UserError(f"{shown(str(folder))} is a pack of format {number!r}; this version reads format {FORMAT}")
    return content


def _columns(folder: Path, description: dict[str, Any]) -> dict[str, Any]:
    try:
        for name in _NEEDED:
            open_regular(folder / COLUMNS / f"{name}.npy").close()  # numpy would wait for a pipe
        columns = {
            name: np.load(folder / COLUMNS / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _NEEDED
        }
        rows = description["images"]
        lengths = {name: rows for name in _NEEDED} | {"key_offsets": rows + 1}
        lengths["key_bytes"] = int(columns["key_offsets"][-1])
        if any(len(columns[name]) != length for name, length in lengths.items()):
            raise ValueError("columns of different lengths")
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"the index of {shown(str(folder))} is damaged ({error}): copy the pack again, or pack the images anew"
        ) from None
    return columns


def _part(data: str, index: Index, part: str) -> Index:
    """The images below a folder; keys, ids and classes are those that the folder itself would have."""
    below = f"{part}/"
    rows = [row for row in range(len(index)) if index.key(row).startswith(below)]
    if not rows:
        known = (index.key(row).split("/")[:-1] for row in range(min(len(index), _LEVELS_LISTED)))
        folders = {"/".join(names[: depth + 1]) for names in known for depth in range(len(names))}
        raise UserError(part_not_found(data, part, sorted(folders)))
    keys = [index.key(row).removeprefix(below) for row in rows]
    names = [key.partition("/")[0] if "/" in key else None for key in keys]
    classes = sorted({name for name in names if name is not None})
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([-1 if name is None else number[name] for name in names])
    columns = columns_of(
        [key.encode("utf-8", "surrogateescape") for key in keys], index.sizes[rows], index.byte_sizes[rows], labels
    )
    for name in ("archive", "offset"):
        columns[f"source_{name}"] = index.column(name)[rows]
    unreadable = [(key.removeprefix(below), why) for key, why in index.unreadable if key.startswith(below)]
    return Index.of_columns(columns, classes, unreadable)
