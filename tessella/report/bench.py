"""The measured rates of a machine as lines for people, with advice."""

from __future__ import annotations

from typing import NamedTuple

from tessella.engine.bench import PACKED_QUALITY, PACKED_SIDE, Rates
from tessella.run.config import RunConfig

_CLEAR = 1.2  # speed-up from which on a pack is worth a pass over the data


class Bench(NamedTuple):
    """The result of `tessella bench`."""

    config: RunConfig
    rates: Rates

    def lines(self) -> list[str]:
        """A table, then what limits and what would help."""
        return bench_lines(self.rates, self.config.recipe, self.config.backbone.name)


def bench_lines(rates: Rates, recipe: str, network: str) -> list[str]:
    """A table, then what limits and what would help."""
    size = f", {rates.mean_bytes / 1000:.1f} kB in the mean" if rates.mean_bytes else ""
    rows: list[tuple[str, float | None, str]] = [
        ("read", rates.read, "one thread, the first time (the system's cache may have held them)"),
        ("decode", rates.decode, "per core"),
        ("decode + views", rates.views, "per core" + (", colours included" if rates.device == "cpu" else "")),
        ("batches", rates.loader, "all images live there" if rates.resident else _threads(rates.workers)),
        ("training step", rates.step, f"{network}, batch {rates.step_batch}, on {rates.device}"),
    ]
    if rates.resident:
        rows = [row for row in rows if row[0] not in ("decode", "decode + views")]
    lines = [f"{rates.images:,} images tried{size}; recipe {recipe}", ""]
    lines += [f"{name:<22}{_figure(figure):>10} images/s   {how}" for name, figure, how in rows if figure is not None]
    return [*lines, "", *_advice(rates)]


def _advice(rates: Rates) -> list[str]:
    times = max(rates.loader, rates.step) / min(rates.loader, rates.step)
    if rates.limit == "training":
        lines = [f"Training limits: the images come {times:,.1f} times as fast as the step takes them."]
    else:
        lines = [f"The images limit: the step would take them {times:,.1f} times as fast as they come."]
    if rates.resident:
        return lines
    needed = rates.workers_needed
    lines.append(f"The step is fed by {_threads(needed)} with a core each; this process has {_threads(rates.workers)}.")
    if rates.packed_views is None or rates.packed_share is None:
        return lines
    gain = rates.packed_views / rates.views
    pack = f"A pack (shorter side {PACKED_SIDE}, quality {PACKED_QUALITY}) has {rates.packed_share:.0%} of the bytes"
    if gain < _CLEAR:
        return [*lines, f"{pack}, and would be no faster to read: not worth it for speed."]
    worth = "" if rates.limit == "images" else ", which would free cores but not shorten the run"
    return [*lines, f"{pack} and gives {rates.packed_views:,.0f} images/s per core, {gain:.1f} times as many{worth}."]


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"
