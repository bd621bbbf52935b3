"""The adapter: gates, gradient isolation, every architecture, checkpointing, saving, several adapters, errors."""

import contextlib
import copy
import io
import json
import threading
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import alter.adapter.routing as routing
from alter import AlterConfig, AlterModel
from alter.adapter import AlterLinear, Routing, base_fingerprint
from alter.adapter.base import same_base
from alter.adapter.hooks import CapturingCheckpoint
from alter.adapter.layers import default_host
from alter.adapter.masked import MaskedLinear
from alter.adapter.plan import Plan, Products, plan
from alter.adapter.routing import expert_gates
from alter.adapter.state import ForwardState
from alter.core.errors import UserError
from reference import naive_gates, naive_masked_linear, naive_pool, naive_previous

LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
# per architecture: class, configuration, the linear layers of a block
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA_LIKE),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA_LIKE),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA_LIKE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA_LIKE),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", LLAMA_LIKE),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LLAMA_LIKE),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA_LIKE),
    "phi": ("PhiForCausalLM", "PhiConfig", {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    "falcon": ("FalconForCausalLM", "FalconConfig", NEOX),
    "opt": ("OPTForCausalLM", "OPTConfig", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"c_attn", "c_proj", "c_fc"}),
}
VOCAB = 61


def tiny(kind="llama", seed=0, layers=3, **extra):
    """A random decoder with lively weights, in eval mode."""
    name, config, _ = ARCHITECTURES[kind]
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind in ("phi", "gpt_neox", "falcon", "opt") else 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "sliding_window": 64,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
        "n_embd": 16,
        "n_head": 4,
        "n_layer": layers,
        "n_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **extra,
    }
    if kind == "gpt2":
        values = {k: v for k, v in values.items() if not k.startswith(("num_", "hidden", "inter", "max_", "head"))}
        values |= {name: extra.get(name, 0.0) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if kind == "falcon":
        del values["head_dim"]
        values["new_decoder_architecture"] = True
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * (0.6 if "emb" in key or "wte" in key else 0.35))
    return model


def adapted(base, name="default", router_scale=3.0, **config):
    """`base` with an adapter that does something, and a router with opinions."""
    values = {"num_forget_experts": 3, "r": 2, "task_type": "CAUSAL_LM", "init_weights": False, **config}
    model = get_peft_model(base, AlterConfig(**values), adapter_name=name)
    if values.get("router") != "static":
        with torch.no_grad():
            router = model.base_model.router_host[1].alter_router[name]
            router.weight.normal_(std=router_scale)
            router.bias.normal_()
    return model


def rows(batch=3, length=9, seed=1):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def middle_threshold(model, ids):
    """Put the entropy threshold in the middle of what the model emits, so that both kinds of token occur."""
    entropy = model.base_model.trace(ids).entropy
    model.peft_config[model.active_adapter].entropy_threshold = float(entropy[entropy.isfinite()].median())
    return entropy


@contextlib.contextmanager
def counted(module):
    """How often a module's forward runs."""
    calls = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 3, 6])
@pytest.mark.parametrize("top_k", [1, 3])
def test_gates_equal_their_naive_twin(experts, top_k):
    config = AlterConfig(num_forget_experts=experts - 1, top_k=top_k)
    torch.manual_seed(experts)
    logits = torch.randn(4, 5, experts, dtype=torch.float64)
    high, evidence = torch.rand(4, 5) > 0.5, torch.rand(4, 5) > 0.2
    gates = expert_gates(logits, high, config, evidence)
    for b in range(4):
        for t in range(5):
            naive = naive_gates(logits[b, t].tolist(), high[b, t], 0.8, 0.01, top_k, evidence[b, t])
            assert gates[b, t].tolist() == pytest.approx(naive, abs=1e-12)


def test_low_entropy_gates_are_exactly_one_hot_and_still_teach_the_router():
    logits = torch.randn(7, 4, requires_grad=True)
    config = AlterConfig(num_forget_experts=3, temperature_low=0.5)
    gates = expert_gates(logits, torch.zeros(7, dtype=torch.bool), config)
    assert torch.equal(gates.detach(), nn.functional.one_hot(logits.argmax(-1), 4).float())
    wanted = torch.randn(7, 4)
    (given,) = torch.autograd.grad((gates * wanted).sum(), logits)
    (soft,) = torch.autograd.grad((torch.softmax(logits / 0.5, -1) * wanted).sum(), logits)
    torch.testing.assert_close(given, soft)


