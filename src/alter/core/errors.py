"""Errors that tell a user what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: one line that names the value, what was expected and the fix.

    A setting stands in it as its name in backticks (`max_steps`, `adapter.r`, or `run=False` for a switch that is off); the
    command line makes its flag of it (`alter.settings.flags.with_flags`).
    The command line prints it without a traceback and exits with its `status`.
    """

    status = 2


class Finding(UserError):
    """What was asked for was done, and what was measured or checked then speaks against it: not forgotten, collapsed, altered.

    Nothing in what the user gave has to be wrong: a script can tell it from a mistake by its `status`.
    """

    status = 3


class Unfinished(UserError):
    """Part of what was asked for was not done, through no mistake of the user; the same command goes on with it."""

    status = 75


def passing(error: BaseException) -> bool:
    """Tell whether an error comes from the system (a full disk, a file that cannot be read): it may be gone the next time."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError):
            return True
        each = each.__cause__ or each.__context__
    return False


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the choice nearest to `value`, or an empty string if none is near.

    Paths in the folder of `value` are compared by what follows it: all would be near by the folder alone.
    """
    known, folder = list(choices), value[: value.rfind("/") + 1]
    beside = [choice.removeprefix(folder) for choice in known if choice.startswith(folder)]
    match = difflib.get_close_matches(value.removeprefix(folder), beside, n=1, cutoff=0.5)
    others = difflib.get_close_matches(value, known, n=1, cutoff=0.5) if folder and len(beside) < len(known) else []
    if match:
        return f" Did you mean {folder + match[0]!r}?"
    return f" Did you mean {others[0]!r}?" if others and not others[0].startswith(folder) else ""
