"""Adapters of PEFT by their own configuration: every type that PEFT has trains and loads, or says why it cannot; mistakes."""

import re

import pytest
import torch
from peft import PeftModel, PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from alter.methods.adapters.peft import CANNOT
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
    "ADAMSS": {},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {},
    "DELORA": {},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "LILY": {},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {},
    "ROAD": {"group_size": 8},
    "SHADOW": {},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {},
    "TINYLORA": {},
    # the bytes of the rows' letters
    "TRAINABLE_TOKENS": {"token_indices": list(range(40, 80))},
    "UNILORA": {},
    "VBLORA": {"r": 2, "vector_length": 8, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 20},
}
"""Of every type of PEFT that a run can train, what a model of 32 wide asks for."""


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


@pytest.mark.parametrize("name", CANNOT)
def test_types_that_no_run_trains_say_why(data, tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(CANNOT[name])):
        settings(data, tmp_path / "r", {"peft_type": name.lower()})


@pytest.mark.parametrize(
    ("start", "says"),
    [(name, "out of the base") for name in ("pissa", "PiSSA_niter_4", "olora", "corda", "loftq")]
    + [(name, "plain LoRA under another name") for name in ("eva", "EVA", "lora_ga")],
)
def test_starts_that_change_the_base_or_need_rows_are_refused(data, tmp_path, start, says):
    """Without the adapter of PiSSA the model is a rest of its own, so that references were of another model."""
    with pytest.raises(ValueError, match=says):
        settings(data, tmp_path / "r", {"peft_type": "LORA", "init_lora_weights": start})
    settings(data, tmp_path / "r", {"peft_type": "LORA", "init_lora_weights": "gaussian"})


def test_every_type_of_peft_trains_or_says_why_not():
    prompts = {str(n.value) for n, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(c, PromptLearningConfig)}
    known = {str(name.value) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
    # PEFT's own list: one that it has and this test has not is new
    assert known == prompts | set(SETTINGS) | set(CANNOT)
    assert {str(kind.value) for kind in PeftType} <= known
    assert not set(SETTINGS) & set(CANNOT)
