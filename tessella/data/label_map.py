"""A map from classes to superclasses: a table, or that of CIFAR-100."""

from __future__ import annotations

import csv
import io
import textwrap
from pathlib import Path

import numpy as np

from tessella import files
from tessella.errors import UserError
from tessella.files import FileError

_CIFAR_RECORD = 2 + 3 * 32 * 32  # bytes: coarse label, fine label, pixels
_CIFAR_FILES = ("train.bin", "test.bin")
_CIFAR_BYTES = 1 << 30
_TABLE_BYTES = 16 << 20


def read_label_map(path: Path) -> dict[str, str]:
    """Class -> superclass.

    Args:
        path: a .csv with two columns, class and superclass, without a header or with these names; or the folder of
            CIFAR-100's binary version (cifar-100-binary), whose records name the superclass of each image. Its Python
            version is a pickle, which can run any program and is not read.

    Raises:
        UserError: there is no such file, or it has two superclasses for one class.
    """
    try:
        return _of_cifar100(path) if path.is_dir() else _of_table(path)
    except FileError as error:
        raise UserError(f"the label map {path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"the label map {path} is no list of classes: {error}") from None


def _of_table(path: Path) -> dict[str, str]:
    text = io.StringIO(files.read_text(path, _TABLE_BYTES, errors="surrogateescape"), newline="")
    rows = [[cell.strip() for cell in row] for row in csv.reader(text) if any(map(str.strip, row))]
    if rows and [cell.lower() for cell in rows[0]] == ["class", "superclass"]:
        del rows[0]
    mapping: dict[str, str] = {}
    for row in rows:
        if len(row) != 2 or not all(row):
            shown = textwrap.shorten(",".join(row), 100)
            raise UserError(f"{path}: a line of a label map is class,superclass, and one is {shown!r}")
        if mapping.setdefault(row[0], row[1]) != row[1]:
            raise UserError(f"{path} maps the class {row[0]!r} twice: keep one of the lines")
    if not mapping:
        raise UserError(f"the label map {path} is empty: give one line class,superclass for each class")
    return mapping


def _of_cifar100(folder: Path) -> dict[str, str]:
    fine, coarse = (
        [line.strip() for line in files.read_text(folder / name, _TABLE_BYTES).splitlines() if line.strip()]
        for name in ("fine_label_names.txt", "coarse_label_names.txt")
    )
    data = next((folder / name for name in _CIFAR_FILES if (folder / name).is_file()), folder / _CIFAR_FILES[0])
    content = files.read_bytes(data, _CIFAR_BYTES)
    if len(content) % _CIFAR_RECORD:
        raise UserError(f"{data} is no file of CIFAR-100's binary version, or not whole: fetch it again")
    pairs = np.unique(np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)[:, :2], axis=0)
    if len(np.unique(pairs[:, 1])) != len(pairs) or pairs[:, 1].max() >= len(fine) or pairs[:, 0].max() >= len(coarse):
        raise UserError(f"{data} and the names beside it contradict each other: fetch the data set again")
    return {fine[small]: coarse[large] for large, small in pairs.tolist()}
