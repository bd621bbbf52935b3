"""Settings of `alter serve`, `alter chat` and `alter inspect`."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, model_validator

from alter.core.errors import UserError
from alter.core.numbers import Seed, TemperatureOrZero
from alter.models.loading import Subject

LONGEST = 512
"""Most new tokens that the page offers."""


class Serve(Subject):
    """Answer over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, /health."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine alone."""
    port: int = Field(8000, ge=0, le=65535)
    """Port; 0 takes a free one and says which."""
    name: str | None = None
    """What the model is called in answers; by default the names of the model's and of the adapter's folder."""
    api_key_env: str | None = None
    """Environment variable that holds the key which clients must send; without it anyone who reaches the port may ask."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Names under which the server is reached, besides this machine's own, its address and any IP address; * for all."""
    allowed_origins: list[str] = Field(default_factory=list)
    """Web sites whose pages may ask from a browser (CORS), as https://example.org; * for all."""
    max_batch: int = Field(16, ge=1)
    """Answers that are made together."""
    max_waiting: int = Field(256, ge=1)
    """Answers that may wait; more are turned away with 429."""
    max_body_bytes: int = Field(1_000_000, ge=1)
    """Largest request; a larger one is turned away with 413."""
    max_tokens: int = Field(1024, ge=1)
    """Most new tokens of an answer, whatever a client asks for."""
    timeout: float = Field(120.0, gt=0)
    """Seconds after which an answer is cut off, waiting included."""
    read_timeout: float = Field(30.0, gt=0)
    """Seconds in which a request must have arrived; a slower one is turned away with 408."""

    def served_name(self) -> str:
        """What the model is called in answers."""
        if self.name is not None:
            return self.name
        return "+".join(_short(given) for given in (self.model, self.adapter) if given is not None)

    def key(self) -> str | None:
        """The key that clients must send, or None.

        Raises:
            UserError: the variable that should hold it is not set.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UserError(f"--api-key-env names {self.api_key_env}, which is not set: export it first.")
        return key


def _short(name: str) -> str:
    """A model's or an adapter's name without the way to it: hub ids and shipped models keep theirs."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    path = path.resolve()
    # a run's adapter is in a folder of that name
    return path.parent.name if path.name == "adapter" else path.name


class Chat(Subject):
    """Talk to a model and its adapter in the terminal; /help lists what can be typed besides questions."""

    max_tokens: int = Field(200, ge=1)
    """Longest answer, in tokens."""
    temperature: TemperatureOrZero = 0.0
    """0 takes the likeliest tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Share of the probability that sampling keeps."""
    seed: Seed = 0
    """Of the sampling."""
    system: str | None = None
    """System turn before the first question."""


class Inspect(Subject):
    """Ask a model on a page: before and after, token entropies and experts; browse erasure requests."""

    adapter: str
    """Adapter on top of it: local folder or hub id. Any adapter can be compared, only ALTER's has experts."""
    db: str | None = None
    """Database of erasure requests to browse, as an SQLAlchemy URL. Whoever reaches the page can read it."""
    forget: str | None = None
    """Rows that were to be forgotten, to offer as questions; by default those that the adapter's run names, if they are
    still there. Whoever reaches the page can read them."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine alone."""
    port: int = Field(7860, ge=0, le=65535)
    """Port; 0 takes a free one and says which."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Names under which the page is reached, besides this machine's own, its address and any IP address; * for all."""
    max_new_tokens: int = Field(100, ge=1, le=LONGEST)
    """Longest answer that the page starts with, in tokens."""

    @model_validator(mode="after")
    def _can_be_left_off(self) -> Inspect:
        if self.merged:
            raise ValueError("merged leaves no adapter to take off for the answer before: leave it out")
        return self
