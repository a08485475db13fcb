"""Files are written whole or not at all and never through a link; only regular files of a sane size are read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tessella import files
from tessella.errors import UserError
from tessella.files import FileError

SECRET = b"somebody else's\n"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that must stay as it is."""
    path = tmp_path / "outside" / "profile"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def dangling(path: Path, outside: Path) -> None:
    path.symlink_to(outside.with_name("new"))


def link_to_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside.parent)


def hard_link(path: Path, outside: Path) -> None:
    path.hardlink_to(outside)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


PLANTED = [link, dangling, link_to_folder, hard_link, pipe, unix_socket]
LINKS = [link, dangling, link_to_folder]


# --- writing ------------------------------------------------------------------------------------------------


def test_bytes_text_json_and_tensors_come_back(ours: Path):
    files.write_bytes(ours / "b", b"\0\xff")
    files.write_text(ours / "t", "é \udce9")  # the second is no UTF-8, as in names of foreign files
    files.write_json(ours / "j", {"a": [1, "caf\udce9.jpg"]})
    files.write_tensors(ours / "s", {"w": torch.arange(6).reshape(2, 3).T}, {"made": "here"})
    assert (ours / "b").read_bytes() == b"\0\xff"
    assert (ours / "t").read_text(encoding="utf-8") == "é \\udce9"
    assert json.loads((ours / "j").read_text(encoding="ascii")) == {"a": [1, "caf\udce9.jpg"]}
    assert torch.equal(safetensors.torch.load_file(ours / "s")["w"], torch.arange(6).reshape(2, 3).T)
    with pytest.raises(ValueError):
        files.write_json(ours / "j", float("nan"))
    assert names(ours) == ["b", "j", "s", "t"]


def test_a_file_has_its_name_when_it_is_whole_and_what_was_there_stays_until_then(ours: Path):
    (ours / "x.npy").write_bytes(b"old")
    with files.writing(ours / "x.npy") as file:
        np.save(file, np.arange(1000))
        assert (ours / "x.npy").read_bytes() == b"old" and len(names(ours)) == 2
    np.testing.assert_array_equal(np.load(ours / "x.npy"), np.arange(1000))
    with pytest.raises(KeyError), files.writing(ours / "x.npy") as file:
        file.write(b"half")
        raise KeyError
    assert names(ours) == ["x.npy"] and np.load(ours / "x.npy").shape == (1000,)


def test_it_is_synced_before_it_gets_its_name_and_the_name_after(ours: Path, monkeypatch: pytest.MonkeyPatch):
    done = []
    for name in ("open", "write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real, **kw: (done.append(name), real(*args, **kw))[1]
        )
    files.write_bytes(ours / "x", b"x" * 3_000_000)
    assert done == ["open", "open", "write", "fsync", "replace", "fsync"]


def test_temporary_names_cannot_be_guessed_and_are_recognised(ours: Path):
    seen = set()
    for _ in range(3):
        with files.writing(ours / "x"):
            seen |= {name for name in names(ours) if name != "x"}
    assert len(seen) == 3
    assert all(files.is_unfinished(ours / name) and len(name) >= 16 for name in seen)


@pytest.mark.parametrize("plant", PLANTED)
def test_what_is_written_replaces_a_link_and_never_goes_through_it(
    plant: Callable[[Path, Path], None], ours: Path, outside: Path
):
    plant(ours / "x", outside)
    files.write_bytes(ours / "x", b"new")
    assert (ours / "x").read_bytes() == b"new" and not (ours / "x").is_symlink()
    assert outside.read_bytes() == SECRET and names(outside.parent) == ["profile"]


@pytest.mark.parametrize("plant", PLANTED)
def test_what_is_appended_to_must_be_a_file_with_one_name(
    plant: Callable[[Path, Path], None], ours: Path, outside: Path
):
    plant(ours / "x", outside)
    started = time.monotonic()
    with pytest.raises(FileError, match=r"ours/x is a |cannot write in"):
        files.open_append(ours / "x")
    assert time.monotonic() - started < 1
    assert outside.read_bytes() == SECRET and names(outside.parent) == ["profile"]


def test_lines_are_added_at_the_end(ours: Path):
    for line in (b"one\n", b"two\n"):
        with files.open_append(ours / "log") as file:
            file.write(line)
            assert (ours / "log").read_bytes().endswith(line)  # at once: a killed process loses no line
    assert (ours / "log").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("plant", [*LINKS, pipe])
