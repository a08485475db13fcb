"""The transform of a network: what a user's own code gives it is what an evaluation gives it, bit for bit."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tessella.data.decode import decode
from tessella.data.evaluation import evaluation_batches
from tessella.data.sources import ArrayImages, open_images
from tessella.data.transform import EvalTransform
from tessella.errors import UserError

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample.tar"
HALF = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
KINDS = [
    EvalTransform(48, 55, *HALF),
    EvalTransform(48, 48, *HALF, interpolation="bicubic"),
    EvalTransform(48, 60, *HALF, fit="both sides", interpolation="bicubic"),
]


def picture(width: int, height: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [128 + 120 * np.sin(rows / 7 + k) * np.cos(columns / (5 + k)) for k in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def photo_folder(folder: Path) -> Path:
    """JPEG in colour, gray and turned by its tag, PNG with a palette and with alpha."""
    folder.mkdir()
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(picture(120, 80)).save(folder / "a.jpg")
    Image.fromarray(picture(70, 110)).convert("L").save(folder / "b.jpg")
    Image.fromarray(picture(100, 64)).save(folder / "c.jpg", exif=turned)
    Image.fromarray(picture(90, 90)).convert("P").save(folder / "d.png")
    Image.fromarray(np.dstack([picture(61, 99), np.full((99, 61), 100, np.uint8)])).save(folder / "e.png")
    return folder


def as_evaluated(images, transform):
    batches = evaluation_batches(images, range(len(images)), transform, batch_size=4, device="cpu", workers=2)
    return torch.cat([pixels for pixels, _ in batches])


@pytest.mark.parametrize("transform", KINDS)
def test_pil_images_and_uint8_tensors_become_exactly_what_an_evaluation_sees(transform, tmp_path: Path):
    folder = photo_folder(tmp_path / "photos")
    expected = as_evaluated(open_images(str(folder)), transform)
    for path, pixels in zip(sorted(folder.iterdir()), expected, strict=True):
        with Image.open(path) as image:
            assert torch.equal(transform(image), pixels)
        assert torch.equal(transform(torch.from_numpy(decode(path.read_bytes())).permute(2, 0, 1)), pixels)
    batch = torch.from_numpy(np.stack([picture(30, 50)] * 3)).permute(0, 3, 1, 2)
    assert torch.equal(transform(batch), as_evaluated(ArrayImages("a", batch.permute(0, 2, 3, 1).numpy()), transform))


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"{PHOTOS} is not there")
def test_real_photos_become_what_an_evaluation_sees_and_what_torchvision_makes_of_them(tmp_path: Path):
    transform = EvalTransform(224, 256, interpolation="bicubic")
    with tarfile.open(PHOTOS) as archive:
        members = [member for member in archive if member.isfile()][::50]
        for number, member in enumerate(members):
            (tmp_path / f"{number}.jpg").write_bytes(archive.extractfile(member).read())
    torchvisions = v2.Compose([
        v2.RGB(), v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(transform.mean, transform.std),
    ])  # fmt: skip
    for number, pixels in enumerate(as_evaluated(open_images(str(tmp_path)), transform)):
        image = Image.open(io.BytesIO((tmp_path / f"{number}.jpg").read_bytes()))
        assert torch.equal(transform(image), pixels)
        level = 1 / 255 / min(transform.std)
        assert (pixels - torchvisions(image)).abs().max() <= 2.01 * level
        assert (pixels - torchvisions(image)).abs().mean() <= 0.1 * level


def test_another_size_keeps_the_share_of_the_image_that_is_seen():
    assert EvalTransform(224, 232).at(112) == EvalTransform(112, 116)


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), "photo.jpg"],
)
def test_other_inputs_are_refused_in_words(image):
    with pytest.raises(UserError, match=r"transform takes .*\(3, h, w\)"):
        EvalTransform.of(8)(image)
