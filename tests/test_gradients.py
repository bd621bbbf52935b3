"""GRU, RepSelect and KUDA: rules for gradients by hand and against loops, causal tracing, steps, resuming."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.groundwork import probes, tracing
from alter.methods.gradients import NullSpace, Rectified, Selective, collapsed, free_directions
from alter.methods.objectives import Hidden, Labelled
from alter.methods.objectives.hidden import Deviate
from alter.training import loss
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import PAD, pico, run_on, save_pico, write_people
from test_distributed import losses_of


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- the rules -------------------------------------------------------------------------------------------------------


def test_gru_by_hand():
    rule, state = Rectified(decay=0.8), {}
    # two parameters count as one vector: <g, m> = 0.8 (1 * -3 + 1 * 1) < 0, and g - <g, m> / <m, m> m = g + 0.25 m / 0.8
    forget, rest = {"a": double(1.0), "b": double(1.0)}, {"a": double(-3.0), "b": double(1.0)}
    got = rule.edit(forget, rest, {}, state)
    assert (got["a"].item(), got["b"].item()) == pytest.approx((1 - 0.6, 1 + 0.2))
    # what is left is at right angles to the retain gradient
    assert -3 * got["a"].item() + got["b"].item() == pytest.approx(0, abs=1e-12)
    assert (state["a"].item(), state["b"].item()) == pytest.approx((-2.4, 0.8))
    # m = 0.8 * (5, 0) + 0.2 * (-2.4, 0.8), which agrees with g: nothing changes
    got = rule.edit(forget, {"a": double(5.0), "b": double(0.0)}, {}, state)
    assert (got["a"].item(), got["b"].item()) == (1.0, 1.0)
    assert (state["a"].item(), state["b"].item()) == pytest.approx((3.52, 0.16))
    # with `joins` the whole gradient is held against it: (1 - 3, 1 + 1) agrees with (-3, 1)
    got = Rectified(joins=True).edit(forget, rest, {}, {})
    assert (got["a"].item(), got["b"].item()) == (-2.0, 2.0)


def test_kudas_projection_by_hand():
    # eigenvalues 4, 1 and 0.001 along the axes: at 0.3 the last two are free
    free = free_directions(torch.diag(double(4.0, 0.001, 1.0)), 0.3)
    got = NullSpace().edit({"w": torch.ones(2, 3)}, {"w": torch.full((2, 3), 0.5)}, {"w": free}, {})
    torch.testing.assert_close(got["w"], torch.tensor([[0.5, 1.5, 1.5]] * 2))
    # a parameter that nothing is known of keeps its gradient
    assert NullSpace().edit({"b": double(1.0)}, {"b": double(2.0)}, {}, {})["b"].item() == 3.0
    assert free_directions(torch.eye(3, dtype=torch.float64), 0.5).shape == (3, 0)


def naive_collapse(gradient, components):
    """Each side's components one after the other, in float64."""
    U, S, Vh = torch.linalg.svd(gradient.double())
    rest = gradient.double().clone()
    for i in range(components):
        v = Vh[i]
        for row in rest:
            row -= (1 - S[components - 1] / S[i]) * (row @ v) * v
    for i in range(components):
        u = U[:, i]
        for column in rest.t():
            column -= (1 - S[components - 1] / S[i]) * (column @ u) * u
    return rest


def test_repselects_collapse_by_hand_and_against_a_loop():
    # singular values 4, 2, 1; two are taken, in units of 2: the first counts half on each side, 4 / 2 / 2
    got = collapsed(torch.diag(torch.tensor([4.0, 2.0, 1.0])), 2, 0)
    torch.testing.assert_close(got, torch.diag(torch.tensor([1.0, 2.0, 1.0])), atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 4, generator=generator) * torch.tensor([8.0, 4.0, 2.0, 1.0])
    for components in (1, 3, 4, 9):
        expected = naive_collapse(gradient, min(components, 4))
        torch.testing.assert_close(collapsed(gradient, components, 0).double(), expected, atol=1e-4, rtol=1e-4)
    # directions of nothing but rounding are not taken: of rank 1 the one there is stays as it is
    outer = torch.outer(torch.arange(1.0, 7.0), torch.ones(4))
    torch.testing.assert_close(collapsed(outer, 4, 0), outer, atol=1e-4, rtol=1e-4)
    assert not collapsed(torch.zeros(3, 3), 2, 0).any()


