"""`alter inspect`: the page where a person asks a model and sees before and after, entropies, and each token's expert.

`analyse` computes, `render` writes HTML; both know nothing of Gradio, which `page` and `application` put around them.
"""

from __future__ import annotations

import html
import math
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from alter.adapter import AlterConfig, AlterLinear, AlterModel
from alter.adapter.generation import DecodeState
from alter.adapter.routing import Routing
from alter.core.errors import UserError
from alter.data.encoding import encode_prompt
from alter.data.examples import Example
from alter.logits.entropy import entropy_from_logits, max_entropy, shift
from alter.models.generation import check_prompts, stop_ids
from alter.models.loading import load_model
from alter.models.quantized import Bits
from alter.models.scoring import context_length, evaluating
from alter.requests.store import Request, Store
from alter.serving.text import pieces, visible
from alter.serving.web import HostGuard, address, listen

LONGEST = 512
"""Most new tokens that the page offers."""


# What is computed -----------------------------------------------------------------------------------------------------


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
    """A greedy answer: its text as `alter generate` prints it, and its tokens, with the one that ended it (if any)."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Analysis:
    """A prompt, the answer of the base model and that of the adapted one.

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


class _Watch(LogitsProcessor):
    """Keeps the gates of each token at the step that chooses it; changes nothing."""

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
    if not isinstance(model, PeftModel):
        raise UserError("The inspector compares a model with and without its adapter: give one with --adapter.")
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type
        raise UserError(
            f"The adapter is of kind {kind}, which adds tokens of its own; expected ALTER's, LoRA or alike."
        )


def expert_names(model: Any) -> tuple[str, ...]:
    """Names of the experts of the active adapter, the retention expert first; empty if it is not ALTER's."""
    if not isinstance(model.base_model, AlterModel):
        return ()
    config = model.active_peft_config
    named = config.domains or [None] * config.num_forget_experts
    return ("retention", *(f"expert {d}" if n is None else f"expert {d} ({n})" for d, n in enumerate(named, start=1)))


@contextmanager
def switched_off(model: Any, experts: Collection[int]) -> Iterator[None]:
    """Make some experts zero inside the block; afterwards their weights are what they were, bit for bit.

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
    name = model.active_adapter
    try:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, AlterLinear) and experts and name in module.alter_B:
                    r, weight = module.alter_r[name], module.alter_B[name].weight
                    for expert in set(experts):
                        columns = weight[:, expert * r : (expert + 1) * r]
                        kept.append((columns, columns.clone()))
                        columns.zero_()
        yield
    finally:
        with torch.no_grad():
            for columns, values in kept:
                columns.copy_(values)


def _reply(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> tuple[list[int], list[Tensor]]:
    """Greedy continuation with the token that ended it, and the gates of each of its tokens if they were routed."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    cache = DynamicCache(config=model.get_base_model().config)
    watch = _Watch(cache, model.active_adapter)
    stop = stop_ids(model, tokenizer)
    sequence = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        past_key_values=cache,
        logits_processor=LogitsProcessorList([watch]),
        pad_token_id=tokenizer.pad_token_id,
        **({"eos_token_id": sorted(stop)} if stop else {}),
        **{"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None},
    )
    return sequence[0, len(prompt) :].tolist(), watch.gates


