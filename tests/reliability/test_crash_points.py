"""A process killed at any call of the system within a save leaves a checkpoint that can be read: each call, no luck."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessella.run.checkpoints import load_newest, save
from tests.reliability.program import in_a_process, names, save_and_die, small_tensors

OLD, NEW, NEXT = 1.0, 2.0, 3.0


def nothing(folder: Path) -> None:
    pass


def an_older_one(folder: Path) -> None:
    save(folder, 1, small_tensors(OLD), {"value": OLD})


def one_of_the_same_step(folder: Path) -> None:
    save(folder, 2, small_tensors(OLD), {"value": OLD})


@pytest.mark.parametrize("before", [nothing, an_older_one, one_of_the_same_step])
def test_a_save_killed_at_any_call_leaves_the_old_or_the_new_checkpoint(before: Callable[[Path], None], tmp_path: Path):
    found = []
    for call in range(1, 100):
        folder = tmp_path / str(call)
        before(folder)
        code = in_a_process(save_and_die, str(folder), 2, NEW, call)
        found.append(value_in(folder))
        save(folder, 3, small_tensors(NEXT), {"value": NEXT})  # and the next save clears what was left
        assert value_in(folder) == NEXT
        steps = {"step-00000001", "step-00000002", "step-00000003"}
        assert set(names(folder)) <= steps | {"step-00000002.replaced"}  # which counts as long as step 2 is not there
        if code == 0:
            break
        assert code == -signal.SIGKILL
    first = None if before is nothing else OLD
    changed = found.index(NEW)
    assert found == [first] * changed + [NEW] * (len(found) - changed)
    assert changed > 15


def value_in(folder: Path) -> float | None:
    """Which checkpoint counts; all of it is there, and nothing was damaged on the way to it."""
    newest = load_newest(folder, pytest.fail)
    if newest is None:
        return None
    _, tensors, state = newest
    expected = small_tensors(state["value"])
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    return float(state["value"])