def test_a_tie_is_won_by_the_retention_expert():
    config = AlterConfig(num_forget_experts=3)
    assert expert_gates(torch.zeros(1, 4), torch.tensor([False]), config)[0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("memory", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_pool_equals_its_naive_twin(memory, length):
    torch.manual_seed(length)
    values = torch.randn(3, length, 2, dtype=torch.float64, requires_grad=True)
    evidence = torch.rand(3, length) > 0.3
    evidence[2] = False
    pooled = routing.pool(values, evidence, memory)
    for b in range(3):
        naive = naive_pool(values[b].tolist(), evidence[b].tolist(), memory)
        torch.testing.assert_close(pooled[b], torch.tensor(naive, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda v: routing.pool(v, evidence, memory), values)


def test_previous_real_skips_padding_anywhere():
    masks = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    found = routing.previous_real(torch.tensor(masks, dtype=torch.bool))
    assert found.tolist() == [naive_previous(mask) for mask in masks]
    starts = torch.tensor([[1, 0, 1, 0]]).bool()
    assert routing.previous_real(torch.ones(1, 4, dtype=torch.bool), starts).tolist() == [[-1, 0, -1, 2]]


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_decoding_step_by_step_gives_the_gates_of_the_whole_row(memory):
    config = AlterConfig(num_forget_experts=2, router_memory=memory)
    torch.manual_seed(0)
    emitted = torch.rand(2, 8) * 2.4
    raw = torch.randn(2, 8, 3)
    previous = routing.previous_real(torch.ones(2, 8, dtype=torch.bool))
    shifted = routing.take_previous(raw, previous, 0.0), routing.take_previous(emitted, previous, float("inf"))
    whole, _ = routing.route_tokens(*shifted, torch.ones(2, 8, dtype=torch.bool), config)
    past = torch.zeros(2, 4)
    for t in range(7):
        gates, past = routing.next_gates(raw[:, t], emitted[:, t], torch.ones(2, dtype=torch.bool), past, config)
        torch.testing.assert_close(gates, whole[:, t + 1])


# ---- gradient isolation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_masked_linear_equals_its_naive_twin(groups):
    torch.manual_seed(0)
    layer = MaskedLinear(6, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mask, grad = torch.rand(5, groups) > 0.4, torch.randn(5, 4, dtype=torch.float64)
    y = layer(x, mask)
    y.backward(grad)
    naive = naive_masked_linear(x.tolist(), layer.weight.tolist(), grad.tolist(), mask.float().tolist())
    for found, expected in zip((y, x.grad, layer.weight.grad), naive, strict=True):
        torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64))


def isolated_gradients(dtype):
    """Gradients of one fused batch with masks, and of one pass per sub-domain, on one layer in the middle of a net."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).to(dtype)
    config = AlterConfig(num_forget_experts=2, r=2, router="static", init_weights=False, target_modules=["2"])
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    x = torch.randn(6, 4, 8, dtype=dtype)
    weight = torch.randn(6, 4, 5, dtype=dtype)
    gates = torch.rand(6, 4, 3, dtype=dtype)
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    high = torch.rand(6, 4) > 0.5
    layer = model.base_model.model[2]

    def gradients(rows, expert_mask, shared_mask):
        model.zero_grad()
        out = model(x[rows], alter_routing=Routing(gates[rows], expert_mask, shared_mask))
        (out * weight[rows]).sum().backward()
        return layer.alter_A["default"].weight.grad.clone(), layer.alter_B["default"].weight.grad.clone()

    expert_mask = nn.functional.one_hot(owner, 3).bool()[:, None].expand(6, 4, 3)
    fused = gradients(torch.arange(6), expert_mask, high)
    separate_B = torch.zeros_like(fused[1])
    separate_A = torch.zeros_like(fused[0])
    for expert in range(3):
        plain = gradients((owner == expert).nonzero()[:, 0], None, None)
        separate_B[:, expert * 2 : expert * 2 + 2] = plain[1][:, expert * 2 : expert * 2 + 2]
    # A learns from single tokens: one pass per high-entropy token, all other outputs ignored
    for b, t in high.nonzero().tolist():
        model.zero_grad()
        out = model(x[b : b + 1], alter_routing=Routing(gates[b : b + 1]))
        (out[:, t] * weight[b : b + 1, t]).sum().backward()
        separate_A += layer.alter_A["default"].weight.grad
    return fused, (separate_A, separate_B)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 4e-2)])
def test_masks_isolate_gradients_as_separate_passes_do(dtype, tolerance):
    fused, separate = isolated_gradients(dtype)
    for found, expected in zip(fused, separate, strict=True):
        assert expected.abs().max() > 0.1
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_masks_leave_the_gradient_to_lower_layers_alone():
    torch.manual_seed(0)
    base = tiny()
    model = adapted(base)
    ids = rows()
    tr = model.base_model.trace(ids)
    gates = model.base_model.route(tr.entropy, tr.features).detach()
    closed = Routing(gates, torch.zeros_like(gates, dtype=torch.bool), torch.zeros(ids.shape, dtype=torch.bool))
    grads = []
    for route in (Routing(gates), closed):
        embeds = base.get_input_embeddings()(ids).detach().requires_grad_()
        model.zero_grad()
        model(inputs_embeds=embeds, alter_routing=route).logits.square().sum().backward()
        grads.append(embeds.grad)
        last = model.base_model.model.model.layers[-1].mlp.down_proj
        learned = last.alter_B["default"].weight.grad.abs().sum() + last.alter_A["default"].weight.grad.abs().sum()
        assert (learned > 0) == (route is not closed)
    torch.testing.assert_close(grads[0], grads[1])


def test_masked_linear_under_autocast():
    torch.manual_seed(0)
    layer = MaskedLinear(6, 4)
    x = torch.randn(5, 6, requires_grad=True)
    mask = torch.tensor([[True], [False], [True], [True], [False]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, mask)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x[mask[:, 0]].sum(0).expand(4, 6), atol=0.05, rtol=0.05)


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architecture(kind):
    base = tiny(kind)
    ids = rows()
    reference = base(ids).logits.detach()
    model = get_peft_model(base, AlterConfig(num_forget_experts=2, r=2, task_type="CAUSAL_LM"))
    assert torch.equal(model(ids).logits, reference), "not the identity before training"
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AlterLinear)}
    assert {name.rpartition(".")[2] for name in layers} == ARCHITECTURES[kind][2]
    assert ".2." in model.base_model.router_host[0]

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        # what separates experts and router may be that no token takes the expert; A and B as wholes must move
        assert changed == ("alter_A" in name or "alter_B" in name) or "alter_router" in name, name
    model.eval()
    assert not torch.equal(model(ids).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, reference)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_two_forwards_before_one_backward(kind, reentrant):
    model = adapted(tiny(kind)).train()
    first, second = rows(seed=1), rows(batch=2, length=7, seed=2)
    middle_threshold(model, first)
    model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        loss = model(input_ids=first, labels=first).loss - 0.5 * model(input_ids=second, labels=second).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    attention = next(module for module in model.modules() if isinstance(module, AlterLinear))
    with counted(attention) as calls:
        checkpointed = gradients()
    assert len(calls) == 6, "two frozen passes, two forwards, two recomputations"
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=name)
    base = model.unload()
    functions = [m.__dict__.get("_gradient_checkpointing_func") for m in base.modules()]
    assert not any(isinstance(function, CapturingCheckpoint) for function in functions)


def test_checkpoint_wrapper_and_its_state_dict():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = adapted(tiny()).train()
    first, second = rows(seed=1), rows(batch=2, length=7, seed=2)

    def gradients():
        model.zero_grad()
        (model(input_ids=first, labels=first).loss - model(input_ids=second, labels=second).loss).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, names = gradients(), sorted(get_peft_model_state_dict(model))
    block = type(model.base_model.model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, block))
    for found, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected)
    wrapped = get_peft_model_state_dict(model)
    assert sorted(wrapped) == names
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, {key: value + 1 for key, value in wrapped.items()})
    assert not result.unexpected_keys
    again = get_peft_model_state_dict(model)
    # the values of `wrapped` are the parameters themselves, so they have moved with them
    assert all(torch.equal(again[key], wrapped[key]) for key in names)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("memory", [0.0, 0.6])
def test_padding_on_either_side_changes_nothing(kind, memory):
    model = adapted(tiny(kind), router_memory=memory)
    ids = rows(length=6)
    middle_threshold(model, ids)
    with torch.no_grad():
        plain = model(ids).logits
        pad = torch.zeros(3, 2, dtype=torch.long)
        real, none = torch.ones_like(ids), torch.zeros_like(pad)
        left = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([none, real], 1)}
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        right = {"input_ids": torch.cat([ids, pad], 1), "attention_mask": torch.cat([real, none], 1)}
        # a processor may sum shapes in another order, and a router's evidence carries that on
        torch.testing.assert_close(model(**left).logits[:, 2:], plain, atol=5e-4, rtol=1e-4)
        torch.testing.assert_close(model(**right).logits[:, :6], plain, atol=5e-4, rtol=1e-4)


def test_packed_rows_are_routed_one_by_one():
    model = adapted(tiny(), router_memory=0.5)
    one, two = rows(batch=1, length=5, seed=3), rows(batch=1, length=4, seed=4)
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    packed = model.base_model.trace(torch.cat([one, two], 1), position_ids=positions)
    assert torch.isinf(packed.entropy[0]).nonzero().flatten().tolist() == [0, 5]
    gates = model.base_model.route(packed.entropy, packed.features)
    alone = model.base_model.trace(one)
    torch.testing.assert_close(gates[:, :5], model.base_model.route(alone.entropy, alone.features))
    assert gates[0, 5].tolist() == [1, 0, 0, 0]


def test_trace_describes_the_step_that_generated_each_token():
    base = tiny()
    ids = rows()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 7:] = 0
    seen = {}
    base.model.layers[2].self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].detach()))
    with torch.no_grad():
        logits = base(ids, attention_mask=mask).logits
    features = seen["x"]
    model = adapted(base)
    tr = model.base_model.trace(ids, mask)
    torch.testing.assert_close(tr.logits(tr.states.flatten(0, 1)).view_as(logits), logits)
    for b in range(3):
        for t, before in enumerate(naive_previous(mask[b].tolist())):
            if before < 0:
                assert tr.entropy[b, t] == float("inf")
                assert tr.features[b, t].abs().max() == 0
            else:
                p = torch.softmax(logits[b, before].double(), -1)
                assert float(tr.entropy[b, t]) == pytest.approx(float((1 - (p**1.5).sum()) / 0.5), abs=1e-5)
                torch.testing.assert_close(tr.features[b, t], features[b, before])


def test_given_routes_equal_own_routes_and_cost_no_frozen_pass():
    base = tiny()
    model = adapted(base, router_memory=0.3)
    ids = rows()
    middle_threshold(model, ids)
    tr = model.base_model.trace(ids)
    gates = model.base_model.route(tr.entropy, tr.features)
    assert set((gates > 0).sum(-1).flatten().tolist()) == {1, 4}, "both kinds of token"
    embedding = base.get_input_embeddings()
    with counted(embedding) as calls:
        own = model(ids).logits
        assert len(calls) == 2
        given = model(input_ids=ids, alter_routing=Routing(gates)).logits
        assert len(calls) == 3
        model(input_ids=ids, alter_routing={"default": Routing(gates)})
        assert len(calls) == 4
    torch.testing.assert_close(given, own)


def test_experts_that_no_token_opens_are_left_out_at_no_difference(monkeypatch):
    model = adapted(tiny(), num_forget_experts=5, r=8)
    ids = rows()
    gates = torch.zeros(*ids.shape, 6)
    gates[..., 0], gates[0, 3:, 4] = 1.0, 0.5
    allowed = torch.zeros(*ids.shape, 6, dtype=torch.bool)
    allowed[..., [0, 4]] = True
    routing = Routing(gates, allowed, torch.rand(ids.shape) < 0.5)
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, AlterLinear))
    layer.alter_B["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1] // 8))

    def run():
        model.zero_grad()
        logits = model(input_ids=ids, alter_routing=routing).logits
        logits.square().mean().backward()
        return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    narrow, narrow_grads = run()
    monkeypatch.setattr(ForwardState, "plan_of", lambda self, name: Plan.whole(self.routing[name]))
    whole, whole_grads = run()
    assert seen == [2, 6]
    torch.testing.assert_close(narrow, whole)
    assert narrow_grads.keys() == whole_grads.keys()
    for name, grad in whole_grads.items():
        torch.testing.assert_close(narrow_grads[name], grad, msg=name)
        if "alter_B" in name:
            assert grad[:, 4 * 8 : 5 * 8].abs().sum() > 0, name


def test_frozen_pass_has_no_dropout_and_no_trained_copies():
    base = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids = rows()
    reference = base(ids).logits.detach()
    model = adapted(base, modules_to_save=["lm_head"]).train()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    tr = model.base_model.trace(ids)
    torch.testing.assert_close(tr.logits(tr.states.flatten(0, 1)), reference.flatten(0, 1))
    assert model.training
    assert base.transformer.drop.training
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]


def test_router_learns_through_the_gates():
    model = adapted(tiny()).train()
    ids = rows()
    middle_threshold(model, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    router = model.base_model.router_host[1].alter_router["default"]
    assert router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("router", ["learned", "entropy", "static"])
def test_bfloat16_base_with_float32_adapter(router):
    model = adapted(tiny().to(torch.bfloat16), router=router).train()
    ids = rows()
    out = model(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "alter_router" not in name}
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tr = model.base_model.trace(ids)
        gates = model.base_model.route(tr.entropy, tr.features)
        open_mask = torch.ones_like(gates, dtype=torch.bool)
        model(input_ids=ids, labels=ids, alter_routing=Routing(gates, open_mask, open_mask[..., 0])).loss.backward()


@pytest.mark.parametrize("router", ["learned", "entropy", "static"])
def test_saved_and_loaded_bit_exact(router, tmp_path):
    base = tiny()
    ids = rows()
    model = adapted(copy.deepcopy(base), router=router, router_memory=0.2, domains=["a", "b", "c"])
    # in the mode that it is loaded in: training lays the experts out otherwise, and a matmul then rounds otherwise
    model.eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["vocab_size"] == VOCAB
    assert same_base(saved["base_fingerprint"], base_fingerprint(base))
    assert saved["router_layer"] == (None if router == "static" else "model.layers.2.self_attn.q_proj")
    for kwargs in ({}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **kwargs)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        names = {k.replace(".other.", ".default.") for k, _ in loaded.named_parameters()}
        assert names == {k for k, _ in model.named_parameters()}
    native = copy.deepcopy(base)
    native.load_adapter(str(tmp_path))
    assert torch.equal(native(ids).logits, model(ids).logits)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    B = tensors["base_model.model.model.layers.0.mlp.up_proj.alter_B.weight"]
    assert B.shape == (24, 4 * 2)
    assert len([key for key in tensors if "alter_router" in key]) == (0 if router == "static" else 2)


def test_columns_of_B_are_experts():
    model = adapted(tiny(), router="static")
    ids = rows()
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    gates = torch.zeros(*ids.shape, 4)
    gates[..., 2] = 1
    seen = {}
    layer.register_forward_hook(lambda m, a, out: seen.update(x=a[0], out=out))
    model(input_ids=ids, alter_routing=Routing(gates))
    A, B = layer.alter_A["default"].weight, layer.alter_B["default"].weight
    expected = layer.base_layer(seen["x"]) + 8.0 * seen["x"] @ A.T @ B[:, 4:6].T
    torch.testing.assert_close(seen["out"], expected)


def test_several_adapters_side_by_side():
    ids = rows()
    base = tiny()
    model = adapted(base, name="one")
    model.add_adapter(
        "two", AlterConfig(num_forget_experts=1, r=1, init_weights=False, router_layer="layers.1.self_attn.k_proj")
    )
    model.add_adapter("flat", AlterConfig(r=1, init_weights=False, router="static", target_modules=["up_proj"]))
    outputs = {}
    for names in (["one"], ["two"], ["flat"], ["one", "two", "flat"]):
        model.base_model.set_adapter(names)
        outputs[tuple(names)] = model.base_model(ids).logits.detach()
    values = list(outputs.values())
    assert all(not torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])
    assert model.base_model.router_of("one")[0] != model.base_model.router_of("two")[0]
    # one routing per adapter, with its own number of experts
    routes = {}
    for name in ("one", "two"):
        tr = model.base_model.trace(ids, adapter_name=name)
        routes[name] = Routing(model.base_model.route(tr.entropy, tr.features, adapter_name=name))
    torch.testing.assert_close(model.base_model(ids, alter_routing=routes).logits, outputs["one", "two", "flat"])
    with pytest.raises(UserError, match="no route for the active adapter 'two'"):
        model.base_model(ids, alter_routing={"one": routes["one"]})
    model.set_adapter("one")
    model.delete_adapter("two")
    torch.testing.assert_close(model(ids).logits, outputs[("one",)])
    model.delete_adapter("flat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("one")
    assert "_alter_context" not in base.__dict__
    assert not base._forward_pre_hooks
    assert not base._forward_hooks


def test_an_adapter_after_the_last_one_was_deleted():
    model = adapted(tiny())
    ids = rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.delete_adapter("default")
    model.base_model.peft_config["again"] = AlterConfig(num_forget_experts=1, r=2, init_weights=False)
    model.base_model.inject_adapter(model.base_model.model, "again")
    model.base_model.set_adapter("again")
    out = model.base_model(ids).logits
    model.base_model.disable_adapter_layers()
    assert not torch.allclose(model.base_model(ids).logits, out)


def test_threads_and_replicas_do_not_share_routes():
    model = adapted(tiny())
    ids = rows()
    raised = []

    def other():
        try:
            model(ids)
        except UserError as error:
            raised.append(str(error))

    def hook(*_):
        if not raised:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    expected = model(ids).logits
    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(hook)
    # the frozen pass meets the other thread first; the routes of this one are not touched
    assert torch.equal(model(ids).logits, expected)
    handle.remove()
    assert raised
    assert "Two threads" in raised[0]
    model.base_model.model._is_replica = True
    with pytest.raises(UserError, match="DistributedDataParallel"):
        model(ids)


def test_unload_leaves_the_base_as_it_was():
    base = tiny()
    ids = rows()
    reference, attributes = base(ids).logits.detach(), set(base.__dict__)
    model = adapted(base)
    model(ids)
    assert model.unload() is base
    assert set(base.__dict__) - {"peft_config"} == attributes
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert not base._forward_pre_hooks_with_kwargs
    assert not base._forward_hooks_always_called
    assert torch.equal(base(ids).logits, reference)


def test_copies_have_their_own_context():
    model = adapted(tiny())
    ids = rows()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    ours, theirs = (m.base_model.model._alter_context for m in (model, twin))
    assert ours is not theirs
    assert theirs.anchors["default"] is twin.base_model.router_host[1]
    with torch.no_grad():
        twin.base_model.router_host[1].alter_router["default"].bias += 50 * torch.tensor([0.0, 0, 0, 1])
    assert not torch.equal(twin(ids).logits, model(ids).logits)
    assert torch.equal(twin.generate(ids, max_new_tokens=3), twin.generate(ids, max_new_tokens=3, use_cache=False))


def test_a_whole_model_is_pickled_with_its_own_context():
    model = adapted(tiny())
    ids = rows()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert twin.base_model.model._alter_context is not model.base_model.model._alter_context
    assert torch.equal(twin(ids).logits, model(ids).logits)
    for cache in (True, False):
        options = {"max_new_tokens": 3, "use_cache": cache, "do_sample": False}
        assert torch.equal(twin.generate(ids, **options), model.generate(ids, **options))
    assert "generate" not in twin.unload().__dict__


def test_rows_of_a_batch_cannot_have_adapters_of_their_own():
    model = adapted(tiny(), name="one")
    model.add_adapter("two", AlterConfig(r=1, init_weights=False))
    for call in (model, model.generate):
        with pytest.raises(UserError, match="adapter_names"):
            call(input_ids=rows(), adapter_names=["one", "two", "__base__"])
    assert model(rows()).logits.isfinite().all()


def test_static_adapter_merges_and_converts_to_lora():
    base = tiny()
    ids = rows()
    for kind in ("llama", "gpt2"):
        base = tiny(kind)
        model = adapted(base, router="static")
        expected = model(ids).logits.detach()
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-3)
        model.unmerge_adapter()
        assert model.supports_lora_conversion()
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("router", ["learned", "entropy"])
def test_routed_adapters_refuse_to_merge(router):
    model = adapted(tiny(), router=router)
    ids = rows()
    before = model(ids).logits
    with pytest.raises(NotImplementedError, match="router='static'"):
        model.merge_and_unload()
    with pytest.raises(UserError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(model(ids).logits, before)
    assert not model.supports_lora_conversion()


def test_experts_can_be_added_for_later_requests():
    model = adapted(tiny(), domains=["a", "b", "c"])
    ids = rows()
    layer = model.base_model.router_host[1]
    old = layer.alter_B["default"].weight.clone()
    low = 10.0
    model.peft_config["default"].entropy_threshold = low
    before = model(ids).logits.detach()
    gates_before = model.base_model.route(*_trace_of(model, ids))
    model.base_model.resize_experts("default", 5, ["a", "b", "c", "d", "e"])
    assert torch.equal(layer.alter_B["default"].weight[:, : old.shape[1]], old)
    assert layer.alter_B["default"].weight[:, old.shape[1] :].abs().max() == 0
    gates = model.base_model.route(*_trace_of(model, ids))
    assert gates.shape[-1] == 6
    same = gates[..., 4:].sum(-1) == 0
    assert torch.equal(gates[same][:, :4], gates_before[same])
    with torch.no_grad():
        layer.alter_router["default"].bias[4:] = -1e4
    torch.testing.assert_close(model(ids).logits, before)
    with pytest.raises(UserError, match="cannot shrink"):
        model.base_model.resize_experts("default", 2)
    with pytest.raises(UserError, match="names 5 sub-domains for 7"):
        model.base_model.resize_experts("default", 7)


def _trace_of(model, ids):
    tr = model.base_model.trace(ids)
    return tr.entropy, tr.features


def test_models_without_tokens_route_each_row():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model = adapted(net, task_type=None, target_modules=["0", "2"])
    x = torch.randn(5, 6)
    out = model(x)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    single = torch.cat([model(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(single, out)


def test_layer_compiles_without_graph_breaks():
    model = adapted(tiny(layers=1)).train()
    ids = rows()
    tr = model.base_model.trace(ids)
    gates = model.base_model.route(tr.entropy, tr.features).detach()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(*ids.shape, 16)
    mask = gates > 0
    context = layer.context

    def grads(function):
        model.zero_grad()
        context.state = ForwardState(routing={"default": Routing(gates, mask, mask[..., 0])})
        try:
            out = function(x)
            out.square().sum().backward()
        finally:
            context.state = None
        return out.detach(), layer.alter_A["default"].weight.grad.clone(), layer.alter_B["default"].weight.grad.clone()

    torch._dynamo.reset()
    eager = grads(layer)
    for found, expected in zip(grads(torch.compile(layer, backend="aot_eager", fullgraph=True)), eager, strict=True):
        torch.testing.assert_close(found, expected)


# ---- which experts a pass works with ---------------------------------------------------------------------------------

EXPERTS = 24


def gates_of(case, batch=4, length=6):
    """Gates of a batch whose tokens take experts in different ways."""
    torch.manual_seed(0)
    gates = torch.zeros(batch, length, EXPERTS, dtype=torch.float64)
    if case == "one":
        gates[..., 5] = 1
    elif case == "one, weighed":
        gates[..., 5] = torch.rand(batch, length)
    elif case == "neighbours":
        gates[..., 2:5] = torch.rand(batch, length, 3)
        gates[0] = 0
    elif case == "far apart":
        gates[..., [1, 20]] = torch.rand(batch, length, 2, dtype=torch.float64)
    elif case == "own":
        for row in range(batch):
            gates[row, :, 5 * row + 2] = 1
        gates[1, 2:, 0] = 0.5
    elif case == "mixed":
        gates[..., 0] = 1
        gates[1, 3], gates[2, :, 0], gates[2, :, 9] = 0, 0, 1
        gates[3, 1, [3, 17, 23]] = torch.rand(3, dtype=torch.float64)
    elif case == "all":
        gates = torch.rand_like(gates)
    return gates


CASES = ["one", "one, weighed", "neighbours", "far apart", "own", "mixed", "all", "none"]


def routed_layer(dtype=torch.float64):
    """A layer of 24 experts, in a model whose rows are routed one by one."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(10, 7))
    config = AlterConfig(num_forget_experts=EXPERTS - 1, r=3, init_weights=False, target_modules=["0"])
    model = get_peft_model(net.to(dtype), config, autocast_adapter_dtype=False)
    model.base_model.router_host[1].alter_router["default"].requires_grad_(False)
    return model, model.base_model.model[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["training", "masks", "isolated", "nothing learns", "eval", "no_grad", "flat"])
def test_layer_equals_its_naive_twin_whatever_experts_tokens_take(case, way):
    model, layer = routed_layer()
    model.train(way in ("training", "masks", "isolated", "nothing learns"))
    gates = gates_of(case)
    x = torch.randn(*gates.shape[:2], 10, dtype=torch.float64, requires_grad=True)
    expert_mask = torch.rand_like(gates) > 0.4 if way == "masks" else None
    owners = [2, 9, 9, 17] if way == "isolated" else []
    if way in ("isolated", "nothing learns"):
        expert_mask = torch.zeros_like(gates, dtype=torch.bool)
        for row, expert in enumerate(owners):
            expert_mask[row, :, expert] = True
    shared_mask = torch.rand(gates.shape[:2]) > 0.4 if way == "masks" else None
    A, B = layer.alter_A["default"].weight, layer.alter_B["default"].weight
    learning = way not in ("no_grad", "flat")
    with torch.set_grad_enabled(learning):
        found = model(x.flatten(0, 1) if way == "flat" else x, alter_routing=Routing(gates, expert_mask, shared_mask))
    found = found.view(*gates.shape[:2], 7)

    weight = torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grad_A, grad_B = torch.zeros_like(A), torch.zeros_like(B)
    for b in range(gates.shape[0]):
        for t in range(gates.shape[1]):
            expected = layer.base_layer(x[b, t])
            z = A @ x[b, t]
            for e in range(EXPERTS):
                Be = B[:, 3 * e : 3 * e + 3]
                expected = expected + layer.scaling["default"] * gates[b, t, e] * (Be @ z)
                part = layer.scaling["default"] * gates[b, t, e]
                if expert_mask is None or expert_mask[b, t, e]:
                    grad_B[:, 3 * e : 3 * e + 3] += part * torch.outer(weight, z.detach())
                if shared_mask is None or shared_mask[b, t]:
                    grad_A += part * torch.outer(Be.detach().T @ weight, x[b, t].detach())
            torch.testing.assert_close(found[b, t], expected)
    if learning:
        (found * weight).sum().backward()
        torch.testing.assert_close(A.grad, grad_A)
        torch.testing.assert_close(B.grad, grad_B)
        if way in ("isolated", "nothing learns"):
            frozen = [e for e in range(EXPERTS) if e not in owners]
            assert not B.grad.unflatten(1, (EXPERTS, 3))[:, frozen].any()


def test_each_way_is_taken_where_it_is_the_cheapest():
    def made(case, **options):
        return plan(Routing(gates_of(case, **options.pop("of", {}))), **{"learning": True, **options})

    assert made("one").experts == slice(5, 6)
    assert made("one").gates is None
    assert made("one, weighed").gates.shape == (4, 6, 1)
    assert made("neighbours").experts == slice(2, 5)
    long = {"of": {"length": 200}}
    assert made("far apart", **long).experts.tolist() == [1, 20]
    assert made("own", **long).experts.shape == (4, 2)
    assert made("all").experts is None
    assert isinstance(made("mixed", learning=False, pairs=True).experts, Products)
    assert len(made("mixed", learning=False, pairs=True).experts.token) == 24 - 1 + 3
    assert made("none", learning=False).closed
    assert not made("none").closed, "weights without a gradient would stop distributed training"
    learned = gates_of("one").requires_grad_()
    assert plan(Routing(learned), learning=True).experts is None, "a closed gate can have a gradient"


def test_experts_that_few_tokens_take_cost_those_tokens_only():
    gates = gates_of("mixed", length=200)
    mask = torch.zeros_like(gates, dtype=torch.bool)
    mask[..., 0] = True
    made = plan(Routing(gates, mask), learning=True)
    # expert 9 has all 200 tokens of a row, three others one token each
    assert made.experts.tolist() == [0, 9]
    assert made.expert_mask.shape[-1] == 1
    assert sorted(made.rest.experts.flatten().tolist()) == [3, 17, 23]
    assert made.rest.learns == slice(0), "frozen: their weights stay out of the graph"
    few = torch.zeros_like(gates).flatten(0, 1)
    few.index_put_((made.rest.tokens, made.rest.experts.expand(made.rest.shape).flatten()), made.rest.gates.flatten())
    assert torch.equal(few.view_as(gates)[..., [3, 17, 23]], gates[..., [3, 17, 23]])
    mask[3, :, 17] = True
    assert plan(Routing(gates, mask), learning=True).rest.learns is None
    assert plan(Routing(gates), learning=False).rest is None


def test_only_experts_that_some_token_may_move_are_learned():
    gates = gates_of("all")
    mask = torch.zeros_like(gates, dtype=torch.bool)
    mask[1, :, 7], mask[2, :, 9] = True, True
    made = plan(Routing(gates, mask), learning=True)
    assert (made.learns, made.expert_mask.shape[-1]) == (slice(7, 10), 3)
    own = gates_of("own", length=200)
    made = plan(Routing(own, torch.ones_like(own, dtype=torch.bool)), learning=True)
    assert made.learns == slice(2)
    made = plan(Routing(own, mask[:, :1].expand(own.shape)), learning=True)
    assert made.learns.stop == 1, "B has a gradient even where no expert learns"


@pytest.mark.parametrize("masked", [True, False])
def test_autocast_gives_the_same_without_a_cast_before_it(masked, monkeypatch):
    torch.manual_seed(1)
    model = get_peft_model(
        nn.Sequential(nn.Linear(10, 7)).bfloat16(),
        AlterConfig(num_forget_experts=EXPERTS - 1, r=3, init_weights=False, target_modules=["0"]),
    )
    layer = model.base_model.model[0]
    A, B = layer.alter_A["default"].weight, layer.alter_B["default"].weight
    assert A.dtype == torch.float32
    gates = gates_of("mixed").float()
    masks = (gates > 0, gates[..., 0] > 0) if masked else ()
    given = torch.randn(*gates.shape[:2], 10, dtype=torch.bfloat16)

    def run():
        model.zero_grad()
        x = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x, alter_routing=Routing(gates, *masks))
        y.float().square().sum().backward()
        return y.detach(), x.grad, A.grad.clone(), B.grad.clone()

    found = run()
    # a wider input that autocast casts back
    updated = AlterLinear._updated
    monkeypatch.setattr(AlterLinear, "_updated", lambda self, name, x, *rest: updated(self, name, x.float(), *rest))
    for one, other in zip(found, run(), strict=True):
        assert torch.equal(one, other)


def test_the_cost_of_a_pass_does_not_grow_with_the_number_of_experts():
    """What is read and multiplied, counted: blocks of B times tokens."""
    for length in (1, 64):
        seen = []
        for count in (8, 64, 512):
            torch.manual_seed(0)
            gates = torch.zeros(8, length, count)
            chosen = torch.stack([torch.randperm(count)[:3] for _ in range(8 * length)]).view(8, length, 3)
            gates.scatter_(-1, chosen, 0.5)
            made = plan(Routing(gates), learning=False, pairs=True)
            if isinstance(made.experts, Products):
                seen.append(len(made.experts.token))
            else:
                seen.append(8 * length * made.gates.shape[-1])
        assert max(seen) <= 8 * length * 8, seen
        assert seen[1] == seen[2] == 8 * length * 3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_layer(case, training):
    model, _ = routed_layer(torch.bfloat16)
    exact, _ = routed_layer()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    gates = gates_of(case).float()
    x = torch.randn(*gates.shape[:2], 10).bfloat16()
    with torch.set_grad_enabled(training):
        found = model.train(training)(x, alter_routing=Routing(gates))
    assert found.dtype == torch.bfloat16
    expected = exact.train(training)(x.double(), alter_routing=Routing(gates.double()))
    assert (found.double() - expected).abs().max() <= 0.03 * expected.abs().max()


def test_training_goes_on_alike_in_eval_mode():
    """A fused optimizer goes by places in memory, and B is stored otherwise for inference."""
    trained = []
    for evaluated in (False, True):
        model = adapted(tiny(), alter_dropout=0.0).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
        for step in range(3):
            if evaluated and step == 1:
                model.eval()
                with torch.no_grad():
                    model(rows())
            optimizer.zero_grad()
            model(rows(), labels=rows()).loss.backward()
            optimizer.step()
        trained.append({name: p.detach().clone() for name, p in model.named_parameters() if "alter_B" in name})
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_a_retention_expert_of_zeros_costs_nothing():
    model = adapted(tiny(), r=4).eval()
    ids = rows()
    ordinary = torch.zeros(*ids.shape, 4)
    ordinary[..., 0] = 1
    claimed = ordinary.clone()
    claimed[0, 4:, 0], claimed[0, 4:, 2] = 0, 1
    with model.disable_adapter():
        reference = model(input_ids=ids).logits
    layers = [m for m in model.modules() if isinstance(m, AlterLinear)]
    with counted(layers[3].alter_A["default"]) as calls, torch.no_grad():
        assert not torch.equal(model(input_ids=ids, alter_routing=Routing(ordinary)).logits, reference)
        for layer in layers:
            layer.alter_B["default"].weight[:, :4] = 0
        before = model(input_ids=ids, alter_routing=Routing(claimed)).logits
        assert len(calls) == 2
        assert torch.equal(model(input_ids=ids, alter_routing=Routing(ordinary)).logits, reference)
        assert len(calls) == 2, "no layer had anything to do"
        torch.testing.assert_close(before[1:], reference[1:])
        layers[-1].alter_B["default"].weight[0, 0] = 1
        assert not torch.equal(model(input_ids=ids, alter_routing=Routing(ordinary)).logits, reference)


def test_layout_for_inference_changes_neither_weights_nor_files(tmp_path):
    model = adapted(tiny())
    before = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    B = model.base_model.model.model.layers[0].mlp.up_proj.alter_B["default"]
    weight = B.weight
    with torch.inference_mode():
        model.eval()
    assert weight is B.weight
    assert weight.t().is_contiguous()
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[name], value) and after[name].is_contiguous() for name, value in before.items())
    model.save_pretrained(tmp_path)
    model.train()
    assert weight.is_contiguous()
    model(input_ids=rows(), labels=rows()).loss.backward()
    assert weight.grad.is_contiguous()


