"""Write a network in the formats of other libraries, and keep the folder only if what they load is the same network."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tessella import files
from tessella.console import note
from tessella.data.sources import ImageSet
from tessella.errors import UserError
from tessella.evaluation.records import read_records
from tessella.formats.card import card, differences_grid, origin_of
from tessella.formats.check import LIMIT, largest_difference, pictures
from tessella.formats.model import Model
from tessella.formats.table import chosen_formats, require
from tessella.report.grid import Grid
from tessella.run.backbone_file import tensors_sha256
from tessella.text import printable

CHECK, CARD = "check.json", "README.md"
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_PROGRAMS = ("tessella", "torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "safetensors")


class Exported(NamedTuple):
    """What was written, and how far it is from the original."""

    folder: Path
    differences: dict[str, dict[str, float]]  # format -> tool -> largest relative difference
    page: str = ""  # on the hub, if it was pushed

    def grid(self) -> Grid:
        """The differences as a table."""
        return differences_grid(self.differences)


def export(
    model: Model,
    out: Path,
    to: Sequence[str] = (),
    *,
    source: Path | None = None,
    images: ImageSet | None = None,
    push: str | None = None,
) -> Exported:
    """Write a network, load it back with the tools that it is written for, and compare.

    Args:
        model: the network.
        out: missing or empty.
        to: names of formats; none for all that can carry the network.
        source: the run or import that it comes from, which the card describes.
        images: to compare on; None for two photographs that scikit-learn brings.
        push: OWNER/NAME of a repository on the hub to upload the folder to, private if it is new.

    Raises:
        UserError: a format cannot carry the network, a library is missing, a tool computes something else, or `out`
            holds something. Nothing is left under `out` then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: choose another --out")
    if push is not None:
        if not _REPOSITORY.fullmatch(push):
            raise UserError(f"--push {push}: give OWNER/NAME of a repository on the hub")
        require("--push", ["huggingface_hub"])
    formats = chosen_formats(model, to)
    shown = pictures(model.transform, images)
    expected = model.expected(shown.inputs)
    versions = _versions()
    differences: dict[str, dict[str, float]] = {}
    files.make_folder(out.parent)
    with files.new_folder(out.parent.resolve() / out.name) as folder:
        for name, form in formats.items():
            note(f"{name}: writing and comparing")
            form.write(model, folder)
            read = form.read(model, folder)
            differences[name] = {tool: largest_difference(expected, reader(shown)) for tool, reader in read.items()}
            _refuse_other(name, differences[name])
        facts = {
            "images": shown.source,
            "measure": "largest |difference| of an image / largest |value| of the original's output, over all images",
            "limit": LIMIT,
            "differences": differences,
            "weights_sha256": tensors_sha256(model.backbone.state_dict()),
            "files": {path.name: files.sha256(path) for path in sorted(folder.iterdir())},
            "versions": versions,
        }
        files.write_json(folder / CHECK, facts)
        records = read_records(source) if source is not None and source.is_dir() else []
        text = card(model, origin_of(source, model), formats, differences, shown.source, records, versions)
        files.write_text(folder / CARD, text)
    return Exported(out, differences, _push(out, push) if push else "")


def _refuse_other(name: str, found: dict[str, float]) -> None:
    for tool, difference in found.items():
        if not difference <= LIMIT:  # also NaN
            raise UserError(
                f"nothing is written: what {tool} computes from {name} differs from the network by {difference:.1e}, "
                f"and {LIMIT:g} is allowed. Leave {name} out of --to, or report it with the network's name"
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PROGRAMS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _push(folder: Path, repository: str) -> str:
    """Upload a folder with the login of huggingface-hub; the address of its page.

    Raises:
        UserError: there is no login, or the hub refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="tessella")
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of Tessella")
    except Exception as error:  # of the network, the login or the hub: they have no common type
        said = printable(" ".join(str(error).split())[:300])
        raise UserError(
            f"{folder} is written, and could not be uploaded to {repository} ({type(error).__name__}: {said}). Log in "
            "with `hf auth login`, then `hf upload` it"
        ) from None
    return f"{api.endpoint}/{repository}"
