"""Corrupt the embeddings of prompts that a classifier recognises (ECO, Liu et al. 2024, arXiv:2406.07933)."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alter.adapter import first_block
from alter.core import UserError, as_input, titled
from alter.logits import Depth, states_of
from alter.models.guards.form import FORM_FILE, Guard, places, read_tensors
from alter.models.guards.likeness import window_means

CLASSIFIER = "classifier.safetensors"
"""File of a guard's folder with the classifier's weights."""
SPACES = ("Ġ", "▁")
"""Marks of the space before a token, of byte-level and of SentencePiece tokenizers."""


def after_block(model: Any, number: int) -> Depth:
    """Return the depth after the first `number` blocks, at least 1.

    Raises:
        UserError: the model has fewer blocks, or none.
    """
    prefix, last = first_block(model, number - 1, "depth")
    listed = list(model.get_submodule(prefix.rstrip(".")).children())
    return Depth(listed[last], tuple(listed[last + 1 :]))


@torch.no_grad()
def states_after(model: Any, depth: Depth, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the hidden states [B, T, H] at a depth; the blocks behind it do not run."""
    with states_of(depth, alone=True) as seen:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return seen[0]


@dataclass(frozen=True)
class PromptClassifier:
    """Probability that a prompt is one to forget: the highest sigmoid(weight . h + bias) of the mean hidden states h of its windows,
    by weights of its own for each look at the prompt: as it is, and with every word written like a name.

    ECO fine-tunes RoBERTa; here the base itself reads the prompt (a reading), which needs no further network, and by windows,
    since what is to be forgotten may stand anywhere in a long prompt.

    Attributes:
        weight: [L, H] of L looks.
        bias: [L].
        window: tokens of a window; see `window_means`.
    """

    weight: Tensor
    bias: Tensor
    window: int

    def __call__(self, states: Tensor, mask: Tensor, look: int = 0) -> Tensor:
        """Return [B] probabilities, from hidden states [B, T, H] and a mask [B, T] of the positions that count."""
        weight, bias = self.weight[look], self.bias[look]
        means = [window_means(row[real], self.window) for row, real in zip(states, mask.bool(), strict=True)]
        return torch.stack([torch.sigmoid((mean @ weight.to(mean) + bias.to(mean)).max()) for mean in means])


@functools.lru_cache(maxsize=4)
def word_ranks(tokenizer: Any) -> dict[str, int]:
    """Return the Latin words that a tokenizer has a token for, in small letters, with the first one's number: common ones come first.

    A word's token begins with the mark of a space; of single letters only "a" and "i" are words.
    """
    found: dict[str, int] = {}
    for token, number in tokenizer.get_vocab().items():
        word = token[1:].lower()
        if token[:1] in SPACES and re.fullmatch("[a-z]{2,}|[ai]", word):
            found[word] = min(number, found.get(word, number))
    return found


