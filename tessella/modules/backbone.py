"""Backbones by name: our ResNets, networks of timm, and those of other packages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tessella.errors import UserError
from tessella.modules.resnet import LAYERS, ResNet
from tessella.ranges import Channels, FractionBelowOne, check_ranges
from tessella.registry import Registry


@dataclass(frozen=True)
class BackboneConfig:
    """Which network is trained."""

    name: str = "resnet50"  # resnet10, 18, 34, 50, 101, 152; timm:NAME for a ViT, Swin, ...; or a package's name
    width: Channels = 64  # channels of our ResNets' stem; 64 is standard, 128 is SwAV's w2
    # small: 3x3 stride 1, no max-pool, for images of about 32 pixels; small-pool: then a 2x2 max-pool, for about 64
    stem: Literal["imagenet", "small", "small-pool"] = "imagenet"
    activation_checkpointing: bool = False  # less memory, about a third more time
    # Chance that a block of a timm network drops out in training (stochastic depth), at its end.
    drop_path: FractionBelowOne = 0.0
    # How a timm network makes one vector of its positions: its own rule (for many ViTs a class token), or their mean.
    pool: Literal["own", "average"] = "own"


class TimmBackbone(nn.Module):
    """A timm network without its classifier."""

    net: Any  # timm's networks share no typed base
    transform: Any = None  # with loaded weights: PIL image or uint8 tensor -> what the network expects

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self._name, self._average = config.name, config.pool == "average"
        self.net = _timm_network(config.name.removeprefix("timm:"), config)
        if config.stem != "imagenet":
            _small_stem(self.net, config)
        if config.activation_checkpointing:
            self.net.set_grad_checkpointing(True)
        self.feature_dim: int = self.net.num_features

    def feature_map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim, h', w'): what the network averages, normalised at every position.

        A transformer's patch tokens are arranged as their patches are, row by row, without class and register tokens.
        A norm that the network applies to the pooled vector is applied to every position.

        Raises:
            UserError: the positions of the network's tokens are unknown.
        """
        y = self.net.forward_features(x)
        if isinstance(y, Tensor) and y.dim() == 3:
            prefix = getattr(self.net, "num_prefix_tokens", None)
            patches = y.shape[1] - (prefix or 0)
            rows = max(1, round(math.sqrt(patches * x.shape[2] / x.shape[3])))
            if prefix is not None and rows * (patches // rows) == patches:
                tokens = getattr(self.net, "fc_norm", nn.Identity())(y[:, prefix:])
                return tokens.transpose(1, 2).unflatten(2, (rows, -1))
        if not isinstance(y, Tensor) or y.dim() != 4:
            raise UserError(
                f"{self._name} has no feature map, which this method needs to cut its montages apart: use a ResNet, "
                "ConvNeXt, Swin or ViT backbone"
            )
        if y.shape[-1] == self.feature_dim != y.shape[1]:
            return y.permute(0, 3, 1, 2)  # Swin keeps the channels last
        return getattr(getattr(self.net, "head", None), "norm", nn.Identity())(y)  # ConvNeXt's

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `forward` and `feature_map`; a method calls one of them. Options: those of torch.compile."""
        super().compile(*args, **kwargs)
        self.feature_map = torch.compile(self.feature_map, *args, **kwargs)  # type: ignore[method-assign]

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """Four maps, fine to coarse: of the last four stages, or, all of one size, at each quarter of a transformer.

        Args:
            x: (b, 3, h, w); for a transformer h and w are multiples of its patch size.

        Raises:
            UserError: timm gives no inner maps of this network.
        """
        if not hasattr(self.net, "forward_intermediates"):
            raise UserError(f"timm gives no inner maps of {self._name}: use a ResNet, ConvNeXt, Swin or ViT backbone")
        scales = [stage["reduction"] for stage in self.net.feature_info]
        count, flat = len(scales), len(set(scales)) == 1
        levels = [count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)] if flat else list(range(count - 4, count))
        return list(self.net.forward_intermediates(x, indices=levels, output_fmt="NCHW", intermediates_only=True))

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim)."""
        return self.feature_map(x).mean(dim=(2, 3)) if self._average else self.net(x)


def _timm_network(name: str, config: BackboneConfig) -> Any:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(f"timm has no network {name!r}; did you mean {', '.join(near) or 'another name'}?")
    if config.width != 64:
        raise UserError(
            f"width={config.width} is for our own ResNets (resnet50, ...); {config.name} has its width in its name: "
            "use --backbone.width 64"
        )
    options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    if config.pool == "average":
        options["global_pool"] = ""  # none: the mean is taken over the normalised positions
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **timm_options(name), **options)
    except (TypeError, AssertionError, RuntimeError) as error:  # RuntimeError: a tag that timm does not know
        raise UserError(
            f"{config.name} cannot be built with drop_path={config.drop_path}, pool={config.pool}: {error}"
        ) from None


