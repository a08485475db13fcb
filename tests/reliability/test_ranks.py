"""Ranks gone wrong: a dead or hung rank is named and the others end; torchrun starts anew, to the identical result."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tessella.data.sources import ArrayImages, open_images
from tessella.engine import agree
from tessella.engine.build import build_sampler, build_state
from tessella.engine.pretrain import pretrain
from tessella.engine.watch import Watch
from tessella.errors import EXIT_RANK_LOST, UserError
from tessella.run.config import RunConfig, to_yaml
from tests.engine.runs import assert_same, final_state, tiny_run
from tests.ranks import on_ranks
from tests.reliability.program import Program, assert_same_runs, pretrain_words, ranks

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # for what must happen at all; how soon is said where it matters

# --- as torchrun starts them, without its own start ---------------------------------------------------------


@contextmanager
def started(out: Path, *more: str, **environment: str) -> Iterator[list[Program]]:
    """Two ranks of a run; what is left of them at the end is killed."""
    programs = ranks([*pretrain_words("swav", out), *more], out.with_suffix(".said"), 2, **environment)
    try:
        yield programs
    finally:
        for program in programs:
            program.process.kill()
            program.process.join()


def wait_for_step(run: Path, step: int, programs: list[Program]) -> None:
    deadline = time.monotonic() + SECONDS
    while f'"step": {step}, ' not in (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else True:
        assert time.monotonic() < deadline, [program.said() for program in programs]
        time.sleep(0.02)


def until_said(program: Program, pattern: str, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while not (found := re.search(pattern, program.said())):
        assert time.monotonic() < deadline, program.said()
        time.sleep(0.1)
    return found[0]


def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path):
    with started(tmp_path / "run", "--epochs", "4000") as (one, two):
        wait_for_step(tmp_path / "run", 3, [one, two])
        two.process.kill()
        assert one.wait(30) == EXIT_RANK_LOST, one.said()
    assert f"tessella (rank 0): rank 1 (process {two.process.pid} on" in one.said() and "no sign of life" in one.said()
    assert "Traceback" not in one.said()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_hung_rank_is_diagnosed_with_its_number_and_the_stacks_of_those_that_wait(victim: int, tmp_path: Path):
    with started(tmp_path / "run", "--epochs", "4000", "--rank-timeout", "4") as programs:
        wait_for_step(tmp_path / "run", 3, programs)
        programs[victim].send(signal.SIGSTOP)
        waits = programs[1 - victim]
        assert waits.wait(60) == EXIT_RANK_LOST, waits.said()
    if victim:
        assert f"rank 1 (process {programs[1].process.pid} on" in waits.said() and "no sign of life" in waits.said()
    else:  # where there is no torchrun, rank 0 holds what ranks meet in
        assert "find each other (rank 0 or torchrun) does not answer" in waits.said()
    assert re.search(r"This rank was at: step \d+, computes\. It ends; its stacks", waits.said())
    assert re.search(r"File .*pretrain\.py.* in _train", waits.said())


def watch_of(*beats: str) -> Watch:
    """Rank 0's, when the others have said this."""
    watch = Watch(timeout=0)
    watch._rank, watch._world, watch._store = 0, len(beats) + 1, torch.distributed.HashStore()
    watch._write_beat()
    for rank, beat in enumerate(beats, start=1):
        watch._store.set(f"beat {rank}", beat)
        watch._store.set(f"who {rank}", f"process {100 + rank} on host")
    return watch


def looks_around(*beats: str) -> str:
    """What rank 0 finds when the others have said this; a beat "alive" goes on."""
    watch = watch_of(*beats)

    def sleep(seconds: float) -> None:
        for rank, beat in enumerate(beats, start=1):
            if beat == "alive":
                watch._store.add(f"beat {rank} counted", 1)
                watch._store.set(f"beat {rank}", str(watch._store.add(f"beat {rank} counted", 0)))

    with mock.patch("tessella.engine.watch.time.sleep", sleep):
        return watch._silent_ranks()


