"""Small image files, folders and archives of them, and what it means that two sets are equal."""

from __future__ import annotations

import itertools
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tessella.data.sources import ImageSet

_numbers = itertools.count()


def write_image(path: Path, size: tuple[int, int] = (12, 8), **options) -> Path:
    """A PNG or JPEG unlike all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(next(_numbers)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG" if path.suffix.lower().startswith(".jp") else None, **options)
    return path


def write_folder(root: Path) -> Path:
    """Two classes, six images in three formats, and a file that is none."""
    for name in ("cat/a.jpg", "cat/deep/er/b.JPEG", "cat/c.png", "dog/a.jpg", "dog/b.webp"):
        write_image(root / name)
    write_image(root / "dog/wide.png", (30, 5))
    (root / "README.md").write_text("not an image")
    return root


def pack(archive: Path, folder: Path, mode: str = "w") -> Path:
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, arcname=".")
    return archive


def keys(images: ImageSet) -> list[str]:
    return [images.key(row) for row in range(len(images))]


def assert_equal_sets(one: ImageSet, other: ImageSet) -> None:
    assert keys(one) == keys(other)
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.sizes, other.sizes)
    assert one.fingerprint == other.fingerprint
    for row in range(len(one)):
        np.testing.assert_array_equal(one.image(row), other.image(row))
