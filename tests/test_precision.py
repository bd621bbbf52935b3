"""Number formats on processors with and without instructions for 16-bit numbers."""

import psutil
import pytest
import torch

from alter.models import precision
from alter.models.loading import load_model
from alter.training.loss import training_arguments
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import byte_tokenizer, pico, run_on, save_pico, write_people

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """Sets whether the processor has instructions for bfloat16."""

    def has(them):
        monkeypatch.setattr(
            precision,
            "multiplies",
            lambda dtype, _: dtype not in (torch.bfloat16, torch.float16) or (them and dtype == torch.bfloat16),
        )

    return has


def save(folder, dtype):
    pico().to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_what_multiplies():
    assert precision.multiplies(torch.float32, CPU)
    assert precision.multiplies(torch.float64, CPU)
    assert not precision.multiplies(torch.float16, CPU)
    assert precision.multiplies(torch.float16, torch.device("cuda"))
    assert precision.multiplies(torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(
    ("stored", "fast", "asked", "found"),
    [
        (torch.bfloat16, False, "auto", torch.float32),
        (torch.bfloat16, True, "auto", torch.bfloat16),
        (torch.bfloat16, False, "bfloat16", torch.bfloat16),
        (torch.float16, True, "auto", torch.float32),
        (torch.float32, False, "auto", torch.float32),
    ],
)
def test_the_format_that_a_model_is_loaded_in(tmp_path, processor, capsys, stored, fast, asked, found):
    save(tmp_path, stored)
    processor(fast)
    precision._say_wide.cache_clear()
    assert load_model(str(tmp_path), dtype=asked, device="cpu")[0].dtype == found
    assert load_model(str(tmp_path), dtype=asked, device="cpu")[0].dtype == found
    # of what takes more memory than its file it is said, once
    widened = stored == torch.bfloat16 and found == torch.float32
    assert capsys.readouterr().err.count("loaded in float32") == widened


def test_a_model_too_large_in_float32_stays_as_it_is(tmp_path, processor, monkeypatch):
    save(tmp_path, torch.bfloat16)
    processor(False)
    free = type("Free", (), {"available": 1000})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert load_model(str(tmp_path), device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("fast", [True, False])
def test_training_autocasts_where_it_pays(tmp_path, processor, capsys, monkeypatch, fast):
    save_pico(tmp_path / "model", max_position_embeddings=256)
    data = write_people(tmp_path, ["Ada", "Bo"], 2, 4)
    processor(fast)
    seen = []
    monkeypatch.setattr(
        "alter.training.run.training_arguments", lambda *a: seen.append(training_arguments(*a)) or seen[-1]
    )
    unlearn(
        Unlearn.model_validate({**run_on(data, tmp_path / "run"), "method": "npo_gd", "bf16": True, "max_steps": 1})
    )
    assert seen[0].bf16 is fast
    assert ("computes in float32" in capsys.readouterr().err) is not fast
