"""Metrics that plugins add to benchmarks that alter brings."""

import csv
import json
import sys

import numpy as np
import pytest

import alter
from alter import cli, plugins
from alter.attacks.techniques import ATTACKS, Technique
from alter.comparison import cell, plan
from alter.comparison.settings import Compare
from alter.data.tofu import tofu_rows
from alter.evaluation import added
from alter.evaluation.added import ADDED, metric
from alter.evaluation.base import Evaluation
from alter.evaluation.musecurve import MuseCurve, muse_curve
from alter.evaluation.run import measured
from alter.metrics import CATALOGUE
from alter.models.loading import load_model
from alter.storage import Record
from alter.storage.records import read_records
from pico import save_pico, write_jsonl
from test_muse import stand_in


@pytest.fixture(autouse=True)
def _alone():
    """What a test adds is gone after it."""
    before = dict(ADDED._parts), dict(CATALOGUE), set(plugins._foreign)
    yield
    ADDED._parts.clear()
    ADDED._parts.update(before[0])
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


def test_a_benchmark_of_a_notebook_is_measured_each_time(named, tmp_path, monkeypatch):
    """An edited cell got the figures of the cell before."""
    monkeypatch.setitem(sys.modules, "cell", type(sys)("cell"))
    values = []
    for value in (1.0, 2.0):
        space = {"__name__": "cell", "Evaluation": Evaluation, "Record": Record, "value": value}
        exec(
            "class Own(Evaluation):\n"
            "    def title(self): return 'own'\n"
            "    def data_digest(self): return 'data'\n"
            "    def measure(self, model, tokenizer): return [Record(self.label, 'forget_rouge', value, 1)]\n",
            space,
        )
        own = space["Own"](model=named, device="cpu", cache=str(tmp_path / "kept"))
        values += [record.value for record in measured(own)]
    assert values == [1.0, 2.0]


def test_the_points_of_a_curve_have_it(named, tmp_path):
    @metric("weights", "how many there are", benchmarks=["muse"])
    def weights(seen):
        return Record("anyone", "any", float(seen.model.num_parameters()), 1)

    given = {"corpus": "news", "data": str(stand_in(tmp_path / "data")), "criteria": ["verbmem"], "device": "cpu"}
    curve = MuseCurve(model=named, criterion="scalability", points=[f"1={named}"], cache="off", **given)
    found = [(record.model, record.extra.get("x")) for record in muse_curve(curve) if record.metric == "weights"]
    assert found == [("original", 0.0), ("1", 1.0)]


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = """
import os
from alter.evaluation.added import metric

@metric("steps", "characters of a reply", benchmarks=["rows", "tofu"], higher_is_better=False)
def characters(seen):
    assert os.path.isfile(seen.settings.forget)
    return [float(len(reply)) for reply in seen.record("forget_rouge").extra["generations"]]
"""


def test_a_comparison_has_a_column_of_it(tmp_path, monkeypatch, capsys):
    """Of a metric that has the name of a cost, too; every cell's own process measures it."""
    (tmp_path / "words.py").write_text(WORDS)
    named = str(save_pico(tmp_path / "model", max_position_embeddings=64, **SMALL))
    for name, count in (("forget", 6), ("retain", 6)):
        write_jsonl(
            tmp_path / f"{name}.jsonl", [{"question": f"{name} {i}?", "answer": f"{i}."} for i in range(count)]
        )
    recipe = {
        "model": named, "methods": ["graddiff"], "out": str(tmp_path / "out"), "seeds": [0], "rates": [1.0], "epochs": [1],
        "forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl"), "device": "cpu", "workers": 1,
        "common": {"max_steps": 1, "batch_size": 4},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(recipe))
    monkeypatch.setenv("ALTER_PLUGINS", "")
    assert cli.main(["compare", str(tmp_path / "own.yaml"), "--plugin", str(tmp_path / "words.py")]) == 0
    assert "rows: steps ↓" in (tmp_path / "out" / "table.md").read_text()
    assert "steps, of a plugin: characters of a reply." in (tmp_path / "out" / "table.md").read_text()
    lines = {line["method"]: line for line in csv.DictReader((tmp_path / "out" / "table.csv").open())}
    for name in ("original", "graddiff"):
        (cell,) = {r.extra["cell"] for r in read_records(tmp_path / "out" / "records.json") if r.model == name}
        records = {r.metric: r for r in read_records(tmp_path / "out" / "cells" / cell / "test-rows.json")}
        replies = records["forget_rouge"].extra["generations"]
        assert records["steps"].value == pytest.approx(np.mean([len(reply) for reply in replies]))
        assert float(lines[name]["plugin:steps"]) == pytest.approx(records["steps"].value)
    assert lines["graddiff"]["steps"] == "1.0"


def test_cells_of_tofu_have_it(tmp_path):
    named = str(save_pico(tmp_path / "model", max_position_embeddings=300, **SMALL))

    @metric("split", "of what", benchmarks=["tofu"])
    def split(seen):
        rows = tofu_rows("forget10_perturbed", seen.settings.data)
        return Record("m", "split", float(len(rows)), 1, extra={"split": seen.settings.split})

    evaluation = {"forget": "forget10_perturbed", "retain": "retain_perturbed"}
    wrong = {"paraphrased_answer": "That.", "perturbed_answer": ["No.", "Nothing."]}
    for name in (*evaluation.values(), "real_authors_perturbed", "world_facts_perturbed"):
        write_jsonl(tmp_path / f"{name}.json", [{"question": f"{name}?", "answer": "It is."} | wrong] * 2)
    spec = {"name": "npo", "model": named, "limit": None}
    found = {
        r.metric: r for r in cell._figures(spec, "forget10", *load_model(named, None, "float32", "cpu"), tmp_path)
    }
    assert (found["split"].model, found["split"].value, found["split"].extra) == ("npo", 2.0, {"split": "forget10"})
    assert "forget_truth_ratio" in found


def test_a_comparison_refuses_one_that_its_cells_would_not_know(named, tmp_path):
    metric("mine", "words", benchmarks=["tofu"])(lambda seen: [1.0])
    given = Compare(model=named, methods=["npo"], out=str(tmp_path / "out"))
    with pytest.raises(alter.UserError, match="The metric 'mine' is registered in this process alone"):
        plan.lay_out(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
