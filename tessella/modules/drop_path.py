"""Stochastic depth under control: switched off for a while, and drawn from a counter instead of a hidden state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def drop_paths(module: nn.Module) -> list[Any]:
    """The layers of `module` that drop whole branches, which are timm's DropPath or look like it."""
    return [m for m in module.modules() if getattr(m, "drop_prob", 0.0)]


@contextlib.contextmanager
def without_drop_path(module: nn.Module) -> Iterator[None]:
    """No branch of `module` is dropped inside."""
    layers = drop_paths(module)
    chances = [layer.drop_prob for layer in layers]
    for layer in layers:
        layer.drop_prob = 0.0
    try:
        yield
    finally:
        for layer, chance in zip(layers, chances, strict=True):
            layer.drop_prob = chance


@contextlib.contextmanager
def noise_from(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch inside are a function of `seed`, so that a resumed run draws what a straight one does.

    Args:
        seed: 0 <= seed < 2**64.
        device: whose generator is set, beside the CPU's; both are put back afterwards.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
