"""Files on disk: written whole or not at all, never through a link; read only if regular and of a sane size.

A folder may come from somebody else, with links, pipes or devices in place of the files that are written there. So:

- A folder of Tessella's is opened without following links, and names in it are relative to its descriptor.
- A file is written under an unpredictable new name, synced, and renamed. Renaming replaces what has that name, also a
  link; nothing is written through it.
- A file that is appended to or locked must be regular and have one name.
- A file that is read must be regular: it is opened without waiting, and checked again afterwards.

Every function raises `FileError` if the file or folder cannot be used. The folders above the given one are the user's
own and may be links. Systems without directory descriptors (Windows)
check for links by name first, which leaves a moment for a program that runs at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tessella.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = ".saving-"
_REPLACED = ".replaced"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota, limit on a file's size
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of some network file systems
_BY_DESCRIPTOR = {os.open, os.mkdir, os.stat, os.unlink, os.rename} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_COMMON = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)  # for a pipe's other end; no terminal of ours
_BUFFER = 1 << 20  # bytes
_MANY_BYTES = 1 << 30  # a larger file that is nearly all holes costs its sender nothing and its reader memory or time


class FileError(UserError, OSError):
    """A file or folder that cannot be used. `strerror` is the reason alone; `errno` is the system's, if it gave one."""

    def __init__(self, text: str, reason: str = "", code: int | None = None) -> None:
        super().__init__(text)
        self.strerror, self.errno = reason or text, code

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel between ranks
        return FileError, (str(self), self.strerror, self.errno)


# --- reading ------------------------------------------------------------------------------------------------


def open_regular(path: Path | str, limit: int | None = None) -> io.BufferedReader:
    """Open a regular file of at most `limit` bytes (None: of any size); the path may be a link, or lead through links.

    Refused are files that are missing, not regular, too large, or nearly all holes.
    """
    with _explain_read_error(path):
        _refuse_special(path, os.stat(path))  # merely opening a device can do something
        file = open(os.open(path, os.O_RDONLY | _COMMON | _NO_WAITING), "rb")  # noqa: SIM115
        try:
            status = os.fstat(file.fileno())
            _refuse_special(path, status)
            size = status.st_size
            if limit is not None and size > limit:
                raise _unreadable(path, f"the file has {size:,} bytes, more than the limit of {limit:,}")
            if size > _MANY_BYTES and 0 < 512 * getattr(status, "st_blocks", 0) < size // 1000:
                raise _unreadable(path, f"the file has {size:,} bytes, and hardly any of them were ever written")
        except BaseException:
            file.close()
            raise
    return file


def read_bytes(path: Path | str, limit: int, size: int | None = None) -> bytes:
    """The first `size` bytes of a regular file, or all of it if it has at most `limit` bytes."""
    with _explain_read_error(path), open_regular(path, limit if size is None else None) as file:
        length = os.fstat(file.fileno()).st_size  # no more than it has now: another program may write without end
        try:
            return file.read(length if size is None else min(size, length))
        except (MemoryError, OverflowError):
            raise _unreadable(path, f"its {length:,} bytes do not fit into memory") from None


def read_text(path: Path | str, limit: int, errors: str = "strict") -> str:
    """The text of a UTF-8 file of at most `limit` bytes; with `errors` "strict", other text is a FileError."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise FileError(f"{path} cannot be read: not UTF-8 text ({error.reason})", "not UTF-8 text") from None


def read_json(path: Path | str, limit: int) -> Any:
    """The value in a JSON file of at most `limit` bytes, without NaN and infinite numbers."""
    text = read_text(path, limit)
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"not JSON ({' '.join(str(error).split())[:100]})") from None


def _finite(text: str) -> float:
    """A number of JSON, which has no NaN or infinity. Python reads both, also as 1e999, but cannot write them."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def sha256(path: Path | str) -> str:
    """Hash of a regular file's bytes, as hexadecimal digits."""
    with _explain_read_error(path), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_special(path: Path | str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _unreadable(path, "not a regular file")


def _unreadable(path: Path | str, reason: str, code: int | None = None) -> FileError:
    return FileError(f"{path} cannot be read: {reason}", reason, code)


@contextlib.contextmanager
def _explain_read_error(path: Path | str) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), error.errno) from None
    except ValueError as error:  # a list may name anything, such as a path with a zero byte
        raise _unreadable(repr(path), f"no name of a file: {error}") from None


