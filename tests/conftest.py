"""One thread per test process: models here are tiny, and threads that wait for each other cost more than they give."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, nor that of another test."""
    monkeypatch.setenv("ALTER_CACHE", str(tmp_path_factory.mktemp("cache", numbered=True)))
