"""A small classifier as `tessella classify` writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tessella.atlas.classifier import Classifier, Reference, read_classifier, write_classifier
from tessella.weights.resolve import resolve_backbone


def classifier_in(folder: Path) -> Classifier:
    """Three classes, answered for some images, on a network at random init."""
    loaded = resolve_backbone("random:resnet10?width=4&stem=small&size=32")
    dim, rng = loaded.backbone.feature_dim, np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(dim, 2)))[0].T.astype(np.float32)
    known = Reference(centres, ["0.0.0", "0.0.1"], np.linspace(0, 2, 1001, dtype=np.float32))
    made = Classifier(
        loaded, rng.normal(size=(3, dim)), rng.normal(size=3), ["egret", "heron", "stork"], 1.5, 0.86, known
    )
    folder.mkdir()
    write_classifier(folder, made, {"labelled": 40, "accuracy": 0.925, "calibration_error": 0.031})
    return read_classifier(folder)
