"""Decode images in another process, which may crash or hang: that costs one image, and says which.

    this process: bytes of an image -> pipe -> another interpreter, `serve`: decode -> size, or the reason -> pipe

Decoders are large native libraries that read foreign files. Training decodes in its own process, because that is fast;
a scan of the data beforehand decodes here. No object is pickled: bytes go in, a line of JSON comes out.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tessella.data.decode import Unreadable, decode
from tessella.data.sources.images import ImageSet
from tessella.data.threads import over_rows

SECONDS = 10.0  # for one image; the largest that is accepted takes about 3
_PACKAGES = str(Path(__file__).resolve().parents[2])
# -P, and this package's own folder last: the working folder may be the adversary's, with a json.py in it.
COMMAND = (
    *(sys.executable, "-P", "-c"),
    f"import sys; sys.path.append({_PACKAGES!r}); from tessella.data.isolated import serve; serve()",
)

_START_SECONDS = 120.0  # a cold network drive may hold the interpreter
_LENGTH_BYTES = 8


class IsolatedDecoder:
    """One decoding process, started when it is first needed and again after each crash. For one thread at a time."""

    def __init__(self, command: Sequence[str] = COMMAND, seconds: float = SECONDS) -> None:
        self._command, self._seconds = command, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def size(self, encoded: bytes) -> tuple[int, int]:
        """Upright (width, height) of an image that was decoded whole.

        Raises:
            Unreadable: as `decode`; or the decoder crashed or took too long.
        """
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(len(encoded).to_bytes(_LENGTH_BYTES, "little"))
            process.stdin.write(encoded)
        except BrokenPipeError:
            pass  # it died: there will be no answer
        answer = self._line(self._seconds)
        if answer is None:
            self.close()
            raise Unreadable(f"decoding it takes more than {self._seconds:g} s")
        if not answer:
            raise Unreadable(f"the decoder crashed over it ({self._cause_of_death()})")
        size = json.loads(answer)
        if isinstance(size, str):
            raise Unreadable(size)
        return size[0], size[1]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._cause_of_death()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if self._line(_START_SECONDS) != b"ready\n":  # else every image would be blamed
                self.close()
                raise RuntimeError(f"the decoding process does not start: {' '.join(self._command)}")
        return self._process

    def _line(self, seconds: float) -> bytes | None:
        """The next answer; b"" from a process that has ended, None if nothing comes in time."""
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self._process.stdout.readline()  # short, and written at once

    def _cause_of_death(self) -> str:
        assert self._process is not None
        process, self._process = self._process, None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        code = process.wait()
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"exit code {code}"


def undecodable(
    images: ImageSet, workers: int | None = None, command: Sequence[str] = COMMAND, seconds: float = SECONDS
) -> list[tuple[str, str]]:
    """Decode every image of a set once, each in a process that may crash; nothing is decoded of an array in memory.

    Args:
        images: what to read.
        workers: decoding processes; default: the cores that this process may use.
        command: that starts one.
        seconds: after which decoding an image is given up.

    Returns:
        (key, reason) of those that could not be read or decoded whole, in row order.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    decoders = [IsolatedDecoder(command, seconds) for _ in range(max(1, workers or cores or 1))]
    free: queue.SimpleQueue[IsolatedDecoder] = queue.SimpleQueue()
    for decoder in decoders:
        free.put(decoder)
    failed: dict[int, str] = {}

    def check(rows: range) -> None:
        decoder = free.get()
        try:
            failed.update({row: reason for row in rows if (reason := _reason_against(images, row, decoder))})
        finally:
            free.put(decoder)

    try:
        over_rows(len(images), check, "decoding images", len(decoders))
    finally:
        for decoder in decoders:
            decoder.close()
    return [(images.key(row), failed[row]) for row in sorted(failed)]


def _reason_against(images: ImageSet, row: int, decoder: IsolatedDecoder) -> str:
    """Why an image cannot be used; "" if it can."""
    try:
        stored = images.read(row)
        if not isinstance(stored, bytes):
            return ""
        width, height = decoder.size(stored)
    except Unreadable as error:
        return error.reason
    indexed_width, indexed_height = images.sizes[row].tolist()
    if (width, height) == (indexed_width, indexed_height):
        return ""
    return f"{width} x {height} pixels, but {indexed_width} x {indexed_height} when the data set was indexed"


def serve() -> None:
    """Answer on standard output, a line of JSON for each image on standard input, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    images, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries may print; that is no answer
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not fill the disk
    answers.write(b"ready\n")
    while length := images.read(_LENGTH_BYTES):
        answer: str | tuple[int, ...]
        try:
            answer = decode(images.read(int.from_bytes(length, "little"))).shape[1::-1]  # width, height
        except Unreadable as error:
            answer = error.reason
        answers.write(json.dumps(answer).encode() + b"\n")
