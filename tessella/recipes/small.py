"""Runs for small images: CIFAR, 64 pixels, and minutes on two CPU cores."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from tessella.data.views import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorAugmentation,
    CropGroup,
    ViewSpec,
)
from tessella.methods import MethodConfig
from tessella.methods.coke import CokeConfig
from tessella.methods.jigclu import JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig, two_pipelines
from tessella.methods.swav import SwavConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.run.config import RunConfig

# Milder colours than on ImageNet, and no blur on so few pixels: what users of SwAV on CIFAR found decisive.
_MILD = ColorAugmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)

_NARROW = BackboneConfig("resnet10", 16, "small")
_QUICK = OptimizerConfig("adamw", lr=3e-3, weight_decay=1e-4, warmup_epochs=2, warmup_lr=3e-4, final_lr=3e-6)
_QUICK_SGD = OptimizerConfig("sgd", lr=0.06, weight_decay=5e-4, warmup_epochs=2, warmup_lr=6e-3, final_lr=6e-5)


def swav_cpu() -> RunConfig:
    """SwAV on 32-pixel images, minutes on two cores: a narrow ResNet-10, two crops, 30 prototypes.

    Ours, for trying things out; nothing published compares.
    """
    method = SwavConfig(
        prototypes=30,
        hidden_dim=512,
        epsilon=0.03,
        freeze_prototypes_steps=40,
        views=ViewSpec((CropGroup(2, 32, (0.25, 1.0), colors=_MILD),), CIFAR10_MEAN, CIFAR10_STD),
    )
    optimizer = dataclasses.replace(_QUICK, weight_decay=0.1)
    return RunConfig(method, _NARROW, optimizer, epochs=60, batch_size=128, image_size=32)


def jigclu_cpu() -> RunConfig:
    """JigClu on 32-pixel images, minutes on two cores: a narrow ResNet-10, montages of 16-pixel tiles.

    Ours, for trying things out; nothing published compares.
    """
    method = JigcluConfig(tile_size=16, colors=_MILD, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    return RunConfig(method, _NARROW, _QUICK_SGD, epochs=60, batch_size=128, image_size=32)


def mejigclu_cpu() -> RunConfig:
    """MEJigClu on 32-pixel images, minutes on two cores: a narrow ResNet-10, montages of 16-pixel tiles.

    Ours, for trying things out; nothing published compares.
    """
    method = MejigcluConfig(tile_size=16, colors=_MILD, mean=CIFAR10_MEAN, std=CIFAR10_STD, category_hidden=512)
    return RunConfig(method, _NARROW, _QUICK_SGD, epochs=40, batch_size=128, image_size=32)


def coke_cpu() -> RunConfig:
    """CoKe on 32-pixel images, minutes on two cores: a narrow ResNet-10, one crop, 20, 30 and 40 clusters.

    Ours, for trying things out; nothing published compares. The first epoch only clusters, at learning rate 0. In so
    short a run labels alone teach more than labels and a second view, whose agreement comes cheap to weak features.
    """
    method = CokeConfig(
        centres=(20, 30, 40),
        dual_lr="auto",
        views=ViewSpec((CropGroup(1, 32, (0.2, 1.0), colors=_MILD),), CIFAR10_MEAN, CIFAR10_STD),
    )
    optimizer = dataclasses.replace(_QUICK, weight_decay=0.1, zero_lr_epochs=1)
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
    return RunConfig(method, _NARROW, _QUICK, epochs=20, batch_size=128, image_size=32)


def swav_digits() -> RunConfig:
    """SwAV on scikit-learn's handwritten digits, half a minute on two cores: the run of `tessella demo`.

    Ours. Crops stay large and digits are not mirrored, because a mirrored or halved digit is another digit.
    """
    colors = ColorAugmentation(flip=0.0, brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0, gray=0.0, blur=0.0)
    method = SwavConfig(
        prototypes=15,
        hidden_dim=512,
        freeze_prototypes_steps=20,
        views=ViewSpec((CropGroup(2, 16, (0.4, 1.0), colors=colors),), (0.3,) * 3, (0.35,) * 3),
    )
    return RunConfig(method, _NARROW, _QUICK, data="digits::train", epochs=50, batch_size=128, image_size=16)


# --- ResNet-18 on a GPU: CIFAR and folders of 64-pixel images --------------------------------------------------
#
# Proposals from what others have published or found; none of them has been run to its end by us.


class _Images(NamedTuple):
    """The images of a recipe, and the network for their size."""

    data: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stem: Literal["small", "small-pool"]
    blur: float  # chance; on 32 pixels hardly anything would be left

    def run(self, method: MethodConfig, optimizer: OptimizerConfig, epochs: int, batch_size: int) -> RunConfig:
        return RunConfig(
            method,
            BackboneConfig("resnet18", stem=self.stem),
            optimizer,
            data=self.data,
            epochs=epochs,
            batch_size=batch_size,
            image_size=self.size,
        )

    def views(self, *groups: CropGroup) -> ViewSpec:
        return ViewSpec(groups, self.mean, self.std)

    def colours(self, saturation: float = 0.4, solarize: float = 0.0) -> ColorAugmentation:
        """Half of SwAV's strength: what its users found decisive on CIFAR."""
        return ColorAugmentation(
            brightness=0.4,
            contrast=0.4,
            saturation=saturation,
            hue=0.1,
            blur=self.blur,
            blur_sigma=(0.1, 1.0),
            solarize=solarize,
        )


