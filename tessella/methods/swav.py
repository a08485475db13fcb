"""SwAV: views of one image predict each other's cluster code.

    V crops of B images -> backbone (one pass per crop size) -> projector -> embeddings z, unit rows
    z of every crop     -> prototypes ------------> scores s ----------> softmax(s / temperature)
                                                      |                         | cross-entropy
    scores of the first group's crops (+ queue) -> sinkhorn, no gradient -> codes q of the other crops
    State: prototypes (K, D), one queue of past embeddings for each crop that gives codes.

Source: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised learning of visual features by contrasting
cluster assignments", NeurIPS 2020. Deviations from the official code are listed in docs/methods/swav.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tessella.data.batch import Batch
from tessella.data.views import IMAGENET_MEAN, CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.methods.method import Method, Progress, Setting, Step
from tessella.modules.backbone import Backbone
from tessella.modules.heads import Projector, Prototypes
from tessella.modules.memory import FeatureQueue
from tessella.ops.assignment import sinkhorn
from tessella.ops.losses import swapped_prediction

OFFICIAL_STD = (0.228, 0.224, 0.225)  # red is 0.228, not 0.229, in the official pre-training and evaluation


@dataclass(frozen=True)
class SwavConfig:
    """Settings of SwAV; defaults are the paper's for ImageNet and ResNet-50."""

    name: Literal["swav"] = "swav"
    prototypes: int = 3000
    embedding_dim: int = 128
    hidden_dim: int = 2048
    temperature: float = 0.1
    epsilon: float = 0.05  # of sinkhorn; smaller is sharper
    sinkhorn_iterations: int = 3
    queue_length: int = 0  # past embeddings that join sinkhorn, for batches below about 1000; cut to whole batches
    queue_from_epoch: int = 15  # filled from this epoch on, used once full
    freeze_prototypes_steps: int = 313  # about one epoch
    # The first group's crops give codes; all crops predict.
    views: ViewSpec = ViewSpec(
        (CropGroup(2, 224, (0.14, 1.0)), CropGroup(6, 96, (0.05, 0.14))), IMAGENET_MEAN, OFFICIAL_STD
    )

    def __post_init__(self) -> None:
        if self.views.views < 2:
            raise UserError("SwAV needs at least 2 views per image, because every view predicts another one's code")


class Swav(Method):
    """SwAV with multi-crop, queue and prototype freezing."""

    def __init__(self, config: SwavConfig, backbone: Backbone, setting: Setting) -> None:
        super().__init__(backbone, setting)
        self.config, self.clusters = config, config.prototypes
        self.projector = Projector(backbone.feature_dim, config.hidden_dim, config.embedding_dim, norm=True)
        self.prototypes = Prototypes(config.embedding_dim, config.prototypes)
        self.code_views = range(config.views.groups[0].views)
        length = config.queue_length // setting.batch_size * setting.batch_size
        if config.queue_length and not length:
            raise UserError(
                f"queue_length={config.queue_length} is shorter than one batch of {setting.batch_size}: use at least "
                f"{setting.batch_size}, or 0 for no queue"
            )
        self.queues = nn.ModuleList(FeatureQueue(length, config.embedding_dim) for _ in self.code_views if length)

    @classmethod
    def view_spec(cls, config: SwavConfig) -> ViewSpec:
        """The configured crops."""
        return config.views

    def collapse_loss(self) -> float:
        """The value ln K: constant embeddings make uniform codes, which are then predicted perfectly."""
        return math.log(self.config.prototypes)

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """Loss of this rank's images; codes balance the batch of all ranks."""
        self.prototypes.normalize_()
        embeddings = self._embed(batch.views)  # (V, B, D)
        with torch.autocast(embeddings.device.type, enabled=False):  # bf16 scores would blur the codes
            scores = self.prototypes(embeddings)  # (V, B, K)
        codes = self._codes(embeddings.detach(), scores.detach(), progress)
        loss = swapped_prediction(scores, codes, self.code_views, self.config.temperature)
        return Step(
            loss=loss,
            metrics={"code_confidence": codes.amax(dim=-1).mean()},
            embeddings=embeddings[0].detach(),
            assignments=scores[0].detach().argmax(dim=1),
        )

    def _embed(self, views: tuple[Tensor, ...]) -> Tensor:
        """Unit embeddings of all crops, crop by crop: (V, B, D).

        One backbone pass per crop size, one projector pass over everything: batch norm sees what it sees officially.
        """
        features = torch.cat([self.backbone(group.flatten(0, 1)) for group in views])
        return self.projector(features).unflatten(0, (-1, views[0].shape[1]))

    @torch.no_grad()
    def _codes(self, embeddings: Tensor, scores: Tensor, progress: Progress) -> Tensor:
        """Codes of the first group's crops, (A, B, K); past embeddings join in once their queue is full."""
        batch = scores.shape[1]
        codes = []
        for view in self.code_views:
            view_scores = scores[view]
            if self.queues and progress.epoch >= self.config.queue_from_epoch:
                queue = self.queues[view]
                assert isinstance(queue, FeatureQueue)
                if queue.is_full:
                    view_scores = torch.cat([self.prototypes(queue.local_rows()), view_scores])
                queue.push(embeddings[view])  # after reading: the batch is never counted twice
            codes.append(sinkhorn(view_scores, self.config.epsilon, self.config.sinkhorn_iterations)[-batch:])
        return torch.stack(codes)

    def before_update(self, progress: Progress) -> None:
        """Keep the prototypes where they started for the first steps."""
        if progress.step < self.config.freeze_prototypes_steps:
            self.prototypes.weight.grad = None  # None, not zero: momentum and weight decay would still move it

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Nearest prototype of each image. A code depends on its batch, so the score decides."""
        return self.prototypes(self.projector(features)).argmax(dim=1)
