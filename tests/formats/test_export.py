"""`tessella export`: what other libraries load from the folder is the network that was exported."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tessella
from tessella import UserError
from tessella.cli import main
from tessella.engine.pretrain import pretrain
from tessella.formats import table
from tessella.formats.check import largest_difference, pictures
from tessella.formats.export import export
from tessella.formats.model import Head, Model
from tessella.weights.resolve import resolve_backbone
from tests.engine.runs import tiny_run
from tests.formats.classifiers import classifier_in

for library in ("onnxruntime", "onnxscript", "transformers"):
    pytest.importorskip(library)

NARROW = "random:resnet10?width=4&stem=small&size=32"


def model_of(spec: str, head: Head | None = None) -> Model:
    return Model.of(resolve_backbone(spec), head)


def photos(count: int) -> np.ndarray:
    """Parts of a real photograph, (count, 48, 40, 3)."""
    from sklearn.datasets import load_sample_image

    return np.stack([load_sample_image("flower.jpg")[40 * i :][:48, 50 * i :][:, :40] for i in range(count)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that can carry a ResNet-10 of full width, which timm has and torchvision has not."""
    out = tmp_path_factory.mktemp("export") / "resnet18"  # the name of a network of timm, and of none that is meant
    with torch.random.fork_rng():
        exported = tessella.export("random:resnet10?size=32", out)
    assert {name: set(tools) for name, tools in exported.differences.items()} == {
        "hub": {"timm", "transformers"},
        "onnx": {"onnxruntime", "onnxruntime, uint8"},
        "pt2": {"torch.export"},
        "safetensors": {"safetensors"},
    }
    return out


# --- in other libraries -------------------------------------------------------------------------------------

OPENED_ELSEWHERE = """
import os, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tessella":
            raise ImportError("this process has no Tessella")

sys.meta_path.insert(0, Refuse())
os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np, onnxruntime, timm, torch, transformers
from PIL import Image

folder, image, expected = sys.argv[1], Image.open(sys.argv[2]), np.load(sys.argv[3])
pixels = np.asarray(image.convert("RGB"))[None]

def same(features):
    return float(abs(np.asarray(features) - expected).max() / abs(expected).max())

by_pixels = onnxruntime.InferenceSession(f"{folder}/model-uint8.onnx").run(None, {"pixels": pixels})[0]
net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
own = timm.data.create_transform(**timm.data.resolve_data_config(model=net))(image.convert("RGB"))[None]
images = torch.from_numpy(np.load(sys.argv[4]))
with torch.no_grad():
    print("uint8", same(by_pixels))
    print("onnx", same(onnxruntime.InferenceSession(f"{folder}/model.onnx").run(None, {"images": images.numpy()})[0]))
    print("timm", same(net(images)))
    print("transformers", same(transformers.AutoModel.from_pretrained(folder)(images).pooler_output.flatten(1)))
    print("pt2", same(torch.export.load(f"{folder}/model.pt2").module()(images)[0]))
print("levels", float((own - images).abs().max() * 255 * 0.229))
try:
    import tessella
except ImportError as error:
    print("refused:", error)
"""


def test_the_folder_opens_where_tessella_is_not_installed(folder: Path, tmp_path: Path):
    backbone = tessella.load_backbone(folder)
    image = Image.fromarray(photos(1)[0])
    image.save(tmp_path / "photo.png")
    x = backbone.transform(image)[None]
    np.save(tmp_path / "expected.npy", backbone(x).detach().numpy())
    np.save(tmp_path / "images.npy", x.numpy())
    files = [str(tmp_path / name) for name in ("photo.png", "expected.npy", "images.npy")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", OPENED_ELSEWHERE, str(folder), *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\w+) ([\d.e-]+)$", done.stdout, re.MULTILINE))
    assert set(found) == {"uint8", "onnx", "timm", "transformers", "pt2", "levels"}, done.stdout
    assert float(found.pop("levels")) < 1.2  # Pillow's resizing: a level here and there
    assert all(float(difference) < 1e-5 for difference in found.values()), found
    assert "refused: this process has no Tessella" in done.stdout


def test_it_comes_back_as_the_same_network_with_the_same_transform(folder: Path):
    for source in (str(folder), f"timm:{folder}", str(folder / "backbone.safetensors")):
        loaded = resolve_backbone(source)
        assert (loaded.config.name, loaded.config.width, loaded.transform.size) == ("resnet10", 64, 32)
    with torch.random.fork_rng():
        original = tessella.load_backbone("random:resnet10?size=32")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(tessella.load_backbone(folder)(x), original(x))


