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
_LONGEST_ENDING = 10  # characters; what is longer is no kind of file
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
            return read_bytes(path, limit, size)
        except FileError as error:
            if wait is None or error.errno not in _PASSING_ERRORS:
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
    """What a folder holds, in order; nothing if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
