"""Linear probe: how much of the classes a linear layer can read from the frozen backbone.

    fast         cached, standardised features (no augmentation) -> logistic regression by L-BFGS; its setting, C, is
                 picked on a held-out part of train. The default; reported as `linear-fast`, because an augmented probe
                 scores up to two points more.
    lr-grid      the same features -> SGD with ten learning rates in one pass; the best on the held-out part is trained
                 again on all of train. Needs no more memory for more images.
    the others   the published probes: SGD or LARS on augmented images, a row of `RECIPES` each.
    fewlabels    `fast` with a fixed C on 1 and 10 labels per class, mean over draws.

The published probes report the best epoch on the test set. Here the result is that of the last epoch, and the best one
is given too, under a name that says what it is. The last batch of an epoch is used although it is not full, as in the
official codes of SwAV and JigClu.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.data.views import IMAGENET_STD
from tessella.errors import UserError
from tessella.optim import LARC
from tessella.protocols.features import EvalData, Features, assert_unchanged, frozen, progress, tensor_digests
from tessella.protocols.protocol import Protocol
from tessella.protocols.scoring import (
    classification_scores,
    permuted_accuracy,
    save_classes,
    save_classification,
    top1_of,
)
from tessella.protocols.subsets import balanced_rows, stratified_split
from tessella.protocols.train_images import LabelledBatch, SubsetOrder, TrainImages, initial_head
from tessella.protocols.training import Schedule, Snapshots, fit
from tessella.ranges import ForwardBatch, Positive, PositiveInt, ProperFraction, Repeats, Seed

_C_VALUES = tuple(10.0**power for power in range(-6, 3))
_LR_VALUES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_GRID_BATCH, _GRID_EPOCHS = 256, 10
_ROWS = 8192  # features that are standardised and judged at a time
_BLOCK = 2**18  # numbers of a part of the features that a core's cache holds; on a GPU what keeps it busy:
_GPU_BLOCK = 2**27


class Recipe(NamedTuple):
    """Settings of a published probe: momentum 0.9 without Nesterov, no warm-up, weights from N(0, 0.01²)."""

    lr: float
    batch_size: int
    weight_decay: float
    schedule: Literal["cosine", "cosine-step", "step"]  # per epoch; per step; x 0.1 at 60 % and at 80 % of the epochs
    epochs: int
    optimizer: Literal["sgd", "lars"] = "sgd"
    lr_follows_batch: bool = False  # lr x batch_size / 256 is part of the recipe


RECIPES = {
    "jigclu": Recipe(10.0, 256, 0.0, "step", 100),  # for 100 classes its authors advise lr 1
    "mejigclu": Recipe(10.0, 256, 0.0, "step", 100),  # "as JigClu"
    "moco": Recipe(30.0, 256, 0.0, "step", 100),
    "swav": Recipe(0.3, 256, 1e-6, "cosine", 100),
    "smog": Recipe(0.3, 256, 1e-6, "cosine", 100),
    "smog-swin": Recipe(0.1, 256, 0.0, "cosine", 150),
    "coke": Recipe(0.2, 1024, 1e-6, "cosine", 90),  # pretrained with one view
    "coke-multi": Recipe(0.4, 1024, 1e-6, "cosine", 90),  # pretrained with two views or multi-crop
    "simsiam-lars": Recipe(1.6, 4096, 0.0, "cosine", 90, "lars"),
    "lightly": Recipe(0.1, 256, 0.0, "cosine-step", 90, lr_follows_batch=True),
}


@dataclass(frozen=True)
class LinearConfig:
    """Which probe, and what differs from it.

    `lr` and `scale_lr` concern the augmented recipes, `epochs` and `batch_size` these and `lr-grid`, `lrs` only
    `lr-grid`, `c` and `iterations` only `fast`, `held_out` the last two.
    """

    version: ClassVar[int] = 2
    recipe: Literal[
        "fast",
        "lr-grid",
        "jigclu",
        "mejigclu",
        "moco",
        "swav",
        "smog",
        "smog-swin",
        "coke",
        "coke-multi",
        "simsiam-lars",
        "lightly",
    ] = "fast"
    epochs: PositiveInt | None = None  # default: the recipe's; 10 of lr-grid
    batch_size: ForwardBatch | None = None  # default: the recipe's; 256 of lr-grid
    lr: Positive | None = None  # default: the recipe's
    scale_lr: bool = False  # multiply lr by batch_size / the recipe's
    c: tuple[Positive, ...] = _C_VALUES  # inverse strengths of the L2 penalty to choose from, ascending
    lrs: tuple[Positive, ...] = _LR_VALUES  # learning rates to choose from, ascending
    held_out: ProperFraction = 0.1  # share of train on which C or the learning rate is picked
    iterations: PositiveInt = 1000  # of L-BFGS, at most, per C
    seed: Seed = 0


@dataclass(frozen=True)
class FewLabelsConfig:
    """Probes of a few labelled train images per class."""

    version: ClassVar[int] = 1
    labels_per_class: tuple[PositiveInt, ...] = (1, 10)
    draws: Repeats = 10  # random subsets for each number of labels
    c: Positive = 0.1  # fixed: so few labels cannot pick it, and more would no longer be few
    iterations: PositiveInt = 1000
    seed: Seed = 0


class LinearHead(NamedTuple):
    """Scores are `x @ weight.T + bias`."""

    weight: Tensor  # (classes, d)
    bias: Tensor  # (classes,)


class Trial(NamedTuple):
    """A value that was tried, and its scores on the held-out part of train. Trials compare by accuracy, then loss."""

    top1: float
    minus_loss: float  # decides where accuracies are equal, as often on few images
    value: float  # C or the learning rate

    @classmethod
    def of(cls, value: float, logits: Tensor, labels: Tensor) -> Trial:
        """Score (n, C) logits of held-out images; a loss that is not finite is the worst."""
        return cls(top1_of(logits, labels), -float(F.cross_entropy(logits, labels).nan_to_num(torch.inf)), value)


def linear(backbone: nn.Module, data: EvalData, config: LinearConfig) -> dict[str, Any]:
    """Train a linear layer on the train images, judge it on the test images.

    Returns:
        `top1`, `top1_interval`, `top5` (with more than five classes), `mean_per_class`, `per_class`; for
        `fast` the chosen `c`, for `lr-grid` the chosen `lr`, and `held_out_top1` of each value tried; for the others
        the last epoch's figures and `best_test_top1` at `best_test_epoch` (from 1), which was picked on the test set
        and is there for comparison with papers only.
    """
    if config.recipe == "fast":
        return _fast(backbone, data, config)
    return _lr_grid(backbone, data, config) if config.recipe == "lr-grid" else _augmented(backbone, data, config)


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
    scores: dict[str, Any] = {"permuted": {}}
    for count in config.labels_per_class:
        results, predicted, chance = [], {}, []
        for draw in progress(range(config.draws), f"{count} labels per class", config.draws):
            rows = balanced_rows(train.labels, count, config.seed, draw)
            few_x, few_labels = x[rows].to(data.device), train.labels[rows].to(data.device)
            head = fit_logistic(few_x, few_labels, len(data.classes), config.c, iterations=config.iterations)
            logits = F.linear(test_x, *head).cpu()
            predicted[f"predicted_{draw}"] = logits.argmax(dim=1)
            results.append(top1_of(logits, test.labels))
            chance.append(permuted_accuracy(logits.argmax(dim=1), test.labels, len(data.classes)))
        save_classes(data, "fewlabels", test.rows, test.labels, predicted, f"-{count}")
        scores[f"top1_{count}"] = float(np.mean(results))
        scores["permuted"][f"top1_{count}"] = float(np.mean(chance))
        scores[f"std_{count}"] = float(np.std(results, ddof=1)) if len(results) > 1 else 0.0
    return scores


def schedule(recipe: Recipe, epochs: int, steps_per_epoch: int) -> Schedule:
    """Learning rates of a published probe; in a shorter or longer one, the drops keep their share of the epochs."""
    drops = tuple(-(-percent * epochs // 100) for percent in (60, 80)) if recipe.schedule == "step" else ()
    unit = 1 if recipe.schedule == "cosine-step" else steps_per_epoch
    return Schedule(epochs * steps_per_epoch, "drops" if drops else "cosine", unit, drops)


def fit_logistic(
    x: Tensor, labels: Tensor, classes: int, c: float, *, start: LinearHead | None = None, iterations: int = 1000
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
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        # Divided by C n: the mean keeps the gradient's size, and so the tolerances, independent of n and C.
        decay = 1 / (c * len(x))
        loss, weight.grad, bias.grad = _mean_cross_entropy(x, labels, LinearHead(weight, bias))
        weight.grad.add_(weight, alpha=decay)
        return loss + weight.square().sum() * (decay / 2)

    optimizer.step(closure)  # type: ignore[arg-type]
    return LinearHead(weight, bias)


def _mean_cross_entropy(x: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of all rows and its gradient with respect to weight and bias.

    The gradient is written out and taken part by part, so that a CPU reads each part of `x` from memory once and no
    scores of all rows are ever held.
    """
    rows = max(1, (_BLOCK if x.device.type == "cpu" else _GPU_BLOCK) // max(x.shape[1], len(head.bias)))
    loss, to_weight, to_bias = torch.zeros_like(head.bias[:1]), *map(torch.zeros_like, head)
    for part, target in zip(x.split(rows), labels[:, None].split(rows), strict=True):
        log_p = F.linear(part, *head).log_softmax(dim=1)
        loss -= log_p.gather(1, target).sum()
        error = log_p.exp_().scatter_add_(1, target, torch.full_like(log_p[:, :1], -1))
        to_weight.addmm_(error.T, part)
        to_bias += error.sum(dim=0)
    return loss[0] / len(x), to_weight.div_(len(x)), to_bias.div_(len(x))


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, (d,) each; columns that hardly vary are not blown up."""
    scale = x.std(dim=0, correction=0)
    largest = float(scale.max())
    return x.mean(dim=0), scale.clamp(min=1e-5 * largest if largest > 0 else 1.0)


def _fast(backbone: nn.Module, data: EvalData, config: LinearConfig) -> dict[str, Any]:
    train, test = data.features(backbone, "train"), data.features(backbone, "test")
    assert train.labels is not None and test.labels is not None
    x, labels = train.x.to(data.device), train.labels.to(data.device)
    trials = _try_penalties(x, labels, len(data.classes), config)
    best = max(trials)
    shift, scale = standardisation(x)
    x = (x - shift) / scale
    start, c = trials[best], best.value
    head = fit_logistic(x, labels, len(data.classes), c, start=start, iterations=config.iterations)
    logits = F.linear((test.x.to(data.device) - shift) / scale, *head).cpu()
    save_classification(data, "linear-fast", test.rows, test.labels, logits)
    scores = classification_scores(logits, test.labels, data.classes)
    scores |= {"c": c, "held_out_top1": {f"{trial.value:g}": trial.top1 for trial in trials}}
    if len(config.c) > 1 and c == config.c[-1]:
        scores["notes"] = [f"the chosen C {c:g} is the largest tried: a larger one may score more"]
    return scores


def _try_penalties(x: Tensor, labels: Tensor, classes: int, config: LinearConfig) -> dict[Trial, LinearHead]:
    """Fit on most of train with one C after the other, judge on the rest."""
    fit_rows, held_rows = _held_out(labels.cpu(), config)
    shift, scale = standardisation(x[fit_rows])
    fit_x, held_x = (x[fit_rows] - shift) / scale, (x[held_rows] - shift) / scale
    heads: dict[Trial, LinearHead] = {}
    head = None
    for c in progress(config.c, "Linear probe", len(config.c)):
        head = fit_logistic(fit_x, labels[fit_rows], classes, c, start=head, iterations=config.iterations)
        heads[Trial.of(c, F.linear(held_x, *head), labels[held_rows])] = head
        *_, third, second, last = [None, None, *heads]
        if (
            third
            and second
            and third.minus_loss > second.minus_loss > last.minus_loss
            and max(heads) not in (second, last)
        ):
            break  # only worse from here, and the largest C take most of the time
    return heads


def _held_out(labels: Tensor, config: LinearConfig) -> tuple[Tensor, Tensor]:
    fit_rows, held_rows = stratified_split(labels, config.held_out, config.seed)
    if not len(held_rows):
        raise UserError("the linear probe picks its setting on held-out train images: give two or more per class")
    return fit_rows, held_rows


def _lr_grid(backbone: nn.Module, data: EvalData, config: LinearConfig) -> dict[str, Any]:
    train, test = data.features(backbone, "train"), data.features(backbone, "test")
    assert train.labels is not None and test.labels is not None
    standard = standardisation(train.x)  # of all train images, which takes no labels
    fit_rows, held_rows = _held_out(train.labels, config)
    classes, device = len(data.classes), data.device

    def logits_of(heads: list[LinearHead], x: Tensor) -> list[Tensor]:
        parts = [((part - standard[0]) / standard[1]).to(device) for part in x.split(_ROWS)]
        return [torch.cat([F.linear(part, *head).cpu() for part in parts]) for head in heads]

    heads = fit_by_sgd(train, fit_rows, classes, config.lrs, standard, config, device)
    held_logits = logits_of(heads, train.x[held_rows])
    trials = [Trial.of(*one, train.labels[held_rows]) for one in zip(config.lrs, held_logits, strict=True)]
    best = max(trials).value
    heads = fit_by_sgd(train, torch.arange(len(train.x)), classes, (best,), standard, config, device)
    (logits,) = logits_of(heads, test.x)
    save_classification(data, "linear-lr-grid", test.rows, test.labels, logits)
    scores = classification_scores(logits, test.labels, data.classes)
    scores |= {"lr": best, "held_out_top1": {f"{trial.value:g}": trial.top1 for trial in trials}}
    if len(config.lrs) > 1 and best in (config.lrs[0], config.lrs[-1]):
        scores["notes"] = [f"the chosen learning rate {best:g} is at the end of those tried: one beyond may score more"]
    return scores


def fit_by_sgd(
    features: Features,
    rows: Tensor,
    classes: int,
    lrs: tuple[float, ...],
    standard: tuple[Tensor, Tensor],
    config: LinearConfig,
    device: torch.device,
) -> list[LinearHead]:
    """One linear layer per learning rate, all trained on the same batches: SGD, momentum 0.9, cosine to 0 per step.

    The layers are the rows of one, and each row's gradient is multiplied by its own learning rate: two matrix products
    for all layers. One that diverges does not affect the others. The features travel to the device batch by batch.

    Args:
        features: of the train images, with labels.
        rows: (n,) which of them to learn from.
        classes: outputs of a layer.
        lrs: learning rates.
        standard: what is subtracted from the features and what they are divided by, (d,) each.
        config: `epochs`, `batch_size` and `seed`.
        device: where to compute.
    """
    labels = features.labels
    assert labels is not None
    epochs, positions = config.epochs or _GRID_EPOCHS, np.zeros(len(labels), dtype=np.int64)
    positions[rows] = np.arange(len(rows))
    order = SubsetOrder(rows, positions, config.batch_size or _GRID_BATCH, config.seed)
    first = initial_head(classes, features.x.shape[1], config.seed)
    layers = nn.Linear(features.x.shape[1], classes * len(lrs), device=device)
    with torch.no_grad():
        layers.weight.copy_(first.weight.repeat(len(lrs), 1))
        layers.bias.zero_()
    rates = torch.tensor(lrs, device=device).repeat_interleave(classes)
    layers.weight.register_hook(lambda gradient: gradient * rates[:, None])
    layers.bias.register_hook(lambda gradient: gradient * rates)

    def batches(first_step: int) -> Generator[LabelledBatch, None, None]:
        for step in itertools.count(first_step):
            chosen = torch.from_numpy(order.batch(*(place := divmod(step, order.steps_per_epoch))))
            x = ((features.x[chosen] - standard[0]) / standard[1]).to(device)
            weights = torch.full((len(x),), order.counts(*place) / len(order.step(*place)), device=device)
            yield LabelledBatch(x, labels[chosen].to(device), weights)

    def loss(batch: LabelledBatch) -> Tensor:
        logits = layers(batch.pixels).unflatten(1, (len(lrs), classes))
        return sum((batch.cross_entropy(part) for part in logits.unbind(1)), torch.zeros((), device=device))

    steps = Schedule(epochs * order.steps_per_epoch, "cosine")
    optimizer, title = torch.optim.SGD(layers.parameters(), lr=1.0, momentum=0.9), f"linear probe ({len(lrs)} rates)"
    fit(layers, loss, batches, steps, optimizer, title=title, seed=config.seed)
    weights, biases = layers.weight.detach().unflatten(0, (len(lrs), classes)), layers.bias.detach().view(len(lrs), -1)
    return [LinearHead(*head) for head in zip(weights, biases, strict=True)]


def _augmented(backbone: nn.Module, data: EvalData, config: LinearConfig) -> dict[str, Any]:
    recipe = RECIPES[config.recipe]
    epochs, batch_size = config.epochs or recipe.epochs, config.batch_size or recipe.batch_size
    base = recipe.lr if config.lr is None else config.lr
    if config.scale_lr or (recipe.lr_follows_batch and config.lr is None):
        base *= batch_size / recipe.batch_size
    test = data.features(backbone, "test")
    assert test.labels is not None
    labels, test_x = test.labels, test.x.to(data.device)
    order = SubsetOrder(np.arange(len(data.train)), data.train.ids, batch_size, config.seed)
    images = TrainImages(data, order, config.seed)
    head = initial_head(len(data.classes), test_x.shape[1], config.seed).to(data.device)
    before = tensor_digests(backbone)
    snapshots = Snapshots(data.cache, backbone, data, config, data.labels_sha256(), asdict(data.transform))

    def loss(batch: LabelledBatch) -> Tensor:
        with torch.no_grad():  # not inference_mode: the head's backward pass keeps these features
            features = backbone(batch.pixels).float()
        return batch.cross_entropy(head(features))

    @torch.no_grad()
    def judge(step: int) -> float:
        if step == order.steps_per_epoch:
            assert_unchanged(backbone, before)  # a wrong probe should not cost its other 99 epochs first
        return top1_of(head(test_x).cpu(), labels)

    with frozen(backbone):
        between_epochs = range(order.steps_per_epoch, epochs * order.steps_per_epoch, order.steps_per_epoch)
        fitted = fit(
            head,
            loss,
            images.batches,
            schedule(recipe, epochs, order.steps_per_epoch),
            probe_optimizer(recipe, head, base),
            snapshots,
            title=f"linear probe ({config.recipe})",
            seed=config.seed,
            judge=judge,
            judge_at=between_epochs,
            skipped=images.skipped,
        )
    with torch.no_grad():
        logits = head(test_x).cpu()
    top1 = [*fitted.scores.values(), top1_of(logits, labels)]  # after each epoch
    save_classification(data, f"linear-{config.recipe}", test.rows, labels, logits)
    snapshots.drop()
    scores = classification_scores(logits, labels, data.classes)
    scores |= {"epochs": epochs, "lr": base, "batch_size": batch_size}
    scores |= {"best_test_top1": max(top1), "best_test_epoch": 1 + top1.index(max(top1))}
    notes = images.notes
    if not logits.isfinite().all():
        notes.append(f"the linear layer diverged at learning rate {base:g}: give a lower lr")
    photos = data.transform.size > 96 and data.transform.std == IMAGENET_STD
    if photos and config.recipe in ("swav", "smog", "smog-swin"):
        notes.append(
            "SwAV's and SMoG's own probes divide red by 0.228, this one by 0.229, as the images' transform says"
        )
    return scores | ({"notes": notes} if notes else {})


def probe_optimizer(recipe: Recipe, head: nn.Linear, lr: float) -> torch.optim.SGD:
    """The published optimiser. LARS scales both tensors, as in SimSiam's own probe."""
    if recipe.optimizer == "lars":
        return LARC(head.parameters(), lr=lr, momentum=0.9, weight_decay=recipe.weight_decay, trust=0.001)
    return torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=recipe.weight_decay)


LINEAR = Protocol(
    "Linear probe",
    LinearConfig,
    linear,
    {
        "linear-fast": LinearConfig(recipe="fast"),
        "linear-lr-grid": LinearConfig(recipe="lr-grid"),
        **{f"linear-{name}": LinearConfig(recipe=name) for name in RECIPES},  # type: ignore[arg-type]
    },
    {"top1": "top-1"},
    default="linear-fast",
    quick={"classes": ("linear-fast",)},
    name_of=lambda config: f"linear-{config.recipe}",
)
FEW_LABELS = Protocol(
    "Labels per class",
    FewLabelsConfig,
    few_labels,
    {"fewlabels": FewLabelsConfig()},
    {"top1_N": "N"},
    quick={"classes": ("fewlabels",)},
)
