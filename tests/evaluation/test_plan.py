"""What an evaluation runs on which data, known and checked before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tessella.errors import UserError
from tessella.evaluation.plan import DEFAULT, Source, plan, read_data_file
from tessella.protocols import (
    KINDS,
    PROTOCOLS,
    default_config,
    named_settings,
    protocol_of,
    quick_settings,
    record_name,
)

CLASSES = "classes: {train: a, test: b}\n"


def data_file(folder: Path, text: str) -> Any:
    path = folder / "data.yaml"
    path.write_text(text)
    return read_data_file(path)


def names(tasks: list[Any]) -> list[str]:
    return [task.name for task in tasks]


# --- names --------------------------------------------------------------------------------------------------


def test_a_record_is_called_as_its_setting_whatever_the_seeds():
    assert {record_name(config) for config in named_settings().values()} == set(named_settings())
    (task,) = plan(["detection-small"], Source("a", "b"), None, seed=7)
    assert record_name(task.config) == "detection-small" and task.config.seed == 7 and not task.changed
    assert record_name(default_config("finetune")) == "finetune-swav-1"


def test_every_protocol_has_a_setting_and_every_quick_one_fits_its_data():
    assert {protocol_of(config).config for config in named_settings().values()} == {
        p.config for p in PROTOCOLS.values()
    }
    for kind in KINDS:
        assert all(kind in protocol_of(named_settings()[name]).kinds for name in quick_settings(kind))


@pytest.mark.parametrize(("name", "told"), [
    ("linaer", "did you mean linear"),
    ("detection", "name one of detection-jigclu, "),
    ("finetune-swav-2", "did you mean finetune-swav-"),
])  # fmt: skip
def test_an_unknown_name_is_refused_with_those_that_there_are(name: str, told: str):
    with pytest.raises(UserError, match=told):
        plan([name], Source("a", "b"), None, seed=0)


# --- tasks --------------------------------------------------------------------------------------------------


def test_without_a_data_file_the_usual_four_are_run():
    assert names(plan([], Source("a", "b"), None, seed=0)) == ["knn", "linear-fast", "fewlabels", "clustering"]
    assert len(DEFAULT) == 4


def test_with_a_data_file_all_that_its_data_allow(tmp_path: Path):
    tasks = plan([], None, data_file(tmp_path, CLASSES + "masks: streets\n"), seed=0)
    assert names(tasks) == [*quick_settings("classes"), *quick_settings("masks")]
    assert tasks[-1].kind == "masks" and tasks[-1].source == Source("streets", "streets")
    assert not any(task.required for task in tasks)


def test_a_section_gives_settings_and_data_of_its_own_and_all_runs_it_too(tmp_path: Path):
    text = """
classes: {train: a, test: b, label_map: map.csv}
protocols:
  linear-swav: {epochs: 2, lr: 3e-1}
  knn: {k: [5]}
  detection-small: {train: c, test: d, iterations: 10}
  segmentation-small: {train: e, test: e, crops: {size: 64}}
"""
    tasks = {task.name: task for task in plan(["all"], None, data_file(tmp_path, text), seed=3)}
    assert set(tasks) == {*quick_settings("classes"), "linear-swav", "detection-small", "segmentation-small"}
    swav = tasks["linear-swav"]
    assert swav.changed == {"epochs": 2, "lr": 0.3} and swav.required and swav.config.seed == 3
    assert swav.source == Source("a", "b", "map.csv")
    assert tasks["knn"].config.k == (5,) and tasks["detection-small"].source == Source("c", "d")
    crops = tasks["segmentation-small"].config.crops
    assert crops.size == 64 and crops.scale == named_settings()["segmentation-small"].crops.scale  # the rest stays
    assert tasks["segmentation-small"].kind == "masks"


def test_data_that_say_what_they_are_decide_what_all_is(tmp_path: Path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text("{}")
    assert names(plan(["all"], Source(str(tmp_path), str(tmp_path)), None, seed=0)) == list(quick_settings("boxes"))
    assert names(plan(["all"], Source("digits::train", "digits::test"), None, seed=0)) == list(
        quick_settings("classes")
    )
    (svm,) = plan(["svm"], Source(str(tmp_path), str(tmp_path)), None, seed=0)
    assert svm.kind == "boxes" and svm.required
    (svm,) = plan(["svm"], Source("digits::train", "digits::test"), None, seed=0)
    assert svm.kind == "classes"


def test_asked_for_twice_is_run_once(tmp_path: Path):
    tasks = plan(["all", "knn"], None, data_file(tmp_path, CLASSES), seed=0)
    assert names(tasks) == list(quick_settings("classes"))
    assert [task.name for task in tasks if task.required] == ["knn"]


def test_several_seeds_are_several_trainings_of_what_trains(tmp_path: Path):
    file = data_file(tmp_path, CLASSES + "boxes: c\n")
    tasks = plan(["knn", "finetune-small-100", "detection-small"], None, file, seed=4, seeds=3)
    assert [(task.name, task.seed) for task in tasks] == [
        ("knn", 4), ("finetune-small-100", 4), *(("detection-small", seed) for seed in (4, 5, 6))]  # fmt: skip
    assert tasks[1].config.repeats == 3 and tasks[1].config.seed == 4 and not tasks[1].changed
    with pytest.raises(UserError, match="seeds=0"):
        plan(["knn"], None, file, seed=0, seeds=0)


# --- the file -----------------------------------------------------------------------------------------------

WRONG = {
    "- a list": "is no table of names and values",
    "clases: {train: a, test: b}": "does not take 'clases': it takes classes, boxes, masks, protocols",
    "classes: a": "classes is 'a'; expected train: DATA and test: DATA",
    "classes: {train: a}": "classes.test is None; expected the name of a data set",
    "classes: {train: a, test: b, tset: c}": "does not take 'tset'",
    "boxes: {train: a, test: b, label_map: c}": "does not take 'label_map'",
    "classes: {train: a, test: b, label_map: 3}": "label_map is 3",
    "protocols: {}": "names no data: give classes, boxes or masks",
    "classes: {train: a, test: [": "is not YAML: while parsing",
    CLASSES + "protocols: {linaer: {}}": "did you mean linear",
    CLASSES + "protocols: {linear: {epoch: 3}}": r"protocols.linear does not take 'epoch': it takes train, test and",
    CLASSES + "protocols: {linear: {seed: 3}}": "by --seed and --seeds",
    CLASSES + "protocols: {linear-swav: {epochs: three}}": "epochs is 'three'; expected int",
    CLASSES + "protocols: {detection-small: {train: x, test: y, iterations: 0}}": "must be at least 1",
    CLASSES + "protocols: {detection-small: {iterations: 3}}": "detection-small needs boxes of objects: .* add boxes",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_data_file_is_told_before_anything_is_computed(text: str, tmp_path: Path):
    with pytest.raises(UserError, match=WRONG[text]):
        plan([], None, data_file(tmp_path, text), seed=0)


def test_a_data_file_that_is_not_there_or_no_text_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_data_file(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read: not UTF-8 text"):
        read_data_file(tmp_path / "bytes.yaml")


def test_nothing_in_a_data_file_is_executed(tmp_path: Path):
    with pytest.raises(UserError, match="is not YAML"):
        data_file(tmp_path, "classes: !!python/object/apply:os.system ['true']")
