import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessella import dist
from tessella.data.boxes.layouts import open_annotations
from tessella.data.masks.layouts import ArrayMasks
from tessella.data.sources import ArrayImages
from tessella.data.transform import EvalTransform
from tessella.engine.launch import leave_ranks
from tessella.errors import UserError
from tessella.evaluation.evaluate import evaluate
from tessella.evaluation.records import LOCK
from tessella.modules.backbone import BackboneConfig
from tessella.protocols import PROTOCOLS, features, named_settings
from tessella.protocols.clustering import ClusteringConfig
from tessella.protocols.finetune import FinetuneConfig
from tessella.protocols.knn import KnnConfig
from tessella.report.evaluation import write_pages
from tessella.run.lock import only_writer
from tessella.weights.resolve import Loaded, resolve_backbone, weights_sha256
from tests.protocols.planted import Tiny, planted_images
from tests.ranks import on_ranks

TINY_RESNET = "random:resnet10?stem=small&width=8&size=8"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Features of one test are not another's."""
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path / "cache"))


def records_in(folder):
    return json.loads((folder / "evaluation.json").read_text())


def loaded(method=None):
    return Loaded(Tiny(), BackboneConfig("resnet10", 8, "small"), EvalTransform.of(8), method, "tiny")


def run(backbone=None, **options):
    options = {"protocols": ["knn"], "device": "cpu", "workers": 1} | options
    train, test = planted_images(60, seed=1), planted_images(30, seed=2, name="planted test")
    return evaluate(loaded() if backbone is None else backbone, train, test, **options)


def test_a_record_says_everything_the_scores_depend_on(tmp_path):
    (record,) = run(out=tmp_path, seed=5)
    assert record == json.loads((tmp_path / "evaluation.json").read_text())[0]
    assert (record["protocol"], record["version"], record["seed"], record["kind"]) == ("knn", 1, 5, "classes")
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
        "reasons": {},
    }
    assert record["train"] == described
    assert record["libraries"]["torch"] and record["seconds"] >= 0 and record["ranks"] == 1
    assert record["changed"] == {} and record["label_map"] is None and record["date"].endswith("+00:00")
    assert record["network"]["name"] == "resnet10" and record["predictions"] == "predictions/knn"


def test_files_that_cannot_be_read_are_told_and_stand_in_the_record(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    (tmp_path / "images/class1/half.jpg").write_bytes(b"\xff\xd8\xff\xe0abc")
    data = str(tmp_path / "images")
    (record,) = evaluate(TINY_RESNET, data, data, device="cpu", protocols=["knn"])
    assert record["test"]["images"] == 12 and record["test"]["skipped"] == 1
    assert list(record["test"]["reasons"]) == ["class1/half.jpg"]
    assert "class1/half.jpg" in capsys.readouterr().err


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


def test_a_method_s_own_clusters_are_written_for_other_scorers(tmp_path):
    (own,) = [r for r in run(loaded(Nearest()), protocols=["clustering"], out=tmp_path) if r["settings"] == {}]
    lines = (tmp_path / own["predictions"] / "own-clusters.csv").read_text().splitlines()
    assert lines[0] == "key,label,cluster" and len(lines) == 31


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


def test_an_unknown_protocol_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="'linaer'; did you mean linear"):
        run(protocols=["linaer"])


# --- data that make figures mean something else -------------------------------------------------------------


def named(n, names, name="planted"):
    images = planted_images(n)
    return ArrayImages(name, np.stack([images.image(row) for row in range(n)]), images.labels, classes=names)


def test_train_and_test_without_a_common_class_are_refused():
    sets = named(30, list("abc")), named(24, list("xyz"), "other")
    with pytest.raises(UserError, match=r"planted and other have no class in common: train has a, b, c, test has x, y"):
        evaluate(loaded(), *sets, protocols=["clustering"], workers=1, device="cpu")


