"""Images that are files of their own: which names count, how bytes are read, a set of them."""

from __future__ import annotations

import errno
import os
import stat
import time

from tessella.data.decode import MAX_BYTES, Unreadable
from tessella.data.index import Index
from tessella.data.sources.images import ImageSet

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm"),
)
_RETRY_SECONDS = (0.1, 1.0)
# Errors of network mounts that may pass.
_PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)


class FileImages(ImageSet):
    """Files below a folder, or listed relative to it."""

    def __init__(self, name: str, index: Index, labelled: bool, root: str) -> None:
        super().__init__(name, index, labelled)
        self._root = root

    def read(self, row: int) -> bytes:  # noqa: D102
        return read_file(os.path.join(self._root, self.key(row)))


def read_file(path: str, size: int | None = None, limit: int = MAX_BYTES) -> bytes:
    """The first `size` bytes of a regular file, or all. After an error of a network mount it tries again.

    What has become a pipe or a device since it was listed is recognised without waiting for it.

    Args:
        path: of the file.
        size: bytes; None for all.
        limit: bytes; a larger file is refused when all of it is asked for.

    Raises:
        Unreadable: it is gone or no regular file; or all was asked for, and that is more than `limit`.
    """
    for wait in (*_RETRY_SECONDS, None):
        try:
            _check_regular(os.stat(path))  # merely opening a device can do something
            with open(path, "rb", opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                _check_regular(status)
                if size is None and status.st_size > limit:
                    raise Unreadable(f"the file has {status.st_size:,} bytes, more than the limit of {limit:,}")
                # No more than it had when it was opened: another program may write to it without end.
                return file.read(status.st_size if size is None else min(size, status.st_size))
        except OSError as error:
            if wait is None or error.errno not in _PASSING_ERRORS:
                raise Unreadable(f"the file cannot be read: {error.strerror}") from error
            time.sleep(wait)
        except ValueError as error:  # a list may name anything, such as a path with a zero byte
            raise Unreadable(f"no name of a file: {error}") from None
    raise AssertionError("unreachable")


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("not a regular file")


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would wait for its other end, but for a flag that regular files do not notice."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def names_in(folder: str) -> list[str]:
    """What a folder holds, in order; nothing if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
