"""Every preset against the values that were published for it (src/alter/methods/published.yaml), and its warm-up."""

import re

import pytest
import torch

from alter.guarding.settings import MAKERS
from alter.methods.adapters import FirstHalves
from alter.methods.presets import METHODS, published
from alter.training.settings import Unlearn, steps_of, warmup_of

GIVEN = {"model": "m", "forget": "f", "retain": "r", "out": "o"}


def flat(settings, prefix=""):
    """{"adapter": {"r": 8}} as {"adapter.r": 8}."""
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


SOURCE = r"[\w.-]+/[\w.-]+@[0-9a-f]{7} \S+$|arXiv:\d{4}\.\d{5}|paper: "
"""A repository's file is named with its commit."""


def test_every_preset_and_every_guard_has_its_published_values():
    assert list(published()) == [*METHODS, *(f"guard.{kind}" for kind in MAKERS)]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_guard_is_what_was_published(kind):
    entry, maker = published()[f"guard.{kind}"], MAKERS[kind]()
    settings = maker.model_dump(exclude={"kind"})
    assert {key: settings.get(key) for key in entry["values"]} == entry["values"]
    assert entry["sources"]
    assert all(re.match(SOURCE, source) for source in entry["sources"])
    # what a guard is given for its rows and model is nobody's value
    given = {key for key, value in settings.items() if value not in (None, [])}
    assert given == set(entry["values"]) | set(entry["ours"])


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_what_was_published(name):
    entry = published()[name]
    run = flat(Unlearn.model_validate({**GIVEN, "method": name}).model_dump(mode="json"))
    wrong = {key: (value, run.get(key)) for key, value in entry.get("values", {}).items() if run.get(key) != value}
    assert not wrong, "published, and in the preset"
    if entry["ours"] == ["*"]:
        return
    assert entry["sources"]
    for source in entry["sources"]:
        assert re.match(SOURCE, source), source
    given = set(flat(METHODS[name].settings)) - {"lambda_"}
    kinds = {key for key in given if key.endswith("objective.kind") or key == "initializer.kind"}
    unsaid = given - kinds - set(entry["values"]) - set(entry["ours"])
    assert not unsaid, "settings without a source: name it, or list them under `ours`"
    assert not set(entry["ours"]) & set(entry["values"])


@pytest.mark.parametrize(
    ("given", "count", "warm"),
    [
        # 40 rows, 4 a step: 10 steps an epoch, 30 in all
        ({"warmup_epochs": 1.0}, 40, 10),
        ({"warmup_epochs": 1.0}, 43, 10),
        ({"warmup_epochs": 0.5}, 40, 5),
        ({"warmup_epochs": 1.0}, 3, 1),
        ({"warmup_ratio": 0.1}, 40, 3),
        ({"warmup_steps": 7}, 40, 7),
        # the last step has the full rate
        ({"warmup_epochs": 9.0}, 40, 29),
        ({"warmup_epochs": 1.0, "max_steps": 1}, 40, 0),
        ({}, 40, 0),
    ],
)
def test_a_warm_up_in_each_unit(given, count, warm):
    run = Unlearn.model_validate({**GIVEN, **given})
    assert warmup_of(run, count, steps_of(run, count)[0]) == warm


def test_a_warm_up_that_is_given_replaces_the_presets():
    run = Unlearn.model_validate({**GIVEN, "method": "npo", "warmup_steps": 5})
    assert (run.warmup_steps, run.warmup_epochs) == (5, 0.0)
    assert Unlearn.model_validate(run.model_dump(mode="json")) == run
    with pytest.raises(ValueError, match="give one"):
        Unlearn.model_validate({**GIVEN, "warmup_steps": 5, "warmup_ratio": 0.1})


# what the authors' code makes of its settings on TOFU's forget10, 400 rows
STEPS = {
    # forget.py: five alternatives a row are the data set, 57 steps of 35 of its 2000 rows an epoch, the first of two warming up
    "altpo": {"rows": 35, "warm": 57},
    # run.sh and configs/trainer/finetune.yaml: 4 rows for each of 8 processes, four times; an epoch of 3 steps warms up
    "pdu": {"rows": 128, "warm": 3},
    # ft_utils.py halves the batch of the command line
    "undial": {"rows": 32, "warm": 100},
    # core.py: no warm-up given is one of an epoch
    "reglu": {"rows": 32, "warm": 12},
    # forget_auto_tofu.py: no warm-up, whatever the settings say
    "gru": {"rows": 32, "warm": 0},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_and_a_warm_up_are_as_long_as_the_authors_code_makes_them(name):
    run = Unlearn.model_validate({**GIVEN, "method": name})
    warm = warmup_of(run, 400, steps_of(run, 400)[0])
    assert {"rows": run.batch_size * run.gradient_accumulation_steps, "warm": warm} == STEPS[name]


@pytest.mark.parametrize("name", ["rmu", "elm", "e2urec", "gru", "lunar", "iau", "repselect"])
def test_no_step_is_cut_short_that_the_authors_do_not_cut(name):
    assert Unlearn.model_validate({**GIVEN, "method": name}).max_grad_norm >= 1e9


def test_undial_adapts_what_its_authors_adapt():
    adapter = Unlearn.model_validate({**GIVEN, "method": "undial"}).adapter.model_dump()
    assert {key: adapter[key] for key in ("r", "alpha", "dropout", "target_modules")} == {
        "r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip


def test_weight_decay_moves_the_trained_half_alone_and_as_adamw_does():
    generator = torch.Generator().manual_seed(0)
    A = torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    B = torch.nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
    before, naive = [A.detach().clone(), B.detach().clone()], [A.detach().clone(), B.detach().clone()]
    optimizer = torch.optim.AdamW([A, B], lr=0.1, weight_decay=0.0)
    optimizer.register_step_pre_hook(FirstHalves([("x.lora_A.d", A), ("x.lora_B.d", B)], 2, 0.5))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = rate = 0.1 / (step + 1)
        A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
        optimizer.step()
        for i in range(2):
            naive[0][i] -= rate * 0.5 * naive[0][i]
            naive[1][:, i] -= rate * 0.5 * naive[1][:, i]
    assert torch.equal(A[2:], before[0][2:])
    assert torch.equal(B[:, 2:], before[1][:, 2:])
    torch.testing.assert_close(A.detach(), naive[0])
    torch.testing.assert_close(B.detach(), naive[1])
