"""Public: load a model as the commands do, and ask it for probabilities and answers.

`load_model` takes what `--model` and `--adapter` take and gives the model, ready to be asked, and its tokenizer (`shipped_model`
says where one that ships with the package lies). `score` gives the log-probabilities of encoded rows (`alter.data.encode`) as
`Scores`; `generate` the answers to prompts, which end at the model's `stop_ids` and fit its `context_length`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.inference import Scores as Scores
    from alter.inference import context_length as context_length
    from alter.inference import generate as generate
    from alter.inference import score as score
    from alter.inference import stop_ids as stop_ids
    from alter.models import load_model as load_model
    from alter.models import shipped_model as shipped_model

lazy(globals())
