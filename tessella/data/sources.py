"""Where images come from: one function, `open_images`, for folders, lists, archives and data sets by name.

    what was given      how it is read                                       keys
    a folder            files below it, at any depth                         path below the folder
    .csv, .parquet      files that it lists                                  path as listed
    .tar[.gz], several  in place, by offset (a .gz: from a copy in the       member name, behind the archive's
                        cache)                                               name if there are several
    cifar10, stl10 ...  torchvision's arrays, in memory                      split/number
    hf:NAME             Hugging Face `datasets`                              split/number
    digits, shapes      embedded, no download                                split/number
    anything::PART      a folder within a folder or archive; a split of      relative to the part
                        a data set by name

Class labels are shown only to who asks for them.
"""

# Paths are plain strings, as in the index.
# ruff: noqa: PTH100, PTH110, PTH111, PTH112, PTH113, PTH116, PTH118, PTH119, PTH120, PTH207, PTH208

from __future__ import annotations

import contextlib
import csv
import difflib
import errno
import glob
import hashlib
import os
import stat
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessella.data import tars
from tessella.data.decode import MAX_BYTES, Unreadable, decode
from tessella.data.index import (
    Evidence,
    Index,
    Listing,
    cache_folder,
    cached_index,
    evidence_of,
    exclusive,
    sample,
)
from tessella.data.shapes import CLASSES as SHAPES
from tessella.data.shapes import draw_shapes
from tessella.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm"),
)
ACCEPTED = (
    "a folder of images, a .csv or .parquet list, .tar or .tar.gz archives (a path, a pattern such as"
    " 'shards/*.tar', or a folder of them), a data set of torchvision (cifar10, cifar100, stl10, svhn, mnist,"
    " ...), hf:NAME, digits or shapes; a part is named behind two colons, as in images.tar::images/train"
)

_LIST_SUFFIXES = (".csv", ".parquet")
_PATH_COLUMNS = ("path", "file", "image", "filename")
_LABEL_COLUMNS = ("label", "class")
_RETRY_SECONDS = (0.1, 1.0)
# Errors of network mounts that may pass.
_PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)


class ImageSet:
    """Images with stable ids, in the order of their keys. Threads may share it."""

    def __init__(self, name: str, index: Index, labelled: bool) -> None:
        self.name = name  # as given
        self.index = index
        self._labelled = labelled

    def __len__(self) -> int:
        return len(self.index)

    @property
    def ids(self) -> NDArray[np.int64]:
        """(N,) stable, distinct, non-negative."""
        return self.index.ids

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2) width and height in pixels of the upright images."""
        return self.index.sizes

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(N,) indices into `classes`; None unless asked for."""
        return self.index.labels if self._labelled else None

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes; None unless labels were asked for."""
        return self.index.classes if self._labelled else None

    @property
    def fingerprint(self) -> str:
        """Changes when an image comes, goes, is renamed or encoded anew; not when it is touched."""
        return self.index.fingerprint

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(key, reason) of what looked like an image and is not in the set."""
        return self.index.unreadable

    @cached_property
    def uniform_size(self) -> tuple[int, int] | None:
        """Width and height, if all images have the same."""
        width, height = (int(side) for side in self.sizes[0])
        return (width, height) if (self.sizes == (width, height)).all() else None

    def key(self, row: int) -> str:
        """Name of an image within the set, '/' between parts."""
        return self.index.key(row)

    def read(self, row: int) -> bytes | NDArray[np.uint8]:
        """An image as it is stored: encoded, or (height, width, 3) uint8 pixels.

        Raises:
            Unreadable: it cannot be read (any more).
        """
        raise NotImplementedError

    def image(self, row: int) -> NDArray[np.uint8]:
        """Upright pixels, (height, width, 3) uint8 RGB.

        Raises:
            Unreadable: the image cannot be read or decoded whole.
        """
        stored = self.read(row)
        return decode(stored) if isinstance(stored, bytes) else stored


