"""The memory of this machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_GIB = 1 << 30


def machine_bytes() -> int | None:
    """Memory of this machine, or the part of it that this process's container may use; None if it is not known."""
    limits = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(limits, default=None)


def size_in_words(count: float) -> str:
    """A number of bytes in GiB or MiB."""
    return f"{count / _GIB:.1f} GiB" if count >= _GIB / 10 else f"{count / (1 << 20):.0f} MiB"
