"""Settings of `alter serve`, `alter chat` and `alter inspect`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from alter.core import UserError
from alter.models import ModelSettings
from alter.settings import BatchSize, Rows, Seed, TemperatureOrZero, Tokens

MOST_NEW_TOKENS = 512
"""Most new tokens that the page offers."""


def _not_empty(host: str) -> str:
    if not host.strip():
        raise ValueError(
            "an empty address would be every network of this machine: give 127.0.0.1 (this machine alone), or 0.0.0.0 for all"
        )
    return host


Host = Annotated[str, AfterValidator(_not_empty)]


class Serve(ModelSettings):
    """Answer over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, /health."""

    host: Host = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine alone."""
    port: int = Field(8000, ge=0, le=65535)
    """Port; 0 takes a free one and says which."""
    name: str | None = None
    """Name of the model in answers; by default the names of the model's and of the adapter's folder."""
    api_key_env: str | None = None
    """Environment variable that holds the key which clients must send; without it anyone who reaches the port may ask."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Names under which the server is reached, besides this machine's own, its address and any IP address; * for all."""
    allowed_origins: list[str] = Field(default_factory=list)
    """Web sites whose pages may ask from a browser (CORS), as https://example.org; * for all."""
    max_batch: BatchSize = Field(16, ge=1)
    """Answers generated in one batch."""
    max_waiting: Rows = Field(256, ge=1)
    """Answers that may wait; more are turned away with 429."""
    max_body_bytes: Rows = Field(1_000_000, ge=1)
    """Largest request; a larger one is turned away with 413."""
    max_tokens: Tokens = Field(1024, ge=1)
    """Most new tokens of an answer, whatever a client asks for."""
    timeout: float = Field(120.0, gt=0)
    """Seconds after which an answer is cut off, waiting included."""
    read_timeout: float = Field(30.0, gt=0)
    """Seconds in which a request must have arrived; a slower one is turned away with 408."""

    upstream: str | None = None
    """Address of another OpenAI-compatible server (vLLM) with the experts as plain LoRAs, as http://127.0.0.1:8001/v1: it
    answers, and the adapter's router only chooses by the prompt which LoRA it takes."""
    upstream_base: str | None = None
    """That server's name of the base model; by default `model`."""
    upstream_loras: list[str] = Field(default_factory=list)
    """What it calls the LoRA of each expert, in order; by default expert-1 and so on, as `alter export --form loras` does."""
    upstream_key_env: str | None = None
    """Environment variable that holds the key for that server."""

    @model_validator(mode="after")
    def _upstream_has_a_router(self) -> Serve:
        if self.upstream is None and (self.upstream_base or self.upstream_loras or self.upstream_key_env):
            raise ValueError(
                "`upstream_base`, `upstream_loras` and `upstream_key_env` are about a server that `upstream` names"
            )
        if self.upstream is not None and (self.adapter is None or self.merged):
            raise ValueError("`upstream` needs the `adapter` whose router chooses, not `merged`")
        return self

    def served_name(self) -> str:
        """Return the model's name in answers."""
        if self.name is not None:
            return self.name
        return "+".join(_short(given) for given in (self.model, self.adapter) if given is not None)

    def key(self) -> str | None:
        """Return the key that clients must send, or None.

        Raises:
            UserError: the variable that should hold it is not set.
        """
        return _variable(self.api_key_env, "`api_key_env`")

    def upstream_key(self) -> str | None:
        """Return the key for the other server, or None.

        Raises:
            UserError: the variable that should hold it is not set.
        """
        return _variable(self.upstream_key_env, "`upstream_key_env`")


def _variable(name: str | None, option: str) -> str | None:
    """Return an environment variable's value; None if none is named."""
    if name is None:
        return None
    value = os.environ.get(name)
    if not value:
        raise UserError(f"{option} names {name}, which is not set: export it first.")
    return value


def _short(name: str) -> str:
    """Shorten a model's or an adapter's path to its name: hub ids and shipped models keep theirs."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    path = path.resolve()
    # a run's adapter is in a folder of that name
    return path.parent.name if path.name == "adapter" else path.name


class Chat(ModelSettings):
    """Talk to a model and its adapter in the terminal; /help lists what can be typed besides questions."""

    max_tokens: Tokens = Field(200, ge=1)
    """Longest answer, in tokens."""
    temperature: TemperatureOrZero = 0.0
    """0 takes the likeliest tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Share of the probability that sampling keeps."""
    seed: Seed = 0
    """Seed of the sampling."""
    system: str | None = None
    """System turn before the first question."""


class Inspect(ModelSettings):
    """Ask a model on a page: before and after, token entropies and experts; browse erasure requests."""

    adapter: str
    """Adapter on top of it: local folder or hub id. Any adapter can be compared, only ALTER's has experts."""
    db: str | None = None
    """Database of erasure requests to browse, as an SQLAlchemy URL. Whoever reaches the page can read it."""
    forget: str | None = None
    """Rows that were to be forgotten, to offer as questions; by default those that the adapter's run names, if they are
    still there. Whoever reaches the page can read them."""
    host: Host = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine alone."""
    port: int = Field(7860, ge=0, le=65535)
    """Port; 0 takes a free one and says which."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Names under which the page is reached, besides this machine's own, its address and any IP address; * for all."""
    max_new_tokens: int = Field(100, ge=1, le=MOST_NEW_TOKENS)
    """Longest answer that the page starts with, in tokens."""

    @model_validator(mode="after")
    def _can_be_left_off(self) -> Inspect:
        if self.merged:
            raise ValueError("merged leaves no adapter to take off for the answer before: leave it out")
        return self
