"""Faults of the pages that were found in a browser and on paper: each test failed before its fault was mended."""

import json
import math
import re
import shlex
from dataclasses import replace

import pytest
import torch

from alter import cli
from alter.attacks import recovers
from alter.attacks.settings import Attack
from alter.comparison.choice import Choice, Searched
from alter.comparison.settings import Compare
from alter.comparison.table import TableRow
from alter.comparison.words import described, html_page
from alter.core.errors import UserError
from alter.evaluation.rows import RowsEvaluation
from alter.groundwork import frozen
from alter.groundwork.frozen import Frozen, FrozenRow
from alter.metaevaluation.settings import MetaEvaluate
from alter.metaevaluation.table import Line, Table, metrics_page
from alter.rendering import between, called, join, tag
from alter.reporting import page, summary
from alter.reporting.attacks import attacks, brought_back
from alter.reporting.requests import _evidence, _limits
from alter.reporting.runs import Reported, read, read_reported
from alter.reporting.settings import Report
from alter.reporting.tables import by_model, record_tables, sizes
from alter.reporting.verdict import verdict
from alter.requests.store import Store
from alter.storage.files import folder_digest
from alter.storage.records import write_records
from test_page import Reader, database, finished, make_run, record  # noqa: F401

ROLES = ("original", "unlearned", "retrained")


def test_a_distilled_model_is_not_called_broken(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"student": "m"}}))
    with pytest.raises(UserError) as refused:
        read_reported(str(tmp_path))
    assert str(refused.value) == (
        f"{tmp_path} was made by `alter distill`, of which a page shows the figures: give `records` {tmp_path}/records.json."
    )


CLOSED = {
    "verdict": {"word": "forgotten", "why": ["1 of 40 replies."], "reference": "retrained model"},
    "before": {"forget": {"worded": 0.75, "n": 40}},
    "after": {"forget": {"worded": 0.193, "n": 40}},
    "reference": {"worded": 0.06, "n": 40},
}


def test_what_a_verdict_asked_in_other_words_stands_first():
    """The metric that lost least when metrics were tried was measured at the end of every run, and stood on no page."""
    run = Reported("r", records=[record("unlearned", "forget_probability", 0.2, closing=CLOSED)])
    said = str(summary._forgotten(run)[0])
    assert said == (
        "Asked in other words, the true answers are given a probability of 0.193 by the unlearned model, 0.750 by the original "
        "and 0.060 by a model that never saw them (per token; up to 32 questions: capitals, telegram, German frame, role play)."
    )
    # the untouched model on rows of their kind is no model that never saw them
    other = {**CLOSED, "verdict": {**CLOSED["verdict"], "reference": "holdout"}}
    run = Reported("r", records=[record("unlearned", "forget_probability", 0.2, closing=other)])
    assert "never saw" not in str(summary._forgotten(run)[0])
    # the officer reads the same
    run = Reported("r", records=[record(m, "forget_probability", 0.2, 40, closing=CLOSED) for m in ROLES])
    shown = Reader(tag("main", *summary.evidence(run))).text
    assert "asked in other words (n = up to 32)0.1930.7500.060" in shown
    # TOFU's paraphrases go before
    run.records.append(record("unlearned", "forget_probability_reworded", 0.031, 400))
    assert "0.031 by the unlearned model (per token; 400 questions)" in str(summary._forgotten(run)[0])


def test_figures_of_unequal_numbers_of_rows_say_so():
    """Unlearned and retrained of 40 rows and the original of 400 read "40 / 400"; the officer read "n = 400" for all."""
    rows = [record(m, "forget_probability", 0.2, n) for m, n in zip(ROLES, (400, 40, 40), strict=True)]
    run = Reported("r", records=rows)
    [table] = record_tables(by_model(run), label="Figures")
    assert "40 / 400 / 40" in table
    assert "(n = 40 / 400 / 40)" in join(summary.evidence(run))
    # a sentence names the models in its own order
    rows = [record(m, "forget_rouge", 0.2, n) for m, n in zip(ROLES, (400, 40, 40), strict=True)]
    assert "ROUGE-L over 400 / 40 / 40 questions" in str(summary._forgotten(Reported("r", records=rows)))
    assert sizes([rows[1], None]) == "40"
    assert sizes([rows[1], None, rows[0]]) == "40 / - / 400"
    assert sizes([None, None]) == ""