@pytest.mark.parametrize(("training", "given"), [(True, True), (False, False)])
def test_whole_model_compiles_without_graph_breaks(training, given):
    model = adapted(tiny(layers=1)).train(training)
    ids = rows()
    middle_threshold(model, ids)
    tr = model.base_model.trace(ids)
    gates = model.base_model.route(tr.entropy, tr.features).detach()
    inputs = {"input_ids": ids, "labels": ids}
    if given:
        inputs["alter_routing"] = Routing(gates, gates > 0, gates[..., 0] > 0) if training else Routing(gates)

    def run(function):
        model.zero_grad()
        with torch.set_grad_enabled(training):
            out = function(**inputs)
        if training:
            out.loss.backward()
        return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch._dynamo.reset()
    logits, gradients = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    expected_logits, expected = run(model)
    torch.testing.assert_close(logits, expected_logits)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_compiled_layers_do_not_follow_the_routes():
    """Only the blocks are compiled: other experts in the next pass are no reason to compile again."""
    model = adapted(tiny(layers=1), num_forget_experts=9).eval()
    ids = rows()
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    block = model.base_model.model.model.layers[0].mlp
    with torch.no_grad():
        for expert in range(5):
            gates = torch.zeros(*ids.shape, 10)
            gates[..., expert], gates[0, 0, 9 - expert] = 1, 0.5
            expected = model(input_ids=ids, alter_routing=Routing(gates)).logits
            forward, block.forward = block.forward, torch.compile(block.forward, backend=counter, fullgraph=True)
            found = model(input_ids=ids, alter_routing=Routing(gates)).logits
            block.forward = forward
            torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 2


