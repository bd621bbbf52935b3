"""Adapters of PEFT by their own configuration: eleven types train and load; mistakes, and types that put tokens in front."""

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import run_on, save_pico, write_people

SETTINGS = {
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LORA": {"r": 4, "use_dora": True},
    "VERA": {"r": 8},
    "OFT": {"r": 0, "oft_block_size": 8},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "HRA": {"r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "MISS": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "RANDLORA": {"r": 4},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    save_pico(folder / "model", max_position_embeddings=256)
    return write_people(folder, ("Ada", "Bo"), 2, 4)


def settings(data, out, config, **changes):
    given = {**run_on(data, out), "method": "npo_gd", "adapter": {"kind": "peft", "config": config}}
    return Unlearn.model_validate(
        {**given, "batch_size": 2, "max_steps": 2, "warmup_steps": 0, "learning_rate": 0.01} | changes
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_it_trains_and_loads(data, tmp_path, name):
    out = unlearn(settings(data, tmp_path / "r", {"peft_type": name, **SETTINGS[name]}))
    base = AutoModelForCausalLM.from_pretrained(data / "model").eval()
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
        after = model(ids).logits
        with model.disable_adapter():
            off = model(ids).logits
    assert not torch.allclose(before, after, atol=1e-6)
    assert torch.equal(before, off)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA4"}, "Did you mean 'IA3'"),
        ({"peft_type": "LORA", "rank": 4}, "config.rank is no setting of PEFT's LoraConfig"),
        ({"peft_type": "prompt_tuning"}, "virtual tokens"),
        ({}, "config.peft_type is None"),
    ],
)
def test_mistakes_are_named(data, tmp_path, config, says):
    with pytest.raises(ValueError, match=says):
        settings(data, tmp_path / "r", config)


def test_names_are_pefts():
    assert set(SETTINGS) <= {str(name.value) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
