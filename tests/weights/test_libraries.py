"""Pretrained networks by name. What the libraries would download is made here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision

from tessella.errors import UserError
from tessella.weights.resolve import random_twin, resolve_backbone
from tests.weights import official_nets as nets


def test_a_resnet_of_torchvision_keeps_its_weights(monkeypatch: pytest.MonkeyPatch):
    state = nets.resnet(64, (2, 2, 2, 2)) | nets.linear("fc", 512, 10)
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(get_state_dict=lambda progress: state))
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)
    loaded, x = resolve_backbone("torchvision:resnet18"), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.backbone.eval()(x), nets.features(state, x), rtol=1e-5, atol=1e-5)
    assert loaded.transform.size == 224 and loaded.config.name == "resnet18"


def test_a_network_of_timm_keeps_its_weights_and_its_images(monkeypatch: pytest.MonkeyPatch):
    create, made = timm.create_model, []

    def pretrained(name: str, pretrained: bool, **options: Any) -> torch.nn.Module:
        made.append(create(name, pretrained=False, **options))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", pretrained)
    loaded, x = resolve_backbone("timm:test_resnet"), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.backbone.eval()(x), made[0].eval()(x))
    assert loaded.transform.size == made[0].pretrained_cfg["input_size"][-1]
    assert loaded.transform.mean == tuple(made[0].pretrained_cfg["mean"])
    twin = random_twin(loaded, 1).backbone.state_dict()
    assert any(not torch.equal(value, loaded.backbone.state_dict()[key]) for key, value in twin.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:vit_b_16", "torchvision:vit_b_16 is none of the networks that are taken from torchvision"),
        ("torchvision:resnet10", "weights of torchvision:resnet10 cannot be had"),
        ("timm:resnet51", "timm has no network 'resnet51'; did you mean"),
        ("nothing:at:all", "names no backbone: give a run folder"),
    ],
)
def test_a_network_that_is_not_there_is_named(name: str, message: str):
    with pytest.raises(UserError, match=message):
        resolve_backbone(name)


def test_without_a_connection_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch):
    def fails(*args: Any, **options: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: SimpleNamespace(
        DEFAULT=SimpleNamespace(get_state_dict=fails)))  # fmt: skip
    monkeypatch.setattr(timm, "create_model", fails)
    for name in ("torchvision:resnet50", "timm:resnet50"):
        with pytest.raises(UserError, match=r"cannot be had \(OSError: Name or service.*TORCH_HOME, HF_HOME"):
            resolve_backbone(name)


def test_weights_of_another_stem_are_evaluated_at_its_size(tmp_path: Path):
    torch.save(nets.resnet(4) | nets.conv("conv1", 3, 4, 3), tmp_path / "small.pth")
    loaded = resolve_backbone(str(tmp_path / "small.pth"))
    assert loaded.config.stem == "small" and loaded.transform.size == 32
