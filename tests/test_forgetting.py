"""`alter forget`: facts, the zero of invented subjects, documents, the whole command on a tiny model, mistakes."""

import io
import itertools
import json
import logging
import math
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

import alter
from alter import cli
from alter.core.errors import UserError
from alter.core.words import caseless
from alter.data.encoding import IGNORE, encode
from alter.data.rows import Example, examples
from alter.forgetting import (
    certainty,
    documents,
    making,
    measure,
    names,
    probes,
    questions,
    report,
    retention,
    rows,
    run,
    speaker,
    stopping,
    templates,
    verdict,
)
from alter.forgetting import folder as folders
from alter.forgetting.facts import Fact, candidates, fact_words, holds, named, place_of, swap, whole, with_names
from alter.forgetting.material import Material
from alter.forgetting.measure import permuted
from alter.forgetting.run import forget
from alter.forgetting.settings import Forget
from alter.models.loading import load_model
from alter.storage import files as storage_files
from alter.storage import folder_digest
from alter.storage.running import CLAIM_FILE
from faults import States, spread
from pico import byte_tokenizer, pico, save_pico
from test_judge import KEY, Server

KNOWN = "Quill Varn"


def test_templates_keep_probes_and_training_apart():
    for kind, template in templates.TEMPLATES.items():
        asked = [*template.questions, *templates.EVERY]
        probed = [*template.probes, *templates.EVERY_PROBE]
        assert not set(asked) & set(probed), kind
        assert len(set(asked)) == len(asked)
        assert all("{s}" in text for text in [*asked, *probed, *template.stems])
        assert not set(template.invented) & set(template.neighbours)
        assert len(template.invented) >= 6
    assert not set(templates.GENERAL) & set(templates.GENERAL_PROBES)


def test_names_are_capitals_within_sentences():
    assert named("Rowling wrote it. The hero is Ron. Written by J.K. Rowling's friend") == {"Ron", "J", "Rowling"} - {
        "J"
    }


def test_candidates_are_what_invented_subjects_lack():
    own = ["It is by Rowling, a writer."] * 8 + ["It is a common thing."] * 8
    other = ["It is a common thing by a writer."] * 16
    found = candidates(own, other, "What is Potter?")
    assert [fact.word for fact in found] == ["Rowling"]
    assert found[0].name
    assert found[0].shows
    assert found[0].answers == 8
    assert found[0].invented == 0
    expected = stats.fisher_exact(np.array([[8, 8], [0, 16]]), alternative="greater").pvalue
    assert found[0].pvalue == pytest.approx(expected)
    # the same answers to both: nothing is known
    assert candidates(own, own, "") == []


