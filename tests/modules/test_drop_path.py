"""What a network draws in training is a function of counters."""

from __future__ import annotations

import itertools

import torch

from tessella.modules.drop_path import seed_noise

CPU = torch.device("cpu")


def draw(*counters: int) -> float:
    seed_noise(*counters, device=CPU)
    return float(torch.rand(()))


def test_the_same_counters_give_the_same_draws_whatever_was_drawn_before():
    first = draw(7, 100, 1, 0)
    torch.rand(13)
    assert draw(7, 100, 1, 0) == first


def test_seed_step_micro_batch_and_rank_each_change_the_draws():
    counters = list(itertools.product((0, 2**63), (0, 1), (1, 2), (0, 1)))
    assert len({draw(*c) for c in counters}) == len(counters)
