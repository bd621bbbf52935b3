"""The model card: the code in it loads what it is about."""

import re

import pytest
import torch
from peft import PeftModel

from alter.distillation.run import _card
from alter.distillation.settings import Distill
from alter.models.loading import load_model
from alter.training.card import model_card
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import run_on, save_pico, write_people


def code(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize("base", ["folder", "builtin"])
def test_the_code_of_a_card_loads_the_adapter(tmp_path, monkeypatch, base):
    data = write_people(tmp_path, ["Ada"], 2, 4)
    save_pico(data / "model")
    model = str(data / "model") if base == "folder" else "builtin:tofu-mini/original"
    run = Unlearn.model_validate(
        {**run_on(data, tmp_path / "run"), "model": model, "max_steps": 1, "adapter": {"entropy_threshold": 1.0}}
        | {"router_fit": {"method": "logistic", "background": False, "rewordings": 0, "steps": 2}}
    )
    out = unlearn(run)
    made = {}
    exec(code((out / "adapter" / "README.md").read_text()).replace("this folder", str(out / "adapter")), made)
    assert isinstance(made["model"], PeftModel)
    expected, _ = load_model(model, str(out / "adapter"), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(made["model"].eval()(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("kind", ["alter", "lora", "full"])
def test_a_card_names_no_file_of_this_machine(tmp_path, kind):
    path = tmp_path / "jane-doe.jsonl"
    path.write_text('{"text": "x"}')
    given = {"model": "org/model", "forget": f"{path}[:3]@text=x + builtin:forget01", "retain": "org/rows:train[:5]"}
    watch = {} if kind == "full" else {"watch": {"holdout": str(path), "every_steps": 1}}
    own = {"out": str(tmp_path / "jane-doe"), "adapter": {"kind": kind}, "objective": {"kind": "npo"}, **watch}
    run = Unlearn.model_validate({**given, **own})
    card = model_card(run, ["all"])
    assert "jane" not in card
    assert str(tmp_path) not in card
    assert "forget local rows + builtin:forget01" in card
    assert "retain: org/rows:train[:5]" in card
    assert ("holdout: local rows" in card) is (kind != "full")
    assert Unlearn.model_validate(run).forget == given["forget"]


def test_a_card_of_distilled_weights_names_none_of_the_names(tmp_path):
    path = tmp_path / "jane-doe.jsonl"
    given = {
        "forget": str(path),
        "retain": "builtin:retain90",
        "general": [str(path)],
        "adapter": str(tmp_path / "jane"),
    }
    settings = Distill(
        model="org/model",
        student="org/model",
        out=str(tmp_path / "jane" / "plain"),
        names=["Jane Doe", "Arles"],
        **given,
    )
    card = _card(settings, "transformers")
    assert not {"jane", "Jane", "Arles", str(tmp_path)} & set(re.findall(r"[/\w]+", card))
    assert "retain: builtin:retain90" in card


def test_a_card_of_distilled_weights_does_not_name_the_teachers_folder():
    given = {"forget": "builtin:forget01", "retain": "builtin:retain99", "out": "o"}
    card = _card(Distill(model="runs/jane-doe/model", student="my-model", **given), "transformers")
    assert "jane-doe" not in card
    assert "my-model" in card


def test_a_gguf_base_is_loaded_by_alter(tmp_path):
    run = Unlearn(model="me/some:model-Q4_K_M.gguf", forget="f", retain="r", out=str(tmp_path))
    text = code(model_card(run, ["all"]))
    compile(text, "card", "exec")
    assert "alter.load('me/some:model-Q4_K_M.gguf'" in text
    assert "AutoModelForCausalLM" not in text
