"""What the inspector computes against loops, what it writes, and its page in a real browser."""

import html
import json
import math
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from alter import AlterConfig, cli
from alter.adapter.generation import DecodeState
from alter.adapter.layer import AlterLinear
from alter.core.errors import UserError
from alter.data.encoding import encode_prompt
from alter.data.rows import Example
from alter.inference.generation import generate
from alter.models.guards import Subtracted
from alter.requests.store import Store
from alter.serving.analysis import Analysis, Answer, Stopped, Token, analyse, expert_names, switched_off
from alter.serving.inspector import Inspect, Inspector, about, listen
from alter.serving.markup import About, describe, escape, message, render, render_about, render_request, share, taken
from alter.serving.text import token_texts
from pico import byte_tokenizer, pico, save_pico, write_jsonl
from reference import naive_softmax, naive_tsallis

NASTY = "<script>alert(1)</script> <b>bold</b> {{value}} ${value} `x` & \"quoted\" 'too'"


def adapted(seed=0, sure=False, **settings):
    """A pico model with an ALTER adapter of random weights; `sure` sends all to expert 1, and retention does nothing."""
    model = pico(seed, max_position_embeddings=256, initializer_range=0.45)
    given = dict(r=4, num_forget_experts=3, top_k=2, entropy_threshold=1.2, init_weights=False, task_type="CAUSAL_LM")
    if sure:
        given |= {"top_k": 1, "domains": ["Ada <b>&", "Bo", "Cy"]}
    model = get_peft_model(model, AlterConfig(**{**given, **settings})).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "alter_router" in name:
                weight.normal_(std=0.5)
                if sure and name.endswith("bias"):
                    weight[1] += 50.0
            elif "alter_B" in name:
                weight.mul_(1.5)
                if sure:
                    weight[:, :4] = 0.0
    return model


def encoded(tokenizer, prompt):
    return encode_prompt(tokenizer, Example(prompt=prompt, answer="", kind="qa"))


