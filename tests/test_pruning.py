"""Pruning attacks: naive twins of what is set to zero, of the inputs' norms, and a run with the table's attacks."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from alter.attacks import pruning
from alter.attacks import run as attacks
from alter.attacks.base import Attack
from alter.attacks.weights import base_linears
from alter.core.errors import UserError
from pico import mixture, pico, save_pico, write_jsonl


def naive(weight, share, norms=None):
    """Which places are zeroed, one after the other."""
    rows = weight.double().abs().tolist()
    zeroed = set()
    if norms is None:
        places = sorted((value, i, j) for i, row in enumerate(rows) for j, value in enumerate(row))
        return {(i, j) for _, i, j in places[: math.floor(share * len(places) + 1e-9)]}
    for i, row in enumerate(rows):
        scored = sorted((value * float(norms[j]), j) for j, value in enumerate(row))
        zeroed |= {(i, j) for _, j in scored[: math.floor(share * len(row) + 1e-9)]}
    return zeroed


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 10)])
def test_what_is_pruned_is_its_naive_twin(shape, share):
    torch.manual_seed(sum(shape))
    weight, norms = torch.randn(shape), torch.rand(shape[1]) * 9
    for found, wanted in (
        (pruning.by_size(weight, share), naive(weight, share)),
        (pruning.by_wanda(weight, norms, share), naive(weight, share, norms)),
    ):
        assert {tuple(place) for place in found.nonzero().tolist()} == wanted


def test_equal_weights_are_pruned_to_the_number():
    assert int(pruning.by_size(torch.ones(4, 5), 0.5).sum()) == 10
    assert pruning.by_wanda(torch.ones(2, 4), torch.ones(4), 0.5).tolist() == [[True, True, False, False]] * 2


def test_input_norms_are_their_naive_twin():
    model, rows = pico(), [[5, 6, 7], [8, 9, 10, 11, 12]]
    name, layer = base_linears(model)[0]
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0][0].tolist()))
    found = pruning.input_norms(model, rows)
    handle.remove()
    # two rows, each token once, no padding
    assert len(seen) == 8
    for j in (0, 7, 31):
        assert found[name][j].item() == pytest.approx(math.sqrt(math.fsum(row[j] ** 2 for row in seen)), rel=1e-5)
    assert set(found) == {name for name, _ in base_linears(model)}
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("wanda", [False, True])
def test_a_turned_layer_is_pruned_as_a_plain_one(wanda):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    norms = pruning.input_norms(model, [[1, 2, 3]]) if wanda else None
    name, layer = base_linears(model)[0]
    before = layer.weight.detach().clone()
    pruning.prune(model, 0.5, norms)
    wanted = naive(before.t(), 0.5, None if norms is None else norms[name])
    assert {(i, j) for i, j in (layer.weight.t() == 0).nonzero().tolist()} == wanted


@pytest.mark.parametrize("turned", [False, True])
def test_magnitudes_prune_the_experts_of_a_mixture(turned):
    model = mixture(turned)
    experts = model.model.layers[0].mlp.experts
    before = [weight.detach().clone() for weight in (experts.gate_up_proj, experts.down_proj)]
    pruning.prune(model, 0.5)
    for new, old in zip((experts.gate_up_proj, experts.down_proj), before, strict=True):
        for each, dense in zip(new.detach(), old, strict=True):
            each, dense = (each.t(), dense.t()) if turned else (each, dense)
            assert {(i, j) for i, j in (each == 0).nonzero().tolist()} == naive(dense, 0.5)


@pytest.mark.parametrize("turned", [False, True])
def test_wanda_weighs_an_experts_inputs_by_the_tokens_that_come_to_it(turned):
    """Beside a twin that asks each expert by itself, token by token; an expert that no token reaches has its magnitudes."""
    model, rows = mixture(turned), [[5, 6, 7], [8, 9]]
    block = model.model.layers[0].mlp
    experts = block.experts
    seen = []
    handle = experts.register_forward_pre_hook(lambda _, given: seen.append([part.clone() for part in given[:2]]))
    norms = pruning.input_norms(model, rows)
    handle.remove()
    sums = {name: [[] for _ in range(3)] for name in ("gate_up_proj", "down_proj")}
    bias = {name: getattr(experts, f"{name}_bias", None) for name in sums}
    with torch.no_grad():
        for states, chosen in seen:
            for state, own in zip(states.flatten(0, -2), chosen, strict=True):
                for e in own.tolist():
                    weight = experts.gate_up_proj[e].t() if not turned else experts.gate_up_proj[e]
                    inner = experts._apply_gate(
                        state @ weight + (0 if bias["gate_up_proj"] is None else bias["gate_up_proj"][e])
                    )
                    sums["gate_up_proj"][e].append(state)
                    sums["down_proj"][e].append(inner)
    for name, found in sums.items():
        for e, inputs in enumerate(found):
            wanted = (
                torch.stack(inputs).double().pow(2).sum(0).sqrt()
                if inputs
                else torch.ones_like(norms[f"model.layers.0.mlp.experts.{name}"][e]).double()
            )
            torch.testing.assert_close(
                norms[f"model.layers.0.mlp.experts.{name}"][e].double(), wanted, rtol=1e-4, atol=1e-6
            )
    before = experts.down_proj.detach().clone()
    pruning.prune(model, 0.5, norms)
    for e in range(3):
        new, old = (each.t() if turned else each for each in (experts.down_proj[e].detach(), before[e]))
        assert {(i, j) for i, j in (new == 0).nonzero().tolist()} == naive(
            old, 0.5, norms["model.layers.0.mlp.experts.down_proj"][e]
        )


def test_pruning_leaves_the_head_and_the_rest():
    model, before = pico(), pico()
    count = pruning.prune(model, 0.2)
    inside = dict(base_linears(model))
    assert count == sum(int(0.2 * layer.weight.numel() + 1e-9) for layer in inside.values())
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        changed = name.removesuffix(".weight") in inside
        assert torch.equal(new, old) is not changed
    with pytest.raises(UserError, match="no linear layer"):
        pruning.prune(_headless(), 0.5)


def _headless():
    model = pico(num_hidden_layers=1)
    model.model.layers = torch.nn.ModuleList()
    return model


def test_a_plain_checkpoint_is_attacked_by_pruning(tmp_path):
    for name, seed in (("original", 0), ("retrained", 1), ("distilled", 2)):
        save_pico(tmp_path / name, seed=seed)
    rows = write_jsonl(
        tmp_path / "f.jsonl", [{"question": f"Who is {i}?", "answer": f"{i}, a man."} for i in range(6)]
    )
    other = write_jsonl(
        tmp_path / "o.jsonl", [{"question": f"What is {i}?", "answer": f"{i} and one."} for i in range(4)]
    )
    found = attacks.attack(
        Attack.model_validate(
            {
                "model": str(tmp_path / "distilled"), "original": str(tmp_path / "original"), "forget": str(rows),
                "retrained": str(tmp_path / "retrained"), "out": str(tmp_path / "out"), "max_new_tokens": 4,
                "attacks": ["prune_20,wanda_50"], "relearn": {"rows": 2, "benign": str(other)}, "device": "cpu",
            }
        )
    )  # fmt: skip
    made = {(r.extra.get("attack"), r.model) for r in found}
    assert {("prune_20", "unlearned"), ("wanda_50", "retrained"), ("wanda_50", "original")} <= made
    recovered = [r for r in found if r.metric.startswith("attack_recovered")]
    assert {r.extra["attack"] for r in recovered} == {"prune_20", "wanda_50"}
