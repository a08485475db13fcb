import json
import sys

import numpy as np
import pytest
import torch

from tessella.engine.evaluate import evaluate
from tessella.engine.weights import Loaded, weights_sha256
from tessella.errors import UserError
from tessella.modules.backbone import BackboneConfig
from tessella.protocols.clustering import ClusteringConfig
from tessella.protocols.features import EvalTransform
from tessella.protocols.knn import KnnConfig
from tests.protocols.planted import Tiny, planted_images

TINY_RESNET = "random:resnet10?stem=small&width=8&size=8"


def loaded(method=None):
    return Loaded(Tiny(), BackboneConfig("resnet10", 8, "small"), EvalTransform.of(8), method, "tiny")


def run(backbone=None, **options):
    options = {"protocols": ["knn"], "device": "cpu", "workers": 1} | options
    train, test = planted_images(60, seed=1), planted_images(30, seed=2, name="planted test")
    return evaluate(loaded() if backbone is None else backbone, train, test, **options)


def test_a_record_says_everything_the_scores_depend_on(tmp_path):
    (record,) = run(out=tmp_path, seed=5)
    assert record == json.loads((tmp_path / "evaluation.json").read_text())[0]
    assert (record["protocol"], record["version"], record["seed"]) == ("knn", 1, 5)
    assert record["scores"]["top1"] == 1.0
    assert record["settings"]["k"] == [1, 20, 200]
    assert record["weights"] == weights_sha256(Tiny())
    assert record["transform"]["size"] == 8 and len(record["transform"]["std"]) == 3
    train = planted_images(60, seed=1)
    described = {
        "name": "planted",
        "fingerprint": train.fingerprint,
        "images": 60,
        "classes": 3,
        "skipped": 0,
    }
    assert record["train"] == described
    assert record["libraries"]["torch"] and record["seconds"] >= 0 and record["ranks"] == 1


def test_every_protocol_by_name_from_one_pass_over_the_images():
    backbone = loaded()
    records = run(backbone, protocols=["knn", "linear", "fewlabels", "clustering"])
    assert [record["protocol"] for record in records] == ["knn", "linear-fast", "fewlabels", "clustering"]
    assert backbone.backbone.seen == 90


def test_a_protocol_may_come_with_its_settings_and_gets_the_seed():
    records = run(protocols=[KnnConfig(k=(3,)), ClusteringConfig(seeds=(0, 1)), "linear-swav"][:2], seed=7)
    assert "k3_T0.1" in records[0]["scores"]
    assert records[1]["settings"]["seeds"] == [7, 8]


def test_the_baseline_is_the_same_network_at_random_init():
    records = run(TINY_RESNET, protocols=["knn", "clustering"], baseline=True, seed=3)
    for record in records:
        # The backbone is itself the network at random init with this seed, so its twin is its equal.
        assert record["baseline"]["weights"] == record["weights"]
        assert record["baseline"]["scores"] == record["scores"]


class Nearest(torch.nn.Module):
    """A method that clusters: assigns by the strongest of the first features."""

    clusters = 5

    def assign(self, features):
        return features[:, : self.clusters].argmax(dim=1)


def test_a_method_that_clusters_is_scored_by_its_own_clusters_too():
    records = run(loaded(Nearest()), protocols=["clustering"], baseline=True)
    assert [record["protocol"] for record in records] == ["clustering", "own-clusters"]
    own = records[1]["scores"]
    assert own["clusters"] == 5 and own["classes"] == 3 and "accuracy" not in own
    assert 0 <= own["nmi"] <= 1 and "baseline" in records[0] and "baseline" not in records[1]
    assert [record["protocol"] for record in run(loaded(Nearest()))] == ["knn"]


def test_results_of_other_weights_are_kept_and_the_same_question_is_answered_once(tmp_path):
    run(out=tmp_path)
    run(out=tmp_path)
    assert len(json.loads((tmp_path / "evaluation.json").read_text())) == 1
    run(TINY_RESNET, out=tmp_path)
    run(out=tmp_path, protocols=["clustering"])
    names = [(r["backbone"], r["protocol"]) for r in json.loads((tmp_path / "evaluation.json").read_text())]
    assert names == [("tiny", "knn"), (f"{TINY_RESNET}, seed 0", "knn"), ("tiny", "clustering")]


def test_a_foreign_evaluation_file_is_not_overwritten(tmp_path):
    (tmp_path / "evaluation.json").write_text("my notes")
    with pytest.raises(UserError, match="not a list of records"):
        run(out=tmp_path)
    assert (tmp_path / "evaluation.json").read_text() == "my notes"


def test_the_table_is_plain_where_there_is_no_terminal(capsys):
    run(TINY_RESNET, protocols=["knn", "fewlabels"], baseline=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["protocol", "figure", "score", "random", "init"]
    assert lines[1].split()[:2] == ["knn", "top-1"]
    assert any("top-1, 10 labels per class" in line and "±" in line for line in lines)
    assert all(line.isprintable() and line.isascii() for line in lines if "±" not in line)


def test_the_table_is_drawn_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(loaded()._replace(name="[red]\x1b[2J"))
    out = capsys.readouterr().out
    assert "nearest neighbour" in out and "[red]" in out and "\x1b[2J" not in out


def test_an_unknown_protocol_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="'linaer'; did you mean linear"):
        run(protocols=["linaer"])


def test_products_are_as_exact_as_before_afterwards():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        run()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_real_pictures_from_an_archive(shared_data, tmp_path):
    archive = shared_data / "cifar10-small.tar.gz"
    records = evaluate(
        "random:resnet10?stem=small&width=4&size=32",
        f"{archive}::cifar10-small/test",
        f"{archive}::cifar10-small/test",
        protocols=["knn"],
        out=tmp_path,
        workers=1,
    )
    scores = records[0]["scores"]
    assert scores["leave_one_out"] and 0.15 < scores["top1"] < 0.5
    assert len(scores["per_class"]) == 10 and "airplane" in scores["per_class"]
    assert np.mean(list(scores["per_class"].values())) == pytest.approx(scores["mean_per_class"])
