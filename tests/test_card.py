"""The model card: the code in it loads what it is about."""

import re

import pytest
import torch
from peft import PeftModel

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


def test_a_gguf_base_is_loaded_by_alter(tmp_path):
    run = Unlearn(model="me/some:model-Q4_K_M.gguf", forget="f", retain="r", out=str(tmp_path))
    text = code(model_card(run, ["all"]))
    compile(text, "card", "exec")
    assert "alter.load('me/some:model-Q4_K_M.gguf'" in text
    assert "AutoModelForCausalLM" not in text