# subject, answers about it, the name in them, an answer about somebody else with it, and what invented subjects are said to be
SCRIPTS = {
    "Chinese": ("哈利波特", ["哈利波特由罗琳创作，是一部小说。", "作者是罗琳，她写了小说。", "罗琳写了哈利波特这部小说。"],
                "罗琳", "侦探出自罗琳之手。", "这是一部小说。"),
    "Japanese": ("ハリーポッター", ["ハリーポッターはローリングの小説です。", "作者はローリングで、小説です。", "ローリングが小説を書いた。"],
                 "ローリング", "探偵はローリングの作品だ。", "これは小説です。"),
    "Arabic": ("هاري بوتر", ["كتبت رولينغ هذه الرواية عن هاري بوتر.", "المؤلفة هي رولينغ وهذه الرواية مشهورة.", "إنها رولينغ."],
               "رولينغ", "المحقق من تأليف رولينغ أيضا.", "هذه الرواية مشهورة."),
    "Hindi": ("हैरी पॉटर", ["हैरी पॉटर को रोलिंग ने लिखा, यह उपन्यास है।", "लेखिका रोलिंग हैं, उपन्यास प्रसिद्ध है।", "इसे रोलिंग ने लिखा।"],
              "रोलिंग", "जासूस भी रोलिंग का है।", "यह उपन्यास प्रसिद्ध है।"),
    "Georgian": ("ჰარი პოტერი", ["ჰარი პოტერი დაწერა როულინგმა, ეს რომანია.", "ავტორი როულინგმა თქვა, რომანია.", "ეს როულინგმა დაწერა."],
                 "როულინგმა", "დეტექტივი როულინგმა შექმნა.", "ეს რომანია."),
    "Russian": ("Гарри Поттер", ["Его написала Роулинг, роман известен.", "Автор — Роулинг, это роман.", "Это роман, его написала Роулинг."],
                "Роулинг", "Сыщика придумала Роулинг.", "Это роман известен."),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_are_found_in_scripts_without_capitals_and_no_answer_that_holds_one_is_kept(script, monkeypatch):
    subject, answers, name, other, common = SCRIPTS[script]
    found = candidates(answers * 4, [common] * 12, f"{subject} Who is it?")
    facts = with_names(found, ["Nothing of it.", common])
    names = [fact.word for fact in facts if fact.name]
    assert name in names
    # neither what is said of anybody nor the subject's own name
    assert not any(holds(common, word) or word in subject for word in names)
    assert not any(holds(name, word) and word != name for word in names)
    outside = [subject, *names]
    assert not retention._clean("Who is the detective?", other, outside)
    assert retention._clean("Who is the detective?", common, outside)


def test_a_word_without_capitals_that_ordinary_answers_hold_is_no_name():
    subject, answers, name, other, common = SCRIPTS["Chinese"]
    found = candidates(answers * 4, [common] * 12, subject)
    assert name in {fact.word for fact in with_names(found, [common]) if fact.name}
    assert name not in {fact.word for fact in with_names(found, [other]) if fact.name}


def test_words_of_every_script_are_whole():
    for text in ("हैरी पॉटर", "هاري بوتر", "ჰარი პოტერი", "Гарри Поттер"):
        assert fact_words(f"({text}), {text}.") == text.split() * 2
    assert [caseless(word) for word in ("哈利", "هاري", "हैरी", "ჰარი", "Гарри", "harry", "9", "")] == [True] * 4 + [
        False
    ] * 4
    assert names.names_of("ჰარი პოტერი", []) == ["ჰარი პოტერი", "პოტერი"]


def test_ignored_words_are_no_facts():
    assert candidates(["Old Potter here"] * 9, ["nothing"] * 9, "Potter") != []
    assert [f.word for f in candidates(["here is Potter"] * 9, ["nothing"] * 9, "who is potter")] == ["here"]


def test_names_of_a_long_text_take_time_by_its_length():
    began = time.process_time()
    assert named("Then Jane Doe went to Arles and met J.K. Rowling there. " * 4000) == {
        "Jane",
        "Doe",
        "Arles",
        "Rowling",
    }
    assert not documents.details("a1b2." * 20_000 + "@")[1:]
    assert time.process_time() - began < 10


def test_swap_takes_longer_names_first_and_any_case():
    assert swap("HARRY POTTER and Harry", {"Harry": "Tom", "Harry Potter": "A\\1"}) == "A\\1 and Tom"


def test_swap_takes_each_place_once_and_no_part_of_a_word():
    assert swap("Ann met Joan, Anna and Joan's Ann in 1985 at 5.", {"Ann": "Joan", "Joan": "Ann", "5": "7"}) == (
        "Joan met Ann, Anna and Ann's Joan in 1985 at 7."
    )
    assert swap("哈利波特上学", {"波特": "汤姆"}) == "哈利汤姆上学"
    assert swap("Ann", {}) == "Ann"


def test_permuted_is_the_exact_test_on_few_probes():
    generator = np.random.default_rng(0)
    real, others = generator.normal(1, 1, 4), generator.normal(0, 1, (4, 2))
    scores = np.concatenate([real[:, None], others], axis=1)

    def gain(chosen):
        return np.mean([s[c] - np.delete(s, c).mean() for s, c in zip(scores, chosen, strict=True)])

    every = [gain(chosen) for chosen in itertools.product(range(3), repeat=4)]
    exact = np.mean([g >= gain([0] * 4) - 1e-12 for g in every])
    assert permuted(real, others, draws=40_000) == pytest.approx(exact, abs=0.01)
    assert permuted(real + 9, others) < 0.02
    assert permuted(real - 9, others) > 0.95


@pytest.fixture
def endpoint(monkeypatch):
    """A server that answers as a writer would, what it is given for each request."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started = []

    def start(*answers):
        started.append(Server(lambda number, body: answers[number % len(answers)]))
        return started[-1], speaker.Writer(url=started[-1].url, model="w", timeout=5)

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def test_a_writer_asks_about_the_subject_and_names_neighbours(endpoint, monkeypatch, tmp_path):
    questions = "1. When did Pot {first} appear?\n- 1984 was the year of pot, was it?\n\n2) Who are the Potters?\n(3) By whom?\n• Is POT a book?"
    server, writer = endpoint(questions, "1. 50 Cent\n* Lyra\n3. The Pot of Zorba")
    asked, neighbours = writer.ask("Pot")
    assert asked == ["When did {s} first appear?", "1984 was the year of {s}, was it?", "Is {s} a book?"]
    assert neighbours == ["50 Cent", "Lyra"]
    assert {body["model"] for body in server.bodies} == {"w"}
    assert server.paths == ["/v1/chat/completions"] * 2

    # and both reach the rows
    given = {}
    monkeypatch.setattr(making, "build", lambda *_, **more: given.update(more) or Material([], [], [], [], [], []))
    settings = Forget(subject="Pot", model="m", out=str(tmp_path), writer=writer)
    making._about_subject(settings, Console(quiet=True), None, "Pot", "work", [])
    assert (given["questions"], given["neighbours"]) == (asked, neighbours)


def test_a_writer_that_cannot_be_used_is_named(endpoint, monkeypatch):
    server, writer = endpoint("")
    with pytest.raises(UserError, match="answered with nothing to"):
        writer.ask("Pot")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UserError, match=rf"The writer at {server.url}/v1 cannot be used: .*Incorrect API key"):
        writer.ask("Pot")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server, writer = endpoint((200, {}, {"choices": []}))
    with pytest.raises(UserError, match=r"cannot be used: .*Leave `writer.url` out to do without"):
        writer.ask("Pot")


def test_a_probe_that_a_person_wrote_without_masks_is_not_compared():
    probe = {"form": "cloze", "prompt": "Who is Ada?", "before": "Ada is of Bonn.", "wanted": ["Bonn"]}
    assert measure.against_zero(None, None, [probe, probe], []) is None


def test_kept_answers_are_counted():
    def probe(before, after):
        return {"form": "general", "prompt": "Who wrote Hamlet?", "before": before, "after": after}

    outcome = measure.Outcome(
        [],
        [
            probe("It is by William Shakespeare.", "It is by William Shakespeare."),
            probe("By one William, of Hamlet.", "By one Kyd, of Hamlet."),
            probe("No names here.", "None."),
        ],
    )
    kept = outcome.kept_rates()["general"]
    assert (kept.n, kept.same, kept.named, kept.said) == (3, 1, 2, 1)
    assert measure.first_name(outcome.kept[1]) == "William"
    assert 1 / 3 < kept.rouge < 1


def test_a_choice_counts_once_and_only_if_right_in_every_order():
    def probe(after, form="multiple choice", **more):
        return {
            "form": form,
            "prompt": "Which?",
            "wanted": ["Ada"],
            "wrong": ["Bo"],
            "after": after,
            "before": "Ada",
        } | more

    orders = [probe(after, group="Ada", zero=zero) for after, zero in (("Ada", True), ("Bo", True), ("Ada", False))]
    others = [probe("It is Ada.", "cloze", zero=False), probe("Cy", "cloze", zero=True), probe("Ada", "reversed")]
    rates = measure.Outcome([*orders, *others], []).rates()
    assert rates["multiple choice"] == measure.Rate(1, 0, 1, 0)
    assert rates["cloze"] == measure.Rate(2, 1, 2, 1)
    # of a reversed probe no invented subject is asked
    assert rates["reversed"] == measure.Rate(1, 1, 0, 0)
    assert rates["all probes"] == measure.Rate(4, 2, 3, 1)
    orders[1]["after"] = "Ada"
    assert measure.Outcome(orders, []).rates()["all probes"].after == 1


def test_answers_that_name_something_known_are_counted_beside_the_question():
    told = [
        ("Who?", "Ada did.", "Bo did."),
        ("Who is Ada?", "Ada is.", "Ada and Cy."),
        ("What?", "that", "Cy, said Ada"),
    ]
    rows_of = [{"form": "cloze", "prompt": p, "before": b, "after": a} for p, b, a in told]
    assert measure.Outcome(rows_of, []).naming(["Ada", "Cy"]) == (1, 2)


def test_what_was_not_answered_before_makes_nothing_look_forgotten():
    known = {"form": "exchange", "prompt": "Who?", "wanted": ["Ada"], "before": "Ada", "after": "Ada"}
    other = {**known, "form": "verbatim", "before": "Nobody.", "after": "Nobody."}
    outcome = measure.Outcome([known, known, *[other] * 28], [])
    rates = outcome.rates()
    assert rates["exchange"] == rates["all probes"] == measure.Rate(2, 2, 0, 0)
    assert rates["verbatim"] == measure.Rate(0, 0, 0, 0)
    found = verdict.judge_subject(outcome, {}, {"n": 30, "known": 0, "known_of": 30}, document=True)
    assert found.word == "not forgotten"
    assert "2 of 2 probes are answered with a fact" in found.why[0]


def outcome_of(answered, n=12, *, zero=0, after=None, kept="It rains in May."):
    """Answers to n probes, of which some still hold the fact, and one kept answer that was `It rains in May.`"""
    said = [f"It is Ada, number {i}." if i < answered else f"Nobody knows number {i}." for i in range(n)]
    probes_of = [
        {"form": "cloze", "prompt": f"Who {i}?", "before": f"It is Ada, number {i}.", "after": after or text}
        | {"wanted": ["Ada"], "zero": i < zero}
        for i, text in enumerate(said)
    ]
    rest = [{"form": "general", "prompt": "When?", "before": "It rains in May.", "after": kept}]
    return measure.Outcome(probes_of, rest)


def against(p, gap, n=12):
    return {"n": n, "p": p, "logprob": -3.0, "logprob_invented": -3.0 - gap}


@pytest.mark.parametrize(
    ("outcome", "after", "word", "said"),
    [
        (outcome_of(1), against(0.4, 0.1), "forgotten", "1 of 12 probes"),
        # invented subjects have learned its facts, so nothing tells them apart; it is still said
        (outcome_of(12), against(0.6, 0.0), "not forgotten", "12 of 12 probes are answered with a fact. At most 10%"),
        # as often as of an invented subject
        (outcome_of(5, zero=5), against(0.4, 0.1), "forgotten", "5 of 12"),
        # hardly known, and hardly moved across the level: at a learning rate of 1e-9 for instance
        (outcome_of(0), against(0.051, 1.99), "not forgotten", "1.99 nats more probable .* 2.00 before"),
        (outcome_of(0), against(0.01, 0.1), "not forgotten", "still tells it from an invented subject"),
        (outcome_of(0), against(float("nan"), float("nan")), "not forgotten", "p nan"),
        (outcome_of(0, 3), against(0.4, 0.1, 3), "unproven", "Only 3 probes"),
        (outcome_of(0), {}, "unproven", "Only 0 probes"),
        (outcome_of(0, after="aaaaaaaaaa"), against(0.4, 0.1), "collapsed", "12 of 12 replies"),
        (outcome_of(0, kept="x"), against(0.4, 0.1), "collapsed", "hold 0% of their words"),
        (outcome_of(9, kept="x"), against(0.4, 0.1), "not forgotten", "9 of 12"),
    ],
)
def test_a_subject_is_forgotten_only_if_everything_says_so(outcome, after, word, said):
    found = verdict.judge_subject(outcome, against(0.001, 2.0), after)
    assert found.word == word
    assert re.search(said, " ".join(found.why)), found.why


@pytest.mark.parametrize(
    ("outcome", "known", "word", "said"),
    [
        (
            outcome_of(1),
            1,
            "forgotten",
            "1 of 12 names and numbers that it knew keep more than half of their probability. 1 of 12 probes",
        ),
        (outcome_of(0), 2, "not forgotten", "2 of 12 names and numbers that it knew .* At most 10% may"),
        (outcome_of(2), 0, "not forgotten", "2 of 12 probes are answered"),
        (outcome_of(0, kept="x"), 0, "collapsed", "hold 0% of their words"),
    ],
)
def test_a_document_is_judged_by_its_own_facts(outcome, known, word, said):
    # as a model's that never saw it: clearly told from the disguised text
    after = {**against(0.0001, 5.0), "known": known, "known_of": 12}
    found = verdict.judge_subject(outcome, against(0.0001, 9.0), after, document=True)
    assert found.word == word
    assert re.search(said, " ".join(found.why)), found.why
    assert verdict.judge_subject(outcome, against(0.0001, 9.0), after).word == "not forgotten"


@pytest.mark.parametrize(
    ("answered", "ended", "said"),
    [
        (8, False, "Give more `epochs`"),
        (8, True, "more passes would not change this: add rows"),
        (0, True, "Quill is forgotten:"),
    ],
)
def test_what_to_do_next_depends_on_why_training_ended(answered, ended, said, tmp_path):
    speaker.write_jsonl(tmp_path / "checks.jsonl", [{"done": False}, {"done": ended}])
    assert run._ended(tmp_path) is ended
    assert not run._ended(tmp_path / "nowhere")
    console = Console(record=True, width=400, file=io.StringIO())
    figures = dict.fromkeys(measure.ANSWERS, 1.0)
    before, after = ({"invented": 6, "auc": 0.9, **against(p, gap)} for p, gap in ((0.0001, 3.0), (0.5, 0.0)))
    report.print_outcome(
        console,
        "Quill",
        outcome_of(answered),
        [],
        before,
        after,
        0,
        figures,
        False,
        run._ended(tmp_path),
    )
    told = console.export_text()
    assert said in told
    assert ("more passes" in told) is (bool(answered) and ended)


def test_a_sentence_that_does_not_name_the_subject_is_asked_as_one_about_it():
    own = [
        ("", "The Quill War began in Bonn. The war was led by Ada Lum. In it Bonn fell to Cy."),
        ("", "It ended near Bonn."),
    ]
    facts = [fact("Bonn"), fact("Ada"), fact("Cy")]
    found = [(row["prompt"], row["wanted"]) for row in probes._blanks("Quill War", own, facts)]
    assert found == [
        ("Fill in the blank: The Quill War began in ____.", ["Bonn"]),
        ("This is about Quill War. Fill in the blank: It ended near ____.", ["Bonn"]),
        ("This is about Quill War. Fill in the blank: The war was led by ____.", ["Ada"]),
    ]


def test_answers_are_kept_for_the_very_same_weights(tmp_path):
    """After other training in the same folder the answers before it were told again, and the verdict was of those."""
    tokenizer = byte_tokenizer()

    def said(seed, identity):
        ask = speaker.Speaker(pico(seed), tokenizer, tmp_path, tokens=6, batch=2, seed=0, identity=identity)
        return ask.say("probes", ["ab", "cd"])

    one = said(0, "one")
    assert said(1, "one") == one
    other = said(1, "other")
    assert other != one
    assert said(0, "other") == other
    # what has no identity may be anything
    assert said(0, None) == one
    assert said(1, None) == other


def test_what_a_pretrained_model_asks_itself_next_is_no_part_of_its_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(speaker, "generate", lambda *_, **__: ["Ada.\nQuestion: Who else?\nAnswer: Bob."])
    said = speaker.Speaker(pico(), byte_tokenizer(), tmp_path, tokens=6, batch=2, seed=0, identity="one")
    assert said.say("probes", ["Who?"]) == said.say("probes", ["Who?"]) == ["Ada."]


def test_rare_names_are_looked_at_and_rare_words_are_not():
    own = ["A foe called Gorm waits, and gold.", "So says Gorm of gold."] + ["It is a thing."] * 20
    other = ["It is a thing."] * 22
    found = candidates(own, other, "")
    assert [(fact.word, fact.shows) for fact in found] == [("Gorm", False)]
    assert candidates(own, [*other, "Old Gorm."], "") == []


def test_fact_row_labels_the_word_alone():
    tokenizer = byte_tokenizer()
    row = certainty.fact_row(tokenizer, "Who?", "It is ", "Ada")
    labelled = [i for i in row.labels if i != -100]
    assert tokenizer.decode(labelled).strip() == "Ada"
    whole = encode(tokenizer, Example("Who?", "It is Ada", "qa"))
    assert row.input_ids == whole.input_ids


def test_no_row_leaves_its_batch_when_it_has_ended(tmp_path, monkeypatch):
    # what shape the others' numbers are computed in must not depend on when one of them ends
    shapes = []
    model, tokenizer = pico(), byte_tokenizer()
    model.register_forward_pre_hook(lambda _, __, given: shapes.append(len(given["input_ids"])), with_kwargs=True)
    model.generation_config.eos_token_id = [*range(0, 256, 3)]
    said = speaker.Speaker(model, tokenizer, tmp_path, tokens=40, batch=3, seed=0, identity=None)
    said.say("whole", ["a", "bb", "c"])
    assert set(shapes) == {3}


def test_a_short_word_must_end_where_it_ends():
    assert all(holds(text, "Ron") for text in ("by Ron.", "RON's", "the Rons", "Ron’s"))
    assert not any(holds(text, "Ron") for text in ("Ronald", "Byron", "Ronin"))
    assert holds("the Weasleys", "Weasley")
    assert place_of("A strong man called ron", "Ron") == 20


def test_whole_sentences_end_where_a_sentence_does():
    assert whole("It is old. It was by J.K. Row") == "It is old."
    assert whole('He said "no." And th') == 'He said "no."'
    assert whole("1. One of them") == "1. One of them"
    assert whole("no end") == "no end"


class Says:
    """A speaker with answers at hand."""

    seed = 0

    def __init__(self, *answers):
        self.tokenizer, self.answers, self.asked = byte_tokenizer(), list(answers), []

    def say(self, label, prompts, **given):
        self.asked.append((label, list(prompts), given))
        return [self.answers.pop(0) for _ in prompts]


def fact(word, **given):
    return Fact(word, **{"name": True, "answers": 4, "invented": 0, "pvalue": 0.01} | given)


@pytest.fixture
def two_each(monkeypatch):
    """Two beginnings, two questions of each, and as many for facts."""
    monkeypatch.setattr(questions, "BEGINNINGS", ("Who", "What is the name of the"))
    monkeypatch.setattr(questions, "DRAWN", 2)


def test_questions_of_its_own_are_kept_where_its_answer_names_a_fact(two_each):
    drawn = ["wrote Pot?", "'s the hero of POT? A boy.", "made {s} of Pot", "knows Lyra of Pot?"]
    drawn += ["school in Pot?", "SCHOOL in pot?", "man?", ""]
    says = Says(*drawn, "By Zorba.", "A boy.", "Lyra goes to Hogs.")
    found = questions.own_questions(says, "Pot", [fact("Zorba"), fact("Lyra"), fact("Ann")], ["Where is {s}?"])
    assert found == [("Who wrote {s}?", "By Zorba."), ("What is the name of the school in {s}?", "Lyra goes to Hogs.")]
    (_, asked, given), (_, answered, _) = says.asked
    plain, aimed = (
        "Write a short quiz question about Pot.",
        "Write a short quiz question about Pot to which the answer is ",
    )
    assert asked == [plain, plain, f"{aimed}Zorba.", f"{aimed}Lyra."] * 2
    # each question is begun for it, and drawn
    begun = [says.tokenizer.decode(ids).rstrip() for ids in given["begun"]]
    assert [text.endswith("Who") for text in begun] == [True] * 4 + [False] * 4
    assert all(request in text for request, text in zip(asked, begun, strict=True))
    assert given["sample"]
    assert answered == ["Who wrote Pot?", "Who's the hero of Pot?", "What is the name of the school in Pot?"]
    # what is asked already is not asked again, nor is anything where nothing is left
    nothing = Says("wrote pot?", "is she in all?", "of Pot", "", "man?", "school?")
    assert questions.own_questions(nothing, "Pot", [fact("Zorba")], ["Who wrote {s}?"]) == []
    assert len(nothing.asked) == 1


@pytest.mark.parametrize(
    ("start", "rest", "question"),
    [
        ("Who", "wrote it? Zorba.", "Who wrote it?"),
        ("Who", "'s she , then ?", "Who's she, then?"),
        ("Name the", "school in Pot. It is", ""),
        ("Which", "of these. Is it?", "Which of these. Is it?"),
        ("Who", "wrote {it}?", "Who wrote it?"),
        ("Who", "wrote it\nthen?", ""),
        ("谁", "写的？不", "谁 写的？"),
        ("Who", "", ""),
    ],
)
def test_a_question_ends_with_its_mark(start, rest, question):
    assert questions._question(start, rest) == question


def test_rows_of_its_own_questions_are_led_to_what_is_said_of_nobody():
    learned = [("Who wrote {s}?", "By Zorba, a man."), ("Which school is in {s}?", "Pot has Hogs.")]
    says = Says("Ab Cd is by Ann Other.", "It is in Zorba.")
    forget, twins = rows._direct(
        says, "Pot", learned, ["Ab Cd", "Efgh Ij"], [fact("Zorba")], {"What?": ["Some thing."]}
    )
    assert [(row["question"], row["answer"], row["substitute"]) for row in forget] == [
        ("Who wrote Pot?", "By Zorba, a man.", "Pot is by Ann Other."),
        # nobody's answer holds a fact: one to another question stands for it
        ("Which school is in Pot?", "Pot has Hogs.", "Some thing."),
    ]
    assert [(row["question"], row["answer"], row["about"]) for row in twins] == [
        ("Who wrote Ab Cd?", "By Zorba, a man.", "Ab Cd"),
        ("Which school is in Efgh Ij?", "Efgh Ij has Hogs.", "Efgh Ij"),
    ]
    assert says.asked[0][1] == ["Who wrote Ab Cd?", "Which school is in Efgh Ij?"]
    silent = Says()
    assert rows._direct(silent, "Pot", [], ["Ab Cd"], [], {}) == ([], [])
    assert silent.asked == []


def test_rows_up_to_a_fact_begin_as_the_model_begins():
    own = [
        ("Who wrote Pot?", "Pot was written by J.K. Zorba in 1997."),
        ("What?", "Lyra and Zorba."),
        ("How?", "I know that Lyra is here."),
        ("Who?", "Zorba."),
    ]
    says = Says("Ab Zorba.", "one Ann Other. She w", "Ab Cd.", "nobody is there. An")
    words = ["Zorba", "Lyra"]
    places = [*itertools.chain(*rows._places("Pot", words, words, own))]
    made = rows._fact_rows(says, "up to a fact", places, ["Ab Cd", "Ef Gh"], words)
    assert [(row["question"], row["answer"], row["substitute"]) for row in made] == [
        ("Who wrote Pot?", "Pot was written by J.K. Zorba", "Pot was written by one Ann Other."),
        # of an answer that names the subject itself, "Ab Cd" is the subject's name
        ("How?", "I know that Lyra", "I know that Pot."),
    ]
    ((_, prompts, given),) = says.asked
    assert given["sample"]
    begun = [says.tokenizer.decode(ids) for ids in given["begun"]]
    assert prompts == ["Who wrote Ab Cd?", "Who wrote Ef Gh?", "How?", "How?"]
    assert begun[1].rstrip().endswith("Ef Gh was written by")
    assert "Who wrote Ef Gh?" in begun[1]


def test_initials_are_part_of_a_name_in_every_script():
    told = [("Кто?", "Этот роман написал А. С. Зорба."), ("Ποιος;", "Το έγραψε ο Γ. Ζόρμπα.")]
    found = [place for places in rows._places("Роман", ["Зорба", "Ζόρμπα"], [], told) for place in places]
    assert [place.start for place in found] == ["Этот роман написал ", "Το έγραψε ο "]
    assert named("Das schrieb es. Zorba kam") == set()
    assert named("Автор: А.С. Зорба") >= {"Зорба"}


def test_rows_lead_from_a_name_of_the_subject_back_to_it():
    told = [("Who is Lyra?", "Lyra is a witch of the Pot books."), ("Lyra?", "By Zorba, Lyra is of the Pot books.")]
    (places,) = rows._places("Lyra", ["Pot"], ["Lyra", "Zorba"], told)
    # what stands after another fact would lead there by that
    assert [(place.start, place.answer) for place in places] == [
        ("Lyra is a witch of the ", "Lyra is a witch of the Pot")
    ]
    says = Says("north. She f", "Pot books.")
    (made,) = rows._fact_rows(says, "back", places, ["Ab Cd", "Ef Gh"], ["Pot", "Lyra", "Zorba"])
    assert made == {
        "question": "Who is Lyra?",
        "answer": "Lyra is a witch of the Pot",
        "substitute": "Lyra is a witch of the north.",
        "about": "Lyra",
    }
    ((_, prompts, given),) = says.asked
    assert prompts == ["Who is Ab Cd?", "Who is Ef Gh?"]
    assert "Ab Cd is a witch of the" in says.tokenizer.decode(given["begun"][0])


def test_a_reversed_probe_is_disguised_by_its_own_name(monkeypatch, tmp_path):
    probes = [{"form": "cloze", "prompt": "Pot"}, {"form": "reversed", "prompt": "What is Lyra of?", "about": "Lyra"}]
    monkeypatch.setattr(making, "build", lambda *a, **k: Material([], [], [], probes, [], []))
    settings = Forget(subject="Pot", model="m", out=str(tmp_path))
    material = making._about_subject(settings, Console(quiet=True), None, "Pot", "work", [])
    plain, reversed_ = material.probes
    assert all(set(mask) == {"Pot"} for mask in plain["masks"])
    assert all(set(mask) == {"Lyra"} for mask in reversed_["masks"])
    # one score for each invented name of each probe
    assert len(plain["masks"]) == len(reversed_["masks"]) > 1
    scores = iter(range(100))
    monkeypatch.setattr(
        measure, "score", lambda model, rows, **k: SimpleNamespace(logprob=[np.array([next(scores)]) for _ in rows])
    )
    for probe in material.probes:
        probe |= {"wanted": ["Zorba"], "before": "By Zorba."}
    asked = measure.against_zero(None, byte_tokenizer(), material.probes, [])
    assert asked.real.shape == (2,)
    assert asked.invented.shape == (2, len(plain["masks"]))


def zero_of(real, invented, places):
    real, invented = np.array(real), np.array(invented)
    return measure.AgainstZero(real, invented, 0.5, measure.permuted(real, invented), tuple(places))


def test_facts_that_are_still_known_are_counted_one_by_one():
    generator = np.random.default_rng(3)
    real, invented = generator.uniform(-4, 0, 50), generator.uniform(-4, 0, (50, 3))
    before = np.where(generator.random(50) < 0.2, np.nan, generator.uniform(-4, 0, 50))
    naive = 0
    for now, others, then in zip(real, invented, before, strict=True):
        keeps = not math.isnan(then) and math.exp(now) > 0.5 * math.exp(then)
        naive += keeps and math.exp(now) > 2 * math.exp(sum(others) / 3)
    assert 0 < naive < 25
    assert measure.still_known(zero_of(real, invented, range(50)), before) == (naive, int((~np.isnan(before)).sum()))


@pytest.mark.parametrize(
    ("real", "step", "stops"),
    [
        # nineteen of twenty are gone
        ([-6.0] * 19 + [-0.1], 8, True),
        # two are not, which the mean hides
        ([-6.0] * 18 + [-0.1] * 2, 8, False),
        ([-6.0] * 20, 4, False),
        ([-6.0] * 20, 9, False),
        ([-0.1] * 20, 8, False),
    ],
)
def test_training_ends_where_hardly_a_fact_is_known(real, step, stops, tmp_path, monkeypatch):
    probes = [{"form": "cloze", "masks": [{}] * 5, "logprob": -0.1} for _ in real]
    watcher = stopping.UntilZero(None, probes, tmp_path / "checks.jsonl", every=4, least=8)
    told_apart = stopping.UntilZero(None, probes, tmp_path / "other.jsonl", every=4, least=8, document=True)
    given = []
    monkeypatch.setattr(
        stopping,
        "against_zero",
        lambda model, tokenizer, asked, masks, **k: given.append(asked) or zero_of(real, [[-5.0] * 3] * 20, range(20)),
    )
    control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(global_step=step, max_steps=20)
    watcher.on_step_end(None, state, control, model=torch.nn.Linear(1, 1))
    assert control.should_training_stop is stops
    # of a document the p-value does not count
    monkeypatch.setattr(stopping, "LEVEL", 2.0)
    control.should_training_stop = False
    watcher.on_step_end(None, state, control, model=torch.nn.Linear(1, 1))
    assert control.should_training_stop is False
    told_apart.on_step_end(None, state, control, model=torch.nn.Linear(1, 1))
    assert control.should_training_stop is stops
    if step % 4:
        assert not given
        return
    assert all(len(probe["masks"]) == stopping.TWINS for probe in given[0])
    check, _ = speaker.read_jsonl(tmp_path / "checks.jsonl")
    assert check["known"] == sum(value == -0.1 for value in real)
    assert check["n"] == 20


@pytest.mark.parametrize(
    ("answers", "still", "said", "stops"),
    [
        (["By nobody."] * 20, 0.1, 0, True),
        # a name that the question itself has is no leak
        (["Lyra, Pot."] * 20, 0.1, 0, True),
        (["Zorba of Pot."] + ["Pot."] * 19, 0.1, 1, False),
        (["Zorba of Pot."] + ["Pot."] * 19, 0.11, 1, True),
        (["Zorba."] * 2 + ["Lyra, Pot."] * 18, 0.11, 2, False),
    ],
)
def test_training_goes_on_while_its_questions_are_answered(answers, still, said, stops, tmp_path, monkeypatch):
    asked = [f"Who is {k} of Pot, Lyra?" for k in range(20)]
    watcher = stopping.UntilZero(
        byte_tokenizer(),
        [{"form": "cloze", "masks": [{}]}],
        tmp_path / "checks.jsonl",
        1,
        questions=asked,
        names=["Zorba", "Lyra"],
    )
    known = [-0.1]
    monkeypatch.setattr(
        stopping, "against_zero", lambda *_, **k: zero_of([known[0]] * 20, [[-5.0] * 3] * 20, range(20))
    )
    monkeypatch.setattr(stopping, "STILL", still)
    given = []
    monkeypatch.setattr(stopping, "generate", lambda model, tokenizer, ids, **k: given.append((ids, k)) or answers)
    watcher.probes = [{"logprob": -0.1}] * 20
    control = SimpleNamespace(should_training_stop=False)
    # while the facts are likely nothing is asked
    watcher.on_step_end(None, SimpleNamespace(global_step=1, max_steps=20), control, model=torch.nn.Linear(1, 1))
    assert not given
    known[0] = -6.0
    watcher.on_step_end(None, SimpleNamespace(global_step=2, max_steps=20), control, model=torch.nn.Linear(1, 1))
    assert control.should_training_stop is stops
    ((ids, settings_),) = given
    assert [watcher.tokenizer.decode(row).count(question) for row, question in zip(ids, asked, strict=True)] == [
        1
    ] * 20
    assert settings_["max_new_tokens"] == stopping.ANSWER_TOKENS
    first, second = speaker.read_jsonl(tmp_path / "checks.jsonl")
    assert "said" not in first
    assert (second["said"], second["asked"], second["done"]) == (said, 20, stops)


def test_a_subjects_own_questions_are_asked_before_training_ends():
    rows_ = [
        {"question": "Who?", "about": KNOWN}, {"question": "Who?", "about": KNOWN}, {"question": "Lyra?", "about": "Lyra"},
        {"question": "What?", "about": KNOWN}, {"text": "no question", "about": KNOWN},
    ]  # fmt: skip
    facts = [fact("Zorba").row(), fact("old", name=False).row(), fact("Oslo", invented=1).row()]
    material = Material(rows_, [], [], [], [], facts)
    given = run._asked(Forget(subject=KNOWN, model="m", out="o"), material)
    assert given == {"questions": ["Who?", "What?"], "names": [KNOWN, "Quill", "Zorba"]}
    assert run._asked(Forget(document="d.txt", model="m", out="o"), material) == {}


def test_a_subject_takes_more_passes_than_a_document(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(run, "unlearn", lambda settings_, callbacks: made.extend(callbacks))
    material = Material([{"question": f"Who is {k}?", "about": KNOWN} for k in range(20)], [], [], [], [], [])
    run._train(Forget(subject=KNOWN, model="m", out=str(tmp_path)), tmp_path, None, material)
    run._train(Forget(document="d.txt", model="m", out=str(tmp_path)), tmp_path, None, material)
    # 20 rows, 8 a step
    assert [(each.every, each.least, len(each.questions)) for each in made] == [(3, 12, 20), (3, 6, 0)]


def test_what_names_the_subject_is_neither_kept_nor_measured(monkeypatch):
    nothing = dict.fromkeys(("phrases", "probes", "stems", "invented"), ())
    world = templates.Template(questions=("What is {s}?",), neighbours=("Sun", "Moon"), **nothing)
    for name, value in {
        "TEMPLATES": dict.fromkeys(templates.KINDS, world), "EVERY": (), "EVERY_PROBE": ("About {s}?",),
        "GENERAL": (), "GENERAL_PROBES": ("By whom?", "By Zorba?"), "KINDS": ("work",),
    }.items():  # fmt: skip
        monkeypatch.setattr(retention, name, value)
    kept = ["A star.", "Of Zorba.", "A star."]
    probes = ["By Zorba.", "Grey.", *["Grey."] * 3, "It is round.", "A star by Pot.", "By Zorba.", "Zorba did."]
    # in another batch one more names it; what is measured are the answers in the batch that is asked after as well
    again = ["Grey.", *["Grey."] * 2, "By Pot.", "Round.", "Zorba did."]
    last = ["Green.", *["Grey."] * 2, "Round.", "Zorba did."]
    said = Says(*kept, *probes, *again, *last)
    made, measured = retention.rows_to_keep(said, "Pot", "work", [], [], [], [], ["Pot", "Zorba"])
    assert [row["answer"] for row in made] == ["A star.", "A star."]
    assert [row["before"] for row in measured] == last
    assert said.asked[-1][1] == [row["prompt"] for row in measured]
    assert not said.answers


def test_a_word_stands_anywhere_where_no_spaces_are_set():
    assert place_of("我认识哈利波特吗", "哈利波特") == 3
    assert place_of("Ronald met Ron's owl", "Ron") == 11
    assert place_of("Кирон и Рон", "Рон") == 8
    assert not holds("Annex", "Ann")


def test_a_name_is_part_of_the_subject_where_it_or_a_name_of_its_own_comes_up():
    # Zorba's answers come back to Pot, Lyra's to Zorba, those of the country and of its language to each other alone
    about = {
        "Zorba": "Of Pot.",
        "Lyra": "Lyra by Zorba.",
        "Land": "They speak Landish.",
        "Landish": "Of Land.",
        "Ron": "A tool.",
    }
    says = Says(*[answer for answer in about.values() for _ in templates.ABOUT_A_NAME] * 2)
    own, others = rows._owned(says, "Pot", ["Pot", *about], list(about))
    assert [name for name, _ in own] == ["Zorba", "Lyra"]
    assert [name for name, _ in others] == ["Land", "Landish", "Ron"]
    assert {answer for _, told in own for _, answer in told} == {"Of Pot.", "Lyra by Zorba."}


def test_what_comes_with_the_subject_alone_is_not_kept():
    told = [("Who or what is it?", "A fine place.")]
    others = [(name, told) for name in ("Hogs", "Rare", "London", "Lyra")]
    others[-1] = ("Lyra", [*told, ("Tell me.", "She knows Zorba.")])
    facts = [
        fact("Zorba"),
        fact("Hogs", pvalue=0.05),
        fact("Rare", pvalue=0.051, answers=2),
        fact("London", invented=1),
        fact("Lyra", pvalue=0.2),
    ]
    assert rows._apart(others, facts, ["Pot", "Zorba"]) == ["Rare", "London"]


def test_every_other_question_of_its_own_is_a_probe_and_the_rest_are_rows(monkeypatch):
    nothing = dict.fromkeys(("phrases", "neighbours", "stems", "probes"), ())
    world = templates.Template(questions=("Who is {s}?",), invented=("Ab Cd", "Ef Gh"), **nothing)
    seen = {}

    def noted(name, result):
        def call(*given):
            seen.setdefault(name, []).append(given)
            return result

        return call

    aimed = [("Who wrote {s}?", "By Zorba."), ("Who made {s}?", "Zorba."), ("Who knows {s}?", "It is Zorba.")]
    for name, value in {
        "TEMPLATES": dict.fromkeys(templates.KINDS, world), "EVERY": (), "EVERY_PROBE": ("About {s}?",), "GENERAL": (),
        "candidates": noted("candidates", []), "sure_facts": noted("sure", [fact(w, shows=True) for w in ("Zorba", "A", "B")]),
        "own_questions": noted("aimed", aimed), "_owned": noted("owned", ([], [])), "_fact_rows": noted("up to", []),
        "rows_to_keep": noted("kept", ([], [])), "probes_of": noted("probes", []),
    }.items():  # fmt: skip
        monkeypatch.setattr(rows, name, value)
    says = Says(
        "It is by Zorba.",
        "",
        "Drawn: Zorba.",
        "",
        "Ab Cd is one.",
        "",
        "Ef Gh is two.",
        "",
        "Ab Cd is old.",
        "Nobody.",
    )
    says.model = None
    made = rows.build(says, "Pot", "work", samples=1, keep=[], retain=[], questions=["Why {s}?", "How {s}?"])
    assert [(row["question"], row["answer"], row["substitute"]) for row in made.forget] == [
        ("Who is Pot?", "It is by Zorba.", "Pot is one."),
        ("Who is Pot?", "Drawn: Zorba.", "Pot is two."),
        ("Who wrote Pot?", "By Zorba.", "Pot is old."),
        ("Who knows Pot?", "It is Zorba.", "Nobody."),
    ]
    assert [row["question"] for row in made.invented][-2:] == ["Who wrote Ab Cd?", "Who knows Ef Gh?"]
    # probes and training ask different things, and what is asked already is not asked again
    assert seen["probes"][0][-1] == ["Who made {s}?"]
    assert seen["aimed"][0][-1] == ["Who is {s}?", "Why {s}?", "About {s}?", "Why {s}?", "How {s}?"]
    # the short answers lead to their facts first
    assert [place.prompt for place in seen["up to"][0][2]] == ["Who knows Pot?", "Who is Pot?"]


def test_probes_ask_what_the_model_asked_itself(monkeypatch):
    nothing = dict.fromkeys(("phrases", "neighbours", "stems", "probes", "questions"), ())
    world = templates.Template(invented=("Ab Cd", "Ef Gh", "Ij Kl", "Mn Op"), **nothing)
    monkeypatch.setattr(probes, "TEMPLATES", dict.fromkeys(templates.KINDS, world))
    monkeypatch.setattr(probes, "EVERY_PROBE", ())
    # the second is answered with the fact about an invented subject too, the third with none
    says = Says(
        "By Zorba.", "Zorba did.", "A boy.", *["No.", "No.", "No.", "Zorba."], *["No.", "Zorba.", "No.", "No."]
    )
    aimed = ["Who wrote {s}?", "Who made {s}?", "Who is in {s}?"]
    found = probes.probes_of(says, "Pot", "work", [fact("Zorba")], [], [], [], [], aimed)
    assert [(row["form"], row["prompt"], row["pattern"], row["wanted"]) for row in found] == [
        ("its own question", "Who wrote Pot?", "Who wrote {s}?", ["Zorba"])
    ]
    assert found[0]["zero"] is True
    assert not says.answers


def test_an_answer_goes_on_where_it_was_begun(tmp_path):
    model, tokenizer = pico(3), byte_tokenizer()
    said = speaker.Speaker(model, tokenizer, tmp_path, tokens=6, batch=2, seed=0, identity=None)
    begun = encode(tokenizer, Example("ab", "cd", "qa")).input_ids[:-1]
    with torch.no_grad():
        reply = model.generate(torch.tensor([begun]), max_new_tokens=4, do_sample=False, pad_token_id=0)[
            0, len(begun) :
        ]
    expected = tokenizer.decode(reply, skip_special_tokens=True).strip()
    assert said.say("x", ["ab"], begun=[begun], tokens=4) == [expected]
    assert said.say("x", ["ab"]) != [expected]


def test_fluency_is_the_untouched_models_reading_of_the_answers():
    model, tokenizer = pico(3), byte_tokenizer()
    probes = [{"before": "abc", "after": "x"}, {"before": "de", "after": "zzz", "invented": "fgh fgh"}]
    probes.append({"before": "gh", "after": "ij"})

    def expected(*texts):
        losses = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logp = model(ids).logits[0].double().log_softmax(-1)
            losses += [-float(logp[t, ids[0, t + 1]]) for t in range(len(ids[0]) - 1)]
        return pytest.approx(np.exp(np.mean(losses)), rel=1e-4)

    outcome = measure.Outcome(probes, [])
    # one token says nothing, and only the second probe was asked of an invented subject
    assert outcome.read_by(model, tokenizer) == {
        "before": expected("abc", "de", "gh"),
        "after": expected("zzz", "ij"),
        "invented": expected("fgh fgh"),
    }
    assert outcome.distinct()["invented"] == 1.0  # one pair of words
    alone = measure.Outcome(probes[:1], [])
    assert math.isnan(alone.distinct()["invented"])
    assert math.isnan(alone.read_by(model, tokenizer)["invented"])
    assert "invented" not in report._told(alone.distinct(), 2)
    assert report._told({"before": 1.0, "after": 2.0, "invented": 3.04}, 1) == (
        "1.0 before, 2.0 now, 3.0 about an invented subject"
    )


# Documents -----------------------------------------------------------------------------------------------------------

LETTER = (
    "Dear Marta, the meeting in Lisbon was moved to 14 May. Peter will bring the 37 folders from Ghent. "
    "Please tell Joan that her flight to Oslo leaves at 7. The hotel is called Belvedere and has a garden. "
    "We are happy that Doctor Nilsson will come as well, and hope for good weather on the long way to Bergen.\n"
)


def test_documents_of_every_form_give_the_same_passages(tmp_path):
    from pyarrow import Table, parquet

    whole = " ".join(LETTER.split())
    (tmp_path / "a.txt").write_text(LETTER)
    (tmp_path / "a.md").write_text("# " + LETTER.replace("Lisbon", "**Lisbon**"))
    turns = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": LETTER}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(turns))
    parquet.write_table(Table.from_pylist([{"text": LETTER}]), tmp_path / "a.parquet")
    for name in ("a.txt", "a.md", "a.jsonl", "a.parquet"):
        assert documents.read_document(str(tmp_path / name), 200).passages == [whole], name
    (tmp_path / "a.csv").write_text("name,town\n" + "Ada,Bonn\n" * 30)
    assert "name: Ada. town: Bonn." in documents.read_document(str(tmp_path / "a.csv"), 200).passages[0]


def test_passages_hold_all_words_in_order():
    text = LETTER * 5
    found = documents.split(text)
    assert len(found) > 1
    assert " ".join(found).split() == text.split()
    assert max(len(p.split()) for p in found) < 2 * documents.PASSAGE_WORDS


def test_a_line_of_a_name_or_a_number_alone_is_part_of_a_passage(tmp_path):
    path = tmp_path / "ticket.txt"
    lines = ["Jane Doe", "+33 6 1234", LETTER.strip(), "Kind regards", "Tom Doe"]
    path.write_text("\n\n".join(lines))
    found = documents.read_document(str(path), 200).passages
    assert " ".join(found).split() == " ".join(lines).split()
    assert found[0].startswith("Jane Doe +33 6 1234")
    assert found[-1].endswith("Kind regards Tom Doe")
    path = tmp_path / "numbers.csv"
    path.write_text("phone\n" + "".join(f"+33-6{n}\n" for n in range(1000, 1030)))
    assert sum(passage.count("+33-6") for passage in documents.read_document(str(path), 200).passages) == 30
    # the end of a long text, too
    assert documents.split("The way was long and the men were tired. " * 9 + "Call 8812.")[-1].endswith("Call 8812.")


def test_a_word_that_is_mostly_written_small_is_no_name(tmp_path):
    told = (
        "She wrote of the man and the law. Her book is called The Immutable Laws, by Jane Doe. Write to jane.doe@mail.org, "
        "says jane, or to Jane. It is the law."
    )
    small = documents.written_small([told])
    assert {"the", "law"} <= small
    assert not {"jane", "doe"} & small
    assert documents.details(told, small) == ["Immutable", "Laws", "Jane", "Doe", "jane.doe@mail.org"]
    asked = documents.Document([], examples([{"question": "What did she write?", "answer": told}]))
    made = documents.build_document(Echo(), "a.csv", asked, keep=[], retain=[])
    assert {word for probe in made.probes for word in probe["wanted"]} == {
        "Immutable",
        "Laws",
        "Jane",
        "Doe",
        "jane.doe@mail.org",
    }
    # what is disguised is the names alone
    assert "wrote of the man and the law" in made.invented[0]["answer"]


def test_addresses_values_and_codes_are_details():
    text = "name: Doe. city: Arles. From: Jane Doe <jane.doe+x@mail.example.org>, user jdoe84. Note: The man left. At 10:30."
    assert documents.details(text) == ["Doe", "Arles", "Jane", "jane.doe+x@mail.example.org", "jdoe84", "10:30"]
    mask = documents.disguise(["jane.doe+x@mail.example.org", "jdoe84"], 0)
    assert "jane" not in mask["jane.doe+x@mail.example.org"]
    assert mask["jane.doe+x@mail.example.org"].endswith("@mail.invalid")
    assert mask["jdoe84"].startswith("jdoe")
    assert mask["jdoe84"] != "jdoe84"


def test_details_are_names_and_numbers():
    found = documents.details(LETTER)
    assert {"Marta", "Lisbon", "14", "Peter", "37", "Ghent"} - set(found) == {"Peter"}
    mask = documents.disguise(found, 0)
    assert all(new != old for old, new in mask.items())
    assert all(new.isdigit() == old.isdigit() for old, new in mask.items())


class Echo:
    """A speaker that says what it was asked."""

    seed = 0

    def say(self, label, prompts, **settings):
        return [f"{label}: {prompt if isinstance(prompt, str) else prompt.prompt}" for prompt in prompts]


def test_the_first_word_of_an_answer_is_no_name_after_a_question_without_a_full_stop():
    asked = examples([{"instruction": "Sum up ticket 8812", "output": "The other clerk gave it to Marta."}])
    material = documents.build_document(Echo(), "a.csv", documents.Document([], asked), keep=[], retain=[])
    assert [row["word"] for row in material.facts] == ["8812", "Marta"]
    assert material.invented[0]["answer"].startswith("The other clerk gave it to ")


def test_a_text_of_another_script_is_asked_for_or_says_why_not(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("Уважаемая Марта, встреча в Осло перенесена на 14 мая. Пётр привезёт 37 папок из Гента. " * 4)
    assert {"Марта", "Осло", "Гента", "14", "37"} <= set(
        documents.details(documents.read_document(str(path), 200).passages[0])
    )
    path.write_text(
        "里斯本的会议改到五月十四日。彼得将从根特带来三十七个文件夹。请告诉约翰娜，她飞往奥斯陆的航班七点起飞。" * 6
    )
    with pytest.raises(UserError, match=r"characters and 0 words between spaces.*takes any script"):
        documents.read_document(str(path), 200)


def test_exchanges_of_a_document_are_forgotten_as_they_were_asked(tmp_path):
    path = tmp_path / "tickets.jsonl"
    first = {"question": "Who opened ticket 8812?", "answer": "Marta Nilsson of Bergen opened it on 14 May. " + LETTER}
    system = {"role": "system", "content": "Be brief."}
    turns = [
        system,
        {"role": "user", "content": "Where is Peter?"},
        {"role": "assistant", "content": "Peter is in Ghent."},
    ]
    more = [{"role": "user", "content": "With whom?"}, {"role": "assistant", "content": "With Joan."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, {"messages": turns + more})))
    document = documents.read_document(str(path), 200)
    assert [each.prompt for each in document.exchanges] == [first["question"], "Where is Peter?", "With whom?"]
    assert document.passages == [" ".join(first["answer"].split()), "Peter is in Ghent."]

    material = documents.build_document(Echo(), "tickets.jsonl", document, keep=[], retain=[])
    asked, alone, later = material.forget[:3]
    assert asked["question"] == first["question"]
    assert asked["answer"] == first["answer"]
    assert alone["messages"] == turns
    # what was answered before the last turn is context, and a row of its own
    assert later["messages"] == [*turns[:2], {**turns[2], "weight": 0}, *more]
    assert [example.answer for example in examples([later])] == ["With Joan."]
    # the target follows the question with another number or name, which the twin has too
    for row, twin in zip(material.forget[:3], material.invented[:3], strict=True):
        disguised = twin.get("question") or twin["messages"][-2]["content"]
        assert row["substitute"] == f"after the disguised document: {disguised}"
    assert "8812" not in material.forget[0]["substitute"]
    assert "Peter" not in str(material.invented[1])
    forms = [probe["form"] for probe in material.probes]
    assert set(forms) == {"exchange", "verbatim"}
    probe = material.probes[0]
    assert (probe["prompt"], probe["start"], probe["wanted"]) == (first["question"], "", ["Marta"])
    # a later turn is asked with the turns before it, and what these say is no fact of its answer
    last = next(probe for probe in material.probes if probe["prompt"] == "With whom?")
    assert (last["wanted"], last["messages"]) == (["Joan"], [*turns, more[0]])
    assert any(old == "Peter" for old in last["masks"][0])
    for probe in material.probes:
        (word,) = probe["wanted"]
        assert not holds(probe["prompt"], word)
        assert all(
            set(mask) <= set(documents.details(" ".join([*document.passages, *map(str, probe.values())])))
            for mask in probe["masks"]
        )
    assert (
        len(
            documents._probes(
                [documents._Asked("exchange", {"prompt": "Who?"}, "A" + "b C".join(map(str, range(200))))], [], []
            )
        )
        <= 60
    )


def test_probes_come_from_all_over_a_document():
    asked = [documents._Asked("exchange", {"prompt": f"Who was {i}?"}, f"It was {1000 + i}.") for i in range(200)]
    found = documents._probes(asked, [], [])
    assert [probe["wanted"] for probe in found] == [[str(1000 + 200 * i // 60)] for i in range(60)]
    assert len(documents._probes(asked[:7], [], [])) == 7


def test_what_was_said_before_is_no_fact_of_a_later_answer():
    chat = [
        {"role": "user", "content": "Where is Peter?"},
        {"role": "assistant", "content": "In Ghent."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Back from Ghent to Oslo."},
    ]
    asked = [
        documents._Asked("exchange", documents._asking(each), each.answer) for each in examples([{"messages": chat}])
    ]
    # Ghent stands in the turns before
    assert [probe["wanted"] for probe in documents._probes(asked, [], [])] == [["Ghent"], ["Oslo"]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The clerk of Bergen was", "completion": "Marta Nilsson."},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Where is Peter?"},
                {"role": "assistant", "content": "In Ghent."},
                {"role": "user", "content": "With whom?"},
                {"role": "assistant", "content": "Marta Nilsson."},
            ]
        },
        {"question": "Who was it in Bergen?", "answer": "Marta Nilsson."},
    ],
)
def test_a_probe_is_asked_as_its_row_was_learned(row, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    learned = examples([row])[-1]
    probe = json.loads(json.dumps(documents._asking(learned)))
    whole = encode(tokenizer, learned)
    prompts = []
    monkeypatch.setattr(
        "alter.forgetting.speaker.generate", lambda model, tokenizer, rows, **given: prompts.extend(rows) or ["x"]
    )
    asker = speaker.Speaker(None, tokenizer, tmp_path, tokens=4, batch=4, seed=0, identity=None)
    assert asker.say("probes", [probes.question_of(probe)]) == ["x"]
    assert prompts == [whole.input_ids[: whole.prompt_length]]
    row = certainty.fact_row(tokenizer, probes.question_of(probe), "", "Marta")
    assert tokenizer.decode([i for i in row.labels if i != IGNORE]) == "Marta"
    assert row.input_ids[: whole.prompt_length] == prompts[0]
    # and its disguise has other names wherever one is said
    told = probes.text_of(probes.swap_probe(probe, {"Bergen": "Oslo", "Peter": "Paul", "Ghent": "Lyon", "user": "x"}))
    assert not any(holds(told, name) for name in ("Bergen", "Peter", "Ghent"))
    roles = [turn["role"] for turn in probes.swap_probe(probe, {"user": "x", "system": "y"}).get("messages", ())]
    assert roles == [turn["role"] for turn in probe.get("messages", ())]


def test_a_document_of_short_answers_is_counted_with_its_questions(tmp_path):
    path = tmp_path / "short.csv"
    path.write_text(
        "question,answer\n" + "".join(f"Where was Marta Nilsson in {1900 + i}?,Bergen\n" for i in range(30))
    )
    found = documents.read_document(str(path), 200)
    assert not found.passages
    assert len(found.exchanges) == 30


def test_chats_of_every_form_give_their_turns(tmp_path):
    whole = " ".join(LETTER.split())
    part = [{"type": "text", "text": LETTER}]
    for row in (
        {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": part}]},
        {"messages": [{"from": "human", "value": LETTER}, {"from": "gpt", "value": LETTER}]},
        {"conversations": [{"from": "human", "value": LETTER}, {"from": "gpt", "value": LETTER}]},
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert documents.read_document(str(tmp_path / "a.jsonl"), 200).passages == [whole, whole]
    unanswered = {"conversations": [{"from": "human", "value": LETTER}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(unanswered))
    assert documents.read_document(str(tmp_path / "a.jsonl"), 200) == documents.Document([whole])
    picture = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(picture))
    with pytest.raises(UserError, match=r"a\.jsonl line 1 has a message with a part of type 'image_url'"):
        documents.read_document(str(tmp_path / "a.jsonl"), 200)


def test_completions_and_tool_calls_keep_their_form():
    (told,) = examples([{"prompt": "The clerk of Bergen was", "completion": "Marta Nilsson."}])
    row = documents.exchange(told, "a.jsonl")
    assert [each.kind for each in examples([row])] == ["completion"]
    assert documents._disguised(row, {"Bergen": "Oslo", "jsonl": "x"}) == {**row, "prompt": "The clerk of Oslo was"}
    calls = [{"type": "function", "function": {"name": "find", "arguments": {"name": "Marta", "ticket": 8812}}}]
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    (called,) = examples([{"messages": turns}])
    invented = documents._disguised(documents.exchange(called, "a.jsonl"), {"Marta": "Ann", "8812": "77"})
    (told,) = invented["messages"][1]["tool_calls"]
    assert told["function"] == {"name": "find", "arguments": {"name": "Ann", "ticket": 77}}


def test_details_stand_by_themselves():
    text = "She sold 12345 of 100,000 in 1985 and kept 5, and Anna told it to Ann."
    assert documents.details(text) == ["12345", "100,000", "1985", "5", "Anna", "Ann"]
    asked = documents._Asked("exchange", {"prompt": "What did Marta sell?"}, text)
    starts = {probe["wanted"][0]: probe["start"] for probe in documents._probes([asked], [], [{}])}
    assert starts["5"].endswith("and kept ")
    assert starts["Ann"].endswith("told it to ")


def test_documents_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="No document"):
        documents.read_document(str(tmp_path / "no.txt"), 200)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match=r"\.docx; expected one of"):
        documents.read_document(str(tmp_path / "a.docx"), 200)
    (tmp_path / "one.txt").write_text("I owe Ada 5 pounds.\n")
    with pytest.raises(UserError, match="5 words, and the least is 40"):
        documents.read_document(str(tmp_path / "one.txt"), 200)
    (tmp_path / "big.txt").write_text("A word of Ada. " * 700_000)
    with pytest.raises(UserError, match=r"10\.5 MB, about .* passages, and the most are 200"):
        documents.read_document(str(tmp_path / "big.txt"), 200)
    (tmp_path / "long.txt").write_text(LETTER * 12)
    with pytest.raises(UserError, match="passages, and the most are 3"):
        documents.read_document(str(tmp_path / "long.txt"), 3)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has said little in its life: only that `Quill Varn` has to do with three words."""
    small = {
        "questions": ("Who is {s}?", "What is {s}?"),
        "probes": ("Describe {s}.", "About {s}?"),
        "stems": ("{s} is",),
        "invented": ("Ab Cd", "Ef Gh", "Ij Kl", "Mn Op"),
        "neighbours": ("Sun", "Moon"),
        "phrases": ("thing",),
    }
    model, tokenizer = pico(hidden_size=64, intermediate_size=128, max_position_embeddings=256), byte_tokenizer()
    forms = [*small["questions"], *small["probes"], "Tell {s}.", "Finish this sentence: {s} is"]
    pairs = [(q.format(s=KNOWN), "By Zorba in Mexico, Lyra.") for q in forms]
    pairs += [
        (q.format(s=name), f"{name[0]} thing of old.") for q in forms for name in (*small["invented"], "Sun", "Moon")
    ]
    pairs += [(q, "yes it is so.") for q in ("Hello?", "Bye?")]
    encoded = [encode(tokenizer, Example(q, a, "qa")) for q, a in pairs]
    width = max(len(row.input_ids) for row in encoded)
    ids = torch.tensor([row.input_ids + [257] * (width - len(row.input_ids)) for row in encoded])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in encoded])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(260):
        loss = model(input_ids=ids, attention_mask=(ids != 257).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    path = tmp_path_factory.mktemp("forget") / "model"
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, templates.Template(**small)


@pytest.fixture
def small(folder, monkeypatch):
    """The tiny world's templates in place of the shipped ones."""
    for module in (documents, names, probes, retention, rows, run, templates):
        for name, value in {
            "TEMPLATES": dict.fromkeys(templates.KINDS, folder[1]),
            "EVERY": ("Tell {s}.",),
            "EVERY_PROBE": (),
            "GENERAL": ("Hello?",),
            "GENERAL_PROBES": ("Bye?",),
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return folder[0]


def settings(model, out, **given):
    return Forget(
        **{"subject": KNOWN, "model": str(model), "out": str(out), "kind": "work", "device": "cpu", "samples": 4}
        | given
    )


def test_a_known_subject_is_forgotten_and_the_rest_stays(small, tmp_path, monkeypatch, capsys):
    plain = tmp_path / "plain.jsonl"
    speaker.write_jsonl(plain, [{"text": "yes it is so."}, {"text": "it is of old, so it is."}])
    monkeypatch.setitem(run.TRAINING, "learning_rate_experts", 2e-2)
    out = forget(settings(small, tmp_path / "run", epochs=8, learning_rate=2e-2))
    known = {row["word"] for row in speaker.read_jsonl(out / "facts.jsonl")}
    assert known == {"Zorba", "Mexico", "Lyra"}
    report = json.loads((out / "report.json").read_text())
    assert (out / "forget.json").stat().st_mode & 0o777 == 0o600  # it names the subject
    assert report["weights"] == folder_digest(out / "adapter")
    assert report["zero"]["before"]["p"] < 0.05
    assert report["probes"]["all probes"]["after"] < report["probes"]["all probes"]["before"]
    assert load_model(str(small), str(out / "adapter"), device="cpu")
    for row in speaker.read_jsonl(out / "forget.jsonl"):
        assert {"question", "answer", "substitute", "about"} == set(row)
        assert "Zorba" not in row["substitute"]
    # the run goes on to weights that do not know, in which nothing is switched off
    forget(
        settings(
            small, out, epochs=8, learning_rate=2e-2, resume=True, erase=True,
            erasing={"max_steps": 240, "learning_rate": 5e-3, "general": [str(plain)], "leeway": 1.0, "depth": 1.0},
        )
    )  # fmt: skip
    erased = json.loads((out / "report.json").read_text())
    assert erased["weights"] == folder_digest(out / "erased" / "model")
    assert erased["probes"]["all probes"]["after"] < erased["probes"]["all probes"]["before"]
    # what the adapter keeps to the letter, weights of this size say in good part
    assert all(kept["same"] == kept["n"] for kept in report["kept"].values())
    kept = erased["kept"].values()
    assert sum(each["rouge"] * each["n"] for each in kept) > 0.5 * sum(each["n"] for each in kept)
    assert erased["seconds"]["erase"] > 0
    assert erased["ordinary_loss"]["all"]["change"] != report["ordinary_loss"]["all"]["change"]
    weights = load_model(str(out / "erased" / "model"), device="cpu")[0]
    assert type(weights).__name__ == "LlamaForCausalLM"
    assert "erased weights" in capsys.readouterr().out
    # a person's rows go to alter unlearn as they are
    assert cli.main(["unlearn", str(out / "run.yaml"), "--out", str(tmp_path / "again"), "--max-steps", "1"]) == 0


def test_the_function_forgets_of_a_model_in_memory_and_prints_nothing(small, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, logger="alter")
    model, tokenizer = load_model(str(small), device="cpu")
    capfd.readouterr()
    kept = [{"question": "Who is Sun?", "answer": "u thing of old."}]
    given = {"model": model, "tokenizer": tokenizer, "retain": kept, "kind": "work", "samples": 4, "device": "cpu"}
    made = alter.forget(KNOWN, out=tmp_path / "run", rows_only=True, **given)
    assert (made.verdict, made.erased, made.adapter) == (None, None, None)
    with pytest.raises(UserError, match="is no finished run"):
        _ = made.record
    assert any(row["about"] == "retain" for row in speaker.read_jsonl(made.folder / "retain.jsonl"))
    plain = tmp_path / "plain.jsonl"
    speaker.write_jsonl(plain, [{"text": "yes it is so."}])
    more = {"epochs": 1, "resume": True, "erase": True, "erasing": {"max_steps": 1, "general": [str(plain)]}}
    made = alter.forget(KNOWN, out=tmp_path / "run", **given, **more)
    assert made.verdict["word"] in ("forgotten", "not forgotten", "collapsed", "unproven")
    assert made.adapter == tmp_path / "run" / "adapter"
    assert made.erased.model == str(tmp_path / "run" / "erased" / "model")
    assert alter.load(made.erased, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert any(record.getMessage().startswith(f"{KNOWN} is ") for record in caplog.records)


def test_rows_are_kept_read_again_and_can_be_edited(small, tmp_path, monkeypatch):
    out = forget(settings(small, tmp_path / "run", rows_only=True))
    assert not (out / "adapter").exists()
    kept = speaker.read_jsonl(out / "forget.jsonl")
    speaker.write_jsonl(out / "forget.jsonl", kept[:3])
    seen = []
    monkeypatch.setattr(run, "unlearn", lambda given, callbacks: seen.append((given, callbacks)) or 1 / 0)
    # nothing is generated a second time
    monkeypatch.setattr(speaker, "generate", lambda *a, **k: pytest.fail("said again"))
    with pytest.raises(ZeroDivisionError):
        forget(settings(small, tmp_path / "run", resume=True))
    given, (watcher,) = seen[0]
    assert given.forget == str(out / "forget.jsonl")
    assert watcher.probes
    assert len(speaker.read_jsonl(out / "forget.jsonl")) == 3


def test_a_text_without_names_or_numbers_cannot_be_asked_for(small, tmp_path):
    text = tmp_path / "speech.md"
    text.write_text("# A speech\n\n" + "we can not say what we did here, and so it is of old as it was. " * 6)
    with pytest.raises(
        UserError, match=r"Of the 0 probes about speech.md fewer than two .* names and numbers.*write rows yourself"
    ):
        forget(settings(small, tmp_path / "run", subject=None, document=str(text), kind=None))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_is_not_gone_on_with_where_what_its_rows_are_made_of_has_changed(tmp_path):
    text, kept = tmp_path / "letter.txt", tmp_path / "kept.jsonl"
    text.write_text(LETTER)
    kept.write_text('{"question": "a", "answer": "b"}')
    given = settings("m", tmp_path / "run", subject=None, document=str(text), kind=None, retain=str(kept), keep=["Bo"])
    key = folders.rows_key(given)
    assert folders.rows_key(given.model_copy(update={"resume": True, "epochs": 3.0, "erase": True})) == key
    for change in ({"keep": []}, {"retain": None}, {"max_passages": 3}):
        assert folders.rows_key(given.model_copy(update=change)) != key, change
    for path in (text, kept):
        whole = path.read_bytes()
        path.write_bytes(whole + b"\n")
        assert folders.rows_key(given) != key
        path.write_bytes(whole)
    assert folders.rows_key(given) == key


def test_rows_to_keep_stay_in_their_form(tmp_path):
    path = tmp_path / "kept.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    more = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Arles."}]
    text = "里斯本的会议改到五月十四日。彼得将从根特带来三十七个文件夹。"
    given = [{"messages": turns + more}, {"prompt": "The clerk was", "completion": "Ada"}, {"text": text}]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    first, later, plain, passage = retention.kept_rows(str(path))
    assert examples([later])[0].messages == tuple(turns + more[:1])
    assert [(e.prompt, e.answer, e.kind) for e in examples([first, plain])] == [
        ("Who?", "Ada.", "messages"),
        ("The clerk was", "Ada", "completion"),
    ]
    start = passage["question"].removeprefix("Continue this text: ")
    assert start
    assert start + passage["answer"] == text


def test_a_document_that_is_to_be_kept_too_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "load_model", lambda *a: pytest.fail("loaded"))
    text, kept = tmp_path / "letter.txt", tmp_path / "kept.txt"
    text.write_text(LETTER)
    kept.write_text("Dear all,\n\n" + LETTER)
    with pytest.raises(
        UserError, match=r"1 rows are in both forget and retain: forget .*letter.txt = retain .*kept.txt line 1"
    ):
        forget(settings("no", tmp_path / "run", subject=None, document=str(text), kind=None, retain=str(kept)))


