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

The last epoch is the result; the best one on the test set is given too, under a name that says so. With few labels
the spread is large, so that the result is the mean over three seeds. The linear layer starts from N(0, 0.01²), also
where the official script leaves torch's own start.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tessella import dist
from tessella.errors import UserError
from tessella.modules.norm import synchronise_batch_norm
from tessella.protocols.features import EvalData, Features, frozen
from tessella.protocols.protocol import Protocol
from tessella.protocols.scoring import classification_scores, save_classification, top1_of
from tessella.protocols.subsets import listed_rows, share_rows, stratified_split
from tessella.protocols.train_images import SubsetOrder, TrainImages, initial_head
from tessella.protocols.training import Schedule, Snapshots, fit
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
_SMALL_HEADS = (5.0, 0.5, 0.05)  # learning rates of the linear layer that `small` tries: SwAV's, and lower ones
_SMALL_STEPS = 200  # of `small`, at least: a subset of 12 images makes one step per epoch


@dataclass(frozen=True)
class FinetuneConfig:
    """Which fine-tuning, on which labels, and what differs from the recipe."""

    version: ClassVar[int] = 2
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
    """What `transfer` and `small` choose."""

    rates: Rates
    weight_decay: float


class _Judged(NamedTuple):
    """A training, and what its model says of some images."""

    logits: Tensor  # (n, C) after the last epoch
    labels: Tensor  # (n,)
    rows: NDArray[np.int64]  # (n,) of the split; unreadable images are left out
    losses: list[float]  # mean of each epoch
    top1: list[float]  # after each epoch, or after the last only
    notes: list[str]


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
    used = _share(config) if config.label_list is None else len(_labelled_rows(data, config, 0)) / len(data.train)
    seeds = range(config.seed, config.seed + (config.repeats or (_REPEATS_OF_FEW if used <= _FEW else 1)))
    subsets = [_labelled_rows(data, config, seed) for seed in seeds]
    hashes = [data.labels_sha256(), *map(_hash, subsets)]
    snapshots = Snapshots(data.cache, backbone, data, config, asdict(data.transform), hashes)
    trainer = _Trainer(backbone, data, config, snapshots)
    with frozen(backbone):  # every tensor is compared afterwards; the copies learn
        setting, tried = trainer.pick(subsets[0])
        runs = [trainer.train(setting, rows, "test", seed=seed) for rows, seed in zip(subsets, seeds, strict=True)]
    for run, seed in zip(runs, seeds, strict=True):
        more = f"-seed{seed}" if len(runs) > 1 else ""
        save_classification(data, finetune_name(config), run.rows, run.labels, run.logits, more)
    snapshots.drop()
    scores = averaged([classification_scores(run.logits, run.labels, data.classes) for run in runs])
    notes = sorted({note for run in runs for note in run.notes})
    scores |= {
        "best_test_top1": float(np.mean([max(run.top1) for run in runs])),
        "train_images": len(subsets[0]),
        "subset": _hash(torch.from_numpy(data.train.ids[torch.cat(subsets).numpy()])),
        "lr": setting.rates.trunk,
        "head_lr": setting.rates.head,
        "weight_decay": setting.weight_decay,
        "epochs": len(runs[0].losses),
        "failed": any(note.startswith("failed") for note in notes),
        "loss_first": _finite_mean([run.losses[0] for run in runs]),
        "loss_last": _finite_mean([run.losses[-1] for run in runs]),
        "notes": notes,
    }
    return scores | tried


