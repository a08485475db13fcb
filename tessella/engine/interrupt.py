"""Ctrl-C and SIGTERM during the whole life of the program.

    in every command (`stoppable`)         the program ends where it is: nothing there needs an orderly end
    in the training loop (`StopRequest`)   the step is finished and saved first

A second signal quits at once. That is as safe as SIGKILL, because files are written whole or not at all.
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

EXIT_INTERRUPTED = 75  # "temporary failure, try again" of sysexits.h: `tessella resume` continues
EXIT_STOPPED = 130  # the code of Ctrl-C in shells: there is nothing to resume

_RANKS_ASK_EVERY = 10  # steps between two exchanges among ranks; one rank alone checks at every step
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar may have hidden it

_asked: int | None = None  # the signal that `stoppable` has turned into an exception


class Interrupted(Exception):
    """The run was asked to stop and has been saved."""


class Stopped(KeyboardInterrupt):
    """The program was stopped where nothing needs an orderly end; the text names the signal."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the body with `Stopped`.

    Raises:
        Stopped: also for an error that the signal has caused, for example in the middle of an import.
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
        self._signal = _asked  # an earlier one whose exception was swallowed
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
        import torch  # here, because the command line imports this module before torch

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
    with contextlib.suppress(OSError):  # the terminal may be gone
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
        os.write(2, f"tessella: {_NAMES[signal.Signals(number)]} for the second time: quits at once\n".encode())
    os._exit(code)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` handle both signals. Does nothing outside the main thread, where Python handles no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _NAMES}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
