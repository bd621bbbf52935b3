"""Rows that begin alike are scored with each shared token once, at the numbers of one row at a time."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from alter.adapter import alter_of
from alter.data.encoding import Encoded
from alter.inference import passes, scoring, sharing
from pico import PAD, VOCAB, pico
from test_adapter import adapted, tiny
from test_adapter_one_pass import own_gates
from test_scoring import check, naive


def answers(seed=0, questions=5, each=4, high=256):
    """Random questions, each with answers that are equal for a while, one of them given twice and one a single token."""
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(questions):
        prompt = draw.integers(0, high, int(draw.integers(1, 12))).tolist()
        stem = draw.integers(0, high, 9).tolist()
        for k in range(each):
            own = (
                stem[: int(draw.integers(0, 9))]
                + draw.integers(0, high, 1 if k == 0 else int(draw.integers(1, 11))).tolist()
            )
            out.append(Encoded(prompt + own, [-100] * len(prompt) + own, len(prompt)))
        out.append(out[-1])
    return [out[i] for i in draw.permutation(len(out))]


def shapes_seen(model):
    """Shapes of the tokens that the model is called with."""
    seen = []
    inner = passes.inner_model(model)
    handle = inner.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen, handle


def both(model, data, **settings):
    """Scores with and without sharing, and the number of tokens computed with it."""
    settings = {"pad_token_id": PAD, "moments": True, "progress": False} | settings
    plain = scoring.score(model, data, around=lambda *_: scoring.nullcontext(), **settings)
    seen, handle = shapes_seen(model)
    shared = scoring.score(model, data, **settings)
    handle.remove()
    return plain, shared, seen


def equal(one, other, tolerance=2e-5):
    for a, b in zip(one.logprob, other.logprob, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)
    for a, b in zip(one.var, other.var, strict=True):
        np.testing.assert_allclose(a, b, atol=10 * tolerance)
    assert [a.tolist() for a in one.correct] == [b.tolist() for b in other.correct]


@pytest.mark.parametrize("batch_tokens", [1, 20, 70, None])
def test_shared_tokens_are_computed_once_at_the_scores_of_one_row_at_a_time(batch_tokens):
    model, data = pico(), answers()
    plain, shared, seen = both(model, data, batch_tokens=batch_tokens)
    check(shared, [naive(model, row) for row in data])
    equal(plain, shared)
    # the first two passes try the model
    assert all(rows == 1 for rows, _ in seen[2:]), seen
    if batch_tokens is None:
        distinct = {tuple(row.input_ids[: t + 1]) for row in data for t in range(len(row.input_ids))}
        assert sum(length for _, length in seen[2:]) == len(distinct) < sum(len(row.input_ids) for row in data)
    else:
        assert max(length for _, length in seen[2:]) <= max(batch_tokens, max(len(row.input_ids) for row in data))


def test_labels_with_gaps_and_equal_rows():
    model = pico()
    ids = list(range(10, 22))
    data = [Encoded(ids, [-100, -100, *ids[2:5], -100, *ids[6:]], 2), Encoded(ids, [-100] * 2 + ids[2:], 2)]
    data += [Encoded([*ids[:7], 99], [-100] * 7 + [99], 2)] * 3
    _, shared, seen = both(model, data)
    assert [rows for rows, _ in seen[2:]] == [1]
    check(shared, [naive(model, row) for row in data])


def test_rows_that_share_little_are_scored_as_ever(monkeypatch):
    data = answers(each=1, questions=9)
    alone = [row for i, row in enumerate(data) if row not in data[:i]]
    model = pico()
    monkeypatch.setattr(sharing, "_shared", None)
    seen, handle = shapes_seen(model)
    scoring.score(model, alone, pad_token_id=PAD, progress=False)
    handle.remove()
    assert seen[0][0] > 1


def test_bf16_rounds_as_batches_of_rows_do():
    model, data = pico().bfloat16(), answers(1)
    plain, shared, seen = both(model, data)
    assert seen[2][0] == 1
    exact = scoring.score(pico(), data, pad_token_id=PAD, progress=False, around=lambda *_: scoring.nullcontext())
    off = [np.abs(np.concatenate(found.logprob) - np.concatenate(exact.logprob)).mean() for found in (plain, shared)]
    assert off[1] < 1.5 * off[0]


@pytest.mark.parametrize(
    "settings", [{}, {"from_layer": 1}, {"from_layer": 1, "entropy_source": "exact"}, {"router": "entropy"}]
)
@pytest.mark.parametrize("memory", [0.5, 1.0])
def test_a_routed_adapter_takes_the_routes_of_whole_rows(settings, memory):
    model = adapted(tiny(), router_memory=memory, **settings).eval()
    _, layer = model.base_model.router_host
    with torch.no_grad():
        for probe in layer.alter_probe.values():
            probe.weight.normal_(std=3.0)
    vocab = model.config.vocab_size
    data = answers(2, high=vocab)
    with own_gates(model) as gates:
        plain, shared, seen = both(model, data, pad_token_id=0)
    assert seen[2][0] == 1
    assert gates[-1].shape[0] == 1
    equal(plain, shared, 1e-4)
    with model.disable_adapter():
        base = scoring.score(model, data, pad_token_id=0, progress=False)
    assert max(np.abs(a - b).max() for a, b in zip(base.logprob, shared.logprob, strict=True)) > 0.01


def test_a_lora_and_other_positions():
    for model in (
        get_peft_model(pico(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval(),
        GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        ).eval(),
    ):
        plain, shared, seen = both(model, answers(3))
        assert seen[2][0] == 1
        equal(plain, shared)
        assert passes.inner_model(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("window", [6, 64])
def test_what_attention_cannot_be_computed_here_is_scored_row_by_row(window):
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    model = MistralForCausalLM(config).eval()
    plain, shared, seen = both(model, answers(4))
    equal(plain, shared, 0)
    assert seen[-1][0] > 1
    eager = pico()
    eager.set_attn_implementation("eager")
    both_ways = both(eager, answers(4))
    equal(both_ways[0], both_ways[1], 0)
    assert both_ways[2][0][0] > 1


def test_a_window_that_stands_in_the_mask_alone_is_kept_to():
    """Llama 4 attends within chunks: rows longer than one were scored as if it saw all, two short ones told no difference."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=8,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    model = Llama4ForCausalLM(config).eval()
    rows = [
        Encoded([*prompt, own], [-100] * len(prompt) + [own], len(prompt))
        for prompt in ([5, 6, 7], list(range(40, 60)))
        for own in range(4)
    ]
    plain, shared, _ = both(model, rows)
    equal(plain, shared, 0)
    plain, shared, seen = both(model, rows[:4])
    equal(plain, shared)
    assert seen[-1] == (1, 7)


