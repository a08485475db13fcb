"""SimSiam: two views of one image predict each other, and the target side has no gradient.

    2 crops of B images -> backbone -> projector -> z -> predictor -> p
    loss = mean over both directions of -cosine(p of one crop, z of the other without its gradient)
    State: parameters only.

Source: Chen, He, "Exploring simple Siamese representation learning", CVPR 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tessella.data.batch import Batch
from tessella.data.views import CropGroup, ViewSpec
from tessella.methods import Method, MethodConfig, Setting
from tessella.methods.method import MethodOutput, Progress


@dataclass(frozen=True)
class SimSiamConfig(MethodConfig):
    """Settings of SimSiam; defaults are the paper's for ImageNet and ResNet-50."""

    name: Literal["simsiam"] = "simsiam"
    embedding_dim: int = 2048
    predictor_dim: int = 512  # of the predictor's bottleneck
    views: ViewSpec = ViewSpec((CropGroup(2, 224, (0.2, 1.0)),))


class SimSiam(Method):
    """SimSiam with two crops."""

    title = "SimSiam"
    Config = SimSiamConfig
    batch_rule = "learning rates in proportion to the batch, 0.05 x batch / 256 in the paper"

    def __init__(self, config: SimSiamConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        d, hidden = config.embedding_dim, config.predictor_dim
        self.projector = nn.Sequential(
            nn.Linear(backbone.feature_dim, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(d, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, d)
        )

    def collapse_loss(self) -> float:
        """Equal embeddings predict each other perfectly: a cosine of 1."""
        return -1.0

    def forward(self, batch: Batch, progress: Progress) -> MethodOutput:
        """Loss of this rank's images."""
        first, second = (self.projector(self.backbone(crop)) for crop in batch.views[0])
        loss = (self._distance(first, second) + self._distance(second, first)) / 2
        return MethodOutput(loss, metrics={}, embeddings=F.normalize(first.detach().float(), dim=1))

    def _distance(self, source: Tensor, target: Tensor) -> Tensor:
        return -F.cosine_similarity(self.predictor(source).float(), target.detach().float(), dim=1).mean()