def test_the_check_is_written(folder: Path):
    check = json.loads((folder / "check.json").read_text())
    assert check["limit"] == 1e-5 and "scikit-learn" in check["images"]
    assert all(0 <= d <= 1e-5 for tools in check["differences"].values() for d in tools.values())
    assert set(check["files"]) == {path.name for path in folder.iterdir()} - {"check.json", "README.md"}
    assert check["versions"]["timm"]


def test_no_file_says_where_it_was_made(folder: Path):
    traces = {str(Path(tessella.__file__).parents[1]), str(folder.parent), str(Path(torch.__file__).parents[1])}
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [trace for trace in traces if trace.encode() in content], path.name


def test_torchvision_s_resnet_takes_the_state(tmp_path: Path):
    import torchvision

    exported = tessella.export("random:resnet18?size=32", tmp_path / "out", to=["torchvision"])
    assert set(exported.differences) == {"torchvision"}
    net = torchvision.models.resnet18()
    missing = net.load_state_dict(torch.load(tmp_path / "out" / "torchvision.pth", weights_only=True), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    assert (tmp_path / "out" / "convert_resnet.py").exists()


@pytest.mark.parametrize("pool", ["own", "average"])
def test_a_transformer_is_exported_with_the_way_it_pools(pool: str, tmp_path: Path):
    spec = f"random:timm:test_vit?pool={pool}&size=32"  # made for 160 pixels
    assert set(export(model_of(spec), tmp_path / "out", ["hub"]).differences["hub"]) == {"timm", "transformers"}
    assert resolve_backbone(str(tmp_path / "out")).config.pool == pool


# --- what cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "to", "message"),
    [
        (
            NARROW,
            "hub",
            r"timm has resnet10 of width 64 only, and this one is 4 wide. What can: onnx, pt2, safetensors",
        ),
        ("random:resnet18?stem=small", "hub", "timm has no resnet18 with a small stem"),
        ("random:resnet18?width=32", "torchvision", "torchvision has resnet18 of width 64 only"),
        ("random:timm:test_resnet", "torchvision", "torchvision has no ResNet 'timm:test_resnet'"),
        ("random:timm:test_convnext?pool=average", "hub", "timm does not pool as this network does"),
        (NARROW, "tflite", "the formats are hub, onnx, pt2, torchvision, safetensors"),
    ],
)
def test_a_format_that_cannot_carry_a_network_names_those_that_can(spec: str, to: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        export(model_of(spec), tmp_path / "out", [to])
    assert not list(tmp_path.iterdir())


def test_a_tool_that_computes_something_else_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    honest = table.FORMATS["safetensors"]

    def slightly_wrong(model: Model, folder: Path) -> None:
        state = {name: value * (1 + 1e-4) for name, value in model.backbone.state_dict().items()}
        other = model_of(NARROW)
        other.backbone.load_state_dict(state)
        honest.write(other, folder)

    monkeypatch.setitem(table.FORMATS, "safetensors", honest._replace(write=slightly_wrong))
    with pytest.raises(UserError, match=r"nothing is written: what safetensors computes .* and 1e-05 is allowed"):
        export(model_of(NARROW), tmp_path / "out", ["safetensors"])
    assert not list(tmp_path.iterdir())


def test_differences_of_any_kind_are_found():
    x = torch.tensor([[1.0, 100.0], [1.0, 2.0]])
    assert largest_difference({"features": x}, {"features": x}) == 0
    assert largest_difference({"features": x}, {"features": x + torch.tensor([[0, 0], [0, 0.02]])}) == pytest.approx(
        0.01
    )
    for other in (x[:, :1], x * torch.nan, x + torch.inf):
        assert not largest_difference({"features": x, "decision": x.long()}, {"features": other}) <= 1e-5
    assert largest_difference({"decision": x.long()}, {"decision": x.long() + 1}) == float("inf")


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxruntime" else found(name, *more)
    )
    with pytest.raises(UserError, match=re.escape("onnx needs onnxruntime: pip install 'tessella[export]'")):
        tessella.export(NARROW, tmp_path / "out", to=["onnx"])
    tessella.export(NARROW, tmp_path / "out", to=["safetensors"])


