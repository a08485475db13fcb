"""JigClu: which tiles of a shuffled batch of montages come from the same image, and from which corner?

    B images -> m x m overlapping tiles each, every tile augmented by itself
    tiles of all ranks -> one permutation -> n montages -> backbone, once -> feature map -> m x m cells, pooled
    cell vectors -> clustering head -> supervised contrastive loss: the tiles of one image attract
                 -> location head   -> cross-entropy over the m * m cut positions
    State: parameters only; the permutation is a function of (seed, step).

Source: Chen, Liu, Jia, "Jigsaw clustering for unsupervised visual representation learning", CVPR 2021. Deviations from
the official code are listed in docs/methods/jigclu.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD, ColorAugmentation, CropGroup, Overlap, Tiles, ViewSpec
from tessella.methods.layout import Layout, OfficialFile
from tessella.methods.method import Method, MethodConfig, MethodOutput, Progress, Setting
from tessella.modules.backbone import Backbone
from tessella.modules.heads import Projector
from tessella.ops.losses import OFFICIAL_BASE_TEMPERATURE, supervised_contrastive
from tessella.ops.montage import gather_cells, montage_positions, pool_cells, shuffled_montages, tile_order
from tessella.ranges import NonNegative, PixelMean, Pixels, PixelStd, Positive, PositiveFraction, Width


@dataclass(frozen=True)
class JigcluConfig(MethodConfig):
    """Settings of JigClu; defaults are the official ones for ImageNet and ResNet-50."""

    name: Literal["jigclu"] = "jigclu"
    tiles: Tiles = 2  # per side
    overlap: Overlap = 0.3  # a tile covers 1/tiles + overlap of the image's side
    tile_size: Pixels = 112  # pixels; the montage is tiles times as wide
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.2, 1.0)  # share of the tile's area
    colors: ColorAugmentation = ColorAugmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    mean: tuple[PixelMean, PixelMean, PixelMean] = IMAGENET_MEAN
    std: tuple[PixelStd, PixelStd, PixelStd] = IMAGENET_STD
    embedding_dim: Width = 128
    temperature: Positive = 0.3
    cluster_scale: Literal["official", "paper"] = "official"  # official: times temperature / 0.07; paper: as written
    cluster_weight: NonNegative = 1.0
    location_weight: NonNegative = 1.0


def _from_official(file: OfficialFile) -> tuple[str, JigcluConfig]:
    tiles = math.isqrt(file.size("encoder.fc_loc.weight"))
    return "JigClu", JigcluConfig(tiles=tiles, embedding_dim=file.size("encoder.fc_clu.2.weight"))


class Jigclu(Method):
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
        d = backbone.feature_dim
        self.cluster_head = Projector(d, d, config.embedding_dim, norm=False)
        self.location_head = nn.Linear(d, config.tiles**2)
        official = config.temperature / OFFICIAL_BASE_TEMPERATURE
        self.cluster_weight = config.cluster_weight * (official if config.cluster_scale == "official" else 1.0)

    @classmethod
    def view_spec(cls, config: JigcluConfig) -> ViewSpec:
        """One crop within each tile."""
        crops = CropGroup(
            views=config.tiles**2,
            size=config.tile_size,
            scale=config.crop_scale,
            colors=config.colors,
            tiles=config.tiles,
            overlap=config.overlap,
        )
        return ViewSpec((crops,), config.mean, config.std)

    def collapse_loss(self) -> float:
        """Both losses at chance: equal embeddings of N tiles give ln(N - 1), a blind location head ln(m * m)."""
        tiles = self.config.tiles**2
        at_chance = self.cluster_weight * math.log(self.setting.batch_size * tiles - 1)
        return at_chance + self.config.location_weight * math.log(tiles)

    def forward(self, batch: Batch, progress: Progress) -> MethodOutput:
        """Loss of this rank: tiles of all ranks are contrasted, those in its own montages are asked for their place.

        The heads see this rank's cells alone, so that narrow embeddings travel and no head works for other ranks.
        """
        m, tiles = self.config.tiles, batch.views[0]  # (m * m, B, 3, s, s)
        n = tiles.shape[1] * dist.world_size()
        order = tile_order(self.setting.seed, progress.step, m * m * n)

        montages = shuffled_montages(tiles, order, m)  # (B, 3, m s, m s)
        cells = pool_cells(self.backbone.feature_map(montages), m).flatten(0, 1)  # (m * m * B, d)
        embeddings = gather_cells(self.cluster_head(cells).unflatten(0, (m * m, -1)))  # (m * m * n, D)
        logits = self.location_head(cells).float()

        # Tile p = q * n + i was cut from image i at place q; position k of the permuted list shows tile order[k].
        image = (order % n).to(tiles.device, non_blocking=True)
        here = order[montage_positions(n, m, dist.rank(), dist.world_size())].flatten()
        place = (here // n).to(tiles.device, non_blocking=True)
        with torch.autocast(cells.device.type, enabled=False):  # bf16 similarities would blur the contrast
            cluster_loss = supervised_contrastive(embeddings, image, self.config.temperature)
        location_loss = F.cross_entropy(logits, place)
        return MethodOutput(
            loss=self.cluster_weight * cluster_loss + self.config.location_weight * location_loss,
            metrics={
                "cluster_loss": cluster_loss.detach(),
                "location_loss": location_loss.detach(),
                "location_accuracy": (logits.detach().argmax(dim=1) == place).float().mean(),
            },
            embeddings=embeddings.detach(),
        )