def at(model, ids, **given):
    """Logits after some ids, by a full forward pass."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False, **given).logits[0, -1].tolist()


def naive_tokens(model, ids):
    """(entropy, probability before, after, gates) of each token but the first: two full passes per token."""
    found = []
    for t in range(1, len(ids)):
        with model.disable_adapter():
            base = at(model, ids[:t])
        adapted_logits = at(model, ids[:t])
        gates = None
        if hasattr(model.base_model, "trace"):
            trace = model.base_model.trace(torch.tensor([ids[: t + 1]]))
            gates = model.base_model.route(trace.entropy, trace.features)[0, -1].tolist()
        found.append(
            (naive_tsallis(base, 1.5), naive_softmax(base)[ids[t]], naive_softmax(adapted_logits)[ids[t]], gates)
        )
    return found


@torch.no_grad()
def naive_generation(model, prompt, steps, stop):
    """(token, its probability, entropy of the step, its gates), one forward pass per step along a cache."""
    found, given, cache = [], prompt, None
    for _ in range(steps):
        output = model(input_ids=torch.tensor([given]), past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[0, -1].tolist()
        token = max(range(len(logits)), key=logits.__getitem__)
        state = DecodeState.of(cache)
        gates = None if state is None or not state.gates else state.gates["default"][0].tolist()
        found.append((token, naive_softmax(logits)[token], naive_tsallis(logits, 1.5), gates))
        if token == stop:
            break
        given = [token]
    return found


def assert_like(tokens, expected):
    for token, (entropy, before, after, gates) in zip(tokens, expected, strict=True):
        assert token.entropy == pytest.approx(entropy, abs=1e-4)
        assert token.high == (entropy > 1.2)
        assert token.before == pytest.approx(before, abs=1e-5)
        assert token.after == pytest.approx(after, abs=1e-5)
        if gates is not None:
            assert token.gates == pytest.approx(gates, abs=1e-5)


@pytest.mark.parametrize("router", ["learned", "entropy", "static"])
def test_analysis_is_that_of_a_loop_over_tokens(router):
    model, tokenizer = adapted(router=router), byte_tokenizer()
    found = analyse(model, tokenizer, "Who wrote it?", max_new_tokens=9)
    ids = encoded(tokenizer, "Who wrote it?")
    row = ids + [token.id for token in found.base.tokens]
    assert [token.id for token in found.prompt] == ids
    tokens = [*found.prompt, *found.base.tokens]
    assert math.isinf(tokens[0].entropy)
    assert math.isnan(tokens[0].before)
    assert math.isnan(tokens[0].after)
    assert_like(tokens[1:], naive_tokens(model, row))

    steps = naive_generation(model, ids, 9, tokenizer.eos_token_id)
    assert [token.id for token in found.unlearned.tokens] == [step[0] for step in steps]
    own = naive_tokens(model, ids + [step[0] for step in steps])[len(ids) - 1 :]
    for token, (_, after, entropy, gates), (base_entropy, before, _, _) in zip(
        found.unlearned.tokens, steps, own, strict=True
    ):
        assert token.after == pytest.approx(after, abs=1e-5)
        assert token.entropy_after == pytest.approx(entropy, abs=1e-4)
        assert token.entropy == pytest.approx(base_entropy, abs=1e-4)
        assert token.before == pytest.approx(before, abs=1e-5)
        assert token.gates == pytest.approx([1.0] * 4 if gates is None else gates, abs=1e-5)
    everyone = [*tokens[1:], *found.unlearned.tokens]
    assert {token.high for token in everyone} == {True, False}
    if router == "learned":
        # the two answers differ, and so do the routes of generation and of a plain pass
        assert found.base.text != found.unlearned.text
        assert any(
            token.gates != pytest.approx(o[3], abs=1e-3) for token, o in zip(found.unlearned.tokens, own, strict=True)
        )


@pytest.mark.parametrize("cached", [True, False])
def test_answers_are_those_of_generate(cached):
    """Whatever the model was saved with: those trained with checkpointing often say that they use no cache."""
    model, tokenizer = adapted(), byte_tokenizer()
    model.generation_config.use_cache = cached
    found = analyse(model, tokenizer, "Who?", max_new_tokens=20)
    prompt = [encoded(tokenizer, "Who?")]
    assert found.unlearned.text == generate(model, tokenizer, prompt, max_new_tokens=20, progress=False)[0]
    with model.disable_adapter():
        assert found.base.text == generate(model, tokenizer, prompt, max_new_tokens=20, progress=False)[0]


def test_the_token_that_ends_an_answer_is_shown():
    model, tokenizer = adapted(), byte_tokenizer()
    last = analyse(model, tokenizer, "Who?", max_new_tokens=3).base.tokens[-1].id
    model.generation_config.eos_token_id = last
    tokens = analyse(model, tokenizer, "Who?", max_new_tokens=20).base.tokens
    assert len(tokens) <= 3
    assert tokens[-1].id == last


def test_switching_off_is_clearing_and_gives_every_bit_back():
    model, cleared, tokenizer = adapted(), adapted(), byte_tokenizer()
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain = analyse(model, tokenizer, "Who?", max_new_tokens=10)
    off = analyse(model, tokenizer, "Who?", max_new_tokens=10, off=[2, 1])
    assert off.off == (1, 2)
    for layer in cleared.modules():
        if isinstance(layer, AlterLinear):
            r = layer.alter_r["default"]
            layer.alter_B["default"].weight.data[:, r : 3 * r] = 0.0
    assert off.unlearned == analyse(cleared, tokenizer, "Who?", max_new_tokens=10).unlearned
    assert off.unlearned != plain.unlearned
    assert off.base.text == plain.base.text

    def fails():
        with switched_off(model, [0, 3]):
            assert not torch.equal(model.state_dict()[changed(kept)], kept[changed(kept)])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items())
    assert analyse(model, tokenizer, "Who?", max_new_tokens=10) == plain


def changed(state):
    return next(name for name in state if "alter_B" in name)


def test_without_its_expert_an_answer_is_the_original():
    model, tokenizer = adapted(sure=True), byte_tokenizer()
    on, off = (analyse(model, tokenizer, "Who?", max_new_tokens=16, off=off) for off in ([], [1]))
    assert on.unlearned.text != on.base.text
    assert [token.id for token in off.unlearned.tokens] == [token.id for token in on.base.tokens]
    assert "Word for word" in render(off)
    assert "Word for word" not in render(on)


def test_another_adapter_has_no_experts():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model, tokenizer = get_peft_model(pico(max_position_embeddings=256), config).eval(), byte_tokenizer()
    found = analyse(model, tokenizer, "Who?", max_new_tokens=8)
    assert found.experts == ()
    ids = encoded(tokenizer, "Who?")
    for answer in (found.base, found.unlearned):
        assert_like(answer.tokens, naive_tokens(model, ids + [token.id for token in answer.tokens])[len(ids) - 1 :])
        assert all(token.gates == () for token in answer.tokens)
    steps = naive_generation(model, ids, 8, tokenizer.eos_token_id)
    assert [token.id for token in found.unlearned.tokens] == [step[0] for step in steps]
    assert "no experts" in render(found)
    with pytest.raises(UserError, match="no expert 1"):
        analyse(model, tokenizer, "Who?", max_new_tokens=8, off=[1])


def test_bfloat16():
    found = analyse(adapted().bfloat16(), byte_tokenizer(), "Who?", max_new_tokens=8)
    assert all(0 <= token.after <= 1 and 0 <= token.entropy < found.limit for token in found.unlearned.tokens)


@pytest.mark.parametrize(
    ("prompt", "given", "says"),
    [
        ("  \n", {}, "empty"),
        ("x" * 300, {}, r"has 3\d\d tokens.*context of 256"),
        ("Who?", {"max_new_tokens": 250}, "context of 256"),
        ("Who?", {"off": [4]}, "no expert 4"),
        ("Who?", {"off": [-1]}, "no expert -1"),
    ],
)
def test_refuses(prompt, given, says):
    with pytest.raises(UserError, match=says):
        analyse(adapted(), byte_tokenizer(), prompt, **given)


def test_needs_an_adapter_that_can_be_compared():
    with pytest.raises(UserError, match="`adapter`"):
        analyse(pico(), byte_tokenizer(), "Who?")
    prompting = get_peft_model(pico(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="adds tokens of its own"):
        Inspector(prompting, byte_tokenizer())


def test_answers_are_shown_while_they_are_made():
    inspector = Inspector(adapted(sure=True), byte_tokenizer())
    shown = list(inspector.answer("Who?", 12, []))
    assert shown[-1] == render(inspector.analyse("Who?", 12))
    assert "data-entropy" not in "".join(shown[:-1])
    assert list(inspector.answer(" ", 12, [])) == [message("The prompt is empty: type a question.")]
    assert "try <code>dtype</code> float32 &lt;b&gt;." in message("try `dtype` float32 <b>.")

    told = []
    inspector.analyse("Who?", 12, progress=lambda which, text: told.append((which, text)))
    found = inspector.analyse("Who?", 12)
    for which in ("base", "unlearned"):
        texts = [text for name, text in told if name == which]
        assert len(texts) == len(getattr(found, which).tokens)
        assert texts[-1] == getattr(found, which).text
    assert [name for name, _ in told] == sorted(name for name, _ in told)


def test_one_who_leaves_frees_the_model():
    inspector = Inspector(adapted(), byte_tokenizer())

    def stop(which, text):
        raise Stopped

    with pytest.raises(Stopped):
        inspector.analyse("Who?", 12, progress=stop)
    begun = inspector.answer("Who?", 200, [])
    next(begun)
    begun.close()
    started = time.time()
    plain = inspector.analyse("Who?", 3)
    assert time.time() - started < 20
    assert plain == analyse(adapted(), byte_tokenizer(), "Who?", max_new_tokens=3)


@pytest.mark.parametrize("rule", ["knowledge", "rise"])
def test_an_inference_form_is_inspected(rule):
    torch.manual_seed(0)
    base = pico(0, max_position_embeddings=256)
    small = pico(1, max_position_embeddings=256, num_hidden_layers=1)
    model = Subtracted(base, small, {"rule": rule, "weight": 0.8, "plausible": 1e-3}).eval()
    tokenizer = byte_tokenizer()
    found = analyse(model, tokenizer, "Who?", max_new_tokens=8)
    prompt = [encoded(tokenizer, "Who?")]
    assert found.unlearned.text == generate(model, tokenizer, prompt, max_new_tokens=8, progress=False)[0]
    assert found.base.text == generate(base, tokenizer, prompt, max_new_tokens=8, progress=False)[0]
    ids = prompt[0] + [token.id for token in found.unlearned.tokens]
    for place, token in enumerate(found.unlearned.tokens, start=len(prompt[0])):
        assert token.before == pytest.approx(naive_softmax(at(base, ids[:place]))[token.id], abs=1e-5)
        assert token.after == pytest.approx(naive_softmax(at(model, ids[:place]))[token.id], abs=1e-5)
    assert "no experts" in render(found)


def test_shares_of_experts():
    assert taken([token(gates=(0.25, 0.75)), token(gates=(1.0, 0.0))]) == (0.625, 0.375)
    assert taken([token(gates=(1.0, 1.0))]) == (0.5, 0.5)
    assert taken([]) == ()
    written = render(analysis(token(gates=(0.25, 0.75)), token(gates=(1.0, 0.0))))
    assert "62 %" in written
    assert "38 %" in written


def test_page_says_what_it_is_about(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"question": f"Who is {i}?", "answer": "x"} for i in range(30)])
    folder = tmp_path / "r1" / "adapter"
    folder.mkdir(parents=True)
    model = adapted()
    given = dict(model="owner/name", adapter=str(folder))
    assert about(Inspect(**given), model) == About("owner/name", "r1", "ALTER, 3 forget experts")
    record = {"settings": {"forget": str(tmp_path / "rows.jsonl"), "method": "alter"}}
    (tmp_path / "r1" / "run.json").write_text(json.dumps(record))
    found = about(Inspect(**given), model)
    assert found.forgotten == "rows.jsonl"
    assert found.questions == tuple(f"Who is {i}?" for i in range(0, 30, 5))
    (tmp_path / "rows.jsonl").unlink()
    erased = about(Inspect(**given), model)
    assert (erased.forgotten, erased.questions) == ("rows.jsonl", ())
    with pytest.raises(UserError, match=r"none\.jsonl"):
        about(Inspect(**given, forget=str(tmp_path / "none.jsonl")), model)
    assert "&lt;b&gt;" in render_about(About("<b>", "r1", "LoRA"))


def test_not_finite_is_said():
    model = adapted()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[7] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        analyse(model, byte_tokenizer(), "Who?", max_new_tokens=2)


@pytest.mark.parametrize("text", ["plain", "naïve 東京 🦊 end", "", "\n\n a\tb"])
def test_pieces_join_to_the_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    found = token_texts(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == f"{text}<eos>"
    # a character of n bytes is n tokens here, and stands at the last of them
    assert found.count("") == len(text.encode()) - len(text)


def test_pieces_of_bytes_that_make_no_character():
    tokenizer = byte_tokenizer()
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=False)


def test_many_at_once_get_their_own_answers():
    inspector = Inspector(adapted(), byte_tokenizer())
    asked = [(f"Who is {i}?", 6, [i % 4] if i % 2 else []) for i in range(8)]
    alone = [inspector.analyse(*one) for one in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: inspector.analyse(*one), asked))
    assert together == alone


# What is written


class Tokens(HTMLParser):
    """The tokens of each answer as the page has them, and all tags."""

    def __init__(self, text):
        super().__init__()
        self.answer, self.found, self.tags = "", {}, set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        given = dict(attrs)
        self.answer = given.get("data-answer", self.answer)
        if "data-entropy" in given:
            self.found.setdefault(self.answer, []).append(given)


def test_page_holds_what_was_computed():
    found = analyse(adapted(sure=True), byte_tokenizer(), NASTY, max_new_tokens=24, off=[2])
    written = render(found)
    parsed = Tokens(written)
    assert not parsed.tags & {"script", "img", "iframe", "a"}
    assert "<b>bold" not in written
    assert "Ada <b>" not in written
    for name, tokens in (("prompt", found.prompt), ("base", found.base.tokens), ("unlearned", found.unlearned.tokens)):
        shown = parsed.found[name]
        assert [int(given["data-id"]) for given in shown] == [token.id for token in tokens]
        for given, token in zip(shown, tokens, strict=True):
            if math.isfinite(token.entropy):
                assert float(given["data-entropy"]) == pytest.approx(token.entropy, rel=1e-5)
                assert ("high" in given["class"]) == (token.entropy > found.threshold)
                assert f"Entropy {token.entropy:.3f}" in given["aria-label"]
                assert f"Probability {token.before:.3f}" in given["aria-label"] or token.before < 0.001
            expected = min(token.entropy / found.top, 1.0) if math.isfinite(token.entropy) else 0.0
            change = 0.0 if math.isnan(token.before) else token.after - token.before
            widest = max(range(len(token.gates)), key=lambda d: token.gates[d])
            assert given["style"] == (
                f"--share:{expected:.4f};--fall:{max(-change, 0):.4f};--rise:{max(change, 0):.4f};"
                f"--expert:var(--e{widest})"
            )
        # one stop for the Tab key in each answer
        assert [given["tabindex"] for given in shown] == ["0"] + ["-1"] * (len(tokens) - 1)
    assert f"left:{100 * 1.2 / found.top:.2f}%" in written


def token(**changes):
    given = dict(
        id=1, text="a", entropy=0.5, entropy_after=0.6, high=False, gates=(0.0, 1.0), before=0.9, after=0.00002
    )
    return Token(**{**given, **changes})


def analysis(*tokens, **changes):
    answer = Answer("", tokens)
    given = dict(prompt=tokens, base=answer, unlearned=answer, experts=("retention", "expert 1 (Ada)"), off=(), q=1.5)
    return Analysis(**{**given, "threshold": 1.2, "top": 1.9, "limit": 1.9, **changes})


def test_a_token_tells_its_figures():
    told = describe(token(), analysis())
    assert told == (
        "\u201ca\u201d\nEntropy 0.500 (low); under the adapter 0.600.\nTakes expert 1 (Ada) 1.00.\n"
        "Probability 0.900 before, 2.0e-05 after."
    )
    several = describe(token(gates=(0.25, 0.75), high=True, entropy=1.5), analysis(off=(1,)))
    assert "(high)" in several
    assert "Takes expert 1 (Ada) 0.75 (switched off), retention 0.25." in several
    first = describe(token(entropy=math.inf, before=math.nan, after=math.nan), analysis())
    assert "nothing generated it" in first
    assert describe(token(text=""), analysis()).startswith("Part of a character\n")
    assert "Probability" not in first


def test_color_scale():
    assert [share(value, 2.0) for value in (0.0, 1.0, 2.0, 3.0, math.inf)] == [0.0, 0.5, 1.0, 1.0, 0.0]
    assert "1.90 and more" in render(analysis(token(), limit=5.0))
    assert "and more" not in render(analysis(token()))


def test_control_characters_are_seen():
    assert escape("a\x00b\x1b\x85\n<") == "a\u2400b\u241b\u2421\n&lt;"


def test_names_of_experts():
    assert expert_names(adapted()) == ("retention", "expert 1", "expert 2", "expert 3")
    assert expert_names(adapted(sure=True))[1] == "expert 1 (Ada <b>&)"


# Requests


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path)


def filled(folder):
    store = Store.create(f"sqlite:///{folder}/requests.db", {"model": "m"})
    for number, subject in enumerate(["Ada <script>x</script>", "Bo"], start=1):
        store.add(
            subject=subject, data="rows.jsonl", data_hash=str(number), row_hashes=[str(number)], text="secret row"
        )
    evidence = {"probability": 0.9, "exact_memorization": 0.99, "rouge": 0.95, "n": 4}
    after = {
        "probability": 0.1,
        "exact_memorization": 0.2,
        "rouge": 0.3,
        "n": 4,
        "verdict": {"word": "forgotten", "why": ["0 of 4 replies <still> give it."]},
        "utility_share": 0.99,
    }
    after["reference"] = {"by": "holdout", "probability": 0.11, "exact_memorization": None, "rouge": 0.31}
    store.move([1], "running")
    store.move([1], "trained")
    store.move([1], "forgotten", values={1: {"expert": 1, "before": evidence, "after": after, "run": {"version": 1}}})
    return store


def test_request_is_shown_with_its_evidence(store):
    written = render_request(store, store.get(1))
    assert "<script>" not in written
    assert html.escape("Ada <script>x</script>") in written
    assert "secret row" not in written
    for figure in (
        "0.950",
        "0.300",
        "0.310",
        "0.9900",
        "holdout",
        "FORGOTTEN. 0 of 4 replies &lt;still&gt; give it.",
        "Chain verified",
        store.head(),
    ):
        assert figure in written
    assert written.count("<tr>") == 1 + 6 + 1 + len(store.history(1))
    assert "No evidence yet" in render_request(store, store.get(2))


@pytest.mark.parametrize(
    ("n", "state", "tone"), [(99, "forgotten", "soft"), (100, "forgotten", "good"), (100, "revoked", "soft")]
)
def test_green_is_only_for_what_is_in_force_and_rests_on_enough_answers(store, n, state, tone):
    """As on the report's page: 8 answers, and requests that were revoked, stood there in green."""
    request = store.get(1)
    request = replace(request, state=state, after={**request.after, "n_answers": n, "n_said": n, "said": 2})
    written = render_request(store, request)
    assert re.findall('<p class="([a-z]+)">FORGOTTEN', written) == [tone]
    assert ("a first look, no proof" in written) == (n < 100)
    assert ("no longer in force" in written) == (state == "revoked")
    # a history that is whole is no erasure
    assert written.count('class="good"') == (tone == "good")
    assert f'<td>replies that give the answer</td><td class="n">–</td><td class="n">2 of {n}</td>' in written


