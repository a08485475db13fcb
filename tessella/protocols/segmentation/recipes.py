"""Settings of segmenters: the published ones, and a small one of our own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

from tessella.ranges import (
    Channels,
    ForwardBatch,
    Fraction,
    FractionBelowOne,
    NonNegative,
    NonNegativeInt,
    Pixels,
    Positive,
    PositiveFraction,
    PositiveInt,
    Range,
    Repeats,
    Seed,
)

_Factor: TypeAlias = Annotated[float, Range(0.01, 100)]


@dataclass(frozen=True)
class CropSpec:
    """What a segmenter sees of a training image, and the size at which it sees a test image."""

    size: Pixels = 512  # pixels of the square crop
    # Longest and shortest side, in pixels, that an image is fitted to, before the random factor and for the test; None:
    # images keep their size.
    resize: tuple[Pixels, Pixels] | None = (2048, 512)
    scale: tuple[_Factor, _Factor] = (0.5, 2.0)  # random factor
    flip: Fraction = 0.5  # chance of a horizontal flip
    most: PositiveFraction = 0.75  # share of the crop's labelled pixels that one class may fill; 1: any
    distort: bool = True  # brightness, contrast, saturation and hue, each with a chance of one half


@dataclass(frozen=True)
class SegmentationConfig:
    """The network, what it sees and how it is trained. The defaults are `fcn-voc12`; `RECIPES` has the others."""

    version: ClassVar[int] = 1
    head: Literal["fcn", "upernet", "linear"] = "fcn"  # linear: on the frozen backbone
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
    # Ours, for images of about 100 to 250 pixels and a narrow ResNet: minutes on two cores. Objects are distinguished
    # from the background early and from each other late, later still with AdamW, a lower learning rate or dropout.
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