def test_a_refused_evaluation_leaves_nothing_behind(tmp_path):
    sets = named(30, list("abc")), named(24, list("xyz"), "other")
    for out in (tmp_path / "new", tmp_path):
        with pytest.raises(UserError, match="no class in common"):
            evaluate(loaded(), *sets, protocols=["clustering"], workers=1, device="cpu", out=out)
        assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_what_is_strange_about_the_classes_is_said_once_and_stands_in_the_record(capsys):
    sets = named(30, list("abc")), named(24, list("abd"), "other")
    records = evaluate(loaded(), *sets, protocols=["knn", "clustering"], workers=1, device="cpu")
    expected = ["classes of train that test lacks: c", "classes of test that train lacks: d"]
    assert [record["warnings"] for record in records] == [expected] * 2
    told = capsys.readouterr().err
    assert all(told.count(f"warning: {warning}") == 1 for warning in expected)


def test_a_folder_of_splits_is_not_taken_for_one_of_classes(tmp_path):
    for number, split in enumerate(("train", "test") * 3):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(folder / f"{number}.png")
    data = str(tmp_path / "photos")
    (record,) = evaluate(TINY_RESNET, data, data, device="cpu", workers=1, protocols=["knn"])
    same, split_names = record["warnings"]
    assert "train and test are the same images" in same and "usual names of parts of a data set" in split_names


def test_near_copies_of_train_images_are_counted_beside_every_score(tmp_path):
    train, test = planted_images(30, seed=1, size=32, noise=60), planted_images(20, seed=2, size=32, noise=60)
    pixels = np.stack([test.image(row) for row in range(20)])
    pixels[3], pixels[11] = train.image(3)[:, ::-1], train.image(17)
    test = ArrayImages("test", pixels, test.labels)
    (record,) = evaluate(loaded(), train, test, protocols=["knn"], workers=1, device="cpu", out=tmp_path)
    copies = records_in(tmp_path)[0]["near_copies"]
    assert copies == record["near_copies"] and copies["near_duplicates"] == 2
    assert [pair["test"] for pair in copies["pairs"]] == [test.key(3), test.key(11)]
    with Image.open(tmp_path / copies["sheet"]) as sheet:
        assert sheet.size == (200, 200)
    page = write_pages(tmp_path)[1].read_text()
    assert page.count('src="data:image/jpeg;base64,') == 1 and test.key(11) in page
    changed = copies | {"sheet": "../outside.jpg"}
    (tmp_path.parent / "outside.jpg").write_bytes(b"secret")
    (tmp_path / "evaluation.json").write_text(json.dumps([record | {"near_copies": changed}]))
    assert "data:image/jpeg" not in write_pages(tmp_path)[1].read_text()


def test_near_copies_among_images_with_masks_are_found_too(tmp_path):
    random = np.random.default_rng(0)
    pixels, masks = random.integers(0, 256, (12, 32, 32, 3), np.uint8), np.zeros((12, 32, 32), np.uint8)
    masks[:, :16] = 1
    pixels[8] = pixels[2]
    train, test = (
        ArrayMasks(name, pixels[rows], masks[rows], ["a", "b"])
        for name, rows in (("train", slice(0, 6)), ("test", slice(6, 12)))
    )
    (record,) = evaluate(TINY_RESNET, train, test, protocols=["duplicates"], workers=1, device="cpu")
    assert record["kind"] == "masks" and record["scores"]["near_duplicates"] == 1
    assert [pair["test"] for pair in record["near_copies"]["pairs"]] == [test.keys[2]]


def test_images_may_be_resized_by_another_rule():
    (record,) = run(interpolation="bicubic")
    assert record["transform"]["interpolation"] == "bicubic"


# --- not twice ----------------------------------------------------------------------------------------------


def counting(monkeypatch, name="knn"):
    """Calls of a protocol, which goes on as it is."""
    calls, protocol = [], PROTOCOLS[name]

    def counted(backbone, data, config):
        calls.append(config)
        return protocol.function(backbone, data, config)

    monkeypatch.setitem(PROTOCOLS.loaded, name, protocol._replace(function=counted))
    return calls


def test_what_the_folder_has_is_not_computed_again_unless_it_is_asked_for(tmp_path, monkeypatch, capsys):
    calls = counting(monkeypatch)
    first = run(out=tmp_path)
    capsys.readouterr()
    assert run(out=tmp_path) == first and len(calls) == 1
    assert f"already in {tmp_path}, not computed again (--again does): knn" in capsys.readouterr().err
    run(out=tmp_path, again=True)
    assert len(calls) == 2 and len(records_in(tmp_path)) == 1
    run(out=tmp_path, protocols=[KnnConfig(k=(3,))])  # another question
    assert len(calls) == 3 and len(records_in(tmp_path)) == 2


