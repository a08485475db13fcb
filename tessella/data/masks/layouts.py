"""Images of which every pixel has a class: VOC, Cityscapes, ADE20K, plain folders of images and masks, drawn shapes.

    layout       images                        masks                              splits
    VOC          JPEGImages/NAME.jpg           SegmentationClass[Aug]/NAME.png    ImageSets/Segmentation/SPLIT.txt
    Cityscapes   leftImg8bit/SPLIT/CITY/...    gtFine/SPLIT/CITY/..._labelIds     folders
    ADE20K       images/training/NAME.jpg      annotations/training/NAME.png      folders
    folders      images/SPLIT/NAME.jpg, or     masks/SPLIT/NAME.png, or           folders, or SPLIT.txt, or none
                 SPLIT/images/NAME.jpg         SPLIT/masks/NAME.png

A set is opened as `data.sources` opens images: a folder, an archive or a part of one, read in place. Masks are pictures
of class numbers: palette or gray, 255 for pixels that do not count. `classes.txt` beside the folders names the classes,
one per line; without it they are numbered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessella.data.decode import Unreadable
from tessella.data.masks.images import IGNORE, ArrayMasks, FileMasks, MaskedImages, Meaning
from tessella.data.sources import ImageSet, open_images
from tessella.data.sources.archives import TarImages
from tessella.data.sources.embedded import EMBEDDED
from tessella.data.sources.files import FileImages, read_file
from tessella.data.sources.messages import check_split, shown
from tessella.data.sources.tars import Archives, walk_tar
from tessella.errors import UserError

__all__ = ["IGNORE", "ArrayMasks", "MaskedImages", "open_masks"]

_TRAIN = ("train", "training")
_VAL = ("val", "validation", "valid", "dev")
_TEST = ("test", "testing")
_CLASS_FILES = ("classes.txt", "labels.txt", "class_names.txt")
_VOC_NAME = re.compile(r"\d{4}_\d{6}")  # of the challenge's own images: year_number

VOC_CLASSES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
CITYSCAPES_CLASSES = {  # label id -> name; its place in this table is the training id
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_CITYSCAPES_IDS = 34
_ADE_CLASSES = 150


def open_masks(data: str, split: str = "train", *, cache: Path | None = None) -> MaskedImages:
    """Open one split of images with masks.

    Args:
        data: a folder, an archive, or a part of one behind two colons, in one of the module's layouts; or shapes.
        split: "train"; "test", which is the validation split where the test split is not there or not public; or a
            split by its own name. A set without splits is taken whole.
        cache: as in `open_images`.

    Raises:
        UserError: nothing there, no such layout, no such split, or an image without its mask.
    """
    base, _, part = data.partition("::")
    if base.lower() in EMBEDDED:
        return _open_embedded(data, base.lower(), part or split)
    files = open_images(data, cache=cache)
    if not isinstance(files, FileImages | TarImages):
        raise UserError(f"{shown(data)} has a class per image, not per pixel: give {_LAYOUTS_IN_WORDS}")
    layout, found = _recognise(data, files, split)
    texts = _Texts(data, files)
    chosen, wanted = _choose_split(data, layout, found, texts, split)
    pairs, unreadable = _pair(data, layout, found, chosen, wanted)
    name = data if chosen is None else f"{data} [{chosen}]"
    if not pairs:
        first = f"; the first that cannot be read is {': '.join(map(shown, unreadable[0]))}" if unreadable else ""
        raise UserError(f"{shown(name)} holds no image with a mask{first}. Give {_LAYOUTS_IN_WORDS}")
    masks = FileMasks(
        name,
        files,
        pairs,
        Meaning(layout.name, layout.table, layout.accepted),
        _classes_of(data, layout, found, texts, pairs),
    )
    masks.unreadable = unreadable
    return masks


@dataclass(frozen=True)
class _Layout:
    """Where a kind of data set keeps images and masks, and what the masks' values mean."""

    name: str
    images: tuple[str, ...]  # names of the folder above all images, lower case
    masks: tuple[str, ...]  # the same of masks; the first that has a mask of an image wins
    image_ending: str = ""  # of a file's name, before the suffix
    mask_endings: tuple[str, ...] = ("",)
    table: NDArray[np.int16] | None = None  # see `Meaning`
    accepted: str = ""
    classes: tuple[str, ...] | None = None
    public_test: bool = True  # whether masks of a split named test can be trusted
    all_have_masks: bool = True  # an image without a mask is a mistake


def _table(pairs: Iterable[tuple[int, int]]) -> NDArray[np.int16]:
    table = np.full(256, -1, dtype=np.int16)
    for value, label in pairs:
        table[value] = label
    return table


