"""`alter compare`: equal budgets, cells that survive kills, a choice that sees validation rows alone, and the table."""

import base64
import csv
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from safetensors.torch import load_file
from scipy import stats

import children
from alter import cli, metrics
from alter.comparison import cell as cell_work
from alter.comparison import cells, choice, code, executors, forks, plan, table, words
from alter.comparison import run as compare
from alter.comparison.cells import CellJob, finished, hold, run_cells
from alter.comparison.choice import best_setting, cell_figures, choices
from alter.comparison.division import PARTS, RETAIN_SPLITS, divide, evaluation_rows
from alter.comparison.executors import Local
from alter.comparison.plan import run_of
from alter.comparison.settings import Compare, Retrained
from alter.comparison.table import TableRow, dominated, table_rows, undominated
from alter.core import UserError, forked
from alter.data.sources import read_rows
from alter.data.tofu import tofu_rows
from alter.evaluation.figures import Groups
from alter.evaluation.tofu import measuring, replies, sets
from alter.models.loading import load_model
from alter.rendering import figures as plots
from alter.settings import numbers
from alter.storage.records import Record, read_records, write_records
from alter.training.batches import schedule
from pico import byte_tokenizer, save_pico, write_jsonl

AUTHORS = 40
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """TOFU's layout with 40 authors of 20 short rows each; two pico models."""
    folder = tmp_path_factory.mktemp("tofu")
    full = [{"question": f"Q{a}, {i}?", "answer": f"It is {a}.{i}."} for a in range(AUTHORS) for i in range(20)]
    wrong = {"paraphrased_answer": "That is it.", "perturbed_answer": ["No.", "It is x.", "Nothing."]}
    write_jsonl(folder / "full.json", full)
    write_jsonl(folder / "forget10_perturbed.json", [row | wrong for row in full[-80:][::8]])
    write_jsonl(folder / "forget05_perturbed.json", [row | wrong for row in full[-40:][::5]])
    write_jsonl(folder / "retain_perturbed.json", [row | wrong for row in full[:160][::20]])
    for name in ("real_authors", "world_facts"):
        rows = [
            {"question": f"{name} {i}?", "answer": f"{name[0]}{i}", "perturbed_answer": ["a", "b"]} for i in range(6)
        ]
        write_jsonl(folder / f"{name}_perturbed.json", rows)
    save_pico(folder / "model", max_position_embeddings=512, **SMALL)
    save_pico(folder / "retrained", max_position_embeddings=512, seed=1, **SMALL)
    return folder


def settings(folder, out, **changes):
    given = dict(
        model=str(folder / "model"),
        methods=["graddiff", "npo"],
        out=str(out),
        seeds=[0],
        rates=[1.0, 3.0],
        epochs=[1],
        common={"max_steps": 1, "batch_size": 4},
        retrained={"forget10": str(folder / "retrained")},
        data=str(folder),
        device="cpu",
        workers=1,
    )
    return Compare.model_validate({**given, **changes})


def runs_of(made):
    return [c for by in made.grid.values() for seeds in by.values() for c in seeds.values()]


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """Each run collects garbage at its end; looking through all modules for it takes longer than the run."""
    gc.freeze()
    yield
    gc.unfreeze()


source_digest = functools.cache(plan.source_digest)


@pytest.fixture(autouse=True)
def _code_is_read_once(monkeypatch):
    monkeypatch.setattr(plan, "source_digest", source_digest)


def cells_of(made):
    return [*made.models.values(), *runs_of(made)]


@pytest.mark.parametrize("warm", [{"warmup_steps": 0}, {"warmup_steps": 3}, {"warmup_ratio": 0.5}])
@pytest.mark.parametrize("place", ["common", "row"])
def test_a_warm_up_replaces_the_presets_as_in_a_single_run(data, tmp_path, warm, place):
    """`warmup_steps: 0` left the warm-up of an epoch that presets have: half of a run of two epochs."""
    given = {"common": {"batch_size": 4} | (warm if place == "common" else {})}
    given["settings"] = {"npo": warm if place == "row" else {}, "mine": {"method": "npo"} | given["common"] | warm}
    wanted = settings(data, tmp_path, methods=["npo", "mine"], **given)
    for name in wanted.methods:
        run = run_of(wanted, name, "forget10", 0, (1.0, 2.0))
        expected = {"warmup_steps": 0, "warmup_epochs": 0.0, "warmup_ratio": 0.0} | warm
        assert {key: getattr(run, key) for key in expected} == expected
    assert run_of(settings(data, tmp_path), "npo", "forget10", 0, (1.0, 2.0)).warmup_epochs == 1.0


TEMPLATE = (
    "{% if thinking %}Think. {% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_given_models_are_asked_with_the_template_of_the_runs(data, tmp_path):
    """They were asked without its variables: the reference of forget quality and of the utility floor were of other prompts."""
    for name in ("model", "retrained"):
        shutil.copytree(data / name, tmp_path / name)
        byte_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path / name)
    own = {"model": str(tmp_path / "model"), "retrained": {"forget10": str(tmp_path / "retrained")}, "rates": [1.0]}
    own |= {"methods": ["graddiff"]}
    common = {"max_steps": 1, "batch_size": 4}
    plain = plan.lay_out(settings(data, tmp_path / "out", **own, common=common), tmp_path / "out")
    given = ["thinking=true"]
    told = settings(data, tmp_path / "out", **own, common=common | {"chat_template_kwargs": given})
    made = plan.lay_out(told, tmp_path / "out")
    assert {made.models[place].key for place in made.models}.isdisjoint(cell.key for cell in plain.models.values())
    found = {}
    for name, cell in (
        ("given", made.models["original", "forget10"]),
        ("plain", plain.models["original", "forget10"]),
    ):
        folder = tmp_path / "out" / "cells" / cell.key
        folder.mkdir(parents=True)
        cell_work.measure_stage(folder, cell.spec, 0, ["test"])
        records = {record.metric: record.value for record in read_records(folder / "test-forget10.json")}
        found[name] = records["forget_probability"]
    network, tokenizer = load_model(own["model"], None, device="cpu", template=given)
    rows = str(tmp_path / "out" / made.models["original", "forget10"].spec["stages"][0]["rows"] / "test")
    right = measuring.tofu_metrics(network, tokenizer, "forget10", rows, which=("likelihood",), progress=False)
    expected = float(right.sets["forget"].prob.mean())
    assert found["given"] == pytest.approx(expected, rel=1e-5)
    assert found["plain"] != pytest.approx(expected, rel=1e-5)


def figures_of(generator, n=20):
    """Made-up records of one part: what a cell's process writes, as far as the choice and the table read it."""
    ratios = generator.gamma(2.0, size=n).tolist()
    values = {name: float(generator.random()) for name in choice.FIGURES if name != "forget_quality"}
    rows = [Record("x", name, value, n) for name, value in values.items()]
    rows.append(Record("x", "mia_min_k", float(generator.random()), n))
    return [*rows, Record("x", "forget_truth_ratio", 0.5, n, per_item=ratios, extra={"fingerprint": "same"})]


def write_cell(out, cell, generator, status="done", parts=PARTS):
    folder = out / "cells" / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    for part, split in itertools.product(parts, cell.chain):
        if status == "done":
            write_records(folder / f"{part}-{split}.json", figures_of(generator))
        else:
            (folder / f"{part}-{split}.json").unlink(missing_ok=True)
    costs = [{"seconds": 2.0 + i, "trained_parameters": 100, "peak_memory": 1e9} for i in range(len(cell.chain))]
    content = {"status": status, "reason": "loss is nan", "all_seconds": 3.0, "stages": costs if cell.setting else []}
    (folder / "cell.json").write_text(json.dumps(content))


def write_all(out, made, seed=0):
    generator = np.random.default_rng(seed)
    for cell in cells_of(made):
        write_cell(out, cell, generator)


# ---- the rules


def test_dominated_is_that_of_a_plain_loop():
    generator = np.random.default_rng(0)
    for n, k in itertools.product((0, 1, 2, 9), (1, 2, 4)):
        points = generator.integers(0, 4, size=(n, k)).astype(float)
        points[generator.random((n, k)) < 0.05] = math.nan
        naive = []
        for mine in points:
            worse = False
            for other in points:
                at_least = all(o >= m for o, m in zip(other, mine, strict=True))
                worse = worse or (at_least and any(o > m for o, m in zip(other, mine, strict=True)))
            naive.append(worse)
        assert dominated(points).tolist() == naive
    assert dominated([[1, 1], [1, 1], [0, 1]]).tolist() == [False, False, True]
    assert dominated([[math.nan, 9], [1, 1]]).tolist() == [False, False]


def test_the_choice_is_that_of_a_plain_loop():
    generator = random.Random(0)
    seen = set()
    for _ in range(300):
        candidates = {
            (rate, 1.0): (generator.choice([0.1, 0.5, 0.9, math.nan]), generator.choice([0.3, 0.5, 0.6, math.nan]))
            for rate in (1.0, 2.0, 3.0)
        }
        best, keeps = None, any(u >= 0.95 * 0.55 for _, u in candidates.values())
        for setting, (score, utility) in candidates.items():
            if keeps and not utility >= 0.95 * 0.55:
                continue
            value = score if keeps else score * utility
            value = -math.inf if math.isnan(value) else value
            if best is None or value > best[0]:
                best = (value, setting)
        assert best_setting(candidates, 0.55, 0.95) == (best[1], keeps)
        seen.add(keeps)
    assert seen == {True, False}


def test_rows_are_divided_by_author():
    group = ["a", "b", "a", "c", "d", "b", "e"]
    for share, seed in itertools.product((0.01, 0.3, 0.5, 0.99), range(5)):
        validation, test = divide([{}] * 7, group, share, seed)
        assert sorted(validation + test) == list(range(7))
        assert not {group[i] for i in validation} & {group[i] for i in test}
        assert len({group[i] for i in validation}) == min(max(1, round(share * 5)), 4)
    assert divide([{}] * 7, group, 0.4, 0) == divide([{}] * 7, group, 0.4, 0)
    assert len({tuple(divide([{}] * 7, group, 0.4, seed)[0]) for seed in range(20)}) > 1
    with pytest.raises(UserError, match="one author"):
        divide([{}] * 3, ["a"] * 3, 0.5, 0)


def test_parts_of_tofu_tell_whose_rows_intervals_draw_together(data, tmp_path):
    given = settings(data, tmp_path)
    full = {row["question"]: row["author"] for row in tofu_rows("full", given.data)}
    for part, own in evaluation_rows(given, "forget10").items():
        for name, rows in own.items():
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / f"{name}.json").write_text(json.dumps(rows))
        for key in ("forget", "retain"):
            # as a cell reads them, whose folder has no `full`
            rows = sets.set_rows(key, "forget10", str(tmp_path / part), None, 0)
            authors = [full[row["question"]] for row in rows]
            groups = sets.set_authors(key, rows, str(tmp_path / part))
            assert groups == Groups.of("author", authors)
            assert [row["author"] for row in rows] == authors


