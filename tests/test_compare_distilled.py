"""`alter compare` of distilled rows: their keys, what is refused, what is measured and counted, and what a kill leaves."""

import json
import shutil

import numpy as np
import pytest

from alter.comparison import cell as one
from alter.comparison import cells, plan
from alter.comparison import run as compare
from alter.comparison.cell import measured_at, model_at
from alter.comparison.distilling import distilled_rule
from alter.comparison.division import PARTS
from alter.core.errors import UserError
from alter.evaluation.tofu import measuring, replies
from alter.metaevaluation import members
from alter.metaevaluation.settings import MetaEvaluate
from alter.storage.records import read_records
from pico import write_jsonl
from test_compare import (  # noqa: F401
    Killed,
    cells_of,
    chain_of,
    data,
    killed_once,
    only_cell,
    run_work,
    runs_of,
    settings,
    short,
    source_digest,
    trained,
    values,
    write_cell,
)

BRIEF = {
    "max_steps": 2,
    "batch_size": 4,
    "general": ["builtin:world_facts[:4]"],
    "precision": "fp32",
    "learning_rate": 1e-3,
}
HOW = {"rows": 2, "samples": 2, "k": 2, "questions": 3, "passes": 1}


@pytest.fixture(autouse=True)
def _code_is_read_once(monkeypatch):
    monkeypatch.setattr(plan, "source_digest", source_digest)


def distilled(data, out, own=BRIEF, method="lora_gd", **changes):  # noqa: F811
    row = {"method": method, "distill": own}
    given = {"methods": ["m"], "rates": [1.0], "limit": 2, "settings": {"m": row}, **changes}
    return settings(data, out, **given)


def keys(wanted, out):
    return {cell.key for cell in cells_of(plan.lay_out(wanted, out))}


