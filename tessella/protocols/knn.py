"""Weighted k-nearest-neighbour classification of frozen features: no training, so nothing to tune.

    unit features of test x unit features of train -> k nearest -> each votes exp(similarity / T) for its class

Exact: every similarity is computed, block by block. Source: Wu, Xiong, Yu, Lin, "Unsupervised feature learning via
non-parametric instance discrimination", CVPR 2018 (k 200, T 0.1 there; k 20 and T 0.07 are usual today).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.ops.nearest import largest
from tessella.protocols.features import EvalData, gather_rows, rank_rows
from tessella.protocols.protocol import Protocol
from tessella.protocols.scoring import accuracy_scores, permuted_accuracy, save_classes
from tessella.ranges import Positive, PositiveInt

_QUERIES = 256, 512  # of one block, at least and at most: enough for an efficient product
_HEADLINE = (20, 0.07)  # fixed beforehand: the best of several would be picked on the test set


@dataclass(frozen=True)
class KnnConfig:
    """Which neighbourhoods are scored; `top1` is always k 20 at T 0.07."""

    version: ClassVar[int] = 1
    k: tuple[PositiveInt, ...] = (1, 20, 200)  # k 1 is the plain nearest neighbour, whatever T
    temperatures: tuple[Positive, ...] = (0.07, 0.1)
    chunk: PositiveInt = 25_000_000  # similarities held at a time; changes the memory, not the result


def knn(backbone: nn.Module, data: EvalData, config: KnnConfig) -> dict[str, Any]:
    """Classify the test images by their neighbours among the train images.

    When both are the same images, no image counts as its own neighbour (leave-one-out).

    Returns:
        `top1`, `top1_interval` and `mean_per_class` of the headline, `per_class`, and an accuracy `k{k}_T{T}`
        in [0, 1] for each setting (`k1` for the plain nearest neighbour); `notes` says what was clipped.
    """
    train, test = data.features(backbone, "train"), data.features(backbone, "test")
    assert train.labels is not None and test.labels is not None
    loo = data.same_images
    most = len(train.x) - loo
    ks = sorted({min(k, most) for k in (*config.k, _HEADLINE[0])})
    temperatures = sorted({*config.temperatures, _HEADLINE[1]})
    mine = torch.from_numpy(rank_rows(len(test.x)))
    options: dict[str, Any] = {"classes": len(data.classes), "chunk": config.chunk, "device": data.device}
    voted = knn_predict(
        train.x, train.labels, test.x[mine], ks=ks, temperatures=temperatures, exclude=mine if loo else None, **options
    )
    predictions = {setting: gather_rows(classes.cpu(), len(test.x), data.device) for setting, classes in voted.items()}
    headline = predictions[min(_HEADLINE[0], most), _HEADLINE[1]]
    scores = accuracy_scores(headline, test.labels, data.classes)
    # For the plain nearest neighbour every temperature says the same.
    named = {"k1" if k == 1 else f"k{k}_T{t:g}": classes for (k, t), classes in predictions.items()}
    scores |= {name: float((classes == test.labels).double().mean()) for name, classes in named.items()}
    scores["permuted"] |= {name: permuted_accuracy(p, test.labels, len(data.classes)) for name, p in named.items()}
    save_classes(data, "knn", test.rows, test.labels, {"predicted": headline} | named)
    scores["leave_one_out"] = loo
    clipped = sorted({k for k in (*config.k, _HEADLINE[0]) if k > most})
    scores["notes"] = [f"k {k} is more than the {most} neighbours there are; k {most} was used" for k in clipped]
    return scores


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_labels: Tensor,
    test_x: Tensor,
    *,
    classes: int,
    ks: list[int],
    temperatures: list[float],
    chunk: int = 25_000_000,
    exclude: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> dict[tuple[int, float], Tensor]:
    """The class that the neighbours vote for.

    Args:
        train_x: (N, d) float32, N > 0.
        train_labels: (N,) int64 in [0, classes).
        test_x: (n, d) float32.
        classes: of train and test together.
        ks: numbers of neighbours, each in [1, N] (one less with `exclude`).
        temperatures: each > 0.
        chunk: similarities held at a time.
        exclude: (n,) int64: for each query the train row that is no neighbour of it (itself); None for none.
        device: where the products run; the train features must fit there.

    Returns:
        (n,) int64 on `device` for each (k, temperature).
    """
    train_x, train_labels = F.normalize(train_x.to(device), dim=1), train_labels.to(device)
    votes_of: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in ks for t in temperatures}
    # As many queries as meet the whole of train at once, within limits: then there are no parts to merge.
    queries = min(max(_QUERIES[0], min(_QUERIES[1], chunk // len(train_x))), chunk, max(1, len(test_x)))
    columns = min(chunk // queries, len(train_x))
    held = torch.empty(queries * columns, device=device)  # one for all products: fresh pages cost as much as they do
    for start in range(0, len(test_x), queries):
        part = F.normalize(test_x[start : start + queries].to(device), dim=1)
        own = None if exclude is None else exclude[start : start + queries].to(device)
        similarity, index = _nearest(train_x, part, max(ks), columns, own, held)
        labels = train_labels[index]
        for temperature in temperatures:
            # Relative to the nearest: a common factor leaves the vote as it is and keeps exp in range.
            weights = ((similarity - similarity[:, :1]) / temperature).exp()
            for k in ks:
                votes = torch.zeros(len(part), classes, device=part.device)
                votes.scatter_add_(1, labels[:, :k], weights[:, :k])
                votes_of[k, temperature].append(votes.argmax(dim=1))
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return {setting: torch.cat([empty, *parts]) for setting, parts in votes_of.items()}


def _nearest(
    train: Tensor, queries: Tensor, k: int, columns: int, own: Tensor | None, held: Tensor
) -> tuple[Tensor, Tensor]:
    """The k largest similarities of each query, (q, k) sorted downwards, and their train rows.

    `columns` train rows are compared at a time, in the memory of `held`.
    """
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), columns):
        part = train[start : start + columns]
        similarity = torch.mm(queries, part.T, out=held[: len(queries) * len(part)].view(len(queries), -1))
        if own is not None:
            inside = ((own >= start) & (own < start + len(part))).nonzero()[:, 0]
            similarity[inside, own[inside] - start] = -torch.inf
        values, index = largest(similarity, min(k, len(part)))
        best, rows = torch.cat([best, values], dim=1), torch.cat([rows, index + start], dim=1)
        if start:
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
    return best, rows


KNN = Protocol("Neighbours", KnnConfig, knn, {"knn": KnnConfig()}, {"top1": "kNN"}, quick={"classes": ("knn",)})
