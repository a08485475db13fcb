"""An index is built once, comes from the cache after that, and notices changes."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessella.data import index as index_module
from tessella.data.index import stable_ids
from tessella.data.sources import open_images
from tessella.errors import UserError
from tests.data.pictures import assert_equal_sets, keys, pack, write_image


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
    Image.open(folder / "cat/a.jpg").save(folder / "cat/a.jpg", quality=30)  # in place: its folder looks unchanged
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


def test_a_flipped_bit_anywhere_in_the_cache_is_noticed_and_said_and_the_index_is_built_again(folder, tmp_path, probes):
    cache = tmp_path / "cache"
    reference = open_images(str(folder), cache=cache, labels=True)
    (built,) = cache.glob("index/*/built")
    names = sorted(path.name for path in built.iterdir())
    assert len(names) == 7
    rng = np.random.default_rng(0)
    for number in range(210):
        path = built / names[number % len(names)]
        content = bytearray(path.read_bytes())
        bit = int(rng.integers(8 * len(content)))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        probes.clear()
        with pytest.warns(UserWarning, match=r"an index in .* is damaged .* and is built again"):
            found = open_images(str(folder), cache=cache, labels=True)
        assert len(probes) == 6
        assert_equal_sets(found, reference)
        assert found.fingerprint == reference.fingerprint and found.classes == reference.classes


def test_missing_short_and_foreign_files_in_the_cache_are_noticed(folder, tmp_path, probes):
    cache = tmp_path / "cache"
    reference = open_images(str(folder), cache=cache)
    (built,) = cache.glob("index/*/built")
    other = open_images(str(folder / "cat"), cache=cache)
    (foreign,) = set(cache.glob("index/*/built")) - {built}

    def pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def swap(path: Path) -> None:
        shutil.rmtree(path.parent)
        shutil.copytree(foreign, path.parent)

    for damage in (Path.unlink, pipe, lambda path: path.write_bytes(path.read_bytes()[:-1]), swap):
        damage(built / "ids.npy")
        with pytest.warns(UserWarning, match="is damaged"):
            assert_equal_sets(open_images(str(folder), cache=cache), reference)
    probes.clear()
    assert keys(open_images(str(folder / "cat"), cache=cache)) == keys(other) and not probes


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_folder_that_could_not_be_read_is_looked_at_again(folder, tmp_path):
    (folder / "cat").chmod(0)
    assert len(open_images(str(folder), cache=tmp_path / "cache").unreadable) == 1
    (folder / "cat").chmod(0o700)
    assert not open_images(str(folder), cache=tmp_path / "cache").unreadable


def test_what_could_not_be_read_once_is_tried_again_at_every_start(folder, tmp_path, monkeypatch, probes):
    """By an error of the system, so that it also holds for root."""
    original, failing = os.scandir, [True]

    def scandir(path):
        if failing and str(path).endswith("cat/"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    first = open_images(str(folder), cache=tmp_path / "cache")
    assert first.unreadable == [("cat/", "the folder cannot be read: Permission denied")]
    probes.clear()
    assert keys(open_images(str(folder), cache=tmp_path / "cache")) == keys(first) and not probes  # still so
    failing.clear()
    again = open_images(str(folder), cache=tmp_path / "cache")
    assert not again.unreadable and len(again) == 6


def test_a_damaged_image_that_was_repaired_in_place_and_a_link_that_leads_somewhere_again_are_read(folder, tmp_path):
    whole = (folder / "cat/a.jpg").read_bytes()
    (folder / "cat/a.jpg").write_bytes(b"\xff\xd8 nothing")
    (folder / "dog/link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    before = open_images(str(folder), cache=tmp_path / "cache")
    assert [key for key, _ in before.unreadable] == ["cat/a.jpg", "dog/link.jpg"]
    (folder / "cat/a.jpg").write_bytes(whole)
    assert [key for key, _ in open_images(str(folder), cache=tmp_path / "cache").unreadable] == ["dog/link.jpg"]
    (tmp_path / "elsewhere.jpg").write_bytes(whole)
    assert not open_images(str(folder), cache=tmp_path / "cache").unreadable


def test_without_a_home_folder_the_cache_needs_a_name(monkeypatch):
    monkeypatch.delenv("TESSELLA_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="set TESSELLA_CACHE to a folder"):
        index_module.cache_folder()


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
