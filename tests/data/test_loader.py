"""Batches: equal for every execution, thread count, rank count and start; bad images replaced and named."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from tessella.data import loader as loader_module
from tessella.data import threads
from tessella.data import transform as transform_module
from tessella.data.decode import Unreadable
from tessella.data.evaluation import evaluation_batches
from tessella.data.loader import Loader
from tessella.data.sampler import EpochSampler
from tessella.data.sources import open_images
from tessella.data.transform import EvalTransform
from tessella.data.views import ColorAugmentation, CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.ops.layout import image_layout

PLAIN = ColorAugmentation(flip=0, jitter=0, gray=0, blur=0)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SPEC = ViewSpec((CropGroup(2, 16, (0.2, 1.0)), CropGroup(3, 8, (0.05, 0.2), colors=ColorAugmentation(solarize=0.2))))
PLAIN_GROUPS = CropGroup(2, 24, (0.2, 1.0), colors=PLAIN), CropGroup(1, 8, (0.05, 0.2), colors=PLAIN)
PLAIN_SPEC = ViewSpec(PLAIN_GROUPS, **RAW)


class Pictures:
    """What the loader asks of an image set, in memory."""

    unreadable = ()

    def __init__(self, sizes, bad=(), seed=0):
        rng = np.random.default_rng(seed)
        self.sizes = np.asarray(sizes, dtype=np.int32)
        self.ids = np.arange(len(sizes), dtype=np.int64) * 7919 + 3
        self.bad = set(bad)
        self.pixels = [np.asarray(_smooth(rng, w, h)) for w, h in self.sizes]
        self.read_by = set()

    @property
    def uniform_size(self):
        first = tuple(self.sizes[0].tolist())
        return first if (self.sizes == first).all() else None

    def __len__(self):
        return len(self.sizes)

    def key(self, row):
        return f"picture-{row}"

    def image(self, row):
        self.read_by.add(threading.current_thread())
        if row in self.bad:
            raise Unreadable("cut short")
        return self.pixels[row]


def _smooth(rng, width, height):
    noise = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((int(width), int(height)), Image.Resampling.BICUBIC)


def mixed(n=40, **options):
    return Pictures(np.random.default_rng(1).integers(20, 120, (n, 2)), **options)


def uniform(n=40, **options):
    return Pictures([(32, 28)] * n, **options)


def load(images, spec=SPEC, *, epoch=1, first_step=0, batch_size=8, workers=2, **options):
    loader = Loader(
        images,
        spec,
        EpochSampler(len(images), batch_size, seed=3),
        seed=3,
        device="cpu",
        workers=workers,
        **options,
    )
    return loader, list(loader.epoch(epoch, first_step))


def assert_equal_steps(some, others, **tolerance):
    assert len(some) == len(others)
    for ours, theirs in zip(some, others, strict=True):
        for batch, other in zip(ours, theirs, strict=True):
            assert torch.equal(batch.instances, other.instances)
            for views, expected in zip(batch.views, other.views, strict=True):
                torch.testing.assert_close(views, expected, **(tolerance or {"atol": 0, "rtol": 0}))


def assert_levels_agree(levels, expected):
    """Within one level, and one value in 1000 within two: torch rounds its weights to 16 bits."""
    difference = np.abs(np.rint(levels) - expected)
    assert difference.max() <= 2
    assert np.quantile(difference, 0.999) <= 1


def test_a_batch_holds_each_group_view_after_view_in_a_networks_layout():
    _, steps = load(mixed())
    (batch,) = steps[0]
    assert len(steps) == 5
    assert [tuple(views.shape) for views in batch.views] == [(2, 8, 3, 16, 16), (3, 8, 3, 8, 8)]
    assert all(views.dtype == torch.float32 for views in batch.views)
    for views in batch.views:
        flat = views.flatten(0, 1)
        assert flat.data_ptr() == views.data_ptr()
        assert flat.is_contiguous(memory_format=image_layout(flat.device))
    assert torch.equal(batch.instances, torch.from_numpy(EpochSampler(len(mixed()), 8, seed=3).batch(1, 0)))


def test_a_plain_view_is_pillows_crop_and_resize_of_the_planned_box_within_one_level():
    images = mixed()
    loader, steps = load(images, PLAIN_SPEC)
    for (batch,) in steps:
        rows = batch.instances.numpy()
        boxes = loader._plan(1, rows).box
        for i, row in enumerate(rows):
            views = [*batch.views[0][:, i], *batch.views[1][:, i]]
            for (left, top, width, height), view in zip(boxes[i].tolist(), views, strict=True):
                crop = Image.fromarray(images.pixels[row]).crop((left, top, left + width, top + height))
                expected = np.asarray(crop.resize(view.shape[1:], Image.Resampling.BILINEAR), dtype=np.float32)
                assert_levels_agree(view.permute(1, 2, 0).numpy() * 255, expected)


def test_resident_and_decoded_batches_agree_within_one_level_before_colors(monkeypatch):
    resident, on_device = load(uniform(bad=[5]), PLAIN_SPEC)
    monkeypatch.setattr(loader_module, "_fits_device", lambda images, device: False)
    decoding, from_threads = load(uniform(bad=[5]), PLAIN_SPEC)
    assert resident.resident and not decoding.resident
    for (batch,), (other,) in zip(on_device, from_threads, strict=True):
        assert torch.equal(batch.instances, other.instances)
        for views, others in zip(batch.views, other.views, strict=True):
            assert_levels_agree(views.numpy() * 255, others.numpy() * 255)


def test_only_small_images_of_one_size_become_resident():
    cpu = torch.device("cpu")
    assert loader_module._fits_device(uniform(3), cpu)
    assert loader_module._fits_device(Pictures([(96, 96)] * 2), cpu)
    assert not loader_module._fits_device(Pictures([(97, 32)] * 2), cpu)
    assert not loader_module._fits_device(Pictures([(32, 32), (32, 33)]), cpu)


@pytest.mark.parametrize("images", [mixed, uniform])
def test_the_number_of_threads_does_not_change_a_bit(images):
    assert_equal_steps(load(images(), workers=1)[1], load(images(), workers=4)[1])


@pytest.mark.parametrize("images", [mixed, uniform])
def test_starting_in_the_middle_gives_the_rest_of_the_epoch_bit_for_bit(images):
    assert_equal_steps(load(images(), first_step=3)[1], load(images())[1][3:])


@pytest.mark.parametrize("images", [mixed, uniform])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_together_are_one(images, accumulate):
    _, alone = load(images(), accumulate=accumulate)
    _, first = load(images(), accumulate=accumulate, rank=0, world_size=2)
    _, second = load(images(), accumulate=accumulate, rank=1, world_size=2)
    together = [
        [
            type(a)(
                tuple(torch.cat(pair, dim=1) for pair in zip(a.views, b.views, strict=True)),
                torch.cat((a.instances, b.instances)),
            )
            for a, b in zip(step, other, strict=True)
        ]
        for step, other in zip(first, second, strict=True)
    ]
    # Matrix products of other batch sizes may add in another order.
    assert_equal_steps(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("images", [mixed, uniform])
def test_a_batch_that_shares_a_draw_shares_it_over_ranks_and_micro_batches(images, monkeypatch):
    asked = []
    draw = loader_module.draw
    monkeypatch.setattr(loader_module, "draw", lambda *given: asked.append(given[5]) or draw(*given))
    load(images(), rank=1, world_size=2, accumulate=2, first_step=1, workers=1)
    assert asked == [1, 1, 2, 2, 3, 3, 4, 4]


def test_epochs_show_different_views_of_an_image():
    images = uniform(8)
    (one,), (two,) = load(images, PLAIN_SPEC, epoch=0)[1][0], load(images, PLAIN_SPEC, epoch=1)[1][0]
    positions = [int((two.instances == row).nonzero()) for row in one.instances]
    same = [torch.equal(one.views[0][:, i], two.views[0][:, j]) for i, j in enumerate(positions)]
    assert sum(same) <= 1


@pytest.mark.parametrize("images", [mixed, uniform])
def test_an_unreadable_image_is_replaced_by_the_next_readable_row_with_that_rows_own_views(images):
    loader, steps = load(images(bad=[7, 8, 39]), max_unreadable=0.1)
    assert loader.skipped == {"picture-7": "cut short", "picture-8": "cut short", "picture-39": "cut short"}
    _, intact = load(images())
    stand_in = {7: 9, 8: 9, 39: 0}
    seen = {int(row): (step, i) for step, (b,) in enumerate(intact) for i, row in enumerate(b.instances)}
    for (batch,), (original,) in zip(steps, intact, strict=True):
        for i, row in enumerate(original.instances.tolist()):
            expected = stand_in.get(row, row)
            assert batch.instances[i] == expected
            step, j = seen[expected]
            for views, others in zip(batch.views, intact[step][0].views, strict=True):
                torch.testing.assert_close(views[:, i], others[:, j], atol=1e-5, rtol=0)


def test_an_image_whose_size_is_not_the_indexed_one_counts_as_unreadable():
    images = mixed()
    images.pixels[4] = images.pixels[4][:-1]
    loader, _ = load(images)
    assert "when the data set was indexed" in loader.skipped["picture-4"]


@pytest.mark.parametrize("images", [mixed, uniform])
def test_too_many_unreadable_images_stop_the_run_and_name_some(images):
    with pytest.raises(UserError, match=r"of 40 images could not be .*picture-\d+: cut short.*repair or remove"):
        load(images(bad=range(3)))
    load(images(bad=range(3)), max_unreadable=0.1)
    assert no_threads_left()


def test_files_that_were_left_out_of_the_list_count_among_the_unreadable_too():
    images = mixed()
    images.unreadable = [("a.jpg", "the file is empty"), ("b.jpg", "the file is empty")]
    with pytest.raises(UserError, match=r"2 of 42 images.*than the allowed 1\.0%.*a\.jpg: the file is empty.*scan"):
        load(images)
    load(images, max_unreadable=0.05)


@pytest.mark.parametrize("images", [mixed, uniform])
def test_a_set_of_which_nothing_can_be_decoded_is_refused(images):
    with pytest.raises(UserError, match="none of the data set's images can be decoded"):
        load(images(bad=range(40)), max_unreadable=1.0)


def no_threads_left():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("tessella-data")]


def test_threads_end_with_the_epoch_and_with_an_iterator_that_is_closed_early():
    images = mixed()
    loader = Loader(images, SPEC, EpochSampler(len(images), 8, 3), seed=3, device="cpu", workers=3)
    steps = loader.epoch(0)
    next(steps)
    assert not no_threads_left()
    steps.close()
    assert no_threads_left()
    list(loader.epoch(0))
    assert no_threads_left()


def test_a_fault_in_a_thread_reaches_the_consumer():
    images = mixed()
    images.pixels[3] = None
    with pytest.raises(AttributeError):
        load(images)
    assert no_threads_left()


def test_runs_only_a_few_batches_ahead():
    images, read = mixed(200), []
    image = images.image
    images.image = lambda row: read.append(row) or image(row)
    loader = Loader(images, SPEC, EpochSampler(len(images), 8, 3), seed=3, device="cpu", workers=2)
    steps = loader.epoch(0)
    next(steps)
    time.sleep(0.3)
    assert len(read) == 8 * (1 + threads.AHEAD)
    steps.close()


def test_closing_drops_the_images_that_are_not_begun():
    images, read = mixed(200), []
    image = images.image
    images.image = lambda row: read.append(row) or time.sleep(0.01) or image(row)
    loader = Loader(images, SPEC, EpochSampler(len(images), 40, 3), seed=3, device="cpu", workers=2)
    steps = loader.epoch(0)
    next(steps)
    steps.close()
    assert len(read) < 80  # the first batch, and what two threads had in hand


def test_decoding_changes_neither_this_threads_nor_later_threads_number_of_torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        images, inside = mixed(), []
        image = images.image
        images.image = lambda row: inside.append(torch.get_num_threads()) or image(row)
        load(images, workers=3)
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (set(inside), torch.get_num_threads(), later) == ({1}, 3, [3])
    finally:
        torch.set_num_threads(before)


def test_counts_the_time_that_the_consumer_waits():
    images = mixed(16)
    image = images.image
    images.image = lambda row: time.sleep(0.01) or image(row)
    loader, _ = load(images, workers=1)
    assert 0.1 < loader.wait_seconds < 5


def test_refuses_a_batch_that_ranks_and_micro_batches_cannot_share():
    with pytest.raises(UserError, match="use 6 or 12"):
        load(mixed(), batch_size=8, world_size=3, accumulate=2)


@pytest.mark.parametrize(("resize", "size"), [(36, 32), (32, 32), (47, 30)])
def test_evaluation_sees_torchvisions_resize_and_centre_crop_within_one_level(resize, size):
    images = mixed(24)
    rows = np.arange(23, -1, -1)
    reference = Compose([Resize(resize), CenterCrop(size)])
    seen = []
    for pixels, shown in evaluation_batches(
        images, rows, EvalTransform(size, resize, **RAW), batch_size=7, device="cpu", workers=2
    ):
        assert pixels.is_contiguous(memory_format=image_layout(pixels.device))
        seen += shown.tolist()
        for view, row in zip(pixels, shown, strict=True):
            expected = np.asarray(reference(Image.fromarray(images.pixels[row])), dtype=np.float32)
            assert_levels_agree(view.permute(1, 2, 0).numpy() * 255, expected)
    assert seen == rows.tolist()


def test_evaluation_normalises_and_leaves_out_and_names_what_it_cannot_read():
    images, skipped = mixed(12, bad=[0, 4, 5, 6, 7]), {}
    settings = {"batch_size": 4, "device": "cpu", "workers": 2}
    normalising = EvalTransform(8, 8, mean=(0.1, 0.2, 0.3), std=(0.5,) * 3)
    batches = list(evaluation_batches(images, range(12), normalising, skipped=skipped, **settings))
    plain = list(evaluation_batches(images, range(12), EvalTransform(8, 8, **RAW), **settings))
    assert np.concatenate([rows for _, rows in batches]).tolist() == [1, 2, 3, 8, 9, 10, 11]
    assert skipped == {f"picture-{row}": "cut short" for row in images.bad}
    for (pixels, _), (raw, _) in zip(batches, plain, strict=True):
        expected = (raw - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_evaluation_of_a_line_of_pixels_takes_no_gigabytes(monkeypatch):
    images, enlarged = Pictures([(20000, 1), (1, 5000)]), []
    resize = transform_module.resize_pixels
    monkeypatch.setattr(transform_module, "resize_pixels", lambda *given: enlarged.append(given[1:3]) or resize(*given))
    ((pixels, _),) = evaluation_batches(
        images, [0, 1], EvalTransform(224, 256, **RAW), batch_size=2, device="cpu", workers=1
    )
    assert pixels.shape == (2, 3, 224, 224)
    assert enlarged == [(256, 16 * 256), (16 * 256, 256)]


def test_evaluation_refuses_a_crop_larger_than_the_image_it_is_cut_from():
    with pytest.raises(UserError, match="resize=200 is less than the crop size=224"):
        EvalTransform(224, 200)


ARCHIVES = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not ARCHIVES.exists(), reason="real images are not here")
def test_photos_of_every_size_arrive_as_planned_from_an_archive(tmp_path):
    images = open_images(str(ARCHIVES / "imagenet-sample.tar"), cache=tmp_path)
    spec = ViewSpec((CropGroup(1, 64, (0.14, 1.0), colors=PLAIN),), **RAW)
    loader = Loader(images, spec, EpochSampler(len(images), 16, 0), seed=0, device="cpu", workers=2)
    steps = loader.epoch(0)
    (batch,) = next(steps)
    steps.close()
    assert not loader.resident and not loader.skipped
    for row, view in zip(batch.instances.tolist(), batch.views[0][0], strict=True):
        left, top, width, height = loader._plan(0, [row]).box[0, 0].tolist()
        crop = Image.fromarray(images.image(row)).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR), dtype=np.float32)
        assert_levels_agree(view.permute(1, 2, 0).numpy() * 255, expected)


@pytest.mark.skipif(not ARCHIVES.exists(), reason="real images are not here")
def test_small_photos_of_one_size_become_resident(tmp_path):
    images = open_images(str(ARCHIVES / "cifar10-small.tar.gz") + "::cifar10-small/test", cache=tmp_path)
    loader, steps = load(images, batch_size=100, epoch=0)
    assert loader.resident and len(steps) == 10
    for row in (0, 500, 999):
        np.testing.assert_array_equal(loader._pixels[row].permute(1, 2, 0).numpy(), images.image(row))
