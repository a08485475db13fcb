"""What is a near-copy of an image and what is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from tessella.ops import near_copies as module
from tessella.ops.near_copies import SIDE, near_copies, signatures, threshold_for


def pictures(n: int, seed: int) -> list[Image.Image]:
    """Random pictures with the power spectrum of photos."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    frequency[0, 0] = 1
    found = []
    for _ in range(n):
        spectrum = np.fft.fft2(random.normal(size=(64, 64, 3)), axes=(0, 1)) / frequency[..., None]
        pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
        pixels += 2 * pixels[..., :1]  # colours that go together, as a rule
        found.append(Image.fromarray((128 + 40 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)))
    return found


def of(images: list[Image.Image]) -> Tensor:
    small = [np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for image in images]
    return signatures(torch.from_numpy(np.stack(small)).float() / 255)


def encoded_again(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def noisy(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image) + np.random.default_rng(0).normal(0, 12, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


CHANGES = {
    "nothing": lambda image: image,
    "jpeg": encoded_again,
    "scaled": lambda image: image.resize((40, 48)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "gray": lambda image: image.convert("L"),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "noisy": noisy,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped by 5 %": lambda image: image.crop((2, 1, 63, 63)),
    "cropped by 20 %": lambda image: image.crop((6, 6, 58, 58)),
    "cropped and mirrored": lambda image: image.crop((4, 4, 60, 60)).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "rotated by 2 degrees": lambda image: image.rotate(2, Image.Resampling.BILINEAR),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_is_found_on_either_side_and_no_other_one(change: str):
    train, test = pictures(40, 0), pictures(30, 1)
    originals = {3: 7, 11: 20, 29: 39}  # test row -> train row
    changed = list(test)
    for row, original in originals.items():
        changed[row] = CHANGES[change](train[original])
    for first, second, expected in (
        (changed, train, set(originals.items())),
        (train, changed, {(b, a) for a, b in originals.items()}),
    ):
        found = near_copies(of(first), of(second))
        assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected


def test_within_one_set_no_image_is_its_own_copy():
    images = pictures(20, 0)
    images[4] = images[13].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = near_copies(of(images), of(images), same=True)
    assert (found.first.tolist(), found.second.tolist()) == ([4, 13], [13, 4])


def test_images_without_contrast_are_no_copies_of_anything():
    plain = [Image.new("RGB", (64, 64), colour) for colour in ("black", "gray", "gray")]
    assert not len(near_copies(of(plain), of(plain + pictures(3, 0))).first)
    assert of(plain).abs().max() == 0


def test_blocks_of_pairs_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    first, second = of(pictures(20, 0)), of(pictures(12, 1) + pictures(20, 0)[:9])
    whole = near_copies(first, second)
    monkeypatch.setattr(module, "_ROWS", (7, 5))
    for one, other in zip(whole, near_copies(first, second), strict=True):
        torch.testing.assert_close(one, other)
    assert whole.first.tolist() == list(range(9))


def test_where_all_images_are_alike_a_copy_must_be_closer():
    alike = [Image.blend(image, pictures(1, 99)[0], 0.8) for image in pictures(30, 0)]
    assert threshold_for(of(pictures(30, 0))) == 0.85
    assert 0.95 < threshold_for(of(alike)) <= 0.99
    assert threshold_for(of(pictures(5, 0) * 4)) == 0.99  # of copies alone


def test_sets_without_images_have_no_pairs():
    none = torch.empty(0, 3, 80)
    assert not len(near_copies(none, of(pictures(2, 0))).first) and not len(near_copies(none, none).first)
