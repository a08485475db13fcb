"""The examples run, and learn something."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


def test_a_network_of_one_s_own_is_trained_by_a_method_and_evaluated():
    words = ["digits::train", "digits::test", "--epochs", "2", "--size", "16"]
    [record] = load("own_backbone").main(words)
    assert record["backbone"] == "MyNetwork" and record["scores"]["top1"] > 0.5  # guessing has 0.1


def test_the_notebook_runs_and_its_network_beats_a_random_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    for cell in json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            body = ast.parse("".join(cell["source"])).body
            value = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "notebook", "exec"), names)
            if value is not None:
                shown.append(eval(compile(ast.Expression(value.value), "notebook", "eval"), names))
    _, run, records, montage = shown
    assert "SwAV" in run._repr_html_() and "complete after" in run._repr_html_()
    assert (run / "config.yaml")._repr_html_() is None  # no run, but a file of one
    assert "random init" in records._repr_html_()
    assert records[0]["scores"]["top1"] > records[0]["baseline"]["scores"]["top1"]
    assert montage.size == (6 * 64, 4 * 64)
