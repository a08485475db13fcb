"""Memory: how much a run needs, whether that is available, and what would reduce it."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from tessella.errors import UserError
from tessella.machine import machine_bytes, size_in_words
from tessella.methods import views_of
from tessella.methods.method import Method
from tessella.modules.momentum import MomentumEncoder
from tessella.run.config import RunConfig

_USABLE = 0.9  # of a GPU's memory: the rest goes to the driver, to kernels' workspace and to gaps between tensors


@contextlib.contextmanager
def explain_out_of_memory(config: RunConfig, method: Method, world_size: int) -> Iterator[None]:
    """Turn "out of memory" of a GPU or of the machine into a `UserError` that says what to change.

    The error may come from torch, from Python or from a decoding thread.
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
    raise UserError(text)  # here, where the error's frames have released their tensors


def refuse_too_large(config: RunConfig, method: Method, world_size: int, device: torch.device) -> None:
    """Refuse a run that needs more memory than the device has, or the machine that its CPU ranks share.

    Args:
        config: of the run.
        method: what is trained; on the meta device, where it takes no memory.
        world_size: number of ranks.
        device: where each rank trains.

    Raises:
        UserError: the text names the largest part, or what would reduce the batch.
    """
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else machine_bytes()
    ranks = 1 if on_gpu else max(1, world_size // config.nodes)
    fixed, batch = needed_bytes(config, method, world_size)
    if not total or ranks * (fixed + batch) <= total:
        return
    if ranks * fixed > total:
        tensors = dict(method.named_parameters()) | dict(method.named_buffers())
        name, largest = max(tensors.items(), key=lambda item: item[1].nbytes)
        size = " x ".join(map(str, largest.shape))
        remedies = f"The largest part is {name}, {size} values in {size_in_words(largest.nbytes)}: make it smaller"
    else:
        remedies = _remedies(config, world_size, _parts(config, fixed, batch, total / ranks))
    where = f"{'the GPU' if on_gpu else 'this machine'} has {size_in_words(total)}"
    share = f" and rank, with {ranks} ranks here" if ranks > 1 else ""
    raise UserError(f"too little memory: {_needs(config, fixed, batch, world_size)}{share}; {where}. {remedies}")


def needed_bytes(config: RunConfig, method: Method, world_size: int) -> tuple[int, int]:
    """An estimate of the bytes that training takes on each device: in any case, and for one micro-batch.

    In any case: weights, gradients, the optimiser's values, the method's tables. For a micro-batch: its views and what
    the backbone keeps for its backward pass, counted on the meta device. Heads and losses are left out, so the estimate
    is a little low.
    """
    weights = sum(p.nbytes for p in method.parameters())
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    values = 2 if config.optimizer.name == "adamw" else 1
    fixed = weights + (1 + values) * trained + sum(b.nbytes for b in method.buffers())
    images = config.batch_size // config.accumulate // world_size
    return fixed, images * _bytes_per_image(config, method)


def _bytes_per_image(config: RunConfig, method: Method) -> int:
    """Views of one image and what the backbone keeps of them: the difference between three images and two."""
    backbone = copy.deepcopy(method.backbone).to("meta").train()
    half = config.precision == "bf16" or (config.precision == "auto" and torch.cuda.is_available())
    total = 0
    for group in views_of(config.method).groups:
        side, views = group.size * group.tiles, group.views // group.tiles**2
        for sign, images in ((-1, 2), (1, 3)):  # batch norm may refuse a single image; weights cancel out
            x = torch.zeros(images * views, 3, side, side, device="meta")
            total += sign * (x.nbytes + _kept_for_backward(backbone, x))
    if any(isinstance(part, MomentumEncoder) for part in method.modules()):
        total //= 2  # half of the views go through it, without a backward pass
    return total // 2 if half else total


def _kept_for_backward(backbone: torch.nn.Module, x: Tensor) -> int:
    storages: dict[int, Tensor] = {}  # by identity; kept alive, so that no address is reused

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backbone(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _gpu_text(config: RunConfig, method: Method, world_size: int, message: str) -> str:
    device = next(method.parameters()).device
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    request = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", message)
    when = f" when it asked for another {request[1]}" if request else ""
    has = f"; it has {size_in_words(total)}" if total else ""
    try:
        fixed, batch = needed_bytes(config, method, world_size)
    except Exception:  # a network that cannot run on the meta device
        return f"the GPU's memory is full{when}{has}. {_remedies(config, world_size, 2)}"
    parts = _parts(config, fixed, batch, _USABLE * total) if total else 2
    needs = _needs(config, fixed, batch, world_size)
    return f"the GPU's memory is full{when}: {needs} on each{has}. {_remedies(config, world_size, parts)}"


def _parts(config: RunConfig, fixed: int, batch: int, available: float) -> int:
    """Into how many parts to divide the batch."""
    parts = 2
    while fixed + batch / parts > available and parts < config.batch_size:
        parts *= 2
    return parts


def _needs(config: RunConfig, fixed: int, batch: int, world_size: int) -> str:
    images = config.batch_size // config.accumulate // world_size
    return (
        f"this run needs about {size_in_words(fixed + batch)}, {size_in_words(fixed)} for weights, gradients, "
        f"optimiser and tables and {size_in_words(batch)} for {images} images at a time"
    )


def _remedies(config: RunConfig, world_size: int, parts: int) -> str:
    group = max(views_of(config.method).groups, key=lambda g: g.size * g.tiles)
    accumulate = config.accumulate * parts
    remedies = [
        f"--accumulate {accumulate} computes the same batch in {accumulate} parts (codes and contrasts are then "
        "computed within a part)"
        if config.batch_size % (accumulate * world_size) == 0
        else f"--batch-size {max(world_size, config.batch_size // parts)} is a smaller batch"
    ]
    if not config.backbone.activation_checkpointing:
        remedies.append(
            "--backbone.activation_checkpointing True keeps less for the backward pass, for about a third more time"
        )
    if config.precision == "32" or (config.precision == "auto" and not torch.cuda.is_available()):
        remedies.append("--precision bf16 halves what the batch takes")
    remedies.append(f"smaller views (now {group.size} pixels) or a smaller network (now {config.backbone.name})")
    return f"For a new run: {_numbered([*remedies, 'more GPUs share the batch'])}"


def _host_text(config: RunConfig, message: str) -> str:
    request = re.search(r"you tried to allocate (\d+) bytes", message)
    when = f" when it asked for another {size_in_words(int(request[1]))}" if request else ""
    fewer = "--workers 1, on `resume` too: fewer images are decoded at a time"
    remedies = [
        *([] if config.workers == 1 else [fewer]),
        f"a smaller batch (--batch-size, now {config.batch_size}) or, in a new run, --accumulate",
        "end other programs, or run fewer ranks on this machine",
    ]
    return f"the machine's memory is full{when}. What was saved is untouched. What helps: {_numbered(remedies)}"


def _numbered(remedies: list[str]) -> str:
    return "; ".join(f"{number}) {remedy}" for number, remedy in enumerate(remedies, start=1))
