"""Photometric operations and crops against torchvision (float, same parameters) and Pillow (uint8)."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.optimize import brentq
from torchvision.transforms.v2 import functional as reference

from tessella.ops.augment import blur_kernels, crop_resize, photometric
from tessella.ops.layout import image_layout

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def pictures(n, height, width, seed=0):
    """Smooth noise with saturated areas and gray pixels: every branch of HSV."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, max(2, height // 4), max(2, width // 4), generator=generator) * 1.6 - 0.3
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255
    images = fine.round().clamp(0, 255).to(torch.uint8)
    images[:, :, :2, :2] = images[:, :1, :2, :2]  # exactly gray
    return images


def nothing(n):
    """Parameters that change nothing."""
    return {
        "flip": np.zeros(n, bool),
        "jitter": np.zeros(n, bool),
        "factors": np.tile(np.array([1, 1, 1, 0], np.float32), (n, 1)),
        "order": np.tile(np.arange(4, dtype=np.uint8), (n, 1)),
        "gray": np.zeros(n, bool),
        "sigma": np.zeros(n, np.float32),
        "solarize": np.zeros(n, bool),
    }


def drawn(n, seed=0):
    """Random parameters of all operations."""
    rng = np.random.default_rng(seed)
    return {
        "flip": rng.random(n) < 0.5,
        "jitter": rng.random(n) < 0.8,
        "factors": np.stack([*rng.uniform(0.2, 1.8, (3, n)), rng.uniform(-0.5, 0.5, n)], axis=1).astype(np.float32),
        "order": rng.permuted(np.tile(np.arange(4, dtype=np.uint8), (n, 1)), axis=1),
        "gray": rng.random(n) < 0.2,
        "sigma": np.where(rng.random(n) < 0.5, rng.uniform(0.1, 2.0, n), 0).astype(np.float32),
        "solarize": rng.random(n) < 0.3,
    }


def one_by_one(views, flip, jitter, factors, order, gray, sigma, solarize):
    """The same chain from torchvision's functions, sample by sample."""
    adjust = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    results = []
    for i, view in enumerate(views):
        x = view.float() / 255
        if flip[i]:
            x = reference.horizontal_flip(x)
        if jitter[i]:
            for operation in order[i]:
                x = adjust[operation](x, float(factors[i, operation]))
        if gray[i]:
            x = reference.rgb_to_grayscale(x, num_output_channels=3)
        if sigma[i] > 0:
            x = three_boxes(x, float(sigma[i]))
        if solarize[i]:
            x = reference.solarize(x, 128 / 255)
        results.append(x)
    return torch.stack(results)


def box_variance(reach):
    """Of a box of 2 reach + 1 pixels; its end pixels count by the part that it covers."""
    distance = np.arange(1, np.ceil(reach) + 1)
    return 2 * (distance**2 * np.minimum(1, reach + 1 - distance)).sum() / (2 * reach + 1)


def three_boxes(x, sigma):
    """Blur of a (3, s, s) tensor: three boxes of a third of the variance each, as differences of running sums."""
    reach = brentq(lambda r: box_variance(r) - sigma**2 / 3, 0, 50, xtol=1e-14)
    planes, pad = x.double().numpy(), 3 * (int(reach) + 2)
    for axis in (1, 2):
        lines = np.moveaxis(planes, axis, 2)
        lines = np.pad(lines, ((0, 0), (0, 0), (pad, pad)), mode="edge")
        edges, centre = np.arange(lines.shape[2] + 1), np.arange(lines.shape[2]) + 0.5
        for line in lines.reshape(-1, lines.shape[2]):
            for _ in range(3):
                below = np.concatenate([[0], line.cumsum()])
                window = (np.interp(centre + side * (reach + 0.5), edges, below) for side in (1, -1))
                line[:] = np.subtract(*window) / (2 * reach + 1)
        planes = np.moveaxis(lines[:, :, pad:-pad], 2, axis)
    return torch.from_numpy(planes.copy()).float()


# Float32 on both sides; the order of additions differs, and hue takes another road to the same value.
TOLERANCE = {"atol": 2e-6, "rtol": 0}


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_operation_equals_torchvisions_for_each_samples_own_factor(operation):
    views, n = pictures(9, 20, 20), 9
    parameters = nothing(n)
    parameters["jitter"][:] = True
    low, high = (-0.5, 0.5) if operation == 3 else (0.0, 2.0)
    parameters["factors"][:, operation] = np.linspace(low, high, n)
    torch.testing.assert_close(photometric(views, **parameters, **RAW), one_by_one(views, **parameters), **TOLERANCE)


@pytest.mark.parametrize("name", ["flip", "gray", "solarize"])
def test_each_switch_equals_torchvisions_and_touches_only_its_samples(name):
    views, n = pictures(6, 17, 17), 6
    parameters = nothing(n)
    parameters[name][::2] = True
    result = photometric(views, **parameters, **RAW)
    torch.testing.assert_close(result, one_by_one(views, **parameters), **TOLERANCE)
    torch.testing.assert_close(result[1::2], views[1::2] / 255, atol=0, rtol=0)


