"""What stands before the first step: imports, the order of images, the index of a large folder, a run's first step.

    python benchmarks/start_up.py --images 1000000 --out benchmarks/results/start_up.json

The folder holds hard links to a few small images, so that it costs directory entries and no space; headers are still
read name by name. Every figure is taken in a fresh process: processor seconds, and wall seconds beside them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from rich.table import Table
from side_by_side import report

IMPORTS = {
    "an empty program": "pass",
    "tessella --help": "from tessella.cli import main; main(['--help'])",
    "import tessella": "import tessella",
    "import torch": "import torch",
    "import torch, make an optimiser": "import torch; torch.optim.SGD([torch.zeros(1)], lr=1)",
    "all that a run imports": "import tessella.engine.pretrain",
    "lightly's transforms, losses, models": "import lightly.transforms, lightly.loss, lightly.models",
}
_OPEN = "from pathlib import Path; from tessella.data.sources import open_images; print(len(open_images({data!r})))"
ORDERS = {  # 100 steps of 256 images from a hundred million
    "order, 100 steps, 100,000,000 images": "EpochSampler(10**8, 256, 0)",
    "order by categories, 100 steps, 100,000,000 images": "SlotSampler(10**8, 256, 0, parts=256, partition_seed=0)",
}
_STEPS = "from tessella.data.sampler import *; order = {order}; [order.batch(3, step) for step in range(100)]"
_LINKS = 20_000  # of one file, below what file systems allow


@dataclass(frozen=True)
class Options:
    """How many images."""

    images: int = 100_000
    rounds: int = 3  # of the imports
    recipe: str = "swav_cpu"  # of the run up to its first step
    folder: Path | None = None  # where the images are linked; default: a temporary folder
    out: Path | None = None


def timed(code: str, **environment: str) -> dict[str, float]:
    """Processor and wall seconds, and peak memory, of a fresh interpreter that runs the code."""
    wrapped = (
        "import os, sys, time, resource; t = time.perf_counter()\n"
        f"try:\n exec({code!r})\nfinally:\n r = resource.getrusage(resource.RUSAGE_SELF)\n"
        " print(r.ru_utime + r.ru_stime, time.perf_counter() - t, r.ru_maxrss / 1024, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    processor, wall, peak = map(float, done.stderr.split()[-3:])
    return {"processor_s": processor, "wall_s": wall, "peak_mib": peak}


def imports(rounds: int) -> list[dict[str, Any]]:
    """The imports in turn; medians."""
    taken: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            if name.startswith("lightly") and subprocess.run([sys.executable, "-c", "import lightly"]).returncode:
                continue
            taken.setdefault(name, []).append(timed(code))
    return [{"what": name} | {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in taken.items()]


def link_images(folder: Path, images: int) -> None:
    """`images` names in folders of 1,000."""
    from PIL import Image

    originals: list[Path] = []
    for number in range(-(-images // _LINKS)):
        originals.append(folder / f"original-{number}.jpg")
        Image.new("RGB", (32, 32), (number % 256, 9, 99)).save(originals[-1])
    for number in range(len(originals), images):
        inside = folder / f"{number // 1000:06d}"
        if number % 1000 == 0 or not inside.exists():
            inside.mkdir(exist_ok=True)
        os.link(originals[number // _LINKS], inside / f"{number:09d}.jpg")


def first_steps(folder: Path, options: Options) -> list[dict[str, Any]]:
    """The index the first time and again, and a run's first step on the finished index."""
    data, cache = folder / "images", folder / "cache"
    data.mkdir(parents=True)
    link_images(data, options.images)
    where = {"TESSELLA_CACHE": str(cache)}
    code = _OPEN.format(data=str(data))
    train = (
        f"from tessella.cli import main; code = main(['pretrain', {options.recipe!r}, '--data', {str(data)!r}, "
        f"'--out', {str(folder / 'run')!r}, '--max-steps', '1', '--workers', '1']); assert code == 0"
    )
    n = f"{options.images:,} images"
    return [
        {"what": f"index of {n}, built"} | timed(code, **where),
        {"what": f"index of {n}, opened again"} | timed(code, **where),
        {"what": f"run up to and with its first step, {n}"} | timed(train, **where),
    ]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = imports(options.rounds)
    rows += [{"what": what} | timed(_STEPS.format(order=order)) for what, order in ORDERS.items()]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows += first_steps(Path(folder), options)
    shown = Table("what", "processor s", "wall s", "peak MiB", title="Start")
    for row in rows:
        shown.add_row(row["what"], f"{row['processor_s']:.2f}", f"{row['wall_s']:.2f}", f"{row['peak_mib']:.0f}")
    report([shown], {"images": options.images, "rows": rows}, "start_up.py", options.out)


if __name__ == "__main__":
    main()
