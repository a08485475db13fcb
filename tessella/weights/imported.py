"""Imported weights on disk: what `tessella import` writes, and how it comes back.

FOLDER/import.json           what it is, where it came from, what became of every tensor
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
from tessella.run.config import from_dict, to_dict
from tessella.weights.files import read_file
from tessella.weights.official import Official, Row, read_official

FACTS = "import.json"
FORMAT = 1  # of the folder
_LIMIT = 64 << 20  # bytes of import.json
_BACKBONE = "backbone."


def import_weights(file: Path, out: Path, origin: str = "auto") -> Official:
    """Read an official checkpoint and write it as a folder that every command takes as a backbone.

    Args:
        file: the checkpoint.
        out: missing or empty.
        origin: the project, if only its layout is to be accepted.

    Returns:
        What was read, with the report.

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
    files.write_tensors(out / "backbone.safetensors", net)
    if heads:
        files.write_tensors(out / "heads.safetensors", heads)
    files.write_json(out / FACTS, facts)  # last: with it the folder counts
    return official


def is_imported(folder: Path) -> bool:
    """Whether a folder was written by `import_weights`."""
    return (folder / FACTS).is_file()


def read_imported(folder: Path) -> Official:
    """The inverse of `import_weights`.

    Raises:
        UserError: something in the folder has been damaged.
    """
    facts = _facts(folder / FACTS)
    tensors = {_BACKBONE + k: v for k, v in read_file(folder / "backbone.safetensors").items()}
    method = facts["method"]
    if method is not None:
        tensors |= read_file(folder / "heads.safetensors")
    return Official(
        facts["origin"],
        facts["title"],
        from_dict(BackboneConfig, facts["backbone"], f"{FACTS}: backbone"),
        None if method is None else from_dict(MethodConfig, method, f"{FACTS}: method"),
        facts["whole"],
        tensors,
        tuple(Row(**row) for row in facts["report"]),
    )


def report_lines(official: Official) -> list[str]:
    """The report for people: what it is, then one line per group of tensors."""
    cells = [("in the file", "here", "")]
    for row in official.report:
        said = [row.what, row.reason] if row.outcome == "matched" else [f"{row.outcome}: {row.reason}", row.what]
        cells.append((row.official or "-", row.ours or "-", "; ".join(filter(None, said))))
    left, right = (max(len(row[i]) for row in cells) for i in (0, 1))
    table = [f"{theirs:<{left}}  {ours:<{right}}  {said}".rstrip() for theirs, ours, said in cells]
    net = official.backbone
    return [f"{official.title}: {net.name}, width {net.width}, {net.stem} stem", "", *table]


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = files.read_json(path, _LIMIT)
    except FileError as error:
        raise UserError(f"{error}. Import the file again") from None
    expected = {"format", "origin", "title", "backbone", "method", "whole", "report"}
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not expected <= set(facts):
        raise UserError(f"{path} is not what this Tessella writes (format {FORMAT}). Import the file again")
    return facts
