"""What every test starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _same_start(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, one thread, and caches that no other run can have filled."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tests are small: a second thread costs more than it brings
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Small real image sets beside the repository; a stranger's clone has none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real image sets beside this repository")
    return SHARED_DATA
