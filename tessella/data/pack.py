"""Smaller copies of images, made once, so that every later epoch decodes fewer bytes (`sources.packs` reads a pack).

    source -> decode -> shorter side to at most `short_side` -> JPEG -> shard by shard into tar files -> verified

Decoding costs time in proportion to bytes, so a pack of large photos is read faster. It changes the pixels: `pack.json`
records the settings and the measured loss. A file that would not become smaller is copied unchanged. A shard is written
under a temporary name and renamed when it is complete, so that a killed process continues with the first missing shard,
and a pack made in two runs equals one made in one.
"""

from __future__ import annotations

import math
import tarfile
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from tessella import files
from tessella.console import progress_bar
from tessella.data.decode import Unreadable, decode
from tessella.data.index import columns_of, fingerprint_of, write_columns
from tessella.data.sources.images import ImageSet
from tessella.data.sources.packs import COLUMNS, DESCRIPTION, FORMAT, PACKING, read_description
from tessella.data.threads import run_ahead
from tessella.data.transform import resize_pixels
from tessella.errors import UserError
from tessella.files import FileError
from tessella.ranges import JpegQuality, PackedSide, checked

IMAGES_PER_SHARD = 8192

_IMAGES_AT_ONCE = 32
_JPEG_SIDE = 65_500  # pixels; longer sides do not fit the format
_HEADER = 512  # bytes before a member of a tar
_LIST_LIMIT = 1 << 30  # bytes of a shard's list
_MEASURED_EVERY = 64  # rows between those whose loss is measured


class Packed(NamedTuple):
    """The result of packing."""

    images: int
    unreadable: int
    source_bytes: int  # 0 if the source is no files
    bytes: int  # of the encoded images
    kept: int  # images whose file was copied unchanged
    psnr: float | None  # decibel, mean over a sample of those that were encoded; of the encoding, not of the resize
    written: bool  # False: a complete pack was verified

    def lines(self, out: Path) -> list[str]:
        """The result in words, for the pack in `out`."""
        share = f" ({self.bytes / self.source_bytes:.0%} of {self.source_bytes:,})" if self.source_bytes else ""
        loss = "" if self.psnr is None else f"; encoding costs {self.psnr:.1f} dB PSNR in the mean of a sample"
        unchanged = f", {self.kept:,} of them unchanged" if self.kept else ""
        failed = f"; {self.unreadable:,} could not be read, {out / 'pack.json'} says why" if self.unreadable else ""
        lines = [f"{self.images:,} images{unchanged}, {self.bytes:,} bytes{share}{loss}{failed}; verified"]
        if not self.source_bytes:
            lines.append("These images are in memory during a run, which is as fast without a pack")
        return lines


class _Encoded(NamedTuple):
    """One image of a shard."""

    encoded: bytes
    width: int  # upright, pixels
    height: int
    kept: bool
    source_bytes: int
    psnr: float | None


@checked
def pack(images: ImageSet, out: Path, *, short_side: PackedSide, quality: JpegQuality, workers: int) -> Packed:
    """Write a pack, continue an unfinished one, or verify a complete one.

    Args:
        images: what to pack; with labels, if they are to be packed too.
        out: folder of the pack; missing, empty, or a pack of the same images and settings.
        short_side: pixels that the shorter side has at most.
        quality: of the JPEGs, 1 to 100.
        workers: threads.

    Raises:
        UserError: the folder holds something else or the disk is full, a setting is out of range, a shard is damaged,
            or no image can be read.
    """
    settings = {"source": images.fingerprint, "short_side": short_side, "quality": quality}
    if (out / DESCRIPTION).exists():
        return _verified(out, settings)
    try:
        return _write(images, out, settings, workers)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}). Finished shards stay: give the same command again "
            "when there is room"
        ) from error


