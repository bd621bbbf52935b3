"""Where LoRA starts: exact decompositions, importance against loops, and a pair of factors that adds nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alter.data.encoding import Encoded
from alter.groundwork.passes import starting_factors
from alter.groundwork.probes import factor_variances, fisher, low_rank, output_covariances, reinforce
from alter.methods.adapters import Beginning, Lora
from alter.methods.initializers import (
    FLOOR,
    Factors,
    Fila,
    Reglu,
    Vila,
    covariance,
    fisher_ratio,
    forget_directions,
    important_part,
    residual_pair,
    top_directions,
    variance,
    variance_product,
)
from alter.methods.places import block_at, blocks, blocks_within
from pico import PAD, pico


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 9, 7, 6):
        ids = torch.randint(3, 200, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [-100, -100, *ids[2:]], 2))
    return made


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residual(factors, W, s):
    """What the authors' code freezes in the place of W."""
    return W - s * factors.B @ factors.A


@pytest.mark.parametrize("shape", [(7, 5), (5, 9)])
def test_fila_takes_the_weighted_best_part(shape):
    W, importance, s = random(*shape), random(*shape, seed=1).square(), 2.0
    factors = important_part(W, importance, 3, s)
    row = importance.sum(1).sqrt()
    tail = torch.linalg.svdvals(row[:, None] * W)[3:].norm()
    left = (row[:, None] * residual(factors, W, s)).norm()
    assert left.item() == pytest.approx(tail.item(), rel=1e-3)


def test_reglu_takes_orthonormal_directions_of_the_forget_rows():
    W = random(6, 4)
    Cf, Cr = covariance(random(30, 6, seed=1)), covariance(random(30, 6, seed=2))
    factors = forget_directions(W, Cf, Cr, 2, 0.5)
    torch.testing.assert_close(factors.B.t() @ factors.B, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(factors.A, factors.B.t() @ W)
    delta = 0.5 * Cf - 0.5 * Cr
    values = torch.linalg.eigvalsh(delta)
    assert torch.trace(factors.B.t() @ delta @ factors.B).item() == pytest.approx(values[-2:].sum().item())
    # rows that use direction 0 only: it comes first
    lone = torch.zeros(5, 6)
    lone[:, 0] = 3.0
    assert top_directions(covariance(lone), 1, FLOOR)[0].abs().item() == pytest.approx(1.0)
    # and the others, which no row uses, not at all
    assert top_directions(covariance(lone), 99, FLOOR).shape == (6, 1)
    assert top_directions(Cf, 99, FLOOR).shape == (6, 6)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e5])