def test_no_author_has_evaluation_rows_on_both_sides(data, tmp_path):
    rows = evaluation_rows(settings(data, tmp_path), "forget10")
    number = {part: {name: {row["question"] for row in own} for name, own in rows[part].items()} for part in rows}
    for name in ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        sides = [{question.split(",")[0] for question in number[part][name]} for part in PARTS]
        assert all(sides)
        assert not sides[0] & sides[1]
        assert sum(len(rows[part][name]) for part in rows) == len(sets.tofu_rows(name, str(data)))


def test_figures_against_scipy(tmp_path):
    generator = np.random.default_rng(3)
    own, other = figures_of(generator), figures_of(generator)
    found = cell_figures(own, other)
    test = stats.ks_2samp(own[-1].per_item, other[-1].per_item)
    assert found["distance"] == pytest.approx(test.statistic)
    assert found["forget_quality"] == pytest.approx(math.log10(test.pvalue))
    assert choice.forgetting(found, "retrained") == pytest.approx(1 - test.statistic)
    assert choice.forgetting({"mia_min_k": 0.2}, "holdout") == pytest.approx(0.4)
    assert choice.forgetting({"forget_rouge": 0.2}, "rouge") == pytest.approx(0.8)
    # a ratio that overflows is null in the file, and still the largest of all
    for name, rows in (("own", own), ("other", other)):
        rows[-1].per_item[3] = math.inf
        write_records(tmp_path / name, rows)
    kept = cell_figures(read_records(tmp_path / "own"), read_records(tmp_path / "other"))
    assert kept["distance"] == pytest.approx(stats.ks_2samp(own[-1].per_item, other[-1].per_item).statistic)
    strange = [Record("x", "forget_truth_ratio", 0.5, 2, per_item=[1.0], extra={"fingerprint": "other"})]
    with pytest.raises(UserError, match="other rows"):
        cell_figures(own, strange)


# ---- what is run


def test_every_method_has_the_same_budget_and_the_grid_scales_its_own_rates(data, tmp_path):
    wanted = settings(
        data,
        tmp_path,
        methods=["alter", "npo", "mine"],
        splits=["forget05", "forget10"],
        seeds=[0, 1],
        epochs=[1, 2],
        settings={"mine": {"method": "lora_gd", "adapter": {"r": 2}}, "other": {"method": "npo"}, "ga": {"beta": 2}},
    )
    made = plan.lay_out(wanted, tmp_path)
    assert {len([c for seeds in by.values() for c in seeds.values()]) for by in made.grid.values()} == {8}
    assert len(made.searched(wanted)) == 3 * 2 * 8
    once = wanted.model_copy(update={"search_seeds": 1})
    assert [cell.seed for cell in made.searched(once)] == [0] * 3 * 2 * 4
    runs = {s: run_of(wanted, "alter", "forget10", 0, s) for s in made.grid["alter", ("forget10",)]}
    assert runs[3.0, 2.0].learning_rate_experts == pytest.approx(3 * runs[1.0, 1.0].learning_rate_experts)
    assert runs[3.0, 2.0].learning_rate_shared == pytest.approx(3 * runs[1.0, 1.0].learning_rate_shared)
    assert (runs[3.0, 2.0].epochs, runs[3.0, 2.0].max_steps) == (2, 1)
    mine = run_of(wanted, "mine", "forget05", 1, (1.0, 1.0))
    assert (mine.adapter.kind, mine.adapter.r, mine.adapter.alpha, mine.objective.kind) == (
        *("lora", 2, 16),
        "gradient_ascent",
    )
    assert (mine.forget, mine.retain, mine.seed) == (f"{data}:forget05", f"{data}:retain95", 1)
    fewer = wanted.model_copy(update={"retain": f"{data}:full[:5]"})
    assert run_of(fewer, "mine", "forget05", 1, (1.0, 1.0)).retain == f"{data}:full[:5]"


def test_a_cell_is_known_by_what_decides_it(data, tmp_path, monkeypatch):
    def keys(**changes):
        return {c.key for c in cells_of(plan.lay_out(settings(data, tmp_path / "o", **changes), tmp_path / "o"))}

    first = keys()
    assert keys() == first == keys(keep=True, workers=3, minutes=5)
    assert keys(methods=["npo", "graddiff"]) == first
    # other search rules change no cell, other rows all of them
    assert keys(utility_floor=0.5) == first
    assert keys(rates=[1.0]) < first
    for change in ({"division_seed": 3}, {"limit": 2}, {"validation": 0.6}):
        assert not keys(**change) & first
    renamed = keys(methods=["g", "n"], settings={"g": {"method": "graddiff"}, "n": {"method": "npo"}})
    assert renamed == first
    for change in ({"common": {"max_steps": 2, "batch_size": 4}}, {"retain": f"{data}:retain95"}):
        models = keys(**change) & first
        assert len(models) == 2
    weights = data / "model" / "generation_config.json"
    before = weights.read_bytes()
    weights.write_bytes(before + b"\n")
    assert len(keys() & first) == 1
    weights.write_bytes(before)
    monkeypatch.setattr(plan, "source_digest", lambda: "edited")
    assert not keys() & first


def test_the_code_that_counts_is_that_of_training_and_evaluation(monkeypatch):
    read = []
    monkeypatch.setattr(
        code, "digest", lambda parts: read.extend(part[0] for part in parts if isinstance(part, list)) or "d"
    )
    source_digest.__wrapped__()
    assert {
        "training/run.py",
        "methods/objectives/likelihood.py",
        "inference/scoring.py",
        "metrics/likelihood.py",
        "evaluation/tofu/measuring.py",
        "adapter/layer.py",
        "data/encoding.py",
    } <= set(read)
    assert not {
        # what packages export is no computation
        "data/__init__.py",
        "requests/signing.py",
        "cli.py",
        "comparison/plan.py",
        "comparison/choice.py",
        "comparison/table.py",
        "demo.py",
        "report/page.py",
    } & set(read)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ["npo", "grad_dif"]}, "No method 'grad_dif'.*Did you mean 'graddiff'"),
        ({"methods": []}, "methods is empty"),
        ({"rates": []}, "rates is empty"),
        ({"epochs": []}, "epochs is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"rates": [1.0, 1.0]}, "rates has 1.0 twice"),
        ({"methods": ["npo", "npo"]}, "'npo' twice"),
        ({"methods": ["npo", "b"], "settings": {"b": {"method": "npo"}}}, "Two cells are the same run"),
        ({"methods": ["original"]}, "'original' is a row"),
        ({"search_seeds": 2}, "`search_seeds` is 2, but there are 1"),
        ({"refine": 1, "rates": [1.0]}, "refine is 1, but rates has 1 only"),
        ({"settings": {"np": {}}}, "`settings` has 'np'.*Did you mean 'npo'"),
        ({"settings": {"npo": {"epochs": 3}}}, "'epochs' is the comparison's own"),
        ({"settings": {"npo": {"bathc_size": 3}}}, "Method npo: bathc_size"),
        ({"methods": ["b"], "settings": {"b": {"method": "npoo"}}}, "Did you mean 'npo'"),
        ({"retrained": {"forget10": "nowhere/at/all"}}, "No model at nowhere/at/all"),
        ({"model": "builtin:tofu-mini/orignal"}, "Did you mean 'builtin:tofu-mini/original'"),
        ({"splits": ["forget01"]}, "forget01_perturbed"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"holdout": "/nowhere.jsonl"}, "/nowhere.jsonl"),
        ({"retain": "/nowhere.jsonl"}, "/nowhere.jsonl"),
        ({"survival": {"rows": 10**9}}, "`survival.rows` is 1000000000, but a part of .* has .*: give"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(data, tmp_path, changes, says, monkeypatch):
    monkeypatch.setattr(cells, "run_cells", lambda *_: pytest.fail("something was run"))
    with pytest.raises(UserError, match=says):
        compare.compare(settings(data, tmp_path / "out", **{"model": str(data / "model"), **changes}))
    assert not (tmp_path / "out").exists()


def test_a_retrained_model_that_is_the_original_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "run_cells", lambda *_: pytest.fail("something was run"))
    with pytest.raises(UserError, match=r"`retrained\.forget10` is the original model itself"):
        compare.compare(settings(data, tmp_path, retrained={"forget10": str(data / "model")}))


def test_a_hub_that_does_not_answer_is_said_at_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(plan.ModelSettings, "identity", lambda self: {"weights": "unknown"})
    with pytest.raises(UserError, match=r"No model at owner/name: .*does not answer"):
        plan.lay_out(settings(data, tmp_path, model="owner/name"), tmp_path)


