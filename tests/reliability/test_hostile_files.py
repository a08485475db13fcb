"""An adversary's tree as a training folder: nothing crashes, hangs or runs; images are used, the rest is listed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tessella.cli import main
from tessella.data import isolated
from tessella.data.decode import Unreadable, decode
from tessella.data.sources import ImageSet, open_images
from tessella.engine.pretrain import pretrain
from tessella.errors import UserError
from tests.engine.runs import tiny_run
from tests.reliability.audit import nothing_started
from tests.reliability.hostile_files import (
    COLOUR,
    Entry,
    build,
    encode,
    locked,
    locked_folder,
    noise,
    photo,
    plain,
    scan_bomb,
    unlock,
)

ALLOWED = 5.0  # seconds for one file

pytestmark = pytest.mark.timeout(120)  # what hangs fails


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Entry]]]:
    root = tmp_path_factory.mktemp("adversary") / "tree"
    yield root, build(root)
    unlock(root)


@pytest.fixture(scope="module")
def opened(planted, tmp_path_factory) -> tuple[ImageSet, dict[bytes, str]]:
    """The tree as a set of images, and why files were left out of it."""
    with nothing_started():
        images = open_images(str(planted[0]), cache=tmp_path_factory.mktemp("cache"))
    return images, {os.fsencode(key): reason for key, reason in images.unreadable}


def rows_of(images: ImageSet) -> dict[bytes, int]:
    return {os.fsencode(images.key(row)): row for row in range(len(images))}


def test_the_tree_has_at_least_136_entries(planted):
    assert len(planted[1]) >= 136 and len({entry.name for entry in planted[1]}) == len(planted[1])


def test_every_usable_image_is_used_upright_and_with_its_own_colours(planted, opened):
    images, reasons = opened
    rows, wrong = rows_of(images), []
    for entry in planted[1]:
        if not entry.listed or entry.reason:
            continue
        if entry.name not in rows:
            wrong.append((entry.name, reasons.get(entry.name, "lost")))
            continue
        row = rows[entry.name]
        pixels = images.image(row)
        size = pixels.shape[1], pixels.shape[0]
        if size != tuple(images.sizes[row]) or entry.size not in (None, size):
            wrong.append((entry.name, size))
        middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].astype(int)
        if entry.middle and abs(middle - entry.middle).max() > 9:  # what JPEG and WebP lose beside an edge
            wrong.append((entry.name, middle.tolist()))
    assert wrong == []


def test_the_eight_orientations_show_the_same_corner(opened):
    images, _ = opened
    for suffix in ("jpg", "png", "webp"):
        for orientation in range(1, 9):
            pixels = images.image(rows_of(images)[f"used/orientation {orientation}.{suffix}".encode()]).astype(int)
            assert abs(pixels[2, 2] - COLOUR).max() < 9
            for y, x in ((2, -3), (-3, 2), (-3, -3)):
                assert abs(pixels[y, x] - (0, 0, 255)).max() < 9


def test_every_unusable_file_has_its_reason_and_no_process_is_started(planted, opened):
    images, reasons = opened
    rows, wrong = rows_of(images), []
    for entry in planted[1]:
        if not entry.reason:
            continue
        reason = reasons.get(entry.name, "")
        if entry.name in rows:
            with nothing_started(), pytest.raises(Unreadable) as caught:
                images.image(rows[entry.name])
            reason = caught.value.reason
        if not re.search(entry.reason, reason) or len(reason) > 300 or not reason.isprintable():
            wrong.append((entry.name, reason))
    assert wrong == []


def test_nothing_else_is_seen(planted, opened):
    images, reasons = opened
    expected = {entry.name for entry in planted[1] if entry.listed}
    inside = {b"links/locked folder/"} if os.geteuid() else set()
    assert set(rows_of(images)) | set(reasons) <= expected | inside


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_bombs_are_refused_without_the_memory_they_ask_for(planted):
    names = [entry.name for entry in planted[1] if b"bomb" in entry.name or b"sparse" in entry.name]
    script = """