# --- writing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, *, inside: Path | None = None, needed: int = 0, lasting: bool = True) -> Iterator[BinaryIO]:
    """A file for the body to fill; it gets its name when the body has ended without an error.

    In a folder that is itself unfinished (see `new_folder`) it has its name from the start.

    Args:
        path: of the file. A file of this name stays until the new one is complete. The folder must exist.
        inside: an existing folder above `path`: no folder below it on the way may be a link, and missing ones are made.
        needed: bytes that will be written, for the message about a full disk.
        lasting: wait until it is on the disk. False for many small files that can be made again.
    """
    explained = partial(explain_write_error, path.parent, needed)
    at_once = is_unfinished(path.parent)
    name = path.name if at_once else _temporary_name()
    with contextlib.ExitStack() as stack:
        with explained():
            folder = stack.enter_context(_Folder(path.parent, inside, make=inside is not None))
            descriptor = folder.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        file = io.BufferedWriter(_Output(descriptor, path.parent, needed), _BUFFER)
        try:
            yield file
            file.flush()
            with explained():
                if lasting:
                    os.fsync(descriptor)
                file.close()
                if not at_once:
                    folder.rename(name, path.name)
        except BaseException:
            with contextlib.suppress(OSError):  # of a flush after an error
                file.close()
            with contextlib.suppress(OSError):
                folder.remove(name)
            raise
        if lasting and not at_once:
            with explained():
                folder.sync()


def write_bytes(path: Path, data: bytes | memoryview, *, inside: Path | None = None, lasting: bool = True) -> None:
    """Write a file, whole or not at all; arguments as of `writing`."""
    with writing(path, inside=inside, needed=len(data), lasting=lasting) as file:
        file.write(data)


def write_text(path: Path, text: str, *, inside: Path | None = None) -> None:
    """Write a UTF-8 file, whole or not at all; arguments as of `writing`.

    Characters that UTF-8 cannot hold (parts of foreign file names) are written as backslash escapes.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), inside=inside)


def json_text(value: Any, indent: int | None = 2) -> str:
    """A value as JSON in ASCII: a file name that is not UTF-8 survives as an escape.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    return json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False) + "\n"


def write_json(path: Path, value: Any, *, indent: int | None = 2, inside: Path | None = None) -> None:
    """Write a value through `json_text` and `write_text`."""
    write_text(path, json_text(value, indent), inside=inside)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *, inside: Path | None = None
) -> None:
    """Write tensors of any dtype, layout and device as safetensors, with texts by name; otherwise as `writing`."""
    import safetensors.torch

    write_bytes(path, safetensors.torch.save(owned_tensors(tensors), metadata), inside=inside)


def owned_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each on the CPU: safetensors refuses views and tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def open_append(path: Path) -> io.FileIO:
    """Open a file, made if it is missing, to append to it; without a buffer, so that closing cannot fail."""
    return open(open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0)


def open_own(path: Path, flags: int) -> int:
    """Descriptor of a file that is changed in place: it is regular, no link, and has one name only.

    Flags are those of `os.open`, without O_TRUNC; the folder must exist.
    """
    assert not flags & os.O_TRUNC
    with explain_write_error(path.parent, 0), _Folder(path.parent) as folder:
        try:
            descriptor = folder.open(path.name, flags | _NO_WAITING)
        except OSError:
            if folder.is_link(path.name):
                raise _refusal(path, "a link") from None
            raise
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return descriptor
        os.close(descriptor)
        raise _refusal(path, "a file with a second name" if stat.S_ISREG(status.st_mode) else "no regular file")


class _Output(io.FileIO):
    """A file whose write errors say what to do."""

    def __init__(self, descriptor: int, folder: Path, needed: int) -> None:
        super().__init__(descriptor, "wb")
        self._explained = partial(explain_write_error, folder, needed)

    def write(self, data: Any) -> int:
        with self._explained():
            return os.write(self.fileno(), data)


# --- folders ------------------------------------------------------------------------------------------------


