"""NaN and infinity: a step that produces such numbers is undone and left out.

Checking waits for the device, so a run checks every `CHECK_EVERY` steps, at the end of an epoch, and before it logs or
saves:

    a loss since the last check, a weight, a buffer or an optimiser value is not finite
      -> back to the last checkpoint, which was saved after a check
      -> the same steps again, each of them checked; the one that breaks the numbers is undone, its images are named
      -> every step is checked up to the first finding, and for `CHECK_EVERY` steps after each step left out

The result is that of a run that checks every step. It does not depend on when the run checks, saves or is killed.
Numbers that are fine the second time were a fault of the machine, and cost time only. Too many steps left out end the
run with advice, because it diverges.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.sources import ImageSet
from tessella.errors import UserError
from tessella.methods import views_of
from tessella.methods.method import Method, MethodOutput, Progress
from tessella.run.config import RunConfig
from tessella.run.folder import State
from tessella.run.log import RunLog
from tessella.run.monitor import Alarm

CHECK_EVERY = 10  # steps; so much work can be lost
_SHOWN, _LISTED = 5, 100  # images in the text of an alarm, and in its line of the log


class _Copy(NamedTuple):
    """Method and optimiser before a step."""

    tensors: dict[str, Tensor]
    optimizer: dict[Tensor, dict[str, Any]]


class Guard:
    """Checks a run's numbers, undoes a step that broke them, and names the images that caused it."""

    def __init__(self, config: RunConfig, state: State, images: ImageSet, log: RunLog) -> None:
        self.config, self.state, self.images, self.log = config, state, images, log
        self._check_each_until = int(state.monitor.close_until)
        self._before: _Copy | None = None

    def before_step(self, progress: Progress) -> None:
        """Copy what the step might break, while every step is checked."""
        self._before = _copy(self.state) if progress.step < self._check_each_until else None

    def leaves_out(self, step: MethodOutput, batches: list[Batch], progress: Progress) -> bool:
        """Whether the last step broke numbers; it is then undone. False while not every step is checked.

        Args:
            step: the method's output.
            batches: this rank's micro-batches of the step.
            progress: the clock before the step.

        Raises:
            UserError: more steps were left out than the run allows.
        """
        before, self._before = self._before, None
        if before is None or _finite_on_all_ranks([step.loss.detach(), *_tensors(self.state)]):
            return False
        _put_back(self.state, before)
        self.state.monitor.left_out += 1
        self._check_each(progress.step + 1 + CHECK_EVERY)
        self._report(batches, progress)
        return True

    def all_finite(self, progress: Progress) -> bool:
        """Whether everything is finite after a step on all ranks, so that it may be saved. On all ranks together.

        Raises:
            UserError: something is not finite although every step was checked.
        """
        monitor = self.state.monitor
        monitor.merge()
        finite = _finite_on_all_ranks(_tensors(self.state), monitor.nonfinite_here == 0)
        if not finite and progress.step <= self._check_each_until:
            raise UserError(f"numbers became NaN or infinite at the end of step {progress.step}. {self._advice([])}")
        return finite

    def go_back(self, noticed: Progress, to: Progress) -> None:
        """Check every step from now on: the run has returned from the step where it noticed NaN to a checkpoint."""
        monitor = self.state.monitor
        monitor.forget_unmerged()
        self._check_each(max(noticed.step, int(monitor.close_until)))
        self.log.go_back(to)
        self.log.event(
            "numbers became NaN or infinite: back to the last checkpoint, to check every step from there",
            timing={"found_at": noticed.step, "back_to": to.step},
        )

    def _check_each(self, step: int) -> None:
        self._check_each_until = step
        self.state.monitor.close_until.fill_(step)

    def _report(self, batches: list[Batch], progress: Progress) -> None:
        rows, broken = self._rows_and_broken(batches)
        causes = [str(self.images.key(row)) for row, is_broken in zip(rows, broken, strict=True) if is_broken]
        left_out = int(self.state.monitor.left_out)
        if causes:
            more = f" and {len(causes) - _SHOWN} more" if len(causes) > _SHOWN else ""
            cause = f"{len(causes)} of its {len(rows)} images do so by themselves: {', '.join(causes[:_SHOWN])}{more}"
        else:
            cause = f"none of its {len(rows)} images does so by itself, so it is the network that diverges"
        text = f"step {progress.step} makes numbers NaN or infinite and is left out, the {_nth(left_out)}; {cause}"
        listed = (causes or [str(self.images.key(row)) for row in rows])[:_LISTED]
        self.log.alarm(progress.next(), Alarm("step_left_out", text), images=listed, by_themselves=bool(causes))
        if left_out > self.config.max_left_out:
            raise UserError(
                f"step {progress.step} makes numbers NaN or infinite; {cause}. The run may leave out "
                f"{self.config.max_left_out} steps, and this would be the {_nth(left_out)}. {self._advice(causes)}"
            )

    def _advice(self, causes: list[str]) -> str:
        if causes:
            return (
                "Repair or remove these images and start a new run, if you like with this one's weights (--init-from); "
                "or let the run leave out more steps (--max-left-out)"
            )
        precise = "" if self.config.precision == "32" else ", --precision 32 if it ran in bf16"
        return (
            "The last checkpoint is finite, but most likely the run was diverging there already. Start a new run with "
            f"a lower learning rate (--optimizer.lr, now {self.config.optimizer.lr:g}), a longer warm-up "
            f"(--optimizer.warmup-epochs){precise}"
        )

    @torch.no_grad()
    def _rows_and_broken(self, batches: list[Batch]) -> tuple[list[int], list[bool]]:
        """The images of the step on all ranks, and which of them have NaN or infinite features by themselves.

        That is without batch norm over the batch, which spreads one image's NaN to the others. If all images do, the
        cause is the weights, and none is named.
        """
        rows = torch.cat([batch.instances for batch in batches])
        broken = torch.cat([_broken(self.state.method, batch, self.config) for batch in batches])
        rows, broken = dist.gather(rows), dist.gather(broken.long()).bool()
        return rows.tolist(), (broken & ~broken.all()).tolist()


