"""Our own parsers as functions of bytes, with good examples to start from: what the properties and the fuzzer share.

A target may refuse what it is given, with one of the errors that are meant for that; any other error is a fault.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch

from tessella.data import decode as decoding
from tessella.data.boxes.layouts import open_annotations
from tessella.data.boxes.outlines import Broken, read_outline
from tessella.data.boxes.voc import parse_xml
from tessella.data.decode import Unreadable, decode, probe, probe_with
from tessella.data.label_map import read_label_map
from tessella.data.sources import open_images
from tessella.data.sources.files import IMAGE_SUFFIXES
from tessella.data.sources.tars import walk_tar
from tessella.errors import UserError
from tessella.run import checkpoints as checkpoint_files
from tessella.run.config import load_config, to_yaml
from tessella.text import plain_yaml
from tests.data.test_annotations import coco_document, write_coco
from tests.engine.runs import tiny_run
from tests.reliability.hostile_files import encode, noise, photo, plain, rotated

LISTS = b"path,label\na.jpg,1\nb.jpg,two\n", b"a.jpg,1\n"
MASKS = b"[[1, 1, 5, 1, 5, 5]]", b'{"counts": [3, 4, 89], "size": [8, 12]}', b'{"counts": "P3", "size": [8, 12]}'
REFUSALS = (UserError, Unreadable, Broken, checkpoint_files.Damaged)


class Target(NamedTuple):
    """A parser, and the bytes to change."""

    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def targets(folder: Path) -> dict[str, Target]:
    """All of them, working below a folder of their own."""
    return {
        "image": Target(image, images()),
        "orientation": Target(orientation, tuple(rotated(number, "JPEG") for number in (3, 6, 8))),
        "tar": Target(lambda data: tar(folder, data), (a_tar(tarfile.GNU_FORMAT), a_tar(tarfile.PAX_FORMAT))),
        "csv list": Target(lambda data: a_list(folder, "csv", data), LISTS),
        "parquet list": Target(lambda data: a_list(folder, "parquet", data), (a_parquet(),)),
        "label map": Target(lambda data: label_map(folder, data), (b"class,superclass\ncat,animal\ndog,animal\n",)),
        "COCO": Target(coco(folder), (json.dumps(coco_document()).encode(),)),
        "mask": Target(mask, MASKS),
        "VOC": Target(voc, (b"<annotation><object><name>a</name></object></annotation>",)),
        "index": Target(*index(folder)),
        "manifest": Target(*manifest(folder)),
        "configuration": Target(configuration(folder), (to_yaml(tiny_run()).encode(),)),
        "YAML": Target(yaml, (b"classes: {train: a, test: b}\nprotocols:\n  knn: {k: [1, 20]}\n",)),
    }  # fmt: skip


def images() -> tuple[bytes, ...]:
    small = noise(24, 16)
    formats = [encode(small, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")]
    jpegs = [encode(small, "JPEG", progressive=True), encode(small.convert("CMYK"), "JPEG")]
    others = [encode(small, "TIFF", compression="tiff_lzw"), encode(plain().quantize(4), "GIF")]
    return *formats, *jpegs, *others, b"P3 2 1 255 1 2 3 4 5 6 "


def image(data: bytes) -> None:
    """What is decoded has the size that the header promised, and is RGB."""
    pixels = decode(data)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and min(pixels.shape) > 0
    assert probe(data) == probe_with(lambda size: data[:size], len(data)) == (pixels.shape[1], pixels.shape[0])


def orientation(data: bytes) -> None:
    """The walk over segments ends, and sees an APP1 where the whole walk sees one."""
    markers = list(decoding._jpeg_markers(data))
    assert len(markers) <= len(data)
    assert isinstance(decoding._jpeg_orientation(data), int)
    if not decoding._has_app1(data):
        head = markers[: markers.index(0xDA)] if 0xDA in markers else markers
        assert 0xE1 not in head


def a_tar(format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name in ("a.jpg", "b/" + "n" * 120 + ".jpg", "é.png"):
            info = tarfile.TarInfo(name)
            info.size = 700
            archive.addfile(info, io.BytesIO(bytes(700)))
    return buffer.getvalue()


def tar(folder: Path, data: bytes) -> None:
    """Members lie within the archive."""
    (folder / "a.tar").write_bytes(data)
    members, _ = walk_tar(str(folder / "a.tar"), IMAGE_SUFFIXES)
    for member in members:
        assert member.offset >= 0 <= member.size and member.offset + member.size <= len(data)
        assert ".." not in member.name.split("/") and not member.name.startswith("/")


def a_parquet() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"path": ["a.jpg", "b.jpg"] * 5, "label": ["x", "y"] * 5}), buffer)
    return buffer.getvalue()


def a_list(folder: Path, kind: str, data: bytes) -> None:
    """Every row has one label or none."""
    for name in ("a.jpg", "b.jpg"):
        if not (folder / name).exists():
            (folder / name).write_bytes(photo())
    (folder / f"list.{kind}").write_bytes(data)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        images = open_images(str(folder / f"list.{kind}"), labels=True, cache=Path(cache))
        assert images.labels is not None and images.classes is not None
        assert images.labels.min() >= 0 and images.labels.max() < len(images.classes)


def label_map(folder: Path, data: bytes) -> None:
    (folder / "map.csv").write_bytes(data)
    assert all(read_label_map(folder / "map.csv").values())


def coco(folder: Path) -> Callable[[bytes], None]:
    root = write_coco(folder / "coco")

    def run(data: bytes) -> None:
        (root / "annotations/instances_train2017.json").write_bytes(data)
        found = open_annotations(str(root), "train")
        for position in range(len(found)):
            width, height = found.size(position)
            boxes = found.objects(position).boxes
            assert (boxes >= 0).all() and (boxes <= (width, height) * 2).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        json.dumps(found.truth(range(len(found)), masks=True), allow_nan=False)

    return run


def mask(data: bytes) -> None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    found = read_outline(value, 12, 8)
    assert found is None or isinstance(found, tuple) or ((found >= 0).all() and found.sum() == 96)


def voc(data: bytes) -> None:
    try:
        parse_xml(data)
    except (ValueError, AssertionError):  # what the reader of annotations takes for damage
        return


def index(folder: Path) -> tuple[Callable[[bytes], None], tuple[bytes, ...]]:
    """A cached index of which one file is changed: found out, and built again."""
    pictures, cache = folder / "pictures", folder / "index cache"
    pictures.mkdir()
    for name in ("a", "b", "c"):
        (pictures / f"{name}.jpg").write_bytes(photo())
    fingerprint = open_images(str(pictures), cache=cache).fingerprint
    (built,) = cache.glob("index/*/built")
    whole = {path.name: path.read_bytes() for path in sorted(built.iterdir())}
    names = {content: name for name, content in whole.items()}

    def run(data: bytes) -> None:
        closest = min(names, key=lambda content: abs(len(content) - len(data)) + sum(map(int.__ne__, content, data)))
        for name, content in whole.items():
            (built / name).write_bytes(data if name == names[closest] else content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is damaged
            images = open_images(str(pictures), cache=cache)
        assert images.fingerprint == fingerprint
        assert [images.key(row) for row in range(len(images))] == ["a.jpg", "b.jpg", "c.jpg"]

    return run, tuple(names)


def manifest(folder: Path) -> tuple[Callable[[bytes], None], tuple[bytes, ...]]:
    """A changed manifest or state is damage, unless nothing that is meant has changed."""
    tensors = {"method": {"a": torch.arange(6.0)}, "optimizer": {"b": torch.ones(2, 3)}}
    saved = checkpoint_files.save(folder / "checkpoints", 7, tensors, {"step": 7, "fingerprints": {"data": "x"}})
    whole = {name: (saved / name).read_bytes() for name in ("manifest.json", "state.json")}

    def run(data: bytes) -> None:
        name = min(whole, key=lambda name: abs(len(whole[name]) - len(data)))
        for other, content in whole.items():
            (saved / other).write_bytes(data if other == name else content)
        found, facts = checkpoint_files.load(saved)
        assert torch.equal(found["method"]["a"], tensors["method"]["a"]) and facts["step"] == 7

    return run, tuple(whole.values())


def configuration(folder: Path) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        (folder / "config.yaml").write_bytes(data)
        to_yaml(load_config(folder / "config.yaml"))

    return run


def yaml(data: bytes) -> None:
    from yaml import YAMLError

    try:
        plain_yaml(data.decode("utf-8", "replace"))
    except (YAMLError, ValueError, RecursionError):
        return
