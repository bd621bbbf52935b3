"""`alter distill`: train plain weights that no longer know what an adapter hides.

`run` reads downwards: `settings` completed from a run's folder, `checks`, `rows`, the `teacher`'s distributions,
`noise` on the student, its training in `trainer`, with an `attacker` in the loop and `protection` of what must stay,
and the measures of `closing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.distillation.naming import check_named as check_named
    from alter.distillation.rows import read_sets as read_sets
    from alter.distillation.run import distill as distill
    from alter.distillation.settings import Distill as Distill

lazy(globals())