class FileImages(ImageSet):
    """Files below a folder, or listed relative to it."""

    def __init__(self, name: str, index: Index, labelled: bool, root: str) -> None:
        super().__init__(name, index, labelled)
        self._root = root

    def read(self, row: int) -> bytes:  # noqa: D102
        return _read_file(os.path.join(self._root, self.key(row)))


class TarImages(ImageSet):
    """Members of .tar archives, read in place."""

    def __init__(self, name: str, index: Index, labelled: bool, archives: tars.Archives) -> None:
        super().__init__(name, index, labelled)
        self._archives = archives

    def read(self, row: int) -> bytes:  # noqa: D102
        archive, offset = self.index.column("archive")[row], self.index.column("offset")[row]
        return self._archives.read(int(archive), int(offset), int(self.index.byte_sizes[row]))


class HuggingFaceImages(ImageSet):
    """Rows of a Hugging Face data set."""

    def __init__(self, name: str, index: Index, labelled: bool, read: Callable[[int, int], bytes]) -> None:
        super().__init__(name, index, labelled)
        self._read = read

    def read(self, row: int) -> bytes:  # noqa: D102
        return self._read(int(self.index.column("row")[row]), MAX_BYTES + 1)


class ArrayImages(ImageSet):
    """Images that are one array in memory.

    Args:
        name: for reports.
        images: (N, H, W, 3) or, gray, (N, H, W) uint8; not copied.
        labels: (N,) integers, or None.
        classes: their names; by default the numbers.
        keys: N names in ascending order; by default the row numbers.

    Raises:
        UserError: wrong shape or type.
    """

    def __init__(
        self,
        name: str,
        images: NDArray[np.uint8],
        labels: ArrayLike | None = None,
        *,
        classes: Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        images = np.asarray(images)
        _check_array(name, images)
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                raise UserError(
                    f"labels of {name} are {labels.dtype} {labels.shape}: give one integer per image,"
                    f" {len(images)} in all"
                )
            if classes is None:
                classes = [str(number) for number in range(int(labels.max()) + 1)]
        digest = hashlib.sha256(repr(images.shape).encode())
        for image in images:  # one by one: a whole array that is not contiguous would be copied
            digest.update(image.tobytes())
        index = Index.of_arrays(
            keys or [f"{row:09d}" for row in range(len(images))],
            (images.shape[2], images.shape[1]),
            labels=labels,
            classes=list(classes or []),
            fingerprint=digest.hexdigest(),
        )
        super().__init__(name, index, labels is not None)
        self._images = images

    def read(self, row: int) -> NDArray[np.uint8]:  # noqa: D102
        image = self._images[row]
        return np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image


def open_images(data: str, *, labels: bool = False, cache: Path | None = None) -> ImageSet:
    """Open a set of images. The first time its headers are read; after that its index comes from the cache.

    A known name wins over a folder of the same name in the working folder, which is written ./NAME.

    Args:
        data: see the module's table.
        labels: also give classes: the first folder below `data` (or below its part), the list's column, or
            what the data set by name brings.
        cache: folder for indexes and decompressed archives; by default $TESSELLA_CACHE or ~/.cache/tessella.

    Raises:
        UserError: nothing there, nothing readable in it, or labels asked for that it does not have.
    """
    base, part = _split_part(data)
    if data.startswith("hf:"):
        images = _open_hugging_face(data, base.removeprefix("hf:"), part or "train", labels, cache)
    elif base.lower() in _NAMED:
        return _open_named(data, base.lower(), part, labels)
    else:
        images = _open_path(data, os.path.expanduser(base), part, labels, cache or cache_folder())
    _check_not_empty(images)
    if labels:
        _check_labels(images)
    return images


# --- which kind of source ------------------------------------------------------------------------------


def _split_part(data: str) -> tuple[str, str | None]:
    if "::" not in data or os.path.exists(data):
        return data, None
    base, _, part = data.rpartition("::")
    return base, part.strip("/") or None


def _open_path(data: str, path: str, part: str | None, labels: bool, cache: Path) -> ImageSet:
    if os.path.isdir(path):
        archives = _archives_in(path)
        if archives and not _holds_image(path):
            return _open_tars(data, path, archives, part, labels, cache)
        return _open_folder(data, path, part, labels, cache)
    if os.path.isfile(path):
        if path.lower().endswith(tars.SUFFIXES):
            return _open_tars(data, path, [path], part, labels, cache)
        if path.lower().endswith(_LIST_SUFFIXES):
            if part:
                raise UserError(f"{data}: a list has no parts; leave out ::{part}")
            return _open_list(data, path, labels, cache)
    elif not os.path.lexists(path):
        found = sorted(name for name in glob.glob(path) if name.lower().endswith(tars.SUFFIXES))
        if found:
            return _open_tars(data, path, found, part, labels, cache)
    raise UserError(_not_found(data, path))


def _not_found(data: str, path: str) -> str:
    if os.path.exists(path):
        problem = f"{_shown(data)} is neither a folder nor a file of a kind that holds many images"
    else:
        problem = f"{_shown(data)} does not exist"
        path = path.rstrip("/")
        near = difflib.get_close_matches(os.path.basename(path), _names_in(os.path.dirname(path) or "."), 2)
        known = difflib.get_close_matches(data.partition("::")[0].lower(), _NAMED, 2)
        choices = [os.path.join(os.path.dirname(path), name) for name in near] + known
        if choices:
            problem += f"; near it is {' or '.join(map(_shown, choices))}"
    return f"{problem}. Give {ACCEPTED}."


def _check_not_empty(images: ImageSet) -> None:
    if len(images):
        return
    if images.unreadable:
        key, reason = images.unreadable[0]
        raise UserError(
            f"{_shown(images.name)} has no readable image: all {len(images.unreadable)} files failed,"
            f" the first is {_shown(key) or 'the whole'}: {_shown(reason)}. Give {ACCEPTED}."
        )
    raise UserError(
        f"{_shown(images.name)} holds no images: files ending in {' '.join(IMAGE_SUFFIXES)} are looked for,"
        f" at any depth. Give {ACCEPTED}."
    )


def _check_labels(images: ImageSet) -> None:
    parts = images.key(0).split("/")
    if len(images.index.classes) == 1 and len(parts) > 2:
        joint = "/" if "::" in images.name else "::"
        raise UserError(
            f"{_shown(images.name)} has all its images in one class, {_shown(parts[0])}: name the folder that"
            f" holds the classes' folders, for example {_shown(images.name + joint + '/'.join(parts[:-2]))}"
        )
    missing = np.flatnonzero(images.index.labels < 0)
    if len(missing):
        raise UserError(
            f"{_shown(images.name)} has no class for {len(missing)} of its {len(images)} images, for example"
            f" {_shown(images.key(int(missing[0])))}: put each image in a folder named after its class, or"
            " give a .csv list with the columns path and label"
        )


# --- folders -------------------------------------------------------------------------------------------


def _open_folder(data: str, path: str, part: str | None, labels: bool, cache: Path) -> ImageSet:
    root = os.path.abspath(os.path.join(path, part) if part else path)
    if not os.path.isdir(root):
        raise UserError(_part_not_found(data, str(part), _names_in(path)))
    index = cached_index(["folder", root], [], partial(_list_folder, root), cache)
    return FileImages(data, index, labels, root)


def _list_folder(root: str) -> Listing:
    keys, sizes, unreadable, watched = _walk(root)
    first_parts = [key.partition("/")[0] if "/" in key else None for key in keys]
    classes = sorted({part for part in first_parts if part is not None})
    number = {name: label for label, name in enumerate(classes)}
    return Listing(
        keys=keys,
        read=lambda position, size: _read_file(os.path.join(root, keys[position]), size),
        byte_sizes=sizes,
        labels=[-1 if part is None else number[part] for part in first_parts],
        classes=classes,
        unreadable=unreadable,
        watched=watched + sample([os.path.join(root, key) for key in keys]),
    )


def _walk(root: str) -> tuple[list[str], list[int], list[tuple[str, str]], list[Evidence]]:
    """Files with an image's suffix below a folder.

    Every folder is visited once, however many links lead to it, and under its own path if that lies below the
    root: links to folders wait until all real folders are done.

    Returns:
        Keys, byte sizes, unreadable (key, reason) pairs, evidence of all folders.
    """
    keys: list[str] = []
    sizes: list[int] = []
    unreadable: list[tuple[str, str]] = []
    watched: list[Evidence] = []
    visited: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(f"{links.pop()}/")
        prefix = folders.pop()
        path = os.path.join(root, prefix)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            watched.append((path, -1, status.st_mtime_ns))  # before looking: later changes must show
            with os.scandir(path) as scan:
                entries = list(scan)
        except OSError as error:
            unreadable.append((prefix, f"the folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    links.append(prefix + entry.name)
                else:
                    folders.append(f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found = _size_of_regular(entry)
                if isinstance(found, str):
                    unreadable.append((prefix + entry.name, found))
                else:
                    keys.append(prefix + entry.name)
                    sizes.append(found)
    return keys, sizes, unreadable, watched


def _size_of_regular(entry: os.DirEntry[str]) -> int | str:
    """Bytes, or why it is no file. Looks from outside: opening a pipe would wait for ever."""
    try:
        status = entry.stat()
    except OSError as error:
        return f"a link that leads nowhere: {error.strerror}" if entry.is_symlink() else str(error.strerror)
    return status.st_size if stat.S_ISREG(status.st_mode) else "not a regular file"


def _holds_image(folder: str) -> bool:
    """Whether any image lies below a folder; hidden files do not count, links to folders are not followed."""
    for _, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        if any(file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".") for file in files):
            return True
    return False


def _read_file(path: str, size: int | None = None) -> bytes:
    """The first `size` bytes of a regular file, or all. After an error of a network mount it tries again."""
    for wait in (*_RETRY_SECONDS, None):
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("not a regular file")
            if size is None and status.st_size > MAX_BYTES:
                raise Unreadable(
                    f"the file has {status.st_size:,} bytes, more than the limit of {MAX_BYTES:,}"
                )
            with open(path, "rb") as file:
                return file.read(-1 if size is None else size)
        except OSError as error:
            if wait is None or error.errno not in _PASSING_ERRORS:
                raise Unreadable(f"the file cannot be read: {error.strerror}") from error
            time.sleep(wait)
    raise AssertionError("unreachable")


# --- archives ------------------------------------------------------------------------------------------


def _archives_in(folder: str) -> list[str]:
    paths = [os.path.join(folder, name) for name in _names_in(folder) if name.lower().endswith(tars.SUFFIXES)]
    return [path for path in paths if os.path.isfile(path)]


def _open_tars(
    data: str, path: str, archives: list[str], part: str | None, labels: bool, cache: Path
) -> ImageSet:
    archives = [os.path.abspath(archive) for archive in archives]
    unpacked = [tars.on_disk(archive, cache) for archive in archives]
    if len(archives) > 1:
        common = os.path.commonpath([os.path.dirname(archive) for archive in archives])
        prefixes = [f"{os.path.relpath(archive, common)}/" for archive in archives]
    else:
        prefixes = [""]
    reader = tars.Archives(unpacked)
    identity = ["tar", os.path.abspath(path), part or ""]
    index = cached_index(identity, archives, partial(_list_tars, data, reader, prefixes, part), cache)
    return TarImages(data, index, labels, reader)


def _list_tars(data: str, reader: tars.Archives, prefixes: list[str], part: str | None) -> Listing:
    below = f"{part}/" if part else ""
    keys: list[str] = []
    class_names: list[str | None] = []
    table: list[tuple[int, int, int]] = []  # archive, offset, bytes
    unreadable: list[tuple[str, str]] = []
    folders: set[str] = set()
    for archive, prefix in enumerate(prefixes):
        members, failed = tars.walk(reader.paths[archive], IMAGE_SUFFIXES)
        folders.update(os.path.dirname(member.name) for member in members)
        for member in members:
            if member.name.startswith(below):
                name = member.name.removeprefix(below)
                keys.append(prefix + name)
                class_names.append(name.partition("/")[0] if "/" in name else None)
                table.append((archive, member.offset, member.size))
        unreadable += [
            (prefix + name.removeprefix(below), reason)
            for name, reason in failed
            if not name or name.startswith(below)
        ]
    if part and folders and not keys:
        raise UserError(_part_not_found(data, part, _with_parents(folders)))
    classes = sorted({name for name in class_names if name is not None})
    number = {name: label for label, name in enumerate(classes)}
    return Listing(
        keys=keys,
        read=lambda position, size: reader.read(*table[position][:2], size),
        byte_sizes=[size for _, _, size in table],
        labels=[-1 if name is None else number[name] for name in class_names],
        classes=classes,
        columns={"archive": [row[0] for row in table], "offset": [row[1] for row in table]},
        unreadable=unreadable,
    )


def _with_parents(folders: set[str]) -> list[str]:
    parts = (folder.split("/") for folder in folders if folder)
    return sorted({"/".join(names[: depth + 1]) for names in parts for depth in range(len(names))})


def _part_not_found(data: str, part: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(part, choices, 3) or sorted(choices)[:5]
    hint = f": there are {', '.join(map(_shown, near))}" if near else ""
    return f"{_shown(data)} has no part {_shown(part)!r} that holds images{hint}"


# --- lists ---------------------------------------------------------------------------------------------


def _open_list(data: str, path: str, labels: bool, cache: Path) -> ImageSet:
    path = os.path.abspath(path)
    root = os.path.dirname(path)
    index = cached_index(["list", path], [path], partial(_list_of_file, data, path), cache)
    return FileImages(data, index, labels, root)


def _list_of_file(data: str, path: str) -> Listing:
    paths, values = _read_csv(path) if path.lower().endswith(".csv") else _read_parquet(data, path)
    labels, classes = _number_labels(values)
    _check_one_label_each(data, paths, labels)
    root = os.path.dirname(path)
    sizes = [evidence[1] if (evidence := evidence_of(os.path.join(root, name))) else 1 for name in paths]
    return Listing(
        keys=paths,
        read=lambda position, size: _read_file(os.path.join(root, paths[position]), size),
        byte_sizes=[
            max(size, 1) for size in sizes
        ],  # what is gone or a folder fails when it is read, with its reason
        labels=labels,
        classes=classes,
        watched=sample([os.path.join(root, name) for name in paths]),
    )


def _read_csv(path: str) -> tuple[list[str], list[Any]]:
    """Paths and label values (None for none). Without a header line, the first cell ends like an image."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        return [], []
    header = [name.strip().lower() for name in rows[0]]
    if header[0].endswith(IMAGE_SUFFIXES):
        path_column, label_column = 0, 1
    else:
        path_column, label_column = _columns_of_list(header)
        del rows[0]

    def cell(row: list[str], column: int) -> str | None:
        return row[column].strip() or None if 0 <= column < len(row) else None

    listed = [(name, cell(row, label_column)) for row in rows if (name := cell(row, path_column))]
    return [name for name, _ in listed], [value for _, value in listed]


def _read_parquet(data: str, path: str) -> tuple[list[str], list[Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
        path_column, label_column = _columns_of_list([name.lower() for name in names])
        chosen = [names[column] for column in (path_column, label_column) if column >= 0]
        table = parquet.read_table(path, columns=chosen).to_pydict()
    except (pyarrow.ArrowException, OSError, IndexError) as error:
        raise UserError(
            f"{_shown(data)} cannot be read as parquet: {' '.join(str(error).split())}"
        ) from error
    paths = table[names[path_column]]
    if not all(isinstance(name, str) for name in paths):
        raise UserError(
            f"{_shown(data)}: column {names[path_column]!r} holds no paths; name the column of paths 'path'"
        )
    return paths, table[names[label_column]] if label_column >= 0 else [None] * len(paths)


def _columns_of_list(header: list[str]) -> tuple[int, int]:
    """Positions of the path column (the first, if none is named so) and the label column (-1 for none)."""
    path_column = next((header.index(name) for name in _PATH_COLUMNS if name in header), 0)
    label_column = next((header.index(name) for name in _LABEL_COLUMNS if name in header), -1)
    return path_column, label_column


def _number_labels(values: list[Any]) -> tuple[list[int], list[str]]:
    """Integers keep their value, so that two lists agree on it; names are numbered in sorted order."""
    values = [None if value != value else value for value in values]  # NaN: a table's way to say none
    given = {value for value in values if value is not None}
    try:
        numbers = {value: int(value) for value in given}
        if any(number != value for value, number in numbers.items() if isinstance(value, float)):
            numbers = {}  # 0.5 is a name
    except (ValueError, TypeError, OverflowError):
        numbers = {}
    if numbers and max(numbers.values()) <= 10**6:
        classes = [str(number) for number in range(max(0, max(numbers.values()) + 1))]
        return [-1 if value is None else max(-1, numbers[value]) for value in values], classes
    classes = sorted({str(value) for value in given})
    position = {name: label for label, name in enumerate(classes)}
    return [-1 if value is None else position[str(value)] for value in values], classes


def _check_one_label_each(data: str, paths: list[str], labels: list[int]) -> None:
    first: dict[str, int] = {}
    for path, label in zip(paths, labels, strict=True):
        if first.setdefault(path, label) != label:
            raise UserError(f"{_shown(data)} lists {_shown(path)} with two labels: keep one of the lines")


# --- data sets by name ---------------------------------------------------------------------------------

# name -> class in torchvision.datasets, {split: constructor's arguments}; the first split is the default
_BOTH = {"train": {"train": True}, "test": {"train": False}}
_TORCHVISION: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", _BOTH),
    "cifar100": ("CIFAR100", _BOTH),
    "stl10": (
        "STL10",
        {split: {"split": split} for split in ("train", "test", "unlabeled", "train+unlabeled")},
    ),
    "svhn": ("SVHN", {split: {"split": split} for split in ("train", "test", "extra")}),
    "mnist": ("MNIST", _BOTH),
    "fashionmnist": ("FashionMNIST", _BOTH),
    "kmnist": ("KMNIST", _BOTH),
    "usps": ("USPS", _BOTH),
}
_NAMED = ("digits", "shapes", *_TORCHVISION)


def _open_named(data: str, name: str, part: str | None, labels: bool) -> ImageSet:
    if name == "digits":
        return _digits(data, part, labels)
    if name == "shapes":
        return _shapes(data, part, labels)
    return _torchvision(data, name, part, labels)


def _check_split(data: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        base = data.partition("::")[0]
        raise UserError(f"{data}: no such split; there are {', '.join(f'{base}::{name}' for name in splits)}")


def _digits(data: str, part: str | None, labels: bool) -> ImageSet:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged to 32 x 32; every fifth for tests."""
    from PIL import Image
    from sklearn.datasets import load_digits

    _check_split(data, part or "all", ("train", "test", "all"))
    bunch = load_digits()
    rows = _rows_of_split(len(bunch.target), part, testing=np.arange(len(bunch.target)) % 5 == 0)
    levels = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)
    enlarged = [
        np.asarray(Image.fromarray(level).resize((32, 32), Image.Resampling.BICUBIC)) for level in levels
    ]
    return ArrayImages(
        data,
        np.stack(enlarged),
        bunch.target[rows] if labels else None,
        classes=[str(digit) for digit in range(10)] if labels else None,
        keys=[f"digits/{row:04d}" for row in rows],
    )


def _shapes(data: str, part: str | None, labels: bool) -> ImageSet:
    """Generated shapes, 2000 for training and 500 for testing."""
    _check_split(data, part or "all", ("train", "test", "all"))
    rows = _rows_of_split(2500, part, testing=np.arange(2500) >= 2000)
    images, numbers = draw_shapes(rows)
    return ArrayImages(
        data,
        images,
        numbers if labels else None,
        classes=SHAPES if labels else None,
        keys=[f"shapes/{row:04d}" for row in rows],
    )


def _rows_of_split(count: int, part: str | None, testing: NDArray[np.bool_]) -> NDArray[np.int64]:
    if part in (None, "all"):
        return np.arange(count)
    return np.flatnonzero(testing if part == "test" else ~testing)


def _torchvision(data: str, name: str, part: str | None, labels: bool) -> ImageSet:
    class_name, splits = _TORCHVISION[name]
    split = part or next(iter(splits))
    _check_split(data, split, list(splits))
    dataset = _load_torchvision(data, class_name, splits[split])
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 4 and pixels.shape[1] == 3:
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    targets = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels).astype(np.int64)
    if labels and (targets < 0).any():
        raise UserError(f"{data} has images without a class: use {name}::train or {name}::test, or no labels")
    return ArrayImages(
        data,
        pixels,
        targets if labels else None,
        classes=getattr(dataset, "classes", None) if labels else None,
        keys=[f"{split}/{row:06d}" for row in range(len(pixels))],
    )


def _load_torchvision(data: str, class_name: str, arguments: dict[str, Any]) -> Any:
    """The data set from $TESSELLA_DATA; downloaded only if it is not there."""
    import torchvision

    root = Path(os.environ.get("TESSELLA_DATA") or cache_folder() / "data").expanduser()
    load = partial(getattr(torchvision.datasets, class_name), root=str(root), **arguments)
    with contextlib.suppress(Exception):  # each class says "not found" in its own way
        return load(download=False)
    try:
        with exclusive(root):  # one download for all ranks of a machine
            return load(download=True)
    except Exception as error:
        raise UserError(
            f"{data} is not in {root} and cannot be downloaded ({' '.join(str(error).split())[:200]}): fetch"
            " it on a machine with a network and set TESSELLA_DATA to its folder, or give images of your own"
        ) from error


def _open_hugging_face(data: str, name: str, split: str, labels: bool, cache: Path | None) -> ImageSet:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{data} needs the package datasets: pip install 'tessella[huggingface]'") from error
    try:
        dataset = datasets.load_dataset(name, split=split)
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
        return stored["bytes"][:size] if stored["bytes"] is not None else _read_file(stored["path"], size)

    def list_rows() -> Listing:
        values = dataset[label_column] if label_column else [None] * len(dataset)
        numbers = [-1 if value is None else int(value) for value in values]
        return Listing(
            keys=[f"{split}/{row:09d}" for row in range(len(dataset))],
            read=read,
            byte_sizes=None,
            labels=numbers,
            classes=classes or [str(number) for number in range(max(numbers, default=-1) + 1)],
            columns={"row": range(len(dataset))},
        )

    index = cached_index(["hf", name, split, dataset._fingerprint], [], list_rows, cache)
    return HuggingFaceImages(data, index, labels, read)


def _hugging_face_labels(dataset: Any, datasets: Any) -> tuple[str | None, list[str]]:
    for column, kind in dataset.features.items():
        if isinstance(kind, datasets.ClassLabel):
            return column, list(kind.names)
    for column in ("label", "labels"):
        if column in dataset.features and str(getattr(dataset.features[column], "dtype", "")).startswith(
            "int"
        ):
            return column, []
    return None, []


# --- small helpers -------------------------------------------------------------------------------------


def _check_array(name: str, images: NDArray[Any]) -> None:
    gray, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (gray or colour) or 0 in images.shape:
        raise UserError(
            f"{name} is an array of {images.dtype} {images.shape}: give uint8 (N, H, W, 3), or (N, H, W) for"
            " gray, with N, H and W at least 1"
        )


def _names_in(folder: str) -> list[str]:
    """What a folder holds, in order; nothing if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def _shown(text: str) -> str:
    """A foreign name made safe to print: no control characters, no broken UTF-8."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)
