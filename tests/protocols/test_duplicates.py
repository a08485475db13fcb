import io

import numpy as np
import torch
from PIL import Image

from tessella.data.sources import ArrayImages, open_images
from tessella.data.transform import EvalTransform
from tessella.protocols.duplicates import DuplicatesConfig, duplicates
from tessella.protocols.features import EvalData
from tests.protocols.planted import Tiny


def pictures(n, seed):
    """Smooth random pictures: 6 x 6 colours, enlarged to 32 x 32."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in small])


def encoded_again(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer))


def rescaled(pixels):
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((48, 40)).resize((32, 32)))


def brightened(pixels):
    return np.clip(pixels.astype(int) + 8, 0, 255).astype(np.uint8)


def data_of(train, test, device="cpu"):
    sets = [ArrayImages(name, x, np.arange(len(x)) % 2) for name, x in (("train", train), ("test", test))]
    return EvalData(*sets, EvalTransform.of(32), torch.device(device), workers=1)


def test_planted_copies_are_found_and_named_and_nothing_else_is():
    train, test = pictures(60, 0), pictures(40, 1)
    test[3], test[10], test[22] = encoded_again(train[7]), rescaled(train[8]), brightened(train[9])
    test[30] = train[59]
    data = data_of(train, test)
    scores = duplicates(Tiny(), data, DuplicatesConfig())
    assert scores["near_duplicates"] == 4 and scores["near_duplicate_share"] == 0.1
    found = {(int(pair["test"]), int(pair["train"])) for pair in scores["pairs"]}
    assert found == {(3, 7), (10, 8), (22, 9), (30, 59)}
    assert scores["pairs"][0]["similarity"] == 1.0 and all(p["similarity"] >= 0.85 for p in scores["pairs"])


def test_of_one_set_no_image_is_its_own_copy():
    pixels = pictures(30, 0)
    pixels[4] = pixels[20]
    data = data_of(pixels, pixels)
    scores = duplicates(Tiny(), data, DuplicatesConfig())
    assert scores["near_duplicates"] == 2 and scores["leave_one_out"]


def test_the_list_of_pairs_is_bounded_but_not_the_count():
    pixels = pictures(30, 0)
    scores = duplicates(Tiny(), data_of(pixels, pixels.copy()[:20]), DuplicatesConfig(listed=5))
    assert scores["near_duplicates"] == 20 and len(scores["pairs"]) == 5


def test_the_copies_among_small_real_pictures_are_found_and_few_others(shared_data):
    archive = f"{shared_data}/cifar10-small.tar.gz::cifar10-small"
    train, test = (open_images(f"{archive}/{split}", labels=True) for split in ("train", "test"))
    scores = duplicates(None, EvalData(train, test, EvalTransform.of(32), workers=1), DuplicatesConfig())
    assert 0.001 < scores["near_duplicate_share"] < 0.02
