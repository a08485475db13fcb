"""One data set, whichever way it is stored; odd folders; an index that is built once and notices changes."""

from __future__ import annotations

import builtins
import csv
import io
import itertools
import os
import re
import socket
import sys
import tarfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessella.data import decode as decode_module
from tessella.data import index as index_module
from tessella.data import tars
from tessella.data.decode import Unreadable
from tessella.data.index import Index, stable_ids
from tessella.data.sources import ArrayImages, ImageSet, open_images
from tessella.errors import UserError

_numbers = itertools.count()


def write_image(path: Path, size: tuple[int, int] = (12, 8), **options) -> Path:
    """A PNG or JPEG unlike all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(next(_numbers)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG" if path.suffix.lower().startswith(".jp") else None, **options)
    return path


def write_folder(root: Path) -> Path:
    """Two classes, six images in three formats, and a file that is none."""
    for name in ("cat/a.jpg", "cat/deep/er/b.JPEG", "cat/c.png", "dog/a.jpg", "dog/b.webp"):
        write_image(root / name)
    write_image(root / "dog/wide.png", (30, 5))
    (root / "README.md").write_text("not an image")
    return root


def pack(archive: Path, folder: Path, mode: str = "w") -> Path:
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, arcname=".")
    return archive


def keys(images: ImageSet) -> list[str]:
    return [images.key(row) for row in range(len(images))]


def assert_equal_sets(one: ImageSet, other: ImageSet) -> None:
    assert keys(one) == keys(other)
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.sizes, other.sizes)
    assert one.fingerprint == other.fingerprint
    for row in range(len(one)):
        np.testing.assert_array_equal(one.image(row), other.image(row))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures")


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each header that is read."""
    calls: list[int] = []
    original = index_module.probe_with

    def counting(read, size):
        calls.append(size)
        return original(read, size)

    monkeypatch.setattr(index_module, "probe_with", counting)
    return calls


# --- folders --------------------------------------------------------------------------------------------


def test_a_folder_gives_its_images_sorted_by_path_with_sizes_and_stable_ids(folder):
    images = open_images(str(folder))
    assert keys(images) == sorted(keys(images))
    assert set(keys(images)) == {
        *("cat/a.jpg", "cat/c.png", "cat/deep/er/b.JPEG", "dog/a.jpg", "dog/b.webp", "dog/wide.png")
    }
    assert len(images) == 6 and images.name == str(folder) and images.unreadable == []
    assert images.ids.dtype == np.int64 and images.sizes.dtype == np.int32
    assert len(set(images.ids.tolist())) == 6 and (images.ids >= 0).all()
    for row in range(6):
        pixels = images.image(row)
        assert (pixels.shape[1], pixels.shape[0]) == tuple(images.sizes[row])
        assert images.read(row) == (folder / images.key(row)).read_bytes()
    assert images.uniform_size is None
    assert open_images(f"{folder}::cat").uniform_size == (12, 8)


def test_labels_are_the_first_folders_and_only_shown_when_asked_for(folder):
    unlabelled, labelled = open_images(str(folder)), open_images(str(folder), labels=True)
    assert unlabelled.labels is None and unlabelled.classes is None
    assert labelled.classes == ["cat", "dog"]
    assert [labelled.classes[label] for label in labelled.labels] == [
        key.split("/")[0] for key in keys(labelled)
    ]
    assert labelled.labels.dtype == np.int64
    assert labelled.fingerprint == unlabelled.fingerprint


def test_an_image_without_a_class_is_named_when_labels_are_asked_for(folder):
    write_image(folder / "loose.jpg")
    assert len(open_images(str(folder))) == 7
    with pytest.raises(UserError, match=r"no class for 1 of its 7 images, for example loose\.jpg"):
        open_images(str(folder), labels=True)


def test_labels_of_the_wrong_level_are_refused_with_the_right_one_named(folder):
    with pytest.raises(UserError, match=re.escape(f"for example {folder.parent}::pictures")):
        open_images(str(folder.parent), labels=True)
    archive = pack(folder.parent / "above.tar", folder.parent)
    with pytest.raises(UserError, match=re.escape(f"for example {archive}::pictures")):
        open_images(str(archive), labels=True)


