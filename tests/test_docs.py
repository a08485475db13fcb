"""The documents say what is so: links lead somewhere, commands parse, Python runs, pictures can be drawn by anybody."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import tessella
from tessella import cli
from tessella.methods import METHODS
from tessella.protocols import default_config, named_settings, protocol_of
from tessella.recipes import RECIPES, recipe
from tessella.run.config import RunConfig, to_yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SEPARATORS = {"&&", "||", "|", ";"}


def prose(text: str) -> str:
    return _FENCE.sub("", text)


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in _FENCE.findall(text) if found == language]


def inline_codes(text: str) -> list[str]:
    return [" ".join(code.split()) for code in _INLINE.findall(prose(text))]


# --- links --------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in _LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: str):
    assert broken_links(ROOT / page, PAGES[page]) == []


def test_a_link_to_nothing_is_found(tmp_path: Path):
    text = "# One heading\n\n[a](#one-heading) [b](#another) [c](missing.md) [d](https://example.org)\n"
    (tmp_path / "page.md").write_text(text)
    assert broken_links(tmp_path / "page.md", text) == ["#another", "missing.md"]


# --- commands -----------------------------------------------------------------------------------------------


def commands(code: str) -> list[list[str]]:
    """The words behind `tessella` of each command line of a block or an inline code."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        if "tessella" not in line:
            continue
        line = re.sub(r"( \.\.\.)?\]|\[", " ", line)  # an option in brackets may be given several times
        words, command = shlex.split(line, comments=True), []
        for word in [*words, ";"]:
            if word not in _SEPARATORS:
                command.append(word)
                continue
            if command[:1] == ["tessella"]:
                found.append(command[1:])
            elif "-m" in command and command[command.index("-m") + 1] == "tessella":
                found.append(command[command.index("-m") + 2 :])
            command = []
    return found


def all_commands() -> list[tuple[str, str]]:
    """(page, command) of every command line in a block, and of every inline code that is more than a command's name.

    One with three dots is not complete, so it cannot be parsed. The debugger's commands are documents too.
    """
    found = {}
    for page, text in PAGES.items():
        in_blocks = [words for block in blocks(text, "") for words in commands(block)]
        in_lines = [words for code in inline_codes(text) for words in commands(code)]
        for words in in_blocks + [words for words in in_lines if len(words) > 1]:
            if "..." not in words:
                found[shlex.join(words)] = page
    for configuration in json.loads((ROOT / ".vscode" / "launch.json").read_text())["configurations"]:
        if configuration["module"] == "tessella":
            found[shlex.join(configuration["args"])] = ".vscode/launch.json"
    return [(page, command) for command, page in found.items()]


