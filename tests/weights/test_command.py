"""From an official file to figures and to a run that goes on from it, by commands alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from tessella.cli import main
from tests.weights import official_nets as nets


def run(line: str) -> int:
    return main(shlex.split(line))


def test_from_an_official_file_to_its_figures_and_onwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(nets.training(nets.swav(nets.resnet(4), 512, 128, (30,))), tmp_path / "official.pth.tar")
    folder = shlex.quote(str(tmp_path / "my weights"))
    assert run(f"import {tmp_path}/official.pth.tar --out {folder}") == 0
    said = capsys.readouterr().out
    assert said.startswith("SwAV, training checkpoint: resnet10, width 4, imagenet stem\n")
    assert ["projection_head.*", "projector.*", "9", "tensors,"] in [line.split()[:4] for line in said.splitlines()]
    assert "left out: belongs to the run that made the file" in said
    assert f"--init-from {folder}" in said
    facts = json.loads((tmp_path / "my weights" / "import.json").read_text())
    assert facts["file"] == "official.pth.tar" and len(facts["sha256"]) == 64 and facts["origin"] == "swav"

    judged = f"--train digits::train --test digits::test --device cpu --image-size 16 --out {tmp_path}/figures"
    for source, protocol in ((folder, "clustering"), (f"{tmp_path}/official.pth.tar", "knn")):
        assert run(f"evaluate {source} {judged} --protocols {protocol}") == 0
    records = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    assert {record["protocol"] for record in records} == {"knn", "clustering", "own-clusters"}
    assert len({record["weights"] for record in records}) == 1  # the file and the folder are the same network

    words = (
        "--backbone.name resnet10 --backbone.width 4 --backbone.stem imagenet --batch-size 16 --device cpu --workers 1"
    )
    words += " --method.prototypes 30 --max-steps 2 --freeze-backbone-steps 1"
    capsys.readouterr()
    assert run(f"pretrain swav_cpu --data digits::test --out {tmp_path}/run --init-from {folder} {words}") == 0
    said = capsys.readouterr().out
    assert "backbone" in said and f"Taken from {tmp_path}/my weights: backbone" in said
    assert json.loads((tmp_path / "run" / "start.json").read_text())["taken"][0] == "backbone"

    for words in (f"resume {folder}", f"report {folder}"):
        assert run(words) == 2
        assert "holds imported weights, not a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "tessella: Missing from tessella import: FILE .pth"),
        ("{tmp}/gone.pth --out {tmp}/o", "gone.pth is no file"),
        ("{tmp}/jigclu.pth --out {tmp}/o --from coke", "has the layout of jigclu, not of coke"),
        ("{tmp}/jigclu.pth --out {tmp}/o --from moco", "the projects are coke"),
        ("{tmp}/jigclu.pth --out {tmp}", "not an empty folder"),
    ],
)
def test_a_wrong_import_is_one_helpful_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.save(nets.training(nets.jigclu(nets.resnet(4))), tmp_path / "jigclu.pth")
    assert run(f"import {words.format(tmp=tmp_path)}") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "o").exists()
