"""One pass with `from_layer`: the trunk stays the base, routes are those of the frozen base however the tokens come in."""

from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel

from alter.adapter import AlterConfig
from alter.adapter.generation import DecodeState
from alter.adapter.routing import (
    INFINITE,
    History,
    Routing,
    continue_routes,
    entropy_sides,
    previous_real,
    route_tokens,
    take_previous,
)
from alter.core.errors import UserError
from alter.groundwork.frozen import FrozenRow
from alter.training.probe import fit_entropy_probe
from test_adapter import ARCHITECTURES, adapted, counted, rows, tiny
from test_adapter_generation import WAYS, generated, left_padded


def one_pass(kind="llama", from_layer=1, **config):
    """An adapter on the upper blocks whose router and probe have opinions."""
    model = adapted(tiny(kind), from_layer=from_layer, router_memory=0.5, **config).eval()
    _, layer = model.base_model.router_host
    if layer.alter_probe:
        with torch.no_grad():
            layer.alter_probe["default"].weight.normal_(std=3.0)
    return model


def frozen_gates(model, ids, mask=None):
    """Gates from the frozen base's trace of whole rows: those that training sees."""
    trace = model.base_model.trace(ids, mask)
    return model.base_model.route(trace.entropy, trace.features, mask)


def same_route(found, expected):
    """The same experts open; kernels round differently for one token and for many, and so do the shares of open ones."""
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@contextmanager
def own_gates(model):
    """Within the block the gates of every token that a pass of the model routes, pass by pass."""
    seen, inside = [], model.base_model.model
    context = inside._alter_context
    handle = inside.register_forward_hook(
        lambda *_: seen.append(context.state.routing["default"].gates.clone()), prepend=True
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("given", "first"), [(0, 0), (2, 2), (0.34, 1), (0.9, 2)])
def test_experts_sit_in_the_upper_blocks_alone(given, first):
    model = adapted(tiny(), from_layer=given)
    blocks = {int(n.split("layers.")[1].split(".")[0]) for n, _ in model.named_parameters() if "alter_A" in n}
    assert blocks == set(range(first, 3))
    assert f"layers.{first}." in model.base_model.router_of()[0]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_plain_pass_runs_once_and_takes_the_routes_of_the_frozen_base(kind):
    model = one_pass(kind)
    ids, mask = left_padded()
    gates = frozen_gates(model, ids, mask)
    assert len({tuple(g.tolist()) for g in gates.flatten(0, 1) > 0}) > 2, "routes differ between tokens"
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, alter_routing=Routing(gates)).logits
        with counted(model.base_model.model.get_output_embeddings()) as calls, own_gates(model) as own:
            output = model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert len(calls) == 1
    real = mask.bool()
    assert torch.equal(torch.cat(own, 1)[real], gates[real])
    torch.testing.assert_close(output.logits[real], expected[real], rtol=0, atol=0)


def test_a_pass_with_gradients_for_the_router_takes_the_same_routes():
    model = one_pass()
    ids = rows()
    expected = model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected.detach())
    expected.sum().backward()
    assert model.base_model.router_host[1].alter_router["default"].weight.grad is not None


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [3, 3, 1, 2]])
def test_chunks_give_what_the_whole_row_gives(chunks):
    model = one_pass()
    ids, mask = left_padded()
    cache, parts, done = None, [], 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    with torch.no_grad(), own_gates(model) as own:
        for size in chunks:
            at = slice(done, done + size)
            done += size
            output = model(
                input_ids=ids[:, at],
                attention_mask=mask[:, :done],
                position_ids=positions[:, at],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-3, atol=1e-3)
    same_route(torch.cat(own, 1)[real], frozen_gates(model, ids, mask)[real])
    assert DecodeState.of(cache).history.length == 9


