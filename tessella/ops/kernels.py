"""Crops and colours of one image's views, compiled to machine code by numba: how a CPU executes a plan.

    images, boxes ----------cut--------------> uint8 views, for a GPU to colour
    images, boxes, colours --cut_and_colour--> float32 views, ready for the network

They do what `ops.augment` does on batches, view by view, so that a view's planes stay in the processor's cache, and
release the interpreter's lock. A view depends on its own arguments only, not on its batch or thread.

Importing this module imports numba, and compiles or loads from its cache on disk. Loops run over slices from zero:
numba would check any other index for being negative, and LLVM would then not vectorise the loop.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numba import njit, types

# Sums may be reordered and products fused into additions; NaN does not occur. Divisions and roots stay exact.
_compile = partial(
    njit, nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nnan", "ninf", "nsz"}
)

_F32 = np.float32
_ZERO, _HALF, _ONE, _TWO, _THREE, _FOUR, _SIX = map(np.float32, (0, 0.5, 1, 2, 3, 4, 6))
_RED, _GREEN, _BLUE = map(np.float32, (0.2989, 0.587, 0.114))  # torchvision's weights of luminance
_LEVEL = np.float32(1 / 255)
_SOLARIZE_FROM = np.float32(128 / 255)
_NEUTRAL = np.array([1, 1, 1, 0], dtype=np.float32)


# --- crops ----------------------------------------------------------------------------------------------------


@_compile()
def _windows(start, length, size):
    """Pillow's antialiased bilinear filter for a line: which pixels each result is made of, and how much of each.

    Start and length (> 0) of the piece to resize are in pixels and may be fractions; `size` is the result's. Returns,
    for each pixel of the result, the first pixel of its window, the number of pixels in it (at least 1) and their
    weights, (size, most) float32, of which the first `count` sum to one.
    """
    begin, end = math.floor(start), math.ceil(start + length)
    scale = length / size
    reach = max(scale, 1.0)  # one pixel of the result, but at least one of the line, to either side
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.empty((size, 2 * math.ceil(reach) + 1), np.float32)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        low, high = max(begin, int(centre - reach + 0.5)), min(end, int(centre + reach + 0.5))
        total = 0.0
        for pixel in range(low, high):
            total += max(0.0, 1.0 - abs(pixel + 0.5 - centre) / reach)
        for k in range(high - low):
            weights[i, k] = max(0.0, 1.0 - abs(low + k + 0.5 - centre) / reach) / total
        first[i], count[i] = low, high - low
    return first, count, weights


@_compile()
def _sum_rows(pixels, first, stride, weights, count, line):
    """line[x] = the weighted sum of `count` rows of uint8 pixels; two rows at a time save passes over the line."""
    n = len(line)
    row, weight = pixels[first : first + n], weights[0]
    if count % 2:
        for x in range(n):
            line[x] = weight * _F32(row[x])
    else:
        below, weight_below = pixels[first + stride : first + stride + n], weights[1]
        for x in range(n):
            line[x] = weight * _F32(row[x]) + weight_below * _F32(below[x])
    for k in range(2 - count % 2, count, 2):
        at = first + k * stride
        row, below = pixels[at : at + n], pixels[at + stride : at + stride + n]
        weight, weight_below = weights[k], weights[k + 1]
        for x in range(n):
            line[x] += weight * _F32(row[x]) + weight_below * _F32(below[x])


@_compile()
def _resize(image, box, flip, view):
    """Cut a box out and resize it, antialiased bilinear: within one level of Pillow, which rounds in between too.

    The image is (H, W, 3) uint8, contiguous; the box (4,) float64, left, top, width, height inside of it, may have
    fractions of pixels; `flip` mirrors the result, which is written to the (3, s, s) uint8 view.
    """
    size, stride = view.shape[1], 3 * image.shape[1]
    # Nothing below checks where it reads.
    assert box[0] >= 0 and math.ceil(box[0] + box[2]) <= image.shape[1], "a box outside its image"
    assert box[1] >= 0 and math.ceil(box[1] + box[3]) <= image.shape[0], "a box outside its image"
    first_x, count_x, weights_x = _windows(box[0], box[2], size)
    first_y, count_y, weights_y = _windows(box[1], box[3], size)
    left = first_x[0]
    line = np.empty(3 * (first_x[-1] + count_x[-1] - left), np.float32)
    if flip:
        first_x, count_x, weights_x = first_x[::-1].copy(), count_x[::-1].copy(), weights_x[::-1].copy()
    pixels = image.reshape(-1)
    # Down first: those sums run along the rows in memory, eight or sixteen values at once.
    for y in range(size):
        _sum_rows(pixels, first_y[y] * stride + 3 * left, stride, weights_y[y], count_y[y], line)
        for x in range(size):
            red = green = blue = _HALF  # adding a half and cutting rounds to nearest
            at = np.uint64(3 * (first_x[x] - left))
            for k in range(count_x[x]):
                weight = weights_x[x, k]
                red += weight * line[at]
                green += weight * line[at + np.uint64(1)]
                blue += weight * line[at + np.uint64(2)]
                at += np.uint64(3)
            view[0, y, x], view[1, y, x], view[2, y, x] = np.uint8(red), np.uint8(green), np.uint8(blue)


# --- colours: each changes the three planes of a view, (s * s,) float32 in [0, 1], in place ---------------------


@_compile()
def _clamp(x):
    return min(max(x, _ZERO), _ONE)


@_compile()
def _luminance(red, green, blue):
    return _RED * red + _GREEN * green + _BLUE * blue


@_compile()
def _brightness(red, green, blue, factor):
    for i in range(len(red)):
        red[i], green[i], blue[i] = _clamp(factor * red[i]), _clamp(factor * green[i]), _clamp(factor * blue[i])


@_compile()
def _contrast(red, green, blue, factor):
    total = 0.0
    for begin in range(0, len(red), 1024):  # short float32 sums, so that no digits are lost
        r, g, b = red[begin : begin + 1024], green[begin : begin + 1024], blue[begin : begin + 1024]
        part = _ZERO
        for i in range(len(r)):
            part += _luminance(r[i], g[i], b[i])
        total += part
    shift = (_ONE - factor) * _F32(total / len(red))
    for i in range(len(red)):
        red[i] = _clamp(factor * red[i] + shift)
        green[i] = _clamp(factor * green[i] + shift)
        blue[i] = _clamp(factor * blue[i] + shift)


@_compile()
def _saturation(red, green, blue, factor):
    for i in range(len(red)):
        shift = (_ONE - factor) * _luminance(red[i], green[i], blue[i])
        red[i] = _clamp(factor * red[i] + shift)
        green[i] = _clamp(factor * green[i] + shift)
        blue[i] = _clamp(factor * blue[i] + shift)


@_compile()
def _hue(red, green, blue, factor):
    """Turn the colour circle of HSV; see `ops.augment.turn_hue`."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value, least = max(r, g, b), min(r, g, b)
        chroma = value - least
        inverse = _ONE / max(chroma, _F32(1e-12))
        on_blue = _FOUR + (r - g) * inverse
        on_green = _TWO + (b - r) * inverse
        hue = (g - b) * inverse if value == r else (on_green if value == g else on_blue)
        hue += factor * _SIX
        hue -= _SIX * np.floor(hue * _F32(1 / 6))
        red[i] = least + chroma * _clamp(abs(hue - _THREE) - _ONE)  # red lies at 0 and at 6
        green[i] = least + chroma * _clamp(_TWO - abs(hue - _TWO))
        blue[i] = least + chroma * _clamp(_TWO - abs(hue - _FOUR))


