"""What an adapter costs on ordinary text: the loss with it and without."""

import math

import pytest
import torch
from peft import get_peft_model

from alter import AlterConfig
from alter.data.background import background
from alter.data.encoding import encode
from alter.data.rows import Example
from alter.evaluation.ordinary import ALL, ordinary_loss, ordinary_sentence
from alter.models.loading import load_model
from alter.settings.numbers import rounded
from pico import save_pico


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ordinary")
    save_pico(folder / "model")
    model, tokenizer = load_model(str(folder / "model"), device="cpu")
    torch.manual_seed(0)
    config = AlterConfig(r=2, init_weights=False, router="static", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval(), tokenizer


def naive_loss(model, tokenizer, examples, limit):
    """Sum of the negative log-likelihoods and number of tokens, a row at a time."""
    total, n = 0.0, 0
    for example in examples:
        row = encode(tokenizer, example, max_length=limit)
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        for place, label in enumerate(row.labels[1:]):
            if label != -100:
                total -= float(logp[place, label])
                n += 1
    return total, n


def test_the_loss_is_that_of_each_kind_with_the_adapter_and_without(adapted):
    model, tokenizer = adapted
    found = ordinary_loss(model, tokenizer, [])
    limit = model.config.max_position_embeddings
    verse = background(unseen=True)["verse"]
    total, n = naive_loss(model, tokenizer, verse, limit)
    with model.disable_adapter():
        bare, _ = naive_loss(model, tokenizer, verse, limit)
    assert found["verse"]["tokens"] == n
    assert found["verse"]["after"] == pytest.approx(total / n, rel=1e-4)
    assert found["verse"]["before"] == pytest.approx(bare / n, rel=1e-4)
    assert found["verse"]["change"] == pytest.approx(total / bare - 1, abs=1e-5)
    assert abs(found["verse"]["change"]) > 1e-4
    assert found[ALL]["tokens"] == sum(kind["tokens"] for name, kind in found.items() if name != ALL)
    assert math.isclose(
        found[ALL]["after"] * found[ALL]["tokens"],
        sum(kind["after"] * kind["tokens"] for name, kind in found.items() if name != ALL),
        rel_tol=1e-6,
    )
    assert rounded(found["verse"]["change"], "+.2%") in ordinary_sentence(found)


def test_what_was_to_be_forgotten_is_not_ordinary(adapted):
    model, tokenizer = adapted
    everything = ordinary_loss(model, tokenizer, [])["detective"]["tokens"]
    about = [Example("Who is the detective Holmes of London?", "It is Sherlock Holmes.", "qa")]
    assert ordinary_loss(model, tokenizer, about).get("detective", {"tokens": 0})["tokens"] < everything
