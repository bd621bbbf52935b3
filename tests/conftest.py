"""One thread per test process: models here are tiny, and threads that wait for each other cost more than they give.

No test asks the hub: without a network each question would wait for half a minute before it fails.
"""

import gc
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported, which reads it once
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too

import pytest
import torch
import tqdm

from alter.data import background, rewording

torch.set_num_threads(1)
# a thread that looks after progress bars, and holds their lock in a fork for good if it had it then
tqdm.tqdm.monitor_interval = 0
# nothing is cut off from power here, and each flush waits for the disk, of which a run makes dozens
os.fsync = lambda handle: None

WHOLE_BACKGROUND = {"test_ordinary", "test_real", "test_router"}
"""Test files that look at the shipped sample of ordinary text; it costs every fit seconds."""

FEW_MEASURED = (2, 600)
"""Rows that a router is measured on under each wording at the end of every fit, and characters of its long text."""


def pytest_collection_finish():
    """The garbage collection at the end of every run of the trainer passes by all that was imported: 0.7 s a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, nor that of another test."""
    monkeypatch.setenv("ALTER_CACHE", str(tmp_path_factory.mktemp("cache", numbered=True)))


@pytest.fixture(scope="session")
def small_background(tmp_path_factory):
    """Two short passages of every kind."""
    folder = tmp_path_factory.mktemp("background")
    for path in background.FOLDER.rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:2]]
        rows = [row | {"text": row["text"][:200]} if "text" in row else row for row in rows]
        to = folder / path.relative_to(background.FOLDER)
        to.parent.mkdir(exist_ok=True)
        to.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # what Python runs first in the processes that a test starts
    (folder / "sitecustomize.py").write_text(
        "import os\nimport pathlib\nfrom alter.data import background, rewording\nos.fsync = lambda handle: None\n"
        f"background.FOLDER = pathlib.Path({str(folder)!r})\nrewording.MEASURED_ROWS, rewording.LONG_TEXT = {FEW_MEASURED}\n"
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def _background(request, small_background):
    """Fits of the router and the last table of a run see the small sample where it is not what is tested, in all processes."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in WHOLE_BACKGROUND:
            patch.setattr(background, "FOLDER", small_background)
            patch.setattr(rewording, "MEASURED_ROWS", FEW_MEASURED[0])
            patch.setattr(rewording, "LONG_TEXT", FEW_MEASURED[1])
            patch.setenv("PYTHONPATH", str(small_background), prepend=os.pathsep)
        yield
