"""Official checkpoints under the names of our methods: recognised by keys and shapes, with a report on every tensor.

    file -> tensors under their official names     (released, training and VISSL files; without `module.`)
         -> layout, by the keys                    (a table of names for each project)
         -> network and settings, by the shapes
         -> tensors under our names, strict, and a report

A layout says which official tensor each of ours comes from. A tensor that only our method or only the file has is an
error unless the layout names it with a reason. Settings that a file does not show, such as the temperature or the
crops, keep the method's defaults.

The layouts were taken from the projects' code; the tests read files that they make themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tessella.data.transform import EvalTransform
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD
from tessella.errors import UserError
from tessella.methods import MethodConfig, build_method, views_of
from tessella.methods.layout import Layout, OfficialFile
from tessella.methods.method import Setting
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.modules.resnet import LAYERS
from tessella.weights.files import read_file
from tessella.weights.layouts import layouts, refused

Outcome: TypeAlias = Literal["matched", "left out", "initialised"]

SETTING = Setting(images=0, batch_size=1, seed=0)  # of a method that is not there to be trained

_SHOWN = 3  # tensors that an error names


class Row(NamedTuple):
    """One group of tensors in the report."""

    official: str  # names in the file; empty if the file has none
    ours: str  # names in our method; empty if it has none
    outcome: Outcome
    what: str  # how many values, in which shape
    reason: str = ""


class Official(NamedTuple):
    """Weights of another project under our names."""

    origin: str  # `Layout.origin`
    title: str  # for people
    backbone: BackboneConfig
    method: MethodConfig | None  # from the shapes, other settings at their defaults; None: the file is only a network
    whole: bool  # whether it has all tensors that the method needs to assign images to clusters
    tensors: dict[str, Tensor]  # of the method's state, the network's under `backbone.`; floating ones in float32
    report: tuple[Row, ...]


def read_official(path: Path, origin: str = "auto") -> Official:
    """Read an official checkpoint.

    Args:
        path: a file that torch.save or safetensors wrote.
        origin: a project, to accept its layout only.

    Raises:
        UserError: the file has no known layout or another one, or a tensor is unknown, missing or of another shape; the
            text names it.
    """
    return recognise(read_file(path), path.name, origin)


def recognise(content: Mapping[str, Any], name: str, origin: str = "auto") -> Official:
    """As `read_official`, from the content of the file `name`, whose tensors may be on torch's meta device."""
    file = unwrap(content, name)
    known = {layout.origin for layout in layouts()}
    if origin not in ("auto", *known):
        raise UserError(f"--from {origin}: the projects are {', '.join(sorted(known))}; leave --from out to find out")
    layout = _layout_of(file)
    its = layout.origin
    if origin not in ("auto", its) and (origin, its) != ("swav", "deepclusterv2"):  # SwAV may have several heads
        raise UserError(f"{name} has the layout of {its}, not of {origin}: leave --from out, or give another file")
    net_prefix = layout.names["backbone.*"].removesuffix("*")
    net = {k.removeprefix(net_prefix): v for k, v in file.tensors.items() if k.startswith(net_prefix)}
    backbone = infer_resnet(net, name)
    title, method = layout.config(file)
    tensors, rows = _match(file, layout, backbone, method)
    return Official(its, f"{title}, {file.wrapping}", backbone, method, layout.assigns, tensors, rows)


def official_transform(official: Official, image_size: int | None = None) -> EvalTransform:
    """The transform of images for these weights: by default 224 pixels, or 32 for a small stem."""
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if official.method is not None:  # SwAV normalises a little differently
        mean, std = views_of(official.method).mean, views_of(official.method).std
    size = image_size or (224 if official.backbone.stem == "imagenet" else 32)
    return EvalTransform.of(size, mean=mean, std=std)


def infer_resnet(tensors: Mapping[str, Tensor], name: str) -> BackboneConfig:
    """The ResNet of a state dict in torchvision's key layout, from its keys and shapes; other keys do not matter.

    Raises:
        UserError: it is no known ResNet; the text contains `name`, of the file.
    """
    blocks = [len({k.split(".")[1] for k in tensors if re.match(rf"layer{s}\.\d+\.", k)}) for s in (1, 2, 3, 4)]
    expansion = 4 if "layer1.0.conv3.weight" in tensors else 1
    for resnet, (block, depths) in LAYERS.items():
        stem = tensors.get("conv1.weight")
        if list(depths) == blocks and block.expansion == expansion and stem is not None and stem.dim() == 4:
            return BackboneConfig(resnet, stem.shape[0], "small" if stem.shape[2] == 3 else "imagenet")
    raise UserError(
        f"{name} does not hold a ResNet in torchvision's key layout (conv1.weight, layer1.0...) of "
        f"{', '.join(map(str, LAYERS))}: its four stages have {blocks} blocks"
    )


