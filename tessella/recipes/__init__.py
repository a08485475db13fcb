"""Recipes: complete runs as functions without arguments. `tessella pretrain` takes their names.

A recipe is a function in one of these modules with its name below, or an entry point `tessella.recipes` of a package.
Names are looked up before torch is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from tessella.registry import Registry

if TYPE_CHECKING:
    from tessella.run.config import RunConfig

_MODULES = {
    "small": (
        "swav_cpu",
        "jigclu_cpu",
        "mejigclu_cpu",
        "coke_cpu",
        "smog_cpu",
        "swav_digits",
        "swav_cifar10",
        "swav_cifar100",
        "swav_64px",
        "jigclu_cifar10",
        "jigclu_cifar100",
        "jigclu_64px",
        "mejigclu_cifar10",
        "mejigclu_cifar100",
        "mejigclu_64px",
        "smog_cifar10",
        "smog_cifar100",
        "smog_64px",
        "coke_cifar10",
        "coke_cifar100",
        "coke_64px",
        "coke_cifar10_clustering",
    ),
    "imagenet": (
        "swav_imagenet_100ep",
        "swav_imagenet_200ep",
        "swav_imagenet_400ep",
        "swav_imagenet_800ep",
        "swav_imagenet_400ep_2x224",
        "swav_imagenet_200ep_bs256",
        "swav_imagenet_400ep_bs256",
        "swav_imagenet_w2_400ep",
        "swav_imagenet_w4_400ep",
        "swav_imagenet_w5_400ep",
        "swav_imagenet_deit_b_300ep",
        "jigclu_imagenet_200ep",
        "mejigclu_imagenet_200ep",
        "mejigclu_imagenet_200ep_fixed_overlap",
        "coke_imagenet_1000ep_1x224",
        "coke_imagenet_1000ep_2x224",
        "coke_imagenet_800ep_multicrop",
        "smog_imagenet_400ep",
        "smog_imagenet_w2_400ep",
        "smog_imagenet_swin_tiny_400ep",
    ),
}

RECIPES: Registry[Callable[[], RunConfig]] = Registry(
    "recipes",
    {
        name: EntryPoint(name, f"tessella.recipes.{module}:{name}", "tessella.recipes")
        for module, names in _MODULES.items()
        for name in names
    },
)


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe.

    Raises:
        UserError: there is no recipe of that name.
    """
    return dataclasses.replace(RECIPES.find(name)(), recipe=name)