import os, re, sys
sys.path.insert(0, os.getcwd())
from tessella.data.decode import Unreadable, decode, probe_with
from tessella.data.sources.files import read_file
# Not ru_maxrss, which begins with what the parent had.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
for name in sys.argv[1:]:
    before = peak()
    try:
        probe_with(lambda size: read_file(name, size), os.stat(name).st_size)
        decode(read_file(name))
        print("taken", name)
    except Unreadable:
        pass
    if peak() - before > 64 * 1024:
        print("costly", name, (peak() - before) // 1024, "MiB")
"""
    paths = [os.fsencode(planted[0]) + b"/" + name for name in names]
    assert len(paths) >= 12
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


def test_scan_lists_all_of_it_cleaned_and_goes_on(planted, capsys):
    assert main(["scan", str(planted[0]), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())
    refused = [entry for entry in planted[1] if entry.reason]
    assert f"unreadable  {len(refused)}\n" in said
    for entry in refused:
        assert f"            {os.fsdecode(entry.name)}: " in said
    assert f"images      {sum(entry.listed and not entry.reason for entry in planted[1])}\n" in said


def test_a_run_uses_what_is_usable_and_lists_the_rest_in_its_folder_and_report(planted, tmp_path, capsys):
    run = tmp_path / "run"
    recipe = ["pretrain", "swav_cpu", "--data", str(planted[0]), "--out", str(run), "--device", "cpu", "--workers", "2"]
    quick = ["--batch-size", "128", "--max-steps", "2", "--max-unreadable", "1", "--log-every", "1"]
    assert main([*recipe, *quick]) == 0
    listed = (run / "unreadable.txt").read_text()
    names = {os.fsdecode(entry.name) for entry in planted[1] if entry.reason}
    assert {line.partition("\t")[0] for line in listed.splitlines()} == names
    assert all(line.partition("\t")[2].isprintable() and line.partition("\t")[2] for line in listed.splitlines())
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert all(name.replace("'", "&#39;") in page for name in names)

    # The same tree as labelled images, and as images to embed.
    words = ["--device", "cpu", "--workers", "1"]
    labelled = ["--train", str(planted[0]), "--test", str(planted[0]), "--protocols", "knn", "--out", str(run)]
    assert main(["evaluate", str(run), *labelled, *words]) == 0
    assert main(["embed", str(run), str(planted[0]), "--out", str(tmp_path / "features.npy"), *words]) == 0
    assert main(["embed", str(run), str(planted[0]), "--out", str(tmp_path / "features.parquet"), *words]) == 0
    keys = (tmp_path / "features.keys.txt").read_text().split("\n")
    assert len(keys) - 1 == len(np.load(tmp_path / "features.npy")) and all(key.isprintable() for key in keys)
    tables = [path.read_text(encoding="utf-8") for path in (run / "predictions").rglob("*.csv")]
    assert tables and all(line.isprintable() for table in tables for line in table.splitlines())
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).splitlines())


def test_a_folder_of_which_too_much_is_unusable_is_refused_and_the_mend_named(planted, tmp_path):
    with pytest.raises(UserError, match=r"more than the allowed 1\.0%.*tessella scan.*--max-unreadable"):
        pretrain(tiny_run(data=str(planted[0])), tmp_path / "run")


def test_a_file_that_vanishes_or_changes_between_listing_and_reading_costs_itself(tmp_path):
    names = ("gone", "pipe", "short", "other", "device", "folder", "good")
    for name in names:
        (tmp_path / f"{name}.jpg").write_bytes(encode(noise(), "JPEG"))
    images = open_images(str(tmp_path))
    changed = {name: tmp_path / f"{name}.jpg" for name in names}
    for name in ("gone", "pipe", "device", "folder"):
        changed[name].unlink()
    os.mkfifo(changed["pipe"])
    changed["device"].symlink_to("/dev/zero")
    changed["folder"].mkdir()
    changed["short"].write_bytes(changed["short"].read_bytes()[:900])
    changed["other"].write_bytes(encode(plain(), "JPEG"))
    failed = dict(isolated.undecodable(images, 1))
    assert set(failed) == {f"{name}.jpg" for name in names if name != "good"}
    assert "not a regular file" in failed["pipe.jpg"] and "not a regular file" in failed["device.jpg"]
    assert "when the data set was indexed" in failed["other.jpg"] and "No such file" in failed["gone.jpg"]


def test_files_and_folders_that_may_not_be_read_are_listed():
    """Also where the tests run as the superuser, who reads everything: for a moment this process is nobody."""
    root = Path(tempfile.mkdtemp())  # pytest's folders are closed to others
    before = os.geteuid()
    try:
        root.chmod(0o777)
        if before == 0:
            os.seteuid(65534)
        (root / "good.jpg").write_bytes(photo())
        locked(os.fsencode(root / "locked.jpg"))
        locked_folder(os.fsencode(root / "locked folder"))
        (root / "link.jpg").symlink_to(root / "locked folder" / "inside.jpg")
        images = open_images(str(root), cache=root / ".cache")
    finally:
        os.seteuid(before)
        unlock(root)
        shutil.rmtree(root)
    assert len(images) == 1
    reasons = dict(images.unreadable)
    assert set(reasons) == {"locked.jpg", "locked folder/", "link.jpg"}
    assert all("Permission denied" in reason for reason in reasons.values())


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look at a file and its opening: the race that only the opened file can settle."""
    from tessella.data.sources import files

    (tmp_path / "a.jpg").write_bytes(photo())
    looked_like = (tmp_path / "a.jpg").stat()
    os.mkfifo(tmp_path / "b.jpg")
    look = os.stat
    pipe = str(tmp_path / "b.jpg")
    monkeypatch.setattr(files.os, "stat", lambda path, **how: looked_like if path == pipe else look(path, **how))
    caught: list[str] = []

    def read() -> None:
        try:
            files.read_file(pipe)
        except Unreadable as error:
            caught.append(error.reason)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(ALLOWED)
    assert caught == ["not a regular file"]


# --- a decoder that crashes or hangs ------------------------------------------------------------------------

SABOTAGE = """
import os, signal, time
from tessella.data import isolated
whole = isolated.decode
def decode(encoded):
    if b"CRASH" in encoded: os.kill(os.getpid(), signal.SIGSEGV)
    if b"HANG" in encoded: time.sleep(1000)
    if b"QUIT" in encoded: os._exit(7)
    if b"CHATTER" in encoded: print("[1, 1]", flush=True)
    return whole(encoded)
isolated.decode = decode
isolated.serve()
"""


def test_a_crash_of_the_decoder_or_a_hang_costs_one_file_and_is_named(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(photo())
    for name in ("CRASH", "HANG", "QUIT", "CHATTER"):
        (tmp_path / f"5{name}.jpg").write_bytes(photo() + name.encode())
    command = (sys.executable, "-c", SABOTAGE)
    failed = dict(isolated.undecodable(open_images(str(tmp_path)), 1, command, seconds=2.0))
    assert set(failed) == {"5CRASH.jpg", "5HANG.jpg", "5QUIT.jpg"}
    assert "crashed" in failed["5CRASH.jpg"] and "SIGSEGV" in failed["5CRASH.jpg"]
    assert "more than 2 s" in failed["5HANG.jpg"] and "exit code 7" in failed["5QUIT.jpg"]


def test_a_decoding_process_that_cannot_start_blames_no_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(photo())
    with pytest.raises(RuntimeError, match="does not start"):
        isolated.undecodable(open_images(str(tmp_path)), 1, (sys.executable, "-c", "raise SystemExit(3)"))


def test_arrays_in_memory_need_no_decoding_process():
    assert isolated.undecodable(open_images("digits"), 1, ("/nonexistent",)) == []


# --- single dangers -----------------------------------------------------------------------------------------


def test_a_jpeg_of_many_scans_is_refused_but_not_for_what_lies_in_its_preview_or_behind_it():
    with pytest.raises(Unreadable, match="scans"):
        decode(scan_bomb(2000, 3000))
    few = encode(noise(2000, 1500), "JPEG", progressive=True)
    assert decode(few).shape == (1500, 2000, 3)
    assert decode(few + b"\xff\xda\x00\x00" * 4000).shape == (1500, 2000, 3)
    preview = b"\xff\xe5" + (2 + 4 * 4000).to_bytes(2, "big") + b"\xff\xda\x00\x00" * 4000
    assert decode(few[:2] + preview + few[2:]).shape == (1500, 2000, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "I;16"])
def test_a_black_png_is_no_damaged_png(mode):
    from PIL import Image

    black = Image.new(mode, (37, 21))
    assert not decode(encode(black, "PNG")).any()
    assert decode(encode(black, "PNG")).shape == (21, 37, 3)
