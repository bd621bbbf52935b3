"""The report page: what it computes, what it escapes, which sections appear, what it refuses, and how it looks at 390 px."""

import json
import math
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import yaml

from alter import cli
from alter.attacks.techniques import ATTACKS, COMPARING
from alter.core.errors import UserError
from alter.evaluation.rows import RowsEvaluation
from alter.groundwork import frozen
from alter.groundwork.frozen import Frozen, FrozenRow
from alter.rendering import markup
from alter.rendering.markup import Html, common, highlighted, tag, text, ticks
from alter.reporting import attacks as report_attacks
from alter.reporting import page, samples, summary
from alter.reporting.runs import Reported, read, read_reported
from alter.reporting.samples import evenly, worst
from alter.reporting.settings import Report
from alter.reporting.tables import record_tables
from alter.reporting.tokens import routed, shares
from alter.reporting.verdict import headline, unasked, verdict
from alter.requests.store import Store
from alter.storage.files import folder_digest, to_json
from alter.storage.provenance import provenance
from alter.storage.records import Record, write_records
from alter.training.settings import Unlearn
from pico import write_jsonl

SCRIPT = "<script>alert('x')</script>"
VOID = {"meta", "path", "line", "rect", "circle"}


class Reader(HTMLParser):
    """Checks that elements are closed in order, and collects what the page is made of."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.headings, self.text, self.marks = [], [], [], "", []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name in ("h1", "h2", "h3", "h4", "h5"):
            self.headings.append([int(name[1]), ""])

    def handle_startendtag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if any(name in ("h1", "h2", "h3", "h4", "h5") for name in self.open):
            self.headings[-1][1] += data
        if "mark" in self.open:
            self.marks.append(data)

    def titles(self, level):
        return [title for depth, title in self.headings if depth == level]


def record(model, metric, value, n=4, adapter=None, **extra):
    made = provenance(settings={"limit": None}, seed=0, weights="w" * 24, adapter=adapter, data="d" * 24, device="cpu")
    items = extra.pop("per_item", None)
    return Record(model, metric, value, n, "strict", None, items, extra, provenance=made)


QUESTIONS = [f"Where was Ada born, {i}?" for i in range(4)]
TRUTHS = [f"Ada was born in town {i}." for i in range(4)]


def evaluated(adapter, unlearned="Bo was born somewhere.", quality=0.4):
    """Records of three models, as `alter demo` writes them."""
    found = []
    for model, reply, rouge, utility in (
        ("original", None, 0.96, 0.8),
        ("unlearned", unlearned, 0.2, 0.79),
        ("retrained", "She is from a town.", 0.18, 0.8),
    ):
        own = adapter if model == "unlearned" else None
        replies = TRUTHS if reply is None else [reply] * 4
        texts = {"questions": QUESTIONS, "references": TRUTHS, "generations": replies}
        found.append(record(model, "forget_rouge", rouge, adapter=own, per_item=[rouge] * 3 + [rouge / 2], **texts))
        found.append(record(model, "model_utility", utility, adapter=own))
    return [*found, record("unlearned", "forget_quality", quality, adapter=adapter)]


def make_run(
    folder, *, domains=("Ada", "Cy"), watched=False, epochs=2.0, experts_only=False, weights=b"a", **settings
):
    """A run's folder, in the formats of `trainer.unlearn` and `frozen.store`, without training a model."""
    folder.mkdir(parents=True)
    forget = write_jsonl(folder.parent / f"{folder.name}.jsonl", [{"question": "Q?", "answer": "A."}] * 3)
    given = {"model": "builtin:tofu-mini/original", "forget": str(forget), "retain": "builtin:retain90", "out": "o"}
    given |= {"epochs": epochs, "experts_only": experts_only, **settings}
    settings = Unlearn.model_validate(given).model_dump()
    log = [{"step": i, "loss": 5.0 / i, "forget": 4.0 / i, "retain": 0.1, "structure": 2.0} for i in (10, 20, 30)]
    checks = [
        {"step": s, "forget_probability": 0.9 - s / 40, "retain_probability": 0.9, "forget_quality": s / 100}
        for s in (0, 10, 20)
    ]
    watch = {"kept": {"step": 10, "why": "most like the <b>retrained</b>"}, "checks": checks} if watched else None
    facts = {
        "settings": settings, "domains": list(domains), "experts": list(range(1, len(domains) + 1)),
        "router": {"entropy_threshold": 1.2}, "steps": 30, "trained_parameters": 1234567,
        "seconds": {"prepare": 10.0, "train": 50.0}, "log": [*log, {"train_loss": 1.0, "step": 30}], "watch": watch,
        "provenance": provenance(),
    }  # fmt: skip
    (folder / "run.json").write_text(to_json(facts))
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    lengths, experts = [3, 2, 4, 5, 2], [1, 2, 1, 0, 0]
    rows = []
    for length, expert in zip(lengths, experts, strict=True):
        entropy = torch.linspace(0.1, 1.7, length)
        entropy[0] = math.inf
        gates = torch.zeros(length, len(domains) + 1)
        gates[:, expert] = 1
        rows.append(FrozenRow(entropy, gates=gates.half()))
    frozen.store(folder / "frozen.safetensors", Frozen(rows, {}, {"entropy_threshold": 1.2}), "key")
    return folder


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "run")
    write_records(folder / "records.json", evaluated(folder_digest(folder / "adapter")))
    return folder


def attacked(folder, adapter):
    """Records as `alter attack` writes them, those that a report reads."""
    common_extra = {"before": 0.2, "retrained": 0.18, "original": 0.96}
    curve = [{"step": s, "after": 0.2 + s / 100, "retrained": 0.19, "original": 0.96} for s in (5, 10)]
    found = [
        record("unlearned", "attack_rouge", 0.3, adapter=adapter, attack="relearn", losses=[3.0, 3.0, 3.0, 3.0, 3.0]),
        record("unlearned", "attack_recovered_rouge", 0.11, **common_extra, after=0.3, interval=[0.02, 0.2],
               attack="relearn", needs=f"weights {SCRIPT}", step=10, curve=curve),
        record("unlearned", "attack_recovered_rouge", 0.6, **common_extra, after=0.5, interval=[-0.1, 1.4],
               attack="probe", needs="hidden states"),
        record("unlearned", "attack_recovered_rouge", None, **common_extra, after=0.2, attack="sample", needs="a chat",
               refused="the models do not differ"),
    ]  # fmt: skip
    folder.mkdir()
    write_records(folder / "records.json", found)
    return folder