def _of_next(logits: Tensor, ids: Tensor) -> list[float]:
    """Probability of each token of ids [T] under logits [T, V] at the place before it; NaN for the first."""
    logp = logits[:-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return [math.nan, *logp.exp().tolist()]


def _tokens(
    model: Any, tokenizer: Any, ids: list[int], gates: Sequence[Tensor], order: tuple[float, float]
) -> list[Token]:
    """Everything about the tokens of one row; `gates` are those of its last tokens, where generation decided them."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    q, threshold = order
    if isinstance(model.base_model, AlterModel):
        trace = model.base_model.trace(row)
        entropy, base = trace.entropy[0], trace.logits(trace.states[0])
        routes = model.base_model.route(trace.entropy, trace.features)
        if gates:
            routes[0, len(ids) - len(gates) :] = torch.stack(list(gates)).to(routes)
        adapted = model(input_ids=row, use_cache=False, alter_routing=Routing(routes)).logits
        weights: list[tuple[float, ...]] = [tuple(weight) for weight in routes[0].tolist()]
    else:
        with model.disable_adapter():
            logits = model(input_ids=row, use_cache=False).logits
        entropy, base = shift(entropy_from_logits(logits, q))[0], logits[0]
        adapted = model(input_ids=row, use_cache=False).logits
        weights = [()] * len(ids)
    if not (base.isfinite().all() and adapted.isfinite().all()):
        raise UserError("The model's logits are not finite; try --dtype float32.")
    columns = zip(
        ids,
        pieces(tokenizer, ids),
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
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 100, off: Collection[int] = ()
) -> Analysis:
    """Answer a prompt with and without the adapter, and tell what each token was to both models.

    The experts of the prompt and of the original answer are those that a plain forward pass gives them; those of the
    unlearned answer are the ones that they took while it was generated, where the route follows the adapted model's own
    steps. An expert acts when its token is read: it changes what comes after.

    Args:
        model: a PeftModel; ALTER's adapter, or another one, which has no experts. Nobody else may use it meanwhile.
        tokenizer: the model's.
        prompt: what a person types: a question, put into the model's chat template if it has one.
        max_new_tokens: longest answer; decoding is greedy.
        off: experts to switch off for this analysis (see `switched_off`).

    Raises:
        UserError: there is no adapter or no such expert; the prompt is empty, or does not fit into the model's context
            with its answer; the logits are not finite.
    """
    check_adapted(model)
    if not prompt.strip():
        raise UserError("The prompt is empty: type a question.")
    ids = encode_prompt(tokenizer, Example(prompt=prompt, answer="", kind="qa"))
    check_prompts(model, [ids], max_new_tokens, ["The prompt"])
    is_alter = isinstance(model.base_model, AlterModel)
    config = model.active_peft_config if is_alter else AlterConfig()
    order = config.entropy_q, config.threshold
    with evaluating(model), switched_off(model, off):
        with model.disable_adapter():
            original, _ = _reply(model, tokenizer, ids, max_new_tokens)
        changed, gates = _reply(model, tokenizer, ids, max_new_tokens)
        rows = [
            _tokens(model, tokenizer, ids + answer, routed, order)
            for answer, routed in ((original, ()), (changed, gates))
        ]
    answers = [
        Answer(tokenizer.decode(answer, skip_special_tokens=True).strip(), tuple(row[len(ids) :]))
        for answer, row in zip((original, changed), rows, strict=True)
    ]
    limit = max_entropy(order[0], model.get_base_model().config.get_text_config().vocab_size)
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


# What is shown --------------------------------------------------------------------------------------------------------

STYLE = """
.alter { --cold: #f8fafc; --hot: #fdba74; --ink: #1c2430; --soft: #56606e; --line: #d5dae1; --card: #ffffff;
  --bad: #a4262c; --good: #17693a; color: var(--ink); font-size: 16px; line-height: 1.6; }
.dark .alter { --cold: #1b2027; --hot: #9a3412; --ink: #eceff3; --soft: #a9b2be; --line: #3b434e; --card: #14181d;
  --bad: #ff9089; --good: #6cce94; }
.alter * { box-sizing: border-box; }
.alter h3 { margin: 0 0 .5rem; font-size: 1.05rem; font-weight: 650; color: var(--ink); }
.alter p { margin: 0 0 .6rem; }
.alter .soft { color: var(--soft); font-size: .88rem; }
.alter .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.alter .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem;
  min-width: 0; margin: 0 0 1rem; }
.alter .pair .card { margin: 0; }
.alter .tokens { overflow-wrap: anywhere; line-height: 2.05; }
.alter .token { background-color: color-mix(in srgb, var(--hot) calc(var(--share) * 100%), var(--cold)); color: var(--ink);
  white-space: pre-wrap; border-radius: 3px; padding: .12em 0; unicode-bidi: isolate;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.alter .token.high { text-decoration: underline 2px; text-underline-offset: 4px; text-decoration-skip-ink: none; }
.alter .token .mark { color: var(--soft); font-size: .8em; }
.alter .token:hover, .alter .token:focus { outline: 2px solid var(--ink); outline-offset: 0; }
.alter .token::after { content: attr(aria-label); display: none; position: fixed; left: 50%; bottom: 12px; z-index: 1000;
  transform: translateX(-50%); width: min(44rem, calc(100vw - 24px)); padding: .6rem .9rem; border-radius: 10px;
  background: var(--ink); color: var(--card); font-size: .92rem; line-height: 1.45; white-space: pre-line;
  box-shadow: 0 4px 18px rgb(0 0 0 / .35); text-decoration: none; pointer-events: none; }
.alter .token:hover::after, .alter .token:focus::after { display: block; }
.alter .tokens:hover .token:focus:not(:hover)::after { display: none; }
.alter .legend { margin: 1rem 0; max-width: 34rem; }
.alter .scale { position: relative; height: 1.1rem; border: 1px solid var(--line); border-radius: 4px;
  background: linear-gradient(to right in srgb, var(--cold), var(--hot)); }
.alter .scale i { position: absolute; top: -5px; bottom: -5px; width: 0; border-left: 2px dashed var(--ink); }
.alter .ticks { display: flex; justify-content: space-between; font-size: .85rem; color: var(--soft); position: relative; }
.alter .ticks b { position: absolute; transform: translateX(-50%); color: var(--ink); font-weight: 600; }
.alter .wide { overflow-x: auto; max-width: 100%; }
.alter table { border-collapse: collapse; font-size: .92rem; margin: 0; }
.alter th, .alter td { text-align: left; vertical-align: top; padding: .35rem 1.2rem .35rem 0;
  border-bottom: 1px solid var(--line); color: var(--ink); }
.alter th:last-child, .alter td:last-child { padding-right: 0; }
.alter th { font-weight: 650; }
.alter td.n, .alter th.n { text-align: right; font-variant-numeric: tabular-nums; }
.alter table.history { width: 100%; min-width: 38rem; }
.alter table.history td:nth-child(4) { overflow-wrap: anywhere; min-width: 12rem; }
.alter code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.alter dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
.alter dt { color: var(--soft); }
.alter dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.alter .message { border-left: 4px solid var(--bad); padding: .5rem .9rem; }
.alter .good { color: var(--good); font-weight: 600; }
.alter .bad { color: var(--bad); font-weight: 600; }
.alter summary { cursor: pointer; }
.alter details > .tokens, .alter details > .wide { margin-top: .7rem; }
.gradio-container .html-container { padding: 0; }
@media (max-width: 600px) {
  .alter th, .alter td { padding-right: .6rem; }
  .alter table.history { min-width: 0; }
  .alter table.history thead { display: none; }
  .alter table.history, .alter table.history tbody, .alter table.history tr, .alter table.history td { display: block; }
  .alter table.history, .alter table.history tbody { padding: 0; border: 0; margin: 0; }
  .alter table.history td { border: 0; padding: .1rem 0; }
  .alter table.history tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
}
.gradio-container .switches .wrap { max-height: 11rem; overflow-y: auto; }
"""
"""CSS of what `render` and `render_request` write, in both of Gradio's color schemes (`.dark` on the body)."""


def escape(text: str) -> str:
    """HTML of a text; characters that no page may hold become pictures of themselves, so that they are seen."""
    return html.escape(visible(text), quote=True)


def _probability(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def _taken(token: Token, experts: Sequence[str], off: Collection[int]) -> str:
    """The experts that a token opens, heaviest first, with their weights."""
    opened = sorted(((w, -d) for d, w in enumerate(token.gates) if w > 0), reverse=True)
    return ", ".join(f"{experts[-d]} {w:.2f}{' (switched off)' if -d in off else ''}" for w, d in opened)


def describe(token: Token, found: Analysis) -> str:
    """What hover, keyboard and screen readers tell of a token: entropy, experts, probability before and after."""
    text = token.text.replace("\n", "\u21b5")
    lines = [f"\u201c{text}\u201d" if text else "Part of a character"]
    if math.isinf(token.entropy):
        lines.append("First token: nothing generated it, so it has no entropy.")
    else:
        level = "high" if token.high else "low"
        lines.append(f"Entropy {token.entropy:.3f} ({level}); under the adapter {token.entropy_after:.3f}.")
    if found.experts:
        lines.append(f"Takes {_taken(token, found.experts, found.off)}.")
    if not math.isnan(token.before):
        lines.append(f"Probability {_probability(token.before)} before, {_probability(token.after)} after.")
    return "\n".join(lines)


def share(entropy: float, top: float) -> float:
    """Where an entropy lies on the color scale, 0 to 1; 0 for a token without one."""
    return 0.0 if math.isinf(entropy) else min(max(entropy / top, 0.0), 1.0)


def _token(token: Token, found: Analysis) -> str:
    # an unfinished character is shown as a dot, a line break by its sign as well
    text = escape(token.text).replace("\n", '<span class="mark">\u21b5</span>\n') or '<span class="mark">\u00b7</span>'
    entropy = "" if math.isinf(token.entropy) else f"{token.entropy:.6g}"
    return (
        f'<span class="token{" high" if token.high and entropy else ""}" role="note" tabindex="0" data-id="{token.id}" '
        f'data-entropy="{entropy}" style="--share:{share(token.entropy, found.top):.4f}" '
        f'aria-label="{escape(describe(token, found))}">{text}</span>'
    )


def _row(tokens: Sequence[Token], found: Analysis) -> str:
    return f'<div class="tokens">{"".join(_token(token, found) for token in tokens)}</div>'


def _legend(found: Analysis) -> str:
    kind = "Shannon entropy" if found.q == 1 else f"Tsallis entropy, q = {found.q:g}"
    place = 100 * found.threshold / found.top
    end = f"{found.top:.2f}" if found.top == found.limit else f"{found.top:.2f} and more"
    return (
        f'<div class="legend"><p class="soft">Color: entropy of the token under the original model ({kind}). Underlined: '
        f"high, above the threshold of {found.threshold:.2f}. Point at a token, tap it or reach it with Tab for its "
        f'figures.</p><div class="scale" role="img" aria-label="Color scale from 0 to {end}; the threshold is at '
        f'{found.threshold:.2f}"><i style="left:{place:.2f}%"></i></div><div class="ticks" aria-hidden="true"><span>0</span>'
        f'<b style="left:{place:.2f}%">{found.threshold:.2f}</b><span>{end}</span></div></div>'
    )


def _experts(found: Analysis) -> str:
    if not found.experts:
        return '<p class="soft">This adapter has no experts: it is not one of ALTER\'s.</p>'
    groups = (found.prompt, found.unlearned.tokens)
    counts = [[sum(token.gates[d] > 0 for token in group) for group in groups] for d in range(len(found.experts))]
    rows = "".join(
        f"<tr><td>{escape(name)}{' <b>(off)</b>' if d in found.off else ''}</td>"
        + "".join(f'<td class="n">{count}</td>' for count in counts[d])
        + "</tr>"
        for d, name in enumerate(found.experts)
        if any(counts[d]) or d in found.off
    )
    return (
        '<div class="wide"><table><thead><tr><th>Expert</th><th class="n">tokens of the prompt</th>'
        f'<th class="n">of the unlearned answer</th></tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="soft" style="margin-top:.6rem">A low-entropy token takes one expert, a high-entropy token several. An '
        "expert acts when its token is read: it changes what comes after. In the unlearned answer high and low are judged by "
        "the entropy under the adapter, at the step that chose the token.</p>"
    )


def render(found: Analysis) -> str:
    """HTML of an analysis: both answers side by side, the legend, the experts, the prompt. All text is escaped."""
    off = ", ".join(found.experts[d] for d in found.off)
    same = [t.id for t in found.base.tokens] == [t.id for t in found.unlearned.tokens]
    note = '<p class="soft">Word for word the original answer.</p>' if same else ""
    return (
        '<div class="alter"><div class="pair">'
        '<section class="card" data-answer="base" aria-label="Original answer"><h3>Original '
        f'<span class="soft">adapter off</span></h3>{_row(found.base.tokens, found)}</section>'
        '<section class="card" data-answer="unlearned" aria-label="Unlearned answer"><h3>Unlearned <span class="soft">'
        f"{f'without {escape(off)}' if off else 'adapter on'}</span></h3>{_row(found.unlearned.tokens, found)}{note}"
        f"</section></div>{_legend(found)}"
        f'<section class="card"><h3>Experts</h3>{_experts(found)}</section>'
        '<details class="card"><summary>The prompt, token by token</summary>'
        f'<div data-answer="prompt">{_row(found.prompt, found)}</div></details></div>'
    )


def message(text: str) -> str:
    """HTML of one sentence that tells a person what is wrong."""
    return f'<div class="alter"><p class="message" role="alert">{escape(text)}</p></div>'


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(values: Mapping[str, Any] | None) -> str:
    return "".join(
        f"<dt>{escape(str(name).replace('_', ' '))}</dt><dd>{escape(_value(value))}</dd>"
        for name, value in (values or {}).items()
        if value not in (None, "")
    )


def _evidence(request: Request) -> str:
    before, after = request.before or {}, request.after or {}
    if not after:
        return '<p class="soft">No evidence yet: the request has not been run.</p>'
    reference = after.get("reference") or {}
    columns = (before, after, reference)
    names = {"probability": "probability", "exact_memorization": "memorized exactly", "rouge": "ROUGE-L"}
    body = "".join(
        f"<tr><td>{shown}</td>"
        + "".join(f'<td class="n">{"–" if c.get(name) is None else f"{c[name]:.3f}"}</td>' for c in columns)
        + "</tr>"
        for name, shown in names.items()
    )
    by = f'<p class="soft">Reference: {escape(str(reference["by"]))}.</p>' if reference.get("by") else ""
    found = after.get("verdict") or {}
    word = str(found.get("word", "unproven"))
    tone = {"forgotten": "good", "not forgotten": "bad", "collapsed": "bad"}.get(word, "soft")
    verdict = f'<p class="{tone}">{escape(word.upper())}. {escape(" ".join(found.get("why", [])))}</p>'
    utility = after.get("utility_share")
    kept = "" if utility is None else f"<p>Utility kept: {utility:.4f} of the untouched model.</p>"
    return (
        f'<div class="wide"><table data-evidence><thead><tr><th></th><th class="n">before</th><th class="n">after</th>'
        f'<th class="n">reference</th></tr></thead><tbody>{body}</tbody></table></div>'
        f'<div style="margin-top:.7rem">{by}{verdict}{kept}</div>'
    )


def render_request(store: Store, request: Request) -> str:
    """HTML of a request: facts, evidence, history, and whether the chain of the history is whole. All text is escaped.

    The rows to forget are not shown, even where the database holds them.
    """
    wrong = store.check_chain()
    entries = store.history(request.id)
    chain = (
        f'<p class="bad" role="alert">The history does not verify: {escape(" ".join(wrong))}</p>'
        if wrong
        else f'<p class="good">Chain verified. <span class="soft">Head <code>{escape(store.head())}</code></span></p>'
    )
    facts = {
        name: getattr(request, name) for name in ("state", "received", "due", "data", "data_hash", "rows", "expert")
    }
    lines = "".join(
        f"<tr><td>{escape(e.at)}</td><td>{escape(e.who)}</td><td>{escape(e.what)}</td><td>"
        + escape(", ".join(f"{k}: {_value(v)}" for k, v in e.details.items() if v is not None))
        + f"</td><td><code>{escape(e.hash[:12])}</code></td></tr>"
        for e in entries
    )
    run = f'<details class="card"><summary>Record of the run</summary><dl>{_facts(request.run)}</dl></details>'
    return (
        f'<div class="alter" data-request="{escape(request.name)}"><section class="card"><h3>{escape(request.name)}: '
        f"{escape(request.subject)}</h3><dl>{_facts(facts)}</dl></section>"
        f'<section class="card"><h3>Evidence</h3>{_evidence(request)}</section>'
        f'<section class="card"><h3>History</h3>{chain}<div class="wide" tabindex="0" role="region" aria-label="History">'
        "<table class='history'><thead><tr><th>at</th><th>who</th><th>what</th><th>details</th><th>hash</th></tr></thead>"
        f"<tbody>{lines}</tbody></table></div></section>{run if request.run else ''}</div>"
    )


# The page -------------------------------------------------------------------------------------------------------------


class Inspect(BaseModel):
    """Ask a model on a page: before and after, token entropies and experts; browse erasure requests."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """Model: local folder, hub id, or builtin:NAME."""
    adapter: str
    """Adapter on top of it: local folder or hub id. Any adapter can be compared, only ALTER's has experts."""
    db: str | None = None
    """Database of erasure requests to browse, as an SQLAlchemy URL. Whoever reaches the page can read it."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine alone."""
    port: int = Field(7860, ge=0, le=65535)
    """Port; 0 takes a free one and says which."""
    allowed_hosts: list[str] = Field(default_factory=list)
    """Names under which the page is reached, besides this machine's own, its address and any IP address; * for all."""
    max_new_tokens: int = Field(100, ge=1, le=LONGEST)
    """Longest answer that the page starts with, in tokens."""
    dtype: str = "auto"
    """Number format: auto, float32, bfloat16, float16."""
    quantization: Bits | None = None
    """Hold the linear layers of the model in 4bit or 8bit (bitsandbytes)."""
    device: str | None = None
    """cpu, cuda, cuda:0, mps; the GPU by default if there is one."""


class Inspector:
    """A model that several people look into: one at a time, the others wait.

    Attributes:
        model, tokenizer: see `analyse`.
        store: database of requests, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, store: Store | None = None) -> None:
        check_adapted(model)
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.lock = threading.Lock()

    def analyse(self, prompt: str, max_new_tokens: int = 100, off: Collection[int] = ()) -> Analysis:
        """`analyse` when the model is free."""
        with self.lock:
            return analyse(self.model, self.tokenizer, prompt, max_new_tokens=max_new_tokens, off=off)

    def answer(self, prompt: str, max_new_tokens: int, off: Collection[int]) -> str:
        """HTML of both answers, or of what is wrong with the prompt."""
        try:
            return render(self.analyse(prompt, max_new_tokens, off))
        except UserError as error:
            return message(str(error))

    def choices(self) -> list[tuple[str, int]]:
        """Requests to choose from, as they are in the database now: what is shown, and the id."""
        assert self.store is not None
        return [(f"{r.name}: {r.subject} ({r.state})", r.id) for r in self.store.requests()]

    def request(self, number: int | None) -> str:
        """HTML of a request, or of what is wrong with it."""
        assert self.store is not None
        if number is None:
            return ""
        try:
            return render_request(self.store, self.store.get(number))
        except UserError as error:
            return message(str(error))


def _gradio() -> Any:
    # said before the import: it is read there
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError:
        raise UserError('alter inspect needs Gradio: pip install "alter-unlearning[ui]"') from None
    return gradio


def page(inspector: Inspector, max_new_tokens: int = 100) -> Any:
    """The Gradio Blocks around an inspector.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = _gradio()
    context = context_length(inspector.model)
    longest = LONGEST if context is None else min(LONGEST, context - 1)
    names = expert_names(inspector.model)
    with gr.Blocks(title="alter inspect", analytics_enabled=False) as blocks:
        gr.Markdown("# alter inspect\nWhat the model said before, what it says now, and why.")
        with gr.Tab("Answers") if inspector.store is not None else nullcontext():
            prompt = gr.Textbox(label="Prompt", placeholder="Ask something", lines=2, elem_id="prompt", autofocus=True)
            with gr.Accordion("Switch experts off, length of the answer", open=False):
                off = gr.CheckboxGroup(
                    label="Switched off" if names else "Switched off (this adapter has no experts)",
                    choices=[(name, number) for number, name in enumerate(names)],
                    elem_id="off",
                    elem_classes="switches",
                )
                length = gr.Slider(
                    1,
                    longest,
                    value=min(max_new_tokens, longest),
                    step=1,
                    label="Longest answer (tokens)",
                    elem_id="length",
                )
            ask = gr.Button("Answer", variant="primary", elem_id="ask")
            answers = gr.HTML(elem_id="answers", apply_default_css=False)
            shown = dict(
                inputs=[prompt, length, off], outputs=answers, api_visibility="private", concurrency_id="model"
            )
            gr.on([ask.click, prompt.submit], inspector.answer, **shown)

            def again(text: str, tokens: int, switched: list[int]) -> str:
                return inspector.answer(text, tokens, switched) if text.strip() else ""

            off.input(again, trigger_mode="always_last", **shown)
        if inspector.store is not None:
            _requests(gr, inspector)
    return blocks


def _requests(gr: Any, inspector: Inspector) -> None:
    """The second tab: choose a request, see its evidence."""
    with gr.Tab("Requests"):
        chosen = gr.Dropdown(label="Request", choices=inspector.choices(), value=None, elem_id="request")
        refresh = gr.Button("Read the database again", elem_id="refresh", size="sm")
        view = gr.HTML(elem_id="evidence", apply_default_css=False)

        def read(number: int | None) -> tuple[Any, str]:
            try:
                return gr.update(choices=inspector.choices()), inspector.request(number)
            except UserError as error:
                return gr.update(), message(str(error))

        chosen.input(inspector.request, chosen, view, api_visibility="private")
        refresh.click(read, chosen, [chosen, view], api_visibility="private")


POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Content security policy: whatever is in the page, a browser asks no other host."""


def application(blocks: Any, host: str = "127.0.0.1", allowed: Sequence[str] = ()) -> Any:
    """The web application around the page: it asks no other host, and answers under its own names only (`HostGuard`)."""
    gr = _gradio()
    from fastapi import FastAPI

    app = FastAPI(title="alter", docs_url=None, redoc_url=None, openapi_url=None)

    async def guard(request: Any, forward: Callable[[Request], Any]) -> Any:
        response = await forward(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    app.middleware("http")(guard)
    app.add_middleware(HostGuard, host=host, allowed=allowed)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        max_file_size="1kb",
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        theme=gr.themes.Default(
            primary_hue="blue",
            font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
            font_mono=["ui-monospace", "Consolas", "monospace"],
        ).set(button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700"),
        css=STYLE,
    )


def inspect(settings: Inspect) -> None:
    """Run `alter inspect` until it is told to stop.

    Raises:
        UserError: Gradio is not installed, the port is taken, the database is not one of requests, or what `load_model`
            and `check_adapted` raise.
    """
    _gradio()
    import uvicorn

    listener = listen(settings.host, settings.port)
    store = None if settings.db is None else Store.open(settings.db)
    inspector = Inspector(
        *load_model(settings.model, settings.adapter, settings.dtype, settings.device, settings.quantization), store
    )
    app = application(page(inspector, settings.max_new_tokens), settings.host, settings.allowed_hosts)
    print(
        f"{Path(settings.adapter).name}: {address(settings.host, listener)} (Ctrl-C stops)",
        file=sys.stderr,
        flush=True,
    )
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listener])
