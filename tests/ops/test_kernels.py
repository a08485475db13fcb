"""The compiled kernels against Pillow, a slow filter, and the torch operations that do the same on batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.ops import kernels
from tessella.ops.augment import photometric
from tests.ops.test_augment import RAW, drawn, nothing, pictures


def cut(images, boxes, size):
    """(n, 3, size, size) uint8: one view of each of (n, H, W, 3) images."""
    views = np.zeros((1, len(images), 3, size, size), np.uint8)
    kernels.cut(images, np.array(boxes, dtype=np.float64, order="C")[:, None], views, 0)
    return views[0]


def cut_and_colour(images, boxes, size, parameters, mean=RAW["mean"], std=RAW["std"]):
    """The same, coloured: float32."""
    views = np.zeros((1, len(images), 3, size, size), np.float32)
    colours = [values[:, None] for values in parameters.values()]
    kernels.cut_and_colour(
        images,
        np.array(boxes, dtype=np.float64, order="C")[:, None],
        *colours,
        np.float32(mean),
        np.float32(std),
        views,
        0,
    )
    return views[0]


def noise(n, height, width, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def channels_last(images):
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def some_boxes(n, height, width, seed=2):
    rng = np.random.default_rng(seed)
    w, h = rng.integers(1, width + 1, n), rng.integers(1, height + 1, n)
    return np.stack((rng.integers(0, width + 1 - w), rng.integers(0, height + 1 - h), w, h), axis=1)


def whole(images):
    n, height, width, _ = images.shape
    return np.tile([0, 0, width, height], (n, 1))


def coloured_by_torch(views, parameters):
    return photometric(torch.from_numpy(views), **parameters, **RAW).numpy()


@pytest.mark.parametrize("size", [1, 8, 32, 41])
def test_a_cut_equals_pillows_crop_then_resize_within_one_level(size):
    images, boxes = noise(60, 70, 90), some_boxes(60, 70, 90)
    for image, (left, top, width, height), view in zip(images, boxes.tolist(), cut(images, boxes, size), strict=True):
        crop = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(view.astype(int) - expected).max() <= 1


def test_a_cut_of_the_whole_image_at_its_own_size_is_the_image():
    images = noise(3, 32, 32)
    np.testing.assert_array_equal(cut(images, whole(images), 32), images.transpose(0, 3, 1, 2))


def test_a_box_between_pixels_is_filtered_where_it_lies():
    """The reference samples the same triangle at the centres of the pixels that the box touches."""

    def weights(start, length, size, side):
        reach = max(length / size, 1.0)
        centre = start + (np.arange(size)[:, None] + 0.5) * length / size
        pixel = np.arange(side)[None]
        touched = (pixel >= np.floor(start)) & (pixel < np.ceil(start + length))
        raw = np.clip(1 - np.abs(pixel + 0.5 - centre) / reach, 0, None) * touched
        return raw / raw.sum(axis=1, keepdims=True)

    (image,), box = noise(1, 50, 60), (3.5, 2.25, 40.75, 38.5)
    rows, columns = weights(box[1], box[3], 16, 50), weights(box[0], box[2], 16, 60)
    expected = np.einsum("yh,hwc,xw->cyx", rows, image.astype(float), columns)
    assert np.abs(cut(image[None], [box], 16)[0] - expected).max() <= 0.51


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_operation_equals_torchs(operation):
    images, parameters = channels_last(pictures(9, 40, 40)), nothing(9)
    parameters["jitter"][:] = True
    low, high = (-0.5, 0.5) if operation == 3 else (0.0, 2.0)
    parameters["factors"][:, operation] = np.linspace(low, high, 9)
    expected = coloured_by_torch(images.transpose(0, 3, 1, 2).copy(), parameters)
    result = cut_and_colour(images, whole(images), 40, parameters)
    np.testing.assert_allclose(result, expected, atol=2e-6, rtol=0)
    assert np.abs(result[0] - images[0].transpose(2, 0, 1) / np.float32(255)).max() > 0.05  # it did something


@pytest.mark.parametrize("name", ["flip", "gray", "solarize"])
def test_each_switch_equals_torchs_and_touches_only_its_views(name):
    images, parameters = channels_last(pictures(6, 17, 17)), nothing(6)
    parameters[name][::2] = True
    result = cut_and_colour(images, whole(images), 17, parameters)
    expected = coloured_by_torch(images.transpose(0, 3, 1, 2).copy(), parameters)
    np.testing.assert_allclose(result, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("side", "sigmas"), [(1, (1, 2)), (5, (0.3, 2)), (16, (0.1, 2)), (33, (0.1, 2)), (64, (2.5, 9))]
)
def test_blur_equals_torchs_for_each_views_own_sigma(side, sigmas):
    images, parameters = noise(8, side, side), nothing(8)
    parameters["sigma"][1:] = np.linspace(*sigmas, 7)
    expected = coloured_by_torch(images.transpose(0, 3, 1, 2).copy(), parameters)
    np.testing.assert_allclose(cut_and_colour(images, whole(images), side, parameters), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [24, 96])
def test_all_operations_together_equal_a_cut_that_torch_colours(size):
    images, parameters, boxes = channels_last(pictures(64, 80, 100)), drawn(64), some_boxes(64, 80, 100)
    views = cut(images, boxes, size)
    expected, result = coloured_by_torch(views, parameters), cut_and_colour(images, boxes, size, parameters)
    # A value at the threshold of solarize may fall on either side of it: leave those pixels out.
    unsolarized = coloured_by_torch(views, {**parameters, "solarize": np.zeros(64, bool)})
    safe = np.abs(unsolarized - 128 / 255) > 1e-5
    np.testing.assert_allclose(result[safe], expected[safe], atol=2e-5, rtol=0)
    assert safe.mean() > 0.999


def test_normalises():
    images, mean, std = channels_last(pictures(4, 12, 12)), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    raw = cut_and_colour(images, whole(images), 12, drawn(4))
    result = cut_and_colour(images, whole(images), 12, drawn(4), mean, std)
    expected = (raw - np.float32(mean)[:, None, None]) / np.float32(std)[:, None, None]
    np.testing.assert_allclose(result, expected, atol=2e-6, rtol=0)


def test_a_view_depends_on_nothing_else_in_the_batch_to_the_last_bit():
    images, parameters, boxes = channels_last(pictures(12, 50, 60)), drawn(12), some_boxes(12, 50, 60)
    together = cut_and_colour(images, boxes, 32, parameters)
    for i in reversed(range(12)):
        alone = {name: values[i : i + 1] for name, values in parameters.items()}
        np.testing.assert_array_equal(cut_and_colour(images[i : i + 1], boxes[i : i + 1], 32, alone)[0], together[i])


def test_views_go_where_they_belong_and_nowhere_else():
    images, boxes = noise(2, 20, 20), np.array([[[0.0, 0, 20, 20], [2, 3, 10, 9]]] * 2)
    views = np.full((2, 5, 3, 8, 8), 77, np.uint8)
    kernels.cut(images, boxes, views, 2)
    assert (views[:, [0, 1, 4]] == 77).all()
    for v in range(2):
        np.testing.assert_array_equal(views[v, 2:4], cut(images, boxes[:, v], 8))


@pytest.mark.parametrize("box", [(-1, 0, 8, 8), (0, -1, 8, 8), (15, 0, 6, 8), (0, 13.5, 8, 7)])
def test_a_box_outside_its_image_is_refused_rather_than_read(box):
    with pytest.raises(AssertionError, match="outside its image"):
        cut(noise(1, 20, 20), [box], 8)


def test_takes_read_only_images_and_any_columns_of_a_plan():
    images, parameters = noise(6, 20, 20), drawn(6)
    expected = cut_and_colour(images, whole(images), 8, parameters)
    images.flags.writeable = False
    wide = {name: np.repeat(values[:, None], 3, axis=1)[:, 1] for name, values in parameters.items()}
    np.testing.assert_array_equal(cut_and_colour(images, whole(images), 8, wide), expected)
