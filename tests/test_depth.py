"""Logit lens and unlearning depth score, beside loops over blocks written out by hand, on models made for it."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from alter import metrics
from alter.attacks import depth
from alter.attacks.base import Attack, Bench, Item
from alter.attacks.weights import train_steps
from alter.comparison.survival import mean_divergences
from alter.core.errors import UserError
from alter.inference.scoring import score
from alter.models.loading import ModelSettings
from pico import byte_tokenizer, pico
from test_adapter import middle_threshold
from test_attacks import with_alter

BLOCKS = 4


def deep(seed):
    return pico(seed, num_hidden_layers=BLOCKS)


def item(number, length, start):
    """A row whose answer is what the original says by itself: with other states in it, that becomes less likely."""
    ids = [(7 * number + 3 * k) % 97 + 1 for k in range(start)]
    said = deep(0).generate(torch.tensor([ids]), max_new_tokens=length - start, min_new_tokens=length - start)
    return Item(number, said[0].tolist(), start, "")


ITEMS = [item(i, *shape) for i, shape in enumerate([(9, 4), (17, 5), (6, 1), (12, 11), (30, 20)])]


@pytest.fixture(scope="module")
def trio():
    """An original, a retrained one, and one that is the original below block 2 and the retrained one from there on."""
    original, retrained = deep(0), deep(1)
    # the same head, so that states are read alike
    retrained.lm_head.load_state_dict(original.lm_head.state_dict())
    half = copy.deepcopy(original)
    for k in range(2, BLOCKS):
        half.model.layers[k].load_state_dict(retrained.model.layers[k].state_dict())
    return original, retrained, half


def by_hand(model, item, put=None, read=None):
    """One row without a batch, block by block in float64: mean log-probability of the answer.

    `put` (block, states [T, D]) replaces what a block gives at the places that generate the answer; with `read` the head
    reads that block's output. Returns also every block's output.
    """
    model = copy.deepcopy(model).double()
    body, ids = model.model, torch.tensor([item.ids])
    places = range(item.start - 1, len(item.ids) - 1)
    states = body.embed_tokens(ids)
    at = torch.arange(len(item.ids))[None]
    rope = body.rotary_emb(states, at)
    mask = torch.full((len(item.ids), len(item.ids)), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    outputs = []
    for k, block in enumerate(body.layers):
        states = block(states, attention_mask=mask, position_ids=at, position_embeddings=rope)
        if put is not None and put[0] == k:
            states = states.clone()
            for place in places:
                states[0, place] = put[1][place].double()
        outputs.append(states[0])
    last = states if read is None else outputs[read][None]
    logits = model.lm_head(body.norm(last))[0]
    total = 0.0
    for place in places:
        exact = logits[place].tolist()
        top = max(exact)
        total += exact[item.ids[place + 1]] - top - math.log(sum(math.exp(x - top) for x in exact))
    return total / len(places), outputs


@torch.no_grad()
def test_the_lens_is_the_models_head_on_each_blocks_output(trio):
    got = depth.lens_probabilities(trio[0], ITEMS, 257)
    assert got.shape == (len(ITEMS), BLOCKS)
    for row, item in enumerate(ITEMS):
        for k in range(BLOCKS):
            assert got[row, k] == pytest.approx(math.exp(by_hand(trio[0], item, read=k)[0]), rel=1e-4)
        # the last depth is what the model says
        assert got[row, -1] == pytest.approx(math.exp(by_hand(trio[0], item)[0]), rel=1e-4)


@torch.no_grad()
def test_falls_are_those_of_one_block_put_in_by_hand(trio):
    original, retrained, _ = trio
    got = depth.falls(original, retrained, ITEMS, 257)
    for row, item in enumerate(ITEMS):
        plain, _ = by_hand(original, item)
        _, states = by_hand(retrained, item)
        for k in range(BLOCKS):
            assert got[row, k] == pytest.approx(plain - by_hand(original, item, put=(k, states[k]))[0], abs=2e-4)


def test_the_depth_from_which_a_fact_is_gone_is_seen(trio):
    original, retrained, half = trio
    assert np.abs(depth.falls(original, original, ITEMS, 257)).max() < 1e-5
    d1, d2 = depth.falls(original, retrained, ITEMS, 257), depth.falls(original, half, ITEMS, 257)
    # the last block's output decides all that is said: the half model ends as its upper blocks do
    assert np.abs(d2[:, :2]).max() < 1e-5
    assert np.abs(d2[:, 2:]).min() > 1e-3
    holds = d1 > depth.KNOWN_BY_A_BLOCK
    assert holds[:, :2].any()
    assert holds[:, 2:].any()
    nothing, everything, part = (depth.depth_scores(d1, d) for d in (np.zeros_like(d1), d1, d2))
    told = ~np.isnan(everything)
    assert told.any()
    assert np.all(nothing[told] == 0)
    assert everything[told] == pytest.approx(1)
    assert np.all(part[told] <= 1)
    assert part[told].max() > 0
    assert part[told].min() < 1


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_what_an_adapter_puts_before_every_row_is_no_place_of_the_row(kind):
    """States, logits and places were counted without it: the reading ended in an error about shapes, or was of other tokens."""
    torch.manual_seed(0)
    more = {"encoder_hidden_size": 16} if kind is PromptEncoderConfig else {}
    original = deep(0)
    model = get_peft_model(deep(0), kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **more)).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    before = 0 if kind is PrefixTuningConfig else 3
    body = model.get_base_model()
    got, fallen = depth.lens_probabilities(model, ITEMS, 257), depth.falls(original, model, ITEMS, 257)
    for row, item in enumerate(ITEMS):
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)
        states = [body.model.norm(each) for each in out.hidden_states[1:-1]] + [out.hidden_states[-1]]
        for k, each in enumerate(states):
            logp = body.lm_head(each)[0, before:].log_softmax(-1)
            places = range(item.start - 1, len(item.ids) - 1)
            own = sum(logp[place, item.ids[place + 1]].item() for place in places) / len(places)
            assert got[row, k] == pytest.approx(math.exp(own), rel=1e-3)
        # the last block's output decides all that is said
        assert fallen[row, -1] == pytest.approx(by_hand(original, item)[0] - own, abs=2e-4)
    rows = [item.encoded for item in ITEMS]
    told = score(model, rows, pad_token_id=257, progress=False).logprob
    how = dict(rate=1e-3, steps=1, batch_size=len(rows), pad_token_id=257, seed=0)
    ((_, loss),) = train_steps(model, rows, [w for w in model.parameters() if w.requires_grad], **how)
    assert loss == pytest.approx(-np.concatenate(told).mean(), rel=1e-4)
    text = ITEMS[1].ids
    with torch.no_grad():
        p = original(input_ids=torch.tensor([text])).logits[0].double().log_softmax(-1)
        q = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, before:].double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert mean_divergences(original, model, [text]) == pytest.approx([expected], rel=1e-3)


def test_scores_are_the_published_sum():
    rng = np.random.default_rng(0)
    d1, d2 = rng.normal(0.2, 0.4, (20, 6)), rng.normal(0.2, 0.4, (20, 6))
    d1[3] = -1
    for row, got in enumerate(depth.depth_scores(d1, d2)):
        over = under = 0.0
        for one, two in zip(d1[row], d2[row], strict=True):
            if one > 0.05:
                over += one * min(max(two / one, 0), 1)
                under += one
        assert math.isnan(got) if under == 0 else got == pytest.approx(over / under)
    assert math.isnan(depth.depth_scores(d1, d2)[3])


def test_an_adapter_counts_in_its_blocks_and_hooks_are_gone():
    model = with_alter(deep(0))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "alter_B" in name:
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    with model.disable_adapter():
        base = depth.lens_probabilities(model, ITEMS, 257)
    assert np.allclose(base, depth.lens_probabilities(deep(0), ITEMS, 257), rtol=1e-4)
    middle_threshold(model, torch.tensor([ITEMS[1].ids]))
    adapted = depth.lens_probabilities(model, ITEMS, 257)
    assert np.abs(adapted / base - 1).max() > 1e-2
    for row, item in enumerate(ITEMS):
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            logp = model(ids).logits[0, item.start - 1 : -1].log_softmax(-1).gather(1, ids[0, item.start :, None])
        assert adapted[row, -1] == pytest.approx(float(logp.mean().exp()), rel=1e-3)
    assert not any(module._forward_hooks for module in depth.decoder_blocks(model))


def test_what_cannot_be_compared_is_refused(trio, tmp_path):
    with pytest.raises(UserError, match="4 and 2 blocks of width 32 and 32"):
        depth.falls(trio[0], pico(0), ITEMS, 257)
    with pytest.raises(UserError, match="no list of blocks"):
        depth.decoder_blocks(torch.nn.Linear(2, 2))
    settings = Attack(model="m", forget="f", retrained="r")

    def bench(name, model):
        made = Bench(settings, name, ModelSettings(model="m"), [], [], [], [])
        made.model, made.vocabulary = model, byte_tokenizer()
        made.items = lambda numbers: ITEMS
        return made

    same = {name: bench(name, trio[0]) for name in ("original", "retrained", "unlearned")}
    with pytest.raises(UserError, match="nothing to look at"):
        depth.unlearning_depth(same)
    found = depth.unlearning_depth(
        {name: bench(name, model) for name, model in zip(("original", "retrained", "unlearned"), trio, strict=True)}
    )
    d1, d2 = (depth.falls(trio[0], model, ITEMS, byte_tokenizer().pad_token_id) for model in trio[1:])
    scores = depth.depth_scores(d1, d2)
    told = ~np.isnan(scores)
    assert found.per_item == pytest.approx(scores[told].tolist())
    assert found.extra["falls"]["unlearned"] == pytest.approx(d2.mean(axis=0).tolist())
    ends = found.extra["fall_intervals"]["unlearned"]
    assert ends == [None if (each := metrics.samples.row_interval(block)) is None else list(each) for block in d2.T]
    assert any(ends)
    assert found.extra["interval"] == list(metrics.samples.row_interval(scores))
    assert (found.n, found.extra["left_out"]) == (told.sum(), (~told).sum())
