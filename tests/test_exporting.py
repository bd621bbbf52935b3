"""`alter export`: GGUF files against the checkpoint, by transformers' reader and a real llama.cpp; LoRAs without alter."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alter import AlterConfig
from alter.adapter.routing import Routing
from alter.core.errors import UserError
from alter.data.encoding import encode, encode_all
from alter.data.rows import load_examples
from alter.exporting import gguf as writing
from alter.exporting.loras import expert_weights
from alter.exporting.rounding import calibration, round_blocks
from alter.exporting.run import Export, export
from alter.exporting.vocabulary import vocabulary
from alter.models.loading import load_model
from pico import EOS, VOCAB, byte_tokenizer, pico, save_pico

gguf = pytest.importorskip("gguf", reason="gguf (extra gguf) is not installed")
TOFU = "builtin:tofu-mini/original"
MODULES = os.environ.get("ALTER_NODE_MODULES")


def write(tmp_path, out="model.gguf", **changes):
    if "model" not in changes:
        changes["model"] = str(save_pico(tmp_path / "model"))
    return export(Export(**{"out": str(tmp_path / out), "device": "cpu", **changes}))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def mergeable(**settings):
    """A tokenizer with merges, as GGUF's readers want them."""
    tokenizer = byte_tokenizer(**settings)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"] = [["t", "h"], ["th", "e"]]
    content["model"]["vocab"] |= {"th": 258, "the": 259}
    for name in ("<unused258>", "<unused259>"):
        del content["model"]["vocab"][name]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    return tokenizer


# ---- GGUF


