"""The split that a method carries: the same as the order's, saved as four numbers, refused when it is another."""

from __future__ import annotations

import pytest
import torch

from tessella import dist
from tessella.errors import UserError
from tessella.modules.partition import Partition
from tessella.ops.partition import partition
from tests.ranks import on_ranks


def test_looks_up_the_part_of_each_row():
    rows = torch.tensor([3, 99, 3, 0])
    assert Partition(100, 8, 5)(rows).tolist() == partition(100, 8, 5)[rows].tolist()


def test_only_the_four_numbers_are_state():
    state = Partition(100, 8, 5).state_dict()
    assert {name: int(value) for name, value in state.items() if name != "checksum"} == {
        "seed": 5, "parts": 8, "images": 100,
    }  # fmt: skip
    assert set(state) == {"seed", "parts", "images", "checksum"}


@pytest.mark.parametrize("other", [(101, 8, 5), (100, 9, 5), (100, 8, 6)])
def test_refuses_to_load_another_split(other: tuple[int, int, int]):
    with pytest.raises(UserError, match=r"the saved run cut 100 images into 8 parts \(seed 5\)"):
        Partition(*other).load_state_dict(Partition(100, 8, 5).state_dict())


def test_refuses_a_split_that_another_version_drew_otherwise():
    state = Partition(100, 8, 5).state_dict() | {"checksum": torch.tensor(1)}
    with pytest.raises(UserError):
        Partition(100, 8, 5).load_state_dict(state)


def test_loads_its_own_and_without_images_any():
    state = Partition(100, 8, 5).state_dict()
    Partition(100, 8, 5).load_state_dict(state)
    for_evaluation = Partition(0, 8, 5)
    for_evaluation.load_state_dict(state)
    assert int(for_evaluation.images) == 100


def agree() -> list[bool]:
    """Whether the ranks accept the same split, and whether they accept one that depends on the rank."""
    accepted = []
    for seed in (0, dist.rank()):
        try:
            Partition(100, 8, seed).assert_equal_on_ranks()
            accepted.append(True)
        except AssertionError:
            accepted.append(False)
    return accepted


def test_ranks_notice_that_they_disagree():
    assert on_ranks(2, agree) == [[True, False], [True, False]]
