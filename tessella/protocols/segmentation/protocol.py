"""Semantic segmentation: a copy of the backbone, trained with a head on masks, judged by mean intersection over union.

    train images -> random crops -> copy of the backbone (dilated) + head -> cross-entropy of the labelled pixels
    test images -> whole or by windows -> class of every pixel, at the mask's own size -> ONE confusion matrix -> mIoU

The linear recipes leave the backbone frozen. The last iteration is the result. The loss is the mean over the labelled
pixels of the batch of all ranks; OpenMMLab's code, where most of these settings come from, divides by all pixels, the
unlabelled ones included. Images are resized with antialiasing, which that code leaves out.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella import dist
from tessella.data.masks.layouts import IGNORE
from tessella.data.masks.views import CropSpec, MaskBatch, training_batches
from tessella.data.sampler import EpochSampler
from tessella.errors import UserError
from tessella.modules.drop_path import seed_noise
from tessella.modules.norm import synchronise_batch_norm
from tessella.modules.resnet import ResNet
from tessella.optim import OptimizerConfig, build_optimizer
from tessella.protocols.features import frozen, progress, tensor_digests
from tessella.protocols.protocol import Protocol
from tessella.protocols.segmentation.data import SegmentationData, Survey
from tessella.protocols.segmentation.files import write_tables
from tessella.protocols.segmentation.networks import Head, Segmenter, SharedDropout2d, dilate
from tessella.protocols.segmentation.scores import Judgement, figures, interval, judge
from tessella.protocols.training import Snapshots, sum_gradients
from tessella.ranges import (
    Channels,
    ForwardBatch,
    FractionBelowOne,
    NonNegative,
    NonNegativeInt,
    Pixels,
    Positive,
    PositiveInt,
    Range,
    Repeats,
    Seed,
)
from tessella.text import printable

__all__ = ["RECIPES", "SegmentationConfig", "SegmentationData", "learning_rate", "recipe_name", "segmentation"]

_STEP_DROPS = (0.7, 0.9)  # shares of the iterations after which the schedule "step" divides by ten
_WARMUP_START = 1e-6  # share of the learning rate at the first iteration of a warm-up
_LOSS_POINTS = 20  # means of the training loss in the record
_LOSS_CHECK = 100  # iterations between two looks at whether it is finite


@dataclass(frozen=True)
class SegmentationConfig:
    """The network, what it sees and how it is trained. The defaults are `fcn-voc12`; `RECIPES` has the others."""

    version: ClassVar[int] = 1
    head: Head = "fcn"  # linear: on the frozen backbone
    channels: Channels = 512  # of the head
    convs: Annotated[int, Range(0, 100)] = 2  # 3x3 convolutions of an FCN
    concatenate: bool = True  # whether an FCN sees the backbone's map again behind them
    head_dilation: Annotated[int, Range(1, 100)] = 1  # of an FCN's convolutions
    auxiliary: NonNegative = 0.4  # weight of the loss of an FCN on the third map; 0: none
    auxiliary_channels: Channels = 256
    dropout: FractionBelowOne = 0.1  # of channels in front of the classes
    output_stride: Annotated[int, Range(8, 32)] = 8  # of our ResNets, by dilation; networks of timm keep theirs
    align_corners: bool = False  # of enlarged scores; True in settings with sizes 8 k + 1
    crops: CropSpec = CropSpec()
    optimizer: Literal["sgd", "adamw"] = "sgd"  # momentum 0.9; betas 0.9, 0.999
    lr: Positive = 0.01
    weight_decay: NonNegative = 5e-4
    decay_norm_and_bias: bool = True
    schedule: Literal["poly", "step", "cosine"] = "poly"  # step: x 0.1 after 70 % and after 90 %
    power: NonNegative = 0.9  # of poly
    final_lr: NonNegative = 1e-4  # of poly
    warmup_iterations: NonNegativeInt = 0
    iterations: PositiveInt = 20_000
    batch_size: ForwardBatch = 16
    window: Pixels | None = None  # pixels of the square windows that test images are judged by; None: whole
    window_stride: Annotated[int, Range(0, 16_384)] = 0
    evaluations: Repeats = 1  # on test, evenly spaced; the last is the result, more show the way there
    seed: Seed = 0


_CITYSCAPES_769 = SegmentationConfig(
    align_corners=True,
    crops=CropSpec(size=769, resize=(2049, 1025)),
    iterations=40_000,
    batch_size=8,
    window=769,
    window_stride=513,
)
_MOCO = SegmentationConfig(
    channels=256,
    concatenate=False,
    head_dilation=6,
    auxiliary=0.0,
    dropout=0.0,
    output_stride=16,
    crops=CropSpec(size=513, resize=None, most=1.0, distort=False),
    lr=0.003,
    weight_decay=1e-4,
    schedule="step",
    iterations=30_000,
)
_UPERNET = SegmentationConfig(head="upernet", output_stride=32, iterations=160_000)

# Where a setting comes from, and what it needs: OpenMMLab's configurations of that name (mmsegmentation, mmselfsup),
# but for `moco` (He et al. 2020, appendix) and `linear` (the published configuration of DINOv3).
RECIPES = {
    "fcn-voc12": SegmentationConfig(),  # fcn_r50-d8_512x512_20k_voc12aug; train is the augmented set
    "fcn-cityscapes": _CITYSCAPES_769,  # fcn_r50-d8_769x769_40k_cityscapes
    "fcn-moco-voc12": _MOCO,
    "fcn-moco-cityscapes": replace(_MOCO, crops=replace(_MOCO.crops, size=769), lr=0.01, iterations=90_000),
    "upernet-ade20k": _UPERNET,  # upernet_r50_512x512_160k_ade20k
    "upernet-ade20k-transformer": replace(  # upernet_swin_tiny_..._160k_ade20k
        _UPERNET,
        optimizer="adamw",
        lr=6e-5,
        weight_decay=0.01,
        decay_norm_and_bias=False,
        power=1.0,
        final_lr=0.0,
        warmup_iterations=1500,
    ),
    "linear-ade20k": SegmentationConfig(
        head="linear",
        auxiliary=0.0,
        output_stride=16,  # of a ResNet, as of a transformer with patches of 16; the published one has no ResNet
        optimizer="adamw",
        lr=1e-3,
        weight_decay=1e-3,
        schedule="cosine",
        warmup_iterations=1500,
        iterations=40_000,
        window=512,
        window_stride=341,
    ),
    # Ours, for images of about 100 to 250 pixels and a narrow ResNet: minutes on two cores. Objects are found early and
    # told apart late, later still with AdamW, a lower learning rate or dropout.
    "small": SegmentationConfig(
        channels=64,
        convs=1,
        concatenate=False,
        auxiliary=0.0,
        dropout=0.0,
        crops=CropSpec(size=112, resize=None, scale=(0.75, 1.5), distort=False),
        lr=0.3,
        warmup_iterations=50,
        iterations=2000,
        batch_size=8,
    ),
}


def segmentation(backbone: Any, data: SegmentationData, config: SegmentationConfig) -> dict[str, Any]:
    """Train on the train masks, judge on the test masks. The given backbone stays as it is, bit by bit.

    With `data.predictions`, the training's state is kept there every few minutes until it is done, and a killed one
    goes on exactly.

    Args:
        backbone: one of `modules.backbone`.
        data: images with masks.
        config: settings; published ones in `RECIPES`.

    Returns:
        `miou` with `miou_interval` (95 %, over draws of test images), `pixel_accuracy`, `mean_accuracy`, `per_class`
        (intersection over union of each class that is there or predicted), `loss` (means over equal parts of the
        training), `recipe`, sizes, and `notes`. With several evaluations also `best_test_miou` at
        `best_test_iteration`, which was picked on the test set and is there for comparison with papers only.

    Raises:
        UserError: masks that do not fit, a batch larger than the training set, or a backbone without maps.
    """
    _check_config(config)
    survey = data.survey()
    with frozen(backbone):
        segmenter = build_segmenter(backbone, len(survey.classes), config).to(data.device)
        if dist.world_size() > 1:
            synchronise_batch_norm(segmenter, data.device)
        fixed = frozen(segmenter.backbone) if segmenter.frozen else contextlib.nullcontext()
        snapshots = Snapshots(data.predictions, _asked(backbone, data, survey, config))
        with fixed, torch.random.fork_rng([data.device] if data.device.type == "cuda" else []):
            losses, way = _train(segmenter, data, survey, config, snapshots)
            judged = _judge(segmenter, data, survey, config, _folder(data))
    way[config.iterations] = float(np.nanmean(judged.iou))
    folder = _folder(data)
    with dist.shared_errors():
        if folder is not None and dist.rank() == 0:
            write_tables(folder, data.test, survey.classes, judged.confusion, judged.skipped)
    snapshots.drop()
    scores = figures(judged, survey.classes) | {
        "miou_interval": interval(judged.per_image, config.seed),
        "loss": losses,
        "recipe": recipe_name(config),
        "images": len(data.test) - len(judged.skipped),
        "skipped": len(judged.skipped) + len(data.test.unreadable),
    }
    if config.evaluations > 1:
        best = max(way, key=lambda at: way[at])
        scores |= {"best_test_miou": way[best], "best_test_iteration": best}
    return scores | {"notes": _notes(backbone, data, survey, config, judged)}


def learning_rate(config: SegmentationConfig, iteration: int) -> float:
    """Learning rate of one update.

    poly: (lr - final) (1 - t / T)^power + final; step: x 0.1 from 0.7 T and again from 0.9 T; cosine:
    lr (1 + cos(pi t / T)) / 2. During a warm-up of W it is multiplied by 1 - (1 - t / W) (1 - 1e-6).

    Args:
        config: the schedule; T is its iterations.
        iteration: t, from 0.
    """
    share = iteration / config.iterations
    if config.schedule == "poly":
        lr = (config.lr - config.final_lr) * (1 - share) ** config.power + config.final_lr
    elif config.schedule == "step":
        lr = config.lr * 0.1 ** sum(iteration >= round(drop * config.iterations) for drop in _STEP_DROPS)
    else:
        lr = config.lr * (1 + math.cos(math.pi * share)) / 2
    if iteration < config.warmup_iterations:
        lr *= 1 - (1 - iteration / config.warmup_iterations) * (1 - _WARMUP_START)
    return lr


def recipe_name(config: SegmentationConfig) -> str:
    """The name of the recipe with these settings, whatever the seed and the number of evaluations; else "custom"."""
    plain = replace(config, seed=0, evaluations=1)
    return next((name for name, recipe in RECIPES.items() if recipe == plain), "custom")


def build_segmenter(backbone: Any, classes: int, config: SegmentationConfig) -> Segmenter:
    """A copy of the backbone, dilated if it can be, with a freshly drawn head that depends on the seed alone."""
    trunk = dilate(backbone, config.output_stride) if isinstance(backbone, ResNet) else copy.deepcopy(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Segmenter(
            trunk,
            classes,
            config.head,
            channels=config.channels,
            convs=config.convs,
            concatenate=config.concatenate,
            head_dilation=config.head_dilation,
            auxiliary_channels=config.auxiliary_channels if config.auxiliary else 0,
            dropout=config.dropout,
            align_corners=config.align_corners,
        )


# Training


def _check_config(config: SegmentationConfig) -> None:
    if config.window is not None and not 0 < config.window_stride <= config.window:
        raise UserError(
            f"window_stride={config.window_stride} leaves pixels out or stands still: give 1 to window={config.window}"
        )
    if not 1 <= config.evaluations <= config.iterations:
        raise UserError(
            f"evaluations={config.evaluations} in {config.iterations} iterations: give 1 to {config.iterations}"
        )


def _asked(backbone: nn.Module, data: SegmentationData, survey: Survey, config: SegmentationConfig) -> list[Any]:
    """All that the trained weights, and what is judged on the way to them, depend on."""
    return [
        *(asdict(config), config.version, tensor_digests(backbone), repr(backbone), data.mean, data.std),
        *(data.train.fingerprint, data.test.fingerprint, survey.classes, dist.world_size(), data.device.type),
    ]


def _train(
    segmenter: Segmenter, data: SegmentationData, survey: Survey, config: SegmentationConfig, snapshots: Snapshots
) -> tuple[list[float], dict[int, float]]:
    """Means of the loss along the way; iterations done -> mean IoU on test then, without the last."""
    solver = build_optimizer(segmenter if not segmenter.frozen else _without_backbone(segmenter), _update_rule(config))
    state = snapshots.load("segmenter", segmenter, solver, data.device) or {"done": 0, "losses": [], "miou": {}}
    done, way = int(state["done"]), {int(at): float(miou) for at, miou in state["miou"].items()}
    losses = torch.zeros(config.iterations, device=data.device)  # read now and then: nothing waits for the device
    losses[:done] = torch.tensor(state["losses"])
    judge_at = {round(config.iterations * (i + 1) / config.evaluations) for i in range(config.evaluations - 1)}
    dropouts = [module for module in segmenter.modules() if isinstance(module, SharedDropout2d)]
    with contextlib.closing(_batches(data, config, done)) as batches:
        for step, batch in enumerate(progress(batches, "training a segmenter", config.iterations - done), done):
            segmenter.train()
            seed_noise(config.seed, step, 0, dist.rank(), data.device)
            for number, dropout in enumerate(dropouts):
                dropout.seed, dropout.step = config.seed, step * len(dropouts) + number
            for group in solver.param_groups:
                group["lr"] = learning_rate(config, step)
            losses[step] = _update(segmenter, solver, batch.pixels, batch.labels, config.auxiliary)
            last = step + 1 == config.iterations
            if last or (step + 1) % _LOSS_CHECK == 0:
                _check_finite(losses[: step + 1], config)
            if step + 1 in judge_at:
                way[step + 1] = float(np.nanmean(_judge(segmenter, data, survey, config).iou))
            if snapshots.due(last=last):
                state = {"done": step + 1, "losses": losses[: step + 1].tolist(), "miou": way}
                snapshots.save("segmenter", segmenter, solver, state, last=last)
    parts = np.array_split(losses.cpu().numpy(), min(_LOSS_POINTS, len(losses)))
    return [round(float(part.mean()), 6) for part in parts], way


def _batches(data: SegmentationData, config: SegmentationConfig, first: int) -> Generator[MaskBatch, None, None]:
    return training_batches(
        data.train,
        config.crops,
        EpochSampler(len(data.train), config.batch_size, config.seed),
        config.iterations,
        seed=config.seed,
        mean=data.mean,
        std=data.std,
        device=data.device,
        workers=data.workers,
        first=first,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )


def _judge(
    segmenter: Segmenter, data: SegmentationData, survey: Survey, config: SegmentationConfig, folder: Path | None = None
) -> Judgement:
    classes = len(survey.classes)
    return judge(segmenter, data, classes, config.crops.resize, config.window, config.window_stride, folder)


def _check_finite(losses: Tensor, config: SegmentationConfig) -> None:
    values = losses.cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(
            f"the loss was not finite from iteration {int((~np.isfinite(values)).argmax())} on: give a lower lr than "
            f"{config.lr:g}, or a warm-up"
        )


def _folder(data: SegmentationData) -> Path | None:
    """Where predictions go."""
    return None if data.predictions is None else data.predictions / "segmentation"


def _without_backbone(segmenter: Segmenter) -> nn.Module:
    return nn.ModuleList([segmenter.head, segmenter.classifier])


def _update_rule(config: SegmentationConfig) -> OptimizerConfig:
    return OptimizerConfig(
        name=config.optimizer,
        lr=config.lr,
        momentum=0.9,
        weight_decay=config.weight_decay,
        decay_norm_and_bias=config.decay_norm_and_bias,
    )


def _update(
    segmenter: Segmenter, solver: torch.optim.Optimizer, pixels: Tensor, labels: Tensor, auxiliary: float
) -> Tensor:
    """One step on the batch of all ranks; returns the main head's loss."""
    labelled = dist.all_reduce_sum((labels != IGNORE).sum()).clamp_min(1)
    # Sums over all labelled pixels of the global batch: ranks with fewer of them weigh less.
    losses = [
        F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum") / labelled for scores in segmenter(pixels)
    ]
    total = losses[0] + sum(auxiliary * loss for loss in losses[1:])
    solver.zero_grad()
    total.backward()
    sum_gradients([p for group in solver.param_groups for p in group["params"]])
    solver.step()
    return dist.all_reduce_sum(losses[0].detach())


