"""MEJigClu: JigClu with a random overlap of the tiles, and the image's own category in place of the corner.

    B images -> m x m tiles each, their overlap drawn at random, every tile augmented by itself
    tiles of all ranks -> one permutation -> n montages -> backbone, once -> feature map -> m x m cells, pooled
    cell vectors -> clustering head -> supervised contrastive loss: the tiles of one image attract
                 -> category head   -> cross-entropy over C categories, a fixed random split of the images
    Sampler: slot k of each batch draws only from category k, so that a batch has every category once.
    State: parameters, and the four numbers that the split is a function of.

Source: Zhang, Liu, Zhao, Liang, "More effective jigsaw clustering" (MEJigClu). No official code was found; what the
paper leaves open is listed in docs/methods/mejigclu.md. The first three lines are in `methods/jigsaw.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.sampler import EpochSampler, Sampler, SlotSampler
from tessella.data.views import Overlap, ViewSpec
from tessella.errors import UserError
from tessella.methods.jigsaw import Jigsaw, JigsawConfig
from tessella.methods.layout import OTHER_IMAGES, Layout, OfficialFile
from tessella.methods.method import BatchChange, MethodOutput, Progress, Setting
from tessella.modules.backbone import Backbone
from tessella.modules.partition import Partition
from tessella.optim import OptimizerConfig
from tessella.ranges import Clusters, NonNegative, Range


@dataclass(frozen=True)
class MejigcluConfig(JigsawConfig):
    """Settings of MEJigClu; defaults are the paper's for ImageNet and ResNet-50, and JigClu's where it is silent."""

    name: Literal["mejigclu"] = "mejigclu"
    overlap: tuple[Overlap, Overlap] = (0.15, 0.45)  # range; a tile covers 1/tiles + overlap of the image's side
    # What has a draw of its own; per_axis: x and y of each image. fixed: the middle of the range, JigClu's 0.3.
    overlap_mode: Literal["per_image", "per_batch", "per_axis", "fixed"] = "per_image"
    category_weight: NonNegative = 1.0  # 0: clustering only
    # Width of the category head's middle layer; None: the backbone's, 0: no layer.
    category_hidden: Annotated[int, Range(0, 10**6)] | None = None
    categories: Clusters | None = None  # at least batch_size; None: batch_size, as in the paper
    # subsets: slot k draws from category k. random: any image in any slot, and the slot is the category, which
    # cannot be learnt: a negative control.
    slots: Literal["subsets", "random"] = "subsets"
    partition_seed: Annotated[int, Range(0, 2**63 - 1)] = 0  # of the split into categories
    uneven: Literal["drop", "wrap"] = "drop"  # larger categories leave out one image per epoch, or smaller repeat one

    def __post_init__(self) -> None:
        if self.slots == "random" and self.categories is not None:
            raise UserError(
                f"categories={self.categories} has no meaning with slots=random, where the slot in the batch is the "
                "category: leave categories out, or use slots=subsets"
            )


def _from_official(file: OfficialFile) -> tuple[str, MejigcluConfig]:
    config = MejigcluConfig(
        embedding_dim=file.size("encoder.fc_clu.2.weight"),
        category_hidden=file.size("encoder.fc_cls.0.weight"),
        categories=file.size("encoder.fc_cls.2.weight"),
    )
    return "MEJigClu", config


class Mejigclu(Jigsaw):
    """MEJigClu with m x m tiles."""

    title = "MEJigClu"
    Config = MejigcluConfig
    config: MejigcluConfig
    batch_rule = (
        "learning rates in proportion to the batch: ours, because 0.03 at 256 is all that is published. A smaller "
        "batch keeps the number of categories; a larger one has one category per slot, as in the paper"
    )
    layouts = (
        Layout(
            "mejigclu",
            "encoder.fc_cls.*",
            {
                "backbone.*": "encoder.*",
                "cluster_head.*": "encoder.fc_clu.*",
                "category_head.*": "encoder.fc_cls.*",
            },
            _from_official,
            left_out={"*subset_*": OTHER_IMAGES},
            reset={"partition.*": "the split into categories is of the new run's images"},
        ),
    )

    not_transferred = ("partition.*", "category_head.*")  # the head answers questions about one split of the images

    def __init__(self, config: MejigcluConfig, backbone: Backbone, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.partition: Partition | None = None
        self.categories = setting.batch_size
        if config.slots == "subsets":
            self.categories = config.categories or setting.batch_size * setting.accumulate
            self.partition = Partition(setting.images, self.categories, config.partition_seed)
        d = backbone.feature_dim
        hidden = d if config.category_hidden is None else config.category_hidden
        middle = [nn.Linear(d, hidden), nn.ReLU(inplace=True)] if hidden else []
        self.category_head = nn.Sequential(*middle, nn.Linear(hidden or d, self.categories))

    @classmethod
    def at_batch_size(
        cls, config: MejigcluConfig, rates: OptimizerConfig, change: BatchChange
    ) -> tuple[MejigcluConfig, OptimizerConfig]:
        """A smaller batch keeps the number of categories."""
        if config.categories is None and config.slots == "subsets" and change.new < change.old:
            config = dataclasses.replace(config, categories=change.old)
        return super().at_batch_size(config, rates, change)

    @classmethod
    def view_spec(cls, config: MejigcluConfig) -> ViewSpec:
        """One crop within each tile."""
        low, high = config.overlap
        if config.overlap_mode == "fixed":
            return cls.tile_views(config, overlap=(low + high) / 2)
        drawn_per = config.overlap_mode.removeprefix("per_")
        return cls.tile_views(config, overlap=low, overlap_max=high, overlap_per=drawn_per)

    @classmethod
    def sampler(cls, config: MejigcluConfig, images: int, batch_size: int, seed: int) -> Sampler:
        """Slot k draws from category k; in any other order nothing in an image would show the right answer."""
        if config.slots == "random":
            return EpochSampler(images, batch_size, seed)
        categories = config.categories or batch_size
        return SlotSampler(
            images, batch_size, seed, parts=categories, partition_seed=config.partition_seed, uneven=config.uneven
        )

    def collapse_loss(self) -> float:
        """Both losses at chance: equal embeddings of N tiles give ln(N - 1), a blind category head ln C."""
        return self.loss_of_equal_tiles() + self.config.category_weight * math.log(self.categories)

    def forward(self, batch: Batch, progress: Progress) -> MethodOutput:
        """Loss of this rank: all tiles are contrasted; the category is predicted for those of its own montages."""
        puzzle = self.puzzle(batch, progress)
        category = self._categories(batch.instances)[puzzle.slot]
        return self.output(puzzle, "category", self.category_head(puzzle.cells), category, self.config.category_weight)

    def _categories(self, instances: Tensor) -> Tensor:
        """Category of the image in each slot of all ranks: (B,) rows of this rank's images -> (n,) int64.

        By image, not by slot: an image that replaces an unreadable one keeps its own category, and the slots of a
        micro-batch are only some of the categories.
        """
        if self.partition is None:
            return torch.arange(len(instances) * dist.world_size(), device=instances.device)
        return dist.gather(self.partition(instances))

    def epoch_start(self, progress: Progress) -> None:
        """Check that all ranks made the same categories: otherwise they would train against each other, unnoticed."""
        if self.partition is not None:
            self.partition.assert_equal_on_ranks()