# ---- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_knows_the_base_and_nothing_else():
    base = tiny()
    first = base_fingerprint(base)
    assert base_fingerprint(tiny(seed=5)) != first
    assert not same_base(first, base_fingerprint(tiny(layers=2)))
    rounded = copy.deepcopy(base).to(torch.bfloat16)
    assert base_fingerprint(rounded) == first
    assert base_fingerprint(copy.deepcopy(rounded).float()) == first
    half = base_fingerprint(copy.deepcopy(base).half())
    assert half != first
    assert same_base(half, first)
    assert not same_base(half, base_fingerprint(tiny(seed=5).half()))
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(70)
    assert base_fingerprint(resized) == first
    model = adapted(base, modules_to_save=["lm_head"])
    assert base_fingerprint(model) == base_fingerprint(base) == first
    nudged = tiny()
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert not same_base(base_fingerprint(nudged), first)


def test_adapter_is_refused_by_another_base(tmp_path):
    adapted(tiny()).save_pretrained(tmp_path)
    other = tiny(seed=5)
    with pytest.raises(UserError, match="made for another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not any(isinstance(m, AlterLinear) for m in other.modules())


def test_one_configuration_serves_several_bases():
    config = AlterConfig(num_forget_experts=2, r=2, task_type="CAUSAL_LM")
    get_peft_model(tiny(), config)
    model = get_peft_model(tiny(seed=5, layers=6), config)
    assert model.base_model.router_host[0] == "model.layers.4.self_attn.q_proj"


def test_default_host_is_far_up_but_not_last():
    found = {
        n: default_host([f"model.layers.{i}.{k}" for i in range(n) for k in ("q", "k")]) for n in (2, 3, 4, 6, 30, 32)
    }
    assert found == {n: f"model.layers.{i}.q" for n, i in ((2, 1), (3, 2), (4, 2), (6, 4), (30, 24), (32, 25))}
    assert default_host(["model.layers.0.q"]) == "model.layers.0.q"
    assert default_host(["0.lin", "1.lin"]) == "1.lin"
    assert default_host(["lin0", "lin1"]) == "lin0"


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router": "learnt"}, "Did you mean 'learned'"),
        ({"bias": "alter"}, "`bias` is 'alter'"),
        ({"r": 0}, "`r` is 0"),
        ({"r": 2.5}, "`r` is 2.5"),
        ({"num_forget_experts": 0}, "`num_forget_experts` is 0"),
        ({"top_k": 0}, "`top_k` is 0"),
        ({"temperature_low": 0.0}, "`temperature_low` is 0.0"),
        ({"temperature_high": -1.0}, "`temperature_high` is -1.0"),
        ({"router_memory": 1.5}, "`router_memory` is 1.5"),
        ({"alter_dropout": 1.0}, "`alter_dropout` is 1.0"),
        ({"entropy_quantile": 1.0}, "`entropy_quantile` is 1.0"),
        ({"entropy_q": 0.0}, "`entropy_q` is 0.0"),
        ({"entropy_q": 2.0}, "`entropy_threshold` 1.2 is never reached"),
        ({"entropy_threshold": 1.8, "vocab_size": 61}, "never reached"),
        ({"entropy_threshold": -0.1}, "above 0"),
        ({"domains": ["a"], "num_forget_experts": 2}, "names 1 sub-domains"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"target_modules": "x", "layers_to_transform": [1]}, "layers_to_transform"),
    ],
)
def test_configuration_errors(values, message):
    with pytest.raises(UserError, match=message):
        AlterConfig(**values)


