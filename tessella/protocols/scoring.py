"""What a classification reports, and its predictions as a file that other programs can score."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella import dist, files
from tessella.data.sources import ImageSet
from tessella.ops.metrics import per_class_accuracy, topk_correct, wilson_interval
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.features import EvalData
from tessella.text import cell

_TOP = 5
_LISTED = 20  # kinds of mistakes


def permuted(score: Callable[[NDArray[np.int64]], Mapping[str, float]], n: int, draws: int = 10) -> dict[str, float]:
    """The figures to expect when the n labels of the test images are in a random order.

    `score` gives the figures of the labels in an order of n rows; the result is their mean over some orders (`draws`),
    the same ones each time.
    """
    key = stream_key(0, "permuted")
    every = [score(permutation(key, np.arange(n), draw)) for draw in range(draws)]
    return {name: float(np.mean([scores[name] for scores in every])) for name in every[0]}


def permuted_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """The accuracy to expect when the (n,) int64 labels are in a random order, exactly.

    `predicted` is (n,) or (n, k) int64: the class, or the k classes of which one may be right; -1 is never right.
    """
    shares = torch.bincount(labels, minlength=classes).double() / max(1, len(labels))
    return float((shares[predicted.clamp(min=0)] * (predicted >= 0)).view(len(labels), -1).sum(dim=1).mean())


def classification_scores(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Figures of one classification.

    Args:
        logits: (n, C) on the CPU; a row with a NaN counts as wrong.
        labels: (n,) int64 in [0, C).
        classes: C names.

    Returns:
        `top1`, its 95 % `top1_interval`, `top5` (with more than five classes), `mean_per_class` over the classes that
        have test images, `per_class` by name; all in [0, 1]. `mistakes` are the most frequent confusions, each [class,
        taken for, number of images]. `permuted`: the same figures to expect with the labels in a random order.
    """
    top = top_classes(logits)
    scores = accuracy_scores(top[:, 0], labels, classes)
    if len(classes) > _TOP:
        scores["top5"] = float(topk_correct(logits, labels, _TOP).double().mean())
        scores["permuted"]["top5"] = permuted_accuracy(top, labels, len(classes))
    return scores


def top1_of(logits: Tensor, labels: Tensor) -> float:
    """Accuracy in [0, 1] of (n, C) logits; a row with a NaN counts as wrong."""
    return float(topk_correct(logits, labels, 1).double().mean())


def top_classes(logits: Tensor) -> Tensor:
    """The five most likely classes of each image, or as many as there are: (n, 5) int64; -1 where a value is NaN."""
    top = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices
    top[logits.isnan().any(dim=1)] = -1
    return top


def accuracy_scores(predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """As `classification_scores`, from one class per image, (n,) int64; -1 is wrong."""
    hits = predicted == labels
    top1 = float(hits.double().mean())
    present = torch.bincount(labels, minlength=len(classes)) > 0
    guessed = torch.bincount(predicted[predicted >= 0], minlength=len(classes)).double() / max(1, len(labels))
    per_class = per_class_accuracy(hits, labels, len(classes))
    return {
        "top1": top1,
        "top1_interval": list(wilson_interval(top1, len(labels))),
        "mean_per_class": float(per_class.nanmean()),
        "per_class": {name: x for name, x in zip(classes, per_class.tolist(), strict=True) if not np.isnan(x)},
        "mistakes": _mistakes(predicted, labels, classes),
        "permuted": {
            "top1": permuted_accuracy(predicted, labels, len(classes)),
            "mean_per_class": float(guessed[present].mean()),
        },
    }


def _mistakes(predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> list[list[Any]]:
    """The most frequent confusions: [class, taken for, number of images], at most 20."""
    wrong = (predicted != labels) & (predicted >= 0)
    pairs, counts = (labels * len(classes) + predicted)[wrong].unique(return_counts=True)
    most = counts.argsort(descending=True, stable=True)[:_LISTED]
    return [[classes[pairs[i] // len(classes)], classes[pairs[i] % len(classes)], int(counts[i])] for i in most]


def save_classification(
    data: EvalData, name: str, rows: NDArray[np.int64], labels: Tensor, logits: Tensor, more: str = ""
) -> None:
    """As `save_classes`, from (n, C) logits: the predicted class, and those that come second to fifth.

    Where a logit is NaN, the columns of the prediction are empty.
    """
    top = top_classes(logits)
    columns = {"predicted" if place == 0 else f"top{place + 1}": top[:, place] for place in range(top.shape[1])}
    save_classes(data, name, rows, labels, columns, more)


def save_classes(
    data: EvalData, name: str, rows: NDArray[np.int64], labels: Tensor, predicted: Mapping[str, Tensor], more: str = ""
) -> None:
    """Write NAME.csv: key, label, and columns of predicted classes.

    Args:
        data: says whether and where.
        name: of the protocol, unless the data have its title.
        rows: (n,) of the test images.
        labels: (n,) int64.
        predicted: title -> (n,) int64; -1 is an empty cell.
        more: what distinguishes this file from the protocol's others.
    """
    columns = {
        title: [data.classes[i] if i >= 0 else "" for i in numbers.tolist()]
        for title, numbers in ({"label": labels} | dict(predicted)).items()
    }
    save_predictions(data.predictions, data.file_name(name, more), data.test, rows, columns)


def save_predictions(
    folder: Path | None, name: str, images: ImageSet, rows: NDArray[np.int64], columns: Mapping[str, Iterable[Any]]
) -> None:
    """Write NAME.csv: one line per image, its key first; whole or not at all. Rank 0 writes, on all ranks together.

    Args:
        folder: made if need be; None to write nothing.
        name: of the file, without ending.
        images: give the keys; what is not printable in them and in the names of classes becomes a backslash escape,
            and an apostrophe stands before what a spreadsheet would run.
        rows: (n,) of `images`.
        columns: title -> n values.

    Raises:
        UserError: the folder cannot be written.
    """
    with dist.shared_errors():
        if folder is not None and dist.rank() == 0:
            files.make_folder(folder)
            with files.writing(folder / f"{name}.csv") as file:
                text = io.TextIOWrapper(file, newline="", encoding="utf-8", errors="backslashreplace")
                writer = csv.writer(text)
                writer.writerow(["key", *columns])
                for row, *values in zip(rows.tolist(), *columns.values(), strict=True):
                    key = cell(images.key(row))
                    writer.writerow([key, *(cell(value) if isinstance(value, str) else value for value in values)])
                text.detach()
