import csv
import sys
from itertools import islice
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from tessella.errors import UserError
from tessella.protocols.features import extract, tensor_digests
from tessella.protocols.finetune import RECIPES, FinetuneConfig, finetune, finetune_name, schedule
from tessella.protocols.train_images import SubsetOrder, TrainImages, initial_head
from tests.protocols.planted import Tiny, eval_data, meaningless_images, planted_images

training = sys.modules["tessella.protocols.training"]

# Rates of trunk and head with 1 % and with 10 % of the labels, epochs, drops, factor, Nesterov; once more by hand.
PUBLISHED = {
    "swav": ((0.02, 5.0), (0.01, 0.2), 20, (12, 16), 0.2, False),
    "jigclu-readme": ((0.02, 5.0), (0.01, 0.2), 100, (30, 60, 90), 0.1, False),
    "jigclu-code": ((0.02, 0.02), (0.01, 0.01), 100, (30, 60, 90), 0.1, False),
    "vissl-100": ((0.1, 0.1), (0.1, 0.1), 105, (30, 60, 90, 100), 0.1, True),
    "transfer": ((0.1, 0.1), (0.1, 0.1), 105, (30, 60, 90, 100), 0.1, True),
}


class Watched(Tiny):
    """Remembers the size of every batch that it is trained on, in all of its copies."""

    log: ClassVar[list] = []

    def forward(self, x):
        if torch.is_grad_enabled():
            self.log.append((len(x), self.bn.training))
        return super().forward(x)


@pytest.fixture(autouse=True)
def _empty_log():
    Watched.log.clear()


def record_steps(monkeypatch):
    steps = []
    step = torch.optim.SGD.step

    def recorded(self, *args, **kwargs):
        steps.append([dict(group) for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    return steps


def cheap(recipe="swav", **changes):
    return FinetuneConfig(recipe, **{"labels": 1.0, "epochs": 2, "batch_size": 30, "repeats": 1} | changes)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "small"])  # ours
def test_published_rates_of_every_epoch(recipe):
    _, _, epochs, places, drop, _ = PUBLISHED[recipe]
    solver = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    official = torch.optim.lr_scheduler.MultiStepLR(solver, list(places), drop)
    assert RECIPES[recipe].epochs == epochs
    for epoch in range(epochs):
        assert schedule(RECIPES[recipe], epochs, 3).factor(3 * epoch + 2) == pytest.approx(solver.param_groups[0]["lr"])
        solver.step()
        official.step()


def test_drops_keep_their_share_of_a_shorter_way():
    assert [schedule(RECIPES["swav"], 5, 1).factor(epoch) for epoch in range(5)] == pytest.approx([1, 1, 1, 0.2, 0.04])


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "small"])  # ours
@pytest.mark.parametrize("labels", [0.05, 1.0])
def test_every_step_has_the_published_settings(monkeypatch, recipe, labels):
    if recipe == "transfer" and labels < 1:
        return
    few, more, _, places, drop, nesterov = PUBLISHED[recipe]
    steps = record_steps(monkeypatch)
    config = FinetuneConfig(recipe, labels=labels, epochs=10, batch_size=32, repeats=1, weight_decays=(0.0,), lr=None)
    if recipe == "transfer":
        config = FinetuneConfig(recipe, epochs=10, batch_size=32, lrs=(0.1,), weight_decays=(0.0,))
    data = eval_data()
    scores = finetune(Watched(), data, config)
    per_epoch = 1 if labels < 1 else 3 if RECIPES[recipe].partial else 2  # of 90 images
    assert [size for size, _ in Watched.log[:per_epoch]] == ([4] if labels < 1 else [32, 32, 26][:per_epoch])
    assert len(steps) == 10 * per_epoch
    trunk, head = few if labels < 1 else more
    scale = 32 / 256 if nesterov else 1
    for number, (first, second) in enumerate(steps):
        epoch = number // per_epoch
        factor = drop ** sum(epoch * RECIPES[recipe].epochs >= place * 10 for place in places)
        assert first["lr"] == pytest.approx(trunk * scale * factor)
        assert second["lr"] == pytest.approx(head * scale * factor)
        for group in (first, second):
            assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, nesterov, 0.0)
        assert len(first["params"]) == 4 and len(second["params"]) == 2  # convolution and norm; linear layer
    assert (scores["lr"], scores["head_lr"]) == pytest.approx((trunk * scale, head * scale))


