"""Encoded bytes to upright RGB pixels, strictly: what cannot be decoded whole is `Unreadable`, with a reason.

    JPEG in RGB, YCbCr or gray -> simplejpeg (libjpeg-turbo) --+
    the rest, and what simplejpeg refuses -> Pillow -----------+-> EXIF orientation -> (h, w, 3) uint8

Files are foreign and may be hostile: the formats are a closed list (Pillow would start Ghostscript for an
EPS named .jpg), sizes are checked on the header before a pixel is decoded, and a part of an image is never taken for
the whole.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import islice

import numpy as np
import simplejpeg
from numpy.typing import NDArray

# AVIF, TIFF and WebP are named to register them: for a format that is not, Image.open imports every plugin.
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

HEIC = find_spec("pillow_heif") is not None  # the extra "heic"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", *(("HEIF",) if HEIC else ()))
MAX_PIXELS = 178_956_970  # where Pillow, too, stops warning and refuses; 512 MiB of RGB pixels
MAX_BYTES = 512 * 2**20  # of one encoded image

_SIGNATURES = (  # how a file in one of `FORMATS` begins
    *(b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"II", b"MM", b"GIF8"),
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF", b"P0", b"Py"),
)
_PPM = _SIGNATURES[7:]
_JPEG, _PNG = _SIGNATURES[:2]
_ISO_MEDIA = b"ftyp"  # from byte 4 of an AVIF or HEIC
_MAX_HEADER_BYTES = 2**24  # before the size of a JPEG: 256 full segments
# What Pillow reads in Python, a byte or a piece at a time, is limited to what takes some seconds.
_MAX_PIECES = 1000  # segments before a JPEG's pixels
_MAX_EXIF_PIECES = 16  # segments that a JPEG's EXIF is cut into: Pillow joins them, copying all at each
_MAX_FILL = 2**12  # bytes between two segments of a JPEG
_MAX_CHUNKS = 2**18  # of a PNG
_PIECES_OF_TIFF = (273, 279, 324, 325)  # tags: places and sizes of strips, of tiles
_MAX_STRIPS = 2**17  # of a TIFF, or tiles: one for each row of each colour of the tallest that others write
_MAX_TEXT_PIXELS = 2**23  # bytes of a PPM in decimal digits
_MAX_TEXT_COMMENTS = 16  # in them
_MAX_RUNS = 2**23  # bytes of a BMP in runs of pixels
# Peak memory of decoding in bytes per pixel, the result included. Images that need more than `_LARGE_BYTES` are
# decoded one after the other, whatever the number of threads; the largest accepted one needs 1.3 GiB.
_BYTES_PER_PIXEL = {"WEBP": 18, "AVIF": 18, "HEIF": 18}
_OTHER_BYTES_PER_PIXEL = 8
_MAX_DECODED_BYTES = MAX_PIXELS * _OTHER_BYTES_PER_PIXEL
_MAX_SCANNED_PIXELS = 2**31  # scans x pixels of a JPEG: about 3 s; 12 scans of the largest image
_LARGE_BYTES = 2**28
_LARGE_HEADER_BYTES = 2**26  # headers that need a whole file of this size are read one after the other, to spare memory
_large = threading.Lock()
_JPEG_FILL = re.compile(rb"(?:\xff\x00|\xff(?=[\xff\x00])){0,4097}")  # allowed between two segments, without meaning
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within a scan, anything but a stuffed byte or restart
_HEAD_BYTES = 2**16  # the header of nearly every JPEG, and one read on any file system
_FAST_COLOURSPACES = ("YCbCr", "RGB", "Gray")  # what simplejpeg turns into RGB exactly as Pillow does
_JPEG_DAMAGE = ("premature end", "bad huffman code")  # pixels are lost, which Pillow would not say
_PNG_ORIENTATION_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # of each decoder: the images of a batch are decoded side by side

# Pillow warns on stderr of large images and odd metadata, once per image. Sizes are checked below, on every
# image, and of the metadata only the orientation is used: a broken one counts as none.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class Unreadable(Exception):
    """An image that cannot be decoded whole. `reason` is a short text for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Inaccessible(Unreadable):
    """An image whose bytes could not be read; at another time they may be."""


