"""Ctrl-C and SIGTERM, from the first moment to the last.

    around every command (`stoppable`)      the program is left where it is: nothing there needs an orderly end
    around the training loop (`StopRequest`)  the step is finished and saved first

A second signal quits at once. That is safe too, as SIGKILL is: what is written is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

EXIT_INTERRUPTED = 75  # "temporary failure, try again" of sysexits.h: `tessella resume` goes on
EXIT_STOPPED = 130  # as shells say it of Ctrl-C: there is nothing to go on with

_RANKS_ASK_EVERY = 10  # steps between two questions among ranks; one rank alone looks at every step
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar may have hidden it

_asked: int | None = None  # the signal that `stoppable` has turned into an exception


class Interrupted(Exception):
    """The run was asked to stop and has been saved."""


class Stopped(KeyboardInterrupt):
    """The program was asked to stop where nothing needs an orderly end; the text names the signal."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the body with `Stopped`, wherever it is.

    Raises:
        Stopped: also for an error that the signal has led to, as when it comes in the middle of an import.
    """
    global _asked
    _asked = None
    with _handling(_stop_here):
        try:
            yield
        except Exception as error:
            if _asked is None:
                raise
            raise Stopped(f"stopped by {_NAMES[signal.Signals(_asked)]}") from error


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that all ranks see at the same step; the second one quits."""

    def __init__(self) -> None:
        self._signal = _asked  # one that came before, if what it interrupted took no notice
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._handlers.enter_context(_handling(self._handle))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            _quit(number, EXIT_INTERRUPTED)
        self._signal = number

    def seen_by_any_rank(self, step: int, device: torch.device) -> bool:
        """Whether to stop after this step. The same answer on every rank."""
        import torch  # within, because the command line needs this module before it needs torch

        from tessella import dist

        if dist.world_size() == 1:
            return self._signal is not None
        if step % _RANKS_ASK_EVERY:
            return False
        return bool(dist.all_reduce_max(torch.tensor(float(self._signal is not None), device=device)))


def _stop_here(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked is not None:
        _quit(number, EXIT_STOPPED)
    _asked = number
    raise Stopped(f"stopped by {_NAMES[signal.Signals(number)]}")


def _quit(number: int, code: int) -> None:
    """End the process without waiting for threads, which may hang in a decoder or on a network file system."""
    with contextlib.suppress(OSError):  # a terminal that is gone keeps nobody from ending
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
        os.write(2, f"tessella: {_NAMES[signal.Signals(number)]} for the second time: quits at once\n".encode())
    os._exit(code)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Both signals go to `handler`; nothing changes on threads, which Python gives no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _NAMES}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
