"""What happens between the steps of a run: it checks numbers, logs, saves checkpoints, and stops.

The loop in `engine.pretrain` takes steps from here and trains on them:

    `steps`      gives the batches of each step; after the step it checks, logs, saves and stops
    `observe`    records the outputs of a step; undoes a step that produced NaN, while every step is checked
    after NaN    the state of the last checkpoint is restored, and the loop gets the same steps again
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
from tessella.engine.numbers import CHECK_EVERY, Guard
from tessella.engine.watch import Watch
from tessella.methods.method import MethodOutput, Progress, joined
from tessella.run.config import RunConfig
from tessella.run.folder import RunFolder, State
from tessella.run.log import RunLog
from tessella.weights.start import init_from


class Session:
    """One process's part of a run, from its first step to its last."""

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
        """Prepare to train with a state that was restored or freshly built, after `step` complete updates."""
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
            Interrupted: the run was asked to stop; everything is saved.
            UserError: numbers stay NaN, or a checkpoint cannot be written.
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
            if not self._finish_step():
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
        """Record a step: the method's outputs for its micro-batches. While every step is checked, undo one with NaN."""
        self._output = joined(outputs)
        left_out = self.guard.leaves_out(self._output, batches, self.progress)
        views = [batch.views[0][0] for batch in batches]
        self.state.monitor.observe(self._output, torch.cat(views) if len(views) > 1 else views[0], left_out)

    def _finish_step(self) -> bool:
        """After a step: whether all numbers are finite. If so, log, save and stop when due."""
        progress, config = self.progress, self.config
        epoch_is_over = progress.step_in_epoch == 0
        stopped = self.stop.seen_by_any_rank(progress.step, self.fabric.device)
        logged = progress.step % config.log_every == 0 or progress.step == self.last_step
        if not (stopped or logged or epoch_is_over or progress.step % CHECK_EVERY == 0):
            return True
        if not self.guard.all_finite(progress):
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
        """One log line. Only this and the check of the numbers wait for the device."""
        assert self._output is not None
        monitor, progress = self.state.monitor, self.progress
        health = monitor.report()
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
        """Restore the state of the newest checkpoint, or of the start."""
        state, noticed = self.state, self.progress
        state.optimizer.zero_grad()
        state.optimizer.state.clear()
        step = self.run.restore(state, noticed.steps_per_epoch)
        if step == 0:
            fresh = build_state(self.config, self.images, torch.device("cpu"))
            state.method.load_state_dict(fresh.method.state_dict())
            state.monitor.load_state_dict(fresh.monitor.state_dict())
            init_from(self.config.init_from, state.method)
        self.progress = noticed._replace(step=step)
        self.guard.go_back(noticed, self.progress)
