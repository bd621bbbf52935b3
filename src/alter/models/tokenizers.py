"""Tokenizers by name, without their models."""

from __future__ import annotations

from typing import Any

from alter.core import UserError


def read_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model's folder or hub id.

    Raises:
        UserError: its files are no tokenizer's, or reading them needs the extra `nli`.
        OSError, ValueError: there is none, as transformers has it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"The tokenizer of {name!r} cannot be read ({type(error).__name__}: {first_line(error)}): tokenizer.json is broken. "
            "Copy it again."
        ) from None
    except (ImportError, ValueError) as error:
        # without what reads SentencePiece files transformers takes them for tiktoken's
        taken = "tiktoken" in str(error) and not _reads_sentencepiece()
        if not taken and not isinstance(error, ImportError):
            raise
        why = "a file of SentencePiece" if taken else first_line(error)
        raise UserError(f"The tokenizer of {name} needs more: pip install 'alter-unlearning[nli]' ({why})") from None


def _reads_sentencepiece() -> bool:
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece  # noqa: F401
    except ImportError:
        return False
    return True


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
