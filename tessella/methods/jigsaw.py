"""What JigClu and MEJigClu share: montages of the tiles of all ranks, and the contrast of each image's tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD, ColorAugmentation, CropGroup, Tiles, ViewSpec
from tessella.methods.method import Method, MethodConfig, MethodOutput, Progress, Setting
from tessella.modules.backbone import Backbone
from tessella.modules.heads import Projector
from tessella.ops.losses import supervised_contrastive
from tessella.ops.montage import gather_cells, montage_positions, pool_cells, shuffled_montages, tile_order
from tessella.ranges import NonNegative, PixelMean, Pixels, PixelStd, Positive, PositiveFraction, Width

_BASE_TEMPERATURE = 0.07  # JigClu's official code multiplies its contrastive loss by temperature / 0.07


@dataclass(frozen=True)
class JigsawConfig(MethodConfig):
    """Settings of both methods; defaults are JigClu's official ones for ImageNet and ResNet-50."""

    tiles: Tiles = 2  # per side
    tile_size: Pixels = 112  # pixels; the montage is tiles times as wide
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.2, 1.0)  # share of the tile's area
    colors: ColorAugmentation = ColorAugmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    mean: tuple[PixelMean, PixelMean, PixelMean] = IMAGENET_MEAN
    std: tuple[PixelStd, PixelStd, PixelStd] = IMAGENET_STD
    embedding_dim: Width = 128
    temperature: Positive = 0.3
    cluster_scale: Literal["official", "paper"] = "official"  # official: times temperature / 0.07; paper: as written
    cluster_weight: NonNegative = 1.0


class Puzzle(NamedTuple):
    """One step's montages after the backbone: n images over all ranks, B of them on this rank."""

    cells: Tensor  # (m * m * B, d) features of the cells of this rank's montages
    slot: Tensor  # (m * m * B,) int64 in [0, n): whose tile each cell shows, by the image's place in the batch
    corner: Tensor  # (m * m * B,) int64 in [0, m * m): which of the image's tiles it shows
    embeddings: Tensor  # (m * m * n, D) unit rows of the cells of all ranks
    cluster_loss: Tensor  # scalar: the tiles of one image attract, all others repel


class Jigsaw(Method):
    """Base of JigClu and MEJigClu: m x m overlapping tiles per image, mixed over all ranks."""

    config: JigsawConfig

    def __init__(self, config: JigsawConfig, backbone: Backbone, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        d = backbone.feature_dim
        self.cluster_head = Projector(d, d, config.embedding_dim, norm=False)
        official = config.temperature / _BASE_TEMPERATURE if config.cluster_scale == "official" else 1.0
        self.cluster_weight = config.cluster_weight * official

    @staticmethod
    def tile_views(config: JigsawConfig, **overlap: Any) -> ViewSpec:
        """One crop within each tile; `overlap` are the fields of `CropGroup` that place the tiles."""
        crops = CropGroup(
            views=config.tiles**2,
            size=config.tile_size,
            scale=config.crop_scale,
            colors=config.colors,
            tiles=config.tiles,
            **overlap,
        )
        return ViewSpec((crops,), config.mean, config.std)

    def loss_of_equal_tiles(self) -> float:
        """The contrastive loss when all N tiles of the batch have one embedding: ln(N - 1), weighted."""
        return self.cluster_weight * math.log(self.setting.batch_size * self.config.tiles**2 - 1)

    def puzzle(self, batch: Batch, progress: Progress) -> Puzzle:
        """Mix the tiles of all ranks, pass this rank's montages through the backbone and contrast the cells.

        The heads see this rank's cells only; embeddings, which are narrow, are what the ranks exchange.
        """
        m, tiles = self.config.tiles, batch.views[0]  # (m * m, B, 3, s, s)
        n = tiles.shape[1] * dist.world_size()
        order = tile_order(self.setting.seed, progress.step, m * m * n)

        montages = shuffled_montages(tiles, order, m)  # (B, 3, m s, m s)
        cells = pool_cells(self.backbone.feature_map(montages), m).flatten(0, 1)  # (m * m * B, d)
        embeddings = gather_cells(self.cluster_head(cells).unflatten(0, (m * m, -1)))  # (m * m * n, D)

        # Tile q * n + i was cut from image i at place q; position k of the shuffled list shows tile order[k].
        here = order[montage_positions(n, m, dist.rank(), dist.world_size())].flatten()
        here, order = (numbers.to(tiles.device, non_blocking=True) for numbers in (here, order))
        with torch.autocast(cells.device.type, enabled=False):  # bf16 similarities would blur the contrast
            cluster_loss = supervised_contrastive(embeddings, order % n, self.config.temperature)
        return Puzzle(cells, here % n, here // n, embeddings, cluster_loss)

    def output(self, puzzle: Puzzle, question: str, logits: Tensor, answers: Tensor, weight: float) -> MethodOutput:
        """The contrastive loss plus, weighted, the cross-entropy of a question about each cell, named in the metrics.

        Logits are (m * m * B, choices), answers (m * m * B,) int64.
        """
        loss = F.cross_entropy(logits.float(), answers)
        return MethodOutput(
            loss=self.cluster_weight * puzzle.cluster_loss + weight * loss,
            metrics={
                "cluster_loss": puzzle.cluster_loss.detach(),
                f"{question}_loss": loss.detach(),
                f"{question}_accuracy": (logits.detach().argmax(dim=1) == answers).float().mean(),
            },
            embeddings=puzzle.embeddings.detach(),
        )
