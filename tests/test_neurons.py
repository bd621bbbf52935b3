"""Neuron Adjust and Key Space Detection: by hand, against loops, and as guards on a small model."""

import math

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.guarding.neurons import chosen_neurons, cube, layer_in, statistics
from alter.guarding.run import make_guard
from alter.guarding.settings import MakeGuard
from alter.models.guards import load_form
from alter.models.guards.neurons import by_token, inside, moved
from alter.models.loading import load_model
from pico import EOS, PAD, byte_tokenizer, pico, save_pico, write_people


def test_neurons_move_by_hand():
    one = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    forget, retain = (one(2.0), one(0.5)), (one(-1.0), one(2.0))
    # 3 is two deviations above the forget mean: 2 * -1 - (2 * 2 - 1), at the other side of the retain mean
    assert moved(one(3.0), forget, retain, one(1.0)).item() == -5.0
    # 0 looks like a retain row's, and stays whatever is drawn
    assert moved(one(0.0), forget, retain, one(1.0)).item() == 0.0
    f, r = (math.exp(-0.5 * ((3 - m) / s) ** 2) / s for m, s in ((2, 0.5), (-1, 2)))
    assert f > r
    for off, expected in ((1e-4, -5.0), (-1e-4, 3.0)):
        assert moved(one(3.0), forget, retain, one(r / (r + f) + off)).item() == expected


def test_the_cube_by_hand():
    forget = torch.tensor([[0.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
    retain = torch.tensor([[1.0, 3.0], [9.0, 2.0], [1.0, 8.0]], dtype=torch.float64)
    mean, std, half = cube(forget, retain, 1.0, 0.0)
    assert mean.tolist() == [1.0, 2.0]
    assert std.tolist() == pytest.approx([2**0.5, 8**0.5])
    # both rows lie 1 / sqrt 2 deviations away
    assert half == pytest.approx(0.5**0.5)
    assert cube(forget, retain, 0.08, 0.0)[2] == pytest.approx(0.08 * 0.5**0.5)
    # the first retain row lies 1 / sqrt 8 away, the others farther than what covers the forget rows
    assert cube(forget, retain, None, 0.0)[2] == pytest.approx(8**-0.5, rel=1e-5)
    assert cube(forget, retain, None, 0.34)[2] == pytest.approx(0.5**0.5)
    assert inside(retain, mean, std, 0.4).tolist() == [True, False, False]


def test_statistics_against_a_loop_and_the_neurons_that_differ_most():
    model = pico()
    rows = [Encoded([5, 9, 3, 7], [-100] * 4, 2), Encoded([8, 2], [-100] * 2, 1)]
    name = layer_in(model, 1, ("gate_proj",))
    assert name == "model.layers.1.mlp.gate_proj"
    mean, spread = statistics(model, [name], rows, PAD, "")[name]
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out[0].double()))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row.input_ids]))
    handle.remove()
    every = torch.cat(seen)
    torch.testing.assert_close(mean, every.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(spread, every.std(0, correction=0), atol=1e-5, rtol=1e-4)
    zero = torch.zeros(3)
    means = {"a": (torch.tensor([1.0, -9.0, 2.0]), zero), "b": (torch.tensor([8.0, 0.0, 0.0]), zero)}
    assert {k: v.tolist() for k, v in chosen_neurons(means, {"a": (zero, zero), "b": (zero, zero)}, 0.34).items()} == {
        "a": [1],
        "b": [0],
    }
    with pytest.raises(UserError, match="no feed-forward layer of a known name"):
        layer_in(model, 0, ("nothing",))


def test_a_layer_that_makes_one_axis_of_rows_and_tokens_is_looked_at_by_token():
    values = torch.randn(2, 3, 5)
    assert torch.equal(by_token(values, (2, 3)), values)
    assert torch.equal(by_token(values.flatten(0, 1), (2, 3)), values)
    with pytest.raises(UserError, match="a mixture of experts"):
        by_token(values.flatten(0, 1)[:4], (2, 3))


@pytest.mark.parametrize("kind", ["neurons", "key_space"])
def test_a_model_that_makes_one_axis_of_rows_and_tokens_is_guarded(data, tmp_path, kind):
    size = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    torch.manual_seed(0)
    base = OPTForCausalLM(OPTConfig(**size, vocab_size=300, init_std=0.3, eos_token_id=EOS, pad_token_id=PAD)).eval()
    base.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = {"forget": str(data / "forget.jsonl"), "retain": str(data / "retain.jsonl")}
    given = {"model": str(tmp_path / "model"), "out": str(tmp_path / "guard"), "device": "cpu", **rows}
    make_guard(MakeGuard.model_validate(given | {"guard": {"kind": kind, "share": 1.0}}))
    model = load_form(base, str(tmp_path / "guard"))
    ids = torch.randint(5, 200, (2, 7))
    with torch.no_grad():
        together, alone = model(input_ids=ids).logits, [model(input_ids=row[None]).logits for row in ids]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=ids).logits, together) or kind == "key_space"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neurons")
    save_pico(folder / "model", max_position_embeddings=512)
    return write_people(folder, ("Ada", "Bo"), 3, 9)