def test_threshold_is_checked_against_the_vocabulary():
    with pytest.raises(UserError, match="vocabulary of 61"):
        adapted(tiny(), entropy_threshold=1.8)


def test_quantile_needs_a_measured_threshold():
    model = adapted(tiny(), entropy_quantile=0.7)
    assert model.peft_config["default"].entropy_threshold is None
    with pytest.raises(UserError, match=r"`entropy_quantile` is 0\.7"):
        model(rows())
    model.peft_config["default"].entropy_threshold = 1.0
    model(rows())


def test_targets_that_do_not_exist_name_those_that_do():
    base = tiny()
    with pytest.raises(UserError, match="linear layers of this model are: down_proj, gate_proj"):
        adapted(base, target_modules=["nope"])
    assert "_alter_context" not in base.__dict__
    with pytest.raises(UserError, match=r"model type 'custom'.*0, 2"):
        adapted(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), task_type=None)


def test_failed_injection_leaves_the_model_alone():
    base = tiny()
    ids = rows()
    reference = base(ids).logits
    with pytest.raises(
        UserError, match=r"Rank 5 is larger than layer 'model\.layers\.0\.self_attn\.k_proj'.*of at most 4"
    ):
        adapted(tiny(num_key_value_heads=1), r=5)
    with pytest.raises(UserError, match=r"`router_layer` 'layers\.9\.q_proj'.*leave `router_layer` out"):
        adapted(base, router_layer="layers.9.q_proj")
    assert not any(isinstance(m, AlterLinear) for m in base.modules())
    assert torch.equal(base(ids).logits, reference)
    assert torch.equal(get_peft_model(base, AlterConfig(task_type="CAUSAL_LM", r=2))(ids).logits, reference)


