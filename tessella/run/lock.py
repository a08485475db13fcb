"""One run folder, one writer: a lock that a killed process cannot leave behind.

The operating system holds the lock and drops it with its owner, whatever ends that; a recycled process id means
nothing to it. RUN/lock says in words who the owner is. Only where a file system has no locks, the words decide.
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

_PATIENCE = 1.0  # seconds; who only looks holds the lock for a moment too
_PATIENCE_TO_LOOK = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def only_writer(run: Path, name: str = NAME) -> Iterator[None]:
    """Be the one process that writes in a run folder, or in an evaluation's.

    Args:
        run: an existing folder.
        name: of the lock. A run may be evaluated into its own folder while it trains: each has a lock of its own.

    Raises:
        UserError: another process writes there, the folder cannot be written, or its lock is no file of ours.
    """
    file = files.open_own(run / name, os.O_RDWR | os.O_CREAT)
    try:
        if not _acquire(file, _PATIENCE):
            raise _in_use(run / name, _in_words(_description(file)))
        _describe(file, _this_process())
        try:
            yield
        finally:
            _describe(file, {})
    finally:
        os.close(file)


def owner_of(run: Path) -> str:
    """Which process writes in a run folder now, in words; empty if none does.

    Args:
        run: a run folder; it may be read-only or missing.
    """
    try:
        with files.open_regular(run / NAME) as file:
            free = _acquire(file.fileno(), _PATIENCE_TO_LOOK)
            return "" if free else _in_words(_description(file.fileno()))
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


def _acquire(file: int, patience: float) -> bool:
    """Whether the lock is ours within so many seconds; it is then held until the file is closed."""
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
        return not _may_live(_description(file))


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


def _describe(file: int, owner: dict[str, Any]) -> None:
    """Name the owner. Words only: a full disk or a folder that has gone is no reason to stop here."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        # The first byte is what Windows locks, and then nobody else can read it.
        os.write(file, b" " + json.dumps(owner).encode("ascii") if owner else b"")


def _description(file: int) -> dict[str, Any]:
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