def averaged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores of several trainings as one: means with their spread, details of the first."""
    names = [name for name in ("top1", "top5", "mean_per_class") if name in runs[0]]
    scores: dict[str, Any] = {name: float(np.mean([run[name] for run in runs])) for name in names}
    if len(runs) > 1:
        scores["std"] = {name: float(np.std([run[name] for run in runs], ddof=1)) for name in names}
        scores["top1_of_seeds"] = [run["top1"] for run in runs]
    else:
        scores["top1_interval"] = runs[0]["top1_interval"]
    scores["permuted"] = {name: float(np.mean([run["permuted"][name] for run in runs])) for name in names}
    return scores | {name: runs[0][name] for name in ("per_class", "mistakes")}


def finetune_name(config: FinetuneConfig) -> str:
    """Name for the record: the recipe and how many labels."""
    name = "transfer" if config.recipe == "transfer" else f"finetune-{config.recipe}"
    if config.label_list is not None:
        return f"{name}-list"
    return name if config.recipe in FOR_ALL_LABELS and _share(config) == 1 else f"{name}-{100 * _share(config):g}"


def schedule(recipe: Recipe, epochs: int, steps_per_epoch: int) -> Schedule:
    """Learning rates: constant within an epoch; with more or fewer epochs, the drops keep their share of the way."""
    drops = tuple(-(-place * epochs // recipe.epochs) for place in recipe.milestones)
    return Schedule(epochs * steps_per_epoch, unit=steps_per_epoch, drops=drops, drop=recipe.drop)


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


def _share(config: FinetuneConfig) -> float:
    if config.labels is not None:
        return config.labels
    return 1.0 if config.recipe in FOR_ALL_LABELS else 0.01


def _labelled_rows(data: EvalData, config: FinetuneConfig, seed: int) -> Tensor:
    if config.label_list is not None:
        return listed_rows(data.train, Path(config.label_list))
    share = _share(config)
    return torch.arange(len(data.train)) if share == 1 else share_rows(data.labels("train"), share, seed)


def _hash(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.numpy().astype("<i8").tobytes()).hexdigest()


def _finite_mean(losses: list[float]) -> float | None:
    """None after a divergence: JSON has no NaN."""
    mean = float(np.mean(losses))
    return mean if math.isfinite(mean) else None


def _settings(config: FinetuneConfig, share: float) -> list[_Setting]:
    """The recipe's setting for a share of the labels, with the config's changes; or several to choose from."""
    recipe = RECIPES[config.recipe]
    scale = config.batch_size / 256 if recipe.lr_follows_batch else 1.0
    if config.recipe == "transfer":
        lrs = [lr * scale for lr in config.lrs] if config.lr is None else [config.lr]
        return [
            _Setting(Rates(lr, lr if config.head_lr is None else config.head_lr), decay)
            for lr in lrs
            for decay in config.weight_decays
        ]
    rates = recipe.few if share <= _FEW else recipe.more
    trunk = rates.trunk * scale if config.lr is None else config.lr
    if config.head_lr is not None:
        heads: tuple[float, ...] = (config.head_lr,)
    elif config.recipe == "small":
        heads = _SMALL_HEADS
    else:
        heads = (trunk if rates.head == rates.trunk else rates.head * scale,)
    return [_Setting(Rates(trunk, head), recipe.weight_decay) for head in heads]


class _Trainer:
    """Trains copies of one backbone on parts of one set of images."""

    def __init__(self, backbone: nn.Module, data: EvalData, config: FinetuneConfig, snapshots: Snapshots) -> None:
        self.backbone, self.data, self.config, self.snapshots = backbone, data, config, snapshots

    def pick(self, rows: Tensor) -> tuple[_Setting, dict[str, Any]]:
        """The setting that scores most on a held-out part of the train images, and the score of each."""
        config, labels = self.config, self.data.labels("train")
        settings = _settings(config, len(rows) / len(self.data.train))
        if len(settings) == 1:
            return settings[0], {}
        fit_rows, held = stratified_split(labels[rows], config.held_out, config.seed)
        if not len(held) and config.recipe == "small":
            return settings[-1], {}  # one image of each class: nothing can be held out, and the lowest rate is safe
        if not len(held):
            raise UserError("transfer picks its learning rate on held-out train images: give two or more per class")
        trials = {}
        for setting in settings:
            run = self.train(setting, rows[fit_rows], "train", rows[held].numpy(), seed=config.seed)
            loss = float(F.cross_entropy(run.logits, run.labels).nan_to_num(torch.inf))
            trials[setting] = run.top1[-1], -loss
        return max(settings, key=lambda setting: trials[setting]), {
            "held_out_top1": {self._name(setting): top1 for setting, (top1, _) in trials.items()}
        }

    def _name(self, setting: _Setting) -> str:
        rates, decay = setting
        other = f"head lr {rates.head:g}" if self.config.recipe == "small" else f"weight decay {decay:g}"
        return f"lr {rates.trunk:g}, {other}"

    def train(
        self, setting: _Setting, rows: Tensor, split: str, judged: NDArray[np.int64] | None = None, *, seed: int
    ) -> _Judged:
        """Train on rows of the train images; judge after every epoch on all test images, or at the end on `judged`."""
        data, config, recipe = self.data, self.config, RECIPES[self.config.recipe]
        # Equal parts, because a batch norm over all ranks counts on them.
        order = SubsetOrder(rows, data.train.ids, config.batch_size, seed, partial=recipe.partial, equal=True)
        images, per_epoch = TrainImages(data, order, seed), order.steps_per_epoch
        least = -(-_SMALL_STEPS // per_epoch) if config.recipe == "small" else 0
        epochs = config.epochs or max(recipe.epochs, least)
        model = self._classifier(seed)
        groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(model, setting.rates, strict=True)]
        decay = setting.weight_decay
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=decay, nesterov=recipe.nesterov)

        def logits() -> Features:
            return data.apply(model, len(data.classes), split, judged)

        def top1(judgement: Features) -> float:
            return top1_of(judgement.x, data.labels(split)[torch.from_numpy(judgement.rows)])

        fitted = fit(
            model,
            lambda batch: batch.cross_entropy(model(batch.pixels)),
            images.batches,
            schedule(recipe, epochs, per_epoch),
            optimizer,
            self.snapshots,
            title=f"fine-tuning ({config.recipe}, {len(rows)} images)",
            seed=seed,
            name=f"{split}-{setting.rates.trunk:g}-{setting.rates.head:g}-{setting.weight_decay:g}-{seed}",
            judge=lambda step: top1(logits()),
            judge_at=range(per_epoch, epochs * per_epoch, per_epoch) if judged is None else (),
            skipped=images.skipped,
        )
        last, losses = logits(), np.reshape(fitted.losses, (epochs, per_epoch)).mean(axis=1).tolist()
        notes = images.notes + self._doubts(last.x, losses[-1], setting)
        labels = data.labels(split)[torch.from_numpy(last.rows)]
        return _Judged(last.x, labels, last.rows, losses, [*fitted.scores.values(), top1(last)], notes)

    def _classifier(self, seed: int) -> nn.Sequential:
        """A copy of the backbone and a linear layer: (b, 3, h, w) -> (b, classes)."""
        trunk, device = copy.deepcopy(self.backbone).to(self.data.device), self.data.device
        if dist.world_size() > 1:
            trunk = synchronise_batch_norm(trunk, device)
        head = initial_head(len(self.data.classes), int(self.backbone.feature_dim), seed)  # type: ignore[arg-type]
        return nn.Sequential(trunk, head).to(device).requires_grad_(True)

    def _doubts(self, logits: Tensor, loss: float, setting: _Setting) -> list[str]:
        notes, guessing = [], math.log(len(self.data.classes))
        if not logits.isfinite().all():
            notes.append(f"the fine-tuning diverged at learning rate {setting.rates.trunk:g}: give a lower lr")
        if not loss <= guessing:  # also when it is NaN
            notes.append(
                f"failed: the training ended at a loss of {loss:.2f}, and guessing has {guessing:.2f}; the figure "
                "says nothing about the backbone. Give a lower lr and head_lr"
            )
        return notes


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
