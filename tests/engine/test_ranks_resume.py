"""A run that was cut in the middle of an epoch goes on with the same, fewer or more ranks.

With as many ranks as before it is bit for bit the straight run. With another number it sees the same images in the same
order, and its losses are the straight run's up to rounding: to 1e-9 in float64, in which the runs of this module
compute. In float32 rounding is amplified after some steps, and moves images of CoKe from one cluster to another.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tessella import dist
from tessella.data.views import CropGroup, ViewSpec
from tessella.engine import pretrain as engine
from tessella.methods.coke import CokeConfig
from tessella.methods.method import joined
from tessella.run.config import RunConfig
from tests.engine.runs import assert_same, final_state, tiny_run
from tests.methods.reference_run import in_float64
from tests.ranks import on_ranks

METHODS = ("swav", "smog", "coke")
CUT, END = 3, 6  # steps done; an epoch has 5
Trace = dict[str, Tensor]


def config(method: str) -> RunConfig:
    if method != "coke":
        return tiny_run(method)
    views = ViewSpec((CropGroup(1, 16, (0.3, 1.0)),))
    coke = CokeConfig(
        centres=(8, 12), embedding_dim=16, dual_lr="auto", average_from_epoch=1, label_slots=2, views=views
    )  # from the second epoch on labels and centres are averages
    run = tiny_run("jigclu", epochs=3)
    optimizer = dataclasses.replace(run.optimizer, name="lars", lr=0.1, warmup_epochs=1, per_epoch=False)
    return dataclasses.replace(run, method=coke, optimizer=optimizer)


def train(folder: str, jobs: list[tuple[str, str, str, int]]) -> Trace:
    """Run each (name, name of the run to go on from, method, last step) on all ranks; every step's images and loss."""
    if dist.is_launched():
        rank, world_size = str(dist.rank()), str(dist.world_size())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    trace: Trace = {}
    original = engine._forward_backward
    for name, start, method, last in jobs:
        out = Path(folder) / name
        if start and dist.rank() == 0:
            shutil.copytree(Path(folder) / start, out)
        dist.barrier()

        def traced(fabric: Any, ddp: Any, batches: Any, progress: Any, *rest: Any, name: str = name) -> Any:
            outputs = original(fabric, ddp, batches, progress, *rest)
            trace[f"{name} images {progress.step}"] = dist.gather(batches[0].instances)
            loss = joined(outputs).loss.detach()
            trace[f"{name} loss {progress.step}"] = dist.all_reduce_sum(loss) / dist.world_size()
            return outputs

        with in_float64(), mock.patch.object(engine, "_forward_backward", traced):
            if start:
                engine.resume(out, {"max_steps": last})
            else:
                engine.pretrain(dataclasses.replace(config(method), max_steps=last), out)
    return trace


class Runs:
    """The runs of this module, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trace = folder, Trace()

    def on(self, ranks: int, *runs: tuple[str, str], methods: tuple[str, ...] = METHODS) -> None:
        """Each (name, from) of each method on this many ranks: from a copy of another run or, given "", afresh."""
        jobs = [
            (f"{method} {name}", start and f"{method} {start}", method, CUT if name.startswith("cut") else END)
            for name, start in runs
            for method in methods
        ]
        traces = on_ranks(ranks, train, str(self.folder), jobs) if ranks > 1 else [train(str(self.folder), jobs)]
        for trace in traces[1:]:
            assert_same(trace, traces[0])
        self.trace |= traces[0]

    def assert_bits_equal(self, method: str, one: str, other: str) -> None:
        assert_same(final_state(self.folder / f"{method} {one}"), final_state(self.folder / f"{method} {other}"))

    def assert_goes_on_as(self, method: str, straight: str, resumed: str) -> None:
        for step in range(CUT, END):
            ours, theirs = (
                (self.trace[f"{method} {name} images {step}"], self.trace[f"{method} {name} loss {step}"])
                for name in (resumed, straight)
            )
            assert torch.equal(ours[0], theirs[0]), step
            torch.testing.assert_close(ours[1], theirs[1], atol=0, rtol=1e-9, msg=lambda m, s=step: f"step {s}: {m}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """One and two ranks: straight, cut, and each going on from where itself or the other was cut."""
    with mock.patch.dict(os.environ, {"TESSELLA_CACHE": str(tmp_path_factory.mktemp("cache"))}):
        torch.set_num_threads(1)
        made = Runs(tmp_path_factory.mktemp("runs"))
        made.on(1, ("cut 1", ""), ("straight 1", ""))
        made.on(2, ("cut 2", ""), ("straight 2", ""), ("2 then 2", "cut 2"), ("1 then 2", "cut 1"))
        made.on(1, ("2 then 1", "cut 2"))
        yield made


@pytest.fixture(scope="module")
def wider_runs(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Four ranks. From three on, the order in which a library adds the ranks' parts can depend on much."""
    with mock.patch.dict(os.environ, {"TESSELLA_CACHE": str(tmp_path_factory.mktemp("cache"))}):
        runs.on(4, ("cut 4", ""), ("straight 4", ""), ("4 then 4", "cut 4"), methods=("swav",))
        runs.on(4, ("2 then 4", "cut 2"))
        runs.on(2, ("4 then 2", "cut 4"), methods=("swav",))
    return runs


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_go_on_bit_for_bit(method: str, runs: Runs):
    runs.assert_bits_equal(method, "straight 2", "2 then 2")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("resumed", ["straight 2", "1 then 2", "2 then 1"])
def test_one_and_two_ranks_go_on_for_each_other(method: str, resumed: str, runs: Runs):
    runs.assert_goes_on_as(method, "straight 1", resumed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_go_on_bit_for_bit(wider_runs: Runs):
    wider_runs.assert_bits_equal("swav", "straight 4", "4 then 4")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", METHODS)
def test_four_ranks_go_on_for_two(method: str, wider_runs: Runs):
    wider_runs.assert_goes_on_as(method, "straight 1", "2 then 4")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("resumed", ["straight 4", "4 then 2"])
def test_four_ranks_are_as_good_as_one_and_two_go_on_for_them(resumed: str, wider_runs: Runs):
    wider_runs.assert_goes_on_as("swav", "straight 1", resumed)
