"""Pretrained networks of torchvision and timm: by name, which may download, or from a local copy.

Each has the library's own transform: resize, crop, interpolation, mean and std.
"""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.files import read_json
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.modules.resnet import LAYERS
from tessella.run.config import from_dict
from tessella.weights.files import read_file
from tessella.weights.official import infer_resnet, unwrap

CONFIG = "config.json"  # of a folder that timm writes
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # beside it
OWN_FACTS = "tessella"  # in config.json, if `tessella export` wrote it
_MOST_BYTES = 1 << 20  # of config.json
_WITHOUT_LABELS = ("dino", "mae", "swav", "moco", "ijepa")  # in names of networks: features for any kind of image


class Pretrained(NamedTuple):
    """A network's weights and the transform of its images."""

    backbone: BackboneConfig
    tensors: dict[str, Tensor]  # state of our backbone
    transform: EvalTransform


def torchvision_network(name: str) -> Pretrained:
    """A ResNet with torchvision's best weights, which were trained with labels.

    Raises:
        UserError: torchvision has no such ResNet, or its weights cannot be loaded.
    """
    if name not in LAYERS:
        raise UserError(
            f"torchvision:{name} is not one of {', '.join(LAYERS)}; most other networks are in timm: timm:NAME"
        )
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state, theirs = weights.get_state_dict(progress=False), weights.transforms()
    except Exception as error:  # downloads raise errors of many types
        raise UserError(_cannot_load(f"torchvision:{name}", error)) from None
    tensors = {key: value for key, value in state.items() if not key.startswith("fc.")}
    size, resize, how = theirs.crop_size[0], theirs.resize_size[0], theirs.interpolation.value
    transform = EvalTransform(size, resize, tuple(theirs.mean), tuple(theirs.std), interpolation=how)
    return Pretrained(infer_resnet(tensors, f"torchvision:{name}"), tensors, transform)


def timm_network(spec: str) -> Pretrained:
    """A network of timm with its weights.

    Args:
        spec: NAME of the library, perhaps with a tag as in `resnet50.a1_in1k`, which downloads the weights if they
            are not in its cache; or a local FOLDER that timm wrote (config.json and weights), a weights FILE in such
            a folder, or NAME=FILE.

    Raises:
        UserError: there is no such network or file, they do not fit, or the weights cannot be loaded.
    """
    import timm

    name, _, file = spec.partition("=")
    if file:
        return _timm_of_file(name, Path(file), {})
    path = Path(name)
    if not timm.is_model(name) and path.exists():
        return timm_folder(path)
    _refuse_unknown(name)
    try:
        net: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of a download, or a RuntimeError that no pretrained weights exist
        raise UserError(_cannot_load(f"timm:{name}", error)) from None
    return _timm_pretrained(name, net.state_dict(), timm.data.resolve_data_config(model=net))


def is_local(spec: str) -> bool:
    """Whether an argument of `timm_network` is a local file or folder, so that nothing is downloaded."""
    import timm

    name, _, file = spec.partition("=")
    return bool(file) or (not timm.is_model(name) and Path(name).exists())


def kept_networks() -> list[str]:
    """Names of pretrained networks whose weights the libraries' caches hold, those trained without labels first.

    `resolve_backbone` opens each without the network.
    """
    import huggingface_hub
    import timm
    import torchvision

    found = []
    for folder in sorted(Path(huggingface_hub.constants.HF_HUB_CACHE).glob("models--timm--*")):
        name = folder.name.removeprefix("models--timm--")
        file = huggingface_hub.try_to_load_from_cache(f"timm/{name}", WEIGHTS[0])
        if isinstance(file, str) and timm.is_model(name):
            found.append(f"timm:{name}={file}")
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    for name in set(LAYERS) & set(torchvision.models.list_models()):
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        if (checkpoints / url.rpartition("/")[2]).is_file():
            found.append(f"torchvision:{name}")
    return sorted(found, key=lambda name: (not any(word in name for word in _WITHOUT_LABELS), name))


