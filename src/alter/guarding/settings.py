"""Settings of `alter guard`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from alter.core import UserError
from alter.data import TemplateArguments
from alter.plugins import OneOf, Registry, kinds
from alter.settings import Count, OutFolder, Rows, Seed, Tokens

if TYPE_CHECKING:
    from alter.data import Example
    from alter.models import Form


class Maker(BaseModel, ABC):
    """Settings of one kind of guard; a kind sets `kind: Literal["mine"] = "mine"` and joins by `@MAKERS.part`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    kind: str

    @abstractmethod
    def make(self, run: MakeGuard, forget: Sequence[Example], retain: Sequence[Example]) -> Form:
        """Return the guard, as `alter.models.guards.load_form` reads it: settings, and tensors by file.

        Raises:
            UserError: the rows do not do, or a model does not load.
        """


class Eco(Maker):
    """ECO (Liu et al. 2024, arXiv:2406.07933): prompts that a classifier recognises are read with noise on their embeddings."""

    kind: Literal["eco"] = "eco"
    retrained: str | None = None
    """Model that stands for one that never saw the forget rows: the noise is as strong as makes the answers as unlikely as
    it finds them. Without one, as unlikely as the answers of other rows."""
    false_alarms: float = Field(0.01, ge=0, lt=1)
    """Share of retain prompts that may be recognised, in cross-validation."""
    threshold: float = Field(0.9, ge=0, lt=1)
    """Probability that a prompt needs at least to be recognised."""
    depth: float = Field(0.25, ge=0, le=1)
    """Where the classifier reads hidden states, as a share of the blocks."""
    window: Tokens = Field(32, ge=1)
    """Tokens whose mean state the classifier judges, wherever in the prompt they are."""
    dims: Count = Field(1, ge=1)
    """How many dimensions of an embedding get noise; the paper's 1."""
    strength: float | None = Field(None, gt=0)
    """Standard deviation of the noise; searched for if not given."""
    rounds: Count = Field(10, ge=0)
    """Steps of the search; the paper's 10."""
    rate: float = Field(0.5, gt=0)
    """Step of the search, in powers of ten for each nat."""
    probe: float = Field(0.1, gt=0)
    """Distance to either side of a strength that the search probes, in powers of ten."""
    enough: float = Field(0.05, ge=0)
    """Difference from the target, in nats a token, at which the search stops."""
    rows: Rows = Field(32, ge=1)
    """Forget rows that the search measures on."""

    def make(self, run: MakeGuard, forget: Sequence[Example], retain: Sequence[Example]) -> Form:
        from alter.guarding.eco import make_eco

        if not forget:
            raise UserError("ECO's classifier learns from rows to forget: give `forget`.")
        return make_eco(run, self, forget, retain)


class Alu(Maker):
    """ALU (Sanyal and Mandal 2025, arXiv:2502.00406): agents look over each answer, and rewrite or withhold it."""

    kind: Literal["alu"] = "alu"
    targets: list[str] = Field(default_factory=list)
    """Names or topics that nothing may be said about."""
    url: str | None = None
    """OpenAI-compatible endpoint of the agents, https://api.openai.com/v1 for instance; None: the model itself, untouched."""
    model: str | None = None
    """Name of the agents' model at that endpoint."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the API key; None for an endpoint without keys."""
    rewrites: Count = Field(5, ge=1)
    """Versions that are made of an answer; the paper's 5."""
    best: Count = Field(3, ge=1)
    """Of these, how many are merged; the paper's 3."""
    least: float = Field(4.0, ge=1, le=5)
    """Mean grade below which the answer is withheld; the paper's 4."""
    refusal: str = "I cannot answer that."
    """Reply in place of a withheld answer."""
    longest: Tokens = Field(200, ge=1)
    """Most tokens of an answer and of an agent's reply."""

    def make(self, run: MakeGuard, forget: Sequence[Example], retain: Sequence[Example]) -> Form:
        if not self.targets:
            raise UserError("`guard.targets` is empty: name what nothing may be said about.")
        if not all(target.strip() for target in self.targets):
            raise UserError(
                "`guard.targets` holds an empty name, which is in every answer: all would be withheld. Leave it out."
            )
        if self.url is not None and not self.model:
            raise UserError("`guard.url` needs `guard.model`, the name of the agents' model at that endpoint.")
        parts = urlsplit(self.url or "https://none")
        if parts.scheme not in ("http", "https") or parts.username or parts.password or parts.query:
            raise UserError(
                f"`guard.url` is {self.url!r}; expected http:// or https:// and a host, without user, password or query, which "
                "would stand in the guard's folder: put the key into the environment (`guard.key_variable`)."
            )
        if self.best > self.rewrites:
            raise UserError(f"`guard.best` is {self.best}, more than `guard.rewrites` {self.rewrites}: give less.")
        return self.model_dump(exclude={"kind"}) | {"kind": "agents", "base": None}, {}


class NeuronAdjust(Maker):
    """Neuron Adjust (arXiv:2503.21730): feed-forward neurons that look as on forget rows are moved away from them."""

    kind: Literal["neurons"] = "neurons"
    share: float = Field(0.005, gt=0, le=1)
    """Share of all feed-forward neurons that are adjusted; the paper's 0.005 for a language, 0.03 for mathematics and code."""

    def make(self, run: MakeGuard, forget: Sequence[Example], retain: Sequence[Example]) -> Form:
        from alter.guarding.neurons import make_neurons

        return make_neurons(run, self, forget, retain)


class KeySpace(Maker):
    """Key Space Detection (arXiv:2503.21730): prompts whose key lies among those of the forget rows get no answer."""

    kind: Literal["key_space"] = "key_space"
    depth: float = Field(0.5, ge=0, le=1)
    """Whose block's keys are looked at, as a share of the blocks."""
    share: float | None = Field(None, gt=0)
    """Size of the cube, as a share of what covers all forget prompts (0.06 to 2 in the authors' commands); by default as large as
    false_alarms allows."""
    false_alarms: float = Field(0.01, ge=0, lt=1)
    """Share of retain prompts that may lie in the cube, where share is not given."""

    def make(self, run: MakeGuard, forget: Sequence[Example], retain: Sequence[Example]) -> Form:
        from alter.guarding.neurons import make_key_space

        return make_key_space(run, self, forget, retain)


MAKERS: Registry[type[Maker]] = Registry("guard maker", kinds(Eco, Alu, NeuronAdjust, KeySpace))
"""What `alter guard` can make, by name; open to plugins."""


class MakeGuard(BaseModel):
    """Make a guard for a model: nothing is trained in it, and what it should not answer is caught when it is asked.

    The folder that is written goes with the model as an adapter does, and every command takes it as one. A guard holds back
    what the model says to those who ask; whoever has the weights has the knowledge.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """Model: local folder, hub id, file.gguf, or builtin:NAME."""
    forget: str | None = None
    """Rows to forget, for all kinds but alu: file, folder, or tofu:SPLIT."""
    retain: str | None = None
    """Rows to keep; the shipped sample of ordinary text joins them."""
    guard: Annotated[Maker, OneOf(MAKERS)] = Eco()
    """Which guard, and its settings."""
    out: OutFolder
    """Folder for the guard."""
    overwrite: bool = False
    """Replace what is there."""
    seed: Seed = 0
    """Seed of everything that is drawn."""
    dtype: str = "auto"
    """Number format: auto, float32, bfloat16, float16."""
    device: str | None = None
    """cpu, cuda, cuda:0, mps; the GPU by default if there is one."""
    chat_template_kwargs: TemplateArguments = []
