"""Ctrl-C and SIGTERM: finish the step, save, exit with a code that says "resume me"."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

import torch

from tessella import dist

EXIT_INTERRUPTED = 75  # "temporary failure, try again" of sysexits.h: the run is saved, `tessella resume` goes on
_RANKS_ASK_EVERY = 10  # steps between two questions among ranks; one rank alone looks at every step


class Interrupted(Exception):
    """The run was asked to stop and has been saved."""


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that all ranks see at the same step; the second one quits."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            sys.exit(EXIT_INTERRUPTED)
        self._signal = number

    def seen_by_any_rank(self, step: int, device: torch.device) -> bool:
        """Whether to stop after this step. The same answer on every rank."""
        if dist.world_size() == 1:
            return self._signal is not None
        if step % _RANKS_ASK_EVERY:
            return False
        return bool(dist.all_reduce_max(torch.tensor(float(self._signal is not None), device=device)))
