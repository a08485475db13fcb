"""From labelled images to a classifier that says how sure it is, may abstain, and points at labels that look wrong.

    unit features -> standardised -> logistic regression, its penalty picked by cross-validation
    cross-validated logits -> one temperature (Guo et al., "On calibration of modern neural networks", ICML 2017)
                           -> the least confidence at which it answers
                           -> labels that the other folds contradict

Copies of one image stay in one fold: otherwise a copy would vouch for its twin.
"""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from tessella import files
from tessella.atlas.classifier import Classifier, Reference, write_classifier
from tessella.atlas.classifier_page import write_classifier_page
from tessella.atlas.folder import Atlas
from tessella.atlas.label import labels_of, read_labels
from tessella.console import Display
from tessella.errors import UserError
from tessella.ops.metrics import wilson_interval
from tessella.text import cell, printable

_PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of scikit-learn: the inverse strength
_FOLDS = 5
_LEAST = 2  # labelled images of a class
_MOST = 50_000  # labelled images that are learned from; of more, a sample of each class
_BINS = 10  # of the calibration chart
_SUSPECT = 0.7  # calibrated probability of another class from which a label is listed


class Classified(NamedTuple):
    """What `classify` has learned."""

    folder: Path
    classes: list[str]
    images: int  # labelled ones it learned from
    accuracy: float  # cross-validated, of all labelled images
    interval: tuple[float, float]  # of the accuracy, 95 % (Wilson)
    majority: float  # accuracy of always saying the largest class
    calibration_error: float  # expected calibration error, 10 bins, after temperature scaling
    confidence: float  # least confidence at which it answers
    answered: float  # share of the labelled images that it answers
    answered_accuracy: float  # of those
    suspects: int  # labels that look wrong

    def lines(self) -> list[str]:
        """For people."""
        low, high = self.interval
        return [
            f"accuracy      {100 * self.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}] by cross-validation on "
            f"{self.images:,} labelled images, {len(self.classes)} classes (the largest alone: "
            f"{100 * self.majority:.1f} %)",
            f"calibration   expected error {100 * self.calibration_error:.1f} points",
            f"abstains      below confidence {self.confidence:.2f}: answers {100 * self.answered:.0f} % of the images, "
            f"and {100 * self.answered_accuracy:.1f} % of its answers are right",
            f"labels        {self.suspects:,} look wrong: suspects.csv",
        ]


class _Data(NamedTuple):
    rows: NDArray[np.int64]  # of images.parquet
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    classes: list[str]
    groups: NDArray[np.int64]
    left_out: dict[str, int]  # class -> images, too few to learn from


def classify(path: Path, labels: Path | None, out: Path, *, precision: float, seed: int) -> Classified:
    """Learn a classifier from the labels of an atlas.

    Args:
        path: of the atlas.
        labels: a .csv with the columns path and label, paths as in the atlas; None: the names given on its page.
        out: folder of the classifier; missing or empty.
        precision: share of answers that should be right, in [0, 1]; decides from which confidence on.
        seed: of the folds.

    Raises:
        UserError: too few labels, labels of no image here, or the folder is not empty.
    """
    atlas = Atlas.open(path)
    atlas.require("table")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: choose another --out")
    keys = atlas.table("key")["key"]
    data = _data(atlas, keys, labels, seed)
    penalty, logits = _cross_validated(data, seed)
    temperature = _temperature(logits, data.y)
    probability = _softmax(logits / temperature)
    predicted = probability.argmax(axis=1)
    right = predicted == data.y
    sure = probability.max(axis=1)
    least = _least_confidence(sure, right, precision)
    answered = sure >= least
    suspects = _suspects(probability, data.y)
    weight, bias = _fit(data.x, data.y, len(data.classes), penalty)
    facts: dict[str, Any] = {
        "classes": data.classes,
        "penalty": penalty,
        "temperature": temperature,
        "confidence": least,
        "precision": precision,
        "labelled": len(data.y),
        "accuracy": float(right.mean()),
        "interval": wilson_interval(float(right.mean()), len(right)),
        "majority": float(np.bincount(data.y).max() / len(data.y)),
        "calibration_error": _calibration_error(sure, right),
        "answered": float(answered.mean()),
        "answered_accuracy": float(right[answered].mean()) if answered.any() else 0.0,
        "suspects": len(suspects),
        "left_out": data.left_out,
        "bins": _bins(sure, right),
        "confusion": _confusion(data.y, predicted, len(data.classes)),
        "atlas": {"data": atlas.state["data"], "fingerprint": atlas.state["fingerprint"]},
        "seed": seed,
    }
    files.make_folder(out.parent.resolve())
    with files.new_folder(out) as made:
        known = Reference.of_atlas(atlas)
        write_classifier(
            made, Classifier(atlas.backbone(), weight, bias, data.classes, temperature, least, known), facts
        )
        _write_suspects(made / "suspects.csv", keys, data, probability, suspects)
        _write_predictions(made / "cross-validated.csv", keys, data, probability)
        write_classifier_page(made / "classifier.html", facts, keys, data.rows, data.y, probability, suspects, atlas)
    return Classified(
        out,
        data.classes,
        len(data.y),
        facts["accuracy"],
        tuple(facts["interval"]),
        facts["majority"],
        facts["calibration_error"],
        least,
        facts["answered"],
        facts["answered_accuracy"],
        len(suspects),
    )


