"""Any network by name as a backbone: pooled features, feature maps, one width."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from tessella.errors import UserError
from tessella.modules.resnet import LAYERS, ResNet


@dataclass(frozen=True)
class BackboneConfig:
    """Which network is trained."""

    name: str = "resnet50"  # resnet10, 18, 34, 50, 101, 152; or timm:NAME
    width: int = 64  # channels of a ResNet's stem; 64 is standard, 128 is SwAV's w2
    stem: Literal["imagenet", "small"] = "imagenet"  # small: 3x3 stride 1, no max-pool, for images up to 64 pixels
    recompute: bool = False  # activation checkpointing: less memory, about a third more time
    drop_path: float = 0.0  # chance that a block of a timm network drops out in training (stochastic depth), at its end


class TimmBackbone(nn.Module):
    """A timm network without its classifier."""

    net: Any  # timm's networks share no typed base

    def __init__(self, name: str, recompute: bool, drop_path: float = 0.0) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), 3)
            raise UserError(f"timm has no network {name!r}; did you mean {', '.join(near) or 'another name'}?")
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        # Crops of several sizes go through one network.
        if timm.models.is_model_in_modules(name, ["swin_transformer"]):
            options["strict_img_size"] = False
        elif timm.models.is_model_in_modules(name, ["vision_transformer", "deit"]):
            options["dynamic_img_size"] = True
        self.net = timm.create_model(name, pretrained=False, num_classes=0, **options)
        if recompute:
            self.net.set_grad_checkpointing(True)
        self.feature_dim: int = self.net.num_features
        self._name = name

    def feature_map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim, h', w')."""
        y = self.net.forward_features(x)
        if y.dim() == 4:  # Swin and its kin keep the channels last
            return y.permute(0, 3, 1, 2) if y.shape[-1] == self.feature_dim != y.shape[1] else y
        raise UserError(
            f"{self._name} gives {y.dim() - 2}-d tokens, not a feature map, which this method needs to cut its "
            "montages apart: use a ResNet, ConvNeXt or Swin backbone"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim)."""
        return self.net(x)


Backbone: TypeAlias = ResNet | TimmBackbone  # what methods and protocols take: feature_dim, feature_map(x), forward(x)


def build_backbone(config: BackboneConfig) -> Backbone:
    """The network, freshly initialised from torch's global generator.

    Raises:
        UserError: the name is unknown.
    """
    if config.name in LAYERS:
        return ResNet(config.name, config.width, config.stem, config.recompute)
    if config.name.startswith("timm:"):
        return TimmBackbone(config.name.removeprefix("timm:"), config.recompute, config.drop_path)
    raise UserError(
        f"unknown backbone {config.name!r}: use one of {', '.join(LAYERS)}, or timm:NAME for a network of timm"
    )
