"""New images: which cluster, which class, how sure, how odd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessella import files
from tessella.atlas.classifier import Classifier, Reference, is_classifier, read_classifier
from tessella.atlas.folder import Atlas
from tessella.atlas.label import labels_of
from tessella.console import Display
from tessella.data.sources import ImageSet
from tessella.engine.launch import cores_at_hand, pick_device
from tessella.errors import UserError
from tessella.evaluation.evaluate import assign as clusters_of_method
from tessella.protocols.features import extract
from tessella.run.config import Device
from tessella.text import printable
from tessella.weights.resolve import Loaded, resolve_backbone, weights_sha256

_TOGETHER = 2048  # images whose features are held
_FORWARD = 64

Columns = dict[str, Any]


class Assigned(NamedTuple):
    """What `assign` has written."""

    out: Path
    images: int
    skipped: dict[str, str]  # key -> why it could not be read
    answered: int | None  # images that got a class; None where there are no classes

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"assigned   {self.images:,} images"]
        if self.answered is not None:
            lines.append(f"with class {self.answered:,}; of the others the classifier is not sure enough")
        return lines + [f"unreadable {printable(key)}: {printable(reason)}" for key, reason in self.skipped.items()]


class Described(NamedTuple):
    """A backbone, and what its features say of an image."""

    loaded: Loaded
    columns: list[tuple[str, str]]  # name, type of Arrow
    describe: Callable[[Tensor], Columns]  # features as the backbone gives them -> columns


def assign(
    model: Path, images: ImageSet, out: Path, *, device: Device = "auto", workers: int | None = None
) -> Assigned:
    """Write one row per readable image.

    Args:
        model: a classifier, an atlas or a run.
        images: what to look at.
        out: NAME.parquet; it must not exist.
        device: where the network runs.
        workers: decoding threads.

    Raises:
        UserError: the model is none of these, the images cannot be used, or the file is in the way.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.suffix != ".parquet":
        raise UserError(f"{out} does not end in .parquet")
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out or remove it")
    chosen = described(model, pick_device(device))
    kinds = {"text": pa.string(), "number": pa.float32(), "integer": pa.int64()}
    fields = [("key", pa.string()), ("id", pa.int64()), *((name, kinds[kind]) for name, kind in chosen.columns)]
    facts = {
        "model": str(model),
        "weights": weights_sha256(chosen.loaded.backbone),
        "data": images.name,
        "fingerprint": images.fingerprint,
    }
    schema = pa.schema(fields).with_metadata({"tessella": json.dumps(facts)})
    skipped: dict[str, str] = {}
    count, answered = 0, 0
    files.make_folder(out.parent.resolve())
    with (
        files.writing(out) as file,
        pq.ParquetWriter(file, schema) as writer,
        Display("images", len(images)) as display,
    ):
        for start in range(0, len(images), _TOGETHER):
            rows = np.arange(start, min(start + _TOGETHER, len(images)))
            found = extract(
                chosen.loaded.backbone,
                images,
                chosen.loaded.transform,
                rows=rows,
                batch_size=_FORWARD,
                device=pick_device(device),
                workers=workers or cores_at_hand(),
                title="",
            )
            skipped |= found.skipped
            columns = chosen.describe(found.x)
            columns["key"] = [printable(images.key(int(row))) for row in found.rows]
            columns["id"] = np.asarray(images.ids)[found.rows]
            writer.write_table(pa.table(columns, schema=schema))
            count += len(found.rows)
            answered += sum(name is not None for name in columns.get("class", []))
            display.advance(len(rows))
    has_classes = any(name == "class" for name, _ in chosen.columns)
    return Assigned(out, count, skipped, answered if has_classes else None)


def described(model: Path, device: torch.device) -> Described:
    """The columns that a classifier, an atlas or a run adds to the features of its backbone.

    Raises:
        UserError: it is none of these.
    """
    if is_classifier(model):
        return _classifier(read_classifier(model))
    if (model / "atlas.json").is_file():
        return _atlas(Atlas.open(model))
    if not (model / "config.yaml").is_file():
        raise UserError(f"{model} is no classifier, atlas or run: give the --out of classify, explore or pretrain")
    loaded = resolve_backbone(str(model))
    method = loaded.method
    if method is None or not method.clusters:
        raise UserError(f"the method of {model} has no clusters: explore the images with --backbone {model} instead")
    return Described(
        loaded, [("cluster", "integer")], lambda x: {"cluster": clusters_of_method(method, x, device).numpy()}
    )


_CLUSTER_COLUMNS = [
    ("cluster", "text"),
    ("runner_up", "text"),
    ("distance", "number"),
    ("margin", "number"),
    ("outlier_score", "number"),
]


def _places(reference: Reference, unit: Tensor) -> Columns:
    found: Columns = dict(reference.place(unit))
    for name in ("cluster", "runner_up"):
        found[name] = [reference.paths[i] if i >= 0 else None for i in found[name].tolist()]
    return found


def _atlas(atlas: Atlas) -> Described:
    """Clusters, and the names that they were given."""
    reference = Reference.of_atlas(atlas)
    table, found = labels_of(atlas)
    names = {
        path: label
        for path, label, source in zip(table["cluster"], found.label, found.source, strict=True)
        if source.startswith("cluster")
    }

    def describe(x: Tensor) -> Columns:
        columns = _places(reference, F.normalize(x, dim=1))
        return columns | {"class": [names.get(path) for path in columns["cluster"]]}

    return Described(atlas.backbone(), [*_CLUSTER_COLUMNS, ("class", "text")], describe)


def _classifier(classifier: Classifier) -> Described:
    """Clusters as well, the most probable class with its probability, and an answer where that is sure enough."""

    def describe(x: Tensor) -> Columns:
        unit = F.normalize(x, dim=1)
        probability = classifier.probabilities(unit)
        order = np.argsort(-probability, axis=1, kind="stable")
        rows = np.arange(len(probability))
        sure = probability[rows, order[:, 0]]
        best = [classifier.classes[i] for i in order[:, 0].tolist()]
        return _places(classifier.reference, unit) | {
            "class": [name if value >= classifier.confidence else None for name, value in zip(best, sure, strict=True)],
            "most_probable": best,
            "confidence": sure.astype(np.float32),
            "second": [classifier.classes[i] for i in order[:, 1].tolist()],
            "class_margin": (sure - probability[rows, order[:, 1]]).astype(np.float32),
        }

    more = [("class", "text"), ("most_probable", "text"), ("confidence", "number"), ("second", "text")]
    return Described(classifier.loaded, [*_CLUSTER_COLUMNS, *more, ("class_margin", "number")], describe)
