"""CoKe: predict each image's cluster of the last epoch, while this epoch's clusters are found batch by batch.

    V crops of B images -> backbone -> projector ---------> p, unit rows --> scores against last epoch's centres -+
       (a pass per crop)               +---> predictor ---> q, unit rows --> scores against last epoch's centres -+
    label memory, by image ------------------------------> labels of the last epoch -------- cross-entropy -------+
    softmax of p's scores of the other large crop, no gradient -------------------------- (two views and more) ---+

    mean of p over the large crops, no gradient -> nearest of this epoch's centres + duals -> labels of this epoch
                                                   -> duals, centres, label memory
    State: for each clustering two sets of centres (K, D), duals and counts (K,); one row of labels per image.

One view: labels alone, averaged over epochs late in the run. Two: plus each view's prediction by the other. More:
plus small crops, which predict and take no part in the clustering.

Source: Qian, Xu, Hu, Li, Jin, "Unsupervised visual representation learning by online constrained k-means", CVPR 2022.
Deviations from the official code are listed in docs/methods/coke.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.views import CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.methods.layout import OTHER_IMAGES, Layout, OfficialFile
from tessella.methods.method import BatchChange, Method, MethodConfig, MethodOutput, Progress, Setting
from tessella.modules.backbone import Backbone
from tessella.modules.centres import OnlineCentres
from tessella.modules.heads import mlp
from tessella.modules.memory import InstanceTable, keep_from_broadcast
from tessella.ops.assignment import average_labels, averaged_targets
from tessella.ops.losses import crop_prediction, label_cross_entropy
from tessella.optim import OptimizerConfig
from tessella.ranges import Clusters, Fraction, NonNegativeInt, Positive, PositiveInt, Range, Width

SINGLE_VIEW = ViewSpec((CropGroup(1, 224, (0.08, 1.0)),))


@dataclass(frozen=True)
class CokeConfig(MethodConfig):
    """Settings of CoKe; defaults are the official ones for one view, ImageNet and ResNet-50."""

    name: Literal["coke"] = "coke"
    centres: tuple[Clusters, ...] = (3000, 4000, 5000)  # clusters of each clustering; all of them are learned from
    embedding_dim: Width = 128
    temperature: Positive = 0.1  # one view; two and more 0.05
    ratio: Fraction = 0.4  # least size of a cluster, in shares of images / clusters; 1: equal sizes, 0: plain k-means
    dual_lr: Positive | Literal["auto"] = 20.0  # auto: 0.02 min(batch, clusters), for small batches or few clusters
    # One view
    prediction_weight: Fraction = 1.0  # of the predictor's loss; the rest goes to the projector's
    average_from_epoch: PositiveInt = 801  # labels and centres are averages over the epochs from this one on
    label_slots: Annotated[int, Range(2, 1000)] = 5  # clusters that an image's averaged label may name
    label_temperature: Positive = 0.5  # of averaged labels; smaller is sharper
    # Two views and more
    label_weight: Fraction = 0.2  # of the label in the target; the rest goes to the other view's prediction
    large_weight: Fraction = 0.5  # of the two large crops' loss; the rest goes to the small crops'
    assign_clustering: NonNegativeInt = 0  # the clustering that names an image's cluster after the run
    # One view; or two that are clustered together; or two and small crops.
    views: ViewSpec = SINGLE_VIEW

    def __post_init__(self) -> None:
        if not self.centres:
            raise UserError("centres is empty: give one or more numbers of clusters")
        if not 0 <= self.assign_clustering < len(self.centres):
            raise UserError(
                f"assign_clustering={self.assign_clustering} is none of the {len(self.centres)} clusterings, "
                f"which are counted from 0: use at most {len(self.centres) - 1}"
            )


def _from_official(file: OfficialFile) -> tuple[str, CokeConfig]:
    counts = tuple(file.size(f"pre_center_{i}", 1) for i in range(file.count("pre_center_*")))
    dim = file.size("encoder.fc.6.weight")
    if "label_val" in file.tensors:
        return "CoKe with one view", CokeConfig(centres=counts, embedding_dim=dim)
    pair = ViewSpec((CropGroup(2, 224, (0.08, 1.0)),))
    config = CokeConfig(centres=counts, embedding_dim=dim, temperature=0.05, views=pair)
    return "CoKe with two views or multi-crop (their files look the same)", config


class Coke(Method):
    """CoKe with one view, two views, or multi-crop."""

    title = "CoKe"
    Config = CokeConfig
    config: CokeConfig
    batch_rule = (
        "learning rates in proportion to the batch, which for LARS is 1.6 x batch / 1024: ours, because 1024 is all "
        "that is published. The duals' rate is 0.02 min(batch, clusters), which is the published 20 at 1024"
    )
    layouts = (
        Layout(
            "coke",
            "encoder.fc.*",
            {
                "backbone.*": "encoder.*",
                "projector.*": "encoder.fc.*",
                "predictor.*": "predictor.*",
                "clusterings.*.previous": "pre_center_*",
                "clusterings.*.current": "cur_center_*",
            },
            _from_official,
            left_out={
                "assign_labels": OTHER_IMAGES,
                "label_val": OTHER_IMAGES,
                "label_idx": OTHER_IMAGES,
                "dual_*": "belongs to those labels; a run finds its own in its first epoch",
                "counter_*": "counts of an epoch that is over",
            },
            reset={
                "clusterings.*.duals": "0, as before a first epoch",
                "clusterings.*.seen": "0, as before a first epoch",
                "label*.rows": "no image has a label yet",
            },
            transposed=("clusterings.*.previous", "clusterings.*.current"),
        ),
    )

    not_transferred = ("labels.*", "label_weights.*", "clusterings.*.duals", "clusterings.*.seen")
    clusterings: list[OnlineCentres]  # a ModuleList, which cannot say what it holds

    def __init__(self, config: CokeConfig, backbone: Backbone, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.clusters = config.centres[config.assign_clustering]
        d = backbone.feature_dim
        self.projector = mlp(d, d, d, config.embedding_dim, norm_last=True)
        self.predictor = mlp(config.embedding_dim, d, config.embedding_dim, norm_last=False)
        clusterings = nn.ModuleList(OnlineCentres(count, config.embedding_dim) for count in config.centres)
        self.clusterings = clusterings  # type: ignore[assignment]
        self.dual_lrs = [
            0.02 * min(setting.batch_size, k) if config.dual_lr == "auto" else config.dual_lr for k in config.centres
        ]
        # Labels of each image, slot 0 first; -1: it has none yet. One view: the weights of an average over epochs.
        self.single_view = config.views.views == 1
        shape = (len(config.centres), config.label_slots if self.single_view else 1)
        self.labels = InstanceTable(setting.images, shape, torch.int32, fill=-1)
        self.label_weights = InstanceTable(setting.images, shape, torch.float32, 0) if self.single_view else None
        keep_from_broadcast(self)

    @classmethod
    def at_batch_size(
        cls, config: CokeConfig, rates: OptimizerConfig, change: BatchChange
    ) -> tuple[CokeConfig, OptimizerConfig]:
        """The rate of the duals depends on the number of images in one forward."""
        if change.together != change.old:
            config = dataclasses.replace(config, dual_lr="auto")
        return super().at_batch_size(config, rates, change)

    def collapse_loss(self) -> float:
        """Mean of ln K: equal embeddings have equal centres."""
        return sum(map(math.log, self.config.centres)) / len(self.config.centres)

    def forward(self, batch: Batch, progress: Progress) -> MethodOutput:
        """Loss of this rank's images; in training the batch of all ranks then updates the clusterings."""
        embeddings = self._embed(batch.views)  # (2, V, B, D): from the projector and from the predictor
        with torch.autocast(embeddings.device.type, enabled=False):  # 16 bits: equal scores, duals rounded away
            # Official: the mean of two unit vectors stays shorter than they are.
            features = embeddings[0, :2].detach().mean(dim=0)  # (B, D)
            fresh = self._assign_all(features, progress.epoch)  # (B, H)
            labels, weights = self._targets(batch.instances, fresh, progress.epoch)  # before this step writes
            if self.training:
                self._update_clusterings(features, fresh, progress.epoch)
                self._remember(batch.instances, fresh, progress.epoch)
            losses = [
                self._loss(embeddings, clustering.previous, labels[:, h], weights[:, h])
                for h, clustering in enumerate(self.clusterings)
            ]
        return MethodOutput(
            loss=torch.stack(losses).mean(),
            metrics=self._figures(fresh, labels, weights),
            embeddings=embeddings[0, 0].detach(),
            assignments=fresh[:, self.config.assign_clustering],
        )

    def _embed(self, views: tuple[Tensor, ...]) -> Tensor:
        """Unit embeddings of all crops, before and after the predictor: (2, V, B, D).

        One pass per crop, so that each crop has batch statistics of its own, as officially.
        """
        projected = [self.projector(self.backbone(crop)) for group in views for crop in group]
        predicted = [self.predictor(z) for z in projected]
        return F.normalize(torch.stack([torch.stack(projected), torch.stack(predicted)]).float(), dim=-1)

    def _loss(self, embeddings: Tensor, centres: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """One clustering's loss. Centres (K, D), labels and weights (B, S); no duals: they belong to the assignment."""
        config = self.config
        if not self.single_view:
            shares = config.label_weight, config.large_weight
            return crop_prediction(embeddings @ centres.T, labels, weights, config.temperature, *shares)
        log_p = F.log_softmax((embeddings[:, 0] / config.temperature) @ centres.T, dim=-1)  # divided where it is small
        projected, predicted = label_cross_entropy(log_p, labels, weights)
        return (1 - config.prediction_weight) * projected + config.prediction_weight * predicted

    @torch.no_grad()
    def _figures(self, fresh: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Share of labels that differ from the last epoch's; the smallest cluster so far against an even share."""
        expected = labels.gather(2, weights.argmax(dim=2, keepdim=True))[..., 0]
        smallest = [c.seen.min() / c.seen.mean().clamp_min(1e-9) for c in self.clusterings]
        return {
            "label_changes": (fresh != expected).float().mean(),
            "smallest_cluster": torch.stack(smallest).min(),
            "largest_dual": torch.stack([c.duals.max() for c in self.clusterings]).max(),
        }

    # The clusterings

    @torch.no_grad()
    def _assign_all(self, features: Tensor, epoch: int) -> Tensor:
        """This epoch's labels of this rank's images in every clustering: (B, H)."""
        averaged = self._epochs_averaged(epoch) > 0
        return torch.stack([clustering.assign(features, averaged) for clustering in self.clusterings], dim=1)

    def _update_clusterings(self, features: Tensor, fresh: Tensor, epoch: int) -> None:
        """Update duals and centres by the features and labels of all ranks."""
        features, fresh = dist.gather(features), dist.gather(fresh)
        to_unit = not self._epochs_averaged(epoch)
        for clustering, labels, dual_lr in zip(self.clusterings, fresh.unbind(dim=1), self.dual_lrs, strict=True):
            clustering.update(features, labels, self.config.ratio, dual_lr, to_unit)

    def _epochs_averaged(self, epoch: int) -> int:
        """Epochs in the average of labels and centres, with this one; 0 before it begins."""
        return max(0, epoch + 1 - self.config.average_from_epoch) if self.single_view else 0

    def epoch_start(self, progress: Progress) -> None:
        """Count the images of each cluster from 0."""
        for clustering in self.clusterings:
            clustering.seen.zero_()

    def epoch_end(self, progress: Progress) -> None:
        """From the next step on the loss uses the centres of this epoch."""
        averaged = self._epochs_averaged((progress.step - 1) // progress.steps_per_epoch)  # progress is one step ahead
        for clustering in self.clusterings:
            clustering.close_epoch(1 / averaged if averaged else None)

    # The label memory

    @torch.no_grad()
    def _targets(self, instances: Tensor, fresh: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """What the loss predicts: clusters (B, H, S) and their weights; in the first epoch the new labels."""
        labels = self.labels.read(instances).long()
        unknown = (labels[..., 0] < 0) | (epoch == 0)  # an image may have been left out of the first epoch
        labels[..., 0] = torch.where(unknown, fresh, labels[..., 0])
        averages = torch.zeros_like(labels, dtype=torch.float32)
        if self.label_weights is not None:
            averages = self.label_weights.read(instances)  # all 0 until averaging begins: then slot 0 is the target
        return labels.clamp_min(0), averaged_targets(averages, self.config.label_temperature)

    def _remember(self, instances: Tensor, fresh: Tensor, epoch: int) -> None:
        """Store this epoch's labels, or their average over epochs."""
        epochs, labels = self._epochs_averaged(epoch), self.labels.read(instances).long()
        if self.label_weights is not None and epochs:
            labels, weights = average_labels(labels, self.label_weights.read(instances), fresh, 1 / epochs)
            self.label_weights.write(instances, weights)
        else:
            labels[..., 0] = fresh
        self.labels.write(instances, labels)

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Nearest centre of each image, without duals, which are about batches."""
        embeddings = F.normalize(self.projector(features).float(), dim=1)
        return (embeddings @ self.clusterings[self.config.assign_clustering].previous.T).argmax(dim=1)