@pytest.mark.parametrize(
    "write",
    [
        lambda folder: files.write_text(folder / "x", "x"),
        lambda folder: files.open_append(folder / "x"),
        lambda folder: files.make_folder(folder),
        lambda folder: files.make_folder(folder / "deep", inside=folder.parent),
        lambda folder: files.write_text(folder / "deep" / "er" / "x", "x", inside=folder.parent),
        lambda folder: files.new_folder(folder / "x").__enter__(),
        lambda folder: files.remove(folder / "profile"),
        lambda folder: files.remove_unfinished(folder),
        lambda folder: files.refuse_link(folder),
        lambda folder: files.exclusive(folder).__enter__(),
    ],
)
def test_a_folder_that_is_a_link_or_none_is_refused(
    plant: Callable[[Path, Path], None], write: Callable[[Path], object], ours: Path, outside: Path
):
    (outside.parent / ".saving-0").touch()
    plant(ours / "sub", outside)
    with pytest.raises(UserError, match=r"ours/sub is (a link|no folder), so nothing is written there"):
        write(ours / "sub")
    assert names(outside.parent) == [".saving-0", "profile"] and outside.read_bytes() == SECRET


def test_links_above_the_given_folder_are_the_users_own(tmp_path: Path, ours: Path):
    (tmp_path / "mine").symlink_to(tmp_path)
    files.make_folder(tmp_path / "mine" / "ours" / "run")
    files.write_text(tmp_path / "mine" / "ours" / "run" / "x", "x")
    assert (ours / "run" / "x").read_text() == "x"


def test_folders_are_made_below_the_given_one_only(ours: Path):
    files.write_text(ours / "a" / "b" / "x", "x", inside=ours)
    assert (ours / "a" / "b" / "x").read_text() == "x"
    with pytest.raises(FileError, match="No such file"):
        files.write_text(ours / "gone" / "x", "x", inside=ours / "gone")
    assert names(ours) == ["a"]


