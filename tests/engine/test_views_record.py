"""Which execution made a run's views is on record, and a resume by another one says so."""

import json

import pytest

from tessella.ops import compiled
from tessella.run import folder as run_folder
from tessella.run.folder import RunFolder, environment


def test_the_record_of_a_run_says_who_makes_its_views():
    assert environment()["views"] == compiled.in_words()


@pytest.mark.parametrize(("before", "said"), [("torch", True), ("compiled", False), (None, False), (3, False)])
def test_a_resume_with_views_made_otherwise_is_said(before, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder.compiled, "in_words", lambda: "compiled")
    (tmp_path / "environment.json").write_text(json.dumps({"views": before}))
    RunFolder(tmp_path)._warn_of_other_views()
    assert ("views were made by torch" in capsys.readouterr().err) == said


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_record_that_cannot_be_read_stops_nothing(text, tmp_path):
    (tmp_path / "environment.json").write_text(text)
    RunFolder(tmp_path)._warn_of_other_views()