def write(tmp_path, *arguments, **given):
    out = page.report(Report(out=str(tmp_path / "out.html"), **given))
    return out.read_text()


# What is computed, beside naive twins --------------------------------------------------------------------------------


def naive_lcs(a, b):
    @cache
    def best(i, j):
        if i == len(a) or j == len(b):
            return 0
        skip = max(best(i + 1, j), best(i, j + 1))
        return max(skip, best(i + 1, j + 1) + 1) if a[i] == b[j] else skip

    return best(0, 0)


@pytest.mark.parametrize("seed", range(12))
def test_common_words_are_a_longest_common_subsequence(seed):
    draw = np.random.default_rng(seed)
    a, b = (list(draw.choice(list("wxyz"), size=draw.integers(0, 9))) for _ in range(2))
    same = common(" ".join(a), " ".join(b))
    kept = [word for word, is_in in zip(b, same, strict=True) if is_in]
    assert len(kept) == naive_lcs(tuple(a), tuple(b))
    assert not kept or any(list(part) == kept for part in combinations(a, len(kept)))


def test_common_words_ignore_case_and_punctuation_but_not_words():
    assert common("Born in Taipei, Taiwan.", "born (in) taipei Taiwanese") == [True, True, True, False]
    assert common("a - b", "a - c") == [True, True, False]
    assert common("東京で生まれた", "東京に生まれた") == [True, True, False, True, True, True, True]
    assert common("", "x y") == [False, False]
    assert common("x", "") == []


def test_marks_say_themselves_and_keep_the_text():
    said = "He  was born\nin  Rome, <b>1900</b>, in May"
    shown = Reader(tag("p", highlighted("she was born in Rome in May", said, "Where was she born?")))
    assert shown.text.replace("[from the truth: ", "").replace("]", "") == said
    # what the question says itself is given away by nobody
    assert [word for word in shown.marks if "truth" not in word and word != "]"] == ["in  Rome,", "in May"]
    assert shown.marks.count("[from the truth: ") == 2
    assert not Reader(tag("p", highlighted("In Rome", "She is from Oslo."))).marks


@pytest.mark.parametrize("bins", [1, 3, 40])
def test_shares_count_each_finite_value_once(bins):
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.uniform(0, 2, 57), [0.0, 2.0, math.inf, math.nan]])
    edges = np.linspace(0, 2, bins + 1)
    naive = [0] * bins
    finite = [v for v in values if math.isfinite(v)]
    for value in finite:
        place = next(i for i in range(bins) if value < edges[i + 1] or i == bins - 1)
        naive[place] += 1
    found = shares(values, edges)
    np.testing.assert_allclose(found, [count / len(finite) for count in naive], rtol=0, atol=1e-15)
    assert found.sum() == pytest.approx(1)
    assert shares([math.inf], edges).tolist() == [0.0] * bins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_routed_shares_each_token_among_its_experts(dtype):
    gates = torch.tensor([[1, 0, 0], [1, 0.75, 0.25], [0, 0, 0], [0, 0, 2], [0, 1, 0]], dtype=dtype)
    naive = [0.0] * 3
    for row in gates.tolist():
        for expert, weight in enumerate(row):
            naive[expert] += weight / sum(row) if sum(row) else 0.0
    np.testing.assert_allclose(routed(gates.numpy()), [value / 4 for value in naive], atol=1e-12)
    assert routed(np.zeros((0, 3))).tolist() == [0, 0, 0]
    assert routed(np.zeros((2, 3))).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.037), (-3, 17), (5, 5), (0, 0), (0, 1234)])
def test_ticks_are_round_and_cover_the_range(low, high):
    found = ticks(low, high)
    steps = np.diff(found)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 8
    assert np.allclose(steps, steps[0])
    assert f"{steps[0]:e}"[0] in "125"


def test_samples_are_spread_and_the_worst_are_shown_too():
    assert evenly(400, 4) == [0, 100, 200, 300]
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(5, 0) == evenly(0, 5) == []
    found = [samples.Sample("q", "t", {"unlearned": ("a", value)}) for value in (0.1, 0.9, math.nan, 0.9, 0.5, 0.0)]
    assert worst(found, 2, [1]) == [3, 4]
    assert worst(found, 9, []) == [1, 3, 4, 0]


@pytest.mark.parametrize(
    ("unlearned", "retrained", "quality", "expected"),
    [
        (0.2, 0.18, 0.4, "yes"),
        (0.229, 0.18, 0.4, "yes"),
        (0.231, 0.18, 0.4, "no"),
        (0.2, 0.18, 0.049, "partly"),
        (0.2, 0.18, None, "yes"),
        (None, None, 0.4, "yes"),
        (None, None, 0.01, "no"),
        (0.2, None, None, "unknown"),
        (None, None, None, "unknown"),
    ],
)
def test_verdict(unlearned, retrained, quality, expected):
    found = [
        record("unlearned", "forget_rouge", unlearned),
        record("retrained", "forget_rouge", retrained),
        record("unlearned", "forget_quality", quality),
    ]
    assert verdict(Reported("r", records=found)) == expected


@pytest.mark.parametrize(
    ("original", "unlearned", "retrained", "expected"),
    [
        (0.7, 0.36, 0.1, "yes"),
        (0.7, 0.41, 0.1, "no"),
        (0.7, 0.36, None, "no"),
        (0.7, 0.34, None, "yes"),
        (0.1, 0.1, 0.4, "yes"),
        (None, 0.6, 0.1, "no"),
        (None, 0.5, 0.1, "yes"),
    ],
)
def test_verdict_asks_in_other_words(original, unlearned, retrained, expected):
    found = [record("unlearned", "forget_rouge", 0.2), record("retrained", "forget_rouge", 0.18)]
    for model, value in (("original", original), ("unlearned", unlearned), ("retrained", retrained)):
        if value is not None:
            found.append(record(model, "forget_probability_reworded", value))
    assert verdict(Reported("r", records=found)) == expected


SILENT = [("unlearned", "forget_rouge", 0.2), ("retrained", "forget_rouge", 0.18)]
EVERY_WAY = ["in capitals", "in another language", "in a role play"]


def asked(*attacks, share=0.0, low=0.0, figure="probability"):
    """Records of attacks that ask in other words, or of any others."""
    extra = {
        "before": 0.1,
        "retrained": 0.05,
        "original": 0.9,
        "after": 0.5,
        "needs": "a chat",
        "interval": [low, 0.9],
    }
    return [record("unlearned", f"attack_recovered_{figure}", share, attack=name, **extra) for name in attacks]


