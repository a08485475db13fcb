"""A list gives the files that it names, with the labels that it gives them."""

from __future__ import annotations

import contextlib
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


def test_the_users_own_list_may_name_any_path(folder, tmp_path):
    write_image(tmp_path / "beside/one.png")
    (folder / "list.csv").write_text(f"path\n../beside/one.png\n{tmp_path}/beside/../beside/one.png\n./cat/a.jpg\n")
    assert len(open_images(str(folder / "list.csv"))) == 3


def test_a_list_none_of_whose_files_is_there_says_where_it_looked_and_in_which_column(folder):
    (folder / "list.csv").write_text("id,photo,species\n17,cat/a.jpg,cat\n18,dog/a.jpg,dog\n")
    looked = (
        r"none of its 2 files is there; the first was looked for at .*/17\. Paths come from the column 'id' of id, "
    )
    with pytest.raises(UserError, match=looked + "photo, species: .* called path, file, image or filename$"):
        open_images(str(folder / "list.csv"))


def test_a_file_that_a_list_named_in_vain_is_found_when_it_is_there(folder):
    (folder / "list.csv").write_text("path\ncat/a.jpg\nlater.png\n")
    assert [key for key, _ in open_images(str(folder / "list.csv")).unreadable] == ["later.png"]
    write_image(folder / "later.png")
    assert len(open_images(str(folder / "list.csv"))) == 2


def test_a_damaged_parquet_list_is_refused_whatever_is_damaged(folder):
    import pyarrow
    import pyarrow.parquet

    path = folder / "list.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"path": ["cat/a.jpg", "dog/a.jpg"] * 50, "label": [0, 1] * 50}), path)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for place in random.integers(len(content), size=3):
            content[place] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            open_images(str(path))
