"""Which layers an adapter goes on: GPT-2's Conv1D, flags; and virtual tokens in scoring."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.inference.scoring import score
from alter.methods.adapters import AlterAdapter, Beginning, Lora
from pico import PAD, pico


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


def test_loras_still_score_in_place():
    model = get_peft_model(pico(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    rows = [Encoded([5, 6, 7], [-100, 6, 7], 1)]
    plain = score(pico(), rows, pad_token_id=PAD, progress=False)
    assert score(model, rows, pad_token_id=PAD, progress=False).logprob[0].tolist() == plain.logprob[0].tolist()
