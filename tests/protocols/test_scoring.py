import csv

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, normalized_mutual_info_score, top_k_accuracy_score

from tessella.data.sources import ArrayImages
from tessella.errors import UserError
from tessella.protocols.clustering import ClusteringConfig, clustering, score_assignments
from tessella.protocols.knn import KnnConfig, knn
from tessella.protocols.linear import FewLabelsConfig, LinearConfig, few_labels, linear
from tessella.protocols.scoring import classification_scores, save_classification, save_predictions
from tests.protocols.planted import Tiny, eval_data, planted_images


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hard_data(folder):
    train, test = planted_images(90, classes=7, noise=120, seed=1), planted_images(63, classes=7, noise=120, seed=2)
    return eval_data(train, test, predictions=folder)


def test_scores_equal_scikit_learn():
    labels, logits = torch.arange(200) % 8, torch.randn(200, 9)
    logits[torch.arange(200), labels] += 1
    scores = classification_scores(logits, labels, [str(i) for i in range(9)])
    predicted = logits.argmax(dim=1)
    assert scores["top1"] == accuracy_score(labels, predicted)
    assert scores["top5"] == top_k_accuracy_score(labels, logits, k=5, labels=range(9))
    balanced = np.mean([accuracy_score(labels[labels == i], predicted[labels == i]) for i in range(8)])
    assert scores["mean_per_class"] == pytest.approx(balanced)
    assert set(scores["per_class"]) == {str(i) for i in range(8)}  # class 8 has no image
    assert scores["top1_interval"][0] < scores["top1"] < scores["top1_interval"][1]


def test_scores_of_shuffled_labels_are_the_mean_over_all_orders():
    labels, logits = torch.arange(60) % 7, torch.randn(60, 8)
    logits[5] = torch.nan
    names = [str(i) for i in range(8)]
    expected = classification_scores(logits, labels, names)["permuted"]
    orders = [torch.randperm(60, generator=torch.Generator().manual_seed(i)) for i in range(400)]
    found = [classification_scores(logits, labels[order], names) for order in orders]
    assert set(expected) == {"top1", "top5", "mean_per_class"}
    for name, value in expected.items():
        assert value == pytest.approx(np.mean([scores[name] for scores in found]), abs=0.01), name


def test_shuffled_labels_of_clusters_agree_as_scikit_learn_says():
    labels, clusters = torch.arange(80) % 5, torch.arange(80) // 20
    found = score_assignments(clusters, labels, 4)["permuted"]
    orders = [np.random.default_rng(i).permutation(labels.numpy()) for i in range(300)]
    assert found["nmi"] == pytest.approx(
        np.mean([normalized_mutual_info_score(order, clusters) for order in orders]), abs=0.03
    )
    assert abs(found["ari"]) < 0.03 and 0.2 < found["purity"] < 0.5
    assert found == score_assignments(clusters, labels, 4)["permuted"]  # the same orders each time


def test_the_most_frequent_mistakes_are_named():
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 1, 2, 2])]
    scores = classification_scores(logits, torch.tensor([0, 0, 0, 1, 1, 2]), ["cat", "dog", "fox"])
    assert scores["mistakes"] == [["cat", "dog", 2], ["dog", "fox", 1]]


@pytest.mark.parametrize(
    ("name", "function", "config"),
    [
        ("knn", knn, KnnConfig()),
        ("linear-fast", linear, LinearConfig()),
        ("linear-lr-grid", linear, LinearConfig("lr-grid", epochs=2)),
        ("linear-moco", linear, LinearConfig("moco", epochs=2, batch_size=30)),
    ],
)
def test_scikit_learn_finds_the_same_figures_in_the_saved_predictions(tmp_path, name, function, config):
    data = hard_data(tmp_path)
    scores = function(Tiny(), data, config)
    rows = read(tmp_path / f"{name}.csv")
    assert [row["key"] for row in rows] == [data.test.key(i) for i in range(63)]
    labels, predicted = ([row[column] for row in rows] for column in ("label", "predicted"))
    assert 0.1 < scores["top1"] < 1
    assert scores["top1"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    if "top5" in scores:
        five = [{row[column] for column in ("predicted", "top2", "top3", "top4", "top5")} for row in rows]
        assert all(len(names) == 5 for names in five)
        assert scores["top5"] == pytest.approx(
            np.mean([label in names for label, names in zip(labels, five, strict=True)])
        )
    if name == "knn":
        assert scores["k1"] == pytest.approx(accuracy_score(labels, [row["k1"] for row in rows]))


def test_few_labels_save_the_predictions_of_every_draw(tmp_path):
    scores = few_labels(Tiny(), hard_data(tmp_path), FewLabelsConfig((2,), draws=3))
    rows = read(tmp_path / "fewlabels-2.csv")
    means = [np.mean([row["label"] == row[f"predicted_{draw}"] for row in rows]) for draw in range(3)]
    assert scores["top1_2"] == pytest.approx(np.mean(means))


def test_clusters_are_saved_for_every_seed(tmp_path):
    scores = clustering(Tiny(), hard_data(tmp_path), ClusteringConfig(seeds=(4, 5), restarts=2))
    rows = read(tmp_path / "clustering-test.csv")
    labels = [row["label"] for row in rows]
    nmi = [normalized_mutual_info_score(labels, [row[f"cluster_{seed}"] for row in rows]) for seed in (4, 5)]
    assert scores["nmi"] == pytest.approx(np.mean(nmi))


def test_names_that_could_break_a_table_come_back(tmp_path):
    keys = ["a,b.png", 'c"d.png', "e\nf.png", "g\udcffh.png", "ünï.png"]
    images = ArrayImages("odd", np.zeros((5, 2, 2, 3), np.uint8), keys=keys)
    save_predictions(tmp_path / "new", "table", images, np.arange(5), {"label": list("vwxyz")})
    rows = read(tmp_path / "new" / "table.csv")
    assert [row["key"] for row in rows] == ["a,b.png", 'c"d.png', "e\\nf.png", "g\\udcffh.png", "ünï.png"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.csv"]


def test_an_image_without_a_finite_answer_has_none_in_the_file(tmp_path):
    data = hard_data(tmp_path)
    logits = torch.zeros(2, 7)
    logits[1] = torch.nan
    save_classification(data, "broken", np.array([3, 4]), torch.tensor([0, 1]), logits)
    rows = read(tmp_path / "broken.csv")
    assert rows[0]["predicted"] and rows[1]["predicted"] == "" and rows[1]["label"] == "1"


def test_predictions_that_cannot_be_written_are_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another folder"):
        save_predictions(tmp_path / "file", "x", planted_images(2), np.arange(2), {})


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knn(Tiny(), eval_data(), KnnConfig())
    assert not list(tmp_path.iterdir())
