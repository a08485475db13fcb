"""One run folder, one writer: a lock that a killed process cannot leave behind.

The operating system holds the lock, and releases it when its owner ends, however that happens. The file RUN/lock
describes the owner for messages. The description decides only on a file system without locks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from tessella import files
from tessella.errors import UserError
from tessella.text import printable

NAME = "lock"  # of the file in the run folder

_PATIENCE = 1.0  # seconds to wait for the lock, because `owner_of` holds it for a moment too
_PATIENCE_TO_LOOK = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def only_writer(run: Path, name: str = NAME) -> Iterator[None]:
    """Be the only process that writes in the folder of a run or of an evaluation.

    Args:
        run: an existing folder.
        name: of the lock. A run may be evaluated into its own folder while it trains, so each has its own lock.

    Raises:
        UserError: another process writes there, the folder cannot be written, or its lock is no regular file.
    """
    file = files.open_own(run / name, os.O_RDWR | os.O_CREAT)
    try:
        if not _acquire(file, _PATIENCE):
            raise _in_use(run / name, _in_words(_read_owner(file)))
        _write_owner(file, _this_process())
        try:
            yield
        finally:
            _write_owner(file, {})
    finally:
        os.close(file)


def owner_of(run: Path) -> str:
    """The process that writes in a run folder now, in words; empty if none does.

    Args:
        run: a run folder; it may be read-only or missing.
    """
    try:
        with files.open_regular(run / NAME) as file:
            free = _acquire(file.fileno(), _PATIENCE_TO_LOOK)
            return "" if free else _in_words(_read_owner(file.fileno()))
    except OSError:
        return ""


def refuse_second_writer(run: Path) -> None:
    """Refuse a run folder that is in use, before anything slow.

    Raises:
        UserError: another process writes there.
    """
    owner = owner_of(run)
    if owner:
        raise _in_use(run / NAME, owner)


def _acquire(file: int, patience: float) -> bool:
    """Whether the lock was acquired within so many seconds; it is held until the file is closed."""
    deadline = time.monotonic() + patience
    while not _try(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _try(file: int) -> bool:
    try:
        return lock_descriptor(file, blocking=False)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _may_live(_read_owner(file))


def _may_live(owner: dict[str, Any]) -> bool:
    """Without locks: whether the process that the file describes may still be running."""
    if owner and owner.get("host") != socket.gethostname():
        return True  # nothing is known about processes of another host
    return bool(owner) and owner.get("began") == _began(owner.get("pid"))


def _in_use(path: Path, owner: str) -> UserError:
    return UserError(
        f"{path.parent} is in use by {owner}: wait for it, or stop it. If it has certainly ended, delete {path}"
    )


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _began(pid: Any) -> str | None:
    """The start of a process in ticks since boot, which distinguishes it from a later one with the same id."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _write_owner(file: int, owner: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is a description only: a full disk does not matter here
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        # Windows locks the first byte, which others then cannot read.
        os.write(file, b" " + json.dumps(owner).encode("ascii") if owner else b"")


def _read_owner(file: int) -> dict[str, Any]:
    try:
        os.lseek(file, 1, os.SEEK_SET)
        owner = json.loads(os.read(file, 4096))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_words(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return printable(f"process {owner.get('pid')} on {owner.get('host')}, which began at {owner.get('since')}")
