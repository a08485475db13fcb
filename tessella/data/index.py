"""One index per data set: which images there are, how large, of which class; built once, then memory-mapped.

    source lists names -> threads read headers -> rows sorted by key -> columns as .npy in the cache
                                                                               |
    later: time stamps of folders and archives unchanged ---------> np.load(mmap_mode="r"): seconds

Processes that map the same files share their memory, so an index of a hundred million images costs it once
per machine. Every image has an id that depends on its key alone: it stays when other images come or go.
"""

# Paths of images are plain strings, because Path objects for millions of files cost more than their headers.

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessella import files
from tessella.console import progress_bar
from tessella.data.decode import FORMATS, MAX_BYTES, Inaccessible, Unreadable, probe, probe_with
from tessella.errors import UserError
from tessella.files import exclusive

_FORMAT = 2  # of the cached files; another number is another cache
_CHUNK = 64  # headers per task of the pool
_THREADS = min(32, 4 * (os.cpu_count() or 1))  # reading headers is mostly waiting
_SAMPLED_FILES = 4096  # so many files vouch for the contents of a folder
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
    labels: Sequence[int] | None = None  # class of each image, -1 for none
    classes: list[str] = field(default_factory=list)
    columns: dict[str, Sequence[int]] = field(default_factory=dict)  # what the source needs to find an image again
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # key, reason
    inaccessible: list[str] = field(default_factory=list)  # paths of those that could not be opened
    file_of: Callable[[int], str] | None = None  # position in keys -> path, where each image is a file of its own
    passed_over: Counter[str] = field(default_factory=Counter)  # ending -> files that are not read
    watched: list[Evidence] = field(default_factory=list)  # tells later whether the listing still holds


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

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, row: int) -> str:
        """Name of an image within its data set; bytes that are not UTF-8 appear as lone surrogates."""
        start, end = self._columns["key_offsets"][row : row + 2]
        return self._columns["key_bytes"][start:end].tobytes().decode("utf-8", "surrogateescape")

    @property
    def encoded_keys(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All names: UTF-8 bytes one behind the other, and (N + 1,) offsets into them."""
        return self._columns["key_bytes"], self._columns["key_offsets"]

    def column(self, name: str) -> NDArray[np.int64]:
        """One of the source's own columns, (N,)."""
        return self._columns[f"source_{name}"]

    @classmethod
    def of_arrays(
        cls,
        keys: Sequence[str],
        size: tuple[int, int],
        *,
        labels: ArrayLike | None,
        classes: list[str],
        fingerprint: str,
    ) -> Index:
        """An index in memory, for images that are arrays.

        Args:
            keys: N names in ascending order.
            size: width and height of every image.
            labels: (N,) or None.
            classes: names.
            fingerprint: of the pixels, since nothing else tells two such sets apart.
        """
        encoded = [_encode(key) for key in keys]
        sizes = np.tile(np.asarray(size, dtype=np.int32), (len(keys), 1))
        nothing = np.full(len(keys), -1, dtype=np.int64)
        columns = columns_of(encoded, sizes, nothing, nothing if labels is None else np.asarray(labels))
        return cls(columns, {"classes": classes, "fingerprint": fingerprint, "unreadable": []})

    @classmethod
    def of_columns(
        cls, columns: dict[str, NDArray[Any]], classes: list[str], unreadable: list[tuple[str, str]]
    ) -> Index:
        """An index from columns as of `columns_of`, with the fingerprint that follows from them."""
        return cls(columns, {"classes": classes, "fingerprint": fingerprint_of(columns), "unreadable": unreadable})


def cache_folder() -> Path:
    """Where Tessella keeps what it can make again: $TESSELLA_CACHE, or ~/.cache/tessella.

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
    what could not be read still cannot be read. A cached index is compared with its hashes; a damaged one is built
    again, with a warning. An index without images is not cached. If the cache cannot be written, the index stays in
    memory, with a warning.

    Args:
        identity: what names the data set: the kind of source, absolute paths, part.
        paths: of files whose contents decide everything (archives, list files).
        list_images: called only when there is no valid cache.
        cache: instead of `cache_folder()`.
    """
    root = cache or cache_folder()
    identity = [str(_FORMAT), *FORMATS, *identity]
    folder = root / "index" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    index = _load_or_say(folder, identity, paths, root, say=False)
    if index is not None:
        return index
    with exclusive(folder):  # the other processes of this machine wait here, and then find it ready
        index = _load_or_say(folder, identity, paths, root, say=True)
        if index is not None:
            return index
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
        return _load_or_say(folder, identity, paths, root, say=False) or Index(columns, meta)


def _load_or_say(folder: Path, identity: list[str], paths: Sequence[str], root: Path, say: bool) -> Index | None:
    try:
        return _load(folder, identity, paths)
    except ValueError as error:
        if say:
            warnings.warn(f"an index in {root} is damaged ({error}) and is built again", stacklevel=3)
        return None


def evidence_of(path: str) -> Evidence | None:
    """What a path looks like from outside; None if it is gone, or no path at all."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte, which a list may hold
        return None
    return path, -1 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns


def sample(paths: Sequence[str]) -> list[Evidence]:
    """Evidence of up to 4096 evenly spaced files: all of a small set, and a fair share of a large one.

    The time stamp of a folder shows files that come, go or change name, but not one that is overwritten in
    place.
    """
    step = -(-len(paths) // _SAMPLED_FILES) or 1
    return [evidence for path in paths[::step] if (evidence := evidence_of(path))]


def stable_ids(keys: Sequence[bytes]) -> NDArray[np.int64]:
    """An id per key that depends on nothing else: 63 bits of its BLAKE2b hash.

    Among a hundred million keys, two share their hash with a chance of 1 in 2000. Then the later one in key
    order is hashed again with a salt, until all differ.

    Args:
        keys: distinct, in ascending order.

    Returns:
        (N,) int64, non-negative, distinct.
    """
    ids = np.fromiter((_hash(key, 0) for key in keys), dtype=np.int64, count=len(keys))
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        taken = set(values.tolist())
        seen: set[int] = set()
        for row in np.flatnonzero(np.isin(ids, values[counts > 1])).tolist():
            salt, value = 0, int(ids[row])
            while value in seen or (salt and value in taken):
                salt += 1
                value = _hash(keys[row], salt)
            seen.add(value)
            taken.add(value)
            ids[row] = value
    return ids


def _hash(key: bytes, salt: int) -> int:
    digest = hashlib.blake2b(key, digest_size=8, salt=salt.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _build(listing: Listing) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Columns and meta data: headers read, unreadable images set apart, rows sorted by key."""
    position_of = {_encode(key): position for position, key in enumerate(listing.keys)}  # of equal keys the last
    keys = sorted(position_of)
    positions = [position_of[key] for key in keys]
    measured = _measure(listing, positions)

    good = [i for i, found in enumerate(measured) if not isinstance(found, Unreadable)]
    bad = [(positions[i], found) for i, found in enumerate(measured) if isinstance(found, Unreadable)]
    table = np.array([measured[i] for i in good], dtype=np.int64).reshape(-1, 3)
    chosen = np.array([positions[i] for i in good], dtype=np.int64)
    labels = np.full(len(good), -1) if listing.labels is None else np.asarray(listing.labels, np.int64)[chosen]
    columns = columns_of([keys[i] for i in good], table[:, :2].astype(np.int32), table[:, 2], labels)
    for name, values in listing.columns.items():
        columns[f"source_{name}"] = np.asarray(values, dtype=np.int64)[chosen]
    meta: dict[str, Any] = {
        "classes": listing.classes,
        "fingerprint": fingerprint_of(columns),
        "unreadable": sorted(listing.unreadable + [(listing.keys[position], error.reason) for position, error in bad]),
        "watched": listing.watched,
        "inaccessible": listing.inaccessible,
        "passed_over": dict(listing.passed_over.most_common(_ENDINGS)),
    }
    if listing.file_of is not None:
        for position, error in bad:
            path = listing.file_of(position)
            if isinstance(error, Inaccessible):
                meta["inaccessible"].append(path)
            elif evidence := evidence_of(path):
                meta["watched"].append(evidence)
    return columns, meta


def columns_of(
    keys: Sequence[bytes], sizes: NDArray[np.int32], byte_sizes: NDArray[np.int64], labels: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """The columns of an index.

    Args:
        keys: N names in ascending order.
        sizes: (N, 2) upright width and height.
        byte_sizes: (N,) of the encoded images, -1 where they are not encoded.
        labels: (N,) index into the classes, -1 for none.
    """
    offsets = np.zeros(len(keys) + 1, dtype=np.int64)
    np.cumsum([len(key) for key in keys], out=offsets[1:])
    return {
        "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "key_offsets": offsets,
        "ids": stable_ids(keys),
        "sizes": sizes,
        "byte_sizes": byte_sizes,
        "labels": labels.astype(np.int64),
    }


def fingerprint_of(columns: dict[str, NDArray[Any]]) -> str:
    """Changes when an image comes, goes, is renamed or encoded anew; not with a touch, not with labels."""
    digest = hashlib.sha256()
    for name in ("key_offsets", "key_bytes", "byte_sizes", "sizes"):
        column = columns[name]
        digest.update(column.astype(column.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _measure(listing: Listing, positions: list[int]) -> list[tuple[int, int, int] | Unreadable]:
    """Width, height and bytes of each image, or the reason why it is unreadable."""
    results: list[tuple[int, int, int] | Unreadable] = [Unreadable("")] * len(positions)
    chunks = [range(start, min(start + _CHUNK, len(positions))) for start in range(0, len(positions), _CHUNK)]

    def measure(chunk: range) -> range:
        for i in chunk:
            results[i] = _measure_one(listing, positions[i])
        return chunk

    with progress_bar("reading image headers", len(positions)) as advance:
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for task in as_completed([pool.submit(measure, chunk) for chunk in chunks]):
                advance(len(task.result()))
        finally:
            pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not read the rest first
    return results


def _measure_one(listing: Listing, position: int) -> tuple[int, int, int] | Unreadable:
    try:
        if listing.byte_sizes is None:
            encoded = listing.read(position, MAX_BYTES + 1)
            return *probe(encoded), len(encoded)
        size = int(listing.byte_sizes[position])
        return *probe_with(partial(listing.read, position), size), size
    except Unreadable as error:
        return error


def _save(root: Path, folder: Path, columns: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
    """Write a whole index in the place of the old one, with the hash of every file: readers never see half of one."""
    files.make_folder(folder, inside=root)
    with files.new_folder(folder / _BUILT) as unfinished:
        hashes = write_columns(unfinished, columns)
        text = json.dumps(meta | {"columns": hashes})
        files.write_text(unfinished / _META, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def write_columns(folder: Path, columns: dict[str, NDArray[Any]]) -> dict[str, str]:
    """Write each column as NAME.npy, down to the disk; gives the hash of each file."""
    for name, column in columns.items():
        with files.writing(folder / f"{name}.npy", needed=column.nbytes) as file:
            np.save(file, column, allow_pickle=False)
    return {name: files.sha256(folder / f"{name}.npy") for name in columns}


def read_columns(folder: Path, hashes: dict[str, str]) -> dict[str, NDArray[Any]]:
    """What `write_columns` wrote, memory-mapped; every byte is compared with its hash first.

    Raises:
        ValueError: a file is missing or not what it was.
        OSError: a file cannot be read.
    """
    for name, digest in hashes.items():
        if files.sha256(folder / f"{name}.npy") != digest:
            raise ValueError(f"{name}.npy is not what was written")
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in hashes}


def _load(folder: Path, identity: list[str], paths: Sequence[str]) -> Index | None:
    """The cached index, or None if there is none or the data have changed since.

    Raises:
        ValueError: it is damaged, or of other data.
    """
    built = folder / _BUILT
    if not built.exists():
        return None
    try:
        digest, _, text = files.read_text(built / _META, _MAX_META_BYTES).partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError(f"{_META} is not what was written")
        meta = json.loads(text)
        if meta["identity"] != identity:
            raise ValueError("it is of other data")
        if [path for path, _, _ in meta["files"]] != list(paths) or any(
            evidence_of(entry[0]) != tuple(entry) for entry in meta["files"] + meta["watched"]
        ):
            return None
        if any(map(_accessible, meta["inaccessible"])):  # what could not be read may be readable now
            return None
        columns = read_columns(built, meta["columns"])
        if not files.read_text(built / _META, _MAX_META_BYTES).startswith(digest):
            raise ValueError("another process has just replaced it")
        return Index(columns, meta)
    except (OSError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it cannot be read: {error}") from None


def _accessible(path: str) -> bool:
    """Whether a folder can be listed, or a file be read."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()
        else:
            files.read_bytes(path, MAX_BYTES, size=1)
    except OSError:
        return False
    return True