@_compile()
def _gray(red, green, blue):
    for i in range(len(red)):
        red[i] = green[i] = blue[i] = _luminance(red[i], green[i], blue[i])


@_compile()
def _blur_weights(sigma):
    """Half of the kernel of `ops.augment.blur_kernels`: weights at distances 0, 1, ..., up to a multiple of three."""
    variance = sigma * sigma / 3.0
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.full(2 * int(whole) + 3, 1 / (2 * (whole + part) + 1))
    box[0] *= part
    box[-1] *= part
    kernel = np.convolve(np.convolve(box, box), box)
    return kernel[len(kernel) // 2 :].astype(np.float32)


@_compile()
def _scale(into, values, weight):
    for x in range(len(into)):
        into[x] = weight * values[x]


@_compile()
def _add_pairs(into, a, b, c, d, e, f, weights):
    """Three distances at once, because every pass over `into` costs as much as one of them."""
    one, two, three = weights[0], weights[1], weights[2]
    for x in range(len(into)):
        into[x] += one * (a[x] + b[x]) + two * (c[x] + d[x]) + three * (e[x] + f[x])


@_compile()
def _filter(into, values, step, weights):
    """into[i] = the weighted sum of values[i + reach * step] and of those 1, 2, ... steps before and after it."""
    n, reach = len(into), len(weights) - 1
    _scale(into, values[reach * step :][:n], weights[0])
    for d in range(1, reach, 3):
        i, j = (reach - d) * step, (reach + d) * step
        _add_pairs(
            into,
            *(values[i:][:n], values[j:][:n]),
            *(values[i - step :][:n], values[j + step :][:n]),
            *(values[i - 2 * step :][:n], values[j + 2 * step :][:n]),
            weights[d : d + 3],
        )


@_compile()
def _blur(plane, weights):
    """Symmetric filter of an (s, s) plane whose border is repeated beyond it: along the rows, then down.

    Both passes filter the whole plane as one long line: a few values between the rows are discarded, and no row needs a
    loop of its own.
    """
    side, reach = plane.shape[0], len(weights) - 1
    wide = np.empty((side, side + 2 * reach), np.float32)
    for y in range(side):
        inner, row = wide[y, reach : reach + side], plane[y]
        for x in range(side):
            inner[x] = row[x]
        for d in range(1, reach + 1):
            wide[y, reach - d], wide[y, reach + side - 1 + d] = row[0], row[side - 1]
    across = np.empty(wide.size - 2 * reach, np.float32)
    _filter(across, wide.reshape(-1), 1, weights)

    tall = np.empty((side + 2 * reach, side), np.float32)
    for y in range(side):
        inner, row = tall[reach + y], across[y * (side + 2 * reach) :][:side]
        for x in range(side):
            inner[x] = row[x]
    for d in range(1, reach + 1):
        tall[reach - d] = tall[reach]
        tall[reach + side - 1 + d] = tall[reach + side - 1]
    _filter(plane.reshape(-1), tall.reshape(-1), side, weights)


@_compile()
def _normalise(plane, solarize, mean, std):
    inverse = _ONE / std
    if solarize:
        for i in range(len(plane)):
            x = plane[i]
            plane[i] = ((_ONE - x if x >= _SOLARIZE_FROM else x) - mean) * inverse
    else:
        for i in range(len(plane)):
            plane[i] = (plane[i] - mean) * inverse


@_compile()
def _to_floats(levels, values):
    for i in range(len(levels)):
        values[i] = _LEVEL * _F32(levels[i])


@_compile()
def _colour(view, jitter, factors, order, gray, sigma, solarize, mean, std, planes):
    """What `ops.augment.photometric` does after the flip, for one view.

    From (3, s, s) uint8 to (3, s, s) float32 planes. `factors` and `order` are (4,), mean and std (3,) float32, the
    other parameters single values.
    """
    _to_floats(view.reshape(-1), planes.reshape(-1))
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    if jitter:
        for operation in order:
            factor = factors[operation]
            if factor == _NEUTRAL[operation]:
                continue
            if operation == 0:
                _brightness(red, green, blue, factor)
            elif operation == 1:
                _contrast(red, green, blue, factor)
            elif operation == 2:
                _saturation(red, green, blue, factor)
            else:
                _hue(red, green, blue, factor)
    if gray:
        _gray(red, green, blue)
    if sigma > 0:
        weights = _blur_weights(sigma)
        for channel in range(3):
            _blur(planes[channel], weights)
    for channel in range(3):
        _normalise(planes[channel].reshape(-1), solarize, mean[channel], std[channel])


# --- what the loader calls --------------------------------------------------------------------------------------

# Functions with a signature are compiled when the module is imported, not by the first thread that calls them. Types
# without ::1 accept any strides, read-only ones also writable arrays.
_IMAGES = types.Array(types.uint8, 4, "C", readonly=True)
_BOXES, _FLAGS, _NUMBERS = types.float64[:, :, ::1], types.boolean[:, :], types.float32[:, :]
_PLAN = (_FLAGS, _FLAGS, types.float32[:, :, :], types.uint8[:, :, :], _FLAGS, _NUMBERS, _FLAGS)


@_compile([(_IMAGES, _BOXES, types.uint8[:, :, :, :, ::1], types.int64)])
def cut(images, boxes, views, first):
    """Views of some images.

    Args:
        images: (n, H, W, 3) uint8, contiguous.
        boxes: (n, v, 4) float64, contiguous: left, top, width, height in pixels of the images.
        views: (v, B, 3, s, s) uint8; [:, first : first + n] is overwritten.
        first: place of the first image in the batch.
    """
    for i in range(len(images)):
        for v in range(len(views)):
            _resize(images[i], boxes[i, v], False, views[v, first + i])


@_compile(
    [(_IMAGES, _BOXES, *_PLAN, types.float32[::1], types.float32[::1], types.float32[:, :, :, :, ::1], types.int64)]
)
def cut_and_colour(images, boxes, flip, jitter, factors, order, gray, sigma, solarize, mean, std, views, first):
    """Views of some images, coloured and normalised; see `cut`.

    The colours' parameters, (n, v) or (n, v, 4), are those of `ops.augment.photometric`; mean and std are (3,) float32.
    The views are float32.
    """
    levels = np.empty(views.shape[2:], np.uint8)
    for i in range(len(images)):
        for v in range(len(views)):
            _resize(images[i], boxes[i, v], flip[i, v], levels)
            _colour(
                levels,
                *(jitter[i, v], factors[i, v], order[i, v], gray[i, v], sigma[i, v], solarize[i, v]),
                *(mean, std, views[v, first + i]),
            )
