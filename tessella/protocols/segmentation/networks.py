"""Networks that give every pixel a class: a backbone, dilated where it can be, and one of three heads.

    fcn      3x3 convolutions on the last map                         Long et al. 2015, as MoCo's and OpenMMLab's
    upernet  pooled context and a pyramid over all four maps          Xiao et al. 2018
    linear   batch norm and one 1x1 convolution; backbone frozen      the probe of DINOv2 and v3

The heads are our own, because those of torchvision and segmentation-models-pytorch fix their widths or build their
backbones themselves.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella import dist
from tessella.errors import UserError
from tessella.modules.backbone import Backbone
from tessella.modules.resnet import ResNet
from tessella.protocols.dense import stage_shapes
from tessella.protocols.segmentation.recipes import SegmentationConfig

_POOLS = (1, 2, 3, 6)  # bins per side of UPerNet's pooled context
_CLASSES_AT_A_TIME = 16  # that are enlarged to an image's size: all classes of a photo would be gigabytes


class Segmenter(nn.Module):
    """A backbone, whose parts are used and not copied, with a head, and in training perhaps an auxiliary one.

    Raises:
        UserError: the backbone has no maps of its stages.
    """

    def __init__(self, backbone: Backbone, classes: int, config: SegmentationConfig) -> None:
        super().__init__()
        self.backbone, self.classes, self.align_corners = backbone, classes, config.align_corners
        self.multiple = _multiple(backbone)
        self.frozen = config.head == "linear"
        widths, strides = stage_shapes(backbone)
        channels = config.channels
        self.head: nn.Module
        if config.head == "linear":
            channels = int(backbone.feature_dim)
            self.head = nn.BatchNorm2d(channels)
        elif config.head == "fcn":
            self.head = FcnHead(widths[3], channels, config.convs, config.concatenate, config.head_dilation)
        else:
            self.head = UperHead(widths, channels, flat=len(set(strides)) == 1)
        self.classifier = _classifier(channels, classes, config.dropout)
        self.auxiliary: nn.Module | None = None
        if config.auxiliary and not self.frozen:
            inner = FcnHead(widths[2], config.auxiliary_channels, 1, False, 1)
            self.auxiliary = nn.Sequential(inner, _classifier(config.auxiliary_channels, classes, config.dropout))

    def train(self, mode: bool = True) -> Segmenter:
        """A frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Scores of the classes at every pixel: (b, 3, h, w) -> [(b, classes, h, w)], in training also the auxiliary's.

        Sides that the backbone cannot divide are padded by the mean colour, and cut again.
        """
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        if self.frozen:
            with torch.no_grad():
                last = self.backbone.feature_map(x)
            scores = [self.classifier(self.head(last))]
        else:
            maps = self.backbone.stage_maps(x)
            scores = [self.classifier(self.head(maps))]
            if self.training and self.auxiliary is not None:
                scores.append(self.auxiliary(maps[:3]))
        return [self.enlarge(score, x.shape[-2:])[..., :height, :width] for score in scores]

    def enlarge(self, scores: Tensor, size: Any) -> Tensor:
        """Scores at another size, bilinear."""
        return F.interpolate(scores.float(), size, mode="bilinear", align_corners=self.align_corners)

    def best(self, scores: Tensor, height: int, width: int) -> Tensor:
        """The class with the highest score at every pixel of an image: (1, classes, h, w) -> (height, width) int64."""
        best = torch.full((height, width), -torch.inf, device=scores.device)
        classes = torch.zeros(height, width, dtype=torch.long, device=scores.device)
        for first in range(0, scores.shape[1], _CLASSES_AT_A_TIME):
            part = scores[:, first : first + _CLASSES_AT_A_TIME]
            if part.shape[-2:] != (height, width):
                part = self.enlarge(part, (height, width))
            value, which = part[0].max(dim=0)
            better = value > best
            best, classes = torch.where(better, value, best), torch.where(better, which + first, classes)
        return classes


def dilate(backbone: ResNet, output_stride: int) -> ResNet:
    """A copy whose last map is 1/output_stride of the image: strides become 1, and later convolutions are dilated.

    At the pixels that the strides would have kept, its maps are those of the backbone: every 3x3 convolution
    behind a removed stride has its dilation doubled. That holds for basic blocks too.

    Args:
        backbone: one of our ResNets.
        output_stride: a power of two. A network whose map is as fine already is copied as it is.

    Raises:
        UserError: changing the last three stages cannot give this stride.
    """
    net = copy.deepcopy(backbone)
    stem = net.conv1.stride[0] * int(getattr(net.maxpool, "stride", 1))
    strides = [8 * stem // 2**removed for removed in range(4)]
    if output_stride not in strides and output_stride < strides[0]:
        raise UserError(
            f"this ResNet cannot have output_stride={output_stride}: use one of {', '.join(map(str, strides))}"
        )
    removed = strides.index(output_stride) if output_stride in strides else 0
    dilation = 1
    for number in range(5 - removed, 5):
        before, dilation = dilation, 2 * dilation
        for block in net.get_submodule(f"layer{number}"):  # type: ignore[attr-defined]
            for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
                if conv.kernel_size == (3, 3):
                    # The convolution that had the stride still sees the map before it.
                    spacing = before if conv.stride != (1, 1) else dilation
                    conv.dilation = conv.padding = (spacing, spacing)
                conv.stride = (1, 1)
    return net


class SharedDropout2d(nn.Module):
    """Drops whole channels of images, the same ones however many ranks share the batch.

    Attributes:
        seed: of the training.
        step: from 0; the training sets both.
    """

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance, self.seed, self.step = chance, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same; b is equal on all ranks."""
        if not self.training or not self.chance:
            return x
        b, c = x.shape[:2]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**63)
        active = torch.rand(b * dist.world_size(), c, generator=generator) >= self.chance  # of all ranks' images
        mine = active[dist.rank() * b : (dist.rank() + 1) * b]
        return x * (mine.to(x.device, x.dtype) / (1 - self.chance))[..., None, None]


