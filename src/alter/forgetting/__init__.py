"""`alter forget`: from a subject or a document to rows, probes, an adapter, and a measure of what changed.

`names`, `templates` and `documents` say what is asked, `speaker` who answers, `facts` and `certainty` what the model
knows of it; `rows`, `probes` and `retention` are made of that (`material` is their files). `stopping` ends training,
`measure` and `report` compare before and after; `settings` and `run` are the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.forgetting.run import forget as forget
    from alter.forgetting.settings import Forget as Forget

lazy(globals())
