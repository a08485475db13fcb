"""What a method gets of the data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Views of B images on the device. Labels never reach a method.

    A named tuple, because Lightning Fabric refuses frozen dataclasses as batches.
    """

    views: tuple[Tensor, ...]  # one (v, B, 3, size, size) float32 tensor per crop group of the ViewSpec, normalised
    instances: Tensor  # (B,) int64: row of each image in the data set's index, the key of per-image state
