"""What every test starts from."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

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


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that looks for another machine, also where the program bears the refusal."""
    asked: list[object] = []

    def refuse(*given: object, **options: object) -> NoReturn:
        asked.append(given)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    yield
    assert not asked, f"the network was asked for: {asked}"
