"""ALTER: asymmetric LoRA for token-entropy-guided unlearning (Chen et al., AAAI 2026, arXiv:2603.01792).

`import alter` is all it takes for PEFT to load and make ALTER adapters. The registration itself waits until `peft` is
imported (`alter.core.registration`), so that the command line can print its help without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy
from alter.core.registration import after

if TYPE_CHECKING:
    from alter.adapter import AlterConfig as AlterConfig
    from alter.adapter import AlterModel as AlterModel
    from alter.api import Run as Run
    from alter.api import attack as attack
    from alter.api import compare as compare
    from alter.api import distill as distill
    from alter.api import evaluate as evaluate
    from alter.api import export as export
    from alter.api import finetune as finetune
    from alter.api import forget as forget
    from alter.api import guard as guard
    from alter.api import load as load
    from alter.api import meta_evaluate as meta_evaluate
    from alter.api import report as report
    from alter.api import unlearn as unlearn
    from alter.core.errors import UserError as UserError

lazy(globals())

__version__ = "0.1.0"

after("peft", "alter.adapter")
