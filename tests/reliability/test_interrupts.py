"""Ctrl-C and SIGTERM at any moment: an orderly end with a word and a documented code; the run goes on from there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessella.cli import main
from tessella.engine.interrupt import EXIT_INTERRUPTED, EXIT_STOPPED, Stopped, StopRequest, stoppable
from tests.reliability.program import METHODS, Program, assert_same_runs, next_words, pretrain_words, run

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def interrupt_until_done(method: str, folder: Path, draw: random.Random, seconds: float, count: int) -> int:
    """Interrupt one run so many times, then let it end; how often a signal met it."""
    met = 0
    for number in range(count):
        words = next_words(method, folder)
        program = Program(words, folder.with_suffix(f".{number}"))
        program.process.join(draw.uniform(0.05, seconds))
        if program.process.exitcode is not None:
            break
        program.send(draw.choice(SIGNALS))
        code = program.wait()
        if code == 0:  # in the last moment
            break
        begun = (folder / "config.yaml").exists()
        said = program.said()
        assert code in ((EXIT_INTERRUPTED, EXIT_STOPPED) if words[0] == "pretrain" else (EXIT_INTERRUPTED,)), said
        assert "Traceback" not in said and ("stopped" in said) and (not begun or "tessella resume" in said), said
        met += 1
    if not (folder / "backbone.safetensors").exists():
        run(next_words(method, folder), folder.with_suffix(".last"))
    return met


def check(method: str, tmp_path: Path, count: int, in_a_row: int) -> None:
    seconds = run(pretrain_words(method, tmp_path / "straight"), tmp_path / "said")
    draw, met = random.Random(method), 0
    for number in range(1000):
        if met >= count:
            break
        met += interrupt_until_done(method, tmp_path / f"run-{number}", draw, seconds, min(in_a_row, count - met))
        assert_same_runs(tmp_path / "straight", tmp_path / f"run-{number}")


@pytest.mark.parametrize("method", ["smog"])  # its first look at the images is before the first step
def test_an_interrupted_run_equals_one_that_was_not(method: str, tmp_path: Path):
    check(method, tmp_path, count=2, in_a_row=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_fifty_interruptions_at_random_times_change_nothing(method: str, tmp_path: Path):
    check(method, tmp_path, count=50, in_a_row=5)


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGTERM, 0.4), (signal.SIGINT, 1.2)])
def test_a_program_that_still_imports_its_libraries_ends_with_a_word(number: int, seconds: float, tmp_path: Path):
    words = [sys.executable, "-m", "tessella", *pretrain_words("jigclu", tmp_path / "run")]
    program = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    program.send_signal(number)
    said = program.communicate(timeout=60)[1]
    assert program.returncode in (EXIT_STOPPED, EXIT_INTERRUPTED), said
    assert "stopped by " in said and "Traceback" not in said


WAITING = """
import time
from tessella.engine.interrupt import StopRequest
with StopRequest():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_a_second_signal_quits_at_once():
    program = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    said = program.communicate(timeout=5)[1]
    assert program.returncode == EXIT_INTERRUPTED and "SIGTERM for the second time: quits at once" in said


def test_an_error_that_a_signal_has_led_to_is_no_error():
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt as error:
            raise ImportError("a library that was half loaded") from error


def test_a_signal_that_a_library_swallowed_still_stops_the_run():
    with stoppable():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except BaseException:
            pass
        with StopRequest() as stop:
            assert stop.seen_by_any_rank(1, None)  # type: ignore[arg-type]


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stoppable():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        with StopRequest():
            pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_any_command_that_sigterm_stops_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop(words: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    monkeypatch.setattr("tessella.cli._dispatch", stop)
    assert main(["scan", "digits"]) == EXIT_STOPPED
    assert capsys.readouterr().err == "tessella: stopped by SIGTERM\n"
