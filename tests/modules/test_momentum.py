"""The momentum encoder follows parameters by name, keeps its own statistics, and is never trained."""

from __future__ import annotations

import torch
from torch import nn

from tessella.modules.drop_path import drop_paths, seed_noise, without_drop_path
from tessella.modules.momentum import MomentumEncoder


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1), 1 - self.drop_prob)) if self.drop_prob else x


def online() -> dict[str, nn.Module]:
    return {"trunk": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Dropping()), "head": nn.Linear(4, 2)}


def spoil(modules: dict[str, nn.Module]) -> None:
    for module in modules.values():
        for p in module.parameters():
            p.data.normal_()
    modules["trunk"](torch.randn(8, 3))  # moves batch statistics


def test_follows_by_the_moving_average_of_each_parameter():
    modules = online()
    encoder = MomentumEncoder(modules)
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    spoil(modules)
    encoder.ema_update(modules, 0.9)
    for name, p in encoder.named_parameters():
        part, _, key = name.partition(".")
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * modules[part].get_parameter(key))


def test_reset_copies_parameters_into_its_own_storage_and_leaves_statistics():
    modules = online()
    encoder = MomentumEncoder(modules)
    statistics = encoder["trunk"][1].running_mean.clone()
    spoil(modules)
    encoder.ema_update(modules, 0.0)
    for name, p in encoder.named_parameters():
        part, _, key = name.partition(".")
        other = modules[part].get_parameter(key)
        assert torch.equal(p, other) and p.data_ptr() != other.data_ptr()
    assert torch.equal(encoder["trunk"][1].running_mean, statistics)
    assert not torch.equal(modules["trunk"][1].running_mean, statistics)


def test_is_not_trained_and_drops_nothing():
    modules = online()
    encoder = MomentumEncoder(modules)
    assert not any(p.requires_grad for p in encoder.parameters()) and encoder.training
    assert drop_paths(encoder) == [] and len(drop_paths(modules["trunk"])) == 1


def test_drop_path_can_be_switched_off_for_a_while_and_drawn_from_a_seed():
    trunk, x = online()["trunk"], torch.randn(64, 3)
    with without_drop_path(trunk):
        assert (trunk(x) != 0).any(dim=1).all()
    draws = []
    for step in (5, 5, 6):
        torch.manual_seed(99)
        seed_noise(0, step, 1, 0, torch.device("cpu"))
        draws.append(trunk(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