@pytest.mark.parametrize("way", WAYS)
def test_generation_takes_the_routes_of_training(way):
    model = one_pass()
    ids, mask = left_padded()
    with_cache = generated(model, ids, cache=True, mask=mask, **WAYS[way])
    assert torch.equal(with_cache, generated(model, ids, cache=False, mask=mask, **WAYS[way]))
    if way == "greedy":
        with own_gates(model) as own:
            sequences = generated(model, ids, cache=True, mask=mask)[:, :-1]
        full = torch.cat([mask, torch.ones(3, sequences.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        expected = frozen_gates(model, sequences, full)
        same_route(torch.cat(own, 1)[full.bool()], expected[full.bool()])


def test_every_token_of_fifty_rows_takes_the_route_of_training_while_generating():
    model = one_pass()
    ids = rows(batch=50, length=12)
    mask = (torch.arange(12) >= torch.arange(50)[:, None] % 7).long()
    with own_gates(model) as own:
        sequences = generated(model, ids, cache=True, mask=mask, max_new_tokens=12)[:, :-1]
    full = torch.cat([mask, torch.ones(50, sequences.shape[1] - 12, dtype=mask.dtype)], 1)
    assert len(own) == 12
    real = full.bool()
    same_route(torch.cat(own, 1)[real], frozen_gates(model, sequences, full)[real])


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("memory", [0.0, 0.7, 1.0])
def test_routes_are_bit_equal_however_the_tokens_are_fed_in(memory, probed):
    config = AlterConfig(num_forget_experts=3, router_memory=memory, from_layer=1, entropy_gate=probed)
    assert config.probed is probed
    random = torch.Generator().manual_seed(0)
    evidence = torch.randn(20, 30, 4 + probed, generator=random)
    mask = (torch.rand(20, 30, generator=random) > 0.1) & (torch.arange(30) >= torch.arange(20)[:, None] % 5)
    starts = torch.rand(20, 30, generator=random) < 0.1
    previous = previous_real(mask, starts)
    read = take_previous(evidence, previous, 0.0)
    high = read[..., -1] if probed else torch.zeros(20, 30)
    expected = route_tokens(read[..., :4], entropy_sides(high, previous >= 0), mask, config)[0]
    for sizes in ([30], [1] * 30, [7, 1, 1, 16, 5]):
        history, gates = History("default"), []
        for part in zip(*(t.split(sizes, 1) for t in (evidence, mask, starts)), strict=True):
            own, known = continue_routes(*part, history.last, config)
            history.then(known)
            gates.append(own)
        assert torch.equal(torch.cat(gates, 1)[mask], expected[mask])
    # what is cropped can be fed in again
    for length in (23, 24, 1, 0):
        history.crop(length)
        assert history.length == length
        own, known = continue_routes(evidence[:, length:], mask[:, length:], starts[:, length:], history.last, config)
        assert torch.equal(own[mask[:, length:]], expected[:, length:][mask[:, length:]])
        history.then(known)


def test_a_decoded_token_costs_the_same_after_however_many():
    """The history is never read again: neither its evidence nor the gates of tokens that have been."""
    model = one_pass()
    ids = rows(batch=2)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        history = DecodeState.of(cache).history
        first = history._parts[0]
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert history._parts[0] is first
    assert [part.seen.shape[1] for part in history._parts] == [ids.shape[1], 1]


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 4},
    ],
)
def test_ways_of_generating_that_two_passes_refuse(options):
    model = one_pass()
    ids = rows(batch=1) if "prompt_lookup_num_tokens" in options else rows()
    expected = generated(model, ids, cache=True)
    assert torch.equal(generated(model, ids, cache=True, **options), expected)


def test_assisted_decoding_gives_the_same_tokens():
    model, assistant = one_pass(), tiny(seed=3, layers=1)
    ids = rows(batch=1)
    expected = generated(model, ids, cache=True)
    assert torch.equal(generated(model, ids, cache=True, assistant_model=assistant), expected)


def test_exact_entropy_takes_two_passes_and_no_entropy_gate_takes_one():
    ids = rows()
    for config, passes in (({"entropy_source": "exact"}, 2), ({"entropy_gate": False}, 1)):
        model = one_pass(**config)
        assert not model.base_model.router_host[1].alter_probe
        with torch.no_grad(), counted(model.base_model.model.get_output_embeddings()) as calls:
            model(input_ids=ids)
        assert len(calls) == passes


def test_the_probe_decides_between_one_expert_and_several():
    model = one_pass()
    ids = rows()
    probe = model.base_model.router_host[1].alter_probe["default"]
    for bias, several in ((1e6, True), (-1e6, False)):
        with torch.no_grad():
            probe.bias.fill_(bias)
        opened = (frozen_gates(model, ids) > 0).sum(-1)[:, 1:]
        assert bool((opened > 1).all()) is several
        assert several or bool((opened == 1).all())
    assert model.base_model.trace(ids).entropy[:, 0].eq(INFINITE).all()


def test_it_is_saved_and_loaded(tmp_path):
    model = one_pass(from_layer=0.5)
    ids = rows()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
    assert again.peft_config["default"].from_layer == 0.5


def test_a_cache_filled_without_the_adapter_is_refused():
    model = one_pass()
    ids = rows()
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(UserError, match="without the active ALTER adapter"):
            model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"from_layer": 3}, "3 blocks"),
        ({"from_layer": 1.5}, "strictly between 0 and 1"),
        ({"from_layer": True}, "number of a block"),
        ({"from_layer": 1, "bias": "all"}, "untouched base"),
        ({"from_layer": 1, "modules_to_save": ["lm_head"]}, "untouched base"),
        ({"from_layer": 1, "router_layer": "layers.2.self_attn.q_proj"}, "no expert has changed"),
        ({"from_layer": 1, "entropy_source": "exakt"}, "exact"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        adapted(tiny(), **config)


def test_a_layer_before_the_routers_is_named():
    model = adapted(tiny(), from_layer=1, router_layer="layers.1.self_attn.o_proj").eval()
    with torch.no_grad(), pytest.raises(UserError, match=r"`router_layer` 'model.layers.1.self_attn.q_proj'"):
        model(input_ids=rows())


def test_without_it_nothing_changes():
    assert AlterConfig().from_layer is None
    assert not AlterConfig().one_pass
    assert not any("probe" in name for name in adapted(tiny()).state_dict())


def test_the_probe_is_fitted_and_measured_on_rows_left_out():
    random = torch.Generator().manual_seed(0)
    made = []
    for _ in range(40):
        features = torch.randn(12, 8, generator=random) * 3 + 1
        made.append(FrozenRow(entropy=features[:, 2] + 1.2, features=features.half()))
    weight, bias, found = fit_entropy_probe(made, 1.7)
    high = torch.cat([row.entropy[1:] > 1.7 for row in made])
    said = (torch.cat([row.features[1:].float() for row in made]) @ weight.t() + bias)[:, 0] > 0
    assert (said == high).float().mean() > 0.95
    assert found["agreement"] > 0.95
    assert found["tokens"] == 8 * 11
    # where all tokens are on one side there is nothing to fit
    weight, bias, found = fit_entropy_probe(made, 1e6)
    assert not weight.any()
    assert float(bias) < 0
    assert found["agreement"] == 1.0
