"""What is in a data set, and which recipe fits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tessella.data.sources import ImageSet
from tessella.data.sources.messages import not_read


class Scan(NamedTuple):
    """What `tessella scan` has found."""

    images: int  # readable ones
    sizes: str  # in words
    passed_over: str  # files that are no images, by ending; empty if there are none
    unreadable: list[tuple[str, str]]  # name, reason
    recipes: tuple[str, ...]  # that fit
    reason: str

    def lines(self, most: int | None = None) -> list[str]:
        """For people.

        Args:
            most: unreadable files that are named; default: all.
        """
        failed = self.unreadable[:most]
        more = len(self.unreadable) - len(failed)
        return [
            f"images      {self.images:,}",
            f"sizes       {self.sizes}",
            *([f"passed over {self.passed_over}"] if self.passed_over else []),
            f"unreadable  {len(self.unreadable):,}",
            *(f"            {key}: {why}" for key, why in failed),
            *([f"            and {more:,} more: tessella scan DATA > FILE"] if more else []),
            f"recipe      {' or '.join(self.recipes)}: {self.reason}",
        ]


def scan_of(images: ImageSet, undecodable: list[tuple[str, str]]) -> Scan:
    """The summary of a data set.

    Args:
        images: opened.
        undecodable: name and reason of those whose pixels could not be decoded.
    """
    widths, heights = np.asarray(images.sizes).T
    short = short_side(images)
    sizes = (
        f"all {widths[0]} x {heights[0]} pixels"
        if images.uniform_size
        else f"{widths.min()} to {widths.max()} pixels wide, {heights.min()} to {heights.max()} high; "
        f"the shorter side has {short} in the median"
    )
    return Scan(
        len(images) - len(undecodable),
        sizes,
        not_read(images.passed_over) if images.passed_over else "",
        sorted([*images.unreadable, *undecodable]),
        *suggested_recipes(short),
    )


def short_side(images: ImageSet) -> int:
    """Of an image in the median, in pixels."""
    return int(np.median(np.min(images.sizes, axis=1)))


def suggested_recipes(short_side: int) -> tuple[tuple[str, ...], str]:
    """Recipes for images of a size, and why.

    Args:
        short_side: pixels, in the median.
    """
    if short_side <= 64:
        return ("swav_cpu", "jigclu_cpu"), "made for images of about 32 pixels, minutes on two cores"
    return (
        ("swav_imagenet_200ep_bs256", "jigclu_imagenet_200ep"),
        "made for photos, on GPUs; on a CPU, try things out with swav_cpu",
    )