def recovered(**extra):
    given = {"before": 0.2, "retrained": 0.18, "original": 0.96, "after": 0.2, "needs": "weights", "attack": "relearn"}
    return record("unlearned", "attack_recovered_rouge", 0.2, 64, **given, interval=[0.1, 0.3], **extra)


def test_attacks_say_of_how_many_rows_they_are():
    [table, *_] = attacks(Reported("r", attacks=[recovered()]), 3, 0)
    head = re.findall(r'<th[^>]*scope="col"[^>]*>([^<]*)</th>', table)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table)
    assert cells[head.index("n") - 1] == "64"
    assert 'class="n reference">retrained</th>' in table


@pytest.mark.parametrize("known", [True, False])
def test_replies_to_attacks_are_quoted_with_a_warning_and_cut(known):
    """Only the section of samples said that the page is to be handled like the data, and a reply of 100 kB was shown whole."""
    long = "Ada was born in Ulm. " * 5000
    texts = {"replies": [long], "references": [long]} | ({"questions": ["Where was Ada born?"]} if known else {})
    said = record("unlearned", "attack_rouge", 0.4, 1, attack="relearn", per_item=[0.4], **texts)
    shown = join(attacks(Reported("r", attacks=[said, recovered()]), 3, 6))
    assert "handle the page like the data itself" in shown
    assert len(shown) < 12_000
    assert "… (cut)" in shown
    # words of a question that nobody recorded cannot be told from those that the reply gives away
    assert ("some may be the question&#x27;s own" in shown) == (not known)
    assert ("the question</dt>" in shown) == known


def drawn_from(tmp_path, checks, log):
    folder = make_run(tmp_path / "run", watched=True)
    whole = json.loads((folder / "run.json").read_text())
    whole["watch"]["checks"], whole["log"] = checks, log
    (folder / "run.json").write_text(json.dumps(whole))
    return page.report(Report(runs=[str(folder)], out=str(tmp_path / "r.html"))).read_text()


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_run_that_broke_its_model_has_a_page(tmp_path, value):
    """A figure that is not finite is null in run.json: no page said that the run had failed."""
    checks = [{"step": s, "forget_probability": value, "retain_probability": 0.9} for s in (0, 10, 20)]
    log = [{"step": s, "loss": value, "forget": value, "retain": 0.1} for s in (0, 10, 20)]
    shown = drawn_from(tmp_path, checks=checks, log=log)
    assert "3 of the 3 losses are not finite: training broke down." in shown
    assert "Line chart of the probability of the answers by step. At the last check: retain 0.90." in shown


def test_an_attack_that_broke_the_model_recovered_nothing():
    """Its figures are null, ends of intervals too."""
    curve = [{"step": s, "after": None, "retrained": None, "original": math.nan} for s in (1, 2)]
    extra = {
        "before": 0.2,
        "retrained": 0.18,
        "original": 0.9,
        "after": None,
        "needs": "weights",
        "attack": "prune_50",
    }
    for value in (None, 0.4):
        lost = record("unlearned", "attack_recovered_rouge", value, **extra, interval=[None, None], curve=curve,
                      intervals={"before": [0.1, 0.3], "after": [None, None]})  # fmt: skip
        assert not recovers(lost)
        run = Reported("r", attacks=[lost])
        assert "nan" not in join([brought_back(run), *attacks(run, 3, 6)])