def test_only_what_decides_a_distilled_cell_is_in_its_key(data, tmp_path, monkeypatch):  # noqa: F811
    def key(**changes):
        return only_cell(distilled(data, tmp_path / "o", BRIEF | changes), tmp_path / "o").key

    first = key()
    assert key() == first == key(log_steps=3, checkpoint_steps=7)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"The wind is from the west on day {i}."} for i in range(4)])
    other = shutil.copy(text, tmp_path / "other.jsonl")
    assert key(general=[str(text)]) == key(general=[str(other)]) != first
    write_jsonl(tmp_path / "other.jsonl", [{"text": "It rains."}])
    found = [key(general=[str(other)]), key(general=[str(text)]), key(max_steps=3), key(noise={"alpha": 0.1})]
    assert len({first, *found}) == 5
    two = {
        c.seed: c.spec["stages"][0] for c in runs_of(plan.lay_out(distilled(data, tmp_path, seeds=[0, 4]), tmp_path))
    }
    assert {seed: stage["distill"]["seed"] for seed, stage in two.items()} == {0: 0, 4: 4}
    # no other cell knows of it
    bare = {"npo": {}, "lora_gd": {}}
    both = {"methods": ["npo", "lora_gd", "m"], "settings": bare | {"m": {"method": "lora_gd", "distill": BRIEF}}}
    without = keys(settings(data, tmp_path, methods=["npo", "lora_gd"]), tmp_path)
    assert without < keys(settings(data, tmp_path, **both), tmp_path)
    assert all("distill" not in json.dumps(c.spec) for c in cells_of(plan.lay_out(settings(data, tmp_path), tmp_path)))
    monkeypatch.setattr(plan, "distilling_digest", lambda: "edited")
    assert key() != first
    assert keys(settings(data, tmp_path, methods=["npo", "lora_gd"]), tmp_path) == without


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"distill": {"max_step": 3}}, "settings.m.distill has 'max_step', which is no .*Did you mean 'max_steps'"),
        ({"distill": {"max_steps": 0}}, "Method m, distill: `max_steps`.*got 0"),
        (
            {"distill": {"form": "lora", "noise": {"alpha": 0.5}}},
            "Method m, distill: `noise.alpha` damages all weights",
        ),
        ({"distill": {"seed": 3}}, "'seed' is the comparison's own setting: leave it out of settings.m.distill"),
        ({"distill": {"student": "x"}}, "'student' is the comparison's own"),
        ({"distill": True}, r"settings.m.distill is True; expected settings of `alter distill` by name"),
        ({"distill": None}, r"settings.m.distill is None; expected settings"),
        ({"distill": {"general": ["/nowhere.txt"]}}, "/nowhere.txt"),
        ({"distill": {"names": ["Nobody Here"]}}, "None of the forget rows has one of the `names` Nobody Here"),
        ({"distill": {}, "quantization": "4bit"}, "Method m has `quantization` '4bit', and `distill` loads"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(data, tmp_path, row, says, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cells, "run_cells", lambda *_: pytest.fail("something was run"))
    with pytest.raises(UserError, match=says):
        compare.compare(
            settings(data, tmp_path / "out", methods=["npo", "m"], settings={"m": {"method": "lora_gd", **row}})
        )
    assert not (tmp_path / "out").exists()


def test_only_a_row_is_distilled(data, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"`common` has 'distill'.*give 'distill' to a row, under `settings`"):
        plan.lay_out(settings(data, tmp_path, common={"distill": BRIEF}), tmp_path)
    # what makes models by the same settings does not leave it out in silence
    given = {
        "model": str(data / "model"),
        "retrained": str(data / "retrained"),
        "out": str(tmp_path),
        "methods": ["m"],
    }
    wanted = MetaEvaluate.model_validate({**given, "settings": {"m": {"method": "lora_gd", "distill": BRIEF}}})
    with pytest.raises(UserError, match=r"settings.m has 'distill', which only `alter compare` does: leave it out"):
        list(members._runs(wanted))


@pytest.mark.parametrize("method", ["lora_gd", "graddiff", "alter"])
def test_the_plain_weights_are_measured_and_attacked(data, tmp_path, monkeypatch, short, method):  # noqa: F811
    common = {"max_steps": 1, "batch_size": 4, "domain_column": "author"}
    common |= {"router_fit": {"steps": 20, "max_tokens": 4000, "background": False}} if method == "alter" else {}
    wanted = distilled(data, tmp_path, method=method, survival=HOW, common=common, seeds=[3])
    cell = only_cell(wanted, tmp_path)
    loaded, real = [], one.load_model
    monkeypatch.setattr(one, "load_model", lambda *given, **how: loaded.append(given[:2]) or real(*given, **how))
    folder, found = run_work(tmp_path, cell)
    assert found["status"] == "done", found
    plain = (str(folder / "plain0" / "model"), None)
    # each part: its figures, then before and after the attack the same weights, beside the original
    assert loaded == [plain, plain, (str(data / "model"), None), plain, (str(data / "model"), None)]
    [costs] = found["stages"]
    own = costs["distill"]
    unlearning = json.loads((folder / "run0.json").read_text())
    distilling = json.loads((folder / "distill0.json").read_text())
    assert (own["steps"], costs["steps"]) == (2, 3)
    assert costs["seconds"] == pytest.approx(sum(unlearning["seconds"].values()) + sum(distilling["seconds"].values()))
    assert costs["trained_parameters"] == max(unlearning["trained_parameters"], distilling["trained_parameters"])
    told = distilling["settings"]
    adapter = None if method == "graddiff" else str(folder / "stage0" / "adapter")
    model = str(folder / "stage0" / "model") if method == "graddiff" else str(data / "model")
    assert (told["model"], told["adapter"], told["student"]) == (model, adapter, str(data / "model"))
    assert (told["forget"], told["retain"]) == (f"{data}:forget10", f"{data}:retain90")
    assert (told["seed"], told["closing_rows"]) == (3, 0)
    assert {path.name for path in folder.glob("*0*")} == {
        "run0.json",
        "distill0.json",
        *(f"{part}-forget10.json" for part in PARTS),
    }
    assert {r.metric for r in read_records(folder / "test-forget10.json")} >= {"model_utility", "attacked_leak"}


def test_a_plain_lora_is_measured_on_the_model_before(data, tmp_path):  # noqa: F811
    spec = only_cell(distilled(data, tmp_path, BRIEF | {"form": "lora"}, method="graddiff"), tmp_path).spec
    assert measured_at(tmp_path, spec, 0) == (str(data / "model"), str(tmp_path / "plain0" / "adapter"))
    assert model_at(tmp_path, spec, 0) == (str(tmp_path / "stage0" / "model"), None)


def test_a_distillation_that_diverges_is_a_failed_cell(data, tmp_path):  # noqa: F811
    own = BRIEF | {"learning_rate": 1e30, "max_steps": 3, "warmup": 0}
    folder, found = run_work(tmp_path, only_cell(distilled(data, tmp_path, own), tmp_path))
    assert (found["status"], "diverged" in found["reason"]) == ("failed", True), found
    assert not list(folder.glob("plain*"))


def torn(path, **_):
    """What is left of a folder when its deletion is killed: what marks it as a run's is gone, something else is not."""
    for file in (*path.glob("*.json"), *path.glob(".*")):
        file.unlink()


def test_a_cell_killed_anywhere_ends_with_the_same_numbers(data, tmp_path, monkeypatch):  # noqa: F811
    def quick(*given, **named):
        return measuring.tofu_metrics(*given, **named, which=["likelihood"])

    monkeypatch.setattr(one, "tofu_metrics", quick)
    wanted = distilled(data, tmp_path / "whole")
    whole, found = run_work(tmp_path / "whole", only_cell(wanted, tmp_path / "whole"))
    assert found["status"] == "done"
    runs, erased, real = trained(monkeypatch), [], one.distill
    monkeypatch.setattr(one, "distill", lambda given: erased.append(given.out) or real(given))

    def again(place, unlearned, distilled_anew, where, name, **rule):
        out = tmp_path / place
        cell = only_cell(wanted, out)
        with monkeypatch.context() as patch:
            killed_once(patch, where, name, **rule)
            with pytest.raises(Killed):
                run_work(out, cell)
        runs.clear()
        erased.clear()
        folder, found = run_work(out, cell)
        assert (runs, len(erased)) == (unlearned, distilled_anew), place
        assert (found["status"], found["stages"][0]["steps"]) == ("done", 3)
        for part in PARTS:
            assert values(folder, f"{part}-forget10.json") == values(whole, f"{part}-forget10.json")
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())

    def begun(given):
        shutil.copytree(tmp_path / "whole" / "rows", given.out)

    again("before", [], 1, one, "distill")
    again("within", [], 1, one, "distill", before=begun)
    again("costs", [], 1, one, "write_atomic", when=lambda path, _: path.name == "distill0.json")
    again("measuring", [], 0, one, "tofu_metrics")

    # killed while the weights of a measured cell are deleted, so that nothing tells their folders as a run's
    for place in (0, 1):
        out = tmp_path / f"deletion{place}"
        cell = only_cell(wanted, out)
        folder, _ = run_work(out, cell, ["validation"])
        with monkeypatch.context() as patch:
            first = "plain0" if place == 0 else "stage0"
            killed_once(
                patch, one.shutil, "rmtree", before=torn, when=lambda path, first=first, **_: path.name == first
            )
            with pytest.raises(Killed):
                one.forget_weights(folder)
        runs.clear()
        erased.clear()
        _, found = run_work(out, cell, ["test"])
        assert (found["status"], runs, len(erased)) == ("done", ["stage0"], 1)
        assert values(folder, "test-forget10.json") == values(whole, "test-forget10.json")


