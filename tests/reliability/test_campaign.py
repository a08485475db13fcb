"""A campaign against the command line, another one each time: all that it draws follows from a seed that failures show.

Each case is a process. It ends within `PATIENCE` seconds with exit code 0 or 2 and no traceback, nothing outside of the
attacked folder has changed, and what it computes is what it computes undisturbed, or refused.
`TESSELLA_CAMPAIGN=SEED` repeats a campaign, `TESSELLA_CAMPAIGN_CASES=N` sets the number of cases of each kind.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tessella.recipes import recipe
from tessella.run.checkpoints import load, save
from tests.newest import newest
from tests.reliability.program import METHODS, Program, pretrain_words
from tests.reliability.test_hostile_links import PLANTS, make_all, outside_of, plant, snapshot
from tests.reliability.test_special_files import SPECIAL
from tests.test_ranges import VALUES, numbers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEED = int(os.environ.get("TESSELLA_CAMPAIGN", secrets.randbelow(10**6)))
CASES = int(os.environ.get("TESSELLA_CAMPAIGN_CASES", 30))
PATIENCE = 60.0  # seconds; a case takes two on an idle core
JUDGED = "--train digits::test --test digits::test --device cpu --image-size 16 --protocols knn"
EMBED = "embed {folder} digits::test --out {new}/x.npy --device cpu"
CHECKED = {"evaluate": f"evaluate {{folder}} --out {{new}}/judged {JUDGED}", "embed": EMBED}
OF_A_RUN = {"resume": "resume {folder} --max-steps None", "report": "report {folder}", **CHECKED}
READERS: dict[str, dict[str, str]] = {  # folder -> commands that read it
    "begun": OF_A_RUN,
    "judged": {
        "again": f"evaluate {{made}}/begun --out {{folder}} --baseline {JUDGED}",
        "compare": "compare {folder} --out {new}/page.html",
    },
    "packed": {"scan": "scan {folder}", "embed": "embed {made}/begun {folder} --out {new}/x.npy --device cpu"},
    "imported": CHECKED,
    "cache": {"embed": "embed {made}/begun {made}/photos --out {new}/x.npy --device cpu"},
}
OTHER_VALUES: list[Any] = [
    None, True, -1, 0, 1, 10**9, 10**30, -(10**30), 1e308, 0.5, math.nan, math.inf, "", "word", "../../x",
    "\x1b[31m\u202e",
    "\ud800", "9" * 5000, [], {}, [None], [[1]], {"a": {}}, {"name": ["swav"]}, [0] * 1000,
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of every kind; photographs are files, so that their index lies in the cache."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSELLA_CACHE", str(folder / "cache"))
        make_all(folder)
        (folder / "photos").mkdir()
        for i, image in enumerate(digit_pictures(24)):
            image.save(folder / "photos" / f"{i}.png")
        for words in ("import {made}/official.pth --out {made}/imported", "pack digits::test --out {made}/packed"):
            assert attempt(words, folder, folder, folder / "said", folder / "cache") == 0
        assert attempt(READERS["cache"]["embed"], folder, folder, folder / "said", folder / "cache") == 0
    return folder


def digit_pictures(count: int) -> Iterator[Any]:
    from PIL import Image
    from sklearn.datasets import load_digits

    yield from (Image.fromarray((image * 15).astype("uint8")) for image in load_digits().images[:count])


def attempt(words: str, made: Path, folder: Path, new: Path, cache: Path | None = None) -> int:
    """Exit code of a command, which has ended in time and without a traceback."""
    new.mkdir(exist_ok=True)
    places = {name: shlex.quote(str(path)) for name, path in {"made": made, "folder": folder, "new": new}.items()}
    place = {"TESSELLA_CACHE": str(cache or made / "cache")}
    return ends_well(shlex.split(words.format(**places)), new, **place)


def ends_well(words: list[str], new: Path, **environment: str) -> int:
    output = new / f"said-{time.monotonic_ns()}"
    program = Program(words, output, **environment)
    code = program.wait(PATIENCE)
    assert code in (0, 2) and "Traceback" not in program.said(), f"{' '.join(words)}: {code}: {program.said()}"
    assert program.said().strip() or code == 0, words
    return code


class Campaign:
    """The random choices of one test, and what they were, for the one who reads a failure."""

    def __init__(self, name: str, tmp_path: Path, made: Path) -> None:
        self.draw, self.tmp, self.made, self.number = random.Random(f"{SEED} {name}"), tmp_path, made, 0
        self.failures: list[str] = []

    def case(self, what: str, folder: Path, words: str, outside: Path, cache: Path | None = None) -> tuple[int, Path]:
        """Run a command on a prepared folder; its exit code (-1: it failed the campaign), and its results' folder."""
        new = self.tmp / f"new{self.number}-{len(list(self.tmp.glob(f'new{self.number}-*')))}"
        before = snapshot(outside)
        code = -1
        try:
            code = attempt(words, self.made, folder, new, cache)
        except AssertionError as error:
            self.failures.append(f"{what}: {str(error)[-1500:]}")
        if snapshot(outside) != before:
            self.failures.append(f"{what}: {words} has changed what lies outside")
        return code, new

    def fresh(self, kind: str) -> Path:
        self.number += 1
        return Path(shutil.copytree(self.made / kind, self.tmp / str(self.number) / kind, symlinks=True))

    def check(self) -> None:
        text = "\n\n".join(self.failures)
        assert not self.failures, f"TESSELLA_CAMPAIGN={SEED}: {len(self.failures)} of {self.number} cases\n{text}"


