"""A pack: smaller copies of the images; `tessella pack` writes it (`data.pack`), this module reads it.

    PACK/pack.json         settings, source, classes, size and sha256 of every shard; written last: no pack without it
    PACK/index/*.npy       columns of the index, memory-mapped as they are
    PACK/shard-00000.tar   JPEGs named by the row that they had in the source

Keys are those of the source, so that ids, and with them every random decision about an image, stay the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tessella import files
from tessella.data.index import Index, labels_by_folder, read_columns
from tessella.data.sources.archives import TarImages
from tessella.data.sources.images import Request
from tessella.data.sources.messages import part_not_found, with_parents
from tessella.data.sources.tars import Archives
from tessella.errors import UserError
from tessella.text import printable

FORMAT = 2
DESCRIPTION, PACKING, COLUMNS = "pack.json", "packing.json", "index"  # PACKING: of an unfinished pack

_NEEDED = {"ids", "sizes", "labels", "byte_sizes", "key_bytes", "key_offsets", "source_archive", "source_offset"}
_MAX_DESCRIPTION_BYTES = 2**31
_KEYS_FOR_HINTS = 100_000  # keys whose folders are proposed instead of a missing part


def is_pack(path: str) -> bool:
    """Whether a folder is a pack, or one that is being written."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (DESCRIPTION, PACKING))


def open_pack(request: Request) -> TarImages:
    """Open a pack as a set of images; its part is a folder of the images that were packed.

    Raises:
        UserError: the pack is unfinished, damaged or of another format, or has no such part.
    """
    folder = Path(request.path)
    description = read_description(folder)
    shards = [folder / shard["file"] for shard in description["shards"]]
    for file, shard in zip(shards, description["shards"], strict=True):
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            state = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
            raise UserError(f"{printable(str(file))} {state}: copy the pack again, or pack the images again")
    index = Index(_columns(folder, description), description)
    if request.part:
        index = _part(request.data, index, request.part)
    return TarImages(request.data, index, request.labels, Archives([str(file) for file in shards]))


def read_description(folder: Path) -> dict[str, Any]:
    """The content of `pack.json`.

    Raises:
        UserError: it is missing, not readable, or of another format.
    """
    path = folder / DESCRIPTION
    if not os.path.lexists(path):
        raise UserError(
            f"{printable(str(folder))} is a pack that is not finished: give the same `tessella pack` once more"
        )
    try:
        content = files.read_json(path, _MAX_DESCRIPTION_BYTES)
        number = content["format"]
        whole = number != FORMAT or _is_description(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        number, whole = FORMAT, False
    if not whole:
        raise UserError(f"{printable(str(path))} is damaged: copy the pack again, or pack the images again")
    if number != FORMAT:
        raise UserError(
            f"{printable(str(folder))} is a pack of format {printable(str(number))[:20]}; this version reads format "
            f"{FORMAT}: pack the images again"
        )
    return content


def _is_description(content: dict[str, Any]) -> bool:
    """Whether every value that is used later is of its type; may fail with any error of another type."""
    shards, texts = content["shards"], [content["fingerprint"], content["source"], *content["classes"]]
    texts += [shard["sha256"] for shard in shards] + [text for pair in content["unreadable"] for text in pair]
    counts = [content[name] for name in ("images", "source_bytes", "bytes", "kept", "short_side", "quality")]
    counts += [shard["bytes"] for shard in shards]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(count) is int and count >= 0 for count in counts)
        and all(len(pair) == 2 for pair in content["unreadable"])
        and all(Path(shard["file"]).name == shard["file"] for shard in shards)
        and (content["psnr"] is None or isinstance(content["psnr"], float))
        and set(content["columns"]) == _NEEDED
    )


def _columns(folder: Path, description: dict[str, Any]) -> dict[str, Any]:
    try:
        columns = read_columns(folder / COLUMNS, description["columns"])
        _check_columns(columns, description["images"], len(description["classes"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the index of {printable(str(folder))} is damaged ({printable(str(error))[:200]}): copy the pack again, "
            "or pack the images again"
        ) from None
    return columns


def _check_columns(columns: dict[str, Any], rows: int, classes: int) -> None:
    """Raise a ValueError for arrays that are no index."""
    shapes = {name: (rows,) for name in _NEEDED} | {"key_offsets": (rows + 1,), "sizes": (rows, 2)}
    shapes["key_bytes"] = (columns["key_bytes"].size,)
    for name, column in columns.items():
        if column.shape != shapes[name] or not np.issubdtype(column.dtype, np.integer):
            raise ValueError(f"{name}.npy is an array of {column.dtype} {column.shape}")
    offsets, labels = columns["key_offsets"], columns["labels"]
    for name, right in {
        "key_offsets": offsets[0] == 0 and offsets[-1] == len(columns["key_bytes"]) and (np.diff(offsets) >= 0).all(),
        "sizes": rows == 0 or columns["sizes"].min() > 0,
        "labels": rows == 0 or -1 <= labels.min() <= labels.max() < max(1, classes),
        "ids": rows == 0 or (columns["ids"].min() >= 0 and len(np.unique(columns["ids"])) == rows),
    }.items():
        if not right:
            raise ValueError(f"{name}.npy holds impossible values")


def _part(data: str, index: Index, part: str) -> Index:
    """The images below a folder; keys, ids and classes are those that the folder itself would have."""
    below = f"{part}/"
    rows = [row for row in range(len(index)) if index.key(row).startswith(below)]
    if not rows:
        folders = {index.key(row).rpartition("/")[0] for row in range(min(len(index), _KEYS_FOR_HINTS))}
        raise UserError(part_not_found(data, part, with_parents(folders)))
    keys = [index.key(row).removeprefix(below) for row in rows]
    labels, classes = labels_by_folder(keys)
    unreadable = [(key.removeprefix(below), reason) for key, reason in index.unreadable if key.startswith(below)]
    sizes, byte_sizes = index.sizes[rows], index.byte_sizes[rows]
    places = {f"source_{name}": index.column(name)[rows] for name in ("archive", "offset")}
    return Index.of(
        keys, sizes, byte_sizes=byte_sizes, labels=labels, classes=classes, unreadable=unreadable, columns=places
    )
