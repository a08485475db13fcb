"""A stranger's package adds a method, a recipe, a protocol, a source and a backbone, and nothing here is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tessella.data.sources import open_images

ROOT = Path(__file__).parents[1]
Tessella = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def tessella(tmp_path_factory: pytest.TempPathFactory) -> Tessella:
    """The command line of an environment in which examples/plugin is installed."""
    site = tmp_path_factory.mktemp("site")
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *words, "--target", site, ROOT / "examples" / "plugin"], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "COLUMNS": "200"}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tessella", *map(str, words)]
        return subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> str:
    digits = open_images("digits::test", labels=True)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, images=np.stack([digits.image(row) for row in range(len(digits))]), labels=digits.labels)
    return f"npz:{path}"


def test_the_recipe_is_listed_under_the_method_s_title(tessella: Tessella):
    listed = tessella("recipes").stdout
    assert "SimSiam" in listed and "simsiam_cpu" in listed
    assert "0.05 x batch / 256" in tessella("recipes", "simsiam_cpu").stdout


def test_it_trains_resumes_evaluates_and_appears_on_the_pages(tessella: Tessella, npz: str, tmp_path: Path):
    run = tmp_path / "run"
    words = ("--backbone.name", "plain4", "--backbone.width", "8", "--batch-size", "64", "--epochs", "1")
    begun = tessella("pretrain", "simsiam_cpu", "--data", npz, "--out", run, *words, "--max-steps", "2")
    assert begun.returncode == 0, begun.stderr
    # A source of a package may reach for the network, so a run alone does not open it: it is named again.
    assert "--data" in tessella("resume", run, "--max-steps", "None").stderr
    resumed = tessella("resume", run, "--data", npz, "--max-steps", "None")
    assert resumed.returncode == 0, resumed.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 5

    judged = tessella("evaluate", run, "--train", npz, "--test", "digits::train", "--protocols", "nearest-mean", "knn",
                      "--baseline", "--out", run)  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    records = {record["protocol"]: record for record in json.loads((run / "evaluation.json").read_text())}
    assert records["nearest-mean"]["scores"]["top1"] > 0.2  # ten classes
    assert "nearest-mean" in judged.stdout and "nearest-mean" in (run / "evaluation.md").read_text()

    assert tessella("report", run).returncode == 0
    page = (run / "report.html").read_text()
    assert "SimSiam" in page and "plain4" in page and "nearest-mean" in page


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tessella.recipes]\nmine_cpu = no_such_module:recipe\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "tessella", "pretrain", "mine_cpu", "--data", "digits", "--out", "x"]
    failed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "comes from broken, which cannot be imported" in failed.stderr
    assert failed.stderr.count("\n") == 1