def test_who_is_silent_is_named_who_failed_is_quoted_and_who_follows_is_not_blamed():
    assert looks_around("alive", "alive") == ""
    assert looks_around("alive", "17 step 3, computes").startswith("rank 2 (process 102 on host) gives no sign of life")
    both = looks_around("5 starts", "followed", "17 step 3, computes")
    assert both.startswith("rank 1 (process 101 on host), rank 3 (process 103 on host) give no sign of life")
    assert looks_around("failed with UserError: the disk is full", "followed") == (
        "rank 1 failed with UserError: the disk is full"
    )
    assert looks_around("left", "alive") == ""


def test_a_rank_that_lives_and_falls_behind_is_told_with_stacks_and_nothing_ends(capfd: pytest.CaptureFixture[str]):
    watch_of("9 starts", "7 starts")._print_all_positions()
    assert capfd.readouterr().err == ""  # all are at the same place: nobody is behind
    with mock.patch("tessella.engine.watch.sys.__stderr__", sys.stderr):
        watch_of("17 step 3, waits for images", "19 step 3, computes")._print_all_positions()
    said = capfd.readouterr().err
    assert "rank 1: step 3, waits for images; rank 2: step 3, computes" in said
    assert "test_a_rank_that_lives_and_falls_behind" in said


def test_ranks_that_a_launcher_starts_again_go_on_to_the_same_result(tmp_path: Path):
    """The launcher's store outlives the ranks, as torchrun's does, and still holds the addresses of the dead."""
    with started(tmp_path / "straight") as programs:
        assert [program.wait(SECONDS) for program in programs] == [0, 0]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with started(tmp_path / "run", **launcher, TORCHELASTIC_RESTART_COUNT="0") as programs:
        wait_for_step(tmp_path / "run", 4, programs)
        programs[1].process.kill()
        assert programs[0].wait(30) == EXIT_RANK_LOST
    with started(tmp_path / "run", **launcher, TORCHELASTIC_RESTART_COUNT="1") as programs:
        assert [program.wait(SECONDS) for program in programs] == [0, 0], [program.said() for program in programs]
    assert_same_runs(tmp_path / "straight", tmp_path / "run")


