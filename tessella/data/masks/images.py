"""Images with a class for every pixel: a set with masks, and how a mask file is read."""

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
from tessella.errors import UserError
from tessella.text import printable as shown

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
        images: the set that holds the images.
        rows: (N,) row of `images` of each image.
        keys: (N,) names within the split, '/' between folders, without suffix.
        ids: (N,) int64, stable, distinct, non-negative.
        sizes: (N, 2) int32 width and height in pixels of images and masks.
        classes: names in the order of the mask's numbers; None where only the masks show how many there are.
        unreadable: (key, reason) of what belongs to the split and cannot be read.
        fingerprint: changes when an image or mask comes, goes, is renamed or encoded again.
    """

    fingerprint: str

    def __init__(
        self,
        name: str,
        images: ImageSet,
        rows: NDArray[np.int64],
        keys: list[str],
        classes: list[str] | None,
        meaning: Meaning,
    ) -> None:
        self.name, self.images, self.rows, self.keys = name, images, rows, keys
        self.classes, self.meaning = classes, meaning
        self.ids, self.sizes = images.ids[rows], images.sizes[rows]
        self.unreadable: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, row: int) -> NDArray[np.uint8]:
        """Upright pixels, (height, width, 3) uint8 RGB.

        Raises:
            Unreadable: the image cannot be read or decoded whole.
        """
        return self.images.image(int(self.rows[row]))

    def mask(self, row: int) -> NDArray[np.uint8]:
        """The class of every pixel, (height, width) uint8: a number below `len(classes)`, or `IGNORE`.

        Raises:
            Unreadable: the mask cannot be read or decoded whole.
            UserError: it is not a mask of this image, or holds a value that is no class; names file and value.
        """
        values, (image, name) = self.stored(row), self.source_names(row)
        width, height = (int(side) for side in self.sizes[row])
        if values.shape != (height, width):
            raise UserError(
                f"the mask {name} has {values.shape[1]} x {values.shape[0]} pixels and its image {image}, upright, "
                f"{width} x {height}: a mask needs a pixel for every pixel of its image"
            )
        count, table, accepted = IGNORE if self.classes is None else len(self.classes), *self.meaning[1:]
        if table is None:
            table = np.where((count > _ANY) | (_ANY == IGNORE), _ANY, -1)
        accepted = accepted or f"0 to {count - 1} for the classes and 255 for pixels that do not count"
        return _to_classes(values, table, name, accepted)

    def stored(self, row: int) -> NDArray[np.integer]:
        """The numbers of a mask as they are stored."""
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
        held, self._masks = ArrayImages(name, images, keys=keys), np.asarray(masks)
        shape = np.asarray(images).shape[:3]
        if self._masks.shape != shape or self._masks.dtype != np.uint8:
            raise UserError(
                f"masks of {name} are an array of {self._masks.dtype} {self._masks.shape}: give uint8 {shape}, one "
                "class number per pixel"
            )
        all_keys = [held.key(row) for row in range(len(held))]
        super().__init__(name, held, np.arange(len(held)), all_keys, list(classes), Meaning())
        digest = hashlib.sha256(held.fingerprint.encode())
        for mask in self._masks:
            digest.update(mask.tobytes())
        self.fingerprint = digest.hexdigest()

    def stored(self, row: int) -> NDArray[np.integer]:  # noqa: D102
        return self._masks[row]


class FileMasks(MaskedImages):
    """Images and masks that are files of one folder or archive; `pairs`: key -> rows of image and mask in `files`."""

    def __init__(
        self, name: str, files: ImageSet, pairs: dict[str, tuple[int, int]], meaning: Meaning, classes: list[str] | None
    ) -> None:
        keys = sorted(pairs)
        self._pairs = np.array([pairs[key] for key in keys], dtype=np.int64).reshape(-1, 2)
        super().__init__(name, files, self._pairs[:, 0], keys, classes, meaning)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of names, encoded sizes, pixel sizes and classes."""
        digest = hashlib.sha256(json.dumps([self.keys, self.classes, self.meaning.name]).encode())
        for column in (self.images.index.byte_sizes[self._pairs], self.images.sizes[self._pairs.ravel()]):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        return digest.hexdigest()

    def stored(self, row: int) -> NDArray[np.integer]:  # noqa: D102
        encoded = self.images.read(int(self._pairs[row, 1]))
        return decode_mask(encoded, self.source_names(row)[1]) if isinstance(encoded, bytes) else encoded

    def source_names(self, row: int) -> tuple[str, str]:  # noqa: D102
        image, mask = (self.images.key(int(number)) for number in self._pairs[row])
        return shown(image), shown(mask)


def decode_mask(encoded: bytes, name: str) -> NDArray[np.int64]:
    """The numbers stored in a mask: palette indices or gray values of 1 to 16 bits.

    Args:
        encoded: a whole file in a format without loss.
        name: of the file, for errors.

    Returns:
        (height, width) int64.

    Raises:
        Unreadable: damaged, truncated or too large.
        UserError: colours or a lossy format, which do not hold class numbers.
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
    """The factor by which Pillow multiplies gray values of a PNG with 2 or 4 bits, so that they fill 8."""
    gray_png = encoded.startswith(b"\x89PNG") and encoded[25:26] == b"\0"
    return {2: 85, 4: 17}.get(encoded[24], 1) if gray_png else 1


def _to_classes(values: NDArray[np.integer], table: NDArray[np.int16], name: str, accepted: str) -> NDArray[np.uint8]:
    """Look every stored value up; -1 in the table is no class."""
    counts = np.bincount(values.ravel()) if int(values.min(initial=0)) >= 0 else np.zeros(0, dtype=np.int64)
    present = np.flatnonzero(counts)
    wrong = present[(present > 255) | (table[np.minimum(present, 255)] < 0)]
    if len(wrong) or not len(counts):
        value = int(wrong[0]) if len(wrong) else int(values.min())
        raise UserError(
            f"the mask {shown(name)} holds the value {value} at {int((values == value).sum())} pixels, which is no "
            f"class: accepted are {accepted}. Correct the mask, or name the class in classes.txt"
        )
    return table.astype(np.uint8)[values]