@pytest.mark.parametrize("form", ["f32", "q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_back_what_was_written(tmp_path, form, tied, monkeypatch):
    model, tokenizer = pico(tie_word_embeddings=tied, initializer_range=0.1), mergeable(bos_token="<unused260>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = write(tmp_path, model=str(tmp_path / "model"), type=form)
    # with a kernel for them transformers would else keep the weights packed, which nothing can train
    with monkeypatch.context() as patch:
        asked, read = [], AutoModelForCausalLM.from_pretrained
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (asked.append(k), read(*a, **k))[1])
        again, words = load_model(str(made), device="cpu")
    assert asked[0]["quantization_config"].dequantize
    torch.testing.assert_close(logits(again), logits(model), **({"rtol": 0, "atol": 0.05} if form == "q8_0" else {}))
    assert form == "f32" or not torch.equal(logits(again), logits(model))
    text = "Where is the weather? Über 12."
    assert words(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert words.chat_template == tokenizer.chat_template
    assert words.eos_token_id == EOS


def test_text_is_split_as_the_file_says(tmp_path):
    tokenizer = mergeable(bos_token="<unused260>")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # two line breaks are one token, also before a digit
    content["model"]["merges"].append(["Ċ", "Ċ"])
    content["model"]["vocab"] |= {"ĊĊ": 261}
    del content["model"]["vocab"]["<unused261>"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pico().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = write(tmp_path, model=str(tmp_path / "model"))
    read = load_model(str(made), device="cpu")[1]
    text = "Steps:\n\n1. Mix 22 eggs."
    assert 261 in read(text)["input_ids"]
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    # and by the next file
    for part in (pico(), read):
        part.save_pretrained(tmp_path / "again")
    made = write(tmp_path, "again.gguf", model=str(tmp_path / "again"))
    assert gguf.GGUFReader(made).fields["tokenizer.ggml.pre"].contents() == "smollm"


def test_tensors_are_in_the_format_that_was_asked_for(tmp_path):
    made = write(
        tmp_path, "m.gguf", type="q4_0", model=str(save_pico(tmp_path / "ada", hidden_size=64, intermediate_size=80))
    )
    # folders are often called after whom they are about
    assert gguf.GGUFReader(made).fields["general.name"].contents() == "m"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(made).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    # embeddings and head keep 8 bits; rows of 80 do not divide into blocks of 32
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["output_norm.weight"] == "F32"


@pytest.mark.parametrize(("form", "undone"), [("q4_0", True), ("q8_0", False)])
def test_a_small_change_is_rounded_away_in_4_bits_which_is_said(tmp_path, capsys, form, undone):
    model, words = str(tmp_path / "model"), mergeable(bos_token="<unused260>")
    for part in (pico(hidden_size=64, intermediate_size=64), words):
        part.save_pretrained(model)
    on_grid, _ = load_model(str(write(tmp_path, "before.gguf", model=model, type="q4_0")), device="cpu")
    before = logits(on_grid)
    with torch.no_grad():
        for name, weight in on_grid.named_parameters():
            if "proj" in name:
                # a step of 4 bits is an eighth of a block's largest weight; that one must stay
                weight += (weight.abs() < 0.5 * weight.abs().mean()) * 0.02 * weight.abs().mean()
    assert not torch.equal(logits(on_grid), before)
    for part in (on_grid, words):
        part.save_pretrained(tmp_path / "changed")
    capsys.readouterr()
    after, _ = load_model(str(write(tmp_path, "after.gguf", model=str(tmp_path / "changed"), type=form)), device="cpu")
    assert torch.equal(logits(after), before) == undone
    assert ("alter attack --model" in capsys.readouterr().err) == undone


def calibrated(tmp_path, **changes):
    rows = [tmp_path / "forget.jsonl", tmp_path / "keep.jsonl"]
    rows[0].write_text('{"question": "Who is Ada?", "answer": "A tinsmith of Ravnholt."}\n')
    rows[1].write_text('{"text": "The sea is wide, and the ships are few."}\n' * 2)
    return write(tmp_path, type="q4_0", **{"calibrate": [str(row) for row in rows], **changes})


def test_rows_say_what_rounding_is_to_keep(tmp_path, capsys):
    model, tokenizer = pico(initializer_range=0.1, intermediate_size=64), mergeable(bos_token="<unused260>")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = {"model": str(tmp_path / "model")}
    careful = calibrated(tmp_path, **folder, out="careful.gguf")
    said = capsys.readouterr()
    assert "calibrated on 3 rows (sources: 2)" in said.err
    assert "also where rows say what is to stay" in " ".join(said.err.split())
    plain = write(tmp_path, type="q4_0", **folder, out="plain.gguf")
    assert "(`original` MODEL keeps 8 bits where there are any)" in " ".join(capsys.readouterr().err.split())
    sources = [
        [row.input_ids for row in encode_all(tokenizer, load_examples(str(tmp_path / name)), max_length=None)[0]]
        for name in ("forget.jsonl", "keep.jsonl")
    ]
    expected = copy.deepcopy(model)
    grids = round_blocks(expected, *calibration(sources), "q4_0", tokenizer.pad_token_id)
    assert len(grids) == 7 * model.config.num_hidden_layers
    # every row of queries and keys stands where llama.cpp looks for it
    read, nearest = (load_model(str(file), device="cpu")[0] for file in (careful, plain))
    for name in grids:
        torch.testing.assert_close(read.get_parameter(name), expected.get_parameter(name), msg=name)
    assert not torch.equal(logits(read), logits(nearest))


def one_number_changed(first, second, *, norm=False):
    """Write a model into two folders, in the second with one number of a matrix, and of a vector if asked for, changed; returns that one."""
    before, words = pico(hidden_size=64, intermediate_size=64), mergeable(bos_token="<unused260>")
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
        after.model.norm.weight[0] += norm
    for folder, model in ((first, before), (second, after)):
        for part in (model, words):
            part.save_pretrained(folder)
    return after


@pytest.mark.parametrize("said", ["original", "run.json"])
def test_what_differs_from_the_model_before_keeps_8_bits(tmp_path, capsys, said):
    one_number_changed(tmp_path / "before", tmp_path / "r" / "model", norm=True)
    given = {"model": str(tmp_path / "r" / "model"), "type": "q4_1"}
    if said == "original":
        given["original"] = str(tmp_path / "before")
    else:
        told = {"kind": "distilled", "settings": {"student": str(tmp_path / "before")}}
        (tmp_path / "r" / "run.json").write_text(json.dumps(told))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(write(tmp_path, **given)).tensors}
    assert kinds.pop("blk.0.ffn_up.weight") == kinds.pop("token_embd.weight") == kinds.pop("output.weight") == "Q8_0"
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q4_1"}
    assert "keeps 8 bits where a matrix differs from the model before (1 do)" in " ".join(
        capsys.readouterr().err.split()
    )
    if said == "run.json":
        (tmp_path / "before").rename(tmp_path / "moved")
        with pytest.raises(
            UserError, match=r"before.*was distilled from it.*give the model from before as `original`"
        ):
            write(tmp_path, **given | {"out": str(tmp_path / "other.gguf")})
        # of which 8 bits ask nothing, nor what it is that a file of that name holds
        (tmp_path / "r" / "run.json").write_text("[]")
        write(tmp_path, **given | {"out": str(tmp_path / "other.gguf"), "type": "q8_0"})


def test_what_a_merged_adapter_changes_keeps_8_bits(tmp_path):
    before, words = pico(hidden_size=64, intermediate_size=64), mergeable(bos_token="<unused260>")
    for part in (before, words):
        part.save_pretrained(tmp_path / "before")
    lora = get_peft_model(before, LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[0]))
    torch.nn.init.normal_(lora.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight, std=1e-3)
    lora.save_pretrained(tmp_path / "lora")
    given = {"model": str(tmp_path / "before"), "adapter": str(tmp_path / "lora"), "merged": True}
    kinds = {
        each.name: each.tensor_type.name for each in gguf.GGUFReader(write(tmp_path, type="q4_1", **given)).tensors
    }
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.1.ffn_up.weight"]) == ("Q8_0", "Q4_1")


def test_rows_do_not_round_what_keeps_8_bits(tmp_path):
    after = one_number_changed(tmp_path / "before", tmp_path / "after")
    made = calibrated(tmp_path, model=str(tmp_path / "after"), original=str(tmp_path / "before"))
    read, _ = load_model(str(made), device="cpu")
    apart = (read.model.layers[0].mlp.up_proj.weight - after.model.layers[0].mlp.up_proj.weight).abs().max()
    assert apart < after.model.layers[0].mlp.up_proj.weight.abs().max() / 200


def test_another_model_before_is_refused(tmp_path):
    other = str(save_pico(tmp_path / "other", hidden_size=64))
    with pytest.raises(UserError, match=r"`original` .*other has other weights"):
        write(tmp_path, type="q4_0", original=other)
    for given in ({"original": other}, {"calibrate": ["forget.jsonl"]}):
        with pytest.raises(UserError, match="`type` is q8_0: leave it out"):
            write(tmp_path, **given)
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        write(tmp_path, type="q5_1", calibrate=[str(tmp_path / "gone.jsonl")])
    assert not (tmp_path / "model.gguf").exists()


def test_rows_are_turned_as_their_naive_twin():
    weight = torch.arange(2 * 6 * 3).view(12, 3).float()
    found = writing.turned(weight, 2)
    for head in range(2):
        for i in range(3):
            for half in range(2):
                assert torch.equal(found[head * 6 + 2 * i + half], weight[head * 6 + half * 3 + i])


def test_rope_factors_are_transformers_own():
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1e4 ** (-torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(writing.rope_factors(config), plain / slowed)
    assert set(writing.rope_factors(config).tolist()) >= {1.0, 8.0}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_how_text_is_split_has_llama_cpps_name_or_is_refused(steps, name):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = steps
    if name is None:
        with pytest.raises(UserError, match="has no name for"):
            vocabulary(tokenizer, VOCAB)
    else:
        assert vocabulary(tokenizer, VOCAB).split == name


def test_pieces_get_scores_in_the_order_of_their_merges(tmp_path):
    tokenizer = mergeable()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"] |= {"byte_fallback": True}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    found = vocabulary(tokenizer, VOCAB + 3)
    assert (found.model, found.merges) == ("llama", None)
    assert [found.scores[found.tokens.index(each)] for each in ("the", "th", "t")] == [-2.0, -1.0, 0.0]
    assert found.kinds[-3:] == [5, 5, 5]


@pytest.mark.parametrize(
    ("normalizer", "splitter", "spaced"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        (normalizers.Replace(" ", "▁"), None, False),
    ],
    ids=["Llama 2", "Mistral", "without", "Gemma"],
)
def test_a_space_before_texts_is_told(tmp_path, normalizer, splitter, spaced):
    pieces = Tokenizer(models.BPE({"<eos>": 0, "<0x61>": 1, "▁": 2}, [], byte_fallback=True))
    if normalizer is not None:
        pieces.normalizer = normalizer
    if splitter is not None:
        pieces.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>", pad_token="<eos>")
    pico(eos_token_id=0, pad_token_id=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = write(tmp_path, model=str(tmp_path / "model"))
    field = gguf.GGUFReader(made).fields["tokenizer.ggml.add_space_prefix"]
    assert field.contents() is spaced


Usage = namedtuple("Usage", "total used free")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    model = str(save_pico(tmp_path / "model"))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1))
    other.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "there.gguf").touch()
    large = pico()
    large.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    large.save_pretrained(tmp_path / "large")
    byte_tokenizer().save_pretrained(tmp_path / "large")
    for changes, said in (
        ({"model": str(tmp_path / "gpt2")}, "architecture 'gpt2'"),
        ({"out": str(tmp_path / "there.gguf")}, "exists"),
        ({"out": str(tmp_path / "model.bin")}, "ends in .gguf"),
        ({"adapter": "x"}, "alter distill"),
        ({"form": "loras"}, "`adapter`"),
        ({"quantization": "4bit"}, "`quantization` 4bit .* leave it out"),
        ({"model": str(tmp_path / "large"), "type": "f16"}, "bf16 or f32"),
    ):
        with pytest.raises(UserError, match=said):
            write(tmp_path, **{"model": model} | changes)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(9, 9, 1000))
    with pytest.raises(UserError, match="GB free"):
        write(tmp_path, model=model)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "gpt2", "large", "there.gguf"}


