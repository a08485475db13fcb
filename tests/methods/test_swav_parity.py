"""SwAV as the engine runs it equals the official step written out, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.runs import tiny_run
from tests.methods.reference_run import assert_equal, of, record
from tests.methods.reference_swav import ReferenceSwav, schedule


def sorted_rows(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("accumulate", [1, 2], ids=["whole batches", "two micro-batches"])
def test_a_run_equals_the_official_steps_of_two_ranks(accumulate: int, tmp_path: Path):
    """Two epochs of five steps: frozen prototypes, a queue that fills and is used, the warm-up's and an epoch's end."""
    config = tiny_run("swav", accumulate=accumulate)
    run = record(config, tmp_path / "run")
    reference = ReferenceSwav(
        run.start, schedule(0.6, 0.1, 0.0, warmup=1, epochs=2, steps=5),
        steps_per_epoch=5, ranks=2, queue=128, queue_from=0, freeze=2,
    )  # fmt: skip
    used = []
    for number, step in enumerate(run.steps):
        losses, gradients = reference.step([batch.views for batch in step.batches])
        used.append(reference.queue_is_used)
        torch.testing.assert_close(step.losses, losses, rtol=1e-9, atol=0, msg=f"loss of step {number}")
        assert_equal(step.gradients, gradients, f"gradient of step {number}")
        ours = {n: t for n, t in step.state.items() if not n.startswith("queues")}
        assert_equal(ours, reference.state(), f"after step {number}")
        for i, queue in enumerate(of(step.state, "queues")[f"queues.{j}.features"] for j in (0, 1)):
            theirs = torch.cat([q[i] for q in reference.queues])
            filled = theirs[theirs.any(dim=1)]
            torch.testing.assert_close(sorted_rows(queue[queue.any(dim=1)]), sorted_rows(filled), rtol=1e-7, atol=1e-9)
    assert used == [False, False] + [True] * 8


def test_the_first_float32_losses_of_a_run_are_those_of_float64(tmp_path: Path):
    config = tiny_run("swav")
    run = record(config, tmp_path / "run", double=False)
    start = {n: t.double() if t.is_floating_point() else t for n, t in run.start.items()}
    rates = schedule(0.6, 0.1, 0.0, warmup=1, epochs=2, steps=5)
    reference = ReferenceSwav(start, rates, steps_per_epoch=5, ranks=1, queue=128, queue_from=0, freeze=2)
    for number, step in enumerate(run.steps[:4]):  # later ones amplify rounding, on each processor differently
        (loss,), _ = reference.step([tuple(v.double() for v in step.batches[0].views)])
        torch.testing.assert_close(
            step.losses[0].double(), loss, rtol=1e-5, atol=0, msg=lambda m, n=number: f"{n}: {m}"
        )
