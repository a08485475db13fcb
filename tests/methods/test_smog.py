"""SMoG's invariants, each from its specification."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.views import CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.methods.method import MethodOutput, Progress, Setting
from tessella.methods.smog import Smog, SmogConfig, linear_momentum, two_pipelines
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.modules.multicrop import joint_features
from tessella.ops.grouping import nearest_group
from tests.float64 import precision
from tests.methods.tiny import BATCH, averaged_gradients, on_this_rank, random_batch, smog, this_ranks_share
from tests.ranks import on_ranks

START = Progress(0, steps_per_epoch=4, epochs=2)
MOVING = {"momentum": 0.9, "group_momentum": (0.9, 0.7)}  # fast, so that a wrong order shows within a few steps


def batch_of(method: Smog, step: int) -> Batch:
    """A batch of four in which images differ from step to step."""
    return random_batch(method, seed=step)._replace(instances=(torch.arange(BATCH) + BATCH * step) % (4 * BATCH))


def train(method: Smog, steps: range, lr: float = 0.1) -> list[MethodOutput]:
    """The engine's order of calls."""
    optimizer = torch.optim.SGD(method.parameters(), lr=lr)
    results = []
    for step in steps:
        progress = Progress(step, 4, 2)
        if step == 0:
            method.prepare(this_ranks_share(batch_of(method, i)) for i in range(4))
        if progress.step_in_epoch == 0:
            method.epoch_start(progress)
        results.append(method(this_ranks_share(batch_of(method, step)), progress))
        results[-1].loss.backward()
        gradients = averaged_gradients(method)
        for name, p in method.named_parameters():
            p.grad = gradients.get(name)
        method.before_update(progress)
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(progress)
    return results


# --- the step -----------------------------------------------------------------------------------------------


