"""Objectives against the oracles of the literature, loops in float64, their own gradients, bf16 and empty selections."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from alter.groundwork.frozen import top_k
from alter.methods.objectives import (
    CrossEntropy,
    Emitted,
    Hidden,
    InvertedHinge,
    Labelled,
    Reference,
    divergence,
    row_means,
    soft_cross_entropy,
)
from alter.methods.objectives.answers import PreferInvented, PreferRefusal, RandomLabels, Refuse, Substitute
from alter.methods.objectives.hidden import KeepHidden, Misdirect
from alter.methods.objectives.likelihood import (
    NPO,
    CrossEntropyUnlearning,
    GradientAscent,
    Learn,
    NoForget,
    SaturationImportance,
    SimNPO,
    StoppedHinge,
    WeightedAscent,
)
from alter.methods.objectives.retain import Adaptive, Distil, KeepBase, KeepBaseAnswers, NoRetain, Uniform
from alter.methods.objectives.targets import Persona, Reinforced, Undial, WithoutTruth
from reference import (
    naive_divergence,
    naive_inverted_hinge,
    naive_softmax,
    naive_stopped_hinge,
    naive_without,
)

ORACLE = torch.tensor([[2.0, 1, 0, -1], [0, 0, 0, 0], [-1, 3, 0.5, 2]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 3])


@dataclass(frozen=True)
class Batch:
    """What a trainer has of a batch before the objective reads it."""

    logits: torch.Tensor
    labels: torch.Tensor
    high: torch.Tensor
    reference: Reference | None = None
    row: torch.Tensor | None = None
    rows: int = 0
    base_logp: torch.Tensor | None = None
    alternative: "Batch | None" = None


def labelled(objective, batch):
    """The values that the objective makes of all logits at once; an alternative's are negative log-likelihoods."""
    return Labelled(
        objective.per_token(Emitted(batch.logits, batch.labels, batch.reference, objective.needs.runner_up)),
        batch.high,
        batch.row,
        batch.rows,
        batch.base_logp,
        batch.alternative and labelled(CrossEntropy(), batch.alternative),
    )


def loss_of(objective, batch):
    return objective(labelled(objective, batch))


def none_of(dtype=torch.float32, **more):
    """No labelled token at all."""
    return Labelled(torch.zeros(0, dtype=dtype), torch.zeros(0, dtype=torch.bool), **more)


def tokens(n=13, vocabulary=11, seed=0, dtype=torch.float64, k=None, high=None):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) * 3
    base = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(vocabulary, (n,), generator=generator)
    if high is None:
        high = torch.rand(n, generator=generator) < 0.4
    kept = top_k(torch.log_softmax(base, -1), k or vocabulary)
    reference = Reference(kept.ids.long(), kept.logp)
    return Batch(logits.to(dtype).requires_grad_(), labels, high, reference), base


def test_inverted_hinge_oracle_with_gradient():
    logits = ORACLE.clone().requires_grad_()
    loss = loss_of(InvertedHinge(), Batch(logits, LABELS, torch.zeros(3, dtype=torch.bool)))
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
    assert loss_of(InvertedHinge(only_low=only_low), batch).item() == pytest.approx(expected, abs=1e-12)
    for margin in (0.0, 0.3):
        expected = sum(naive_stopped_hinge(rows[i], labels[i], margin) for i in chosen) / len(chosen)
        assert loss_of(StoppedHinge(only_low=only_low, margin=margin), batch).item() == pytest.approx(
            expected, abs=1e-12
        )


def test_stopped_hinge_leaves_a_beaten_token_alone():
    logits = torch.tensor([[0.0, 5.0, 1.0]], requires_grad=True)
    loss_of(StoppedHinge(), Batch(logits, torch.tensor([0]), torch.tensor([False]))).backward()
    assert logits.grad.abs().sum() == 0
    logits = torch.tensor([[5.0, 0.0, 1.0]], requires_grad=True)
    loss_of(StoppedHinge(), Batch(logits, torch.tensor([0]), torch.tensor([False]))).backward()
    assert logits.grad[0, 0] > 0


