"""Numbers gone wrong: a step that makes anything NaN or infinite is undone and left out.

To look is to wait for the device, so a run looks every `LOOK_EVERY` steps, at epoch ends, and before it logs or saves:

    a loss since the last look, a weight, a buffer, an optimiser value is not finite
      -> back to the last checkpoint, which is from before
      -> the same steps again, each looked at; the one that spoils is undone, its images are named
      -> every step is looked at until the first finding and `LOOK_EVERY` steps beyond the last one left out

The result is that of a run that looked at every step: it depends on neither the looks nor the checkpoints, and a run
that was killed on the way goes on as a straight one. Numbers that are fine the second time were the machine's fault,
and have cost time alone. Too many steps left out end the run with advice: going on does not mend a learning rate at
which it diverges.
"""

from __future__ import annotations

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

LOOK_EVERY = 10  # steps; the work that can be lost to numbers that nobody has looked at yet
_SHOWN, _LISTED = 5, 100  # images in the text of an alarm, and in its line of the log


class _Copy(NamedTuple):
    """Method and optimiser before a step."""

    tensors: dict[str, Tensor]
    optimizer: dict[Tensor, dict[str, Any]]


class Guard:
    """Looks at a run's numbers, undoes a step that has spoilt them, and says whose fault it was."""

    def __init__(self, config: RunConfig, state: State, images: ImageSet, log: RunLog) -> None:
        """Watch a run.

        Args:
            config: of the run; `max_left_out` of its steps may be left out.
            state: of the run; changed when a step is undone.
            images: for their names.
            log: where it is said.
        """
        self.config, self.state, self.images, self.log = config, state, images, log
        self._close_until = int(state.monitor.close_until)
        self._before: _Copy | None = None

    def before_step(self, progress: Progress) -> None:
        """Keep what the step might spoil, while steps are looked at one by one."""
        self._before = _copy(self.state) if progress.step < self._close_until else None

    def leaves_out(self, step: MethodOutput, batches: list[Batch], progress: Progress) -> bool:
        """Whether the step just made has spoilt numbers; it is then undone. While steps are not looked at, False.

        Args:
            step: what the method returned.
            batches: the step's micro-batches of this rank.
            progress: the clock before the step.

        Raises:
            UserError: more steps were left out than the run allows.
        """
        before, self._before = self._before, None
        if before is None or _finite_on_all_ranks([step.loss.detach(), *_tensors(self.state)]):
            return False
        _put_back(self.state, before)
        self.state.monitor.left_out += 1
        self._look_closely_until(progress.step + 1 + LOOK_EVERY)
        self._tell(batches, progress)
        return True

    def all_is_well(self, progress: Progress) -> bool:
        """Whether everything has stayed finite on all ranks, so that it may be saved. On all ranks together.

        Args:
            progress: the clock after the step.

        Raises:
            UserError: something is not finite although each step has been looked at.
        """
        monitor = self.state.monitor
        monitor.merge()
        well = _finite_on_all_ranks(_tensors(self.state), monitor.nonfinite_here == 0)
        if not well and progress.step <= self._close_until:
            raise UserError(f"numbers became NaN or infinite at the end of step {progress.step}. {self._advice([])}")
        return well

    def go_back(self, found: Progress, to: Progress) -> None:
        """Look at each step from now on: the run has gone back to a checkpoint.

        Args:
            found: the clock when numbers were seen to be wrong.
            to: the clock of the checkpoint.
        """
        monitor = self.state.monitor
        monitor.forget_unmerged()
        self._look_closely_until(max(found.step, int(monitor.close_until)))
        self.log.go_back(to)
        self.log.event(
            "numbers became NaN or infinite: back to the last checkpoint, to look at each step from there",
            timing={"found_at": found.step, "back_to": to.step},
        )

    def _look_closely_until(self, step: int) -> None:
        self._close_until = step
        self.state.monitor.close_until.fill_(step)

    def _tell(self, batches: list[Batch], progress: Progress) -> None:
        rows, blamed = self._rows_and_blame(batches)
        guilty = [str(self.images.key(row)) for row, bad in zip(rows, blamed, strict=True) if bad]
        left_out = int(self.state.monitor.left_out)
        if guilty:
            shown = ", ".join(guilty[:_SHOWN]) + (f" and {len(guilty) - _SHOWN} more" if len(guilty) > _SHOWN else "")
            cause = f"{len(guilty)} of its {len(rows)} images do so by themselves: {shown}"
        else:
            cause = f"none of its {len(rows)} images does so by itself, so it is the network that diverges"
        text = f"step {progress.step} makes numbers NaN or infinite and is left out, the {_nth(left_out)}; {cause}"
        listed = guilty or [str(self.images.key(row)) for row in rows]
        self.log.alarm(
            progress.next(), Alarm("step_left_out", text), images=listed[:_LISTED], by_themselves=bool(guilty)
        )
        if left_out > self.config.max_left_out:
            raise UserError(
                f"step {progress.step} makes numbers NaN or infinite; {cause}. The run may leave out "
                f"{self.config.max_left_out} steps, and this would be the {_nth(left_out)}. {self._advice(guilty)}"
            )

    def _advice(self, guilty: list[str]) -> str:
        if guilty:
            return (
                "Look at these images: repair or remove them and start a new run, from this one's weights if you like "
                "(--init-from); or let the run leave out more steps (--max-left-out)"
            )
        precise = "" if self.config.precision == "32" else ", --precision 32 if it ran in bf16"
        return (
            "The last checkpoint is from before, but most likely on the way there already. Start a new run with a "
            f"lower learning rate (--optimizer.lr, now {self.config.optimizer.lr:g}), a longer warm-up "
            f"(--optimizer.warmup-epochs){precise}"
        )

    @torch.no_grad()
    def _rows_and_blame(self, batches: list[Batch]) -> tuple[list[int], list[bool]]:
        """The images of the step on all ranks, and which give NaN or infinite features even alone.

        Without batch norm over the batch, that is, which spreads one image's NaN to all others. If all images do,
        it is the weights; then none is blamed.
        """
        rows = torch.cat([batch.instances for batch in batches])
        blamed = torch.cat([_blamed(self.state.method, batch, self.config) for batch in batches])
        rows, blamed = dist.gather(rows), dist.gather(blamed.long()).bool()
        return rows.tolist(), (blamed & ~blamed.all()).tolist()


