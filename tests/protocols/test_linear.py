import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tessella.errors import UserError
from tessella.protocols.features import tensor_digests
from tessella.protocols.linear import (
    FewLabelsConfig,
    LinearConfig,
    balanced_rows,
    few_labels,
    fit_logistic,
    learning_rate,
    linear,
    standardisation,
    stratified_split,
)
from tests.protocols.planted import Tiny, eval_data, meaningless_images, planted_images


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


def test_the_held_out_part_is_a_share_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3 + [3])
    fit, held = stratified_split(labels, 0.1, seed=0)
    assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(len(labels)))
    assert torch.bincount(labels[held], minlength=4).tolist() == [10, 5, 1, 0]
    assert torch.equal(held, stratified_split(labels, 0.1, seed=0)[1])
    assert not torch.equal(held, stratified_split(labels, 0.1, seed=1)[1])


def test_few_labels_are_balanced_nested_and_reproducible():
    labels = torch.arange(100) % 5
    one, ten = balanced_rows(labels, 1, 0, 3), balanced_rows(labels, 10, 0, 3)
    assert torch.bincount(labels[ten]).tolist() == [10] * 5 and len(ten.unique()) == 50
    assert set(one.tolist()) <= set(ten.tolist())
    assert torch.equal(ten, balanced_rows(labels, 10, 0, 3))
    assert not torch.equal(ten, balanced_rows(labels, 10, 0, 4))
    with pytest.raises(UserError, match=r"21 labels per class .* has only 20"):
        balanced_rows(labels, 21, 0, 0)


def test_planted_classes_score_one_by_every_recipe():
    data, backbone = eval_data(), Tiny()
    for config in (LinearConfig(), LinearConfig("swav", epochs=3, batch_size=30)):
        scores = linear(backbone, data, config)
        assert scores["top1"] == scores["mean_per_class"] == 1.0
        assert "top5" not in scores  # of three classes it would always be 1
    scores = few_labels(backbone, data, FewLabelsConfig(draws=3))
    assert scores["top1_10"] == 1.0 and scores["std_10"] == 0.0 and scores["top1_1"] > 0.9


def test_labels_without_meaning_score_chance():
    data = eval_data(meaningless_images(400), meaningless_images(800, seed=1, name="noise test"))
    assert linear(Tiny(), data, LinearConfig())["top1"] == pytest.approx(0.25, abs=0.06)
    scores = few_labels(Tiny(), data, FewLabelsConfig(draws=5))
    assert scores["top1_1"] == pytest.approx(0.25, abs=0.06)


def test_the_test_labels_do_not_choose_the_penalty():
    train, test = planted_images(90, noise=90), planted_images(60, seed=5, noise=90, name="t")
    honest = linear(Tiny(), eval_data(train, test), LinearConfig())
    test.labels[:] = 0
    spoiled = linear(Tiny(), eval_data(train, test), LinearConfig())
    assert honest["c"] == spoiled["c"] and honest["held_out_top1"] == spoiled["held_out_top1"]


def test_top5_is_there_when_it_says_something():
    data = eval_data(planted_images(120, classes=6), planted_images(60, classes=6, seed=2, name="t"))
    assert linear(Tiny(), data, LinearConfig())["top5"] == 1.0


def test_swav_learning_rates():
    assert learning_rate("swav", 0) == pytest.approx(0.3)
    assert learning_rate("swav", 50) == pytest.approx(0.15)
    assert learning_rate("swav", 25) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert learning_rate("swav", 99) == pytest.approx(0.3 * math.sin(math.pi / 200) ** 2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    official = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0)
    for epoch in range(100):
        assert learning_rate("swav", epoch) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        official.step()


def test_jigclu_learning_rates():
    values = [learning_rate("jigclu", epoch) for epoch in range(100)]
    assert values == [10.0] * 60 + [1.0] * 20 + [0.1] * 20
    assert [learning_rate("jigclu", epoch, 5, base=1.0) for epoch in range(5)] == [1.0, 1.0, 1.0, 0.1, 0.01]


def record_steps(monkeypatch):
    steps = []
    step = torch.optim.SGD.step

    def recorded(self, *args, **kwargs):
        steps.append(dict(self.param_groups[0]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    return steps


@pytest.mark.parametrize(("recipe", "lr", "decay"), [("swav", 0.3, 1e-6), ("jigclu", 10.0, 0.0)])
def test_augmented_recipes_train_with_the_published_settings(monkeypatch, recipe, lr, decay):
    steps = record_steps(monkeypatch)
    linear(Tiny(), eval_data(), LinearConfig(recipe, epochs=5, batch_size=30))
    assert len(steps) == 15
    assert [s["lr"] for s in steps[::3]] == [learning_rate(recipe, epoch, 5) for epoch in range(5)]
    assert steps[0]["lr"] == lr
    assert all((s["momentum"], s["nesterov"], s["weight_decay"]) == (0.9, False, decay) for s in steps)


def test_the_learning_rate_follows_the_batch_only_when_asked(monkeypatch):
    steps = record_steps(monkeypatch)
    linear(Tiny(), eval_data(), LinearConfig("swav", epochs=1, batch_size=64))
    linear(Tiny(), eval_data(), LinearConfig("swav", epochs=1, batch_size=64, scale_lr=True))
    assert [s["lr"] for s in steps] == [0.3, 0.3 / 4]


@pytest.mark.parametrize("recipe", ["fast", "swav", "jigclu"])
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
