"""Properties of our own parsers: whatever bytes they are given, they read or refuse them, and nothing else happens.

More examples: `TESSELLA_FUZZ=5000 pytest tests/reliability/test_hostile_parsers.py`, or `tests/reliability/fuzz.py`.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tessella.data.sources import open_images
from tessella.text import cell, printable
from tests.reliability.hostile_files import photo
from tests.reliability.parsers import REFUSALS, Target, targets

EXAMPLES = int(os.environ.get("TESSELLA_FUZZ", 40))
pytestmark = pytest.mark.timeout(120 + EXAMPLES)

tuned = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 100,  # the quick set is the same everywhere
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
NUMBERS = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"9" * 30,
    b"-1",
    b"NaN",
]
pieces = st.one_of(
    st.binary(max_size=6), st.sampled_from([*NUMBERS, b"1e999", b'"', b"[", b"{", b"<", b"&", b"\n", b","])
)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), pieces), min_size=1, max_size=6)


def edited(seed: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """`seed` with some bytes replaced, taken out or put in; a replacement of all that follows cuts it."""
    for place, length, piece in changes:
        at = int(place * len(seed))
        seed = seed[:at] + piece + (b"" if length == 8 else seed[at + length :])
    return seed


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("parsers"))


NAMES = [
    "image",
    "orientation",
    "tar",
    "csv list",
    "parquet list",
    "label map",
    "COCO",
    "mask",
    "VOC",
    "index",
    "manifest",
]
NAMES += ["configuration", "YAML"]


def test_every_target_is_tested_and_reads_its_examples(prepared):
    assert set(prepared) == set(NAMES)
    for target in prepared.values():
        for seed in target.seeds:
            target.run(seed)


@pytest.mark.parametrize("name", NAMES)
def test_changed_bytes_are_read_or_refused(name, prepared):
    target = prepared[name]

    @tuned
    @given(st.sampled_from(target.seeds), edits)
    def holds(seed: bytes, changes: list[tuple[float, int, bytes]]) -> None:
        try:
            target.run(edited(seed, changes))
        except REFUSALS as error:
            assert str(error).strip()

    holds()


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_read_or_refused(name, prepared):
    target = prepared[name]

    @tuned
    @given(st.binary(max_size=600))
    @example(b"")
    def holds(data: bytes) -> None:
        try:
            target.run(data)
        except REFUSALS as error:
            assert str(error).strip()

    holds()


def odd_text() -> st.SearchStrategy[str]:
    return st.text(st.characters(codec=None, exclude_categories=[]), max_size=40)  # lone surrogates too


@tuned
@given(odd_text())
def test_what_is_shown_is_printable_and_a_cell_is_no_formula(text: str):
    printable(text).encode("utf-8")
    shown = cell(text)
    assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in printable(text) + shown)
    if shown.lstrip()[:1] in ("=", "+", "-", "@"):
        float(shown)  # a number is no formula


@tuned
@given(st.lists(st.binary(min_size=1, max_size=40), unique=True, max_size=8))
def test_names_of_any_bytes_survive_the_index(tmp_path_factory: pytest.TempPathFactory, names: list[bytes]):
    root = tmp_path_factory.mktemp("names")
    good = {name.replace(b"/", b"_").replace(b"\0", b"_").lstrip(b".") + b".jpg" for name in names} - {b".jpg"}
    for name in good | {b"one.jpg"}:
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(photo())
    images = open_images(str(root), cache=root / ".cache")
    keys = {images.key(row).encode("utf-8", "surrogateescape") for row in range(len(images))}
    assert keys == good | {b"one.jpg"}
