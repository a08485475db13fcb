"""README.md of an export: what the weights are, how to open them and how good they are, in the hub's format.

It holds no name of a file, folder or machine: data sets are given by their hashes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tessella import files
from tessella.atlas.classifier import FACTS, is_classifier
from tessella.data.transform import EvalTransform
from tessella.evaluation.records import Record
from tessella.formats.check import LIMIT
from tessella.formats.libraries import converts
from tessella.formats.model import Model
from tessella.formats.table import Format
from tessella.methods import METHODS
from tessella.report.evaluation import network_of, tables_of
from tessella.report.grid import Grid, markdown
from tessella.run.backbone_file import tensors_sha256
from tessella.run.config import load_config, to_dict
from tessella.run.images_seen import known_images
from tessella.weights.imported import is_imported, read_imported

_FACTS_LIMIT = 1 << 26  # bytes of classifier.json


class Origin(NamedTuple):
    """Where weights come from, in words."""

    title: str
    rows: list[tuple[str, str]]  # a table of facts
    own: bool  # whether Tessella trained them


def origin_of(source: Path | None, model: Model) -> Origin:
    """What is known of the weights.

    Args:
        source: a run or imported weights; None, or any other path, for weights of which nothing is known.
        model: their network.
    """
    network = network_of({"network": to_dict(model.config)})
    if source is not None and (source / "config.yaml").is_file():
        config = load_config(source / "config.yaml")
        method = METHODS[config.method.name].title
        rows = [
            ("method", method),
            ("recipe", f"{config.recipe or 'own settings'}, {config.epochs} epochs, batches of {config.batch_size}"),
            ("labels", "none were read"),
        ]
        if config.init_from:
            rows.append(("start", "weights of an earlier training"))
        fingerprint, count = known_images(source)
        if fingerprint:
            rows.append(("images", f"{count:,}, fingerprint {fingerprint}"))
        return Origin(f"{network}, trained with {method}", rows, own=True)
    if source is not None and is_classifier(source):
        return Origin(f"Classifier on {network}", _measured(source), own=True)
    if source is not None and is_imported(source):
        return Origin(f"{network}, from {read_imported(source).title}", [], own=False)
    return Origin(network, [], own=False)


def _measured(classifier: Path) -> list[tuple[str, str]]:
    """What `tessella classify` found out about a classifier by cross-validation."""
    facts = files.read_json(classifier / FACTS, _FACTS_LIMIT)
    words = {
        "accuracy": "cross-validated accuracy",
        "majority": "accuracy of always naming the largest class",
        "calibration_error": "calibration error",
        "answered": "images that it does not abstain on",
        "answered_accuracy": "accuracy on these",
    }
    known = facts if isinstance(facts, dict) else {}
    rows = [(words[name], f"{100 * known[name]:.1f} %") for name in words if isinstance(known.get(name), float)]
    return [("labelled images", str(known.get("labelled", "?"))), *rows]


def differences_grid(differences: Mapping[str, Mapping[str, float]]) -> Grid:
    """Format -> tool -> largest relative difference, as a table."""
    rows = [(name, tool, f"{value:.1e}") for name, tools in differences.items() for tool, value in tools.items()]
    return Grid("", ("format", "loaded by", "largest relative difference"), rows)


def card(
    model: Model,
    origin: Origin,
    formats: Mapping[str, Format],
    differences: Mapping[str, Mapping[str, float]],
    images: str,
    records: Sequence[Record],
    versions: Mapping[str, str],
) -> str:
    """The text of README.md.

    Args:
        model: what was exported.
        origin: where its weights come from.
        formats: that were written.
        differences: format -> tool -> largest relative difference.
        images: what it was measured on, in words.
        records: of an evaluation.json; those of other weights are left out.
        versions: of the programs that wrote and checked it.
    """
    sha256 = tensors_sha256(model.backbone.state_dict())
    rows = [
        *origin.rows,
        ("network", f"{network_of({'network': to_dict(model.config)})}: {model.backbone.feature_dim} features"),
        ("weights", f"sha256 {sha256}"),
        ("written by", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    if model.head is not None:
        rows.append(("classes", ", ".join(model.head.classes)))
    parts = [
        _front_matter(model, formats, origin),
        f"# {markdown(origin.title)}",
        _WHAT if model.head is None else _WHAT_CLASSIFIER.format(**model.head._asdict()),
        "## Open it",
        _opened(model, formats),
        "## Images",
        _images(model.transform),
        "## Facts",
        "\n".join(Grid("", ("fact", "value"), rows).markdown()),
        "## Checked",
        _CHECKED.format(images=images, limit=LIMIT),
        "\n".join(differences_grid(differences).markdown()),
        *_figures([record for record in records if record.get("weights") == sha256]),
        *_converting(model, formats),
        "## Intended use",
        _USE,
        "## Licence",
        _OWN if origin.own else _OTHERS,
    ]
    return "\n\n".join(parts) + "\n"


_WHAT = "A network that makes a vector of features of an image, for search, clustering and small classifiers on top."
_WHAT_CLASSIFIER = (
    "A classifier of images. Its probabilities are calibrated (temperature {temperature:g}); where the largest is "
    "below {abstain_below:g}, it abstains: `decision` is -1 in the graph formats."
)
_CHECKED = (
    "Each format was loaded back by the tool that it is for, and compared with the original network on {images}. The "
    "difference of an image is the largest absolute difference over the largest absolute value of the original's; at "
    "most {limit:g} is allowed. The figures are also in `check.json`."
)
_USE = (
    "Research and products of whoever trained it. It was not examined for bias or safety; features of images unlike "
    "those that it was trained on may say little. Evaluate it on images of your own before you depend on it."
)
_OWN = (
    "The weights belong to whoever trained them. Choose a licence, and write it above in place of `other`. The program "
    "that trained them, Tessella, is under Apache-2.0 and claims nothing of its results."
)
_OTHERS = (
    "Tessella did not train these weights. If others published them, their licence holds: write it above in place of "
    "`other`."
)
_CONVERTED = """\
## detectron2 and OpenMMLab

