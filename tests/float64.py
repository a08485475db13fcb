"""Compute in float64 what is compared with something that rounds elsewhere.

Two ways to compute the same thing, such as two ranks and one, agree to some 1e-12 over many steps. In float32 they
agree to 1e-6 at first; then one activation near 0, or one image between two clusters, falls on the other side, at a
step that depends on the processor. So in float32 only the first steps can tell rounding from a mistake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

_to_float32 = torch.Tensor.float


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this type, and what is turned to float32 by `.float()` gets it, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    to_dtype = torch.Tensor.double if dtype == torch.float64 else _to_float32
    try:
        with mock.patch.object(torch.Tensor, "float", to_dtype):
            yield
    finally:
        torch.set_default_dtype(before)
