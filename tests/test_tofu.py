"""TOFU end to end on a pico model, the published logs to the last digit, and everything that is refused."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model

import reference
from alter import AlterConfig, metrics
from alter.core.errors import UserError
from alter.data.encoding import encode, encode_prompt
from alter.data.rows import examples
from alter.evaluation.run import evaluate
from alter.evaluation.tofu import benchmark, logs, measuring, replies, sets
from alter.evaluation.tofu import reference as retrained_reference
from alter.rendering.terminal import table
from alter.storage import records
from pico import EOS, PAD, byte_tokenizer, write_jsonl
from pico import pico as make_pico
from test_scoring import by_hand

LOGS = Path(__file__).parent.parent / "data" / "tofu_logs"
FULL, RETAINED = LOGS / "llama2-7b_full.json", LOGS / "llama2-7b_retain90.json"


def pico(seed=0):
    """Room for TOFU's longest prompts, and otherwise as small as it gets."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return make_pico(seed, **sizes, max_position_embeddings=2048, initializer_range=0.5)


@pytest.fixture(autouse=True)
def _short_replies(monkeypatch):
    monkeypatch.setattr(replies, "MAX_NEW_TOKENS", 12)


def measure(model=None, tokenizer=None, **settings):
    settings = {"split": "forget01", "limit": 4, "progress": False} | settings
    return measuring.tofu_metrics(model or pico(), tokenizer or byte_tokenizer(), **settings)


def by_metric(found):
    return {record.metric: record for record in found}


# ---- one model, against a plain loop


@pytest.mark.parametrize("mode", ["strict", "compat"])
def test_every_figure_is_that_of_a_plain_loop(mode):
    model, tokenizer = pico(), byte_tokenizer(pad_token="<eos>" if mode == "compat" else "<pad>")
    compat, double = mode == "compat", copy.deepcopy(model).double()
    result = measure(model, tokenizer, mode=mode)
    found = by_metric(result.records("pico"))
    eps = 1e-10 if compat else 0.0
    nine = []
    for key in sets.SETS:
        part = result.sets[key]
        loss, right, wrong, correct, recall = [], [], [], [], []
        rows = sets.set_rows(key, "forget01", "builtin", 4, 0)
        for example in examples(rows):
            answers = [example.answer, example.row.get("paraphrased_answer"), *example.row["perturbed_answer"]]
            losses = []
            for answer in answers:
                if answer is None:
                    losses.append(losses[0])
                    continue
                row = encode(tokenizer, example, answer=answer, compat=compat)
                with torch.no_grad():
                    logits = double(input_ids=torch.tensor([row.input_ids])).logits[0]
                labels = torch.tensor(row.input_ids[row.prompt_length :])
                logits = logits[row.prompt_length - 1 : -1]
                losses.append(reference.naive_loss(logits.log_softmax(1)[range(len(labels)), labels].tolist()))
                if answer is example.answer:
                    correct.append((logits.argmax(1) == labels).tolist())
            loss.append(losses[0])
            right.append(losses[1])
            wrong.append(losses[2:])
            reply = by_hand(model, encode_prompt(tokenizer, example, compat=compat), 12, {EOS})
            text = tokenizer.decode(reply, skip_special_tokens=True).strip()
            recall.append(metrics.text.rouge_l([example.answer], [text]).recall[0])
        ratio = reference.naive_truth_ratio(right, wrong, eps)
        if key in ("forget", "retain"):
            probability = [math.exp(-x) for x in loss]
        else:
            probability = reference.naive_normalised(loss, wrong, eps)
        average = [min(x, 1 / (x + eps)) if key == "forget" else max(0, 1 - x) for x in ratio]
        expected = {"probability": probability, "truth_ratio": average, "rouge": recall}
        for name, values in expected.items():
            record = found[f"{key}_{name}"]
            assert record.value == pytest.approx(np.mean(values), rel=1e-3, abs=1e-7)
            assert record.n == part.n == 4
            assert record.mode == mode
            if key != "forget":
                nine.append(record.value)
        assert found[f"{key}_truth_ratio"].per_item == pytest.approx(ratio, rel=1e-3)
        if key == "forget":
            exact = np.mean([reference.naive_exact_memorization(row) for row in correct])
            strength = np.mean([reference.naive_extraction_strength(row, compat) for row in correct])
            assert found["forget_exact_memorization"].value == pytest.approx(exact)
            assert found["forget_extraction_strength"].value == pytest.approx(strength)
    expected = 0.0 if 0.0 in nine else 9 / sum(1 / x for x in nine)
    assert found["model_utility"].value == pytest.approx(expected)
    assert found["model_utility"].n == 12
    assert found["forget_distinct_2"].value == metrics.text.distinct_n(result.sets["forget"].generations, 2)
    assert found["forget_repetition"].n == 4