class Parsed(Exception):
    """The words are understood; nothing is run."""


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parses a command as `tessella` does, without running it."""
    (tmp_path / "config.yaml").write_text(to_yaml(dataclasses.replace(recipe("swav_cpu"), data="photos")))
    real = cli._parse

    def stop(*args: Any, **options: Any) -> None:
        raise Parsed(real(*args, **options))

    monkeypatch.setattr(cli, "_parse", stop)

    def run(words: list[str]) -> None:
        name, *rest = [{"RECIPE": "swav_cpu", "N": "1", "SEED": "1"}.get(word, word) for word in words]
        if name == "resume" and rest[0] not in ("-h", "--help"):
            rest[0] = str(tmp_path)
        with pytest.raises((Parsed, SystemExit)):
            cli.COMMANDS[name].run(rest)

    return run


@pytest.mark.parametrize(("page", "command"), all_commands())
def test_every_command_line_is_one_that_the_program_understands(page: str, command: str, parse, capsys):
    words = shlex.split(command)
    if words[0] not in ("--help", "--version"):
        parse(words)


@pytest.mark.parametrize("command", ["scan photos/ --headers", "pretrain swav_cpuu --data a --out b", "embed only-one"])
def test_a_command_line_that_is_wrong_is_found(command: str, parse):
    with pytest.raises(cli.UserError):
        parse(shlex.split(command))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_named_exists(page: str):
    named = {words[0] for code in inline_codes(PAGES[page]) for words in commands(code) if words}
    assert named <= {*cli.COMMANDS, "COMMAND", "--help", "--version"}


# --- Python, files, settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_python_compiles(page: str):
    for block in blocks(PAGES[page], "python"):
        ast.parse(block)


def tiny() -> RunConfig:
    config = recipe("swav_cpu")
    groups = tuple(dataclasses.replace(group, size=16) for group in config.method.views.groups)
    method = dataclasses.replace(
        config.method,
        views=dataclasses.replace(config.method.views, groups=groups),
        prototypes=4,
        hidden_dim=8,
        embedding_dim=4,
        queue_length=0,
    )
    backbone = dataclasses.replace(config.backbone, name="resnet10", width=4)
    return dataclasses.replace(config, method=method, backbone=backbone, batch_size=4, max_steps=1, device="cpu")


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    smaller = tiny()
    monkeypatch.setitem(RECIPES.loaded, "swav_cpu", lambda: smaller)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(f"photos/{number}.png")
    names: dict[str, Any] = {"image": Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))}
    (code,) = blocks(PAGES["README.md"], "python")
    exec(compile(code, "README.md", "exec"), names)
    assert names["features"].shape == (1, names["backbone"].feature_dim)
    assert torch.isfinite(names["features"]).all()


NOT_OURS = {"json.py", "numpy.py"}  # what an attacker calls a file
ENTRY_POINTS = {"tessella.sources", "tessella.backbones"}  # groups that are no modules
FOLDERS = [
    ROOT,
    ROOT / "tessella",
    ROOT / "tessella" / "formats",
    ROOT / "tests",
    ROOT / "tests" / "reliability",
    ROOT / "benchmarks",
]


@pytest.mark.parametrize("page", PAGES)
def test_every_source_file_that_is_named_exists(page: str):
    named = {code for code in inline_codes(PAGES[page]) if re.fullmatch(r"[\w/]+\.py", code)} - NOT_OURS
    assert [name for name in sorted(named) if not any((folder / name).exists() for folder in FOLDERS)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_dotted_name_of_the_package_exists(page: str):
    for code in inline_codes(PAGES[page]):
        if re.fullmatch(r"tessella(\.\w+)+", code) and code not in ENTRY_POINTS:
            module, _, name = code.rpartition(".")
            try:
                importlib.import_module(code)
            except ImportError:
                assert hasattr(importlib.import_module(module), name), code


def test_the_readme_names_the_function_of_every_command():
    assert {f"tessella.{name}" for name in tessella._FUNCTIONS} - {"tessella.load_backbone"} <= set(
        inline_codes(PAGES["README.md"])
    )


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_drawing_of_the_structure_is_the_import_contract(page: str):
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [layer.replace("tessella.", "") for layer in contract["layers"]]
    (drawn,) = [block for block in blocks(PAGES[page], "") if block.startswith("cli ")]
    lines = [line for line in drawn.splitlines() if not line.startswith(" ")]
    assert [line.split("  ")[0] for line in lines] == layers


@pytest.mark.parametrize("name", named_settings())
def test_every_protocol_is_on_the_page_of_evaluations(name: str):
    codes = inline_codes(PAGES["docs/evaluation.md"])
    starts = [0] + [i for i, letter in enumerate(name) if letter == "-"]  # `finetune-swav-1`, `-10`; `small`
    plugin = protocol_of(default_config(name)).function.__module__.partition(".")[0] != "tessella"
    assert plugin or any(name[start:] in codes or name[start:].lstrip("-") in codes for start in starts)


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_on_a_method_s_page_is_a_field(method: str):
    page = PAGES.get(f"docs/methods/{method}.md")
    if page is None:  # of a package that is installed here
        return
    fields = {field.name for field in dataclasses.fields(METHODS[method].Config)}
    named = set(re.findall(r"`(?:--)?method\.(\w+)", page))
    assert {name.replace("-", "_") for name in named} <= fields


# --- pictures -----------------------------------------------------------------------------------------------

PICTURES = ["coke", "jigclu", "mejigclu", "smog", "swav"]


@pytest.mark.parametrize("method", PICTURES)
def test_every_method_page_shows_its_picture(method: str):
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (DOCS / "methods" / f"{method}.md").read_text())
    path = DOCS / "methods" / picture
    assert path.stat().st_size < 150_000
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_every_photo_has_a_licence():
    named = (DOCS / "pictures" / "LICENCES.md").read_text()
    assert all(f"photos/{photo.name}" in named for photo in (DOCS / "pictures" / "photos").iterdir())


def test_pictures_are_drawn_from_any_folder_of_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "photos").mkdir()
    for number, shape in enumerate([(61, 80, 3), (90, 47, 3)]):
        noise = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.setattr(sys, "argv", ["draw.py", "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "out")])
    runpy.run_path(str(DOCS / "draw.py"), run_name="__main__")
    for method in PICTURES:
        ElementTree.parse(tmp_path / "out" / f"{method}.svg")
