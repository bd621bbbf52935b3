"""`alter guard`: make a guard at inference from a model and rows, and save it as a folder for `--adapter`.

`eco` fits a classifier of prompts, `neurons` measures what Neuron Adjust and Key Space Detection need; `settings` and
`run` are the command. How guards act is in `alter.models`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.guarding.run import make_guard as make_guard
    from alter.guarding.settings import MakeGuard as MakeGuard

lazy(globals())