def test_deviation_by_hand_against_a_loop_and_its_gradient():
    row = torch.tensor([0, 0, 1])
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    tokens = Labelled(torch.zeros(0), torch.zeros(0, dtype=torch.bool), None, 2, hidden=Hidden(states, row, base))
    # cosines 1, 0 and -1: the rows' means are 1.5 and 0
    assert Deviate(noise=0.0)(tokens).item() == pytest.approx(0.75)
    objective = Deviate(noise=0.5, seed=3)
    u = objective.direction(2).tolist()
    assert math.hypot(*u) == pytest.approx(1)
    total = [0.0, 0.0]
    for h, b, r in zip(states.tolist(), base.tolist(), row.tolist(), strict=True):
        aim = [x + 0.5 * math.hypot(*b) * y for x, y in zip(b, u, strict=True)]
        total[r] += 1 + (h[0] * aim[0] + h[1] * aim[1]) / math.hypot(*h) / math.hypot(*aim)
    value = objective(tokens)
    assert value.item() == pytest.approx((total[0] / 2 + total[1]) / 2)
    value.backward()
    assert torch.autograd.gradcheck(
        lambda s: objective(Labelled(tokens.values, tokens.high, None, 2, hidden=Hidden(s, row, base))), states
    )
    # at the base's own states there is a gradient, which the cosine alone would not have
    same = base.clone().requires_grad_()
    for noise, moves in ((0.0, False), (0.1, True)):
        made = Labelled(tokens.values, tokens.high, None, 2, hidden=Hidden(same, row, base))
        (grad,) = torch.autograd.grad(Deviate(noise=noise)(made), same)
        assert bool(grad.abs().max() > 1e-9) is moves


# ---- what is measured ------------------------------------------------------------------------------------------------

ROWS = [
    Encoded([5, 9, 3, 7], [-100, -100, 3, 7], 2),
    Encoded([8, 2, 6], [-100, 2, 6], 1),
    Encoded([4, 4], [-100, 4], 1),
]


def test_inputs_of_layers_against_a_loop():
    model = pico()
    layer = model.model.layers[1].mlp.down_proj
    found = probes.input_covariances(model, {"w": layer}, ROWS, batch=2, pad_token_id=PAD, label="")["w"]
    expected, tokens = torch.zeros(48, 48, dtype=torch.float64), 0
    for row in ROWS:
        seen = []
        handle = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
        with torch.no_grad():
            model(torch.tensor([row.input_ids]))
        handle.remove()
        for state in seen[0].double():
            expected += torch.outer(state, state)
            tokens += 1
    torch.testing.assert_close(found, expected / tokens, atol=1e-5, rtol=1e-4)


