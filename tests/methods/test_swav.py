"""SwAV's invariants, each from its specification."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from tessella import dist
from tessella.data.views import CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.methods.method import Progress, Setting
from tessella.methods.swav import Swav, SwavConfig
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.ops.assignment import sinkhorn
from tessella.run.config import RunConfig, from_dict
from tests.float64 import precision
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


def test_two_crop_groups_of_one_size_are_one_pass():
    large = CropGroup(1, 16, (0.3, 1.0))
    method = swav(views=ViewSpec((large, large, CropGroup(2, 8, (0.1, 0.3)))))
    together, batch = swav(), random_batch(method)
    method.code_views = together.code_views
    loss = method(batch, START).loss
    assert int(method.backbone.bn1.num_batches_tracked) == 2
    joined = batch._replace(views=(torch.cat(batch.views[:2]), batch.views[2]))
    assert torch.equal(together(joined, START).loss, loss)


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
    codes = method._codes(scores, method.prototypes, method._past(START))
    assert codes.shape == (2, BATCH, 12)
    for view in (0, 1):
        torch.testing.assert_close(codes[view], sinkhorn(scores[view], 0.05, 3), atol=1e-6, rtol=1e-5)


def test_the_queue_is_cut_to_whole_batches_and_one_shorter_than_a_batch_is_refused():
    assert len(swav(queue_length=3 * BATCH + 5).queues[0].features) == 3 * BATCH
    with pytest.raises(UserError, match="shorter than one batch"):
        swav(queue_length=BATCH - 1)


def test_several_heads_average_their_losses_and_share_one_queue_and_projector():
    method = swav(prototypes=(12, 5, 9), queue_length=BATCH, queue_from_epoch=0)
    assert [name for name, _ in method.prototypes.named_parameters()] == [f"prototypes{i}.weight" for i in range(3)]
    assert [head.out_features for head in method.heads] == [12, 5, 9]
    assert method.clusters == 12 and method.collapse_loss() == pytest.approx(math.log(12 * 5 * 9) / 3)
    alone = [swav(prototypes=head.out_features, queue_length=BATCH, queue_from_epoch=0) for head in method.heads]
    for head, one in zip(method.heads, alone, strict=True):
        state = {name: v for name, v in method.state_dict().items() if not name.startswith("prototypes.")}
        one.load_state_dict(state | {"prototypes.weight": head.weight})
    for step in range(2):  # the second one's codes see the queue
        batch, progress = random_batch(method, seed=step), Progress(step, 4, 10)
        result, each = method(batch, progress), [one(batch, progress) for one in alone]
        torch.testing.assert_close(result.loss, torch.stack([one.loss for one in each]).mean())
        assert torch.equal(result.assignments, each[0].assignments)
    result.loss.backward()
    assert int(method.queues[0].pushed) == 2 * BATCH
    torch.testing.assert_close(method.heads[1].weight.norm(dim=1), torch.ones(5))
    features = torch.randn(6, method.backbone.feature_dim)
    torch.testing.assert_close(method.eval().assign(features), alone[0].eval().assign(features))


def test_every_head_is_frozen():
    method = swav(prototypes=(12, 5), freeze_prototypes_steps=1)
    method(random_batch(method), START).loss.backward()
    method.before_update(START)
    assert all(head.weight.grad is None for head in method.heads)
    method(random_batch(method), START).loss.backward()
    method.before_update(START.next())
    assert all(head.weight.grad is not None for head in method.heads)


def test_hard_codes_ask_for_the_largest_entry_of_the_soft_ones():
    soft, hard = swav(), swav(codes="hard")
    batch = random_batch(soft)
    soft.prototypes.normalize_()
    scores = soft.prototypes(soft._embed(batch.views)).detach()
    label = soft._codes(scores, soft.prototypes, []).argmax(dim=2)
    expected = [F.cross_entropy(scores[v] / 0.1, label[i]) for i in (0, 1) for v in range(4) if v != i]
    torch.testing.assert_close(hard(batch, START).loss.detach(), torch.stack(expected).mean())
    assert hard.collapse_loss() is None


def test_a_projector_without_batch_norm_has_the_layout_of_w5():
    method = swav(head_norm=False)
    names = [name for name, _ in method.projector.named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not list(method.projector.buffers())
    method(random_batch(method), START).loss.backward()


def test_a_vision_transformer_trains_on_two_crop_sizes_with_every_parameter():
    torch.manual_seed(0)
    views = ViewSpec((CropGroup(2, 64, (0.3, 1.0)), CropGroup(2, 32, (0.1, 0.3))))
    backbone = build_backbone(BackboneConfig("timm:test_vit", drop_path=0.1))
    config = SwavConfig(prototypes=12, embedding_dim=16, hidden_dim=32, freeze_prototypes_steps=0, views=views)
    method = Swav(config, backbone, Setting(100, BATCH, 0)).train()
    method(random_batch(method), START).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


def test_one_head_or_several_are_read_from_a_saved_run_and_from_the_command_line():
    assert from_dict(SwavConfig, {"prototypes": 30}).prototypes == 30
    assert from_dict(SwavConfig, {"prototypes": [30, 40]}).prototypes == (30, 40)
    for wrong in ("many", [30, "many"], 2.5):
        with pytest.raises(UserError, match="prototypes"):
            from_dict(SwavConfig, {"prototypes": wrong})
    assert tyro.cli(SwavConfig, args=["--prototypes", "30"]).prototypes == 30
    assert tyro.cli(SwavConfig, args=["--prototypes", "30", "40"]).prototypes == (30, 40)


@pytest.mark.parametrize("prototypes", [(), 1, (30, 1)])
def test_fewer_than_two_prototypes_are_refused(prototypes: int | tuple[int, ...]):
    with pytest.raises(UserError, match="prototypes"):
        RunConfig(SwavConfig(prototypes=prototypes))


def test_one_view_is_refused():
    with pytest.raises(UserError, match="at least 2 views"):
        SwavConfig(views=ViewSpec((CropGroup(1, 32, (0.2, 1.0)),)))


def test_assign_takes_the_nearest_prototype_whatever_the_batch():
    method = swav().eval()
    features = torch.randn(10, method.backbone.feature_dim)
    together = method.assign(features)
    assert torch.equal(together, torch.cat([method.assign(f[None]) for f in features]))


def three_steps(queue: int, **settings: object) -> dict[str, Tensor]:
    """Losses, gradients, codes' consequence (weights) and queue after three updates on this rank's share."""
    method = on_this_rank(swav(queue_length=queue, queue_from_epoch=0, freeze_prototypes_steps=1, **settings))
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


@precision(torch.float64)
def three_steps_both() -> dict[str, Tensor]:
    """One head without a queue, three with."""
    plain, several = three_steps(0), three_steps(BATCH, prototypes=(12, 5, 9), head_norm=False)
    return {f"plain {k}": v for k, v in plain.items()} | {f"several {k}": v for k, v in several.items()}


def test_two_ranks_equal_one_in_loss_gradient_weights_and_queue():
    one, ranks = three_steps_both(), on_ranks(2, three_steps_both)
    for rank in ranks:
        assert set(rank) == set(one)
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_assign_compares_with_unit_prototypes_though_the_last_update_left_them_at_other_lengths():
    method = swav().eval()
    features = torch.randn(30, method.backbone.feature_dim)
    before = method.assign(features)
    with torch.no_grad():
        method.heads[0].weight.mul_(torch.rand(len(method.heads[0].weight), 1) + 0.1)
    assert torch.equal(method.assign(features), before) and len(before.unique()) > 1
