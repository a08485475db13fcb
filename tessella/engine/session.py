"""What happens between the steps of a run: numbers are checked, figures logged, checkpoints saved, the run stopped.

The loop in `engine.pretrain` asks for steps and trains on them. Behind that:

    `steps`             gives the batches of each step; after the step it checks, logs, saves and stops
    `observe`           takes note of the step's outputs; undoes a step that made NaN, while steps are checked singly
    NaN in between      the state goes back to the last checkpoint, and the loop is given the same steps again
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch
from lightning_fabric import Fabric

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.sampler import Sampler
from tessella.data.sources import ImageSet
from tessella.engine.build import build_loader, build_state
from tessella.engine.interrupt import Interrupted, StopRequest
from tessella.engine.launch import first_line, repeatable
from tessella.engine.memory import explain_out_of_memory
from tessella.engine.numbers import LOOK_EVERY, Guard
from tessella.engine.watch import Watch
from tessella.methods.method import MethodOutput, Progress, joined
from tessella.run.config import RunConfig
from tessella.run.folder import RunFolder, State
from tessella.run.log import RunLog
from tessella.weights.start import init_from


class Session:
    """One process's part in a run, from its first step here to its last."""

    def __init__(
        self,
        fabric: Fabric,
        config: RunConfig,
        run: RunFolder,
        images: ImageSet,
        state: State,
        sampler: Sampler,
        step: int,
        watch: Watch,
    ) -> None:
        """Get ready to train.

        Args:
            fabric: of this rank.
            config: of the run.
            run: its folder.
            images: to train on.
            state: as restored, or freshly built.
            sampler: which images make up each step.
            step: updates that are complete.
            watch: over the other ranks.
        """
        self.fabric, self.config, self.run, self.images, self.state = fabric, config, run, images, state
        self.watch = watch
        self.progress = Progress(step, sampler.steps_per_epoch, config.epochs)
        self.last_step = min(self.progress.total_steps, config.max_steps or self.progress.total_steps)
        self.loader = build_loader(config, images, sampler, fabric)
        self.log = RunLog(run.path, self.last_step, config.batch_size, step, enabled=fabric.is_global_zero)
        self.log.say(first_line(fabric, config, images))
        self.guard = Guard(config, state, images, self.log)
        self.stop = StopRequest()
        self._output: MethodOutput | None = None
        self._around = contextlib.ExitStack()

    def __enter__(self) -> Self:
        memory = explain_out_of_memory(self.config, self.state.method, self.fabric.world_size)
        for context in (self.stop, self.log, repeatable(self.fabric.device), memory):
            self._around.enter_context(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return bool(self._around.__exit__(kind, error, trace))

    def steps(self) -> Iterator[tuple[list[Batch], Progress]]:
        """The steps that are left: this rank's micro-batches of each, and the clock before it.

        Raises:
            Interrupted: a stop was asked for; everything is saved.
            UserError: numbers stay broken, or a checkpoint cannot be written.
        """
        while self.progress.step < self.last_step:
            yield from self._steps_while_finite()
        if self.fabric.is_global_zero:
            self._save()
            self.run.write_backbone(self.state.method, self.config, self.progress.step)
        self.fabric.barrier()

    def _steps_while_finite(self) -> Iterator[tuple[list[Batch], Progress]]:
        if self.progress.step == 0:
            with self.fabric.autocast():
                self.state.method.prepare(self._first_look())
        for batches in self.watch.steps(self._batches(), self.progress.step):
            self.guard.before_step(self.progress)
            yield batches, self.progress
            self.progress = self.progress.next()
            self.log.advance(self.progress)
            if not self._look():
                self._go_back()
                return

    def _first_look(self) -> Iterator[Batch]:
        """This rank's batches of an epoch that is never trained on."""
        for number, batches in enumerate(self.loader.epoch(self.config.epochs)):
            if self.stop.seen_by_any_rank(number, self.fabric.device):
                raise Interrupted("stopped before the first step; a resumed run starts from the beginning")
            yield from batches

    def _batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step that is left, epoch after epoch."""
        step = self.progress.step
        while step < self.last_step:
            for batches in self.loader.epoch(*divmod(step, self.progress.steps_per_epoch)):
                yield batches
                step += 1
                if step == self.last_step:
                    return

    def observe(self, outputs: list[MethodOutput], batches: list[Batch]) -> None:
        """Take note of a step just made. A step that made NaN is undone, while steps are checked one by one.

        Args:
            outputs: of the method, one for each micro-batch.
            batches: the micro-batches.
        """
        self._output = joined(outputs)
        left_out = self.guard.leaves_out(self._output, batches, self.progress)
        seen = [batch.views[0][0] for batch in batches]
        self.state.monitor.observe(self._output, torch.cat(seen) if len(seen) > 1 else seen[0], left_out)

    def _look(self) -> bool:
        """After a step: whether all numbers are finite. If they are, log, save and stop where it is due."""
        progress, config = self.progress, self.config
        epoch_is_over = progress.step_in_epoch == 0
        stopped = self.stop.seen_by_any_rank(progress.step, self.fabric.device)
        logged = progress.step % config.log_every == 0 or progress.step == self.last_step
        if not (stopped or logged or epoch_is_over or progress.step % LOOK_EVERY == 0):
            return True
        if not self.guard.all_is_well(progress):
            return False
        if logged:
            self._log()
        if epoch_is_over:
            self.state.monitor.epoch_start()
        due = stopped or self.run.save_is_due(config.checkpoint_minutes, epoch_is_over)
        if self.fabric.is_global_zero and due:
            self._save()
        if stopped:
            raise Interrupted(f"stopped and saved at step {progress.step} of {self.last_step}")
        return True

    def _log(self) -> None:
        """One log line. Only this and the look at the numbers wait for the device."""
        assert self._output is not None
        monitor, progress = self.state.monitor, self.progress
        health = monitor.report(progress)
        names, values = list(self._output.metrics), [self._output.loss.detach(), *self._output.metrics.values()]
        means = dist.all_reduce_sum(torch.stack(values).float()) / dist.world_size()
        metrics = dict(zip(["loss", *names], means.tolist(), strict=True))
        rate = self.state.optimizer.param_groups[0]["lr"]
        self.log.step(progress, metrics | {"lr": rate} | health, wait_seconds=self.loader.wait_seconds)
        for alarm in monitor.alarms(health, progress):
            self.log.alarm(progress, alarm)

    def _save(self) -> None:
        self.run.save(self.progress, self.config, self.images, self.state, self.loader.skipped)

    def _go_back(self) -> None:
        """Into the parts of the run what they were at the newest checkpoint, or at the start."""
        state, found = self.state, self.progress
        state.optimizer.zero_grad()
        state.optimizer.state.clear()
        step = self.run.restore(state, found.steps_per_epoch)
        if step == 0:
            fresh = build_state(self.config, self.images, torch.device("cpu"))
            state.method.load_state_dict(fresh.method.state_dict())
            state.monitor.load_state_dict(fresh.monitor.state_dict())
            init_from(self.config.init_from, state.method)
        self.progress = found._replace(step=step)
        self.guard.go_back(found, self.progress)
