"""What the page of an atlas shows: the bridge from the stages that compute to the page that draws.

All arrays are in page order: by cluster, and from typical to odd within a cluster; images without a cluster come last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bits of `Content.flags`.
DARK, BRIGHT, BLANK, BLURRED, COPY, OUTLIER = (1 << bit for bit in range(6))


@dataclass(frozen=True)
class Cluster:
    """A node of the cluster tree."""

    path: str  # "2", "2.1", "2.1.3": level 1 to 3, numbered from 1, larger siblings first
    size: int  # images below it
    start: int  # page rows start .. start + size are its images
    cohesion: float  # mean cosine of its images to their own fine cluster's centre, in [-1, 1]


@dataclass(frozen=True)
class Group:
    """Images of the inbox that belong together."""

    kind: str  # "exact copies", "near copies", "outliers", "blurred", "dark", "bright", "blank", "unsure names"
    rows: list[int]  # page rows; of copies the one to keep comes first
    why: str  # one line: "mirrored", "cosine 0.31 to its nearest neighbours", ...


@dataclass(frozen=True)
class Content:
    """Everything on the page."""

    title: str  # the data set's name
    atlas: str  # identifies the atlas: key of what the browser keeps; stays the same when the page is written again
    revision: str  # hash of the clustering; paths in events belong to it
    banner: list[str]  # what the features are and how far they can be trusted, a sentence each
    stages: list[tuple[str, str]]  # name, "done in 12 s" | "running" | "to do"
    facts: dict[str, str]  # name -> value, in words, for the provenance panel
    total: int  # images of the atlas; the page may show a sample of them
    keys: list[str]  # (n,) names of the images within the data set
    ids: NDArray[np.int64]  # (n,) stable; events name images by them, as decimal text
    href: list[str] | None  # (n,) address of each original, relative to the page; None: they are not plain files
    sizes: NDArray[np.int32]  # (n, 2) width, height of the originals in pixels
    flags: NDArray[np.uint8]  # (n,) bits above
    clusters: list[Cluster]  # in the order of their paths, a parent before its children; empty before clustering
    fine: NDArray[np.int32]  # (n,) index into `clusters` of the finest cluster; -1: none yet
    runner_up: NDArray[np.int32]  # (n,) index of the second nearest fine cluster; -1
    margin: NDArray[np.float32]  # (n,) cosine to the own minus cosine to the runner-up, at least 0
    typicality: NDArray[np.float32]  # (n,) share of images of the cluster that are less typical, in [0, 1]
    outlier: NDArray[np.float32]  # (n,) share of all images with nearer neighbours, in [0, 1]
    place: NDArray[np.float32] | None  # (n, 2) on the map, in [0, 1]; None before there is a map
    neighbours: NDArray[np.int32]  # (n, m) page rows, nearest first; -1 where there are none; m may be 0
    similarity: NDArray[np.float32]  # (n, m) cosines
    components: NDArray[np.int8]  # (n, p) leading principal components, scaled to [-127, 127]: splits use them
    labels: list[str]  # (n,) label from before (a list, classes, an earlier naming); "" for none
    inbox: list[Group]
    unreadable: list[tuple[str, str]]  # key, reason
    events: list[dict[str, Any]]  # of names.json, see `names.py`
    thumbnails: Callable[[int, int], NDArray[np.uint8]] = field(repr=False)  # (start, stop) -> (b, side, side, 3)
    side: int = 0  # pixels of the thumbnails that `thumbnails` gives
