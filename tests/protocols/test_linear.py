import math
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tessella.errors import UserError
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.features import Features, tensor_digests
from tessella.protocols.linear import (
    RECIPES,
    FewLabelsConfig,
    LinearConfig,
    few_labels,
    fit_by_sgd,
    fit_logistic,
    linear,
    probe_optimizer,
    schedule,
    standardisation,
)
from tessella.protocols.train_images import LabelledBatch, initial_head
from tests.protocols.planted import Tiny, eval_data, meaningless_images, planted_images

linear_module = sys.modules["tessella.protocols.linear"]  # the package's attribute of this name is the function


def noisy_features(n=400, classes=4, d=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.nn.functional.one_hot(labels, d).float() + 0.8 * torch.randn(n, d, generator=generator), labels


def penalised_loss(weight, bias, x, labels, c):
    logits = x.double() @ weight.double().T + bias.double()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return float(c * loss + weight.double().square().sum() / 2)


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learn(c):
    x, labels = noisy_features()
    head = fit_logistic(x, labels, 4, c)
    reference = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x.double().numpy(), labels.numpy())
    theirs = penalised_loss(torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_), x, labels, c)
    assert penalised_loss(*head, x, labels, c) == pytest.approx(theirs, rel=1e-5)
    predicted = torch.nn.functional.linear(x, *head).argmax(dim=1)
    assert (predicted.numpy() == reference.predict(x.numpy())).mean() > 0.995


def test_a_warm_start_reaches_the_same_solution():
    x, labels = noisy_features()
    cold = fit_logistic(x, labels, 4, 0.1)
    warm = fit_logistic(x, labels, 4, 0.1, start=fit_logistic(x, labels, 4, 0.001))
    torch.testing.assert_close(warm.weight, cold.weight, atol=2e-3, rtol=0)


def test_standardised_columns_have_mean_zero_and_variance_one_but_constants_stay_small():
    x = torch.randn(200, 3) * torch.tensor([1.0, 100.0, 0.0]) + 5
    x[:, 2] += 1e-7 * torch.randn(200)
    shift, scale = standardisation(x)
    z = (x - shift) / scale
    torch.testing.assert_close(z[:, :2].std(dim=0, correction=0), torch.ones(2))
    assert z.mean(dim=0).abs().max() < 1e-4 and z[:, 2].abs().max() < 0.01


def test_planted_classes_score_one_by_every_recipe():
    data, backbone = eval_data(), Tiny()
    for config in (LinearConfig(), LinearConfig("lr-grid"), LinearConfig("swav", epochs=3, batch_size=30)):
        scores = linear(backbone, data, config)
        assert scores["top1"] == scores["mean_per_class"] == 1.0
        assert "top5" not in scores  # of three classes it would always be 1
    scores = few_labels(backbone, data, FewLabelsConfig(draws=3))
    assert scores["top1_10"] == 1.0 and scores["std_10"] == 0.0 and scores["top1_1"] > 0.9


def test_labels_without_meaning_score_chance():
    data = eval_data(meaningless_images(400), meaningless_images(800, seed=1, name="noise test"))
    assert linear(Tiny(), data, LinearConfig())["top1"] == pytest.approx(0.25, abs=0.06)
    assert linear(Tiny(), data, LinearConfig("lr-grid", epochs=2))["top1"] == pytest.approx(0.25, abs=0.06)
    scores = few_labels(Tiny(), data, FewLabelsConfig(draws=5))
    assert scores["top1_1"] == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(("recipe", "chosen"), [("fast", "c"), ("lr-grid", "lr")])
def test_the_test_labels_do_not_choose_the_setting(recipe, chosen):
    train, test = planted_images(90, noise=90), planted_images(60, seed=5, noise=90, name="t")
    honest = linear(Tiny(), eval_data(train, test), LinearConfig(recipe))
    test.index.labels = np.zeros_like(test.labels)
    spoiled = linear(Tiny(), eval_data(train, test), LinearConfig(recipe))
    assert honest[chosen] == spoiled[chosen] and honest["held_out_top1"] == spoiled["held_out_top1"]


def test_top5_is_there_when_it_says_something():
    data = eval_data(planted_images(120, classes=6), planted_images(60, classes=6, seed=2, name="t"))
    assert linear(Tiny(), data, LinearConfig())["top5"] == 1.0


def cosine(base, epochs):
    return lambda epoch: base * (1 + math.cos(math.pi * epoch / epochs)) / 2


def drops(base, *places):
    return lambda epoch: base * 0.1 ** sum(epoch >= place for place in places)


