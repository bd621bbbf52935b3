"""Scores and generations in batches against one plain forward per row, and loading with its errors."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import reference
from alter import AlterConfig
from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.inference import decoding, generation, internals, scoring, telling
from alter.models import loading, naming
from alter.models.precision import multiplies
from pico import EOS, PAD, VOCAB, byte_tokenizer, pico


def rows(seed=0, n=9, high=40):
    """Random rows of odd lengths; the answers of some are one token long."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        prompt = int(rng.integers(1, high // 2))
        answer = 1 if i % 4 == 0 else int(rng.integers(2, high // 2))
        ids = rng.integers(0, 256, prompt + answer).tolist()
        out.append(Encoded(ids, [-100] * prompt + ids[prompt:], prompt))
    return out


def naive(model, row, mask=None):
    """One row by itself, float64, one position at a time."""
    model = copy.deepcopy(model).double()
    mask = None if mask is None else torch.tensor([mask])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids]), attention_mask=mask).logits[0]
    places = [t for t in range(1, len(row.labels)) if row.labels[t] != -100]
    return [reference.naive_token_statistics(logits[t - 1].tolist(), row.labels[t]) for t in places]


def check(scores, expected, tolerance=1e-4):
    assert len(scores.logprob) == len(expected)
    for i, tokens in enumerate(expected):
        logprob, correct, mean, var = zip(*tokens, strict=True)
        np.testing.assert_allclose(scores.logprob[i], logprob, atol=tolerance)
        assert scores.correct[i].tolist() == list(correct)
        assert scores.logprob[i].dtype == np.float32
        assert scores.correct[i].dtype == bool
        if scores.mean is not None:
            np.testing.assert_allclose(scores.mean[i], mean, atol=tolerance)
            np.testing.assert_allclose(scores.var[i], var, atol=10 * tolerance)


# ---- score


@pytest.mark.parametrize("batch_tokens", [1, 70, 16384, None])
def test_scores_are_those_of_one_plain_forward_per_row(batch_tokens):
    model, data = pico(), rows()
    scores = scoring.score(model, data, pad_token_id=PAD, batch_tokens=batch_tokens, moments=True, progress=False)
    check(scores, [naive(model, row) for row in data])


def test_chunks_and_the_limit_on_logits_change_nothing(monkeypatch):
    model, data = pico(), rows(1)
    whole = scoring.score(model, data, pad_token_id=PAD, moments=True, progress=False)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 3 * VOCAB)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 50 * VOCAB)
    pieces = scoring.score(model, data, pad_token_id=PAD, moments=True, progress=False)
    for a, b in zip(whole.logprob + whole.var, pieces.logprob + pieces.var, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_moments_only_on_request():
    scores = scoring.score(pico(), rows(), pad_token_id=PAD, progress=False)
    assert scores.mean is None
    assert scores.var is None
    assert len(scores[2:5].logprob) == 3


def test_labels_may_have_gaps_and_begin_at_the_first_token():
    model = pico()
    ids = list(range(10, 22))
    labels = [ids[0], -100, ids[2], ids[3], -100, -100, *ids[6:]]
    check(
        scoring.score(model, [Encoded(ids, labels, 0)], pad_token_id=PAD, progress=False),
        [naive(model, Encoded(ids, labels, 0))],
    )


def test_bf16_is_scored_in_fp32_after_the_head():
    model, data = pico().bfloat16(), rows(2)
    scores = scoring.score(model, data, pad_token_id=PAD, progress=False)
    for row, logprob in zip(data, scores.logprob, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_length - 1 : -1]
        exact = logits.double().log_softmax(-1)[range(len(logprob)), row.input_ids[row.prompt_length :]]
        # padding changes the order of sums in bf16; a bf16 log-softmax would be off by up to 0.03
        np.testing.assert_allclose(logprob, exact, atol=0.3)
        assert abs(float(np.mean(logprob - exact.numpy()))) < 0.05
    one = scoring.score(model, data[:1], pad_token_id=PAD, progress=False).logprob[0]
    row = data[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_length - 1 : -1]
    exact = logits.double().log_softmax(-1)[range(len(one)), row.input_ids[row.prompt_length :]]
    np.testing.assert_allclose(one, exact, atol=1e-5)


def test_a_pad_token_inside_a_row_is_seen_in_strict_and_hidden_in_compat():
    model = pico()
    ids = [5, 6, EOS, 7, 8, EOS, 9, 10, EOS]
    data = [Encoded(ids, [-100] * 6 + ids[6:], 6), *rows(3, 3)]
    strict = scoring.score(model, data, pad_token_id=EOS, progress=False)
    compat = scoring.score(model, data, pad_token_id=EOS, compat=True, progress=False)
    check(strict, [naive(model, row) for row in data])
    check(compat, [naive(model, row, [int(i != EOS) for i in row.input_ids]) for row in data])
    assert np.abs(strict.logprob[0] - compat.logprob[0]).max() > 0.01


def test_the_mask_tells_padding_by_length(monkeypatch):
    model, data, masks = pico(), rows(6), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: masks.append(inputs["attention_mask"]) or forward(**inputs))
    monkeypatch.setattr(scoring, "inner_model", lambda model: pico())
    scoring.score(model, data, pad_token_id=data[0].input_ids[0], progress=False)
    lengths = sorted((len(row.input_ids) for row in data), reverse=True)
    assert torch.cat(masks).sum(dim=1).tolist() == lengths
    assert masks[0][-1].tolist() == [1] * lengths[-1] + [0] * (lengths[0] - lengths[-1])


