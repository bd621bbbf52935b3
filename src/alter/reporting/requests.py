"""The section about erasure requests: each one's state and evidence, and whether their history is whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from alter.evaluation import FIRM, WORDINGS
from alter.evaluation.told import told
from alter.rendering import Html, grid, join, percent, tag
from alter.reporting.summary import ADAPTER

if TYPE_CHECKING:
    from alter.requests import Entry, Request

HEAD = (
    "request",
    "state",
    "received",
    "due",
    "rows",
    "still said before",
    "after",
    "broken or empty",
    "in other words before",
    "after",
    "probability before",
    "after",
    "reference",
    "utility",
    "data",
)

DISTILLED = (
    "A distilled request is forgotten by the weights themselves: nothing can be switched off. Its figures are of these weights "
    "beside those of the model before; that model, wherever it still lies, holds the knowledge."
)


def requests(url: str, names: Sequence[str]) -> list[Html]:
    """Show what a database of erasure requests holds: each one's state and evidence, and whether its history is whole.

    Args:
        url: of the database.
        names: the requests to show, each with its history; all if there are none.

    Raises:
        UserError: no such database or request.
    """
    from alter.requests import Store, check_requests, parse_id, present

    store = Store.open(url)
    project = present(store)
    chosen = [store.get(number) for number in dict.fromkeys(map(parse_id, names))] if names else store.requests()
    if project.root.is_dir():
        wrong = check_requests(store, project, behaviour=False).wrong
        checked = "History and adapter were checked when this page was made"
    else:
        wrong = store.check_chain()
        checked = f"The adapter's folder {project.root.name} is not here, so only the history itself was checked"
    history = store.history()
    shown = [*_whole(wrong, checked, store.head()), _measured_again(history)]
    if not chosen:
        return [
            *shown,
            tag("p", "The database holds no request yet: ", tag("code", "alter request add"), " adds one."),
        ]
    shown += [_evidence(chosen, _back(history, chosen)), _limits(chosen)]
    left = len(store.requests()) - len(chosen)
    if left:
        shown.append(tag("p", f"{left} other requests are left out.", class_="small soft"))
    for request in chosen if names else ():
        shown += _history_of(request, history)
    return shown


def _whole(wrong: Sequence[str], checked: str, head: str) -> list[Html]:
    # that nothing was altered does not say that anything was forgotten: no colour for it
    good = tag("span", "Unchanged since it was recorded.", class_="verdict")
    bad = tag("span", "Not as it should be.", class_="verdict bad")
    found = " ".join(wrong) or "nothing was altered. Whether a request was forgotten is in its own line."
    return [
        tag("p", bad if wrong else good, f" {checked}: ", found, " "),
        tag("p", "Head of the hash chain: ", tag("code", head), ". Written down elsewhere, it fixes all before it."),
    ]


def _checks(history: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in history if entry.what == "verified"]


def _back(history: Sequence[Entry], chosen: Sequence[Request]) -> set[int]:
    """Return the requests that had come back when the model was last measured again."""
    wrong = _checks(history)[-1].details.get("wrong", []) if _checks(history) else []
    return {
        request.id for request in chosen if any(line.startswith(f"{request.name} has come back") for line in wrong)
    }


def _measured_again(history: Sequence[Entry]) -> Html:
    checks = _checks(history)
    if not checks:
        command = tag("code", "alter request verify")
        return tag("p", "The model was not measured again since; ", command, " does it.")
    last = checks[-1]
    wrong = " ".join(last.details.get("wrong", []))
    result = tag("span", wrong, class_="verdict bad") if wrong else "nothing had come back since it was recorded."
    return tag("p", f"The model was last measured again on {last.at} by {last.who}: ", result)


def _evidence(chosen: Sequence[Request], back: Collection[int]) -> Html:
    caption = (
        "still said: replies that give the answer. probability: of the true answers, per token, and before it the same "
        "where the questions are put in other words; the reference never saw the data. utility: share of the untouched model's. data: beginning of the SHA-256 of the rows."
    )
    rows = [_line(request, request.id in back) for request in chosen]
    return grid(HEAD, rows, label="Erasure requests", numbers=range(4, 14), caption=caption, reference=12)


def _line(request: Request, back: bool = False) -> list[object]:
    before, after = request.before or {}, request.after or {}
    state = f"{request.state.upper() if after else request.state}{', has come back since' if back else ''}"
    share = after.get("utility_share")
    return [
        f"{request.name}: {request.subject or '(purged)'}",
        tag("span", state, class_="verdict bad" if back else _tone(request)),
        request.received[:10],
        request.due or "-",
        request.rows,
        told(before, "said", "-"),
        told(after, "said", "-"),
        told(after, "unusable", "-"),
        *(told(part, "worded", "-") for part in (before, after)),
        *(told(part, "probability", "-") for part in (before, after, after.get("reference"))),
        "-" if share is None else percent(share),
        tag("code", request.data_hash[:16]),
    ]


def _tone(request: Request) -> str:
    """Return the colour of a state: green only for requests found forgotten by enough answers, and not for outdated figures."""
    if request.state in ("not forgotten", "collapsed", "failed"):
        return "verdict bad"
    after = request.after or {}
    firm = after.get("n_answers", 0) >= FIRM
    word = after.get("verdict", {}).get("word") if request.state == "distilled" else request.state
    return "verdict good" if word == "forgotten" and firm else "verdict"


def _limits(chosen: Sequence[Request]) -> Html:
    """Describe what the evidence does not show, and the reasons of each verdict."""
    distilled = [request.state == "distilled" for request in chosen]
    limits = (
        *([] if all(distilled) else [ADAPTER]),
        *([DISTILLED] if any(distilled) else []),
        _asked(chosen),
        f"Of fewer than {FIRM} answers nothing is coloured: the intervals in the reasons say how little they prove.",
    )
    reasons = [_reason(request) for request in chosen if (request.after or {}).get("verdict")]
    return tag("div", tag("ul", *(tag("li", limit) for limit in limits), *reasons), class_="answers")


def _asked(chosen: Sequence[Request]) -> Html:
    """Say in which words the questions were asked: those of texts, and of evidence of long ago, in their own alone."""
    measured = [request for request in chosen if request.after]
    plain = [request.name for request in measured if request.after and request.after.get("worded") is None]
    words = ", in their own words"
    if len(plain) < len(measured):
        alone = f" ({', '.join(plain)} in their own words alone)" if plain else ""
        words = f", as given and in other words: {', '.join(WORDINGS)}{alone}"
    attack = tag("code", "alter attack")
    return join(
        [f"Asked were the questions of the data{words}. Other wordings, other languages, longer talks and attacks were not "
         "tested here: ", attack, " tries some."]
    )  # fmt: skip


def _reason(request: Request) -> Html:
    after = request.after or {}
    few = after.get("n_answers") is not None and after["n_answers"] < FIRM
    small = f" Only {after['n_answers']} answers stand behind this: a first look, no proof." if few else ""
    return tag("li", f"{request.name}: {' '.join(after['verdict']['why'])}{small}")


def _history_of(request: Request, history: Sequence[Entry]) -> list[Html]:
    entries = [entry for entry in history if entry.request == request.id]
    lines = [[entry.at, entry.what, entry.who, tag("code", entry.hash[:16])] for entry in entries]
    title = f"History of {request.name}"
    return [tag("h3", title), grid(["when", "what", "who", "hash"], lines, label=title)]
