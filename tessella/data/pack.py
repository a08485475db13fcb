"""Images encoded anew, smaller, once, so that every later epoch decodes fewer bytes (`sources.packs` reads a pack).

    source -> decode -> shorter side to at most `short_side` -> JPEG -> shard by shard into tar files -> verified

Bytes are what decoding costs, so a pack of large photos is read faster. It changes the pixels: the settings
and the measured loss stand in `pack.json`. A file that would not become smaller is taken over as it is. A shard is
written under a temporary name and renamed when it is whole, so that a killed run goes on with the first shard that is
missing, and a pack that was made in two runs equals one that was made in one.
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
from numpy.typing import NDArray
from PIL import Image

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

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow encodes too, slower
    simplejpeg = None

IMAGES_PER_SHARD = 8192

_IMAGES_PER_TASK = 8
_JPEG_SIDE = 65_500  # pixels; longer sides do not fit the format
_HEADER = 512  # bytes before a member of a tar
_LIST_LIMIT = 1 << 30  # bytes of a shard's list
_MEASURED_EVERY = 64  # rows between those whose loss is measured


class Packed(NamedTuple):
    """What a pack came to."""

    images: int
    unreadable: int
    source_bytes: int  # 0 if the source is no files
    bytes: int  # of the encoded images
    kept: int  # images whose file was taken over unchanged
    psnr: float | None  # decibel, mean over a sample of those that were encoded; of the encoding, not of the resize
    written: bool  # False: it was there already, and is whole

    def lines(self, out: Path) -> list[str]:
        """For people.

        Args:
            out: the pack.
        """
        share = f" ({self.bytes / self.source_bytes:.0%} of {self.source_bytes:,})" if self.source_bytes else ""
        loss = "" if self.psnr is None else f"; encoding costs {self.psnr:.1f} dB PSNR in the mean of a sample"
        kept = f", {self.kept:,} of them as they were" if self.kept else ""
        failed = f"; {self.unreadable:,} could not be read, {out / 'pack.json'} says why" if self.unreadable else ""
        lines = [f"{self.images:,} images{kept}, {self.bytes:,} bytes{share}{loss}{failed}; verified"]
        if not self.source_bytes:
            lines.append("These images lie in memory during a run, which is as fast without a pack")
        return lines


class _One(NamedTuple):
    """One image of a shard."""

    encoded: bytes
    width: int  # upright, pixels
    height: int
    kept: bool
    source_bytes: int
    psnr: float | None


@checked
def pack(images: ImageSet, out: Path, *, short_side: PackedSide, quality: JpegQuality, workers: int) -> Packed:
    """Write a pack, go on with one that was begun, or verify one that is complete.

    Args:
        images: what to pack; with labels, if these shall be packed too.
        out: folder of the pack; missing, empty, or a pack of the same images and settings.
        short_side: pixels that the shorter side has at most.
        quality: of the JPEGs, 1 to 100.
        workers: threads.

    Raises:
        UserError: the folder holds something else or no room is left, a setting is out of range, a shard is damaged,
            or no image can be read.
    """
    asked = {"source": images.fingerprint, "short_side": short_side, "quality": quality}
    if (out / DESCRIPTION).exists():
        return _verified(out, asked)
    try:
        return _write(images, out, asked, workers)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}). What is finished stays: give the same command again "
            "when there is room"
        ) from error


def _verified(out: Path, asked: dict[str, Any]) -> Packed:
    """A complete pack, every byte of which has been read and compared with its hash."""
    description = read_description(out)
    _check_same(out, description, asked)
    total = sum(shard["bytes"] for shard in description["shards"])
    with progress_bar(f"verifying {out.name}", total, "bytes") as advance:
        for shard in description["shards"]:
            if files.sha256(out / shard["file"]) != shard["sha256"]:
                raise UserError(f"{out / shard['file']} is damaged: delete {out} and pack the images anew")
            advance(shard["bytes"])
    found = {name: description[name] for name in Packed._fields if name in description}
    return Packed(**found | {"unreadable": len(description["unreadable"]), "written": False})


def _write(images: ImageSet, out: Path, asked: dict[str, Any], workers: int) -> Packed:
    files.make_folder(out)
    begun = out / PACKING
    if begun.exists():
        _check_same(out, _read_json(begun), asked)
    elif any(out.iterdir()):
        raise UserError(f"{out} holds other files: choose another --out, a folder that is new or empty")
    else:
        files.write_json(begun, asked)
    files.remove_unfinished(out)
    parts = range(0, len(images), IMAGES_PER_SHARD)
    with progress_bar(f"packing {len(images):,} images", len(images)) as advance:
        for number, first in enumerate(parts):
            rows = range(first, min(first + IMAGES_PER_SHARD, len(images)))
            if not _is_whole(out, number):
                _write_shard(images, out, number, rows, asked, workers, advance)
            else:
                advance(len(rows))
    return _finish(images, out, asked, len(parts))


def _write_shard(
    images: ImageSet, out: Path, number: int, rows: range, asked: dict[str, Any], workers: int, advance: Any
) -> None:
    """One tar and, when it is whole, its list of members."""
    file, table, unreadable = out / _shard(number), [], []
    one = partial(encode_for_pack, images, short_side=asked["short_side"], quality=asked["quality"])

    def work() -> Any:
        for start in range(rows.start, rows.stop, _IMAGES_PER_TASK):
            chunk = list(range(start, min(start + _IMAGES_PER_TASK, rows.stop)))
            found: list[_One | str] = [""] * len(chunk)
            yield (chunk, found), [partial(_fill, one, chunk, found)]

    # Twice as many as threads and some are in work at a time, never a shard: memory does not grow with it.
    with (
        files.writing(file) as target,
        closing(run_ahead(work(), workers)) as done,
        tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for chunk, found in done:
            for row, image in zip(chunk, found, strict=True):
                if isinstance(image, str):
                    unreadable.append([images.key(row), image])
                    continue
                member = tarfile.TarInfo(f"{row:012d}.jpg")
                member.size = len(image.encoded)
                offset = tar.offset + _HEADER
                tar.addfile(member, BytesIO(image.encoded))
                table.append([row, offset, *(len(image.encoded), *image[1:])])
            advance(len(chunk))
    about = {"file": file.name, "bytes": file.stat().st_size, "sha256": files.sha256(file), "images": len(table)}
    files.write_json(_list_of(out, number), about | {"members": table, "unreadable": unreadable})


def _fill(one: Any, rows: list[int], found: list[_One | str]) -> None:
    for position, row in enumerate(rows):
        try:
            found[position] = one(row)
        except Unreadable as error:
            found[position] = error.reason


def encode_for_pack(images: ImageSet, row: int, short_side: int, quality: int) -> _One:
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
    encoded = _jpeg(pixels, quality)
    size = len(stored) if isinstance(stored, bytes) else 0
    if not shrinks and isinstance(stored, bytes) and stored.startswith(b"\xff\xd8") and size <= len(encoded):
        return _One(stored, width, height, True, size, None)
    return _One(encoded, width, height, False, size, _psnr(pixels, encoded) if row % _MEASURED_EVERY == 0 else None)


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """4:2:0, as cameras and the usual tools write."""
    pixels = np.ascontiguousarray(pixels)
    if simplejpeg is not None:
        return bytes(simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420"))
    target = BytesIO()
    Image.fromarray(pixels).save(target, "JPEG", quality=quality, subsampling="4:2:0")
    return target.getvalue()


def _psnr(pixels: NDArray[np.uint8], encoded: bytes) -> float:
    """Decibel; 100 for an image without any loss."""
    error = float(np.square(pixels.astype(np.float32) - decode(encoded)).mean())
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def _finish(images: ImageSet, out: Path, asked: dict[str, Any], shards: int) -> Packed:
    """Index and description from the shards' lists; the pack counts from the moment that `pack.json` is there."""
    lists = [_read_json(_list_of(out, number)) for number in range(shards)]
    members = np.array([member[:5] for one in lists for member in one["members"]], np.int64).reshape(-1, 5)
    if not len(members):
        raise UserError(f"none of the {len(images)} images of {images.name} can be read: there is nothing to pack")
    rows, offsets, sizes = members[:, 0], members[:, 1], members[:, 2]
    labels = images.labels
    keys = [images.key(row).encode("utf-8", "surrogateescape") for row in rows.tolist()]
    columns = columns_of(
        keys,
        members[:, 3:5].astype(np.int32),
        sizes,
        np.full(len(rows), -1) if labels is None else np.asarray(labels)[rows],
    )
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
    description = {"format": FORMAT, "name": images.name, **asked, **packed._asdict(), "unreadable": unreadable}
    description |= {"classes": images.classes or [], "fingerprint": fingerprint_of(columns), "columns": hashes}
    description["shards"] = [{name: one[name] for name in ("file", "bytes", "sha256", "images")} for one in lists]
    del description["written"]
    for shard in description["shards"]:  # what lies on the disk, not what was meant to be written
        if files.sha256(out / shard["file"]) != shard["sha256"]:
            files.remove(out / shard["file"])
            raise UserError(f"{out / shard['file']} was not stored as it was written: check the disk, then pack again")
    files.write_json(out / DESCRIPTION, description)
    files.remove(out / PACKING)
    for number in range(shards):
        files.remove(_list_of(out, number))
    return packed


def _check_same(out: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    other = [name for name, value in asked.items() if found.get(name) != value]
    if other:
        words = {"source": "other images"}
        told = ", ".join(words.get(name, f"{name} {found.get(name)} instead of {asked[name]}") for name in other)
        raise UserError(f"{out} is a pack with {told}: choose another --out, or delete it")


def _is_whole(out: Path, number: int) -> bool:
    try:
        size = _read_json(_list_of(out, number))["bytes"]
        return bool((out / _shard(number)).stat().st_size == size)
    except (OSError, UserError, KeyError):
        return False


def _shard(number: int) -> str:
    return f"shard-{number:05d}.tar"


def _list_of(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = files.read_json(path, _LIST_LIMIT)
    except FileError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: delete {path.parent} and pack the images anew")
    return content
