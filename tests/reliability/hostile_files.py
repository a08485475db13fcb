"""An adversary's folder of images, built by a script: no file of anybody else's.

Every entry says what becomes of it: used, with the pixel that must come out of its middle; or refused, with a word of
the reason; or not seen at all, because its name is no image's. To look at it by hand:
`python -m tests.reliability.hostile_files FOLDER`.
"""

from __future__ import annotations

import io
import os
import socket
import stat
import struct
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

COLOUR = (200, 60, 20)  # of every plain image: far from gray, so that swapped or inverted channels show
Pixel = tuple[int, int, int]


class Entry(NamedTuple):
    """One thing in the tree."""

    name: bytes  # below the root
    make: Callable[[bytes], None]  # puts it at a path
    reason: str | None = None  # a part of why it is refused (a pattern); None: it is used
    middle: Pixel | None = None  # of the upright image; None: any
    size: tuple[int, int] | None = None  # width, height, upright; None: any
    listed: bool = True  # False: passed over in silence


# --- encoded images ---------------------------------------------------------------------------------------


def plain(width: int = 24, height: int = 16, colour: Pixel = COLOUR) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo() -> bytes:
    return encode(plain(), "JPEG", quality=95)


def chunk(kind: bytes, data: bytes, wrong_crc: bool = False) -> bytes:
    crc = zlib.crc32(kind + data) ^ (1 if wrong_crc else 0)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *extra: bytes, claim: bytes = b"") -> bytes:
    """A PNG by hand. `rows`: filter byte and samples of each row; `claim` replaces the header chunk."""
    header = claim or chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sixteen_bit_png(channels: int, values: tuple[int, ...], width: int = 24, height: int = 16) -> bytes:
    row = b"\0" + struct.pack(f">{channels}H", *values) * width
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], row * height)


def rotated(orientation: int, format: str) -> bytes:
    """24 x 16 upright pixels: the upper left quarter in COLOUR, the rest blue; stored turned, as the tag says."""
    upright = np.empty((16, 24, 3), dtype=np.uint8)
    upright[:] = (0, 0, 255)
    upright[:9, :13] = COLOUR  # holds the middle, and the corner that tells all eight apart
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],  # turning it clockwise makes it upright
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    return encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)


def adobe_cmyk(marked: bool) -> bytes:
    """Cyan 0, magenta .7, yellow .9, black .2; stored upside down, as Adobe's programs do, with their mark or none."""
    encoded = encode(Image.new("CMYK", (24, 16), (0, 179, 230, 51)), "JPEG", quality=95, subsampling=0)
    at = encoded.find(b"\xff\xee")
    assert at > 0
    length = struct.unpack(">H", encoded[at + 2 : at + 4])[0]
    return encoded if marked else encoded[:at] + encoded[at + 2 + length :]


def animated(format: str) -> bytes:
    frames = [plain(colour=COLOUR), plain(colour=(0, 0, 255)), plain(colour=(0, 255, 0))]
    lossless = {"lossless": True} if format == "WEBP" else {}
    return encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, loop=0, **lossless)


def scan_bomb(side: int = 5000, scans: int = 3000) -> bytes:
    """A progressive JPEG that refines the same coefficients over and over: some kilobytes, minutes of work."""
    source = encode(Image.new("L", (side, side), 90), "JPEG", progressive=True, quality=50)
    refined = source.rfind(b"\xff\xda")
    last = source[refined : source.rfind(b"\xff\xd9")][:4096]
    return source[:refined] + last * scans + b"\xff\xd9"


def tiff(*entries: tuple[int, int, int, int], next_directory: int = 0, tail: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value) each."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", next_directory) + tail


def tiff_of(width: int, height: int, strips: int, rows_per_strip: int, next_directory: int = 0) -> bytes:
    shape = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1))
    places = ((273, 4, strips, 200), (277, 3, 1, 1), (278, 4, 1, rows_per_strip), (279, 4, strips, 200))
    return tiff(*shape, *places, next_directory=next_directory, tail=b"\x80" * 600)