def as_names(tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """Return a prompt, as tokens, with every word written like a name (`titled`); its special tokens stay.

    In capitals, in small letters alone, with underscores or without spaces a text falls apart into other tokens, which a classifier
    of names as they are written does not know.
    """
    special, ranks = set(tokenizer.all_special_ids), word_ranks(tokenizer)
    found: list[int] = []
    for apart, tokens in itertools.groupby(prompt, special.__contains__):
        own = list(tokens)
        found += (
            own if apart else tokenizer(titled(tokenizer.decode(own), ranks), add_special_tokens=False)["input_ids"]
        )
    # not longer than what fits into the context, and a question stands at the end
    return found[-len(prompt) :]


class Corrupted(Guard):
    """A model that reads a prompt to be forgotten with noise on its embeddings; other prompts are read as they are.

    If the classifier gives a prompt more than `threshold`, as it is or with every word written like a name, N(0, strength^2) is
    added to the first `dims` dimensions of the embeddings of all its tokens but the last. The noise is drawn by the token's place in
    the row, from `seed`, so that an answer depends neither on the batch nor on who asked before (a reading: the authors draw anew).

    Args:
        base: the model.
        classifier: looks at the prompt, in a pass of its own.
        settings: depth (after how many blocks the classifier reads), threshold, strength, dims and seed.
    """

    kind: ClassVar[str] = "corruption"
    decides: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    def __init__(self, base: Any, classifier: PromptClassifier, settings: dict[str, Any]) -> None:
        super().__init__(base)
        self.classifier, self.settings = classifier, settings
        self.depth = after_block(base, settings["depth"])
        self.noise: Tensor | None = None
        base.get_input_embeddings().register_forward_hook(self._add)

    @classmethod
    def read(cls, base: Any, path: Path, settings: dict[str, Any]) -> Corrupted:
        """See `Guard.read`.

        Raises:
            UserError: the settings lack some, as those of an earlier version do.
        """
        absent = sorted({"depth", "window", "looks", "threshold", "strength", "dims", "seed"} - settings.keys())
        if absent:
            raise UserError(
                f"{path / FORM_FILE} lacks {', '.join(absent)}: another version wrote it. Make the guard again (`alter guard`)."
            )
        found = read_tensors(path / CLASSIFIER)
        return cls(base, PromptClassifier(found["weight"], found["bias"], settings["window"]), settings)

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.noise is None:
            return output
        changed = output.clone()
        dims = self.noise.shape[-1]
        changed[..., :dims] = (output[..., :dims].float() + self.noise).to(output.dtype)
        return changed

    def decide(self, ids: Tensor, mask: Tensor | None, prompts: Sequence[int] | None = None) -> Tensor:
        """Return how many first tokens of each row to corrupt, [B]: the prompt's but the last, or none."""
        mask = torch.ones_like(ids) if mask is None else mask
        lengths = mask.sum(1)
        asked = lengths if prompts is None else torch.tensor(list(prompts), device=ids.device).minimum(lengths)
        inside = mask.bool() & (mask.cumsum(1) <= asked[:, None])
        flagged = self._recognised(ids, mask, inside)
        if self.tokenizer is not None and not flagged.all():
            again = [as_names(self.tokenizer, row[real].tolist()) for row, real in zip(ids, inside, strict=True)]
            filled, real = torch.zeros_like(ids), torch.zeros_like(inside)
            for i, row in enumerate(again):
                filled[i, : len(row)], real[i, : len(row)] = torch.tensor(row, device=ids.device), True
            flagged |= self._recognised(filled, real.long(), real, look=1)
        return torch.where(flagged, (asked - 1).clamp(min=0), 0).float()

    @torch.no_grad()
    def _recognised(self, ids: Tensor, mask: Tensor, inside: Tensor, look: int = 0) -> Tensor:
        """Tell which rows [B] the classifier takes for prompts to forget, by the positions `inside` [B, T]."""
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}
        chance = self.classifier(states_after(self.base, self.depth, given), inside, look)
        found: Tensor = chance > self.settings["threshold"]
        return found

    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None, decision: Tensor | None) -> Any:
        """See `Guard.unlearned`."""
        assert decision is not None
        begun = cache is not None and cache.get_seq_length() > 0
        # what follows the prompt is read as it is, and so is all of a batch of which nothing is flagged
        self.noise = None if begun or not decision.any() else self._noise(inputs, decision)
        try:
            return self.base(**inputs, **as_input(cache))
        finally:
            self.noise = None

    def _noise(self, inputs: dict[str, Any], decision: Tensor) -> Tensor:
        """Return the noise [B, T, dims]: at each row's first `decision` tokens, else 0."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
        place = places(mask)
        drawn = np.random.default_rng(self.settings["seed"]).standard_normal((ids.shape[1], self.settings["dims"]))
        noise = torch.from_numpy(drawn).float().to(ids.device)[place]
        corrupted = mask.bool() & (place < decision[:, None])
        strength: float = self.settings["strength"]
        return strength * noise * corrupted[..., None]
