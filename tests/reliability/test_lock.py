"""Two runs never write into one folder, and a killed one never keeps the next one out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessella.cli import main
from tessella.errors import UserError
from tessella.run.folder import RunFolder
from tessella.run.lock import only_writer, owner_of, refuse_second_writer
from tests.reliability.program import Program, pretrain_words

HOLD = """
import sys, time
from pathlib import Path
from tessella.run.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_the_second_is_refused_within_two_seconds_and_told_who_is_there(tmp_path: Path):
    process = holder(tmp_path)
    try:
        started, told = time.monotonic(), rf"in use by process {process.pid} on .*, which began at .*wait for it"
        with pytest.raises(UserError, match=told), only_writer(tmp_path):
            pytest.fail("two writers")
        assert time.monotonic() - started < 2
    finally:
        kill(process)


def test_resume_says_so_before_torch_is_imported(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("")
    process = holder(tmp_path)
    try:
        words = [sys.executable, "-X", "importtime", "-m", "tessella", "resume", str(tmp_path)]
        said = subprocess.run(words, capture_output=True, text=True, timeout=60)
    finally:
        kill(process)
    assert said.returncode == 2 and "in use by process" in said.stderr
    assert not any(line.endswith(" torch") for line in said.stderr.splitlines())


def test_the_lock_of_a_killed_owner_is_free_at_once_twenty_times(tmp_path: Path):
    for _ in range(20):
        kill(holder(tmp_path))
        assert (tmp_path / "lock").read_text()  # its words are still there
        started = time.monotonic()
        with only_writer(tmp_path):
            assert time.monotonic() - started < 1
    assert owner_of(tmp_path) == ""


def test_a_run_that_was_left_says_nothing_of_its_owner(tmp_path: Path):
    with only_writer(tmp_path):
        assert f"process {os.getpid()}" in owner_of(tmp_path)
        with pytest.raises(UserError, match="in use"):
            refuse_second_writer(tmp_path)
    assert owner_of(tmp_path) == "" and owner_of(tmp_path / "nowhere") == ""
    refuse_second_writer(tmp_path)


def test_looking_at_a_lock_does_not_keep_a_writer_out(tmp_path: Path):
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="in use by another process"), only_writer(tmp_path):
            pass
        fcntl.flock(reader, fcntl.LOCK_UN)
    with only_writer(tmp_path):
        pass


def test_the_next_writer_clears_what_a_killed_one_left_and_nothing_else(tmp_path: Path):
    for name in (".saving-backbone.safetensors", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).write_text("x")
    with RunFolder(tmp_path).only_writer(enabled=False):
        pass
    assert (tmp_path / ".saving-backbone.safetensors").exists()
    with RunFolder(tmp_path).only_writer(enabled=True):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "metrics.jsonl", "notes.txt"]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none."""

    def refuse(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_living_owner_is_known_by_its_words(no_locks: None, tmp_path: Path):
    with only_writer(tmp_path), pytest.raises(UserError, match=r"delete .*lock"), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


@pytest.mark.parametrize(("field", "value", "free"), [("began", "1", True), ("host", "elsewhere", False)])
def test_without_locks_a_recycled_process_id_is_free_and_another_host_is_not(
    field: str, value: str, free: bool, no_locks: None, tmp_path: Path
):
    with only_writer(tmp_path):
        owner = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(f" {json.dumps(owner | {field: value})}")
    if free:
        with only_writer(tmp_path):
            pass
    else:
        with pytest.raises(UserError, match="on elsewhere"), only_writer(tmp_path):
            pass


def test_what_a_lock_file_says_is_shown_without_control_characters(tmp_path: Path):
    (tmp_path / "lock").write_text(' {"host": "\\u001b[2Jx", "pid": "\\n", "since": 3}')
    with (tmp_path / "lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert owner_of(tmp_path) == "process \\n on \\x1b[2Jx, which began at 3"


def test_a_second_run_of_the_same_command_is_refused_and_the_page_says_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = pretrain_words("swav", tmp_path / "run")
    words[words.index("--epochs") + 1] = "1000"
    first = Program(words, tmp_path / "said")
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "run").glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert main(words) == 2 and "is not an empty folder" in capsys.readouterr().err
        assert main(["resume", str(tmp_path / "run")]) == 2 and "in use by process" in capsys.readouterr().err
        assert main(["report", str(tmp_path / "run")]) == 0
        page = (tmp_path / "run" / "report.html").read_text()
        assert "running, at step" in page and "Go on exactly where it stopped" not in page
    finally:
        first.send(signal.SIGKILL)
        first.wait()
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "stopped at step" in page and "Go on exactly where it stopped" in page
