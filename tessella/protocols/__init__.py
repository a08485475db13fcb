"""The protocols: name -> (config class, function).

A protocol is a function (backbone, data, config) -> scores. This is the only table; a new protocol is one
file and one line here. Its config carries a `version`, which grows whenever a change of the code changes a
figure.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from tessella.errors import UserError
from tessella.protocols.clustering import ClusteringConfig, clustering
from tessella.protocols.features import EvalData, EvalTransform
from tessella.protocols.knn import KnnConfig, knn
from tessella.protocols.linear import FewLabelsConfig, LinearConfig, few_labels, linear

__all__ = ["PROTOCOLS", "EvalData", "EvalTransform", "default_config", "protocol_of"]

PROTOCOLS: dict[str, tuple[type, Callable[..., dict[str, Any]]]] = {
    "knn": (KnnConfig, knn),
    "linear": (LinearConfig, linear),
    "fewlabels": (FewLabelsConfig, few_labels),
    "clustering": (ClusteringConfig, clustering),
}

_VARIANTS: dict[str, Any] = {
    "linear-fast": LinearConfig(recipe="fast"),
    "linear-swav": LinearConfig(recipe="swav"),
    "linear-jigclu": LinearConfig(recipe="jigclu"),
}


def default_config(name: str) -> Any:
    """The config behind a name that a user may type: a protocol, or one of the linear probe's recipes.

    Args:
        name: "knn", "linear" (the fast recipe), "linear-swav", "linear-jigclu", "fewlabels", "clustering".

    Raises:
        UserError: the name is unknown.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name][0]()
    if name in _VARIANTS:
        return _VARIANTS[name]
    known = [*PROTOCOLS, *_VARIANTS]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"there is no protocol {name!r}{hint} Known: {', '.join(known)}")


def protocol_of(config: Any) -> tuple[str, Callable[..., dict[str, Any]]]:
    """Name for the record and function of a config: `linear` says its recipe, because the figures differ."""
    for name, (kind, function) in PROTOCOLS.items():
        if type(config) is kind:
            return (f"{name}-{config.recipe}" if isinstance(config, LinearConfig) else name), function
    raise AssertionError(f"{type(config).__name__} is no protocol's config")
