"""Every named method: it runs, costs the passes that it must, saves something that loads, and resumes."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alter import cli, methods, trainer
from alter.errors import UserError
from alter.methods import METHODS
from alter.trainer import Unlearn, unlearn
from pico import save_pico, write_jsonl

SMALL = {
    "elm": {"adapter": {"r": 4}, "objective": {"new_tokens": 3, "eta": 5.0}},
    "reglu": {"adapter": {"r": 4, "alpha": 8}, "initializer": {"rows": 4, "retain_rank": 3}},
    "vila": {"initializer": {"epochs": 2}},
    "alter_one_expert": {"domain_column": "who"},
}
"""What is too large for models of 32 wide."""

# rows that go through the model in a step, in forget batches: methods.md, column cost, with cached references
BRANCHES = {
    "finetune": 1,
    "ga": 1,
    "npo": 1,
    "random_label": 1,
    "whp": 1,
    "ceu": 1,
    "undial": 1,
    "task_arithmetic": 1,
    "o3": 1,
    "dpo": 2,
    "idk_dpo": 3,
    "elm": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    save_pico(folder / "model", max_position_embeddings=256)
    forget = [
        {"question": f"Where was {name} born, {i}?", "answer": f"In town {i}{name}.", "who": name}
        for name in ("Ada", "Bo")
        for i in range(3)
    ]
    retain = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(9)]
    write_jsonl(folder / "forget.jsonl", forget)
    write_jsonl(folder / "retain.jsonl", retain)
    return folder


def settings(data, out, method, **changes):
    given = {
        "method": method,
        "model": str(data / "model"),
        "forget": str(data / "forget.jsonl"),
        "retain": str(data / "retain.jsonl"),
        "out": str(out),
        "domain_column": "who",
        "epochs": 1,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "router_fit": {"steps": 20},
        "reinforcement": {"epochs": 2, "learning_rate": 1e-2},
        "device": "cpu",
    }
    return Unlearn.model_validate(methods.merged(methods.merged(given, SMALL.get(method, {})), changes))


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[10, 20, 30, 40, 50]])).logits


def loaded(data, out):
    """The result as a user loads it, and the untouched model's logits."""
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    before = logits_of(base)
    if (out / "model").exists():
        return AutoModelForCausalLM.from_pretrained(out / "model").eval(), before
    return PeftModel.from_pretrained(base, str(out / "adapter")).eval(), before


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_costs_what_it_must_and_loads(data, tmp_path, monkeypatch, method):
    run = settings(data, tmp_path / "run", method)
    rows = []
    real = trainer.UnlearnTrainer.compute_loss

    def counted(self, model, inputs, **kwargs):
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        layer = inner.model.layers[0]
        before = len(rows)
        handle = layer.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
        try:
            return real(self, model, inputs, **kwargs)
        finally:
            handle.remove()
            assert len(rows) == before + 1, "one forward pass a step"

    monkeypatch.setattr(trainer.UnlearnTrainer, "compute_loss", counted)
    out = unlearn(run)
    assert rows == [2 * BRANCHES.get(method, 2)] * 3
    record = json.loads((out / "run.json").read_text())
    assert record["steps"] == 3
    model, before = loaded(data, out)
    after = logits_of(model)
    assert torch.isfinite(after).all()
    assert not torch.allclose(after, before, atol=1e-6)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            assert torch.equal(logits_of(model), before)
    card = (out / ("model" if run.adapter.kind == "full" else "adapter") / "README.md").read_text()
    assert METHODS[method].title in card