@pytest.mark.parametrize(("side", "largest"), [(1, 2.0), (5, 2.0), (16, 2.0), (33, 2.0), (40, 9.0)])
def test_blur_is_three_boxes_of_each_samples_own_sigma(side, largest):
    views, n = pictures(8, side, side), 8
    parameters = nothing(n)
    parameters["sigma"][1:] = np.linspace(0.1, largest, n - 1)
    torch.testing.assert_close(photometric(views, **parameters, **RAW), one_by_one(views, **parameters), **TOLERANCE)


def test_a_blur_kernel_sums_to_one_and_has_its_sigma_also_below_a_pixel():
    sigmas = np.float32([0.1, 0.3, 1.0, 1.41, 1.42, 2.0, 7.3])
    kernels = blur_kernels(sigmas)
    variance = 2 * (kernels * np.arange(kernels.shape[1]) ** 2).sum(axis=1)
    np.testing.assert_allclose(2 * kernels.sum(axis=1) - kernels[:, 0], 1, rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(variance), sigmas, rtol=1e-6)


def test_the_whole_chain_equals_torchvisions_in_each_samples_own_order():
    views, parameters = pictures(64, 24, 24), drawn(64)
    expected = one_by_one(views, **parameters)
    # A value at the threshold of solarize may fall on either side of it: leave those pixels out.
    safe = (one_by_one(views, **{**parameters, "solarize": np.zeros(64, bool)}) - 128 / 255).abs() > 1e-5
    result = photometric(views, **parameters, **RAW)
    # Chains of four operations amplify rounding by their factors (up to 1.8 each).
    torch.testing.assert_close(result[safe], expected[safe], atol=2e-5, rtol=0)
    assert safe.float().mean() > 0.999


def test_a_sample_does_not_depend_on_its_batch():
    views, parameters = pictures(32, 24, 24), drawn(32)
    whole = photometric(views, **parameters, **RAW)
    part = photometric(views[8:12], **{name: values[8:12] for name, values in parameters.items()}, **RAW)
    torch.testing.assert_close(whole[8:12], part, atol=1e-6, rtol=0)


def test_normalises_and_returns_a_networks_layout_and_leaves_its_input_alone():
    views, mean, std = pictures(4, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    before = views.clone()
    result = photometric(views, **drawn(4), mean=mean, std=std)
    raw = photometric(views, **drawn(4), **RAW)
    torch.testing.assert_close(result, reference.normalize(raw, mean, std), atol=1e-5, rtol=0)
    assert result.is_contiguous(memory_format=image_layout(result.device))
    assert torch.equal(views, before)


def test_the_memory_format_of_the_input_does_not_matter():
    views, parameters = pictures(6, 12, 12), drawn(6)
    other = views.contiguous(memory_format=torch.channels_last)
    assert torch.equal(photometric(views, **parameters, **RAW), photometric(other, **parameters, **RAW))


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.3, 1.5, 2.0])
def test_blur_equals_pillows_but_for_its_rounding_to_whole_levels_after_every_box(sigma):
    noise = torch.randint(256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    parameters = nothing(1)
    parameters["sigma"][:] = sigma
    result = photometric(noise, **parameters, **RAW)[0].mul(255).permute(1, 2, 0).numpy()
    image = Image.fromarray(noise[0].permute(1, 2, 0).numpy())
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32)
    inner = (slice(8, -8), slice(8, -8))  # Pillow repeats the border again before every box
    difference = np.abs(result - blurred)[inner]
    assert difference.max() <= 3
    assert difference.mean() < 0.8


def test_gray_equals_pillows_within_a_level():
    views, parameters = pictures(6, 32, 32), nothing(6)
    parameters["gray"][:] = True
    result = photometric(views, **parameters, **RAW).mul(255)[:, 0].numpy()
    expected = np.stack([Image.fromarray(v.permute(1, 2, 0).numpy()).convert("L") for v in views])
    assert np.abs(result - expected).max() <= 1


@pytest.mark.parametrize("size", [8, 32, 40])
def test_crop_resize_equals_pillows_crop_then_resize_within_one_level(size):
    images = torch.randint(256, (40, 3, 28, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rng = np.random.default_rng(2)
    w, h = rng.integers(1, 37, 40), rng.integers(1, 29, 40)
    boxes = np.stack((rng.integers(0, 37 - w), rng.integers(0, 29 - h), w, h), axis=1)
    result = crop_resize(images, torch.from_numpy(boxes), size)
    assert result.dtype == torch.uint8
    for image, (left, top, width, height), crop in zip(images, boxes.tolist(), result, strict=True):
        whole = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = whole.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
        difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int))
        assert difference.max() <= 1


def test_crop_of_the_whole_image_at_its_own_size_is_the_image():
    images = pictures(3, 32, 32)
    boxes = torch.tensor([[0, 0, 32, 32]]).expand(3, 4)
    assert torch.equal(crop_resize(images, boxes, 32), images)
