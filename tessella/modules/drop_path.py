"""Stochastic depth: switched off for a while, and drawn from a counter instead of a generator's state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tessella.ops.philox import philox, stream_key


def drop_paths(module: nn.Module) -> list[Any]:
    """The layers of `module` that drop whole branches: timm's DropPath, or what has its `drop_prob`."""
    return [m for m in module.modules() if getattr(m, "drop_prob", 0.0)]


@contextlib.contextmanager
def without_drop_path(module: nn.Module) -> Iterator[None]:
    """Within this context no branch of `module` is dropped."""
    layers = drop_paths(module)
    chances = [layer.drop_prob for layer in layers]
    for layer in layers:
        layer.drop_prob = 0.0
    try:
        yield
    finally:
        for layer, chance in zip(layers, chances, strict=True):
            layer.drop_prob = chance


def seed_noise(seed: int, step: int, micro_batch: int, rank: int, device: torch.device) -> None:
    """Seed torch's global generators, from which a network draws its noise, from these numbers.

    That of the CPU and of the device only: torch.manual_seed would seed those of all devices, slowly.
    """
    high, low, _, _ = philox(stream_key(seed, "drop"), (step, micro_batch, rank, 0)).tolist()
    torch.default_generator.manual_seed(high << 32 | low)
    if device.type == "cuda":
        torch.cuda.manual_seed(high << 32 | low)
    elif device.type == "mps":
        torch.mps.manual_seed(high << 32 | low)