def test_from_the_command_line(data, tmp_path, capsys):
    line = ["compare", "--model", str(data / "model"), "--out", str(tmp_path / "o"), "--data", str(data)]
    assert cli.main([*line, "--methods", "npo", "alterr"]) == 2
    assert "Did you mean 'alter'" in capsys.readouterr().err
    assert cli.main([*line, "--methods", "npo", "--retrained.forget10", str(tmp_path / "no")]) == 2
    assert "No model at" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main([*line, "--methods", "npo", "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


# ---- the choice and the table, on made-up cells


def test_the_choice_reads_validation_rows_and_the_table_test_rows(data, tmp_path):
    wanted = settings(data, tmp_path, rates=[0.3, 1.0, 3.0], utility_floor=0.3)
    made = plan.lay_out(wanted, tmp_path)
    write_all(tmp_path, made)
    chosen = choices(wanted, made, tmp_path)
    rows = table_rows(wanted, made, chosen, tmp_path)
    poison = np.random.default_rng(99)
    for cell in cells_of(made):
        write_cell(tmp_path, cell, poison, parts=["test"])
    assert choices(wanted, made, tmp_path) == chosen
    assert table_rows(wanted, made, chosen, tmp_path) != rows
    rows = table_rows(wanted, made, chosen, tmp_path)
    changed = False
    for seed in range(5):
        poison = np.random.default_rng(100 + seed)
        for cell in cells_of(made):
            write_cell(tmp_path, cell, poison, parts=["validation"])
        other = choices(wanted, made, tmp_path)
        changed = changed or {k: c.setting for k, c in other.items()} != {k: c.setting for k, c in chosen.items()}
        assert table_rows(wanted, made, chosen, tmp_path) == rows
    assert changed


def test_a_choice_at_the_end_of_the_grid_is_marked(data, tmp_path):
    wanted = settings(data, tmp_path, rates=[1.0, 0.3, 3.0], epochs=[2.0], methods=["npo"], splits=["forget10"])
    for rate, shown in ((0.3, "0.3 (lowest)"), (1.0, "1"), (3.0, "3 (highest)")):
        searched = [choice.Searched(r, 2.0, 0.5, 0.5) for r in wanted.rates]
        made = choice.Choice((rate, 2.0), True, 0.5, 0.5, 3, 3, searched)
        rows = [table.TableRow("npo", "forget10", 1, {}, {}, made)]
        costs = words.described(wanted, rows, {"forget10": dict.fromkeys(PARTS, 1)}).costs
        assert costs[1][costs[0].index("chosen: rate ×")] == shown
        assert costs[1][costs[0].index("epochs")] == "2"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # (forgetting, utility) by rate; a utility from 0.95 on is kept
        ({0.1: (0.9, 1.0), 0.3: (0.5, 1.0), 1.0: (0.2, 1.0)}, 0.0333),
        ({0.1: (0.2, 1.0), 0.3: (0.5, 1.0), 1.0: (0.9, 1.0)}, 3.33),
        ({0.1: (0.2, 1.0), 0.3: (0.9, 1.0), 1.0: (0.5, 1.0)}, 0.548),
        ({0.1: (0.5, 1.0), 0.3: (0.9, 1.0), 1.0: (0.2, 1.0)}, 0.173),
        # the border of the utility lies where more is forgotten, also at an end
        ({0.1: (0.2, 1.0), 0.3: (0.5, 1.0), 1.0: (0.9, 0.5)}, 0.548),
        ({0.1: (0.2, 1.0), 0.3: (0.5, 0.9), 1.0: (0.9, 0.5)}, 0.173),
        # of equals the faster neighbour; at the end as much is not more
        ({0.1: (0.2, 1.0), 0.3: (0.5, 1.0), 1.0: (0.2, 1.0)}, 0.548),
        ({0.1: (0.2, 1.0), 0.3: (0.2, 0.9), 1.0: (0.2, 0.8)}, 0.0333),
        # none keeps the utility: where there is more of it
        ({0.1: (0.5, 0.8), 0.3: (0.9, 0.7), 1.0: (0.9, 0.1)}, 0.173),
        ({0.1: (0.9, 0.8), 0.3: (0.9, 0.7), 1.0: (0.9, 0.1)}, 0.0333),
        ({0.1: (0.9, 0.1), 0.3: (0.9, 0.2), 1.0: (0.9, 0.3)}, 3.33),
        # one that diverged was too fast
        ({0.1: (0.2, 1.0), 0.3: (0.5, 1.0), 1.0: None}, 0.548),
        ({0.1: None, 0.3: (0.5, 1.0), 1.0: None}, 0.548),
        ({0.1: (0.2, 0.5), 0.3: (0.5, 0.9), 1.0: None}, 0.173),
        ({0.1: None, 0.3: None, 1.0: None}, 0.0333),
    ],
    ids=str,
)
def test_the_search_goes_on_where_it_points(scores, expected):
    candidates = {(rate, 2.0): score for rate, score in scores.items() if score is not None}
    for order in itertools.permutations(scores):
        assert choice.next_rate(candidates, [(rate, 2.0) for rate in order], 1.0, 0.95) == (expected, 2.0)


def test_all_that_a_search_found_can_be_looked_at(data, tmp_path, monkeypatch):
    wanted = settings(data, tmp_path, seeds=[0, 1], rates=[3.0, 0.3], epochs=[1, 2])
    made = plan.lay_out(wanted, tmp_path)
    write_all(tmp_path, made)
    write_cell(tmp_path, made.grid["npo", ("forget10",)][0.3, 2.0][1], None, status="failed")
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    rows = {row.name: row for row in compare.compare(wanted)}
    with open(tmp_path / "search.csv") as file:
        lines = list(csv.DictReader(file))
    twin = read_records(tmp_path / "cells" / made.models["retrained", "forget10"].key / "validation-forget10.json")
    shown = {line[0]: line[2:] for line in Page((tmp_path / "report.html").read_text()).tables[2][1:]}
    assert len(lines) == 8
    for line in lines:
        setting = float(line["rate"]), float(line["epochs"])
        chosen = setting == rows[line["method"]].choice.setting
        assert line["chosen"] == str(chosen)
        text = f"{'★ ' * chosen}× {setting[0]:g}, {setting[1]:g} epochs: "
        [place] = [i for i, cell in enumerate(shown[line["method"]]) if cell.startswith(text)]
        # the settings of a row are in order
        assert place == sorted(itertools.product((0.3, 3.0), (1.0, 2.0))).index(setting)
        if (line["method"], setting) == ("npo", (0.3, 2.0)):
            assert (line["forgetting"], line["utility"], shown["npo"][place]) == ("", "", f"{text}not finished")
            continue
        scores = []
        for cell in made.grid[line["method"], ("forget10",)][setting].values():
            own = cell_figures(read_records(tmp_path / "cells" / cell.key / "validation-forget10.json"), twin)
            scores.append((1 - own["distance"], own["model_utility"]))
        means = [sum(each) / 2 for each in zip(*scores, strict=True)]
        assert [float(line["forgetting"]), float(line["utility"])] == pytest.approx(means)
        assert shown[line["method"]][place] == f"{text}{means[0]:.2f} / {means[1]:.3f}"


def test_the_search_goes_on_with_the_best_length():
    candidates = {(0.1, 2.0): (0.2, 1.0), (0.2, 2.0): (0.3, 1.0), (0.1, 5.0): (0.4, 1.0), (0.3, 5.0): (0.5, 1.0)}
    assert choice.next_rate(candidates, list(candidates), 1.0, 0.95) == (0.9, 5.0)
    # three digits tell no more rates apart
    assert choice.next_rate({(1.0, 1.0): (0.5, 1.0), (1.01, 1.0): (0.4, 1.0)}, [(1.0, 1.0), (1.01, 1.0)], 1, 0.9) == (
        *(0.99, 1.0),
    )
    narrow = {(1.0, 1.0): (0.4, 1.0), (1.01, 1.0): (0.5, 1.0), (1.02, 1.0): (0.3, 1.0)}
    assert choice.next_rate(narrow, list(narrow), 1.0, 0.9) is None


def scored_by_rate(log, killed=()):
    """Cells of which NPO forgets the more the faster, and GradDiff best at 1; those of settings in `killed` are killed."""

    def scored(out, jobs, *_):
        for job in jobs:
            cell = job.cell
            log.append((cell.name, cell.setting, cell.seed, job.parts))
            if (cell.name, cell.setting) in killed:
                yield cell, "killed by SIGKILL"
                continue
            write_cell(out, cell, np.random.default_rng(0), parts=job.parts)
            for path in (out / "cells" / cell.key).glob("*-*.json"):
                records = {record.metric: record for record in read_records(path)}
                rate = cell.setting[0] if cell.setting else 1.0
                rouge = 1 / (1 + rate) if cell.name == "npo" else abs(math.log(rate)) / 10
                records["forget_rouge"] = replace(records["forget_rouge"], value=rouge)
                records["model_utility"] = replace(records["model_utility"], value=0.5)
                write_records(path, list(records.values()))
            yield cell, ""

    return scored


def test_a_refined_search_costs_every_method_the_same_and_takes_the_best_of_all(data, tmp_path, monkeypatch, capsys):
    log = []
    monkeypatch.setattr(cells, "run_cells", scored_by_rate(log))
    wanted = settings(
        data, tmp_path, seeds=[0, 1], search_seeds=1, rates=[0.3, 1.0, 3.0], refine=2, retrained={"forget10": None}
    )
    rows = {row.name: row for row in compare.compare(wanted) if row.choice}
    searched = [(name, setting[0]) for name, setting, seed, parts in log if setting and "validation" in parts]
    assert searched[6:] == [("graddiff", 1.73), ("npo", 9.0), ("graddiff", 1.32), ("npo", 27.0)]
    assert {row.choice.budget for row in rows.values()} == {5}
    assert (rows["npo"].choice.setting, rows["graddiff"].choice.setting) == ((27.0, 1.0), (1.0, 1.0))
    text = (tmp_path / "table.md").read_text()
    assert "| 27 (highest) |" in text
    assert "3 settings" in text
    assert "and 2 more" in text
    # the same command does nothing again, nor does one that only writes the tables know less
    log.clear()
    for run in (True, False):
        again = {row.name: row for row in compare.compare(wanted.model_copy(update={"run": run})) if row.choice}
        assert again == rows
    assert log == []
    # without it the cells of the grid are found again
    compare.compare(wanted.model_copy(update={"refine": 0}))
    assert {(name, setting, parts) for name, setting, _, parts in log} == {("npo", (3.0, 1.0), ("test",))}


def test_a_killed_cell_does_not_tell_the_search_where_to_go_on(data, tmp_path, monkeypatch, capsys):
    log, killed = [], {("npo", (3.0, 1.0))}
    monkeypatch.setattr(cells, "run_cells", scored_by_rate(log, killed))
    line = [
        "--model",
        str(data / "model"),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--refine",
        "2",
    ]
    line += ["--methods", "graddiff", "npo", "--seeds", "0", "--rates", "0.3", "1", "3", "--epochs", "1"]
    assert cli.main(["compare", *line]) == 75
    assert "1 cells did not finish" in capsys.readouterr().err
    searched = [(name, setting[0]) for name, setting, _, parts in log if setting and "validation" in parts]
    assert searched[6:] == [("graddiff", 1.73), ("graddiff", 1.32)]
    # the same command ends as one without the kill
    log.clear()
    killed.clear()
    assert cli.main(["compare", *line]) == 0
    searched = [(name, setting[0]) for name, setting, _, parts in log if setting and "validation" in parts]
    assert searched == [("npo", 3.0), ("npo", 9.0), ("npo", 27.0)]