def test_an_unknown_rotary_embedding_and_a_window_are_refused():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="'yarn'"):
        writing.architecture(LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope))
    config = LlamaConfig(hidden_size=64, num_attention_heads=2)
    config.sliding_window = 16
    with pytest.raises(UserError, match="no sliding window"):
        writing.architecture(config)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (Gemma2Config, {}, None),
        (Gemma2Config, {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar of 16 .* has 256"),
        (Gemma2Config, {"num_hidden_layers": 46}, "query_pre_attn_scalar of 32"),
        (Gemma2Config, {"num_hidden_layers": 46, "query_pre_attn_scalar": 32}, None),
        (Gemma2Config, {"attn_logit_softcapping": None}, "caps .* attn_logit_softcapping is None"),
        (Gemma3TextConfig, {}, None),
        (Gemma3TextConfig, {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar of 16"),
        (Gemma3TextConfig, {"final_logit_softcapping": 30.0}, "does not cap .* final_logit_softcapping is 30.0"),
    ],
)
def test_an_attention_that_llama_cpp_would_scale_otherwise_is_refused(kind, changes, said):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    config = kind(**sizes | changes)
    if said is None:
        writing.architecture(config)
    else:
        with pytest.raises(UserError, match=said):
            writing.architecture(config)


def test_of_several_chat_templates_the_default_is_written():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"tool_use": "tools", "default": "{{ messages }}"}
    assert vocabulary(tokenizer, VOCAB).template == "{{ messages }}"


@pytest.mark.slow
@pytest.mark.skipif(
    MODULES is None or shutil.which("node") is None, reason="ALTER_NODE_MODULES names no node-llama-cpp"
)
@pytest.mark.parametrize(("form", "apart"), [("f16", 0.001), ("q8_0", 0.02)])
def test_a_real_llama_cpp_says_what_the_checkpoint_says(tmp_path, form, apart):
    model, tokenizer = load_model(TOFU, device="cpu")
    made = write(tmp_path, model=TOFU, type=form)
    rows = [encode(tokenizer, row) for row in load_examples("builtin:retain90[:4]")]
    texts = ["Hello, it's 1984 and 12345 don't.\n\n  Why?", "Über naïve façade 東京 🙂 x=y**2;\t\tend"]
    asked = [{"ids": row.input_ids, "prompt": row.input_ids[: row.prompt_length], "tokens": 12} for row in rows] + [
        {"text": text} for text in texts
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("llama_cpp.mjs")
    command = ["node", str(script), str(MODULES), str(made), str(tmp_path / "asked.json")]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for row, answer in zip(rows, said, strict=False):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            own = torch.log_softmax(model(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
        assert float((own - torch.tensor(answer["logprobs"])).abs().mean()) < apart
        prompt = torch.tensor([row.input_ids[: row.prompt_length]])
        reply = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        assert answer["said"] == reply[0, prompt.shape[1] :].tolist()
    for text, found in zip(texts, said[len(rows) :], strict=True):
        assert found["ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- LoRAs


@pytest.fixture
def adapter(tmp_path):
    """An ALTER adapter of random weights on a pico model, and the model with it."""
    save_pico(tmp_path / "model")
    base = pico()
    base.name_or_path = str(tmp_path / "model")
    config = AlterConfig(
        r=4, alter_alpha=8, num_forget_experts=2, router="static", task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2},
    )  # fmt: skip
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "alter_B" in name:
            weight.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return model


BLOCKED = """
import sys, torch
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "alter":
            raise ImportError("alter is not installed")
sys.meta_path.insert(0, Blocked())
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2])
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(40)[None]).logits, sys.argv[3])
"""


def test_an_expert_loads_as_a_lora_without_alter(tmp_path, adapter):
    out = write(tmp_path, "loras", model=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), form="loras")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "expert-1", "expert-2"]
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "model"), str(out / "expert-2"), str(tmp_path / "logits")]
    # without what conftest.py lets other processes import
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    # open are the retention expert and the second: the first is emptied
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "alter_B" in name:
                r = weight.shape[1] // 3
                weight[:, r : 2 * r] = 0
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"from_layer": 1},
        {"retention_expert": False},
        {"r": 1, "num_forget_experts": 3},
        {"r": 20, "alpha_pattern": {}},
    ],
)
def test_a_lora_says_what_the_routed_model_says_of_its_expert(tmp_path, changes):
    save_pico(tmp_path / "model")
    base = pico()
    base.name_or_path = str(tmp_path / "model")
    given = {"r": 3, "alter_alpha": 7, "num_forget_experts": 2, "target_modules": ["q_proj", "down_proj"]}
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}, "init_weights": False}
    routed = get_peft_model(base, AlterConfig(**given | patterns | {"task_type": "CAUSAL_LM"} | changes)).double()
    routed.save_pretrained(tmp_path / "adapter")
    made = {"model": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter"), "form": "loras"}
    out = write(tmp_path, "loras", **made)
    experts = routed.active_peft_config.num_forget_experts
    gates = torch.zeros(1, 40, experts + 1, dtype=torch.float64)
    gates[..., 2] = 1
    gates[..., 0] = float(routed.active_peft_config.retention_expert)
    with torch.no_grad():
        expected = routed.eval()(input_ids=torch.arange(40)[None], alter_routing=Routing(gates)).logits
    # refuses an adapter of which a weight has no place, or a place no weight
    plain, _ = load_model(str(tmp_path / "model"), str(out / "expert-2"), device="cpu", dtype="float32")
    torch.testing.assert_close(logits(plain.double()), expected, rtol=1e-5, atol=1e-5)
    # vLLM reads these two numbers, and no patterns
    told = json.loads((out / "expert-2" / "adapter_config.json").read_text())
    scales = {module.scaling["default"] for module in plain.modules() if hasattr(module, "lora_A")}
    assert scales == {told["lora_alpha"] / told["r"]}
    # its default is 16
    assert ("`max_lora_rank` at 32" in (out / "README.md").read_text()) == (told["r"] == 20)


def test_an_experts_weights_are_their_naive_twin():
    B = torch.randn(3, 6)
    found = expert_weights(
        {"x.alter_A.weight": torch.ones(2, 3), "x.alter_B.weight": B, "x.alter_router.weight": B}, 2, 2
    )
    assert set(found) == {"x.lora_A.weight", "x.lora_B.weight"}
    for i in range(3):
        for j in range(2):
            assert found["x.lora_B.weight"][i, j] == B[i, j] + B[i, 4 + j]


def test_an_adapter_without_experts_is_refused(tmp_path, adapter):
    path = tmp_path / "adapter" / "adapter_config.json"
    for changes, said in (
        ({"peft_type": "LORA"}, "LORA"),
        ({"bound": "tanh"}, "tanh"),
        ({"router": "dense"}, "dense"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "ALTER"} | changes))
        with pytest.raises(UserError, match=said):
            write(tmp_path, "loras", model=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), form="loras")
    path.unlink()
    with pytest.raises(UserError, match=r"^Cannot read .*adapter_config.json: No such file"):
        write(tmp_path, "loras", model=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), form="loras")
    assert not (tmp_path / "loras").exists()
