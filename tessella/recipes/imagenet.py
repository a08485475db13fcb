"""The papers' ImageNet runs, one function per published variant. Scores are top-1 of the linear probe."""

from __future__ import annotations

import dataclasses

from tessella.data.views import IMAGENET_MEAN, ColorAugmentation, CropGroup, ViewSpec
from tessella.methods.coke import CokeConfig
from tessella.methods.jigclu import JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig
from tessella.methods.swav import OFFICIAL_FREEZE, OFFICIAL_RATES, OFFICIAL_STD, SwavConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.run.config import RunConfig

_SMALL_BATCH_METHOD = SwavConfig(queue_length=3840, queue_from_epoch=15, freeze_prototypes_steps=OFFICIAL_FREEZE[256])
_COKE_OPTIMIZER = OptimizerConfig(
    name="lars", lr=1.6, weight_decay=1e-6, zero_lr_epochs=1, warmup_epochs=10, warmup_end="next"
)
_JIGCLU_OPTIMIZER = OptimizerConfig(lr=0.03, weight_decay=1e-4, per_epoch=True)


def _crops(*groups: CropGroup) -> ViewSpec:
    return ViewSpec(groups, IMAGENET_MEAN, OFFICIAL_STD)


def _swav(epochs: int, method: SwavConfig | None = None) -> RunConfig:
    return RunConfig(
        method or SwavConfig(), BackboneConfig("resnet50"), OFFICIAL_RATES[4096], epochs=epochs, batch_size=4096
    )


def swav_imagenet_100ep() -> RunConfig:
    """SwAV, ResNet-50, 2x224 + 6x96 crops, batch 4096, 100 epochs.

    LARC at 4.8 after 10 epochs from 0.3, cosine to 0.0048. Crops of 14 to 100 and 5 to 14 % of the area, strong
    colours, half of them blurred. Prototypes are frozen for about the first epoch.
    Published: 72.1 (VISSL's rerun 71.99). Source: official script swav_100ep_pretrain, 64 GPUs.
    """
    return _swav(100)


def swav_imagenet_200ep() -> RunConfig:
    """SwAV, ResNet-50, 2x224 + 6x96 crops, batch 4096, 200 epochs.

    Schedule and crops as in `swav_imagenet_100ep`.
    Published: 73.9 (VISSL's rerun 73.85). Source: official script swav_200ep_pretrain, 64 GPUs.
    """
    return _swav(200)


def swav_imagenet_400ep() -> RunConfig:
    """SwAV, ResNet-50, 2x224 + 6x96 crops, batch 4096, 400 epochs.

    Schedule and crops as in `swav_imagenet_100ep`.
    Published: 74.6 (VISSL's rerun 74.81). Source: official script swav_400ep_pretrain, 64 GPUs.
    """
    return _swav(400)


def swav_imagenet_800ep() -> RunConfig:
    """SwAV, ResNet-50, 2x224 + 6x96 crops, batch 4096, 800 epochs.

    Schedule and crops as in `swav_imagenet_100ep`.
    Published: 75.3 (VISSL's rerun 74.92; treat 75.3 as the best of a spread); kNN 65.7; fine-tuned on 1 % and 10 % of
    the labels 53.9 and 70.2. Source: official script swav_800ep_pretrain, 64 GPUs, 3 min 40 s per epoch on V100.
    """
    return _swav(800)


def swav_imagenet_400ep_2x224() -> RunConfig:
    """SwAV, ResNet-50, two 224 crops and no small ones, batch 4096, 400 epochs.

    Schedule as in `swav_imagenet_100ep`; crops of 8 to 100 % of the area.
    Published: 70.1 (VISSL's rerun 69.53). Source: official script swav_400ep_2x224_pretrain.
    """
    return _swav(400, SwavConfig(views=_crops(CropGroup(2, 224, (0.08, 1.0)))))


