"""The trainer that probes, fine-tuning, detection and segmentation share."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tessella.errors import UserError
from tessella.protocols.knn import KnnConfig
from tessella.protocols.linear import LinearConfig, linear
from tessella.protocols.training import Schedule, Snapshots, fit
from tests.protocols.planted import Tiny, eval_data, planted_images

training = sys.modules["tessella.protocols.training"]
DATA = SimpleNamespace(
    train=SimpleNamespace(fingerprint="a"), test=SimpleNamespace(fingerprint="b"), device=torch.device("cpu")
)


def rates_of(scheduler, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    official = scheduler(optimizer)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        official.step()


@pytest.mark.parametrize(
    ("schedule", "official"),
    [
        (Schedule(40, "cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, 40)),
        (Schedule(40, drops=(10, 30), drop=0.2), lambda o: lr_scheduler.MultiStepLR(o, [10, 30], 0.2)),
        (Schedule(40, "poly", power=0.9), lambda o: lr_scheduler.PolynomialLR(o, 40, 0.9)),
        (Schedule(40, warmup=8, warmup_start=0.25), lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 8)),
    ],
)
def test_learning_rates_are_those_of_torchs_schedulers(schedule, official):
    expected = list(rates_of(official, 40))
    assert [schedule.factor(step) for step in range(40)] == pytest.approx(expected)


def test_with_a_unit_of_an_epoch_the_rate_is_constant_within_an_epoch():
    by_epoch, by_step = Schedule(40, "cosine", unit=10), Schedule(4, "cosine")
    assert [by_epoch.factor(step) for step in range(40)] == [by_step.factor(step // 10) for step in range(40)]


def a_training(snapshots, steps=12, **options):
    """Regression with dropout; the batches depend on the step alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
    seen = []

    def batches(first):
        for step in itertools.count(first):
            seen.append(step)
            yield torch.randn(6, 3, generator=torch.Generator().manual_seed(step))

    fitted = fit(
        model,
        lambda x: (model(x)[:, 0] - x.sum(dim=1)).square().mean(),
        batches,
        Schedule(steps, "cosine"),
        torch.optim.AdamW(model.parameters(), lr=0.05),
        snapshots,
        title="",
        seed=5,
        judge=lambda step: float(model[0].weight.detach().sum()),
        judge_at=(4, 8),
        **options,
    )
    return fitted, model.state_dict(), seen


class Killed(Exception):
    pass


def test_a_killed_training_continues_bit_for_bit_and_repeats_no_step(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SNAPSHOT_SECONDS", 0.0)
    straight, weights, _ = a_training(None)
    snapshots = Snapshots(tmp_path, Tiny(), DATA, KnnConfig())
    update, updates = training._update, []

    def dies(*args):
        updates.append(1)
        if len(updates) == 7:
            raise Killed
        return update(*args)

    monkeypatch.setattr(training, "_update", dies)
    with pytest.raises(Killed):
        a_training(snapshots)
    other = Snapshots(tmp_path, Tiny(), DATA, KnnConfig(k=(3,)))  # another question finds no state
    assert other.load("model", nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(torch.zeros(1))])) == {}
    torch.manual_seed(99)
    resumed, again, seen = a_training(snapshots)
    assert resumed == straight and list(resumed.scores) == [4, 8] and seen == list(range(6, 12))
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    snapshots.drop()
    assert not list(tmp_path.iterdir())


def test_the_images_that_could_not_be_read_are_part_of_the_state(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SNAPSHOT_SECONDS", 0.0)
    snapshots, skipped = Snapshots(tmp_path, Tiny(), DATA, KnnConfig()), {"a.jpg": "a hole in it"}
    a_training(snapshots, skipped=skipped)
    later = {}
    _, _, seen = a_training(snapshots, skipped=later)
    assert later == skipped and not seen  # all of it was done before


def test_a_loss_that_is_not_finite_ends_the_training_with_advice_or_is_borne(monkeypatch):
    monkeypatch.setattr(training, "_update", lambda *args: torch.tensor(torch.nan))
    with pytest.raises(UserError, match="the training loss became nan at step 0 of 12: lower lr"):
        a_training(None, advice="lower lr")
    assert len(a_training(None)[0].losses) == 12


def test_a_killed_published_probe_continues_with_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SNAPSHOT_SECONDS", 0.0)
    train, test = (planted_images(90, classes=6, noise=120, seed=seed, name=str(seed)) for seed in (1, 2))
    config = LinearConfig("swav", epochs=4, batch_size=40)
    straight = linear(Tiny(), eval_data(train, test), config)
    update, updates = training._update, []

    def dies(*args):
        updates.append(1)
        if len(updates) == 8:  # of 12, within the third epoch
            raise Killed
        return update(*args)

    monkeypatch.setattr(training, "_update", dies)
    with pytest.raises(Killed):
        linear(Tiny(), eval_data(train, test, cache=tmp_path), config)
    assert linear(Tiny(), eval_data(train, test, cache=tmp_path), config) == straight
    assert len(updates) == 8 + 5 and not (tmp_path / "training").exists()
