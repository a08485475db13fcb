"""MEJigClu's invariants, each from its specification."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.sampler import EpochSampler, SlotSampler, share
from tessella.data.views import draw
from tessella.errors import UserError
from tessella.methods.jigclu import Jigclu, JigcluConfig
from tessella.methods.mejigclu import Mejigclu, MejigcluConfig
from tessella.methods.method import Method, Progress, Setting
from tessella.ops.losses import supervised_contrastive
from tessella.ops.montage import pool_cells, shuffled_montages, tile_order
from tessella.ops.partition import partition
from tests.float64 import precision
from tests.methods.tiny import (
    BATCH,
    averaged_gradients,
    jigclu,
    mejigclu,
    on_this_rank,
    random_batch,
    this_ranks_share,
)
from tests.ranks import on_ranks

START = Progress(0, steps_per_epoch=4, epochs=10)
IDS = np.arange(100) * 7919 + 3  # of the images that `mejigclu()` is told of


def slotted_batch(method: Method, step: int = 0) -> Batch:
    """Random tiles of the images that the method's own order shows at a step."""
    order = method.sampler(method.config, len(IDS), BATCH, seed=0)
    return random_batch(method, seed=step)._replace(instances=torch.from_numpy(order.batch(0, step)))


# --- views and order ------------------------------------------------------------------------------------------


def test_a_fixed_overlap_gives_jigclus_views_bit_for_bit():
    fixed, theirs = MejigcluConfig(overlap_mode="fixed"), JigcluConfig()
    sizes = np.random.default_rng(0).integers(20, 400, (100, 2))
    ours, official = (draw(m.view_spec(c), 5, 3, IDS, sizes) for m, c in ((Mejigclu, fixed), (Jigclu, theirs)))
    for one, other in zip(ours, official, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("mode", "per"), [("per_image", "image"), ("per_batch", "batch"), ("per_axis", "axis")])
def test_the_overlap_is_drawn_from_the_papers_range(mode: str, per: str):
    (group,) = Mejigclu.view_spec(MejigcluConfig(overlap_mode=mode)).groups  # type: ignore[arg-type]
    assert (group.overlap, group.overlap_max, group.overlap_per) == (0.15, 0.45, per)


def test_the_order_is_slot_by_slot_unless_slots_are_random():
    order = Mejigclu.sampler(MejigcluConfig(), len(IDS), 8, seed=1)
    assert isinstance(order, SlotSampler)
    assert (partition(100, 8, 0)[order.batch(2, 5)] == np.arange(8)).all()
    assert isinstance(Mejigclu.sampler(MejigcluConfig(slots="random"), len(IDS), 8, seed=1), EpochSampler)
    many = Mejigclu.sampler(MejigcluConfig(categories=20, partition_seed=3, uneven="wrap"), len(IDS), 8, seed=1)
    assert many.parts == 20 and many.steps_per_epoch == 100 // 8
    assert len(set(partition(100, 20, 3)[many.batch(0, 0)])) == 8


def test_random_slots_give_an_image_every_label_equally_often():
    order = Mejigclu.sampler(MejigcluConfig(slots="random"), 40, 8, seed=1)
    epochs = (np.concatenate([order.batch(epoch, step) for step in range(5)]) for epoch in range(800))
    slots = [(epoch == 7).nonzero()[0][0] % 8 for epoch in epochs]
    assert stats.chisquare(np.bincount(slots, minlength=8)).pvalue > 1e-3


# --- labels ---------------------------------------------------------------------------------------------------


def test_the_category_of_an_image_is_its_slot_in_every_batch_and_each_is_asked_for_four_times():
    method = mejigclu()
    for step in range(12):
        categories = method._categories(slotted_batch(method, step).instances)
        assert torch.equal(categories, torch.arange(BATCH))
        labels = categories[tile_order(0, step, 4 * BATCH) % BATCH]
        assert torch.equal(labels, tile_order(0, step, 4 * BATCH) % BATCH)
        assert torch.equal(labels.bincount(), torch.full((BATCH,), 4))


