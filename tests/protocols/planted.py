"""Images whose class is plain to see, and a network small enough to watch."""

import numpy as np
import torch
from torch import nn

from tessella.data.sources import ArrayImages
from tessella.data.transform import EvalTransform
from tessella.protocols.features import EvalData


def planted_images(n, classes=3, *, name="planted", seed=0, noise=20.0, size=8):
    """Each class has its own 2 x 2 pattern of colours, under noise."""
    patterns = np.random.default_rng(123).uniform(40, 215, (classes, 2, 2, 3))
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    pixels = patterns[labels].repeat(size // 2, axis=1).repeat(size // 2, axis=2)
    pixels = pixels + random.normal(0, noise, pixels.shape)
    return ArrayImages(name, pixels.clip(0, 255).astype(np.uint8), labels)


def meaningless_images(n, classes=4, *, name="noise", seed=0, size=8):
    """Labels that have nothing to do with the pixels."""
    random = np.random.default_rng(seed)
    return ArrayImages(name, random.integers(0, 256, (n, size, size, 3), dtype=np.uint8), np.arange(n) % classes)


class Tiny(nn.Module):
    """A convolution and a batch norm; it counts the images that it has seen."""

    feature_dim = 32

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return nn.functional.adaptive_avg_pool2d(self.bn(self.conv(x)), 2).flatten(1)


def eval_data(train=None, test=None, **options):
    return EvalData(
        planted_images(90, seed=1) if train is None else train,
        planted_images(60, seed=2, name="planted test") if test is None else test,
        EvalTransform.of(8),
        workers=1,
        **options,
    )
