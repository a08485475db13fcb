"""Weeks of training: memory, open files, threads and disk stay as they are, and the clock may jump."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tessella.data.index import Index
from tessella.data.sources import ImageSet
from tessella.engine.pretrain import pretrain, resume
from tessella.run.monitor import Monitor
from tests.engine.runs import assert_same, final_state, tiny_run
from tests.reliability.program import log_without_timing, names

MEGABYTE = 1 << 20


class Use(NamedTuple):
    """What this process holds."""

    memory: int  # bytes in RAM
    files: int
    threads: int
    shared: int  # files in shared memory


def use() -> Use:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    shared = len(list(Path("/dev/shm").iterdir())) if Path("/dev/shm").is_dir() else 0
    return Use(
        pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), shared
    )


class Repeated(ImageSet):
    """Any number of images that show the same noise, read each time: two sizes, so that they do not become resident."""

    def __init__(self, count: int) -> None:
        sizes = [(20, 24) if number == 1 else (24, 20) for number in range(count)]
        index = Index.of([f"{number:08d}" for number in range(count)], sizes, fingerprint=str(count))
        super().__init__("repeated", index, labelled=False)
        self._pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)

    def read(self, row: int) -> NDArray[np.uint8]:
        return self._pixels.transpose(1, 0, 2).copy() if row == 1 else self._pixels.copy()

    def image(self, row: int) -> NDArray[np.uint8]:
        return self.read(row)


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Use]]:
    """What the process holds after each epoch."""
    seen: list[Use] = []
    original = Monitor.epoch_start

    def noted(monitor: Monitor) -> None:
        original(monitor)
        seen.append(use())

    monkeypatch.setattr(Monitor, "epoch_start", noted)
    yield seen


def assert_flat(uses: list[Use]) -> None:
    """After the second epoch nothing grows: the middle of the last three against the middle of the first three."""
    first, last = uses[2:5], uses[-3:]
    for name in ("files", "threads", "shared"):
        assert max(getattr(u, name) for u in last) <= max(getattr(u, name) for u in first), (name, uses)
    epochs = len(uses) - 5
    growth = np.median([u.memory for u in last]) - np.median([u.memory for u in first])
    assert growth / epochs < MEGABYTE, [u.memory for u in uses]


def test_nothing_grows_over_twelve_epochs(uses: list[Use], tmp_path: Path):
    config = tiny_run("jigclu", epochs=12, batch_size=32, workers=2, checkpoint_minutes=1e-9)
    run = pretrain(config, tmp_path / "run", Repeated(96))
    assert len(uses) == 12
    assert_flat(uses)
    assert len(names(run / "checkpoints")) == 2
    assert sum(path.stat().st_size for path in (run / "checkpoints").rglob("*")) < 5 * MEGABYTE


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_grows_over_two_hundred_epochs(uses: list[Use], tmp_path: Path):
    run = pretrain(tiny_run("jigclu", epochs=200, batch_size=32, workers=2), tmp_path / "run", Repeated(96))
    assert len(uses) == 200
    assert_flat(uses)
    assert (run / "metrics.jsonl").stat().st_size < 2 * MEGABYTE


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_images_cost_their_index_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    images = Repeated(1_000_000)
    seen: list[Use] = []
    original = Monitor.observe

    def noted(monitor: Monitor, *args: object, **kwargs: object) -> None:
        original(monitor, *args, **kwargs)  # type: ignore[arg-type]
        seen.append(use())

    monkeypatch.setattr(Monitor, "observe", noted)
    config = tiny_run("jigclu", batch_size=64, workers=2, max_steps=200)
    pretrain(config, tmp_path / "run", images)
    first, last = (np.median([u.memory for u in part]) for part in (seen[20:40], seen[-20:]))
    assert last - first < 20 * MEGABYTE, (first, last)
    assert max(u.threads for u in seen[-20:]) <= max(u.threads for u in seen[20:40])


@pytest.mark.parametrize("shift", [-365 * 86_400.0, 365 * 86_400.0])
def test_a_clock_that_jumps_by_a_year_changes_nothing(shift: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    straight = pretrain(tiny_run("jigclu", checkpoint_minutes=1e-9), tmp_path / "straight")
    cut = pretrain(tiny_run("jigclu", checkpoint_minutes=1e-9, max_steps=4), tmp_path / "cut")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    for number, path in enumerate((cut / "checkpoints").iterdir()):  # dates that say the opposite of the names
        with contextlib.suppress(OSError):
            os.utime(path, (real() + shift - number, real() + shift - number))
    resume(cut, {"max_steps": None})
    assert_same(final_state(straight), final_state(cut))
    assert log_without_timing(cut) == log_without_timing(straight)
