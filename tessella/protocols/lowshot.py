"""Linear SVMs on frozen features of images with several labels each: the VOC07 protocol, full and low-shot.

    features of squashed images, each of length 1 -> one SVM per class -> average precision over the test images -> mean

    svm        all train images; each class's C by three-fold cross-validation
    lowshot    k positive images of each class and (classes - 1) k negative ones, five draws; C by cross-validation from
               eight positives on, fixed below: the usual choice by the test images inflates small k

Images of one class each (class folders) are taken as one label out of all. Where every object of a class in an image is
marked difficult, the image is a negative for training and left out of the test.

Source: Goyal, Mahajan, Gupta, Misra, "Scaling and benchmarking self-supervised visual representation learning", ICCV
2019. There the features are a stage's map pooled to about 9000 values; here they are the backbone's pooled features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tessella import dist
from tessella.data.boxes.layouts import AnnotatedImages
from tessella.data.index import Index
from tessella.data.masks.layouts import MaskedImages
from tessella.data.sources import ImageSet
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.features import EvalData, ImageData, progress
from tessella.protocols.protocol import Protocol
from tessella.protocols.scoring import permuted, save_predictions
from tessella.ranges import Positive, PositiveInt, Repeats, Seed

PRESENT, ABSENT, DIFFICULT = 1, 0, -1
_COSTS = tuple(sorted((0.01, 0.1, *(0.5**power for power in range(4, 20)))))
_FOLDS = 3

Matrix = NDArray[np.float64]


@dataclass
class MultiLabelData(ImageData):
    """Images of which each may have several classes."""

    classes: list[str] = field(kw_only=True)
    targets: dict[str, NDArray[np.int8]] = field(kw_only=True)  # of each split (rows of the set, C): see above

    @classmethod
    def of(
        cls, train: AnnotatedImages, test: AnnotatedImages, transform: EvalTransform, **options: Any
    ) -> MultiLabelData:
        """Image-level labels from boxes.

        Args:
            train: images with objects, as `data.boxes.layouts.open_annotations` gives them.
            test: the same.
            transform: of the features; both sides of an image are squashed to its size.
            options: device, workers, batch_size, predictions, cache.
        """
        classes = list(dict.fromkeys([*train.classes, *test.classes]))
        targets = {"train": image_labels(train, classes), "test": image_labels(test, classes)}
        return cls(ChosenImages(train), ChosenImages(test), transform, classes=classes, targets=targets, **options)


class ChosenImages(ImageSet):
    """The annotated ones among a folder's images, in their order."""

    def __init__(self, annotated: AnnotatedImages | MaskedImages) -> None:
        self._all, self._rows = annotated.images, np.sort(annotated.rows)
        if (np.diff(self._rows) == 0).any():
            raise UserError(f"{annotated.name} names an image twice: keep one of the lines")
        keys = [self._all.key(int(row)) for row in self._rows]
        index = Index.of(keys, self._all.sizes[self._rows], fingerprint=annotated.fingerprint)
        index.ids = self._all.ids[self._rows]
        super().__init__(annotated.name, index, False)

    def read(self, row: int) -> bytes | NDArray[np.uint8]:  # noqa: D102
        return self._all.read(int(self._rows[row]))


@dataclass(frozen=True)
class SvmConfig:
    """One SVM per class on all train images."""

    version: ClassVar[int] = 1
    costs: tuple[Positive, ...] = _COSTS  # C to choose from, ascending
    iterations: PositiveInt = 2000  # of the solver, at most
    squash: bool = True  # both sides of an image to the transform's size, so that nothing is cut off
    seed: Seed = 0


@dataclass(frozen=True)
class LowShotConfig:
    """SVMs on a few images of each class."""

    version: ClassVar[int] = 1
    positives: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32, 64, 96)  # of each class
    draws: Repeats = 5  # random subsets for each number; within a draw, fewer are a part of more
    costs: tuple[Positive, ...] = _COSTS  # C to choose from, ascending
    few_cost: Positive = 0.1  # C below `cross_validate_from` positives
    cross_validate_from: PositiveInt = 8
    iterations: PositiveInt = 2000
    squash: bool = True
    seed: Seed = 0


def svm(backbone: nn.Module, data: EvalData | MultiLabelData, config: SvmConfig) -> dict[str, Any]:
    """Train on all train images, judge on the test images.

    Returns:
        `map`, the mean of `per_class`, each class's average precision in [0, 1] (all points under the envelope); `c` of
        each class; `transform` of the features; `notes` names classes that could not be judged.
    """
    problem = _problem(backbone, data, config.squash, shorter_first=True)
    scores, chosen = np.zeros(problem.test_y.shape), np.zeros(len(data.classes))
    mine = _my_classes(problem)
    for column in progress(mine, "SVMs", len(mine)):
        y = np.where(problem.train_y[:, column] == PRESENT, 1, -1)
        chosen[column] = _pick_cost(problem.train_x, y, config)
        scores[:, column] = _decide(problem.train_x, y, problem.test_x, chosen[column], config)
    scores, chosen = _sum_over_ranks(scores, data), _sum_over_ranks(chosen, data)
    _save(data, data.file_name("svm"), problem, scores)
    result = _judged(problem, scores)
    return result | {
        "c": {data.classes[i]: float(chosen[i]) for i in problem.learnable},
        "transform": asdict(problem.transform),
    }


