import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

from tessella.data.boxes.layouts import open_annotations
from tessella.data.sources import ArrayImages
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.protocols.lowshot import (
    ABSENT,
    DIFFICULT,
    PRESENT,
    LowShotConfig,
    MultiLabelData,
    SvmConfig,
    average_precision,
    lowshot,
    svm,
)
from tests.protocols.planted import Tiny, eval_data, meaningless_images, planted_images

FEW = (0.01, 0.1)


def voc_average_precision(scores, targets):
    """As the development kit of VOC2010 counts: one image after the other, then the envelope, then its steps."""
    ranked = sorted(
        (pair for pair in zip(scores, targets, strict=True) if pair[1] != DIFFICULT), key=lambda pair: -pair[0]
    )
    positives = sum(target == PRESENT for _, target in ranked)
    recall, precision, hits = [0.0], [0.0], 0
    for number, (_, target) in enumerate(ranked, 1):
        hits += target == PRESENT
        recall.append(hits / positives)
        precision.append(hits / number)
    recall.append(1.0)
    precision.append(0.0)
    for i in reversed(range(len(precision) - 1)):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))


def test_average_precision_equals_the_development_kits():
    random = np.random.default_rng(0)
    for _ in range(50):
        targets = random.choice([PRESENT, ABSENT, DIFFICULT], 40, p=[0.3, 0.5, 0.2])
        targets[0] = PRESENT
        scores = random.normal(size=40)
        assert average_precision(scores, targets) == pytest.approx(voc_average_precision(scores, targets))


