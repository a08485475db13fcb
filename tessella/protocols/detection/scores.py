"""COCO's average precision, by pycocotools, and files of what was detected for other programs to score."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Literal

import numpy as np

from tessella.errors import UserError

# Our names for the places of COCOeval's summary.
_SUMMARY = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}


def average_precision(
    truth: dict[str, Any], found: list[dict[str, Any]], kind: Literal["bbox", "segm"]
) -> tuple[dict[str, float], dict[str, float]]:
    """Average precision over IoU 0.50, 0.55, ... 0.95, classes and recalls, at most 100 detections per image.

    Args:
        truth: ground truth in COCO's format; crowd regions are neither found nor missed.
        found: detections: image_id, category_id, score, and bbox [left, top, width, height] or segmentation.
        kind: what is compared, boxes or masks.

    Returns:
        Figures in [0, 1]: ap, ap50, ap75, ap_small (below 32² pixels), ap_medium, ap_large (from 96²), ar100, without
        those of sizes that no object has; and the ap of each class that has objects, by name.

    Raises:
        UserError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise UserError("detection is scored by pycocotools: pip install 'tessella[eval]'") from None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        expected = COCO()
        expected.dataset = truth
        expected.createIndex()
        if found:
            detected = expected.loadRes([dict(entry) for entry in found])  # copies: it adds fields
        else:
            detected = COCO()
            detected.dataset = {**truth, "annotations": []}
            detected.createIndex()
        scorer = COCOeval(expected, detected, kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    figures = {name: float(scorer.stats[i]) for name, i in _SUMMARY.items() if scorer.stats[i] >= 0}
    precision = scorer.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; -1 where a class has no object
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    per_class = {
        names[number]: float(np.mean(precision[:, :, k]))
        for k, number in enumerate(scorer.params.catIds)
        if (precision[:, :, k] >= 0).all()
    }
    return figures, per_class
