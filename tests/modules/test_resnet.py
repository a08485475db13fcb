"""Our ResNet is torchvision's, key by key and value by value, with widths and a small stem besides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


def test_the_small_pool_stem_halves_the_map_before_the_stages():
    net, without = (build_backbone(BackboneConfig("resnet18", width=8, stem=stem)) for stem in ("small-pool", "small"))
    without.eval().load_state_dict(net.eval().state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert net.feature_map(x).shape == (2, 64, 4, 4)
    first = torch.nn.functional.max_pool2d(without.bn1(without.conv1(x)).relu(), 2)  # of 2 x 2 pixels, none shared
    rest = torch.nn.Sequential(without.layer1, without.layer2, without.layer3, without.layer4)
    torch.testing.assert_close(net.feature_map(x), rest(first))


def test_wide_resnet50_has_the_official_parameter_counts():
    with torch.device("meta"):
        counts = {
            w: sum(p.numel() for p in build_backbone(BackboneConfig("resnet50", w)).parameters())
            for w in (64, 128, 256)
        }
    assert counts[64] == 23_508_032
    assert round(counts[128] / 1e6, 1) == 93.9 and round(counts[256] / 1e6, 1) == 375.4


def test_recomputation_changes_neither_gradients_nor_running_statistics():
    x = torch.randn(4, 3, 32, 32)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = build_backbone(BackboneConfig("resnet10", 8, "small", activation_checkpointing=recompute)).train()
        net(x).square().mean().backward()
        results.append(([p.grad for p in net.parameters()], list(net.buffers())))
    for plain, again in zip(results[0], results[1], strict=True):
        for a, b in zip(plain, again, strict=True):
            assert torch.equal(a, b)


def test_initial_values_are_the_official_ones():
    """Convolutions Kaiming-normal over their outputs, norms 1 and 0, those at the end of a block, too."""
    net = build_backbone(BackboneConfig("resnet50", width=32))
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
        elif isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.bias is None, name
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name


def test_padding_before_the_first_convolution_or_in_it_is_the_same():
    """The official network pads by 1 and then, in its convolution, by 2."""
    net, x = build_backbone(BackboneConfig("resnet18")), torch.randn(2, 3, 40, 40)
    official = F.conv2d(F.pad(x, (1, 1, 1, 1)), net.conv1.weight, stride=2, padding=2)
    assert torch.equal(net.conv1(x), official)


def test_the_stride_of_a_bottleneck_lies_in_its_3x3_convolution():
    net = build_backbone(BackboneConfig("resnet50", width=8))
    for stage in (net.layer2, net.layer3, net.layer4):
        assert [stage[0].conv1.stride, stage[0].conv2.stride, stage[0].conv3.stride] == [(1, 1), (2, 2), (1, 1)]