def test_elicited_gradients_against_a_model_with_the_factors_added():
    model = pico()
    before = copy.deepcopy(model.state_dict())
    layer = model.model.layers[0].mlp.up_proj
    given = dict(batch=3, seed=0, pad_token_id=PAD, r=2, scaling=0.5)
    plain = probes.elicited_gradients(model, {"w": layer}, ROWS, learning_rate=1e-12, **given)["w"]
    got = probes.elicited_gradients(model, {"w": layer}, ROWS, learning_rate=3.0, **given)["w"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def gradient(weight):
        other = copy.deepcopy(model)
        own = other.model.layers[0].mlp.up_proj
        own.weight = nn.Parameter(weight)
        nll = []
        for row in ROWS:
            logp = torch.log_softmax(other(torch.tensor([row.input_ids])).logits[0], -1)
            nll += [-logp[t - 1, y] for t, y in enumerate(row.labels) if y != -100]
        torch.stack(nll).mean().backward()
        return own.weight.grad

    weight = layer.weight.detach()
    torch.testing.assert_close(plain, -gradient(weight.clone()), atol=1e-6, rtol=1e-4)
    # all rows in one batch: B = -rate * scaling * G A^T after one step, A unchanged
    A = probes.fresh_factors({"w": layer}, 2, torch.Generator().manual_seed(0), "cpu")["w"].A.detach()
    B = -3.0 * 0.5 * gradient(weight.clone()) @ A.t()
    torch.testing.assert_close(got, -gradient(weight + 0.5 * B @ A), atol=1e-5, rtol=1e-3)
    assert not torch.allclose(got, plain, rtol=1e-2)


def naive_recovered(model, rows, window, seed):
    """Row by row and window by window; the noise is drawn in the order of the rows."""
    generator = torch.Generator().manual_seed(seed)
    embedding, count = model.get_input_embeddings(), len(model.model.layers)
    result = [0.0] * (count - window + 1)
    for row in rows:
        states = embedding(torch.tensor([row.input_ids]))
        blurred = states.clone()
        noise = torch.randn(row.prompt_length, states.shape[-1], generator=generator)
        blurred[0, : row.prompt_length] += 3 * embedding.weight.std() * noise

        def likelihood(given, put_back=None, row=row):
            handles = [
                model.model.layers[i].mlp.register_forward_hook(lambda _, __, ___, value=value: value)
                for i, value in (put_back or {}).items()
            ]
            logp = torch.log_softmax(model(inputs_embeds=given).logits[0].double(), -1)
            for handle in handles:
                handle.remove()
            places = [t for t, y in enumerate(row.labels) if y != -100]
            return sum(logp[t - 1, row.labels[t]].item() for t in places) / len(places)

        kept = {}
        handles = [
            layer.mlp.register_forward_hook(lambda _, __, out, i=i, kept=kept: kept.update({i: out}))
            for i, layer in enumerate(model.model.layers)
        ]
        likelihood(states)
        for handle in handles:
            handle.remove()
        for start in range(len(result)):
            chosen = {i: kept[i] for i in range(start, start + window)}
            result[start] += (likelihood(blurred, chosen) - likelihood(blurred)) / len(rows)
    return result


def test_causal_tracing_against_a_loop():
    model = pico(num_hidden_layers=4)
    rows = [ROWS[0], Encoded([8, 2, 6, 1, 3], [-100, -100, -100, 1, 3], 3)]
    with torch.no_grad():
        for window in (1, 2, 4):
            got = tracing.recovered(model, [*rows, ROWS[1]], window, seed=1, pad_token_id=PAD, batch=2)
            assert got == pytest.approx(naive_recovered(model, rows, window, 1), abs=1e-5)
    with pytest.raises(UserError, match="none has one"):
        tracing.recovered(model, [ROWS[1]], 1, seed=0, pad_token_id=PAD)
    with pytest.raises(UserError, match="4 blocks: give fewer"):
        tracing.recovered(model, rows, 5, seed=0, pad_token_id=PAD)


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    save_pico(folder / "model", max_position_embeddings=256, num_hidden_layers=4)
    return write_people(folder, ("Ada", "Bo"), 3, 9)


def settings(data, out, method, **changes):
    given = {**run_on(data, out), "method": method, "batch_size": 2, "gradient_accumulation_steps": 1, "epochs": 1}
    return Unlearn.model_validate({**given, "keep_working": True, **changes})


def test_a_step_of_two_batches_has_the_two_gradients_of_their_mean(data, tmp_path, monkeypatch):
    """What the rule gets, against backward passes of each term alone."""
    seen, terms = [], []

    def edit(self, forget, rest, known, state):
        # what is returned is clipped in place
        seen.append([{name: value.clone() for name, value in side.items()} for side in (forget, rest)])
        return forget

    monkeypatch.setattr(Rectified, "edit", edit)
    real = loss.UnlearnTrainer._objectives

    def spied(self, batch, places, values, states):
        result = real(self, batch, places, values, states)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        grads = [
            torch.autograd.grad(self.parts_of(values, places, batch)[i], weights, retain_graph=True) for i in (0, 1)
        ]
        terms.append(grads)
        return result

    def parts_of(self, values, places, batch):
        run = self.run
        return [
            run.objective(self._labelled("forget", batch, places, values, None)),
            run.retain_objective(self._labelled("retain", batch, places, values, None)),
        ]

    monkeypatch.setattr(loss.UnlearnTrainer, "parts_of", parts_of, raising=False)
    monkeypatch.setattr(loss.UnlearnTrainer, "_objectives", spied)
    unlearn(settings(data, tmp_path / "r", "gru", gradient_accumulation_steps=2, max_steps=1))
    (got,) = seen
    for side in (0, 1):
        for number, value in enumerate(got[side].values()):
            expected = (terms[0][side][number] + terms[1][side][number]) / 2
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)


