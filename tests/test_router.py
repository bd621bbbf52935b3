"""The open-set router: its discriminant, the level at which experts open, ordinary text, other wordings, what a run records."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from alter.attacks.wording import WORDINGS
from alter.core.errors import UserError
from alter.data.background import apart_from, background, names_in
from alter.data.encoding import encode
from alter.data.rewording import FITTED, MEASURED, key_words, reworded, some_capitals, telegram, typos
from alter.data.rows import Example, load_examples
from alter.training import openset, own
from alter.training.closing import command
from alter.training.evidence import OWN_WORDS, Evidence, FitRows, evidence_of, standard
from alter.training.openset import FOLDS, _folds, caught, discriminant, open_set, opening_level
from alter.training.routerfit import RouterFit
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import byte_tokenizer, pico, run_on, save_pico, write_people

NAMES = ["Ada", "Bo", "Cy"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_pico(folder / "model")
    return write_people(folder, NAMES, 4, 15)


def settings(data, out, **changes):
    given = dict(**run_on(data, out), epochs=1, max_steps=1, adapter={"r": 4, "entropy_quantile": 0.5})
    return Unlearn.model_validate({**given, **changes})


def router_of(out):
    return {k: v for k, v in load_file(str(out / "adapter" / "adapter_model.safetensors")).items() if "router" in k}


def naive_score(x, y, expert, new, shrinkage, own_spread):
    """Half the difference of two Mahalanobis distances, by loops."""
    x, y = x.tolist(), y.tolist()
    size = len(x[0])

    def mean(rows):
        return [sum(row[i] for row in rows) / len(rows) for i in range(size)]

    ordinary = [row for row, label in zip(x, y, strict=True) if label == 0]
    centre = mean(ordinary)
    spread = np.zeros((size, size))
    for row in ordinary:
        off = np.array(row) - centre
        spread += np.outer(off, off) / len(ordinary)
    total = sum(label in new for label in y)
    for e in new:
        own = [row for row, label in zip(x, y, strict=True) if label == e]
        for row in own:
            off = np.array(row) - mean(own)
            spread += own_spread * np.outer(off, off) / total
    spread += shrinkage * np.trace(spread) / size * np.eye(size)
    target = mean([row for row, label in zip(x, y, strict=True) if label == expert])
    inverse = np.linalg.inv(spread)

    def distance(row, to):
        off = np.array(row) - to
        return off @ inverse @ off

    return [(distance(row, centre) - distance(row, target)) / 2 for row in x]


def test_the_score_is_half_the_difference_of_two_mahalanobis_distances():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = torch.tensor([0] * 30 + [2] * 20 + [4] * 10)
    x[y == 2] += torch.tensor([1.0, 0, 0, 2, 0])
    x[y == 4] -= torch.tensor([0.0, 3, 0, 0, 1])
    weight, bias = discriminant(x, y, [2, 4], 0.05)
    for place, expert in enumerate((2, 4)):
        found = x @ weight[place].double() + bias[place]
        expected = naive_score(x, y, expert, [2, 4], 0.05, 0.2)
        assert torch.allclose(found, torch.tensor(expected), atol=1e-4)


def test_without_ordinary_tokens_the_mean_of_all_stands_for_theirs():
    x = torch.tensor([[0.0, 1.0], [0.2, 0.9], [5.0, 1.0], [5.2, 1.1]])
    weight, bias = discriminant(x, torch.tensor([1, 1, 2, 2]), [1, 2], 0.05)
    assert torch.isfinite(weight).all()
    assert (x @ weight.t() + bias).argmax(-1).tolist() == [0, 0, 1, 1]


def naive_level(own, ordinary, share):
    """The least of all candidate levels that few enough ordinary tokens exceed."""
    candidates = sorted({value for values in ordinary.values() for value in values})

    def exceeds(kinds, level):
        shares = [sum(v > level for v in ordinary[k]) / len(ordinary[k]) for k in kinds]
        return sum(shares) / len(shares) if shares else 0.0

    groups = [["retain"] if "retain" in ordinary else [], [k for k in ordinary if k != "retain"]]
    levels = [float(np.quantile(own, 0.02))]
    for kinds in filter(None, groups):
        # a level of another group's does no harm: it is a candidate like any other
        own_values = [v for v in candidates if any(v in ordinary[k] for k in kinds)]
        levels.append(min(level for level in own_values if exceeds(kinds, level) <= share + 1e-12))
    return max(levels)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("kinds", [("retain",), ("prose", "code"), ("retain", "prose", "code")])
def test_the_level_is_the_least_that_few_enough_ordinary_tokens_exceed(share, kinds):
    generator = np.random.default_rng(3)
    sizes = {"retain": 41, "prose": 70, "code": 9}
    ordinary = {k: torch.from_numpy(generator.normal(size=sizes[k])) for k in kinds}
    own = torch.from_numpy(generator.normal(-3, 1, size=50))
    found = opening_level(own, ordinary, share)
    assert found == pytest.approx(naive_level(own.tolist(), {k: v.tolist() for k, v in ordinary.items()}, share))
    for group in ({"retain"} & set(kinds), {"prose", "code"} & set(kinds)):
        if group:
            assert np.mean([float((ordinary[k] > found).double().mean()) for k in group]) <= share + 1e-9


def test_ordinary_text_far_below_does_not_open_the_experts_for_everything():
    own = torch.linspace(5, 9, 101)
    level = opening_level(own, {"prose": torch.full((100,), -50.0)}, 0.01)
    assert level == pytest.approx(5.08)


def test_every_ordinary_token_is_scored_once_and_kinds_stay_whole():
    def tokens(name, n):
        rows = torch.arange(n)
        return Evidence(name, rows.float()[:, None], torch.zeros(n), torch.ones(n).bool(), rows, torch.zeros(n))

    data = [tokens("forget", 5), tokens("retain", 10), *(tokens(k, 4 + i) for i, k in enumerate("abcd"))]
    folds = _folds(data)
    assert len(folds) == FOLDS
    names = [t.name for fold in folds for t in fold]
    assert sorted(names) == [*"abcd", *["retain"] * FOLDS]
    kept = [t for fold in folds for t in fold if t.name == "retain"]
    assert sorted(torch.cat([t.x for t in kept]).flatten().tolist()) == list(range(10))


def test_forget_rows_teach_by_their_answers_and_ordinary_rows_by_all_they_have(data):
    from alter.data.encoding import Encoded
    from alter.groundwork.frozen import FrozenRow

    features = torch.arange(12.0).view(6, 2)
    entropy = torch.tensor([math.inf, 0.5, 2.0, 0.1, 0.2, 3.0])
    rows = [Encoded(list(range(6)), [-100] * 4 + [4, 5], 4)] * 2
    part = FitRows("any", rows, [3, 0], [FrozenRow(entropy=entropy, features=features)] * 2)
    found = evidence_of(part, 1.2, 0.9)
    assert found.y.tolist() == [3, 3, 0, 0, 0, 0, 0]
    assert found.low.tolist() == [True, False, True, False, True, True, False]
    # the answer's evidence still holds the question
    total = [
        sum(0.9 ** (4 - j) * features[j, 0].item() for j in range(1, 5)),
        sum(0.9 ** (4 - j) for j in range(1, 5)),
    ]
    assert found.x[0, 0].item() == pytest.approx(total[0] / total[1])


def test_kinds_of_the_fit_and_kinds_of_the_measurement_are_apart():
    fitted, unseen = background(), background(unseen=True)
    assert not set(fitted) & set(unseen)
    texts = {e.answer for examples in fitted.values() for e in examples}
    assert not texts & {e.answer for examples in unseen.values() for e in examples}
    assert {"prose", "code", "chat", "languages", "questions"} <= set(fitted)
    assert {"german", "programs", "letters", "detective"} <= set(unseen)


def test_what_is_to_be_forgotten_is_no_ordinary_text():
    assert names_in("Then Dorothy met Toto. Who is that? In Oz, Elphaba said so.") == {"Dorothy", "Toto", "Elphaba"}
    fitted = background()
    assert names_in("Где жила Анна Каренина? В ней, Ørsted. It was Ørsted.") == {"Анна", "Каренина", "Ørsted"}
    left = apart_from(fitted, ["Who is the girl in Oz? It is Dorothy of Kansas."])
    assert not any("Dorothy" in e.answer for e in left["prose"])
    assert 0 < len(left["prose"]) < len(fitted["prose"])
    assert apart_from(fitted, ["what is this"]) == fitted


@pytest.mark.parametrize("name", [*FITTED, *MEASURED])
def test_a_wording_changes_the_question_and_nothing_else(name, data):
    make = {**FITTED, **MEASURED}[name]
    example = Example("Who is Ada of the north?", "A queen.", "qa", index=7)
    made = reworded(example, make(example.prompt, 7, "Other text."))
    assert (made.answer, made.index) == ("A queen.", 7)
    assert name == "as given" or made.prompt != example.prompt or made.messages
    tokenizer = AutoTokenizer.from_pretrained(data / "model")
    row = encode(tokenizer, made)
    assert (
        row.labels[row.prompt_length :] == encode(tokenizer, example).labels[-(len(row.labels) - row.prompt_length) :]
    )


def test_no_wording_of_the_fit_is_measured_or_an_attack():
    question = "Who is the queen of the north in the book?"
    fitted = {make(question, i, "Other text.") for make in FITTED.values() for i in range(4)}
    measured = {
        make(question, i, "Other text.") for name, make in MEASURED.items() for i in range(4) if name != "long text"
    }
    assert not fitted & measured
    assert not {asked.prompt for asked in fitted if not asked.turns and asked.system is None} & {
        attack(question) for attack in WORDINGS.values()
    }


def test_a_memory_is_judged_by_the_wording_it_catches_worst():
    x = torch.tensor([[3.0], [3.0], [3.0], [1.0], [3.0], [9.0]])
    low = torch.tensor([True, True, True, True, True, False])
    wording = torch.tensor([0, 0, 0, 1, 1, 1])
    own = Evidence("forget", x, torch.ones(6), low, torch.arange(6), wording)
    assert caught([own], (torch.ones(1, 1), torch.zeros(1), 2.0)) == 0.5
    none_low = Evidence("forget", x, torch.ones(6), ~low & False, torch.arange(6), wording)
    assert caught([none_low], (torch.ones(1, 1), torch.zeros(1), 2.0)) == pytest.approx(2 / 3)


def test_raw_text_and_completions_have_no_question_to_word_otherwise():
    asked = FITTED["title case"]("x", 0, "")
    assert reworded(Example(None, "Some text.", "text"), asked) is None
    assert reworded(Example("Once", "upon a time", "completion"), asked) is None


def test_wordings_by_rule():
    assert telegram("Where does the poet live in the north?") == "Where poet live north?"
    assert key_words("Where does the poet live in the north?") == "Where, does, poet, live, north"
    assert some_capitals("who is Ada", 0) == "who IS Ada"
    assert some_capitals("who is Ada", 1) == "WHO is ADA"
    question = "Where does the poet live in the north?"
    assert typos(question, 1) == typos(question, 1) != typos(question, 2)
    assert typos("a", 0)


@pytest.mark.parametrize("method", ["discriminant", "logistic"])
def test_a_run_records_false_alarms_and_what_it_catches(data, tmp_path, method):
    fit = {"method": method, "steps": 20}
    record = json.loads((unlearn(settings(data, tmp_path / "run", router_fit=fit)) / "run.json").read_text())["router"]
    alarms = record["false_alarms"]
    assert set(alarms["by_kind"]) == set(background(unseen=True))
    assert sum(kind["tokens"] for kind in alarms["by_kind"].values()) == alarms["tokens"] > 0
    low, high = alarms["interval"]
    assert low <= alarms["share"] <= high
    assert record["caught"]["as given"]["tokens"] > 0
    assert math.isfinite(record["opening_level"])
    kept = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert record["router_memory"] == kept["router_memory"]
    assert record["router_memory"] in ([0.9, 0.97, 1.0] if method == "discriminant" else [1.0])


def test_a_run_without_background_has_the_retain_rows_alone(data, tmp_path):
    with_text = unlearn(settings(data, tmp_path / "with"))
    without = unlearn(settings(data, tmp_path / "without", router_fit={"background": False, "rewordings": 0}))
    one, other = router_of(with_text), router_of(without)
    assert one.keys() == other.keys()
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_without_retain_rows_the_models_own_words_are_kept_and_set_no_level(data, tmp_path, capsys):
    run = settings(data, tmp_path / "run", retain=None, max_steps=2, save_steps=1, closing_rows=2)
    out = command(run)
    said = " ".join(capsys.readouterr().err.split())
    kept = load_examples(str(out / "retain.jsonl"))
    texts = [example for example in kept if example.prompt is None]
    assert f"{len(kept) - len(texts)} of the model's answers" in said
    assert f"{len(texts)} texts of its own" in said
    assert texts
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["retain"] is None
    assert record["router"]["router_accuracy_retain"] is not None
    # the same rows given are retain rows like any others, of which the level takes heed
    again = unlearn(settings(data, tmp_path / "given", retain=str(out / "retain.jsonl"), max_steps=2, save_steps=1))
    assert router_of(out).keys() == router_of(again).keys()
    fitted = [next(v for k, v in router_of(each).items() if k.endswith("weight")) for each in (out, again)]
    torch.testing.assert_close(*fitted)


def test_what_a_pretrained_model_asks_itself_next_is_not_kept(monkeypatch):
    said = iter(["Ada.\nQuestion: Who else?\nAnswer: Bob.", "\nQuestion: Who?"])
    monkeypatch.setattr(own, "generate", lambda *_, **__: list(said))
    found = own._answers(pico(), byte_tokenizer(), [Example("Who is it?", "", "qa"), Example("Who?", "", "qa")])
    assert [(row.prompt, row.answer, row.row) for row in found] == [
        ("Who is it?", "Ada.", {"question": "Who is it?", "answer": "Ada."})
    ]


def test_own_words_join_every_fit_and_set_no_level():
    generator = torch.Generator().manual_seed(0)
    tokens = [
        Evidence(
            name, torch.randn(40, 3, generator=generator) + shift, *[torch.full((40,), k) for k in (label, 1, 0, 0)]
        )
        for name, shift, label in (("forget", 2.0, 1), ("a", -2.0, 0), ("b", -1.5, 0), (OWN_WORDS, 1.5, 0))
    ]
    for each in tokens:
        each.low = each.low.bool()
    assert not any(each.name == OWN_WORDS for fold in _folds(tokens) for each in fold)
    _, _, level = open_set(tokens, [1], RouterFit(), np.random.default_rng(0))
    tokens[-1].name = "retain"
    assert level < open_set(tokens, [1], RouterFit(), np.random.default_rng(0))[2]


@pytest.mark.parametrize(
    ("far", "near", "over"),
    [
        # a kind that no other is like, when it is left out, but not in the fit: the level falls to the share that is wanted
        (False, 0.0, openset.WANTED),
        # the fit itself cannot tell the kinds: only what must be caught is
        (False, 1.0, openset.LEAST_OPEN),
        # nothing is like the forget tokens: all but the least likely open
        (True, 0.0, 1 - openset.MOST_BELOW),
    ],
)
def test_how_many_forget_tokens_open_an_expert(far, near, over):
    generator = torch.Generator().manual_seed(0)
    n, dimensions = 600, 8
    place = torch.zeros(4, dimensions)
    # the forget tokens; two ordinary kinds; and one beyond the forget tokens, seen from those
    place[0, 0] = 8.0
    place[3, 0], place[3, 1] = (-6.0, 0.0) if far else (40.0, 40.0 * (1 - near))
    tokens = []
    for number, (name, label) in enumerate((("forget", 1), ("a", 0), ("b", 0), ("c", 0))):
        x = torch.randn(n, dimensions, generator=generator) + place[number]
        row, flags = torch.arange(n) // 20, torch.ones(n, dtype=torch.bool)
        tokens.append(Evidence(name, x, torch.full((n,), label), flags, row, torch.zeros(n, dtype=torch.long)))
    weight, bias, level = open_set(tokens, [1], RouterFit(), np.random.default_rng(0))
    opened = float(((tokens[0].x @ weight.t() + bias).max(-1).values > level).double().mean())
    assert opened == pytest.approx(over, abs=0.005)


def test_a_watch_without_retain_rows_is_told_what_it_lacks(data, tmp_path):
    with pytest.raises((UserError, ValueError), match=r"`watch\.retain`, or `retain`"):
        settings(data, tmp_path / "run", retain=None, watch={"every_epoch": 1})


@pytest.mark.parametrize("value", [0, 0.5, 1, -0.1])
def test_a_rate_of_false_alarms_lies_between_none_and_half(value):
    with pytest.raises((UserError, ValueError), match="false_alarms"):
        RouterFit(false_alarms=value)


@pytest.mark.parametrize("method", ["discriminant", "logistic"])
def test_every_expert_is_fitted_however_few_tokens_are_drawn(data, tmp_path, method):
    fit = {"method": method, "steps": 20, "max_tokens": 2}
    weights = router_of(unlearn(settings(data, tmp_path / "run", router_fit=fit)))
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["experts"]) == 3


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 700])
def test_columns_are_standardised_as_by_a_loop(rows):
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows)) * torch.tensor([1.0, 1e-3, 50.0, 1.0, 0.0])
    x += torch.tensor([0.0, 3.0, -200.0, 1e3, 4.0])
    mean, std = standard(x)
    for column in range(5):
        values = [float(v) for v in x[:, column].double()]
        middle = sum(values) / rows
        spread = (sum((v - middle) ** 2 for v in values) / max(rows - 1, 1)) ** 0.5
        assert mean[column].item() == pytest.approx(middle, rel=1e-5, abs=1e-6)
        assert std[column].item() == pytest.approx(max(spread, 1e-6), rel=1e-3, abs=1e-4)
