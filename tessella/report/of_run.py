"""The page of a run, from the run alone: opens its images, its views and its clusters, and writes what there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessella.console import note
from tessella.data.sources import ImageSet, open_images
from tessella.engine.launch import cores_at_hand, pick_device
from tessella.errors import UserError
from tessella.evaluation.evaluate import assign
from tessella.methods import views_of
from tessella.protocols.features import extract
from tessella.report.run import write_report
from tessella.run.config import load_config
from tessella.run.folder import RunFolder
from tessella.weights.resolve import resolve_backbone

_CLUSTERED_IMAGES = 20_000  # enough to see the clusters; a page should not take an epoch


def report(run: Path, *, data: str | None = None, images: ImageSet | None = None, device: str = "auto") -> Path:
    """Write RUN/report.html with all that can be shown; what is missing is said and left out.

    Args:
        run: a run folder.
        data: the images, if they lie elsewhere now, or must be downloaded: what only the run names never is.
        images: what it was trained on, if that has no name on disk.
        device: where the cluster of each image is computed.

    Returns:
        The path of the page.

    Raises:
        UserError: not a run folder, or it cannot be written to.
    """
    config = load_config(run / "config.yaml")
    clusters = None
    try:
        if images is None:
            images = RunFolder(run).open_images(config, download=False) if data is None else open_images(data)
        clusters = _clusters(run, images, device)
    except UserError as error:  # a page without pictures is better than none
        note(f"the page shows less: {error}")
    return write_report(run, images=images, spec=views_of(config.method), clusters=clusters)


def _clusters(run: Path, images: ImageSet, device: str) -> NDArray[np.int64] | None:
    """The method's own cluster of each image, -1 for images beyond an evenly spaced part of a large set."""
    loaded = resolve_backbone(str(run))
    if loaded.method is None or not loaded.method.clusters:
        return None
    chosen = np.linspace(0, len(images) - 1, min(len(images), _CLUSTERED_IMAGES)).round().astype(np.int64)
    on = pick_device(device)
    features = extract(
        loaded.backbone, images, loaded.transform, rows=chosen, device=on, workers=cores_at_hand(), title="clusters"
    )
    clusters = np.full(len(images), -1)
    clusters[features.rows] = assign(loaded.method, features.x, on).numpy()
    return clusters
