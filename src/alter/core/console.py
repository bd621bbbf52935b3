"""Output of running work: results, notes and progress, on the screen or, as a library, through `logging`."""

from __future__ import annotations

import contextlib
import logging
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

LOG = logging.getLogger("alter")
"""Where notes (warning) and progress (info) go when the package is used as a library."""

_silent: ContextVar[bool] = ContextVar("silent", default=False)
_worded: ContextVar[Callable[[str], str]] = ContextVar("worded", default=str)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Inside the block, write nothing to standard output or error; notes and progress go to the logger `alter`.

    A progress record carries `label`, `done` and `total` as attributes, so that a handler can draw its own bar.
    """
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


@contextlib.contextmanager
def wording(worded: Callable[[str], str]) -> Iterator[None]:
    """Inside the block, messages are printed as `worded` returns them: the command line makes flags of settings' names."""
    token = _worded.set(worded)
    try:
        yield
    finally:
        _worded.reset(token)


def worded(message: object) -> str:
    """Return an error or a note as the user of this interface reads it (see `wording`); as it is where nothing rewords it."""
    return _worded.get()(str(message))


def ignore_known_warnings() -> None:
    """Ignore, from here on, what libraries warn of that is no news for a user."""
    # of a wrong value in a recipe, which is refused in a line of our own
    warnings.filterwarnings("ignore", "The field `", UserWarning, r"tyro\.")
    warnings.filterwarnings("ignore", ".* does not match any type in Union", UserWarning, r"tyro\.")
    # the former names are those of every release since 5.0
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    # PEFT looks for the configuration of the base in a folder, and a GGUF file holds its own: no vocabulary was changed
    warnings.filterwarnings("ignore", "Could not find a config file in ", UserWarning)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(known in record.getMessage() for known in ("gemm_4bit_forward", "LOAD REPORT"))


# said while it is imported, long before `ignore_known_warnings`, on processors for which it has a faster kernel in another package
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
# of weights that do not fit a configuration, which is an error of one line here
logging.getLogger("transformers.modeling_utils").addFilter(_is_news)


def is_silent() -> bool:
    """Tell whether the code runs inside `silent`."""
    return _silent.get()


def show(result: Any, *, stderr: bool = False, **options: Any) -> None:
    """Print a result (text, without markup, or anything that rich can draw), unless the package is used as a library.

    Text on stderr is a note: settings are named in it as in `warn`.
    """
    if not _silent.get():
        from rich.console import Console

        # a path, a name or a reply in a text may hold brackets, or what moves the cursor
        text = isinstance(result, str)
        shown = plain(worded(result) if stderr else result) if text else result
        Console(stderr=stderr, soft_wrap=text).print(shown, **{"markup": False} | options)


def warn(note: str) -> None:
    """Print a note on stderr, without markup; as a library: log it as a warning.

    A setting stands in it as its name in backticks (`max_steps`); on the command line the user reads its flag.
    """
    if _silent.get():
        LOG.warning(note)
        return
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(plain(worded(note)))


def tell(text: str) -> None:
    """Print a line about running work on stderr, without markup; as a library: log it as info."""
    if _silent.get():
        LOG.info(text)
    else:
        show(text, stderr=True, highlight=False)


def plain(value: object) -> str:
    """Return a text as a terminal can show it: control characters, which could move the cursor or hide text, as \\x1b.

    Spaces of every script stay, and the joiners that Persian, Hindi and emoji are written with.
    """
    return "".join(char if _harmless(char) else char.encode("unicode_escape").decode() for char in str(value))


def _harmless(char: str) -> bool:
    if char.isprintable() or char in "\n\t\u200c\u200d":
        return True
    return unicodedata.category(char) == "Zs"


def cell(value: object, style: str = "") -> Any:
    """Return a text for a table of rich, without markup: brackets in it stay brackets."""
    from rich.text import Text

    return Text(plain(value), style=style, overflow="fold")


BEAT = 30.0
"""Seconds between two lines of progress where no bar can be drawn: in a file or a pipe."""


class Beats:
    """Tells on stderr how far work is, for a log: a line whenever `BEAT` seconds have passed since the last one."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total = label, total
        self.begun = self.told = time.monotonic()
        self.first = done

    def __call__(self, done: int, more: str = "") -> None:
        """Tell that `done` of all steps are done, and `more` (a loss) behind it, if it is time to."""
        now = time.monotonic()
        if now - self.told < BEAT or not self.first < done < self.total:
            return
        self.told = now
        left = (now - self.begun) / (done - self.first) * (self.total - done)
        about = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        parts = [f"{self.label}: {done} of {self.total}", *([more] if more else []), f"about {about} left"]
        show(", ".join(parts), stderr=True, highlight=False)


def progress(iterable: Iterable[T], *, total: int, label: str, lines: bool = True) -> Iterator[T]:
    """Yield the items while a progress bar with time left is shown on stderr; in a file or pipe, lines (see `Beats`).

    As a library: log each step as info. Without `lines` the caller tells of each item itself.
    """
    if _silent.get():
        for done, item in enumerate(iterable, 1):
            yield item
            LOG.info("%s: %d of %d", label, done, total, extra={"label": label, "done": done, "total": total})
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_interactive:
        # rich would leave an empty line in the file or log for every bar
        tell = Beats(label, total)
        for done, item in enumerate(iterable, 1):
            yield item
            if lines:
                tell(done)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(iterable, total=total, description=label)
