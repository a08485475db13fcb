"""An archive, packed, sharded or damaged, gives what its folder would have given."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tessella.data.sources import open_images, tars
from tessella.errors import UserError
from tests.data.pictures import assert_equal_sets, keys, pack, write_image


def test_a_tar_read_in_place_equals_its_folder(folder, tmp_path):
    archive = pack(tmp_path / "pictures.tar", folder)
    before = sorted(tmp_path.iterdir())
    packed, plain = open_images(str(archive), labels=True), open_images(str(folder), labels=True)
    assert_equal_sets(packed, plain)
    np.testing.assert_array_equal(packed.labels, plain.labels)
    assert packed.classes == plain.classes
    assert sorted(tmp_path.iterdir()) == before
    assert_equal_sets(open_images(f"{archive}::cat/deep"), open_images(f"{folder}::cat/deep"))
    with pytest.raises(UserError, match=r"no part 'cta'.*there are cat"):
        open_images(f"{archive}::cta")


def test_a_compressed_tar_is_unpacked_once_and_equals_the_plain_one(folder, tmp_path, monkeypatch):
    plain, packed = pack(tmp_path / "p.tar", folder), pack(tmp_path / "q.tar.gz", folder, "w:gz")
    cache = tmp_path / "cache"
    assert_equal_sets(open_images(str(packed), cache=cache), open_images(str(plain), cache=cache))
    monkeypatch.setattr(tars, "_decompress", lambda *_: pytest.fail("decompressed a second time"))
    assert_equal_sets(open_images(str(packed), cache=cache), open_images(str(plain), cache=cache))
    assert [path.suffix for path in (cache / "archives").rglob("*") if path.is_file()].count(".tar") == 1


def test_a_changed_compressed_tar_is_unpacked_again_and_the_old_copy_removed(folder, tmp_path):
    packed = pack(tmp_path / "p.tgz", folder, "w:gz")
    before = open_images(str(packed), cache=tmp_path / "cache").fingerprint
    write_image(folder / "cat/new.png")
    pack(packed, folder, "w:gz")
    after = open_images(str(packed), cache=tmp_path / "cache")
    assert len(after) == 7 and after.fingerprint != before
    assert len(list((tmp_path / "cache/archives").rglob("*.tar"))) == 1


def test_a_damaged_compressed_tar_leaves_no_copy(folder, tmp_path):
    packed = pack(tmp_path / "p.tar.gz", folder, "w:gz")
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged or incomplete"):
        open_images(str(packed), cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


def test_too_little_room_for_the_copy_is_said_before_it_is_made(folder, tmp_path, monkeypatch):
    packed = pack(tmp_path / "p.tar.gz", folder, "w:gz")
    monkeypatch.setattr(tars.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="has 1,000 free: set TESSELLA_CACHE"):
        open_images(str(packed), cache=tmp_path / "cache")


def test_several_tars_are_one_set_by_pattern_or_folder(folder, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    pack(shards / "one.tar", folder / "cat")
    pack(shards / "two.tar.gz", folder / "dog", "w:gz")
    (shards / "SHA256SUMS").write_text("...")
    by_folder, by_pattern = open_images(str(shards)), open_images(f"{shards}/*.tar*")
    assert keys(by_folder) == [
        *("one.tar/a.jpg", "one.tar/c.png", "one.tar/deep/er/b.JPEG"),
        *("two.tar.gz/a.jpg", "two.tar.gz/b.webp", "two.tar.gz/wide.png"),
    ]
    assert_equal_sets(by_folder, by_pattern)
    np.testing.assert_array_equal(by_folder.image(3), open_images(str(folder / "dog")).image(0))
    pack(shards / "three.tar", folder / "dog")
    assert len(open_images(str(shards))) == 9


def test_a_folder_with_an_image_is_a_folder_even_if_tars_lie_beside_it(folder):
    pack(folder / "copy.tar", folder / "cat")
    assert len(open_images(str(folder))) == 6


def test_odd_members_are_listed_or_passed_over_and_nothing_is_written_outside(folder, tmp_path):
    archive = tmp_path / "odd.tar"
    good = (folder / "cat/a.jpg").read_bytes()
    with tarfile.open(archive, "w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), link
            tar.addfile(member, io.BytesIO(data))

        add("good.jpg", data=good)
        add("../outside.jpg", data=good)
        add("/absolute.jpg", data=good)
        add("l" * 300 + ".jpg", data=good)
        add("._good.jpg", data=b"what a Mac leaves in archives")
        add("notes.txt", data=b"hello")
        add("broken.jpg", data=b"no image")
        add("soft.jpg", tarfile.SYMTYPE, link="good.jpg")
        add("hard.jpg", tarfile.LNKTYPE, link="good.jpg")
        add("device.jpg", tarfile.CHRTYPE)
        add("pipe.jpg", tarfile.FIFOTYPE)
        add("folder.jpg/", tarfile.DIRTYPE)
        add("twice.jpg", data=b"an older version")
        add("twice.jpg", data=good)
    images = open_images(str(archive))
    assert set(keys(images)) == {
        "good.jpg",
        "absolute.jpg",
        "l" * 300 + ".jpg",
        "twice.jpg",
    }
    assert {key for key, _ in images.unreadable} == {
        *("../outside.jpg", "broken.jpg", "soft.jpg", "hard.jpg", "device.jpg", "pipe.jpg"),
    }
    assert all(images.read(row) == good for row in range(len(images)))
    assert all("link or special" in dict(images.unreadable)[f"{kind}.jpg"] for kind in ("soft", "hard", "device"))
    assert "leads out" in dict(images.unreadable)["../outside.jpg"]
    assert not (tmp_path.parent / "outside.jpg").exists()


def test_a_sparse_member_is_listed(tmp_path, folder):
    archive = tmp_path / "sparse.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(folder / "cat/a.jpg", "good.jpg")
        member = tarfile.TarInfo("holes.jpg")
        member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,4", "GNU.sparse.size": "4000"}
        member.size = 4
        tar.addfile(member, io.BytesIO(b"data"))
    images = open_images(str(archive))
    assert keys(images) == ["good.jpg"] and "sparse" in dict(images.unreadable)["holes.jpg"]


@pytest.mark.parametrize("damage", ["cut in the data", "cut in a header", "bad header", "absurd size", "absurd pax"])
def test_a_damaged_tar_gives_what_comes_before_the_damage_and_says_so(damage, folder, tmp_path):
    archive = tmp_path / "damaged.tar"
    large = write_image(tmp_path / "large.jpg", (300, 300), quality=95).read_bytes()
    assert len(large) > 80_000
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "c.png"):
            tar.add(folder / "cat" / name, name)
        offset = tar.offset
        member = tarfile.TarInfo("z" * 200 + ".png" if damage == "absurd pax" else "z.png")
        member.size = len(large)
        tar.addfile(member, io.BytesIO(large))
    content = bytearray(archive.read_bytes())
    if damage == "cut in the data":
        content = content[: offset + 70_000]  # its header is there, the image's too
    elif damage == "cut in a header":
        content = content[: offset + 100]
    elif damage == "bad header":
        content[offset : offset + 512] = os.urandom(512)
    else:
        header = tarfile.TarInfo.frombuf(bytes(content[offset : offset + 512]), "utf-8", "strict")
        header.size = 2**45
        content[offset : offset + 512] = header.tobuf(tarfile.GNU_FORMAT)
    archive.write_bytes(content)
    images = open_images(str(archive))
    assert keys(images) == ["a.jpg", "c.png"]
    reason = images.unreadable[0][1]
    assert "claims" in reason if damage == "absurd pax" else "header" in reason or "archive" in reason


def test_a_file_that_is_no_tar_is_a_user_error(tmp_path):
    (tmp_path / "text.tar").write_text("hello" * 1000)
    with pytest.raises(UserError, match="no readable image"):
        open_images(str(tmp_path / "text.tar"))


def test_many_threads_read_the_same_archives(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_MAX_OPEN", 2)  # the others are opened for each read
    for number in range(5):
        pack(tmp_path / f"{number}.tar", folder)
    images = open_images(f"{tmp_path}/?.tar")
    expected = [images.read(row) for row in range(len(images))]
    rows = np.random.default_rng(0).integers(0, len(images), 400).tolist()
    barrier = threading.Barrier(8)

    def read(some: list[int]) -> list[bytes]:
        barrier.wait()
        return [images.read(row) for row in some]

    chunks = [rows[i::8] for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for chunk, found in zip(chunks, pool.map(read, chunks), strict=True):
            assert found == [expected[row] for row in chunk]


def test_more_archives_than_files_may_be_open_are_read(folder, tmp_path):
    resource = pytest.importorskip("resource", reason="limits of a process are set on POSIX systems")
    shards = tmp_path / "shards"
    shards.mkdir()
    whole = pack(tmp_path / "whole.tar", folder)
    for number in range(120):
        (shards / f"{number:03d}.tar").write_bytes(whole.read_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        images = open_images(str(shards), cache=tmp_path / "cache")
        assert len(images) == 720 and not images.unreadable
        for row in range(0, 720, 6):
            images.image(row)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
