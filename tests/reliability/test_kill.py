"""A run that is killed at any moment goes on as if nothing had happened. Counts and seeds can be replayed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from tests.reliability.program import (
    METHODS,
    Program,
    assert_goes_on,
    assert_same_runs,
    next_words,
    pretrain_words,
    ranks,
    run,
)
from tests.reliability.test_images_changed import picture

pytestmark = pytest.mark.timeout(900)  # five programs one after the other, on a machine that may have other work
KILLS = 50  # per method, in the full count
KILLS_IN_A_ROW = 5  # of one run, before it may end


class Straight:
    """Runs that nobody disturbs, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seconds = folder, dict[tuple[str, str], float]()

    def __call__(self, method: str, data: str = "digits::test") -> tuple[Path, float]:
        """Its folder, and the seconds that it took."""
        folder = self._folder / f"{method}-{'digits' if data == 'digits::test' else 'files'}"
        if (method, data) not in self._seconds:
            self._seconds[method, data] = run(pretrain_words(method, folder, data), folder.with_suffix(".said"))
        return folder, self._seconds[method, data]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight"))


def kill_until_done(words: Callable[[], list[str]], folder: Path, moments: Iterable[float]) -> int:
    """Kill one run after so many seconds of each start, then let it end; how often it was really killed."""
    killed = 0
    for number, seconds in enumerate(moments):
        if not Program(words(), folder.with_suffix(f".{number}")).kill_at(seconds):
            break
        killed += 1
        assert_goes_on(folder)
    if not (folder / "backbone.safetensors").exists():
        run(words(), folder.with_suffix(".last"))
    return killed


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_twice_equals_one_that_was_not(method: str, straight: Straight, tmp_path: Path):
    (expected, seconds), killed, draw = straight(method), tmp_path / "killed", random.Random(method)
    kill_until_done(partial(next_words, method, killed), killed, [draw.uniform(0, seconds) for _ in range(2)])
    assert_same_runs(expected, killed)


def test_a_run_that_decodes_files_killed_twice_equals_one_that_was_not(straight: Straight, tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number in range(320):
        picture(tmp_path / "data", str(number), number, ".jpg")
    data, killed = str(tmp_path / "data"), tmp_path / "killed"
    expected, seconds = straight("coke", data)
    kill_until_done(partial(next_words, "coke", killed, data), killed, [0.4 * seconds, 0.6 * seconds])
    assert_same_runs(expected, killed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_fifty_kills_at_random_times_change_nothing(method: str, straight: Straight, tmp_path: Path):
    (expected, seconds), draw, total = straight(method), random.Random(f"{method} 0"), 0
    for number in range(1000):
        if total == KILLS:
            break
        killed = tmp_path / f"killed-{number}"
        moments = [draw.uniform(0, seconds) for _ in range(min(KILLS_IN_A_ROW, KILLS - total))]
        total += kill_until_done(partial(next_words, method, killed), killed, moments)
        assert_same_runs(expected, killed)
    assert total == KILLS


@pytest.mark.parametrize("call", [3, 67])
def test_a_run_killed_while_it_writes_equals_one_that_was_not(call: int, straight: Straight, tmp_path: Path):
    """At a call of the system: 3 is before the run has begun, 67 within a save."""
    check_call("jigclu", call, straight("jigclu")[0], tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_every_call_of_the_system_equals_one_that_was_not(straight: Straight, tmp_path: Path):
    expected, calls = straight("jigclu")[0], 1
    while check_call("jigclu", calls, expected, tmp_path / str(calls)):
        calls += 1
    assert calls > 100


def check_call(method: str, call: int, expected: Path, folder: Path) -> bool:
    """Kill a run at a call, and let it go on; whether there was such a call."""
    code = Program(pretrain_words(method, folder), folder.with_suffix(".said"), die_at_call=call).wait()
    if code == 0:
        return False
    assert code == -signal.SIGKILL
    assert_goes_on(folder)
    run(next_words(method, folder), folder.with_suffix(".last"))
    assert_same_runs(expected, folder)
    return True


def train_on_two_ranks(method: str, folder: Path, kill: tuple[int, float] | None = None) -> None:
    """Run it to its end, or kill one rank after some seconds; what is left of it then ends too."""
    programs = ranks(next_words(method, folder), folder.with_suffix(".said"), 2)
    if kill:
        programs[kill[0]].kill_at(kill[1])
        programs[1 - kill[0]].kill_at(30)  # as torchrun does
    else:
        for program in programs:
            assert program.wait() == 0, program.said()


def check_two_ranks(method: str, tmp_path: Path, kills: int) -> None:
    started = time.monotonic()
    train_on_two_ranks(method, tmp_path / "straight")
    seconds, draw = time.monotonic() - started, random.Random(method)
    for number in range(kills):
        folder = tmp_path / f"killed-{number}"
        train_on_two_ranks(method, folder, kill=(draw.randrange(2), draw.uniform(0.3, 1) * seconds))
        train_on_two_ranks(method, folder)
        assert_same_runs(tmp_path / "straight", folder)


def test_two_ranks_of_which_one_was_killed_go_on_as_if_nothing_had_happened(tmp_path: Path):
    check_two_ranks("swav", tmp_path, kills=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_one_of_two_ranks_killed_five_times_changes_nothing(method: str, tmp_path: Path):
    check_two_ranks(method, tmp_path, kills=5)
