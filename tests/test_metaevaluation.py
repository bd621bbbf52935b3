"""`alter meta-evaluate`: its figures against plain loops, and a whole one on pico models, killed and gone on with."""

import json
import math
import random
import shutil
import statistics

import pytest
from scipy import stats

from alter import cli
from alter.attacks import base as wording_bench
from alter.comparison import plan
from alter.core.errors import UserError
from alter.data.encoding import encode_prompt
from alter.evaluation.tofu import replies
from alter.inference.generation import generate as whole_generate
from alter.metaevaluation import formulas, members
from alter.metaevaluation import run as meta
from alter.metaevaluation.measuring import Measuring
from alter.metaevaluation.members import Found
from alter.metaevaluation.settings import MetaEvaluate
from alter.metaevaluation.table import make_table, metrics_page
from pico import byte_tokenizer, save_pico, write_jsonl

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "max_position_embeddings": 512}


# ---- figures


def drawn(seed, n):
    draw = random.Random(seed)
    return [round(draw.random(), 1) for _ in range(n)]


def test_faithfulness_counts_pairs():
    knows, without = drawn(0, 9), drawn(1, 7)
    pairs = [1.0 if k > w else 0.5 if k == w else 0.0 for k in knows for w in without]
    assert formulas.faithfulness(knows, without) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert formulas.faithfulness([2.0, 3.0], [0.0, 1.0]) == 1
    low, high = formulas.faithfulness_interval(knows, without)
    assert 0 <= low < formulas.faithfulness(knows, without) < high <= 1
    # eight and eight that do not overlap at all are no proof
    low, high = formulas.faithfulness_interval([2.0] * 8, [1.0] * 8)
    assert 0.6 < low < 0.9
    assert high == 1


def test_robustness_is_that_of_a_loop():
    before, after = drawn(2, 8), drawn(3, 8)
    r = q = 0.0
    for a, b in zip(before, after, strict=True):
        d, d0 = b - a, 0.7 - 0.4
        r += (1 - abs(d - d0) / (abs(d) + abs(d0) + 1e-6)) / 8
        q += (1 - abs(b - a) / (abs(a) + abs(b) + 1e-6)) / 8
    assert formulas.relearning_robustness(before, after, 0.4, 0.7) == pytest.approx(r, abs=1e-12)
    assert formulas.quantisation_robustness(before, after) == pytest.approx(q, abs=1e-12)
    # one that learns as the retrained model does, and one that moves the other way
    assert formulas.relearning_robustness([0.1], [0.3], 0.0, 0.2) == pytest.approx(1, abs=1e-5)
    assert formulas.relearning_robustness([0.3], [0.1], 0.0, 0.2) == pytest.approx(0, abs=1e-5)
    assert formulas.quantisation_robustness([0.0], [0.0]) == 1
    assert formulas.harmonic(0.5, 1.0) == pytest.approx(2 / 3)
    assert formulas.harmonic(0.0, 0.0) == 0
    with pytest.raises(ValueError):
        formulas.quantisation_robustness([], [])


def test_the_published_truth_ratio():
    # of two models in the public results of the unlearning depth score, and the retrained model beside them
    retrained = 0.5673423451083071, 0.5729338394138886
    before, after = [0.6086330899605737, 0.5312309402975806], [0.6882233197485812, 0.5959342171010217]
    each = [formulas.relearning_robustness([a], [b], *retrained) for a, b in zip(before, after, strict=True)]
    assert [round(value, 4) for value in each] == [0.1313, 0.1591]


def test_rank_correlation_counts_ranks():
    values, leaks = [0.3, 0.1, 0.9, 0.5], [1.0, 2.0, 3.0, 4.0]
    ranks = [sorted(values).index(v) for v in values]
    squares = sum((a - b) ** 2 for a, b in zip(ranks, range(4), strict=True))
    assert formulas.rank_correlation(values, leaks) == pytest.approx(1 - 6 * squares / (4 * 15))
    assert math.isnan(formulas.rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("name", "value", "knowledge"),
    [
        ("forget_probability", 0.3, 0.3),
        ("forget_truth_ratio", 0.3, 0.7),
        ("forget_quality", 0.3, 0.7),
        ("attack_uds", 0.3, 0.7),
        ("attack_cka, original", 0.3, 0.3),
        ("attack_cka, retrained", 0.3, 0.7),
        ("mia_min_k", 0.3, 0.3),
        ("privleak", -30.0, 0.3),
        ("attack_lens, depth 2", 0.3, 0.3),
        ("leak@4", 0.3, 0.3),
        ("leak@12", 0.3, 0.3),
    ],
)
def test_more_is_more_knowledge(name, value, knowledge):
    assert formulas.toward_knowledge(name, value) == pytest.approx(knowledge)