@pytest.mark.parametrize("mode", ["strict", "compat"])
def test_the_first_figure_is_of_questions_in_other_words(mode):
    model, tokenizer = pico(), byte_tokenizer(pad_token="<eos>" if mode == "compat" else "<pad>")
    result = measure(model, tokenizer, which=("likelihood",), mode=mode)
    first = result.records("x")[0]
    assert first.metric == "forget_probability_reworded"
    double = copy.deepcopy(model).double()
    expected = []
    for example in examples(sets.set_rows("forget", "forget01", "builtin", 4, 0)):
        asked = dataclasses.replace(example, prompt=example.row["paraphrased_question"])
        assert asked.prompt != example.prompt
        row = encode(tokenizer, asked, compat=mode == "compat")
        with torch.no_grad():
            logits = double(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        places = range(row.prompt_length, len(row.input_ids))
        expected.append(math.exp(np.mean([logits[t - 1, row.input_ids[t]].item() for t in places])))
    assert first.per_item == pytest.approx(expected, rel=1e-4)
    assert first.per_item != pytest.approx(by_metric(result.records("x"))["forget_probability"].per_item, rel=1e-4)


def test_rows_without_other_words_have_no_such_figure(monkeypatch):
    rows = sets.set_rows
    monkeypatch.setattr(
        measuring,
        "set_rows",
        lambda *a: [{**r, "paraphrased_question": None} if not i else r for i, r in enumerate(rows(*a))],
    )
    found = by_metric(measure(which=("likelihood",), sets=("forget",)).records("x"))
    assert "forget_probability_reworded" not in found
    assert "forget_probability" in found


def test_the_sets_are_tofus():
    sizes = {key: len(sets.set_rows(key, "forget10", "builtin", None, 0)) for key in sets.SETS}
    assert sizes == {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117}
    assert len(sets.set_rows("forget", "forget05", "builtin", None, 0)) == 200
    wrong = {key: len(sets.set_rows(key, "forget01", "builtin", 1, 0)[0]["perturbed_answer"]) for key in sets.SETS}
    assert wrong == {"forget": 5, "retain": 5, "real_authors": 3, "world_facts": 3}


def test_each_sequence_is_scored_once(monkeypatch):
    seen = []
    original = measuring.score

    def count(model, encoded, **settings):
        seen.extend(tuple(row.input_ids) for row in encoded)
        return original(model, encoded, **settings)

    monkeypatch.setattr(measuring, "score", count)
    measure(which=("likelihood",))
    # the forget set's answers to its questions and to these in other words
    assert len(seen) == 4 * (7 + 1 + 7 + 4 + 4)


def test_parts_on_their_own():
    likelihood = by_metric(measure(which=("likelihood",), sets=("forget",)).records("x"))
    assert set(likelihood) == {
        "forget_probability_reworded",
        "forget_probability",
        "forget_truth_ratio",
        "forget_exact_memorization",
        "forget_extraction_strength",
    }
    generation = by_metric(measure(which=("generation",), sets=("retain",)).records("x"))
    assert set(generation) == {"retain_rouge"}
    texts = generation["retain_rouge"].extra
    assert len(texts["questions"]) == len(texts["references"]) == len(texts["generations"]) == 4


def test_limit_draws_rows_by_seed():
    a, b, c = (measure(which=(), seed=seed) for seed in (0, 0, 1))
    assert a.sets["forget"].fingerprint == b.sets["forget"].fingerprint != c.sets["forget"].fingerprint
    assert "quick look at 4 rows" in a.notes[0]
    assert measure(which=(), limit=10_000).sets["forget"].n == 40


# ---- forget quality and its reference


def test_forget_quality_against_a_retrained_model(tmp_path):
    retrained = measure(pico(1), which=("likelihood",), limit=30)
    result = measure(pico(0), which=("likelihood",), limit=30, reference=retrained)
    record = by_metric(result.records("x"))["forget_quality"]
    expected = metrics.likelihood.forget_quality(
        result.sets["forget"].truth_ratio, retrained.sets["forget"].truth_ratio
    )
    assert (record.value, record.extra["log10"], record.extra["statistic"]) == dataclasses.astuple(expected)
    assert record.value < 1
    assert record.extra["n_reference"] == record.n == 30
    assert not any("retrained.json" in note for note in result.notes)
    # the same through a file, and through records
    path = tmp_path / "retrained.json"
    records.write_records(path, retrained.records("retrained"))
    for other in (retrained_reference.read_reference(str(path)), retrained.records("retrained")):
        again = measure(pico(0), which=("likelihood",), limit=30, reference=other)
        assert by_metric(again.records("x"))["forget_quality"].value == record.value
    same = measure(pico(1), which=("likelihood",), limit=30, reference=retrained_reference.read_reference(str(path)))
    assert by_metric(same.records("x"))["forget_quality"].value == 1.0


def test_without_a_reference_the_command_that_makes_one_is_said():
    result = measure(which=("likelihood",), mode="compat", limit=None, sets=("forget",))
    assert "forget_quality" not in by_metric(result.records("x"))
    assert (
        "`alter evaluate --model RETRAINED --benchmark tofu --split forget01 --mode compat --json retrained.json`"
        in result.notes[-1]
    )
    assert "`retain_records` retrained.json" in result.notes[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "forget05"}, "was evaluated on forget05, this run is on forget01"),
        ({"mode": "compat"}, "was evaluated in compat mode, this run is strict"),
        ({"limit": 5}, "has the truth ratios of 5 rows, this run has 4"),
        ({"seed": 1}, "was evaluated on other rows"),
    ],
)
def test_a_reference_of_something_else_is_refused(change, said):
    other = measure(which=("likelihood",), sets=("forget",), **change)
    with pytest.raises(UserError, match=said) as error:
        measure(which=("likelihood",), reference=other)
    assert "evaluate the retrained model again with `split` forget01 `mode` strict" in str(error.value)


