"""The formats by name: who can carry a network, and why another cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tessella.errors import UserError
from tessella.formats import graphs, libraries
from tessella.formats.check import Reader
from tessella.formats.model import Model


class Format(NamedTuple):
    """How a network is written, and read by the tools that the format is for."""

    opens: str  # Python that opens it
    write: Callable[[Model, Path], None]
    read: Callable[[Model, Path], dict[str, Reader]]  # tool -> what it computes
    refusal: Callable[[Model], str] = lambda model: ""  # why it cannot carry a model; empty if it can
    needs: tuple[str, ...] = ()  # modules of the extra `export`


FORMATS = {
    "hub": Format(
        """
        net = timm.create_model("local-dir:FOLDER", pretrained=True)
        net = transformers.AutoModel.from_pretrained("FOLDER")  # features: net(images).pooler_output.flatten(1)
        """,
        libraries.write_hub,
        libraries.read_hub,
        libraries.hub_refusal,
        ("transformers",),
    ),
    "onnx": Format(
        """
        # images: (b, 3, size, size) float32; pixels: (b, height, width, 3) uint8 RGB of any size
        features = onnxruntime.InferenceSession("FOLDER/model.onnx").run(None, {"images": images})[0]
        features = onnxruntime.InferenceSession("FOLDER/model-uint8.onnx").run(None, {"pixels": pixels})[0]
        """,
        graphs.write_onnx,
        graphs.read_onnx,
        needs=("onnx", "onnxscript", "onnxruntime"),
    ),
    "pt2": Format(
        """
        (features, *_) = torch.export.load("FOLDER/model.pt2").module()(images)
        """,
        graphs.write_pt2,
        graphs.read_pt2,
    ),
    "torchvision": Format(
        """
        net = torchvision.models.NETWORK()
        net.load_state_dict(torch.load("FOLDER/torchvision.pth", weights_only=True), strict=False)  # no fc.*
        """,
        libraries.write_torchvision,
        libraries.read_torchvision,
        libraries.torchvision_refusal,
    ),
    "safetensors": Format(
        """
        tensors = safetensors.torch.load_file("FOLDER/backbone.safetensors")  # described by backbone.json
        backbone = tessella.load_backbone("FOLDER")
        """,
        libraries.write_safetensors,
        libraries.read_safetensors,
    ),
}


def chosen_formats(model: Model, names: Sequence[str]) -> dict[str, Format]:
    """The formats that were asked for, or all that can carry the model.

    Raises:
        UserError: there is no such format, it cannot carry the model, or a library is missing.
    """
    if unknown := [name for name in names if name not in FORMATS]:
        raise UserError(f"--to {unknown[0]}: the formats are {', '.join(FORMATS)}")
    able = {name: form for name, form in FORMATS.items() if not form.refusal(model)}
    for name in dict.fromkeys(names):
        if name not in able:
            raise UserError(
                f"{name} cannot carry this network: {FORMATS[name].refusal(model)}. What can: {', '.join(able)}"
            )
    chosen = {name: form for name, form in able.items() if name in names or not names}
    for name, form in chosen.items():
        require(name, form.needs)
    return chosen


def require(what: str, modules: Sequence[str], extra: str = "export") -> None:
    """Check that libraries of an extra are installed.

    Raises:
        UserError: one is missing; the text names the extra.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'tessella[{extra}]'")
