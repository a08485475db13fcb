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

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessella.data.masks.generated import open_shapes
from tessella.data.masks.images import IGNORE, ArrayMasks, FileMasks, MaskedImages, Meaning
from tessella.data.sources import open_images
from tessella.data.sources.archives import TarImages
from tessella.data.sources.files import FileImages
from tessella.data.texts import ArchiveTexts, FolderTexts, Texts, first_text, part_of
from tessella.errors import UserError
from tessella.text import printable as shown

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
    if data.partition("::")[0].lower() == "shapes":
        return open_shapes(data, split)
    files = open_images(data, cache=cache)
    if not isinstance(files, FileImages | TarImages):
        raise UserError(f"{shown(data)} has a class per image, not per pixel: give {_LAYOUTS_IN_WORDS}")
    return _Set(data, files, split).open()


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


Slot = tuple[str, str | None, str]  # folder of masks, or "" for images; split; key: the rest of the path, no suffix


class _Set:
    """The files of one data set, sorted by what their paths say."""

    def __init__(self, data: str, files: FileImages | TarImages, split: str) -> None:
        self.data, self.files, self.split = data, files, split
        self.texts: Texts = (
            FolderTexts(Path(files._root))
            if isinstance(files, FileImages)
            else ArchiveTexts(files._archives, part_of(data).strip("/"))
        )
        paths = [files.key(row) for row in range(len(files))]
        self.layout = _recognise(data, paths)
        self.found: dict[Slot, int | str] = {}  # row, or why the file cannot be read
        roots: set[str] = set()
        for row, path in enumerate(paths):
            slot, root = self._slot(path) or (None, "")
            if slot in self.found:
                both = f"{shown(paths[int(self.found[slot])])} and {shown(path)}"
                raise UserError(f"{shown(data)} has two files that go by one name, {both}: keep one")
            if slot is not None:
                self.found[slot] = row
                roots.add(root)
        for path, reason in files.unreadable:
            slot, _ = self._slot(path) or (None, "")
            if slot is not None:
                self.found.setdefault(slot, reason)
        # The folders above the layout's; with several sets in one, they stay in the names.
        self.root = roots.pop() if len(roots) == 1 else ""
        self.found = {
            (folder, part, key.removeprefix(self.root)): value for (folder, part, key), value in self.found.items()
        }

    def open(self) -> FileMasks:
        """The split that was asked for."""
        part, lines = self._choose_split()
        name = self.data if part is None else f"{self.data} [{part}]"
        if lines is None:
            keys = [key for folder, split, key in self.found if folder == "" and split == part]
        else:
            keys = [self._listed_key(line, part) for line in lines]
        pairs, unreadable = dict[str, tuple[int, int]](), dict[str, str]()
        for key in keys:
            image, mask = self._find("", part, key, ("",)), self._mask(part, key)
            if isinstance(image, str):
                unreadable[key] = f"the image: {image}"
            elif isinstance(mask, str):
                unreadable[key] = f"the mask: {mask}"
            elif image is not None and mask is not None:
                pairs[key] = image, mask
            elif image is not None and (self.layout.all_have_masks or lines is not None):
                raise UserError(
                    f"{shown(self.data)} has no mask of {shown(self.files.key(image))}: a mask goes by its image's "
                    f"name, in a folder called {' or '.join(self.layout.masks[:3])}; add it, or take the image away"
                )
        failed = sorted(unreadable.items())
        if not pairs:
            first = f"; the first that cannot be read is {': '.join(map(shown, failed[0]))}" if failed else ""
            raise UserError(f"{shown(name)} holds no image with a mask{first}. Give {_LAYOUTS_IN_WORDS}")
        meaning = Meaning(self.layout.name, self.layout.table, self.layout.accepted)
        masks = FileMasks(name, self.files, pairs, meaning, self._classes(pairs))
        masks.unreadable = failed
        return masks

    def _slot(self, path: str) -> tuple[Slot, str] | None:
        """Where a file belongs, and what lies above the layout's folder; None if it lies in no such folder."""
        layout, (*folders, file) = self.layout, path.split("/")
        at = next((i for i, name in enumerate(folders) if name.lower() in layout.images + layout.masks), None)
        if at is None:
            return None
        before, folder, after = folders[:at], folders[at].lower(), folders[at + 1 :]
        known, part = {*_TRAIN, *_VAL, *_TEST, self.split.lower()}, None
        if after and after[0].lower() in known:
            part, *after = after
        elif before and before[-1].lower() in known:
            *before, part = before
        stem, root = file.rsplit(".", 1)[0], "".join(f"{name}/" for name in before)
        if folder in layout.images:
            folder, stem = "", stem.removesuffix(layout.image_ending)
        return (folder, part, root + "".join(f"{name}/" for name in after) + stem), root

    def _find(self, folder: str, part: str | None, key: str, endings: Iterable[str]) -> int | str | None:
        """A file of the split, or of no split, with one of the endings; a readable one before others."""
        slots = [(folder, split, key + ending) for split in dict.fromkeys((part, None)) for ending in endings]
        values = [self.found[slot] for slot in slots if slot in self.found]
        return next((value for value in values if isinstance(value, int)), values[0] if values else None)

    def _mask(self, part: str | None, key: str) -> int | str | None:
        every = (self._find(folder, part, key, self.layout.mask_endings) for folder in self.layout.masks)
        values = [value for value in every if value is not None]
        return next((value for value in values if isinstance(value, int)), values[0] if values else None)

    def _choose_split(self) -> tuple[str | None, list[str] | None]:
        """The split's own name (None: the set has no splits), and the lines of its list (None: it is a folder)."""
        folders = {part for folder, part, _ in self.found if folder == "" and part is not None}
        for name in self._names():
            for part in sorted(folders):
                if part.lower() == name.lower():
                    return part, None
            text = self._list(name)
            if text is not None:
                return name, [line.strip() for line in text.splitlines() if line.strip()]
        lists = {name for name in (*_TRAIN, *_VAL, *_TEST, "trainval", "trainaug") if self._list(name) is not None}
        if folders or lists:
            there = ", ".join(sorted(folders | lists))
            raise UserError(f"{shown(self.data)} has no split {shown(self.split)!r}: there are {shown(there)}")
        return None, None

    def _names(self) -> list[str]:
        """What the split may be called, the best first."""
        if self.split == "train":
            return [*(("trainaug", "train_aug") if self.layout is _VOC_AUGMENTED else ()), *_TRAIN]
        if self.split == "test":
            own = self.layout.public_test and self.layout is not _VOC_AUGMENTED
            return [*_TEST, *_VAL] if own else [*_VAL, *_TEST]
        return [self.split, *(_VAL if self.split in _VAL else ())]

    def _list(self, split: str) -> str | None:
        """The text that lists a split's images."""
        return first_text(self.texts, [f"{self.root}{folder}{split}.txt" for folder in ("ImageSets/Segmentation/", "")])

    def _listed_key(self, line: str, part: str | None) -> str:
        """The key behind a line of a list: a name, a file name, or the two paths of image and mask."""
        first = line.split()[0]
        for name in (line, line.rsplit(".", 1)[0], first.rsplit(".", 1)[0].rsplit("/", 1)[-1]):
            if self._find("", part, name, ("",)) is not None:
                return name
        raise UserError(
            f"{shown(self.data)}: the list of {shown(str(part))} names {shown(line)!r}, and there is no such image"
        )

    def _classes(self, pairs: Iterable[str]) -> list[str] | None:
        if self.layout.classes is not None:
            return list(self.layout.classes)
        if self.layout is _ADE20K:
            return _ade_classes(first_text(self.texts, [f"{self.root}objectInfo150.txt"]))
        text = first_text(self.texts, [self.root + name for name in _CLASS_FILES])
        if text is not None:
            return _class_names(self.data, text)
        if self.layout.name == "VOC" and all(_VOC_NAME.fullmatch(key) for key in pairs):
            return list(VOC_CLASSES)
        return None


