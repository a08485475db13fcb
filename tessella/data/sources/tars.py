"""Images inside .tar archives, read in place: member headers are walked once, pixels fetched with pread.

Nothing is ever extracted to a path that an archive names. A .tar.gz is decompressed once, into a copy in the
cache: a compressed stream has no random access.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tessella import files
from tessella.console import progress_bar
from tessella.data.decode import Unreadable
from tessella.data.sources.files import ending_of
from tessella.errors import UserError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_MAX_OPEN = 256  # archives held open, of the 1024 files that a process may usually have
_MAX_HEADER = 2**20  # bytes; longest extended header that is accepted
_COPY_CHUNK = 2**22  # bytes
_MAX_RATIO = 100  # decompressed / compressed bytes; photos stay below 2, drawings below 50
_ALWAYS_ALLOWED = 2**26  # decompressed bytes, whatever the ratio


class Member(NamedTuple):
    """An image in an archive."""

    name: str
    offset: int  # of its first byte, within the archive
    size: int  # bytes


class Archives:
    """Random access to the bytes of a fixed list of .tar files, from any number of threads."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._descriptors: dict[int, int] = {}
        self._most_open = min(_MAX_OPEN, _files_allowed() // 4)
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def read(self, archive: int, offset: int, size: int) -> bytes:
        """`size` bytes of one archive; Unreadable if it is gone or ends before."""
        try:
            with self._descriptor(archive) as descriptor:
                data = os.pread(descriptor, size, offset)
                while len(data) < size:
                    more = os.pread(descriptor, size - len(data), offset + len(data))
                    if not more:
                        raise Unreadable("the archive ends before the image does")
                    data += more
                return data
        except OSError as error:
            raise Unreadable(f"the archive cannot be read: {error.strerror}") from error

    @contextlib.contextmanager
    def _descriptor(self, archive: int) -> Iterator[int]:
        with self._lock:
            descriptor = self._descriptors.get(archive)
            if descriptor is None and len(self._descriptors) < self._most_open:
                descriptor = self._descriptors[archive] = os.open(self.paths[archive], os.O_RDONLY | os.O_CLOEXEC)
        if descriptor is not None:
            yield descriptor
            return
        temporary = os.open(self.paths[archive], os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield temporary
        finally:
            os.close(temporary)


def _files_allowed() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4 * _MAX_OPEN if soft == resource.RLIM_INFINITY else soft


def walk_tar(
    path: str, suffixes: tuple[str, ...], passed_over: Counter[str] | None = None
) -> tuple[list[Member], list[tuple[str, str]]]:
    """All images of one uncompressed .tar, and (name, reason) of those that cannot be read in place.

    The name is "" for the archive as a whole. Hidden members and those with other suffixes are left out, as in folders.

    Args:
        path: of the archive.
        suffixes: of images, in lower case.
        passed_over: receives the number of other files by ending.
    """
    members: list[Member] = []
    unreadable: list[tuple[str, str]] = []
    try:
        with (
            _HeaderReader(path) as file,
            tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar,
        ):
            end_of_file, before = os.fstat(file.fileno()).st_size, -1
            while (entry := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a kilobyte per member
                if tar.offset <= before:  # a negative size leads back, without end
                    raise tarfile.ReadError(f"the header at byte {entry.offset} claims {entry.size} bytes")
                before = tar.offset
                name = entry.name.removeprefix("./").lstrip("/")
                if entry.isdir():
                    continue
                if _is_hidden(name) or not name.lower().endswith(suffixes):
                    if passed_over is not None:
                        passed_over["hidden" if _is_hidden(name) else ending_of(name)] += 1
                    continue
                reason = _refusal(entry, end_of_file)
                if reason:
                    unreadable.append((name, reason))
                else:
                    members.append(Member(name, entry.offset_data, entry.size))
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                # tarfile ends at a header that it cannot parse.
                unreadable.append(("", f"damaged header at byte {tar.offset}; what follows is not read"))
    except Exception as error:  # headers are foreign data: tarfile can raise anything
        unreadable.append(("", f"damaged or truncated archive: {' '.join(str(error).split())[:200]}"))
    return members, unreadable


def tar_on_disk(path: str, cache: Path) -> str:
    """Path of an uncompressed archive: the given one, or a copy of a .tar.gz in the cache, made if missing.

    Raises:
        UserError: the archive is damaged, or there is no room for the copy.
    """
    if path.lower().endswith(".tar"):
        return path
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    place = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    folder = cache / "archives" / place
    copy = folder / f"{status.st_size}-{status.st_mtime_ns}.tar"
    if copy.exists():
        return str(copy)
    with files.exclusive(folder):
        if not copy.exists():
            _decompress(path, copy, status.st_size)
            for old in folder.glob("*.tar"):
                if old != copy:
                    files.remove(old)
    return str(copy)


def _decompress(path: str, copy: Path, compressed_bytes: int) -> None:
    """Make the decompressed copy, whole or not at all."""
    shown = os.path.basename(path)
    try:
        files.make_folder(copy.parent)
        with files.open_regular(path) as packed:
            packed.seek(max(0, compressed_bytes - 4))
            needed = max(int.from_bytes(packed.read(4), "little"), compressed_bytes)  # gzip's, modulo 2**32
        free = shutil.disk_usage(copy.parent).free
        # A damaged trailer may name any size; no archive shrinks by more than deflate's ratio of 1032.
        if free < needed <= 1032 * compressed_bytes:
            raise UserError(
                f"{path} needs at least {needed:,} bytes decompressed, but {copy.parent} has {free:,} free: set"
                " TESSELLA_CACHE to a folder with room"
            )
        with (
            files.open_regular(path) as packed,
            gzip.GzipFile(fileobj=packed) as unpacked,
            files.writing(copy, needed=compressed_bytes) as target,
            progress_bar(f"decompressing {shown} once", compressed_bytes, "bytes") as advance,
        ):
            position, most = 0, max(_ALWAYS_ALLOWED, _MAX_RATIO * compressed_bytes)
            while chunk := unpacked.read(_COPY_CHUNK):
                target.write(chunk)
                if target.tell() > most:
                    raise UserError(
                        f"{path} unpacks to more than {most:,} bytes, {_MAX_RATIO} times its size, which images do "
                        "not: if you trust it, decompress it yourself and name the .tar"
                    )
                advance(packed.tell() - position)
                position = packed.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or incomplete ({error}): fetch it again") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be decompressed into {copy.parent} ({error.strerror}): set TESSELLA_CACHE to a"
            " folder with room, or decompress it yourself and name the .tar"
        ) from error


class _HeaderReader(io.FileIO):
    """A file that refuses reads longer than an honest header: tarfile would allocate what a header claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)


def _refusal(entry: tarfile.TarInfo, end_of_file: int) -> str:
    """Why a member with an image's name is not an image in place; "" if it is."""
    if entry.issparse():
        return "a sparse member of an archive: pack it again without --sparse"
    if not entry.isreg():
        return "a link or special file in an archive: pack it again with --dereference"
    if ".." in entry.name.split("/"):
        return "a name that leads out of the archive: pack it again without .."
    if entry.size < 0 or entry.offset_data + entry.size > end_of_file:
        return "the archive ends before the image does"
    return ""


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
