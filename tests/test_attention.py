"""Attention of training: on a CPU in 16 bits it is the float32 one, forward and backward; elsewhere nothing changes."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alter.training import attention
from alter.training.attention import attend, attention_for_training
from pico import pico

LENGTHS = (7, 3, 5)


def naive(query, key, value, lengths, groups):
    """Loops in float64 over rows, heads and tokens; what is filled up is left at zero."""
    query, key, value = (x.detach().double().requires_grad_() for x in (query, key, value))
    rows, heads, width, size = query.shape
    out = torch.zeros(rows, width, heads, size, dtype=torch.float64)
    for b in range(rows):
        for h in range(heads):
            for t in range(lengths[b]):
                scores = torch.stack([query[b, h, t] @ key[b, h // groups, s] for s in range(t + 1)]) * size**-0.5
                out[b, t, h] = scores.softmax(0) @ value[b, h // groups, : t + 1]
    return out, (query, key, value)


def given(dtype, heads=4, kept=2, size=8):
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS)
    query, key, value = (
        torch.randn(len(LENGTHS), n, width, size, generator=generator).to(dtype).requires_grad_()
        for n in (heads, kept, kept)
    )
    mask = torch.full((len(LENGTHS), 1, width, width), float("-inf")).triu(1).repeat(1, 1, 1, 1)
    for b, length in enumerate(LENGTHS):
        mask[b, :, :length, length:] = float("-inf")
        # a row that is filled up sees itself, so that no softmax is empty
        mask[b, :, length:] = float("-inf")
        mask[b, :, length:, 0] = 0
    return query, key, value, mask.to(dtype)


class Layer(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("boolean", [False, True])
def test_forward_and_backward_are_those_of_loops(boolean, autocast, monkeypatch):
    query, key, value, mask = given(torch.bfloat16)
    numbers = []
    real = attention.sdpa_attention_forward

    def spied(*args, **kwargs):
        out, weights = real(*args, **kwargs)
        numbers.append(out.dtype)
        return out, weights

    monkeypatch.setattr(attention, "sdpa_attention_forward", spied)
    weights = torch.randn(len(LENGTHS), max(LENGTHS), 4, 8, generator=torch.Generator().manual_seed(1)).double()
    for b, length in enumerate(LENGTHS):
        weights[b, length:] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, _ = attend(Layer(), query, key, value, mask == 0 if boolean else mask)
    assert out.dtype == torch.bfloat16
    assert numbers == [torch.float32]
    (out.double() * weights).sum().backward()
    expected, leaves = naive(query, key, value, LENGTHS, 2)
    (expected * weights).sum().backward()
    for b, length in enumerate(LENGTHS):
        # one rounding to 16 bits, at the end
        torch.testing.assert_close(out[b, :length].double(), expected[b, :length], rtol=2**-8, atol=1e-6)
    for own, leaf in zip((query, key, value), leaves, strict=True):
        # the gradient of the outcome is rounded on the way in, that of the inputs on the way out
        torch.testing.assert_close(own.grad.double(), leaf.grad, rtol=2**-6, atol=2**-8)


def test_without_a_gradient_nothing_changes():
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(2))
    model = pico().to(torch.bfloat16)
    with torch.no_grad():
        plain = model(ids).logits
        with attention_for_training():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
            assert torch.equal(model(ids).logits, plain)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not attend
    wide = pico()
    before = wide(ids, labels=ids).loss
    with attention_for_training():
        assert torch.equal(wide(ids, labels=ids).loss, before)


def test_gradients_of_a_model_are_no_farther_from_those_of_float32():
    ids = torch.randint(0, 250, (4, 40), generator=torch.Generator().manual_seed(3))

    def gradients(dtype):
        model = pico().to(dtype)
        model(ids, labels=ids).loss.backward()
        return torch.cat([p.grad.double().flatten() for name, p in model.named_parameters() if "self_attn" in name])

    exact, plain = gradients(torch.float32), gradients(torch.bfloat16)
    with attention_for_training():
        own = gradients(torch.bfloat16)
    assert not torch.equal(own, plain)
    assert (own - exact).norm() < 1.05 * (plain - exact).norm()