def test_the_given_backbone_stays_and_its_copy_learns_in_train_mode():
    backbone = Watched().eval()
    before = tensor_digests(backbone)
    finetune(backbone, eval_data(), cheap())
    assert tensor_digests(backbone) == before
    assert not backbone.training and all(p.grad is None for p in backbone.parameters())
    assert Watched.log and all(training for _, training in Watched.log)


def test_one_epoch_equals_the_same_steps_by_hand():
    data, seed = eval_data(), 3
    scores = finetune(Tiny(), data, cheap(epochs=1, lr=0.05, head_lr=0.5, seed=seed))
    trunk, head = Tiny().train(), initial_head(3, 32, seed)
    solver = torch.optim.SGD(
        [{"params": trunk.parameters(), "lr": 0.05}, {"params": head.parameters(), "lr": 0.5}], momentum=0.9, lr=0.0
    )
    order = SubsetOrder(np.arange(90), data.train.ids, 30, seed, equal=True)
    losses = []
    for batch in islice(TrainImages(data, order, seed).batches(0), 3):
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(trunk(batch.pixels)), batch.labels)
        loss.backward()
        solver.step()
        losses.append(float(loss.detach()))
    assert scores["loss_first"] == pytest.approx(np.mean(losses), rel=1e-5)
    found = extract(trunk, data.test, data.transform, workers=1)
    predicted = head(found.x).argmax(dim=1)
    assert scores["top1"] == pytest.approx(accuracy_score(data.labels("test"), predicted))


def test_planted_classes_are_learned_and_meaningless_ones_are_not():
    scores = finetune(Tiny(), eval_data(), cheap(epochs=6, batch_size=16))
    assert scores["top1"] == scores["mean_per_class"] == 1.0 and scores["loss_last"] < scores["loss_first"]
    noise = eval_data(meaningless_images(200), meaningless_images(800, seed=1, name="noise test"))
    assert finetune(Tiny(), noise, cheap())["top1"] == pytest.approx(0.25, abs=0.06)


def test_few_labels_are_the_mean_of_three_seeds_with_their_spread():
    train, test = (planted_images(200, classes=6, noise=120, seed=seed, name=str(seed)) for seed in (1, 2))
    data = eval_data(train, test)
    scores = finetune(Tiny(), data, FinetuneConfig(labels=0.05, epochs=4))
    assert len(scores["top1_of_seeds"]) == 3 and scores["train_images"] == 10
    assert scores["top1"] == pytest.approx(np.mean(scores["top1_of_seeds"]))
    assert scores["std"]["top1"] == pytest.approx(np.std(scores["top1_of_seeds"], ddof=1))
    singles = [
        finetune(Tiny(), data, FinetuneConfig(labels=0.05, epochs=4, repeats=1, seed=seed)) for seed in (0, 1, 2)
    ]
    assert scores["top1_of_seeds"] == [single["top1"] for single in singles]
    assert "top1_interval" in singles[0] and len({single["subset"] for single in singles}) == 3


def test_a_list_of_names_says_which_labels_count(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(eval_data().train.key(row) for row in range(0, 90, 2)))
    config = FinetuneConfig(label_list=str(path), epochs=1, batch_size=64, repeats=1)
    scores = finetune(Watched(), eval_data(), config)
    assert scores["train_images"] == 45 and [size for size, _ in Watched.log] == [45]
    assert scores["lr"] == 0.01  # half of the labels: not the rates of 1 %
    assert finetune_name(config) == "finetune-swav-list"


def test_the_last_epoch_is_the_result_and_the_best_stands_beside_it():
    data = eval_data(meaningless_images(60), meaningless_images(40, seed=1, name="noise test"))
    scores = finetune(Tiny(), data, cheap(epochs=6))
    assert scores["best_test_top1"] >= scores["top1"] and scores["epochs"] == 6


def test_scikit_learn_finds_the_same_figure_in_the_saved_predictions(tmp_path):
    train, test = (planted_images(60, classes=6, noise=120, seed=seed, name=str(seed)) for seed in (1, 2))
    scores = finetune(Tiny(), eval_data(train, test, predictions=tmp_path), cheap(labels=0.5, repeats=2))
    figures = []
    for name in ("finetune-swav-50-seed0.csv", "finetune-swav-50-seed1.csv"):
        rows = list(csv.DictReader((tmp_path / name).read_text().splitlines()))
        figures.append(accuracy_score([row["label"] for row in rows], [row["predicted"] for row in rows]))
    assert scores["top1_of_seeds"] == pytest.approx(figures)


