"""Steps that keep out of what kept text uses: moments and shares against plain loops, and what a step does to kept outputs."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from alter.distillation import naming
from alter.distillation.protection import Protection, blocks_linears, measured_shares, shares_left
from alter.inference.moments import InputMoments
from pico import PAD, byte_tokenizer, pico

DRAW = np.random.default_rng(0)
ROWS = [DRAW.integers(1, 250, int(DRAW.integers(2, 12))).tolist() for _ in range(40)]


def inputs_of(model, rows):
    """What each linear layer of the blocks reads, row by row and without padding, in float64."""
    double, found = copy.deepcopy(model).double(), {}
    for name, layer in blocks_linears(double).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            double(input_ids=torch.tensor([row]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def naive_shares(moments, leeway):
    values = np.sort(np.linalg.eigvalsh(moments))
    m = leeway * np.median(values)
    return m * np.linalg.inv(moments + m * np.eye(len(moments)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_count_every_token_by_its_weight(dtype):
    layers = {
        "a": nn.Linear(3, 2, bias=False, dtype=dtype),
        "b": nn.Linear(3, 4, dtype=dtype),
        "c": nn.Linear(4, 1, dtype=dtype),
    }
    found = InputMoments(layers)
    draw = torch.Generator().manual_seed(0)
    expected = {name: np.zeros((layer.in_features,) * 2) for name, layer in layers.items()}
    for shape, weights in (((2, 3), [[1, 0.5, 0], [0, 0, 0]]), ((1, 1), [[2]])):
        read = torch.randn(*shape, 3, generator=draw).to(dtype)
        with found.listening(torch.tensor(weights)):
            layers["a"](read)
            hidden = layers["b"](read)
            layers["c"](hidden)
        for name, each in (("a", read), ("b", read), ("c", hidden)):
            for i in range(shape[0]):
                for t in range(shape[1]):
                    x = each[i, t].detach().double().numpy()
                    expected[name] += weights[i][t] * np.outer(x, x)
    layers["a"](torch.ones(1, 3, dtype=dtype))  # heard by nobody
    assert found.total == 3.5
    for name, value in found.sums.items():
        assert value.numpy() == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("leeway", [0.05, 1.0, 20.0])
def test_shares_are_a_plain_inverse(leeway):
    # an odd size, so that numpy's median is an eigenvalue
    mix = np.random.default_rng(1).normal(size=(7, 40)) * np.array([[10, 3, 1, 1, 0.5, 0.2, 0.01]]).T
    moments = mix @ mix.T / 40
    found = shares_left(torch.tensor(moments), leeway)
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(naive_shares(moments, leeway), abs=1e-5)


def test_a_direction_that_nothing_uses_is_free():
    moments = torch.diag(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    found = shares_left(moments, 0.1)
    assert found.diagonal()[1:] == pytest.approx(1.0)
    assert found[0, 0] < 1e-4
    assert torch.equal(shares_left(torch.zeros(3, 3), 0.1), torch.eye(3))


def test_measured_on_all_tokens_and_no_padding():
    model = pico(0)
    layers = blocks_linears(model)
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert not any("lm_head" in name for name in layers)
    found = measured_shares(model, layers, ROWS, 0.5, PAD)
    for name, read in inputs_of(model, ROWS).items():
        moments = (read.T @ read / len(read)).numpy()
        values = np.linalg.eigvalsh(moments)
        m = 0.5 * max(np.quantile(values.clip(0), 0.5), 1e-6 * values[-1])
        assert found[name].numpy() == pytest.approx(m * np.linalg.inv(moments + m * np.eye(len(moments))), abs=1e-3), (
            name
        )


def test_of_many_tokens_every_kth_row_is_read(monkeypatch):
    model = pico(0)
    layers = blocks_linears(model)
    whole, part = (measured_shares(model, layers, rows, 0.5, PAD) for rows in (ROWS, ROWS[::3]))
    monkeypatch.setattr("alter.distillation.protection.MOST_TOKENS", sum(map(len, ROWS)) // 2 - 1)
    found = measured_shares(model, layers, ROWS, 0.5, PAD)
    assert all(torch.equal(found[name], part[name]) for name in layers)
    assert not any(torch.equal(found[name], whole[name]) for name in layers)
    monkeypatch.setattr("alter.distillation.protection.MOST_TOKENS", sum(map(len, ROWS)))
    found = measured_shares(model, layers, ROWS, 0.5, PAD)
    assert all(torch.equal(found[name], whole[name]) for name in layers)


def stepped(model, shares, rate=0.05):
    """A step of Adam on a made-up loss, with the callback around it as the Trainer calls it."""
    guard = Protection(model, shares)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    guard.on_pre_optimizer_step()
    optimizer.step()
    free = {name: p.detach().clone() for name, p in model.named_parameters()}
    guard.on_optimizer_step()
    return free


def test_a_step_is_multiplied_and_the_rest_stays():
    model, before = pico(0), pico(0)
    shares = measured_shares(model, blocks_linears(model), ROWS, 0.1, PAD)
    free = stepped(model, shares)
    moved = torch.zeros(2, dtype=torch.float64)
    for name, now in model.named_parameters():
        old = before.get_parameter(name).detach()
        layer = name.removesuffix(".weight")
        if layer in shares:
            expected = old + (free[name] - old).double() @ shares[layer].double()
            assert now.detach().numpy() == pytest.approx(expected.numpy(), abs=1e-6)
            assert not torch.equal(now, old)
            read = inputs_of(before, ROWS)[layer]
            change, whole = ((each.detach() - old).double() for each in (now, free[name]))
            whole = whole * change.norm() / whole.norm()
            moved += torch.stack([(read @ change.T).square().sum(), (read @ whole.T).square().sum()])
        else:
            assert torch.equal(now, old), name
    # what layers put out for kept rows changes less than by free steps of the same length
    assert moved[0] < 0.7 * moved[1]


def test_of_a_lora_the_product_is_within():
    plain = pico(0)
    shares = measured_shares(plain, blocks_linears(plain), ROWS, 0.1, PAD)
    model = get_peft_model(pico(0), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    begun = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_A." in name}
    free = stepped(model, shares)
    trained = 0
    for name, now in model.named_parameters():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            # both what it began with and its step
            first = begun[name].double() @ shares[layer].double()
            expected = first + (free[name].double() - first) @ shares[layer].double()
            assert now.detach().numpy() == pytest.approx(expected.numpy(), abs=1e-6)
            trained += 1
        assert now.requires_grad == (".lora_" in name)
    assert trained == len(shares)


# Where names stand ----------------------------------------------------------------------------------------------------


def test_tokens_of_names_are_found_in_any_case_and_by_their_beginning():
    tokenizer = byte_tokenizer()
    text = "Adam met ada, ADA's owl and Bo Lee; Lee left."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = naming.named_tokens(tokenizer, ids, ["Ada", "Bo Lee"])
    assert tokenizer.decode(ids) == text
    expected = [False] * len(text)
    for begin, length in ((0, 3), (text.index("ada,"), 3), (text.index("ADA"), 3), (text.index("Bo Lee"), 6)):
        expected[begin : begin + length] = [True] * length
    assert found == expected


@pytest.mark.parametrize(
    ("text", "name", "start"),
    [("Кто такая Анна?", "анна", "Анна"), ("我认识哈利波特吗", "哈利波特", "哈利"), ("ราชาธิราชคือใคร", "ธิราช", "ธิราช")],
)
def test_all_bytes_of_a_name_are_found_in_any_script(text, name, start):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    raw = text.encode()
    assert len(ids) == len(raw)
    place = raw.index(start.encode())
    found = naming.named_tokens(tokenizer, ids, [name])
    assert [k for k, here in enumerate(found) if here] == list(range(place, place + len(name.encode())))
    assert not any(naming.named_tokens(tokenizer, ids, ["Ада"]))


def test_only_the_tokens_of_names_have_gradients_and_nothing_else_differs():
    model, plain = pico(0).double(), pico(0).double()
    layers = naming.first_feed_forwards(model, 0.5)
    assert {name.split(".")[2] for name in layers} == {str(k) for k in range(model.config.num_hidden_layers // 2)}
    assert {name.rsplit(".", 1)[1] for name in layers} == {"gate_proj", "up_proj", "down_proj"}
    place = torch.tensor([[False, True, True, False], [False, False, False, True]])
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
    # by hand: what each layer reads and the gradient of what it puts out
    reads, said = {}, {}
    for name in layers:
        plain.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: (
                reads.update({name: args[0]}),
                said.update({name: out}),
                out.retain_grad(),
            )[-1]
        )
    expected_logits = plain(input_ids=ids).logits
    expected_logits.square().sum().backward()
    at = naming.AtNames(layers)
    at.on(place)
    logits = model(input_ids=ids).logits
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected_logits)
    for name, layer in layers.items():
        expected = sum(
            torch.outer(said[name].grad[b, t], reads[name][b, t]) for b in range(2) for t in range(4) if place[b, t]
        )
        assert layer.weight.grad.numpy() == pytest.approx(expected.detach().numpy(), rel=1e-6, abs=1e-8), name
    other = model.model.layers[-1].mlp.up_proj.weight.grad
    assert other.numpy() == pytest.approx(plain.model.layers[-1].mlp.up_proj.weight.grad.numpy(), rel=1e-6, abs=1e-8)
    at.off()
    assert all("forward" not in vars(layer) for layer in layers.values())


def test_a_repeated_pass_has_the_same_gradients():
    found = []
    for again in (False, True):
        model = pico(0).double()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        layers = naming.first_feed_forwards(model, 0.5)
        at = naming.AtNames(layers)
        at.on(torch.tensor([[False, True, False]]))
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False).logits.square().sum().backward()
        found.append([layer.weight.grad for layer in layers.values()])
    for one, other in zip(*found, strict=True):
        assert one.numpy() == pytest.approx(other.numpy(), rel=1e-6, abs=1e-8)
