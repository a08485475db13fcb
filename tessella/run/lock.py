"""One run folder, one writer: a lock that a killed process cannot leave behind.

The operating system holds the lock and drops it with its owner, whatever ends that; a recycled process id means
nothing to it. RUN/lock says in words who the owner is. Only where a file system has no locks, the words decide.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tessella.errors import UserError
from tessella.text import printable

NAME = "lock"  # of the file in the run folder

_PATIENCE = 1.0  # seconds; `owner_of` holds the lock for a moment too
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def only_writer(run: Path, name: str = NAME) -> Iterator[None]:
    """Be the one process that writes in a run folder, or in an evaluation's.

    Args:
        run: an existing folder.
        name: of the lock. A run may be evaluated into its own folder while it trains: each has a lock of its own.

    Raises:
        UserError: another process writes there, or the folder cannot be written.
    """
    path = run / name
    try:
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed below, or by the system)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None
    with file:
        _acquire(file, path)
        _describe(file, _this_process())
        try:
            yield
        finally:
            _describe(file, {})


def owner_of(run: Path) -> str:
    """Which process writes in a run folder now, in words; empty if none does.

    Args:
        run: a run folder; it may be read-only or missing.
    """
    try:
        with open(run / NAME, "rb") as file:
            return "" if _try(file, fcntl.LOCK_SH) else _in_words(_description(file))
    except OSError:
        return ""


def refuse_second_writer(run: Path) -> None:
    """Say at once, before anything slow, that a run folder is in use.

    Raises:
        UserError: another process writes there.
    """
    owner = owner_of(run)
    if owner:
        raise _in_use(run / NAME, owner)


def _acquire(file: BinaryIO, path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not _try(file, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            raise _in_use(path, _in_words(_description(file)))
        time.sleep(0.05)


def _try(file: BinaryIO, kind: int) -> bool:
    """Whether nobody else holds the lock; it is then held until the file is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _may_live(_description(file))
    return True


def _may_live(owner: dict[str, Any]) -> bool:
    """Where there are no locks: whether the process that the file names may still be there."""
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True  # cannot be told from here
    return owner.get("began") == _began(owner.get("pid"))


def _in_use(path: Path, owner: str) -> UserError:
    return UserError(
        f"{path.parent} is in use by {owner}: wait for it, or stop it. If it is gone for certain, delete {path}"
    )


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _began(pid: Any) -> str | None:
    """What tells a process from a later one of the same number: its start, in ticks since the machine's."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _describe(file: BinaryIO, owner: dict[str, Any]) -> None:
    """Name the owner. Words only: a full disk or a folder that has gone is no reason to stop here."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(json.dumps(owner).encode("ascii") if owner else b"")


def _description(file: BinaryIO) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read(4096))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_words(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return printable(f"process {owner.get('pid')} on {owner.get('host')}, which began at {owner.get('since')}")
