"""What a recipe costs: passes through the backbone, arithmetic, and an estimate of the hours on a GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from tessella.methods import views_of
from tessella.methods.smog import SmogConfig
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.modules.resnet import LAYERS
from tessella.run.config import RunConfig

IMAGENET_IMAGES = 1_281_167
_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "digits::train": 1437}

# What one H100 is assumed to sustain in bf16 with our networks; not measured. 60 is some 2,400 views of 224 pixels per
# second through ResNet-50, forward and backward (24.6 GFLOP each); an A100 has been published with as many. Small
# networks on small images wait for their many small kernels.
GPU = "NVIDIA H100"
_TFLOPS, _TFLOPS_SMALL_IMAGES = 60, 20


class Pass(NamedTuple):
    """Images of one size that go through the backbone together."""

    images: int  # for each training image
    size: int  # pixels, square
    trained: bool  # with a backward pass


def passes(config: RunConfig) -> list[Pass]:
    """All passes through the backbone, or its momentum copy, in one step, per training image.

    A montage of m x m tiles is one image of its own size. The extra look at the images before SMoG's first step is left
    out.
    """
    method = config.method
    if isinstance(method, SmogConfig):
        return _smog_passes(method, config.backbone)
    groups = views_of(method).groups
    return [Pass(g.views // g.tiles**2, g.size * g.tiles, trained=True) for g in groups]


def _smog_passes(method: SmogConfig, backbone: BackboneConfig) -> list[Pass]:
    """One pipeline trains the network, the other goes through its momentum copy."""
    groups = method.views.groups
    large, *small = groups[: len(groups) // 2]
    seen = [Pass(group.views, group.size, trained=True) for group in (large, *small)]
    if backbone.drop_path:  # groups and bank take a second look, with nothing dropped
        seen.append(Pass(large.views, large.size, trained=method.group_grad == "through_update"))
    seen.append(Pass(method.label_crops, large.size, trained=False))
    if backbone.name in LAYERS:  # small crops share batch norm with the large ones
        seen += [Pass(group.views, group.size, trained=False) for group in small]
    return seen


def forwards(seen: list[Pass]) -> float:
    """Passes in units of the first one's pixels."""
    return sum(p.images * p.size**2 for p in seen) / seen[0].size ** 2


@functools.cache
def forward_flops(backbone: BackboneConfig, size: int) -> int:
    """Floating-point operations of one image's way through the backbone; a multiply-add is two."""
    with torch.device("meta"):  # shapes alone: no weights are drawn, nothing is computed
        network = build_backbone(backbone).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def training_flops(config: RunConfig) -> int:
    """Floating-point operations of the backbone to train on one image once.

    The backward pass counts as two forwards, recomputation as one more. Heads, losses and augmentation are left out.
    """
    trained = 4 if config.backbone.recompute else 3
    return sum(
        p.images * forward_flops(config.backbone, p.size) * (trained if p.trained else 1) for p in passes(config)
    )


def images_of(config: RunConfig) -> int | None:
    """Number of training images of the data set that a recipe is made for; None if it is made for any."""
    return IMAGENET_IMAGES if "_imagenet_" in config.recipe else _IMAGES.get(config.data)


def tflops(config: RunConfig) -> int:
    """What the GPU is assumed to sustain, in 10^12 operations per second."""
    return _TFLOPS if config.image_size > 64 else _TFLOPS_SMALL_IMAGES


def gpu_hours(config: RunConfig, images: int) -> float:
    """Estimated hours of the whole run on one `GPU`, if the input never keeps it waiting."""
    return config.epochs * images * training_flops(config) / (tflops(config) * 1e12) / 3600