def swav_imagenet_200ep_bs256() -> RunConfig:
    """SwAV, ResNet-50, batch 256 with a queue of 3840 from epoch 15, 200 epochs.

    LARC at 0.6 without warm-up, cosine to 0.0006. Crops as in `swav_imagenet_100ep`. Prototypes are frozen for the
    first epoch. Published: 72.7 (VISSL's rerun 73.07). Source: official script swav_200ep_bs256_pretrain, 4 GPUs, 52
    min per epoch on V100.
    """
    return RunConfig(_SMALL_BATCH_METHOD, BackboneConfig("resnet50"), OFFICIAL_RATES[256], epochs=200, batch_size=256)


def swav_imagenet_400ep_bs256() -> RunConfig:
    """SwAV, ResNet-50, batch 256 with a queue of 3840 from epoch 15, 400 epochs.

    Schedule and crops as in `swav_imagenet_200ep_bs256`.
    Published: 74.3 (VISSL's rerun 74.3). Source: official script swav_400ep_bs256_pretrain, 4 GPUs.
    """
    return RunConfig(_SMALL_BATCH_METHOD, BackboneConfig("resnet50"), OFFICIAL_RATES[256], epochs=400, batch_size=256)


def swav_imagenet_w2_400ep() -> RunConfig:
    """SwAV, ResNet-50 of double width, 2x224 + 4x96 crops, batch 4096, 400 epochs.

    Schedule as in `swav_imagenet_100ep`; crops of 14 to 100 and 5 to 14 % of the area.
    Published: 77.3 (VISSL's rerun 77.01). Source: official script swav_RN50w2_400ep_pretrain, 128 GPUs.
    """
    method = SwavConfig(hidden_dim=8192, views=_crops(CropGroup(2, 224, (0.14, 1.0)), CropGroup(4, 96, (0.05, 0.14))))
    return RunConfig(method, BackboneConfig("resnet50", 128), OFFICIAL_RATES[4096], epochs=400, batch_size=4096)


def swav_imagenet_w4_400ep() -> RunConfig:
    """SwAV, ResNet-50 of fourfold width, 2x224 + 4x96 crops, batch 2560 with a queue of 2560, 400 epochs.

    Schedule as in `swav_imagenet_100ep`, at this batch size, too; crops of 8 to 100 and 8 to 14 % of the area.
    Published: 77.9 (VISSL's rerun 77.03). Source: official script swav_RN50w4_400ep_pretrain, 64 GPUs.
    """
    crops = _crops(CropGroup(2, 224, (0.08, 1.0)), CropGroup(4, 96, (0.08, 0.14)))
    method = SwavConfig(hidden_dim=8192, queue_length=2560, queue_from_epoch=0, views=crops)
    return RunConfig(method, BackboneConfig("resnet50", 256), OFFICIAL_RATES[4096], epochs=400, batch_size=2560)


def swav_imagenet_w5_400ep() -> RunConfig:
    """SwAV, ResNet-50 of fivefold width, 2x224 + 4x96 crops, batch 1536 with a queue of 1536, 400 epochs.

    No official script was released. Batch, queue and a projector without batch norm are those of VISSL's configuration;
    the learning rate is its rule, 0.3 per 256 images, with the warm-up and cosine of `swav_imagenet_100ep`. Unknown:
    the schedule of the published network, and its epochs, for which VISSL's table says 300.
    Published: 78.5. Source: official README; VISSL's configuration resnet50_w5, 128 GPUs.
    """
    crops = _crops(CropGroup(2, 224, (0.14, 1.0)), CropGroup(4, 96, (0.05, 0.14)))
    method = SwavConfig(hidden_dim=10240, head_norm=False, queue_length=1536, queue_from_epoch=0, views=crops)
    optimizer = dataclasses.replace(OFFICIAL_RATES[4096], lr=1.8, final_lr=0.0018)
    return RunConfig(method, BackboneConfig("resnet50", 320), optimizer, epochs=400, batch_size=1536)


