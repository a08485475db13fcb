"""How many copies `tessella duplicates` finds, of which kinds, and what it takes for a copy that is none.

    python -m benchmarks.find_copies --data photos/ --out FILE.json        # pip install imagehash, for the comparison

Every image gets one copy, of a kind drawn in turn. Recall: share of the copies of a kind that lie in a group with their
original. Wrong: pairs of different photos in one group. Beside it imagehash's pHash (64 bits, distance up to 8), whose
distances are compared by brute force in NumPy; seconds for both on the same files, in turns.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageEnhance

import tessella
from tessella.data.sources import open_images

FLIP = Image.Transpose


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """Without a border, of `share` of the sides in all, two thirds of it at the left and top."""
    width, height = picture.size
    left, top = 2 * share / 3, 2 * share / 3
    box = (width * left, height * top, width * (1 - share / 3), height * (1 - share / 3))
    return picture.crop(tuple(round(value) for value in box))  # type: ignore[arg-type]


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "encoded again, quality 30": lambda picture: jpeg(picture, 30),
    "half the size": lambda picture: picture.resize((max(16, picture.width // 2), max(16, picture.height // 2))),
    "30 % brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "gray": lambda picture: picture.convert("L").convert("RGB"),
    "mirrored": lambda picture: picture.transpose(FLIP.FLIP_LEFT_RIGHT),
    "turned by 90 degrees": lambda picture: picture.transpose(FLIP.ROTATE_90),
    "turned by 180 degrees": lambda picture: picture.transpose(FLIP.ROTATE_180),
    "turned by 3 degrees": lambda picture: picture.rotate(3, resample=Image.Resampling.BICUBIC),
    "cropped by 5 % of its sides": lambda picture: cropped(picture, 0.05),
    "cropped by 10 %": lambda picture: cropped(picture, 0.10),
    "cropped by 20 %": lambda picture: cropped(picture, 0.20),
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", required=True)
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--most", type=int, default=2000, help="images of the data that are used")
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_files(given.data, folder, given.most)
        seconds: dict[str, list[float]] = {"tessella": [], "imagehash": []}
        for _ in range(2):
            started = time.monotonic()
            groups = [group.keys for group in tessella.duplicates(open_images(str(folder)), workers=1).groups]
            seconds["tessella"].append(time.monotonic() - started)
            started = time.monotonic()
            others = by_hash(folder)
            seconds["imagehash"].append(time.monotonic() - started)
    rows = {"tessella": judged(groups, count), "imagehash": judged(others, count)}
    facts = {
        "command": " ".join(sys.argv),
        "images": count,
        "copies": count,
        "seconds": {name: round(min(values), 1) for name, values in seconds.items()},
        "versions": {name: version(name) for name in ("tessella", "imagehash", "torch")},
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    given.out.write_text(json.dumps({"facts": facts, "found": rows}, indent=1) + "\n")
    for kind in [*KINDS, "wrong pairs"]:
        print(f"{kind:<30}" + "".join(f"{name} {found[kind]:>8.4g}    " for name, found in rows.items()))
    print(facts["seconds"])


def write_files(data: str, folder: Path, most: int) -> int:
    """Original and copy of each image; the kind of the copy in its name."""
    images = open_images(data)
    rows = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int))
    for number, row in enumerate(rows.tolist()):
        picture = Image.fromarray(images.image(row))
        kind = number % len(KINDS)
        picture.save(folder / f"{number:05d}.png", compress_level=1)
        list(KINDS.values())[kind](picture).save(folder / f"{number:05d}-{kind:02d}.png", compress_level=1)
    return len(rows)


def judged(groups: list[list[str]], count: int) -> dict[str, float]:
    """Recall of each kind, and the number of pairs of different photos in one group."""
    found, wrong = np.zeros(count, bool), 0
    for keys in groups:
        numbers = [int(key[:5]) for key in keys]
        for number in set(numbers):
            found[number] |= numbers.count(number) == 2
        different = len(set(numbers))
        wrong += different * (different - 1) // 2
    kinds = np.arange(count) % len(KINDS)
    recall = {kind: float(found[kinds == number].mean()) for number, kind in enumerate(KINDS)}
    return recall | {"wrong pairs": float(wrong)}


def by_hash(folder: Path) -> list[list[str]]:
    """Pairs whose pHash differs in at most 8 bits."""
    names = sorted(path.name for path in folder.iterdir())
    bits = np.stack([imagehash.phash(Image.open(folder / name)).hash.ravel() for name in names]).astype(np.float32)
    signs = 2 * bits - 1
    pairs = []
    for start in range(0, len(names), 2048):
        same = (signs[start : start + 2048] @ signs.T + bits.shape[1]) / 2
        rows, columns = np.nonzero(same >= bits.shape[1] - 8)
        pairs += [[names[start + a], names[b]] for a, b in zip(rows, columns, strict=True) if start + a < b]
    return pairs


if __name__ == "__main__":
    main()
