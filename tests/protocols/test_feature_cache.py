import os

import numpy as np
import pytest
import torch

from tessella.data.sources import ArrayImages
from tessella.data.transform import EvalTransform
from tessella.protocols import feature_cache
from tessella.protocols.knn import KnnConfig, knn
from tests.protocols.planted import Tiny, eval_data, planted_images


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def entries(cache):
    return sorted(path for path in (cache / "features").iterdir() if not path.name.startswith(".saving-"))


def test_a_second_evaluation_takes_the_same_bits_from_the_disk(cache):
    fresh = eval_data().features(Tiny(), "train")
    eval_data(cache=cache).features(Tiny(), "train")
    backbone = Tiny()
    again = eval_data(cache=cache).features(backbone, "train")
    assert torch.equal(again.x, fresh.x) and again.x.dtype == torch.float32
    assert torch.equal(again.labels, fresh.labels) and np.array_equal(again.rows, fresh.rows)
    assert backbone.seen == 8  # a few are computed anew, to be sure


def test_figures_do_not_depend_on_the_cache(cache):
    train, test = (planted_images(90, classes=7, noise=120, seed=s) for s in (1, 2))
    plain = knn(Tiny(), eval_data(train, test), KnnConfig())
    first, second = (knn(Tiny(), eval_data(train, test, cache=cache), KnnConfig()) for _ in range(2))
    assert plain == first == second and 0 < plain["top1"] < 1


def test_other_weights_images_or_transforms_are_other_entries(cache):
    eval_data(cache=cache).features(Tiny(), "train")
    eval_data(cache=cache).features(Tiny(1), "train")
    eval_data(cache=cache).features(Tiny(), "test")
    eval_data(cache=cache).features(Tiny(), "test", EvalTransform.of(8, std=(0.3, 0.3, 0.3)))
    assert len(entries(cache)) == 4


def test_unreadable_images_are_remembered(cache):
    from tessella.data.decode import Unreadable

    def with_a_hole():
        images = planted_images(12)
        read = images.image

        def broken(row):
            if row == 5:
                raise Unreadable("a hole in it")
            return read(row)

        images.image = broken
        return images

    for _ in range(2):
        data = eval_data(with_a_hole(), cache=cache)
        found = data.features(Tiny(), "train")
        assert found.rows.tolist() == [row for row in range(12) if row != 5]
        assert data.skipped("train") == {planted_images(12).key(5): "a hole in it"}


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "nonsense"])
def test_a_damaged_entry_is_made_anew(cache, damage):
    right = eval_data(cache=cache).features(Tiny(), "train").x.clone()
    (entry,) = entries(cache)
    path = entry / ("about.json" if damage == "nonsense" else "x.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    damaged = {"flip": bytes(data), "cut": bytes(data[:-64]), "missing": None, "nonsense": b"[]"}[damage]
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    backbone = Tiny()
    assert torch.equal(eval_data(cache=cache).features(backbone, "train").x, right)
    assert backbone.seen == 90
    assert torch.equal(eval_data(cache=cache).features(Tiny(), "train").x, right)


def test_a_network_that_does_other_things_with_the_same_tensors_is_noticed(cache):
    eval_data(cache=cache).features(Tiny(), "train")
    backbone = Tiny()
    backbone.__dict__["forward"] = lambda x: Tiny.forward(backbone, x) * 2
    expected = eval_data().features(Tiny(), "train").x * 2
    torch.testing.assert_close(eval_data(cache=cache).features(backbone, "train").x, expected)


def test_images_overwritten_behind_the_indexs_back_are_noticed(cache):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    images = ArrayImages("mine", pixels, np.arange(20) % 2)
    eval_data(images, cache=cache).features(Tiny(), "train")
    pixels[:] = 255 - pixels
    expected = eval_data(images).features(Tiny(), "train").x
    assert torch.equal(eval_data(images, cache=cache).features(Tiny(), "train").x, expected)


def test_the_folder_is_bounded_and_the_longest_unused_goes(cache, monkeypatch):
    monkeypatch.setattr(feature_cache, "_LIMIT", 2 * (90 * 32 * 4 + 90 * 8) + 4096)
    eval_data(cache=cache).features(Tiny(0), "train")
    (first,) = entries(cache)
    eval_data(cache=cache).features(Tiny(1), "train")
    for age, entry in enumerate(entries(cache)):
        os.utime(entry, (1000 + age, 1000 + age))
    os.utime(first, (2000, 2000))
    eval_data(cache=cache).features(Tiny(2), "train")
    assert len(entries(cache)) == 2 and first in entries(cache)


def test_an_entry_larger_than_the_limit_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(feature_cache, "_LIMIT", 1000)
    assert len(eval_data(cache=cache).features(Tiny(), "train").x) == 90
    assert not entries(cache)


def test_a_folder_that_cannot_be_written_costs_the_cache_not_the_evaluation(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="set TESSELLA_CACHE"):
        found = eval_data(cache=tmp_path / "file").features(Tiny(), "train")
    assert len(found.x) == 90


def test_what_a_killed_process_left_is_swept(cache):
    eval_data(cache=cache).features(Tiny(), "train")
    old, young = cache / "features" / ".saving-old", cache / "features" / ".saving-young"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (1000, 1000))
    eval_data(cache=cache).features(Tiny(), "test")
    assert not old.exists() and young.exists()