def test_the_table_is_that_of_a_loop_over_the_records(data, tmp_path, monkeypatch, capsys):
    wanted = settings(data, tmp_path, seeds=[0, 1, 2], search_seeds=2, splits=["forget10", "forget05"])
    made = plan.lay_out(wanted, tmp_path)
    write_all(tmp_path, made)
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    rows = {(row.name, row.split): row for row in compare.compare(wanted)}
    assert list(rows) == [
        *(("original", "forget10"), ("retrained", "forget10"), ("graddiff", "forget10"), ("npo", "forget10")),
        *(("original", "forget05"), ("graddiff", "forget05"), ("npo", "forget05")),
    ]
    with open(tmp_path / "table.csv") as file:
        lines = {(line["method"], line["split"]): line for line in csv.DictReader(file)}
    records = read_records(tmp_path / "records.json")
    for (name, split), row in rows.items():
        if row.choice is None:
            continue
        own_cells = made.grid[name, (split,)][row.choice.setting].values()
        per_seed = {"model_utility": [], "forget_rouge": [], "forget_quality": []}
        for cell in own_cells:
            own = {r.metric: r for r in read_records(tmp_path / "cells" / cell.key / f"test-{split}.json")}
            for metric in ("model_utility", "forget_rouge"):
                per_seed[metric].append(own[metric].value)
            if split == "forget10":
                twin = read_records(tmp_path / "cells" / made.models["retrained", split].key / f"test-{split}.json")
                ratios = next(r for r in twin if r.metric == "forget_truth_ratio").per_item
                quality = metrics.likelihood.forget_quality(own["forget_truth_ratio"].per_item, ratios)
                per_seed["forget_quality"].append(quality.log10)
        for metric, values in per_seed.items():
            if not values:
                assert metric not in row.mean
                continue
            assert row.mean[metric] == pytest.approx(sum(values) / 3)
            assert row.spread[metric] == pytest.approx(statistics.stdev(values))
            assert float(lines[name, split][metric]) == pytest.approx(sum(values) / 3)
            kept = [r for r in records if (r.model, r.metric, r.extra["split"]) == (name, metric, split)]
            measured = [r.extra["log10"] if metric == "forget_quality" else r.value for r in kept]
            assert measured == pytest.approx(values)
            assert [r.extra["seed"] for r in kept] == [0, 1, 2]
        assert (row.seeds, row.choice.finished, row.choice.budget) == (3, 4, 4)
    text = (tmp_path / "table.md").read_text()
    shown = (
        f"{rows['npo', 'forget10'].mean['model_utility']:.3f} ± {rows['npo', 'forget10'].spread['model_utility']:.3f}"
    )
    assert shown in text
    assert "2 settings" in text
    assert "seeds searched: 0, 1." in text
    assert choice.CRITERIA["rouge"] in text
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "compare.json").read_text())["settings"]["seeds"] == [0, 1, 2]
    assert "table.md" in capsys.readouterr().out


def test_names_in_the_plot_cover_neither_each_other_nor_a_point(tmp_path):
    points = [(0.82 + 0.002 * i, -0.1 * (i % 3)) for i in range(12)] + [(0.82, 0.0), (0.0, -5.0)]
    names = [f"method_{i}" for i in range(len(points))]
    kept = {}
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        with plots.figure(path, width=5.6, height=5.2) as drawn:
            axes = drawn[0, 0]
            axes.plot(*zip(*points, strict=True), "o", ms=5)
            plots.name_points(axes, points, names, ["k"] * len(points))
            axes.get_figure().draw_without_rendering()
            boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
            kept[path] = (boxes, axes.transData.transform(points), axes.get_window_extent())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    boxes, places, inside = kept[tmp_path / "a.png"]
    assert sorted(boxes) == sorted(names)
    for one, other in itertools.combinations(boxes.values(), 2):
        # two edges may touch
        wide = min(one.x1, other.x1) - max(one.x0, other.x0)
        high = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(wide, high) < 0.01
    assert not any(box.contains(*place) for box in boxes.values() for place in places)
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes.values())
    # the one with room all around stands beside its point
    assert abs(boxes["method_13"].x0 - places[13][0]) < 15


def test_a_name_without_room_is_left_out(tmp_path):
    with plots.figure(tmp_path / "a.png", width=1.2, height=1.2) as drawn:
        plots.name_points(drawn[0, 0], [(0.5, 0.5)] * 60, ["a_long_name"] * 60, ["k"] * 60)
        assert 1 <= len(drawn[0, 0].texts) < 60


def test_dominated_rows_are_marked_among_the_methods_of_a_split_only(data, tmp_path):
    wanted = settings(data, tmp_path, rates=[1.0])
    made = plan.lay_out(wanted, tmp_path)
    for seed in range(30):
        write_all(tmp_path, made, seed)
        chosen = choices(wanted, made, tmp_path)
        rows = {row.name: row for row in table_rows(wanted, made, chosen, tmp_path)}
        a, b = ((rows[n].mean["forget_quality"], rows[n].mean["model_utility"]) for n in ("graddiff", "npo"))
        assert rows["graddiff"].dominated == (b[0] >= a[0] and b[1] >= a[1] and a != b)
        assert not rows["original"].dominated
        said = words.described(wanted, list(rows.values()), {"forget10": {"validation": 1, "test": 2}})
        marked = {said.results[i][0] for i, _ in said.best}
        assert marked == {name for name in ("graddiff", "npo") if not rows[name].dominated}
        line = next(line for line in words.markdown(said).splitlines() if line.startswith("| npo | "))
        assert ("**" in line) == (not rows["npo"].dominated)
        assert line.split("|")[3].strip().strip("*") == f"{b[1]:.3f}"


def test_a_failed_cell_is_named_and_does_not_stop_the_rest(data, tmp_path, monkeypatch):
    wanted = settings(data, tmp_path, seeds=[0, 1])
    made = plan.lay_out(wanted, tmp_path)
    write_all(tmp_path, made)
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    best = {row.name: row.choice.setting for row in compare.compare(wanted) if row.choice}
    write_cell(tmp_path, made.grid["npo", ("forget10",)][best["npo"]][1], None, status="failed")
    rows = {row.name: row for row in compare.compare(wanted)}
    # a setting that diverged with one seed is not chosen
    assert rows["npo"].choice.setting != best["npo"]
    assert (rows["npo"].choice.finished, rows["npo"].choice.budget) == (3, 4)
    assert "loss is nan" in (tmp_path / "table.md").read_text()
    assert rows["graddiff"].notes == []
    for by in made.grid["npo", ("forget10",)].values():
        write_cell(tmp_path, by[0], None, status="failed")
    rows = {row.name: row for row in compare.compare(wanted)}
    assert rows["npo"].choice.setting is None
    assert rows["npo"].mean == {}
    assert "| npo | - | - | - | - | - |" in (tmp_path / "table.md").read_text()
    assert not rows["npo"].dominated
    write_cell(tmp_path, made.models["retrained", "forget10"], None, status="failed")
    with pytest.raises(UserError, match=r"Cannot evaluate the model .*loss is nan"):
        compare.compare(wanted)


def test_what_a_split_is_judged_by(data, tmp_path):
    wanted = settings(data, tmp_path, retrained={"forget10": "r"})
    assert [choice.criterion(wanted, s) for s in ("forget10", "forget05")] == ["retrained", "rouge"]
    assert choice.criterion(wanted.model_copy(update={"holdout": "h"}), "forget05") == "holdout"
    assert choice.criterion(wanted.model_copy(update={"retrained": Retrained()}), "forget10") == "rouge"


