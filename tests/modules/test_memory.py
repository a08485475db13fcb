"""The queue holds the newest rows of all ranks and says when it is full."""

from __future__ import annotations

import torch

from tessella.modules.memory import FeatureQueue


def test_is_full_only_after_every_row_was_written_and_then_keeps_the_newest():
    queue = FeatureQueue(6, 2)
    for step in range(5):
        assert queue.is_full == (step >= 3)
        queue.push(torch.full((2, 2), float(step)))
    assert sorted(queue.features[:, 0].tolist()) == [2, 2, 3, 3, 4, 4]


def test_a_loaded_queue_goes_on_where_the_saved_one_stood():
    straight, resumed = FeatureQueue(6, 2), FeatureQueue(6, 2)
    for step in range(4):
        straight.push(torch.full((2, 2), float(step)))
    resumed.load_state_dict(straight.state_dict())
    for queue in (straight, resumed):
        assert queue.is_full
        queue.push(torch.full((2, 2), 9.0))
    assert torch.equal(straight.features, resumed.features) and int(resumed.pushed) == 10
