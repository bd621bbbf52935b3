"""The sequences that `alter finetune` trains on (rows and packed text), and tokenizer training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alter.core import UserError, nearest
from alter.data import encode_all, load_examples
from alter.storage import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alter.training.finetune import Finetune

SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}


def read_corpus(source: str) -> str:
    """Return a text file's content.

    Raises:
        UserError: it is missing or empty.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        siblings = [str(sibling) for sibling in path.parent.glob("*.txt")] if path.parent.is_dir() else []
        raise UserError(f"No text file at {source!r}.{nearest(str(path), siblings)}")
    text = read_text(path, line_ends=False)
    if not text.strip():
        raise UserError(f"{source} is empty; expected text.")
    return text


def _tokenizer_texts(sources: Sequence[str]) -> Iterator[str]:
    """Yield the tokenizer's training texts: paragraphs of text files, and rows rendered as the model reads them."""
    for source in sources:
        if source.endswith(".txt"):
            yield from read_corpus(source).split("\n\n")
            continue
        for example in load_examples(source):
            yield example.answer if example.prompt is None else f"Question: {example.prompt}\nAnswer: {example.answer}"


def train_tokenizer(sources: Sequence[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with distinct begin, end and padding tokens; it prepends `bos` to every text.

    Args:
        sources: text files (`.txt`) and sources of rows as `load_examples` takes them.
        vocabulary: number of tokens wanted.
        max_length: longest sequence that the model takes.

    Raises:
        UserError: the texts are too short for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(sources), trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise UserError(
            f"The tokenizer's texts give only {tokenizer.get_vocab_size()} of {vocabulary} tokens; "
            "ask for a smaller vocabulary or give more text."
        )
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


def pack(ids: Sequence[int], length: int) -> list[list[int]]:
    """Cut one text's tokens into blocks of `length`; the last block overlaps the one before so that it is full as well."""
    if len(ids) <= length:
        return [list(ids)]
    starts = list(range(0, len(ids) - length + 1, length))
    if starts[-1] + length < len(ids):
        starts.append(len(ids) - length)
    return [list(ids[start : start + length]) for start in starts]


def training_rows(settings: Finetune, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return rows of `input_ids`, `labels` (the ids) and `weights` (of each label in the loss), one per sequence."""
    rows: list[dict[str, Any]] = []
    draw = random.Random(settings.seed)
    for source in settings.corpora:
        ids = list(tokenizer(read_corpus(source), verbose=False)["input_ids"])
        for block in pack(ids, settings.max_length):
            if draw.random() < settings.copy_blocks:
                half = len(block) // 2
                block = block[:half] * 2
            rows.append({"input_ids": block, "labels": block, "weights": [1.0] * len(block)})
    for source in settings.data:
        for encoded in encode_all(tokenizer, load_examples(source), max_length=settings.max_length, label=source)[0]:
            ids = encoded.input_ids
            weights = [settings.prompt_weight] * encoded.prompt_length + [1.0] * (len(ids) - encoded.prompt_length)
            rows.append({"input_ids": ids, "labels": ids, "weights": weights})
    return rows
