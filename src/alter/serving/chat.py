"""`alter chat`: a model and its adapter in the terminal."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from typing import Any

from alter.core import UserError, nearest, worded
from alter.data import Example, encode_prompt
from alter.serving.engine import Engine
from alter.serving.jobs import Job
from alter.serving.settings import Chat
from alter.serving.text import visible

CHAT_COMMANDS = {
    "/base": "QUESTION  ask the model without the adapter; the conversation goes on as if nothing was asked",
    "/new": "start over",
    "/help": "this list",
    "/quit": "end (so does the end of the input; Ctrl-C stops an answer)",
}


class Conversation:
    """The turns so far, and the engine that answers.

    Args:
        settings: of the command.
        model, tokenizer: of the model that answers.
    """

    def __init__(self, settings: Chat, model: Any, tokenizer: Any) -> None:
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.engine = Engine(model, tokenizer, max_batch=1)
        self.turns: list[dict[str, str]] = []
        self.restart()

    def restart(self) -> None:
        """Clear the conversation."""
        system = self.settings.system
        self.turns = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str, base: bool = False) -> None:
        """Print the answer as it is generated; with `base`, the answer of the model without its adapter, outside the turns.

        Raises:
            UserError: the conversation is longer than the model's context, or the model failed.
        """
        if base and self.settings.merged:
            raise UserError("The adapter is merged into the weights: start without `merged` to ask the base.")
        asked = [*self.turns, {"role": "user", "content": question}]
        ids = encode_prompt(
            self.tokenizer, Example(prompt=question, answer="", kind="messages", messages=tuple(asked))
        )
        context, most = self.engine.context, self.settings.max_tokens
        if context is not None and len(ids) + most > context:
            raise UserError(
                f"The conversation has {len(ids)} tokens; with an answer of {most} it is longer than the model's context of "
                f"{context}: /new starts over."
            )
        job, ended = self._job(ids)
        # an adapter without a switch is none: the model is its own base
        off = self.model.disable_adapter() if base and self.settings.adapter is not None else nullcontext()
        with off:
            self.engine.submit(job)
            try:
                ended.wait()
            except KeyboardInterrupt:
                job.cancelled = True
                ended.wait()
        if job.error is not None:
            raise UserError(job.error)
        if not base:
            self.turns = [*asked, {"role": "assistant", "content": job.text}]

    def _job(self, ids: list[int]) -> tuple[Job, threading.Event]:
        ended = threading.Event()

        def show(piece: str | None) -> None:
            print(visible(piece) if piece is not None else "\n", end="", flush=True)
            if piece is None:
                ended.set()

        given = self.settings
        job = Job(ids, given.max_tokens, given.temperature, given.top_p, (), given.seed, show, strip=True)
        return job, ended


def chat(settings: Chat) -> list[dict[str, str]]:
    """Run `alter chat`: read questions from standard input until it ends or says /quit; return the turns.

    Raises:
        UserError: what `load_model` raises.
    """
    talk = Conversation(settings, *settings.load())
    asking = sys.stdin.isatty()
    if asking:
        _say("Ask; /help lists what else can be typed.")
    while True:
        try:
            line = input("> " if asking else "").strip()
        except EOFError:
            break
        # what is no text, as half a character from another terminal, becomes a question mark
        line = line.encode("utf-8", "replace").decode("utf-8")
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        try:
            _obey(talk, line, command, rest.strip())
        except UserError as error:
            _say(visible(worded(error)))
    talk.engine.close()
    return talk.turns


def _obey(talk: Conversation, line: str, command: str, rest: str) -> None:
    """Run a slash command other than /quit."""
    if command == "/new":
        talk.restart()
    elif command == "/help":
        _say("\n".join(f"{name:6} {told}" for name, told in CHAT_COMMANDS.items()))
    elif command == "/base":
        if not rest:
            raise UserError("/base needs a question after it, as in /base Who wrote it?")
        talk.ask(rest, base=True)
    elif command.startswith("/"):
        raise UserError(f"No command {command}.{nearest(command, CHAT_COMMANDS)} /help lists them.")
    elif line:
        talk.ask(line)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
