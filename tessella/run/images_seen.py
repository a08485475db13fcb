"""Which images a run was trained on: a changed data set is noticed, and told by name.

in every checkpoint       the fingerprint of the index, and hashes of the contents of a few images
RUN/images.safetensors    id, look and name of every image; read only to say what has changed
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tessella import files
from tessella.data.decode import Unreadable
from tessella.data.sources import ImageSet
from tessella.text import printable

NAME = "images.safetensors"

_SAMPLES = 16  # evenly spaced images whose contents are hashed at every start
_MOST = 2_000_000  # images whose names are kept, some 150 MB; of more, only that something changed can be told
_MOST_NAMES = 10  # in a message
_LINE = 120  # characters of a name in a message


class Difference(NamedTuple):
    """Names of images that came, went, or were encoded anew."""

    added: list[str]
    removed: list[str]
    encoded_anew: list[str]


def content_samples(images: ImageSet) -> dict[str, str]:
    """sha256 of the stored bytes of a few images, by stable id.

    File sizes alone do not show that uncompressed images of one size were made anew.
    """
    rows = np.linspace(0, len(images) - 1, min(_SAMPLES, len(images))).astype(int).tolist()
    found = {str(int(images.ids[row])): _content(images, row) for row in rows}
    return {image: content for image, content in found.items() if content}


def _content(images: ImageSet, row: int) -> str:
    """Empty if it cannot be read; whether that matters, the loader decides."""
    try:
        stored = images.read(row)
    except Unreadable:
        return ""
    return hashlib.sha256(stored if isinstance(stored, bytes) else np.ascontiguousarray(stored).tobytes()).hexdigest()


def remember(run: Path, images: ImageSet) -> None:
    """Keep what `difference` needs, unless it is there already.

    Raises:
        UserError: the disk is full.
    """
    path = run / NAME
    if len(images) > _MOST or _fingerprint_in(path) == images.fingerprint:
        return
    name_bytes, offsets = images.index.encoded_keys
    tensors = {
        "ids": _tensor(images.ids),
        "looks": _tensor(_looks(images)),
        "name_bytes": _tensor(name_bytes),
        "name_offsets": _tensor(offsets),
        "fingerprint": _tensor(np.frombuffer(images.fingerprint.encode(), dtype=np.uint8)),
    }
    files.write_tensors(path, tensors)


def difference(run: Path, images: ImageSet, before: str) -> Difference | None:
    """What came, went or changed between two states of a data set.

    Args:
        run: the run folder.
        images: as they are now.
        before: fingerprint of the images as they were.

    Returns:
        None if the run folder does not tell.
    """
    path = run / NAME
    if _fingerprint_in(path) != before:
        return None
    saved = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    now = {int(image): row for row, image in enumerate(images.ids)}
    looks, then = _looks(images), {int(image): row for row, image in enumerate(saved["ids"])}
    common = [(now[image], row) for image, row in then.items() if image in now]
    return Difference(
        [images.key(row) for image, row in now.items() if image not in then],
        [_name(saved, row) for image, row in then.items() if image not in now],
        [images.key(row) for row, old in common if (looks[row] != saved["looks"][old]).any()],
    )


def in_words(found: Difference | None, contents: list[str]) -> str:
    """A difference for people, with ten names at most.

    Args:
        found: from `difference`.
        contents: names of images of which only the contents are known to have changed.
    """
    parts, left = [], _MOST_NAMES
    anew = sorted({*(found.encoded_anew if found else []), *contents})
    for what, names in (
        ("added", found.added if found else []),
        ("removed", found.removed if found else []),
        ("encoded anew", anew),
    ):
        if names:
            shown = [printable(name)[:_LINE] for name in names[:left]]
            left -= len(shown)
            more = [f"{len(names) - len(shown):,} more"] if len(names) > len(shown) else []
            parts.append(f"{len(names):,} {what} ({', '.join(shown + more)})")
    return "; ".join(parts) or "an image was added, removed or encoded anew"


def changed_contents(images: ImageSet, before: dict[str, str]) -> list[str]:
    """Names of images that are still there with other contents, among those that were sampled."""
    rows = np.flatnonzero(np.isin(images.ids, np.array([int(image) for image in before], dtype=np.int64))).tolist()
    now = {row: _content(images, row) for row in rows}
    return [images.key(row) for row, content in now.items() if content not in ("", before[str(int(images.ids[row]))])]


def _looks(images: ImageSet) -> NDArray[np.int64]:
    """(N, 3) bytes, width, height: what an index knows of an image besides its name."""
    return np.column_stack([images.index.byte_sizes, images.sizes]).astype(np.int64)


def _name(saved: dict[str, NDArray[np.int64]], row: int) -> str:
    start, end = saved["name_offsets"][row : row + 2]
    return saved["name_bytes"][start:end].tobytes().decode("utf-8", "backslashreplace")


def _fingerprint_in(path: Path) -> str:
    """Of the images that a file is about; empty if it is missing or damaged."""
    try:
        files.open_regular(path).close()  # safetensors would wait for a pipe
        with safe_open(path, "pt") as file:
            return bytes(file.get_tensor("fingerprint").tolist()).decode("ascii", "replace")
    except (OSError, SafetensorError, ValueError):
        return ""


def _tensor(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(values))
