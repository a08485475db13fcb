"""A run: build, loop, save. The loop names no method and asks for no type."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.loader import Loader
from tessella.data.sampler import Order, check_shares
from tessella.data.sources import ImageSet, open_images
from tessella.engine.agree import goes_on, require_agreement
from tessella.engine.interrupt import Interrupted, StopRequest
from tessella.engine.launch import cores_at_hand, launch, repeatable
from tessella.engine.memory import explain_out_of_memory, refuse_too_large
from tessella.engine.numbers import LOOK_EVERY, Guard
from tessella.engine.watch import Watch
from tessella.methods import build_method, views_of
from tessella.methods.method import Method, Progress, Setting, Step
from tessella.modules.backbone import build_backbone, try_backbone
from tessella.modules.drop_path import seed_noise
from tessella.modules.norm import synchronise_batch_norm
from tessella.ops.layout import image_layout
from tessella.optim import build_optimizer, learning_rate
from tessella.ranges import check_ranges
from tessella.run.config import RunConfig
from tessella.run.folder import RunFolder, State
from tessella.run.log import RunLog
from tessella.run.monitor import Monitor
from tessella.weights.start import start_from


def pretrain(config: RunConfig, out: Path, images: ImageSet | None = None) -> Path:
    """Train a backbone from its start.

    Args:
        config: the run.
        out: the run folder; missing or empty.
        images: what to train on, for images without a name on disk; default: `config.data`.

    Returns:
        `out`, with `backbone.safetensors` in it.

    Raises:
        UserError: the input cannot be used; the text says what to change.
        Interrupted: Ctrl-C or SIGTERM; the run is saved and `resume` goes on.
        RankLost: another rank has died, hangs or has failed.
    """
    _try_network(config)
    fabric, run = launch(config), RunFolder(out)
    if goes_on(config, out):
        return resume(out, images=images)
    if fabric.is_global_zero:
        run.refuse_taken()
    images = images or open_images(config.data)
    _require_fit(config, images, fabric)
    state = _build(config, images, fabric.device)
    start = start_from(config.start_from, state.method)
    with Watch(config.rank_timeout) as watch, run.only_writer(fabric.is_global_zero):
        if fabric.is_global_zero:
            run.begin(config, start)
        fabric.barrier()
        return _train(fabric, config, run, images, state, 0, watch)


def resume(
    out: Path,
    changes: dict[str, Any] | None = None,
    images: ImageSet | None = None,
    images_changed: bool = False,
    allow: Collection[str] = (),
) -> Path:
    """Go on exactly where a run stopped, from its newest valid checkpoint; from the start if there is none.

    Args:
        out: the run folder.
        changes: new values of fields that change how a run is executed but not what it computes; and of those in
            `allow`. `run.config.ON_RESUME` has them all.
        images: as in `pretrain`.
        images_changed: go on although images were added, removed or re-encoded, from the start of the epoch that was
            under way. What the method keeps of each image goes with the image.
        allow: dotted names of fields that may have another value from now on, in `changes` or in config.yaml.

    Returns:
        `out`.

    Raises:
        UserError, Interrupted, RankLost: as `pretrain`.
    """
    run, saved = RunFolder.open(out)
    config = dataclasses.replace(saved, **(changes or {}))
    fabric = launch(config)
    with Watch(config.rank_timeout) as watch, run.only_writer(fabric.is_global_zero):
        run.go_on_as(saved, config, allow)
        images = images or run.open_images(config)
        _require_fit(config, images, fabric)
        state = _build(config, images, fabric.device)
        steps_per_epoch = _order(config, images, state.method).steps_per_epoch
        step = run.restore(config, images, state, steps_per_epoch, images_changed)
        if step == 0:
            start = start_from(config.start_from, state.method)
            if fabric.is_global_zero:
                start.write(out)
        return _train(fabric, config, run, images, state, step, watch)


def _try_network(config: RunConfig) -> None:
    """Refuse a network that cannot take the run's views before any image is looked for."""
    groups = views_of(config.method).groups
    montages = {group.tiles * group.size for group in groups if group.tiles > 1}
    try_backbone(config.backbone, {group.size for group in groups if group.tiles == 1} | {config.image_size}, montages)


