"""Weights for networks that other libraries define: timm and transformers (hub), torchvision; and tensors alone."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tessella import files
from tessella.data.transform import EvalTransform
from tessella.formats import convert_resnet
from tessella.formats.check import LIMIT, Pictures, Reader, relative_difference
from tessella.formats.model import FEATURES, PROBABILITIES, Head, Model
from tessella.modules.backbone import BackboneConfig, TimmBackbone, build_backbone, timm_options
from tessella.modules.resnet import LAYERS
from tessella.run.backbone_file import read_backbone, write_backbone
from tessella.weights.files import read_file
from tessella.weights.libraries import CONFIG, OWN_FACTS, WEIGHTS

TORCHVISION = "torchvision.pth"
TENSORS, DESCRIPTION, HEAD = "backbone.safetensors", "backbone.json", "head.safetensors"


def _other_resnet(config: BackboneConfig, library: str) -> str:
    """Why a library has no such ResNet; empty if it has."""
    if config.width != 64:
        return f"{library} has {config.name} of width 64 only, and this one is {config.width} wide"
    return f"{library} has no {config.name} with a {config.stem} stem" if config.stem != "imagenet" else ""


def _no_unit_length(library: str) -> str:
    return (
        f"{library}'s networks do not scale features to unit length before they classify, as this classifier does; its "
        "backbone.safetensors can be exported alone"
    )


def _reader(net: Callable[[Tensor], Tensor], model: Model) -> Reader:
    """What a library's network gives: features or, with a classifier, logits."""

    def read(images: Pictures) -> Mapping[str, Tensor]:
        with torch.no_grad():
            given = net(images.inputs)
        return {FEATURES: given} if model.head is None else {PROBABILITIES: given.softmax(dim=1)}

    return read


# --- timm and transformers ----------------------------------------------------------------------------------


class _TimmNetwork(NamedTuple):
    """A network as timm makes it, with our weights."""

    architecture: str
    arguments: dict[str, Any]  # of `timm.create_model`
    net: Any


def hub_refusal(model: Model) -> str:
    """Why timm cannot carry a model; empty if it can."""
    name = model.config.name
    if model.head is not None and model.head.unit:
        return _no_unit_length("timm")
    if model.transform.fit == "shorter side, then both":
        return "timm cannot resize images twice, as its transform does"
    if not name.startswith("timm:") and name not in LAYERS:
        return f"timm has no network {name!r}"
    if refused := _other_resnet(model.config, "timm"):
        return refused
    if model.config.pool == "own" or _as_timm(model):
        return ""
    return f"timm does not pool as this network does (pool={model.config.pool})"


def write_hub(model: Model, folder: Path) -> None:
    """Write the weights and `config.json` as timm and transformers read them."""
    made = _as_timm(model)
    assert made is not None, "hub_refusal says so"
    classes = [] if model.head is None else list(model.head.classes)
    kept = ("fixed_input_size", "pool_size", "first_conv", "classifier")
    own = {key: made.net.pretrained_cfg.get(key) for key in kept}
    config = {
        "architecture": made.architecture,
        "num_classes": len(classes),
        "num_features": model.backbone.feature_dim,
        **({"label_names": classes} if classes else {}),
        "model_args": made.arguments,
        "pretrained_cfg": own | _timm_transform(model.transform) | {"num_classes": len(classes)},
        OWN_FACTS: model.facts(),
    }
    files.write_tensors(folder / WEIGHTS[0], dict(made.net.state_dict()), {"format": "pt"})  # transformers asks for it
    files.write_json(folder / CONFIG, config)


def read_hub(model: Model, folder: Path) -> dict[str, Reader]:
    """The networks that timm and transformers make of the folder."""
    import timm
    import transformers

    net: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    kind = transformers.AutoModel if model.head is None else transformers.AutoModelForImageClassification
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        whole = kind.from_pretrained(folder, local_files_only=True).eval()

    def by_transformers(images: Tensor) -> Tensor:
        given = whole(images)
        return given.pooler_output.flatten(1) if model.head is None else given.logits

    return {"timm": _reader(net, model), "transformers": _reader(by_transformers, model)}