`python convert_resnet.py detectron2 INPUT OUTPUT.pth`, or `openmmlab`, writes the weights in the key layout of these
libraries; INPUT is `torchvision.pth` or `backbone.safetensors`.

detectron2: `MODEL.WEIGHTS: OUTPUT.pth`, `MODEL.PIXEL_MEAN: {mean}`, `MODEL.PIXEL_STD: {std}`,
`MODEL.RESNETS.STRIDE_IN_1X1: False`, `INPUT.FORMAT: "RGB"`.

OpenMMLab: `init_cfg=dict(type="Pretrained", checkpoint="OUTPUT.pth", prefix="backbone.")`, `style="pytorch"`, and in
the data preprocessor `mean={mean}`, `std={std}`, `bgr_to_rgb=True`."""


def _front_matter(model: Model, formats: Mapping[str, Format], origin: Origin) -> str:
    task = "image-feature-extraction" if model.head is None else "image-classification"
    library = "timm" if "hub" in formats else "onnx" if set(formats) == {"onnx"} else "pytorch"
    tags = [task, "tessella", *(["self-supervised-learning"] if origin.own else []), *formats]
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "license: other",
        "tags:",
        *(f"- {tag}" for tag in tags if tag not in ("hub", library)),
        "---",
    ]
    return "\n".join(lines)


def _opened(model: Model, formats: Mapping[str, Format]) -> str:
    lines = "\n\n".join(inspect.cleandoc(form.opens) for form in formats.values())
    return f"```python\n{lines.replace('NETWORK', model.config.name)}\n```"


def _images(transform: EvalTransform) -> str:
    fit = {
        "shorter side": f"the shorter side resized to {transform.resize} pixels",
        "both sides": f"both sides resized to {transform.resize} pixels",
        "shorter side, then both": f"the shorter side resized to {transform.resize} pixels, both to {transform.size}",
    }[transform.fit]
    return (
        f"RGB: {fit} ({transform.interpolation}, antialiased), the middle {transform.size} x {transform.size} pixels, "
        f"values divided by 255, mean {list(transform.mean)} subtracted, divided by std {list(transform.std)}. "
        "`model-uint8.onnx` does all of this itself, to the last bit. Resizing by other libraries differs from it by "
        "one or two levels of 255 in some pixels."
    )


def _converting(model: Model, formats: Mapping[str, Format]) -> list[str]:
    if not converts(model) or not formats.keys() & {"torchvision", "safetensors"}:
        return []
    mean, std = ([round(255 * value, 3) for value in values] for values in (model.transform.mean, model.transform.std))
    return [_CONVERTED.format(mean=mean, std=std)]


def _figures(records: list[Record]) -> list[str]:
    """Tables of what was measured with these weights, without what may name data, classes or other runs."""
    parts = []
    for table in tables_of(map(_without_names, records)):
        hashes = " ".join(f"{name}: {value}." for name, value in table.details if name.endswith("images"))
        parts += ["\n".join(table.grid().markdown()), markdown(f"Per cent. {table.facts} {hashes}")]
    return ["## Figures", *parts] if parts else []


def _without_names(record: Record) -> Record:
    other = record.get("supervised")
    named = {"supervised": other | {"name": "another network"}} if isinstance(other, dict) else {}
    return record | {"warnings": []} | named
