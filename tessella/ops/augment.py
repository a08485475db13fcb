"""Batched crops and photometric operations with per-sample parameters, on the CPU or the GPU.

    resident images --crop_resize--> uint8 views
    uint8 views --photometric--> flip, jitter, gray, blur, solarize, normalise --> float32 views

The parameters were drawn on the host (`data.views`), so each operation runs on an index list of its samples, without
reading a value from the device. The colours equal torchvision's on float tensors with the same parameters, the blur has
Pillow's kernel; on a GPU that may use TF32, blur and crops are within a tenth of a level of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella.ops.layout import image_layout

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of `factors`, values of `order`
_NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0], dtype=np.float32)  # the factor of each that changes nothing
_SOLARIZE_FROM = 128 / 255


@torch.no_grad()
def crop_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops resized to a square, antialiased bilinear, as two batched matrix products.

    Equals Pillow's crop followed by its bilinear resize within one level: Pillow also rounds between its passes.

    Args:
        images: (n, 3, H, W) uint8.
        boxes: (n, 4) left, top, width, height in pixels, inside the image, on the same device.
        size: side of the result in pixels.

    Returns:
        (n, 3, size, size) uint8.
    """
    _, _, height, width = images.shape
    left, top, w, h = boxes.to(torch.float32).unbind(1)
    columns = _resize_matrix(left, w, width, size)
    rows = _resize_matrix(top, h, height, size)
    pixels = _filter_both_sides(images.to(torch.float32), rows, columns)
    # Adding a half and cutting rounds to nearest. Rows of weights sum to one, so no value exceeds 255.5.
    return pixels.add_(0.5).to(torch.uint8)


@torch.no_grad()
def photometric(
    views: Tensor,
    *,
    flip: NDArray[np.bool_],
    jitter: NDArray[np.bool_],
    factors: NDArray[np.float32],
    order: NDArray[np.uint8],
    gray: NDArray[np.bool_],
    sigma: NDArray[np.float32],
    solarize: NDArray[np.bool_],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Flip, colour jitter, grayscale, blur, solarize and normalise, in this order.

    Args:
        views: (n, 3, s, s) uint8, any memory format.
        flip: (n,) who is mirrored left to right.
        jitter: (n,) whose colours change.
        factors: (n, 4) brightness, contrast, saturation (1 changes nothing), hue in turns (0 changes nothing).
        order: (n, 4) which of the four comes first, second, ...
        gray: (n,) who loses colour.
        sigma: (n,) blur in pixels, 0 for none.
        solarize: (n,) whose values of 128 and more are inverted.
        mean: of each channel, values in [0, 1].
        std: of each channel.

    Returns:
        (n, 3, s, s) float32, in `image_layout`.
    """
    device = views.device
    turns = list(itertools.product(range(4), range(4)))  # (which comes, what it is)
    changes = jitter[:, None] & (factors != _NEUTRAL)
    who = [flip, *(changes[:, operation] & (order[:, turn] == operation) for turn, operation in turns)]
    flipped, *jittered, grayed, blurred, solarized = _indices([*who, gray, sigma > 0, solarize], device)
    strengths = to_device(factors, device)

    # Planes, because most operations mix whole channels.
    x = views.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    _update(x, flipped, lambda part: part.flip(-1))
    for (_, operation), rows in zip(turns, jittered, strict=True):
        if len(rows):
            factor = strengths[:, operation].index_select(0, rows).view(-1, 1, 1, 1)
            _update(x, rows, partial(_JITTER[operation], factor=factor))
    _update(x, grayed, lambda part: _luminance(part).expand(-1, 3, -1, -1))
    if len(blurred):
        matrix = _blur_matrix(sigma[sigma > 0], x.shape[-1], device)
        _update(x, blurred, partial(_filter_both_sides, rows=matrix, columns=matrix))
    _update(x, solarized, lambda part: torch.where(part >= _SOLARIZE_FROM, 1 - part, part))
    return normalise(x, mean, std)


def to_device(array: NDArray, device: torch.device) -> Tensor:
    """A tensor of the array's values. A copy to a GPU is asynchronous, from pinned memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@torch.no_grad()
def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels - mean) / std per channel, in `image_layout`. Pixels (n, 3, h, w) float32 in [0, 1] are overwritten."""
    for channel in range(3):  # plain numbers, so that nothing is copied to the device
        pixels[:, channel].sub_(mean[channel]).div_(std[channel])
    return pixels.contiguous(memory_format=image_layout(pixels.device))


def _update(x: Tensor, rows: Tensor, operation: Callable[[Tensor], Tensor]) -> None:
    """Replace some samples by `operation` of them. It gets a copy, which it may overwrite."""
    if len(rows):
        x.index_copy_(0, rows, operation(x.index_select(0, rows)))


def _luminance(x: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w), with torchvision's weights, whose sum is 0.9999."""
    red, green, blue = x.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luminance(x).mean(dim=(1, 2, 3), keepdim=True)
    return x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _luminance(x)
    return x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 1)


