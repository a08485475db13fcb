"""Predicted masks as files for other scorers: one gray PNG per image; a value is a line of classes.txt, from 0.

FOLDER/NAME.png    classes.txt    confusion.csv (pixels)    files.csv (prediction, image, mask)
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tessella import files
from tessella.data.masks.layouts import MaskedImages
from tessella.text import cell, printable

_LONGEST_NAME = 200  # bytes of one part of a file name
_NOT_FIRST = "=+-@' "  # a name that begins so is an option to a shell and a formula to a spreadsheet
_FORBIDDEN = '<>:"\\|?*%'  # in file names, on one system or another; % because it marks what was replaced


def prediction_name(key: str) -> str:
    """File of an image's predicted mask: its own name, made safe, with the suffix .png. Distinct keys stay distinct.

    What a file system may refuse, and what could lead out of the folder, is written as %XX; parts of more than 200
    bytes are cut and end in a hash.
    """
    return "/".join(_safe(part) for part in key.split("/")) + ".png"


def _safe(part: str) -> str:
    if part in ("", ".", ".."):
        return part.replace(".", "%2E") or "%"
    safe = "".join(
        c
        if c.isprintable() and c not in _FORBIDDEN and (place or c not in _NOT_FIRST)
        else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape"))
        for place, c in enumerate(part)
    )
    raw = safe.encode()
    if len(raw) <= _LONGEST_NAME:
        return safe
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return raw[: _LONGEST_NAME - 17].decode(errors="ignore") + "-" + digest


def write_mask(folder: Path, key: str, mask: NDArray[np.int64]) -> None:
    """The predicted mask of the image of this key, values below 255."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(encoded, "PNG")  # gray, not palette: every reader gives the numbers
    files.make_folder(folder)
    files.write_bytes(folder / prediction_name(key), encoded.getvalue(), inside=folder, lasting=False)


def write_tables(
    folder: Path, images: MaskedImages, classes: list[str], confusion: NDArray[np.int64], skipped: Collection[str]
) -> None:
    """classes.txt (line number, from 0, is the value), confusion.csv, and files.csv: which file is which image's.

    Args:
        folder: of the predicted masks.
        images: that were judged.
        classes: names.
        confusion: (classes, classes) pixels: row the truth, column the prediction.
        skipped: keys of images without a prediction.
    """
    files.make_folder(folder)
    files.write_bytes(folder / "classes.txt", _encoded("".join(f"{printable(name)}\n" for name in classes)))
    table = [["truth \\ predicted", *classes]]
    table += [[name, *map(str, row)] for name, row in zip(classes, confusion.tolist(), strict=True)]
    files.write_bytes(folder / "confusion.csv", _csv(table))
    named = [["prediction", "image", "mask"]]
    for row, key in enumerate(images.keys):
        if key not in skipped:
            named.append([prediction_name(key), *images.source_names(row)])
    files.write_bytes(folder / "files.csv", _csv(named))


def _csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)
    return _encoded(text.getvalue())


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
