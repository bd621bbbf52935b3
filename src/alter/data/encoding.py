"""Encode examples as token ids with labels: chat templates, plain prompts, and where the answer begins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alter.core import UserError, warn
from alter.data.chat import MARKER, end_of_turn, render_turns, rendered_ids, thinks, turns_before, written_turn
from alter.data.rows import Example, said

IGNORE = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True)
class Encoded:
    """Token ids with labels of the same length: -100 on the first `prompt_length` tokens, the ids after them."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


def _head(tokenizer: Any, turns: Sequence[Mapping[str, Any]], start: str, whole: str, answer: str) -> str:
    """Return where the answer begins in `whole`: `start`, and what the template inserts between it and the answer.

    Templates of models that think write an empty block of thoughts there, which is no part of the answer.
    """
    if not answer.strip() or whole.removeprefix(start).lstrip().startswith(answer.strip()):
        return start
    marked = render_turns(tokenizer, [*turns, {"role": "assistant", "content": MARKER}], generation=False)
    head, found, _ = marked.rpartition(MARKER)
    put_in = head[_common(head, start) :]
    return head if found and put_in.strip() and whole.startswith(head) else start


def _plain(example: Example, prompt: str | None, answer: str) -> tuple[str, str]:
    """Return (prompt text without the separating space, whole text) for a tokenizer without a chat template."""
    if example.kind == "messages":
        turns = [dict(turn) for turn in example.messages]
        if prompt is not None:
            users = [turn for turn in turns if turn["role"] == "user"]
            if not users:
                raise UserError(f"{example.name} has no user turn that another prompt could replace.")
            users[-1]["content"] = prompt
        words = {"user": "Question: {}\n", "assistant": "Answer: {}\n", "system": "{}\n"}
        unknown = [turn["role"] for turn in turns if turn["role"] not in words]
        if unknown:
            raise UserError(
                f"{example.name} has a turn of role {unknown[0]!r}; without a chat template only "
                f"{', '.join(words)} are known."
            )
        start = "".join(words[turn["role"]].format(said(turn)) for turn in turns) + "Answer:"
        return start, f"{start} {answer}"
    question = str(example.prompt if prompt is None else prompt)
    if example.kind == "completion":
        gap = "" if question[-1:].isspace() or answer[:1].isspace() else " "
        return question, f"{question}{gap}{answer}"
    start = f"Question: {question}\nAnswer:"
    return start, f"{start} {answer}"


