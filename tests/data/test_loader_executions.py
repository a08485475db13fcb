"""The loader's executions of one plan: views finished by threads or by batch, large images whole or at a fraction."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.data import loader as loader_module
from tessella.data.decode import decode
from tessella.data.views import ColorAugmentation, CropGroup, ViewSpec
from tessella.errors import UserError
from tests.data.test_loader import RAW, SPEC, Pictures, load, mixed, uniform


@pytest.mark.parametrize("images", [mixed, uniform])
def test_views_coloured_by_threads_equal_those_coloured_in_batches_as_for_a_gpu(images, monkeypatch):
    plain = ColorAugmentation(jitter=0.8, gray=0.2, blur=0.5)
    spec = ViewSpec((CropGroup(2, 24, (0.2, 1.0), colors=plain), CropGroup(3, 8, (0.05, 0.2))), **RAW)
    _, by_threads = load(images(bad=[7, 8]), spec, max_unreadable=0.1)
    monkeypatch.setattr(loader_module, "_threads_finish", lambda device: False)
    _, in_batches = load(images(bad=[7, 8]), spec, max_unreadable=0.1)
    for (batch,), (other,) in zip(by_threads, in_batches, strict=True):
        assert torch.equal(batch.instances, other.instances)
        for views, expected in zip(batch.views, other.views, strict=True):
            difference = (views - expected).abs() * 255  # a crop may differ by a level, which jitter and hue enlarge
            assert difference.mean() < 0.3
            assert difference.quantile(0.999) < 4


def test_kernels_that_cannot_be_loaded_are_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tessella.ops.kernels", None)  # importing it fails
    monkeypatch.delattr("tessella.ops.kernels", raising=False)
    with pytest.raises(UserError, match=r"cannot be loaded: .*pip install numba.*NUMBA_CACHE_DIR"):
        load(uniform())


def test_on_a_cpu_threads_make_the_batches_of_a_resident_set_too():
    images = uniform()
    loader, _ = load(images)
    assert loader.resident
    assert len(images.read_by) > 0
    np.testing.assert_array_equal(loader._pixels[3].permute(1, 2, 0).numpy(), images.pixels[3])


@pytest.mark.parametrize("bad", [(), (0, 1)])
def test_rows_of_a_resident_portion_are_the_batchs_own(bad, monkeypatch):
    _, small = load(uniform(bad=bad), max_unreadable=0.1)
    monkeypatch.setattr(loader_module, "_RESIDENT_IMAGES_PER_TASK", 3)  # does not divide the batch
    _, others = load(uniform(bad=bad), max_unreadable=0.1)
    for (batch,), (other,) in zip(small, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.views, other.views, strict=True))


class Photos(Pictures):
    """JPEG files in memory, which may be decoded at a fraction of their size."""

    def __init__(self, sizes, **options):
        super().__init__(sizes)
        self.files = [_jpeg(pixels, **options) for pixels in self.pixels]
        self.decoded = []

    def image(self, row, shrink=1):
        pixels = decode(self.files[row], shrink)
        self.decoded.append(pixels.shape[:2])
        return pixels


def _jpeg(pixels, orientation=1):
    image, exif, file = Image.fromarray(pixels), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


LARGE = ViewSpec((CropGroup(2, 64, (0.14, 1.0), colors=ColorAugmentation(0, 0, gray=0, blur=0)),), **RAW)


def test_a_large_jpeg_is_decoded_at_the_fraction_that_its_crops_allow_and_its_views_stay(monkeypatch):
    sizes = [(1601, 1203)] * 4
    loader, fast = load(Photos(sizes), LARGE, batch_size=4)
    assert set(loader.images.decoded) <= {(602, 801), (301, 401)}
    monkeypatch.setattr(loader_module, "_SHRINK", ())
    loader, whole = load(Photos(sizes), LARGE, batch_size=4)
    assert set(loader.images.decoded) == {(1203, 1601)}
    difference = (fast[0][0].views[0] - whole[0][0].views[0]).abs() * 255
    assert difference.mean() < 1
    assert difference.max() < 25


def test_every_crop_keeps_twice_the_pixels_of_its_view():
    loader, _ = load(Photos([(1600, 1200)] * 4), LARGE, batch_size=4)

    def shrink(*sides):
        return loader._shrink(0, np.array([[0, 0, *pair] for pair in sides]))

    assert [shrink((n, 900), (900, 1000)) for n in (255, 256, 511, 512)] == [1, 2, 2, 4]
    assert shrink((255, 1024), (1024, 1024)) == 1
    assert shrink((1024, 1024), (1024, 1024)) == 8


def test_images_of_less_than_a_megapixel_are_decoded_whole():
    loader, _ = load(Photos([(1000, 1000)] * 4), SPEC, batch_size=4)
    assert set(loader.images.decoded) == {(1000, 1000)}


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_decoded_at_a_fraction_shows_the_same_upright(shrink, orientation):
    (pixels,) = Pictures([(320, 240)]).pixels
    file = _jpeg(pixels, orientation)
    whole, part = decode(file), decode(file, shrink)
    assert part.shape[:2] == (whole.shape[0] // shrink, whole.shape[1] // shrink)
    expected = Image.fromarray(whole).resize(part.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(part - np.asarray(expected, dtype=float)).mean() < 4  # turned the wrong way: 40


def test_what_is_not_a_jpeg_or_would_be_shifted_comes_whole():
    (pixels,) = Pictures([(101, 75)]).pixels
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert decode(file.getvalue(), 2).shape == (75, 101, 3)
    assert decode(_jpeg(pixels, orientation=3), 2).shape == (75, 101, 3)
    assert decode(_jpeg(pixels), 2).shape == (38, 51, 3)
