"""Imported weights on disk: what `tessella import` writes, and how it is read.

FOLDER/import.json           title, origin and settings, and the report on every tensor
FOLDER/backbone.safetensors  the network, in the layout of a run's product
FOLDER/heads.safetensors     the rest of the method: heads, prototypes, centres; absent for a network alone
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tessella import files
from tessella.errors import UserError
from tessella.files import FileError
from tessella.methods import MethodConfig
from tessella.modules.backbone import BackboneConfig
from tessella.run.backbone_file import read_backbone, read_described, write_backbone, write_described
from tessella.run.config import from_dict, to_dict
from tessella.weights.layouts import layouts
from tessella.weights.official import Official, Row, official_transform, read_official

FACTS = "import.json"
FORMAT = 2  # of the folder
_LIMIT = 64 << 20  # bytes of import.json
_BACKBONE = "backbone."


def import_weights(file: Path, out: Path, origin: str = "auto") -> Official:
    """Read an official checkpoint and write it as a folder that every command takes as a backbone.

    Args:
        file: the checkpoint.
        out: missing or empty.
        origin: a project, to accept its layout only.

    Returns:
        The weights and the report.

    Raises:
        UserError: the file cannot be read or does not fit, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: choose another --out")
    if not file.is_file():
        raise UserError(f"{file} is no file: give an official checkpoint (.pth, .pth.tar, .pt, .torch, .safetensors)")
    official = read_official(file, origin)
    net = {k.removeprefix(_BACKBONE): v for k, v in official.tensors.items() if k.startswith(_BACKBONE)}
    heads = {k: v for k, v in official.tensors.items() if not k.startswith(_BACKBONE)}
    facts = {
        "format": FORMAT,
        "file": file.name,
        "sha256": files.sha256(file),
        **{name: to_dict(getattr(official, name)) for name in ("origin", "title", "backbone", "method", "whole")},
        "report": [row._asdict() for row in official.report],
    }
    files.make_folder(out)
    origin_of = {key: facts[key] for key in ("file", "sha256", "title")}
    write_backbone(out / "backbone.safetensors", net, official.backbone, official_transform(official), origin_of)
    if heads:
        write_described(out / "heads.safetensors", heads, {"of": facts["sha256"]})
    files.write_json(out / FACTS, facts)  # last: without it the folder is no import
    return official


def is_imported(folder: Path) -> bool:
    """Whether a folder was written by `import_weights`."""
    return (folder / FACTS).is_file()


def read_imported(folder: Path) -> Official:
    """The inverse of `import_weights`.

    Raises:
        UserError: something in the folder is damaged.
    """
    path = folder / FACTS
    facts = _facts(path)
    backbone = from_dict(BackboneConfig, facts["backbone"], f"{FACTS}: backbone")
    method = None if facts["method"] is None else from_dict(MethodConfig, facts["method"], f"{FACTS}: method")
    product = read_backbone(folder / "backbone.safetensors")
    if product is None or product.backbone != backbone:
        raise UserError(f"{folder / 'backbone.safetensors'} is not the network of {FACTS}. Import the file again")
    tensors = {_BACKBONE + key: value for key, value in product.tensors.items()}
    if method is not None:
        heads, of = read_described(folder / "heads.safetensors")
        if of is None or of.get("of") != facts["sha256"]:
            raise UserError(f"{folder / 'heads.safetensors'} is not of the file of {FACTS}. Import the file again")
        tensors |= heads
    report = tuple(Row(**row) for row in facts["report"])
    return Official(facts["origin"], facts["title"], backbone, method, facts["whole"], tensors, report)


def report_lines(official: Official) -> list[str]:
    """The report for people: a title, then one line per group of tensors."""
    rows = [("in the file", "here", "")]
    for row in official.report:
        texts = [row.what, row.reason] if row.outcome == "matched" else [f"{row.outcome}: {row.reason}", row.what]
        rows.append((row.official or "-", row.ours or "-", "; ".join(filter(None, texts))))
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    table = [f"{theirs:<{left}}  {ours:<{right}}  {text}".rstrip() for theirs, ours, text in rows]
    net = official.backbone
    return [f"{official.title}: {net.name}, width {net.width}, {net.stem} stem", "", *table]


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = files.read_json(path, _LIMIT)
    except FileError as error:
        raise UserError(f"{error}. Import the file again") from None
    if not _is_sound(facts):
        raise UserError(f"{path} is not what this Tessella writes (format {FORMAT}). Import the file again")
    return facts


def _is_sound(facts: Any) -> bool:
    """Whether these can be the facts that `import_weights` wrote."""
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not {"backbone", "method"} <= set(facts):
        return False
    rows = facts.get("report")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == set(Row._fields) for row in rows):
        return False
    texts = [facts.get("title"), facts.get("sha256"), *(text for row in rows for text in row.values())]
    return (
        facts.get("origin") in [layout.origin for layout in layouts()]
        and isinstance(facts.get("whole"), bool)
        and all(isinstance(text, str) for text in texts)
    )