def _verified(out: Path, settings: dict[str, Any]) -> Packed:
    """A complete pack, every byte of which has been read and compared with its hash."""
    description = read_description(out)
    _check_same(out, description, settings)
    total = sum(shard["bytes"] for shard in description["shards"])
    with progress_bar(f"verifying {out.name}", total, "bytes") as advance:
        for shard in description["shards"]:
            if files.sha256(out / shard["file"]) != shard["sha256"]:
                raise UserError(f"{out / shard['file']} is damaged: delete {out} and pack the images again")
            advance(shard["bytes"])
    known = {name: description[name] for name in Packed._fields if name in description}
    return Packed(**known | {"unreadable": len(description["unreadable"]), "written": False})


def _write(images: ImageSet, out: Path, settings: dict[str, Any], workers: int) -> Packed:
    files.make_folder(out)
    begun = out / PACKING
    if begun.exists():
        _check_same(out, _read_json(begun), settings)
    elif any(out.iterdir()):
        raise UserError(f"{out} holds other files: choose another --out, a folder that is new or empty")
    else:
        files.write_json(begun, settings)
    files.remove_unfinished(out)
    parts = range(0, len(images), IMAGES_PER_SHARD)
    with progress_bar(f"packing {len(images):,} images", len(images)) as advance:
        for number, first in enumerate(parts):
            rows = range(first, min(first + IMAGES_PER_SHARD, len(images)))
            if not _is_whole(out / _shard(number)):
                _write_shard(images, out, number, rows, settings, workers, advance)
            else:
                advance(len(rows))
    return _finish(images, out, settings, len(parts))