def _as_timm(model: Model) -> _TimmNetwork | None:
    """The network as timm's own, or None if timm has no equal one."""
    import timm

    name = model.config.name.removeprefix("timm:").partition(".")[0]
    state = model.backbone.state_dict()
    arguments: dict[str, Any] = {}
    choices: list[dict[str, Any]] = [{}]
    if isinstance(model.backbone, TimmBackbone):
        state = {key.removeprefix("net."): value for key, value in state.items()}
        arguments = timm_options(name)
        if model.config.pool == "average":  # timm's avg is the same where its norm stands before the mean
            choices = [{"global_pool": "avg", "fc_norm": False}, {"global_pool": "avg"}]
    elif name == "resnet10":
        name, choices = "resnet18", [{"layers": [1, 1, 1, 1]}]
    for choice in choices:
        with contextlib.suppress(RuntimeError, TypeError):  # other tensors; no such argument
            net: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments, **choice).eval()
            net.load_state_dict(state, strict=True)
            if arguments:  # else timm builds the network for the transform's size, with other position embeddings
                arguments["img_size"] = list(net.patch_embed.img_size)
            if model.config.pool == "own" or _gives_same(net, model):
                net = net if model.head is None else _with_head(net, model.head)
                return _TimmNetwork(name, arguments | choice, net)
    return None


def _gives_same(net: nn.Module, model: Model) -> bool:
    side = model.transform.size
    x = torch.arange(2.0 * 3 * side * side).sin().reshape(2, 3, side, side)
    with torch.no_grad():
        return relative_difference(model.backbone(x), net(x)) <= LIMIT


def _with_head(net: Any, head: Head) -> Any:
    net.reset_classifier(len(head.classes))
    net.get_classifier().load_state_dict(dict(zip(("weight", "bias"), head.calibrated, strict=True)))
    return net.eval()


def _timm_transform(transform: EvalTransform) -> dict[str, Any]:
    """As timm's evaluation has it, which resizes to floor(size / crop_pct)."""
    crop_pct = transform.size / transform.resize
    while math.floor(transform.size / crop_pct) < transform.resize:  # the quotient was rounded up
        crop_pct = math.nextafter(crop_pct, 0)
    return {
        "input_size": [3, transform.size, transform.size],
        "interpolation": transform.interpolation,
        "crop_pct": crop_pct,
        "crop_mode": "squash" if transform.fit == "both sides" else "center",
        "mean": list(transform.mean),
        "std": list(transform.std),
    }


# --- torchvision --------------------------------------------------------------------------------------------


def torchvision_refusal(model: Model) -> str:
    """Why torchvision cannot carry a model; empty if it can."""
    name = model.config.name
    if model.head is not None and model.head.unit:
        return _no_unit_length("torchvision")
    if name not in LAYERS or name == "resnet10":
        return f"torchvision has no ResNet {name!r}"
    return _other_resnet(model.config, "torchvision")


def write_torchvision(model: Model, folder: Path) -> None:
    """Write the state of torchvision's ResNet, and the script that turns it into the layouts of others."""
    state = dict(model.backbone.state_dict())
    if model.head is not None:
        state["fc.weight"], state["fc.bias"] = model.head.calibrated
    with files.writing(folder / TORCHVISION) as file:
        torch.save(files.owned_tensors(state), file)
    _write_converter(folder)


def read_torchvision(model: Model, folder: Path) -> dict[str, Reader]:
    """The network that torchvision makes of the file."""
    import torchvision

    net = torchvision.models.get_model(model.config.name, weights=None)
    net.fc = nn.Identity() if model.head is None else nn.Linear(model.backbone.feature_dim, len(model.head.classes))
    net.load_state_dict(read_file(folder / TORCHVISION), strict=True)
    return {"torchvision": _reader(net.eval(), model)}


def converts(model: Model) -> bool:
    """Whether `convert_resnet.py` can turn the weights into the layouts of detectron2 and OpenMMLab."""
    return model.config.name in LAYERS


def _write_converter(folder: Path) -> None:
    source = Path(convert_resnet.__file__)
    if not (folder / source.name).exists():  # of another format
        files.write_text(folder / source.name, source.read_text(encoding="utf-8"))


# --- tensors ------------------------------------------------------------------------------------------------


def write_safetensors(model: Model, folder: Path) -> None:
    """Write the network as a run does, and its description as JSON; a classifier's head beside it."""
    write_backbone(folder / TENSORS, dict(model.backbone.state_dict()), model.config, model.transform, {})
    files.write_json(folder / DESCRIPTION, model.facts())
    if model.head is not None:
        files.write_tensors(folder / HEAD, {"weight": model.head.weight, "bias": model.head.bias}, {"format": "pt"})
    if converts(model):
        _write_converter(folder)


def read_safetensors(model: Model, folder: Path) -> dict[str, Reader]:
    """The network as `load_backbone` makes it of the file."""
    file = read_backbone(folder / TENSORS)
    assert file is not None
    net = build_backbone(file.backbone)
    net.load_state_dict(file.tensors, strict=True)
    return {"safetensors": _reader(net.eval(), model._replace(head=None))}
