"""Classify by the nearest class mean: no hyper-parameter, no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tessella.protocols import EvalData, Protocol


@dataclass(frozen=True)
class NearestMeanConfig:
    """Settings of the nearest-mean classifier."""

    normalize: bool = True  # features to unit length first
    version: int = 1


def nearest_mean(backbone: nn.Module, data: EvalData, config: NearestMeanConfig) -> dict[str, Any]:
    """Accuracy on the test images when each takes the class whose mean train feature is nearest."""
    train, test = data.features(backbone, "train"), data.features(backbone, "test")
    x, y = (F.normalize(f.x, dim=1) if config.normalize else f.x for f in (train, test))
    means = torch.stack([x[train.labels == number].mean(dim=0) for number in range(len(data.classes))])
    found = torch.cdist(y, means).argmin(dim=1)
    return {"top1": (found == test.labels).float().mean().item()}


NEAREST_MEAN = Protocol(
    "nearest class mean",
    NearestMeanConfig,
    nearest_mean,
    {"nearest-mean": NearestMeanConfig()},
    {"top1": "top-1"},
    quick={"classes": ("nearest-mean",)},
)
