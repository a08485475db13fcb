"""What images with a class for every pixel are to a program: a set with masks, and how a mask file is read."""

from __future__ import annotations

import hashlib
import io
import json
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessella.data.decode import MAX_BYTES, MAX_PIXELS, Unreadable
from tessella.data.sources import ArrayImages, ImageSet
from tessella.data.sources.messages import shown
from tessella.errors import UserError

IGNORE = 255  # class of pixels that count neither in training nor in a score

_ANY = np.arange(256, dtype=np.int16)  # stored value -> class, where every value is one
_LOSSLESS = ("PNG", "BMP", "TIFF", "GIF", "PPM")


class Meaning(NamedTuple):
    """What the values of a kind of masks stand for."""

    name: str = "folders"  # of the kind
    table: NDArray[np.int16] | None = None  # (256,) stored value -> class, -1 for none; None: the value is the class
    accepted: str = ""  # the table in words


class MaskedImages:
    """Images and masks of one split, in the order of their keys. Threads may share it.

    Attributes:
        name: as given, with the split.
        keys: (N,) names within the split, '/' between folders, without suffix.
        ids: (N,) int64, stable, distinct, non-negative.
        sizes: (N, 2) int32 width and height in pixels of images and masks.
        classes: names in the order of the mask's numbers; None where nothing but the masks tells how many there are.
        unreadable: (key, reason) of what belongs to the split and cannot be read.
        fingerprint: changes when an image or mask comes, goes, is renamed or encoded anew.
    """

    name: str
    keys: list[str]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int32]
    classes: list[str] | None
    unreadable: list[tuple[str, str]]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, row: int) -> NDArray[np.uint8]:
        """Upright pixels, (height, width, 3) uint8 RGB.

        Raises:
            Unreadable: the image cannot be read or decoded whole.
        """
        raise NotImplementedError

    def mask(self, row: int) -> NDArray[np.uint8]:
        """The class of every pixel, (height, width) uint8: a number below `len(classes)`, or `IGNORE`.

        Raises:
            Unreadable: the mask cannot be read or decoded whole.
            UserError: it is not a mask of this image, or holds a value that is no class; names file and value.
        """
        raise NotImplementedError

    def source_names(self, row: int) -> tuple[str, str]:
        """Where an image and its mask come from, for people."""
        return self.keys[row], self.keys[row]


class ArrayMasks(MaskedImages):
    """Images and masks that are arrays in memory.

    Args:
        name: for reports.
        images: (N, H, W, 3) or, gray, (N, H, W) uint8; not copied.
        masks: (N, H, W) uint8 class numbers or `IGNORE`; not copied.
        classes: their names.
        keys: N names in ascending order; by default the row numbers.

    Raises:
        UserError: wrong shape or type.
    """

    def __init__(
        self,
        name: str,
        images: NDArray[np.uint8],
        masks: NDArray[np.uint8],
        classes: list[str],
        keys: list[str] | None = None,
    ) -> None:
        self._images = ArrayImages(name, images, keys=keys)
        self._masks = np.asarray(masks)
        if self._masks.shape != np.asarray(images).shape[:3] or self._masks.dtype != np.uint8:
            raise UserError(
                f"masks of {name} are an array of {self._masks.dtype} {self._masks.shape}: give uint8 "
                f"{np.asarray(images).shape[:3]}, one class number per pixel"
            )
        self.name, self.classes, self.unreadable = name, list(classes), []
        self.keys = [self._images.key(row) for row in range(len(self._images))]
        self.ids, self.sizes = self._images.ids, self._images.sizes
        digest = hashlib.sha256(self._images.fingerprint.encode())
        for mask in self._masks:
            digest.update(mask.tobytes())
        self.fingerprint = digest.hexdigest()

    def image(self, row: int) -> NDArray[np.uint8]:  # noqa: D102
        return self._images.image(row)

    def mask(self, row: int) -> NDArray[np.uint8]:  # noqa: D102
        table = _identity(self.classes)
        return _to_classes(self._masks[row], table, f"{self.name}, mask {self.keys[row]}", _accepted(self.classes))


