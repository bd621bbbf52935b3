"""`alter compare`: equal budgets, cells that survive kills, a choice that sees validation rows alone, and the table."""

import csv
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from alter import cli, compare, metrics
from alter.benchmarks import tofu
from alter.compare import Compare, Retrained, choose, divide, dominated, plan, run_of
from alter.errors import UserError
from alter.records import Record, read_records, write_records
from pico import save_pico, write_jsonl

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


def cells_of(made):
    return [*made.models.values(), *(c for by in made.grid.values() for seeds in by.values() for c in seeds.values())]


def figures_of(generator, n=20):
    """Made-up records of one part: what a cell's process writes, as far as the choice and the table read it."""
    ratios = generator.gamma(2.0, size=n).tolist()
    values = {name: float(generator.random()) for name in compare.FIGURES if name != "forget_quality"}
    rows = [Record("x", name, value, n) for name, value in values.items()]
    rows.append(Record("x", "mia_min_k", float(generator.random()), n))
    return [*rows, Record("x", "forget_truth_ratio", 0.5, n, per_item=ratios, extra={"fingerprint": "same"})]


def write_cell(out, cell, generator, status="done", parts=compare.PARTS):
    folder = out / "cells" / cell.key
    if status == "done":
        for part in parts:
            write_records(folder / f"{part}.json", figures_of(generator))
    costs = {"seconds": 2.0, "trained_parameters": 100, "peak_memory": 1e9} if cell.setting else {}
    content = {"status": status, "reason": "loss is nan", "all_seconds": 3.0, **costs}
    (folder / "cell.json").parent.mkdir(parents=True, exist_ok=True)
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
        assert choose(candidates, 0.55, 0.95) == (best[1], keeps)
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


def test_no_author_has_evaluation_rows_on_both_sides(data, tmp_path):
    rows = compare.evaluation_rows(settings(data, tmp_path), "forget10")
    number = {part: {name: {row["question"] for row in own} for name, own in rows[part].items()} for part in rows}
    for name in ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        sides = [{question.split(",")[0] for question in number[part][name]} for part in compare.PARTS]
        assert all(sides)
        assert not sides[0] & sides[1]
        assert sum(len(rows[part][name]) for part in rows) == len(tofu.tofu_rows(name, str(data)))


def test_figures_against_scipy(tmp_path):
    generator = np.random.default_rng(3)
    own, other = figures_of(generator), figures_of(generator)
    found = compare.figures(own, other)
    test = stats.ks_2samp(own[-1].per_item, other[-1].per_item)
    assert found["distance"] == pytest.approx(test.statistic)
    assert found["forget_quality"] == pytest.approx(math.log10(test.pvalue))
    assert compare.forgetting(found, "retrained") == pytest.approx(1 - test.statistic)
    assert compare.forgetting({"mia_min_k": 0.2}, "holdout") == pytest.approx(0.4)
    assert compare.forgetting({"forget_rouge": 0.2}, "rouge") == pytest.approx(0.8)
    # a ratio that overflows is null in the file, and still the largest of all
    for name, rows in (("own", own), ("other", other)):
        rows[-1].per_item[3] = math.inf
        write_records(tmp_path / name, rows)
    kept = compare.figures(read_records(tmp_path / "own"), read_records(tmp_path / "other"))
    assert kept["distance"] == pytest.approx(stats.ks_2samp(own[-1].per_item, other[-1].per_item).statistic)
    strange = [Record("x", "forget_truth_ratio", 0.5, 2, per_item=[1.0], extra={"fingerprint": "other"})]
    with pytest.raises(UserError, match="other rows"):
        compare.figures(own, strange)


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
    made = plan(wanted, tmp_path)
    assert {len([c for seeds in by.values() for c in seeds.values()]) for by in made.grid.values()} == {8}
    assert len(made.searched(wanted)) == 3 * 2 * 8
    once = wanted.model_copy(update={"search_seeds": 1})
    assert [cell.seed for cell in made.searched(once)] == [0] * 3 * 2 * 4
    runs = {s: run_of(wanted, "alter", "forget10", 0, s) for s in made.grid["alter", "forget10"]}
    assert runs[3.0, 2.0].learning_rate_experts == pytest.approx(3 * runs[1.0, 1.0].learning_rate_experts)
    assert runs[3.0, 2.0].learning_rate_shared == pytest.approx(3 * runs[1.0, 1.0].learning_rate_shared)
    assert (runs[3.0, 2.0].epochs, runs[3.0, 2.0].max_steps) == (2, 1)
    mine = run_of(wanted, "mine", "forget05", 1, (1.0, 1.0))
    assert (mine.adapter.kind, mine.adapter.r, mine.adapter.alpha, mine.objective.kind) == (
        *("lora", 2, 16),
        "gradient_ascent",
    )
    assert (mine.forget, mine.retain, mine.seed) == (f"{data}:forget05", f"{data}:retain95", 1)


