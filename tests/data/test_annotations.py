"""Boxes and masks from COCO and VOC files: found wherever they usually lie, and refused when they lie."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tessella.data.boxes.layouts import open_annotations
from tessella.data.boxes.outlines import Broken, fold, paint, read_outline, unfold
from tessella.data.boxes.voc import parse_xml
from tessella.data.sources.scenes import draw_scenes
from tessella.errors import UserError
from tests.data.pictures import write_image

ODD_NAMES = ["plain.jpg", "two words é#%.PNG", "deep/er/gray.jpg"]
SQUARE = [[2.0, 1.0, 8.0, 1.0, 8.0, 5.0, 2.0, 5.0]]


def coco_document(names=ODD_NAMES):
    """One honest object per image of 12 x 8 pixels, ids with gaps."""
    return {
        "images": [{"id": 10 * i + 5, "file_name": name, "width": 12, "height": 8} for i, name in enumerate(names)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": i + 1, "image_id": 10 * i + 5, "category_id": 3, "bbox": [2, 1, 6, 4], "area": 24, "iscrowd": 0}
            | {"segmentation": SQUARE}
            for i in range(len(names))
        ],
    }


def write_coco(root, document=None, *, folder="train2017", json_name="annotations/instances_train2017.json"):
    for name in ODD_NAMES:
        write_image(root / folder / name)
    gray = root / folder / "deep/er/gray.jpg"
    Image.open(gray).convert("L").save(gray)
    (root / json_name).parent.mkdir(parents=True, exist_ok=True)
    (root / json_name).write_text(json.dumps(document or coco_document()), encoding="utf-8")
    return root


def write_voc(root, lists, **objects):
    """objects: image name -> [(class, xmin, ymin, xmax, ymax, difficult)]."""
    for name, found in objects.items():
        write_image(root / f"JPEGImages/{name}.jpg")
        entries = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><part><name>head</name><bndbox><xmin>1</xmin>"
            f"</bndbox></part><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
            for label, a, b, c, d, difficult in found
        )
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        (root / f"Annotations/{name}.xml").write_text(
            f"<annotation><size><width>12</width><height>8</height></size>{entries}</annotation>"
        )
    for name, names in lists.items():
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{name}.txt").write_text("".join(f"{line}\n" for line in names))
    return root


def same_objects(one, other):
    assert len(one) == len(other) and one.classes == other.classes
    for position in range(len(one)):
        a, b = one.objects(position), other.objects(position)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_coco_is_found_from_its_root_an_image_folder_its_json_and_an_archive(tmp_path):
    root = write_coco(tmp_path / "set")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(root, arcname="set")
    whole = open_annotations(str(root), "train")
    assert [whole.key(i) for i in range(3)] == ODD_NAMES and whole.image_ids == [5, 15, 25]
    assert whole.classes == ["cat", "dog"] and whole.category_ids == [7, 3] and not whole.notes
    assert whole.images.image(int(whole.rows[2])).shape == (8, 12, 3)  # gray becomes RGB
    for spec in (
        f"{root}/train2017",
        f"{root}::train2017",
        f"{root}/annotations/instances_train2017.json",
        f"{tmp_path}/set.tar::set",
        f"{tmp_path}/set.tar::set/train2017",
        f"{tmp_path}::set",
    ):
        same_objects(open_annotations(spec, "train"), whole)


def test_coco_beside_its_images_is_found_under_the_names_of_other_tools(tmp_path):
    root = write_coco(tmp_path, folder="train", json_name="train/_annotations.coco.json")
    assert len(open_annotations(str(root), "train")) == 3
    assert len(open_annotations(f"{root}/train", "test")) == 3  # a folder with one file is taken as it is


def test_the_split_decides_between_the_files_of_a_root(tmp_path):
    root = write_coco(tmp_path)
    write_coco(root, coco_document(ODD_NAMES[:1]), folder="val2017", json_name="annotations/instances_val2017.json")
    (root / "annotations/captions_val2017.json").write_text("{}")
    assert [len(open_annotations(str(root), split)) for split in ("train", "test")] == [3, 1]


def test_boxes_become_corners_and_the_truth_stays_as_the_file_has_it(tmp_path):
    document = coco_document()
    document["annotations"][1]["bbox"] = [0.1, 0.2, 0.30000000000000004, 7.7]
    data = open_annotations(str(write_coco(tmp_path, document)), "train")
    np.testing.assert_allclose(data.objects(0).boxes, [[2, 1, 8, 5]])
    truth = data.truth(range(3), masks=True)
    for said, kept in zip(document["annotations"], truth["annotations"], strict=True):
        assert {name: kept[name] for name in said} == said


def test_boxes_without_an_area_are_scored_but_not_trained_on(tmp_path):
    document = coco_document()
    for box in ([3, 3, 0, 4], [3, 3, 4, -1], [20, 1, 5, 5], [-4, 2, 100, 3]):
        number = len(document["annotations"]) + 1
        document["annotations"].append({"id": number, "image_id": 5, "category_id": 7, "bbox": box, "area": 1.0})
    data = open_annotations(str(write_coco(tmp_path, document)), "train")
    np.testing.assert_allclose(data.objects(0).boxes, [[2, 1, 8, 5], [0, 2, 12, 5]])  # the last is cut at the border
    assert len(data.truth(range(3))["annotations"]) == 7
    empty, cut = data.flaws()
    assert empty.startswith("3 boxes without an area") and cut.startswith("1 boxes that reach outside")


def test_crowds_are_not_trained_on_and_images_without_objects_are_known(tmp_path):
    document = coco_document()
    document["annotations"][0] |= {"iscrowd": 1, "segmentation": {"counts": [9, 4, 83], "size": [8, 12]}}
    del document["annotations"][2]
    data = open_annotations(str(write_coco(tmp_path, document)), "train")
    assert data.with_objects().tolist() == [1] and len(data) == 3
    assert data.truth([0], masks=True)["annotations"][0]["iscrowd"] == 1
    assert len(data.objects(0).boxes) == len(data.objects(2).boxes) == 0


def test_annotation_ids_that_pycocotools_would_misread_are_renumbered(tmp_path):
    document = coco_document()
    for i, annotation in enumerate(document["annotations"]):
        annotation["id"] = i  # from 0
    data = open_annotations(str(write_coco(tmp_path, document)), "train")
    assert data.table.ids.tolist() == [1, 2, 3] and "renumbered" in data.notes[0]


def test_missing_and_damaged_images_are_left_out_with_a_note(tmp_path):
    root = write_coco(tmp_path, coco_document([*ODD_NAMES, "gone.jpg"]))
    (root / "train2017/plain.jpg").write_bytes(b"no image")
    data = open_annotations(str(root), "train")
    assert data.image_ids == [15, 25] and len(data.table.ids) == 2
    assert "2 of 4 images" in data.notes[0] and "plain.jpg" in data.notes[0]


LIES = {
    "image_id that no image has": lambda d: d["annotations"][0].update(image_id=999),
    "category_id that no category has": lambda d: d["annotations"][0].update(category_id=1),
    "not four finite numbers": lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 4]),
    "area that is no number": lambda d: d["annotations"][0].update(area="large"),
    "iscrowd that is neither": lambda d: d["annotations"][0].update(iscrowd=2),
    "image id that is there twice": lambda d: d["images"][1].update(id=5),
    "text where others are numbers": lambda d: d["images"][1].update(id="fifteen"),
    "file_name that is there twice": lambda d: d["images"][1].update(file_name="plain.jpg"),
    "without a file_name": lambda d: d["images"][1].pop("file_name"),
    "category without an id of its own": lambda d: d["categories"][1].update(id=7),
    "another size": lambda d: d["images"][1].update(width=8, height=12),
    "no list of annotations": lambda d: d.pop("annotations"),
    "must be an object": lambda d: d["images"].append("x"),
    "none of the 3 images": lambda d: [image.update(file_name=f"x{image['id']}.jpg") for image in d["images"]],
}


@pytest.mark.parametrize("complaint", LIES)
def test_a_coco_file_that_lies_is_refused_and_the_lie_is_named(tmp_path, complaint):
    document = coco_document()
    LIES[complaint](document)
    with pytest.raises(UserError, match=complaint):
        open_annotations(str(write_coco(tmp_path, document)), "train")


def test_several_lies_are_named_at_once_with_their_counts(tmp_path):
    document = coco_document()
    for annotation in document["annotations"]:
        annotation["image_id"] = 999
    document["annotations"].append({"id": 9, "image_id": 5, "category_id": 3, "bbox": "none"})
    with pytest.raises(UserError, match=r"3 x an annotation of an image_id .*annotation 1: 999.*1 x a bbox"):
        open_annotations(str(write_coco(tmp_path, document)), "train")


@pytest.mark.parametrize("text", ["", "[]", '{"images": ', "[" * 100_000])
def test_what_is_no_coco_json_is_refused(tmp_path, text):
    root = write_coco(tmp_path)
    (root / "annotations/instances_train2017.json").write_text(text)
    with pytest.raises(UserError, match=r"is not (JSON|in COCO's format)"):
        open_annotations(str(root), "train")


def test_nothing_of_a_known_format_names_what_is_expected(tmp_path):
    write_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="annotations/instances_"):
        open_annotations(str(tmp_path), "train")
    with pytest.raises(UserError, match="check the path"):
        open_annotations(str(tmp_path / "nowhere"), "train")


def test_masks_are_counted_as_missing_only_where_they_are_needed(tmp_path):
    document = coco_document()
    document["annotations"][0] |= {"iscrowd": 1, "segmentation": []}
    document["annotations"][1]["segmentation"] = [[1, 1, 5, 5]]  # two corners: there, but broken
    data = open_annotations(str(write_coco(tmp_path, document)), "train")
    assert data.lacking_masks(with_crowd=False) == 0 and data.lacking_masks(with_crowd=True) == 1
    assert "no polygon with three" in data.notes[0]
    assert paint(data.table.outlines[1], 12, 8, (8, 12)).sum() == 0


# --- VOC


def test_voc_boxes_lose_their_count_from_one_and_difficult_objects_are_trained_on(tmp_path):
    root = write_voc(
        tmp_path, {"train": ["a", "b"], "val": ["b"]}, a=[("dog", 1, 1, 12, 8, 0)], b=[("cat", 3, 2, 3, 2, 1)]
    )
    data = open_annotations(str(root), "train")
    assert data.classes == ["cat", "dog"]
    np.testing.assert_allclose(data.objects(0).boxes, [[0, 0, 12, 8]])
    np.testing.assert_allclose(data.objects(1).boxes, [[2, 1, 3, 2]])  # one pixel
    assert [a["iscrowd"] for a in data.truth([0, 1])["annotations"]] == [0, 1]
    assert len(open_annotations(str(root), "test")) == 1


def test_voc_years_are_joined_as_in_the_papers(tmp_path):
    one = ("dog", 1, 1, 5, 5, 0)
    write_voc(tmp_path / "VOC2007", {"trainval": ["a", "b"], "test": ["c"]}, a=[one], b=[one], c=[one])
    write_voc(tmp_path / "VOC2012", {"train": ["a"], "val": ["d"], "trainval": ["a", "d"]}, a=[one], d=[one])
    kit = str(tmp_path)
    assert [open_annotations(kit, split).images is not None for split in ("train", "test")]
    assert len(open_annotations(kit, "train")) == 4 and len(open_annotations(kit, "test")) == 1
    assert len(open_annotations(f"{kit}::VOC2012", "train")) == 1  # no test list: train and val
    assert len(open_annotations(f"{kit}::VOC2007/trainval+VOC2012/val", "test")) == 3
    with tarfile.open(tmp_path / "kit.tar", "w") as tar:
        tar.add(tmp_path / "VOC2007", arcname="VOCdevkit/VOC2007")
        tar.add(tmp_path / "VOC2012", arcname="VOCdevkit/VOC2012")
    same_objects(open_annotations(f"{kit}/kit.tar::VOCdevkit", "train"), open_annotations(kit, "train"))


def test_voc_lists_of_single_classes_and_names_with_spaces_are_read(tmp_path):
    one = ("dog", 1, 1, 5, 5, 0)
    root = write_voc(tmp_path / "V", {"train": ["a -1", "two words"]}, **{"a": [one], "two words": [one]})
    data = open_annotations(str(root), "train")
    assert [data.key(i) for i in range(2)] == ["JPEGImages/a.jpg", "JPEGImages/two words.jpg"]


@pytest.mark.parametrize(
    ("xml", "complaint"),
    [
        ("<annotation><object><name>x</name></object></annotation>", "not four finite numbers"),
        ("<annotation><object><bndbox/></object></annotation>", "without a name"),
        ("<annotation><size><width>8</width><height>12</height></size></annotation>", "another size"),
        ("<annotation>", "no XML"),
        ('<!DOCTYPE a [<!ENTITY e "boom">]><annotation>&e;</annotation>', "entities"),
        ('<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>', "entities"),
    ],
)
def test_a_voc_file_that_lies_is_refused(tmp_path, xml, complaint):
    root = write_voc(tmp_path, {"train": ["a"]}, a=[])
    (root / "Annotations/a.xml").write_text(xml)
    with pytest.raises(UserError, match=complaint):
        open_annotations(str(root), "train")


def test_a_listed_image_without_an_annotation_is_refused(tmp_path):
    root = write_voc(tmp_path, {"train": ["a", "b"]}, a=[])
    with pytest.raises(UserError, match="without an annotation"):
        open_annotations(str(root), "train")


def test_xml_text_is_what_the_standard_parser_reads():
    assert parse_xml(b"<a><b>x &amp; \xc3\xa9</b></a>").findtext("b") == "x & é"


# --- Masks


def test_runs_and_masks_are_inverse():
    random = np.random.default_rng(0)
    for mask in (random.random((5, 7)) > 0.5, np.zeros((3, 4), bool), np.ones((3, 4), bool)):
        np.testing.assert_array_equal(unfold(fold(mask), mask.shape[1], mask.shape[0]), mask)


def test_runs_as_list_and_as_text_agree_with_pycocotools():
    from pycocotools import mask as coder

    mask = np.random.default_rng(1).random((40, 33)) > 0.7
    text = coder.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    as_text = read_outline({"counts": text, "size": [40, 33]}, 33, 40)
    as_list = read_outline({"counts": fold(mask).tolist(), "size": [40, 33]}, 33, 40)
    np.testing.assert_array_equal(as_text, fold(mask))
    np.testing.assert_array_equal(as_list, fold(mask))


@pytest.mark.parametrize(
    "lie",
    [
        {"counts": [1, 2], "size": [8, 12]},
        {"counts": [-4, 100], "size": [8, 12]},
        {"counts": [96], "size": [12, 8]},
        {"counts": "~~~", "size": [8, 12]},
        {"counts": "oo", "size": [8, 12]},
        {"counts": None, "size": [8, 12]},
        [[1, 2, 3]],
        [["a"]],
        [[1, 2, 3, 4, float("inf"), 6]],
        [[0, 0, 1e12, 0, 5, 5]],
        "text",
    ],
)
def test_a_mask_that_lies_is_broken_and_never_reaches_foreign_code(lie):
    with pytest.raises(Broken):
        read_outline(lie, 12, 8)


def test_a_polygon_is_painted_at_the_size_of_the_resized_image():
    outline = read_outline(SQUARE, 12, 8)
    assert paint(outline, 12, 8, (8, 12)).sum() == 24
    large = paint(outline, 12, 8, (80, 120))
    assert large[10:50, 20:80].all() and large.sum() == 2400
    runs = fold(paint(outline, 12, 8, (8, 12)))
    np.testing.assert_array_equal(paint(runs, 12, 8, (16, 24)).reshape(8, 2, 12, 2)[:, 0, :, 0], unfold(runs, 12, 8))


# --- Generated and real data


def test_generated_scenes_know_their_boxes_and_masks_and_do_not_change():
    train, test = (open_annotations("shapes", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (400, 100) and train.classes == ["circle", "square", "triangle"]
    assert train.lacking_masks(with_crowd=True) == 0 and not train.flaws()
    scene = draw_scenes(np.array([3]))[0]
    boxes, labels, outlines = train.objects(3)
    np.testing.assert_array_equal(train.images.image(3), scene.pixels)
    np.testing.assert_array_equal(labels, scene.labels)
    for box, outline, mask in zip(boxes.astype(int), outlines, scene.masks, strict=True):
        np.testing.assert_array_equal(unfold(outline, 128, 128), mask)
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()


def test_coco_mini_is_read_whole_from_its_archive(shared_data):
    train, test = (open_annotations(f"{shared_data}/coco-mini.tar::coco-mini", split) for split in ("train", "test"))
    assert (len(train), len(train.table.ids), int(train.table.crowd.sum())) == (80, 739, 8)
    assert (len(test), len(test.table.ids), int(test.table.crowd.sum())) == (79, 624, 5)
    assert train.lacking_masks(True) == test.lacking_masks(True) == 0
    assert not (train.notes or test.notes or train.flaws())
