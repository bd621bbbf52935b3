"""Configuration of an ALTER adapter, saved as `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from alter.core import UserError, nearest
from alter.logits import PAPER_THRESHOLD, check_threshold

ROUTERS = ("learned", "entropy", "static", "dense")
SQUASHES = ("sine", "tanh")
BIASES = ("none", "all", "alter_only")
ENTROPY_SOURCES = ("probe", "exact")


class NotMergeable(UserError, NotImplementedError):
    """Merging is exact for router="static" alone, where every token gets the same matrix; PEFT expects its second class."""

    def __init__(self, name: str, router: str) -> None:
        super().__init__(
            f"Adapter {name!r} cannot be merged: its router={router!r} opens other experts for every token, and a merged "
            "weight is the same for all tokens. Keep the adapter separate (loading it costs no accuracy), or train one with "
            "router='static'."
        )


@dataclass
class AlterConfig(PeftConfig):
    """Configuration of an [`AlterModel`]: asymmetric LoRA with one retention and N forget experts (arXiv:2603.01792).

    Args:
        r (`int`, *optional*, defaults to 8):
            Rank of the shared matrix A and of every expert.
        alter_alpha (`float`, *optional*, defaults to 16):
            The update is scaled by `alter_alpha / r`.
        alter_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the input of A while training.
        target_modules (`list[str]` or `str`, *optional*):
            Layers to adapt: name endings, one regular expression, or `"all-linear"`. By default all linear layers of
            the blocks (attention and MLP) of known architectures.
        exclude_modules (`list[str]` or `str`, *optional*):
            Layers to leave alone, matched like `target_modules`.
        num_forget_experts (`int`, *optional*, defaults to 1):
            N, the number of forget experts: one per sub-domain of what is to be forgotten.
        domains (`list[str]`, *optional*):
            Names of the sub-domains; expert `d + 1` serves `domains[d]`.
        router (`str`, *optional*, defaults to `"learned"`):
            What opens the experts: `"learned"` reads the token's hidden state at one layer; `"entropy"` is the paper's
            literal gate, which reads the scalar entropy (Eq. 7); `"static"` keeps all experts open for every token, can
            be merged, and is an ablation; `"dense"` is HydraLoRA's, which the paper calls AsymLoRA: a router in every
            layer reads that layer's input, weighs all experts by a softmax, and trains with them.
        entropy_q (`float`, *optional*, defaults to 1.5):
            Order of the Tsallis entropy (Eq. 5); 1 is Shannon's.
        entropy_threshold (`float`, *optional*):
            Tokens above it are high-entropy ones. 1.2 as in the paper unless a quantile is given.
        entropy_quantile (`float`, *optional*):
            Share of tokens below the threshold, strictly between 0 and 1, instead of a threshold. Whoever trains the
            adapter measures the threshold on data and stores it in `entropy_threshold`: with both set, the threshold
            counts, and the quantile tells where it came from.
        temperature_high (`float`, *optional*, defaults to 0.8):
            Temperature of the gate for high-entropy tokens.
        temperature_low (`float`, *optional*, defaults to 0.01):
            Temperature of the gate for low-entropy tokens, which take one expert only.
        top_k (`int`, *optional*, defaults to 3):
            Forget experts that a high-entropy token takes at most (Eq. 9).
        entropy_gate (`bool`, *optional*, defaults to `True`):
            Whether entropy decides between one expert and several. `False` gives every token its best expert alone, an
            ablation.
        retention_expert (`bool`, *optional*, defaults to `True`):
            Whether the retention expert may open. `False` leaves its weights unused, an ablation.
        bound (`str`, *optional*):
            Squashes the update element by element, with `router="static"` only: W0 + phi(frequency * s B A) / gain,
            where phi is `"sine"` or `"tanh"` (Stable Forgetting, arXiv:2509.24166; the place of the two constants is a
            reading).
        bound_frequency (`float`, *optional*, defaults to 1.0):
            The frequency in it.
        bound_gain (`float`, *optional*, defaults to 1.0):
            The gain in it: no element of the update exceeds 1 / gain.
        router_layer (`str`, *optional*):
            Name (or its ending) of the adapted layer whose input the router reads. By default the first adapted layer
            of the block five sixths of the way to the last one.
        router_memory (`float`, *optional*, defaults to 1.0):
            Between 0 and 1: weight of a token's evidence relative to that of the token after it. 0 routes by the last
            token alone, 1 by the mean of all tokens so far.
        from_layer (`int` or `float`, *optional*):
            First block that gets experts: its number, or a share of the depth strictly between 0 and 1 (0.5 of 4 blocks
            is block 2). The blocks below stay the untouched base, and a learned router reads what enters this block, so
            that one forward pass tells the routes and uses them. By default all blocks have experts, and the frozen base
            runs before each prompt.
        entropy_source (`str`, *optional*, defaults to `"probe"`):
            With `from_layer` and `router="learned"`: what tells high-entropy tokens from low ones in routing. `"probe"`
            is a logistic regression on what the router reads, `"exact"` the frozen base's own entropy, which takes a
            second pass over prompts. Objectives always see the exact entropy.
        vocab_size (`int`, *optional*):
            Vocabulary of the base model; filled in when the adapter is attached.
        base_fingerprint (`str`, *optional*):
            Identifies the base model that the adapter was made for; filled in when it is saved. Loading it on another
            base raises an error.
        init_weights (`bool`, *optional*, defaults to `True`):
            Start as the identity (B = 0). `False` gives random weights, for tests.
        bias (`str`, *optional*, defaults to `"none"`):
            Biases of the base model to train as well: `"none"`, `"all"` or `"alter_only"` (those of adapted layers).
        modules_to_save (`list[str]`, *optional*):
            Other modules to train and save with the adapter.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the blocks to adapt.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of blocks, where `layers_to_transform` needs it.
        rank_pattern (`dict[str, int]`, *optional*):
            Ranks of layers that differ from `r`, by layer name or regular expression.
        alpha_pattern (`dict[str, float]`, *optional*):
            Values of alpha that differ from `alter_alpha`, likewise.

    Raises:
        UserError: a value is outside its range, or the threshold can never be reached with this `entropy_q`.
    """

    r: int = field(default=8, metadata={"help": "Rank of the shared matrix A and of every expert."})
    alter_alpha: float = field(default=16, metadata={"help": "The update is scaled by alter_alpha / r."})
    alter_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A while training."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt: name endings, one regular expression, or 'all-linear'. By default all linear "
            "layers of the blocks of known architectures."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave alone, matched like target_modules."}
    )
    num_forget_experts: int = field(
        default=1, metadata={"help": "Number of forget experts, one per sub-domain of what is to be forgotten."}
    )
    domains: list[str] | None = field(
        default=None, metadata={"help": "Names of the sub-domains; expert d + 1 serves domains[d]."}
    )
    router: str = field(
        default="learned",
        metadata={
            "help": "What opens the experts: 'learned' (hidden state), 'entropy' (the paper's literal gate on the "
            "scalar entropy), 'static' (all open; can be merged) or 'dense' (HydraLoRA: a softmax in every layer)."
        },
    )
    entropy_q: float = field(default=1.5, metadata={"help": "Order of the Tsallis entropy; 1 is Shannon's."})
    entropy_threshold: float | None = field(
        default=None,
        metadata={"help": "Tokens above it are high-entropy ones; 1.2 unless entropy_quantile is given."},
    )
    entropy_quantile: float | None = field(
        default=None,
        metadata={"help": "Share of tokens below the threshold, which is then measured on the training data."},
    )
    temperature_high: float = field(default=0.8, metadata={"help": "Gate temperature of high-entropy tokens."})
    temperature_low: float = field(default=0.01, metadata={"help": "Gate temperature of low-entropy tokens."})
    top_k: int = field(default=3, metadata={"help": "Forget experts that a high-entropy token takes at most."})
    entropy_gate: bool = field(
        default=True, metadata={"help": "Entropy decides between one expert and several; False: always the best one."}
    )
    retention_expert: bool = field(
        default=True, metadata={"help": "The retention expert may open; False leaves it unused."}
    )
    bound: str | None = field(
        default=None, metadata={"help": "Squash the update of a static adapter element by element: 'sine' or 'tanh'."}
    )
    bound_frequency: float = field(default=1.0, metadata={"help": "Multiplies the update before it is squashed."})
    bound_gain: float = field(default=1.0, metadata={"help": "Divides the squashed update."})
    router_layer: str | None = field(
        default=None,
        metadata={
            "help": "Adapted layer whose input the router reads; by default the first one of the block five sixths "
            "of the way to the last one."
        },
    )
    router_memory: float = field(
        default=1.0,
        metadata={
            "help": "Weight, between 0 and 1, of a token's evidence relative to that of the token after it; 0 routes "
            "by the last token alone."
        },
    )
    from_layer: int | float | None = field(
        default=None,
        metadata={
            "help": "First block that gets experts: its number, or a share of the depth between 0 and 1. By default all "
            "blocks have experts."
        },
    )
    entropy_source: str = field(
        default="probe",
        metadata={
            "help": "With from_layer: a 'probe' on what the router reads tells high-entropy tokens from low ones, or the "
            "'exact' entropy does, at a second pass over prompts."
        },
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Vocabulary of the base model; filled in when the adapter is attached."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Identifies the base model of a saved adapter; filled in when it is saved."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the identity; False gives random weights, for tests."}
    )
    bias: str = field(
        default="none", metadata={"help": "Base biases to train as well: 'none', 'all' or 'alter_only'."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, where layers_to_transform needs it."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of layers that differ from r, by name or regular expression."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Values of alpha that differ from alter_alpha, likewise."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ALTER
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise UserError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise UserError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.entropy_threshold is None and self.entropy_quantile is None:
            self.entropy_threshold = PAPER_THRESHOLD
        self.check()

    def check(self) -> None:
        """Check every value; run again after a field was changed.

        Raises:
            UserError: a value is outside its range; names the value, what was expected and the fix.
        """
        for name, choices in (("router", ROUTERS), ("bias", BIASES), ("entropy_source", ENTROPY_SOURCES)):
            value = getattr(self, name)
            if value not in choices:
                expected = ", ".join(repr(choice) for choice in choices)
                raise UserError(f"`{name}` is {value!r}; expected one of {expected}.{nearest(str(value), choices)}")
        for name in ("r", "num_forget_experts", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
        for pattern, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or rank < 1:
                raise UserError(
                    f"`rank_pattern` gives {pattern!r} the rank {rank!r}; it must be a whole number of at least 1."
                )
        if self.bound is not None and self.bound not in SQUASHES:
            raise UserError(
                f"`bound` is {self.bound!r}; expected one of {', '.join(SQUASHES)}.{nearest(self.bound, SQUASHES)}"
            )
        if self.bound is not None and self.router != "static":
            raise UserError(f"`bound` needs `router` 'static', one matrix for all tokens; it is {self.router!r}.")
        for name in ("temperature_high", "temperature_low", "alter_alpha", "bound_frequency", "bound_gain"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"`{name}` is {value!r}; it must be a number above 0.")
        self._check_from_layer()
        if not 0 <= self.router_memory <= 1:
            raise UserError(
                f"`router_memory` is {self.router_memory!r}; it must lie between 0 (the last token alone) and 1 (the mean "
                "of all tokens so far)."
            )
        if not 0 <= self.alter_dropout < 1:
            raise UserError(f"`alter_dropout` is {self.alter_dropout!r}; it must be at least 0 and below 1.")
        if self.domains is not None and len(self.domains) != self.num_forget_experts:
            raise UserError(
                f"`domains` names {len(self.domains)} sub-domains, but `num_forget_experts` is {self.num_forget_experts}; "
                "every forget expert serves one sub-domain."
            )
        if self.entropy_quantile is not None and not 0 < self.entropy_quantile < 1:
            raise UserError(
                f"`entropy_quantile` is {self.entropy_quantile!r}; it must lie between 0 and 1 (0.7 makes the top 30 % "
                "high)."
            )
        if self.entropy_threshold is not None:
            check_threshold(self.entropy_q, self.entropy_threshold, self.vocab_size)

    def _check_from_layer(self) -> None:
        value = self.from_layer
        if value is None:
            return
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not whole and not (isinstance(value, float) and 0 < value < 1):
            raise UserError(
                f"`from_layer` is {value!r}; it must be the number of a block (0 is the first), or a share of the depth "
                "strictly between 0 and 1 (0.5 puts experts in the upper half)."
            )
        for name, clashes in (
            ("layers_to_transform", self.layers_to_transform is not None),
            ("modules_to_save", self.modules_to_save is not None),
            ("bias", self.bias == "all"),
        ):
            if clashes:
                raise UserError(
                    f"`{name}` is {getattr(self, name)!r}, but `from_layer` {value!r} keeps the blocks below it as the "
                    f"untouched base: leave one of the two out."
                )

    @property
    def one_pass(self) -> bool:
        """Whether a forward pass routes its own tokens, by the output of the untouched blocks below `from_layer`."""
        exact = self.entropy_gate and self.entropy_source == "exact"
        return self.from_layer is not None and self.router == "learned" and not exact

    @property
    def probed(self) -> bool:
        """Whether a probe beside the router, rather than the entropy, separates high-entropy tokens from low ones."""
        return self.one_pass and self.entropy_gate

    @property
    def routed(self) -> bool:
        """Whether tokens are routed once for the whole network, which takes a pass of the frozen base."""
        return self.router in ("learned", "entropy")

    @property
    def threshold(self) -> float:
        """Entropy above which a token counts as high.

        Raises:
            UserError: only a quantile is given, and nothing has measured the threshold yet.
        """
        if self.entropy_threshold is None:
            raise UserError(
                f"`entropy_quantile` is {self.entropy_quantile}, but the threshold it stands for has not been measured. "
                "Train the adapter with `alter unlearn`, or set `entropy_threshold` in its configuration."
            )
        return self.entropy_threshold

    def resolved(self, **values: Any) -> None:
        """Record values found on a model, to be written when the configuration is saved.

        The fields themselves stay as the user gave them, so that one configuration can serve several models.
        """
        self.__dict__.setdefault("_resolved", {}).update(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration to save, with the values found on the model that it is attached to."""
        values = dataclasses.asdict(self)
        values.update({k: v for k, v in self.__dict__.get("_resolved", {}).items() if v is not None})
        return values
