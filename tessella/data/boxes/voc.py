"""VOC's format: Annotations/NAME.xml, JPEGImages/NAME.jpg, and lists of names in ImageSets/Main.

Corners are counted from 1 and belong to the box, so the box of (1, 1, 10, 10) is ten pixels wide; here it becomes left
0, top 0, width 10, height 10. Difficult objects are trained on and, in scoring, neither found nor missed.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from tessella.data.boxes.images import AnnotatedImages, ObjectTable, Problems
from tessella.data.texts import AnnotationFiles, join
from tessella.errors import UserError
from tessella.text import printable

_LISTS = "ImageSets/Main"
_ADVICE = "Repair the files, or take their names out of the list."
# With a test list, train on train and val together, as the papers do; without one, val is what is left for the test.
_WITH_TEST = {"train": ("trainval", "train"), "test": ("test",)}
_WITHOUT_TEST = {"train": ("train",), "test": ("val",)}


class ImageList(NamedTuple):
    """Names of images of one VOC folder."""

    root: str  # the folder that holds Annotations
    names: tuple[str, ...]  # without folder and suffix


class _Object(NamedTuple):
    image: int
    name: str
    box: tuple[float, float, float, float]  # left, top, width, height
    difficult: bool


def is_voc(files: AnnotationFiles, folder: str) -> bool:
    """Whether a folder is laid out as VOC's."""
    return "Annotations" in files.texts.folders(folder)


def find_lists(files: AnnotationFiles, split: str) -> list[ImageList]:
    """The lists of a split in a VOC folder, or in a folder of several; those that the part names, if it does.

    Returns:
        Nothing if this is not VOC's format, or there is no list for the split.
    """
    pieces = [piece.strip("/") for piece in files.part.split("+")]
    named = [_named_list(files, piece) for piece in pieces]
    if all(named):
        return [one for one in named if one]
    here = files.part
    roots = [here] if is_voc(files, here) else [join(here, name) for name in files.texts.folders(here)]
    roots = [root for root in roots if is_voc(files, root)]
    available = {root: set(files.texts.names(join(root, _LISTS))) for root in roots}
    choices = _WITH_TEST if any("test.txt" in names for names in available.values()) else _WITHOUT_TEST
    lists = []
    for root, names in available.items():
        choice = next((name for name in choices[split] if f"{name}.txt" in names), None)
        if choice:
            lists.append(_read_list(files, root, choice))
        elif not names:  # no lists at all: every annotated image
            stems = [name.removesuffix(".xml") for name in files.texts.names(join(root, "Annotations"))]
            lists.append(ImageList(root, tuple(stems)))
    return lists


