"""Crops of several sizes through a backbone: one pass per size, or all sizes through a ResNet in one pass.

Usually each size has a pass and batch statistics of its own. In SMoG's official ResNet all sizes share one pass: every
batch norm sees the pixels of all sizes as one batch, except those of the shortcuts (`downsample`), which see one size
after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tessella.modules.norm import checkpointed
from tessella.modules.resnet import ResNet
from tessella.ops.layout import image_layout


def crops_by_size(views: Sequence[Tensor]) -> list[Tensor]:
    """One (n, 3, s, s) tensor per pass, in the order of the crop groups (v, B, 3, s, s).

    Neighbouring groups of one size share a pass, as in SwAV's official code.
    """
    passes = [list(groups) for _, groups in itertools.groupby(views, key=lambda group: group.shape[-1])]
    return [groups[0].flatten(0, 1) if len(groups) == 1 else torch.cat(groups).flatten(0, 1) for groups in passes]


def joint_features(net: ResNet, crops: Sequence[Tensor]) -> Tensor:
    """Pooled features (sum of all n, feature_dim) of crops (n, 3, s, s) of several sizes, size after size."""
    if len(crops) == 1:
        return net(crops[0])
    layout = image_layout(crops[0].device)
    maps = [net.conv1(x.contiguous(memory_format=layout)) for x in crops]
    maps = [net.maxpool(x) for x in _normalise_together(net.bn1, maps, relu=True)]
    for number in (1, 2, 3, 4):
        stage = net.get_submodule(f"layer{number}")
        if net.recompute and net.training and torch.is_grad_enabled():
            maps = checkpointed(_stage, stage, stage, maps)
        else:
            maps = _stage(stage, maps)
    return torch.cat([x.mean(dim=(2, 3)) for x in maps])


def _stage(stage: Any, maps: list[Tensor]) -> list[Tensor]:
    for block in stage:
        shortcuts = maps if block.downsample is None else [block.downsample(x) for x in maps]
        layers = [n for n in (1, 2, 3) if hasattr(block, f"conv{n}")]
        for n in layers:
            maps = [getattr(block, f"conv{n}")(x) for x in maps]
            maps = _normalise_together(getattr(block, f"bn{n}"), maps, relu=n < layers[-1])
        maps = [block.relu(x + shortcut) for x, shortcut in zip(maps, shortcuts, strict=True)]
    return maps


def _normalise_together(norm: nn.Module, maps: list[Tensor], relu: bool) -> list[Tensor]:
    """Batch norm of (n, c, h, w) maps of several sizes as of one batch of pixels, and ReLU if `relu`."""
    if maps[0].is_cuda:  # channels last: a batch of one-pixel images
        pixels = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps])  # (all pixels, c)
        normalised = norm(pixels[:, :, None, None])[:, :, 0, 0].T
    else:  # channels first: one tall image
        pixels = torch.cat([x.transpose(0, 1).flatten(1) for x in maps], dim=1)  # (c, all pixels)
        normalised = norm(pixels[None, :, :, None])[0, :, :, 0]
    if relu:
        normalised = normalised.relu()
    result, start = [], 0
    for x in maps:
        n, _, h, w = x.shape
        result.append(normalised[:, start : start + n * h * w].unflatten(1, (n, h, w)).transpose(0, 1))
        start += n * h * w
    return result
