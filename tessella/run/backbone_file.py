"""Weights as one file that describes itself and in which every change is noticed.

It is a safetensors file whose metadata hold a description: the hash of the tensors and, for a backbone, its network,
transform and origin. The description ends with the hash of everything before it.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tessella import files
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.modules.backbone import BackboneConfig
from tessella.run.config import from_dict, to_dict

_KEY = "tessella"  # of the metadata; a single one, because safetensors writes several in any order


class BackboneFile(NamedTuple):
    """The content of a file of `write_backbone`."""

    tensors: dict[str, Tensor]  # the network's state
    backbone: BackboneConfig
    transform: EvalTransform
    origin: dict[str, Any]  # where the weights come from


def write_backbone(
    path: Path, state: dict[str, Tensor], backbone: BackboneConfig, transform: EvalTransform, origin: dict[str, Any]
) -> None:
    """Write a network's weights with everything that is needed to use them.

    Args:
        path: NAME.safetensors; its folder must exist.
        state: of the network.
        backbone: its architecture.
        transform: of the images that it expects.
        origin: where the weights come from, as JSON values.

    Raises:
        UserError: the file cannot be written.
    """
    facts = {"backbone": to_dict(backbone), "transform": to_dict(transform), "origin": origin}
    write_described(path, state, facts)


def read_backbone(path: Path) -> BackboneFile | None:
    """The inverse of `write_backbone`; None for a safetensors file without such a description.

    Raises:
        UserError: the file cannot be read, or has changed since it was written.
    """
    tensors, facts = read_described(path)
    if facts is None or "backbone" not in facts:
        return None
    backbone = from_dict(BackboneConfig, facts.get("backbone"), f"{path.name}: backbone")
    transform = from_dict(EvalTransform, facts.get("transform"), f"{path.name}: transform")
    origin = facts.get("origin")
    return BackboneFile(tensors, backbone, transform, origin if isinstance(origin, dict) else {})


def write_described(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors, with facts (JSON values) and hashes in the file's metadata."""
    files.write_tensors(path, tensors, {_KEY: _sealed(facts | {"tensors_sha256": tensors_sha256(tensors)})})


def read_described(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors and facts that `write_described` wrote; no facts where the file has none.

    Raises:
        UserError: the file cannot be read, or has changed since it was written.
    """
    with files.open_regular(path):
        pass  # refuses what is no regular file, before it is opened by name
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = dict(safetensors.torch.load_file(path))
    except Exception as error:  # a header may claim anything, such as types that torch does not know
        reason = textwrap.shorten(str(error), 200)
        raise UserError(f"{path} cannot be read as safetensors ({type(error).__name__}: {reason})") from None
    if _KEY not in metadata:
        return tensors, None
    facts = _unsealed(metadata[_KEY])
    if facts is None or facts.get("tensors_sha256") != tensors_sha256(tensors):
        raise UserError(f"{path} has changed since it was written: restore it from a copy, or create it again")
    return tensors, facts


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sealed(facts: dict[str, Any]) -> str:
    seal = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return json.dumps(facts | {"sha256": seal})


def _unsealed(text: str) -> dict[str, Any] | None:
    """The facts in a text of `_sealed`; None if it has changed."""
    try:
        facts = json.loads(text)
        unsealed = {key: value for key, value in facts.items() if key != "sha256"}
        return unsealed if _sealed(unsealed) == text else None
    except (ValueError, RecursionError, AttributeError):
        return None
