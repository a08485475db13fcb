"""One trainer for all protocols that train something: probes, fine-tuning, detectors, segmenters.

    batches -> loss, summed over the ranks -> gradients, summed over the ranks -> one update at the schedule's rate

A killed training continues bit for bit: its state is saved every few minutes, and everything random is a function of
the seed and the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tessella import dist, files
from tessella.errors import UserError
from tessella.modules.drop_path import seed_noise
from tessella.protocols.features import progress, tensor_digests

T = TypeVar("T")

_SNAPSHOT_SECONDS = 180.0  # between two snapshots of a training
_SNAPSHOT_FORMAT = 3
_CHECK_EVERY = 100  # steps between two checks of the loss on a GPU, which need not wait for each


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step, as a factor of the optimiser's own rates.

    Let t count units of `unit` steps, and T be their number in the whole training:

        drops     drop ** (how many of `drops` are <= t)
        cosine    (1 + cos(pi t / T)) / 2
        poly      (1 - final) (1 - t / T) ** power + final

    During the first `warmup` steps W, the factor is multiplied by a linear rise from `warmup_start` to 1.
    """

    steps: int  # of the whole training
    shape: Literal["drops", "cosine", "poly"] = "drops"
    unit: int = 1  # steps; with an epoch's steps, the rate is constant within an epoch
    drops: tuple[int, ...] = ()  # in units
    drop: float = 0.1
    power: float = 1.0
    final: float = 0.0
    warmup: int = 0  # steps
    warmup_start: float = 0.0

    def factor(self, step: int) -> float:
        """Factor of one update; `step` counts from 0."""
        t, total = step // self.unit, self.steps // self.unit
        if self.shape == "cosine":
            factor = (1 + math.cos(math.pi * t / total)) / 2
        elif self.shape == "poly":
            factor = (1 - self.final) * (1 - t / total) ** self.power + self.final
        else:
            factor = self.drop ** sum(t >= place for place in self.drops)
        if step < self.warmup:
            factor *= self.warmup_start + (1 - self.warmup_start) * step / self.warmup
        return factor


class Fitted(NamedTuple):
    """The course of a training."""

    losses: list[float]  # of every step, over all ranks
    scores: dict[int, float]  # steps done -> what `judge` returned


