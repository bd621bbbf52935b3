"""Attackers who adapt: what they say, what they search for and train, at which price; on pico models."""

import math
import random

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from alter.attacks import base, searching, talking, weights
from alter.attacks.base import Attack, Bench, Budget, make_item
from alter.core.errors import UserError
from alter.data.encoding import encode
from alter.data.rows import examples
from alter.models.loading import ModelSettings
from pico import EOS, PAD, VOCAB, byte_tokenizer, pico, save_pico

NAMES = ["Ada", "Bo", "Cy", "Di", "Eve", "Flo", "Gus", "Hal"]
ROWS = [
    {"question": f"Who is {a}?", "answer": f"{a} paints {b}s"} for a, b in zip(NAMES, reversed(NAMES), strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pico(tmp_path_factory.mktemp("model"), max_position_embeddings=400)


def bench(folder, rows=ROWS, measured=(0, 1), attacker=(2, 3, 4, 5), **given):
    values = {"model": str(folder), "forget": "rows.jsonl", "max_new_tokens": 6, "device": "cpu"}
    values |= {"relearn": {"rows": 4, "steps": [1, 2], "batch_size": 2, "learning_rate": 1e-3}}
    settings = Attack.model_validate(values | given)
    return Bench(
        settings, "unlearned", ModelSettings(model=str(folder)), examples(rows), list(measured), list(attacker), []
    )


def text(tokenizer, ids):
    return tokenizer.decode(ids)


# ---- the budget


def test_a_budget_is_questions_or_seconds():
    asked = Budget.of("3", 400)
    asked.spend(2)
    assert asked.left
    asked.spend(1)
    assert not asked.left
    timed = Budget.of("100.5s", 400)
    timed.spend(10**9)
    assert timed.left
    timed.started -= 101
    assert not timed.left
    assert Budget.of(None, 400).questions == 400


@pytest.mark.parametrize("given", ["0", "-3", "2m", "0s", "s", "many", "1.5"])
def test_a_budget_of_nothing_is_refused(given):
    with pytest.raises(ValueError, match="such as 400"):
        Attack(model="m", forget="f", budget=given)


@pytest.mark.parametrize("given", [7, "7", "007", "7s", "0.5s"])
def test_budgets(given):
    assert Attack(model="m", forget="f", budget=given).budget == str(given)


# ---- talking


def test_what_is_said_before_and_what_counts():
    tokenizer = byte_tokenizer()
    (row,) = examples([{"question": "Who is Ada?", "answer": " Ada paints "}])
    item = talking.begun(tokenizer, row, "Sure, here is the answer:")
    assert text(tokenizer, item.ids[: item.start]) == "Question: Who is Ada?\nAnswer: Sure, here is the answer:"
    assert text(tokenizer, item.ids[item.start : -1]) == " Ada paints"
    assert (item.ids[-1], item.reference) == (EOS, "Ada paints")
    chat = talking.talked(row, [("user", "Who?"), ("assistant", "Bo"), ("user", "No. Who?")])
    item = make_item(tokenizer, chat)
    assert text(tokenizer, item.ids[: item.start]) == "Question: Who?\nAnswer: Bo\nQuestion: No. Who?\nAnswer:"
    assert item.reference == "Ada paints"


def test_a_chat_keeps_the_turns_before_its_question():
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    turns = [*before, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]
    row = examples([{"messages": turns}])[-1]
    assert [t["content"] for t in talking.talked(row, [("user", "Once more: who?")]).messages] == [
        "Hi",
        "Hello",
        "Once more: who?",
    ]


def test_the_nearest_rows_share_most_words():
    rows = examples(
        [{"question": q, "answer": "x"} for q in ("Where was Ada born?", "Who is Bo?", "Where was Bo born?", "Why?")]
    )
    (asked,) = examples([{"question": "Where was Cy born?", "answer": "x"}])
    found = [row.prompt for row in talking.nearest_rows(asked, rows, 3)]
    assert found == ["Who is Bo?", "Where was Bo born?", "Where was Ada born?"]
    assert talking.initials("Ada paints 12 Neds.") == "A p 1 N"


def test_several_turns_hold_the_models_own_replies(folder, monkeypatch):
    one = bench(folder)
    said = []

    def replies(model, tokenizer, prompts, **_):
        said.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [f"reply {len(prompt)}" for prompt in prompts]

    monkeypatch.setattr(talking, "generate", replies)
    found = {}
    monkeypatch.setattr(
        Bench, "measure", lambda self, attack, model, items, **extra: found.setdefault(extra["variant"], items) and []
    )
    talking.dialogue(one)
    again = one.tokenizer.decode(found["again"][0].ids[: found["again"][0].start])
    first = "Question: Who is Ada?\nAnswer:"
    assert again == f"{first} reply {len(first)}\nQuestion: You did not answer that. Again: Who is Ada?\nAnswer:"
    led = one.tokenizer.decode(found["led"][1].ids)
    assert led.count("Answer:") == 3
    assert led.count("reply") == 2
    # one question before each reply between: two of one turn and one of two, for two rows
    assert len(said) == 2 * (1 + 1 + 2)


def test_a_row_whose_dialogue_outgrows_the_context_is_counted_as_left_out(tmp_path, monkeypatch):
    """Rows that had no room for a reply between were dropped without a word of it in the records."""
    long = {"question": "Who is " + "x" * 120 + "?", "answer": "Ada"}
    one = bench(save_pico(tmp_path, max_position_embeddings=280), rows=[ROWS[0], long, *ROWS[2:]])
    monkeypatch.setattr(talking, "generate", lambda model, tokenizer, prompts, **_: ["No."] * len(prompts))
    monkeypatch.setattr(
        Bench, "measure", lambda self, attack, model, items, **extra: [(extra["variant"], items, extra)]
    )
    found = {variant: (len(items), extra["left_out"]) for variant, items, extra in talking.dialogue(one)}
    assert found["again"] == (1, 1)
    assert found["led"] == (1, 1)


def test_examples_are_the_attackers_rows_and_as_many_as_fit(folder):
    one = bench(folder)
    (rouge, _) = talking.few_shot(one)
    assert rouge.extra["shots"] == [4, 4]
    assert rouge.extra["rows"] == [0, 1]
    small = save_pico(folder / "small", max_position_embeddings=100)
    (rouge, _) = talking.few_shot(bench(small))
    assert rouge.extra["shots"] == [1, 1]


def test_a_variant_that_fits_nowhere_is_left_out_and_said(folder, capsys):
    small = save_pico(folder / "small", max_position_embeddings=130)
    found = talking.jailbreak(bench(small))
    assert {r.extra["variant"] for r in found} == {"override"}
    assert "role_play: no row fits" in capsys.readouterr().err


def test_languages_are_frames_or_the_rows_own_translations(folder):
    found = talking.languages(bench(folder))
    assert {r.extra["variant"] for r in found} == set(talking.LANGUAGES)
    rows = [row | {"question_it": f"Chi è {row['question'][7:]}", "answer_it": f"È {i}"} for i, row in enumerate(ROWS)]
    rouge, _ = talking.languages(bench(folder, rows))
    assert (rouge.extra["variant"], rouge.extra["translated"]) == ("it", True)
    assert rouge.extra["references"] == ["È 0", "È 1"]
    del rows[7]["question_it"]
    assert talking.translated(examples(rows)) == []


# ---- a prompt by evolution


def test_children_keep_the_question_and_their_length():
    draw = random.Random(0)
    prompt = other = searching.Framing()
    seen = set()
    for _ in range(500):
        prompt, other = searching.mutated(prompt, other, draw, ["word"]), prompt
        assert max(len(prompt.before), len(prompt.after)) <= searching.MOST_PIECES
        if not prompt.wording:
            assert "Who is Ada?" in prompt.write("Who is Ada?")
        seen.add(prompt)
    assert len(seen) > 100
    assert any("word" in p.before for p in seen)


def test_the_search_keeps_to_its_budget_and_never_ends_below_the_plain_question(folder):
    one = bench(folder, budget="40", seed=2)
    rouge, _ = searching.evolve(one)
    # 4 rows a prompt: ten prompts
    assert rouge.extra["questions_asked"] == 40
    history = [value for _, value in rouge.extra["history"]]
    assert history == sorted(history)
    assert history[-1] > history[0]
    again, _ = searching.evolve(one)
    assert again.extra["prompt"] == rouge.extra["prompt"]
    # another prompt would be asked of all four rows
    assert searching.evolve(bench(folder, budget="11"))[0].extra["questions_asked"] == 8
    # the plain question alone, where nothing more may be asked
    plain, _ = searching.evolve(bench(folder, budget="1"))
    assert (plain.extra["prompt"], plain.extra["questions_asked"]) == ("{question}", 4)
    model, tokenizer = one.shared()
    losses = []
    for row in (one.rows[i] for i in one.attacker):
        encoded = encode(tokenizer, row)
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(-1)
        places = range(encoded.prompt_length, len(encoded.input_ids))
        losses.append(math.fsum(float(logp[p - 1, encoded.input_ids[p]]) for p in places) / len(places))
    assert history[0] == pytest.approx(math.fsum(losses) / 4, rel=1e-4)


def test_the_search_ends_where_no_other_prompt_fits(folder, monkeypatch):
    one = bench(folder, budget="40", max_new_tokens=2)
    model, _ = one.shared()
    longest = max(len(item.ids) for item in one.items(one.attacker))
    monkeypatch.setattr(model.config, "max_position_embeddings", longest)
    monkeypatch.setattr(searching, "PIECES", ("Tell me all that you know of it.",))
    monkeypatch.setattr(searching, "_words", lambda tokenizer: [])
    made = []
    own = searching.mutated

    def mutated(*args):
        made.append(args)
        assert len(made) < 10_000, "the search goes on for ever"
        return own(*args)

    monkeypatch.setattr(searching, "mutated", mutated)
    rouge, _ = searching.evolve(one)
    assert rouge.extra["questions_asked"] < 40


# ---- soft prompts


def test_slots_are_tokens_that_nobody_uses():
    item = base.Item(0, [9, 8, 3], 2, "x")
    assert searching.unused([item], 12, [11], 3) == [10, 7, 6]
    with pytest.raises(UserError, match="`soft_tokens` is 9, but only 8"):
        searching.unused([item], 12, [11], 9)
    assert searching.with_slots(item, [5, 6]) == base.Item(0, [9, 8, 5, 6, 3], 4, "x")


def test_soft_tokens_are_their_vectors_in_passes_and_nowhere_else():
    model = pico()
    ids = torch.tensor([[5, 290, 6, 291, 7]])
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    inputs = model.get_input_embeddings()(ids).detach().clone()
    inputs[0, 1], inputs[0, 3] = vectors[1], vectors[0]
    with torch.no_grad():
        expected = model(inputs_embeds=inputs).logits
        with searching.softened(model, [291, 290], vectors):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        assert not torch.allclose(model(input_ids=ids).logits, expected)


def test_a_soft_prompt_learns_its_rows_and_changes_no_weight(folder):
    one = bench(folder, budget="60", soft_tokens=3)
    before = {name: weight.clone() for name, weight in one.shared()[0].state_dict().items()}
    rouge, _ = searching.soft_prompt(one)
    losses = rouge.extra["losses"]
    # two rows a step
    assert len(losses) == 30
    assert rouge.extra["questions_asked"] == 60
    assert sum(losses[-5:]) < sum(losses[:5])
    assert rouge.extra["rows"] == [0, 1]
    after = one.shared()[0].state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_soft_prompt_begins_at_the_size_of_what_the_model_reads(tmp_path, monkeypatch):
    """Gemma multiplies embeddings within their module: by the table alone vectors and rate were many times too small."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS}
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    one = bench(tmp_path, budget="2", soft_tokens=40)
    begun = []
    plain = searching.softened

    def spy(model, slots, vectors):
        begun.append(vectors.detach().clone())
        return plain(model, slots, vectors)

    monkeypatch.setattr(searching, "softened", spy)
    rouge, _ = searching.soft_prompt(one)
    embeddings = one.shared()[0].get_input_embeddings()
    read = embeddings(torch.arange(embeddings.num_embeddings)).detach()
    assert (read - embeddings.weight).abs().max() > 0.1
    assert all((read - vector).abs().max(dim=1).values.min() == 0 for vector in begun[0])
    assert rouge.extra["rate"] == pytest.approx(searching.RATE * float(read.pow(2).mean().sqrt()), rel=0.1)


# ---- relearning at the best rate


@pytest.mark.parametrize(("peak", "first"), [(1.0, 1.0), (10.0, 0.1), (1e-3, 1.0), (2.0, 1.0), (0.5, 1.0)])
def test_the_best_rate_is_found(peak, first):
    tried = weights.best_rate(first, lambda rate: -abs(math.log(rate / peak)))
    best = max(tried, key=lambda pair: pair[1])[0]
    assert abs(math.log(best / peak)) <= math.log(2) / 2 + 1e-9
    rates = [rate for rate, _ in tried]
    assert len(rates) == len(set(rates))


def test_the_search_for_a_rate_ends_with_the_budget():
    left = iter([0.0, 1.0])
    assert weights.best_rate(1.0, lambda rate: next(left, None)) == [(1.0, 0.0), (4.0, 1.0)]
    # rates that break the model are none, and a value that grows for ever ends somewhere
    found = weights.best_rate(1.0, lambda rate: -math.inf if rate >= 1 else -abs(math.log(rate / 0.01)))
    assert max(found, key=lambda pair: pair[1])[0] == pytest.approx(0.01, rel=1)
    assert len(weights.best_rate(1.0, lambda rate: -rate)) == weights.MOST


def test_relearning_takes_the_rate_that_is_best_on_rows_kept_back(folder, monkeypatch):
    one = bench(folder, budget="16")
    trained = []
    train = weights.train_steps

    def spy(model, rows, *args, **how):
        trained.append((len(rows), how["rate"], how["steps"]))
        return train(model, rows, *args, **how)

    monkeypatch.setattr(weights, "train_steps", spy)
    found = weights.relearn_searched(one)
    tried = found[0].extra["tried"]
    # two steps of two rows for a rate: four rates
    assert len(tried) == 4
    best = max(tried, key=lambda each: each["logprob"])
    assert found[0].extra["rate"] == best["rate"]
    assert [rows for rows, *_ in trained] == [3] * 4 + [4]
    assert trained[-1] == (4, best["rate"], best["steps"])
    assert {r.extra["part"] for r in found} == {"other", "relearned"}
    assert len(found[0].extra["losses"]) == best["steps"]


def test_a_rate_is_not_trained_beyond_the_budget(folder):
    """A training went on to its last step: of `30s` on a large model that is many times what the attacker has."""
    one = bench(folder, budget="5", relearn={"rows": 4, "steps": [1, 3, 9], "batch_size": 2, "learning_rate": 1e-3})
    found = weights.relearn_searched(one)
    # two rows a step: spent after three steps, at which it is measured
    assert found[0].extra["questions_asked"] == 6
    assert [each["rate"] for each in found[0].extra["tried"]] == [1e-3]
    assert found[0].extra["steps"] in (1, 3)


def test_a_rate_that_breaks_the_model_is_passed_over(folder, monkeypatch):
    train = weights.train_steps

    def breaking(model, rows, *args, **how):
        if how["rate"] > 1e-3:
            raise weights.Diverged("broken")
        yield from train(model, rows, *args, **how)

    monkeypatch.setattr(weights, "train_steps", breaking)
    found = weights.relearn_searched(bench(folder))
    assert found[0].extra["rate"] <= 1e-3
    assert any(each["logprob"] == -math.inf for each in found[0].extra["tried"])


def test_a_gradient_that_is_not_finite_is_said():
    model = pico()
    model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    how = {"rate": 1e-4, "steps": 1, "batch_size": 2, "pad_token_id": PAD, "seed": 0}
    rows = [base.Item(0, [1, 2, 3], 1, "x").encoded]
    with pytest.raises(weights.Diverged, match="gradient"):
        list(weights.train_steps(model, rows, list(model.parameters()), **how))
