"""Images with objects, whatever format they come from: the images, and a table of their objects."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessella.data.boxes.outlines import Outline, as_coco
from tessella.data.sources import ImageSet
from tessella.errors import UserError
from tessella.text import printable

_SHOWN_CHARACTERS = 300  # of an example of what is wrong


class Objects(NamedTuple):
    """Objects of one image that a detector can learn from."""

    boxes: NDArray[np.float64]  # (n, 4) left, top, right, bottom in pixels, inside the image, with an area
    labels: NDArray[np.int64]  # (n,) indices into the set's classes
    outlines: list[Outline | None]  # n masks; None where there is none


class ObjectTable(NamedTuple):
    """All objects of a set, image after image, as the files have them: boxes may be empty or outside."""

    boxes: NDArray[np.float64]  # (n, 4) left, top, width, height in pixels, finite
    labels: NDArray[np.int64]  # (n,) indices into the set's classes
    ids: NDArray[np.int64]  # (n,) positive, distinct
    areas: NDArray[np.float64]  # (n,) square pixels: the file's, which COCO measures on the mask; else the box's
    crowd: NDArray[np.bool_]  # (n,) regions of many objects: not trained on, in scoring neither found nor missed
    difficult: NDArray[np.bool_]  # (n,) trained on, in scoring neither found nor missed (VOC)
    outlines: list[Outline | None]  # masks; None where there is none
    first: NDArray[np.int64]  # (images + 1,) where each image's objects begin

    @classmethod
    def of(
        cls, image: NDArray[np.int64], images: int, boxes: NDArray[np.float64], labels: NDArray[np.int64], **more: Any
    ) -> ObjectTable:
        """The objects sorted by image.

        Args:
            image: (n,) position of each object's image, below `images`.
            images: how many there are.
            boxes: (n, 4).
            labels: (n,).
            more: other columns; default: ids from 1, neither crowd nor difficult, no masks. An area that is NaN is the
                box's.
        """
        count, order, no = len(image), np.argsort(image, kind="stable"), np.zeros(len(image), dtype=bool)
        columns = {"ids": np.arange(1, count + 1), "areas": np.full(count, np.nan), "crowd": no, "difficult": no}
        columns |= {"boxes": boxes, "labels": labels} | more
        with np.errstate(over="ignore"):  # of boxes far outside their image
            columns["areas"] = np.where(np.isnan(columns["areas"]), boxes[:, 2] * boxes[:, 3], columns["areas"])
        outlines: Any = columns.pop("outlines", [None] * count)
        first = np.concatenate([[0], np.bincount(image, minlength=images).cumsum()]).astype(np.int64)
        sorted_columns: dict[str, Any] = {name: column[order] for name, column in columns.items()}
        return cls(outlines=[outlines[i] for i in order], first=first, **sorted_columns)


@dataclass
class AnnotatedImages:
    """Images with objects, equal on every rank. An image is named by its position, 0 ... len - 1."""

    name: str  # of the data, for reports
    images: ImageSet
    rows: NDArray[np.int64]  # (m,) row of `images` of each annotated image
    image_ids: list[int | str]  # (m,) as in the file
    classes: list[str]
    category_ids: list[int]  # of the classes, as in the file
    table: ObjectTable
    source: str  # hash of the annotation files
    notes: list[str] = field(default_factory=list)  # what was left out and why, for the reader of a figure

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Changes when an image or an annotation does."""
        return hashlib.sha256(f"{self.images.fingerprint} {self.source}".encode()).hexdigest()

    def size(self, position: int) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        width, height = self.images.sizes[self.rows[position]]
        return int(width), int(height)

    def key(self, position: int) -> str:
        """Name of an image's file within its folder or archive."""
        return str(self.images.key(int(self.rows[position])))

    def objects(self, position: int) -> Objects:
        """What a detector learns from an image: no crowd regions, boxes cut at the border, none without an area."""
        first, last = self.table.first[position : position + 2].tolist()
        boxes, usable = self._trainable(slice(first, last), self.images.sizes[self.rows[[position]]])
        outlines = [self.table.outlines[first + i] for i in np.flatnonzero(usable)]
        return Objects(boxes[usable], self.table.labels[first:last][usable], outlines)

    def with_objects(self) -> NDArray[np.int64]:
        """Positions of the images that `objects` gives anything for, ascending."""
        return np.unique(np.arange(len(self)).repeat(np.diff(self.table.first))[self._trainable()[1]])

    def classes_present(self) -> set[str]:
        """Names of the classes that have an object with an area inside its image."""
        return {self.classes[label] for label in np.unique(self.table.labels[self._trainable()[1]]).tolist()}

    def flaws(self) -> list[str]:
        """Sentences about objects that are not trained on, with counts."""
        boxes, usable = self._trainable()
        empty = int((~usable & ~self.table.crowd).sum())
        whole = np.concatenate([self.table.boxes[:, :2], self.table.boxes[:, :2] + self.table.boxes[:, 2:]], axis=1)
        cut = int((usable & (np.abs(whole - boxes) > 1).any(axis=1)).sum())
        sentences = [f"{empty} boxes without an area inside their image are not trained on"] if empty else []
        if cut:
            sentences.append(f"{cut} boxes that reach outside their image are cut at its border for training")
        return sentences

    def lacking_masks(self, with_crowd: bool) -> int:
        """How many objects have no mask."""
        missing = np.array([outline is None for outline in self.table.outlines], dtype=bool)
        return int((missing if with_crowd else missing & ~self.table.crowd).sum())

    def truth(self, positions: Iterable[int], *, masks: bool = False) -> dict[str, Any]:
        """Ground truth of some images in COCO's format, boxes, areas and ids as the file has them, perhaps with masks.

        Returns:
            For JSON: images, annotations (ignored ones as crowd), categories.
        """
        images, annotations = [], []
        for position in positions:
            width, height = self.size(position)
            image_id = self.image_ids[position]
            images.append({"id": image_id, "file_name": self.key(position), "width": width, "height": height})
            for row in range(*self.table.first[position : position + 2].tolist()):
                annotation: dict[str, Any] = {
                    "id": int(self.table.ids[row]),
                    "image_id": image_id,
                    "category_id": self.category_ids[int(self.table.labels[row])],
                    "bbox": self.table.boxes[row].tolist(),
                    "area": float(self.table.areas[row]),
                    "iscrowd": int(self.table.crowd[row] or self.table.difficult[row]),
                }
                outline = self.table.outlines[row]
                if masks and outline is not None:
                    annotation["segmentation"] = as_coco(outline, width, height)
                annotations.append(annotation)
        categories = [
            {"id": number, "name": name} for number, name in zip(self.category_ids, self.classes, strict=True)
        ]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _trainable(
        self, span: slice = slice(None), sizes: NDArray[Any] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Corners cut at the border, (n, 4), and which of the boxes are trained on; default: of all images."""
        if sizes is None:
            sizes = self.images.sizes[self.rows].repeat(np.diff(self.table.first), axis=0)
        corner, extent = self.table.boxes[span, :2], self.table.boxes[span, 2:]
        boxes = np.concatenate([np.clip(corner, 0, sizes), np.clip(corner + extent, 0, sizes)], axis=1)
        usable = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~self.table.crowd[span]
        return boxes, usable


class Problems:
    """What is wrong with a file, reported all at once: each kind with a count and its first example."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, kind: str, example: object) -> None:
        """Note one case of a kind, such as "an image id that is not in images", and where it is."""
        self._counts[kind] += 1
        self._examples.setdefault(kind, printable(str(example))[:_SHOWN_CHARACTERS])

    def sentences(self) -> list[str]:
        """One text per kind."""
        return [f"{n} x {kind} (the first: {self._examples[kind]})" for kind, n in self._counts.items()]

    def refuse(self, advice: str) -> None:
        """Stop here if anything was noted, and add what to do about it.

        Raises:
            UserError: all that was noted.
        """
        if self._counts:
            raise UserError(f"{printable(self.name)} is wrong: {'; '.join(self.sentences())}. {advice}")


def unique_names(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Names of classes; equal ones get their numbers behind them."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({number})" for name, number in zip(names, numbers, strict=True)]


def positive_ids(ids: Sequence[Any], notes: list[str]) -> NDArray[np.int64]:
    """Annotation ids as the file has them; new numbers, with a note, when they are not distinct and positive.

    pycocotools takes id 0 for "nothing found", and of two equal ids it uses one.
    """
    if all(type(i) is int and 0 < i < 2**62 for i in ids) and len(set(ids)) == len(ids):
        return np.array(ids, dtype=np.int64)
    notes.append(
        "annotation ids that were missing, equal, zero or negative have been renumbered for scoring: pycocotools "
        "counts an object with id 0 as never found"
    )
    return np.arange(1, len(ids) + 1, dtype=np.int64)
