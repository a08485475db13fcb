"""Cost of the methods side by side on one backbone: forwards per image, time of a step, peak memory.

    python benchmarks/method_cost.py --out benchmarks/results/method_cost_cpu.json

A case is a recipe with another network, batch or pixel size. Its step is all that a training step does on the device,
with the recipe's own optimiser, on random numbers that are already there: no decoding, no augmentation, and none of
the work that comes once per epoch. Beside it stands the bare backbone: forward and backward of the same number of
images of the same sizes (forward alone where the method has no backward), one pass per size, no optimiser. Cases run in
turn, A B C A B C ..., bare and whole one after the other, so that a busy moment meets all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from side_by_side import processor
from torch import Tensor

from tessella.data.batch import Batch
from tessella.data.views import CropGroup
from tessella.engine.launch import pick_device, repeatable
from tessella.files import write_json
from tessella.methods import build_method, method_of, views_of
from tessella.methods.coke import CokeConfig
from tessella.methods.jigclu import JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.method import Progress, Setting
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.optim import build_optimizer
from tessella.recipes import recipe
from tessella.recipes.cost import forwards, passes
from tessella.recipes.describe import views_in_words
from tessella.run.config import RunConfig
from tessella.run.folder import versions

_CIFAR10 = ("jigclu_cifar10", "mejigclu_cifar10", "coke_cifar10", "swav_cifar10", "smog_cifar10")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    recipes: tuple[str, ...] = _CIFAR10  # a CoKe recipe of two views is also measured with one of them
    backbone: BackboneConfig = BackboneConfig("resnet18", stem="small")  # of all cases
    batch_size: int = 64  # images per step
    size: int | None = None  # pixels of the large crops and montages, small crops in proportion; default: the recipes'
    images: int = 50_000  # rows of per-image state, which is counted in the memory
    rounds: int = 5  # steps of each case that count
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "32", "bf16"] = "auto"  # auto: bf16 on a GPU, as a run has it
    threads: int = 1  # of the CPU
    seed: int = 0
    memory: bool = True  # a fresh process for each case
    out: Path | None = None  # JSON with every figure


# --- cases ----------------------------------------------------------------------------------------------------


def cases(options: Options) -> dict[str, RunConfig]:
    """What is compared, by name."""
    found: dict[str, RunConfig] = {}
    for name in options.recipes:
        config = recipe(name)
        config = dataclasses.replace(config, backbone=options.backbone, batch_size=options.batch_size)
        if options.size:
            config = _at_size(config, options.size)
        method = config.method
        if isinstance(method, CokeConfig) and [g.views for g in method.views.groups] == [1, 1]:
            one = dataclasses.replace(method.views, groups=method.views.groups[:1])
            alone = dataclasses.replace(config, method=dataclasses.replace(method, views=one, temperature=0.1))
            found[_label(alone)] = alone
        found[_label(config)] = config
    return found


def _label(config: RunConfig) -> str:
    return f"{method_of(config.method).title}, {views_in_words(config)}"


def _at_size(config: RunConfig, size: int) -> RunConfig:
    method = config.method
    if isinstance(method, JigcluConfig | MejigcluConfig):
        return dataclasses.replace(config, method=dataclasses.replace(method, tile_size=size // method.tiles))
    large = method.views.groups[0].size

    def scaled(group: CropGroup) -> CropGroup:
        return dataclasses.replace(group, size=round(group.size * size / large))

    views = dataclasses.replace(method.views, groups=tuple(map(scaled, method.views.groups)))
    return dataclasses.replace(config, method=dataclasses.replace(method, views=views))


class Case:
    """One method on the device, ready to step, and the bare backbone beside it."""

    def __init__(self, config: RunConfig, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.device, self.config = pick_device(options.device), config
        setting = Setting(options.images, options.batch_size, options.seed)
        self.method = build_method(config.method, build_backbone(config.backbone), setting)
        self.method.to(self.device).to(memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(self.method, config.optimizer)
        self.progress = Progress(0, 100, config.epochs)
        self.half = options.precision == "bf16" or (options.precision == "auto" and self.device.type == "cuda")
        groups, n = views_of(config.method).groups, options.batch_size
        views = tuple(torch.randn(g.views, n, 3, g.size, g.size, device=self.device) for g in groups)
        self.batch = Batch(views, torch.arange(n, device=self.device) % options.images)

    def prepare_bare(self) -> None:
        """Make the bare backbone; kept apart so that the memory of the method is its own."""
        network = build_backbone(self.config.backbone).to(self.device)
        self.bare = network.to(memory_format=torch.channels_last).train()
        n = len(self.batch.instances)
        self.images = [
            (torch.randn(p.images * n, 3, p.size, p.size, device=self.device), p.trained) for p in passes(self.config)
        ]

    def step(self) -> None:
        """All that a training step does on the device."""
        with self._autocast():
            loss = self.method(self.batch, self.progress).loss
        loss.backward()
        self.method.before_update(self.progress)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_update(self.progress)
        self.progress = self.progress.next()

    def bare_step(self) -> None:
        """The same images through the backbone, with gradient where the method has one."""
        with self._autocast():
            loss = torch.stack([self._through(x, trained) for x, trained in self.images]).sum()
        loss.backward()
        self.bare.zero_grad()

    def _through(self, x: Tensor, trained: bool) -> Tensor:
        with torch.set_grad_enabled(trained):
            return self.bare(x).float().square().mean()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)


# --- time -----------------------------------------------------------------------------------------------------


def times(found: dict[str, RunConfig], options: Options) -> dict[str, dict[str, list[float]]]:
    """Seconds of each counted step, by case: of the whole and of the bare one, and the processor's share of them."""
    ready = {label: Case(config, options) for label, config in found.items()}
    taken: dict[str, dict[str, list[float]]] = {label: {} for label in ready}
    for case in ready.values():
        case.prepare_bare()
    for number in range(options.rounds + 1):
        for label, case in ready.items():
            for kind, run in (("bare", case.bare_step), ("step", case.step)):
                wall, processor = _seconds(run, case.device)
                if number:  # the first round warms up
                    taken[label].setdefault(f"{kind}_wall", []).append(wall)
                    taken[label].setdefault(f"{kind}_processor", []).append(processor)
    return taken


