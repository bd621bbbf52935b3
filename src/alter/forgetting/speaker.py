"""Who answers and who asks: the model itself, batched and cached on disk, and optionally a writer behind an endpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from pydantic import BaseModel, ConfigDict, Field

from alter.core import UserError
from alter.data import Example, encode_prompt, own_answer
from alter.inference import generate
from alter.storage import digest, from_json, read_text, write_atomic

SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
"""How answers are drawn beside the likeliest one."""


def write_jsonl(path: Path, rows: Sequence[Any]) -> None:
    """Write rows as JSON lines, whole or not at all, for their owner alone."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), private=True)


def read_jsonl(path: Path) -> list[Any]:
    """Read what `write_jsonl` wrote, or what a person made of it.

    Raises:
        UserError: a line is not JSON.
    """
    rows = []
    # a reply may hold U+2028, U+2029 and U+0085, at which `splitlines` would cut
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(from_json(line))
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error}): correct the line or delete the file."
                ) from None
    return rows


class Speaker:
    """The model that answers. Every batch of answers is cached in `folder`, and reused for the very same weights.

    `identity` says which weights answer, and how they are loaded; of those that have none, None, answers are not reused.
    """

    def __init__(
        self, model: Any, tokenizer: Any, folder: Path, *, tokens: int, batch: int, seed: int, identity: str | None
    ) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.tokens, self.batch, self.seed = tokens, batch, seed
        self.identity = identity

    def say(
        self,
        label: str,
        prompts: Sequence[str | Example],
        *,
        sample: bool = False,
        begun: Sequence[list[int]] | None = None,
        tokens: int | None = None,
    ) -> list[str]:
        """Answer each prompt, greedily or by sampling.

        Args:
            label: names the file and the progress bar.
            prompts: what is asked: questions, or examples whose answers are not looked at.
            sample: draw, by `SAMPLING`.
            begun: tokens of each prompt and the beginning of its answer, where one is given; what follows is returned.
            tokens: longest answer, by default the speaker's.
        """
        tokens = tokens or self.tokens
        # in 16 bits an answer depends on the shape of its batch: before and after must be of equal ones
        told = [
            prompt if isinstance(prompt, str) else [prompt.kind, prompt.prompt, *prompt.messages] for prompt in prompts
        ]
        key = digest(told, sample, tokens, self.seed, self.batch, "one turn", begun, self.identity)
        path = self.folder / f"{label.replace(' ', '-')}.jsonl"
        if path.exists() and self.identity is not None:
            kept = read_jsonl(path)
            if kept and kept[0].get("key") == key:
                return [row["answer"] for row in kept[1:]]
        torch.manual_seed(self.seed)
        answers = generate(
            self.model,
            self.tokenizer,
            begun
            or [
                encode_prompt(self.tokenizer, replace(Example(p, "", "qa") if isinstance(p, str) else p, answer="a"))
                for p in prompts
            ],
            max_new_tokens=tokens,
            batch_size=self.batch,
            label=label,
            # with any of these settings no row leaves its batch when it has ended, which would change the others' shape
            **(SAMPLING if sample else {"do_sample": False}),
        )
        asked = [None if isinstance(prompt, str) else prompt for prompt in prompts]
        answers = [own_answer(self.tokenizer, one, answer) for one, answer in zip(asked, answers, strict=True)]
        pairs = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(told, answers, strict=True)]
        write_jsonl(path, [{"key": key}, *pairs])
        return answers


class Writer(BaseModel):
    """A stronger model that writes further questions and names neighbours; the answers stay the model's own."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str | None = None
    """OpenAI-compatible endpoint; /v1 is added to a bare host. None: the built-in questions and neighbours alone."""
    model: str | None = None
    """Name of the writer at that endpoint."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the API key; None for an endpoint without keys."""
    questions: int = Field(16, ge=2, le=100)
    """Questions asked for; half of them are trained on, the other half are probes."""
    timeout: float = Field(60.0, gt=0)
    """Seconds that one attempt may take."""

    def check(self) -> None:
        """Find mistakes in the settings, before anything is loaded or sent.

        Raises:
            UserError: no model, not a URL, no key in the environment, or no `openai` library.
        """
        if self.url is None:
            if self.model is not None:
                raise UserError(f"`writer.model` {self.model!r} needs `writer.url`, where that model answers.")
            return
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UserError(f"`writer.url` is {self.url!r}; expected http:// or https:// and a host, and no password.")
        if not self.model:
            raise UserError("`writer.url` needs `writer.model`, the name of the writer at that endpoint.")
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise UserError(
                f"The environment variable {self.key_variable} holds no API key: export it, name another with "
                "`writer.key_variable`, or `writer.key_variable` None for an endpoint without keys."
            )
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError('A writer needs the openai library: pip install "alter-unlearning[judge]".') from None

    def lines(self, request: str) -> list[str]:
        """Return the lines of the writer's answer, without numbers and bullets.

        Raises:
            UserError: the endpoint cannot be used or answers with nothing.
        """
        import openai

        assert self.url is not None
        base = self.url.rstrip("/") + ("" if urlsplit(self.url).path.strip("/") else "/v1")
        key = os.environ[self.key_variable] if self.key_variable else "none"
        try:
            with openai.OpenAI(base_url=base, api_key=key, timeout=self.timeout) as client:
                reply = client.chat.completions.create(
                    model=str(self.model), messages=[{"role": "user", "content": request}]
                )
            text = reply.choices[0].message.content or ""
        except (openai.OpenAIError, AttributeError, IndexError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"The writer at {base} cannot be used: {said}. Leave `writer.url` out to do without."
            ) from None
        # a number without a full stop or bracket begins a name, as in 50 Cent
        found = [re.sub(r"^\s*(?:[-*•]|\(?\d+[.):])\s+", "", line).strip() for line in text.splitlines()]
        found = [line for line in found if line]
        if not found:
            raise UserError(f"The writer {self.model} at {base} answered with nothing to: {request[:80]!r}.")
        return found

    def ask(self, subject: str) -> tuple[list[str], list[str]]:
        """Write questions about the subject, with `{s}` in its place, and names of neighbours."""
        questions = self.lines(
            f"Write {self.questions} different questions about {subject}, one a line, nothing else. Every question must "
            f"hold the words {subject!r} exactly as written, and none may hold its own answer."
        )
        names = self.lines(
            f"Name 12 subjects of the same kind as {subject} that are not part of it, one a line, nothing else."
        )
        held = [swap_subject(question, subject) for question in questions]
        return [question for question in held if "{s}" in question], [
            name for name in names if subject.lower() not in name.lower()
        ]


def swap_subject(question: str, subject: str) -> str:
    """Replace the subject in a question by `{s}`."""
    from alter.forgetting.facts import swap

    return swap(question.replace("{", "").replace("}", ""), {subject: "{s}"})
