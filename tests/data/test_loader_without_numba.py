"""Everything that is asked of the loader holds without compiled kernels too."""

import pytest

from tessella.data import loader as loader_module
from tests.data.test_loader import *  # noqa: F403  the same tests again


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    monkeypatch.setattr(loader_module, "kernels", lambda: None)
