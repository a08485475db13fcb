"""Folders from elsewhere, in which names that Tessella writes are links, pipes or other names of somebody's files.

What is planted is derived from what a command leaves behind when it works undisturbed, and from the names that it gives
to files on the way: a file that is new in Tessella is covered by itself.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tessella.cli import main
from tessella.data.sources.packs import PACKING
from tessella.run.folder import _BEFORE_STEPS
from tests.reliability.program import pretrain_words
from tests.weights import official_nets as nets

pytestmark = [
    pytest.mark.timeout(120),  # a command that waits for a pipe fails
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of damaged checkpoints that were passed over
]

BEFORE_STEPS = [*sorted(_BEFORE_STEPS), ".saving-config.yaml"]
SECRET = b"somebody else's\n"
JUDGED = "--train digits::test --test digits::test --device cpu --image-size 16 --protocols knn clustering --baseline"
_renamed: list[str] | None = None


class Command(NamedTuple):
    """A command, and how its folder looks before."""

    words: str  # {folder}: the hostile folder; {made}: what is needed for it
    prepare: Callable[[Path, Path], object]  # (made, folder)


def copy_run(made: Path, folder: Path) -> None:
    shutil.copytree(made / "begun", folder)


def copy_evaluation(made: Path, folder: Path) -> None:
    shutil.copytree(made / "judged", folder)


def copy_half_a_pack(made: Path, folder: Path) -> None:
    shutil.copytree(made / "half", folder)


def empty(made: Path, folder: Path) -> None:
    folder.mkdir()


COMMANDS = {
    "resume": Command("resume {folder} --max-steps None", copy_run),
    "report": Command("report {folder}", copy_run),
    "evaluate": Command(f"evaluate {{made}}/begun --out {{folder}} {JUDGED}", empty),
    "evaluate again": Command(f"evaluate {{made}}/begun --out {{folder}} --again {JUDGED}", copy_evaluation),
    "evaluate a run": Command(f"evaluate {{folder}} --out {{made}}/new {JUDGED}", copy_run),
    "compare": Command("compare {folder} {made}/judged --out {folder}/compared.html", copy_evaluation),
    "embed": Command("embed {made}/begun digits::test --out {folder}/x.npy --device cpu", empty),
    "embed a table": Command("embed {made}/begun digits::test --out {folder}/x.parquet --device cpu", empty),
    "pack": Command("pack digits::test --out {folder}/pack", empty),
    "go on packing": Command("pack digits::test --out {folder}", copy_half_a_pack),
    "import": Command("import {made}/official.pth --out {folder}/imported", empty),
}


def run(words: str, made: Path, folder: Path) -> int:
    return main(shlex.split(words.format(made=shlex.quote(str(made)), folder=shlex.quote(str(folder)))))


def _note_renames(event: str, arguments: tuple) -> None:
    if event == "os.rename" and _renamed is not None:
        _renamed.append(os.fsdecode(arguments[1]).rpartition("/")[2])


@contextmanager
def renames() -> Iterator[list[str]]:
    """Names that files get meanwhile."""
    global _renamed
    if not getattr(sys, "_tessella_renames", False):
        sys.addaudithook(_note_renames)
        sys._tessella_renames = True  # type: ignore[attr-defined]
    _renamed = []
    try:
        yield _renamed
    finally:
        _renamed = None


def make_all(folder: Path) -> None:
    """What the commands need, below a folder."""
    assert main([*pretrain_words("swav", folder / "begun"), "--max-steps", "2"]) == 0
    assert run(f"evaluate {{made}}/begun --out {{made}}/judged {JUDGED}", folder, folder) == 0
    assert run("pack digits::test --out {made}/half", folder, folder) == 0
    begun = json.loads((folder / "half" / "pack.json").read_text())
    (folder / "half" / PACKING).write_text(json.dumps({k: begun[k] for k in ("source", "short_side", "quality")}))
    for path in (folder / "half" / "pack.json", *(folder / "half").glob("*.tar")):
        path.unlink()
    torch.save(nets.training(nets.swav(nets.resnet(4), 512, 128, (30,))), folder / "official.pth")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the commands need; made once."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSELLA_CACHE", str(folder / "cache"))
        make_all(folder)
        yield folder


Names = tuple[list[str], list[str]]  # of files, of folders


@pytest.fixture(scope="module")
def names_of(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Names]:
    """Names below the folder of a command."""

    @functools.cache
    def names(title: str) -> Names:
        command, folder = COMMANDS[title], tmp_path_factory.mktemp("clean") / "folder"
        command.prepare(made, folder)
        with renames() as given:
            assert run(command.words, made, folder) == 0, title
        shutil.rmtree(made / "new", ignore_errors=True)
        there = list(folder.rglob("*"))
        files = {str(path.relative_to(folder)) for path in there if path.is_file()}
        folders = {str(path.relative_to(folder)) for path in there if path.is_dir()}
        passing = {name for name in given if not name.startswith(".saving-")} - {path.name for path in there}
        guessed = {f".saving-{Path(name).name}" for name in files | folders}
        return sorted(files | passing | guessed), sorted(folders)

    return names


def outside_of(tmp_path: Path) -> Path:
    """Files of somebody, under names that a tidying command could take for its own."""
    outside = tmp_path / "outside"
    (outside / "folder" / "step-00000001").mkdir(parents=True)
    for name in ("profile", "folder/profile", "folder/a.png", "folder/.saving-0", "folder/step-00000001/manifest.json"):
        (outside / name).write_bytes(SECRET)
    (outside / "empty").mkdir()
    return outside


def snapshot(folder: Path) -> dict[str, object]:
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


PLANTS: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, outside: path.symlink_to(outside / "profile"),
    "dangling link": lambda path, outside: path.symlink_to(outside / "new"),
    "link to a folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "link to an empty folder": lambda path, outside: path.symlink_to(outside / "empty"),
    "link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "hard link": lambda path, outside: path.hardlink_to(outside / "profile"),
    "pipe": lambda path, outside: os.mkfifo(path),
}


FOR_FOLDERS = ("link to a folder", "link to an empty folder", "dangling link", "pipe")


def some_at_once(
    what: Iterable[str], kinds: Iterable[str], quick: Collection[str], quick_kinds: Collection[str]
) -> list[Any]:
    """All pairs, of which all but the quick ones are slow."""
    return [
        pytest.param(one, kind, marks=() if one in quick and kind in quick_kinds else pytest.mark.slow)
        for one in what
        for kind in kinds
    ]


def plant(path: Path, kind: str, outside: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    PLANTS[kind](path, outside)


def put_back(path: Path, original: Path) -> None:
    path.unlink()
    if original.is_dir():
        shutil.copytree(original, path)
    elif original.exists():
        shutil.copy(original, path)


def attack(
    title: str, kind: str, planted: list[str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run a command on a folder with all of these planted; put back what it names as the reason, and run it again."""
    command, folder, outside = COMMANDS[title], tmp_path / "hostile", outside_of(tmp_path)
    command.prepare(made, folder)
    original = Path(shutil.copytree(folder, tmp_path / "original"))
    planted = [name for name in planted if not {str(parent) for parent in Path(name).parents} & set(planted)]
    for name in planted:
        plant(folder / name, kind, outside)
    before = snapshot(outside)
    left = list(planted)
    capsys.readouterr()
    while True:
        code = run(command.words, made, folder)
        said = capsys.readouterr().err
        assert snapshot(outside) == before, (title, kind, left)
        assert code in (0, 2) and "Traceback" not in said, said
        named = [name for name in left if "/".join(Path(name).parts[-2:]) in said or str(folder / name) in said]
        if code == 0 or not named:
            break
        for name in named:
            if os.path.lexists(folder / name):
                put_back(folder / name, original / name)
            left.remove(name)
    shutil.rmtree(made / "new", ignore_errors=True)