_TRAIN_ID = {label: number for number, label in enumerate(CITYSCAPES_CLASSES)}
_CITYSCAPES = _Layout(
    "Cityscapes",
    ("leftimg8bit",),
    ("gtfine",),
    image_ending="_leftImg8bit",
    mask_endings=("_gtFine_labelIds",),
    table=_table([*((i, _TRAIN_ID.get(i, IGNORE)) for i in range(_CITYSCAPES_IDS)), (IGNORE, IGNORE)]),
    accepted="the label ids 0 to 33, and 255",
    classes=tuple(CITYSCAPES_CLASSES.values()),
    public_test=False,
)
_VOC = _Layout("VOC", ("jpegimages",), ("segmentationclass",), public_test=False, all_have_masks=False)
_VOC_AUGMENTED = _Layout("VOC", ("jpegimages",), ("segmentationclassaug", "segmentationclass"), all_have_masks=False)
_ADE20K = _Layout(
    "ADE20K",
    ("images",),
    ("annotations",),
    table=_table([(0, IGNORE), *((i, i - 1) for i in range(1, _ADE_CLASSES + 1))]),
    accepted="1 to 150 for the classes and 0 for pixels that do not count",
    public_test=False,
)
_FOLDERS = _Layout(
    "folders",
    ("images", "image", "imgs", "img", "jpegimages"),
    ("masks", "mask", "labels", "label", "annotations", "annotation", "segmentation", "gt"),
    mask_endings=("", "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation", "_L"),
)
_LAYOUTS_IN_WORDS = (
    "a folder or archive with images/ and masks/ (each may have train/ and val/ below it), or in the layout of "
    "VOC (JPEGImages, SegmentationClass), Cityscapes (leftImg8bit, gtFine) or ADE20K (images/training, "
    "annotations/training)"
)


class _Place(NamedTuple):
    """What a file's path says."""

    split: str | None
    key: str  # without the layout's folder, the split and the suffix
    root: str  # of the layout: what lies above its folder, "" or ending in "/"


class _Found(NamedTuple):
    """The files of a layout."""

    images: dict[tuple[str | None, str], int]  # (split, key) -> row
    masks: dict[str, dict[tuple[str | None, str], int]]  # folder -> (split, key) -> row
    unreadable: dict[tuple[bool, str | None, str], str]  # (is a mask, split, key) -> reason
    root: str
    sources: Callable[[int], str]  # row -> path as stored


def _recognise(data: str, files: ImageSet, split: str) -> tuple[_Layout, _Found]:
    """The layout of the files, and which of them are images and masks."""
    paths = [files.key(row) for row in range(len(files))]
    folders = {part.lower() for path in paths for part in path.split("/")[:-1]}
    if {"leftimg8bit", "gtfine"} <= folders:
        layout = _CITYSCAPES
    elif {"jpegimages", "segmentationclass"} <= folders or {"jpegimages", "segmentationclassaug"} <= folders:
        layout = _VOC_AUGMENTED if "segmentationclassaug" in folders else _VOC
    elif {"images", "annotations", "training", "validation"} <= folders:
        layout = _ADE20K
    elif folders & set(_FOLDERS.images) and folders & set(_FOLDERS.masks):
        layout = _FOLDERS
    else:
        seen = ", ".join(map(shown, sorted(folders)[:6])) or "no folders"
        raise UserError(f"{shown(data)} has no masks that can be told from images (it holds {seen}): give "
                        f"{_LAYOUTS_IN_WORDS}")  # fmt: skip
    return layout, _sort_out(data, layout, files, paths, split)


def _sort_out(data: str, layout: _Layout, files: ImageSet, paths: list[str], split: str) -> _Found:
    images: dict[tuple[str | None, str], int] = {}
    masks: dict[str, dict[tuple[str | None, str], int]] = {folder: {} for folder in layout.masks}
    unreadable: dict[tuple[bool, str | None, str], str] = {}
    roots: set[str] = set()
    for row, path in enumerate(paths):
        folder, place = _place(layout, path, split)
        if place is None:
            continue
        roots.add(place.root)
        kept = masks.get(folder, images)
        other = kept.setdefault((place.split, place.key), row)
        if other != row:
            raise UserError(
                f"{shown(data)} has two files that go by one name, {shown(paths[other])} and {shown(path)}: keep one"
            )
    for path, reason in files.unreadable:
        folder, place = _place(layout, path, split)
        if place is not None:
            unreadable[folder in masks, place.split, place.key] = reason
    root = min(roots, key=len, default="")
    if len(roots) > 1:  # several sets in one: their folders stay in the names
        root = ""
    images = {(part, key.removeprefix(root)): row for (part, key), row in images.items()}
    masks = {
        folder: {(part, key.removeprefix(root)): row for (part, key), row in found.items()}
        for folder, found in masks.items()
    }
    unreadable = {(mask, part, key.removeprefix(root)): why for (mask, part, key), why in unreadable.items()}
    return _Found(images, masks, unreadable, root, lambda row: shown(paths[row]))


