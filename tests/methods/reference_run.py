"""A run of the engine, with everything written down that an independent step needs to be compared with it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tessella.data.batch import Batch
from tessella.data.loader import Loader
from tessella.engine import pretrain as engine
from tessella.run.config import RunConfig
from tessella.run.folder import optimizer_tensors
from tests.float64 import precision

State = dict[str, Tensor]


@dataclasses.dataclass
class RecordedStep:
    """One update."""

    batches: list[Batch]  # its micro-batches
    losses: list[Tensor]  # one of each
    gradients: State  # as backward leaves them
    state: State = dataclasses.field(default_factory=dict)  # after the update, before an epoch's end


@dataclasses.dataclass
class Recording:
    """A whole run."""

    start: State = dataclasses.field(default_factory=dict)
    first_look: list[Batch] = dataclasses.field(default_factory=list)
    prepared: State = dataclasses.field(default_factory=dict)  # after the first look
    epoch_starts: list[State] = dataclasses.field(default_factory=list)  # after the hook
    steps: list[RecordedStep] = dataclasses.field(default_factory=list)
    epoch_ends: list[State] = dataclasses.field(default_factory=list)  # after the hook


def record(config: RunConfig, folder: Path, *, double: bool = True) -> Recording:
    """Train as `tessella pretrain` does, in one process.

    Args:
        config: the run.
        folder: for the run's files; missing.
        double: compute in float64; the batches are the same up to their float32 rounding.
    """
    recording = Recording()
    build, forward_backward = engine.build_state, engine._forward_backward

    def watched_build(*args: Any) -> Any:
        state = build(*args)
        method, optimizer = state.method, state.optimizer

        def snapshot() -> State:
            return {n: t.clone() for n, t in (method.state_dict() | optimizer_tensors(method, optimizer)).items()}

        def watch(hook: str, note: Any) -> None:
            original = getattr(method, hook)
            setattr(method, hook, lambda progress: (original(progress), note(snapshot()))[0])

        def prepare(batches: Any, original: Any = method.prepare) -> None:
            original(recording.first_look.append(b) or b for b in batches)
            recording.prepared = snapshot()

        recording.start = snapshot()
        method.prepare = prepare
        watch("epoch_start", recording.epoch_starts.append)
        watch("after_update", lambda state: setattr(recording.steps[-1], "state", state))
        watch("epoch_end", recording.epoch_ends.append)
        return state

    def watched_step(fabric: Any, ddp: Any, batches: list[Batch], *args: Any) -> Any:
        step = RecordedStep(batches, [], {})
        method = ddp.module
        handle = method.register_forward_hook(lambda _, given, result: step.losses.append(result.loss.detach()))
        result = forward_backward(fabric, ddp, batches, *args)
        handle.remove()
        step.gradients = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
        recording.steps.append(step)
        return result

    watched = mock.patch.multiple(engine, build_state=watched_build, _forward_backward=watched_step)
    with in_float64() if double else contextlib.nullcontext(), watched:
        engine.pretrain(config, folder)
    return recording


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Runs of the engine compute in float64, on the same views as always."""
    epoch = Loader.epoch

    def double_epoch(*args: Any) -> Iterator[list[Batch]]:
        steps = epoch(*args)
        while True:
            with precision(torch.float32):
                batches = next(steps, None)
            if batches is None:
                return
            yield [b._replace(views=tuple(v.double() for v in b.views)) for b in batches]

    with precision(torch.float64), mock.patch.object(Loader, "epoch", double_epoch):
        yield


def assert_equal(ours: State, theirs: State, what: str, *, rtol: float = 1e-7, atol: float = 1e-10) -> None:
    """The same names and values."""
    assert set(ours) == set(theirs), (what, set(ours) ^ set(theirs))
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value.to(ours[name].dtype), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def of(state: State, *parts: str) -> State:
    """The tensors whose names begin with one of `parts`."""
    return {n: t for n, t in state.items() if n.split(".")[0] in parts}
