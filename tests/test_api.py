from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tessella
from tessella import UserError
from tessella.cli import COMMANDS
from tessella.data.sources import ArrayImages
from tessella.recipes import recipe
from tessella.run.config import load_config, with_settings

TINY = {
    "backbone": {"name": "resnet10", "width": 4},
    "batch_size": 8,
    "device": "cpu",
    "workers": 1,
    "log_every": 1,
}


def pixels(count: int = 16) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tessella.load_backbone(run).state_dict().items()}


# --- the package itself -------------------------------------------------------------------------------------


def test_importing_tessella_costs_next_to_nothing():
    code = (
        "import sys, time; start = time.process_time(); import tessella; dir(tessella)\n"
        "print(time.process_time() - start, len({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split()
    assert heavy == "0" and float(seconds) < 0.05


@pytest.mark.parametrize("name", tessella.__all__)
def test_all_that_is_offered_is_there(name):
    assert getattr(tessella, name) is not None
    assert name in dir(tessella)


def test_what_is_not_offered_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        tessella.train  # noqa: B018


def test_recipes_are_the_subpackage_whatever_was_imported_first():
    assert tessella.recipes is sys.modules["tessella.recipes"]
    assert tessella.recipes.recipe("swav_cpu").recipe == "swav_cpu"


def test_the_package_says_that_it_is_typed():
    assert (Path(tessella.__file__).parent / "py.typed").exists()


# --- settings -----------------------------------------------------------------------------------------------


def test_settings_replace_only_what_they_name():
    start = recipe("swav_cpu")
    changed = with_settings(
        start,
        {
            "epochs": 7,
            "optimizer": {"lr": 0.5},
            "method.views.groups.0.size": 24,
            "method": {"epsilon": 0.03},
        },
    )
    assert (changed.epochs, changed.optimizer.lr, changed.method.epsilon) == (7, 0.5, 0.03)
    assert changed.method.views.groups[0].size == 24
    assert changed.optimizer.weight_decay == start.optimizer.weight_decay
    assert with_settings(start, {}) == start


def test_parts_may_be_given_as_typed_configs():
    optimizer = recipe("swav_imagenet_200ep").optimizer
    assert with_settings(recipe("swav_cpu"), {"optimizer": optimizer, "epochs": 20}).optimizer == optimizer


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("epoch", 3, "no setting 'epoch'"),
        ("method.temprature", 3, "in place of 'temprature' there is name, prototypes"),
        ("optimizer", {"rate": 1}, "in place of 'rate' there is name, lr"),
        ("method.views.groups.1.size", 3, "in place of '1' there is 0"),
        ("epochs.x", 3, "nothing below it"),
        ("epochs", "three", "settings.epochs is 'three'; expected int"),
        ("epochs", 0, "epochs=0 must be at least 1"),
    ],
)
def test_a_wrong_setting_is_a_user_error(name, value, told):
    with pytest.raises(UserError, match=told):
        with_settings(recipe("swav_cpu"), {name: value})


# --- functions ----------------------------------------------------------------------------------------------


def test_an_array_in_memory_trains_and_goes_on_exactly(tmp_path):
    images = pixels()
    straight = tessella.pretrain(images, "jigclu_cpu", tmp_path / "a", max_steps=3, **TINY)
    run = tessella.pretrain(images, "jigclu_cpu", str(tmp_path / "b"), max_steps=1, **TINY)
    assert tessella.resume(run, images, max_steps=3) == tmp_path / "b"
    torch.testing.assert_close(weights(run), weights(straight), rtol=0, atol=0)
    assert load_config(run / "config.yaml").backbone.width == 4
    assert "complete after 3 steps" in straight._repr_html_() and "JigClu" in straight._repr_html_()


def test_other_images_are_refused_on_resume(tmp_path):
    run = tessella.pretrain(pixels(), "jigclu_cpu", tmp_path / "run", max_steps=1, **TINY)
    with pytest.raises(UserError, match="have changed"):
        tessella.resume(run, pixels(17), max_steps=2)


def test_a_loaded_backbone_maps_images_to_features():
    backbone = tessella.load_backbone("random:resnet10?width=4&stem=small")
    assert not backbone.training
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, backbone.feature_dim)


