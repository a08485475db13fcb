"""The start of a run from existing weights instead of random ones."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tessella import dist
from tessella.errors import UserError
from tessella.methods.method import Method
from tessella.run.folder import Start
from tessella.text import printable
from tessella.weights.resolve import Weights, read_weights, weights_sha256


def init_from(spec: str, method: Method, download: bool = True) -> Start:
    """Load the backbone, and every other part of the method that the weights hold in the same shapes.

    A part is a head or one set of prototypes or centres. It is taken whole or not at all. What belongs to one run
    (`Method.not_transferred`: queues, labels of images, ...) is never taken. Rank 0 prints what was taken.

    Args:
        spec: as for `resolve_backbone`, without random:NAME, because a run starts from random weights anyway. Empty:
            nothing is loaded.
        method: freshly built; changed in place, in the same way on every rank.
        download: whether a pretrained network by name may be downloaded; False if only a run folder names it.

    Raises:
        UserError: there are no such weights, or they belong to another network.
    """
    if not spec:
        return Start(spec, [], {})
    if spec.startswith("random:"):
        raise UserError(f"init_from={spec}: a run starts from random weights anyway; leave init_from out")
    start = _take(read_weights(spec, download=download), method, spec)
    if dist.rank() == 0:
        initialised = "; ".join(f"{part} ({why})" for part, why in start.initialised.items())
        print(
            printable(f"Taken from {spec}: {', '.join(start.taken)}. Randomly initialised: {initialised or 'nothing'}")
        )
    return start


@torch.no_grad()
def _take(weights: Weights, method: Method, spec: str) -> Start:
    ours, theirs = _by_part(dict(method.state_dict()), method), _by_part(weights.tensors, method)
    start = Start(spec, [], {})
    for part, tensors in ours.items():
        source = theirs.get(part, {})
        difference = _difference(tensors, source)
        if part == "backbone" and difference:
            net = weights.backbone
            shape = "" if net.name.startswith("timm:") else f" --backbone.width {net.width} --backbone.stem {net.stem}"
            raise UserError(
                f"{spec} is another network than the run's: {difference}. It needs --backbone.name {net.name}{shape}"
            )
        if difference:
            start.initialised[part] = difference
            continue
        for name, tensor in tensors.items():
            tensor.copy_(source[name])
        start.taken.append(part)
    return start._replace(backbone_sha256=weights_sha256(method.backbone))


def _by_part(state: dict[str, Tensor], method: Method) -> dict[str, dict[str, Tensor]]:
    """Tensors by the part of the method that they belong to, without what belongs to one run."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if any(fnmatchcase(name, pattern) for pattern in method.not_transferred):
            continue
        part, _, rest = name.partition(".")
        if isinstance(getattr(method, part, None), nn.ModuleList | nn.ModuleDict):
            part = f"{part}.{rest.partition('.')[0]}"
        parts.setdefault(part, {})[name] = tensor
    return parts


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Why one part cannot be taken for the other; empty if it can."""
    if not theirs:
        return "not there"
    for name, tensor in ours.items():
        if name in theirs and theirs[name].shape != tensor.shape:
            return f"{name} is {tuple(theirs[name].shape)} there and {tuple(tensor.shape)} here"
    strange = sorted(ours.keys() ^ theirs.keys())
    return f"{strange[0]} is only {'here' if strange[0] in ours else 'there'}" if strange else ""
