"""Fine-tuning: a copy of the backbone and a linear layer learn from some or all labels of the train images.

    random resized crops and flips -> copy of the backbone in train mode (batch norm over all ranks) -> linear layer
    -> cross-entropy -> SGD with a learning rate for the trunk and one for the linear layer, lowered in steps

    swav            few labels, 20 epochs: the official semi-supervised script
    jigclu-readme   few labels, 100 epochs, two learning rates: what JigClu's README says
    jigclu-code     few labels, 100 epochs: what its script does, which gives the trunk's learning rate to both
    vissl-100       all labels, 105 epochs: VISSL's
    transfer        another data set, all labels: VISSL's; rate and weight decay picked on held-out train images
    small           ours, for few and small images: the linear layer's rate is picked on held-out train images, and
                    there are enough epochs for 200 steps

The last epoch is the result; the best one on the test set stands beside it under a name that says so. With few labels
the spread is large, so that the result is the mean over three seeds. The linear layer starts from N(0, 0.01²), also
where the official script leaves torch's own start. A killed evaluation goes on where it was, given a cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella import dist
from tessella.errors import UserError
from tessella.modules.norm import synchronise_batch_norm
from tessella.ops.metrics import topk_correct
from tessella.protocols.features import EvalData, Features, apply_to_images, frozen, progress, tensor_digests
from tessella.protocols.protocol import Protocol
from tessella.protocols.scoring import classification_scores, save_classification
from tessella.protocols.subsets import listed_rows, share_rows, stratified_split
from tessella.protocols.training import Snapshots, SubsetOrder, TrainImages, initial_head, sum_gradients
from tessella.ranges import (
    ForwardBatch,
    NonNegative,
    Positive,
    PositiveFraction,
    PositiveInt,
    ProperFraction,
    Repeats,
    Seed,
)

_FEW = 0.05  # share of labels up to which the published 1 % settings count; above it those of 10 %
_REPEATS_OF_FEW = 3
FOR_ALL_LABELS = ("vissl-100", "transfer")  # recipes for all labels


class Rates(NamedTuple):
    """Learning rates of the first epoch."""

    trunk: float
    head: float


class Recipe(NamedTuple):
    """Settings of a published fine-tuning: SGD with momentum 0.9 on batches of 256."""

    few: Rates  # 1 % of the labels
    more: Rates  # 10 %
    epochs: int
    milestones: tuple[int, ...]  # epochs at which the rates drop
    drop: float  # factor of each drop
    weight_decay: float = 0.0
    nesterov: bool = False
    partial: bool = True  # keep the last batch of an epoch though it is not full
    lr_follows_batch: bool = False  # lr x batch_size / 256 is part of the recipe


_VISSL = Recipe(Rates(0.1, 0.1), Rates(0.1, 0.1), 105, (30, 60, 90, 100), 0.1, nesterov=True, lr_follows_batch=True)
RECIPES = {
    "swav": Recipe(Rates(0.02, 5.0), Rates(0.01, 0.2), 20, (12, 16), 0.2),
    "jigclu-readme": Recipe(Rates(0.02, 5.0), Rates(0.01, 0.2), 100, (30, 60, 90), 0.1, partial=False),
    "jigclu-code": Recipe(Rates(0.02, 0.02), Rates(0.01, 0.01), 100, (30, 60, 90), 0.1, partial=False),
    "vissl-100": _VISSL,
    "transfer": _VISSL,
    "small": Recipe(Rates(0.02, 0.5), Rates(0.01, 0.2), 20, (12, 16), 0.2),
}
_PICKS = ("transfer", "small")  # recipes that try several settings on held-out train images
_SMALL_HEADS = (5.0, 0.5, 0.05)  # learning rates of the linear layer that `small` tries: SwAV's, and lower ones
_SMALL_STEPS = 200  # of `small`, at least: a subset of 12 images makes one step per epoch


@dataclass(frozen=True)
class FinetuneConfig:
    """Which fine-tuning, on which labels, and what differs from the recipe."""

    version: ClassVar[int] = 1
    recipe: Literal["swav", "jigclu-readme", "jigclu-code", "vissl-100", "transfer", "small"] = "swav"
    # Share of the train images whose labels are used, as many of each class; default: all for vissl-100 and transfer,
    # else 1 %.
    labels: PositiveFraction | None = None
    label_list: str | None = None  # file with one image name per line, instead of a share
    # Default: the recipe's, and for `small` as many as 200 steps take; the drops move along.
    epochs: PositiveInt | None = None
    batch_size: ForwardBatch = 256
    lr: Positive | None = None  # of the trunk; default: the recipe's for so many labels
    head_lr: Positive | None = None  # of the linear layer
    lrs: tuple[Positive, ...] = (0.1, 0.03, 0.01, 0.003)  # to choose from, of `transfer`, unless `lr` is given
    weight_decays: tuple[NonNegative, ...] = (0.0, 5e-4)  # to choose from, of `transfer`
    held_out: ProperFraction = 0.1  # share of train on which `transfer` picks
    repeats: Repeats | None = None  # seeds, from `seed` on; default 3 for up to 5 % of the labels, else 1
    seed: Seed = 0


class _Setting(NamedTuple):
    """One training."""

    rates: Rates
    weight_decay: float


class _Result(NamedTuple):
    logits: Tensor  # (n, C) after the last epoch
    losses: list[float]  # mean of each epoch
    top1: list[float]  # of the judged images after each epoch
    notes: list[str]


class Classifier(nn.Module):
    """A backbone and a linear layer on its pooled features."""

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, classes)."""
        return self.head(self.trunk(x).float())


