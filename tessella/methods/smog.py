"""SMoG: predict the group of the momentum encoder's view, while the groups move with the batch.

    pipeline A -> large + small crops -> backbone -> projector -> z -> predictor -> p, unit rows of V views
    pipeline B -> large + small crops -> momentum encoder -> zk of the large crops -> nearest old group = label
    z of the large crops, all ranks   -> nearest old group -> that group moves by momentum towards their mean
    p                                 -> scores against the NEW groups -> cross-entropy with the labels
    The pipelines swap roles every step. Every epoch the groups become the spherical k-means of the bank, and the
    momentum encoder's weights the online ones.
    State: H sets of K groups, momentum encoder, bank with z of every training image.

Source: Pang, Zhang, Li, Cai, Lu, "Unsupervised visual representation learning by synchronous momentum grouping",
ECCV 2022. Deviations from the paper and the official code are listed in docs/methods/smog.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.views import IMAGENET_MEAN, ColorAugmentation, CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.methods.layout import Layout, OfficialFile
from tessella.methods.method import BatchChange, Method, MethodConfig, MethodOutput, Pass, Progress, Setting
from tessella.modules.backbone import Backbone, BackboneConfig
from tessella.modules.drop_path import drop_paths, without_drop_path
from tessella.modules.heads import Projector
from tessella.modules.memory import FeatureBank, keep_from_broadcast
from tessella.modules.momentum import MomentumEncoder
from tessella.modules.multicrop import crops_by_size, joint_features
from tessella.modules.resnet import LAYERS, ResNet
from tessella.ops.grouping import group_loss, group_sums, moved_groups, nearest_group, spherical_kmeans
from tessella.ops.philox import permutation, stream_key
from tessella.optim import OptimizerConfig
from tessella.ranges import Clusters, Fraction, Positive, PositiveInt, Range, Repeats, Width

OFFICIAL_STD = (0.228, 0.224, 0.225)  # red is 0.228, not 0.229, in the official pre-training and evaluation
_PIPELINE_A = ColorAugmentation(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
_PIPELINE_B = dataclasses.replace(_PIPELINE_A, blur=0.1, solarize=0.2)


def two_pipelines(
    crops: Sequence[CropGroup],
    a: ColorAugmentation = _PIPELINE_A,
    b: ColorAugmentation = _PIPELINE_B,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = OFFICIAL_STD,
) -> ViewSpec:
    """Views for SMoG: the crop groups with pipeline A's colours, then the same with pipeline B's."""
    groups = (dataclasses.replace(group, colors=colours) for colours in (a, b) for group in crops)
    return ViewSpec(tuple(groups), mean, std)


@dataclass(frozen=True)
class SmogConfig(MethodConfig):
    """Settings of SMoG; defaults are the official ones for ImageNet and ResNet-50."""

    name: Literal["smog"] = "smog"
    groups: Clusters = 3000  # K, in each set
    group_sets: Annotated[int, Range(1, 1000)] = 3  # H independent sets; set h moves with large crop h mod their number
    embedding_dim: Width = 128
    hidden_dim: Width = 2048
    activation: Literal["relu", "gelu"] = "relu"  # of the projector; gelu for transformers
    temperature: Positive = 0.1
    momentum: Fraction = 0.999  # of the momentum encoder, constant
    group_momentum: tuple[Fraction, Fraction] = (1.0, 0.99)  # of the groups: linear from the run's start to its end
    group_grad: Literal["none", "through_update"] = "none"  # none: the released code; through_update: the paper's text
    regroup_every: PositiveInt | None = None  # steps (the paper: 300) between rebuilding the groups; None: every epoch
    kmeans_iterations: Repeats = 10
    label_crops: PositiveInt = 2  # large crops of the momentum encoder's pipeline that give a label each
    max_gradient_norm: Positive | None = None  # Swin: 3
    # Crop groups of pipeline A, then the same of pipeline B; the first of each are the large crops.
    views: ViewSpec = two_pipelines((CropGroup(2, 224, (0.2, 1.0)), CropGroup(4, 96, (0.05, 0.2))))

    def __post_init__(self) -> None:
        shapes = [(group.views, group.size) for group in self.views.groups]
        half = len(shapes) // 2
        if not half or shapes[:half] != shapes[half:]:
            raise UserError(
                "SMoG's pipelines swap roles, so views.groups must list pipeline A's crops and then as many of the "
                f"same sizes for pipeline B; got (views, size) = {shapes}"
            )
        if not 1 <= self.label_crops <= shapes[0][0]:
            raise UserError(
                f"label_crops={self.label_crops} must lie in [1, {shapes[0][0]}], the large crops of a pipeline"
            )


def _from_official(file: OfficialFile) -> tuple[str, SmogConfig]:
    config = SmogConfig(
        embedding_dim=file.size("q_encoder.projection_head.3.weight"),
        hidden_dim=file.size("q_encoder.projection_head.0.weight"),
    )
    return "SMoG", config


_OFFICIAL_BATCH = 4096
_REGROUP_STEPS = 300  # the paper; an epoch of the released runs, which are at batch 4096


class Smog(Method):
    """SMoG with multi-crop, several group sets and periodic regrouping."""

    title = "SMoG"
    pipelines = 2
    Config = SmogConfig
    config: SmogConfig
    batch_rule = (
        "learning rates in proportion to the batch: ours, because runs at 4096 are all that is published. On ImageNet "
        "groups are rebuilt every 300 steps, as the paper says, which at 4096 is an epoch"
    )
    layouts = (
        Layout(
            "smog",
            "q_encoder.*",
            {
                "backbone.*": "q_encoder.*",
                "projector.*": "q_encoder.projection_head.*",
                "predictor.*": "q_encoder.predictor_head.*",
                "momentum_encoder.backbone.*": "k_encoder.*",
                "momentum_encoder.projector.*": "k_encoder.projection_head.*",
            },
            _from_official,
            reset={
                "groups": "in no file of the release; a run computes them before its first step",
                "bank.*": "in a file of its own for each rank; a run fills it before its first step",
            },
            assigns=False,
            refused={
                "q_encoder.*patch_embed*": "is SMoG's Swin. Its blocks put a batch norm on the residual path, which no "
                "network here does, and no such weights were published: a standard Swin would compute something else "
                "with these tensors",
                "local_memory_*": "holds one rank's memory of SMoG and no network: import the checkpoint.pth.tar "
                "beside it",
            },
        ),
    )

    not_transferred = ("groups", "bank.*", "momentum_encoder.*")  # all made from the backbone before the first step
    groups: Tensor

    def __init__(self, config: SmogConfig, backbone: Backbone, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.clusters = config.groups
        hidden, dim = config.hidden_dim, config.embedding_dim
        self.projector = nn.Sequential(
            nn.Linear(backbone.feature_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU() if config.activation == "gelu" else nn.ReLU(inplace=True),
            nn.Linear(hidden, dim),
            nn.BatchNorm1d(dim, affine=False),
        )
        self.predictor = Projector(dim, hidden, dim, norm=True)
        self.momentum_encoder = MomentumEncoder(self._online)
        self.register_buffer("groups", F.normalize(torch.randn(config.group_sets, config.groups, dim), dim=-1))
        self.large_crops = config.views.groups[0].views
        self.bank = FeatureBank(self.large_crops, setting.images, dim)
        keep_from_broadcast(self)
        self._micro_batch = 0  # number of the current one in its update
        self._sums: tuple[Tensor, Tensor] | None = None  # of the update's earlier micro-batches: sums, counts

    @classmethod
    def passes(cls, config: SmogConfig, backbone: BackboneConfig) -> list[Pass]:
        """One pipeline trains the network, the other goes through its momentum copy."""
        groups = config.views.groups
        large, *small = groups[: len(groups) // 2]
        seen = [Pass(group.views, group.size, trained=True) for group in (large, *small)]
        if backbone.drop_path:  # embeddings for groups and bank need a pass in which nothing is dropped
            seen.append(Pass(large.views, large.size, trained=config.group_grad == "through_update"))
        seen.append(Pass(config.label_crops, large.size, trained=False))
        if backbone.name in LAYERS:  # small crops share batch norm with the large ones
            seen += [Pass(group.views, group.size, trained=False) for group in small]
        return seen

    @classmethod
    def at_batch_size(
        cls, config: SmogConfig, rates: OptimizerConfig, change: BatchChange
    ) -> tuple[SmogConfig, OptimizerConfig]:
        """Where groups were rebuilt once per epoch of batch 4096, rebuild them as often as the paper says."""
        if config.regroup_every is None and change.old == _OFFICIAL_BATCH != change.new:
            config = dataclasses.replace(config, regroup_every=_REGROUP_STEPS)
        return super().at_batch_size(config, rates, change)

    @property
    def _online(self) -> Mapping[str, nn.Module]:
        """What the momentum encoder is a copy of: not the predictor."""
        return {"backbone": self.backbone, "projector": self.projector}

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch]) -> None:
        """Fill the bank with one pass over the images, so that the first groups come from k-means too."""
        for batch in batches:
            large = self._streams(batch.views, step=0)[0][0]
            with without_drop_path(self.backbone):  # officially each crop has a pass of its own here
                z = torch.stack([self.projector(self.backbone(crop)) for crop in large])
            self.bank.write(batch.instances, F.normalize(z.float(), dim=-1))

    def epoch_start(self, progress: Progress) -> None:
        """Rebuild the groups and reset the momentum encoder, unless that is done every `regroup_every` steps."""
        if self.config.regroup_every is None or progress.step == 0:
            self._regroup(progress.step)

    def forward(self, batch: Batch, progress: Progress) -> MethodOutput:
        """Loss of this rank's images: labels from the old groups, scores against those that this batch has moved."""
        if not self._micro_batch:  # before the forward, once per update
            self.momentum_encoder.ema_update(self._online, self.config.momentum)
        online, other = self._streams(batch.views, progress.step)
        z, p = self._embed(online)  # (large, B, D), (V, B, D)
        zk = self._embed_by_momentum_encoder(other)  # (A, B, D)
        with torch.autocast(z.device.type, enabled=False):
            labels = torch.stack([nearest_group(zk.flatten(0, 1), groups) for groups in self.groups])
            labels = labels.unflatten(1, zk.shape[:2])  # (H, A, B)
            groups, nearest = self._move_groups(z, progress)  # (H, K, D), (H, B)
            per_set = zip(groups, labels, strict=True)
            loss = torch.stack([group_loss(p, g, y, self.config.temperature) for g, y in per_set]).mean()
        drift = 1 - (groups.detach() * self.groups).sum(dim=-1).mean()
        if groups is not self.groups:  # writing would invalidate the gradient of an earlier micro-batch
            self.groups.copy_(groups.detach())
        self.bank.write(batch.instances, z.detach())
        return MethodOutput(
            loss=loss,
            metrics={
                "label_agreement": (nearest == labels[:, 0]).float().mean(),
                "group_drift": self.setting.accumulate * drift,
            },
            embeddings=z[0].detach(),
            assignments=labels[0, 0],
        )

    def _streams(self, views: tuple[Tensor, ...], step: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The crops of the online and of the momentum encoder: A and B at even steps, B and A at odd ones."""
        half = len(views) // 2
        a, b = views[:half], views[half:]
        return (a, b) if step % 2 == 0 else (b, a)

    def _embed(self, views: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Unit z of the large crops, which moves groups, and unit p of all V views: (large, B, D), (V, B, D)."""
        through_update = self.config.group_grad == "through_update"
        projected = self._project(self._online, views)
        p = torch.cat([self.predictor(rows) for rows in projected]).unflatten(0, (-1, views[0].shape[1]))
        if drop_paths(self.backbone):  # embeddings for groups and bank need a pass in which nothing is dropped
            with torch.set_grad_enabled(through_update), without_drop_path(self.backbone):
                projected = self._project(self._online, _of_first_size(views))
        z = torch.cat(projected).unflatten(0, (-1, views[0].shape[1]))[: self.large_crops]
        return F.normalize((z if through_update else z.detach()).float(), dim=-1), p

    @torch.no_grad()
    def _embed_by_momentum_encoder(self, views: tuple[Tensor, ...]) -> Tensor:
        """Unit zk of the crops that give labels: (A, B, D)."""
        labelled = views[0][: self.config.label_crops]
        # Small crops give no label, but in a ResNet they share batch norm with the large ones.
        seen = (labelled, *views[1:])
        seen = seen if isinstance(self.backbone, ResNet) else _of_first_size(seen)
        projected = torch.cat(self._project(self.momentum_encoder, seen))
        return F.normalize(projected.float(), dim=1).unflatten(0, (-1, labelled.shape[1]))[: len(labelled)]

    def _project(self, encoder: Mapping[str, nn.Module] | nn.ModuleDict, views: Sequence[Tensor]) -> list[Tensor]:
        """Projector output, not normalised, of views (v, B, 3, s, s): (v * B, D) for each pass, in the order of views.

        A ResNet and its projector take all sizes in one pass, with batch norm over all of them; a transformer takes
        one size after the other, as in the official code.
        """
        backbone, projector = encoder["backbone"], encoder["projector"]
        crops = crops_by_size(views)
        if isinstance(backbone, ResNet):
            return [projector(joint_features(backbone, crops))]
        return [projector(backbone(size)) for size in crops]

    def _move_groups(self, z: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """Groups after this batch, (H, K, D) unit rows, and the nearest old group of each row, (H, B).

        With accumulated gradients the groups move once per update, in its last micro-batch, by the rows of all
        micro-batches; only the rows of the last one have a gradient. z: (large, B, D) unit rows.
        """
        sets, count = self.config.group_sets, self.config.groups
        rows = torch.stack([z[h % len(z)] for h in range(sets)])  # (H, B, D)
        nearest = torch.stack([nearest_group(r, g) for r, g in zip(rows, self.groups, strict=True)])
        offsets = count * torch.arange(sets, device=nearest.device)[:, None]
        sums, counts = group_sums(rows.flatten(0, 1), (nearest + offsets).flatten(), sets * count)
        sums, counts = dist.all_reduce_sum_with_grad(sums), dist.all_reduce_sum(counts)
        if self._sums is not None:
            sums, counts = sums + self._sums[0], counts + self._sums[1]
        self._micro_batch = (self._micro_batch + 1) % self.setting.accumulate
        if self._micro_batch:
            self._sums = sums.detach(), counts
            return self.groups, nearest
        self._sums = None
        sums, counts = sums.unflatten(0, (sets, count)), counts.unflatten(0, (sets, count))
        return moved_groups(self.groups, sums, counts, linear_momentum(*self.config.group_momentum, progress)), nearest

    def before_update(self, progress: Progress) -> None:
        """Clip the gradient if `max_gradient_norm` is set."""
        if self.config.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.config.max_gradient_norm)

    def after_update(self, progress: Progress) -> None:
        """Rebuild the groups and reset the momentum encoder every `regroup_every` steps."""
        done, every = progress.step + 1, self.config.regroup_every
        if every is not None and done % every == 0 and done < progress.total_steps:
            self._regroup(done)

    @torch.no_grad()
    def _regroup(self, step: int) -> None:
        """Groups := spherical k-means of the bank, from K of its rows; parameters of the momentum encoder := online.

        If the bank has fewer than K rows, the remaining groups start where they are.
        """
        self.momentum_encoder.ema_update(self._online, 0.0)
        known = self.bank.known()
        local, rows = known[dist.rank() :: dist.world_size()], known.cpu().numpy()
        for h, groups in enumerate(self.groups):
            features = self.bank.features[h % len(self.bank.features)]
            key = stream_key(self.setting.seed, "grup")
            chosen = permutation(key, rows, step * len(self.groups) + h)[: len(groups)]
            start = groups.clone()
            start[: len(chosen)] = features[known[torch.from_numpy(chosen).to(known.device)]]
            groups.copy_(spherical_kmeans(features[local], start, self.config.kmeans_iterations))

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Nearest group of the first set."""
        return nearest_group(F.normalize(self.projector(features).float(), dim=1), self.groups[0])


def linear_momentum(start: float, end: float, progress: Progress) -> float:
    """Momentum of the groups in the step that is about to run: `end` exactly in the last step of the run."""
    t, total = progress.step + 1, progress.total_steps
    return (start * (total - t) + end * t) / total


def _of_first_size(views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The groups that share a pass with the large crops of the first one."""
    return tuple(itertools.takewhile(lambda group: group.shape[-1] == views[0].shape[-1], views))