def decode(encoded: bytes, shrink: int = 1) -> NDArray[np.uint8]:
    """Pixels of an image: the first frame, upright, without alpha.

    16-bit gray is scaled by 1/257 and floats in [0, 1] by 255, both rounded; 16-bit colour keeps its upper
    8 bits, as Pillow reads it. Palettes, alpha and CMYK are converted as by Pillow's `convert("RGB")`.

    Args:
        encoded: a whole file in one of `FORMATS`.
        shrink: 1, 2, 4 or 8; a JPEG may come at 1/shrink of its size, sides rounded up, in half the time. Others, and
            rotated JPEGs whose sides are no multiples of it, come whole.

    Returns:
        (height, width, 3) uint8 RGB, contiguous and writable.

    Raises:
        Unreadable: damaged, truncated, too large, not an image, or of an unknown range of values.
    """
    _check_bytes(len(encoded))
    if encoded.startswith(_JPEG):
        pixels = _decode_jpeg_fast(encoded, shrink)
        if pixels is not None:
            return pixels
    with _unreadable_if_it_fails(), _open(encoded) as image:
        _check_before_loading(image, encoded)
        with _one_at_a_time(_needed_bytes(image) > _LARGE_BYTES):
            image.load()
            if image.format == "PNG":
                _check_png(image, encoded)
            return upright_rgb(image)


def upright_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of a Pillow image, converted and rotated as by `decode`: (h, w, 3) uint8, contiguous and writable.

    Raises:
        Unreadable: its range of values is unknown.
        OSError: from Pillow, of a file that is damaged.
    """
    image.load()  # a TIFF turns itself, and then says so
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return np.array(rgb)  # a copy: NumPy's view of a Pillow image is read-only


def probe(encoded: bytes) -> tuple[int, int]:
    """Upright (width, height) in pixels from a file, or as much of it as contains the header.

    Raises:
        Unreadable: no header of `FORMATS`, or a size that `decode` refuses.
    """
    _check_bytes(len(encoded))
    if encoded.startswith(_JPEG):
        _check_jpeg_header(encoded)
        with contextlib.suppress(ValueError):  # Pillow may be able to read it
            height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
            _check_pixels(width, height)
            return (height, width) if _jpeg_orientation(encoded) >= 5 else (width, height)
    with _unreadable_if_it_fails(), _open(encoded) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow applies a TIFF's orientation itself; this size has it already
            return width, height
        if image.format == "PNG" and not any(mark in encoded for mark in _PNG_ORIENTATION_MARKS):
            return width, height  # without decoding the pixels to see that no orientation is behind them
        return (height, width) if _orientation(image) >= 5 else (width, height)


def probe_with(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """Upright (width, height) of an image of `size` bytes, read only as far as needed; `read(n)` are its first n bytes.

    Raises:
        Unreadable: see `probe`; also when the image has more than `MAX_BYTES`.
    """
    _check_bytes(size)
    head = read(min(size, _HEAD_BYTES))
    if not head.startswith(_SIGNATURES) and head[4:8] != _ISO_MEDIA:
        return probe(head)  # raises the reason; no more of it need be read
    if len(head) >= size or not head.startswith(_PNG):  # a PNG may name its orientation behind the pixels
        try:
            return probe(head)
        except Unreadable:
            if len(head) >= size:
                raise
    if head.startswith(_JPEG):
        size = min(size, _MAX_HEADER_BYTES)
    with _one_at_a_time(size > _LARGE_HEADER_BYTES):
        return probe(read(size))


def _decode_jpeg_fast(encoded: bytes, shrink: int = 1) -> NDArray[np.uint8] | None:
    """Upright pixels by simplejpeg, or None where Pillow has to decide."""
    try:
        _check_jpeg_header(encoded)
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(encoded)
        _check_pixels(width, height)
        _check_scans(encoded, width, height)
        if colourspace not in _FAST_COLOURSPACES:
            if colourspace in ("CMYK", "YCCK"):  # Pillow converts it, but accepts half of an image
                simplejpeg.decode_jpeg(encoded, colorspace="CMYK", strict=True)
            return None
        orientation = _jpeg_orientation(encoded)
        if orientation != 1 and (width % shrink or height % shrink):
            shrink = 1  # the last blocks are not full; turned, they would come first and shift all others
        least = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)} if shrink > 1 else {}
        # strict is the default; without it missing parts would be gray.
        large = width * height // shrink**2 * _OTHER_BYTES_PER_PIXEL > _LARGE_BYTES
        with _one_at_a_time(large):
            pixels = simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True, **least)
            return np.array(Image.fromarray(pixels).transpose(_UPRIGHT[orientation])) if orientation > 1 else pixels
    except ValueError as error:
        if any(sign in str(error).lower() for sign in _JPEG_DAMAGE):
            raise Unreadable(f"damaged or truncated JPEG: {_reason(error)}") from error
        return None


def _jpeg_orientation(jpeg: bytes) -> int:
    """EXIF orientation of a JPEG, by Pillow's parser, which is slow, only if the JPEG can have one."""
    if not _has_app1(jpeg):
        return 1
    try:
        with _open(jpeg) as image:
            return _orientation(image)
    except Unreadable:  # only its metadata is
        return 1


