"""An atlas on disk, and what other commands read of it.

atlas.json           which images and backbone, settings, stages with hashes and times
atlas.html, page/    the page
images.parquet       one row per readable image
clusters.json        the tree; centres.npy: (k, d) of its fine clusters
names.json           what a person has decided
copies.npy           pairs of copies
look/ features/ ...  shards of the stages
backbone.safetensors the network, with its transform
training/            the run, if the network was trained for this atlas
"""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessella import files
from tessella.atlas.names import Event, read_names
from tessella.atlas.shards import Shards, Vectors, read_array
from tessella.errors import UserError
from tessella.weights.resolve import Loaded, resolve_backbone

FORMAT = 1
_STATE = "atlas.json"
_LIMIT = 1 << 26  # bytes of the .json files


class Atlas:
    """The folder of `tessella explore`."""

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        self.path, self.state = path, state

    @classmethod
    def create_or_open(cls, path: Path) -> Atlas:
        """The atlas in a folder that is missing, empty or one.

        Raises:
            UserError: the folder holds something else.
        """
        if (path / _STATE).exists():
            return cls.open(path)
        if path.exists() and (not path.is_dir() or any(name.name != "lock" for name in path.iterdir())):
            raise UserError(f"{path} is there already and is no atlas: give another --out")
        files.make_folder(path)
        return cls(path, {"format": FORMAT, "id": secrets.token_hex(8), "stages": {}})

    @classmethod
    def open(cls, path: Path) -> Atlas:
        """An atlas that exists.

        Raises:
            UserError: there is none, or it is of another version.
        """
        if not (path / _STATE).is_file():
            raise UserError(f"{path} is no atlas: it has no {_STATE}; give the --out of `tessella explore`")
        state = files.read_json(path / _STATE, _LIMIT)
        if not isinstance(state, dict) or not isinstance(state.get("stages"), dict) or state.get("format") != FORMAT:
            raise UserError(f"{path / _STATE} is not of this version of Tessella: explore into another --out")
        return cls(path, state)

    def save(self) -> None:
        """Write what the atlas knows of itself."""
        files.write_json(self.path / _STATE, self.state, inside=self.path)

    def shards(self, name: str, rows: int) -> Shards:
        """The shards of a stage."""
        return Shards(self.path / name, self.path, rows)

    @property
    def count(self) -> int:
        """Readable images."""
        return int(self.state["readable"])

    def require(self, *stages: str) -> None:
        """Check that stages are complete.

        Raises:
            UserError: one is not.
        """
        for stage in stages:
            if "seconds" not in self.state["stages"].get(stage, {}):
                raise UserError(f"{self.path} is not complete ({stage}): run `tessella explore` again, it goes on")

    def vectors(self) -> Vectors:
        """Features of the readable images, in order."""
        return Vectors.of_shards(self.shards("features", self.count))

    def backbone(self) -> Loaded:
        """The network that made the features."""
        return resolve_backbone(str(self.path / "backbone.safetensors"))

    def centres(self) -> NDArray[np.float32]:
        """(k, d) unit rows, of the fine clusters."""
        return np.array(read_array(self.path / "centres.npy", dtype=np.float32))

    def tree(self) -> dict[str, Any]:
        """clusters.json."""
        tree = files.read_json(self.path / "clusters.json", _LIMIT)
        if not isinstance(tree, dict) or not isinstance(tree.get("fine"), list):
            raise UserError(f"{self.path / 'clusters.json'} is damaged: remove it, and run `tessella explore` again")
        return tree

    def table(self, *columns: str) -> dict[str, Any]:
        """Columns of images.parquet as numpy arrays, texts as lists.

        Raises:
            UserError: the atlas is not complete.
        """
        self.require("table")
        return self.read_table(*columns)

    def read_table(self, *columns: str) -> dict[str, Any]:
        """As `table`, also where the file is of an earlier state of the atlas."""
        import pyarrow.parquet as pq

        try:
            with files.open_regular(self.path / "images.parquet") as file:
                table = pq.read_table(file, columns=list(columns))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / 'images.parquet'} cannot be read ({error}): explore again") from None
        return {
            name: column.to_pylist() if column.type == "string" else column.to_numpy()
            for name, column in zip(table.column_names, table.columns, strict=True)
        }

    def events(self) -> tuple[str, list[Event]]:
        """Revision and events of names.json; nothing where there is none."""
        path = self.path / "names.json"
        return read_names(path) if path.exists() else ("", [])


def key_of(*values: Any) -> str:
    """A hash of what a stage's result depends on."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