@pytest.fixture
def campaign(request: pytest.FixtureRequest, tmp_path: Path, made: Path) -> Iterator[Campaign]:
    one = Campaign(request.node.name, tmp_path, made)
    yield one
    one.check()


def commands_on(kind: str, draw: random.Random) -> list[str]:
    words = list(READERS[kind].values())
    return draw.sample(words, min(2, len(words)))


def paths_in(folder: Path, draw: random.Random, of: Callable[[Path], bool] = lambda path: True) -> Path:
    return draw.choice(sorted(path for path in folder.rglob("*") if of(path) and "numba" not in path.parts))


@pytest.mark.parametrize("kind", READERS)
def test_links_pipes_and_devices_in_any_folder(kind: str, campaign: Campaign):
    plants = {**{name: make for name, make in PLANTS.items()}, **{f.__name__: f for f in SPECIAL}}
    for _ in range(CASES):
        folder, draw = campaign.fresh(kind), campaign.draw
        outside = outside_of(folder.parent)
        planted = []
        for _ in range(draw.choice([1, 1, 2, 4])):
            path = paths_in(folder, draw, lambda path: not path.is_symlink() or path.exists())
            if draw.random() < 0.3:
                path = path.parent / draw.choice(["lock", "metrics.jsonl", "config.yaml", "evaluation.lock"])
            title = draw.choice(sorted(plants))
            if title in PLANTS:
                plant(path, title, outside)
            elif path.is_file() or path.is_symlink() or not path.exists():
                path.unlink(missing_ok=True)
                plants[title](path)  # type: ignore[call-arg]
            planted.append(f"{path.relative_to(folder)} is a {title}")
        for words in commands_on(kind, draw):
            campaign.case("; ".join(planted), folder, words, outside, folder if kind == "cache" else None)


def nodes(tree: Any, place: tuple = ()) -> Iterator[tuple]:
    yield place
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from nodes(value, (*place, key))


