"""Object detection and instance masks: fine-tune a detector around the backbone, score it by COCO's average precision.

    copy of the backbone -> Faster or Mask R-CNN, every layer trained -> precise batch norm -> test images -> AP

The weights after the last step are scored, once; nothing is picked on the test set. Batch norm covers all ranks and is
trained like everything else; before the test, its statistics are computed anew from training batches.

What differs from the published runs, which used detectron2: batches are not grouped by shape, VOC is scored by COCO's
101-point precision with difficult objects ignored (detectron2: VOC's matching, and 11 points for 2007), and what
`networks` names.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tessella import dist, files
from tessella.console import note
from tessella.data.boxes.layouts import AnnotatedImages
from tessella.data.boxes.outlines import mask_coder
from tessella.data.sampler import check_shares
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD
from tessella.errors import UserError
from tessella.modules.drop_path import seed_noise
from tessella.modules.norm import synchronise_batch_norm
from tessella.ops.layout import image_layout
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.detection.batches import (
    DetectionBatch,
    Stream,
    batches,
    check_damage,
    test_plans,
    training_plans,
)
from tessella.protocols.detection.scores import average_precision
from tessella.protocols.features import progress, rank_rows, tensor_digests
from tessella.protocols.protocol import Protocol
from tessella.protocols.training import Snapshots, from_all_ranks
from tessella.ranges import (
    Channels,
    ForwardBatch,
    Fraction,
    FractionBelowOne,
    NonNegative,
    NonNegativeInt,
    Pixels,
    Positive,
    PositiveInt,
    Range,
    Seed,
)
from tessella.text import printable

_FPN_SIZES = (640, 672, 704, 736, 768, 800)
_USUAL_STRIDE = 4  # of a backbone's first map
_C4_SMALLEST = 4 * 0.25  # of the c4 detector's anchors, on a map with four times the stride: see `networks`
_MOST_POSITIONS = 800 * 1333 // 4  # of the finest map of one image: four times those of the published sizes
_VOC_SIZES = (480, 512, 544, 576, 608, *_FPN_SIZES)


@dataclass(frozen=True)
class DetectionConfig:
    """A detector, its training and its test; the defaults are JigClu's for COCO."""

    version: ClassVar[int] = 1
    recipe: str = "jigclu"  # which published setting this is, or comes from
    masks: bool = False  # Mask R-CNN instead of Faster R-CNN
    neck: Literal["fpn", "c4"] = "fpn"  # a plain transformer gets a simple pyramid for fpn
    box_head: Literal["4conv1fc", "2fc"] = "4conv1fc"  # of fpn: with batch norm, or without convolutions
    fpn_norm: bool = True  # batch norm in the pyramid
    channels: Channels = 256  # of the pyramid and of the heads' convolutions
    fc_dim: Annotated[int, Range(1, 65_536)] = 1024  # of the box head's fully connected layers
    anchor_scale: Positive = 8.0  # side of the anchors in strides of their level: 32 pixels at stride 4
    rpn_samples: PositiveInt = 256  # anchors trained on per image
    box_samples: PositiveInt = 512  # regions trained on per image
    pre_nms: tuple[PositiveInt, PositiveInt] = (2000, 6000)  # proposals kept per level: in training, in the test
    post_nms: tuple[PositiveInt, PositiveInt] = (1000, 1000)  # and per image after suppression
    train_sizes: tuple[Pixels, ...] = _FPN_SIZES  # shorter sides in pixels, one is drawn for each image
    test_size: Pixels = 800
    longest: Pixels = 1333  # pixels of the longer side, at most; then the shorter one is shorter
    mirror: Fraction = 0.5  # chance
    keep_empty: bool = False  # also train on images without objects; the published runs leave them out
    batch_size: ForwardBatch = 8  # images per step over all ranks
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01
    momentum: FractionBelowOne = 0.9  # of SGD
    weight_decay: NonNegative = 1e-4  # norms are spared, as in detectron2
    iterations: PositiveInt = 180_000
    steps: tuple[NonNegativeInt, ...] = (120_000, 160_000)  # iterations at which the learning rate drops to a tenth
    warmup_iterations: NonNegativeInt = 1000
    warmup_factor: Fraction = 0.001  # share of the learning rate at the first iteration
    # Training batches that the batch norms' statistics are computed from before the test; 0: none.
    precise_bn: NonNegativeInt = 200
    score_threshold: Fraction = 0.05
    detections: PositiveInt = 100  # per image, at most
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.train_sizes:
            raise UserError("train_sizes is empty: give one or more sizes in pixels")


