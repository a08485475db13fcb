"""Encoded bytes to upright RGB pixels, strictly: what cannot be decoded whole is `Unreadable`, with a reason.

    JPEG in RGB, YCbCr or gray -> simplejpeg (libjpeg-turbo) --+
    the rest, and what simplejpeg refuses -> Pillow -----------+-> EXIF orientation -> (h, w, 3) uint8

Files are foreign and may be hostile: the formats are a closed list (Pillow would start Ghostscript for an
EPS named .jpg), sizes are checked on the header before a pixel is decoded, and half an image is never passed
off as a whole one.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# TIFF and WebP are named to register them: for a format that is not, Image.open imports every plugin.
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes JPEG too, a quarter slower
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 178_956_970  # where Pillow, too, stops warning and refuses; 512 MiB of RGB pixels
MAX_BYTES = 512 * 2**20  # of one encoded image

_HEAD_BYTES = 2**16  # holds the header of nearly every JPEG, and is one read on any file system
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

# Pillow warns on stderr of large images and odd metadata, once per image. Sizes are checked below, on every
# image, and of the metadata only the orientation is used: a broken one counts as none.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class Unreadable(Exception):
    """An image that cannot be decoded whole. `reason` is a short text for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(encoded: bytes) -> NDArray[np.uint8]:
    """Pixels of an image: the first frame, upright, without alpha.

    16-bit gray is scaled by 1/257 and floats in [0, 1] by 255, both rounded; 16-bit colour keeps its upper
    8 bits, as Pillow reads it. Palettes, alpha and CMYK are converted as by Pillow's `convert("RGB")`.

    Args:
        encoded: a whole file in one of `FORMATS`.

    Returns:
        (height, width, 3) uint8 RGB, contiguous and writable.

    Raises:
        Unreadable: damaged, truncated, too large, not an image, or of an unknown range of values.
    """
    _check_bytes(len(encoded))
    if simplejpeg is not None and encoded.startswith(b"\xff\xd8"):
        pixels = _decode_jpeg_fast(encoded)
        if pixels is not None:
            return pixels
    try:
        with _open(encoded) as image:
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
        return np.array(rgb)  # a copy: NumPy's view of a Pillow image is read-only
    except Unreadable:
        raise
    except Exception as error:  # a damaged file can make a parser raise anything
        raise Unreadable(_reason(error)) from error


def probe(encoded: bytes) -> tuple[int, int]:
    """Upright (width, height) in pixels, from the header alone.

    Args:
        encoded: a whole file, or as much of it as holds the header.

    Raises:
        Unreadable: no header of `FORMATS`, or a size that `decode` refuses.
    """
    _check_bytes(len(encoded))
    if simplejpeg is not None and encoded.startswith(b"\xff\xd8"):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
        except ValueError:
            pass  # Pillow may know better
        else:
            _check_pixels(width, height)
            return (height, width) if _jpeg_orientation(encoded) >= 5 else (width, height)
    try:
        with _open(encoded) as image:
            width, height = image.size
            if image.format == "TIFF":  # Pillow applies a TIFF's orientation itself; this size has it already
                return width, height
            return (height, width) if _orientation_of_header(image, encoded) >= 5 else (width, height)
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def probe_with(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """Upright (width, height) of an image that is read only as far as needed.

    Args:
        read: gives the first n bytes.
        size: bytes of the whole image.

    Raises:
        Unreadable: see `probe`; also when the image has more than `MAX_BYTES`.
    """
    _check_bytes(size)
    head = read(min(size, _HEAD_BYTES))
    if len(head) < size and head.startswith(b"\x89PNG"):
        return probe(read(size))  # a PNG may name its orientation behind the pixels
    try:
        return probe(head)
    except Unreadable:
        if len(head) >= size:
            raise
    return probe(read(size))


def _decode_jpeg_fast(encoded: bytes) -> NDArray[np.uint8] | None:
    """Upright pixels by simplejpeg, or None where Pillow has to decide."""
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(encoded)
        if colourspace not in _FAST_COLOURSPACES:
            return None
        _check_pixels(width, height)
        # strict is the default, but all depends on it: without it, what is missing comes back gray.
        pixels = simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True)
    except ValueError as error:
        if any(sign in str(error).lower() for sign in _JPEG_DAMAGE):
            raise Unreadable(f"damaged or truncated JPEG: {_reason(error)}") from error
        return None
    orientation = _jpeg_orientation(encoded)
    if orientation in _UPRIGHT:
        return np.array(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))
    return pixels


def _jpeg_orientation(jpeg: bytes) -> int:
    """EXIF orientation of a JPEG; Pillow's parser is asked only if there can be one, which takes its time."""
    if not _has_app1(jpeg):
        return 1
    try:
        with _open(jpeg) as image:
            return _orientation(image)
    except Unreadable:  # its metadata is, the pixels are not
        return 1


def _has_app1(jpeg: bytes) -> bool:
    """Whether a JPEG has an APP1 segment, the place of EXIF and XMP, before its pixels."""
    position = 2
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        marker = jpeg[position + 1]
        if marker == 0xE1:
            return True
        if marker == 0xDA:  # start of scan
            return False
        # A marker may be preceded by any number of fill bytes 0xFF.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
    return True  # not a plain chain of segments: let Pillow look


def _open(encoded: bytes) -> Image.Image:
    """The image with only its header read, of a format and size that are accepted."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise Unreadable(f"not an image of a known format ({', '.join(FORMATS)}), or its header is damaged") from error
    except Exception as error:
        raise Unreadable(_reason(error)) from error
    _check_pixels(*image.size)
    return image


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


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none or it cannot be parsed."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata that nobody asked for must not cost an image
        return 1


def _orientation_of_header(image: Image.Image, encoded: bytes) -> int:
    """As `_orientation`, without decoding a PNG's pixels just to see that nothing lies behind them."""
    if image.format == "PNG" and not any(mark in encoded for mark in _PNG_ORIENTATION_MARKS):
        return 1
    return _orientation(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _gray(_sixteen_bits(image))
    if image.mode == "F":
        return _gray(_floats(image))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _gray(levels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(levels).convert("RGB")


def _sixteen_bits(image: Image.Image) -> NDArray[np.uint8]:
    """0..65535 to 0..255 by 1/257, which maps white to white. Dividing by 256 or cutting at 255 would not."""
    values = np.asarray(image)
    if image.mode == "I":  # 32 bits in memory; PNG and PPM hold 16-bit values there
        if image.format not in ("PNG", "PPM"):
            raise Unreadable("32-bit integer pixels: their range is unknown; save the image with 8 or 16 bits")
        values = values.clip(0, 65535)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _floats(image: Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise Unreadable("floating-point pixels outside [0, 1]: save the image with 8 or 16 bits")
    return np.rint(values * 255).astype(np.uint8)


def _reason(error: Exception) -> str:
    """One short line: parsers' texts may hold line breaks or bytes of the file."""
    if isinstance(error, MemoryError):
        return "decoding needs more memory than there is"
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 200 else text[:197] + "..."
