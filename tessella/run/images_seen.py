"""Which images a run was trained on: a changed data set is noticed, and the changed images are named.

in every checkpoint       the fingerprint of the index, and hashes of the contents of a few images
RUN/images.safetensors    id, sizes and name of every image; read only to name what has changed
"""

from __future__ import annotations

import hashlib
from pathlib import Path

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
_MOST_IMAGES = 2_000_000  # whose names are stored, some 150 MB; of more, no names can be given
_MOST_NAMES = 10  # in a message
_MOST_CHARACTERS = 120  # of a name in a message


def content_samples(images: ImageSet) -> dict[str, str]:
    """sha256 of the stored bytes of a few images, by stable id.

    Uncompressed images of one size may change without a change of the file's size.
    """
    rows = np.linspace(0, len(images) - 1, min(_SAMPLES, len(images))).astype(int).tolist()
    hashes = {str(int(images.ids[row])): _content(images, row) for row in rows}
    return {image: content for image, content in hashes.items() if content}


def changed_contents(images: ImageSet, before: dict[str, str]) -> list[str]:
    """Names of sampled images that are still there with other contents."""
    rows = np.flatnonzero(np.isin(images.ids, np.array([int(image) for image in before], dtype=np.int64))).tolist()
    now = {row: _content(images, row) for row in rows}
    return [images.key(row) for row, content in now.items() if content not in ("", before[str(int(images.ids[row]))])]


def write_names(run: Path, images: ImageSet) -> None:
    """Store what `changes` needs, unless it is there already.

    Raises:
        UserError: the disk is full.
    """
    if len(images) > _MOST_IMAGES or known_images(run)[0] == images.fingerprint:
        return
    name_bytes, offsets = images.index.encoded_keys
    tensors = {
        "ids": _tensor(images.ids),
        "looks": _tensor(_sizes(images)),
        "name_bytes": _tensor(name_bytes),
        "name_offsets": _tensor(offsets),
        "fingerprint": _tensor(np.frombuffer(images.fingerprint.encode(), dtype=np.uint8)),
    }
    files.write_tensors(run / NAME, tensors)


def changes(run: Path, images: ImageSet, fingerprint: str, other_contents: list[str]) -> str:
    """What was added, removed or encoded again since a checkpoint, in words, with up to ten names.

    Args:
        run: the run folder.
        images: as they are now.
        fingerprint: of the images in the checkpoint.
        other_contents: from `changed_contents`.
    """
    added, removed, encoded_again = [], [], set(other_contents)
    if fingerprint != images.fingerprint and known_images(run)[0] == fingerprint:
        saved = {name: tensor.numpy() for name, tensor in load_file(run / NAME).items()}
        _, now, before = np.intersect1d(images.ids, saved["ids"], return_indices=True)
        other_sizes = (_sizes(images)[now] != saved["looks"][before]).any(axis=1)
        encoded_again |= {images.key(row) for row in now[other_sizes].tolist()}
        added = [images.key(row) for row in np.flatnonzero(~np.isin(images.ids, saved["ids"])).tolist()]
        removed = [_name(saved, row) for row in np.flatnonzero(~np.isin(saved["ids"], images.ids)).tolist()]
    parts, left = [], _MOST_NAMES
    for what, names in (("added", added), ("removed", removed), ("encoded again", sorted(encoded_again))):
        if names:
            shown = [printable(name)[:_MOST_CHARACTERS] for name in names[:left]]
            left -= len(shown)
            more = [f"{len(names) - len(shown):,} more"] if len(names) > len(shown) else []
            parts.append(f"{len(names):,} {what} ({', '.join(shown + more)})")
    return "; ".join(parts) or "an image was added, removed or encoded again"


def _content(images: ImageSet, row: int) -> str:
    """The hash of an image's stored bytes; empty if it cannot be read, which the loader reports."""
    try:
        stored = images.read(row)
    except Unreadable:
        return ""
    return hashlib.sha256(stored if isinstance(stored, bytes) else np.ascontiguousarray(stored).tobytes()).hexdigest()


def _sizes(images: ImageSet) -> NDArray[np.int64]:
    """(N, 3) bytes, width, height."""
    return np.column_stack([images.index.byte_sizes, images.sizes]).astype(np.int64)


def _name(saved: dict[str, NDArray[np.int64]], row: int) -> str:
    start, end = saved["name_offsets"][row : row + 2]
    return saved["name_bytes"][start:end].tobytes().decode("utf-8", "backslashreplace")


def known_images(run: Path) -> tuple[str, int]:
    """The fingerprint and number of a run's images; empty and 0 if the file of names is missing or damaged."""
    try:
        files.open_regular(run / NAME).close()  # safetensors would wait for a pipe
        with safe_open(run / NAME, "pt") as file:
            fingerprint = bytes(file.get_tensor("fingerprint").tolist()).decode("ascii", "replace")
            return fingerprint, file.get_slice("ids").get_shape()[0]
    except (OSError, SafetensorError, ValueError, IndexError):
        return "", 0


def _tensor(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(values))