def test_cross_entropy_and_ascent_equal_loops():
    batch, _ = tokens()
    nll = [
        -math.log(naive_softmax(row)[y]) for row, y in zip(batch.logits.tolist(), batch.labels.tolist(), strict=True)
    ]
    assert loss_of(CrossEntropy(), batch).item() == pytest.approx(sum(nll) / 13, abs=1e-12)
    assert loss_of(GradientAscent(), batch).item() == pytest.approx(-sum(nll) / 13, abs=1e-12)
    low = [x for x, high in zip(nll, batch.high.tolist(), strict=True) if not high]
    assert loss_of(GradientAscent(only_low=True), batch).item() == pytest.approx(-sum(low) / len(low), abs=1e-12)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_divergences_equal_loops(k):
    batch, base = tokens(k=k)
    kept = batch.reference.ids.tolist()
    p = [naive_softmax(row) for row in base.tolist()]
    rows, labels = batch.logits.tolist(), batch.labels.tolist()
    plain = [naive_divergence(p[i], rows[i], set(kept[i])) for i in range(13)]
    torch.testing.assert_close(
        divergence(batch.reference.logp, Emitted(batch.logits, batch.labels, batch.reference)),
        torch.tensor(plain, dtype=torch.float64),
    )
    assert loss_of(KeepBase(), batch).item() == pytest.approx(sum(plain) / 13, abs=1e-10)
    low = [i for i in range(13) if not batch.high[i]]
    removed = {
        # a label outside the kept tokens stays in the tail: there is nothing known to remove
        i: naive_without(p[i], labels[i]) if labels[i] in kept[i] else p[i]
        for i in low
    }
    expected = sum(naive_divergence(removed[i], rows[i], set(kept[i])) for i in low) / len(low)
    assert loss_of(WithoutTruth(), batch).item() == pytest.approx(expected, abs=1e-9)
    hinge = sum(naive_stopped_hinge(rows[i], labels[i], 0.0) for i in low) / len(low)
    assert loss_of(WithoutTruth(hinge=0.7), batch).item() == pytest.approx(expected + 0.7 * hinge, abs=1e-9)


def test_divergence_is_the_published_kl():
    batch, base = tokens()
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(batch.logits, -1), torch.log_softmax(base, -1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(loss_of(KeepBase(), batch), expected)


def test_a_certain_truth_leaves_nothing_to_aim_at():
    certain = Reference(torch.tensor([[2, 0]]), torch.tensor([[0.0, -math.inf]]))
    logits = torch.randn(1, 5, requires_grad=True)
    loss = loss_of(WithoutTruth(), Batch(logits, torch.tensor([2]), torch.tensor([False]), certain))
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
        return loss_of(objective, Batch(logits, batch.labels, batch.high, batch.reference))

    assert torch.autograd.gradcheck(loss, (batch.logits.detach().requires_grad_(),))


@pytest.mark.parametrize("objective", [InvertedHinge(), StoppedHinge(), WithoutTruth(), GradientAscent(only_low=True)])
def test_no_such_token_trains_nothing(objective):
    batch, _ = tokens(high=torch.ones(13, dtype=torch.bool))
    loss = loss_of(objective, batch)
    loss.backward()
    assert loss.item() == 0
    assert batch.logits.grad.abs().sum() == 0


@pytest.mark.parametrize("objective", [InvertedHinge(), StoppedHinge(), CrossEntropy(), KeepBase(), WithoutTruth()])
def test_bf16_is_computed_in_fp32(objective):
    narrow, _ = tokens(vocabulary=500, dtype=torch.bfloat16)
    wide = Batch(narrow.logits.detach().double(), narrow.labels, narrow.high, narrow.reference)
    loss = loss_of(objective, narrow)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_of(objective, wide).item(), rel=1e-5)
    loss.backward()
    assert torch.isfinite(narrow.logits.grad).all()


# ---- objectives over rows -------------------------------------------------------------------------------------------