def _has_app1(jpeg: bytes) -> bool:
    """Whether a JPEG has an APP1 segment (EXIF or XMP) before its pixels, or no plain chain of segments up to them."""
    markers = [marker for marker, _ in _jpeg_header(jpeg)]
    return 0xE1 in markers or markers[-1:] != [0xDA]


def _jpeg_header(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """Marker and position of each segment up to the pixels (marker 0xDA) or to what is no segment.

    Raises:
        Unreadable: more fill bytes than Pillow, which reads them one by one, gets through in a moment.
    """
    position = 2
    while fill := _JPEG_FILL.match(jpeg, position):
        if fill.end() - position > _MAX_FILL:
            raise Unreadable(f"a JPEG with more than {_MAX_FILL:,} fill bytes between two segments: save it again")
        position = fill.end()
        if jpeg[position : position + 1] != b"\xff" or position + 4 > len(jpeg):
            return
        marker = jpeg[position + 1]
        yield marker, position
        if marker == 0xDA:  # start of scan
            return
        alone = marker == 1 or 0xD0 <= marker <= 0xD8
        position += 2 if alone else 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")


def _check_jpeg_header(jpeg: bytes) -> None:
    """Refuse a JPEG whose many or long segments Pillow would read for minutes."""
    exif = 0
    for pieces, (_, position) in enumerate(_jpeg_header(jpeg), 1):
        exif += jpeg.startswith(b"\xff\xe1", position) and jpeg.startswith(b"Exif", position + 4)
        if pieces > _MAX_PIECES or exif > _MAX_EXIF_PIECES or position > _MAX_HEADER_BYTES:
            raise Unreadable("a JPEG with an endless header: save it again")


def _open(encoded: bytes) -> Image.Image:
    """The image with only its header read, of a format and size that are accepted."""
    if encoded.startswith(_PPM) and len(encoded) > _HEAD_BYTES:
        _open(encoded[:_HEAD_BYTES]).close()  # Pillow reads a header byte by byte, however long its comments are
    # Reading more chunks would take minutes.
    if encoded.startswith(_PNG) and any(True for _ in islice(_png_chunks(encoded), _MAX_CHUNKS, None)):
        raise Unreadable(f"a PNG of more than {_MAX_CHUNKS:,} chunks: save it again")
    if encoded.startswith((b"II", b"MM")):
        _check_tiff_strips(encoded)
    formats = [name for name in FORMATS if name != "HEIF"]  # Pillow knows it only when the plug-in is imported
    if HEIC and encoded[4:8] == _ISO_MEDIA:
        _register_heic()
        formats.append("HEIF")
    with _unreadable_if_it_fails():
        try:
            image = Image.open(io.BytesIO(encoded), formats=formats)
        except UnidentifiedImageError as error:
            known = ", ".join(FORMATS)
            raise Unreadable(f"not an image of a known format ({known}), or its header is damaged") from error
    _check_pixels(*image.size)
    if _needed_bytes(image) > _MAX_DECODED_BYTES:
        raise Unreadable(
            f"{image.width} x {image.height} pixels of {image.format} need {_needed_bytes(image):,} bytes to decode, "
            f"more than the limit of {_MAX_DECODED_BYTES:,}"
        )
    return image


def _needed_bytes(image: Image.Image) -> int:
    """Memory that decoding takes at its peak."""
    return image.width * image.height * _BYTES_PER_PIXEL.get(str(image.format), _OTHER_BYTES_PER_PIXEL)


def _one_at_a_time(large: bool) -> contextlib.AbstractContextManager[object]:
    """A lock for what needs much memory; nothing for the rest."""
    return _large if large else contextlib.nullcontext()


@contextlib.contextmanager
def _unreadable_if_it_fails() -> Iterator[None]:
    """Turn every error of a parser into `Unreadable`: a damaged file can make it raise anything."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from error


@cache
def _register_heic() -> None:
    """Make Pillow read HEIC. Only when the first such file comes, because importing the plug-in is slow."""
    import pillow_heif

    pillow_heif.register_heif_opener()


def _check_bytes(size: int) -> None:
    if size == 0:
        raise Unreadable("the file is empty")
    if size > MAX_BYTES:
        raise Unreadable(f"the file has {size:,} bytes, more than the limit of {MAX_BYTES:,}")


def _check_pixels(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise Unreadable(f"an image of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise Unreadable(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,}")


def _check_scans(jpeg: bytes, width: int, height: int) -> None:
    """Refuse a JPEG of many scans over its pixels: kilobytes of it can cost hours."""
    limit = _MAX_SCANNED_PIXELS // (width * height)
    # The bytes may also be in a preview or behind the image: markers are parsed only if they are many.
    if jpeg.count(b"\xff\xda") > limit and sum(marker == 0xDA for marker in _jpeg_markers(jpeg)) > limit:
        raise Unreadable(f"a JPEG of more than {limit:,} scans over {width} x {height} pixels: save it again")


def _jpeg_markers(jpeg: bytes) -> Iterator[int]:
    """The markers of a JPEG up to its end, without those within its segments."""
    position = 2
    while (match := _JPEG_MARKER.search(jpeg, position)) and match[0][1] != 0xD9:
        yield match[0][1]
        position = match.end() + int.from_bytes(jpeg[match.end() : match.end() + 2], "big")


def _check_before_loading(image: Image.Image, encoded: bytes) -> None:
    """Refuse what Pillow would decode for minutes, or without all of its rows."""
    if image.format in ("JPEG", "MPO"):
        _check_scans(encoded, *image.size)
    if image.format == "PPM" and encoded[:2] in (b"P1", b"P2", b"P3"):
        if len(encoded) > _MAX_TEXT_PIXELS:
            raise Unreadable(
                f"a PPM in decimal digits has more than {_MAX_TEXT_PIXELS:,} bytes: save it in binary form"
            )
        if encoded.count(b"#") > _MAX_TEXT_COMMENTS:
            raise Unreadable("a PPM in decimal digits with many comments: save it in binary form")
    if image.format == "BMP" and encoded[30:31] in (b"\1", b"\2") and len(encoded) > _MAX_RUNS:
        raise Unreadable(f"a BMP in runs of pixels has more than {_MAX_RUNS:,} bytes: save it without compression")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        boxes = [box for _, box, *_ in image.tile if box]
        if sum((right - left) * (low - top) for left, top, right, low in boxes) < image.width * image.height:
            raise Unreadable("damaged or truncated TIFF: parts of the image are missing")


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk of a PNG."""
    position = 8
    while position + 12 <= len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4], "big")
        yield png[position + 4 : position + 8], position, end
        position = end


