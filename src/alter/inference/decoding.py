"""How the tokens of a reply are chosen and where it ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from alter.core import UserError
from alter.data import end_of_turn
from alter.inference.passes import inner_model, prompted

if TYPE_CHECKING:
    from torch import nn

SEGMENT = 16
"""Number of tokens after which greedy decoding drops finished rows."""
NUCLEUS = 512
"""Likeliest tokens among which a nucleus is looked for before the whole vocabulary is sorted."""


def stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return the tokens that end a reply: the generation configuration's, the tokenizer's, the chat template's end of turn."""
    eos = inner_model(model).generation_config.eos_token_id
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return {i for i in [*ids, tokenizer.eos_token_id, end_of_turn(tokenizer)] if i is not None}


class Finite:
    """Logits processor that changes nothing, and refuses to choose a token where the logits say nothing.

    The likeliest of NaN is a token too: a model that is broken, or whose numbers do not fit into its dtype, would be taken to
    have said it. A logit may be -inf, which forbids a token.

    Args:
        model: whose logits these are.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] as they are.

        Raises:
            UserError: the highest of a row is NaN or infinite.
        """
        if not scores.amax(dim=-1).isfinite().all():
            weights = self.model.named_parameters()
            broken = next((name for name, weight in weights if not weight.float().isfinite().all()), None)
            raise UserError(
                "The model's logits are not finite, so it can say nothing: "
                + (
                    "its numbers are beyond its dtype; try `dtype` float32."
                    if broken is None
                    else f"its weights hold NaN or infinite values, {broken} for one; make or download it anew."
                )
            )
        return scores


class Nucleus:
    """Logits processor that draws each row's next token from its nucleus and leaves that token alone possible.

    As temperature and top_p of transformers, which sort the whole vocabulary and draw from all of it: with 49,152 tokens
    on a CPU that takes as long as the model. The nucleus of a row is the fewest likeliest tokens whose probability, at
    the temperature, reaches `top_p`; of logits that end in a tie the tokens kept may be others.

    Args:
        temperature: above 0.
        top_p: in (0, 1).
    """

    def __init__(self, temperature: float, top_p: float) -> None:
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V]: 0 at the drawn token and -inf elsewhere."""
        scores = scores.float() / self.temperature
        total = scores.logsumexp(-1, keepdim=True)
        most = scores.shape[-1]
        values, places = scores.topk(min(NUCLEUS, most))
        p = (values - total).exp()
        if values.shape[-1] < most and bool((p.sum(-1) < self.top_p).any()):
            values, places = scores.sort(descending=True)
            p = (values - total).exp()
        # a token is in the nucleus if those before it do not fill it; the first always is
        p = p * (p.cumsum(-1) - p < self.top_p)
        chosen = places.gather(-1, torch.multinomial(p, 1))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


WARPED = {"do_sample", "temperature", "top_p", "top_k"}
"""Sampling settings that `Nucleus` replaces, with `top_k` 0."""
OTHERS = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""A model's own settings that also reshape what it samples from."""
PENALTIES = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "min_length",
    "min_new_tokens",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "guidance_scale",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
"""Those that move the logits themselves, greedily too."""


@dataclass(frozen=True)
class Decoding:
    """Decoding of replies: settings, stop tokens, length.

    Attributes:
        settings: what `model.generate` is told.
        stop: tokens that end a reply.
        new_tokens: most tokens of a reply.
        whole: a reply is made by one call of `model.generate`.
        draws: replies are drawn.
    """

    settings: dict[str, Any]
    stop: set[int]
    new_tokens: int
    whole: bool
    draws: bool

    @classmethod
    def of(cls, model: Any, tokenizer: Any, new_tokens: int, settings: dict[str, Any], whole: bool) -> Decoding:
        """Make the decoding for settings of `model.generate`; `whole`: they need the whole reply."""
        stop = stop_ids(model, tokenizer)
        own = inner_model(model).generation_config
        # a least length or beams look at the whole reply, a static cache has room for one call: those run in one piece
        least = settings.get("min_new_tokens", own.min_new_tokens)
        whole = whole or least is not None or own.cache_implementation is not None or prompted(model)
        from transformers import LogitsProcessorList

        settings = settings | {"pad_token_id": tokenizer.pad_token_id, "use_cache": True}
        settings["logits_processor"] = LogitsProcessorList([Finite(model), *settings.get("logits_processor", ())])
        if stop:
            settings["eos_token_id"] = sorted(stop)
        return cls(settings, stop, new_tokens, whole, bool(settings["do_sample"]))

    def by_nucleus(self, asked: dict[str, Any], own: Any) -> Decoding:
        """Sample with `Nucleus` where the settings `asked` and the model's `own` allow it."""
        plain = asked.get("do_sample") and asked.get("top_k") == 0 and asked.keys() <= WARPED
        # all of the vocabulary is to be drawn from: there is nothing to look for
        if (
            not plain
            or asked.get("top_p", 1.0) >= 1.0
            or any(getattr(own, name, None) not in (None, 1.0, 0.0) for name in OTHERS)
        ):
            return self
        from transformers import LogitsProcessorList

        draw = Nucleus(asked.get("temperature") or 1.0, asked["top_p"])
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        processors = LogitsProcessorList([*self.settings["logits_processor"], draw])
        return replace(self, settings=self.settings | greedy | {"logits_processor": processors})

    @property
    def segment(self) -> int:
        """Number of tokens after which finished rows leave the batch."""
        return self.new_tokens if self.whole else SEGMENT
