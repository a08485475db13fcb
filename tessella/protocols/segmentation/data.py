"""The data of the segmentation protocol, and the check of all masks before hours of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tessella import dist
from tessella.data.decode import Unreadable
from tessella.data.masks.layouts import IGNORE, MaskedImages
from tessella.data.threads import portions, run_ahead
from tessella.errors import UserError
from tessella.protocols.dense import DenseData
from tessella.protocols.features import progress, rank_rows
from tessella.text import printable


@dataclass
class SegmentationData(DenseData[MaskedImages]):
    """Images with masks.

    Raises:
        UserError: train and test name other classes.
    """

    _survey: Survey | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        named = [images.classes for images in (self.train, self.test) if images.classes is not None]
        if len(named) == 2 and named[0] != named[1]:
            one, other = (", ".join(printable(name) for name in names[:5]) for names in named)
            raise UserError(
                f"{self.train.name} has {len(named[0])} classes ({one} ...) and {self.test.name} has {len(named[1])} "
                f"({other} ...): give both the same classes, in the same order"
            )

    def survey(self) -> Survey:
        """Every mask read once: which classes there are, and whether each mask is one. All ranks share the work.

        Raises:
            UserError: a mask is not of its image's size or holds what is no class; or train has nothing to learn.
        """
        if self._survey is None:
            train, test = (_count_pixels(images, self) for images in (self.train, self.test))
            classes = self.train.classes or self.test.classes
            if classes is None:
                last = int(np.flatnonzero((train + test)[:IGNORE]).max(initial=0))
                classes = [str(number) for number in range(last + 1)]
            _check_learnable(self.train, train)
            if not test[:IGNORE].any():
                raise UserError(f"{self.test.name} has no labelled pixel, so there is nothing to judge by")
            self._survey = Survey(classes, train[: len(classes)], test[: len(classes)])
        return self._survey


class Survey(NamedTuple):
    """What the masks hold."""

    classes: list[str]
    train: NDArray[np.int64]  # (classes,) pixels
    test: NDArray[np.int64]


def _count_pixels(images: MaskedImages, data: SegmentationData) -> NDArray[np.int64]:
    """Pixels of each stored class over all masks, (256,) int64; every rank reads its share."""
    counts = torch.zeros(256, dtype=torch.long)
    rows = rank_rows(len(images))

    def count(parts: list[NDArray[np.int64]], positions: list[int]) -> None:
        for row in rows[positions].tolist():
            with contextlib.suppress(Unreadable):  # reported when it is used
                parts.append(np.bincount(images.mask(row).ravel(), minlength=256))

    def drafts() -> Iterator[tuple[list[NDArray[np.int64]], list[Any]]]:
        for positions in portions(len(rows)):
            parts: list[NDArray[np.int64]] = []
            yield parts, [partial(count, parts, positions)]

    with dist.shared_errors(), contextlib.closing(run_ahead(drafts(), max(1, data.workers))) as done:
        for parts in progress(done, "checking masks", len(portions(len(rows)))):
            for part in parts:
                counts += torch.from_numpy(part)
    return dist.all_reduce_sum(counts.to(data.device)).cpu().numpy()


def _check_learnable(images: MaskedImages, counts: NDArray[np.int64]) -> None:
    present = np.flatnonzero(counts[:IGNORE])
    if len(present) >= 2:
        return
    share = counts[IGNORE] / max(counts.sum(), 1)
    hint = ", and 255 means a pixel that does not count: if it marks the object, store 1 instead" if share else ""
    what = f"only the class {int(present[0])}" if len(present) else "no labelled pixel"
    raise UserError(f"the masks of {images.name} hold {what}{hint}; give masks with two classes or more")