def _require_fit(config: RunConfig, images: ImageSet, fabric: Fabric) -> None:
    """Refuse, before anything is written, settings that do not fit the images, the ranks or the memory."""
    check_ranges(config, images=len(images))
    check_shares(config.batch_size, fabric.world_size, config.accumulate)
    with torch.device("meta"):  # takes no memory
        method = build_method(config.method, build_backbone(config.backbone), _setting(config, images))
    _order(config, images, method)
    refuse_too_large(config, method, fabric.world_size, fabric.device)


def _setting(config: RunConfig, images: ImageSet) -> Setting:
    return Setting(len(images), config.batch_size // config.accumulate, config.seed, config.accumulate)


def _build(config: RunConfig, images: ImageSet, device: torch.device) -> State:
    """Freshly initialised method, optimiser and monitor, alike on every rank."""
    torch.manual_seed(config.seed)
    method = build_method(config.method, build_backbone(config.backbone), _setting(config, images))
    if dist.world_size() > 1:
        synchronise_batch_norm(method, device)
    method.to(device).to(memory_format=image_layout(device)).train()
    if config.compile:
        method.backbone.compile()
    monitor = Monitor(method.collapse_loss(), method.clusters, method.embedding_dim).to(device)
    return State(method, build_optimizer(method, config.optimizer), monitor)


def _train(
    fabric: Fabric, config: RunConfig, run: RunFolder, images: ImageSet, state: State, step: int, watch: Watch
) -> Path:
    method, optimizer, monitor = state
    order = _order(config, images, method)
    require_agreement(config, images, order, step)
    progress = Progress(step, order.steps_per_epoch, config.epochs)
    last_step = min(progress.total_steps, config.max_steps or progress.total_steps)
    ddp, fabric_optimizer = fabric.setup(method, optimizer)
    loader = _loader(fabric, config, images, method, order)
    if fabric.is_global_zero:
        run.prepare(images, state)
    log = RunLog(run.path, last_step, config.batch_size, progress.step, enabled=fabric.is_global_zero)

    memory = explain_out_of_memory(config, method, fabric.world_size)
    with StopRequest() as stop, log, repeatable(fabric.device), memory:
        guard = Guard(config, state, images, log)
        while progress.step < last_step:  # once, unless numbers go wrong and the run goes back to its last checkpoint
            if progress.step == 0:
                with fabric.autocast():
                    method.prepare(_first_look(loader, config.epochs, stop, fabric.device))
            for batches in watch.steps(_batches(loader, progress, last_step), progress.step):
                if progress.step_in_epoch == 0:
                    method.epoch_start(progress)
                rate = _set_learning_rate(optimizer, config, progress)
                guard.before_step(progress)
                result = _forward_backward(fabric, ddp, batches, progress, config.seed)
                if progress.step < config.freeze_backbone_steps:
                    method.backbone.zero_grad()  # to None, not zero: momentum and weight decay would still move it
                method.before_update(progress)
                fabric_optimizer.step()
                fabric_optimizer.zero_grad()
                method.after_update(progress)
                left_out = guard.leaves_out(result, batches, progress)
                monitor.observe(result, batches[-1].views[0][0], left_out)

                progress = progress.next()
                epoch_is_over = progress.step_in_epoch == 0
                if epoch_is_over:
                    method.epoch_end(progress)
                stopped = stop.seen_by_any_rank(progress.step, fabric.device)
                logged = progress.step % config.log_every == 0 or progress.step == last_step
                if not (stopped or logged or epoch_is_over or progress.step % LOOK_EVERY == 0):
                    continue
                if not guard.all_is_well(progress):
                    found, progress = progress, progress._replace(step=_go_back(config, run, images, state, order))
                    guard.go_back(found, progress)
                    break
                if logged:
                    _log(log, monitor, loader, result, progress, rate)
                if epoch_is_over:
                    monitor.epoch_start()
                due = stopped or run.save_is_due(config.checkpoint_minutes, epoch_is_over)
                if fabric.is_global_zero and due:
                    run.save(progress, config, images, state, loader.skipped)
                if stopped:
                    raise Interrupted(f"stopped and saved at step {progress.step} of {last_step}")

    if fabric.is_global_zero:
        run.save(progress, config, images, state, loader.skipped)
        run.write_backbone(method)
    fabric.barrier()
    return run.path


def _first_look(loader: Loader, epoch: int, stop: StopRequest, device: torch.device) -> Iterator[Batch]:
    """This rank's batches of an epoch that is never trained on."""
    for number, batches in enumerate(loader.epoch(epoch)):
        if stop.seen_by_any_rank(number, device):
            raise Interrupted("stopped before the first step; a resumed run starts from the beginning")
        yield from batches


def _batches(loader: Loader, progress: Progress, last_step: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step that is left, epoch after epoch."""
    step = progress.step
    while step < last_step:
        for batches in loader.epoch(*divmod(step, progress.steps_per_epoch)):
            yield batches
            step += 1
            if step == last_step:
                return


def _forward_backward(fabric: Fabric, ddp: Any, batches: list[Batch], progress: Progress, seed: int) -> Step:
    """Gradients of one update, averaged over its micro-batches; the last micro-batch's step.

    What a network draws in training (drop path, dropout) is a function of (seed, step, micro-batch, rank), so that a
    resumed run draws what a straight one does; recomputation draws it again.
    """
    for number, batch in enumerate(batches, start=1):
        seed_noise(seed, progress.step, number, fabric.global_rank, fabric.device)
        with fabric.no_backward_sync(ddp, enabled=number < len(batches)):
            step: Step = ddp(batch, progress)
            fabric.backward(step.loss / len(batches))
    return step


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: RunConfig, progress: Progress) -> float:
    rate = learning_rate(config.optimizer, progress.step, progress.steps_per_epoch, progress.epochs)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _log(log: RunLog, monitor: Monitor, loader: Loader, step: Step, progress: Progress, rate: float) -> None:
    """One log line. The only place of the loop that waits for the device."""
    health = monitor.report(progress)
    names, values = list(step.metrics), torch.stack([step.loss.detach(), *step.metrics.values()]).float()
    values = dist.all_reduce_sum(values) / dist.world_size()
    metrics = dict(zip(["loss", *names], values.tolist(), strict=True))
    log.step(progress, metrics | {"lr": rate} | health, wait_seconds=loader.wait_seconds)
    for alarm in monitor.alarms(health, progress):
        log.alarm(progress, alarm)


def _go_back(config: RunConfig, run: RunFolder, images: ImageSet, state: State, order: Order) -> int:
    """Into the parts of a run what they were at the newest checkpoint, or at the start; the number of steps done."""
    state.optimizer.zero_grad()
    state.optimizer.state.clear()
    step = run.restore(config, images, state, order.steps_per_epoch, images_changed=True)  # as accepted at the start
    if step == 0:
        fresh = _build(config, images, torch.device("cpu"))
        state.method.load_state_dict(fresh.method.state_dict())
        state.monitor.load_state_dict(fresh.monitor.state_dict())
        start_from(config.start_from, state.method)
    return step


def _order(config: RunConfig, images: ImageSet, method: Method) -> Order:
    return method.order(config.method, len(images), config.batch_size, config.seed)


def _loader(fabric: Fabric, config: RunConfig, images: ImageSet, method: Method, order: Order) -> Loader:
    return Loader(
        images,
        views_of(config.method),
        order,
        seed=config.seed,
        device=fabric.device,
        workers=config.workers or cores_at_hand(),
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        accumulate=config.accumulate,
        max_unreadable=config.max_unreadable,
    )
