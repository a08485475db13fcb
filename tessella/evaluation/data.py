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
from tessella.protocols.duplicates import DuplicatesConfig, duplicates
from tessella.run.config import to_dict

_PAIRS = 12  # near-copies that a record names
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
        self._made: dict[tuple[Any, ...], Data] = {}
        self._copies: dict[tuple[str, str], dict[str, Any]] = {}
        self._said: set[str] = set()

    def data(self, task: Task, transform: EvalTransform) -> Data:
        """What the task's protocol takes beside a backbone that sees images by this transform.

        Raises:
            UserError: the data cannot be opened, or are not of the kind that the protocol needs.
        """
        detects = DetectionData if "classes" not in task.protocol.kinds else MultiLabelData
        form = {"classes": EvalData, "boxes": detects, "masks": SegmentationData}[task.kind]
        source = task.source
        place = form, _place(source.train), _place(source.test), source.label_map, source.images, transform
        if place not in self._made:
            with dist.shared_errors():
                train, test = self._open(task.source.train, "train", task), self._open(task.source.test, "test", task)
                data = self._made[place] = self._make(form, train, test, task.source, transform)
            for warning in getattr(data, "warnings", ()):
                self._warn(warning)
        return self._made[place]

    def _make(self, form: type, train: Any, test: Any, source: Source, transform: EvalTransform) -> Data:
        shared: dict[str, Any] = {"device": self.device, "workers": self.workers}
        if form in (DetectionData, SegmentationData):
            return form(train, test, mean=transform.mean, std=transform.std, **shared)
        shared |= {"batch_size": self.batch_size, "cache": cache_folder()}
        if form is MultiLabelData:
            return MultiLabelData.of(train, test, transform, **shared)
        label_map = None if source.label_map is None else read_label_map(Path(source.label_map))
        return EvalData(train, test, transform, label_map=label_map, **shared)

    def near_copies(self, data: Data) -> dict[str, Any]:
        """How many test images are near-copies of train images, for the record."""
        place = data.train.fingerprint, data.test.fingerprint
        if place not in self._copies:
            self._copies[place] = duplicates(None, data, DuplicatesConfig(listed=_PAIRS))
        return self._copies[place]

    def _warn(self, text: str) -> None:
        """Say it once."""
        if text not in self._said and dist.rank() == 0:
            note(f"warning: {text}")
        self._said.add(text)

    def _open(self, name: Any, split: str, task: Task) -> Any:
        kind, opener = _OPENERS[task.kind]
        if not isinstance(name, str):
            if not isinstance(name, kind):
                raise UserError(f"{task.name} needs {task.kind} of images: give the name of a data set that has them")
            return name
        place = task.kind, name, "" if task.kind == "classes" else split, task.source.images
        if place not in self._sets:
            self._sets[place] = opener(name, split, task.source)
            _tell_unreadable(self._sets[place])
        return self._sets[place]


def _tell_unreadable(images: Any) -> None:
    """Name a file that is left out; a figure on fewer images than the folder has must not come as a surprise."""
    failed = getattr(images, "unreadable", ())
    if failed and dist.rank() == 0:
        key, reason = failed[0]
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        note(f"left out of {images.name}: {key}: {reason}{more}")


def described(data: Data, split: str) -> dict[str, Any]:
    """What a record says about the images of "train" or "test"."""
    images = data.train if split == "train" else data.test
    left_out = dict(getattr(images, "unreadable", ()))  # when they were listed; below, those that did not decode
    if isinstance(data, EvalData):
        classes = len(data.labels(split).unique())
    elif isinstance(data, SegmentationData):
        classes = len(data.survey().classes)
    else:
        classes = len(data.classes)
    if isinstance(data, EvalData | MultiLabelData):
        left_out |= data.skipped(split) or {}
    return {
        "name": images.name,
        "fingerprint": images.fingerprint,
        "images": len(images),
        "classes": classes,
        "skipped": len(left_out),
        "reasons": dict(itertools.islice(sorted(left_out.items()), _REASONS)),
    }


def transform_of(data: Data) -> dict[str, Any]:
    """What happens to an image before the backbone sees it, as far as the data decide it."""
    if isinstance(data, EvalData | MultiLabelData):
        return to_dict(data.transform)
    return {"mean": list(data.mean), "std": list(data.std)}


def _place(name: Any) -> Any:
    return name if isinstance(name, str) else id(name)
