import pytest
import torch

from tessella.errors import UserError
from tessella.protocols.clustering import ClusteringConfig, clustering, score_assignments
from tests.protocols.planted import Tiny, eval_data, meaningless_images


@pytest.mark.parametrize("split", ["train", "test"])
def test_planted_classes_score_one(split):
    scores = clustering(Tiny(), eval_data(), ClusteringConfig(split=split))
    for name in ("accuracy", "nmi", "ari", "purity"):
        assert scores[name] == pytest.approx(1.0)
        assert scores["std"][name] == pytest.approx(0.0)
    assert (scores["split"], scores["clusters"], scores["used_clusters"]) == (split, 3, 3)
    assert scores["perplexity"] == pytest.approx(3.0) and scores["largest_share"] == pytest.approx(1 / 3)


def test_labels_without_meaning_score_chance():
    data = eval_data(test=meaningless_images(800, name="noise test"))
    scores = clustering(Tiny(), data, ClusteringConfig(seeds=(0,)))
    assert scores["accuracy"] < 0.35 and scores["nmi"] < 0.05 and abs(scores["ari"]) < 0.05
    assert "std" not in scores


def test_scores_are_means_over_seeds():
    data, backbone = eval_data(test=meaningless_images(100, name="noise test")), Tiny()
    options = dict(restarts=1, clusters=9)
    single = [clustering(backbone, data, ClusteringConfig(seeds=(seed,), **options)) for seed in (0, 1, 2)]
    both = clustering(backbone, data, ClusteringConfig(seeds=(0, 1, 2), **options))
    values = torch.tensor([scores["nmi"] for scores in single], dtype=torch.float64)
    assert both["nmi"] == pytest.approx(float(values.mean()))
    assert both["std"]["nmi"] == pytest.approx(float(values.std()))


def test_only_the_classes_of_the_split_count():
    train = meaningless_images(100, classes=10)
    scores = clustering(Tiny(), eval_data(train=train), ClusteringConfig())
    assert scores["clusters"] == scores["classes"] == 3


def test_over_clustered_assignments_have_no_one_to_one_accuracy():
    labels = torch.arange(120) % 3
    scores = score_assignments(torch.arange(120) % 6, labels, 10)
    assert "accuracy" not in scores
    assert scores["purity"] == 1.0 and scores["used_clusters"] == 6 and scores["nmi"] < 1


def test_a_collapsed_assignment_is_told_by_its_sizes():
    scores = score_assignments(torch.zeros(90, dtype=torch.long), torch.arange(90) % 3, 3)
    assert scores["accuracy"] == pytest.approx(1 / 3) and scores["nmi"] == scores["ari"] == 0
    assert (scores["used_clusters"], scores["perplexity"], scores["largest_share"]) == (1, 1, 1)


def test_more_clusters_than_images_are_refused():
    with pytest.raises(UserError, match="100 clusters of 60 images"):
        clustering(Tiny(), eval_data(), ClusteringConfig(clusters=100))
