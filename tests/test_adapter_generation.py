"""Generation: the same tokens with and without a cache, at one forward pass per token; what cannot be followed says so."""

import copy
import io

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, StaticCache

from alter import AlterConfig
from alter.adapter import inputs
from alter.adapter.generation import DecodeState
from alter.adapter.inputs import token_mask
from alter.core import caches
from alter.core.errors import UserError
from alter.logits import entropy
from test_adapter import ARCHITECTURES, adapted, counted, middle_threshold, rows, tiny

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


def generated(model, ids, *, cache, mask=None, **options):
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    values = {"max_new_tokens": 10, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **values)


def routed(kind="llama", router_memory=0.5, **config):
    model = adapted(tiny(kind), router_memory=router_memory, **config).eval()
    if config.get("router") != "static":
        middle_threshold(model, rows())
    return model


def left_padded():
    ids, mask = rows(), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    return ids * mask, mask


@pytest.mark.parametrize("two_passes", [False, True])
def test_a_cache_is_known_by_what_it_is_whatever_it_is_called(two_passes, monkeypatch):
    """transformers 5.24 called it otherwise, and what stood in it was no evidence any more."""
    monkeypatch.setattr(inputs, "NOT_FOR_FROZEN", inputs.NOT_FOR_FROZEN - set(caches.NAMES))
    monkeypatch.setattr(caches, "NAMES", ("what_it_was_called",))
    model = routed(router_memory=0.8, **({} if two_passes else {"from_layer": 1}))
    ids = rows(seed=1)
    assert torch.equal(generated(model, ids, cache=True), generated(model, ids, cache=False))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("memory", [0.0, 0.8])
@pytest.mark.parametrize("seed", [1, 2])
def test_cache_changes_nothing(way, memory, seed):
    model = routed(router_memory=memory)
    ids = rows(seed=seed)
    with_cache = generated(model, ids, cache=True, **WAYS[way])
    assert torch.equal(with_cache, generated(model, ids, cache=False, **WAYS[way]))
    plain = model.unload()
    assert not torch.equal(with_cache, generated(plain, ids, cache=True, **WAYS[way])), "the adapter did something"


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_left_padding_changes_nothing(way):
    model = routed()
    ids, mask = left_padded()
    with_cache = generated(model, ids, cache=True, mask=mask, **WAYS[way])
    assert torch.equal(with_cache, generated(model, ids, cache=False, mask=mask, **WAYS[way]))
    if way == "greedy":
        for row in range(3):
            start = int((mask[row] == 0).sum())
            alone = generated(model, ids[row : row + 1, start:], cache=True)
            assert torch.equal(alone[0], with_cache[row, start:])


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "llama"])
def test_architecture(kind):
    model = routed(kind)
    ids, mask = left_padded()
    for way in ("greedy", "beams"):
        with_cache = generated(model, ids, cache=True, mask=mask, **WAYS[way])
        assert torch.equal(with_cache, generated(model, ids, cache=False, mask=mask, **WAYS[way]))


@pytest.mark.parametrize("router", ["entropy", "static"])
def test_other_routers(router):
    model = routed(router=router)
    ids, mask = left_padded()
    for way in ("greedy", "beams"):
        with_cache = generated(model, ids, cache=True, mask=mask, **WAYS[way])
        assert torch.equal(with_cache, generated(model, ids, cache=False, mask=mask, **WAYS[way]))


@pytest.mark.parametrize("config", [{"entropy_threshold": 1.0}, {"from_layer": 1}], ids=["two passes", "one pass"])
def test_a_cache_of_recurrent_states_alone(config):
    """Such a cache does not tell how many tokens it holds."""
    torch.manual_seed(0)
    settings = MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=3, initializer_range=0.3, eos_token_id=None
    )
    model = adapted(MambaForCausalLM(settings), target_modules=["in_proj", "out_proj"], **config).eval()
    for way in WAYS.values():
        found = generated(model, rows(), cache=True, **way)
        assert torch.equal(found, generated(model, rows(), cache=False, **way)), way
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=rows(), use_cache=True).cache_params
        with pytest.raises(UserError, match="routes of their tokens are unknown"):
            model(input_ids=rows(length=1), cache_params=cache)


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache(padded):
    model = routed()
    ids, mask = left_padded() if padded else (rows(), None)
    expected = generated(model, ids, cache=True, mask=mask)
    found = generated(model, ids, cache=True, mask=mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)


def test_static_cache_routes_padded_prompts_like_a_dynamic_one():
    model = routed(router_memory=1.0)
    ids, mask = left_padded()
    states = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        inputs = model.base_model.model.prepare_inputs_for_generation(ids, attention_mask=mask, past_key_values=cache)
        with torch.no_grad():
            states.append(DecodeState.of(model(**inputs).past_key_values))
    torch.testing.assert_close(states[1].past, states[0].past, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[1].gates, states[0].gates)