def test_a_record_is_written_as_soon_as_its_protocol_is_done(tmp_path, monkeypatch):
    def killed(backbone, data, config):
        assert [record["protocol"] for record in records_in(tmp_path)] == ["knn"]
        raise KeyboardInterrupt

    monkeypatch.setitem(PROTOCOLS.loaded, "clustering", PROTOCOLS["clustering"]._replace(function=killed))
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path, protocols=["knn", "clustering"])
    monkeypatch.undo()
    calls = counting(monkeypatch)
    names = [record["protocol"] for record in run(out=tmp_path, protocols=["knn", "clustering"])]
    assert names == ["knn", "clustering"] and not calls


def test_a_baseline_that_comes_later_is_added_to_the_record(tmp_path, monkeypatch):
    calls = counting(monkeypatch)
    run(TINY_RESNET, out=tmp_path, seed=1)
    (record,) = run(TINY_RESNET, out=tmp_path, seed=1, baseline=True)
    assert len(calls) == 1  # the backbone is itself the network at random init: its answer is there
    assert record["baseline"]["scores"] == record["scores"] == records_in(tmp_path)[0]["baseline"]["scores"]
    mine = resolve_backbone(TINY_RESNET, seed=4)
    run(mine, out=tmp_path, seed=1, baseline=True)  # the twin of seed 1 was judged before
    assert len(calls) == 2 and records_in(tmp_path)[1]["baseline"]["name"] == "random init, seed 1"


def test_a_supervised_backbone_stands_beside_and_sees_images_in_its_own_way(tmp_path):
    other = "random:resnet10?stem=small&width=4&size=16"
    (record,) = run(out=tmp_path, supervised=other, baseline=False)
    beside = record["supervised"]
    assert beside["name"].startswith(other) and beside["transform"]["size"] == 16 and beside["network"]["width"] == 4
    assert record["transform"]["size"] == 8 and 0 < beside["scores"]["top1"] <= 1
    assert (tmp_path / "predictions" / "knn" / "supervised" / "knn.csv").exists()


def test_predictions_of_different_questions_lie_in_different_folders(tmp_path):
    for backbone in (loaded(), TINY_RESNET):
        run(backbone, out=tmp_path)
    run(out=tmp_path, protocols=[KnnConfig(k=(3,))])
    assert [r["predictions"] for r in records_in(tmp_path)] == [f"predictions/knn{i}" for i in ("", "-2", "-3")]
    run(out=tmp_path, again=True)
    assert records_in(tmp_path)[0]["predictions"] == "predictions/knn"


def test_a_figure_that_is_not_finite_does_not_cost_the_record(tmp_path, monkeypatch):
    protocol = PROTOCOLS["knn"]._replace(function=lambda *_: {"top1": float("nan"), "losses": [1.0, float("inf")]})
    monkeypatch.setitem(PROTOCOLS.loaded, "knn", protocol)
    (record,) = run(out=tmp_path)
    assert records_in(tmp_path)[0]["scores"] == record["scores"] == {"top1": None, "losses": [1.0, None]}


# --- seeds, settings, data ----------------------------------------------------------------------------------


def test_a_protocol_that_trains_is_run_for_each_seed(tmp_path, monkeypatch):
    small = replace(named_settings()["segmentation-small"], iterations=1, batch_size=2)
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    masks = ArrayMasks("halves", pixels, np.tile(np.array([0, 1], np.uint8), (2, 8, 4)), ["left", "right"])
    backbone, seen = resolve_backbone(TINY_RESNET, seed=9), []
    protocol = PROTOCOLS["segmentation"]._replace(
        function=lambda _b, _d, c: seen.append(c.seed) or {"miou": c.seed / 10}
    )
    monkeypatch.setitem(PROTOCOLS.loaded, "segmentation", protocol)
    records = evaluate(backbone, masks, masks, protocols=[small], seed=2, seeds=3, workers=1, baseline=True)
    assert seen == [2, 2, 3, 3, 4, 4]  # each with its baseline
    assert [(r["seed"], r["settings"]["seed"], r["baseline"]["name"][-1]) for r in records] == [
        (2, 2, "2"), (3, 3, "3"), (4, 4, "4")]  # fmt: skip
    (tuned,) = run(TINY_RESNET, protocols=[FinetuneConfig(labels=1.0, epochs=1, batch_size=16)], seeds=2)
    assert tuned["settings"]["repeats"] == 2 and len(tuned["scores"]["top1_of_seeds"]) == 2


