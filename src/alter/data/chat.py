"""Chat templates: padding token, variables of the template, turns to text, and the token that ends a turn."""

from __future__ import annotations

import copy
import json
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from alter.core import UserError, nearest
from alter.data.rows import Example, said

SYSTEM_PROMPT = "You are a helpful assistant."
"""System turn put before the user turn where the chat template has a system role, as OpenUnlearning does."""


DATE_STRING = "10 Apr 2025"
"""Date handed to every chat template: some print today's date, and encodings must not change with the day."""


def ensure_pad_token(tokenizer: Any) -> None:
    """Give the tokenizer a padding token if it has none: its end-of-sequence token, as is usual.

    Raises:
        UserError: there is no end-of-sequence token either.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has neither a padding nor an end-of-sequence token; set eos_token in it.")
        tokenizer.pad_token = tokenizer.eos_token


TemplateArguments = Annotated[
    list[str],
    Field(
        description="Variables of the chat template, each NAME=VALUE with a value in JSON (enable_thinking=false); what is no "
        "JSON is a text.",
    ),
]
"""A setting that `set_template_arguments` takes."""


_GIVEN = "_alter_template_arguments"


THINKING = ("enable_thinking", "thinking")
"""Variables by which chat templates are asked for thoughts: Qwen3's and SmolLM3's, DeepSeek's and Granite's."""


_OWN = ("messages", "add_generation_prompt", "tools", "documents")


def set_template_arguments(tokenizer: Any, given: Sequence[str]) -> None:
    """Set chat template variables on a tokenizer for every rendering, each as `NAME=VALUE` with a JSON value.

    Raises:
        UserError: it has no chat template, the template has no such variable, or one is decided by the rows.
    """
    found: dict[str, Any] = {}
    template = str(tokenizer.chat_template or "")
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"`chat_template_kwargs` has {each!r}; expected NAME=VALUE, as in enable_thinking=false.")
        if name in _OWN:
            raise UserError(f"`chat_template_kwargs` sets {name}, which the rows decide: leave it out.")
        if not template:
            raise UserError(f"`chat_template_kwargs` sets {name}, but this model's tokenizer has no chat template.")
        # jinja ignores variables that the template does not use
        words = set(re.findall(r"[A-Za-z_]\w*", template))
        if name not in words:
            raise UserError(f"The chat template of this model asks for no {name!r}.{nearest(name, words)}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    if found:
        setattr(tokenizer, _GIVEN, found)


def share_template_arguments(tokenizer: Any, other: Any) -> None:
    """Copy another tokenizer's chat template variables."""
    if hasattr(other, _GIVEN):
        setattr(tokenizer, _GIVEN, getattr(other, _GIVEN))


def with_template_arguments(tokenizer: Any, given: Mapping[str, Any]) -> Any:
    """Return a tokenizer whose chat template has further variables, as one request gives them; those it does not use are ignored.

    Raises:
        UserError: one is decided by the turns.
    """
    if not given:
        return tokenizer
    own = next((name for name in given if name in _OWN), None)
    if own is not None:
        raise UserError(f"`chat_template_kwargs` sets {own}, which the request's other fields decide: leave it out.")
    other = copy.copy(tokenizer)
    setattr(other, _GIVEN, {**getattr(tokenizer, _GIVEN, {}), **given})
    return other


def thinks(tokenizer: Any) -> bool:
    """Tell whether the chat template's variables ask for thoughts before an answer (`THINKING`)."""
    return any(_arguments(tokenizer).get(name) is True for name in THINKING)


def _arguments(tokenizer: Any) -> dict[str, Any]:
    """Return the chat template's variables besides the turns."""
    return {"date_string": DATE_STRING, **getattr(tokenizer, _GIVEN, {})}


def _template(tokenizer: Any) -> str:
    """Return the chat template and its arguments as a cache key."""
    return f"{tokenizer.chat_template} {json.dumps(_arguments(tokenizer), sort_keys=True)}"


def render_turns(tokenizer: Any, turns: Sequence[Mapping[str, Any]], *, generation: bool) -> str:
    """Render turns with the chat template."""
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tokenize=False,
                add_generation_prompt=generation,
                **_arguments(tokenizer),
            )
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"The tokenizer's chat template refuses turns of the roles {roles}: {error}.") from error


def rendered_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a rendered template, which holds its own begin and end tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


MARKER = "alter-answer"


_turn_ends: weakref.WeakKeyDictionary[Any, dict[str, int | None]] = weakref.WeakKeyDictionary()


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token that the chat template writes after an answer, or None if it writes none.

    A reply ends there, whatever the tokenizer's end-of-sequence token is.
    """
    if not tokenizer.chat_template:
        return None
    known = _turn_ends.setdefault(tokenizer, {})
    template = _template(tokenizer)
    if template not in known:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARKER}]
        try:
            tail = render_turns(tokenizer, turns, generation=False).rpartition(MARKER)[2].lstrip()
        except (UserError, ValueError):
            tail = ""
        ids = rendered_ids(tokenizer, tail)[:1] if tail else []
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        known[template] = ids[0] if ids and ids[0] in special else None
    return known[template]


def _has_system_role(tokenizer: Any) -> bool:
    """Tell whether the chat template accepts a system turn and prints it (Gemma's raises, some drop it)."""
    import jinja2

    marker = "alter-system-turn"
    turns = [{"role": "system", "content": marker}, {"role": "user", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **_arguments(tokenizer))
    except (jinja2.TemplateError, ValueError):
        return False
    return marker in text


_system_role: dict[str, bool] = {}


def written_turn(tokenizer: Any, turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn for the chat template; tool calls become text for a template that does not know them."""
    if "tool_calls" in turn and "tool_calls" not in str(tokenizer.chat_template):
        return {"role": turn["role"], "content": said(turn)}
    return dict(turn)


def turns_before(tokenizer: Any, example: Example, prompt: str | None, compat: bool) -> list[dict[str, Any]]:
    """Return the turns before the answer, with `SYSTEM_PROMPT` first where the template has the role."""
    if example.kind == "messages":
        turns = [written_turn(tokenizer, turn) for turn in example.messages]
        if prompt is not None:
            users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
            if not users:
                raise UserError(f"{example.name} has no user turn that another prompt could replace.")
            turns[users[-1]]["content"] = prompt
    else:
        turns = [{"role": "user", "content": str(example.prompt if prompt is None else prompt)}]
    if turns[0]["role"] == "system":
        return turns
    template = _template(tokenizer)
    if not compat and template not in _system_role:
        _system_role[template] = _has_system_role(tokenizer)
    if compat or _system_role[template]:
        turns.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    return turns