def test_records_that_are_no_reference(tmp_path):
    retrained = measure(which=("likelihood",), sets=("forget",)).records("retrained")
    with pytest.raises(UserError, match=r"holds 0 records of forget_truth_ratio.*models there: retrained"):
        retrained_reference.reference_from_records(retrained[:1], "some.json")
    with pytest.raises(UserError, match="holds 2 records of forget_truth_ratio"):
        retrained_reference.reference_from_records([*retrained, *retrained], "some.json")
    records.write_records(tmp_path / "retrained.json", retrained)
    with pytest.raises(UserError, match=r"No file at .*retraned\.json.*Did you mean .*retrained\.json"):
        retrained_reference.read_reference(str(tmp_path / "retraned.json"))
    old = [dataclasses.replace(record, version=records.VERSION - 1) for record in retrained]
    records.write_records(tmp_path / "old.json", old)
    with pytest.raises(UserError, match="metrics of version"):
        retrained_reference.read_reference(str(tmp_path / "old.json"))
    with pytest.raises(UserError, match="has no truth ratios on the forget set"):
        measure(which=("generation",), sets=("retain",)).as_reference()


# ---- membership attacks


@pytest.fixture
def holdout(tmp_path):
    """Rows that nobody saw: a question of the forget set with a wrong answer."""
    rows = sets.set_rows("forget", "forget01", "builtin", None, 0)
    unseen = [{"question": row["question"], "answer": row["perturbed_answer"][1]} for row in rows]
    return str(write_jsonl(tmp_path / "unseen.jsonl", unseen))


