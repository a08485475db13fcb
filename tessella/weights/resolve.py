"""Backbones by name: a run, imported or official weights, a pretrained network, or one at random init."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from tessella.data.transform import EvalTransform
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD
from tessella.errors import UserError
from tessella.methods import MethodConfig, build_method, views_of
from tessella.methods.method import Method, Setting
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.run import checkpoints as checkpoint_files
from tessella.run.config import from_dict
from tessella.run.folder import RunFolder
from tessella.weights.files import read_file
from tessella.weights.imported import is_imported, read_imported
from tessella.weights.libraries import Pretrained, timm_network, torchvision_network
from tessella.weights.official import SETTING, Official, read_official

_ACCEPTED = (
    "give a run folder, a folder of `tessella import`, an official checkpoint or a ResNet's weights (.pth, .pth.tar, "
    ".pt, .torch, .safetensors), torchvision:NAME or timm:NAME for a pretrained network, or random:NAME (for example "
    "random:resnet18, or random:resnet18?stem=small&width=32&size=32)"
)
_BACKBONE = "backbone."


class Weights(NamedTuple):
    """What a source holds, before any network is built."""

    name: str
    backbone: BackboneConfig
    tensors: dict[str, Tensor]  # under the names of a method's state; `backbone.` first
    transform: EvalTransform
    method: MethodConfig | None = None  # None: there is none that could assign images to clusters
    setting: Setting = SETTING
    strict: bool = True  # whether `tensors` are the method's whole state; an import may start parts of it anew


class Loaded(NamedTuple):
    """A backbone and what is needed to evaluate it."""

    backbone: Any  # a Backbone, or any module with feature_dim
    config: BackboneConfig
    transform: EvalTransform
    method: Method | None  # with its prototypes, when the source has them
    name: str


def resolve_backbone(spec: str, *, image_size: int | None = None, seed: int = 0) -> Loaded:
    """The backbone that `spec` names.

    Args:
        spec: RUN | IMPORTED | FILE | torchvision:NAME | timm:NAME | random:NAME[?width=..&stem=..&size=..].
        image_size: pixels of the evaluated crop; default: the run's or the network's, or 224.
        seed: of a random initialisation.

    Raises:
        UserError: nothing of that name, or it does not fit.
    """
    if spec.startswith("random:"):
        return _random(spec, image_size, seed)
    weights = read_weights(spec, image_size=image_size)
    net = {k.removeprefix(_BACKBONE): v for k, v in weights.tensors.items() if k.startswith(_BACKBONE)}
    backbone = build_backbone(weights.backbone)
    backbone.load_state_dict(net, strict=True)
    return Loaded(backbone, weights.backbone, weights.transform, _method_of(weights), weights.name)


def read_weights(spec: str, *, image_size: int | None = None) -> Weights:
    """The tensors that `spec` names, and what they belong to; arguments and errors as in `resolve_backbone`."""
    path = Path(spec)
    library, _, network = spec.partition(":")
    if library == "torchvision":
        return _from_library(torchvision_network(network), spec, image_size)
    if library == "timm":
        return _from_library(timm_network(network), spec, image_size)
    if path.is_dir():
        return _official(read_imported(path), path.name, image_size) if is_imported(path) else _run(path, image_size)
    if path.is_file():
        return _official(read_official(path), path.name, image_size)
    raise UserError(f"{spec!r} names no backbone: {_ACCEPTED}")


def random_twin(loaded: Loaded, seed: int) -> Loaded:
    """The same network at random init: the baseline of every figure."""
    torch.manual_seed(seed)
    return loaded._replace(backbone=build_backbone(loaded.config), method=None, name=f"random init, seed {seed}")


def weights_sha256(module: nn.Module) -> str:
    """Hash of every tensor's name and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _method_of(weights: Weights) -> Method | None:
    if weights.method is None:
        return None
    method = build_method(weights.method, build_backbone(weights.backbone), weights.setting)
    method.load_state_dict(weights.tensors, strict=weights.strict)
    return method.eval()


def _run(path: Path, image_size: int | None) -> Weights:
    """The newest checkpoint, where the heads fit the backbone; without one, the product."""
    run, config = RunFolder.open(path)
    spec = views_of(config.method)
    transform = EvalTransform.of(image_size or config.image_size, mean=spec.mean, std=spec.std)
    newest = checkpoint_files.newest(run.checkpoints)
    if newest is not None:
        tensors, _ = checkpoint_files.load(newest)
        setting = Setting(0, config.batch_size // config.accumulate, config.seed, config.accumulate)
        return Weights(path.name, config.backbone, tensors["method"], transform, config.method, setting)
    if run.backbone.exists():
        net = {_BACKBONE + name: tensor for name, tensor in read_file(run.backbone).items()}
        return Weights(path.name, config.backbone, net, transform)
    raise UserError(f"{path} holds no weights yet: let the run reach its first checkpoint")


def _official(official: Official, name: str, image_size: int | None) -> Weights:
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if official.method is not None:  # SwAV normalises a little differently
        mean, std = views_of(official.method).mean, views_of(official.method).std
    size = image_size or (224 if official.backbone.stem == "imagenet" else 32)
    transform = EvalTransform.of(size, mean=mean, std=std)
    method = official.method if official.whole else None
    return Weights(name, official.backbone, official.tensors, transform, method, strict=False)


def _from_library(network: Pretrained, name: str, image_size: int | None) -> Weights:
    transform = EvalTransform.of(image_size or network.image_size, mean=network.mean, std=network.std)
    tensors = {_BACKBONE + key: tensor for key, tensor in network.tensors.items()}
    return Weights(name, network.backbone, tensors, transform)


def _random(spec: str, image_size: int | None, seed: int) -> Loaded:
    name, _, query = spec.removeprefix("random:").partition("?")
    options: dict[str, object] = {k: int(v) if v.isdigit() else v for k, v in parse_qsl(query)}
    size = options.pop("size", None)
    if size is not None and not isinstance(size, int):
        raise UserError(f"size={size} in {spec!r} is not a number of pixels")
    config = from_dict(BackboneConfig, {"name": name, **options}, spec)
    torch.manual_seed(seed)
    transform = EvalTransform.of(image_size or size or 224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return Loaded(build_backbone(config), config, transform, None, f"{spec}, seed {seed}")
