"""`alter meta-evaluate`: which metrics to trust.

`members` makes pools of models that know or do not know, `measuring` tries every metric on them, `formulas` rates the
metrics and `table` ranks them; `settings` and `run` are the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.metaevaluation.run import meta_evaluate as meta_evaluate
    from alter.metaevaluation.settings import MetaEvaluate as MetaEvaluate
    from alter.metaevaluation.table import Table as Table

lazy(globals())