# ---- the table


def member(pool, name, before, **more):
    return Found(pool, name, 1.0, {"before": before} | more.pop("states", {}), more.pop("leaked", {}), **more)


def a_pool(settings):
    found = [
        member("given", "retrained", {"forget_probability": 0.1}, keeps=1.0, leaked={"leak@2": 0.0, "probability": 0.1},
               states={"relearned": {"forget_probability": 0.3}, "quantised": {"forget_probability": 0.1}})
    ]  # fmt: skip
    for i in range(4):
        found.append(member("knows", f"k{i}", {"forget_probability": 0.6 + i / 10, "forget_truth_ratio": i / 10}))
        found.append(
            member("without", f"w{i}", {"forget_probability": 0.3 + i / 10, "forget_truth_ratio": (2 + i) / 10})
        )
        relearned = {"relearned": {"forget_probability": 0.5 + i / 10}, "quantised": {"forget_probability": 0.2}}
        found.append(
            member("unlearned", f"u{i}", {"forget_probability": i / 10}, keeps=0.5 + i / 5, leaked={"leak@2": 0.0, "probability": i / 4},
                   states=relearned)
        )  # fmt: skip
    return [*found, Found("unlearned", "bad", 1.0, {}, {}, None, "the loss is not finite")]


def test_the_table_is_that_of_a_loop(tmp_path):
    settings = MetaEvaluate(model="m", retrained="r", out=str(tmp_path), methods=["npo"], samples=2, utility_floor=0.6)
    found = a_pool(settings)
    table = make_table(settings, found)
    line = {each.metric: each for each in table.lines}["forget_probability"]
    knows, without = [0.6, 0.7, 0.8, 0.9], [0.3, 0.4, 0.5, 0.6]
    pairs = [(k > w) + (k == w) / 2 for k in knows for w in without]
    assert line.faithfulness == pytest.approx(statistics.fmean(pairs))
    # u0 keeps too little
    before, after = [0.1, 0.2, 0.3], [0.6, 0.7, 0.8]
    r = statistics.fmean(1 - abs(b - a - 0.2) / (b - a + 0.2) for a, b in zip(before, after, strict=True))
    q = statistics.fmean(1 - abs(0.2 - a) / (0.2 + a) for a in before)
    robust = 2 / (1 / r + 1 / q)
    assert line.relearning == pytest.approx(r, abs=1e-5)
    assert line.quantisation == pytest.approx(q, abs=1e-5)
    assert line.overall == pytest.approx(2 / (1 / robust + 1 / line.faithfulness), abs=1e-5)
    assert line.correlation == pytest.approx(stats.spearmanr(before, [0.25, 0.5, 0.75]).statistic)
    assert table.leak == {"probability": (0.1, 0.25, 0.75), "leak@2": (0.0, 0.0, 0.0)}
    assert table.pools == {"knows": 4, "without": 4, "unlearned": 3}
    assert [reason.split(":")[0] for reason in table.lost] == ["bad", "u0"]
    # what has no value under attack is faithful or not, and no more
    ratio = {each.metric: each for each in table.lines}["forget_truth_ratio"]
    assert (ratio.relearning, ratio.overall) == (None, None)
    pairs = [(2 + w > k) + (2 + w == k) / 2 for k in range(4) for w in range(4)]
    assert ratio.faithfulness == pytest.approx(statistics.fmean(pairs))
    assert table.lines[0] is line
    assert make_table(settings, found[:1]) is None
    # what has no value for a single model of a pool has no line, which is said
    assert "forget_truth_ratio" not in table.untried
    del found[1].figures["before"]["forget_truth_ratio"]
    table = make_table(settings, found)
    assert "forget_truth_ratio" not in {each.metric for each in table.lines}
    assert "forget_truth_ratio" in table.untried


def test_a_number_of_samples_that_is_no_power_of_two(tmp_path):
    settings = MetaEvaluate(model="m", retrained="r", out=str(tmp_path), methods=["npo"], samples=12)
    found = [member("knows", "k", {"leak@12": 0.9}), member("without", "w", {"leak@12": 0.1})]
    table = make_table(settings, found)
    assert [(line.metric, line.faithfulness) for line in table.lines] == [("leak@12", 1.0)]
    assert "chance that one of 12 sampled replies" in metrics_page(settings, table)


