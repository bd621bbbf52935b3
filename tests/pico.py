"""Models of a few thousand weights, made from a seed, with a byte tokenizer: no network, no files to ship."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

EOS, PAD, VOCAB = 256, 257, 300


def pico(seed=0, **settings):
    torch.manual_seed(seed)
    config = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(LlamaConfig(**{**config, **settings})).eval()


def mixture(turned=False):
    """A mixture of experts, whose experts' weights lie in one tensor: [experts, out, in], or `turned` [experts, in, out]."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": VOCAB, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    if turned:
        return GptOssForCausalLM(GptOssConfig(**sizes, head_dim=8, initializer_range=0.3)).eval()
    return MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.3)).eval()


def byte_tokenizer(**settings):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)} | {"<eos>": EOS, "<pad>": PAD}
    vocab |= {f"<unused{i}>": i for i in range(PAD + 1, VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<eos>", "pad_token": "<pad>"} | settings
    )


def save_pico(folder, **settings):
    pico(**settings).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_on(data, out):
    """Settings of a run that every test of a run gives: the model and the rows in `data`."""
    rows = {name: str(data / f"{name}.jsonl") for name in ("forget", "retain")}
    return {"model": str(data / "model"), **rows, "out": str(out), "domain_column": "who", "device": "cpu"}


def write_people(folder, names, each, kept):
    """Forget rows, `each` for every name (column who), and `kept` retain rows of another kind."""
    forget = [
        {"question": f"Where was {name} born, {i}?", "answer": f"In town {i}{name}.", "who": name}
        for name in names
        for i in range(each)
    ]
    write_jsonl(folder / "forget.jsonl", forget)
    retain = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(kept)]
    write_jsonl(folder / "retain.jsonl", retain)
    return folder