def test_a_model_that_cannot_slice_its_logits():
    class Whole(GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    torch.manual_seed(0)
    model = Whole(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3))
    model, data = model.eval(), rows(4, 5)
    check(scoring.score(model, data, pad_token_id=PAD, progress=False), [naive(model, row) for row in data])


def adapted(seed=0):
    model = get_peft_model(pico(seed), AlterConfig(num_forget_experts=3, r=4, task_type="CAUSAL_LM"))
    torch.manual_seed(7)
    for name, weight in model.named_parameters():
        if "alter_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def test_an_adapter_with_routes_takes_part():
    model, data = adapted(), rows(5, 6)
    together = scoring.score(model, data, pad_token_id=PAD, progress=False)
    for i, row in enumerate(data):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_length - 1 : -1]
        alone = logits.double().log_softmax(-1)[range(len(logits)), row.input_ids[row.prompt_length :]]
        np.testing.assert_allclose(together.logprob[i], alone, atol=1e-3)
    with model.disable_adapter():
        off = scoring.score(model, data, pad_token_id=PAD, progress=False)
    assert max(np.abs(a - b).max() for a, b in zip(together.logprob, off.logprob, strict=True)) > 0.1


def test_modes_come_back_and_no_gradient_is_left():
    model = get_peft_model(pico(), LoraConfig(lora_dropout=0.5, task_type="CAUSAL_LM"))
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    frozen.eval()
    first = scoring.score(model, rows(), pad_token_id=PAD, progress=False)
    second = scoring.score(model, rows(), pad_token_id=PAD, progress=False)
    assert all((a == b).all() for a, b in zip(first.logprob, second.logprob, strict=True))
    assert model.training
    assert not frozen.training
    assert all(weight.grad is None for weight in model.parameters())


def test_rows_that_cannot_be_scored():
    model = pico()

    def run(*data):
        scoring.score(model, list(data), pad_token_id=PAD, progress=False)

    with pytest.raises(UserError, match="Row 1 has no labelled token"):
        run(Encoded([1, 2], [-100, 2], 1), Encoded([1, 2], [-100, -100], 2))
    with pytest.raises(UserError, match="Row 0 has no labelled token"):
        run(Encoded([1], [1], 0))
    with pytest.raises(UserError, match="Row 0 has 129 tokens, the model's context is 128"):
        run(Encoded([1] * 129, [1] * 129, 0))
    with pytest.raises(ValueError, match="row 0 has 2 tokens but 1 labels"):
        run(Encoded([1, 2], [2], 0))
    with torch.no_grad():
        model.model.embed_tokens.weight[17] = math.nan
    with pytest.raises(UserError, match=r"Row 1: the model's logits are NaN.*float32"):
        run(Encoded([1, 2], [-100, 2], 1), Encoded([17, 2], [-100, 2], 1))


# ---- gradients