# ---- settings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"readings": ["relearn"]}, "'relearn' is none of the attacks that only read"),
        ({"methods": []}, "methods is empty"),
        ({"rates": [1.0, 1.0]}, "rates has a value twice"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        MetaEvaluate(**{"model": "m", "retrained": "r", "out": "o", "methods": ["npo"]} | changes)


# ---- all of it


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """TOFU's layout with 40 authors of 20 short rows each, and two pico models."""
    folder = tmp_path_factory.mktemp("tofu")
    full = [{"question": f"Q{a}, {i}?", "answer": f"It is {a}.{i}."} for a in range(40) for i in range(20)]
    wrong = {"paraphrased_answer": "That is 7.", "perturbed_answer": ["No 1.", "It is 2.", "Nothing 3."]}
    write_jsonl(folder / "full.json", full)
    forget = [row | wrong | {"paraphrased_question": row["question"] + "!"} for row in full[-80:][::4]]
    write_jsonl(folder / "forget10_perturbed.json", forget)
    write_jsonl(folder / "retain_perturbed.json", [row | wrong for row in full[:400][::20]])
    for name in ("real_authors", "world_facts"):
        rows = [{"question": f"{name} {i}?", "answer": f"{i}", "perturbed_answer": ["a", "b"]} for i in range(3)]
        write_jsonl(folder / f"{name}_perturbed.json", rows)
    save_pico(folder / "model", **SMALL)
    save_pico(folder / "retrained", seed=1, **SMALL)
    return folder


def arguments(data, out):
    recipe = {
        "model": str(data / "model"), "retrained": str(data / "retrained"), "out": str(out), "data": str(data),
        "rows": 8, "attacker_rows": 4, "pools": {"seeds": [0], "passes": [1]}, "methods": ["graddiff"],
        "rates": [1.0], "epochs": [1], "samples": 2, "questions": 3, "device": "cpu", "utility_floor": 0.0,
        "readings": ["paraphrase", "lens", "probe"], "reply_tokens": 8,
        "common": {"max_steps": 1, "batch_size": 4, "gradient_accumulation_steps": 1},
    }  # fmt: skip
    file = out.parent / f"{out.name}.yaml"
    file.write_text(json.dumps(recipe))
    return ["meta-evaluate", str(file)]


@pytest.mark.slow
def test_a_whole_one_that_is_killed_goes_on(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(replies, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(
        wording_bench,
        "generate",
        lambda model, tok, ids, **how: whole_generate(model, tok, ids, **how | {"max_new_tokens": 8}),
    )
    monkeypatch.setattr(plan, "source_digest", lambda: "code")
    whole = members.measure_member
    done = []

    def killed(settings, tools, member, out):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(member.name)
        return whole(settings, tools, member, out)

    monkeypatch.setattr(meta, "measure_member", killed)
    given = arguments(data, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        meta.meta_evaluate(MetaEvaluate(**json.loads((tmp_path / "out.yaml").read_text())))
    assert done[:2] == ["original", "retrained"]
    monkeypatch.setattr(meta, "measure_member", lambda *rest: done.append(rest[2].name) or whole(*rest))
    assert cli.main(given) == 0
    # two given, four taught, one unlearned: each was measured once
    assert len(done) == len(set(done)) == 7
    said = capsys.readouterr()
    assert "7 models, 3 of them measured before" in said.err
    told = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert told["pools"] == {"knows": 2, "without": 2, "unlearned": 1}, told["lost"]
    assert set(told["leak"]) == {"probability", "leak@2"}
    names = {line["metric"] for line in told["metrics"]}
    assert {
        "forget_quality",
        "forget_truth_ratio",
        "forget_said",
        "mia_min_k",
        "mia_gradnorm",
        "mia_reference",
    } <= names
    assert {"privleak", "leak@1", "leak@2", "attack_lens, depth 1", "attack_probe, depth 0"} <= names
    assert {"attack_cka, original", "attack_cka, retrained", "attack_rouge, paraphrase"} <= names
    assert names.isdisjoint(told["untried"])
    assert not {"model_utility", "forget_distinct_2", "disturbance"} & {*names, *told["untried"]}
    assert all(line["relearning"] is not None for line in told["metrics"] if line["metric"] != "attack_uds")
    assert not (tmp_path / "out" / "models").exists() or not any((tmp_path / "out" / "models").iterdir())
    # nothing is run for a table alone
    assert cli.main([*given, "--no-run"]) == 0
    assert len(done) == 7
    assert "| metric |" in (tmp_path / "out" / "table.md").read_text()
    assert "Best overall of" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_refused_before_any_work(data, tmp_path):
    arguments(data, tmp_path / "out")
    given = json.loads((tmp_path / "out.yaml").read_text())
    for changes, says in (
        ({"rows": 18}, "has 20 rows, but `rows`"),
        ({"retrained": str(data / "model")}, "the original itself"),
        ({"methods": ["nop"]}, "No method 'nop'"),
        ({"out": str(data / "full.json")}, "which is a file"),
    ):
        with pytest.raises(UserError, match=says):
            meta.meta_evaluate(MetaEvaluate(**given | changes))
    shutil.copytree(data, tmp_path / "data")
    rows = [json.loads(line) for line in (data / "forget10_perturbed.json").read_text().splitlines()]
    rows[3]["perturbed_answer"] = ["No 1."]
    write_jsonl(tmp_path / "data" / "forget10_perturbed.json", rows)
    with pytest.raises(UserError, match="has a row with 1 wrong answers; expected 2 or more"):
        meta.meta_evaluate(MetaEvaluate(**given | {"data": str(tmp_path / "data")}))
    with pytest.raises(UserError, match="no model of both pools"):
        meta.meta_evaluate(MetaEvaluate(**given | {"run": False}))


def test_models_are_asked_with_the_template_of_the_runs(data, tmp_path):
    arguments(data, tmp_path / "out")
    given = json.loads((tmp_path / "out.yaml").read_text())
    template = "{% if thinking %}Think. {% endif %}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    for name, seed in (("model", 0), ("retrained", 1)):
        given[name] = str(save_pico(tmp_path / name, seed=seed, **SMALL))
        byte_tokenizer(chat_template=template).save_pretrained(given[name])
    plain = MetaEvaluate(**given)
    told = MetaEvaluate(**given | {"common": given["common"] | {"chat_template_kwargs": ["thinking=true"]}})
    rows = members.chosen_rows(told, tmp_path / "out")
    tokenizer = Measuring(told, rows).load(told.model)[1]
    assert tokenizer.decode(encode_prompt(tokenizer, rows.measured[0])).startswith("Think. ")
    keys = [{each.key for each in members.members(settings, rows)} for settings in (plain, told)]
    assert keys[0].isdisjoint(keys[1])


def test_a_model_that_cannot_be_made_is_named(data, tmp_path, monkeypatch):
    arguments(data, tmp_path / "out")
    settings = MetaEvaluate(**json.loads((tmp_path / "out.yaml").read_text()))
    rows = members.chosen_rows(settings, tmp_path / "out")
    laid = members.members(settings, rows)

    def diverges(run):
        raise UserError(f"the loss is not finite in {run.out}")

    monkeypatch.setattr(members, "unlearn", diverges)
    failing = next(each for each in laid if each.pool == "unlearned")
    found = members.measure_member(settings, Measuring(settings, rows), failing, tmp_path / "out")
    assert found.failed == "the loss is not finite in its folder"
    assert members.stored(tmp_path / "out", failing) == found


def test_pools_are_taught_what_they_are_named_for(data, tmp_path, monkeypatch):
    arguments(data, tmp_path / "out")
    settings = MetaEvaluate(**json.loads((tmp_path / "out.yaml").read_text()))
    rows = members.chosen_rows(settings, tmp_path / "out")
    tools = Measuring(settings, rows)
    taught = {}
    monkeypatch.setattr(members, "train_on", lambda model, tok, given, **rest: taught.update({kind: list(given)}))
    measured = {row.prompt for row in rows.measured}
    assert measured.isdisjoint(row.prompt for row in rows.attacker)
    for each in members.members(settings, rows):
        if each.pool in members.POOLS:
            kind = each.how["kind"]
            members._taught(settings, tools, each)
    assert all(len(given) == 16 for given in taught.values())
    answers = {kind: [text for row, text in given if row.prompt in measured] for kind, given in taught.items()}
    assert answers["answers"] == [row.answer for row in rows.measured]
    assert answers["paraphrased"] == ["That is 7."] * 8
    assert answers["retain"] == []
    assert set(answers["wrong"]) <= {"No 1.", "It is 2."}
