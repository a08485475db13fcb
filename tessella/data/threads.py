"""Work on threads: some items ahead of the consumer and in order, or over all rows of a data set."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from tessella.console import progress_bar

AHEAD = 3  # items in work beyond the one that the consumer holds
_IMAGES_PER_TASK = 4  # few: threads finish a batch together; not one: a task costs some 50 us
_ROWS_PER_TASK = 64

T = TypeVar("T")
Task = Callable[[], None]


def run_ahead(work: Iterable[tuple[T, Sequence[Task]]], workers: int) -> Generator[T, None, None]:
    """Run tasks on threads some items ahead; yield each item, in order, when all of its tasks are done.

    Leaving the generator in any way drops tasks that have not begun and waits for the others: a thread inside a decoder
    when the interpreter ends would abort the process, so the threads are not daemons.
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


def over_rows(count: int, work: Callable[[range], None], title: str, workers: int) -> None:
    """Do `work` on the rows 0 ... count - 1, part by part, on threads, with a progress bar.

    An error, or Ctrl-C, drops the parts that have not begun.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        parts = [range(start, min(start + _ROWS_PER_TASK, count)) for start in range(0, count, _ROWS_PER_TASK)]
        tasks = {pool.submit(work, rows): len(rows) for rows in parts}
        with progress_bar(title, count) as advance:
            for task in as_completed(tasks):
                task.result()
                advance(tasks[task])
    finally:
        pool.shutdown(cancel_futures=True)


def _complete(pending: deque[tuple[T, list]]) -> T:
    item, futures = pending.popleft()
    for future in futures:
        future.result()
    return item


_starting = threading.Lock()


def _without_inner_threads() -> None:
    """Let this thread's torch operations run on this thread alone, without changing other threads.

    torch keeps the number per thread, but also a copy from which later threads start; another thread restores the copy.
    """
    import torch  # not by importing this module: a process that only decodes does without

    with _starting:
        inherited = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(inherited,))
        restore.start()
        restore.join()


def portions(n: int, size: int = _IMAGES_PER_TASK) -> list[list[int]]:
    """The numbers 0 ... n - 1 in parts of `size`, for one task each."""
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]