def test_a_cell_is_known_by_what_decides_it(data, tmp_path, monkeypatch):
    def keys(**changes):
        return {c.key for c in cells_of(plan(settings(data, tmp_path / "o", **changes), tmp_path / "o"))}

    first = keys()
    assert keys() == first == keys(keep=True, workers=3)
    assert keys(methods=["npo", "graddiff"]) == first
    # other search rules change no cell, other rows all of them
    assert keys(utility_floor=0.5) == first
    assert keys(rates=[1.0]) < first
    for change in ({"division_seed": 3}, {"limit": 2}, {"validation": 0.6}):
        assert not keys(**change) & first
    renamed = keys(methods=["g", "n"], settings={"g": {"method": "graddiff"}, "n": {"method": "npo"}})
    assert renamed == first
    models = keys(common={"max_steps": 2, "batch_size": 4}) & first
    assert len(models) == 2
    weights = data / "model" / "generation_config.json"
    before = weights.read_bytes()
    weights.write_bytes(before + b"\n")
    assert len(keys() & first) == 1
    weights.write_bytes(before)
    monkeypatch.setattr(compare, "source_digest", lambda: "edited")
    assert not keys() & first


def test_the_code_that_counts_is_that_of_training_and_evaluation(monkeypatch):
    read = []
    monkeypatch.setattr(compare, "digest", lambda parts: read.extend(name for name, _ in parts) or "d")
    compare.source_digest()
    assert {
        "trainer.py",
        "objectives.py",
        "scoring.py",
        "metrics.py",
        "benchmarks/tofu.py",
        "adapter/layer.py",
    } <= set(read)
    assert not {"cli.py", "compare.py", "demo.py", "report.py"} & set(read)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ["npo", "grad_dif"]}, "No method 'grad_dif'.*Did you mean 'graddiff'"),
        ({"methods": []}, "methods is empty"),
        ({"rates": []}, "rates is empty"),
        ({"epochs": []}, "epochs is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"rates": [1.0, 1.0]}, "rates has 1.0 twice"),
        ({"rates": [0.0]}, "above 0"),
        ({"epochs": [math.nan]}, "above 0"),
        ({"methods": ["npo", "npo"]}, "'npo' twice"),
        ({"methods": ["npo", "b"], "settings": {"b": {"method": "npo"}}}, "Two cells are the same run"),
        ({"methods": ["original"]}, "'original' is a row"),
        ({"search_seeds": 2}, "search_seeds is 2, but there are 1"),
        ({"settings": {"np": {}}}, "settings has 'np'.*Did you mean 'npo'"),
        ({"settings": {"npo": {"epochs": 3}}}, "'epochs' is the comparison's own"),
        ({"settings": {"npo": {"bathc_size": 3}}}, "Method npo: bathc_size"),
        ({"methods": ["b"], "settings": {"b": {"method": "npoo"}}}, "Did you mean 'npo'"),
        ({"retrained": {"forget10": "nowhere/at/all"}}, "No model at nowhere/at/all"),
        ({"model": "builtin:tofu-mini/orignal"}, "Did you mean 'builtin:tofu-mini/original'"),
        ({"splits": ["forget01"]}, "forget01_perturbed"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"holdout": "/nowhere.jsonl"}, "/nowhere.jsonl"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(data, tmp_path, changes, says, monkeypatch):
    monkeypatch.setattr(compare, "run_cells", lambda *_: pytest.fail("something was run"))
    with pytest.raises(UserError, match=says):
        compare.compare(settings(data, tmp_path / "out", **changes))


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
    made = plan(wanted, tmp_path)
    write_all(tmp_path, made)
    chosen = compare.choices(wanted, made, tmp_path)
    rows = compare.rows_of(wanted, made, chosen, tmp_path)
    poison = np.random.default_rng(99)
    for cell in cells_of(made):
        write_cell(tmp_path, cell, poison, parts=["test"])
    assert compare.choices(wanted, made, tmp_path) == chosen
    assert compare.rows_of(wanted, made, chosen, tmp_path) != rows
    rows = compare.rows_of(wanted, made, chosen, tmp_path)
    changed = False
    for seed in range(5):
        poison = np.random.default_rng(100 + seed)
        for cell in cells_of(made):
            write_cell(tmp_path, cell, poison, parts=["validation"])
        other = compare.choices(wanted, made, tmp_path)
        changed = changed or {k: c.setting for k, c in other.items()} != {k: c.setting for k, c in chosen.items()}
        assert compare.rows_of(wanted, made, chosen, tmp_path) == rows
    assert changed


def test_the_table_is_that_of_a_loop_over_the_records(data, tmp_path, monkeypatch, capsys):
    wanted = settings(data, tmp_path, seeds=[0, 1, 2], search_seeds=2, splits=["forget10", "forget05"])
    made = plan(wanted, tmp_path)
    write_all(tmp_path, made)
    monkeypatch.setattr(compare, "run_cells", lambda *_: iter(()))
    rows = {(row.name, row.split): row for row in compare.compare(wanted)}
    assert list(rows) == [
        *(("original", "forget10"), ("retrained", "forget10"), ("graddiff", "forget10"), ("npo", "forget10")),
        *(("original", "forget05"), ("graddiff", "forget05"), ("npo", "forget05")),
    ]
    with open(tmp_path / "table.csv") as file:
        table = {(line["method"], line["split"]): line for line in csv.DictReader(file)}
    records = read_records(tmp_path / "records.json")
    for (name, split), row in rows.items():
        if row.choice is None:
            continue
        cells = made.grid[name, split][row.choice.setting].values()
        per_seed = {"model_utility": [], "forget_rouge": [], "forget_quality": []}
        for cell in cells:
            own = {r.metric: r for r in read_records(tmp_path / "cells" / cell.key / "test.json")}
            for metric in ("model_utility", "forget_rouge"):
                per_seed[metric].append(own[metric].value)
            if split == "forget10":
                twin = read_records(tmp_path / "cells" / made.models["retrained", split].key / "test.json")
                ratios = next(r for r in twin if r.metric == "forget_truth_ratio").per_item
                quality = metrics.forget_quality(own["forget_truth_ratio"].per_item, ratios)
                per_seed["forget_quality"].append(quality.log10)
        for metric, values in per_seed.items():
            if not values:
                assert metric not in row.mean
                continue
            assert row.mean[metric] == pytest.approx(sum(values) / 3)
            assert row.spread[metric] == pytest.approx(statistics.stdev(values))
            assert float(table[name, split][metric]) == pytest.approx(sum(values) / 3)
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
    assert "with 2 seeds" in text
    assert compare.CRITERIA["rouge"] in text
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "compare.json").read_text())["settings"]["seeds"] == [0, 1, 2]
    assert "table.md" in capsys.readouterr().out


