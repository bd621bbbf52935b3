"""The inspector's computations: both answers to a prompt, and each token's entropy, experts and probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from alter.adapter import AlterConfig, DecodeState, Routing, adapted_layers, alter_of, expert_columns
from alter.core import UserError, as_input
from alter.data import Example, encode_prompt
from alter.inference import check_prompts, evaluating, stop_ids
from alter.logits import entropy_from_logits, max_entropy, shift
from alter.models import Guard
from alter.serving.text import token_texts


@dataclass(frozen=True)
class Token:
    """One token of a prompt or an answer.

    Attributes:
        id: in the vocabulary.
        text: what it adds to the text; empty for a token that is only a part of a character.
        entropy: S_q of the frozen base's distribution that generated it; +inf for the first token of all, which nothing
            generated. It decides the color.
        entropy_after: the same under the adapter: in the unlearned answer, what the step that chose the token knew.
        high: whether `entropy` is above the threshold.
        gates: weight of every expert, 0 the retention expert; empty where the adapter has no experts.
        before, after: probability under the base model and under the adapter, given what stands before; NaN for the
            first token of all.
    """

    id: int
    text: str
    entropy: float
    entropy_after: float
    high: bool
    gates: tuple[float, ...]
    before: float
    after: float


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text as `alter generate` prints it, and its tokens, with the end token (if any)."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Analysis:
    """A prompt, and the answers of the base model and of the adapted one.

    Attributes:
        prompt: its tokens, template included.
        base, unlearned: the two answers.
        experts: names, 0 the retention expert; empty where the adapter has none.
        off: numbers of the experts that were switched off.
        q, threshold: order of the entropies, and what separates low from high ones.
        top: entropy at the upper end of the color scale; what lies above gets its color.
        limit: largest entropy that exists.
    """

    prompt: tuple[Token, ...]
    base: Answer
    unlearned: Answer
    experts: tuple[str, ...]
    off: tuple[int, ...]
    q: float
    threshold: float
    top: float
    limit: float


class Stopped(Exception):
    """The client has gone; the analysis is abandoned."""


Progress = Callable[[str, str], None]
"""Takes "base" or "unlearned" and the text of that answer so far; may raise `Stopped`."""


class _Typed(BaseStreamer):
    """A streamer that passes on the text of an answer while it is generated."""

    def __init__(self, tell: Callable[[list[int]], None]) -> None:
        self.tell = tell
        self.ids: list[int] | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt on the first call, then one token per call."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.reshape(-1).tolist()
        self.tell(self.ids)

    def end(self) -> None:
        """Ignore the end of the stream."""


class _Watch(LogitsProcessor):
    """A logits processor that records the gates of each token at the step that chooses it; it changes nothing."""

    def __init__(self, cache: Any, adapter: str) -> None:
        self.cache, self.adapter = cache, adapter
        self.gates: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        state = DecodeState.of(self.cache)
        if state is not None and self.adapter in state.gates:
            self.gates.append(state.gates[self.adapter][0].float().cpu())
        return scores


def check_adapted(model: Any) -> None:
    """Refuse a model without an adapter, and adapters that add tokens of their own.

    Raises:
        UserError: says which of the two.
    """
    if isinstance(model, Guard):
        return
    if not isinstance(model, PeftModel):
        raise UserError("The inspector compares a model with and without its adapter: give one with `adapter`.")
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type
        raise UserError(
            f"The adapter is of kind {kind}, which adds tokens of its own; expected ALTER's, LoRA or alike."
        )


def expert_names(model: Any) -> tuple[str, ...]:
    """Return the names of the experts of the active adapter, the retention expert first; empty if it is not ALTER's."""
    if alter_of(model) is None:
        return ()
    config = model.active_peft_config
    named = config.domains or [None] * config.num_forget_experts
    return ("retention", *(f"expert {d}" if n is None else f"expert {d} ({n})" for d, n in enumerate(named, start=1)))


@contextmanager
def switched_off(model: Any, experts: Collection[int]) -> Iterator[None]:
    """Zero some experts inside the block; afterwards their weights are restored, bit for bit.

    The router keeps them, so that no token takes another expert instead: tokens of these get the base model.

    Args:
        model: with an ALTER adapter, if any experts are named; nobody else may use it meanwhile.
        experts: numbers, 0 the retention expert.

    Raises:
        UserError: there is no such expert.
    """
    names = expert_names(model)
    for expert in experts:
        if not 0 <= expert < len(names):
            raise UserError(f"There is no expert {expert}; the adapter has {len(names)}, numbered from 0.")
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in adapted_layers(model, model.active_adapter).values() if experts else ():
                weight = layer.alter_B[model.active_adapter].weight
                for expert in set(experts):
                    columns = expert_columns(weight, expert, len(names) - 1)
                    kept.append((columns, columns.clone()))
                    columns.zero_()
        yield
    finally:
        with torch.no_grad():
            for columns, values in kept:
                columns.copy_(values)