def test_reglu_never_takes_a_direction_that_no_row_uses(scale):
    features = scale * random(3, 9)
    C = covariance(torch.cat([features, features[:1]]))
    P = top_directions(C, 7, FLOOR)
    assert P.shape == (9, 3)
    torch.testing.assert_close(P.t() @ P, torch.eye(3, dtype=torch.float64))
    # the span of the rows, found by Gram and Schmidt
    basis = []
    for row in features:
        for other in basis:
            row = row - (row @ other) * other
        basis.append(row / row.norm())
    torch.testing.assert_close(P @ P.t(), sum(b[:, None] * b for b in basis), rtol=1e-6, atol=1e-6)
    energy = [float(P[:, i] @ C @ P[:, i]) for i in range(3)]
    assert energy == sorted(energy, reverse=True)
    assert min(energy) > 2 * FLOOR


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.7])
def test_what_the_forget_rows_leave_of_reglus_rank_starts_as_loras_own(beta):
    W = random(9, 4)
    Cf, Cr = covariance(random(2, 9, seed=1)), covariance(random(3, 9, seed=2))
    factors = forget_directions(W, Cf, Cr, 5, beta, torch.Generator().manual_seed(0))
    assert (factors.A.shape, factors.B.shape) == ((5, 4), (9, 5))
    Q = factors.B[:, :2]
    torch.testing.assert_close(Q.t() @ Q, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(factors.A[:2], Q.t() @ W)
    delta = (1 - beta) * Cf - beta * Cr
    assert torch.linalg.eigvalsh(delta)[-2:].sum().item() == pytest.approx(torch.trace(Q.t() @ delta @ Q).item())
    assert factors.B[:, 2:].abs().sum() == 0
    assert 0 < factors.A[2:].abs().min() < factors.A[2:].abs().max() <= 1 / 2
    # rows that use everything leave nothing out, whatever is best to keep away from
    all_used = forget_directions(W, covariance(random(2, 9, seed=1)), covariance(random(30, 9, seed=2)), 5, beta)
    torch.testing.assert_close(all_used.B.t() @ all_used.B, torch.eye(5, dtype=torch.float64))


def test_reglus_retain_directions_are_no_more_than_its_rows(rows):
    model, layers = pico(), Lora(target_modules=["v_proj"]).layers(pico())
    layers = {name: model.get_submodule(name) for name in layers}
    common = {"r": 3, "scaling": 2.0, "batch": 2, "seed": 0, "pad_token_id": PAD}
    start, away = starting_factors(model, layers, Reglu(), rows[:1], rows[1:], **common)
    seen = output_covariances(model, layers, rows[1:], batch=2, pad_token_id=PAD, label="")
    for name, P in away.items():
        assert P.shape == (16, 3), name
        assert all(float(p.double() @ seen[name] @ p.double()) > 2 * FLOOR for p in P.t()), name
        # one forget row is one direction; the rest of the rank adds nothing before it is trained
        assert (start[name].B.abs().sum(0) > 0).tolist() == [True, False, False], name
        assert (start[name].A.abs().sum(1) > 0).all(), name
    first, second = (pair.A[1:] for pair in start.values())
    assert not torch.equal(first, second)


def test_statistics_equal_loops():
    H = random(5, 3)
    expected = [
        [math.fsum(H[k, i] * H[k, j] for k in range(5)) / 5 + 1e-4 * (i == j) for j in range(3)] for i in range(3)
    ]
    torch.testing.assert_close(covariance(H), torch.tensor(expected, dtype=torch.float64))
    total, squares = torch.tensor([6.0, 3.0]), torch.tensor([14.0, 3.0])
    assert variance(total, squares, 3).tolist() == pytest.approx([14 / 3 - 4, 0.0], abs=1e-6)
    b, a = random(4, 2).square(), random(2, 3, seed=1).square()
    plain = variance_product(b, a, 7.0, normalise=False)
    assert plain[1, 2].item() == pytest.approx((b[1, 0] * a[0, 2] + b[1, 1] * a[1, 2]).item() / 7)
    assert variance_product(b, a, 7.0, normalise=True).mean().item() == pytest.approx(1.0)
    assert fisher_ratio(torch.tensor(2.0), torch.tensor(3.0)).item() == pytest.approx(2 / (3 + 1e-5))


def test_a_pair_adds_nothing_and_then_what_a_residual_base_would():
    W, s = random(6, 4), 2.0
    start = Factors(random(2, 4, seed=1), random(6, 2, seed=2))
    pair = residual_pair(start)
    assert (pair.B @ pair.A).abs().max() < 1e-14
    moved = Factors(start.A + 0.1 * random(2, 4, seed=3), start.B + 0.1 * random(6, 2, seed=4))
    pair.A[:2], pair.B[:, :2] = moved.A, moved.B
    residual_base = residual(start, W, s) + s * moved.B @ moved.A
    torch.testing.assert_close(W + s * pair.B @ pair.A, residual_base)


def test_fisher_equals_a_loop_over_batches(rows):
    model = pico()
    layers = Lora(target_modules=["q_proj", "down_proj"]).layers(model)
    assert len(layers) == 4
    got = fisher(model, layers, rows, batch=2, pad_token_id=PAD, label="")
    name = "model.layers.1.mlp.down_proj"
    total, tokens = torch.zeros_like(layers[name].weight), 0
    for pair in (rows[:2], rows[2:]):
        # row by row, without padding
        nll, n = 0.0, 0
        for row in pair:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
            for t in range(2, len(row.input_ids)):
                nll = nll - torch.log_softmax(logits[t - 1], -1)[row.input_ids[t]]
                n += 1
        (grad,) = torch.autograd.grad(nll / n, [layers[name].weight])
        total, tokens = total + n * grad**2, tokens + n
    torch.testing.assert_close(got[name], total / tokens, rtol=1e-3, atol=1e-9)
    assert all(p.requires_grad for p in model.parameters())


def test_output_covariance_leaves_padding_out(rows):
    model = pico()
    layers = Lora(target_modules=["v_proj"]).layers(model)
    got = output_covariances(model, layers, rows, batch=4, pad_token_id=PAD, label="")
    # padding has a zero embedding, and something to say from the second block on
    name = "model.layers.1.self_attn.v_proj"
    sums = []
    for row in rows:
        seen = []
        handle = layers[name].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0].double().sum(0)))
        with torch.no_grad():
            model(input_ids=torch.tensor([row.input_ids]))
        handle.remove()
        sums += seen
    torch.testing.assert_close(got[name], covariance(torch.stack(sums)), rtol=1e-4, atol=1e-4)