def test_without_holdout_rows_the_attacks_are_left_out_and_said():
    result = measure(which=("likelihood",))
    assert not any(record.metric.startswith(("mia", "privleak")) for record in result.records("x"))
    assert any("holdout01" in note and "`holdout` rows.jsonl" in note for note in result.notes)


@pytest.mark.parametrize("mode", ["strict", "compat"])
def test_attacks_on_holdout_rows(holdout, mode):
    compat = mode == "compat"
    given = {"which": ("likelihood",), "limit": 10, "holdout": holdout, "mode": mode}
    retrained = measure(pico(1), **given)
    result = measure(**given, reference=retrained.records("retrained"), gradnorm=True)
    found = by_metric(result.records("x"))
    assert not result.notes[1:]
    forget, tokenizer = result.sets["forget"], byte_tokenizer()
    everything = {
        "forget": [{"question": r["question"], "answer": r["answer"]} for r in sets.set_rows("forget", "forget01", "builtin", 10, 0)],
        "holdout": sets._sample([json.loads(line) for line in open(holdout)], 10, 0),  # noqa: SIM115
    }  # fmt: skip
    expected = {}
    for key, rows in everything.items():
        encoded = [encode(tokenizer, e, compat=compat) for e in examples(rows)]
        scores, other = (
            measuring.score(model, encoded, pad_token_id=PAD, moments=True, compat=compat, progress=False)
            for model in (pico(0), pico(1))
        )
        norms = measuring.gradient_norms(pico(), encoded, pad_token_id=PAD, compat=compat, progress=False)
        loss = metrics.membership.mia_loss(scores.logprob, compat=compat)
        # strict encodings keep the space before the answer, which belongs to the prompt in compat
        texts = [row["answer"] if compat else f" {row['answer']}" for row in rows]
        expected[key] = {
            "mia_loss": loss,
            "mia_zlib": metrics.membership.mia_zlib(scores.logprob, texts, compat=compat),
            "mia_min_k": metrics.membership.mia_min_k(scores.logprob),
            "mia_min_k_plus_plus": metrics.membership.mia_min_k_plus_plus(scores.logprob, scores.mean, scores.var),
            "mia_gradnorm": [reference.naive_mean(row) for row in norms],
            "mia_reference": loss - metrics.membership.mia_loss(other.logprob, compat=compat),
        }
    for name in expected["forget"]:
        scores = found[name].extra["scores"]
        for key in everything:
            np.testing.assert_allclose(scores[key], expected[key][name], rtol=1e-3, atol=1e-5)
        assert found[name].value == reference.naive_auc(scores["forget"], scores["holdout"])
        assert found[name].n == 20
        assert found[name].higher_is_better is None
        assert found[name].extra["holdout"] == forget.holdout
    other = by_metric(retrained.records("retrained"))["mia_min_k"].value
    assert found["privleak"].value == metrics.membership.privleak(found["mia_min_k"].value, other, compat=compat)