def make_folder(path: Path, *, inside: Path | None = None) -> None:
    """Make a folder of Tessella's, and those above it, if missing.

    `inside` is an existing folder above `path`: no folder below it on the way may be a link. Default: `path`.
    """
    with explain_write_error(path, 0):
        if inside is None and not path.is_dir():
            with contextlib.suppress(FileExistsError):  # a link that leads nowhere, or another file: refused below
                path.mkdir(parents=True, exist_ok=True)
                _sync_named(path.parent)
        _Folder(path, inside, make=True).close()


def refuse_link(path: Path, *, inside: Path | None = None) -> None:
    """Check that a folder of Tessella's, if it exists, lies in `inside` without a link on the way."""
    with explain_write_error(path, 0), contextlib.suppress(FileNotFoundError):
        _Folder(path, inside).close()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder for the body to fill; it gets its name when the body has ended without an error.

    A folder that had the name before is called `NAME.replaced` during the exchange, so that one of them always exists.
    The body gets the folder under its temporary name, and must write files by functions of this module. The folder
    above `path` must exist.
    """
    name, replaced = _temporary_name(), path.name + _REPLACED
    explained = partial(explain_write_error, path.parent, 0)
    with contextlib.ExitStack() as stack:
        with explained():
            folder = stack.enter_context(_Folder(path.parent))
            folder.mkdir(name)
        try:
            yield path.parent / name
            with explained():
                with _Folder(path.parent / name) as finished:
                    finished.sync()
                if folder.exists(path.name):
                    folder.remove(replaced)
                    folder.rename(path.name, replaced)
                folder.rename(name, path.name)
        except BaseException:
            with contextlib.suppress(OSError):
                folder.remove(name)
            raise
        with explained():
            folder.sync()
            folder.discard(replaced)


def remove(path: Path, *, inside: Path | None = None) -> None:
    """Remove a file, a link (never what it leads to) or a whole folder at once, if it exists.

    A folder that the system cannot remove at the moment keeps an unfinished name.
    """
    with (
        explain_write_error(path.parent, 0),
        contextlib.suppress(FileNotFoundError),
        _Folder(path.parent, inside) as folder,
    ):
        folder.discard(path.name)


def is_unfinished(path: Path) -> bool:
    """Whether a name is that of a file or folder which is being written."""
    return path.name.startswith(_TEMPORARY)


def remove_unfinished(folder: Path, older_than: float = 0.0) -> None:
    """Remove what killed processes have left in a folder of Tessella's.

    No other process may write there, unless what changed in the last `older_than` seconds is spared.
    """
    with explain_write_error(folder, 0), contextlib.suppress(FileNotFoundError), _Folder(folder) as opened:
        for name in opened.names():
            if name.startswith(_TEMPORARY):
                with contextlib.suppress(OSError):
                    if not older_than or time.time() - opened.status(name).st_mtime > older_than:
                        opened.remove(name)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, the file `lock` in it; both are made if missing. Other processes wait.

    Where locks do not work, or the folder cannot be written, two processes do the same work, which must be harmless.
    """
    from filelock import lock_descriptor

    with contextlib.ExitStack() as stack:
        try:
            make_folder(folder)
            descriptor = open_own(folder / "lock", os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, descriptor)
            lock_descriptor(descriptor)
        except OSError as error:
            if _is_refusal(error):
                raise
        yield


