"""The log is complete, valid, comparable after a resume, and harmless to a terminal."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tessella import console as console_module
from tessella.console import LossyStream
from tessella.errors import UserError
from tessella.methods.method import Progress
from tessella.run import log as log_module
from tessella.run.log import RunLog
from tessella.run.monitor import Alarm
from tessella.text import printable


@pytest.fixture(autouse=True)
def _no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_open_tensorboard", lambda folder, resume_step: None)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log_module, "time", clock)
    monkeypatch.setattr(console_module, "time", clock)
    return clock


def at(step: int) -> Progress:
    return Progress(step, 10, 10)


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def a_log(folder: Path, resume_step: int = 0, console: Console | None = None, enabled: bool = True) -> RunLog:
    return RunLog(folder, 100, 64, resume_step, enabled, console or plain_console())


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_kind_of_line_carries_step_and_epoch(tmp_path: Path):
    with a_log(tmp_path) as log:
        log.event("started", device="cpu")
        log.step(at(12), {"loss": 2.5, "lr": 0.1})
        log.alarm(at(12), Alarm("few_clusters", "text"))
        log.epoch(at(20), {"knn": 0.5})
        log.event("saved")
    logged = lines(tmp_path)
    assert [(line["kind"], line["step"], line["epoch"]) for line in logged] == [
        ("event", 0, None),
        ("step", 12, 1),
        ("alarm", 12, 1),
        ("epoch", 20, 2),
        ("event", 20, 2),
    ]
    assert logged[0]["device"] == "cpu" and logged[1]["loss"] == 2.5 and logged[2]["name"] == "few_clusters"
    assert logged[3]["knn"] == 0.5 and logged[4]["text"] == "saved"


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path):
    log = a_log(tmp_path)
    log.step(at(1), {"loss": 1.0})
    assert len(lines(tmp_path)) == 1
    log.close()


def test_figures_that_depend_on_the_clock_are_under_timing_alone(tmp_path: Path, clock: Clock):
    with a_log(tmp_path) as log:
        clock.now += 4
        log.step(at(2), {"loss": 1.0}, wait_seconds=1.0)
        clock.now += 2
        log.step(at(5), {"loss": 1.0}, wait_seconds=2.5)
    assert [line["timing"] for line in lines(tmp_path)] == [
        {"seconds": 4.0, "images_per_second": 2 * 64 / 4, "wait_share": 0.25},
        {"seconds": 6.0, "images_per_second": 3 * 64 / 2, "wait_share": 0.75},
    ]


def test_lines_between_two_steps_do_not_change_the_speed(tmp_path: Path, clock: Clock):
    with a_log(tmp_path) as log:
        clock.now += 4
        log.epoch(at(2), {"knn": 0.5})
        log.alarm(at(2), Alarm("a", "b"))
        log.step(at(2), {"loss": 1.0})
    assert lines(tmp_path)[-1]["timing"]["images_per_second"] == 32


def test_nan_and_infinity_are_null_and_named(tmp_path: Path):
    with a_log(tmp_path) as log:
        log.step(at(1), {"loss": math.nan, "lr": 0.1, "grad": -math.inf})
        log.event("bad", worst={"value": math.inf})
    first, second = lines(tmp_path)
    assert first["loss"] is None and first["grad"] is None and first["nonfinite"] == ["loss", "grad"]
    assert second["worst"] == {"value": None} and second["nonfinite"] == ["worst.value"]


def test_a_resumed_log_without_its_timing_equals_a_straight_one(tmp_path: Path):
    def run(folder: Path, first: int, last: int, resume_step: int = 0) -> None:
        with a_log(folder, resume_step) as log:
            for step in range(first, last + 1):
                log.step(at(step), {"loss": 1 / step})

    def untimed(folder: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key != "timing"} for line in lines(folder)]

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    run(straight, 1, 9)
    run(killed, 1, 7)
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 8, "lo')  # killed within a line
    run(killed, 5, 9, resume_step=4)
    assert untimed(killed) == untimed(straight)


def test_a_line_that_a_kill_left_incomplete_never_joins_the_next_one(tmp_path: Path):
    with a_log(tmp_path) as log:
        log.step(at(3), {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    a_log(tmp_path, resume_step=3).close()
    with a_log(tmp_path, resume_step=3) as log:
        log.step(at(4), {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [3, 4]


def test_lines_are_dropped_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with a_log(tmp_path) as log:
        log.step(at(3), {"loss": 1.0})
        log.step(at(4), {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        a_log(tmp_path, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("junk", ["[]", "3", '{"step": "x"}', '{"step": null}', "[" * 100_000, "\x00", "\xff"])
def test_what_is_no_log_line_is_dropped_on_resume(junk: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(f'{{"step": 1}}\n{junk}\n{{"step": 2}}\n'.encode("latin-1"))
    a_log(tmp_path, resume_step=5).close()
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]


def test_other_ranks_write_and_show_nothing(tmp_path: Path):
    console = plain_console()
    with a_log(tmp_path / "missing", console=console, enabled=False) as log:
        log.step(at(1), {"loss": 1.0})
        log.epoch(at(1), {})
        log.event("x")
        log.alarm(at(1), Alarm("a", "b"))
    assert not (tmp_path / "missing").exists() and shown(console) == ""


def test_closing_twice_and_logging_after_it_do_nothing(tmp_path: Path):
    log = a_log(tmp_path)
    log.close()
    log.close()
    log.step(at(1), {"loss": 1.0})
    assert lines(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_at_a_log_line_is_explained(tmp_path: Path):
    log = a_log(tmp_path)
    log._file.close()
    with pytest.raises(UserError, match="bytes are free"), log:
        log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        log.step(at(1), {"loss": 1.0})
    assert not log.enabled


def test_a_disk_that_takes_half_a_line_gets_the_other_half_after_it(tmp_path: Path):
    class Nearly(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

    with a_log(tmp_path) as log:
        log._file.close()
        log._file = Nearly(tmp_path / "metrics.jsonl", "ab")
        log.step(at(1), {"loss": 1.0})
    assert lines(tmp_path)[0]["loss"] == 1.0


# --- the console --------------------------------------------------------------------------------------------


def test_a_console_that_is_no_terminal_gets_one_line_per_ten_seconds_and_the_last(tmp_path: Path, clock: Clock):
    console = plain_console()
    with a_log(tmp_path, console=console) as log:
        for step in range(1, 101):
            clock.now += 1
            log.step(at(step), {"loss": 2.0, "lr": 0.5})
    printed = shown(console).splitlines()
    assert [line.split(":")[0] for line in printed] == [f"step {s} of 100" for s in (*range(1, 100, 10), 100)]
    assert printed[1] == "step 11 of 100: loss 2, lr 0.5, 64 images/s, waiting for data 0%, 1 min 29 s left"


def test_alarms_and_events_are_shown_at_once(tmp_path: Path, clock: Clock):
    console = plain_console()
    with a_log(tmp_path, console=console) as log:
        log.step(at(1), {"loss": 2.0})
        log.alarm(at(1), Alarm("few_clusters", "long " * 40))
        log.event("saved [bold]")
    printed = shown(console).splitlines()
    assert printed[1] == ("warning at step 1: " + "long " * 40) and printed[2] == "saved [bold]"


def test_the_time_left_counts_the_steps_of_this_process_only(tmp_path: Path, clock: Clock):
    console = plain_console()
    with a_log(tmp_path, resume_step=90, console=console) as log:
        clock.now += 10
        log.step(at(95), {"loss": 2.0})
    assert "10 s left" in shown(console)


def test_a_terminal_gets_a_bar_with_loss_rate_speed_waiting_and_time_left(tmp_path: Path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with a_log(tmp_path, console=console) as log:
        log.step(at(50), {"loss": 2.0, "lr": 0.5}, wait_seconds=0.0)
        log.event("saved")
        log.step(at(100), {"loss": 1.5, "lr": 0.25})
    text = shown(console)
    for part in ("100/100", "loss 1.5", "lr 0.25", "images/s", "waiting for data 0%", "0:00:0", "saved"):
        assert part in text, part


def test_the_display_goes_on_between_two_logged_steps_with_the_time_left(tmp_path: Path, clock: Clock):
    console = plain_console()
    with a_log(tmp_path, console=console) as log:
        for step in range(1, 5):
            clock.now += 6
            log.advance(at(step))
    assert shown(console).splitlines() == ["step 2 of 100, 9 min 48 s left", "step 4 of 100, 9 min 36 s left"]
    assert lines(tmp_path) == []


def test_a_bar_knows_the_time_left_from_the_second_step_on(tmp_path: Path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with a_log(tmp_path, console=console) as log:
        for step in (1, 2):
            log.advance(at(step))
            time.sleep(0.01)
    assert re.search(r"2/100 .* 0:00:\d\d", shown(console))


class Broken(io.StringIO):
    """A pipe without a reader, or a full disk."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.tried = number, 0

    def write(self, text: str) -> int:
        self.tried += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_run_goes_on_without_its_console(number: int, terminal: bool, tmp_path: Path, monkeypatch):
    stream = Broken(number)
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdout", stream)
    with RunLog(tmp_path, 100, 64) as log:
        log.say("cpu")
        log.step(at(1), {"loss": 1.0})
        log.event("saved")
    assert stream.tried and [line["kind"] for line in lines(tmp_path)] == ["step", "event"]


