"""A small recipe for SimSiam."""

from __future__ import annotations

from tessella.data.views import ColorAugmentation, CropGroup, ViewSpec
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.run.config import RunConfig
from tessella_simsiam.method import SimSiamConfig


def simsiam_cpu() -> RunConfig:
    """SimSiam on 32-pixel images, minutes on two cores: a narrow ResNet-10, two crops.

    Nothing published compares.
    """
    colours = ColorAugmentation(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    crops = ViewSpec((CropGroup(2, 32, (0.25, 1.0), colors=colours),))
    return RunConfig(
        SimSiamConfig(embedding_dim=256, predictor_dim=64, views=crops),
        BackboneConfig("resnet10", width=16, stem="small"),
        OptimizerConfig("sgd", lr=0.05, weight_decay=5e-4),
        epochs=20,
        batch_size=128,
        image_size=32,
    )
