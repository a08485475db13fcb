"""The page of an atlas in a real browser: size, first paint, frames while the map is dragged, memory.

    python -m benchmarks.atlas_page --photos photos/ --images 20000 --out benchmarks/results/atlas_page.json

Clusters and features are generated; the thumbnails are real photos, repeated. The browser is headless and draws in
software. Memory is the proportional set of all of its processes, after the map and the wall were used.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.table import Table

from benchmarks.side_by_side import report
from tessella.atlas.content import Group
from tessella.atlas.page import write_page
from tests.atlas.contents import generated
from tests.browser import Browser

_FRAMES = """new Promise((resolve) => {
  const times = [];
  let left = %d;
  const frame = (time) => { times.push(time); if (left-- > 0) requestAnimationFrame(frame); else resolve(times); };
  requestAnimationFrame(frame);
})"""


@dataclass(frozen=True)
class Options:
    """What is on the page."""

    photos: Path  # a folder with images, also in subfolders
    images: int = 20_000
    draw: Literal["", "webgl2", "plain"] = ""  # with what; default: as the page chooses
    out: Path | None = None


def repeated(folder: Path, side: int, most: int = 2_000) -> Callable[[int, int], NDArray[np.uint8]]:
    """Thumbnails of the photos in a folder, again and again in another order each time."""
    names = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")][:most]
    pictures = np.stack([np.asarray(ImageOps.fit(Image.open(name).convert("RGB"), (side, side))) for name in names])
    return lambda start, stop: pictures[(np.arange(start, stop) * 7919) % len(pictures)]


def memory(browser: Browser) -> float:
    """MiB of all processes of the browser; what they share counts once."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[2]) == browser.process:
                total += int((folder / "smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (OSError, IndexError):
            continue  # it has just ended
    return total / 1024


def drag(browser: Browser, steps: int = 60) -> list[float]:
    """Milliseconds between frames while the map is dragged."""
    browser.run(f"window.dragged = {_FRAMES % (steps - 10)}; 0")
    browser.mouse("mousePressed", 700, 500)
    for step in range(steps):
        browser.mouse("mouseMoved", 700 + 4 * step, 500 + 2 * step, buttons=1)
    browser.mouse("mouseReleased", 700 + 4 * steps, 500 + 2 * steps)
    times = browser.run("window.dragged")
    return [later - earlier for earlier, later in pairwise(times)]


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """All figures of one page."""
    n = options.images
    copies = [Group("near copies", [row, row + 1], "mirrored") for row in range(0, n - 1, 50)]
    content = generated(n, (8, 6, 6), 96, thumbnails=repeated(options.photos, 96), inbox=copies)
    start = time.perf_counter()
    page = write_page(content, folder)
    figures: dict[str, Any] = {"images": n, "write_s": time.perf_counter() - start}
    figures["html_mb"] = page.stat().st_size / 1e6
    figures["scripts_mb"] = sum(path.stat().st_size for path in folder.glob("page/*")) / 1e6
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        browser.look(1400, 900)
        browser.open(page, f"#{options.draw}")
        paint = browser.run("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        figures["first_paint_s"] = (paint or float("nan")) / 1000
        figures["ready_s"] = browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
        time.sleep(3)
        figures["memory_opened_mib"] = memory(browser)
        for name, zoom in (("whole map", 0), ("zoomed in", 6)):
            for _ in range(zoom):
                browser.mouse("mouseWheel", 650, 500, deltaX=0, deltaY=-300)
                time.sleep(0.2)
            time.sleep(1)
            frames = drag(browser)
            figures[f"longest_frame_ms, {name}"] = max(frames)
            figures[f"median_frame_ms, {name}"] = sorted(frames)[len(frames) // 2]
        browser.press("2")
        for _ in range(40):
            browser.run("document.getElementById('wall').scrollBy(0, 3000)")
            time.sleep(0.05)
        browser.press("3")
        time.sleep(1)
        figures["memory_used_mib"] = memory(browser)
        figures["errors"] = browser.errors()
    return figures


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    shown = Table("what", "figure", title="The page of an atlas")
    for name, value in figures.items():
        shown.add_row(name, f"{value:,.2f}" if isinstance(value, float) else str(value))
    report([shown], figures, "atlas_page.py", options.out)


if __name__ == "__main__":
    main()