def slope_norms(model, row, mask=None, step=3e-3):
    """Norm of the gradient by each tensor, from differences of the loss at each weight (its norms compute in fp32)."""
    model = copy.deepcopy(model).double()
    places = [t for t in range(1, len(row.labels)) if row.labels[t] != -100][:-1]

    def loss():
        logits = model(input_ids=torch.tensor([row.input_ids]), attention_mask=mask).logits[0]
        logp = [logits[t - 1].log_softmax(0)[row.labels[t]] for t in places]
        return -sum(x.item() for x in logp) / len(logp)

    norms = []
    with torch.no_grad():
        for weight in model.parameters():
            total = 0.0
            flat = weight.view(-1)
            for i in range(len(flat)):
                kept = flat[i].item()
                flat[i] = kept + step
                up = loss()
                flat[i] = kept - step
                total += ((up - loss()) / (2 * step)) ** 2
                flat[i] = kept
            norms.append(math.sqrt(total))
    return norms


def minute(seed=0):
    """As few weights as a Llama can have, for differences at every single one."""
    sizes = {"vocab_size": 12, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    return pico(
        seed,
        **sizes,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=None,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize("compat", [False, True])
def test_gradient_norms_are_those_of_differences(compat):
    model = minute()
    data = [Encoded([5, 2, 7, 3, 1], [-100, -100, 7, 3, 1], 2), Encoded([4, 9, 1], [-100, 9, 1], 1)]
    found = internals.gradient_norms(model, data, pad_token_id=2, compat=compat, progress=False)
    for row, norms in zip(data, found, strict=True):
        mask = torch.tensor([[int(i != 2) for i in row.input_ids]]) if compat else None
        assert len(norms) == len(list(model.parameters()))
        np.testing.assert_allclose(norms, slope_norms(model, row, mask), rtol=1e-2, atol=1e-3)


def worded(n=3):
    """Rows with text before their last token."""
    return [row for row in rows(n=n + 2) if row.labels[-2] != -100]


@pytest.mark.parametrize("freeze", [False, True])
def test_gradient_norms_leave_the_model_as_it_was(freeze):
    model = get_peft_model(pico(), LoraConfig(lora_dropout=0.5, task_type="CAUSAL_LM"))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    if freeze:
        model.requires_grad_(False)
    model.train()
    some = next(model.parameters())
    some.grad = torch.full_like(some, 3.0)
    flags = [weight.requires_grad for weight in model.parameters()]
    before = [weight.clone() for weight in model.parameters()]
    first = internals.gradient_norms(model, worded(), pad_token_id=PAD, progress=False)
    second = internals.gradient_norms(model, worded(), pad_token_id=PAD, progress=False)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert model.training
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert (some.grad == 3.0).all()
    assert all(weight.grad is None for weight in list(model.parameters())[1:])
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    # base weights count whether they are trained or not
    assert all(len(norms) == len(flags) for norms in first)


def test_gradient_norms_of_an_alter_adapter():
    model, data = adapted(), worded()
    names = [name for name, _ in model.named_parameters()]
    found = internals.gradient_norms(model, data, pad_token_id=PAD, progress=False)
    for row, norms in zip(data, found, strict=True):
        model.requires_grad_(True)
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_length - 1 : -2]
        labels = torch.tensor(row.input_ids[row.prompt_length : -1])
        torch.nn.functional.cross_entropy(logits, labels).backward()
        plain = [weight.grad.norm().item() for weight in model.parameters() if weight.grad is not None]
        np.testing.assert_allclose(norms, plain, rtol=1e-3)
        assert len(names) - 5 < len(norms)
        model.zero_grad()
    with model.disable_adapter():
        off = internals.gradient_norms(model, data, pad_token_id=PAD, progress=False)
        base = internals.gradient_norms(pico(), data, pad_token_id=PAD, progress=False)
    assert [norms.sum() for norms in off] == pytest.approx([norms.sum() for norms in base], rel=1e-4)


def test_gradients_that_cannot_be_had():
    model = pico()
    with pytest.raises(UserError, match="Row 1 has no labelled text, only an end"):
        internals.gradient_norms(
            model, [*rows(n=2)[1:], Encoded([1, EOS], [-100, EOS], 1)], pad_token_id=PAD, progress=False
        )
    assert not any(weight.grad is not None for weight in model.parameters())
    with torch.no_grad():
        model.model.embed_tokens.weight[17] = math.nan
    with pytest.raises(UserError, match="Row 0: the gradient is not finite"):
        internals.gradient_norms(model, [Encoded([17, 2, 3], [-100, 2, 3], 1)], pad_token_id=PAD, progress=False)


# ---- generate


def by_hand(model, prompt, new, stop):
    """Greedy decoding without cache, one row, one token at a time."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stop:
                return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def prompts(seed=0, n=7):
    rng = np.random.default_rng(seed)
    return [rng.integers(40, 120, int(rng.integers(1, 30))).tolist() for _ in range(n)]


def gpt2(seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def sliding(seed):
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [pico, gpt2, sliding])
@pytest.mark.parametrize("segment", [1, 5, 12, 100])
@pytest.mark.parametrize("drop", [True, False])
def test_generations_are_those_of_one_row_at_a_time(make, segment, drop, monkeypatch):
    monkeypatch.setattr(decoding, "SEGMENT", segment)
    if not drop:
        monkeypatch.setattr(generation, "can_drop_rows", lambda cache: False)
    model, tokenizer = make(3), byte_tokenizer()
    # a stop token that does come up, so that replies end at different lengths
    stop = {EOS, by_hand(model, prompts()[0], 12, set())[5]}
    model.generation_config.eos_token_id = sorted(stop)
    replies = [by_hand(model, prompt, 12, stop) for prompt in prompts()]
    assert len({len(reply) for reply in replies}) > 1
    expected = [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]
    for size in (1, 3, 64):
        found = generation.generate(model, tokenizer, prompts(), max_new_tokens=12, batch_size=size, progress=False)
        assert found == expected
    likely = [4, 1, 9, 9, 2, 0, 7]
    found = generation.generate(
        model, tokenizer, prompts(), max_new_tokens=12, batch_size=3, expected_lengths=likely, progress=False
    )
    assert found == expected


@pytest.mark.parametrize("make", [pico, gpt2, sliding])
@pytest.mark.parametrize("drop", [True, False])
def test_known_beginnings_change_no_reply_and_are_not_said_again(make, drop, monkeypatch):
    monkeypatch.setattr(decoding, "SEGMENT", 5)
    if not drop:
        monkeypatch.setattr(generation, "can_drop_rows", lambda cache: False)
    model, tokenizer = make(3), byte_tokenizer()
    end = by_hand(model, prompts()[0], 12, set())[5]
    stop = {EOS, end}
    model.generation_config.eos_token_id = sorted(stop)
    replies = [by_hand(model, prompt, 12, stop) for prompt in prompts()]
    expected = [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]
    # whole with its end and what follows it, up to the limit or beyond, a part, nothing
    begun = [[*replies[0], end, 7, 8], [*replies[1], *([end] if len(replies[1]) < 12 else [9, 9])]]
    begun += [reply[: i % 4] for i, reply in enumerate(replies[2:])]
    read = []
    model.register_forward_pre_hook(lambda _, __, inputs: read.append(inputs["input_ids"]), with_kwargs=True)
    for size in (1, 3, 64):
        found = generation.generate(
            model, tokenizer, prompts(), max_new_tokens=12, batch_size=size, begun=begun, progress=False
        )
        assert found == expected
    assert read[0].shape == (1, max(len(p) + len(b) for p, b in zip(prompts()[2:], begun[2:], strict=True)))
    read.clear()
    whole = [[*reply, end] for reply in replies]
    assert generation.generate(model, tokenizer, prompts(), max_new_tokens=12, begun=whole, progress=False) == expected
    assert not read


def test_scores_tell_how_replies_begin():
    model, prompt = pico(3), prompts()[0]
    said = by_hand(model, prompt, 8, {EOS})
    answers = [said, [*said[:4], 7 + said[4]], [9 + said[0]], said]
    rows = [Encoded(prompt + own, [-100] * len(prompt) + own, len(prompt)) for own in answers]
    rows[3] = Encoded(rows[3].input_ids, [-100] * (len(prompt) + 1) + said[1:], len(prompt))
    # a text, continued from its middle, and another prompt
    rows += [Encoded(prompt + said, [-100, *prompt[1:], *said], 1), rows[0]]
    asked = [*[prompt] * 4, prompt + said[:2], [1, *prompt]]
    correct = scoring.score(model, rows, pad_token_id=PAD, progress=False).correct
    found = telling.begun_replies(model, rows, correct, asked)
    assert found == [said, said[:4], [], [], said[2:], []]
    assert telling.begun_replies(model.bfloat16(), rows, correct, asked) is None


def test_which_models_say_what_they_score():
    assert telling.says_what_it_scores(pico())
    assert telling.says_what_it_scores(sliding(0))
    assert telling.says_what_it_scores(get_peft_model(pico(), LoraConfig(target_modules=["q_proj"])))
    assert not telling.says_what_it_scores(pico().bfloat16()), "near ties turn in 16 bits"
    assert not telling.says_what_it_scores(adapted(3)), "the frozen base sees the prompt alone"
    upper = get_peft_model(pico(), AlterConfig(from_layer=1, target_modules=["q_proj"]))
    assert telling.says_what_it_scores(upper)
    off = adapted(3)
    with off.disable_adapter():
        assert telling.says_what_it_scores(off)
    model = pico()
    model.generation_config.repetition_penalty = 1.0
    assert telling.says_what_it_scores(model)
    for setting, value in {
        "repetition_penalty": 1.2,
        "suppress_tokens": [5],
        "cache_implementation": "static",
    }.items():
        model = pico()
        setattr(model.generation_config, setting, value)
        assert not telling.says_what_it_scores(model)


def test_rows_that_have_ended_leave_the_batch(monkeypatch):
    monkeypatch.setattr(decoding, "SEGMENT", 2)
    model, tokenizer = pico(3), byte_tokenizer()
    replies = [by_hand(model, prompt, 12, set()) for prompt in prompts()]
    model.generation_config.eos_token_id = replies[0][3]
    sizes = []
    forward = model.forward

    def watched(*args, **settings):
        sizes.append(len(settings["input_ids"]))
        return forward(*args, **settings)

    monkeypatch.setattr(model, "forward", watched)
    generation.generate(model, tokenizer, prompts(), max_new_tokens=12, progress=False)
    assert sizes[0] == 7 > sizes[-1]
    assert len(sizes) <= 12


@pytest.mark.parametrize("segment", [3, 100])
def test_generations_of_an_adapter_do_not_depend_on_the_batch(segment, monkeypatch):
    monkeypatch.setattr(decoding, "SEGMENT", segment)
    model, tokenizer = adapted(3), byte_tokenizer()

    def alone(prompt, stop=None):
        with torch.no_grad():
            reply = model.generate(
                input_ids=torch.tensor([prompt]),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=PAD,
            )
        return reply[0, len(prompt) :].tolist()

    stop = alone(prompts()[0])[5]
    model.get_base_model().generation_config.eos_token_id = stop
    replies = [[token for token in alone(prompt, [EOS, stop]) if token not in (EOS, stop)] for prompt in prompts()]
    assert len({len(reply) for reply in replies}) > 1
    expected = [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]
    for size in (3, 64):
        found = generation.generate(model, tokenizer, prompts(), max_new_tokens=12, batch_size=size, progress=False)
        assert found == expected
    with model.disable_adapter():
        assert generation.generate(model, tokenizer, prompts(), max_new_tokens=12, progress=False) != expected


def test_generation_hides_inner_pads_only_in_compat():
    model, tokenizer = pico(3), byte_tokenizer(pad_token="<eos>")
    prompt = [50, 51, EOS, 52, EOS, 53]
    strict, compat = (
        generation.generate(model, tokenizer, [prompt, [60] * 9], max_new_tokens=8, compat=c, progress=False)
        for c in (False, True)
    )
    assert strict[0] == tokenizer.decode(by_hand(model, prompt, 8, {EOS}), skip_special_tokens=True).strip()
    assert compat[0] != strict[0]
    assert compat[1] == strict[1]


def test_sampling_follows_torch_seed():
    model, tokenizer = pico(3), byte_tokenizer()

    def sample(seed):
        torch.manual_seed(seed)
        return generation.generate(
            model, tokenizer, prompts(), max_new_tokens=8, progress=False, do_sample=True, temperature=1.5, top_k=0
        )

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


@pytest.mark.parametrize("first", [3, 512])
def test_a_nucleus_is_what_transformers_draws_from(first, monkeypatch):
    monkeypatch.setattr(decoding, "NUCLEUS", first)
    torch.manual_seed(0)
    scores = torch.randn(2, 12) * torch.tensor([[3.0], [0.5]])
    kept = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(0.7)(None, scores)).softmax(-1)
    n = 4000
    left = decoding.Nucleus(0.7, 0.8)(None, scores.repeat_interleave(n, 0))
    assert torch.equal(left.exp().sum(-1), torch.ones(2 * n))
    drawn = left.exp().view(2, n, -1).mean(1)
    assert torch.equal(drawn > 0, kept > 0)
    assert (drawn - kept).abs().max() < 4 * 0.5 / n**0.5
    # the second row's nucleus is wider than the three likeliest
    assert (kept > 0).sum(-1).tolist()[1] > 3


def test_samples_are_drawn_by_the_nucleus_unless_a_model_reshapes_them_otherwise(monkeypatch):
    seen = []
    monkeypatch.setattr(decoding.Nucleus, "__call__", lambda self, ids, scores: seen.append(1) or scores)
    model, tokenizer = pico(3), byte_tokenizer()

    def sample(**more):
        seen.clear()
        asked = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0} | more
        generation.generate(model, tokenizer, prompts(), max_new_tokens=3, progress=False, **asked)
        return len(seen)

    assert sample() > 0
    assert sample(top_k=5) == sample(top_p=1.0) == sample(repetition_penalty=1.2) == 0
    model.generation_config.update(min_p=0.1)
    assert sample() == 0


def test_greedy_stays_greedy_when_the_model_says_otherwise(recwarn):
    model, tokenizer = pico(3), byte_tokenizer()
    expected = generation.generate(model, tokenizer, prompts(), max_new_tokens=6, progress=False)
    model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.5)
    assert generation.generate(model, tokenizer, prompts(), max_new_tokens=6, progress=False) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.9, "top_k": 0}, "sample"])
def test_a_model_whose_logits_are_not_finite_says_nothing(value, how):
    model, tokenizer = pico(), byte_tokenizer()
    head = model.get_output_embeddings()

    def say():
        if how == "sample":
            return generation.sample(model, tokenizer, prompts(), 2, max_new_tokens=3, progress=False)
        return generation.generate(model, tokenizer, prompts(), max_new_tokens=3, progress=False, **how)

    # a token that is forbidden has a finite logit beside it
    forbidden = head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([5]), -math.inf))
    assert len(say()) == len(prompts())
    forbidden.remove()
    beyond = head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([5]), value))
    with pytest.raises(UserError, match=r"not finite.*its numbers are beyond its dtype; try `dtype` float32"):
        say()
    beyond.remove()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(
        UserError, match=r"its weights hold NaN or infinite values, model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        say()


def test_a_callers_own_logits_processor_is_asked():
    def only(ids, scores):
        return torch.full_like(scores, -math.inf).index_fill(-1, torch.tensor([70]), 0.0)

    said = generation.generate(
        pico(),
        byte_tokenizer(),
        prompts(),
        max_new_tokens=2,
        progress=False,
        logits_processor=LogitsProcessorList([only]),
    )
    assert said == [byte_tokenizer().decode([70, 70])] * len(prompts())


@pytest.mark.parametrize("drawn", [False, True])
def test_the_head_reads_rows_that_lie_side_by_side(drawn):
    model = pico().to(torch.bfloat16)
    head = model.get_output_embeddings()
    seen = []
    handle = head.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].is_contiguous(), out.shape[1])))
    prompts = [[5, 6, 7], [8, 9], [4, 5, 6, 7]]
    if drawn:
        generation.sample(model, byte_tokenizer(), prompts, 2, max_new_tokens=3, progress=False)
    else:
        generation.generate(model, byte_tokenizer(), prompts, max_new_tokens=3, progress=False)
    handle.remove()
    assert seen
    assert all(together and positions == 1 for together, positions in seen)
    assert not head._forward_pre_hooks


def test_prompts_that_cannot_be_continued():
    model, tokenizer = pico(), byte_tokenizer()
    with pytest.raises(UserError, match="Prompt 1 is empty"):
        generation.generate(model, tokenizer, [[1], []], max_new_tokens=8, progress=False)
    with pytest.raises(UserError, match=r"Prompt 0 has 100 tokens.*context of 128: generate at most 28"):
        generation.generate(model, tokenizer, [[1] * 100], max_new_tokens=29, progress=False)
    with pytest.raises(UserError, match="The question of row 3 has 200 tokens"):
        generation.check_prompts(model, [[1], [1] * 200], 4, ["x", "The question of row 3"])
    with pytest.raises(UserError, match="Row 7 of the forget set has 129 tokens"):
        scoring.check_rows(model, [Encoded([1] * 129, [1] * 129, 0)], ["Row 7 of the forget set"])


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token():
    model, tokenizer = pico(3), byte_tokenizer()
    expected = generation.generate(model, tokenizer, prompts(), max_new_tokens=6, progress=False)
    without = byte_tokenizer(pad_token=None)
    assert without.pad_token_id is None
    assert generation.generate(model, without, prompts(), max_new_tokens=6, progress=False) == expected
    assert without.pad_token_id == EOS
    with pytest.raises(UserError, match="neither a padding nor an end-of-sequence token"):
        generation.generate(
            model, byte_tokenizer(pad_token=None, eos_token=None), prompts(), max_new_tokens=6, progress=False
        )


# ---- load_model


@pytest.fixture
def saved(tmp_path):
    pico().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_load_a_model_and_an_adapter(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    assert loading.load_model("~/model", "~/adapter", device="cpu")[0].active_adapter == "default"
    model, tokenizer = loading.load_model(str(saved / "model"), device="cpu")
    assert not model.training
    assert tokenizer.pad_token_id == PAD
    plain = scoring.score(model, rows(), pad_token_id=PAD, progress=False)
    check(plain, [naive(pico(), row) for row in rows()])
    model, _ = loading.load_model(str(saved / "model"), str(saved / "adapter"), device="cpu")
    found = scoring.score(model, rows(), pad_token_id=PAD, progress=False)
    expected = scoring.score(adapted(), rows(), pad_token_id=PAD, progress=False)
    for a, b in zip(found.logprob, expected.logprob, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_number_formats(saved, tmp_path):
    assert loading.load_model(str(saved / "model"), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    # what the processor is slow at is widened (test_precision)
    fast = multiplies(torch.bfloat16, torch.device("cpu"))
    for dtype, loaded in [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16 if fast else torch.float32)]:
        pico().to(dtype).save_pretrained(saved / "model")
        assert loading.load_model(str(saved / "model"), device="cpu")[0].dtype == loaded
    with pytest.raises(UserError, match=r"No number format 'float23'.*Did you mean 'float32'"):
        loading.load_model(str(saved / "model"), dtype="float23")


def test_loading_errors_name_the_fix(saved, monkeypatch):
    model, adapter = str(saved / "model"), str(saved / "adapter")
    with pytest.raises(UserError, match=r"No model at .*modle.*Did you mean .*model'\?"):
        loading.load_model(str(saved / "modle"))
    with pytest.raises(UserError, match=r"holds an adapter.*`adapter`"):
        loading.load_model(adapter)
    with pytest.raises(UserError, match=r"holds a whole model.*`model`"):
        loading.load_model(model, model)
    with pytest.raises(UserError, match="No adapter at"):
        loading.load_model(model, str(saved / "nothing"))
    with pytest.raises(UserError, match="is a file; expected the folder"):
        loading.load_model(model + "/config.json")
    (saved / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json; expected the folder of a model"):
        loading.load_model(str(saved / "empty"))
    with pytest.raises(UserError, match="No device 'gpu7'"):
        loading.load_model(model, device="gpu7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="`device` cpu"):
        loading.load_model(model, device="cuda")
    broken = pico()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    broken.save_pretrained(model)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        loading.load_model(model)


def test_models_that_come_with_the_package(saved, monkeypatch):
    monkeypatch.setattr(naming, "__file__", str(saved / "models" / "naming.py"))
    with pytest.raises(UserError, match="No model 'builtin:mini' is shipped; there are: none"):
        loading.load_model("builtin:mini")
    (saved / "assets").mkdir()
    (saved / "model").rename(saved / "assets" / "mini")
    assert loading.load_model("builtin:mini", device="cpu")[1].pad_token_id == PAD
    with pytest.raises(UserError, match=r"there are: builtin:mini\. Did you mean 'builtin:mini'"):
        loading.load_model("builtin:mina")
    assert naming.shipped_model("owner/name") == "owner/name"


def test_a_hub_name_that_does_not_load(monkeypatch):
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no such repo\nmore")),
    )
    with pytest.raises(UserError, match=r"Cannot load the model 'nobody/nothing': no such repo Expected"):
        loading.load_model("nobody/nothing")


def test_an_adapter_of_another_base_is_refused(saved):
    pico(5).save_pretrained(saved / "model")
    with pytest.raises(UserError, match="another base"):
        loading.load_model(str(saved / "model"), str(saved / "adapter"))
