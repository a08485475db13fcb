"""Data sets of other libraries: read if they are there, fetched if not, explained if neither."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tessella.data import decode as decode_module
from tessella.data.sources import open_images
from tessella.errors import UserError
from tests.data.pictures import keys


def test_a_torchvision_set_is_opened_from_disk_and_downloaded_only_if_absent(monkeypatch):
    import torchvision

    asked: list[bool] = []

    class Fake:
        classes = ("zero", "one")
        absent, offline = False, True

        def __init__(self, root: str, split: str, download: bool) -> None:
            asked.append(download)
            if self.absent and not download:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            if self.offline and download:
                raise OSError("Name or service not known")
            self.data = np.arange(4 * 3 * 5 * 6, dtype=np.uint8).reshape(4, 3, 5, 6)
            self.labels = np.array([0, 1, 1, 0])

    monkeypatch.setattr(torchvision.datasets, "SVHN", Fake)
    images = open_images("svhn::test", labels=True)
    assert asked == [False] and images.classes == ["zero", "one"] and images.labels.tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(images.image(2), Fake("", "test", False).data[2].transpose(1, 2, 0))
    Fake.absent = True
    with pytest.raises(UserError, match=r"cannot be downloaded.*TESSELLA_DATA"):
        open_images("svhn")
    Fake.offline = False
    assert len(open_images("svhn")) == 4
    with pytest.raises(UserError, match="svhn::train, svhn::test, svhn::extra"):
        open_images("svhn::unlabeled")


def test_hugging_face_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=re.escape("pip install 'tessella[huggingface]'")):
        open_images("hf:cifar10")


def test_hugging_face_images_are_read_from_the_column_of_that_type(monkeypatch, folder):
    hub = pytest.importorskip("datasets")
    files = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    table = hub.Dataset.from_dict({"text": ["a", "b"], "photo": files, "label": [1, 0]}).cast_column(
        "photo", hub.Image()
    )
    table = table.cast_column("label", hub.ClassLabel(names=["cat", "dog"]))
    monkeypatch.setattr(hub, "load_dataset", lambda name, split: table)
    images = open_images("hf:someone/something::validation", labels=True)
    assert keys(images) == ["validation/000000000", "validation/000000001"]
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [1, 0]
    for row in range(2):
        np.testing.assert_array_equal(images.image(row), decode_module.decode(Path(files[row]).read_bytes()))
