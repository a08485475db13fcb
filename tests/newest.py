"""The checkpoint that a resumed run would use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from tessella.run.checkpoints import load_newest


def newest(folder: Path, on_damage: Callable[[str], object] = warnings.warn) -> Path | None:
    """The newest valid checkpoint in a folder of checkpoints."""
    checkpoint = load_newest(folder, on_damage)
    return checkpoint and checkpoint[0]