def official_steps(method: Smog, steps: int, through_update: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The specification's step written out with loops, for two label crops; groups as they stand at the start."""
    q, predictor = nn.ModuleList([method.backbone, method.projector]), method.predictor
    k = nn.ModuleList([method.momentum_encoder["backbone"], method.momentum_encoder["projector"]])
    groups = [g.clone() for g in method.groups]
    optimizer = torch.optim.SGD([*q.parameters(), *predictor.parameters()], lr=0.1)
    losses = []
    for it in range(steps):
        big_a, small_a, big_b, small_b = (v.flatten(0, 1) for v in batch_of(method, it).views)
        q_crops, k_crops = ([big_a, small_a], [big_b, small_b]) if it % 2 == 0 else ([big_b, small_b], [big_a, small_a])
        for slow, fast in zip(k.parameters(), q.parameters(), strict=True):
            slow.data = 0.9 * slow.data + 0.1 * fast.data
        projected = q[1](joint_features(q[0], q_crops))
        z, p = F.normalize(projected, dim=1), F.normalize(nn.Sequential.forward(predictor, projected), dim=1)
        with torch.no_grad():
            zk = F.normalize(k[1](joint_features(k[0], k_crops)), dim=1)
        beta = 0.9 - 0.2 * (it + 1) / 8
        terms = []
        for h, old in enumerate(groups):
            labels = [(zk[a * BATCH : (a + 1) * BATCH] @ old.T).argmax(dim=1) for a in (0, 1)]
            j = h % 2
            rows = z[j * BATCH : (j + 1) * BATCH]
            u = (rows @ old.T).argmax(dim=1)
            new = []
            for c, group in enumerate(old):
                if (u == c).any():
                    group = F.normalize(beta * group + (1 - beta) * rows[u == c].mean(dim=0), dim=0)
                new.append(group)
            fresh = torch.stack(new) if through_update else torch.stack(new).detach()
            logits = p @ fresh.T / 0.1
            terms += [F.cross_entropy(logits[v * BATCH : (v + 1) * BATCH], y) for y in labels for v in range(4)]
            groups[h] = fresh.detach()
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = {"groups": torch.stack(groups)}
    state |= {f"q {n}": t for n, t in q.state_dict().items()} | {f"k {n}": t for n, t in k.state_dict().items()}
    return losses, state | {f"predictor {n}": t for n, t in predictor.state_dict().items()}


def named_state(method: Smog) -> dict[str, Tensor]:
    q = nn.ModuleList([method.backbone, method.projector])
    k = nn.ModuleList([method.momentum_encoder["backbone"], method.momentum_encoder["projector"]])
    parts = {"q": q, "k": k, "predictor": method.predictor}
    named = {f"{part} {n}": t for part, module in parts.items() for n, t in module.state_dict().items()}
    return {"groups": method.groups} | named


@pytest.mark.parametrize("group_grad", ["none", "through_update"])
def test_losses_and_state_equal_the_official_order_written_out(group_grad: str):
    method, twin = (smog(group_grad=group_grad, **MOVING) for _ in range(2))
    losses, state = official_steps(twin, 3, group_grad == "through_update")
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for step in range(3):
        loss = method(batch_of(method, step), Progress(step, 4, 2)).loss
        torch.testing.assert_close(loss.detach(), losses[step])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = named_state(method)
    assert set(ours) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backbone", ["resnet10", "timm:vit_tiny_patch16_224"])
def test_two_crop_groups_of_one_size_are_one_pass(backbone: str):
    """In a ResNet the shortcuts see one size after the other; elsewhere the projector's batch norm does, too."""
    size = 16 if backbone == "resnet10" else 32
    one, small = CropGroup(1, size, (0.3, 1.0)), CropGroup(2, size // 2, (0.1, 0.3))
    config = {"groups": 6, "embedding_dim": 16, "hidden_dim": 32, "label_crops": 1}
    losses = []
    for groups in ((one, one, small), (CropGroup(2, size, (0.3, 1.0)), small)):
        torch.manual_seed(0)
        settings = SmogConfig(**config, group_sets=1, views=two_pipelines(groups))
        net = build_backbone(BackboneConfig(backbone, *((4, "small") if backbone == "resnet10" else ())))
        method = Smog(settings, net, Setting(BATCH, BATCH, 0)).train()
        views = random_batch(method).views
        if len(groups) == 3:
            apart = views
        else:
            a, b = (torch.cat(apart[i : i + 2]) for i in (0, 3))
            views = (a, apart[2], b, apart[5])
        method.momentum_encoder.requires_grad_(False)
        losses.append(method._embed(method._streams(views, 0)[0])[1])
    torch.testing.assert_close(losses[0], losses[1])


class Planted(Smog):
    """SMoG whose embeddings are given."""

    def plant(self, z: Tensor, zk: Tensor, p: Tensor) -> MethodOutput:
        self._embed = lambda *_: (z, p)  # type: ignore[method-assign]
        self._embed_by_momentum_encoder = lambda *_: zk  # type: ignore[method-assign]
        return self(random_batch(self, len(z[0])), START)


def planted(**settings: object) -> Planted:
    small = SmogConfig(
        **{"groups": 2, "group_sets": 1, "embedding_dim": 2, "group_momentum": (0.0, 0.0), "label_crops": 1} | settings
    )
    return Planted(small, build_backbone(BackboneConfig("resnet10", 4, "small")), Setting(40, 1, 0))


def at(degrees: float) -> Tensor:
    return torch.tensor([[[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]]])


def test_labels_come_from_the_old_groups_and_scores_from_the_new_ones():
    """The batch pulls group 0 from east to 44 degrees, which makes it the nearest to zk at 46 degrees: too late."""
    method = planted()
    method.groups.copy_(torch.eye(2))
    step = method.plant(z=at(44), zk=at(46), p=at(44))
    assert int((at(46)[0, 0] @ method.groups[0].T).argmax()) == 0  # the label that the new groups would give
    assert step.assignments.tolist() == [1]
    new = torch.stack([at(44)[0, 0], torch.tensor([0.0, 1.0])])
    torch.testing.assert_close(method.groups[0], new)
    torch.testing.assert_close(step.loss, F.cross_entropy(at(44)[0] @ new.T / 0.1, torch.tensor([1])))


def test_neither_predictions_nor_the_momentum_encoder_move_groups():
    steps = [planted() for _ in range(2)]
    z = F.normalize(torch.randn(2, 5, 2), dim=-1)
    for method, seed in zip(steps, (1, 2), strict=True):
        other = F.normalize(torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(seed)), dim=-1)
        method.groups.copy_(torch.eye(2))
        method.plant(z, other, other)
    assert torch.equal(steps[0].groups, steps[1].groups)


def test_set_h_moves_with_large_crop_h_modulo_their_number():
    method = planted(group_sets=3)
    method.groups.copy_(torch.eye(2))
    z = torch.tensor([[[0.6, 0.8]], [[0.8, 0.6]]])
    method.plant(z, z, z)
    east, north = torch.eye(2)
    for h, expected in enumerate([(east, z[0, 0]), (z[1, 0], north), (east, z[0, 0])]):
        torch.testing.assert_close(method.groups[h], torch.stack(expected))


@pytest.mark.parametrize("settings", [{"group_sets": 1}, {"group_sets": 3, "label_crops": 2}])
def test_equal_scores_give_ln_k_whatever_the_sets_labels_and_views(settings: dict[str, int]):
    method = planted(groups=7, **settings)
    method.groups.copy_(torch.tensor([1.0, 0.0]).expand_as(method.groups))
    rows = torch.tensor([1.0, 0.0]).expand(2, 5, 2)
    assert method.plant(rows, rows, rows).loss.item() == pytest.approx(math.log(7), rel=1e-6)


def test_the_pipelines_swap_roles_every_step_and_the_momentum_encoder_sees_the_other_one():
    method, seen = smog(), []
    project = method._project
    method._project = lambda encoder, views: seen.append(views) or project(encoder, views)  # type: ignore
    batch = random_batch(method)
    for step in range(4):
        method(batch, Progress(step, 3, 2))  # an odd number of steps per epoch does not upset the alternation
        a, b = batch.views[:2], batch.views[2:]
        online, other = seen[-2:]
        expected = (a, b) if step % 2 == 0 else (b, a)
        assert all(torch.equal(x, y) for x, y in zip((*online, *other), (*expected[0], *expected[1]), strict=True))


def test_a_crop_that_gives_no_label_is_not_seen_by_the_momentum_encoder_but_small_crops_are():
    method, seen = smog(label_crops=1), []
    project = method._project
    method._project = lambda encoder, views: seen.append(views) or project(encoder, views)  # type: ignore
    method(random_batch(method), START)
    assert [len(v) for v in seen[0]] == [2, 2] and [len(v) for v in seen[1]] == [1, 2]


def test_pipelines_differ_in_blur_and_solarisation_alone():
    a, _, b, _ = SmogConfig().views.groups
    assert (a.colors.blur, a.colors.solarize, b.colors.blur, b.colors.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert (a.colors.saturation, a.colors.jitter, a.size, a.scale) == (0.2, 0.8, 224, (0.2, 1.0))
    assert b.views == 2 and SmogConfig().views.views == 12


@pytest.mark.parametrize("group_grad", ["none", "through_update"])
def test_only_through_update_sends_gradient_through_the_groups_and_the_loss_is_the_same(group_grad: str):
    method = smog(group_grad=group_grad, **MOVING)
    moved, move = [], method._move_groups
    method._move_groups = lambda *args: moved.append(move(*args)) or moved[-1]  # type: ignore[method-assign]
    loss = method(random_batch(method), START).loss
    assert moved[0][0].requires_grad == (group_grad == "through_update")
    torch.testing.assert_close(loss, smog(**MOVING)(random_batch(method), START).loss)


def test_heads_have_the_released_layout():
    method = smog()
    weights = {
        f"{part}.{n}" for part in ("projector", "predictor") for n, _ in getattr(method, part).named_parameters()
    }
    layers = ["projector.0", "projector.1", "projector.3", "predictor.0", "predictor.1", "predictor.3"]
    assert weights == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert {n.split(".")[1] for n in method.projector.state_dict(prefix="p.")} == {"0", "1", "3", "4"}
    assert not any("predictor" in n for n in method.momentum_encoder.state_dict())


# --- the momentum encoder and the clocks --------------------------------------------------------------------


def test_the_momentum_encoder_is_never_trained_and_lags_one_update_behind():
    method = smog(momentum=0.5)
    first = {n: p.clone() for n, p in method.momentum_encoder.named_parameters()}
    train(method, range(1, 2))
    assert all(p.grad is None for p in method.momentum_encoder.parameters())
    for name, p in method.momentum_encoder.named_parameters():
        assert torch.equal(p, first[name])  # followed before the forward, when both were equal
    moved = {n: p.detach().clone() for n, p in method.named_parameters()}
    train(method, range(2, 3))
    for name, p in method.momentum_encoder.named_parameters():
        torch.testing.assert_close(p, (first[name] + moved[name]) / 2)


def test_an_epoch_starts_with_the_momentum_encoder_reset_but_its_statistics_kept():
    method = smog()
    train(method, range(4))
    statistics = method.momentum_encoder["backbone"].bn1.running_mean.clone()
    method.epoch_start(Progress(4, 4, 2))
    for name, p in method.momentum_encoder.named_parameters():
        assert torch.equal(p, method.get_parameter(name))
    assert torch.equal(method.momentum_encoder["backbone"].bn1.running_mean, statistics)
    assert not torch.equal(method.backbone.bn1.running_mean, statistics)


def test_group_momentum_falls_linearly_and_ends_exactly():
    total = 124_800  # 312 steps of 400 epochs
    first, middle, last = (linear_momentum(1.0, 0.99, Progress(t - 1, 312, 400)) for t in (1, total // 2, total))
    assert first == pytest.approx(1 - 0.01 / total, abs=1e-15) and middle == 0.995 and last == 0.99
    assert linear_momentum(0.99, 0.99, Progress(77, 312, 400)) == pytest.approx(0.99, abs=1e-15)


def test_accumulated_micro_batches_move_the_groups_once_as_their_whole_batch_would():
    whole, parts = smog(**MOVING), smog(batch=BATCH // 2, accumulate=2, **MOVING)
    z = F.normalize(torch.randn(2, BATCH, 16), dim=-1)
    expected, _ = whole._move_groups(z, START)
    old, _ = parts._move_groups(z[:, : BATCH // 2], START)
    assert torch.equal(old, parts.groups)
    new, _ = parts._move_groups(z[:, BATCH // 2 :], START)
    torch.testing.assert_close(new, expected)
    again, _ = parts._move_groups(z[:, : BATCH // 2], START)
    assert torch.equal(again, parts.groups)  # the next update starts afresh


@pytest.mark.parametrize("group_grad", ["none", "through_update"])
def test_earlier_micro_batches_score_the_old_groups_and_the_momentum_encoder_follows_once(group_grad: str):
    method = smog(batch=BATCH // 2, accumulate=2, group_grad=group_grad, **MOVING)
    for p in method.momentum_encoder.parameters():
        p.data.add_(1.0)
    lag = method.momentum_encoder["projector"][0].bias - method.projector[0].bias
    old = method.groups.clone()
    for number in range(2):
        assert torch.equal(method.groups, old)
        method(random_batch(method, BATCH // 2, seed=number), START).loss.backward()
    assert not torch.equal(method.groups, old)
    torch.testing.assert_close(method.momentum_encoder["projector"][0].bias - method.projector[0].bias, 0.9 * lag)


# --- bank and regrouping ------------------------------------------------------------------------------------


def test_the_bank_holds_the_online_features_of_the_large_crops_under_their_images():
    method = smog()
    step = method(batch_of(method, 3), START)
    assert method.bank.known().tolist() == list(range(3 * BATCH, 4 * BATCH))
    assert torch.equal(method.bank.features[0, 3 * BATCH :], step.embeddings)
    torch.testing.assert_close(method.bank.features[:, 3 * BATCH :].norm(dim=-1), torch.ones(2, BATCH))


def test_the_first_groups_are_spherical_means_of_features_before_training():
    method = smog()
    weights = copy.deepcopy(dict(method.named_parameters()))
    method.prepare(batch_of(method, i) for i in range(4))
    assert len(method.bank.known()) == 4 * BATCH
    method.epoch_start(START)
    assert all(torch.equal(p, weights[name]) for name, p in method.named_parameters())
    torch.testing.assert_close(method.groups.norm(dim=-1), torch.ones(3, 6))
    for h in range(3):  # ten iterations settle 32 rows in 6 groups: each is the mean direction of its rows
        rows, groups = method.bank.features[h % 2], method.groups[h]
        own = nearest_group(rows, groups)
        for k in own.unique():
            torch.testing.assert_close(groups[k], F.normalize(rows[own == k].mean(dim=0), dim=0), atol=1e-4, rtol=1e-3)


def test_regrouping_starts_from_other_rows_for_each_set_and_step_and_repeats_itself():
    def regrouped(step: int) -> Tensor:
        method = smog(kmeans_iterations=0)
        method.prepare(batch_of(method, i) for i in range(4))
        method._regroup(step)
        return method.groups

    first, again, later = regrouped(0), regrouped(0), regrouped(4)
    assert torch.equal(first, again) and not torch.equal(first, later)
    method = smog()
    method.prepare(batch_of(method, i) for i in range(4))
    rows = [
        [(method.bank.features[h % 2] == g).all(dim=1).nonzero().item() for g in first[h]] for h in range(3)
    ]  # fmt: skip
    assert all(len(set(r)) == 6 for r in rows) and rows[0] != rows[2]


def test_groups_are_rebuilt_every_epoch_or_every_so_many_steps():
    for settings, expected in (({}, [0, 4]), ({"regroup_every": 3}, [0, 3, 6]), ({"regroup_every": 8}, [0])):
        method, at = smog(**settings), []
        regroup = method._regroup
        method._regroup = lambda step, at=at, regroup=regroup: at.append(step) or regroup(step)  # type: ignore
        train(method, range(8))
        assert at == expected


def test_a_state_goes_on_in_mid_epoch_bit_for_bit():
    straight, sliced, resumed = smog(**MOVING), smog(**MOVING), smog(seed=7, **MOVING)
    resumed.setting = sliced.setting
    train(straight, range(7))
    train(sliced, range(6))
    resumed.load_state_dict(sliced.state_dict(), strict=True)
    train(resumed, range(6, 7))
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


# --- evaluation, mistakes, transformers ---------------------------------------------------------------------


def test_an_evaluation_loads_it_without_images_and_assigns_whatever_the_batch():
    method = smog()
    train(method, range(2))
    rebuilt = smog(images=0)
    rebuilt.load_state_dict(method.state_dict(), strict=True)
    rebuilt.eval()
    features = torch.randn(10, method.backbone.feature_dim)
    together = rebuilt.assign(features)
    assert torch.equal(together, torch.cat([rebuilt.assign(f[None]) for f in features]))
    z = F.normalize(method.eval().projector(features), dim=1)
    assert torch.equal(together, (z @ method.groups[0].T).argmax(dim=1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"views": ViewSpec((CropGroup(2, 16, (0.3, 1.0)),))}, "swap roles"),
        ({"views": ViewSpec((CropGroup(2, 16, (0.3, 1.0)), CropGroup(2, 8, (0.3, 1.0))))}, "swap roles"),
        ({"label_crops": 3}, r"label_crops=3 must lie in \[1, 2\]"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], said: str):
    with pytest.raises(UserError, match=said):
        SmogConfig(**settings)


def test_more_groups_than_images_train():
    method = smog(groups=40)
    before = method.groups.clone()
    method.prepare(batch_of(method, i) for i in range(4))
    method.epoch_start(START)
    assert torch.equal(method.groups[:, 32:], before[:, 32:])  # 32 rows, each its own centre
    train(method, range(5))
    torch.testing.assert_close(method.groups.norm(dim=-1), torch.ones(3, 40))


def test_groups_rest_while_the_bank_is_empty():
    method = smog()
    before = method.groups.clone()
    method.epoch_start(START)
    assert torch.equal(method.groups, before)


def transformer(name: str, drop_path: float, **settings: object) -> Smog:
    torch.manual_seed(0)
    views = two_pipelines((CropGroup(2, 64, (0.2, 1.0)), CropGroup(1, 32, (0.05, 0.2))))
    small = {"groups": 4, "embedding_dim": 8, "hidden_dim": 16, "activation": "gelu", "views": views} | settings
    backbone = build_backbone(BackboneConfig(name, drop_path=drop_path))
    return Smog(SmogConfig(**small), backbone, Setting(32, BATCH, 0)).train()


def test_a_transformer_takes_one_size_at_a_time_and_its_groups_see_nothing_dropped():
    method, plain = (transformer("timm:test_vit", rate, max_gradient_norm=3.0) for rate in (0.5, 0.0))
    batch = random_batch(method)
    first, other = method(batch, START), plain(batch, START)
    assert int(method.projector[1].num_batches_tracked) == 2 + 1  # two sizes, and the second look
    assert int(method.momentum_encoder["projector"][1].num_batches_tracked) == 1  # small crops give it nothing
    torch.testing.assert_close(first.embeddings, other.embeddings)
    torch.testing.assert_close(method.groups, plain.groups)
    assert not torch.isclose(first.loss, other.loss, rtol=1e-4)
    first.loss.backward()
    method.before_update(START)
    norm = torch.stack([p.grad.norm() for p in method.parameters() if p.grad is not None]).norm()
    assert 0 < norm <= 3.0 + 1e-4


def test_swin_runs_on_two_sizes():
    method = transformer("timm:swin_tiny_patch4_window7_224", 0.2)
    step = method(random_batch(method, batch=2), START)
    step.loss.backward()
    assert torch.isfinite(step.loss) and method.backbone.feature_dim == 768


# --- ranks, learning ----------------------------------------------------------------------------------------


@precision(torch.float64)
def six_steps() -> dict[str, Tensor]:
    """Losses, first gradient and the whole state after an epoch, a regrouping and two steps more, in both modes."""
    result = {}
    for mode in ("none", "through_update"):
        method = on_this_rank(smog(group_grad=mode, **MOVING))
        method(this_ranks_share(batch_of(method, 0)), START).loss.backward()
        result |= {f"{mode} gradient {name}": g for name, g in averaged_gradients(method).items()}
        method = on_this_rank(smog(group_grad=mode, regroup_every=4, **MOVING))
        for i, step in enumerate(train(method, range(6), lr=0.01)):
            result[f"{mode} loss {i}"] = dist.all_reduce_sum(step.loss.detach()) / dist.world_size()
        result |= {f"{mode} state {name}": value for name, value in method.state_dict().items()}
    return result


def test_two_ranks_equal_one_in_loss_gradient_groups_bank_and_weights():
    one, ranks = six_steps(), on_ranks(2, six_steps)
    for rank in ranks:
        assert set(rank) == set(one)
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_learns_to_tell_a_handful_of_images_apart():
    torch.manual_seed(0)
    scenes = F.interpolate(torch.randn(16, 3, 4, 4), 16)
    views = two_pipelines((CropGroup(2, 16, (0.3, 1.0)),))
    method = smog(batch=16, images=16, groups=8, group_sets=1, views=views, group_momentum=(1.0, 0.9))
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        progress = Progress(step, 20, 3)
        noisy = tuple(scenes + 0.3 * torch.randn(2, 16, 3, 16, 16) for _ in range(2))
        if step == 0:
            method.prepare([Batch(noisy, torch.arange(16))])
        if progress.step_in_epoch == 0:
            method.epoch_start(progress)
        result = method(Batch(noisy, torch.arange(16)), progress)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses[0] > 1.5 > 0.7 > losses[-1]
    assert len(result.assignments.unique()) >= 4
