"""The cost of a recipe: passes through the backbone, arithmetic, and an estimate of the hours on a GPU."""

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

# Assumed sustained rate of one H100 in bf16 with these networks; not measured. 60 are some 2,400 views of 224 pixels
# per second through ResNet-50, forward and backward (24.6 GFLOP each); published figures of an A100 are as high. Small
# networks on small images are slowed down by many small kernels.
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
    """Floating-point operations of a forward pass of one image; a multiply-add counts as two."""
    with torch.device("meta"):  # computes shapes only
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
    """Number of training images of the recipe's data set; None if it is made for any."""
    return IMAGENET_IMAGES if "_imagenet_" in config.recipe else _IMAGES.get(config.data)


def tflops(config: RunConfig) -> int:
    """The assumed rate of the GPU, in 10^12 operations per second."""
    return _TFLOPS if config.image_size > 64 else _TFLOPS_SMALL_IMAGES


def gpu_hours(config: RunConfig, images: int) -> float:
    """Estimated hours of the whole run on one `GPU`, if it never waits for the input."""
    return config.epochs * images * training_flops(config) / (tflops(config) * 1e12) / 3600
