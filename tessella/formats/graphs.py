"""Whole networks as graphs, which need no definition of the network beside them: ONNX and `torch.export`.

What tracing notes about where the code lies, with paths of this machine, is left out of the files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella import files
from tessella.errors import UserError
from tessella.formats.check import Pictures, Reader
from tessella.formats.model import Model, Whole
from tessella.formats.pixels import OPSET, can_transform, pixels_to_images

ONNX, ONNX_UINT8, PT2 = "model.onnx", "model-uint8.onnx", "model.pt2"
_FACTS = "tessella.json"  # of an archive's extra files; in ONNX, an entry of the metadata
_MOST_BYTES = 2**31 - 2**24  # of the weights in an ONNX file, which is one protobuf message


def write_onnx(model: Model, folder: Path) -> None:
    """Write the network for normalised images and, where the operators can do its transform, for uint8 pixels.

    Raises:
        UserError: the network has an operation that ONNX has not, or too many weights for one file.
    """
    import onnx

    needed = sum(tensor.nbytes for tensor in model.backbone.state_dict().values())
    if needed > _MOST_BYTES:
        raise UserError(f"the weights have {needed:,} bytes, and an ONNX file can hold 2 GB: use pt2 or safetensors")
    with _explained("onnx"):
        made = torch.onnx.export(
            _recorded(model),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[*model.outputs],
        )
        assert made is not None
        network = made.model_proto
    _clean(network)
    network.metadata_props.add(key=_FACTS, value=files.json_text(model.facts(), indent=None))
    files.write_bytes(folder / ONNX, network.SerializeToString())
    if can_transform(model.transform):
        before = pixels_to_images(model.transform, network.ir_version)
        whole = onnx.compose.merge_models(before, network, [("images", "images")], prefix1="pixels/")
        whole.graph.input[0].name = "pixels"
        for node in whole.graph.node:
            node.input[:] = ["pixels" if name == "pixels/pixels" else name for name in node.input]
        files.write_bytes(folder / ONNX_UINT8, whole.SerializeToString())


def read_onnx(model: Model, folder: Path) -> dict[str, Reader]:
    """What onnxruntime computes of the files: of all images at once, and of pixels image by image."""
    readers: dict[str, Reader] = {"onnxruntime": lambda images: _run(folder / ONNX, [images.inputs.numpy()])}
    if (folder / ONNX_UINT8).exists():
        readers["onnxruntime, uint8"] = lambda images: _run(folder / ONNX_UINT8, [one[None] for one in images.pixels])
    return readers


def _run(file: Path, batches: list[NDArray[Any]]) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    made = [session.run(names, {session.get_inputs()[0].name: batch}) for batch in batches]
    return {
        name: torch.from_numpy(np.concatenate(parts))
        for name, parts in zip(names, zip(*made, strict=True), strict=True)
    }


def write_pt2(model: Model, folder: Path) -> None:
    """Write the archive of `torch.export`.

    Raises:
        UserError: the network does something that cannot be recorded.
    """
    with _explained("pt2"):
        program = _recorded(model)
    archive = io.BytesIO()  # torch writes only to what it can seek in
    torch.export.save(program, archive, extra_files={_FACTS: files.json_text(model.facts())})
    files.write_bytes(folder / PT2, archive.getbuffer())


def read_pt2(model: Model, folder: Path) -> dict[str, Reader]:
    """What torch computes of the archive: of one image, and of the others at once."""
    program = torch.export.load(folder / PT2).module()

    def read(images: Pictures) -> dict[str, Tensor]:
        with torch.no_grad():
            parts = [program(part) for part in (images.inputs[:1], images.inputs[1:]) if len(part)]
        return {name: torch.cat(values) for name, values in zip(model.outputs, zip(*parts, strict=True), strict=True)}

    return {"torch.export": read}


def _recorded(model: Model) -> torch.export.ExportedProgram:
    """The network for any number of images."""
    images = torch.zeros(2, 3, model.transform.size, model.transform.size)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Whole(model).eval(), (images,), dynamic_shapes=({0: batch},))
    for graph in [
        module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)
    ]:
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)
    return program


def _clean(network: Any) -> None:
    """Leave out what the exporter notes about our code, and call the number of images by its name."""
    values = [*network.graph.input, *network.graph.output, *network.graph.value_info]
    batch = network.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = "batch"
    for noted in (network.graph, *network.graph.node, *values, *network.graph.initializer):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")


@contextlib.contextmanager
def _explained(form: str) -> Iterator[None]:
    """What the recorders of torch say of a network that they cannot record, as one line."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # they have no common type
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240)
        raise UserError(f"the network cannot be written as {form} ({reason}): leave {form} out of --to") from None
    finally:
        logging.disable(level)
