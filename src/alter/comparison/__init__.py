"""`alter compare`: methods side by side, each with an equal budget for its search.

`settings` and `plan` lay out every cell (method, seed, split, setting) before the first one runs; `cells`, `executors`,
`clusters` and `forks` run them, each by `cell` in a folder of its own, and `distilling` says which are distilled before they are
measured; `division` and `choice` choose settings on validation rows; `table`, `plot`, `words` and `export` show the
result, and `survival` what of the model survives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.comparison.distilling import distilled_rows as distilled_rows
    from alter.comparison.plan import run_of as run_of
    from alter.comparison.run import compare as compare
    from alter.comparison.settings import Compare as Compare

lazy(globals())
