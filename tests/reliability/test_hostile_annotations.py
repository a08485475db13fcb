"""Lists and annotation files that lie: refused in a sentence, whatever is in them, and no other file is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tessella.data.boxes.layouts import open_annotations
from tessella.data.label_map import read_label_map
from tessella.data.sources import open_images
from tessella.errors import UserError
from tests.data.test_annotations import coco_document, write_coco, write_voc
from tests.reliability.audit import nothing_started
from tests.reliability.hostile_files import photo

pytestmark = pytest.mark.timeout(60)  # what hangs fails

BIG = 10**400


def refused(data: Path, split: str = "train") -> str:
    with nothing_started(), pytest.raises(UserError) as caught:
        open_annotations(str(data), split)
    assert len(str(caught.value)) < 5000
    return str(caught.value)


COCO: dict[str, Any] = {
    "a box of endless whole numbers": lambda d: d["annotations"][0].update(bbox=[1, 2, BIG, 4]),
    "a box of infinity": lambda d: d["annotations"][0].update(bbox=[1, 2, float("inf"), 4]),
    "a box of texts": lambda d: d["annotations"][0].update(bbox=["1", "2", "3", "4"]),
    "a box of truths": lambda d: d["annotations"][0].update(bbox=[True, True, True, True]),
    "a box of boxes": lambda d: d["annotations"][0].update(bbox=[[1], [2], [3], [4]]),
    "a box that is a table": lambda d: d["annotations"][0].update(bbox={"0": 1, "1": 1, "2": 2, "3": 2}),
    "an area that is not a number": lambda d: d["annotations"][0].update(area=float("nan")),
    "an endless area": lambda d: d["annotations"][0].update(area=BIG),
    "a list for an image_id": lambda d: d["annotations"][0].update(image_id=[5]),
    "a table for a category_id": lambda d: d["annotations"][0].update(category_id={}),
    "a truth for a category_id": lambda d: d["annotations"][0].update(category_id=True),
    "a list for iscrowd": lambda d: d["annotations"][0].update(iscrowd=[]),
    "an image id that is a table": lambda d: d["images"][0].update(id={}),
    "a file_name that is a list": lambda d: d["images"][0].update(file_name=["a"]),
    "a width that is a text": lambda d: d["images"][0].update(width="wide"),
    "an endless width": lambda d: d["images"][0].update(width=BIG),
    "a category without end": lambda d: d["categories"][0].update(id=[[]]),
    "a category's name that is a number": lambda d: d["categories"][0].update(name=7),
    "no image there": lambda d: [i.update(file_name=f"../../../etc/{i['id']}") for i in d["images"]],
}


@pytest.mark.parametrize("lie", COCO)
def test_a_coco_file_that_lies_is_refused(lie, tmp_path):
    document = coco_document()
    COCO[lie](document)
    assert "instances_train2017.json" in refused(write_coco(tmp_path, document))


HARMLESS: dict[str, Any] = {
    "endless annotation ids": lambda d: d["annotations"][0].update(id=BIG),
    "a text for an annotation's id": lambda d: d["annotations"][0].update(id="x"),
    "a box far outside": lambda d: d["annotations"][0].update(bbox=[-1e300, -1e300, 1e300, 1e300]),
    "a negative box": lambda d: d["annotations"][0].update(bbox=[5, 5, -3, -3]),
    "a mask of nonsense": lambda d: d["annotations"][0].update(segmentation=[[1, 2, "x"]]),
    "a mask without end": lambda d: d["annotations"][0].update(segmentation=[[BIG] * 6]),
    "runs without end": lambda d: d["annotations"][0].update(segmentation={"counts": [BIG], "size": [8, 12]}),
    "runs of many characters": lambda d: d["annotations"][0].update(
        segmentation={"counts": "o" * 10**6, "size": [8, 12]}
    ),
    "a name of steering characters": lambda d: d["categories"][0].update(name="\x1b[2J\u202e<script>\ud800"),
}


@pytest.mark.parametrize("oddity", HARMLESS)
def test_what_is_odd_in_a_coco_file_but_can_be_told_is_read(oddity, tmp_path):
    document = coco_document()
    HARMLESS[oddity](document)
    data = open_annotations(str(write_coco(tmp_path, document)), "train")
    assert len(data) == 3
    for position in range(3):
        assert (data.objects(position).boxes >= 0).all() and (data.objects(position).boxes <= 12).all()
    json.dumps(data.truth(range(3), masks=True))


JSON = {
    "nesting a million deep": b"[" * 10**6,
    "objects a million deep": b'{"a":' * 10**6,
    "a number of a million digits": b'{"images": [' + b"1" * 10**6 + b"]}",
    "UTF-16": json.dumps(coco_document()).encode("utf-16"),
    "invalid UTF-8": b'{"images": "\xff\xfe"}',
    "NaN alone": b"NaN",
    "a pickle": b"\x80\x04cos\nsystem\n.",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", JSON)
def test_what_is_no_coco_json_is_refused(kind, tmp_path):
    root = write_coco(tmp_path)
    (root / "annotations/instances_train2017.json").write_bytes(JSON[kind])
    assert "not JSON" in refused(root) or "not in COCO's format" in refused(root)


def test_an_annotation_file_that_is_a_pipe_or_a_device_or_has_a_terabyte_is_not_waited_for(tmp_path):
    file = write_coco(tmp_path) / "annotations/instances_train2017.json"
    file.unlink()
    os.mkfifo(file)
    assert "not a regular file" in refused(tmp_path)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert "not a regular file" in refused(tmp_path)
    file.unlink()
    file.touch()
    os.truncate(file, 2**40)
    assert "more than the limit" in refused(tmp_path)


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(12))
BOX = b"<xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
BOX = b"<annotation><object><name>a</name><bndbox>" + BOX + b"</bndbox></object></annotation>"
XML = {
    "billion laughs": f"<!DOCTYPE a [{LAUGHS}]><annotation>&l11;</annotation>".encode(),
    "one long entity, often": f'<!DOCTYPE a [<!ENTITY e "{"x" * 50_000}">]><a>{"&e;" * 50_000}</a>'.encode(),
    "a file as an entity": b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
    "a parameter entity": b'<!DOCTYPE a [<!ENTITY % p SYSTEM "http://127.0.0.1:9/x"> %p;]><annotation/>',
    "an undeclared entity": b"<annotation>&nothing;</annotation>",
    "an unknown encoding": b'<?xml version="1.0" encoding="nonsense"?><annotation/>',
    "a codec that is no text": b'<?xml version="1.0" encoding="zip"?><annotation/>',
    "a codec of several bytes": b'<?xml version="1.0" encoding="shift_jis"?><annotation/>',
    "invalid UTF-8": b"<annotation><object><name>\xff\xfe</name></object></annotation>",
    "a half": b"<annotation><object>",
    "two roots": b"<a/><b/>",
    "zero bytes": bytes(1000),
    "a pickle": b"\x80\x04cos\nsystem\n.",
    "NaN": BOX.replace(b"1", b"nan"),
    "infinity": BOX.replace(b"2", b"1e999"),
    "an endless size": b"<annotation><size><width>" + b"9" * 5000 + b"</width><height>8</height></size></annotation>",
}


@pytest.mark.parametrize("kind", XML)
def test_a_voc_annotation_that_lies_is_refused(kind, tmp_path):
    root = write_voc(tmp_path, {"train": ["a", "b"]}, a=[], b=[("cat", 1, 1, 3, 3, 0)])
    (root / "Annotations/a.xml").write_bytes(XML[kind])
    if kind == "an endless size":
        assert len(open_annotations(str(root), "train")) == 2  # it counts as unknown
    else:
        refused(root)


def test_a_voc_annotation_nested_a_hundred_thousand_deep_is_read(tmp_path):
    root = write_voc(tmp_path, {"train": ["a", "b"]}, a=[], b=[("cat", 1, 1, 3, 3, 0)])
    (root / "Annotations/a.xml").write_bytes(b"<annotation>" + b"<a>" * 10**5 + b"</a>" * 10**5 + b"</annotation>")
    assert len(open_annotations(str(root), "train")) == 2


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../b", "..", "a\0b", "n" * 5000])
def test_a_voc_list_names_no_file_outside(name, tmp_path):
    root = write_voc(tmp_path / "voc", {"train": ["a"]}, a=[("cat", 1, 1, 3, 3, 0)])
    (tmp_path / "outside.xml").write_text("<annotation/>")
    (root / "ImageSets/Main/train.txt").write_text(name)
    refused(root)


def test_a_label_that_is_a_list_or_a_path_that_is_none_is_refused(tmp_path):
    columns = {
        "a label is a list": {"path": ["a.jpg"], "label": [[1, 2]]},
        "a label is a dict": {"path": ["a.jpg"], "label": [{"a": 1}]},
        "holds no paths": {"path": [1, 2]},
        "column 'path' holds no paths": {"path": ["a.jpg", None]},
        "column 'path' holds no": {"path": ["a" * 10**6]},
    }
    (tmp_path / "a.jpg").write_bytes(photo())
    for said, table in columns.items():
        parquet.write_table(pa.table(table), tmp_path / "list.parquet")
        with pytest.raises(UserError, match=said):
            open_images(str(tmp_path / "list.parquet"), cache=tmp_path / "cache")


def test_a_parquet_of_one_long_path_a_hundred_million_times_is_refused_not_unpacked(tmp_path):
    words = pa.array(["x" * 100_000 + ".jpg"])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 10**6, pa.int32()), words)
    file = tmp_path / "list.parquet"
    parquet.write_table(pa.table({"path": column}), file)
    assert file.stat().st_size < 10**6  # and would be a hundred gigabytes
    with pytest.raises(UserError, match="holds no paths"):
        open_images(str(file), cache=tmp_path / "cache")


LISTS: dict[str, tuple[bytes, str]] = {
    "a cell of a megabyte": (b'path,label\n"' + b"x" * 10**6 + b'.jpg",1\n', "cannot be read as csv"),
    "UTF-16": ("path,label\na.jpg,1\n".encode("utf-16"), "UTF-16"),
    "zero bytes": (b"path\na\0b.jpg\n", "no readable image|csv"),
    "devices": (b"path\n/dev/zero\n/dev/tty\n/proc/self/mem\n", "no readable image"),
    "the list itself": (b"path\nlist.csv\n", "no readable image"),
    "folders": (b"path\n.\n..\n/\n", "no readable image"),
    "formulas": (b"path\n=cmd|' /C calc'!A0.jpg\n", "none of its 1 files is there"),
    "steering": (b"path\n\x1b[2J\xe2\x80\xae.jpg\n", "none of its 1 files is there"),
    "a name of 100000": (b"path\n" + b"n" * 100_000 + b".jpg\n", "none of its 1 files is there"),
    "two labels": (b"path,label\na.jpg,1\na.jpg,2\n", "two labels"),
    "no image": (b"\x89PNG\r\n\x1a\n" * 9, "."),
    "a parquet": (b"PAR1" + bytes(100), "."),
}


@pytest.mark.parametrize("lie", LISTS)
def test_a_list_that_lies_is_refused_in_a_clean_sentence(lie, tmp_path):
    content, said = LISTS[lie]
    (tmp_path / "a.jpg").write_bytes(photo())
    (tmp_path / "list.csv").write_bytes(content)
    with nothing_started(), pytest.raises(UserError, match=said) as caught:
        open_images(str(tmp_path / "list.csv"), cache=tmp_path / "cache")
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)


def test_labels_of_wild_numbers_are_names(tmp_path):
    (tmp_path / "a.jpg").write_bytes(photo())
    for label in ("1e999", "-5", "9" * 6000, "0x7f", "=1+1", "nan", "\u0661"):
        (tmp_path / "list.csv").write_text(f"path,label\na.jpg,{label}\n")
        try:
            images = open_images(str(tmp_path / "list.csv"), labels=True, cache=tmp_path / "cache")
        except UserError as error:
            assert "no class" in str(error)
        else:
            assert len(images.classes or []) <= 10**6 + 1


@pytest.mark.parametrize("content", [b"a," + b"x" * 10**6, b"\xff\xfe\0a\0,", b"a,b,c", b"a\n", b""])
def test_a_label_map_that_lies_is_refused(content, tmp_path):
    (tmp_path / "map.csv").write_bytes(content)
    with pytest.raises(UserError):
        read_label_map(tmp_path / "map.csv")
