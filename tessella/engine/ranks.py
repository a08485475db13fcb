"""Which of a launcher's processes this is, read from the environment, before torch is imported."""

from __future__ import annotations

import os
import re
from typing import NamedTuple


class Place(NamedTuple):
    """A process among those that torchrun or srun started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on its machine
    local_world_size: int = 1


def place() -> Place:
    """This process's place; rank 0 of 1 if neither torchrun nor srun started it.

    Under srun, the variables of the job step count. Those of the whole job do not: a program that a batch script starts
    once has them too.
    """
    if "RANK" in os.environ:  # torchrun, also inside of srun
        return Place(_number("RANK"), _number("WORLD_SIZE", 1), _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", 1))
    tasks = _number("SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1:
        nodes = _number("SLURM_STEP_NUM_NODES", 1)
        here = _number("SLURM_NTASKS_PER_NODE", tasks // nodes)
        return Place(_number("SLURM_PROCID"), tasks, _number("SLURM_LOCALID"), here)
    return Place(_number("LOCAL_RANK"), 1, _number("LOCAL_RANK"), 1)  # of processes that Fabric starts for each GPU


def adopt() -> Place:
    """As `place`; under srun, also set the variables of torchrun, which torch and Fabric read."""
    here = place()
    if here.world_size > 1 and "RANK" not in os.environ:
        os.environ |= {name.upper(): str(value) for name, value in here._asdict().items()}
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        os.environ.setdefault("MASTER_ADDR", _first_host(nodes))
        # The same on every rank, and different for each step of each job.
        port = 15_000 + (_number("SLURM_JOB_ID") * 31 + _number("SLURM_STEP_ID")) % 10_000
        os.environ.setdefault("MASTER_PORT", str(port))
    return here


def _number(name: str, default: int = 0) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _first_host(nodes: str) -> str:
    """host5 of "host[5-9,12]" and of "host5,host7"."""
    first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes)
    return re.split(r"[ ,]", first)[0]
