"""Crops of several sizes in one pass: batch norm sees the pixels of all of them together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tessella.modules.multicrop import crops_by_size, joint_features
from tessella.modules.resnet import ResNet

CROPS = (torch.randn(6, 3, 16, 16), torch.randn(8, 3, 8, 8))


def small(name: str, recompute: bool = False) -> ResNet:
    torch.manual_seed(0)
    return ResNet(name, 4, "small", recompute).train()


def shortcut_norms(net: ResNet) -> list[nn.Module]:
    return [m for name, m in net.named_modules() if "downsample" in name and isinstance(m, nn.BatchNorm2d)]


class Pixelwise:
    """Slow reference of the joint batch norm, hooked into one pass per size: sums of all sizes, then the means."""

    def __init__(self, net: ResNet, crops: tuple[Tensor, ...]) -> None:
        self.net, self.crops = net, crops

    def features(self) -> Tensor:
        net, relu = self.net, torch.relu
        maps = self._norm(net.bn1, [net.conv1(x) for x in self.crops])
        maps = [net.maxpool(relu(x)) for x in maps]
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                shortcuts = [x if block.downsample is None else self._apart(block.downsample, x) for x in maps]
                convs = [block.conv1, block.conv2] + ([block.conv3] if hasattr(block, "conv3") else [])
                norms = [block.bn1, block.bn2] + ([block.bn3] if hasattr(block, "bn3") else [])
                for conv, norm in zip(convs, norms, strict=True):
                    maps = self._norm(norm, [conv(x) for x in maps])
                    if norm is not norms[-1]:
                        maps = [relu(x) for x in maps]
                maps = [relu(x + s) for x, s in zip(maps, shortcuts, strict=True)]
        return torch.cat([x.mean(dim=(2, 3)) for x in maps])

    def _norm(self, norm: nn.Module, maps: list[Tensor]) -> list[Tensor]:
        count = sum(x.numel() // x.shape[1] for x in maps)
        mean = sum(x.sum(dim=(0, 2, 3)) for x in maps) / count
        variance = sum(((x - mean[:, None, None]) ** 2).sum(dim=(0, 2, 3)) for x in maps) / count
        scale = norm.weight / (variance + norm.eps).sqrt()
        return [(x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None] for x in maps]

    def _apart(self, downsample: nn.Module, x: Tensor) -> Tensor:
        return self._norm(downsample[1], [downsample[0](x)])[0]


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_features_and_gradients_equal_sums_over_the_pixels_of_all_sizes(name: str):
    net, reference = small(name).double(), small(name).double()
    crops = tuple(x.double() for x in CROPS)
    ours, theirs = joint_features(net, crops), Pixelwise(reference, crops).features()
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for (key, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-8, rtol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_main_norms_count_one_batch_and_those_of_the_shortcuts_one_per_size():
    net = small("resnet10")
    joint_features(net, CROPS)
    assert all(int(m.num_batches_tracked) == 2 for m in shortcut_norms(net))
    others = {m for m in net.modules() if isinstance(m, nn.BatchNorm2d)} - set(shortcut_norms(net))
    assert all(int(m.num_batches_tracked) == 1 for m in others)
    pixels = torch.cat([net.conv1(x).permute(0, 2, 3, 1).flatten(0, 2) for x in CROPS])
    torch.testing.assert_close(net.bn1.running_mean, 0.1 * pixels.mean(dim=0))
    torch.testing.assert_close(net.bn1.running_var, 0.9 + 0.1 * pixels.var(dim=0))


def test_neighbouring_groups_of_one_size_share_a_pass_in_the_order_of_the_views():
    groups = [torch.randn(v, 4, 3, s, s) for v, s in ((1, 16), (2, 16), (3, 8), (1, 16))]
    joined = crops_by_size(groups)
    assert [tuple(x.shape) for x in joined] == [(12, 3, 16, 16), (12, 3, 8, 8), (4, 3, 16, 16)]
    assert torch.equal(joined[0], torch.cat([groups[0].flatten(0, 1), groups[1].flatten(0, 1)]))


def test_one_size_is_a_plain_pass():
    net, plain = small("resnet10"), small("resnet10")
    assert torch.equal(joint_features(net, CROPS[:1]), plain(CROPS[0]))


def test_recomputation_changes_neither_gradients_nor_statistics():
    kept, again = small("resnet10"), small("resnet10", recompute=True)
    for net in (kept, again):
        joint_features(net, CROPS).square().sum().backward()
    for (key, p), q in zip(kept.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, k=key: f"{k}: {m}")
    for p, q in zip(kept.buffers(), again.buffers(), strict=True):
        assert torch.equal(p, q)


def test_in_evaluation_mode_sizes_do_not_meet():
    net = small("resnet10")
    joint_features(net, CROPS)
    net.eval()
    apart = torch.cat([copy.deepcopy(net)(x) for x in CROPS])
    torch.testing.assert_close(joint_features(net, CROPS), apart)


@pytest.mark.parametrize("together", [False, True], ids=["a plain pass", "several sizes"])
def test_features_on_a_cpu_are_exact_to_float32_however_many_pixels_a_batch_norm_sees(together: bool):
    """Else one process and several could not be compared: torch sums channels-last pixels with an error of 1e-5."""
    net, exact = small("resnet10"), small("resnet10").double()
    crops = (torch.randn(64, 3, 32, 32), torch.randn(64, 3, 16, 16))[: 1 + together]
    ours = joint_features(net, crops) if together else net(crops[0])
    theirs = joint_features(exact, [x.double() for x in crops]) if together else exact(crops[0].double())
    assert float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm()) < 1e-6
