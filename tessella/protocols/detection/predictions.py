"""What a detector finds, in COCO's format, for the scorer and for other programs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tessella.data.boxes.outlines import mask_coder
from tessella.protocols.detection.data import DetectionData


def as_coco(
    detections: dict[str, Tensor], position: int, size: tuple[int, int], data: DetectionData
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Detections of one test image, moved back to its own pixels, as boxes and as masks.

    A class that the test images do not know, and no scorer has a number for, is left out.

    Args:
        detections: boxes (n, 4), labels (n,) from 1, scores (n,) and perhaps masks (n, 1, s, s), on the CPU.
        position: of the image.
        size: height and width at which it was seen, pixels.
        data: names and numbers of the classes, and the image's own size.
    """
    width, height = data.test.size(position)
    corners = detections["boxes"] * torch.tensor([width / size[1], height / size[0]] * 2)
    numbers = dict(zip(data.test.classes, data.test.category_ids, strict=True))
    names = [data.classes[label - 1] for label in detections["labels"].tolist()]
    boxes, masks = [], []
    for i, (name, score, box) in enumerate(zip(names, detections["scores"].tolist(), corners, strict=True)):
        if name not in numbers:
            continue
        left, top, right, bottom = (round(side, 3) for side in box.tolist())
        entry = {"image_id": data.test.image_ids[position], "category_id": numbers[name], "score": round(score, 6)}
        boxes.append({**entry, "bbox": [left, top, round(right - left, 3), round(bottom - top, 3)]})
        if "masks" in detections:
            runs = mask_coder().encode(np.asfortranarray(paste(detections["masks"][i, 0], box, height, width)))
            masks.append({**entry, "segmentation": {"size": runs["size"], "counts": runs["counts"].decode("ascii")}})
    return boxes, masks


def paste(mask: Tensor, box: Tensor, height: int, width: int) -> NDArray[np.uint8]:
    """A mask of a box, laid on its image: (height, width) uint8, 1 where the share is at least a half.

    Args:
        mask: (s, s) shares in [0, 1], stretched over the box, bilinear.
        box: (4,) corners in pixels.
        height: of the image, pixels.
        width: of the image, pixels.
    """
    left, top, right, bottom = box.tolist()
    whole = np.zeros((height, width), dtype=np.uint8)
    rows = range(max(0, math.floor(top)), min(height, math.ceil(bottom)))
    columns = range(max(0, math.floor(left)), min(width, math.ceil(right)))
    if not rows or not columns or right <= left or bottom <= top:
        return whole
    x = (torch.tensor(columns) + 0.5 - left) / (right - left) * 2 - 1
    y = (torch.tensor(rows) + 0.5 - top) / (bottom - top) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    shares = nn.functional.grid_sample(mask[None, None].float(), grid.float(), align_corners=False)[0, 0]
    whole[rows.start : rows.stop, columns.start : columns.stop] = (shares >= 0.5).numpy()
    return whole