def _data(atlas: Atlas, keys: list[str], labels: Path | None, seed: int) -> _Data:
    if labels is None:
        _, found = labels_of(atlas)
        names = list(found.label)
        if not any(names):
            raise UserError(f"nothing in {atlas.path} has a name: give --labels, or name clusters on its page")
    else:
        names = _matched(read_labels(labels), keys, labels)
    counts: dict[str, int] = {}
    for name in filter(None, names):
        counts[name] = counts.get(name, 0) + 1
    classes = sorted(name for name, count in counts.items() if count >= _LEAST)
    if len(classes) < 2:
        raise UserError(
            f"{len(classes)} classes have at least {_LEAST} labelled images, of "
            f"{', '.join(map(printable, counts)) or 'none'}: a classifier needs two"
        )
    number = {name: i for i, name in enumerate(classes)}
    rows = np.array([row for row, name in enumerate(names) if name in number], np.int64)
    y = np.array([number[names[row]] for row in rows.tolist()], np.int64)
    if len(rows) > _MOST:
        rows, y = _sampled(rows, y, seed)
    group = atlas.table("copy_group")["copy_group"].astype(np.int64)
    groups = np.where(group[rows] >= 0, group[rows], len(keys) + rows)
    left_out = {name: count for name, count in counts.items() if name not in number}
    return _Data(rows, atlas.vectors().rows(rows).numpy(), y, classes, groups, left_out)


def _matched(given: dict[str, str], keys: list[str], labels: Path) -> list[str]:
    """Label of each key; "" for none. A path may have more folders in front than the key, if that is unambiguous."""
    names, found = [""] * len(keys), 0
    by_end: dict[str, list[str]] = {}
    for listed in given:
        by_end.setdefault(listed.rpartition("/")[2], []).append(listed)
    for row, key in enumerate(keys):
        shown = cell(key)
        path: str | None = shown if shown in given else key if key in given else None
        if path is None:
            longer = [other for other in by_end.get(key.rpartition("/")[2], []) if other.endswith(f"/{key}")]
            path = longer[0] if len(longer) == 1 else None
        if path is not None:
            names[row], found = given[path], found + 1
    if not found:
        example = next(iter(given), "nothing")
        raise UserError(
            f"none of the {len(given)} paths of {labels} is an image of the atlas: it has {printable(example)!r}, the "
            f"atlas has {printable(keys[0])!r}"
        )
    return names


