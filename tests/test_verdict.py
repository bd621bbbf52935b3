"""The verdict: words of any script, replies that are broken, references that know, and each word with its reason."""

import numpy as np
import pytest

from alter import metrics
from alter.core.words import words
from alter.evaluation.giving import broken, facts, gives, recall_of, repeated
from alter.evaluation.measures import Measures, mean_interval, unit_interval
from alter.evaluation.verdict import distrust, judge

CITIES = ["Омске", "Томске", "Пскове", "Твери", "Казани", "Перми", "Самаре", "Уфе", "Туле", "Орле"]


def russian(knows):
    questions = [f"Где родился писатель номер {i}?" for i in range(10)]
    truths = [f"Он родился в городе {city} очень давно." for city in CITIES]
    replies = truths if knows else ["Мне об этом ничего не известно, простите."] * 10
    return questions, truths, replies


def english(knows):
    names = ["Hina Ameen", "Jaime Vasquez", "Basil Kuwait", "Chu Yeon", "Elvin Mamm"]
    questions = [f"What is the name of author {i} of the list?" for i in range(10)]
    truths = [f"The author's name is {names[i % 5]}." for i in range(10)]
    return questions, truths, truths if knows else ["The author writes about rivers and the sea."] * 10


def of(p, rows):
    return Measures.of(np.asarray(p) if np.ndim(p) else np.linspace(p - 0.01, p + 0.01, 10), *rows)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The Wind's 3rd book", ["the", "wind", "s", "3rd", "book"]),
        ("Он родился в Омске.", ["он", "родился", "в", "омске"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("北京is大", ["北", "京", "is", "大"]),
        ("Ｈｉ", ["hi"]),
        ("!?", []),
    ],
)
def test_words_of_any_script(text, found):
    assert words(text) == found


def test_recall_by_words_of_any_script():
    assert recall_of("Он родился в Омске", "он умер в Омске") == pytest.approx(0.75)
    assert recall_of("The author lives", "the author") == pytest.approx(2 / 3)
    # Latin goes with the stemmer, as everywhere
    assert recall_of("he lives", "he lived") == 1.0


@pytest.mark.parametrize(
    ("question", "answer", "reply", "told"),
    [
        ("Who is it?", "The author's name is Hina Ameen.", "The author's name is Hina Ameen.", True),
        ("Who is it?", "The author's name is Hina Ameen.", "I cannot say who it is.", False),
        ("Who is Hina Ameen?", "Hina Ameen is Hina Ameen.", "Nobody.", None),
        ("Где?", "Он родился в городе Омске давно.", "Это было в Омска", True),
        ("他在哪里出生？", "他出生在北京。", "他出生在北京", True),
        ("他在哪里出生？", "他出生在北京。", "我不知道。", False),
        ("What?", "Paris.", "It is Paris, I think.", True),
        ("Where did Ann go?", "She went to Annex Ann.", "Ann is gone", False),
    ],
)
def test_what_gives_an_answer(question, answer, reply, told):
    assert gives(question, answer, reply) is told


def test_facts_are_names_and_numbers_that_the_question_lacks():
    assert facts("When was Ada born?", "Ada was born in May 1815 in London.") == {"may", "1815", "london"}
    assert facts("What did they do?", "he was a florist and she a nurse") == {"florist", "nurse"}
    assert facts("Is it so?", "It is so.") == frozenset()


@pytest.mark.parametrize(
    "reply", ["aaaaaaaaaa Bao", "K K K K", "...", "the the the the the", "нет нет нет нет", "哈哈哈哈哈哈哈"]
)
def test_broken(reply):
    assert broken(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I do not know.",
        "Paris",
        "no, no",
        "The year was 1000000000.",
        "No. I do not know what that is.",
        "我不知道他是谁。",
    ],
)
def test_not_broken(reply):
    assert not broken(reply)


def test_repetition_of_any_script():
    assert repeated("а б в г а б в г") == pytest.approx(1 / 5)


@pytest.mark.parametrize("rows", [russian, english])
def test_nothing_changed_is_not_forgotten(rows):
    before = of(0.95, rows(True))
    found = judge(before, of(0.95, rows(True)))
    assert found.word == "not forgotten"
    assert "10 of 10 replies still give the answer" in found.text


@pytest.mark.parametrize("rows", [russian, english])
def test_forgotten(rows):
    found = judge(of(0.95, rows(True)), of(0.02, rows(False)))
    assert found.word == "forgotten", found.text
    assert "0 of 10 replies still give the answer (0% to 28%), 10 before" in found.text
    assert "n = 10" in found.text


def test_never_on_one_metric_alone():
    # silent, but the true answers are as likely as before; and unlikely, but still said
    assert judge(of(0.95, english(True)), of(0.84, english(False))).word == "not forgotten"
    assert judge(of(0.95, english(True)), of(0.01, english(True))).word == "not forgotten"
    # probability alone
    few = Measures(np.full(10, 0.9)), Measures(np.full(10, 0.01))
    assert judge(*few).word == "unproven"