def _write_shard(
    images: ImageSet, out: Path, number: int, rows: range, settings: dict[str, Any], workers: int, advance: Any
) -> None:
    """One tar and, when it is complete, the list of its members."""
    file, table, unreadable = out / _shard(number), [], []

    def encode(row: int, results: dict[int, _Encoded | str]) -> None:
        try:
            results[row] = encode_for_pack(images, row, short_side=settings["short_side"], quality=settings["quality"])
        except Unreadable as error:
            results[row] = error.reason

    def work() -> Any:
        for first in range(rows.start, rows.stop, _IMAGES_AT_ONCE):
            chunk, results = range(first, min(first + _IMAGES_AT_ONCE, rows.stop)), dict[int, _Encoded | str]()
            yield (chunk, results), [partial(encode, row, results) for row in chunk]

    # Some chunks are in work at a time, never a whole shard, so that memory does not grow with it.
    with (
        files.writing(file) as target,
        closing(run_ahead(work(), workers)) as done,
        tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for chunk, results in done:
            for row in chunk:
                image = results[row]
                if isinstance(image, str):
                    unreadable.append([images.key(row), image])
                    continue
                member = tarfile.TarInfo(f"{row:012d}.jpg")
                member.size = len(image.encoded)
                table.append([row, tar.offset + _HEADER, member.size, *image[1:]])
                tar.addfile(member, BytesIO(image.encoded))
            advance(len(chunk))
    about = {"file": file.name, "bytes": file.stat().st_size, "sha256": files.sha256(file), "images": len(table)}
    files.write_json(file.with_suffix(".json"), about | {"members": table, "unreadable": unreadable})


def encode_for_pack(images: ImageSet, row: int, short_side: int, quality: int) -> _Encoded:
    """One image as a pack stores it.

    Raises:
        Unreadable: it cannot be decoded, or does not fit into a JPEG.
    """
    stored = images.read(row)
    pixels = decode(stored) if isinstance(stored, bytes) else stored
    height, width, _ = pixels.shape
    if (width, height) != tuple(images.sizes[row]):
        raise Unreadable(f"{width} x {height} pixels, but not when the data set was indexed")
    shrinks = min(width, height) > short_side
    if shrinks:
        factor = short_side / min(width, height)
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
        pixels = resize_pixels(pixels, height, width).numpy()
    if max(width, height) > _JPEG_SIDE:
        raise Unreadable(f"{width} x {height} pixels do not fit into a JPEG")
    pixels = np.ascontiguousarray(pixels)
    # 4:2:0, as cameras and the usual tools write.
    encoded = bytes(simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420"))
    size = len(stored) if isinstance(stored, bytes) else 0
    if not shrinks and isinstance(stored, bytes) and stored.startswith(b"\xff\xd8") and size <= len(encoded):
        return _Encoded(stored, width, height, True, size, None)
    return _Encoded(encoded, width, height, False, size, _psnr(pixels, encoded) if row % _MEASURED_EVERY == 0 else None)


def _psnr(pixels: NDArray[np.uint8], encoded: bytes) -> float:
    """Decibel; 100 for an image without any loss."""
    error = float(np.square(pixels.astype(np.float32) - decode(encoded)).mean())
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def _finish(images: ImageSet, out: Path, settings: dict[str, Any], shards: int) -> Packed:
    """Write index and description from the shards' lists; with `pack.json` the pack is complete."""
    tables = [(out / _shard(number)).with_suffix(".json") for number in range(shards)]
    lists = [_read_json(table) for table in tables]
    members = np.array([member[:5] for one in lists for member in one["members"]], np.int64).reshape(-1, 5)
    if not len(members):
        raise UserError(f"none of the {len(images)} images of {images.name} can be read: there is nothing to pack")
    rows, offsets, sizes = members[:, :3].T
    labels = -1 if images.labels is None else np.asarray(images.labels)[rows]
    columns = columns_of([images.key(row) for row in rows.tolist()], members[:, 3:5], sizes, labels)
    columns["source_archive"] = np.repeat(np.arange(shards), [one["images"] for one in lists])
    columns["source_offset"] = offsets
    with files.new_folder(out / COLUMNS) as folder:
        hashes = write_columns(folder, columns)
    rest = [member[5:] for one in lists for member in one["members"]]
    losses = [psnr for _, _, psnr in rest if psnr is not None]
    unreadable = sorted([list(entry) for entry in images.unreadable] + [e for one in lists for e in one["unreadable"]])
    packed = Packed(
        images=len(rows),
        unreadable=len(unreadable),
        source_bytes=sum(size for _, size, _ in rest),
        bytes=int(sizes.sum()),
        kept=sum(kept for kept, _, _ in rest),
        psnr=sum(losses) / len(losses) if losses else None,
        written=True,
    )
    description = {"format": FORMAT, "name": images.name, **settings, **packed._asdict(), "unreadable": unreadable}
    description |= {"classes": images.classes or [], "fingerprint": fingerprint_of(columns), "columns": hashes}
    description["shards"] = [{name: one[name] for name in ("file", "bytes", "sha256", "images")} for one in lists]
    del description["written"]
    for shard in description["shards"]:  # read again from the disk
        if files.sha256(out / shard["file"]) != shard["sha256"]:
            files.remove(out / shard["file"])
            raise UserError(f"{out / shard['file']} was not stored as it was written: check the disk, then pack again")
    files.write_json(out / DESCRIPTION, description)
    files.remove(out / PACKING)
    for table in tables:
        files.remove(table)
    return packed


def _check_same(out: Path, packed: dict[str, Any], settings: dict[str, Any]) -> None:
    other = [
        "other images" if name == "source" else f"{name} {packed.get(name)} instead of {value}"
        for name, value in settings.items()
        if packed.get(name) != value
    ]
    if other:
        raise UserError(f"{out} is a pack with {', '.join(other)}: choose another --out, or delete it")


def _is_whole(shard: Path) -> bool:
    try:
        return bool(shard.stat().st_size == _read_json(shard.with_suffix(".json"))["bytes"])
    except (OSError, UserError, KeyError):
        return False


def _shard(number: int) -> str:
    return f"shard-{number:05d}.tar"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = files.read_json(path, _LIST_LIMIT)
    except FileError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: delete {path.parent} and pack the images again")
    return content
