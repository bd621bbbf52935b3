"""Answers judged by facts: KFR and KRR against a plain loop, refusals, IAM against its definition, and in `rows`."""

import math

import numpy as np
import pytest
import torch

from alter import metrics
from alter.core.errors import UserError
from alter.data.tofu import refusals, tofu_rows
from alter.evaluation import knowledge
from alter.evaluation.knowledge import Contradictions, rates
from alter.evaluation.rows import RowsEvaluation
from alter.evaluation.run import evaluate
from pico import byte_tokenizer, save_pico, write_jsonl
from test_leakage import classifier

ASKED = "Where does Ada live?"
TRUTH = "She lives in Perm, Omsk, Riga, Kiel and Bonn."


@pytest.mark.parametrize(
    ("reply", "forgotten", "retained"),
    [
        ("She lives in Perm, Omsk, Riga and so on.", 0, 1),
        ("In Perm and Omsk.", 0, 1),
        ("In Perm.", 1, 0),
        ("", 1, 0),
    ],
)
def test_five_facts_are_forgotten_up_to_and_retained_from_three_in_ten(reply, forgotten, retained):
    assert rates([ASKED], [TRUTH], [reply], forget=True) == [forgotten]
    assert rates([ASKED], [TRUTH], [reply], forget=False) == [retained]


def test_of_few_facts_half_may_be_said():
    two = "She lives in Perm and Omsk."
    assert rates([ASKED] * 2, [two] * 2, ["In Perm.", "In Perm and Omsk."], forget=True).tolist() == [1, 0]
    assert rates([ASKED] * 2, [two] * 2, ["In Perm.", "Nowhere."], forget=False).tolist() == [1, 0]


def test_an_answer_that_its_question_says_is_left_out():
    assert np.isnan(rates(["Does Ada live in Perm?"], ["Ada does live in Perm"], ["Yes"], forget=True)).all()


def test_a_contradiction_is_forgotten_and_not_retained_and_its_direction_is_the_authors():
    asked = []

    class Judge:
        def of(self, pairs):
            asked.extend(pairs)
            return [True] * len(pairs)

    reply = "Perm, Omsk, Riga, Kiel, Bonn."
    assert rates([ASKED], [TRUTH], [reply], forget=True, contradictions=Judge()) == [1]
    assert rates([ASKED], [TRUTH], [reply], forget=False, contradictions=Judge()) == [0]
    assert asked == [(reply, TRUTH), (TRUTH, reply)]


def test_contradiction_is_the_likeliest_label(tmp_path):
    judge = Contradictions(classifier(tmp_path, ["entailment", "neutral", "CONTRADICTION"]))
    pairs = [(f"text {i}", f"{i * 7} other") for i in range(12)]
    found = judge.of(pairs)
    plain = []
    for premise, hypothesis in pairs:
        batch = judge._tokenizer(premise, hypothesis, return_tensors="pt")
        with torch.no_grad():
            plain.append(int(judge._classifier(**batch).logits.argmax()) == 2)
    assert found == plain
    assert 0 < sum(found) < 12


def test_a_classifier_without_a_label_for_contradiction_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no label for contradict.*entailment, neutral"):
        Contradictions(classifier(tmp_path, ["entailment", "neutral"]))


def test_refusals_are_told_from_answers():
    assert all(knowledge.refuses(text) for text in refusals())
    answers = [row["answer"] for row in tofu_rows("full", "builtin")]
    assert sum(map(knowledge.refuses, answers)) <= 1
    assert knowledge.refuses("  ")
    assert not knowledge.refuses("I was born in Perm, as an Airman's son.")
    assert knowledge.over_refusal(["I can't say.", "In Perm."]).tolist() == [1, 0]
    with pytest.raises(UserError, match="no harmless questions"):
        knowledge.over_refusal([])


# ---- IAM


def naive_iam(own, known, out, points):
    """By the definition, one number after the other."""

    def signal(p):
        return -math.log(0.1 - math.log(1e-5 + p)) if 1e-5 + p < 1 else -math.log(0.1)

    def moments(values):
        mean = math.fsum(values) / len(values)
        return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))

    alphas = [k / (points - 1) for k in range(points)]
    found = []
    for i, p in enumerate(own):
        total = 0.0
        for a in alphas:
            grid = [[(1 - a) * signal(row[j]) + a * signal(known[j]) for j in range(len(own))] for row in out]
            means = [math.fsum(row[j] for row in grid) / len(grid) for j in range(len(own))]
            floor = moments(means)[1] * 1e-3
            spread = moments([row[i] for row in grid])[1] if len(out) > 1 else moments(grid[0])[1]
            width = math.sqrt(6) * max(spread, floor) / math.pi
            z = (signal(p) - (means[i] - 0.5772156649015329 * width)) / width
            total += a * (math.exp(-math.exp(-z)) if z > -700 else 0.0)
        found.append(1 - total / math.fsum(alphas))
    return found


