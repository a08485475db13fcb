r"""What recipes reach: train in slices of minutes, resume exactly, judge, one record per run.

    python benchmarks/recipe_scores.py --data cifar10.tar.gz::cifar10/train --test cifar10.tar.gz::cifar10/test \
        --recipes swav_cifar10 jigclu_cifar10 --seeds 0 --minutes 25 --out benchmarks/results/cifar10_gpu.json

Each run lies in its own folder below `--runs`. When the minutes are over, the run at hand is told to stop as any run
may be (SIGTERM: it saves and exits with code 75), and the next call goes on with it. Runs that are complete are judged
by kNN, a linear probe and k-means, the same network at random init beside them.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro

from tessella.files import write_json

_SHOWN = (("knn", "top1", "kNN"), ("linear-fast", "top1", "linear"), ("clustering", "accuracy", "k-means ACC"))


@dataclass(frozen=True)
class Options:
    """What is run."""

    data: str  # images to train on, and the labelled train images of the probes
    test: str  # labelled images to be judged on
    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    minutes: float = 600.0  # of training in this call, over all runs; what is left goes on in the next call
    runs: Path = Path("runs")
    out: Path | None = None  # JSON of all records
    settings: tuple[str, ...] = field(default=())  # handed to `tessella pretrain`, as in --settings epochs=100


def main(options: Options) -> int:
    """Train, judge, print a table, write the records; 0 if every run is complete."""
    deadline = time.monotonic() + 60 * options.minutes
    records, open_runs = [], []
    for seed in options.seeds:
        for recipe in options.recipes:
            run = options.runs / f"{recipe}-seed{seed}"
            if not _train(options, recipe, seed, run, deadline):
                open_runs.append(str(run))
                continue
            records.append(_record(options, recipe, seed, run))
    _print_table(options, records)
    if options.out is not None:
        write_json(options.out, {"command": _quoted(sys.argv), "records": records, "incomplete": open_runs})
    for run in open_runs:
        print(f"not complete yet: {run}; the same command goes on with it")
    return 1 if open_runs else 0


def _train(options: Options, recipe: str, seed: int, run: Path, deadline: float) -> bool:
    """Whether the run is complete now."""
    if (run / "backbone.safetensors").exists():
        return True
    if deadline - time.monotonic() < 5:
        return False
    words = (
        ["resume", str(run), "--data", options.data]
        if (run / "config.yaml").exists()
        else _first(options, recipe, seed, run)
    )
    process = subprocess.Popen([sys.executable, "-m", "tessella", *words])
    try:
        code = process.wait(deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code not in (0, 75):
        raise SystemExit(f"tessella {_quoted(words)} ended with code {code}")
    return code == 0


def _first(options: Options, recipe: str, seed: int, run: Path) -> list[str]:
    flags = [word for setting in options.settings for word in _flag(setting)]
    return ["pretrain", recipe, "--data", options.data, "--out", str(run), "--seed", str(seed), *flags]


def _flag(setting: str) -> tuple[str, str]:
    name, _, value = setting.partition("=")
    return f"--{name.replace('_', '-')}", value


def _record(options: Options, recipe: str, seed: int, run: Path) -> dict[str, Any]:
    words = [
        "evaluate", str(run), "--train", options.data, "--test", options.test, "--baseline", "--seed", str(seed),
        "--protocols", "knn", "linear", "clustering", "--out", str(run),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "tessella", *words], check=True, stdout=subprocess.DEVNULL)
    steps = [line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["kind"] == "step"]
    speeds = sorted(line["timing"]["images_per_second"] for line in steps)
    return {
        "recipe": recipe,
        "seed": seed,
        "commands": [f"tessella {_quoted(_first(options, recipe, seed, run))}", f"tessella {_quoted(words)}"],
        "environment": json.loads((run / "environment.json").read_text()),
        "steps": steps[-1]["step"],
        "images_per_second": speeds[len(speeds) // 2],  # median of the log lines
        "last_step": {k: v for k, v in steps[-1].items() if k != "timing"},
        "evaluation": json.loads((run / "evaluation.json").read_text()),
    }


def _print_table(options: Options, records: list[dict[str, Any]]) -> None:
    print(
        f"{'per cent (over random init)':<28}" + "".join(f"{title:>24}" for *_, title in _SHOWN) + f"{'images/s':>10}"
    )
    for recipe in options.recipes:
        mine = [record for record in records if record["recipe"] == recipe]
        if not mine:
            continue
        cells = []
        for protocol, metric, _ in _SHOWN:
            scores = [e for record in mine for e in record["evaluation"] if e["protocol"] == protocol]
            values = [100 * e["scores"][metric] for e in scores]
            gains = [100 * (e["scores"][metric] - e["baseline"]["scores"][metric]) for e in scores]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread} ({mean(gains):+.1f})")
        speed = mean(record["images_per_second"] for record in mine)
        print(f"{recipe + f', {len(mine)} seeds':<28}" + "".join(f"{cell:>24}" for cell in cells) + f"{speed:>10,.0f}")


def _quoted(words: list[str]) -> str:
    return " ".join(map(shlex.quote, words))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