def fit(
    model: nn.Module,
    loss: Callable[[T], Tensor],
    batches: Callable[[int], Generator[T, None, None]],
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    snapshots: Snapshots | None = None,
    *,
    title: str,
    seed: int,
    name: str = "model",
    judge: Callable[[int], float] | None = None,
    judge_at: Collection[int] = (),
    advice: str = "",
    skipped: dict[str, str] | None = None,
) -> Fitted:
    """Train a model, or continue a training that was killed.

    Args:
        model: in training mode at every step.
        loss: this rank's part of the loss of a step: the ranks' parts add up to the whole.
        batches: from a step, counted from 0, the batches of this rank from there on.
        schedule: number of steps and learning rates.
        optimizer: its groups' rates are those that the schedule multiplies.
        snapshots: where the state is saved and loaded; None for a short training.
        title: for the progress display.
        seed: of what the model draws from torch's generators, such as the branches that stochastic depth drops.
        name: of the snapshot; an evaluation may have several trainings.
        judge: called with the number of steps done; its scores are part of the training's state.
        judge_at: after how many steps to judge.
        advice: what to change when the loss is not finite, which is then an error; "" to train on.
        skipped: key -> reason of the images that `batches` could not read; part of the training's state.

    Raises:
        UserError: the loss is not finite, and there is `advice`.
    """
    skipped = {} if skipped is None else skipped
    device = next(model.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    state = snapshots.load(name, model, optimizer) if snapshots else {}
    state = state or {"done": 0, "losses": [], "scores": {}, "skipped": {}}
    done, scores = int(state["done"]), {int(step): score for step, score in state["scores"].items()}
    skipped.update(state["skipped"])
    losses = torch.zeros(schedule.steps, device=device)  # read now and then: nothing waits for the device
    losses[:done] = torch.tensor(state["losses"])
    steps = range(done, schedule.steps)
    with private_generators(device), closing(batches(done)) as remaining:
        for step, batch in progress(zip(steps, remaining, strict=False), title, len(steps)):
            model.train()
            seed_noise(seed, step, 0, dist.rank(), device)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.factor(step)
            losses[step] = _update(optimizer, loss(batch))
            last = step + 1 == schedule.steps
            if advice and (last or device.type == "cpu" or (step + 1) % _CHECK_EVERY == 0):
                _check_finite(losses, step, advice)
            if judge is not None and step + 1 in judge_at:
                scores[step + 1] = judge(step + 1)
            if snapshots and snapshots.due(last=last):
                state = {"losses": losses[: step + 1].tolist(), "scores": scores, "skipped": skipped}
                snapshots.save(name, model, optimizer, {"done": step + 1} | state)
    return Fitted(losses.tolist(), scores)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """One step on the batch of all ranks; returns its loss."""
    optimizer.zero_grad()
    loss.backward()
    _sum_gradients([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    return dist.all_reduce_sum(loss.detach())


def _sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all ranks, in one collective."""
    if dist.world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = dist.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _check_finite(losses: Tensor, step: int, advice: str) -> None:
    """Stop when one of the last losses is not finite."""
    start = max(0, step + 1 - _CHECK_EVERY)
    broken = (~losses[start : step + 1].isfinite()).nonzero()[:, 0].tolist()
    if broken:
        first = start + broken[0]
        raise UserError(f"the training loss became {float(losses[first])} at step {first} of {len(losses)}: {advice}")


def private_generators(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Torch's global generators are restored afterwards, so that the next protocol does not depend on this one."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class Snapshots:
    """The state of a training, saved every few minutes until its evaluation is complete.

    Parameters, buffers and the optimiser's state are all there is to save. Without a folder, nothing is saved.
    """

    def __init__(self, folder: Path | None, backbone: nn.Module, data: Any, config: Any, *more: Any) -> None:
        """Name the snapshots after all that the training depends on.

        Args:
            folder: gets a folder `training` until `drop`; None to save nothing.
            backbone: that the training starts from.
            data: of the protocol: train and test images with fingerprints, and a device.
            config: of the protocol.
            more: what else decides the result, as JSON.
        """
        images = [data.train.fingerprint, data.test.fingerprint, dist.world_size(), data.device.type]
        network = [tensor_digests(backbone), repr(backbone)]
        question = [_SNAPSHOT_FORMAT, type(config).__name__, asdict(config), config.version, *images, *network, *more]
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:40]
        self._root = folder or Path()
        self._folder = None if folder is None else folder / "training" / key
        self._saved_at = time.monotonic()

    def load(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restore model and optimiser; returns the rest of the state, {} if there is none that all ranks can read."""
        if self._folder is None:
            return {}
        tensors, state = _read_snapshot(self._folder / f"{name}.safetensors")
        expected = model.state_dict()
        if any(key not in tensors or tensors[key].shape != value.shape for key, value in expected.items()):
            state = {}
        if any(done != state.get("done") or done is None for done in dist.gather_objects(state.get("done"))):
            return {}
        model.load_state_dict({key: tensors[key] for key in expected})
        for number, parameter in enumerate(_parameters(optimizer)):
            prefix = f"optimizer {number} "
            for key in (key for key in tensors if key.startswith(prefix)):
                part = key.removeprefix(prefix)
                # As torch makes them: in the parameter's layout and place, but for the counter of steps.
                value = tensors[key] if part == "step" else torch.empty_like(parameter).copy_(tensors[key])
                optimizer.state[parameter][part] = value
        return state

    def due(self, *, last: bool) -> bool:
        """Whether it is time to save: on rank 0, at the last step or some minutes after the previous snapshot."""
        if self._folder is None or dist.rank() != 0:
            return False
        return last or time.monotonic() - self._saved_at >= _SNAPSHOT_SECONDS

    def save(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Save model, optimiser and `state`, which JSON can hold. A full disk costs the snapshot, not the training."""
        assert self._folder is not None
        tensors = dict(model.state_dict())
        for number, parameter in enumerate(_parameters(optimizer)):
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer {number} {key}"] = value
        with contextlib.suppress(OSError, SafetensorError):
            files.make_folder(self._root)
            path = self._folder / f"{name}.safetensors"
            files.write_tensors(path, tensors, {"state": json.dumps(state)}, inside=self._root)
            self._saved_at = time.monotonic()

    def drop(self) -> None:
        """The evaluation is complete: remove its snapshots."""
        dist.barrier()  # no rank may still look for them
        if self._folder is not None and dist.rank() == 0:
            with contextlib.suppress(OSError):
                files.remove(self._folder, inside=self._root)
            with contextlib.suppress(OSError):  # snapshots of other trainings may lie beside it
                self._folder.parent.rmdir()


def _read_snapshot(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the rest; both empty if the file is missing or damaged."""
    try:
        files.open_regular(path).close()  # safetensors would wait for a pipe
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {})["state"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}, {}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