_MOCO_FPN = DetectionConfig(
    recipe="moco-fpn",
    masks=True,
    box_head="2fc",
    pre_nms=(2000, 1000),
    batch_size=16,
    lr=0.02,
    iterations=90_000,
    steps=(60_000, 80_000),
)
_MOCO_C4 = replace(_MOCO_FPN, recipe="moco-c4", neck="c4", pre_nms=(12_000, 6000), post_nms=(2000, 1000))
_VOC_SCHEDULE: dict[str, Any] = {
    "train_sizes": _VOC_SIZES,
    "iterations": 24_000,
    "steps": (18_000, 22_000),
    "warmup_iterations": 100,
}
_SMALL = DetectionConfig(
    recipe="small",
    channels=64,
    fc_dim=128,
    anchor_scale=4.0,
    rpn_samples=64,
    box_samples=64,
    pre_nms=(200, 100),
    post_nms=(100, 50),
    train_sizes=(128,),
    test_size=128,
    longest=192,
    batch_size=8,
    optimizer="adamw",
    lr=2e-3,
    weight_decay=0.05,
    iterations=600,
    steps=(440, 560),
    warmup_iterations=40,
    warmup_factor=0.05,
    precise_bn=20,
)

RECIPES: dict[str, DetectionConfig] = {
    config.recipe: config
    for config in (
        # Official configs of JigClu for COCO and VOC07+12; MEJigClu uses the same.
        DetectionConfig(),
        replace(DetectionConfig(), recipe="mejigclu"),
        replace(DetectionConfig(), recipe="jigclu-voc", **_VOC_SCHEDULE),
        # detectron2's 1x schedule with SyncBN, as in MoCo's and mmselfsup's benchmarks; c4-2x is twice as long.
        _MOCO_FPN,
        _MOCO_C4,
        replace(_MOCO_C4, recipe="moco-c4-2x", iterations=180_000, steps=(120_000, 160_000)),
        replace(_MOCO_C4, recipe="voc-c4", masks=False, lr=0.02, **_VOC_SCHEDULE),
        # vissl's configs for SwAV: a higher learning rate, and no norm in the pyramid.
        replace(_MOCO_FPN, recipe="swav-fpn", fpn_norm=False, lr=0.1, warmup_iterations=1000),
        replace(
            replace(_MOCO_C4, recipe="voc-c4-swav", masks=False, lr=0.1, **_VOC_SCHEDULE),
            warmup_iterations=1000,
            warmup_factor=1 / 3,
        ),
        # Ours, for transformers: what the others train by SGD is trained by AdamW. Not a published setting.
        replace(_MOCO_FPN, recipe="transformer", box_head="4conv1fc", optimizer="adamw", lr=1e-4, weight_decay=0.05),
        # Ours, for images of about 128 pixels: minutes on two cores.
        _SMALL,
        replace(_SMALL, recipe="small-mask", masks=True),
        replace(_SMALL, recipe="small-c4", neck="c4"),
    )
}


@dataclass
class DetectionData:
    """What the protocol is given besides the backbone."""

    train: AnnotatedImages
    test: AnnotatedImages
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 2
    predictions: Path | None = None  # folder for what is detected on the test images, in COCO's format

    @property
    def classes(self) -> list[str]:
        """Names of the classes of both splits; the training images' come first, in their order."""
        return [*self.train.classes, *(name for name in self.test.classes if name not in set(self.train.classes))]


