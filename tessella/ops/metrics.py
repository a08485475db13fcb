"""Figures of an evaluation: accuracy and its interval, agreement of two partitions, spread of features.

Agreement of clusters with classes is computed from one contingency table.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def topk_correct(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the right class is among the k highest scores: (n,) bool; False for a row with a NaN.

    Scores are (n, classes), labels (n,) int64 in [0, classes), 1 <= k <= classes.
    """
    hits = (scores.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
    return hits & ~scores.isnan().any(dim=1)  # topk sorts NaN first, which would call a broken row right


def per_class_accuracy(correct: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Share of right answers (n,) of each class: (classes,) float64 on the CPU; NaN for a class without images."""
    labels = labels.cpu()
    hits = torch.bincount(labels[correct.cpu()], minlength=classes).double()
    return hits / torch.bincount(labels, minlength=classes).double()


def wilson_interval(accuracy: float, images: int) -> tuple[float, float]:
    """Bounds in [0, 1] of a share measured on independent images: Wilson's score interval for 95 %, 1927."""
    z = 1.96
    centre = accuracy + z**2 / (2 * images)
    half = z * math.sqrt(accuracy * (1 - accuracy) / images + z**2 / (4 * images**2))
    scale = 1 + z**2 / images
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def contingency(assignments: Tensor, labels: Tensor, clusters: int, classes: int) -> NDArray[np.int64]:
    """How many images of each class are in each cluster: (clusters, classes) int64 from (n,) int64 numbers of both."""
    cells = assignments.cpu().long() * classes + labels.cpu().long()
    return torch.bincount(cells, minlength=clusters * classes).reshape(clusters, classes).numpy()


def clustering_accuracy(table: NDArray[np.int64]) -> float:
    """Accuracy under the best one-to-one map of clusters to classes (Hungarian method). Table: (K, K)."""
    from scipy.optimize import linear_sum_assignment

    assert table.shape[0] == table.shape[1], f"a one-to-one map needs K == C, not {table.shape}"
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / table.sum())


def purity(table: NDArray[np.int64]) -> float:
    """Accuracy when each cluster is named after its most frequent class; grows with K. Table: (K, C)."""
    return float(table.max(axis=1).sum() / table.sum())


def normalised_mutual_information(table: NDArray[np.int64]) -> float:
    """Mutual information over the arithmetic mean of the two entropies, in [0, 1]. Table: (K, C).

    Older papers divide by the geometric mean. Two partitions of one part each agree: 1.
    """
    joint = table / table.sum()
    clusters, classes = joint.sum(axis=1), joint.sum(axis=0)
    mean_entropy = (_entropy(clusters) + _entropy(classes)) / 2
    if mean_entropy == 0:
        return 1.0
    information = _entropy(clusters) + _entropy(classes) - _entropy(joint)
    return float(np.clip(information / mean_entropy, 0.0, 1.0))


def adjusted_rand_index(table: NDArray[np.int64]) -> float:
    """Share of image pairs on which both partitions agree, corrected for chance. Hubert and Arabie, 1985.

    Table: (K, C). At most 1; about 0 for independent partitions, below 0 for worse than chance.
    """
    from sklearn.metrics import adjusted_rand_score

    clusters, classes = (np.repeat(numbers.ravel(), table.ravel()) for numbers in np.indices(table.shape))
    return float(adjusted_rand_score(classes, clusters))


def perplexity(counts: NDArray[np.int64]) -> float:
    """Exponential of a histogram's entropy: its number of equally full bins. Counts: (K,), not all 0."""
    return float(np.exp(_entropy(counts / counts.sum())))


def effective_rank(x: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of (n, d) rows. Roy and Vetterli, 2007.

    The mean row is removed first, so that a constant offset is no direction. In [1, min(n, d)]; 0 when all rows are
    equal (up to float32 rounding).
    """
    x = x.double()
    spread = x - x.mean(dim=0)
    if spread.abs().max() <= 1e-6 * x.abs().max():
        return 0.0  # what is left is rounding noise, whose rank would look high
    gram = spread.T @ spread if x.shape[0] > x.shape[1] else spread @ spread.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def _entropy(shares: NDArray[np.float64]) -> float:
    from scipy.special import entr

    return float(entr(shares).sum())