def swav_imagenet_deit_b_300ep() -> RunConfig:
    """SwAV, DeiT-B/16 with stochastic depth 0.1, two 224 crops, batch 256, 300 epochs.

    AdamW at 0.00025 (0.0005 per 512 images) after 5 % of the run from 0.000125, then a cosine to 0.0000005, both ends
    as VISSL scales the configured ones for this batch at run time. Crops of 14 to 100 % of the area. Missing here:
    RandAugment, random erasing, mixup and cutmix, of which the configured colour jitter is what remains. Otherwise than
    there: 12 attention heads, not 16, and no weight decay on norms and biases, either.
    Published: no accuracy. Source: VISSL's configuration vision_transformer/swav/deit_b_2nodes, 16 GPUs.
    """
    colours = ColorAugmentation(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, gray=0.0, blur=0.0)
    method = SwavConfig(views=ViewSpec((CropGroup(2, 224, (0.14, 1.0), colors=colours),)))
    optimizer = OptimizerConfig(
        name="adamw",
        lr=2.5e-4,
        weight_decay=0.05,
        decay_norm_and_bias=False,
        warmup_epochs=15,
        warmup_lr=1.25e-4,
        final_lr=5e-7,
    )
    backbone = BackboneConfig("timm:deit_base_patch16_224", drop_path=0.1)
    return RunConfig(method, backbone, optimizer, epochs=300, batch_size=256)


def jigclu_imagenet_200ep() -> RunConfig:
    """JigClu, ResNet-50, montages of 2x2 tiles of 112 pixels, batch 256, 200 epochs.

    SGD at 0.03, cosine by the epoch, no warm-up. Tiles of 80 % of each side, a crop of 20 to 100 % of each, mild
    colours.
    Published: 66.4; fine-tuned on 1 % and 10 % of the labels 40.7 and 63.0; COCO box AP 39.3. Source: official README,
    4 GPUs, about 5 days on 2080 Ti. One forward per image.
    """
    return RunConfig(JigcluConfig(), BackboneConfig("resnet50"), _JIGCLU_OPTIMIZER, epochs=200, batch_size=256)


def mejigclu_imagenet_200ep() -> RunConfig:
    """MEJigClu, ResNet-50, montages of 2x2 tiles with random overlap, 256 categories, batch 256, 200 epochs.

    Schedule and colours as in `jigclu_imagenet_200ep`; tiles of 65 to 95 % of each side, drawn for each image.
    Published: 66.8; fine-tuned on 1 % and 10 % of the labels 41.2 and 63.2; COCO box AP 40.0. Source: the paper's
    tables; settings that it does not print are JigClu's. One forward per image.
    """
    return RunConfig(MejigcluConfig(), BackboneConfig("resnet50"), _JIGCLU_OPTIMIZER, epochs=200, batch_size=256)


def mejigclu_imagenet_200ep_fixed_overlap() -> RunConfig:
    """MEJigClu with JigClu's fixed overlap of 0.3, ResNet-50, batch 256, 200 epochs: the paper's ablation.

    Schedule and views as in `jigclu_imagenet_200ep`.
    Published: COCO box AP 39.6 (39.3 with the location branch instead, 40.0 with random overlap); no linear probe.
    Source: the paper's ablation table.
    """
    method = MejigcluConfig(overlap_mode="fixed")
    return RunConfig(method, BackboneConfig("resnet50"), _JIGCLU_OPTIMIZER, epochs=200, batch_size=256)


def _coke(epochs: int, method: CokeConfig) -> RunConfig:
    """The learning rate is the official one for batch 1024; `recipes.batch` has the rule for another."""
    return RunConfig(method, BackboneConfig("resnet50"), _COKE_OPTIMIZER, epochs=epochs, batch_size=1024)