def test_dominated_rows_are_marked_among_the_methods_of_a_split_only(data, tmp_path):
    wanted = settings(data, tmp_path, rates=[1.0])
    made = plan(wanted, tmp_path)
    for seed in range(30):
        write_all(tmp_path, made, seed)
        chosen = compare.choices(wanted, made, tmp_path)
        rows = {row.name: row for row in compare.rows_of(wanted, made, chosen, tmp_path)}
        a, b = ((rows[n].mean["forget_quality"], rows[n].mean["model_utility"]) for n in ("graddiff", "npo"))
        assert rows["graddiff"].dominated == (b[0] >= a[0] and b[1] >= a[1] and a != b)
        assert not rows["original"].dominated
        text = compare.markdown(wanted, list(rows.values()), {"forget10": {"validation": 1, "test": 2}})
        line = next(line for line in text.splitlines() if line.startswith("| npo | "))
        assert ("**" in line) == (not rows["npo"].dominated)
        assert line.split("|")[3].strip().strip("*") == f"{b[1]:.3f}"


def test_a_failed_cell_is_named_and_does_not_stop_the_rest(data, tmp_path, monkeypatch):
    wanted = settings(data, tmp_path, seeds=[0, 1])
    made = plan(wanted, tmp_path)
    write_all(tmp_path, made)
    monkeypatch.setattr(compare, "run_cells", lambda *_: iter(()))
    best = {row.name: row.choice.setting for row in compare.compare(wanted) if row.choice}
    write_cell(tmp_path, made.grid["npo", "forget10"][best["npo"]][1], None, status="failed")
    rows = {row.name: row for row in compare.compare(wanted)}
    # a setting that diverged with one seed is not chosen
    assert rows["npo"].choice.setting != best["npo"]
    assert (rows["npo"].choice.finished, rows["npo"].choice.budget) == (3, 4)
    assert "loss is nan" in (tmp_path / "table.md").read_text()
    assert rows["graddiff"].notes == []
    for by in made.grid["npo", "forget10"].values():
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
    assert [compare.criterion(wanted, s) for s in ("forget10", "forget05")] == ["retrained", "rouge"]
    assert compare.criterion(wanted.model_copy(update={"holdout": "h"}), "forget05") == "holdout"
    assert compare.criterion(wanted.model_copy(update={"retrained": Retrained()}), "forget10") == "rouge"


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
(folder / "cell.json").write_text(json.dumps({"status": "done", "all_seconds": 0.1}))
"""


def small(monkeypatch):
    monkeypatch.setattr(compare, "command", lambda folder: [sys.executable, "-S", "-c", SCRIPT, str(folder)])


def plain_cells(count):
    return [compare.Cell(f"m{i}", "forget10", 0, (1.0, 1.0), {"i": i}, f"key{i}") for i in range(count)]


def ran(out):
    return (out / "ran.txt").read_text().split() if (out / "ran.txt").exists() else []


def wait_until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def test_finished_cells_never_run_again_and_killed_ones_do(tmp_path, monkeypatch):
    small(monkeypatch)
    cells, lock = plain_cells(4), compare.hold(tmp_path)
    (tmp_path / "cells" / "key1").mkdir(parents=True)
    (tmp_path / "cells" / "key1" / "wait").touch()
    (tmp_path / "cells" / "key2").mkdir()
    (tmp_path / "cells" / "key2" / "fail").touch()
    found = {}
    loop = compare.run_cells(tmp_path, cells, 2, [], lock)
    start = compare._start
    processes = {}

    def noted(out, cell, *rest):
        processes[cell.key] = start(out, cell, *rest)
        return processes[cell.key]

    monkeypatch.setattr(compare, "_start", noted)
    for cell, reason in loop:
        found[cell.key] = reason
        if len(found) == 3:
            # key0, key2 and key3 went through the other slot while key1 waited
            processes["key1"].process.send_signal(signal.SIGKILL)
    assert found == {"key0": "", "key1": "killed by SIGKILL", "key2": "a bug", "key3": ""}
    assert sorted(ran(tmp_path)) == ["key0", "key1", "key2", "key3"]
    for name in ("key1/wait", "key2/fail"):
        (tmp_path / "cells" / name).unlink()
    assert {c.key: why for c, why in compare.run_cells(tmp_path, cells, 2, [], lock)} == {"key1": "", "key2": ""}
    assert sorted(ran(tmp_path)[4:]) == ["key1", "key2"]
    assert list(compare.run_cells(tmp_path, cells, 2, [], lock)) == []
    os.close(lock)


def test_an_interrupt_ends_the_cells_that_run(tmp_path, monkeypatch):
    small(monkeypatch)
    cells, lock = plain_cells(2), compare.hold(tmp_path)
    (tmp_path / "cells" / "key1").mkdir(parents=True)
    (tmp_path / "cells" / "key1" / "wait").touch()
    loop = compare.run_cells(tmp_path, cells, 2, [], lock)
    assert next(loop)[0].key == "key0"
    loop.close()
    os.close(lock)
    os.close(compare.hold(tmp_path, patience=5))
    assert compare.finished(tmp_path, cells[1]) is None


def test_one_comparison_at_a_time_in_a_folder(tmp_path):
    lock = compare.hold(tmp_path)
    with pytest.raises(UserError, match="Another `alter compare` works in"):
        compare.hold(tmp_path, patience=0)
    os.close(lock)
    os.close(compare.hold(tmp_path, patience=0))


def test_each_worker_has_its_share_of_the_threads_and_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [compare.share_of_threads(n) for n in (1, 2, 4, 9)] == [6, 3, 1, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert compare.share_of_threads(1) == len(os.sched_getaffinity(0))
    assert compare.gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert compare.gpus(None) == ["2", "GPU-5"]
    see = "import os,sys;open(sys.argv[1]+'/cell.json','w').write('{\"gpu\":\"'+os.environ['CUDA_VISIBLE_DEVICES']+'\"}')"
    monkeypatch.setattr(compare, "command", lambda folder: [sys.executable, "-S", "-c", see, str(folder)])
    lock = compare.hold(tmp_path)
    cells = plain_cells(4)
    assert [why for _, why in compare.run_cells(tmp_path, cells, 2, ["2", "GPU-5"], lock)] == [""] * 4
    assert {compare.finished(tmp_path, cell)["gpu"] for cell in cells} == {"2", "GPU-5"}
    os.close(lock)


# ---- real cells


def run_work(out, cell):
    folder = out / "cells" / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(cell.spec))
    compare.work(folder)
    return folder, json.loads((folder / "cell.json").read_text())


def test_a_cell_unlearns_evaluates_both_parts_and_leaves_no_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", 8)
    wanted = settings(data, tmp_path, methods=["graddiff", "lora_gd"], rates=[1.0])
    made = plan(wanted, tmp_path)
    for name in ("graddiff", "lora_gd"):
        folder, found = run_work(tmp_path, made.grid[name, "forget10"][1.0, 1.0][0])
        assert found["status"] == "done"
        assert (found["steps"], found["trained_parameters"] > 0, found["peak_memory"] > 1e7) == (1, True, True)
        assert sorted(p.name for p in folder.iterdir()) == [
            *("cell.json", "run.json", "spec.json", "test.json", "validation.json"),
        ]
    folder, found = run_work(tmp_path, made.models["original", "forget10"])
    assert (found["status"], "seconds" in found) == ("done", False)
    parts = {part: {r.metric: r for r in read_records(folder / f"{part}.json")} for part in compare.PARTS}
    assert {"model_utility", "forget_truth_ratio", "forget_distinct_2"} <= set(parts["test"])
    assert parts["validation"]["forget_rouge"].n + parts["test"]["forget_rouge"].n == 10
    assert parts["test"]["forget_rouge"].extra["data"] == "test"
    unseen = [{"question": f"New {i}?", "answer": f"N{i}."} for i in range(6)]
    wanted = settings(data, tmp_path, holdout=str(write_jsonl(tmp_path / "unseen.jsonl", unseen)), retrained={})
    made = plan(wanted, tmp_path)
    folder, found = run_work(tmp_path, made.models["original", "forget10"])
    attack = {part: {r.metric: r for r in read_records(folder / f"{part}.json")}["mia_min_k"] for part in parts}
    assert sum(len(record.extra["scores"]["holdout"]) for record in attack.values()) == 6
    own = compare.figures(read_records(folder / "test.json"), None)
    assert compare.forgetting(own, "holdout") == pytest.approx(1 - abs(2 * attack["test"].value - 1))


def test_a_run_that_diverges_is_a_failed_cell(data, tmp_path):
    wanted = settings(data, tmp_path, methods=["graddiff"], rates=[1e30], common={"batch_size": 4, "warmup_steps": 0})
    folder, found = run_work(tmp_path, plan(wanted, tmp_path).grid["graddiff", "forget10"][1e30, 1.0][0])
    assert found["status"] == "failed"
    assert "loss is nan" in found["reason"]
    assert str(tmp_path) not in found["reason"]
    assert not (folder / "run").exists()


def test_figures_that_are_no_numbers_are_a_failed_cell(data, tmp_path, monkeypatch):
    wanted = settings(data, tmp_path)
    cell = plan(wanted, tmp_path).models["original", "forget10"]

    def broken(*arguments, **named):
        result = tofu.tofu_metrics(*arguments, **named, which=["likelihood"])
        result.sets["forget"].truth_ratio[0] = math.nan
        return result

    monkeypatch.setattr(compare, "tofu_metrics", broken)
    _, found = run_work(tmp_path, cell)
    assert (found["status"], found["reason"][:12]) == ("failed", "Truth ratios")


@pytest.mark.slow
def test_killed_with_its_parent_and_resumed_to_the_end(data, tmp_path):
    out = tmp_path / "out"
    wanted = settings(data, out, methods=["lora_gd"], workers=2)
    made = plan(wanted, out)
    text = wanted.model_dump_json(exclude={"settings"})
    code = f"import json; from alter.compare import *; compare(Compare.model_validate(json.loads({text!r})))"
    line = [sys.executable, "-c", code]
    first = made.models["original", "forget10"]
    parent = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: compare.finished(out, first) is not None, 240)
    parent.kill()
    parent.wait()
    # the cells' processes end with their parent, and let go of the folder
    os.close(compare.hold(out, patience=10))
    done = {cell.key: (out / "cells" / cell.key / "cell.json").stat().st_mtime_ns for cell in cells_of(made)
            if compare.finished(out, cell) is not None}  # fmt: skip
    assert 1 <= len(done) < len(cells_of(made))
    subprocess.run(line, check=True, timeout=400, capture_output=True)
    assert all(compare.finished(out, cell)["status"] == "done" for cell in cells_of(made))
    for key, when in done.items():
        assert (out / "cells" / key / "cell.json").stat().st_mtime_ns == when
    assert "| lora_gd |" in (out / "table.md").read_text()
