"""The head on labelled rows, chunk by chunk: the model's own logits, and the losses and gradients of all logits at once."""

import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import children
from alter.groundwork.frozen import labelled, top_k
from alter.logits import entropy
from alter.logits.head import Head, Part, head_on, measuring
from alter.methods.objectives import FORGET, RETAIN, Emitted, Labelled, Reference
from pico import VOCAB, pico

SMALL = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
# what happens to their logits: nothing; capped; multiplied; divided; a shared head; a body within the body; a state-space
# body; a transformation and a bias before the head
MODELS = {
    "Llama": SMALL,
    "Gemma2": SMALL | {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "Cohere": SMALL | {"logit_scale": 0.3},
    "Granite": SMALL | {"logits_scaling": 3.0},
    "GPT2": {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1},
    "OPT": SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "GPTNeoX": SMALL,
    "Mamba": {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "Bert": SMALL | {"is_decoder": True},
}


def tiny(name, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name] | more)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch(rows=3, length=9, vocabulary=61, seed=0):
    """Ids, a mask with padding on the right, and labels of which some rows have none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1] = -100
    mask[2, 6:] = 0
    labels[2, 6:] = -100
    return ids, mask, labels


@pytest.fixture
def chunks_of(monkeypatch):
    """Set how many rows of a vocabulary go through the head at a time."""

    def choose(rows, vocabulary=61):
        monkeypatch.setattr(entropy, "CHUNK_BYTES", 4 * vocabulary * rows)

    return choose


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def equal(got, expected, **tolerances):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_the_models_own_and_the_body_is_left_out(name):
    model = tiny(name)
    ids, mask, _ = batch()
    expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    head, passes = Head(model), []
    with torch.no_grad(), head.reading() as read:
        model(input_ids=ids, attention_mask=mask)
    for module in model.modules():
        if module.__class__.__name__.endswith(("Layer", "Block")):
            module.register_forward_hook(lambda *_: passes.append(1))
    torch.testing.assert_close(head.logits(read[0][mask.bool()]), expected)
    assert head.logits(read[0][mask.bool()][:0]).shape == (0, 61)
    assert passes == []
    # nothing is left behind
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected)
    assert passes


def test_a_body_that_was_not_seen_runs_and_changes_nothing():
    model = tiny("Gemma2")
    ids, _, _ = batch()
    expected = model(input_ids=ids).logits
    with head_on(model, torch.ones_like(ids, dtype=torch.bool)):
        torch.testing.assert_close(model(input_ids=ids).logits, expected.flatten(0, 1))
    head = Head(model)
    with head.reading() as read:
        model(input_ids=ids)
    torch.testing.assert_close(Head(model).logits(read[0].flatten(0, 1)), expected.flatten(0, 1))


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_training_all_weights_has_the_gradients_of_all_logits(name, rows, tied, chunks_of):
    model = tiny(name, tie_word_embeddings=tied)
    ids, mask, labels = batch()
    positions = labelled(labels)
    truth = labels[:, 1:][positions[:, :-1]]
    logits = model(input_ids=ids, attention_mask=mask).logits[positions]
    whole = torch.nn.functional.cross_entropy(logits, truth)
    expected = gradients(model, whole)
    chunks_of(rows)
    part = Part(len(truth), lambda chunk, at: Emitted(chunk, truth[at]).nll[:, None])
    with measuring(model, positions, [part]):
        values = model(input_ids=ids, attention_mask=mask).logits
    assert values.shape == (len(truth), 1)
    loss = values.mean()
    assert loss.item() == pytest.approx(whole.item(), abs=1e-12)
    # transformers' Mamba scans in single precision
    near = {"rtol": 1e-4, "atol": 1e-6} if name == "Mamba" else {"rtol": 1e-9, "atol": 1e-12}
    equal(gradients(model, loss), expected, **near)


OBJECTIVES = [
    cls() for registry in (FORGET, RETAIN) for cls in registry.values() if cls().needs.labels and cls().needs.rows
]


def both_parts(objective, emitted, other, high, row, base):
    """The loss, from what the whole or the chunked way made of the tokens and of their alternatives."""
    second = Labelled(other, torch.zeros_like(high), row, 3, base - 0.5)
    return objective(Labelled(emitted, high, row, 3, base, second))


@pytest.mark.parametrize("rows", [1, 3, 5, 1000])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}")
def test_every_objective_is_that_of_all_logits(objective, rows, chunks_of):
    if "hinge" in type(objective).model_fields:
        objective = type(objective)(hinge=0.7)
    model = tiny("Gemma2")
    ids, mask, labels = batch()
    others = ((labels + 7) % 61).where(labels != -100, labels)
    positions = labelled(labels)
    generator = torch.Generator().manual_seed(5)
    n = int(positions.sum())
    high = torch.rand(n, generator=generator) < 0.4
    row = positions.nonzero()[:, 0]
    base = -3 * torch.rand(n, generator=generator, dtype=torch.float64)
    kept = top_k(torch.randn(n, 61, generator=generator, dtype=torch.float64).log_softmax(-1), 6)
    reference = Reference(kept.ids.long(), kept.logp) if objective.needs.views else None
    truth, wrong = (y[:, 1:][positions[:, :-1]] for y in (labels, others))

    def forward(both):
        """The rows once, or twice in one batch: the second time for their alternative."""
        return model(input_ids=ids.repeat(both, 1), attention_mask=mask.repeat(both, 1)).logits

    logits = forward(2)
    first, second = logits[:3][positions], logits[3:][positions]
    whole = both_parts(
        objective,
        objective.per_token(Emitted(first, truth, reference, objective.needs.runner_up)),
        torch.nn.functional.cross_entropy(second, wrong, reduction="none"),
        *(high, row, base),
    )
    expected = gradients(model, whole)

    chunks_of(rows)
    sizes = []

    def own(chunk, at):
        sizes.append(len(chunk))
        compared = reference and reference.at(at)
        return objective.per_token(Emitted(chunk, truth[at], compared, objective.needs.runner_up))[:, None]

    parts = [Part(n, own), Part(n, lambda chunk, at: Emitted(chunk, wrong[at]).nll[:, None])]
    with measuring(model, positions.repeat(2, 1), parts):
        values = forward(2)[:, 0]
    assert max(sizes) <= rows
    assert sum(sizes) == n
    loss = both_parts(objective, values[:n], values[n:], high, row, base)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-12)
    equal(gradients(model, loss), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one(n, chunks_of):
    chunks_of(2)
    model = tiny("Llama")
    ids, mask, _ = batch()
    positions = torch.zeros_like(mask, dtype=torch.bool)
    positions[0, 4] = bool(n)
    part = Part(n, lambda chunk, at: Emitted(chunk, ids[0, 5:6][at]).nll[:, None].expand(-1, 2))
    with measuring(model, positions, [Part(0, part.of), part]):
        values = model(input_ids=ids, attention_mask=mask).logits
    assert values.shape == (n, 2)
    found = gradients(model, values.sum())
    # every parameter takes part, as DistributedDataParallel wants it
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert (sum(grad.abs().sum() for grad in found.values()) > 0) == bool(n)


def test_bfloat16_autocast_and_what_is_on_the_head(chunks_of):
    """LoRA on the head, trained in bf16 by autocast: chunks have the gradients of one chunk."""
    model = get_peft_model(
        pico(tie_word_embeddings=False), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    ids, mask, labels = batch(vocabulary=VOCAB)
    positions = labelled(labels)
    truth = labels[:, 1:][positions[:, :-1]]

    def of(chunk, at):
        emitted = Emitted(chunk, truth[at], None, True)
        assert emitted.nll.dtype == torch.float32
        return torch.stack([emitted.nll, emitted.other], 1)

    found = []
    for rows in (1000, 2):
        chunks_of(rows, VOCAB)
        with torch.autocast("cpu", torch.bfloat16):
            with measuring(model, positions, [Part(len(truth), of)]):
                values = model(input_ids=ids, attention_mask=mask).logits
            found.append((values, gradients(model, values.mean())))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert sum("lm_head" in name for name in found[0][1]) == 2
    equal(found[1][1], found[0][1], rtol=0.03, atol=5e-4)


def test_the_last_chunk_alone_is_kept_for_the_backward(chunks_of):
    """The head runs once a chunk forward and once more backward, but for the last; one row more is the model's own pass."""
    chunks_of(4)
    model, seen = tiny("Llama"), []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[-2]))
    ids, mask, labels = batch()
    positions = labelled(labels)
    n = int(positions.sum())
    assert n == 9
    with measuring(model, positions, [Part(n, lambda chunk, _: chunk.logsumexp(-1, keepdim=True))]):
        values = model(input_ids=ids, attention_mask=mask).logits
    assert seen == [1, 3, 3, 3]
    values.sum().backward()
    assert seen == [1, 3, 3, 3, 3, 3]


