"""What is asked of a loaded model: `scoring` log-probabilities, `generation` replies, `internals` gradients and states,
`moments` inputs.

`telling` is what scores say of replies. Batches are spread over the processes of a launch; no gradient is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.inference.decoding import SEGMENT as SEGMENT
    from alter.inference.decoding import Finite as Finite
    from alter.inference.decoding import stop_ids as stop_ids
    from alter.inference.generation import can_drop_rows as can_drop_rows
    from alter.inference.generation import check_prompts as check_prompts
    from alter.inference.generation import contiguous_head as contiguous_head
    from alter.inference.generation import generate as generate
    from alter.inference.generation import left_padded as left_padded
    from alter.inference.generation import sample as sample
    from alter.inference.internals import gradient_norms as gradient_norms
    from alter.inference.internals import hidden_states as hidden_states
    from alter.inference.moments import InputMoments as InputMoments
    from alter.inference.passes import check_embedded as check_embedded
    from alter.inference.passes import context_length as context_length
    from alter.inference.passes import evaluating as evaluating
    from alter.inference.passes import prompted as prompted
    from alter.inference.passes import virtual_tokens as virtual_tokens
    from alter.inference.scoring import MAX_LOGITS as MAX_LOGITS
    from alter.inference.scoring import Scores as Scores
    from alter.inference.scoring import check_rows as check_rows
    from alter.inference.scoring import decided as decided
    from alter.inference.scoring import score as score
    from alter.inference.scoring import score_beside_base as score_beside_base
    from alter.inference.telling import begun_replies as begun_replies

lazy(globals())
