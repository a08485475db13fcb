"""The content of a data set, and recipes that fit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tessella.data.sources import ImageSet
from tessella.data.sources.messages import not_read

_MOST_REASONS = 20  # that are named in brief


class Scan(NamedTuple):
    """The summary of a data set, which `tessella scan` shows."""

    images: int  # readable ones
    sizes: str  # in words
    passed_over: str  # files that are no images, by ending; empty if there are none
    unreadable: list[tuple[str, str]]  # name, reason
    recipes: tuple[str, ...]  # suggested ones
    reason: str

    def lines(self, brief: bool = False) -> list[str]:
        """For people: every unreadable file with its reason or, in brief, every reason with a few files."""
        files: dict[str, list[str]] = {}
        for name, reason in self.unreadable:
            files.setdefault(reason, []).append(name)
        reasons = sorted(files.items(), key=lambda item: -len(item[1]))[:_MOST_REASONS]
        summary = [f"{len(names):,} x {reason}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
                   for reason, names in reasons]  # fmt: skip
        more = [f"and {len(files) - len(reasons)} other reasons"] if len(files) > len(reasons) else []
        hint = ["all of them: tessella scan DATA > FILE"] if any(len(names) > 3 for names in files.values()) else []
        listed = summary + more + hint if brief else [f"{name}: {reason}" for name, reason in self.unreadable]
        return [
            f"images      {self.images:,}",
            f"sizes       {self.sizes}",
            *([f"passed over {self.passed_over}"] if self.passed_over else []),
            f"unreadable  {len(self.unreadable):,}",
            *(f"            {line}" for line in listed),
            f"recipe      {' or '.join(self.recipes)}: {self.reason}",
        ]


def scan_of(images: ImageSet, undecodable: list[tuple[str, str]]) -> Scan:
    """The summary of a data set, with name and reason of images whose pixels could not be decoded."""
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
    """The median of the shorter side of an image, in pixels."""
    return int(np.median(np.min(images.sizes, axis=1)))


def suggested_recipes(short_side: int) -> tuple[tuple[str, ...], str]:
    """Recipes for images whose shorter side has so many pixels in the median, and the reason."""
    if short_side <= 64:
        return ("swav_cpu", "jigclu_cpu"), "made for images of about 32 pixels, minutes on two cores"
    return (
        ("swav_imagenet_200ep_bs256", "jigclu_imagenet_200ep"),
        "made for photos, on GPUs; on a CPU, try things out with swav_cpu",
    )
