"""Work on threads some items ahead of who consumes the results, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

AHEAD = 3  # items in work beyond the one that the consumer holds
_IMAGES_PER_TASK = 4  # few: threads finish a batch together; not one: a task costs some 50 us

T = TypeVar("T")
Task = Callable[[], None]


def run_ahead(work: Iterable[tuple[T, Sequence[Task]]], workers: int) -> Generator[T, None, None]:
    """Run tasks on threads some items ahead; yield each item, in order, when all of its tasks are done.

    The threads are not daemons, because one that is inside a decoder when the interpreter goes away aborts
    the process. Instead, leaving this generator in whatever way drops what has not begun and waits for what
    has.

    Args:
        work: items and the tasks that complete them.
        workers: number of threads.

    Yields:
        The items.
    """
    pool = ThreadPoolExecutor(workers, "tessella-data", _without_inner_threads)
    try:
        pending: deque[tuple[T, list]] = deque()
        for item, tasks in work:
            pending.append((item, [pool.submit(task) for task in tasks]))
            if len(pending) > AHEAD:
                yield _complete(pending)
        while pending:
            yield _complete(pending)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _complete(pending: deque[tuple[T, list]]) -> T:
    item, futures = pending.popleft()
    for future in futures:
        future.result()
    return item


_starting = threading.Lock()


def _without_inner_threads() -> None:
    """Let this thread's torch operations run on this thread alone, and change no other thread's setting.

    torch keeps the number per thread, but also a copy from which later threads start; a throw-away thread
    puts the copy back.
    """
    with _starting:
        inherited = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(inherited,))
        restore.start()
        restore.join()


def portions(n: int, size: int = _IMAGES_PER_TASK) -> list[list[int]]:
    """Positions of a batch in portions for one task each."""
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]