def _place(layout: _Layout, path: str, split: str) -> tuple[str, _Place | None]:
    """The layout's folder that a file lies in (lower case), and its place; None if it lies in none."""
    *folders, file = path.split("/")
    at = next((i for i, name in enumerate(folders) if name.lower() in layout.images + layout.masks), None)
    if at is None:
        return "", None
    before, word, after = folders[:at], folders[at].lower(), folders[at + 1 :]
    known = {*_TRAIN, *_VAL, *_TEST, split.lower()}
    part = None
    if after and after[0].lower() in known:
        part, *after = after
    elif before and before[-1].lower() in known:
        *before, part = before
    stem = file.rsplit(".", 1)[0]
    if word in layout.images:
        stem = stem.removesuffix(layout.image_ending)
    root = "".join(f"{name}/" for name in before)
    return word, _Place(part, root + "".join(f"{name}/" for name in after) + stem, root)


def _choose_split(
    data: str, layout: _Layout, found: _Found, texts: _Texts, split: str
) -> tuple[str | None, list[str] | None]:
    """The split's own name (None: the set has no splits), and the keys that a list gives it (None: its folder)."""
    folders = {part for part, _ in found.images if part is not None}
    for name in _names_of(layout, split):
        for part in sorted(folders):
            if part.lower() == name.lower():
                return part, None
        text = _list_of(found, texts, name)
        if text is not None:
            return name, [line.strip() for line in text.splitlines() if line.strip()]
    lists = [
        name for name in (*_TRAIN, *_VAL, *_TEST, "trainval", "trainaug") if _list_of(found, texts, name) is not None
    ]
    if folders or lists:
        there = ", ".join(sorted(folders | set(lists)))
        raise UserError(f"{shown(data)} has no split {shown(split)!r}: there are {shown(there)}")
    return None, None


def _list_of(found: _Found, texts: _Texts, split: str) -> str | None:
    """The text that lists a split's images."""
    texts_of_split = (texts.read(f"{found.root}{folder}{split}.txt") for folder in ("ImageSets/Segmentation/", ""))
    return next((text for text in texts_of_split if text is not None), None)


def _names_of(layout: _Layout, split: str) -> list[str]:
    """What a split may be called, the best first."""
    if split == "train":
        return [*(("trainaug", "train_aug") if layout is _VOC_AUGMENTED else ()), *_TRAIN]
    if split == "test":
        return [*_TEST, *_VAL] if layout.public_test and layout is not _VOC_AUGMENTED else [*_VAL, *_TEST]
    return [split, *(_VAL if split in _VAL else ())]


def _pair(
    data: str, layout: _Layout, found: _Found, split: str | None, wanted: list[str] | None
) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str]]]:
    """Key -> (row of the image, row of the mask); and (key, reason) of pairs that cannot be read."""
    if wanted is None:
        keys = [key for part, key in found.images if part == split]
        keys += [key for mask, part, key in found.unreadable if not mask and part == split]
    else:
        keys = [_listed_key(data, found, line, split) for line in wanted]
    pairs: dict[str, tuple[int, int]] = {}
    unreadable: dict[str, str] = {}
    for key in keys:
        places = [(part, key) for part in dict.fromkeys((split, None))]
        image = next((found.images[place] for place in places if place in found.images), None)
        mask = _mask_of(layout, found, places)
        if image is None:
            reasons = [found.unreadable[False, *place] for place in places if (False, *place) in found.unreadable]
            unreadable[key] = f"the image: {reasons[0]}"
        elif isinstance(mask, int):
            pairs[key] = image, mask
        elif mask is not None:
            unreadable[key] = f"the mask: {mask}"
        elif layout.all_have_masks or wanted is not None:
            raise UserError(
                f"{shown(data)} has no mask of {found.sources(image)}: a mask goes by its image's name, in a folder "
                f"called {' or '.join(layout.masks[:3])}; add it, or take the image away"
            )
    return pairs, sorted(unreadable.items())


def _mask_of(layout: _Layout, found: _Found, places: list[tuple[str | None, str]]) -> int | str | None:
    """Row of an image's mask, or why it cannot be read, or None."""
    for folder in layout.masks:
        for part, key in places:
            for ending in layout.mask_endings:
                if (part, key + ending) in found.masks[folder]:
                    return found.masks[folder][part, key + ending]
    for part, key in places:
        for ending in layout.mask_endings:
            if (True, part, key + ending) in found.unreadable:
                return found.unreadable[True, part, key + ending]
    return None


