"""Wherever a file is expected, a pipe, socket, device or file without end is refused at once, in one line."""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tessella.cli import main
from tessella.data.sources import open_images
from tessella.errors import UserError
from tessella.protocols.subsets import listed_rows
from tests.reliability.program import pretrain_words

pytestmark = pytest.mark.timeout(60)  # what waits for a pipe fails

NETWORK = "'random:resnet10?width=4&size=16'"
DIGITS = "--train digits::test --test digits::test --device cpu --protocols knn"
BOXES = "--protocols detection-small"
MASKS = "--protocols segmentation-small"
READERS = {
    "data file": (f"evaluate {NETWORK} --out {{out}} --data {{file}}", ".yaml"),
    "label map": (f"evaluate {NETWORK} --out {{out}} {DIGITS} --label-map {{file}}", ".csv"),
    "list": ("scan {file}", ".csv"),
    "parquet list": ("scan {file}", ".parquet"),
    "archive": ("scan {file}", ".tar"),
    "compressed archive": ("scan {file}", ".tar.gz"),
    "boxes": (
        f"evaluate {NETWORK} --out {{out}} --train {{file}} --test {{file}} {BOXES}",
        ".json",
    ),
    "masks": (
        f"evaluate {NETWORK} --out {{out}} --train {{file}} --test {{file}} {MASKS}",
        ".tar",
    ),
    "weights": (f"evaluate {{file}} --out {{out}} {DIGITS}", ".pth"),
    "tensors": (f"evaluate {{file}} --out {{out}} {DIGITS}", ".safetensors"),
    "import": ("import {file} --out {out}", ".pth"),
    "compare": ("compare {file}", ".html"),
    "records": (f"evaluate {NETWORK} --out {{folder}} {DIGITS}", "evaluation.json"),
    "run": ("resume {folder}", "config.yaml"),
    "report": ("report {folder}", "config.yaml"),
    "imported": (f"evaluate {{folder}} --out {{out}} {DIGITS}", "import.json"),
    "pack": ("scan {folder}", "pack.json"),
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def without_end(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


SPECIAL = [pipe, unix_socket, device, terminal, without_end]


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_it_is_refused_at_once(
    reader: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words, name = READERS[reader]
    file = tmp_path / (f"x{name}" if name.startswith(".") else name)
    make(file)
    started = time.monotonic()
    places = {"file": file, "folder": tmp_path, "out": tmp_path / "out"}
    assert main(shlex.split(words.format(**{key: shlex.quote(str(path)) for key, path in places.items()}))) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.strip()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("make", SPECIAL)
def test_a_list_of_few_labels_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path):
    make(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"list\.txt cannot be read: (not a regular file|the file has [\d,]+ bytes)"):
        listed_rows(open_images("digits::test"), tmp_path / "list.txt")


@pytest.mark.slow
@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "environment.json", "start.json", "images.safetensors", "unreadable.txt", "lock"]
)
def test_in_a_run_it_keeps_no_command_waiting(
    name: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    assert main([*pretrain_words("jigclu", run), "--max-steps", "1"]) == 0
    (run / name).unlink(missing_ok=True)
    make(run / name)
    for words in (["report", str(run)], ["resume", str(run), "--max-steps", "2"]):
        assert main(words) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
