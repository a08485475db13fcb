"""Linear probe: how much of the classes a linear layer can read from the frozen backbone.

Three recipes and a few-label variant:

    fast       cached, standardised features (no augmentation) -> logistic regression by L-BFGS; its setting,
               C, is picked on a held-out part of train. The default; reported as `linear-fast`, because an
               augmented probe scores up to two points more.
    swav       the official SwAV probe: SGD on augmented images, learning rate 0.3, cosine per epoch.
    jigclu     the official JigClu probe: SGD on augmented images, learning rate 10, x 0.1 at 60 % and 80 %.
    fewlabels  `fast` with a fixed C on 1 and 10 labels per class, mean over draws.

The published probes report the best epoch on the test set. Here the last epoch is the result and the best one
stands beside it under a name that says what it is. One more deviation from the official codes: images that do
not fill the last batch of an epoch wait for the next epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tessella import dist
from tessella.data.loader import Loader
from tessella.data.sampler import EpochOrder
from tessella.data.views import CropGroup, Photometry, ViewSpec
from tessella.errors import UserError
from tessella.ops.metrics import per_class_accuracy, topk_correct, wilson_interval
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.features import EvalData, assert_unchanged, frozen, progress, tensor_digests

_C_VALUES = tuple(10.0**power for power in range(-6, 3))


class Recipe(NamedTuple):
    """Settings of a published probe; all use SGD with momentum 0.9, without Nesterov, on batches of 256."""

    lr: float
    weight_decay: float
    schedule: Literal["cosine", "step"]
    epochs: int = 100


RECIPES = {
    "swav": Recipe(lr=0.3, weight_decay=1e-6, schedule="cosine"),
    "jigclu": Recipe(lr=10.0, weight_decay=0.0, schedule="step"),
}


@dataclass(frozen=True)
class LinearConfig:
    """Which probe; `epochs` to `scale_lr` concern the augmented recipes, `c` to `iterations` the fast one."""

    version: ClassVar[int] = 1
    recipe: Literal["fast", "swav", "jigclu"] = "fast"
    epochs: int | None = None  # default: the recipe's 100
    batch_size: int = 256
    lr: float | None = None  # default: the recipe's; for 100 classes JigClu's authors advise 1 instead of 10
    scale_lr: bool = False  # multiply lr by batch_size / 256
    c: tuple[float, ...] = _C_VALUES  # inverse strengths of the L2 penalty to choose from, ascending
    held_out: float = 0.1  # share of train on which C is picked
    iterations: int = 1000  # of L-BFGS, at most, per C
    seed: int = 0


@dataclass(frozen=True)
class FewLabelsConfig:
    """Probes of a few labelled train images per class."""

    version: ClassVar[int] = 1
    labels_per_class: tuple[int, ...] = (1, 10)
    draws: int = 10  # random subsets for each number of labels
    c: float = 0.1  # fixed: so few labels cannot pick it, and more would no longer be few
    iterations: int = 1000
    seed: int = 0


class LinearHead(NamedTuple):
    """Scores are `x @ weight.T + bias`."""

    weight: Tensor  # (classes, d)
    bias: Tensor  # (classes,)


class Trial(NamedTuple):
    """What one C gave on the held-out part of train."""

    c: float
    top1: float
    loss: float
    head: LinearHead

    def quality(self) -> tuple[float, float]:
        """Accuracy; where it is equal, as often on few images, the loss decides."""
        return self.top1, -self.loss


def linear(backbone: nn.Module, data: EvalData, config: LinearConfig) -> dict[str, Any]:
    """Train a linear layer on the train images, judge it on the test images.

    Returns:
        `top1`, `top1_interval`, `top5` (with more than five classes), `mean_per_class`, `per_class`; for
        `fast` the chosen `c` and `held_out_top1` of each C tried; for the others the last epoch's figures and
        `best_test_top1` at `best_test_epoch` (from 1), which was picked on the test set and is there for
        comparison with papers only.
    """
    return _fast(backbone, data, config) if config.recipe == "fast" else _augmented(backbone, data, config)


def few_labels(backbone: nn.Module, data: EvalData, config: FewLabelsConfig) -> dict[str, Any]:
    """Linear probes of small class-balanced subsets of train, judged on all test images.

    Features are standardised by all train images, which takes no labels.

    Returns:
        For each number n of labels per class: `top1_{n}` (mean over the draws) and `std_{n}` (sample
        formula).

    Raises:
        UserError: a class has fewer train images than labels are asked for.
    """
    train, test = data.features(backbone, "train"), data.features(backbone, "test")
    assert train.labels is not None and test.labels is not None
    shift, scale = standardisation(train.x)
    x, test_x = (train.x - shift) / scale, ((test.x - shift) / scale).to(data.device)
    scores: dict[str, Any] = {}
    for count in config.labels_per_class:
        results = []
        for draw in progress(range(config.draws), f"{count} labels per class", config.draws):
            rows = balanced_rows(train.labels, count, config.seed, draw)
            head = fit_logistic(
                x[rows].to(data.device),
                train.labels[rows].to(data.device),
                len(data.classes),
                config.c,
                iterations=config.iterations,
            )
            hits = topk_correct(F.linear(test_x, *head).cpu(), test.labels, 1)
            results.append(float(hits.double().mean()))
        scores[f"top1_{count}"] = float(np.mean(results))
        scores[f"std_{count}"] = float(np.std(results, ddof=1)) if len(results) > 1 else 0.0
    return scores


def learning_rate(recipe: str, epoch: int, epochs: int = 100, base: float | None = None) -> float:
    """Learning rate of one epoch; it does not change within an epoch.

    Args:
        recipe: "swav": cosine from the base to 0. "jigclu": x 0.1 at 60 % and at 80 % of the epochs.
        epoch: from 0, below `epochs`.
        epochs: of the whole probe.
        base: the first epoch's; default: the recipe's.
    """
    base = RECIPES[recipe].lr if base is None else base
    if RECIPES[recipe].schedule == "cosine":
        return base * (1 + math.cos(math.pi * epoch / epochs)) / 2
    drops = sum(100 * epoch >= percent * epochs for percent in (60, 80))
    return base / 10**drops


def fit_logistic(
    x: Tensor,
    labels: Tensor,
    classes: int,
    c: float,
    *,
    start: LinearHead | None = None,
    iterations: int = 1000,
) -> LinearHead:
    """Multinomial logistic regression: the minimum of C * (sum of cross-entropies) + |weight|² / 2.

    Args:
        x: (n, d) float32, best standardised.
        labels: (n,) int64 in [0, classes), on the device of `x`.
        classes: rows of the weight, also for classes without an image.
        c: C > 0, as in scikit-learn; smaller is a stronger penalty (of the weight, not of the bias).
        start: where to begin, for example the solution of the previous C; default zeros.
        iterations: of L-BFGS, at most.

    Returns:
        The solution on the device of `x`.
    """
    weight = torch.zeros(classes, x.shape[1], device=x.device) if start is None else start.weight.clone()
    bias = torch.zeros(classes, device=x.device) if start is None else start.bias.clone()
    weight.requires_grad_(), bias.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        # Divided by C n: the mean keeps the gradient's size, and so the tolerances, independent of n and C.
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + weight.square().sum() / (2 * c * len(x))
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return LinearHead(weight.detach(), bias.detach())


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, (d,) each; columns that hardly vary are not blown up."""
    scale = x.std(dim=0, correction=0)
    largest = float(scale.max())
    return x.mean(dim=0), scale.clamp(min=1e-5 * largest if largest > 0 else 1.0)


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out: `share` of each class, at least one image, never its only one.

    Args:
        labels: (n,) int64.
        share: in (0, 1).
        seed: of the choice.

    Returns:
        Two sorted int64 tensors, disjoint, together range(n).
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for rows in _shuffled_classes(labels, seed, 0):
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[torch.from_numpy(rows[:count])] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def balanced_rows(labels: Tensor, per_class: int, seed: int, draw: int) -> Tensor:
    """Rows of `per_class` random images of every class; within one draw, fewer are a part of more.

    Args:
        labels: (n,) int64.
        per_class: > 0.
        seed: of the protocol.
        draw: number of the subset, from 0.

    Raises:
        UserError: a class has fewer images.
    """
    shuffled = _shuffled_classes(labels, seed, draw)
    least = min(len(rows) for rows in shuffled)
    if least < per_class:
        raise UserError(
            f"{per_class} labels per class were asked for, but a class of the train images has only {least}: "
            f"ask for {least} or fewer, or leave this protocol out"
        )
    return torch.from_numpy(np.sort(np.concatenate([rows[:per_class] for rows in shuffled])))


