"""What `tessella scan` says about a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import tessella


def test_missing_files_of_a_list_are_one_line_in_brief_and_complete_otherwise(tmp_path: Path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "there.png")
    missing = [f"missing-{number}.png" for number in range(15)]
    (tmp_path / "list.csv").write_text("\n".join(["path", "there.png", *missing]))
    scan = tessella.scan(tmp_path / "list.csv", workers=1)
    brief, complete = scan.lines(brief=True), scan.lines()
    [line] = [line for line in brief if "missing" in line]
    assert line.split(": ")[0].split() == ["15", "x", "the", "file", "cannot", "be", "read"] and line.endswith(", ...")
    assert "            all of them: tessella scan DATA > FILE" in brief
    assert sum("missing" in line for line in complete) == 15