# --- from a file to tensors under their official names ------------------------------------------------------

_WEIGHTS_UNDER = ("state_dict", "model_state_dict", "model", "teacher", "student")  # the first that holds tensors
_MOST_CLAIMED = 2  # bytes of all tensors / bytes that the file stores for them; more is a trick with shared storage
_AROUND = {
    "epoch": "a counter of the run that made the file",
    **dict.fromkeys(
        ("optimizer", "scheduler", "amp", "scaler"), "belongs to the run that made the file; a new run has its own"
    ),
}
_NOTE = "a note of the run that made the file"


def unwrap(content: Mapping[str, Any], name: str) -> OfficialFile:
    """Remove what is wrapped around the weights in the content of the file `name`.

    Raises:
        UserError: the tensors are not plain ones, or claim more values than the file holds.
    """
    if isinstance(content.get("classy_state_dict"), dict):
        return _unwrap_vissl(content["classy_state_dict"], name)
    copies = [key for key in _WEIGHTS_UNDER if _holds_tensors(content.get(key))]
    wrapping, weights, others = "weights alone", content, {}
    if copies:
        wrapping = "training checkpoint" if copies[0] == "state_dict" else f"training checkpoint, {copies[0]}"
        weights = content[copies[0]]
        others = {str(key): _why_left(key, value, copies[0]) for key, value in _named(content) if key != copies[0]}
    tensors = {key: value.detach() for key, value in _named(weights) if isinstance(value, Tensor)}
    others |= {key: _why_left(key, value, "") for key, value in _named(weights) if not isinstance(value, Tensor)}
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if "backbone.conv1.weight" in tensors and "conv1.weight" not in tensors:
        tensors = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    _refuse_claims(tensors, name)
    return OfficialFile(name, wrapping, tensors, others)


def _named(entries: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in entries.items() if isinstance(key, str))


def _holds_tensors(value: Any) -> bool:
    """Whether a dictionary holds tensors directly. Deeper levels are not searched: lists in lists can be endless."""
    return isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())


def _why_left(key: str, value: Any, taken: str) -> str:
    """The reason why an entry beside the weights is left out."""
    if key in _AROUND:
        return _AROUND[key]
    if key in _WEIGHTS_UNDER and _holds_tensors(value):
        return f"another copy of the network: {taken} is taken"
    return "beside the weights: no part of the network" if _holds_tensors(value) else _NOTE