def test_transfer_picks_its_setting_without_the_test_labels():
    train, test = planted_images(90, noise=90), planted_images(60, seed=5, noise=90, name="t")
    config = cheap("transfer", lrs=(3.0, 0.1), weight_decays=(0.0, 5e-4))
    honest = finetune(Tiny(), eval_data(train, test), config)
    test.index.labels = np.zeros_like(test.labels)
    spoiled = finetune(Tiny(), eval_data(train, test), config)
    assert len(honest["held_out_top1"]) == 4 and honest["held_out_top1"] == spoiled["held_out_top1"]
    assert (honest["lr"], honest["weight_decay"]) == (spoiled["lr"], spoiled["weight_decay"])
    assert honest["lr"] in (3.0 * 30 / 256, 0.1 * 30 / 256)


def test_transfer_holds_out_a_tenth_and_then_learns_from_all():
    finetune(Watched(), eval_data(), cheap("transfer", lrs=(0.1, 0.01), weight_decays=(0.0,), epochs=1, batch_size=128))
    assert [size for size, _ in Watched.log] == [81, 81, 90]


class Killed(Exception):
    pass


def test_a_killed_fine_tuning_goes_on_and_gives_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SNAPSHOT_SECONDS", 0.0)
    train, test = (planted_images(90, classes=6, noise=120, seed=seed, name=str(seed)) for seed in (1, 2))
    config = cheap(epochs=4, repeats=2)
    straight = finetune(Watched(), eval_data(train, test), config)
    whole = len(Watched.log)
    update, steps = training._update, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 20:  # of 24, in the middle of the third epoch of the second seed
            raise Killed
        return update(*args)

    monkeypatch.setattr(training, "_update", dies)
    with pytest.raises(Killed):
        finetune(Watched(), eval_data(train, test, cache=tmp_path), config)
    Watched.log.clear()
    resumed = finetune(Watched(), eval_data(train, test, cache=tmp_path), config)
    assert resumed == straight
    assert len(Watched.log) == 5 and whole == 24  # nothing is trained twice
    assert not (tmp_path / "training").exists()


def test_a_damaged_snapshot_is_as_good_as_none(tmp_path, monkeypatch):
    straight = finetune(Tiny(), eval_data(), cheap())
    monkeypatch.setattr(training.Snapshots, "drop", lambda self: None)
    finetune(Tiny(), eval_data(cache=tmp_path), cheap())
    (snapshot,) = (tmp_path / "training").rglob("*.safetensors")
    snapshot.write_bytes(snapshot.read_bytes()[:-10])
    assert finetune(Tiny(), eval_data(cache=tmp_path), cheap()) == straight


def test_it_leaves_torchs_random_numbers_alone():
    backbone = Tiny()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(backbone, eval_data(), cheap(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_a_divergence_is_told():
    scores = finetune(Tiny(), eval_data(), cheap(lr=1e30, head_lr=1e30))
    assert (
        scores["top1"] == 0.0
        and scores["failed"]
        and "diverged" in " ".join(scores["notes"])
        and scores["loss_last"] is None
    )


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="labels=0 is not a share"):
        finetune(Tiny(), eval_data(), FinetuneConfig(labels=0))
    with pytest.raises(UserError, match="transfer learns from all labels"):
        finetune(Tiny(), eval_data(), FinetuneConfig("transfer", labels=0.1))


def test_names_say_recipe_and_labels():
    names = [FinetuneConfig(), FinetuneConfig("jigclu-code", labels=0.1), FinetuneConfig("vissl-100")]
    assert [finetune_name(config) for config in names] == [
        "finetune-swav-1",
        "finetune-jigclu-code-10",
        "finetune-vissl-100",
    ]
    assert finetune_name(FinetuneConfig("transfer")) == "transfer"


@pytest.mark.parametrize("per_class", [1, 4])
def test_a_small_fine_tuning_of_few_images_learns_instead_of_diverging(per_class):
    images = planted_images(12 * per_class, classes=12, seed=1)
    scores = finetune(Tiny(), eval_data(images, images), FinetuneConfig("small", labels=1.0, batch_size=32))
    assert scores["loss_last"] < np.log(12) and not scores["failed"] and scores["epochs"] >= 100
    assert ("held_out_top1" in scores) == (per_class > 1)
    assert scores["head_lr"] in (5.0, 0.5, 0.05)


def test_a_training_that_ends_worse_than_guessing_is_named_as_failed():
    config = FinetuneConfig("small", labels=1.0, batch_size=32, epochs=2, lr=1.0, head_lr=500.0)
    scores = finetune(Tiny(), eval_data(planted_images(24, classes=12)), config)
    assert scores["failed"] and any(note.startswith("failed: the training ended") for note in scores["notes"])
