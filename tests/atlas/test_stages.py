"""The stages of an atlas, each against an independent slow reference or planted truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score

from tessella.atlas import neighbours as module
from tessella.atlas.clusters import cluster
from tessella.atlas.copies import find_copies
from tessella.atlas.duplicates import duplicates
from tessella.atlas.look import LOOK, flags_of, look
from tessella.atlas.map import components, place
from tessella.atlas.neighbours import exact_neighbours, neighbours
from tessella.atlas.scores import scores
from tessella.atlas.shards import SHARD, Shards, Vectors, read_array, write_array
from tessella.data.sources import open_images
from tessella.errors import UserError
from tests.atlas.photos import COPIES, patches, save


def blobs(n: int, k: int, d: int = 16, spread: float = 0.15, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(k, d))
    labels = random.integers(k, size=n)
    x = centres[labels] / np.linalg.norm(centres[labels], axis=1, keepdims=True) + spread * random.normal(size=(n, d))
    return x.astype(np.float32), labels


def test_shards_are_one_array_and_tell_what_is_missing(tmp_path):
    x = np.random.default_rng(0).normal(size=(2 * SHARD + 7, 3)).astype(np.float32)
    shards = Shards(tmp_path / "x", tmp_path, len(x))
    for number in (0, 2):
        shards.write(number, x[shards.span(number).start : shards.span(number).stop])
    assert shards.missing() == [1]
    shards.write(1, x[SHARD : 2 * SHARD])
    vectors = Vectors.of_shards(shards)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = np.array([2 * SHARD + 3, 0, SHARD, 5, 5])
    np.testing.assert_allclose(vectors.rows(rows), unit[rows], rtol=1e-6)
    np.testing.assert_allclose(vectors.rows(range(SHARD - 2, SHARD + 3)), unit[SHARD - 2 : SHARD + 3], rtol=1e-6)
    np.testing.assert_allclose(torch.cat([part for _, part in vectors.blocks()]), unit, rtol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "other length", "objects"])
def test_a_damaged_array_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "a.npy"
    write_array(path, np.arange(10, dtype=np.float32), tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "other length":
        write_array(path, np.arange(9, dtype=np.float32), tmp_path)
    else:
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy cannot be used"):
        read_array(path, 10, np.float32)


def test_neighbours_are_those_of_a_search_in_double_precision():
    x, _ = blobs(700, 9)
    rows, cosines = exact_neighbours(Vectors.of_array(x), 6)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    expected = np.argsort(-similarity, axis=1)[:, :6]
    assert (rows == expected).mean() > 0.999  # of ties within rounding any may come first
    np.testing.assert_allclose(cosines, np.take_along_axis(similarity, expected, axis=1), atol=1e-6)


def test_few_rows_have_fewer_neighbours():
    rows, cosines = exact_neighbours(Vectors.of_array(np.eye(3, dtype=np.float32)), 5)
    assert (rows[:, :2] >= 0).all() and (rows[:, 2:] == -1).all() and (cosines[:, 2:] == 0).all()


def test_the_search_by_clusters_finds_nearly_all_and_says_how_many(monkeypatch):
    monkeypatch.setattr(module, "EXACT_UP_TO", 1000)
    x, _ = blobs(6000, 40, spread=0.3)
    (rows, _), recall = neighbours(Vectors.of_array(x), 10, seed=0)
    true, _ = exact_neighbours(Vectors.of_array(x), 10)
    found = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, true, strict=True)])
    assert found > 0.9
    assert recall == pytest.approx(found, abs=0.05)
    assert (rows != np.arange(6000)[:, None]).all()


def test_planted_clusters_are_found_nested_and_in_the_number_that_was_planted():
    x, labels = blobs(1500, 8)
    tree = cluster(Vectors.of_array(x), seed=0)
    assert tree.suggested == 8
    assert tree.agreement > 0.95
    middle = np.array([path.rpartition(".")[0] for path in tree.paths])[tree.fine]
    assert adjusted_rand_score(labels, middle) > 0.98
    sizes = [int((middle == path).sum()) for path in dict.fromkeys(path.rpartition(".")[0] for path in tree.paths)]
    assert sum(sizes) == 1500
    # Every fine cluster's centre is the mean direction of its images, and the nearest one of each of them.
    unit = F.normalize(torch.from_numpy(x), dim=1)
    for i in (0, len(tree.paths) - 1):
        mean = F.normalize(unit[torch.from_numpy(tree.fine == i)].sum(dim=0), dim=0)
        assert float(mean @ torch.from_numpy(tree.centres[i])) > 0.999
    again = cluster(Vectors.of_array(x), seed=0)
    assert again.paths == tree.paths and (again.fine == tree.fine).all()


def test_a_number_that_is_asked_for_is_what_comes():
    tree = cluster(Vectors.of_array(blobs(400, 8)[0]), seed=0, number=5)
    assert len({path.rpartition(".")[0] for path in tree.paths}) == 5


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_handful_of_images_has_a_tree_and_a_map(n):
    vectors = Vectors.of_array(blobs(n, 2)[0])
    tree = cluster(vectors, seed=0)
    assert len(tree.fine) == n
    mean, directions = components(vectors, 0)
    projected = ((vectors.rows(range(n)) - mean) @ directions.T).numpy()
    assert place(vectors, exact_neighbours(vectors, 4), projected, 0).shape == (n, 2)


def test_what_is_typical_lies_at_the_centre_and_an_outlier_far_from_all():
    x, _ = blobs(300, 4, spread=0.1)
    x[17] = -x.mean(axis=0) * 3
    vectors = Vectors.of_array(x)
    nearest = exact_neighbours(vectors, 16)
    tree = cluster(vectors, seed=0, number=4)
    found = scores(vectors, tree, nearest, np.full(300, -1, np.int32))
    assert found.outlier[17] == 1 and found.is_outlier[17]
    assert found.is_outlier.sum() <= 5
    for i in range(len(tree.paths)):
        rows = np.flatnonzero(tree.fine == i)
        assert found.typicality[rows[found.distance[rows].argmin()]] == 1
    assert (found.margin >= 0).all()


def test_a_pair_of_odd_copies_is_an_outlier_all_the_same():
    x, _ = blobs(300, 4, spread=0.1)
    x[17] = x[18] = -x.mean(axis=0) * 3
    vectors = Vectors.of_array(x)
    group = np.full(300, -1, np.int32)
    group[[17, 18]] = 0
    found = scores(vectors, cluster(vectors, seed=0, number=4), exact_neighbours(vectors, 16), group)
    assert found.is_outlier[[17, 18]].all()


def test_the_map_keeps_planted_clusters_together():
    x, labels = blobs(400, 4)
    vectors = Vectors.of_array(x)
    mean, directions = components(vectors, 0)
    projected = ((vectors.rows(range(400)) - mean) @ directions.T).numpy()
    xy = place(vectors, exact_neighbours(vectors, 16), projected, 0)
    assert xy.min() >= 0 and xy.max() <= 1
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.98


def test_every_kind_of_copy_is_found_and_nothing_else(tmp_path):
    originals = patches(60)
    pictures = {f"{i:02d}": picture for i, picture in enumerate(originals)}
    for i, (kind, change) in enumerate(COPIES.items()):
        pictures[f"copy of {i:02d}, {kind}"] = change(originals[i])
    pictures["same file as 20"] = originals[20]
    found = duplicates(open_images(str(save(tmp_path, pictures))), None, workers=1)
    groups = {frozenset(key.removesuffix(".png") for key in group.keys) for group in found.groups}
    expected = {frozenset((f"{i:02d}", f"copy of {i:02d}, {kind}")) for i, kind in enumerate(COPIES)}
    assert groups == expected | {frozenset(("20", "same file as 20"))}
    why = {frozenset(key.removesuffix(".png") for key in group.keys): group.why[1] for group in found.groups}
    assert why[frozenset(("20", "same file as 20"))] == "the same file"
    assert why[frozenset(("02", "copy of 02, mirrored"))].startswith("mirrored")


def test_features_decide_about_pairs_that_pixels_leave_open():
    random = np.random.default_rng(0)
    signatures = F.normalize(torch.from_numpy(random.normal(size=(40, 3, 80))).float(), dim=2)
    mix = F.normalize(signatures[0] + 0.9 * F.normalize(signatures[1], dim=1), dim=1)  # cosine 0.74 to image 0
    signatures[39] = mix
    x = random.normal(size=(40, 16)).astype(np.float32)
    x[39] = x[0]
    hashes = random.integers(256, size=(40, 32)).astype(np.uint8)
    near = signatures.half().numpy()
    assert find_copies(hashes, near).group.max() == -1
    vectors = Vectors.of_array(x)
    found = find_copies(hashes, near, vectors, exact_neighbours(vectors, 8))
    assert np.flatnonzero(found.group >= 0).tolist() == [0, 39]


def test_dark_bright_blank_and_blurred_images_are_flagged(tmp_path):
    from PIL import Image, ImageFilter

    pictures = {f"{i:02d}": picture.resize((140, 140)) for i, picture in enumerate(patches(30))}
    pictures["blurred"] = pictures["03"].filter(ImageFilter.GaussianBlur(5))
    pictures["dark"] = pictures["04"].point(lambda value: value // 12)
    pictures["blank"] = Image.new("RGB", (100, 80), (40, 90, 200))
    images = open_images(str(save(tmp_path / "photos", pictures)))
    shards = Shards(tmp_path / "look", tmp_path, len(images))
    look(images, shards, 2)
    columns = {name: shards.column(name, LOOK) for name in ("brightness", "contrast", "bright_end", "sharpness")}
    flags = dict(zip((images.key(i) for i in range(len(images))), flags_of(columns).tolist(), strict=True))
    from tessella.atlas.content import BLANK, BLURRED, DARK

    assert flags["blurred.png"] & BLURRED and flags["dark.png"] & DARK and flags["blank.png"] & BLANK
    assert sum(value > 0 for value in flags.values()) <= 5
