"""A disk that is full, read-only or gone: the last checkpoint stays, and the message says what to do."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tessella.cli import main
from tessella.engine.pretrain import pretrain
from tessella.errors import UserError
from tessella.run.checkpoints import load, load_newest
from tessella.run.folder import RunFolder
from tests.engine.runs import tiny_run
from tests.reliability.program import Program, assert_same_runs, names, pretrain_words, run
from tests.reliability.test_images_changed import picture, words

FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSELLA_CACHE", str(folder / "cache"))
        run(pretrain_words("jigclu", folder / "run"), folder / "said")
        yield folder / "run"


def failing_writes(monkeypatch: pytest.MonkeyPatch, code: int, after: int, where: str) -> None:
    """From the n-th write into files whose path holds `where` on, the disk refuses, after half of it."""
    opened: dict[int, str] = {}
    count, real_open, real_write = 0, os.open, os.write

    def recorded(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> int:
        descriptor = real_open(path, *args, dir_fd=dir_fd, **kwargs)
        opened[descriptor] = f"{opened.get(dir_fd, '') if dir_fd is not None else ''}/{path}"
        return descriptor

    def write(descriptor: int, data: Any) -> int:
        nonlocal count
        if where in opened.get(descriptor, ""):
            count += 1
            if count >= after:
                real_write(descriptor, bytes(data)[: len(data) // 2])
                raise OSError(code, os.strerror(code))
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "open", recorded)
    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("code", FULL)
def test_a_disk_that_fills_up_costs_no_checkpoint_and_the_run_goes_on_when_there_is_room(
    code: int, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        failing_writes(patch, code, after=12, where="checkpoints/.saving-")
        assert main(pretrain_words("jigclu", folder)) == 2
    said = capsys.readouterr().err
    assert re.search(r"cannot write [\d,]{6,} bytes in '.*checkpoints': .*; [\d,]+ bytes are free.*make room", said)
    assert "Traceback" not in said
    newest = load_newest(folder / "checkpoints", pytest.fail)
    assert newest is not None
    assert not [name for name in names(folder / "checkpoints") if name.startswith(".")]  # nothing half written
    assert main(["resume", str(folder)]) == 0
    assert_same_runs(straight, folder)


def test_a_state_that_the_run_folder_cannot_take_is_kept_elsewhere_and_goes_on_from_there(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    with pytest.MonkeyPatch.context() as patch:
        failing_writes(patch, errno.ENOSPC, after=12, where="run/checkpoints")
        assert main(pretrain_words("jigclu", folder)) == 2
    said = capsys.readouterr().err
    [kept] = elsewhere.glob("*/step-*")
    assert f"was written to {kept}: move that into {folder}/checkpoints, then resume" in said
    assert not (folder / "checkpoints" / kept.name).exists()
    kept.rename(folder / "checkpoints" / kept.name)
    assert main(["resume", str(folder)]) == 0
    assert_same_runs(straight, folder)


def test_a_fact_that_json_cannot_hold_does_not_cost_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tessella.run.images_seen.content_samples", lambda images: {"1": float("nan")})
    with pytest.raises(UserError, match=r"not JSON compliant.*The state of step 2 was written to .*step-00000002"):
        pretrain(tiny_run(max_steps=2), tmp_path / "run")
    [kept] = tmp_path.glob("tessella-*/step-00000002")
    tensors, facts = load(kept)
    assert facts["step"] == 2 and tensors["method"] and tensors["optimizer"]


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert main(pretrain_words("jigclu", tmp_path / "run")) == 2
    assert re.search(r"cannot write [\d,]{6,} bytes .* 1,000 bytes are free", capsys.readouterr().err)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte in memory, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux mounts a disk in memory so")
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=1m"):
        code = ctypes.get_errno()
        assert code in (errno.EPERM, errno.EACCES), os.strerror(code)
        pytest.skip("only an administrator may mount a disk; the tests above refuse writes instead")
    yield folder
    libc.umount2(str(folder).encode(), 2)


def test_a_real_full_disk_keeps_the_last_checkpoint(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """First there is room for the checkpoints, then another program takes it."""
    folder = small_disk / "run"
    assert main([*pretrain_words("jigclu", folder), "--max-steps", "2"]) == 0
    before = load_newest(folder / "checkpoints", pytest.fail)
    with pytest.raises(OSError, match="No space"), (small_disk / "other").open("wb", buffering=0) as other:
        while True:
            other.write(bytes(4096))
    assert main(["resume", str(folder), "--max-steps", "None"]) == 2
    assert re.search(r"cannot write [\d,]+ bytes .* bytes are free", capsys.readouterr().err)
    after = load_newest(folder / "checkpoints", pytest.fail)
    assert before is not None and after is not None and before[0] == after[0]
    (small_disk / "other").unlink()
    assert main(["resume", str(folder), "--max-steps", "None"]) == 0


def make_read_only(run: Path, patch: pytest.MonkeyPatch) -> None:
    failing_writes(patch, errno.EROFS, after=1, where="checkpoints/.saving-")


def make_stale(run: Path, patch: pytest.MonkeyPatch) -> None:
    failing_writes(patch, errno.ESTALE, after=1, where="checkpoints/.saving-")


@pytest.mark.parametrize(
    ("make", "told"), [(make_read_only, "Read-only file system"), (make_stale, "Stale file handle")]
)
def test_a_run_folder_that_can_no_longer_be_written_is_named(
    make: Callable[[Path, pytest.MonkeyPatch], None], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.MonkeyPatch.context() as patch:
        make(tmp_path / "run", patch)
        assert main(pretrain_words("jigclu", tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert f"cannot write in '{tmp_path}/run/checkpoints': {told}" in said and "resume" in said


def endless(tmp_path: Path, words: list[str]) -> Program:
    """A long run that has saved once."""
    words[words.index("--epochs") + 1] = "100000"
    program, deadline = Program(words, tmp_path / "said"), time.monotonic() + 100
    while not list(tmp_path.glob("run/checkpoints/step-*")) and time.monotonic() < deadline:
        assert program.process.exitcode is None, program.said()
        time.sleep(0.05)
    return program


def test_a_run_folder_that_vanishes_ends_the_run_with_its_name(tmp_path: Path):
    program = endless(tmp_path, pretrain_words("jigclu", tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert program.wait(60) == 2
    # TensorBoard's thread may say its own word at the same time.
    assert re.search(rf"tessella: .*{re.escape(str(tmp_path / 'run'))}.* resume", program.said()), program.said()
    assert load_newest(tmp_path / "moved" / "checkpoints", pytest.fail) is not None


def test_a_run_folder_that_has_vanished_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def moves(run: RunFolder, *args: Any) -> bool:
        if run.path.exists():
            run.path.rename(tmp_path / "moved")
        return True

    monkeypatch.setattr(RunFolder, "save_is_due", moves)
    monkeypatch.setattr("tessella.run.log._open_tensorboard", lambda *args: None)
    assert main(pretrain_words("jigclu", tmp_path / "run")) == 2
    assert f"{tmp_path}/run is no longer a run folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_images_that_vanish_end_the_run_with_their_names(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number in range(48):
        picture(tmp_path / "data", f"{number:02d}", number)
    program = endless(tmp_path, words("jigclu", tmp_path / "data", tmp_path / "run", 100_000))
    shutil.rmtree(tmp_path / "data")
    assert program.wait(60) == 2
    assert ".bmp: " in program.said() and "Traceback" not in program.said()