def _recognise(data: str, paths: list[str]) -> _Layout:
    folders = {part.lower() for path in paths for part in path.split("/")[:-1]}
    if {"leftimg8bit", "gtfine"} <= folders:
        return _CITYSCAPES
    if "jpegimages" in folders and folders & {"segmentationclass", "segmentationclassaug"}:
        return _VOC_AUGMENTED if "segmentationclassaug" in folders else _VOC
    if {"images", "annotations", "training", "validation"} <= folders:
        return _ADE20K
    if folders & set(_FOLDERS.images) and folders & set(_FOLDERS.masks):
        return _FOLDERS
    seen = ", ".join(map(shown, sorted(folders)[:6])) or "no folders"
    raise UserError(f"{shown(data)} has no masks beside its images (it holds {seen}): give {_LAYOUTS_IN_WORDS}")


def _ade_classes(table: str | None) -> list[str]:
    """Names from the release's table (number, ratio, train, val, name), or the masks' values."""
    rows = [line.split("\t") for line in (table or "").splitlines()[1:] if line.strip()]
    if len(rows) == _ADE_CLASSES and all(len(row) >= 5 for row in rows):
        return [row[4].split(",")[0].strip() for row in rows]
    return [str(value) for value in range(1, _ADE_CLASSES + 1)]


def _class_names(data: str, text: str) -> list[str]:
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
            f"the list of classes of {shown(data)} has {problem}: give one name per line, at most {IGNORE}; line 1 "
            "names value 0"
        )
    return names
