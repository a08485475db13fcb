"""Recipes: complete runs as functions without arguments. Their names are what `tessella pretrain` takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from tessella.errors import UserError
from tessella.recipes import imagenet, small
from tessella.run.config import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {
    name: function
    for module in (small, imagenet)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}


def recipe(name: str) -> RunConfig:
    """The run that `name` stands for.

    Raises:
        UserError: there is no recipe of that name.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 3) or list(RECIPES)[:3]
        raise UserError(f"no recipe {name!r}; did you mean {', '.join(near)}? `tessella recipes` lists all")
    config = RECIPES[name]()
    return RunConfig(**{**vars(config), "recipe": name})