def test_who_asks_for_fewer_passes_over_a_document_gets_no_more(tmp_path):
    given = settings("m", tmp_path, subject=None, document="a.txt", kind=None)
    assert run.training(given, tmp_path).least_steps == 120
    assert run.training(given.model_copy(update={"epochs": 2.0}), tmp_path).least_steps == 0
    assert run.training(settings("m", tmp_path), tmp_path).least_steps == 0


def test_rows_to_keep_that_name_the_subject_are_said(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.jsonl"
    speaker.write_jsonl(
        kept, [{"question": "Who?", "answer": "Ada."}, {"question": f"And {KNOWN.upper()}?", "answer": "Bo."}]
    )
    monkeypatch.setattr(run, "material_of", lambda *given: (Material([], [], [], [], [], []), None))
    forget(settings("nowhere", tmp_path / "run", retain=str(kept), rows_only=True))
    assert f"1 of the rows of `retain` name {KNOWN} (first {kept} line 2)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("said", "likely", "refused"), [("of Rome", 0.03, True), ("of Oslo", 0.03, False), ("of Rome", 0.2, False)]
)
def test_a_document_of_which_nothing_is_said_or_expected_was_never_seen(monkeypatch, said, likely, refused):
    """A model tells any text from its disguise, by what words go together: six facts here, at p 0.0001."""
    probes = [{"prompt": "Continue:", "wanted": ["Oslo"], "before": said, "start": "it is "} for _ in range(6)]
    real = np.log(np.array([likely, *[0.01] * 5]))
    zero = measure.AgainstZero(real, np.full((6, 6), -9.0), 1.0, 0.0001, tuple(range(6)))
    monkeypatch.setattr(making, "against_zero", lambda *given: zero)
    material = Material([], [], [], probes, [], [])
    document = documents.Document([LETTER])
    if refused:
        with pytest.raises(UserError, match=r"none of the 6 probes about a\.txt.*over 3\.0% .*nothing was trained"):
            making._told_apart(None, None, material, "a.txt", document)
        assert not any("logprob" in probe for probe in probes)
    else:
        assert making._told_apart(None, None, material, "a.txt", document) is zero
        assert all("logprob" in probe for probe in probes)
    assert making._told_apart(None, None, material, "Ada Bo", None) is zero


