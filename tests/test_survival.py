"""`alter compare` by what survives: disturbance and leak against plain loops, the choice within a bound, a whole one."""

import functools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alter.comparison import cell as one
from alter.comparison import cells, choice, plan, rules, survival
from alter.comparison import run as compare
from alter.comparison.settings import Survival
from alter.data.encoding import encode
from alter.data.rows import Example
from alter.evaluation.tofu import replies
from alter.metaevaluation import measuring
from alter.storage.records import Record, read_records
from pico import byte_tokenizer, pico
from test_compare import cells_of, data, settings, source_digest, write_cell, write_records  # noqa: F401

COMMON = {"max_steps": 1, "batch_size": 4, "learning_rate": 0.03}
HOW = {"rows": 2, "samples": 2, "k": 2, "questions": 3, "passes": 1}


@pytest.fixture(autouse=True)
def _code_is_read_once(monkeypatch):
    monkeypatch.setattr(plan, "source_digest", source_digest)


def test_divergence_is_that_of_a_loop():
    original, model = pico(0), pico(1)
    texts = [[5, 9, 40], [7, 8, 9, 10, 11, 12]]
    got = survival.mean_divergences(original, model, texts)
    for text, value in zip(texts, got, strict=True):
        total = 0.0
        with torch.no_grad():
            p, q = (each.double()(input_ids=torch.tensor([text])).logits[0].softmax(-1) for each in (original, model))
        for place in range(len(text)):
            total += sum(a * math.log(a / b) for a, b in zip(p[place].tolist(), q[place].tolist(), strict=True))
        assert value == pytest.approx(total / len(text), rel=1e-4)
    assert survival.mean_divergences(original, original, texts) == pytest.approx([0, 0], abs=1e-9)
    assert all(1 < len(ids) <= survival.TOKENS for ids in survival.ordinary_passages(byte_tokenizer()))


def test_rows_longer_than_the_context_are_relearned_in_windows(monkeypatch):
    """They were trained on as they are: beyond the places that the model knows, or with an index error."""
    tokenizer, seen = byte_tokenizer(), []

    def spy(model, rows, weights, **how):
        seen.append((rows, how))
        yield 1, 0.5

    def model():
        return pico(0, max_position_embeddings=96), tokenizer

    rows = [Example(f"Q{i}?", "long " * 60 if i < 4 else "short", "qa", index=i) for i in range(8)]
    monkeypatch.setattr(survival, "train_steps", spy)
    monkeypatch.setattr(survival, "leaked", lambda *_, **__: SimpleNamespace(at=lambda k: np.zeros(2), rows=[]))
    survival.survival("m", model, model, rows, Survival(rows=6, samples=2, k=2, batch_size=2, passes=3), 0)
    monkeypatch.setattr(measuring, "train_steps", spy)
    told = [(row, row.answer) for row in rows[3:5]]
    measuring.train_on(*model(), told, rate=1e-3, passes=2, batch_size=4, seed=0)
    for (encoded, how), own, size, passes in zip(
        seen, (survival.divided(rows, 6, 0)[0], rows[3:5]), (2, 4), (3, 2), strict=True
    ):
        assert max(len(row.input_ids) for row in encoded) <= 96
        labelled = [label for row in encoded for label in row.labels if label != -100]
        whole = [label for row in own for label in encode(tokenizer, row).labels if label != -100]
        assert labelled == whole
        assert how["steps"] == math.ceil(len(encoded) / size) * passes
    assert all(1 < len(ids) <= 50 for ids in survival.ordinary_passages(tokenizer, 50))


def test_the_attacker_has_no_row_that_is_asked():
    rows = [Example(f"q{i}", "a", "qa", index=i) for i in range(9)]
    attacker, asked = survival.divided(rows, 4, 3)
    assert len(attacker) == 4
    assert sorted(row.index for row in [*attacker, *asked]) == list(range(9))
    assert survival.divided(rows, 4, 3) == (attacker, asked)
    with pytest.raises(ValueError, match=r"`survival\.rows` is 9"):
        survival.divided(rows, 9, 0)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="the attacker has no rows"):
        Survival(bound=0.1)
    with pytest.raises(ValueError, match="more than the 2 samples"):
        Survival(rows=2, samples=2, k=4)


