"""Quotes of what was to be forgotten: cut to a length that a page holds, marked, and with what a reader must know of them."""

from __future__ import annotations

from alter.rendering import Html, highlighted, tag

SHOWN_CHARACTERS = 1200
"""Characters of a text that the page shows; the differences are those of the part shown."""


def short(whole: str) -> str:
    """Return a text, cut off where it is longer than a page shows."""
    return whole if len(whole) <= SHOWN_CHARACTERS else whole[:SHOWN_CHARACTERS] + " … (cut)"


def reply_shown(truth: str, said: str, asked: str) -> Html:
    """Return a reply with what it gives away of the truth marked; one that says nothing says so."""
    return highlighted(short(truth), short(said), asked) if said.strip() else tag("em", "(no answer)")


def notice(what: str, *, asked: bool = True) -> Html:
    """Return what a reader must know before quotes: that they are the data itself, and what the marks are.

    Args:
        what: quotes, as the subject of a sentence.
        asked: whether the questions are known, whose words are not marked.
    """
    apart = (
        ", and not from the question: they are what a reply gives away."
        if asked
        else "; some may be the question's own."
    )
    return tag(
        "p",
        f"{what} what was to be forgotten: handle the page like the data itself (",
        tag("code", "alter report --samples 0", class_="flag"),
        " leaves quotes out). ",
        tag("mark", "Underlined words"),
        f" are from the true answer, in its order{apart}",
    )
