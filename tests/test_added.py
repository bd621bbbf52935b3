"""Metrics that plugins add to benchmarks that alter brings."""

import sys

import numpy as np
import pytest

import alter
from alter import plugins
from alter.attacks.techniques import ATTACKS, Technique
from alter.evaluation import added
from alter.evaluation.added import METRICS, metric
from alter.metrics import CATALOGUE
from alter.storage import Record
from pico import save_pico
from test_muse import stand_in


@pytest.fixture(autouse=True)
def _alone():
    """What a test adds is gone after it."""
    before = dict(METRICS._parts), dict(CATALOGUE), set(plugins._foreign)
    yield
    METRICS._parts.clear()
    METRICS._parts.update(before[0])
    CATALOGUE.clear()
    CATALOGUE.update(before[1])
    plugins._foreign.clear()
    plugins._foreign.update(before[2])


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    return str(save_pico(tmp_path_factory.mktemp("added") / "model", max_position_embeddings=1024))


def tofu(named, folder="off", **given):
    return alter.evaluate(named, split="forget01", limit=2, device="cpu", cache=str(folder), **given)


def test_tofu_has_a_metric_of_a_plugin_and_its_results_are_kept_with_it(named, tmp_path):
    calls = []

    @metric("forget_words", "words of a reply", benchmarks=["tofu"], higher_is_better=False)
    def words(seen):
        calls.append(seen.settings.split)
        replies = seen.record("forget_rouge").extra["generations"]
        return [float("nan"), *(len(reply.split()) for reply in replies[1:])]

    found = {record.metric: record for record in tofu(named, tmp_path / "kept")}
    own = found["forget_words"]
    texts = found["forget_rouge"].extra["generations"]
    assert (own.model, own.value, own.n) == ("original", len(texts[1].split()), 1)
    assert own.higher_is_better is False
    assert own.provenance == found["forget_rouge"].provenance
    again = {record.metric: record for record in tofu(named, tmp_path / "kept")}
    assert again["forget_words"].value == own.value
    assert calls == ["forget01"]
    # a metric that is not there any more is not in the result of the others
    assert "forget_words" not in {record.metric for record in alter.evaluate(
        named, benchmark="rows", forget=[{"question": "Who?", "answer": "Ada."}], answers=0, device="cpu"
    )}  # fmt: skip


def test_muse_has_one_that_asks_the_model_itself(named, tmp_path):
    @metric("weights", "how many there are", benchmarks=["tofu", "muse"])
    def weights(seen):
        assert seen.tokenizer.pad_token_id is not None
        return Record("anyone", "any", float(seen.model.num_parameters()), 1, extra={"of": seen.settings.corpus})

    data = stand_in(tmp_path / "data")
    given = {"corpus": "news", "data": str(data), "criteria": ["verbmem"], "device": "cpu", "cache": "off"}
    found = {record.metric: record for record in alter.evaluate(named, benchmark="muse", name="mine", **given)}
    assert set(found) == {"verbmem", "weights"}
    assert (found["weights"].model, found["weights"].extra) == ("mine", {"of": "news"})
    assert found["weights"].value > 1000


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["some", "text"], r"The metric 'mine' gives a list: \['some', 'text'\]; expected a number for each item"),
        (None, "gives a NoneType: None; expected a number"),
        ([], r"gives a list: \[\]; expected"),
        ([np.nan], r"gives a list: \[nan\]; expected"),
        ([1.0, np.inf], r"gives a list: \[1\.0, inf\]; expected"),
        (0.5, r"gives a float: 0\.5; expected"),
    ],
)
def test_what_a_metric_gives_is_checked(given, says):
    seen = added.Seen(type("Settings", (), {"label": "m"})(), None, None, ())
    with pytest.raises(alter.UserError, match=says):
        added.added_records(seen, {"mine": lambda seen: given})


def test_names_and_benchmarks_are_checked_before_a_model_is_loaded(monkeypatch):
    with pytest.raises(alter.UserError, match="already a metric named 'forget_rouge'"):
        metric("forget_rouge", "words", benchmarks=["tofu"])(len)
    seen = added.Seen(None, None, None, (Record("m", "forget_rouge", 1.0, 1),))
    with pytest.raises(alter.UserError, match=r"gave no 'forget_roug'\. Did you mean 'forget_rouge'"):
        seen.record("forget_roug")
    metric("mine", "words", benchmarks=["tofuu"])(lambda seen: [1.0])
    with pytest.raises(
        alter.UserError, match=r"'mine' is for the benchmark 'tofuu'; expected one of .*Did you mean 'tofu'"
    ):
        tofu("no model")


def test_a_result_is_not_kept_where_the_code_of_a_metric_lies_in_no_file(named, tmp_path, monkeypatch):
    """A cell of a notebook that was edited got the figure of the cell before."""

    def defined(value):
        space = {"__name__": "cell"}
        exec(f"def mine(seen):\n    return [{value}]", space)
        metric("mine", "a number", benchmarks=["tofu"])(space["mine"])

    monkeypatch.setitem(sys.modules, "cell", type(sys)("cell"))
    values = []
    for value in (1.0, 2.0):
        # as a cell that is run again, the function of the name takes the place of the former
        defined(value)
        values += [record.value for record in tofu(named, tmp_path / "kept") if record.metric == "mine"]
    assert values == [1.0, 2.0]


def test_the_code_of_an_attack_that_is_all_of_a_plugin_is_known():
    def shout(bench):
        return []

    try:
        ATTACKS.add("loud", Technique("a chat with the model", shout))
        assert __name__ in plugins._foreign
        with pytest.raises(alter.UserError, match="already a part named 'loud'"):
            ATTACKS.add("loud", Technique("a chat with the model", stand_in))
    finally:
        ATTACKS._parts.pop("loud", None)