def _blamed(method: Method, batch: Batch, config: RunConfig) -> Tensor:
    """(B,) bool."""
    blamed = torch.zeros_like(batch.instances, dtype=torch.bool)
    method.eval()
    for group, crops in zip(views_of(config.method).groups, batch.views, strict=True):
        for view in crops:  # a tile becomes as large as its montage, which any network that runs here takes
            view = F.interpolate(view, scale_factor=group.tiles) if group.tiles > 1 else view
            blamed |= ~torch.isfinite(view).flatten(1).all(dim=1) | ~torch.isfinite(method.backbone(view)).all(dim=1)
    method.train()
    return blamed


def _tensors(state: State) -> Iterator[Tensor]:
    """Weights, buffers, and the optimiser's values beside them."""
    yield from state.method.parameters()
    yield from state.method.buffers()
    for values in state.optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor) and value.dim())


@torch.no_grad()
def _finite_on_all_ranks(tensors: Iterable[Tensor], well: Tensor | bool = True) -> bool:
    """Whether all values are finite, and all is well, on every rank: one wait for the device."""
    values = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(values, ord=torch.inf)])
    spoilt = ~(torch.isfinite(largest).all() & well)
    return not dist.all_reduce_max(spoilt.float()).item()


def _copy(state: State) -> _Copy:
    tensors = {name: tensor.clone() for name, tensor in state.method.state_dict().items()}
    return _Copy(tensors, _cloned(state.optimizer.state))


def _put_back(state: State, before: _Copy) -> None:
    state.method.load_state_dict(before.tensors)  # as a checkpoint is: what is kept beside a buffer follows it
    state.optimizer.state.clear()
    state.optimizer.state.update(before.optimizer)


def _cloned(state: Any) -> dict[Tensor, dict[str, Any]]:
    return {
        parameter: {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}
        for parameter, values in state.items()
    }


def _nth(n: int) -> str:
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
