"""Our ResNet is torchvision's, key by key and value by value, with widths and a small stem besides."""

from __future__ import annotations

import pytest
import torch

from tessella.errors import UserError
from tessella.modules.backbone import BackboneConfig, build_backbone


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision_with_the_same_weights(name: str):
    import torchvision

    theirs = getattr(torchvision.models, name)(weights=None)
    ours = build_backbone(BackboneConfig(name))
    keys = {key for key in theirs.state_dict() if not key.startswith("fc.")}
    assert set(ours.state_dict()) == keys
    ours.load_state_dict({key: theirs.state_dict()[key] for key in keys})
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-4, rtol=1e-4)  # memory layouts differ


def test_the_small_stem_keeps_an_eighth_of_the_resolution_and_width_scales_every_channel():
    net = build_backbone(BackboneConfig("resnet18", width=8, stem="small"))
    assert net.feature_map(torch.randn(1, 3, 32, 32)).shape == (1, 64, 4, 4)
    assert net.feature_dim == 64 and net(torch.randn(1, 3, 32, 32)).shape == (1, 64)


def test_wide_resnet50_has_the_official_parameter_counts():
    with torch.device("meta"):
        counts = {
            w: sum(p.numel() for p in build_backbone(BackboneConfig("resnet50", w)).parameters()) for w in (64, 128)
        }
    assert counts[64] == 23_508_032
    assert round(counts[128] / 1e6, 1) == 93.9


def test_recomputation_changes_neither_gradients_nor_running_statistics():
    x = torch.randn(4, 3, 32, 32)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = build_backbone(BackboneConfig("resnet10", 8, "small", recompute=recompute)).train()
        net(x).square().mean().backward()
        results.append(([p.grad for p in net.parameters()], list(net.buffers())))
    for plain, again in zip(results[0], results[1], strict=True):
        for a, b in zip(plain, again, strict=True):
            assert torch.equal(a, b)


def test_timm_networks_come_by_name_and_tokens_are_refused_as_maps():
    swin_like = build_backbone(BackboneConfig("timm:convnext_atto"))
    assert swin_like(torch.randn(1, 3, 64, 64)).shape == (1, swin_like.feature_dim)
    assert swin_like.feature_map(torch.randn(1, 3, 64, 64)).shape == (1, swin_like.feature_dim, 2, 2)
    vit = build_backbone(BackboneConfig("timm:vit_tiny_patch16_224"))
    with pytest.raises(UserError, match="not a feature map"):
        vit.feature_map(torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize("name", ["resnet19", "timm:no_such_net"])
def test_an_unknown_name_is_refused_with_what_there_is(name: str):
    with pytest.raises(UserError, match=r"use one of|did you mean"):
        build_backbone(BackboneConfig(name))