def guarded(data, out, **guard):
    given = {"model": str(data / "model"), "out": str(out), "device": "cpu", "guard": guard}
    rows = {name: str(data / f"{name}.jsonl") for name in ("forget", "retain")}
    make_guard(MakeGuard.model_validate({**given, **rows}))
    base, _ = load_model(str(data / "model"), device="cpu")
    return load_form(base, str(out))


def ids_of(*texts):
    return [byte_tokenizer()(text, return_tensors="pt").input_ids for text in texts]


def test_adjusted_neurons_do_not_depend_on_batch_or_cache_and_can_be_switched_off(data, tmp_path):
    model = guarded(data, tmp_path / "g", kind="neurons", share=0.2)
    plain, _ = load_model(str(data / "model"), device="cpu")
    (ids,) = ids_of("Where was Ada born, 1? In town")
    with torch.no_grad():
        before, after = plain(ids).logits, model(ids).logits
        assert not torch.allclose(before, after, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, before)
        beside = torch.cat([torch.full_like(ids, PAD), ids])
        beside[0, -4:] = ids[0, :4]
        mask = (beside != PAD).long()
        torch.testing.assert_close(model(beside, attention_mask=mask).logits[1:], after, atol=1e-4, rtol=1e-4)
        first = model(ids[:, :10], use_cache=True)
        rest = model(ids[:, 10:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), after, atol=1e-4, rtol=1e-4)
    assert torch.equal(guarded(data, tmp_path / "again", kind="neurons", share=0.2)(ids).logits, model(ids).logits)


def test_a_key_in_the_cube_ends_the_answer_and_others_are_untouched(data, tmp_path):
    model = guarded(data, tmp_path / "g", kind="key_space", share=1.0)
    plain, _ = load_model(str(data / "model"), device="cpu")
    from alter.data.encoding import encode_prompt
    from alter.data.rows import load_examples

    prompts = [encode_prompt(byte_tokenizer(), e) for e in load_examples(str(data / "forget.jsonl"))]
    ids = torch.tensor([prompts[0]])
    assert model.decide(ids, None).tolist() == [len(prompts[0])]
    with torch.no_grad():
        said = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD)
        assert said[0, ids.shape[1] :].tolist() == [EOS]
        logits, before = model(ids).logits[0], plain(ids).logits[0]
        assert torch.equal(logits[:-1], before[:-1])
        assert logits[-1].argmax() == EOS
        (other,) = ids_of("zzzz QQQ ~~~~ 99999")
        model.settings["half"] = 1e-3
        assert torch.equal(model(other).logits, plain(other).logits)
