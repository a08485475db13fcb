"""Settings of detectors: the published ones, and small ones of our own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from tessella.errors import UserError
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

_FPN_SIZES = (640, 672, 704, 736, 768, 800)
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