def test_micro_batches_ask_for_categories_of_the_whole_batch():
    method = mejigclu(batch=BATCH // 2, accumulate=2)
    first, second = share(method.sampler(method.config, len(IDS), BATCH, seed=0).batch(0, 0), 0, 1, 2)
    assert method.category_head[-1].out_features == BATCH
    assert method._categories(torch.from_numpy(first)).tolist() == [0, 1, 2, 3]
    assert method._categories(torch.from_numpy(second)).tolist() == [4, 5, 6, 7]


def test_an_image_that_stands_in_for_an_unreadable_one_keeps_its_own_category():
    method = mejigclu()
    instances = slotted_batch(method).instances
    instances[2] = instances[5]
    assert method._categories(instances).tolist() == [0, 1, 5, 3, 4, 5, 6, 7]


def test_with_random_slots_the_slot_is_the_category():
    method = mejigclu(slots="random")
    assert method.partition is None and method.category_head[-1].out_features == BATCH
    assert method._categories(torch.randint(0, 100, (BATCH,))).tolist() == list(range(BATCH))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="categories=512 has no meaning with slots=random"):
        MejigcluConfig(slots="random", categories=512)


# --- loss -----------------------------------------------------------------------------------------------------


def test_loss_equals_the_steps_written_out_tile_by_tile():
    method, again = mejigclu(), mejigclu()
    batch = slotted_batch(method)
    step = method(batch, START)

    order = tile_order(0, 0, 4 * BATCH)
    cells = pool_cells(again.backbone.feature_map(shuffled_montages(batch.views[0], order, 2)), 2)
    vectors = cells.flatten(0, 1)
    z = F.normalize(again.cluster_head[2](torch.relu(again.cluster_head[0](vectors))), dim=1)
    head = again.category_head
    clustering, category = torch.zeros(()), torch.zeros(())
    for k, tile in enumerate(order.tolist()):
        image = tile % BATCH
        others = [j for j in range(4 * BATCH) if j != k]
        log_total = torch.stack([z[k] @ z[j] / 0.3 for j in others]).logsumexp(0)
        positives = [j for j in others if int(order[j]) % BATCH == image]
        clustering += sum(log_total - z[k] @ z[j] / 0.3 for j in positives) / 3 / (4 * BATCH)
        logits = head[2](torch.relu(head[0](vectors[k])))
        category -= logits.log_softmax(0)[partition(100, BATCH, 0)[batch.instances[image]]] / (4 * BATCH)
    torch.testing.assert_close(step.metrics["cluster_loss"], clustering.detach())
    torch.testing.assert_close(step.metrics["category_loss"], category.detach())
    torch.testing.assert_close(step.loss, 0.3 / 0.07 * clustering + category, atol=1e-5, rtol=1e-5)


def test_the_weights_and_the_papers_scale_make_the_total():
    settings = {"cluster_scale": "paper", "cluster_weight": 0.5, "category_weight": 3.0}
    method = mejigclu(**settings)
    step = method(slotted_batch(method), START)
    expected = 0.5 * step.metrics["cluster_loss"] + 3 * step.metrics["category_loss"]
    torch.testing.assert_close(step.loss.detach(), expected)


def test_the_clustering_branch_is_jigclus():
    """Same seed, same tiles: backbone and clustering head start alike, so loss and gradient agree."""
    ours, theirs = mejigclu(category_weight=0.0), jigclu(location_weight=0.0)
    batch = random_batch(theirs)
    for method in (ours, theirs):
        method(batch, START).loss.backward()
    for name in ("backbone.conv1.weight", "backbone.layer4.0.conv2.weight", "cluster_head.0.weight"):
        one, other = ours.get_parameter(name), theirs.get_parameter(name)
        assert torch.equal(one, other)
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("categories", [None, 50])
def test_a_blind_category_head_is_at_ln_c(categories: int | None):
    method = mejigclu(categories=categories)
    nn.init.zeros_(method.category_head[-1].weight)
    nn.init.zeros_(method.category_head[-1].bias)
    loss = method(slotted_batch(method), START).metrics["category_loss"]
    torch.testing.assert_close(loss, torch.tensor(math.log(categories or BATCH)))


def test_collapse_value_is_reached_by_equal_embeddings():
    method = mejigclu(categories=50)
    for layer in (method.cluster_head[2], method.category_head[-1]):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(method.category_head[-1].bias)
    loss = method(slotted_batch(method), START).loss.detach()
    assert float(loss) == pytest.approx(method.collapse_loss(), rel=1e-5)


def test_the_category_head_has_no_layer_in_common_with_the_clustering_head_and_any_width():
    assert [tuple(p.shape) for p in mejigclu().category_head.parameters()] == [(32, 32), (32,), (8, 32), (8,)]
    assert mejigclu(category_hidden=5).category_head[0].weight.shape == (5, 32)
    assert [tuple(p.shape) for p in mejigclu(category_hidden=0).category_head.parameters()] == [(8, 32), (8,)]


