"""Backbones by name: a run, imported or official weights, a pretrained network, or one at random init."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.machine import machine_bytes, size_in_words
from tessella.methods import MethodConfig, build_method
from tessella.methods.method import Method, Setting
from tessella.modules.backbone import Backbone, BackboneConfig, build_backbone
from tessella.run import checkpoints as checkpoint_files
from tessella.run.backbone_file import BackboneFile, read_backbone, tensors_sha256
from tessella.run.config import from_dict
from tessella.run.folder import RunFolder, eval_transform
from tessella.weights.imported import is_imported, read_imported
from tessella.weights.libraries import CONFIG, Pretrained, is_local, timm_folder, timm_network, torchvision_network
from tessella.weights.official import SETTING, Official, official_transform, read_official

_ACCEPTED = (
    "give a run folder, a folder of `tessella import` or `tessella export`, an official checkpoint or a ResNet's "
    "weights (.pth, .pth.tar, .pt, .torch, .safetensors), torchvision:NAME or timm:NAME for a pretrained network, "
    "timm:FOLDER or timm:NAME=FILE for one that is here, or random:NAME (for example random:resnet18, or "
    "random:resnet18?stem=small&width=32&size=32)"
)
_BACKBONE = "backbone."


class Weights(NamedTuple):
    """The content of a source, before a network is built."""

    name: str
    backbone: BackboneConfig
    tensors: dict[str, Tensor]  # under the names of a method's state; the network's under `backbone.`
    transform: EvalTransform
    method: MethodConfig | None = None  # None: there is none that could assign images to clusters
    setting: Setting = SETTING
    strict: bool = True  # whether `tensors` are the method's whole state; an import may lack parts of it


class Loaded(NamedTuple):
    """A backbone and what is needed to evaluate it."""

    backbone: Any  # a Backbone, or any module with feature_dim
    config: BackboneConfig
    transform: EvalTransform
    method: Method | None  # with its prototypes, when the source has them
    name: str


def resolve_backbone(spec: str, *, image_size: int | None = None, seed: int = 0) -> Loaded:
    """The backbone that `spec` names. Only torchvision:NAME and timm:NAME are downloaded, unless they are in a cache.

    Args:
        spec: RUN | IMPORTED | EXPORTED | FILE | torchvision:NAME | timm:NAME | timm:FOLDER | timm:NAME=FILE |
            random:NAME[?width=..&stem=..&size=..].
        image_size: pixels of the evaluated crop; default: the run's or the network's, or 224.
        seed: of a random initialisation.

    Raises:
        UserError: there is nothing of that name, or it does not fit.
    """
    if spec.startswith("random:"):
        return _random(spec, image_size, seed)
    weights = read_weights(spec, image_size=image_size)
    net = {k.removeprefix(_BACKBONE): v for k, v in weights.tensors.items() if k.startswith(_BACKBONE)}
    backbone = build_backbone(weights.backbone)
    _load(backbone, net, weights)
    backbone.transform = weights.transform
    return Loaded(backbone, weights.backbone, weights.transform, _method_of(weights), weights.name)


def loaded_module(module: nn.Module, image_size: int | None = None) -> Loaded:
    """A network that the caller has built.

    Args:
        module: maps (b, 3, h, w) to features (b, d); its `transform` resizes and normalises images. Without one: 224
            pixels (or `image_size`), ImageNet's mean and std.
        image_size: pixels of the evaluated crop; default: the transform's.

    Raises:
        UserError: it does not give one vector per image.
    """
    transform = getattr(module, "transform", None)
    if not isinstance(transform, EvalTransform):
        transform = EvalTransform.of(image_size or 224)
    elif image_size is not None:
        transform = transform.at(image_size)
    module = module.eval()
    if not isinstance(getattr(module, "feature_dim", None), int):
        weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
        with torch.no_grad():
            y = module(torch.zeros(2, 3, transform.size, transform.size, dtype=weight.dtype, device=weight.device))
        if not isinstance(y, Tensor) or y.dim() != 2 or len(y) != 2:
            what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise UserError(
                f"{type(module).__name__} gives {what} for 2 images: it must give one vector per image, (2, d); remove "
                "its classifier, or give it a forward that pools"
            )
        setattr(module, "feature_dim", y.shape[1])  # noqa: B010  (a plain attribute, which torch types as a tensor)
    return Loaded(module, BackboneConfig(type(module).__name__), transform, None, type(module).__name__)


def read_weights(spec: str, *, image_size: int | None = None, download: bool = True) -> Weights:
    """The tensors that `spec` names, with network and transform; arguments and errors as in `resolve_backbone`.

    With `download=False`, a pretrained network by name is refused, even if it is in a cache.
    """
    path = Path(spec)
    library, _, network = spec.partition(":")
    if not download and (library == "torchvision" or (library == "timm" and not is_local(network))):
        raise UserError(f"{spec} may need a download, and only the run names it: give --init-from {spec} to allow it")
    if library == "torchvision":
        return _described(torchvision_network(network), spec, image_size)
    if library == "timm":
        return _described(timm_network(network), spec, image_size)
    if path.is_dir():
        return _folder(path, image_size)
    if path.exists():
        return _file(path, image_size)
    raise UserError(f"{spec!r} names no backbone: {_ACCEPTED}")


def random_twin(loaded: Loaded, seed: int) -> Loaded:
    """The same network at random init, as a baseline."""
    backbone = _initialised(loaded.config, seed)
    backbone.transform = loaded.transform
    return loaded._replace(backbone=backbone, method=None, name=f"random init, seed {seed}")


def weights_sha256(module: nn.Module) -> str:
    """Hash of every tensor's name, type, shape and bytes."""
    return tensors_sha256(module.state_dict())


