"""A list gives the files that it names, with the labels that it gives them."""

from __future__ import annotations

import csv
import os

import numpy as np
import pytest

from tessella.data.sources import open_images
from tessella.errors import UserError
from tests.data.pictures import assert_equal_sets, keys, write_image


def test_a_list_gives_the_files_it_names_relative_to_itself(folder, tmp_path):
    outside = write_image(tmp_path / "outside.png")
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["split", "file", "class"],
                ["x", "cat/a.jpg", "tabby"],
                ["x", "dog/wide.png", "beagle"],
                ["x", str(outside), "tabby"],
            ]
        )
    images = open_images(str(folder / "list.csv"), labels=True)
    assert set(keys(images)) == {"cat/a.jpg", "dog/wide.png", str(outside)}
    assert images.classes == ["beagle", "tabby"]
    named = {key: images.classes[label] for key, label in zip(keys(images), images.labels, strict=True)}
    assert named == {"cat/a.jpg": "tabby", "dog/wide.png": "beagle", str(outside): "tabby"}
    assert open_images(str(folder / "list.csv")).labels is None


def test_a_parquet_list_equals_the_csv_one(folder):
    import pyarrow
    import pyarrow.parquet

    paths, labels = ["dog/a.jpg", "cat/a.jpg", "cat/c.png"], [3, 0, None]
    pyarrow.parquet.write_table(pyarrow.table({"path": paths, "label": labels}), folder / "list.parquet")
    lines = [
        "path,label",
        *(f"{path},{'' if label is None else label}" for path, label in zip(paths, labels, strict=True)),
    ]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    one, other = open_images(str(folder / "list.csv")), open_images(str(folder / "list.parquet"))
    assert_equal_sets(one, other)
    np.testing.assert_array_equal(one.index.labels, [0, -1, 3])  # integers keep their value
    np.testing.assert_array_equal(other.index.labels, [0, -1, 3])
    assert one.index.classes == other.index.classes == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="no class for 1 of its 3"):
        open_images(str(folder / "list.parquet"), labels=True)


def test_a_list_without_header_or_known_column_uses_the_first_column(folder):
    (folder / "bare.csv").write_text("cat/a.jpg\ndog/a.jpg\n")
    (folder / "odd.csv").write_text("\ufefffoto\ncat/a.jpg\ndog/a.jpg\n", encoding="utf-8")
    assert keys(open_images(str(folder / "bare.csv"))) == keys(open_images(str(folder / "odd.csv")))


def test_what_a_list_names_in_vain_is_unreadable_and_contradictions_are_refused(folder):
    os.mkfifo(folder / "pipe.jpg")
    (folder / "list.csv").write_text("path,label\ncat/a.jpg,1\ngone.jpg,1\npipe.jpg,1\ncat,1\ncat/a.jpg,1\n")
    images = open_images(str(folder / "list.csv"))
    assert keys(images) == ["cat/a.jpg"]
    assert [key for key, _ in images.unreadable] == ["cat", "gone.jpg", "pipe.jpg"]
    (folder / "two.csv").write_text("path,label\ncat/a.jpg,1\ncat/a.jpg,2\n")
    with pytest.raises(UserError, match=r"cat/a\.jpg with two labels"):
        open_images(str(folder / "two.csv"))
    (folder / "broken.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_images(str(folder / "broken.parquet"))
