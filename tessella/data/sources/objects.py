"""Images of a Python program: names, arrays, lists of files or PIL images, data sets of other libraries.

A data set of your own needs two methods:

    __len__()           number of images
    __getitem__(i)      image i: a PIL image, a uint8 array (h, w, 3) or (h, w), or the path of a file; or a pair
                        (image, class number), or a dictionary with "image" and, if there are classes, "label"
    classes             optional: names of the classes, in the order of their numbers

torch's and Hugging Face's data sets have them already. Every image is opened once at the start, for its size and a
hash, so that resuming a run notices images that have changed. For millions of files give a folder, list or archive.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessella.data.decode import Unreadable, decode, upright_rgb
from tessella.data.index import Index
from tessella.data.sources import open_images
from tessella.data.sources.files import read_file
from tessella.data.sources.images import ArrayImages, ImageSet
from tessella.errors import UserError

_ACCEPTED = (
    "a name as on the command line, a uint8 array (N, H, W, 3) or (N, H, W), a pair (array, labels), a list of paths "
    "or PIL images, or a data set with __len__ and __getitem__"
)


def images_of(data: Any, labels: bool = False) -> ImageSet:
    """Open images that are given in any of the module's forms.

    Args:
        data: see the module.
        labels: whether classes are needed.

    Raises:
        UserError: it is none of these, it has no classes although they are needed, or an image cannot be read.
    """
    if isinstance(data, ImageSet):
        return data
    if isinstance(data, str | Path):
        return open_images(str(data), labels=labels)
    if isinstance(data, np.ndarray):
        if labels:
            raise UserError("labels are needed here: give the images as a pair (array, labels)")
        return ArrayImages("array", data)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], np.ndarray):
        return ArrayImages("array", data[0], data[1] if labels else None)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, Mapping):
        return ObjectImages(data, labels)
    raise UserError(f"images are given as a {type(data).__name__}: give {_ACCEPTED}")


class ObjectImages(ImageSet):
    """Images that a Python object returns one by one. Threads call `__getitem__` at the same time.

    Args:
        data: see the module.
        labels: give classes.

    Raises:
        UserError: there is no image, one cannot be read, or classes are asked for and missing.
    """

    def __init__(self, data: Any, labels: bool) -> None:
        self._data = data
        count = len(data)
        if not count:
            raise UserError(f"a {type(data).__name__} without images was given")
        sizes, numbers = np.empty((count, 2), dtype=np.int32), np.full(count, -1, dtype=np.int64)
        digest = hashlib.sha256()
        for row in range(count):
            image, label = _parts(data[row])
            pixels = _pixels(image, row)
            sizes[row] = pixels.shape[1], pixels.shape[0]
            numbers[row] = -1 if label is None else label
            digest.update(hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest())
        if labels and (numbers < 0).any():
            row = int(np.argmax(numbers < 0))
            raise UserError(f"image {row} has no class: give pairs (image, class number), or dictionaries with 'label'")
        keys = [f"{row:09d}" for row in range(count)]
        classes = _classes(data, int(numbers.max()) + 1) if labels else []
        index = Index.of(keys, sizes, labels=numbers, classes=classes, fingerprint=digest.hexdigest())
        super().__init__(type(data).__name__, index, labels)

    def read(self, row: int) -> NDArray[np.uint8]:  # noqa: D102
        try:
            return _pixels(_parts(self._data[row])[0], row)
        except UserError as error:
            raise Unreadable(str(error)) from None


def _parts(item: Any) -> tuple[Any, int | None]:
    """Image and class number of an item of a data set."""
    if isinstance(item, Mapping):
        pictures = (value for value in item.values() if isinstance(value, Image.Image))
        image = item["image"] if "image" in item else next(pictures, None)
        label = item.get("label", item.get("labels"))
        return image, None if label is None else int(label)
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], int(item[1])
    return item, None


def _pixels(image: Any, row: int) -> NDArray[np.uint8]:
    """(h, w, 3) uint8."""
    if isinstance(image, str | os.PathLike):
        try:
            return decode(read_file(os.fspath(image)))
        except Unreadable as error:
            raise UserError(f"image {row}, {os.fspath(image)}, cannot be read: {error}") from None
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    pixels = np.asarray(image) if hasattr(image, "__array__") else None
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        what = type(image).__name__ if pixels is None else f"array of {pixels.dtype} {pixels.shape}"
        raise UserError(f"image {row} is a {what}: give a PIL image, a path, or uint8 pixels (h, w, 3) or (h, w)")
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.shape[-1] != 3:
        raise UserError(f"image {row} has shape {pixels.shape}: give (h, w, 3), colours last")
    return pixels


def _classes(data: Any, count: int) -> list[str]:
    names = getattr(data, "classes", None)
    features = getattr(data, "features", None)
    if names is None and isinstance(features, Mapping):  # Hugging Face
        names = getattr(features.get("label", features.get("labels")), "names", None)
    return list(map(str, names)) if names else [str(number) for number in range(count)]
