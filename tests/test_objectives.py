"""Objectives against the oracles of the literature, loops in float64, their own gradients, bf16 and empty selections."""

import math

import pytest
import torch

from alter.frozen import top_k
from alter.objectives import (
    CrossEntropy,
    GradientAscent,
    InvertedHinge,
    KeepBase,
    Labelled,
    Reference,
    StoppedHinge,
    WithoutTruth,
    divergence,
)
from reference import (
    naive_divergence,
    naive_inverted_hinge,
    naive_softmax,
    naive_stopped_hinge,
    naive_without,
)

ORACLE = torch.tensor([[2.0, 1, 0, -1], [0, 0, 0, 0], [-1, 3, 0.5, 2]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 3])


def tokens(n=13, vocabulary=11, seed=0, dtype=torch.float64, k=None, high=None):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) * 3
    base = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(vocabulary, (n,), generator=generator)
    if high is None:
        high = torch.rand(n, generator=generator) < 0.4
    kept = top_k(torch.log_softmax(base, -1), k or vocabulary)
    reference = Reference(kept.ids.long(), kept.logp)
    return Labelled(logits.to(dtype).requires_grad_(), labels, high, reference), base


def test_inverted_hinge_oracle_with_gradient():
    logits = ORACLE.clone().requires_grad_()
    loss = InvertedHinge()(Labelled(logits, LABELS, torch.zeros(3, dtype=torch.bool)))
    assert loss.item() == pytest.approx(0.992171, abs=1e-6)
    loss.backward()
    expected = [
        [0.381821, -0.333302, -0.035470, -0.013049],
        [-0.25, 0.25, 0, 0],
        [0.005370, -0.387857, 0.024068, 0.358418],
    ]
    torch.testing.assert_close(3 * logits.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("only_low", [True, False])
@pytest.mark.parametrize("vocabulary", [2, 11, 300])
def test_hinges_equal_loops(only_low, vocabulary):
    batch, _ = tokens(vocabulary=vocabulary)
    chosen = [i for i in range(13) if not (only_low and batch.high[i])]
    rows, labels = batch.logits.tolist(), batch.labels.tolist()
    expected = sum(naive_inverted_hinge(rows[i], labels[i]) for i in chosen) / len(chosen)
    assert InvertedHinge(only_low=only_low)(batch).item() == pytest.approx(expected, abs=1e-12)
    for margin in (0.0, 0.3):
        expected = sum(naive_stopped_hinge(rows[i], labels[i], margin) for i in chosen) / len(chosen)
        assert StoppedHinge(only_low=only_low, margin=margin)(batch).item() == pytest.approx(expected, abs=1e-12)


def test_stopped_hinge_leaves_a_beaten_token_alone():
    logits = torch.tensor([[0.0, 5.0, 1.0]], requires_grad=True)
    StoppedHinge()(Labelled(logits, torch.tensor([0]), torch.tensor([False]))).backward()
    assert logits.grad.abs().sum() == 0
    logits = torch.tensor([[5.0, 0.0, 1.0]], requires_grad=True)
    StoppedHinge()(Labelled(logits, torch.tensor([0]), torch.tensor([False]))).backward()
    assert logits.grad[0, 0] > 0


def test_cross_entropy_and_ascent_equal_loops():
    batch, _ = tokens()
    nll = [
        -math.log(naive_softmax(row)[y]) for row, y in zip(batch.logits.tolist(), batch.labels.tolist(), strict=True)
    ]
    assert CrossEntropy()(batch).item() == pytest.approx(sum(nll) / 13, abs=1e-12)
    assert GradientAscent()(batch).item() == pytest.approx(-sum(nll) / 13, abs=1e-12)
    low = [x for x, high in zip(nll, batch.high.tolist(), strict=True) if not high]
    assert GradientAscent(only_low=True)(batch).item() == pytest.approx(-sum(low) / len(low), abs=1e-12)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_divergences_equal_loops(k):
    batch, base = tokens(k=k)
    kept = batch.reference.ids.tolist()
    p = [naive_softmax(row) for row in base.tolist()]
    rows, labels = batch.logits.tolist(), batch.labels.tolist()
    plain = [naive_divergence(p[i], rows[i], set(kept[i])) for i in range(13)]
    torch.testing.assert_close(divergence(batch.reference, batch.logits), torch.tensor(plain, dtype=torch.float64))
    assert KeepBase()(batch).item() == pytest.approx(sum(plain) / 13, abs=1e-10)
    low = [i for i in range(13) if not batch.high[i]]
    removed = {
        # a label outside the kept tokens stays in the tail: there is nothing known to remove
        i: naive_without(p[i], labels[i]) if labels[i] in kept[i] else p[i]
        for i in low
    }
    expected = sum(naive_divergence(removed[i], rows[i], set(kept[i])) for i in low) / len(low)
    assert WithoutTruth()(batch).item() == pytest.approx(expected, abs=1e-9)
    hinge = sum(naive_stopped_hinge(rows[i], labels[i], 0.0) for i in low) / len(low)
    assert WithoutTruth(hinge=0.7)(batch).item() == pytest.approx(expected + 0.7 * hinge, abs=1e-9)


def test_divergence_is_the_published_kl():
    batch, base = tokens()
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(batch.logits, -1), torch.log_softmax(base, -1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(KeepBase()(batch), expected)


def test_a_certain_truth_leaves_nothing_to_aim_at():
    certain = Reference(torch.tensor([[2, 0]]), torch.tensor([[0.0, -math.inf]]))
    logits = torch.randn(1, 5, requires_grad=True)
    loss = WithoutTruth()(Labelled(logits, torch.tensor([2]), torch.tensor([False]), certain))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    "objective", [InvertedHinge(), StoppedHinge(margin=0.1), CrossEntropy(), KeepBase(), WithoutTruth()]
)
@pytest.mark.parametrize("k", [3, 11])
def test_gradients(objective, k):
    batch, _ = tokens(n=5, k=k)

    def loss(logits):
        return objective(Labelled(logits, batch.labels, batch.high, batch.reference))

    assert torch.autograd.gradcheck(loss, (batch.logits.detach().requires_grad_(),))


@pytest.mark.parametrize("objective", [InvertedHinge(), StoppedHinge(), WithoutTruth(), GradientAscent(only_low=True)])
def test_no_such_token_trains_nothing(objective):
    batch, _ = tokens(high=torch.ones(13, dtype=torch.bool))
    loss = objective(batch)
    loss.backward()
    assert loss.item() == 0
    assert batch.logits.grad.abs().sum() == 0


@pytest.mark.parametrize("objective", [InvertedHinge(), StoppedHinge(), CrossEntropy(), KeepBase(), WithoutTruth()])
def test_bf16_is_computed_in_fp32(objective):
    narrow, _ = tokens(vocabulary=500, dtype=torch.bfloat16)
    wide = Labelled(narrow.logits.detach().double(), narrow.labels, narrow.high, narrow.reference)
    loss = objective(narrow)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(objective(wide).item(), rel=1e-5)
    loss.backward()
    assert torch.isfinite(narrow.logits.grad).all()
