"""CoKe's invariants, each from its specification."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.views import CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.methods.coke import Coke, CokeConfig
from tessella.methods.method import Progress, Setting
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.run.config import RunConfig
from tests.float64 import precision
from tests.methods.tiny import BATCH, averaged_gradients, on_this_rank, random_batch, this_ranks_share
from tests.ranks import on_ranks

ONE = ViewSpec((CropGroup(1, 16, (0.3, 1.0)),))
TWO = ViewSpec((CropGroup(1, 16, (0.3, 1.0)), CropGroup(1, 16, (0.3, 1.0))))
MULTI = ViewSpec((CropGroup(2, 16, (0.3, 1.0)), CropGroup(3, 8, (0.1, 0.3))))
IMAGES, STEPS = 4 * BATCH, 4  # an epoch


def coke(views: ViewSpec, seed: int = 0, **settings: object) -> Coke:
    torch.manual_seed(seed)
    defaults = {"centres": (5, 7), "embedding_dim": 16, "dual_lr": 0.5, "average_from_epoch": 2, "label_slots": 2}
    config = CokeConfig(**(defaults | {"views": views, "temperature": 0.05} | settings))
    return Coke(config, build_backbone(BackboneConfig("resnet10", 4, "small")), Setting(IMAGES, BATCH, seed)).train()


def batches(method: Coke, epoch: int) -> list[Batch]:
    """Four batches that hold every image once, in an order and with views of their epoch."""
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
    return [
        random_batch(method, seed=100 * epoch + step)._replace(instances=rows)
        for step, rows in enumerate(order.split(BATCH))
    ]


def features_of(method: Coke, batch: Batch) -> Tensor:
    """Mean of the unit projections of the large crops, from a copy: (B, D)."""
    twin = copy.deepcopy(method)
    large = [crop for group in batch.views for crop in group][:2]
    return torch.stack([F.normalize(twin.projector(twin.backbone(crop)), dim=1) for crop in large]).mean(0).detach()


def run_epochs(method: Coke, epochs: range) -> None:
    for epoch in epochs:
        for step, batch in enumerate(batches(method, epoch)):
            method(batch, Progress(epoch * STEPS + step, STEPS, 100))
        method.epoch_end(Progress((epoch + 1) * STEPS, STEPS, 100))


class SlowClustering:
    """Sections 3 to 5 of the specification for one clustering, image by image in float64."""

    def __init__(self, centres: Tensor, ratio: float, lr: float, stage: int | None, slots: int, images: int) -> None:
        self.pre = centres.double().numpy().copy()
        self.cur = self.pre.copy()
        self.k = len(self.pre)
        self.duals, self.counter = np.zeros(self.k), np.zeros(self.k)
        self.ratio, self.lr, self.stage = ratio, lr, stage
        self.memory = [None] * images
        self.slots = [[[-1, 0.0] for _ in range(slots)] for _ in range(images)]

    def step(self, epoch: int, features: Tensor, instances: list[int]) -> tuple[list[int], list[dict[int, float]]]:
        second = self.stage is not None and epoch >= self.stage
        targets = [self.target(epoch, i) for i in instances] if epoch > 0 else None
        x = features.double().numpy()
        centres = self.pre if second else self.cur
        labels = [max(range(self.k), key=lambda j: float(f @ centres[j] + self.duals[j])) for f in x]
        for j in range(self.k):
            n_j = labels.count(j)
            self.duals[j] += -self.lr * n_j / len(x) + self.lr * self.ratio / self.k
            if self.ratio < 1:
                self.duals[j] = max(self.duals[j], 0.0)
            if n_j:
                total = self.counter[j] + n_j
                mine = sum(x[i] for i in range(len(x)) if labels[i] == j)
                self.cur[j] = self.cur[j] * self.counter[j] / total + mine / total
                self.counter[j] = total
                if not second:
                    self.cur[j] /= np.linalg.norm(self.cur[j])
        for i, label in zip(instances, labels, strict=True):
            self.store(epoch, i, label)
        return labels, targets or [{label: 1.0} for label in labels]

    def store(self, epoch: int, i: int, label: int) -> None:
        self.memory[i] = label
        if self.stage is None or epoch < self.stage:
            return
        slots = self.slots[i]
        f = 1 / (epoch - self.stage + 1)
        if epoch == self.stage:
            slots[0] = [label, 1.0]
            return
        for slot in slots:
            if slot[0] == label and slot[1] > 0:
                for other in slots:
                    other[1] *= 1 - f
                slot[1] += f
                return
        j = min(range(len(slots)), key=lambda j: slots[j][1])
        v = slots[j][1]
        for other in slots:
            other[1] *= (1 - f) / (1 - v)
        slots[j] = [label, f]

    def target(self, epoch: int, i: int) -> dict[int, float]:
        if self.stage is None or epoch <= self.stage:
            return {self.memory[i]: 1.0}
        weights = {label: math.exp(v / 0.5) for label, v in self.slots[i] if v > 0}
        return {label: w / sum(weights.values()) for label, w in weights.items()}

    def end(self, epoch: int) -> None:
        if self.stage is not None and epoch >= self.stage:
            f = 1 / (epoch - self.stage + 1)
            unit = self.cur / np.linalg.norm(self.cur, axis=1, keepdims=True)
            average = (1 - f) * self.pre + f * unit
            self.cur = average / np.linalg.norm(average, axis=1, keepdims=True)
        self.pre, self.counter = self.cur.copy(), np.zeros(self.k)


@pytest.mark.parametrize("ratio", [0.4, 1.0])
@pytest.mark.parametrize("views", [ONE, TWO, MULTI], ids=["one", "two", "multi"])
def test_labels_duals_centres_and_targets_equal_the_specification_written_as_loops(views: ViewSpec, ratio: float):
    method = coke(views, ratio=ratio)
    stage = 2 if views is ONE else None
    slow = [SlowClustering(c.previous, ratio, 0.5, stage, 2, IMAGES) for c in method.clusterings]
    seen_targets: list[tuple[Tensor, Tensor]] = []
    original = method._targets
    method._targets = lambda *args: seen_targets.append(original(*args)) or seen_targets[-1]  # type: ignore[method-assign]
    for epoch in range(7 if stage else 3):
        for step, batch in enumerate(batches(method, epoch)):
            features = features_of(method, batch)
            result = method(batch, Progress(epoch * STEPS + step, STEPS, 100))
            labels, weights = seen_targets.pop()
            for h, (reference, clustering) in enumerate(zip(slow, method.clusterings, strict=True)):
                expected, targets = reference.step(epoch, features, batch.instances.tolist())
                if h == 0:
                    assert result.assignments.tolist() == expected
                dense = torch.zeros(BATCH, reference.k).scatter_add(1, labels[:, h], weights[:, h])
                by_hand = torch.zeros(BATCH, reference.k)
                for i, target in enumerate(targets):
                    for label, weight in target.items():
                        by_hand[i, label] = weight
                torch.testing.assert_close(dense, by_hand, atol=1e-5, rtol=0)
                for mine, theirs in zip(
                    (clustering.previous, clustering.current, clustering.duals, clustering.seen),
                    (reference.pre, reference.cur, reference.duals, reference.counter),
                    strict=True,
                ):
                    torch.testing.assert_close(mine.double(), torch.from_numpy(theirs), atol=2e-6, rtol=1e-5)
        method.epoch_end(Progress((epoch + 1) * STEPS, STEPS, 100))
        for reference, clustering in zip(slow, method.clusterings, strict=True):
            reference.end(epoch)
            torch.testing.assert_close(
                clustering.previous.double(), torch.from_numpy(reference.pre), atol=2e-6, rtol=1e-5
            )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()


def official_loss(method: Coke, batch: Batch, labels: Tensor) -> Tensor:
    """Section 7 written out, one clustering, branch and crop at a time. Labels: (B, H), hard."""
    config = method.config
    crops = [crop for group in batch.views for crop in group]
    z = [method.projector(method.backbone(crop)) for crop in crops]
    p = [F.normalize(x, dim=1) for x in z]
    q = [F.normalize(method.predictor(x), dim=1) for x in z]
    total, heads = torch.zeros(()), len(method.clusterings)
    for h, clustering in enumerate(method.clusterings):
        y = F.one_hot(labels[:, h], config.centres[h]).float()
        branch_p, branch_q = ([x @ clustering.previous.T / config.temperature for x in b] for b in (p, q))
        if len(crops) == 1:
            b = config.prediction_weight
            total = total + (b * cross_entropy(branch_q[0], y) + (1 - b) * cross_entropy(branch_p[0], y)) / heads
            continue
        q1, q2 = branch_p[0].detach().softmax(1), branch_p[1].detach().softmax(1)
        a, large, small = config.label_weight, torch.zeros(()), torch.zeros(())
        for b in (branch_p, branch_q):
            large = large + a * (cross_entropy(b[0], y) + cross_entropy(b[1], y)) / 4
            large = large + (1 - a) * (cross_entropy(b[0], q2) + cross_entropy(b[1], q1)) / 4
            for logits in b[2:]:
                to_views = cross_entropy(logits, q1) + cross_entropy(logits, q2)
                small = small + (2 * a * cross_entropy(logits, y) + (1 - a) * to_views) / (4 * (len(crops) - 2))
        loss = large if len(crops) == 2 else config.large_weight * large + (1 - config.large_weight) * small
        total = total + loss / heads
    return total


@pytest.mark.parametrize(
    ("views", "settings"),
    [
        (ONE, {"prediction_weight": 1.0}), (ONE, {"prediction_weight": 0.3}), (TWO, {}), (TWO, {"label_weight": 1.0}),
        (MULTI, {}), (MULTI, {"large_weight": 0.8, "label_weight": 0.6}),
    ],
)  # fmt: skip
def test_loss_and_gradient_equal_the_official_sums_written_out(views: ViewSpec, settings: dict[str, float]):
    method = coke(views, **settings)
    run_epochs(method, range(1))
    batch = batches(method, 1)[0]
    labels = method.labels.rows[batch.instances, :, 0].long()  # of epoch 0
    parameters = dict(method.named_parameters())
    expected = official_loss(method, batch, labels)
    expected_gradients = torch.autograd.grad(expected, list(parameters.values()), materialize_grads=True)
    loss = method(batch, Progress(STEPS, STEPS, 100)).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    for (name, p), gradient in zip(parameters.items(), expected_gradients, strict=True):
        assert p.grad is not None, name  # DDP waits for every parameter
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_large_weight_of_1_leaves_the_loss_of_two_views():
    multi, two = coke(MULTI, large_weight=1.0), coke(TWO)
    batch = batches(multi, 0)[0]
    pair = Batch((batch.views[0][:1], batch.views[0][1:]), batch.instances)
    torch.testing.assert_close(multi(batch, Progress(0, 4, 9)).loss, two(pair, Progress(0, 4, 9)).loss)


def test_gradients_reach_neither_centres_nor_targets():
    method = coke(TWO, label_weight=0.0)
    embeddings = F.normalize(torch.randn(2, 2, BATCH, 16), dim=-1).requires_grad_()
    labels, weights = torch.zeros(BATCH, 1, dtype=torch.long), torch.ones(BATCH, 1)
    centres = method.clusterings[0].previous
    method._loss(embeddings, centres, labels, weights).backward()
    assert not any(buffer.requires_grad for buffer in method.buffers())
    # Cross-entropy to a constant target has the gradient softmax - target in the logits.
    p = (embeddings.detach() @ centres.T / 0.05).softmax(-1)
    expected = (p - p[0].flip(0)) / (4 * BATCH) @ centres / 0.05
    torch.testing.assert_close(embeddings.grad, expected, atol=1e-6, rtol=1e-4)


def test_batch_norm_sees_every_crop_by_itself():
    method = coke(MULTI)
    method(batches(method, 0)[0], Progress(0, STEPS, 9))
    for norm in (method.backbone.bn1, method.projector[1], method.projector[7], method.predictor[1]):
        assert int(norm.num_batches_tracked) == 5


@pytest.mark.parametrize("views", [ONE, TWO], ids=["one", "two"])
def test_the_loss_predicts_last_epochs_labels_and_in_the_first_epoch_the_fresh_ones(views: ViewSpec):
    method = coke(views, average_from_epoch=99)
    last = {}
    for epoch in range(3):
        now, centres = {}, [c.previous.clone() for c in method.clusterings]
        for step, batch in enumerate(batches(method, epoch)):
            features = features_of(method, batch)
            fresh = method._assign_all(features, epoch)
            labels, weights = method._targets(batch.instances, fresh, epoch)
            expected = fresh if epoch == 0 else torch.stack([last[i] for i in batch.instances.tolist()])
            assert torch.equal(labels[..., 0], expected) and torch.equal(weights[..., 0], torch.ones(BATCH, 2))
            method(batch, Progress(epoch * STEPS + step, STEPS, 9))
            assert all(torch.equal(c.previous, old) for c, old in zip(method.clusterings, centres, strict=True))
            now |= dict(zip(batch.instances.tolist(), fresh, strict=True))
        currents = [c.current.clone() for c in method.clusterings]
        method.epoch_end(Progress((epoch + 1) * STEPS, STEPS, 9))
        assert all(torch.equal(c.previous, new) for c, new in zip(method.clusterings, currents, strict=True))
        if epoch:
            assert any(not torch.equal(last[i], now[i]) for i in now)  # else the test could not tell them apart
        last = now


def test_an_image_that_sat_out_the_first_epoch_takes_its_fresh_label():
    method = coke(ONE)
    for step, batch in enumerate(batches(method, 0)[:3]):
        method(batch, Progress(step, STEPS, 9))
    absent = batches(method, 0)[3]
    fresh = method._assign_all(features_of(method, absent), 1)
    labels, weights = method._targets(absent.instances, fresh, 1)
    assert torch.equal(labels[..., 0], fresh) and (weights[..., 0] == 1).all() and (weights[..., 1:] == 0).all()


def test_counts_are_the_images_of_the_epoch_and_duals_outlive_it():
    method = coke(TWO)
    for step, batch in enumerate(batches(method, 0), start=1):
        method(batch, Progress(step - 1, STEPS, 9))
        assert all(float(c.seen.sum()) == step * BATCH for c in method.clusterings)
    duals = [c.duals.clone() for c in method.clusterings]
    assert all((d >= 0).all() and d.any() for d in duals)
    method.epoch_end(Progress(STEPS, STEPS, 9))
    for clustering, before in zip(method.clusterings, duals, strict=True):
        assert torch.equal(clustering.duals, before) and not clustering.seen.any()


def test_the_first_images_of_an_epoch_replace_their_centre_and_others_rest():
    method = coke(TWO, centres=(12, 7))
    run_epochs(method, range(1))
    batch = batches(method, 1)[0]
    features, clustering = features_of(method, batch), method.clusterings[0]
    labels, before = clustering.assign(features), clustering.current.clone()
    method(batch, Progress(STEPS, STEPS, 9))
    for j in range(12):
        mine = features[labels == j]
        expected = F.normalize(mine.sum(dim=0), dim=0) if len(mine) else before[j]
        torch.testing.assert_close(clustering.current[j], expected, atol=1e-6, rtol=1e-5)
    assert len(labels.unique()) < 12


def test_centres_are_unit_rows_except_those_in_the_making_of_the_second_stage():
    method = coke(ONE)
    for epoch in range(4):
        for step, batch in enumerate(batches(method, epoch)):
            method(batch, Progress(epoch * STEPS + step, STEPS, 9))
            for c in method.clusterings:
                torch.testing.assert_close(c.previous.norm(dim=1), torch.ones(len(c.previous)))
        norms = torch.cat([c.current.norm(dim=1) for c in method.clusterings])
        assert bool((norms < 0.999).any()) == (epoch >= 2)
        method.epoch_end(Progress((epoch + 1) * STEPS, STEPS, 9))


def test_averaged_labels_begin_one_hot_and_sum_to_one():
    method = coke(ONE)
    run_epochs(method, range(2))
    assert not method.label_weights.rows.any()
    run_epochs(method, range(2, 3))
    assert torch.equal(method.label_weights.rows, torch.tensor([1.0, 0.0]).expand(IMAGES, 2, 2))
    everyone, fresh = torch.arange(IMAGES), torch.zeros(IMAGES, 2, dtype=torch.long)
    labels, weights = method._targets(everyone, fresh, 3)
    assert torch.equal(labels[..., 0], method.labels.rows[..., 0].long())
    assert torch.equal(weights, torch.tensor([1.0, 0.0]).expand(IMAGES, 2, 2))
    run_epochs(method, range(3, 7))
    torch.testing.assert_close(method.label_weights.rows.sum(-1), torch.ones(IMAGES, 2))
    weights = method._targets(everyone, fresh, 7)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(IMAGES, 2))
    assert ((weights > 0) == (method.label_weights.rows > 0)).all() and (weights[..., 1] > 0).any()


def test_an_evaluation_pass_moves_nothing():
    method = coke(TWO).eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        method(batches(method, 0)[0], Progress(0, STEPS, 9))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_in_16_bits_the_clusterings_and_the_loss_stay_in_float32():
    method, seen = coke(MULTI), []
    method.projector.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        step = method(batches(method, 0)[0], Progress(0, STEPS, 9))
    step.loss.backward()
    assert set(seen) == {torch.bfloat16} and step.loss.dtype == step.embeddings.dtype == torch.float32
    centres = method.clusterings[0].current
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(5), atol=1e-6, rtol=0)  # bf16 would leave 1e-3


def test_auto_dual_learning_rate_follows_batch_and_clusters():
    assert coke(TWO, dual_lr="auto", centres=(3, 200)).dual_lrs == pytest.approx([0.02 * 3, 0.02 * BATCH])
    assert coke(TWO, dual_lr=20.0, centres=(3, 200)).dual_lrs == [20.0, 20.0]


def test_assign_takes_the_nearest_centre_of_the_chosen_clustering_without_duals():
    method = coke(TWO, assign_clustering=1).eval()
    method.clusterings[1].duals.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0, 0]))
    features = torch.randn(10, method.backbone.feature_dim)
    z = F.normalize(method.projector(features), dim=1)
    assert torch.equal(method.assign(features), (z @ method.clusterings[1].previous.T).argmax(dim=1))
    assert method.clusters == 7 and method.assign(features).any()  # with duals all would be 0


@precision(torch.float64)  # equal scores are summed in an order of the processor
def test_equal_embeddings_rest_at_the_mean_of_ln_k():
    method = coke(MULTI)
    z = F.normalize(torch.randn(16), dim=0)
    for clustering in method.clusterings:
        clustering.previous.copy_(z.expand_as(clustering.previous))
    method._embed = lambda views: z.expand(2, 5, BATCH, 16)  # type: ignore[method-assign]
    loss = method(batches(method, 0)[0], Progress(0, STEPS, 9)).loss
    assert float(loss) == pytest.approx(method.collapse_loss(), rel=1e-12)
    assert method.collapse_loss() == pytest.approx((math.log(5) + math.log(7)) / 2)


def test_settings_out_of_range_are_refused():
    for wrong in (
        {"ratio": 1.1}, {"centres": ()}, {"centres": (1,)}, {"assign_clustering": 3}, {"dual_lr": 0.0},
        {"label_slots": 1}, {"average_from_epoch": 0}, {"large_weight": -0.1},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong))):
            RunConfig(CokeConfig(**wrong))


# Ranks


@precision(torch.float64)
def seven_steps(views: ViewSpec) -> dict[str, Tensor]:
    """Losses, first gradients, and the whole state after updates that cross epochs and the second stage."""
    method = on_this_rank(coke(views, average_from_epoch=1))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    result = {}
    for step in range(7):
        progress = Progress(step, 2, 10)
        batch = batches(method, step // 2)[step % 2]
        loss = method(this_ranks_share(batch), progress).loss
        loss.backward()
        gradients = averaged_gradients(method)
        for name, p in method.named_parameters():
            p.grad = gradients.get(name)
        optimizer.step()
        optimizer.zero_grad()
        result[f"loss {step}"] = dist.all_reduce_sum(loss.detach()) / dist.world_size()
        if step == 0:
            result |= {f"gradient {name}": g for name, g in gradients.items()}
        if progress.next().step_in_epoch == 0:
            method.epoch_end(progress.next())
    return result | {f"state {name}": value for name, value in method.state_dict().items()}


def tables_and_centres_after_a_forward_with_ddp() -> dict[str, Tensor]:
    method = on_this_rank(coke(ONE))
    ddp = torch.nn.parallel.DistributedDataParallel(method)
    untouched = torch.arange(BATCH, IMAGES)
    if dist.rank() == 1:
        method.labels.rows[untouched] = 3
        method.clusterings[0].previous.zero_()
    ddp(this_ranks_share(random_batch(method)), Progress(0, STEPS, 9))
    return {"untouched": method.labels.rows[untouched], "centres": method.clusterings[0].previous}


def on_one_rank() -> dict[str, dict[str, Tensor]]:
    parts = {"one": seven_steps(ONE), "multi": seven_steps(MULTI)}
    return parts | {"ddp": tables_and_centres_after_a_forward_with_ddp()} if dist.is_launched() else parts


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Tensor]]]:
    return on_ranks(2, on_one_rank)


def test_two_ranks_equal_one_in_loss_gradient_and_state(ranks: list[dict[str, dict[str, Tensor]]]):
    for views, one in on_one_rank().items():
        assert views == "multi" or (one["state label_weights.rows"] > 0).any()
        for rank in ranks:
            assert set(rank[views]) == set(one)
            for name, value in one.items():
                torch.testing.assert_close(
                    rank[views][name], value, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_label_tables_are_not_sent_at_every_step_but_centres_are(ranks: list[dict[str, dict[str, Tensor]]]):
    zero, one = (rank["ddp"] for rank in ranks)
    assert (zero["untouched"] == -1).all() and (one["untouched"] == 3).all()
    assert torch.equal(zero["centres"], one["centres"]) and one["centres"].any()


def test_learns_to_tell_scenes_apart():
    torch.manual_seed(0)
    config = CokeConfig(centres=(6, 10), embedding_dim=16, temperature=0.1, dual_lr="auto", ratio=0.8, views=TWO)
    method = Coke(config, build_backbone(BackboneConfig("resnet10", 8, "small")), Setting(96, 32, 0)).train()
    scenes = F.interpolate(torch.randn(6, 3, 4, 4), 16).repeat_interleave(16, 0)  # 16 images of each of 6 scenes
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for epoch in range(20):
        for step, rows in enumerate(torch.randperm(96).split(32)):
            views = tuple(scenes[rows][None] + 1.5 * torch.randn(1, 32, 3, 16, 16) for _ in range(2))
            method(Batch(views, rows), Progress(3 * epoch + step, 3, 20)).loss.backward()
            if epoch:
                optimizer.step()
            optimizer.zero_grad()
        method.epoch_end(Progress(3 * epoch + 3, 3, 20))
    method.eval()
    found = method.assign(method.backbone(scenes + 1.5 * torch.randn_like(scenes))).view(6, 16)
    table = F.one_hot(found, 6).sum(dim=1)  # scene, cluster
    purity = table.max(dim=0).values.sum() / 96
    assert purity > 0.9, table
