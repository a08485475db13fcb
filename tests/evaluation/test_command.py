"""Every protocol from the command line, and its figure again from the saved predictions by another program's scorer."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import accuracy_score, adjusted_rand_score, balanced_accuracy_score, top_k_accuracy_score

from tessella.cli import main

NETWORK = "random:resnet10?stem=small&width=4&size=16"
CLASSES = ["a cat", "dög", "fox,7"]
SQUARE, CIRCLE = 3, 9  # category ids


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path / "cache"))


def evaluate(words: str, out: Path) -> dict[str, dict[str, Any]]:
    """Records by name."""
    assert (
        main([*shlex.split(f"evaluate '{NETWORK}' --device cpu --workers 1"), *shlex.split(words), "--out", str(out)])
        == 0
    )
    return {record["protocol"]: record for record in json.loads((out / "evaluation.json").read_text())}


def predictions(out: Path, record: dict[str, Any], name: str) -> list[dict[str, str]]:
    with (out / record["predictions"] / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[str]:
    return [row[name] for row in rows]


# --- data ---------------------------------------------------------------------------------------------------


def class_folders(root: Path) -> Path:
    """Three classes of colours under noise, some images gray, names that need care."""
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 8)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.normal(60 + 50 * number, 50, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                image = Image.fromarray(pixels)
                (image.convert("L") if i % 5 == 4 else image).save(folder / f"{name} #{i}.png")
    return root


def scene(random: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[tuple[int, list[int]]]]:
    """Pixels, mask and (category, box) of one or two squares."""
    pixels = random.integers(0, 60, (48, 64, 3), dtype=np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    objects = []
    for place in range(random.integers(1, 3)):
        kind = int(random.integers(2))
        side = int(random.integers(12, 20))
        top, left = int(random.integers(2, 26)), 4 + 30 * place
        mask[top : top + side, left : left + side] = kind + 1
        pixels[top : top + side, left : left + side] = [(220, 40, 40), (40, 220, 40)][kind]
        objects.append(((SQUARE, CIRCLE)[kind], [left, top, side, side]))
    return pixels, mask, objects


def coco(root: Path) -> Path:
    """COCO's format; one box of no size, one image without objects, one gray."""
    random = np.random.default_rng(1)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 8), ("val", 6)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            pixels, _, objects = scene(random)
            name = f"photo {i} é.png"
            image = Image.fromarray(pixels)
            (image.convert("L") if i == 3 else image).save(root / split / name)
            images.append({"id": i + 1, "file_name": name, "width": 64, "height": 48})
            objects = [] if i == 4 else objects + ([(SQUARE, [5, 5, 0, 0])] if i == 1 else [])
            for category, box in objects:
                x, y, w, h = box
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i + 1, "category_id": category, "bbox": box,
                    "area": w * h, "iscrowd": 0, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                })  # fmt: skip
        categories = [{"id": SQUARE, "name": "square"}, {"id": CIRCLE, "name": "circle"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def streets(root: Path) -> Path:
    """Images and masks in folders, a border that does not count."""
    random = np.random.default_rng(2)
    for split, count in (("train", 6), ("val", 4)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels, mask, _ = scene(random)
            mask[:2] = 255
            Image.fromarray(pixels).save(root / "images" / split / f"street {i}.jpg")
            Image.fromarray(mask).save(root / "masks" / split / f"street {i}.png")
    (root / "classes.txt").write_text("ground\nred\ngreen\n")
    return root


# --- classes ------------------------------------------------------------------------------------------------


def test_every_protocol_on_class_folders_agrees_with_scikit_learn(tmp_path: Path):
    root, out = class_folders(tmp_path / "animals"), tmp_path / "out"
    data = tmp_path / "data.yaml"
    data.write_text(f"""
classes: {{train: "{root}/train", test: "{root}/test"}}
protocols:
  clustering: {{restarts: 1, seeds: [0]}}
  overclustering: {{restarts: 1, seeds: [0], clusters_per_class: 2}}
  fewlabels: {{draws: 2, labels_per_class: [1]}}
  linear-swav: {{epochs: 1}}
  linear-lr-grid: {{epochs: 1}}
  lowshot-small: {{positives: [2], draws: 1}}
  finetune-small-1: {{epochs: 1}}
  finetune-small-10: {{epochs: 1}}
  finetune-small-100: {{epochs: 1}}
  transfer-small: {{epochs: 1, lrs: [0.1]}}
""")
    records = evaluate(f"--data {data}", out)
    judged = ["knn", "linear-fast", "linear-swav", "linear-lr-grid", "finetune-small-10", "finetune-small-100"]
    for name in [*judged, "transfer-small"]:
        rows = predictions(out, records[name], name)
        truth, found, scores = column(rows, "label"), column(rows, "predicted"), records[name]["scores"]
        assert len(rows) == 24 and {row["key"].split("/")[0] for row in rows} == set(CLASSES)
        assert scores["top1"] == pytest.approx(accuracy_score(truth, found)), name
        assert scores["mean_per_class"] == pytest.approx(balanced_accuracy_score(truth, found)), name
    rows = predictions(out, records["clustering"], "clustering")
    (cluster,) = [name for name in rows[0] if name.startswith("cluster")]
    ari = adjusted_rand_score(column(rows, "label"), column(rows, cluster))
    assert records["clustering"]["scores"]["ari"] == pytest.approx(ari)
    rows = predictions(out, records["fewlabels"], "fewlabels-1")
    assert len(rows) == 24
    rows = predictions(out, records["svm-small"], "svm-small")
    margins = np.array([[float(row[f"score of {name}"]) for name in CLASSES] for row in rows])
    shown = np.array([[int(row[f"label of {name}"]) for name in CLASSES] for row in rows])
    assert records["svm-small"]["scores"]["map"] == pytest.approx(
        np.mean([envelope(m, s) for m, s in zip(margins.T, shown.T, strict=True)])
    )
    assert top_k_accuracy_score(shown.argmax(1), margins, k=2) > 0.6  # the columns are these classes
    assert (
        records["finetune-small-1"]["settings"]["epochs"] == 1
        and records["duplicates"]["scores"]["near_duplicates"] == 0
    )
    assert records["linear-swav"]["changed"] == {"epochs": 1}
    assert all(record["scores"]["permuted"] for name, record in records.items() if name != "duplicates")
    page = (out / "evaluation.html").read_text()
    assert all(name in page for name in records) and (out / "evaluation.md").exists()


def envelope(scores: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Average precision under the envelope, point by point."""
    order = np.argsort(-scores, kind="stable")
    hits = truth[order] == 1
    precision = [hits[: i + 1].mean() for i in range(len(hits))]
    return float(np.mean([max(precision[i:]) for i in range(len(hits)) if hits[i]]))


def test_a_label_map_makes_superclasses_count(tmp_path: Path):
    root = class_folders(tmp_path / "animals")
    (tmp_path / "map.csv").write_text('a cat,pet\ndög,pet\n"fox,7",wild\n')
    words = f"--train '{root}/train' --test '{root}/test' --protocols knn --label-map {tmp_path}/map.csv"
    records = evaluate(words, tmp_path / "out")
    assert records["knn"]["label_map"]["dög"] == "pet" and records["knn"]["test"]["classes"] == 2
    assert set(column(predictions(tmp_path / "out", records["knn"], "knn"), "label")) == {"pet", "wild"}


# --- boxes --------------------------------------------------------------------------------------------------


def test_detection_agrees_with_pycocotools_on_the_saved_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, out = coco(tmp_path / "photos"), tmp_path / "out"
    data = tmp_path / "data.yaml"
    data.write_text(f"""
boxes: {root}
protocols:
  detection-small-mask: {{iterations: 60, steps: [50], warmup_iterations: 2, batch_size: 4, train_sizes: [48],
                          test_size: 48, precise_bn: 2, channels: 32, fc_dim: 32}}
  svm-small: {{squash: false}}
""")
    records = evaluate(f"--data {data} --protocols detection-small-mask svm-small --baseline", out)
    record = records["detection-small-mask"]
    folder = out / record["predictions"]
    for figure, file, kind in (("box_ap", "detections", "bbox"), ("mask_ap", "masks", "segm")):
        assert record["scores"][figure] == pytest.approx(coco_ap(folder, file, kind), abs=1e-9)
    assert record["scores"]["box_ap"] > 0.01
    assert record["kind"] == "boxes" and record["test"]["images"] == 6 and record["test"]["classes"] == 2
    assert record["baseline"]["scores"]["box_ap"] == record["scores"]["box_ap"]  # it is at random init itself
    assert 0 < records["svm-small"]["scores"]["map"] <= 1
    assert "box AP" in capsys.readouterr().out


def coco_ap(folder: Path, file: str, kind: str) -> float:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "ground_truth.json"))
        found = truth.loadRes(str(folder / f"{file}.json"))
        scorer = COCOeval(truth, found, kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return float(scorer.stats[0])


# --- masks --------------------------------------------------------------------------------------------------


def test_segmentation_agrees_with_a_confusion_matrix_of_the_saved_masks(tmp_path: Path):
    root, out = streets(tmp_path / "streets"), tmp_path / "out"
    data = tmp_path / "data.yaml"
    data.write_text(f"""
masks: {root}
protocols:
  segmentation-small: {{iterations: 6, batch_size: 2, channels: 8, crops: {{size: 32}}}}
""")
    (record,) = evaluate(f"--data {data} --seeds 1", out).values()
    folder = out / record["predictions"] / "segmentation"
    counts = np.zeros((3, 3), np.int64)
    with (folder / "files.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == 4
    for line in listed:
        truth = np.array(Image.open(root / line["mask"]))
        found = np.array(Image.open(folder / line["prediction"]))
        np.add.at(counts, (truth[truth < 255], found[truth < 255]), 1)
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    assert record["scores"]["miou"] == pytest.approx(np.mean(np.diag(counts)[union > 0] / union[union > 0]))


# --- side by side -------------------------------------------------------------------------------------------


def test_evaluations_are_compared_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = "--train digits::train --test digits::test --protocols knn --image-size 8 --seed"
    for seed in (0, 1):
        evaluate(f"{words} {seed}", tmp_path / f"seed-{seed}")
    capsys.readouterr()
    folders = [str(tmp_path / f"seed-{seed}") for seed in (0, 1)]
    assert main(["compare", *folders, "--out", str(tmp_path / "both.html")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split()[-2:] == ["seed-0", "seed-1"] and "both.html" in said
    assert "seed-1" in (tmp_path / "both.html").read_text()
