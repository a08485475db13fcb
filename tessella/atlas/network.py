"""Which network sees the images: one that is named, one that a library has kept here, or one trained on them now.

Nothing is downloaded unless a name is given for it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from tessella.console import note
from tessella.data.sources import ImageSet
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD, ColorAugmentation, CropGroup, ViewSpec
from tessella.engine.bench import bench
from tessella.engine.launch import pick_device
from tessella.engine.pretrain import pretrain, resume
from tessella.errors import UserError
from tessella.methods.swav import SwavConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.recipes.suggest import short_side
from tessella.report.page import short
from tessella.run.config import Device, RunConfig, load_config
from tessella.weights.libraries import kept_networks
from tessella.weights.resolve import Loaded, resolve_backbone

_LEAST = 32  # images; fewer cannot be trained on
_MEASURING = 15.0  # seconds that go into measuring the speed, at most
_LONG = 60.0  # minutes from which the page no longer warns of a short training


class Network(NamedTuple):
    """A network and what a person should know of its features."""

    loaded: Loaded
    banner: list[str]
    minutes: float  # of training on these images; 0: none


def find_network(
    named: Loaded | None,
    images: ImageSet,
    folder: Path,
    *,
    minutes: float,
    before: float,
    device: Device,
    workers: int | None,
    seed: int,
) -> Network:
    """The network that makes the features.

    Args:
        named: the one that was asked for; None to look for one, and else to train one.
        images: of the atlas.
        folder: of the run, if one is trained; a run that is there goes on.
        minutes: for the training.
        before: minutes that the run in `folder` was planned for.
        device: of the training.
        workers: decoding threads.
        seed: of the training.

    Raises:
        UserError: too few images to train on.
    """
    if named is not None:
        return Network(named, [f"Features come from {short(named.name)}."], 0.0)
    kept = [] if (folder / "config.yaml").exists() else kept_networks()
    if kept:
        name = kept[0].partition("=")[0]
        note(f"backbone: {name}, whose weights are on this computer already; --backbone takes another")
        return Network(
            resolve_backbone(kept[0]), [f"Features come from {name}, trained by others on other images."], 0.0
        )
    minutes = _train(images, folder, minutes, before, device, workers, seed)
    trained = f"Features come from a small network that was trained on these images alone for {minutes:g} minutes"
    if minutes >= _LONG:
        return Network(resolve_backbone(str(folder)), [f"{trained}."], minutes)
    return Network(
        resolve_backbone(str(folder)),
        [
            f"{trained}: expect colour and layout, not kinds of things.",
            "For more, give --minutes 120, which goes on with the training, or a pretrained network: --backbone "
            "timm:NAME downloads its weights once, timm:FOLDER takes a copy that is here.",
        ],
        minutes,
    )


def _train(
    images: ImageSet, folder: Path, minutes: float, before: float, device: Device, workers: int | None, seed: int
) -> float:
    """Train, or go on; gives the minutes that the run was planned for."""
    if (folder / "config.yaml").exists():
        epochs = load_config(folder / "config.yaml").epochs
        longer = round(epochs * minutes / before) if before else epochs
        resume(folder, {"epochs": longer} if longer > epochs else {}, images, ["epochs"])
        return max(minutes, before)
    if len(images) < _LEAST:
        raise UserError(
            f"{len(images)} images are too few to train a network on: give a pretrained one, --backbone timm:FOLDER or "
            "timm:NAME"
        )
    config = _config(images, device, workers, seed)
    rates = bench(config, images, seconds=min(_MEASURING, 12 * minutes))
    steps = max(1, int(60 * minutes * min(rates.loader, rates.step) / config.batch_size))
    per_epoch = max(1, len(images) // config.batch_size)
    config = dataclasses.replace(config, epochs=-(-steps // per_epoch), max_steps=steps if steps < per_epoch else None)
    note(
        f"backbone: none given and none on this computer, so one is trained on these images for about {minutes:g} min. "
        "--backbone timm:NAME would download a pretrained one; --minutes sets the time"
    )
    pretrain(config, folder, images)
    return minutes


def _config(images: ImageSet, device: Device, workers: int | None, seed: int) -> RunConfig:
    """SwAV with a ResNet-18 for the images' size: narrow on a CPU, where it must learn within minutes."""
    on_gpu = pick_device(device).type != "cpu"
    small = short_side(images) <= 48
    size = 32 if small else 96 if on_gpu else 64
    batch = 256 if on_gpu else 128
    while batch > len(images) // 2:
        batch //= 2
    colors = ColorAugmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)
    method = SwavConfig(
        prototypes=max(10, min(300, len(images) // 30)),
        hidden_dim=512,
        epsilon=0.03,
        freeze_prototypes_steps=40,
        views=ViewSpec((CropGroup(2, size, (0.2, 1.0), colors=colors),), IMAGENET_MEAN, IMAGENET_STD),
    )
    return RunConfig(
        method,
        BackboneConfig("resnet18", 64 if on_gpu else 32, "small" if small else "small-pool"),
        OptimizerConfig("adamw", lr=3e-3 if batch >= 64 else 1e-3, weight_decay=0.1, final_lr=3e-6),
        data=images.name,
        batch_size=batch,
        image_size=size,
        device=device,
        workers=workers,
        seed=seed,
        checkpoint_minutes=1.0,
        max_unreadable=1.0,
    )