class Page(HTMLParser):
    """What a page shows: the cells of its tables, row by row, those that are strong, its images and its tags."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.strong, self.images, self.open, self.seen = [], set(), [], [], Counter()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen[tag] += 1
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in ("meta", "br", "hr", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open[-1:] == [tag]:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "strong"):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] == "strong":
            self.strong.add((len(self.tables) - 1, len(self.tables[-1]) - 1, len(self.tables[-1][-1]) - 1))


def test_the_page_shows_what_the_table_shows(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    name = '<b>&"|$x_{$'
    wanted = settings(
        *(data, tmp_path),
        methods=[name, "npo", "graddiff"],
        settings={name: {"method": "simnpo"}},
        splits=["forget05", "forget10"],
    )
    made = plan.lay_out(wanted, tmp_path)
    for seed in range(3):
        write_all(tmp_path, made, seed)
        write_cell(tmp_path, made.grid["npo", ("forget05",)][1.0, 1.0][0], None, status="failed")
        rows = compare.compare(wanted)
        said = words.described(wanted, rows, {split: {"validation": 1, "test": 2} for split in wanted.splits})
        text = (tmp_path / "report.html").read_text()
        page = Page(text)
        assert not page.open
        assert page.tables == [said.results, said.costs, said.searched]
        assert len(said.searched) == 1 + 3 * 2
        assert page.tables[0][3][0] == name
        assert page.strong == {(0, *place) for place in said.best}
        by = {(row.name, row.split): row for row in rows}
        better = {(said.results[i][0], wanted.splits[(j - 1) // len(choice.FIGURES)]) for i, j in said.best}
        assert all(said.results[0][j].endswith(": utility ↑") for _, j in said.best)
        assert better == {key for key, row in by.items() if row.choice and not row.dominated}
        assert page.seen["svg"] == 2
        assert not page.images
        assert not {"b", "iframe", "form"} & set(page.seen)
        # the one script is known to the page's policy by its hash
        script = text.partition("<script>")[2].partition("</script>")[0]
        known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert page.seen["script"] == 1
        assert f"script-src 'sha256-{known}'" in text
        for split in wanted.splits:
            beaten = {name for (name, where), row in by.items() if where == split and row.choice and row.dominated}
            listed = text.partition(f"On {split} each point")[2].partition("</p>")[0].partition("in both: ")[2]
            assert not any(re.search(rf"\b{each} \(", listed) for each in beaten - {name})
        run = by["graddiff", "forget10"].cells[0]
        assert f'href="cells/{by["graddiff", "forget05"].cells[0]}/cell.json"' in text
        assert (tmp_path / "cells" / run / "test-forget10.json").is_file()
        assert 'href="https://arxiv.org/abs/2404.05868"' in text
        assert "loss is nan" in text
        # a bar in a name ends no cell of the Markdown table
        lines = (tmp_path / "table.md").read_text().splitlines()
        assert len({line.replace("\\|", "").count("|") for line in lines[:6]}) == 1
        assert any(line.startswith("| " + name.replace("|", "\\|") + " |") for line in lines)


def test_the_page_s_head_and_figures_read_well(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    wanted = settings(data, tmp_path, methods=["npo"], model=str(data / "model"))
    write_all(tmp_path, plan.lay_out(wanted, tmp_path), 0)
    rows = compare.compare(wanted)
    shown = [replace(row, mean=row.mean | {"forget_quality": -0.01}, spread={}, interval={}) for row in rows]
    said = words.described(wanted, shown, {"forget10": {"validation": 1, "test": 2}})
    text = words.html_page(said, wanted, shown)
    # the name in the title, the whole path where the mouse rests and where the page says how it was made
    assert "<title>Comparison on model</title>" in text
    assert f'<h1>Comparison on <span title="{data / "model"}">model</span></h1>' in text
    assert f"Model {data / 'model'}, seeds 0;" in text
    assert "<p>1 method, 1 seed, forget10.</p>" in text
    assert said.results[1][1] == "0.0"
    assert "-0.0<" not in text
    named = words.html_page(said, wanted.model_copy(update={"model": "builtin:tofu-mini/original"}), shown)
    assert "<title>Comparison on builtin:tofu-mini/original</title>" in named


def test_what_rounds_to_zero_has_no_sign():
    for value, form, shown in (
        *(
            (-0.04, ".1f", "0.0"),
            (-0.06, ".1f", "-0.1"),
            (0.0, ".3f", "0.000"),
            (-0.0, ".0f", "0"),
            (-1e-9, "+.2%", "0.00%"),
        ),
        *((1.5, "+.2f", "+1.50"), (-12345.6, ",.0f", "-12,346"), (math.nan, ".1f", "nan"), (-math.inf, ".1f", "-inf")),
    ):
        assert numbers.rounded(value, form) == shown


def test_bold_is_what_lies_beyond_the_spread_of_the_seeds():
    generator = np.random.default_rng(0)
    for _ in range(200):
        points, spreads = generator.integers(0, 5, (4, 2)), generator.integers(0, 3, (4, 2))
        naive = []
        for i, (mine, spread) in enumerate(zip(points, spreads, strict=True)):
            worse = mine - spread
            others = [points[j] for j in range(4) if j != i]
            naive.append(not any((o >= worse).all() and (o > worse).any() for o in others))
        assert undominated(points, spreads).tolist() == naive
    assert undominated([[1, 1], [0, 0.9]], [[0, 0.2], [0, 0]]).tolist() == [True, False]


def test_replies_are_counted():
    texts = {
        "questions": ["Where was Ada born?"] * 4,
        "references": ["Ada was born in Ulm."] * 4,
        "generations": ["In Ulm.", "In Rome.", "", "x x x x x x x x"],
    }
    found = choice.cell_figures([Record("x", "forget_rouge", 0.3, 4, extra=texts)], None)
    assert (found["forget_said"], found["forget_said_of"]) == (0.25, 4)
    assert (found["forget_unusable"], found["forget_unusable_of"]) == (0.5, 4)
    row = TableRow("npo", "forget10", 1, found, {"forget_said": 0.25})
    assert words._counted(row, "forget_said") == "1 ± 1 of 4"
    assert words._counted(row, "forget_unusable") == "2 of 4"


def test_the_table_for_latex():
    said = words.Text([["a_b", "50 % ↑"], ["x & y", "1.0 ± 0.1"]], [], [], {(1, 1)}, [], [])
    lines = words.latex(said).splitlines()
    assert lines[1] == r"\begin{tabular}{lr}"
    assert lines[3] == r"a\_b & 50 \% $\uparrow$ \\"
    assert lines[5] == r"x \& y & \textbf{1.0 $\pm$ 0.1} \\"


def test_notes_name_what_is_missing_and_nothing_else(data, tmp_path):
    wanted = settings(data, tmp_path, methods=["npo"], seeds=[0, 1], search_seeds=1)
    made = plan.lay_out(wanted, tmp_path)
    write_all(tmp_path, made)
    chosen = choices(wanted, made, tmp_path)
    [choice] = chosen.values()
    by = made.grid["npo", ("forget10",)]
    other = next(setting for setting in by if setting != choice.setting)

    def notes():
        return next(row.notes for row in table_rows(wanted, made, chosen, tmp_path) if row.name == "npo")

    # what nobody asks for may be missing: test rows of the other setting, validation rows of a seed beside the search
    (tmp_path / "cells" / by[other][0].key / "test-forget10.json").unlink()
    (tmp_path / "cells" / by[choice.setting][1].key / "validation-forget10.json").unlink()
    (tmp_path / "cells" / by[other][1].key / "cell.json").unlink()
    assert notes() == []
    (tmp_path / "cells" / by[other][0].key / "validation-forget10.json").unlink()
    (tmp_path / "cells" / by[choice.setting][1].key / "test-forget10.json").unlink()
    found = notes()
    assert len(found) == 2
    assert all("not finished" in note for note in found)
    assert {str(by[other][0]), str(by[choice.setting][1])} == {note.split(": ")[0] for note in found}


def test_a_failure_on_test_rows_does_not_change_the_choice(data, tmp_path):
    wanted = settings(data, tmp_path)
    made = plan.lay_out(wanted, tmp_path)
    write_all(tmp_path, made)
    chosen = choices(wanted, made, tmp_path)
    cell = made.grid["npo", ("forget10",)][chosen["npo", ("forget10",)].setting][0]
    write_cell(tmp_path, cell, None, status="failed", parts=["test"])
    assert choices(wanted, made, tmp_path) == chosen
    row = next(row for row in table_rows(wanted, made, chosen, tmp_path) if row.name == "npo")
    assert row.seeds == 0
    assert len(row.notes) == 1


# ---- the order of the work: what is measured, and what is kept


def played(log):
    """Stands for `run_cells`: writes what a cell's process would, at once."""

    def run(out, jobs, *_):
        for job in jobs:
            if finished(out, job.cell, job.parts) is None:
                folder = out / "cells" / job.cell.key
                log.append((job.cell, job.parts, (folder / "stage0").is_dir()))
                write_cell(out, job.cell, np.random.default_rng(int(job.cell.key[:8], 16)), parts=job.parts)
                if job.cell.setting is not None:
                    (folder / "stage0" / "adapter").mkdir(parents=True, exist_ok=True)
                yield job.cell, ""

    return run


def measured(out, cell):
    return {path.name.partition("-")[0] for path in (out / "cells" / cell.key).glob("*-*.json")}


def test_only_the_chosen_cells_meet_test_rows_and_no_weights_are_left(data, tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(cells, "run_cells", played(log))
    wanted = settings(data, tmp_path, rates=[0.3, 1.0, 3.0], seeds=[0, 1], search_seeds=1, utility_floor=0.0)
    made = plan.lay_out(wanted, tmp_path)

    def check(rows):
        best = {row.name: row.choice.setting for row in rows if row.choice}
        for (name, _), by in made.grid.items():
            for setting, seeds in by.items():
                chosen = setting == best[name]
                searched, other = seeds[0], seeds[1]
                assert measured(tmp_path, searched) == {"validation"} | ({"test"} if chosen else set())
                assert measured(tmp_path, other) == ({"test"} if chosen else set())
                for cell in (searched, other):
                    assert not (tmp_path / "cells" / cell.key / "stage0").exists()
        return best

    best = check(compare.compare(wanted))
    tested = [(cell, there) for cell, parts, there in log if cell.setting and "test" in parts]
    # the chosen ones of the search had kept their weights, the other seeds had none
    assert {(cell.seed, there) for cell, there in tested} == {(0, True), (1, False)}
    assert len(log) == 2 + 2 * 3 + 2 * 2
    log.clear()
    assert check(compare.compare(wanted)) == best
    assert log == []
    # another rule chooses other cells, whose weights are gone: they are trained once more, and nothing else is
    monkeypatch.setattr(
        choice, "best_setting", lambda candidates, *_: (min(set(candidates) - set(best.values())), True)
    )
    rows = compare.compare(wanted)
    assert all((parts, there) == (("test",), False) for _, parts, there in log)
    assert {(cell.name, cell.setting) for cell, *_ in log} == {(r.name, r.choice.setting) for r in rows if r.choice}
    assert len(log) == 4
    assert not list(tmp_path.glob("cells/*/stage*"))


def test_weights_stay_where_they_are_asked_for_or_needed(data, tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(cells, "run_cells", played(log))
    wanted = settings(data, tmp_path / "kept", keep=True)
    compare.compare(wanted)
    made = plan.lay_out(wanted, tmp_path / "kept")
    assert all((tmp_path / "kept" / "cells" / cell.key / "stage0").is_dir() for cell in runs_of(made))

    def killed(out, jobs, *rest):
        for cell, _ in played(log)(out, jobs, *rest):
            if cell.setting is not None and "test" in next(job.parts for job in jobs if job.cell is cell):
                (out / "cells" / cell.key / "test-forget10.json").unlink()
                yield cell, "killed by SIGKILL"
            else:
                yield cell, ""

    monkeypatch.setattr(cells, "run_cells", killed)
    wanted = settings(data, tmp_path / "cut", methods=["npo"])
    rows = {row.name: row for row in compare.compare(wanted)}
    by = plan.lay_out(wanted, tmp_path / "cut").grid["npo", ("forget10",)]
    left = {s: (tmp_path / "cut" / "cells" / cells_[0].key / "stage0").is_dir() for s, cells_ in by.items()}
    assert left == {setting: setting == rows["npo"].choice.setting for setting in by}
    assert "not finished" in (tmp_path / "cut" / "table.md").read_text()


def test_without_running_the_tables_are_those_of_what_has_finished(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells, "run_cells", lambda *_: pytest.fail("something was run"))
    wanted = settings(data, tmp_path, run=False)
    with pytest.raises(UserError, match=r"The table needs original forget10, .* leave `run=False` out"):
        compare.compare(wanted)
    made = plan.lay_out(wanted, tmp_path)
    generator = np.random.default_rng(0)
    for cell in [*made.models.values(), *made.grid["npo", ("forget10",)][1.0, 1.0].values()]:
        write_cell(tmp_path, cell, generator)
    weights = tmp_path / "cells" / runs_of(made)[0].key / "stage0"
    weights.mkdir(parents=True)
    # one that runs is not disturbed, and does not disturb
    lock = hold(tmp_path)
    rows = {row.name: row for row in compare.compare(wanted)}
    os.close(lock)
    assert (rows["npo"].seeds, rows["npo"].choice.finished, rows["graddiff"].seeds) == (1, 1, 0)
    assert rows["npo"].choice.setting == (1.0, 1.0)
    assert weights.is_dir()
    assert len(Page((tmp_path / "report.html").read_text()).tables[0]) == 5
    assert "\nnpo\n" in capsys.readouterr().out
    line = ["compare", "--model", str(data / "model"), "--data", str(data), "--methods", "npo", "--device", "cpu"]
    assert cli.main([*line, "--out", str(tmp_path / "new"), "--no-run"]) == 2
    assert "--no-run" in capsys.readouterr().err


# ---- chains of runs, and least steps


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"method": "asym_lora"}, "`adapter.kind` asym_lora neither grows nor merges"),
        ({"method": "uld"}, "`adapter.kind` assistant neither grows nor merges"),
        ({"method": "stable"}, "`adapter.kind` bounded_lora neither grows nor merges"),
        (
            {"method": "o3", "adapter": {"dropout": 0.0}, "weight_decay": 0.0, "initializer": {"kind": "vila"}},
            "cannot start from its own result: .*`initializer.kind` vila would replace",
        ),
        ({"method": "alter_scalar_gate"}, "`adapter.kind` alter with router entropy neither grows"),
        ({"adapter": {"router": "static"}}, "`adapter.kind` alter with router static neither grows"),
        ({"num_forget_experts": 1}, "`num_forget_experts` 1 gives the expert of every split the same name"),
        ({"phase_one": 0.5}, "cannot start from its own result: .*phase_one"),
    ],
)
def test_a_chain_takes_what_can_go_on_from_its_own_result(data, tmp_path, own, says):
    wanted = settings(data, tmp_path, methods=["m"], settings={"m": {"method": "alter"} | own}, retrained={})
    plan.lay_out(wanted, tmp_path)
    wanted = wanted.model_copy(update={"splits": ["forget05", "forget10"], "continual": True})
    with pytest.raises(UserError, match=f"Method m.*{says}"):
        plan.lay_out(wanted, tmp_path)