def text_bomb(kind: bytes, megabytes: int) -> bytes:
    """A good PNG with a text that unpacks to `megabytes`."""
    packer = zlib.compressobj(9)
    block = b"\0" * 2**20
    packed = b"".join(packer.compress(block) for _ in range(megabytes)) + packer.flush()
    head = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind]
    return png(24, 16, 8, 2, (b"\0" + bytes(COLOUR) * 24) * 16, chunk(kind, head + packed))


def many_segments(count: int) -> bytes:
    """A JPEG with `count` full comment segments before its header."""
    jpeg = photo()
    return jpeg[:2] + (b"\xff\xfe\xff\xff" + b" " * 65533) * count + jpeg[2:]


# --- how things get into a folder -------------------------------------------------------------------------


def file(content: bytes) -> Callable[[bytes], None]:
    def make(path: bytes) -> None:
        with open(path, "wb") as target:
            target.write(content)

    return make


def link(target: bytes) -> Callable[[bytes], None]:
    return lambda path: os.symlink(target, path)


def folder(path: bytes) -> None:
    os.mkdir(path)


def sparse(size: int, head: bytes = b"") -> Callable[[bytes], None]:
    def make(path: bytes) -> None:
        file(head)(path)
        os.truncate(path, size)

    return make


def unix_socket(path: bytes) -> None:
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(os.path.dirname(path))  # a socket's path must be short
        try:
            listener.bind(os.path.basename(path))
        finally:
            os.chdir(here)


def locked(path: bytes) -> None:
    file(photo())(path)
    os.chmod(path, 0)


def locked_folder(path: bytes) -> None:
    os.mkdir(path)
    file(photo())(path + b"/inside.jpg")
    os.chmod(path, 0)


# --- the tree ---------------------------------------------------------------------------------------------


def entries() -> list[Entry]:
    """All of them; the parents of a name are made as needed."""
    return [*_used(), *_refused(), *_misnamed(), *_names(), *_links(), *_unseen()]


