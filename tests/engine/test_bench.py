"""`bench` measures the real loader and the real step; here, that it does so on every kind of data."""

import dataclasses
import time

import numpy as np
import pytest
from PIL import Image

from tessella.data.sources import ArrayImages, open_images
from tessella.engine import bench as module
from tessella.engine.bench import bench
from tessella.errors import UserError
from tessella.modules.backbone import BackboneConfig
from tessella.recipes import recipe


def tiny(name):
    config = recipe(name)
    return dataclasses.replace(
        config, backbone=BackboneConfig("resnet10", 8, "small"), batch_size=8, device="cpu", workers=2
    )


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)
    for number in range(12):
        image = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 400 + number))
        image.save(tmp_path / "photos" / f"{number}.jpg", quality=97)
    return tmp_path / "photos"


@pytest.mark.parametrize("method", ["swav_cpu", "jigclu_cpu", "mejigclu_cpu", "smog_cpu", "coke_cpu"])
def test_every_method_has_a_rate_of_views_and_of_steps(photos, method):
    rates = bench(tiny(method), open_images(str(photos)), seconds=0.5)
    assert rates.images == 12 and not rates.resident
    assert min(rates.read, rates.decode, rates.views, rates.loader, rates.step) > 0
    assert rates.decode > rates.views  # views are decoded and more
    assert rates.step_batch in (4, 8) and rates.limit in ("images", "training")


def test_a_pack_is_tried_where_it_makes_files_smaller(photos):
    rates = bench(tiny("swav_cpu"), open_images(str(photos)), seconds=0.5)
    assert 0 < rates.packed_share < 0.8 and rates.packed_views > 0


def test_small_images_of_one_size_are_measured_as_they_are_kept_on_the_device():
    images = ArrayImages("noise", np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    rates = bench(tiny("jigclu_cpu"), images, seconds=0.3)
    assert rates.resident and rates.decode is None and rates.read is None and rates.packed_views is None


def test_damaged_files_do_not_stop_it_unless_all_are(photos):
    whole = (photos / "0.jpg").read_bytes()
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    assert bench(tiny("swav_cpu"), open_images(str(photos)), seconds=0.3).images == 13
    images = open_images(str(photos))
    for path in photos.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="none of 13 images"):
        bench(tiny("swav_cpu"), images, seconds=0.3)


def test_the_first_portion_warms_up_and_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module.time, "process_time", lambda: 2 * now[0])

    def work():
        now[0] += 5.0  # threads start
        yield 10
        while True:
            now[0] += 1.0
            yield 10

    assert module._rate(work(), 12.0) == (10.0, 5.0)
    assert module._rate(work(), 1.0) == (2.0, 1.0)  # no time for a second portion: it counts after all
    assert time.perf_counter() == now[0]
