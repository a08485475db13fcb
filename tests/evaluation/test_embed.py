import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import tessella.evaluation.embed as module
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.evaluation.embed import embed
from tessella.modules.backbone import BackboneConfig
from tessella.protocols.features import extract
from tessella.weights.resolve import Loaded, weights_sha256
from tests.protocols.planted import Tiny, planted_images

LOADED = Loaded(Tiny(), BackboneConfig("resnet10"), EvalTransform.of(8), None, "tiny")


def expected(n):
    return extract(Tiny(), planted_images(n), EvalTransform.of(8), workers=1).x.numpy()


def test_npy_holds_the_features_beside_keys_and_ids(tmp_path):
    images = planted_images(10)
    embed(LOADED, images, tmp_path / "new" / "x.npy", device="cpu", workers=1)
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "x.npy", allow_pickle=False), expected(10))
    assert np.load(tmp_path / "new" / "x.ids.npy").tolist() == list(images.ids)
    assert (tmp_path / "new" / "x.keys.txt").read_text().splitlines() == [images.key(row) for row in range(10)]
    assert len(list((tmp_path / "new").iterdir())) == 3


@pytest.mark.parametrize("labels", [False, True])
def test_parquet_holds_keys_ids_and_features_of_any_number_of_row_groups(tmp_path, monkeypatch, labels):
    monkeypatch.setattr(module, "_ROW_GROUP", 4)
    images = planted_images(10)
    embed(LOADED, images, tmp_path / "x.parquet", labels=labels, device="cpu", workers=1)
    table = pq.read_table(tmp_path / "x.parquet")
    np.testing.assert_array_equal(np.array(table["feature"].to_pylist(), dtype=np.float32), expected(10))
    assert table["key"].to_pylist() == [images.key(row) for row in range(10)]
    assert table["id"].to_pylist() == list(images.ids)
    assert table.column_names == ["key", "id", *(["label"] if labels else []), "feature"]
    if labels:
        assert table["label"].to_pylist() == [str(row % 3) for row in range(10)]
    origin = json.loads(table.schema.metadata[b"tessella"])
    assert origin["weights"] == weights_sha256(Tiny()) and origin["fingerprint"] == images.fingerprint


def test_strange_names_are_written_escaped(tmp_path, monkeypatch):
    images, names = planted_images(3), ["a\nb", "c\\d", "e\udcff"]
    monkeypatch.setattr(images, "key", lambda row: names[row])
    embed(LOADED, images, tmp_path / "x.npy", device="cpu", workers=1)
    assert (tmp_path / "x.keys.txt").read_text().splitlines() == ["a\\nb", "c\\\\d", "e\\udcff"]
    embed(LOADED, images, tmp_path / "x.parquet", device="cpu", workers=1)
    assert pq.read_table(tmp_path / "x.parquet")["key"].to_pylist() == ["a\nb", "c\\d", "e\\udcff"]


@pytest.mark.parametrize("name", ["x.npy", "x.keys.txt", "x.ids.npy"])
def test_an_existing_file_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} exists already"):
        embed(LOADED, planted_images(3), tmp_path / "x.npy", device="cpu", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match="No space left"):
        embed(LOADED, planted_images(3), tmp_path / "x.parquet", device="cpu", workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "labels", "message"), [("x.csv", False, "neither"), ("x.npy", True, "labels")])
def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, name, labels, message):
    with pytest.raises(UserError, match=message):
        embed("random:nonsense", "nowhere", tmp_path / name, labels=labels)
