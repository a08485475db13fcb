"""The index of a data set: which images there are, how large, of which class; built once, then memory-mapped.

    source lists names -> threads read headers -> rows sorted by key -> columns as .npy in the cache
                                                                               |
    later: time stamps of folders and archives unchanged ---------> np.load(mmap_mode="r"): seconds

Processes that map the same files share their memory, so that a hundred million images cost it once per machine. The id
of an image depends on its key alone: it stays when other images come or go. Paths are plain strings, because Path
objects for millions of files take longer than reading their headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessella import files
from tessella.data.decode import FORMATS, MAX_BYTES, Inaccessible, Unreadable, probe, probe_with
from tessella.data.threads import over_rows
from tessella.errors import UserError

_FORMAT = 2  # of the cached files; another number is another cache
_THREADS = min(32, 4 * (os.cpu_count() or 1))  # reading headers is mostly waiting
_SAMPLED_FILES = 4096  # so many files stand for the contents of a folder
_BUILT, _META = "built", "meta.json"
_MAX_META_BYTES = 2**32
_ENDINGS = 100  # kinds of files that are passed over and counted

Evidence = tuple[str, int, int]  # path, bytes (-1 for a folder), time of last change in ns


@dataclass
class Listing:
    """What a source finds by looking at names, before any image is opened."""

    keys: list[str]  # the name of each image within its source, '/' between parts
    read: Callable[[int, int], bytes]  # (position in keys, n) -> first n bytes; raises Unreadable
    byte_sizes: Sequence[int] | None  # None when an image's size is known only by reading it
    labels: Sequence[int] | NDArray[np.int64]  # class of each image, -1 for none
    classes: list[str]
    columns: dict[str, Sequence[int]] = field(default_factory=dict)  # what the source needs to find an image again
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # key, reason
    inaccessible: list[str] = field(default_factory=list)  # paths of those that could not be opened
    file_of: Callable[[int], str] | None = None  # position in keys -> path, where each image is a file of its own
    passed_over: Counter[str] = field(default_factory=Counter)  # ending -> files that are not read
    watched: list[Evidence] = field(default_factory=list)  # shows later whether the listing is still right


class Index:
    """The images of one data set, sorted by key. Columns are arrays, read-only maps of files when cached."""

    def __init__(self, columns: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
        self._columns = columns
        self.ids: NDArray[np.int64] = columns["ids"]  # (N,) non-negative, distinct, stable
        self.sizes: NDArray[np.int32] = columns["sizes"]  # (N, 2) upright width and height, pixels
        self.labels: NDArray[np.int64] = columns["labels"]  # (N,) index into classes, -1 for none
        self.byte_sizes: NDArray[np.int64] = columns["byte_sizes"]  # (N,) of the encoded images
        self.classes: list[str] = meta["classes"]
        self.fingerprint: str = meta["fingerprint"]
        self.unreadable: list[tuple[str, str]] = [(key, reason) for key, reason in meta["unreadable"]]
        self.passed_over: dict[str, int] = meta.get("passed_over", {})  # ending -> files that are not read

    @classmethod
    def of(
        cls,
        keys: Sequence[str],
        sizes: ArrayLike,
        *,
        byte_sizes: ArrayLike = -1,
        labels: ArrayLike = -1,
        classes: Sequence[str] = (),
        fingerprint: str | None = None,
        unreadable: Sequence[tuple[str, str]] = (),
        columns: dict[str, NDArray[Any]] | None = None,
    ) -> Index:
        """An index in memory; for the first arguments see `columns_of`.

        Args:
            keys: names.
            sizes: of the images.
            byte_sizes: of their files.
            labels: of the images.
            classes: names.
            fingerprint: of the pixels, where keys and sizes do not tell two sets apart.
            unreadable: (key, reason) of images that were left out.
            columns: the source's own, (N,) each.
        """
        columns = columns_of(keys, sizes, byte_sizes, labels) | (columns or {})
        fingerprint = fingerprint or fingerprint_of(columns)
        return cls(columns, {"classes": list(classes), "fingerprint": fingerprint, "unreadable": unreadable})

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, row: int) -> str:
        """Name of an image within its data set; bytes that are not UTF-8 appear as lone surrogates."""
        start, end = self._columns["key_offsets"][row : row + 2]
        return self._columns["key_bytes"][start:end].tobytes().decode("utf-8", "surrogateescape")

    @property
    def encoded_keys(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All names: concatenated UTF-8 bytes, and (N + 1,) offsets into them."""
        return self._columns["key_bytes"], self._columns["key_offsets"]

    def column(self, name: str) -> NDArray[np.int64]:
        """One of the source's own columns, (N,)."""
        return self._columns[f"source_{name}"]


def cache_folder() -> Path:
    """Where Tessella stores what it can make again: $TESSELLA_CACHE, or ~/.cache/tessella.

    Raises:
        UserError: there is no home folder.
    """
    folder = os.path.expanduser(os.environ.get("TESSELLA_CACHE") or "~/.cache/tessella")
    if folder.startswith("~"):
        raise UserError("there is no home folder for the cache (HOME is not set): set TESSELLA_CACHE to a folder")
    return Path(folder)


