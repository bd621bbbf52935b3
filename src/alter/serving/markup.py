"""The inspector's HTML: an analysis and an erasure request, all text escaped; independent of Gradio."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alter.evaluation import FIRM
from alter.evaluation.told import told
from alter.requests import Request, Store
from alter.serving.analysis import Analysis, Token
from alter.serving.text import visible

STYLE = """
.alter { --cold: #f8fafc; --hot: #fdba74; --ink: #1c2430; --soft: #56606e; --line: #d5dae1; --card: #ffffff;
  --bad: #a4262c; --good: #17693a; --fallen: #f3a0a4; --risen: #8fc1f5; --e0: #e3e7ec; --e1: #a8d1ff; --e2: #ffcf99;
  --e3: #b5e3b0; --e4: #e0bdf5; --e5: #fff0a0; --e6: #f9bdcf; --e7: #a7e3dd; color: var(--ink); font-size: 16px;
  line-height: 1.6; }
.dark .alter { --cold: #1b2027; --hot: #9a3412; --ink: #eceff3; --soft: #a9b2be; --line: #3b434e; --card: #14181d;
  --bad: #ff9089; --good: #6cce94; --fallen: #8f2b30; --risen: #1f5c99; --e0: #333b45; --e1: #1f4f80; --e2: #80501a;
  --e3: #2a6130; --e4: #5d3a78; --e5: #6b6113; --e6: #7d344c; --e7: #1d5f5a; }
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
body:has(#color-expert:checked) .alter .token { background-color: var(--expert, var(--cold)); }
body:has(#color-change:checked) .alter .token { background-color: color-mix(in srgb, var(--fallen) calc(var(--fall) * 100%),
  color-mix(in srgb, var(--risen) calc(var(--rise) * 100%), var(--cold))); }
.alter .by { display: none; }
body:has(#color-entropy:checked) .alter .by.entropy, body:has(#color-expert:checked) .alter .by.expert,
body:has(#color-change:checked) .alter .by.change, body:not(:has(.colors)) .alter .by.entropy { display: block; }
.alter.colors fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.alter.colors label { display: inline-flex; gap: .4rem; align-items: center; cursor: pointer; min-height: 24px; }
.alter.colors input[type=radio] { appearance: auto; background: none; box-shadow: none; accent-color: var(--ink);
  width: 1.05rem; height: 1.05rem; margin: 0; }
.alter .swatch { display: inline-block; width: 1em; height: 1em; border: 1px solid var(--line); border-radius: 3px;
  vertical-align: -.12em; margin-right: .45em; }
.alter .bar { display: block; height: .5rem; min-width: 1px; border-radius: 3px; background: var(--soft); margin-top: .2rem; }
.alter td.share { min-width: min(7rem, 20vw); }
.alter .writing::after { content: "\\258d"; color: var(--soft); }
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
.gradio-container button[role="tab"][aria-selected="true"] { color: #1d4ed8; }
.dark .gradio-container button[role="tab"][aria-selected="true"], .gradio-container.dark button[role="tab"][aria-selected="true"] { color: #60a5fa; }
.gradio-container .switches .wrap { max-height: 11rem; overflow-y: auto; }
"""
"""CSS of what `render` and `render_request` write, in both of Gradio's color schemes (`.dark` on the body)."""


def escape(text: str) -> str:
    """Escape a text for HTML; characters that no page may hold become visible symbols."""
    return html.escape(visible(text), quote=True)


def _probability(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def _taken(token: Token, experts: Sequence[str], off: Collection[int]) -> str:
    """Return the experts that a token opens, heaviest first, with their weights."""
    opened = sorted(((w, -d) for d, w in enumerate(token.gates) if w > 0), reverse=True)
    return ", ".join(f"{experts[-d]} {w:.2f}{' (switched off)' if -d in off else ''}" for w, d in opened)


def describe(token: Token, found: Analysis) -> str:
    """Describe a token for hover, keyboard and screen readers: entropy, experts, probability before and after."""
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
    """Return an entropy's place on the color scale, 0 to 1; 0 for a token without one."""
    return 0.0 if math.isinf(entropy) else min(max(entropy / top, 0.0), 1.0)


def _token(token: Token, found: Analysis, first: bool) -> str:
    # an unfinished character is shown as a dot, a line break by its sign as well
    text = escape(token.text).replace("\n", '<span class="mark">\u21b5</span>\n') or '<span class="mark">\u00b7</span>'
    entropy = "" if math.isinf(token.entropy) else f"{token.entropy:.6g}"
    change = 0.0 if math.isnan(token.before) else token.after - token.before
    style = f"--share:{share(token.entropy, found.top):.4f};--fall:{max(-change, 0):.4f};--rise:{max(change, 0):.4f}"
    if token.gates:
        style += f";--expert:{_color(max(range(len(token.gates)), key=token.gates.__getitem__))}"
    return (
        f'<span class="token{" high" if token.high and entropy else ""}" role="note" tabindex="{0 if first else -1}" '
        f'data-id="{token.id}" data-entropy="{entropy}" style="{style}" '
        f'aria-label="{escape(describe(token, found))}">{text}</span>'
    )


def _row(tokens: Sequence[Token], found: Analysis) -> str:
    # one stop for the Tab key; the arrow keys go on from there
    return f'<div class="tokens">{"".join(_token(token, found, n == 0) for n, token in enumerate(tokens))}</div>'


def _color(expert: int) -> str:
    """Return the CSS color of an expert; colors repeat from the eighth forget expert on."""
    return f"var(--e{0 if expert == 0 else (expert - 1) % 7 + 1})"


def _legend(found: Analysis) -> str:
    kind = "Shannon entropy" if found.q == 1 else f"Tsallis entropy, q = {found.q:g}"
    place = 100 * found.threshold / found.top
    end = f"{found.top:.2f}" if found.top == found.limit else f"{found.top:.2f} and more"
    how = "Point at a token, tap it, or go along them with Tab and the arrow keys, for its figures."
    swatches = "".join(
        f'<span style="margin-right:1.1em"><span class="swatch" style="background:{_color(d)}"></span>{escape(name)}</span> '
        for d, name in enumerate(found.experts)
        if any(token.gates[d] > 0 for token in (*found.prompt, *found.base.tokens, *found.unlearned.tokens))
    )
    return (
        f'<div class="legend"><div class="by entropy"><p class="soft">Color: entropy of the token under the original model '
        f"({kind}). Underlined: high, above the threshold of {found.threshold:.2f}. {how}"
        f'</p><div class="scale" role="img" aria-label="Color scale from 0 to {end}; the threshold is at '
        f'{found.threshold:.2f}"><i style="left:{place:.2f}%"></i></div><div class="ticks" aria-hidden="true"><span>0</span>'
        f'<b style="left:{place:.2f}%">{found.threshold:.2f}</b><span>{end}</span></div></div>'
        f'<div class="by expert"><p class="soft">Color: the expert that the token opens widest. {how}</p>'
        f"<p>{swatches or 'This adapter has no experts.'}</p></div>"
        f'<div class="by change"><p class="soft">Color: how much likelier or less likely the adapter makes the token where it '
        f'stands. {how}</p><p><span class="swatch" style="background:var(--fallen)"></span>from sure to impossible '
        f'<span style="margin-left:1em"><span class="swatch" style="background:var(--risen)"></span>from impossible to sure'
        f"</span></p></div></div>"
    )


def _experts(found: Analysis) -> str:
    if not found.experts:
        return '<p class="soft">This adapter has no experts: it is not one of ALTER\'s.</p>'
    groups = (found.prompt, found.unlearned.tokens)
    shares = [taken(group) for group in groups]

    def cell(part: float, expert: int) -> str:
        bar = f'<span class="bar" style="width:{100 * part:.1f}%;background:{_color(expert)}"></span>'
        return f'<td class="n share">{100 * part:.0f} %{bar}</td>'

    rows = "".join(
        f"<tr><td>{escape(name)}{' <b>(off)</b>' if d in found.off else ''}</td>"
        + "".join(cell(group[d] if group else 0.0, d) for group in shares)
        + "</tr>"
        for d, name in enumerate(found.experts)
        if any(group and group[d] for group in shares) or d in found.off
    )
    return (
        '<div class="wide"><table><thead><tr><th>Share of</th><th class="n">prompt</th>'
        f'<th class="n">unlearned answer</th></tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="soft" style="margin-top:.6rem">Shares of the weights with which tokens open experts. A low-entropy token '
        "takes one expert, a high-entropy token several. An expert acts when its token is read: it changes what comes after. "
        "In the unlearned answer high and low are judged by the entropy under the adapter, at the step that chose the "
        "token.</p>"
    )


def taken(tokens: Sequence[Token]) -> tuple[float, ...]:
    """Return each expert's share of the gates' weights over some tokens; the shares sum to 1. Empty for no tokens."""
    total = sum(sum(token.gates) for token in tokens)
    return (
        tuple(sum(column) / total for column in zip(*(token.gates for token in tokens), strict=True)) if total else ()
    )


@dataclass(frozen=True)
class About:
    """What the page says about its model and adapter.

    Attributes:
        model, adapter: names.
        kind: what the adapter is.
        forgotten: what was to be forgotten, in one line; empty if it is not known.
        questions: some of the prompts that were to be forgotten.
    """

    model: str
    adapter: str
    kind: str
    forgotten: str = ""
    questions: tuple[str, ...] = ()


def render_about(about: About) -> str:
    """Render what the page is about."""
    facts = {"model": about.model, "adapter": f"{about.adapter} ({about.kind})", "made to forget": about.forgotten}
    return f'<div class="alter"><dl class="about">{_facts(facts)}</dl></div>'


COLORS = (
    '<div class="alter colors"><fieldset><legend class="soft">Color by</legend>'
    + "".join(
        f'<label><input type="radio" name="color" id="color-{name}"{" checked" if name == "entropy" else ""}>{shown}</label>'
        for name, shown in {"entropy": "entropy", "expert": "expert", "change": "change of probability"}.items()
    )
    + "</fieldset></div>"
)
"""The page's choice of what colors mean; style sheets alone act on it."""


def render_begun(base: str, unlearned: str) -> str:
    """Render two answers that are still being generated."""

    def card(title: str, text: str, writing: bool) -> str:
        mark = " writing" if writing else ""
        return (
            f'<section class="card"><h3>{title} <span class="soft">{"being written" if writing else ""}</span></h3>'
            f'<div class="tokens{mark}" style="white-space:pre-wrap">{escape(text)}</div></section>'
        )

    # the original comes first
    begun = bool(unlearned)
    return (
        f'<div class="alter" aria-busy="true"><div class="pair">{card("Original", base, not begun)}'
        f"{card('Unlearned', unlearned, begun)}</div></div>"
    )


def render(found: Analysis) -> str:
    """Render an analysis: both answers side by side, the legend, the experts, the prompt. All text is escaped."""
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
    """Render one sentence that says what is wrong; a setting, which stands in backticks, as code."""
    said = re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))
    return f'<div class="alter"><p class="message" role="alert">{said}</p></div>'


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
    names = {
        "probability": "probability",
        "worded": "asked in other words",
        "exact_memorization": "memorized exactly",
        "rouge": "ROUGE-L",
        "said": "replies that give the answer",
        "unusable": "broken or empty replies",
    }
    body = "".join(
        f"<tr><td>{shown}</td>" + "".join(f'<td class="n">{told(c, name, "–")}</td>' for c in columns) + "</tr>"
        for name, shown in names.items()
    )
    by = f'<p class="soft">Reference: {escape(str(reference["by"]))}.</p>' if reference.get("by") else ""
    found = after.get("verdict") or {}
    word = str(found.get("word", "unproven"))
    reasons = list(found.get("why", []))
    n, revoked = after.get("n_answers"), request.state == "revoked"
    few = n is not None and n < FIRM
    if few:
        reasons.append(f"Only {n} answers stand behind this: a first look, no proof.")
    # green is for what is in force and rests on enough answers
    good = "good" if n is not None and not few and not revoked else "soft"
    tone = {"forgotten": good, "not forgotten": "bad", "collapsed": "bad"}.get(word, "soft")
    verdict = f'<p class="{tone}">{escape(word.upper())}. {escape(" ".join(reasons))}</p>'
    if revoked:
        verdict = f'<p class="bad">Revoked: what follows is of before, and no longer in force.</p>{verdict}'
    utility = after.get("utility_share")
    kept = "" if utility is None else f"<p>Utility kept: {utility:.4f} of the untouched model.</p>"
    return (
        f'<div class="wide"><table data-evidence><thead><tr><th></th><th class="n">before</th><th class="n">after</th>'
        f'<th class="n">reference</th></tr></thead><tbody>{body}</tbody></table></div>'
        f'<div style="margin-top:.7rem">{by}{verdict}{kept}</div>'
    )


def render_request(store: Store, request: Request) -> str:
    """Render a request: facts, evidence, history, and whether the chain of the history is whole.

    The rows to forget are not shown, even where the database holds them.
    """
    wrong = store.check_chain()
    entries = store.history(request.id)
    chain = (
        f'<p class="bad" role="alert">The history does not verify: {escape(" ".join(wrong))}</p>'
        if wrong
        # that nothing was altered does not say that anything was forgotten: no colour for it
        else f'<p>Chain verified. <span class="soft">Head <code>{escape(store.head())}</code></span></p>'
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
