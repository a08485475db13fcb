"""Masks in every layout open to the same thing: the class of every pixel, or a sentence that says what to mend."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessella.data.decode import Unreadable
from tessella.data.masks.images import decode_mask
from tessella.data.masks.layouts import CITYSCAPES_CLASSES, IGNORE, VOC_CLASSES, ArrayMasks, MaskedImages, open_masks
from tessella.errors import UserError
from tests.data.pictures import pack, write_image

ODD_NAMES = ("été 1.jpg", "a.b.c.jpg", "50%.JPEG", "deep/er/x.jpg", "-dash.png")


def mask_of(size: tuple[int, int] = (12, 8), classes: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, size[::-1], dtype=np.uint8)


def write_mask(path: Path, mask: np.ndarray, mode: str = "L") -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    if mode == "P":
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    picture.save(path)
    return mask


def write_pair(root: Path, image: str, mask: str, values: np.ndarray | None = None, mode: str = "L") -> np.ndarray:
    values = mask_of(seed=len(image)) if values is None else values
    write_image(root / image, values.shape[::-1])
    return write_mask(root / mask, values, mode)


def write_camvid_like(root: Path) -> dict[str, np.ndarray]:
    masks = {}
    for split in ("train", "val"):
        for name in ODD_NAMES:
            stem = name.rsplit(".", 1)[0]
            masks[f"{split}/{stem}"] = write_pair(root, f"images/{split}/{name}", f"masks/{split}/{stem}.png")
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    return masks


def all_masks(images: MaskedImages) -> dict[str, np.ndarray]:
    return {key: images.mask(row) for row, key in enumerate(images.keys)}


def assert_masks(images: MaskedImages, expected: dict[str, np.ndarray]) -> None:
    assert images.keys == sorted(expected)
    for key, mask in all_masks(images).items():
        np.testing.assert_array_equal(mask, expected[key])
    for row in range(len(images)):
        width, height = images.sizes[row]
        assert images.image(row).shape == (height, width, 3) and images.mask(row).shape == (height, width)


def test_folders_of_images_and_masks_pair_by_name_whatever_the_names(tmp_path):
    masks = write_camvid_like(tmp_path / "set")
    for split in ("train", "val"):
        images = open_masks(str(tmp_path / "set"), split)
        assert_masks(images, {k.removeprefix(f"{split}/"): v for k, v in masks.items() if k.startswith(split)})
        assert images.classes == ["sky", "road", "car"] and images.name.endswith(f"[{split}]")
    assert open_masks(str(tmp_path / "set"), "test").keys == images.keys  # no test split: validation
    with pytest.raises(UserError, match=r"no split 'holdout': there are train, val"):
        open_masks(str(tmp_path / "set"), "holdout")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_an_archive_and_a_part_of_it_give_what_the_folder_gives(tmp_path, suffix):
    write_camvid_like(tmp_path / "all/set")
    archive = pack(tmp_path / f"packed{suffix}", tmp_path / "all", "w:gz" if suffix == ".tar.gz" else "w")
    plain = open_masks(str(tmp_path / "all/set"))
    for data in (f"{archive}::set", str(archive), str(tmp_path / "all")):
        images = open_masks(data)
        assert_masks(images, all_masks(plain))
        assert images.classes == plain.classes and images.fingerprint == plain.fingerprint
    (tmp_path / "all/set/masks/train/a.b.c.png").unlink()
    write_mask(tmp_path / "all/set/masks/train/a.b.c.png", np.zeros((8, 12), np.uint8))
    assert open_masks(str(tmp_path / "all/set")).fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/x.jpg", "masks/x.png"),
        ("Images/x.jpg", "Labels/x.png"),
        ("train/images/x.jpg", "train/masks/x.png"),
        ("images/training/x.jpg", "annotations/training/x.png"),
        ("imgs/x.jpg", "gt/x_mask.png"),
        ("images/train/x.jpg", "masks/x_L.png"),
    ],
)
def test_the_usual_ways_to_lay_folders_out_are_all_understood(tmp_path, image, mask):
    values = write_pair(tmp_path, image, mask)
    images = open_masks(str(tmp_path), "train")
    assert_masks(images, {"x": values})
    assert images.classes is None  # nothing names them


def test_voc_splits_are_lists_palettes_are_numbers_and_unlisted_images_stay_out(tmp_path):
    root, border = tmp_path / "VOCdevkit/VOC2012", mask_of(classes=21)
    border[0] = IGNORE
    for number in range(4):
        write_pair(root, f"JPEGImages/2007_00000{number}.jpg", f"SegmentationClass/2007_00000{number}.png", border, "P")
        write_mask(root / f"SegmentationObject/2007_00000{number}.png", border)
    write_image(root / "JPEGImages/2008_000009.jpg")  # of the detection task: no mask
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000001\n2007_000003\n")
    (lists / "val.txt").write_text("2007_000000 \r\n\r\n")
    assert_masks(open_masks(str(tmp_path), "train"), dict.fromkeys(("2007_000001", "2007_000003"), border))
    test = open_masks(str(root), "test")
    assert_masks(test, {"2007_000000": border})
    assert test.classes == VOC_CLASSES and len(VOC_CLASSES) == 21
    (lists / "val.txt").write_text("2007_000009\n")
    with pytest.raises(UserError, match=r"'2007_000009'.*no such image"):
        open_masks(str(root), "test")
    (lists / "val.txt").write_text("2008_000009\n")
    with pytest.raises(UserError, match=r"no mask of JPEGImages/2008_000009.jpg"):
        open_masks(str(root), "test")


def test_the_augmented_voc_is_trained_on_and_its_plain_validation_is_judged(tmp_path):
    one, other = mask_of(seed=1), mask_of(seed=2)
    write_pair(tmp_path, "JPEGImages/2007_000001.jpg", "SegmentationClass/2007_000001.png", one)
    write_mask(tmp_path / "SegmentationClassAug/2007_000001.png", one)
    write_pair(tmp_path, "JPEGImages/2008_000002.jpg", "SegmentationClassAug/2008_000002.png", other)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000001\n")
    (lists / "val.txt").write_text("2007_000001\n")
    (lists / "trainaug.txt").write_text(
        "/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png\n2007_000001\n"
    )
    assert_masks(open_masks(str(tmp_path), "train"), {"2007_000001": one, "2008_000002": other})
    assert_masks(open_masks(str(tmp_path), "test"), {"2007_000001": one})


def test_folders_without_splits_are_taken_whole_unless_lists_split_them(tmp_path):
    masks = {name: write_pair(tmp_path, f"images/{name}.png", f"masks/{name}.png") for name in ("a 1", "b", "c")}
    assert_masks(open_masks(str(tmp_path), "train"), masks)
    assert_masks(open_masks(str(tmp_path), "test"), masks)
    (tmp_path / "train.txt").write_text("a 1\nb.png\n")
    assert open_masks(str(tmp_path), "train").keys == ["a 1", "b"]
    with pytest.raises(UserError, match=r"no split 'test': there are train"):
        open_masks(str(tmp_path), "test")


def test_a_set_of_ones_own_in_the_layout_of_voc_has_its_own_classes(tmp_path):
    values = write_pair(tmp_path, "JPEGImages/my photo.jpg", "SegmentationClass/my photo.png", mode="P")
    assert_masks(open_masks(str(tmp_path)), {"my photo": values})
    assert open_masks(str(tmp_path)).classes is None
    (tmp_path / "classes.txt").write_text("0: nothing\n1: cat\n2: dog\n255: ignore\n")
    assert open_masks(str(tmp_path)).classes == ["nothing", "cat", "dog"]


def test_cityscapes_label_ids_become_training_ids_and_the_rest_is_ignored(tmp_path):
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17)
    stem = "frankfurt_000000_000294"
    image, folder = f"leftImg8bit/val/frankfurt/{stem}_leftImg8bit.png", "gtFine/val/frankfurt"
    write_pair(tmp_path, image, f"{folder}/{stem}_gtFine_labelIds.png", ids)
    write_mask(tmp_path / f"{folder}/{stem}_gtFine_color.png", ids)
    images = open_masks(str(tmp_path), "test")
    assert images.keys == [f"frankfurt/{stem}"] and images.classes == list(CITYSCAPES_CLASSES.values())
    assert len(images.classes) == 19
    training_ids = images.mask(0).ravel()
    for label, name in CITYSCAPES_CLASSES.items():
        assert images.classes[training_ids[label]] == name
    assert (training_ids == IGNORE).sum() == 34 - 19
    write_mask(tmp_path / f"{folder}/{stem}_gtFine_labelIds.png", ids + 3)
    with pytest.raises(UserError, match=r"labelIds.png holds the value 34 at 1 pixels"):
        open_masks(str(tmp_path), "val").mask(0)


def test_ade20k_counts_from_one_and_zero_does_not_count(tmp_path):
    values = np.array([[0, 1, 150]], dtype=np.uint8)
    for split in ("training", "validation"):
        write_pair(tmp_path, f"images/{split}/ADE_1.jpg", f"annotations/{split}/ADE_1.png", values)
    images = open_masks(str(tmp_path), "test")
    assert images.mask(0).tolist() == [[IGNORE, 0, 149]] and len(images.classes) == 150
    write_mask(tmp_path / "annotations/validation/ADE_1.png", values + 1)
    with pytest.raises(UserError, match="value 151"):
        open_masks(str(tmp_path), "test").mask(0)


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path):
    write_pair(tmp_path, "images/x.jpg", "masks/x.png")
    write_mask(tmp_path / "masks/x.png", mask_of((8, 12)))
    with pytest.raises(UserError, match=r"masks/x.png has 8 x 12 pixels and its image images/x.jpg.*12 x 8"):
        open_masks(str(tmp_path)).mask(0)


def test_a_value_that_is_no_class_is_refused_with_file_value_and_how_often(tmp_path):
    values = mask_of()
    values[0, :3] = 7
    write_pair(tmp_path, "images/x.jpg", "masks/x.png", values)
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    with pytest.raises(UserError, match=r"masks/x.png holds the value 7 at 3 pixels.*0 to 2"):
        open_masks(str(tmp_path)).mask(0)


def test_an_image_without_its_mask_is_refused_and_one_that_cannot_be_read_is_reported(tmp_path):
    for name in "abc":
        write_pair(tmp_path, f"images/{name}.jpg", f"masks/{name}.png")
    (tmp_path / "images/a.jpg").write_bytes(b"not a picture")
    (tmp_path / "masks/b.png").write_bytes(b"")
    images = open_masks(str(tmp_path))
    assert images.keys == ["c"] and [key for key, _ in images.unreadable] == ["a", "b"]
    assert images.unreadable[1][1].startswith("the mask: ")
    (tmp_path / "masks/c.png").unlink()
    with pytest.raises(UserError, match=r"no mask of images/c.jpg"):
        open_masks(str(tmp_path))


def test_two_images_of_one_name_are_refused(tmp_path):
    write_pair(tmp_path, "images/x.jpg", "masks/x.png")
    write_image(tmp_path / "images/x.png")
    with pytest.raises(UserError, match=r"one name, images/x.jpg and images/x.png"):
        open_masks(str(tmp_path))


def test_images_without_masks_are_told_what_is_accepted(tmp_path):
    write_image(tmp_path / "cat/x.jpg")
    with pytest.raises(UserError, match=r"no masks.*images/ and masks/"):
        open_masks(str(tmp_path))
    with pytest.raises(UserError, match="a class per image"):
        open_masks("digits")


@pytest.mark.parametrize(("text", "problem"), [("a\n\nb", "empty line"), ("a\na\n", "'a' twice"), ("\n", "no line")])
def test_a_list_of_classes_that_cannot_be_one_is_refused(tmp_path, text, problem):
    write_pair(tmp_path, "images/x.jpg", "masks/x.png")
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=problem):
        open_masks(str(tmp_path))


def png(values: np.ndarray, depth: int, kind: int = 0) -> bytes:
    """A PNG of `depth` bits per pixel, gray (0) or palette (3), written by hand."""
    height, width = values.shape
    rows = b""
    for line in values:
        bits = "".join(f"{value:0{depth}b}" for value in line.tolist())
        rows += b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
    chunks += [(b"PLTE", bytes(range(3 * 2**depth)))] if kind == 3 else []
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


GRAY, PALETTE = 0, 3  # a palette has at most 8 bits


@pytest.mark.parametrize(
    ("depth", "kind"), [*((depth, GRAY) for depth in (1, 2, 4, 8, 16)), *((depth, PALETTE) for depth in (1, 2, 4, 8))]
)
def test_numbers_are_read_as_stored_at_every_depth(depth, kind):
    if (depth, kind) == (8, PALETTE):
        values = np.arange(40).reshape(5, 8)
        picture, file = Image.fromarray(values.astype(np.uint8)), io.BytesIO()
        picture.putpalette([200] * 768)
        picture.save(file, "PNG")
        np.testing.assert_array_equal(decode_mask(file.getvalue(), "x"), values)
        return
    values = np.arange(2 ** min(depth, 12)).reshape(2, -1)
    np.testing.assert_array_equal(decode_mask(png(values, depth, kind), "x"), values)


def encoded(mode: str, values: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, kind)
    return file.getvalue()


def test_gray_saved_with_colours_or_alpha_is_taken_and_real_colours_are_not():
    values = mask_of()
    for mode in ("RGB", "RGBA", "LA"):
        np.testing.assert_array_equal(decode_mask(encoded(mode, values), "x"), values)
    with pytest.raises(UserError, match=r"m\.png is a picture in colours"):
        decode_mask(encoded("RGB", np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)), "m.png")


def test_a_lossy_mask_is_refused_and_a_damaged_one_is_unreadable():
    with pytest.raises(UserError, match="JPEG or WebP"):
        decode_mask(encoded("L", mask_of(), "JPEG"), "x")
    with pytest.raises(Unreadable):
        decode_mask(encoded("L", mask_of((200, 200)))[:-60], "x")


def test_masks_in_memory_are_checked_too():
    images = np.zeros((2, 4, 5, 3), np.uint8)
    with pytest.raises(UserError, match=r"give uint8 \(2, 4, 5\)"):
        ArrayMasks("mine", images, np.zeros((2, 5, 4), np.uint8), ["a", "b"])
    wrong = ArrayMasks("mine", images, np.full((2, 4, 5), 2, np.uint8), ["a", "b"])
    with pytest.raises(UserError, match="value 2 at 20 pixels"):
        wrong.mask(0)


def test_shapes_are_known_by_construction():
    train, test = open_masks("shapes"), open_masks("shapes", "test")
    assert len(train) == 400 and len(test) == 100 and train.classes[0] == "background"
    assert not set(train.ids.tolist()) & set(test.ids.tolist())
    assert set(np.unique(train.mask(0))) <= {0, 1, 2, 3}


def test_camvid_opens_as_its_readme_says(shared_data):
    train, val = (open_masks(f"{shared_data}/camvid.tar::camvid", split) for split in ("train", "test"))
    assert (len(train), len(val), len(train.classes)) == (367, 101, 11)
    assert train.classes[3] == "road" and train.keys[0] == "0001TP_006690"
    counts = sum(np.bincount(train.mask(row).ravel(), minlength=256) for row in range(0, 367, 10))
    assert counts[:11].sum() + counts[IGNORE] == counts.sum() and 0.2 < counts[3] / counts.sum() < 0.4
