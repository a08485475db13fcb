"""Watches what the interpreter itself reports: processes that are started, names that a pickle looks up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PROCESSES = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
_watching: list[list[str]] = []
_installed = False


def _hook(event: str, arguments: tuple) -> None:
    if _watching and (event in _PROCESSES or event == "pickle.find_class"):
        for seen in _watching:
            seen.append(f"{event} {arguments!r:.200}")


@contextmanager
def nothing_started() -> Iterator[None]:
    """Fails if a process is started, or a pickle's code looked up, in this process meanwhile."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)  # can never be removed: it looks whether anybody watches
        _installed = True
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield
    finally:
        _watching.remove(seen)
    assert seen == []
