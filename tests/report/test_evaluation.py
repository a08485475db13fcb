"""The table of an evaluation: the same figures on the console, in Markdown and on the page, with what they rest on."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tessella.errors import UserError
from tessella.methods import METHODS
from tessella.report.evaluation import print_scores, tables_of, write_pages
from tessella.report.figures import values_of, values_over_seeds
from tessella.report.published import reported
from tests.report.test_run_report import ATTACK, Elements


def record(protocol: str = "knn", **given: Any) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "version": 1,
        "kind": "classes",
        "changed": {},
        "scores": {"top1": 0.489, "top1_interval": [0.458, 0.52], "notes": []},
        "settings": {"k": [1, 20]},
        "backbone": "my run",
        "network": {"name": "resnet10", "width": 16, "stem": "small"},
        "weights": "ab" * 32,
        "train": {"name": "/data/photos.tar::train", "fingerprint": "t", "images": 5000, "classes": 10},
        "test": {"name": "/data/photos.tar::test", "fingerprint": "s", "images": 1000, "classes": 10},
        "transform": {"size": 32},
        "seed": 0,
        "device": "cpu",
        "ranks": 1,
        "libraries": {"tessella": "0.1.0", "torch": "2.15.0"},
        "seconds": 12.0,
    } | given


def trained(seed: int, ap: float, **given: Any) -> dict[str, Any]:
    settings = {"neck": "fpn", "masks": False, "seed": seed}
    return record("detection-small", kind="boxes", settings=settings, seed=seed, scores={"box_ap": ap}, **given)


BASELINE = {"baseline": {"name": "random init, seed 0", "scores": {"top1": 0.265, "top1_interval": [0.24, 0.29]}}}


# --- figures ------------------------------------------------------------------------------------------------


def test_a_figure_has_its_spread_over_draws_or_its_interval_or_none():
    values = values_of({
        "top1": 0.5, "top1_interval": [0.4, 0.6], "nmi": 0.3, "std": {"nmi": 0.012}, "top1_10": 0.25, "std_10": 0.02,
        "map_4": 0.7, "std_4": 0.1, "box_ap": 0.333, "per_class": {}, "k20_T0.07": 0.5, "c": 0.1,
    })  # fmt: skip
    assert {name: str(value) for name, value in values.items()} == {
        "top1": "50.0 [40.0, 60.0]",
        "top1_10": "25.0 ± 2.0",
        "map_4": "70.0 ± 10.0",
        "nmi": "30.0 ± 1.2",
        "box_ap": "33.3",
    }
    assert values["top1_10"].label == "top-1, 10 labels per class"
    assert values["map_4"].label == "mean AP, 4 positives per class"
    assert values_of({"top1_1": 0.5})["top1_1"].label == "top-1, 1 label per class"


def test_a_score_that_only_its_protocol_knows_is_shown_under_the_label_that_it_declares():
    assert values_of({"sharpness": 0.5}) == {}
    (value,) = values_of({"sharpness": 0.5}, {"sharpness": "how sharp"}).values()
    assert (value.label, str(value)) == ("how sharp", "50.0")


def test_over_seeds_the_spread_is_theirs():
    values = values_over_seeds([{"top1": x, "top1_interval": [0, 1]} for x in (0.4, 0.5, 0.6)])
    assert str(values["top1"]) == "50.0 ± 10.0"


@pytest.mark.parametrize("broken", [None, True, "0.5", float("nan"), [0.5]])
def test_what_is_no_number_is_no_figure(broken: Any):
    assert values_of({"top1": broken}) == {}
    assert str(values_of({"top1": 0.5, "std": {"top1": broken}})["top1"]) == "50.0"


# --- tables -------------------------------------------------------------------------------------------------


def test_trainings_that_differ_in_their_seed_are_one_row():
    (table,) = tables_of([trained(0, 0.50), trained(1, 0.54), trained(2, 0.52)])
    ((question,),) = [table.questions]
    assert question.seeds == "3 seeds" and str(question.rows[0].value) == "52.0 ± 2.0"


def test_a_protocol_without_a_seed_is_one_row_whatever_the_evaluation_s_seed():
    (table,) = tables_of([record(seed=0), record(seed=1)])
    assert [str(row.value) for q in table.questions for row in q.rows] == ["48.9 [45.8, 52.0]"]


def test_other_settings_backbones_and_images_are_kept_apart():
    other = record(settings={"k": [3]}, changed={"k": [3]})
    (table,) = tables_of([record(), other])
    assert [question.changed for question in table.questions] == ["", "k [3]"]
    assert len(tables_of([record(), record(weights="cd")])) == 2
    assert len(tables_of([record(), record(test={"name": "x", "fingerprint": "y"})])) == 2


def test_the_gain_is_over_random_init_and_not_over_a_supervised_network():
    other = {"supervised": {"name": "torchvision:resnet50", "scores": {"top1": 0.9}}}
    (table,) = tables_of([record(**BASELINE, **other)])
    (row,) = table.questions[0].rows
    assert table.heads == ["random init", "torchvision:resnet50"] and row.gain == "+22.4"
    assert [str(value) for value in row.others] == ["26.5 [24.0, 29.0]", "90.0"]
    (table,) = tables_of([record(**other)])
    assert table.questions[0].rows[0].gain == "" and not table.gains


def test_what_is_no_record_is_passed_over():
    assert tables_of(["x", {}, {"scores": []}, {"scores": {"top1": "high"}}]) == []
    (table,) = tables_of([{"scores": {"top1": 0.5}}])
    assert table.network == "network not named" and table.backbone == "?"


# --- published figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "settings", "figure", "expected"), [
    ("linear-fast", {}, "top1", {"jigclu": 66.4, "mejigclu": 66.8, "swav": 75.3, "smog": 76.4, "coke": 76.4}),
    ("linear-swav", {}, "top5", {}),
    ("knn", {}, "top1", {"swav": 65.7, "smog": 74.3}),
    ("finetune-swav-1", {"labels": 0.01}, "top1", {"jigclu": 40.7, "mejigclu": 41.2, "swav": 53.9, "smog": 63.6}),
    ("finetune-jigclu-code-10", {"labels": 0.1}, "top1", {"jigclu": 63.0, "mejigclu": 63.2, "swav": 70.2}),
    ("finetune-vissl-100", {"labels": None, "recipe": "vissl-100"}, "top1", {"swav": 77.8, "smog": 80.2}),
    ("clustering", {}, "ari", {"coke": 73.2}),
    ("svm", {}, "map", {"swav": 88.9}),
    ("detection-small", {"neck": "fpn", "masks": False}, "box_ap", {"jigclu": 39.3, "mejigclu": 40.0}),
    ("detection-moco-fpn", {"neck": "fpn", "masks": True}, "mask_ap", {"swav": 37.8, "smog": 36.9, "coke": 37.2}),
    ("detection-voc-c4", {"neck": "c4", "masks": False}, "box_ap50", {"swav": 82.6}),
    ("segmentation-fcn-voc12", {}, "miou", {"swav": 73.0, "smog": 76.22}),
    ("segmentation-fcn-cityscapes", {}, "miou", {"smog": 76.03}),
    ("finetune-swav-list", {"labels": None, "label_list": "mine.txt"}, "top1", {}),
    ("own-clusters", {}, "nmi", {}),
])  # fmt: skip
def test_published_figures_of_a_protocol(protocol: str, settings: dict, figure: str, expected: dict[str, float]):
    found = reported(protocol, settings, figure)
    assert {one.method: one.value for one in found} == expected
    assert all(one.setting and one.source and one.method in METHODS for one in found)


def test_a_published_figure_names_its_setting_and_yours():
    imagenet = {"name": "photos.tar::test", "fingerprint": "s", "images": 50_000, "classes": 1000}
    (table,) = tables_of([record("linear-fast", test=imagenet)])
    footnotes = dict(table.footnotes)
    published = table.questions[0].rows[0].published
    value, letter = published["SwAV"]
    assert value == "75.3" and footnotes[letter] == "ImageNet, ResNet-50, 800 epochs (README of the official code)"
    assert table.yours == "Yours: photos.tar::test, resnet10, width 16, small stem." and not table.elsewhere


def test_figures_published_on_other_data_are_no_column(tmp_path: Path):
    (table,) = tables_of([record("linear-fast")])
    assert not table.methods and not table.footnotes
    line = "linear-fast, top-1: SwAV 75.3 (ImageNet, ResNet-50, 800 epochs; README of the official code)"
    assert line in table.elsewhere
    text, page = written(tmp_path, record("linear-fast"))
    assert "SwAV 75.3" in page.text and page.count("details") == 2 and "SwAV" not in text.partition("on other data")[0]


def test_what_touches_every_score_stands_above_them(capsys: pytest.CaptureFixture[str]):
    copies = {"near_duplicates": 12, "near_duplicate_share": 0.012, "pairs": [{"test": "a.png", "train": "b.png"}]}
    doubtful = record(near_copies=copies, warnings=["classes of test that train lacks: fox"])
    doubtful["scores"]["leave_one_out"] = True
    (table,) = tables_of([doubtful])
    assert "12 test images are near-copies of train images (1.2 %): there, scores measure memory." in table.facts
    assert "Beware: classes of test that train lacks: fox." in table.facts
    assert table.copies == [("a.png", "b.png")] and table.questions[0].seeds == "leave-one-out"
    print_scores([doubtful])
    out = capsys.readouterr().out
    assert "knn (leave-one-out)" in out and "12 test images are near-copies" in out


def test_a_score_stands_beside_that_of_shuffled_labels_and_says_what_is_hard(tmp_path: Path):
    scores = {
        "top1": 0.5, "permuted": {"top1": 0.104}, "c": 0.01, "held_out_top1": {"0.01": 0.5, "1": 0.4},
        "per_class": {"cat": 0.2, "dog": 0.5, "fox": 0.8}, "mistakes": [["cat", "dog", 31]],
    }  # fmt: skip
    text, page = written(tmp_path, record("linear-fast", scores=scores, label_map={"tabby": "cat", "lion": "cat"}))
    assert "| linear-fast | top-1 | 50.0 | 10.4 |" in text
    for words in (
        "picked on held-out train images: C 0.01 (of 2 settings)",
        "hardest classes: cat 20.0, dog 50.0, fox 80.0",
        "cat taken for dog (31 images)",
        "cat: tabby, lion",
        "10.4",
    ):
        assert words in page.text, words


def test_a_training_that_failed_is_named_beside_its_figure(capsys: pytest.CaptureFixture[str]):
    note = "failed: the training ended at a loss of 8.30, and guessing has 2.48"
    print_scores([record("finetune-small-1", scores={"top1": 0.1, "notes": [note]})])
    assert f"finetune-small-1: {note}" in capsys.readouterr().out


# --- on paper -----------------------------------------------------------------------------------------------


def written(folder: Path, *records: dict[str, Any]) -> tuple[str, Elements]:
    (folder / "evaluation.json").write_text(json.dumps(records))
    markdown, page = write_pages(folder)
    return markdown.read_text(encoding="utf-8"), Elements(page.read_text(encoding="utf-8"))


def test_markdown_and_page_say_the_same(tmp_path: Path):
    noted = copy.deepcopy(record(**BASELINE))
    noted["scores"]["notes"] = ["k 200 is more than there are"]
    text, page = written(tmp_path, noted, trained(0, 0.4), trained(1, 0.6))
    assert "| knn | top-1 | 48.9 [45.8, 52.0] (+22.4) | – | 26.5 [24.0, 29.0] |" in text
    assert "| detection-small (2 seeds) | box AP | 50.0 ± 14.1 | – | – |" in text
    for words in ("48.9 [45.8, 52.0]", "+22.4", "26.5", "50.0 ± 14.1", "2 seeds", "k 200 is more than there are"):
        assert words in page.text, words
    assert "Learned from /data/photos.tar::train" in text and "1,000 test images" in page.text


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path):
    hostile = record(ATTACK, backbone=f"a|b`c {ATTACK}\u202e", changed={ATTACK: ATTACK})
    hostile["scores"]["notes"] = [ATTACK]
    hostile["baseline"] = {"name": ATTACK, "scores": {"top1": 0.1}}
    hostile["train"]["name"] = hostile["test"]["name"] = ATTACK
    text, page = written(tmp_path, hostile)
    assert page.count("script") == 0 and page.count("img") == 0 and "alert(1)" in page.text
    assert "\u202e" not in text and "a\\|b\\`c" in text and "\\<script\\>" in text
    (policy,) = [tag["content"] for name, tag in page.tags if name == "meta" and "http-equiv" in tag]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert not any("src" in tag or "href" in tag for name, tag in page.tags if name != "link")


def test_a_folder_without_records_has_an_empty_page_and_a_foreign_file_none(tmp_path: Path):
    write_pages(tmp_path)
    (tmp_path / "evaluation.json").write_text("my notes")
    with pytest.raises(UserError, match="not a list of records"):
        write_pages(tmp_path)


# --- on the console -----------------------------------------------------------------------------------------


def test_the_table_is_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    few = record("fewlabels", scores={"top1_1": 0.2, "std_1": 0.01, "top1_10": 0.4, "std_10": 0.02})
    print_scores([record(**BASELINE), few])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["protocol", "figure", "this", "backbone", "labels", "shuffled", "random", "init"]
    assert lines[1].split() == ["knn", "top-1", "48.9", "[45.8,", "52.0]", "(+22.4)", "–", "26.5", "[24.0,", "29.0]"]
    assert any("top-1, 10 labels per class" in line and "40.0 ± 2.0" in line for line in lines)


def test_the_table_is_drawn_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_scores([record(backbone="[red]\x1b[2J")])
    out = capsys.readouterr().out
    assert "48.9" in out and "[red]" in out and "\x1b[2J" not in out
