"""The papers' ImageNet runs, one function per published variant. Scores are top-1 of the linear probe."""

from __future__ import annotations

import dataclasses

from tessella.data.views import IMAGENET_MEAN, CropGroup, Photometry, ViewSpec
from tessella.engine.config import RunConfig
from tessella.methods.coke import CokeConfig
from tessella.methods.jigclu import JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig
from tessella.methods.swav import OFFICIAL_STD, SwavConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig

_SWAV_LARGE_BATCH = OptimizerConfig(
    name="larc", lr=4.8, weight_decay=1e-6, warmup_epochs=10, warmup_lr=0.3, final_lr=0.0048
)
_SWAV_SMALL_BATCH = OptimizerConfig(name="larc", lr=0.6, weight_decay=1e-6, final_lr=0.0006)
_SMALL_BATCH_METHOD = SwavConfig(queue_length=3840, queue_from_epoch=15, freeze_prototypes_steps=5005)
_COKE_OPTIMIZER = OptimizerConfig(
    name="lars", lr=1.6, weight_decay=1e-6, idle_epochs=1, warmup_epochs=10, warmup_end="next"
)
_JIGCLU_OPTIMIZER = OptimizerConfig(lr=0.03, weight_decay=1e-4, per_epoch=True)


def _crops(*groups: CropGroup) -> ViewSpec:
    return ViewSpec(groups, IMAGENET_MEAN, OFFICIAL_STD)


def _swav(epochs: int, method: SwavConfig | None = None) -> RunConfig:
    return RunConfig(
        method or SwavConfig(), BackboneConfig("resnet50"), _SWAV_LARGE_BATCH, epochs=epochs, batch_size=4096
    )


def swav_imagenet_100ep() -> RunConfig:
    """SwAV, ResNet-50, 2x224 + 6x96 crops, batch 4096, 100 epochs.

    Published: 72.1 (VISSL's rerun 72.0). Source: official script swav_100ep_pretrain, 64 GPUs.
    """
    return _swav(100)


def swav_imagenet_200ep() -> RunConfig:
    """SwAV, ResNet-50, 2x224 + 6x96 crops, batch 4096, 200 epochs.

    Published: 73.9 (VISSL's rerun 73.9). Source: official script swav_200ep_pretrain, 64 GPUs.
    """
    return _swav(200)


def swav_imagenet_400ep() -> RunConfig:
    """SwAV, ResNet-50, 2x224 + 6x96 crops, batch 4096, 400 epochs.

    Published: 74.6 (VISSL's rerun 74.8). Source: official script swav_400ep_pretrain, 64 GPUs.
    """
    return _swav(400)


def swav_imagenet_800ep() -> RunConfig:
    """SwAV, ResNet-50, 2x224 + 6x96 crops, batch 4096, 800 epochs.

    Published: 75.3 (VISSL's rerun 74.9; treat 75.3 as the best of a spread). Source: official script
    swav_800ep_pretrain, 64 GPUs, 3 min 40 s per epoch on V100.
    """
    return _swav(800)


def swav_imagenet_400ep_2x224() -> RunConfig:
    """SwAV, ResNet-50, two 224 crops and no small ones, batch 4096, 400 epochs.

    Published: 70.1 (VISSL's rerun 69.5). Source: official script swav_400ep_2x224_pretrain.
    """
    return _swav(400, SwavConfig(views=_crops(CropGroup(2, 224, (0.08, 1.0)))))


def swav_imagenet_200ep_bs256() -> RunConfig:
    """SwAV, ResNet-50, batch 256 with a queue of 3840 from epoch 15, 200 epochs.

    Published: 72.7 (VISSL's rerun 73.1). Source: official script swav_200ep_bs256_pretrain, 4 GPUs, 52 min per
    epoch on V100.
    """
    return RunConfig(_SMALL_BATCH_METHOD, BackboneConfig("resnet50"), _SWAV_SMALL_BATCH, epochs=200, batch_size=256)


def swav_imagenet_400ep_bs256() -> RunConfig:
    """SwAV, ResNet-50, batch 256 with a queue of 3840 from epoch 15, 400 epochs.

    Published: 74.3 (VISSL's rerun 74.3). Source: official script swav_400ep_bs256_pretrain, 4 GPUs.
    """
    return RunConfig(_SMALL_BATCH_METHOD, BackboneConfig("resnet50"), _SWAV_SMALL_BATCH, epochs=400, batch_size=256)


def swav_imagenet_w2_400ep() -> RunConfig:
    """SwAV, ResNet-50 of double width, 2x224 + 4x96 crops, batch 4096, 400 epochs.

    Published: 77.3 (VISSL's rerun 77.0). Source: official script swav_RN50w2_400ep_pretrain, 128 GPUs.
    """
    method = SwavConfig(hidden_dim=8192, views=_crops(CropGroup(2, 224, (0.14, 1.0)), CropGroup(4, 96, (0.05, 0.14))))
    return RunConfig(method, BackboneConfig("resnet50", 128), _SWAV_LARGE_BATCH, epochs=400, batch_size=4096)