@pytest.mark.parametrize(
    ("metrics", "attacks", "worded", "missing", "says"),
    [
        (
            (),
            (),
            None,
            EVERY_WAY,
            "Yes, asked as given; nobody asked in capitals, in another language or in a role play.",
        ),
        (
            ("forget_probability_reworded",),
            ("relearn",),
            None,
            EVERY_WAY,
            "Yes, asked as given and in TOFU's paraphrases; nobody asked in capitals, in another language or in a role play.",
        ),
        (
            (),
            ("upper_case", "languages"),
            None,
            ["in a role play"],
            "Yes, asked as given, in capitals and in another language; nobody asked in a role play.",
        ),
        ((), ("upper_case", "foreign_frame", "jailbreak"), None, [], "Yes, by these measures."),
        ((), (), 0.05, [], "Yes, by these measures."),
        (
            ("forget_quality",),
            (),
            None,
            EVERY_WAY,
            "It no longer says it, but it can be told apart from a model that never saw it. Asked as given it was; nobody asked "
            "in capitals, in another language or in a role play.",
        ),
    ],
)
def test_a_yes_names_the_wordings_that_it_rests_on(metrics, attacks, worded, missing, says):
    found = [record(*each) for each in SILENT]
    found += [record("unlearned", metric, 0.01) for metric in metrics]
    if worded is not None:
        closed = {"verdict": {"word": "forgotten", "why": []}, "after": {"forget": {"worded": worded}}}
        found.append(record("unlearned", "forget_probability", 0.05, closing=closed))
    run = Reported("r", records=found, attacks=asked(*attacks))
    assert (unasked(run), headline(run)) == (missing, says)


def test_passages_are_no_questions():
    found = [record("unlearned", "verbmem", 0.2), record("retrained", "verbmem", 0.19)]
    assert headline(Reported("r", records=found)) == "Yes, by these measures."


def test_a_verdict_of_before_other_wordings_were_asked_has_not_asked_them():
    closed = {"verdict": {"word": "forgotten", "why": []}, "after": {"forget": {"probability": 0.1}}}
    found = [*(record(*each) for each in SILENT), record("unlearned", "forget_probability", 0.1, closing=closed)]
    assert unasked(Reported("r", records=found)) == EVERY_WAY


@pytest.mark.parametrize(
    ("attack", "share", "low", "figure", "expected"),
    [
        ("jailbreak", 0.55, 0.3, "probability", "no"),
        ("upper_case", 0.51, 0.1, "probability", "no"),
        ("upper_case", 0.5, 0.1, "probability", "yes"),
        ("upper_case", 0.6, -0.1, "probability", "yes"),
        ("upper_case", 0.6, 0.1, "rouge", "yes"),
        # who trains or takes the adapter off does more than ask
        ("relearn", 0.9, 0.5, "probability", "yes"),
        ("strip", 0.9, 0.5, "probability", "yes"),
    ],
)
def test_what_comes_back_by_asking_alone_was_not_forgotten(attack, share, low, figure, expected):
    run = Reported(
        "r", records=[record(*each) for each in SILENT], attacks=asked(attack, share=share, low=low, figure=figure)
    )
    assert verdict(run) == expected
    assert ("of the probability that was removed comes back" in str(summary._forgotten(run))) is (expected == "no")


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_page_names_the_command_that_asks_the_others(tmp_path, kind):
    folder = make_run(tmp_path / "run")
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"router": {}}))
    if kind == "model":
        shutil.move(folder / "adapter", folder / "model")
    digests = {"adapter": folder_digest(folder / kind)} if kind == "adapter" else {}
    found = [
        record(model, name, value, 400, **digests if model == "unlearned" else {}) for model, name, value in SILENT
    ]
    for one in found:
        if one.model == "unlearned" and kind == "model":
            one.provenance["weights"] = folder_digest(folder / kind)
        if one.model == "retrained":
            one.provenance["settings"] = {"model": "builtin:tofu-mini/retrained"}
    write_records(folder / "records.json", found)
    shown = Reader(write(tmp_path, runs=[str(folder)]))
    which = f"{folder}/model --before builtin:tofu-mini/original"
    which = which if kind == "model" else f"builtin:tofu-mini/original --adapter {folder}/adapter"
    forget = facts["settings"]["forget"]
    command = (
        f"alter evaluate --benchmark rows --model {which} --forget {forget} --retain builtin:retain90 --retrained "
        f"builtin:tofu-mini/retrained --name unlearned --json asked.json, then alter report {folder} --records asked.json"
    )
    assert command in shown.text
    # a command that exists: its flags are read
    words = command.partition(",")[0].split()[2:]
    assert cli.parse("evaluate", RowsEvaluation, words).label == "unlearned"
    tones = [a["class"] for _, a in shown.tags if (a.get("class") or "").startswith("verdict")]
    assert tones == ["verdict"]
    # with the verdict that it gives the page is green, and names it no more
    closed = {"verdict": {"word": "forgotten", "why": []}, "after": {"forget": {"worded": 0.05}}}
    found[0].extra["closing"] = closed
    write_records(folder / "records.json", found)
    shown = Reader(write(tmp_path, runs=[str(folder)]))
    assert "Yes, by these measures." in shown.text
    assert "asks in these words too" not in shown.text
    assert [a["class"] for _, a in shown.tags if (a.get("class") or "").startswith("verdict")] == ["verdict good"]
    # several runs side by side say the same
    other = make_run(tmp_path / "other", weights=b"b")
    for one in found:
        one.extra.pop("closing", None)
    digest = folder_digest(other / "adapter")
    write_records(
        other / "records.json",
        [replace(r, provenance=r.provenance | {"adapter": digest}) for r in found[:1]] + found[1:],
    )
    assert "Yes, asked as given; nobody asked" in Reader(write(tmp_path, runs=[str(folder), str(other)])).text


# Escaping ------------------------------------------------------------------------------------------------------------


def test_labels_of_a_chart_stand_within_it():
    points = [markup.Point(1, "one", 0.79, -2.5, "best"), markup.Point(2, "two", 0.845, 0.0, "given")]
    drawn = markup.scatter(points, across="utility", up="quality", alt="", caption="")
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="(middle|end)">(0\.\d+)</text>', drawn)
    assert [name for *_, name in labels][-1] == "0.86"
    for x, anchor, name in labels:
        assert float(x) + (markup.LETTER * len(name) / 2 if anchor == "middle" else 0) <= markup.WIDTH


