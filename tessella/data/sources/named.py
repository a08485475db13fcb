"""Data sets by name: digits and shapes, which need no download, torchvision's, as arrays in memory, Hugging Face's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessella.data.decode import MAX_BYTES, Unreadable
from tessella.data.index import Index, Listing, cache_folder, cached_index
from tessella.data.sources import shapes
from tessella.data.sources.files import read_file
from tessella.data.sources.images import ArrayImages, ImageSet, Request
from tessella.data.sources.messages import check_split
from tessella.errors import UserError
from tessella.files import exclusive

_BOTH = {"train": {"train": True}, "test": {"train": False}}
# name -> class in torchvision.datasets, {split: constructor's arguments}; the first split is the default
TORCHVISION: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", _BOTH),
    "cifar100": ("CIFAR100", _BOTH),
    "stl10": ("STL10", {split: {"split": split} for split in ("train", "test", "unlabeled", "train+unlabeled")}),
    "svhn": ("SVHN", {split: {"split": split} for split in ("train", "test", "extra")}),
    "mnist": ("MNIST", _BOTH),
    "fashionmnist": ("FashionMNIST", _BOTH),
    "kmnist": ("KMNIST", _BOTH),
    "usps": ("USPS", _BOTH),
}


def _open_digits(request: Request) -> ImageSet:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged to 32 x 32; every fifth for tests."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rows = _rows_of_split(request, testing=np.arange(len(bunch.target)) % 5 == 0)
    levels = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(level).resize((32, 32), Image.Resampling.BICUBIC)) for level in levels]
    return _embedded(request, "digits", np.stack(images), rows, bunch.target[rows], [str(digit) for digit in range(10)])


def _open_shapes(request: Request) -> ImageSet:
    """Generated shapes, 2000 for training and 500 for testing."""
    rows = _rows_of_split(request, testing=np.arange(2500) >= 2000)
    images, labels = shapes.draw_shapes(rows)
    return _embedded(request, "shapes", images, rows, labels, shapes.CLASSES)


def _rows_of_split(request: Request, testing: NDArray[np.bool_]) -> NDArray[np.int64]:
    split = request.part or "all"
    check_split(request.data, split, ("train", "test", "all"))
    return np.flatnonzero({"train": ~testing, "test": testing, "all": np.ones_like(testing)}[split])


def _embedded(
    request: Request, name: str, images: NDArray[np.uint8], rows: NDArray[np.int64], labels: NDArray, classes: list[str]
) -> ImageSet:
    keys = [f"{name}/{row:04d}" for row in rows]
    if not request.labels:
        return ArrayImages(request.data, images, keys=keys)
    return ArrayImages(request.data, images, labels, classes=classes, keys=keys)


EMBEDDED = {"digits": _open_digits, "shapes": _open_shapes}


def open_torchvision(request: Request) -> ImageSet:
    """Open a data set of torchvision, from $TESSELLA_DATA or downloaded; its path is a key of `TORCHVISION`.

    Raises:
        UserError: no such split, not there, no network, or images without a class although labels are asked for.
    """
    data, name = request.data, request.path
    class_name, splits = TORCHVISION[name]
    split = request.part or next(iter(splits))
    check_split(data, split, list(splits))
    dataset = _load_torchvision(data, class_name, splits[split], request.download)
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 4 and pixels.shape[1] == 3:
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    targets = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels).astype(np.int64)
    if request.labels and (targets < 0).any():
        raise UserError(f"{data} has images without a class: use {name}::train or {name}::test, or no labels")
    return ArrayImages(
        data,
        pixels,
        targets if request.labels else None,
        classes=getattr(dataset, "classes", None) if request.labels else None,
        keys=[f"{split}/{row:06d}" for row in range(len(pixels))],
    )


def _load_torchvision(data: str, class_name: str, arguments: dict[str, Any], download: bool) -> Any:
    """The data set from $TESSELLA_DATA; downloaded only if it is not there, and only if it may be."""
    import torchvision

    root = Path(os.environ.get("TESSELLA_DATA") or cache_folder() / "data").expanduser()
    load = partial(getattr(torchvision.datasets, class_name), root=str(root), **arguments)
    with contextlib.suppress(Exception):  # each class says "not found" in its own way
        return load(download=False)
    if not download:
        raise UserError(f"{data} is not in {root}: give --data {data} to download it, or set TESSELLA_DATA.")
    try:
        with exclusive(root.resolve()):  # one download for all ranks of a machine
            return load(download=True)
    except Exception as error:
        raise UserError(
            f"{data} is not in {root} and cannot be downloaded ({' '.join(str(error).split())[:200]}): fetch"
            " it on a machine with a network and set TESSELLA_DATA to its folder, or give images of your own"
        ) from error


class HuggingFaceImages(ImageSet):
    """Rows of a Hugging Face data set."""

    def __init__(self, name: str, index: Index, labelled: bool, read: Callable[[int, int], bytes]) -> None:
        super().__init__(name, index, labelled)
        self._read = read

    def read(self, row: int) -> bytes:  # noqa: D102
        return self._read(int(self.index.column("row")[row]), MAX_BYTES + 1)


def open_hugging_face(request: Request) -> ImageSet:
    """Open a data set of the Hugging Face hub, or a folder that its library can load; its part is a split.

    Classes are those of the first column of class labels, or the integers in `label`.

    Raises:
        UserError: the package is missing, or the data set cannot be loaded or has no column of images.
    """
    data, split = request.data, request.part or "train"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{data} needs the package datasets: pip install 'tessella[huggingface]'") from error
    try:
        dataset = datasets.load_dataset(request.path, split=split)
    except Exception as error:  # of the hub, the network, the parser ...
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{data} cannot be loaded ({reason}): check name and split (::{split})") from error
    columns = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise UserError(f"{data} has no column of images, only {', '.join(dataset.features)}")
    label_column, classes = _hugging_face_labels(dataset, datasets)
    encoded = dataset.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))

    def read(row: int, size: int) -> bytes:
        stored = encoded[row][columns[0]]
        if stored is None:
            raise Unreadable("the data set has no image in this row")
        return stored["bytes"][:size] if stored["bytes"] is not None else read_file(stored["path"], size)

    def list_rows() -> Listing:
        values = dataset[label_column] if label_column else [None] * len(dataset)
        labels = [-1 if value is None else int(value) for value in values]
        return Listing(
            keys=[f"{split}/{row:09d}" for row in range(len(dataset))],
            read=read,
            byte_sizes=None,
            labels=labels,
            classes=classes or [str(number) for number in range(max(labels, default=-1) + 1)],
            columns={"row": range(len(dataset))},
        )

    index = cached_index(["hf", request.path, split, dataset._fingerprint], [], list_rows, request.cache)
    return HuggingFaceImages(data, index, request.labels, read)


def _hugging_face_labels(dataset: Any, datasets: Any) -> tuple[str | None, list[str]]:
    for column, kind in dataset.features.items():
        if isinstance(kind, datasets.ClassLabel):
            return column, list(kind.names)
    for column in ("label", "labels"):
        if column in dataset.features and str(getattr(dataset.features[column], "dtype", "")).startswith("int"):
            return column, []
    return None, []
