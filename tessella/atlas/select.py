"""Which images are worth a look next: typical ones first, then borderline ones, then what nothing chosen is like.

With few labels typical images teach most, with many uncertain ones do (Hacohen, Dekel and Weinshall, "Active learning
on a budget: opposite strategies suit high and low budgets", ICML 2022). Half of the budget goes to the most typical
image of each cluster, clusters without a label and large ones first; a quarter to images between two clusters; the rest
to images that are farthest from all that is chosen or labelled.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tessella import files
from tessella.atlas.folder import Atlas
from tessella.atlas.label import labels_of
from tessella.atlas.shards import Vectors
from tessella.errors import UserError
from tessella.text import cell

_TYPICAL, _BORDERLINE = 0.5, 0.25  # shares of the budget


class Pick(NamedTuple):
    """One image worth a look."""

    row: int  # of images.parquet
    path: str
    cluster: str
    reason: str


class Selection(NamedTuple):
    """What `select` has found."""

    picks: list[Pick]

    def lines(self, most: int = 20) -> list[str]:
        """For people."""
        if not self.picks:
            return ["nothing: every image has a label, is dropped or is a copy of one that has"]
        shown = [f"{pick.path}  ({pick.reason})" for pick in self.picks[:most]]
        return [*shown, *([f"and {len(self.picks) - most} more"] if len(self.picks) > most else [])]


def select(path: Path, budget: int, out: Path | None) -> Selection:
    """Choose images.

    Args:
        path: of the atlas.
        budget: number of images.
        out: a .csv that is written: path, cluster, reason.

    Raises:
        UserError: the atlas is not complete, or a file is in the way.
    """
    if out is not None and out.exists():
        raise UserError(f"{out} exists already: choose another name or remove it")
    atlas = Atlas.open(path)
    table = atlas.table("key", "cluster", "typicality", "margin", "copy_group", "outlier_score", "flags")
    _, found = labels_of(atlas)
    labelled = np.array([bool(name) for name in found.label], bool)
    picks = choose(table, labelled, found.dropped, atlas.vectors(), budget)
    chosen = [Pick(row, table["key"][row], table["cluster"][row], reason) for row, reason in picks]
    if out is not None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "cluster", "reason"])
        writer.writerows([cell(pick.path), pick.cluster, pick.reason] for pick in chosen)
        files.make_folder(out.parent.resolve())
        files.write_text(out, text.getvalue())
    return Selection(chosen)


def choose(
    table: dict[str, Any], labelled: NDArray[np.bool_], dropped: NDArray[np.bool_], vectors: Vectors, budget: int
) -> list[tuple[int, str]]:
    """Rows and reasons, at most `budget`.

    Args:
        table: columns cluster, typicality, margin, copy_group, flags of images.parquet.
        labelled: (n,) whether an image has a label.
        dropped: (n,) images that are left out.
        vectors: unit features.
        budget: number of images.
    """
    free = ~labelled & ~dropped & ~_later_copies(table["copy_group"], labelled)
    free &= np.array([not {"dark", "bright", "blank"} & set(words.split(",")) for words in table["flags"]], bool)
    clusters = np.asarray(table["cluster"], dtype=object)
    picks: list[tuple[int, str]] = []
    for row, reason in _typical(clusters, table["typicality"], labelled, free, round(budget * _TYPICAL)):
        free[row] = False
        picks.append((row, reason))
    borderline = np.flatnonzero(free)
    borderline = borderline[np.argsort(np.asarray(table["margin"])[borderline], kind="stable")]
    seen: set[str] = set()
    for row in borderline.tolist():  # at most one per cluster, or one busy border takes all
        if len(picks) >= round(budget * (_TYPICAL + _BORDERLINE)):
            break
        if clusters[row] not in seen:
            seen.add(clusters[row])
            free[row] = False
            picks.append((row, f"borderline: between {clusters[row]} and another cluster"))
    known = np.concatenate([np.flatnonzero(labelled), np.array([row for row, _ in picks], np.int64)])
    far = "far from every image that is labelled or chosen"
    return picks + [(row, far) for row in _farthest(vectors, known, free, budget - len(picks))]


def _typical(
    clusters: NDArray[Any],
    typicality: NDArray[np.float32],
    labelled: NDArray[np.bool_],
    free: NDArray[np.bool_],
    count: int,
) -> list[tuple[int, str]]:
    """The most typical free image of each cluster, of clusters with few labels and many images first, in turns."""
    order = np.lexsort((-np.asarray(typicality), clusters.astype(str)))
    order = order[free[order]]
    queues: dict[str, list[int]] = {}
    for row in order.tolist():
        queues.setdefault(clusters[row], []).append(row)
    known = dict(zip(*np.unique(clusters[labelled].astype(str), return_counts=True), strict=True))
    turns = sorted(queues, key=lambda name: (int(known.get(name, 0)) > 0, -len(queues[name]), name))
    found: list[tuple[int, str]] = []
    depth = 0
    while len(found) < count and any(len(queue) > depth for queue in queues.values()):
        for name in turns:
            if len(found) < count and len(queues[name]) > depth:
                # Not next to each other: the second pick of a cluster is a step down its order.
                place = 0 if depth == 0 else min(len(queues[name]) - 1, depth * max(1, len(queues[name]) // 8))
                row = queues[name][place]
                if row not in {chosen for chosen, _ in found}:
                    found.append((row, f"typical of cluster {name}"))
        depth += 1
    return found


def _later_copies(group: NDArray[np.int32], labelled: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Copies of which another one is labelled or comes first."""
    group = np.asarray(group)
    order = np.lexsort((np.arange(len(group)), ~labelled, group))
    first = np.ones(len(group), bool)
    first[order[1:]] = (group[order[1:]] != group[order[:-1]]) | (group[order[1:]] < 0)
    return ~first


def _farthest(vectors: Vectors, known: NDArray[np.int64], free: NDArray[np.bool_], count: int) -> list[int]:
    """Greedy coverage: each pick is the free row that is least like all before (Sener and Savarese, 2018)."""
    nearest = torch.full((len(vectors),), -1.0)
    for start in range(0, len(known), 1024):
        block = vectors.rows(known[start : start + 1024])
        for first, part in vectors.blocks():
            rows = slice(first, first + len(part))
            nearest[rows] = torch.maximum(nearest[rows], (part @ block.T).amax(dim=1))
    nearest[torch.from_numpy(~free)] = torch.inf
    picks: list[int] = []
    for _ in range(min(count, int(free.sum()))):
        row = int(nearest.argmin())
        picks.append(row)
        one = vectors.rows(np.array([row]))
        for first, part in vectors.blocks():
            rows = slice(first, first + len(part))
            nearest[rows] = torch.maximum(nearest[rows], (part @ one.T)[:, 0])
        nearest[row] = torch.inf
    return picks
