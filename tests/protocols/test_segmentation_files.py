"""Segmentation on files as people have them: figures are those of a count over the user's masks and the saved ones."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tessella.data.masks.layouts import open_masks
from tessella.data.sources.scenes import SIDE, draw_scenes
from tessella.protocols.segmentation.data import SegmentationData
from tessella.protocols.segmentation.protocol import segmentation
from tests.protocols.test_detection_files import NAMES, write_image
from tests.protocols.test_segmentation import TINY, resnet


def class_numbers(scene):
    """0 for the background, then the shapes; a border that does not count."""
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for shape, label in zip(scene.masks, scene.labels, strict=True):
        mask[shape] = label + 1
    mask[0] = mask[-1] = mask[:, 0] = 255
    return mask


def write_mask(path, mask, kind):
    """Gray, 16-bit gray, a palette, or gray saved with three channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    palette = Image.fromarray(mask).copy()
    palette.putpalette([(7 * value) % 256 for value in range(768)])
    colours = Image.fromarray(np.repeat(mask[..., None], 3, axis=-1))
    [Image.fromarray(mask), Image.fromarray(mask.astype(np.uint16)), palette, colours][kind % 4].save(path)


def write_folders(root):
    for split, rows in (("train", range(6)), ("val", range(20, 26))):
        for i, scene in enumerate(draw_scenes(np.array(rows))):
            name = f"{NAMES[i % len(NAMES)]} {i}.png"
            write_image(root / "images" / split / name, scene.pixels, i)
            write_mask(root / "masks" / split / name, class_numbers(scene), i)
    (root / "classes.txt").write_text("ground\nrön d\nsquare\ntriangle\nnever\n", encoding="utf-8")


def write_voc(root):
    for split, rows in (("train", range(5)), ("val", range(20, 23))):
        names = [f"{split} ü ({i})" for i in range(len(rows))]
        for i, (name, scene) in enumerate(zip(names, draw_scenes(np.array(rows)), strict=True)):
            write_image(root / "JPEGImages" / f"{name}.png", scene.pixels, i)
            write_mask(root / "SegmentationClass" / f"{name}.png", class_numbers(scene), 2)
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names), encoding="utf-8")
    write_image(root / "JPEGImages" / "without a mask, and in no list.png", scene.pixels, 0)


@pytest.mark.parametrize(("layout", "classes", "judged"), [(write_folders, 5, 6), (write_voc, 4, 3)])
def test_figures_are_those_of_a_count_over_the_files(tmp_path, layout, classes, judged):
    root, out = tmp_path / "set [1] ü", tmp_path / "out"
    layout(root)
    train, test = (open_masks(str(root), split) for split in ("train", "test"))
    config = replace(TINY, iterations=20, lr=0.1)
    scores = segmentation(resnet(), SegmentationData(train, test, workers=1, predictions=out), config)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    with (out / "segmentation/files.csv").open(newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == judged
    for line in listed:
        truth, found = (
            np.asarray(Image.open(path)).reshape(SIDE, SIDE, -1)[..., 0].astype(np.int64)
            for path in (root / line["mask"], out / "segmentation" / line["prediction"])
        )
        counted = truth != 255
        np.add.at(confusion, (truth[counted], found[counted]), 1)
    right, union = np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    assert scores["miou"] == pytest.approx((right[union > 0] / union[union > 0]).mean())
    assert scores["pixel_accuracy"] == pytest.approx(right.sum() / confusion.sum())
    assert scores["images"] == judged and scores["classes"] == classes and 0 < scores["miou"] < 1