def test_damaged_files_are_listed_with_a_reason_and_the_rest_is_used(folder, monkeypatch):
    (folder / "cat/empty.jpg").write_bytes(b"")
    (folder / "cat/text.png").write_text("hello")
    (folder / "cat/.hidden.jpg").write_text("hidden files do not count")
    (folder / "cat/broken.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "cat/pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # the path of a socket must be short
        listener.bind("socket.jpg")
        images = open_images(str(folder))
    assert len(images) == 6
    reasons = dict(images.unreadable)
    assert set(reasons) == {
        *("cat/broken.jpg", "cat/empty.jpg", "cat/pipe.jpg", "cat/text.png", "socket.jpg"),
    }
    assert "empty" in reasons["cat/empty.jpg"] and "nowhere" in reasons["cat/broken.jpg"]
    assert reasons["cat/pipe.jpg"] == reasons["socket.jpg"] == "not a regular file"


def test_links_to_folders_are_followed_once_and_loops_end(folder, tmp_path):
    elsewhere = write_image(tmp_path / "elsewhere/bird/x.jpg").parent.parent
    for link, target in {
        "loop": ".",
        "cat/up": "..",
        "a-second-name-of-cat": "cat",
        "more": elsewhere,
        "more-again": elsewhere,
    }.items():
        (folder / link).symlink_to(target)
    images = open_images(str(folder))
    assert len(images) == 7
    assert {key.split("/")[0] for key in keys(images)} == {"cat", "dog", "more"}


def test_names_with_line_breaks_and_broken_utf8_work(tmp_path):
    names = [b"new\nline.jpg", b"latin-\xe9.jpg", "grüß.jpg".encode(), b'comma,"quote".jpg', b" space .jpg"]
    for name in names:
        write_image(tmp_path / "plain.jpg").rename(tmp_path / os.fsdecode(name))
    for _ in range(2):  # built, then from the cache
        images = open_images(str(tmp_path))
        assert sorted(os.fsencode(key) for key in keys(images)) == sorted(names)
        assert all(images.image(row).shape == (8, 12, 3) for row in range(5))


def test_a_folder_without_permission_is_listed(folder, monkeypatch):
    original = os.scandir

    def scandir(path: str):
        if path.endswith("dog/"):  # root, who may run the tests, would be let in
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    images = open_images(str(folder))
    assert len(images) == 3 and "Permission denied" in dict(images.unreadable)["dog/"]


def test_an_image_that_vanishes_is_unreadable_when_read(folder):
    images = open_images(str(folder))
    (folder / images.key(0)).unlink()
    with pytest.raises(Unreadable, match="No such file"):
        images.image(0)


def test_a_part_of_a_folder_is_as_good_as_the_folder(folder):
    assert_equal_sets(open_images(f"{folder}::cat"), open_images(str(folder / "cat")))
    with pytest.raises(UserError, match=r"no part 'cats'.*there are cat"):
        open_images(f"{folder}::cats")


def test_what_is_not_there_is_answered_with_what_is_near_and_what_is_accepted(folder, tmp_path):
    with pytest.raises(UserError, match=r"does not exist; near it is .*pictures.*\.csv or \.parquet"):
        open_images(str(tmp_path / "picture"))
    with pytest.raises(UserError, match="near it is cifar10"):
        open_images("cifar-10")
    with pytest.raises(UserError, match="neither a folder nor"):
        open_images(str(folder / "README.md"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_images(str(tmp_path / "nothing"))
    (tmp_path / "nothing/bad\x1b[31m.jpg").write_text("no image")
    with pytest.raises(
        UserError, match=r"has no readable image: all 1 files failed, the first is bad\?\[31m\.jpg"
    ):
        open_images(str(tmp_path / "nothing"))


# --- archives -------------------------------------------------------------------------------------------


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
        "../outside.jpg",
        "absolute.jpg",
        "l" * 300 + ".jpg",
        "twice.jpg",
    }
    assert {key for key, _ in images.unreadable} == {
        *("broken.jpg", "soft.jpg", "hard.jpg", "device.jpg", "pipe.jpg"),
    }
    assert all(images.read(row) == good for row in range(len(images)))
    assert all(
        "link or special" in dict(images.unreadable)[f"{kind}.jpg"] for kind in ("soft", "hard", "device")
    )
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


@pytest.mark.parametrize(
    "damage", ["cut in the data", "cut in a header", "bad header", "absurd size", "absurd pax"]
)
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


# --- lists ----------------------------------------------------------------------------------------------


def test_a_list_gives_the_files_it_names_relative_to_itself(folder, tmp_path):
    outside = write_image(tmp_path / "outside.png")
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["split", "file", "class"],
                ["x", "cat/a.jpg", "tabby"],
                ["x", "dog/wide.png", "beagle"],
                ["x", str(outside), "tabby"],
            ]
        )
    images = open_images(str(folder / "list.csv"), labels=True)
    assert set(keys(images)) == {"cat/a.jpg", "dog/wide.png", str(outside)}
    assert images.classes == ["beagle", "tabby"]
    named = {key: images.classes[label] for key, label in zip(keys(images), images.labels, strict=True)}
    assert named == {"cat/a.jpg": "tabby", "dog/wide.png": "beagle", str(outside): "tabby"}
    assert open_images(str(folder / "list.csv")).labels is None


