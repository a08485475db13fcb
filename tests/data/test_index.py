"""An index is built once, comes from the cache after that, and notices changes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tessella.data import index as index_module
from tessella.data.index import stable_ids
from tessella.data.sources import open_images
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