@pytest.mark.parametrize("form", ["2-D", "bool", "float", "mapping"])
def test_token_mask_of_any_form(form):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    # as for a static cache of 6 slots
    allowed = torch.ones(4, 6, dtype=torch.bool).tril() & torch.nn.functional.pad(mask, (0, 2))[:, None, None]
    given = {
        "2-D": mask.long(),
        "bool": allowed,
        "float": torch.where(allowed, 0.0, torch.finfo(torch.float32).min),
        "mapping": {"sliding_attention": None, "full_attention": allowed},
    }[form]
    assert torch.equal(token_mask(given, 3, 4, mask.device), mask)
    assert token_mask(None, 3, 4, mask.device).all()
    with pytest.raises(UserError, match="with 3 dimensions"):
        token_mask(mask[None], 3, 4, mask.device)


def test_rows_that_end_early():
    base = tiny(eos_token_id=5)
    model = adapted(base).eval()
    with torch.no_grad():
        base.lm_head.weight[5] += 0.3
    middle_threshold(model, rows())
    ids = rows(batch=6, seed=3)
    for way in WAYS.values():
        with_cache = generated(model, ids, cache=True, max_new_tokens=16, **way)
        assert torch.equal(with_cache, generated(model, ids, cache=False, max_new_tokens=16, **way))


def test_decoding_adds_no_forward_pass():
    model = routed()
    embedding = model.get_input_embeddings()
    for cache in (True, False):
        with counted(embedding) as calls:
            generated(model, rows(), cache=cache)
        assert len(calls) == 1 + 10, "one frozen pass for the prompt, one adapted pass per token"
    with counted(embedding) as calls, model.disable_adapter():
        generated(model, rows(), cache=True)
    assert len(calls) == 10