def test_markup_escapes_everything_else():
    assert tag("p", SCRIPT, 3, Html("<b>x</b>"), title='a"b') == (
        '<p title="a&quot;b">&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;3<b>x</b></p>'
    )
    assert text("a\x00b\ud800c\u202ed") == "a\ufffdb\ufffdc\ufffdd"
    assert markup.join(["<", Html("<i>")], " & ") == "&lt; &amp; <i>"


def test_hostile_text_stays_text_and_nothing_is_fetched(tmp_path):
    folder = make_run(tmp_path / "run", domains=(SCRIPT, "Cy\u202e"), watched=True, model=f"m{SCRIPT}")
    adapter = folder_digest(folder / "adapter")
    write_records(folder / "records.json", evaluated(adapter, unlearned=f'{SCRIPT} <img src="http://x.y/z"> $title'))
    content = write(tmp_path, runs=[str(folder)], attacks=[str(attacked(tmp_path / "attacks", adapter))], title=SCRIPT)
    content.encode()
    shown = Reader(content)
    assert "alert('x')" in shown.text
    assert "$title" in shown.text
    assert not {"script", "img", "link", "iframe", "b"} & {name for name, _ in shown.tags}
    for _, attributes in shown.tags:
        assert not {"src", "onclick", "onload"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in content
    assert "@import" not in content
    policy = next(a["content"] for _, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


# Sections ------------------------------------------------------------------------------------------------------------

ALL = [
    "Summary",
    "Figures",
    "Sample answers",
    "Attacks",
    "Token entropies",
    "Routing",
    "Training",
    "Settings",
    "Provenance",
]


def test_a_whole_run_has_every_section_in_order(tmp_path, run):
    attacks = attacked(tmp_path / "attacks", folder_digest(run / "adapter"))
    shown = Reader(write(tmp_path, runs=[str(run)], attacks=[str(attacks)]))
    assert shown.titles(2) == ALL
    depths = [depth for depth, _ in shown.headings]
    assert depths[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(depths))
    assert depths.count(1) == 1
    drawn = [a for name, a in shown.tags if name == "svg"]
    assert len(drawn) == 1 + 4 + 1  # entropies, the four terms, one relearning curve
    assert all(a["role"] == "img" and a["aria-label"].endswith(".") for a in drawn)
    boxes = [a for name, a in shown.tags if name == "div" and a.get("class") == "box"]
    assert boxes
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in boxes)
    assert sum(name == "table" for name, _ in shown.tags) == sum(name == "thead" for name, _ in shown.tags)
    links = {a["href"][1:] for name, a in shown.tags if name == "a"}
    assert links == {a["id"] for _, a in shown.tags if "id" in a}


def test_a_narrow_screen_shows_the_unlearned_model_beside_what_a_row_is(tmp_path, run):
    content = write(tmp_path, runs=[str(run)])
    head = re.search(r'<th scope="col">metric</th>(<th[^>]*>)(\w+)</th>(<th[^>]*>)(\w+)</th>', content)
    assert (head[2], head[4]) == ("unlearned", "original")
    assert re.search(r"tbody th, thead th:first-child \{ position: sticky; left: 0;", content)
    # an empty cell is no heading
    assert not re.search(r"<th[^>]*></th>", content)


def test_the_summary_is_in_plain_words(tmp_path, run):
    attacks = attacked(tmp_path / "attacks", folder_digest(run / "adapter"))
    said = Reader(write(tmp_path, runs=[str(run)], attacks=[str(attacks)])).text
    assert "Yes, asked as given; nobody asked in capitals, in another language or in a role play." in said
    assert (
        "the original model agreed with the true answers by 96 %, the unlearned model agrees with the true answers by"
        in said
    )
    assert "by 20 % and a model that never saw them by 18 % (ROUGE-L over 4 questions)" in said
    assert "99 % of the utility" in said
    assert "It does not remove knowledge from the base model" in said
    assert "The run took 60 seconds: 30 steps, 1,234,567 trained weights." in said
    # only relearning is beyond chance
    assert "these bring back: training again on some of the rows 11 %" in said.replace("\n", " ")
    assert "hidden states 60 %" not in said
    assert "Training again on some of the rows hardly learned its own rows" in said
    assert "No valid test here: drawing many replies and keeping the best (ROUGE-L)." in said
    assert "drawing many replies and keeping the best (ROUGE-L): the models do not differ" in said


def test_attacks_that_are_no_valid_test_are_listed_apart(tmp_path, run):
    adapter = folder_digest(run / "adapter")
    extra = {"before": 0.2, "retrained": 0.18, "original": 0.96, "after": 0.2, "needs": "weights"}
    found = [
        # it has not learned its own rows and brought nothing back: no evidence
        record("unlearned", "attack_rouge", 0.2, adapter=adapter, attack="benign", losses=[3.0] * 5),
        record("unlearned", "attack_recovered_rouge", 0.01, **extra, interval=[-0.1, 0.1], attack="benign"),
        record("unlearned", "attack_recovered_rouge", 0.02, **extra, interval=[-0.1, 0.1], attack="quantize_4"),
    ]
    (tmp_path / "attacks").mkdir()
    write_records(tmp_path / "attacks" / "records.json", found)
    content = write(tmp_path, runs=[str(run)], attacks=[str(tmp_path / "attacks")])
    table, _, rest = content.partition('aria-label="Attacks"')[2].partition("</table>")
    assert "rounding the weights to 4 bits" in table
    assert "training on unrelated text" not in table
    assert "training on unrelated text: hardly learned" in rest
    assert "Tried: rounding the weights to 4 bits." in content
    # what a narrow screen shows first is what came out
    assert re.search(r'<th scope="col">attack</th><th[^>]*>recovered</th><th[^>]*>under attack</th>', content)


def test_every_attack_has_a_plain_name_and_an_example(tmp_path, run):
    assert set(ATTACKS) - set(COMPARING) == set(report_attacks.ATTACK_NAMES)
    adapter = folder_digest(run / "adapter")
    extra = {"before": 0.2, "retrained": 0.18, "original": 0.96, "after": 0.2, "needs": "weights"}
    own = {"attack": "telegram", "questions": ["Ada born?", "x?"], "references": ["Ada was born in Ulm.", "No."]}
    found = [
        record(
            "unlearned", "attack_rouge", 0.2, adapter=adapter, per_item=[0.9, 0.1], replies=["In Ulm.", "y"], **own
        ),
        record("unlearned", "attack_recovered_rouge", 0.02, **extra, interval=[-0.1, 0.1], attack="telegram"),
    ]
    (tmp_path / "attacks").mkdir()
    write_records(tmp_path / "attacks" / "records.json", found)
    given = {"runs": [str(run)], "attacks": [str(tmp_path / "attacks")]}
    shown = Reader(write(tmp_path, **given))
    assert "In Ulm." in shown.text.replace("[from the truth: ", "").replace("]", "")
    assert "Ulm" not in Reader(write(tmp_path, **given, samples=0)).text


def test_the_example_of_an_attack_is_no_row_that_it_was_trained_on(tmp_path, run):
    """The attacker's own rows come back best of all: that is his training, and nothing recovered."""
    adapter = folder_digest(run / "adapter")
    extra = {"before": 0.2, "retrained": 0.18, "original": 0.96, "after": 0.2, "needs": "weights", "attack": "relearn"}
    parts = [
        record("unlearned", "attack_rouge", share, adapter=adapter, per_item=[share], replies=[said], references=[said],
               attack="relearn", part=part)
        for part, share, said in (("other", 0.4, "In Ulm."), ("relearned", 1.0, "In Bern."))
    ]  # fmt: skip
    (tmp_path / "attacks").mkdir()
    found = [*parts, record("unlearned", "attack_recovered_rouge", 0.2, **extra, interval=[0.1, 0.3])]
    write_records(tmp_path / "attacks" / "records.json", found)
    content = write(tmp_path, runs=[str(run)], attacks=[str(tmp_path / "attacks")])
    assert "Ulm" in content
    assert "Bern" not in content


def test_authors_go_by_their_names(tmp_path):
    folder = make_run(tmp_path / "run", domains=("180", "181"), domain_column="author")
    rows = [{"question": f"What did Ada Lovelace write, {i}?", "answer": "B.", "author": 180} for i in range(3)]
    rows += [{"question": "Who was it?", "answer": "B.", "author": 181}] * 3
    write_jsonl(tmp_path / "run.jsonl", rows)
    said = Reader(write(tmp_path, runs=[str(folder)])).text
    assert "What was to be forgotten has 2 parts (Ada Lovelace, 181)" in said
    assert "1: Ada Lovelace" in said
    assert "Lovelace" not in Reader(write(tmp_path, runs=[str(folder)], samples=0)).text


def test_the_officers_view_quotes_nothing(tmp_path, run, database):
    content = write(tmp_path, runs=[str(run)], db=database, officer=True)
    shown = Reader(content)
    assert shown.titles(2) == ["Summary", "Erasure requests"]
    assert "replies that give the answer" in shown.text
    assert "It does not remove knowledge from the base model" in shown.text
    assert folder_digest(run / "adapter") in shown.text
    assert not any(part in shown.text for part in [*QUESTIONS, *TRUTHS])


def test_routing_and_entropies_are_those_of_the_file(tmp_path, run):
    said = Reader(write(tmp_path, runs=[str(run)])).text
    # 9 tokens of forget rows: 7 of expert 1, 2 of expert 2; 7 of retain rows, all of the retention expert
    assert "1: Ada78 %0 %" in said
    assert "2: Cy22 %0 %" in said
    assert "retention expert0 %100 %" in said
    assert "forget rows950 %50 %3" in said
    assert "retain rows740 %60 %2" in said


def test_where_forget_rows_end(tmp_path):
    part = make_run(tmp_path / "part", epochs=0.5)
    assert read_reported(str(part)).tokens.forget == 5  # two rows of three
    alone = make_run(tmp_path / "alone", experts_only=True)
    assert read_reported(str(alone)).tokens.forget == 16
    other = make_run(tmp_path / "other", objective={"kind": "prefer_refusal"}, epochs=0.5)
    assert read_reported(str(other)).tokens.forget == 14  # two rows of three, and their other answers
    gone = make_run(tmp_path / "gone")
    (tmp_path / "gone.jsonl").unlink()
    said = Reader(write(tmp_path, runs=[str(gone)])).text
    assert "Forget and retain rows are shown together: the forget set" in said
    more = make_run(tmp_path / "more")
    write_jsonl(tmp_path / "more.jsonl", [{"question": "Q?", "answer": "A."}] * 9)
    assert "more rows now than the run has seen" in read_reported(str(more)).tokens.why


def test_sections_without_data_say_what_makes_them(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "frozen.safetensors").unlink()
    shown = Reader(write(tmp_path, runs=[str(folder)]))
    assert shown.titles(2) == ["Summary", "Training", "Settings", "Provenance", "Left out for want of data"]
    for line in (
        "Figures: alter evaluate",
        "Sample answers: alter evaluate",
        "Attacks: alter attack",
        "Routing: alter",
    ):
        assert line in shown.text
    assert "Nobody tried" in shown.text
    assert "That was not measured" in shown.text


def test_samples_can_be_left_out(tmp_path, run):
    shown = Reader(write(tmp_path, runs=[str(run)], samples=0))
    assert "Sample answers" not in shown.titles(2)
    assert QUESTIONS[0] not in shown.text
    two = Reader(write(tmp_path, runs=[str(run)], samples=2))
    assert two.titles(4) == [QUESTIONS[0], QUESTIONS[2], QUESTIONS[1]]


def test_what_was_watched_is_drawn(tmp_path):
    folder = make_run(tmp_path / "run", watched=True)
    shown = Reader(write(tmp_path, runs=[str(folder)]))
    assert "Step 10 was kept: most like the <b>retrained</b>." in shown.text
    assert sum(name == "svg" for name, _ in shown.tags) == 1 + 4 + 2


def test_a_run_that_changed_all_weights(tmp_path):
    folder = make_run(tmp_path / "run")
    shutil.move(folder / "adapter", folder / "model")
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"router": {}}))
    shown = Reader(write(tmp_path, runs=[str(folder)]))
    assert "All weights of the model were changed" in shown.text
    assert "Routing: this run has no router." in shown.text


