"""The parts of a run, made from its configuration: method, optimiser, monitor, sampler, loader."""

from __future__ import annotations

from collections.abc import Sized

import torch
from lightning_fabric import Fabric

from tessella import dist
from tessella.data.loader import Loader
from tessella.data.sampler import Sampler, check_shares
from tessella.data.sources import ImageSet
from tessella.engine.launch import cores_at_hand
from tessella.engine.memory import refuse_too_large
from tessella.methods import build_method, views_of
from tessella.methods.method import Method, Setting
from tessella.modules.backbone import build_backbone, try_backbone
from tessella.modules.norm import synchronise_batch_norm
from tessella.ops.layout import image_layout
from tessella.optim import build_optimizer
from tessella.ranges import check_ranges
from tessella.run.config import RunConfig
from tessella.run.folder import State
from tessella.run.monitor import Monitor


def try_network(config: RunConfig) -> None:
    """Raise a UserError if the network cannot process the run's views, before any image is looked for."""
    groups = views_of(config.method).groups
    montages = {group.tiles * group.size for group in groups if group.tiles > 1}
    try_backbone(config.backbone, {group.size for group in groups if group.tiles == 1} | {config.image_size}, montages)


def require_fit(config: RunConfig, images: ImageSet, fabric: Fabric) -> None:
    """Refuse, before anything is written, settings that do not fit the images, the ranks or the memory.

    Raises:
        UserError: the text names the setting.
    """
    check_ranges(config, images=len(images))
    check_shares(config.batch_size, fabric.world_size, config.accumulate)
    with torch.device("meta"):  # takes no memory
        method = build_method(config.method, build_backbone(config.backbone), _setting(config, images))
    build_sampler(config, images, method)
    refuse_too_large(config, method, fabric.world_size, fabric.device)


def _setting(config: RunConfig, images: Sized) -> Setting:
    return Setting(len(images), config.batch_size // config.accumulate, config.seed, config.accumulate)


def build_state(config: RunConfig, images: Sized, device: torch.device) -> State:
    """Freshly initialised method, optimiser and monitor, the same on every rank."""
    torch.manual_seed(config.seed)
    method = build_method(config.method, build_backbone(config.backbone), _setting(config, images))
    if dist.world_size() > 1:
        synchronise_batch_norm(method, device)
    method.to(device).to(memory_format=image_layout(device)).train()
    if config.compile:
        method.backbone.compile()
    monitor = Monitor(method.collapse_loss(), method.clusters, method.embedding_dim).to(device)
    return State(method, build_optimizer(method, config.optimizer), monitor)


def build_sampler(config: RunConfig, images: ImageSet, method: Method) -> Sampler:
    """Which images make up each step."""
    return method.sampler(config.method, len(images), config.batch_size, config.seed)


def build_loader(config: RunConfig, images: ImageSet, sampler: Sampler, fabric: Fabric) -> Loader:
    """Batches of this rank."""
    return Loader(
        images,
        views_of(config.method),
        sampler,
        seed=config.seed,
        device=fabric.device,
        workers=config.workers or cores_at_hand(),
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        accumulate=config.accumulate,
        max_unreadable=config.max_unreadable,
    )
