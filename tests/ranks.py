"""Run a function on several gloo ranks of this machine and collect what each returns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on every rank; tensors and containers of tensors come back in rank order.

    The function must live at the top of a module: ranks are fresh processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, folder, function, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()