def _broken(method: Method, batch: Batch, config: RunConfig) -> Tensor:
    """(B,) bool: whether an image or its features have NaN or infinite values."""
    broken = torch.zeros_like(batch.instances, dtype=torch.bool)
    method.eval()
    for group, crops in zip(views_of(config.method).groups, batch.views, strict=True):
        for view in crops:  # a tile is enlarged to the size of a montage, which the network is known to take
            view = F.interpolate(view, scale_factor=group.tiles) if group.tiles > 1 else view
            broken |= ~torch.isfinite(view).flatten(1).all(dim=1) | ~torch.isfinite(method.backbone(view)).all(dim=1)
    method.train()
    return broken


def _tensors(state: State) -> Iterator[Tensor]:
    """Weights, buffers, and the optimiser's values beside them."""
    yield from state.method.parameters()
    yield from state.method.buffers()
    for values in state.optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor) and value.dim())


@torch.no_grad()
def _finite_on_all_ranks(tensors: Iterable[Tensor], also: Tensor | bool = True) -> bool:
    """Whether all values are finite, and `also` is true, on every rank. Waits for the device once."""
    values = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(values, ord=torch.inf)])
    broken = ~(torch.isfinite(largest).all() & also)
    return not dist.all_reduce_max(broken.float()).item()


def _copy(state: State) -> _Copy:
    tensors = {name: tensor.clone() for name, tensor in state.method.state_dict().items()}
    return _Copy(tensors, copy.deepcopy(dict(state.optimizer.state), {id(p): p for p in state.method.parameters()}))


def _put_back(state: State, before: _Copy) -> None:
    state.method.load_state_dict(before.tensors)  # like a checkpoint: hooks restore what depends on a buffer
    state.optimizer.state.clear()
    state.optimizer.state.update(before.optimizer)


def _nth(n: int) -> str:
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
