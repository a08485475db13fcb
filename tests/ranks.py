"""Run a function on several gloo ranks of this machine and collect what each returns."""

from __future__ import annotations

import atexit
import io
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as torch_dist


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on every rank; tensors and containers of tensors come back in rank order.

    The function must live at the top of a module: ranks are processes of their own. They serve all tests, because
    starting them takes longer than most of what they do; what a function changes it must put back.
    """
    ranks = [*_RANKS, *(_Rank() for _ in range(world_size - len(_RANKS)))]
    _RANKS[:] = ranks
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number, rank in enumerate(ranks[:world_size]):
                rank.pipe.send((number, world_size, folder, dict(os.environ), function, args))
            answers: dict[Any, Any] = {rank.pipe: None for rank in ranks[:world_size]}
            while None in answers.values():
                for pipe in wait([pipe for pipe, answer in answers.items() if answer is None]):
                    assert isinstance(pipe, Connection)
                    answers[pipe] = pipe.recv()
                    assert isinstance(answers[pipe], bytes), f"a rank failed:\n{answers[pipe]}"
    except BaseException:  # the others may wait for the failed one for ever
        _end()
        raise
    return [torch.load(io.BytesIO(answer), weights_only=True) for answer in answers.values()]


class _Rank:
    """A process that runs one function after the other."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()


_RANKS: list[_Rank] = []


@atexit.register
def _end() -> None:
    for rank in _RANKS:
        rank.process.kill()
        rank.process.join()
    _RANKS.clear()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            number, world_size, folder, environment, function, args = pipe.recv()
        except EOFError:
            return
        try:
            os.environ.clear()
            os.environ.update(environment)
            torch.manual_seed(0)
            torch_dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=world_size)
            result = io.BytesIO()
            torch.save(function(*args), result)
            torch_dist.barrier()
            torch_dist.destroy_process_group()
            pipe.send(result.getvalue())
        except BaseException:
            pipe.send(traceback.format_exc())