def timm_options(name: str) -> dict[str, Any]:
    """What makes a network of timm take crops of several sizes, as arguments of `timm.create_model`."""
    import timm

    if timm.models.is_model_in_modules(name, ["swin_transformer", "swin_transformer_v2"]):
        return {"strict_img_size": False}
    takes_any = not timm.models.is_model_in_modules(name, ["vision_transformer", "deit", "eva"])
    return {} if takes_any else {"dynamic_img_size": True}


def _small_stem(net: Any, config: BackboneConfig) -> None:
    """Replace the first layers of a timm ResNet by those of our ResNets with this stem."""
    first, pool = getattr(net, "conv1", None), getattr(net, "maxpool", None)
    if not (isinstance(first, nn.Conv2d) and first.kernel_size == (7, 7) and isinstance(pool, nn.MaxPool2d)):
        raise UserError(
            f"stem={config.stem} is for ResNets that start with a 7x7 convolution, and {config.name} does not: use "
            "--backbone.stem imagenet, or one of " + ", ".join(LAYERS)
        )
    net.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.MaxPool2d(2) if config.stem == "small-pool" else nn.Identity()


Backbone: TypeAlias = ResNet | TimmBackbone  # what methods and protocols use: feature_dim, feature_map(x), forward(x)

# Networks of other packages by name: a function of the config that returns a module with these three.
BACKBONES: Registry[Callable[[BackboneConfig], Any]] = Registry("backbones", {})


def build_backbone(config: BackboneConfig) -> Backbone:
    """A new network, initialised from torch's global generator.

    Raises:
        UserError: the name is unknown, a setting is out of range, or the network does not have it.
    """
    check_ranges(config, "backbone.")
    if config.name.startswith("timm:"):
        return TimmBackbone(config)
    if config.name in BACKBONES:
        network: Backbone = BACKBONES[config.name](config)
        return network
    if config.name not in LAYERS:
        raise UserError(
            f"unknown backbone {config.name!r}: use one of {', '.join(LAYERS)}, or timm:NAME for a network of timm"
            + _hint(config.name)
        )
    if config.drop_path:
        raise UserError(
            f"drop_path={config.drop_path} is for networks of timm: leave it out, or use timm:{config.name}"
        )
    return ResNet(config.name, config.width, config.stem, config.activation_checkpointing)


def _hint(name: str) -> str:
    import timm

    family, _, bare = name.rpartition(":")
    near = difflib.get_close_matches(bare, [*LAYERS, *timm.list_models()], 3)
    named = dict.fromkeys(n if n in LAYERS else f"timm:{n}" for n in near)
    also = "; torchvision's networks are timm's too, under other names" if family == "torchvision" else ""
    return also + (f"; did you mean {', '.join(named)}?" if named else "")


def try_backbone(config: BackboneConfig, images: Iterable[int], montages: Iterable[int]) -> None:
    """Refuse a network that a run could not train. Quick, because no number is computed (meta tensors).

    Args:
        config: of the network.
        images: sides, in pixels, of the images that become one vector each.
        montages: sides, in pixels, of those that become a feature map.

    Raises:
        UserError: it cannot be built, cannot take a size or has no feature map, or some of its parameters, or the
            vector by which it is evaluated, would not be trained.
    """
    with torch.device("meta"):
        net = build_backbone(replace(config, activation_checkpointing=False)).train()
    if isinstance(net, ResNet):
        return  # every size is possible
    montages = list(montages)
    if montages and getattr(getattr(net, "net", None), "global_pool", "") == "token":
        raise UserError(
            f"this method trains the positions of {config.name}, which is then evaluated by its class token: use "
            "--backbone.pool average"
        )
    for size, as_map in [*((size, True) for size in montages), *((size, False) for size in images)]:
        x = torch.empty(2, 3, size, size, device="meta")
        try:
            y = net.feature_map(x) if as_map else net(x)
            if as_map or not montages:
                y.sum().backward()
        except UserError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            if "meta tensor" in str(error):  # a network whose forward depends on values cannot be tried without them
                return
            raise UserError(f"{config.name} cannot take images of {size} x {size} pixels: {error}") from None
    idle = [name for name, p in net.named_parameters() if p.grad is None]
    if idle:
        remedy = "another network" if config.pool == "average" else "--backbone.pool average, or another network"
        raise UserError(
            f"{config.name} has parameters that this method would not train ({', '.join(idle[:3])}): use {remedy}"
        )