def test_a_history_that_was_altered_is_said(store):
    with store.engine.connect() as connection:
        connection.exec_driver_sql("DROP TRIGGER alter_history_update")
        connection.exec_driver_sql("UPDATE alter_history SET who = 'x' WHERE number = 2")
        connection.commit()
    written = render_request(store, store.get(1))
    assert "does not verify" in written
    assert "Chain verified" not in written


# The page


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    save_pico(folder / "model", max_position_embeddings=256, initializer_range=0.45)
    adapted(sure=True).save_pretrained(folder / "adapter")
    return folder


def test_mistakes_on_the_command_line(folders, capsys):
    pytest.importorskip("gradio", reason="gradio is in the extra [ui]")

    def said(*changes):
        given = {"--model": str(folders / "model"), "--adapter": str(folders / "adapter"), "--port": "0"}
        given |= dict(zip(changes[::2], changes[1::2], strict=True))
        assert cli.main(["inspect", *(part for pair in given.items() for part in pair)]) == 2
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Cannot listen on 127.0.0.1:{port}" in said("--port", str(port))
    assert "No adapter at" in said("--adapter", str(folders / "none"))
    assert "holds a whole model" in said("--adapter", str(folders / "model"))
    assert "No database at" in said("--db", f"sqlite:///{folders}/none.db")
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--model", "m"])
    assert "--adapter" in capsys.readouterr().err