def _shuffled_classes(labels: Tensor, seed: int, draw: int) -> list[NDArray[np.int64]]:
    """Rows of each class that occurs, in a random order that only (seed, draw) decides."""
    order = permutation(stream_key(seed, "pick"), np.arange(len(labels)), draw)
    shuffled = labels.numpy()[order]
    by_class = np.argsort(shuffled, kind="stable")
    return np.split(order[by_class], np.flatnonzero(np.diff(shuffled[by_class])) + 1)


def _fast(backbone: nn.Module, data: EvalData, config: LinearConfig) -> dict[str, Any]:
    train, test = data.features(backbone, "train"), data.features(backbone, "test")
    assert train.labels is not None and test.labels is not None
    x, labels = train.x.to(data.device), train.labels.to(data.device)
    trials = _try_penalties(x, labels, len(data.classes), config)
    best = max(trials, key=Trial.quality)
    shift, scale = standardisation(x)
    x = (x - shift) / scale
    head = fit_logistic(x, labels, len(data.classes), best.c, start=best.head, iterations=config.iterations)
    logits = F.linear((test.x.to(data.device) - shift) / scale, *head)
    scores = _judge(logits.cpu(), test.labels, data.classes)
    scores |= {"c": best.c, "held_out_top1": {f"{trial.c:g}": trial.top1 for trial in trials}}
    if len(config.c) > 1 and best.c == config.c[-1]:
        scores["notes"] = [f"the chosen C {best.c:g} is the largest tried: a larger one may score more"]
    return scores