def with_nll(sums, base_sums, lengths=None):
    """Rows whose labelled tokens have the given summed NLL, and base NLL, spread evenly over each row's tokens."""
    lengths = lengths or [1] * len(sums)
    each = [total / n for total, n in zip(sums, lengths, strict=True) for _ in range(n)]
    base = [total / n for total, n in zip(base_sums, lengths, strict=True) for _ in range(n)]
    # two outcomes: the label has probability exp(-nll)
    logits = torch.tensor([[-x, math.log(-math.expm1(-x))] for x in each], dtype=torch.float64, requires_grad=True)
    row = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    n = len(each)
    return Batch(
        logits,
        torch.zeros(n, dtype=torch.long),
        torch.zeros(n, dtype=torch.bool),
        None,
        row,
        len(sums),
        -torch.tensor(base, dtype=torch.float64),
    )


def test_npo_oracle_with_gradient_weights():
    tokens_ = with_nll([5.0, 20.0], [4.0, 25.0])
    loss = loss_of(NPO(), tokens_)
    assert loss.item() == pytest.approx(16.184736, abs=1e-6)
    assert loss_of(NPO(), with_nll([5.0, 20.0], [5.0, 20.0])).item() == pytest.approx(2 / 0.1 * math.log(2), abs=1e-9)
    loss.backward()
    # d loss / d NLL_b = -W_b / 2, and NLL depends on the label's logit with slope p - 1
    slopes = [math.expm1(-5.0), math.expm1(-20.0)]
    weights = [-2 * tokens_.logits.grad[b, 0].item() / slopes[b] for b in range(2)]
    assert weights == pytest.approx([0.950042, 1.244919], abs=1e-6)


def test_npo_sums_over_a_row_and_simnpo_takes_its_mean():
    """The same sums spread over more tokens: NPO must not change, SimNPO must."""
    assert loss_of(NPO(), with_nll([5.0, 20.0], [4.0, 25.0], [3, 7])).item() == pytest.approx(16.184736, abs=1e-6)
    assert loss_of(SimNPO(), with_nll([5.0, 20.0], [0.0, 0.0], [10, 20])).item() == pytest.approx(0.024723, abs=1e-6)
    assert loss_of(SimNPO(), with_nll([5.0, 20.0], [0.0, 0.0], [5, 10])).item() != pytest.approx(0.024723, abs=1e-3)
    margin = loss_of(SimNPO(beta=2.0, delta=0.3), with_nll([5.0, 20.0], [0.0, 0.0], [10, 20])).item()
    expected = [-2 / 2.0 * math.log(1 / (1 + math.exp(-2.0 * (x - 0.3)))) for x in (0.5, 1.0)]
    assert margin == pytest.approx(sum(expected) / 2, abs=1e-9)


@pytest.mark.parametrize("objective", [PreferRefusal(), PreferInvented()])
def test_dpo_oracle(objective):
    forget, refusal = with_nll([5.0, 20.0], [4.0, 25.0]), with_nll([3.0, 4.0], [6.0, 5.0], [2, 3])
    loss = loss_of(objective, replace(forget, alternative=refusal))
    assert loss.item() == pytest.approx(14.260305, abs=1e-6)


def test_means_of_rows_divide_each_row_by_its_own_count():
    """RMU's masked mean: sums 6 and 1 over 3 tokens and 1 give 1.5; dividing [B] by [B, 1] would give 2.33."""
    values, row = torch.tensor([1.0, 2.0, 3.0, 1.0]), torch.tensor([0, 0, 0, 1])
    assert row_means(values, row, 2).tolist() == [2.0, 1.0]
    assert row_means(values, row, 3).tolist() == [2.0, 1.0, 0.0]
    states = torch.zeros(4, 5, dtype=torch.float64)
    base = values.double()[:, None].sqrt().expand(4, 5)
    assert KeepHidden()(none_of(rows=2, hidden=Hidden(states, row, base))).item() == pytest.approx(1.5, abs=1e-9)


def test_misdirection_equals_a_loop():
    generator = torch.Generator().manual_seed(3)
    states, row = torch.randn(7, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 1, 2])
    objective = Misdirect(c=2.0, seed=5)
    u = objective.direction(6)
    assert u.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert (u > 0).all()
    per_row = []
    for b in range(3):
        of_row = [states[t].tolist() for t in range(7) if row[t] == b]
        distances = [sum((h - 2.0 * float(a)) ** 2 for h, a in zip(x, u, strict=True)) / 6 for x in of_row]
        per_row.append(sum(distances) / len(distances))
    got = objective(none_of(rows=3, hidden=Hidden(states, row)))
    assert got.item() == pytest.approx(sum(per_row) / 3, rel=1e-6)