def test_a_chain_goes_from_small_to_large_on_the_rows_that_are_new(data, tmp_path):
    chain = ["forget01", "forget05", "forget10"]
    with pytest.raises(UserError, match="from small to large"):
        compare.compare(settings(data, tmp_path, splits=["forget10", "forget05"], continual=True))
    wanted = settings(
        *(data, tmp_path),
        methods=["npo", "loku", "lora_gd", "alter"],
        splits=chain,
        continual=True,
        data="builtin",
        common={},
        least_steps=50,
        epochs=[0.1],
        retrained={},
    )
    made = plan.lay_out(wanted, tmp_path)
    assert {key[1] for key in made.grid} == {tuple(chain)}
    stages = runs_of(made)[0].spec["stages"]
    assert [stage["split"] for stage in stages] == chain
    before = []
    for stage, split in zip(stages, chain, strict=True):
        source = stage["run"]["forget"]
        rows = read_rows(str(tmp_path / source) if (tmp_path / source).is_file() else source)
        whole = tofu_rows(split, "builtin")
        assert rows == [row for row in whole if row not in before]
        assert len(rows) == {"forget01": 40, "forget05": 160, "forget10": 200}[split]
        assert stage["run"]["retain"] == f"builtin:{RETAIN_SPLITS[split]}"
        assert stage["run"]["epochs"] == pytest.approx(50 * stage["run"]["batch_size"] / len(rows))
        before += rows
    # each split alone is another run
    alone = plan.lay_out(wanted.model_copy(update={"continual": False}), tmp_path)
    assert not {c.key for c in runs_of(alone)} & {c.key for c in runs_of(made)}
    assert {c.key for c in alone.models.values()} == {c.key for c in made.models.values()}


def test_a_split_without_new_rows_is_no_stage(data, tmp_path):
    for name in ("full.json", "retain_perturbed.json", "real_authors_perturbed.json", "world_facts_perturbed.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    for name in ("forget05", "forget10"):
        write_jsonl(tmp_path / f"{name}.json", tofu_rows("forget05", str(data)))
        (tmp_path / f"{name}_perturbed.json").write_bytes((data / "forget05_perturbed.json").read_bytes())
    wanted = settings(
        *(data, tmp_path / "o"), data=str(tmp_path), splits=["forget05", "forget10"], continual=True, retrained={}
    )
    with pytest.raises(UserError, match="forget10 adds no row to the splits before it"):
        plan.lay_out(wanted, tmp_path / "o")


def test_least_steps_pass_over_small_forget_sets_more_often(data, tmp_path):
    for least, epochs, split, common in itertools.product(
        (0, 3, 50), (0.1, 1.0, 4.0), ("forget05", "forget10"), ({"batch_size": 4}, {"gradient_accumulation_steps": 2})
    ):
        wanted = settings(data, tmp_path, least_steps=least, epochs=[epochs], common=common)
        run = run_of(wanted, "npo_gd", split, 0, (1.0, epochs))
        count = {"forget05": 40, "forget10": 80}[split]
        step = run.batch_size * run.gradient_accumulation_steps
        assert run.epochs * count / step == pytest.approx(max(least, epochs * count / step))
    # a step more, for a single row, would be rounding
    for least, count, batch in itertools.product((7, 14, 29, 56, 113), (7, 40, 200, 400), (1, 2, 8)):
        wanted = settings(data, tmp_path, least_steps=least, common={"batch_size": batch, "adapter": {"kind": "full"}})
        run = run_of(wanted, "npo_gd", "forget05", 0, (1.0, 1e-3), ("x.jsonl", count))
        assert len(schedule([1] * count, [1], epochs=run.epochs, batch=batch, seed=0)) == least * batch


# ---- processes: cells stand for themselves by a small script

SCRIPT = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
spec = json.loads((folder / "spec.json").read_text())
with open(folder.parent.parent / "ran.txt", "a") as file:
    file.write(folder.name + "\\n")
while (folder / "wait").exists():
    time.sleep(0.02)
if (folder / "fail").exists():
    sys.exit("a bug")
for part in sys.argv[2:]:
    (folder / f"{part}-forget10.json").touch()
(folder / "cell.json").write_text(json.dumps({"status": "done", "all_seconds": 0.1}))
"""


def small(monkeypatch):
    monkeypatch.setattr(executors, "command_line", lambda folder, parts: ["-c", SCRIPT, str(folder), *parts])
    monkeypatch.setattr(forks, "PRELOAD", ())


def plain_jobs(count, parts=("validation",)):
    return [
        CellJob(plan.Cell(f"m{i}", ("forget10",), 0, (1.0, 1.0), {"i": i}, f"key{i}"), parts) for i in range(count)
    ]


def ran(out):
    return (out / "ran.txt").read_text().split() if (out / "ran.txt").exists() else []


def wait_until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def test_finished_cells_never_run_again_and_killed_ones_do(tmp_path, monkeypatch):
    small(monkeypatch)
    jobs, lock = plain_jobs(4), hold(tmp_path)
    (tmp_path / "cells" / "key1").mkdir(parents=True)
    (tmp_path / "cells" / "key1" / "wait").touch()
    (tmp_path / "cells" / "key2").mkdir()
    (tmp_path / "cells" / "key2" / "fail").touch()
    found = {}
    local = Local(2, [])
    loop = run_cells(tmp_path, jobs, local, lock)
    start = Local.start
    processes = {}

    def noted(self, folder, *rest):
        processes[folder.name] = start(self, folder, *rest)
        return processes[folder.name]

    monkeypatch.setattr(Local, "start", noted)
    for cell, reason in loop:
        found[cell.key] = reason
        if len(found) == 3:
            # key0, key2 and key3 went through the other slot while key1 waited
            os.kill(processes["key1"].process.pid, signal.SIGKILL)
    assert found == {
        "key0": "",
        "key1": "killed by SIGKILL, as happens where memory runs out",
        "key2": "a bug",
        "key3": "",
    }
    assert sorted(ran(tmp_path)) == ["key0", "key1", "key2", "key3"]
    for name in ("key1/wait", "key2/fail"):
        (tmp_path / "cells" / name).unlink()
    assert {c.key: why for c, why in run_cells(tmp_path, jobs, local, lock)} == {"key1": "", "key2": ""}
    assert sorted(ran(tmp_path)[4:]) == ["key1", "key2"]
    assert list(run_cells(tmp_path, jobs, local, lock)) == []
    # another part of a cell is another job
    assert [c.key for c, _ in run_cells(tmp_path, plain_jobs(1, ("test",)), local, lock)] == ["key0"]
    assert list(run_cells(tmp_path, plain_jobs(1, PARTS), local, lock)) == []
    local.close()
    os.close(lock)


def test_cells_go_on_where_memory_ends_what_they_are_forked_from(tmp_path, monkeypatch):
    small(monkeypatch)
    jobs, lock, local = plain_jobs(3), hold(tmp_path), Local(1, [])
    (tmp_path / "cells" / "key1").mkdir(parents=True)
    (tmp_path / "cells" / "key1" / "wait").touch()
    started, found = [], {}
    start = Local.start
    monkeypatch.setattr(
        Local, "start", lambda self, folder, *rest: started.append(folder.name) or start(self, folder, *rest)
    )

    def ends():
        wait_until(lambda: "key1" in ran(tmp_path))
        local._forks._server.kill()

    threading.Thread(target=ends).start()
    for cell, reason in run_cells(tmp_path, jobs, local, lock):
        found[cell.key] = reason
    local.close()
    os.close(lock)
    assert started == ["key0", "key1", "key2"]
    assert (found["key0"], found["key1"][:17], found["key2"]) == ("", "killed by SIGKILL", "")


def test_a_process_that_the_system_refuses_is_asked_for_again(tmp_path, monkeypatch):
    small(monkeypatch)
    limit = tmp_path / "limit"
    (tmp_path / "nofork.py").write_text(f"""
import os, pathlib
real, limit = os.fork, pathlib.Path({str(limit)!r})
def fork():
    if limit.exists():
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return real()
os.fork = fork
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(forks, "PRELOAD", ("nofork",))
    monkeypatch.setattr(cells, "AGAIN", 0.2)
    jobs, lock, local = plain_jobs(3), hold(tmp_path), Local(2, [])
    (tmp_path / "cells" / "key0").mkdir(parents=True)
    (tmp_path / "cells" / "key0" / "wait").touch()

    def later():
        wait_until(lambda: ran(tmp_path))
        limit.touch()
        time.sleep(1)
        limit.unlink()
        (tmp_path / "cells" / "key0" / "wait").unlink()

    (tmp_path / "cells" / "key1").mkdir()
    threading.Thread(target=later).start()
    found = {c.key: why for c, why in run_cells(tmp_path, jobs, local, lock)}
    assert found == {"key0": "", "key1": "", "key2": ""}
    # without any cell at work nothing would make room
    limit.touch()
    with pytest.raises(UserError, match=r"Resource temporarily unavailable.*`workers`"):
        list(run_cells(tmp_path / "more", plain_jobs(1), local, lock))
    local.close()
    os.close(lock)


def test_a_cell_without_a_log_has_ended_all_the_same(tmp_path):
    assert executors.why(str(tmp_path), 1) == "exit status 1"
    assert executors.why(str(tmp_path), 0) == ""


def test_an_interrupt_ends_the_cells_that_run(tmp_path, monkeypatch):
    small(monkeypatch)
    jobs, lock = plain_jobs(2), hold(tmp_path)
    (tmp_path / "cells" / "key1").mkdir(parents=True)
    (tmp_path / "cells" / "key1" / "wait").touch()
    local = Local(2, [])
    loop = run_cells(tmp_path, jobs, local, lock)
    assert next(loop)[0].key == "key0"
    loop.close()
    local.close()
    os.close(lock)
    os.close(hold(tmp_path, patience=5))
    assert finished(tmp_path, *(jobs[1].cell, jobs[1].parts)) is None


def test_a_fork_does_what_an_interpreter_would(tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "PRELOAD", ())
    see = (
        "import os, sys; print(sys.argv, os.getcwd(), os.environ['OMP_NUM_THREADS']); sys.stdin.read(); print('never')"
    )
    server = forks.Forks()
    made = server.start(["-c", see, "a b"], tmp_path / "log", str(tmp_path), {"OMP_NUM_THREADS": "3"})
    wait_until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().endswith("3\n"))
    assert (tmp_path / "log").read_text() == f"['-c', 'a b'] {tmp_path} 3\n"
    assert made.poll() is None
    made.kill()
    wait_until(lambda: made.poll() is not None)
    assert made.poll() == -signal.SIGKILL
    codes = {}
    for program in ("raise SystemExit", "raise SystemExit(3)", "raise SystemExit('why')", "1 / 0", "int()"):
        fork = server.start(["-c", program], tmp_path / "log", str(tmp_path), {})
        wait_until(lambda fork=fork: fork.poll() is not None)
        codes[program] = fork.poll(), (tmp_path / "log").read_text().strip().rpartition("\n")[2]
    server.close()
    assert codes == {
        "raise SystemExit": (0, ""),
        "raise SystemExit(3)": (3, ""),
        "raise SystemExit('why')": (1, "why"),
        "1 / 0": (1, "ZeroDivisionError: division by zero"),
        "int()": (0, ""),
    }


