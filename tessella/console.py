"""Notes and progress on the console.

    with progress_bar("packing", total=1000) as advance:
        advance(1)

A bar on a terminal and in a notebook; elsewhere, as in the log file of a batch system, a line every ten seconds. The
console may be closed, on a full disk, or a pipe whose reader has ended: work continues without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from tessella.text import printable

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


class LossyStream(io.TextIOBase):
    """A text stream whose errors stop nothing: after the first one, what is written is dropped.

    Characters outside the stream's encoding are written as backslash escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Wrap a stream; None, which Python uses for a closed descriptor, drops everything."""
        self._stream = stream
        self.error: OSError | None = None  # the one that closed this stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a person watches."""
        return self._stream is not None and self.error is None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor."""
        if self._stream is None:
            raise io.UnsupportedOperation("the stream is closed")
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Write, or drop; the number of characters."""
        self._do(lambda stream: stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        self._do(lambda stream: stream.flush())

    def _do(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None or self.error is not None or self._stream.closed:
            return
        try:
            action(self._stream)
        except OSError as error:
            self.error = error


def note(text: str, stream: TextIO | None = None) -> None:
    """Print a line to standard error or another stream, with control characters escaped."""
    print(printable(text), file=LossyStream(stream or sys.stderr), flush=True)


class Display:
    """Progress of one task, and the time left. A context manager."""

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        unit: Literal["", "bytes"] = "",
        console: Console | None = None,
        keep: bool = False,
    ) -> None:
        """Show the display.

        Args:
            title: of the task.
            total: number of units.
            done: units that were done before; they do not count for the speed.
            unit: "bytes" shows sizes in kB, MB and so on.
            console: default: standard error.
            keep: whether the bar stays on the terminal at the end.
        """
        from rich.console import Console

        self._title, self._total, self._done, self._first, self._unit = title, total, done, done, unit
        self._console = console or Console(file=LossyStream(sys.stderr))  # type: ignore[arg-type]
        self._started = self._printed = time.monotonic()
        self._task: Any = None
        self._text = ""
        notebook = self._console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        if self._console.is_terminal or notebook:
            self._bar = _bar(self._console, unit, transient=not keep)
            self._task = self._bar.add_task(printable(title), total=total, completed=done)
            self._bar.start()

    def advance(self, count: int = 1) -> None:
        """Add units that are done."""
        self.update(self._done + count)

    def update(self, done: int, text: str = "") -> None:
        """Set the number of units that are done, and perhaps a new text to show."""
        self._done, first_text = done, bool(text) and not self._text
        self._text = text or self._text
        if self._task is not None:
            self._bar.update(self._task, completed=done, description=self._text or None)
            return
        now = time.monotonic()
        last = bool(text) and done >= self._total
        if now - self._printed >= SECONDS_BETWEEN_LINES or first_text or last:
            self._printed = now
            left = (self._total - done) * (now - self._started) / max(done - self._first, 1)
            far = f"{self._title} {self._amount(done)} of {self._amount(self._total)}"
            self.say(f"{far}{f': {self._text}' if self._text else ''}, {duration(left)} left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(printable(text), markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """End the display. A second call does nothing."""
        if self._task is not None:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _amount(self, count: int) -> str:
        from rich.filesize import decimal

        return decimal(count) if self._unit else f"{count:,}"


@contextlib.contextmanager
def progress_bar(title: str, total: int, unit: Literal["", "bytes"] = "") -> Iterator[Callable[[int], None]]:
    """A `Display` on standard error; gives the function that advances it."""
    with Display(title, total, unit=unit) as display:
        yield display.advance


def duration(seconds: float) -> str:
    """A duration in words, with its two largest units."""
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _bar(console: Console, unit: str, transient: bool) -> Any:
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    amount = DownloadColumn() if unit else MofNCompleteColumn()
    # The speed is averaged over an hour: steps of a large run may be minutes apart.
    return Progress(
        amount,
        BarColumn(bar_width=20),
        text,
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
        speed_estimate_period=3600,
        transient=transient,
    )