def _initialised(config: BackboneConfig, seed: int) -> Backbone:
    """A network at random init, a function of the seed; torch's global generator is left unchanged.

    Raises:
        UserError: the machine has less memory than its weights need.
    """
    with torch.device("meta"):  # takes no memory
        needed = sum(tensor.nbytes for tensor in build_backbone(config).state_dict().values())
    available = machine_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"{config.name} of width {config.width} has weights of {size_in_words(needed)}, and this machine has "
            f"{size_in_words(available)} of memory: make it narrower"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(config)


def _method_of(weights: Weights) -> Method | None:
    if weights.method is None:
        return None
    method = build_method(weights.method, build_backbone(weights.backbone), weights.setting)
    _load(method, weights.tensors, weights)
    return method.eval()


def _load(module: nn.Module, tensors: dict[str, Tensor], weights: Weights) -> None:
    try:
        module.load_state_dict(tensors, strict=weights.strict)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition(":\n")[2], 200)
        raise UserError(
            f"the weights of {weights.name} do not fit its settings, {weights.backbone.name}: {reason}"
        ) from None


def _folder(path: Path, image_size: int | None) -> Weights:
    if is_imported(path):
        return _official(read_imported(path), path.name, image_size)
    if not (path / "config.yaml").exists():  # no run
        if (path / CONFIG).is_file():
            return _described(timm_folder(path), path.name, image_size)
        if (path / "backbone.safetensors").is_file():
            return _file(path / "backbone.safetensors", image_size)
    return _run(path, image_size)


def _run(path: Path, image_size: int | None) -> Weights:
    """The newest checkpoint, whose heads belong to the backbone; without one, backbone.safetensors."""
    run, config = RunFolder.open(path)
    transform = eval_transform(config if image_size is None else replace(config, image_size=image_size))
    newest = checkpoint_files.load_newest(run.checkpoints)
    if newest is not None:
        tensors = newest[1].get("method", {})
        setting = Setting(0, config.batch_size // config.accumulate, config.seed, config.accumulate)
        return Weights(path.name, config.backbone, tensors, transform, config.method, setting)
    if not run.backbone.exists():
        raise UserError(f"{path} holds no weights yet: let the run reach its first checkpoint")
    product = read_backbone(run.backbone)
    if product is None or product.backbone != config.backbone:
        raise UserError(f"{run.backbone} is not the network of config.yaml beside it: restore both from one copy")
    return _described(product, path.name, None)._replace(transform=transform)


def _file(path: Path, image_size: int | None) -> Weights:
    product = read_backbone(path) if path.suffix == ".safetensors" else None
    if product is not None:
        return _described(product, path.name, image_size)
    return _official(read_official(path), path.name, image_size)


def _described(network: BackboneFile | Pretrained, name: str, image_size: int | None) -> Weights:
    """A network whose transform is known."""
    transform = network.transform if image_size is None else network.transform.at(image_size)
    tensors = {_BACKBONE + key: tensor for key, tensor in network.tensors.items()}
    return Weights(name, network.backbone, tensors, transform)


def _official(official: Official, name: str, image_size: int | None) -> Weights:
    transform = official_transform(official, image_size)
    method = official.method if official.whole else None
    return Weights(name, official.backbone, official.tensors, transform, method, strict=False)


def _random(spec: str, image_size: int | None, seed: int) -> Loaded:
    name, _, query = spec.removeprefix("random:").partition("?")
    options: dict[str, object] = {k: int(v) if v.isdecimal() and len(v) < 10 else v for k, v in parse_qsl(query)}
    size = options.pop("size", None)
    if size is not None and not isinstance(size, int):
        raise UserError(f"size={size} in {spec!r} is not a number of pixels")
    config = from_dict(BackboneConfig, {"name": name, **options}, spec)
    backbone, transform = _initialised(config, seed), EvalTransform.of(image_size or size or 224)
    backbone.transform = transform
    return Loaded(backbone, config, transform, None, f"{spec}, seed {seed}")