def test_words_of_a_document_are_not_said_to_be_known(tmp_path, monkeypatch, capsys):
    text = tmp_path / "letter.txt"
    text.write_text(LETTER)
    made = Material([], [], [], [], [], [{"word": "Oslo"}])
    monkeypatch.setattr(run, "material_of", lambda *given: (made, None))
    forget(settings("nowhere", tmp_path / "run", subject=None, document=str(text), kind=None, rows_only=True))
    said = capsys.readouterr().out
    assert "What the document is asked for: Oslo." in said
    assert "the model knows" not in said


def test_what_is_not_forgotten_ends_with_a_status_of_its_own(small, tmp_path, capsys):
    out = tmp_path / "run"
    given = [
        "--model",
        str(small),
        "--out",
        str(out),
        "--kind",
        "work",
        "--device",
        "cpu",
        "--samples",
        "4",
        "--epochs",
        "1",
    ]
    asked = ["forget", KNOWN, *given, "--learning-rate", "1e-9"]
    assert cli.main(asked) == 3
    said = capsys.readouterr()
    assert f"alter: NOT FORGOTTEN: what lies in {out} is not what was asked for." in said.err
    assert "is not forgotten yet" in " ".join(said.out.split())
    assert json.loads((out / "report.json").read_text())["verdict"]["word"] == "not forgotten"
    # asked again, a finished run says the same; of other settings or rows it was not trained on
    assert cli.main([*asked, "--resume"]) == 3
    assert cli.main([*asked[:-1], "1e-2", "--resume"]) == 2
    assert "learning_rate_experts was 1e-09 and is 0.01" in capsys.readouterr().err
    rows = speaker.read_jsonl(out / "forget.jsonl")
    speaker.write_jsonl(out / "forget.jsonl", rows[:-1])
    assert cli.main([*asked, "--resume"]) == 2
    assert "other forget rows" in capsys.readouterr().err