def _listed_key(data: str, found: _Found, line: str, split: str | None) -> str:
    """The key behind a line of a list: a name, a file name, or the two paths of image and mask."""
    first = line.split()[0]
    for name in (line, line.rsplit(".", 1)[0], first.rsplit(".", 1)[0].rsplit("/", 1)[-1]):
        if any((part, name) in found.images or (False, part, name) in found.unreadable for part in (split, None)):
            return name
    raise UserError(f"{shown(data)}: the list of {shown(str(split))} names {shown(line)!r}, and there is no such image")


def _classes_of(
    data: str, layout: _Layout, found: _Found, texts: _Texts, pairs: dict[str, tuple[int, int]]
) -> list[str] | None:
    if layout.classes is not None:
        return list(layout.classes)
    if layout is _ADE20K:
        return _ade_classes(texts.read(f"{found.root}objectInfo150.txt"))
    for name in _CLASS_FILES:
        text = texts.read(found.root + name)
        if text is not None:
            return _class_names(data, name, text)
    if layout.name == "VOC" and all(_VOC_NAME.fullmatch(key) for key in pairs):
        return list(VOC_CLASSES)
    return None


def _ade_classes(table: str | None) -> list[str]:
    """Names from the release's table (number, ratio, train, val, name), or the masks' values."""
    rows = [line.split("\t") for line in (table or "").splitlines()[1:] if line.strip()]
    if len(rows) == _ADE_CLASSES and all(len(row) >= 5 for row in rows):
        return [row[4].split(",")[0].strip() for row in rows]
    return [str(value) for value in range(1, _ADE_CLASSES + 1)]


def _class_names(data: str, file: str, text: str) -> list[str]:
    """One name per line; lines may begin with their own number."""
    names = [line.strip() for line in text.rstrip().splitlines()]
    numbered = [re.match(r"(\d+)\s*[\s:,=]\s*(\S.*)", name) for name in names]
    if names and all(match and int(match[1]) in (i, IGNORE) for i, match in enumerate(numbered)):
        names = [match[2] for match in numbered if match and int(match[1]) != IGNORE]
    problem = ""
    if not names or "" in names:
        problem = "an empty line" if names else "no line"
    elif len(set(names)) < len(names):
        problem = f"the name {shown(next(name for name in names if names.count(name) > 1))!r} twice"
    elif len(names) > IGNORE:
        problem = f"{len(names)} classes"
    if problem:
        raise UserError(
            f"{file} of {shown(data)} has {problem}: give one name per line, at most {IGNORE}; line 1 names value 0"
        )
    return names


class _Texts:
    """Small text files beside the images, in a folder or an archive."""

    def __init__(self, data: str, files: FileImages | TarImages) -> None:
        self._root: str | None = None
        self._members: dict[str, tuple[Archives, int, int, int]] = {}
        if isinstance(files, FileImages):
            self._root = files._root
            return
        below = data.rpartition("::")[2].strip("/") + "/" if "::" in data and not os.path.exists(data) else ""  # noqa: PTH110
        reader = files._archives
        for number, path in enumerate(reader.paths):
            members, _ = walk_tar(path, (".txt",))
            for member in members:
                if member.name.startswith(below):
                    self._members[member.name.removeprefix(below)] = reader, number, member.offset, member.size

    def read(self, name: str) -> str | None:
        """A file's text, None if it is not there. Bytes that are not UTF-8 are kept as in file names."""
        try:
            if self._root is not None:
                path = Path(self._root) / name
                raw = read_file(str(path)) if path.is_file() else None
            else:
                member = self._members.get(name)
                raw = member[0].read(*member[1:]) if member else None
        except Unreadable as error:
            raise UserError(f"{shown(name)} cannot be read: {error.reason}") from None
        return None if raw is None else raw.decode("utf-8-sig", "surrogateescape")


def _open_embedded(data: str, name: str, split: str) -> MaskedImages:
    """Drawn scenes of one to four shapes, 400 for training and 100 for testing; class 0 is the background."""
    from tessella.data.sources.scenes import CLASSES, draw_scenes

    if name != "shapes":
        raise UserError(f"{data} has a class per image, not per pixel: give shapes, or {_LAYOUTS_IN_WORDS}")
    check_split(data, split, ("train", "test"))
    rows = np.arange(400) if split == "train" else np.arange(400, 500)
    scenes = draw_scenes(rows)
    masks = np.zeros((len(rows), *scenes[0].pixels.shape[:2]), dtype=np.uint8)
    for mask, scene in zip(masks, scenes, strict=True):
        for shape, label in zip(scene.masks, scene.labels, strict=True):
            mask[shape] = label + 1
    pixels, keys = np.stack([scene.pixels for scene in scenes]), [f"{row:04d}" for row in rows]
    return ArrayMasks(f"shapes [{split}]", pixels, masks, ["background", *CLASSES], keys)