def test_routes_follow_the_definition():
    """Greedy decoding, step by step by hand: each token's route from the pass that generated it."""
    model = routed()
    ids = rows(batch=1)
    tr = model.base_model.trace(ids)
    gates = [model.base_model.route(tr.entropy, tr.features)]
    _, host = model.base_model.router_host
    config = model.peft_config["default"]
    router = host.alter_router["default"]
    expected = ids
    # evidence of all tokens but the first, with the features that generated them
    evidence = [router(tr.features[0, t]) for t in range(1, ids.shape[1])]
    from alter.adapter.routing import Routing, expert_gates
    from alter.logits.entropy import entropy_from_logits

    with torch.no_grad():
        for _ in range(10):
            seen = {}
            handle = host.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(x=a[0]))
            logits = model(input_ids=expected, alter_routing=Routing(torch.cat(gates, 1))).logits[:, -1]
            handle.remove()
            evidence.append(router(seen["x"][0, -1]))
            weights = torch.tensor([0.5**k for k in range(len(evidence))]).flip(0)
            rho = (torch.stack(evidence) * weights[:, None]).sum(0) / weights.sum()
            high = entropy_from_logits(logits, config.entropy_q) > config.threshold
            gates.append(expert_gates(rho[None, None], high[:, None], config))
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    for cache in (True, False):
        assert torch.equal(generated(model, ids, cache=cache), expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_prompt_logits_exist_in_chunks_only(kind, monkeypatch):
    model = routed(kind)
    ids, mask = left_padded()
    whole = {way: generated(model, ids, cache=True, mask=mask, **WAYS[way]) for way in ("greedy", "beams")}
    head = model.get_base_model().get_output_embeddings()
    sizes = []
    handle = head.register_forward_hook(lambda _, __, out: sizes.append(out.shape[:-1].numel()))
    monkeypatch.setattr(entropy, "CHUNK_BYTES", 5 * 4 * model.config.get_text_config().vocab_size)
    for way, expected in whole.items():
        assert torch.equal(generated(model, ids, cache=True, mask=mask, **WAYS[way]), expected)
    handle.remove()
    # one row in the pass itself, then the 22 real positions; decoding and the adapted pass read one a row
    assert sizes[:6] == [1, 5, 5, 5, 5, 2]


def test_prompt_logits_in_chunks_for_adapters_of_several_orders(monkeypatch):
    model = adapted(tiny(), name="one", entropy_q=1.0).eval()
    model.add_adapter(
        "two", AlterConfig(num_forget_experts=1, r=1, init_weights=False, entropy_q=2.0, entropy_threshold=0.9)
    )
    model.base_model.set_adapter(["one", "two"])
    inner = model.base_model.model
    ids, mask = left_padded()
    with torch.no_grad():
        whole = inner(input_ids=ids, attention_mask=mask).logits
        monkeypatch.setattr(entropy, "CHUNK_BYTES", 5 * 4 * inner.config.vocab_size)
        chunked = inner(input_ids=ids, attention_mask=mask).logits
        model.base_model.set_adapter(["one"])
        alone = inner(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)
    assert not torch.allclose(alone, whole)


def test_transformers_own_loading_generates_the_same(tmp_path):
    base = tiny()
    model = adapted(copy.deepcopy(base), router_memory=0.3).eval()
    middle_threshold(model, rows())
    model.save_pretrained(tmp_path)
    native = copy.deepcopy(base)
    native.load_adapter(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for cache in (True, False):
        expected = generated(model, rows(), cache=cache)
        assert torch.equal(generated(native, rows(), cache=cache), expected)
        assert torch.equal(generated(loaded, rows(), cache=cache), expected)


def test_by_hand_with_a_cache():
    model = routed()
    ids = rows()
    expected = generated(model, ids, cache=True)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        made = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(9):
            out = model(input_ids=made[-1], past_key_values=out.past_key_values)
            made.append(out.logits[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(torch.cat([ids, *made], 1), expected)


def test_several_adapters_generate_together():
    model = adapted(tiny(), name="one").eval()
    model.add_adapter("two", AlterConfig(num_forget_experts=1, r=1, init_weights=False, router="entropy"))
    model.base_model.set_adapter(["one", "two"])
    ids = rows()
    inner = model.base_model.model
    for way in ("greedy", "beams"):
        assert torch.equal(
            generated(inner, ids, cache=True, **WAYS[way]), generated(inner, ids, cache=False, **WAYS[way])
        )


def test_state_mirrors_what_happens_to_the_cache():
    model = routed()
    with torch.no_grad():
        cache = model(input_ids=rows(), use_cache=True).past_key_values
    state = DecodeState.of(cache)
    gates = state.gates["default"].clone()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(state.gates["default"], gates[[2, 0, 1]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(state.gates["default"], gates[[2, 2, 0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert torch.equal(state.gates["default"], gates[[2, 1]])
    assert state.past["default"].shape[0] == 2
    twin = copy.deepcopy(cache)
    twin.batch_select_indices(torch.tensor([1]))
    assert len(DecodeState.of(twin).gates["default"]) == 1
    assert len(state.gates["default"]) == 2
    cache.crop(0)
    assert state.stale is None
    static = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(input_ids=rows(), past_key_values=static)
    static.reset()
    assert DecodeState.of(static).gates == {}


# ---- what cannot be followed -----------------------------------------------------------------------------------------


def test_a_cache_is_pickled_with_its_routes():
    model = routed()
    with torch.no_grad():
        cache = model(input_ids=rows(), use_cache=True).past_key_values
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        twin.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_select_indices(torch.tensor([2, 0]))
        further = rows(batch=2, length=1)
        expected = model(input_ids=further, past_key_values=cache).logits
        assert torch.equal(model(input_ids=further, past_key_values=twin).logits, expected)


def test_cache_from_the_switched_off_adapter():
    model = routed()
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=rows(), use_cache=True).past_key_values
        with pytest.raises(UserError, match="without the active ALTER adapter"):
            model(input_ids=rows(length=1), past_key_values=cache)
        cache = model(input_ids=rows(), use_cache=True).past_key_values
        with model.disable_adapter():
            model(input_ids=rows(length=1), past_key_values=cache)
        with pytest.raises(UserError, match="adapter switched off"):
            model(input_ids=rows(length=1), past_key_values=cache)


def test_cropped_cache_and_several_new_tokens():
    model = routed()
    with torch.no_grad():
        cache = model(input_ids=rows(), use_cache=True).past_key_values
        with pytest.raises(UserError, match="adds 2 tokens"):
            model(input_ids=rows(length=2), past_key_values=cache)
        with pytest.raises(UserError, match="hold routes for 3 rows, but the batch has 2"):
            model(input_ids=rows(batch=2, length=1), past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(UserError, match="cropped"):
            model(input_ids=rows(length=1), past_key_values=cache)


def test_ways_of_generating_that_cannot_be_followed():
    model = routed()
    ids = rows(batch=1, length=12)
    with pytest.raises(UserError, match="prefill_chunk_size"):
        generated(model, ids, cache=True, prefill_chunk_size=4)
    repeated = torch.cat([ids[:, :4]] * 4, 1)
    with pytest.raises(UserError, match="prompt_lookup_num_tokens"):
        generated(model, repeated, cache=True, prompt_lookup_num_tokens=3, max_new_tokens=20)
    with pytest.raises(UserError, match="continuous batching"):
        model(input_ids=ids, write_index=[])
    # and the model is as it was
    assert torch.equal(generated(model, ids, cache=True), generated(model, ids, cache=False))
    assert model.base_model.model._alter_context.session is None


def test_given_routes_leave_no_routes_on_a_cache():
    model = routed()
    tr = model.base_model.trace(rows())
    from alter.adapter import Routing

    gates = model.base_model.route(tr.entropy, tr.features)
    with torch.no_grad():
        out = model(input_ids=rows(), alter_routing=Routing(gates), past_key_values=DynamicCache())
        with pytest.raises(UserError, match="routes of their tokens are unknown"):
            model(input_ids=rows(length=1), past_key_values=out.past_key_values)
