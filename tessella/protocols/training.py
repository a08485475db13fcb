"""Augmented batches of labelled images, for the protocols that train something.

    rows of a subset -> an order per epoch -> random resized crops and flips -> pixels, labels, weights

A loss that sums weight x cross-entropy over the batches of all ranks is the mean over the step's images, however they
are shared: gradients are then summed over the ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tessella import dist
from tessella.data.loader import Loader
from tessella.data.views import CropGroup, Photometry, ViewSpec
from tessella.errors import UserError
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.features import EvalData

_SNAPSHOT_SECONDS = 180.0  # between two snapshots of a training


class SubsetOrder:
    """Every row of a subset once per epoch, in a random order; this rank's part of each step.

    Args:
        rows: (n,) rows of the data set.
        ids: (N,) stable ids of the whole data set.
        batch_size: images per step over all ranks.
        seed: of the order.
        partial: keep the last batch of an epoch though it is not full, as most published probes do.
        equal: every rank gets equally many, so that a batch norm over all ranks may count on it; up to ranks - 1
            images of the last batch then wait for another epoch. Else the ranks' parts differ by one at most, and a
            rank that would have none gets an image that does not count.
    """

    def __init__(
        self, rows: ArrayLike, ids: ArrayLike, batch_size: int, seed: int, *, partial: bool = True, equal: bool = False
    ) -> None:
        self.rows = np.asarray(rows, dtype=np.int64)
        self._keys = np.asarray(ids)[self.rows]
        self.batch_size = batch_size
        self._key, self._equal = stream_key(seed, "rows"), equal
        self._kept: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        ranks = dist.world_size()
        if equal and batch_size % ranks:
            raise UserError(
                f"batch_size={batch_size} cannot be shared equally by {ranks} ranks: use a multiple of {ranks}"
            )
        full, rest = divmod(len(self.rows), batch_size)
        if equal:
            rest -= rest % ranks
            rest = 0 if rest == 1 else rest  # batch norm refuses a single vector
        self.steps_per_epoch = full + bool(rest and (partial or not full))
        self._rest = rest
        if not self.steps_per_epoch:
            raise UserError(f"{len(self.rows)} train images are too few to train on: give at least {2 * ranks}")

    def step(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Rows of one step over all ranks."""
        if self._kept[0] != epoch:
            self._kept = epoch, self.rows[permutation(self._key, self._keys, epoch)]
        start = step * self.batch_size
        left = len(self.rows) - start
        return self._kept[1][start : start + (self.batch_size if left >= self.batch_size else self._rest)]

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Rows of one step that this rank reads, at least one."""
        every = self.step(epoch, step)
        mine = np.array_split(every, dist.world_size())[dist.rank()]
        return mine if len(mine) else every[:1]

    def counts(self, epoch: int, step: int) -> bool:
        """Whether this rank's rows of a step are its own, not only there to keep it busy."""
        return len(self.step(epoch, step)) > dist.rank()


class LabelledBatch(NamedTuple):
    """Some images of one step, on the device."""

    pixels: Tensor  # (b, 3, size, size) float32
    labels: Tensor  # (b,) int64
    weights: Tensor  # (b,) float32; over all ranks they sum to 1


class TrainImages:
    """The train images of an evaluation as random resized crops and flips, nothing else, as in every published probe.

    An image that cannot be read is left out of the loss.
    """

    def __init__(self, data: EvalData, order: SubsetOrder, seed: int) -> None:
        flips = Photometry(flip=0.5, jitter=0, gray=0, blur=0, solarize=0)
        crops = CropGroup(views=1, size=data.transform.size, scale=(0.08, 1.0), photometry=flips)
        self.order = order
        self._labels = data.labels("train").to(data.device)
        self._loader = Loader(
            data.train,
            ViewSpec((crops,), data.transform.mean, data.transform.std),
            order,
            seed=seed,
            device=data.device,
            workers=data.workers,
            max_unreadable=1.0,
        )

    @property
    def notes(self) -> list[str]:
        """For the reader of the scores."""
        skipped = len(self._loader.skipped)
        return [f"{skipped} train images could not be read and were left out"] if skipped else []

    def epoch(self, epoch: int) -> Iterator[LabelledBatch]:
        """This rank's part of every step."""
        for step, (batch,) in enumerate(self._loader.epoch(epoch)):
            wanted = torch.from_numpy(self.order.batch(epoch, step)).to(batch.instances.device)
            # The loader puts another image in the place of one that it cannot read.
            counted = (batch.instances == wanted).float() * self.order.counts(epoch, step)
            total = dist.all_reduce_sum(counted.sum()).clamp(min=1)
            yield LabelledBatch(batch.views[0][0], self._labels[batch.instances], counted / total)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all ranks, in one collective."""
    if dist.world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = dist.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def initial_head(classes: int, dim: int, seed: int) -> nn.Linear:
    """Weights from N(0, 0.01²), bias 0, equal on every rank."""
    head = nn.utils.skip_init(nn.Linear, dim, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.01, generator=generator)
        head.bias.zero_()
    return head


class Snapshots:
    """Where a long training is kept after some epochs, so that a killed evaluation goes on where it was.

    Randomness is a function of counters, so parameters, buffers and momenta are all there is. Without a folder, nothing
    is kept.
    """

    def __init__(self, cache: Path | None, asked: Any) -> None:
        """Name the place.

        Args:
            cache: folder of everything that can be made again; None to keep nothing.
            asked: anything that JSON can hold: all that the training depends on.
        """
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:40]
        self._folder = None if cache is None else cache / "training" / key
        self._saved_at = time.monotonic()

    def load(self, name: str, model: nn.Module, solver: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
        """Put model and optimiser where they were, and return what was saved beside them; {} when there is nothing."""
        found = None if self._folder is None else _read_snapshot(self._folder / f"{name}.safetensors")
        fits = found is not None and all(
            name in found[0] and found[0][name].shape == value.shape for name, value in model.state_dict().items()
        )
        epoch = -1.0 if found is None or not fits else float(found[1].get("epochs_done", 0))
        newest = dist.all_reduce_max(torch.tensor([epoch, -epoch], device=device)).tolist()
        if found is None or not fits or newest != [epoch, -epoch]:  # not there, or not the same for every rank
            return {}
        tensors, state = found
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        for number, parameter in enumerate(_parameters(solver)):
            if f"momentum {number}" in tensors:
                solver.state[parameter]["momentum_buffer"] = tensors[f"momentum {number}"].to(parameter.device)
        return state

    def save(
        self, name: str, model: nn.Module, solver: torch.optim.Optimizer, state: dict[str, Any], *, last: bool
    ) -> None:
        """Keep this moment on rank 0, if it is the last one or the one before is some minutes old.

        A disk that refuses costs the snapshot, not the training.
        """
        if self._folder is None or dist.rank() != 0:
            return
        if not last and time.monotonic() - self._saved_at < _SNAPSHOT_SECONDS:
            return
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        for number, parameter in enumerate(_parameters(solver)):
            momentum = solver.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum {number}"] = momentum.cpu().contiguous()
        path = self._folder / f"{name}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError, SafetensorError):
            self._folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, temporary, {"state": json.dumps(state)})
            temporary.replace(path)
            self._saved_at = time.monotonic()

    def drop(self) -> None:
        """The evaluation is complete: nothing of this is needed any more."""
        dist.barrier()  # no rank may still look for it
        if self._folder is not None and dist.rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)


def _read_snapshot(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {})["state"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _parameters(solver: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in solver.param_groups for parameter in group["params"]]
