"""The folder of an evaluation: who writes there, and what is cleared."""

from __future__ import annotations

import os
from pathlib import Path

from tessella.evaluation.records import RecordFile


def test_what_killed_evaluations_have_left_goes_and_what_a_run_may_be_writing_stays(tmp_path: Path):
    for name in (".saving-old", ".saving-new"):
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / ".saving-old", (0, 0))
    with RecordFile.opened(tmp_path):
        assert not (tmp_path / ".saving-old").exists() and (tmp_path / ".saving-new").exists()