def finetune(backbone: nn.Module, data: EvalData, config: FinetuneConfig) -> dict[str, Any]:
    """Train a copy of the backbone with labels, judge it on the test images; the backbone itself stays as it is.

    Returns:
        `top1`, `top5` (with more than five classes), `mean_per_class`, each the mean over the seeds; `per_class` of the
        first seed; with several seeds `std` (sample formula) and `top1_of_seeds`, with one `top1_interval`. Also
        `train_images`, `subset` (a hash of their ids), `lr`, `head_lr`, `weight_decay`, `epochs`, `loss_first` and
        `loss_last` (means over an epoch); `best_test_top1`, which was picked on the test set and is there for
        comparison with papers only; for `transfer`, `held_out_top1` of each setting tried.

    Raises:
        UserError: a setting is out of range, or the list does not fit the images.
    """
    check(data, config)
    repeats = config.repeats or (_REPEATS_OF_FEW if _used_share(data, config) <= _FEW else 1)
    subsets = [_labelled_rows(data, config, config.seed + i) for i in range(repeats)]
    asked = [asdict(config), config.version, tensor_digests(backbone), repr(backbone), asdict(data.transform)]
    asked += [data.train.fingerprint, data.test.fingerprint, data.classes, dist.world_size(), data.device.type]
    asked += [_hash(part) for part in (data.labels("train"), data.labels("test"), *subsets)]
    snapshots = Snapshots(data.cache, asked)
    scores: dict[str, Any] = {}
    setting = _setting(config, len(subsets[0]) / len(data.train))
    with frozen(backbone):  # every tensor is compared afterwards; the copies learn
        if config.recipe in _PICKS:
            setting, scores = _pick_setting(backbone, data, config, subsets[0], snapshots)
        test_rows = np.arange(len(data.test))
        runs, figures = [], []
        for i, rows in enumerate(subsets):
            run, judged = _train(backbone, data, config, setting, rows, ("test", test_rows), config.seed + i, snapshots)
            labels = data.labels("test")[torch.from_numpy(judged.rows)]
            more = f"-seed{config.seed + i}" if repeats > 1 else ""
            save_classification(data, finetune_name(config), judged.rows, labels, run.logits, more)
            runs.append(run)
            figures.append(classification_scores(run.logits, labels, data.classes))
    snapshots.drop()
    return _summary(data, config, setting, subsets, runs, figures) | scores


def finetune_name(config: FinetuneConfig) -> str:
    """Name for the record: the recipe and how many labels."""
    name = "transfer" if config.recipe == "transfer" else f"finetune-{config.recipe}"
    if config.label_list is not None:
        return f"{name}-list"
    return name if config.recipe in FOR_ALL_LABELS and _share(config) == 1 else f"{name}-{100 * _share(config):g}"