@pytest.mark.parametrize("lengths", [[1, 1, 1, 3, 2], [1, 1, 1, 1, 1]])
def test_rows_of_a_single_token_have_no_entropy(tmp_path, lengths):
    rows = []
    for length in lengths:
        entropy = torch.full((length,), 0.5)
        entropy[0] = math.inf
        gates = torch.zeros(length, 3)
        gates[:, 1] = 1
        rows.append(FrozenRow(entropy, gates=gates.half()))
    folder = make_run(tmp_path / "run")
    frozen.store(folder / "frozen.safetensors", Frozen(rows, {}, {"entropy_threshold": 1.2}), "key")
    shown = page.report(Report(runs=[str(folder)], out=str(tmp_path / "r.html"))).read_text()
    assert ("each row is a single token" in shown) == (sum(lengths) == 5)
    assert "nan %" not in Reader(shown).text


def test_no_replies_are_no_share_of_them():
    run = Reported("r", records=[record("unlearned", m, 0.0, 0) for m in ("forget_said", "forget_unusable")])
    assert verdict(run) == "unknown"


def test_a_request_that_has_come_back_is_not_green(tmp_path, database):  # noqa: F811
    """What `alter request verify` found stood in a line above, and the request below it in green."""
    finished(database, "forgotten", 0, 100)
    wrong = ["R-0002 has come back: probability 0.900, it was 0.100 on 2026-12-01."]
    for found, tone in (([], "verdict good"), (wrong, "verdict bad")):
        Store.open(database).note(None, "verified", {"wrong": found, "unchecked": [], "measured": 1}, "me")
        shown = page.report(Report(db=database, out=str(tmp_path / "r.html"))).read_text()
        assert (f'<span class="{tone}">FORGOTTEN' in shown, ", has come back since</span>" in shown) == (
            True,
            bool(found),
        )
    assert '<span class="verdict bad">R-0002 has come back' in shown


@pytest.mark.parametrize("officer", [True, False])
def test_whoever_asked_reads_no_paths_of_this_machine(tmp_path, officer):
    """Of the requests' pages and the summary; settings and commands are the engineer's, and not the officer's."""
    folder = make_run(tmp_path / "run", model=str(tmp_path / "secret" / "model"))
    silent = [record(m, "forget_rouge", v, 400) for m, v in (("unlearned", 0.2), ("retrained", 0.19))]
    for one in silent[:1]:
        one.provenance["adapter"] = folder_digest(folder / "adapter")
    write_records(folder / "records.json", silent)
    shown = page.report(Report(runs=[str(folder)], out=str(tmp_path / "r.html"), officer=officer)).read_text()
    assert "The model model was to forget run.jsonl and to keep builtin:retain90." in shown
    assert ("asks in these words too" in shown) == (not officer)
    top, _, rest = shown.partition("</header>")
    assert str(tmp_path) not in top
    assert (str(tmp_path) in rest) == (not officer)


def test_commands_for_what_is_missing_ask_the_runs_own_rows_and_stand_a_shell(tmp_path):
    """They evaluated TOFU, whatever was to be forgotten, and broke at a space in a path."""
    folder = make_run(tmp_path / "my run")
    (folder / "frozen.safetensors").unlink()
    shown = Reader(page.report(Report(runs=[str(folder)], out=str(tmp_path / "r.html"))).read_text()).text
    found = re.findall(r"(?:Figures|Attacks): (alter .*?), then (alter report .*?), would", shown)
    (ask, look), (attack, _) = found
    for command, name, settings in (
        (ask, "evaluate", RowsEvaluation), (attack, "attack", Attack), (look, "report", Report),
    ):  # fmt: skip
        words = shlex.split(command)[2:]
        words = words[2:] if name == "evaluate" else words
        given = cli.parse(name, settings, words)
        if name != "report":
            assert given.forget == str(tmp_path / "my run.jsonl")
            assert given.adapter == str(folder / "adapter")
    assert shlex.split(look)[2] == str(folder)


