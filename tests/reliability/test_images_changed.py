"""A data set that is not what it was is noticed, told by name, and gone on with only if asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessella.cli import main

COMMON = (
    "--batch-size 16 --epochs 2 --backbone.name resnet10 --backbone.width 4 --image-size 16 --device cpu --workers 1 "
    "--optimizer.warmup-epochs 0 --log-every 1 --checkpoint-minutes 1e-9"
)


def picture(folder: Path, name: str, seed: int, suffix: str = ".bmp") -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24 + seed % 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}{suffix}")


def words(method: str, data: Path, run: Path, max_steps: int) -> list[str]:
    coke = ["--method.centres", "4", "--method.label-slots", "2"] if method == "coke" else []
    known = ["pretrain", f"{method}_cpu", "--data", str(data), "--out", str(run), *COMMON.split(), *coke]
    return [*known, "--max-steps", str(max_steps)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Forty pictures, and three of a run's six steps on them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    for number in range(48):
        picture(folder / "data", f"{number:02d}", number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSELLA_CACHE", str(folder / "cache"))
        assert main(words("jigclu", folder / "data", folder / "run", 4)) == 0
    yield folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made", copy_function=shutil.copy2))


def add(data: Path) -> None:
    picture(data, "new", 99)


def remove(data: Path) -> None:
    (data / "07.bmp").unlink()


def rename(data: Path) -> None:
    (data / "07.bmp").rename(data / "7a.bmp")


def encode_again(data: Path) -> None:
    Image.open(data / "07.bmp").resize((30, 30)).save(data / "07.bmp")


def same_size_and_other_pixels(data: Path) -> None:
    """Only contents tell, which are looked at in a sample; of so few images every third is in it."""
    for number in range(48):
        Image.open(data / f"{number:02d}.bmp").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
            data / f"{number:02d}.bmp"
        )


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (add, "1 added (new.bmp)"),
    (remove, "1 removed (07.bmp)"),
    (rename, "1 added (7a.bmp); 1 removed (07.bmp)"),
    (encode_again, "1 encoded again (07.bmp)"),
    (same_size_and_other_pixels, "16 encoded again (00.bmp, 03.bmp"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_a_change_is_noticed_and_the_image_named(
    change: Callable[[Path], None], told: str, copy: Path, capsys: pytest.CaptureFixture[str]
):
    change(copy / "data")
    assert main(["resume", str(copy / "run"), "--data", str(copy / "data"), "--max-steps", "None"]) == 2
    said = capsys.readouterr().err
    assert told in said and "--init-from" in said


def test_at_most_ten_images_are_named(copy: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(8):
        picture(copy / "data", f"new-{number}", number)
        (copy / "data" / f"{number:02d}.bmp").unlink()
    assert main(["resume", str(copy / "run"), "--data", str(copy / "data"), "--max-steps", "None"]) == 2
    said = capsys.readouterr().err
    assert "8 removed (00.bmp, 01.bmp, 6 more)" in said and said.count(".bmp") == 10


def test_a_touch_or_a_move_is_no_change(copy: Path):
    for file in (copy / "data").iterdir():
        os.utime(file, (1, 1))
    (copy / "data").rename(copy / "moved")
    assert main(["resume", str(copy / "run"), "--data", str(copy / "moved"), "--max-steps", "None"]) == 0


def test_without_the_list_of_images_a_change_is_still_noticed(copy: Path, capsys: pytest.CaptureFixture[str]):
    (copy / "run" / "images.safetensors").write_bytes(b"damaged")
    remove(copy / "data")
    assert main(["resume", str(copy / "run"), "--data", str(copy / "data"), "--max-steps", "None"]) == 2
    assert "an image was added, removed or encoded again" in capsys.readouterr().err
