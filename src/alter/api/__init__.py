"""The commands as functions: settings objects or keywords in, results out, nothing printed.

Notes and progress go to the logger `alter` (see `alter.core.console.silent`). Every setting of a command is a keyword of
its function; a settings object may be given in place of keywords, or with keywords that override it.

`making` has what makes a model, an adapter or a file of one, `measuring` what looks at them, `loading` loads them; `runs` is a
finished run on the disk, and `given` turns what a caller gives into a command's settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.api.loading import load as load
    from alter.api.making import distill as distill
    from alter.api.making import export as export
    from alter.api.making import finetune as finetune
    from alter.api.making import forget as forget
    from alter.api.making import guard as guard
    from alter.api.making import unlearn as unlearn
    from alter.api.measuring import attack as attack
    from alter.api.measuring import compare as compare
    from alter.api.measuring import evaluate as evaluate
    from alter.api.measuring import meta_evaluate as meta_evaluate
    from alter.api.measuring import report as report
    from alter.api.runs import Run as Run

lazy(globals())