def test_rank_and_alpha_patterns():
    model = adapted(tiny(), rank_pattern={"up_proj": 4}, alpha_pattern={"down_proj": 2})
    block = model.base_model.model.model.layers[0].mlp
    assert block.up_proj.alter_A["default"].weight.shape == (4, 16)
    assert block.up_proj.scaling["default"] == 4.0
    assert block.down_proj.scaling["default"] == 1.0


def test_part_of_a_model_cannot_be_routed():
    model = adapted(tiny())
    with pytest.raises(UserError, match="Call the whole model"):
        model.base_model.model.model(rows())


def test_wrong_routes_are_named():
    model = adapted(tiny())
    ids = rows()
    with pytest.raises(UserError, match="3 experts per token; the adapter has 4"):
        model(input_ids=ids, alter_routing=Routing(torch.ones(*ids.shape, 3)))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj.*sees tokens in shape"):
        model(input_ids=ids, alter_routing=Routing(torch.ones(3, 4, 4)))
    with pytest.raises(UserError, match="is a Tensor; expected"):
        model(input_ids=ids, alter_routing=torch.ones(3))
    # a failed pass leaves nothing behind
    assert model.base_model.model._alter_context.state is None
    assert model.base_model.model._alter_context.failed == 0
    model(ids)


def test_encoder_decoder_models_take_static_only():
    config = transformers.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 3, dtype=torch.long)}
    for router in ("learned", "static"):
        base = transformers.T5ForConditionalGeneration(config)
        model = adapted(base, router=router, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
        with pytest.raises(UserError, match="decoder-only") if router == "learned" else contextlib.nullcontext():
            model(**inputs)


def test_unknown_adapter_is_named():
    model = adapted(tiny())
    with pytest.raises(UserError, match=r"no adapter 'defualt'.*Did you mean 'default'"):
        model.base_model.trace(rows(), adapter_name="defualt")
    assert isinstance(model.base_model, AlterModel)
