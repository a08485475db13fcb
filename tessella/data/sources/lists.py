"""A list of image files, .csv or .parquet: paths relative to the list, and labels if it has such a column."""

from __future__ import annotations

import csv
import os
from functools import partial
from pathlib import Path
from typing import Any

from tessella.data.index import Listing, cached_index, evidence_of, sample
from tessella.data.sources.files import IMAGE_SUFFIXES, FileImages, read_file
from tessella.data.sources.images import ImageSet
from tessella.data.sources.messages import shown
from tessella.errors import UserError

LIST_SUFFIXES = (".csv", ".parquet")
_PATH_COLUMNS = ("path", "file", "image", "filename")
_LABEL_COLUMNS = ("label", "class")


def open_list(data: str, path: str, labels: bool, cache: Path) -> ImageSet:
    """Open the files that a list names.

    Args:
        data: the source as given, for reports.
        path: of the list.
        labels: show the classes.
        cache: folder for the index.

    Raises:
        UserError: the list cannot be read, or gives one path two labels.
    """
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
        read=lambda position, size: read_file(os.path.join(root, paths[position]), size),
        # What is gone or a folder fails when it is read, with its reason.
        byte_sizes=[max(size, 1) for size in sizes],
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
        raise UserError(f"{shown(data)} cannot be read as parquet: {' '.join(str(error).split())}") from error
    paths = table[names[path_column]]
    if not all(isinstance(name, str) for name in paths):
        raise UserError(f"{shown(data)}: column {names[path_column]!r} holds no paths; name the column of paths 'path'")
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
            raise UserError(f"{shown(data)} lists {shown(path)} with two labels: keep one of the lines")
