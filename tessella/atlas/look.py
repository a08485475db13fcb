"""One look at every image: what later stages need of its pixels, so that each file is decoded once for them.

    file -> hash, thumbnail, signature for near-copies, brightness, contrast, sharpness

Sharpness is the share of gray-level variation that lies between neighbouring pixels, at a fixed size: the variance of
the Laplacian over the variance of the image (Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy",
2000, made independent of contrast).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tessella import files
from tessella.atlas.content import BLANK, BLURRED, BRIGHT, DARK
from tessella.atlas.shards import SHARD, Shards
from tessella.console import Display
from tessella.data.decode import Unreadable, decode
from tessella.data.sources import ImageSet
from tessella.data.threads import Task, portions, run_ahead
from tessella.data.transform import EvalTransform, resize_pixels
from tessella.ops.near_copies import CUTS
from tessella.protocols.duplicates import Signatures

VERSION = 1
_SIGNED = EvalTransform(64, 64, mean=(0.0,) * 3, std=(1.0,) * 3, fit="both sides")  # what signatures are made of
_SHARP_SIDE = 192  # shorter side at which sharpness is measured; smaller images are not enlarged
_LEAST_SIDE = 48  # pixels; on fewer, sharpness says nothing
_QUALITY = 85  # of thumbnails
_TOGETHER = 64  # images of one draft
_GRAY = np.array([0.299, 0.587, 0.114], np.float32) / 255
_FLAT = 0.02  # contrast below which an image shows nothing
_BLUR_SPREADS, _BLUR_LEAST = 2.5, 8.0  # so many spreads, and at least so many times, less sharp than usual
LOOK = np.dtype(
    [
        ("readable", "?"),
        ("sha256", "u1", 32),
        ("signature", "f2", (len(CUTS), Signatures.feature_dim // len(CUTS))),
        ("brightness", "f4"),  # mean gray level, in [0, 1]
        ("contrast", "f4"),  # standard deviation of gray levels
        ("bright_end", "f4"),  # gray level that 5 % of the pixels exceed
        ("sharpness", "f4"),  # NaN where it cannot be measured
        ("start", "i8"),  # of the thumbnail in the shard's .jpegs file
        ("length", "i4"),
        ("reason", "S160"),  # why it is unreadable, UTF-8
    ]
)


def thumbnail_side(images: int) -> int:
    """Pixels of a thumbnail: a million take no more disk than a hundred thousand."""
    return 96 if images <= 100_000 else 48


def look(images: ImageSet, shards: Shards, workers: int, between: Callable[[int], None] = lambda rows: None) -> None:
    """Look at all images that no earlier call has looked at.

    Args:
        images: the set.
        shards: receives `LOOK` rows; thumbnails go to files beside them.
        workers: decoding threads.
        between: called after each shard with the number of rows that are complete from the first on.
    """
    missing = shards.missing()
    if not missing:
        return
    side, signature = thumbnail_side(len(images)), Signatures()
    done = len(images) - sum(len(shards.span(number)) for number in missing)
    with Display("images", len(images), done=done) as display:
        for number in missing:
            parts: list[NDArray[np.void]] = []
            jpegs: list[bytes] = []
            length = 0
            for part, squares, thumbnails in _drafts(images, shards.span(number), side, workers):
                pixels = squares.permute(0, 3, 1, 2).to(torch.float32).div_(255)
                part["signature"] = signature(pixels).unflatten(1, (len(CUTS), -1)).half().numpy()
                lengths = np.array([len(jpeg) for jpeg in thumbnails])
                part["start"], part["length"] = length + lengths.cumsum() - lengths, lengths
                length += int(lengths.sum())
                parts.append(part)
                jpegs.extend(thumbnails)
                display.advance(len(part))
            path = shards.path(number, ".jpegs")
            files.write_bytes(path, b"".join(jpegs), inside=shards.atlas, lasting=False)
            shards.write(number, np.concatenate(parts))  # last: its presence says that the shard is complete
            between(shards.span(number).stop)


def flags_of(table: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """What pixels alone say about images: `DARK`, `BRIGHT`, `BLANK` and `BLURRED`.

    Blurred is who is far less sharp than is usual in this set (a set of paintings is not all blurred).

    Args:
        table: columns of `LOOK`, of readable images.
    """
    flags = np.zeros(len(table["brightness"]), np.uint8)
    flags[table["contrast"] < _FLAT] |= BLANK
    flags[(table["brightness"] < 0.08) & (table["bright_end"] < 0.25)] |= DARK
    flags[(table["brightness"] > 0.95) & (table["contrast"] < 0.12)] |= BRIGHT
    with np.errstate(divide="ignore"):
        sharpness = np.log(table["sharpness"].astype(np.float64))
    measured = np.isfinite(sharpness)
    if measured.any():
        usual = np.median(sharpness[measured])
        spread = 1.4826 * np.median(np.abs(sharpness[measured] - usual))
        flags[measured & (sharpness < usual - max(_BLUR_SPREADS * spread, np.log(_BLUR_LEAST)))] |= BLURRED
    return flags


class Thumbnails:
    """The thumbnails of an atlas.

    Args:
        shards: that `look` has filled.
        side: pixels of the thumbnails that are given out.
    """

    def __init__(self, shards: Shards, side: int) -> None:
        self._shards, self._side = shards, side
        self._open: dict[int, tuple[NDArray[np.void], NDArray[np.uint8]]] = {}

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(b, side, side, 3) pixels; black for an image that is not readable."""
        found = np.zeros((len(rows), self._side, self._side, 3), np.uint8)
        for i, row in enumerate(rows.tolist()):
            table, jpegs = self._shard(row // SHARD)
            start, length = (int(table[row % SHARD][name]) for name in ("start", "length"))
            if length:
                picture = decode(jpegs[start : start + length].tobytes())
                if picture.shape[:2] != (self._side, self._side):
                    picture = resize_pixels(picture, self._side, self._side).numpy()
                found[i] = picture
        return found

    def _shard(self, number: int) -> tuple[NDArray[np.void], NDArray[np.uint8]]:
        if number not in self._open:
            with files.open_regular(self._shards.path(number, ".jpegs")) as file:
                empty = file.seek(0, 2) == 0
                jpegs = np.empty(0, np.uint8) if empty else np.memmap(file, np.uint8, "r")
            self._open[number] = self._shards.read(number, LOOK), jpegs
        return self._open[number]


def _drafts(
    images: ImageSet, rows: range, side: int, workers: int
) -> Iterator[tuple[NDArray[np.void], Tensor, list[bytes]]]:
    """Tables, pixels for signatures and thumbnails of some images at a time, made by threads."""

    def work() -> Iterator[tuple[tuple[NDArray[np.void], Tensor, list[bytes]], Sequence[Task]]]:
        for start in range(rows.start, rows.stop, _TOGETHER):
            wanted = range(start, min(start + _TOGETHER, rows.stop))
            draft = (
                np.zeros(len(wanted), LOOK),
                torch.zeros(len(wanted), 64, 64, 3, dtype=torch.uint8),
                [b""] * len(wanted),
            )
            yield draft, [partial(_fill, images, wanted, side, draft, places) for places in portions(len(wanted))]

    with closing(run_ahead(work(), max(1, workers))) as done:
        yield from done


def _fill(
    images: ImageSet,
    rows: range,
    side: int,
    draft: tuple[NDArray[np.void], Tensor, list[bytes]],
    places: list[int],
) -> None:
    table, squares, thumbnails = draft
    for place in places:
        record = table[place]
        record["sharpness"] = np.nan
        try:
            stored = images.read(rows[place])
            data = stored if isinstance(stored, bytes) else np.ascontiguousarray(stored).data
            record["sha256"] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            shrink = _shrink(int(images.sizes[rows[place]].min()))
            pixels = decode(stored, shrink) if isinstance(stored, bytes) else stored
        except Unreadable as error:
            record["reason"] = error.reason.encode("utf-8", "backslashreplace")[:160]
            continue
        record["readable"] = True
        squares[place] = _SIGNED.crop(pixels)
        thumbnails[place] = _jpeg(pixels, side)
        _measure(record, squares[place], pixels)


def _shrink(shorter: int) -> int:
    """How much smaller a JPEG may be decoded: everything here is made from at most `_SHARP_SIDE` pixels."""
    return max(shrink for shrink in (1, 2, 4, 8) if shrink == 1 or shorter // shrink >= _SHARP_SIDE)


def _jpeg(pixels: NDArray[np.uint8], side: int) -> bytes:
    """The central square, as a JPEG."""
    height, width, _ = pixels.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = resize_pixels(np.ascontiguousarray(pixels[top : top + short, left : left + short]), side, side)
    file = io.BytesIO()
    Image.fromarray(square.numpy()).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _measure(record: np.void, square: Tensor, pixels: NDArray[np.uint8]) -> None:
    gray = square.numpy() @ _GRAY
    record["brightness"], record["contrast"] = gray.mean(), gray.std()
    record["bright_end"] = np.quantile(gray, 0.95)
    height, width, _ = pixels.shape
    short = min(height, width)
    if short < _LEAST_SIDE or max(height, width) > 16 * short:
        return
    scale = min(1.0, _SHARP_SIDE / short)
    small = resize_pixels(pixels, round(height * scale), round(width * scale)).numpy() @ _GRAY
    inner = small[1:-1, 1:-1]
    laplacian = small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:] - 4 * inner
    if inner.std() > _FLAT:
        record["sharpness"] = laplacian.var() / inner.var()
