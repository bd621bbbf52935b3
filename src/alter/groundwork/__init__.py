"""What a method needs before its first step, measured or generated on the untouched model.

`frozen` is the pass over the rows that all may share; `passes` and `probes` serve initialisers and importance, `tracing` the
places where facts lie, `sparse` and `recognition` the codes of a sparse autoencoder. `alternatives` and `invented` are other
answers, `reinforcement` the settings of a model that knows the rows still better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.groundwork import frozen as frozen
    from alter.groundwork.alternatives import persona_views as persona_views
    from alter.groundwork.frozen import FrozenRow as FrozenRow
    from alter.groundwork.frozen import frozen_pass as frozen_pass
    from alter.groundwork.passes import MeasuredGradients as MeasuredGradients
    from alter.groundwork.passes import starting_factors as starting_factors
    from alter.groundwork.probes import low_rank as low_rank
    from alter.groundwork.probes import reinforce as reinforce
    from alter.groundwork.recognition import codes_from as codes_from
    from alter.groundwork.recognition import ignorance as ignorance
    from alter.groundwork.recognition import marked as marked
    from alter.groundwork.recognition import measure_codes as measure_codes
    from alter.groundwork.recognition import subjects as subjects
    from alter.groundwork.reinforcement import Reinforcement as Reinforcement
    from alter.groundwork.sparse import read_autoencoder as read_autoencoder
    from alter.groundwork.tracing import recovered as recovered

lazy(globals())