def _notes(
    backbone: Any, data: SegmentationData, survey: Survey, config: SegmentationConfig, judged: Judgement
) -> list[str]:
    notes = []
    if data.train.fingerprint == data.test.fingerprint:
        notes.append("train and test are the same images: the figure says how well they are learned by heart")
    unseen = [name for name, pixels in zip(survey.classes, survey.train, strict=True) if not pixels]
    asked = [name for name, pixels in zip(survey.classes, survey.test, strict=True) if pixels and name in unseen]
    if asked:
        notes.append(f"classes of test that train never shows: {', '.join(printable(name) for name in asked[:10])}")
    if not isinstance(backbone, ResNet) and config.head not in ("upernet", "linear") and config.output_stride < 32:
        notes.append("networks of timm are not dilated: their maps keep their own strides")
    skipped = dict(data.test.unreadable) | judged.skipped
    if skipped:
        key, reason = min(skipped.items())
        notes.append(f"{len(skipped)} test images cannot be read and do not count, such as {printable(key)}: {reason}")
    if data.train.unreadable:
        notes.append(f"{len(data.train.unreadable)} train images cannot be read and were left out")
    return notes


SEGMENTATION = Protocol(
    "Segmentation",
    SegmentationConfig,
    segmentation,
    {f"segmentation-{name}": config for name, config in RECIPES.items()},
    {"miou": "mean IoU"},
    ("masks",),
    lambda data, config: data.survey(),
    "record",
    quick={"masks": ("segmentation-small",)},
)
