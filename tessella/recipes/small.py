"""Runs for small images: CIFAR, 64 pixels, and minutes on two CPU cores."""

from __future__ import annotations

import dataclasses

from tessella.data.views import CIFAR10_MEAN, CIFAR10_STD, CropGroup, Photometry, ViewSpec
from tessella.engine.config import RunConfig
from tessella.methods.coke import CokeConfig
from tessella.methods.jigclu import JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig, two_pipelines
from tessella.methods.swav import SwavConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig

# Milder colours than on ImageNet, and no blur on so few pixels: what users of SwAV on CIFAR found decisive.
_MILD = Photometry(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)

_NARROW = BackboneConfig("resnet10", 16, "small")
_QUICK = OptimizerConfig("adamw", lr=3e-3, weight_decay=1e-4, warmup_epochs=2, warmup_lr=3e-4, final_lr=3e-6)


def swav_cpu() -> RunConfig:
    """SwAV on 32-pixel images, minutes on two cores: a narrow ResNet-10, two crops, 30 prototypes.

    Ours, for trying things out; nothing published compares.
    """
    method = SwavConfig(
        prototypes=30,
        hidden_dim=512,
        epsilon=0.03,
        freeze_prototypes_steps=40,
        views=ViewSpec((CropGroup(2, 32, (0.25, 1.0), photometry=_MILD),), CIFAR10_MEAN, CIFAR10_STD),
    )
    optimizer = dataclasses.replace(_QUICK, weight_decay=0.1)
    return RunConfig(method, _NARROW, optimizer, epochs=60, batch_size=128, image_size=32)


def jigclu_cpu() -> RunConfig:
    """JigClu on 32-pixel images, minutes on two cores: a narrow ResNet-10, montages of 16-pixel tiles.

    Ours, for trying things out; nothing published compares.
    """
    method = JigcluConfig(tile_size=16, photometry=_MILD, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    optimizer = OptimizerConfig("sgd", lr=0.06, weight_decay=5e-4, warmup_epochs=2, warmup_lr=6e-3, final_lr=6e-5)
    return RunConfig(method, _NARROW, optimizer, epochs=60, batch_size=128, image_size=32)


def mejigclu_cpu() -> RunConfig:
    """MEJigClu on 32-pixel images, minutes on two cores: a narrow ResNet-10, montages of 16-pixel tiles.

    Ours, for trying things out; nothing published compares.
    """
    method = MejigcluConfig(tile_size=16, photometry=_MILD, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    return RunConfig(method, _NARROW, _QUICK, epochs=70, batch_size=128, image_size=32)


def coke_cpu() -> RunConfig:
    """CoKe on 32-pixel images, minutes on two cores: a narrow ResNet-10, two crops, 20, 30 and 40 clusters.

    Ours, for trying things out; nothing published compares. The first epoch only clusters, at learning rate 0.
    """
    method = CokeConfig(
        centres=(20, 30, 40),
        temperature=0.05,
        dual_lr="auto",
        views=ViewSpec((CropGroup(2, 32, (0.25, 1.0), photometry=_MILD),), CIFAR10_MEAN, CIFAR10_STD),
    )
    optimizer = dataclasses.replace(_QUICK, idle_epochs=1)
    return RunConfig(method, _NARROW, optimizer, epochs=41, batch_size=128, image_size=32)


def smog_cpu() -> RunConfig:
    """SMoG on 32-pixel images, minutes on two cores: a narrow ResNet-10, two crops per pipeline, 3 x 50 groups.

    Ours, for trying things out; nothing published compares. No blur, solarisation in pipeline B alone; momenta that
    suit a run of a few thousand steps.
    """
    method = SmogConfig(
        groups=50,
        hidden_dim=512,
        momentum=0.99,
        views=two_pipelines(
            (CropGroup(2, 32, (0.25, 1.0)),),
            _MILD,
            dataclasses.replace(_MILD, solarize=0.2),
            CIFAR10_MEAN,
            CIFAR10_STD,
        ),
    )
    return RunConfig(method, _NARROW, _QUICK, epochs=30, batch_size=128, image_size=32)


def swav_digits() -> RunConfig:
    """SwAV on scikit-learn's handwritten digits, half a minute on two cores: the run of `tessella demo`.

    Ours. Crops stay large and digits are not mirrored, because a mirrored or halved digit is another digit.
    """
    photometry = Photometry(flip=0.0, brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0, gray=0.0, blur=0.0)
    method = SwavConfig(
        prototypes=15,
        hidden_dim=512,
        freeze_prototypes_steps=20,
        views=ViewSpec((CropGroup(2, 16, (0.4, 1.0), photometry=photometry),), (0.3,) * 3, (0.35,) * 3),
    )
    return RunConfig(method, _NARROW, _QUICK, data="digits::train", epochs=50, batch_size=128, image_size=16)