def detection(backbone: nn.Module, data: DetectionData, config: DetectionConfig) -> dict[str, Any]:
    """Train a detector on the training images, score it on the test images.

    With `data.predictions`, rank 0 writes there `ground_truth.json` as scored, `detections.json` (boxes) and, for
    masks, `masks.json`, all in COCO's format; and, until it is done, the training's state every few minutes, from which
    a killed one goes on exactly.

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
    from tessella.protocols.detection.networks import Widths, build_detector

    notes = check(data, config)
    check_shares(config.batch_size, dist.world_size(), 1)
    stream = _stream(data, config)
    widths = Widths(**{name: getattr(config, name) for name in Widths._fields})
    with torch.random.fork_rng(devices=[data.device] if data.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        detector = build_detector(backbone, len(data.classes), widths)
        notes += _check_resolution(detector.finest, config)
        if dist.world_size() > 1:
            synchronise_batch_norm(detector, data.device)
        detector.to(data.device).to(memory_format=image_layout(data.device))
        skipped: dict[str, str] = {}
        snapshots = Snapshots(data.predictions, _asked(backbone, data, config))
        losses = _train(detector, stream, data, config, skipped, snapshots)
        if config.precise_bn:
            seed_noise(config.seed, config.iterations, 0, dist.rank(), data.device)
            plans = training_plans(
                stream, config.iterations, config.precise_bn, config.batch_size, dist.rank(), dist.world_size()
            )
            title = "batch norm statistics"
            renew_statistics(
                detector, progress(_batches(plans, detector, data, config, skipped), title, config.precise_bn)
            )
    boxes, masks, seen, damaged = _detect(detector, data, config)
    skipped = dict(from_all_ranks(list(skipped.items())))
    with dist.shared_errors():
        found = _score(boxes, masks, seen, data, config) if dist.rank() == 0 else None
    scores = dist.broadcast_object(found)
    tenth = max(1, len(losses) // 10)
    scores["loss"] = {"first": float(np.mean(losses[:tenth])), "last": float(np.mean(losses[-tenth:]))}
    if damaged:
        example = printable(next(iter(damaged)))
        notes.append(f"{len(damaged)} test images could not be decoded and are not scored (the first: {example})")
    if skipped:
        notes.append(f"{len(skipped)} training images could not be decoded and were shown black, without objects")
    snapshots.drop()
    return scores | {"notes": notes}


def _check_resolution(finest: int, config: DetectionConfig) -> list[str]:
    """Refuse maps that no memory holds; tell at once, and again beside the figures, of those that take their time."""
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


def learning_rate(config: DetectionConfig, step: int) -> float:
    """Learning rate of one update: a linear warm-up from a share of the base, a tenth at each of the steps.

    Args:
        config: the schedule.
        step: from 0.
    """
    done = min(1.0, step / config.warmup_iterations) if config.warmup_iterations else 1.0
    warmup = config.warmup_factor * (1 - done) + done
    return config.lr * warmup * 0.1 ** bisect.bisect_right(config.steps, step)


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
def renew_statistics(detector: nn.Module, shown: Iterator[DetectionBatch]) -> None:
    """Compute the batch norms' mean and variance over many batches with the weights at hand ("precise batch norm").

    The variance is that of all batches together: the mean of their variances and the variance of their means.

    Args:
        detector: with its final weights; it comes back in training mode.
        shown: training batches.
    """
    norms = [module for module in detector.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    sums = [[torch.zeros(norm.num_features, dtype=torch.float64) for _ in range(3)] for norm in norms]
    count = 0
    detector.train()
    for norm in norms:
        norm.momentum = 1.0  # the running values are then those of the last batch
    for batch in shown:
        detector(batch.pixels, batch.sizes, batch.targets)
        count += 1
        for norm, (mean, square, variance) in zip(norms, sums, strict=True):
            assert norm.running_mean is not None and norm.running_var is not None
            batch_mean = norm.running_mean.cpu().double()
            mean += batch_mean
            square += batch_mean.square()
            variance += norm.running_var.cpu()
    for norm, momentum, (mean, square, variance) in zip(norms, momenta, sums, strict=True):
        norm.momentum = momentum
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean / count)
        norm.running_var.copy_(variance / count + square / count - (mean / count).square())


def _asked(backbone: nn.Module, data: DetectionData, config: DetectionConfig) -> list[Any]:
    """All that the trained weights depend on."""
    return [
        *(asdict(config), config.version, tensor_digests(backbone), repr(backbone), data.mean, data.std, data.classes),
        *(data.train.fingerprint, dist.world_size(), data.device.type),
    ]


def _train(
    detector: nn.Module,
    stream: Stream,
    data: DetectionData,
    config: DetectionConfig,
    skipped: dict[str, str],
    snapshots: Snapshots,
) -> list[float]:
    """Loss of every step, the mean over the ranks."""
    detector.train()
    optimizer = build_optimizer(detector, config)
    state = snapshots.load("detector", detector, optimizer, data.device) or {"done": 0, "losses": [], "skipped": {}}
    done, losses = int(state["done"]), list(state["losses"])
    skipped.update(state["skipped"])
    left = config.iterations - done
    plans = training_plans(stream, done, left, config.batch_size, dist.rank(), dist.world_size())
    shown = progress(_batches(plans, detector, data, config, skipped), "training the detector", left)
    for step, batch in enumerate(shown, done):
        check_damage(skipped, len(stream.positions))
        losses.append(_update(detector, optimizer, batch, config, step))
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"the detector's loss became {losses[-1]} at step {step} of {config.iterations}: lower lr "
                f"({config.lr}), or raise warmup_iterations ({config.warmup_iterations})"
            )
        state = {"done": step + 1, "losses": losses, "skipped": skipped}
        snapshots.save("detector", detector, optimizer, state, last=step + 1 == config.iterations)
    return losses


def _update(
    detector: nn.Module, optimizer: torch.optim.Optimizer, batch: DetectionBatch, config: DetectionConfig, step: int
) -> float:
    """One step on the batch of all ranks; returns the mean loss."""
    seed_noise(config.seed, step, 0, dist.rank(), batch.pixels.device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    parts, _ = detector(batch.pixels, batch.sizes, batch.targets)
    loss = torch.stack(list(parts.values())).sum()
    optimizer.zero_grad()
    loss.backward()
    _average_gradients(detector)
    optimizer.step()
    return float(dist.all_reduce_sum(loss.detach()) / dist.world_size())


def _average_gradients(module: nn.Module) -> None:
    """Mean over the ranks, as one message."""
    if dist.world_size() == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = dist.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / dist.world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _batches(
    plans: Iterator[Any], detector: nn.Module, data: DetectionData, config: DetectionConfig, skipped: dict[str, str]
) -> Iterator[DetectionBatch]:
    return batches(
        data.train,
        plans,
        divisor=int(detector.divisor),  # type: ignore[arg-type]
        masks=config.masks,
        mean=data.mean,
        std=data.std,
        device=data.device,
        workers=data.workers,
        skipped=skipped,
    )


def _detect(
    detector: nn.Module, data: DetectionData, config: DetectionConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[int], dict[str, str]]:
    """What is found on the test images, each seen by one rank.

    Returns:
        Boxes and masks in COCO's format and the positions of the images that could be read, on rank 0; the images that
        could not, on every rank.
    """
    detector.eval()
    mine = rank_rows(len(data.test))
    skipped: dict[str, str] = {}
    shown = batches(
        data.test,
        test_plans(data.test, mine, config.test_size, config.longest),
        divisor=int(detector.divisor),  # type: ignore[arg-type]
        masks=False,
        mean=data.mean,
        std=data.std,
        device=data.device,
        workers=data.workers,
        skipped=skipped,
    )
    boxes: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []
    seen: list[int] = []
    for batch in progress(shown, "detecting on the test images", len(mine)):
        if not batch.readable[0]:
            continue
        with torch.inference_mode():
            _, (found,) = detector(batch.pixels, batch.sizes)
        position = batch.samples[0].position
        seen.append(position)
        on_cpu = {name: x.cpu() for name, x in found.items()}
        image_boxes, image_masks = _as_coco(on_cpu, position, batch.sizes[0], data)
        boxes += image_boxes
        masks += image_masks
    boxes, masks, seen = (from_all_ranks(mine) for mine in (boxes, masks, seen))
    return boxes, masks, sorted(seen), dict(from_all_ranks(list(skipped.items())))


def _as_coco(
    found: dict[str, Tensor], position: int, size: tuple[int, int], data: DetectionData
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Detections of one image, moved back to its own pixels, as boxes and as masks."""
    width, height = data.test.size(position)
    scale = torch.tensor([width / size[1], height / size[0]] * 2)
    corners = found["boxes"] * scale
    numbers = dict(zip(data.test.classes, data.test.category_ids, strict=True))
    names = [data.classes[label - 1] for label in found["labels"].tolist()]
    boxes, masks = [], []
    for i, (name, score, box) in enumerate(zip(names, found["scores"].tolist(), corners, strict=True)):
        if name not in numbers:  # a class that the test images do not know, and no scorer has a number for
            continue
        left, top, right, bottom = (round(side, 3) for side in box.tolist())
        what = {"image_id": data.test.image_ids[position], "category_id": numbers[name], "score": round(score, 6)}
        boxes.append({**what, "bbox": [left, top, round(right - left, 3), round(bottom - top, 3)]})
        if "masks" in found:
            coder = mask_coder()
            run = coder.encode(np.asfortranarray(paste(found["masks"][i, 0], box, height, width)))
            masks.append({**what, "segmentation": {"size": run["size"], "counts": run["counts"].decode("ascii")}})
    return boxes, masks


