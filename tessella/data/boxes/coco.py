"""COCO's format: one .json file with images, categories and annotations.

Refused: ids that lead nowhere or are there twice, boxes that are not four finite numbers, images of another size than
the file says. Left out with a note: images that are not there or cannot be read. Kept for scoring, but not trained on:
boxes without an area, and crowds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from tessella.data.boxes.objects import AnnotatedImages, ObjectTable, Problems, positive_ids, unique_names
from tessella.data.boxes.outlines import Broken, Outline, read_outline
from tessella.data.sources import ImageSet, open_images
from tessella.data.texts import TextFiles
from tessella.errors import UserError
from tessella.text import printable

_MEND = "Repair the file, or remove what is wrong."


def read_coco(
    files: TextFiles, json_name: str, folders: Sequence[str], elsewhere: str | None = None
) -> AnnotatedImages:
    """Images and objects of one annotation file.

    Args:
        files: where it lies.
        json_name: its name.
        folders: where its images may lie; the first in which one of them is found counts.
        elsewhere: instead, the name of the images, as `data.sources.open_images` takes it.

    Raises:
        UserError: it is not COCO's format, what it says is wrong, or none of its images is there.
    """
    encoded = files.read(json_name)
    document = _parse(encoded, json_name)
    problems, notes = Problems(json_name), list[str]()
    classes, category_ids = _read_categories(document["categories"], problems)
    records = _read_images(document["images"], problems)
    problems.refuse(_MEND)
    images, rows = _find_images(files, folders, elsewhere, [record["file_name"] for record in records], json_name)
    there = [i for i, row in enumerate(rows) if row is not None]
    if len(there) < len(records):
        missing = next(record["file_name"] for record, row in zip(records, rows, strict=True) if row is None)
        notes.append(
            f"{len(records) - len(there)} of {len(records)} images of {printable(json_name)} are not there or cannot "
            f"be read, and are left out (the first: {printable(missing)})"
        )
    chosen = np.array([rows[i] for i in there], dtype=np.int64)
    kept = [records[i] for i in there]
    _check_sizes(kept, images, chosen, problems)
    table = _read_annotations(
        document["annotations"], records, kept, images.sizes[chosen], category_ids, problems, notes
    )
    problems.refuse(_MEND)
    source = hashlib.sha256(encoded).hexdigest()
    ids = [record["id"] for record in kept]
    name = files.data if files.data.endswith(".json") else f"{files.data} ({PurePosixPath(json_name).name})"
    return AnnotatedImages(name, images, chosen, ids, classes, category_ids, table, source, notes)


def _parse(encoded: bytes, name: str) -> dict[str, list[Any]]:
    try:
        document = json.loads(encoded.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(name)} is not JSON: {printable(str(error))[:200]}") from None
    parts = ("images", "annotations", "categories")
    missing = [part for part in parts if not isinstance(document, dict) or not isinstance(document.get(part), list)]
    if missing:
        raise UserError(
            f"{printable(name)} is not in COCO's format for detection: it has no list of {' or of '.join(missing)}"
        )
    for part in parts:
        if not all(isinstance(entry, dict) for entry in document[part]):
            raise UserError(f"{printable(name)}: every entry of {part} must be an object with named values")
    return document


def _read_categories(entries: list[dict[str, Any]], problems: Problems) -> tuple[list[str], list[int]]:
    names, numbers, known = list[str](), list[int](), set[int]()
    for entry in entries:
        number, name = entry.get("id"), entry.get("name")
        if type(number) is not int or number in known:
            problems.add("a category without an id of its own, a whole number", entry)
        elif not isinstance(name, str):
            problems.add("a category without a name", entry)
        else:
            names.append(name)
            numbers.append(number)
            known.add(number)
    return unique_names(names, numbers), numbers


def _read_images(entries: list[dict[str, Any]], problems: Problems) -> list[dict[str, Any]]:
    ids, names = set[Any](), set[str]()
    for entry in entries:
        number, name = entry.get("id"), entry.get("file_name")
        if type(number) not in (int, str):
            problems.add("an image without an id", entry)
        elif not isinstance(name, str) or not name:
            problems.add("an image without a file_name", entry)
        elif number in ids:
            problems.add("an image id that is there twice", number)
        elif name in names:
            problems.add("a file_name that is there twice", name)
        else:
            ids.add(number)
            names.add(name)
    if len({type(number) for number in ids}) > 1:
        text = next(number for number in ids if isinstance(number, str))
        problems.add("an image id that is text where others are numbers, which no scorer can sort", text)
    return entries


def _find_images(
    files: TextFiles, folders: Sequence[str], elsewhere: str | None, names: list[str], json_name: str
) -> tuple[ImageSet, list[int | None]]:
    """The images of the first folder that holds any of them, and the row of each; None for one that is not there."""
    for folder in folders if elsewhere is None else [elsewhere]:
        try:
            images = files.images(folder) if elsewhere is None else open_images(elsewhere)
        except UserError:
            if elsewhere is not None:
                raise
            continue
        row_of = {str(images.key(row)): row for row in range(len(images))}
        rows = [row_of.get(name, row_of.get(_plain(name))) for name in names]
        if any(row is not None for row in rows):
            return images, rows
    looked = elsewhere or ", ".join(folder or "its own folder" for folder in folders)
    first = f" The first is {printable(names[0])}." if names else ""
    raise UserError(
        f"none of the {len(names)} images of {printable(json_name)} can be read: looked in {printable(looked)}.{first} "
        "Put them there under the names of the file, or name their folder (--images)"
    )


def _plain(name: str) -> str:
    """A name as our keys write it: '/' between parts, no './' in front."""
    return name.replace("\\", "/").removeprefix("./")


def _check_sizes(records: list[dict[str, Any]], images: ImageSet, rows: Any, problems: Problems) -> None:
    for record, row in zip(records, rows, strict=True):
        width, height = (int(side) for side in images.sizes[row])
        said = record.get("width", width), record.get("height", height)
        if said != (width, height):
            problems.add(
                "an image of another size than the file says, so that its boxes would lie elsewhere",
                f"{record['file_name']}: {said[0]} x {said[1]} in the file, {width} x {height} upright pixels",
            )


def _read_annotations(
    entries: list[dict[str, Any]],
    records: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    sizes: Any,
    category_ids: list[int],
    problems: Problems,
    notes: list[str],
) -> ObjectTable:
    """The objects of the images that are there, sorted by image, within an image as in the file."""
    known = {record["id"] for record in records}
    position_of = {record["id"]: i for i, record in enumerate(kept)}
    label_of = {number: i for i, number in enumerate(category_ids)}
    ids = positive_ids([entry.get("id") for entry in entries], notes)
    found: list[tuple[int, int, dict[str, Any], Outline | None]] = []  # position, id, entry, mask
    broken = Problems("masks")
    for entry, number in zip(entries, ids.tolist(), strict=True):
        where = f"annotation {entry.get('id')}"
        image_id, category = entry.get("image_id"), entry.get("category_id")
        if type(image_id) not in (int, str) or image_id not in known:
            problems.add("an annotation of an image_id that no image has", f"{where}: {image_id}")
        elif type(category) is not int or category not in label_of:
            problems.add("an annotation of a category_id that no category has", f"{where}: {category}")
        elif not _is_box(entry.get("bbox")):
            problems.add("a bbox that is not four finite numbers", f"{where}: {entry.get('bbox')}")
        elif entry.get("area") is not None and not _is_number(entry["area"]):
            problems.add("an area that is no number", where)
        elif entry.get("iscrowd") not in (None, 0, 1):
            problems.add("an iscrowd that is neither 0 nor 1", where)
        elif image_id in position_of:
            position = position_of[image_id]
            outline: Outline | None = None
            try:
                outline = read_outline(entry.get("segmentation"), *(int(side) for side in sizes[position]))
            except Broken as error:
                broken.add(str(error), where)
                outline = np.array([int(sizes[position].prod())], dtype=np.int64)  # a mask of no pixel
            found.append((position, number, entry, outline))
    notes += [f"masks that nothing can match: {sentence}" for sentence in broken.sentences()]
    found.sort(key=lambda item: item[0])
    counts = np.bincount([position for position, *_ in found], minlength=len(kept)).astype(np.int64)
    boxes = np.array([entry["bbox"] for _, _, entry, _ in found], dtype=np.float64).reshape(-1, 4)
    areas = [
        box[2] * box[3] if entry.get("area") is None else entry["area"]
        for (_, _, entry, _), box in zip(found, boxes, strict=True)
    ]
    return ObjectTable(
        boxes=boxes,
        labels=np.array([label_of[entry["category_id"]] for _, _, entry, _ in found], dtype=np.int64),
        ids=np.array([number for _, number, _, _ in found], dtype=np.int64),
        areas=np.array(areas, dtype=np.float64),
        crowd=np.array([entry.get("iscrowd") == 1 for _, _, entry, _ in found], dtype=bool),
        difficult=np.zeros(len(found), dtype=bool),
        outlines=[outline for *_, outline in found],
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that fits into a float; JSON's whole numbers may be of any length."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
