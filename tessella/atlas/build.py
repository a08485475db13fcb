"""From the files of an atlas to its page, whatever stages there are so far."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from tessella.atlas.clusters import Tree
from tessella.atlas.content import BLANK, BLURRED, BRIGHT, COPY, DARK, OUTLIER, Cluster, Content, Group
from tessella.atlas.copies import Copies
from tessella.atlas.folder import Atlas
from tessella.atlas.look import LOOK, Thumbnails, flags_of, thumbnail_side
from tessella.atlas.page import write_page
from tessella.atlas.scores import Scores, scores
from tessella.atlas.shards import read_array
from tessella.data.sources import ImageSet
from tessella.report.page import short

MOST = 200_000  # images of a page; of more it shows a sample
_NEIGHBOURS = 8  # per image
_LISTED = 300  # outliers, blurred ones ... of each kind
_STAGES = ("look", "features", "neighbours", "copies", "clusters", "map", "table")
_TITLES = ("look at every image", "features", "neighbours", "copies", "clusters", "map", "table")
_FLAGS = {DARK: "dark", BRIGHT: "bright", BLANK: "blank", BLURRED: "blurred"}


def write_atlas_page(atlas: Atlas, images: ImageSet) -> Path:
    """Write atlas.html with all that there is.

    Args:
        atlas: with at least one shard of the first stage.
        images: of the atlas.
    """
    return write_page(_Builder(atlas, images).content(), atlas.path)


class _Builder:
    def __init__(self, atlas: Atlas, images: ImageSet) -> None:
        self.atlas, self.images, self.path = atlas, images, atlas.path
        self.stages: dict[str, Any] = atlas.state["stages"]
        shards = atlas.shards("look", len(images))
        numbers = [number for number in range(len(shards)) if shards.path(number).is_file()]
        tables = [shards.read(number, LOOK) for number in numbers]

        def column(name: str) -> NDArray[Any]:
            """One field alone: whole rows, with their signatures, are half a kilobyte each."""
            return np.concatenate([table[name] for table in tables]) if tables else np.zeros(0, LOOK[name])

        every = np.concatenate([np.array(shards.span(number)) for number in numbers] or [np.zeros(0, np.int64)])
        readable = column("readable")
        self.rows = every[readable]  # of the image set
        names = ("brightness", "contrast", "bright_end", "sharpness")
        self.look = {name: column(name)[readable] for name in names}
        reasons = column("reason")[~readable]
        broken = [
            (int(row), reason.decode("utf-8", "replace")) for row, reason in zip(every[~readable], reasons, strict=True)
        ]
        self.unreadable = [*images.unreadable, *((images.key(row), reason) for row, reason in broken)]
        self.thumbnails = Thumbnails(shards, thumbnail_side(len(images)))

    def content(self) -> Content:
        n = len(self.rows)
        tree = self._tree() if self._done("clusters") else None
        nearest = self._nearest() if self._done("neighbours") else None
        copied = self._copies() if self._done("copies") else None
        places = read_array(self.path / "places.npy", n, np.float32) if self._done("map") else None
        projected = read_array(self.path / "components.npy", n, np.float32) if self._done("map") else None
        found = None
        if tree is not None and nearest is not None and copied is not None:
            found = scores(self.atlas.vectors(), tree, nearest, copied.group)
        flags = flags_of(self.look)
        if copied is not None:
            flags |= np.where(copied.group >= 0, COPY, 0).astype(np.uint8)
        if found is not None:
            flags |= np.where(found.is_outlier, OUTLIER, 0).astype(np.uint8)
        order = self._order(tree, found, flags)
        page_row = np.full(n, -1, np.int32)
        page_row[order] = np.arange(len(order))
        clusters, leaf = _clusters(tree, found, order) if tree is not None and found is not None else ([], None)
        shown = self.rows[order]
        none = np.full(len(order), -1, np.int32)
        revision, events = self.atlas.events()
        current = str(self.atlas.tree()["revision"]) if tree is not None else ""
        return Content(
            title=short(self.images.name),
            atlas=str(self.atlas.state["id"]),
            revision=current,
            banner=self._banner(tree, n, len(order)),
            stages=[(title, self._state(name)) for name, title in zip(_STAGES, _TITLES, strict=True)],
            facts=self._facts(tree),
            total=n,
            keys=[self.images.key(int(row)) for row in shown],
            ids=np.asarray(self.images.ids)[shown],
            href=self._addresses(shown),
            sizes=np.asarray(self.images.sizes)[shown].astype(np.int32),
            flags=flags[order],
            clusters=clusters,
            fine=none if leaf is None or tree is None else leaf[tree.fine[order]],
            runner_up=none if leaf is None or found is None else _leaf_of(leaf, found.runner_up[order]),
            margin=_column(found, "margin", order),
            typicality=_column(found, "typicality", order),
            outlier=_column(found, "outlier", order),
            place=None if places is None else np.asarray(places[order]),
            neighbours=_on_page(nearest[0], order, page_row) if nearest else np.zeros((len(order), 0), np.int32),
            similarity=np.asarray(nearest[1][order, :_NEIGHBOURS])
            if nearest
            else np.zeros((len(order), 0), np.float32),
            components=_bytes(projected, order),
            labels=[""] * len(order),
            inbox=self._inbox(flags, copied, found, page_row, tree),
            unreadable=self.unreadable,
            events=events if revision == current else [],
            thumbnails=lambda start, stop: self.thumbnails(shown[start:stop]),
            side=thumbnail_side(len(self.images)),
        )

    def _done(self, stage: str) -> bool:
        """Whether a stage's result is there and belongs to the images that were looked at."""
        return "seconds" in self.stages.get(stage, {}) and self.atlas.state.get("readable") == len(self.rows)

    def _state(self, stage: str) -> str:
        seconds = self.stages.get(stage, {}).get("seconds")
        return f"done in {seconds:g} s" if seconds is not None else "to do"

    def _tree(self) -> Tree:
        facts = self.atlas.tree()
        fine = np.asarray(read_array(self.path / "fine.npy", len(self.rows), np.int32))
        return Tree(fine, self.atlas.centres(), facts["fine"], facts["suggested"], facts["reason"], facts["agreement"])

    def _nearest(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        n = len(self.rows)
        return (
            read_array(self.path / "neighbours.npy", n, np.int32),
            read_array(self.path / "cosines.npy", n, np.float32),
        )

    def _copies(self) -> Copies:
        groups = np.asarray(read_array(self.path / "copy-groups.npy", len(self.rows), np.int32))
        return Copies(np.asarray(read_array(self.path / "copies.npy")), groups[:, 0], groups[:, 1])

    def _order(self, tree: Tree | None, found: Scores | None, flags: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Rows in page order; of a very large set a sample with all that the inbox shows."""
        n = len(self.rows)
        chosen = np.arange(n)
        if n > MOST:
            random = np.random.default_rng(0).permutation(n)
            special = np.flatnonzero(flags)[: MOST // 2]
            chosen = np.unique(np.concatenate([special, random[: MOST - len(special)]]))
        if tree is None or found is None:
            return chosen
        return chosen[np.lexsort((-found.typicality[chosen], tree.fine[chosen]))]

    def _banner(self, tree: Tree | None, n: int, shown: int) -> list[str]:
        lines = list(self.atlas.state.get("network", {}).get("banner", []))
        if tree is not None:
            lines.append(
                f"{tree.suggested} clusters, {len(tree.paths)} fine ones in them. How far to trust them: "
                f"{_trust(tree.agreement)} ({tree.reason})."
            )
        if shown < n:
            lines.append(f"The page shows {shown:,} of {n:,} images; images.parquet has all of them.")
        recall = float(self.atlas.state.get("neighbour_recall", 1.0))
        if recall < 1:
            lines.append(f"Neighbours come from nearby clusters, which hold {100 * recall:.0f} % of the true ones.")
        return lines

    def _facts(self, tree: Tree | None) -> dict[str, str]:
        from importlib.metadata import version

        state = self.atlas.state
        facts = {"images": state["data"], "fingerprint": state["fingerprint"][:16]}
        if "network" in state:
            facts["network"] = state["network"]["name"]
        if tree is not None:
            facts["clustering"] = str(self.atlas.tree()["revision"])
        return facts | {"tessella": version("tessella")}

    def _addresses(self, rows: NDArray[np.int64]) -> list[str] | None:
        """Relative addresses of the originals, where the images are files below a folder."""
        folder = Path(self.images.name)
        if not folder.is_dir() or not len(rows) or not (folder / self.images.key(int(rows[0]))).is_file():
            return None
        prefix = os.path.relpath(folder.resolve(), self.path.resolve())
        return [quote(os.fsencode(f"{prefix}/{self.images.key(int(row))}")) for row in rows]

    def _inbox(
        self,
        flags: NDArray[np.uint8],
        copied: Copies | None,
        found: Scores | None,
        page_row: NDArray[np.int32],
        tree: Tree | None,
    ) -> list[Group]:
        groups: list[Group] = []
        if copied is not None:
            groups += self._copy_groups(copied, page_row)
        if found is not None:
            rows = np.flatnonzero(found.is_outlier)
            rows = rows[np.argsort(-found.isolation[rows], kind="stable")][:_LISTED]
            groups += [
                Group("outliers", [int(page_row[row])], f"cosine {1 - found.isolation[row]:.2f} to its nearest images")
                for row in rows
                if page_row[row] >= 0
            ]
        for bit, kind in _FLAGS.items():
            rows = np.flatnonzero(flags & bit)
            if bit == BLURRED:
                rows = rows[np.argsort(self.look["sharpness"][rows], kind="stable")]
            groups += [
                Group(kind, [int(page_row[row])], self._why(bit, int(row)))
                for row in rows[:_LISTED]
                if page_row[row] >= 0
            ]
        if tree is not None:
            fine = {path: i for i, path in enumerate(tree.paths)}
            for path, name, share in self.atlas.state.get("unsure", []):
                shown = sorted(int(row) for row in page_row[tree.fine == fine.get(path, -1)] if row >= 0)
                if shown:
                    groups.append(Group("unsure names", shown, f"{100 * share:.0f} % of cluster {path} were {name}"))
        return groups

    def _copy_groups(self, copied: Copies, page_row: NDArray[np.int32]) -> list[Group]:
        groups = []
        for rows in copied.groups(np.asarray(self.images.sizes)[self.rows], self.look["sharpness"]):
            shown = [int(page_row[row]) for row in rows if page_row[row] >= 0]
            if len(shown) < 2:
                continue
            exact = copied.exact[rows[0]] >= 0 and len(set(copied.exact[rows].tolist())) == 1
            why = "the same file" if exact else copied.why(int(rows[0]), int(rows[1]))
            groups.append(Group("exact copies" if exact else "near copies", shown, why))
        return groups

    def _why(self, bit: int, row: int) -> str:
        if bit == BLURRED:
            usual = float(np.nanmedian(self.look["sharpness"]))
            return f"{usual / max(float(self.look['sharpness'][row]), 1e-9):.0f} times less sharp than usual here"
        if bit == BLANK:
            return "nothing but one colour"
        return f"mean brightness {100 * float(self.look['brightness'][row]):.0f} %"


def _trust(agreement: float) -> str:
    return "well" if agreement >= 0.8 else "fairly" if agreement >= 0.5 else "little"


def _clusters(tree: Tree, found: Scores, order: NDArray[np.int64]) -> tuple[list[Cluster], NDArray[np.int32]]:
    """The nodes of the tree in order, and the node of each fine cluster."""
    sizes = np.bincount(tree.fine[order], minlength=len(tree.paths))
    begins = np.concatenate([[0], np.cumsum(sizes)])
    closeness = np.bincount(tree.fine[order], 1 - found.distance[order], minlength=len(tree.paths))
    nodes: list[Cluster] = []
    leaf = np.empty(len(tree.paths), np.int32)
    above: tuple[str, ...] = ()
    parts = [path.split(".") for path in tree.paths]
    for i, path in enumerate(tree.paths):
        for level in (1, 2, 3):
            prefix = ".".join(parts[i][:level])
            if level < 3 and prefix in above:
                continue
            last = i + 1
            while last < len(parts) and parts[last][:level] == parts[i][:level]:
                last += 1
            size = int(begins[last] - begins[i])
            nodes.append(Cluster(prefix, size, int(begins[i]), float(closeness[i:last].sum() / max(size, 1))))
            if level == 3:
                leaf[i] = len(nodes) - 1
        above = (".".join(parts[i][:1]), ".".join(parts[i][:2]))
        del path
    return nodes, leaf


def _leaf_of(leaf: NDArray[np.int32], fine: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.where(fine >= 0, leaf[fine], -1).astype(np.int32)


def _column(found: Scores | None, name: str, order: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.zeros(len(order), np.float32) if found is None else getattr(found, name)[order]


def _on_page(rows: NDArray[np.int32], order: NDArray[np.int64], page_row: NDArray[np.int32]) -> NDArray[np.int32]:
    chosen = np.asarray(rows[order, :_NEIGHBOURS])
    return np.where(chosen >= 0, page_row[chosen], -1).astype(np.int32)


def _bytes(projected: NDArray[np.float32] | None, order: NDArray[np.int64]) -> NDArray[np.int8]:
    if projected is None:
        return np.zeros((len(order), 0), np.int8)
    largest = max(float(np.abs(projected).max()), 1e-9)
    return np.rint(projected[order] / largest * 127).astype(np.int8)
