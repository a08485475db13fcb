"""JigClu: which tiles of a shuffled batch of montages come from the same image, and from which corner?

    B images -> m x m overlapping tiles each, every tile augmented by itself
    tiles of all ranks -> one permutation -> n montages -> backbone, once -> feature map -> m x m cells, pooled
    cell vectors -> clustering head -> supervised contrastive loss: the tiles of one image attract
                 -> location head   -> cross-entropy over the m * m cut positions
    State: parameters only; the permutation is a function of (seed, step).

Source: Chen, Liu, Jia, "Jigsaw clustering for unsupervised visual representation learning", CVPR 2021. Deviations from
the official code are listed in docs/methods/jigclu.md. The first three lines are in `methods/jigsaw.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tessella.data.batch import Batch
from tessella.data.views import Overlap, ViewSpec
from tessella.methods.jigsaw import Jigsaw, JigsawConfig
from tessella.methods.layout import Layout, OfficialFile
from tessella.methods.method import MethodOutput, Progress, Setting
from tessella.modules.backbone import Backbone
from tessella.ranges import NonNegative


@dataclass(frozen=True)
class JigcluConfig(JigsawConfig):
    """Settings of JigClu; defaults are the official ones for ImageNet and ResNet-50."""

    name: Literal["jigclu"] = "jigclu"
    overlap: Overlap = 0.3  # a tile covers 1/tiles + overlap of the image's side
    location_weight: NonNegative = 1.0


def _from_official(file: OfficialFile) -> tuple[str, JigcluConfig]:
    tiles = math.isqrt(file.size("encoder.fc_loc.weight"))
    return "JigClu", JigcluConfig(tiles=tiles, embedding_dim=file.size("encoder.fc_clu.2.weight"))


class Jigclu(Jigsaw):
    """JigClu with m x m tiles."""

    title = "JigClu"
    Config = JigcluConfig
    config: JigcluConfig
    batch_rule = "learning rates in proportion to the batch: ours, because 0.03 at 256 is all that is published"
    layouts = (
        Layout(
            "jigclu",
            "encoder.fc_clu.*",
            {
                "backbone.*": "encoder.*",
                "cluster_head.*": "encoder.fc_clu.*",
                "location_head.*": "encoder.fc_loc.*",  # rows in the order of our tiles: column by column
            },
            _from_official,
            unless="encoder.fc_cls.*",
        ),
    )

    def __init__(self, config: JigcluConfig, backbone: Backbone, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.location_head = nn.Linear(backbone.feature_dim, config.tiles**2)

    @classmethod
    def view_spec(cls, config: JigcluConfig) -> ViewSpec:
        """One crop within each tile."""
        return cls.tile_views(config, overlap=config.overlap)

    def collapse_loss(self) -> float:
        """Both losses at chance: equal embeddings of N tiles give ln(N - 1), a blind location head ln(m * m)."""
        return self.loss_of_equal_tiles() + self.config.location_weight * math.log(self.config.tiles**2)

    def forward(self, batch: Batch, progress: Progress) -> MethodOutput:
        """Loss of this rank: all tiles are contrasted; the corner is predicted for those of its own montages."""
        puzzle = self.puzzle(batch, progress)
        logits = self.location_head(puzzle.cells)
        return self.output(puzzle, "location", logits, puzzle.corner, self.config.location_weight)