def rate_factor(recipe: str, epoch: int, epochs: int | None = None) -> float:
    """What the learning rates of an epoch are multiplied by; they do not change within an epoch.

    Args:
        recipe: a key of `RECIPES`.
        epoch: from 0.
        epochs: of the whole fine-tuning; default: the recipe's. With others, the drops keep their share of the way.
    """
    settings = RECIPES[recipe]
    epochs = settings.epochs if epochs is None else epochs
    return settings.drop ** sum(epoch * settings.epochs >= place * epochs for place in settings.milestones)


def _share(config: FinetuneConfig) -> float:
    if config.labels is not None:
        return config.labels
    return 1.0 if config.recipe in FOR_ALL_LABELS else 0.01


def _hash(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.numpy().astype("<i8").tobytes()).hexdigest()


def check(data: EvalData, config: FinetuneConfig) -> None:
    """Refuse what cannot work."""
    if not 0 < _share(config) <= 1:
        raise UserError(f"labels={config.labels} is not a share of the train images: give more than 0 and at most 1")
    if config.recipe == "transfer" and config.label_list is None and _share(config) < 1:
        raise UserError(
            f"transfer learns from all labels, and labels={config.labels}: give labels=1, or use the recipe swav"
        )
    if config.label_list is not None:
        with dist.shared_errors():  # a machine may lack the list
            listed_rows(data.train, Path(config.label_list))


def _used_share(data: EvalData, config: FinetuneConfig) -> float:
    return _share(config) if config.label_list is None else len(_labelled_rows(data, config, 0)) / len(data.train)


def _labelled_rows(data: EvalData, config: FinetuneConfig, seed: int) -> Tensor:
    if config.label_list is not None:
        return listed_rows(data.train, Path(config.label_list))
    share = _share(config)
    return torch.arange(len(data.train)) if share == 1 else share_rows(data.labels("train"), share, seed)


def _setting(config: FinetuneConfig, share: float) -> _Setting:
    """The recipe's setting for a share of the labels, with the config's changes."""
    recipe = RECIPES[config.recipe]
    rates = recipe.few if share <= _FEW else recipe.more
    scale = config.batch_size / 256 if recipe.lr_follows_batch else 1.0
    trunk = rates.trunk * scale if config.lr is None else config.lr
    head = rates.head * scale if config.head_lr is None else config.head_lr
    if config.head_lr is None and config.lr is not None and rates.head == rates.trunk:
        head = trunk
    return _Setting(Rates(trunk, head), recipe.weight_decay)


def _pick_setting(
    backbone: nn.Module, data: EvalData, config: FinetuneConfig, rows: Tensor, snapshots: Snapshots
) -> tuple[_Setting, dict[str, Any]]:
    """The setting that scores most on a held-out part of the train images."""
    settings = _settings_to_try(config, len(rows) / len(data.train))
    if len(settings) == 1:
        return settings[0], {}
    fit, held = stratified_split(data.labels("train")[rows], config.held_out, config.seed)
    if not len(held) and config.recipe == "small":
        return settings[-1], {}  # one image of each class: nothing can be held out, and the lowest rate is safe
    if not len(held):
        raise UserError("transfer picks its learning rate on held-out train images: give two or more per class")
    trials = []
    for setting in settings:
        part = "train", rows[held].numpy()
        run, judged = _train(backbone, data, config, setting, rows[fit], part, config.seed, snapshots, each_epoch=False)
        labels = data.labels("train")[torch.from_numpy(judged.rows)]
        loss = float(F.cross_entropy(run.logits, labels).nan_to_num(torch.inf))
        trials.append((run.top1[-1], -loss))
    best = max(range(len(settings)), key=lambda i: trials[i])
    names = [
        f"lr {setting.rates.trunk:g}, "
        + (f"head lr {setting.rates.head:g}" if config.recipe == "small" else f"weight decay {setting.weight_decay:g}")
        for setting in settings
    ]
    return settings[best], {"held_out_top1": {name: top1 for name, (top1, _) in zip(names, trials, strict=True)}}


