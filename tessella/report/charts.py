"""Curves and bars as plain numbers, which a template draws as inline SVG.

Positions are in per cent of the plot. The line is in a square of 1000 x 1000 units that the browser stretches, so a
chart fits any screen while its text keeps its size. The page needs neither a library nor a script.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_MOST_POINTS = 600  # of a drawn curve: about what a screen can show
_MOST_BARS = 1500  # of more, evenly spaced ones are drawn
_GAPS_UP_TO = 150  # bars; more of them are drawn without a gap between them


class Tick(NamedTuple):
    """A number at an axis."""

    position: float  # per cent from the left or from the top
    label: str


class Chart(NamedTuple):
    """One chart. Texts are plain; the template escapes them."""

    title: str
    sentence: str  # what it shows and what is good
    path: str  # SVG path in 1000 x 1000 units, y downwards
    filled: bool
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    latest: str  # the last value; empty for bars
    rule: Tick | None  # a horizontal line to compare with


def line_chart(
    points: Iterable[tuple[float, float | None]],
    *,
    title: str,
    sentence: str,
    reaches: float = 0.0,
    rule: float | None = None,
    rule_label: str = "",
) -> Chart | None:
    """A curve over the steps of a run; None without a value. Its axis reaches 0, so that noise looks as small as it is.

    Args:
        points: (step, value), steps >= 0 and ascending; None and infinite values leave a gap.
        title: of the chart.
        sentence: what it shows and what is good.
        reaches: a value that the axis includes.
        rule: a value to mark with a horizontal line; the axis includes it.
        rule_label: of that line.
    """
    points = [(step, value if value is not None and math.isfinite(value) else None) for step, value in points]
    values = [value for _, value in points if value is not None]
    if not values:
        return None
    reached = [0.0, reaches, *values, *([rule] if rule is not None else [])]
    marks = nice_ticks(min(reached), max(reached))
    low, high, last = marks[0], marks[-1], max(1, *(step for step, _ in points))
    steps = [mark for mark in nice_ticks(0, last, whole=True) if mark <= last]

    def y(value: float) -> float:
        return 100 * (high - value) / (high - low)

    return Chart(
        title,
        sentence,
        path=_line(((10 * 100 * step / last, None if v is None else 10 * y(v)) for step, v in _thinned(points))),
        filled=False,
        x_ticks=[Tick(100 * step / last, label) for step, label in zip(steps, tick_labels(steps), strict=True)],
        y_ticks=[Tick(y(mark), label) for mark, label in zip(marks, tick_labels(marks), strict=True)],
        x_label="step",
        latest=f"{values[-1]:.4g}",
        rule=None if rule is None else Tick(y(rule), f"{rule_label} {rule:.4g}"),
    )


def bar_chart(heights: Sequence[int], *, title: str, sentence: str, x_label: str) -> Chart:
    """Bars side by side, at least one, of heights >= 0 in descending order; `x_label` names what a bar is."""
    marks, count = nice_ticks(0, max(max(heights), 1), whole=True), len(heights)
    numbers = [mark for mark in nice_ticks(0, count, whole=True) if 1 <= mark <= count]
    if count > _MOST_BARS:
        heights = [heights[i * count // _MOST_BARS] for i in range(_MOST_BARS)]
    width = 1000 / len(heights)
    bar = width * (0.8 if count <= _GAPS_UP_TO else 1.0)
    path = " ".join(
        f"M{i * width + (width - bar) / 2:.1f},1000V{1000 * (1 - height / marks[-1]):.1f}h{bar:.2f}V1000Z"
        for i, height in enumerate(heights)
        if height
    )
    return Chart(
        title,
        sentence,
        path,
        filled=True,
        x_ticks=[Tick(100 * (n - 0.5) / count, label) for n, label in zip(numbers, tick_labels(numbers), strict=True)],
        y_ticks=[
            Tick(100 * (1 - mark / marks[-1]), label) for mark, label in zip(marks, tick_labels(marks), strict=True)
        ],
        x_label=x_label,
        latest="",
        rule=None,
    )


def nice_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round, evenly spaced numbers, whole ones if asked for, that enclose [low, high]."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):  # a constant is drawn in the middle
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(factor * power for factor in factors if factor * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The numbers with just enough decimals to tell them apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    if step < 1e-4 or max(map(abs, ticks), default=0) >= 1e7:
        return [f"{tick:.3g}" for tick in ticks]
    decimals = next(d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6)
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """The lowest and the highest point of each stretch of a long curve, so that no spike is lost."""
    length = math.ceil(len(points) / (_MOST_POINTS // 2))
    if length <= 2:
        return list(points)
    thinned: list[tuple[float, float | None]] = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        values = [(value, step) for step, value in stretch if value is not None]
        if values:
            thinned += [(step, value) for step, value in sorted({min(values)[::-1], max(values)[::-1]})]
        else:
            thinned.append(stretch[0])
    return thinned


def _line(points: Iterable[tuple[float, float | None]]) -> str:
    parts, pen_down = [], False
    for x, y in points:
        if y is not None:
            # A single point becomes a dot: a line of length 0 with a round end.
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f},{y:.1f}" + ("" if pen_down else "h0"))
        pen_down = y is not None
    return "".join(parts)