def test_a_parquet_list_equals_the_csv_one(folder):
    import pyarrow
    import pyarrow.parquet

    paths, labels = ["dog/a.jpg", "cat/a.jpg", "cat/c.png"], [3, 0, None]
    pyarrow.parquet.write_table(pyarrow.table({"path": paths, "label": labels}), folder / "list.parquet")
    lines = [
        "path,label",
        *(f"{path},{'' if label is None else label}" for path, label in zip(paths, labels, strict=True)),
    ]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    one, other = open_images(str(folder / "list.csv")), open_images(str(folder / "list.parquet"))
    assert_equal_sets(one, other)
    np.testing.assert_array_equal(one.index.labels, [0, -1, 3])  # integers keep their value
    np.testing.assert_array_equal(other.index.labels, [0, -1, 3])
    assert one.index.classes == other.index.classes == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="no class for 1 of its 3"):
        open_images(str(folder / "list.parquet"), labels=True)


def test_a_list_without_header_or_known_column_uses_the_first_column(folder):
    (folder / "bare.csv").write_text("cat/a.jpg\ndog/a.jpg\n")
    (folder / "odd.csv").write_text("\ufefffoto\ncat/a.jpg\ndog/a.jpg\n", encoding="utf-8")
    assert keys(open_images(str(folder / "bare.csv"))) == keys(open_images(str(folder / "odd.csv")))