def test_changes_from_a_protocol_s_setting_are_in_the_record():
    (record,) = run(protocols=[KnnConfig(k=(3,))])
    assert record["protocol"] == "knn" and record["changed"] == {"k": [3]}


def test_data_of_another_kind_than_the_protocol_needs_are_refused():
    with pytest.raises(UserError, match="knn needs classes of images"):
        evaluate(TINY_RESNET, *(open_annotations("shapes", split) for split in ("train", "test")), protocols=["knn"])
    with pytest.raises(UserError, match="detection-small needs boxes of images"):
        run(protocols=["detection-small"])


def test_what_only_all_asked_for_is_left_out_where_the_data_cannot_carry_it(capsys):
    few = planted_images(6, seed=1), planted_images(6, seed=2)
    records = evaluate(loaded(), *few, protocols=["all"], workers=1, device="cpu")
    names = [record["protocol"] for record in records]
    assert names[:2] == ["duplicates", "knn"] and "fewlabels" not in names
    assert "left out: fewlabels: " in capsys.readouterr().err
    with pytest.raises(UserError):
        evaluate(loaded(), *few, protocols=["fewlabels"], workers=1, device="cpu")


def test_two_ways_to_name_the_images_are_one_too_many(tmp_path):
    with pytest.raises(UserError, match=r"--train and --test, or by --data"):
        run(data=tmp_path / "data.yaml")
    with pytest.raises(UserError, match=r"--train and --test, or by --data"):
        evaluate(loaded(), planted_images(6), protocols=["knn"])


def two_ranks(folder):
    records = run(TINY_RESNET, out=Path(folder), protocols=["knn", "linear"], baseline=True)
    again = run(TINY_RESNET, out=Path(folder), protocols=["knn", "linear"], baseline=True)
    return {"same": records == again, "top1": [record["scores"]["top1"] for record in records]}


def test_two_ranks_write_one_file_with_one_rank_s_figures(tmp_path):
    ranks = on_ranks(2, two_ranks, str(tmp_path / "two"))
    alone = run(TINY_RESNET, protocols=["knn", "linear"])
    assert ranks == [{"same": True, "top1": [record["scores"]["top1"] for record in alone]}] * 2
    assert [record["ranks"] for record in records_in(tmp_path / "two")] == [2, 2]


def refused_on_two_ranks(folder):
    """What each rank says when rank 0 alone cannot write."""
    said = {}
    for name in ("predictions", "evaluation.json"):
        out = Path(folder) / name
        if dist.rank() == 0:
            out.mkdir(parents=True)
            (out / "predictions").touch() if name == "predictions" else (out / name).mkdir()
        dist.barrier()
        try:
            run(TINY_RESNET, out=out)
        except UserError as error:
            said[name] = str(error)
    return said


def test_what_rank_0_cannot_write_is_an_error_of_every_rank(tmp_path):
    ranks = on_ranks(2, refused_on_two_ranks, str(tmp_path))
    assert ranks[0] == ranks[1]
    assert (
        "nothing is written there" in ranks[0]["predictions"] and "choose another --out" in ranks[0]["evaluation.json"]
    )


def test_a_second_evaluation_into_the_same_folder_is_refused(tmp_path):
    with only_writer(tmp_path, LOCK), pytest.raises(UserError, match=r"is in use by process \d+ on"):
        run(out=tmp_path)
    assert run(out=tmp_path) == records_in(tmp_path)


def test_the_group_of_ranks_can_be_left():
    leave_ranks()  # there is none: nothing to do


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


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    assert list(features.progress(range(3), "training", 3)) == [0, 1, 2] and not capsys.readouterr().err
    monkeypatch.setattr("tessella.console.SECONDS_BETWEEN_LINES", 0.0)
    assert list(features.progress(range(3), "training", 3)) == [0, 1, 2]
    told = capsys.readouterr().err.splitlines()
    assert told == [f"training {done} of 3, 0 s left" for done in (1, 2, 3)]
    assert list(features.progress(range(3), "", 3)) == [0, 1, 2] and not capsys.readouterr().err