def _try_penalties(x: Tensor, labels: Tensor, classes: int, config: LinearConfig) -> list[Trial]:
    """Fit on most of train with one C after the other, judge on the rest."""
    fit_rows, held_rows = stratified_split(labels.cpu(), config.held_out, config.seed)
    if not len(held_rows):
        raise UserError("the linear probe picks its penalty on held-out train images: give two or more per class")
    shift, scale = standardisation(x[fit_rows])
    fit_x, held_x = (x[fit_rows] - shift) / scale, (x[held_rows] - shift) / scale
    fit_labels, held_labels = labels[fit_rows], labels[held_rows]
    trials: list[Trial] = []
    for c in progress(config.c, "linear probe", len(config.c)):
        start = trials[-1].head if trials else None
        head = fit_logistic(fit_x, fit_labels, classes, c, start=start, iterations=config.iterations)
        logits = F.linear(held_x, *head)
        top1 = float(topk_correct(logits, held_labels, 1).double().mean())
        trials.append(Trial(c, top1, float(F.cross_entropy(logits, held_labels)), head))
        past_best = len(trials) - 1 - max(range(len(trials)), key=lambda i: trials[i].quality())
        if past_best >= 2 and trials[-3].loss < trials[-2].loss < trials[-1].loss:
            break  # only worse from here, and the largest C take most of the time
    return trials


