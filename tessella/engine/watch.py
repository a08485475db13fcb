"""Ranks gone wrong: one that died or hangs is named, and the others end instead of waiting for it for ever.

Every rank says once a second, in the store through which the ranks have found each other, that it lives and what it
does, and listens to its neighbour:

    a collective fails on this rank     who has fallen silent?  -> RankLost, with their names
    the neighbour is silent for long    who else?               -> told to all; stacks; the process ends
    one lives, but is behind the rest   said with all stacks    -> nothing else: storage may be slow

Time is counted in a rank's own beats: a process that was itself suspended or starved blames nobody for it.
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
_SILENT = 4  # beats of others that a rank misses at least to be called silent, once something is known to be wrong
_GRACE = 4  # beats for the main thread to end by itself
_MEETING_POINT = "the process through which ranks find each other (rank 0 or torchrun)"
_LEFT, _FAILED, _FOLLOWED = "left", "failed", "followed"  # what a rank that ends leaves instead of a beat

T = TypeVar("T")
_watches = itertools.count()  # alike on all ranks, as these make the same runs in the same order


class Watch:
    """Watches the other ranks while its block runs. Does nothing in a run of one rank, or without a timeout."""

    def __init__(self, timeout: float, advice: str = "`tessella resume` goes on from the last checkpoint") -> None:
        """Prepare.

        Args:
            timeout: seconds without a sign of life after which a rank is given up; 0: never.
            advice: what to do when a rank is lost.
        """
        self._advice = advice
        self._timeout = max(timeout, _SILENT * _BEAT)
        self._on = timeout > 0 and dist.world_size() > 1
        self._doing = (-1, "starts")
        self._stop = threading.Event()
        self._beats = self._rounds = 0

    def steps(self, batches: Iterable[T], step: int) -> Iterator[T]:
        """The batches of the loop; on their way it is noted where this rank is.

        Args:
            batches: of consecutive steps.
            step: the first one.
        """
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
            # A connection of its own: a wait here must not hold up the collectives.
            store = torch_dist.distributed_c10d._get_default_store().clone()
            self._store = torch_dist.PrefixStore(f"tessella-watch-{next(_watches)}", store)
            self._rank, self._world = dist.rank(), dist.world_size()
            self._store.set(f"who {self._rank}", f"process {os.getpid()} on {socket.gethostname()}")
            self._say_alive()
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
        with _deaf():  # torchrun has noticed, too, and sends SIGTERM
            lost = self._why_it_failed(cause) if isinstance(cause, RuntimeError) else ""
            if lost:
                self._say(f"{lost}. {self._advice}")
        self._stop.set()
        self._threads[0].join(_BEAT)
        said = f"{type(error).__name__}: {error}".splitlines()[0] if error else ""
        end = _FOLLOWED if lost else f"{_FAILED} with {said}" if error else _LEFT
        with contextlib.suppress(Exception):  # the store may be what is lost
            self._store.set(f"beat {self._rank}", end)
        if lost:
            raise RankLost(lost) from error

    # The main thread

    def _why_it_failed(self, error: RuntimeError) -> str:
        """Who is to blame for an error that a lost connection may have caused; empty if nobody else."""
        try:
            return self._verdict() or self._look_around()
        except Exception:  # the store's errors have many types
            return f"{_MEETING_POINT} is gone ({error})"

    # The threads

    def _beat(self) -> None:
        """Say that this rank lives; hear what the others say; look after the neighbour."""
        neighbour = (self._rank + 1) % self._world
        heard, missed = "", 0
        doing, behind = self._doing, 0
        patience = round(self._timeout / _BEAT)
        while not self._stop.wait(_BEAT):
            try:
                self._say_alive()
                if verdict := self._verdict():
                    self._store.set(f"beat {self._rank}", _FOLLOWED)
                    self._end(verdict)
                    return
                now = self._read(neighbour)
                missed = 0 if now != heard or now == _LEFT else missed + 1
                heard = now
                if missed >= patience and (lost := self._look_around()):
                    self._store.compare_set("verdict", "", lost)
                behind = 0 if doing != self._doing else behind + 1
                doing = self._doing
                if behind == patience:
                    self._tell_who_is_behind()
            except Exception as error:  # the store's errors have many types
                self._end(f"{_MEETING_POINT} is gone ({error})")
                return
            self._rounds += 1

    def _judge(self) -> None:
        """End a process whose other thread waits for a store that does not answer any more."""
        rounds, missed = -1, 0
        while not self._stop.wait(_BEAT):
            missed = 0 if rounds != self._rounds else missed + 1
            rounds = self._rounds
            if missed * _BEAT >= self._timeout + 2 * _SILENT:
                self._end(f"{_MEETING_POINT} does not answer")
                return

    def _look_around(self) -> str:
        """Which ranks have fallen silent, else what ranks that have failed said; empty if all are well."""
        others = [rank for rank in range(self._world) if rank != self._rank]
        before = {rank: self._read(rank) for rank in others}
        for _ in range(_SILENT):
            time.sleep(_BEAT)
            self._say_alive()  # others may be looking around, too
        now = {rank: self._read(rank) for rank in others}
        ended = (_LEFT, _FAILED, _FOLLOWED)
        silent = [rank for rank in others if now[rank] == before[rank] and not now[rank].startswith(ended)]
        if silent:
            who = ", ".join(f"rank {rank} ({self._store.get(f'who {rank}').decode()})" for rank in silent)
            gives = "give" if len(silent) > 1 else "gives"
            return f"{who} {gives} no sign of life: killed, out of memory, suspended, or cut off from the others"
        return "; ".join(f"rank {rank} {now[rank]}" for rank in others if now[rank].startswith(_FAILED))

    def _verdict(self) -> str:
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""

    def _tell_who_is_behind(self) -> None:
        doing = [self._read(rank).partition(" ")[2] for rank in range(self._world)]
        if len(set(doing)) > 1:
            said = "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(doing))
            self._say(f"for {self._timeout:.0f} s nothing has moved on. {said}. This rank's stacks:")
            _show_stacks()

    def _end(self, text: str) -> None:
        """End the process: its main thread sits in a collective that will never come back."""
        if self._stop.wait(_GRACE * _BEAT):  # it has noticed by itself
            return
        self._say(f"{text}. This rank was at: {_words(self._doing)}. It ends; its stacks:")
        _show_stacks()
        os._exit(EXIT_RANK_LOST)

    # The store

    def _say_alive(self) -> None:
        self._beats += 1
        self._store.set(f"beat {self._rank}", f"{self._beats} {_words(self._doing)}")

    def _read(self, rank: int) -> str:
        """What a rank has said last; empty if it has not begun."""
        key = f"beat {rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _say(self, text: str) -> None:
        note(f"tessella (rank {self._rank}): {text}", sys.__stderr__)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Do without SIGTERM and Ctrl-C for the seconds that it takes to find out who is lost: the process ends anyway."""
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