def cached_index(
    identity: list[str], paths: Sequence[str], list_images: Callable[[], Listing], cache: Path | None = None
) -> Index:
    """The index of a data set, from the cache if nothing has changed, else built and cached.

    Unchanged means: the same `paths` with the same sizes and time stamps, all that the listing watches as it was, and
    unreadable files still unreadable. A cached index is compared with its hashes; a damaged one is built again, with a
    warning. An index without images is not cached. If the cache cannot be written, the index stays in memory, with a
    warning.

    Args:
        identity: what names the data set: the kind of source, absolute paths, part.
        paths: of files whose contents decide everything (archives, list files).
        list_images: called only when there is no valid cache.
        cache: instead of `cache_folder()`.
    """
    root = cache or cache_folder()
    identity = [str(_FORMAT), *FORMATS, *identity]
    folder = root / "index" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    index, _ = _load(folder, identity, paths)
    if index is not None:
        return index
    with files.exclusive(folder):  # the other processes of this machine wait here and then find the index
        index, damage = _load(folder, identity, paths)
        if index is not None:
            return index
        if damage:
            warnings.warn(f"an index in {root} is damaged ({damage}) and is built again", stacklevel=2)
        evidence = [evidence_of(path) for path in paths]  # before the listing: later changes must show
        columns, meta = _build(list_images())
        if not len(columns["ids"]):
            return Index(columns, meta)
        try:
            _save(root, folder, columns, meta | {"files": evidence, "identity": identity})
        except OSError as error:
            warnings.warn(
                f"the index cannot be kept in {root} ({error}), so it is built again at every start: set"
                " TESSELLA_CACHE to a folder that can be written",
                stacklevel=2,
            )
        return _load(folder, identity, paths)[0] or Index(columns, meta)