def test_average_precision_by_hand():
    assert average_precision([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([4, 3, 2, 1], [0, 1, 1, 0]) == pytest.approx(2 / 3)  # the envelope: not (1/2 + 2/3) / 2
    assert average_precision([4, 3, 2, 1], [DIFFICULT, 1, 1, 0]) == 1.0
    assert np.isnan(average_precision([1.0], [0]))


def multilabel(n, seed, noise=10.0, **options):
    """Each half of an image shows one of three colours, or none; the class is there wherever its colour is."""
    random = np.random.default_rng(seed)
    colours = np.array([[30, 30, 30], [220, 40, 40], [40, 220, 40], [40, 40, 220]], float)
    halves = random.integers(0, 4, (n, 2))
    pixels = colours[halves].repeat(4, axis=1)[:, None].repeat(8, axis=1) + random.normal(0, noise, (n, 8, 8, 3))
    targets = np.stack([(halves == kind).any(axis=1) for kind in (1, 2, 3)], axis=1).astype(np.int8)
    return ArrayImages(f"multi{seed}", pixels.clip(0, 255).astype(np.uint8)), targets


def multilabel_data(noise=10.0, train=120, test=90, **options):
    (train_images, train_y), (test_images, test_y) = multilabel(train, 1, noise), multilabel(test, 2, noise)
    targets = {"train": train_y, "test": test_y}
    return MultiLabelData(
        train_images, test_images, EvalTransform.of(8), workers=1, classes=["r", "g", "b"], targets=targets, **options
    )


def test_planted_labels_score_one_and_meaningless_ones_their_share():
    assert svm(Tiny(), multilabel_data(), SvmConfig(costs=(1.0, 10.0, 100.0)))["map"] > 0.99
    data = multilabel_data(test=600)
    random = np.random.default_rng(0)
    for split in data.targets:
        data.targets[split] = random.permuted(data.targets[split], axis=0)
    shares = data.targets["test"].mean()
    assert svm(Tiny(), data, SvmConfig(costs=FEW))["map"] == pytest.approx(shares, abs=0.08)


def test_one_class_per_image_is_one_label_of_all():
    assert svm(Tiny(), eval_data(), SvmConfig(costs=FEW))["map"] == 1.0
    noise = eval_data(meaningless_images(200), meaningless_images(400, seed=1, name="n"))
    assert lowshot(Tiny(), noise, LowShotConfig((4,), draws=2))["map_4"] == pytest.approx(0.25, abs=0.06)


def test_the_full_svm_is_scikit_learns_on_unit_features_with_the_published_settings():
    data, backbone = multilabel_data(noise=250.0), Tiny()
    data.targets["train"][::7, 0] = DIFFICULT  # a negative to learn from
    scores = svm(backbone, data, SvmConfig(costs=(0.25,)))
    x, test_x = (data.features(backbone, split, EvalTransform(8, 8, fit="both sides")).x for split in data.targets)
    unit = [part.double().numpy() / (part.double().norm(dim=1, keepdim=True).numpy() + 1e-5) for part in (x, test_x)]
    for column, name in enumerate(data.classes):
        y = np.where(data.targets["train"][:, column] == 1, 1, -1)
        machine = LinearSVC(C=0.25, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
        found = machine.fit(unit[0], y).decision_function(unit[1])
        reference = voc_average_precision(found, data.targets["test"][:, column])
        assert scores["per_class"][name] == pytest.approx(reference)
    assert scores["map"] == pytest.approx(np.mean(list(scores["per_class"].values())))


def test_difficult_test_images_do_not_count():
    data, backbone = multilabel_data(noise=250.0), Tiny()
    whole = svm(backbone, data, SvmConfig(costs=(0.1,)))
    data.targets["test"][:30] = DIFFICULT
    part = svm(backbone, data, SvmConfig(costs=(0.1,)))
    assert part["map"] != whole["map"] and part["notes"] == []


def test_an_independent_scorer_finds_the_same_figure_in_the_saved_predictions(tmp_path):
    data = multilabel_data(noise=250.0, predictions=tmp_path)
    scores = svm(Tiny(), data, SvmConfig(costs=FEW))
    lowshot(Tiny(), data, LowShotConfig((2,), draws=1))
    rows = list(csv.DictReader((tmp_path / "svm.csv").read_text().splitlines()))
    for name, value in scores["per_class"].items():
        found = [float(row[f"score of {name}"]) for row in rows]
        labels = [int(row[f"label of {name}"]) for row in rows]
        assert voc_average_precision(found, labels) == pytest.approx(value)
        assert average_precision_score(labels, found) == pytest.approx(value, abs=0.05)  # no envelope: a little less
    assert (tmp_path / "lowshot-2-draw0.csv").exists()


def test_the_test_labels_do_not_choose_c():
    data, backbone = multilabel_data(noise=250.0), Tiny()
    honest = svm(backbone, data, SvmConfig())
    data.targets["test"] = np.ascontiguousarray(data.targets["test"][::-1])
    assert svm(backbone, data, SvmConfig())["c"] == honest["c"]
    assert set(honest["c"].values()) <= {0.01, 0.1, *(0.5**power for power in range(4, 20))}


def test_more_images_score_more_and_every_draw_is_reproducible():
    data = multilabel_data(noise=60.0, train=400)
    config = LowShotConfig((1, 8, 64), draws=3, costs=(0.1, 1.0))
    scores = lowshot(Tiny(), data, config)
    assert scores["map_1"] < scores["map_8"] < scores["map_64"]
    assert scores["cross_validated"] == [8, 64] and scores["std_1"] > 0
    assert lowshot(Tiny(), data, config) == scores


def test_few_images_are_k_positives_and_classes_less_one_times_k_negatives(monkeypatch):
    sizes = []
    fit = LinearSVC.fit

    def watched(self, x, y):
        sizes.append((int((y == 1).sum()), int((y == -1).sum()), self.C))
        return fit(self, x, y)

    monkeypatch.setattr(LinearSVC, "fit", watched)
    lowshot(Tiny(), multilabel_data(train=400), LowShotConfig((1, 5), draws=2))
    assert sizes == [(1, 2, 0.1)] * 6 + [(5, 10, 0.1)] * 6


def test_more_positives_than_there_are_are_left_out_and_told():
    data = eval_data(planted_images(30))
    scores = lowshot(Tiny(), data, LowShotConfig((1, 16), draws=1))
    assert "map_1" in scores and "map_16" not in scores
    assert scores["notes"] == ["16 positives left out: a class has only 10"]
    with pytest.raises(UserError, match="one has only 10"):
        lowshot(Tiny(), data, LowShotConfig((16,)))


def test_images_are_squashed_first_to_the_shorter_side_in_the_full_protocol_only():
    data = multilabel_data()
    data.transform = EvalTransform(8, 12)
    assert svm(Tiny(), data, SvmConfig(costs=(0.1,)))["transform"]["resize"] == 12
    transform = lowshot(Tiny(), data, LowShotConfig((1,), draws=1))["transform"]
    assert (transform["resize"], transform["size"], transform["fit"]) == (8, 8, "both sides")


def voc_folder(root: Path, split_of):
    """Two classes; an image's name says which are in it: c for a cat, d for a dog, D for a difficult dog."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in ("trainval", "test"):
        names = [name for name, where in split_of.items() if where == split]
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
    for number, name in enumerate(split_of):
        pixels = np.full((20, 30), 40 * (number % 6), np.uint8)  # gray, not square
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg")
        objects = "".join(
            f"<object><name>{'cat' if letter == 'c' else 'dog'}</name><difficult>{int(letter == 'D')}</difficult>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
            for letter in name.partition("-")[2]
        )
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    return root


def test_image_labels_of_a_data_set_in_voc_format(tmp_path):
    split_of = {
        "3-cd": "trainval",
        "1-d": "trainval",
        "2-D": "trainval",
        "0-c": "trainval",
        "5-DdD": "test",
        "4-": "test",
    }
    root = voc_folder(tmp_path / "VOC2007", split_of)
    train, test = (open_annotations(str(root), split) for split in ("train", "test"))
    data = MultiLabelData.of(train, test, EvalTransform.of(8), workers=1)
    keys = [Path(data.train.key(row)).stem for row in range(len(data.train))]
    assert keys == ["0-c", "1-d", "2-D", "3-cd"] and data.classes == ["cat", "dog"]
    assert data.targets["train"].tolist() == [[1, 0], [0, 1], [0, -1], [1, 1]]
    assert data.targets["test"].tolist() == [[0, 0], [0, 1]]
    found = data.features(Tiny(), "train")
    assert found.x.shape == (4, 32) and found.rows.tolist() == [0, 1, 2, 3]
    assert data.train.image(0).shape == (20, 30, 3)
    scores = svm(Tiny(), data, SvmConfig(costs=(0.1,)))
    assert list(scores["per_class"]) == ["dog"] and "cat" in scores["notes"][0]


def test_generated_shapes_become_image_labels():
    train, test = (open_annotations("shapes", split) for split in ("train", "test"))
    data = MultiLabelData.of(train, test, EvalTransform.of(16), workers=1, batch_size=64)
    assert data.targets["train"].shape == (len(train), len(data.classes))
    scores = lowshot(Tiny(), data, LowShotConfig((1, 8), draws=2, cross_validate_from=99))
    assert 0 < scores["map_1"] < 1 and torch.isfinite(torch.tensor(scores["map_8"]))