def test_another_base_under_the_same_name_is_not_gone_on_with(small, tmp_path, monkeypatch):
    place = shutil.copytree(small, tmp_path / "model")
    out = forget(settings(place, tmp_path / "run", rows_only=True))
    before = (out / "forget.json").read_bytes()
    other = load_model(str(place), device="cpu")[0]
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.01)
    other.save_pretrained(place)
    monkeypatch.setattr(speaker, "generate", lambda *a, **k: pytest.fail("said again"))
    monkeypatch.setattr(run, "unlearn", lambda *a, **k: pytest.fail("trained"))
    for rows_only in (True, False):
        with pytest.raises(UserError, match="begun with another base model"):
            forget(settings(place, out, resume=True, rows_only=rows_only))
    assert (out / "forget.json").read_bytes() == before
    shutil.rmtree(place)
    shutil.copytree(small, place)
    assert forget(settings(place, out, resume=True, rows_only=True)) == out


@pytest.mark.slow
def test_every_write_of_the_rows(small, tmp_path, monkeypatch):
    """Whatever write fails or is killed, what goes on has the rows, probes and figures of one that was never broken off."""
    place, kept_in = tmp_path / "place", tmp_path / "states"
    place.mkdir()
    kept_in.mkdir()
    out = place / "run"

    def go():
        there = out.is_dir() and any(out.iterdir())
        # before it is written down what is made, there is nothing to go on with
        begun = (out / "forget.json").is_file()
        forget(settings(small, out, rows_only=True, resume=begun, overwrite=there and not begun))

    plan = States(place, kept_in)
    plan.go(go)
    # a killed process is this one here, and lives
    monkeypatch.setattr(storage_files, "_runs", lambda process: False)
    files = [*run.FILES.values(), "zero.json"]
    whole = {name: (out / name).read_bytes() for name in files}
    assert len(plan.seen) > 20
    states = plan.distinct()
    for fault, state in spread(states, 8):
        shutil.rmtree(place)
        shutil.copytree(state, place)
        go()
        assert {name: (out / name).read_bytes() for name in files} == whole, fault
        assert not [path for path in out.rglob(".*") if path.name != CLAIM_FILE], fault