def test_a_network_larger_than_the_memory_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr("tessella.weights.resolve.machine_bytes", lambda: 20 << 20)
    with pytest.raises(UserError, match=r"resnet18 of width 64 has weights of 43 MiB, and this machine has 20 MiB"):
        tessella.load_backbone("random:resnet18")


def test_arrays_with_labels_are_evaluated(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    bright = (labels[:, None, None, None] * 120 + rng.integers(0, 100, (40, 32, 32, 3))).astype(np.uint8)
    records = tessella.evaluate(
        "random:resnet10?width=4&stem=small&size=32",
        (bright[:20], labels[:20]),
        (bright[20:], labels[20:]),
        protocols=["knn"],
        out=tmp_path,
        device="cpu",
        workers=1,
    )
    assert records[0]["scores"]["top1"] == 1.0  # black and white are told apart by any network
    assert (tmp_path / "evaluation.json").exists()


def test_labels_are_asked_for_where_they_are_needed():
    with pytest.raises(UserError, match=r"\(array, labels\)"):
        tessella.evaluate("random:resnet10", pixels(), pixels(), protocols=["knn"])


def test_embed_writes_and_returns_the_features(tmp_path):
    spec = "random:resnet10?width=4&stem=small&size=32"
    features = tessella.embed(spec, pixels(6), tmp_path / "x.npy", device="cpu", workers=1)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", allow_pickle=False), features.x.numpy())
    assert features.x.shape == (6, 32)


def test_opened_images_are_taken_as_they_are(tmp_path):
    images = ArrayImages("mine", pixels(6))
    spec = "random:resnet10?width=4&stem=small&size=32"
    assert len(tessella.embed(spec, images, tmp_path / "x.npy", device="cpu", workers=1).x) == 6


def test_a_backbone_brings_the_images_that_evaluations_see(tmp_path: Path):
    run = tessella.pretrain(pixels(), recipe="jigclu_cpu", out=tmp_path / "run", max_steps=2, **TINY)
    backbone = tessella.load_backbone(run)
    features = tessella.embed(run, pixels(), tmp_path / "features.npy", device="cpu", workers=1).x
    images = backbone.transform(torch.from_numpy(pixels()).permute(0, 3, 1, 2))
    assert images.shape[-1] == backbone.transform.size == 32 and not backbone.training
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), features)


def test_torch_s_generators_are_left_as_they_were(tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run = tessella.pretrain(pixels(), recipe="jigclu_cpu", out=tmp_path / "run", max_steps=2, **TINY)
    tessella.load_backbone(run)
    tessella.load_backbone("random:resnet10?stem=small&width=4&size=32")
    labelled = pixels(), np.arange(16) % 2
    tessella.evaluate(run, labelled, labelled, protocols=["knn", "linear"], device="cpu", workers=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_whole_configuration_and_a_list_of_pictures_train(tmp_path):
    config = with_settings(recipe("jigclu_cpu"), TINY | {"max_steps": 1})
    pictures = [Image.fromarray(picture) for picture in pixels()]
    run = tessella.pretrain(pictures, config, tmp_path / "run")
    assert load_config(run / "config.yaml").data == "list"


class Mean(torch.nn.Module):
    """A network of the user's own, without `feature_dim` and `transform`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def test_a_module_of_one_s_own_is_evaluated_and_embeds(tmp_path):
    labels = np.arange(40) % 2
    bright = (labels[:, None, None, None] * 120 + pixels(40) // 3).astype(np.uint8)
    records = tessella.evaluate(
        Mean(), (bright[:20], labels[:20]), (bright[20:], labels[20:]), protocols="knn", image_size=32, workers=1
    )
    assert records[0]["scores"]["top1"] == 1.0 and records[0]["backbone"] == "Mean"
    assert "<table>" in records._repr_html_() and "100.0" in records._repr_html_()
    assert tessella.embed(Mean(), bright, tmp_path / "x.npy", image_size=32, workers=1).x.shape == (40, 3)


def test_a_module_that_gives_no_vectors_is_refused():
    with pytest.raises(UserError, match=r"gives \(2, 3, 32, 32\) for 2 images"):
        tessella.evaluate(torch.nn.Identity(), "digits::train", "digits::test", image_size=32)


def test_every_command_of_the_command_line_is_a_function():
    others = {"import": "import_weights", "report": "write_report"}  # a word of Python; a package of ours
    assert all(callable(getattr(tessella, others.get(name, name))) for name in COMMANDS if name != "recipes")
