"""One index per data set: which images there are, how large, of which class; built once, then memory-mapped.

    source lists names -> threads read headers -> rows sorted by key -> columns as .npy in the cache
                                                                               |
    later: time stamps of folders and archives unchanged ---------> np.load(mmap_mode="r"): seconds

Processes that map the same files share their memory, so an index of a hundred million images costs it once
per machine. Every image has an id that depends on its key alone: it stays when other images come or go.
"""

# Paths of images are plain strings, because Path objects for millions of files cost more than their headers.

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessella.data.decode import MAX_BYTES, Unreadable, probe, probe_with
from tessella.files import (
    exclusive,
    make_folder,
    new_folder,
    open_regular,
    read_json,
    read_text,
    remove,
    remove_unfinished,
    write_json,
    write_text,
    writing,
)

_FORMAT = 1  # of the cached files; another number is another cache
_CHUNK = 64  # headers per task of the pool
_THREADS = min(32, 4 * (os.cpu_count() or 1))  # reading headers is mostly waiting
_SAMPLED_FILES = 4096  # so many files vouch for the contents of a folder
_LONGEST_NAME = 256  # bytes
_META_BYTES = 4 << 30  # bytes of meta.json, which names every unreadable image
_ABANDONED_SECONDS = 86_400.0  # a build that is older was killed

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
    """Where Tessella keeps what it can make again: $TESSELLA_CACHE, or ~/.cache/tessella."""
    return Path(os.environ.get("TESSELLA_CACHE") or "~/.cache/tessella").expanduser()


def cached_index(
    identity: list[str], files: Sequence[str], list_images: Callable[[], Listing], cache: Path | None = None
) -> Index:
    """The index of a data set, from the cache if nothing has changed, else built and cached.

    Unchanged means: the same `files` with the same sizes and time stamps, and all that the listing watches as
    it was. An index without images is not cached. If the cache cannot be written, the index stays in memory,
    with a warning.

    Args:
        identity: what names the data set: the kind of source, absolute paths, part.
        files: paths whose contents decide everything (archives, list files).
        list_images: called only when there is no valid cache.
        cache: instead of `cache_folder()`.
    """
    root = cache or cache_folder()
    folder = root / "index" / hashlib.sha256(json.dumps([_FORMAT, *identity]).encode()).hexdigest()[:32]
    index = _load(folder, files)
    if index is not None:
        return index
    with exclusive(folder):  # the other processes of this machine wait here, and then find it ready
        index = _load(folder, files)
        if index is not None:
            return index
        evidence = [evidence_of(path) for path in files]  # before the listing: later changes must show
        columns, meta = _build(list_images())
        if len(columns["ids"]):
            try:
                _save(folder, columns, meta | {"files": evidence})
            except OSError as error:
                warnings.warn(
                    f"the index cannot be kept in {root} ({error}), so it is built anew at every start: set"
                    " TESSELLA_CACHE to a folder that can be written",
                    stacklevel=2,
                )
        return _load(folder, files) or Index(columns, meta)


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


@contextlib.contextmanager
def progress_bar(label: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A bar on standard error while it is a terminal, else nothing; gives the function that advances it.

    Args:
        label: what is going on.
        total: units to do.
        unit: "bytes" shows a download-like bar.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    shown = TextColumn("{task.description}")
    console = Console(stderr=True)
    with Progress(shown, BarColumn(), amount, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(escape(label), total=total)
        yield lambda done: bar.advance(task, done)


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

    good = [i for i, found in enumerate(measured) if not isinstance(found, str)]
    bad = [(listing.keys[positions[i]], found) for i, found in enumerate(measured) if isinstance(found, str)]
    table = np.array([measured[i] for i in good], dtype=np.int64).reshape(-1, 3)
    chosen = np.array([positions[i] for i in good], dtype=np.int64)
    labels = np.full(len(good), -1) if listing.labels is None else np.asarray(listing.labels, np.int64)[chosen]
    columns = columns_of([keys[i] for i in good], table[:, :2].astype(np.int32), table[:, 2], labels)
    for name, values in listing.columns.items():
        columns[f"source_{name}"] = np.asarray(values, dtype=np.int64)[chosen]
    meta = {
        "classes": listing.classes,
        "fingerprint": fingerprint_of(columns),
        "unreadable": sorted(listing.unreadable + bad),
        "watched": listing.watched,
    }
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


def _measure(listing: Listing, positions: list[int]) -> list[tuple[int, int, int] | str]:
    """Width, height and bytes of each image, or the reason why it is unreadable."""
    results: list[tuple[int, int, int] | str] = [""] * len(positions)
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


def _measure_one(listing: Listing, position: int) -> tuple[int, int, int] | str:
    try:
        if listing.byte_sizes is None:
            encoded = listing.read(position, MAX_BYTES + 1)
            return *probe(encoded), len(encoded)
        size = int(listing.byte_sizes[position])
        return *probe_with(partial(listing.read, position), size), size
    except Unreadable as error:
        return error.reason


def _save(folder: Path, columns: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
    """Write a whole index beside the old one, then point `current` at it: readers never see half of one."""
    make_folder(folder)
    final = folder / f"built-{secrets.token_hex(8)}"
    with new_folder(final) as temporary:
        write_columns(temporary, columns)
        write_json(temporary / "meta.json", meta | {"columns": list(columns)}, indent=None)
    write_text(folder / "current", final.name)
    _sweep(folder, keep=final.name)


def write_columns(folder: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Write each column as NAME.npy, down to the disk."""
    for name, column in columns.items():
        with writing(folder / f"{name}.npy", needed=column.nbytes) as file:
            np.save(file, column, allow_pickle=False)


def _sweep(folder: Path, keep: str) -> None:
    """Remove superseded indexes (who has one mapped keeps it) and what killed builds left behind."""
    remove_unfinished(folder, older_than=_ABANDONED_SECONDS)
    for entry in folder.glob("built-*"):
        if entry.name != keep:
            remove(entry)


def _load(folder: Path, files: Sequence[str]) -> Index | None:
    """The cached index, or None if there is none, it is damaged, or the data have changed since."""
    try:
        built = folder / read_text(folder / "current", _LONGEST_NAME)
        meta = read_json(built / "meta.json", _META_BYTES)
        known = meta["files"] + meta["watched"]
        if [path for path, _, _ in meta["files"]] != list(files) or any(
            evidence_of(entry[0]) != tuple(entry) for entry in known
        ):
            return None
        for name in meta["columns"]:
            open_regular(built / f"{name}.npy").close()  # numpy would wait for a pipe
        columns = {name: np.load(built / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in meta["columns"]}
        return Index(columns, meta) if _fit_together(columns) else None
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _fit_together(columns: dict[str, NDArray[Any]]) -> bool:
    """Whether columns are of one index: a damaged cache must not be found out when an image is wanted."""
    rows = len(columns["ids"])
    keys, offsets = columns["key_bytes"], columns["key_offsets"]
    others = [column for name, column in columns.items() if name not in ("key_bytes", "key_offsets")]
    return (
        all(np.issubdtype(column.dtype, np.integer) for column in columns.values())
        and all(column.shape == ((rows, 2) if column is columns["sizes"] else (rows,)) for column in others)
        and (keys.ndim, offsets.shape) == (1, (rows + 1,))
        and (int(offsets[0]), int(offsets[-1])) == (0, len(keys))
    )