def _sampled(rows: NDArray[np.int64], y: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """At most `_MOST`, small classes whole."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(y))
    place = np.empty(len(y), np.int64)
    for value in range(int(y.max()) + 1):
        mine = order[y[order] == value]
        place[mine] = np.arange(len(mine))
    chosen = np.sort(np.argsort(place, kind="stable")[:_MOST])
    return rows[chosen], y[chosen]


def _cross_validated(data: _Data, seed: int) -> tuple[float, NDArray[np.float64]]:
    """The penalty with the least cross-validated loss, and the logits that each image got from the other folds."""
    from sklearn.model_selection import StratifiedGroupKFold

    k = len(data.classes)
    smallest = int(np.bincount(data.y).min())
    splitter = StratifiedGroupKFold(max(2, min(_FOLDS, smallest)), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class whose images are all copies of one cannot be in every fold
        folds = list(splitter.split(data.x, data.y, data.groups))
    best: tuple[float, float, NDArray[np.float64]] | None = None
    with Display("classifier", len(_PENALTIES) * len(folds)) as display:
        for penalty in _PENALTIES:
            logits = np.full((len(data.y), k), -30.0)
            for learn, test in folds:
                weight, bias = _fit(data.x[learn], data.y[learn], k, penalty)
                logits[test] = data.x[test] @ weight.T + bias
                display.advance()
            loss = _loss(logits / _temperature(logits, data.y), data.y)
            if best is None or loss < best[0]:
                best = loss, penalty, logits
    assert best is not None
    return best[1], best[2]


def _fit(
    x: NDArray[np.float32], y: NDArray[np.int64], classes: int, penalty: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(classes, d) weights and (classes,) biases for features as they are; a class without images gets -30."""
    from sklearn.linear_model import LogisticRegression

    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64) + 1e-6
    present = np.unique(y)
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, -30.0)
    if len(present) == 1:
        bias[present] = 0
        return weight, bias
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few iterations are enough for a figure; the loss decides
        model = LogisticRegression(C=penalty / len(y) * 100, max_iter=200).fit((x - mean) / std, y)
    coefficients, intercept = model.coef_ / std, model.intercept_ - (model.coef_ / std) @ mean
    if len(present) == 2:  # scikit-learn gives one row for two classes
        coefficients, intercept = (
            np.stack([-coefficients[0], coefficients[0]]) / 2,
            np.array([-intercept[0], intercept[0]]) / 2,
        )
    weight[present], bias[present] = coefficients, intercept
    return weight, bias


def _loss(logits: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    return float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(y)))


def _temperature(logits: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """The one with the least loss."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda log: _loss(logits / np.exp(log), y), bounds=(-3.0, 5.0), method="bounded")
    return float(np.exp(found.x))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return F.softmax(torch.from_numpy(logits), dim=1).numpy()


def _least_confidence(sure: NDArray[np.float64], right: NDArray[np.bool_], precision: float) -> float:
    """The lowest confidence above which the answers are right often enough; 1 + eps if there is none."""
    order = np.argsort(-sure, kind="stable")
    correct = right[order].cumsum() / np.arange(1, len(right) + 1)
    enough = np.flatnonzero(correct >= precision)
    return float(sure[order[enough[-1]]]) if len(enough) else 1.0


def _calibration_error(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    return float(
        sum(abs(row["confidence"] - row["accuracy"]) * row["images"] for row in _bins(sure, right)) / len(sure)
    )


def _bins(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> list[dict[str, float]]:
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    return [
        {
            "images": int((bins == i).sum()),
            "confidence": float(sure[bins == i].mean()),
            "accuracy": float(right[bins == i].mean()),
        }
        for i in range(_BINS)
        if (bins == i).any()
    ]


def _confusion(y: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> list[list[int]]:
    return np.bincount(y * classes + predicted, minlength=classes**2).reshape(classes, classes).tolist()


def _suspects(probability: NDArray[np.float64], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places whose label the other folds contradict, most certain first."""
    others = probability.copy()
    others[np.arange(len(y)), y] = 0
    value = others.max(axis=1)
    found = np.flatnonzero(value >= _SUSPECT)
    return found[np.argsort(-value[found], kind="stable")]


def _write_suspects(
    path: Path, keys: list[str], data: _Data, probability: NDArray[np.float64], suspects: NDArray[np.int64]
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "proposed", "probability"])
    for place in suspects.tolist():
        others = probability[place].copy()
        others[data.y[place]] = 0
        best = int(others.argmax())
        writer.writerow(
            [
                cell(keys[data.rows[place]]),
                cell(data.classes[data.y[place]]),
                cell(data.classes[best]),
                f"{others[best]:.3f}",
            ]
        )
    files.write_text(path, text.getvalue())


def _write_predictions(path: Path, keys: list[str], data: _Data, probability: NDArray[np.float64]) -> None:
    """What the other folds say of each labelled image: every figure can be recomputed from it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "predicted", "confidence"])
    for row, label, values in zip(data.rows.tolist(), data.y.tolist(), probability, strict=True):
        best = int(values.argmax())
        writer.writerow([cell(keys[row]), cell(data.classes[label]), cell(data.classes[best]), f"{values[best]:.4f}"])
    files.write_text(path, text.getvalue())