_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)

_CIFAR10 = _Images("cifar10", 32, CIFAR10_MEAN, CIFAR10_STD, "small", blur=0.0)
_CIFAR100 = _Images("cifar100", 32, _CIFAR100_MEAN, _CIFAR100_STD, "small", blur=0.0)
_FOLDER = _Images("", 64, IMAGENET_MEAN, IMAGENET_STD, "small-pool", blur=0.5)


def _swav(images: _Images, prototypes: int, freeze: int) -> RunConfig:
    crops = images.views(CropGroup(2, images.size, (0.14, 1.0), colors=images.colours()))
    method = SwavConfig(prototypes=prototypes, hidden_dim=512, freeze_prototypes_steps=freeze, views=crops)
    # 0.001 at batch 128, in proportion. The decay is published for Adam, where it is an L2 term; it is tiny either way.
    optimizer = OptimizerConfig("adamw", lr=4e-3, weight_decay=1e-6)
    return images.run(method, optimizer, epochs=200, batch_size=512)


def swav_cifar10() -> RunConfig:
    """SwAV, CIFAR-10, ResNet-18 with a small stem, two crops of 32 pixels, 512 prototypes, batch 512, 200 epochs.

    AdamW at 0.004, cosine to 0. Crops of 14 to 100 % of the area, colours at half strength, no blur, no queue;
    prototypes are frozen for one epoch.
    Not run to its end by us. Published by others, with other code: kNN 84.2. Source: lightly's CIFAR-10 benchmark,
    whose figure is the best of its epochs. After 1000 epochs with LARS, 3000 prototypes and a queue solo-learn has
    89.17 (linear).
    """
    return _swav(_CIFAR10, prototypes=512, freeze=97)


def swav_cifar100() -> RunConfig:
    """SwAV, CIFAR-100, ResNet-18 with a small stem, two crops of 32 pixels, 1000 prototypes, batch 512, 200 epochs.

    Settings of `swav_cifar10`, with the ten prototypes per class that SwAV's users advise. A proposal, not run to its
    end by us. After 1000 epochs with LARS, 3000 prototypes and a queue solo-learn has 64.88 (linear).
    """
    return _swav(_CIFAR100, prototypes=1000, freeze=97)


def swav_64px() -> RunConfig:
    """SwAV, any folder of 64-pixel images, ResNet-18, two crops of 64 pixels, 500 prototypes, batch 512, 200 epochs.

    Settings of `swav_cifar10`, with some blur and a 2x2 max-pool in the stem. Made for some 100,000 images; use
    about ten times as many prototypes as kinds of things that you expect. A proposal, not run to its end by us.
    """
    return _swav(_FOLDER, prototypes=500, freeze=200)


# Both montage methods. 0.03 to 0.12 and 1e-4 to 5e-4 are worth a sweep.
_MONTAGE = OptimizerConfig("sgd", lr=0.06, weight_decay=5e-4, warmup_epochs=10)


