from pathlib import Path

import pytest
import torch

from tessella import dist
from tessella.data.decode import Unreadable
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.protocols.clustering import ClusteringConfig, clustering
from tessella.protocols.duplicates import DuplicatesConfig, duplicates
from tessella.protocols.features import extract
from tessella.protocols.finetune import FinetuneConfig, finetune
from tessella.protocols.knn import KnnConfig, knn
from tessella.protocols.linear import LinearConfig, linear
from tessella.protocols.lowshot import LowShotConfig, SvmConfig, lowshot, svm
from tests.protocols.planted import Tiny, eval_data, meaningless_images, planted_images
from tests.ranks import on_ranks

BROKEN = 4


def with_a_hole(images):
    read = images.image

    def image(row):
        if row == BROKEN:
            raise Unreadable("a hole in it")
        return read(row)

    images.image = image
    return images


def work_of_this_rank(cache):
    """Everything that ranks share, on odd numbers of images: one rank has a row more."""
    backbone = Tiny()
    found = extract(backbone, with_a_hole(planted_images(11)), EvalTransform.of(8), batch_size=3, workers=1)
    noise = eval_data(meaningless_images(101), meaningless_images(51, seed=1, name="noise test"))
    hard = eval_data(planted_images(80, noise=90), planted_images(41, seed=5, noise=90, name="hard test"))
    # The last batch of an epoch has 16 images: as many as two ranks can share equally.
    tuned = finetune(Tiny(), hard, FinetuneConfig(labels=1.0, epochs=2, batch_size=32))
    cached = eval_data(planted_images(81, noise=90), cache=Path(cache))
    return {
        "features": found.x,
        "labels": found.labels,
        "rows": torch.from_numpy(found.rows),
        "skipped": found.skipped,
        "seen": backbone.seen,
        "knn": [value for value in knn(Tiny(), noise, KnnConfig()).values() if isinstance(value, float)],
        "fast": linear(Tiny(), hard, LinearConfig())["top1"],
        "swav": linear(Tiny(), hard, LinearConfig("swav", epochs=2, batch_size=33))["top1"],
        "lr-grid": linear(Tiny(), hard, LinearConfig("lr-grid", epochs=2))["top1"],
        "clustering": clustering(Tiny(), hard, ClusteringConfig(restarts=2))["nmi"],
        "svm": svm(Tiny(), hard, SvmConfig(costs=(0.01, 0.1)))["map"],
        "lowshot": lowshot(Tiny(), hard, LowShotConfig((2,), draws=2))["map_2"],
        "duplicates": duplicates(Tiny(), hard, DuplicatesConfig(similarity=0.7))["near_duplicates"],
        "finetune": tuned["top1"],
        "loss": tuned["loss_last"],
        "cached": cached.features(Tiny(), "train").x,
        "cached again": cached.features(Tiny(1), "train").x,
        # The second batch has one image: a rank without a share of it does no harm.
        "one image": linear(Tiny(), eval_data(planted_images(5)), LinearConfig("swav", epochs=2, batch_size=4))["top1"],
        "odd batch": refusal(
            lambda: finetune(Tiny(), hard, FinetuneConfig(labels=1.0, epochs=1, batch_size=5))["epochs"]
        ),
        "rank": dist.rank(),
    }


def test_two_ranks_share_the_images_and_give_the_same_figures_as_one(tmp_path):
    alone = work_of_this_rank(str(tmp_path / "one"))
    ranks = on_ranks(2, work_of_this_rank, str(tmp_path / "two"))
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert [rank["seen"] for rank in ranks] == [5, 5] and alone["seen"] == 10  # the unreadable one is rank 0's
    assert alone["skipped"] == {str(planted_images(11).key(BROKEN)): "a hole in it"}
    for rank in ranks:
        torch.testing.assert_close(rank["features"], alone["features"], atol=1e-5, rtol=1e-5)
        assert torch.equal(rank["labels"], alone["labels"]) and torch.equal(rank["rows"], alone["rows"])
        for name in (
            "skipped",
            "knn",
            "fast",
            "swav",
            "lr-grid",
            "clustering",
            "svm",
            "duplicates",
            "finetune",
            "one image",
        ):
            assert rank[name] == alone[name], name
        assert rank["lowshot"] == pytest.approx(alone["lowshot"], abs=1e-6)
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-4)  # batch norm over both ranks
        for name in ("cached", "cached again"):
            torch.testing.assert_close(rank[name], alone[name], atol=1e-5, rtol=1e-5)
    assert {rank["odd batch"] for rank in ranks} == {
        "batch_size=5 cannot be shared equally by 2 ranks: use a multiple of 2"
    }


def refusal(function):
    try:
        return str(function())
    except UserError as error:
        return str(error)
