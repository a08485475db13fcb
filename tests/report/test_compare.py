"""Evaluations side by side: a difference only where the question was the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessella.errors import UserError
from tessella.report.compare import compare
from tests.report.test_evaluation import record, trained
from tests.report.test_run_report import ATTACK, Elements


def folder(path: Path, *records: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "evaluation.json").write_text(json.dumps(records))
    return path


def better(**given: Any) -> dict[str, Any]:
    return record(backbone="other", weights="cd", scores={"top1": 0.6}, **given)


def test_the_same_question_is_one_row_with_the_difference_to_the_first(tmp_path: Path, capsys: Any):
    one, two = folder(tmp_path / "one", record()), folder(tmp_path / "two", better())
    found = compare([one, two])
    (question,) = found.questions
    ((figure, line),) = question.rows
    assert figure == "top-1" and [cell.gain for cell in line] == ["", "+11.1"] and not found.remarks
    assert [column.title for column in found.columns] == ["one", "two"]
    assert capsys.readouterr().out.splitlines()[1].split("  ")[-1] == "60.0 (+11.1)"


def test_seeds_are_averaged(tmp_path: Path):
    one = folder(tmp_path / "one", trained(0, 0.4), trained(1, 0.5))
    two = folder(tmp_path / "two", trained(0, 0.6), trained(5, 0.7))
    ((_, line),) = compare([one, two]).questions[0].rows
    assert [str(cell.value) for cell in line] == ["45.0 ± 7.1", "65.0 ± 7.1"] and line[1].gain == "+20.0"


@pytest.mark.parametrize(("other", "told"), [
    ({"settings": {"k": [3]}}, "other settings (k)"),
    ({"test": {"name": "b/other", "fingerprint": "x"}}, "other test images (photos.tar::test, other)"),
    ({"train": {"name": "b/other", "fingerprint": "x"}}, "other train images (photos.tar::train, other)"),
    ({"label_map": {"cat": "animal"}}, "other label maps"),
    ({"version": 2}, "versions 1 and 2 of the protocol"),
])  # fmt: skip
def test_other_questions_are_not_compared_and_it_is_said_why(other: dict[str, Any], told: str, tmp_path: Path):
    found = compare([folder(tmp_path / "one", record()), folder(tmp_path / "two", better(**other))])
    assert [[cell.gain for cell in line] for q in found.questions for _, line in q.rows] == [["", ""], ["", ""]]
    assert found.remarks == [f"knn: one is not compared with two: {told}"]


def test_another_image_size_is_told(tmp_path: Path):
    found = compare([folder(tmp_path / "one", record()), folder(tmp_path / "two", better(transform={"size": 224}))])
    assert found.questions[0].rows[0][1][1].gain == "+11.1"
    assert found.remarks == ["the backbones see images at different sizes, in pixels: one 32, two 224"]


def test_a_folder_with_several_backbones_has_several_columns(tmp_path: Path):
    found = compare([folder(tmp_path / "all", record(), better())])
    assert [column.title for column in found.columns] == ["all: my run", "all: other"]
    (tmp_path / "x").mkdir()
    twice = compare([tmp_path / "all", folder(tmp_path / "x" / "all", record(), better())])
    assert [c.title for c in twice.columns] == [
        "all: my run (1)", "all: other (1)", "all: my run (2)", "all: other (2)"]  # fmt: skip


def test_the_page_and_markdown_hold_the_table_and_harm_nobody(tmp_path: Path):
    one, two = folder(tmp_path / "one", record(ATTACK)), folder(tmp_path / "two", better(protocol=ATTACK))
    compare([one, two], tmp_path / "page.html")
    compare([one, two], tmp_path / "page.md")
    page = Elements((tmp_path / "page.html").read_text())
    assert page.count("script") == 0 and "60.0" in page.text and "+11.1" in page.text
    text = (tmp_path / "page.md").read_text()
    assert "60.0 (+11.1) |" in text and "\\<script\\>" in text and " <script" not in text


def test_what_cannot_be_compared_is_refused(tmp_path: Path):
    one = folder(tmp_path / "one", record())
    with pytest.raises(UserError, match="only one backbone"):
        compare([one])
    with pytest.raises(UserError, match=r"holds no evaluation.json"):
        compare([one, tmp_path])
    with pytest.raises(UserError, match=r"neither in .md nor in .html"):
        compare([one, one], tmp_path / "page.txt")