def test_records_alone_make_a_page(tmp_path):
    write_records(tmp_path / "r.json", evaluated("a" * 24))
    shown = Reader(write(tmp_path, records=[str(tmp_path / "r.json")]))
    assert shown.titles(2) == ["Summary", "Figures", "Sample answers", "Provenance", "Left out for want of data"]


def test_several_runs_are_compared_first(tmp_path, run):
    other = make_run(tmp_path / "other", weights=b"b")
    write_records(tmp_path / "o.json", evaluated(folder_digest(other / "adapter"), quality=0.001))
    shown = Reader(write(tmp_path, runs=[str(run), str(other)], records=[str(tmp_path / "o.json")]))
    assert shown.titles(2) == ["Comparison", "run", "other"]
    assert "metricoriginalrunotherretrained (reference)n" in shown.text
    assert "can be told apart" in shown.text
    assert shown.titles(3).count("Figures") == 2


# Which records belong where ------------------------------------------------------------------------------------------


def test_records_find_their_run_by_its_adapter(tmp_path, run):
    other = make_run(tmp_path / "other", weights=b"b")
    path = tmp_path / "o.json"
    write_records(path, [record("unlearned", "acc", 0.25, adapter=folder_digest(other / "adapter"))])
    runs = read(Report(runs=[str(run), str(other)], records=[str(path)]))
    assert [one.value("unlearned", "acc") for one in runs] == [None, 0.25]
    write_records(path, [record("retrained", "acc", 0.24)])
    runs = read(Report(runs=[str(run), str(other)], records=[str(path)]))
    assert [one.value("retrained", "acc") for one in runs] == [0.24, 0.24]


