"""Examples turned into token ids with labels: chat templates, plain prompts, and where the answer begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alter.core.errors import UserError
from alter.data.examples import Example

SYSTEM_PROMPT = "You are a helpful assistant."
"""System turn put before the user turn where the chat template has a system role (metrics 2.1)."""

DATE_STRING = "10 Apr 2025"
"""Date handed to every chat template: some print today's date, and encodings must not change with the day."""

IGNORE = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True)
class Encoded:
    """Token ids with labels of the same length: -100 on the first `prompt_length` tokens, the ids after them."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def ensure_pad_token(tokenizer: Any) -> None:
    """Give the tokenizer a padding token if it has none: its end-of-sequence token, as everybody does.

    Raises:
        UserError: there is no end-of-sequence token either.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has neither a padding nor an end-of-sequence token; set eos_token in it.")
        tokenizer.pad_token = tokenizer.eos_token


def _render(tokenizer: Any, turns: Sequence[Mapping[str, str]], *, generation: bool) -> list[int]:
    import jinja2

    try:
        rendered = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=True,
            add_generation_prompt=generation,
            date_string=DATE_STRING,
            return_dict=False,
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"The tokenizer's chat template refuses turns of the roles {roles}: {error}.") from error
    return list(rendered)


def _has_system_role(tokenizer: Any) -> bool:
    """Whether the chat template accepts a system turn and prints it (Gemma's raises, some drop it)."""
    import jinja2

    marker = "alter-system-turn"
    turns = [{"role": "system", "content": marker}, {"role": "user", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, date_string=DATE_STRING)
    except (jinja2.TemplateError, ValueError):
        return False
    return marker in text


_system_role: dict[str, bool] = {}


def _turns(tokenizer: Any, example: Example, prompt: str | None, compat: bool) -> list[dict[str, str]]:
    """Return the turns before the answer, with the system turn of metrics 2.1 where the template has the role."""
    if example.kind == "messages":
        turns = [dict(turn) for turn in example.messages]
        if prompt is not None:
            users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
            if not users:
                raise UserError(f"Row {example.index} has no user turn that another prompt could replace.")
            turns[users[-1]]["content"] = prompt
    else:
        turns = [{"role": "user", "content": str(example.prompt if prompt is None else prompt)}]
    if turns[0]["role"] == "system":
        return turns
    template = str(tokenizer.chat_template)
    if not compat and template not in _system_role:
        _system_role[template] = _has_system_role(tokenizer)
    if compat or _system_role[template]:
        turns.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    return turns


def _plain(example: Example, prompt: str | None, answer: str) -> tuple[str, str]:
    """Return (prompt text without the separating space, whole text) for a tokenizer without a chat template."""
    if example.kind == "messages":
        turns = [dict(turn) for turn in example.messages]
        if prompt is not None:
            next(turn for turn in reversed(turns) if turn["role"] == "user")["content"] = prompt
        words = {"user": "Question: {}\n", "assistant": "Answer: {}\n", "system": "{}\n"}
        unknown = [turn["role"] for turn in turns if turn["role"] not in words]
        if unknown:
            raise UserError(
                f"Row {example.index} has a turn of role {unknown[0]!r}; without a chat template only "
                f"{', '.join(words)} are known."
            )
        start = "".join(words[turn["role"]].format(turn["content"]) for turn in turns) + "Answer:"
        return start, f"{start} {answer}"
    question = str(example.prompt if prompt is None else prompt)
    if example.kind == "completion":
        gap = "" if question[-1:].isspace() or answer[:1].isspace() else " "
        return question, f"{question}{gap}{answer}"
    start = f"Question: {question}\nAnswer:"
    return start, f"{start} {answer}"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])


def encode(
    tokenizer: Any,
    example: Example,
    *,
    max_length: int | None = None,
    answer: str | None = None,
    prompt: str | None = None,
    compat: bool = False,
) -> Encoded:
    """Turn an example into token ids and labels (metrics 2.1).

    With a chat template: a system turn ("You are a helpful assistant.", where the template has the role), the
    user turn and the answer, with a fixed date. Without one: "Question: {q}\\nAnswer: {a}" (`completion` rows: prompt
    and completion as they are, a space between if neither has one). An end-of-sequence token ends every answer and is
    labelled. Raw text is labelled from its second token on and gets no end-of-sequence token.

    The boundary is where the separately tokenised prompt ends. If the tokenizer merges across it, the boundary moves
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
    labelled = example.answer if answer is None else answer
    if example.kind == "text":
        if prompt is not None:
            raise UserError("Raw text has no prompt that another could replace.")
        ids = _ids(tokenizer, labelled)
        length = 1
    else:
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UserError("The tokenizer has no end-of-sequence token; set eos_token in it.")
        if tokenizer.chat_template:
            turns = _turns(tokenizer, example, prompt, compat)
            start = _render(tokenizer, turns, generation=True)
            ids = _render(tokenizer, [*turns, {"role": "assistant", "content": labelled}], generation=False)
        else:
            head, whole = _plain(example, prompt, labelled)
            start = _ids(tokenizer, f"{head} " if compat and example.kind != "completion" else head)
            ids = _ids(tokenizer, whole)
            # some tokenizers close every text themselves; a prompt that is to be continued must stay open
            if start[-1:] == [eos] and len(start) > 1:
                start = start[:-1]
        length = len(start)
        if not compat:
            common = 0
            while common < min(len(start), len(ids)) and start[common] == ids[common]:
                common += 1
            if len(start) - common > MERGED_TOKENS:
                raise UserError(
                    f"The tokenizer's chat template writes the prompt of row {example.index} differently when an "
                    f"answer follows ({len(start) - common} of {len(start)} tokens differ): no boundary can be found."
                )
            length = common
            if eos in ids[length:]:
                last = len(ids) - 1 - ids[::-1].index(eos)
                if not tokenizer.decode(ids[last + 1 :]).strip():
                    ids = ids[: last + 1]
        if ids[-1] != eos:
            ids.append(eos)
    if max_length is not None:
        ids = ids[:max_length]
    if length >= len(ids):
        raise UserError(
            f"Row {example.index} leaves no labelled token (prompt of {length}, {len(ids)} in all, "
            f"max_length {max_length}); raise max_length or shorten the prompt."
        )
    return Encoded(ids, [IGNORE] * length + ids[length:], length)


MERGED_TOKENS = 8
"""A prompt may lose this many tokens at its end to merges with the answer before `encode` refuses the template."""


def encode_prompt(tokenizer: Any, example: Example, *, prompt: str | None = None, compat: bool = False) -> list[int]:
    """Return the tokens that generation starts from: `encode(...).input_ids[:prompt_length]`."""
    if compat and example.kind != "text" and not tokenizer.chat_template:
        head, _ = _plain(example, prompt, example.answer)
        return _ids(tokenizer, head if example.kind == "completion" else f"{head} ")
    encoded = encode(tokenizer, example, prompt=prompt, compat=compat)
    return encoded.input_ids[: encoded.prompt_length]
