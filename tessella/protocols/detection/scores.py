"""How detectors are judged: every test image by itself, then COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from tessella import files
from tessella.errors import UserError
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.detection.batches import batches, test_plans
from tessella.protocols.detection.data import DetectionData
from tessella.protocols.detection.networks import Detector
from tessella.protocols.detection.predictions import as_coco
from tessella.protocols.detection.recipes import DetectionConfig
from tessella.protocols.features import from_all_ranks, progress, rank_rows

# Our names for the places of COCOeval's summary.
_SUMMARY = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}


Kind = Literal["bbox", "segm"]


class Detections(NamedTuple):
    """Detections on all test images, equal on every rank."""

    boxes: list[dict[str, Any]]  # in COCO's format
    masks: list[dict[str, Any]]
    positions: list[int]  # of the images that could be read
    skipped: dict[str, str]  # key -> reason of the others


def detect(detector: Detector, data: DetectionData, config: DetectionConfig) -> Detections:
    """Show every test image to one rank."""
    detector.eval()
    mine = rank_rows(len(data.test))
    skipped: dict[str, str] = {}
    plans = test_plans(data.test, mine, config.test_size, config.longest)
    shown = batches(data.test, plans, data, divisor=detector.divisor, masks=False, skipped=skipped)
    boxes, masks, positions = list[dict[str, Any]](), list[dict[str, Any]](), list[int]()
    for batch in progress(shown, "detecting on the test images", len(mine)):
        if not batch.readable[0]:
            continue
        with torch.inference_mode():
            _, (detections,) = detector(batch.pixels, batch.sizes)
        positions.append(batch.samples[0].position)
        on_cpu = {name: x.cpu() for name, x in detections.items()}
        image_boxes, image_masks = as_coco(on_cpu, positions[-1], batch.sizes[0], data)
        boxes += image_boxes
        masks += image_masks
    boxes, masks, positions = from_all_ranks(boxes), from_all_ranks(masks), from_all_ranks(positions)
    return Detections(boxes, masks, sorted(positions), dict(from_all_ranks(list(skipped.items()))))


def score(detections: Detections, data: DetectionData, config: DetectionConfig) -> dict[str, Any]:
    """The protocol's figures; with `data.predictions`, writes truth and detections there.

    `permuted` is what the boxes score when the objects of each image are laid on another. Masks are not moved to other
    images, whose size may be another.
    """
    truth = data.test.truth(detections.positions, masks=config.masks)
    kinds: list[tuple[str, Kind, str, list[dict[str, Any]]]] = [("box", "bbox", "detections", detections.boxes)]
    if config.masks:
        kinds.append(("mask", "segm", "masks", detections.masks))
    if data.predictions is not None:
        files.make_folder(data.predictions)
        for name, value in [("ground_truth", truth), *((file, entries) for _, _, file, entries in kinds)]:
            files.write_json(data.predictions / f"{name}.json", value, indent=None)
    scores: dict[str, Any] = {}
    for name, kind, _, entries in kinds:
        figures, per_class = average_precision(truth, entries, kind)
        scores |= {f"{name}_{figure}": value for figure, value in figures.items()} | {f"{name}_per_class": per_class}
    ids = np.array([image["id"] for image in truth["images"]])
    order = permutation(stream_key(0, "permuted"), np.arange(len(ids)), 0)
    other = dict(zip(ids.tolist(), ids[order].tolist(), strict=True))
    moved = [annotation | {"image_id": other[annotation["image_id"]]} for annotation in truth["annotations"]]
    by_chance, _ = average_precision(truth | {"annotations": moved}, detections.boxes, "bbox")
    objects = sum(not annotation["iscrowd"] for annotation in truth["annotations"])
    scores["permuted"] = {f"box_{figure}": value for figure, value in by_chance.items()}
    return scores | {"images": len(detections.positions), "objects": objects}


def average_precision(
    truth: dict[str, Any], detections: list[dict[str, Any]], kind: Kind
) -> tuple[dict[str, float], dict[str, float]]:
    """Average precision over IoU 0.50, 0.55, ... 0.95, classes and recalls, at most 100 detections per image.

    Args:
        truth: ground truth in COCO's format; crowd regions are neither found nor missed.
        detections: image_id, category_id, score, and bbox [left, top, width, height] or segmentation.
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

    def indexed(content: dict[str, Any]) -> Any:
        known = COCO()
        known.dataset = content
        known.createIndex()
        return known

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        expected = indexed(truth)
        copies = [dict(entry) for entry in detections]  # it adds fields
        detected = expected.loadRes(copies) if detections else indexed({**truth, "annotations": []})
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
