"""`tessella explore`: a folder of images -> an atlas, in stages.

    look -> (network) -> features -> neighbours -> copies -> clusters -> map -> table
     |                      |                                   |        |
     +------ the page is written again after each of them ------+--------+

Each stage has a key, the hash of all that its result depends on. A stage whose key is in atlas.json is not done again;
a stage that was killed goes on with the shards that are missing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tessella import dist, files
from tessella.atlas import clusters, copies, look, map, names
from tessella.atlas.build import write_atlas_page
from tessella.atlas.clusters import Tree
from tessella.atlas.copies import find_copies
from tessella.atlas.folder import Atlas, key_of
from tessella.atlas.look import LOOK, thumbnail_side
from tessella.atlas.neighbours import neighbours
from tessella.atlas.network import Network, find_network
from tessella.atlas.shards import Shards, Vectors, read_array, write_array
from tessella.atlas.table import write_table
from tessella.console import Display, note
from tessella.data.sources import ImageSet
from tessella.engine.launch import cores_at_hand, pick_device
from tessella.errors import UserError
from tessella.evaluation.evaluate import assign
from tessella.protocols.features import extract
from tessella.run.backbone_file import write_backbone
from tessella.run.config import Device
from tessella.run.lock import only_writer
from tessella.weights.resolve import Loaded, resolve_backbone, weights_sha256

NEIGHBOURS = 16
_NEEDS = {  # stage -> those that it is made from
    "features": ("look",),
    "neighbours": ("features",),
    "copies": ("features",),
    "clusters": ("features",),
    "map": ("features",),
    "table": ("clusters", "copies"),
}
_PAGE_SECONDS = 25.0  # between pages that are written within a stage
_FORWARD = 64  # images per forward pass


def explore(
    images: ImageSet,
    out: Path,
    *,
    backbone: str | None = None,
    minutes: float = 5.0,
    clusters: int | None = None,
    device: Device = "auto",
    workers: int | None = None,
    seed: int = 0,
) -> Path:
    """Make an atlas, or go on with it.

    Args:
        images: what to explore.
        out: folder of the atlas: missing, empty, or an atlas.
        backbone: as in `resolve_backbone`; None: see `network.find_network`.
        minutes: for training a network, where one has to be trained.
        clusters: middle clusters; default: as many as are stable.
        device: where the network runs.
        workers: decoding threads; default: the cores at hand.
        seed: of all random choices.

    Returns:
        The page's path.

    Raises:
        UserError: the input cannot be used, or the folder is in use or holds something else.
    """
    if dist.world_size() > 1:
        raise UserError("explore runs as one process: start it without torchrun or srun")
    named = None if backbone is None else resolve_backbone(backbone)  # before anything is written
    atlas = Atlas.create_or_open(out)
    with only_writer(out):
        files.remove_unfinished(out)
        return _Exploration(atlas, images, device, workers or cores_at_hand(), seed).run(named, minutes, clusters)


class _Exploration:
    def __init__(self, atlas: Atlas, images: ImageSet, device: Device, workers: int, seed: int) -> None:
        self.atlas, self.images, self.device, self.workers, self.seed = atlas, images, device, workers, seed
        self.stages = atlas.state["stages"]
        self._written = time.monotonic()

    def run(self, named: Loaded | None, minutes: float, number: int | None) -> Path:
        atlas, images = self.atlas, self.images
        atlas.state |= {"data": images.name, "fingerprint": images.fingerprint, "images": len(images)}
        look_key = key_of(look.VERSION, images.fingerprint, thumbnail_side(len(images)))
        shards = atlas.shards("look", len(images))
        with self._stage("look", look_key, "look") as needed:
            if needed:
                look.look(images, shards, self.workers, self._page_now_and_then)
        readable = np.flatnonzero(shards.column("readable", LOOK))
        atlas.state["readable"] = len(readable)
        if not len(readable):
            raise UserError(f"none of the {len(images)} images of {images.name} can be decoded")
        self._page()
        network = self._network(named, minutes)
        weights = weights_sha256(network.loaded.backbone)
        features_key = key_of(1, look_key, weights, network.loaded.transform)
        with self._stage("features", features_key, "features") as needed:
            if needed:
                self._write_backbone(network)
                self._features(network.loaded, readable)
        vectors = atlas.vectors()
        with self._stage("neighbours", key_of(1, features_key, NEIGHBOURS), "neighbours.npy") as needed:
            if needed:
                self._neighbours(vectors)
        nearest = self._nearest()
        with self._stage("copies", key_of(copies.VERSION, features_key), "copies.npy") as needed:
            if needed:
                self._copies(shards, readable, vectors, nearest)
        clusters_key = key_of(clusters.VERSION, features_key, self.seed, number)
        with self._stage("clusters", clusters_key, "clusters.json") as needed:
            if needed:
                self._clusters(network.loaded, vectors, number, clusters_key, readable)
        with self._stage("map", key_of(map.VERSION, features_key, self.seed), "places.npy") as needed:
            if needed:
                self._map(vectors, nearest)
        with self._stage("table", key_of(1, clusters_key, self.stages["copies"]["key"]), "images.parquet") as needed:
            del needed  # names may have changed since: it is written each time
            write_table(atlas, images, readable, vectors, nearest)
        atlas.save()
        path = self._page()
        return path

    @contextlib.contextmanager
    def _stage(self, name: str, key: str, result: str) -> Iterator[bool]:
        """Whether a stage has to be done; afterwards it is, and the page shows it.

        Args:
            name: of the stage.
            key: of what its result depends on.
            result: the file or folder that holds it, which is removed if it is of another key.
        """
        known = self.stages.get(name, {})
        done = known.get("key") == key and "seconds" in known and (self.atlas.path / result).exists()
        if not done and known.get("key") != key:
            files.remove(self.atlas.path / result)
            self.stages[name] = {"key": key}
            self._forget_what_follows(name)
            self.atlas.save()
        started = time.monotonic()
        yield not done
        if not done:
            self.stages[name] |= {"seconds": round(time.monotonic() - started, 1)}
            self.atlas.save()
            if name in ("copies", "clusters"):
                self._page()

    def _forget_what_follows(self, name: str) -> None:
        """Stages that were made from another result of `name` are not shown any more; their keys say they are old."""
        for later, needs in _NEEDS.items():
            if name in needs and "seconds" in self.stages.get(later, {}):
                del self.stages[later]["seconds"]
                self._forget_what_follows(later)

    def _page(self) -> Path:
        self._written = time.monotonic()
        return write_atlas_page(self.atlas, self.images)

    def _page_now_and_then(self, rows: int) -> None:
        del rows
        if time.monotonic() - self._written > _PAGE_SECONDS:
            self._page()

    def _network(self, named: Loaded | None, minutes: float) -> Network:
        state = self.atlas.state
        asked = state.get("network", {}) if state.get("network", {}).get("data") == self.images.fingerprint else {}
        training = self.atlas.path / "training"
        if named is None and not asked and training.exists():  # of other images
            files.remove(training)
        network = find_network(
            named,
            self.images,
            training,
            minutes=minutes,
            before=float(asked.get("minutes", 0.0)),
            device=self.device,
            workers=self.workers,
            seed=self.seed,
        )
        state["network"] = {
            "name": network.loaded.name,
            "banner": network.banner,
            "minutes": network.minutes,
            "data": self.images.fingerprint,
        }
        self.atlas.save()
        return network

    def _write_backbone(self, network: Network) -> None:
        loaded = network.loaded
        write_backbone(
            self.atlas.path / "backbone.safetensors",
            loaded.backbone.state_dict(),
            loaded.config,
            loaded.transform,
            {"name": loaded.name},
        )

    def _features(self, loaded: Loaded, readable: NDArray[np.int64]) -> None:
        # Convolutions of CPUs are up to twice as fast in this layout; the features differ in the sixth digit.
        loaded.backbone.to(memory_format=torch.channels_last)
        shards = self.atlas.shards("features", len(readable))
        missing = shards.missing()
        done = len(readable) - sum(len(shards.span(number)) for number in missing)
        with Display("features", len(readable), done=done) as display:
            for number in missing:
                span = shards.span(number)
                table = np.zeros((len(span), loaded.backbone.feature_dim), np.float32)
                for start in range(span.start, span.stop, _FORWARD * 4):
                    rows = readable[start : min(start + _FORWARD * 4, span.stop)]
                    found = extract(
                        loaded.backbone,
                        self.images,
                        loaded.transform,
                        rows=rows,
                        batch_size=_FORWARD,
                        device=pick_device(self.device),
                        workers=self.workers,
                        title="",
                    )
                    # An image that could be decoded before and now cannot keeps zeros: no neighbours, no cluster of it.
                    table[start - span.start + np.searchsorted(rows, found.rows)] = found.x.numpy()
                    display.advance(len(rows))
                shards.write(number, table)

    def _neighbours(self, vectors: Vectors) -> None:
        with Display("neighbours", len(vectors)) as display:
            (rows, cosines), recall = neighbours(vectors, NEIGHBOURS, self.seed, display.advance)
        write_array(self.atlas.path / "cosines.npy", cosines, self.atlas.path)
        write_array(self.atlas.path / "neighbours.npy", rows, self.atlas.path)
        self.atlas.state["neighbour_recall"] = round(recall, 4)

    def _nearest(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        path = self.atlas.path
        rows = read_array(path / "neighbours.npy", self.atlas.count, np.int32)
        return rows, read_array(path / "cosines.npy", self.atlas.count, np.float32)

    def _copies(
        self,
        shards: Shards,
        readable: NDArray[np.int64],
        vectors: Vectors,
        nearest: tuple[NDArray[np.int32], NDArray[np.float32]],
    ) -> None:
        with Display("copies", 3 * len(readable)) as display:
            found = find_copies(
                shards.column("sha256", LOOK)[readable],
                shards.column("signature", LOOK)[readable],
                vectors,
                nearest,
                seed=self.seed,
                done=display.advance,
            )
        groups = np.stack([found.group, found.exact], axis=1)
        write_array(self.atlas.path / "copy-groups.npy", groups, self.atlas.path)
        write_array(self.atlas.path / "copies.npy", found.pairs, self.atlas.path)

    def _clusters(
        self, loaded: Loaded, vectors: Vectors, number: int | None, revision: str, readable: NDArray[np.int64]
    ) -> None:
        note("clusters: looking for a number of clusters that is stable")
        start = None
        if loaded.method is not None and loaded.method.clusters:
            shards = self.atlas.shards("features", len(vectors))
            device = pick_device(self.device)
            parts = [torch.from_numpy(np.array(shards.read(i, np.float32))) for i in range(len(shards))]
            start = torch.cat([assign(loaded.method, part, device) for part in parts]).numpy()
        ids = np.asarray(self.images.ids)[readable]
        before = self._labels_before()
        tree = clusters.cluster(vectors, seed=self.seed, number=number, start=start)
        path = self.atlas.path
        write_array(path / "centres.npy", tree.centres, path)
        write_array(path / "fine.npy", tree.fine, path)
        if before is not None:
            self._carry(*before, tree, ids, revision)
        facts = {"suggested": tree.suggested, "reason": tree.reason, "agreement": round(tree.agreement, 3)}
        files.write_json(path / "clusters.json", {"revision": revision, "fine": tree.paths} | facts, inside=path)

    def _labels_before(self) -> tuple[list[names.Event], dict[int, str]] | None:
        """Events of an earlier clustering, and the labels that images had from its clusters."""
        revision, events = self.atlas.events()
        if not events or not (self.atlas.path / "images.parquet").exists():
            return None
        if revision != self.atlas.state.get("revision"):
            note("names.json belongs to another clustering than images.parquet: it stays as it is and names nothing")
            return None
        old = self.atlas.read_table("id", "cluster")
        labels = names.resolve(events, old["cluster"], old["id"])
        pairs = zip(old["id"].tolist(), labels.label, labels.source, strict=True)
        return events, {number: label for number, label, source in pairs if source.startswith("cluster")}

    def _carry(
        self, events: list[names.Event], before: dict[int, str], tree: Tree, ids: NDArray[np.int64], revision: str
    ) -> None:
        """Names for the new clustering; the old file stays beside it."""
        path = self.atlas.path
        old = self.atlas.events()[0] or "before"
        if old == revision:
            return
        carried = names.carry(events, before, [tree.paths[i] for i in tree.fine.tolist()], ids)
        document = names.names_document(self.atlas.state["id"], old, events)
        files.write_json(path / f"names-{key_of(old)}.json", document, inside=path)
        document = names.names_document(self.atlas.state["id"], revision, carried.events)
        files.write_json(path / "names.json", document, inside=path)
        self.atlas.state["unsure"] = carried.unsure
        note(
            f"names: {len(carried.events)} decisions went over to the new clusters, {len(carried.unsure)} are asked "
            "about in the inbox"
        )

    def _map(self, vectors: Vectors, nearest: tuple[NDArray[np.int32], NDArray[np.float32]]) -> None:
        note("map: placing the images")
        mean, directions = map.components(vectors, self.seed)
        projected = np.concatenate([((part - mean) @ directions.T).numpy() for _, part in vectors.blocks()])
        path = self.atlas.path
        write_array(path / "components.npy", projected.astype(np.float32), path)
        write_array(path / "places.npy", map.place(vectors, nearest, projected, self.seed), path)
