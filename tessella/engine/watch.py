"""Lost ranks: one that died or hangs is named, and the others end instead of waiting for it.

Every rank writes once a second into the store of the process group that it is alive and what it does, and reads the
same of its neighbour:

    a collective fails on this rank     which ranks are silent?    -> RankLost, with their names
    the neighbour is silent for long    which others?              -> all ranks print their stacks and end
    a rank is alive, but does not move  all ranks print stacks     -> nothing else: storage may be slow

Time is counted in this rank's own beats, so a process that was suspended itself does not blame the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

import torch.distributed as torch_dist

from tessella import dist
from tessella.console import note
from tessella.errors import EXIT_RANK_LOST, RankLost

_BEAT = 1.0  # seconds
_SILENT = 4  # beats without which a rank counts as silent, once something is known to be wrong
_GRACE = 4  # beats for the main thread to end by itself
_STORE = "the process through which ranks find each other (rank 0 or torchrun)"
_LEFT, _FAILED, _FOLLOWED = "left", "failed", "followed"  # written by a rank that ends, instead of a beat

T = TypeVar("T")
_watches = itertools.count()  # the same on all ranks, which start the same runs in the same order


class Watch:
    """Watches the other ranks while its block runs. Does nothing in a run of one rank, or without a timeout."""

    def __init__(self, timeout: float, advice: str = "`tessella resume` continues from the last checkpoint") -> None:
        """Prepare to count a rank as lost after so many seconds without a sign of life (0: never), and give advice."""
        self._advice = advice
        self._timeout = max(timeout, _SILENT * _BEAT)
        self._on = timeout > 0 and dist.world_size() > 1
        self._doing = (-1, "starts")
        self._stop = threading.Event()
        self._beats = self._rounds = 0

    def steps(self, batches: Iterable[T], step: int) -> Iterator[T]:
        """The batches of consecutive steps from `step` on; records what this rank is doing."""
        iterator = iter(batches)
        for number in itertools.count(step):
            self._doing = (number, "waits for images")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._doing = (number, "computes")
            yield batch

    def __enter__(self) -> Self:
        if self._on:
            # A separate connection: waiting here must not delay the collectives.
            store = torch_dist.distributed_c10d._get_default_store().clone()
            self._store = torch_dist.PrefixStore(f"tessella-watch-{next(_watches)}", store)
            self._rank, self._world = dist.rank(), dist.world_size()
            self._store.set(f"who {self._rank}", f"process {os.getpid()} on {socket.gethostname()}")
            self._write_beat()
            self._threads = [
                threading.Thread(target=work, name="tessella-watch", daemon=True) for work in (self._beat, self._judge)
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._on:
            return
        cause = error if isinstance(error, RuntimeError) else getattr(error, "__context__", None)
        with _signals_ignored():  # torchrun has noticed too, and sends SIGTERM
            lost = self._lost_ranks(cause) if isinstance(cause, RuntimeError) else ""
            if lost:
                self._say(f"{lost}. {self._advice}")
        self._stop.set()
        self._threads[0].join(_BEAT)
        message = f"{type(error).__name__}: {error}".splitlines()[0] if error else ""
        end = _FOLLOWED if lost else f"{_FAILED} with {message}" if error else _LEFT
        with contextlib.suppress(Exception):  # the store may be what is lost
            self._store.set(f"beat {self._rank}", end)
        if lost:
            raise RankLost(lost) from error

    # The main thread

    def _lost_ranks(self, error: RuntimeError) -> str:
        """The ranks whose loss may have caused the error; empty if there are none."""
        try:
            return self._verdict() or self._silent_ranks()
        except Exception:  # the store's errors have many types
            return f"{_STORE} is gone ({error})"

    # The threads

    def _beat(self) -> None:
        """Write this rank's beat, read the verdict of others, and watch the neighbour."""
        neighbour = (self._rank + 1) % self._world
        last, missed = "", 0
        doing, behind = self._doing, 0
        patience = round(self._timeout / _BEAT)
        while not self._stop.wait(_BEAT):
            try:
                self._write_beat()
                if verdict := self._verdict():
                    self._store.set(f"beat {self._rank}", _FOLLOWED)
                    self._end(verdict)
                    return
                now = self._read(neighbour)
                missed = 0 if now != last or now == _LEFT else missed + 1
                last = now
                if missed >= patience and (lost := self._silent_ranks()):
                    self._store.compare_set("verdict", "", lost)
                behind = 0 if doing != self._doing else behind + 1
                doing = self._doing
                if behind == patience:
                    self._print_all_positions()
            except Exception as error:  # the store's errors have many types
                self._end(f"{_STORE} is gone ({error})")
                return
            self._rounds += 1

    def _judge(self) -> None:
        """End the process if its other thread waits for a store that no longer answers."""
        rounds, missed = -1, 0
        while not self._stop.wait(_BEAT):
            missed = 0 if rounds != self._rounds else missed + 1
            rounds = self._rounds
            if missed * _BEAT >= self._timeout + 2 * _SILENT:
                self._end(f"{_STORE} does not answer")
                return

    def _silent_ranks(self) -> str:
        """The ranks without a beat, else the errors of ranks that have failed; empty if there are none."""
        others = [rank for rank in range(self._world) if rank != self._rank]
        before = {rank: self._read(rank) for rank in others}
        for _ in range(_SILENT):
            time.sleep(_BEAT)
            self._write_beat()  # others may be waiting for it too
        now = {rank: self._read(rank) for rank in others}
        ended = (_LEFT, _FAILED, _FOLLOWED)
        silent = [rank for rank in others if now[rank] == before[rank] and not now[rank].startswith(ended)]
        if silent:
            who = ", ".join(f"rank {rank} ({self._store.get(f'who {rank}').decode()})" for rank in silent)
            verb = "give" if len(silent) > 1 else "gives"
            return f"{who} {verb} no sign of life: killed, out of memory, suspended, or cut off from the others"
        return "; ".join(f"rank {rank} {now[rank]}" for rank in others if now[rank].startswith(_FAILED))

    def _verdict(self) -> str:
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""

    def _print_all_positions(self) -> None:
        doing = [self._read(rank).partition(" ")[2] for rank in range(self._world)]
        if len(set(doing)) > 1:
            positions = "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(doing))
            self._say(f"no progress for {self._timeout:.0f} s. {positions}. This rank's stacks:")
            _show_stacks()

    def _end(self, text: str) -> None:
        """End the process: its main thread waits in a collective that will never return."""
        if self._stop.wait(_GRACE * _BEAT):  # the main thread has noticed by itself
            return
        self._say(f"{text}. This rank was at: {_words(self._doing)}. It ends; its stacks:")
        _show_stacks()
        os._exit(EXIT_RANK_LOST)

    # The store

    def _write_beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat {self._rank}", f"{self._beats} {_words(self._doing)}")

    def _read(self, rank: int) -> str:
        """The last beat of a rank; empty if it has not begun."""
        key = f"beat {rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _say(self, text: str) -> None:
        note(f"tessella (rank {self._rank}): {text}", sys.__stderr__)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore SIGTERM and Ctrl-C for the seconds in which lost ranks are identified: the process ends anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _words(doing: tuple[int, str]) -> str:
    step, what = doing
    return f"step {step}, {what}" if step >= 0 else what


def _show_stacks() -> None:
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
