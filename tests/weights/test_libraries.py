"""Pretrained networks by name. What the libraries would download is made here."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

import tessella
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.weights.resolve import random_twin, resolve_backbone
from tests.weights import official_nets as nets


def test_a_resnet_of_torchvision_keeps_its_weights(monkeypatch: pytest.MonkeyPatch):
    state = nets.resnet(64, (2, 2, 2, 2)) | nets.linear("fc", 512, 10)
    own = ImageClassification(crop_size=224, resize_size=232, interpolation=InterpolationMode.BICUBIC)
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(get_state_dict=lambda progress: state, transforms=lambda: own))
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)
    loaded, x = resolve_backbone("torchvision:resnet18"), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.backbone.eval()(x), nets.features(state, x), rtol=1e-5, atol=1e-5)
    assert loaded.transform == EvalTransform(224, 232, interpolation="bicubic") and loaded.config.name == "resnet18"


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
        ("torchvision:vit_b_16", "torchvision:vit_b_16 is not one of resnet"),
        ("torchvision:resnet10", "weights of torchvision:resnet10 cannot be loaded"),
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
        with pytest.raises(UserError, match=r"cannot be loaded \(OSError: Name or service.*TORCH_HOME, HF_HOME"):
            resolve_backbone(name)


def test_weights_of_another_stem_are_evaluated_at_its_size(tmp_path: Path):
    torch.save(nets.resnet(4) | nets.conv("conv1", 3, 4, 3), tmp_path / "small.pth")
    loaded = resolve_backbone(str(tmp_path / "small.pth"))
    assert loaded.config.stem == "small" and loaded.transform.size == 32


# --- local copies -------------------------------------------------------------------------------------------

OWN = {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
OWN |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def timm_folder(folder: Path, **facts: Any) -> tuple[Path, Any]:
    """A folder as timm writes it, and its network."""
    folder.mkdir()
    net: Any = timm.create_model("test_resnet", num_classes=5)
    save_file(net.state_dict(), folder / "model.safetensors")
    config = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": OWN | facts}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, net.eval()


@pytest.mark.usefixtures("no_network")
def test_a_folder_or_file_of_timm_is_the_network_that_it_was_saved_from(tmp_path: Path):
    folder, net = timm_folder(tmp_path / "mine")
    x = torch.randn(2, 3, 64, 64)
    expected = net.forward_head(net.forward_features(x), pre_logits=True)
    for spec in (folder, folder / "model.safetensors", f"test_resnet={folder / 'model.safetensors'}"):
        loaded = resolve_backbone(f"timm:{spec}")
        torch.testing.assert_close(loaded.backbone.eval()(x), expected)
        assert loaded.config.name == "timm:test_resnet"
    assert resolve_backbone(f"timm:{folder}").transform == EvalTransform(
        64, 71, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), interpolation="bicubic"
    )


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("crop", [0.9, 1.0])
def test_images_of_a_timm_network_are_timm_s_own_within_rounding(mode: str, crop: float, tmp_path: Path):
    folder, _ = timm_folder(tmp_path / "mine", crop_mode=mode, crop_pct=crop)
    facts = OWN | {"crop_mode": mode, "crop_pct": crop, "input_size": (3, 64, 64)}
    own = timm.data.create_transform(**facts, is_training=False)
    rows, columns = np.mgrid[0:90, 0:130]
    image = Image.fromarray(np.stack([rows * 2, columns, 255 - rows], axis=-1).astype(np.uint8))
    level = 1 / 255 / min(OWN["std"])
    found = resolve_backbone(f"timm:{folder}").backbone.transform(image)
    assert (found - own(image)).abs().max() <= 1.01 * level


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"input_size": []}, "no usable transform"),
        ({"input_size": [3, 10**9, 10**9]}, "give at most 4096"),
        ({"crop_pct": float("nan")}, "NaN is no finite number"),
        ({"mean": [0.5]}, "expected a list of 3"),
        ({"std": [0.0, 1.0, 1.0]}, "std above 0"),
        ({"interpolation": "lanczos"}, "bilinear"),
    ],
)
def test_a_damaged_configuration_of_timm_is_said_in_words(facts: dict[str, Any], message: str, tmp_path: Path):
    folder, _ = timm_folder(tmp_path / "mine", **facts)
    with pytest.raises(UserError, match=message):
        resolve_backbone(f"timm:{folder}")


def test_a_local_file_that_lacks_tensors_is_refused(tmp_path: Path):
    folder, net = timm_folder(tmp_path / "mine")
    state = {name: value for name, value in net.state_dict().items() if "layer4" not in name}
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part\.pth does not hold the weights of timm:test_resnet .*layer4"):
        resolve_backbone(f"timm:test_resnet={tmp_path / 'part.pth'}")
    with pytest.raises(UserError, match=r"does not name its network: give timm:NAME="):
        resolve_backbone(f"timm:{tmp_path / 'part.pth'}")
    (folder / "config.json").write_text('["architecture"]')
    with pytest.raises(UserError, match=r"config\.json is not a config\.json of timm"):
        resolve_backbone(f"timm:{folder}")


EFFICIENTNET = Path(__file__).resolve().parents[3] / "shared" / "data" / "tf_efficientnet_lite0.tar"


@pytest.mark.skipif(not EFFICIENTNET.exists(), reason=f"{EFFICIENTNET} is not there")
@pytest.mark.usefixtures("no_network")
def test_a_published_network_in_a_folder_computes_what_timm_computes_from_it(tmp_path: Path):
    with tarfile.open(EFFICIENTNET) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "tf_efficientnet_lite0"
    own: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    backbone = tessella.load_backbone(f"timm:{folder}")
    x = backbone.transform(torch.randint(0, 255, (2, 3, 200, 300), dtype=torch.uint8))
    assert x.shape == (2, 3, 224, 224) and backbone.transform.interpolation == "bicubic"
    assert torch.equal(backbone(x), own(x))
