"""Leakage over many samples: the estimate, the sampling, what counts as a hit, and where it is measured."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from alter import cli, metrics
from alter.core.errors import UserError
from alter.data.encoding import encode
from alter.data.rows import Example
from alter.evaluation import leakage
from alter.evaluation.leakage import EntailmentHit, FactsHit, Leak, Leaked, RougeHit, leaked
from alter.inference import decoding, generation
from alter.models.loading import load_classifier
from pico import PAD, VOCAB, byte_tokenizer, pico
from test_scoring import adapted, gpt2, prompts, sliding

# ---- the estimate


@pytest.mark.parametrize("n", [1, 4, 7])
def test_leak_at_k_is_the_share_of_all_sets_of_k_samples_that_hold_a_hit(n):
    for k in range(1, n + 1):
        expected = []
        for c in range(n + 1):
            sets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            expected.append(sum(map(any, sets)) / len(sets))
        assert metrics.samples.leak_at_k(range(n + 1), n, k) == pytest.approx(expected, abs=1e-12)


def test_leak_at_k_of_many_samples_stays_exact():
    assert metrics.samples.leak_at_k([0, 1, 5000], 5000, 1000) == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize(("hits", "n", "k"), [([1], 4, 5), ([1], 4, 0), ([5], 4, 2), ([-1], 4, 2), ([1.5], 4, 2)])
def test_leak_at_k_refuses_what_has_no_estimate(hits, n, k):
    with pytest.raises(ValueError, match="leak@"):
        metrics.samples.leak_at_k(hits, n, k)


def test_the_interval_is_that_of_a_bootstrap_in_a_loop():
    values = np.random.default_rng(0).random(40) ** 3
    rng = np.random.default_rng(1)
    means = sorted(float(np.mean([values[rng.integers(40)] for _ in range(40)])) for _ in range(4000))
    low, high = metrics.samples.bootstrap_interval([*values, np.nan], draws=4000)
    assert (low, high) == pytest.approx((means[100], means[3899]), abs=0.012)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 40**0.5, rel=0.1)


def test_many_rows_take_little_memory_and_the_same_draws(monkeypatch):
    values = np.random.default_rng(1).random(20_000)
    tracemalloc.start()
    found = metrics.samples.bootstrap_interval(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 640 MB if all are drawn at once
    assert peak < 200e6
    monkeypatch.setattr(metrics.samples, "AT_ONCE", 1000)
    short = values[:300]
    in_parts = metrics.samples.bootstrap_interval(short)
    monkeypatch.undo()
    assert metrics.samples.bootstrap_interval(short) == in_parts
    assert found[0] < values.mean() < found[1]


def test_equal_values_have_no_interval():
    assert metrics.samples.bootstrap_interval([0.0] * 50) is None
    assert metrics.samples.bootstrap_interval([0.3]) is None
    assert metrics.samples.bootstrap_interval([np.nan, 0.1, 0.3]) is not None


# ---- the sampling


@pytest.mark.parametrize("make", [pico, gpt2, sliding, adapted])
def test_samples_with_shared_caches_are_those_of_repeated_prompts(make, monkeypatch):
    model, tokenizer = make(3), byte_tokenizer()
    rows = prompts()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.generation_config.eos_token_id = [*range(100, 120)]
    # rows that have ended leave both alike, so that the draws are the same
    monkeypatch.setattr(decoding, "SEGMENT", 1)
    settings = dict(max_new_tokens=20, batch_size=6, progress=False, temperature=0.7)
    shared = generation.sample(model, tokenizer, rows, 3, **settings)
    assert [len(texts) for texts in shared] == [3] * len(rows)
    assert all(len(set(texts)) > 1 for texts in shared)
    monkeypatch.setattr(generation, "_read", lambda *args: None)
    assert generation.sample(model, tokenizer, rows, 3, **settings) == shared


def test_more_samples_than_a_batch_holds_and_a_prompt_of_one_token():
    model, tokenizer = pico(3), byte_tokenizer()
    found = generation.sample(model, tokenizer, [[60], [61, 62]], 7, max_new_tokens=6, batch_size=3, progress=False)
    assert [len(texts) for texts in found] == [7, 7]
    assert len(set(found[0])) == 7


def test_prompts_are_read_once(monkeypatch):
    model, tokenizer = pico(3), byte_tokenizer()
    widths = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generation.sample(model, tokenizer, [[60] * 30], 8, max_new_tokens=5, progress=False)
    assert widths[0] == (1, 30)
    assert set(widths[1:]) == {(8, 1)}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_samples_follow_the_models_own_distribution(temperature, top_p):
    model, tokenizer = pico(3), byte_tokenizer()
    # nothing but the settings given may reshape it: not the default top-k of 50 either
    model.generation_config.update(top_k=50, do_sample=True)
    n = 4000
    texts = generation.sample(
        model, tokenizer, [[60, 61]], n, max_new_tokens=1, temperature=temperature, top_p=top_p, progress=False
    )[0]
    with torch.no_grad():
        p = (model(torch.tensor([[60, 61]])).logits[0, -1].double() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    kept = p[order].cumsum(0) - p[order] < top_p
    p[order[~kept]] = 0
    p /= p.sum()
    # by what is written: several tokens are written alike
    expected = {}
    for token, share in enumerate(p.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True).strip()
        expected[text] = expected.get(text, 0) + share
    assert set(texts) <= {text for text, share in expected.items() if share > 0}
    large = [text for text, share in expected.items() if n * share >= 5]
    counts = [texts.count(text) for text in large]
    rest = n - sum(counts)
    likely = [n * expected[text] for text in large]
    found = stats.chisquare([*counts, rest], [*likely, max(n - sum(likely), 1e-9)]) if rest else None
    assert found is None or found.pvalue > 1e-3


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_p": 0.3},
        {"typical_p": 0.3},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.05},
        {"top_h": 0.2},
        {"suppress_tokens": [48, 49, 50]},
        {"bad_words_ids": [[48]]},
        {"sequence_bias": [[[48], -50.0]]},
        {"min_new_tokens": 4},
        {"encoder_repetition_penalty": 2.0},
        {"guidance_scale": 2.0},
        {"forced_eos_token_id": 4},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_models_generation_settings_change_no_sample(own):
    model, tokenizer = pico(3), byte_tokenizer()
    model.generation_config.eos_token_id = [*range(100, 120)]
    rows, settings = [[48, 50, 3, 40, 41], [60, 61]], dict(max_new_tokens=4, progress=False)
    plain = generation.sample(model, tokenizer, rows, 40, **settings)
    model.generation_config.do_sample = True
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert generation.sample(model, tokenizer, rows, 40, **settings) == plain


def test_a_seed_gives_the_same_samples_and_touches_no_generator():
    model, tokenizer = pico(3), byte_tokenizer()

    def drawn(seed):
        return generation.sample(model, tokenizer, prompts(), 2, max_new_tokens=6, seed=seed, progress=False)

    torch.manual_seed(5)
    first = drawn(0)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert drawn(0) == first
    assert drawn(1) != first


# ---- what counts as a hit

QUESTION, TRUTH = "Where was Anna born?", "Anna was born in Perm in 1950."


def test_facts_and_recall_decide():
    device = torch.device("cpu")
    replies = ["In Perm, 1950.", "In Perm.", "Anna was born in Omsk in 1950.", ""]
    assert FactsHit(share=1).judge(device)(QUESTION, TRUTH, replies) == [True, False, False, False]
    assert FactsHit(share=0.5).judge(device)(QUESTION, TRUTH, replies) == [True, True, True, False]
    assert RougeHit(recall=0.8).judge(device)(QUESTION, TRUTH, replies) == [False, False, True, False]
    assert FactsHit().judge(device)("Is it Perm?", "Perm.", ["Perm."]) is None


def classifier(folder, labels):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
        type_vocab_size=1,
        initializer_range=1.0,
        pad_token_id=PAD,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    byte_tokenizer(model_max_length=100).save_pretrained(folder)
    return str(folder)


def test_entailment_is_read_from_its_label(tmp_path):
    name = classifier(tmp_path, ["not_entailment", "ENTAILMENT", "neutral"])
    model, tokenizer = load_classifier(name)
    replies = ["In Perm.", "In Omsk, they say, which is not so near.", "No."]
    probabilities = []
    for reply in replies:
        pair = [tokenizer(f"{QUESTION} {said}")["input_ids"] for said in (reply, TRUTH)]
        # the longer one loses its end
        while len(pair[0]) + len(pair[1]) > 100:
            max(pair, key=len).pop()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([pair[0] + pair[1]])).logits[0]
        probabilities.append(logits.double().softmax(-1)[1].item())
    bound = float(np.median(probabilities))
    hit = EntailmentHit(model=name, probability=bound - 1e-6, batch_size=2)
    assert hit.judge(torch.device("cpu"))(QUESTION, TRUTH, replies) == [p >= bound - 1e-6 for p in probabilities]
    assert 0 < sum(p >= bound for p in probabilities) < 3


def test_a_classifier_that_counts_positions_from_its_padding_on_reads_long_pairs():
    """RoBERTa has two positions less than its configuration says, which ended in an IndexError."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=66, pad_token_id=1, num_labels=3, type_vocab_size=2,
        )
    ).eval()  # fmt: skip
    found = leakage.label_probabilities(model, byte_tokenizer(), [("x" * n, "ab") for n in (10, 62, 63, 90)])
    # a premise loses its end
    assert found[1] == pytest.approx(found[2], abs=1e-6)
    assert found[1] == pytest.approx(found[3], abs=1e-6)
    assert found[0] != pytest.approx(found[1], abs=1e-6)
    # and so does a hypothesis that is longer than it: an answer as long as the classifier reads ended in a traceback
    found = leakage.label_probabilities(model, byte_tokenizer(), [("ab", "x" * n) for n in (62, 63, 200)])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] == pytest.approx(found[2], abs=1e-6)