def evidence_of(path: str) -> Evidence | None:
    """What a path looks like from outside; None if it is gone, or no path at all."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte, which a list may hold
        return None
    return path, -1 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns


def sample(paths: Sequence[str]) -> list[Evidence]:
    """Evidence of up to 4096 evenly spaced files.

    The time stamp of a folder shows files that come, go or are renamed, but not one that is overwritten in place.
    """
    step = -(-len(paths) // _SAMPLED_FILES) or 1
    return [evidence for path in paths[::step] if (evidence := evidence_of(path))]


def stable_ids(keys: Sequence[bytes]) -> NDArray[np.int64]:
    """An id per key that depends on nothing else: 63 bits of its BLAKE2b hash. (N,) int64, non-negative, distinct.

    Among a hundred million keys, two share their hash with a chance of 1 in 2000. Then the later one in key order is
    hashed again with a salt, until all differ. The keys are distinct and in ascending order.
    """
    ids = np.fromiter((_hash(key, 0) for key in keys), dtype=np.int64, count=len(keys))
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        used = set(values.tolist())
        seen: set[int] = set()
        for row in np.flatnonzero(np.isin(ids, values[counts > 1])).tolist():
            salt, value = 0, int(ids[row])
            while value in seen or (salt and value in used):
                salt += 1
                value = _hash(keys[row], salt)
            seen.add(value)
            used.add(value)
            ids[row] = value
    return ids


def _hash(key: bytes, salt: int) -> int:
    digest = hashlib.blake2b(key, digest_size=8, salt=salt.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def labels_by_folder(names: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Class of each image, the first folder of its name (-1 without one), and the names of the classes."""
    folders = [name.partition("/")[0] if "/" in name else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    numbers = {None: -1} | {folder: label for label, folder in enumerate(classes)}
    return np.array([numbers[folder] for folder in folders], dtype=np.int64), classes


def _build(listing: Listing) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Columns and meta data: headers are read, rows sorted by key, unreadable images left out."""
    position_of = {key: position for position, key in enumerate(listing.keys)}  # of equal keys the last
    keys = sorted(position_of, key=_encode)
    measured: list[tuple[int, int, int] | Unreadable] = [Unreadable("")] * len(keys)

    def measure(rows: range) -> None:
        for row in rows:
            measured[row] = _measure(listing, position_of[keys[row]])

    over_rows(len(keys), measure, "reading image headers", _THREADS)
    unreadable, inaccessible, watched = list(listing.unreadable), list(listing.inaccessible), list(listing.watched)
    rows, readable = list[tuple[int, int, int]](), list[str]()
    for key, result in zip(keys, measured, strict=True):
        if not isinstance(result, Unreadable):
            rows.append(result)
            readable.append(key)
            continue
        unreadable.append((key, result.reason))
        path = listing.file_of(position_of[key]) if listing.file_of else None
        if path and isinstance(result, Inaccessible):
            inaccessible.append(path)
        elif path and (evidence := evidence_of(path)):
            watched.append(evidence)
    table, chosen = np.array(rows, dtype=np.int64).reshape(-1, 3), [position_of[key] for key in readable]
    columns = columns_of(readable, table[:, :2], table[:, 2], np.asarray(listing.labels, dtype=np.int64)[chosen])
    for name, values in listing.columns.items():
        columns[f"source_{name}"] = np.asarray(values, dtype=np.int64)[chosen]
    return columns, {
        "classes": listing.classes,
        "fingerprint": fingerprint_of(columns),
        "unreadable": sorted(unreadable),
        "watched": watched,
        "inaccessible": inaccessible,
        "passed_over": dict(listing.passed_over.most_common(_ENDINGS)),
    }


def _measure(listing: Listing, position: int) -> tuple[int, int, int] | Unreadable:
    """Width, height and bytes of an image, or why it is unreadable."""
    try:
        if listing.byte_sizes is None:
            encoded = listing.read(position, MAX_BYTES + 1)
            return *probe(encoded), len(encoded)
        size = int(listing.byte_sizes[position])
        return *probe_with(partial(listing.read, position), size), size
    except Unreadable as error:
        return error


def columns_of(
    keys: Sequence[str], sizes: ArrayLike, byte_sizes: ArrayLike, labels: ArrayLike
) -> dict[str, NDArray[Any]]:
    """The columns of an index of N images, whose keys are in ascending order.

    Upright width and height are (N, 2), or one pair for all. Bytes of the encoded images, -1 if they are not encoded,
    and indices into the classes, -1 for none, are (N,), or one number for all.
    """
    encoded, count = [_encode(key) for key in keys], len(keys)
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum([len(key) for key in encoded], out=offsets[1:])
    return {
        "key_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "key_offsets": offsets,
        "ids": stable_ids(encoded),
        "sizes": np.broadcast_to(np.asarray(sizes, dtype=np.int32), (count, 2)),
        "byte_sizes": np.broadcast_to(np.asarray(byte_sizes, dtype=np.int64), count),
        "labels": np.broadcast_to(np.asarray(labels, dtype=np.int64), count),
    }


def fingerprint_of(columns: dict[str, NDArray[Any]]) -> str:
    """A hash that changes when an image comes, goes, is renamed or encoded again; not with a touch or labels."""
    digest = hashlib.sha256()
    for name in ("key_offsets", "key_bytes", "byte_sizes", "sizes"):
        column = columns[name]
        digest.update(column.astype(column.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _save(root: Path, folder: Path, columns: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
    """Write an index, with the hash of every file, and replace the old one at once: readers never see half of it."""
    files.make_folder(folder, inside=root)
    with files.new_folder(folder / _BUILT) as unfinished:
        hashes = write_columns(unfinished, columns)
        text = json.dumps(meta | {"columns": hashes})
        files.write_text(unfinished / _META, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def write_columns(folder: Path, columns: dict[str, NDArray[Any]]) -> dict[str, str]:
    """Write each column as NAME.npy and return the hash of each file."""
    for name, column in columns.items():
        with files.writing(folder / f"{name}.npy", needed=column.nbytes) as file:
            np.save(file, column, allow_pickle=False)
    return {name: files.sha256(folder / f"{name}.npy") for name in columns}


def read_columns(folder: Path, hashes: dict[str, str]) -> dict[str, NDArray[Any]]:
    """The columns that `write_columns` wrote, memory-mapped; every byte is compared with its hash first.

    Raises:
        ValueError: a file is missing or not what it was.
        OSError: a file cannot be read.
    """
    for name, digest in hashes.items():
        if files.sha256(folder / f"{name}.npy") != digest:
            raise ValueError(f"{name}.npy is not what was written")
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in hashes}


def _load(folder: Path, identity: list[str], paths: Sequence[str]) -> tuple[Index | None, str]:
    """The cached index, or None if there is none, the data have changed, or it is damaged; and the damage."""
    built = folder / _BUILT
    if not built.exists():
        return None, ""
    try:
        digest, _, text = files.read_text(built / _META, _MAX_META_BYTES).partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError(f"{_META} is not what was written")
        meta = json.loads(text)
        if meta["identity"] != identity:
            raise ValueError("it is of other data")
        if (
            [path for path, _, _ in meta["files"]] != list(paths)
            or any(evidence_of(entry[0]) != tuple(entry) for entry in meta["files"] + meta["watched"])
            or any(map(_accessible, meta["inaccessible"]))  # it may be readable now
        ):
            return None, ""
        columns = read_columns(built, meta["columns"])
        if not files.read_text(built / _META, _MAX_META_BYTES).startswith(digest):
            raise ValueError("another process has just replaced it")
        return Index(columns, meta), ""
    except (OSError, KeyError, TypeError, RecursionError) as error:
        return None, f"it cannot be read: {error}"
    except ValueError as error:
        return None, str(error)


def _accessible(path: str) -> bool:
    """Whether a folder can be listed, or a file read."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()
        else:
            files.read_bytes(path, MAX_BYTES, size=1)
    except OSError:
        return False
    return True
