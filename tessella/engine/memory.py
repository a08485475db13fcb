"""Memory: how much a run needs, whether it is there, and the ways out that this run has."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tessella.errors import UserError
from tessella.methods import views_of
from tessella.methods.method import Method
from tessella.modules.momentum import MomentumEncoder
from tessella.run.config import RunConfig

_GIB = 1 << 30
_USABLE = 0.9  # of a GPU's memory: the rest goes to the driver, to kernels' workspace and to gaps between tensors


@contextlib.contextmanager
def explain_out_of_memory(config: RunConfig, method: Method, world_size: int) -> Iterator[None]:
    """Turn "out of memory", of a GPU or of the machine, into an error that says what to change.

    Args:
        config: of the run.
        method: what is trained.
        world_size: number of ranks.

    Raises:
        UserError: instead of the error of torch, of Python, or of a decoding thread.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = _gpu_text(config, method, world_size, str(error))
    except MemoryError as error:
        text = _host_text(config, str(error))
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch has no type for it
            raise
        text = _host_text(config, str(error))
    else:
        return
    raise UserError(text)  # here, where the error's frames have let go of their tensors


def refuse_too_large(config: RunConfig, method: Method, world_size: int, device: torch.device) -> None:
    """Refuse a run that needs more memory than there is, before any of it is taken.

    Args:
        config: of the run.
        method: what is trained; on the meta device, where it takes no memory.
        world_size: number of ranks.
        device: where each rank trains.

    Raises:
        UserError: the device, or the machine that ranks on its CPU share, has less.
    """
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else _machine_bytes()
    ranks = 1 if on_gpu else max(1, world_size // config.nodes)
    fixed, batch = needed_bytes(config, method, world_size)
    if not total or ranks * (fixed + batch) <= total:
        return
    if ranks * fixed > total:
        tensors = dict(method.named_parameters()) | dict(method.named_buffers())
        name, largest = max(tensors.items(), key=lambda item: item[1].nbytes)
        size = " x ".join(map(str, largest.shape))
        ways = f"The largest part is {name}, {size} values in {_shown(largest.nbytes)}: make it smaller"
    else:
        parts = 2
        while ranks * (fixed + batch / parts) > total and parts < config.batch_size:
            parts *= 2
        ways = _ways_out(config, world_size, parts)
    where = f"{'the GPU' if on_gpu else 'this machine'} has {_shown(total)}"
    share = f" and rank, with {ranks} ranks here" if ranks > 1 else ""
    raise UserError(f"too little memory: {_needs(config, fixed, batch, world_size)}{share}; {where}. {ways}")


def _machine_bytes() -> int | None:
    """Memory of this machine, or the part of it that this process's container may use; None if that is not known."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(found, default=None)


def needed_bytes(config: RunConfig, method: Method, world_size: int) -> tuple[int, int]:
    """An estimate of what training takes on each device: bytes that are always there, and of one micro-batch.

    Always: weights, gradients, the optimiser's values, the method's tables. Of a micro-batch: its views and what the
    backbone keeps for its backward pass, counted on a device that computes nothing. The heads and the losses are left
    out, so it is a little low.

    Args:
        config: of the run.
        method: what is trained.
        world_size: number of ranks.
    """
    weights = sum(p.nbytes for p in method.parameters())
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    values = 2 if config.optimizer.name == "adamw" else 1
    fixed = weights + (1 + values) * trained + sum(b.nbytes for b in method.buffers())
    images = config.batch_size // config.accumulate // world_size
    return fixed, images * _bytes_per_image(config, method)


def _bytes_per_image(config: RunConfig, method: Method) -> int:
    """Views of one image, and what the backbone keeps of them: the second image's, for the first brings the weights."""
    backbone = copy.deepcopy(method.backbone).to("meta").train()
    half = config.precision == "bf16" or (config.precision == "auto" and torch.cuda.is_available())
    kept = 0
    for group in views_of(config.method).groups:
        side, views = group.size * group.tiles, group.views // group.tiles**2
        for sign, images in ((-1, 2), (1, 3)):  # of one image alone a batch norm may refuse to take the variance
            x = torch.zeros(images * views, 3, side, side, device="meta")
            kept += sign * (x.nbytes + _kept_for_backward(backbone, x))
    if any(isinstance(part, MomentumEncoder) for part in method.modules()):
        kept //= 2  # half of the views go through it, and nothing of them is kept
    return kept // 2 if half else kept


def _kept_for_backward(backbone: torch.nn.Module, x: Tensor) -> int:
    storages: dict[int, Tensor] = {}  # by identity; held, so that none is counted twice or reused

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backbone(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _gpu_text(config: RunConfig, method: Method, world_size: int, said: str) -> str:
    device = next(method.parameters()).device
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", said)
    told = f" when it asked for another {asked[1]}" if asked else ""
    has = f"; it has {_shown(total)}" if total else ""
    try:
        fixed, batch = needed_bytes(config, method, world_size)
    except Exception:  # a network that cannot be run without values: the ways out remain
        return f"the GPU's memory is full{told}{has}. {_ways_out(config, world_size, 2)}"
    parts = 2
    while total and fixed + batch / parts > _USABLE * total and parts < config.batch_size:
        parts *= 2
    needs = _needs(config, fixed, batch, world_size)
    return f"the GPU's memory is full{told}: {needs} on each{has}. {_ways_out(config, world_size, parts)}"


def _needs(config: RunConfig, fixed: int, batch: int, world_size: int) -> str:
    images = config.batch_size // config.accumulate // world_size
    return (
        f"this run needs about {_shown(fixed + batch)}, {_shown(fixed)} for weights, gradients, optimiser and tables "
        f"and {_shown(batch)} for {images} images at a time"
    )


def _ways_out(config: RunConfig, world_size: int, parts: int) -> str:
    group = max(views_of(config.method).groups, key=lambda g: g.size * g.tiles)
    ways = []
    accumulate = config.accumulate * parts
    if config.batch_size % (accumulate * world_size) == 0:
        ways.append(
            f"--accumulate {accumulate} computes the same batch in {accumulate} parts (codes and contrasts are then "
            "computed within a part)"
        )
    else:
        ways.append(f"--batch-size {max(world_size, config.batch_size // parts)} is a smaller batch")
    if not config.backbone.activation_checkpointing:
        ways.append(
            "--backbone.activation_checkpointing True keeps less for the backward pass, for about a third more time"
        )
    if config.precision == "32" or (config.precision == "auto" and not torch.cuda.is_available()):
        ways.append("--precision bf16 halves what the batch takes")
    ways.append(f"smaller views (now {group.size} pixels) or a smaller network (now {config.backbone.name})")
    ways.append("more GPUs share the batch")
    listed = "; ".join(f"{number}) {way}" for number, way in enumerate(ways, start=1))
    return f"Ways out, for a new run: {listed}"


def _host_text(config: RunConfig, said: str) -> str:
    asked = re.search(r"you tried to allocate (\d+) bytes", said)
    told = f" when it asked for another {_shown(int(asked[1]))}" if asked else ""
    workers = "" if config.workers == 1 else "1) --workers 1, on `resume` too: fewer images are decoded at a time; "
    return (
        f"the machine's memory is full{told}. What was saved is untouched. Ways out: {workers}"
        f"{2 if workers else 1}) a smaller batch (--batch-size, now {config.batch_size}) or, in a new run, "
        f"--accumulate; {3 if workers else 2}) end other programs, or run fewer ranks on this machine"
    )


def _shown(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / (1 << 20):.0f} MiB"