def _used() -> list[Entry]:
    """Odd, but images: each with the pixel that must come out."""
    gray, dark = (120, 120, 120), (51, 51, 51)
    flat = plain()
    palette = flat.quantize(4)
    transparent = Image.new("RGBA", (24, 16), (*COLOUR, 0))
    big = np.zeros((16, 24), dtype=np.uint16) + 120 * 257
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wide_text = PngImagePlugin.PngInfo()
    wide_text.add_text("Comment", "<script>alert(1)</script>\x1b[31m" * 100)
    found = {
        "plain.jpg": (photo(), COLOUR),
        "plain.png": (encode(flat, "PNG"), COLOUR),
        "plain.webp": (encode(flat, "WEBP", lossless=True), COLOUR),
        "plain.bmp": (encode(flat, "BMP"), COLOUR),
        "plain.tif": (encode(flat, "TIFF"), COLOUR),
        "plain.ppm": (encode(flat, "PPM"), COLOUR),
        "plain.gif": (encode(palette, "GIF"), COLOUR),
        "one pixel.png": (encode(plain(1, 1), "PNG"), COLOUR),
        "one pixel.jpg": (encode(plain(1, 1), "JPEG", quality=95), COLOUR),
        "one pixel.gif": (encode(plain(1, 1).quantize(2), "GIF"), COLOUR),
        "line 20000x1.png": (encode(plain(20_000, 1), "PNG"), COLOUR),
        "line 1x20000.png": (encode(plain(1, 20_000), "PNG"), COLOUR),
        "line 20000x1.jpg": (encode(plain(20_000, 1), "JPEG", quality=95), COLOUR),
        "gray.jpg": (encode(Image.new("L", (24, 16), 120), "JPEG"), gray),
        "gray alpha LA.png": (encode(Image.new("LA", (24, 16), (120, 9)), "PNG"), gray),
        "one bit.png": (encode(Image.new("1", (24, 16), 1), "PNG"), (255, 255, 255)),
        "no canvas.gif": (without_canvas(), COLOUR),
        "one bit.pbm": (b"P4 24 16\n" + b"\x00" * 48, (255, 255, 255)),
        "gray.pgm": (b"P5 24 16 255\n" + b"\x78" * 384, gray),
        "gray 16.pgm": (b"P5 24 16 65535\n" + struct.pack(">H", 120 * 257) * 384, gray),
        "16 bit gray.png": (sixteen_bit_png(1, (120 * 257,)), gray),
        "16 bit gray white.png": (sixteen_bit_png(1, (65535,)), (255, 255, 255)),
        "16 bit gray alpha.png": (sixteen_bit_png(2, (120 * 257, 1)), gray),
        "16 bit RGB.png": (sixteen_bit_png(3, tuple(v * 257 for v in COLOUR)), COLOUR),
        "16 bit RGBA.png": (sixteen_bit_png(4, (*(v * 257 for v in COLOUR), 1)), COLOUR),
        "16 bit gray.tif": (encode(Image.fromarray(big), "TIFF"), gray),
        "palette.png": (encode(palette, "PNG"), COLOUR),
        "palette with alpha.png": (encode(palette, "PNG", transparency=b"\x00\x80"), COLOUR),
        "palette two bits.png": (encode(palette, "PNG", bits=2), COLOUR),
        "transparent RGBA.png": (encode(transparent, "PNG"), COLOUR),
        "transparent.webp": (encode(transparent, "WEBP", lossless=True, exact=True), COLOUR),
        "interlaced.png": (interlaced(), gray),
        "progressive.jpg": (encode(flat, "JPEG", quality=95, progressive=True), COLOUR),
        "CMYK Adobe.jpg": (adobe_cmyk(marked=True), (204, 61, 20)),
        "CMYK without Adobe's mark.jpg": (adobe_cmyk(marked=False), (204, 61, 20)),
        "CMYK.tif": (encode(Image.new("CMYK", (24, 16), (0, 179, 230, 51)), "TIFF"), (204, 61, 20)),
        "YCbCr.tif": (encode(flat.convert("YCbCr"), "TIFF"), COLOUR),
        "float.tif": (encode(Image.fromarray(np.full((16, 24), 0.2, np.float32)), "TIFF"), dark),
        "profile.jpg": (encode(flat, "JPEG", quality=95, icc_profile=srgb), COLOUR),
        "animated.gif": (animated("GIF"), COLOUR),
        "animated.webp": (animated("WEBP"), COLOUR),
        "animated APNG.png": (animated("PNG"), COLOUR),
        "many pages.tif": (animated("TIFF"), COLOUR),
        "deflated.tif": (encode(flat, "TIFF", compression="tiff_deflate"), COLOUR),
        "tail.jpg": (photo() + b"<script>alert(1)</script>" * 99, COLOUR),
        "tail.png": (encode(flat, "PNG") + b"MZ\x90\0" * 99, COLOUR),
        "broken EXIF.jpg": (broken_exif(), COLOUR),
        "script in a text.png": (encode(flat, "PNG", pnginfo=wide_text), COLOUR),
        "five megabytes of comments.jpg": (many_segments(80), COLOUR),
        "loop of directories.tif": (looping_tiff(), (128, 128, 128)),
    }
    used = [_file(f"used/{name}", content, middle=pixel) for name, (content, pixel) in found.items()]
    for format, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        for orientation in range(1, 9):
            name = f"used/orientation {orientation}.{suffix}"
            used.append(_file(name, rotated(orientation, format), middle=COLOUR, size=(24, 16)))
    noisy = encode(noise(), "JPEG", quality=90)
    return [*used, _file("used/noise.jpg", noisy, size=(96, 64)), _file("used/UPPER.JPEG", photo(), middle=COLOUR)]