def made_up(out, cell, kl, leak, losses=(2.0, 1.0)):
    write_cell(out, cell, np.random.default_rng(0))
    for path in (out / "cells" / cell.key).glob("*-*.json"):
        own = [Record("x", n, v, 3) for n, v in (("disturbance", kl), ("leak", 0.1), ("attacked_leak", leak))]
        own[-1].extra["losses"] = list(losses)
        write_records(path, [*read_records(path), *own])


def test_the_choice_is_the_least_leak_within_the_bound(data, tmp_path, monkeypatch):  # noqa: F811
    rates = [0.3, 1.0, 3.0]
    wanted = settings(data, tmp_path, rates=rates, survival=HOW | {"bound": 0.2})
    made = plan.lay_out(wanted, tmp_path)
    # npo leaks the less the faster, and the fastest disturbs too much; graddiff disturbs too much at every rate
    of = {("npo", 0.3): (0.05, 0.9), ("npo", 1.0): (0.15, 0.4), ("npo", 3.0): (0.5, 0.0)}
    of |= {("graddiff", 0.3): (0.3, 0.9), ("graddiff", 1.0): (0.6, 0.5), ("graddiff", 3.0): (3.0, 0.0)}
    for cell in cells_of(made):
        made_up(tmp_path, cell, *(of[cell.name, cell.setting[0]] if cell.setting else (0.0, 0.95)))
    found = {name: each for (name, _), each in choice.choices(wanted, made, tmp_path).items()}
    assert (found["npo"].setting, found["npo"].keeps) == ((1.0, 1.0), True)
    products = {rate: (1 - leak) * math.exp(-kl) for (name, rate), (kl, leak) in of.items() if name == "graddiff"}
    assert (found["graddiff"].setting[0], found["graddiff"].keeps) == (max(products, key=products.get), False)
    # the next rate lies between the best within the bound and the faster one beyond it
    candidates, whole, _ = choice._candidates(wanted, made, tmp_path, "npo", ("forget10",))
    assert choice.next_rate(candidates, list(candidates), whole, choice.floor(wanted)) == (1.73, 1.0)
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    rows = compare.compare(wanted)
    text = (tmp_path / "table.md").read_text()
    assert "disturbance, nats ↓ | forget10: leak before the attack ↓ | forget10: leak after it ↓" in text
    assert "0.150 | 0.100 | 0.400 |" in text
    assert "at most 0.2 nats a token" in text
    assert "within the bound" in text
    assert "leak after it" in (tmp_path / "table.tex").read_text()
    assert "leak after it" in (tmp_path / "report.html").read_text()
    assert next(row for row in rows if row.name == "npo").mean["forgetting"] == pytest.approx(0.6)
    # without a bound the attack is a column, and the choice is what it was
    plainly = settings(data, tmp_path, rates=rates, survival=HOW)
    assert choice.criterion(plainly, "forget10") == "retrained"
    assert list(choice.columns(plainly)) == [*choice.FIGURES, *choice.SURVIVAL]
    assert list(choice.columns(settings(data, tmp_path))) == list(choice.FIGURES)
    assert "Bold utility" in " ".join(rules.rules(plainly, {"forget10": {"validation": 1, "test": 1}}))


def test_the_bound_is_of_the_mean_disturbance(data, tmp_path):  # noqa: F811
    """One seed far beyond it hid behind two that disturbed nothing, as exp(-disturbance) was averaged."""
    wanted = settings(data, tmp_path, rates=[1.0, 3.0], seeds=[0, 1, 2], survival=HOW | {"bound": 0.5})
    made = plan.lay_out(wanted, tmp_path)
    for cell in cells_of(made):
        fast = cell.setting is not None and cell.setting[0] == 3.0
        made_up(tmp_path, cell, 5.0 if fast and cell.seed == 2 else 0.0, 0.2 if fast else 0.6)
    found = {name: each for (name, _), each in choice.choices(wanted, made, tmp_path).items()}
    assert (found["npo"].setting, found["npo"].keeps) == ((1.0, 1.0), True)
    fast = next(each for each in found["npo"].searched if each.rate == 3.0)
    assert fast.utility == pytest.approx(math.exp(-5 / 3))