def test_a_reference_of_other_holdout_rows_is_refused_and_a_lesser_one_is_said(holdout, tmp_path):
    given = {"which": ("likelihood",), "sets": ("forget",)}
    lines = open(holdout).read().splitlines()  # noqa: SIM115
    (tmp_path / "other.jsonl").write_text("\n".join(lines[5:]))
    other = measure(pico(1), **given, holdout=str(tmp_path / "other.jsonl")).records("retrained")
    with pytest.raises(UserError, match=r"other holdout rows.*the same `holdout`"):
        measure(**given, holdout=holdout, reference=other)
    without = measure(pico(1), **given).records("retrained")
    for mode, said in (("strict", "no privleak"), ("compat", "privleak takes 0.5")):
        reference = [dataclasses.replace(record, mode=mode) for record in without]
        result = measure(**given, holdout=holdout, reference=reference, mode=mode)
        found = by_metric(result.records("x"))
        assert "forget_quality" in found
        assert "mia_reference" not in found
        assert ("privleak" in found) == (mode == "compat")
        assert any(said in note and f"--holdout {holdout}" in note for note in result.notes)
        assert any("No mia_reference" in note for note in result.notes)
    result = measure(**given, holdout=holdout)
    assert any("No forget_quality, mia_reference, privleak" in note for note in result.notes)


@pytest.mark.parametrize(
    "form",
    [
        lambda asked, said: {"prompt": asked, "completion": said},
        lambda asked, said: {"instruction": asked, "output": said},
        lambda asked, said: {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]},
        lambda asked, said: {"question": asked, "answer": said},
    ],
)
def test_holdout_rows_of_any_form_are_told_from_others(form, tmp_path):
    """Those without TOFU's columns all had one fingerprint: a cached result answered for other rows."""
    found = []
    for text in ("one", "two"):
        path = write_jsonl(tmp_path / "unseen.jsonl", [form(f"Who is {text}?", f"It is {text}.")])
        settings = benchmark.TofuEvaluation(model="m", split="forget01", holdout=str(path), limit=4)
        measured = measure(which=("likelihood",), sets=("forget",), holdout=str(path))
        found.append((settings.data_digest(), measured.sets["forget"].holdout))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_other_paraphrased_questions_are_other_data(monkeypatch):
    """Its first figure is of them, and came from the cache after they had changed."""
    settings = benchmark.TofuEvaluation(model="m", split="forget01", limit=4)
    before, rows = settings.data_digest(), sets.set_rows
    changed = [{"paraphrased_question": "Who?"}, {}, {}, {}]
    monkeypatch.setattr(benchmark, "set_rows", lambda *a: [r | c for r, c in zip(rows(*a), changed, strict=True)])
    assert settings.data_digest() != before


def test_privleak_against_an_auc_of_one_is_refused_in_words(holdout):
    given = {"which": ("likelihood",), "sets": ("forget",), "holdout": holdout}
    perfect = dataclasses.replace(measure(pico(1), **given).as_reference(), min_k_auc=1.0)
    result = measure(**given, reference=perfect)
    assert "privleak" not in by_metric(result.records("x"))
    assert any("No privleak: the AUC of the retrained model is 1" in note for note in result.notes)


def test_holdout_rows_that_the_model_saw_are_refused(tmp_path):
    rows = sets.tofu_rows("forget01", "builtin")
    path = write_jsonl(tmp_path / "seen.jsonl", [{"question": "Who?", "answer": "Me."}, rows[3]])
    with pytest.raises(UserError, match=r"Row 1 of the holdout .*seen\.jsonl' is in the forget set"):
        measure(which=("likelihood",), holdout=str(path))
    with pytest.raises(UserError, match="is in the retain set"):
        measure(which=("likelihood",), holdout="builtin:retain90")
    with pytest.raises(UserError, match="No file or folder at"):
        measure(which=("likelihood",), holdout=str(tmp_path / "nothing.jsonl"))


# ---- bad input


