"""Erasure requests over time: who asked, what was forgotten, which expert holds it, the evidence, and revoking.

The database is `store`, on `tables`, `records`, `chain` (the history's hashes), `connection` and `anchor`. `work` runs
and revokes requests, with `evidence`, `concluding`, `versions` of the adapter, `bases` and `removal`; `checking` finds
whether they hold. The commands are `intake`, `register`, `commands`, `verification`, `rebasing`, `export` and
`certificate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.requests.bases import present as present
    from alter.requests.checking import check_requests as check_requests
    from alter.requests.records import Entry as Entry
    from alter.requests.records import Request as Request
    from alter.requests.records import parse_id as parse_id
    from alter.requests.store import Store as Store

lazy(globals())
