"""Work over all rows is done once per row, and ends at the first error."""

from __future__ import annotations

import threading
import time

import pytest

from tessella.data.threads import over_rows


def test_every_row_is_worked_on_once_by_several_threads():
    seen, threads, both = [], set(), threading.Barrier(2, timeout=30)

    def work(rows: range) -> None:
        threads.add(threading.current_thread())
        seen.extend(rows)
        if rows.start < 128:
            both.wait()  # the first two parts meet: they are worked on at the same time

    over_rows(1000, work, "working", workers=2)
    assert sorted(seen) == list(range(1000)) and len(threads) == 2


def test_an_error_is_raised_and_drops_what_has_not_begun():
    seen = []

    def work(rows: range) -> None:
        seen.append(rows.start)
        if rows.start == 0:
            raise OSError("gone")
        time.sleep(0.05)

    with pytest.raises(OSError, match="gone"):
        over_rows(64 * 200, work, "working", workers=1)
    assert len(seen) < 100


def test_no_rows_need_no_work():
    over_rows(0, lambda rows: pytest.fail("called"), "working", workers=1)
