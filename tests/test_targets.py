"""Which layers an adapter goes on: GPT-2's Conv1D, flags; and what adapters put before every row."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.inference import context_length, generate, hidden_states, sample
from alter.inference.scoring import score
from alter.methods.adapters import AlterAdapter, Beginning, Lora
from alter.serving.engine import Engine
from alter.serving.jobs import Job
from pico import PAD, byte_tokenizer, pico


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))


@pytest.mark.parametrize("given", [None, "all-linear", ["c_fc"]])
def test_lora_finds_the_layers_of_gpt2(given):
    names = set(Lora(target_modules=given).layers(gpt2()))
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds == ({"c_fc"} if given == ["c_fc"] else {"c_attn", "c_proj", "c_fc"})
    Lora(target_modules=given).attach(gpt2(), SimpleNamespace(model="base"), Beginning())


def test_an_initializer_refuses_gpt2s_turned_weights():
    with pytest.raises(UserError, match="Conv1D"):
        Lora().attach(gpt2(), SimpleNamespace(model="base"), Beginning(factors={}))


@pytest.mark.parametrize("kind", [Lora, AlterAdapter])
def test_a_flag_given_once_is_a_text_where_it_can_be_no_name(kind):
    assert kind(target_modules=["all-linear"]).target_modules == "all-linear"
    assert kind(target_modules=[r".*\.[01]\..*_proj"]).target_modules == r".*\.[01]\..*_proj"
    assert kind(target_modules=["q_proj"]).target_modules == ["q_proj"]
    assert kind(target_modules=["a.*", "b"]).target_modules == ["a.*", "b"]


def test_virtual_tokens_do_not_shift_the_scores():
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(pico(), config).eval()
    rows = [Encoded([5, 6, 7, 8], [-100, 6, 7, 8], 1), Encoded([9, 4], [-100, 4], 1)]
    found = score(model, rows, pad_token_id=PAD, progress=False)
    for row, logprobs in zip(rows, found.logprob, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids]), attention_mask=torch.ones(1, len(row.input_ids))).logits[0]
        own = logits[3:].log_softmax(-1)
        wanted = [float(own[place - 1, row.input_ids[place]]) for place in range(1, len(row.input_ids))]
        assert logprobs.tolist() == pytest.approx(wanted, abs=1e-4)


def naive_reply(model, tokenizer, prompt, new):
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_what_stands_before_every_row_is_not_parted_from_it(kind):
    """Padding on the left stood between them, a reply was cut into calls, and states and echoed tokens were those of others."""
    torch.manual_seed(0)
    more = {"encoder_hidden_size": 16} if kind is PromptEncoderConfig else {}
    model = get_peft_model(pico(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **more)).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    tokenizer = byte_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("Hello there", "Who", "How", "abcde fgh ijk")]
    naive = [naive_reply(model, tokenizer, prompt, 40) for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=40, progress=False) == naive
    drawn = sample(model, tokenizer, prompts, 2, temperature=1e-6, max_new_tokens=40, progress=False)
    assert drawn == [[text, text] for text in naive]
    assert context_length(model) == context_length(pico()) - 3
    rows = [Encoded(prompt, [-100, *prompt[1:]], 1) for prompt in prompts]
    states = dict(hidden_states(model, rows, pad_token_id=PAD, progress=False))
    with torch.no_grad():
        own = model(input_ids=torch.tensor([prompts[1]]), output_hidden_states=True).hidden_states[-1][0, -3:]
    assert states[1][:, -1] == pytest.approx(own.numpy(), abs=1e-4)
    # switched off, nothing stands there
    with model.disable_adapter():
        off = score(model, rows, pad_token_id=PAD, progress=False).logprob
        assert context_length(model) == context_length(pico())
        assert generate(model, tokenizer, prompts, max_new_tokens=40, progress=False) == generate(
            pico(), tokenizer, prompts, max_new_tokens=40, progress=False
        )
    base = score(pico(), rows, pad_token_id=PAD, progress=False).logprob
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in zip(off, base, strict=True))
    engine = Engine(model, tokenizer)
    jobs = [Job(prompt, 40, 0.0, 1.0, (), 0, lambda _: None, logprobs=0, echo=True, strip=True) for prompt in prompts]
    engine.submit(*jobs)
    engine.close()
    assert [job.text for job in jobs] == naive
    scores = score(model, rows, pad_token_id=PAD, progress=False).logprob
    for job, logprob in zip(jobs, scores, strict=True):
        assert [one.logprob for one in job.prompt_scored[1:]] == pytest.approx(logprob.tolist(), abs=1e-4)


def test_loras_still_score_in_place():
    model = get_peft_model(pico(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    rows = [Encoded([5, 6, 7], [-100, 6, 7], 1)]
    plain = score(pico(), rows, pad_token_id=PAD, progress=False)
    assert score(model, rows, pad_token_id=PAD, progress=False).logprob[0].tolist() == plain.logprob[0].tolist()
