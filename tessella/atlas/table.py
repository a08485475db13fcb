"""images.parquet: what is known of every image, for other programs and for the commands that follow."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from tessella import files
from tessella.atlas import names
from tessella.atlas.clusters import Tree
from tessella.atlas.content import BLANK, BLURRED, BRIGHT, DARK, OUTLIER
from tessella.atlas.folder import Atlas
from tessella.atlas.look import LOOK, flags_of
from tessella.atlas.scores import Scores, scores
from tessella.atlas.shards import Vectors, read_array
from tessella.data.sources import ImageSet
from tessella.text import printable

_ROW_GROUP = 65_536
FLAG_NAMES = {DARK: "dark", BRIGHT: "bright", BLANK: "blank", BLURRED: "blurred", OUTLIER: "outlier"}


def write_table(
    atlas: Atlas,
    images: ImageSet,
    readable: NDArray[np.int64],
    vectors: Vectors,
    nearest: tuple[NDArray[np.int32], NDArray[np.float32]],
) -> None:
    """Write images.parquet, and what of it the page needs as flags.npy.

    Columns: key, id; cluster (path), distance (1 - cosine to its centre), runner_up (path), margin; typicality,
    outlier_score (shares in [0, 1]); copy_group, exact_copy_group (-1: none); x, y on the map; flags (words, separated
    by commas); label, label_from ("image", "cluster 2.1").

    Args:
        atlas: with all stages before.
        images: of the atlas.
        readable: (n,) rows of `images` that the table has.
        vectors: their features.
        nearest: their neighbours.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    n, path, tree = len(readable), atlas.path, atlas.tree()
    paths = tree["fine"]
    fine = read_array(path / "fine.npy", n, np.int32)
    groups = read_array(path / "copy-groups.npy", n, np.int32)
    places = read_array(path / "places.npy", n, np.float32)
    found = scores(
        vectors, Tree(np.asarray(fine), atlas.centres(), paths, 0, "", 0.0), nearest, np.asarray(groups[:, 0])
    )
    flags = _flags(atlas, images, readable, found)
    ids = np.asarray(images.ids)[readable]
    revision, events = atlas.events()
    named = names.resolve(events if revision == tree["revision"] else [], [paths[i] for i in fine.tolist()], ids)
    words = {value: ",".join(name for bit, name in FLAG_NAMES.items() if value & bit) for value in range(256)}
    columns = {
        "key": lambda rows: [printable(images.key(int(row))) for row in readable[rows]],
        "id": lambda rows: ids[rows],
        "cluster": lambda rows: [paths[i] for i in fine[rows].tolist()],
        "distance": lambda rows: found.distance[rows],
        "runner_up": lambda rows: [paths[i] if i >= 0 else None for i in found.runner_up[rows].tolist()],
        "margin": lambda rows: found.margin[rows],
        "typicality": lambda rows: found.typicality[rows],
        "outlier_score": lambda rows: found.outlier[rows],
        "copy_group": lambda rows: np.asarray(groups[rows, 0]),
        "exact_copy_group": lambda rows: np.asarray(groups[rows, 1]),
        "x": lambda rows: np.asarray(places[rows, 0]),
        "y": lambda rows: np.asarray(places[rows, 1]),
        "flags": lambda rows: [words[value] for value in flags[rows].tolist()],
        "label": lambda rows: [label or None for label in named.label[rows]],
        "label_from": lambda rows: [source or None for source in named.source[rows]],
        "dropped": lambda rows: named.dropped[rows],
    }
    facts = {"data": images.name, "fingerprint": images.fingerprint, "revision": tree["revision"]}
    texts = ("key", "cluster", "runner_up", "flags", "label", "label_from")
    kinds = dict.fromkeys(texts, pa.string()) | {"id": pa.int64(), "dropped": pa.bool_()}
    kinds |= dict.fromkeys(("copy_group", "exact_copy_group"), pa.int32())
    schema = pa.schema([(name, kinds.get(name, pa.float32())) for name in columns])
    schema = schema.with_metadata({"tessella": json.dumps(facts)})
    with files.writing(path / "images.parquet", inside=path) as file, pq.ParquetWriter(file, schema) as writer:
        for start in range(0, n, _ROW_GROUP):
            rows = slice(start, start + _ROW_GROUP)
            writer.write_table(pa.table({name: make(rows) for name, make in columns.items()}, schema=schema))
    atlas.state["revision"] = tree["revision"]


def _flags(atlas: Atlas, images: ImageSet, readable: NDArray[np.int64], found: Scores) -> NDArray[np.uint8]:
    shards = atlas.shards("look", len(images))
    table = {
        name: shards.column(name, LOOK)[readable] for name in ("brightness", "contrast", "bright_end", "sharpness")
    }
    return flags_of(table) | np.where(found.is_outlier, OUTLIER, 0).astype(np.uint8)