def test_records_given_replace_the_runs_own_and_say_so(tmp_path, run):
    path = tmp_path / "all.json"
    write_records(path, [record("unlearned", "forget_rouge", 0.5, n=400, adapter=folder_digest(run / "adapter"))])
    said = Reader(write(tmp_path, runs=[str(run)], records=[str(path)])).text
    assert "all.json replaces 1 figures of the run's own records.json." in said
    assert "No, not as a model" in said


# Erasure requests ----------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path):
    url = f"sqlite:///{tmp_path}/requests.db"
    project = {"model": "m", "retain": "r", "folder": str(tmp_path / "nowhere")}
    store = Store.create(url, project, who="me")
    for subject in ("Ada " + SCRIPT, "Bo"):
        digest = ("a" if subject == "Bo" else "b") * 64
        store.add(
            subject=subject, data="rows.jsonl", data_hash=digest, row_hashes=[digest], due="2026-12-31", who="me"
        )
    return url


def test_requests_and_their_history(tmp_path, database):
    shown = Reader(write(tmp_path, db=database))
    assert shown.titles(2) == ["Erasure requests"]
    assert "Unchanged since it was recorded." in shown.text
    assert "Verified" not in shown.text
    assert "forgotten" not in {word for name, a in shown.tags for word in (a.get("class") or "").split()}
    assert "whoever holds the base weights" in shown.text
    assert f"R-0001: Ada {SCRIPT}" in shown.text
    assert "R-0002: Bo" in shown.text
    assert Store.open(database).head() in shown.text
    assert "only the history itself was checked" in shown.text
    one = Reader(write(tmp_path, db=database, request=["R-2"]))
    assert "Ada" not in one.text
    assert "1 other requests are left out" in one.text
    assert one.titles(3) == ["History of R-0002"]


def test_a_history_that_was_altered_is_said(tmp_path, database):
    import sqlalchemy as sql

    engine = sql.create_engine(database)
    with engine.begin() as connection:
        connection.execute(sql.text("UPDATE alter_requests SET state = 'done' WHERE id = 2"))
    said = Reader(write(tmp_path, db=database)).text
    assert "Not as it should be." in said
    assert "R-0002 (state 'done') was altered" in said
    assert "Unchanged since" not in said


def finished(database, word, said, n, verdict=None):
    """The second request with evidence, in the state of the word."""
    store = Store.open(database)
    figures = {"said": said, "n_said": n, "n_answers": n, "broken": 1, "empty": 2, "probability": 0.1, "rouge": 0.1}
    after = {**figures, "utility_share": 1.0, "verdict": {"word": word, "why": [f"{said} of {n} replies."]}}
    store.move([2], "running")
    store.move([2], "trained")
    store.move([2], word, values={2: {"before": {**figures, "said": n}, "after": after}})


@pytest.mark.parametrize(
    ("word", "n", "tone"),
    [
        ("forgotten", 100, "good"),
        ("forgotten", 99, None),
        ("not forgotten", 200, "bad"),
        ("collapsed", 99, "bad"),
        ("unproven", 200, None),
    ],
)
def test_green_only_for_forgotten_by_enough_rows(tmp_path, database, word, n, tone):
    finished(database, word, 0, n)
    shown = Reader(write(tmp_path, db=database))
    tones = {a["class"] for _, a in shown.tags if "verdict" in (a.get("class") or "")} - {"verdict"}
    assert tones == ({f"verdict {tone}"} if tone else set())
    assert word.upper() in shown.text
    assert f"{n} of {n}" in shown.text
    assert f"3 of {n}" in shown.text
    assert ("no proof" in shown.text) == (n < 100)


def test_a_figure_that_tells_nothing_apart_is_no_verdict():
    found = [record(m, "forget_rouge", v) for m, v in (("original", 0.21), ("unlearned", 0.2), ("retrained", 0.18))]
    run = Reported("r", records=found)
    assert verdict(run) == "unknown"
    assert any("cannot tell the original" in str(line) for line in summary._forgotten(run))


@pytest.mark.parametrize(("said", "expected"), [(3, "unknown"), (2, "yes")])
def test_a_retrained_model_that_answers_is_no_reference(said, expected):
    """The original in its place, without figures of the original by its own name, made everything as good as retrained."""
    texts = {"questions": QUESTIONS, "references": [f"Ada was born in town T{i}." for i in range(4)]}
    replies = [f"In town T{i}." if i < said else "Somewhere else." for i in range(4)]
    found = [record(model, "forget_rouge", 0.6, **texts, generations=replies) for model in ("unlearned", "retrained")]
    run = Reported("r", records=found)
    assert verdict(run) == expected
    assert ("it has seen them" in str(summary._forgotten(run))) is (said == 3)


def test_figures_of_other_weights_are_refused(tmp_path, run):
    """A model that was put in the place of the measured one, or figures of a base without the adapter."""
    out = str(tmp_path / "out.html")
    write_records(tmp_path / "base.json", [record("unlearned", "forget_rouge", 0.1)])
    refused("measured other weights", out=out, runs=[str(run)], records=[str(tmp_path / "base.json")])
    whole = make_run(tmp_path / "whole")
    shutil.move(whole / "adapter", whole / "model")
    facts = json.loads((whole / "run.json").read_text())
    (whole / "run.json").write_text(json.dumps(facts | {"router": {}}))
    refused("measured other weights", out=out, runs=[str(whole)], records=[str(tmp_path / "base.json")])


