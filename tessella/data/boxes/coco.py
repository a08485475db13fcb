"""COCO's format: one .json file with images, categories and annotations.

Refused: ids that are unknown or used twice, boxes that are not four finite numbers, images of another size than the
file says. Left out with a note: images that are missing or cannot be read. Scored, but not trained on: boxes without an
area, and crowds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from tessella.data.boxes.images import AnnotatedImages, ObjectTable, Problems, positive_ids, unique_names
from tessella.data.boxes.outlines import Broken, Outline, read_outline
from tessella.data.sources import ImageSet, open_images
from tessella.data.texts import AnnotationFiles
from tessella.errors import UserError
from tessella.text import printable

_ADVICE = "Repair the file, or remove what is wrong."


def read_coco(
    files: AnnotationFiles, json_name: str, folders: Sequence[str], elsewhere: str | None = None
) -> AnnotatedImages:
    """Images and objects of one annotation file.

    Args:
        files: where it lies.
        json_name: its name.
        folders: where its images may lie; the first that holds one of them counts.
        elsewhere: instead, the name of the images, as `data.sources.open_images` takes it.

    Raises:
        UserError: it is not COCO's format, what it says is wrong, or none of its images is there.
    """
    encoded = files.texts.read(json_name)
    document = _parse(encoded, json_name)
    problems, notes = Problems(json_name), list[str]()
    classes, category_ids = _read_categories(document["categories"], problems)
    records = _read_images(document["images"], problems)
    problems.refuse(_ADVICE)
    images, rows = _find_images(files, folders, elsewhere, [record["file_name"] for record in records], json_name)
    present = [(record, row) for record, row in zip(records, rows, strict=True) if row is not None]
    if len(present) < len(records):
        missing = next(record["file_name"] for record, row in zip(records, rows, strict=True) if row is None)
        notes.append(
            f"{len(records) - len(present)} of {len(records)} images of {printable(json_name)} are not there or cannot "
            f"be read, and are left out (the first: {printable(missing)})"
        )
    chosen = np.array([row for _, row in present], dtype=np.int64)
    sizes = {record["id"]: tuple(images.sizes[row].tolist()) for record, row in present}
    for record, _ in present:
        _check_size(record, sizes[record["id"]], problems)
    entries = _check_entries(document["annotations"], {record["id"] for record in records}, category_ids, problems)
    table = _object_table(document["annotations"], entries, sizes, category_ids, notes)
    problems.refuse(_ADVICE)
    source = hashlib.sha256(encoded).hexdigest()
    ids = [record["id"] for record, _ in present]
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
    files: AnnotationFiles, folders: Sequence[str], elsewhere: str | None, names: list[str], json_name: str
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
    """A name in the form of our keys: '/' between parts, no './' in front."""
    return name.replace("\\", "/").removeprefix("./")


def _check_size(record: dict[str, Any], size: tuple[int, int], problems: Problems) -> None:
    width, height = size
    stated = record.get("width", width), record.get("height", height)
    if stated != size:
        problems.add(
            "an image of another size than the file says, so that its boxes would lie elsewhere",
            f"{record['file_name']}: {stated[0]} x {stated[1]} in the file, {width} x {height} upright pixels",
        )


def _check_entries(
    entries: list[dict[str, Any]], image_ids: set[Any], category_ids: list[int], problems: Problems
) -> list[int]:
    """Positions of the annotations that are well-formed."""
    known, valid = set(category_ids), list[int]()
    for position, entry in enumerate(entries):
        where = f"annotation {entry.get('id')}"
        image_id, category = entry.get("image_id"), entry.get("category_id")
        if type(image_id) not in (int, str) or image_id not in image_ids:
            problems.add("an annotation of an image_id that no image has", f"{where}: {image_id}")
        elif type(category) is not int or category not in known:
            problems.add("an annotation of a category_id that no category has", f"{where}: {category}")
        elif not _is_box(entry.get("bbox")):
            problems.add("a bbox that is not four finite numbers", f"{where}: {entry.get('bbox')}")
        elif entry.get("area") is not None and not _is_number(entry["area"]):
            problems.add("an area that is no number", where)
        elif entry.get("iscrowd") not in (None, 0, 1):
            problems.add("an iscrowd that is neither 0 nor 1", where)
        else:
            valid.append(position)
    return valid


def _object_table(
    annotations: list[dict[str, Any]],
    valid: list[int],
    sizes: dict[Any, tuple[int, int]],
    category_ids: list[int],
    notes: list[str],
) -> ObjectTable:
    """The objects of the images in `sizes`, sorted by image, within an image as in the file."""
    ids = positive_ids([entry.get("id") for entry in annotations], notes)
    valid = [position for position in valid if annotations[position]["image_id"] in sizes]
    entries = [annotations[position] for position in valid]
    broken, outlines = Problems("masks"), list[Outline | None]()
    for entry in entries:
        width, height = sizes[entry["image_id"]]
        try:
            outlines.append(read_outline(entry.get("segmentation"), width, height))
        except Broken as error:
            broken.add(str(error), f"annotation {entry.get('id')}")
            outlines.append(np.array([width * height]))  # a mask of no pixel
    notes += [f"masks that nothing can match: {sentence}" for sentence in broken.sentences()]
    label_of = {number: label for label, number in enumerate(category_ids)}
    position_of = {image_id: position for position, image_id in enumerate(sizes)}
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    areas = np.array([np.nan if entry.get("area") is None else entry["area"] for entry in entries], dtype=np.float64)
    return ObjectTable.of(
        np.array([position_of[entry["image_id"]] for entry in entries], dtype=np.int64),
        len(sizes),
        boxes,
        np.array([label_of[entry["category_id"]] for entry in entries], dtype=np.int64),
        ids=ids[valid],
        areas=areas,
        crowd=np.array([entry.get("iscrowd") == 1 for entry in entries], dtype=bool),
        outlines=outlines,
    )


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that fits into a float; JSON's whole numbers may be of any length."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
