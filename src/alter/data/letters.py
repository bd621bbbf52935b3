"""E-mails as text: who wrote to whom, when, about what, and the letter itself."""

from __future__ import annotations

import re
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from html.parser import HTMLParser
from pathlib import Path

from alter.core import UserError, warn

LETTER = ".eml"
"""Ending of a file that holds one e-mail."""
HEADERS = ("From", "To", "Cc", "Date", "Subject")
"""What is read of a letter's head; the rest is how it was sent."""
BREAKS = {"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "table", "ul", "ol"}
"""Elements of a page that begin a line."""
UNSEEN = {"style", "script", "head", "title"}
"""Elements of a page whose text nobody sees."""


class _Words(HTMLParser):
    """Collects the text of a page that is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BREAKS:
            self.parts.append("\n\n" if tag == "p" else "\n")
        self._unseen += tag in UNSEEN

    def handle_endtag(self, tag: str) -> None:
        if tag in UNSEEN and self._unseen:
            self._unseen -= 1
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            # lines of the source are none of the page
            self.parts.append(re.sub(r"\s+", " ", data))


def _seen(page: str) -> str:
    words = _Words()
    words.feed(page)
    words.close()
    lines = [line.strip() for line in "".join(words.parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def letter_text(path: Path) -> str:
    """Return an e-mail (RFC 5322, `.eml`) as text: its `HEADERS` as a sentence, a blank line, and its body, plain if it has one, else the page's text.

    Marks of quotation (`>`) are left out. Attached files are not read, which is said.

    Raises:
        UserError: the file cannot be read, is no e-mail, or holds no text.
    """
    try:
        letter = BytesParser(EmailMessage, policy=policy.default).parsebytes(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    assert isinstance(letter, EmailMessage)
    if not any(letter.get(name) for name in HEADERS):
        raise UserError(
            f"{path} is no e-mail: it begins with none of {', '.join(HEADERS)}. Save its text as a .txt file."
        )
    body = letter.get_body(("plain", "html"))
    try:
        text = "" if body is None else str(body.get_content())
    except (LookupError, ValueError) as error:
        raise UserError(
            f"{path}: its text is in a form that cannot be read ({error}): save it as a .txt file."
        ) from None
    text = _seen(text) if body is not None and body.get_content_subtype() == "html" else text.replace("\r\n", "\n")
    text = re.sub(r"^(?:>[ \t]*)+", "", text, flags=re.MULTILINE).strip()
    attached = [
        part.get_filename() or part.get_content_type() for part in letter.iter_attachments() if part is not body
    ]
    if not text:
        also = f" (attached: {', '.join(attached)})" if attached else ""
        raise UserError(f"{path} is an e-mail without text{also}: give what is to be read as a file of its own.")
    if attached:
        warn(f"{path}: files attached to it are not read ({', '.join(attached)}).")
    return f"{_head(letter)}\n\n{text}\n"


def _head(letter: EmailMessage) -> str:
    """Return who wrote to whom, when and about what as a sentence: labels and times of day would pass for names and numbers of the letter."""
    sender, to, copy, subject = (
        " ".join(str(letter.get(name) or "").split()) for name in ("From", "To", "Cc", "Subject")
    )
    sent = getattr(letter.get("Date"), "datetime", None)
    day = f" on {sent.day} {sent:%B %Y}" if sent else ""
    others = " and ".join(filter(None, (to, copy)))
    return f"{sender or 'Somebody'} wrote{f' to {others}' if others else ''}{day}{f': {subject}' if subject else '.'}"
