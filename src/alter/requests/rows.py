"""Rows of erasure requests: read received rows back, and refuse rows that contradict the retain set."""

from __future__ import annotations

import json
from collections.abc import Sequence

from alter.core import UserError, warn
from alter.data import Example, data_hash, examples, load_examples, row_hash, rows_about
from alter.requests.records import Request

NOT_THERE = "Its rows are gone, or are not those that were received."
"""Written down of a request whose rows cannot be read: no location, which nothing could take out of the history again."""


def received_rows(request: Request) -> list[Example]:
    """Return the rows of a request, read from their source or from the database.

    Raises:
        UserError: they cannot be read, or are not those that were received.
    """
    if request.text is None and not request.data:
        raise UserError(
            f"The rows of {request.name} were purged: nothing can be measured or learned of them any more."
        )
    if request.text is not None:
        found = examples([json.loads(line) for line in request.text.split("\n")])
    else:
        found = load_examples(request.data)
    hashes = [row_hash(example) for example in found]
    if data_hash(hashes) != request.data_hash:
        changed = len(set(hashes) ^ set(request.row_hashes))
        raise UserError(
            f"The data of {request.name} at {request.data} is not what was received on {request.received[:10]}: "
            f"{len(found)} rows now, {request.rows} then, {changed} of them different. Restore the file, or withdraw "
            "the request and add it again."
        )
    return found


def rows_if_there(request: Request) -> list[Example] | None:
    """Return the rows of a request; None where they cannot be read, after a warning that says why unless they were purged."""
    try:
        return received_rows(request)
    except UserError as error:
        if request.data or request.text is not None:
            warn(str(error))
        return None


def check_kept_subject(subject: str, retain: Sequence[Example]) -> None:
    """Refuse a subject that the retain set mentions: training on those rows would keep it.

    Raises:
        UserError: names the rows.
    """
    named = [example.index for example in rows_about(subject, retain)]
    if named:
        raise UserError(
            f"{subject!r} is in the retain set ({len(named)} rows, first {', '.join(map(str, named[:5]))}), which would "
            "keep what is to be forgotten. Take these rows out of it and make a new project, or add the request with "
            "`allow_in_retain` if they are about another one of that name."
        )


def check_unseen(holdout: Sequence[Example], retain: Sequence[Example]) -> None:
    """Refuse a holdout that shares rows with the retain set.

    Raises:
        UserError: says how many.
    """
    shared = {row_hash(example) for example in holdout} & {row_hash(example) for example in retain}
    if shared:
        raise UserError(f"{len(shared)} rows of the holdout are in the retain set: it must be unseen.")
