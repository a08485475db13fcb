"""From names of clusters to a list of labelled images, or to folders of them."""

from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tessella import files
from tessella.atlas import names
from tessella.atlas.folder import Atlas
from tessella.data.sources import open_images
from tessella.errors import UserError
from tessella.text import cell, printable


class Labelled(NamedTuple):
    """What `label` has written."""

    labelled: int
    dropped: int
    total: int
    classes: dict[str, int]  # name -> images, most first

    def lines(self) -> list[str]:
        """For people."""
        share = 100 * self.labelled / max(self.total, 1)
        left = self.total - self.labelled - self.dropped
        return [
            f"labelled  {self.labelled:,} of {self.total:,} images ({share:.0f} %), {len(self.classes)} classes",
            *(f"          {count:>7,}  {printable(name)}" for name, count in self.classes.items()),
            f"dropped   {self.dropped:,}",
            f"no label  {left:,}",
        ]


def label(
    path: Path,
    names_file: Path | None,
    out: Path | None,
    folders: Path | None,
    how: Literal["link", "copy"] = "link",
) -> Labelled:
    """Apply names to an atlas.

    Args:
        path: of the atlas.
        names_file: a names.json that the page has saved; it becomes the atlas' own. None: the one of the atlas.
        out: a .csv that is written: path, label, label_from, cluster. What stood there stays unless it is such a file.
        folders: a folder that is made: one folder per class with the images.
        how: symbolic links to the originals, or copies of them.

    Raises:
        UserError: the names belong to another clustering, nothing is named, or a file is in the way.
    """
    atlas = Atlas.open(path)
    atlas.require("table")
    if out is None and folders is None:
        raise UserError("give --out LABELS.csv, or --folders DIR, or both")
    for target in (out, folders):
        if target is not None and target.exists():
            raise UserError(f"{target} exists already: choose another name or remove it")
    if names_file is not None:
        _adopt(atlas, names_file)
    table, found = labels_of(atlas)
    counts: dict[str, int] = {}
    for name in found.label:
        if name:
            counts[name] = counts.get(name, 0) + 1
    if not counts:
        raise UserError(f"nothing in {path} has a name yet: open {path / 'atlas.html'}, name clusters, save names.json")
    if out is not None:
        _write_csv(out, table, found)
    if folders is not None:
        _write_folders(atlas, folders, table, found, how)
    by_count = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return Labelled(sum(counts.values()), int(found.dropped.sum()), len(found.label), by_count)


def labels_of(atlas: Atlas) -> tuple[dict[str, Any], names.Labels]:
    """Key, id and cluster of each image of an atlas, and the label that its names give it.

    Raises:
        UserError: the names belong to another clustering.
    """
    table = atlas.table("key", "id", "cluster")
    revision, events = atlas.events()
    if events and revision != atlas.state.get("revision"):
        raise UserError(_other_revision(atlas.path / "names.json", atlas.path))
    return table, names.resolve(events, table["cluster"], table["id"])


def read_labels(path: Path) -> dict[str, str]:
    """Image -> label, of a .csv with the columns path and label; images without a label are left out.

    Raises:
        UserError: not such a list.
    """
    rows = csv.DictReader(io.StringIO(files.read_text(path, 1 << 30, errors="replace"), newline=""))
    if not {"path", "label"} <= set(rows.fieldnames or ()):
        raise UserError(
            f"{path} lacks the columns path and label; its first line has: {', '.join(rows.fieldnames or ())}"
        )
    return {row["path"]: _plain(row["label"]) for row in rows if row["path"] and row["label"]}


def _plain(text: str) -> str:
    """The inverse of `cell`."""
    return text[1:] if text.startswith("'") and cell(text[1:]) == text else text


def _adopt(atlas: Atlas, names_file: Path) -> None:
    """Make a names.json the atlas' own; one that it had stays beside it."""
    revision, events = names.read_names(names_file)
    if revision != atlas.state.get("revision"):
        raise UserError(_other_revision(names_file, atlas.path))
    own = atlas.path / "names.json"
    if own.exists() and own.resolve() != names_file.resolve():
        before = atlas.events()
        if before[1] and before[1] != events:
            document = names.names_document(atlas.state["id"], *before)
            files.write_json(atlas.path / "names-before.json", document, inside=atlas.path)
    document = names.names_document(atlas.state["id"], revision, events)
    files.write_json(own, document, inside=atlas.path)


def _other_revision(names_file: Path, atlas: Path) -> str:
    return (
        f"{names_file} names clusters of another clustering than that of {atlas}: open {atlas / 'atlas.html'} and save "
        "its names again"
    )


def _write_csv(out: Path, table: dict[str, Any], found: names.Labels) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "label_from", "cluster"])
    for key, name, source, path in zip(table["key"], found.label, found.source, found.path, strict=True):
        if name:
            writer.writerow([cell(key), cell(name), source, path])
    files.make_folder(out.parent.resolve())
    files.write_text(out, text.getvalue())


def _write_folders(
    atlas: Atlas, folders: Path, table: dict[str, Any], found: names.Labels, how: Literal["link", "copy"]
) -> None:
    """One folder per class, made whole or not at all."""
    data = str(atlas.state["data"])
    images = open_images(data, download=False)
    rows = {int(number): row for row, number in enumerate(images.ids)}
    source = Path(data)
    files.make_folder(folders.parent.resolve())
    with files.new_folder(folders) as made:
        taken: set[Path] = set()
        for number, name in zip(table["id"].tolist(), found.label, strict=True):
            if not name or number not in rows:
                continue
            key = images.key(rows[number])
            target = _free(made / _folder_name(name) / Path(key).name, taken)
            target.parent.mkdir(exist_ok=True)
            original = (source / key).resolve()
            if not original.is_file():
                raise UserError(f"{data} is no folder of image files: --folders works for those; give --out instead")
            if how == "link":
                target.symlink_to(original)
            else:
                shutil.copyfile(original, target)


def _folder_name(label: str) -> str:
    """A label as the name of one folder, whatever is in it."""
    name = "".join("_" if char in '/\\:*?"<>|' or ord(char) < 32 else char for char in label).strip(". ")
    return name[:100] or "_"


def _free(path: Path, taken: set[Path]) -> Path:
    """The path, or one with a number if another image has it; names are compared as case-blind systems do."""
    stem, number = path, 1
    while Path(os.fspath(path).lower()) in taken:
        number += 1
        path = stem.with_name(f"{stem.stem}-{number}{stem.suffix}")
    taken.add(Path(os.fspath(path).lower()))
    return path
