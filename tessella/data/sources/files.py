"""Images that are files of their own: which names count, how bytes are read, a set of them."""

from __future__ import annotations

import errno
import os
import time

from tessella.data.decode import HEIC, MAX_BYTES, Inaccessible, Unreadable
from tessella.data.index import Index
from tessella.data.sources.images import ImageSet
from tessella.files import FileError, read_bytes

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".avif", *((".heic", ".heif") if HEIC else ())),
)
_LONGEST_ENDING = 10  # characters; a longer one is no kind of file
_RETRY_SECONDS = (0.1, 1.0)
_TEMPORARY_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)  # of network mounts


class FileImages(ImageSet):
    """Files below a folder, or listed relative to it."""

    def __init__(self, name: str, index: Index, labelled: bool, root: str) -> None:
        super().__init__(name, index, labelled)
        self._root = root

    def read(self, row: int) -> bytes:  # noqa: D102
        return read_file(os.path.join(self._root, self.key(row)))


def read_file(path: str, size: int | None = None, limit: int = MAX_BYTES) -> bytes:
    """The first `size` bytes of a regular file, or all if it has at most `limit`; network errors are tried again.

    A file that has become a pipe or a device since it was listed is recognised without waiting for it.

    Raises:
        Unreadable: it is gone, no regular file, or larger than `limit` if all of it is read.
    """
    for wait in (*_RETRY_SECONDS, None):
        try:
            return read_bytes(path, limit, size)
        except FileError as error:
            if wait is None or error.errno not in _TEMPORARY_ERRORS:
                if error.errno:
                    raise Inaccessible(f"the file cannot be read: {error.strerror}") from error
                raise Unreadable(str(error.strerror)) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def ending_of(name: str) -> str:
    """The last ending of a file's name in lower case, with its point; "no ending" if it has none or an odd one."""
    ending = os.path.splitext(name)[1].lower()
    return ending if 1 < len(ending) <= _LONGEST_ENDING else "no ending"


def names_in(folder: str) -> list[str]:
    """The names in a folder, in order, without hidden ones; none if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
