"""Images as a Python program has them: each way of giving them gives the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.data.sources.objects import images_of
from tessella.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


class Mine:
    """The documented contract, and nothing more."""

    classes = ("cat", "dog", "owl")

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, i: int) -> Any:
        return Image.fromarray(PIXELS[i]), LABELS[i]


def of_torch() -> Any:
    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(PIXELS)

        def __getitem__(self, i: int) -> Any:
            return PIXELS[i], LABELS[i]

    return Pairs()


def paths(folder: Path) -> list[Path]:
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(PIXELS))]


@pytest.mark.parametrize(
    "given",
    [
        lambda folder: PIXELS,
        lambda folder: (PIXELS, LABELS),
        lambda folder: [Image.fromarray(pixels) for pixels in PIXELS],
        lambda folder: list(PIXELS),
        paths,
        lambda folder: [str(path) for path in paths(folder)],
        lambda folder: [{"image": Image.fromarray(pixels), "label": 1} for pixels in PIXELS],
        lambda folder: Mine(),
        lambda folder: of_torch(),
    ],
)
def test_every_way_of_giving_images_gives_the_same_pixels(given: Any, tmp_path: Path):
    images = images_of(given(tmp_path))
    assert len(images) == 6 and images.uniform_size == (24, 20) and images.labels is None
    np.testing.assert_array_equal(np.stack([images.image(row) for row in range(6)]), PIXELS)


@pytest.mark.parametrize("given", [(PIXELS, LABELS), Mine(), of_torch()])
def test_classes_come_along_when_they_are_needed(given: Any):
    images = images_of(given, labels=True)
    assert images.labels is not None and images.labels.tolist() == LABELS
    assert images.classes == (["cat", "dog", "owl"] if isinstance(given, Mine) else ["0", "1", "2"])


def test_sizes_may_differ_and_the_fingerprint_is_of_the_pixels():
    small = [PIXELS[0], PIXELS[1][:10, :12]]
    images = images_of(small)
    assert images.sizes.tolist() == [[24, 20], [12, 10]] and images.uniform_size is None
    assert images.fingerprint == images_of([Image.fromarray(x) for x in small]).fingerprint
    assert images.fingerprint != images_of([small[0], 255 - small[1]]).fingerprint


@pytest.mark.parametrize(
    ("given", "labels", "said"),
    [
        (PIXELS, True, "labels are needed here"),
        (list(PIXELS), True, "image 0 has no class"),
        ([], False, "without images"),
        (7, False, "given as a int: give a name"),
        ({"a": PIXELS}, False, "given as a dict"),
        ([PIXELS[0], PIXELS[1].astype(float)], False, "image 1 is a array of float64"),
        ([PIXELS[0].transpose(2, 0, 1)], False, "colours last"),
        ([PIXELS[0], "no such file.png"], False, "image 1, no such file.png, cannot be read"),
    ],
)
def test_what_cannot_be_used_is_said(given: Any, labels: bool, said: str):
    with pytest.raises(UserError, match=said):
        images_of(given, labels)
