"""Backbones by name: a run, a weights file, or a network at random init."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD
from tessella.engine import checkpoint_files
from tessella.engine.config import RunConfig, from_dict
from tessella.engine.run_folder import RunFolder
from tessella.errors import UserError
from tessella.methods import build_method, views_of
from tessella.methods.method import Method, Setting
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.modules.resnet import LAYERS
from tessella.protocols.features import EvalTransform

_ACCEPTED = (
    "give a run folder, a .safetensors file of a ResNet, or random:NAME (for example random:resnet18, or "
    "random:resnet18?stem=small&width=32&size=32)"
)


class Loaded(NamedTuple):
    """A backbone and what is needed to evaluate it."""

    backbone: Any  # a Backbone, or any module with feature_dim
    config: BackboneConfig
    transform: EvalTransform
    method: Method | None  # with its prototypes, when a run's checkpoint is there
    name: str


def resolve_backbone(spec: str, *, image_size: int | None = None, seed: int = 0) -> Loaded:
    """The backbone that `spec` names.

    Args:
        spec: RUN | WEIGHTS.safetensors | random:NAME[?width=..&stem=..&size=..].
        image_size: pixels of the evaluated crop; default: the run's, or 224.
        seed: of a random initialisation.

    Raises:
        UserError: nothing of that name, or it does not fit.
    """
    path = Path(spec)
    if spec.startswith("random:"):
        return _random(spec, image_size, seed)
    if path.is_dir():
        return _from_run(path, image_size)
    if path.suffix == ".safetensors" and path.is_file():
        return _from_file(path, image_size)
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


def _from_run(path: Path, image_size: int | None) -> Loaded:
    run, config = RunFolder.open(path)
    method = _method_of(run, config)
    if run.backbone.exists():
        tensors = _read(run.backbone)
    elif method is not None:
        tensors = dict(method.backbone.state_dict())
    else:
        raise UserError(f"{path} holds no weights yet: let the run reach its first checkpoint")
    backbone = build_backbone(config.backbone)
    backbone.load_state_dict(tensors, strict=True)
    spec = views_of(config.method)
    transform = EvalTransform.of(image_size or config.image_size, mean=spec.mean, std=spec.std)
    return Loaded(backbone, config.backbone, transform, method, path.name)


def _method_of(run: RunFolder, config: RunConfig) -> Method | None:
    newest = checkpoint_files.newest(run.checkpoints)
    if newest is None:
        return None
    tensors, _ = checkpoint_files.load(newest)
    setting = Setting(0, config.batch_size // config.accumulate, config.seed, config.accumulate)
    method = build_method(config.method, build_backbone(config.backbone), setting)
    method.load_state_dict(tensors["method"], strict=True)
    return method.eval()


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


def _from_file(path: Path, image_size: int | None) -> Loaded:
    tensors = _read(path)
    config = infer_resnet(tensors, path.name)
    backbone = build_backbone(config)
    backbone.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("fc.")}, strict=True)
    size = image_size or (32 if config.stem == "small" else 224)
    return Loaded(backbone, config, EvalTransform.of(size, mean=IMAGENET_MEAN, std=IMAGENET_STD), None, path.name)


def infer_resnet(tensors: dict[str, Tensor], name: str) -> BackboneConfig:
    """Which ResNet a state dict in torchvision's key layout belongs to, from its keys and shapes.

    Raises:
        UserError: none that is known here.
    """
    blocks = [len({k.split(".")[1] for k in tensors if re.match(rf"layer{s}\.\d+\.", k)}) for s in (1, 2, 3, 4)]
    expansion = 4 if "layer1.0.conv3.weight" in tensors else 1
    for resnet, (block, depths) in LAYERS.items():
        if list(depths) == blocks and block.expansion == expansion and "conv1.weight" in tensors:
            width, _, kernel, _ = tensors["conv1.weight"].shape
            return BackboneConfig(resnet, width, "small" if kernel == 3 else "imagenet")
    raise UserError(
        f"{name} does not hold a ResNet in torchvision's key layout (conv1.weight, layer1.0...): {_ACCEPTED}"
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