def interlaced(passes: int = 7) -> bytes:
    """Adam7 with one gray level: the seven passes of 24 x 16, each row with its filter byte."""
    rows = b""
    grids = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for x, y, dx, dy in grids[:passes]:
        rows += (b"\0" + b"\x78" * len(range(x, 24, dx))) * len(range(y, 16, dy))
    claim = chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 16, 8, 0, 0, 0, 1))
    return png(24, 16, 8, 0, rows, claim=claim)


def broken_exif() -> bytes:
    jpeg = photo()
    body = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def without_canvas() -> bytes:
    """A GIF whose canvas has no size, but whose frame has."""
    gif = encode(plain().quantize(4), "GIF")
    return gif[:6] + b"\0\0\0\0" + gif[10:]


def looping_tiff() -> bytes:
    """Its directory says that the next directory is itself."""
    return tiff_of(24, 16, 1, 16, next_directory=8)


def _refused() -> list[Entry]:
    jpeg, noisy = photo(), encode(noise(), "JPEG", quality=90)
    noisy_png, noisy_webp = encode(noise(), "PNG"), encode(noise(), "WEBP", lossless=True)
    progressive = encode(noise(), "JPEG", progressive=True)
    row = b"\0" + bytes(COLOUR) * 24
    header = struct.pack(">IIBBBBB", 24, 16, 8, 2, 0, 0, 0)
    webp_bomb = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + b"\xff\xff\x3f" * 2
    gif = encode(plain().quantize(4), "GIF")
    refused = {
        "empty.jpg": (b"", "empty"),
        "empty.png": (b"", "empty"),
        "one byte.jpg": (b"\xff", "not an image"),
        "text.jpg": (b"this is no image\n" * 40, "not an image"),
        "text.png": (b"404 not found", "not an image"),
        "zeros.jpg": (b"\0" * 5000, "not an image"),
        "magic alone.jpg": (b"\xff\xd8\xff", "."),
        "magic alone.png": (b"\x89PNG\r\n\x1a\n", "."),
        "magic alone.gif": (b"GIF89a", "."),
        "magic alone.webp": (b"RIFF\0\0\0\0WEBP", "."),
        "magic alone.tif": (b"II*\0", "."),
        "magic alone.bmp": (b"BM", "."),
        "magic alone.ppm": (b"P6", "."),
        "header only.jpg": (noisy[: noisy.find(b"\xff\xda")], "."),
        "header only.png": (noisy_png[:33], "."),
        "half.jpg": (noisy[: len(noisy) // 2], "damaged|truncated"),
        "half, closed again.jpg": (noisy[: len(noisy) // 2] + b"\xff\xd9", "damaged|truncated"),
        "half.png": (noisy_png[: len(noisy_png) // 2], "."),
        "half.webp": (noisy_webp[: len(noisy_webp) // 2], "."),
        "half.gif": (encode(noise().quantize(64), "GIF")[:2000], "."),
        "half.bmp": (encode(noise(), "BMP")[:5000], "."),
        "half.tif": (encode(noise(), "TIFF")[:5000], "."),
        "half.ppm": (encode(noise(), "PPM")[:5000], "."),
        "progressive half.jpg": (progressive[:2000], "damaged|truncated"),
        "progressive half, closed again.jpg": (progressive[:2000] + b"\xff\xd9", "damaged"),
        "CMYK half, closed again.jpg": (encode(noise().convert("CMYK"), "JPEG")[:5000] + b"\xff\xd9", "damaged"),
        "two of four strips.tif": (tiff_of(24, 16, 1, 4), "missing"),
        "interlaced, pass missing.png": (interlaced(passes=6), "missing|truncated"),
        "megabytes of digits.ppm": (b"P3 6000 6000 255\n" + b"1 " * 9_000_000, "decimal"),
        "no width.png": (png(0, 16, 8, 2, b""), "."),
        "no height.jpg": (without_height(jpeg), "."),
        "no size.ppm": (b"P6 0 0 255\n", "."),
        "no size.bmp": (bmp(0), "."),
        "negative size.ppm": (b"P6 -3 7 255\n" + b"\0" * 99, "."),
        "bad CRC of the header.png": (png(24, 16, 8, 2, row * 16, claim=chunk(b"IHDR", header, wrong_crc=True)), "."),
        "bad CRC of the pixels.png": (bad_pixel_crc(row * 16), "."),
        "rows missing.png": (png(64, 64, 8, 2, (b"\0" + b"\x7f" * 192) * 20), "."),
        "no pixels.png": (png(64, 64, 8, 2, b""), "."),
        "bad filter.png": (png(24, 16, 8, 2, (b"\x09" + row[1:]) * 16), "."),
        "bomb 90000 squared.png": (png(90_000, 90_000, 8, 2, b"\0" * 1000), "pixels"),
        "bomb 14000 squared.png": (png(14_000, 14_000, 8, 0, b"\0" * 1000), "pixels"),
        "bomb 2 to the 31.png": (png(2**31 - 1, 2**31 - 1, 8, 2, b"\0" * 1000), "."),
        "bomb 65535 squared.jpg": (with_size(jpeg, 65_535, 65_535), "pixels"),
        "bomb 65535 squared.gif": (gif[:6] + b"\xff\xff\xff\xff" + gif[10:], "pixels"),
        "bomb.webp": (b"RIFF" + struct.pack("<I", 4 + len(webp_bomb)) + b"WEBP" + webp_bomb, "."),
        "bomb.bmp": (bmp(99_999), "pixels"),
        "bomb.tif": (tiff_of(99_999, 99_999, 1, 99_999), "pixels"),
        "bomb.ppm": (b"P6 99999 99999 255\n" + b"\0" * 999, "pixels"),
        "bomb of scans.jpg": (scan_bomb(), "scans"),
        "bomb of text.png": (text_bomb(b"zTXt", 200), "."),
        "bomb of international text.png": (text_bomb(b"iTXt", 200), "."),
        "a billion strips.tif": (tiff_of(24, 16, 10**9, 1), "."),
        "strips behind the end.tif": (tiff_of(240, 160, 1, 160), "."),
        "no directory.tif": (b"II*\0" + struct.pack("<I", 2**31), "."),
        "numbers without a range.tif": (encode(Image.fromarray(np.full((4, 4), 9, np.int32)), "TIFF"), "range"),
        "floats without a range.tif": (encode(Image.fromarray(np.full((4, 4), 9.0, np.float32)), "TIFF"), "outside"),
        "not a number.tif": (encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "outside"),
    }  # fmt: skip
    return [_file(f"refused/{name}", content, reason) for name, (content, reason) in refused.items()]


def bmp(side: int) -> bytes:
    """The header of a BMP of side x side pixels."""
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


def without_height(jpeg: bytes) -> bytes:
    return with_size(jpeg, 24, 0)


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    at = jpeg.find(b"\xff\xc0")
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def bad_pixel_crc(rows: bytes) -> bytes:
    good = png(24, 16, 8, 2, rows)
    at = good.find(b"IEND") - 8  # the sum behind the pixels
    return good[:at] + bytes(4) + good[at + 4 :]


def _misnamed() -> list[Entry]:
    """Other kinds of files that are called images. None may make a parser start a program."""
    files = {
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "eps, DOS header.jpg": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, 200) + b"\0" * 18 + b"%!PS-Adobe-3.0\n",
        "psd.jpg": b"8BPS\0\1" + b"\0" * 40,
        "wmf.jpg": b"\xd7\xcd\xc6\x9a" + b"\0" * 80,
        "emf.png": b"\1\0\0\0" + b"\0" * 36 + b" EMF" + b"\0" * 60,
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:///etc/passwd"/></svg>',
        "html.jpg": b"<!DOCTYPE html><html><script>alert(1)</script></html>",
        "pdf.jpg": b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/Launch>>>>endobj\n",
        "elf.png": b"\x7fELF" + b"\0" * 99,
        "zip.jpg": b"PK\3\4" + b"\0" * 99,
        "pickle.png": b"\x80\4cos\nsystem\n\x8c\6touch .\x85R.",
        "shell.jpg": b"#!/bin/sh\ntouch /tmp/ran\n",
        "icns.png": b"icns" + struct.pack(">I", 64) + b"\0" * 56,
        "ico.png": b"\0\0\1\0\1\0" + b"\0" * 16,
        "fli.gif": struct.pack("<IHHHH", 128, 0xAF11, 1, 24, 16) + b"\0" * 116,
        "mpeg.jpg": b"\0\0\1\xb3" + b"\0" * 60,
        "jpeg2000.jpg": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 60,
        "fits.tif": b"SIMPLE  =                    T" + b" " * 2850,
        "xbm.bmp": b"#define im_width 9\n#define im_height 9\nstatic char im_bits[] = {\n",
        "xpm.bmp": b'/* XPM */\nstatic char *x[] = {"1 1 1 1",\n',
        "mpo of nothing.jpg": b"\xff\xd8\xff\xe2\0\x10MPF\0II*\0\x08\0\0\0\0\0\xff\xd9",
    }
    return [_file(f"misnamed/{name}", content, ".") for name, content in files.items()]


def _names() -> list[Entry]:
    """Good images whose names are weapons. Their keys keep every byte; what people see is cleaned."""
    names = [
        *(b"new\nline.jpg", b"return\r.jpg", b"tab\t.jpg", b"\x01\x02.jpg", b"\x7f.jpg", b"null\xe2\x80\x8b.jpg"),
        *(b"\x1b[2J\x1b[31mred.jpg", b"\x1b]0;title\x07.jpg", b"\xc2\x9b31m.jpg", b"bell\x07.jpg", b"back\x08\x08.jpg"),
        *(b"invalid \xff\xfe utf8.jpg", b"\xc3\x28.jpg", b"\xed\xa0\x80.jpg", b"latin \xe9.jpg"),
        *("right\u202egpj.exe.jpg".encode(), "\u2066isolate.jpg".encode(), "line\u2028separator.jpg".encode()),
        *("é.jpg".encode(), "e\u0301.jpg".encode(), "😀.jpg".encode(), "日本.jpg".encode()),
        *(b"-rf.jpg", b"--out=x.jpg", b"=cmd|' .jpg", b"+1.jpg", b"@SUM(1).jpg", b"a,b;c.jpg", b'"quoted".jpg'),
        *(b"<img src=x onerror=alert(1)>.jpg", b"'><script>alert(1)<!-- .jpg", b"&lt;b&gt;.jpg", b"{{7*7}}.jpg"),
        *(b"$(touch ran).jpg", b"`touch ran`.jpg", b"a;touch ran.jpg", b"%n%s%x.jpg", b"[bold red]rich[-].jpg"),
        *(b" space.jpg", b"space .jpg", b"back\\slash.jpg", b"colon::part.jpg", b"star*.jpg", b"CON.jpg", b"~.jpg"),
        b"n" * 251 + b".jpg",
    ]
    deep = b"/".join([b"deep" * 10] * 20)
    nested = [Entry(b"names/<b>class</b>\x1b[0m/a.jpg", file(photo()), middle=COLOUR)]
    nested.append(Entry(b"names/" + deep + b"/a.jpg", file(photo()), middle=COLOUR))
    return [Entry(b"names/" + name, file(photo()), middle=COLOUR) for name in names] + nested


def _links() -> list[Entry]:
    """Links, pipes and devices. Good ones are followed, each folder once; none may wait or lead in circles."""
    regular = "not a regular file"
    vanished = "cannot be read|No such file|Not a directory|leads nowhere|Too many levels"
    entries = [
        Entry(b"links/real/a.jpg", file(photo()), middle=COLOUR),
        Entry(b"links/good.jpg", link(b"real/a.jpg"), middle=COLOUR),
        Entry(b"links/real/hard.jpg", lambda path: os.link(os.path.dirname(path) + b"/a.jpg", path), middle=COLOUR),
        Entry(b"links/loop", link(b"."), listed=False),
        Entry(b"links/up", link(b".."), listed=False),
        Entry(b"links/real/back", link(b"../real"), listed=False),
        Entry(b"links/ring one", link(b"ring two"), listed=False),
        Entry(b"links/ring two", link(b"ring one"), listed=False),
        Entry(b"links/self.jpg", link(b"self.jpg"), vanished),
        Entry(b"links/ring a.jpg", link(b"ring b.jpg"), vanished),
        Entry(b"links/ring b.jpg", link(b"ring a.jpg"), vanished),
        Entry(b"links/dangling.jpg", link(b"nowhere.jpg"), vanished),
        Entry(b"links/through a file.jpg", link(b"real/a.jpg/x.jpg"), vanished),
        Entry(b"links/passwd.jpg", link(b"/etc/passwd"), "not an image"),
        Entry(b"links/zero.jpg", link(b"/dev/zero"), regular),
        Entry(b"links/random.png", link(b"/dev/urandom"), regular),
        Entry(b"links/stdin.jpg", link(b"/dev/stdin"), f"{regular}|{vanished}|empty|not an image"),
        Entry(b"links/tty.jpg", link(b"/dev/tty"), f"{regular}|{vanished}"),
        Entry(b"links/memory.jpg", link(b"/proc/self/mem"), "."),
        Entry(b"links/pipe.jpg", lambda path: os.mkfifo(path), regular),
        Entry(b"links/to a pipe.jpg", link(b"pipe.jpg"), regular),
        Entry(b"links/socket.jpg", unix_socket, regular),
        Entry(b"links/folder.jpg", folder, listed=False),
        Entry(b"links/folder.jpg/inside.jpg", file(photo()), middle=COLOUR),
        Entry(b"links/sparse.jpg", sparse(2**40), "more than the limit"),
        Entry(b"links/sparse below the limit.jpg", sparse(500 * 2**20), "not an image"),
        Entry(b"links/sparse behind a head.png", sparse(2**30, b"\x89PNG\r\n\x1a\n"), "more than the limit"),
    ]
    if os.geteuid() != 0:  # the superuser reads everything
        entries.append(Entry(b"links/locked.jpg", locked, "Permission denied"))
        entries.append(Entry(b"links/locked folder", locked_folder, "Permission denied"))
    return entries


def _unseen() -> list[Entry]:
    names = [b"unseen/notes.txt", b"unseen/.hidden.jpg", b"unseen/jpg", b"unseen/a.jpg.exe", b"unseen/model.pth"]
    return [Entry(name, file(photo()), listed=False) for name in [*names, b"unseen/.git/a.jpg", b"unseen/a.svg"]]


def _file(name: str, content: bytes, reason: str | None = None, **said) -> Entry:
    return Entry(name.encode(), file(content), reason, **said)


def build(root: Path, chosen: list[Entry] | None = None) -> list[Entry]:
    """Write the tree; entries that this file system or this user cannot make are left out of the answer."""
    made = []
    for entry in entries() if chosen is None else chosen:
        path = os.fsencode(root) + b"/" + entry.name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(OSError, NotImplementedError):
            entry.make(path)
            made.append(entry)
    return made


def unlock(root: Path) -> None:
    """Give back the modes that were taken, so that the tree can be removed."""
    for path, folders, _ in os.walk(os.fsencode(root)):
        for name in folders:
            below = path + b"/" + name
            if not os.path.islink(below) and not os.stat(below).st_mode & stat.S_IRUSR:
                os.chmod(below, 0o700)


if __name__ == "__main__":
    print(f"{len(build(Path(sys.argv[1])))} entries")
