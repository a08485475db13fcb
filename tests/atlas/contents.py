"""Contents of pages from generated numbers, for tests and benchmarks: clusters are clouds on the map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessella.atlas.content import Cluster, Content, Group


def patterns(side: int) -> Callable[[int, int], NDArray[np.uint8]]:
    """Thumbnails of one colour each, with a diagonal."""

    def thumbnails(start: int, stop: int) -> NDArray[np.uint8]:
        rows = np.arange(start, stop)
        pictures = np.empty((len(rows), side, side, 3), np.uint8)
        pictures[:] = np.stack([rows * 37 % 256, rows * 91 % 256, rows * 53 % 256], 1)[:, None, None]
        pictures[:, np.arange(side), np.arange(side)] = 255
        return pictures

    return thumbnails


def generated(n: int, branches: tuple[int, int, int] = (3, 2, 2), side: int = 32, **changes: Any) -> Content:
    """An atlas of `n` images in a tree of clusters, with some of everything in the inbox.

    Args:
        n: images.
        branches: clusters of level 1, and inner ones of a cluster of level 1 and 2.
        side: of the thumbnails.
        changes: other values of `Content`.
    """
    random = np.random.default_rng(0)
    sizes = random.multinomial(n - np.prod(branches), np.full(np.prod(branches), 1 / np.prod(branches))) + 1
    tree = sizes.reshape(branches)
    clusters: list[Cluster] = []
    fine, typicality, place = np.zeros(n, np.int32), np.zeros(n, np.float32), np.zeros((n, 2), np.float32)
    components = np.zeros((n, 8), np.int8)
    start = 0
    for a in range(branches[0]):
        clusters.append(Cluster(f"{a + 1}", int(tree[a].sum()), start, 0.4))
        for b in range(branches[1]):
            clusters.append(Cluster(f"{a + 1}.{b + 1}", int(tree[a, b].sum()), start, 0.5))
            for c in range(branches[2]):
                size = int(tree[a, b, c])
                rows = slice(start, start + size)
                fine[rows], typicality[rows] = len(clusters), 1 - (np.arange(size) + 1) / size
                middle = [a % 3 + 0.4 * (b % 3) + 0.15 * (c % 3), a // 3 + 0.4 * (b // 3) + 0.15 * (c // 3)]
                place[rows] = middle + 0.05 * random.standard_normal((size, 2))
                # Two kinds of images in each cluster, which a split should find.
                components[rows] = random.integers(-20, 20, (size, 8)) + np.where(np.arange(size) % 2, 80, -80)[:, None]
                clusters.append(Cluster(f"{a + 1}.{b + 1}.{c + 1}", size, start, 0.6))
                start += size
    place = (place - place.min(0)) / np.ptp(place, 0).max()
    content = Content(
        title="Generated images",
        atlas="generated",
        revision="first",
        banner=["The features are generated: expect nothing of them.", "Nobody has checked them."],
        stages=[("index", "done in 1 s"), ("map", "done in 2 s")],
        facts={"images": f"{n:,}"},
        total=n,
        keys=[f"{row % 12 + 1:02d}/image-{row:05d}.jpg" for row in range(n)],
        ids=random.integers(-(2**62), 2**62, n),
        href=[f"../images/{row % 12 + 1:02d}/image-{row:05d}.jpg" for row in range(n)],
        sizes=np.full((n, 2), (640, 480), np.int32),
        flags=np.zeros(n, np.uint8),
        clusters=clusters,
        fine=fine,
        runner_up=np.roll(fine, n // 7),
        margin=random.random(n).astype(np.float32) / 4,
        typicality=typicality,
        outlier=random.permutation(n).astype(np.float32) / n,
        place=place,
        neighbours=((np.arange(n)[:, None] + np.arange(1, 9)) % n).astype(np.int32),
        similarity=np.sort(random.random((n, 8)).astype(np.float32))[:, ::-1],
        components=components,
        labels=["" if row % 3 else "beach" for row in range(n)],
        inbox=[
            Group("exact copies", [0, 5, 9], "the same pixels"),
            Group("near copies", [2, 3], "mirrored"),
            Group("near copies", [3, 4], "cropped"),
            Group("outliers", [7], "cosine 0.31 to its nearest neighbours"),
            Group("blurred", [8], "hardly any edge"),
        ],
        unreadable=[("broken.jpg", "the file ends in the middle")],
        events=[],
        thumbnails=patterns(side),
        side=side,
    )
    return replace(content, **changes)
