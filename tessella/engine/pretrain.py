"""A run: build, loop, save. The loop names no method and asks for no type."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from tessella.data.batch import Batch
from tessella.data.sources import ImageSet, open_images
from tessella.engine.agree import require_agreement, was_restarted
from tessella.engine.build import build_sampler, build_state, require_fit, try_network
from tessella.engine.launch import launch
from tessella.engine.session import Session
from tessella.engine.watch import Watch
from tessella.methods.method import MethodOutput, Progress
from tessella.modules.drop_path import seed_noise
from tessella.optim import OptimizerConfig, learning_rate
from tessella.run.config import RunConfig
from tessella.run.folder import RunFolder, State
from tessella.weights.start import init_from


def pretrain(config: RunConfig, out: Path, images: ImageSet | None = None) -> Path:
    """Train a backbone from its start.

    Args:
        config: the run.
        out: the run folder; missing or empty.
        images: to train on, if they have no name on disk; default: `config.data`.

    Returns:
        `out`, with `backbone.safetensors` in it.

    Raises:
        UserError: the input cannot be used; the text says what to change.
        Interrupted: Ctrl-C or SIGTERM; the run is saved, and `resume` continues it.
        RankLost: another rank has died, hangs or has failed.
    """
    try_network(config)
    fabric, run = launch(config), RunFolder(out)
    if was_restarted(config, out):
        return resume(out, {"data": config.data, "init_from": config.init_from}, images)
    if fabric.is_global_zero:
        run.refuse_taken()
    images = images or open_images(config.data)
    require_fit(config, images, fabric)
    state = build_state(config, images, fabric.device)
    start = init_from(config.init_from, state.method)
    with Watch(config.rank_timeout) as watch, run.only_writer(fabric.is_global_zero):
        if fabric.is_global_zero:
            run.begin(config, start)
        fabric.barrier()
        return _train(fabric, config, run, images, state, 0, watch)


def resume(
    out: Path,
    changes: dict[str, Any] | None = None,
    images: ImageSet | None = None,
    allow: Collection[str] = (),
) -> Path:
    """Continue a run exactly where it stopped, from its newest valid checkpoint; from the start if there is none.

    Args:
        out: the run folder.
        changes: new values of fields that change how a run is executed but not what it computes, and of those in
            `allow`; see `run.config.ON_RESUME`. What `data` and `init_from` name is downloaded only if it is given
            here: a run folder may come from anybody.
        images: as in `pretrain`.
        allow: dotted names of fields that may have another value from now on, in `changes` or in config.yaml.

    Returns:
        `out`.

    Raises:
        UserError, Interrupted, RankLost: as `pretrain`.
    """
    run, saved = RunFolder.open(out)
    changes = changes or {}
    config = dataclasses.replace(saved, **changes)
    fabric = launch(config)
    with Watch(config.rank_timeout) as watch, run.only_writer(fabric.is_global_zero):
        run.refuse_other_config(saved, config, allow)
        images = images or run.open_images(config, download="data" in changes)
        require_fit(config, images, fabric)
        state = build_state(config, images, fabric.device)
        run.refuse_other_images(config, images)
        step = run.restore(state, build_sampler(config, images, state.method).steps_per_epoch)
        if step == 0:
            start = init_from(config.init_from, state.method, download="init_from" in changes)
            if fabric.is_global_zero:
                start.write(out)
        return _train(fabric, config, run, images, state, step, watch)


def _train(
    fabric: Fabric, config: RunConfig, run: RunFolder, images: ImageSet, state: State, step: int, watch: Watch
) -> Path:
    sampler = build_sampler(config, images, state.method)
    require_agreement(config, images, sampler, step)
    method, (ddp, optimizer) = state.method, fabric.setup(state.method, state.optimizer)
    if fabric.is_global_zero:
        run.prepare(config, images, state)
    with Session(fabric, config, run, images, state, sampler, step, watch) as session:
        for batches, progress in session.steps():
            if progress.step_in_epoch == 0:
                method.epoch_start(progress)
            _set_learning_rate(state.optimizer, config.optimizer, progress)
            outputs = _forward_backward(fabric, ddp, batches, progress, config.seed)
            if progress.step < config.freeze_backbone_steps:
                method.backbone.zero_grad()  # to None, not zero: momentum and weight decay would still move it
            method.before_update(progress)
            optimizer.step()
            optimizer.zero_grad()
            method.after_update(progress)
            session.observe(outputs, batches)  # a step that produced NaN may be undone here
            if progress.next().step_in_epoch == 0:
                method.epoch_end(progress.next())
    return run.path


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, progress: Progress) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, progress.step, progress.steps_per_epoch, progress.epochs)


def _forward_backward(
    fabric: Fabric, ddp: Any, batches: list[Batch], progress: Progress, seed: int
) -> list[MethodOutput]:
    """Gradients of one update, averaged over its micro-batches, and the method's output for each of them.

    What a network draws in training (drop path, dropout) is a function of (seed, step, micro-batch, rank), so that a
    resumed run draws the same as an uninterrupted one, and activation checkpointing the same twice.
    """
    outputs = []
    for number, batch in enumerate(batches, start=1):
        seed_noise(seed, progress.step, number, fabric.global_rank, fabric.device)
        with fabric.no_backward_sync(ddp, enabled=number < len(batches)):
            output: MethodOutput = ddp(batch, progress)
            fabric.backward(output.loss / len(batches))
        outputs.append(output)
    return outputs