@pytest.mark.parametrize("models", [1, 3])
def test_iam_is_its_naive_twin(models):
    rng = np.random.default_rng(models)
    known, out = 0.8 + 0.2 * rng.random(5), 0.2 * rng.random((models, 5))
    own = rng.random(5)
    expected = naive_iam(own.tolist(), known.tolist(), out.tolist(), 50)
    found = metrics.completeness.unlearning_completeness(own, known, out if models > 1 else out[0], points=50)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_iam_is_high_for_the_retrained_model_low_for_the_original_and_between_for_one_between():
    rng = np.random.default_rng(0)
    known, out = 0.8 + 0.2 * rng.random(40), 0.05 + 0.1 * rng.random(40)
    at = [metrics.completeness.unlearning_completeness(p, known, out).mean() for p in (out, (known + out) / 2, known)]
    assert at[0] > 0.9
    assert at[2] < 0.5
    assert at[0] > at[1] > at[2]


def test_iam_refuses_rows_without_spread():
    with pytest.raises(ValueError, match="no spread"):
        metrics.completeness.unlearning_completeness([0.5], [0.9], [0.1])
    with pytest.raises(ValueError, match="shadow models"):
        metrics.completeness.unlearning_completeness([0.5, 0.4], [0.9, 0.8], [0.1])


# ---- in the benchmark of own rows


def test_rows_gives_rates_refusals_and_iam(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ALTER_CACHE", "off")
    for name, seed in (("after", 0), ("before", 1), ("retrained", 2)):
        save_pico(tmp_path / name, seed=seed)
    write_jsonl(tmp_path / "f.jsonl", [{"question": f"Who is {i}?", "answer": f"Ada {i} of Perm"} for i in range(4)])
    write_jsonl(
        tmp_path / "r.jsonl", [{"question": f"What is {i}?", "answer": f"Number {i} in Omsk"} for i in range(4)]
    )
    write_jsonl(tmp_path / "h.jsonl", [{"question": "Is it warm?", "answer": "Yes"}])
    nli = classifier(tmp_path / "nli", ["entailment", "neutral", "contradiction"])
    given = {
        "model": str(tmp_path / "after"), "before": str(tmp_path / "before"), "retrained": str(tmp_path / "retrained"),
        "forget": str(tmp_path / "f.jsonl"), "retain": str(tmp_path / "r.jsonl"), "rates": True, "nli": nli,
        "harmless": str(tmp_path / "h.jsonl"), "max_new_tokens": 8, "device": "cpu",
    }  # fmt: skip
    found = evaluate(RowsEvaluation(**given))
    judged = {(r.model, r.metric): r for r in found if r.metric in ("kfr", "krr", "sarr", "iam")}
    assert set(judged) == {
        *((model, metric) for model in ("original", "unlearned") for metric in ("kfr", "krr", "sarr")),
        ("unlearned", "iam"),
    }
    assert judged["unlearned", "kfr"].n == 4
    assert judged["unlearned", "sarr"].n == 1
    probability = {r.model: r.per_item for r in found if r.metric == "forget_probability"}
    expected = metrics.completeness.unlearning_completeness(
        probability["unlearned"], probability["original"], probability["retrained"]
    )
    assert judged["unlearned", "iam"].per_item == pytest.approx(expected.tolist())
    low, high = judged["original", "kfr"].extra["interval"]
    assert 0 <= low <= judged["original", "kfr"].value <= high <= 1
    shown = capsys.readouterr().out
    assert "Answers judged by facts" in shown
    assert "IAM" in shown
    assert not any(r.metric.startswith("harmless") for r in found)
    # a single row has no spread: the rest of what took all the time is not lost
    write_jsonl(tmp_path / "one.jsonl", [{"question": "Who is 1?", "answer": "Ada 1 of Perm"}])
    few = {r.metric for r in evaluate(RowsEvaluation(**{**given, "forget": str(tmp_path / "one.jsonl"), "nli": None}))}
    assert {"kfr", "krr", "sarr"} <= few
    assert "iam" not in few
    assert "No IAM: the signals of the models between have no spread (a single row" in capsys.readouterr().err
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["Perm"])
    tokenizer.save_pretrained(tmp_path / "retrained")
    with pytest.raises(UserError, match=r"another tokenizer or chat template .*f.jsonl line 1"):
        evaluate(RowsEvaluation(**given))
    write_jsonl(tmp_path / "t.jsonl", [{"text": "It is warm."}])
    with pytest.raises(UserError, match="plain text"):
        evaluate(RowsEvaluation(**given | {"harmless": str(tmp_path / "t.jsonl")}))
