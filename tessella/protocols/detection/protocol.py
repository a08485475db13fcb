"""Object detection and instance masks: fine-tune a detector around the backbone, score it by COCO's average precision.

    copy of the backbone -> Faster or Mask R-CNN, every layer trained -> precise batch norm -> test images -> AP

The weights after the last step are scored, once; nothing is picked on the test set. Batch norm covers all ranks and is
trained like everything else; before the test, its statistics are recomputed from training batches.

What differs from the published runs, which used detectron2: batches are not grouped by shape, VOC is scored by COCO's
101-point precision with difficult objects ignored (detectron2: VOC's matching, and 11 points for 2007), and what
`networks` names.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tessella import dist
from tessella.console import note
from tessella.data.sampler import check_shares
from tessella.errors import UserError
from tessella.modules.drop_path import seed_noise
from tessella.modules.norm import synchronise_batch_norm
from tessella.ops.layout import image_layout
from tessella.protocols.detection.batches import DetectionBatch, Stream, batches
from tessella.protocols.detection.data import DetectionData, check
from tessella.protocols.detection.recipes import RECIPES, DetectionConfig
from tessella.protocols.features import from_all_ranks, progress
from tessella.protocols.protocol import Protocol
from tessella.protocols.training import Schedule, Snapshots, fit, private_generators
from tessella.text import printable

_USUAL_STRIDE = 4  # of a backbone's first map
_C4_SMALLEST = 4 * 0.25  # of the c4 detector's anchors, on a map with four times the stride: see `networks`
_MOST_POSITIONS = 800 * 1333 // 4  # of the finest map of one image: four times those of the published sizes


def detection(backbone: nn.Module, data: DetectionData, config: DetectionConfig) -> dict[str, Any]:
    """Train a detector on the training images, score it on the test images.

    With `data.predictions`, rank 0 writes there `ground_truth.json` as scored, `detections.json` (boxes) and, for
    masks, `masks.json`, all in COCO's format; and snapshots of the training until it is done.

    Args:
        backbone: has `stage_maps`; a copy of it is trained, it stays as it is.
        data: images with objects.
        config: the setting, for example one of `RECIPES`.

    Returns:
        `box_ap` (IoU 0.50 to 0.95), `box_ap50`, `box_ap75`, `box_ap_small`, `_medium`, `_large`, `box_ar100` and
        `box_per_class`, in [0, 1], sizes that no object has left out; the same with `mask_`; `loss`, the mean of the
        first and of the last tenth of the steps; `images`, `objects`; `notes`.

    Raises:
        UserError: masks are asked for and the annotations have none, there is nothing to train on or to score, or the
            training diverged.
    """
    from tessella.protocols.detection.networks import build_detector
    from tessella.protocols.detection.scores import detect, score

    notes = check(data, config)
    check_shares(config.batch_size, dist.world_size(), 1)
    positions = np.arange(len(data.train)) if config.keep_empty else data.train.with_objects()
    stream = Stream(data.train, positions, config.train_sizes, config.longest, config.mirror, config.seed)
    snapshots = Snapshots(data.predictions, backbone, data, config, data.mean, data.std, data.classes)
    skipped: dict[str, str] = {}

    def shown(first: int) -> Generator[DetectionBatch, None, None]:
        plans = stream.plans(first, config.batch_size, dist.rank(), dist.world_size())
        options: dict[str, Any] = {"divisor": detector.divisor, "masks": config.masks, "allowed": len(positions)}
        return batches(data.train, plans, data, skipped=skipped, **options)

    def loss(batch: DetectionBatch) -> Tensor:
        parts, _ = detector(batch.pixels, batch.sizes, batch.targets)
        return torch.stack(list(parts.values())).sum()

    with private_generators(data.device):
        torch.manual_seed(config.seed)
        detector = build_detector(backbone, len(data.classes), config)
        notes += _check_resolution(detector.finest, config)
        if dist.world_size() > 1:
            synchronise_batch_norm(detector, data.device)
        detector.to(data.device).to(memory_format=image_layout(data.device))
        losses = fit(
            detector,
            loss,
            shown,
            schedule(config),
            build_optimizer(detector, config),
            snapshots,
            title="training the detector",
            seed=config.seed,
            advice=f"lower lr ({config.lr:g}), or raise warmup_iterations ({config.warmup_iterations})",
            skipped=skipped,
        ).losses
        seed_noise(config.seed, config.iterations, 0, dist.rank(), data.device)
        remaining = itertools.islice(shown(config.iterations), config.precise_bn)
        renew_statistics(detector, progress(remaining, "batch norm statistics", config.precise_bn))
    detections = detect(detector, data, config)
    with dist.shared_errors():
        scores = score(detections, data, config) if dist.rank() == 0 else None
    scores = dist.broadcast_object(scores)
    tenth = max(1, len(losses) // 10)
    scores["loss"] = {"first": float(np.mean(losses[:tenth])), "last": float(np.mean(losses[-tenth:]))}
    if detections.skipped:
        example = printable(next(iter(detections.skipped)))
        count = len(detections.skipped)
        notes.append(f"{count} test images could not be decoded and are not scored (the first: {example})")
    unreadable = dict(from_all_ranks(list(skipped.items())))
    if unreadable:
        notes.append(f"{len(unreadable)} training images could not be decoded and were shown black, without objects")
    snapshots.drop()
    return scores | {"notes": notes}


def schedule(config: DetectionConfig) -> Schedule:
    """A linear warm-up, then a tenth of the rate at each of the steps."""
    warmup = config.warmup_iterations
    return Schedule(config.iterations, drops=config.steps, warmup=warmup, warmup_start=config.warmup_factor)


def build_optimizer(detector: nn.Module, config: DetectionConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over every parameter; weights and biases of norms are not decayed."""
    norms = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
    spared = {p for module in detector.modules() if isinstance(module, norms) for p in module.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in detector.parameters() if p not in spared]},
        {"params": [p for p in detector.parameters() if p in spared], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


@torch.no_grad()
def renew_statistics(detector: nn.Module, shown: Iterable[DetectionBatch]) -> None:
    """Compute the batch norms' mean and variance over many batches with the weights at hand ("precise batch norm").

    The variance is that of all batches together: the mean of their variances and the variance of their means. The
    detector is left in training mode; without batches, nothing changes.
    """
    norms = [module for module in detector.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    moments = [torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms]  # of first and second order
    count = 0
    detector.train()
    for norm in norms:
        norm.momentum = 1.0  # the running values are then those of the last batch
    for batch in shown:
        detector(batch.pixels, batch.sizes, batch.targets)
        count += 1
        for norm, sums in zip(norms, moments, strict=True):
            assert norm.running_mean is not None and norm.running_var is not None
            mean = norm.running_mean.cpu().double()
            sums += torch.stack([mean, norm.running_var.cpu() + mean.square()])
    for norm, momentum, sums in zip(norms, momenta, moments, strict=True):
        norm.momentum = momentum
        if count:
            assert norm.running_mean is not None and norm.running_var is not None
            mean, square = sums / count
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(square - mean.square())


def _check_resolution(finest: int, config: DetectionConfig) -> list[str]:
    """Refuse maps that no memory holds; warn at once, and beside the figures, of those that take their time."""
    if finest >= _USUAL_STRIDE:
        return []
    longest = max(config.longest, config.test_size)
    shorter = max(*config.train_sizes, config.test_size)
    more = (_USUAL_STRIDE // finest) ** 2
    made_for = f"the backbone's stem is made for small images: its first map has {more} times the usual positions"
    if shorter * longest // finest**2 > _MOST_POSITIONS:
        raise UserError(
            f"{made_for}, too many for images of {shorter} x {longest} pixels. Use detection-small, or lower "
            "train_sizes, test_size and longest to what the backbone was trained on; or pretrain with "
            "--backbone.stem imagenet"
        )
    smallest = config.anchor_scale * finest * (1 if config.neck == "fpn" else _C4_SMALLEST)
    slow = (
        f"{made_for}: training a detector on it takes several times as long, and its smallest anchors are {smallest:g} "
        f"pixels on a side instead of {smallest * _USUAL_STRIDE / finest:g}"
    )
    if dist.rank() == 0:
        note(slow)
    return [slow]


DETECTION = Protocol(
    "Detection",
    DetectionConfig,
    detection,
    {f"detection-{name}": config for name, config in RECIPES.items()},
    {"box_ap": "box AP", "mask_ap": "mask AP"},
    ("boxes",),
    check,
    "record",
    quick={"boxes": ("detection-small",)},
    name_of=lambda config: f"detection-{config.recipe}",
)