def test_variances_of_factor_gradients_equal_a_loop(rows):
    model = pico()
    layers = Lora(target_modules=["o_proj"], depth=(0.0, 0.4)).layers(model)
    (name,) = layers
    start = {name: Factors(*(0.05 * random(*s).float().requires_grad_() for s in ((2, 32), (32, 2))))}
    got, tokens = factor_variances(
        model, layers, rows, start, scaling=2.0, epochs=1, batch=1, seed=0, pad_token_id=PAD, label=""
    )
    first = second = 0.0
    for row in rows:
        with low_rank(layers, start, 2.0):
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        n = len(row.input_ids) - 2
        nll = -torch.log_softmax(logits[1:-1], -1).gather(-1, torch.tensor(row.input_ids[2:])[:, None]).mean()
        (grad,) = torch.autograd.grad(nll, [start[name].A])
        first, second = first + n * grad, second + n * grad**2
    assert tokens == sum(len(row.input_ids) - 2 for row in rows)
    expected = (second / tokens - (first / tokens) ** 2).clamp_min(0)
    torch.testing.assert_close(got[name].A, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("initializer", [Fila(), Vila(epochs=1), Reglu(rows=2, retain_rank=3)])
def test_an_initialised_adapter_starts_as_the_model_and_moves_one_half(rows, initializer):
    model, ids = pico(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    adapter = Lora(r=2, alpha=4)
    start, away = starting_factors(
        model,
        adapter.layers(model),
        initializer,
        rows[:2],
        rows[2:],
        r=2,
        scaling=2.0,
        batch=2,
        seed=0,
        pad_token_id=PAD,
    )
    assert bool(away) == isinstance(initializer, Reglu)
    tuned = adapter.attach(model, SimpleNamespace(model="base"), Beginning(factors=start))
    with torch.no_grad():
        torch.testing.assert_close(tuned(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    tuned(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in tuned.named_parameters():
        if ".lora_A." in name:
            assert parameter.grad[:2].abs().sum() > 0, name
            assert parameter.grad[2:].abs().sum() == 0, name
        if ".lora_B." in name:
            assert parameter.grad[:, :2].abs().sum() > 0, name
            assert parameter.grad[:, 2:].abs().sum() == 0, name


def test_reinforcement_learns_the_rows_and_leaves_the_model(rows):
    model = pico()
    before = {name: p.clone() for name, p in model.named_parameters()}
    layers = Lora().layers(model)

    def loss():
        total = 0.0
        for row in rows:
            labels = torch.tensor([row.labels])
            total += model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss.item()
        return total

    plain = loss()
    learned = reinforce(
        model, layers, rows, r=4, scaling=2.0, epochs=8, learning_rate=1e-2, batch=2, seed=0, pad_token_id=PAD
    )
    with low_rank(layers, learned, 2.0):
        assert loss() < 0.8 * plain
    assert loss() == plain
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_all_linear_layers_of_the_blocks_are_found():
    every = Lora(target_modules="all-linear").layers(pico())
    assert set(every) == set(Lora().layers(pico()))
    assert len(every) == 14


def test_shares_of_the_depth():
    assert block_at(7.5 / 32, 32) == 7
    assert blocks_within((5 / 32, 8 / 32), 32) == [5, 6, 7]
    assert blocks_within((4 / 32, 8 / 32), 32) == [4, 5, 6, 7]
    assert blocks_within((0.0, 6 / 16), 16) == [0, 1, 2, 3, 4, 5]
    assert blocks_within((5 / 32, 8 / 32), 2) == [0]
    assert blocks(pico()) == ("model.layers", 2)
    assert list(Lora(depth=(0.5, 1.0), target_modules=["up_proj"]).layers(pico())) == ["model.layers.1.mlp.up_proj"]
    assert all(isinstance(layer, nn.Linear) for layer in Lora().layers(pico()).values())