def test_pretrain_goes_on_only_with_the_same_run_and_only_when_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_run(max_steps=2)
    run = pretrain(config, tmp_path / "run")
    with pytest.raises(UserError, match="resume"):
        pretrain(config, run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert pretrain(config, run) == run
    with pytest.raises(UserError, match="resume"):
        pretrain(tiny_run(max_steps=2, seed=1), run)


# --- agreement ----------------------------------------------------------------------------------------------


def disagreements() -> list[str]:
    """What two ranks are told about each of these differences."""
    rank, config = torch.distributed.get_rank(), tiny_run()
    digits, versions = open_images("digits::test"), agree.versions
    others = ArrayImages("digits", np.zeros((len(digits), 8, 8, 3), np.uint8))
    told = []

    def ask(config: RunConfig = config, images: Any = digits, step: int = 0) -> None:
        method = build_state(tiny_run(), digits, torch.device("cpu")).method
        try:
            agree.require_agreement(config, images, build_sampler(config, images, method), step)
            told.append("")
        except UserError as error:
            told.append(str(error))

    ask()
    ask(tiny_run(workers=1 + rank, device=("auto", "cpu")[rank]))
    ask(tiny_run(seed=rank))
    ask(images=(digits, others)[rank])
    ask(step=5 * rank)
    with mock.patch.object(agree, "versions", lambda: versions() | {"torch": f"2.{10 + rank}"}):
        ask()
    return [text.replace("\n", " ") for text in told]


def as_texts() -> torch.Tensor:
    return torch.tensor(list("\n".join(disagreements()).encode()), dtype=torch.uint8)


def test_ranks_that_differ_are_told_in_what_before_the_first_step():
    ranks = [bytes(text.tolist()).decode().split("\n") for text in on_ranks(2, as_texts)]
    assert ranks[0] == ranks[1]
    same, execution, seed, images, step, torch_version = ranks[0]
    assert same == execution == ""
    assert "seed is 1 on rank 1" in seed and "and 0 on rank 0" in seed
    assert "the fingerprint of the data is" in images
    assert "the step of the checkpoint is 5 on rank 1" in step
    assert "the version of torch is '2.11' on rank 1" in torch_version


# --- full counts, by torchrun itself ------------------------------------------------------------------------

# What `python -m tessella` does, with a small run and a word when a rank has come to a step.
PROGRAM = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tessella import cli
from tessella.engine import pretrain as engine
from tessella.run.config import load_config
from tessella.engine.interrupt import stoppable
step_of, rank = engine._forward_backward, int(os.environ["RANK"])
def told(fabric, ddp, batches, progress, *rest):
    print(f"<rank {rank} process {os.getpid()} step {progress.step}>", flush=True)
    return step_of(fabric, ddp, batches, progress, *rest)
engine._forward_backward = told
config, out = load_config(Path(sys.argv[1])), Path(sys.argv[2])
with stoppable():
    sys.exit(cli._until_done(out, lambda: engine.pretrain(config, out)))
"""


class Group:
    """Ranks started by torchrun; what they print is read as it comes."""

    def __init__(self, folder: Path, config: RunConfig, ranks: int, restarts: int = 0) -> None:
        self.out = folder / "run"
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "program.py").write_text(PROGRAM)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *(f"--max-restarts={restarts}", str(folder / "program.py"), str(folder / "config.yaml"), str(self.out)),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.text = ""

    def until(self, pattern: str) -> re.Match[str]:
        """Read on until a line matches."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + SECONDS
        for line in self.process.stdout:
            self.text += line
            if found := re.search(pattern, line):
                return found
            assert time.monotonic() < deadline, self.text
        pytest.fail(f"never said {pattern!r}:\n{self.text}")

    def end(self) -> int:
        """The exit code, when all is read."""
        assert self.process.stdout is not None
        self.text += self.process.stdout.read()
        return self.process.wait(SECONDS)

    def process_of(self, rank: int, step: int) -> int:
        return int(self.until(rf"<rank {rank} process (\d+) step {step}>")[1])


@contextmanager
def group(*args: Any, **kwargs: Any) -> Iterator[Group]:
    torchrun = Group(*args, **kwargs)
    try:
        yield torchrun
    finally:
        with suppress(ProcessLookupError):
            os.killpg(torchrun.process.pid, signal.SIGKILL)  # the session of its own that it was given
        torchrun.process.communicate()


def long_run(**changes: Any) -> RunConfig:
    """Steps enough that it is never over before the fault."""
    return tiny_run(epochs=4000, checkpoint_minutes=1e-9, **changes)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks_count", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_random_kills_of_any_rank_under_torchrun_end_in_the_same_result(ranks_count: int, seed: int, tmp_path: Path):
    chance = random.Random(seed)
    config = tiny_run("smog" if seed % 2 else "swav", checkpoint_minutes=1e-9)
    (tmp_path / "straight").mkdir()
    (tmp_path / "killed").mkdir()
    with group(tmp_path / "straight", config, ranks=ranks_count) as whole:
        assert whole.end() == 0, whole.text
    with group(tmp_path / "killed", config, ranks=ranks_count, restarts=2) as again:
        for step in sorted(chance.sample(range(1, 10), 2)):
            os.kill(again.process_of(chance.randrange(ranks_count), step=step), signal.SIGKILL)
        assert again.end() == 0, again.text
    assert_same(final_state(whole.out), final_state(again.out))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_hung_rank_of_four_is_named_within_a_minute_by_default(victim: int, tmp_path: Path):
    with group(tmp_path, long_run(), ranks=4) as whole:
        process = whole.process_of(victim, step=3)
        os.kill(process, signal.SIGSTOP)
        start = time.monotonic()
        whole.until(rf"rank {victim} \(process {process} on \S+\) gives no sign of life")
        assert time.monotonic() - start < 60
        os.kill(process, signal.SIGCONT)
        assert whole.end() != 0