def sharded_work(rank, meeting):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    entropy.CHUNK_BYTES = 4 * VOCAB * 4

    def loss_of(model, number, whole=None):
        ids, mask, labels = batch(vocabulary=VOCAB, seed=number)
        positions = labelled(labels)
        truth = labels[:, 1:][positions[:, :-1]]
        part = Part(len(truth), lambda chunk, at: Emitted(chunk, truth[at]).nll[:, None])
        with measuring(whole or model, positions, [part]):
            return model(input_ids=ids, attention_mask=mask).logits.mean()

    for tied, wrapping in ((True, "ddp"), (True, "root"), (False, "head"), (False, "checkpointed")):
        alone = pico(tie_word_embeddings=tied)
        (sum(loss_of(alone, number) for number in range(2)) / 2).backward()
        model = pico(tie_word_embeddings=tied).train()
        if wrapping == "ddp":
            wrapped = DistributedDataParallel(model)
            loss = loss_of(wrapped, rank, model)
        else:
            if wrapping == "checkpointed":
                model.gradient_checkpointing_enable()
            for block in [*model.model.layers, *([model.lm_head] if wrapping == "head" else [])]:
                fully_shard(block)
            # the head's weights are not whole outside of the model's own pass
            fully_shard(model, reshard_after_forward=True)
            loss = loss_of(model, rank)
        loss.backward()
        for (name, p), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            grad = p.grad if wrapping == "ddp" else p.grad.full_tensor()
            torch.testing.assert_close(grad, expected.grad, msg=lambda text, at=(wrapping, name): f"{at}: {text}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_and_sharded_weights_have_the_same_gradients(tmp_path):
    children.ranks(sharded_work, str(tmp_path / "meeting"), processes=2).join()
