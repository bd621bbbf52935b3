"""What a run takes that chooses no method, and how long few rows are trained on."""

import pytest

from alter import cli
from alter.methods.presets import DEFAULT, METHODS, with_default
from alter.training.settings import Unlearn, lengthened

NAMES = {"model": "m", "forget": "f", "retain": "r", "out": "o"}


def parsed(*flags):
    names = [part for name, value in NAMES.items() for part in (f"--{name}", value)]
    return cli.parse("unlearn", Unlearn, [*names, *flags])


def test_a_run_that_chooses_nothing_gets_the_bounded_objective_on_experts_alone():
    run = parsed()
    assert run.method == DEFAULT
    assert (run.objective.kind, run.objective.hinge, run.experts_only) == ("without_truth", 2.0, True)
    assert parsed("--learning-rate-experts", "0.5").learning_rate_experts == 0.5
    assert parsed("--adapter.r", "4").objective.kind == "without_truth"
    # the settings themselves stay the paper's, so that what a run has written down keeps its meaning
    assert Unlearn(**NAMES).objective.kind == "inverted_hinge"


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (("--method", "alter"), "inverted_hinge"),
        (("--objective.kind", "inverted_hinge"), "inverted_hinge"),
        (("--adapter.kind", "lora", "--objective.kind", "npo"), "npo"),
        (("--method", "npo"), "npo"),
    ],
)
def test_whoever_chooses_gets_what_was_chosen(flags, kind):
    run = parsed(*flags)
    assert run.objective.kind == kind
    assert run.method != DEFAULT
    assert not run.experts_only


def test_the_default_is_a_method_and_a_recipe_may_choose_another():
    assert DEFAULT in METHODS
    assert with_default({"epochs": 2}) == {"epochs": 2, "method": DEFAULT}
    for chosen in ({"method": "ga"}, {"objective": {"kind": "npo"}}, {"adapter": {"kind": "full"}}):
        assert with_default(chosen) == chosen
    assert with_default({"adapter": {"r": 4}})["method"] == DEFAULT


@pytest.mark.parametrize(
    ("rows", "batch", "accumulated", "least", "epochs"),
    [(40, 4, 1, 60, 6.0), (400, 4, 1, 60, 3.0), (7, 4, 2, 60, 480 / 7), (40, 4, 1, 0, 3.0)],
)
def test_few_rows_are_passed_over_more_often(rows, batch, accumulated, least, epochs):
    run = Unlearn(**NAMES, batch_size=batch, gradient_accumulation_steps=accumulated, least_steps=least)
    longer = lengthened(run, rows)
    assert longer.epochs == pytest.approx(epochs)
    assert run.epochs == 3
