"""Computations on logits that are never held whole.

`entropy`: Shannon and Tsallis entropies of tokens, and the threshold between high and low ones. `head`: the language-model
head on selected rows, in chunks. `depth`: the hidden states after one block, for which nothing behind it need run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.logits.depth import Depth as Depth
    from alter.logits.depth import states_of as states_of
    from alter.logits.entropy import PAPER_THRESHOLD as PAPER_THRESHOLD
    from alter.logits.entropy import check_order as check_order
    from alter.logits.entropy import check_threshold as check_threshold
    from alter.logits.entropy import chunk_rows as chunk_rows
    from alter.logits.entropy import entropy_from_hidden as entropy_from_hidden
    from alter.logits.entropy import entropy_from_logits as entropy_from_logits
    from alter.logits.entropy import max_entropy as max_entropy
    from alter.logits.entropy import shift as shift
    from alter.logits.entropy import threshold_from_quantile as threshold_from_quantile
    from alter.logits.head import Head as Head
    from alter.logits.head import Part as Part
    from alter.logits.head import head_on as head_on
    from alter.logits.head import measuring as measuring
    from alter.logits.head import standing_in as standing_in

lazy(globals())