def read_voc(files: AnnotationFiles, lists: list[ImageList], split: str) -> AnnotatedImages:
    """Images and objects of some lists, joined; the split is for their name.

    Raises:
        UserError: an annotation is damaged or wrong, or an image has none; or no image is there.
    """
    common = lists[0].root if len(lists) == 1 else lists[0].root.rpartition("/")[0]
    images = files.images(common)
    row_of: dict[str, int] = {}
    for row in range(len(images)):
        folder, _, file = join(common, str(images.key(row))).rpartition("/")
        if folder.rpartition("/")[2] == "JPEGImages":
            row_of[f"{folder}/{file.rpartition('.')[0]}"] = row
    problems, digest = Problems(files.data), hashlib.sha256()
    rows, missing, objects = list[int](), list[str](), list[_Object]()
    for root, names in lists:
        annotated = set(files.texts.names(join(root, "Annotations")))
        for name in dict.fromkeys(names):
            if f"{name}.xml" not in annotated:
                problems.add("an image of the list without an annotation", join(root, f"Annotations/{name}.xml"))
                continue
            encoded = files.texts.read(join(root, f"Annotations/{name}.xml"))
            digest.update(f"{root}/{name} {len(encoded)} ".encode("utf-8", "surrogateescape") + encoded)
            row = row_of.get(join(root, f"JPEGImages/{name}"), -1)
            if row < 0:
                missing.append(name)
            else:
                objects += _read_objects(encoded, name, len(rows), tuple(images.sizes[row].tolist()), problems)
                rows.append(row)
    problems.refuse(_ADVICE)
    if not rows:
        raise UserError(f"{printable(files.data)}: none of the {len(missing)} images of the list is in JPEGImages")
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(missing) + len(rows)} images of the list are not there or cannot be read, and are "
            f"left out (the first: {printable(missing[0])})"
        )
    classes = sorted({entry.name for entry in objects})
    table = ObjectTable.of(
        np.array([entry.image for entry in objects], dtype=np.int64),
        len(rows),
        np.array([entry.box for entry in objects], dtype=np.float64).reshape(-1, 4),
        np.array([classes.index(entry.name) for entry in objects], dtype=np.int64),
        difficult=np.array([entry.difficult for entry in objects], dtype=bool),
    )
    ids: list[int | str] = list(range(1, len(rows) + 1))
    numbers, chosen = list(range(1, len(classes) + 1)), np.array(rows, dtype=np.int64)
    return AnnotatedImages(
        f"{files.data} ({split})", images, chosen, ids, classes, numbers, table, digest.hexdigest(), notes
    )


def parse_xml(encoded: bytes) -> Element:
    """The root of a document that declares no entities: those can be made to fill the memory or to read files.

    Raises:
        ValueError: it is damaged, or declares one.
    """

    def refuse(*declaration: object) -> None:
        raise ValueError("it declares entities, which annotations do not need")

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(encoded, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"damaged XML: {error}") from None
    return builder.close()


def _read_objects(encoded: bytes, name: str, image: int, size: tuple[int, ...], problems: Problems) -> list[_Object]:
    try:
        root = parse_xml(encoded)
    except (ValueError, AssertionError) as error:
        problems.add("an annotation that is no XML of VOC's kind", f"{name}: {error}")
        return []
    stated = tuple(_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    # Some tools write 0 for a size that they did not know.
    if all(math.isfinite(side) and side > 0 for side in stated) and stated != size:
        problems.add(
            "an image of another size than its annotation says, so that its boxes would lie elsewhere",
            f"{name}: {stated[0]:g} x {stated[1]:g} in the annotation, {size[0]} x {size[1]} upright pixels",
        )
    objects = []
    for entry in root.findall("object"):
        label = (entry.findtext("name") or "").strip()
        left, top, right, bottom = (
            _number(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        if not label:
            problems.add("an object without a name", name)
        elif not all(map(math.isfinite, (left, top, right, bottom))):
            problems.add("an object whose bndbox is not four finite numbers", name)
        else:
            box = (left - 1, top - 1, right - left + 1, bottom - top + 1)
            objects.append(_Object(image, label, box, (entry.findtext("difficult") or "0").strip() == "1"))
    return objects


def _named_list(files: AnnotationFiles, piece: str) -> ImageList | None:
    """VOC2007/trainval, or the whole name of the list file."""
    root, _, name = piece.rpartition("/")
    root, name = root.removesuffix(_LISTS).rstrip("/"), name.removesuffix(".txt")
    if name and f"{name}.txt" in files.texts.names(join(root, _LISTS)):
        return _read_list(files, root, name)
    return None


def _read_list(files: AnnotationFiles, root: str, name: str) -> ImageList:
    """One name per line. In lists of single classes a number follows, which says nothing about boxes."""
    text = files.texts.read(join(root, f"{_LISTS}/{name}.txt")).decode("utf-8-sig", "surrogateescape")
    annotated = set(files.texts.names(join(root, "Annotations")))
    names = []
    for line in text.splitlines():
        whole = line.strip()
        if whole:
            names.append(whole if f"{whole}.xml" in annotated else whole.split()[0])
    return ImageList(root, tuple(names))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
