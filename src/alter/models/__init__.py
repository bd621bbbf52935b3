"""Models from outside: loaded by name, quantised, guarded.

`naming` resolves a name and `loading` loads it (`tokenizers`, `gguf`, `quantized`, `deltas`, `devices`, `precision`), with an
adapter by `attach`; `given` checks one that is an object. `guards` are unlearned models that an adapter inside one network
cannot express.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.models import gguf as gguf
    from alter.models.gguf import ENDING as ENDING
    from alter.models.gguf import gguf_place as gguf_place
    from alter.models.given import check_callbacks as check_callbacks
    from alter.models.given import check_given as check_given
    from alter.models.guards import FORM_FILE as FORM_FILE
    from alter.models.guards import Form as Form
    from alter.models.guards import Former as Former
    from alter.models.guards import Guard as Guard
    from alter.models.guards import first_blocks as first_blocks
    from alter.models.guards import fit_detector as fit_detector
    from alter.models.guards import is_form as is_form
    from alter.models.guards.corruption import CLASSIFIER as CLASSIFIER
    from alter.models.guards.corruption import Corrupted as Corrupted
    from alter.models.guards.corruption import PromptClassifier as PromptClassifier
    from alter.models.guards.corruption import after_block as after_block
    from alter.models.guards.corruption import as_names as as_names
    from alter.models.guards.corruption import states_after as states_after
    from alter.models.guards.likeness import window_means as window_means
    from alter.models.guards.neurons import NEURONS as NEURONS
    from alter.models.guards.neurons import Abstaining as Abstaining
    from alter.models.guards.neurons import Adjusted as Adjusted
    from alter.models.guards.neurons import by_token as by_token
    from alter.models.guards.neurons import keys_of as keys_of
    from alter.models.loading import ModelSettings as ModelSettings
    from alter.models.loading import load_classifier as load_classifier
    from alter.models.loading import load_model as load_model
    from alter.models.naming import check_model_name as check_model_name
    from alter.models.naming import is_local as is_local
    from alter.models.naming import shipped_model as shipped_model
    from alter.models.precision import autocasts as autocasts
    from alter.models.precision import multiplies as multiplies
    from alter.models.quantized import Bits as Bits
    from alter.models.quantized import plain_weight as plain_weight

lazy(globals())