class FileMasks(MaskedImages):
    """Images and masks that are files of one folder or archive."""

    def __init__(
        self, name: str, files: ImageSet, pairs: dict[str, tuple[int, int]], meaning: Meaning, classes: list[str] | None
    ) -> None:
        """Keep the pairs.

        Args:
            name: for reports.
            files: holds images and masks.
            pairs: key -> (row of the image, row of the mask).
            meaning: of the masks' values.
            classes: names, or None.
        """
        self.name, self.classes, self.unreadable = name, classes, []
        self.keys = sorted(pairs)
        self._files, self._meaning = files, meaning
        self._rows = np.array([pairs[key] for key in self.keys], dtype=np.int64).reshape(-1, 2)
        self.ids, self.sizes = files.ids[self._rows[:, 0]], files.sizes[self._rows[:, 0]]

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of names, encoded sizes, pixel sizes and classes."""
        digest = hashlib.sha256(json.dumps([self.keys, self.classes, self._meaning.name]).encode())
        for column in (self._files.index.byte_sizes[self._rows], self._files.sizes[self._rows.ravel()]):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        return digest.hexdigest()

    def image(self, row: int) -> NDArray[np.uint8]:  # noqa: D102
        return self._files.image(int(self._rows[row, 0]))

    def mask(self, row: int) -> NDArray[np.uint8]:  # noqa: D102
        stored = self._files.read(int(self._rows[row, 1]))
        image, name = self.source_names(row)
        values = decode_mask(stored, name) if isinstance(stored, bytes) else stored
        width, height = (int(side) for side in self.sizes[row])
        if values.shape != (height, width):
            raise UserError(
                f"the mask {name} has {values.shape[1]} x {values.shape[0]} pixels and its image {image}, upright, "
                f"{width} x {height}: a mask needs a pixel for every pixel of its image"
            )
        table = _identity(self.classes) if self._meaning.table is None else self._meaning.table
        return _to_classes(values, table, f"the mask {name}", self._meaning.accepted or _accepted(self.classes))

    def source_names(self, row: int) -> tuple[str, str]:  # noqa: D102
        image, mask = (self._files.key(int(number)) for number in self._rows[row])
        return shown(image), shown(mask)


def decode_mask(encoded: bytes, name: str) -> NDArray[np.int64]:
    """The numbers stored in a mask, as they are: palette indices or gray values of 1 to 16 bits.

    Args:
        encoded: a whole file in a format without loss.
        name: of the file, for errors.

    Returns:
        (height, width) int64.

    Raises:
        Unreadable: damaged, truncated or too large.
        UserError: colours or a lossy format, in which class numbers cannot be told.
    """
    if len(encoded) > MAX_BYTES:
        raise Unreadable(f"the file has {len(encoded):,} bytes, more than the limit of {MAX_BYTES:,}")
    if encoded.startswith(b"\xff\xd8") or encoded[8:12] == b"WEBP":
        raise UserError(
            f"the mask {shown(name)} is a JPEG or WebP, which changes the numbers that it stores: save masks as PNG"
        )
    try:
        with Image.open(io.BytesIO(encoded), formats=_LOSSLESS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS:,}")
            image.load()
            mode, values = image.mode, np.asarray(image)
    except Unreadable:
        raise
    except Exception as error:  # a damaged file can make a parser raise anything
        raise Unreadable(" ".join(str(error).split())[:200] or type(error).__name__) from error
    if mode in ("LA", "PA", "La"):
        values = values[..., 0]
    elif values.ndim == 3:
        colours = values[..., :3]
        if (colours != colours[..., :1]).any():
            raise UserError(
                f"the mask {shown(name)} is a picture in colours, which do not say their class: save class numbers, as "
                "a palette or gray PNG"
            )
        values = colours[..., 0]
    elif values.dtype.kind == "f":
        raise UserError(f"the mask {shown(name)} holds fractions: save class numbers, as a palette or gray PNG")
    return values.astype(np.int64) // _stretch(encoded)


def _stretch(encoded: bytes) -> int:
    """By what Pillow multiplies gray values of a PNG with 2 or 4 bits, so that they fill 8."""
    gray_png = encoded.startswith(b"\x89PNG") and encoded[25:26] == b"\0"
    return {2: 85, 4: 17}.get(encoded[24], 1) if gray_png else 1


def _identity(classes: list[str] | None) -> NDArray[np.int16]:
    table = _ANY.copy()
    if classes is not None:
        table[len(classes) : IGNORE] = -1
    return table


def _accepted(classes: list[str] | None) -> str:
    last = IGNORE - 1 if classes is None else len(classes) - 1
    return f"0 to {last} for the classes and 255 for pixels that do not count"


def _to_classes(values: NDArray[np.integer], table: NDArray[np.int16], name: str, accepted: str) -> NDArray[np.uint8]:
    """Look every stored value up; -1 in the table is no class."""
    counts = np.bincount(values.ravel()) if int(values.min(initial=0)) >= 0 else np.zeros(0, dtype=np.int64)
    present = np.flatnonzero(counts)
    wrong = present[(present > 255) | (table[np.minimum(present, 255)] < 0)]
    if len(wrong) or not len(counts):
        value = int(wrong[0]) if len(wrong) else int(values.min())
        raise UserError(
            f"{shown(name)} holds the value {value} at {int((values == value).sum())} pixels, which is no class: "
            f"accepted are {accepted}. Correct the mask, or name the class in classes.txt"
        )
    return table.astype(np.uint8)[values]
