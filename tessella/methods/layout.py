"""Names of tensors in official checkpoints, and the settings that follow from their shapes.

A star in a name stands for any part of it, the same part in our name and in the official one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor

from tessella.errors import UserError

OTHER_IMAGES = "about the images of the run that made the file, in its order"  # why a tensor is left out


class OfficialFile(NamedTuple):
    """Tensors under their official names."""

    name: str
    wrapping: str
    tensors: dict[str, Tensor]
    others: dict[str, str]  # what else the file holds -> why it is left out

    def size(self, key: str, dim: int = 0) -> int:
        """The length of one dimension of a tensor.

        Raises:
            UserError: the file has no such tensor, or it has fewer dimensions.
        """
        if key not in self.tensors:
            raise UserError(f"{self.name} lacks {key}, which its layout asks for")
        if self.tensors[key].dim() <= dim:
            raise UserError(f"{self.name}: {key} has shape {tuple(self.tensors[key].shape)}, too few dimensions")
        return self.tensors[key].shape[dim]

    def count(self, pattern: str) -> int:
        """How many keys match."""
        return sum(fnmatchcase(key, pattern) for key in self.tensors)


class Layout(NamedTuple):
    """How a project names its tensors."""

    origin: str  # name of the project, for `tessella import --from`
    sign: str  # a pattern that some key of such a file matches
    names: Mapping[str, str]  # ours -> official; the first that matches counts
    config: Callable[[OfficialFile], tuple[str, Any]]  # title, and the method's config from the shapes (None: network)
    unless: str = ""  # a pattern that a key of another layout matches, whose files have this layout's sign too
    left_out: Mapping[str, str] = {}  # official -> why it is left out
    reset: Mapping[str, str] = {}  # ours -> why the file has none
    transposed: tuple[str, ...] = ()  # ours that are columns there
    unit_rows: tuple[str, ...] = ()  # ours that are scaled to unit rows
    assigns: bool = True  # whether the file holds all that the method needs to assign images to clusters
    # Other files of the project, by a pattern of their keys -> why they cannot be imported, after the file's name.
    refused: Mapping[str, str] = {}

    def fits(self, file: OfficialFile) -> bool:
        """Whether a file has this layout, by its keys."""
        return bool(file.count(self.sign)) and not (self.unless and file.count(self.unless))
