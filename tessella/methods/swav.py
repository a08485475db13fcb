"""SwAV: views of one image predict each other's cluster code.

    V crops of B images -> backbone (one pass per crop size) -> projector -> embeddings z, unit rows
    z of every crop     -> prototypes ------------> scores s ----------> softmax(s / temperature)
                                                      |                         | cross-entropy
    scores of the first group's crops (+ queue) -> sinkhorn, no gradient -> codes q of the other crops
    State: prototypes (K, D), one queue of past embeddings for each crop that gives codes.

Several sets of prototypes: each has its own scores and codes, the loss is their mean.

Source: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised learning of visual features by contrasting
cluster assignments", NeurIPS 2020. Deviations from the official code are listed in docs/methods/swav.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.data.batch import Batch
from tessella.data.views import IMAGENET_MEAN, CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.methods.layout import Layout, OfficialFile
from tessella.methods.method import BatchChange, Method, MethodConfig, MethodOutput, Progress, Setting
from tessella.modules.backbone import Backbone
from tessella.modules.heads import Projector, Prototypes
from tessella.modules.memory import FeatureQueue
from tessella.modules.multicrop import crops_by_size
from tessella.ops.assignment import harden, sinkhorn
from tessella.ops.losses import swapped_prediction
from tessella.optim import OptimizerConfig, scaled
from tessella.ranges import Clusters, NonNegativeInt, Positive, Repeats, Width

OFFICIAL_STD = (0.228, 0.224, 0.225)  # red is 0.228, not 0.229, in the official pre-training and evaluation


@dataclass(frozen=True)
class SwavConfig(MethodConfig):
    """Settings of SwAV; defaults are the paper's for ImageNet and ResNet-50."""

    name: Literal["swav"] = "swav"
    # Several numbers: as many heads; the first one names an image's cluster.
    prototypes: Clusters | tuple[Clusters, ...] = 3000
    embedding_dim: Width = 128
    hidden_dim: Width = 2048
    head_norm: bool = True  # batch norm in the projector; SwAV's w5 has none
    temperature: Positive = 0.1
    epsilon: Positive = 0.05  # of sinkhorn; smaller is sharper
    sinkhorn_iterations: Repeats = 3
    codes: Literal["soft", "hard"] = "soft"  # hard: all of a crop's code goes to its largest entry
    # Past embeddings that join sinkhorn, for batches below about 1000; cut to whole batches.
    queue_length: NonNegativeInt = 0
    queue_from_epoch: NonNegativeInt = 15  # filled from this epoch on, used once full
    freeze_prototypes_steps: NonNegativeInt = 313  # about one epoch
    # The first group's crops give codes; all crops predict.
    views: ViewSpec = ViewSpec(
        (CropGroup(2, 224, (0.14, 1.0)), CropGroup(6, 96, (0.05, 0.14))), IMAGENET_MEAN, OFFICIAL_STD
    )

    def __post_init__(self) -> None:
        if self.views.views < 2:
            raise UserError("SwAV needs at least 2 views per image, because every view predicts another one's code")
        if not self.heads:
            raise UserError("prototypes is empty: give one or more numbers of prototypes")

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of prototypes in each head."""
        return (self.prototypes,) if isinstance(self.prototypes, int) else self.prototypes


# Batch size -> the official rates for ResNet-50, which are not in proportion, and the steps of frozen prototypes.
OFFICIAL_RATES = {
    4096: OptimizerConfig("larc", lr=4.8, weight_decay=1e-6, warmup_epochs=10, warmup_lr=0.3, final_lr=0.0048),
    256: OptimizerConfig("larc", lr=0.6, weight_decay=1e-6, final_lr=0.0006),
}
OFFICIAL_FREEZE = {4096: 313, 256: 5005}
_QUEUE_BELOW = 1000  # images per forward: fewer make poor codes by themselves


def _from_official(file: OfficialFile) -> tuple[str, SwavConfig]:
    heads = file.count("prototypes.prototypes*.weight")
    keys = [f"prototypes.prototypes{i}.weight" for i in range(heads)] or ["prototypes.weight"]
    counts = tuple(file.size(key) for key in keys)
    config = SwavConfig(
        prototypes=counts if heads else counts[0],
        embedding_dim=file.size(keys[0], 1),
        hidden_dim=file.size("projection_head.0.weight"),
        head_norm="projection_head.1.weight" in file.tensors,
    )
    if heads:
        return "DeepCluster-v2 (SeLa-v2 and SwAV with several heads look the same)", config
    return "SwAV" if config.head_norm else "SwAV without norm in its head (w5)", config


_NAMES = {
    "backbone.*": "*",
    "projector.*": "projection_head.*",
    "prototypes.weight": "prototypes.weight",
    "prototypes.*": "prototypes.*",
}


class Swav(Method):
    """SwAV with multi-crop, queue, prototype freezing, and one or several heads of prototypes."""

    title = "SwAV"
    Config = SwavConfig
    config: SwavConfig
    batch_rule = (
        "learning rates in proportion to the batch, as SwAV's authors advise; 4096 and 256 on ImageNet as they "
        "published them (4.8 and 0.6, which are not in proportion). A queue below 1000 images per forward. Prototypes "
        "stay frozen for as many images as here, on ImageNet about one epoch"
    )
    layouts = (
        Layout("deepclusterv2", "prototypes.prototypes*", _NAMES, _from_official, unit_rows=("prototypes.*",)),
        Layout(
            "swav",
            "projection_head.*",
            _NAMES,
            _from_official,
            unless="prototypes.prototypes*",
            unit_rows=("prototypes.weight",),
            refused={"queue": "holds one rank's queue of SwAV and no network: import the checkpoint.pth.tar beside it"},
        ),
    )
    not_transferred = ("queues.*",)
    prototypes: Prototypes | nn.ModuleDict  # one head, or several; named as in the official checkpoints

    def __init__(self, config: SwavConfig, backbone: Backbone, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.clusters = config.heads[0]
        dim = config.embedding_dim
        self.projector = Projector(backbone.feature_dim, config.hidden_dim, dim, norm=config.head_norm)
        heads = {f"prototypes{i}": Prototypes(dim, count) for i, count in enumerate(config.heads)}
        self.prototypes = heads["prototypes0"] if len(heads) == 1 else nn.ModuleDict(heads)
        self.code_views = range(config.views.groups[0].views)
        length = config.queue_length // setting.batch_size * setting.batch_size
        if config.queue_length and not length:
            raise UserError(
                f"queue_length={config.queue_length} is shorter than one batch of {setting.batch_size}: use at least "
                f"{setting.batch_size}, or 0 for no queue"
            )
        self.queues = nn.ModuleList(FeatureQueue(length, dim) for _ in self.code_views if length)

    @classmethod
    def at_batch_size(
        cls, config: SwavConfig, rates: OptimizerConfig, change: BatchChange
    ) -> tuple[SwavConfig, OptimizerConfig]:
        """Official rates where they are known; a queue for small batches; prototypes frozen for as many images."""
        length, start = config.queue_length, config.queue_from_epoch
        if change.together < _QUEUE_BELOW <= change.old:
            length, start = 3840, 15
        elif change.old < _QUEUE_BELOW <= change.together:
            length = 0
        freeze = round(config.freeze_prototypes_steps * change.old / change.new)
        if change.new in OFFICIAL_RATES and rates in OFFICIAL_RATES.values():
            rates, freeze = OFFICIAL_RATES[change.new], OFFICIAL_FREEZE[change.new]
        else:
            rates = scaled(rates, change.new / change.old)
        changed = dataclasses.replace(
            config, queue_length=length, queue_from_epoch=start, freeze_prototypes_steps=freeze
        )
        return changed, rates

    @property
    def heads(self) -> list[Prototypes]:
        """The heads of prototypes, the first one first."""
        return [head for head in self.prototypes.modules() if isinstance(head, Prototypes)]

    def collapse_loss(self) -> float | None:
        """Mean of ln K: equal embeddings have uniform codes. None for hard codes, where the loss can have any value."""
        return None if self.config.codes == "hard" else fmean(map(math.log, self.config.heads))

    def forward(self, batch: Batch, progress: Progress) -> MethodOutput:
        """Loss of this rank's images; codes balance the batch of all ranks."""
        for head in self.heads:
            head.normalize_()
        embeddings = self._embed(batch.views)  # (V, B, D)
        with torch.autocast(embeddings.device.type, enabled=False):  # bf16 scores would blur the codes
            past = self._past(progress)
            scores = [head(embeddings) for head in self.heads]  # (V, B, K) each
            codes = [self._codes(s.detach(), head, past) for s, head in zip(scores, self.heads, strict=True)]
            per_head = zip(scores, codes, strict=True)
            losses = [swapped_prediction(s, q, self.code_views, self.config.temperature) for s, q in per_head]
        self._remember(embeddings, progress)  # after reading: the batch must not be counted twice
        return MethodOutput(
            loss=torch.stack(losses).mean(),
            metrics={"code_confidence": codes[0].amax(dim=-1).mean()},
            embeddings=embeddings[0].detach(),
            assignments=scores[0][0].detach().argmax(dim=1),
        )

    def _embed(self, views: tuple[Tensor, ...]) -> Tensor:
        """Unit embeddings of all crops, crop by crop: (V, B, D).

        One backbone pass per crop size, one projector pass over everything: batch norm has the official input.
        """
        features = torch.cat([self.backbone(crops) for crops in crops_by_size(views)])
        return self.projector(features).unflatten(0, (-1, views[0].shape[1]))

    @torch.no_grad()
    def _codes(self, scores: Tensor, head: Prototypes, past: list[Tensor]) -> Tensor:
        """Codes of the first group's crops in one head: (A, B, K).

        Args:
            scores: (V, B, K) of all crops against the prototypes of `head`.
            head: the prototypes.
            past: (n, D) past embeddings for each of the A crops, which share the prototypes with the batch; or none.
        """
        with_code = scores[: len(self.code_views)]
        past_scores = head(torch.stack(past)) if past else None
        soft = sinkhorn(with_code, self.config.epsilon, self.config.sinkhorn_iterations, past_scores)
        return harden(soft) if self.config.codes == "hard" else soft

    def _past(self, progress: Progress) -> list[Tensor]:
        """This rank's share of each queue, once the queues are full."""
        queues = self._queues_in_use(progress)
        return [queue.local_rows() for queue in queues] if all(queue.is_full for queue in queues) else []

    def _remember(self, embeddings: Tensor, progress: Progress) -> None:
        """Queue the embeddings (V, B, D) of the crops that give codes."""
        for queue, rows in zip(self._queues_in_use(progress), embeddings, strict=False):
            queue.push(rows)

    def _queues_in_use(self, progress: Progress) -> list[FeatureQueue]:
        """One for each crop that gives codes, from their epoch on."""
        filling = progress.epoch >= self.config.queue_from_epoch
        return [queue for queue in self.queues if isinstance(queue, FeatureQueue) and filling]

    def before_update(self, progress: Progress) -> None:
        """Freeze the prototypes in the first steps."""
        if progress.step < self.config.freeze_prototypes_steps:
            for head in self.heads:
                head.weight.grad = None  # None, not zero: momentum and weight decay would still move it

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Nearest prototype of each image in the first head: the highest score, because a code depends on its batch."""
        prototypes = F.normalize(self.heads[0].weight, dim=1)  # updates change their length
        return (self.projector(features) @ prototypes.T).argmax(dim=1)
