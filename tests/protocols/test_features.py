import hashlib

import numpy as np
import pytest
import torch

from tessella.data.sources import ArrayImages
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.protocols.features import extract, frozen, tensor_digests
from tests.protocols.planted import Tiny, eval_data, planted_images


def test_small_images_are_taken_whole_and_photos_lose_their_rim():
    assert (EvalTransform.of(32).size, EvalTransform.of(32).resize) == (32, 32)
    assert (EvalTransform.of(96).size, EvalTransform.of(96).resize) == (96, 96)
    assert (EvalTransform.of(224).size, EvalTransform.of(224).resize) == (224, 256)


def test_features_are_those_of_the_normalised_pixels_in_row_order():
    images, backbone = planted_images(10), Tiny().eval()
    transform = EvalTransform.of(8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    found = extract(backbone, images, transform, batch_size=4, workers=1)
    pixels = torch.stack([torch.from_numpy(images.image(row).copy()) for row in range(10)]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.mean, transform.std))
    with torch.no_grad():
        expected = backbone((pixels - mean) / std)
    torch.testing.assert_close(found.x, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.labels, torch.arange(10) % 3)
    assert found.rows.tolist() == list(range(10)) and found.skipped == {}


def test_batch_size_does_not_matter():
    images, backbone = planted_images(23), Tiny()
    one, many = (extract(backbone, images, EvalTransform.of(8), batch_size=b, workers=1).x for b in (1, 64))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)


def test_batch_norm_uses_and_keeps_its_running_statistics():
    backbone = Tiny().train()
    before = tensor_digests(backbone)
    extract(backbone, planted_images(20), EvalTransform.of(8), workers=1)
    assert tensor_digests(backbone) == before
    assert backbone.training and backbone.bn.training


def test_each_module_gets_its_own_mode_back():
    backbone = Tiny().train()
    backbone.bn.eval()
    with frozen(backbone):
        assert not backbone.training and not backbone.bn.training
    assert backbone.training and not backbone.bn.training


def test_a_batch_norm_buffer_that_moves_is_noticed_and_named():
    backbone = Tiny()
    with pytest.raises(AssertionError, match=r"bn\.running_mean"), frozen(backbone):
        backbone.bn.train()
        backbone(torch.randn(4, 3, 8, 8))


def test_a_change_of_the_last_bit_is_noticed():
    backbone = Tiny()
    with pytest.raises(AssertionError, match=r"conv\.weight"), frozen(backbone), torch.no_grad():
        weight = backbone.conv.weight.view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))


def test_digests_cover_every_type_of_tensor():
    module = torch.nn.Module()
    module.register_buffer("scalar", torch.tensor(3))
    module.register_buffer("coarse", torch.ones(2, dtype=torch.bfloat16), persistent=False)
    digests = tensor_digests(module)
    assert digests["scalar"] == hashlib.sha256(b"scalar torch.int64 ()\n\3" + bytes(7)).hexdigest()
    assert len(digests) == 2


def test_an_unreadable_image_is_left_out_and_listed(monkeypatch):
    from tessella.data.decode import Unreadable

    images = planted_images(12)
    read = images.image

    def broken(row):
        if row == 5:
            raise Unreadable("a hole in it")
        return read(row)

    monkeypatch.setattr(images, "image", broken)
    found = extract(Tiny(), images, EvalTransform.of(8), batch_size=1, workers=1)
    assert found.rows.tolist() == [row for row in range(12) if row != 5]
    assert found.labels.tolist() == [row % 3 for row in range(12) if row != 5]
    assert found.skipped == {str(images.key(5)): "a hole in it"}


def test_a_diverged_backbone_is_refused():
    backbone = Tiny()
    backbone.conv.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"12 of 12 images .* diverged"):
        extract(backbone, planted_images(12), EvalTransform.of(8), workers=1)


def test_protocols_share_one_pass_until_the_weights_change():
    data, backbone = eval_data(), Tiny()
    first = data.features(backbone, "test")
    assert data.features(backbone, "test") is first and backbone.seen == 60
    backbone.bn.bias.data += 1
    assert data.features(backbone, "test") is not first and backbone.seen == 120
    other = Tiny()
    data.features(other, "test")
    assert other.seen == 60


def test_classes_are_matched_by_name_not_by_number():
    pixels = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    train = ArrayImages("train", pixels, np.array([0, 1, 2]), classes=["ant", "bee", "cat"])
    test = ArrayImages("test", pixels, np.array([0, 1, 1]), classes=["cat", "dog"])
    data = eval_data(train, test)
    assert data.classes == ["ant", "bee", "cat", "dog"]
    assert data.labels("train").tolist() == [0, 1, 2]
    assert data.labels("test").tolist() == [2, 3, 3]
    assert data.features(Tiny(), "test").labels.tolist() == [2, 3, 3]


@pytest.mark.parametrize("labels", [None, np.array([0, -1, 1])])
def test_images_without_labels_are_refused(labels):
    images = ArrayImages("bare", np.zeros((3, 8, 8, 3), dtype=np.uint8), labels)
    with pytest.raises(UserError, match="bare has images without a label"):
        eval_data(train=images)


class Nothing(torch.nn.Module):
    """Pixels as features."""

    def __init__(self, size):
        super().__init__()
        self.feature_dim = 3 * size * size

    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize(("resize", "interpolation"), [(16, "bilinear"), (20, "bilinear"), (16, "bicubic")])
def test_a_squashed_image_is_pillows_whole_image_resized(resize, interpolation):
    from PIL import Image

    rows, columns = np.mgrid[0:40, 0:60]
    pixels = np.stack([rows * 4 + columns, columns * 4, 255 - rows * 5], axis=-1).clip(0, 255).astype(np.uint8)
    transform = EvalTransform(
        16, resize, (0, 0, 0), (1, 1, 1), "shorter side, then both" if resize != 16 else "both sides", interpolation
    )
    found = extract(Nothing(16), ArrayImages("one", pixels[None]), transform, workers=1).x.view(3, 16, 16)
    image, kind = Image.fromarray(pixels), Image.Resampling[interpolation.upper()]
    if resize != 16:
        image = image.resize((resize * 60 // 40, resize), kind)
    expected = torch.from_numpy(np.array(image.resize((16, 16), kind))).permute(2, 0, 1) / 255
    assert (found - expected).abs().max() <= 2.01 / 255


def test_features_too_large_for_memory_lie_in_a_file_meanwhile(monkeypatch):
    import sys

    expected = extract(Tiny(), planted_images(23), EvalTransform.of(8), workers=1).x
    monkeypatch.setattr(sys.modules["tessella.protocols.features"], "_IN_MEMORY", 100)
    assert torch.equal(extract(Tiny(), planted_images(23), EvalTransform.of(8), workers=1).x, expected)
