"""The transform of images as ONNX operators: uint8 pixels of any size -> the network's input, as `EvalTransform`.

torch resizes uint8 pixels in integers: antialiased weights, rounded to 16 bits, along the width and then the height,
each time rounded to whole levels. ONNX's Resize differs from it by a level here and there; the operators here compute
the same integers. MatMulInteger multiplies bytes exactly, so a weight is written as its upper and its lower byte.

Source: torch, aten/src/ATen/native/cpu/UpSampleKernel.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tessella.data.transform import LONGEST_STRIP, EvalTransform

OPSET = 20
_FLOAT, _UINT8, _INT64, _DOUBLE = 1, 2, 7, 11  # ONNX's numbers of types
_WEIGHT_LIMIT = 2**15  # what a weight stays below
_MOST_BITS = 22  # of a weight's fraction


def can_transform(transform: EvalTransform) -> bool:
    """Whether these operators can do a transform: all but that of VOC07's probes, which resizes twice."""
    return transform.fit != "shorter side, then both"


def pixels_to_images(transform: EvalTransform, ir_version: int = 10) -> Any:
    """The graph as an ONNX model.

    Args:
        transform: see `can_transform`.
        ir_version: of the file.

    Returns:
        pixels (batch, height, width, 3) uint8 RGB -> images (batch, 3, size, size) float32.
    """
    import onnx_ir as ir
    from onnxscript import GraphBuilder

    size = transform.size
    pixels = ir.val("pixels", ir.DataType.UINT8, ["batch", "height", "width", 3])
    graph = ir.Graph([pixels], [], nodes=[], opset_imports={"": OPSET}, name="pixels_to_images")
    op = GraphBuilder(graph).op
    images = _images(op, pixels, transform)
    images.name, images.type = "images", ir.TensorType(ir.DataType.FLOAT)
    images.shape = ir.Shape(["batch", 3, size, size])
    graph.outputs.append(images)
    return ir.to_proto(ir.Model(graph, ir_version=ir_version))


def _images(op: Any, pixels: Any, transform: EvalTransform) -> Any:
    if transform.fit == "both sides":
        sides = _sides(op, pixels)
        resized = [op.Constant(value_int=transform.resize)] * 2
    else:
        pixels = _without_ends_of_strips(op, pixels)
        sides = _sides(op, pixels)
        shorter = op.Min(*sides)
        resized = [op.Div(op.Mul(side, transform.resize), shorter) for side in sides]
    x = op.Transpose(pixels, perm=[0, 3, 1, 2])
    x = _resized(op, x, sides[1], resized[1], transform)
    x = op.Transpose(x, perm=[0, 1, 3, 2])
    x = _resized(op, x, sides[0], resized[0], transform)
    x = op.Transpose(x, perm=[0, 1, 3, 2])
    x = op.Div(op.Cast(x, to=_FLOAT), 255.0)
    mean, std = (_constant(op, np.reshape(values, (3, 1, 1)), np.float32) for values in (transform.mean, transform.std))
    return op.Div(op.Sub(x, mean), std)


def _sides(op: Any, pixels: Any) -> list[Any]:
    """Height and width as scalars."""
    shape = op.Shape(pixels)
    return [op.Gather(shape, axis, axis=0) for axis in (1, 2)]


def _without_ends_of_strips(op: Any, pixels: Any) -> Any:
    sides = _sides(op, pixels)
    longest = op.Mul(op.Min(*sides), LONGEST_STRIP)
    for axis, side in zip((1, 2), sides, strict=True):
        cut = op.Div(op.Max(op.Sub(side, longest), 0), 2)
        start, end = (op.Unsqueeze(end, [0]) for end in (cut, op.Sub(side, cut)))
        pixels = op.Slice(pixels, start, end, [axis])
    return pixels