def turn_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the colour circle of HSV by `factor` turns.

    Value (the largest channel) and chroma (largest less smallest) stay. Only the hue is computed, in sixths of a turn
    from red; each channel is then least + chroma * clamp(2 - its distance on the circle to the hue, 0, 1).
    """
    red, green, blue = x.unbind(1)
    value, least = x.amax(dim=1), x.amin(dim=1)
    chroma = value - least
    # Without chroma every difference below is zero, and so is the hue.
    inverse = chroma.clamp_min(1e-12).reciprocal_()
    from_green = (blue - red).mul_(inverse).add_(2)
    from_blue = (red - green).mul_(inverse).add_(4)
    hue = torch.where(value == red, (green - blue).mul_(inverse), torch.where(value == green, from_green, from_blue))
    hue.add_(factor[:, 0] * 6).remainder_(6)
    torch.addcmul(least, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=red)  # red lies at 0 and at 6
    torch.addcmul(least, chroma, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1), out=green)
    torch.addcmul(least, chroma, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1), out=blue)
    return x


_JITTER = (_brightness, _contrast, _saturation, turn_hue)  # in the order of the columns of `factors`


def _resize_matrix(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(n, size, side) weights of every pixel of a line for every pixel of the resized piece: Pillow's bilinear filter.

    A triangle that reaches one output pixel, but at least one input pixel, to either side, cut at the ends of the piece
    and scaled to sum one. Start and length (n,) of the piece and `side`, the line's, are in pixels.
    """
    scale = (length / size)[:, None, None]
    centre = torch.arange(0.5, size, device=start.device)[None, :, None] * scale
    pixel = torch.arange(side, device=start.device)[None, None, :] - start[:, None, None]
    weights = (1 - (pixel + 0.5 - centre).abs_() / scale.clamp_min(1)).clamp_min_(0)
    weights *= (pixel >= 0) & (pixel < length[:, None, None])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def blur_kernels(sigma: NDArray[np.float32]) -> NDArray[np.float64]:
    """Kernels of Pillow's Gaussian blur: three equal boxes, whose width has a fraction so that sigma fits exactly.

    Sigma (n,) is > 0, in pixels. The result is (n, r + 1): weights at distances 0 ... r to either side.

    Source: Gwosdek, Grewenig, Bruhn, Weickert, "Theoretical foundations of Gaussian convolution by extended box
    filtering", SSVM 2011; Pillow's `ImageFilter.GaussianBlur`, which the official pipelines use.
    """
    variance = sigma[:, None].astype(np.float64) ** 2 / 3  # of one box
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # pixels to either side that count in full
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))  # of the next
    reach = int(whole.max()) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    boxes = np.where(distance <= whole, 1, np.where(distance == whole + 1, part, 0)) / (2 * (whole + part) + 1)
    return np.stack([np.convolve(np.convolve(box, box), box)[3 * reach :] for box in boxes])


def _blur_matrix(sigma: NDArray[np.float32], side: int, device: torch.device) -> Tensor:
    """(n, side, side) weights of every pixel of a line for every pixel of the blurred line; rows sum to one.

    Beyond its ends the line continues with its end pixels. Sigma (n,) is > 0, in pixels.
    """
    kernels = blur_kernels(sigma)
    kernels = np.pad(kernels, ((0, 0), (0, max(0, side - kernels.shape[1]))))
    beyond = kernels[:, ::-1].cumsum(axis=1)[:, ::-1] - kernels  # what all larger distances have together
    weights, ends = (to_device(array.astype(np.float32), device) for array in (kernels, beyond[:, :side]))
    pixel = np.arange(side)
    matrix = weights.index_select(1, to_device(np.abs(pixel[:, None] - pixel).ravel(), device)).view(-1, side, side)
    matrix[:, :, 0] += ends
    matrix[:, :, -1] += ends.flip(1)
    return matrix


def _filter_both_sides(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Filter (n, c, H, W) across and down to (n, c, h, w).

    Rows (n, h, H) and columns (n, w, W) are the weights of each pixel of a column, and of a row, of the result.
    """
    n, channels, height, width = x.shape
    across = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], across.view(n, channels, height, -1))


def _indices(masks: list[NDArray[np.bool_]], device: torch.device) -> tuple[Tensor, ...]:
    """The positions that each mask selects, in one copy to the device."""
    lists = [np.flatnonzero(mask) for mask in masks]
    return to_device(np.concatenate(lists), device).split([len(positions) for positions in lists])
