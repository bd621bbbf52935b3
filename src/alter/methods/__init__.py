"""What a method is made of, and the published combinations.

`adapters` say what is trained, `initializers` where it starts, `objectives` what for, `gradients` how the forget
term's gradient is edited; `presets` combine these under published names; `places` are those in the model that they name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.methods import presets as presets
    from alter.methods.adapters import AlterAdapter as AlterAdapter
    from alter.methods.adapters import AnyAdapter as AnyAdapter
    from alter.methods.adapters import Beginning as Beginning
    from alter.methods.adapters import Penalty as Penalty
    from alter.methods.adapters import adapter_of as adapter_of
    from alter.methods.adapters.expert import attributed as attributed
    from alter.methods.gradients import AnyGradient as AnyGradient
    from alter.methods.gradients import GradientRule as GradientRule
    from alter.methods.gradients import Plain as Plain
    from alter.methods.initializers import AnyInitializer as AnyInitializer
    from alter.methods.initializers import Factors as Factors
    from alter.methods.initializers import Initializer as Initializer
    from alter.methods.initializers import Start as Start
    from alter.methods.initializers import Zero as Zero
    from alter.methods.initializers import covariance as covariance
    from alter.methods.initializers import variance as variance
    from alter.methods.objectives import Codes as Codes
    from alter.methods.objectives import CrossEntropy as CrossEntropy
    from alter.methods.objectives import Emitted as Emitted
    from alter.methods.objectives import ForgetObjective as ForgetObjective
    from alter.methods.objectives import Hidden as Hidden
    from alter.methods.objectives import InvertedHinge as InvertedHinge
    from alter.methods.objectives import Labelled as Labelled
    from alter.methods.objectives import Needs as Needs
    from alter.methods.objectives import Objective as Objective
    from alter.methods.objectives import Redirect as Redirect
    from alter.methods.objectives import Reference as Reference
    from alter.methods.objectives import RetainObjective as RetainObjective
    from alter.methods.objectives import UnknownCode as UnknownCode
    from alter.methods.objectives import mean_or_zero as mean_or_zero
    from alter.methods.places import block_at as block_at
    from alter.methods.places import blocks as blocks
    from alter.methods.places import target_layers as target_layers
    from alter.methods.places import target_names as target_names
    from alter.methods.presets import METHODS as METHODS
    from alter.methods.presets import overridden as overridden
    from alter.methods.presets import with_default as with_default

lazy(globals())
