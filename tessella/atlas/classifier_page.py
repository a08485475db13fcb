"""classifier.html: what the classifier confuses, how well its confidence is calibrated, which labels look wrong."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessella import files
from tessella.atlas.folder import Atlas
from tessella.atlas.look import LOOK, Thumbnails
from tessella.report.page import render

_CLASSES = 24  # rows of the confusion matrix: those with most mistakes
_SUSPECTS = 60  # that are shown
_SIDE = 64  # pixels of a thumbnail


def write_classifier_page(
    path: Path,
    facts: dict[str, Any],
    keys: list[str],
    rows: NDArray[np.int64],
    y: NDArray[np.int64],
    probability: NDArray[np.float64],
    suspects: NDArray[np.int64],
    atlas: Atlas,
) -> None:
    """Write the page.

    Args:
        path: of the page.
        facts: of classifier.json.
        keys: names of all images of the atlas.
        rows: (n,) of the labelled images.
        y: (n,) their labels.
        probability: (n, classes) from the other folds.
        suspects: places in `rows`, most certain first.
        atlas: for thumbnails.
    """
    classes = facts["classes"]
    confusion = np.array(facts["confusion"])
    mistakes = confusion.sum(axis=1) - confusion.diagonal()
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:_CLASSES])
    largest = max(1, int((confusion - np.diag(confusion.diagonal())).max()))
    matrix = [
        {
            "name": classes[i],
            "images": int(confusion[i].sum()),
            "accuracy": f"{100 * confusion[i, i] / max(1, confusion[i].sum()):.0f} %",
            "cells": [
                {
                    "count": int(confusion[i, j]) or "",
                    "shade": f"{confusion[i, j] / largest:.2f}" if i != j else "",
                    "title": f"{classes[i]} taken for {classes[j]}",
                }
                for j in shown
            ],
        }
        for i in shown
    ]
    pictures = _thumbnails(atlas, rows[suspects[:_SUSPECTS]])
    listed = []
    for place, picture in zip(suspects[:_SUSPECTS].tolist(), pictures, strict=True):
        others = probability[place].copy()
        others[y[place]] = 0
        best = int(others.argmax())
        listed.append(
            {
                "picture": picture,
                "path": keys[rows[place]],
                "label": classes[y[place]],
                "proposed": classes[best],
                "probability": f"{100 * others[best]:.0f} %",
            }
        )
    content = {
        "facts": facts,
        "percent": lambda value: f"{100 * value:.1f} %",
        "matrix": matrix,
        "heads": [classes[i] for i in shown],
        "hidden": len(classes) - len(shown),
        "suspects": listed,
        "more": len(suspects) - len(listed),
    }
    files.write_text(path, render("classifier.html.j2", content))


def _thumbnails(atlas: Atlas, rows: NDArray[np.int64]) -> list[str]:
    """Data addresses of the pictures of some rows of images.parquet."""
    shards = atlas.shards("look", int(atlas.state["images"]))
    readable = np.flatnonzero(shards.column("readable", LOOK))
    pictures = Thumbnails(shards, _SIDE)(readable[rows])
    found = []
    for pixels in pictures:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80)
        found.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii"))
    return found