def _montage(kind: type[JigcluConfig] | type[MejigcluConfig], images: _Images) -> RunConfig:
    method = kind(tile_size=images.size // 2, colors=images.colours(), mean=images.mean, std=images.std)
    return images.run(method, _MONTAGE, epochs=400, batch_size=256)


def jigclu_cifar10() -> RunConfig:
    """JigClu, CIFAR-10, ResNet-18 with a small stem, montages of 2x2 tiles of 16 pixels, batch 256, 400 epochs.

    SGD at 0.06 after 10 epochs from 0, cosine to 0. Tiles of 80 % of each side, a crop of 20 to 100 % of each, mild
    colours, no blur. Tiles of 32 pixels (`--method.tile-size 32`) cost four times as much and are likely to be better.
    A proposal, not run to its end by us. One forward per image.
    """
    return _montage(JigcluConfig, _CIFAR10)


def jigclu_cifar100() -> RunConfig:
    """JigClu, CIFAR-100, ResNet-18 with a small stem, montages of 2x2 tiles of 16 pixels, batch 256, 400 epochs.

    Settings of `jigclu_cifar10`. A proposal, not run to its end by us. One forward per image.
    """
    return _montage(JigcluConfig, _CIFAR100)


def jigclu_64px() -> RunConfig:
    """JigClu, any folder of 64-pixel images, ResNet-18, montages of 2x2 tiles of 32 pixels, batch 256, 400 epochs.

    Settings of `jigclu_cifar10`, with some blur and a 2x2 max-pool in the stem. A proposal, not run to its end by us.
    One forward per image.
    """
    return _montage(JigcluConfig, _FOLDER)


def mejigclu_cifar10() -> RunConfig:
    """MEJigClu, CIFAR-10, ResNet-18 with a small stem, montages of 2x2 tiles of 16 pixels, batch 256, 400 epochs.

    Schedule and colours as in `jigclu_cifar10`; tiles of 65 to 95 % of each side; 256 categories of 195 images, few
    enough to be memorised. If `category_accuracy` passes 0.9 before half of the run, try
    `--method.category-weight 0.2`. A proposal, not run to its end by us. One forward per image.
    """
    return _montage(MejigcluConfig, _CIFAR10)


def mejigclu_cifar100() -> RunConfig:
    """MEJigClu, CIFAR-100, ResNet-18 with a small stem, montages of 2x2 tiles of 16 pixels, batch 256, 400 epochs.

    Settings of `mejigclu_cifar10`. A proposal, not run to its end by us. One forward per image.
    """
    return _montage(MejigcluConfig, _CIFAR100)


def mejigclu_64px() -> RunConfig:
    """MEJigClu, any folder of 64-pixel images, ResNet-18, montages of 2x2 tiles of 32 pixels, batch 256, 400 epochs.

    Settings of `mejigclu_cifar10`, with some blur and a 2x2 max-pool in the stem. A category should have 50 images or
    more: for a folder of fewer than 12,800 take a smaller batch, images / 50. A proposal, not run to its end by us. One
        forward per image.
    """
    return _montage(MejigcluConfig, _FOLDER)


def _smog(images: _Images, groups: int) -> RunConfig:
    crops = (CropGroup(2, images.size, (0.2, 1.0)),)
    a = images.colours(saturation=0.2)
    b = images.colours(saturation=0.2, solarize=0.2)
    if images.blur:  # as on ImageNet, the pipelines differ in it
        a, b = dataclasses.replace(a, blur=1.0), dataclasses.replace(b, blur=0.1)
    method = SmogConfig(groups=groups, momentum=0.99, views=two_pipelines(crops, a, b, images.mean, images.std))
    optimizer = OptimizerConfig("sgd", lr=0.06, weight_decay=5e-4, warmup_epochs=10)
    return images.run(method, optimizer, epochs=200, batch_size=256)


def smog_cifar10() -> RunConfig:
    """SMoG, CIFAR-10, ResNet-18 with a small stem, two crops of 32 pixels per pipeline, batch 256, 200 epochs.

    SGD at 0.06 after 10 epochs from 0, cosine to 0. 3 x 300 groups, rebuilt every epoch. Crops of 20 to 100 % of the
    area, mild colours, no blur; pipeline B solarises one time in five.
    A proposal that we have not run to its end. Published by others, with one set of groups, batch 128 and a constant
    group momentum: kNN 74.3. Source: lightly's CIFAR-10 benchmark, whose implementation departs from the released code;
    a floor, not a target.
    """
    return _smog(_CIFAR10, groups=300)


def smog_cifar100() -> RunConfig:
    """SMoG, CIFAR-100, ResNet-18 with a small stem, two crops of 32 pixels per pipeline, batch 256, 200 epochs.

    Settings of `smog_cifar10` with 3 x 500 groups. A proposal, not run to its end by us.
    """
    return _smog(_CIFAR100, groups=500)


def smog_64px() -> RunConfig:
    """SMoG, any folder of 64-pixel images, ResNet-18, two crops of 64 pixels per pipeline, batch 256, 200 epochs.

    Settings of `smog_cifar10` with 3 x 500 groups, blur as on ImageNet but weaker, and a 2x2 max-pool in the stem. Made
    for some 100,000 images; of fewer than 5,000 make fewer groups. A proposal, not run to its end by us.
    """
    return _smog(_FOLDER, groups=500)


def _coke_pair(
    images: _Images, scale: tuple[float, float], first: ColorAugmentation, second: ColorAugmentation
) -> ViewSpec:
    """Two crops whose colours differ."""
    return images.views(*(CropGroup(1, images.size, scale, colors=colours) for colours in (first, second)))


def _coke(images: _Images, centres: tuple[int, ...], least_area: float) -> RunConfig:
    first = images.colours(saturation=0.2)
    second = images.colours(saturation=0.2, solarize=0.2)
    if images.blur:
        first, second = dataclasses.replace(first, blur=1.0), dataclasses.replace(second, blur=0.1)
    views = _coke_pair(images, (least_area, 1.0), first, second)
    method = CokeConfig(centres=centres, temperature=0.05, dual_lr="auto", views=views)
    optimizer = OptimizerConfig("sgd", lr=0.2, weight_decay=1e-4, zero_lr_epochs=1, warmup_epochs=10, warmup_end="next")
    return images.run(method, optimizer, epochs=401, batch_size=256)


def coke_cifar10() -> RunConfig:
    """CoKe, CIFAR-10, ResNet-18 with a small stem, two crops of 32 pixels, batch 256, 1 + 400 epochs.

    SGD: an epoch at 0 that only clusters, 10 epochs up to 0.2, cosine to 0; 0.1 to 0.4 are worth a sweep. 100 + 150 +
    200 clusters of some 250 to 500 images. Crops of 30 to 100 % of the area, mild colours, no blur; the second crop is
    solarised one time in five. A proposal, not run to its end by us.
    """
    return _coke(_CIFAR10, centres=(100, 150, 200), least_area=0.3)


def coke_cifar100() -> RunConfig:
    """CoKe, CIFAR-100, ResNet-18 with a small stem, two crops of 32 pixels, batch 256, 1 + 400 epochs.

    Settings of `coke_cifar10` with crops of 20 to 100 % of the area. A proposal, not run to its end by us.
    """
    return _coke(_CIFAR100, centres=(100, 150, 200), least_area=0.2)


def coke_64px() -> RunConfig:
    """CoKe, any folder of 64-pixel images, ResNet-18, two crops of 64 pixels, batch 256, 1 + 400 epochs.

    Settings of `coke_cifar100` with blur as on ImageNet but weaker, and a 2x2 max-pool in the stem. 250 + 300 + 400
    clusters, made for some 100,000 images: choose one per 250 to 450 of yours. A proposal, not run to its end by us.
    """
    return _coke(_FOLDER, centres=(250, 300, 400), least_area=0.2)


def coke_cifar10_clustering() -> RunConfig:
    """CoKe, CIFAR-10, clusters to look at: ten clusterings of 10, 20, ... 100, batch 128, 1 + 400 epochs.

    ResNet-18 with a small stem, two crops of 32 pixels of 30 to 100 % of the area, ImageNet's colours with blur and
    solarisation. SGD: an epoch at 0 that only clusters, 10 epochs up to 0.2, cosine to 0. Clusters get at least 0.9 of
    an even share; duals move at 0.1. The first clustering names an image's cluster.
    Published: clustering accuracy 85.7, NMI 76.6, ARI 73.2 on the train split, with settings that are not public.
    Source: these are the settings of the authors' later clustering code; its heads (one hidden layer, no predictor) we
    do not have, so a figure of this recipe is our protocol's. Not run to its end by us.
    """
    first = ColorAugmentation(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
    second = dataclasses.replace(first, blur=0.1, solarize=0.2)
    method = CokeConfig(
        centres=tuple(range(10, 101, 10)),
        temperature=0.05,
        ratio=0.9,
        dual_lr=0.1,
        views=_coke_pair(_CIFAR10, (0.3, 1.0), first, second),
    )
    optimizer = OptimizerConfig("sgd", lr=0.2, weight_decay=1e-4, zero_lr_epochs=1, warmup_epochs=10, warmup_end="next")
    return _CIFAR10.run(method, optimizer, epochs=401, batch_size=128)
