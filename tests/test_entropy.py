"""Entropies against loops in float64, at the limits, in bf16, through the head, and their gradients."""

import math

import pytest
import torch

from alter.core.errors import UserError
from alter.logits import entropy
from alter.logits.entropy import (
    check_threshold,
    entropy_from_hidden,
    entropy_from_logits,
    max_entropy,
    shift,
    threshold_from_quantile,
)
from reference import naive_tsallis

ORDERS = [0.3, 0.9995, 1 - 1e-9, 1.0, 1.0005, 1.5, 2.0, 7.0]


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 17), (0, 4), (7, 1000)])
def test_equals_loops(q, shape):
    logits = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4
    expected = [naive_tsallis(row.tolist(), q) for row in logits.reshape(-1, shape[-1])]
    got = entropy_from_logits(logits, q, rows=2)
    assert got.shape == shape[:-1]
    torch.testing.assert_close(got.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("q", ORDERS)
def test_uniform_and_one_hot(q):
    vocabulary = 32000
    assert entropy_from_logits(torch.zeros(1, vocabulary), q).item() == pytest.approx(
        max_entropy(q, vocabulary), rel=2e-5
    )
    certain = torch.full((1, vocabulary), -math.inf)
    certain[0, 3] = 0.0
    assert entropy_from_logits(certain, q).item() == 0.0


def test_oracles_of_the_paper_notes():
    assert max_entropy(1.8, 32000) == pytest.approx(1.2497, abs=1e-4)
    assert max_entropy(1.8333, 32000) == pytest.approx(1.1998, abs=1e-4)
    assert max_entropy(2.0, 32000) == pytest.approx(0.99997, abs=1e-5)


def test_smooth_through_shannon():
    logits = torch.randn(4, 50, dtype=torch.float64) * 3
    orders = [1 - 2e-3, 1 - 1e-3, 1 - 1e-6, 1.0, 1 + 1e-6, 1 + 1e-3, 1 + 2e-3]
    values = torch.stack([entropy_from_logits(logits, q) for q in orders])
    slopes = (values[1:] - values[:-1]) / torch.tensor(orders, dtype=torch.float64).diff()[:, None]
    assert (slopes < 0).all()
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=2e-2, atol=1e-6)


def test_far_apart_logits_do_not_overflow():
    logits = torch.tensor([[0.0, -150.0, -300.0, 5.0]], requires_grad=True)
    for q in (0.3, 0.5, 1.5):
        value = entropy_from_logits(logits, q)
        assert value.item() == pytest.approx(naive_tsallis(logits[0].double().tolist(), q), rel=1e-5)
        value.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("q", [0.5, 1.0, 1.0002, 1.5])
def test_gradient(q):
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: entropy_from_logits(x, q, rows=2), (logits,))


@pytest.mark.parametrize("q", [0.5, 1.0, 1.5, 2.5])
def test_bf16_is_computed_in_fp32(q):
    logits = (torch.randn(5, 4096, generator=torch.Generator().manual_seed(0)) * 5).bfloat16()
    got = entropy_from_logits(logits, q)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, entropy_from_logits(logits.double(), q).float(), rtol=2e-5, atol=1e-6)


def test_nearly_certain_tokens_keep_their_digits():
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    for q in (1.5, 2.0):
        exact = naive_tsallis(logits[0].double().tolist(), q)
        assert entropy_from_logits(logits, q).item() == pytest.approx(exact, rel=1e-3)
        assert exact > 0


@pytest.mark.parametrize("q", [1.25, 1.5, 2.0, 4.0])
def test_a_large_vocabulary_is_summed_in_another_way(q, monkeypatch):
    """Ties, tokens that are ruled out, near certainty, bf16 and fp64, two rows at a time."""
    monkeypatch.setattr(entropy, "LARGE_VOCABULARY", 40)
    monkeypatch.setattr(entropy, "CACHED_BYTES", 2 * 4 * 40)
    logits = torch.randn(11, 40, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 12.0)[:, None]
    logits[1, ::2] = -math.inf
    logits[2] = 0.0
    logits[3], logits[3, 5] = -math.inf, 1.0
    logits[4, 7:9] = logits[4].max() + 12.0
    logits[5, 9] = logits[5].max() + 15.0
    exact = torch.tensor([naive_tsallis(row, q) for row in logits.double().tolist()], dtype=torch.float64)
    assert exact[3] == 0
    assert 0 < exact[5] < 1e-3
    torch.testing.assert_close(entropy_from_logits(logits, q).double(), exact, rtol=3e-6, atol=0)
    torch.testing.assert_close(entropy_from_logits(logits.double(), q), exact, rtol=1e-12, atol=1e-18)
    narrow = logits.bfloat16()
    assert torch.equal(entropy_from_logits(narrow, q), entropy_from_logits(narrow.float(), q))
    # what learns from entropies takes the way that has a gradient
    learned = entropy_from_logits(logits[:3].clone().requires_grad_(), q)
    torch.testing.assert_close(learned.double(), exact[:3], rtol=3e-5, atol=0)
    learned.sum().backward()


def test_through_the_head_in_chunks():
    hidden, weight = torch.randn(2, 7, 8), torch.randn(50, 8)
    seen = []

    def head(rows):
        seen.append(rows.shape[0])
        return rows @ weight.T

    got = entropy_from_hidden(hidden, head, 1.5, rows=4)
    assert seen == [4, 4, 4, 2]
    torch.testing.assert_close(got, entropy_from_logits(hidden @ weight.T, 1.5))


def test_shift_gives_each_token_the_step_that_made_it():
    emitted = torch.arange(8.0).reshape(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    inf = math.inf
    assert shift(emitted, mask).tolist() == [[inf, inf, 1.0, 2.0], [inf, 4.0, inf, inf]]
    assert shift(emitted)[0].tolist() == [inf, 0.0, 1.0, 2.0]
    assert torch.isinf(shift(emitted, torch.zeros(2, 4))).all()


def test_quantile():
    values = torch.tensor([[math.inf, 1.0, 2.0], [3.0, 4.0, 5.0]])
    assert threshold_from_quantile(values, 0.5) == 3.0
    assert threshold_from_quantile(values, 0.875) == pytest.approx(4.5)
    assert threshold_from_quantile(torch.zeros(3), 0.5) > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: entropy_from_logits(torch.zeros(1, 2), 0.0), "`entropy_q` is 0.0"),
        (lambda: entropy_from_logits(torch.zeros(1, 2), math.nan), "`entropy_q` is nan"),
        (lambda: check_threshold(2.0, 1.2, 32000), "entropies end at 1"),
        (lambda: check_threshold(1.9, 1.2, None), "any vocabulary"),
        (lambda: check_threshold(1.5, 0.0, 10), "must be above 0"),
        (lambda: threshold_from_quantile(torch.ones(3), 1.0), "`entropy_quantile` is 1.0"),
        (lambda: threshold_from_quantile(torch.full((2,), math.inf), 0.5), "No token has an entropy"),
    ],
)
def test_errors(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_threshold_that_can_be_reached_passes():
    check_threshold(1.5, 1.2, 32000)
    check_threshold(1.0, 1.2, 32000)
    check_threshold(0.5, 100.0, 32000)