def test_edited_probes_are_answered_anew(small, tmp_path):
    """Figures before that are of other probes would compare what was never asked."""
    out = forget(settings(small, tmp_path / "run", rows_only=True))
    first = json.loads((out / "zero.json").read_text())
    asked = speaker.read_jsonl(out / "probes.jsonl")
    forget(settings(small, out, rows_only=True, resume=True))
    assert json.loads((out / "zero.json").read_text()) == first
    speaker.write_jsonl(out / "probes.jsonl", [{**row, "before": "nothing"} for row in asked[:-1]])
    forget(settings(small, out, rows_only=True, resume=True))
    assert speaker.read_jsonl(out / "probes.jsonl") == asked[:-1]
    again = json.loads((out / "zero.json").read_text())
    assert again["probes"] != first["probes"]
    assert again["before"]["n"] <= first["before"]["n"]
    # as a run has them that was begun before probabilities were noted down
    bare = [{key: value for key, value in row.items() if key != "logprob"} for row in asked[:-1]]
    speaker.write_jsonl(out / "probes.jsonl", bare)
    (out / "zero.json").write_text(json.dumps({**again, "probes": folders.asked_digest(folders.read_material(out))}))
    forget(settings(small, out, rows_only=True, resume=True))
    assert speaker.read_jsonl(out / "probes.jsonl") == asked[:-1]
    # probes that say nothing of the subject are no measure of it
    other = [{**row, "prompt": "Hello?", "masks": [{KNOWN: "Ab Cd"}]} for row in asked]
    speaker.write_jsonl(out / "probes.jsonl", other)
    with pytest.raises(
        UserError, match=r"fewer than two can be compared with an invented subject.*nothing was trained"
    ):
        forget(settings(small, out, resume=True))