class _Folder:
    """An open folder, and operations on names in it; they raise OSError, and FileError for links."""

    def __init__(self, path: Path, inside: Path | None = None, make: bool = False) -> None:
        root = path if inside is None else inside
        parts = path.parts[len(root.parts) :]
        if path.parts[: len(root.parts)] != root.parts or ".." in parts:
            raise _refusal(path, "outside of its folder")
        self._path = root
        self._descriptor = _open_folder(root, root, None)
        try:
            for part in parts:
                if make and not self.exists(part):
                    with contextlib.suppress(FileExistsError):  # another process was faster
                        self.mkdir(part)
                        self.sync()
                below = _open_folder(self._at(part), self._path / part, self._descriptor)
                self.close()
                self._path, self._descriptor = self._path / part, below
        except BaseException:
            self.close()
            raise

    def _at(self, name: str) -> Any:
        return self._path / name if self._descriptor is None else name

    def open(self, name: str, flags: int) -> int:
        if self._descriptor is None and not flags & os.O_EXCL and _is_link(self._path / name):
            raise _refusal(self._path / name, "a link")
        return os.open(self._at(name), flags | _NO_LINKS | _COMMON, 0o666, dir_fd=self._descriptor)

    def mkdir(self, name: str) -> None:
        os.mkdir(self._at(name), dir_fd=self._descriptor)

    def rename(self, name: str, new: str) -> None:
        """Rename a file or folder. What has the new name is replaced, unless it is a folder with contents."""
        os.replace(self._at(name), self._at(new), src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def status(self, name: str) -> os.stat_result:
        return os.stat(self._at(name), dir_fd=self._descriptor, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        try:
            self.status(name)
        except FileNotFoundError:
            return False
        return True

    def is_link(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            return stat.S_ISLNK(self.status(name).st_mode)
        return False

    def names(self) -> list[str]:
        return os.listdir(self._path if self._descriptor is None else self._descriptor)

    def remove(self, name: str) -> None:
        """Remove whatever has this name, if anything, without following links."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(self.status(name).st_mode):
                shutil.rmtree(self._at(name), ignore_errors=True, dir_fd=self._descriptor)
            else:
                os.unlink(self._at(name), dir_fd=self._descriptor)

    def discard(self, name: str) -> None:
        """As `remove`. A folder is renamed first, so that its rest cannot be taken for a whole one."""
        if self.exists(name):
            temporary = _temporary_name()
            self.rename(name, temporary)
            self.remove(temporary)

    def sync(self) -> None:
        """Make names survive a power cut: fsync of a file does not cover its name."""
        if self._descriptor is not None:
            _sync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open_folder(path: Path | str, full: Path, dir_fd: int | None) -> int | None:
    """Descriptor of a folder that is no link; None where there are no such descriptors."""
    try:
        if _BY_DESCRIPTOR:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | _NO_LINKS | _COMMON, dir_fd=dir_fd)
        if not _is_link(full):
            os.listdir(full)  # raises what is wrong with it
            return None
    except OSError as error:
        if not _is_link(full):
            if error.errno == errno.ENOTDIR:
                raise _refusal(full, "no folder") from None
            raise
    raise _refusal(full, "a link")


def _temporary_name() -> str:
    return f"{_TEMPORARY}{secrets.token_hex(8)}"


def _is_link(path: Path) -> bool:
    """Also a junction, which is Windows' link to a folder."""
    return os.path.islink(path) or bool(getattr(os.path, "isjunction", os.path.islink)(path))


def _sync_named(folder: Path) -> None:
    if _BY_DESCRIPTOR:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _COMMON)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


# --- messages -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explain_write_error(folder: Path, needed: int) -> Iterator[None]:
    """Turn any OSError into a `FileError` that says what to do; for a full disk, how much is needed and free.

    The body writes in `folder` and needs `needed` bytes, 0 if unknown.
    """
    try:
        yield
    except OSError as error:
        if _is_refusal(error):
            raise
        cause = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL_DISK:
            raise _full_disk(folder, needed, error.errno) from error
        raise FileError(
            f"cannot write in {str(folder)!r}: {cause}. What was saved before is untouched: correct this, then resume",
            cause,
            error.errno,
        ) from error


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Check before anything is written that `needed` bytes fit into a folder."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return  # then writing will raise
    if disk.total and needed > disk.free:  # some network file systems report neither
        raise _full_disk(folder, needed, errno.ENOSPC)


def _full_disk(folder: Path, needed: int, code: int) -> FileError:
    what = f"cannot write {needed:,} bytes in" if needed else "cannot write in"
    try:
        free = f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        free = "an unknown number of"
    return FileError(
        f"{what} {str(folder)!r}: {os.strerror(code)}; {free} bytes are free. What was saved before is untouched: make "
        "room or raise the quota, then resume",
        os.strerror(code),
        code,
    )


def _refusal(path: Path, what: str) -> FileError:
    return FileError(
        f"{path} is {what}, so nothing is written there: it could lead into files of others. Remove it, or name "
        "another folder" + (f" (it leads to {os.path.realpath(path)})" if what == "a link" else ""),
        f"{path} is {what}",
    )


def _is_refusal(error: OSError) -> bool:
    """Whether an error is from `_refusal` and not from the system."""
    return isinstance(error, FileError) and error.errno is None