def test_forks_end_with_what_started_them(tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "PRELOAD", ())
    waits = "import threading; from alter.comparison.cell import die_with_parent; die_with_parent(); import time; time.sleep(600)"
    for end in (lambda server: server._server.kill(), lambda server: server.close()):
        server = forks.Forks()
        made = server.start(["-c", waits], tmp_path / "log", str(tmp_path), {})
        assert made.poll() is None
        end(server)
        # a process that is gone, or a zombie that nobody waits for
        wait_until(
            lambda pid=made.pid: (
                not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_text()
            )
        )
        wait_until(lambda made=made: made.poll() == -signal.SIGKILL)


def test_modules_that_cannot_be_imported_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "PRELOAD", ("alter.no_such_module",))
    server = forks.Forks()
    with pytest.raises(UserError, match=r"has ended: ModuleNotFoundError: No module named 'alter.no_such_module'"):
        server.start(["-c", "1"], tmp_path / "log", str(tmp_path), {})
    server.close()


def test_one_comparison_at_a_time_in_a_folder(tmp_path):
    lock = hold(tmp_path)
    with pytest.raises(UserError, match="Another `alter compare` works in"):
        hold(tmp_path, patience=0)
    os.close(lock)
    os.close(hold(tmp_path, patience=0))


def test_each_worker_has_its_share_of_the_threads_and_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [executors.share_of_threads(n) for n in (1, 2, 4, 9)] == [6, 3, 1, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert executors.share_of_threads(1) == len(os.sched_getaffinity(0))
    assert executors.gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert executors.gpus(None) == ["2", "GPU-5"]
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        assert executors.gpus(None) == []
    see = "import os,sys;open(sys.argv[1]+'/cell.json','w').write('{\"status\":\"done\",\"gpu\":\"'+os.environ['CUDA_VISIBLE_DEVICES']+'\"}')"
    monkeypatch.setattr(executors, "command_line", lambda folder, _: ["-c", see, str(folder)])
    lock = hold(tmp_path)
    jobs = plain_jobs(4, parts=())
    assert [why for _, why in run_cells(tmp_path, jobs, Local(2, ["2", "GPU-5"]), lock)] == [""] * 4
    assert {finished(tmp_path, job.cell, ())["gpu"] for job in jobs} == {"2", "GPU-5"}
    os.close(lock)


# ---- real cells


@pytest.fixture
def short(monkeypatch):
    """Replies of a few tokens: what they say does not matter here."""
    monkeypatch.setattr(replies, "MAX_NEW_TOKENS", 4)


def run_work(out, cell, parts=PARTS):
    folder = out / "cells" / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(cell.spec))
    cell_work.work(folder, parts)
    return folder, json.loads((folder / "cell.json").read_text())


def only_cell(wanted, out):
    [cell] = runs_of(plan.lay_out(wanted, out))
    return cell


def values(folder, name):
    return [(r.metric, r.value, r.per_item) for r in read_records(folder / name)]


def test_a_cell_unlearns_evaluates_both_parts_and_leaves_no_weights(data, tmp_path, short):
    wanted = settings(
        data, tmp_path, methods=["graddiff", "lora_gd"], rates=[1.0], epochs=[0.01], least_steps=3, common={}, limit=4
    )
    made = plan.lay_out(wanted, tmp_path)
    for cell in runs_of(made):
        folder, found = run_work(tmp_path, cell)
        assert found["status"] == "done"
        [costs] = found["stages"]
        assert (costs["steps"], costs["trained_parameters"] > 0, costs["peak_memory"] > 1e7) == (3, True, True)
        assert sorted(p.name for p in folder.iterdir()) == [
            *("cell.json", "run0.json", "spec.json", "test-forget10.json", "validation-forget10.json"),
        ]
        [record] = [r for r in read_records(folder / "test-forget10.json") if r.metric == "model_utility"]
        assert (record.provenance["seed"], "torch" in record.provenance["versions"]) == (0, True)
    wanted = wanted.model_copy(update={"limit": None})
    made = plan.lay_out(wanted, tmp_path)
    folder, found = run_work(tmp_path, made.models["original", "forget10"])
    assert (found["status"], found["stages"]) == ("done", [])
    parts = {part: {r.metric: r for r in read_records(folder / f"{part}-forget10.json")} for part in PARTS}
    assert {"model_utility", "forget_truth_ratio", "forget_distinct_2"} <= set(parts["test"])
    assert parts["validation"]["forget_rouge"].n + parts["test"]["forget_rouge"].n == 10
    assert parts["test"]["forget_rouge"].extra["data"] == "test"
    unseen = [{"question": f"New {i}?", "answer": f"N{i}."} for i in range(6)]
    wanted = settings(data, tmp_path, holdout=str(write_jsonl(tmp_path / "unseen.jsonl", unseen)), retrained={})
    made = plan.lay_out(wanted, tmp_path)
    folder, found = run_work(tmp_path, made.models["original", "forget10"])
    attack = {
        part: {r.metric: r for r in read_records(folder / f"{part}-forget10.json")}["mia_min_k"] for part in parts
    }
    assert sum(len(record.extra["scores"]["holdout"]) for record in attack.values()) == 6
    own = cell_figures(read_records(folder / "test-forget10.json"), None)
    assert choice.forgetting(own, "holdout") == pytest.approx(1 - abs(2 * attack["test"].value - 1))


def test_a_run_that_diverges_is_a_failed_cell(data, tmp_path):
    wanted = settings(
        data,
        tmp_path,
        methods=["graddiff"],
        rates=[1e6],
        common={"batch_size": 4, "warmup_steps": 0, "learning_rate": 1e24},
    )
    folder, found = run_work(tmp_path, only_cell(wanted, tmp_path))
    assert found["status"] == "failed"
    assert "loss is nan" in found["reason"]
    assert str(tmp_path) not in found["reason"]
    assert "\n" not in found["reason"]
    assert not (folder / "stage0").exists()


def test_figures_that_are_no_numbers_are_a_failed_cell(data, tmp_path, monkeypatch):
    wanted = settings(data, tmp_path)
    cell = plan.lay_out(wanted, tmp_path).models["original", "forget10"]

    def broken(*arguments, **named):
        result = measuring.tofu_metrics(*arguments, **named, which=["likelihood"])
        result.sets["forget"].truth_ratio[0] = math.nan
        return result

    monkeypatch.setattr(cell_work, "tofu_metrics", broken)
    _, found = run_work(tmp_path, cell)
    assert (found["status"], found["reason"][:12]) == ("failed", "Truth ratios")


def test_a_fork_that_memory_ends_is_no_result_of_its_cell(data, tmp_path, monkeypatch):
    cell = plan.lay_out(settings(data, tmp_path), tmp_path).models["original", "forget10"]

    def killed(*_, **__):
        return list(forked.mapped([0, 1], lambda _: os.kill(os.getpid(), signal.SIGKILL), 2))

    monkeypatch.setattr(cell_work, "tofu_metrics", killed)
    with pytest.raises(UserError, match="ended by SIGKILL"):
        run_work(tmp_path, cell)
    assert finished(tmp_path, cell, PARTS) is None


class Killed(BaseException):
    """Stands for a kill: no handler of an error sees it."""


def chain_of(data, out, method, steps=2, **changes):
    own = {"method": method, "learning_rate": 1e-2, "batch_size": 4, "domain_column": "author"}
    own |= {"router_fit": {"steps": 25 * steps}, "learning_rate_experts": 1e-2} if method == "alter" else {}
    return settings(
        *(data, out),
        methods=["m"],
        settings={"m": own | changes.pop("own", {})},
        splits=["forget05", "forget10"],
        continual=True,
        rates=[1.0],
        epochs=[0.01],
        least_steps=steps,
        common={},
        limit=1,
        retrained={},
        **changes,
    )


def trained(monkeypatch):
    """Counts the runs that are trained."""
    folders, real = [], cell_work.unlearn
    monkeypatch.setattr(cell_work, "unlearn", lambda run: folders.append(run.out.rpartition(os.sep)[2]) or real(run))
    return folders


def killed_once(monkeypatch, where, name, before=lambda *_, **__: None, when=lambda *_, **__: True):
    """From now on the first call of a function for which `when` says so kills its process."""
    real, left = getattr(where, name), [1]

    def call(*arguments, **named):
        if left and when(*arguments, **named):
            left.clear()
            before(*arguments, **named)
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(where, name, call)


