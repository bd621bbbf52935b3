"""Request bodies of both endpoints as OpenAI's API defines them, with bounds on every value.

Fields that would change the answer are refused unless they are null or say what is done anyway: ignoring them would answer
another question.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from alter.core import UserError
from alter.data import Example, encode_prompt, with_template_arguments
from alter.settings import mistake
from alter.storage import from_json

MOST_STOPS, LONGEST_STOP = 4, 256
"""Stop texts of a request, and characters of each."""
MOST_TOP = 20
"""Most likeliest tokens returned beside each token."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
}
"""Fields that are known but ignored, and the values for which that makes no difference."""
HINTS = ("prompt_cache_key", "safety_identifier", "user")
"""Fields that never change an answer."""


class Prompt(list[int]):
    """The tokens of a prompt, which knows itself as text too.

    Attributes:
        text: the prompt as it was given, or decoded where ids were.
    """

    def __init__(self, ids: Sequence[int], text: str) -> None:
        super().__init__(ids)
        self.text = text


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "user", "assistant", "developer", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def turn(self) -> dict[str, Any]:
        """Return the turn as a chat template takes it: calls of tools with their arguments as an object.

        Raises:
            UserError: there is something else than text in it, or nothing.
        """
        calls = self.tool_calls or (
            [{"type": "function", "function": self.function_call}] if self.function_call else []
        )
        told = {"tool_call_id": self.tool_call_id, "name": self.name if self.role in ("tool", "function") else None}
        return {
            "role": {"developer": "system", "function": "tool"}.get(self.role, self.role),
            "content": self.text(),
            **({"tool_calls": [_with_arguments(call) for call in calls]} if calls else {}),
            **{name: value for name, value in told.items() if value is not None},
        }

    def text(self) -> str:
        """Return the turn's text; of an assistant's turn that calls a tool it may be none.

        Raises:
            UserError: there is something else than text in it, or nothing.
        """
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            if self.role == "assistant":
                return ""
            raise UserError(f"A message of role {self.role!r} has no content; expected a text.")
        if any(part.get("type") != "text" for part in self.content):
            raise UserError("A message holds something else than text; this server answers text alone.")
        if not all(isinstance(part.get("text"), str) for part in self.content):
            raise UserError('A part of a message has no text; expected {"type": "text", "text": "..."}.')
        return "".join(part["text"] for part in self.content)


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call of a tool with its arguments read: OpenAI's API writes them as a text of JSON, templates write them so themselves."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError("A call of a tool has no function with a name; only functions are known.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments or "{}")
        except ValueError:
            raise UserError(
                f"The arguments of a call of {function['name']!r} are no JSON: {arguments[:80]!r}."
            ) from None
    return {**call, "function": {**function, "arguments": arguments or {}}}


class StreamOptions(BaseModel):
    """What a stream sends besides the pieces."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class Asked(BaseModel):
    """What both endpoints take; null means the default everywhere."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if not _neutral(name, value)}

    @property
    def limit(self) -> int | None:
        """Most new tokens that the client asks for; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def echoed(self) -> bool:
        """Whether the prompt is part of the answer."""
        return False

    @property
    def several(self) -> list[Any]:
        """The prompts as they were given."""
        return [None]

    @property
    def count(self) -> int:
        """Number of answers that are asked for."""
        return len(self.several) * self.n

    def stops(self) -> tuple[str, ...]:
        """Return the stop texts.

        Raises:
            UserError: there are too many, or one is too long.
        """
        given = [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text]
        if len(given) > MOST_STOPS:
            raise UserError(f"`stop` holds {len(given)} texts; at most {MOST_STOPS} are taken.")
        if any(len(text) > LONGEST_STOP for text in given):
            longest = max(map(len, given))
            raise UserError(f"`stop` holds a text of {longest} characters; at most {LONGEST_STOP} are taken.")
        return tuple(given)

    @abstractmethod
    def prompts(self, tokenizer: Any) -> list[Prompt]:
        """Return the prompts in tokens.

        Raises:
            UserError: one is empty, or no text.
        """

    @abstractmethod
    def top(self) -> int | None:
        """Return how many of the likeliest tokens to return beside each; None: no probabilities."""


def _neutral(name: str, value: Any) -> bool:
    return value is None or name in HINTS or value in NEUTRAL.get(name, ())


class ChatAsked(Asked):
    """What POST /v1/chat/completions is asked."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP)
    chat_template_kwargs: dict[str, Any] = {}

    def prompts(self, tokenizer: Any) -> list[Prompt]:
        """See `Asked.prompts`: the turns in the model's chat template, with the request's own variables as in vLLM."""
        turns = tuple(turn.turn() for turn in self.messages)
        if turns[-1]["role"] == "assistant":
            raise UserError("The last message is the assistant's: there is nothing to answer.")
        last = turns[-1]["content"]
        tokenizer = with_template_arguments(tokenizer, self.chat_template_kwargs)
        ids = encode_prompt(tokenizer, Example(prompt=last, answer="", kind="messages", messages=turns))
        return [Prompt(ids, last)]

    def top(self) -> int | None:
        """See `Asked.top`.

        Raises:
            UserError: top_logprobs without logprobs.
        """
        if self.top_logprobs and not self.logprobs:
            raise UserError("`top_logprobs` needs `logprobs`: give `logprobs` true as well.")
        return self.top_logprobs if self.logprobs else None


Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]


class TextAsked(Asked):
    """What POST /v1/completions is asked; a prompt is a text or the ids of its tokens, one or several of them."""

    prompt: str | Ids | list[str] | list[Ids]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | Literal[False] = False

    @property
    def echoed(self) -> bool:
        """See `Asked.echoed`."""
        return self.echo

    @property
    def several(self) -> list[Any]:
        """See `Asked.several`."""
        given = self.prompt
        return list(given) if isinstance(given, list) and not _is_ids(given) else [given]

    def prompts(self, tokenizer: Any) -> list[Prompt]:
        """See `Asked.prompts`: each as it is, whether or not the model has a chat template."""
        if self.max_tokens == 0 and not self.echo:
            raise UserError("`max_tokens` is 0: without `echo` there would be no answer.")
        several = self.several
        if not several or not all(several):
            raise UserError("A prompt is empty: there is nothing to continue.")
        return [
            Prompt(text_ids(tokenizer, one), one)
            if isinstance(one, str)
            else Prompt(one, tokenizer.decode(one, skip_special_tokens=True))
            for one in several
        ]

    def top(self) -> int | None:
        """See `Asked.top`."""
        # a bool is an int for Python
        return None if self.logprobs is False else int(self.logprobs)


def _is_ids(given: list[Any]) -> bool:
    return bool(given) and isinstance(given[0], int)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a text to be continued: one begin token, if the tokenizer uses one, and no end token."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
    # some tokenizers close every text themselves
    return ids[:-1] if len(ids) > 1 and ids[-1] == end and not text.endswith(tokenizer.eos_token) else ids


def explain(error: pydantic.ValidationError) -> tuple[str, str | None]:
    """Explain in one line what is wrong with a body, and name the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        neutral = NEUTRAL.get(where)
        known = f"only {' or '.join(map(repr, neutral))} is" if neutral else "no such field is"
        return f"`{where}`: {known} supported here; leave it out.", field
    return f"{f'`{where}`' if where else 'the body'}: {mistake(first)}", field


def error_body(message: str, kind: str = "invalid_request_error", **more: str | None) -> Mapping[str, Any]:
    """Return an error in OpenAI's form; `more` may name the `param` and give a `code`."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None, **more}}