def test_a_full_folder_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder: choose another --out"):
        tessella.export(NARROW, tmp_path, to=["safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --- a run, and its card ------------------------------------------------------------------------------------


def test_a_run_is_exported_with_its_figures_and_without_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, secret = tmp_path / "run-of-a-secret", tmp_path / "patients-of-dr-who"
    secret.mkdir()
    for number, pixels in enumerate(photos(8)):
        Image.fromarray(pixels).save(secret / f"jane-doe-{number}.png")
    config = tiny_run(data=str(secret), batch_size=8, epochs=1)
    pretrain(replace(config, method=replace(config.method, prototypes=4, queue_length=0)), run)
    labelled = photos(8), [0, 1] * 4
    tessella.evaluate(run, labelled, labelled, protocols=["knn"], out=run, device="cpu", workers=1)
    words = f"export {shlex.quote(str(run))} --to safetensors --data {secret} --out {tmp_path / 'out'}"
    assert main(shlex.split(words)) == 0
    said = capsys.readouterr().out
    assert re.search(r"^safetensors +safetensors +0\.0e\+00$", said, re.MULTILINE)
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "pytorch" and front["pipeline_tag"] == "image-feature-extraction"
    assert "self-supervised-learning" in front["tags"] and front["license"] == "other"
    for fact in ("trained with SwAV", "1 epochs", "8, fingerprint", "| top-1 |", "weights belong to whoever"):
        assert fact in card, fact
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".json"))
    assert not [name for name in ("secret", "dr-who", "jane", str(tmp_path)) if name in written]
    loaded, original = tessella.load_backbone(tmp_path / "out"), tessella.load_backbone(run)
    assert loaded.transform == original.transform
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), original(x))

    records = json.loads((run / "evaluation.json").read_text())  # figures of other weights are not these weights'
    (run / "evaluation.json").write_text(json.dumps([record | {"weights": "0" * 64} for record in records]))
    tessella.export(run, tmp_path / "again", to=["safetensors"])
    assert "## Figures" in card and "## Figures" not in (tmp_path / "again" / "README.md").read_text()


# --- a classifier -------------------------------------------------------------------------------------------


def head_for(dim: int) -> Head:
    return Head(torch.randn(3, dim), torch.randn(3), ("egret", "heron", "stork"), 2.0, 0.6)


def test_a_classifier_is_reproduced_from_the_onnx_file_alone(tmp_path: Path):
    import onnxruntime

    classifier = classifier_in(tmp_path / "birds")
    exported = tessella.export(tmp_path / "birds", tmp_path / "out")
    assert set(exported.differences) == {"onnx", "pt2", "safetensors"}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model-uint8.onnx")
    images = photos(6)
    features, probabilities, decision = session.run(None, {"pixels": images})
    expected = classifier.probabilities(torch.nn.functional.normalize(torch.from_numpy(features), dim=1))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)
    assert np.array_equal(decision, np.where(expected.max(1) < 0.86, -1, expected.argmax(1))) and len(set(decision)) > 1
    backbone = classifier.loaded.backbone.eval()
    ours = backbone(classifier.loaded.transform(torch.from_numpy(images).permute(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(features, ours, rtol=1e-4, atol=1e-6)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["tessella.json"])
    assert facts["classes"] == ["egret", "heron", "stork"] and facts["abstain_below"] == 0.86 and facts["unit"] is True
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("pipeline_tag: image-classification", "egret, heron, stork", "92.5 %", "below 0.86, it abstains"):
        assert fact in card, fact
    with pytest.raises(UserError, match=r"hub cannot carry this network: timm's networks do not scale features"):
        tessella.export(tmp_path / "birds", tmp_path / "hub", to=["hub"])


def test_a_classifier_opens_in_libraries_of_classifiers(tmp_path: Path):
    import transformers

    model = model_of("random:resnet10?size=32")
    model = model._replace(head=head_for(model.backbone.feature_dim))
    export(model, tmp_path / "out", ["hub"])
    net = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert net.config.id2label == {0: "egret", 1: "heron", 2: "stork"}
    shown = pictures(model.transform, None)
    ours = model.expected(shown.inputs)
    with torch.no_grad():
        probabilities = net(shown.inputs).logits.softmax(1)
    torch.testing.assert_close(probabilities, ours["probabilities"], rtol=1e-5, atol=1e-6)
    backbone = tessella.load_backbone(tmp_path / "out")  # without the classifier
    torch.testing.assert_close(backbone(shown.inputs), ours["features"])