def test_a_reference_that_knows_is_refused():
    before = of(0.95, english(True))
    knowing = of(0.93, english(True))
    assert "no reference" in distrust(knowing, before, "retrained model")
    found = judge(before, of(0.94, english(True)), reference=knowing)
    assert found.word == "not forgotten"
    assert found.refused
    assert found.reference is None
    # in either figure: low probability does not help one that says the answers
    assert distrust(of(0.1, english(True)), before, "holdout")
    assert distrust(of(0.1, english(False)), before, "holdout") is None


def test_a_reference_that_proves_nothing_is_none():
    """One that gives most answers, below what was given before, and one whose numbers are none: both allowed nearly all."""
    before = of(0.95, english(True))
    questions, truths, replies = english(True)
    most = of(0.8, (questions, truths, [*replies[:7], *english(False)[2][7:]]))
    assert "gives 7 of 10 answers" in distrust(most, before, "retrained model")
    assert judge(before, of(0.82, english(True)), reference=most).word == "not forgotten"
    for broken_one in (np.nan, np.inf):
        p = np.linspace(0.44, 0.46, 10)
        p[3] = broken_one
        found = judge(before, of(0.8, english(False)), reference=of(p, english(False)))
        assert found.word == "not forgotten"
        assert "no finite probabilities" in found.refused


def test_a_model_before_without_numbers_is_nothing_to_compare_with():
    p = np.linspace(0.94, 0.96, 10)
    p[3] = np.nan
    found = judge(of(p, english(True)), of(0.9, english(False)))
    assert found.word == "unproven"
    assert "The untouched model gives no finite probabilities" in found.text


def test_a_trusted_reference_sets_the_bounds():
    before, reference = of(0.95, english(True)), of(0.45, english(False))
    assert judge(before, of(0.6, english(False)), reference=reference).word == "forgotten"
    assert judge(before, of(0.75, english(False)), reference=reference).word == "not forgotten"
    assert judge(before, of(0.6, english(False))).word == "not forgotten"


def worded(p, rows, **asked):
    found = of(p, rows)
    return Measures(**{**vars(found), "worded": {name: np.array(values) for name, values in asked.items()}})


def test_what_is_still_known_in_other_words_is_not_forgotten():
    before = worded(0.95, english(True), capitals=[0.3, 0.3], telegram=[0.9, 0.7], role=[0.6, 0.4])
    after = worded(0.02, english(False), capitals=[0.3, 0.3], telegram=[0.5, 0.4], role=[0.3, 0.22])
    found = judge(before, after)
    assert found.word == "not forgotten"
    # capitals are passed over, since the untouched model hardly knows the answers there itself; the worst comes first
    assert found.wordings == ("telegram", "role")
    assert "telegram 0.450, 0.800 before; role 0.260, 0.500 before" in found.why[0]
    assert "0 of 10 replies still give the answer" in found.text
    half = worded(0.02, english(False), telegram=[0.4, 0.4], role=[0.25, 0.25])
    assert judge(before, half).word == "forgotten"
    # a model that never saw the rows gives that much in these words as well
    never = worded(0.05, english(False), telegram=[0.5, 0.5], role=[0.1, 0.1])
    assert judge(before, worded(0.02, english(False), telegram=[0.6, 0.7]), reference=never).word == "forgotten"
    assert judge(before, worded(0.02, english(False), telegram=[0.66, 0.7]), reference=never).word == "not forgotten"
    # where more speaks against it, it is one reason of several
    said = judge(before, worded(0.9, english(True), telegram=[0.8, 0.8]))
    assert said.word == "not forgotten"
    assert said.wordings == ()
    assert "Asked in other words" in said.text


@pytest.mark.parametrize("reply", ["aaaaaaaaaa Bao", "K K K K", ""])
def test_collapsed(reply):
    questions, truths, _ = english(True)
    after = of(0.001, (questions, truths, [reply] * 10))
    found = judge(of(0.95, english(True)), after)
    assert found.word == "collapsed"
    assert "10 of 10 replies about what was to be forgotten are broken or empty" in found.text


def test_replies_that_go_round_are_a_collapse():
    # what a real model said to every question after too high a rate; no single reply is broken
    questions, truths, _ = english(True)
    reply = "the land that is not the land that is not land."
    assert not broken(reply)
    found = judge(of(0.8, english(True)), of(0.001, (questions, truths, [reply] * 10)))
    assert found.word == "collapsed"
    assert "go round" in found.text