def own_answer(tokenizer: Any, example: Example | None, reply: str) -> str:
    """Return a reply up to where a model without a chat template asks itself the next question.

    A model that was only pretrained goes on with the form that it is asked in, "Question: ... Answer: ...". What a chat
    template asks, and what a `completion` or a text goes on with, is the reply as it is.

    Args:
        tokenizer: a Hugging Face tokenizer.
        example: what was asked; None: a question.
        reply: what was said.
    """
    if tokenizer.chat_template or (example is not None and example.kind not in ("qa", "messages")):
        return reply
    return re.split(r"(?:^|\n)\s*(?:Question|Answer):", reply, maxsplit=1)[0].strip()


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text with special tokens; a beginning-of-sequence token that the text has already is not doubled."""
    ids = list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids


def encode(
    tokenizer: Any,
    example: Example,
    *,
    max_length: int | None = None,
    answer: str | None = None,
    prompt: str | None = None,
    compat: bool = False,
) -> Encoded:
    """Turn an example into token ids and labels.

    With a chat template: a system turn ("You are a helpful assistant.", where the template has the role), the
    user turn and the answer, with a fixed date. Without one: "Question: {q}\\nAnswer: {a}". `completion` rows are
    prompt and completion as they are, whatever the template, a space between if neither has one. The template's own end
    of a turn, or else an end-of-sequence token, ends every answer and is labelled. Raw text is labelled from its second
    token on and gets no end-of-sequence token.

    The boundary is where the separately tokenised prompt ends, with all that the template itself puts before an answer (an
    empty block of thoughts). If the tokenizer merges across it, the boundary moves
    back to the last token that both have in common, so that generation starts from exactly the tokens scored.

    `compat=True` reproduces OpenUnlearning instead: the system turn always, the prompt without a template ends in a
    space and its token count is the boundary even across a merge, and an end-of-sequence token is added although only
    white space follows the template's own (strict drops that white space instead).

    Args:
        tokenizer: a Hugging Face tokenizer.
        example: what to encode.
        max_length: longest sequence; what is beyond is cut off the end, the end-of-sequence token included.
        answer: takes the place of `example.answer` (paraphrased and perturbed answers).
        prompt: takes the place of the user turn (paraphrased questions).
        compat: see above.

    Raises:
        UserError: nothing is left to label, or the tokenizer has no end-of-sequence token.
    """
    ids, length = _tokens(tokenizer, example, answer, prompt, compat)
    if max_length is not None:
        ids = ids[:max_length]
    if example.kind == "text" and len(ids) == length:
        raise UserError(
            f"{example.name} is one token long, which nothing precedes: give a longer text, or leave it out."
        )
    if length >= len(ids):
        raise UserError(
            f"{example.name} leaves no labelled token (prompt of {length}, {len(ids)} in all, "
            f"`max_length` {max_length}); raise `max_length` or shorten the prompt."
        )
    return Encoded(ids, [IGNORE] * length + ids[length:], length)


def _tokens(
    tokenizer: Any, example: Example, answer: str | None, prompt: str | None, compat: bool
) -> tuple[list[int], int]:
    """Return all tokens of an example, and how many of them precede the answer; see `encode`."""
    labelled = example.answer if answer is None else answer
    if example.kind == "text":
        if prompt is not None:
            raise UserError("Raw text has no prompt that another could replace.")
        return _ids(tokenizer, labelled), 1
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("The tokenizer has no end-of-sequence token; set eos_token in it.")
    chat = bool(tokenizer.chat_template) and example.kind != "completion"
    head = ""
    if chat:
        start, ids, head = _as_chat(tokenizer, example, answer, prompt, compat)
    else:
        start, ids = _as_plain(tokenizer, example, labelled, prompt, compat)
    ends = {eos} if compat or not chat else {eos, end_of_turn(tokenizer)} - {None}
    length = len(start)
    if not compat:
        length = _answer_begins(tokenizer, example.name, start, ids, head)
        closing = [place for place in range(length, len(ids)) if ids[place] in ends]
        if closing and not tokenizer.decode(ids[closing[-1] + 1 :]).strip():
            ids = ids[: closing[-1] + 1]
    return (ids if ids[-1] in ends else [*ids, eos]), length


def _as_chat(
    tokenizer: Any, example: Example, answer: str | None, prompt: str | None, compat: bool
) -> tuple[list[int], list[int], str]:
    """Tokenise a row by the chat template: return the prompt's tokens, all tokens, and the text before the answer.

    That text is "" where it is the turns before the answer and no more.
    """
    turns = turns_before(tokenizer, example, prompt, compat)
    reply: dict[str, Any] = {"role": "assistant", "content": example.answer if answer is None else answer}
    if example.reply is not None and answer is None:
        reply = written_turn(tokenizer, example.reply)
    opening = render_turns(tokenizer, turns, generation=True)
    whole = render_turns(tokenizer, [*turns, reply], generation=False)
    head = opening if compat else _head(tokenizer, turns, opening, whole, str(reply["content"]))
    return rendered_ids(tokenizer, opening), rendered_ids(tokenizer, whole), "" if head == opening else head


def _as_plain(
    tokenizer: Any, example: Example, answer: str, prompt: str | None, compat: bool
) -> tuple[list[int], list[int]]:
    """Tokenise a row without a chat template: return the prompt's tokens and all tokens."""
    opening, whole = _plain(example, prompt, answer)
    start = _ids(tokenizer, f"{opening} " if compat and example.kind != "completion" else opening)
    # some tokenizers append an end-of-sequence token to every text; a prompt must stay open
    if start[-1:] == [tokenizer.eos_token_id] and len(start) > 1:
        start = start[:-1]
    return start, _ids(tokenizer, whole)


def _answer_begins(tokenizer: Any, name: str, start: Sequence[int], ids: Sequence[int], head: str) -> int:
    """Return the place of the answer's first token among `ids`, which begin as `start` does, or as `head` if there is one.

    Raises:
        UserError: the template writes the prompt differently where an answer follows.
    """
    length = _common(start, ids)
    if len(start) - length > MERGED_TOKENS:
        raise UserError(
            f"The tokenizer's chat template writes the prompt of {name} differently when an "
            f"answer follows ({len(start) - length} of {len(start)} tokens differ): no boundary can be found."
        )
    return _common(rendered_ids(tokenizer, head), ids) if head else length


