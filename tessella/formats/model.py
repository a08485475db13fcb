"""What is exported: a network, the images that it expects and, of a classifier, its linear layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.atlas.classifier import is_classifier, read_classifier
from tessella.data.transform import EvalTransform
from tessella.modules.backbone import Backbone, BackboneConfig, TimmBackbone
from tessella.run.config import to_dict
from tessella.weights.resolve import Loaded, resolve_backbone

FEATURES, PROBABILITIES, DECISION = "features", "probabilities", "decision"  # outputs; a decision of -1 abstains


class Head(NamedTuple):
    """A linear classifier: softmax((weight @ x + bias) / temperature) of features x, or of x / |x|."""

    weight: Tensor  # (k, feature_dim) float32
    bias: Tensor  # (k,) float32
    classes: tuple[str, ...]  # k names
    temperature: float = 1.0  # of the calibration
    abstain_below: float = 0.0  # the class is not decided where the largest probability is lower
    unit: bool = False  # whether features are scaled to unit length first, as `tessella classify` does

    @property
    def calibrated(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the logits whose softmax is the probabilities."""
        return self.weight / self.temperature, self.bias / self.temperature


class Model(NamedTuple):
    """A network in eval mode on the CPU, and what belongs to it."""

    backbone: Backbone  # (b, 3, size, size) -> (b, feature_dim)
    config: BackboneConfig
    transform: EvalTransform
    head: Head | None = None

    @classmethod
    def of(cls, loaded: Loaded, head: Head | None = None) -> Model:
        """A resolved backbone, without what only a training asks of it."""
        backbone = loaded.backbone.eval()
        if loaded.config.activation_checkpointing and isinstance(backbone, TimmBackbone):
            backbone.net.set_grad_checkpointing(False)
        config = replace(loaded.config, activation_checkpointing=False, drop_path=0.0)
        return cls(backbone, config, loaded.transform, head)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `Whole` gives."""
        return (FEATURES,) if self.head is None else (FEATURES, PROBABILITIES, DECISION)

    def facts(self) -> dict[str, Any]:
        """What a program must know beside the tensors, as JSON values."""
        facts: dict[str, Any] = {"architecture": to_dict(self.config), "transform": to_dict(self.transform)}
        if self.head is not None:
            named = ("classes", "temperature", "abstain_below", "unit")
            facts |= {name: to_dict(getattr(self.head, name)) for name in named}
        return facts

    def expected(self, images: Tensor) -> dict[str, Tensor]:
        """Our own outputs for normalised images, by name."""
        with torch.no_grad():
            return dict(zip(self.outputs, Whole(self)(images), strict=True))


def model_of(source: str) -> Model:
    """The model that a name stands for: a classifier of `tessella classify`, or whatever names a backbone.

    Raises:
        UserError: it names neither.
    """
    if not is_classifier(Path(source)):
        return Model.of(resolve_backbone(source))
    found = read_classifier(Path(source))
    weight, bias = (torch.from_numpy(values).float() for values in (found.weight, found.bias))
    head = Head(weight, bias, tuple(found.classes), found.temperature, found.confidence, unit=True)
    return Model.of(found.loaded, head)


class Whole(nn.Module):
    """The network with its head: what graph formats hold."""

    weight: Tensor
    bias: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head is not None
        if model.head is not None:
            weight, bias = model.head.calibrated
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)
            self.abstain_below, self.unit = model.head.abstain_below, model.head.unit

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(b, 3, size, size) -> `Model.outputs`."""
        features = self.backbone(images)
        if not self.head:
            return (features,)
        x = F.normalize(features, dim=1) if self.unit else features
        probabilities = (x @ self.weight.T + self.bias).softmax(dim=1)
        largest, decision = probabilities.max(dim=1)
        return features, probabilities, torch.where(largest < self.abstain_below, -1, decision)