def test_rows_too_long_for_the_context_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(measuring, "score", lambda *a, **k: pytest.fail("measured"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    short = make_pico(0, **sizes, max_position_embeddings=150)
    with pytest.raises(
        UserError, match=r"Row \d+ of the (forget|retain) set has \d+ tokens, the model's context is 150"
    ):
        measure(short)
    longer = make_pico(0, **sizes, max_position_embeddings=700)
    monkeypatch.setattr(replies, "MAX_NEW_TOKENS", 690)
    with pytest.raises(UserError, match=r"The question of row 0 of the forget set has \d+ tokens; with 690 new ones"):
        measure(longer)


def test_empty_replies_count_as_nothing_said_and_are_told(monkeypatch):
    monkeypatch.setattr(replies, "generate", lambda *a, **k: ["", "", "some words", ""])
    result = measure(which=("generation",), sets=("forget",))
    found = by_metric(result.records("x"))
    assert found["forget_rouge"].extra["empty"] == 3
    assert found["forget_rouge"].per_item[:2] == [0.0, 0.0]
    assert found["forget_repetition"].value == 0.0
    assert "3 of 4 replies on the forget set are empty: they count as ROUGE 0 and repetition 0." in result.notes


def test_a_tokenizer_without_a_pad_token_changes_no_number():
    given = {"limit": 3, "sets": ("forget",)}
    one, two = (measure(None, tokenizer, **given) for tokenizer in (byte_tokenizer(), byte_tokenizer(pad_token=None)))
    for a, b in zip(one.records("x"), two.records("x"), strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-6)


def test_broken_weights_are_refused(tmp_path):
    model = pico()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"up_proj\.weight holds NaN or infinite"):
        evaluate(benchmark.TofuEvaluation(model=str(tmp_path), split="forget01", limit=2, device="cpu"))
    with pytest.raises(UserError, match=r"logits are NaN"):
        measure(model, which=("likelihood",))


# ---- the command


def save(folder, seed=0):
    pico(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_evaluate_from_folders(tmp_path, capsys):
    settings = benchmark.TofuEvaluation(
        model=save(tmp_path / "model"), split="forget01", limit=3, device="cpu", name="before"
    )
    found = by_metric(evaluate(settings))
    assert "forget_quality" not in found
    assert "`retain_records` retrained.json" in capsys.readouterr().err
    assert {record.model for record in found.values()} == {"before"}
    retrained = save(tmp_path / "retrained", 1)
    from_folder = by_metric(evaluate(settings.model_copy(update={"retain_records": retrained})))
    path = str(tmp_path / "retrained.json")
    records.write_records(path, evaluate(settings.model_copy(update={"model": retrained})))
    from_file = by_metric(evaluate(settings.model_copy(update={"retain_records": path})))
    assert from_folder["forget_quality"].value == from_file["forget_quality"].value
    assert from_file["model_utility"].value == found["model_utility"].value


def test_settings_are_strict():
    for wrong in ({"splt": "forget10"}, {"split": "forget02"}, {"limit": 0}, {"mode": "loose"}):
        with pytest.raises(ValueError):
            benchmark.TofuEvaluation(model="m", **wrong)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split": "forget005"}, r"'forget005' is not one of .*Did you mean 'forget05'"),
        ({"which": ("likelihoods",)}, "Did you mean 'likelihood'"),
        ({"sets": ("forgot",)}, "Did you mean 'forget'"),
        ({"mode": "Strict"}, "Did you mean 'strict'"),
        ({"limit": 0}, "`limit` is 0"),
        ({"data": "/nowhere/tofu"}, "nowhere"),
    ],
)
def test_what_cannot_be_measured(settings, said):
    with pytest.raises(UserError, match=said):
        measure(**settings)


