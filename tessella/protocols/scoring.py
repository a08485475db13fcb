"""What a classification reports, and its predictions as a file that other programs can score."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tessella import dist, files
from tessella.data.sources import ImageSet
from tessella.ops.metrics import per_class_accuracy, topk_correct, wilson_interval
from tessella.protocols.features import EvalData
from tessella.text import cell

_TOP = 5


def classification_scores(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Figures of one classification.

    Args:
        logits: (n, C) on the CPU; a row with a NaN counts as wrong.
        labels: (n,) int64 in [0, C).
        classes: C names.

    Returns:
        `top1`, its 95 % `top1_interval`, `top5` (with more than five classes), `mean_per_class` over the classes that
        have test images, `per_class` by name; all in [0, 1].
    """
    hits = topk_correct(logits, labels, 1)
    scores = accuracy_scores(hits, labels, classes)
    if len(classes) > _TOP:
        scores["top5"] = float(topk_correct(logits, labels, _TOP).double().mean())
    return scores


def accuracy_scores(hits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """As `classification_scores`, from (n,) bool: which images were classified right."""
    top1 = float(hits.double().mean())
    per_class = per_class_accuracy(hits, labels, len(classes))
    return {
        "top1": top1,
        "top1_interval": list(wilson_interval(top1, len(labels))),
        "mean_per_class": float(per_class.nanmean()),
        "per_class": {name: x for name, x in zip(classes, per_class.tolist(), strict=True) if not np.isnan(x)},
    }


def save_classification(data: EvalData, name: str, rows: NDArray[np.int64], labels: Tensor, logits: Tensor) -> None:
    """Write NAME.csv: key, label, predicted, and the classes that come second to fifth.

    Args:
        data: says whether and where.
        name: of the protocol.
        rows: (n,) of the test images.
        labels: (n,) int64.
        logits: (n, C); where one is NaN, the columns of the prediction are empty.
    """
    if data.predictions is None:
        return
    top = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices
    top[logits.isnan().any(dim=1)] = -1
    columns: dict[str, Iterable[Any]] = {"label": _names(labels, data.classes)}
    for place in range(top.shape[1]):
        columns["predicted" if place == 0 else f"top{place + 1}"] = _names(top[:, place], data.classes)
    save_predictions(data.predictions, name, data.test, rows, columns)


def save_classes(
    data: EvalData, name: str, rows: NDArray[np.int64], labels: Tensor, predicted: Mapping[str, Tensor]
) -> None:
    """Write NAME.csv: key, label, and a column of predicted classes for each name in `predicted`, (n,) int64 each."""
    if data.predictions is not None:
        columns = {"label": labels} | dict(predicted)
        named = {title: _names(numbers, data.classes) for title, numbers in columns.items()}
        save_predictions(data.predictions, name, data.test, rows, named)


def save_predictions(
    folder: Path, name: str, images: ImageSet, rows: NDArray[np.int64], columns: Mapping[str, Iterable[Any]]
) -> None:
    """Write NAME.csv: one line per image, its key first; whole or not at all. Rank 0 writes, on all ranks together.

    Args:
        folder: made if need be.
        name: of the file, without ending.
        images: give the keys; what is not printable in them and in the names of classes becomes a backslash escape,
            and an apostrophe stands before what a spreadsheet would run.
        rows: (n,) of `images`.
        columns: title -> n values.

    Raises:
        UserError: the folder cannot be written.
    """
    with dist.shared_errors():
        if dist.rank() == 0:
            _write_predictions(folder, name, images, rows, columns)


def _write_predictions(
    folder: Path, name: str, images: ImageSet, rows: NDArray[np.int64], columns: Mapping[str, Iterable[Any]]
) -> None:
    files.make_folder(folder)
    with files.writing(folder / f"{name}.csv") as file:
        text = io.TextIOWrapper(file, newline="", encoding="utf-8", errors="backslashreplace")
        writer = csv.writer(text)
        writer.writerow(["key", *columns])
        keys = (images.key(int(row)) for row in rows)
        for line in zip(keys, *columns.values(), strict=True):
            writer.writerow([cell(value) if isinstance(value, str) else value for value in line])
        text.detach()


def _names(numbers: Tensor, classes: Sequence[str]) -> list[str]:
    return [classes[i] if i >= 0 else "" for i in numbers.tolist()]
