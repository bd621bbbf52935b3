"""Trackers of experiments: losses go where they are asked to go, and nowhere by default."""

import importlib.util

import pytest

from alter.core.errors import UserError
from alter.distillation.run import distill
from alter.distillation.settings import Distill
from alter.forgetting.run import training
from alter.forgetting.settings import Forget
from alter.training import trackers
from alter.training.finetune import Finetune, finetune
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import run_on, save_pico, write_people


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    made = write_people(tmp_path_factory.mktemp("data"), ["Ada"], 4, 4)
    save_pico(made / "model")
    return made


def settings(data, out, **changes):
    fit = {"method": "logistic", "background": False, "rewordings": 0, "false_alarms": None, "steps": 5}
    given = {"adapter": {"r": 4}, "router_fit": fit, "max_steps": 10, "batch_size": 4, **changes}
    return Unlearn.model_validate({**run_on(data, out), **given})


def test_tensorboard_gets_the_losses_and_no_rows(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = settings(data, tmp_path / "run", report_to=["tensorboard"])
    out = unlearn(run)
    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    scalars = found.Tags()["scalars"]
    assert {"train/loss", "train/forget", "train/retain"} <= set(scalars)
    assert [event.step for event in found.Scalars("train/forget")] == [10]
    written = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert b"In town" not in written
    assert b"Ada" not in written


def test_nothing_is_sent_by_default(data, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.TensorBoardCallback", None)
    assert not (unlearn(settings(data, tmp_path / "run")) / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_made(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else importlib)
    with pytest.raises(UserError, match="pip install wandb"):
        unlearn(settings(data, tmp_path / "run", report_to=["wandb"]))
    assert not (tmp_path / "run").exists()


def test_finetune_and_distill_send_their_losses_too(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = str(data / "forget.jsonl")
    tuned = finetune(
        Finetune(
            model=str(data / "model"),
            data=[rows],
            out=str(tmp_path / "tuned"),
            max_steps=2,
            log_steps=1,
            max_length=64,
            report_to=["tensorboard"],
        )
    )
    taught = distill(
        Distill(
            model=str(data / "model"),
            forget=rows,
            retain=str(data / "retain.jsonl"),
            general=[str(data / "retain.jsonl")],
            noise={"alpha": 0.1},
            out=str(tmp_path / "taught"),
            max_steps=2,
            log_steps=1,
            closing_rows=0,
            report_to=["tensorboard"],
        )
    )
    for out in (tuned, taught):
        found = EventAccumulator(str(out / "tensorboard"))
        found.Reload()
        assert [event.step for event in found.Scalars("train/loss")] == [1, 2]
    run = training(Forget(subject="Ada", model="m", out=str(tmp_path / "f"), report_to=["trackio"]), tmp_path / "f")
    assert run.report_to == ["trackio"]