def _seconds(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Wall and processor time, with the kernels that a training run uses."""
    with repeatable(device):
        _wait(device)
        wall, processor = time.perf_counter(), time.process_time()
        run()
        _wait(device)
        return time.perf_counter() - wall, time.process_time() - processor


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory ---------------------------------------------------------------------------------------------------


def memory(label: str, options: Options) -> int | None:
    """Peak bytes of three steps of one case in a fresh process; None if that cannot be told here."""
    if pick_device(options.device).type == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, *sys.argv[1:]]
    environment = os.environ | {_MEMORY_OF: label}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


_MEMORY_OF = "TESSELLA_BENCHMARK_MEMORY_OF"  # the case that a child process measures


def _peak_of(config: RunConfig, options: Options) -> int:
    """On a GPU what torch had allocated at most; on a CPU how far the resident memory rose above the libraries'."""
    device = pick_device(options.device)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark := now
    before = _resident("VmRSS") if device.type == "cpu" else 0
    case = Case(config, options)
    for _ in range(3):
        _seconds(case.step, device)
    return _resident("VmHWM") - before if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


# --- the report -----------------------------------------------------------------------------------------------


def measure(options: Options) -> dict[str, Any]:
    """Everything, as it is written to the file."""
    found = cases(options)
    taken = times(found, options)
    device = pick_device(options.device)
    # On one thread of a CPU the processor's own clock: other work on the machine does not count in it.
    clock = "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
    rows = []
    for label, config in found.items():
        seen, seconds = passes(config), taken[label]
        whole, bare = seconds[f"step_{clock}"], seconds[f"bare_{clock}"]
        rows.append(
            {
                "case": label,
                "recipe": config.recipe,
                "forwards": forwards(seen),
                "forwards_without_backward": forwards(seen) - forwards([p for p in seen if p.trained]),
                "seconds": median(whole),
                "seconds_range": [min(whole), max(whole)],
                "times_bare": median(a / b for a, b in zip(whole, bare, strict=True)),
                "peak_bytes": memory(label, options) if options.memory else None,
                "rounds": seconds,
            }
        )
    return {
        "command": shlex.join(["python", "benchmarks/method_cost.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "clock": clock,
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "memory": "peak allocated by torch"
        if device.type == "cuda"
        else "rise of the resident set above the libraries",
        "versions": versions() | {"python": platform.python_version()},
        "cases": rows,
    }


def table(result: dict[str, Any]) -> Table:
    """The figures for people."""
    options, device = result["options"], result["device"]
    shown = Table(title=f"{options['backbone']['name']}, batch {options['batch_size']}, {device}")
    step = f"ms per step, {result['clock']}"
    for title in ("method", "forwards", "no backward", step, "images/s", "times bare", "peak MB"):
        shown.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for cells in lines(result):
        shown.add_row(*cells)
    return shown


def lines(result: dict[str, Any]) -> Iterator[list[str]]:
    """Cells of each case; times as median (least to greatest)."""
    for row in result["cases"]:
        low, high = (1000 * bound for bound in row["seconds_range"])
        yield [
            row["case"],
            f"{row['forwards']:.3g}",
            f"{row['forwards_without_backward']:.3g}",
            f"{1000 * row['seconds']:.0f} ({low:.0f}-{high:.0f})",
            f"{result['options']['batch_size'] / row['seconds']:.0f}",
            f"{row['times_bare']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        ]


def main() -> None:
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    torch.set_num_threads(options.threads)
    if _MEMORY_OF in os.environ:
        print(_peak_of(cases(options)[os.environ[_MEMORY_OF]], options))
        return
    result = measure(options)
    Console(width=None if Console().is_terminal else 120).print(table(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, result)


if __name__ == "__main__":
    main()
