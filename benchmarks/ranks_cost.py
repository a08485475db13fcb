"""What ranks cost each other: collectives of a training step on several processes of this machine, over gloo.

    python benchmarks/ranks_cost.py --out benchmarks/results/ranks_cost_cpu.json

Every rank trains the same small network on its own share of the batch, with batch norm over all ranks and each gradient
summed by itself, as a run on CPUs does. Counted are calls and bytes that a rank hands in per step; timed is what the
whole process computes meanwhile, gloo's own threads included, which is more where ranks outnumber cores.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import method_cost
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
import tyro
from rich.table import Table
from side_by_side import report

from tessella.files import write_json
from tessella.modules.backbone import BackboneConfig
from tessella.modules.norm import synchronise_batch_norm

_COLLECTIVES = ("all_reduce", "all_gather", "all_to_all_single")


@dataclass(frozen=True)
class Options:
    """What is run."""

    ranks: tuple[int, ...] = (2, 4)
    batch_size: int = 32  # per rank
    steps: int = 4  # that count
    backbone: BackboneConfig = BackboneConfig("resnet10", width=16, stem="small")
    out: Path | None = None


class Watch:
    """Counts and times the collectives of torch.distributed."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes, self.seconds = 0, 0.0
        for name in _COLLECTIVES:
            setattr(torch_dist, name, self._watched(name, getattr(torch_dist, name)))

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(first: Any, *rest: Any, **options: Any) -> Any:
            handed_in = first if name == "all_reduce" else rest[0]
            self.calls[name] += 1
            self.bytes += handed_in.numel() * handed_in.element_size()
            start = time.process_time()
            try:
                return original(first, *rest, **options)
            finally:
                self.seconds += time.process_time() - start

        return collective


def on_rank(rank: int, ranks: int, label: str, options: Options, folder: str) -> None:
    """One process: a case of `method_cost.py` with its share of the batch."""
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    settings = method_cost.Options(backbone=options.backbone, batch_size=ranks * options.batch_size, device="cpu")
    case = method_cost.Case(method_cost.cases(settings)[label], settings)
    case.method = synchronise_batch_norm(case.method, case.device)
    mine = slice(rank * options.batch_size, (rank + 1) * options.batch_size)
    case.batch = case.batch._replace(
        views=tuple(v[:, mine] for v in case.batch.views), instances=case.batch.instances[mine]
    )
    update = case.optimizer.step

    def summed(*args: Any) -> Any:
        for parameter in case.method.parameters():
            if parameter.grad is not None:
                torch_dist.all_reduce(parameter.grad)
                parameter.grad.div_(ranks)
        return update(*args)

    case.optimizer.step = summed
    case.step()
    watch, steps, inside = Watch(), [], []
    for _ in range(options.steps):
        start, before = time.process_time(), watch.seconds
        case.step()
        steps.append(time.process_time() - start)
        inside.append(watch.seconds - before)
    if rank == 0:
        found = {
            "calls": {name: count / options.steps for name, count in watch.calls.items()},
            "mb": watch.bytes / options.steps / 1e6,
            "step_ms": 1000 * median(steps),
            "collectives_ms": 1000 * median(inside),
        }
        write_json(Path(folder) / "found.json", found)
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def main() -> None:
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    rows = []
    for label in method_cost.cases(method_cost.Options(backbone=options.backbone)):
        for ranks in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(on_rank, (ranks, label, options, folder), nprocs=ranks)
                rows.append({"case": label, "ranks": ranks} | _read(Path(folder) / "found.json"))
    shown = Table(title=f"{options.backbone.name}, {options.batch_size} images per rank, gloo on one machine")
    for column in ("method", "ranks", "calls", "MB handed in", "processor ms", "in collectives"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        calls, share = sum(row["calls"].values()), row["collectives_ms"] / row["step_ms"]
        shown.add_row(
            row["case"], str(row["ranks"]), f"{calls:.0f}", f"{row['mb']:.2f}", f"{row['step_ms']:.0f}", f"{share:.0%}"
        )
    settings = {key: value for key, value in asdict(options).items() if key != "out"}
    report([shown], {"options": settings, "rows": rows}, "ranks_cost.py", options.out)


def _read(path: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(path.read_text())
    return found


if __name__ == "__main__":
    main()
