"""One function for every kind of source: helpful when it finds nothing, light when it is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tessella.data.boxes.layouts import open_annotations
from tessella.data.masks.layouts import open_masks
from tessella.data.sources import open_images
from tessella.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def test_what_is_not_there_is_answered_with_what_is_near_and_what_is_accepted(folder, tmp_path):
    with pytest.raises(UserError, match=r"does not exist; near it is .*pictures.*\.csv or \.parquet"):
        open_images(str(tmp_path / "picture"))
    with pytest.raises(UserError, match="near it is cifar10"):
        open_images("cifar-10")
    for name, said in (
        ("README.md", "is not a folder, list or archive that can be read. Give a folder, "),
        ("photos.zip", r"unpack it and give the folder, or pack the images as \.tar$"),
        ("list.txt", r"one path per line is read when it is called \.csv$"),
        ("cat/a.jpg", "a single image: give the folder that holds it$"),
    ):
        (folder / name).touch()
        with pytest.raises(UserError, match=said) as caught:
            open_images(str(folder / name))
        assert len(str(caught.value)) < len(str(folder / name)) + 150
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_images(str(tmp_path / "nothing"))
    (tmp_path / "nothing/bad\x1b[31m.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"has no readable image: all 1 files failed, the first is bad\\x1b\[31m\.jpg"):
        open_images(str(tmp_path / "nothing"))


def test_real_archives_open_whole(shared_data):
    small = open_images(f"{shared_data}/cifar10-small.tar.gz::cifar10-small/train", labels=True)
    assert len(small) == 5000 and small.uniform_size == (32, 32) and small.unreadable == []
    assert np.bincount(small.labels).tolist() == [500] * 10
    assert small.classes[0] == "airplane" and small.key(0) == "airplane/0000.jpg"
    photos = open_images(f"{shared_data}/imagenet-sample.tar")
    assert len(photos) == 400 and photos.uniform_size is None and photos.unreadable == []
    for row in range(0, 400, 40):
        assert photos.image(row).shape == (photos.sizes[row, 1], photos.sizes[row, 0], 3)


def test_importing_the_module_loads_no_heavy_library():
    # In a process of its own: to import the module a second time would leave two of it in this one.
    code = "import sys, tessella.data.sources; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "tessella" in loaded
    assert loaded.isdisjoint({"torch", "torchvision", "sklearn", "pyarrow", "datasets"}), loaded


@pytest.mark.parametrize(
    "name", ["x" * 300, "a/" * 3000, "with a zero \0 byte", "broken \udcff utf8", "::", "~nobody-of-this-name/x"]
)
def test_a_name_that_no_file_can_have_is_refused_in_one_line(name):
    for open_them in (open_images, open_masks, lambda data: open_annotations(data, "train")):
        with pytest.raises(UserError) as caught:
            open_them(name)
        assert "\n" not in str(caught.value) and str(caught.value).encode()
