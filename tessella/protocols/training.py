"""Augmented batches of labelled images, for the protocols that train something.

    rows of a subset -> an order per epoch -> random resized crops and flips -> pixels, labels, weights

A loss that sums weight x cross-entropy over the batches of all ranks is the mean over the step's images, however they
are shared: gradients are then summed over the ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tessella import dist, files
from tessella.data.loader import Loader
from tessella.data.views import ColorAugmentation, CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.features import EvalData

T = TypeVar("T")

_SNAPSHOT_SECONDS = 180.0  # between two snapshots of a training
_SNAPSHOT_FORMAT = 2


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
        flips = ColorAugmentation(flip=0.5, jitter=0, gray=0, blur=0, solarize=0)
        crops = CropGroup(views=1, size=data.transform.size, scale=(0.08, 1.0), colors=flips)
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


def from_all_ranks(mine: list[T]) -> list[T]:
    """The ranks' lists of small objects, one behind the other."""
    if dist.world_size() == 1:
        return mine
    parts: list[list[T]] = [[] for _ in range(dist.world_size())]
    torch_dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


class Snapshots:
    """Where a long training is kept every few minutes, so that a killed evaluation goes on where it was.

    Randomness is a function of counters, so parameters, buffers and the optimiser's state are all there is. Without a
    folder, nothing is kept.
    """

    def __init__(self, folder: Path | None, asked: Any) -> None:
        """Name the place.

        Args:
            folder: gets a folder `training` as long as something is kept; None to keep nothing.
            asked: anything that JSON can hold: all that the training depends on.
        """
        key = hashlib.sha256(json.dumps([_SNAPSHOT_FORMAT, asked], sort_keys=True).encode()).hexdigest()[:40]
        self._root = folder or Path()
        self._folder = None if folder is None else folder / "training" / key
        self._saved_at = time.monotonic()

    def load(self, name: str, model: nn.Module, solver: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
        """Put model and optimiser where they were, and return what was saved beside them; {} when there is nothing."""
        found = None if self._folder is None else _read_snapshot(self._folder / f"{name}.safetensors")
        fits = found is not None and all(
            name in found[0] and found[0][name].shape == value.shape for name, value in model.state_dict().items()
        )
        done = -1.0 if found is None or not fits else float(found[1]["done"])
        newest = dist.all_reduce_max(torch.tensor([done, -done], device=device)).tolist()
        if found is None or not fits or newest != [done, -done]:  # not there, or not the same for every rank
            return {}
        tensors, state = found
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        for number, parameter in enumerate(_parameters(solver)):
            prefix = f"solver {number} "
            for key in (key for key in tensors if key.startswith(prefix)):
                part = key.removeprefix(prefix)
                # As torch makes them: in the parameter's layout and place, but for the counter of steps.
                value = tensors[key] if part == "step" else torch.empty_like(parameter).copy_(tensors[key])
                solver.state[parameter][part] = value
        return state

    def due(self, *, last: bool) -> bool:
        """Whether `save` would keep this moment: on rank 0, if it is the last one or the one before is minutes old."""
        if self._folder is None or dist.rank() != 0:
            return False
        return last or time.monotonic() - self._saved_at >= _SNAPSHOT_SECONDS

    def save(
        self, name: str, model: nn.Module, solver: torch.optim.Optimizer, state: dict[str, Any], *, last: bool
    ) -> None:
        """Keep this moment if it is `due`. A disk that refuses costs the snapshot, not the training.

        Args:
            name: of the file; an evaluation may have several trainings.
            model: its parameters and buffers are kept.
            solver: its tensors are kept.
            state: what JSON can hold; `done` must be a number that grows.
            last: nothing is left to train.
        """
        if self._folder is None or not self.due(last=last):
            return
        tensors = dict(model.state_dict())
        for number, parameter in enumerate(_parameters(solver)):
            for key, value in solver.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"solver {number} {key}"] = value
        with contextlib.suppress(OSError, SafetensorError):
            files.make_folder(self._root)
            path = self._folder / f"{name}.safetensors"
            files.write_tensors(path, tensors, {"state": json.dumps(state)}, inside=self._root)
            self._saved_at = time.monotonic()

    def drop(self) -> None:
        """The evaluation is complete: nothing of this is needed any more."""
        dist.barrier()  # no rank may still look for it
        if self._folder is not None and dist.rank() == 0:
            with contextlib.suppress(OSError):
                files.remove(self._folder, inside=self._root)
            with contextlib.suppress(OSError):  # other trainings may still be kept beside it
                self._folder.parent.rmdir()


def _read_snapshot(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    try:
        files.open_regular(path).close()  # safetensors would wait for a pipe
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {})["state"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _parameters(solver: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in solver.param_groups for parameter in group["params"]]
