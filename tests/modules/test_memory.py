"""The queue holds the newest rows of all ranks and says when it is full; the bank holds a row per image."""

from __future__ import annotations

import pytest
import torch

from tessella import dist
from tessella.modules.memory import FeatureBank, FeatureQueue, InstanceTable
from tests.ranks import on_ranks


def test_is_full_only_after_every_row_was_written_and_then_keeps_the_newest():
    queue = FeatureQueue(6, 2)
    for step in range(5):
        assert queue.is_full == (step >= 3)
        queue.push(torch.full((2, 2), float(step)))
    assert sorted(queue.features[:, 0].tolist()) == [2, 2, 3, 3, 4, 4]


def test_a_queue_takes_batches_of_any_size_and_keeps_the_newest_rows():
    queue, newest = FeatureQueue(6, 1), torch.zeros(0)
    for step, size in enumerate((4, 3, 1, 6, 5)):
        rows = 10 * step + torch.arange(float(size))
        queue.push(rows[:, None])
        newest = torch.cat([newest, rows])[-6:]
        assert set(newest.tolist()) <= set(queue.features[:, 0].tolist()) and queue.is_full == (step > 0)


def test_a_loaded_queue_goes_on_where_the_saved_one_stood():
    straight, resumed = FeatureQueue(6, 2), FeatureQueue(6, 2)
    for step in range(4):
        straight.push(torch.full((2, 2), float(step)))
    resumed.load_state_dict(straight.state_dict())
    for queue in (straight, resumed):
        assert queue.is_full
        queue.push(torch.full((2, 2), 9.0))
    assert torch.equal(straight.features, resumed.features) and int(resumed.pushed) == 10


def test_a_bank_keeps_the_newest_row_of_each_image_and_knows_which_it_has_seen():
    bank = FeatureBank(2, 5, 3)
    first, second = torch.randn(2, 3, 3), torch.randn(2, 1, 3)
    bank.write(torch.tensor([4, 0, 2]), first)
    bank.write(torch.tensor([0]), second)
    assert bank.known().tolist() == [0, 2, 4]
    assert torch.equal(bank.features[:, [4, 2]], first[:, [0, 2]]) and torch.equal(bank.features[:, 0], second[:, 0])


def test_a_bank_without_images_leaves_saved_rows_aside():
    full, none = FeatureBank(2, 5, 3), FeatureBank(2, 0, 3)
    none.load_state_dict(full.state_dict())
    assert none.features.shape == (2, 0, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        FeatureBank(2, 4, 3).load_state_dict(full.state_dict())


def write_a_share() -> dict[str, torch.Tensor]:
    bank, rows = FeatureBank(1, 8, 3), torch.arange(24.0).view(1, 8, 3)
    mine = torch.tensor([5, 2, 7, 0]).view(dist.world_size(), -1)[dist.rank()]
    bank.write(mine, rows[:, mine])
    return dict(bank.state_dict())


def test_every_rank_holds_the_rows_of_all():
    one = write_a_share()
    for rank in on_ranks(2, write_a_share):
        assert all(torch.equal(rank[name], one[name]) for name in one)


def test_a_table_holds_each_images_newest_row_and_takes_the_length_of_what_is_loaded():
    table = InstanceTable(5, (2,), torch.int32, fill=-1)
    table.write(torch.tensor([3, 0]), torch.tensor([[1, 2], [3, 4]]))
    table.write(torch.tensor([3]), torch.tensor([[5, 6]]))
    assert table.read(torch.tensor([0, 3, 4])).tolist() == [[3, 4], [5, 6], [-1, -1]]
    rebuilt = InstanceTable(0, (2,), torch.int32, fill=-1)
    rebuilt.load_state_dict(table.state_dict())
    assert torch.equal(rebuilt.rows, table.rows) and rebuilt.rows.dtype == torch.int32
    with pytest.raises(RuntimeError, match="size mismatch"):
        InstanceTable(4, (2,), torch.int32, fill=-1).load_state_dict(table.state_dict())
    with pytest.raises(IndexError):
        table.read(torch.tensor([5]))