def test_rows_without_the_columns(tmp_path):
    row = {"question": "q?", "answer": "a", "perturbed_answer": ["b"]}
    (tmp_path / "forget01_perturbed.json").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"Row 0 of forget01_perturbed.*has no paraphrased_answer; it has question"):
        measure(data=str(tmp_path))
    rows = [row | {"paraphrased_answer": "c"}, row | {"paraphrased_answer": "c", "perturbed_answer": ["b", "d"]}]
    (tmp_path / "forget01_perturbed.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="with 1 and with 2 wrong answers"):
        measure(data=str(tmp_path))


# ---- published logs


def test_published_logs_to_the_last_digit():
    full = by_metric(logs.aggregate(str(FULL), str(RETAINED)))
    retained = by_metric(logs.aggregate(str(RETAINED), str(RETAINED)))
    assert full["model_utility"].value == pytest.approx(0.6226773637427152, abs=1e-9)
    assert retained["model_utility"].value == pytest.approx(0.613744995233942, abs=1e-9)
    assert full["forget_quality"].value == pytest.approx(1.834066410994743e-21, rel=1e-9)
    assert full["forget_quality"].extra["statistic"] == pytest.approx(0.396667, abs=5e-7)
    assert retained["forget_quality"].value == 1.0
    expected = {
        "retain": ((0.989527, 0.985655, 0.474699), (0.988897, 0.975811, 0.470977)),
        "real_authors": ((0.455482, 0.933000, 0.596229), (0.434087, 0.923000, 0.570681)),
        "world_facts": ((0.418562, 0.882479, 0.539033), (0.414326, 0.897436, 0.544198)),
        "forget": ((0.990939, 0.985450, 0.515985), (0.147563, 0.408244, 0.674019)),
    }
    for key, columns in expected.items():
        for found, values in zip((full, retained), columns, strict=True):
            measured = [found[f"{key}_{name}"].value for name in ("probability", "rouge", "truth_ratio")]
            assert measured == pytest.approx(values, abs=5.1e-7)
    assert full["forget_probability"].n == 300
    assert full["world_facts_rouge"].n == 117


def test_compat_differs_by_the_epsilon_alone():
    strict = by_metric(logs.aggregate(str(FULL), str(RETAINED)))
    compat = by_metric(logs.aggregate(str(FULL), str(RETAINED), mode="compat"))
    assert strict["model_utility"].value != compat["model_utility"].value
    assert strict["model_utility"].value == pytest.approx(compat["model_utility"].value, rel=1e-7)
    assert compat["model_utility"].mode == "compat"


def test_openunlearnings_file_serves_as_the_retrained_model(tmp_path):
    ratios = by_metric(logs.aggregate(str(RETAINED), mode="compat"))["forget_truth_ratio"].per_item
    # items out of order, as a JSON object may have them
    items = {str(i): {"score": ratio, "other": 1} for i, ratio in reversed(list(enumerate(ratios)))}
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps({"forget_truth_ratio": {"agg_value": 0.67, "value_by_index": items}}))
    found = by_metric(logs.aggregate(str(FULL), str(path)))
    assert found["forget_quality"].value == pytest.approx(1.834066410994743e-21, rel=1e-9)
    assert retrained_reference.read_reference(str(path)).truth_ratio.tolist() == ratios
    path.write_text(json.dumps({"forget_truth_ratio": {"agg_value": 0.67}}))
    with pytest.raises(UserError, match=r"no forget_truth_ratio\.value_by_index"):
        logs.aggregate(str(FULL), str(path))


def test_aggregate_without_the_retrained_log(capsys):
    found = by_metric(logs.aggregate(str(FULL)))
    assert "forget_quality" not in found
    assert "--retain LOG.json" in capsys.readouterr().err
    assert found["model_utility"].model == "llama2-7b_full"
    assert logs.aggregate(str(FULL), str(RETAINED), name="mine")[0].model == "mine"
    assert logs.Aggregate(log="x").mode == "strict"