def test_listening_says_which_port_is_free():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"Cannot listen on 127.0.0.1:{port}.*`port`"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="Cannot listen"):
        listen("192.0.2.1", 0)


def test_page_of_an_adapter_without_experts_is_built():
    pytest.importorskip("gradio", reason="gradio is in the extra [ui]")
    from alter.serving.inspector import page

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    built = page(Inspector(get_peft_model(pico(), config), byte_tokenizer())).get_config_file()["components"]
    given = {part["props"].get("elem_id"): part["props"] for part in built}
    assert given["off"]["choices"] == []
    assert "no experts" in given["off"]["label"]
    assert given["length"]["maximum"] == 127
    assert not {"request", "evidence"} & set(given)


class Site:
    """The page on a port of its own, in a thread."""

    def __init__(self, folder):
        pytest.importorskip("gradio", reason="gradio is in the extra [ui]")
        import uvicorn

        from alter.serving.inspector import inspector_application, page

        told = About("pico", "r1", "ALTER, 3 forget experts", "forget.jsonl", ("Who is <b>Ada</b>?", "Where is Bo?"))
        self.inspector = Inspector(adapted(sure=True), byte_tokenizer(), filled(folder), told)
        app = inspector_application(page(self.inspector, 24))
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    one = Site(tmp_path_factory.mktemp("site"))
    yield one
    one.server.should_exit = True
    one.thread.join(20)


