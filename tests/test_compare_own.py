"""`alter compare` on rows of one's own: how they are divided, what is measured, and a table from the command line."""

import json
import statistics

import datasets
import numpy as np
import pytest
import torch
from scipy import stats

import alter
from alter import cli
from alter.comparison import choice, own, plan, rules
from alter.comparison.choice import cell_figures
from alter.comparison.division import MOST_KEPT, PARTS, divide, evaluation_rows
from alter.comparison.settings import Compare
from alter.core.errors import UserError
from alter.data.rows import load_examples
from alter.evaluation.answered import answer_rows
from alter.metrics import membership
from alter.models.loading import load_model
from alter.storage.records import read_records
from pico import save_pico, write_jsonl

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FORGET, KEPT, UNSEEN = 12, 30, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of three forms to forget, of four people; questions to keep; questions that no model saw; two pico models."""
    folder = tmp_path_factory.mktemp("own")
    forget = [{"question": f"Q{i}?", "answer": f"It is {i}.", "who": f"p{i % 4}"} for i in range(FORGET - 4)]
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Пётр и 王."}]
    forget += [{"messages": [*said, {**said[0], "content": "And?"}, {**said[1], "content": "Ада."}], "who": "p0"}]
    forget += [{"text": f"A letter of number {i}, about nothing.", "who": f"p{i}"} for i in (1, 2)]
    write_jsonl(folder / "forget.jsonl", forget)
    write_jsonl(folder / "retain.jsonl", [{"question": f"R{i}?", "answer": f"Yes {i}."} for i in range(KEPT)])
    write_jsonl(folder / "unseen.jsonl", [{"question": f"U{i}?", "answer": f"No {i}."} for i in range(UNSEEN)])
    save_pico(folder / "model", max_position_embeddings=512, **SMALL)
    save_pico(folder / "retrained", max_position_embeddings=512, seed=1, **SMALL)
    return folder


def settings(place, out, **changes):
    given = dict(
        model=str(place / "model"),
        methods=["graddiff", "npo"],
        out=str(out),
        forget=str(place / "forget.jsonl"),
        retain=str(place / "retain.jsonl"),
        seeds=[0],
        rates=[1.0, 3.0],
        epochs=[1],
        common={"max_steps": 1, "batch_size": 4},
        retrained={"rows": str(place / "retrained")},
        device="cpu",
        workers=1,
    )
    return Compare.model_validate({**given, **changes})


def key(row):
    return json.dumps(row, sort_keys=True)


@pytest.mark.parametrize("column", [None, "who"])
def test_each_row_is_in_one_part_and_what_belongs_together_stays(data, tmp_path, column):
    wanted = settings(data, tmp_path, common={"domain_column": column}, holdout=str(data / "unseen.jsonl"))
    parts = evaluation_rows(wanted, "rows")
    assert list(parts) == list(PARTS)
    for of, source, most in (
        ("forget", "forget.jsonl", 99),
        ("retain", "retain.jsonl", 20),
        ("holdout", "unseen.jsonl", 99),
    ):
        rows = [row.row for row in load_examples(str(data / source))]
        found = {part: list(map(key, own[of])) for part, own in parts.items()}
        assert not set(found["validation"]) & set(found["test"])
        assert set(found["validation"]) | set(found["test"]) <= set(map(key, rows))
        assert all(0 < len(each) <= most for each in found.values())
        if of != "retain":
            assert sum(map(len, found.values())) == len(rows)
    forget = {part: own["forget"] for part, own in parts.items()}
    if column:
        people = {part: {row["who"] for row in rows} for part, rows in forget.items()}
        assert not people["validation"] & people["test"]
        assert people["validation"] | people["test"] == {"p0", "p1", "p2", "p3"}
    # a chat's two answers are two rows of one part
    chats = {part: sum("messages" in row for row in rows) for part, rows in forget.items()}
    assert sorted(chats.values()) == [0, 2]
    again = evaluation_rows(wanted, "rows")
    assert again == parts


def test_as_many_rows_are_kept_as_are_to_be_forgotten_but_not_more_than_the_most(data, tmp_path):
    many = write_jsonl(tmp_path / "many.jsonl", [{"question": f"M{i}?", "answer": f"{i}"} for i in range(1000)])
    kept = write_jsonl(tmp_path / "kept.jsonl", [{"question": f"K{i}?", "answer": f"{i}"} for i in range(2000)])
    parts = evaluation_rows(settings(data, tmp_path, forget=str(many), retain=str(kept), validation=0.1), "rows")
    sizes = {part: (len(own["forget"]), len(own["retain"])) for part, own in parts.items()}
    assert sizes == {"validation": (100, 100), "test": (900, MOST_KEPT)}


def rows_in(folder, data, holdout=True):
    """A part's files, as a comparison writes them."""
    for of, name in (("forget", "forget"), ("retain", "retain"), *((("holdout", "unseen"),) if holdout else ())):
        write_jsonl(folder / f"{of}.json", [row.row for row in load_examples(str(data / f"{name}.jsonl"))])
    return folder