def _refuse_claims(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse tensors that are much larger than what the file stores: one stored value can stand for a billion."""
    stored: dict[int, int] = {}
    claimed: dict[tuple[Any, ...], int] = {}
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{name}: {key!a} is a sparse or quantized tensor: save dense ones")
        storage = tensor.untyped_storage()
        stored[storage._cdata] = storage.nbytes()
        place = storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()  # tied weights count once
        claimed[place] = tensor.nbytes
    if sum(claimed.values()) > _MOST_CLAIMED * sum(stored.values()):
        raise UserError(
            f"{name} claims tensors of {sum(claimed.values()):,} bytes and stores {sum(stored.values()):,} for them: "
            "it is not read; save a copy of each (tensor.clone())"
        )


def _unwrap_vissl(state: Mapping[str, Any], name: str) -> OfficialFile:
    """A VISSL file, whose trunk and heads are separate, under the names of SwAV's own files."""
    try:
        model = state["base_model"]["model"]
        trunk, heads = (
            {key: value for key, value in _named(model[part]) if isinstance(value, Tensor)}
            for part in ("trunk", "heads")
        )
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{name} is a VISSL file without classy_state_dict.base_model.model.trunk and heads") from None
    tensors = {key.removeprefix("_feature_blocks."): value for key, value in trunk.items()}
    heads = {re.sub(r"^\d+\.", "", key): value for key, value in heads.items()}  # some name the head by its number
    several = sum(bool(re.fullmatch(r"prototypes\d+\.weight", key)) for key in heads) > 1
    of_prototypes = r"prototypes.prototypes\1.weight" if several else "prototypes.weight"
    tensors |= {re.sub(r"^prototypes(\d+)\.weight$", of_prototypes, key): value for key, value in heads.items()}
    _refuse_claims(tensors, name)
    return OfficialFile(name, "VISSL checkpoint", tensors, {"everything else": "VISSL's record of the run"})


# --- from official names to ours ----------------------------------------------------------------------------


def _match(
    file: OfficialFile, layout: Layout, backbone: BackboneConfig, method: MethodConfig | None
) -> tuple[dict[str, Tensor], tuple[Row, ...]]:
    """Our tensors, and the report on all of theirs and ours.

    Raises:
        UserError: some tensors do not fit; the text names them.
    """
    matched: dict[str, dict[str, Tensor]] = {}  # pattern of ours -> name -> value
    uncounted: dict[str, Tensor] = {}
    initialised, used, wrong, missing = set(), set(), [], []
    for name, shape in _expected(backbone, method).items():
        pattern, key = _official_name(layout, name)
        if key in file.tensors:
            value = _converted(file.tensors[key], name, layout)
            used.add(key)
            matched.setdefault(pattern, {})[name] = value
            if tuple(value.shape) != shape:
                wrong.append(f"{key} has shape {tuple(file.tensors[key].shape)} (expected, as {name}: {shape})")
        elif name.endswith("num_batches_tracked"):
            uncounted[name] = torch.zeros((), dtype=torch.long)
        elif known := _first_match(layout.reset, name):
            initialised.add(known)
        else:
            missing.append(key or name)
    left = {key: _first_match(layout.left_out, key) for key in file.tensors.keys() - used}
    extra = sorted(key for key, pattern in left.items() if pattern is None)
    complaints = (_some("it lacks", missing), _some("no place for", extra), _some("wrong shape:", wrong))
    if any(complaints):
        net = f"{backbone.name} of width {backbone.width}"
        raise UserError(f"{file.name} is not quite what it looks like, {net}: {'; '.join(filter(None, complaints))}")
    rows = [
        *(_matched_row(pattern, layout, values) for pattern, values in matched.items()),
        *(Row(p, "", "left out", _what([file.tensors[k] for k in left if left[k] == p]), layout.left_out[p])
          for p in layout.left_out if p in left.values()),
        *(Row(key, "", "left out", "", reason) for key, reason in file.others.items()),
        *(Row("", p, "initialised", "", why) for p, why in layout.reset.items() if p in initialised),
    ]  # fmt: skip
    if uncounted:
        counters = f"{len(uncounted)} counters"
        rows.append(Row("", "*.num_batches_tracked", "initialised", counters, "absent; nothing depends on them"))
    return {name: value for group in matched.values() for name, value in group.items()} | uncounted, tuple(rows)


def _expected(backbone: BackboneConfig, method: MethodConfig | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our state."""
    with torch.device("meta"):
        net = build_backbone(backbone)
        state = build_method(method, net, SETTING).state_dict() if method is not None else {}
        state = state or {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _official_name(layout: Layout, ours: str) -> tuple[str, str]:
    """The pattern that one of our names matches, and its name in the file; both empty if there is none."""
    for pattern, official in layout.names.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\*", "(.+)"), ours)
        if match:
            return pattern, official.replace("*", match[1] if match.groups() else "")
    return "", ""


def _first_match(patterns: Iterable[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _converted(value: Tensor, name: str, layout: Layout) -> Tensor:
    if value.is_floating_point():
        value = value.float()
    if _first_match(layout.transposed, name) and value.dim() == 2:
        value = value.T
    if _first_match(layout.unit_rows, name) and value.dim() == 2:
        value = F.normalize(value, dim=1)
    return value.contiguous()


def _matched_row(pattern: str, layout: Layout, values: dict[str, Tensor]) -> Row:
    official = layout.names[pattern]
    if pattern.endswith("backbone.*"):
        official = official.replace("*", "conv1 ... layer4.*")
    done = [
        *(["columns turned into rows"] if pattern in layout.transposed else []),
        *(["scaled to unit length"] if pattern in layout.unit_rows else []),
    ]
    return Row(official, pattern, "matched", _what(list(values.values())), ", ".join(done))


def _what(tensors: list[Tensor]) -> str:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) == 1:
        times = f"{len(tensors)} of " if len(tensors) > 1 else ""
        return f"{times}{shapes.pop()}"
    return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors):,} values"


def _some(what: str, items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{what} {', '.join(items[:_SHOWN])}{more}" if items else ""


# --- which layout -----------------------------------------------------------------------------------------


def _layout_of(file: OfficialFile) -> Layout:
    has_network = file.count("conv1.weight")
    for pattern, reason in refused().items():
        if file.count(pattern) and not has_network:
            raise UserError(f"{file.name} {reason}")
    for layout in layouts():
        if layout.fits(file):
            return layout
    seen = ", ".join(list(file.tensors)[:_SHOWN]) or "no tensors"
    known = ", ".join(layout.origin for layout in layouts())
    raise UserError(
        f"{file.name} has none of the known layouts ({known}): it holds {seen}. A ResNet's own state dict in "
        "torchvision's key layout is always accepted"
    )
