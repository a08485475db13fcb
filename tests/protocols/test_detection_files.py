"""Detection on files as people have them: every figure is the one that pycocotools finds in the user's own files."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tessella.data.boxes.layouts import open_annotations
from tessella.data.sources.scenes import CLASSES, SIDE, draw_scenes
from tessella.errors import UserError
from tessella.protocols.detection.data import DetectionData
from tessella.protocols.detection.protocol import detection
from tests.protocols.test_detection import TINY, tiny_backbone

NAMES = ["two words", "ü [1]", "c#100%", "-日本", "a.b.c", "sub (d)/'e'"]
CATEGORY_IDS = [90, 7, 1000]
PLACES = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}


def write_image(path, pixels, number):
    """Colours, gray, 16-bit gray, a palette, alpha or black and white, whatever comes next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    gray = image.convert("L")
    wide = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    [image, gray, wide, image.convert("P"), image.convert("RGBA"), image.convert("1")][number % 6].save(path)


def bounds(mask):
    ys, xs = np.nonzero(mask)
    return [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]


def write_coco(root, split, rows):
    """Scenes with everything that is awkward: empty images and boxes, crowds, gaps between ids, a file that is gone."""
    images, objects = [], []

    def add(image, category, box, segmentation, crowd=0):
        area = abs(box[2] * box[3])
        entry = {"id": 5 * len(objects) + 1, "image_id": image, "category_id": category, "bbox": box, "area": area}
        objects.append(entry | {"iscrowd": crowd, "segmentation": segmentation})

    for i, scene in enumerate(draw_scenes(np.array(rows))):
        name, number = f"{NAMES[i % len(NAMES)]} {i}.png", 10**12 + 7 * i
        write_image(root / split / name, scene.pixels, i)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        if i == 1:
            continue
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            x, y, w, h = bounds(mask)
            add(number, CATEGORY_IDS[label], [x, y, w, h], [[x, y, x + w, y, x + w, y + h, x, y + h]])
        add(number, 7, [9, 9, 0, 4], [[9, 9, 9, 9, 9, 13]])
        add(number, 7, [300, 9, 5, 4], [[300, 9, 305, 9, 305, 13]])
        runs = {"counts": [10 * SIDE, 20 * SIDE, (SIDE - 30) * SIDE], "size": [SIDE, SIDE]}
        add(number, 90, [10, 0, 20, SIDE], runs, crowd=1)
    images.append({"id": 3, "file_name": "gone.png", "width": 5, "height": 5})
    categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return path


def scored(truth, found, kind, images):
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(truth, truth.loadRes(str(found)), kind)
        scorer.params.imgIds = images
        scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    return scorer.stats


def assert_scores(scores, name, stats):
    for figure, place in PLACES.items():
        assert scores.get(f"{name}_{figure}", -1) == pytest.approx(stats[place], abs=1e-9), figure


def test_figures_are_those_of_the_users_own_coco_file(tmp_path):
    write_coco(tmp_path / "set (1)", "train", range(8))
    file = write_coco(tmp_path / "set (1)", "val", range(20, 27))
    train, test = (open_annotations(str(tmp_path / "set (1)"), split) for split in ("train", "test"))
    out = tmp_path / "out"
    scores = detection(tiny_backbone(), DetectionData(train, test, predictions=out), replace(TINY, masks=True))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
    there = [entry["id"] for entry in truth.dataset["images"] if entry["file_name"] != "gone.png"]
    for name, found, kind in (("box", "detections.json", "bbox"), ("mask", "masks.json", "segm")):
        assert_scores(scores, name, scored(truth, out / found, kind, there))
    assert scores["images"] == 7 and 0 < scores["box_ar100"] < 1
    notes = " ".join(scores["notes"])
    assert "6 objects of the test images have boxes without an area" in notes and "gone.png" in notes


def write_voc(root):
    """Scenes in VOC's files; every second object is difficult, one class is known to the test images alone."""
    for split, rows in (("train", range(6)), ("val", range(20, 25))):
        names = []
        for i, scene in enumerate(draw_scenes(np.array(rows))):
            name = f"{split} ü [{i}]"
            names.append(name)
            write_image(root / "JPEGImages" / f"{name}.png", scene.pixels, i)
            entries = ""
            for j, (mask, label) in enumerate(zip(scene.masks, scene.labels, strict=True)):
                x, y, w, h = bounds(mask)
                known = "lion &amp; co" if (split, i, j) == ("val", 0, 0) else CLASSES[label]
                corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True)
                sides = "".join(f"<{side}>{value}</{side}>" for side, value in corners)
                entries += (
                    f"<object><name>{known}</name><difficult>{j % 2}</difficult><bndbox>{sides}</bndbox></object>"
                )
            path = root / "Annotations" / f"{name}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"<annotation>{entries if i != 1 else ''}</annotation>", encoding="utf-8")
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names), encoding="utf-8")


def truth_of_voc(root, classes):
    """The test images' objects by the standard XML parser, numbered as the predictions are."""
    names = (root / "ImageSets/Main/val.txt").read_text(encoding="utf-8").splitlines()
    objects = []
    for image, name in enumerate(names, 1):
        for entry in ElementTree.parse(root / "Annotations" / f"{name}.xml").iter("object"):
            left, top, right, bottom = (
                int(entry.find("bndbox").find(s).text) for s in ("xmin", "ymin", "xmax", "ymax")
            )
            w, h = right - left + 1, bottom - top + 1
            objects.append({
                "id": len(objects) + 1, "image_id": image, "category_id": 1 + classes.index(entry.find("name").text),
                "bbox": [left - 1, top - 1, w, h], "area": w * h, "iscrowd": int(entry.find("difficult").text),
            })  # fmt: skip
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "width": SIDE, "height": SIDE} for i in range(1, len(names) + 1)],
        "annotations": objects,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def test_figures_are_those_of_the_users_own_voc_files(tmp_path):
    write_voc(tmp_path / "voc")
    train, test = (open_annotations(str(tmp_path / "voc"), split) for split in ("train", "test"))
    out = tmp_path / "out"
    config = replace(TINY, train_sizes=(128,), test_size=128, longest=128, post_nms=(200, 200), score_threshold=0.0)
    scores = detection(tiny_backbone(), DetectionData(train, test, predictions=out), config)
    truth = truth_of_voc(tmp_path / "voc", test.classes)
    assert_scores(scores, "box", scored(truth, out / "detections.json", "bbox", [1, 2, 3, 4, 5]))
    assert scores["images"] == 5 and 0 < scores["box_ar100"] < 1
    assert "1 classes of the test images have no training object: lion & co" in scores["notes"]
    with pytest.raises(UserError, match=r"objects have no mask.*use a recipe for boxes"):
        detection(tiny_backbone(), DetectionData(train, test), replace(TINY, masks=True))
