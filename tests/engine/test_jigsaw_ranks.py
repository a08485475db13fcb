"""JigClu and MEJigClu killed in mid-epoch on two ranks: one rank, two and four go on with the same images and views."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.loader import Loader
from tessella.engine import pretrain
from tests.engine.runs import assert_same, final_state, tiny_run

pytestmark = pytest.mark.slow  # starts six processes

METHODS = ["jigclu", "mejigclu"]
STOP, END = 3, 7  # steps; an epoch has five

SCRIPT = """
import sys
from pathlib import Path
from tests.engine.test_jigsaw_ranks import run_jobs
run_jobs(Path(sys.argv[1]))
"""


class WatchedLoader(Loader):
    """Remembers what each step was given: epoch, step, rows, and the sum of each row's pixels."""

    given: ClassVar[list[tuple[int, int, list[int], list[float]]]] = []

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        for step, batches in enumerate(super().epoch(epoch, first_step), first_step):
            (batch,) = batches
            sums = batch.views[0].double().sum(dim=(0, 2, 3, 4)).tolist()
            self.given.append((epoch, step, batch.instances.tolist(), sums))
            yield batches


def run_jobs(jobs: Path) -> None:
    """Start or resume runs, one after the other on this rank: starting processes takes longer than these runs."""
    torch.set_num_threads(1)
    pretrain.Loader = WatchedLoader  # type: ignore[attr-defined]
    try:
        for method, run, steps in json.loads(jobs.read_text()):
            WatchedLoader.given.clear()
            out = jobs.parent / f"{method}-{run}"
            if out.exists():
                pretrain.resume(out, {"max_steps": steps})
            else:
                pretrain.pretrain(tiny_run(method, max_steps=steps), out)
            (jobs.parent / f"{method}-{run}-{steps}-rank-{dist.rank()}").write_text(json.dumps(WatchedLoader.given))
    finally:
        pretrain.Loader = Loader  # type: ignore[attr-defined]


def launch(jobs: Path, ranks: int) -> None:
    """`run_jobs` on several ranks."""
    script = jobs.with_name("script.py")
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(jobs)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def given(folder: Path, name: str, ranks: int) -> list[tuple[int, int, list[int], list[float]]]:
    """Epoch, step, rows and pixel sums of every batch of all ranks."""
    shares = [json.loads((folder / f"{name}-rank-{rank}").read_text()) for rank in range(ranks)]
    return [
        (*parts[0][:2], [row for part in parts for row in part[2]], [x for part in parts for x in part[3]])
        for parts in zip(*shares, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of both methods: straight on one rank and on two; stopped on two; gone on with one, two and four."""
    folder = tmp_path_factory.mktemp("jigsaw")
    jobs = folder / "jobs.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSELLA_CACHE", str(folder / "cache"))
        on_two = [("straight-2", END), ("on-1", STOP), ("on-4", STOP), ("on-2", STOP), ("on-2", END)]
        jobs.write_text(json.dumps([(m, run, steps) for m in METHODS for run, steps in on_two]))
        launch(jobs, 2)
        jobs.write_text(json.dumps([(m, run, END) for m in METHODS for run in ("straight-1", "on-1")]))
        run_jobs(jobs)
        jobs.write_text(json.dumps([(m, "on-4", END) for m in METHODS]))
        launch(jobs, 4)
    yield folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_images_and_views_of_every_step_are_those_of_a_run_that_never_stopped(folder: Path, method: str, ranks: int):
    straight = given(folder, f"{method}-straight-1-{END}", 1)
    assert [step[:2] for step in straight] == [divmod(step, 5) for step in range(END)]
    before, after = (given(folder, f"{method}-on-{ranks}-{steps}", on) for steps, on in ((STOP, 2), (END, ranks)))
    for ours, theirs in zip(before + after, straight, strict=True):
        assert ours[:3] == theirs[:3]
        assert ours[3] == pytest.approx(theirs[3], rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_a_run_that_never_stopped(folder: Path, method: str, ranks: int):
    straight, resumed = final_state(folder / f"{method}-straight-1"), final_state(folder / f"{method}-on-{ranks}")
    assert set(straight) == set(resumed)
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_on_the_same_number_of_ranks_they_are_the_same_bit_for_bit(folder: Path, method: str):
    assert_same(final_state(folder / f"{method}-straight-2"), final_state(folder / f"{method}-on-2"))