def _coke_pair() -> tuple[CropGroup, CropGroup]:
    """The two large crops, whose colours differ."""
    first = ColorAugmentation(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
    second = dataclasses.replace(first, blur=0.1, solarize=0.2)
    return CropGroup(1, 224, (0.08, 1.0), colors=first), CropGroup(1, 224, (0.08, 1.0), colors=second)


def coke_imagenet_1000ep_1x224() -> RunConfig:
    """CoKe, ResNet-50, one 224 crop, 3000 + 4000 + 5000 clusters, batch 1024, 1 + 1000 epochs.

    LARS: an epoch at 0 that only clusters, 10 epochs up to 1.6, cosine to 0. Crops of 8 to 100 % of the area, strong
    colours, half of them blurred. Labels and centres are averages over epochs from epoch 801 on.
    Published: 72.5. Source: official script and README, single view, 8 GPUs. One forward per image.
    """
    return _coke(1001, CokeConfig())


def coke_imagenet_1000ep_2x224() -> RunConfig:
    """CoKe, ResNet-50, two 224 crops, 3000 + 4000 + 5000 clusters, batch 1024, 1 + 1000 epochs.

    Schedule as in `coke_imagenet_1000ep_1x224`. Crops of 8 to 100 % of the area, mild colours; one always blurred, the
    other one time in ten, and solarised one time in five.
    Published: 74.9. Source: official script and README, two views, 8 GPUs.
    """
    return _coke(1001, CokeConfig(temperature=0.05, views=ViewSpec(_coke_pair())))


def coke_imagenet_800ep_multicrop() -> RunConfig:
    """CoKe, ResNet-50, 2x224 + 6x96 crops, 3000 + 4000 + 5000 clusters, batch 1024, 1 + 800 epochs.

    Schedule as in `coke_imagenet_1000ep_1x224`, large crops as in `coke_imagenet_1000ep_2x224`; small ones of 5 to 60 %
    of the area, strong colours, half of them blurred.
    Published: 76.4. Source: official script and README, multi-crop, 8 GPUs.
    """
    views = ViewSpec((*_coke_pair(), CropGroup(6, 96, (0.05, 0.6))))
    return _coke(801, CokeConfig(temperature=0.05, views=views))


_SMOG = OptimizerConfig(name="larc", lr=4.8, weight_decay=1e-6, warmup_epochs=10, warmup_lr=0.01, final_lr=0.0048)


def smog_imagenet_400ep() -> RunConfig:
    """SMoG, ResNet-50, per pipeline 2x224 + 4x96 crops, 3 x 3000 groups, batch 4096, 400 epochs.

    LARC at 4.8 after 10 epochs from 0.01, cosine to 0.0048. Crops of 20 to 100 and 5 to 20 % of the area, mild colours;
    pipeline A always blurs, B one time in ten and solarises one time in five. Groups are rebuilt every epoch, which at
    this batch is the paper's 300 steps.
    Published: 76.4 (paper), 76.6 (README of the released code). Source: pre-training script of the released code, 64
    GPUs. Two encoders see 2x224 + 4x96 each, one of them without a backward pass.
    """
    return RunConfig(SmogConfig(), BackboneConfig("resnet50"), _SMOG, epochs=400, batch_size=4096)


def smog_imagenet_w2_400ep() -> RunConfig:
    """SMoG, ResNet-50 of double width, otherwise as `smog_imagenet_400ep`.

    Published: 78.0 (paper, low confidence), 78.3 (README of the released code). Source: pre-training script of the
    released code, 256 GPUs with 16 images each.
    """
    return RunConfig(SmogConfig(), BackboneConfig("resnet50", 128), _SMOG, epochs=400, batch_size=4096)


def smog_imagenet_swin_tiny_400ep() -> RunConfig:
    """SMoG, Swin-T with stochastic depth 0.2, one label crop, 3 x 3000 groups of 256 values, batch 4096, 400 epochs.

    AdamW at 0.001 after 10 epochs from 4e-5, cosine to 4e-5, decay 0.05, gradient norm at most 3. Pipelines as in
    `smog_imagenet_400ep`.
    Published: 77.7 (paper), 77.5 (README of the released code). Source: pre-training script of the released code. The
    released network is a Swin-T with a batch norm on the residual path; this is timm's, so expect another figure.
    """
    method = SmogConfig(embedding_dim=256, activation="gelu", label_crops=1, max_gradient_norm=3.0)
    backbone = BackboneConfig("timm:swin_tiny_patch4_window7_224", drop_path=0.2)
    optimizer = OptimizerConfig(
        name="adamw",
        lr=1e-3,
        weight_decay=0.05,
        decay_norm_and_bias=False,
        warmup_epochs=10,
        warmup_lr=4e-5,
        final_lr=4e-5,
    )
    return RunConfig(method, backbone, optimizer, epochs=400, batch_size=4096)
