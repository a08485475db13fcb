"""The examples run, and learn something."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_swav_in_a_loop_of_one_s_own_learns(tmp_path: Path):
    losses = load("own_loop").main(
        ["digits::test", "--epochs", "6", "--size", "16", "--batch-size", "64", "--out", str(tmp_path / "net.pth")]
    )
    assert losses[-1] < losses[0] and (tmp_path / "net.pth").exists()
