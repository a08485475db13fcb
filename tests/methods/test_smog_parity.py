"""SMoG as the engine runs it equals the official epochs written out, number by number."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tessella.ops.philox import permutation, stream_key
from tessella.run.config import RunConfig
from tests.engine.runs import tiny_run
from tests.methods.reference_run import Recording, State, assert_equal, record
from tests.methods.reference_smog import ReferenceSmog
from tests.methods.reference_swav import schedule


def first_rows(config: RunConfig, bank: dict[int, torch.Tensor], step: int) -> dict[int, list[int]]:
    """The images whose rows k-means starts from: a random decision, which the reference takes over."""
    method, known, key = config.method, np.array(sorted(bank)), stream_key(config.seed, "grup")
    orders = [permutation(key, known, step * method.group_sets + h) for h in range(method.group_sets)]
    return {h: known[order[: method.groups]].tolist() for h, order in enumerate(orders)}


def assert_state_equal(ours: State, reference: ReferenceSmog, what: str) -> None:
    assert_equal({n: t for n, t in ours.items() if not n.startswith("bank.")}, reference.state(), what)
    bank = reference.banked()
    assert ours["bank.written"].nonzero()[:, 0].tolist() == sorted(bank), what
    for image, row in bank.items():
        torch.testing.assert_close(ours["bank.features"][:, image], row, rtol=1e-7, atol=1e-9)


def replay(config: RunConfig, run: Recording, ranks: int, loss_rtol: float = 1e-9, steps: int | None = None) -> None:
    """The reference on the run's images, compared step by step."""
    method, every = config.method, config.method.regroup_every or 5
    to_float64 = {n: t.double() if t.is_floating_point() else t for n, t in run.start.items()}
    rates = schedule(0.6, 0.1, 0.0, warmup=1, epochs=config.epochs, steps=5)
    reference = ReferenceSmog(
        to_float64, rates, ranks, images=len(run.start["bank.written"]), sets=method.group_sets,
        beta=method.group_momentum, momentum=method.momentum, label_crops=method.label_crops,
        through_update=method.group_grad == "through_update",
    )  # fmt: skip
    for batch in run.first_look:
        reference.fill_bank(tuple(v.double() for v in batch.views), batch.instances)
    for number, step in enumerate(run.steps[:steps]):
        if number % every == 0:
            reference.regroup(first_rows(config, reference.banked(), number))
        batches = [(tuple(v.double() for v in b.views), b.instances) for b in step.batches]
        losses, gradients = reference.step(batches)
        ours = [loss.double() for loss in step.losses]
        torch.testing.assert_close(ours, losses, rtol=loss_rtol, atol=0, msg=lambda m, n=number: f"step {n}: {m}")
        if step.losses[0].dtype == torch.float64:
            assert_equal(step.gradients, gradients, f"gradient of step {number}")
            if method.regroup_every is None or (number + 1) % every:  # else the run has regrouped already
                assert_state_equal(step.state, reference, f"after step {number}")


VARIANT = {"group_grad": "through_update", "label_crops": 1, "group_sets": 2, "regroup_every": 3}


def tiny(changes: dict[str, object], **run: object) -> RunConfig:
    config = tiny_run("smog", max_steps=6, **run)
    return dataclasses.replace(config, method=dataclasses.replace(config.method, **changes))


@pytest.mark.parametrize("changes", [{}, VARIANT], ids=["as released", "every option changed"])
def test_a_run_equals_the_official_epochs_of_two_ranks(changes: dict[str, object], tmp_path: Path):
    """An epoch of five steps and one more: bank, first groups, swapped pipelines, regrouping, warm-up's end."""
    config = tiny(changes)
    replay(config, record(config, tmp_path / "run"), ranks=2)


def test_accumulated_gradients_equal_the_official_micro_steps(tmp_path: Path):
    config = tiny({"group_grad": "through_update"}, accumulate=2)
    replay(config, record(config, tmp_path / "run"), ranks=2)


def test_the_first_float32_losses_of_a_run_are_those_of_float64(tmp_path: Path):
    replay(tiny({}), record(tiny({}), tmp_path / "run", double=False), ranks=1, loss_rtol=1e-5, steps=3)
