"""CoKe as the engine runs it equals the official epochs written out, number by number."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tessella.data.views import CropGroup, ViewSpec
from tessella.methods.coke import CokeConfig
from tessella.run.config import RunConfig
from tests.engine.runs import tiny_run
from tests.methods.reference_coke import Clustering, ReferenceCoke, schedule
from tests.methods.reference_run import Recording, State, assert_equal, record

ONE = ViewSpec((CropGroup(1, 16, (0.3, 1.0)),))
TWO = ViewSpec((CropGroup(1, 16, (0.3, 1.0)), CropGroup(1, 16, (0.3, 1.0))))
MULTI = ViewSpec((CropGroup(2, 16, (0.3, 1.0)), CropGroup(2, 8, (0.1, 0.3))))
STEPS, STAGE, SLOTS = 3, 2, 2


def tiny(views: ViewSpec, epochs: int, **changes: object) -> RunConfig:
    """Epochs of three steps of 120 digits, which are all 360."""
    method = CokeConfig(
        **{
            "centres": (8, 12), "embedding_dim": 16, "temperature": 0.1, "dual_lr": 0.3, "average_from_epoch": STAGE,
            "label_slots": SLOTS, "prediction_weight": 0.7, "views": views,
        } | changes
    )  # fmt: skip
    config = tiny_run("jigclu", epochs=epochs, batch_size=120)
    optimizer = dataclasses.replace(
        config.optimizer, name="lars", lr=0.5, zero_lr_epochs=1, warmup_epochs=1, warmup_end="next", per_epoch=False
    )
    return dataclasses.replace(config, method=method, optimizer=optimizer)


def replay(config: RunConfig, run: Recording, ranks: int, loss_rtol: float, steps: int | None = None) -> ReferenceCoke:
    """The reference on the run's images, compared step by step."""
    method, single = config.method, config.method.views.views == 1
    start = {n: t.double() if t.is_floating_point() else t for n, t in run.start.items()}
    clusterings = [
        Clustering(
            start[f"clusterings.{h}.previous"], method.ratio, method.dual_lr, STAGE if single else None,
            SLOTS if single else 1,
        )
        for h in range(2)
    ]  # fmt: skip
    reference = ReferenceCoke(
        start, schedule(0.5, 1, config.epochs, STEPS), STEPS, ranks, clusterings, method.temperature,
        alpha=method.label_weight, beta=method.prediction_weight if single else method.large_weight,
        decay=config.optimizer.weight_decay,
    )  # fmt: skip
    for number, step in enumerate(run.steps[:steps]):
        (batch,) = step.batches
        crops = [crop.double() for group in batch.views for crop in group]
        loss, gradients = reference.step(crops, batch.instances.tolist())
        ours = step.losses[0].double()
        torch.testing.assert_close(ours, loss, rtol=loss_rtol, atol=0, msg=lambda m, n=number: f"step {n}: {m}")
        if step.losses[0].dtype == torch.float64:
            what = f"step {number}"
            assert_equal(step.gradients, gradients, f"gradient of {what}", rtol=1e-6, atol=1e-8)
            of_network = {n: t for n, t in step.state.items() if not n.startswith(("clusterings", "label"))}
            assert_equal(of_network, reference.state(), f"after {what}", rtol=1e-6, atol=1e-8)
            epoch_is_over = (number + 1) % STEPS == 0
            state = run.epoch_ends[number // STEPS] if epoch_is_over else step.state
            assert_clusterings_equal(state, clusterings, f"after {what}")
    return reference


def assert_clusterings_equal(state: State, clusterings: list[Clustering], what: str) -> None:
    for h, head in enumerate(clusterings):
        theirs = {"previous": head.pre.T, "current": head.cur.T, "duals": head.dual, "seen": head.counter}
        ours = {name: state[f"clusterings.{h}.{name}"] for name in theirs}
        assert_equal(ours, theirs, what, rtol=1e-6, atol=1e-8)
        for image, slots in head.memory.items():
            labels = state["labels.rows"][image, h].tolist()
            if "label_weights.rows" not in state or not state["label_weights.rows"][image, h].any():
                assert labels[0] == slots[0][0], what
                continue
            weights = state["label_weights.rows"][image, h].tolist()
            ours_by_label = {int(label): w for label, w in zip(labels, weights, strict=True) if w > 0}
            assert ours_by_label == pytest.approx({int(label): w for label, w in slots if w > 0}, abs=1e-6), what


@pytest.mark.parametrize(
    ("views", "epochs", "changes"),
    [(ONE, 6, {}), (TWO, 3, {"ratio": 1.0}), (MULTI, 3, {"large_weight": 0.3})],
    ids=["one view, both stages", "two views, equal sizes", "multi-crop"],
)
def test_a_run_equals_the_official_epochs_of_two_ranks(
    views: ViewSpec, epochs: int, changes: dict[str, object], tmp_path: Path
):
    """Idle epoch, warm-up, cosine; labels of the last epoch; for one view hard labels, then averages of them."""
    config = tiny(views, epochs, **changes)
    reference = replay(config, record(config, tmp_path / "run"), ranks=2, loss_rtol=1e-6)
    if views is ONE:  # else the comparison of averages would say nothing
        assert any(len([w for _, w in slots if w > 0]) > 1 for slots in reference.clusterings[0].memory.values())


def test_the_first_float32_losses_of_a_run_are_those_of_float64(tmp_path: Path):
    """Then an image lies so close between two centres that rounding decides, at a step that the processor chooses."""
    config = tiny(MULTI, 2)
    replay(config, record(config, tmp_path / "run", double=False), ranks=1, loss_rtol=1e-5, steps=3)
