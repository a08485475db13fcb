"""SwAV's invariants, each from its specification."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessella import dist
from tessella.errors import UserError
from tessella.methods.method import Progress
from tessella.methods.swav import SwavConfig
from tessella.ops.assignment import sinkhorn
from tests.methods.tiny import BATCH, averaged_gradients, on_this_rank, random_batch, swav, this_ranks_share
from tests.ranks import on_ranks

START = Progress(0, steps_per_epoch=4, epochs=10)


def test_loss_equals_the_steps_of_the_official_order_written_out():
    method = swav()
    batch = random_batch(method)
    loss = method(batch, START).loss

    again = swav()
    w = F.normalize(again.prototypes.weight.detach(), dim=1)
    features = torch.cat([again.backbone(batch.views[0].flatten(0, 1)), again.backbone(batch.views[1].flatten(0, 1))])
    z = again.projector(features)  # crop-major: crop 0 of every image, then crop 1, ...
    scores = (z @ w.T).view(4, BATCH, -1)
    total = torch.zeros(())
    for i in (0, 1):
        q = sinkhorn(scores[i].detach(), 0.05, 3)
        for v in range(4):
            if v != i:
                total -= (q * torch.log_softmax(scores[v] / 0.1, dim=1)).sum(dim=1).mean() / 3 / 2
    torch.testing.assert_close(loss, total)


def test_batch_norm_sees_one_pass_per_crop_size_and_the_projector_everything_at_once():
    method = swav()
    method(random_batch(method), START)
    assert int(method.backbone.bn1.num_batches_tracked) == 2
    assert int(method.projector[1].num_batches_tracked) == 1


def test_prototypes_are_unit_rows_at_forward_time():
    method = swav()
    method.prototypes.weight.data.mul_(3)
    method(random_batch(method), START)
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(12), atol=1e-6, rtol=0)


def test_prototypes_stay_frozen_until_the_named_step_and_move_at_it():
    method = swav(freeze_prototypes_steps=3)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    start = F.normalize(method.prototypes.weight.detach(), dim=1)
    for step in range(4):
        progress = Progress(step, 4, 10)
        method(random_batch(method, seed=step), progress).loss.backward()
        method.before_update(progress)
        optimizer.step()
        optimizer.zero_grad()
        moved = (F.normalize(method.prototypes.weight.detach(), dim=1) - start).abs().max()
        assert moved < 1e-6 if step < 3 else moved > 1e-4


def test_constant_embeddings_rest_at_ln_k():
    method = swav()
    method.projector[3].weight.data.zero_()
    loss = method(random_batch(method), START).loss
    uniform = F.normalize(method.projector[3].bias, dim=0) @ method.prototypes.weight.T
    assert method.collapse_loss() == pytest.approx(math.log(12))
    # Equal rows make uniform codes, whatever the prototypes; their cross-entropy is at least ln K.
    torch.testing.assert_close(loss, -torch.log_softmax(uniform / 0.1, dim=0).mean())
    method.prototypes.weight.data.copy_(torch.ones(12, 16))
    torch.testing.assert_close(method(random_batch(method), START).loss.item(), math.log(12), atol=1e-5, rtol=0)


def test_codes_are_constant_and_small_crops_give_none():
    method = swav()
    seen = []
    original = method._codes
    method._codes = lambda *args: seen.append(original(*args)) or seen[-1]  # type: ignore[method-assign]
    method(random_batch(method), START)
    assert seen[0].shape == (2, BATCH, 12) and not seen[0].requires_grad


def test_the_queue_is_filled_from_its_epoch_on_and_used_once_full():
    method = swav(queue_length=2 * BATCH, queue_from_epoch=1)
    plain = swav()
    for step in range(8):
        batch, progress = random_batch(method, seed=step), Progress(step, 4, 10)
        with_queue, without = method(batch, progress).loss, plain(batch, progress).loss
        assert int(method.queues[0].pushed) == max(0, step - 3) * BATCH
        # Pushes at steps 4 and 5 fill two batches; step 6 is the first whose codes see the queue.
        assert torch.equal(with_queue, without) == (step < 6)


def test_a_queue_of_copies_of_the_batch_leaves_the_codes_unchanged():
    method = swav(queue_length=3 * BATCH, queue_from_epoch=0)
    method.prototypes.normalize_()
    z = F.normalize(torch.randn(2, BATCH, 16), dim=-1)
    scores = method.prototypes(z).detach()
    for view in (0, 1):
        for _ in range(3):
            method.queues[view].push(z[view])
    codes = method._codes(z, scores, START)
    assert codes.shape == (2, BATCH, 12)
    for view in (0, 1):
        torch.testing.assert_close(codes[view], sinkhorn(scores[view], 0.05, 3), atol=1e-6, rtol=1e-5)


def test_the_queue_is_cut_to_whole_batches_and_one_shorter_than_a_batch_is_refused():
    assert len(swav(queue_length=3 * BATCH + 5).queues[0].features) == 3 * BATCH
    with pytest.raises(UserError, match="shorter than one batch"):
        swav(queue_length=BATCH - 1)


def test_one_view_is_refused():
    from tessella.data.views import CropGroup, ViewSpec

    with pytest.raises(UserError, match="at least 2 views"):
        SwavConfig(views=ViewSpec((CropGroup(1, 32, (0.2, 1.0)),)))


def test_assign_takes_the_nearest_prototype_whatever_the_batch():
    method = swav().eval()
    features = torch.randn(10, method.backbone.feature_dim)
    together = method.assign(features)
    assert torch.equal(together, torch.cat([method.assign(f[None]) for f in features]))


def three_steps(queue: int) -> dict[str, Tensor]:
    """Losses, gradients, codes' consequence (weights) and queue after three updates on this rank's share."""
    method = on_this_rank(swav(queue_length=queue, queue_from_epoch=0, freeze_prototypes_steps=1))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    result = {}
    for step in range(3):
        progress = Progress(step, 4, 10)
        loss = method(this_ranks_share(random_batch(method, seed=step)), progress).loss
        loss.backward()
        gradients = averaged_gradients(method)
        for name, p in method.named_parameters():
            p.grad = gradients.get(name)
        method.before_update(progress)
        optimizer.step()
        optimizer.zero_grad()
        result[f"loss {step}"] = dist.all_reduce_sum(loss.detach()) / dist.world_size()
        if step == 0:
            result |= {f"gradient {name}": g for name, g in gradients.items()}
    return result | {f"state {name}": value for name, value in method.state_dict().items()}


@pytest.mark.parametrize("queue", [0, BATCH])
def test_two_ranks_equal_one_in_loss_gradient_weights_and_queue(queue: int):
    one, ranks = three_steps(queue), on_ranks(2, three_steps, queue)
    for rank in ranks:
        assert set(rank) == set(one)
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, atol=2e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