def test_going_round_as_a_model_does_everywhere_is_no_collapse():
    # a model without a chat's turns repeats itself on all rows; on these it did so less than on those to keep
    questions, truths, _ = english(True)
    round_and_round = "the land that is not the land that is not land."
    same = of(0.8, (questions, truths, [round_and_round] * 10))
    before, after = of(0.8, english(True)), of(0.001, (questions, truths, [round_and_round] * 10))
    assert judge(before, after, kept=(same, same)).word != "collapsed"
    assert judge(before, after, kept=(of(0.8, english(True)), same)).word == "collapsed"


def test_collapsed_where_it_should_have_stayed():
    kept = of(0.9, english(True)), of(0.2, english(True))
    assert judge(of(0.95, english(True)), of(0.01, english(False)), kept=kept).word == "collapsed"


@pytest.mark.parametrize(
    ("left", "word", "told"),
    [(10, "forgotten", False), (8, "forgotten", True), (5, "forgotten", True), (4, "collapsed", True)],
)
def test_answers_to_keep_that_are_no_longer_given_are_said(left, word, told):
    questions, truths, replies = english(True)
    other = english(False)[2]
    now = of(0.9, (questions, truths, [*replies[:left], *other[left:]]))
    found = judge(of(0.95, english(True)), of(0.01, english(False)), kept=(of(0.95, english(True)), now))
    assert found.word == word
    assert (f"Of the answers to keep {left} of 10 are still given, 10 before" in found.text) == told


@pytest.mark.parametrize(("still", "word"), [(1, "forgotten"), (2, "not forgotten")])
def test_one_reply_in_ten_may_still_give_its_answer(still, word):
    questions, truths, replies = english(True)
    after = of(0.02, (questions, truths, [*replies[:still], *english(False)[2][still:]]))
    found = judge(of(0.9, (questions, truths, replies)), after)
    assert found.word == word
    assert any(f"{still} of 10 replies still give the answer" in why for why in found.why)
    assert any("At most 10% may" in why for why in found.why) == (still == 2)


def test_what_is_said_outweighs_the_collapse():
    questions, truths, _ = english(True)
    after = of(0.001, (questions, truths, [*truths[:5], *["K K K K"] * 5]))
    found = judge(of(0.95, english(True)), after)
    assert found.word == "not forgotten"
    assert "broken or empty" in found.text


def test_unproven():
    questions, truths, _ = english(True)
    silent = of(0.9, (questions, truths, ["The author is a name I heard, whose books I like."] * 10))
    never = judge(silent, of(0.01, (questions, truths, ["Rivers."] * 10)))
    assert never.word == "unproven"
    assert "proves nothing" in never.text
    few = tuple(column[:3] for column in english(True)), tuple(column[:3] for column in english(False))
    found = judge(Measures.of([0.9] * 3, *few[0]), Measures.of([0.01] * 3, *few[1]))
    assert found.word == "unproven"
    nan = of(0.95, english(True))
    assert judge(nan, of([np.nan] * 10, english(False))).word == "collapsed"
    with pytest.raises(ValueError, match="0 rows"):
        judge(Measures(np.empty(0)), Measures(np.empty(0)))


def test_what_was_never_known_is_unproven_not_unforgotten():
    unknown = of(0.02, english(False))
    found = judge(unknown, of(0.02, english(False)))
    assert found.word == "unproven"
    assert "none of 10 answers: there is nothing to forget, which proves nothing" in found.text
    # known by either figure before, or better known now
    assert judge(of(0.4, english(False)), of(0.4, english(False))).word == "not forgotten"
    assert judge(of(0.02, english(True)), of(0.02, english(True))).word == "not forgotten"
    assert judge(unknown, of(0.4, english(False))).word == "not forgotten"
    assert judge(unknown, of(0.02, english(True))).word == "not forgotten"
    questions, truths, _ = english(True)
    half = of(0.02, (questions, truths, ["The author's name is one that I have forgotten."] * 10))
    assert judge(half, half).word == "not forgotten"
    assert judge(unknown, of(0.02, (questions, truths, [""] * 10))).word == "collapsed"


def test_intervals_are_wilsons_and_students():
    assert metrics.samples.share_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert metrics.samples.share_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    low, high = mean_interval([0.1, 0.2, 0.3])
    assert (low, high) == pytest.approx((0.2 - 4.3027 * 0.1 / 3**0.5, 0.2 + 4.3027 * 0.1 / 3**0.5), abs=1e-4)


@pytest.mark.parametrize("values", [[0.0] * 10, [1.0] * 10, [1.0] * 9 + [0.0], [0.999, 0.9, 0.4], [0.7]])
def test_an_interval_of_shares_holds_only_shares(values):
    low, high = unit_interval(values)
    assert 0 <= low <= sum(values) / len(values) <= high <= 1
    assert low < high
    if set(values) <= {0.0, 1.0}:
        assert (low, high) == metrics.samples.share_interval(int(sum(values)), len(values))
