"""Two guards that need no training (arXiv:2503.21730): Neuron Adjust moves neurons, Key Space Detection abstains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alter.core import UserError, as_input
from alter.models.guards.form import Guard, places, read_tensors

NEURONS = "neurons.safetensors"
"""File of a guard's folder with what was seen on forget and retain rows."""

REFUSED = 20.0
"""Logit of the end of a row, all others being 0, where the model abstains."""


def moved(x: Tensor, forget: tuple[Tensor, Tensor], retain: tuple[Tensor, Tensor], drawn: Tensor) -> Tensor:
    """Move pre-activations that look like forget rows' to the other side of the retain rows' mean (Neuron Adjust).

    With means m and deviations s of both kinds, and normal densities p: where p_f(x) >= p_r(x) and u >= p_r / (p_r + p_f),
    x becomes 2 m_r - ((x - m_f) / s_f s_r + m_r); all else stays. (The authors' code takes m_f for s_f; ours does not.)

    Args:
        x: [..., K].
        forget, retain: mean and standard deviation [K] of each neuron on rows of the kind.
        drawn: [..., K], u, uniform between 0 and 1.
    """
    wide = x.float()
    (m_f, s_f), (m_r, s_r) = forget, retain
    # logarithms of the densities, without the constant that both have
    f, r = (-0.5 * ((wide - m) / s).square() - s.log() for m, s in ((m_f, s_f), (m_r, s_r)))
    taken = (f >= r) & (drawn >= torch.sigmoid(r - f))
    return torch.where(taken, 2 * m_r - ((wide - m_f) / s_f * s_r + m_r), wide).to(x.dtype)


def inside(x: Tensor, mean: Tensor, std: Tensor, half: float) -> Tensor:
    """Tell which keys [B, D] lie within `half` deviations of the mean in every dimension, [B]."""
    return ((x.float() - mean).abs() <= half * std).all(-1)


def by_token(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what a layer takes or gives as [B, T, K], also where an architecture makes one axis of rows and tokens (OPT).

    Raises:
        UserError: it was not for every token of every row (`shape` is [B, T]), as of an expert in a mixture.
    """
    if values.numel() != math.prod(shape) * values.shape[-1]:
        raise UserError(
            "This model's feed-forward layers see some of the tokens only (a mixture of experts): neither neurons nor keys can be "
            "looked at there. Take another guard."
        )
    return values.reshape(*shape, values.shape[-1])


class Adjusted(Guard):
    """A model some of whose feed-forward neurons are moved where they look as on forget rows (`moved`).

    What is drawn depends on a token's place in its row, the neuron and `seed`, so that an answer depends neither on the batch
    nor on who asked before (a reading: the authors draw anew).

    Args:
        base: the model.
        neurons: by layer (the name of the linear layer that gives the pre-activations) the neurons' numbers `ids` and the
            means and deviations of both kinds.
        settings: has the seed.
    """

    kind: ClassVar[str] = "neurons"

    def __init__(self, base: Any, neurons: dict[str, dict[str, Tensor]], settings: dict[str, Any]) -> None:
        super().__init__(base)
        self.settings = settings
        self.place: Tensor | None = None
        for number, (name, found) in enumerate(sorted(neurons.items())):
            base.get_submodule(name).register_forward_hook(self._hook(number, found))

    @classmethod
    def read(cls, base: Any, path: Path, settings: dict[str, Any]) -> Adjusted:
        """See `Guard.read`."""
        neurons: dict[str, dict[str, Tensor]] = {}
        for key, value in read_tensors(path / NEURONS).items():
            name, _, part = key.rpartition("/")
            neurons.setdefault(name, {})[part] = value
        return cls(base, neurons, settings)

    def _hook(self, number: int, found: dict[str, Tensor]) -> Any:
        def adjust(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if self.place is None:
                return output
            ids, *given = (found[key].to(output.device) for key in ("ids", "m_f", "s_f", "m_r", "s_r"))
            count = int(self.place.max()) + 1
            rng = np.random.default_rng([self.settings["seed"], number])
            drawn = torch.from_numpy(rng.random((count, len(ids)))).float().to(output.device)[self.place]
            changed = by_token(output, self.place.shape).clone()
            changed[..., ids] = moved(changed[..., ids], (given[0], given[1]), (given[2], given[3]), drawn)
            return changed.view_as(output)

        return adjust

    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None, decision: Tensor | None) -> Any:
        """See `Guard.unlearned`."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        past = 0 if cache is None else cache.get_seq_length()
        whole = torch.ones(len(ids), past + ids.shape[1], device=ids.device) if mask is None else mask
        self.place = places(whole)[:, -ids.shape[1] :]
        try:
            return self.base(**inputs, **as_input(cache))
        finally:
            self.place = None


class Abstaining(Guard):
    """A model that ends its answer at once where a prompt's key lies in the cube of the forget rows' keys.

    The key is what the last prompt token puts into one block's second feed-forward layer; the cube is `half` deviations to
    either side of the forget rows' mean, in every dimension.

    Args:
        base: the model.
        mean, std: [D] of the forget rows' keys.
        settings: the layer's name, `half`, and `end`, the token that ends an answer.
    """

    kind: ClassVar[str] = "key_space"
    decides: ClassVar[bool] = True
    answers_alone: ClassVar[bool] = True

    def __init__(self, base: Any, mean: Tensor, std: Tensor, settings: dict[str, Any]) -> None:
        super().__init__(base)
        self.mean, self.std, self.settings = mean, std, settings

    @classmethod
    def read(cls, base: Any, path: Path, settings: dict[str, Any]) -> Abstaining:
        """See `Guard.read`."""
        found = read_tensors(path / NEURONS)
        return cls(base, found["mean"], found["std"], settings)

    def decide(self, ids: Tensor, mask: Tensor | None, prompts: Sequence[int] | None = None) -> Tensor:
        """Return the number of asked tokens, [B], where the key lies in the cube; else 0."""
        mask = torch.ones_like(ids) if mask is None else mask
        lengths = mask.sum(1)
        asked = lengths if prompts is None else torch.tensor(list(prompts), device=ids.device).minimum(lengths)
        keys = keys_of(self.base, self.settings["layer"], ids, mask, asked)
        known = inside(keys, self.mean.to(keys.device), self.std.to(keys.device), self.settings["half"])
        return torch.where(known, asked, 0).float()

    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None, decision: Tensor | None) -> Any:
        """See `Guard.unlearned`."""
        assert decision is not None
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        past = 0 if cache is None else cache.get_seq_length()
        out = self.base(**inputs, **as_input(cache))
        whole = torch.ones(len(ids), past + ids.shape[1], device=ids.device) if mask is None else mask
        place = whole.cumsum(1)[:, -ids.shape[1] :]
        held = (decision[:, None] > 0) & (place >= decision[:, None])
        keep = inputs["logits_to_keep"]
        held = held[:, keep] if isinstance(keep, Tensor) else held[:, -keep:] if keep else held
        refusal = torch.zeros_like(out.logits[:1, :1])
        refusal[..., self.settings["end"]] = REFUSED
        out.logits = torch.where(held[..., None], refusal, out.logits)
        return out


@torch.no_grad()
def keys_of(model: Any, layer: str, ids: Tensor, mask: Tensor, asked: Tensor) -> Tensor:
    """Return the input [B, D] of a layer at the last of each row's first `asked` tokens."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(input_ids=ids, attention_mask=mask, position_ids=places(mask), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    last = (mask.bool() & (mask.cumsum(1) == asked[:, None])).long().argmax(1)
    return by_token(seen[0], ids.shape)[torch.arange(len(ids), device=ids.device), last]
