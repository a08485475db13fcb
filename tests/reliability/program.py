"""The command line in processes that may be killed, without the seconds that importing torch takes each time.

A server process imports once and forks: each start is a process of its own that runs `tessella.cli.main` as the
installed command does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tessella.run import checkpoints as checkpoint_files
from tessella.run.checkpoints import load_newest
from tests.engine.runs import assert_same

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["tessella.cli", "tessella.engine.pretrain", "tessella.ops.kernels", "tests.reliability.program", "tyro"]
)

# What changes a disk; each call is a point at which a process may be killed.
SYSTEM_CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "truncate")

_COMMON = (
    "--device cpu --workers 1 --checkpoint-minutes 1e-9 --log-every 1 --image-size 16 "
    "--backbone.name resnet10 --backbone.width 4 --batch-size 64 --epochs 2 --optimizer.warmup-epochs 0"
)
_SETTINGS = {
    "swav": "--method.queue-length 128 --method.queue-from-epoch 0 --method.prototypes 20 --method.hidden-dim 32",
    "smog": "--method.groups 20 --method.hidden-dim 32 --method.regroup-every 4",
    "jigclu": "",
    "mejigclu": "",
    "coke": "--method.centres 8 12 --method.average-from-epoch 1 --method.label-slots 2",
}
METHODS = tuple(_SETTINGS)
STEPS = 10


def pretrain_words(method: str, out: Path, data: str = "digits::test") -> list[str]:
    """A run of ten steps that saves after each: about a second."""
    settings = [*_COMMON.split(), *_SETTINGS[method].split()]
    return ["pretrain", f"{method}_cpu", "--data", data, "--out", str(out), *settings]


def next_words(method: str, run: Path, data: str = "digits::test") -> list[str]:
    """What a person types to go on: `resume`, or the first command again if the run had not begun."""
    return ["resume", str(run)] if (run / "config.yaml").exists() else pretrain_words(method, run, data)


class Program:
    """One process."""

    def __init__(self, words: Sequence[str], output: Path, die_at_call: int = 0, **environment: str) -> None:
        """Start it.

        Args:
            words: of the command line.
            output: what it says.
            die_at_call: kill it at this one of its `SYSTEM_CALLS`; 0: never.
            environment: more variables.
        """
        variables = {name: os.environ[name] for name in ("TESSELLA_CACHE",) if name in os.environ} | environment
        self.output = output
        self.process: BaseProcess = _SERVER.Process(
            target=_main, args=(list(words), str(output), die_at_call, variables)
        )
        self.process.start()
        self.started = time.monotonic()

    def kill_at(self, seconds: float) -> bool:
        """SIGKILL it so long after its start; whether it was still there."""
        self.process.join(max(0.0, self.started + seconds - time.monotonic()))
        if self.process.exitcode is not None:
            return False
        self.process.kill()
        self.wait()
        return self.process.exitcode == -signal.SIGKILL

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 600.0) -> int:
        """Its exit code; a machine may have other work."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still there after {seconds} s: {self.said()}")
        return self.process.exitcode

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def run(words: Sequence[str], output: Path) -> float:
    """Run it to its end, undisturbed; the seconds that it took, without the server's start."""
    program = Program(words, output)
    assert program.wait() == 0, program.said()
    return time.monotonic() - program.started


def ranks(words: Sequence[str], output: Path, world_size: int, **environment: str) -> list[Program]:
    """The programs of a torchrun of so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0",
    }  # fmt: skip
    return [
        Program(words, output.with_suffix(f".{rank}"), **shared | environment, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(world_size)
    ]


def _main(words: list[str], output: str, die_at_call: int, variables: dict[str, str]) -> None:
    os.environ |= variables
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    torch.set_num_threads(1)
    from tessella.cli import program

    if die_at_call:
        die_at(die_at_call)
    sys.argv = ["tessella", *words]
    program()


def die_at(call: int) -> None:
    """Let this process be killed at its n-th call of the system that changes a disk; a write is half done then."""
    count = 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return function

    for name in SYSTEM_CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def save_and_die(folder: str, step: int, value: float, call: int) -> None:
    """Write one small checkpoint, and be killed at a call of the system; to be run in a process of its own."""
    torch.set_num_threads(1)
    die_at(call)
    checkpoint_files.save(Path(folder), step, small_tensors(value), {"value": value})
    os._exit(0)


def small_tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"method": {"weight": torch.full((64,), value), "count": torch.tensor(7)}, "optimizer": {}}


def in_a_process(function: Callable[..., None], *args: Any) -> int:
    """Exit code of a process that calls `function`, which must live at the top of a module."""
    process = _SERVER.Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def log_without_timing(folder: Path) -> list[dict[str, Any]]:
    """Every line of the log."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def assert_same_runs(straight: Path, other: Path) -> None:
    """Product, checkpoints with all their tensors, logs and file names are equal, bit for bit."""
    assert names(other) == names(straight)
    assert names(other / "checkpoints") == names(straight / "checkpoints")
    assert (other / "backbone.safetensors").read_bytes() == (straight / "backbone.safetensors").read_bytes()
    for checkpoint in names(straight / "checkpoints"):
        (ours, our_facts), (theirs, their_facts) = (
            checkpoint_files.load(folder / "checkpoints" / checkpoint) for folder in (straight, other)
        )
        assert our_facts == their_facts and ours.keys() == theirs.keys()
        for part in ours:
            assert_same(ours[part], theirs[part])
    assert log_without_timing(other) == log_without_timing(straight)


def assert_goes_on(folder: Path) -> None:
    """No checkpoint of a killed run is damaged, and at most the one in the making is not there."""
    damage: list[str] = []
    load_newest(folder / "checkpoints", damage.append)
    assert not damage, damage


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "tensorboard")