@pytest.mark.parametrize(
    ("title", "kind"),
    some_at_once(COMMANDS, PLANTS, ("resume", "go on packing"), ("dangling link", "hard link")),
)
def test_no_command_writes_through_what_is_planted_for_its_files(
    title: str,
    kind: str,
    made: Path,
    names_of: Callable[[str], Names],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    attack(title, kind, names_of(title)[0], made, tmp_path, capsys)


@pytest.mark.parametrize(("title", "kind"), some_at_once(COMMANDS, FOR_FOLDERS, ("resume",), ("link to a folder",)))
def test_no_command_writes_through_what_is_planted_for_its_folders(
    title: str,
    kind: str,
    made: Path,
    names_of: Callable[[str], Names],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    attack(title, kind, names_of(title)[1], made, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a command for each name
@pytest.mark.parametrize("kind", PLANTS)
@pytest.mark.parametrize("title", COMMANDS)
def test_no_command_writes_through_any_one_name(
    title: str,
    kind: str,
    made: Path,
    names_of: Callable[[str], Names],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    for number, name in enumerate([name for names in names_of(title) for name in names]):
        place = tmp_path / str(number)
        place.mkdir()
        attack(title, kind, [name], made, place, capsys)


@pytest.mark.parametrize("target", ["folder", "empty", "new"])
@pytest.mark.parametrize(
    "words",
    [
        "resume {folder}",
        "report {folder}",
        pytest.param(f"evaluate {{made}}/begun --out {{folder}} {JUDGED}", marks=pytest.mark.slow),
        "pack digits::test --out {folder}",
        "import {made}/official.pth --out {folder}",
        "pretrain",
    ],
)
def test_a_folder_of_ours_that_is_a_link_is_refused(
    words: str, target: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outside = outside_of(tmp_path)
    (tmp_path / "ours").symlink_to(outside / target)
    before = snapshot(outside)
    if words == "pretrain":
        assert main(pretrain_words("swav", tmp_path / "ours")) == 2
    else:
        assert run(words, made, tmp_path / "ours") == 2
    assert snapshot(outside) == before and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kind"), some_at_once(BEFORE_STEPS, PLANTS, ("lock", "metrics.jsonl"), ("link",)))
def test_a_run_does_not_begin_through_what_is_planted(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outside, folder = outside_of(tmp_path), tmp_path / "run"
    folder.mkdir()
    (folder / "lock").touch()
    plant(folder / name, kind, outside)
    before = snapshot(outside)
    assert main([*pretrain_words("swav", folder), "--max-steps", "1"]) in (0, 2)
    assert snapshot(outside) == before and "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTS)
def test_a_cache_with_planted_files_costs_nothing_outside_of_it(
    kind: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    cache, outside = Path(shutil.copytree(made / "cache", tmp_path / "cache")), outside_of(tmp_path)
    planted = [path for path in cache.rglob("*") if path.is_file() and "numba" not in str(path)]
    assert planted
    for path in planted:
        plant(path, kind, outside)
    before = snapshot(outside)
    monkeypatch.setenv("TESSELLA_CACHE", str(cache))
    assert run(f"evaluate {{made}}/begun --out {{folder}} {JUDGED}", made, tmp_path / "judged") in (0, 2)
    assert snapshot(outside) == before and "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("place", ["../outside/folder", "/tmp", "predictions/../../outside"])
def test_records_of_others_do_not_say_where_predictions_go(
    place: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outside, folder = outside_of(tmp_path), tmp_path / "judged"
    words = f"evaluate {{made}}/begun --out {{folder}} {JUDGED}"
    assert run(words.removesuffix(" --baseline"), made, folder) == 0
    text = (folder / "evaluation.json").read_text()
    assert '"predictions/knn"' in text
    (folder / "evaluation.json").write_text(text.replace('"predictions/knn"', f'"{place}"'))
    before = snapshot(outside)
    capsys.readouterr()
    assert run(words, made, folder) == 2
    assert snapshot(outside) == before and "outside of its folder" in capsys.readouterr().err
