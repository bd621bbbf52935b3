"""What a method is made of, and the published combinations.

`adapters` say what is trained, `initializers` where it starts, `objectives` what for, `gradients` how the forget
term's gradient is edited; `presets` combine these under published names. The rest serves what a part may ask for:
passes over the untouched model (`frozen`, `passes`, `probes`, `tracing`, `reinforcement`), other answers
(`alternatives`, `invented`), sparse codes (`sparse`, `recognition`), and `places` in the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.methods import frozen as frozen
    from alter.methods import presets as presets
    from alter.methods.adapters import AlterAdapter as AlterAdapter
    from alter.methods.adapters import AnyAdapter as AnyAdapter
    from alter.methods.adapters import Beginning as Beginning
    from alter.methods.adapters import Penalty as Penalty
    from alter.methods.adapters import adapter_of as adapter_of
    from alter.methods.adapters.expert import attributed as attributed
    from alter.methods.alternatives import persona_views as persona_views
    from alter.methods.frozen import Depth as Depth
    from alter.methods.frozen import FrozenRow as FrozenRow
    from alter.methods.frozen import states_of as states_of
    from alter.methods.gradients import AnyGradient as AnyGradient
    from alter.methods.gradients import GradientRule as GradientRule
    from alter.methods.gradients import Plain as Plain
    from alter.methods.initializers import AnyInitializer as AnyInitializer
    from alter.methods.initializers import Factors as Factors
    from alter.methods.initializers import Zero as Zero
    from alter.methods.objectives import Codes as Codes
    from alter.methods.objectives import CrossEntropy as CrossEntropy
    from alter.methods.objectives import Emitted as Emitted
    from alter.methods.objectives import ForgetObjective as ForgetObjective
    from alter.methods.objectives import Hidden as Hidden
    from alter.methods.objectives import InvertedHinge as InvertedHinge
    from alter.methods.objectives import Labelled as Labelled
    from alter.methods.objectives import Needs as Needs
    from alter.methods.objectives import Objective as Objective
    from alter.methods.objectives import Reference as Reference
    from alter.methods.objectives import RetainObjective as RetainObjective
    from alter.methods.objectives import mean_or_zero as mean_or_zero
    from alter.methods.passes import MeasuredGradients as MeasuredGradients
    from alter.methods.passes import starting_factors as starting_factors
    from alter.methods.places import block_at as block_at
    from alter.methods.places import blocks as blocks
    from alter.methods.places import target_layers as target_layers
    from alter.methods.places import target_names as target_names
    from alter.methods.presets import METHODS as METHODS
    from alter.methods.presets import merged as merged
    from alter.methods.presets import with_default as with_default
    from alter.methods.probes import low_rank as low_rank
    from alter.methods.probes import reinforce as reinforce
    from alter.methods.recognition import codes_from as codes_from
    from alter.methods.recognition import ignorance as ignorance
    from alter.methods.recognition import marked as marked
    from alter.methods.recognition import measure_codes as measure_codes
    from alter.methods.recognition import subjects as subjects
    from alter.methods.reinforcement import Reinforcement as Reinforcement
    from alter.methods.sparse import read_autoencoder as read_autoencoder
    from alter.methods.tracing import recovered as recovered

lazy(globals())