def timm_folder(path: Path) -> Pretrained:
    """The network in a folder that timm or `tessella export` wrote, or in a weights file beside its config.json.

    Raises:
        UserError: it is none, or its weights do not fit.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_file() and not (folder / CONFIG).is_file():
        raise UserError(f"{path} does not name its network: give timm:NAME={path}")
    config = read_json(folder / CONFIG, _MOST_BYTES)
    name = config.get("architecture") if isinstance(config, dict) else None
    facts = config.get("pretrained_cfg", {}) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(facts, dict):
        raise UserError(f"{folder / CONFIG} is not a config.json of timm: it names no architecture")
    files = [path] if path.is_file() else [folder / file for file in WEIGHTS if (folder / file).is_file()]
    if not files:
        raise UserError(f"{folder} holds no weights of timm: expected {' or '.join(WEIGHTS)}")
    own = config.get(OWN_FACTS)
    if isinstance(own, dict):
        return _exported(files[0], own)
    return _timm_of_file(name, files[0], facts)


def _exported(file: Path, facts: Mapping[str, Any]) -> Pretrained:
    """What `tessella export` wrote, with its own network and transform."""
    backbone = from_dict(BackboneConfig, facts.get("architecture"), f"{OWN_FACTS}.architecture of {file.parent}")
    transform = from_dict(EvalTransform, facts.get("transform"), f"{OWN_FACTS}.transform of {file.parent}")
    prefix = "net." if backbone.name.startswith("timm:") else ""
    with torch.device("meta"):
        names = build_backbone(backbone).state_dict()  # without a classifier
    tensors = {prefix + key: value for key, value in read_file(file).items() if prefix + key in names}
    return Pretrained(backbone, tensors, transform)


def _timm_of_file(name: str, file: Path, facts: Mapping[str, Any]) -> Pretrained:
    """Read the file here, because timm would unpickle it; timm converts and loads the tensors, strictly."""
    import timm

    _refuse_unknown(name)
    state = unwrap(read_file(file), file.name).tensors
    try:
        known = timm.get_pretrained_cfg(name)
        heads = (known and known.classifier) or ()
        rows = [state.get(f"{head}.weight") for head in ((heads,) if isinstance(heads, str) else heads)]
        # With the file's number of classes, timm requires every tensor; with another, it drops the classifier.
        classes = next((weight.shape[0] for weight in rows if weight is not None and weight.dim()), 0)
        overlay = {"state_dict": state, "num_classes": classes}
        net: Any = timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
        with torch.device("meta"):
            headless = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
        whole, cfg = net.state_dict(), timm.data.resolve_data_config(model=net)
    except Exception as error:  # timm's filters raise errors of many types for foreign tensors
        raise UserError(
            f"{file} does not hold the weights of timm:{name} ({_short(error)}): is it that network?"
        ) from None
    return _timm_pretrained(name, {key: whole[key] for key in headless}, cfg | dict(facts))


def _timm_pretrained(name: str, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Pretrained:
    tensors = {f"net.{key}": value for key, value in state.items()}
    return Pretrained(BackboneConfig(f"timm:{name}"), tensors, _timm_transform(name, facts))


def _timm_transform(name: str, facts: Mapping[str, Any]) -> EvalTransform:
    """The transform of timm's own evaluation, but without padding: its crop is limited to the image."""
    try:
        size = int(facts["input_size"][-1])
        resize = max(size, math.floor(size / float(facts["crop_pct"] or 1.0)))
        squash = facts["crop_mode"] == "squash"
        values = {
            "size": size,
            "resize": resize,
            "mean": facts["mean"],
            "std": facts["std"],
            "fit": "both sides" if squash else "shorter side",
            "interpolation": facts["interpolation"],
        }
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise UserError(f"timm:{name} has no usable transform in its configuration ({_short(error)})") from None
    return from_dict(EvalTransform, values, f"transform of timm:{name}")


def _refuse_unknown(name: str) -> None:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(
            f"timm has no network {name!r}; did you mean {', '.join(near) or 'another name'}? A folder or file of that "
            "name is not there either"
        )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 160)}"


def _cannot_load(what: str, error: Exception) -> str:
    return (
        f"the weights of {what} cannot be loaded ({_short(error)}). Without an internet connection, download them on "
        "another machine and copy the library's cache folder (TORCH_HOME, HF_HOME), or give local weights with "
        "timm:FOLDER or timm:NAME=FILE. random:NAME is a network without weights"
    )
