"""What a disk, a copy or a hand has changed in a checkpoint is found and named, and the one before it is used."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tessella.cli import main
from tessella.run.checkpoints import Damaged, load, load_newest, save
from tests.reliability.program import METHODS, assert_same_runs, pretrain_words, run

LAST, BEFORE = "step-00000010", "step-00000009"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of ten steps, with the checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSELLA_CACHE", str(folder / "cache"))
        run(pretrain_words("smog", folder / "run"), folder / "said")
    yield folder / "run"


@pytest.fixture
def checkpoints(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints"))


def check_damage(checkpoints: Path, file: Path, change: Callable[[], None]) -> str:
    """Damage a file: it is told by name, and the checkpoint before is used; then put it back."""
    content = file.read_bytes()
    change()
    told: list[str] = []
    newest = load_newest(checkpoints, told.append)
    assert newest is not None and newest[0].name == BEFORE, file
    assert len(told) == 1 and told[0].startswith(f"{LAST}/{file.name}"), told
    file.write_bytes(content)
    return told[0]


def flip(file: Path, draw: random.Random) -> tuple[int, Callable[[], None]]:
    size = file.stat().st_size
    place, bit = draw.randrange(size), 1 << draw.randrange(8)

    def change() -> None:
        with file.open("r+b") as opened:
            opened.seek(place)
            old = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([old ^ bit]))

    return place, change


def files_of(checkpoints: Path, draw: random.Random, count: int) -> list[Path]:
    """So many files: all equally often, and by size, where most of a disk's errors will be."""
    files = sorted((checkpoints / LAST).iterdir())
    sizes = [file.stat().st_size for file in files]
    return [files[n % len(files)] if n % 2 else draw.choices(files, sizes)[0] for n in range(count)]


def damage(checkpoints: Path, flips: int, truncations: int) -> None:
    draw = random.Random(0)
    for file in files_of(checkpoints, draw, flips):
        place, change = flip(file, draw)
        told = check_damage(checkpoints, file, change)
        header = file.suffix == ".safetensors" and 8 + int.from_bytes(file.read_bytes()[:8], "little")
        if header and place >= header:
            assert name_of_tensor_at(file, place - header) in told
    for file in files_of(checkpoints, draw, truncations):
        length = draw.randrange(file.stat().st_size)
        check_damage(checkpoints, file, lambda file=file, length=length: os.truncate(file, length))
    assert load_newest(checkpoints, pytest.fail) is not None


def name_of_tensor_at(file: Path, place: int) -> str:
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return next(
        name
        for name, entry in header.items()
        if name != "__metadata__" and entry["data_offsets"][0] <= place < entry["data_offsets"][1]
    )


def test_flipped_bits_and_truncations_are_found_and_the_tensor_is_named(checkpoints: Path):
    damage(checkpoints, flips=60, truncations=20)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_thousand_flipped_bits_and_two_hundred_truncations_are_found(checkpoints: Path):
    damage(checkpoints, flips=1000, truncations=200)


def test_every_missing_file_and_every_swapped_pair_is_found(checkpoints: Path):
    files = sorted((checkpoints / LAST).iterdir())
    for file in files:
        check_damage(checkpoints, file, file.unlink)
        for other in ((checkpoints / BEFORE / file.name), *files):
            if other.read_bytes() != file.read_bytes():
                check_damage(checkpoints, file, lambda file=file, other=other: shutil.copy(other, file))


def test_a_checkpoint_under_another_steps_name_is_found(checkpoints: Path):
    shutil.copytree(checkpoints / BEFORE, checkpoints / "step-00000011")
    told: list[str] = []
    newest = load_newest(checkpoints, told.append)
    assert newest is not None and newest[0].name == LAST
    assert told == ["step-00000011/manifest.json is of step 9: the folder was renamed or copied"]


def test_a_damaged_run_goes_on_from_the_checkpoint_before_and_ends_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = Path(shutil.copytree(finished, tmp_path / "run"))
    flip(other / "checkpoints" / LAST / "method.safetensors", random.Random(3))[1]()
    (other / "backbone.safetensors").unlink()
    assert main(["resume", str(other)]) == 0
    said = capsys.readouterr().err
    assert f"warning: {LAST}/method.safetensors has changed since it was written: tensor" in said
    assert "an earlier checkpoint is used" in said
    assert_same_runs(finished, other)


def test_a_run_killed_between_its_last_save_and_its_last_removal_is_tidied(finished: Path, tmp_path: Path):
    other = Path(shutil.copytree(finished, tmp_path / "run"))
    save(other / "checkpoints", 8, *load(other / "checkpoints" / LAST))
    for name in (".saving-0", ".saving-step-00000010"):
        shutil.copytree(other / "checkpoints" / BEFORE, other / "checkpoints" / name)
    assert main(["resume", str(other)]) == 0
    assert_same_runs(finished, other)


def test_without_an_undamaged_checkpoint_a_run_does_not_start_over_unasked(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in (LAST, BEFORE):
        (other / "checkpoints" / name / "manifest.json").write_text("{}")
    log = (other / "metrics.jsonl").read_text()
    assert main(["resume", str(other)]) == 2
    said = capsys.readouterr().err
    assert "no checkpoint in" in said and LAST in said and BEFORE in said and "remove that folder" in said
    assert (other / "metrics.jsonl").read_text() == log


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_of_every_method_is_covered_by_a_hash(method: str, tmp_path: Path):
    run(pretrain_words(method, tmp_path / "run"), tmp_path / "said")
    folder = tmp_path / "run" / "checkpoints" / LAST
    tensors, _ = load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {(file, name) for file, named in manifest["tensors"].items() for name in named}
    assert listed == {(f"{group}.safetensors", name) for group, named in tensors.items() for name in named}
    with pytest.raises(Damaged):
        os.truncate(folder / "state.json", 1)
        load(folder)
