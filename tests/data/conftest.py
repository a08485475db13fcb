"""A folder of pictures, and a count of the headers that are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessella.data import index as index_module
from tests.data.pictures import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures")


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each header that is read."""
    calls: list[int] = []
    original = index_module.probe_with

    def counting(read, size):
        calls.append(size)
        return original(read, size)

    monkeypatch.setattr(index_module, "probe_with", counting)
    return calls