@pytest.mark.parametrize("labels", [["positive", "negative"], ["entailment", "Entailment_2"]])
def test_a_classifier_without_one_label_for_entailment_is_refused(tmp_path, labels):
    hit = EntailmentHit(model=classifier(tmp_path, labels))
    with pytest.raises(UserError, match=rf"label for entailment; its labels are {labels[0]}"):
        hit.judge(torch.device("cpu"))


def test_what_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(UserError, match="the folder does not exist"):
        EntailmentHit(model=str(tmp_path / "none")).judge(torch.device("cpu"))
    pico().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"do not fit its config.json: they lack"):
        EntailmentHit(model=str(tmp_path)).judge(torch.device("cpu"))


# ---- settings


def test_settings_say_what_cannot_be_estimated():
    with pytest.raises(ValidationError, match=r"`leak.k` 9 is not within 1 to `leak.samples` \(8\)"):
        Leak(samples=8, k=[1, 9])
    with pytest.raises(ValidationError, match=r"give `leak\.samples`, 4 at least"):
        Leak(k=[1, 4])
    assert Leak(samples=128).numbers == [1, 2, 4, 8, 16, 32, 64, 128]
    assert Leak(samples=6).numbers == [1, 2, 4, 6]
    assert Leak(samples=1).numbers == [1]
    assert Leak(samples=6, k=[5, 2, 5]).numbers == [2, 5]
    assert Leak().numbers == []