def test_each_model_of_a_chain_is_distilled_and_the_next_goes_on_from_what_was_not(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(replies, "MAX_NEW_TOKENS", 1)
    cell = only_cell(chain_of(data, tmp_path, "lora_gd", own={"distill": BRIEF}), tmp_path)
    folder, found = run_work(tmp_path, cell, ["validation"])
    assert found["status"] == "done", found
    assert [costs["distill"]["steps"] for costs in found["stages"]] == [2, 2]
    assert {path.name for path in folder.glob("validation-*.json")} == {f"validation-{s}.json" for s in cell.chain}
    told = [json.loads((folder / f"distill{place}.json").read_text())["settings"] for place in (0, 1)]
    # the last one's teacher has forgotten the rows of both, of which the second split holds the first's
    assert [each["forget"] for each in told] == [f"{data}:forget05", f"{data}:forget10"]
    assert [each["student"] for each in told] == [str(data / "model")] * 2
    assert told[1]["model"] == str(folder / "base1")
    began = json.loads((folder / "run1.json").read_text())["settings"]
    assert (began["model"], began["start_from"]) == (str(folder / "base1"), None)


def test_the_table_counts_both(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    wanted = distilled(data, tmp_path, methods=["npo", "m"], survival=HOW)
    made = plan.lay_out(wanted, tmp_path)
    for cell in cells_of(made):
        write_cell(tmp_path, cell, np.random.default_rng(0))
        file = tmp_path / "cells" / cell.key / "cell.json"
        found = json.loads(file.read_text())
        for costs in found["stages"]:
            costs |= {"steps": 1350, "seconds": 400.0} if cell.name == "m" else {"steps": 350}
            costs |= (
                {"distill": {"steps": 1000, "seconds": 300.0, "trained_parameters": 9}} if cell.name == "m" else {}
            )
        file.write_text(json.dumps(found))
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    rows = {row.name: row for row in compare.compare(wanted)}
    assert (rows["m"].mean["steps"], rows["m"].mean["distill_steps"]) == (1350, 1000)
    text = (tmp_path / "table.md").read_text()
    assert (
        "| wall time, s | steps | trained parameters | peak memory, GB | of it distilling, s | steps distilling |"
        in text
    )
    assert "| m | forget10 | 400 | 1,350 | 100 | 1.00 | 300 | 1,000 |" in text
    assert "| npo | forget10 | 2 | 350 | 100 | 1.00 | - | - |" in text
    assert "Distilled into plain weights once unlearned: m." in text
    assert "distill_seconds" in (tmp_path / "table.csv").read_text()
    assert distilled_rule(settings(data, tmp_path)) == []
