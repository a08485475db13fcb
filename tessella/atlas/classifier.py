"""A classifier on disk: backbone, linear layer, temperature, confidence; and the clusters that it comes from.

classifier.json          classes, figures, settings
classifier.safetensors   weight (classes, d), bias (classes,) for unit features; centres and distances of the clusters
backbone.safetensors     the network, with its transform
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella import files
from tessella.atlas.folder import Atlas
from tessella.errors import UserError
from tessella.run.backbone_file import read_described, write_backbone, write_described
from tessella.weights.resolve import Loaded, resolve_backbone

FACTS, _WEIGHTS, _BACKBONE = "classifier.json", "classifier.safetensors", "backbone.safetensors"
_FORMAT = 1
_LIMIT = 1 << 26  # bytes of classifier.json
_QUANTILES = 1001


class Reference(NamedTuple):
    """The clusters of an atlas, and how far its images are from them: what new images are compared with."""

    centres: NDArray[np.float32]  # (k, d) unit rows of the fine clusters
    paths: list[str]  # of them
    distances: NDArray[np.float32]  # ascending quantiles of 1 - cosine of the atlas' images to their own centre

    @classmethod
    def of_atlas(cls, atlas: Atlas) -> Reference:
        """As the stages have left it."""
        distance = atlas.table("distance")["distance"]
        return cls(
            atlas.centres(),
            atlas.tree()["fine"],
            np.quantile(distance, np.linspace(0, 1, _QUANTILES)).astype(np.float32),
        )

    def place(self, x: Tensor) -> dict[str, NDArray[Any]]:
        """Where unit rows (n, d) belong.

        Returns:
            `cluster` and `runner_up`, indices into `paths` (-1: there is one cluster), `distance`, `margin` as in
            images.parquet, `outlier_score`: the share of the atlas' images that are nearer to their centre.
        """
        cosine = x @ torch.from_numpy(self.centres).T
        best = cosine.topk(min(2, len(self.paths)), dim=1)
        distance = (1 - best.values[:, 0]).numpy()
        alone = len(self.paths) == 1
        return {
            "cluster": best.indices[:, 0].numpy(),
            "runner_up": np.full(len(x), -1) if alone else best.indices[:, 1].numpy(),
            "distance": distance,
            "margin": np.zeros(len(x), np.float32) if alone else (best.values[:, 0] - best.values[:, 1]).numpy(),
            "outlier_score": (np.searchsorted(self.distances, distance) / len(self.distances)).astype(np.float32),
        }


class Classifier(NamedTuple):
    """What `tessella classify` has learned."""

    loaded: Loaded
    weight: NDArray[np.float64]  # (classes, d), for unit features
    bias: NDArray[np.float64]  # (classes,)
    classes: list[str]
    temperature: float
    confidence: float  # below it, no answer
    reference: Reference

    def probabilities(self, x: Tensor) -> NDArray[np.float64]:
        """(n, d) unit features -> (n, classes) calibrated probabilities."""
        logits = x.double() @ torch.from_numpy(self.weight).T + torch.from_numpy(self.bias)
        return torch.softmax(logits / self.temperature, dim=1).numpy()


def write_classifier(folder: Path, classifier: Classifier, facts: dict[str, Any]) -> None:
    """Write a classifier's files.

    Args:
        folder: exists, without these files.
        classifier: what is written.
        facts: JSON values for classifier.json, for people and programs.
    """
    reference = classifier.reference
    tensors = {
        "weight": torch.from_numpy(classifier.weight),
        "bias": torch.from_numpy(classifier.bias),
        "centres": torch.from_numpy(reference.centres),
        "distances": torch.from_numpy(reference.distances),
    }
    needed = {name: getattr(classifier, name) for name in ("classes", "temperature", "confidence")}
    write_described(folder / _WEIGHTS, tensors, {"format": _FORMAT, "paths": reference.paths} | needed)
    loaded = classifier.loaded
    write_backbone(
        folder / _BACKBONE, loaded.backbone.state_dict(), loaded.config, loaded.transform, {"name": loaded.name}
    )
    files.write_json(folder / FACTS, facts)


def is_classifier(folder: Path) -> bool:
    """Whether a folder is one of `tessella classify`."""
    return (folder / _WEIGHTS).is_file()


def read_classifier(folder: Path) -> Classifier:
    """The inverse of `write_classifier`.

    Raises:
        UserError: it is none, or its files have changed or do not belong together.
    """
    if not is_classifier(folder):
        raise UserError(f"{folder} is no classifier: it has no {_WEIGHTS}; give the --out of `tessella classify`")
    tensors, facts = read_described(folder / _WEIGHTS)
    if facts is None or facts.get("format") != _FORMAT:
        raise UserError(f"{folder / _WEIGHTS} is not of this version of Tessella: classify again")
    loaded = resolve_backbone(str(folder / _BACKBONE))
    k, d = tensors["weight"].shape
    if k != len(facts["classes"]) or d != loaded.backbone.feature_dim or tensors["centres"].shape[1] != d:
        raise UserError(f"the files of {folder} do not belong together: bring them back from one copy")
    return Classifier(
        loaded,
        tensors["weight"].numpy(),
        tensors["bias"].numpy(),
        list(facts["classes"]),
        float(facts["temperature"]),
        float(facts["confidence"]),
        Reference(tensors["centres"].numpy(), list(facts["paths"]), tensors["distances"].numpy()),
    )