def test_a_run_goes_on_where_there_is_no_console_at_all(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with RunLog(tmp_path, 100, 64) as log:
        log.step(at(1), {"loss": 1.0})
    assert len(lines(tmp_path)) == 1


def test_a_console_without_a_character_gets_its_escape():
    raw = io.BytesIO()
    stream = LossyStream(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    stream.write("97.0 ± 0.7")
    assert raw.getvalue() == b"97.0 \\xb1 0.7"


HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07",  # clears the screen, sets the title
    "a\rb\nc\td\x00",
    "\x9b31m",  # one-byte CSI
    "\u202etxt.exe\u2066",  # turns the text direction
    "\u2028\u2029\u0085\udce9",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_no_control_character_of_a_text_reaches_the_terminal(text: str, terminal: bool, tmp_path: Path):
    def said(text: str) -> str:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
        log = a_log(tmp_path, console=console)
        log.event(text)
        log.alarm(at(1), Alarm("name", text))
        log.close()
        return shown(console)

    # On a terminal, rich itself moves the cursor: the same for a harmless text.
    assert said(text) == said("HARMLESS").replace("HARMLESS", printable(text))
    assert printable(text).isprintable()
    assert lines(tmp_path)[0]["text"] == text


def test_printable_leaves_letters_of_any_script_alone():
    assert printable("Müller 图像 λ [x] 100 %") == "Müller 图像 λ [x] 100 %"
    assert printable("\x1b[0m\n") == "\\x1b[0m\\n"


# --- TensorBoard --------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is an extra")
def test_tensorboard_gets_every_finite_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    with a_log(tmp_path) as log:
        log.step(at(1), {"loss": 2.0, "lr": math.nan})
        log.epoch(at(10), {"knn": 0.5})
    [file] = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert all(tag in content for tag in (b"loss", b"timing/seconds", b"epoch/knn")) and b"lr" not in content


def test_without_tensorboard_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    console = plain_console()
    a_log(tmp_path, console=console).close()
    assert shown(console) == "" and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_log_that_goes_back_drops_the_lines_that_the_run_makes_again(tmp_path: Path):
    with a_log(tmp_path) as log:
        for step in (2, 4, 6):
            log.step(Progress(step, 5, 4), {"loss": float(step)})
        log.go_back(Progress(4, 5, 4))
        log.event("back")
        log.step(Progress(6, 5, 4), {"loss": 6.5})
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [
        ("step", 2), ("step", 4), ("event", 4), ("step", 6)
    ]  # fmt: skip
