"""Write a backbone's features of some images to a file, for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tessella import dist, files
from tessella.data.sources import ImageSet, open_images
from tessella.engine.launch import cores_at_hand, join_ranks
from tessella.errors import UserError
from tessella.protocols.features import Features, extract
from tessella.run.config import to_dict
from tessella.text import printable
from tessella.weights.resolve import Loaded, resolve_backbone, weights_sha256

_ROW_GROUP = 16384  # rows of a parquet row group: what a reader must hold at least


def embed(
    backbone: str | Loaded,
    data: str | ImageSet,
    out: Path,
    *,
    labels: bool = False,
    device: str = "auto",
    workers: int | None = None,
    image_size: int | None = None,
    batch_size: int = 256,
) -> Features:
    """Features of every readable image, in row order, as float32; the whole result must fit into memory.

    Arguments are those of `tessella.embed`; the backbone may also be loaded, and the images open already. `NAME.npy`
    holds features (N, d), `NAME.ids.npy` beside it the images' stable ids, and `NAME.keys.txt` one key per line,
    backslashes and what is not printable escaped; `NAME.parquet` has the columns key, id, label if asked for, feature.
    Files are written whole or not at all, and never over existing ones.

    Returns:
        What was written; `skipped` names the images that could not be read.

    Raises:
        UserError: the input cannot be used, or a file is in the way.
    """
    out = out.parent.resolve() / out.name  # the folders above are the user's own, and may be links
    on = join_ranks(device)
    with dist.shared_errors():
        paths = _paths(out, labels)
        loaded = resolve_backbone(backbone, image_size=image_size) if isinstance(backbone, str) else backbone
        images = open_images(data, labels=labels) if isinstance(data, str) else data
    workers = workers or cores_at_hand()
    features = extract(loaded.backbone, images, loaded.transform, batch_size=batch_size, device=on, workers=workers)
    with dist.shared_errors():
        if dist.rank() == 0:
            files.make_folder(out.parent)
            if out.suffix == ".npy":
                _write_npy(paths, features, images)
            else:
                _write_parquet(out, features, images, labels, _origin(loaded, images))
    return features


def _paths(out: Path, labels: bool) -> list[Path]:
    """What will be written, the main file last; refuses early what cannot be written."""
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"{out} ends neither in .npy nor in .parquet: name the format by the ending")
    if out.suffix == ".npy" and labels:
        raise UserError("a .npy file has no place for labels: write .parquet instead, or leave the labels out")
    paths = [out.with_suffix(".keys.txt"), out.with_suffix(".ids.npy"), out] if out.suffix == ".npy" else [out]
    for file in paths:
        if file.exists():
            raise UserError(f"{file} exists already: choose another --out or remove it")
    return paths


def _write_npy(paths: list[Path], features: Features, images: ImageSet) -> None:
    keys, ids, out = paths
    names = [images.key(int(row)) for row in features.rows]
    escaped = (printable(name.replace("\\", "\\\\")) for name in names)
    files.write_text(keys, "".join(f"{name}\n" for name in escaped))
    for path, array in ((ids, np.asarray(images.ids)[features.rows]), (out, features.x.numpy())):
        with files.writing(path, needed=array.nbytes) as file:
            np.save(file, array, allow_pickle=False)


def _write_parquet(out: Path, features: Features, images: ImageSet, labels: bool, origin: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("key", pa.string()), ("id", pa.int64()), ("label", pa.string()), ("feature", pa.list_(pa.float32()))]
    schema = pa.schema([f for f in fields if f[0] != "label" or labels], {"tessella": json.dumps(origin)})
    dim, needed = features.x.shape[1], 4 * features.x.numel()
    with (
        files.explain_write_error(out.parent, needed),
        files.writing(out, needed=needed) as file,
        pq.ParquetWriter(file, schema) as writer,
    ):
        for start in range(0, len(features.x), _ROW_GROUP):
            rows = features.rows[start : start + _ROW_GROUP]
            x = features.x[start : start + _ROW_GROUP].numpy()
            offsets = pa.array(np.arange(0, x.size + 1, dim, dtype=np.int32))
            columns: dict[str, Any] = {
                # Names that are no UTF-8 are written with backslash escapes: Arrow strings hold nothing else.
                "key": [images.key(int(row)).encode("utf-8", "backslashreplace").decode() for row in rows],
                "id": np.asarray(images.ids)[rows],
                "feature": pa.ListArray.from_arrays(offsets, pa.array(x.reshape(-1))),
            }
            if labels:
                columns["label"] = _class_names(images, rows)
            writer.write_table(pa.table(columns, schema=schema))


def _class_names(images: ImageSet, rows: np.ndarray) -> list[str | None]:
    numbers = [-1] * len(rows) if images.labels is None else np.asarray(images.labels)[rows].tolist()
    names = images.classes
    return [None if n < 0 else str(n) if names is None else names[n] for n in numbers]


def _origin(loaded: Loaded, images: ImageSet) -> dict[str, Any]:
    """What the features depend on, for the file's metadata."""
    return {
        "backbone": loaded.name,
        "weights": weights_sha256(loaded.backbone),
        "transform": to_dict(loaded.transform),
        "data": images.name,
        "fingerprint": images.fingerprint,
    }