# What the papers' codes and documents say, written down a second time: learning rate of an epoch, epochs, batch, decay.
PUBLISHED = {
    "jigclu": (drops(10.0, 60, 80), 100, 256, 0.0),
    "mejigclu": (drops(10.0, 60, 80), 100, 256, 0.0),
    "moco": (drops(30.0, 60, 80), 100, 256, 0.0),
    "swav": (cosine(0.3, 100), 100, 256, 1e-6),
    "smog": (cosine(0.3, 100), 100, 256, 1e-6),
    "smog-swin": (cosine(0.1, 150), 150, 256, 0.0),
    "coke": (cosine(0.2, 90), 90, 1024, 1e-6),
    "coke-multi": (cosine(0.4, 90), 90, 1024, 1e-6),
    "simsiam-lars": (cosine(1.6, 90), 90, 4096, 0.0),
    "lightly": (cosine(0.1, 90), 90, 256, 0.0),
}


def rates(recipe, epochs, steps_per_epoch=1):
    plan = schedule(RECIPES[recipe], epochs, steps_per_epoch)
    return [RECIPES[recipe].lr * plan.factor(step) for step in range(epochs * steps_per_epoch)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_learning_rates_of_every_epoch(recipe):
    rate, epochs, _, _ = PUBLISHED[recipe]
    assert RECIPES[recipe].epochs == epochs
    found = rates(recipe, epochs, steps_per_epoch=2)
    for epoch in range(epochs):
        assert found[2 * epoch] == pytest.approx(rate(epoch), rel=1e-9)
        inside = rate(epoch + 0.5) if recipe == "lightly" else rate(epoch)
        assert found[2 * epoch + 1] == pytest.approx(inside, rel=1e-9)


def test_swav_learning_rates_are_those_of_its_scheduler():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    official = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0)
    for rate in rates("swav", 100):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        official.step()


def test_drops_keep_their_share_of_a_shorter_way():
    assert rates("jigclu", 5) == pytest.approx([10, 10, 10, 1, 0.1])