def test_an_attacker_that_learned_nothing_proves_nothing(data, tmp_path, monkeypatch):  # noqa: F811
    """At a rate of 1e-9 nothing comes back of anything, which looked like the best method."""
    wanted = settings(data, tmp_path, rates=[1.0], survival=HOW | {"bound": 0.2, "learning_rate": 1e-9})
    made = plan.lay_out(wanted, tmp_path)
    for cell in cells_of(made):
        made_up(tmp_path, cell, 0.1, 0.0, (2.0, 2.0) if cell.name == "npo" else (2.0, 1.0))
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    notes = {row.name: row.notes for row in compare.compare(wanted)}
    assert notes["graddiff"] == []
    assert "hardly learned its own rows (loss 2.00 to 2.00)" in notes["npo"][0]
    assert "is no evidence" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(("retrained", "doubted"), [(0.88, True), (0.2, False)])
def test_a_retrained_model_that_knows_is_doubted(data, tmp_path, monkeypatch, retrained, doubted):  # noqa: F811
    """The original, saved anew in its place, is another file: what changed nothing was then the best method."""
    wanted = settings(data, tmp_path, rates=[1.0])
    made = plan.lay_out(wanted, tmp_path)
    for cell in cells_of(made):
        write_cell(tmp_path, cell, np.random.default_rng(0))
        for path in (tmp_path / "cells" / cell.key).glob("*-*.json"):
            known = {"original": 0.9, "retrained": retrained}.get(cell.name, 0.1)
            rest = [record for record in read_records(path) if record.metric != "forget_probability"]
            write_records(path, [*rest, Record("x", "forget_probability", known, 3)])
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    notes = {row.name: row.notes for row in compare.compare(wanted)}
    assert any("retrained forget10 is no reference" in note for note in notes["retrained"]) is doubted


def test_the_bound_alone_runs_no_cell_again(data, tmp_path):  # noqa: F811
    keys = [
        {cell.key for cell in cells_of(plan.lay_out(settings(data, tmp_path, survival=how), tmp_path))}
        for how in ({}, HOW, HOW | {"bound": 0.2}, HOW | {"passes": 3})
    ]
    assert keys[1] == keys[2]
    assert keys[0].isdisjoint(keys[1])
    assert keys[1].isdisjoint(keys[3])


def test_a_cell_measures_what_survives(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(replies, "MAX_NEW_TOKENS", 4)
    seen = []
    whole = survival.train_steps
    monkeypatch.setattr(survival, "train_steps", functools.partial(_noted, whole, seen))
    wanted = settings(data, tmp_path, methods=["graddiff"], rates=[1.0], limit=3, survival=HOW, common=COMMON)
    made = plan.lay_out(wanted, tmp_path)
    for cell in (made.models["original", "forget10"], made.grid["graddiff", ("forget10",)][1.0, 1.0][0]):
        folder = tmp_path / "cells" / cell.key
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(json.dumps(cell.spec))
        one.work(folder, ["validation"])
        assert json.loads((folder / "cell.json").read_text())["status"] == "done", (folder / "cell.json").read_text()
        found = {record.metric: record for record in read_records(folder / "validation-forget10.json")}
        assert (found["disturbance"].value < 1e-6) == (cell.name == "original")
        assert found["leak"].extra["data"] == "validation"
        assert found["attacked_leak"].extra["steps"] == len(found["attacked_leak"].extra["losses"]) == 1
        assert 0 <= found["leak"].value <= 1
    assert [(len(rows), steps) for rows, steps in seen] == [(2, 1), (2, 1)]


def _noted(whole, seen, model, rows, weights, **how):
    seen.append((rows, how["steps"]))
    assert all(weight.requires_grad for weight in weights)
    return whole(model, rows, weights, **how)


def test_the_division_is_by_the_seed():
    rows = [Example(f"q{i}", "a", "qa", index=i) for i in range(6)]
    order = list(range(6))
    random.Random(1).shuffle(order)
    assert [row.index for row in survival.divided(rows, 2, 1)[0]] == sorted(order[:2])