def test_a_model_that_mixes_tokens_in_another_way_is_found_out(monkeypatch):
    model, data = pico(), answers(5)
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda _, __, output: output + output.mean(1, keepdim=True))
    assert not scoring._shared_batches(model, data, 1024)
    assert alter_of(model) is None


def test_nan_logits_name_the_row():
    model, data = pico(), answers(6)
    with torch.no_grad():
        model.model.embed_tokens.weight[data[3].input_ids[-2]] = float("nan")
    with pytest.raises(scoring.UserError, match="Row"):
        scoring.score(model, data, pad_token_id=PAD, progress=False)


@pytest.mark.parametrize(
    "settings", [{}, {"from_layer": 1}, {"router": "static"}, {"router": "entropy"}, {"top_k": 1}]
)
def test_the_base_is_scored_beside_the_adapted_model(settings):
    model = adapted(tiny(), **settings).eval()
    data = answers(2, high=model.config.vocab_size)
    for rows in (data, data[:1]):
        base, found = scoring.score_beside_base(model, rows, pad_token_id=0, moments=True, progress=False)
        alone = {"around": lambda *_: scoring.nullcontext(), "pad_token_id": 0, "moments": True, "progress": False}
        equal(scoring.score(model, rows, **alone), found, 1e-4)
        with model.disable_adapter():
            equal(scoring.score(model, rows, **alone), base, 1e-4)


def test_beside_its_base_an_adapted_model_runs_once_and_the_base_once():
    model = adapted(tiny()).eval()
    data = answers(2, high=model.config.vocab_size)
    calls = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    batches = sharing.shared_batches(data, 1024)
    scoring.score_beside_base(model, data, pad_token_id=0, progress=False)
    # two passes try the model, two tell routes
    assert len(calls) == 4 + 2 * len(batches)
