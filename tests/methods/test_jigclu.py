"""JigClu's invariants, each from its specification."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella import dist
from tessella.data.batch import Batch
from tessella.errors import UserError
from tessella.methods.jigclu import Jigclu, JigcluConfig
from tessella.methods.method import Progress, Setting
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.ops.losses import supervised_contrastive
from tessella.ops.montage import pool_cells, shuffled_montages, tile_order
from tessella.run.config import RunConfig
from tests.float64 import precision
from tests.methods.tiny import BATCH, averaged_gradients, jigclu, on_this_rank, random_batch, this_ranks_share
from tests.ranks import on_ranks

STEPS = 120  # of the overfitting test
START = Progress(0, steps_per_epoch=4, epochs=10)


class Pixels(nn.Module):
    """A backbone that hands its input on."""

    feature_dim = 3

    def feature_map(self, x: Tensor) -> Tensor:
        return x


def test_what_comes_out_of_a_cell_is_the_tile_that_its_labels_name():
    n = 6
    numbers = (
        torch.arange(4 * n).float().view(4, n, 1, 1, 1).expand(4, n, 3, 4, 4)
    )  # tile p = q * n + i is p everywhere
    order = tile_order(0, 3, 4 * n)
    cells = pool_cells(shuffled_montages(numbers, order, 2), 2)  # (slot, montage, 3)
    recovered = cells.transpose(0, 1).transpose(0, 1).flatten(0, 1)[:, 0].long()
    assert torch.equal(recovered, order)


def test_every_image_appears_in_each_cut_position_exactly_once():
    order = tile_order(0, 0, 4 * BATCH)
    assert torch.equal((order % BATCH).bincount(), torch.full((BATCH,), 4))
    assert torch.equal((order // BATCH).bincount(), torch.full((4,), BATCH))


def test_the_permutation_changes_every_step_and_is_a_function_of_the_seed():
    assert torch.equal(tile_order(0, 5, 32), tile_order(0, 5, 32))
    assert not torch.equal(tile_order(0, 5, 32), tile_order(0, 6, 32))
    assert not torch.equal(tile_order(0, 5, 32), tile_order(1, 5, 32))


def test_loss_is_the_weighted_sum_and_the_official_scale_is_temperature_over_007():
    official, paper = jigclu(), jigclu(cluster_scale="paper")
    batch = random_batch(official)
    steps = {"official": official(batch, START), "paper": paper(batch, START)}
    metrics = steps["paper"].metrics
    torch.testing.assert_close(steps["paper"].loss.detach(), metrics["cluster_loss"] + metrics["location_loss"])
    expected = 0.3 / 0.07 * metrics["cluster_loss"] + metrics["location_loss"]
    torch.testing.assert_close(steps["official"].loss.detach(), expected)


def test_cluster_loss_equals_the_contrast_of_embeddings_in_unshuffled_order():
    method = jigclu(cluster_scale="paper", location_weight=0.0)
    batch = random_batch(method)
    step = method(batch, START)
    order = tile_order(0, START.step, 4 * BATCH)
    unshuffled = torch.empty_like(step.embeddings)
    unshuffled[order] = step.embeddings
    expected = supervised_contrastive(unshuffled, torch.arange(4 * BATCH) % BATCH, 0.3)
    torch.testing.assert_close(step.loss.detach(), expected)


def test_a_blind_location_head_is_at_ln_4():
    method = jigclu()
    nn.init.zeros_(method.location_head.weight)
    nn.init.zeros_(method.location_head.bias)
    loss = method(random_batch(method), START).metrics["location_loss"]
    torch.testing.assert_close(loss, torch.tensor(math.log(4)))


def test_collapse_value_is_reached_by_equal_embeddings():
    method = jigclu()
    for layer in (method.cluster_head[2], method.location_head):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(method.location_head.bias)
    loss = method(random_batch(method), START).loss.detach()
    assert float(loss) == pytest.approx(method.collapse_loss(), rel=1e-5)


def test_at_overlap_one_half_without_augmentation_the_tiles_of_an_image_are_equal_vectors():
    image = torch.randn(BATCH, 3, 4, 4)
    method = Jigclu(JigcluConfig(tile_size=4, overlap=0.5), Pixels(), Setting(BATCH, BATCH, 0))
    z = method(Batch((image.expand(4, -1, -1, -1, -1),), torch.arange(BATCH)), START).embeddings
    order = tile_order(0, START.step, 4 * BATCH)
    by_image = torch.empty_like(z)
    by_image[order] = z
    by_image = by_image.view(4, BATCH, -1)
    torch.testing.assert_close(by_image, by_image[:1].expand_as(by_image))


def test_three_by_three_tiles_train():
    method = jigclu(tiles=3)
    step = method(random_batch(method), START)
    step.loss.backward()
    assert step.embeddings.shape == (9 * BATCH, 16) and torch.isfinite(step.loss)


def test_the_contrast_has_32_bits_under_autocast():
    method = jigclu(cluster_scale="paper", location_weight=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        step = method(random_batch(method), START)
    order = tile_order(0, START.step, 4 * BATCH)
    assert torch.equal(step.loss.detach(), supervised_contrastive(step.embeddings, order % BATCH, 0.3))


def test_a_montage_of_one_tile_is_refused():
    with pytest.raises(UserError, match=r"method\.tiles=1 must be at least 2"):
        RunConfig(JigcluConfig(tiles=1))


@precision(torch.float64)
def one_step() -> dict[str, Tensor]:
    method = on_this_rank(jigclu())
    loss = method(this_ranks_share(random_batch(method)), START).loss
    loss.backward()
    mean = dist.all_reduce_sum(loss.detach()) / dist.world_size()
    return {"loss": mean, **averaged_gradients(method), **dict(method.named_buffers())}


def test_two_ranks_equal_one_in_loss_and_gradient():
    one, ranks = one_step(), on_ranks(2, one_step)
    for rank in ranks:
        assert set(rank) == set(one)
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_overfits_a_handful_of_images():
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig("resnet10", 16, "small"))
    method = Jigclu(JigcluConfig(tile_size=16), backbone, Setting(16, 16, 0))
    scenes = F.interpolate(torch.randn(16, 3, 4, 4), 32)
    corners = torch.stack([scenes[..., r : r + 16, c : c + 16] for c in (0, 16) for r in (0, 16)])  # column by column
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for step in range(STEPS):
        result = method(Batch((corners,), torch.arange(16)), Progress(step, STEPS, 1))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    z, image = result.embeddings, tile_order(0, STEPS - 1, 64) % 16
    nearest = (z @ z.T).fill_diagonal_(-1).argmax(dim=1)
    assert result.metrics["location_accuracy"] > 0.9
    assert (image[nearest] == image).float().mean() > 0.9