def test_a_full_disk_says_what_is_needed_and_free_and_leaves_nothing(ours: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(FileError, match=r"cannot write 5 bytes in '.*ours': No space.*[\d,]+ bytes are free") as raised:
        files.write_bytes(ours / "x", b"12345")
    assert raised.value.errno == errno.ENOSPC and raised.value.strerror == os.strerror(errno.ENOSPC)
    with pytest.raises(FileError, match="No space"), files.writing(ours / "x.npy") as file:
        np.save(file, np.zeros(1 << 20))
    assert names(ours) == []


def test_an_error_is_an_error_of_the_user_and_of_the_system(ours: Path):
    with pytest.raises(UserError, match="No such file"):
        files.write_bytes(ours / "no" / "x", b"")
    with pytest.raises(OSError, match="No such file"):
        files.write_bytes(ours / "no" / "x", b"")


def test_an_error_reaches_other_ranks_as_it_is():
    error = pickle.loads(pickle.dumps(FileError("the text", "the reason", errno.ENOSPC)))
    assert (str(error), error.strerror, error.errno) == ("the text", "the reason", errno.ENOSPC)


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_has_its_name_when_it_is_whole(ours: Path):
    for value in ("old", "new"):
        with files.new_folder(ours / "built") as folder:
            files.write_text(folder / "x", value)
            assert folder != ours / "built" and names(folder) == ["x"]
            if value == "new":
                assert (ours / "built" / "x").read_text() == "old"
    assert names(ours) == ["built"] and (ours / "built" / "x").read_text() == "new"
    with pytest.raises(KeyError), files.new_folder(ours / "built") as folder:
        files.write_text(folder / "x", "newer")
        raise KeyError
    assert names(ours) == ["built"] and (ours / "built" / "x").read_text() == "new"


@pytest.mark.parametrize("plant", PLANTED)
def test_a_new_folder_replaces_a_link_and_leaves_its_target(
    plant: Callable[[Path, Path], None], ours: Path, outside: Path
):
    for name in ("built", "built.replaced"):
        plant(ours / name, outside)
    with files.new_folder(ours / "built") as folder:
        files.write_text(folder / "x", "x")
    assert names(ours) == ["built"] and names(ours / "built") == ["x"]
    assert outside.read_bytes() == SECRET and names(outside.parent) == ["profile"]


@pytest.mark.parametrize("plant", PLANTED)
def test_removing_takes_a_link_and_never_what_it_leads_to(
    plant: Callable[[Path, Path], None], ours: Path, outside: Path
):
    plant(ours / "x", outside)
    (ours / "folder").mkdir()
    plant(ours / "folder" / "x", outside)
    files.remove(ours / "x")
    files.remove(ours / "folder")
    files.remove(ours / "never was")
    assert names(ours) == [] and outside.read_bytes() == SECRET


@pytest.mark.parametrize("plant", PLANTED)
def test_only_unfinished_names_are_cleared(plant: Callable[[Path, Path], None], ours: Path, outside: Path):
    (ours / "keep").touch()
    (ours / ".saving-1").mkdir()
    plant(ours / ".saving-1" / "x", outside)
    plant(ours / ".saving-2", outside)
    plant(ours / "planted", outside)
    files.remove_unfinished(ours, older_than=1000)
    assert len(names(ours)) == 4
    files.remove_unfinished(ours)
    assert names(ours) == ["keep", "planted"] and outside.read_bytes() == SECRET


def test_one_holds_a_folder_and_the_others_wait(ours: Path):
    order = []

    def second() -> None:
        with files.exclusive(ours / "made"):
            order.append("second")

    with files.exclusive(ours / "made"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# --- reading ------------------------------------------------------------------------------------------------

READERS: list[Callable[[Path], object]] = [
    lambda path: files.open_regular(path),
    lambda path: files.read_bytes(path, 1000),
    lambda path: files.read_bytes(path, 1000, size=3),
    lambda path: files.read_text(path, 1000),
    lambda path: files.read_json(path, 1000),
    lambda path: files.sha256(path),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "name", ["pipe", "socket", "folder", "link to a pipe", "/dev/zero", "/dev/tty", "missing", "\0"]
)
def test_only_regular_files_are_read_and_nothing_is_waited_for(read: Callable[[Path], object], name: str, ours: Path):
    pipe(ours / "pipe", ours)
    unix_socket(ours / "socket", ours)
    (ours / "folder").mkdir()
    (ours / "link to a pipe").symlink_to("pipe")
    started = time.monotonic()
    reason = {"missing": "No such file", "\0": "no name of a file"}.get(name, "not a regular file")
    with pytest.raises(FileError, match=f"cannot be read: {reason}"):
        read(ours / name)
    assert time.monotonic() - started < 1


def test_what_becomes_a_pipe_between_looking_and_opening_is_noticed(ours: Path, monkeypatch: pytest.MonkeyPatch):
    pipe(ours / "x", ours)
    regular = Path(__file__).stat()
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: regular)
    with pytest.raises(FileError, match="not a regular file"):
        files.read_bytes(ours / "x", 1000)


def test_large_files_are_refused_before_they_are_read(ours: Path):
    with (ours / "x").open("wb") as file:
        file.truncate(1 << 40)
    for read in (files.read_bytes, files.read_text, files.read_json, files.open_regular):
        with pytest.raises(FileError, match=r"has 1,099,511,627,776 bytes, more than the limit of 1,000"):
            read(ours / "x", 1000)
    assert files.read_bytes(ours / "x", 1000, size=3) == b"\0\0\0"


def test_bytes_text_json_and_hashes_are_read(ours: Path):
    (ours / "x").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert files.read_bytes(ours / "x", 100) == (ours / "x").read_bytes()
    assert files.read_text(ours / "x", 100) == '{"a": "é"}'  # without the mark of some editors
    assert files.read_json(ours / "x", 100) == {"a": "é"}
    assert files.sha256(ours / "x") == hashlib.sha256((ours / "x").read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[" * 100_000, b"", b"1" * 5000])
def test_what_is_no_json_says_so_in_one_short_line(content: bytes, ours: Path):
    (ours / "x").write_bytes(content)
    with pytest.raises(FileError, match=r"ours/x cannot be read: not (JSON|UTF-8)") as raised:
        files.read_json(ours / "x", 1_000_000)
    assert len(str(raised.value)) < len(str(ours)) + 200 and "\n" not in str(raised.value)


# --- systems without directory descriptors ---------------------------------------------------------------------


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system like Windows."""
    monkeypatch.setattr(files, "_BY_DESCRIPTOR", False)
    monkeypatch.setattr(files, "_NO_LINKS", 0)


def test_without_directory_descriptors_links_are_refused_by_name(by_name: None, ours: Path, outside: Path):
    for plant in LINKS:
        plant(ours / "sub", outside)
        with pytest.raises(FileError, match="ours/sub is a link"):
            files.write_text(ours / "sub" / "x", "x")
        with pytest.raises(FileError, match="ours/sub is a link"):
            files.open_append(ours / "sub")
        (ours / "sub").unlink()
    link(ours / "x", outside)
    files.write_text(ours / "x", "new")
    with files.new_folder(ours / "a") as folder:
        files.write_text(folder / "x", "x")
    files.write_text(ours / "b" / "c" / "x", "x", inside=ours)
    files.remove(ours / "a")
    assert names(ours) == ["b", "x"] and (ours / "x").read_text() == "new"
    assert names(outside.parent) == ["profile"] and outside.read_bytes() == SECRET


@pytest.mark.parametrize("text", ["[NaN]", "[-Infinity]", '{"a": 1e999}', "9" * 5000])
def test_json_with_a_number_that_could_not_be_written_again_is_refused(text: str, tmp_path: Path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FileError, match=r"x\.json cannot be read: not JSON"):
        files.read_json(tmp_path / "x.json", 1 << 20)


def test_a_file_of_holes_is_refused_before_it_takes_memory(tmp_path: Path):
    with (tmp_path / "x").open("wb") as file:
        file.write(b"something")
        file.truncate(1 << 42)
    if not (tmp_path / "x").stat().st_blocks:
        pytest.skip("this file system does not say what it has stored")
    for read in (files.sha256, lambda path: files.read_bytes(path, 1 << 50)):
        with pytest.raises(FileError, match="hardly any of them were ever written"):
            read(tmp_path / "x")
