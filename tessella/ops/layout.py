"""What depends on the kind of device: memory layout of images, and the widest float type."""

from __future__ import annotations

import torch

_NO_FLOAT64 = {"mps"}


def image_layout(device: torch.device) -> torch.memory_format:
    """The memory format of a network's weights, input and maps: channels last on a GPU, where convolutions are faster.

    Not on a CPU: there torch's batch norm sums channels-last maps inexactly (relative errors of 3e-5 in its output and
    up to 1.6e-3 in its running variance were seen; 4e-8 otherwise), and the gradient of strided 1x1 convolutions with
    few channels has crashed the process.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def widest_float(device: torch.device) -> torch.dtype:
    """Float64, or float32 on a device without it (Apple's GPUs)."""
    return torch.float32 if device.type in _NO_FLOAT64 else torch.float64