def lowshot(backbone: nn.Module, data: EvalData | MultiLabelData, config: LowShotConfig) -> dict[str, Any]:
    """Train on a few images of each class, judge on all test images.

    Returns:
        For each number k of positives `map_{k}` (mean over the draws) and `std_{k}` (sample formula); `transform`;
        which k were `cross_validated`; `notes` names what was left out.

    Raises:
        UserError: no class has as many positives as the smallest number asks for.
    """
    problem = _problem(backbone, data, config.squash, shorter_first=False)
    most = min(int((problem.train_y[:, i] == PRESENT).sum()) for i in problem.learnable)
    counts = [k for k in config.positives if k <= most]
    if not counts:
        raise UserError(
            f"{min(config.positives)} positive images of each class were asked for, and one has only {most}: give more "
            "train images, or leave this protocol out"
        )
    result: dict[str, Any] = {"permuted": {}}
    rounds = [(k, draw) for k in counts for draw in range(config.draws)]
    judged: dict[int, list[dict[str, Any]]] = {k: [] for k in counts}
    for k, draw in progress(rounds, "low-shot SVMs", len(rounds)):
        scores = np.zeros(problem.test_y.shape)
        for column in _my_classes(problem):
            rows = _few_rows(problem.train_y[:, column], k, len(problem.learnable), config.seed, draw, column)
            x, y = problem.train_x[rows], np.where(problem.train_y[rows, column] == PRESENT, 1, -1)
            cost = config.few_cost if k < config.cross_validate_from else _pick_cost(x, y, config)
            scores[:, column] = _decide(x, y, problem.test_x, cost, config)
        scores = _sum_over_ranks(scores, data)
        _save(data, data.file_name("lowshot", f"-{k}-draw{draw}"), problem, scores)
        judged[k].append(_judged(problem, scores))
    for k, draws in judged.items():
        values = [one["map"] for one in draws]
        result[f"map_{k}"] = float(np.mean(values))
        result[f"std_{k}"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        result["permuted"][f"map_{k}"] = float(np.mean([one["permuted"]["map"] for one in draws]))
    left_out = [k for k in config.positives if k > most]
    notes = [f"{', '.join(map(str, left_out))} positives left out: a class has only {most}"] if left_out else []
    return result | {
        "cross_validated": [k for k in counts if k >= config.cross_validate_from],
        "transform": asdict(problem.transform),
        "notes": notes + judged[counts[-1]][-1]["notes"],
    }


def average_precision(scores: Sequence[float] | Matrix, targets: Sequence[int] | NDArray[np.int8]) -> float:
    """Area under the envelope of precision over recall, at all points, as VOC counts it from 2010 on.

    Args:
        scores: (n,) higher is more likely; equal ones keep their order.
        targets: (n,) `PRESENT`, `ABSENT`, or `DIFFICULT`, which does not count.

    Returns:
        In [0, 1]; NaN without a positive.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    values, truth = values[truth != DIFFICULT], truth[truth != DIFFICULT]
    hits = (truth == PRESENT)[np.argsort(-values, kind="stable")]
    if not hits.any():
        return float("nan")
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / hits.sum())


def image_labels(annotated: AnnotatedImages, classes: list[str]) -> NDArray[np.int8]:
    """(images in the order of their rows, C) int8: whether a class is in an image, or only difficult or in a crowd."""
    table, number = annotated.table, {name: i for i, name in enumerate(classes)}
    column = np.array([number[name] for name in annotated.classes], dtype=np.int64)[table.labels]
    image = np.arange(len(annotated)).repeat(np.diff(table.first))
    targets = np.full((len(annotated), len(classes)), ABSENT, dtype=np.int8)
    clear = ~(table.difficult | table.crowd)
    targets[image[~clear], column[~clear]] = DIFFICULT
    targets[image[clear], column[clear]] = PRESENT
    return targets[np.argsort(annotated.rows, kind="stable")]


@dataclass(frozen=True)
class _Problem:
    train_x: Matrix  # (n, d) rows of length 1
    train_y: NDArray[np.int8]  # (n, C)
    test_x: Matrix
    test_y: NDArray[np.int8]
    test_rows: NDArray[np.int64]
    learnable: list[int]  # classes that have positives and negatives
    classes: list[str]
    transform: EvalTransform


def _problem(backbone: nn.Module, data: EvalData | MultiLabelData, squash: bool, *, shorter_first: bool) -> _Problem:
    """Features and labels of both splits. Full: shorter side to 256, then squashed; low-shot: squashed at once."""
    transform = data.transform
    if squash:
        if shorter_first and transform.resize > transform.size:
            transform = replace(transform, fit="shorter side, then both")
        else:
            transform = replace(transform, fit="both sides", resize=transform.size)
    sides = []
    for split in ("train", "test"):
        features = data.features(backbone, split, transform)
        x = features.x.numpy().astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-5
        sides.append((x, _targets(data, split)[features.rows], features.rows))
    (train_x, train_y, _), (test_x, test_y, test_rows) = sides
    positives = (train_y == PRESENT).sum(axis=0)
    learnable = np.flatnonzero((positives > 0) & (positives < len(train_y))).tolist()
    if not learnable:
        raise UserError(f"{data.train.name} has no class with images that show it and images that do not")
    return _Problem(train_x, train_y, test_x, test_y, test_rows, learnable, data.classes, transform)


def _targets(data: EvalData | MultiLabelData, split: str) -> NDArray[np.int8]:
    if isinstance(data, MultiLabelData):
        return data.targets[split]
    return torch.nn.functional.one_hot(data.labels(split), len(data.classes)).numpy().astype(np.int8)


def _my_classes(problem: _Problem) -> list[int]:
    return problem.learnable[dist.rank() :: dist.world_size()]


def _few_rows(targets: NDArray[np.int8], k: int, classes: int, seed: int, draw: int, column: int) -> NDArray[np.int64]:
    """Rows of k positives and (classes - 1) k negatives of one class, or as many as there are."""
    parts = []
    for value, count in ((PRESENT, k), (ABSENT, k * max(1, classes - 1))):
        rows = np.flatnonzero(targets == value)
        parts.append(rows[permutation(stream_key(seed, "shot"), rows, draw * 65_536 + column)][:count])
    return np.sort(np.concatenate(parts))


def _pick_cost(x: Matrix, y: NDArray[np.int64], config: SvmConfig | LowShotConfig) -> float:
    """The C of the best mean average precision over three folds; of equal ones the smallest."""
    from sklearn.model_selection import StratifiedKFold

    costs = config.costs
    if len(costs) == 1:
        return costs[0]
    if min((y == 1).sum(), (y == -1).sum()) < _FOLDS:
        return costs[len(costs) // 2]  # too few to try any
    folds = list(StratifiedKFold(_FOLDS).split(x, y))
    means = [
        np.mean([average_precision(_decide(x[fit], y[fit], x[held], cost, config), y[held] > 0) for fit, held in folds])
        for cost in costs
    ]
    return costs[int(np.argmax(means))]


def _decide(x: Matrix, y: NDArray[np.int64], test_x: Matrix, cost: float, config: SvmConfig | LowShotConfig) -> Matrix:
    """Fit on x, y; signed distances of test_x, (n,)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    machine = LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=config.iterations,
        intercept_scaling=1,
        random_state=config.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the published solver stops there as well
        return machine.fit(x, y).decision_function(test_x)


def _sum_over_ranks(values: Matrix, data: ImageData) -> Matrix:
    """Each rank has filled its own classes."""
    if dist.world_size() == 1:
        return values  # not by way of a device that may know no float64
    return dist.all_reduce_sum(torch.from_numpy(values).to(data.device)).cpu().numpy()


def _judged(problem: _Problem, scores: Matrix) -> dict[str, Any]:
    """Average precision of each class, and their mean."""
    values = {i: average_precision(scores[:, i], problem.test_y[:, i]) for i in problem.learnable}
    columns = [i for i, value in values.items() if not np.isnan(value)]
    if not columns:
        raise UserError("no class of the train images is in a test image, so there is nothing to score")
    left_out = [name for i, name in enumerate(problem.classes) if i not in columns]
    example = f"{len(left_out)} classes without train or test images are not in the mean, for example "

    def mean_precision(order: NDArray[np.int64]) -> dict[str, float]:
        targets = problem.test_y[order]
        return {"map": float(np.mean([average_precision(scores[:, i], targets[:, i]) for i in columns]))}

    return mean_precision(np.arange(len(scores))) | {
        "per_class": {problem.classes[i]: values[i] for i in columns},
        "notes": [example + left_out[0]] if left_out else [],
        "permuted": permuted(mean_precision, len(scores)),
    }


def _save(data: EvalData | MultiLabelData, name: str, problem: _Problem, scores: Matrix) -> None:
    columns: dict[str, Any] = {}
    for i in problem.learnable:
        columns[f"label of {problem.classes[i]}"] = problem.test_y[:, i].tolist()
        columns[f"score of {problem.classes[i]}"] = scores[:, i].tolist()
    save_predictions(data.predictions, name, data.test, problem.test_rows, columns)


_FEW_COSTS = (0.001, 0.01, 0.1)
SVM = Protocol(
    "SVM",
    SvmConfig,
    svm,
    {"svm": SvmConfig(), "svm-small": SvmConfig(costs=_FEW_COSTS)},
    {"map": "mean AP"},
    ("boxes", "classes"),
    quick={"classes": ("svm-small",), "boxes": ("svm-small",)},
)
LOW_SHOT = Protocol(
    "Low-shot SVM",
    LowShotConfig,
    lowshot,
    {"lowshot": LowShotConfig(), "lowshot-small": LowShotConfig(positives=(1, 4, 16), draws=3, costs=_FEW_COSTS)},
    kinds=("boxes", "classes"),
    quick={"classes": ("lowshot-small",), "boxes": ("lowshot-small",)},
)
