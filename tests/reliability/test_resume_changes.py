"""What may change between two parts of a run: each setting is free, has to be allowed by name, or is fixed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import tessella
from tessella.cli import main
from tessella.errors import UserError
from tessella.methods import METHODS as TABLE
from tessella.recipes import recipe
from tessella.run.config import (
    ON_RESUME,
    RunConfig,
    differences,
    load_config,
    on_resume,
    refuse_changes,
    to_dict,
    with_settings,
)
from tests.engine.runs import assert_same, final_state
from tests.reliability.program import METHODS, pretrain_words


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    named = [(f"{prefix}{name}", value) for name, value in tree.items()]
    return [x for name, value in named for x in (leaves(value, f"{name}.") if isinstance(value, dict) else [name])]


# --- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TABLE)
def test_every_setting_of_every_method_has_a_class(method: str):
    config = next(recipe(name) for name in tessella.recipes.RECIPES if name.startswith(f"{method}_"))
    assert {on_resume(name) for name in leaves(to_dict(config))} == {"free", "flag", "fixed"}


def test_the_table_names_nothing_that_does_not_exist():
    names = leaves(to_dict(recipe("swav_cpu")))
    assert [name for name in ON_RESUME if name not in names and name != "method.*"] == []


def test_a_new_setting_without_a_class_is_told():
    @dataclass(frozen=True)
    class Wider(RunConfig):
        new_setting: int = 3

    config = Wider(recipe("swav_cpu").method)
    with pytest.raises(AssertionError, match="new_setting has no class"):
        refuse_changes(config, dataclasses.replace(config, new_setting=4))


# --- thirty edits -------------------------------------------------------------------------------------------

EDITS = {
    "data": "elsewhere", "max_steps": 9, "device": "cuda", "workers": 3, "log_every": 7, "checkpoint_minutes": 1.5,
    "max_unreadable": 0.5, "nodes": 2,
    "epochs": 3, "precision": "bf16", "compile": True, "freeze_backbone_steps": 2, "optimizer.lr": 0.7,
    "optimizer.momentum": 0.8, "optimizer.weight_decay": 0.5, "optimizer.warmup_epochs": 1, "optimizer.final_lr": 0.1,
    "optimizer.per_epoch": True, "optimizer.trust": 0.1, "backbone.drop_path": 0.1,
    "backbone.activation_checkpointing": True,
    "seed": 5, "batch_size": 32, "accumulate": 2, "image_size": 8, "backbone.width": 8, "backbone.name": "resnet18",
    "backbone.stem": "imagenet", "optimizer.name": "sgd", "method.temperature": 0.3, "method.prototypes": 31,
    "init_from": "x", "recipe": "other",
}  # fmt: skip


def edited(config: RunConfig, field: str, value: Any) -> RunConfig:
    return with_settings(config, {field: value})


@pytest.mark.parametrize("field", EDITS)
def test_an_edit_is_taken_needs_a_flag_or_is_refused_as_the_table_says(field: str):
    before = dataclasses.replace(recipe("swav_cpu"), data="digits")
    after = edited(before, field, EDITS[field])
    assert list(differences(before, after)) == [field]
    kind = on_resume(field)
    if kind == "free":
        assert refuse_changes(before, after) == {}
        return
    with pytest.raises(UserError) as refused:
        refuse_changes(before, after)
    assert f"{field} would change from " in str(refused.value)
    assert (f"--allow {field}" in str(refused.value)) == (kind == "flag")
    if kind == "flag":
        assert list(refuse_changes(before, after, [field])) == [field]
    else:
        assert "start a new run" in str(refused.value)
        with pytest.raises(UserError, match="the fields that can be allowed are"):
            refuse_changes(before, after, [field])


def test_all_differences_are_listed_at_once():
    before = recipe("swav_cpu")
    after = edited(edited(edited(before, "seed", 5), "epochs", 77), "optimizer.lr", 0.7)
    with pytest.raises(UserError, match=r"seed .* to 5; optimizer\.lr .* to 0\.7; epochs .* to 77.*--allow optim"):
        refuse_changes(before, after)


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Two steps of each method."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSELLA_CACHE", str(folder / "cache"))
        for method in METHODS:
            assert main([*pretrain_words(method, folder / method), "--max-steps", "2"]) == 0
        yield {method: folder / method for method in METHODS}


@pytest.mark.parametrize("trained", METHODS)
@pytest.mark.parametrize("asked", METHODS)
def test_a_checkpoint_of_another_method_is_refused_before_the_first_step(
    trained: str, asked: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Path(shutil.copytree(runs[asked], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(runs[trained] / "checkpoints", run / "checkpoints")
    log = (run / "metrics.jsonl").read_text()
    code = main(["resume", str(run)])
    if trained == asked:
        assert code == 0
    else:
        assert code == 2 and f"method.name would change from {trained} to {asked}" in capsys.readouterr().err
        assert (run / "metrics.jsonl").read_text() == log


def rewrite(run: Path, **values: Any) -> None:
    """Edit config.yaml by hand."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | values, sort_keys=False))


def test_an_edited_config_file_is_noticed(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = Path(shutil.copytree(runs["jigclu"], tmp_path / "run"))
    rewrite(run, epochs=3, max_steps=4, log_every=3)
    assert main(["resume", str(run)]) == 2
    assert "epochs would change from 2 to 3" in capsys.readouterr().err
    assert main(["resume", str(run), "--allow", "epochs"]) == 0
    assert main(["resume", str(run), "--max-steps", "5"]) == 0  # asked once


def test_an_allowed_change_is_kept_and_the_same_however_it_was_given(runs: dict[str, Path], tmp_path: Path):
    by_hand, by_word, by_call = (
        Path(shutil.copytree(runs["jigclu"], tmp_path / name)) for name in ("hand", "word", "call")
    )
    rewrite(by_hand, epochs=3, max_steps=None)
    assert main(["resume", str(by_hand), "--allow=epochs"]) == 0
    assert main(["resume", str(by_word), "--epochs", "3", "--max-steps", "None", "--allow", "epochs"]) == 0
    tessella.resume(by_call, allow=["epochs"], epochs=3, max_steps=None)
    assert int(final_state(by_hand)["step"]) == 15
    assert_same(final_state(by_hand), final_state(by_word))
    assert_same(final_state(by_hand), final_state(by_call))
    assert load_config(by_word / "config.yaml").epochs == 3


def test_a_change_that_was_allowed_and_then_killed_is_asked_for_again_or_kept(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """config.yaml is written first; until the next save it contradicts the checkpoint, and that is said."""
    run = Path(shutil.copytree(runs["jigclu"], tmp_path / "run"))
    words = ["resume", str(run), "--epochs", "3", "--max-steps", "None", "--allow", "epochs"]

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tessella.engine.session.Session.steps", killed)
        assert main(words) == 75
    assert main(["resume", str(run), "--max-steps", "None"]) == 2
    assert "epochs would change from 2 to 3" in capsys.readouterr().err
    assert main(words) == 0


def test_a_name_that_cannot_be_allowed_is_told(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    assert main(["resume", str(runs["coke"]), "--allow", "seed"]) == 2
    assert (
        "--allow seed: the fields that can be allowed are backbone.activation_checkpointing" in capsys.readouterr().err
    )
    assert main(["resume", str(runs["coke"]), "--seed", "4"]) == 2
    assert "seed would change from 0 to 4" in capsys.readouterr().err
