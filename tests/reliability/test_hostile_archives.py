"""Archives that lie: nothing leaves them, no claim of theirs is paid for, and the good members are still found."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import tarfile
from pathlib import Path

import pytest

from tessella.data.boxes.layouts import open_annotations
from tessella.data.sources import open_images
from tessella.data.sources import tars as module
from tessella.data.sources.files import IMAGE_SUFFIXES
from tessella.data.sources.tars import walk_tar
from tessella.errors import UserError
from tests.reliability.audit import nothing_started
from tests.reliability.hostile_files import photo

pytestmark = pytest.mark.timeout(60)  # what hangs fails


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", format=tarfile.GNU_FORMAT
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info.tobuf(format, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def claiming(name: str, size: bytes, data: bytes = b"", kind: bytes = b"0") -> bytes:
    """A member whose header says another size; the sum is right."""
    header = bytearray(member(name, kind=kind)[-512:])
    header[124:136] = size.ljust(12, b"\0")[:12]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def pax(**fields: str) -> bytes:
    """An extended header as it stands before a member."""
    lines = b""
    for key, value in fields.items():
        body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        lines += str(length).encode() + body
    return member("pax", lines, kind=tarfile.XHDTYPE)


END = bytes(1024)
GOOD = member("good.jpg", photo())
NEGATIVE = b"\xff" * 11 + b"\x00"  # base 256, minus 256
HUGE = b"\x80" + b"\0" * 3 + struct.pack(">Q", 2**62)

ARCHIVES: dict[str, tuple[bytes, str]] = {  # content, a word about it; "" where only the good image is told of
    "up": (member("../../evil.jpg", photo()), "leads out"),
    "up inside": (member("a/../../evil.jpg", photo()), "leads out"),
    "absolute": (member("/tmp/evil.jpg", photo()), ""),
    "soft link": (member("evil.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), "link or special"),
    "hard link": (member("evil.jpg", kind=tarfile.LNKTYPE, link="../../evil.jpg"), "link or special"),
    "link, then a file through it": (
        member("out", kind=tarfile.SYMTYPE, link="/tmp") + member("out/evil.jpg", photo()),
        "",
    ),
    "device": (member("evil.jpg", kind=tarfile.CHRTYPE), "link or special"),
    "block device": (member("evil.jpg", kind=tarfile.BLKTYPE), "link or special"),
    "pipe": (member("evil.jpg", kind=tarfile.FIFOTYPE), "link or special"),
    "folder": (member("evil.jpg", kind=tarfile.DIRTYPE), ""),
    "300 characters": (member("n" * 296 + ".jpg", photo()), ""),
    "100000 characters": (member("n" * 100_000 + ".jpg", photo()), ""),
    "a name of 2 MB": (member("n" * 2**21 + ".jpg", photo()), "damaged"),
    "a name of a claimed terabyte": (claiming("././@LongLink", HUGE, kind=b"L"), "damaged"),
    "a name of a negative length": (claiming("././@LongLink", NEGATIVE, kind=b"L"), "damaged"),
    "negative size": (claiming("evil.jpg", NEGATIVE), "ends before"),
    "negative size of no image": (claiming("evil.txt", NEGATIVE), ""),
    "size that leads back for ever": (claiming("evil.txt", b"\xff" * 10 + b"\xfc\x00"), "claims -1024 bytes"),
    "a claimed exabyte": (claiming("evil.jpg", HUGE, photo()), "ends before|damaged"),
    "size that is no number": (claiming("evil.jpg", b"abcdefghijk"), "damaged"),
    "pax size negative": (pax(size="-1536") + member("evil.txt", photo()), "claims -1536 bytes"),
    "pax size huge": (pax(size=str(2**62)) + member("evil.jpg", photo()), "ends before|damaged"),
    "pax size no number": (pax(size="many") + member("evil.jpg", photo()), "damaged"),
    "pax path up": (pax(path="../../evil.jpg") + member("a", photo()), "leads out"),
    "pax path with zero": (pax(path="e\0vil.jpg") + member("a", photo()), ""),
    "pax loop": (pax(path="a.jpg") * 3000 + member("a", photo()), ".|"),
    "global pax": (member("pax", b"25 path=../../evil.jpg\n\n", kind=tarfile.XGLTYPE) + member("b", photo()), ".|"),
    "sparse": (claiming("evil.jpg", b"00000000000", kind=b"S"), "sparse|damaged"),
    "steering name": (member("\x1b[2Jevil\n\u202e.jpg", photo()), ""),
    "no UTF-8": (member(os.fsdecode(b"\xff\xfe.jpg"), photo()), ""),
    "half a header": (member("evil.jpg")[:140], "damaged"),
    "half an image": (member("evil.jpg", photo())[:700], "ends before|damaged"),
    "noise": (bytes(range(256)) * 8, "damaged"),
}  # fmt: skip


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("lie", ARCHIVES)
def test_a_lying_member_costs_neither_time_nor_the_members_before_it(lie, tmp_path):
    content, said = ARCHIVES[lie]
    archive = write(tmp_path / "a.tar", GOOD + content + (b"" if lie.startswith("half") else END))
    with nothing_started():
        images = open_images(str(archive), cache=tmp_path / "cache")
    keys = [images.key(row) for row in range(len(images))]
    assert "good.jpg" in keys and not [key for key in keys if key.startswith("/") or ".." in key.split("/")]
    assert all(images.read(row) == photo() for row in range(len(images)))
    reasons = "; ".join(reason for _, reason in images.unreadable)
    if "|" not in said or said[-1] != "|":
        assert bool(said) == bool(reasons)
    assert re.search(said, reasons)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "cache"]
    assert not Path("/tmp/evil.jpg").exists()


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_very_many_members_are_walked(count, tmp_path):
    headers = [member(f"{number:06d}.jpg") for number in range(1000)]
    archive = write(tmp_path / "a.tar", b"".join(headers) * (count // 1000) + END)
    members, failed = walk_tar(str(archive), IMAGE_SUFFIXES)
    assert len(members) == count and not failed


def test_a_gzip_bomb_is_stopped_long_before_the_disk_is_full_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ALWAYS_ALLOWED", 2**20)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9) as file:
        for _ in range(64):
            file.write(bytes(2**20))
    archive = write(tmp_path / "bomb.tar.gz", packed.getvalue())
    with pytest.raises(UserError, match=r"100 times its size.*decompress it yourself"):
        open_images(str(archive), cache=tmp_path / "cache")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []


def test_a_gzip_that_lies_about_its_size_is_still_read(tmp_path):
    packed = gzip.compress(GOOD + END)
    archive = write(tmp_path / "a.tar.gz", packed[:-4] + struct.pack("<I", 2**32 - 1))
    with pytest.raises(UserError, match="damaged"):
        open_images(str(archive), cache=tmp_path / "cache")


def test_annotations_in_an_archive_never_leave_it(tmp_path):
    evil = member("../annotations/instances_train.json", b"{}")
    archive = write(tmp_path / "a.tar", GOOD + evil + END)
    with pytest.raises(UserError, match="leads out of the archive"):
        open_annotations(str(archive), "train")
