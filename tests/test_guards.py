"""Guards at inference: each scores, generates, is served and attacked like any model, and off it is the base bit for bit."""

import json
import math
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from alter import cli
from alter.attacks import run as attacks
from alter.attacks.weights import base_linears
from alter.core.errors import UserError
from alter.data import rewording
from alter.data.encoding import encode, encode_all, encode_prompt
from alter.data.rows import Example, load_examples
from alter.guarding import classifier, eco
from alter.guarding.run import make_guard, write_guard
from alter.guarding.settings import MakeGuard
from alter.inference import internals, scoring
from alter.inference.generation import generate, left_padded, sample
from alter.methods import presets
from alter.models import as_names, guards
from alter.models.guards import Detector, Likeness, agents, mean_states, window_means
from alter.models.guards.corruption import word_ranks
from alter.models.guards.neurons import keys_of
from alter.models.loading import load_model
from alter.serving.engine import Engine
from alter.serving.jobs import Job
from alter.storage.records import read_records
from alter.training.run import Unlearn, unlearn
from pico import PAD, byte_tokenizer, pico, run_on, save_pico, write_jsonl, write_people

# these rows have no paraphrases, translations or second turns; UDS needs an original that knows them; searches repeat the rest
SKIPPED = ("paraphrase", "languages", "dialogue", "beginning", "hint", "few_shot", "uds")
SKIPPED += ("jailbreak", "evolve", "soft_prompt", "relearn_searched")
TRAINED = ["uld", "whp_logits", "o3"]
KINDS = [*TRAINED, "eco"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pico model, rows, and a run of every method that makes a guard."""
    folder = write_people(tmp_path_factory.mktemp("guards"), ["Ada", "Bo"], 4, 8)
    save_pico(folder / "model", initializer_range=0.2, max_position_embeddings=256)
    save_pico(folder / "retrained", seed=1, initializer_range=0.2, max_position_embeddings=256)
    write_jsonl(folder / "benign.jsonl", [{"text": "The sea is blue and the sky is too."}] * 4)
    for method in TRAINED:
        given = {"method": method, **run_on(folder, folder / method), "max_steps": 3, "batch_size": 2}
        given |= {"gradient_accumulation_steps": 1, "learning_rate": 3e-2}
        unlearn(Unlearn.model_validate(presets.expand(given)))
    rows = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain")}
    # this model hardly tells a part of a question
    how = {"kind": "eco", "threshold": 0.5, "rounds": 2, "window": 64}
    given = {"model": str(folder / "model"), **rows, "guard": how, "out": adapter(folder, "eco"), "device": "cpu"}
    make_guard(MakeGuard.model_validate(given))
    for kind, more in (
        ("alu", ["--guard.targets", "Ada", "--guard.longest", "16"]),
        ("neurons", ["--guard.share", "0.2"]),
        ("key_space", ["--guard.share", "1.0"]),
    ):
        given = [] if kind == "alu" else [part for name, path in rows.items() for part in (f"--{name}", path)]
        made = ["guard", "--model", str(folder / "model"), "--guard.kind", kind, *more, *given, "--device", "cpu"]
        assert cli.main([*made, "--out", adapter(folder, kind)]) == 0
    return folder


def adapter(folder, kind):
    return str(folder / kind / "adapter")


def loaded(folder, kind):
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model, tokenizer = load_model(str(folder / "model"), adapter(folder, kind), device="cpu")
    return base, model, tokenizer


def rows_of(folder, tokenizer):
    forget, retain = (load_examples(str(folder / f"{name}.jsonl")) for name in ("forget", "retain"))
    return encode_all(tokenizer, [*forget, *retain], max_length=None)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_is_one_model_off_the_base_and_on_another(folder, kind):
    base, model, tokenizer = loaded(folder, kind)
    assert isinstance(model, guards.Guard)
    assert guards.GUARDS[model.kind] is type(model)
    rows = rows_of(folder, tokenizer)
    with model.disable_adapter():
        off = scoring.score(model, rows, pad_token_id=PAD, progress=False)
    plain = scoring.score(base, rows, pad_token_id=PAD, progress=False)
    on = scoring.score(model, rows, pad_token_id=PAD, progress=False)
    for a, b, c in zip(off.logprob, plain.logprob, on.logprob, strict=True):
        assert np.array_equal(a, b)
        assert np.isfinite(c).all()
    assert not np.allclose(on.logprob[0], plain.logprob[0])
    assert model.get_output_embeddings() is model.base.get_output_embeddings()


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_is_called_as_a_model_of_transformers(folder, kind):
    base, model, tokenizer = loaded(folder, kind)
    row = rows_of(folder, tokenizer)[0]
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
        torch.testing.assert_close(out.loss, expected)
        with model.disable_adapter():
            with model.disable_adapter():
                pass
            assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert model.enabled
    with pytest.raises(UserError, match="not inputs_embeds"):
        model(inputs_embeds=base.get_input_embeddings()(ids))
    prompt = torch.tensor([[*row.input_ids[: row.prompt_length]]])
    said = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    # tokens that are taken back leave what is known of the prompt
    cache, further = DynamicCache(config=model.config), ids[:, row.prompt_length : row.prompt_length + 2]
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache)
        first = model(input_ids=further, past_key_values=cache).logits
        cache.crop(-2)
        torch.testing.assert_close(model(input_ids=further, past_key_values=cache).logits, first)
    if model.decides:
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            model.generate(**said, prompt_lookup_num_tokens=2)
    else:
        assert torch.equal(model.generate(**said, prompt_lookup_num_tokens=2), model.generate(**said))


@pytest.mark.parametrize("kind", ["o3", "eco", "key_space"])
def test_a_prompt_is_recognised_in_a_batch_as_alone_where_positions_are_learnt(tmp_path, kind):
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 128}
    base = GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3, bos_token_id=256, eos_token_id=256)).eval()
    seen = []

    def noted(given, *_):
        seen.append(given)
        return torch.zeros(len(given))

    if kind == "o3":
        tuned = get_peft_model(base, LoraConfig(target_modules=["c_attn"])).eval()
        detector = Detector(Likeness.of(torch.randn(4, 1, 32)), noted)
        model = guards.Detected(tuned, [detector], [2])
    elif kind == "eco":
        model = guards.Corrupted(
            base, lambda states, mask, look: noted(mean_states([states], mask)), {"depth": 1, "threshold": 0.5}
        )
    else:
        given = {"layer": "transformer.h.1.mlp.c_proj", "half": 1.0}
        model = guards.Abstaining(base, torch.zeros(128), torch.ones(128), given)
    prompts = [[3, 4, 5, 6], list(range(10, 40))]

    def keys(ids, mask):
        if kind == "key_space":
            return keys_of(base, model.settings["layer"], ids, mask, mask.sum(1))
        model.decide(ids, mask)
        return seen[-1]

    together = keys(*left_padded(prompts, PAD, torch.device("cpu")))
    alone = [keys(*left_padded([prompt], PAD, torch.device("cpu"))) for prompt in prompts]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "neurons", "key_space", "alu"])
def test_a_guard_that_knows_the_prompt_by_its_cache_does_not_answer_without(folder, kind):
    _, model, tokenizer = loaded(folder, kind)
    prompt = torch.tensor([encode_prompt(tokenizer, Example("Where was Ada born, 1?", "", "qa"))])
    said = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    if kind in ("o3", "eco", "key_space", "alu"):
        with pytest.raises(UserError, match="`use_cache` is False, but this guard keeps in the cache"):
            model.generate(**said, use_cache=False)
    else:
        assert torch.equal(model.generate(**said, use_cache=False), model.generate(**said))
    with model.disable_adapter():
        assert torch.equal(model.generate(**said, use_cache=False), model.generate(**said))


def test_the_base_takes_tokens_back_in_a_cache_that_was_made_without_a_configuration(folder):
    _, model, _ = loaded(folder, "eco")
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
        first = model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache).logits
        cache.crop(-2)
        assert cache.get_seq_length() == 3
        torch.testing.assert_close(model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache).logits, first)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_that_the_guard_computes_with(folder, kind):
    base, model, tokenizer = loaded(folder, kind)
    rows = rows_of(folder, tokenizer)[:2]
    found = dict(internals.hidden_states(model, rows, pad_token_id=PAD, progress=False))
    for i, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            if kind == "o3":
                # the LoRA's update with this row's weight folded into the base, layer by layer
                weight = float(model.decide(ids, None))
                assert weight > 0
                twin = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
                for name, module in model.base.named_modules():
                    if hasattr(module, "lora_A"):
                        update = module.lora_B["default"].weight @ module.lora_A["default"].weight
                        twin.get_submodule(name).weight += weight * module.scaling["default"] * update
            else:
                twin = base
            asked = {"input_ids": ids}
            if kind == "eco":
                assert model.decide(ids, None, [row.prompt_length]) == row.prompt_length - 1
                asked = {"inputs_embeds": naive_corrupted(base, row.input_ids, row.prompt_length - 1, model.settings)}
            states = twin(**asked, output_hidden_states=True).hidden_states
        expected = torch.stack([state[0] for state in states], dim=1).numpy()
        assert found[i] == pytest.approx(expected, abs=2e-5)


def test_layers_that_an_assistant_shares_are_attacked_once(folder):
    _, model, _ = loaded(folder, "whp_logits")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert [name.removeprefix("base.") for name, _ in base_linears(model)] == [n for n, _ in base_linears(base)]


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """What attacks on the original and the retrained model have left, which are the same for every guard."""
    return tmp_path_factory.mktemp("others")


@pytest.mark.parametrize("kind", KINDS)
def test_every_attack_runs_on_a_guard(folder, tmp_path, kind, others):
    shutil.copytree(others, tmp_path / "out")
    settings = attacks.Attack.model_validate(
        {
            "model": str(folder / "model"), "adapter": adapter(folder, kind), "retrained": str(folder / "retrained"),
            "forget": str(folder / "forget.jsonl"), "out": str(tmp_path / "out"), "rows": 3, "max_new_tokens": 6,
            "samples": 2, "prefill_tokens": 2, "probe_rows": 8, "device": "cpu", "budget": "8",
            "attacks": [name for name in attacks.ATTACKS if name not in SKIPPED],
            "relearn": {"rows": 4, "steps": [1], "benign": str(folder / "benign.jsonl")},
        }
    )  # fmt: skip
    attacks.attack(settings)
    for path in (tmp_path / "out").iterdir():
        if ".original." in path.name or ".retrained." in path.name:
            shutil.copy(path, others)
    assert list(others.iterdir())
    found = read_records(tmp_path / "out" / "records.json")
    of = {(r.model, r.extra.get("attack"), r.metric): r for r in found if r.extra.get("part") != "relearned"}
    for name in settings.attacks:
        assert ("unlearned", name) in {(model, attack) for model, attack, _ in of}, name
    # taken off, it is the original; its last block, read by its own head, is what it says itself
    strip, original = (of[m, a, "attack_probability"] for m, a in (("unlearned", "strip"), ("original", "none")))
    assert strip.per_item == original.per_item
    last = max(
        (r for r in found if (r.model, r.metric) == ("unlearned", "attack_lens")), key=lambda r: r.extra["depth"]
    )
    plain = dict(
        zip(
            of["unlearned", "none", "attack_probability"].extra["rows"],
            of["unlearned", "none", "attack_probability"].per_item,
            strict=True,
        )
    )
    assert last.per_item == pytest.approx([plain[row] for row in last.extra["rows"]], abs=1e-4)


@pytest.mark.parametrize("kind", ["neurons", "key_space", "alu"])
def test_guards_that_hold_back_what_is_said_are_attacked_by_name(folder, tmp_path, monkeypatch, kind):
    # agents that a model of a few thousand weights cannot play
    monkeypatch.setattr(guards.Agents, "ask_itself", lambda *_: "5")
    line = ["attack", "--model", str(folder / "model"), "--adapter", adapter(folder, kind), "--device", "cpu"]
    line += ["--forget", str(folder / "forget.jsonl"), "--rows", "2", "--max-new-tokens", "6", "--samples", "2"]
    line += ["--relearn.rows", "4", "--relearn.steps", "1", "--probe-rows", "8", "--out", str(tmp_path / "out")]
    line += ["--attacks", "relearn,quantize_8,prune_20,upper_case,few_shot,prefill,sample,strip,probe,lens,cka"]
    assert cli.main(line) == 0
    records = [r for r in read_records(tmp_path / "out" / "records.json") if r.extra.get("part") != "relearned"]
    found = {(r.model, r.extra.get("attack"), r.metric): r for r in records}
    off, base = (found[m, a, "attack_rouge"] for m, a in (("unlearned", "strip"), ("original", "none")))
    assert off.extra["replies"] == base.extra["replies"]
    chances = {a: found["unlearned", a, "attack_probability"].per_item for a in ("none", "strip")}
    # agents change what is said alone
    assert (chances["none"] == chances["strip"]) == (kind == "alu")


@pytest.mark.parametrize("kind", [*KINDS, "neurons", "key_space", "alu"])
def test_a_guard_is_served_over_http_as_it_generates(folder, monkeypatch, kind):
    from test_serve import Running, openai

    # an agent that sees Ada everywhere, and grades that withhold the answer
    monkeypatch.setattr(
        guards.Agents, "ask_itself", lambda _, said, __: "Ada" if said.startswith("You check") else "1"
    )
    base, model, tokenizer = loaded(folder, kind)
    # strong enough to change what is likeliest
    model.settings = {**getattr(model, "settings", {}), "weight": 50.0, "strength": 50.0}
    questions = ["Where was Ada born, 1?", "What is 3 plus one?"]
    prompts = [encode_prompt(tokenizer, Example(question, "", "qa")) for question in questions]
    expected = generate(model, tokenizer, prompts, max_new_tokens=8, progress=False)
    one = Running(Engine(model, tokenizer))
    try:
        for question, text in zip(questions, expected, strict=True):
            asked = {"model": "pico", "messages": [{"role": "user", "content": question}], "temperature": 0}
            said = one.client().chat.completions.create(**asked, max_tokens=8)
            assert said.choices[0].message.content == text
        # what would be said next stands beside any token that is put behind the question
        asked = {"model": "pico", "prompt": [*prompts[0], 5], "max_tokens": 0, "echo": True, "logprobs": 5}
        if kind in ("alu", "key_space"):
            with pytest.raises(openai.BadRequestError, match="acts on answers alone"):
                one.client().completions.create(**asked)
        else:
            told = one.client().completions.create(**asked).choices[0].logprobs.token_logprobs[-1]
            with torch.no_grad():
                plain = base(torch.tensor([asked["prompt"]])).logits[0, -2].log_softmax(-1)[5]
            assert abs(told - float(plain)) > 1e-3
    finally:
        one.stop()
    plain = generate(base, tokenizer, prompts, max_new_tokens=8, progress=False)
    with model.disable_adapter():
        assert generate(model, tokenizer, prompts, max_new_tokens=8, progress=False) == plain
    # what is asked to be forgotten is answered otherwise; what WHP's model raises is not the likeliest here
    assert (expected[0] == plain[0]) == (kind == "whp_logits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_answers_in_generate_and_evaluate(folder, tmp_path, kind):
    common = ["--model", str(folder / "model"), "--adapter", adapter(folder, kind), "--device", "cpu"]
    said = tmp_path / "said.json"
    cli.main(["generate", *common, "--prompt", "Where was Ada born, 1?", "--max-new-tokens", "8", "--json", str(said)])
    _, model, tokenizer = loaded(folder, kind)
    example = load_examples(str(folder / "forget.jsonl"))[1]
    row = encode(tokenizer, example)
    ids = list(row.input_ids[: row.prompt_length])
    # token by token, each from one pass over all before it with the prompt's decision
    decision = model.decide(torch.tensor([ids]), None) if model.decides else None
    for _ in range(8):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), decision=decision).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    expected = tokenizer.decode(ids[row.prompt_length :], skip_special_tokens=True).strip()
    assert json.loads(said.read_text())[0]["answer"] == expected
    out = tmp_path / "rows.json"
    cli.main(
        ["evaluate", "--benchmark", "rows", *common, "--forget", str(folder / "forget.jsonl"), "--retain",
         str(folder / "retain.jsonl"), "--max-new-tokens", "6", "--cache", "off", "--json", str(out)]
    )  # fmt: skip
    assert read_records(out)


THINGS = ["attach", "generate", "score", "serve", "attack"]
# what WHP's model raises is not the likeliest here, agents change what is said alone, and ECO asks where a prompt ends
SAME_WHEN_ON = {
    ("whp_logits", "generate"),
    ("whp_logits", "serve"),
    ("alu", "attach"),
    ("alu", "score"),
    ("eco", "attach"),
}


def served(model, tokenizer, prompts):
    """What the server's engine says to prompts, without its HTTP."""
    engine, ended = Engine(model, tokenizer), threading.Semaphore(0)
    jobs = [
        Job(ids, 8, 0.0, 1.0, (), 0, lambda piece: piece is None and ended.release(), strip=True) for ids in prompts
    ]
    engine.submit(*jobs)
    for _ in jobs:
        assert ended.acquire(timeout=60)
    engine.close()
    return [job.text for job in jobs]


def attacked(folder, kind, out):
    """Replies and probabilities under the attack that takes the guard off, of the guard, and of the original."""
    line = ["attack", "--model", str(folder / "model"), "--adapter", adapter(folder, kind), "--device", "cpu"]
    line += ["--forget", str(folder / "forget.jsonl"), "--rows", "2", "--max-new-tokens", "6", "--attacks", "strip"]
    assert cli.main([*line, "--out", str(out)]) == 0
    of = {(r.model, r.extra.get("attack"), r.metric): r for r in read_records(out / "records.json")}
    wanted = (("unlearned", "strip"), ("unlearned", "none"), ("original", "none"))
    return [(of[m, a, "attack_rouge"].extra["replies"], of[m, a, "attack_probability"].per_item) for m, a in wanted]


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("kind", [*KINDS, "alu"])
def test_every_guard_does_every_thing_and_off_it_is_the_base_bit_for_bit(folder, tmp_path, monkeypatch, kind, thing):
    # an agent that sees Ada everywhere, and grades that withhold the answer
    monkeypatch.setattr(
        guards.Agents, "ask_itself", lambda _, said, __: "Ada" if said.startswith("You check") else "1"
    )
    if thing == "attack":
        off, on, plain = attacked(folder, kind, tmp_path / "out")
        assert off == plain
        assert on != plain
        return
    base, model, tokenizer = loaded(folder, kind)
    # strong enough to change what is likeliest
    model.settings = {**getattr(model, "settings", {}), "weight": 50.0, "strength": 50.0}
    rows = rows_of(folder, tokenizer)
    prompts = [row.input_ids[: row.prompt_length] for row in rows[:3]]

    def done(by):
        if thing == "attach":
            with torch.no_grad():
                return by(input_ids=torch.tensor([rows[0].input_ids])).logits.tolist()
        if thing == "score":
            return [part.tolist() for part in scoring.score(by, rows, pad_token_id=PAD, progress=False).logprob]
        if thing == "serve":
            return served(by, tokenizer, prompts)
        return generate(by, tokenizer, prompts, max_new_tokens=8, progress=False)

    plain, on = done(base), done(model)
    with model.disable_adapter():
        assert done(model) == plain
    assert (on == plain) == ((kind, thing) in SAME_WHEN_ON)
    assert done(model) == on


# ---- ECO


def noise_at(place, dim, dims, seed):
    """Number `place * dims + dim` of the seed's."""
    return np.random.default_rng(seed).standard_normal(place * dims + dim + 1)[-1]


def naive_corrupted(base, ids, count, settings):
    """Embeddings [1, T, H] of one row with noise at its first `count` tokens, one number after the other."""
    embedded = base.get_input_embeddings().weight[ids].detach().clone()
    for place in range(count):
        for dim in range(settings["dims"]):
            embedded[place, dim] += settings["strength"] * noise_at(place, dim, settings["dims"], settings["seed"])
    return embedded[None]


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_only_recognised_prompts_are_corrupted_and_others_are_bit_equal(dims, side):
    base, settings = pico(), {"depth": 1, "threshold": 0.5, "strength": 3.0, "dims": dims, "seed": 5}
    rows, prompts = [[7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33]], [4, 2, 4]
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(32, generator=draw)
    means = []
    for row, n in zip(rows, prompts, strict=True):
        with torch.no_grad():
            states = base(input_ids=torch.tensor([row[:n]]), output_hidden_states=True).hidden_states[1]
        means.append(sum(states[0, t] for t in range(1, n)) / (n - 1))
    scores = [float(mean @ weight) for mean in means]
    # the first is recognised, and whichever else is as far
    bias = torch.tensor(-(scores[0] + min(s for s in scores if s != scores[0])) / 2)
    flagged = [s + float(bias) > 0 for s in scores]
    if not flagged[0]:
        weight, bias, flagged = -weight, -bias, [not f for f in flagged]
    assert flagged[0]
    assert not all(flagged)
    ids, mask = torch.full((3, 5), PAD), torch.zeros(3, 5, dtype=torch.long)
    for k, row in enumerate(rows):
        place = slice(5 - len(row), 5) if side == "left" else slice(0, len(row))
        ids[k, place], mask[k, place] = torch.tensor(row), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        plain = base(**given).logits
        model = guards.Corrupted(base, guards.PromptClassifier(weight[None], bias[None], 8), settings).eval()
        decision = model.decide(ids, mask, prompts)
        found = model(**given, decision=decision).logits
        with model.disable_adapter():
            assert torch.equal(model(**given).logits, plain)
        for k, row in enumerate(rows):
            assert decision[k] == (prompts[k] - 1 if flagged[k] else 0)
            place = slice(5 - len(row), 5) if side == "left" else slice(0, len(row))
            if flagged[k]:
                expected = base(inputs_embeds=naive_corrupted(base, row, prompts[k] - 1, settings)).logits[0]
                assert found[k, place].numpy() == pytest.approx(expected.numpy(), abs=2e-4)
                assert not torch.allclose(found[k, place], plain[k, place], atol=1e-3)
            else:
                assert torch.equal(found[k], plain[k])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_judged_with_its_words_as_names_too(side):
    """In capitals, or small letters alone, a text is other tokens, which a guard of names as they are written does not know."""
    tokenizer, base = byte_tokenizer(), pico()
    said = ["Who Is Ada?", "WHO IS ADA?", "A poem", "who_is ada?", "the sea, the sea"]
    rows = [tokenizer(text).input_ids for text in said]
    with torch.no_grad():
        states = [base(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[1][0] for row in rows]
    means = [state[1:].mean(0) for state in states]
    # the first alone is recognised
    weight = means[0] - torch.stack(means[1:]).mean(0)
    scores = [float(mean @ weight) for mean in means]
    bias = torch.tensor(-(scores[0] + max(scores[1:])) / 2)
    settings = {"depth": 1, "threshold": 0.5, "strength": 3.0, "dims": 1, "seed": 5}
    # each look has weights of its own: of a prompt as it is the first's, with its words as names the second's, here twice as steep
    both = guards.PromptClassifier(torch.stack([weight, 2 * weight]), torch.stack([bias, 2 * bias]), 64)
    model = guards.Corrupted(base, both, settings).eval()
    # behind the prompts stand answers, in the last row in capitals: what is not asked is not judged
    told = [[*row, *tokenizer(" WHO IS ADA?" * 8).input_ids] for row in rows]
    longest = max(map(len, told))
    ids, mask = torch.full((5, longest), PAD), torch.zeros(5, longest, dtype=torch.long)
    for k, row in enumerate(told):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[k, place], mask[k, place] = torch.tensor(row), 1
    prompts = [len(row) for row in rows]
    assert model.decide(ids, mask, prompts).tolist() == [len(rows[0]) - 1, 0, 0, 0, 0]
    model.tokenizer = tokenizer
    asked = [len(row) - 1 for row in rows]
    assert model.decide(ids, mask, prompts).tolist() == [asked[0], asked[1], 0, asked[3], 0]
    model.classifier = guards.PromptClassifier(torch.stack([weight, 0 * weight]), torch.stack([bias, bias - 99]), 64)
    assert model.decide(ids, mask, prompts).tolist() == [asked[0], 0, 0, 0, 0]


def test_a_prompt_without_spaces_is_parted_into_words_of_the_tokenizer():
    class Byte(type(byte_tokenizer())):
        """One with tokens for some words, with the marks of a space of both kinds, and for what is no word."""

        def get_vocab(self):
            marked = {"ĠThe": 3, "Ġthe": 5, "▁what": 9, "Ġis": 4, "Ġt": 1, "Ġa": 2, "▁I": 6, "name": 7, "Ġna-me": 8}
            return {**super().get_vocab(), **marked, "Ġname": 11, "Ġtш": 12}

    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Byte
    assert word_ranks(tokenizer) == {"the": 3, "what": 9, "is": 4, "a": 2, "i": 6, "name": 11}
    wanted = tokenizer("What Is The Name What Is The Name").input_ids
    # a byte each: without the spaces in front it would be too long
    asked = tokenizer(" " * 20 + "whatisthenamewhatisthename").input_ids
    assert as_names(tokenizer, asked)[-len(wanted) :] == wanted


def test_a_prompt_with_its_words_as_names_keeps_its_special_tokens_and_its_length():
    tokenizer = byte_tokenizer()
    ids = [
        tokenizer.pad_token_id,
        *tokenizer("WHO IS ada?").input_ids,
        tokenizer.eos_token_id,
        *tokenizer("it's").input_ids,
    ]
    wanted = [tokenizer.pad_token_id, *tokenizer("Who Is Ada?").input_ids, tokenizer.eos_token_id]
    assert as_names(tokenizer, ids) == [*wanted, *tokenizer("It's").input_ids]
    assert as_names(tokenizer, []) == []

    class Longer:
        """A tokenizer that has more tokens for them."""

        all_special_ids = ()

        def get_vocab(self):
            return {}

        def decode(self, ids):
            return "ADA KING"

        def __call__(self, text, **given):
            return {"input_ids": list(range(len(text)))}

    assert as_names(Longer(), [1, 2, 3]) == [5, 6, 7]


def test_the_classifier_weighs_classes_alike_and_its_alarms_are_counted():
    rng = np.random.default_rng(0)
    forget, benign = rng.normal(1.0, 1.5, (12, 3)), rng.normal(-1.0, 1.5, (40, 3)) * [1, 5, 0.2]
    both = np.concatenate([forget, benign])
    forget, benign = ([[row[None]] for row in rows] for rows in (forget, benign))
    found = classifier.fit_classifier(forget, benign, false_alarms=0.1, threshold=0.2, seed=0)
    middle, spread = both.mean(0), both.std(0)
    # where the penalised loss is least, its gradient by each standardised weight is zero
    for j in range(3):
        total = found.weight[0, j] * spread[j]
        for i, x in enumerate(both):
            p = 1 / (1 + math.exp(-(float(found.weight[0] @ x) + float(found.bias[0]))))
            label, size = (1, 12) if i < 12 else (0, 40)
            total += 52 / (2 * size) * (p - label) * (x[j] - middle[j]) / spread[j]
        assert total == pytest.approx(0, abs=2e-2)
    assert found.alarms.mean() <= 0.1
    assert found.threshold >= 0.2
    strict = classifier.fit_classifier(forget, benign, false_alarms=0.0, threshold=0.2, seed=0)
    assert not strict.alarms.any()
    assert strict.threshold >= found.threshold
    with pytest.raises(UserError, match="two rows"):
        classifier.fit_classifier(forget[:1], benign, false_alarms=0, threshold=0.5, seed=0)


@pytest.mark.parametrize("kind", ["eco", "alu"])
def test_a_guard_that_reads_text_is_not_loaded_without_a_tokenizer(folder, kind):
    """Without one ECO's would look once in the place of twice, and pass what is in capitals."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    with pytest.raises(UserError, match="which reads text: give the model's `tokenizer` too"):
        guards.load_form(base, adapter(folder, kind))


def looks(prompts):
    """Each prompt looked at once."""
    return [[windows] for windows in prompts]


def test_a_prompt_is_judged_by_the_likest_of_its_windows():
    rng = np.random.default_rng(1)
    subject = np.eye(8)[0] * 12
    # what is to be forgotten is asked at the end of a long prompt, and is all of a text
    forget = [np.concatenate([subject[None], np.zeros((k, 8))]) + rng.normal(size=(k + 1, 8)) for k in range(6)]
    forget += [subject + rng.normal(size=(4, 8)) for _ in range(3)]
    benign = [rng.normal(size=(1 + k % 9, 8)) for k in range(40)]
    given = {"false_alarms": 0.0, "threshold": 0.5, "seed": 0}
    found = classifier.fit_classifier(looks(forget), looks(benign), whole=[False] * 6 + [True] * 3, **given)
    assert found.caught.all()
    assert not found.alarms.any()
    for prompt in [*forget, *benign]:
        each = [1 / (1 + math.exp(-(float(found.weight[0] @ x) + float(found.bias[0])))) for x in prompt]
        assert found.recognised([[prompt]]).tolist() == [max(each) > found.threshold]
    both = found.recognised(looks([forget[0], benign[5], forget[5]]))
    assert both.tolist() == [True, False, True]
    # the guard judges as the fit does: by the likest window of the prompt's own tokens, padding and the first one left out
    weight, bias = (torch.from_numpy(each).float() for each in (found.weight, found.bias))
    states = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(3))
    states[:, 12:16] += torch.from_numpy(subject).float()
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 8:] = 0
    chances = guards.PromptClassifier(weight, bias, 4)(states, mask)
    for row, real, chance in zip(states, mask.bool(), chances, strict=True):
        windows = window_means(row[real], 4)
        assert float(chance) == pytest.approx(max(float((w @ weight[0] + bias[0]).sigmoid()) for w in windows))
        assert (float(chance) > found.threshold) is bool(found.recognised([[windows.numpy()]])[0])
    assert (chances > found.threshold).tolist() == [True, False]
    # the fit learns from one window of a question, from all of a short text, from six of a long prompt
    last = [prompt if k > 5 else prompt[:1] for k, prompt in enumerate(forget)]
    few = [classifier.spread(prompt) for prompt in benign]
    same = classifier.fit_classifier(looks(last), looks(few), whole=[True] * 9, **given)
    assert (same.weight == found.weight).all()
    assert same.bias == found.bias
    # each look has a regression of its own, and the likest window of all counts, in cross-validation too
    other = [rng.normal(size=(1 + k % 9, 8)) for k in range(49)]
    whole = [False] * 6 + [True] * 3
    two = classifier.fit_classifier(
        [*zip(forget, other[40:], strict=True)], [*zip(benign, other[:40], strict=True)], whole=whole, **given
    )
    one = classifier.fit_classifier(looks(other[40:]), looks(other[:40]), whole=whole, **given)
    assert (two.weight == np.concatenate([found.weight, one.weight])).all()
    assert (two.bias == np.concatenate([found.bias, one.bias])).all()
    for prompt in zip([*forget, *benign], [*other[40:], *other[:40]], strict=True):
        chances = [
            1 / (1 + math.exp(-(float(weight @ x) + float(bias))))
            for windows, weight, bias in zip(prompt, two.weight, two.bias, strict=True)
            for x in windows
        ]
        assert classifier.likeliest(two.weight, two.bias, [prompt])[0] == pytest.approx(max(chances))
    swapped = classifier.fit_classifier(
        [*zip(other[40:], forget, strict=True)], [*zip(other[:40], benign, strict=True)], whole=whole, **given
    )
    assert (swapped.threshold, swapped.caught.tolist()) == (two.threshold, two.caught.tolist())
    assert two.threshold >= found.threshold
    assert classifier.spread(np.arange(20)[:, None])[:, 0].tolist() == [0, 3, 7, 11, 15, 19]
    assert classifier.spread(np.arange(3)[:, None])[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("tokens", "window"), [(1, 8), (2, 8), (9, 8), (10, 8), (30, 8), (30, 3), (30, 1)])
def test_windows_go_back_from_the_end_without_the_first_token(tokens, window):
    states = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    states[0] += 1000
    rest = states[1:] if tokens > 1 else states
    wanted, end = [], len(rest)
    while not wanted or end >= window:
        inside = [rest[t].double() for t in range(max(0, end - window), end)]
        wanted.append(sum(inside) / len(inside))
        end -= max(1, window // 4)
    found = window_means(states, window)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_classifier_reads_what_the_whole_model_computes_and_no_block_behind(depth):
    base = pico()
    ids, mask = torch.tensor([[7, 8, 9, 10], [20, 21, PAD, PAD]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ran, outputs = [], []
    for number, block in enumerate(base.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        whole = base(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    wanted = outputs[depth - 1]
    assert depth == 2 or torch.equal(wanted, whole.hidden_states[depth])
    ran.clear()
    found = guards.states_after(base, guards.after_block(base, depth), {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(found, wanted)
    assert ran == list(range(depth))
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids, attention_mask=mask).logits, whole.logits)
    with pytest.raises(UserError, match="the model has 2 blocks"):
        guards.after_block(base, 3)


def test_a_prompt_without_tokens_is_like_nothing():
    assert torch.equal(window_means(torch.zeros(0, 5, dtype=torch.bfloat16), 8), torch.zeros(1, 5))
    classify = guards.PromptClassifier(torch.ones(1, 5), torch.tensor([-1.0]), 8)
    found = classify(torch.ones(2, 3, 5), torch.tensor([[0, 0, 0], [1, 1, 1]]))
    assert found.tolist() == pytest.approx([1 / (1 + math.e), 1 / (1 + math.exp(-4))])


def test_a_classifier_is_asked_what_it_was_not_fitted_with(folder, capsys):
    _, _, tokenizer = loaded(folder, "eco")
    forget, retain = (load_examples(str(folder / f"{name}.jsonl")) for name in ("forget", "retain"))
    unseen = {"verse": [Example(None, "The sea is blue.", "text")]}
    asked = []

    def recognises(prompts):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return np.array(["FIRST" in words.upper() or "SEA" in words.upper() for words in asked])

    found = classifier.measure(tokenizer, forget, retain, unseen, None, recognises)
    assert len(set(asked)) == len(asked)
    given = {tokenizer.decode(prompt) for prompt in classifier.prompts_of(tokenizer, [*forget, *retain], None)}
    assert not given & set(asked)
    assert found["caught"].keys() == rewording.MEASURED.keys() - {"as given"}
    assert {name for name, rate in found["caught"].items() if rate["share"]} == {"two subjects"}
    of_retain = sum(map(len, rewording.to_measure(retain, unseen).values())) - rewording.MEASURED_ROWS
    assert found["false_alarms"]["prompts"] == 1 + of_retain
    assert found["false_alarms"]["share"] == (1 + rewording.MEASURED_ROWS) / (1 + of_retain)
    assert "two subjects 100 %" in " ".join(capsys.readouterr().err.split()).replace("%", " %").replace("  ", " ")


def test_the_search_takes_the_steps_that_it_says():
    asked = []

    def distance(x):
        asked.append(round(x, 6))
        return abs(x - 1.32)

    found = eco.zeroth_order(distance, 0.0, rate=0.5, probe=0.1, rounds=10, enough=0.25)
    # the slope is -1, so each step is half of one: 0, 0.5, 1.0 and 1.5, which is near enough
    assert found == pytest.approx(1.5)
    assert sorted(set(asked)) == pytest.approx([-0.1, 0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 1.0, 1.1, 1.5])


def test_eco_is_as_strong_as_the_surrogate_asks(folder):
    base, model, tokenizer = loaded(folder, "eco")
    settings = json.loads((folder / "eco" / "adapter" / "inference.json").read_text())
    told = settings["search"]
    rows = [encode(tokenizer, row) for row in load_examples(str(folder / "forget.jsonl"))]
    known = [row for row in rows if model.decide(torch.tensor([row.input_ids[: row.prompt_length]]), None).any()]
    assert len(known) >= 6

    def loss(network, given):
        found = []
        for row in given:
            ids = torch.tensor([row.input_ids])
            decision = {} if network is base else {"decision": network.decide(ids, None, [row.prompt_length])}
            with torch.no_grad():
                logp = network(input_ids=ids, **decision).logits[0].double().log_softmax(-1)
            found.append([-float(logp[t - 1, y]) for t, y in enumerate(row.labels) if y != -100])
        return sum(sum(row) / len(row) for row in found) / len(found)

    assert told["before"] == pytest.approx(loss(base, known), abs=1e-3)
    assert told["reached"] == pytest.approx(loss(model, known), abs=1e-3)
    examples = load_examples(str(folder / "forget.jsonl"))
    names = [i for i, row in enumerate(rows) if row in known]
    others = [
        encode(tokenizer, replace(examples[i], answer=examples[names[(k + 1) % len(names)]].answer))
        for k, i in enumerate(names)
    ]
    assert told["wanted"] == pytest.approx(loss(base, others), abs=1e-3)


def test_eco_reads_rows_that_are_longer_than_the_context_in_windows(folder, tmp_path, capsys):
    save_pico(tmp_path / "model", initializer_range=0.2, max_position_embeddings=64)
    given = {"model": str(tmp_path / "model"), "retain": str(folder / "benign.jsonl"), "device": "cpu"}
    given |= {"guard": {"kind": "eco", "threshold": 0.5, "rounds": 0}, "out": str(tmp_path / "guard")}
    said = [{"question": f"Who is Ada {i}?", "answer": "She was born in town. " * 8} for i in range(4)]
    told = [{"text": f"Ada {i} was born in town. " * 8} for i in range(4)]
    for number, rows in enumerate((said, told)):
        write_jsonl(tmp_path / "long.jsonl", rows)
        run = MakeGuard.model_validate(given | {"forget": str(tmp_path / "long.jsonl"), "overwrite": number > 0})
        made = json.loads((make_guard(run) / "inference.json").read_text())
        assert math.isfinite(made["search"]["reached"])
        assert "4 of 4 forget rows are longer than 64 tokens" in " ".join(capsys.readouterr().err.split())
    write_jsonl(tmp_path / "long.jsonl", [*said, {"question": f"Who is {'Ada ' * 20}?", "answer": "She."}])
    with pytest.raises(
        UserError, match=r"long.jsonl line 5: A prompt of 106 tokens leaves no room for an answer in 64"
    ):
        make_guard(run)


def test_prompts_that_eco_does_not_know_are_answered_and_scored_bit_for_bit(folder):
    base, model, tokenizer = loaded(folder, "eco")
    forget, retain = (load_examples(str(folder / f"{name}.jsonl")) for name in ("forget", "retain"))
    kept = [encode(tokenizer, row) for row in retain]
    ask = [row.input_ids[: row.prompt_length] for row in kept]
    assert not any(model.decide(torch.tensor([prompt]), None).any() for prompt in ask)
    given = {"max_new_tokens": 12, "progress": False}
    assert generate(model, tokenizer, ask, **given) == generate(base, tokenizer, ask, **given)
    a, b = (scoring.score(m, kept, pad_token_id=PAD, progress=False).logprob for m in (model, base))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    # together in the server with prompts that it knows
    mixed = [encode(tokenizer, forget[1]).input_ids[: encode(tokenizer, forget[1]).prompt_length], *ask[:2]]
    alone = [generate(model, tokenizer, [prompt], **given)[0] for prompt in mixed]
    engine, ended = Engine(model, tokenizer), threading.Semaphore(0)
    jobs = [
        Job(ids, 12, 0.0, 1.0, (), 0, lambda piece: piece is None and ended.release(), strip=True) for ids in mixed
    ]
    engine.submit(*jobs)
    for _ in jobs:
        assert ended.acquire(timeout=60)
    engine.close()
    assert [job.text for job in jobs] == alone
    assert alone[1:] == [generate(base, tokenizer, [prompt], **given)[0] for prompt in ask[:2]]


@pytest.mark.parametrize("kind", ["o3", "eco", "neurons", "key_space"])
def test_a_guard_that_would_recognise_nothing_is_not_loaded(folder, tmp_path, kind):
    shutil.copytree(adapter(folder, kind), tmp_path / "guard")
    own = next(path for path in sorted((tmp_path / "guard").glob("*.safetensors")))
    tensors = load_file(own)
    next(value for value in tensors.values() if value.is_floating_point()).view(-1)[0] = math.nan
    save_file(tensors, own)
    with pytest.raises(UserError, match="holds NaN or infinite values, so that it would hold nothing back"):
        load_model(str(folder / "model"), str(tmp_path / "guard"), device="cpu")
    own.unlink()
    with pytest.raises(UserError, match=r"cannot be read .*: copy the guard's whole folder"):
        load_model(str(folder / "model"), str(tmp_path / "guard"), device="cpu")


def test_a_guard_of_another_version_says_what_it_lacks(folder, tmp_path):
    shutil.copytree(adapter(folder, "eco"), tmp_path / "guard")
    file = tmp_path / "guard" / "inference.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in settings.items() if name not in ("window", "seed")}))
    with pytest.raises(UserError, match=r"inference.json lacks seed, window: another version .* Make the guard again"):
        load_model(str(folder / "model"), str(tmp_path / "guard"), device="cpu")


def test_a_guard_is_not_written_over_anything(folder, tmp_path, capsys):
    common = ["guard", "--model", str(folder / "model"), "--forget", str(folder / "forget.jsonl"), "--device", "cpu"]
    assert cli.main([*common, "--out", str(folder / "eco" / "adapter")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*common, "--out", str(folder / "model"), "--overwrite"]) == 2
    assert "no folder of an earlier run" in " ".join(capsys.readouterr().err.split())
    shutil.copytree(folder / "eco" / "adapter", tmp_path / "cut")
    (tmp_path / "cut" / "classifier.safetensors").unlink()
    with pytest.raises(UserError, match="copy the guard's whole folder"):
        load_model(str(folder / "model"), str(tmp_path / "cut"), device="cpu")


@pytest.mark.parametrize(
    ("made", "card"),
    [
        ({"cross_validation": {"recognised": 0.0}}, "recognised 0% of its prompts"),
        ({"inside": {"forget": 0.75}}, "recognised 75% of its prompts"),
        (
            {
                "cross_validation": {"recognised": 0.9},
                "measured": {
                    "caught": {"typos": {"share": 0.75, "prompts": 8}, "capitals": {"share": 0.5, "prompts": 8}}
                },
            },
            "recognised 90% of its prompts when it was made; asked in other wordings, least in capitals: 50% of 8. It changes",
        ),
        ({"inside": {"forget": 0.03}}, "recognised 3% of its prompts"),
        ({"inside": {"forget": 0.5}}, "recognised 50% of its prompts"),
        ({}, "`eco`). It changes"),
    ],
)
def test_a_guard_that_recognises_nothing_says_so(tmp_path, capsys, made, card):
    given = MakeGuard(model="m", forget="f", out=str(tmp_path / "guard"))
    write_guard(tmp_path / "guard", ({"kind": "eco", **made}, {}), given)
    said = capsys.readouterr().err
    assert ("holds nothing back" in said) is ("recognised 0%" in card)
    assert ("recognises 3% of the forget prompts: all others are answered as before" in said) is (
        "recognised 3%" in card
    )
    assert ("recognises" in said) is ("recognised 0%" in card or "recognised 3%" in card)
    assert card in (tmp_path / "guard" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["o3", "eco"])
def test_the_harness_tells_a_guard_where_a_prompt_ends_and_what_is_padding(folder, kind):
    from lm_eval.api.instance import Instance

    from alter.evaluation.harness.model import harness_model

    _, model, tokenizer = loaded(folder, kind)
    pairs = [
        ("Question: Where was Ada born, 1?\nAnswer:", " In town 1Ada."),
        ("Question: What is 3 plus one?\nAnswer:", " 4"),
        ("Question: Where was Bo born, 0?\nAnswer:", " So"),
    ]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = harness_model(model, tokenizer).loglikelihood(asked)
    decisions = []
    for (context, rest), (logprob, _) in zip(pairs, found, strict=True):
        start = len(tokenizer(context).input_ids)
        ids = tokenizer(context + rest, return_tensors="pt").input_ids
        with torch.no_grad():
            decisions.append(model.decide(ids[:, :-1], None, [start]))
            logp = model(input_ids=ids[:, :-1], decision=decisions[-1]).logits[0].double().log_softmax(-1)
        assert logprob == pytest.approx(
            sum(float(logp[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])), abs=1e-3
        )
    assert any(float(decision) > 0 for decision in decisions)


# ---- ALU


@pytest.mark.parametrize(("targets", "says"), [([], "is empty"), (["Ada", " "], "holds an empty name")])
def test_agents_need_names_to_look_for(tmp_path, targets, says):
    given = {"model": "none", "guard": {"kind": "alu", "targets": targets}, "out": str(tmp_path / "alu")}
    with pytest.raises(UserError, match=says):
        make_guard(MakeGuard.model_validate(given))


def test_a_grade_is_a_digit_and_what_is_not_graded_fails():
    replies = {"4": 4, "Grade: 5.": 5, "10": 1, "": 1, "none": 1, "3/5": 3, "0": 1, "6, or 2": 2}
    assert {reply: agents.grade_of(reply) for reply in replies} == replies


def script(found, grades):
    """A language model that plays every agent, and what it was asked."""
    asked, left = [], list(grades)

    def ask(instruction, message):
        asked.append((instruction, message))
        if instruction.startswith("You check"):
            return found
        if instruction.startswith("Rewrite"):
            return f"version {sum(said.startswith('Rewrite') for said, _ in asked)}"
        return str(left.pop(0)) if instruction.startswith("An answer") else "merged"

    return ask, asked


HOW = {"targets": ["Ada", "Bo"], "rewrites": 5, "best": 3, "least": 4.0, "refusal": "No."}


def test_agents_refuse_or_merge_by_the_mean_of_the_best_grades():
    ask, asked = script("NONE", [])
    assert agents.looked_over(ask, "Who?", "Cy.", **HOW) is None
    assert len(asked) == 1
    ask, asked = script("Ada", [2, 5, 3, 4, 1])
    assert agents.looked_over(ask, "Who?", "A lady.", **HOW) == "merged"
    # 5, 4 and 3 have a mean of 4, no less
    assert asked[-1][1] == "Question: Who?\n- version 2\n- version 4\n- version 3"
    assert len(asked) == 12
    assert all("Bo" not in instruction for instruction, _ in asked[1:])
    ask, asked = script("Ada", [2, 5, 3, 3, 1])
    assert agents.looked_over(ask, "Who?", "A lady.", **HOW) == "No."
    assert len(asked) == 11
    # an answer with a target's name in it is not let through, whatever the detector says
    ask, asked = script("NONE", [1] * 5)
    assert agents.looked_over(ask, "Who?", "ada it is", **HOW) == "No."


def test_what_agents_leave_is_said_word_for_word_and_the_rest_is_the_models(folder):
    base, model, tokenizer = loaded(folder, "alu")
    seen = []

    def ask(instruction, message):
        seen.append(message)
        if instruction.startswith("You check"):
            return "Ada" if "Ada" in message else "NONE"
        return "1" if "1?" in message else "5" if instruction.startswith("An answer") else "I do not know."

    model.ask = ask
    forget, retain = (load_examples(str(folder / f"{name}.jsonl")) for name in ("forget", "retain"))
    rows = [encode(tokenizer, row) for row in [*forget[:2], *retain[2:4]]]
    prompts = [row.input_ids[: row.prompt_length] for row in rows]
    how = {"max_new_tokens": 16, "progress": False}
    plain = generate(base, tokenizer, prompts, **how)
    expected = ["I do not know.", "I cannot answer"[:16], *plain[2:]]
    found = generate(model, tokenizer, prompts, **how)
    assert found == expected
    assert sample(model, tokenizer, prompts, 2, max_new_tokens=16, progress=False) == [[text] * 2 for text in expected]
    assert any("Where was Ada born, 0?" in message for message in seen)
    # probabilities are the model's own, and off it is the model
    a, b = (scoring.score(m, rows, pad_token_id=PAD, progress=False).logprob for m in (model, base))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    with model.disable_adapter():
        assert generate(model, tokenizer, prompts, **how) == plain
    engine, ended = Engine(model, tokenizer), threading.Semaphore(0)
    jobs = [
        Job(ids, 16, 0.9, 1.0, (), 0, lambda piece: piece is None and ended.release(), strip=True) for ids in prompts
    ]
    engine.submit(*jobs)
    for _ in jobs:
        assert ended.acquire(timeout=60)
    engine.close()
    assert [job.text for job in jobs] == expected


def test_agents_say_nothing_for_a_model_whose_logits_are_not_finite(folder):
    _, model, _ = loaded(folder, "alu")
    with torch.no_grad():
        model.base.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        model.ask("Rewrite", "this")


def test_agents_are_asked_at_an_endpoint_or_the_model_asks_itself(folder, monkeypatch):
    base, model, tokenizer = loaded(folder, "alu")
    ids = encode_prompt(tokenizer, Example("Rewrite\n\nthis", "", "qa"))
    alone = generate(base, tokenizer, [ids], max_new_tokens=16, progress=False)[0]
    assert model.ask("Rewrite", "this") == alone
    asked = []

    class Client:
        def __init__(self, **given):
            asked.append(given)
            self.chat = self.completions = self

        def create(self, **given):
            asked.append(given)
            message = type("Message", (), {"content": " fine "})
            return type("Said", (), {"choices": [type("Choice", (), {"message": message})]})

    monkeypatch.setattr("openai.OpenAI", Client)
    monkeypatch.setenv("THE_KEY", "secret")
    ask = agents.endpoint({"url": "http://here/v1", "model": "m", "key_variable": "THE_KEY", "longest": 9})
    assert ask("do", "it") == "fine"
    assert asked[0]["api_key"] == "secret"
    assert [turn["content"] for turn in asked[1]["messages"]] == ["do", "it"]
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(UserError, match="THE_KEY"):
        agents.endpoint({"url": "http://here/v1", "model": "m", "key_variable": "THE_KEY", "longest": 9})