def _inner(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _reply(
    model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int, tell: Callable[[str], None]
) -> tuple[list[int], list[Tensor]]:
    """Generate a greedy continuation with its end token, and the gates of each of its tokens if they were routed."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    cache = DynamicCache(config=_inner(model).config)
    watch = _Watch(cache, model.active_adapter if isinstance(model, PeftModel) else "")
    stop = stop_ids(model, tokenizer)
    sequence = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        **as_input(cache),
        logits_processor=LogitsProcessorList([watch]),
        streamer=_Typed(lambda done: tell(tokenizer.decode(done, skip_special_tokens=True).strip())),
        pad_token_id=tokenizer.pad_token_id,
        **({"eos_token_id": sorted(stop)} if stop else {}),
        # the cache is given, whatever the model's own settings say
        use_cache=True,
        **{"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None},
    )
    return sequence[0, len(prompt) :].tolist(), watch.gates


def _forced(model: Any, row: Tensor, prompt: int) -> Tensor:
    """Return the teacher-forced logits [1, T, V] of a row; an inference form reads the prompt first, as when it answers."""
    if isinstance(model, PeftModel):
        logits: Tensor = model(input_ids=row, use_cache=False).logits
        return logits
    cache = DynamicCache(config=model.config)
    parts = [part for part in (row[:, :prompt], row[:, prompt:]) if part.shape[1]]
    return torch.cat([model(input_ids=part, use_cache=True, **as_input(cache)).logits for part in parts], dim=1)


def _of_next(logits: Tensor, ids: Tensor) -> list[float]:
    """Return the probability of each token of ids [T] under logits [T, V] at the place before it; NaN for the first."""
    logp = logits[:-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return [math.nan, *logp.exp().tolist()]


def _tokens(
    model: Any, tokenizer: Any, ids: list[int], prompt: int, gates: Sequence[Tensor], order: tuple[float, float]
) -> list[Token]:
    """Describe the tokens of one row, a prompt and an answer; `gates` are the answer's where generation set them."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    q, threshold = order
    tuner = alter_of(model)
    if tuner is not None:
        trace = tuner.trace(row)
        entropy, base = trace.entropy[0], trace.logits(trace.states[0])
        routes = tuner.route(trace.entropy, trace.features)
        if gates:
            routes[0, len(ids) - len(gates) :] = torch.stack(list(gates)).to(routes)
        adapted = model(input_ids=row, use_cache=False, alter_routing=Routing(routes)).logits
        weights: list[tuple[float, ...]] = [tuple(weight) for weight in routes[0].tolist()]
    else:
        with model.disable_adapter():
            logits = _forced(model, row, prompt)
        entropy, base = shift(entropy_from_logits(logits, q))[0], logits[0]
        adapted = _forced(model, row, prompt)
        weights = [()] * len(ids)
    if not (base.isfinite().all() and adapted.isfinite().all()):
        raise UserError("The model's logits are not finite; try `dtype` float32.")
    columns = zip(
        ids,
        token_texts(tokenizer, ids),
        entropy.float().tolist(),
        shift(entropy_from_logits(adapted, q))[0].float().tolist(),
        weights,
        _of_next(base, row[0]),
        _of_next(adapted[0], row[0]),
        strict=True,
    )
    return [
        Token(id=i, text=text, entropy=s, entropy_after=t, high=s > threshold, gates=gate, before=old, after=new)
        for i, text, s, t, gate, old, new in columns
    ]


def analyse(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    off: Collection[int] = (),
    progress: Progress = lambda which, text: None,
) -> Analysis:
    """Answer a prompt with and without the adapter, and describe each token under both models.

    The experts of the prompt and of the original answer are those that a plain forward pass gives them; those of the
    unlearned answer are the ones that they took while it was generated, where the route follows the adapted model's own
    steps. An expert acts when its token is read: it changes what comes after.

    Args:
        model: a PeftModel with ALTER's adapter, or with another one, which has no experts, or an inference form. Nobody
            else may use it meanwhile.
        tokenizer: the model's.
        prompt: what a person types: a question, put into the model's chat template if it has one.
        max_new_tokens: longest answer; decoding is greedy.
        off: experts to switch off for this analysis (see `switched_off`).
        progress: told of both answers while they are made.

    Raises:
        UserError: there is no adapter or no such expert; the prompt is empty, or does not fit into the model's context
            with its answer; the logits are not finite.
    """
    check_adapted(model)
    if not prompt.strip():
        raise UserError("The prompt is empty: type a question.")
    ids = encode_prompt(tokenizer, Example(prompt=prompt, answer="", kind="qa"))
    check_prompts(model, [ids], max_new_tokens, ["The prompt"])
    is_alter = alter_of(model) is not None
    config = model.active_peft_config if is_alter else AlterConfig()
    order = config.entropy_q, config.threshold
    with evaluating(model), switched_off(model, off):
        with model.disable_adapter():
            original, _ = _reply(model, tokenizer, ids, max_new_tokens, lambda text: progress("base", text))
        changed, gates = _reply(model, tokenizer, ids, max_new_tokens, lambda text: progress("unlearned", text))
        rows = [
            _tokens(model, tokenizer, ids + answer, len(ids), routed, order)
            for answer, routed in ((original, ()), (changed, gates))
        ]
    answers = [
        Answer(tokenizer.decode(answer, skip_special_tokens=True).strip(), tuple(row[len(ids) :]))
        for answer, row in zip((original, changed), rows, strict=True)
    ]
    limit = max_entropy(order[0], _inner(model).config.get_text_config().vocab_size)
    return Analysis(
        prompt=tuple(rows[0][: len(ids)]),
        base=answers[0],
        unlearned=answers[1],
        experts=expert_names(model),
        off=tuple(sorted(set(off))),
        q=order[0],
        threshold=order[1],
        top=min(limit, 2 * order[1]),
        limit=limit,
    )