def _check_tiff_strips(tiff: bytes) -> None:
    """Refuse a TIFF in so many pieces that listing them takes minutes."""
    little = tiff.startswith(b"II")

    def number(position: int, size: int) -> int:
        return int.from_bytes(tiff[position : position + size], "little" if little else "big")

    big = number(2, 2) == 43  # with places of eight bytes
    start, counted, entry, width = (number(8, 8), 8, 20, 8) if big else (number(4, 4), 2, 12, 4)
    last = min(start + counted + entry * number(start, counted), len(tiff))
    for position in range(start + counted, last, entry):
        if number(position, 2) in _PIECES_OF_TIFF and number(position + 4, width) > _MAX_STRIPS:
            raise Unreadable(f"a TIFF of more than {_MAX_STRIPS:,} strips or tiles: save it again")


def _check_png(image: Image.Image, encoded: bytes) -> None:
    """Refuse a decoded PNG whose pixels are damaged or end early: Pillow checks no sums and leaves missing rows black.

    Rows can be missing only if the last one is black, or if rows come in another order.
    """
    if encoded[12:16] != b"IHDR":
        raise Unreadable("damaged PNG: it does not begin with its header")
    packed, interlaced = list[bytes](), encoded[28] != 0
    for kind, start, end in _png_chunks(encoded):
        if kind == b"IDAT":
            if zlib.crc32(encoded[start + 4 : end - 4]) != int.from_bytes(encoded[end - 4 : end], "big"):
                raise Unreadable("damaged PNG: the checksum of its pixels is wrong")
            packed.append(encoded[start + 8 : end - 4])
        elif packed:
            break
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if not interlaced and np.asarray(last_row).any():
        return
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    passes = [
        (len(range(x, image.width, dx)), len(range(y, image.height, dy)))  # columns, rows
        for x, y, dx, dy in (starts if interlaced else ((0, 0, 1, 1),))
    ]
    bits = encoded[24] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[encoded[25]]  # of a pixel: depth times channels
    missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in passes if columns)
    unpacker, data = zlib.decompressobj(), b"".join(packed)
    while missing > 0:
        unpacked = len(unpacker.decompress(data, min(missing, 2**22)))
        if not unpacked:
            raise Unreadable("damaged or truncated PNG: rows of the image are missing")
        missing, data = missing - unpacked, unpacker.unconsumed_tail


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 2 to 8; 1 (upright) when there is none, it cannot be parsed, or it is no orientation."""
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # bad metadata must not cost an image
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise Unreadable("floating-point pixels outside [0, 1]: save the image with 8 or 16 bits")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    if image.mode.startswith("I"):
        # 0..65535 to 0..255 by 1/257, which maps white to white. PNG and PPM hold 16-bit values in 32-bit pixels.
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise Unreadable("32-bit integer pixels: their range is unknown; save the image with 8 or 16 bits")
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    """One short line: parsers' messages may have line breaks or bytes of the file."""
    if isinstance(error, MemoryError):
        return "decoding needs more memory than there is"
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 200 else text[:197] + "..."