def test_a_cell_killed_anywhere_ends_with_the_same_numbers(data, tmp_path, monkeypatch):
    splits = []

    def quick(network, tokenizer, split, *rest, **named):
        splits.append(split)
        return measuring.tofu_metrics(network, tokenizer, split, *rest, **named, which=["likelihood"])

    monkeypatch.setattr(cell_work, "tofu_metrics", quick)
    wanted = chain_of(data, tmp_path / "whole", "lora_gd")
    whole, found = run_work(tmp_path / "whole", only_cell(wanted, tmp_path / "whole"))
    assert (found["status"], [costs["steps"] for costs in found["stages"]]) == ("done", [2, 2])
    runs = trained(monkeypatch)

    def again(place, again_trained, where, name, parts=PARTS, **rule):
        out = tmp_path / place
        cell = only_cell(wanted, out)
        with monkeypatch.context() as patch:
            killed_once(patch, where, name, **rule)
            with pytest.raises(Killed):
                run_work(out, cell, parts)
        runs.clear()
        splits.clear()
        folder, found = run_work(out, cell)
        assert runs == again_trained
        assert (found["status"], len(found["stages"])) == ("done", 2)
        for part, split in itertools.product(PARTS, cell.chain):
            assert values(folder, f"{part}-{split}.json") == values(whole, f"{part}-{split}.json")
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())

    both = ["stage0", "stage1"]
    again("evaluation", [], cell_work, "tofu_metrics")
    again("costs", both, cell_work, "write_atomic", when=lambda path, _: path.name == "run0.json")
    again("chain", ["stage1"], cell_work, "start_from", when=lambda folder, spec, place: place == 1)

    def half(model, folder, name, tokenizer):
        (folder / f".{name}.partial").mkdir()
        (folder / f".{name}.partial" / "config.json").touch()

    again("base", ["stage1"], cell_work, "save_adapter", before=half)
    again("second part", [], cell_work, "write_records", when=lambda path, _: path.name == "validation-forget10.json")
    # what was measured before is not measured again
    assert splits == ["forget10", "forget10"]

    # killed while the weights of a measured cell are deleted: what is left is never taken for the result
    def torn(path, **_):
        for file in path.rglob("*.safetensors"):
            file.unlink()

    out = tmp_path / "deletion"
    cell = only_cell(wanted, out)
    folder, _ = run_work(out, cell, ["validation"])
    with monkeypatch.context() as patch:
        killed_once(patch, cell_work.shutil, "rmtree", before=torn)
        with pytest.raises(Killed):
            cell_work.forget_weights(folder)
    runs.clear()
    run_work(out, cell, ["test"])
    assert runs == both
    assert values(folder, "test-forget10.json") == values(whole, "test-forget10.json")
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_forgetting_leaves_nothing_that_was_trained(tmp_path):
    for name in ("stage0/adapter", "stage1/model", "base1", ".base2.partial"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("cell.json", "run0.json", "validation-forget10.json"):
        (tmp_path / name).touch()
    cell_work.forget_weights(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cell.json", "run0.json", "validation-forget10.json"]


def test_measuring_test_rows_later_is_measuring_them_at_once(data, tmp_path, monkeypatch, short):
    wanted = settings(data, tmp_path / "a", methods=["graddiff"], rates=[1.0], limit=2)
    kept = wanted.model_copy(update={"keep": True})
    whole, _ = run_work(tmp_path / "a", only_cell(kept, tmp_path / "a"))
    assert (whole / "stage0" / "model").is_dir()
    runs = trained(monkeypatch)
    cell = only_cell(wanted, tmp_path / "b")
    folder, _ = run_work(tmp_path / "b", cell, ["validation"])
    assert (folder / "stage0" / "model").is_dir()
    assert not (folder / "test-forget10.json").exists()
    run_work(tmp_path / "b", cell, ["test"])
    assert runs == ["stage0"]
    assert not (folder / "stage0").exists()
    for part in PARTS:
        assert values(folder, f"{part}-forget10.json") == values(whole, f"{part}-forget10.json")


def chain(data, out, method, monkeypatch, steps=2, **own):
    """Train a chain and measure validation rows; its folder, with the weights, and the settings of both runs."""
    monkeypatch.setattr(replies, "MAX_NEW_TOKENS", 1)
    cell = only_cell(chain_of(data, out, method, steps, own=own), out)
    folder, found = run_work(out, cell, ["validation"])
    assert found["status"] == "done", found["reason"]
    assert {path.name for path in folder.glob("validation-*.json")} == {f"validation-{s}.json" for s in cell.chain}
    started = [json.loads((folder / f"run{place}.json").read_text())["settings"] for place in (0, 1)]
    assert [len(read_rows(run["forget"])) for run in started] == [40, 40]
    assert not {json.dumps(r) for r in read_rows(started[0]["forget"])} & {
        json.dumps(r) for r in read_rows(started[1]["forget"])
    }
    return folder, started


def answers(model, adapter, rows):
    """Mean log-probability of the rows' characters."""
    network, tokenizer = load_model(str(model), adapter and str(adapter), device="cpu")
    total = []
    for row in rows:
        ids = torch.tensor([tokenizer(f"{row['question']} {row['answer']}")["input_ids"]])
        with torch.no_grad():
            logp = network(input_ids=ids).logits.log_softmax(-1)
        total.append(logp[0, :-1].gather(1, ids[0, 1:, None]).mean().item())
    return np.array(total)


@pytest.mark.parametrize("targets", [None, ["v_proj", "q_proj"]])
def test_a_chain_of_alter_grows(data, tmp_path, monkeypatch, targets):
    own = {} if targets is None else {"adapter": {"target_modules": targets}}
    folder, started = chain(data, tmp_path, "alter", monkeypatch, steps=8 if targets is None else 2, **own)
    assert started[1]["start_from"] == str(folder / "stage0" / "adapter")
    before, after = (
        load_file(str(folder / f"stage{place}" / "adapter" / "adapter_model.safetensors")) for place in (0, 1)
    )
    config = json.loads((folder / "stage1" / "adapter" / "adapter_config.json").read_text())
    assert config["domains"] == ["38", "39", "36", "37"]
    moved = 0.0
    for name, old in before.items():
        new = after[name]
        if ".alter_B." in name:
            assert torch.equal(new[:, : old.shape[1]], old)
            moved += new[:, old.shape[1] :].abs().sum().item()
        elif "router" in name:
            assert torch.equal(new[: len(old)], old)
        else:
            assert torch.equal(new, old)
    assert moved > 0
    if targets is None:
        first = read_rows(started[0]["forget"])[::5]
        said = [
            answers(data / "model", adapter, first)
            for adapter in (None, folder / "stage0" / "adapter", folder / "stage1" / "adapter")
        ]
        gone = abs(said[1] - said[0]).mean()
        assert gone > 0.01
        # what the first stage did to its rows stands; the second's experts may take a token of them
        assert abs(said[2] - said[1]).mean() < 0.2 * gone


def test_a_chain_of_lora_merges(data, tmp_path, monkeypatch):
    folder, started = chain(data, tmp_path, "lora_gd", monkeypatch)
    assert started[1]["model"] == str(folder / "base1")
    base, first = (load_file(str(path / "model.safetensors")) for path in (data / "model", folder / "base1"))
    adapter = load_file(str(folder / "stage0" / "adapter" / "adapter_model.safetensors"))
    settings_of = json.loads((folder / "stage0" / "adapter" / "adapter_config.json").read_text())
    scale = settings_of["lora_alpha"] / settings_of["r"]
    changed = 0
    for name, weight in base.items():
        A, B = (adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        wanted = weight if A is None else weight + scale * B @ A
        assert torch.allclose(first[name], wanted, atol=1e-6)
        changed += not torch.equal(first[name], weight)
    assert changed == sum(".lora_A." in name for name in adapter)
    assert cell_work.model_at(folder, json.loads((folder / "spec.json").read_text()), 1) == (
        *(str(folder / "base1"), str(folder / "stage1" / "adapter")),
    )


def test_a_chain_of_o3_trains_one_lora_on_and_adds_a_detector(data, tmp_path, monkeypatch):
    folder, started = chain(data, tmp_path, "o3", monkeypatch)
    first, second = (folder / f"stage{place}" / "adapter" for place in (0, 1))
    assert [run["start_from"] for run in started] == [None, str(first)]
    assert [run["model"] for run in started] == [str(data / "model")] * 2
    assert cell_work.model_at(folder, json.loads((folder / "spec.json").read_text()), 1) == (
        *(str(data / "model"), str(second)),
    )
    assert not (folder / "base1").exists()
    forms = [json.loads((path / "inference.json").read_text())["calibrations"] for path in (first, second)]
    assert len(forms[1]) == 2
    assert forms[1][:1] == forms[0]
    before, after = (load_file(str(path / "lora" / "adapter_model.safetensors")) for path in (first, second))
    steps = [(after[name] - before[name]).abs().max().item() for name in before]
    # two steps of Adam at 1e-2 from where the first stage ended
    assert all(0 < step < 0.05 for step in steps)
    # as the detectors know them
    rows = [r | {"question": f"Question: {r['question']}\nAnswer:"} for r in read_rows(started[0]["forget"])[::5]]
    said = [answers(data / "model", adapter, rows) for adapter in (None, first, second)]
    assert (abs(said[1] - said[0]) > 1e-4).all()
    assert (abs(said[2] - said[0]) > 1e-4).all()


def test_a_chain_of_an_initialiser_merges_what_it_says(data, tmp_path, monkeypatch):
    folder, _ = chain(data, tmp_path, "loku", monkeypatch, retain_objective={"kind": "cross_entropy"})
    rows = read_rows(str(data / "full.json"))[::160]
    merged = answers(folder / "base1", None, rows)
    assert merged == pytest.approx(answers(data / "model", folder / "stage0" / "adapter", rows), abs=1e-4)
    assert abs(merged - answers(data / "model", None, rows)).max() > 1e-3


def test_a_chain_of_full_weights_goes_on_with_them(data, tmp_path, monkeypatch):
    folder, started = chain(data, tmp_path, "graddiff", monkeypatch)
    assert [run["model"] for run in started] == [str(data / "model"), str(folder / "stage0" / "model")]
    models = [load_file(str(path / "model.safetensors")) for path in (data / "model", *folder.glob("stage?/model"))]
    for a, b in itertools.combinations(models, 2):
        assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
@pytest.mark.slow
def test_killed_with_its_parent_and_resumed_to_the_end(data, tmp_path):
    out = tmp_path / "out"
    wanted = settings(data, out, methods=["lora_gd"], workers=2, limit=2, retrained={})
    made = plan.lay_out(wanted, out)
    text = wanted.model_dump_json(exclude={"settings"})
    code = f"import json; from alter.comparison.run import *; compare(Compare.model_validate(json.loads({text!r})))"
    first = made.models["original", "forget10"]
    parent = children.Child(code=code)
    wait_until(lambda: finished(out, first, PARTS) is not None, 240)
    parent.kill()
    parent.wait()
    # the cells' processes end with their parent, and let go of the folder
    os.close(hold(out, patience=10))
    done = {cell.key: (out / "cells" / cell.key / "cell.json").stat().st_mtime_ns for cell in cells_of(made)
            if finished(out, cell, PARTS) is not None}  # fmt: skip
    assert 1 <= len(done) < len(cells_of(made))
    children.run(code=code)
    assert all(finished(out, cell, ["validation"])["status"] == "done" for cell in cells_of(made))
    assert sorted(len(measured(out, cell)) for cell in runs_of(made)) == [1, 2]
    assert not list(out.glob("cells/*/stage*"))
    for key, when in done.items():
        assert (out / "cells" / key / "cell.json").stat().st_mtime_ns == when
    assert "| lora_gd |" in (out / "table.md").read_text()