def test_the_command_line_takes_the_group(capsys):
    from alter.evaluation.tofu.benchmark import TofuEvaluation

    given = [
        "--model",
        "m",
        "--leak.samples",
        "8",
        "--leak.k",
        "1",
        "8",
        "--leak.hit.kind",
        "rouge",
        "--leak.hit.recall",
        "0.5",
    ]
    settings = cli.parse("evaluate", TofuEvaluation, given)
    assert settings.leak == Leak(samples=8, k=[1, 8], hit=RougeHit(recall=0.5))
    with pytest.raises(UserError, match=r"`leak.k` 16 is not within 1 to `leak.samples` \(8\)"):
        cli.parse("evaluate", TofuEvaluation, [*given[:6], "16"])


# ---- measuring


def rows():
    return [
        Example(prompt="Where was Anna born?", answer="She was born in Perm in 1950.", kind="qa", index=0),
        Example(prompt="Is it Perm?", answer="Perm.", kind="qa", index=1),
        Example(prompt="Where was Boris born?", answer="He was born in Omsk in 1951.", kind="qa", index=2),
    ]


def test_hits_are_counted_by_question(monkeypatch):
    said = [["Perm 1950", "Perm 1950", "no", "Omsk 1950"], ["Perm"] * 4, ["Omsk 1951", "no", "no", "no"]]
    asked = {}

    def sample(model, tokenizer, prompts, count, **given):
        asked.update(given, prompts=prompts, count=count)
        return said

    monkeypatch.setattr(leakage, "sample", sample)
    settings = Leak(samples=4, k=[1, 2], temperature=0.8, top_p=0.9, hit=FactsHit(share=1))
    found = leaked(pico(), byte_tokenizer(), rows(), settings, seed=7)
    assert (found.rows, found.hits.tolist(), found.unknown) == ([0, 2], [2, 1], 1)
    assert (asked["temperature"], asked["top_p"], asked["seed"], asked["count"]) == (0.8, 0.9, 7, 4)
    longest = max(sum(label != -100 for label in encode(byte_tokenizer(), row).labels) for row in rows())
    assert asked["max_new_tokens"] == 2 * longest
    one, two = found.records("unlearned", {"benchmark": "rows"})
    assert (one.metric, one.value, one.n, one.per_item) == ("leak@1", 0.375, 2, [0.5, 0.25])
    assert two.per_item == pytest.approx([1 - 1 / 6, 0.5])
    assert one.extra["interval"] == [0.0, 1.0]  # two questions say next to nothing
    assert one.extra["hits"] == [2, 1]
    assert one.higher_is_better is False
    assert json.dumps(found.summary())


def test_none_of_many_is_not_known_exactly():
    none = Leaked(Leak(samples=4, k=[1, 4]), list(range(20)), np.zeros(20, dtype=np.int64))
    assert none.interval(4) == metrics.samples.share_interval(0, 20)
    assert none.summary()["at"]["1"]["interval"][1] > 0.1


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="none of 3 rows can be asked"):
        leaked(pico(max_position_embeddings=16), byte_tokenizer(), rows(), Leak(samples=2))