def test_what_a_list_names_in_vain_is_unreadable_and_contradictions_are_refused(folder):
    os.mkfifo(folder / "pipe.jpg")
    (folder / "list.csv").write_text("path,label\ncat/a.jpg,1\ngone.jpg,1\npipe.jpg,1\ncat,1\ncat/a.jpg,1\n")
    images = open_images(str(folder / "list.csv"))
    assert keys(images) == ["cat/a.jpg"]
    assert [key for key, _ in images.unreadable] == ["cat", "gone.jpg", "pipe.jpg"]
    (folder / "two.csv").write_text("path,label\ncat/a.jpg,1\ncat/a.jpg,2\n")
    with pytest.raises(UserError, match=r"cat/a\.jpg with two labels"):
        open_images(str(folder / "two.csv"))
    (folder / "broken.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_images(str(folder / "broken.parquet"))


# --- the index ------------------------------------------------------------------------------------------


def test_the_second_time_no_header_is_read_and_the_columns_are_maps_of_files(folder, tmp_path, probes):
    archive = pack(tmp_path / "p.tar", folder)
    (tmp_path / "list.csv").write_text("path\npictures/cat/a.jpg\n")
    for source, count in ((folder, 6), (archive, 6), (tmp_path / "list.csv", 1)):
        probes.clear()
        first = open_images(str(source))
        assert len(probes) == count
        second = open_images(str(source))
        assert len(probes) == count
        assert_equal_sets(first, second)
        for column in (second.ids, second.sizes, second.index.labels, second.index._columns["key_bytes"]):
            assert isinstance(column, np.memmap) and column.mode == "r"


def test_the_fingerprint_tells_change_from_touch(folder):
    def fingerprint() -> str:
        return open_images(str(folder)).fingerprint

    seen = [fingerprint()]
    os.utime(folder / "cat/a.jpg")
    os.utime(folder / "cat")
    assert fingerprint() == seen[0]
    added = write_image(folder / "cat/deep/new.jpg")
    seen.append(fingerprint())
    added.rename(folder / "cat/deep/own.jpg")
    seen.append(fingerprint())
    Image.open(folder / "cat/a.jpg").save(
        folder / "cat/a.jpg", quality=30
    )  # in place: its folder looks unchanged
    seen.append(fingerprint())
    (folder / "cat/deep/own.jpg").unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_ids_stay_when_images_come_and_go(folder):
    def ids() -> dict[str, int]:
        images = open_images(str(folder))
        return dict(zip(keys(images), images.ids.tolist(), strict=True))

    before = ids()
    write_image(folder / "aaa/first.jpg")
    (folder / "dog/a.jpg").unlink()
    after = ids()
    assert {key: after[key] for key in before if key in after} == {
        key: value for key, value in before.items() if key != "dog/a.jpg"
    }
    assert "aaa/first.jpg" in after


def test_two_keys_with_one_hash_get_two_ids(monkeypatch):
    original = index_module._hash
    keys_ = [f"{number:04d}".encode() for number in range(300)]
    before = stable_ids(keys_)
    monkeypatch.setattr(
        index_module,
        "_hash",
        lambda key, salt: original(key, salt) % 1000 if not salt else original(key, salt),
    )
    ids = stable_ids(keys_)
    assert len(set(ids.tolist())) == 300 and (ids >= 0).all()
    first_of_its_hash = {original(key, 0) % 1000: key for key in reversed(keys_)}
    kept = [row for row, key in enumerate(keys_) if first_of_its_hash[original(key, 0) % 1000] == key]
    np.testing.assert_array_equal(ids[kept], before[kept] % 1000)  # only the later one moves
    np.testing.assert_array_equal(stable_ids(keys_), ids)


def test_a_damaged_cache_is_built_anew(folder, tmp_path, probes):
    cache = tmp_path / "cache"
    reference = open_images(str(folder), cache=cache)
    (built,) = cache.glob("index/*/built-*")
    expected = keys(reference)
    for name in ("ids.npy", "meta.json"):
        (built,) = cache.glob("index/*/built-*")
        (built / name).write_bytes(b"garbage")
        probes.clear()
        assert keys(open_images(str(folder), cache=cache)) == expected
        assert len(probes) == 6
    assert len(list(cache.glob("index/*/built-*"))) == 1  # the damaged ones are gone


def test_a_cache_that_cannot_be_written_costs_a_warning_only(folder, tmp_path):
    (tmp_path / "file").write_text("in the way of the cache's folder")
    with pytest.warns(UserWarning, match="TESSELLA_CACHE"):
        images = open_images(str(folder), cache=tmp_path / "file")
    assert len(images) == 6 and images.image(0).shape == (8, 12, 3)


def test_two_builders_at_once_both_get_a_whole_index(folder, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_images(str(folder), cache=tmp_path / "cache"), range(4)))
    assert len({images.fingerprint for images in found}) == 1
    assert all(len(images) == 6 for images in found)


def test_a_thousand_reads_do_not_depend_on_the_working_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    images = open_images("pictures")
    monkeypatch.chdir("/")
    assert images.image(0).shape == (8, 12, 3)
    assert_equal_sets(images, open_images(str(folder)))


# --- arrays and data sets by name -----------------------------------------------------------------------


def test_arrays_are_images_too():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    images = ArrayImages("mine", pixels, [0, 1, 1, 0, 2])
    assert len(images) == 5 and images.uniform_size == (7, 6) and images.classes == ["0", "1", "2"]
    np.testing.assert_array_equal(images.image(3), pixels[3])
    np.testing.assert_array_equal(images.labels, [0, 1, 1, 0, 2])
    assert keys(images) == sorted(keys(images)) and isinstance(images.index, Index)
    assert ArrayImages("mine", pixels).labels is None
    assert (
        images.fingerprint
        == ArrayImages("other", pixels).fingerprint
        != ArrayImages("x", 255 - pixels).fingerprint
    )
    gray = ArrayImages("gray", pixels[..., 0])
    np.testing.assert_array_equal(gray.image(1), np.repeat(pixels[1, :, :, :1], 3, axis=-1))


