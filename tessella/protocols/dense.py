"""What detection and segmentation share: their data, and the maps of a backbone's stages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD
from tessella.errors import UserError

Images = TypeVar("Images")

_TRIAL_SIDE = 224  # pixels of the image that shows a backbone's maps; 14, 16 and 32 divide it


@dataclass
class DenseData(Generic[Images]):
    """The data of such a protocol."""

    train: Images
    test: Images
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of each channel, values in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 2  # threads that decode
    predictions: Path | None = None  # folder for what is predicted of the test images


def stage_shapes(backbone: Any) -> tuple[list[int], list[int]]:
    """Channels and strides of the maps of a backbone's stages, fine to coarse, measured on a blank image.

    Raises:
        UserError: the backbone has no such maps.
    """
    if not hasattr(backbone, "stage_maps"):
        raise UserError("this needs feature maps of the backbone's stages: give a ResNet or a network of timm")
    training, device = backbone.training, next(backbone.parameters()).device
    try:
        with torch.no_grad():
            maps = backbone.eval().stage_maps(torch.zeros(1, 3, _TRIAL_SIDE, _TRIAL_SIDE, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"this backbone gives no maps of an image of {_TRIAL_SIDE} x {_TRIAL_SIDE} pixels: {error}"
        ) from None
    finally:
        backbone.train(training)
    return [x.shape[1] for x in maps], [math.ceil(_TRIAL_SIDE / x.shape[-1]) for x in maps]
