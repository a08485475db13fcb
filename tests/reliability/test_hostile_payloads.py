"""Nothing that others send is ever run: checkpoints, configurations, arrays, archives, lists, names."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tessella.data.boxes.layouts import open_annotations
from tessella.data.label_map import read_label_map
from tessella.data.sources import open_images
from tessella.engine.pretrain import pretrain, resume
from tessella.errors import UserError
from tessella.evaluation.embed import embed
from tessella.evaluation.plan import read_data_file
from tessella.report.run import report
from tessella.weights.resolve import resolve_backbone
from tests.engine.runs import tiny_run
from tests.reliability.audit import nothing_started
from tests.reliability.hostile_payloads import PAYLOADS, object_array, triggers

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore::UserWarning")]  # of damaged checkpoints


def _images(data: Any, cache: Path | None = None) -> None:
    images = open_images(str(data), cache=cache)
    for row in range(len(images)):
        images.image(row)


def _scan_from_within(folder: Path) -> None:
    code = "import sys; from tessella.cli import main; sys.exit(main(['scan', '.', '--workers', '1']))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "images      1\n" in done.stdout, done.stderr


USES: dict[str, Callable[[Any], object]] = {
    "weights": lambda spec: resolve_backbone(str(spec)),
    "run": lambda run: resolve_backbone(str(run)),
    "resume": lambda run: resume(run, {"max_steps": 3}),
    "report": report,
    "data file": read_data_file,
    "label map": read_label_map,
    "images": _images,
    "images of folder": lambda file: _images(file.parent),
    "cached images": lambda folder: _images(folder, folder.parent / "cache"),
    "annotations": lambda data: open_annotations(str(data), "train"),
    "scan from within": _scan_from_within,
}


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(tiny_run(max_steps=1), tmp_path_factory.mktemp("runs") / "good")


def test_there_are_at_least_40_payloads():
    assert len(PAYLOADS) >= 40


@pytest.mark.parametrize("name", triggers(Path("x")))
def test_the_triggers_are_armed(name, tmp_path):
    mark = tmp_path / "mark"
    encoded = pickle.dumps(triggers(mark)[name])
    with suppress(Exception):  # of an inner pickle torch is disappointed afterwards
        fired = pickle.loads(encoded)
        if isinstance(fired, subprocess.Popen):
            fired.wait()
    assert mark.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_runs_nothing(name, good_run, tmp_path, monkeypatch):
    payload, mark = PAYLOADS[name], tmp_path / "mark"
    (tmp_path / "sent").mkdir()
    monkeypatch.chdir(tmp_path)
    sent = payload.plant(tmp_path / "sent", mark, good_run)
    assert not mark.exists()
    refusal = ""
    try:
        if payload.use == "scan from within":  # which starts a process of our own
            USES[payload.use](sent)
        else:
            with nothing_started():
                USES[payload.use](sent)
    except UserError as error:
        refusal = str(error)
    assert not mark.exists()
    assert len(refusal) < 5000
    if payload.use == "weights":
        assert refusal
    if payload.pickled:  # it was no dud
        with suppress(Exception):
            pickle.loads(sent.read_bytes())
        assert mark.exists()


def test_an_object_in_foreign_weights_is_named_and_the_way_out_told(tmp_path):
    torch.save({"state_dict": triggers(tmp_path / "mark")["os.system"]}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"holds a Python object.*system.*only code from the file.*state_dict"):
        resolve_backbone(str(tmp_path / "weights.pth"))


def test_a_compressed_archive_is_not_unpacked(tmp_path, good_run):
    with pytest.raises(UserError, match="unpacks to"):
        resolve_backbone(str(PAYLOADS["zip that unpacks to more"].plant(tmp_path, tmp_path / "mark", good_run)))


def test_honest_weights_are_still_read(tmp_path, good_run):
    backbone = resolve_backbone(str(good_run))
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"state_dict": backbone.backbone.state_dict()}, tmp_path / "weights.pth", **options)
        from tessella.weights.files import read_file

        assert len(read_file(tmp_path / "weights.pth")["state_dict"]) == len(backbone.backbone.state_dict())


def test_an_array_of_objects_is_armed_too(tmp_path):
    import io

    import numpy as np

    with suppress(Exception):
        np.load(io.BytesIO(object_array(tmp_path / "mark")), allow_pickle=True)
    assert (tmp_path / "mark").exists()


# --- aliases that multiply ----------------------------------------------------------------------------------

LAUGHS = "[&a0 [x, x], " + ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)) + "]"


@pytest.mark.parametrize(
    "text",
    [
        *(f"epochs: {LAUGHS}", f"method: {LAUGHS}", f"method: {{name: {LAUGHS}}}", "a: &a [*a]\nmethod: *a"),
        *("[" * 50_000, "{a: " * 50_000, "- " * 50_000, "a: 1\n" * 500_000),
    ],
)
def test_yaml_that_multiplies_or_nests_without_end_is_refused(text, good_run, tmp_path):
    import shutil

    shutil.copytree(good_run, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(text)
    for use in ("run", "report"):
        with pytest.raises(UserError) as caught:
            USES[use](tmp_path / "run")
        assert len(str(caught.value)) < 2000
    (tmp_path / "data.yaml").write_text(text.replace("method", "classes"))
    with pytest.raises(UserError) as caught:
        read_data_file(tmp_path / "data.yaml")
    assert len(str(caught.value)) < 2000


# --- what we write for others to open -----------------------------------------------------------------------


def test_no_formula_and_no_steering_character_reaches_a_table_we_write(tmp_path):
    from tests.reliability.hostile_files import photo

    names = [
        "=cmd|' C calc'!A0",
        "+1+1",
        "-1+1",
        "@SUM(A1)",
        "\t=1",
        " =1+1",
        "'=1",
        "a\x1b[31m",
        "b\nc",
        "d\u202e",
        "5",
        "x",
    ]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "data" / name / f"={number}.jpg").write_bytes(photo())
    from tessella.evaluation.evaluate import evaluate

    data = str(tmp_path / "data")
    evaluate(
        "random:resnet10?stem=small&width=4&size=16", data, data, protocols=("knn",), out=tmp_path / "out", device="cpu"
    )
    import csv

    tables = list((tmp_path / "out/predictions").rglob("*.csv"))
    assert tables
    for table in tables:
        rows = list(csv.reader(table.open(newline="", encoding="utf-8")))
        assert len(rows) == 1 + 2 * len(names)
        for value in (value for row in rows for value in row):
            assert value.isprintable() and not value.lstrip().startswith(("=", "+", "-", "@"))
    images = open_images(data)
    assert {images.key(row).partition("/")[0] for row in range(len(images))} == set(
        names
    )  # only what is written changes
    embed("random:resnet10?stem=small&width=4&size=16", data, tmp_path / "features.npy", device="cpu")
    lines = (tmp_path / "features.keys.txt").read_text().split("\n")
    assert len(lines) == 1 + 2 * len(names) and all(line.isprintable() for line in lines)