def _common(start: Sequence[Any], ids: Sequence[Any]) -> int:
    """Count the leading items (tokens, characters) that both share."""
    for place, (one, other) in enumerate(zip(start, ids, strict=False)):
        if one != other:
            return place
    return min(len(start), len(ids))


MERGED_TOKENS = 8
"""A prompt may lose this many tokens at its end to merges with the answer before `encode` refuses the template."""


def encode_prompt(tokenizer: Any, example: Example, *, prompt: str | None = None, compat: bool = False) -> list[int]:
    """Return the tokens that generation starts from: `encode(...).input_ids[:prompt_length]`.

    A question without an answer is asked as one with an answer, with the empty block of thoughts that a template writes before it. Where
    thoughts are asked for (`alter.data.chat.THINKING`) it ends as the template begins a reply.
    """
    asked = not example.answer and example.reply is None and example.kind in ("qa", "messages")
    if asked and tokenizer.chat_template:
        if compat or thinks(tokenizer):
            turns = turns_before(tokenizer, example, prompt, compat)
            return rendered_ids(tokenizer, render_turns(tokenizer, turns, generation=True))
        # some templates refuse an empty answer as a turn, or leave it out
        example = replace(example, answer=MARKER)
    if compat and example.kind != "text" and (not tokenizer.chat_template or example.kind == "completion"):
        head, _ = _plain(example, prompt, example.answer)
        return _ids(tokenizer, head if example.kind == "completion" else f"{head} ")
    encoded = encode(tokenizer, example, prompt=prompt, compat=compat)
    return encoded.input_ids[: encoded.prompt_length]


OVERLAP = 4
"""The first 1/4 of each further window of a long row repeats the end of the window before, as context."""


def windows(row: Encoded, length: int, bos: int | None = None) -> list[Encoded]:
    """Cut a row into windows of at most `length` tokens, so that each labelled token is labelled in exactly one of them.

    Each further window starts with `bos` (if the row does) and the last tokens of the window before, a quarter of its length,
    as unlabelled context.

    Raises:
        UserError: the prompt alone fills a window.
    """
    if len(row.input_ids) <= length:
        return [row]
    if row.prompt_length >= length:
        raise UserError(
            f"A prompt of {row.prompt_length} tokens leaves no room for an answer in {length}: shorten it, or raise `max_length` "
            "where that is set to less than the model's context."
        )
    first = [bos] if bos is not None and row.input_ids[0] == bos else []
    found = [Encoded(row.input_ids[:length], row.labels[:length], row.prompt_length)]
    end = length
    while end < len(row.input_ids):
        start = end - length // OVERLAP
        stop = start + length - len(first)
        shown = len(first) + end - start
        ids, labels = first + row.input_ids[start:stop], [IGNORE] * shown + row.labels[end:stop]
        found.append(Encoded(ids, labels, shown))
        end = min(stop, len(row.input_ids))
    return found


def encode_all(
    tokenizer: Any, examples: Sequence[Example], *, max_length: int | None, label: str | None = None
) -> tuple[list[Encoded], list[int]]:
    """Encode examples whole: one of more than `max_length` tokens becomes several overlapping `windows`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        examples: what to encode.
        max_length: longest sequence; None encodes each in one piece.
        label: what the rows are; with it, long ones are said on stderr.

    Returns:
        the rows, and for each the number of its example in `examples`.

    Raises:
        UserError: as `encode`, or a prompt that alone has `max_length` tokens.
    """
    rows: list[Encoded] = []
    owner: list[int] = []
    long = 0
    for number, example in enumerate(examples):
        whole = encode(tokenizer, example)
        try:
            parts = [whole] if max_length is None else windows(whole, max_length, tokenizer.bos_token_id)
        except UserError as error:
            raise UserError(f"{example.name}: {error}") from None
        long += len(parts) > 1
        rows += parts
        owner += [number] * len(parts)
    if long and label is not None:
        warn(
            f"{long} of {len(examples)} {label} rows are longer than {max_length} tokens: they are read in overlapping "
            f"windows, {len(rows)} rows in all, and nothing is left out."
        )
    return rows, owner