def paste(mask: Tensor, box: Tensor, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A mask of a box, laid on its image.

    Args:
        mask: (s, s) shares in [0, 1], stretched over the box, bilinear.
        box: (4,) corners in pixels.
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        (height, width) uint8, 1 where the share is at least a half.
    """
    left, top, right, bottom = box.tolist()
    whole = np.zeros((height, width), dtype=np.uint8)
    first_row, last_row = max(0, math.floor(top)), min(height, math.ceil(bottom))
    first_column, last_column = max(0, math.floor(left)), min(width, math.ceil(right))
    if first_row >= last_row or first_column >= last_column or right <= left or bottom <= top:
        return whole
    columns, rows = torch.arange(first_column, last_column), torch.arange(first_row, last_row)
    x = (columns + 0.5 - left) / (right - left) * 2 - 1
    y = (rows + 0.5 - top) / (bottom - top) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    shares = nn.functional.grid_sample(mask[None, None].float(), grid.float(), align_corners=False)[0, 0]
    whole[first_row:last_row, first_column:last_column] = (shares >= 0.5).numpy()
    return whole


def _score(
    boxes: list[dict[str, Any]],
    masks: list[dict[str, Any]],
    seen: list[int],
    data: DetectionData,
    config: DetectionConfig,
) -> dict[str, Any]:
    truth = data.test.truth(seen, masks=config.masks)
    counted = sum(not annotation["iscrowd"] for annotation in truth["annotations"])
    if data.predictions is not None:
        files.make_folder(data.predictions)
        content = {"ground_truth": truth, "detections": boxes} | ({"masks": masks} if config.masks else {})
        for name, value in content.items():
            files.write_json(data.predictions / f"{name}.json", value, indent=None)
    scores: dict[str, Any] = {}
    kinds: list[tuple[str, Literal["bbox", "segm"], list[dict[str, Any]]]] = [("box", "bbox", boxes)]
    if config.masks:
        kinds.append(("mask", "segm", masks))
    for name, kind, found in kinds:
        figures, per_class = average_precision(truth, found, kind)
        scores |= {f"{name}_{figure}": value for figure, value in figures.items()}
        scores[f"{name}_per_class"] = per_class
    # Masks are not moved to other images, whose size may be another.
    by_chance, _ = average_precision(_elsewhere(truth), boxes, "bbox")
    scores["permuted"] = {f"box_{figure}": value for figure, value in by_chance.items()}
    return scores | {"images": len(seen), "objects": counted}


def _elsewhere(truth: dict[str, Any]) -> dict[str, Any]:
    """The objects of each image laid on another: what detections score on them is chance."""
    ids = np.array([image["id"] for image in truth["images"]])
    shuffled = ids[permutation(stream_key(0, "permuted"), np.arange(len(ids)), 0)]
    other = dict(zip(ids.tolist(), shuffled.tolist(), strict=True))
    moved = [annotation | {"image_id": other[annotation["image_id"]]} for annotation in truth["annotations"]]
    return truth | {"annotations": moved}


def _stream(data: DetectionData, config: DetectionConfig) -> Stream:
    positions = np.arange(len(data.train)) if config.keep_empty else data.train.with_objects()
    return Stream(data.train, positions, config.train_sizes, config.longest, config.mirror, config.seed)


def check(data: DetectionData, config: DetectionConfig) -> list[str]:
    """Refuse what cannot be trained or scored; say what a reader of the figures should know."""
    usable = len(data.train.with_objects())
    if not usable:
        raise UserError(f"{printable(data.train.name)}: no training image has an object with an area inside the image")
    regions = data.test.table.crowd | data.test.table.difficult
    if regions.all():
        raise UserError(f"{printable(data.test.name)}: the test images have no object to find")
    if config.masks:
        for part, with_crowd in ((data.train, False), (data.test, True)):
            lacking = part.lacking_masks(with_crowd)
            if lacking:
                raise UserError(
                    f"{printable(part.name)}: {lacking} of {len(part.table.ids)} objects have no mask, which "
                    f"{config.recipe} needs: give masks (segmentation), or use a recipe for boxes: jigclu, small"
                )
    notes = [f"train: {note}" for note in data.train.notes + data.train.flaws()]
    notes += [f"test: {note}" for note in data.test.notes]
    if usable < len(data.train) and not config.keep_empty:
        notes.append(f"train: {len(data.train) - usable} of {len(data.train)} images without objects are left out")
    learned, asked = (part.classes_present() for part in (data.train, data.test))
    unknown = [name for name in data.test.classes if name in asked - learned]
    if unknown:
        notes.append(
            f"{len(unknown)} classes of the test images have no training object: {printable(', '.join(unknown))}"
        )
    hopeless = int(((data.test.table.boxes[:, 2:] <= 0).any(axis=1) & ~regions).sum())
    if hopeless:
        notes.append(f"{hopeless} objects of the test images have boxes without an area, which count as missed")
    if data.train.fingerprint == data.test.fingerprint:
        notes.append("train and test are the same images: the figures show how well they are remembered")
    if data.test.table.difficult.any():
        notes.append("difficult objects are ignored in scoring, by COCO's rules for crowds")
    return notes


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