def test_page_is_for_its_own_address_alone(site):
    with urllib.request.urlopen(site.url) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(site.url, headers={"Host": "elsewhere.example"}))


FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra [dev]")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as runner:
        chromium = runner.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A page in the browser that notes what must not be: foreign requests, failures, console errors."""

    def __init__(self, browser, site, width=1280, scheme="light"):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(20_000)
        self.site, self.wrong = site, []
        self.page.on("request", self._request)
        self.page.on("response", lambda r: r.status >= 400 and self.wrong.append(f"{r.status} {r.url}"))
        self.page.on("console", lambda m: m.type == "error" and self.wrong.append(m.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.page.goto(site.url)
        self.page.wait_for_selector("#prompt textarea")

    def _request(self, request):
        if not request.url.startswith((self.site.url + "/", "data:", "blob:")):
            self.wrong.append(request.url)

    def ask(self, text):
        self.page.fill("#prompt textarea", text)
        with self.page.expect_response(lambda r: "queue/join" in r.url):
            self.page.click("#ask")
        self.page.wait_for_function(
            "text => document.querySelector('#answers').innerText.includes(text)", arg="adapter on"
        )

    def tokens(self, answer):
        read = (
            "nodes => nodes.map(n => ({id: +n.dataset.id, entropy: +n.dataset.entropy, label: n.ariaLabel, "
            "color: getComputedStyle(n).backgroundColor, line: getComputedStyle(n).textDecorationLine}))"
        )
        return self.page.eval_on_selector_all(f"[data-answer={answer}] .token", read)

    def fits(self):
        # Gradio's container clips what is too wide, so the document's own width does not tell
        outside = (
            "[...document.querySelectorAll('.alter *, .gradio-container .block')].filter(n => n.getClientRects().length && "
            "n.getBoundingClientRect().right > innerWidth + 1).map(n => n.outerHTML.slice(0, 80))"
        )
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth") and not self.page.evaluate(
            outside
        )


def rgb(color):
    """Red, green and blue, 0 to 1, of what the browser says of a color."""
    inside = color[color.index("(") + 1 : -1]
    if color.startswith("color("):
        return [float(part) for part in inside.split()[1:4]]
    return [float(part) / 255 for part in inside.replace(",", " ").split()[:3]]


ENDS = {"light": ((0xF8, 0xFA, 0xFC), (0xFD, 0xBA, 0x74)), "dark": ((0x1B, 0x20, 0x27), (0x9A, 0x34, 0x12))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        *(pytest.param(width, scheme, marks=pytest.mark.long) for width, scheme in ((1280, "dark"), (390, "light"))),
    ],
)
def test_in_a_browser(browser, site, tmp_path, width, scheme):
    visit = Visit(browser, site, width, scheme)
    page = visit.page
    visit.ask(NASTY)
    found = site.inspector.analyse(NASTY, 24)
    cold, hot = ENDS[scheme]
    assert {one.high for one in found.prompt[1:] + found.unlearned.tokens} == {True, False}
    for name, tokens in (("base", found.base.tokens), ("unlearned", found.unlearned.tokens), ("prompt", found.prompt)):
        shown = visit.tokens(name)
        assert [given["id"] for given in shown] == [token.id for token in tokens]
        for given, one in zip(shown, tokens, strict=True):
            if math.isfinite(one.entropy):
                assert given["entropy"] == pytest.approx(one.entropy, abs=1e-4)
                part = min(one.entropy / found.top, 1.0)
                mixed = [(h * part + c * (1 - part)) / 255 for c, h in zip(cold, hot, strict=True)]
                assert rgb(given["color"]) == pytest.approx(mixed, abs=0.006)
                assert ("underline" in given["line"]) == (one.entropy > found.threshold)
    assert page.locator("#answers script, #answers b:text-is('bold')").count() == 0
    assert NASTY in page.text_content("[data-answer=prompt]")

    # the other meanings of color, and back
    tokens = {name: getattr(found, name) for name in ("base", "unlearned")}
    page.get_by_label("change of probability").check()
    shown = visit.tokens("unlearned")
    changes = [token.after - token.before for token in tokens["unlearned"].tokens]
    if max(changes) > 0.2:
        most = shown[changes.index(max(changes))]
        assert rgb(most["color"])[2] > rgb(most["color"])[0]
    page.get_by_label("expert", exact=True).check()
    assert {given["color"] for given in visit.tokens("unlearned")} != {given["color"] for given in shown}
    assert page.locator(".legend .by.expert").is_visible()
    assert not page.locator(".legend .by.entropy").is_visible()
    page.screenshot(path=tmp_path / f"experts-{scheme}-{width}.png", full_page=True)
    page.get_by_label("entropy", exact=True).check()
    assert page.locator(".legend .by.entropy").is_visible()

    # one stop of the Tab key for each answer, arrow keys from there
    assert page.locator("[data-answer=base] [tabindex='0']").count() == 1
    page.locator("[data-answer=base] .token").first.focus()
    for key, place in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", len(found.base.tokens) - 1),
        ("Home", 0),
    ):
        page.keyboard.press(key)
        where = "[...document.activeElement.parentNode.children].indexOf(document.activeElement)"
        assert page.evaluate(where) == place
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('[data-answer]')?.dataset.answer") == "unlearned"

    # hover and keyboard show the figures, inside the window
    first = page.locator("[data-answer=unlearned] .token").first
    first.focus()
    tip = "node => { const s = getComputedStyle(node, '::after'); return [s.display, s.content, s.width] }"
    display, content, size = first.evaluate(tip)
    assert display == "block"
    assert "Entropy" in content
    assert "Takes" in content
    assert float(size.removesuffix("px")) <= width
    page.mouse.move(0, 0)
    second = page.locator("[data-answer=unlearned] .token").nth(1)
    second.hover()
    assert second.evaluate(tip)[0] == "block"
    assert visit.fits()
    # no share is out of sight
    assert page.evaluate("[...document.querySelectorAll('.wide')].every(box => box.scrollWidth <= box.clientWidth)")
    page.screenshot(path=tmp_path / f"answers-{scheme}-{width}.png", full_page=True)

    page.get_by_role("button", name="Switch experts off").click()
    page.locator("#off").get_by_label("expert 1 (Ada <b>&)").check()
    page.wait_for_selector("#answers :text('without expert 1')")
    assert [given["id"] for given in visit.tokens("unlearned")] == [token.id for token in found.base.tokens]
    assert "switched off" in visit.tokens("unlearned")[0]["label"]
    assert visit.fits()
    page.screenshot(path=tmp_path / f"off-{scheme}-{width}.png", full_page=True)
    page.locator("#off").get_by_label("expert 1 (Ada <b>&)").uncheck()
    page.wait_for_selector("#answers :text('adapter on')")
    assert [given["id"] for given in visit.tokens("unlearned")] == [token.id for token in found.unlearned.tokens]

    page.get_by_role("tab", name="Requests").click()
    page.locator("#request input").click()
    page.get_by_role("option", name="R-0001").click()
    page.wait_for_selector("[data-request=R-0001] :text('Chain verified')")
    assert page.locator("[data-request] [data-evidence] td").all_inner_texts()[1:4] == ["0.900", "0.100", "0.110"]
    assert visit.fits()
    # no figure of the evidence is out of sight
    assert page.evaluate("[...document.querySelectorAll('.wide')].every(box => box.scrollWidth <= box.clientWidth)")
    page.wait_for_selector("#request [role=listbox]", state="detached")
    page.screenshot(path=tmp_path / f"requests-{scheme}-{width}.png", full_page=True)
    assert visit.wrong == []
    page.close()


@pytest.mark.slow
def test_mistakes_are_said_on_the_page(browser, site):
    visit = Visit(browser, site)
    for text, says in (("  ", "empty"), ("x" * 300, "context of 256")):
        visit.page.fill("#prompt textarea", text)
        visit.page.click("#ask")
        visit.page.wait_for_selector(f"#answers [role=alert]:has-text('{says}')")
    assert visit.wrong == []
    visit.page.close()


@pytest.mark.slow
def test_a_forget_question_is_offered(browser, site):
    visit = Visit(browser, site)
    assert "forget.jsonl" in visit.page.inner_text("#about")
    visit.page.get_by_role("button", name="Where is Bo?").click()
    visit.page.wait_for_function("() => document.querySelector('#prompt textarea').value === 'Where is Bo?'")
    assert visit.wrong == []
    visit.page.close()


@pytest.mark.slow
def test_two_people_at_once(browser, site):
    visits = [Visit(browser, site), Visit(browser, site)]
    asked = ["Who is Ada?", "Where is the town?"]
    for visit, text in zip(visits, asked, strict=True):
        visit.page.fill("#prompt textarea", text)
    for visit in visits:
        visit.page.click("#ask")
    for visit, text in zip(visits, asked, strict=True):
        visit.page.wait_for_selector("#answers .token")
        found = site.inspector.analyse(text, 24)
        assert [given["id"] for given in visit.tokens("unlearned")] == [token.id for token in found.unlearned.tokens]
        assert visit.wrong == []
        visit.page.close()