def test_both_losses_have_32_bits_under_autocast():
    method = mejigclu()
    with torch.autocast("cpu", torch.bfloat16):
        step = method(slotted_batch(method), START)
    expected = supervised_contrastive(step.embeddings, tile_order(0, START.step, 4 * BATCH) % BATCH, 0.3)
    assert torch.equal(step.metrics["cluster_loss"], expected)
    assert step.loss.dtype == step.metrics["category_loss"].dtype == torch.float32


def test_three_by_three_tiles_train():
    method = mejigclu(tiles=3, overlap=(0.0, 0.1))
    step = method(slotted_batch(method), START)
    step.loss.backward()
    assert step.embeddings.shape == (9 * BATCH, 16) and torch.isfinite(step.loss)


def test_cluster_loss_equals_the_contrast_of_embeddings_in_unshuffled_order():
    method = mejigclu()
    step = method(slotted_batch(method), START)
    unshuffled = torch.empty_like(step.embeddings)
    unshuffled[tile_order(0, START.step, 4 * BATCH)] = step.embeddings
    expected = supervised_contrastive(unshuffled, torch.arange(4 * BATCH) % BATCH, 0.3)
    torch.testing.assert_close(step.metrics["cluster_loss"], expected)


# --- ranks and state ------------------------------------------------------------------------------------------


@precision(torch.float64)
def three_steps() -> dict[str, Tensor]:
    """Losses, metrics and gradients of three updates on this rank's share, and the state after them."""
    method = on_this_rank(mejigclu(categories=12))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    result = {}
    for step in range(3):
        progress = Progress(step, 3, 1)
        if step == 0:
            method.epoch_start(progress)
        done = method(this_ranks_share(slotted_batch(method, step)), progress)
        done.loss.backward()
        gradients = averaged_gradients(method)
        for name, parameter in method.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        means = torch.stack([done.loss.detach(), *done.metrics.values()])
        result[f"loss and metrics {step}"] = dist.all_reduce_sum(means) / dist.world_size()
        result |= {f"gradient {step} {name}": g for name, g in gradients.items()}
    return result | {f"state {name}": value for name, value in method.state_dict().items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_in_loss_gradient_and_state(world_size: int):
    one, ranks = three_steps(), on_ranks(world_size, three_steps)
    for rank in ranks:
        assert set(rank) == set(one)
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_another_number_of_categories_or_of_images_is_refused():
    state = mejigclu().state_dict()
    mejigclu(seed=1).load_state_dict(state)
    for other in (mejigclu(categories=9), mejigclu(batch=4), mejigclu(partition_seed=1)):
        with pytest.raises(UserError, match="the saved run cut 100 images into 8 parts"):
            other.load_state_dict(state)
    grown = Mejigclu(mejigclu().config, mejigclu().backbone, Setting(101, BATCH, 0))
    with pytest.raises(UserError, match="this one cuts 101"):
        grown.load_state_dict(state)


# --- what the order is for ------------------------------------------------------------------------------------


class Patches(nn.Module):
    """A backbone of one layer that keeps the tiles of a montage apart."""

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, self.feature_dim, 4, 4)

    def feature_map(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


def mean_category_loss(slots: str) -> float:
    """After training the category branch alone, over the last 16 epochs: 256 images, 16 slots."""
    torch.manual_seed(0)
    images, n, epochs = torch.randn(256, 3, 4, 4), 16, 60
    config = MejigcluConfig(tile_size=4, embedding_dim=8, cluster_weight=0.0, slots=slots)  # type: ignore[arg-type]
    method = Mejigclu(config, Patches(), Setting(256, n, 0))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    order = Mejigclu.sampler(config, 256, n, seed=0)
    losses = []
    for step in range(epochs * order.steps_per_epoch):
        rows = torch.from_numpy(order.batch(*divmod(step, order.steps_per_epoch)))
        tiles = images[rows] + 0.3 * torch.randn(4, n, 3, 4, 4)
        done = method(Batch((tiles,), rows), Progress(step, order.steps_per_epoch, epochs))
        optimizer.zero_grad()
        done.loss.backward()
        optimizer.step()
        losses.append(float(done.metrics["category_loss"]))
    return float(np.mean(losses[-16 * order.steps_per_epoch :]))


def test_fixed_subsets_are_learnt_and_random_slots_are_not():
    assert mean_category_loss("subsets") < 0.1 * math.log(16)
    assert mean_category_loss("random") == pytest.approx(math.log(16), rel=0.02)