def test_a_comparison_says_which_of_the_unbeaten_forgot_nothing():
    """What leaves the model as it is keeps most of it: it was drawn filled and named beside those that forget."""
    wanted = Compare(
        model="builtin:tofu-mini/original", methods=["npo", "simnpo"], splits=["forget10"], out="o",
        retrained={"forget10": "builtin:tofu-mini/retrained"},
    )  # fmt: skip
    choice = Choice((1.0, 1.0), True, 0.5, 0.8, 1, 1, [Searched(1.0, 1.0, 0.5, 0.8)])
    rows = [
        TableRow(name, "forget10", 1, {"model_utility": u, "forget_quality": q, **more}, {}, chosen)
        for name, u, q, chosen, more in (
            ("original", 0.83, -5.5, None, {}),
            ("npo", 0.79, -2.4, choice, {"forget_probability_reworded": 0.123}),
            ("simnpo", 0.831, -5.5, choice, {}),
        )
    ]
    said = described(wanted, rows, {"forget10": {"validation": 1, "test": 2}})
    shown = Reader(html_page(said, wanted, rows)).text
    assert "in both: npo (2), simnpo (3). Not forgotten more than by the original itself: simnpo (3)." in shown
    # the metric that told knowledge best has a column where it was measured
    assert said.results[0][-1] == "forget10: probability, asked in other words ↓"
    assert [line[-1] for line in said.results[1:]] == ["-", "0.123", "-"]
    rows[1].mean.pop("forget_probability_reworded")
    assert "other words" not in str(described(wanted, rows, {"forget10": {"validation": 1, "test": 2}}).results)


def test_a_retrained_model_that_has_no_name_of_its_own_is_not_shown_as_the_original(tmp_path):
    """`alter evaluate` calls a model "original" where no name is given: the page said that the original had known nothing."""
    folder = make_run(tmp_path / "run")
    digest = folder_digest(folder / "adapter")
    write_records(folder / "records.json", [record(m, "forget_rouge", 0.9, adapter=digest) for m in ROLES[:2]])
    other = record("original", "forget_rouge", 0.2)
    write_records(tmp_path / "same.json", [other])
    assert (
        read(Report(runs=[str(folder)], records=[str(tmp_path / "same.json")]))[0].value("original", "forget_rouge")
        == 0.2
    )
    other.provenance["weights"] = "v" * 24
    write_records(tmp_path / "other.json", [other])
    with pytest.raises(
        UserError, match=r"other\.json calls a model 'original' that is not the one that run was trained on"
    ):
        read(Report(runs=[str(folder)], records=[str(tmp_path / "other.json")]))


@pytest.mark.parametrize("worded", [0.123, None])
def test_requests_say_in_which_words_they_were_asked(tmp_path, database, worded):  # noqa: F811
    """The page denied that other wordings were asked, in which every request is measured, and did not show what came of it."""
    finished(database, "forgotten", 0, 100)
    request = Store.open(database).get(2)
    request = replace(request, before={**request.before, "worded": 0.75}, after={**request.after, "worded": worded})
    shown = Reader(join([_evidence([request], ()), _limits([request])])).text
    assert ("as given and in other words: capitals, telegram, German frame, role play. Other" in shown) == (
        worded is not None
    )
    assert ("of the data, in their own words." in shown) == (worded is None)
    assert ("0.7500.123" in shown) == (worded is not None)
    assert "`" not in shown


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("builtin:forget01[:8]", "builtin:forget01[:8]"),
        ("owner/model", "owner/model"),
        ("/home/me/customers/ada.jsonl[:8]", "ada.jsonl[:8]"),
        ("./ada.jsonl", "ada.jsonl"),
        ("~/models/m", "m"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_what_lies_on_this_machine_goes_by_its_last_part(source, name):
    assert called(source) == name


def test_the_page_of_metrics_names_no_path():
    line = Line("forget_rouge", 0.6, 0.2, 0.9, (0.5, 1.0), None, None, None, None, None)
    table = Table([line], {"knows": 1, "without": 1, "unlearned": 0}, [], {}, [])
    settings = MetaEvaluate(model="/home/me/m", retrained="r", out="o", methods=["npo"])
    assert "<h1>Metrics tried on m</h1>" in metrics_page(settings, table)


def test_an_interval_without_ends_is_none():
    for ends in (None, [], [None, None], [0.1, None]):
        assert between(record("unlearned", "forget_rouge", 0.5, interval=ends)) == ""
    assert between(record("unlearned", "forget_rouge", 0.5, interval=[0.4, 0.6])) == "[0.400, 0.600]"
