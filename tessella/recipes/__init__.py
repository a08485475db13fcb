"""Recipes: complete runs as functions without arguments. Their names are what `tessella pretrain` takes.

A recipe is one function here, or an entry point `tessella.recipes` of a package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tessella.recipes import imagenet, small
from tessella.registry import Registry
from tessella.run.config import RunConfig

RECIPES: Registry[Callable[[], RunConfig]] = Registry(
    "recipes", {function.__name__: function for function in (*small.RECIPES, *imagenet.RECIPES)}
)


def recipe(name: str) -> RunConfig:
    """The run that `name` stands for.

    Raises:
        UserError: there is no recipe of that name.
    """
    return dataclasses.replace(RECIPES.find(name)(), recipe=name)
