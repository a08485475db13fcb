"""What the speed benchmarks share: cases in turn, the processor's clock, ratios round by round, one table, one file.

Cases run A B C A B C ..., so that a busy moment meets all of them; the first round warms up and does not count. The
clock is the processor's time of this process, in which other work on the machine does not count: set one thread, or
spinning threads look like work. A ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


def in_turn(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each case in each counted round."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, run in cases.items():
            gc.collect()
            start = time.process_time()
            run()
            seconds = time.process_time() - start
            if number:
                taken[name].append(seconds)
    return taken


def compared(seconds: Mapping[str, list[float]], base: str) -> list[dict[str, Any]]:
    """A row per case: median, range, and how many times faster than the base it was in the same round."""
    rows = []
    for name, mine in seconds.items():
        ratios = sorted(b / a for a, b in zip(mine, seconds[base], strict=True))
        rows.append(
            {
                "case": name,
                "ms": 1000 * median(mine),
                "ms_range": [1000 * min(mine), 1000 * max(mine)],
                "times_faster": median(ratios),
                "times_faster_range": [ratios[0], ratios[-1]],
                "rounds_ms": [1000 * s for s in mine],
            }
        )
    return rows


def installed(module: str) -> bool:
    """Whether a peer is there."""
    return importlib.util.find_spec(module) is not None


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass; each storage counts once."""
    import torch

    kept: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)  # or its address could be given to another tensor
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(kept.values())


def table(title: str, rows: list[dict[str, Any]], more: Mapping[str, str] | None = None) -> Table:
    """The rows for people: milliseconds (least to greatest), ratio to the base (least to greatest), more columns."""
    more = more or {}
    shown = Table(title=title)
    for column in ("case", "ms of processor", "times faster", *more.values()):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        (low, high), (worst, best) = row["ms_range"], row["times_faster_range"]
        ratio = f"{row['times_faster']:.2f} ({worst:.2f}-{best:.2f})"
        extra = (_short(row.get(key)) for key in more)
        shown.add_row(row["case"], f"{row['ms']:.1f} ({low:.1f}-{high:.1f})", ratio, *extra)
    return shown


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def report(tables: list[Table], result: dict[str, Any], script: str, out: Path | None) -> None:
    """Print the tables; write everything, with command, machine and versions, if a file is named."""
    console = Console(width=None if Console().is_terminal else 120)
    for one in tables:
        console.print(one)
    if out is None:
        return
    about = {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(about | result, indent=1) + "\n")


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> Iterator[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    own = ("tessella", "torch", "torchvision", "numpy", "numba", "Pillow", "simplejpeg")
    for package in (*own, "lightly", "albumentations", "scikit-learn"):
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)
