"""From a folder of images to labels and a classifier, as a user goes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tessella
from tessella.atlas import explore as stages
from tessella.atlas.folder import Atlas
from tessella.atlas.names import names_document
from tessella.cli import main
from tests.atlas.photos import patches, save

NETWORK = "random:resnet10?stem=small&width=16&size=32"
FILES = ("images.parquet", "clusters.json", "centres.npy", "neighbours.npy", "copies.npy", "places.npy")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 pictures of two colours each, 12 of them red; copies, a damaged file, hostile names."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    pictures = {f"plain/{i:02d}": picture for i, picture in enumerate(patches(68))}
    for i in range(12):
        tinted = np.asarray(pictures[f"plain/{i + 20:02d}"]).astype(np.float32) * (1.0, 0.15, 0.1)
        pictures[f"red/{i:02d}"] = Image.fromarray(tinted.astype(np.uint8))
    pictures["=1+1"] = pictures["plain/40"]
    pictures["<img src=x onerror=alert(1)>"] = pictures["plain/41"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    save(folder, pictures)
    (folder / "damaged.png").write_bytes((folder / "plain" / "00.png").read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def atlas(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("atlas") / "photos.atlas"
    assert tessella.explore(photos, out=out, backbone=NETWORK, clusters=6) == out / "atlas.html"
    return out


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_names(atlas: Path, *events: dict[str, object]) -> Path:
    path = atlas.parent / "names.json"
    revision = json.loads((atlas / "clusters.json").read_text())["revision"]
    path.write_text(json.dumps(names_document("x", revision, events)))
    return path


def red_and_others(atlas: Path) -> list[dict[str, object]]:
    table = pq.read_table(atlas / "images.parquet").to_pydict()
    red = [str(number) for key, number in zip(table["key"], table["id"], strict=True) if key.startswith("red/")]
    others = sorted({path.split(".")[0] for path in table["cluster"]})
    return [
        {"action": "name", "clusters": others, "name": "plain"},
        {"action": "label", "images": red, "name": "red"},
    ]


def test_an_atlas_has_a_row_for_each_readable_image_and_a_page(atlas, photos):
    table = pq.read_table(atlas / "images.parquet").to_pydict()
    assert len(table["key"]) == 82 and "damaged.png" not in table["key"]
    assert {"cluster", "distance", "margin", "typicality", "outlier_score", "x", "y"} <= set(table)
    group = dict(zip(table["key"], table["copy_group"], strict=True))
    exact = dict(zip(table["key"], table["exact_copy_group"], strict=True))
    assert group["=1+1.png"] == group["plain/40.png"] >= 0 and exact["=1+1.png"] == exact["plain/40.png"] >= 0
    assert group["<img src=x onerror=alert(1)>.png"] == group["plain/41.png"] >= 0
    assert exact["plain/41.png"] == -1
    page = (atlas / "atlas.html").read_text()
    assert "<img src=x" not in page and "damaged.png" in page


def test_the_same_command_does_nothing_again(atlas, photos, monkeypatch):
    before = {name: (atlas / name).read_bytes() for name in FILES}
    for name in ("neighbours", "find_copies", "extract"):
        monkeypatch.setattr(stages, name, lambda *args, **options: pytest.fail("done already"))
    tessella.explore(photos, out=atlas, backbone=NETWORK, clusters=6)
    assert {name: (atlas / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("stage", ["extract", "neighbours", "find_copies", "write_array", "write_table"])
def test_an_atlas_that_was_stopped_goes_on_to_the_same_result(atlas, photos, tmp_path, monkeypatch, stage):
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            tessella.explore(photos, out=tmp_path / "atlas", backbone=NETWORK, clusters=6)
    assert (tmp_path / "atlas" / "atlas.html").exists()  # of the first stage
    tessella.explore(photos, out=tmp_path / "atlas", backbone=NETWORK, clusters=6)
    for name in FILES:
        assert (tmp_path / "atlas" / name).read_bytes() == (atlas / name).read_bytes(), name


def test_names_become_labels_folders_and_a_classifier_that_finds_what_is_wrong(atlas, photos, tmp_path, capsys):
    names = write_names(atlas, *red_and_others(atlas))
    found = tessella.label(atlas, names=names, out=tmp_path / "labels.csv", folders=tmp_path / "sorted")
    assert found.classes == {"plain": 70, "red": 12}
    rows = read_csv(tmp_path / "labels.csv")
    assert {row["label"] for row in rows if row["path"].startswith("red/")} == {"red"}
    assert {"'=1+1.png", "<img src=x onerror=alert(1)>.png"} <= {row["path"] for row in rows}
    links = sorted((tmp_path / "sorted" / "red").iterdir())
    assert len(links) == 12 and links[0].resolve() == (photos / "red" / "00.png").resolve()
    # One red image is called plain: the classifier points at it.
    text = (tmp_path / "labels.csv").read_text().replace("red/03.png,red", "red/03.png,plain")
    (tmp_path / "labels.csv").write_text(text)
    learned = tessella.classify(atlas, out=tmp_path / "reds", labels=tmp_path / "labels.csv")
    assert learned.accuracy > 0.95 and learned.classes == ["plain", "red"]
    suspects = read_csv(tmp_path / "reds" / "suspects.csv")
    assert [(row["path"], row["proposed"]) for row in suspects][:1] == [("red/03.png", "red")]
    assert "red/03.png" in (tmp_path / "reds" / "classifier.html").read_text()
    predictions = read_csv(tmp_path / "reds" / "cross-validated.csv")
    assert np.mean([row["label"] == row["predicted"] for row in predictions]) == pytest.approx(learned.accuracy)
    # New images: the same picture is where it was, and gets its class.
    assert main(["assign", str(tmp_path / "reds"), str(photos), "--out", str(tmp_path / "new.parquet")]) == 0
    new = pq.read_table(tmp_path / "new.parquet").to_pydict()
    old = pq.read_table(atlas / "images.parquet").to_pydict()
    assert new["key"] == old["key"] and new["cluster"] == old["cluster"]
    np.testing.assert_allclose(new["distance"], old["distance"], atol=1e-4)
    named = dict(zip(new["key"], new["most_probable"], strict=True))
    assert [key for key, name in named.items() if key.startswith("red/") and name != "red"] in ([], ["red/03.png"])
    assert "82 images" in capsys.readouterr().out


def test_select_gives_reasons_and_neither_labelled_nor_copied_images(atlas, tmp_path):
    shutil.copytree(atlas, tmp_path / "atlas")
    (tmp_path / "atlas" / "names.json").unlink(missing_ok=True)
    atlas = tmp_path / "atlas"
    found = tessella.select(atlas, budget=16)
    assert len({pick.path for pick in found.picks}) == 16
    assert [pick.reason.split()[0] for pick in found.picks] == ["typical"] * 8 + ["borderline:"] * 4 + ["far"] * 4
    table = Atlas.open(atlas).table("key", "copy_group")
    group = dict(zip(table["key"], table["copy_group"].tolist(), strict=True))
    chosen = [group[pick.path] for pick in found.picks if group[pick.path] >= 0]
    assert len(chosen) == len(set(chosen))


def test_names_survive_new_images_and_another_number_of_clusters(photos, tmp_path):
    out, folder = tmp_path / "atlas", tmp_path / "photos"
    for file in photos.rglob("*.png"):
        (folder / file.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.relative_to(photos)).write_bytes(file.read_bytes())
    tessella.explore(folder, out=out, backbone=NETWORK, clusters=4)
    tessella.label(out, names=write_names(out, *red_and_others(out)), out=tmp_path / "before.csv")
    save(folder, {"new/1": patches(90)[80], "new/2": patches(90)[81]})
    tessella.explore(folder, out=out, backbone=NETWORK, clusters=7)
    after = tessella.label(out, out=tmp_path / "after.csv")
    assert after.classes["red"] == 12 and after.classes["plain"] >= 60
    kept = list(out.glob("names-*.json"))
    assert len(kept) == 1 and len(json.loads(kept[0].read_text())["events"]) == 2


def test_a_network_is_trained_where_there_is_none_and_goes_on_with_more_time(photos, tmp_path, monkeypatch, no_network):
    from tessella.atlas import network

    monkeypatch.setattr(network, "kept_networks", lambda: [])
    monkeypatch.setattr(network, "bench", lambda *args, **options: _Rates())
    out = tmp_path / "atlas"
    tessella.explore(photos, out=out, minutes=0.02)
    steps = len((out / "training" / "metrics.jsonl").read_text().splitlines())
    page = (out / "atlas.html").read_text()
    assert "expect colour and layout" in page
    hashes = Atlas.open(out).state["stages"]["features"]["key"]
    tessella.explore(photos, out=out, minutes=0.02)
    assert Atlas.open(out).state["stages"]["features"]["key"] == hashes
    tessella.explore(photos, out=out, minutes=0.04)
    assert len((out / "training" / "metrics.jsonl").read_text().splitlines()) > steps
    assert Atlas.open(out).state["stages"]["features"]["key"] != hashes


class _Rates:
    loader = step = 100.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explore", "nowhere"], "nowhere does not exist"),
        (["explore", "{photos}", "--out", "{photos}"], "is no atlas"),
        (["explore", "{photos}", "--minutes", "0"], "minutes"),
        (["explore", "{photos}", "--out", "{tmp}/a", "--backbone", "nothing"], "names no backbone"),
        (["label", "{photos}", "--out", "x.csv"], "is no atlas"),
        (["label", "{atlas}"], "give --out"),
        (["label", "{atlas}", "--names", "{tmp}/none.json", "--out", "{tmp}/x.csv"], "none.json"),
        (["classify", "{atlas}", "--out", "{photos}"], "not an empty folder"),
        (["classify", "{atlas}", "--out", "{tmp}/c", "--labels", "{tmp}/other.csv"], "none of the 1 paths"),
        (["classify", "{atlas}", "--out", "{tmp}/c", "--precision", "2"], "precision"),
        (["select", "{atlas}", "--budget", "0"], "budget"),
        (["assign", "{photos}", "{photos}", "--out", "{tmp}/x.parquet"], "is no classifier, atlas or run"),
        (["assign", "{atlas}", "{photos}", "--out", "{tmp}/x.csv"], "does not end in .parquet"),
        (["duplicates", "{photos}", "--out", "{tmp}/other.csv"], "exists already"),
    ],
)
def test_wrong_input_is_one_line(atlas, photos, tmp_path, capsys, words, message):
    (tmp_path / "other.csv").write_text("path,label\nelsewhere.png,cat\n")
    given = [word.format(photos=photos, atlas=atlas, tmp=tmp_path) for word in words]
    assert main(given) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} <= {"other.csv"}
