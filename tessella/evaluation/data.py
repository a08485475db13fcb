"""Opens what protocols ask for, each set of images once, and makes the data that a protocol takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tessella import dist
from tessella.console import note
from tessella.data.boxes.layouts import AnnotatedImages, open_annotations
from tessella.data.index import cache_folder
from tessella.data.label_map import read_label_map
from tessella.data.masks.layouts import MaskedImages, open_masks
from tessella.data.sources import ImageSet, open_images
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.evaluation.plan import Source, Task
from tessella.protocols import DetectionData, EvalData, MultiLabelData, SegmentationData
from tessella.protocols.duplicates import SHEET, DuplicatesConfig, duplicates
from tessella.run.config import to_dict

_PAIRS = 12  # of near-copies that a record names
_REASONS = 20  # files left out that a record names

Data = EvalData | MultiLabelData | DetectionData | SegmentationData

# kind -> what its sets are, how the name of one is opened
_OPENERS: dict[str, tuple[type, Callable[[str, Any, Source], Any]]] = {
    "classes": (ImageSet, lambda name, split, source: open_images(name, labels=True)),
    "boxes": (AnnotatedImages, lambda name, split, source: open_annotations(name, split, source.images)),
    "masks": (MaskedImages, lambda name, split, source: open_masks(name, split)),
}


class Shelf:
    """The data of an evaluation. Protocols on the same data share one object, and so its features."""

    def __init__(self, device: torch.device, workers: int, batch_size: int) -> None:
        self.device, self.workers, self.batch_size = device, workers, batch_size
        self._sets: dict[tuple[Any, ...], Any] = {}
        self._data: dict[tuple[Any, ...], Data] = {}
        self._copies: dict[tuple[str, str], dict[str, Any]] = {}
        self._warnings: set[str] = set()

    def data(self, task: Task, transform: EvalTransform) -> Data:
        """What the task's protocol takes beside a backbone that sees images by this transform.

        Raises:
            UserError: the data cannot be opened, or are not of the kind that the protocol needs.
        """
        on_boxes = DetectionData if "classes" not in task.protocol.kinds else MultiLabelData
        form = {"classes": EvalData, "boxes": on_boxes, "masks": SegmentationData}[task.kind]
        source = task.source
        names = (name if isinstance(name, str) else id(name) for name in (source.train, source.test))
        key = form, *names, source.label_map, source.images, transform
        if key not in self._data:
            with dist.shared_errors():
                self._data[key] = self._make(form, task, transform)
            for warning in getattr(self._data[key], "warnings", ()):
                if warning not in self._warnings and dist.rank() == 0:
                    note(f"warning: {warning}")
                self._warnings.add(warning)
        return self._data[key]

    def near_copies(self, data: Data, predictions: str | None) -> dict[str, Any]:
        """How many test images are near-copies of train images, for the record of the protocol that has just run.

        `predictions` is its folder within the evaluation's, which gets thumbnails of the pairs.
        """
        key = data.train.fingerprint, data.test.fingerprint
        if key not in self._copies:
            self._copies[key] = duplicates(None, data, DuplicatesConfig(listed=_PAIRS))
            if predictions and self._copies[key]["pairs"]:
                self._copies[key]["sheet"] = f"{predictions}/{SHEET}"
        return self._copies[key]

    def _make(self, form: type, task: Task, transform: EvalTransform) -> Data:
        train, test = self._open(task.source.train, "train", task), self._open(task.source.test, "test", task)
        shared: dict[str, Any] = {"device": self.device, "workers": self.workers}
        if form in (DetectionData, SegmentationData):
            return form(train, test, mean=transform.mean, std=transform.std, **shared)
        shared |= {"batch_size": self.batch_size, "cache": cache_folder()}
        if form is MultiLabelData:
            return MultiLabelData.of(train, test, transform, **shared)
        label_map = None if task.source.label_map is None else read_label_map(Path(task.source.label_map))
        return EvalData(train, test, transform, label_map=label_map, **shared)

    def _open(self, name: Any, split: str, task: Task) -> Any:
        """A set of images; files that are left out are named, because they change what a figure means."""
        kind, opener = _OPENERS[task.kind]
        if not isinstance(name, str | kind):
            raise UserError(f"{task.name} needs {task.kind} of images: give the name of a data set that has them")
        if not isinstance(name, str):
            return name
        key = task.kind, name, "" if task.kind == "classes" else split, task.source.images
        if key not in self._sets:
            images = self._sets[key] = opener(name, split, task.source)
            failed = getattr(images, "unreadable", ())
            if failed and dist.rank() == 0:
                more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
                note(f"left out of {images.name}: {failed[0][0]}: {failed[0][1]}{more}")
        return self._sets[key]


def described(data: Data, split: str) -> dict[str, Any]:
    """What a record says about the images of "train" or "test"."""
    images = data.train if split == "train" else data.test
    left_out = dict(getattr(images, "unreadable", ()))  # when they were listed; below, those that did not decode
    classes = data.survey().classes if isinstance(data, SegmentationData) else data.classes
    count = len(data.labels(split).unique()) if isinstance(data, EvalData) else len(classes)
    if isinstance(data, EvalData | MultiLabelData):
        left_out |= data.skipped(split) or {}
    return {
        "name": images.name,
        "fingerprint": images.fingerprint,
        "images": len(images),
        "classes": count,
        "skipped": len(left_out),
        "reasons": dict(itertools.islice(sorted(left_out.items()), _REASONS)),
    }


def transform_of(data: Data) -> dict[str, Any]:
    """What happens to an image before the backbone sees it, as far as the data decide it."""
    if isinstance(data, EvalData | MultiLabelData):
        return to_dict(data.transform)
    return {"mean": list(data.mean), "std": list(data.std)}