class Watched(Tiny):
    """Remembers how many images came at a time."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return super().forward(x)


def record_steps(monkeypatch):
    steps = []
    step = torch.optim.SGD.step

    def recorded(self, *args, **kwargs):
        steps.append(dict(self.param_groups[0], kind=type(self).__name__))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    return steps


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_has_the_published_settings(monkeypatch, recipe):
    rate, published_epochs, published_batch, decay = PUBLISHED[recipe]
    assert RECIPES[recipe].batch_size == published_batch
    steps, backbone, data = record_steps(monkeypatch), Watched(), eval_data()
    data.features(backbone, "test")
    del backbone.batches[:]
    scores = linear(backbone, data, LinearConfig(recipe, epochs=5, batch_size=40))
    assert backbone.batches == [40, 40, 10] * 5  # the last batch is kept
    scale = 40 / 256 if recipe == "lightly" else 1.0
    for number, step in enumerate(steps):
        epoch, within = divmod(number, 3)
        epoch = (epoch + within / 3 if recipe == "lightly" else epoch) / 5 * published_epochs
        assert step["lr"] == pytest.approx(scale * rate(epoch), rel=1e-9)
        assert (step["momentum"], step["nesterov"], step["weight_decay"]) == (0.9, False, decay)
        assert step["kind"] == ("LARC" if recipe == "simsiam-lars" else "SGD")
    assert len(steps) == 15 and scores["lr"] == steps[0]["lr"] and scores["batch_size"] == 40


def test_an_epoch_shows_every_image_once_and_the_head_starts_as_published(monkeypatch):
    seen, starts = [], []
    fit = linear_module.fit

    def watched(head, *args, **kwargs):
        starts.append((float(head.weight.detach().std()), float(head.bias.detach().abs().max())))
        return fit(head, *args, **kwargs)

    def mean(batch, logits):
        seen.extend(batch.labels.tolist())
        assert float(batch.weights.sum()) == pytest.approx(1.0)
        return torch.nn.functional.cross_entropy(logits, batch.labels)

    monkeypatch.setattr(linear_module, "fit", watched)
    monkeypatch.setattr(LabelledBatch, "cross_entropy", mean)
    linear(Tiny(), eval_data(), LinearConfig("swav", epochs=1, batch_size=40))
    assert sorted(seen) == sorted(i % 3 for i in range(90))
    assert starts[0][0] == pytest.approx(0.01, rel=0.3) and starts[0][1] == 0.0


def test_lars_scales_both_tensors_by_their_norms():
    head = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    solver = probe_optimizer(RECIPES["simsiam-lars"], head, 1.6)
    head(torch.randn(5, 3)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in head.named_parameters()}
    solver.step()
    for name, p in head.named_parameters():
        local = 0.001 * before[name].norm() / gradients[name].norm()
        torch.testing.assert_close(p.detach(), before[name] - 1.6 * local * gradients[name], rtol=1e-5, atol=1e-7)


def test_the_learning_rate_follows_the_batch_only_when_asked(monkeypatch):
    steps = record_steps(monkeypatch)
    linear(Tiny(), eval_data(), LinearConfig("swav", epochs=1, batch_size=64))
    linear(Tiny(), eval_data(), LinearConfig("swav", epochs=1, batch_size=64, scale_lr=True))
    assert [s["lr"] for s in steps] == [0.3, 0.3, 0.3 / 4, 0.3 / 4]


def test_layers_trained_together_equal_layers_trained_alone_by_torch():
    x, labels = noisy_features(n=50)
    features = Features(x, labels, np.arange(50), {})
    config, lrs, rows = LinearConfig("lr-grid", epochs=3, batch_size=16), (0.01, 0.3, 1e38), torch.arange(5, 50)
    standard = standardisation(x)
    heads = fit_by_sgd(features, rows, 4, lrs, standard, config, torch.device("cpu"))
    assert not torch.isfinite(heads[2].weight).all()  # one that diverges spoils no other
    z = (x - standard[0]) / standard[1]
    for head, lr in zip(heads[:2], lrs[:2], strict=True):
        layer = initial_head(4, 10, 0)
        solver, steps = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9), 0
        for epoch in range(3):
            order = rows[torch.from_numpy(permutation(stream_key(0, "rows"), np.arange(45), epoch))]
            for chosen in order.split(16):
                solver.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * steps / 9)) / 2
                solver.zero_grad()
                torch.nn.functional.cross_entropy(layer(z[chosen]), labels[chosen]).backward()
                solver.step()
                steps += 1
        torch.testing.assert_close(head.weight, layer.weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(head.bias, layer.bias.detach(), rtol=1e-4, atol=1e-6)


def test_a_learning_rate_at_the_end_of_the_grid_is_told():
    data = eval_data(planted_images(90, noise=90), planted_images(60, seed=5, noise=90, name="t"))
    scores = linear(Tiny(), data, LinearConfig("lr-grid", lrs=(1e-6, 1e-5)))
    assert scores["lr"] == 1e-5 and "at the end of those tried" in scores["notes"][0]


@pytest.mark.parametrize("recipe", ["fast", "lr-grid", *RECIPES])
def test_the_backbone_is_bit_equal_afterwards(recipe):
    backbone = Tiny().train()
    before = tensor_digests(backbone)
    linear(backbone, eval_data(), LinearConfig(recipe, epochs=2, batch_size=30))
    assert tensor_digests(backbone) == before
    assert backbone.bn.training and all(p.grad is None for p in backbone.parameters())


def test_a_backbone_that_moves_stops_the_probe():
    class Drifting(Tiny):
        def forward(self, x):
            self.bn.running_mean += 1e-3 * torch.is_grad_enabled()  # only inside the training loop's graph
            self.bn.running_var += 0 if torch.is_inference_mode_enabled() else 1e-3
            return super().forward(x)

    with pytest.raises(AssertionError, match=r"bn\.running_var"):
        linear(Drifting(), eval_data(), LinearConfig("swav", epochs=50, batch_size=30))


def test_the_last_epoch_is_the_result_and_the_best_stands_beside_it():
    data = eval_data(meaningless_images(60), meaningless_images(40, seed=1, name="noise test"))
    scores = linear(Tiny(), data, LinearConfig("jigclu", epochs=6, batch_size=20))
    assert scores["best_test_top1"] >= scores["top1"] and 1 <= scores["best_test_epoch"] <= 6
    assert scores["epochs"] == 6 and scores["lr"] == 10.0


def test_a_probe_that_diverges_says_so():
    backbone = Tiny()
    backbone.bn.weight.data *= 1e20
    scores = linear(backbone, eval_data(), LinearConfig("jigclu", epochs=2, batch_size=30, lr=1e19))
    assert "diverged" in scores["notes"][0] and scores["top1"] == 0.0


def test_one_image_per_class_cannot_pick_a_penalty():
    data = eval_data(planted_images(3))
    with pytest.raises(UserError, match="two or more per class"):
        linear(Tiny(), data, LinearConfig())
    assert np.isfinite(few_labels(Tiny(), data, FewLabelsConfig((1,), draws=1))["top1_1"])


def test_an_image_that_cannot_be_read_is_left_out_of_the_loss(monkeypatch):
    from tessella.data.decode import Unreadable

    train = planted_images(9, seed=1)
    read = train.image

    def broken(row):
        if row == 5:
            raise Unreadable("a hole in it")
        return read(row)

    train.image = broken
    weights = []
    mean = LabelledBatch.cross_entropy
    monkeypatch.setattr(
        LabelledBatch, "cross_entropy", lambda batch, logits: weights.append(batch.weights) or mean(batch, logits)
    )
    scores = linear(Tiny(), eval_data(train), LinearConfig("swav", epochs=1, batch_size=9))
    assert sorted(weights[0].tolist()) == [0.0, *[pytest.approx(1 / 8)] * 8]
    assert scores["notes"] == ["1 train images could not be read and were left out"]