def test_figures_are_those_of_loops_over_the_rows(data, tmp_path):
    model, tokenizer = load_model(str(data / "model"), None, "float32", "cpu")
    found = {r.metric: r for r in own.own_records("m", model, tokenizer, rows_in(tmp_path, data), None)}
    rows = {
        of: load_examples(str(data / f"{name}.jsonl")) for of, name in (("forget", "forget"), ("retain", "retain"))
    }
    losses = {}
    for of, own_rows in [*rows.items(), ("holdout", load_examples(str(data / "unseen.jsonl")))]:
        losses[of] = []
        for row in own_rows:
            encoded = own_encoded(tokenizer, row)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(-1)
            told = [-float(logits[t - 1, y]) for t, y in enumerate(encoded.labels) if t and y != -100]
            losses[of].append(sum(told) / len(told))
    for of in rows:
        np.testing.assert_allclose(found[f"{of}_probability"].per_item, np.exp(-np.array(losses[of])), rtol=1e-4)
        assert found[f"{of}_probability"].value == pytest.approx(statistics.fmean(found[f"{of}_probability"].per_item))
        assert len(found[f"{of}_rouge"].extra["generations"]) == found[f"{of}_rouge"].n == len(rows[of])
    a, b = found["retain_probability"].value, found["retain_rouge"].value
    assert found["model_utility"].value == pytest.approx(0.0 if not a * b else 2 * a * b / (a + b))
    wins = sum((h > f) + 0.5 * (h == f) for f in losses["forget"] for h in losses["holdout"])
    assert found["mia_loss"].value == pytest.approx(wins / (len(losses["forget"]) * UNSEEN))
    assert {r.extra["benchmark"] for r in found.values()} == {"rows"}
    few = {r.metric: r for r in own.own_records("m", model, tokenizer, tmp_path, 3)}
    assert few["forget_probability"].per_item == pytest.approx(found["forget_probability"].per_item[:3])


def own_encoded(tokenizer, row):
    from alter.data.encoding import encode

    return encode(tokenizer, row)


def test_utility_of_a_model_that_says_what_is_kept(data, tmp_path, monkeypatch):
    """The harmonic mean of figures that are not zero, and its interval around it."""
    model, tokenizer = load_model(str(data / "model"), None, "float32", "cpu")

    def answered(model, tokenizer, rows, **how):
        real = answer_rows(model, tokenizer, rows, **{**how, "answers": None})
        share = np.linspace(0.2, 0.9, len(rows))
        object.__setattr__(real, "probability", share)
        object.__setattr__(real.measures, "recall", share[::-1] ** 2)
        return real

    monkeypatch.setattr(own, "answer_rows", answered)
    found = {r.metric: r for r in own.own_records("m", model, tokenizer, rows_in(tmp_path, data, False), None)}
    share = np.linspace(0.2, 0.9, KEPT)
    figures = share.mean(), (share**2).mean()
    utility = found["model_utility"]
    assert utility.value == pytest.approx(statistics.harmonic_mean(figures))
    assert utility.extra["interval"][0] < utility.value < utility.extra["interval"][1]
    assert "mia_loss" not in found