def changed_tree(tree: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy with another value, or none, in one place."""
    tree, place = copy.deepcopy(tree), draw.choice(list(nodes(tree)))
    value = draw.choice(OTHER_VALUES)
    if not place:
        return value, f"all is {value!r:.40}"
    *parents, last = place
    part = tree
    for parent in parents:
        part = part[parent]
    if draw.random() < 0.2:
        del part[last]
        return tree, f"{place} is missing"
    part[last] = value
    return tree, f"{place} is {value!r:.40}"


def is_text(path: Path) -> bool:
    return path.suffix in (".json", ".yaml", ".jsonl") and path.is_file()


@pytest.mark.parametrize("kind", ["begun", "judged", "packed", "imported"])  # the cache's have a hash
def test_texts_with_values_of_other_types(kind: str, campaign: Campaign):
    for _ in range(CASES):
        folder, draw = campaign.fresh(kind), campaign.draw
        path = paths_in(folder, draw, is_text)
        text = path.read_text()
        if path.suffix == ".jsonl":
            lines = text.splitlines()
            row = draw.randrange(len(lines))
            tree, what = changed_tree(json.loads(lines[row]), draw)
            text = "\n".join([*lines[:row], json.dumps(tree), *lines[row + 1 :]])
        elif path.suffix == ".yaml":
            tree, what = changed_tree(yaml.safe_load(text), draw)
            text = yaml.safe_dump(tree)
        else:
            tree, what = changed_tree(json.loads(text), draw)
            text = json.dumps(tree)
        path.write_text(text, errors="replace")
        outside = outside_of(folder.parent)
        for words in commands_on(kind, draw):
            campaign.case(f"{path.relative_to(folder)}: {what}", folder, words, outside)


@pytest.mark.parametrize("kind", READERS)
def test_damaged_bytes_are_noticed_or_change_nothing(kind: str, campaign: Campaign):
    words = dict(READERS[kind])
    computed = {"resume": "backbone.safetensors", "embed": "new/x.npy"}
    title = "resume" if kind == "begun" else "embed" if "embed" in words else next(iter(words))
    whole = result_of(campaign, campaign.fresh(kind), title, words[title], computed.get(title))
    for _ in range(CASES):
        folder, draw = campaign.fresh(kind), campaign.draw
        if kind == "begun":
            path = paths_in(folder / "checkpoints", draw, Path.is_file)
        else:
            path = paths_in(folder, draw, lambda path: path.is_file() and path.stat().st_size > 0)
        data = bytearray(path.read_bytes())
        how = draw.choice(["flip", "flip", "cut", "empty", "missing", "zeros", "other"])
        at = draw.randrange(len(data))
        if how == "flip":
            data[at] ^= 1 << draw.randrange(8)
        elif how == "zeros":
            data[at : at + 64] = bytes(64)
        elif how == "other":
            data = bytearray(paths_in(folder, draw, Path.is_file).read_bytes())
        path.write_bytes(data[:at] if how == "cut" else b"" if how == "empty" else data)
        if how == "missing":
            path.unlink()
        what = f"{path.relative_to(folder)}: {how} at {at}"
        found = result_of(campaign, folder, title, words[title], computed.get(title), what)
        if found not in (None, whole):
            campaign.failures.append(f"{what}: another result, and nobody was told")


def result_of(
    campaign: Campaign, folder: Path, title: str, words: str, computed: str | None, what: str = "whole"
) -> bytes | None:
    outside = folder.parent / "outside"
    outside.mkdir()
    code, new = campaign.case(what, folder, words, outside, folder if folder.name == "cache" else None)
    if code != 0 or computed is None:
        return None
    return (new / "x.npy" if computed.startswith("new/") else folder / computed).read_bytes()


def changed_tensor(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor | None:
    shape = [*tensor.shape]
    return draw.choice([
        lambda: None,
        lambda: tensor.to(draw.choice([torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8])),
        lambda: tensor.reshape(-1),
        lambda: tensor.reshape(-1)[: draw.randrange(4)],
        lambda: torch.zeros([*shape, 2], dtype=tensor.dtype),
        lambda: torch.zeros([0, *shape], dtype=tensor.dtype),
        lambda: torch.full_like(tensor, -1 if tensor.dtype != torch.bool else 1),
        lambda: torch.full_like(tensor, 1e30 if tensor.is_floating_point() else 100),
        lambda: torch.full_like(tensor, math.nan) if tensor.is_floating_point() else torch.zeros_like(tensor),
    ])()  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_that_fit_their_hashes_and_nothing_else(method: str, campaign: Campaign, tmp_path: Path):
    begun = tmp_path / "whole"
    assert ends_well([*pretrain_words(method, begun), "--max-steps", "2"], tmp_path) == 0
    for number in range(CASES):
        folder, draw = Path(shutil.copytree(begun, tmp_path / f"run{number}")), campaign.draw
        path = newest(folder / "checkpoints")
        assert path is not None
        tensors, state = load(path)
        step = 2
        if draw.random() < 0.6:
            group = draw.choice(sorted(tensors))
            name = draw.choice(sorted(tensors[group]))
            made = changed_tensor(tensors[group].pop(name), draw)
            what = f"{group}.{name}: {None if made is None else (made.dtype, made.shape)}"
            tensors[group] |= {} if made is None else {name: made}
        elif draw.random() < 0.8:
            changed, what = changed_tree(state, draw)
            whole = changed if isinstance(changed, dict) else {}
            state = json.loads(json.dumps(whole), parse_constant=str)  # NaN and infinity as words
        else:
            step = draw.choice([0, 1, 3, 10, 11, 10**9, 10**17])
            state, what = state | {"step": step}, f"step {step}"
        shutil.rmtree(folder / "checkpoints")
        save(folder / "checkpoints", step, tensors, state)
        campaign.number += 1
        (tmp_path / "outside").mkdir(exist_ok=True)
        campaign.case(what, folder, draw.choice(list(OF_A_RUN.values())), tmp_path / "outside")


def flag(place: tuple[str | int, ...]) -> str:
    return "--" + ".".join(map(str, place)).replace("_", "-")


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_a_run(method: str, campaign: Campaign, tmp_path: Path):
    settings = [(place, value) for place, _ in numbers(recipe(f"{method}_cpu"), set()) for value in VALUES]
    (tmp_path / "outside").mkdir()
    for place, value in campaign.draw.sample(settings, min(2 * CASES, len(settings))):
        campaign.number += 1
        words = pretrain_words(method, tmp_path / f"run{campaign.number}")
        words = shlex.join([*words, "--max-steps", "2", flag(place), str(value)])
        code, _ = campaign.case(f"{flag(place)} {value}", tmp_path, words, tmp_path / "outside")
        if code == 0 and not math.isfinite(value):
            campaign.failures.append(f"{flag(place)} {value} is accepted")
