"""95 % intervals of figures: against loops, and how often they hold what they should."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from alter import metrics
from alter.comparison import survival
from alter.comparison.choice import cell_figures, intervals
from alter.comparison.settings import Survival
from alter.comparison.table import TableRow
from alter.comparison.words import _counted, _shown
from alter.data import Example, tofu_rows
from alter.evaluation.figures import Groups, metric_record
from alter.evaluation.tofu.results import TofuReference, TofuResult, TofuSet
from alter.evaluation.tofu.sets import set_authors, set_rows
from alter.rendering.terminal import between, half, table
from alter.reporting.attacks import _value
from alter.reporting.tables import record_tables
from alter.storage.records import Record
from pico import byte_tokenizer, pico


def test_an_auc_interval_has_the_score_equation_at_both_ends():
    z = stats.norm.ppf(0.975)
    for value, m, n in ((0.5, 8, 8), (0.93, 12, 7), (0.21, 40, 100)):
        for end in metrics.samples.auc_interval(value, m, n):
            more = ((m + n) / 2 - 1) * ((1 - end) / (2 - end) + end / (1 + end))
            assert abs(value - end) == pytest.approx(z * np.sqrt(end * (1 - end) * (1 + more) / (m * n)), abs=1e-9)
    low, high = metrics.samples.auc_interval(1.0, 8, 8)
    assert high == 1
    assert 0.6 < low < 0.9
    assert metrics.samples.auc_interval(0.0, 8, 8) == pytest.approx((1 - high, 1 - low))
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.samples.auc_interval(1.2, 8, 8)


def test_an_interval_over_groups_holds_the_true_mean_about_95_times_in_100():
    """Five replies to each of 30 prompts are not 150 rows: the interval over rows held the mean 70 times in 100."""
    draw, held = np.random.default_rng(0), {"groups": 0, "rows": 0}
    prompts = np.repeat(np.arange(30), 5)
    for _ in range(400):
        values = draw.normal(size=30)[prompts] + 0.7 * draw.normal(size=150)
        values[draw.random(150) < 0.1] = np.nan
        for name, found in (
            ("groups", metrics.samples.grouped_interval(values, prompts.tolist())),
            ("rows", metrics.samples.row_interval(values)),
        ):
            held[name] += found[0] <= 0 <= found[1]
    assert 0.91 <= held["groups"] / 400 <= 0.97
    assert held["rows"] / 400 < 0.75


@pytest.mark.parametrize("count", [2, 5, 10])
def test_an_interval_over_few_groups_holds_the_true_mean_as_often_as_it_should(count):
    """Draws of two groups hold it half as often: no mean lies outside theirs."""
    draw, held = np.random.default_rng(0), 0
    authors = np.repeat(np.arange(count), 20)
    for _ in range(400):
        low, high = metrics.samples.grouped_interval(
            draw.normal(size=count)[authors] + draw.normal(size=20 * count), authors.tolist()
        )
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.98
    shares = np.array([0, 0, 1, 1, 0.5, 1])
    assert metrics.samples.grouped_interval(shares, list("aabbbb")) == (0.0, 1.0)


def test_an_interval_over_few_groups_is_students_by_a_loop():
    values, groups = [1.1, 1.5, np.nan, 2.9, 2.2, 1.4], list("aabbbc")
    own, mean = {"a": [1.1, 1.5], "b": [2.9, 2.2], "c": [1.4]}, (1.1 + 1.5 + 2.9 + 2.2 + 1.4) / 5
    total = 0.0
    for each in own.values():
        total += sum(x - mean for x in each) ** 2
    spread = stats.t.ppf(0.975, 2) * np.sqrt(3 / 2 * total) / 5
    assert metrics.samples.grouped_interval(values, groups) == pytest.approx((mean - spread, mean + spread))


def test_an_interval_over_groups_is_that_of_a_loop(monkeypatch):
    monkeypatch.setattr(metrics.samples, "FEW_GROUPS", 3)
    values, groups = [0.1, 0.5, np.nan, 0.9, 0.2, 0.4], list("aabbbc")
    own = {"a": [0.1, 0.5], "b": [0.9, 0.2], "c": [0.4]}
    chosen = np.random.default_rng(0).integers(3, size=(2000, 3))
    means = []
    for row in chosen:
        drawn = [x for i in row for x in own["abc"[i]]]
        means.append(sum(drawn) / len(drawn))
    expected = np.quantile(means, [0.025, 0.975])
    assert metrics.samples.grouped_interval(values, groups) == pytest.approx(expected)
    # a row each is no group
    alone = metrics.samples.grouped_interval([0.1, 0.5, 0.9], list("abc"))
    assert alone == metrics.samples.row_interval([0.1, 0.5, 0.9])
    # none among six replies to two prompts is none among two
    assert metrics.samples.grouped_interval([0] * 6, list("aaabbb")) == metrics.samples.share_interval(0, 2)
    assert metrics.samples.grouped_interval([1] * 4, list("aabb")) == metrics.samples.share_interval(2, 2)
    assert metrics.samples.grouped_interval([0.2, 0.4], list("aa")) is None
    assert metrics.samples.grouped_interval([], []) is None
    assert metrics.samples.grouped_interval([np.nan], ["a"]) is None


@pytest.mark.parametrize(("gap", "m", "n"), [(0.0, 10, 10), (1.2, 8, 8), (2.0, 8, 16)])
def test_an_auc_interval_holds_the_true_auc_about_95_times_in_100(gap, m, n):
    draw, true = np.random.default_rng(0), stats.norm.cdf(gap / np.sqrt(2))
    held = 0
    for _ in range(600):
        low, high = metrics.samples.auc_interval(
            metrics.membership.auc(draw.normal(size=m), gap + draw.normal(size=n)), m, n
        )
        held += low <= true <= high
    assert 0.92 < held / 600 <= 0.995


def test_the_interval_of_utility_is_that_of_a_loop():
    draw = np.random.default_rng(5)
    sets = [draw.uniform(0.2, 1, size=(3, n)) for n in (7, 5, 9)]
    rows = np.random.default_rng(2)
    chosen = [rows.integers(each.shape[1], size=(400, each.shape[1])) for each in sets]
    found = []
    for d in range(400):
        total = 0.0
        for each, picked in zip(sets, chosen, strict=True):
            for figure_rows in each:
                total += 1 / (sum(figure_rows[i] for i in picked[d]) / len(picked[d]))
        found.append(9 / total)
    assert metrics.samples.utility_interval(sets, seed=2, draws=400) == pytest.approx(
        np.quantile(found, [0.025, 0.975])
    )
    groups = [[0, 0, 1, 2, 2, 2, 1], None, None]
    chosen[0] = np.random.default_rng(2).integers(3, size=(400, 3))
    again = np.random.default_rng(2)
    again.integers(3, size=(400, 3))
    chosen[1:] = [again.integers(each.shape[1], size=(400, each.shape[1])) for each in sets[1:]]
    members = [[0, 1], [2, 6], [3, 4, 5]]
    found = []
    for d in range(400):
        picks = [[i for g in chosen[0][d] for i in members[g]], chosen[1][d], chosen[2][d]]
        total = 0.0
        for each, picked in zip(sets, picks, strict=True):
            for figure_rows in each:
                total += 1 / (sum(figure_rows[i] for i in picked) / len(picked))
        found.append(9 / total)
    assert metrics.samples.utility_interval(sets, groups, seed=2, draws=400) == pytest.approx(
        np.quantile(found, [0.025, 0.975])
    )
    assert metrics.samples.utility_interval([np.full((3, 4), 0.5)] * 3) is None
    with pytest.raises(ValueError, match="one row at least"):
        metrics.samples.utility_interval([np.zeros((3, 0))])


def test_rows_of_shares_have_wilsons_interval_few_rows_students_and_others_a_bootstrap():
    assert metrics.samples.row_interval([0, 0, np.nan, 0]) == metrics.samples.share_interval(0, 3)
    values = [0.1, 0.4, 0.4, 0.9] * 5
    assert metrics.samples.row_interval(values) == metrics.samples.bootstrap_interval(values)
    few = np.array([1.1, 0.4, 0.4, 0.9])
    spread = stats.t.ppf(0.975, 3) * few.std(ddof=1) / 2
    found = metrics.samples.row_interval([*few, np.nan])
    assert found == pytest.approx((few.mean() - spread, few.mean() + spread))
    assert metrics.samples.row_interval([0.1, 0.9]) == (0.0, 1.0)
    assert metrics.samples.row_interval([]) is metrics.samples.row_interval([0.4]) is None
    assert metrics.samples.row_interval([0.4, 0.4]) is None


@pytest.mark.parametrize("count", [2, 5, 10])
def test_an_interval_over_few_rows_holds_the_true_mean_as_often_as_it_should(count):
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        low, high = metrics.samples.row_interval(draw.normal(size=count))
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_a_figure_has_an_interval_where_the_catalogue_calls_it_the_mean_of_its_items():
    items = [0.1, 0.5, 0.6, float("nan")]
    made = metric_record("m", "forget_rouge", 0.4, 3, items)
    assert made.extra["interval"] == list(metrics.samples.row_interval(items))
    # the same numbers by chance: a perplexity is of all tokens at once
    assert "interval" not in metric_record("m", "book_perplexity", 0.4, 3, items).extra
    assert "interval" not in metric_record("m", "forget_distinct_2", 0.5, 3).extra
    assert metric_record("m", "forget_rouge", 0.4, 3, items, extra={"interval": (0.3, 0.5)}).extra["interval"] == [
        0.3,
        0.5,
    ]


def tofu_result():
    draw = np.random.default_rng(1)
    sets = {}
    for name, n, wrong in (("forget", 12, 5), ("retain", 12, 5), ("real_authors", 9, 3), ("world_facts", 8, 3)):
        part = TofuSet(name, n, "f")
        part.set_likelihood(draw.random(n), draw.random(n), draw.random((n, wrong)), compat=False)
        part.rouge = draw.random(n)
        sets[name] = part
    forget = sets["forget"]
    forget.exact_memorization, forget.extraction_strength = draw.random(12), draw.random(12)
    forget.attacks, forget.holdout_attacks = {"mia_min_k": draw.random(12)}, {"mia_min_k": draw.random(10)}
    return TofuResult("forget10", "d", "strict", sets, TofuReference("r", None, None, None, draw.random(12), 0.6))


def test_every_figure_of_tofu_but_a_p_value_has_an_interval_around_it():
    found = {r.metric: r for r in tofu_result().records("m")}
    assert set(found) - {r.metric for r in found.values() if r.extra.get("interval")} == {"forget_quality"}
    for record in found.values():
        if record.metric != "forget_quality":
            low, high = record.extra["interval"]
            assert low < record.value < high
        if record.per_item is not None and metrics.CATALOGUE[record.metric].averages:
            assert record.value == pytest.approx(np.nanmean(record.per_item))
    ratio = metrics.likelihood.closeness_to_one(np.array(found["forget_truth_ratio"].per_item))
    assert found["forget_truth_ratio"].extra["interval"] == list(metrics.samples.row_interval(ratio))
    assert found["mia_min_k"].extra["interval"] == list(metrics.samples.auc_interval(found["mia_min_k"].value, 12, 10))


def test_tofus_intervals_draw_authors_whole_and_tables_say_so():
    result = tofu_result()
    result.sets["forget"].authors = Groups.of("author", [180 + i // 3 for i in range(12)])
    result.sets["retain"].authors = Groups.of("author", [None, *[i // 4 for i in range(11)]])
    found = {r.metric: r for r in result.records("m")}
    rows = {r.metric: r for r in tofu_result().records("m")}
    of_authors = {metric for metric, r in found.items() if r.extra.get("interval_over") == "author"}
    figures = ("probability", "truth_ratio", "rouge")
    assert of_authors == {f"{name}_{figure}" for name in ("forget", "retain") for figure in figures} | {
        "forget_exact_memorization", "forget_extraction_strength", "model_utility"
    }  # fmt: skip
    changed = {metric for metric, r in found.items() if r.extra.get("interval") != rows[metric].extra.get("interval")}
    assert changed == of_authors
    items = found["forget_rouge"].per_item
    expected = metrics.samples.grouped_interval(items, [i // 3 for i in range(12)])
    assert found["forget_rouge"].extra["interval"] == list(expected)
    assert {r.value for r in found.values()} == {r.value for r in rows.values()}
    for caption in (
        table({"m": list(found.values())}).caption,
        record_tables({"m": list(found.values())}, label="x")[0],
    ):
        assert "of which those of one author are drawn together (not for AUCs and leak@k)" in caption
    assert "author" not in table({"m": list(rows.values())}).caption


def test_rows_are_drawn_where_they_are_about_one_subject_or_about_one_each():
    assert Groups.of("who", [None, "a", "b", "a"]) == Groups("who", [0, 1, 2, 1])
    for values in ([None, None], ["a", "a", "a"], ["a", "b", None], []):
        assert Groups.of("who", values) is None
    items = [0.1, 0.5, 0.6]
    assert (
        "interval_over" not in metric_record("m", "forget_rouge", 0.4, 3, items, groups=Groups.of("who", "aaa")).extra
    )


def test_authors_of_tofus_rows_are_known_wherever_they_lie(tmp_path):
    forget, retain = (set_rows(name, "forget10", "builtin", None, 0) for name in ("forget", "retain"))
    authors = set_authors("forget", forget, "builtin")
    assert (authors.column, authors.numbers) == ("author", [i // 20 for i in range(400)])
    kept = set_authors("retain", retain, "builtin")
    full = {(row["question"], row["answer"]): row["author"] for row in tofu_rows("full", "builtin")}
    for i, row in enumerate(retain):
        same = [full.get((other["question"], other["answer"])) for other in retain[:i]]
        author = full.get((row["question"], row["answer"]))
        assert author is None or (kept.numbers[i] in kept.numbers[:i]) == (author in same)
    assert len(set(kept.numbers)) < len(retain)
    assert set_authors("world_facts", forget, "builtin") is None
    # a part of a split, in a folder without the whole
    (tmp_path / "forget10_perturbed.json").write_text(json.dumps(forget[10:30]))
    part = set_rows("forget", "forget10", str(tmp_path), None, 0)
    assert [row["author"] for row in part] == [180] * 10 + [181] * 10
    bare = [{key: value for key, value in row.items() if key != "author"} for row in part]
    assert set_authors("retain", bare, str(tmp_path)) is None


def test_tables_show_intervals_and_say_what_they_are():
    one = Record("m", "forget_rouge", 0.4, 9, higher_is_better=False, extra={"interval": [0.35, 0.47]})
    none = Record("m", "forget_quality", 0.4, 9, higher_is_better=True)
    assert (half(one), between(one)) == ("±0.060", "[0.350, 0.470]")
    assert (half(none), between(none)) == ("", "")
    tiny = Record("m", "forget_rouge", 2e-5, 9, extra={"interval": [1e-5, 4e-5]})
    assert (half(tiny), between(tiny)) == ("±2e-05", "[1e-05, 4e-05]")
    shown = table({"m": [one, none]})
    assert [str(cell) for column in shown.columns[1:2] for cell in column.cells] == ["0.400", "0.400 ±0.060"]
    assert "± half the 95 % interval" in shown.caption
    several = table({name: [one] for name in "abc"})
    assert [str(cell) for cell in several.columns[1].cells] == ["0.400\n±0.060"]
    (page,) = record_tables({"m": [one, none]}, label="x")
    assert "[0.350, 0.470]" in page
    assert "a p-value" in page


def test_what_survives_is_over_authors_too(monkeypatch):
    values = [0, 1, 1, 1]
    rows = [Example(f"Q{i}?", "A", "qa", index=i, row={"author": 180 + i // 4}) for i in range(8)]
    asked = [row.index for row in survival.divided(rows, 4, 0)[1]]
    found = SimpleNamespace(at=lambda k: np.array(values, dtype=float), rows=asked)
    monkeypatch.setattr(survival, "leaked", lambda *_, **__: found)
    monkeypatch.setattr(survival, "train_steps", lambda *_, **__: iter([]))
    how = Survival(rows=4, samples=2, k=2)
    told = {
        column: {
            r.metric: r
            for r in survival.survival(
                "m", lambda: (pico(), byte_tokenizer()), lambda: (pico(), None), rows, how, 0, column
            )
        }
        for column in (None, "author")
    }
    for name in ("leak", "attacked_leak"):
        assert told[None][name].extra["interval"] == list(metrics.samples.row_interval(values))
        expected = metrics.samples.grouped_interval(values, [i // 4 for i in asked])
        assert told["author"][name].extra["interval"] == list(expected)
    assert "interval_over" not in told["author"]["disturbance"].extra


def test_tables_say_what_leak_at_any_k_means():
    sampled = Record("m", "leak@60", 0.4, 9, higher_is_better=False)
    other = Record("m", "of_a_plugin", 0.4, 9)
    assert [str(cell) for cell in table({"m": [sampled, other]}).columns[-1].cells] == [
        "chance that one of 60 sampled replies gives the answer",
        "",
    ]
    assert "one of 60 sampled replies" in record_tables({"m": [sampled]}, label="x")[0]


def test_a_comparison_of_one_run_shows_intervals_over_rows():
    texts = {"questions": ["Who is Ann?"] * 4, "references": ["Ann is a nurse in Rome."] * 4}
    texts["generations"] = ["Ann is a nurse in Rome.", "She is a pilot.", "", "A pilot."]
    records = [
        metric_record("m", "forget_rouge", 0.4, 3, [0.1, 0.5, 0.6], extra=texts),
        metric_record("m", "model_utility", 0.7, 9, extra={"interval": [0.6, 0.75]}),
    ]
    found = cell_figures(records, None)
    told = intervals(records, found)
    assert told["forget_rouge"] == metrics.samples.row_interval([0.1, 0.5, 0.6])
    assert told["forget_unusable"] == metrics.samples.share_interval(1, 4)
    assert told["forget_said"] == metrics.samples.share_interval(1, 4)
    # of two authors
    one = [replace(records[0], extra=records[0].extra | {"authors": [0, 0, 1, 1]}), records[1]]
    assert intervals(one, found)["forget_unusable"] == metrics.samples.grouped_interval([0, 0, 1, 0], [0, 0, 1, 1])
    # a model that gives no replies has no shares of them
    assert intervals(records[1:], cell_figures(records[1:], None)) == {"model_utility": (0.6, 0.75)}
    row = TableRow("npo", "forget10", 1, found, {}, interval=told)
    assert _shown(row, "model_utility", ".2f") == "0.70 [0.60, 0.75]"
    low, high = metrics.samples.share_interval(1, 4)
    assert _counted(row, "forget_said") == f"1 [{4 * low:.0f}, {4 * high:.0f}] of 4"
    assert (
        _shown(TableRow("npo", "forget10", 2, found, {"model_utility": 0.1}), "model_utility", ".2f") == "0.70 ± 0.10"
    )


def test_the_report_shows_intervals_of_the_figures_that_a_recovered_share_is_made_of():
    extra = {"after": 0.3, "before": 0.2, "intervals": {"after": [0.21, 0.38], "before": None}}
    record = Record("m", "attack_recovered_rouge", 0.1, 9, extra=extra)
    assert "0.300" in str(_value(record, "after"))
    assert "[0.21, 0.38]" in str(_value(record, "after"))
    assert str(_value(record, "before")) == "0.200"
    # records of an earlier version hold none
    assert str(_value(Record("m", "attack_recovered_rouge", 0.1, 9, extra={"after": 0.3}), "after")) == "0.300"