def test_what_own_rows_are_judged_by(data, tmp_path):
    models = {name: load_model(str(data / name), None, "float32", "cpu") for name in ("model", "retrained")}
    folder = rows_in(tmp_path, data)
    found = {name: own.own_records(name, *each, folder, None) for name, each in models.items()}
    of = {name: next(r for r in records if r.metric == "forget_probability") for name, records in found.items()}
    figures = cell_figures(found["model"], found["retrained"])
    test = stats.ks_2samp(of["model"].per_item, of["retrained"].per_item)
    assert (figures["distance"], figures["forget_quality"]) == pytest.approx((test.statistic, np.log10(test.pvalue)))
    assert choice.forgetting(figures, "retrained") == pytest.approx(1 - test.statistic)
    auc = next(r for r in found["model"] if r.metric == "mia_loss")
    scores = {name: auc.extra["scores"][name] for name in ("forget", "holdout")}
    assert auc.value == membership.auc(scores["forget"], scores["holdout"])
    assert choice.forgetting(cell_figures(found["model"], None), "holdout") == pytest.approx(
        1 - abs(2 * auc.value - 1)
    )
    wanted = settings(data, tmp_path)
    for changes, kind, says in (
        ({}, "retrained", "of its true answers' probabilities on forget rows"),
        ({"retrained": {}, "holdout": str(data / "unseen.jsonl")}, "holdout", "of the loss against rows"),
        ({"retrained": {}}, "rouge", "ROUGE-L"),
    ):
        wanted = settings(data, tmp_path, **changes)
        assert choice.criterion(wanted, "rows") == kind
        told = rules.rules(wanted, {"rows": {"validation": 4, "test": 8}})
        assert any(says in rule for rule in told)
        assert any(rule.startswith("Division: rows shuffled") and "no wrong answers" in rule for rule in told)
        assert not any("author" in rule for rule in told)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"retain": None}, "rows of your own to keep are missing: give `retain`"),
        ({"splits": ["forget01"]}, "`splits` is of TOFU's splits"),
        ({"data": "/nowhere"}, "`data` is of TOFU's splits"),
        ({"continual": True}, "`continual` is of TOFU's splits"),
        ({"retrained": {"forget10": "x"}}, r"`retrained\.forget10` is of a split of TOFU.*`retrained\.rows`"),
        ({"forget": None}, r"`retrained\.rows` is a model that never saw the rows of `forget`"),
        ({"forget": "/nowhere.jsonl"}, r"/nowhere\.jsonl"),
        ({"retrained": {"rows": "nowhere/at/all"}}, "No model at nowhere/at/all"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(data, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        plan.lay_out(settings(data, tmp_path / "out", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("of", ["retain", "holdout"])
def test_rows_in_two_sets_are_refused(data, tmp_path, of):
    shared = write_jsonl(
        tmp_path / "shared.jsonl", [{"question": "Q1?", "answer": "It is 1."}, {"question": "x", "answer": "y"}]
    )
    with pytest.raises(UserError, match="forget"):
        evaluation_rows(settings(data, tmp_path, **{of: str(shared)}), "rows")


def test_rows_of_one_group_cannot_be_divided():
    with pytest.raises(UserError, match="belong together"):
        divide([{}, {}], ["a", "a"], 0.3, 0)


@pytest.mark.slow
def test_rows_in_memory_are_compared_as_those_of_files(data, tmp_path, monkeypatch):
    rows = {name: [row.row for row in load_examples(str(data / f"{name}.jsonl"))] for name in ("retain", "unseen")}
    forget = [{"question": f"Q{i}?", "answer": f"It is {i}.", "who": f"p{i % 4}"} for i in range(8)]
    seen = []

    def laid_out(wanted, out):
        seen.append(plan.lay_out(wanted, out))
        raise UserError("far enough")

    monkeypatch.setattr("alter.comparison.run.lay_out", laid_out)
    given = settings(data, tmp_path / "out", common={"domain_column": "who"})
    for kind in (list, datasets.Dataset.from_list):
        with pytest.raises(UserError, match="far enough"):
            alter.compare(given, forget=kind(forget), retain=kind(rows["retain"]), holdout=kind(rows["unseen"]))
    source = write_jsonl(tmp_path / "forget.jsonl", forget)
    with pytest.raises(UserError, match="far enough"):
        alter.compare(given, forget=source, holdout=str(data / "unseen.jsonl"))
    listed, dataset, named = ({name: cell.key for name, cell in made.models.items()} for made in seen)
    assert listed == dataset == named
    # what the cells' own processes read
    (cell, *_) = [cell for by in seen[0].grid.values() for seeds in by.values() for cell in seeds.values()]
    run = cell.spec["stages"][0]["run"]
    assert not run["forget"].startswith("memory:")
    again = [cell.key for by in seen[1].grid.values() for seeds in by.values() for cell in seeds.values()]
    assert cell.key in again
    monkeypatch.undo()
    with pytest.raises(UserError, match="The rows are a list of int; expected a list of dicts"):
        alter.compare(given, forget=[1, 2])


def test_a_table_from_the_command_line(data, tmp_path, capsys):
    """Two methods, the attack besides; the second command has nothing left to run."""
    out = tmp_path / "out"
    recipe = tmp_path / "own.yaml"
    given = settings(
        data,
        out,
        rates=[1.0],
        holdout=str(data / "unseen.jsonl"),
        survival={"rows": 1, "samples": 2, "k": 2, "questions": 2},
    )
    recipe.write_text(json.dumps(given.model_dump(exclude_defaults=True)))
    assert cli.main(["compare", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "rows: forget quality" in shown
    table = (out / "table.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table[1:]] == [
        *(["original", "rows"], ["retrained", "rows"], ["graddiff", "rows"], ["npo", "rows"])
    ]
    records = read_records(out / "records.json")
    assert {r.extra["benchmark"] for r in records} == {"rows"}
    assert {"forget_quality", "model_utility", "forget_rouge", "mia_loss", "attacked_leak"} <= {
        r.metric for r in records
    }
    assert "rows" in (out / "report.html").read_text()
    assert (out / "pareto.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.json")}
    assert cli.main(["compare", str(recipe)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.json")} == before
