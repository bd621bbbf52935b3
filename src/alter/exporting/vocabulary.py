"""A tokenizer in llama.cpp's terms: tokens with their kinds, merges, pre-tokenizer, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alter.core import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""Kinds of tokens in a GGUF file."""

SPACE = "\u2581"
"""A space in a piece."""

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
REST = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
PRE_TOKENIZERS = {
    f"{CONTRACTIONS}|\\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    f"{CONTRACTIONS}|\\p{{N}}|{REST}": "qwen2",
}
"""llama.cpp's name of a pre-tokenizer by the pattern that splits text before bytes become letters."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the terms of a GGUF file.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for pieces with scores (SentencePiece's way).
        split: llama.cpp's name of the pre-tokenizer.
        tokens, kinds: one for each row of the embeddings.
        merges: of byte-level BPE, "left right".
        scores: of pieces, the higher the sooner a piece is made.
        special: numbers of the tokens bos, eos, unk, pad that there are.
        begins: whether every text begins with bos.
        spaced: whether a text begins with a space that is put before it, as of Llama 2 and Mistral.
        template: the chat template, if there is one; of several that called default.
    """

    model: str
    split: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special: dict[str, int]
    begins: bool
    spaced: bool
    template: str | None


def _split_name(steps: Any) -> str | None:
    """Return llama.cpp's name of a byte-level tokenizer's text splitting; None for one that it does not know.

    Args:
        steps: `pre_tokenizer` of a tokenizer.json.
    """
    if not isinstance(steps, Mapping):
        return None
    parts = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    last = parts[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    before = parts[:-1]
    if not before:
        return "gpt-2" if last.get("use_regex", True) else None
    if len(before) > 1:
        return None
    first = before[0]
    if first["type"] == "Digits" and first.get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if first["type"] == "Split" and first.get("behavior") == "Isolated" and not last.get("use_regex", True):
        return PRE_TOKENIZERS.get(first["pattern"].get("Regex"))
    return None


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers with BPE: over bytes, or over pieces that fall back on bytes.
        rows: how many embeddings the model has; numbers without a token are filled up with unused ones.

    Raises:
        UserError: it is none of these, splits text in a way that llama.cpp does not know, or has more tokens than rows.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    if model.get("type") != "BPE":
        raise UserError(
            f"The tokenizer ({type(tokenizer).__name__}, {model.get('type', 'not a fast one')}) cannot be written as GGUF: "
            "only BPE can. Serve the folder of safetensors with vLLM or transformers instead."
        )
    pieces = bool(model.get("byte_fallback"))
    split = "default" if pieces else _split_name(content.get("pre_tokenizer"))
    if split is None or (not pieces and content.get("normalizer") not in (None, {"type": "NFC"})):
        raise UserError(
            "The tokenizer splits text in a way that llama.cpp has no name for, so llama.cpp would cut it into other tokens; it knows "
            "those of GPT-2, SmolLM, Llama 3 and Qwen2. Serve the folder of safetensors with vLLM or transformers."
        )
    numbers = {**model["vocab"], **{each["content"]: each["id"] for each in content["added_tokens"]}}
    if max(numbers.values()) >= rows:
        raise UserError(
            f"The tokenizer has token {max(numbers.values())}, but the model has {rows} embeddings: they do not belong together."
        )
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    for text, number in numbers.items():
        tokens[number] = text
        kinds[number] = BYTE if pieces and len(text) == 6 and text.startswith("<0x") and text[-1] == ">" else NORMAL
    for each in content["added_tokens"]:
        kinds[each["id"]] = CONTROL if each["special"] else USER_DEFINED
    pairs = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in model["merges"]]
    special = {
        name: number
        for name in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None and number < rows
    }
    begins = "bos" in special and tokenizer("a")["input_ids"][:1] == [special["bos"]]
    spaced = (
        backend is not None and pieces and backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    )
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        # of several by name, the one that transformers takes
        template = template.get("default")
    return Vocabulary(
        "llama" if pieces else "gpt2",
        split,
        tokens,
        kinds,
        None if pieces else [" ".join(pair) for pair in pairs],
        _scores(tokens, pairs) if pieces else None,
        special,
        begins,
        spaced,
        template,
    )


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """Return scores under which pieces are merged in the merges' order: minus the number of the first merge that makes it."""
    first: dict[str, int] = {}
    for number, pair in enumerate(pairs, start=1):
        first.setdefault("".join(pair), number)
    return [-float(first.get(token, 0)) for token in tokens]