# ---- objectives over tokens -----------------------------------------------------------------------------------------


def test_weighted_ascents_equal_loops_and_hold_their_weights_still():
    batch, _ = tokens()
    p = [naive_softmax(row)[y] for row, y in zip(batch.logits.tolist(), batch.labels.tolist(), strict=True)]
    wga = -sum(x**0.7 * -math.log(x) for x in p) / 13
    assert loss_of(WeightedAscent(beta=0.7), batch).item() == pytest.approx(wga, abs=1e-12)
    sat = -sum(x**5 * (1 - x) * -math.log(x) for x in p) / 13
    assert loss_of(SaturationImportance(), batch).item() == pytest.approx(sat, abs=1e-12)
    loss_of(SaturationImportance(), batch).backward()
    # d (-w nll) / d z_y = w (1 - p) with w held still
    for i, y in enumerate(batch.labels.tolist()):
        expected = p[i] ** 5 * (1 - p[i]) * (1 - p[i]) / 13
        assert batch.logits.grad[i, y].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("beta", [0.5, 10.0, 30.0])
def test_undial_lowers_the_logit_of_the_true_token(beta):
    batch, base = tokens()
    expected = []
    for z, row, y in zip(base.tolist(), batch.logits.tolist(), batch.labels.tolist(), strict=True):
        lowered = naive_softmax([x - beta * (v == y) for v, x in enumerate(z)])
        p = naive_softmax(row)
        expected.append(-sum(a * math.log(b) for a, b in zip(lowered, p, strict=True)))
    assert loss_of(Undial(beta=beta), batch).item() == pytest.approx(sum(expected) / 13, abs=1e-9)


def certain_base(gap, dtype, k=None):
    """Bases whose first token leads by `gap` nats and more, labelled with it, and a model that is unsure."""
    generator = torch.Generator().manual_seed(9)
    base = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    base[:, 0] = base.amax(-1) + gap
    logits = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    kept = top_k(torch.log_softmax(base.to(dtype), -1), k or 7)
    labels, low = torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool)
    return Batch(logits.to(dtype).requires_grad_(), labels, low, Reference(kept.ids.long(), kept.logp)), base


def cross_entropies(target, logits):
    """Of naive targets, and the gradient of their mean at the logits: (softmax - target) / n."""
    p = [naive_softmax(row) for row in logits.tolist()]
    value = [-math.fsum(a * math.log(b) for a, b in zip(*pair, strict=True)) for pair in zip(target, p, strict=True)]
    return value, [[(b - a) / len(p) for a, b in zip(*pair, strict=True)] for pair in zip(target, p, strict=True)]


