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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella import dist
from tessella.data.masks.layouts import IGNORE
from tessella.errors import UserError
from tessella.modules.norm import synchronise_batch_norm
from tessella.modules.resnet import ResNet
from tessella.optim import OptimizerConfig, build_optimizer
from tessella.protocols.features import frozen
from tessella.protocols.protocol import Protocol
from tessella.protocols.segmentation.batches import MaskBatch, training_batches
from tessella.protocols.segmentation.data import SegmentationData, Survey
from tessella.protocols.segmentation.networks import Segmenter, SharedDropout2d, dilate
from tessella.protocols.segmentation.predictions import write_tables
from tessella.protocols.segmentation.recipes import RECIPES, SegmentationConfig
from tessella.protocols.segmentation.scores import Judgement, figures, interval, judge
from tessella.protocols.training import Fitted, Schedule, Snapshots, fit, private_generators
from tessella.text import printable

_STEP_DROPS = (0.7, 0.9)  # shares of the iterations after which the schedule "step" divides by ten
_WARMUP_START = 1e-6  # share of the learning rate at the first iteration of a warm-up
_LOSS_POINTS = 20  # means of the training loss in the record


def segmentation(backbone: Any, data: SegmentationData, config: SegmentationConfig) -> dict[str, Any]:
    """Train on the train masks, judge on the test masks. The backbone itself stays as it is, bit by bit.

    With `data.predictions`, predicted masks are written there, and snapshots of the training until it is done.

    Args:
        backbone: one of `modules.backbone`.
        data: images with masks.
        config: settings; published ones in `RECIPES`.

    Returns:
        `miou` with `miou_interval` (95 %, over draws of test images), `pixel_accuracy`, `mean_accuracy`, `per_class`
        (intersection over union of each class that is there or predicted), `loss` (means over equal parts of the
        training, the auxiliary head's part included), sizes, and `notes`. With several evaluations also
        `best_test_miou` at `best_test_iteration`, which was picked on the test set and is there for comparison with
        papers only.

    Raises:
        UserError: masks that do not fit, a batch larger than the training set, or a backbone without maps.
    """
    _check_config(config)
    survey, folder = data.survey(), None if data.predictions is None else data.predictions / "segmentation"
    snapshots = Snapshots(data.predictions, backbone, data, config, data.mean, data.std, survey.classes)
    with frozen(backbone), private_generators(data.device):
        segmenter = build_segmenter(backbone, len(survey.classes), config).to(data.device)
        if dist.world_size() > 1:
            synchronise_batch_norm(segmenter, data.device)
        with frozen(segmenter.backbone) if segmenter.frozen else contextlib.nullcontext():
            fitted = _train(segmenter, data, config, snapshots)
            judged = judge(segmenter, data, config, folder)
    with dist.shared_errors():
        if folder is not None and dist.rank() == 0:
            write_tables(folder, data.test, survey.classes, judged.confusion, judged.skipped)
    snapshots.drop()
    parts = np.array_split(fitted.losses, min(_LOSS_POINTS, len(fitted.losses)))
    scores = figures(judged, survey.classes) | {
        "miou_interval": interval(judged.per_image, config.seed),
        "loss": [round(float(part.mean()), 6) for part in parts],
        "images": len(data.test) - len(judged.skipped),
        "skipped": len(judged.skipped) + len(data.test.unreadable),
    }
    if config.evaluations > 1:
        miou = fitted.scores | {config.iterations: scores["miou"]}
        best = max(miou, key=lambda iteration: miou[iteration])
        scores |= {"best_test_miou": miou[best], "best_test_iteration": best}
    return scores | {"notes": _notes(backbone, data, survey, config, judged)}


def schedule(config: SegmentationConfig) -> Schedule:
    """OpenMMLab's schedules; a warm-up begins at a millionth of the rate."""
    drops = tuple(round(share * config.iterations) for share in _STEP_DROPS) if config.schedule == "step" else ()
    return Schedule(
        config.iterations,
        "drops" if config.schedule == "step" else config.schedule,
        drops=drops,
        power=config.power,
        final=config.final_lr / config.lr,
        warmup=config.warmup_iterations,
        warmup_start=_WARMUP_START,
    )


def build_segmenter(backbone: Any, classes: int, config: SegmentationConfig) -> Segmenter:
    """A copy of the backbone, dilated if it can be, with a freshly drawn head that depends on the seed alone."""
    trunk = dilate(backbone, config.output_stride) if isinstance(backbone, ResNet) else copy.deepcopy(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Segmenter(trunk, classes, config)


def update_rule(config: SegmentationConfig) -> OptimizerConfig:
    """The published optimisers: momentum or first beta 0.9."""
    decay = {"weight_decay": config.weight_decay, "decay_norm_and_bias": config.decay_norm_and_bias}
    return OptimizerConfig(name=config.optimizer, lr=config.lr, momentum=0.9, **decay)  # type: ignore[arg-type]


def _check_config(config: SegmentationConfig) -> None:
    if config.window is not None and not 0 < config.window_stride <= config.window:
        raise UserError(
            f"window_stride={config.window_stride} leaves pixels out or stands still: give 1 to window={config.window}"
        )
    if not 1 <= config.evaluations <= config.iterations:
        raise UserError(
            f"evaluations={config.evaluations} in {config.iterations} iterations: give 1 to {config.iterations}"
        )


def _train(segmenter: Segmenter, data: SegmentationData, config: SegmentationConfig, snapshots: Snapshots) -> Fitted:
    """The scores are mean IoU on the test images, at all evaluations but the last."""
    trained = nn.ModuleList([segmenter.head, segmenter.classifier]) if segmenter.frozen else segmenter
    dropouts = [module for module in segmenter.modules() if isinstance(module, SharedDropout2d)]

    def loss(batch: MaskBatch) -> Tensor:
        for number, dropout in enumerate(dropouts):
            dropout.seed, dropout.step = config.seed, batch.step * len(dropouts) + number
        labelled = dist.all_reduce_sum((batch.labels != IGNORE).sum()).clamp_min(1)
        # Sums over all labelled pixels of the global batch: ranks with fewer of them weigh less.
        main, *auxiliary = (
            F.cross_entropy(scores, batch.labels, ignore_index=IGNORE, reduction="sum") / labelled
            for scores in segmenter(batch.pixels)
        )
        return main + sum(config.auxiliary * part for part in auxiliary)

    return fit(
        segmenter,
        loss,
        lambda first: training_batches(data, config, first, dist.rank(), dist.world_size()),
        schedule(config),
        build_optimizer(trained, update_rule(config)),
        snapshots,
        title="training a segmenter",
        seed=config.seed,
        judge=lambda step: float(np.nanmean(judge(segmenter, data, config).iou)),
        judge_at=[round(config.iterations * i / config.evaluations) for i in range(1, config.evaluations)],
        advice=f"give a lower lr than {config.lr:g}, or a warm-up",
    )


def _notes(
    backbone: Any, data: SegmentationData, survey: Survey, config: SegmentationConfig, judged: Judgement
) -> list[str]:
    notes = []
    if data.train.fingerprint == data.test.fingerprint:
        notes.append("train and test are the same images: the figure shows how well they are remembered")
    unseen = [name for name, pixels in zip(survey.classes, survey.train, strict=True) if not pixels]
    missing = [name for name, pixels in zip(survey.classes, survey.test, strict=True) if pixels and name in unseen]
    if missing:
        notes.append(f"classes of test that train never shows: {', '.join(printable(name) for name in missing[:10])}")
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