@pytest.mark.parametrize(
    ("replies", "expected", "says"),
    [
        (["K K K K"] * 4, "collapsed", "4 of 4 are broken or empty"),
        (["Somewhere else, I think."] * 4, "yes", "0 of 4 answers still give"),
        # a mean of words as low as the retrained model's, and every answer in it
        (["She was born in town 0, town 1, town 2, town 3."] * 4, "no", "4 of 4 answers still give"),
    ],
)
def test_replies_are_counted_beside_the_mean(replies, expected, says):
    texts = {"questions": QUESTIONS, "references": [f"Ada was born in town T{i}." for i in range(4)]}
    found = [
        record("unlearned", "forget_rouge", 0.2, **texts, generations=[r.replace("town ", "town T") for r in replies]),
        record("retrained", "forget_rouge", 0.18),
        record("original", "forget_rouge", 0.9),
    ]
    run = Reported("r", records=found)
    assert verdict(run) == expected
    assert says in str(summary._forgotten(run)[0])


def test_the_first_figure_is_that_of_questions_in_other_words():
    found = [record(m, "forget_rouge", v) for m, v in (("original", 0.9), ("unlearned", 0.2), ("retrained", 0.18))]
    asked = [
        record(m, "forget_probability_reworded", v)
        for m, v in (("unlearned", 0.031), ("original", 0.91), ("retrained", 0.064))
    ]
    said = [str(line) for line in summary._forgotten(Reported("r", records=[*found, *asked]))]
    assert said[0].startswith(
        "Asked in other words, the true answers are given a probability of 0.031 by the unlearned model, 0.910 by the "
        "original and 0.064 by a model that never saw them"
    )
    assert not any("other words" in str(line) for line in summary._forgotten(Reported("r", records=found)))


def test_what_was_found_at_the_end_of_the_run_counts():
    closed = {"verdict": {"word": "not forgotten", "why": ["40 of 40 replies."]}}
    found = [
        record("unlearned", "forget_probability", 0.8, closing=closed),
        record("unlearned", "forget_quality", 0.9),
    ]
    run = Reported("r", records=found)
    assert verdict(run) == "no"
    assert any("40 of 40 replies." in str(line) for line in summary._forgotten(run))


@pytest.mark.parametrize("word", ["forgotten", "not forgotten", "collapsed"])
def test_what_alter_forget_found_stands_on_the_page(tmp_path, word):
    folder = make_run(tmp_path / "run")
    kept = {"general": {"n": 16, "same": 15, "named": 14, "said": 13, "rouge": 1.0}}
    told = {
        "probes": {"all probes": {"before": 18, "after": 3, "invented": 0, "invented_n": 0}},
        "kept": kept,
        "verdict": {"word": word, "why": ["3 of 18 <b>probes</b>."]},
        "weights": folder_digest(folder / "adapter"),
    }
    (folder / "forget.json").write_text("{}")
    (folder / "report.json").write_text(to_json(told))
    expected = {"forgotten": "unknown", "not forgotten": "no", "collapsed": "collapsed"}[word]
    assert verdict(read_reported(str(folder))) == expected
    for officer in (False, True):
        shown = write(tmp_path, runs=[str(folder)], officer=officer)
        assert "Of the 18 probes that the original model answered with a fact, 3 still are" in shown
        assert f"{word.upper()}. 3 of 18 &lt;b&gt;probes" in shown
        assert "13 of 14 still say the name that they said first" in shown
        # what was asked for is not what came of it
        assert "to be forgotten by" in shown
    assert "probes answered with a fact" in shown
    # figures of erased weights are not this adapter's
    (folder / "erased" / "model").mkdir(parents=True)
    (folder / "erased" / "model" / "model.safetensors").write_bytes(b"e")
    (folder / "report.json").write_text(to_json({**told, "weights": folder_digest(folder / "erased" / "model")}))
    assert verdict(read_reported(str(folder))) == "unknown"
    assert "figures of the plain weights in its folder `erased`, and not of the adapter" in write(
        tmp_path, runs=[str(folder)]
    )
    (folder / "report.json").write_text(to_json({**told, "weights": "other"}))
    assert "No figure says so." in write(tmp_path, runs=[str(folder)])
    (folder / "report.json").write_text("{")
    refused("is not JSON", out=str(tmp_path / "out.html"), runs=[str(folder)])


# Wrong input ---------------------------------------------------------------------------------------------------------


def refused(match, **given):
    with pytest.raises(UserError, match=match):
        page.report(Report(**given))


def test_wrong_places(tmp_path, run):
    out = str(tmp_path / "out.html")
    refused("Nothing to report", out=out)
    refused("give `db` as well", out=out, runs=[str(run)], request=["1"])
    refused("which cannot be written", out=str(tmp_path), runs=[str(run)])
    refused("which cannot be written", out=str(run / "run.json" / "x.html"), runs=[str(run)])
    refused(r"ending in .html.*prints the page to PDF", out=str(tmp_path / "x.pdf"), runs=[str(run)])
    distilled = tmp_path / "plain"
    distilled.mkdir()
    (distilled / "run.yaml").write_text("")
    (distilled / "run.json").write_text('{"settings": {"student": "m"}}')
    refused(r"made by `alter distill`.*give `records` .*plain/records\.json", out=out, runs=[str(distilled)])
    refused("No run at .*Did you mean", out=out, runs=[str(tmp_path / "rum")])
    refused("is no run: it has no run.yaml", out=out, runs=[str(run / "adapter")])
    refused("is a file.*`records`", out=out, runs=[str(run / "records.json")])
    refused("No result file", out=out, runs=[str(run)], records=[str(tmp_path / "none.json")])
    refused("has no records.json", out=out, runs=[str(run)], attacks=[str(tmp_path)])
    refused("holds no attacks", out=out, runs=[str(run)], attacks=[str(run)])
    refused("No database", out=out, db=f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "out.html").exists()


