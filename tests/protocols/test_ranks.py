import torch

from tessella import dist
from tessella.data.decode import Unreadable
from tessella.protocols.clustering import ClusteringConfig, clustering
from tessella.protocols.features import EvalTransform, extract
from tessella.protocols.knn import KnnConfig, knn
from tessella.protocols.linear import LinearConfig, linear
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


def work_of_this_rank():
    """Everything that ranks share, on odd numbers of images: one rank has a row more."""
    backbone = Tiny()
    found = extract(backbone, with_a_hole(planted_images(11)), EvalTransform.of(8), batch_size=3, workers=1)
    noise = eval_data(meaningless_images(101), meaningless_images(51, seed=1, name="noise test"))
    hard = eval_data(planted_images(80, noise=90), planted_images(41, seed=5, noise=90, name="hard test"))
    return {
        "features": found.x,
        "labels": found.labels,
        "rows": torch.from_numpy(found.rows),
        "skipped": found.skipped,
        "seen": backbone.seen,
        "knn": [value for value in knn(Tiny(), noise, KnnConfig()).values() if isinstance(value, float)],
        "fast": linear(Tiny(), hard, LinearConfig())["top1"],
        "swav": linear(Tiny(), hard, LinearConfig("swav", epochs=2, batch_size=16))["top1"],
        "clustering": clustering(Tiny(), hard, ClusteringConfig(restarts=2))["nmi"],
        "rank": dist.rank(),
    }


def test_two_ranks_share_the_images_and_give_the_same_figures_as_one():
    alone = work_of_this_rank()
    ranks = on_ranks(2, work_of_this_rank)
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert [rank["seen"] for rank in ranks] == [5, 5] and alone["seen"] == 10  # the unreadable one is rank 0's
    assert alone["skipped"] == {str(planted_images(11).key(BROKEN)): "a hole in it"}
    for rank in ranks:
        torch.testing.assert_close(rank["features"], alone["features"], atol=1e-5, rtol=1e-5)
        assert torch.equal(rank["labels"], alone["labels"]) and torch.equal(rank["rows"], alone["rows"])
        for name in ("skipped", "knn", "fast", "swav", "clustering"):
            assert rank[name] == alone[name], name
