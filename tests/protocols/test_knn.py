import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tessella.ops.nearest import largest
from tessella.protocols.knn import KnnConfig, knn, knn_predict
from tests.protocols.planted import Tiny, eval_data, meaningless_images, planted_images


def noisy_features(n, classes=5, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    x = torch.nn.functional.one_hot(labels, d).float() + 0.7 * torch.randn(n, d, generator=generator)
    return x * (0.5 + torch.rand(n, 1, generator=generator)), labels


def naive_knn(train_x, train_labels, test_x, k, temperature, classes, exclude=None):
    predictions = []
    for i, query in enumerate(test_x.double().numpy()):
        similar = []
        for j, other in enumerate(train_x.double().numpy()):
            if exclude is None or int(exclude[i]) != j:
                cosine = query @ other / np.linalg.norm(query) / np.linalg.norm(other)
                similar.append((cosine, int(train_labels[j])))
        votes = [0.0] * classes
        for cosine, label in sorted(similar, reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature)
        predictions.append(int(np.argmax(votes)))
    return torch.tensor(predictions)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (7, 0.5), (60, 0.1)])
def test_equals_a_double_loop(k, temperature):
    (train_x, train_y), (test_x, _) = noisy_features(60), noisy_features(25, seed=1)
    found = knn_predict(train_x, train_y, test_x, classes=5, ks=[k], temperatures=[temperature])
    assert torch.equal(found[k, temperature], naive_knn(train_x, train_y, test_x, k, temperature, 5))


def test_equals_scikit_learn():
    (train_x, train_y), (test_x, _) = noisy_features(300), noisy_features(100, seed=1)
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    reference.fit(train_x.numpy(), train_y.numpy())
    found = knn_predict(train_x, train_y, test_x, classes=5, ks=[20], temperatures=[0.07])
    assert found[20, 0.07].tolist() == reference.predict(test_x.numpy()).tolist()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunk_size_does_not_matter(chunk):
    (train_x, train_y), (test_x, _) = noisy_features(80), noisy_features(30, seed=1)
    options = dict(classes=5, ks=[1, 20], temperatures=[0.07, 0.1])
    whole = knn_predict(train_x, train_y, test_x, **options)
    parts = knn_predict(train_x, train_y, test_x, chunk=chunk, **options)
    assert all(torch.equal(whole[setting], parts[setting]) for setting in whole)


def test_the_largest_of_long_rows_are_those_of_a_sort():
    for length, k in ((1000, 3), (997, 20), (64, 16), (50, 50)):
        x = torch.randn(5, length)
        x[0, 0] = -torch.inf  # what is left out
        values, columns = largest(x, k)
        expected = x.sort(dim=1, descending=True)
        assert torch.equal(values, expected.values[:, :k]) and torch.equal(columns, expected.indices[:, :k])


@pytest.mark.parametrize("chunk", [11, 5_000_000])
def test_leaving_one_out_equals_a_double_loop(chunk):
    x, y = noisy_features(40)
    own = torch.arange(40)
    found = knn_predict(x, y, x, classes=5, ks=[3], temperatures=[0.1], exclude=own, chunk=chunk)
    assert torch.equal(found[3, 0.1], naive_knn(x, y, x, 3, 0.1, 5, exclude=own))


@pytest.mark.parametrize("toward", [1, -1])  # similarities near 1 and near -1: exp(200) and exp(-200)
def test_a_tiny_temperature_neither_overflows_nor_underflows(toward):
    (train_x, train_y), (test_x, _) = noisy_features(60), noisy_features(20, seed=1)
    train_x, test_x = train_x + 10, toward * (test_x + 10)
    found = knn_predict(train_x, train_y, test_x, classes=5, ks=[7], temperatures=[0.005])
    assert torch.equal(found[7, 0.005], naive_knn(train_x, train_y, test_x, 7, 0.005, 5))


def test_planted_classes_score_one():
    scores = knn(Tiny(), eval_data(), KnnConfig())
    assert scores["top1"] == scores["k1"] == scores["k20_T0.1"] == scores["mean_per_class"] == 1.0
    assert scores["per_class"] == {"0": 1.0, "1": 1.0, "2": 1.0}


def test_labels_without_meaning_score_chance():
    data = eval_data(meaningless_images(800), meaningless_images(800, seed=1, name="noise test"))
    scores = knn(Tiny(), data, KnnConfig())
    assert scores["top1"] == pytest.approx(0.25, abs=0.06)


def test_train_as_test_leaves_each_image_itself_out():
    images = meaningless_images(400)
    scores = knn(Tiny(), eval_data(images, images), KnnConfig())
    assert scores["leave_one_out"] and scores["k1"] < 0.4  # with itself as neighbour it would be 1


def test_a_k_above_the_number_of_images_is_clipped_and_said():
    scores = knn(Tiny(), eval_data(), KnnConfig())
    assert scores["k90_T0.07"] == scores["k90_T0.1"]
    assert scores["notes"] == ["k 200 is more than the 90 neighbours there are; k 90 was used"]


def test_classes_come_from_train_and_test_together():
    train, test = planted_images(60, classes=5, seed=1), planted_images(60, classes=2, seed=2, name="t")
    assert knn(Tiny(), eval_data(train, test), KnnConfig())["per_class"].keys() == {"0", "1"}
    train, test = planted_images(60, classes=2, seed=1), planted_images(60, classes=5, seed=2, name="t")
    scores = knn(Tiny(), eval_data(train, test), KnnConfig())
    assert scores["per_class"]["0"] == 1.0 and scores["per_class"]["4"] == 0.0
