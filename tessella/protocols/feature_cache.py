"""Features on disk: extracted once, shared by protocols, by later evaluations and by ranks.

    FOLDER/KEY/x.npy (N, d) float32    rows.npy (N,) int64    about.json: sha256 of both, unreadable images

The key covers what decides a feature: every tensor of the backbone, the images, the transform, the kind of device and
torch's version. They are stored as float32, so that no figure depends on whether its features come from here. Readers
map the files: memory does not grow with the number of images. The folder's size is bounded; the entry that was used
least recently is removed first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella import files

_FORMAT = 1  # of the files; another number is another key
_LIMIT = 32 << 30  # bytes of the whole folder: ImageNet's features by a ResNet-50 take 11
_SHARE_OF_FREE = 0.5  # of the disk's free space that one entry may take
_ABOUT_LIMIT = 1 << 30  # bytes of about.json, which names every unreadable image
_ABANDONED_SECONDS = 86_400.0  # a half-written entry that is older was killed


class Stored(NamedTuple):
    """Features of the readable images of a set."""

    x: Tensor  # (N, d) float32, a private map of the file
    rows: NDArray[np.int64]  # (N,) rows of the image set
    skipped: dict[str, str]  # key -> why the image could not be read


def feature_key(digests: dict[str, str], network: str, fingerprint: str, transform: Any, device: torch.device) -> str:
    """Name of an entry.

    Args:
        digests: of every parameter and buffer.
        network: what the modules are, as text; tensors alone do not say what is done with them.
        fingerprint: of the image set.
        transform: anything that JSON can hold.
        device: where the network runs; the last bits of a feature depend on it.
    """
    question = [_FORMAT, digests, network, fingerprint, transform, device.type, torch.__version__]
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:40]


def load(folder: Path, key: str, *, verify: bool = True) -> Stored | None:
    """An entry, if it is there and whole.

    Args:
        folder: of all entries.
        key: from `feature_key`.
        verify: read the files once and compare their hashes; what is damaged counts as absent.
    """
    entry = folder / key
    try:
        files.refuse_link(entry)
        about = files.read_json(entry / "about.json", _ABOUT_LIMIT)
        for name in ("x.npy", "rows.npy"):
            files.open_regular(entry / name).close()  # numpy would wait for a pipe
        if verify and any(files.sha256(entry / name) != about["sha256"][name] for name in ("x.npy", "rows.npy")):
            return None
        # Copy on write: torch refuses arrays that it may not write to.
        x = np.load(entry / "x.npy", mmap_mode="c", allow_pickle=False)
        rows = np.load(entry / "rows.npy", allow_pickle=False)
        os.utime(entry)  # used now
        if x.dtype != np.float32 or x.ndim != 2 or rows.shape != x.shape[:1]:
            return None
        return Stored(torch.from_numpy(x), rows, dict(about["skipped"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(folder: Path, key: str, stored: Stored) -> None:
    """Write an entry whole or not at all, in place of an older one; a full disk costs the entry, not the evaluation."""
    try:
        files.make_folder(folder)
        if not _make_room(folder, stored.x.numel() * 4 + stored.rows.nbytes):
            return
        with files.new_folder(folder / key) as temporary:
            digests = {}
            for name, array in (("x.npy", stored.x.numpy()), ("rows.npy", stored.rows)):
                with files.writing(temporary / name, needed=array.nbytes) as file:
                    np.save(file, array, allow_pickle=False)
                digests[name] = files.sha256(temporary / name)
            files.write_json(temporary / "about.json", {"sha256": digests, "skipped": stored.skipped}, indent=None)
    except OSError as error:
        if not (folder / key).exists():  # else another process was faster
            warnings.warn(
                f"features cannot be stored in {folder} ({error.strerror}), so each evaluation extracts them: set "
                "TESSELLA_CACHE to a folder that can be written",
                stacklevel=2,
            )


def _make_room(folder: Path, needed: int) -> bool:
    """Whether an entry of so many bytes may be written, after the longest unused ones have gone for it."""
    entries = []
    files.remove_unfinished(folder, older_than=_ABANDONED_SECONDS)
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may have removed it
            if files.is_unfinished(path):
                continue
            entries.append((path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total + needed <= _LIMIT:
            break
        with contextlib.suppress(OSError):
            files.remove(path)
        total -= size
    return needed <= _LIMIT and needed <= _SHARE_OF_FREE * shutil.disk_usage(folder).free