def test_logs_that_are_not_logs(tmp_path):
    path = tmp_path / "log.json"

    def run(content, said, retain=None):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=said):
            logs.aggregate(*((str(FULL), str(path)) if retain else (str(path),)))

    log = json.loads(FULL.read_text())
    run("no json", "is not a JSON file")
    run([], "holds a JSON list")
    run({"a": 1}, "has no 'eval_log_forget.json'; it has 'a'")
    part = log["eval_log.json"]
    run(log | {"eval_log.json": {k: v for k, v in part.items() if k != "rougeL_recall"}}, "has no rougeL_recall")
    fewer = {k: v for k, v in part["rougeL_recall"].items() if k != "7"}
    run(log | {"eval_log.json": part | {"rougeL_recall": fewer}}, "300 items of avg_gt_loss but 299 of rougeL_recall")
    text = part["rougeL_recall"] | {"7": "x"}
    run(log | {"eval_log.json": part | {"rougeL_recall": text}}, "something other than numbers")
    forget = {k: dict(list(v.items())[:-1]) for k, v in log["eval_log_forget.json"].items()}
    run(log | {"eval_log_forget.json": forget}, "has 300 forget items but .* has 299", retain=True)
    with pytest.raises(UserError, match=r"No file at .*ful\.json.*Did you mean .*full\.json"):
        logs.aggregate(str(LOGS / "llama2-7b_ful.json"))


# ---- the table


def test_the_table_shows_models_side_by_side():
    from rich.console import Console

    before, after = logs.aggregate(str(FULL), str(RETAINED)), logs.aggregate(str(RETAINED), str(RETAINED))
    extra = records.Record("after", "seconds", None, 1)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table({"before": before, "after": [*after[:-1], extra]}, title="TOFU forget10"))
    text = console.export_text()
    assert "TOFU forget10" in text
    lines = {line.split()[1]: line for line in text.splitlines() if line.count("│") > 3}
    assert "1.83e-21" in lines["forget_quality"]
    assert "↑" in lines["forget_quality"]
    assert "↓" in lines["forget_rouge"]
    assert "0.623" in lines["model_utility"]
    assert lines["model_utility"].split("│")[3].strip() == "-"
    assert list(lines)[-1] == "seconds"
    assert set(metrics.CATALOGUE) >= {record.metric for record in before}


def test_replies_are_those_without_what_scoring_tells_of_them(monkeypatch):
    """A model that knows some answers in part and one whole, so that its replies begin with them."""
    model = pico(3)
    torch.manual_seed(0)
    rows = [row for key in sets.SETS for row in examples(sets.set_rows(key, "forget01", "builtin", 4, 0))]
    tokenizer = byte_tokenizer()
    known = [encode(tokenizer, row) for row in rows]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        for row in known[::5]:
            ids, labels = (
                torch.tensor([row.input_ids[: row.prompt_length + 4]]),
                torch.tensor([row.labels[: row.prompt_length + 4]]),
            )
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    seen = []
    generate = replies.generate
    monkeypatch.setattr(
        replies, "generate", lambda *args, **given: seen.append(given["begun"]) or generate(*args, **given)
    )
    found = measure(model.eval())
    assert any(len(tokens) > 1 for tokens in seen[0])
    monkeypatch.setattr(measuring, "begun_replies", lambda *_: None)
    plain = measure(model)
    assert seen[1] is None
    for key in sets.SETS:
        assert found.sets[key].generations == plain.sets[key].generations
    assert [(r.metric, r.value) for r in found.records("m")] == [(r.metric, r.value) for r in plain.records("m")]


def test_a_model_and_its_base_are_measured_as_one_after_the_other():
    torch.manual_seed(0)
    model = get_peft_model(pico(3), AlterConfig(num_forget_experts=2, init_weights=False)).eval()
    base, found = measuring.tofu_metrics_beside_base(
        model, byte_tokenizer(), split="forget01", limit=4, progress=False, reference=measure()
    )
    with model.disable_adapter():
        expected_base = measure(model, reference=measure())
    for one, other in ((base, expected_base), (found, measure(model, reference=measure()))):
        for key in sets.SETS:
            assert one.sets[key].generations == other.sets[key].generations
        assert one.notes == other.notes
        for record, expected in zip(one.records("m"), other.records("m"), strict=True):
            assert record.metric == expected.metric
            np.testing.assert_allclose(record.value, expected.value, rtol=1e-5)
    assert base.sets["forget"].generations != found.sets["forget"].generations