@pytest.mark.parametrize(("gap", "beta"), [(5, 30), (20, 10), (20, 19), (20, 30), (60, 90), (95, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_undial_equals_a_loop_however_certain_the_base_and_large_beta(gap, beta, dtype):
    batch, base = certain_base(gap, dtype)
    lowered = batch.reference.lowered(batch.labels, beta)
    assert lowered.logp.exp().sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    target = [naive_softmax([row[0] - beta, *row[1:]]) for row in base.tolist()]
    expected, slopes = cross_entropies(target, batch.logits)
    loss = loss_of(Undial(beta=beta), batch)
    loss.backward()
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=2e-5)
    torch.testing.assert_close(batch.logits.grad.double(), torch.tensor(slopes).double(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("gap", [1, 8, 14, 20, 60, 95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_truth_aims_at_what_is_left_however_certain_the_base(gap, dtype):
    batch, base = certain_base(gap, dtype)
    target = [[0.0, *naive_softmax(row[1:])] for row in base.tolist()]
    expected, slopes = cross_entropies(target, batch.logits)
    entropy = math.fsum(-x * math.log(x) for row in target for x in row if x)
    loss = loss_of(WithoutTruth(), batch)
    loss.backward()
    assert loss.item() == pytest.approx((sum(expected) - entropy) / 4, rel=2e-5)
    torch.testing.assert_close(batch.logits.grad.double(), torch.tensor(slopes).double(), atol=5e-6, rtol=0)


def test_a_tail_within_rounding_is_none_and_a_real_one_takes_part():
    batch, _ = certain_base(20.0, torch.float32, k=3)
    for changed in (batch.reference.without(batch.labels), batch.reference.lowered(batch.labels, 30.0)):
        assert changed.logp.exp().sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    batch, base = certain_base(2.0, torch.float32, k=3)
    kept = batch.reference.ids.tolist()
    for changed, at_label in ((batch.reference.without(batch.labels), 0.0), (None, math.exp(-3.0))):
        got = (changed or batch.reference.lowered(batch.labels, 3.0)).logp.exp().tolist()
        for row, ids, values in zip(base.tolist(), kept, got, strict=True):
            weights = [math.exp(x) * (at_label if v == 0 else 1.0) for v, x in enumerate(row)]
            assert values == pytest.approx([weights[v] / sum(weights) for v in ids], abs=1e-5)
    # a label in the tail leaves what is kept as it is
    other = torch.tensor([next(v for v in range(7) if v not in ids) for ids in kept])
    for changed in (batch.reference.without(other), batch.reference.lowered(other, 3.0)):
        assert torch.equal(changed.logp, batch.reference.logp)


def naive_ceu(logits, labels, row, skip):
    """-sum_v q_v log p_v in float64 with sums over the others alone, and its gradient p - q; means over counted tokens."""
    values, slopes, seen = [], [], {}
    for z, y, r in zip(logits.tolist(), labels.tolist(), row.tolist(), strict=True):
        seen[r] = seen.get(r, 0) + 1
        p = naive_softmax(z)
        q = naive_softmax([x for v, x in enumerate(z) if v != y])
        q.insert(y, 0.0)
        top = max(z)
        total = top + math.log(math.fsum(math.exp(x - top) for x in z))
        counts = seen[r] > skip
        values += [math.fsum(b * (total - x) for b, x in zip(q, z, strict=True) if b)] * counts
        slopes.append([(a - b) * counts for a, b in zip(p, q, strict=True)])
    n = max(len(values), 1)
    return sum(values) / n, [[x / n for x in slope] for slope in slopes]


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("vocabulary", [2, 11, 300])
def test_ceu_equals_a_loop_forward_and_backward(skip, vocabulary):
    batch, _ = tokens(vocabulary=vocabulary)
    # one row has a single token, one none
    row = torch.tensor([0, 0, 0, 0, 0, 1, 3, 3, 3, 3, 4, 4, 4])
    expected, slopes = naive_ceu(batch.logits, batch.labels, row, skip)
    loss = loss_of(CrossEntropyUnlearning(ignore_first_n_answer_tokens=skip), replace(batch, row=row, rows=5))
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(batch.logits.grad, torch.tensor(slopes, dtype=torch.float64), atol=1e-14, rtol=1e-9)


@pytest.mark.parametrize("gap", [-90, -20, 0, 8, 14, 20, 60, 95])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ceu_moves_tokens_that_the_model_is_certain_of(gap, dtype):
    narrow = dtype == torch.bfloat16
    logits = certain_base(gap, torch.float64)[1].to(dtype).requires_grad_()
    labels, row = torch.zeros(4, dtype=torch.long), torch.arange(4)
    expected, slopes = naive_ceu(logits.double(), labels, row, 0)
    objective = CrossEntropyUnlearning(ignore_first_n_answer_tokens=0)
    loss = loss_of(objective, Batch(logits, labels, labels.bool(), row=row, rows=4))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    precise = {"rtol": 1e-2, "atol": 1e-6} if narrow else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits.grad.double(), torch.tensor(slopes, dtype=torch.float64), **precise)
    if gap > 10:
        assert (logits.grad[:, 0] > 0.2).all()


def test_undial_of_a_certain_token_stays_finite_in_single_precision():
    certain = Reference(torch.tensor([[2, 0]]), torch.tensor([[0.0, -30.0]]))
    loss = loss_of(Undial(), Batch(torch.randn(1, 5), torch.tensor([2]), torch.tensor([False]), certain))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_soft_cross_entropy_equals_a_loop(k):
    batch, base = tokens(k=k)
    got = soft_cross_entropy(batch.reference.logp, Emitted(batch.logits, batch.labels, batch.reference)).tolist()
    for i in range(13):
        p, q = naive_softmax(base[i].tolist()), naive_softmax(batch.logits[i].tolist())
        kept = set(batch.reference.ids[i].tolist())
        tail_p, tail_q = (sum(x for v, x in enumerate(d) if v not in kept) for d in (p, q))
        expected = -sum(p[v] * math.log(q[v]) for v in kept) - (tail_p * math.log(tail_q) if tail_p > 1e-6 else 0)
        assert got[i] == pytest.approx(expected, abs=1e-9)


def test_uniform_is_the_divergence_from_the_uniform_distribution():
    batch, _ = tokens(vocabulary=7)
    expected = [sum(1 / 7 * math.log((1 / 7) / x) for x in naive_softmax(row)) for row in batch.logits.tolist()]
    assert loss_of(Uniform(), batch).item() == pytest.approx(sum(expected) / 13, abs=1e-12)


def test_distil_and_the_bases_own_answers_equal_loops():
    batch, base = tokens()
    rows, labels = batch.logits.tolist(), batch.labels.tolist()
    p = [naive_softmax(row) for row in base.tolist()]
    hard = [-math.log(naive_softmax(rows[i])[p[i].index(max(p[i]))]) for i in range(13)]
    assert loss_of(KeepBaseAnswers(), batch).item() == pytest.approx(sum(hard) / 13, abs=1e-10)
    both = [
        -math.log(naive_softmax(rows[i])[labels[i]])
        - sum(a * math.log(b) for a, b in zip(p[i], naive_softmax(rows[i]), strict=True))
        for i in range(13)
    ]
    assert loss_of(Distil(), batch).item() == pytest.approx(sum(both) / 13, abs=1e-9)


def test_the_reinforced_target_turns_away_from_what_rises():
    generator = torch.Generator().manual_seed(2)
    base, learned = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    for i in range(4):
        v = [b - 2.0 * max(0.0, r - b) for b, r in zip(base[i].tolist(), learned[i].tolist(), strict=True)]
        views = {"base": base[i : i + 1], "reinforced": learned[i : i + 1]}
        soft = Reinforced(alpha=2.0, hard=False).target(views, torch.zeros(1))[0].exp().tolist()
        assert soft == pytest.approx(naive_softmax(v), abs=1e-12)
        hard = Reinforced(alpha=2.0).target(views, torch.zeros(1))[0].exp().tolist()
        assert hard == [float(x == max(v)) for x in v]


def test_the_persona_target_rises_in_strength_along_the_row():
    generator = torch.Generator().manual_seed(4)
    views = {
        name: torch.randn(3, 6, generator=generator, dtype=torch.float64) for name in ("base", "expert", "novice")
    }
    objective = Persona(eta=5.0, temperature=1.3, top=4)
    got = objective.target(views, torch.tensor([0.0, 0.5, 1.0]))
    for t, eta in enumerate((1.0, 3.0, 5.0)):
        logp = {
            name: [math.log(x) for x in naive_softmax([z / 1.3 for z in view[t].tolist()])]
            for name, view in views.items()
        }
        tilted = [a - eta * (b - c) for a, b, c in zip(logp["base"], logp["expert"], logp["novice"], strict=True)]
        kept = sorted(range(6), key=lambda v: -tilted[v])[:4]
        p = naive_softmax([tilted[v] for v in kept])
        for v in range(6):
            expected = p[kept.index(v)] if v in kept else 0.0
            assert got[t, v].exp().item() == pytest.approx(expected, abs=1e-12)


def test_the_adaptive_weight_is_the_published_one():
    assert [Adaptive.multiplier(x) for x in (0, 0.3, 0.5, 0.8, 1)] == pytest.approx([1.2, 1.3, 1.5, 2.1, 2.3])
    assert Adaptive.multiplier(-3.0) == 1.2
    assert Adaptive.multiplier(1e6) == 2.3


def test_answers_in_the_alternative_are_what_counts():
    batch, _ = tokens()
    other, _ = tokens(n=5, seed=1)
    for objective in (Refuse(), RandomLabels()):
        assert loss_of(objective, replace(batch, alternative=other)).item() == pytest.approx(
            loss_of(CrossEntropy(), other).item()
        )
    assert loss_of(Learn(), batch).item() == pytest.approx(loss_of(CrossEntropy(), batch).item())
    # a substitute is learned, and the answer itself is no longer the likeliest
    rows, labels = batch.logits.tolist(), batch.labels.tolist()
    for only_low in (True, False):
        beaten = [naive_stopped_hinge(rows[i], labels[i], 0.0) for i in range(13) if not (only_low and batch.high[i])]
        expected = loss_of(CrossEntropy(), other).item() + 0.7 * sum(beaten) / len(beaten)
        objective = Substitute(hinge=0.7, only_low=only_low)
        found = loss_of(objective, replace(batch, alternative=other)).item()
        assert found == pytest.approx(expected, abs=1e-12)
        assert not objective.needs.asked
        # what its prompt says as well is no secret
        asked = torch.arange(13) % 3 == 0
        sparing = objective.model_copy(update={"spare": True})
        assert sparing.needs.asked
        spared = [
            naive_stopped_hinge(rows[i], labels[i], 0.0)
            for i in range(13)
            if not asked[i] and not (only_low and batch.high[i])
        ]
        of_all = replace(labelled(objective, replace(batch, alternative=other)), asked=asked)
        expected = loss_of(CrossEntropy(), other).item() + 0.7 * sum(spared) / len(spared)
        assert sparing(of_all).item() == pytest.approx(expected, abs=1e-12)
        # all of it said: the substitute alone counts
        said = sparing(replace(of_all, asked=torch.ones(13, dtype=torch.bool)))
        assert said.item() == pytest.approx(loss_of(CrossEntropy(), other).item(), abs=1e-12)


@pytest.mark.parametrize(
    "objective", [Undial(), WeightedAscent(beta=0.0), Distil(), Uniform(), KeepBaseAnswers(), NPO(), SimNPO(beta=1.0)]
)
@pytest.mark.parametrize("k", [3, 11])
def test_more_gradients(objective, k):
    batch, base = tokens(n=5, k=k)
    row, base_logp = torch.tensor([0, 0, 1, 2, 2]), torch.log_softmax(base, -1)[:, 0]

    def loss(logits):
        return loss_of(objective, Batch(logits, batch.labels, batch.high, batch.reference, row, 3, base_logp))

    assert torch.autograd.gradcheck(loss, (batch.logits.detach().requires_grad_(),))


@pytest.mark.parametrize(
    "objective",
    [
        *(NPO(), SimNPO(), Undial(), WeightedAscent(), SaturationImportance(), Learn(), Distil(), Uniform()),
        *(KeepBaseAnswers(), NoForget(), NoRetain(), Adaptive(), CrossEntropyUnlearning()),
    ],
)
def test_a_batch_without_tokens_is_zero_with_a_gradient(objective):
    batch, _ = tokens()
    batch = replace(batch, row=torch.zeros(13, dtype=torch.long), rows=0, base_logp=torch.zeros(13))
    nothing = replace(
        batch,
        logits=batch.logits[:0],
        labels=batch.labels[:0],
        high=batch.high[:0],
        reference=batch.reference.at(slice(0, 0)),
        row=batch.row[:0],
        base_logp=batch.base_logp[:0],
    )
    loss = loss_of(objective, nothing)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("objective", [NPO(), SimNPO(), Undial(), WeightedAscent(), SaturationImportance(), Uniform()])
def test_more_bf16_is_computed_in_fp32(objective):
    narrow, base = tokens(vocabulary=500, dtype=torch.bfloat16)
    extra = {"row": torch.arange(13) // 4, "rows": 4, "base_logp": torch.log_softmax(base, -1)[:, 0].float()}
    narrow = replace(narrow, **extra)
    wide = replace(narrow, logits=narrow.logits.detach().double())
    loss = loss_of(objective, narrow)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_of(objective, wide).item(), rel=1e-5)
