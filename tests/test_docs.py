"""The pages' pictures are there, and anybody can draw them from photos of their own."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).resolve().parents[1] / "docs"
METHODS = ["coke", "jigclu", "mejigclu", "smog", "swav"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_page_shows_its_picture(method: str):
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (DOCS / "methods" / f"{method}.md").read_text())
    path = DOCS / "methods" / picture
    assert path.stat().st_size < 150_000
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_every_photo_has_a_licence():
    named = (DOCS / "pictures" / "LICENCES.md").read_text()
    assert all(f"photos/{photo.name}" in named for photo in (DOCS / "pictures" / "photos").iterdir())


def test_pictures_are_drawn_from_any_folder_of_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos").mkdir()
    for number, shape in enumerate([(61, 80, 3), (90, 47, 3)]):
        noise = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.setattr(sys, "argv", ["draw.py", "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "out")])
    runpy.run_path(str(DOCS / "draw.py"), run_name="__main__")
    for method in METHODS:
        ElementTree.parse(tmp_path / "out" / f"{method}.svg")