def _resized(op: Any, x: Any, side: Any, resized: Any, transform: EvalTransform) -> Any:
    """The middle `transform.size` of the last axis, after resizing it: uint8 (..., side) -> (..., size)."""
    weights = _weights(op, side, resized, transform.interpolation)
    # A weight is below 1, or 1 where nothing is weighed: its fraction gets as many bits as fit.
    powers = _constant(op, 2.0 ** np.arange(1, _MOST_BITS + 1), np.float64)
    scaled = op.Floor(op.Add(op.Mul(op.ReduceMax(weights, keepdims=0), powers), 0.5))
    bits = op.ReduceSum(_double(op, op.Less(scaled, float(_WEIGHT_LIMIT))), keepdims=0)
    one = op.Pow(_constant(op, 2.0, np.float64), bits)
    first = op.Cast(op.Round(op.Div(_double(op, op.Sub(resized, transform.size)), 2.0)), to=_INT64)
    rows = op.Unsqueeze(first, [0])
    weights = op.Slice(weights, rows, op.Add(rows, transform.size), [0])
    weights = op.Transpose(weights, perm=[1, 0])
    total = _sum(op, x, op.Relu(weights), one)
    if transform.interpolation == "bicubic":  # which has negative ones
        total = op.Sub(total, _sum(op, x, op.Relu(op.Neg(weights)), one))
    levels = op.Floor(op.Div(op.Add(total, op.Div(one, 2.0)), one))
    return op.Cast(op.Clip(levels, 0.0, 255.0), to=_UINT8)


def _weights(op: Any, side: Any, resized: Any, interpolation: str) -> Any:
    """What each old pixel adds to each new one: (resized, side) float64."""
    scale = op.Div(_double(op, side), _double(op, resized))
    wide = op.Max(scale, _constant(op, 1.0, np.float64))
    reach = op.Mul(wide, 1.0 if interpolation == "bilinear" else 2.0)
    new = op.Unsqueeze(_double(op, op.Range(0, resized, 1)), [1])
    old = op.Unsqueeze(_double(op, op.Range(0, side, 1)), [0])
    centre = op.Mul(op.Add(new, 0.5), scale)
    first = op.Floor(op.Add(op.Sub(centre, reach), 0.5))
    end = op.Floor(op.Add(op.Add(centre, reach), 0.5))
    distance = op.Abs(op.Mul(op.Add(op.Sub(old, centre), 0.5), op.Reciprocal(wide)))
    inside = op.And(op.GreaterOrEqual(old, first), op.Less(old, end))
    weights = op.Where(inside, _filter(op, distance, interpolation), _constant(op, 0.0, np.float64))
    return op.Div(weights, op.ReduceSum(weights, [1]))


def _filter(op: Any, x: Any, interpolation: str) -> Any:
    """The weight at a distance of x new pixels."""
    if interpolation == "bilinear":
        return op.Relu(op.Sub(_constant(op, 1.0, np.float64), x))
    near = op.Add(op.Mul(op.Mul(op.Sub(op.Mul(x, 1.5), 2.5), x), x), 1.0)
    far = op.Mul(op.Sub(op.Mul(op.Add(op.Mul(op.Sub(x, 5.0), x), 8.0), x), 4.0), -0.5)
    return op.Where(op.Less(x, 1.0), near, op.Where(op.Less(x, 2.0), far, _constant(op, 0.0, np.float64)))


def _sum(op: Any, x: Any, weights: Any, one: Any) -> Any:
    """Exact sum of bytes times weights, which are >= 0 and below 2^15 / one; float64."""
    whole = op.Floor(op.Add(op.Mul(weights, one), 0.5))
    upper = op.Floor(op.Div(whole, 256.0))
    lower = op.Sub(whole, op.Mul(upper, 256.0))
    sums = [_double(op, op.MatMulInteger(x, op.Cast(part, to=_UINT8))) for part in (upper, lower)]
    return op.Add(op.Mul(sums[0], 256.0), sums[1])


def _double(op: Any, value: Any) -> Any:
    return op.Cast(value, to=_DOUBLE)


def _constant(op: Any, values: Any, kind: type[np.floating[Any]]) -> Any:
    import onnx_ir as ir

    return op.Constant(value=ir.tensor(np.asarray(values, kind)))