def _settings_to_try(config: FinetuneConfig, share: float) -> list[_Setting]:
    """Those of a recipe that picks, without what the config decides; the first is the recipe's boldest."""
    if config.recipe == "small":
        usual = _setting(config, share)
        heads = _SMALL_HEADS if config.head_lr is None else (config.head_lr,)
        return [usual._replace(rates=Rates(usual.rates.trunk, head)) for head in heads]
    scale = config.batch_size / 256
    lrs = [lr * scale for lr in config.lrs] if config.lr is None else [config.lr]
    return [
        _Setting(Rates(lr, lr if config.head_lr is None else config.head_lr), decay)
        for lr in lrs
        for decay in config.weight_decays
    ]


def _epochs(config: FinetuneConfig, steps_per_epoch: int) -> int:
    if config.epochs is not None or config.recipe != "small":
        return config.epochs or RECIPES[config.recipe].epochs
    return max(RECIPES[config.recipe].epochs, -(-_SMALL_STEPS // steps_per_epoch))


def _train(
    backbone: nn.Module,
    data: EvalData,
    config: FinetuneConfig,
    setting: _Setting,
    rows: Tensor,
    judged: tuple[str, np.ndarray],
    seed: int,
    snapshots: Snapshots,
    *,
    each_epoch: bool = True,
) -> tuple[_Result, Features]:
    """One training; what is judged is the readable images among the rows `judged` of a split."""
    recipe = RECIPES[config.recipe]
    # Equal parts, because a batch norm over all ranks counts on them.
    order = SubsetOrder(rows, data.train.ids, config.batch_size, seed, partial=recipe.partial, equal=True)
    epochs = _epochs(config, order.steps_per_epoch)
    images = TrainImages(data, order, seed)
    model = _classifier(backbone, len(data.classes), seed, data.device)
    solver = torch.optim.SGD(
        [{"params": model.trunk.parameters()}, {"params": model.head.parameters()}],
        lr=0.0,
        momentum=0.9,
        weight_decay=setting.weight_decay,
        nesterov=recipe.nesterov,
    )
    name = f"{judged[0]}-{setting.rates.trunk:g}-{setting.rates.head:g}-{setting.weight_decay:g}-{seed}"
    state = snapshots.load(name, model, solver, data.device) or {"done": 0, "losses": [], "top1": []}
    losses, top1 = list(state["losses"]), list(state["top1"])
    found = None
    done = int(state["done"])
    title = f"fine-tuning ({config.recipe}, {len(rows)} images)"
    with _own_random_numbers(data.device):
        for epoch in progress(range(done, epochs), title, epochs - done):
            torch.manual_seed(seed * 1_000_003 + epoch * 1009 + dist.rank())  # for networks that drop out
            factor = rate_factor(config.recipe, epoch, epochs)
            for group, rate in zip(solver.param_groups, setting.rates, strict=True):
                group["lr"] = rate * factor
            losses.append(_one_epoch(model, solver, images, epoch, order.steps_per_epoch))
            if each_epoch or epoch + 1 == epochs:
                found = _logits(model, data, *judged)
                top1.append(_top1(found, data, judged[0]))
            state = {"done": epoch + 1, "losses": losses, "top1": top1}
            snapshots.save(name, model, solver, state, last=epoch + 1 == epochs)
    if found is None:  # all of it was done before
        found = _logits(model, data, *judged)
    notes = list(images.notes)
    if not found.x.isfinite().all():
        notes.append(f"the fine-tuning diverged at learning rate {setting.rates.trunk:g}: give a lower lr")
    guessing = math.log(len(data.classes))
    if not losses[-1] <= guessing:  # also when it is NaN
        notes.append(
            f"failed: the training ended at a loss of {losses[-1]:.2f}, and guessing has {guessing:.2f}; the figure "
            "says nothing about the backbone. Give a lower lr and head_lr"
        )
    return _Result(found.x, losses, top1, notes), found


def _classifier(backbone: nn.Module, classes: int, seed: int, device: torch.device) -> Classifier:
    trunk = copy.deepcopy(backbone).to(device)
    if dist.world_size() > 1:
        trunk = synchronise_batch_norm(trunk, device)
    head = initial_head(classes, int(backbone.feature_dim), seed)  # type: ignore[arg-type]
    return Classifier(trunk, head).to(device).requires_grad_(True)


def _one_epoch(model: Classifier, solver: torch.optim.SGD, images: TrainImages, epoch: int, steps: int) -> float:
    """Train for an epoch; its mean loss."""
    model.train()
    total = torch.zeros((), device=model.head.weight.device)
    for batch in images.epoch(epoch):
        solver.zero_grad()
        loss = (F.cross_entropy(model(batch.pixels), batch.labels, reduction="none") * batch.weights).sum()
        loss.backward()
        sum_gradients(model.parameters())
        solver.step()
        total += loss.detach()
    return float(dist.all_reduce_sum(total)) / steps


def _logits(model: Classifier, data: EvalData, split: str, rows: np.ndarray) -> Features:
    return apply_to_images(
        model,
        model.head.out_features,
        data.images(split),
        data.transform,
        rows=rows,
        batch_size=data.batch_size,
        device=data.device,
        workers=data.workers,
        title="",
    )


def _top1(found: Features, data: EvalData, split: str) -> float:
    labels = data.labels(split)[torch.from_numpy(found.rows)]
    return float(topk_correct(found.x, labels, 1).double().mean())


def _own_random_numbers(device: torch.device) -> Any:
    """Torch's generators are put back afterwards: the next protocol must not depend on this one."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _mean_loss(losses: Iterable[float]) -> float | None:
    """None after a divergence: JSON knows no NaN."""
    mean = float(np.mean(list(losses)))
    return mean if np.isfinite(mean) else None


def _summary(
    data: EvalData,
    config: FinetuneConfig,
    setting: _Setting,
    subsets: list[Tensor],
    runs: list[_Result],
    figures: list[dict[str, Any]],
) -> dict[str, Any]:
    names = [name for name in ("top1", "top5", "mean_per_class") if name in figures[0]]
    scores: dict[str, Any] = {name: float(np.mean([figure[name] for figure in figures])) for name in names}
    if len(runs) > 1:
        scores["std"] = {name: float(np.std([figure[name] for figure in figures], ddof=1)) for name in names}
        scores["top1_of_seeds"] = [figure["top1"] for figure in figures]
    else:
        scores["top1_interval"] = figures[0]["top1_interval"]
    scores["permuted"] = {name: float(np.mean([figure["permuted"][name] for figure in figures])) for name in names}
    ids = np.concatenate([np.asarray(data.train.ids)[subset.numpy()] for subset in subsets])
    notes = sorted({note for run in runs for note in run.notes})
    return scores | {
        **{name: figures[0][name] for name in ("per_class", "mistakes")},
        "best_test_top1": float(np.mean([max(run.top1) for run in runs])),
        "train_images": len(subsets[0]),
        "subset": _hash(torch.from_numpy(ids)),
        "lr": setting.rates.trunk,
        "head_lr": setting.rates.head,
        "weight_decay": setting.weight_decay,
        "epochs": len(runs[0].losses),
        "failed": any(note.startswith("failed") for note in notes),
        "loss_first": _mean_loss(run.losses[0] for run in runs),
        "loss_last": _mean_loss(run.losses[-1] for run in runs),
        "notes": notes,
    }


FINETUNE = Protocol(
    "Fine-tuned",
    FinetuneConfig,
    finetune,
    {
        **{
            f"finetune-{name}-{percent}": FinetuneConfig(recipe=name, labels=percent / 100)  # type: ignore[arg-type]
            for name in RECIPES
            if name not in (*FOR_ALL_LABELS, "small")
            for percent in (1, 10)
        },
        "finetune-vissl-100": FinetuneConfig(recipe="vissl-100"),
        "transfer": FinetuneConfig(recipe="transfer"),
        # For small images and two cores: more and smaller steps, fewer values to try.
        "finetune-small-1": FinetuneConfig("small", labels=0.01, batch_size=32),
        "finetune-small-10": FinetuneConfig("small", labels=0.1, batch_size=32),
        "finetune-small-100": FinetuneConfig("small", labels=1.0, batch_size=64, epochs=5),
        "transfer-small": FinetuneConfig(
            recipe="transfer", batch_size=64, epochs=5, lrs=(0.1, 0.03), weight_decays=(5e-4,)
        ),
    },
    {"top1": "top-1"},
    check=check,
    repeats="repeats",
    default="finetune-swav-1",
    quick={"classes": ("finetune-small-1", "finetune-small-10")},
    name_of=finetune_name,
)