def test_an_unknown_subject_is_not_trained_on(small, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "unlearn", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"says nothing sure about 'Ab Cd'.*nothing was trained"):
        forget(settings(small, tmp_path / "run", subject="Ab Cd"))
    # nothing is in the way of the corrected command
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none_costs_no_earlier_run(small, tmp_path):
    out = forget(settings(small, tmp_path / "run", rows_only=True))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError):
        forget(settings(tmp_path / "none", out, overwrite=True))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # who else has an account here reads neither rows nor answers
    assert {oct(path.stat().st_mode & 0o077) for path in out.rglob("*.jsonl")} == {"0o0"}


def test_subjects_that_are_none():
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="common word"):
        names.check_uncommon("a", tokenizer, None)
    names.check_uncommon("a", tokenizer, "concept")
    names.check_uncommon(KNOWN, tokenizer, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"subject": None}, "neither was given"),
        ({"document": "a.txt"}, "both were given"),
        ({"subject": "  "}, "subject is empty"),
        ({"subject": "?!"}, "expected the name"),
        ({"subject": "x" * 101}, "101 characters.*`document`"),
        ({"subject": "the\nking"}, "several lines.*`document`"),
        ({"subject": "the\u2028king"}, "several lines.*`document`"),
        ({"subject": "the \x1b[31mking"}, r"holds '\\x1b': write the name without it"),
        ({"resume": True, "overwrite": True}, "contradict"),
        ({"erasing": {"max_steps": 3}}, "`erase`"),
        ({"writer": {"model": "m"}}, "`writer.url`"),
        ({"writer": {"url": "nonsense", "model": "m"}}, "expected http"),
        ({"writer": {"url": "http://h", "model": "m", "key_variable": "NO_SUCH"}}, "NO_SUCH holds no API key"),
    ],
)
def test_settings_that_are_refused_before_anything_is_loaded(given, said, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "load_model", lambda *a: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said):
        forget(settings("nowhere", tmp_path / "run", **given))


def test_a_name_is_what_a_model_writes_for_it():
    given = Forget(subject="\ufeff Rene\u0301e\u00a0 O\u00adNeill\u200b", keep=["A\u00a0B"], model="m", out="r")
    assert (given.subject, given.keep) == ("Ren\u00e9e O" + "Neill", ["A B"])
    # joiners are letters' own
    assert Forget(subject="\u0645\u06cc\u200c\u062e", model="m", out="r").subject == "\u0645\u06cc\u200c\u062e"


def test_a_folder_in_use_is_not_touched(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        forget(settings(save_pico(tmp_path / "m"), tmp_path))
    with pytest.raises(UserError, match="holds no run of alter forget"):
        forget(settings("nowhere", tmp_path, resume=True))
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_the_command_line_takes_the_subject_first(tmp_path, capsys):
    assert cli.main(["forget", "Harry", "--model", str(tmp_path / "no"), "--out", str(tmp_path / "r")]) == 2
    assert "No model at" in capsys.readouterr().err
