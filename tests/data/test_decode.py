"""Odd, damaged and hostile files: decoded whole and upright as Pillow would, or refused with a reason."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from tessella.data import decode as module
from tessella.data.decode import MAX_PIXELS, Unreadable, decode, probe, probe_with

WIDTH, HEIGHT = 40, 24
SMOOTH = np.stack(
    np.broadcast_arrays(
        np.linspace(0, 255, WIDTH)[None, :], np.linspace(255, 0, HEIGHT)[:, None], np.full((1, 1), 90.0)
    ),
    axis=-1,
).astype(np.uint8)


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(SMOOTH).convert(mode)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise_jpeg(**options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "JPEG", **options)


def png_of_size(width: int, height: int) -> bytes:
    """A header, and hardly any pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


ENCODED = {
    "jpeg": encode(picture(), "JPEG"),
    "jpeg progressive": encode(picture(), "JPEG", progressive=True),
    "jpeg stored as RGB": encode(picture(), "JPEG", keep_rgb=True),
    "jpeg gray": encode(picture("L"), "JPEG"),
    "jpeg CMYK": encode(picture("CMYK"), "JPEG"),
    "png": encode(picture(), "PNG"),
    "png gray": encode(picture("L"), "PNG"),
    "png gray and alpha": encode(picture("LA"), "PNG"),
    "png alpha": encode(picture("RGBA"), "PNG"),
    "png palette": encode(picture("P"), "PNG"),
    "png 1 bit": encode(picture("1"), "PNG"),
    "webp": encode(picture(), "WEBP"),
    "webp lossless alpha": encode(picture("RGBA"), "WEBP", lossless=True),
    "bmp": encode(picture(), "BMP"),
    "tiff": encode(picture(), "TIFF"),
    "tiff deflate CMYK": encode(picture("CMYK"), "TIFF", compression="tiff_deflate"),
    "gif": encode(picture("P"), "GIF"),
    "ppm": encode(picture(), "PPM"),
    "pgm": encode(picture("L"), "PPM"),
    "pbm": encode(picture("1"), "PPM"),
    "avif": encode(picture(), "AVIF"),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_every_format_and_mode_gives_the_pixels_that_pillow_gives(kind):
    pixels = decode(ENCODED[kind])
    expected = np.asarray(Image.open(io.BytesIO(ENCODED[kind])).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    assert probe(ENCODED[kind]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", [kind for kind in ENCODED if kind.startswith("jpeg")])
def test_simplejpeg_and_pillow_give_the_same_pixels(kind, monkeypatch):
    fast = decode(ENCODED[kind])
    monkeypatch.setattr(module, "_JPEG", b"nothing begins like this")
    np.testing.assert_array_equal(decode(ENCODED[kind]), fast)
    assert probe(ENCODED[kind]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pillow_applies_it(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(picture(), format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))
    pixels = decode(encoded)
    np.testing.assert_array_equal(pixels, expected)
    assert probe(encoded) == (pixels.shape[1], pixels.shape[0])
    assert pixels.shape[:2] == ((WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH))


def test_an_orientation_behind_the_pixels_of_a_png_counts_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(picture(), "PNG", exif=exif)
    start = encoded.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", encoded[start : start + 4])[0]
    moved = encoded[:start] + encoded[end:-12] + encoded[start:end] + encoded[-12:]
    np.testing.assert_array_equal(decode(moved), decode(encoded))
    assert probe(moved) == (HEIGHT, WIDTH)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # of Pillow; silenced by the module outside of pytest
def test_broken_exif_costs_no_image():
    encoded = encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff and then nonsense")
    np.testing.assert_array_equal(decode(encoded), decode(ENCODED["jpeg"]))
    assert probe(encoded) == (WIDTH, HEIGHT)


def test_16_bit_gray_is_scaled_so_that_white_stays_white():
    values = np.array([[0, 128, 129, 257], [1000, 30000, 65406, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257)
    files = [
        encode(Image.fromarray(values), "PNG"),
        encode(Image.fromarray(values), "TIFF"),
        b"P5 4 2 65535\n" + values.astype(">u2").tobytes(),
    ]
    for encoded in files:
        pixels = decode(encoded)
        assert pixels.shape == (2, 4, 3)
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=-1))


def test_floats_count_from_0_to_1_and_other_ranges_are_refused():
    values = np.array([[0, 0.5, 1.0]], dtype=np.float32)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(values), "TIFF"))[0, :, 0], [0, 128, 255])
    for odd in (values * 300, values - 1, values * np.nan):
        with pytest.raises(Unreadable, match="floating-point"):
            decode(encode(Image.fromarray(odd), "TIFF"))
    with pytest.raises(Unreadable, match="32-bit integer"):
        decode(encode(Image.fromarray(np.arange(6, dtype=np.int32).reshape(2, 3)), "TIFF"))


def test_a_palette_with_transparency_keeps_the_colours_under_it():
    image = picture("P")
    encoded = encode(image, "PNG", transparency=bytes([0, 128] + [255] * 200))
    expected = Image.open(io.BytesIO(encoded)).convert("RGBA").convert("RGB")
    np.testing.assert_array_equal(decode(encoded), np.asarray(expected))


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "green", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        encoded = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (decode(encoded) == (255, 0, 0)).all(), format


@pytest.mark.parametrize(
    "kind", ["jpeg", "jpeg progressive", "jpeg gray", "jpeg CMYK", "png", "webp", "bmp", "tiff", "gif", "ppm"]
)
def test_no_part_of_an_image_passes_for_the_whole(kind):
    encoded, whole = ENCODED[kind], decode(ENCODED[kind])
    for percent in range(5, 100, 5):
        try:
            pixels = decode(encoded[: len(encoded) * percent // 100])
        except Unreadable:
            continue
        assert percent >= 85 and not kind.startswith("jpeg")  # only a checksum or an end mark is missing
        np.testing.assert_array_equal(pixels, whole)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_and_closed_again_is_refused_though_pillow_pads_it(progressive):
    encoded = noise_jpeg(progressive=progressive)
    for cut in (len(encoded) // 2, len(encoded) - 50):
        with pytest.raises(Unreadable, match="JPEG"):
            decode(encoded[:cut])
    with pytest.raises(Unreadable, match="JPEG"):
        decode(noise_jpeg()[:1500] + b"\xff\xd9")


HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"this is no image\n" * 50, "not an image"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not an image"),
    "psd": (b"8BPS\0\1" + b"\0" * 40, "not an image"),
    "only the magic bytes of a JPEG": (b"\xff\xd8\xff", "damaged"),
    "only the magic bytes of a PNG": (b"\x89PNG\r\n\x1a\n", "."),
    "no width": (b"P6 0 7 255\n", "not an image"),
    "negative width": (b"P6 -3 7 255\n" + b"\0" * 99, "."),
    "a bomb": (png_of_size(90_000, 90_000), "pixels"),
    "a small bomb": (png_of_size(14_000, 14_000), "pixels"),
    "rows missing": (png_of_size(64, 64), "truncated"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_image_is_refused_at_once_with_a_reason_and_without_another_process(kind, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a process was started")

    for owner, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn")):
        monkeypatch.setattr(owner, name, forbidden)
    encoded, reason = HOSTILE[kind]
    start = time.perf_counter()
    with pytest.raises(Unreadable, match=reason) as caught:
        decode(encoded)
    assert time.perf_counter() - start < 1
    assert caught.value.reason.isprintable() and 0 < len(caught.value.reason) < 200
    if kind != "rows missing":  # which only shows behind the header
        with pytest.raises(Unreadable):
            probe(encoded)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_image_below_the_limit_is_no_bomb():
    assert probe(png_of_size(12_000, 8_000)) == (12_000, 8_000)  # Pillow alone would warn
    assert 13_377 * 13_377 <= MAX_PIXELS < 13_378 * 13_378


def test_files_above_the_byte_limit_are_not_read(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(Unreadable, match="1,001 bytes"):
        decode(b"x" * 1001)
    with pytest.raises(Unreadable, match="more than the limit"):
        probe_with(lambda size: pytest.fail("was read"), 1001)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg CMYK", "png palette", "webp", "tiff", "gif", "bmp"])
def test_flipped_bytes_give_an_image_or_a_reason_but_never_another_error(kind):
    random = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(ENCODED[kind])
        for position in random.integers(0, len(damaged), 3):
            damaged[position] = random.integers(256)
        for look in (decode, probe):
            try:
                found = look(bytes(damaged))
            except Unreadable as error:
                assert error.reason
            else:
                assert look is probe or (found.dtype == np.uint8 and found.shape[2] == 3)


def test_probing_reads_only_the_head_of_a_large_jpeg():
    encoded = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 300, 3), np.uint8)), "JPEG")
    asked: list[int] = []

    def read(size: int) -> bytes:
        asked.append(size)
        return encoded[:size]

    assert probe_with(read, len(encoded)) == (300, 400)
    assert len(encoded) > 2**16 and asked == [2**16]


def test_one_pixel_is_an_image():
    assert decode(encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")).tolist() == [[[9, 8, 7]]]
    assert decode(encode(Image.new("L", (1, 1), 9), "JPEG")).shape == (1, 1, 3)


@pytest.mark.parametrize("orientation", [0, 9, 10, 255, 65535])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_an_orientation_that_there_is_none_of_turns_nothing_anywhere(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(picture(), format, exif=exif)
    assert probe(encoded) == probe_with(lambda size: encoded[:size], len(encoded)) == (WIDTH, HEIGHT)
    assert decode(encoded).shape == (HEIGHT, WIDTH, 3)


def test_an_avif_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(picture(), "AVIF", exif=exif)
    assert probe(encoded) == (HEIGHT, WIDTH) and decode(encoded).shape == (WIDTH, HEIGHT, 3)


def test_a_heic_is_read_when_the_plug_in_is_there():
    plug_in = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    plug_in.register_heif_opener()
    encoded = encode(picture(), "HEIF", quality=90)
    assert probe_with(lambda size: encoded[:size], len(encoded)) == (WIDTH, HEIGHT)
    assert np.abs(decode(encoded).astype(int) - SMOOTH).mean() < 5
    with pytest.raises(Unreadable):
        decode(encoded[: len(encoded) // 2])


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def webp_of_size(width: int, height: int) -> bytes:
    """34 bytes: a lossless picture of one colour."""
    body = (0x2F | (width - 1) << 8 | (height - 1) << 22).to_bytes(5, "little") + b"\x88\x88\x08"
    chunk = b"VP8L" + struct.pack("<I", 14) + body.ljust(14, b"\0")
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def chunk_without_content(name: bytes) -> bytes:
    return struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name))


_JPEG, _PNG, _MILLIONS = encode(picture(), "JPEG"), encode(picture(), "PNG"), 10_000_000
SLOW = {  # what each cost before: 1 s per megabyte and more, or gigabytes
    "a PPM with a long comment": lambda: b"P6\n#" + b"x" * _MILLIONS + b"\n2 2\n255\n" + b"\0" * 12,
    "a PPM with many blanks": lambda: b"P6\n" + b" " * _MILLIONS + b"\n2 2\n255\n" + b"\0" * 12,
    "comments between digits": lambda: b"P3\n1000 1000\n255\n" + b"#\n" * 1_000_000 + b"1 " * 3_000_000,
    "a JPEG with fill bytes": lambda: _JPEG[:2] + b"\xff" * _MILLIONS + _JPEG[2:],
    "a JPEG with stuffed bytes": lambda: _JPEG[:2] + b"\xff\x00" * (_MILLIONS // 2) + _JPEG[2:],
    "a JPEG of empty segments": lambda: _JPEG[:2] + segment(0xE5, b"") * (_MILLIONS // 4) + _JPEG[2:],
    "a JPEG with EXIF in pieces": lambda: _JPEG[:2] + segment(0xE1, b"Exif\0\0" + b"x" * 65_000) * 150 + _JPEG[2:],
    "a PNG of empty chunks": lambda: _PNG[:33] + chunk_without_content(b"teXx") * (_MILLIONS // 12) + _PNG[33:],
    "a PNG of empty pixel chunks": lambda: _PNG[:33] + chunk_without_content(b"IDAT") * (_MILLIONS // 12) + _PNG[33:],
    "a WebP of 34 bytes and 178 million pixels": lambda: webp_of_size(16383, 10900),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_file_that_costs_seconds_or_gigabytes_is_refused_before(kind):
    encoded = SLOW[kind]()
    start = time.process_time()
    with pytest.raises(Unreadable):
        decode(encoded)
    with contextlib.suppress(Unreadable):  # the head of a file may look fine
        probe_with(lambda size: encoded[:size], len(encoded))
    assert time.process_time() - start < 1.5


def test_large_images_are_decoded_one_after_the_other(monkeypatch):
    """So that memory does not grow with the number of threads."""
    at_once, most, lock = [0], [0], threading.Lock()
    original = Image.Image.load

    def load(image):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        try:
            return original(image)
        finally:
            with lock:
                at_once[0] -= 1

    monkeypatch.setattr(Image.Image, "load", load)
    for limit, expected in ((0, 1), (2**28, 4)):
        monkeypatch.setattr(module, "_LARGE_BYTES", limit)
        most[0] = 0
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(decode, [encode(picture("P"), "GIF")] * 8))
        assert most[0] <= expected and (expected == 1 or most[0] > 1)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tag", [273, 324])
def test_a_tiff_in_millions_of_strips_is_refused_from_its_first_directory(order: str, tag: int):
    """Listing four millions takes Pillow minutes."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    big_magic = (b"II+\0" if order == "<" else b"MM\0+") + struct.pack(order + "HHQ", 8, 0, 16)
    small = magic + struct.pack(order + "IHHHII", 8, 1, tag, 4, 4_000_000, 200)
    big = big_magic + struct.pack(order + "QHHQQ", 1, tag, 4, 4_000_000, 200)
    for encoded in (small, big):
        with pytest.raises(Unreadable, match="more than 131,072 strips or tiles"):
            decode(encoded + bytes(200))


def test_a_tiff_of_one_row_per_strip_is_read():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((3000, 2), np.uint8)).save(buffer, "TIFF", tiffinfo={278: 1})
    assert decode(buffer.getvalue()).shape == (3000, 2, 3)
