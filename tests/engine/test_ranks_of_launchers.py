"""One reading of a process's rank, whatever launcher started it, for every command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tessella.engine.ranks import Place, adopt, place
from tests.reliability.program import Program

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "SLURM_", "MASTER_", "TORCHELASTIC_")
SRUN = {"SLURM_JOB_ID": "48123", "SLURM_STEP_ID": "1", "SLURM_NODELIST": "node[07-08]", "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}  # fmt: skip
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # `adopt` changes it


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, Place(0, 1, 0, 1)),
    (TORCHRUN, Place(3, 4, 1, 2)),
    (SRUN, Place(5, 8, 1, 4)),
    (SRUN | TORCHRUN, Place(3, 4, 1, 2)),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Place(0, 1, 0, 1)),  # a batch script that did not call srun
])  # fmt: skip
def test_the_rank_is_what_the_launcher_says(environment: dict[str, str], expected: Place):
    os.environ |= environment
    assert place() == expected == adopt()


def test_the_ranks_of_srun_meet_at_the_first_host_of_their_step():
    os.environ |= SRUN
    adopt()
    assert os.environ["MASTER_ADDR"] == "node07" and 15_000 <= int(os.environ["MASTER_PORT"]) < 25_000
    assert os.environ["RANK"] == "5" and os.environ["WORLD_SIZE"] == "8"


def test_two_tasks_of_srun_evaluate_together(tmp_path: Path):
    words = "evaluate random:resnet10?stem=small&width=4&size=8 --train digits::train --test digits::test --device cpu"
    words += f" --protocols knn --workers 1 --out {tmp_path}/out"
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1"}
    step["TESSELLA_CACHE"] = str(tmp_path / "cache")
    tasks = [
        Program(words.split(), tmp_path / str(rank), **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0], [task.said() for task in tasks]
    (record,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["ranks"] == 2
    assert "Written:" in tasks[0].said() and "Written:" not in tasks[1].said()
