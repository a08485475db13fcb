"""ResNets with torchvision's key layout, plus what the five methods need of them: any width, a stem for small images.

Not torchvision's: its stem has 64 channels, its BasicBlock cannot be dilated, and importing it doubles the start-up
time of a run. Weights and outputs equal torchvision's (a test compares).

Source: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, with the stride in the 3x3
convolution ("v1.5").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tessella.modules.norm import checkpointed
from tessella.ops.layout import image_layout


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, channels, h / stride, w / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels, and a shortcut."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 4 * channels, h / stride, w / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


LAYERS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """Trunk of a ResNet, without a classifier.

    Args:
        name: a key of `LAYERS`.
        width: channels of the stem and of the first stage, 64 in the paper; SwAV's w2 is 128, w4 is 256.
        stem: "imagenet" (7x7 stride 2, max-pool: the map is 1/32 of the image), "small" (3x3 stride 1, no max-pool:
            1/8), the usual change for images of 32 pixels, or "small-pool" (the same with a 2x2 max-pool: 1/16), with
            which 64 pixels cost about what 32 do.
        recompute: keep only the input of each stage for the backward pass and compute the stage again: less memory,
            about a third more time.
    """

    transform: Any = None  # with loaded weights: PIL image or uint8 tensor -> what the network expects

    def __init__(self, name: str, width: int = 64, stem: str = "imagenet", recompute: bool = False) -> None:
        super().__init__()
        block, depths = LAYERS[name]
        self.recompute = recompute
        if stem in ("small", "small-pool"):
            self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(2) if stem == "small-pool" else nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        channels_in = width
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            blocks = []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                channels_out = channels * block.expansion
                downsample = None
                if stride != 1 or channels_in != channels_out:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
                    )
                blocks.append(block(channels_in, channels, stride, downsample))
                channels_in = channels_out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = channels_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim, h', w'), the last stage's output."""
        return deque(self._stages(x), maxlen=1)[0]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `forward` and `feature_map`; a method calls the one or the other. Options as of torch.compile."""
        super().compile(*args, **kwargs)
        self.feature_map = torch.compile(self.feature_map, *args, **kwargs)  # type: ignore[method-assign]

    def stage_maps(self, x: Tensor, stages: int = 4) -> list[Tensor]:
        """The maps of the first `stages` stages, fine to coarse: detectors and segmenters build on them.

        Args:
            x: (b, 3, h, w).
            stages: 1 to 4; with the usual stem, the four maps are 1/4, 1/8, 1/16 and 1/32 of the image.
        """
        return list(islice(self._stages(x), stages))

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        """The output of each stage, computed when it is needed."""
        x = x.contiguous(memory_format=image_layout(x.device))
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in (1, 2, 3, 4):
            stage = self.get_submodule(f"layer{number}")
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpointed(stage, stage, x)
            else:
                x = stage(x)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim), the last stage averaged over positions."""
        return self.feature_map(x).mean(dim=(2, 3))
