"""Tessella learns visual representations from unlabelled images by clustering.

    import tessella

    run = tessella.pretrain("photos/", recipe="swav_cpu", out="runs/first")
    backbone = tessella.load_backbone(run)

`import tessella` is light: torch is imported with the first function that needs it. See `tessella.api`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tessella.errors import UserError

if TYPE_CHECKING:
    from tessella import recipes
    from tessella.api import (
        assign,
        bench,
        classify,
        compare,
        demo,
        duplicates,
        embed,
        evaluate,
        explore,
        export,
        import_weights,
        label,
        load_backbone,
        pack,
        pretrain,
        resume,
        scan,
        select,
        serve,
        write_report,
    )

    __version__: str

_FUNCTIONS = (
    *("assign", "bench", "classify", "compare", "demo", "duplicates", "embed", "evaluate", "explore", "export"),
    *("import_weights", "label", "load_backbone", "pack", "pretrain", "resume", "scan", "select"),
    *("serve", "write_report"),
)

__all__ = [
    "UserError",
    "__version__",
    "assign",
    "bench",
    "classify",
    "compare",
    "demo",
    "duplicates",
    "embed",
    "evaluate",
    "explore",
    "export",
    "import_weights",
    "label",
    "load_backbone",
    "pack",
    "pretrain",
    "recipes",
    "resume",
    "scan",
    "select",
    "serve",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tessella")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("tessella.api"), name)
    if name == "recipes":
        return importlib.import_module("tessella.recipes")
    raise AttributeError(f"module 'tessella' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