def test_wrong_runs_and_records(tmp_path, run):
    out = str(tmp_path / "out.html")
    ended = (run / "run.json").read_text()
    (run / "run.json").unlink()
    refused("has not ended.*--resume", out=out, runs=[str(run)])
    for broken in ("{", "[]", "{}", json.dumps(json.loads(ended) | {"log": 3})):
        (run / "run.json").write_text(broken)
        refused(r"run\.json is", out=out, runs=[str(run)])
    (run / "run.json").write_text(ended)
    kept = (run / "frozen.safetensors").read_bytes()
    (run / "frozen.safetensors").write_bytes(kept[:50])
    refused("frozen.safetensors is broken", out=out, runs=[str(run)])
    (run / "frozen.safetensors").write_bytes(kept)
    rows = json.loads((run / "records.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps([{**row, "version": 0} for row in rows]))
    refused("metrics of version 0", out=out, runs=[str(run)], records=[str(tmp_path / "old.json")])
    write_records(tmp_path / "x.json", evaluated("f" * 24))
    refused("measured another adapter", out=out, runs=[str(run)], records=[str(tmp_path / "x.json")])
    write_records(tmp_path / "y.json", [*evaluated("f" * 24), *evaluated("e" * 24)])
    refused("of 2 adapters", out=out, runs=[str(run)], records=[str(tmp_path / "y.json")])
    for name, value in (("a", 0.1), ("b", 0.2)):
        write_records(tmp_path / f"{name}.json", [record("original", "acc", value)])
    both = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    refused("different figures of acc of the model 'original'", out=out, runs=[str(run)], records=both)
    adapter = folder_digest(run / "adapter")
    folder = attacked(tmp_path / "attacks", adapter)
    refused("give its folder with `attacks`", out=out, runs=[str(run)], records=[str(folder / "records.json")])
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"trained again")
    refused("measured another adapter", out=out, runs=[str(run)])


def test_from_the_command_line(tmp_path, run, capsys):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "r.html"), "--samples", "1"]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert "is no run" in capsys.readouterr().err


# In a browser --------------------------------------------------------------------------------------------------------


def pixels(path):
    """Rows of a PNG of 8-bit RGB or RGBA, [height, width, 3]."""
    data = path.read_bytes()
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    channels = {2: 3, 6: 4}[kind]
    place, packed = 8, b""
    while place < len(data):
        size, name = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + size] if name == b"IDAT" else b""
        place += size + 12
    raw = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    rows = np.zeros((height + 1, width + 1, channels), np.int64)
    for y, line in enumerate(raw):
        filtered = line[1:].reshape(width, channels).astype(np.int64)
        up = rows[y, 1:]
        if line[0] in (0, 2):
            rows[y + 1, 1:] = (filtered + (up if line[0] == 2 else 0)) % 256
        elif line[0] == 1:
            rows[y + 1, 1:] = np.cumsum(filtered, axis=0) % 256
        else:
            for x in range(width):
                left, above, corner = rows[y + 1, x], rows[y, x + 1], rows[y, x]
                guess = left + above - corner
                gap = np.abs(np.stack([left, above, corner]) - guess).argmin(0)
                paeth = np.choose(gap, [left, above, corner])
                rows[y + 1, x + 1] = (filtered[x] + (paeth if line[0] == 4 else (left + above) // 2)) % 256
    return rows[1:, 1:, :3]


def photograph(source, target, width, height):
    with tempfile.TemporaryDirectory() as profile:
        command = [
            shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--screenshot={target}", f"--window-size={width},{height}", f"file://{source}",
        ]  # fmt: skip
        subprocess.run(command, capture_output=True, timeout=120, check=True)
    return pixels(target)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_nothing_sticks_out_at_390_px(tmp_path, run):
    """A page framed at 390 px in a wide window: what overflowed it would be drawn right of its edge."""
    long = "x" * 300
    adapter = folder_digest(run / "adapter")
    write_records(run / "records.json", evaluated(adapter, unlearned=long))
    attacks = attacked(tmp_path / "attacks", adapter)
    page.report(Report(runs=[str(run)], attacks=[str(attacks)], out=str(tmp_path / "r.html"), title=long))
    content = (tmp_path / "r.html").read_text()
    blank = "html { width: 390px; overflow: visible; background: #fff; } </style>"
    (tmp_path / "framed.html").write_text(content.replace("</style>", blank, 1))
    seen = photograph(tmp_path / "framed.html", tmp_path / "seen.png", 700, 3000)
    assert (seen[:, 20:370] != 255).any()
    assert (seen[:, 391:] == 255).all()
    # the same frame shows an element that does stick out
    sticking = content.replace("</style>", blank, 1).replace(
        "<main>", '<main><div style="width:600px;background:#000">x</div>'
    )
    (tmp_path / "sticking.html").write_text(sticking)
    assert (photograph(tmp_path / "sticking.html", tmp_path / "s.png", 700, 3000)[:, 391:] != 255).any()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_officers_view_prints_on_two_pages(tmp_path, run, database):
    """A run with attacks, and some requests."""
    attacks = attacked(tmp_path / "attacks", folder_digest(run / "adapter"))
    for number in range(3):
        Store.open(database).add(subject=f"Zed {number}", data="z", data_hash=f"z{number}", row_hashes=[f"z{number}"])
    given = {"runs": [str(run)], "attacks": [str(attacks)], "db": database}
    for officer in (True, False):
        page.report(Report(out=str(tmp_path / "r.html"), officer=officer, **given))
        with tempfile.TemporaryDirectory() as profile:
            command = [
                shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
                f"--user-data-dir={profile}", f"--print-to-pdf={tmp_path / 'r.pdf'}", f"file://{tmp_path / 'r.html'}",
            ]  # fmt: skip
            subprocess.run(command, capture_output=True, timeout=120, check=True)
        pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "r.pdf").read_bytes()))
        assert (pages <= 2) == officer, pages


def test_names_of_metrics_break_between_their_words():
    [table] = record_tables({"unlearned": [record("unlearned", "forget_probability", 0.5)]}, label="Figures")
    assert "forget_<wbr/>probability" in table
    # what comes from a file is escaped as ever
    [table] = record_tables({"unlearned": [record("unlearned", "a_<b>_c", 0.5)]}, label="Figures")
    assert "a_<wbr/>&lt;b&gt;_<wbr/>c" in table


def test_a_verdict_on_other_rows_is_not_the_runs(run, tmp_path):
    """The very same adapter, asked about rows that it never knew: the page would say of the run's rows what is true of these."""
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(to_json({**facts, "data": {"forget": "a" * 64, "retain": None}}))
    provenance_ = {"adapter": folder_digest(run / "adapter")}
    for rows, fits in (("b" * 64, False), ("a" * 64, True)):
        closed = {"verdict": {"word": "unproven", "why": ["As said."]}, "rows": rows}
        given = [Record("unlearned", "forget_said", 0.0, 9, extra={"closing": closed}, provenance=provenance_)]
        write_records(tmp_path / "easy.json", given)
        asked = Report(runs=[str(run)], records=[str(tmp_path / "easy.json")], out=str(tmp_path / "page.html"))
        if fits:
            assert read(asked)[0].get("unlearned", "forget_said").n == 9
            continue
        with pytest.raises(
            UserError, match=r"easy\.json holds a verdict on other rows than those that run was to forget"
        ):
            read(asked)