def _augmented(backbone: nn.Module, data: EvalData, config: LinearConfig) -> dict[str, Any]:
    recipe = RECIPES[config.recipe]
    epochs = config.epochs or recipe.epochs
    base = recipe.lr if config.lr is None else config.lr
    if config.scale_lr:
        base *= config.batch_size / 256
    test = data.features(backbone, "test")
    assert test.labels is not None
    test_x, labels = test.x.to(data.device), data.labels("train").to(data.device)
    head = _initial_head(len(data.classes), test_x.shape[1], config.seed).to(data.device)
    solver = torch.optim.SGD(head.parameters(), lr=base, momentum=0.9, weight_decay=recipe.weight_decay)
    loader = _augmented_loader(data, config)
    before = tensor_digests(backbone)
    best, best_epoch = -1.0, 0
    with frozen(backbone):
        for epoch in progress(range(epochs), f"linear probe ({config.recipe})", epochs):
            for group in solver.param_groups:
                group["lr"] = learning_rate(config.recipe, epoch, epochs, base)
            for (batch,) in loader.epoch(epoch):
                _update(head, solver, backbone, batch.views[0][0], labels[batch.instances])
            if epoch == 0:
                assert_unchanged(backbone, before)  # a wrong probe should not cost its other 99 epochs first
            with torch.no_grad():
                logits = head(test_x).cpu()
            top1 = float(topk_correct(logits, test.labels, 1).double().mean())
            if top1 > best:
                best, best_epoch = top1, epoch + 1
    scores = _judge(logits, test.labels, data.classes)
    scores |= {"epochs": epochs, "lr": base, "best_test_top1": best, "best_test_epoch": best_epoch}
    if not logits.isfinite().all():
        scores["notes"] = [f"the linear layer diverged at learning rate {base:g}: give a lower lr"]
    return scores


def _augmented_loader(data: EvalData, config: LinearConfig) -> Loader:
    """Random resized crops and flips of the train images, nothing else, as in every published probe."""
    flips = Photometry(flip=0.5, jitter=0, gray=0, blur=0, solarize=0)
    crops = CropGroup(views=1, size=data.transform.size, scale=(0.08, 1.0), photometry=flips)
    return Loader(
        data.train,
        ViewSpec((crops,), data.transform.mean, data.transform.std),
        EpochOrder(data.train.ids, config.batch_size, config.seed),
        seed=config.seed,
        device=data.device,
        workers=data.workers,
        rank=dist.rank(),
        world_size=dist.world_size(),
        accumulate=1,
    )


def _initial_head(classes: int, dim: int, seed: int) -> nn.Linear:
    """Weights from N(0, 0.01²), bias 0, equal on every rank."""
    head = nn.utils.skip_init(nn.Linear, dim, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.01, generator=generator)
        head.bias.zero_()
    return head


def _update(head: nn.Linear, solver: torch.optim.SGD, backbone: nn.Module, pixels: Tensor, labels: Tensor) -> None:
    with torch.no_grad():  # not inference_mode: the head's backward pass keeps these features
        features = backbone(pixels).float()
    solver.zero_grad()
    F.cross_entropy(head(features), labels).backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        parameter.grad.copy_(dist.all_reduce_sum(parameter.grad) / dist.world_size())
    solver.step()


def _judge(logits: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    hits = topk_correct(logits, labels, 1)
    top1 = float(hits.double().mean())
    per_class = per_class_accuracy(hits, labels, len(classes))
    scores: dict[str, Any] = {"top1": top1, "top1_interval": list(wilson_interval(top1, len(labels)))}
    if len(classes) > 5:
        scores["top5"] = float(topk_correct(logits, labels, 5).double().mean())
    scores["mean_per_class"] = float(per_class.nanmean())
    scores["per_class"] = {name: x for name, x in zip(classes, per_class.tolist(), strict=True) if not np.isnan(x)}
    return scores