def test_repselect_moves_by_the_same_gradient_every_step(data, tmp_path):
    # the preset's own million: as many batches as an epoch has
    given = {"gradient_accumulation_steps": 1_000_000, "epochs": 2, "learning_rate": 1e-3}
    out = unlearn(settings(data, tmp_path / "r", "repselect", **given))
    assert json.loads((out / "run.json").read_text())["steps"] == 2
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (data / "model", out / "model")
    )
    from safetensors.torch import load_file

    known = load_file(str(out / "gradient.safetensors"))
    assert len(known) == 4 * 3
    for name, value in after.items():
        expected = before[name] - 2 * 1e-3 * known[name] if name in known else before[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_kuda_trains_the_blocks_that_are_traced_and_leaves_retain_inputs_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "recovered", lambda *_, **__: [0.0, 0.3, 0.1])
    monkeypatch.setattr("alter.training.localization.recovered", lambda *_, **__: [0.0, 0.3, 0.1])
    depths = []
    real = loss.UnlearnTrainer.compute_loss

    def spied(self, *args, **kwargs):
        depths.append(self.depth.block is self.accelerator.unwrap_model(self.model).model.layers[2])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", spied)
    rule = {"kind": "null_space", "relaxation": 0.01}
    plain = {"optimizer": "sgd", "weight_decay": 0.0, "learning_rate": 0.1, "gamma": 0.0, "gradient": rule}
    out = unlearn(settings(data, tmp_path / "r", "kuda", **plain))
    assert all(depths)
    assert depths
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (data / "model", out / "model"))
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    from safetensors.torch import load_file

    known = load_file(str(out / "gradient.safetensors"))
    for name in moved:
        change = (after.get_parameter(name) - before.get_parameter(name)).detach()
        assert change.abs().max() > 1e-7
        # all of it lies in the free directions
        torch.testing.assert_close(change @ known[name] @ known[name].t(), change, atol=1e-6, rtol=1e-3)


def test_gru_goes_on_with_its_running_gradient(data, tmp_path):
    given = {"epochs": 3, "save_steps": 4, "learning_rate": 1e-3, "warmup_epochs": 0.0}
    whole = losses_of(settings(data, tmp_path / "whole", "gru", **given))
    real = loss.UnlearnTrainer.compute_loss

    def breaks(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise SystemExit
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.UnlearnTrainer, "compute_loss", breaks)
        with pytest.raises(SystemExit):
            unlearn(settings(data, tmp_path / "cut", "gru", **given))
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-4" / "gradient.safetensors").is_file()
    rest = losses_of(settings(data, tmp_path / "cut", "gru", **given, resume=True))
    assert rest == pytest.approx(whole[4:], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_checkpointing": True}, "`gradient_checkpointing` would repeat"),
        ({"retain_objective": {"kind": "none"}}, "must not be none"),
        ({"method": "lora_gd", "gradient": {"kind": "selective"}}, "take `adapter.kind` full, not lora"),
        ({"method": "rmu", "adapter": {"traced": 2}}, "leave one out"),
    ],
)
def test_what_does_not_go_together(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(data, tmp_path, **{"method": "gru", **changes})


def test_rules_that_leave_next_to_nothing_say_so(capsys):
    class Passes:
        def __init__(self, made):
            self.made = made

        def input_covariances(self):
            return {"w": self.made.double(), "v": torch.eye(2, dtype=torch.float64)}

        def elicited(self, *_):
            return {"w": self.made, "v": torch.ones(9, 9)}

    spread = torch.diag(torch.tensor([4.0, 2.0, 0.002]))
    NullSpace(relaxation=1e-3).statistics(Passes(spread), 0)
    said = " ".join(capsys.readouterr().err.split())
    # of w one direction in three is free, of v, whose inputs are alike in all, none of two
    assert "`gradient.relaxation` 0.001 leaves 0 of 2 directions of v free (1 of 2 weights are like that)" in said
    assert "such as to 0.01." in said
    Selective(components=8).statistics(Passes(spread), 0)
    said = " ".join(capsys.readouterr().err.split())
    assert "`gradient.components` 8 collapses all 3 directions of w (1 of 2 weights are like that)" in said
    assert "such as 1." in said
    NullSpace(relaxation=0.9999).statistics(Passes(spread), 0)
    Selective(components=2).statistics(Passes(spread), 0)
    assert "of w" not in capsys.readouterr().err


def test_what_is_collapsed_is_what_was_elicited():
    class Passes:
        def elicited(self, r, scaling, learning_rate):
            assert (r, scaling, learning_rate) == (8, 1.0, 0.01)
            return {"w": torch.diag(torch.tensor([4.0, 2.0]))}

    found = Selective().statistics(Passes(), 0)
    torch.testing.assert_close(found["w"], torch.diag(torch.tensor([1.0, 2.0])), atol=1e-5, rtol=0)
    got = Selective().edit(
        {"w": torch.ones(2, 2), "b": torch.ones(2)}, {"w": torch.zeros(2, 2), "b": torch.zeros(2)}, found, {}
    )
    assert torch.equal(got["w"], found["w"])
    assert not got["b"].any()
