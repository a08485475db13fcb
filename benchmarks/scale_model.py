"""From 8 to 512 GPUs on paper: what each method sends per step, how long that takes, and what it keeps per image.

    python benchmarks/scale_model.py --intra 300 --inter 25 --out benchmarks/results/scale_model.json

Nothing is measured here. The payloads are those of the code, which a test counts on two processes; the times follow
from the link speeds that are given. In a ring 2 (R - 1) / R of an all-reduced tensor leave each rank, R - 1 times its
own part of a gathered one, (R - 1) / R of an exchanged one. Nothing is hidden behind computation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich.table import Table
from side_by_side import report

from tessella.methods.coke import CokeConfig
from tessella.methods.jigclu import JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig
from tessella.methods.swav import SwavConfig


@dataclass(frozen=True)
class Options:
    """Assumptions."""

    ranks: tuple[int, ...] = (8, 64, 512)
    batch_size: int = 32  # images per GPU
    images: tuple[int, ...] = (1_281_167, 100_000_000)
    parameters: int = 28_000_000  # ResNet-50 and heads, float32 gradients
    norm_channels: int = 26_560  # of all batch norms of the ResNet-50
    per_node: int = 8  # GPUs
    intra: float = 300.0  # GB/s per GPU and direction within a node
    inter: float = 25.0  # GB/s per GPU and direction between nodes
    latency: float = 30.0  # microseconds per collective
    views_per_second: float = 3000.0  # ResNet-50 at 224 pixels, forward and backward, of one GPU
    out: Path | None = None


class Sent(NamedTuple):
    """One collective: what a rank hands in."""

    kind: Literal["reduce", "gather", "exchange"]
    payload: float  # bytes


class Cost(NamedTuple):
    """A method at scale."""

    sent: list[Sent]  # per step, beside gradients and batch norm
    views: float  # of 224 pixels per image, forward and backward
    passes: int  # of the network, each with its batch norms
    table: float  # bytes per image that every GPU keeps


MethodConfig = SwavConfig | JigcluConfig | MejigcluConfig | SmogConfig | CokeConfig


def cost(config: MethodConfig, batch: int, ranks: int) -> Cost:
    """What the code sends; `batch` images per rank."""
    if isinstance(config, SwavConfig):
        a = config.views.groups[0].views
        masses = [Sent("reduce", 4 * a * k) for k in config.heads for _ in range(config.sinkhorn_iterations)]
        queues = [Sent("gather", 4 * batch * config.embedding_dim)] * (a if config.queue_length else 0)
        return Cost(masses + queues, _area(config), len(config.views.groups), 0)
    if isinstance(config, JigcluConfig | MejigcluConfig):
        m2 = config.tiles**2
        embeddings = 4 * m2 * batch * config.embedding_dim
        sent = [Sent("exchange", 4 * m2 * batch * 3 * config.tile_size**2), Sent("gather", embeddings)]
        sent.append(Sent("reduce", embeddings * ranks))  # the way back
        categories = isinstance(config, MejigcluConfig) and config.slots == "subsets"
        return Cost(sent + [Sent("gather", 8 * batch)] * categories, 1.0, 1, 4.0 * categories)
    if isinstance(config, SmogConfig):
        large, d = config.views.groups[0].views, config.embedding_dim
        groups = config.group_sets * config.groups
        wide = 8  # bytes: sums are double on a GPU
        sent = [Sent("reduce", wide * groups * d), Sent("reduce", wide * groups)]
        sent += [Sent("gather", 8 * batch), Sent("gather", 4 * batch * large * d)]
        return Cost(sent, _area(config) / 2 * (1 + 1 / 3), 2, 4 * large * d + 1)
    heads, single = len(config.centres), config.views.views == 1
    row = heads * (config.label_slots if single else 1) * 4
    sent = [Sent("gather", 4 * batch * config.embedding_dim), Sent("gather", 8 * batch * heads)]
    sent += [Sent("gather", 8 * batch), Sent("gather", batch * row)]
    return Cost(sent, _area(config), config.views.views, row * (2 if single else 1))


def _area(config: SwavConfig | SmogConfig | CokeConfig) -> float:
    return sum(group.views * (group.size / 224) ** 2 for group in config.views.groups)


def moved(sent: Sent, ranks: int) -> float:
    """Bytes that leave a rank in a ring."""
    share = {"reduce": 2 * (ranks - 1) / ranks, "gather": ranks - 1, "exchange": (ranks - 1) / ranks}
    return sent.payload * share[sent.kind]


METHODS: dict[str, MethodConfig] = {
    "SwAV": SwavConfig(queue_length=3840),
    "JigClu": JigcluConfig(),
    "MEJigClu": MejigcluConfig(),
    "SMoG": SmogConfig(),
    "CoKe, one view": CokeConfig(),
}


def rows_of(options: Options) -> list[dict[str, Any]]:
    """A row per method and number of ranks."""
    rows = []
    for name, config in METHODS.items():
        for ranks in options.ranks:
            found = cost(config, options.batch_size, ranks)
            gradients = [Sent("reduce", 4 * options.parameters)]
            # Forward: mean, variance and count of each norm, gathered; backward: two sums, all-reduced.
            norms = [
                Sent("gather", 8 * options.norm_channels),
                Sent("reduce", 8 * options.norm_channels),
            ] * found.passes
            speed = 1e9 * (options.intra if ranks <= options.per_node else options.inter)
            kinds = {"gradients": gradients, "batch_norm": norms, "method": found.sent}
            bytes_of = {kind: sum(moved(s, ranks) for s in sent) for kind, sent in kinds.items()}
            calls = len(found.sent) + 2 * 53 * found.passes
            milliseconds = {kind: 1000 * b / speed for kind, b in bytes_of.items()}
            step = 1000 * options.batch_size * found.views / options.views_per_second
            rows.append(
                {
                    "method": name,
                    "ranks": ranks,
                    "mb": {kind: b / 1e6 for kind, b in bytes_of.items()},
                    "ms": milliseconds | {"latency": calls * options.latency / 1000},
                    "step_ms": step,
                }
            )
    return rows


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = rows_of(options)
    shown = Table(
        title=f"Per step and GPU, {options.batch_size} images each; ms at {options.inter:g} GB/s between nodes"
    )
    for column in ("method", "GPUs", "gradients MB", "batch norm MB", "method MB", "sending ms", "calls ms", "step ms"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        sending = sum(ms for kind, ms in row["ms"].items() if kind != "latency")
        numbers = (*row["mb"].values(), sending, row["ms"]["latency"], row["step_ms"])
        shown.add_row(row["method"], str(row["ranks"]), *(f"{number:.1f}" for number in numbers))
    tables = Table(title="State with a row per image, GB on every GPU")
    tables.add_column("method")
    sizes: dict[str, list[float]] = {}
    for images in options.images:
        tables.add_column(f"{images:,} images", justify="right")
    for name, config in METHODS.items():
        sizes[name] = [cost(config, options.batch_size, 8).table * images / 1e9 for images in options.images]
        tables.add_row(name, *(f"{size:.2f}" for size in sizes[name]))
    settings = {key: value for key, value in asdict(options).items() if key != "out"}
    report([shown, tables], {"options": settings, "steps": rows, "tables_gb": sizes}, "scale_model.py", options.out)


if __name__ == "__main__":
    main()