def swav_imagenet_w4_400ep() -> RunConfig:
    """SwAV, ResNet-50 of fourfold width, 2x224 + 4x96 crops, batch 2560 with a queue of 2560, 400 epochs.

    Published: 77.9 (VISSL's rerun 77.0). Source: official script swav_RN50w4_400ep_pretrain, 64 GPUs.
    """
    crops = _crops(CropGroup(2, 224, (0.08, 1.0)), CropGroup(4, 96, (0.08, 0.14)))
    method = SwavConfig(hidden_dim=8192, queue_length=2560, queue_from_epoch=0, views=crops)
    return RunConfig(method, BackboneConfig("resnet50", 256), _SWAV_LARGE_BATCH, epochs=400, batch_size=2560)


def jigclu_imagenet_200ep() -> RunConfig:
    """JigClu, ResNet-50, montages of 2x2 tiles of 112 pixels, batch 256, 200 epochs.

    Published: 66.4. Source: official README, 4 GPUs, about 5 days on 2080 Ti. One forward per image.
    """
    return RunConfig(JigcluConfig(), BackboneConfig("resnet50"), _JIGCLU_OPTIMIZER, epochs=200, batch_size=256)


def mejigclu_imagenet_200ep() -> RunConfig:
    """MEJigClu, ResNet-50, montages of 2x2 tiles with random overlap, 256 categories, batch 256, 200 epochs.

    Published: 66.8; fine-tuned on 1 % and 10 % of the labels 41.2 and 63.2; COCO box AP 40.0. Source: the paper's
    tables; settings that it does not print are JigClu's. One forward per image.
    """
    return RunConfig(MejigcluConfig(), BackboneConfig("resnet50"), _JIGCLU_OPTIMIZER, epochs=200, batch_size=256)


def mejigclu_imagenet_200ep_fixed_overlap() -> RunConfig:
    """MEJigClu with JigClu's fixed overlap of 0.3, ResNet-50, batch 256, 200 epochs: the paper's ablation.

    Published: COCO box AP 39.6 (39.3 with the location branch instead, 40.0 with random overlap); no linear probe.
    Source: the paper's ablation table.
    """
    method = MejigcluConfig(overlap_mode="fixed")
    return RunConfig(method, BackboneConfig("resnet50"), _JIGCLU_OPTIMIZER, epochs=200, batch_size=256)


def _coke(epochs: int, method: CokeConfig) -> RunConfig:
    """The learning rate is the official one for batch 1024; for another batch scale it: 1.6 * batch / 1024."""
    return RunConfig(method, BackboneConfig("resnet50"), _COKE_OPTIMIZER, epochs=epochs, batch_size=1024)


def _coke_pair() -> tuple[CropGroup, CropGroup]:
    """The two large crops, whose colours differ."""
    first = Photometry(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
    second = dataclasses.replace(first, blur=0.1, solarize=0.2)
    return CropGroup(1, 224, (0.08, 1.0), photometry=first), CropGroup(1, 224, (0.08, 1.0), photometry=second)


def coke_imagenet_1000ep_1x224() -> RunConfig:
    """CoKe, ResNet-50, one 224 crop, 3000 + 4000 + 5000 clusters, batch 1024, 1 + 1000 epochs.

    Published: 72.5. Source: official script and README, single view, 8 GPUs. One forward per image. Labels and centres
    are averages over epochs from epoch 801 on.
    """
    return _coke(1001, CokeConfig())


def coke_imagenet_1000ep_2x224() -> RunConfig:
    """CoKe, ResNet-50, two 224 crops, 3000 + 4000 + 5000 clusters, batch 1024, 1 + 1000 epochs.

    Published: 74.9. Source: official script and README, two views, 8 GPUs.
    """
    return _coke(1001, CokeConfig(temperature=0.05, views=ViewSpec(_coke_pair())))


def coke_imagenet_800ep_multicrop() -> RunConfig:
    """CoKe, ResNet-50, 2x224 + 6x96 crops, 3000 + 4000 + 5000 clusters, batch 1024, 1 + 800 epochs.

    Published: 76.4. Source: official script and README, multi-crop, 8 GPUs.
    """
    views = ViewSpec((*_coke_pair(), CropGroup(6, 96, (0.05, 0.6))))
    return _coke(801, CokeConfig(temperature=0.05, views=views))


_SMOG = OptimizerConfig(name="larc", lr=4.8, weight_decay=1e-6, warmup_epochs=10, warmup_lr=0.01, final_lr=0.0048)


def smog_imagenet_400ep() -> RunConfig:
    """SMoG, ResNet-50, per pipeline 2x224 + 4x96 crops, 3 x 3000 groups, batch 4096, 400 epochs.

    Published: 76.4 (paper), 76.6 (README of the released code). Source: pre-training script of the released code,
    64 GPUs. Two encoders see 2x224 + 4x96 each, one of them without a backward pass. At another batch size regroup
    as often as here: every 300 steps (`--method.regroup-every 300`).
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

    Published: 77.7 (paper), 77.5 (README of the released code). Source: pre-training script of the released code.
    The released network is a Swin-T with a batch norm on the residual path; this is timm's, so expect another figure.
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