class FcnHead(nn.Module):
    """3x3 convolutions on the last map, and perhaps one more that sees their input beside their output."""

    def __init__(self, channels_in: int, channels: int, convs: int, concatenate: bool, dilation: int) -> None:
        super().__init__()
        widths = [channels_in, *[channels] * convs]
        self.convs = nn.Sequential(*(_conv(a, b, 3, dilation) for a, b in itertools.pairwise(widths)))
        self.join = _conv(channels_in + channels, channels, 3) if concatenate else None

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, fine to coarse -> (b, channels, h', w') of the last."""
        x = self.convs(maps[-1])
        return x if self.join is None else self.join(torch.cat([maps[-1], x], dim=1))


class UperHead(nn.Module):
    """Pooled context on the last map, a pyramid from it down to the first, and all levels joined at the first's size.

    The maps of a plain transformer have one size; then the first is enlarged by four, the second by two, and the last
    is halved, as in BEiT's and MAE's segmenters.
    """

    def __init__(self, widths: list[int], channels: int, flat: bool) -> None:
        super().__init__()
        self.scales = _pyramid(widths) if flat else None
        last = widths[-1]
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), _conv(last, channels, 1)) for n in _POOLS)
        self.context = _conv(last + len(_POOLS) * channels, channels, 3)
        self.sides = nn.ModuleList(_conv(width, channels, 1) for width in widths[:-1])
        self.levels = nn.ModuleList(_conv(channels, channels, 3) for _ in widths[:-1])
        self.join = _conv(len(widths) * channels, channels, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps, fine to coarse -> (b, channels, h', w') of the first."""
        if self.scales is not None:
            maps = [scale(x) for scale, x in zip(self.scales, maps, strict=True)]
        last = maps[-1]
        pooled = [_resized(pool(last), last) for pool in self.pools]
        levels = [self.context(torch.cat([last, *pooled], dim=1))]
        for side, x in reversed(list(zip(self.sides, maps[:-1], strict=True))):
            x = side(x)
            levels.insert(0, x + _resized(levels[0], x))
        levels[:-1] = [smooth(x) for smooth, x in zip(self.levels, levels[:-1], strict=True)]
        return self.join(torch.cat([_resized(x, levels[0]) for x in levels], dim=1))


def _conv(channels_in: int, channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _classifier(channels: int, classes: int, dropout: float) -> nn.Sequential:
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(SharedDropout2d(dropout), conv)


def _pyramid(widths: list[int]) -> nn.ModuleList:
    def twice(width: int) -> nn.Module:
        return nn.ConvTranspose2d(width, width, 2, 2)

    four_times = nn.Sequential(twice(widths[0]), nn.BatchNorm2d(widths[0]), nn.GELU(), twice(widths[0]))
    return nn.ModuleList([four_times, twice(widths[1]), nn.Identity(), nn.MaxPool2d(2)])


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def _multiple(backbone: Backbone) -> int:
    """What an image's sides must be multiples of."""
    if isinstance(backbone, ResNet):
        return 1
    patch = getattr(getattr(backbone.net, "patch_embed", None), "patch_size", None)
    if patch is None:
        return 32
    side = int(patch[0] if isinstance(patch, tuple) else patch)
    return side if side > 4 else 32  # small patches are merged thrice
