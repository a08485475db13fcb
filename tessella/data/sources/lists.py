"""A list of image files, .csv or .parquet: paths, and labels if it has such a column.

Paths are absolute or relative to the list, and may lead anywhere: a list is the user's own, like a path on the command
line. Lists within a data set (`data.texts`) must not lead out of it.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import os
from functools import partial
from typing import Any

from tessella import files
from tessella.data.index import Listing, cached_index, evidence_of, sample
from tessella.data.sources.files import IMAGE_SUFFIXES, FileImages, read_file
from tessella.data.sources.images import ImageSet, Request
from tessella.errors import UserError
from tessella.files import open_regular
from tessella.text import printable

LIST_SUFFIXES = (".csv", ".parquet")
_PATH_COLUMNS = ("path", "file", "image", "filename")
_LABEL_COLUMNS = ("label", "class")
_LABELS = (str, bytes, int, float, bool, type(None), datetime.date, decimal.Decimal)
_COLUMNS_NAMED = 10
_MAX_ROWS = 10**9
_MAX_CSV_BYTES = 2**34
_MAX_PATH = 2**15  # characters; no system has longer ones
_ROWS_AT_ONCE = 2**16


def open_list(request: Request) -> ImageSet:
    """Open the files that a list names.

    Raises:
        UserError: the list cannot be read, is no list, or gives one path two labels; or a part of it is asked for.
    """
    if request.part:
        raise UserError(f"{request.data}: a list has no parts; leave out ::{request.part}")
    path = os.path.abspath(request.path)
    index = cached_index(["list", path], [path], partial(_list_of_file, request.data, path), request.cache)
    return FileImages(request.data, index, request.labels, os.path.dirname(path))


def _list_of_file(data: str, path: str) -> Listing:
    names, values, columns = (_read_csv if path.lower().endswith(".csv") else _read_parquet)(data, path)
    strange = next((value for value in values if not isinstance(value, _LABELS)), None)
    if strange is not None:
        raise UserError(
            f"{printable(data)}: a label is a {type(strange).__name__}: give numbers or names in that column"
        )
    labels, classes = _number_labels(values)
    label_of: dict[str, int] = {}
    for name, label in zip(names, labels, strict=True):
        if label_of.setdefault(name, label) != label:
            raise UserError(f"{printable(data)} lists {printable(name)} with two labels: keep one of the lines")
    paths = [os.path.join(os.path.dirname(path), name) for name in names]
    evidence = [evidence_of(file) for file in paths]
    if names and not any(evidence):
        raise UserError(
            f"{printable(data)}: none of its {len(names):,} files is there; the first was looked for at "
            f"{printable(paths[0])}. Paths come from {columns}: they must be absolute, or relative to "
            f"the list, in a column called {', '.join(_PATH_COLUMNS[:-1])} or {_PATH_COLUMNS[-1]}"
        )
    return Listing(
        keys=names,
        read=lambda position, size: read_file(paths[position], size),
        # A missing file or a folder fails when it is read, with its reason.
        byte_sizes=[max(file[1], 1) if file else 1 for file in evidence],
        labels=labels,
        classes=classes,
        file_of=lambda position: paths[position],
        watched=sample(paths),
    )


def _read_csv(data: str, path: str) -> tuple[list[str], list[Any], str]:
    """Paths, label values (None for none), and the column of the paths in words.

    Without a header line, the first cell ends like an image.
    """
    try:
        text = files.read_text(path, _MAX_CSV_BYTES, errors="surrogateescape")
        if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
            raise UserError(f"{printable(data)} is in UTF-16: save the list as UTF-8")
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except OSError as error:
        raise UserError(f"{printable(data)} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{printable(data)} cannot be read as csv: {error}") from None
    if not rows:
        return [], [], ""
    header = [name.strip().lower() for name in rows[0]]
    if header[0].endswith(IMAGE_SUFFIXES):
        path_column, label_column, words = 0, 1, "the first column, because the first line is no header"
    else:
        path_column, label_column = _columns_of_list(header)
        words = _in_words(header, path_column)
        del rows[0]

    def cell(row: list[str], column: int) -> str | None:
        return row[column].strip() or None if 0 <= column < len(row) else None

    listed = [(name, cell(row, label_column)) for row in rows if (name := cell(row, path_column))]
    return [name for name, _ in listed], [value for _, value in listed], words


def _in_words(header: list[str], column: int) -> str:
    return f"the column {printable(header[column])!r} of {', '.join(map(printable, header[:_COLUMNS_NAMED]))}"


def _read_parquet(data: str, path: str) -> tuple[list[str], list[Any], str]:
    import pyarrow.parquet as parquet

    try:
        open_regular(path).close()  # pyarrow would wait for a pipe
        schema = parquet.read_schema(path)
        names = schema.names
        path_column, label_column = _columns_of_list([name.lower() for name in names])
        columns = [column for column in (path_column, label_column) if column >= 0]
        chosen = [names[column] for column in columns]
        # Dictionaries stay dictionaries: a few bytes can encode the same long text a billion times.
        texts = [names[column] for column in columns if _is_text(schema.types[column])]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            if file.metadata.num_rows > _MAX_ROWS:
                raise UserError(
                    f"{printable(data)} claims {file.metadata.num_rows:,} rows; up to {_MAX_ROWS:,} are read"
                )
            paths, values = list[Any](), list[Any]()
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=chosen):
                listed = batch.column(chosen[0])
                paths += _unpacked(listed, data, chosen[0])
                values += batch.column(chosen[-1]).to_pylist() if len(chosen) > 1 else [None] * len(listed)
    except UserError:
        raise
    except Exception as error:  # of a damaged file: Arrow's own errors, and many others
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{printable(data)} cannot be read as parquet: {printable(reason)}") from error
    return paths, values, _in_words(names, path_column)


def _unpacked(column: Any, data: str, name: str) -> list[str]:
    """The paths of a piece of a column, equal ones once in memory."""
    import pyarrow.types as kinds

    words = column.dictionary if kinds.is_dictionary(column.type) else column
    distinct: list[Any] = words.to_pylist() if _is_text(words.type) else [None]
    if not all(isinstance(word, str) and len(word) <= _MAX_PATH for word in distinct) or column.null_count:
        raise UserError(
            f"{printable(data)}: column {printable(name)!r} holds no paths; name the column of paths 'path'"
        )
    if words is column:
        return distinct
    return [distinct[number] for number in column.indices.to_pylist()]


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_string(kind) or kinds.is_large_string(kind)


def _columns_of_list(header: list[str]) -> tuple[int, int]:
    """Positions of the path column (the first, if none is named so) and the label column (-1 for none)."""
    path_column = next((header.index(name) for name in _PATH_COLUMNS if name in header), 0)
    label_column = next((header.index(name) for name in _LABEL_COLUMNS if name in header), -1)
    return path_column, label_column


def _number_labels(values: list[Any]) -> tuple[list[int], list[str]]:
    """Label of each image and the classes. Integers keep their value, so that two lists agree; names are sorted."""
    values = [None if value != value else value for value in values]  # NaN is how tables store none
    distinct = {value for value in values if value is not None}
    try:
        numbers = {value: int(value) for value in distinct}
        if any(number != value for value, number in numbers.items() if isinstance(value, float)):
            numbers = {}  # 0.5 is a name
    except (ValueError, TypeError, OverflowError):
        numbers = {}
    if numbers and max(numbers.values()) <= 10**6:
        classes = [str(number) for number in range(max(0, max(numbers.values()) + 1))]
        return [-1 if value is None else max(-1, numbers[value]) for value in values], classes
    classes = sorted(map(str, distinct))
    position = {name: label for label, name in enumerate(classes)}
    return [-1 if value is None else position[str(value)] for value in values], classes
