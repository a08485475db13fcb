"""Pretrained networks by name, from the libraries that publish them; they download, and keep what they have."""

from __future__ import annotations

import difflib
import textwrap
from typing import Any, NamedTuple

from torch import Tensor

from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD
from tessella.errors import UserError
from tessella.modules.backbone import BackboneConfig
from tessella.modules.resnet import LAYERS
from tessella.weights.official import infer_resnet


class Pretrained(NamedTuple):
    """A network's weights and the images that it expects."""

    backbone: BackboneConfig
    tensors: dict[str, Tensor]  # state of our backbone
    image_size: int  # pixels
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def torchvision_network(name: str) -> Pretrained:
    """A ResNet with torchvision's best weights. They were trained with labels.

    Raises:
        UserError: torchvision has no such ResNet, or its weights cannot be had.
    """
    if name not in LAYERS:
        raise UserError(
            f"torchvision:{name} is none of the networks that are taken from torchvision "
            f"({', '.join(LAYERS)}); timm has most others: timm:NAME"
        )
    import torchvision

    try:
        state = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    except Exception as error:  # whatever a download says
        raise UserError(_not_there(f"torchvision:{name}", error)) from None
    tensors = {key: value for key, value in state.items() if not key.startswith("fc.")}
    return Pretrained(infer_resnet(tensors, f"torchvision:{name}"), tensors, 224, IMAGENET_MEAN, IMAGENET_STD)


def timm_network(name: str) -> Pretrained:
    """A network of timm with its weights; a name may have a tag, as in `resnet50.a1_in1k`.

    Raises:
        UserError: timm has no such network or no weights for it, or they cannot be had.
    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(f"timm has no network {name!r}; did you mean {', '.join(near) or 'another name'}?")
    try:
        net: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever a download says; "no pretrained weights exist" is a RuntimeError too
        raise UserError(_not_there(f"timm:{name}", error)) from None
    facts = timm.data.resolve_data_config(model=net)
    tensors = {f"net.{key}": value for key, value in net.state_dict().items()}
    return Pretrained(BackboneConfig(f"timm:{name}"), tensors, facts["input_size"][-1], facts["mean"], facts["std"])


def _not_there(what: str, error: Exception) -> str:
    said = textwrap.shorten(str(error), 160)
    return (
        f"the weights of {what} cannot be had ({type(error).__name__}: {said}). Without an internet connection, fetch "
        "them where there is one: the library keeps them in its cache folder (TORCH_HOME, HF_HOME), which can be "
        "copied here. random:NAME is a network without weights"
    )