def test_arrays_of_another_shape_or_type_are_refused():
    for wrong in (np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(UserError, match="give uint8"):
            ArrayImages("wrong", wrong)
    with pytest.raises(UserError, match="one integer per image, 2 in all"):
        ArrayImages("wrong", np.zeros((2, 8, 8), np.uint8), [0, 1, 2])


@pytest.mark.parametrize(("name", "train", "test"), [("digits", 1437, 360), ("shapes", 2000, 500)])
def test_embedded_sets_split_without_overlap_and_are_the_same_every_time(name, train, test):
    parts = [open_images(f"{name}::{split}", labels=True) for split in ("train", "test")]
    assert [len(part) for part in parts] == [train, test]
    assert set(parts[0].ids.tolist()).isdisjoint(parts[1].ids.tolist())
    whole = open_images(name)
    assert whole.labels is None
    assert sorted(keys(parts[0]) + keys(parts[1])) == keys(whole)
    for part in parts:
        assert len(part.classes) == 10 and set(part.labels.tolist()) == set(range(10))
        for row in (0, 7, len(part) - 1):
            same = int(np.flatnonzero(whole.ids == part.ids[row])[0])
            np.testing.assert_array_equal(whole.image(same), part.image(row))
    assert open_images(f"{name}::test").fingerprint == parts[1].fingerprint
    with pytest.raises(UserError, match=f"{name}::train, {name}::test"):
        open_images(f"{name}::valid")


def test_digits_are_the_enlarged_scans():
    from sklearn.datasets import load_digits

    images = open_images("digits::test", labels=True)
    np.testing.assert_array_equal(images.labels, load_digits().target[::5])
    level = np.rint(load_digits().images[5] * 255 / 16).astype(np.uint8)
    expected = np.asarray(Image.fromarray(level).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))
    np.testing.assert_array_equal(images.image(1), expected)


def test_a_torchvision_set_is_opened_from_disk_and_downloaded_only_if_absent(monkeypatch):
    import torchvision

    asked: list[bool] = []

    class Fake:
        classes = ("zero", "one")
        absent, offline = False, True

        def __init__(self, root: str, split: str, download: bool) -> None:
            asked.append(download)
            if self.absent and not download:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            if self.offline and download:
                raise OSError("Name or service not known")
            self.data = np.arange(4 * 3 * 5 * 6, dtype=np.uint8).reshape(4, 3, 5, 6)
            self.labels = np.array([0, 1, 1, 0])

    monkeypatch.setattr(torchvision.datasets, "SVHN", Fake)
    images = open_images("svhn::test", labels=True)
    assert asked == [False] and images.classes == ["zero", "one"] and images.labels.tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(images.image(2), Fake("", "test", False).data[2].transpose(1, 2, 0))
    Fake.absent = True
    with pytest.raises(UserError, match=r"cannot be downloaded.*TESSELLA_DATA"):
        open_images("svhn")
    Fake.offline = False
    assert len(open_images("svhn")) == 4
    with pytest.raises(UserError, match="svhn::train, svhn::test, svhn::extra"):
        open_images("svhn::unlabeled")


def test_hugging_face_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=re.escape("pip install 'tessella[huggingface]'")):
        open_images("hf:cifar10")


def test_hugging_face_images_are_read_from_the_column_of_that_type(monkeypatch, folder):
    hub = pytest.importorskip("datasets")
    files = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    table = hub.Dataset.from_dict({"text": ["a", "b"], "photo": files, "label": [1, 0]}).cast_column(
        "photo", hub.Image()
    )
    table = table.cast_column("label", hub.ClassLabel(names=["cat", "dog"]))
    monkeypatch.setattr(hub, "load_dataset", lambda name, split: table)
    images = open_images("hf:someone/something::validation", labels=True)
    assert keys(images) == ["validation/000000000", "validation/000000001"]
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [1, 0]
    for row in range(2):
        np.testing.assert_array_equal(images.image(row), decode_module.decode(Path(files[row]).read_bytes()))


# --- real images ----------------------------------------------------------------------------------------


def test_real_archives_open_whole(shared_data):
    small = open_images(f"{shared_data}/cifar10-small.tar.gz::cifar10-small/train", labels=True)
    assert len(small) == 5000 and small.uniform_size == (32, 32) and small.unreadable == []
    assert np.bincount(small.labels).tolist() == [500] * 10
    assert small.classes[0] == "airplane" and small.key(0) == "airplane/0000.jpg"
    photos = open_images(f"{shared_data}/imagenet-sample.tar")
    assert len(photos) == 400 and photos.uniform_size is None and photos.unreadable == []
    for row in range(0, 400, 40):
        assert photos.image(row).shape == (photos.sizes[row, 1], photos.sizes[row, 0], 3)


def test_importing_the_module_loads_no_heavy_library(monkeypatch):
    original = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name.partition(".")[0] not in ("torchvision", "sklearn", "pyarrow", "datasets"), name
        return original(name, *args, **kwargs)

    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("tessella.data.")}
    monkeypatch.setattr(builtins, "__import__", guarded)
    try:
        import tessella.data.sources  # noqa: F401
    finally:
        sys.modules.update(saved)
