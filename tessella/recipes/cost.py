"""What a recipe costs: passes through the backbone, arithmetic, and an estimate of the hours on a GPU."""

from __future__ import annotations

import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from tessella.methods import method_of
from tessella.methods.method import Pass
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.run.config import RunConfig

IMAGENET_IMAGES = 1_281_167
_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "digits::train": 1437}

# What one H100 is assumed to sustain in bf16 with our networks; not measured. 60 is some 2,400 views of 224 pixels per
# second through ResNet-50, forward and backward (24.6 GFLOP each); an A100 has been published with as many. Small
# networks on small images wait for their many small kernels.
GPU = "NVIDIA H100"
_TFLOPS, _TFLOPS_SMALL_IMAGES = 60, 20


def passes(config: RunConfig) -> list[Pass]:
    """All passes through the backbone, or a copy of it, in one step, per training image."""
    return method_of(config.method).passes(config.method, config.backbone)


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
    trained = 4 if config.backbone.activation_checkpointing else 3
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
