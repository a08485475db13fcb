"""`convert_resnet.py` writes the keys of detectron2 and OpenMMLab: networks with their names compute the same maps.

Neither library is installed. Their ResNets are built here from their sources' names: detectron2's norm is a part of
its convolution; OpenMMLab's names are torchvision's behind "backbone.".
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from tessella.formats import convert_resnet
from tessella.modules.resnet import LAYERS, Bottleneck, ResNet


class Conv2d(nn.Conv2d):
    """`detectron2.layers.Conv2d`: a convolution that holds its norm."""

    def __init__(self, *sizes: int, norm: nn.Module, **options: Any) -> None:
        super().__init__(*sizes, bias=False, **options)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def conv(channels_in: int, channels: int, kernel: int, stride: int = 1) -> Conv2d:
    return Conv2d(channels_in, channels, kernel, norm=nn.BatchNorm2d(channels), stride=stride, padding=kernel // 2)


class Block(nn.Module):
    """`BottleneckBlock` with STRIDE_IN_1X1 off, or `BasicBlock`."""

    def __init__(self, channels_in: int, channels: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * channels if bottleneck else channels
        self.shortcut = conv(channels_in, out, 1, stride) if channels_in != out else None
        self.conv1 = conv(channels_in, channels, 1) if bottleneck else conv(channels_in, channels, 3, stride)
        self.conv2 = conv(channels, channels, 3, stride if bottleneck else 1)
        self.conv3 = conv(channels, out, 1) if bottleneck else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        y = y if self.conv3 is None else self.conv3(F.relu(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Detectron2ResNet(nn.Module):
    """`detectron2.modeling.backbone.ResNet`: stem, res2 to res5."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        block, depths = LAYERS[name]
        bottleneck = block is Bottleneck
        self.stem = nn.ModuleDict({"conv1": conv(3, width, 7, 2)})
        channels_in = width
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            blocks = []
            for number in range(depth):
                blocks.append(Block(channels_in, channels, 2 if stage and not number else 1, bottleneck))
                channels_in = channels * block.expansion
            self.add_module(f"res{stage + 2}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem["conv1"](x)), 3, 2, 1)
        for stage in (2, 3, 4, 5):
            x = self.get_submodule(f"res{stage}")(x)
        return x


def trained(name: str, width: int) -> ResNet:
    """A ResNet whose norms have statistics of their own."""
    net = ResNet(name, width)
    for _ in range(2):
        net(3 * torch.randn(8, 3, 64, 64) + 1)
    return net.eval()


def converted(folder: Path, net: ResNet, layout: str, suffix: str, *, alone: bool = False) -> dict[str, Any]:
    """What the script makes of the weights; `alone`: in a process that has never heard of Tessella."""
    source, target = folder / f"weights{suffix}", folder / f"{layout}{suffix}.pth"
    if suffix == ".safetensors":
        save_file(net.state_dict(), source)
    else:
        torch.save(net.state_dict() | {"fc.weight": torch.zeros(5, net.feature_dim), "fc.bias": torch.zeros(5)}, source)
    words = [layout, str(source), str(target)]
    if alone:
        (folder / "script.py").write_text(Path(convert_resnet.__file__).read_text())
        subprocess.run([sys.executable, "-I", str(folder / "script.py"), *words], check=True)
    else:
        assert convert_resnet.main(words) == 0
    return torch.load(target, weights_only=True)


@pytest.mark.parametrize(("name", "suffix"), [("resnet18", ".pth"), ("resnet50", ".safetensors")])
def test_detectron2_s_network_computes_the_same_map(name: str, suffix: str, tmp_path: Path):
    net, theirs, x = trained(name, 8), Detectron2ResNet(name, 8).eval(), torch.randn(2, 3, 64, 64)
    file = converted(tmp_path, net, "detectron2", suffix, alone=suffix == ".pth")
    assert file["matching_heuristics"] is True
    found = theirs.load_state_dict(file["model"], strict=False)
    assert not found.unexpected_keys and all(key.endswith("num_batches_tracked") for key in found.missing_keys)
    torch.testing.assert_close(theirs(x), net.feature_map(x), rtol=1e-5, atol=1e-5)


def test_openmmlab_s_network_computes_the_same_map(tmp_path: Path):
    net, theirs, x = trained("resnet18", 64), torchvision.models.resnet18(), torch.randn(2, 3, 64, 64)
    theirs.fc = nn.Identity()
    state = converted(tmp_path, net, "openmmlab", ".pth")["state_dict"]
    assert all(key.startswith("backbone.") for key in state)  # what `prefix="backbone."` takes off
    found = theirs.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()}, strict=False)
    assert not found.unexpected_keys and all(key.endswith("num_batches_tracked") for key in found.missing_keys)
    torch.testing.assert_close(theirs.eval()(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [[], ["detectron", "a.pth", "b.pth"], ["detectron2", "a.pth"]])
def test_wrong_words_show_how_the_script_is_used(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert convert_resnet.main(words) == 2
    assert "usage: python convert_resnet.py detectron2|openmmlab INPUT OUTPUT.pth" in capsys.readouterr().err


def test_a_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.pth").write_text("mine")
    assert convert_resnet.main(["detectron2", "weights.pth", str(tmp_path / "mine.pth")]) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "mine.pth").read_text() == "mine"
